// The operators of attention_decode.h: their arguments, how many pieces there are, and the kernel that merges them.
#include "attention_decode.h"

using namespace run_llm;

namespace run_llm {
namespace {

constexpr int kBlocksEach = 4;      // blocks that a multiprocessor is given: two at a time, in two rounds
constexpr int kShortestPiece = 64;  // positions; shorter ones cost more to merge than they save

DEVICE void store(float* to, float x) { *to = x; }
template <class T>
DEVICE void store(T* to, float x) {
  to->bits = static_cast<uint16_t>(pack<T>(x, 0.f));
}

/// One row of out a block: lane i of every warp has columns 4 i .. 4 i + 3, and every fourth piece is a warp's.
template <class T, class Cache>
KERNEL_FUNCTION __launch_bounds__(kDecodeThreads) merge_pieces(Decode<T, Cache> call) {
  struct Shared {
    float4 sums[kDecodeWarps][32];
    float weights[kMostPieces];
  };
  Shared& shared = *shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row = blockIdx.x, first = row * call.pieces;

  float most = kNoScore, total = 0;
  for (int n = lane; n < call.pieces; n += 32) most = fmaxf(most, call.largest[first + n]);
  UNROLL
  for (int other = 16; other > 0; other /= 2) most = fmaxf(most, shuffle_xor(most, other));
  for (int n = lane; n < call.pieces; n += 32) {
    const float largest = call.largest[first + n];
    const float weight = largest == kNoScore ? 0.f : exp2_fast(largest - most);
    if (warp == 0) shared.weights[n] = weight;
    total += weight * call.sum[first + n];
  }
  UNROLL
  for (int other = 16; other > 0; other /= 2) total += shuffle_xor(total, other);
  __syncthreads();

  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int n = warp; n < call.pieces; n += kDecodeWarps) {
    const float weight = shared.weights[n];
    if (weight == 0 || 4 * lane >= call.part_stride) continue;  // an empty piece has left no sum
    const float4 part = *reinterpret_cast<const float4*>(call.part + (first + n) * call.part_stride + 4 * lane);
    sum.x += weight * part.x;
    sum.y += weight * part.y;
    sum.z += weight * part.z;
    sum.w += weight * part.w;
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (thread >= call.dim) return;
  float out = 0;
  UNROLL
  for (int n = 0; n < kDecodeWarps; ++n) out += reinterpret_cast<const float*>(shared.sums[n])[thread];
  store(call.out + row * call.dim + thread, total == 0 ? 0.f : out / total);
}

template <class T, class Cache>
void attend(Decode<T, Cache>& call, cudaStream_t stream) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  call.vectors = call.dim * sizeof(T) % 16 == 0 && aligned(call.q) && aligned(call.k) && aligned(call.v);
  constexpr bool kExact = sizeof(T) == sizeof(float);
  const int most_rows = kExact ? attention_decode_fp32_rows(call.rows(), call.vectors) : kDecodeMmaRows;
  const int64_t tiles = (call.rows() + most_rows - 1) / most_rows;
  const int64_t blocks = tiles * call.kv_heads * call.batch;
  const int64_t longest = (call.cache.positions + kShortestPiece - 1) / kShortestPiece;
  const int64_t filling = (static_cast<int64_t>(kBlocksEach) * multiprocessors() + blocks - 1) / blocks;
  call.pieces = static_cast<int>(filling < longest ? filling : longest);
  if (call.pieces > kMostPieces) call.pieces = kMostPieces;

  const int64_t rows = static_cast<int64_t>(call.batch) * call.tokens * call.heads, parts = rows * call.pieces;
  call.part_stride = (call.dim + 3) / 4 * 4;
  const Scratch<float> memory(static_cast<size_t>(parts * (call.part_stride + 2)), stream);
  call.part = memory.get();
  call.largest = call.part + parts * call.part_stride;
  call.sum = call.largest + parts;
  if constexpr (kExact)
    attention_decode_fp32(call, static_cast<int>(blocks * call.pieces), stream);
  else
    attention_decode_mma(call, static_cast<int>(blocks * call.pieces), stream);
  constexpr size_t kShared = sizeof(float4) * kDecodeThreads + sizeof(float) * kMostPieces;
  launch(merge_pieces<T, Cache>, dim3(static_cast<unsigned>(rows)), kDecodeThreads, kShared, stream, call);
}

int small(const Args& args, const char* argument, const char* size) {
  args.require(args.size(size) < 1 << 30, argument, "a size of 2^30 or more");
  return static_cast<int>(args.size(size));
}

template <class T, class Cache>
void take_query(Args& args, Decode<T, Cache>& call) {
  call.q = args.input<T>("q", "B S H D");
  call.batch = small(args, "q", "B");
  call.tokens = small(args, "q", "S");
  call.heads = small(args, "q", "H");
  call.dim = small(args, "q", "D");
  args.require(call.dim <= kMostDim, "q", kTooWide);
  args.require(args.size("B") * args.size("S") < 1 << 30 && args.size("B") * args.size("S") * args.size("H") < 1 << 30,
               "q", "2^30 rows or more");
}

/// What comes behind the cache.
template <class T, class Cache>
void take_rest(Args& args, Decode<T, Cache>& call) {
  call.kv_start = args.input<int32_t>("kv_start", "B");
  if (args.absent()) {
    args.skip();
  } else {
    call.bias = args.input<float>("bias", "R H W");
    const int64_t rows = args.size("R");
    args.require(args.size("W") == call.cache.positions, "bias", "its last size must be the positions of the cache");
    args.require(rows == 1 || rows == call.batch, "bias", "its first size must be 1 or the batch");
    call.bias_row = rows > 1 ? static_cast<int64_t>(call.heads) * call.cache.positions : 0;
  }
  call.out = args.output<T>("out", "B S H D");
  args.done();
}

template <class T>
void cached(Args& args) {
  Decode<T, Contiguous> call{};
  take_query(args, call);
  call.k = args.input<T>("k", "N T D");
  call.v = args.input<T>("v", "N T D");
  args.require(args.size("N") % call.batch == 0, "k", "its first size must be a multiple of the batch");
  call.kv_heads = static_cast<int>(args.size("N") / call.batch);
  args.require(call.heads % call.kv_heads == 0, "k", "its heads must divide those of q");
  call.cache = {small(args, "k", "T"), call.kv_heads, call.dim, args.input<int32_t>("columns", "S")};
  take_rest(args, call);
  attend(call, static_cast<cudaStream_t>(args.stream()));
}

template <class T>
void paged(Args& args) {
  Decode<T, Paged> call{};
  take_query(args, call);
  call.k = args.input<T>("k_pages", "NB P K D");
  call.v = args.input<T>("v_pages", "NB P K D");
  call.kv_heads = small(args, "k_pages", "K");
  args.require(call.heads % call.kv_heads == 0, "k_pages", "its heads must divide those of q");
  Paged& cache = call.cache;
  cache.heads = call.kv_heads;
  cache.dim = call.dim;
  cache.tokens = call.tokens;
  cache.pages = small(args, "k_pages", "NB");
  cache.page = small(args, "k_pages", "P");
  cache.in_pages = Quotient::by(cache.page);
  cache.block_table = args.input<int32_t>("block_table", "B M");
  cache.blocks = small(args, "block_table", "M");
  const int64_t positions = static_cast<int64_t>(cache.blocks) * cache.page;
  args.require(positions < 1 << 30, "block_table", "2^30 positions or more");
  cache.positions = static_cast<int>(positions);
  cache.lengths = args.input<int32_t>("kv_len", "B");
  take_rest(args, call);
  attend(call, static_cast<cudaStream_t>(args.stream()));
}

}  // namespace
}  // namespace run_llm

KERNEL(attention_cached) {
  if (args.next_is("bfloat16")) return cached<bf16>(args);
  if (args.next_is("float16")) return cached<fp16>(args);
  if (args.next_is("float32")) return cached<float>(args);
  args.require(false, "q", kDtypes);
}

KERNEL(attention_paged) {
  if (args.next_is("bfloat16")) return paged<bf16>(args);
  if (args.next_is("float16")) return paged<fp16>(args);
  if (args.next_is("float32")) return paged<float>(args);
  args.require(false, "q", kDtypes);
}
