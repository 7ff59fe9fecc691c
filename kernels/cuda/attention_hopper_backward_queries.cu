// Gradients of queries: a block takes 128 queries of a head and sums over the keys that they see.
//
// A producer and two consumers as in the forward (attention_hopper_forward.cu), without turns: a consumer computes
// S = q k^T and dP = dout v^T for 64 queries and a tile of keys, has dS in registers and starts dq += dS k, which runs
// while the next tile's scores are computed. The tile of keys is the right operand of both: K-major for the scores,
// MN-major for the sums.
#include "attention_hopper_backward.h"

namespace run_llm {
namespace {

template <int kDim>
struct QueryTiles {
  static constexpr int kConsumers = 2, kQueries = kConsumers * kTileRows, kStages = 3;
  static constexpr int kKeys = kDim == 64 ? 128 : 64;  // wider tiles of scores at D 128 would spill
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kParts = kDim / kSwizzledColumns;

  uint16_t q[kConsumers][kParts][kTileRows][kSwizzledColumns], dout[kConsumers][kParts][kTileRows][kSwizzledColumns];
  uint16_t k[kStages][kParts][kKeys][kSwizzledColumns], v[kStages][kParts][kKeys][kSwizzledColumns];
  uint64_t queries_full, full[kStages], empty[kStages];

  DEVICE void init() {
    mbarrier_init(&queries_full, 1);
    UNROLL
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumers * kWarpgroup / 32);
    }
    mbarrier_init_fence();
  }
};

struct QueryMaps {
  TensorMap q, k, v, dout;
};

/// One thread: start all copies of the block.
template <class T, int kDim>
DEVICE void produce(QueryTiles<kDim>& shared, const Attention<T>& call, const QueryMaps& maps, const Seen& seen,
                    int first) {
  using Tile = QueryTiles<kDim>;
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), kv = call.kv_head(head);
  const int end = seen.end<Tile::kKeys>();
  int n = seen.begin<Tile::kKeys>();
  if (n >= end) return;
  mbarrier_arrive_expect(&shared.queries_full, sizeof shared.q + sizeof shared.dout);
  for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
    copy_tile(shared.q[consumer], maps.q, head, first + consumer * kTileRows, b, &shared.queries_full);
    copy_tile(shared.dout[consumer], maps.dout, head, first + consumer * kTileRows, b, &shared.queries_full);
  }
  Ring<Tile::kStages> ring;
  for (; n < end; n = seen.next<Tile::kKeys>(n), ring.advance()) {
    uint64_t* full = &shared.full[ring.stage];
    mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    mbarrier_arrive_expect(full, sizeof shared.k[0] + sizeof shared.v[0]);
    copy_tile(shared.k[ring.stage], maps.k, kv, n * Tile::kKeys, b, full);
    copy_tile(shared.v[ring.stage], maps.v, kv, n * Tile::kKeys, b, full);
  }
}

/// A consumer, number 0 or 1: its 64 queries, from `first` on.
template <class T, int kDim, bool kBias>
DEVICE void consume(QueryTiles<kDim>& shared, const Attention<T>& call, const Prepared& prepared, float scale_log2,
                    float scale, const Seen& seen, int first, int consumer) {
  using Tile = QueryTiles<kDim>;
  constexpr int kKeys = Tile::kKeys;
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;
  const Seen own = Seen::of(call, b, first, kTileRows);
  const float* bias = call.bias_of(b, head);
  int2 ranges[2];
  float2 rows[2];
  UNROLL
  for (int j = 0; j < 2; ++j) {
    const int query = first + row + lane / 4 + 8 * j;
    ranges[j] = query < call.queries ? call.range(b, query) : make_int2(0, 0);
    rows[j] = query < call.queries ? prepared.rows_of(b, head, call.heads)[query] : make_float2(INFINITY, 0);
  }
  float dq[kDim / 2], scores[kKeys / 2], gradients[kKeys / 2];
  uint32_t left[kKeys / 16][4];
  UNROLL
  for (int i = 0; i < kDim / 2; ++i) dq[i] = 0;

  const int end = seen.end<kKeys>();
  int n = seen.begin<kKeys>();
  if (n < end) {
    mbarrier_wait(&shared.queries_full, 0);
    Ring<Tile::kStages> ring;
    int before = -1;  // the stage that products may still read
    do {
      const int stage = ring.stage, mine = n * kKeys + 2 * (lane % 4);
      mbarrier_wait(&shared.full[stage], ring.parity);
      start_scores<T>(scores, shared.q[consumer], shared.k[stage]);
      start_scores<T>(gradients, shared.dout[consumer], shared.v[stage]);
      wgmma_wait<1>();
      hold(scores);
      if (before >= 0) give_back(&shared.empty[before]);
      before = stage;
      if constexpr (kBias) add_bias(scores, bias, mine, call.keys);
      if (!own.whole<kKeys>(n)) hide(scores, ranges, mine, own.prefix);
      UNROLL
      for (int i = 0; i < kKeys / 2; ++i) scores[i] = exp2_fast(scores[i] * scale_log2 - rows[i / 2 % 2].x);
      wgmma_wait<0>();
      hold(gradients);
      UNROLL
      for (int i = 0; i < kKeys / 2; ++i) gradients[i] = scores[i] * (gradients[i] - rows[i / 2 % 2].y);
      pack_left<T>(left, gradients);
      start_sums<T>(dq, left, shared.k[stage]);
      n = seen.next<kKeys>(n);
      ring.advance();
    } while (n < end);
    wgmma_wait<0>();
    hold(dq);
  }
  UNROLL
  for (int i = 0; i < kDim / 2; ++i) dq[i] *= scale;
  barrier_wait(1 + consumer, kWarpgroup);  // no warp of this consumer needs its queries any more
  const int64_t start = call.q_start(b, head) + first * call.q_stride();
  store_rows<T, kDim>(shared.q[consumer], dq, call.dq + start, call.q_stride(), row, call.queries - first);
}

template <class T, int kDim, bool kBias>
KERNEL_FUNCTION __launch_bounds__(QueryTiles<kDim>::kThreads, 1)
    sum_over_keys(Attention<T> call, Prepared prepared, float scale_log2, float scale,
                  const __grid_constant__ QueryMaps maps) {
  using Tile = QueryTiles<kDim>;
  Tile& shared = *shared_memory<Tile>();
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * Tile::kQueries;  // the longest causal rows first
  const int warpgroup = shuffle(thread / kWarpgroup, 0);
  if (thread == 0) shared.init();
  __syncthreads();
  const Seen seen = Seen::of(call, static_cast<int>(blockIdx.z), first, Tile::kQueries);
  if (warpgroup == 0) {
    decrease_registers<Tile::kProducerRegisters>();
    if (thread == 0) produce<T, kDim>(shared, call, maps, seen, first);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    consume<T, kDim, kBias>(shared, call, prepared, scale_log2, scale, seen, first + (warpgroup - 1) * kTileRows,
                            warpgroup - 1);
  }
}

template <class T, int kDim>
void sum_with(const Attention<T>& call, const Prepared& prepared, cudaStream_t stream) {
  using Tile = QueryTiles<kDim>;
  const auto map = [&](const T* from, int rows, int heads, int box_rows) {
    return tensor_map(from, call.batch, rows, heads, kDim, box_rows);
  };
  const QueryMaps maps{map(call.q, call.queries, call.heads, kTileRows),
                       map(call.k, call.keys, call.kv_heads, Tile::kKeys),
                       map(call.v, call.keys, call.kv_heads, Tile::kKeys),
                       map(call.dout, call.queries, call.heads, kTileRows)};
  const dim3 blocks((call.queries + Tile::kQueries - 1) / Tile::kQueries, call.heads, call.batch);
  launch(call.bias ? sum_over_keys<T, kDim, true> : sum_over_keys<T, kDim, false>, blocks, Tile::kThreads, sizeof(Tile),
         stream, call, prepared, call.scale_log2(), call.scale(), maps);
}

}  // namespace

template <class T>
void hopper_backward_queries(const Attention<T>& call, const Prepared& prepared, cudaStream_t stream) {
  if (call.dim == 64)
    sum_with<T, 64>(call, prepared, stream);
  else
    sum_with<T, 128>(call, prepared, stream);
}
template void hopper_backward_queries(const Attention<bf16>&, const Prepared&, cudaStream_t);
template void hopper_backward_queries(const Attention<fp16>&, const Prepared&, cudaStream_t);

}  // namespace run_llm
