// FlashAttention-3 (arXiv 2407.08608), forward, for Hopper (sm_90a): bf16 and fp16, D 64 and 128.
//
//   attention_hopper_forward(q, k, v, ranges, bias, prefix) -> out, lse     as attention_forward (attention.h)
//
// attention_forward does not call it: it has run in the emulator and through ptxas only. What the first run on a GPU
// has to confirm stands in emulator/emulated_hopper.h; until it has, this is an operator of its own.
//
// A block has three warpgroups. The first, the producer, lets one thread start the bulk copies: the queries once, then
// keys and values block by block into a ring of kStages tiles, each as soon as both consumers have given it back. It
// gives its registers to the other two, the consumers, who take 64 queries each: with a warpgroup's tile of scores
// (64 x 128), its output (64 x D) and the weights in registers, a thread needs more than the 168 that three warpgroups
// with equal shares would get, and a third consumer would leave each only 160.
//
// Two things overlap with the tensor cores' work, since exponentials are slow (a 256th of the products' rate):
// * between the consumers: they take turns at starting products (named barriers), so that one computes its softmax
//   while the other's products run;
// * within one: the scores of the next block are started before the weights of this one meet the values, and their
//   softmax may run while these products do. ptxas 13.0 makes little of it: it moves the wait for these products up to
//   the maxima, before the exponentials. To be measured, and ordered otherwise if it costs, on a GPU.
#include "attention_hopper.h"

namespace run_llm {
namespace {

template <int kDim>
struct Tiles {
  static constexpr int kConsumers = 2, kRows = kTileRows, kQueries = kConsumers * kRows;
  static constexpr int kKeys = 128, kStages = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 64 << 10, "the register file");
  static constexpr int kParts = kDim / kSwizzledColumns;  // tiles of 64 columns beside each other

  uint16_t q[kConsumers][kParts][kRows][kSwizzledColumns];
  uint16_t k[kStages][kParts][kKeys][kSwizzledColumns], v[kStages][kParts][kKeys][kSwizzledColumns];
  uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];

  DEVICE void init() {
    mbarrier_init(&q_full, 1);
    UNROLL
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&k_full[i], 1);
      mbarrier_init(&v_full[i], 1);
      mbarrier_init(&k_empty[i], kConsumers * kWarpgroup / 32);  // a lane of each warp arrives
      mbarrier_init(&v_empty[i], kConsumers * kWarpgroup / 32);
    }
    mbarrier_init_fence();
  }
};

/// One thread: start all copies of the block.
template <class T, int kDim>
DEVICE void produce(Tiles<kDim>& shared, const Attention<T>& call, const TensorMap& q, const TensorMap& k,
                    const TensorMap& v, const Seen& seen, int first) {
  using Tile = Tiles<kDim>;
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), kv = call.kv_head(head);
  const int end = seen.end<Tile::kKeys>();
  int n = seen.begin<Tile::kKeys>();
  if (n >= end) return;
  mbarrier_arrive_expect(&shared.q_full, sizeof shared.q);
  for (int consumer = 0; consumer < Tile::kConsumers; ++consumer)
    copy_tile(shared.q[consumer], q, head, first + consumer * Tile::kRows, b, &shared.q_full);
  const auto fetch = [&](auto& tile, const TensorMap& map, int block, uint64_t* full, uint64_t* empty, int parity) {
    mbarrier_wait(empty, parity ^ 1);
    mbarrier_arrive_expect(full, sizeof tile);
    copy_tile(tile, map, kv, block * Tile::kKeys, b, full);
  };
  // The next keys before the values, as the consumers want them.
  Ring<Tile::kStages> keys, values;
  const auto fetch_keys = [&] {
    const int i = keys.stage;
    fetch(shared.k[i], k, n, &shared.k_full[i], &shared.k_empty[i], keys.parity);
    keys.advance();
  };
  fetch_keys();
  while (n < end) {
    const int block = n, i = values.stage;
    n = seen.next<Tile::kKeys>(n);
    if (n < end) fetch_keys();
    fetch(shared.v[i], v, block, &shared.v_full[i], &shared.v_empty[i], values.parity);
    values.advance();
  }
}

/// A consumer's scores, from products to weights. A thread has two rows of the 64, j = 0 and 1, 8 apart, and of each
/// the columns 8 i + 2 (lane % 4) + e: scores[4 i + 2 j + e].
template <int kKeys>
struct Softmax {
  float largest[2] = {kHidden, kHidden}, sum[2] = {0, 0}, factor[2];
  int2 ranges[2];

  /// Scores to weights in place; factor is what the output so far has to be multiplied by.
  DEVICE void weigh(float (&scores)[kKeys / 2], float scale) {
    UNROLL
    for (int j = 0; j < 2; ++j) {
      float most = largest[j];
      UNROLL
      for (int i = 0; i < kKeys / 8; ++i) most = fmaxf(most, fmaxf(scores[4 * i + 2 * j], scores[4 * i + 2 * j + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float shift = most == kHidden ? 0.f : most * scale;  // nothing seen yet: weights of 0
      // 1 where the maximum stays: the exponent would not quite be 0, as its terms round apart.
      factor[j] = most == largest[j] ? 1.f : exp2_fast(largest[j] * scale - shift);
      largest[j] = most;
      float row_sum = 0;
      UNROLL
      for (int i = 0; i < kKeys / 8; ++i)
        UNROLL
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * i + 2 * j + e];
          score = exp2_fast(score * scale - shift);
          row_sum += score;
        }
      sum[j] = sum[j] * factor[j] + row_sum;
    }
  }
};

/// A consumer, number 0 or 1: its 64 queries, from `first` on.
template <class T, int kDim, bool kBias>
DEVICE void consume(Tiles<kDim>& shared, const Attention<T>& call, float scale, const Seen& seen, int first,
                    int consumer) {
  using Tile = Tiles<kDim>;
  constexpr int kKeys = Tile::kKeys;
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16;  // the warp's first
  const Seen own = Seen::of(call, b, first, Tile::kRows);
  const float* bias = call.bias_of(b, head);

  Softmax<kKeys> softmax;
  UNROLL
  for (int j = 0; j < 2; ++j) {
    const int query = first + row + lane / 4 + 8 * j;
    softmax.ranges[j] = query < call.queries ? call.range(b, query) : make_int2(0, 0);
  }
  float scores[kKeys / 2], out[kDim / 2];
  uint32_t weights[kKeys / 16][4];  // a left operand for each 16 keys
  UNROLL
  for (int i = 0; i < kDim / 2; ++i) out[i] = 0;

  const auto take_turn = [&] { barrier_wait(1 + consumer, 2 * kWarpgroup); };
  const auto pass_turn = [&] { barrier_arrive(1 + (consumer + 1) % Tile::kConsumers, 2 * kWarpgroup); };
  const auto weigh = [&](int n) {
    const int mine = n * kKeys + 2 * (lane % 4);
    if constexpr (kBias) add_bias(scores, bias, mine, call.keys);
    if (!own.whole<kKeys>(n)) hide(scores, softmax.ranges, mine, own.prefix);
    softmax.weigh(scores, scale);
  };

  const int end = seen.end<kKeys>();
  int n = seen.begin<kKeys>();
  if (n < end) {
    Ring<Tile::kStages> ring;
    int next = seen.next<kKeys>(n);
    if (consumer == Tile::kConsumers - 1) pass_turn();  // the first consumer begins
    mbarrier_wait(&shared.q_full, 0);
    mbarrier_wait(&shared.k_full[0], 0);
    take_turn();
    start_scores<T>(scores, shared.q[consumer], shared.k[0]);
    if (next < end || consumer < Tile::kConsumers - 1) pass_turn();
    wgmma_wait<0>();
    hold(scores);
    give_back(&shared.k_empty[0]);
    weigh(n);
    pack_left<T>(weights, scores);
    while (next < end) {
      n = next;
      next = seen.next<kKeys>(n);
      const Ring<Tile::kStages> before = ring;
      ring.advance();
      mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
      take_turn();
      start_scores<T>(scores, shared.q[consumer], shared.k[ring.stage]);
      mbarrier_wait(&shared.v_full[before.stage], before.parity);
      start_sums<T>(out, weights, shared.v[before.stage]);
      if (next < end || consumer < Tile::kConsumers - 1) pass_turn();
      wgmma_wait<1>();
      hold(scores);
      give_back(&shared.k_empty[ring.stage]);
      weigh(n);
      wgmma_wait<0>();
      hold(out);
      give_back(&shared.v_empty[before.stage]);
      UNROLL
      for (int i = 0; i < kDim / 2; ++i) out[i] *= softmax.factor[i / 2 % 2];
      pack_left<T>(weights, scores);
    }
    mbarrier_wait(&shared.v_full[ring.stage], ring.parity);
    start_sums<T>(out, weights, shared.v[ring.stage]);
    wgmma_wait<0>();
    hold(out);
  }

  UNROLL
  for (int j = 0; j < 2; ++j) {
    float sum = softmax.sum[j];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int query = first + row + lane / 4 + 8 * j;
    if (lane % 4 == 0 && query < call.queries)
      call.lse[call.lse_start(b, head) + query] = sum == 0 ? 0.f : softmax.largest[j] * scale * kLn2 + logf(sum);
    const float inverse = sum == 0 ? 0.f : 1 / sum;
    UNROLL
    for (int i = 0; i < kDim / 4; ++i) out[i / 2 * 4 + 2 * j + i % 2] *= inverse;
  }
  // The queries are not needed any more, by any warp of this consumer.
  barrier_wait(1 + Tile::kConsumers + consumer, kWarpgroup);
  const int64_t start = call.q_start(b, head) + first * call.q_stride();
  store_rows<T, kDim>(shared.q[consumer], out, call.out + start, call.q_stride(), row, call.queries - first);
}

template <class T, int kDim, bool kBias>
KERNEL_FUNCTION __launch_bounds__(Tiles<kDim>::kThreads, 1)
    attend(Attention<T> call, float scale, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap v) {
  using Tile = Tiles<kDim>;
  Tile& shared = *shared_memory<Tile>();
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = shuffle(thread / kWarpgroup, 0);  // the same in all lanes, and known to be
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * Tile::kQueries;  // the longest causal rows first
  if (thread == 0) shared.init();
  __syncthreads();
  const Seen seen = Seen::of(call, static_cast<int>(blockIdx.z), first, Tile::kQueries);
  if (warpgroup == 0) {
    decrease_registers<Tile::kProducerRegisters>();
    if (thread == 0) produce<T, kDim>(shared, call, q, k, v, seen, first);
  } else {
    increase_registers<Tile::kConsumerRegisters>();
    consume<T, kDim, kBias>(shared, call, scale, seen, first + (warpgroup - 1) * Tile::kRows, warpgroup - 1);
  }
}

template <class T, int kDim>
void attend_with(const Attention<T>& call, cudaStream_t stream) {
  using Tile = Tiles<kDim>;
  const auto map = [&](const T* from, int rows, int heads, int box_rows) {
    return tensor_map(from, call.batch, rows, heads, kDim, box_rows);
  };
  const dim3 blocks((call.queries + Tile::kQueries - 1) / Tile::kQueries, call.heads, call.batch);
  launch(call.bias ? attend<T, kDim, true> : attend<T, kDim, false>, blocks, Tile::kThreads, sizeof(Tile), stream, call,
         call.scale_log2(), map(call.q, call.queries, call.heads, Tile::kRows),
         map(call.k, call.keys, call.kv_heads, Tile::kKeys), map(call.v, call.keys, call.kv_heads, Tile::kKeys));
}

template <class T>
void attend_any(Args& args) {
  const auto call = Attention<T>::forward(args);
  auto* stream = static_cast<cudaStream_t>(args.stream());
  require_hopper_shapes(args, call);
  require_writable(args, call.out, "out");
  if (call.dim == 64)
    attend_with<T, 64>(call, stream);
  else
    attend_with<T, 128>(call, stream);
}

}  // namespace
}  // namespace run_llm

using namespace run_llm;

KERNEL(attention_hopper_forward) {
  if (args.next_is("bfloat16")) return attend_any<bf16>(args);
  if (args.next_is("float16")) return attend_any<fp16>(args);
  args.require(false, "q", kHopperDtypes);
}
