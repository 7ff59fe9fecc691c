// FlashAttention-2 (arXiv 2307.08691), backward, in exact fp32 on the CUDA cores, without atomics: the same numbers
// every time. One kernel has blocks of keys outside and makes dk and dv, one has blocks of queries outside and makes
// dq; both compute the weights again from lse. With s the scores times 1 / sqrt(D), per query i and key j,
//
//   weight_ij = e^(s_ij - lse_i)      d_score_ij = weight_ij (dout_i v_j - delta_i)      delta_i = dout_i out_i
//   dv_j = sum_i weight_ij dout_i     dk_j = sum_i d_score_ij q_i / sqrt(D)     dq_i = sum_j d_score_ij k_j / sqrt(D)
//
// Tiles and threads are those of the forward: thread (y, x) computes the rows y, y + kDown, ... and the columns x,
// x + 8, ... of a product of two tiles. Of q, k, v and dout, two stay in shared memory while the other two pass by,
// each fetched while a product that does not need it is computed.
#include "attention_backward.h"
#include "attention_fp32.h"

namespace run_llm {
namespace {

constexpr int kBlock = 64;  // queries or keys of a tile

template <int kDim>
struct Tiles {
  static constexpr int kThreads = kDim <= 64 ? 128 : 256, kAcross = 8, kDown = kThreads / kAcross;
  static constexpr int kMyRows = kBlock / kDown, kMyColumns = kBlock / kAcross, kMyDims = kDim / kAcross;
  static constexpr int kStride = kDim + 4, kWeightStride = kBlock + 8;  // as in the forward
  float q[kBlock][kStride], k[kBlock][kStride], v[kBlock][kStride], dout[kBlock][kStride];
  float weights[kBlock][kWeightStride];  // [row][column]; then d_scores
  float lse[kBlock], delta[kBlock], bias[kBlock];

  using Products = float[kMyRows][kMyColumns];
  using Sums = float[kMyRows][kMyDims];

  template <bool kVectors>
  static DEVICE void copy(float (&to)[kBlock][kStride], const float* from, int64_t stride, int block, int rows,
                          int dim) {
    copy_rows<kDim, kBlock, kStride, kThreads, kVectors>(to[0], from, stride, block * kBlock, rows, dim);
  }
  static DEVICE void multiply(Products& to, const float (&left)[kBlock][kStride], const float (&right)[kBlock][kStride],
                              int x, int y) {
    multiply_rows<kMyRows, kMyColumns, kDown, kAcross, kDim>(to, left[y], kStride, right[x], kStride);
  }
  /// Rows of weights times `right`.
  DEVICE void add_weighted(Sums& to, const float (&right)[kBlock][kStride], int x, int y) const {
    add_products<kMyRows, kMyDims, kDown, kBlock>(to, weights[y], kWeightStride, &right[0][4 * x], kStride,
                                                  4 * kAcross);
  }
  DEVICE void put_weights(const Products& from, int x, int y) {
    UNROLL
    for (int i = 0; i < kMyRows; ++i)
      UNROLL
      for (int j = 0; j < kMyColumns; ++j) weights[y + i * kDown][x + j * kAcross] = from[i][j];
  }
  /// Sums times `scale` into the rows of a block of a head.
  template <bool kVectors>
  static DEVICE void store(float* to, Sums& sums, float scale, int64_t stride, int block, int rows, int dim, int x,
                           int y) {
    UNROLL
    for (int i = 0; i < kMyRows; ++i) {
      const int row = block * kBlock + y + i * kDown;
      if (row >= rows) continue;
      UNROLL
      for (int d = 0; d < kMyDims; ++d) sums[i][d] *= scale;
      store_row<kMyDims, kVectors>(to + row * stride, sums[i], 4 * x, 4 * kAcross, dim);
    }
  }
};

/// dk and dv of a block of keys of one key head, from all query heads that read it. Rows of products are keys.
template <int kDim, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(Tiles<kDim>::kThreads, 1)
    differentiate_keys(Attention<float> call, float scale, SeenBlocks blocks, const float* delta) {
  using T = Tiles<kDim>;
  T& shared = *shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x), x = thread % T::kAcross, y = thread / T::kAcross;
  const int n = static_cast<int>(blockIdx.x), kv = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int group = call.heads / call.kv_heads;
  auto step = QuerySteps<kBlock>::of(blocks.of_row(b), blocks.blocks, n, kv * group, (kv + 1) * group);

  const auto fetch_dout = [&] {
    T::template copy<kVectors>(shared.dout, call.dout + call.q_start(b, step.head), call.q_stride(), step.block,
                               call.queries, call.dim);
    if (thread < kBlock) {
      const int query = step.block * kBlock + thread;
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
    T::template copy<kVectors>(shared.q, call.q + call.q_start(b, step.head), call.q_stride(), step.block, call.queries,
                               call.dim);
    copy_async_commit();
  };

  T::template copy<kVectors>(shared.k, call.k + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
  T::template copy<kVectors>(shared.v, call.v + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
  copy_async_commit();  // of their own: there may be no query to fetch
  if (!step.done()) fetch_dout();
  if (!step.done()) fetch_queries();
  typename T::Sums dk, dv;
  clear(dk);
  clear(dv);
  while (!step.done()) {
    typename T::Products scores, d_scores;
    copy_async_wait<1>();  // all but the queries
    __syncthreads();
    T::multiply(d_scores, shared.v, shared.dout, x, y);
    copy_async_wait<0>();
    __syncthreads();
    T::multiply(scores, shared.k, shared.q, x, y);

    if (const float* bias = call.bias_of(b, step.head)) {
      UNROLL
      for (int i = 0; i < T::kMyRows; ++i) {
        const int key = n * kBlock + y + i * T::kDown;
        const float added = key < call.keys ? bias_term(bias[key]) : 0.f;
        UNROLL
        for (int j = 0; j < T::kMyColumns; ++j) scores[i][j] += added;
      }
    }
    const Seen& seen = step.seen[step.block];
    if (!seen.whole<kBlock>(n)) {
      UNROLL
      for (int j = 0; j < T::kMyColumns; ++j) {
        const int query = step.block * kBlock + x + j * T::kAcross;
        const int2 range = query < call.queries ? call.range(b, query) : make_int2(0, 0);
        UNROLL
        for (int i = 0; i < T::kMyRows; ++i) {
          const int key = n * kBlock + y + i * T::kDown;
          if (key >= seen.prefix && (key < range.x || key >= range.y)) scores[i][j] = kHidden;
        }
      }
    }
    UNROLL
    for (int j = 0; j < T::kMyColumns; ++j) {
      const float lse_log2 = shared.lse[x + j * T::kAcross] * kLog2E, row_delta = shared.delta[x + j * T::kAcross];
      UNROLL
      for (int i = 0; i < T::kMyRows; ++i) {
        scores[i][j] = weight_of(scores[i][j], scale * kLog2E, lse_log2);
        d_scores[i][j] = scores[i][j] * (d_scores[i][j] - row_delta);
      }
    }
    shared.put_weights(scores, x, y);
    __syncthreads();
    shared.add_weighted(dv, shared.dout, x, y);
    __syncthreads();  // nobody reads weights, lse, delta and dout any more
    shared.put_weights(d_scores, x, y);
    step = step.next();
    if (!step.done()) fetch_dout();
    __syncthreads();
    shared.add_weighted(dk, shared.q, x, y);
    __syncthreads();  // nor d_scores and queries
    if (!step.done()) fetch_queries();
  }
  copy_async_wait<0>();
  T::template store<kVectors>(call.dk + call.k_start(b, kv), dk, scale, call.k_stride(), n, call.keys, call.dim, x, y);
  T::template store<kVectors>(call.dv + call.k_start(b, kv), dv, 1, call.k_stride(), n, call.keys, call.dim, x, y);
}

/// dq of a block of queries of one head. Rows of products are queries.
template <int kDim, bool kVectors>
KERNEL_FUNCTION __launch_bounds__(Tiles<kDim>::kThreads, 1)
    differentiate_queries(Attention<float> call, float scale, SeenBlocks blocks, const float* delta) {
  using T = Tiles<kDim>;
  T& shared = *shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x), x = thread % T::kAcross, y = thread / T::kAcross;
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);  // the longest causal rows first
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), kv = call.kv_head(head);
  const float* bias = call.bias_of(b, head);
  const Seen seen = blocks.of_row(b)[block];

  const auto fetch_values = [&](int n) {
    T::template copy<kVectors>(shared.v, call.v + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
    copy_async_commit();
  };
  const auto fetch_keys = [&](int n) {
    T::template copy<kVectors>(shared.k, call.k + call.k_start(b, kv), call.k_stride(), n, call.keys, call.dim);
    if (bias && thread < kBlock) {
      const bool valid = n * kBlock + thread < call.keys;
      copy_async_4(&shared.bias[thread], bias + (valid ? n * kBlock + thread : 0), valid);
    }
    copy_async_commit();
  };

  const int end = seen.end<kBlock>();
  int n = seen.begin<kBlock>();
  T::template copy<kVectors>(shared.dout, call.dout + call.q_start(b, head), call.q_stride(), block, call.queries,
                             call.dim);
  T::template copy<kVectors>(shared.q, call.q + call.q_start(b, head), call.q_stride(), block, call.queries, call.dim);
  copy_async_commit();  // of their own: there may be no value to fetch
  if (n < end) fetch_values(n);
  if (n < end) fetch_keys(n);

  int2 ranges[T::kMyRows];
  float lse_log2[T::kMyRows], row_delta[T::kMyRows];
  UNROLL
  for (int i = 0; i < T::kMyRows; ++i) {
    const int query = block * kBlock + y + i * T::kDown;
    const bool valid = query < call.queries;
    ranges[i] = valid ? call.range(b, query) : make_int2(0, 0);
    lse_log2[i] = valid ? call.given_lse[call.lse_start(b, head) + query] * kLog2E : 0.f;
    row_delta[i] = valid ? delta[call.lse_start(b, head) + query] : 0.f;
  }
  typename T::Sums dq;
  clear(dq);
  while (n < end) {
    const int next = seen.next<kBlock>(n);
    typename T::Products scores, d_scores;
    copy_async_wait<1>();  // all but the keys
    __syncthreads();
    T::multiply(d_scores, shared.dout, shared.v, x, y);
    copy_async_wait<0>();
    __syncthreads();  // nobody reads these values any more
    if (next < end) fetch_values(next);
    T::multiply(scores, shared.q, shared.k, x, y);

    const bool whole = seen.whole<kBlock>(n);
    UNROLL
    for (int j = 0; j < T::kMyColumns; ++j) {
      const int key = n * kBlock + x + j * T::kAcross;
      const float added = bias ? bias_term(shared.bias[x + j * T::kAcross]) : 0.f;
      UNROLL
      for (int i = 0; i < T::kMyRows; ++i) {
        const bool sees = whole || key < seen.prefix || (ranges[i].x <= key && key < ranges[i].y);
        const float weight = weight_of(sees ? scores[i][j] + added : kHidden, scale * kLog2E, lse_log2[i]);
        d_scores[i][j] = weight * (d_scores[i][j] - row_delta[i]);
      }
    }
    shared.put_weights(d_scores, x, y);
    __syncthreads();
    shared.add_weighted(dq, shared.k, x, y);
    __syncthreads();  // nor these keys and their d_scores
    if (next < end) fetch_keys(next);
    n = next;
  }
  copy_async_wait<0>();
  T::template store<kVectors>(call.dq + call.q_start(b, head), dq, scale, call.q_stride(), block, call.queries,
                              call.dim, x, y);
}

template <int kDim>
void differentiate(const Attention<float>& call, cudaStream_t stream) {
  using T = Tiles<kDim>;
  const bool vectors = call.rows_at_16_bytes();
  const BackwardScratch<kBlock, float> scratch(call, stream);
  launch(vectors ? differentiate_keys<kDim, true> : differentiate_keys<kDim, false>,
         dim3((call.keys + kBlock - 1) / kBlock, call.kv_heads, call.batch), T::kThreads, sizeof(T), stream, call,
         call.scale(), scratch.seen(), scratch.delta());
  launch(vectors ? differentiate_queries<kDim, true> : differentiate_queries<kDim, false>,
         dim3((call.queries + kBlock - 1) / kBlock, call.heads, call.batch), T::kThreads, sizeof(T), stream, call,
         call.scale(), scratch.seen(), scratch.delta());
}

}  // namespace

void attention_fp32_backward(const Attention<float>& call, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { differentiate<width()>(call, stream); });
}

}  // namespace run_llm
