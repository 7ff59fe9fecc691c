// FlashAttention-2 (arXiv 2307.08691), forward, fp32 tensors, with 3xTF32 products on the tensor cores.
//
// A block of 4 warps takes 64 or 128 queries of one head, 16 or 32 a warp, and walks over the blocks of 64 or 32 keys
// that they see. A warp computes its queries' scores, weights and outputs alone: the scores of a query lie in 4 lanes,
// and become left factors of the product with the values where they are. The next keys come while weights meet the
// values, the next values while scores are computed.
//
// Why these sizes. A number that a lane reads has to be split before it is multiplied, which takes longer than reading
// it: with 32 queries a warp the keys and values are read and split once for two products of 16 rows. Of the 255
// registers of a lane the outputs then take D, the scores of 32 keys 32, and the same as factors twice as many: D 64
// fits in, wider heads do not and go with 16 queries a warp. Two blocks run beside each other, at D 32 three: registers
// allow no more, shared memory (66 KB at D 128, 49 at D 64) would. If there are fewer blocks of 128 queries than
// multiprocessors, blocks of 64 keep twice as many of them at work.
#include "attention_tf32.h"

namespace run_llm {
namespace {

constexpr int kThreads = 128;

/// kDown: how many times 16 queries a warp has.
template <int kDim, int kDown>
struct Tiles {
  static constexpr int kRows = kThreads / 32 * 16 * kDown, kKeys = kDim > 64 || kDown == 2 ? 32 : 64;
  float q[kRows * kDim], k[kKeys * kDim], v[kKeys * kDim], bias[kKeys];
  int2 ranges[kRows];
};

template <int kDim, int kDown, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(kThreads, 1) attend(Attention<float> call, float scale) {
  using T = Tiles<kDim, kDown>;
  using R = Rows<kDim>;
  constexpr int kTiles = T::kKeys / 8;
  T& shared = *shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x), r = thread % 32 / 4, t = thread % 4;
  const int warp_row = thread / 32 * 16 * kDown, rows_lane = R::rows_lane(), weights_lane = R::weights_lane();
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * T::kRows;  // the longest causal rows first
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), kv = call.kv_head(head);
  const float* k = call.k + call.k_start(b, kv);
  const float* v = call.v + call.k_start(b, kv);
  const float* bias = call.bias_of(b, head);
  const Seen seen = Seen::of(call, b, first, T::kRows);

  const auto fetch_keys = [&](int n) {
    R::template copy<T::kKeys, kThreads, kVectors>(shared.k, k, call.k_stride(), n * T::kKeys, call.keys, call.dim);
    if (bias && thread < T::kKeys) {
      const int key = n * T::kKeys + thread;
      copy_async_4(&shared.bias[thread], bias + (key < call.keys ? key : 0), key < call.keys);
    }
    copy_async_commit();
  };
  const auto fetch_values = [&](int n) {
    R::template copy<T::kKeys, kThreads, kVectors>(shared.v, v, call.k_stride(), n * T::kKeys, call.keys, call.dim);
    copy_async_commit();
  };

  const int end = seen.end<T::kKeys>();
  int n = seen.begin<T::kKeys>();
  R::template copy<T::kRows, kThreads, kVectors>(shared.q, call.q + call.q_start(b, head), call.q_stride(), first,
                                                 call.queries, call.dim);
  copy_async_commit();  // of their own: there may be no key to fetch
  if (n < end) fetch_keys(n);
  if (n < end) fetch_values(n);
  if (thread < T::kRows)
    shared.ranges[thread] = first + thread < call.queries ? call.range(b, first + thread) : make_int2(0, 0);

  float largest[kDown][2], sum[kDown][2];  // of rows r and r + 8 of 16
  UNROLL
  for (int i = 0; i < kDown; ++i)
    UNROLL
    for (int half = 0; half < 2; ++half) largest[i][half] = kHidden, sum[i][half] = 0;
  typename R::template Sums<kDown> out;
  R::clear_sums(out);

  while (n < end) {
    const int next = seen.next<T::kKeys>(n);
    copy_async_wait<1>();  // all but the values
    __syncthreads();
    Products<kDown, kTiles> scores;
    R::multiply(scores, shared.q + warp_row * kDim, shared.k, rows_lane);
    if (bias) {
      UNROLL
      for (int j = 0; j < kTiles; ++j)
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const float added = bias_term(shared.bias[8 * j + 2 * t + e]);
          UNROLL
          for (int i = 0; i < kDown; ++i) scores[i][j][e] += added, scores[i][j][2 + e] += added;
        }
    }
    __syncthreads();  // nobody reads these keys any more
    if (next < end) fetch_keys(next);

    UNROLL
    for (int i = 0; i < kDown; ++i)
      UNROLL
      for (int half = 0; half < 2; ++half) {
        if (!seen.whole<T::kKeys>(n)) {
          const int2 range = shared.ranges[warp_row + 16 * i + 8 * half + r];
          UNROLL
          for (int j = 0; j < kTiles; ++j)
            UNROLL
            for (int e = 0; e < 2; ++e) {
              const int key = n * T::kKeys + 8 * j + 2 * t + e;
              if (key >= seen.prefix && (key < range.x || key >= range.y)) scores[i][j][2 * half + e] = kHidden;
            }
        }
        float row_largest = largest[i][half];
        UNROLL
        for (int j = 0; j < kTiles; ++j)
          row_largest = fmaxf(row_largest, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
        row_largest = fmaxf(row_largest, shuffle_xor(row_largest, 1));
        row_largest = fmaxf(row_largest, shuffle_xor(row_largest, 2));
        const float shift = row_largest == kHidden ? 0.f : row_largest * scale;  // nothing seen yet: weights of 0
        // 1 where the maximum stays: the exponent would not quite be 0, as its terms round apart.
        const float factor = row_largest == largest[i][half] ? 1.f : exp2_fast(largest[i][half] * scale - shift);
        largest[i][half] = row_largest;
        sum[i][half] *= factor;
        UNROLL
        for (int j = 0; j < kTiles; ++j)
          UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[i][j][e] = exp2_fast(scores[i][j][e] * scale - shift);
            sum[i][half] += scores[i][j][e];
          }
        UNROLL
        for (int c = 0; c < kDim / 32; ++c)
          UNROLL
          for (int e = 0; e < 4; ++e) out[i][c][e][2 * half] *= factor, out[i][c][e][2 * half + 1] *= factor;
      }
    if (next < end)
      copy_async_wait<1>();  // all but the next keys
    else
      copy_async_wait<0>();
    __syncthreads();
    R::add_weighted(out, scores, shared.v, weights_lane);
    __syncthreads();  // nor these values
    if (next < end) fetch_values(next);
    n = next;
  }
  copy_async_wait<0>();

  UNROLL
  for (int i = 0; i < kDown; ++i)
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = sum[i][half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const int query = first + warp_row + 16 * i + 8 * half + r;
      if (query >= call.queries) continue;
      const float inverse = total == 0 ? 0.f : 1 / total;
      store_row_tf32<kVectors>(call.out + call.q_start(b, head) + query * call.q_stride(), out[i], half, inverse,
                               call.dim);
      if (t == 0)
        call.lse[call.lse_start(b, head) + query] =
            total == 0 ? 0.f : largest[i][half] * (scale * kLn2) + logf(total);
    }
}

template <int kDim, int kDown>
void attend_with(const Attention<float>& call, cudaStream_t stream) {
  using T = Tiles<kDim, kDown>;
  const dim3 blocks((call.queries + T::kRows - 1) / T::kRows, call.heads, call.batch);
  const auto kernel = call.rows_at_16_bytes() ? attend<kDim, kDown, true> : attend<kDim, kDown, false>;
  launch(kernel, blocks, kThreads, sizeof(T), stream, call, call.scale_log2());
}

/// Blocks of 128 queries where registers allow it and they are enough for the whole GPU, else of 64.
template <int kDim>
void attend_in_blocks(const Attention<float>& call, cudaStream_t stream) {
  if constexpr (kDim <= 64) {
    if (enough_blocks(call.batch, call.heads, call.queries)) return attend_with<kDim, 2>(call, stream);
  }
  attend_with<kDim, 1>(call, stream);
}

}  // namespace

void attention_tf32_forward(const Attention<float>& call, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { attend_in_blocks<width()>(call, stream); });
}

}  // namespace run_llm
