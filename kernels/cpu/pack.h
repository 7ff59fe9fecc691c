// Packing: operands of a matrix product, fp32 in memory and in either order, become words of the number type
// (tile.h) in the order in which the inner loop reads them.
//
// An operand has `lines` (the rows of op(A), the columns of op(B)), each of `depth` numbers along k. The unit of
// packing is a square of kLanes lines by kLanes words: it is read into kLanes vectors as memory offers it, transposed
// in registers if the packed order is the other one, and stored.
#pragma once

#include "words.h"

namespace run_llm {

/// An operand in memory: number k of line i is at data[i * stride + k] if along_k, else at data[k * stride + i].
struct Operand {
  const float* data;
  int64_t stride;
  bool along_k;
  int64_t lines;
  int64_t depth;
};

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
    const int64_t left = depth - i * T::kPack;  // numbers of k from word i on
    const float* across = from.data + (k + i * T::kPack) * from.stride + line;
    if (ALONG)
      x[i] = words_along(T(), from.data + (line + i) * from.stride + k, i < lines ? depth : 0);
    else
      x[i] = words_across(T(), across, left > 1 ? across + from.stride : nullptr, left > 0 ? lines : 0);
  }
  if (ALONG == LINES_IN_LANES) transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) write_words(dest + i * dest_stride, x[i]);
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
