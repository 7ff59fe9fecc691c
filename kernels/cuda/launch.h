// The host's side: starting a kernel, and memory that lives as long as the work of a call on its stream.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"

namespace run_llm {

#ifdef __CUDACC__

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "shared memory");
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "launch");
}

/// Streaming multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

inline void* allocate(size_t bytes, cudaStream_t stream) {
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, bytes, stream), "scratch memory");
  return memory;
}
inline void release(void* memory, cudaStream_t stream) { cudaFreeAsync(memory, stream); }

#else

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t, A... arguments) {
  emulator::run(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
}
inline int multiprocessors() { return 4; }
inline void* allocate(size_t bytes, cudaStream_t) {
  void* memory = ::operator new(bytes, std::align_val_t{256});
  std::memset(memory, 0xff, bytes);  // what a GPU leaves there is as useless
  return memory;
}
inline void release(void* memory, cudaStream_t) { ::operator delete(memory, std::align_val_t{256}); }

#endif

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
