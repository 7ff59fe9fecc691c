// What the kernels are written in: CUDA C++, or the emulator's idea of it where no nvcc compiles them.
//
// A kernel uses of CUDA's headers threadIdx, blockIdx, gridDim and blockDim, __syncthreads() and __syncwarp(), vectors
// (float2, int4, ..), the functions of <cmath> (fmaxf, logf, std::exp, ..), __launch_bounds__ and __grid_constant__;
// all else comes from instructions.h and hopper.h, shared memory from shared_memory<T>(). So one source serves both.
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
