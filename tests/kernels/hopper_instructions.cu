// Operators that each try one function of hopper.h, for test_cuda_hopper.py: a bulk copy, and products of a warpgroup.
#include "hopper.h"

namespace run_llm {
namespace {

constexpr int kBoxRows = 32, kRows = 64, kDepth = 128;  // kDepth: of a product, two tiles of 64 columns

struct Box {
  uint16_t numbers[kBoxRows][kSwizzledColumns];
  uint64_t full;
};

/// The box at four coordinates, as its bytes lie in shared memory. kMore: bytes awaited beside the box's.
template <class T, int kMore>
KERNEL_FUNCTION __launch_bounds__(128) copy_one(const __grid_constant__ TensorMap map, const int* at, T* to) {
  Box& shared = *shared_memory<Box>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_init(&shared.full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(&shared.full, sizeof shared.numbers + kMore);
    copy_box(shared.numbers, map, at[0], at[1], at[2], at[3], &shared.full);
  }
  __syncthreads();
  mbarrier_wait(&shared.full, 0);
  for (int i = thread; i < kBoxRows * kSwizzledColumns; i += 128)
    to[i].bits = shared.numbers[i / kSwizzledColumns][i % kSwizzledColumns];
}

/// left [64 x kDepth]; right [kN x kDepth], or with kTransposed [kDepth x kN].
template <int kN, bool kTransposed>
struct Operands {
  static constexpr int kRightRows = kTransposed ? kDepth : kN, kRightColumns = kTransposed ? kN : kDepth;
  uint16_t left[kDepth / kSwizzledColumns][kRows][kSwizzledColumns];
  uint16_t right[kRightColumns / kSwizzledColumns][kRightRows][kSwizzledColumns];
  uint64_t full;
};

/// to [64 x kN] = left right, on top of what is there; with kRegisters the left operand goes through registers.
template <class T, int kN, bool kTransposed, bool kRegisters>
KERNEL_FUNCTION __launch_bounds__(128)
    multiply_one(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right, const T* numbers,
                 float* to) {
  using Shared = Operands<kN, kTransposed>;
  Shared& shared = *shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  if (thread == 0) {
    mbarrier_init(&shared.full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(&shared.full, sizeof shared.left + sizeof shared.right);
    for (int i = 0; i < kDepth / kSwizzledColumns; ++i)
      copy_box(shared.left[i], left, i * kSwizzledColumns, 0, 0, 0, &shared.full);
    for (int i = 0; i < Shared::kRightColumns / kSwizzledColumns; ++i)
      copy_box(shared.right[i], right, i * kSwizzledColumns, 0, 0, 0, &shared.full);
  }
  __syncthreads();
  mbarrier_wait(&shared.full, 0);
  constexpr int kPart = Shared::kRightRows * kSwizzledRow;
  float sum[kN / 2];
  uint32_t fragments[kDepth / 16][4];
  UNROLL
  for (int i = 0; i < kN / 2; ++i) sum[i] = to[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + column + i % 2];
  UNROLL
  for (int d = 0; d < kDepth / 16; ++d)
    UNROLL
    for (int c = 0; c < 4; ++c) {
      const T* pair = numbers + (row + c % 2 * 8) * kDepth + 16 * d + c / 2 * 8 + column;
      fragments[d][c] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
    }
  hold(sum);
  wgmma_fence();
  UNROLL
  for (int d = 0; d < kDepth / 16; ++d) {
    const uint64_t b = kTransposed ? moved(mn_major_descriptor(shared.right, kPart), d * 2 * kAtom)
                                   : moved(k_major_descriptor(shared.right), d / 4 * kPart + d % 4 * 32);
    if constexpr (kRegisters)
      multiply_async<T, kN, kTransposed>(sum, fragments[d], b, true);
    else
      multiply_async<T, kN, kTransposed>(
          sum, moved(k_major_descriptor(shared.left), d / 4 * kRows * kSwizzledRow + d % 4 * 32), b, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(sum);
  UNROLL
  for (int i = 0; i < kN / 2; ++i) to[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + column + i % 2] = sum[i];
}

template <int kMore>
void copy_any(Args& args) {
  const auto* x = args.input<bf16>("x", "B R H D");
  const auto* at = args.input<int32_t>("at", "4");
  auto* to = args.output<bf16>("to", "32 64");
  const auto size = [&](const char* name) { return static_cast<int>(args.size(name)); };
  launch(copy_one<bf16, kMore>, dim3(1), 128, sizeof(Box), static_cast<cudaStream_t>(args.stream()),
         tensor_map(x, size("B"), size("R"), size("H"), size("D"), kBoxRows), at, to);
}

template <class T, int kN, bool kTransposed, bool kRegisters>
void multiply_any(Args& args) {
  using Shared = Operands<kN, kTransposed>;
  const T* left = args.input<T>("left", "64 128");
  const T* right = args.input<T>("right", "R C");
  auto* to = args.output<float>("to", "64 N");
  args.done();
  auto* stream = static_cast<cudaStream_t>(args.stream());
  launch(multiply_one<T, kN, kTransposed, kRegisters>, dim3(1), 128, sizeof(Shared), stream,
         tensor_map(left, 1, kRows, 1, kDepth, kRows),
         tensor_map(right, 1, Shared::kRightRows, 1, Shared::kRightColumns, Shared::kRightRows), left, to);
}

}  // namespace
}  // namespace run_llm

using namespace run_llm;

KERNEL(copy_one_box) { copy_any<0>(args); }
KERNEL(copy_one_box_of_more_bytes) { copy_any<16>(args); }
KERNEL(k_major_64) { multiply_any<bf16, 64, false, false>(args); }
KERNEL(k_major_128) { multiply_any<fp16, 128, false, false>(args); }
KERNEL(mn_major_64) { multiply_any<fp16, 64, true, true>(args); }
KERNEL(mn_major_128) { multiply_any<bf16, 128, true, true>(args); }
KERNEL(k_major_64_registers) { multiply_any<fp16, 64, false, true>(args); }
KERNEL(mn_major_128_shared) { multiply_any<bf16, 128, true, false>(args); }
