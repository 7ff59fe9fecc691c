// FlashAttention-2 (arXiv 2307.08691), backward, fp32 tensors, with 3xTF32 products on the tensor cores, without
// atomics. The formulas and the two kernels are those of attention_fp32_backward.cu; here a block of 4 warps keeps 64
// rows of two tensors in shared memory, 16 rows a warp, and 16 or 32 rows of the other two pass by. Weights and
// d_scores become left factors in the lanes that computed them. Both kernels begin a step with the product of dout and
// the values: the other tensor's rows, which were fetched last, may still be on their way.
//
// Why these sizes. dk and dv take D registers of a lane's 255, scores and d_scores as many as there are passing rows.
// Shared memory at D 128 is 80 KB and 192 bytes, so that two blocks fit into an A100's 164 KB; registers allow two as
// well, at D 32 four, and three of the queries' kernel at D 64, which has one sum instead of two.
#include "attention_backward.h"
#include "attention_tf32.h"

namespace run_llm {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 32 * 16;

template <int kDim>
struct Tiles {
  static constexpr int kColumns = kDim <= 64 ? 32 : 16;  // of a step; with 32 the widest heads run out of registers
  float own[2][kRows * kDim];         // k and v, or q and dout
  float passing[2][kColumns * kDim];  // the others
  float lse[kColumns], delta[kColumns], bias[kColumns];
};

template <int kDim, int kCount, bool kVectors>
DEVICE void copy(float* to, const float* from, int64_t stride, int block, int rows, int dim) {
  Rows<kDim>::template copy<kCount, kThreads, kVectors>(to, from, stride, block * kCount, rows, dim);
}

/// dk and dv of 64 keys of one key head, from all query heads that read it. Rows of products are keys.
template <int kDim, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(kThreads, kDim == 32 ? 4 : 1)
    differentiate_keys(Attention<float> call, float scale, SeenBlocks blocks, const float* delta) {
  using T = Tiles<kDim>;
  using R = Rows<kDim>;
  constexpr int kColumns = T::kColumns;
  T& shared = *shared_memory<T>();
  float *k = shared.own[0], *v = shared.own[1], *q = shared.passing[0], *dout = shared.passing[1];
  const int thread = static_cast<int>(threadIdx.x), warp_row = thread / 32 * 16;
  const int rows_lane = R::rows_lane(), weights_lane = R::weights_lane();
  const int n = static_cast<int>(blockIdx.x), kv = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int group = call.heads / call.kv_heads;
  auto step = QuerySteps<kRows>::of(blocks.of_row(b), blocks.blocks, n, kv * group, (kv + 1) * group);

  const auto fetch_dout = [&] {
    copy<kDim, kColumns, kVectors>(dout, call.dout + call.q_start(b, step.head), call.q_stride(), step.block,
                                   call.queries, call.dim);
    if (thread < kColumns) {
      const int query = step.block * kColumns + thread;
      const bool valid = query < call.queries;
      const int64_t at = call.lse_start(b, step.head) + (valid ? query : 0);
      if (valid)
        copy_async_4(&shared.lse[thread], call.given_lse + at, true);
      else
        shared.lse[thread] = INFINITY;  // no weight, however large a key's bias is
      copy_async_4(&shared.delta[thread], delta + at, valid);
    }
    copy_async_commit();
  };
  const auto fetch_queries = [&] {
    copy<kDim, kColumns, kVectors>(q, call.q + call.q_start(b, step.head), call.q_stride(), step.block, call.queries,
                                   call.dim);
    copy_async_commit();
  };

  copy<kDim, kRows, kVectors>(k, call.k + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
  copy<kDim, kRows, kVectors>(v, call.v + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
  copy_async_commit();  // of their own: there may be no query to fetch
  if (!step.done()) fetch_dout();
  if (!step.done()) fetch_queries();
  typename R::template Sums<1> dk, dv;
  R::clear_sums(dk);
  R::clear_sums(dv);
  while (!step.done()) {
    Products<1, kColumns / 8> scores, d_scores;  // row r + 8 (i / 2), column 8 j + 2 t + i % 2
    copy_async_wait<1>();  // all but the queries
    __syncthreads();
    R::multiply(d_scores, v + warp_row * kDim, dout, rows_lane);
    copy_async_wait<0>();
    __syncthreads();
    R::multiply(scores, k + warp_row * kDim, q, rows_lane);

    const float* bias = call.bias_of(b, step.head);
    const Seen& seen = step.seen[step.block];
    const bool whole = seen.whole<kRows>(n);
    const int lane = fresh(thread) % 32, row = warp_row + lane / 4, t = lane % 4;  // the loop has no registers to spare
    float added[2] = {0, 0};
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = n * kRows + row + 8 * half;
      if (bias && key < call.keys) added[half] = bias_term(bias[key]);
    }
    UNROLL
    for (int j = 0; j < kColumns / 8; ++j)
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + 2 * t + e, query = step.block * kColumns + column;
        const int2 range = !whole && query < call.queries ? call.range(b, query) : make_int2(0, 0);
        const float lse_log2 = shared.lse[column] * kLog2E;
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int key = n * kRows + row + 8 * half, i = 2 * half + e;
          const bool sees = whole || key < seen.prefix || (range.x <= key && key < range.y);
          const float score = sees ? scores[0][j][i] + added[half] : kHidden;
          scores[0][j][i] = weight_of(score, scale * kLog2E, lse_log2);
        }
      }
    R::add_weighted(dv, scores, dout, weights_lane);
    UNROLL
    for (int j = 0; j < kColumns / 8; ++j)
      UNROLL
      for (int i = 0; i < 4; ++i)
        d_scores[0][j][i] = scores[0][j][i] * (d_scores[0][j][i] - shared.delta[8 * j + 2 * t + i % 2]);
    __syncthreads();  // nobody reads lse, delta and dout any more
    step = step.next();
    if (!step.done()) fetch_dout();
    R::add_weighted(dk, d_scores, q, weights_lane);
    __syncthreads();  // nor the queries
    if (!step.done()) fetch_queries();
  }
  copy_async_wait<0>();
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int key = n * kRows + warp_row + thread % 32 / 4 + 8 * half;
    if (key >= call.keys) continue;
    const int64_t at = call.k_start(b, kv) + key * call.k_stride();
    store_row_tf32<kVectors>(call.dk + at, dk[0], half, scale, call.dim);
    store_row_tf32<kVectors>(call.dv + at, dv[0], half, 1, call.dim);
  }
}

/// dq of 64 queries of one head. Rows of products are queries.
template <int kDim, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(kThreads, kDim == 32 ? 4 : 1)
    differentiate_queries(Attention<float> call, float scale, const float* delta) {
  using T = Tiles<kDim>;
  using R = Rows<kDim>;
  constexpr int kColumns = T::kColumns;
  T& shared = *shared_memory<T>();
  float *q = shared.own[0], *dout = shared.own[1], *k = shared.passing[0], *v = shared.passing[1];
  const int thread = static_cast<int>(threadIdx.x), r = thread % 32 / 4, t = thread % 4, warp_row = thread / 32 * 16;
  const int row = warp_row + r, rows_lane = R::rows_lane(), weights_lane = R::weights_lane();
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);  // the longest causal rows first
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), kv = call.kv_head(head);
  const float* bias = call.bias_of(b, head);
  const Seen seen = Seen::of(call, b, block * kRows, kRows);

  const auto fetch_values = [&](int n) {
    copy<kDim, kColumns, kVectors>(v, call.v + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
    copy_async_commit();
  };
  const auto fetch_keys = [&](int n) {
    copy<kDim, kColumns, kVectors>(k, call.k + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
    if (bias && thread < kColumns) {
      const int key = n * kColumns + thread;
      copy_async_4(&shared.bias[thread], bias + (key < call.keys ? key : 0), key < call.keys);
    }
    copy_async_commit();
  };

  const int end = seen.end<kColumns>();
  int n = seen.begin<kColumns>();
  copy<kDim, kRows, kVectors>(q, call.q + call.q_start(b, head), call.q_stride(), block, call.queries, call.dim);
  copy<kDim, kRows, kVectors>(dout, call.dout + call.q_start(b, head), call.q_stride(), block, call.queries, call.dim);
  copy_async_commit();  // of their own: there may be no value to fetch
  if (n < end) fetch_values(n);
  if (n < end) fetch_keys(n);

  int2 ranges[2];
  float lse_log2[2], row_delta[2];
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int query = block * kRows + row + 8 * half;
    const bool valid = query < call.queries;
    ranges[half] = valid ? call.range(b, query) : make_int2(0, 0);
    lse_log2[half] = valid ? call.given_lse[call.lse_start(b, head) + query] * kLog2E : 0.f;
    row_delta[half] = valid ? delta[call.lse_start(b, head) + query] : 0.f;
  }
  typename R::template Sums<1> dq;
  R::clear_sums(dq);
  while (n < end) {
    const int next = seen.next<kColumns>(n);
    Products<1, kColumns / 8> scores, d_scores;
    copy_async_wait<1>();  // all but the keys
    __syncthreads();
    R::multiply(d_scores, dout + warp_row * kDim, v, rows_lane);
    copy_async_wait<0>();
    __syncthreads();  // nobody reads these values any more
    if (next < end) fetch_values(next);
    R::multiply(scores, q + warp_row * kDim, k, rows_lane);

    const bool whole = seen.whole<kColumns>(n);
    UNROLL
    for (int j = 0; j < kColumns / 8; ++j)
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * j + 2 * t + i % 2, key = n * kColumns + column, half = i / 2;
        const float added = bias ? bias_term(shared.bias[column]) : 0.f;
        const bool sees = whole || key < seen.prefix || (ranges[half].x <= key && key < ranges[half].y);
        const float weight = weight_of(sees ? scores[0][j][i] + added : kHidden, scale * kLog2E, lse_log2[half]);
        d_scores[0][j][i] = weight * (d_scores[0][j][i] - row_delta[half]);
      }
    R::add_weighted(dq, d_scores, k, weights_lane);
    __syncthreads();  // nor these keys
    if (next < end) fetch_keys(next);
    n = next;
  }
  copy_async_wait<0>();
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int query = block * kRows + row + 8 * half;
    if (query < call.queries)
      store_row_tf32<kVectors>(call.dq + call.q_start(b, head) + query * call.q_stride(), dq[0], half, scale, call.dim);
  }
}

template <int kDim>
void differentiate(const Attention<float>& call, cudaStream_t stream) {
  const bool vectors = call.rows_at_16_bytes();
  const BackwardScratch<Tiles<kDim>::kColumns, float> scratch(call, stream);
  launch(vectors ? differentiate_keys<kDim, true> : differentiate_keys<kDim, false>,
         dim3((call.keys + kRows - 1) / kRows, call.kv_heads, call.batch), kThreads, sizeof(Tiles<kDim>), stream, call,
         call.scale(), scratch.seen(), scratch.delta());
  launch(vectors ? differentiate_queries<kDim, true> : differentiate_queries<kDim, false>,
         dim3((call.queries + kRows - 1) / kRows, call.heads, call.batch), kThreads, sizeof(Tiles<kDim>), stream, call,
         call.scale(), scratch.delta());
}

}  // namespace

void attention_tf32_backward(const Attention<float>& call, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { differentiate<width()>(call, stream); });
}

}  // namespace run_llm
