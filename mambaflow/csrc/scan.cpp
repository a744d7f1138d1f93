// The selective scan and the causal convolution before it, on CPU, forward and backward.
//
// Sixteen channels are one vector; a block of sixteen keeps its s states in registers while it
// walks along the tokens. Forward keeps the states at the start of every CHUNK tokens; backward
// computes a chunk again from there, so that memory is O(n) and (b, n, d, s) never exists.
// Work is cut by shape alone and sums are added in a fixed order: the result does not depend
// on the number of threads.
//
// Plain C interface over raw pointers, float32; strides in floats; the last dimension is dense.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16, CHUNK = 16, MAX_STATE = 64, MAX_TAPS = 8;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

struct Rows {  // a (b, n, width) tensor whose last dimension is dense
  float* data;
  int64_t batch, row;
  float* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

inline vec load(const float* p, int m) {
  vec v;
  if (m == LANES) {
    std::memcpy(&v, p, sizeof v);
  } else {
    v = vec{};
    std::memcpy(&v, p, m * sizeof(float));
  }
  return v;
}

inline void store(float* p, vec v, int m) {
  if (m == LANES)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, m * sizeof(float));
}

inline vec clamp(vec x, float low, float high) {
  x = x < low ? vec{} + low : x;
  return x > high ? vec{} + high : x;
}

// exp to 2 ulp: 2^n 2^f with |f| <= 1/2, and the Taylor polynomial of e^r, r = f ln 2.
inline vec exp(vec x) {
  x = clamp(x, -87.0f, 88.0f);
  const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // round to nearest
  vec r = x - n * 0.693359375f;                                  // ln 2 in two parts
  r = r + n * 2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// log(1 + e) for 0 <= e <= 1 as 2 artanh(e / (2 + e)): no digit is lost where e is small.
inline vec log1p(vec e) {
  const vec q = e / (e + 2.0f), w = q * q;
  vec p = vec{} + 0.0769230769f;
  p = p * w + 0.0909090909f;
  p = p * w + 0.1111111111f;
  p = p * w + 0.1428571429f;
  p = p * w + 0.2f;
  p = p * w + 0.3333333333f;
  p = p * w + 1.0f;
  return 2.0f * q * p;
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

inline vec softplus(vec x) {
  const vec e = exp(x > 0.0f ? -x : x);
  return (x > 0.0f ? x : vec{}) + log1p(e);
}

inline float sum(vec v) {  // a tree: the same order on every machine
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

struct Scan {
  Rows u, dt, B, C, z;  // z.data may be null: no gate
  const float *A, *D;   // (d, s), (d)
  int64_t b, n, d;
  int s;
  int64_t chunks() const { return (n + CHUNK - 1) / CHUNK; }
  int64_t blocks() const { return (d + LANES - 1) / LANES; }
  int lanes(int64_t block) const {
    const int64_t left = d - block * LANES;
    return left < LANES ? int(left) : LANES;
  }
};

// A of one block as [s][lane].
template <int S>
inline void turn(const Scan& k, int64_t block, vec* A) {
  const int s = S ? S : k.s, m = k.lanes(block);
  for (int j = 0; j < s; j++) {
    A[j] = vec{};
    for (int l = 0; l < m; l++) A[j][l] = k.A[(block * LANES + l) * s + j];
  }
}

template <int S>
void forward_block(const Scan& k, int64_t b, int64_t block, float* y, float* kept) {
  const int s = S ? S : k.s, m = k.lanes(block);
  const int64_t c = block * LANES;
  vec A[S ? S : MAX_STATE], h[S ? S : MAX_STATE];
  turn<S>(k, block, A);
  for (int j = 0; j < s; j++) h[j] = vec{};
  const vec D = load(k.D + c, m);
  for (int64_t i = 0; i < k.n; i++) {
    if (kept && i % CHUNK == 0)
      std::memcpy(kept + ((b * k.chunks() + i / CHUNK) * k.blocks() + block) * s * LANES, h,
                  s * sizeof(vec));
    const vec u = load(k.u.at(b, i) + c, m);
    const vec dt = softplus(load(k.dt.at(b, i) + c, m)), drive = dt * u;
    const float *B = k.B.at(b, i), *C = k.C.at(b, i);
    vec out = D * u, more = vec{};
    for (int j = 0; j < s; j++) {
      h[j] = exp(dt * A[j]) * h[j] + drive * B[j];
      if (j & 1)
        more += h[j] * C[j];
      else
        out += h[j] * C[j];
    }
    out += more;
    if (k.z.data) {
      const vec z = load(k.z.at(b, i) + c, m);
      out *= z * sigmoid(z);
    }
    store(y + (b * k.n + i) * k.d + c, out, m);
  }
}

struct Gradients {
  const float* dy;                        // (b, n, d)
  const float* kept;                      // (b, chunks, blocks, s, LANES)
  Rows du, ddt, dz;                       // (b, n, d) each
  float *dA, *dD;                         // (b, d, s), (b, d): summed over b by the caller
  float *dB, *dC;                         // (groups, b, n, s): summed over groups by the caller
};

template <int S>
struct Backward {
  static constexpr int SIZE = S ? S : MAX_STATE;
  const Scan& k;
  const Gradients& g;
  const int s;
  vec states[(CHUNK + 1) * SIZE], decay[CHUNK * SIZE];
  vec sumB[CHUNK * SIZE], sumC[CHUNK * SIZE];
  vec dt[CHUNK], u[CHUNK], raw[CHUNK], plain[CHUNK];

  Backward(const Scan& k, const Gradients& g) : k(k), g(g), s(S ? S : k.s) {}

  // States and decays of `steps` tokens from the kept state.
  void recompute(int64_t b, int64_t block, int64_t first, int steps, const vec* A, vec D) {
    const int m = k.lanes(block);
    const int64_t c = block * LANES;
    std::memcpy(states,
                g.kept + ((b * k.chunks() + first / CHUNK) * k.blocks() + block) * s * LANES,
                s * sizeof(vec));
    for (int i = 0; i < steps; i++) {
      u[i] = load(k.u.at(b, first + i) + c, m);
      raw[i] = load(k.dt.at(b, first + i) + c, m);
      dt[i] = softplus(raw[i]);
      const vec drive = dt[i] * u[i];
      const float *B = k.B.at(b, first + i), *C = k.C.at(b, first + i);
      const vec* h = states + i * s;
      vec *next = states + (i + 1) * s, *e = decay + i * s, out = D * u[i];
      for (int j = 0; j < s; j++) {
        e[j] = exp(dt[i] * A[j]);
        next[j] = e[j] * h[j] + drive * B[j];
        out += next[j] * C[j];
      }
      plain[i] = out;
    }
  }

  // Back through `steps` tokens; `gh` is the gradient of the state after them, then before them.
  void back(int64_t b, int64_t block, int64_t first, int steps, const vec* A, vec D, vec* gh,
            vec* dA, vec* dD) {
    const int m = k.lanes(block);
    const int64_t c = block * LANES;
    for (int i = steps - 1; i >= 0; i--) {
      const int64_t at = first + i;
      vec dy = load(g.dy + (b * k.n + at) * k.d + c, m);
      if (k.z.data) {
        const vec z = load(k.z.at(b, at) + c, m), sig = sigmoid(z);
        store(g.dz.at(b, at) + c, dy * plain[i] * (sig * (1.0f + z * (1.0f - sig))), m);
        dy *= z * sig;
      }
      *dD += dy * u[i];
      const float *B = k.B.at(b, at), *C = k.C.at(b, at);
      const vec drive = dt[i] * u[i], *h = states + i * s, *next = h + s, *e = decay + i * s;
      vec ddrive = vec{}, ddt = vec{};
      for (int j = 0; j < s; j++) {
        const vec full = gh[j] + dy * C[j];
        sumC[i * s + j] += dy * next[j];
        sumB[i * s + j] += full * drive;
        ddrive += full * B[j];
        gh[j] = full * e[j];
        const vec q = gh[j] * h[j];
        ddt += q * A[j];
        dA[j] += q * dt[i];
      }
      store(g.du.at(b, at) + c, D * dy + ddrive * dt[i], m);
      store(g.ddt.at(b, at) + c, (ddt + ddrive * u[i]) * sigmoid(raw[i]), m);
    }
  }

  // All tokens of one image and of the blocks [low, high), which are group number `group`.
  void run(int64_t b, int64_t low, int64_t high, int64_t group) {
    const int64_t blocks = high - low;
    std::vector<vec> A(blocks * s), gh(blocks * s, vec{}), dA(blocks * s, vec{});
    std::vector<vec> dD(blocks, vec{});
    for (int64_t q = 0; q < blocks; q++) turn<S>(k, low + q, A.data() + q * s);
    for (int64_t chunk = k.chunks() - 1; chunk >= 0; chunk--) {
      const int64_t first = chunk * CHUNK, left = k.n - first;
      const int steps = left < CHUNK ? int(left) : CHUNK;
      std::memset(static_cast<void*>(sumB), 0, steps * s * sizeof(vec));
      std::memset(static_cast<void*>(sumC), 0, steps * s * sizeof(vec));
      for (int64_t q = 0; q < blocks; q++) {
        const vec D = load(k.D + (low + q) * LANES, k.lanes(low + q));
        recompute(b, low + q, first, steps, A.data() + q * s, D);
        back(b, low + q, first, steps, A.data() + q * s, D, gh.data() + q * s,
             dA.data() + q * s, &dD[q]);
      }
      const int64_t to = ((group * k.b + b) * k.n + first) * s;
      for (int j = 0; j < steps * s; j++) g.dB[to + j] = sum(sumB[j]), g.dC[to + j] = sum(sumC[j]);
    }
    for (int64_t q = 0; q < blocks; q++) {
      const int64_t c = b * k.d + (low + q) * LANES;
      store(g.dD + c, dD[q], k.lanes(low + q));
      for (int l = 0; l < k.lanes(low + q); l++)
        for (int j = 0; j < s; j++) g.dA[(c + l) * s + j] = dA[q * s + j][l];
    }
  }
};

template <int S>
void forward_all(const Scan& k, float* y, float* kept, int threads) {
  const int64_t blocks = k.blocks();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < k.b * blocks; item++)
    forward_block<S>(k, item / blocks, item % blocks, y, kept);
}

template <int S>
void backward_all(const Scan& k, const Gradients& g, int64_t groups, int threads) {
  const int64_t blocks = k.blocks();
#pragma omp parallel num_threads(threads)
  {
    std::vector<char> room(sizeof(Backward<S>) + 64);
    void* place = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~63ull);
    Backward<S>* backward = new (place) Backward<S>(k, g);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < k.b * groups; item++) {
      const int64_t group = item % groups;
      backward->run(item / groups, group * blocks / groups, (group + 1) * blocks / groups, group);
    }
  }
}

}  // namespace

#define BY_STATE(call)          \
  switch (k.s) {                \
    case 4: call(4); break;     \
    case 8: call(8); break;     \
    case 16: call(16); break;   \
    case 32: call(32); break;   \
    case 64: call(64); break;   \
    default: call(0);           \
  }

extern "C" {

// shape: b, n, d, s, then (batch, row) strides of u, dt, B, C, z.
static Scan scan_of(const int64_t* shape, float* u, float* dt, float* A, float* B, float* C,
                    float* D, float* z) {
  const int64_t* t = shape + 4;
  return Scan{{u, t[0], t[1]}, {dt, t[2], t[3]}, {B, t[4], t[5]}, {C, t[6], t[7]},
              {z, t[8], t[9]}, A, D, shape[0], shape[1], shape[2], int(shape[3])};
}

int mambaflow_chunk() { return CHUNK; }
int mambaflow_lanes() { return LANES; }

void mambaflow_scan_forward(const int64_t* shape, float* u, float* dt, float* A, float* B,
                            float* C, float* D, float* z, float* y, float* kept, int threads) {
  const Scan k = scan_of(shape, u, dt, A, B, C, D, z);
#define CALL(S) forward_all<S>(k, y, kept, threads)
  BY_STATE(CALL)
#undef CALL
}

void mambaflow_scan_backward(const int64_t* shape, float* u, float* dt, float* A, float* B,
                             float* C, float* D, float* z, float* dy, float* kept, float* du,
                             float* ddt, float* dz, float* dA, float* dD, float* dB, float* dC,
                             int64_t groups, int threads) {
  const Scan k = scan_of(shape, u, dt, A, B, C, D, z);
  const int64_t row = k.d, batch = k.n * k.d;
  const Gradients g{dy, kept, {du, batch, row}, {ddt, batch, row}, {dz, batch, row},
                    dA, dD, dB, dC};
#define CALL(S) backward_all<S>(k, g, groups, threads)
  BY_STATE(CALL)
#undef CALL
}

// y_i = silu(bias + sum_j weight_j x_{i - taps + 1 + j}), each channel by itself; weight (taps, d).
void mambaflow_conv_forward(const int64_t* shape, float* x, float* weight, float* bias, float* y,
                            int threads) {
  const int64_t b = shape[0], n = shape[1], d = shape[2];
  const int taps = int(shape[3]);
  const Rows in{x, shape[4], shape[5]};
  const int64_t blocks = (d + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < b * n; row++) {
    const int64_t image = row / n, i = row % n;
    const int64_t skip = i < taps - 1 ? taps - 1 - i : 0;
    for (int64_t q = 0; q < blocks; q++) {
      const int64_t c = q * LANES, left = d - c;
      const int m = left < LANES ? int(left) : LANES;
      vec out = load(bias + c, m);
      for (int64_t j = skip; j < taps; j++)
        out += load(weight + j * d + c, m) * load(in.at(image, i - taps + 1 + j) + c, m);
      store(y + row * d + c, out * sigmoid(out), m);
    }
  }
}

// dx, and for each image the gradients of weight (b, taps, d) and bias (b, d).
void mambaflow_conv_backward(const int64_t* shape, float* x, float* weight, float* bias, float* dy,
                             float* dx, float* dweight, float* dbias, int threads) {
  const int64_t b = shape[0], n = shape[1], d = shape[2];
  const int taps = int(shape[3]);
  const Rows in{x, shape[4], shape[5]};
  const int64_t blocks = (d + LANES - 1) / LANES;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < b * blocks; item++) {
    const int64_t image = item / blocks, c = item % blocks * LANES, left = d - c;
    const int m = left < LANES ? int(left) : LANES;
    vec w[MAX_TAPS], dw[MAX_TAPS], seen[MAX_TAPS], owed[MAX_TAPS];
    for (int j = 0; j < taps; j++) {
      w[j] = load(weight + j * d + c, m);
      dw[j] = seen[j] = owed[j] = vec{};
    }
    const vec offset = load(bias + c, m);
    vec db = vec{};
    for (int64_t i = 0; i < n + taps - 1; i++) {  // seen: inputs; owed: gradients of inputs
      for (int j = 0; j + 1 < taps; j++) seen[j] = seen[j + 1], owed[j] = owed[j + 1];
      owed[taps - 1] = vec{};
      seen[taps - 1] = i < n ? load(in.at(image, i) + c, m) : vec{};
      if (i < n) {
        vec out = offset;
        for (int j = 0; j < taps; j++) out += w[j] * seen[j];
        const vec sig = sigmoid(out);
        const vec g = load(dy + (image * n + i) * d + c, m) * (sig * (1.0f + out * (1.0f - sig)));
        db += g;
        for (int j = 0; j < taps; j++) dw[j] += g * seen[j], owed[j] += g * w[j];
      }
      if (i >= taps - 1) store(dx + (image * n + i - taps + 1) * d + c, owed[0], m);
    }
    store(dbias + image * d + c, db, m);
    for (int j = 0; j < taps; j++) store(dweight + (image * taps + j) * d + c, dw[j], m);
  }
}

}  // extern "C"
