// Small kernels, some of them wrong, that show what the emulator of kernels/cuda/emulator does: see test_emulator.py.
#include <atomic>

#include "abi.h"
#include "hopper.h"
#include "instructions.h"
#include "launch.h"

using namespace run_llm;

namespace {

DEVICE int number() { return static_cast<int>(threadIdx.x); }
DEVICE int lane() { return number() % 32; }

/// to[i] = 63 - i, by way of shared memory.
template <bool kBarrier>
KERNEL_FUNCTION turn(float* to) {
  float* shared = shared_memory<float>();
  shared[number()] = static_cast<float>(number());
  if (kBarrier) __syncthreads();
  to[number()] = shared[63 - number()];
}

KERNEL_FUNCTION read_shared(float* to) { to[number()] = shared_memory<float>()[number()]; }

/// One warp hands its numbers to the other: the first goes on, the second waits.
template <bool kWait>
KERNEL_FUNCTION hand_over(float* to) {
  float* shared = shared_memory<float>();
  if (number() < 32) {
    shared[lane()] = static_cast<float>(lane());
    barrier_arrive(1, 64);
  } else {
    if (kWait) barrier_wait(1, 64);
    to[lane()] = shared[lane()];
  }
}

/// to[0] and to[1]: what lies at the target of a first and a second copy after a wait for all but kLeft.
template <int kLeft>
KERNEL_FUNCTION copy_twice(const float* from, float* to) {
  float* shared = shared_memory<float>() + 8 * number();
  copy_async_16(shared, from, true);
  copy_async_commit();
  copy_async_16(shared + 4, from + 4, true);
  copy_async_commit();
  copy_async_wait<kLeft>();
  to[2 * number()] = shared[0];
  to[2 * number() + 1] = shared[4];
  copy_async_wait<0>();
}

KERNEL_FUNCTION copy_nothing(const float* from, float* to) {
  float* shared = shared_memory<float>() + number();
  copy_async_4(shared, from + number(), number() % 2);
  copy_async_commit();
  copy_async_wait<0>();
  to[number()] = *shared;
}

enum Fault {
  kPartingLanes, kEndedLane, kEndedThread, kPastTheEnd, kMisalignedTarget, kMisalignedSource, kForeignTarget,
  kEndedCopy, kForeignRow, kMisalignedRow, kNoSuchBarrier, kReadPastInput, kWritePastOutput, kWriteToInput,
  kCopyPastInput,
};

KERNEL_FUNCTION commit(int fault, const float* from, float* to) {
  float* shared = shared_memory<float>();
  uint32_t fragment[4];
  switch (fault) {
    case kPartingLanes: to[number()] = lane() < 16 ? shuffle_xor(1.f, 1) : static_cast<float>(any_lane(true)); break;
    case kEndedLane: if (lane() != 7) to[number()] = shuffle(1.f, 0); break;
    case kEndedThread: if (number() != 40) __syncthreads(); break;
    case kPastTheEnd: shared[64] = 0; break;
    case kMisalignedTarget: copy_async_16(shared + 1, from, true); break;
    case kMisalignedSource: copy_async_16(shared, from + 1, true); break;
    case kForeignTarget: copy_async_16(to, from, true); break;
    case kEndedCopy: copy_async_4(shared + number(), from, true); break;
    case kForeignRow: load_matrices<false>(fragment, to); break;
    case kMisalignedRow: load_matrices<false>(fragment, shared + 1); break;
    case kNoSuchBarrier: barrier_wait(16, 64); break;
    case kReadPastInput: to[number()] = from[number() + 1]; break;
    case kWritePastOutput: to[number() + 1] = 0; break;
    case kWriteToInput: const_cast<float*>(from)[number()] = 0; break;
    case kCopyPastInput:
      copy_async_4(shared + number(), from + number() + 1, true);
      copy_async_commit();
      copy_async_wait<0>();
      break;
  }
}

/// One block leaves a barrier half full; the other waits at its own in vain.
KERNEL_FUNCTION half_a_barrier() {
  if (blockIdx.x == 0) {
    if (number() < 32) barrier_arrive(1, 64);
  } else if (number() >= 32) {
    barrier_wait(1, 64);
  }
}

std::atomic<int> turns;

/// to[i] = how many blocks came before block i.
KERNEL_FUNCTION count_blocks(int* to) {
  if (number() == 0) to[blockIdx.x] = turns++;
}

enum Race {
  kWriteWrite, kWriteRead, kReadWrite, kShuffled, kCopyAfterRead, kWriteUnderCopy, kMatricesAfterWrite, kNamed,
  kOwnOutput, kTwoBlocksWrite, kReadAnotherBlock, kLaneForAll, kBulkAfterWrite, kUnfencedProduct,
};

/// A race each, and with kRight what mends it.
template <bool kRight>
KERNEL_FUNCTION race(int which, const float* from, float* to) {
  float* shared = shared_memory<float>();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + 4096);
  const int block = static_cast<int>(blockIdx.x), mirror = 63 - number();
  float found = 0;
  if (number() == 0) mbarrier_init(barrier, 1);
  __syncthreads();
  switch (which) {
    case kWriteWrite: if (kRight ? number() == 5 : number() % 32 == 5) shared[0] = 1; break;
    case kWriteRead:
      shared[number()] = 1;
      if (kRight) __syncthreads();
      found = shared[mirror];
      break;
    case kReadWrite:
      found = shared[mirror];
      if (kRight) __syncthreads();
      shared[number()] = 1;
      break;
    case kShuffled:
      shared[number()] = 1;
      shuffle_xor(1.f, 1);  // brings the lanes together, and orders nothing
      if (kRight) __syncwarp();
      found = shared[number() ^ 1];
      break;
    case kCopyAfterRead:
      found = shared[mirror];
      if (kRight) __syncthreads();
      copy_async_4(shared + number(), from + number(), true);
      copy_async_commit();
      copy_async_wait<0>();
      break;
    case kWriteUnderCopy:
      copy_async_4(shared + number(), from + number(), true);
      copy_async_commit();
      if (kRight) copy_async_wait<0>();
      shared[number()] = 1;
      copy_async_wait<0>();
      break;
    case kMatricesAfterWrite: {
      uint32_t fragment[4];
      for (int i = 0; i < 4; ++i) shared[number() + 64 * i] = 1;
      if (kRight) __syncthreads();
      load_matrices<false>(fragment, shared + 4 * number());
      break;
    }
    case kNamed:  // the first warp reads, and lets the second write
      if (number() < 32) {
        if (!kRight) barrier_arrive(1, 64);
        found = shared[lane()];
        if (kRight) barrier_arrive(1, 64);
      } else {
        barrier_wait(1, 64);
        shared[lane()] = 1;
      }
      break;
    case kOwnOutput:
      to[64 * block + number()] = 1;
      if (kRight) __syncthreads();
      found = to[64 * block + mirror];
      break;
    case kTwoBlocksWrite: to[kRight ? 64 * block + number() : number()] = 1; break;
    case kReadAnotherBlock:
      if (block == 0) to[number()] = 1;
      if (block == 1) found = to[kRight ? 64 + number() : number()];
      break;
    case kLaneForAll:  // the first warp reads, and one of its lanes lets the second write
      if (number() < 32) {
        found = shared[lane()];
        if (kRight) __syncwarp();
        if (lane() == 0) mbarrier_arrive(barrier);
      } else {
        mbarrier_wait(barrier, 0);
        shared[lane()] = 1;
      }
      break;
    case kBulkAfterWrite:
      if (number() == 0) {
        mbarrier_arrive_expect(barrier, 256);
        copy_bytes(shared, from, 256, barrier);
      }
      if (kRight) mbarrier_wait(barrier, 0);
      found = shared[number()];
      mbarrier_wait(barrier, 0);
      break;
    case kUnfencedProduct: {  // 128 threads, zeros
      float sum[32] = {};
      for (int i = 0; i < 16; ++i) reinterpret_cast<uint32_t*>(shared)[16 * number() + i] = 0;
      if (kRight) fence_async();
      __syncthreads();
      const uint64_t tile = k_major_descriptor(shared);
      wgmma_fence();
      multiply_async<bf16, 64, false>(sum, tile, tile, false);
      wgmma_commit();
      wgmma_wait<0>();
      found = sum[0];
      break;
    }
  }
  if (found == -1) to[0] = found;  // read in earnest
}

KERNEL_FUNCTION nothing() {}

KERNEL_FUNCTION exchange(const float* x, const int* from, float* to, int* any) {
  to[lane()] = shuffle(x[lane()], from[lane()]);
  to[32 + lane()] = shuffle_xor(x[lane()], 5);
  any[lane()] = any_lane(x[lane()] > 0);
}

/// Four matrices [8, 8], one below the other -> fragments [32 lanes, 4].
template <bool kTransposed>
KERNEL_FUNCTION load(const bf16* matrices, int* to) {
  bf16* shared = shared_memory<bf16>();
  for (int i = 0; i < 8; ++i) shared[lane() * 8 + i] = matrices[lane() * 8 + i];
  __syncwarp();
  uint32_t fragment[4];
  load_matrices<kTransposed>(fragment, shared + lane() * 8);
  for (int i = 0; i < 4; ++i) to[lane() * 4 + i] = static_cast<int>(fragment[i]);
}

/// sum [16, 8] += a [16, 16] b [16, 8], through shared memory: b transposed as it is loaded.
template <class T>
KERNEL_FUNCTION multiply(const T* a, const T* b, const float* before, float* sum) {
  T* left = shared_memory<T>();  // as four matrices, in the order of a fragment's registers
  T* right = left + 256;
  for (int i = lane(); i < 256; i += 32) {
    const int row = i / 16, column = i % 16, matrix = row / 8 + column / 8 * 2;
    left[matrix * 64 + row % 8 * 8 + column % 8] = a[i];
    right[i] = b[i % 128];
  }
  __syncwarp();
  uint32_t fragment[4], other[4];
  load_matrices<false>(fragment, left + lane() * 8);
  load_matrices<true>(other, right + lane() * 8);
  const uint32_t half[2] = {other[0], other[1]};
  float found[4];
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) found[i] = before[(row + i / 2 * 8) * 8 + column + i % 2];
  multiply_16x8x16<T>(found, fragment, half);
  for (int i = 0; i < 4; ++i) sum[(row + i / 2 * 8) * 8 + column + i % 2] = found[i];
}

DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

/// sum [16, 8] = a [16, 8] b [8, 8] in tf32.
KERNEL_FUNCTION multiply_tf32(const float* a, const float* b, float* sum) {
  const int row = lane() / 4, column = lane() % 4;
  const uint32_t left[4] = {bits_of(a[row * 8 + column]), bits_of(a[(row + 8) * 8 + column]),
                            bits_of(a[row * 8 + column + 4]), bits_of(a[(row + 8) * 8 + column + 4])};
  const uint32_t right[2] = {bits_of(b[column * 8 + row]), bits_of(b[(column + 4) * 8 + row])};
  float found[4] = {};
  multiply_16x8x8_tf32(found, left, right);
  for (int i = 0; i < 4; ++i) sum[(row + i / 2 * 8) * 8 + 2 * column + i % 2] = found[i];
}

template <class T>
KERNEL_FUNCTION round_numbers(const float* from, T* to, int count) {
  for (int i = 2 * number(); i < count; i += 64) {
    const uint32_t both = pack<T>(from[i], from[i + 1]);
    to[i].bits = static_cast<uint16_t>(both);
    to[i + 1].bits = static_cast<uint16_t>(both >> 16);
  }
}

template <class T>
KERNEL_FUNCTION widen_numbers(const T* from, float* to, int count) {
  for (int i = number(); i < count; i += 32) to[i] = to_float(from[i]);
}

template <class T>
void round_all(Args& args) {
  const auto* from = args.input<float>("from", "N");
  auto* to = args.output<T>("to", "N");
  launch(round_numbers<T>, dim3(1), 32, 0, nullptr, from, to, static_cast<int>(args.size("N")));
}
template <class T>
void widen_all(Args& args) {
  const auto* from = args.input<T>("from", "N");
  auto* to = args.output<float>("to", "N");
  launch(widen_numbers<T>, dim3(1), 32, 0, nullptr, from, to, static_cast<int>(args.size("N")));
}
template <class T>
void multiply_all(Args& args) {
  const auto* a = args.input<T>("a", "16 16");
  const auto* b = args.input<T>("b", "16 8");
  const auto* before = args.input<float>("before", "16 8");
  launch(multiply<T>, dim3(1), 32, 1024, nullptr, a, b, before, args.output<float>("sum", "16 8"));
}
void load_all(Args& args, void (*kernel)(const bf16*, int*)) {
  const auto* matrices = args.input<bf16>("matrices", "32 8");
  launch(kernel, dim3(1), 32, 512, nullptr, matrices, args.output<int32_t>("to", "32 4"));
}
void copy_all(Args& args, void (*kernel)(const float*, float*), const char* to) {
  const auto* from = args.input<float>("from", "64");
  launch(kernel, dim3(1), 64, 4096, nullptr, from, args.output<float>("to", to));
}

}  // namespace

KERNEL(turn) { launch(turn<true>, dim3(1), 64, 256, nullptr, args.output<float>("to", "64")); }
KERNEL(turn_without_barrier) { launch(turn<false>, dim3(1), 64, 256, nullptr, args.output<float>("to", "64")); }
KERNEL(read_shared) { launch(read_shared, dim3(1), 64, 256, nullptr, args.output<float>("to", "64")); }
KERNEL(hand_over) { launch(hand_over<true>, dim3(1), 64, 256, nullptr, args.output<float>("to", "32")); }
KERNEL(hand_over_unawaited) { launch(hand_over<false>, dim3(1), 64, 256, nullptr, args.output<float>("to", "32")); }
KERNEL(copy_twice_wait_for_none) { copy_all(args, copy_twice<2>, "64 2"); }
KERNEL(copy_twice_wait_for_one) { copy_all(args, copy_twice<1>, "64 2"); }
KERNEL(copy_twice_wait_for_both) { copy_all(args, copy_twice<0>, "64 2"); }
KERNEL(copy_nothing) { copy_all(args, copy_nothing, "64"); }
KERNEL(commit) {
  const int fault = *args.input<int32_t>("fault", "1");
  const auto* from = args.input<float>("from", "64");
  launch(commit, dim3(1), 64, 256, nullptr, fault, from, args.output<float>("to", "64"));
}
KERNEL(half_a_barrier) {
  args.done();
  launch(half_a_barrier, dim3(2), 64, 0, nullptr);
}
KERNEL(count_blocks) {
  auto* to = args.output<int32_t>("to", "N");
  launch(count_blocks, dim3(static_cast<unsigned>(args.size("N"))), 32, 0, nullptr, to);
}
KERNEL(race) {
  const int which = *args.input<int32_t>("which", "1"), right = *args.input<int32_t>("right", "1");
  const auto* from = args.input<float>("from", "64");
  auto* to = args.output<float>("to", "128");
  launch(right ? race<true> : race<false>, dim3(2), which == kUnfencedProduct ? 128 : 64, 16400, nullptr, which, from,
         to);
}
KERNEL(launch_nothing) {
  const auto* sizes = args.input<int32_t>("sizes", "5");  // of the grid, of a block, of shared memory
  const auto size = [&](int i) { return static_cast<unsigned>(sizes[i]); };
  launch(nothing, dim3(size(0), size(1), size(2)), sizes[3], size(4), nullptr);
}
KERNEL(exchange) {
  const auto* x = args.input<float>("x", "32");
  const auto* from = args.input<int32_t>("from", "32");
  auto* to = args.output<float>("to", "2 32");
  launch(exchange, dim3(1), 32, 0, nullptr, x, from, to, args.output<int32_t>("any", "32"));
}
KERNEL(load) { load_all(args, load<false>); }
KERNEL(load_transposed) { load_all(args, load<true>); }
KERNEL(multiply_bf16) { multiply_all<bf16>(args); }
KERNEL(multiply_fp16) { multiply_all<fp16>(args); }
KERNEL(multiply_tf32) {
  const auto* a = args.input<float>("a", "16 8");
  const auto* b = args.input<float>("b", "8 8");
  launch(multiply_tf32, dim3(1), 32, 0, nullptr, a, b, args.output<float>("sum", "16 8"));
}
KERNEL(round_bf16) { round_all<bf16>(args); }
KERNEL(round_fp16) { round_all<fp16>(args); }
KERNEL(widen_bf16) { widen_all<bf16>(args); }
KERNEL(widen_fp16) { widen_all<fp16>(args); }
KERNEL(read_scratch) {
  auto* to = args.output<float>("to", "8");
  const Scratch<float> memory(8, nullptr);
  for (int i = 0; i < 8; ++i) to[i] = memory.get()[i];
}
