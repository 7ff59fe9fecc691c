// The arguments of the attention operators.
//
//   attention_forward(q, k, v, ranges, bias, prefix) -> out, lse
//   attention_backward(q, k, v, ranges, bias, prefix, out, lse, dout) -> dq, dk, dv
//
// q, out, dout, dq: [B, Sq, H, D]; k, v, dk, dv: [B, Sk, K, D]; all float32 or all bfloat16, H a multiple of K.
// ranges: int32 [1 | B, Sq, 2]; prefix: int32 [1]. Query i of row b sees the keys j with j < prefix or
// ranges[b, i, 0] <= j < ranges[b, i, 1]. bias: float32 [1 | B, H, Sk], or [1] for none, is added to the products
// before they are scaled by 1 / sqrt(D). lse: float32 [B, H, Sq], the natural log of the sum of exp(score).
// A query that sees no key gives 0 and lse 0.
#pragma once

#include <cmath>

#include "attention.h"

namespace run_llm {

constexpr int64_t kMostPositions = 1 << 30;  // they are int32, with room for a step beyond

template <class S>
struct AttentionCall {
  int64_t batch, queries, keys, heads, kv_heads, dim;
  Heads<const S> q, k, v;
  const int32_t* ranges;
  const float* bias;  // null: none
  int32_t prefix;
  bool ranges_per_row, bias_per_row;
  int64_t bias_keys;  // a row of bias, which a cache has longer than `keys`
  Heads<S> out;
  float* lse;  // may be null
  // backward only
  Heads<const S> given_out, dout;
  const float* given_lse;
  Heads<S> dq, dk, dv;

  static AttentionCall forward(Args& args) {
    AttentionCall call = inputs(args);
    call.out = Heads<S>::inside(args.output<S>("out", "B Sq H D"), call.queries, call.heads, call.dim);
    call.lse = args.output<float>("lse", "B H Sq");
    args.done();
    return call;
  }

  static AttentionCall backward(Args& args) {
    AttentionCall call = inputs(args);
    call.given_out = Heads<const S>::inside(args.input<S>("out", "B Sq H D"), call.queries, call.heads, call.dim);
    call.given_lse = args.input<float>("lse", "B H Sq");
    call.dout = Heads<const S>::inside(args.input<S>("dout", "B Sq H D"), call.queries, call.heads, call.dim);
    call.dq = Heads<S>::inside(args.output<S>("dq", "B Sq H D"), call.queries, call.heads, call.dim);
    call.dk = Heads<S>::inside(args.output<S>("dk", "B Sk K D"), call.keys, call.kv_heads, call.dim);
    call.dv = Heads<S>::inside(args.output<S>("dv", "B Sk K D"), call.keys, call.kv_heads, call.dim);
    args.done();
    return call;
  }

  float scale() const { return 1 / std::sqrt(static_cast<float>(dim)); }

  Visibility visibility(int64_t b) const { return {ranges + (ranges_per_row ? b * queries * 2 : 0), prefix}; }

  /// bias of keys [first, last) for one head, zeros after them up to a whole block of panels.
  void copy_bias(int64_t b, int64_t h, int64_t first, int64_t last, float* to) const {
    const float* from = bias + ((bias_per_row ? b * heads : 0) + h) * bias_keys;
    std::copy(from + first, from + last, to);
    std::fill(to + (last - first), to + round_up(last - first, kPanel), 0.f);
  }

 private:
  static AttentionCall inputs(Args& args) {
    AttentionCall call{};
    const S* q = args.input<S>("q", "B Sq H D");
    const S* k = args.input<S>("k", "B Sk K D");
    const S* v = args.input<S>("v", "B Sk K D");
    call.batch = args.size("B");
    call.queries = args.size("Sq");
    call.keys = args.size("Sk");
    call.heads = args.size("H");
    call.kv_heads = args.size("K");
    call.dim = args.size("D");
    args.require(call.heads % call.kv_heads == 0, "k", "its number of heads must divide that of q");
    args.require(call.keys < kMostPositions && call.queries < kMostPositions, "k", "too many positions");
    call.q = Heads<const S>::inside(q, call.queries, call.heads, call.dim);
    call.k = Heads<const S>::inside(k, call.keys, call.kv_heads, call.dim);
    call.v = Heads<const S>::inside(v, call.keys, call.kv_heads, call.dim);
    call.ranges = args.input<int32_t>("ranges", "R Sq 2");
    const int64_t range_rows = args.size("R");
    args.require(range_rows == 1 || range_rows == call.batch, "ranges", "its first size must be 1 or the batch");
    call.ranges_per_row = range_rows > 1;
    int32_t least = 0, most = 0;
    for (int64_t i = 0; i < range_rows * call.queries * 2; ++i) {
      least = std::min(least, call.ranges[i]);
      most = std::max(most, call.ranges[i]);
    }
    args.require(least >= 0 && most <= call.keys, "ranges", "a key outside 0 .. Sk");
    if (args.absent()) {
      args.skip();
    } else {
      call.bias = args.input<float>("bias", "P H Sk");
      const int64_t bias_rows = args.size("P");
      args.require(bias_rows == 1 || bias_rows == call.batch, "bias", "its first size must be 1 or the batch");
      call.bias_per_row = bias_rows > 1;
      call.bias_keys = call.keys;
    }
    call.prefix = *args.input<int32_t>("prefix", "1");
    args.require(call.prefix >= 0 && call.prefix <= call.keys, "prefix", "outside 0 .. Sk");
    return call;
  }
};

}  // namespace run_llm
