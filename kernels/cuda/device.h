// What the kernels are written in: CUDA C++, or the emulator's idea of it where no nvcc compiles them.
//
// A kernel uses threadIdx, blockIdx and gridDim, __syncthreads(), the functions of instructions.h and
// shared_memory<T>(); nothing else of CUDA's headers. So one source serves both.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define KERNEL_FUNCTION __global__ void
#define UNROLL _Pragma("unroll")

namespace run_llm {

/// The block's dynamic shared memory, aligned to 1024 bytes (as swizzled bulk copies want it).
template <class T>
DEVICE T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace run_llm

#else

#include "emulator.h"

#endif
