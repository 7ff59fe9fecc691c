// linear_few(x [N K], weight [M K]) -> y [N M]: x weight^T for a few rows of x, on all threads.
#include "few_rows.h"

namespace run_llm {

KERNEL(linear_few) {
  auto x = args.input<float>("x", "N K");
  auto weight = args.input<float>("weight", "M K");
  auto y = args.output<float>("y", "N M");
  args.done();
  const int64_t rows = args.size("N"), width = args.size("K"), columns = args.size("M");
#pragma omp parallel for schedule(static) if (rows * width * columns >= kParallelFrom)
  for (int64_t c = 0; c < columns; c += kFewColumns)
    few_rows(x, rows, weight, width, c, std::min(c + kFewColumns, columns), y, columns);
}

}  // namespace run_llm
