// Random words, and the pixels of an image ranked by them: bit for bit as in data/random_bits.py
// and data/pixels.py, which say what they are. Rows are of one item each; threads share them out.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

constexpr int LANES = 8, GROUPS = 4, AT_ONCE = LANES * GROUPS;  // blocks of four words, abreast
constexpr uint64_t LOW = 0xFFFFFFFF;
// Words of 32 bits in 64, so that a product of two keeps its upper half.
typedef uint64_t wide __attribute__((vector_size(LANES * 8)));
constexpr int PLACE_BITS = 16;

struct Draw {  // of which numbers: see random_bits.bits
  uint32_t seed, purpose, stream;
};

// Philox4x32-10 (Salmon et al. 2011) of as many counters as are abreast, in place. GROUPS vectors
// a round hide the latency of the products.
void rounds(wide* a, wide* b, wide* c, wide* d, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; round++) {
    for (int g = 0; g < GROUPS; g++) {
      const wide left = a[g] * 0xD2511F53u, right = c[g] * 0xCD9E8D57u;
      a[g] = (right >> 32) ^ b[g] ^ k0, b[g] = right & LOW;
      c[g] = (left >> 32) ^ d[g] ^ k1, d[g] = left & LOW;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// Blocks `first` and those after it, of one item.
void draw_blocks(const Draw& draw, uint64_t item, uint64_t first, uint32_t* out) {
  wide a[GROUPS], b[GROUPS], c[GROUPS], d[GROUPS];
  for (int g = 0; g < GROUPS; g++) {
    for (int l = 0; l < LANES; l++) a[g][l] = first + g * LANES + l;
    b[g] = wide{} + (item & LOW), d[g] = wide{} + draw.stream;
    c[g] = wide{} + uint64_t(int64_t(item) >> 32);  // with its sign, as torch has it
  }
  rounds(a, b, c, d, draw.seed, draw.purpose);
  for (int g = 0; g < GROUPS; g++)
    for (int l = 0; l < LANES; l++) {
      uint32_t* block = out + 4 * (g * LANES + l);
      block[0] = uint32_t(a[g][l]), block[1] = uint32_t(b[g][l]);
      block[2] = uint32_t(c[g][l]), block[3] = uint32_t(d[g][l]);
    }
}

// Words that draw_blocks fills whole, at least `count`.
int64_t padded(int64_t count) { return (count + 4 * AT_ONCE - 1) / (4 * AT_ONCE) * 4 * AT_ONCE; }

void fill(const Draw& draw, uint64_t item, std::vector<uint32_t>& words) {
  for (std::size_t at = 0; at < words.size(); at += 4 * AT_ONCE)
    draw_blocks(draw, item, at / 4, words.data() + at);
}

// The places of the `wanted` smallest words, in order; the first of equal ones first. Words are
// even by law: most that are too large are told by a limit, and with two buckets for a place few of
// the others meet in one. Nothing branches on a word, which no processor could foresee, until all
// but a few are in order.
struct Ranking {
  int64_t pixels, wanted;
  int bits;        // of a word, that say its bucket
  uint64_t limit;  // below which enough words are, nearly always
  std::vector<uint64_t> candidates, sorted;  // a word and, in the low bits, its place
  std::vector<uint32_t> starts;              // of buckets in `sorted`, after they were counted

  Ranking(int64_t pixels, int64_t wanted) : pixels(pixels), wanted(wanted), bits(3) {
    while (bits < PLACE_BITS && int64_t(1) << bits < 2 * pixels) bits++;
    // How many words are below a limit is binomial: three deviations more than are wanted.
    const double spread = std::sqrt(double(wanted) * double(pixels - wanted) / double(pixels));
    const double share = (double(wanted) + 3 * spread) / double(pixels);
    limit = share < 1 ? uint64_t(share * 4294967296.0) : uint64_t(1) << 32;
    candidates.resize(pixels + 1), sorted.resize(pixels), starts.resize(std::size_t(1) << bits);
  }

  void operator()(const uint32_t* words, int64_t* places) {
    if (!wanted) return;  // a limit of 0 has no buckets
    uint64_t most = limit;
    int64_t count = collect(words, most);
    if (count < wanted) count = collect(words, most = uint64_t(1) << 32);
    const int drop = 32 + PLACE_BITS - bits;
    const uint64_t buckets = ((most - 1) >> (32 - bits)) + 1;
    std::fill_n(starts.begin(), buckets, 0);
    for (int64_t i = 0; i < count; i++) starts[candidates[i] >> drop]++;
    uint32_t sum = 0;
    for (uint64_t bucket = 0; bucket < buckets; bucket++) {
      const uint32_t here = starts[bucket];
      starts[bucket] = sum, sum += here;
    }
    for (int64_t i = 0; i < count; i++) sorted[starts[candidates[i] >> drop]++] = candidates[i];
    insertion_sort(count);
    for (int64_t i = 0; i < wanted; i++) places[i] = sorted[i] & ((1 << PLACE_BITS) - 1);
  }

  // The words below `most`. Each is written, and only counted if it is one: no branch.
  int64_t collect(const uint32_t* words, uint64_t most) {
    int64_t count = 0;
    for (int64_t i = 0; i < pixels; i++) {
      candidates[count] = uint64_t(words[i]) << PLACE_BITS | i;
      count += words[i] < most;
    }
    return count;
  }

  void insertion_sort(int64_t count) {  // what lies in its bucket is sorted but for few
    for (int64_t i = 1; i < count; i++) {
      const uint64_t mine = sorted[i];
      int64_t to = i;
      for (; to > 0 && sorted[to - 1] > mine; to--) sorted[to] = sorted[to - 1];
      sorted[to] = mine;
    }
  }
};

}  // namespace

extern "C" {

int mambaflow_places() { return 1 << PLACE_BITS; }

void mambaflow_philox(const int64_t* counters, int64_t count, uint32_t k0, uint32_t k1, int64_t* out,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < count; first += AT_ONCE) {
    wide w[4][GROUPS] = {};
    const int64_t most = std::min<int64_t>(AT_ONCE, count - first);
    for (int64_t l = 0; l < most; l++)
      for (int j = 0; j < 4; j++) w[j][l / LANES][l % LANES] = counters[4 * (first + l) + j] & LOW;
    rounds(w[0], w[1], w[2], w[3], k0, k1);
    for (int64_t l = 0; l < most; l++)
      for (int j = 0; j < 4; j++) out[4 * (first + l) + j] = int64_t(w[j][l / LANES][l % LANES]);
  }
}

void mambaflow_words(const int64_t* items, int64_t rows, int64_t count, uint32_t seed,
                     uint32_t purpose, uint32_t stream, int64_t* out, int threads) {
  const Draw draw{seed, purpose, stream};
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> words(padded(count));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      fill(draw, uint64_t(items[row]), words);
      for (int64_t i = 0; i < count; i++) out[row * count + i] = words[i];
    }
  }
}

void mambaflow_rank(const int64_t* items, int64_t rows, int64_t pixels, int64_t wanted,
                    uint32_t seed, uint32_t purpose, uint32_t stream, int64_t* out, int threads) {
  const Draw draw{seed, purpose, stream};
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> words(padded(pixels));
    Ranking rank(pixels, wanted);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      fill(draw, uint64_t(items[row]), words);
      rank(words.data(), out + row * wanted);
    }
  }
}

}  // extern "C"
