// What the backwards for fp32 tensors, exact and in 3xTF32, need before their kernels of tiles: delta, and which keys
// each block of queries sees. Both are computed once and read by many blocks.
#pragma once

#include "attention.h"

namespace run_llm {

constexpr int kSmallThreads = 128;  // 4 warps, each with a row or a block of queries to itself

/// delta [B, H, Sq] = the sum over D of dout * out, in fp32.
template <class T>
KERNEL_FUNCTION __launch_bounds__(kSmallThreads) sum_rows(Attention<T> call, float* delta) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kSmallThreads / 32) + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(call.batch) * call.heads * call.queries) return;
  const int query = static_cast<int>(row % call.queries), head = static_cast<int>(row / call.queries % call.heads);
  const int b = static_cast<int>(row / call.queries / call.heads), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t start = call.q_start(b, head) + query * call.q_stride();
  float sum = 0;
  for (int d = lane; d < call.dim; d += 32) sum += to_float(call.dout[start + d]) * to_float(call.given_out[start + d]);
  for (int other = 16; other > 0; other /= 2) sum += shuffle_xor(sum, other);
  if (lane == 0) delta[row] = sum;
}

/// seen [R, blocks]: of each block of kRows queries, R the rows of ranges.
template <class T, int kRows>
KERNEL_FUNCTION __launch_bounds__(kSmallThreads) see(Attention<T> call, Seen* seen, int blocks) {
  const int block = static_cast<int>(blockIdx.x) * (kSmallThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (block >= blocks) return;
  const Seen own = Seen::of(call, static_cast<int>(blockIdx.y), block * kRows, kRows);
  if (threadIdx.x % 32 == 0) seen[static_cast<int64_t>(blockIdx.y) * blocks + block] = own;
}

/// What `see` has found out, and how to get at it in a kernel.
struct SeenBlocks {
  const Seen* seen;
  int blocks;
  bool per_row;

  DEVICE const Seen* of_row(int b) const { return per_row ? seen + static_cast<int64_t>(b) * blocks : seen; }
};

/// Both, in memory of the call's stream.
template <int kRows, class T>
class BackwardScratch {
 public:
  BackwardScratch(const Attention<T>& call, cudaStream_t stream)
      : blocks_((call.queries + kRows - 1) / kRows), range_rows_(call.ranges_row ? call.batch : 1),
        delta_(static_cast<size_t>(call.batch) * call.heads * call.queries, stream),
        seen_(static_cast<size_t>(range_rows_) * blocks_, stream) {
    const int64_t rows = static_cast<int64_t>(call.batch) * call.heads * call.queries;
    constexpr int kWarps = kSmallThreads / 32;
    launch(sum_rows<T>, dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), kSmallThreads, 0, stream, call,
           delta_.get());
    launch(see<T, kRows>, dim3((blocks_ + kWarps - 1) / kWarps, range_rows_), kSmallThreads, 0, stream, call,
           seen_.get(), blocks_);
  }
  const float* delta() const { return delta_.get(); }
  SeenBlocks seen() const { return {seen_.get(), blocks_, range_rows_ > 1}; }

 private:
  int blocks_, range_rows_;
  Scratch<float> delta_;
  Scratch<Seen> seen_;
};

/// The blocks of queries that see block `n` of kKeys keys, in heads head .. last_head - 1, one after the other.
template <int kKeys>
struct QuerySteps {
  const Seen* seen;  // of the blocks of queries
  int n, begin, end, head, last_head, block;

  /// A warp calls it together; all lanes get the same.
  static DEVICE QuerySteps of(const Seen* seen, int blocks, int n, int head, int last_head) {
    int begin = blocks, end = 0;
    for (int i = static_cast<int>(threadIdx.x % 32); i < blocks; i += 32)
      if (seen[i].sees<kKeys>(n)) {
        begin = begin < i ? begin : i;
        end = i + 1;
      }
    for (int other = 16; other > 0; other /= 2) {
      const int their_begin = shuffle_xor(begin, other), their_end = shuffle_xor(end, other);
      begin = begin < their_begin ? begin : their_begin;
      end = end > their_end ? end : their_end;
    }
    return {seen, n, begin, end, begin < end ? head : last_head, last_head, begin};
  }

  DEVICE bool done() const { return head == last_head; }
  DEVICE QuerySteps next() const {
    QuerySteps step = *this;
    do {
      if (++step.block == end) {
        step.block = begin;
        ++step.head;
      }
    } while (!step.done() && !seen[step.block].sees<kKeys>(n));
    return step;
  }
};

}  // namespace run_llm
