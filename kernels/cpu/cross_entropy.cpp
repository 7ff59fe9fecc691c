// Cross entropy of logits that exist already. The gradient is written over them, so that there is never a second
// array of that size. Rows are independent and their losses are summed in order: threads change no bit.
#include "cross_entropy.h"

#include <cstring>
#include <vector>

using namespace run_llm;

/// logits [N V], labels [N] (negative: ignored) -> loss [1], the sum over the supervised rows, and log-sum-exp [N]
/// (0 where ignored).
KERNEL(cross_entropy_forward) {
  const float* logits = args.input<float>("logits", "N V");
  const int32_t* labels = args.input<int32_t>("labels", "N");
  float* loss = args.output<float>("loss", "1");
  float* lse = args.output<float>("lse", "N");
  args.done();
  const int64_t rows = args.size("N"), vocabulary = args.size("V");
  check_labels(args, labels, rows, vocabulary);

  std::vector<double> row_loss(static_cast<size_t>(rows), 0.);
#pragma omp parallel for schedule(dynamic, 4) if (rows * vocabulary >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    lse[row] = 0;
    if (labels[row] < 0) continue;
    const float* x = logits + row * vocabulary;
    RowTotal total;
    total.add(x, vocabulary);
    lse[row] = static_cast<float>(total.log());
    row_loss[static_cast<size_t>(row)] = total.loss(x[labels[row]]);
  }
  double sum = 0;
  for (const double one : row_loss) sum += one;
  *loss = static_cast<float>(sum);
}

/// logits, labels and lse as above, dloss [1] -> done [1]. The logits become (softmax - onehot) * dloss, and 0 in
/// ignored rows.
KERNEL(cross_entropy_backward) {
  float* logits = const_cast<float*>(args.input<float>("logits", "N V"));
  const int32_t* labels = args.input<int32_t>("labels", "N");
  const float* lse = args.input<float>("lse", "N");
  const float dloss = *args.input<float>("dloss", "1");
  float* done = args.output<float>("done", "1");
  args.done();
  const int64_t rows = args.size("N"), vocabulary = args.size("V");
  check_labels(args, labels, rows, vocabulary);

#pragma omp parallel for schedule(dynamic, 4) if (rows * vocabulary >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    float* x = logits + row * vocabulary;
    if (labels[row] < 0) {
      std::memset(x, 0, sizeof(float) * static_cast<size_t>(vocabulary));
    } else {
      softmax_in_place(x, vocabulary, lse[row], dloss);
      x[labels[row]] -= dloss;
    }
  }
  *done = 1;
}
