// How many floating-point operations a second the machine can do at all: multiply-adds whose operands never leave the
// registers. What benchmarks/timing.py times; compiled like the kernels, see kernels/cpu/simd.h.
#include <omp.h>

#include "simd.h"

namespace {

using namespace run_llm;

// A multiply-add takes four to six cycles and two may start in each, so at least twelve must be under way; and all
// of them and the operands must fit into the registers: 32 with AVX-512, 16 without.
#if defined(__AVX512F__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif

volatile float sink;

/// Operations of `rounds` rounds on one thread.
template <class Step>
double chains(int64_t rounds, Step step) {
  vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i]);
  }
  vec total = sums[0];
  for (int i = 1; i < kChains; ++i) total = total + sums[i];
  sink = sum_of(total);
  return static_cast<double>(rounds) * kChains * kLanes * 2;
}

}  // namespace

/// fp32 multiply-adds on all OpenMP threads; returns the number of operations, two each.
EXPORT double multiply_add_fp32(int64_t rounds) {
  double operations = 0;
#pragma omp parallel reduction(+ : operations)
  {
    const vec a = broadcast(sink * 0 + 0.5f), b = broadcast(sink * 0 + 1.f);
    operations += chains(rounds, [=](vec sum) { return sum * a + b; });
  }
  return operations;
}

/// Products of bfloat16 pairs added to fp32 (four operations a lane); 0 where there is no such instruction.
EXPORT double multiply_add_bf16([[maybe_unused]] int64_t rounds) {
  double operations = 0;
#if defined(__AVX512BF16__)
#pragma omp parallel reduction(+ : operations)
  {
    const vec pair = broadcast(sink * 0 + 0.001f);
    operations += 2 * chains(rounds, [=](vec sum) {
      return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)pair);
    });
  }
#endif
  return operations;
}
