// FlashAttention-2 (arXiv 2307.08691), forward, in bf16 and fp16 on the tensor cores of sm_80 and later.
//
// A block of 4 warps takes 64 or 128 queries of one head and walks over the blocks of 64 keys that they see; each warp
// has 16 or 32 of the queries to itself, from the scores to the output, so that softmax needs no shared memory: the
// row of a query lies in 4 lanes, and scores become the left factor of the product with the values where they are.
//
// Keys have two buffers and values one: while the scores of a block are computed, its values and the next keys are on
// their way. D is the width of a head, rounded up to 32, 64, 96 or 128.
//
// Why these sizes. 32 queries a warp: what load_matrices reads of the keys then serves two products of 16 rows, and
// shared memory (128 bytes a clock) is busy for half of the time that the tensor cores are; 16 would keep it as busy as
// them. 64 keys: a lane holds 32 x D / 32 = D sums of the output and 32 x 64 / 32 = 64 scores, at D 128 192 of the 255
// registers; 128 keys would spill. At D 32 and 64 the rest has room for the queries too (D / 2 registers), which else
// are read again for each block. Shared memory at D 128: 32 KB of queries, 2 x 16 of keys, 16 of values and 532 bytes:
// two blocks fit into an A100's 164 KB as into an H100's 228, so that one's products run beside the other's
// exponentials. Registers allow no third, but at D 32. If there are fewer blocks of 128 queries than multiprocessors,
// blocks of 64 (16 queries a warp) keep twice as many of them at work.
#include "attention_mma.h"
#include "attention_mma_padding.h"

namespace run_llm {
namespace {

constexpr int kThreads = 128, kKeys = 64;

/// kTiles: how many times 16 queries a warp has.
template <int kDim, int kTiles>
struct Shared {
  static constexpr int kRows = 64 * kTiles;
  alignas(128) unsigned char q[kRows * 2 * kDim];
  alignas(128) unsigned char k[2][kKeys * 2 * kDim];
  alignas(128) unsigned char v[kKeys * 2 * kDim];
  float bias[2][kKeys];
  Seen seen;
};

/// What a lane knows of its queries' softmax: the largest score so far, and its own share of the sum of weights.
template <int kTiles>
struct Softmax {
  float largest[kTiles][2], sum[kTiles][2];

  DEVICE void begin() {
    UNROLL
    for (int i = 0; i < kTiles; ++i)
      UNROLL
      for (int half = 0; half < 2; ++half) largest[i][half] = kHidden, sum[i][half] = 0;
  }

  /// Scores become weights 2^(scale (score - largest)), and `out` is brought down to the same largest score.
  template <int kColumns>
  DEVICE void add(Sums<kTiles, kKeys / 8>& scores, Sums<kTiles, kColumns>& out, float scale) {
    float factor[kTiles][2];
    bool grown = false;
    UNROLL
    for (int i = 0; i < kTiles; ++i)
      UNROLL
      for (int half = 0; half < 2; ++half) {
        float row_largest = largest[i][half];
        UNROLL
        for (int j = 0; j < kKeys / 8; ++j)
          row_largest = fmaxf(row_largest, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
        row_largest = fmaxf(row_largest, shuffle_xor(row_largest, 1));
        row_largest = fmaxf(row_largest, shuffle_xor(row_largest, 2));
        grown = grown || row_largest > largest[i][half];
        // The difference first: 1 where the maximum stays. fminf: also where no key has been seen, infinities in both.
        factor[i][half] = exp2_fast(fminf((largest[i][half] - row_largest) * scale, 0.f));
        largest[i][half] = row_largest;
      }
    if (any_lane(grown)) {
      UNROLL
      for (int i = 0; i < kTiles; ++i)
        UNROLL
        for (int half = 0; half < 2; ++half) {
          sum[i][half] *= factor[i][half];
          UNROLL
          for (int c = 0; c < kColumns; ++c)
            out[i][c][2 * half] *= factor[i][half], out[i][c][2 * half + 1] *= factor[i][half];
        }
    }
    UNROLL
    for (int i = 0; i < kTiles; ++i)
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const float less = shift(largest[i][half], scale);
        UNROLL
        for (int j = 0; j < kKeys / 8; ++j)
          UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[i][j][e] = exp2_fast(scores[i][j][e] * scale - less);
            sum[i][half] += scores[i][j][e];
          }
      }
  }

 private:
  /// What scaled scores are reduced by; 0 as long as no key has been seen, for weights of 0.
  static DEVICE float shift(float largest, float scale) {
    const float scaled = largest * scale;
    return scaled == kHidden ? 0.f : scaled;
  }
};

template <class T, int kDim, int kTiles>
KERNEL_FUNCTION __launch_bounds__(kThreads, kDim * kTiles <= 64 ? 3 : 2) attend(Attention<T> call, float scale) {
  using Tile = run_llm::Tile<T, kDim>;
  using Shared = run_llm::Shared<kDim, kTiles>;
  constexpr bool kHoldQueries = kTiles * kDim <= 128;
  Shared& shared = *shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp_row = thread / 32 * 16 * kTiles;
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * Shared::kRows;  // the longest causal rows first
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int64_t kv_start = call.k_start(b, call.kv_head(head));

  const auto fetch_keys = [&](int n, int buffer) {
    Tile::template copy<kKeys, kThreads>(shared.k[buffer], call.k + kv_start, call.k_stride(), n * kKeys, call.keys,
                                         call.dim);
    const int key = n * kKeys + thread;
    if (call.bias && thread < kKeys)
      copy_async_4(&shared.bias[buffer][thread], call.bias_of(b, head) + (key < call.keys ? key : 0), key < call.keys);
  };

  const Seen found = Seen::of(call, b, first, Shared::kRows);
  if (thread == 0) shared.seen = found;
  const Seen& seen = shared.seen;  // the loop has no registers to spare
  const int end = found.end<kKeys>();
  int n = found.begin<kKeys>(), buffer = 0;
  Tile::template copy<Shared::kRows, kThreads>(shared.q, call.q + call.q_start(b, head), call.q_stride(), first,
                                               call.queries, call.dim);
  if (n < end) fetch_keys(n, buffer);
  copy_async_commit();
  const unsigned char* my_q = shared.q + warp_row * Tile::kRowBytes;

  uint32_t held[Tile::kSteps][kTiles][4];
  if constexpr (kHoldQueries) {
    copy_async_wait<0>();
    __syncthreads();
    UNROLL
    for (int step = 0; step < Tile::kSteps; ++step) Tile::load_left(held[step], my_q, Tile::left_lane(), step);
  }
  const int left_lane = Tile::left_lane(), right_lane = Tile::right_lane();
  Sums<kTiles, kDim / 8> out;
  Softmax<kTiles> softmax;
  clear(out);
  softmax.begin();

  while (n < end) {
    copy_async_wait<0>();
    __syncthreads();  // these keys have come; nobody reads the values and keys before them any more
    const int next = seen.next<kKeys>(n);
    Tile::template copy<kKeys, kThreads>(shared.v, call.v + kv_start, call.k_stride(), n * kKeys, call.keys, call.dim);
    copy_async_commit();
    if (next < end) fetch_keys(next, 1 - buffer);
    copy_async_commit();

    Sums<kTiles, kKeys / 8> scores;
    if (call.bias)
      begin_with(scores, shared.bias[buffer]);
    else
      clear(scores);
    if constexpr (kHoldQueries)
      Tile::add_row_products(scores, held, shared.k[buffer], right_lane);
    else
      Tile::add_row_products(scores, my_q, left_lane, shared.k[buffer], right_lane);
    if (!seen.whole<kKeys>(n))
      hide(scores, call, b, first + warp_row + lane / 4, n * kKeys + lane % 4 * 2, seen.prefix);
    softmax.add(scores, out, scale);
    copy_async_wait<1>();  // all but the next keys
    __syncthreads();
    Tile::add_weighted_rows(out, scores, shared.v, left_lane);
    n = next;
    buffer = 1 - buffer;
  }
  copy_async_wait<0>();
  __syncthreads();  // if no key is seen, queries may have been on their way until now

  UNROLL
  for (int i = 0; i < kTiles; ++i)
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[i][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const float inverse = sum == 0 ? 0.f : 1 / sum;
      UNROLL
      for (int c = 0; c < kDim / 8; ++c) out[i][c][2 * half] *= inverse, out[i][c][2 * half + 1] *= inverse;
      const int query = first + warp_row + i * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && query < call.queries)
        call.lse[call.lse_start(b, head) + query] =
            sum == 0 ? 0.f : softmax.largest[i][half] * (scale * kLn2) + logf(sum);
    }
  Tile::store(shared.q + warp_row * Tile::kRowBytes, out, call.out + call.q_start(b, head), call.q_stride(),
              first + warp_row, call.queries, call.dim);
}

// ---- the host's side

template <class T, int kDim, int kTiles>
void attend_with(const Attention<T>& call, float scale, cudaStream_t stream) {
  using Shared = Shared<kDim, kTiles>;
  const dim3 blocks((call.queries + Shared::kRows - 1) / Shared::kRows, call.heads, call.batch);
  launch(attend<T, kDim, kTiles>, blocks, kThreads, sizeof(Shared), stream, call, scale);
}

/// Blocks of 128 queries if they are enough for the whole GPU, else of 64.
template <class T, int kDim>
void attend_in_blocks(const Attention<T>& call, float scale, cudaStream_t stream) {
  if (enough_blocks(call.batch, call.heads, call.queries)) return attend_with<T, kDim, 2>(call, scale, stream);
  attend_with<T, kDim, 1>(call, scale, stream);
}

template <class T>
void attend_aligned(const Attention<T>& call, float scale, cudaStream_t stream) {
  at_width(call.dim, [&](auto width) { attend_in_blocks<T, width()>(call, scale, stream); });
}

}  // namespace

template <class T>
void attention_mma_forward(const Attention<T>& call, cudaStream_t stream) {
  const float scale = call.scale_log2();
  if (call.rows_at_16_bytes()) return attend_aligned(call, scale, stream);
  const int64_t queries = static_cast<int64_t>(call.batch) * call.queries * call.heads;
  const int64_t keys = static_cast<int64_t>(call.batch) * call.keys * call.kv_heads;
  const WideRows<T> q(call.q, queries, call.dim, stream), k(call.k, keys, call.dim, stream),
      v(call.v, keys, call.dim, stream), out(queries, call.dim, stream);
  Attention<T> wide = call;
  wide.dim = whole_chunks(call.dim);
  wide.q = q.get(), wide.k = k.get(), wide.v = v.get(), wide.out = out.get();
  attend_aligned(wide, scale, stream);
  out.copy_to(call.out);
}

template void attention_mma_forward(const Attention<bf16>&, cudaStream_t);
template void attention_mma_forward(const Attention<fp16>&, cudaStream_t);

}  // namespace run_llm
