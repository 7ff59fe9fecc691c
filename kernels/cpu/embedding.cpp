// The gradient of a table look-up: the rows of dy are added to the table rows they were read from.
#include <omp.h>

#include <stdexcept>
#include <string>

#include "loops.h"

namespace run_llm {

// Every thread owns a range of columns and adds the tokens in their order, so the sums come out the same for every
// number of threads, and no token that fills a batch can keep one thread busy alone.
KERNEL(embedding_backward) {
  auto ids = args.input<int32_t>("ids", "N");
  auto dy = args.input<float>("dy", "N D");
  auto table = args.output<float>("dtable", "V D");
  args.done();
  const int64_t count = args.size("N"), width = args.size("D"), vocabulary = args.size("V");
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocabulary)
      throw std::invalid_argument("embedding_backward: ids: " + std::to_string(ids[i]) + " at " + std::to_string(i) +
                                  " is not in the table of " + std::to_string(vocabulary) + " rows");
  constexpr int64_t kLine = 16;  // numbers of a cache line, which two threads should not share
  const int64_t lines = (width + kLine - 1) / kLine;
  const bool little = (vocabulary + count) * width < kParallelFrom;
  const int64_t threads = little ? 1 : std::min<int64_t>(lines, omp_get_max_threads());
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads))
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t begin = lines * thread / threads * kLine;
    const int64_t end = std::min(width, lines * (thread + 1) / threads * kLine);
    for (int64_t row = 0; row < vocabulary; ++row)
      std::fill(table + row * width + begin, table + row * width + end, 0.f);
    for (int64_t i = 0; i < count; ++i) {
      float* sum = table + ids[i] * width;
      const float* row = dy + i * width;
      each_vector(begin, end, [&](int64_t j, auto at) { at.store(sum + j, at.load(sum + j) + at.load(row + j)); });
    }
  }
}

}  // namespace run_llm
