// FlashAttention-2 (arXiv 2307.08691), forward, in exact fp32 on the CUDA cores.
//
// A block of 128 threads takes kRows queries of one head and walks over the blocks of 64 keys that they see. Threads
// form a 16 x 8 grid: thread (y, x) computes the scores of the queries y, y + 16, ... with the keys x, x + 8, ..., and
// of the same queries' outputs the columns 4 x .. 4 x + 3, 32 + 4 x .. , ...: every number read from shared memory is
// used kRows / 16 or 8 times. The 8 threads of a query lie in one warp, so its maximum and sum take three shuffles.
//
// Copies overlap with the arithmetic without a second buffer: the next keys are fetched while the weights meet the
// values, the next values while the next scores are computed.
#include "attention_fp32.h"

namespace run_llm {
namespace {

template <int kDim>
struct Tiles {
  static constexpr int kThreads = 128, kAcross = 8, kDown = 16;
  static constexpr int kRows = kDim <= 64 ? 128 : 64, kKeys = 64;  // queries and keys of a block
  static constexpr int kMyRows = kRows / kDown, kMyKeys = kKeys / kAcross, kMyColumns = kDim / kAcross;
  // Rows are longer than what they hold: by 4 numbers, so that 8 threads that read 4 columns of 8 rows use all banks;
  // by 8 where the 32 threads of 4 rows write 8 columns each.
  static constexpr int kStride = kDim + 4, kWeightStride = kKeys + 8;
  float q[kRows][kStride], k[kKeys][kStride], v[kKeys][kDim], weights[kRows][kWeightStride], bias[kKeys];
  int2 ranges[kRows];
};

template <int kDim, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(128, 1) attend(Attention<float> call, float scale) {
  using T = Tiles<kDim>;
  T& shared = *shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x), x = thread % T::kAcross, y = thread / T::kAcross;
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
    copy_rows<kDim, T::kKeys, kDim, T::kThreads, kVectors>(shared.v[0], v, call.k_stride(), n * T::kKeys, call.keys,
                                                           call.dim);
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
  float largest[T::kMyRows], sum[T::kMyRows], out[T::kMyRows][T::kMyColumns];
  UNROLL
  for (int i = 0; i < T::kMyRows; ++i) {
    largest[i] = kHidden;
    sum[i] = 0;
    UNROLL
    for (int c = 0; c < T::kMyColumns; ++c) out[i][c] = 0;
  }

  while (n < end) {
    const int next = seen.next<T::kKeys>(n);
    copy_async_wait<1>();  // all but the values
    __syncthreads();
    float scores[T::kMyRows][T::kMyKeys];
    multiply_rows<T::kMyRows, T::kMyKeys, T::kDown, T::kAcross, kDim>(scores, shared.q[y], T::kStride, shared.k[x],
                                                                      T::kStride);
    if (bias) {
      UNROLL
      for (int j = 0; j < T::kMyKeys; ++j) {
        const float added = bias_term(shared.bias[x + j * T::kAcross]);
        UNROLL
        for (int i = 0; i < T::kMyRows; ++i) scores[i][j] += added;
      }
    }
    __syncthreads();  // nobody reads these keys any more
    if (next < end) fetch_keys(next);

    if (!seen.whole<T::kKeys>(n)) {
      UNROLL
      for (int i = 0; i < T::kMyRows; ++i) {
        const int2 range = shared.ranges[y + i * T::kDown];
        UNROLL
        for (int j = 0; j < T::kMyKeys; ++j) {
          const int key = n * T::kKeys + x + j * T::kAcross;
          if (key >= seen.prefix && (key < range.x || key >= range.y)) scores[i][j] = kHidden;
        }
      }
    }
    UNROLL
    for (int i = 0; i < T::kMyRows; ++i) {
      float row_largest = largest[i];
      UNROLL
      for (int j = 0; j < T::kMyKeys; ++j) row_largest = fmaxf(row_largest, scores[i][j]);
      UNROLL
      for (int other = 1; other < T::kAcross; other *= 2)
        row_largest = fmaxf(row_largest, shuffle_xor(row_largest, other));
      const float shift = row_largest == kHidden ? 0.f : row_largest * scale;  // nothing seen yet: weights of 0
      // 1 where the maximum stays: the exponent would not quite be 0, as its terms round apart.
      const float factor = row_largest == largest[i] ? 1.f : exp2_fast(largest[i] * scale - shift);
      largest[i] = row_largest;
      float row_sum = 0;
      UNROLL
      for (int j = 0; j < T::kMyKeys; ++j) {
        const float weight = exp2_fast(scores[i][j] * scale - shift);
        row_sum += weight;
        shared.weights[y + i * T::kDown][x + j * T::kAcross] = weight;
      }
      sum[i] = sum[i] * factor + row_sum;
      UNROLL
      for (int c = 0; c < T::kMyColumns; ++c) out[i][c] *= factor;
    }
    if (next < end)
      copy_async_wait<1>();  // all but the next keys
    else
      copy_async_wait<0>();
    __syncthreads();
    add_products<T::kMyRows, T::kMyColumns, T::kDown, T::kKeys>(out, shared.weights[y], T::kWeightStride,
                                                                &shared.v[0][4 * x], kDim, 4 * T::kAcross);
    __syncthreads();  // nor these values
    if (next < end) fetch_values(next);
    n = next;
  }
  copy_async_wait<0>();

  UNROLL
  for (int i = 0; i < T::kMyRows; ++i) {
    UNROLL
    for (int other = 1; other < T::kAcross; other *= 2) sum[i] += shuffle_xor(sum[i], other);
    const int query = first + y + i * T::kDown;
    if (query >= call.queries) continue;
    const float inverse = sum[i] == 0 ? 0.f : 1 / sum[i];
    UNROLL
    for (int c = 0; c < T::kMyColumns; ++c) out[i][c] *= inverse;
    store_row<T::kMyColumns, kVectors>(call.out + call.q_start(b, head) + query * call.q_stride(), out[i], 4 * x,
                                       4 * T::kAcross, call.dim);
    if (x == 0)
      call.lse[call.lse_start(b, head) + query] = sum[i] == 0 ? 0.f : largest[i] * (scale * kLn2) + logf(sum[i]);
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

void attention_fp32_forward(const Attention<float>& call, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { attend_with<width()>(call, stream); });
}

}  // namespace run_llm
