// The selective scan and the causal convolution before it, on CPU, forward and backward.
//
// A vector is a block of channels, as many as the processor takes at once (sixteen with AVX-512).
// A block walks along the tokens in chunks, a group of its states at a time in registers. Forward
// saves the states at the start of every chunk; backward computes a chunk again from there, so
// that memory is O(n) and (b, n, d, s) never exists. Work is cut by shape alone and sums are added
// in a fixed order: the result does not depend on the number of threads.
//
// Plain C interface over raw pointers, float32; strides in floats; the last dimension is dense.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

constexpr int PADDED = 16;  // saved states have room for d rounded up to this, on any processor
constexpr int CHUNK = 16, MAX_STATE = 64, MAX_TAPS = 8;

struct Rows {  // a (b, n, width) tensor whose last dimension is dense
  float* data;
  int64_t batch, row;  // strides
  float* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

// log(1 + e) for 0 <= e <= 1 as 2 artanh(e / (2 + e)): no digit is lost where e is small.
inline vec log1p(vec e) {
  const vec q = e / (e + 2.0f), w = q * q;
  vec p = vec{} + 0.280121905f;
  p = p * w + 0.280017674f;
  p = p * w + 0.400215293f;
  p = p * w + 0.666664163f;
  p = p * w + 2.0f;
  return p * q;
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// softplus, and its derivative, sigmoid(x). Only exp of what is not positive is taken: it cannot
// overflow.
inline vec softplus(vec x, vec* derivative = nullptr) {
  const vec e = exp(x > 0.0f ? -x : x);
  if (derivative) *derivative = (x > 0.0f ? vec{} + 1.0f : e) / (1.0f + e);
  return (x > 0.0f ? x : vec{}) + log1p(e);
}

struct Scan {
  Rows u, dt, B, C, z;  // z.data may be null: no gate
  const float *A, *D;   // (d, s), (d)
  int64_t b, n, d;
  int s;
  int64_t chunks() const { return (n + CHUNK - 1) / CHUNK; }
  int64_t blocks() const { return (d + LANES - 1) / LANES; }
  // Where the states of a block before token `first` are in `saved`.
  int64_t start(int64_t image, int64_t first, int64_t block) const {
    return ((image * chunks() + first / CHUNK) * blocks() + block) * s * LANES;
  }
  int steps(int64_t first) const { return n - first < CHUNK ? int(n - first) : CHUNK; }
  int lanes(int64_t block) const {
    const int64_t left = d - block * LANES;
    return left < LANES ? int(left) : LANES;
  }
};

// A rate over ln 2. What is finite stays so: an infinite rate times a state that has decayed to 0
// would be no number.
inline float in_base_2(float rate) {
  const float scaled = rate * LOG2_E;
  return std::isinf(rate) ? rate : std::min(std::max(scaled, -FLT_MAX), FLT_MAX);
}

// A of one block as [s][lane], in units of ln 2: exponentials are taken in base 2.
void transpose_rates(const Scan& k, int64_t block, vec* A) {
  const int m = k.lanes(block);
  for (int j = 0; j < k.s; j++) {
    A[j] = vec{};
    for (int l = 0; l < m; l++) A[j][l] = in_base_2(k.A[(block * LANES + l) * k.s + j]);
  }
}

// The rows of a block lie pages apart, where the hardware foresees nothing: ask a chunk ahead. 1:
// for writing too, since some of these rows are outputs.
inline void prefetch(const Rows& rows, int64_t b, int64_t i, int64_t c) {
  if (rows.data) __builtin_prefetch(rows.at(b, i) + c, 1);
}

// One chunk of one block: dt, what drives the state, and the output so far, one vector a token.
struct Forward {
  const Scan& k;
  const Rows y;
  float* saved;  // (b, chunks, blocks, s, LANES), or null
  vec dt[CHUNK], drive[CHUNK], out[CHUNK];

  Forward(const Scan& k, Rows y, float* saved) : k(k), y(y), saved(saved) {}

  void read(int64_t b, int64_t c, int m, int64_t first, int steps) {
    const vec D = load(k.D + c, m);
    for (int i = 0; i < steps; i++) {
      const int64_t at = first + i, next = at + CHUNK;
      if (next < k.n)
        for (const Rows& rows : {k.u, k.dt, k.z, y}) prefetch(rows, b, next, c);
      const vec u = load(k.u.at(b, at) + c, m);
      dt[i] = softplus(load(k.dt.at(b, at) + c, m));
      drive[i] = dt[i] * u;
      out[i] = D * u;
    }
  }

  // GROUP states from number q on; `state` is before the chunk, then after it. Of one group at a
  // time h stays in registers, while dt, drive and out are read again for each.
  template <int GROUP>
  void group(int64_t b, int64_t first, int steps, int q, const vec* A, vec* state) {
    vec h[GROUP];
    UNROLL for (int j = 0; j < GROUP; j++) h[j] = state[j];
    for (int i = 0; i < steps; i++) {
      const float *B = k.B.at(b, first + i) + q, *C = k.C.at(b, first + i) + q;
      vec sum[4] = {out[i]};  // four, for the latency of an addition
      UNROLL for (int j = 0; j < GROUP; j++) {
        h[j] = exp2(dt[i] * A[j]) * h[j] + drive[i] * B[j];
        sum[j % 4] += h[j] * C[j];
      }
      out[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    UNROLL for (int j = 0; j < GROUP; j++) state[j] = h[j];
  }

  void write(int64_t b, int64_t c, int m, int64_t first, int steps) {
    for (int i = 0; i < steps; i++) {
      if (k.z.data) {
        const vec z = load(k.z.at(b, first + i) + c, m);
        out[i] *= z * sigmoid(z);
      }
      store(y.at(b, first + i) + c, out[i], m);
    }
  }

  // y may be u: a chunk is read whole before it is written, and no other block reads its channels.
  template <int GROUP>
  void run(int64_t b, int64_t block) {
    const int64_t c = block * LANES;
    const int m = k.lanes(block);
    vec A[MAX_STATE], h[MAX_STATE];
    transpose_rates(k, block, A);
    for (int j = 0; j < k.s; j++) h[j] = vec{};
    for (int64_t first = 0; first < k.n; first += CHUNK) {
      const int steps = k.steps(first);
      if (saved) std::memcpy(saved + k.start(b, first, block), h, k.s * sizeof(vec));
      read(b, c, m, first, steps);
      for (int q = 0; q < k.s; q += GROUP) group<GROUP>(b, first, steps, q, A + q, h + q);
      write(b, c, m, first, steps);
    }
  }
};

struct Gradients {
  Rows dy;                 // (b, n, d)
  const float* saved;      // (b, chunks, blocks, s, LANES)
  Rows du, ddt, dz;        // (b, n, d) each
  float *dA, *dD;          // (b, d, s), (b, d): summed over b by the caller
  float *dB, *dC;          // (groups, b, n, s): summed over groups by the caller
};

// One chunk of one block, backward. With e_i = exp(dt_i A), state h_i = e_i h_{i-1} + drive_i B_i
// and dh_i its gradient: dh_i = e_{i+1} dh_{i+1} + dy_i C_i. The gradient of the exponent dt_i A is
// dh_i e_i h_{i-1}, from which those of dt_i and A follow.
struct Backward {
  const Scan& k;
  const Gradients& g;
  vec decay[CHUNK * 4], decayed[CHUNK * 4];  // of one group of states: e and e h
  vec sumB[CHUNK * MAX_STATE], sumC[CHUNK * MAX_STATE];  // gradients, over the blocks so far
  vec u[CHUNK], dt[CHUNK], sigmoid_dt[CHUNK], drive[CHUNK], dy[CHUNK], dgate[CHUNK];
  vec plain[CHUNK], ddrive[CHUNK], ddt[CHUNK];  // plain: the output before its gate

  Backward(const Scan& k, const Gradients& g) : k(k), g(g) {}

  // The inputs of a chunk; dy comes back through the gate, and dgate times the plain output is dz.
  void read(int64_t b, int64_t c, int m, int64_t first, int steps, vec* dD) {
    const vec D = load(k.D + c, m);
    for (int i = 0; i < steps; i++) {
      const int64_t at = first + i;
      if (at >= CHUNK)  // the chunk before this one comes next
        for (const Rows& rows : {k.u, k.dt, k.z, g.dy, g.du, g.ddt, g.dz})
          prefetch(rows, b, at - CHUNK, c);
      u[i] = load(k.u.at(b, at) + c, m);
      dt[i] = softplus(load(k.dt.at(b, at) + c, m), &sigmoid_dt[i]);
      drive[i] = dt[i] * u[i];
      dy[i] = load(g.dy.at(b, at) + c, m);
      if (k.z.data) {
        const vec z = load(k.z.at(b, at) + c, m), sig = sigmoid(z), silu = z * sig;
        dgate[i] = dy[i] * (sig + silu * (1.0f - sig));
        dy[i] *= silu;
      }
      *dD += dy[i] * u[i];
      plain[i] = D * u[i];
      ddrive[i] = ddt[i] = vec{};
    }
  }

  // GROUP states from number q on, `state` before the chunk: decays and decayed states of all its
  // tokens are left for `backpropagate`, and the gradient of C is added up.
  template <int GROUP>
  void recompute(int64_t b, int64_t first, int steps, int q, const vec* A, const float* state) {
    vec h[GROUP];
    UNROLL for (int j = 0; j < GROUP; j++) h[j] = load(state + j * LANES, LANES);
    for (int i = 0; i < steps; i++) {
      const float *B = k.B.at(b, first + i) + q, *C = k.C.at(b, first + i) + q;
      vec *e = decay + i * GROUP, *eh = decayed + i * GROUP, *dC = sumC + i * k.s + q;
      // Copies: the compiler would load the members again after every store.
      const vec dt_i = dt[i], drive_i = drive[i], dy_i = dy[i];
      vec out = vec{};
      UNROLL for (int j = 0; j < GROUP; j++) {
        const vec e_j = exp2(dt_i * A[j]), eh_j = e_j * h[j];
        e[j] = e_j;
        eh[j] = eh_j;
        h[j] = eh_j + drive_i * B[j];
        out += h[j] * C[j];
        dC[j] += dy_i * h[j];
      }
      plain[i] += out;
    }
  }

  // The same tokens from the last to the first: `dstate` is the gradient of the states after the
  // chunk, then of those before it.
  template <int GROUP>
  void backpropagate(int64_t b, int64_t first, int steps, int q, const vec* A, vec* dstate,
                     vec* dA) {
    vec next[GROUP], sum[GROUP];  // next: what comes back from the token after
    UNROLL for (int j = 0; j < GROUP; j++) next[j] = dstate[j], sum[j] = dA[j];
    for (int i = steps - 1; i >= 0; i--) {
      const float *B = k.B.at(b, first + i) + q, *C = k.C.at(b, first + i) + q;
      const vec *e = decay + i * GROUP, *eh = decayed + i * GROUP;
      vec *dB = sumB + i * k.s + q, ddrive_i = vec{}, ddt_i = vec{};
      const vec dt_i = dt[i], drive_i = drive[i], dy_i = dy[i];
      UNROLL for (int j = 0; j < GROUP; j++) {
        const vec dh = next[j] + dy_i * C[j], dexponent = dh * eh[j];
        next[j] = dh * e[j];
        dB[j] += dh * drive_i;
        ddrive_i += dh * B[j];
        ddt_i += dexponent * A[j];
        sum[j] += dexponent * dt_i;
      }
      ddrive[i] += ddrive_i;
      ddt[i] += ddt_i;
    }
    UNROLL for (int j = 0; j < GROUP; j++) dstate[j] = next[j], dA[j] = sum[j];
  }

  void write(int64_t b, int64_t c, int m, int64_t first, int steps) {
    const vec D = load(k.D + c, m);
    for (int i = 0; i < steps; i++) {
      const int64_t at = first + i;
      store(g.du.at(b, at) + c, D * dy[i] + ddrive[i] * dt[i], m);
      // ddt was added up with A over ln 2.
      store(g.ddt.at(b, at) + c, (ddt[i] * LN_2 + ddrive[i] * u[i]) * sigmoid_dt[i], m);
      if (k.z.data) store(g.dz.at(b, at) + c, dgate[i] * plain[i], m);
    }
  }

  // All tokens of one image and of the blocks [low, high), which are group number `group`. Chunks
  // are the outer loop, so that the sums over blocks for B and C of one chunk stay in the cache;
  // what a block carries from chunk to chunk lies in vectors meanwhile.
  template <int GROUP>
  void run(int64_t b, int64_t low, int64_t high, int64_t group) {
    const int s = k.s;
    const int64_t blocks = high - low;
    std::vector<vec> A(blocks * s), dh(blocks * s, vec{}), dA(blocks * s, vec{});
    std::vector<vec> dD(blocks, vec{});
    for (int64_t p = 0; p < blocks; p++) transpose_rates(k, low + p, &A[p * s]);
    for (int64_t chunk = k.chunks() - 1; chunk >= 0; chunk--) {
      const int64_t first = chunk * CHUNK, to = ((group * k.b + b) * k.n + first) * s;
      const int steps = k.steps(first);
      for (int j = 0; j < steps * s; j++) sumB[j] = sumC[j] = vec{};
      for (int64_t p = 0; p < blocks; p++) {
        const int64_t c = (low + p) * LANES;
        const int m = k.lanes(low + p);
        const float* state = g.saved + k.start(b, first, low + p);
        read(b, c, m, first, steps, &dD[p]);
        for (int q = 0; q < s; q += GROUP) {
          recompute<GROUP>(b, first, steps, q, &A[p * s + q], state + q * LANES);
          backpropagate<GROUP>(b, first, steps, q, &A[p * s + q], &dh[p * s + q], &dA[p * s + q]);
        }
        write(b, c, m, first, steps);
      }
      for (int j = 0; j < steps * s; j++) g.dB[to + j] = sum(sumB[j]), g.dC[to + j] = sum(sumC[j]);
    }
    for (int64_t p = 0; p < blocks; p++) {
      const int64_t c = b * k.d + (low + p) * LANES;
      store(g.dD + c, dD[p], k.lanes(low + p));
      for (int l = 0; l < k.lanes(low + p); l++)  // back from [s][lane]
        for (int j = 0; j < s; j++) g.dA[(c + l) * s + j] = dA[p * s + j][l];
    }
  }
};

// How many blocks a thread takes at a time: neighbours, whose memory lies side by side and would
// be fetched by two cores; few enough that all threads have work to the end.
inline int64_t blocks_at_once(int64_t items, int threads) {
  const int64_t even = items / (4 * threads);
  return even < 1 ? 1 : even > 16 ? 16 : even;
}

template <int GROUP>
void forward_all(const Scan& k, Rows y, float* saved, int threads) {
  const int64_t blocks = k.blocks(), items = k.b * blocks;
#pragma omp parallel for schedule(dynamic, blocks_at_once(items, threads)) num_threads(threads)
  for (int64_t item = 0; item < items; item++)
    Forward(k, y, saved).run<GROUP>(item / blocks, item % blocks);
}

template <int GROUP>
void backward_all(const Scan& k, const Gradients& g, int64_t groups, int threads) {
  const int64_t blocks = k.blocks();
#pragma omp parallel num_threads(threads)
  {
    const auto backward = std::make_unique<Backward>(k, g);  // large for a thread's stack
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < k.b * groups; item++) {
      const int64_t group = item % groups;
      const int64_t low = group * blocks / groups, high = (group + 1) * blocks / groups;
      backward->run<GROUP>(item / groups, low, high, group);
    }
  }
}

}  // namespace

extern "C" {

// shape: b, n, d, s, then (batch, row) strides of u, dt, B, C, z and, backward, of dz.
static Scan scan_of(const int64_t* shape, float* u, float* dt, float* A, float* B, float* C,
                    float* D, float* z) {
  const int64_t* t = shape + 4;
  return Scan{{u, t[0], t[1]}, {dt, t[2], t[3]}, {B, t[4], t[5]}, {C, t[6], t[7]},
              {z, t[8], t[9]}, A, D, shape[0], shape[1], shape[2], int(shape[3])};
}

// What Python allocates by; it compares these when it loads the library.
int mambaflow_chunk() { return CHUNK; }
int mambaflow_lanes() { return PADDED; }
int mambaflow_states() { return MAX_STATE; }
int mambaflow_taps() { return MAX_TAPS; }

// saved null: no backward pass will come. Groups as large as divide s and leave registers, of which
// AVX-512 has thirty-two, for h, A and the sums.
void mambaflow_scan_forward(const int64_t* shape, float* u, float* dt, float* A, float* B,
                            float* C, float* D, float* z, float* y, float* saved, int threads) {
  const Scan k = scan_of(shape, u, dt, A, B, C, D, z);
  const Rows to{y, k.n * k.d, k.d};
  if (k.s % 16 == 0 && LANES == 16) return forward_all<16>(k, to, saved, threads);
  if (k.s % 8 == 0) return forward_all<8>(k, to, saved, threads);
  if (k.s % 4 == 0) return forward_all<4>(k, to, saved, threads);
  forward_all<1>(k, to, saved, threads);
}

// All but dz, whose rows may lie within wider ones, is dense. Blocks are shared out in `groups`,
// each of which sums dB and dC by itself.
void mambaflow_scan_backward(const int64_t* shape, float* u, float* dt, float* A, float* B,
                             float* C, float* D, float* z, float* dy, float* saved, float* du,
                             float* ddt, float* dz, float* dA, float* dD, float* dB, float* dC,
                             int64_t groups, int threads) {
  const Scan k = scan_of(shape, u, dt, A, B, C, D, z);
  const int64_t row = k.d, batch = k.n * k.d;
  const Gradients g{{dy, batch, row}, saved, {du, batch, row}, {ddt, batch, row},
                    {dz, shape[14], shape[15]}, dA, dD, dB, dC};
  if (k.s % 4 == 0) return backward_all<4>(k, g, groups, threads);
  backward_all<1>(k, g, groups, threads);
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
    const int64_t skip = i < taps - 1 ? taps - 1 - i : 0;  // taps before the first token: zeros
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

// dx, and for each image the gradients of weight (b, taps, d) and bias (b, d). shape: b, n, d,
// taps, then (batch, row) strides of x and, backward, of dx.
void mambaflow_conv_backward(const int64_t* shape, float* x, float* weight, float* bias, float* dy,
                             float* dx, float* dweight, float* dbias, int threads) {
  const int64_t b = shape[0], n = shape[1], d = shape[2];
  const int taps = int(shape[3]);
  const Rows in{x, shape[4], shape[5]}, slope{dy, n * d, d}, to{dx, shape[6], shape[7]};
  const int64_t blocks = (d + LANES - 1) / LANES, items = b * blocks;
#pragma omp parallel for schedule(dynamic, blocks_at_once(items, threads)) num_threads(threads)
  for (int64_t item = 0; item < items; item++) {
    const int64_t image = item / blocks, c = item % blocks * LANES, left = d - c;
    const int m = left < LANES ? int(left) : LANES;
    // Of the last `taps` tokens, the oldest first: inputs, and gradients of these so far. The
    // gradient of a token is whole once it leaves the window, taps - 1 tokens later, for which the
    // loop goes on beyond the last token.
    vec w[MAX_TAPS], dw[MAX_TAPS], window[MAX_TAPS], dwindow[MAX_TAPS];
    for (int j = 0; j < taps; j++) {
      w[j] = load(weight + j * d + c, m);
      dw[j] = window[j] = dwindow[j] = vec{};
    }
    const vec offset = load(bias + c, m);
    vec db = vec{};
    for (int64_t i = 0; i < n + taps - 1; i++) {
      if (i + CHUNK < n)
        for (const Rows& rows : {in, slope, to}) prefetch(rows, image, i + CHUNK, c);
      for (int j = 0; j + 1 < taps; j++) window[j] = window[j + 1], dwindow[j] = dwindow[j + 1];
      dwindow[taps - 1] = vec{};
      window[taps - 1] = i < n ? load(in.at(image, i) + c, m) : vec{};
      if (i < n) {
        vec out = offset;
        for (int j = 0; j < taps; j++) out += w[j] * window[j];
        const vec sig = sigmoid(out);
        const vec g = load(slope.at(image, i) + c, m) * (sig * (1.0f + out * (1.0f - sig)));
        db += g;
        for (int j = 0; j < taps; j++) dw[j] += g * window[j], dwindow[j] += g * w[j];
      }
      if (i >= taps - 1) store(to.at(image, i - taps + 1) + c, dwindow[0], m);
    }
    store(dbias + image * d + c, db, m);
    for (int j = 0; j < taps; j++) store(dweight + (image * taps + j) * d + c, dw[j], m);
  }
}

}  // extern "C"
