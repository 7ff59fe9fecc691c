// FlashAttention-2, backward: gradients of keys and values on the tensor cores.
//
// A block takes some keys of one key head and walks over the blocks of 64 queries that see them, in each over the query
// heads that share the key head. Each warp has 16 or 32 of the keys to itself and computes the scores transposed, keys
// times queries: then weights and their gradients lie in registers as the left factors of dv = p^T dout and
// dk = ds^T q want them, and warps exchange nothing.
//
// Why these sizes. A lane holds D / 2 sums of dk and as many of dv for each 16 keys of its warp: at D 128 and 96 a warp
// has 16 keys (128 registers at D 128), at D 64 and 32 it has 32, so that what load_matrices reads of q and dout serves
// two products. Keys and values as left factors take D / 4 registers each for 16 keys. With scores and their gradients
// for 16 queries at a time (4 registers for 16 keys x 8 queries, 16 or 32 in all) that makes 208 of 255 at D 128; at
// D 64 the values (32) do not fit as well and are read again. 8 or 4 warps share 128 keys, so that q and dout are
// fetched for 128 keys at a time: 32 KB for four products of 128 x 64 x 128, 4096 clocks of an A100's tensor cores.
// Shared memory at D 128: 64 KB of keys and values and two stages of 33.5 KB, 131 KB: one block of 8 warps a
// multiprocessor, as the registers have it; at D 64 67 KB, two blocks of 4 warps. If there are fewer blocks of 128 keys
// than multiprocessors, blocks of 64 (4 warps of 16 keys) keep twice as many of them at work.
#include "attention_mma_backward.h"

namespace run_llm {
namespace {

constexpr int kQueries = kQueryBlock, kPart = 16;  // queries whose scores are in registers at a time

/// kWarps warps of kTiles times 16 keys.
template <int kDim, int kWarps, int kTiles>
struct Shared {
  static constexpr int kThreads = 32 * kWarps, kKeys = 16 * kTiles * kWarps;
  struct Stage {
    alignas(128) unsigned char q[kQueries * 2 * kDim];
    alignas(128) unsigned char dout[kQueries * 2 * kDim];
    float lse[kQueries], delta[kQueries];
    int2 ranges[kQueries];
    float bias[kKeys];
  };
  alignas(128) unsigned char k[kKeys * 2 * kDim];
  alignas(128) unsigned char v[kKeys * 2 * kDim];
  Stage stages[2];
};

/// The blocks of queries that see some of kKeys keys from `first` on, in order, 32 looked up at a time.
template <int kKeys>
struct Walk {
  const int4* seen;
  int blocks, first, prefix;
  int base = -32;
  uint32_t left = 0, whole = 0;

  /// The next block, or `blocks`. A warp calls it together.
  DEVICE int next() {
    const int last = first + kKeys;
    while (left == 0) {
      base += 32;
      if (base >= blocks) return blocks;
      const int mine = base + static_cast<int>(threadIdx.x % 32);
      const int4 keys = mine < blocks ? seen[mine] : make_int4(0, 0, 0, 0);
      left = vote(mine < blocks && (first < prefix || (keys.x < last && first < keys.y)));
      whole = vote(last <= prefix || (keys.z <= first && last <= keys.w));
    }
    const int bit = lowest_bit(left);
    left &= left - 1;
    return base + bit;
  }
  /// Whether each query of a block that next() has just given sees all the keys.
  DEVICE bool sees_all(int block) const { return whole >> block % 32 & 1; }
};

/// Scores [keys][queries] of keys that a query does not see become kHidden; `key` is the lane's first.
template <int kDown, int kAcross>
DEVICE void hide_transposed(Sums<kDown, kAcross>& scores, const int2* ranges, int key, int prefix) {
  UNROLL
  for (int j = 0; j < kAcross; ++j)
    UNROLL
    for (int e = 0; e < 2; ++e) {
      const int2 range = ranges[8 * j + threadIdx.x % 4 * 2 + e];
      UNROLL
      for (int i = 0; i < kDown; ++i)
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = key + i * 16 + half * 8;
          const bool sees = row < prefix || (range.x <= row && row < range.y);
          if (!sees) scores[i][j][2 * half + e] = kHidden;
        }
    }
}

template <class T, int kDim, int kWarps, int kTiles>
KERNEL_FUNCTION __launch_bounds__(32 * kWarps, 8 / kWarps) sum_over_queries(Attention<T> call, Prepared prepared,
                                                                          float scale) {
  using Tile = run_llm::Tile<T, kDim>;
  using Shared = run_llm::Shared<kDim, kWarps, kTiles>;
  constexpr int kThreads = Shared::kThreads, kKeys = Shared::kKeys;
  constexpr bool kHoldValues = kTiles == 1 || kDim < 64;
  Shared& shared = *shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp_row = thread / 32 * 16 * kTiles;
  const int first = static_cast<int>(blockIdx.x) * kKeys;  // causal: the first keys have most queries
  const int kv = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), group = call.heads / call.kv_heads;
  const int64_t range_row = call.ranges_row ? b : 0;
  Walk<kKeys> walk{prepared.seen + range_row * prepared.blocks(), prepared.blocks(), first, call.prefix_length()};

  const auto fetch = [&](typename Shared::Stage& stage, int block, int head) {
    const int query = block * kQueries;
    const int64_t start = call.q_start(b, head);
    Tile::template copy<kQueries, kThreads>(stage.q, call.q + start, call.q_stride(), query, call.queries, call.dim);
    Tile::template copy<kQueries, kThreads>(stage.dout, call.dout + start, call.q_stride(), query, call.queries,
                                            call.dim);
    const int64_t row = prepared.row(b, head, call.heads) + query;
    if (thread < 16)
      copy_async_16(stage.lse + 4 * thread, prepared.lse + row + 4 * thread, true);
    else if (thread < 32)
      copy_async_16(stage.delta + 4 * (thread - 16), prepared.delta + row + 4 * (thread - 16), true);
    else if (thread < 64)
      copy_async_16(stage.ranges + 2 * (thread - 32),
                    prepared.ranges + range_row * prepared.queries + query + 2 * (thread - 32), true);
    if (call.bias && thread < kKeys)
      copy_async_4(stage.bias + thread, call.bias_of(b, head) + (first + thread < call.keys ? first + thread : 0),
                   first + thread < call.keys);
  };

  const int64_t kv_start = call.k_start(b, kv);
  Tile::template copy<kKeys, kThreads>(shared.k, call.k + kv_start, call.k_stride(), first, call.keys, call.dim);
  Tile::template copy<kKeys, kThreads>(shared.v, call.v + kv_start, call.k_stride(), first, call.keys, call.dim);
  int block = walk.next(), head = kv * group, stage = 0;
  if (block < prepared.blocks()) fetch(shared.stages[0], block, head);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  // What a warp's keys are multiplied with comes and goes; they themselves stay in registers, and values if they fit.
  unsigned char* my_k = shared.k + warp_row * Tile::kRowBytes;
  unsigned char* my_v = shared.v + warp_row * Tile::kRowBytes;
  const int left_lane = Tile::left_lane(), right_lane = Tile::right_lane();
  uint32_t k[Tile::kSteps][kTiles][4], v[Tile::kSteps][kTiles][4];
  UNROLL
  for (int step = 0; step < Tile::kSteps; ++step) {
    Tile::load_left(k[step], my_k, left_lane, step);
    if constexpr (kHoldValues) Tile::load_left(v[step], my_v, left_lane, step);
  }
  Sums<kTiles, kDim / 8> dk, dv;
  clear(dk);
  clear(dv);

  while (block < prepared.blocks()) {
    copy_async_wait<0>();
    __syncthreads();  // this stage has come, and nobody reads the other any more
    const bool whole = walk.sees_all(block);
    const bool last_head = head + 1 == (kv + 1) * group;
    const int next_block = last_head ? walk.next() : block, next_head = last_head ? kv * group : head + 1;
    if (next_block < prepared.blocks()) fetch(shared.stages[1 - stage], next_block, next_head);
    copy_async_commit();

    const typename Shared::Stage& now = shared.stages[stage];
#pragma unroll 1
    for (int part = 0; part < kQueries; part += kPart) {
      const unsigned char* q = now.q + part * Tile::kRowBytes;
      const unsigned char* dout = now.dout + part * Tile::kRowBytes;
      Sums<kTiles, kPart / 8> weights, slopes;
      clear(weights);
      if (call.bias) {
        UNROLL
        for (int i = 0; i < kTiles; ++i)
          UNROLL
          for (int e = 0; e < 4; ++e) {
            const float added = bias_term(now.bias[warp_row + i * 16 + e / 2 * 8 + lane / 4]);
            UNROLL
            for (int j = 0; j < kPart / 8; ++j) weights[i][j][e] = added;
          }
      }
      clear(slopes);
      Tile::add_row_products(weights, k, q, right_lane);
      if constexpr (kHoldValues)
        Tile::add_row_products(slopes, v, dout, right_lane);
      else
        Tile::add_row_products(slopes, my_v, left_lane, dout, right_lane);
      if (!whole) hide_transposed(weights, now.ranges + part, first + warp_row + lane / 4, walk.prefix);
      UNROLL
      for (int j = 0; j < kPart / 8; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(now.lse + part + 8 * j + lane % 4 * 2);
        UNROLL
        for (int i = 0; i < kTiles; ++i)
          UNROLL
          for (int e = 0; e < 4; ++e)
            weights[i][j][e] = exp2_fast(weights[i][j][e] * (scale * kLog2E) - (e % 2 ? lse.y : lse.x));
      }
      Tile::add_weighted_rows(dv, weights, dout, left_lane);
      UNROLL
      for (int j = 0; j < kPart / 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(now.delta + part + 8 * j + lane % 4 * 2);
        UNROLL
        for (int i = 0; i < kTiles; ++i)
          UNROLL
          for (int e = 0; e < 4; ++e)
            slopes[i][j][e] = weights[i][j][e] * (slopes[i][j][e] - (e % 2 ? delta.y : delta.x));
      }
      Tile::add_weighted_rows(dk, slopes, q, left_lane);
    }
    block = next_block;
    head = next_head;
    stage = 1 - stage;
  }
  copy_async_wait<0>();

  scale_all(dk, scale);
  Tile::store(my_k, dk, call.dk + kv_start, call.k_stride(), first + warp_row, call.keys, call.dim);
  Tile::store(my_v, dv, call.dv + kv_start, call.k_stride(), first + warp_row, call.keys, call.dim);
}

// ---- the host's side

template <class T, int kDim, int kWarps, int kTiles>
void sum_with(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream) {
  using Shared = Shared<kDim, kWarps, kTiles>;
  const dim3 blocks((call.keys + Shared::kKeys - 1) / Shared::kKeys, call.kv_heads, call.batch);
  launch(sum_over_queries<T, kDim, kWarps, kTiles>, blocks, Shared::kThreads, sizeof(Shared), stream, call, prepared,
         scale);
}

/// Blocks of 128 keys if they are enough for the whole GPU, and find room in its shared memory, else of 64.
template <class T, int kDim>
void sum_in_blocks(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream) {
  constexpr int kTiles = kDim <= 64 ? 2 : 1;
  const bool fits = sizeof(Shared<kDim, 8 / kTiles, kTiles>) <= shared_memory_limit();
  if (fits && enough_blocks(call.batch, call.kv_heads, call.keys))
    return sum_with<T, kDim, 8 / kTiles, kTiles>(call, prepared, scale, stream);
  sum_with<T, kDim, 4, 1>(call, prepared, scale, stream);
}

}  // namespace

template <class T>
void attention_mma_dk_dv(const Attention<T>& call, const Prepared& prepared, float scale, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { sum_in_blocks<T, width()>(call, prepared, scale, stream); });
}

template void attention_mma_dk_dv(const Attention<bf16>&, const Prepared&, float, cudaStream_t);
template void attention_mma_dk_dv(const Attention<fp16>&, const Prepared&, float, cudaStream_t);

}  // namespace run_llm
