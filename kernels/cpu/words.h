// Numbers in memory, float or bfloat16, as words of a number type (tile.h): what all packing is made of.
//
// A word is one float, or a pair of bfloat16 numbers that are neighbours on the k axis of a product. Words are kept in
// a `vec` whatever they hold, so that one transposition does for both.
#pragma once

#include "tile.h"

namespace run_llm {

INLINE vec read_vec(const float* p) { return load(p); }
INLINE vec read_vec(const bf16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (vec)_mm512_slli_epi32(wide, 16);
#else
  uvec x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<uint32_t>(p[i].bits) << 16;
  return (vec)x;
#endif
}

/// The first `count` numbers at p as floats, at most kLanes of them, zeros after them. `count` may be any number.
INLINE vec read_first(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  return count > 0 ? load_first(p, static_cast<int>(count)) : vec{};
}
INLINE vec read_first(const bf16* p, int64_t count) {
  if (count >= kLanes) return read_vec(p);
  vec x{};
  for (int64_t i = 0; i < count; ++i) x[i] = to_float(p[i]);
  return x;
}

/// The first `count` numbers of x to p, as they are or rounded to bfloat16. `count` may be any number.
INLINE void write_first(float* p, vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  if (count > 0) store_first(p, x, static_cast<int>(count));
}
INLINE void write_first(bf16* p, vec x, int64_t count) {
#if defined(__AVX512F__)
  if (count >= kLanes) {
    const uvec bits = (uvec)x, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)(x == x ? nearest : nan));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
  }
#endif
  const int64_t written = count < kLanes ? count : kLanes;
  for (int64_t i = 0; i < written; ++i) p[i] = to_bf16(x[i]);
}

/// kLanes words to p.
INLINE void write_words(float* p, vec x) { store(p, x); }
INLINE void write_words(uint32_t* p, vec x) { store(reinterpret_cast<float*>(p), x); }

/// kLanes words along k, of which the first `count` numbers at p exist; zeros after them.
template <class S>
INLINE vec words_along(Fp32, const S* p, int64_t count) {
  return read_first(p, count);
}

/// Words across lines: one step of k, and for pairs the next one too, of the first `count` lines. Numbers of the first
/// step lie at p, those of the second at q, which is null where k has ended.
template <class S>
INLINE vec words_across(Fp32, const S* p, const S*, int64_t count) {
  return read_first(p, count);
}

#if defined(__AVX512BF16__)
/// Words (even[i], odd[i]).
INLINE vec pair_words(vec even, vec odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // all of even, then all of odd
  const ivec lane = lane_numbers();
  return (vec)_mm512_permutexvar_epi16((__m512i)(lane | ((lane + 16) << 16)), halves);
}

template <class S>
INLINE vec words_along(Bf16, const S* p, int64_t count) {
  const vec low = read_first(p, count), high = read_first(p + kLanes, count - kLanes);
  return (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

template <class S>
INLINE vec words_across(Bf16, const S* p, const S* q, int64_t count) {
  return pair_words(read_first(p, count), q ? read_first(q, count) : vec{});
}
#endif

/// One step of the transposition: the off-diagonal ones of STEP x STEP squares change places.
template <int STEP>
INLINE void exchange(vec& a, vec& b) {
  const ivec lane = lane_numbers(), second = (lane & STEP) != 0;
  const vec upper = __builtin_shuffle(a, b, second ? lane - STEP + kLanes : lane);  // kLanes + i is lane i of b
  b = __builtin_shuffle(a, b, second ? lane + kLanes : lane + STEP);
  a = upper;
}

template <int STEP>
INLINE void exchange_all(vec (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & STEP)) exchange<STEP>(x[i], x[i + STEP]);
}

/// Lane j of vector i becomes lane i of vector j.
INLINE void transpose(vec (&x)[kLanes]) {
  exchange_all<1>(x);
  exchange_all<2>(x);
  if constexpr (kLanes > 4) exchange_all<4>(x);
  if constexpr (kLanes > 8) exchange_all<8>(x);
}

}  // namespace run_llm
