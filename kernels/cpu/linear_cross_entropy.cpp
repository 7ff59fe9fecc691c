// Cross entropy of logits that are a matrix product, x W^T, and never exist as a whole.
//
// Rows without a label are left out at once. The others are taken in chunks, the vocabulary in blocks: a block of the
// chunk's logits is still in the cache when its exponentials are summed, and again when it has become the gradient and
// is multiplied by W and by x. Sizes follow from the shape alone, and sums are taken in order: threads change no bit.
#include <cstring>
#include <vector>

#include "cross_entropy.h"
#include "gemm.h"
#include "scratch.h"

using namespace run_llm;

namespace {

constexpr int64_t kVocabularyBlock = 8192;

struct Problem {
  const float* x;
  const float* weight;
  const int32_t* labels;
  int64_t rows, width, vocabulary;
  std::vector<int64_t> supervised;  // the rows that have a label

  explicit Problem(Args& args) {
    x = args.input<float>("x", "N H");
    weight = args.input<float>("weight", "V H");
    labels = args.input<int32_t>("labels", "N");
    rows = args.size("N"), width = args.size("H"), vocabulary = args.size("V");
    check_labels(args, labels, rows, vocabulary);
    for (int64_t row = 0; row < rows; ++row)
      if (labels[row] >= 0) supervised.push_back(row);
  }
};

/// Call work(first, count) for the vocabulary's blocks.
template <class Work>
void each_vocabulary_block(int64_t vocabulary, Work work) {
  for (int64_t first = 0; first < vocabulary; first += kVocabularyBlock)
    work(first, std::min(kVocabularyBlock, vocabulary - first));
}

/// Some of the supervised rows, gathered.
class Chunk {
 public:
  Chunk(const Problem& problem, const int64_t* rows, int64_t count, float* x, float* logits, int64_t stride)
      : problem_(problem), rows_(rows), count_(count), x_(x), logits_(logits), stride_(stride), totals_(count),
        label_logits_(count) {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(x_ + i * width(), problem.x + rows[i] * width(), sizeof(float) * width());
  }

  /// The logits of a block of the vocabulary into column `column` of the scratch, and into the rows' sums.
  template <class T>
  void add_logits(int64_t first, int64_t count, int64_t column) {
    gemm<T>(false, true, count_, count, width(), x_, width(), problem_.weight + first * width(), width(),
            logits_ + column, stride_, false);
#pragma omp parallel for schedule(static) if (count_ * count >= kParallelFrom)
    for (int64_t i = 0; i < count_; ++i) {
      const float* logits = logits_ + i * stride_ + column;
      totals_[i].add(logits, count);
      if (const int64_t at = label(i) - first; at >= 0 && at < count) label_logits_[i] = logits[at];
    }
  }

  /// Sum of the rows' losses, when all logits have been added.
  double loss() const {
    double sum = 0;
    for (int64_t i = 0; i < count_; ++i) sum += totals_[i].loss(label_logits_[i]);
    return sum;
  }

  /// The logits of a block become their gradient, which is multiplied by W into dx (added unless first is 0) and by
  /// x into dweight (added where `add`), unless that is null: the weights are frozen.
  template <class T>
  void add_gradients(int64_t first, int64_t count, float* dx, float* dweight, bool add) {
    float* block = logits_ + first;
#pragma omp parallel for schedule(static) if (count_ * count >= kParallelFrom)
    for (int64_t i = 0; i < count_; ++i) {
      float* logits = block + i * stride_;
      softmax_in_place(logits, count, static_cast<float>(totals_[i].log()), 1);
      if (const int64_t at = label(i) - first; at >= 0 && at < count) logits[at] -= 1;
    }
    gemm<T>(false, false, count_, width(), count, block, stride_, problem_.weight + first * width(), width(), dx,
            width(), first > 0);
    if (dweight == nullptr) return;
    gemm<T>(true, false, count, width(), count_, block, stride_, x_, width(), dweight + first * width(), width(), add);
  }

 private:
  int64_t width() const { return problem_.width; }
  int32_t label(int64_t i) const { return problem_.labels[rows_[i]]; }

  const Problem& problem_;
  const int64_t* rows_;
  int64_t count_;
  float* x_;
  float* logits_;
  int64_t stride_;  // of the rows of logits
  std::vector<RowTotal> totals_;
  std::vector<float> label_logits_;
};

/// Rows whose logits are held at once. A chunk reads W twice and dweight once and writes dweight, and its logits move
/// about as often: with width / 2 rows neither is much more than the other, and the logits take half of W's memory.
/// With fewer than 256 the products themselves become slower.
int64_t chunk_rows(const Problem& problem) {
  const int64_t wanted = std::clamp<int64_t>(problem.width / 2, 256, 1024);
  const int64_t supervised = static_cast<int64_t>(problem.supervised.size());
  const int64_t chunks = std::max<int64_t>(1, (supervised + wanted - 1) / wanted);
  return (supervised + chunks - 1) / chunks;  // of equal size
}

/// frozen: nobody asks for dweight, which is a third of the work, and as large as W.
template <class T>
void forward_and_backward(Args& args, bool frozen) {
  const Problem problem(args);
  float* loss = args.output<float>("loss", "1");
  float* dx = args.output<float>("dx", "N H");
  float* dweight = frozen ? nullptr : args.output<float>("dweight", "V H");
  args.done();
  const int64_t width = problem.width, vocabulary = problem.vocabulary;
  const int64_t rows = static_cast<int64_t>(problem.supervised.size()), most = chunk_rows(problem);
  if (rows < problem.rows) std::memset(dx, 0, sizeof(float) * problem.rows * width);
  if (rows == 0 && !frozen) std::memset(dweight, 0, sizeof(float) * vocabulary * width);

  float* logits = scratch<float>(kScratchLossLogits, most * vocabulary);
  float* chunk_x = scratch<float>(kScratchLossRows, 2 * most * width);
  float* chunk_dx = chunk_x + most * width;
  double sum = 0;
  for (int64_t start = 0; start < rows; start += most) {
    const int64_t* which = problem.supervised.data() + start;
    const int64_t count = std::min(most, rows - start);
    Chunk chunk(problem, which, count, chunk_x, logits, vocabulary);
    each_vocabulary_block(vocabulary, [&](int64_t first, int64_t n) { chunk.add_logits<T>(first, n, first); });
    sum += chunk.loss();
    each_vocabulary_block(vocabulary, [&](int64_t first, int64_t n) {
      chunk.add_gradients<T>(first, n, chunk_dx, dweight, start > 0);
    });
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(dx + which[i] * width, chunk_dx + i * width, sizeof(float) * width);
  }
  *loss = static_cast<float>(sum);
}

/// Without gradients no more than a block of logits is ever needed.
template <class T>
void forward_only(Args& args) {
  const Problem problem(args);
  float* loss = args.output<float>("loss", "1");
  args.done();
  constexpr int64_t kRows = 1024;  // of a chunk: W is read once for each
  const int64_t rows = static_cast<int64_t>(problem.supervised.size()), most = std::min(rows, kRows);
  const int64_t columns = std::min(problem.vocabulary, kVocabularyBlock);
  float* logits = scratch<float>(kScratchLossLogits, most * columns);
  float* chunk_x = scratch<float>(kScratchLossRows, most * problem.width);
  double sum = 0;
  for (int64_t start = 0; start < rows; start += most) {
    Chunk chunk(problem, problem.supervised.data() + start, std::min(most, rows - start), chunk_x, logits, columns);
    each_vocabulary_block(problem.vocabulary, [&](int64_t first, int64_t n) { chunk.add_logits<T>(first, n, 0); });
    sum += chunk.loss();
  }
  *loss = static_cast<float>(sum);
}

}  // namespace

/// x [N H], weight [V H], labels [N] (negative: ignored) -> loss [1], the sum over the supervised rows, and its
/// gradients dx [N H], dweight [V H].
KERNEL(linear_cross_entropy) { forward_and_backward<Fp32>(args, false); }
/// The same inputs -> loss [1], dx [N H].
KERNEL(linear_cross_entropy_frozen) { forward_and_backward<Fp32>(args, true); }
/// The same inputs -> loss [1].
KERNEL(linear_cross_entropy_forward) { forward_only<Fp32>(args); }

// The same with the factors of all products rounded to bfloat16.
#if defined(__AVX512BF16__)
KERNEL(linear_cross_entropy_bf16) { forward_and_backward<Bf16>(args, false); }
KERNEL(linear_cross_entropy_frozen_bf16) { forward_and_backward<Bf16>(args, true); }
KERNEL(linear_cross_entropy_forward_bf16) { forward_only<Bf16>(args); }
#else
KERNEL(linear_cross_entropy_bf16) { args.require(false, "this library", "the product needs AVX512_BF16"); }
KERNEL(linear_cross_entropy_frozen_bf16) { args.require(false, "this library", "the product needs AVX512_BF16"); }
KERNEL(linear_cross_entropy_forward_bf16) { args.require(false, "this library", "the product needs AVX512_BF16"); }
#endif
