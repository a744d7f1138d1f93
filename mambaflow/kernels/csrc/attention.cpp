// softmax(q k') v on CPU, forward and backward, for heads of any width; queries and keys of any
// number.
//
// A block of queries meets a tile of keys at a time: their scores stay in the cache, and the
// softmax is corrected from tile to tile (Milakov & Gimelshein 2018; Dao et al. 2022), so that
// memory is O(n + m). Products go through one kernel whose sums stay in registers. Backward
// computes the scores again from each row's maximum and sum. Sums are added in an order that is
// fixed by shape: the result does not depend on the number of threads, nor a row's on the rows
// beside it.
//
// Plain C interface over raw pointers, float32; strides in floats; the last dimension is dense.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 48, TILE = 256;  // queries and keys that meet at once
constexpr int64_t STEP = 4;                // rows come in fours, the last ones zeros
constexpr float MASKED = -INFINITY;        // a score that the softmax makes 0
// The maximum of no scores: finite, since a row of -infinity alone would subtract it from itself.
constexpr float LOWEST = -FLT_MAX;

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Heads {  // a (b, h, n, width) tensor whose last dimension is dense
  float* data;
  int64_t batch, head, row;  // strides
  float* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch + h * head + i * row;
  }
};

struct Factor {  // a(i, k) at data[i row + k step]: either stride may be 1, so that a is transposed
  const float* data;
  int64_t row, step;
};

// The innermost product: R rows by V vectors of c += a b, b (depth, columns) with `width` floats a
// row. All R x V sums stay in registers while k walks along the depth.
template <int R, int V>
inline void micro_kernel(Factor a, const float* b, int64_t width, int64_t depth, float* c,
                         int64_t row) {
  vec sum[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sum[r][v] = load(c + r * row + v * LANES, LANES);
  for (int64_t k = 0; k < depth; k++) {
    vec right[V];
    UNROLL for (int v = 0; v < V; v++) right[v] = load(b + k * width + v * LANES, LANES);
    UNROLL for (int r = 0; r < R; r++) {
      const float left = a.data[r * a.row + k * a.step];
      UNROLL for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) store(c + r * row + v * LANES, sum[r][v], LANES);
}

// V vectors of all rows, R at a time, and what is left in fours.
template <int R, int V>
inline void panel(Factor a, const float* b, int64_t width, int64_t depth, float* c, int64_t rows) {
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    micro_kernel<R, V>({a.data + i * a.row, a.row, a.step}, b, width, depth, c + i * width, width);
  for (; i < rows; i += STEP)
    micro_kernel<STEP, V>({a.data + i * a.row, a.row, a.step}, b, width, depth, c + i * width,
                          width);
}

// c += a b, for a multiple of STEP rows; b and c have `width` floats a row, a multiple of LANES.
// As many sums as there are registers for: thirty-two with AVX-512, else sixteen.
void multiply_add(Factor a, const float* b, int64_t width, int64_t depth, float* c, int64_t rows) {
  constexpr int MOST = LANES == 16 ? 3 : 2, HIGH = LANES == 16 ? 8 : 4;
  int64_t q = 0;
  for (; q + MOST * LANES <= width; q += MOST * LANES)
    panel<HIGH, MOST>(a, b + q, width, depth, c + q, rows);
  for (; q + 2 * LANES <= width; q += 2 * LANES)
    panel<HIGH, 2>(a, b + q, width, depth, c + q, rows);
  for (; q < width; q += LANES) panel<12, 1>(a, b + q, width, depth, c + q, rows);
}

struct Shape {
  int64_t b, h, n, m, e, f;  // n queries, m keys; e and f: widths of keys and values
  int64_t tile() const { return std::min(round_up(m, LANES), TILE); }
  int64_t tiles() const { return (m + tile() - 1) / tile(); }
  int64_t keys(int64_t t) const { return std::min(tile(), m - t * tile()); }
  int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }
  int64_t queries(int64_t block) const { return std::min(BLOCK, n - block * BLOCK); }
};

// Rows as they lie, each filled up with zeros to a multiple of LANES, and rows of zeros to a
// multiple of STEP: products read whole vectors and fours.
void pack_rows(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width,
               float* to) {
  const int64_t padded = round_up(width, LANES);
  std::memset(to, 0, round_up(rows, STEP) * padded * sizeof(float));
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(to + i * padded, from.at(b, h, first + i), width * sizeof(float));
}

// Transposed within each tile: (tiles, width, tile), zeros for the keys that the last tile lacks.
void pack_transposed(const Shape& k, const Heads& from, int64_t b, int64_t h, int64_t width,
                     float* to) {
  const int64_t tile = k.tile();
  for (int64_t t = 0; t < k.tiles(); t++, to += width * tile) {
    const int64_t keys = k.keys(t);
    if (keys < tile) std::memset(to, 0, width * tile * sizeof(float));
    for (int64_t j = 0; j < keys; j++) {
      const float* row = from.at(b, h, t * tile + j);
      for (int64_t i = 0; i < width; i++) to[i * tile + j] = row[i];
    }
  }
}

// The scores of a block of queries with tile t of the keys, MASKED where there is no key.
void compute_scores(const Shape& k, const float* query, int64_t width, const float* keys,
                    int64_t t, int64_t rows, float* scores) {
  const int64_t tile = k.tile(), there = k.keys(t);
  std::memset(scores, 0, rows * tile * sizeof(float));
  multiply_add({query, width, 1}, keys + t * k.e * tile, tile, k.e, scores, rows);
  for (int64_t r = 0; there < tile && r < rows; r++)
    std::fill(scores + r * tile + there, scores + (r + 1) * tile, MASKED);
}

inline float largest(const float* row, int64_t tile) {
  vec best = load(row, LANES);
  for (int64_t q = LANES; q < tile; q += LANES) {
    const vec x = load(row + q, LANES);
    best = x > best ? x : best;
  }
  float most = best[0];
  for (int i = 1; i < LANES; i++) most = std::max(most, best[i]);
  return most;
}

// One thread's workspace. A head's keys and values are packed once for all its blocks.
struct Forward {
  const Shape& k;
  const Heads query, key, value, out;
  float* saved;  // (2, b, h, n): a row's maximum, and one over its sum; or null
  int64_t width_e, width_f;  // e and f in whole vectors
  std::vector<float> keys, values, block, scores, sums;  // block: of queries; sums: of values
  float row_max[BLOCK], row_sum[BLOCK];  // of scores, and of exponentials under that maximum

  Forward(const Shape& k, Heads query, Heads key, Heads value, Heads out, float* saved)
      : k(k), query(query), key(key), value(value), out(out), saved(saved),
        width_e(round_up(k.e, LANES)), width_f(round_up(k.f, LANES)),
        keys(k.tiles() * k.tile() * k.e), values(round_up(k.m, STEP) * width_f),
        block(BLOCK * width_e), scores(BLOCK * k.tile()), sums(BLOCK * width_f) {}

  // Scores of row r to exponentials under the largest so far; what was summed under a lower one
  // shrinks.
  void exponentiate(int64_t r) {
    float* row = &scores[r * k.tile()];
    const float top = std::max(row_max[r], largest(row, k.tile()));
    const float shrink = exp(vec{} + (row_max[r] - top))[0];
    vec part = vec{};
    for (int64_t q = 0; q < k.tile(); q += LANES) {
      const vec p = exp(load(row + q, LANES) - top);
      store(row + q, p, LANES);
      part += p;
    }
    row_sum[r] = row_sum[r] * shrink + sum(part);
    row_max[r] = top;
    float* to = &sums[r * width_f];
    if (shrink != 1.0f)  // mostly it is, after the first tiles
      for (int64_t q = 0; q < width_f; q += LANES)
        store(to + q, load(to + q, LANES) * shrink, LANES);
  }

  void write(int64_t b, int64_t h, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      const float scale = 1.0f / row_sum[r], *from = &sums[r * width_f];
      float* to = out.at(b, h, first + r);
      for (int64_t i = 0; i < k.f; i++) to[i] = from[i] * scale;
      if (!saved) continue;
      float* at = saved + (b * k.h + h) * k.n + first + r;
      at[0] = row_max[r];
      at[k.b * k.h * k.n] = scale;
    }
  }

  // The blocks [low, high) of queries of one head.
  void run(int64_t b, int64_t h, int64_t low, int64_t high) {
    pack_transposed(k, key, b, h, k.e, keys.data());
    pack_rows(value, b, h, 0, k.m, k.f, values.data());
    for (int64_t at = low; at < high; at++) {
      const int64_t first = at * BLOCK, rows = k.queries(at), padded = round_up(rows, STEP);
      pack_rows(query, b, h, first, rows, k.e, block.data());
      std::fill(sums.begin(), sums.end(), 0.0f);
      std::fill(row_max, row_max + BLOCK, LOWEST);
      std::fill(row_sum, row_sum + BLOCK, 0.0f);
      for (int64_t t = 0; t < k.tiles(); t++) {
        compute_scores(k, block.data(), width_e, keys.data(), t, padded, scores.data());
        for (int64_t r = 0; r < rows; r++) exponentiate(r);
        multiply_add({scores.data(), k.tile(), 1}, &values[t * k.tile() * width_f], width_f,
                     k.keys(t), sums.data(), padded);
      }
      write(b, h, first, rows);
    }
  }
};

struct Gradients {
  Heads dout, dquery, dkey, dvalue;
  // Both null where keys and values want none; one alone is where it has no features to hold.
  bool of_keys() const { return dkey.data || dvalue.data; }
};

// One thread's workspace. With p = softmax(s), dp = dout v' and delta = sum_j p_j dp_j, which is
// dout . out, the gradient of the scores is ds = p (dp - delta) (Dao et al. 2022, section B.2);
// then dq = ds k, dk = ds' q and dv = p' dout.
struct Backward {
  const Shape& k;
  const Heads query, key, value, out;
  const float* saved;
  const Gradients& g;
  int64_t width_e, width_f, tile;
  // Of one head: keys by rows and transposed, values transposed. Of one block: queries and dout.
  // Of both: probs and dscores. Sums: dblock of the block's queries, dkeys and dvalues of the head.
  std::vector<float> keys, keys_t, values_t, block, dout, probs, dscores, dblock, dkeys, dvalues;
  float delta[BLOCK];

  Backward(const Shape& k, Heads query, Heads key, Heads value, Heads out, const float* saved,
           const Gradients& g)
      : k(k), query(query), key(key), value(value), out(out), saved(saved), g(g),
        width_e(round_up(k.e, LANES)), width_f(round_up(k.f, LANES)), tile(k.tile()),
        keys(round_up(k.m, STEP) * width_e), keys_t(k.tiles() * tile * k.e),
        values_t(k.tiles() * tile * k.f), block(BLOCK * width_e), dout(BLOCK * width_f),
        probs(BLOCK * tile), dscores(BLOCK * tile), dblock(BLOCK * width_e),
        dkeys(g.of_keys() ? round_up(k.m, STEP) * width_e : 0),
        dvalues(g.of_keys() ? round_up(k.m, STEP) * width_f : 0) {}

  void compute_delta(int64_t b, int64_t h, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      const float *dy = g.dout.at(b, h, first + r), *y = out.at(b, h, first + r);
      delta[r] = 0.0f;
      for (int64_t i = 0; i < k.f; i++) delta[r] += dy[i] * y[i];
    }
  }

  // In place, of row r: scores to probabilities, and dp to ds.
  void differentiate_softmax(int64_t b, int64_t h, int64_t first, int64_t r) {
    const float* at = saved + (b * k.h + h) * k.n + first + r;
    const float row_max = at[0], scale = at[k.b * k.h * k.n], mean = delta[r];
    float *p = &probs[r * tile], *s = &dscores[r * tile];
    for (int64_t q = 0; q < tile; q += LANES) {
      const vec x = exp(load(p + q, LANES) - row_max) * scale;
      store(p + q, x, LANES);
      store(s + q, x * (load(s + q, LANES) - mean), LANES);
    }
  }

  void run_tile(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t t) {
    const int64_t padded = round_up(rows, STEP), there = k.keys(t), start = t * tile;
    compute_scores(k, block.data(), width_e, keys_t.data(), t, padded, probs.data());
    std::memset(dscores.data(), 0, padded * tile * sizeof(float));
    multiply_add({dout.data(), width_f, 1}, &values_t[start * k.f], tile, k.f, dscores.data(),
                 padded);
    for (int64_t r = 0; r < rows; r++) differentiate_softmax(b, h, first, r);
    for (int64_t r = rows; r < padded; r++) {  // rows that are no queries have no part in the sums
      std::memset(&probs[r * tile], 0, tile * sizeof(float));
      std::memset(&dscores[r * tile], 0, tile * sizeof(float));
    }
    multiply_add({dscores.data(), tile, 1}, &keys[start * width_e], width_e, there, dblock.data(),
                 padded);
    if (!g.of_keys()) return;
    // Strides exchanged: transposed, without a copy.
    multiply_add({dscores.data(), 1, tile}, block.data(), width_e, rows, &dkeys[start * width_e],
                 round_up(there, STEP));
    multiply_add({probs.data(), 1, tile}, dout.data(), width_f, rows, &dvalues[start * width_f],
                 round_up(there, STEP));
  }

  static void unpack(const std::vector<float>& from, int64_t padded, int64_t width, int64_t rows,
                     const Heads& to, int64_t b, int64_t h, int64_t first) {
    for (int64_t i = 0; width && i < rows; i++)
      std::memcpy(to.at(b, h, first + i), &from[i * padded], width * sizeof(float));
  }

  // A whole head: its dkeys and dvalues are sums over all blocks of queries, in one thread's order.
  void run(int64_t b, int64_t h) {
    pack_transposed(k, key, b, h, k.e, keys_t.data());
    pack_transposed(k, value, b, h, k.f, values_t.data());
    pack_rows(key, b, h, 0, k.m, k.e, keys.data());
    std::fill(dkeys.begin(), dkeys.end(), 0.0f);
    std::fill(dvalues.begin(), dvalues.end(), 0.0f);
    for (int64_t at = 0; at < k.blocks(); at++) {
      const int64_t first = at * BLOCK, rows = k.queries(at);
      pack_rows(query, b, h, first, rows, k.e, block.data());
      pack_rows(g.dout, b, h, first, rows, k.f, dout.data());
      compute_delta(b, h, first, rows);
      std::fill(dblock.begin(), dblock.end(), 0.0f);
      for (int64_t t = 0; t < k.tiles(); t++) run_tile(b, h, first, rows, t);
      unpack(dblock, width_e, k.e, rows, g.dquery, b, h, first);
    }
    if (!g.of_keys()) return;
    unpack(dkeys, width_e, k.e, k.m, g.dkey, b, h, 0);
    unpack(dvalues, width_f, k.f, k.m, g.dvalue, b, h, 0);
  }
};

// Each item done by whichever thread is free, with a workspace of its own, made of `arguments`
// before the threads start: what throws inside them would end the process.
template <class Workspace, class Work, class... Arguments>
int parallel_for(int64_t items, int threads, const Work& work, const Arguments&... arguments) {
  const int64_t count = std::min<int64_t>(items, threads);
  std::vector<std::unique_ptr<Workspace>> workspaces;
  try {
    for (int64_t i = 0; i < count; i++)
      workspaces.push_back(std::make_unique<Workspace>(arguments...));
  } catch (const std::bad_alloc&) {
    return 1;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(std::max<int>(count, 1))
  for (int64_t i = 0; i < count; i++)
    for (int64_t item; (item = next++) < items;) work(*workspaces[i], item);
  return 0;
}

inline Shape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

inline Heads heads(float* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2]};
}

inline Heads dense(float* data, int64_t h, int64_t rows, int64_t width) {
  return {data, h * rows * width, rows * width, width};
}

}  // namespace

extern "C" {

// shape: b, h, n, m, e, f, then (batch, head, row) strides of query, key, value; out is dense.
// saved null: no backward pass will come. Both give 0, or 1 where there is not enough memory.
int mambaflow_attention_forward(const int64_t* shape, float* query, float* key, float* value,
                                float* out, float* saved, int threads) {
  const Shape k = shape_of(shape);
  const Heads q = heads(query, shape + 6), u = heads(key, shape + 9), v = heads(value, shape + 12);
  // Queries of a head are shared out only where heads are few: each share packs the keys anew.
  const int64_t count = k.b * k.h, each = 4 * threads / std::max<int64_t>(count, 1);
  const int64_t parts = std::min(k.blocks(), std::max<int64_t>(each, 1));
  return parallel_for<Forward>(
      count * parts, threads,
      [&](Forward& one, int64_t item) {
        const int64_t head = item / parts, part = item % parts;
        one.run(head / k.h, head % k.h, part * k.blocks() / parts,
                (part + 1) * k.blocks() / parts);
      },
      k, q, u, v, dense(out, k.h, k.n, k.f), saved);
}

// dkey and dvalue null: neither keys nor values want gradients. The gradients are dense.
int mambaflow_attention_backward(const int64_t* shape, float* query, float* key, float* value,
                                 float* out, float* saved, float* dout, float* dquery, float* dkey,
                                 float* dvalue, int threads) {
  const Shape k = shape_of(shape);
  const Heads q = heads(query, shape + 6), u = heads(key, shape + 9), v = heads(value, shape + 12);
  const Gradients g{dense(dout, k.h, k.n, k.f), dense(dquery, k.h, k.n, k.e),
                    dense(dkey, k.h, k.m, k.e), dense(dvalue, k.h, k.m, k.f)};
  return parallel_for<Backward>(
      k.b * k.h, threads,
      [&](Backward& one, int64_t item) { one.run(item / k.h, item % k.h); }, k, q, u, v,
      dense(out, k.h, k.n, k.f), saved, g);
}

}  // extern "C"
