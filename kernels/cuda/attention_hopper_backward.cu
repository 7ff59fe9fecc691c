// FlashAttention's backward for Hopper (sm_90a): bf16 and fp16, D 64 and 128.
//
//   attention_hopper_backward(q, k, v, ranges, bias, prefix, out, lse, dout) -> dq, dk, dv     as attention_backward
//
// As with the forward, attention_backward does not call it before a GPU has run it.
//
// With P the weights and dP = dout v^T: dS = P (dP - delta), delta the row's sum of out * dout; dv = P^T dout, dk =
// dS^T q / sqrt(D), dq = dS k / sqrt(D). Three kernels, no atomics, so the same bits every time: the first prepares
// delta and what is read by tiles of queries; one takes blocks of keys and sums over queries (.._keys.cu); one takes
// blocks of queries and sums over keys (.._queries.cu). The scores are computed in both, seven products in place of
// five, which saves dq's sums across blocks of keys: fp32 numbers [S x D] through memory for every block of keys, and
// an order among the blocks to keep the sums deterministic.
#include "attention_hopper_backward.h"

namespace run_llm {
namespace {

/// A block prepares a tile of 64 queries of a head; those of the first head the ranges too.
template <class T>
KERNEL_FUNCTION __launch_bounds__(128) prepare(Attention<T> call, Prepared to) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int64_t start = call.q_start(b, head);
  float2* rows = to.rows + (static_cast<int64_t>(b) * call.heads + head) * to.padded;
  for (int i = warp; i < kTileRows; i += 4) {
    const int query = tile * kTileRows + i;
    float delta = 0;
    if (query < call.queries)
      for (int d = 2 * lane; d < call.dim; d += 64) {
        const T* out = call.given_out + start + query * call.q_stride() + d;
        const T* dout = call.dout + start + query * call.q_stride() + d;
        delta += to_float(out[0]) * to_float(dout[0]) + to_float(out[1]) * to_float(dout[1]);
      }
    for (int other = 16; other > 0; other /= 2) delta += shuffle_xor(delta, other);
    if (lane == 0)
      rows[query] = query < call.queries
                        ? make_float2(call.given_lse[call.lse_start(b, head) + query] * kLog2E, delta)
                        : make_float2(INFINITY, 0);
  }
  if (head > 0 || warp > 0 || (to.ranges_shared && b > 0)) return;
  const Seen seen = Seen::of(call, b, tile * kTileRows, kTileRows);
  for (int i = lane; i < kTileRows; i += 32) {
    const int query = tile * kTileRows + i;
    to.ranges[static_cast<int64_t>(b) * to.padded + query] =
        query < call.queries ? call.range(b, query) : make_int2(0, 0);
  }
  if (lane == 0)
    to.tiles[static_cast<int64_t>(b) * to.tiles_count + tile] =
        make_int4(seen.some.x, seen.some.y, seen.all.x, seen.all.y);
}

template <class T>
void backward(Args& args) {
  const auto call = Attention<T>::backward(args);
  auto* stream = static_cast<cudaStream_t>(args.stream());
  require_hopper_shapes(args, call);
  require_boxes(args, call.dout, "dout");
  require_writable(args, call.dq, "dq");
  require_writable(args, call.dk, "dk");
  require_writable(args, call.dv, "dv");
  Prepared prepared{};
  prepared.tiles_count = (call.queries + kTileRows - 1) / kTileRows;
  prepared.padded = prepared.tiles_count * kTileRows;
  prepared.ranges_shared = call.ranges_row == 0;
  const size_t range_rows = prepared.ranges_shared ? 1 : call.batch;
  const Scratch<float2> rows(static_cast<size_t>(call.batch) * call.heads * prepared.padded, stream);
  const Scratch<int2> ranges(range_rows * prepared.padded, stream);
  const Scratch<int4> tiles(range_rows * prepared.tiles_count, stream);
  prepared.rows = rows.get();
  prepared.ranges = ranges.get();
  prepared.tiles = tiles.get();
  launch(prepare<T>, dim3(prepared.tiles_count, call.heads, call.batch), 128, 0, stream, call, prepared);
  hopper_backward_keys(call, prepared, stream);
  hopper_backward_queries(call, prepared, stream);
}

}  // namespace
}  // namespace run_llm

using namespace run_llm;

KERNEL(attention_hopper_backward) {
  if (args.next_is("bfloat16")) return backward<bf16>(args);
  if (args.next_is("float16")) return backward<fp16>(args);
  args.require(false, "q", kHopperDtypes);
}
