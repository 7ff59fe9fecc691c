// The host's side: starting a kernel, and memory that lives as long as the work of a call on its stream.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"

namespace run_llm {

/// Throw unless the device lets a block have so much shared memory.
inline void require_shared_memory(size_t bytes);

#ifdef __CUDACC__

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  if (shared_bytes > 48 << 10) {
    require_shared_memory(shared_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "shared memory");
  }
  check(cudaGetLastError(), "an earlier CUDA call");  // it must not pass for this kernel's
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "launch");
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  return device;
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, current_device()), "device");
  return value;
}
/// Streaming multiprocessors of the current device.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
/// Bytes of shared memory that a block may have at most.
inline size_t shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

/// Once a thread: make its context, which the driver wants to be there, and let the device keep freed scratch memory
/// for the next call. By default each synchronisation gives it back, and the next call has to map it again.
inline void prepare_device() {
  thread_local int prepared = -1;  // the device of this thread's last call
  const int device = current_device();
  if (device == prepared) return;
  check(cudaFree(nullptr), "device");
  cudaMemPool_t pool;
  uint64_t most = UINT64_MAX;
  check(cudaDeviceGetDefaultMemPool(&pool, device), "scratch memory");
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &most), "scratch memory");
  prepared = device;
}

inline void* allocate(size_t bytes, cudaStream_t stream) {
  prepare_device();
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, bytes, stream), "scratch memory");
  return memory;
}
inline void release(void* memory, cudaStream_t stream) { cudaFreeAsync(memory, stream); }

#else

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t, A... arguments) {
  require_shared_memory(shared_bytes);
  emulator::run(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
}
inline int multiprocessors() { return 4; }
inline size_t shared_memory_limit() { return emulator::shared_memory_limit(); }
inline void* allocate(size_t bytes, cudaStream_t) {
  void* memory = ::operator new(bytes, std::align_val_t{256});
  std::memset(memory, 0xff, bytes);  // what a GPU leaves there is as useless
  emulator::watch(memory, bytes);
  return memory;
}
inline void release(void* memory, cudaStream_t) {
  emulator::unwatch(memory);
  ::operator delete(memory, std::align_val_t{256});
}

#endif

inline void require_shared_memory(size_t bytes) {
  const size_t most = shared_memory_limit();
  if (bytes > most)
    throw std::runtime_error("this kernel needs " + std::to_string(bytes) + " bytes of shared memory a block, and " +
                             std::to_string(most) + " is the most that this GPU has: it takes a GPU with 164 KB or " +
                             "more (A100, H100, H200), or KERNELS=reference");
}

/// `count` numbers of device memory, freed when the stream has done what was asked of it so far.
template <class T>
class Scratch {
 public:
  Scratch(size_t count, cudaStream_t stream)
      : stream_(stream), memory_(static_cast<T*>(allocate(count * sizeof(T), stream))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(memory_, stream_); }
  T* get() const { return memory_; }

 private:
  cudaStream_t stream_;
  T* memory_;
};

}  // namespace run_llm
