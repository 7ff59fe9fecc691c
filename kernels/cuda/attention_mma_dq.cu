// FlashAttention-2, backward: gradients of queries on the tensor cores.
//
// Laid out as the forward kernel: a block of 4 warps takes 64 or 128 queries of one head and walks over the blocks of
// keys that they see; each warp has 16 or 32 of the queries to itself. Scores and the gradients of the weights are
// formed for 32 keys at a time, and become the left factor of dq = ds k where they are.
//
// Why these sizes. For 32 queries a lane holds D sums of dq, and 32 scores and 32 of their gradients for 32 keys: at
// D 128 192 of 255 registers; 64 keys at once would spill. Shared memory at D 128: 64 KB of q and dout, two stages of
// 16 KB (32 keys), and 1.3 KB: 97 KB, so that an H100 (228 KB) runs two blocks beside each other; an A100 one. At D 64
// stages are 64 keys, and it is 66 KB.
#include "attention_mma_backward.h"

namespace run_llm {
namespace {

constexpr int kThreads = 128, kPart = 32;  // keys whose scores are in registers at a time

template <int kDim, int kTiles>
struct Shared {
  static constexpr int kRows = 64 * kTiles, kKeys = kDim <= 64 ? 64 : 32;
  struct Stage {
    alignas(128) unsigned char k[kKeys * 2 * kDim];
    alignas(128) unsigned char v[kKeys * 2 * kDim];
    float bias[kKeys];
  };
  alignas(128) unsigned char q[kRows * 2 * kDim];
  alignas(128) unsigned char dout[kRows * 2 * kDim];
  float lse[kRows], delta[kRows];
  Seen seen;
  Stage stages[2];
};

template <class T, int kDim, int kTiles>
KERNEL_FUNCTION __launch_bounds__(kThreads, 2) sum_over_keys(Attention<T> call, Prepared prepared, float scale) {
  using Tile = run_llm::Tile<T, kDim>;
  using Shared = run_llm::Shared<kDim, kTiles>;
  constexpr int kKeys = Shared::kKeys;
  Shared& shared = *shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp_row = thread / 32 * 16 * kTiles;
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * Shared::kRows;  // the longest causal rows first
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int64_t q_start = call.q_start(b, head), kv_start = call.k_start(b, call.kv_head(head));

  const auto fetch = [&](typename Shared::Stage& stage, int n) {
    const int key = n * kKeys;
    Tile::template copy<kKeys, kThreads>(stage.k, call.k + kv_start, call.k_stride(), key, call.keys, call.dim);
    Tile::template copy<kKeys, kThreads>(stage.v, call.v + kv_start, call.k_stride(), key, call.keys, call.dim);
    if (call.bias && thread < kKeys)
      copy_async_4(stage.bias + thread, call.bias_of(b, head) + (key + thread < call.keys ? key + thread : 0),
                   key + thread < call.keys);
  };

  const Seen found = Seen::of(call, b, first, Shared::kRows);
  if (thread == 0) shared.seen = found;
  const Seen& seen = shared.seen;  // the loop has no registers to spare
  const int end = found.end<kKeys>();
  int n = found.begin<kKeys>(), stage = 0;
  Tile::template copy<Shared::kRows, kThreads>(shared.q, call.q + q_start, call.q_stride(), first, call.queries,
                                               call.dim);
  Tile::template copy<Shared::kRows, kThreads>(shared.dout, call.dout + q_start, call.q_stride(), first, call.queries,
                                               call.dim);
  if (n < end) fetch(shared.stages[0], n);
  copy_async_commit();
  if (thread < Shared::kRows) {
    const int64_t row = prepared.row(b, head, call.heads) + first + thread;
    shared.lse[thread] = prepared.lse[row];
    shared.delta[thread] = prepared.delta[row];
  }

  const unsigned char* my_q = shared.q + warp_row * Tile::kRowBytes;
  const unsigned char* my_dout = shared.dout + warp_row * Tile::kRowBytes;
  const int left_lane = Tile::left_lane(), right_lane = Tile::right_lane();
  Sums<kTiles, kDim / 8> dq;
  clear(dq);

  while (n < end) {
    copy_async_wait<0>();
    __syncthreads();  // this stage has come, and nobody reads the other any more
    const int next = seen.next<kKeys>(n);
    if (next < end) fetch(shared.stages[1 - stage], next);
    copy_async_commit();

    const typename Shared::Stage& now = shared.stages[stage];
#pragma unroll 1
    for (int part = 0; part < kKeys; part += kPart) {
      const unsigned char* k = now.k + part * Tile::kRowBytes;
      Sums<kTiles, kPart / 8> weights, slopes;
      if (call.bias)
        begin_with(weights, now.bias + part);
      else
        clear(weights);
      Tile::add_row_products(weights, my_q, left_lane, k, right_lane);
      if (!seen.whole<kKeys>(n))
        hide(weights, call, b, first + warp_row + lane / 4, n * kKeys + part + lane % 4 * 2, seen.prefix);
      clear(slopes);
      Tile::add_row_products(slopes, my_dout, left_lane, now.v + part * Tile::kRowBytes, right_lane);
      UNROLL
      for (int i = 0; i < kTiles; ++i)
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + i * 16 + half * 8 + lane / 4;
          const float lse = shared.lse[row], delta = shared.delta[row];
          UNROLL
          for (int j = 0; j < kPart / 8; ++j)
            UNROLL
            for (int e = 2 * half; e < 2 * half + 2; ++e)
              slopes[i][j][e] =
                  exp2_fast(weights[i][j][e] * (scale * kLog2E) - lse) * (slopes[i][j][e] - delta);
        }
      Tile::add_weighted_rows(dq, slopes, k, left_lane);
    }
    n = next;
    stage = 1 - stage;
  }
  copy_async_wait<0>();
  __syncthreads();  // if no key is seen, queries may have been on their way until now

  scale_all(dq, scale);
  Tile::store(shared.q + warp_row * Tile::kRowBytes, dq, call.dq + q_start, call.q_stride(), first + warp_row,
              call.queries, call.dim);
}

// ---- the host's side

template <class T, int kDim, int kTiles>
void sum_with(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream) {
  using Shared = Shared<kDim, kTiles>;
  const dim3 blocks((call.queries + Shared::kRows - 1) / Shared::kRows, call.heads, call.batch);
  launch(sum_over_keys<T, kDim, kTiles>, blocks, kThreads, sizeof(Shared), stream, call, prepared, scale);
}

/// Blocks of 128 queries if they are enough for the whole GPU, else of 64.
template <class T, int kDim>
void sum_in_blocks(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream) {
  if (enough_blocks(call.batch, call.heads, call.queries)) return sum_with<T, kDim, 2>(call, prepared, scale, stream);
  sum_with<T, kDim, 1>(call, prepared, scale, stream);
}

}  // namespace

template <class T>
void attention_mma_dq(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { sum_in_blocks<T, width()>(call, prepared, scale, stream); });
}

template void attention_mma_dq(const Attention<bf16>&, const Prepared&, float, cudaStream_t);
template void attention_mma_dq(const Attention<fp16>&, const Prepared&, float, cudaStream_t);

}  // namespace run_llm
