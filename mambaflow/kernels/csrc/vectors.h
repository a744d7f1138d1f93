// Vectors as wide as the processor takes at once (sixteen floats with AVX-512), by the compiler's
// extensions of C++, and what is computed with them everywhere.
//
// Arithmetic, comparisons and the ternary operator work on each lane of a vec; v[i] is lane i. A
// scalar operand is copied to all lanes; `vec{} + x` does that where there is no operation.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

// Without it gcc leaves short loops over arrays of vectors rolled, and the arrays in memory instead
// of in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512DQ__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

// The first m floats at p, zeros in the other lanes. memcpy is how C++ allows floats that are not
// aligned to be read as a vector; of a constant size it is one instruction.
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

// The first m lanes to p: beyond them may be another row, or no memory.
inline void store(float* p, vec v, int m) {
  if (m == LANES)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, m * sizeof(float));
}

// 2^x as 2^whole times a polynomial in the fraction f, |f| <= 1/2, that is exact at 0, since decays
// near 1 multiply over thousands of tokens; relative error below 1.2e-7. Overflow gives infinity,
// x = -infinity gives 0, and no number gives none.
inline vec exp2(vec x) {
#ifdef __AVX512DQ__
  const vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < -252.0f ? vec{} - 252.0f : x;  // the square of 2^-126 is 0
  x = x > 128.0f ? vec{} + 128.0f : x;
  // Added to 1.5 * 2^23, a float has no bits left for a fraction: it is rounded, and its low bits
  // are the whole number.
  const vec shifted = x + 12582912.0f, whole = shifted - 12582912.0f;
#endif
  const vec f = x - whole;
  vec p = vec{} + 1.32647272e-3f;
  p = p * f + 9.67151281e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
#ifdef __AVX512DQ__
  // p is no number where x is infinite, but scalef by -infinity is 0 and by infinity infinite.
  return _mm512_scalef_ps(p, whole);
#else
  // 0x4b400000 are the bits of 1.5 * 2^23. A power from -252 to 128 goes in two halves, each of
  // which is the exponent of a float.
  const ivec power = (ivec)shifted - 0x4b400000, half = power >> 1;
  return p * (vec)((half + 127) << 23) * (vec)((power - half + 127) << 23);
#endif
}

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
inline vec exp(vec x) { return exp2(x * LOG2_E); }

inline float sum(vec v) {  // a tree: the order depends on LANES alone
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

}  // namespace
