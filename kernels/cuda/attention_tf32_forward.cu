// FlashAttention-2 (arXiv 2307.08691), forward, fp32 tensors, with 3xTF32 products on the tensor cores.
//
// A block of 4 warps takes 64 queries of one head, 16 a warp, and walks over the blocks of 64 or 32 keys that they see.
// A warp computes its queries' scores, weights and outputs alone: the scores of a query lie in 4 lanes, and become left
// factors of the product with the values where they are. The next keys come while weights meet the values, the next
// values while scores are computed.
#include "attention_tf32.h"

namespace run_llm {
namespace {

template <int kDim>
struct Tiles {
  static constexpr int kThreads = 128, kRows = kThreads / 32 * 16, kKeys = kDim <= 64 ? 64 : 32;
  // 8 lanes that read 16 bytes each use all banks: of two rows, 64 bytes each; of four rows two apart, 32 bytes each.
  static constexpr int kStride = kDim + 16, kValueStride = kDim + 4;
  float q[kRows][kStride], k[kKeys][kStride], v[kKeys][kValueStride], bias[kKeys];
  int2 ranges[kRows];
};

template <int kDim, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(128, 1) attend(Attention<float> call, float scale) {
  using T = Tiles<kDim>;
  constexpr int kTiles = T::kKeys / 8, kChunks = kDim / 32;
  T& shared = *shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x), r = thread % 32 / 4, t = thread % 4, row = thread / 32 * 16 + r;
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * T::kRows;  // the longest causal rows first
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), kv = call.kv_head(head);
  const float* k = call.k + call.k_start(b, kv);
  const float* v = call.v + call.k_start(b, kv);
  const float* bias = call.bias_of(b, head);
  const Seen seen = Seen::of(call, b, first, T::kRows);

  const auto fetch_keys = [&](int n) {
    copy_rows<kDim, T::kKeys, T::kStride, T::kThreads, kVectors>(shared.k[0], k, call.k_stride(), n * T::kKeys,
                                                                 call.keys, call.dim);
    if (bias && thread < T::kKeys) {
      const int key = n * T::kKeys + thread;
      copy_async_4(&shared.bias[thread], bias + (key < call.keys ? key : 0), key < call.keys);
    }
    copy_async_commit();
  };
  const auto fetch_values = [&](int n) {
    copy_rows<kDim, T::kKeys, T::kValueStride, T::kThreads, kVectors>(shared.v[0], v, call.k_stride(), n * T::kKeys,
                                                                      call.keys, call.dim);
    copy_async_commit();
  };

  const int end = seen.end<T::kKeys>();
  int n = seen.begin<T::kKeys>();
  copy_rows<kDim, T::kRows, T::kStride, T::kThreads, kVectors>(shared.q[0], call.q + call.q_start(b, head),
                                                               call.q_stride(), first, call.queries, call.dim);
  copy_async_commit();  // of their own: there may be no key to fetch
  if (n < end) fetch_keys(n);
  if (n < end) fetch_values(n);
  if (thread < T::kRows)
    shared.ranges[thread] = first + thread < call.queries ? call.range(b, first + thread) : make_int2(0, 0);

  float largest[2] = {kHidden, kHidden}, sum[2] = {0, 0}, out[kChunks][4][4];  // of rows r and r + 8
  clear_sums(out);

  while (n < end) {
    const int next = seen.next<T::kKeys>(n);
    copy_async_wait<1>();  // all but the values
    __syncthreads();
    float scores[kTiles][4];
    multiply_rows_tf32<kTiles, kDim>(scores, &shared.q[row][4 * t], T::kStride, &shared.k[r][4 * t], T::kStride);
    if (bias) {
      UNROLL
      for (int j = 0; j < kTiles; ++j)
        UNROLL
        for (int e = 0; e < 4; ++e) scores[j][e] += bias_term(shared.bias[8 * j + 2 * t + e % 2]);
    }
    __syncthreads();  // nobody reads these keys any more
    if (next < end) fetch_keys(next);

    UNROLL
    for (int half = 0; half < 2; ++half) {
      if (!seen.whole<T::kKeys>(n)) {
        const int2 range = shared.ranges[row + 8 * half];
        UNROLL
        for (int j = 0; j < kTiles; ++j)
          UNROLL
          for (int e = 0; e < 2; ++e) {
            const int key = n * T::kKeys + 8 * j + 2 * t + e;
            if (key >= seen.prefix && (key < range.x || key >= range.y)) scores[j][2 * half + e] = kHidden;
          }
      }
      float row_largest = largest[half];
      UNROLL
      for (int j = 0; j < kTiles; ++j)
        row_largest = fmaxf(row_largest, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      row_largest = fmaxf(row_largest, shuffle_xor(row_largest, 1));
      row_largest = fmaxf(row_largest, shuffle_xor(row_largest, 2));
      const float shift = row_largest == kHidden ? 0.f : row_largest * scale;  // nothing seen yet: weights of 0
      // 1 where the maximum stays: the exponent would not quite be 0, as its terms round apart.
      const float factor = row_largest == largest[half] ? 1.f : exp2_fast(largest[half] * scale - shift);
      largest[half] = row_largest;
      sum[half] *= factor;
      UNROLL
      for (int j = 0; j < kTiles; ++j)
        UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[j][e] = exp2_fast(scores[j][e] * scale - shift);
          sum[half] += scores[j][e];
        }
      UNROLL
      for (int c = 0; c < kChunks; ++c)
        UNROLL
        for (int e = 0; e < 4; ++e) out[c][e][2 * half] *= factor, out[c][e][2 * half + 1] *= factor;
    }
    if (next < end)
      copy_async_wait<1>();  // all but the next keys
    else
      copy_async_wait<0>();
    __syncthreads();
    add_weighted_tf32(out, scores, &shared.v[2 * t][4 * r], T::kValueStride);
    __syncthreads();  // nor these values
    if (next < end) fetch_values(next);
    n = next;
  }
  copy_async_wait<0>();

  UNROLL
  for (int half = 0; half < 2; ++half) {
    sum[half] += shuffle_xor(sum[half], 1);
    sum[half] += shuffle_xor(sum[half], 2);
    const int query = first + row + 8 * half;
    if (query >= call.queries) continue;
    const float inverse = sum[half] == 0 ? 0.f : 1 / sum[half];
    store_row_tf32<kVectors>(call.out + call.q_start(b, head) + query * call.q_stride(), out, half, inverse, call.dim);
    if (t == 0)
      call.lse[call.lse_start(b, head) + query] =
          sum[half] == 0 ? 0.f : largest[half] * (scale * kLn2) + logf(sum[half]);
  }
}

template <int kDim>
void attend_with(const Attention<float>& call, cudaStream_t stream) {
  using T = Tiles<kDim>;
  const dim3 blocks((call.queries + T::kRows - 1) / T::kRows, call.heads, call.batch);
  const auto kernel = call.rows_at_16_bytes() ? attend<kDim, true> : attend<kDim, false>;
  launch(kernel, blocks, T::kThreads, sizeof(T), stream, call, call.scale_log2());
}

}  // namespace

void attention_tf32_forward(const Attention<float>& call, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { attend_with<width()>(call, stream); });
}

}  // namespace run_llm
