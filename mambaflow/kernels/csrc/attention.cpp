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
constexpr float NEVER = -INFINITY;         // a score that the softmax makes 0
constexpr float LEAST = -FLT_MAX;          // a maximum before any: finite, to be subtracted

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Heads {  // a (b, h, n, width) tensor whose last dimension is dense
  float* data;
  int64_t batch, head, row;
  float* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch + h * head + i * row;
  }
};

struct Factor {  // a(i, k) at data[i row + k step]
  const float* data;
  int64_t row, step;
};

// R rows by V vectors of c += a b, b (depth, columns) with `wide` floats a row.
template <int R, int V>
inline void corner(Factor a, const float* b, int64_t wide, int64_t depth, float* c, int64_t row) {
  vec sum[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sum[r][v] = load(c + r * row + v * LANES, LANES);
  for (int64_t k = 0; k < depth; k++) {
    vec right[V];
    UNROLL for (int v = 0; v < V; v++) right[v] = load(b + k * wide + v * LANES, LANES);
    UNROLL for (int r = 0; r < R; r++) {
      const float left = a.data[r * a.row + k * a.step];
      UNROLL for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) store(c + r * row + v * LANES, sum[r][v], LANES);
}

template <int R, int V>
inline void strip(Factor a, const float* b, int64_t wide, int64_t depth, float* c, int64_t rows) {
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    corner<R, V>({a.data + i * a.row, a.row, a.step}, b, wide, depth, c + i * wide, wide);
  for (; i < rows; i += STEP)
    corner<STEP, V>({a.data + i * a.row, a.row, a.step}, b, wide, depth, c + i * wide, wide);
}

// c += a b, for a multiple of STEP rows; b and c have `wide` floats a row, a multiple of LANES.
// As many sums as there are registers for: thirty-two with AVX-512, else sixteen.
void multiply(Factor a, const float* b, int64_t wide, int64_t depth, float* c, int64_t rows) {
  constexpr int MOST = LANES == 16 ? 3 : 2, HIGH = LANES == 16 ? 8 : 4;
  int64_t q = 0;
  for (; q + MOST * LANES <= wide; q += MOST * LANES)
    strip<HIGH, MOST>(a, b + q, wide, depth, c + q, rows);
  for (; q + 2 * LANES <= wide; q += 2 * LANES) strip<HIGH, 2>(a, b + q, wide, depth, c + q, rows);
  for (; q < wide; q += LANES) strip<12, 1>(a, b + q, wide, depth, c + q, rows);
}

struct Shape {
  int64_t b, h, n, m, e, f;  // queries, keys; widths of keys and values
  int64_t tile() const { return std::min(up(m, LANES), TILE); }
  int64_t tiles() const { return (m + tile() - 1) / tile(); }
  int64_t keys(int64_t t) const { return std::min(tile(), m - t * tile()); }
  int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }
  int64_t queries(int64_t block) const { return std::min(BLOCK, n - block * BLOCK); }
};

// Rows as they lie, each filled up with zeros, and rows of zeros to a multiple of STEP.
void copy(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width,
          float* to) {
  const int64_t wide = up(width, LANES);
  std::memset(to, 0, up(rows, STEP) * wide * sizeof(float));
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(to + i * wide, from.at(b, h, first + i), width * sizeof(float));
}

// Rows on end: (tiles, width, tile), zeros for the keys that the last tile lacks.
void turn(const Shape& k, const Heads& from, int64_t b, int64_t h, int64_t width, float* to) {
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

// The scores of a block of queries with tile t of the keys, NEVER where there is no key.
void meet(const Shape& k, const float* query, int64_t wide, const float* keys, int64_t t,
          int64_t rows, float* scores) {
  const int64_t tile = k.tile(), there = k.keys(t);
  std::memset(scores, 0, rows * tile * sizeof(float));
  multiply({query, wide, 1}, keys + t * k.e * tile, tile, k.e, scores, rows);
  for (int64_t r = 0; there < tile && r < rows; r++)
    std::fill(scores + r * tile + there, scores + (r + 1) * tile, NEVER);
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

struct Forward {
  const Shape& k;
  const Heads query, key, value, out;
  float* kept;  // (2, b, h, n): a row's maximum, and one over its sum; or null
  int64_t wide_e, wide_f;
  std::vector<float> keys, values, block, scores, sums;
  float most[BLOCK], total[BLOCK];

  Forward(const Shape& k, Heads query, Heads key, Heads value, Heads out, float* kept)
      : k(k), query(query), key(key), value(value), out(out), kept(kept),
        wide_e(up(k.e, LANES)), wide_f(up(k.f, LANES)), keys(k.tiles() * k.tile() * k.e),
        values(up(k.m, STEP) * wide_f), block(BLOCK * wide_e), scores(BLOCK * k.tile()),
        sums(BLOCK * wide_f) {}

  // Scores to exponentials under the largest so far; what was summed under a lower one shrinks.
  void soften(int64_t r) {
    float* row = &scores[r * k.tile()];
    const float top = std::max(most[r], largest(row, k.tile()));
    const float shrink = exp(vec{} + (most[r] - top))[0];
    vec part = vec{};
    for (int64_t q = 0; q < k.tile(); q += LANES) {
      const vec p = exp(load(row + q, LANES) - top);
      store(row + q, p, LANES);
      part += p;
    }
    total[r] = total[r] * shrink + sum(part);
    most[r] = top;
    float* to = &sums[r * wide_f];
    if (shrink != 1.0f)
      for (int64_t q = 0; q < wide_f; q += LANES)
        store(to + q, load(to + q, LANES) * shrink, LANES);
  }

  void write(int64_t b, int64_t h, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      const float scale = 1.0f / total[r], *from = &sums[r * wide_f];
      float* to = out.at(b, h, first + r);
      for (int64_t i = 0; i < k.f; i++) to[i] = from[i] * scale;
      if (!kept) continue;
      float* at = kept + (b * k.h + h) * k.n + first + r;
      at[0] = most[r];
      at[k.b * k.h * k.n] = scale;
    }
  }

  // The blocks [low, high) of queries of one head.
  void run(int64_t b, int64_t h, int64_t low, int64_t high) {
    turn(k, key, b, h, k.e, keys.data());
    copy(value, b, h, 0, k.m, k.f, values.data());
    for (int64_t at = low; at < high; at++) {
      const int64_t first = at * BLOCK, rows = k.queries(at), four = up(rows, STEP);
      copy(query, b, h, first, rows, k.e, block.data());
      std::fill(sums.begin(), sums.end(), 0.0f);
      std::fill(most, most + BLOCK, LEAST);
      std::fill(total, total + BLOCK, 0.0f);
      for (int64_t t = 0; t < k.tiles(); t++) {
        meet(k, block.data(), wide_e, keys.data(), t, four, scores.data());
        for (int64_t r = 0; r < rows; r++) soften(r);
        multiply({scores.data(), k.tile(), 1}, &values[t * k.tile() * wide_f], wide_f, k.keys(t),
                 sums.data(), four);
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

struct Backward {
  const Shape& k;
  const Heads query, key, value, out;
  const float* kept;
  const Gradients& g;
  int64_t wide_e, wide_f, tile;
  std::vector<float> keys, turned, values, block, slope, share, dscore, dblock, dkeys, dvalues;
  float mean[BLOCK];

  Backward(const Shape& k, Heads query, Heads key, Heads value, Heads out, const float* kept,
           const Gradients& g)
      : k(k), query(query), key(key), value(value), out(out), kept(kept), g(g),
        wide_e(up(k.e, LANES)), wide_f(up(k.f, LANES)), tile(k.tile()),
        keys(up(k.m, STEP) * wide_e), turned(k.tiles() * tile * k.e),
        values(k.tiles() * tile * k.f), block(BLOCK * wide_e), slope(BLOCK * wide_f),
        share(BLOCK * tile), dscore(BLOCK * tile), dblock(BLOCK * wide_e),
        dkeys(g.of_keys() ? up(k.m, STEP) * wide_e : 0),
        dvalues(g.of_keys() ? up(k.m, STEP) * wide_f : 0) {}

  // Of the shares' slopes of every row of a block, under its shares.
  void take_means(int64_t b, int64_t h, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      const float *dy = g.dout.at(b, h, first + r), *y = out.at(b, h, first + r);
      mean[r] = 0.0f;
      for (int64_t i = 0; i < k.f; i++) mean[r] += dy[i] * y[i];
    }
  }

  // Scores to shares of the softmax, and slopes of the shares to those of the scores.
  void soften(int64_t b, int64_t h, int64_t first, int64_t r) {
    const float* at = kept + (b * k.h + h) * k.n + first + r;
    const float most = at[0], scale = at[k.b * k.h * k.n], middle = mean[r];
    float *p = &share[r * tile], *s = &dscore[r * tile];
    for (int64_t q = 0; q < tile; q += LANES) {
      const vec x = exp(load(p + q, LANES) - most) * scale;
      store(p + q, x, LANES);
      store(s + q, x * (load(s + q, LANES) - middle), LANES);
    }
  }

  void meet_tile(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t t) {
    const int64_t four = up(rows, STEP), there = k.keys(t), start = t * tile;
    meet(k, block.data(), wide_e, turned.data(), t, four, share.data());
    std::memset(dscore.data(), 0, four * tile * sizeof(float));
    multiply({slope.data(), wide_f, 1}, &values[start * k.f], tile, k.f, dscore.data(), four);
    for (int64_t r = 0; r < rows; r++) soften(b, h, first, r);
    for (int64_t r = rows; r < four; r++) {
      std::memset(&share[r * tile], 0, tile * sizeof(float));
      std::memset(&dscore[r * tile], 0, tile * sizeof(float));
    }
    multiply({dscore.data(), tile, 1}, &keys[start * wide_e], wide_e, there, dblock.data(), four);
    if (!g.of_keys()) return;
    multiply({dscore.data(), 1, tile}, block.data(), wide_e, rows, &dkeys[start * wide_e],
             up(there, STEP));
    multiply({share.data(), 1, tile}, slope.data(), wide_f, rows, &dvalues[start * wide_f],
             up(there, STEP));
  }

  static void give(const std::vector<float>& from, int64_t wide, int64_t width, int64_t rows,
                   const Heads& to, int64_t b, int64_t h, int64_t first) {
    for (int64_t i = 0; width && i < rows; i++)
      std::memcpy(to.at(b, h, first + i), &from[i * wide], width * sizeof(float));
  }

  void run(int64_t b, int64_t h) {
    turn(k, key, b, h, k.e, turned.data());
    turn(k, value, b, h, k.f, values.data());
    copy(key, b, h, 0, k.m, k.e, keys.data());
    std::fill(dkeys.begin(), dkeys.end(), 0.0f);
    std::fill(dvalues.begin(), dvalues.end(), 0.0f);
    for (int64_t at = 0; at < k.blocks(); at++) {
      const int64_t first = at * BLOCK, rows = k.queries(at);
      copy(query, b, h, first, rows, k.e, block.data());
      copy(g.dout, b, h, first, rows, k.f, slope.data());
      take_means(b, h, first, rows);
      std::fill(dblock.begin(), dblock.end(), 0.0f);
      for (int64_t t = 0; t < k.tiles(); t++) meet_tile(b, h, first, rows, t);
      give(dblock, wide_e, k.e, rows, g.dquery, b, h, first);
    }
    if (!g.of_keys()) return;
    give(dkeys, wide_e, k.e, k.m, g.dkey, b, h, 0);
    give(dvalues, wide_f, k.f, k.m, g.dvalue, b, h, 0);
  }
};

// Each item done by whichever thread is free, with a room of its own made of what is given.
template <class Room, class Work, class... Given>
int share_out(int64_t items, int threads, const Work& work, const Given&... given) {
  const int64_t count = std::min<int64_t>(items, threads);
  std::vector<std::unique_ptr<Room>> rooms;
  try {
    for (int64_t i = 0; i < count; i++) rooms.push_back(std::make_unique<Room>(given...));
  } catch (const std::bad_alloc&) {
    return 1;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(std::max<int>(count, 1))
  for (int64_t i = 0; i < count; i++)
    for (int64_t item; (item = next++) < items;) work(*rooms[i], item);
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
// Both give 0, or 1 where there is not enough memory.
int mambaflow_attention_forward(const int64_t* shape, float* query, float* key, float* value,
                                float* out, float* kept, int threads) {
  const Shape k = shape_of(shape);
  const Heads q = heads(query, shape + 6), u = heads(key, shape + 9), v = heads(value, shape + 12);
  // Queries of a head are shared out only where heads are few: each share packs the keys anew.
  const int64_t count = k.b * k.h, each = 4 * threads / std::max<int64_t>(count, 1);
  const int64_t parts = std::min(k.blocks(), std::max<int64_t>(each, 1));
  return share_out<Forward>(
      count * parts, threads,
      [&](Forward& one, int64_t item) {
        const int64_t head = item / parts, part = item % parts;
        one.run(head / k.h, head % k.h, part * k.blocks() / parts,
                (part + 1) * k.blocks() / parts);
      },
      k, q, u, v, dense(out, k.h, k.n, k.f), kept);
}

// dkey and dvalue null: neither keys nor values want gradients. The gradients are dense.
int mambaflow_attention_backward(const int64_t* shape, float* query, float* key, float* value,
                                 float* out, float* kept, float* dout, float* dquery, float* dkey,
                                 float* dvalue, int threads) {
  const Shape k = shape_of(shape);
  const Heads q = heads(query, shape + 6), u = heads(key, shape + 9), v = heads(value, shape + 12);
  const Gradients g{dense(dout, k.h, k.n, k.f), dense(dquery, k.h, k.n, k.e),
                    dense(dkey, k.h, k.m, k.e), dense(dvalue, k.h, k.m, k.f)};
  return share_out<Backward>(
      k.b * k.h, threads,
      [&](Backward& one, int64_t item) { one.run(item / k.h, item % k.h); }, k, q, u, v,
      dense(out, k.h, k.n, k.f), kept, g);
}

}  // extern "C"
