// The instructions that the kernels name themselves: one function each, in PTX for a GPU; emulated_instructions.h has
// the same functions for the emulator. Lanes of a warp call those of warps together.
#pragma once

#include "abi.h"
#include "device.h"

#ifdef __CUDACC__

namespace run_llm {

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- numbers

/// 2^x, within 2 ulp.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

/// Two numbers rounded to T, the first in the lower half.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

/// x itself; but what is computed from it is computed here, not kept in registers from before. For addresses in loops.
DEVICE int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- warps

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
/// Bit i: what lane i says.
DEVICE uint32_t vote(bool x) { return __ballot_sync(0xffffffffu, x); }
/// Number of the lowest bit that is set; x is not 0.
DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

/// Barrier `index` (1 .. 15) of `threads` threads: wait at it, or be counted and go on.
DEVICE void barrier_wait(int index, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
}
DEVICE void barrier_arrive(int index, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(index), "r"(threads) : "memory");
}

// ---- asynchronous copies to shared memory

/// 16 bytes from global to shared memory, both aligned to 16; zeros instead if not `valid`.
DEVICE void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
/// The same for 4 bytes.
DEVICE void copy_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
/// Close a group of this thread's copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Wait for all groups of this thread but the latest `kLeft`; other threads see the data behind a barrier.
template <int kLeft>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- loads of what is read once

/// 16 bytes of global memory that no thread writes, aligned to 16, past the first cache; zeros if not `valid`.
DEVICE void load_once_16(uint32_t (&to)[4], const void* from, bool valid) {
  asm("{\n"
      "  .reg .pred valid;\n"
      "  setp.ne.u32 valid, %5, 0;\n"
      "  mov.u32 %0, 0;\n  mov.u32 %1, 0;\n  mov.u32 %2, 0;\n  mov.u32 %3, 0;\n"
      "  @valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
      : "l"(from), "r"(static_cast<uint32_t>(valid)));
}
DEVICE void load_once_16(float (&to)[4], const void* from, bool valid) {
  uint32_t bits[4];
  load_once_16(bits, from, valid);
  UNROLL
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(bits[i]);
}

// ---- tensor cores: fragments as PTX lays them out (group = lane / 4, pair = lane % 4)

/// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned).
/// Lane i gets of each the row i / 4, columns 2 (i % 4) and the next; transposed: column i / 4, those rows.
template <bool kTransposed>
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// sum [16 x 8] += a [16 x 16] b [16 x 8], T = bf16 or fp16, sums in fp32.
template <class T>
DEVICE void multiply_16x8x16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DEVICE void multiply_16x8x16<bf16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE void multiply_16x8x16<fp16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// sum [16 x 8] += a [16 x 8] b [8 x 8], fp32 numbers of which the lower 13 bits are not read (tf32).
DEVICE void multiply_16x8x8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace run_llm

#else

#include "emulated_instructions.h"

#endif
