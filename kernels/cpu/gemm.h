// Matrix products.
#pragma once

#include "tile.h"

namespace run_llm {

/// C = op(A) op(B), or C += op(A) op(B) where `add`: op(A) is [m, k], op(B) [k, n], C [m, n], row-major, with `ld*`
/// numbers from one row in memory to the next. Where `trans_a`, A lies in memory as [k, m]; where `trans_b`, B lies
/// as [n, k]. T is Fp32 or Bf16 (tile.h): with Bf16 the numbers of A and B are rounded to bfloat16 and their products
/// summed in fp32.
///
/// Opens its own OpenMP regions, and gives the same bits for every number of threads. Uses the scratch slots
/// kScratchGemmLeft and kScratchGemmRight of the calling thread; throws std::bad_alloc, and then C is untouched. C must
/// not overlap A or B.
template <class T>
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
          int64_t ldb, float* c, int64_t ldc, bool add);

}  // namespace run_llm
