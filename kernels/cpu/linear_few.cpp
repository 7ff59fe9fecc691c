// Products with a weight matrix for a few rows, as in generating one token a row: all the time goes into reading the
// weights from memory, so every one is read once, by all threads, and used for all rows while it is near.
#include "loops.h"

namespace run_llm {
namespace {

// Rows of x and rows of the weight whose products are summed side by side: as many as 16 registers hold.
constexpr int kRows = 2, kColumns = 4;

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
void all_rows(const float* x, int64_t rows, const float* weight, int64_t width, float* y, int64_t y_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_products<kRows, COLUMNS>(x + r * width, weight, width, y + r * y_stride, y_stride);
  for (; r < rows; ++r) dot_products<1, COLUMNS>(x + r * width, weight, width, y + r * y_stride, y_stride);
}

}  // namespace

KERNEL(linear_few) {
  auto x = args.input<float>("x", "N K");
  auto weight = args.input<float>("weight", "M K");
  auto y = args.output<float>("y", "N M");
  args.done();
  const int64_t rows = args.size("N"), width = args.size("K"), columns = args.size("M");
#pragma omp parallel for schedule(static) if (rows * width * columns >= kParallelFrom)
  for (int64_t c = 0; c < columns; c += kColumns) {
    if (c + kColumns <= columns) {
      all_rows<kColumns>(x, rows, weight + c * width, width, y + c, columns);
    } else {
      for (int64_t last = c; last < columns; ++last)
        all_rows<1>(x, rows, weight + last * width, width, y + last, columns);
    }
  }
}

}  // namespace run_llm
