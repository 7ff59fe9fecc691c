// FlashAttention-2, backward, in bf16 and fp16 on the tensor cores: what is done before the two big kernels.
//
// With p = softmax, dp = dout v^T and delta = sum(out * dout): ds = p (dp - delta), dv = p^T dout, dk = ds^T q,
// dq = ds k. One kernel computes dk and dv, a block for some keys, which walks over the queries; another dq, a block
// for some queries, which walks over the keys. Scores and dp are thus computed twice, seven products instead of five;
// in return every sum is formed by one warp in one order, so that results are the same bit for bit, and dq, which else
// is summed up in fp32 in global memory by atomics, is written once.
#include "attention_mma_backward.h"

#include "attention_mma_padding.h"

namespace run_llm {
namespace {

constexpr int kThreads = 256, kRowLanes = 8;

/// Two products of numbers in pairs, summed.
template <class T>
DEVICE float product(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair)}); };
  const auto high = [](uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair >> 16)}); };
  return low(a) * low(b) + high(a) * high(b);
}

/// lse and delta of `prepared`: 8 lanes for each head of a query.
template <class T>
KERNEL_FUNCTION __launch_bounds__(kThreads) prepare_rows(Attention<T> call, float* lse, float* delta, int queries) {
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kRowLanes;  // of [B, queries, H]
  const int head = static_cast<int>(row % call.heads), query = static_cast<int>(row / call.heads % queries);
  const int b = static_cast<int>(row / call.heads / queries);
  const bool valid = b < call.batch && query < call.queries;
  float sum = 0;
  if (valid) {
    const int64_t at = call.q_start(b, head) + query * call.q_stride();
    for (int column = 8 * lane; column < call.dim; column += 8 * kRowLanes) {
      const uint4 out = *reinterpret_cast<const uint4*>(call.given_out + at + column);
      const uint4 dout = *reinterpret_cast<const uint4*>(call.dout + at + column);
      sum += product<T>(out.x, dout.x) + product<T>(out.y, dout.y);
      sum += product<T>(out.z, dout.z) + product<T>(out.w, dout.w);
    }
  }
  UNROLL
  for (int other = 1; other < kRowLanes; other *= 2) sum += shuffle_xor(sum, other);
  if (lane != 0 || b >= call.batch) return;
  const int64_t to = (static_cast<int64_t>(b) * call.heads + head) * queries + query;
  lse[to] = valid ? call.given_lse[call.lse_start(b, head) + query] * kLog2E : INFINITY;
  delta[to] = sum;
}

/// ranges and seen of `prepared`: a warp for each block of queries.
template <class T>
KERNEL_FUNCTION __launch_bounds__(32) prepare_ranges(Attention<T> call, int2* ranges, int4* seen) {
  const int block = static_cast<int>(blockIdx.x), b = static_cast<int>(blockIdx.y), first = block * kQueryBlock;
  const int blocks = static_cast<int>(gridDim.x), lane = static_cast<int>(threadIdx.x);
  const Seen here = Seen::of(call, b, first, kQueryBlock);
  const int64_t row = static_cast<int64_t>(b) * blocks;
  if (lane == 0) seen[row + block] = make_int4(here.some.x, here.some.y, here.all.x, here.all.y);
  for (int i = first + lane; i < first + kQueryBlock; i += 32)
    ranges[row * kQueryBlock + i] = i < call.queries ? call.range(b, i) : make_int2(0, 0);
}

template <class T>
void differentiate(const Attention<T>& call, float scale, cudaStream_t stream) {
  const int queries = whole_blocks(call.queries), blocks = queries / kQueryBlock;
  const int range_rows = call.ranges_row ? call.batch : 1;
  const size_t rows = static_cast<size_t>(call.batch) * call.heads * queries;
  const Scratch<float> lse(rows, stream), delta(rows, stream);
  const Scratch<int2> ranges(static_cast<size_t>(range_rows) * queries, stream);
  const Scratch<int4> seen(static_cast<size_t>(range_rows) * blocks, stream);
  const auto row_blocks = static_cast<unsigned>((rows * kRowLanes + kThreads - 1) / kThreads);
  launch(prepare_rows<T>, dim3(row_blocks), kThreads, 0, stream, call, lse.get(), delta.get(), queries);
  launch(prepare_ranges<T>, dim3(blocks, range_rows), 32, 0, stream, call, ranges.get(), seen.get());
  const Prepared prepared{queries, lse.get(), delta.get(), ranges.get(), seen.get()};
  attention_mma_dk_dv(call, prepared, scale, stream);
  attention_mma_dq(call, prepared, scale, stream);
}

}  // namespace

template <class T>
void attention_mma_backward(const Attention<T>& call, cudaStream_t stream) {
  const float scale = call.scale();
  if (call.rows_at_16_bytes()) return differentiate(call, scale, stream);
  const int64_t queries = static_cast<int64_t>(call.batch) * call.queries * call.heads;
  const int64_t keys = static_cast<int64_t>(call.batch) * call.keys * call.kv_heads;
  const WideRows<T> q(call.q, queries, call.dim, stream), k(call.k, keys, call.dim, stream),
      v(call.v, keys, call.dim, stream), out(call.given_out, queries, call.dim, stream),
      dout(call.dout, queries, call.dim, stream), dq(queries, call.dim, stream), dk(keys, call.dim, stream),
      dv(keys, call.dim, stream);
  Attention<T> wide = call;
  wide.dim = whole_chunks(call.dim);
  wide.q = q.get(), wide.k = k.get(), wide.v = v.get(), wide.given_out = out.get(), wide.dout = dout.get();
  wide.dq = dq.get(), wide.dk = dk.get(), wide.dv = dv.get();
  differentiate(wide, scale, stream);
  dq.copy_to(call.dq), dk.copy_to(call.dk), dv.copy_to(call.dv);
}

template void attention_mma_backward(const Attention<bf16>&, cudaStream_t);
template void attention_mma_backward(const Attention<fp16>&, cudaStream_t);

}  // namespace run_llm
