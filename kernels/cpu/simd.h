// One vector type for every instruction set: `vec` is 16, 8 or 4 floats, and code written with it is compiled once
// for each set. Multiplications and additions are the plain operators; the compiler fuses a * b + c.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace run_llm {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));

// MindSpore aligns to 16 bytes only, so every access is an unaligned one.
typedef float vec_unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

INLINE vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<vec_unaligned*>(p) = x; }

INLINE vec broadcast(float x) {
#if defined(__AVX512F__)
  return (vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vec)_mm256_set1_ps(x);
#else
  return vec{x, x, x, x};
#endif
}

/// 0, 1, 2 ... kLanes - 1.
INLINE ivec lane_numbers() {
  ivec x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

/// The first `count` (1 .. kLanes) numbers at p, zeros after them; nothing beyond is touched.
INLINE vec load_first(const float* p, int count) {
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif defined(__AVX2__)
  return (vec)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < count));
#else
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, 4 * static_cast<size_t>(count));
  return load(buffer);
#endif
}
INLINE void store_first(float* p, vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < count), (__m256)x);
#else
  float buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, 4 * static_cast<size_t>(count));
#endif
}

INLINE vec max(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE vec min(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

INLINE float sum_of(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}
INLINE float largest_of(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

/// 2^x for x <= 127, to 8e-8 of the rounded x: x = n + f with |f| <= 1/2, a polynomial of degree 5 for 2^f, and n added
/// to the exponent. Cheaper than exp; below 2^-126 the result may be 0, below 2^-150 it is.
INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vec f = x - n;
#else
  const vec shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec given = x;
  x = max(broadcast(-127.f), x);  // in this order a NaN stays one
  const vec shifted = x + shifter;
  const vec f = x - (shifted - shifter);
#endif
  // The coefficients are the minimax fit (relative error) of 2^f.
  vec p = broadcast(1.32764720e-03f);
  p = p * f + broadcast(9.67554135e-03f);
  p = p * f + broadcast(5.55071327e-02f);
  p = p * f + broadcast(2.40221197e-01f);
  p = p * f + broadcast(6.93146967e-01f);
  p = p * f + broadcast(1.00000007e+00f);
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const ivec exponent = (ivec)shifted << 23;  // the low bits of `shifted` hold n
  return given < broadcast(-126.f) ? broadcast(0.f) : (vec)((ivec)p + exponent);
#endif
}

/// e^x for x <= 88, to 1e-7 relative: x = n ln 2 + f with |f| <= ln 2 / 2, a polynomial of degree 5 for e^f, and n
/// added to the exponent. Below e^-87 the result may be 0, below e^-103 it is.
INLINE vec exp(vec x) {
  const vec least = broadcast(-104.f);
#if defined(__AVX512F__)
  x = max(least, x);  // in this order a NaN stays one
  const vec turns = x * broadcast(kLog2e);
  const vec n = (vec)_mm512_roundscale_ps((__m512)turns, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vec shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec given = x;
  x = max(least, x);
  const vec shifted = x * broadcast(kLog2e) + shifter;
  const vec n = shifted - shifter;
#endif
  // n ln 2 in two parts, of which the first has so few digits that n times it is exact.
  const vec f = (x - n * broadcast(0.693145751953125f)) - n * broadcast(1.42860682030941723e-6f);
  // The coefficients are the minimax fit (relative error) of e^f.
  vec p = broadcast(8.29765509e-03f);
  p = p * f + broadcast(4.19153821e-02f);
  p = p * f + broadcast(1.66675747e-01f);
  p = p * f + broadcast(4.99988949e-01f);
  p = p * f + broadcast(9.99999692e-01f);
  p = p * f + broadcast(1.00000007e+00f);
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const ivec exponent = (ivec)shifted << 23;  // the low bits of `shifted` hold n
  return given < broadcast(-87.f) ? broadcast(0.f) : (vec)((ivec)p + exponent);
#endif
}

/// A bfloat16 number as a float, and the nearest bfloat16 of a float (ties to even; NaN stays NaN).
INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
INLINE float to_float(float x) { return x; }

}  // namespace run_llm
