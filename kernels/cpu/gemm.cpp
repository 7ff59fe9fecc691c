// Matrix products: both operands are packed in blocks that stay in the caches, and tiles of C are computed from them.
//
// The order in which a number of C is summed follows from k alone: within a run of words in registers from zero,
// and the runs' sums one after the other. So neither blocks nor threads change a bit.
#include "gemm.h"

#include <algorithm>

#include "pack.h"
#include "scratch.h"

namespace run_llm {
namespace {

constexpr int kRows = 6;                      // the tile of C in registers: kRows x kPanel
constexpr int kVecs = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kVecs * kLanes;
constexpr int64_t kMostRun = 384;             // words of k between two sums into C
constexpr int64_t kTaskRows = 16 * kRows;     // what one task computes: kTaskRows x kTaskPanels panels of C
constexpr int64_t kTaskPanels = 4;
constexpr int64_t kBlockRows = 192 * kRows;   // a block of packed operands, for L3; each costs two barriers
constexpr int64_t kBlockPanels = 32;
constexpr int64_t kBlockWords = 1152;
constexpr int64_t kPackLines = 64;            // rows of A that are packed at a time
constexpr int64_t kFewRows = 8;               // up to here reading B is what costs
constexpr double kParallelWork = 1 << 20;     // multiplications that are worth a parallel region

constexpr int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }
constexpr int64_t whole(int64_t size, int64_t part) { return parts(size, part) * part; }

/// Distance of the packed left operand's rows: never a power of two, which would crowd a few sets of the cache.
constexpr int64_t left_stride(int64_t words) { return whole(words, 2 * kLanes) + kLanes; }

/// rows x columns of C (at most kRows x kPanel) become the products' sum over `words` words, on top of C where `add`.
template <class T>
void tile(const typename T::word* a, int64_t a_stride, const typename T::word* b, int64_t words, float* c, int64_t ldc,
          int64_t rows, int64_t columns, bool add) {
  const bool full = rows == kRows && columns == kPanel;
  if (full && add)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(c + r * ldc + v * kLanes, 1);
  vec sums[kRows][kVecs] = {};
  accumulate<T, kRows, kVecs>(sums, a, a_stride, 1, b, kPanel, words);
  if (full) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + r * ldc + v * kLanes;
        store(to, add ? load(to) + sums[r][v] : sums[r][v]);
      }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t column = 0; column < columns; column += kLanes) {
      float* to = c + r * ldc + column;
      const int count = static_cast<int>(std::min<int64_t>(kLanes, columns - column));
      const vec sum = sums[r][column / kLanes];
      store_first(to, add ? load_first(to, count) + sum : sum, count);
    }
}

/// A block of the product: operands packed for `words` words of k; C's part that they give.
template <class T>
struct Block {
  const typename T::word* left;
  int64_t left_stride;
  const typename T::word* right;
  int64_t right_words;  // words in a packed panel
  int64_t words;
  float* c;
  int64_t ldc;
  int64_t rows, columns;
  bool add;
};

/// The part of a block's C at task (row, panel).
template <class T>
void compute(const Block<T>& block, int64_t row_task, int64_t panel_task) {
  const int64_t row_end = std::min(block.rows, (row_task + 1) * kTaskRows);
  const int64_t panel_end = std::min(parts(block.columns, kPanel), (panel_task + 1) * kTaskPanels);
  const int64_t run = parts(block.words, parts(block.words, kMostRun));  // all but equally long
  for (int64_t word = 0; word < block.words; word += run) {
    const int64_t words = std::min(run, block.words - word);
    for (int64_t panel = panel_task * kTaskPanels; panel < panel_end; ++panel) {
      const typename T::word* right = block.right + (panel * block.right_words + word) * kPanel;
      const int64_t column = panel * kPanel;
      for (int64_t row = row_task * kTaskRows; row < row_end; row += kRows)
        tile<T>(block.left + row * block.left_stride + word, block.left_stride, right, words,
                block.c + row * block.ldc + column, block.ldc, std::min<int64_t>(kRows, block.rows - row),
                std::min<int64_t>(kPanel, block.columns - column), block.add || word > 0);
    }
  }
}

template <class T>
void gemm_blocked(const Operand& a, const Operand& b, float* c, int64_t ldc, bool add) {
  using word_type = typename T::word;
  const int64_t all_words = parts(a.depth, T::kPack);
  const int64_t most_words = whole(std::min(all_words, kBlockWords), kLanes);
  const int64_t most_rows = whole(parts(a.lines, parts(a.lines, kBlockRows)), kRows);
  const int64_t most_panels = std::min(parts(b.lines, kPanel), kBlockPanels);
  const int64_t stride = left_stride(most_words);
  word_type* left = scratch<word_type>(kScratchGemmLeft, whole(most_rows, kPackLines) * stride);
  word_type* right = scratch<word_type>(kScratchGemmRight, most_panels * most_words * kPanel);

  const double work = static_cast<double>(a.lines) * b.lines * a.depth;
#pragma omp parallel if (work > kParallelWork)
  for (int64_t column = 0; column < b.lines; column += kBlockPanels * kPanel) {
    const int64_t columns = std::min(kBlockPanels * kPanel, b.lines - column);
    for (int64_t word = 0; word < all_words; word += kBlockWords) {
      const int64_t words = std::min(kBlockWords, all_words - word);
      const int64_t squares = parts(words, kLanes);
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < parts(columns, kPanel); ++panel)
        pack_right<T>(b, column + panel * kPanel, kPanel, word * T::kPack, squares, right + panel * most_words * kPanel,
                      kPanel);
      for (int64_t row = 0; row < a.lines; row += most_rows) {
        const int64_t rows = std::min(most_rows, a.lines - row);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < whole(rows, kRows); i += kPackLines)
          pack_left<T>(a, row + i, kPackLines, word * T::kPack, squares, left + i * stride, stride);
        const Block<T> block = {left, stride, right, most_words, words, c + row * ldc + column, ldc, rows, columns,
                                add || word > 0};
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t r = 0; r < parts(rows, kTaskRows); ++r)
          for (int64_t p = 0; p < parts(parts(columns, kPanel), kTaskPanels); ++p) compute(block, r, p);
      }
    }
  }
}

/// COLUMNS neighbouring columns of C: dot products along k of ROWS packed rows with B's lines, as they lie in memory.
template <class T, int ROWS, int COLUMNS>
INLINE void dots(const typename T::word* left, int64_t stride, const Operand& b, int64_t column, float* c, int64_t ldc,
                 int64_t rows, bool add) {
  constexpr int64_t kStep = kLanes * T::kPack;
  vec sums[ROWS][COLUMNS] = {};
  auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    vec right[COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < COLUMNS; ++i) right[i] = words_along(T(), b.data + (column + i) * b.stride + k, count);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename T::vector x = T::read(left + r * stride + k / T::kPack);
#pragma GCC unroll 8
      for (int i = 0; i < COLUMNS; ++i) sums[r][i] = T::multiply_add(x, (typename T::vector)right[i], sums[r][i]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= b.depth; k += kStep) step(k, kStep);
  if (k < b.depth) step(k, b.depth - k);
  for (int64_t r = 0; r < rows; ++r)
    for (int i = 0; i < COLUMNS; ++i) {
      float& to = c[r * ldc + column + i];
      to = add ? to + sum_of(sums[r][i]) : sum_of(sums[r][i]);
    }
}

/// Few rows times a matrix that lies along k: B is read once, unpacked.
template <class T, int ROWS>
void gemm_few(const Operand& a, const Operand& b, float* c, int64_t ldc, bool add) {
  constexpr int kColumns = ROWS > 4 ? 2 : 4;
  const int64_t squares = parts(parts(a.depth, T::kPack), kLanes);
  const int64_t stride = squares * kLanes;
  typename T::word* left = scratch<typename T::word>(kScratchGemmLeft, whole(ROWS, kLanes) * stride);
  pack_left<T>(a, 0, whole(ROWS, kLanes), 0, squares, left, stride);
  const double work = static_cast<double>(a.lines) * b.lines * a.depth;
#pragma omp parallel for schedule(static) if (work > kParallelWork)
  for (int64_t column = 0; column < whole(b.lines, kColumns); column += kColumns) {
    if (column + kColumns <= b.lines)
      dots<T, ROWS, kColumns>(left, stride, b, column, c, ldc, a.lines, add);
    else
      for (int64_t i = column; i < b.lines; ++i) dots<T, ROWS, 1>(left, stride, b, i, c, ldc, a.lines, add);
  }
}

}  // namespace

template <class T>
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
          int64_t ldb, float* c, int64_t ldc, bool add) {
  const Operand left = {a, lda, !trans_a, m, k}, right = {b, ldb, trans_b, n, k};
  if (trans_b && m == 1)
    gemm_few<T, 1>(left, right, c, ldc, add);
  else if (trans_b && m <= kFewRows / 2)
    gemm_few<T, kFewRows / 2>(left, right, c, ldc, add);
  else if (trans_b && m <= kFewRows)
    gemm_few<T, kFewRows>(left, right, c, ldc, add);
  else
    gemm_blocked<T>(left, right, c, ldc, add);
}

template void gemm<Fp32>(bool, bool, int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*,
                         int64_t, bool);
#if defined(__AVX512BF16__)
template void gemm<Bf16>(bool, bool, int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*,
                         int64_t, bool);
#endif

}  // namespace run_llm

namespace {

/// The operator's arguments and its product; shapes as they lie in memory.
void product(run_llm::Args& args, const char* a_shape, const char* b_shape, bool trans_a, bool trans_b) {
  const float* a = args.input<float>("a", a_shape);
  const float* b = args.input<float>("b", b_shape);
  float* c = args.output<float>("c", "M N");
  args.done();
#if defined(__AVX512BF16__)
  const int64_t m = args.size("M"), n = args.size("N"), k = args.size("K");
  run_llm::gemm<run_llm::Bf16>(trans_a, trans_b, m, n, k, a, trans_a ? m : k, b, trans_b ? k : n, c, n, false);
#else
  (void)a, (void)b, (void)c, (void)trans_a, (void)trans_b;
  args.require(false, "this library", "the product needs AVX512_BF16");
#endif
}

}  // namespace

KERNEL(gemm_bf16_nt) { product(args, "M K", "N K", false, true); }
KERNEL(gemm_bf16_nn) { product(args, "M K", "K N", false, false); }
KERNEL(gemm_bf16_tn) { product(args, "K M", "K N", true, false); }
