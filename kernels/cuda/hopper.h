// What compute capability 9.0 (Hopper, sm_90a) adds to instructions.h: barriers in shared memory, bulk copies of boxes
// of a tensor (TMA), matrix products of a warpgroup (wgmma), registers that move from one warpgroup to another. One
// function an instruction, in PTX; emulator/emulated_hopper.h has the same functions for the emulator.
//
// A warpgroup is four warps in a row whose first has a number divisible by four; its 128 threads call the functions
// that say so together.
//
// The 128-byte swizzle. Tiles lie in shared memory as rows of 64 numbers of 16 bits, 128 bytes, one behind the other,
// from an address divisible by 1024. Of the address that a number would so have, bits 4-6 (which 16 bytes of the row)
// are XORed with bits 7-9 (which row of eight): the same 16 bytes of eight rows lie in eight different groups of banks.
// A copy of a box writes so, wgmma reads so; both apply the formula to the final address. Wider tiles (D 128) are
// several such, side by side: the first 64 columns of all rows, then the next 64.
#pragma once

#include <type_traits>

#include "instructions.h"
#include "launch.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace run_llm {

constexpr int kWarpgroup = 128;
constexpr int kSwizzledRow = 128;  // bytes of a row
constexpr int kSwizzledColumns = kSwizzledRow / 2;

// ---- matrix descriptors
//
// Where wgmma finds an operand in shared memory (PTX ISA, "Matrix Descriptor Format"; offsets and the address in units
// of 16 bytes, of the address's lower 18 bits):
//
//   bits  0-13  start address
//   bits 16-29  leading dimension byte offset (LBO)
//   bits 32-45  stride dimension byte offset (SBO)
//   bits 49-51  base offset: 0 where the swizzle's pattern begins at a multiple of 1024, as all our tiles do
//   bits 62-63  swizzle: 1 is the 128-byte one
//
// With that swizzle the unit of layout is an atom of eight rows of 128 bytes, 1024 bytes (PTX ISA, "Canonical Layouts",
// with T = 8 numbers of 16 bits in 16 bytes: K-major ((8,m),(T,2k)):((8T,SBO),(1,T)), MN-major
// ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))):
//
// * K-major (Q and K in Q K^T: a row is a query or a key, its numbers run along the sum): an atom is 8 rows of the
//   matrix by 64 of k. SBO leads from 8 rows to the next 8: 1024, as rows are packed. LBO is not used (1). One
//   instruction takes 16 of k, 32 bytes of each row: the next 16 begin 32 bytes on, within the row, and since the
//   swizzle takes bits 7-9 of the final address, which 32 bytes do not change, the start address may simply move; after
//   64 the next 64 columns.
// * MN-major (V in P V: a row is a key, along the sum, and its numbers run along N): an atom is 64 of N by 8 of k. SBO
//   leads from 8 of k (keys) to the next 8: 1024. LBO leads from 64 of N to the next 64: the bytes of 64 columns of all
//   rows of the tile. One instruction takes 16 keys: the next 16 begin 2048 bytes on.

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr int kAtom = 8 * kSwizzledRow;

/// The descriptor of the operand that begins at `start`, an address of shared memory.
DEVICE uint64_t matrix_descriptor(uint32_t start, int leading_bytes) {
  return kSwizzle128 | static_cast<uint64_t>(kAtom >> 4) << 32 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         (start & 0x3ffff) >> 4;
}
DEVICE uint64_t k_major_descriptor(const void* start) { return matrix_descriptor(shared_address(start), 16); }
DEVICE uint64_t mn_major_descriptor(const void* start, int bytes_to_next_columns) {
  return matrix_descriptor(shared_address(start), bytes_to_next_columns);
}
/// The same operand `bytes` further on.
DEVICE uint64_t moved(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

}  // namespace run_llm

#ifdef __CUDACC__

namespace run_llm {

// ---- barriers in shared memory: 8 bytes, a phase that ends when all arrivals and all announced bytes have come

DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
/// What this thread has written to shared memory is seen by bulk copies and wgmma that come after (behind a barrier, if
/// another thread starts them).
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// The barriers that this thread has made can be used by bulk copies; by other threads after a __syncthreads().
DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async();
}
DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Arrive, and let the phase wait for so many bytes of bulk copies too.
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
/// Wait until the phase of this parity has ended. The first phase has parity 0; the one before it counts as ended.
DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t ended = 0;
  while (!ended)
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// ---- bulk copies of boxes

using TensorMap = CUtensorMap;

/// The box of `map` at these coordinates to `to` (a multiple of 1024), swizzled; zeros for what lies outside the
/// tensor. Its bytes, all of them, are counted at the barrier when they have landed.
DEVICE void copy_box(void* to, const TensorMap& map, int column, int head, int row, int batch, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

/// `bytes` bytes to shared memory, addresses and number multiples of 16, counted at the barrier.
DEVICE void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// The map of `from` [batch, rows, heads, dim], 16-bit numbers at a multiple of 128 bytes, dim a multiple of 64, in
/// boxes of one head, 64 columns and box_rows rows.
inline TensorMap tensor_map(const void* from, int batch, int rows, int heads, int dim, int box_rows) {
  check(cudaGetLastError(), "an earlier CUDA call");  // the driver would hand it on as its own
  prepare_device();
  // Through the runtime, so that the library needs no libcuda where there is no driver.
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found), "driver");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found), "driver");
#endif
  if (!entry || found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver makes no tensor maps");
  const cuuint64_t head_bytes = 2 * static_cast<cuuint64_t>(dim), row_bytes = heads * head_bytes;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {head_bytes, row_bytes, rows * row_bytes};
  const cuuint32_t box[4] = {kSwizzledColumns, 1, static_cast<cuuint32_t>(box_rows), 1}, steps[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult code = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(from), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) throw std::runtime_error("a tensor map: error " + std::to_string(static_cast<int>(code)));
  return map;
}

// ---- registers from one warpgroup to another

/// Give registers up until each thread of the warpgroup has kRegisters; 24 .. 256, a multiple of 8.
template <int kRegisters>
DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
/// Wait until each thread of the warpgroup can have kRegisters.
template <int kRegisters>
DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup
//
// Asynchronous: operands and sums are the tensor cores' from multiply_async() until the wait for its group. Registers
// that have been written otherwise (sums, or a left operand) are handed over by wgmma_fence().

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Wait for all groups of the warpgroup but the latest kLeft.
template <int kLeft>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
/// Keep the compiler from moving what is done with these registers across this point: it does not know that a wait or a
/// fence is about them.
template <int kCount>
DEVICE void hold(float (&registers)[kCount]) {
  UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
DEVICE void hold(uint32_t (&registers)[kCount][4]) {
  UNROLL
  for (int i = 0; i < kCount; ++i)
    UNROLL
    for (int c = 0; c < 4; ++c) asm volatile("" : "+r"(registers[i][c])::"memory");
}

// The numbers of the operands in an instruction's text, and the sums as operands.
#define RUN_LLM_NAMES_32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RUN_LLM_NAMES_64                                                                              \
  RUN_LLM_NAMES_32                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RUN_LLM_SUMS_8(i)                                                                                          \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define RUN_LLM_SUMS_32(i) RUN_LLM_SUMS_8(i), RUN_LLM_SUMS_8(i + 8), RUN_LLM_SUMS_8(i + 16), RUN_LLM_SUMS_8(i + 24)
#define RUN_LLM_SUMS_64(i) RUN_LLM_SUMS_32(i), RUN_LLM_SUMS_32(i + 32)
// %A .. are the numbers of the operands behind the sums.
#define RUN_LLM_SHARED_LEFT(N, TYPE, NAMES, SUMS, A, B, ADD, MAJOR)                                                \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " ADD ", 0;\n\t"                                              \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B            \
               ", p, 1, 1, 0, " MAJOR ";\n\t}"                                                                     \
               : SUMS                                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposed ? 1 : 0))
#define RUN_LLM_REGISTER_LEFT(N, TYPE, NAMES, SUMS, A, B, ADD, MAJOR)                                              \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " ADD ", 0;\n\t"                                              \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES "}, {" A "}, " B          \
               ", p, 1, 1, " MAJOR ";\n\t}"                                                                        \
               : SUMS                                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                   \
                 "n"(kTransposed ? 1 : 0))

/// sum [64 x kN] = a [64 x 16] b [16 x kN], plus sum if `add`: T = bf16 or fp16, kN 64 or 128, both operands in shared
/// memory. The left one is K-major; the right one too, or with kTransposed MN-major. Of sum, lane l of warp w of the
/// warpgroup has in sum[4 i + 2 j + e] row 16 w + l / 4 + 8 j, column 8 i + 2 (l % 4) + e.
template <class T, int kN, bool kTransposed>
DEVICE void multiply_async(float (&sum)[kN / 2], uint64_t a, uint64_t b, bool add) {
  constexpr bool kBrain = std::is_same_v<T, bf16>;
  if constexpr (kN == 64 && kBrain)
    RUN_LLM_SHARED_LEFT("64", "bf16", RUN_LLM_NAMES_32, RUN_LLM_SUMS_32(0), "%32", "%33", "%34", "%35");
  else if constexpr (kN == 64)
    RUN_LLM_SHARED_LEFT("64", "f16", RUN_LLM_NAMES_32, RUN_LLM_SUMS_32(0), "%32", "%33", "%34", "%35");
  else if constexpr (kBrain)
    RUN_LLM_SHARED_LEFT("128", "bf16", RUN_LLM_NAMES_64, RUN_LLM_SUMS_64(0), "%64", "%65", "%66", "%67");
  else
    RUN_LLM_SHARED_LEFT("128", "f16", RUN_LLM_NAMES_64, RUN_LLM_SUMS_64(0), "%64", "%65", "%66", "%67");
}

/// The same with the left operand in registers, two numbers in each: lane l of warp w has in a[0] row 16 w + l / 4,
/// columns 2 (l % 4) and the next; in a[1] the row 8 further down, in a[2] the columns 8 further on, in a[3] both.
template <class T, int kN, bool kTransposed>
DEVICE void multiply_async(float (&sum)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  constexpr bool kBrain = std::is_same_v<T, bf16>;
  if constexpr (kN == 64 && kBrain)
    RUN_LLM_REGISTER_LEFT("64", "bf16", RUN_LLM_NAMES_32, RUN_LLM_SUMS_32(0), "%32, %33, %34, %35",
                          "%36", "%37", "%38");
  else if constexpr (kN == 64)
    RUN_LLM_REGISTER_LEFT("64", "f16", RUN_LLM_NAMES_32, RUN_LLM_SUMS_32(0), "%32, %33, %34, %35",
                          "%36", "%37", "%38");
  else if constexpr (kBrain)
    RUN_LLM_REGISTER_LEFT("128", "bf16", RUN_LLM_NAMES_64, RUN_LLM_SUMS_64(0), "%64, %65, %66, %67",
                          "%68", "%69", "%70");
  else
    RUN_LLM_REGISTER_LEFT("128", "f16", RUN_LLM_NAMES_64, RUN_LLM_SUMS_64(0), "%64, %65, %66, %67",
                          "%68", "%69", "%70");
}

#undef RUN_LLM_NAMES_32
#undef RUN_LLM_NAMES_64
#undef RUN_LLM_SUMS_8
#undef RUN_LLM_SUMS_32
#undef RUN_LLM_SUMS_64
#undef RUN_LLM_SHARED_LEFT
#undef RUN_LLM_REGISTER_LEFT

}  // namespace run_llm

#else

#include "emulated_hopper.h"

#endif
