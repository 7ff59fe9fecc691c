// Gradients of keys and values: a block takes 128 keys of a key head and sums over the queries that see them.
//
// A producer and two consumers as in the forward (attention_hopper_forward.cu); a consumer has 64 keys. It computes the
// transposed tiles S^T = k q^T and dP^T = v dout^T, a row a key: the weights then lie in registers as the left operands
// of dv += P^T dout and dk += dS^T q, and nothing goes through shared memory. The producer goes through the tiles of 64
// queries of all heads that share the keys and tells the consumers with each what it is.
//
// Products that need no fresh results run while the weights are computed: those of the last tile while this one's
// scores are waited for, dP^T during the exponentials, dv during dS^T.
#include "attention_hopper_backward.h"

namespace run_llm {
namespace {

template <int kDim>
struct KeyTiles {
  static constexpr int kConsumers = 2, kKeys = kConsumers * kTileRows, kStages = 3;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kParts = kDim / kSwizzledColumns;
  /// Whether sums run on while the next tile's scores are computed: at D 128 the registers do not suffice.
  static constexpr bool kAcrossTiles = kDim == 64;
  /// A tile of queries: its head, and whether all its queries see all keys of the block. kEnd: there are no more.
  static constexpr int kEnd = -1;

  uint16_t k[kConsumers][kParts][kTileRows][kSwizzledColumns], v[kConsumers][kParts][kTileRows][kSwizzledColumns];
  uint16_t q[kStages][kParts][kTileRows][kSwizzledColumns], dout[kStages][kParts][kTileRows][kSwizzledColumns];
  float4 rows[kStages][kTileRows / 2];  // Prepared's rows and ranges, two queries each
  int4 ranges[kStages][kTileRows / 2];
  int2 what[kStages];
  uint64_t keys_full, full[kStages], empty[kStages];

  DEVICE void init() {
    mbarrier_init(&keys_full, 1);
    UNROLL
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kConsumers * kWarpgroup / 32);
    }
    mbarrier_init_fence();
  }
};

struct KeyMaps {
  TensorMap q, k, v, dout;
};

/// A warp: start all copies of the block.
template <class T, int kDim>
DEVICE void produce(KeyTiles<kDim>& shared, const Attention<T>& call, const Prepared& prepared, const KeyMaps& maps,
                    int first) {
  using Tile = KeyTiles<kDim>;
  const int kv = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), group = call.heads / call.kv_heads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) {
    mbarrier_arrive_expect(&shared.keys_full, sizeof shared.k + sizeof shared.v);
    for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
      copy_tile(shared.k[consumer], maps.k, kv, first + consumer * kTileRows, b, &shared.keys_full);
      copy_tile(shared.v[consumer], maps.v, kv, first + consumer * kTileRows, b, &shared.keys_full);
    }
  }
  const int end = first + Tile::kKeys, prefix = call.prefix_length();
  const int4* tiles = prepared.tiles + prepared.range_row(b) * prepared.tiles_count;
  const int2* ranges = prepared.ranges + prepared.range_row(b) * prepared.padded;
  const auto sees = [&](int m) {
    const int4 tile = m < prepared.tiles_count ? tiles[m] : make_int4(0, 0, 0, 0);
    return m < prepared.tiles_count && (first < prefix || (tile.x < end && tile.y > first));
  };
  Ring<Tile::kStages> ring;
  for (int head = kv * group; head < (kv + 1) * group; ++head)
    for (int m = 0; m < prepared.tiles_count; ++m) {
      if (m % 32 == 0 && !any_lane(sees(m + lane))) m += 31;
      if (!sees(m)) continue;
      const int stage = ring.stage;
      if (lane == 0) {
        mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
        const int4 tile = tiles[m];
        shared.what[stage] = make_int2(head, end <= prefix || (tile.z <= first && end <= tile.w));
        uint64_t* full = &shared.full[stage];
        mbarrier_arrive_expect(full, sizeof shared.q[0] + sizeof shared.dout[0] + sizeof shared.rows[0] +
                                         sizeof shared.ranges[0]);
        copy_tile(shared.q[stage], maps.q, head, m * kTileRows, b, full);
        copy_tile(shared.dout[stage], maps.dout, head, m * kTileRows, b, full);
        const float2* rows = prepared.rows_of(b, head, call.heads) + m * kTileRows;
        copy_bytes(shared.rows[stage], rows, sizeof shared.rows[0], full);
        copy_bytes(shared.ranges[stage], ranges + m * kTileRows, sizeof shared.ranges[0], full);
      }
      ring.advance();
    }
  if (lane == 0) {
    mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    shared.what[ring.stage] = make_int2(Tile::kEnd, 0);
    mbarrier_arrive(&shared.full[ring.stage]);
  }
}

/// Products k q^T of the thread's keys, `key` and `key` + 8, with the tile's queries to weights, in place.
template <bool kBias>
DEVICE void weigh(float (&scores)[kTileRows / 2], const float4* rows, const int4* ranges, bool whole, int key,
                  int prefix, const float* bias, int keys, float scale) {
  const int pair = static_cast<int>(threadIdx.x) % 4;
  float added[2] = {0, 0};
  if constexpr (kBias)
    for (int j = 0; j < 2; ++j) added[j] = key + 8 * j < keys ? bias_term(bias[key + 8 * j]) : 0.f;
  UNROLL
  for (int i = 0; i < kTileRows / 8; ++i) {
    const float4 both = rows[4 * i + pair];
    UNROLL
    for (int j = 0; j < 2; ++j) {
      float* score = &scores[4 * i + 2 * j];
      score[0] = exp2_fast((score[0] + added[j]) * scale - both.x);
      score[1] = exp2_fast((score[1] + added[j]) * scale - both.z);
    }
  }
  if (whole) return;
  UNROLL
  for (int i = 0; i < kTileRows / 8; ++i) {
    const int4 both = ranges[4 * i + pair];
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const int mine = key + 8 * j;
      float* score = &scores[4 * i + 2 * j];
      if (mine >= prefix && (mine < both.x || mine >= both.y)) score[0] = 0;
      if (mine >= prefix && (mine < both.z || mine >= both.w)) score[1] = 0;
    }
  }
}

/// A consumer, number 0 or 1: its 64 keys, from `first` on.
template <class T, int kDim, bool kBias>
DEVICE void consume(KeyTiles<kDim>& shared, const Attention<T>& call, float scale_log2, float scale, int first,
                    int consumer) {
  using Tile = KeyTiles<kDim>;
  const int kv = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;
  const int prefix = call.prefix_length();
  float dk[kDim / 2], dv[kDim / 2], weights[kTileRows / 2], gradients[kTileRows / 2];
  uint32_t left_weights[kTileRows / 16][4], left_gradients[kTileRows / 16][4];
  UNROLL
  for (int i = 0; i < kDim / 2; ++i) dk[i] = dv[i] = 0;

  mbarrier_wait(&shared.keys_full, 0);
  Ring<Tile::kStages> ring;
  int before = -1;  // the stage that products may still read
  for (;; ring.advance()) {
    const int stage = ring.stage;
    mbarrier_wait(&shared.full[stage], ring.parity);
    const int2 what = shared.what[stage];
    if (what.x == Tile::kEnd) break;
    start_scores<T>(weights, shared.k[consumer], shared.q[stage]);
    start_scores<T>(gradients, shared.v[consumer], shared.dout[stage]);
    wgmma_wait<1>();
    hold(weights);
    if (before >= 0) give_back(&shared.empty[before]);
    before = stage;
    weigh<kBias>(weights, shared.rows[stage], shared.ranges[stage], what.y != 0, first + row + lane / 4, prefix,
                 call.bias_of(b, what.x), call.keys, scale_log2);
    pack_left<T>(left_weights, weights);
    start_sums<T>(dv, left_weights, shared.dout[stage]);
    wgmma_wait<1>();
    hold(gradients);
    UNROLL
    for (int i = 0; i < kTileRows / 8; ++i) {
      const float4 both = shared.rows[stage][4 * i + lane % 4];
      UNROLL
      for (int n = 0; n < 4; ++n)
        gradients[4 * i + n] = weights[4 * i + n] * (gradients[4 * i + n] - (n % 2 ? both.w : both.y));
    }
    pack_left<T>(left_gradients, gradients);
    start_sums<T>(dk, left_gradients, shared.q[stage]);
    if constexpr (!Tile::kAcrossTiles) {
      wgmma_wait<0>();
      hold(dk);
      hold(dv);
      give_back(&shared.empty[stage]);
      before = -1;
    }
  }
  wgmma_wait<0>();
  hold(dk);
  hold(dv);
  UNROLL
  for (int i = 0; i < kDim / 2; ++i) dk[i] *= scale;
  barrier_wait(1 + consumer, kWarpgroup);  // no warp of this consumer needs its keys any more
  const int64_t start = call.k_start(b, kv) + first * call.k_stride();
  store_rows<T, kDim>(shared.k[consumer], dk, call.dk + start, call.k_stride(), row, call.keys - first);
  store_rows<T, kDim>(shared.v[consumer], dv, call.dv + start, call.k_stride(), row, call.keys - first);
}

template <class T, int kDim, bool kBias>
KERNEL_FUNCTION __launch_bounds__(KeyTiles<kDim>::kThreads, 1)
    sum_over_queries(Attention<T> call, Prepared prepared, float scale_log2, float scale,
                     const __grid_constant__ KeyMaps maps) {
  using Tile = KeyTiles<kDim>;
  Tile& shared = *shared_memory<Tile>();
  const int thread = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * Tile::kKeys;
  const int warpgroup = shuffle(thread / kWarpgroup, 0);
  if (thread == 0) shared.init();
  __syncthreads();
  if (warpgroup == 0) {
    decrease_registers<Tile::kProducerRegisters>();
    if (thread < 32) produce<T, kDim>(shared, call, prepared, maps, first);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    consume<T, kDim, kBias>(shared, call, scale_log2, scale, first + (warpgroup - 1) * kTileRows, warpgroup - 1);
  }
}

template <class T, int kDim>
void sum_with(const Attention<T>& call, const Prepared& prepared, cudaStream_t stream) {
  using Tile = KeyTiles<kDim>;
  const auto map = [&](const T* from, int rows, int heads) {
    return tensor_map(from, call.batch, rows, heads, kDim, kTileRows);
  };
  const KeyMaps maps{map(call.q, call.queries, call.heads), map(call.k, call.keys, call.kv_heads),
                     map(call.v, call.keys, call.kv_heads), map(call.dout, call.queries, call.heads)};
  const dim3 blocks((call.keys + Tile::kKeys - 1) / Tile::kKeys, call.kv_heads, call.batch);
  launch(call.bias ? sum_over_queries<T, kDim, true> : sum_over_queries<T, kDim, false>, blocks, Tile::kThreads,
         sizeof(Tile), stream, call, prepared, call.scale_log2(), call.scale(), maps);
}

}  // namespace

template <class T>
void hopper_backward_keys(const Attention<T>& call, const Prepared& prepared, cudaStream_t stream) {
  if (call.dim == 64)
    sum_with<T, 64>(call, prepared, stream);
  else
    sum_with<T, 128>(call, prepared, stream);
}
template void hopper_backward_keys(const Attention<bf16>&, const Prepared&, cudaStream_t);
template void hopper_backward_keys(const Attention<fp16>&, const Prepared&, cudaStream_t);

}  // namespace run_llm
