// Heads whose rows do not begin at 16 bytes, by their width or by where their array begins: the kernels work on copies,
// as much wider as it takes.
#pragma once

#include "attention_mma.h"

namespace run_llm {

/// Rows of `from_dim` numbers as rows of `to_dim`: zeros are added, or numbers left out, at the end of each. A thread
/// takes 8 numbers of a row.
template <class T>
KERNEL_FUNCTION __launch_bounds__(256) resize_rows(T* to, int to_dim, const T* from, int from_dim, int64_t rows) {
  const int chunks = (to_dim + 7) / 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * chunks; i += step) {
    const int64_t row = i / chunks;
    const int first = static_cast<int>(i % chunks) * 8;
    for (int column = first; column < first + 8 && column < to_dim; ++column)
      to[row * to_dim + column] = column < from_dim ? from[row * from_dim + column] : T{0};
  }
}

/// Memory for `rows` heads of whole chunks.
template <class T>
class WideRows {
 public:
  WideRows(int64_t rows, int dim, cudaStream_t stream)
      : rows_(rows), dim_(dim), stream_(stream), memory_(static_cast<size_t>(rows) * whole_chunks(dim), stream) {}
  /// Holding the numbers of `from`.
  WideRows(const T* from, int64_t rows, int dim, cudaStream_t stream) : WideRows(rows, dim, stream) {
    resize(memory_.get(), whole_chunks(dim), from, dim);
  }
  T* get() const { return memory_.get(); }
  void copy_to(T* to) const { resize(to, dim_, memory_.get(), whole_chunks(dim_)); }

 private:
  void resize(T* to, int to_dim, const T* from, int from_dim) const {
    constexpr int kThreads = 256, kMostBlocks = 1 << 16;
    const int64_t blocks = (rows_ * whole_chunks(dim_) / 8 + kThreads - 1) / kThreads;
    const auto grid = dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
    launch(resize_rows<T>, grid, kThreads, 0, stream_, to, to_dim, from, from_dim, rows_);
  }

  int64_t rows_;
  int dim_;
  cudaStream_t stream_;
  Scratch<T> memory_;
};

}  // namespace run_llm
