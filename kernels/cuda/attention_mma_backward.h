// What the two kernels of the backward pass share: numbers for each query, prepared once.
#pragma once

#include "attention_mma.h"

namespace run_llm {

constexpr int kQueryBlock = 64;  // queries that the summaries are about

/// Rows of queries, rounded up to whole blocks of both kernels: what lies beyond the last query needs no care.
inline int whole_blocks(int queries) { return (queries + 127) / 128 * 128; }

struct Prepared {
  int queries;        // whole_blocks() of them
  const float* lse;   // [B, H, queries], base 2; infinity beyond the last query: all weights are 0
  const float* delta; // [B, H, queries], the sum of out * dout over a head
  const int2* ranges; // [R, queries], cut to the keys; empty beyond the last query
  const int4* seen;   // [R, queries / 64]: a block of queries sees keys [x, y) by one of them, [z, w) by all

  DEVICE int blocks() const { return queries / kQueryBlock; }
  DEVICE int64_t row(int b, int head, int heads) const { return (static_cast<int64_t>(b) * heads + head) * queries; }
};

/// `call` with heads of whole chunks; scale is 1 / sqrt(D) of the true width.
template <class T>
void attention_mma_dk_dv(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream);
template <class T>
void attention_mma_dq(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream);

}  // namespace run_llm
