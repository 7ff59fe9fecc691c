// What the attention kernels share: who sees whom, and the packed forms of queries, keys and values.
//
// Tensors arrive as [B, S, H, D], so one head's rows lie H * D apart. Every operand of a matrix product is first
// packed: contiguous, converted to the number type of the product, and padded with zeros to whole registers. A
// number type T (tile.h) reads the k axis in words of T::kPack numbers. For a head of `dim` channels:
//
//   copied rows   [row][steps]                    left operand, k runs over channels; steps = ceil(dim / kPack)
//   panels        [row / kPanel][steps][kPanel]   right operand, k runs over channels, kPanel rows side by side
//   stacked rows  [row / kPack][width]            right operand, k runs over rows; width = dim rounded up to kLanes
#pragma once

#include <algorithm>

#include "words.h"

namespace run_llm {

// The register tile: kRows x kVecs accumulators, kVecs right operands and one left operand.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;  // 32 registers
#else
constexpr int kVecs = 2;  // 16 registers
#endif
constexpr int kPanel = kVecs * kLanes;

constexpr float kHidden = -1e30f;       // score of a key that must not be seen: its weight is exactly 0
constexpr float kNothingSeen = -1e29f;  // running maximum before the first visible key: above kHidden

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

/// Rows of one head in memory: row i starts at data + i * step.
template <class S>
struct Rows {
  S* data;
  int64_t step;
  S* operator[](int64_t i) const { return data + i * step; }
  Rows from(int64_t i) const { return {data + i * step, step}; }
};

/// A tensor of heads: `head(b, h)` are the rows of one.
template <class S>
struct Heads {
  S* data;
  int64_t batch_step, head_step, row_step;

  /// Of shape [B, length, heads, dim].
  static Heads inside(S* data, int64_t length, int64_t heads, int64_t dim) {
    return {data, length * heads * dim, dim, heads * dim};
  }
  /// Of shape [B, heads, length, dim].
  static Heads outside(S* data, int64_t heads, int64_t length, int64_t dim) {
    return {data, heads * length * dim, length * dim, dim};
  }
  Rows<S> head(int64_t b, int64_t h) const { return {data + b * batch_step + h * head_step, row_step}; }
};

// ---- who sees whom ---------------------------------------------------------------------------------------------

/// Query i sees the keys j with j < prefix or ranges[2 i] <= j < ranges[2 i + 1].
struct Visibility {
  const int32_t* ranges;
  int32_t prefix;
  Visibility from(int64_t query) const { return {ranges + 2 * query, prefix}; }
};

/// The extremes of the ranges of a few neighbouring queries.
struct Limits {
  int32_t least_begin, most_begin, least_end, most_end;
};

inline Limits limits_of(const Visibility& seen, int64_t queries) {
  Limits all{seen.ranges[0], seen.ranges[0], seen.ranges[1], seen.ranges[1]};
  for (int64_t i = 1; i < queries; ++i) {
    all.least_begin = std::min(all.least_begin, seen.ranges[2 * i]);
    all.most_begin = std::max(all.most_begin, seen.ranges[2 * i]);
    all.least_end = std::min(all.least_end, seen.ranges[2 * i + 1]);
    all.most_end = std::max(all.most_end, seen.ranges[2 * i + 1]);
  }
  return all;
}

/// Keys of a block that at least one of the queries sees, in whole vectors.
struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

/// The span within keys [first, last); first is a multiple of kLanes.
inline Span span_of(const Limits& all, int32_t prefix, int64_t first, int64_t last) {
  int64_t begin = std::max<int64_t>(first, all.least_begin), end = std::min<int64_t>(last, all.most_end);
  if (first < prefix) {
    end = std::max(begin < end ? end : first, std::min<int64_t>(last, prefix));
    begin = first;
  }
  if (begin >= end) return {first, first};
  return {first + (begin - first) / kLanes * kLanes, first + round_up(end - first, kLanes)};
}

/// Whether all of the queries see all of the keys [begin, end).
inline bool all_see(const Limits& all, int32_t prefix, int64_t begin, int64_t end) {
  return (begin >= all.most_begin && end <= all.least_end) || end <= prefix;
}

/// `score` of keys first .. first + kLanes - 1, replaced by kHidden where query number `row` does not see them.
INLINE vec hide_unseen(vec score, const Visibility& seen, int64_t row, int64_t first) {
  const ivec key = lane_numbers() + static_cast<int32_t>(first);
  const ivec visible =
      ((key >= seen.ranges[2 * row]) & (key < seen.ranges[2 * row + 1])) | (key < seen.prefix);
  return visible ? score : broadcast(kHidden);
}

// ---- packing ---------------------------------------------------------------------------------------------------

/// Ask for `count` numbers at p. Rows of a head lie far apart, where the processor's own prefetching does not see them.
template <class S>
INLINE void prefetch(const S* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(p + i);
}
constexpr int64_t kRowsAhead = 16;

template <class T>
constexpr int64_t steps_of(int64_t dim) {
  return (dim + T::kPack - 1) / T::kPack;
}

/// Copied rows: `count` rows to out [round_up(count, kRows)][steps rounded up to kLanes], zeros where none exist.
template <class T, class S>
void copy_rows(const Rows<S>& rows, int64_t count, int64_t dim, typename T::word* out) {
  const int64_t stride = round_up(steps_of<T>(dim), kLanes);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kRowsAhead < count) prefetch(rows[i + kRowsAhead], dim);
    for (int64_t c = 0; c < stride; c += kLanes)
      write_words(out + i * stride + c, words_along(T(), rows[i] + c * T::kPack, dim - c * T::kPack));
  }
  const int64_t padding = round_up(count, kRows) - count;
  std::fill_n(out + count * stride, padding * stride, typename T::word{});
}

/// Stacked rows: `count` rows to out [padded / kPack][width], zeros where none exist.
template <class T, class S>
void stack_rows(const Rows<S>& rows, int64_t count, int64_t padded, int64_t dim, typename T::word* out) {
  const int64_t width = round_up(dim, kLanes);
  int64_t i = 0;
  for (; i < count; i += T::kPack) {
    const S* next = i + 1 < count ? rows[i + 1] : nullptr;
    for (int64_t ahead = i + kRowsAhead; ahead < std::min(i + kRowsAhead + T::kPack, count); ++ahead)
      prefetch(rows[ahead], dim);
    for (int64_t c = 0; c < width; c += kLanes, out += kLanes)
      write_words(out, words_across(T(), rows[i] + c, next ? next + c : nullptr, dim - c));
  }
  if (i < padded) std::fill_n(out, (padded - i) / T::kPack * width, typename T::word{});
}

/// Panels: `count` rows to out [ceil(count / kPanel)][steps][kPanel], zeros where none exist.
template <class T, class S>
void pack_panels(const Rows<S>& rows, int64_t count, int64_t dim, typename T::word* out) {
  const int64_t steps = steps_of<T>(dim);
  for (int64_t first = 0; first < count; first += kLanes) {
    typename T::word* panel = out + first / kPanel * kPanel * steps + first % kPanel;
    for (int64_t i = first + kLanes; i < std::min(first + 2 * kLanes, count); ++i) prefetch(rows[i], dim);
    for (int64_t c = 0; c < steps; c += kLanes) {
      vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = vec{};
        if (first + i < count) block[i] = words_along(T(), rows[first + i] + c * T::kPack, dim - c * T::kPack);
      }
      transpose(block);
      for (int i = 0; i < kLanes && c + i < steps; ++i) write_words(panel + (c + i) * kPanel, block[i]);
    }
  }
  for (int64_t first = round_up(count, kLanes); first < round_up(count, kPanel); first += kLanes)
    for (int64_t c = 0; c < steps; ++c)
      write_words(out + first / kPanel * kPanel * steps + first % kPanel + c * kPanel, vec{});
}

// ---- products on packed operands -------------------------------------------------------------------------------

/// c[kRows][width] = scale * c + left * right, `width` whole vectors: split into register tiles of up to kVecs vectors.
/// `scale`: kRows numbers, or null for 1. A tile starts from zero and is added at the end: sums over thousands of
/// rows, built block by block, would lose digits in one long chain.
template <class T, int VECS>
INLINE void multiply_columns(float* c, int64_t c_row, const float* scale, const typename T::word* a, ptrdiff_t a_row,
                             ptrdiff_t a_step, const typename T::word* b, ptrdiff_t b_step, int64_t steps) {
  vec tile[kRows][VECS];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) tile[r][v] = vec{};
  accumulate<T, kRows, VECS>(tile, a, a_row, a_step, b, b_step, steps);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      float* to = c + r * c_row + v * kLanes;
      store(to, scale ? load(to) * broadcast(scale[r]) + tile[r][v] : load(to) + tile[r][v]);
    }
}

template <class T>
inline void multiply_rows(float* c, int64_t width, const float* scale, const typename T::word* a, ptrdiff_t a_row,
                          ptrdiff_t a_step, const typename T::word* b, int64_t steps) {
  const int64_t vecs = width / kLanes, parts = (vecs + kVecs - 1) / kVecs;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = vecs * part / parts * kLanes;
    const int64_t taken = vecs * (part + 1) / parts - vecs * part / parts;
    const auto* right = b + first;
    switch (taken) {
#if defined(__AVX512F__) || defined(__aarch64__)
      case 4: multiply_columns<T, 4>(c + first, width, scale, a, a_row, a_step, right, width, steps); break;
      case 3: multiply_columns<T, 3>(c + first, width, scale, a, a_row, a_step, right, width, steps); break;
#endif
      case 2: multiply_columns<T, 2>(c + first, width, scale, a, a_row, a_step, right, width, steps); break;
      default: multiply_columns<T, 1>(c + first, width, scale, a, a_row, a_step, right, width, steps); break;
    }
  }
}

}  // namespace run_llm
