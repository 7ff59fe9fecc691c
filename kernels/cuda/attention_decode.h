// Attention of a few new tokens over a long cache of keys and values, as generation needs it ("flash decoding").
//
//   attention_cached(q [B S H D], k [N T D], v [N T D], columns int32 [S], kv_start int32 [B], bias) -> out [B S H D]
//   attention_paged(q [B S H D], k_pages [NB P K D], v_pages [NB P K D], block_table int32 [B M], kv_len int32 [B],
//                   kv_start int32 [B], bias) -> out [B S H D]
//
// attention_cached is the operator of kernels/cpu/attention_cached.cpp: N = B * K, heads lie outside positions, token s
// of row b sees the positions kv_start[b] <= j <= columns[s]. attention_paged reads a cache in pages of P positions, of
// which block_table[b] lists those of row b: position j lies in slot j % P of page block_table[b][j / P]. Its S tokens
// are the last of the row's kv_len[b]: token s sees kv_start[b] <= j <= kv_len[b] - S + s. q, k, v and out are all
// float32, all bfloat16 or all float16; D is at most 128. bias float32 [1 | B, H, T or M * P], or [1] for none, is
// added to the products before they are scaled by 1 / sqrt(D). A token that sees nothing gives 0. What lies on the
// device (columns, lengths, block numbers) cannot be checked before the launch: it is cut to what is legal where it is
// read.
//
// Such a call does next to nothing with each number it reads, so all depends on reading the cache once, at the full
// rate of the memory. Therefore
// - the rows of a block are the S tokens of all query heads that share a key head: each key is read once for them all;
// - the positions of a row are cut into pieces, as many as fill the GPU, each a block of its own: it leaves the largest
//   score, the sum of weights and the weighted sum of values, which a second kernel merges in the order of the pieces.
//   How many pieces there are follows from sizes and device alone; where they end, from the row's true length;
// - loads take 16 bytes, and those of the next keys are on their way while the present ones are dealt with.
//
// Any S is right, but rows beyond one block's read the keys again: a prompt of many tokens, whose keys are all new,
// belongs into attention_forward.
#pragma once

#include "attention.h"

namespace run_llm {

constexpr int kDecodeThreads = 128, kDecodeWarps = kDecodeThreads / 32;
constexpr int kMostPieces = 128;
constexpr float kNoScore = -INFINITY;

DEVICE int cut(int x, int least, int most) { return x < least ? least : x > most ? most : x; }

/// Where the cache of attention_cached has position j, and where what token s sees ends.
struct Contiguous {
  int positions, heads, dim;
  const int* columns;

  DEVICE int64_t at(int b, int kv, int j) const {
    return ((static_cast<int64_t>(b) * heads + kv) * positions + j) * dim;
  }
  DEVICE int end(int, int token) const { return cut(columns[token], -1, positions - 1) + 1; }
};

/// x / divisor for 0 <= x < 2^31 and 0 < divisor < 2^31 by a multiplication and a shift. (For a division by a number
/// that it does not know, the compiler makes a dozen instructions.) `factor` is 2^shift / divisor, rounded up, and
/// divisor <= 2^(shift - 31): so x * factor / 2^shift is beyond x / divisor by less than x / 2^shift <= 1 / divisor,
/// too little to reach the next whole number.
struct Quotient {
  uint32_t factor;
  int shift;

  static Quotient by(int divisor) {
    int shift = 31;
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    return {static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor), shift};
  }
  DEVICE int of(int x) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * factor >> shift);
  }
};

/// The same of attention_paged.
struct Paged {
  int positions, heads, dim;  // of a row: blocks * page
  int tokens, pages, page, blocks;
  Quotient in_pages;
  const int *block_table, *lengths;

  DEVICE int64_t at(int b, int kv, int j) const {
    const int block = in_pages.of(j), slot = j - block * page;
    const int number = cut(block_table[static_cast<int64_t>(b) * blocks + block], 0, pages - 1);
    return ((static_cast<int64_t>(number) * page + slot) * heads + kv) * dim;
  }
  DEVICE int end(int b, int token) const {
    const int seen = cut(lengths[b], 0, positions) - tokens + token + 1;
    return seen > 0 ? seen : 0;
  }
};

/// Arguments of a kernel, passed by value. T: float, bf16 or fp16; Cache: Contiguous or Paged.
template <class T, class Cache>
struct Decode {
  int batch, tokens, heads, kv_heads, dim;
  const T *q, *k, *v;
  Cache cache;
  const int* kv_start;
  const float* bias;  // null: none
  int64_t bias_row;
  T* out;
  bool vectors;  // every row of D numbers begins at a multiple of 16 bytes
  // What the pieces leave: of every row of `out` and every piece, `largest` and `sum`, and `part_stride` numbers of
  // the weighted sum of values.
  int pieces, part_stride;
  float *largest, *sum, *part;

  DEVICE int group() const { return heads / kv_heads; }
  /// Rows that share a key head: token row / group, query head kv * group + row % group.
  DEVICE int rows() const { return tokens * group(); }
  DEVICE int64_t row_of_out(int b, int kv, int row) const {
    return (static_cast<int64_t>(b) * tokens + row / group()) * heads + kv * group() + row % group();
  }
  DEVICE const float* bias_of(int b, int kv, int row) const {
    return bias + b * bias_row + static_cast<int64_t>(kv * group() + row % group()) * cache.positions;
  }
  float scale_log2() const { return kLog2E / std::sqrt(static_cast<float>(dim)); }
};

/// A block's share: rows [first, first + kRows) of a key head, positions [begin, end) of what they see together.
struct Piece {
  int b, kv, first, index, begin, end;

  /// kStep: positions that the block takes at a time.
  template <int kRows, int kStep, class Call>
  static DEVICE Piece of(const Call& call) {
    const int tiles = (call.rows() + kRows - 1) / kRows;
    int block = static_cast<int>(blockIdx.x);  // blocks that read the same keys follow each other
    Piece piece{};
    piece.first = block % tiles * kRows;
    block /= tiles;
    piece.index = block % call.pieces;
    block /= call.pieces;
    piece.kv = block % call.kv_heads;
    piece.b = block / call.kv_heads;
    const int last = cut(piece.first + kRows, 0, call.rows()) - 1;
    int end = 0;
    for (int token = piece.first / call.group(); token <= last / call.group(); ++token) {
      const int own = call.cache.end(piece.b, token);
      end = own > end ? own : end;
    }
    const int start = cut(call.kv_start[piece.b], 0, end);
    const int share = (end - start + call.pieces - 1) / call.pieces, length = (share + kStep - 1) / kStep * kStep;
    piece.begin = cut(start + piece.index * length, start, end);
    piece.end = cut(piece.begin + length, start, end);
    return piece;
  }

  /// Where what a row sees ends; 0 of a row that does not exist.
  template <class Call>
  DEVICE int end_of(const Call& call, int row) const {
    return first + row < call.rows() ? call.cache.end(b, (first + row) / call.group()) : 0;
  }
};

/// What the warps of a block have found, side by side in shared memory. kStates: parts of the block that each saw
/// positions of their own.
template <int kStates, int kRows, int kDim>
struct States {
  static constexpr int kStride = kDim + 4;  // so that a column of rows lies in different banks
  float largest[kStates][kRows], sum[kStates][kRows], out[kStates][kRows][kStride];

  /// Merge them, and leave the result in the call's parts. The block calls it together.
  template <class Call>
  DEVICE void leave(const Call& call, const Piece& piece) const {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * (kDim / 4); i += kDecodeThreads) {
      const int row = i / (kDim / 4), column = i % (kDim / 4) * 4;
      if (piece.first + row >= call.rows() || column >= call.part_stride) continue;
      float most = kNoScore, total = 0;
      UNROLL
      for (int n = 0; n < kStates; ++n) most = fmaxf(most, largest[n][row]);
      float4 merged = make_float4(0, 0, 0, 0);
      UNROLL
      for (int n = 0; n < kStates; ++n) {
        const float weight = largest[n][row] == kNoScore ? 0.f : exp2_fast(largest[n][row] - most);
        const float4 own = *reinterpret_cast<const float4*>(&out[n][row][column]);
        total += weight * sum[n][row];
        merged.x += weight * own.x;
        merged.y += weight * own.y;
        merged.z += weight * own.z;
        merged.w += weight * own.w;
      }
      const int64_t at = call.row_of_out(piece.b, piece.kv, piece.first + row) * call.pieces + piece.index;
      *reinterpret_cast<float4*>(call.part + at * call.part_stride + column) = merged;
      if (column == 0) {
        call.largest[at] = most;
        call.sum[at] = total;
      }
    }
  }
};

/// Leave that the rows of an empty piece have seen nothing.
template <int kRows, class Call>
DEVICE void leave_nothing(const Call& call, const Piece& piece) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kRows || piece.first + row >= call.rows()) return;
  const int64_t at = call.row_of_out(piece.b, piece.kv, piece.first + row) * call.pieces + piece.index;
  call.largest[at] = kNoScore;
  call.sum[at] = 0;
}

/// Rows that a block of a kernel takes, when there are so many that share a key head.
int attention_decode_fp32_rows(int rows, bool vectors);
constexpr int kDecodeMmaRows = 16;

/// The pieces, in exact fp32 on the CUDA cores; in 16 bits on the tensor cores (T: bf16, fp16). `blocks` of them.
template <class Cache>
void attention_decode_fp32(const Decode<float, Cache>& call, int blocks, cudaStream_t stream);
template <class T, class Cache>
void attention_decode_mma(const Decode<T, Cache>& call, int blocks, cudaStream_t stream);

}  // namespace run_llm
