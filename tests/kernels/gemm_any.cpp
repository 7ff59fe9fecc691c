// gemm() with every choice that its C++ interface leaves: compiled into a library of its own for test_gemm.py.
#include "gemm.h"

KERNEL(gemm_any) {
  const int32_t* setting = args.input<int32_t>("settings", "7");
  const float* a = args.input<float>("a", "AR AC");
  const float* b = args.input<float>("b", "BR BC");
  float* c = args.output<float>("c", "CR CC");
  args.done();
  const bool bf16 = setting[0], trans_a = setting[1], trans_b = setting[2], add = setting[3];
  const int64_t m = setting[4], n = setting[5], k = setting[6];
  const int64_t lda = args.size("AC"), ldb = args.size("BC"), ldc = args.size("CC");
  if (!bf16) {
    run_llm::gemm<run_llm::Fp32>(trans_a, trans_b, m, n, k, a, lda, b, ldb, c, ldc, add);
  } else {
#if defined(__AVX512BF16__)
    run_llm::gemm<run_llm::Bf16>(trans_a, trans_b, m, n, k, a, lda, b, ldb, c, ldc, add);
#else
    args.require(false, "settings", "no bfloat16 here");
#endif
  }
}
