// Packing: operands of a matrix product, fp32 in memory and in either order, become words of the number type
// (tile.h) in the order in which the inner loop reads them.
//
// An operand has `lines` (the rows of op(A), the columns of op(B)), each of `depth` numbers along k. The unit of
// packing is a square of kLanes lines by kLanes words: it is read into kLanes vectors as memory offers it, transposed
// in registers if the packed order is the other one, and stored.
#pragma once

#include "tile.h"

namespace run_llm {

/// An operand in memory: number k of line i is at data[i * stride + k] if along_k, else at data[k * stride + i].
struct Operand {
  const float* data;
  int64_t stride;
  bool along_k;
  int64_t lines;
  int64_t depth;
};

/// The first `count` numbers at p, at most kLanes of them, zeros after them. `count` may be any number.
INLINE vec load_up_to(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  return count > 0 ? load_first(p, static_cast<int>(count)) : broadcast(0.f);
}

/// Neighbours along k at p as kLanes words; zeros after the first `count` numbers.
INLINE vec words_along(Fp32, const float* p, int64_t count) { return load_up_to(p, count); }

/// One word of k for kLanes lines: rows of k are `stride` apart, `depth` of them are left; zeros after `lines` lines.
INLINE vec words_across(Fp32, const float* p, int64_t, int64_t depth, int64_t lines) {
  return depth > 0 ? load_up_to(p, lines) : broadcast(0.f);
}

#if defined(__AVX512BF16__)
INLINE vec words_along(Bf16, const float* p, int64_t count) {
  const vec low = load_up_to(p, count), high = load_up_to(p + kLanes, count - kLanes);
  return (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

INLINE vec words_across(Bf16, const float* p, int64_t stride, int64_t depth, int64_t lines) {
  const vec even = depth > 0 ? load_up_to(p, lines) : broadcast(0.f);
  const vec odd = depth > 1 ? load_up_to(p + stride, lines) : broadcast(0.f);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vec)_mm512_permutexvar_epi16(interleave, halves);
}
#endif

/// One step of the transposition: the off-diagonal ones of STEP x STEP squares change places.
template <int STEP>
INLINE void exchange(vec& a, vec& b) {
#if defined(__AVX512F__)
  ivec first = lane_numbers(), second = lane_numbers();  // constants once unrolled; kLanes + i is lane i of b
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i & STEP ? kLanes + i - STEP : i;
    second[i] = i & STEP ? kLanes + i : i + STEP;
  }
  const __m512 upper = _mm512_permutex2var_ps((__m512)a, (__m512i)first, (__m512)b);
  b = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)second, (__m512)b);
  a = (vec)upper;
#else
  const vec upper = a, lower = b;
  for (int i = 0; i < kLanes; ++i) {
    if (i & STEP) a[i] = lower[i - STEP];
    if (!(i & STEP)) b[i] = upper[i + STEP];
  }
#endif
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

/// Pack the square of kLanes lines from `line` and kLanes words from number `k` on, with zeros where the operand has
/// ended. LINES_IN_LANES: vector i of the result is word i of all lines, else all words of line i; vectors go
/// `dest_stride` words apart. WHOLE: the operand fills the square.
template <class T, bool ALONG, bool LINES_IN_LANES, bool WHOLE>
INLINE void pack_square(const Operand& from, int64_t line, int64_t k, typename T::word* dest, int64_t dest_stride) {
  const int64_t lines = WHOLE ? kLanes : from.lines - line;
  const int64_t depth = WHOLE ? kLanes * T::kPack : from.depth - k;
  vec x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (ALONG)
      x[i] = words_along(T(), from.data + (line + i) * from.stride + k, i < lines ? depth : 0);
    else
      x[i] = words_across(T(), from.data + (k + i * T::kPack) * from.stride + line, from.stride, depth - i * T::kPack,
                          lines);
  }
  if (ALONG == LINES_IN_LANES) transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(dest + i * dest_stride), x[i]);
}

/// Pack `lines` lines (a multiple of kLanes) from `line`, `squares` squares of words from number `k` on. The walk
/// follows memory: where neighbours are neighbouring lines, all lines of a square of k come before the next.
template <class T, bool ALONG, bool LINES_IN_LANES>
void pack_lines(const Operand& from, int64_t line, int64_t lines, int64_t k, int64_t squares, typename T::word* dest,
                int64_t dest_stride) {
  const int64_t line_step = LINES_IN_LANES ? kLanes : kLanes * dest_stride;
  const int64_t word_step = LINES_IN_LANES ? kLanes * dest_stride : kLanes;
  const int64_t outer = ALONG ? lines / kLanes : squares, inner = ALONG ? squares : lines / kLanes;
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t across = ALONG ? o : i, along = ALONG ? i : o;
      const int64_t first_line = line + across * kLanes, first = k + along * kLanes * T::kPack;
      typename T::word* to = dest + across * line_step + along * word_step;
      if (first_line + kLanes <= from.lines && first + kLanes * T::kPack <= from.depth)
        pack_square<T, ALONG, LINES_IN_LANES, true>(from, first_line, first, to, dest_stride);
      else
        pack_square<T, ALONG, LINES_IN_LANES, false>(from, first_line, first, to, dest_stride);
    }
}

/// The left operand's order: every line's words one after the other, lines `dest_stride` words apart.
template <class T>
void pack_left(const Operand& from, int64_t line, int64_t lines, int64_t k, int64_t squares, typename T::word* dest,
               int64_t dest_stride) {
  if (from.along_k)
    pack_lines<T, true, false>(from, line, lines, k, squares, dest, dest_stride);
  else
    pack_lines<T, false, false>(from, line, lines, k, squares, dest, dest_stride);
}

/// The right operand's order: one word of kLanes lines, then the next word of them `dest_stride` words on.
template <class T>
void pack_right(const Operand& from, int64_t line, int64_t lines, int64_t k, int64_t squares, typename T::word* dest,
                int64_t dest_stride) {
  if (from.along_k)
    pack_lines<T, true, true>(from, line, lines, k, squares, dest, dest_stride);
  else
    pack_lines<T, false, true>(from, line, lines, k, squares, dest, dest_stride);
}

}  // namespace run_llm
