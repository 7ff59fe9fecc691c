// The pieces of attention_decode.h for bf16 and fp16, on the tensor cores: 16 rows cost no more than one, so that all
// query heads of a key head, and several tokens, ride along with one reading of the cache.
//
// The fragments of keys and values for m16n8k16 are filled straight from memory, with loads of 16 bytes and no detour
// through shared memory (where only the queries' lie, for want of registers):
// - A product's sum may run over the columns of a key in any order. Lane (g, p) = (lane / 4, lane % 4) reads the 8
//   columns from 32 i + 8 p on, of key g and of query rows g, g + 8: in step 2 i of the product they pass for columns
//   2 p, 2 p + 1, 2 p + 8, 2 p + 9 (the first four) and in step 2 i + 1 for the same ones (the last four).
// - The columns of out may lie in any order as well. Lane (g, p) reads the 8 columns from 64 c + 8 g on, of the values
//   of keys 2 p, 2 p + 1, 2 p + 8, 2 p + 9: number t of them is column g of tile t. Two keys' numbers are put side by
//   side in a register, as the fragment wants them; the lane's results are then the 16 columns from 64 c + 16 p on.
// - The scores of two tiles of 8 keys lie as the weights' fragment over 16 keys has to, as always in FlashAttention-2.
#include "attention_decode.h"

namespace run_llm {
namespace {

constexpr int kKeys = 16, kStep = kDecodeWarps * kKeys;  // positions that a warp, and a block, take at a time

template <int kDim>
struct Shared {
  uint32_t q[kDim / 16][4][8][4];  // the queries' fragments: step, 8 x 8 matrix, row of it, pair of columns
  States<kDecodeWarps, kDecodeMmaRows, kDim> states;
};

/// Eight numbers of a row of `dim` at `column`, two a word; zeros from `dim` on, or if not `valid`.
template <bool kVectors, class T>
DEVICE void load_eight(uint32_t (&to)[4], const T* row, int column, int dim, bool valid) {
  if constexpr (kVectors) {
    load_once_16(to, row + column, valid && column < dim);
  } else {
    const auto bits = [&](int at) { return valid && at < dim ? static_cast<uint32_t>(row[at].bits) : 0u; };
    UNROLL
    for (int i = 0; i < 4; ++i) to[i] = bits(column + 2 * i) | bits(column + 2 * i + 1) << 16;
  }
}

/// Number `which` of each of two words, side by side.
DEVICE uint32_t side_by_side(uint32_t first, uint32_t second, int which) {
  return which ? (first >> 16 | (second & 0xffff0000u)) : ((first & 0xffffu) | second << 16);
}

template <class T, int kDim, bool kVectors, class Cache>
KERNEL_FUNCTION __launch_bounds__(kDecodeThreads) attend_pieces(Decode<T, Cache> call, float scale) {
  constexpr int kChunks = kDim / 32, kHalves = kDim / 64;  // 16 bytes of a lane's key, and of its values
  const Piece piece = Piece::of<kDecodeMmaRows, kStep>(call);
  if (piece.begin == piece.end) return leave_nothing<kDecodeMmaRows>(call, piece);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, p = lane % 4;

  Shared<kDim>& shared = *shared_memory<Shared<kDim>>();
  int ends[2];  // of rows g and g + 8
  const float* bias[2];
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = piece.first + g + 8 * half;
    const bool valid = row < call.rows();
    ends[half] = cut(piece.end_of(call, g + 8 * half), 0, piece.end);
    bias[half] = call.bias && valid ? call.bias_of(piece.b, piece.kv, row) : nullptr;
    const T* from = call.q + (valid ? call.row_of_out(piece.b, piece.kv, row) : 0) * call.dim;
    if (warp < kChunks) {  // all warps have the same queries: each puts one chunk there
      uint32_t words[4];
      load_eight<kVectors>(words, from, 32 * warp + 8 * p, call.dim, valid);
      UNROLL
      for (int n = 0; n < 4; ++n) shared.q[2 * warp + n / 2][half + n % 2 * 2][g][p] = words[n];
    }
  }
  __syncthreads();

  uint32_t keys[2][kChunks][4], values[4][kHalves][4];
  const auto row_at = [&](const T* from, int key) {
    return from + call.cache.at(piece.b, piece.kv, key < piece.end ? key : piece.begin);
  };
  const auto load_keys = [&](int first) {
    UNROLL
    for (int n = 0; n < 2; ++n) {
      const int key = first + 8 * n + g;
      const T* row = row_at(call.k, key);
      UNROLL
      for (int i = 0; i < kChunks; ++i)
        load_eight<kVectors>(keys[n][i], row, 32 * i + 8 * p, call.dim, key < piece.end);
    }
  };
  const auto load_values = [&](int first) {
    UNROLL
    for (int n = 0; n < 4; ++n) {
      const int key = first + 2 * p + n % 2 + n / 2 * 8;
      const T* row = row_at(call.v, key);
      UNROLL
      for (int c = 0; c < kHalves; ++c)
        load_eight<kVectors>(values[n][c], row, 64 * c + 8 * g, call.dim, key < piece.end);
    }
  };

  float largest[2] = {kNoScore, kNoScore}, sum[2] = {0, 0}, out[kHalves][8][4];
  UNROLL
  for (int i = 0; i < kHalves * 32; ++i) out[i / 32][i / 4 % 8][i % 4] = 0;
  int first = piece.begin + warp * kKeys;
  if constexpr (kVectors) {  // numbers read one by one take more registers: they are not read ahead
    load_keys(first);
    load_values(first);
  }
  for (; first < piece.end; first += kStep) {
    if constexpr (!kVectors) load_keys(first);
    float scores[2][4] = {};  // row g, keys 8 n + 2 p and the next; row g + 8, the same
    UNROLL
    for (int step = 0; step < 2 * kChunks; ++step) {
      uint32_t q[4];
      load_matrices<false>(q, shared.q[step][lane / 8][lane % 8]);
      UNROLL
      for (int n = 0; n < 2; ++n) {
        const uint32_t column[2] = {keys[n][step / 2][step % 2 * 2], keys[n][step / 2][step % 2 * 2 + 1]};
        multiply_16x8x16<T>(scores[n], q, column);
      }
    }
    if constexpr (kVectors) load_keys(first + kStep);

    UNROLL
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const int key = first + 8 * (e / 2) + 2 * p + e % 2;
        float& score = scores[e / 2][2 * half + e % 2];
        const bool sees = key < ends[half];
        const float added = bias[half] && sees ? bias_term(bias[half][key]) : 0.f;
        score = sees ? (score + added) * scale : kNoScore;
        most = fmaxf(most, score);
      }
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float shift = most == kNoScore ? 0.f : most;  // nothing seen yet: weights of 0
      const float factor = exp2_fast(largest[half] - shift);
      largest[half] = most;
      sum[half] *= factor;
      UNROLL
      for (int e = 0; e < 4; ++e) {
        float& score = scores[e / 2][2 * half + e % 2];
        score = exp2_fast(score - shift);
        sum[half] += score;
      }
      UNROLL
      for (int i = 0; i < kHalves * 16; ++i) out[i / 16][i / 2 % 8][2 * half + i % 2] *= factor;
    }
    if constexpr (!kVectors) load_values(first);
    const uint32_t weights[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                                 pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
    UNROLL
    for (int c = 0; c < kHalves; ++c)
      UNROLL
      for (int t = 0; t < 8; ++t) {
        const uint32_t column[2] = {side_by_side(values[0][c][t / 2], values[1][c][t / 2], t % 2),
                                    side_by_side(values[2][c][t / 2], values[3][c][t / 2], t % 2)};
        multiply_16x8x16<T>(out[c][t], weights, column);
      }
    if constexpr (kVectors) load_values(first + kStep);
  }

  UNROLL
  for (int half = 0; half < 2; ++half) {
    sum[half] += shuffle_xor(sum[half], 1);
    sum[half] += shuffle_xor(sum[half], 2);
    const int row = g + 8 * half;
    if (p == 0) {
      shared.states.largest[warp][row] = largest[half];
      shared.states.sum[warp][row] = sum[half];
    }
    UNROLL
    for (int i = 0; i < kHalves * 4; ++i) {  // columns n + 2 p of tiles t .. t + 3
      const int c = i / 4, n = i / 2 % 2, t = i % 2 * 4, e = 2 * half + n;
      *reinterpret_cast<float4*>(&shared.states.out[warp][row][64 * c + 16 * p + 8 * n + t]) =
          make_float4(out[c][t][e], out[c][t + 1][e], out[c][t + 2][e], out[c][t + 3][e]);
    }
  }
  shared.states.leave(call, piece);
}

template <int kDim, class T, class Cache>
void attend(const Decode<T, Cache>& call, int blocks, cudaStream_t stream) {
  const auto kernel = call.vectors ? attend_pieces<T, kDim, true, Cache> : attend_pieces<T, kDim, false, Cache>;
  launch(kernel, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, sizeof(Shared<kDim>), stream, call,
         call.scale_log2());
}

}  // namespace

template <class T, class Cache>
void attention_decode_mma(const Decode<T, Cache>& call, int blocks, cudaStream_t stream) {
  if (call.dim <= 64) return attend<64>(call, blocks, stream);
  attend<128>(call, blocks, stream);
}
template void attention_decode_mma(const Decode<bf16, Contiguous>&, int, cudaStream_t);
template void attention_decode_mma(const Decode<bf16, Paged>&, int, cudaStream_t);
template void attention_decode_mma(const Decode<fp16, Contiguous>&, int, cudaStream_t);
template void attention_decode_mma(const Decode<fp16, Paged>&, int, cudaStream_t);

}  // namespace run_llm
