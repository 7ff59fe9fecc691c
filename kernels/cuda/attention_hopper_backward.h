// The three kernels of the backward for Hopper, and what the first leaves for the others.
#pragma once

#include "attention_hopper.h"

namespace run_llm {

/// In scratch memory; queries are padded to whole tiles of 64.
struct Prepared {
  int padded, tiles_count;  // queries, and tiles of 64 of them
  bool ranges_shared;       // by all batch rows
  float2* rows;             // [B, H, padded] lse of base 2 (infinity behind the end), sum of out * dout
  int2* ranges;             // [R, padded] cut to the keys, (0, 0) behind the end
  int4* tiles;              // [R, padded / 64] Seen's some and all

  DEVICE const float2* rows_of(int b, int head, int heads) const {
    return rows + (static_cast<int64_t>(b) * heads + head) * padded;
  }
  DEVICE int64_t range_row(int b) const { return ranges_shared ? 0 : b; }
};

template <class T>
void hopper_backward_keys(const Attention<T>& call, const Prepared& prepared, cudaStream_t stream);
template <class T>
void hopper_backward_queries(const Attention<T>& call, const Prepared& prepared, cudaStream_t stream);

}  // namespace run_llm
