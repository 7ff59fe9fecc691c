// CUDA on a CPU, for tests: the kernels' own sources, compiled by a C++ compiler, with every thread of a block a fiber.
//
// A block's fibers run one at a time, each until it must wait for others: at a barrier, or in an instruction that a
// warp carries out together. Who runs next is drawn at random (emulator_seed). Blocks run in random order too, several
// at a time (OpenMP). Shared memory starts as NaNs. An asynchronous copy takes place as late as it may, when its thread
// waits for it. What no GPU would survive ends the launch with an error: threads that wait for each other in vain,
// lanes of a warp in different instructions, a misaligned or a foreign address; and so does a race (races.h).
//
// Not emulated: the time anything takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

#define DEVICE inline __attribute__((always_inline))
#define KERNEL_FUNCTION static void
#define UNROLL
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using cudaStream_t = void*;

namespace emulator {

constexpr int kWarp = 32;
constexpr uint32_t kSharedStart = 1024;  // the first address of shared memory

/// Where the thread that runs now stands, as CUDA's built-in variables say it.
struct Place {
  dim3 thread, block, threads, blocks;
};
const Place& place();

/// All lanes of the calling warp hand in a pointer each; when the last has, `act` sees all 32, and they go on.
/// `what` names the instruction: lanes that come with different names end the launch.
void in_warp(const char* what, void* mine, const std::function<void(void**)>& act);

/// The same for nothing but the order of what they do before and after it.
void sync_warp();

/// Wait until `threads` threads have come to barrier `index`; with `stay` false, be counted and go on.
void barrier(int index, int threads, bool stay = true);

/// Copy later: when this thread waits for the group that its next commit() closes. Null `from`: zeros.
void copy_later(void* to, const void* from, size_t bytes);
void commit();
/// Carry out all copies of this thread but those of its latest `left` groups.
void wait_for_copies(int left);

/// Wait in a list until somebody wakes it; `what` stands in the error of a launch in which nobody does.
void wait_in(std::vector<int>& list, const char* what);
/// Let all who wait in the list go on.
void wake(std::vector<int>& list);
/// Carry out `act` at a random later moment, between two threads' turns: what the hardware does on its own.
void later(std::function<void()> act);
/// What an instruction set keeps for a block: empty when the block starts, freed at its end.
std::shared_ptr<void>& block_state();

// ---- what races.h is told. The compiler reports each access of a kernel itself (access_hooks.cpp).

/// Where accesses matter: shared memory, and from the first of the watched arrays to the last.
struct Sight {
  const unsigned char *shared, *arrays;
  size_t shared_bytes, arrays_bytes;

  bool sees(const void* address) const {
    const auto* place = static_cast<const unsigned char*>(address);
    return static_cast<size_t>(place - shared) < shared_bytes || static_cast<size_t>(place - arrays) < arrays_bytes;
  }
};
// initial-exec: looked at on every access, so without a call.
extern thread_local Sight sight __attribute__((tls_model("initial-exec")));

/// As long as it lives, what the running thread does to memory is no access of its own.
class Quiet {
 public:
  Quiet() : before_(sight) { sight = {}; }
  ~Quiet() { sight = before_; }

 private:
  Sight before_;
};
/// Of the block that runs, and the number of its thread that does.
Races& races();
int running_thread();
/// The running thread reads or writes memory.
inline void access(const void* address, size_t bytes, bool write) {
  races().access(running_thread(), address, bytes, write);
}
/// An array in global memory that the kernels which this thread launches write, until unwatch().
void watch(void* start, size_t bytes);
void unwatch(void* start);

/// End the launch with this text.
[[noreturn]] void fail(const std::string& text);
/// fail() unless [address, address + bytes) lies in the block's shared memory, and the address is aligned to `align`.
void check_shared(const char* what, const void* address, size_t bytes, size_t align);

void* shared();

/// Bytes of shared memory that a block may have: Hopper's, or what emulator_shared_memory() has set.
size_t shared_memory_limit();

/// Run a kernel. Throws std::runtime_error.
void run(dim3 blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace emulator

#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().threads)
#define gridDim (emulator::place().blocks)

inline void __syncthreads() { emulator::barrier(0, static_cast<int>(blockDim.x)); }
inline void __syncwarp() { emulator::sync_warp(); }

namespace run_llm {

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared());
}

}  // namespace run_llm
