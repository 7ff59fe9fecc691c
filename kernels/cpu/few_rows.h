// Products with a weight matrix for a few rows, as in generating one token a row: all the time goes into reading the
// weights from memory, so every one is read once and used for all rows while it is near.
#pragma once

#include "loops.h"

namespace run_llm {

// Rows of x and rows of the weight whose products are summed side by side: as many as 16 registers hold.
constexpr int kFewRows = 2, kFewColumns = 4;

/// y[r][c] = x[r] . weight[c] for ROWS rows of x and COLUMNS rows of the weight, each of `width` numbers.
template <int ROWS, int COLUMNS>
INLINE void dot_products(const float* x, const float* weight, int64_t width, float* y, int64_t y_stride) {
  vec sums[ROWS][COLUMNS];
  for (auto& row : sums)
    for (vec& sum : row) sum = broadcast(0);
  const auto step = [&](int64_t i, auto at) {
    vec w[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) w[c] = at.load(weight + c * width + i);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec a = at.load(x + r * width + i);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += a * w[c];
    }
  };
  each_vector(0, width, step);
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) y[r * y_stride + c] = sum_of(sums[r][c]);
}

/// The same for any number of rows of x.
template <int COLUMNS>
inline void all_rows(const float* x, int64_t rows, const float* weight, int64_t width, float* y, int64_t y_stride) {
  int64_t r = 0;
  for (; r + kFewRows <= rows; r += kFewRows)
    dot_products<kFewRows, COLUMNS>(x + r * width, weight, width, y + r * y_stride, y_stride);
  for (; r < rows; ++r) dot_products<1, COLUMNS>(x + r * width, weight, width, y + r * y_stride, y_stride);
}

/// y[r][c] = x[r] . weight[c] for c in [first, last): x [rows, width], y [rows, y_stride].
inline void few_rows(const float* x, int64_t rows, const float* weight, int64_t width, int64_t first, int64_t last,
                     float* y, int64_t y_stride) {
  int64_t c = first;
  for (; c + kFewColumns <= last; c += kFewColumns)
    all_rows<kFewColumns>(x, rows, weight + c * width, width, y + c, y_stride);
  for (; c < last; ++c) all_rows<1>(x, rows, weight + c * width, width, y + c, y_stride);
}

}  // namespace run_llm
