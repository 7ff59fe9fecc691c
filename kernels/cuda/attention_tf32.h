// fp32 products on the tensor cores, as three products of tf32 numbers each (3xTF32).
//
// A tf32 number has fp32's exponent and 11 significant bits. x = big + small: big is x rounded to tf32, small the rest,
// of which tensor cores read the first 11 bits, so that the two are x but for 2^-22 of it. Of the four products of two
// such sums the one of the small parts is left out: 2^-22 of the result at most.
//
// The sums of a 16 x 8 product lie in a warp's lanes as [row / 8 * 2 + column % 2] of lane 4 (row % 8) + column / 2.
// Which of the 8 terms of a sum a lane holds is free, as long as both factors agree: with terms 2 t and 2 t + 1 in lane
// t of 4, where the instruction speaks of t and t + 4, weights are factors in the lanes that computed them, and a
// lane's numbers are neighbours in memory.
#pragma once

#include <cstring>

#include "attention_fp32.h"

namespace run_llm {

/// kCount numbers of a lane: 4 of a left factor [16 x 8], 2 of a right one [8 x 8].
template <int kCount>
struct Factor {
  uint32_t big[kCount], small[kCount];

  /// Three instructions. cvt.rna.tf32 would take seven for both: ptxas makes it of an addition, a comparison for
  /// infinities and NaNs, and a choice. These need none: an infinity stays one, and of a NaN `small` is one.
  DEVICE void set(int i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    big[i] = (bits + 0x1000u) & ~0x1fffu;
    float rounded;
    std::memcpy(&rounded, &big[i], sizeof rounded);
    const float rest = x - rounded;
    std::memcpy(&small[i], &rest, sizeof rest);
  }
};

/// The left factor of rows r and r + 8 with the lane's two terms of each.
DEVICE Factor<4> left_factor(float2 row, float2 row_8) {
  Factor<4> factor;
  factor.set(0, row.x);
  factor.set(1, row_8.x);
  factor.set(2, row.y);
  factor.set(3, row_8.y);
  return factor;
}

DEVICE Factor<2> right_factor(float first, float second) {
  Factor<2> factor;
  factor.set(0, first);
  factor.set(1, second);
  return factor;
}

/// sum += left * right, the small products first.
DEVICE void add_product(float (&sum)[4], const Factor<4>& left, const Factor<2>& right) {
  multiply_16x8x8_tf32(sum, left.small, right.big);
  multiply_16x8x8_tf32(sum, left.big, right.small);
  multiply_16x8x8_tf32(sum, left.big, right.big);
}

/// Products of kDown * 16 rows and kTiles * 8 columns.
template <int kDown, int kTiles>
using Products = float[kDown][kTiles][4];

/// Rows of kDim numbers in shared memory, as they come there and are multiplied.
///
/// Shared memory has 32 banks of 4 bytes, and serves 8 lanes that read 16 bytes each at once if no two meet in a bank.
/// In a product of rows those lanes read the columns 4 t .. 4 t + 3 (t = lane % 4) of two neighbouring rows, half of
/// the banks each; in a product of weights the columns 4 r .. 4 r + 3 (r = lane / 4) of four rows two apart, a quarter
/// each. Rows begin in the same bank. So the quarters of each 32 columns change places by an exclusive or with a
/// row's turn: 0, 1, 2, 3 for the rows 0, 2, 4, 6, which leads them apart; 2, 3, 0, 1 for the rows 1, 3, 5, 7, half of
/// the banks away from the row before. No read and no copy meets a bank twice. (Rows 4 numbers longer would do for
/// weights alone, rows 16 longer for rows alone; and of such rows no two blocks of the backward at D 128 fit into an
/// A100.)
template <int kDim>
struct Rows {
  static_assert(kDim % 32 == 0);

  /// Numbers from the first row's begin to a column of a row.
  static DEVICE int offset(int row, int column) {
    const int turn = (row / 2 % 4) ^ (row % 2 * 2);
    return row * kDim + (column ^ (8 * turn));
  }
  /// From the offset of one of the first 16 columns to that of the column d further on, a multiple of 16.
  static DEVICE int along(int offset, int d) { return (offset ^ (d & 16)) + (d & ~16); }
  /// Where a lane begins to read in a product of rows, and in one of weights.
  static DEVICE int rows_lane() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return offset(lane / 4, lane % 4 * 4);
  }
  static DEVICE int weights_lane() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return offset(lane % 4 * 2, lane / 4 * 4);
  }

  /// Rows [first, first + kCount) of a head, `stride` numbers apart, into shared memory; zeros for rows from `rows` on
  /// and columns from `dim` on. kVectors: rows begin at multiples of 16 bytes.
  /// Asynchronous: the caller commits and waits.
  template <int kCount, int kThreads, bool kVectors>
  static DEVICE void copy(float* to, const float* from, int64_t stride, int first, int rows, int dim) {
    constexpr int kStep = kVectors ? 4 : 1, kAcross = 32 / kStep, kPass = kThreads / kAcross;
    static_assert(kCount % kPass == 0);
    const int thread = fresh(static_cast<int>(threadIdx.x)), column = thread % kAcross * kStep;
#pragma unroll(kVectors ? kCount / kPass : 1)
    for (int row = thread / kAcross; row < kCount; row += kPass) {
      const float* source = from + (first + row) * stride + column;
      UNROLL
      for (int c = 0; c < kDim; c += 32) {
        const bool valid = first + row < rows && column + c < dim;
        if constexpr (kVectors)
          copy_async_16(to + offset(row, column) + c, valid ? source + c : from, valid);
        else
          copy_async_4(to + offset(row, column) + c, valid ? source + c : from, valid);
      }
    }
  }

  /// sums = kDown * 16 rows of `left` times kTiles * 8 rows of `right`, along kDim. A lane reads 4 neighbours, terms of
  /// two steps of 8.
  template <int kDown, int kTiles>
  static DEVICE void multiply(Products<kDown, kTiles>& sums, const float* left, const float* right, int lane) {
    UNROLL
    for (int i = 0; i < kDown; ++i) clear(sums[i]);
#pragma unroll 1  // a step is long enough, and two at once take too many registers
    for (int d = 0; d < kDim; d += 16) {
      const int at = along(lane, d);
      Factor<4> first[kDown], second[kDown];
      UNROLL
      for (int i = 0; i < kDown; ++i) {
        const float4 row = *reinterpret_cast<const float4*>(left + i * 16 * kDim + at);
        const float4 row_8 = *reinterpret_cast<const float4*>(left + (i * 16 + 8) * kDim + at);
        first[i] = left_factor(make_float2(row.x, row.y), make_float2(row_8.x, row_8.y));
        second[i] = left_factor(make_float2(row.z, row.w), make_float2(row_8.z, row_8.w));
      }
      UNROLL
      for (int j = 0; j < kTiles; ++j) {
        const float4 other = *reinterpret_cast<const float4*>(right + j * 8 * kDim + at);
        const Factor<2> other_first = right_factor(other.x, other.y), other_second = right_factor(other.z, other.w);
        UNROLL
        for (int i = 0; i < kDown; ++i) add_product(sums[i][j], first[i], other_first);
        UNROLL
        for (int i = 0; i < kDown; ++i) add_product(sums[i][j], second[i], other_second);
      }
    }
  }

  /// The sums of an output: [row tile][32 columns][e]; those of e are the columns e, e + 4, e + 8, ...: lane 4 r + t
  /// has the columns 8 t .. 8 t + 7 of the rows r and r + 8.
  template <int kDown>
  using Sums = float[kDown][kDim / 32][4][4];

  template <int kDown>
  static DEVICE void clear_sums(Sums<kDown>& sums) {
    UNROLL
    for (int i = 0; i < kDown; ++i)
      UNROLL
      for (int c = 0; c < kDim / 32; ++c) clear(sums[i][c]);
  }

  /// sums += weights [kDown * 16][kTiles * 8] times as many rows of `right`. Tensor cores cut off what does not fit a
  /// sum instead of rounding it: so the products of at most 32 rows are summed on their own there and added by the fp32
  /// units, or long sums would drift towards zero.
  template <int kDown, int kTiles>
  static DEVICE void add_weighted(Sums<kDown>& sums, const Products<kDown, kTiles>& weights, const float* right,
                                  int lane) {
    constexpr int kAtOnce = kTiles < 4 ? kTiles : 4;
    UNROLL
    for (int j = 0; j < kTiles; j += kAtOnce) {
      Factor<4> factors[kDown][kAtOnce];
      UNROLL
      for (int i = 0; i < kDown; ++i)
        UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          const float(&tile)[4] = weights[i][j + n];
          factors[i][n] = left_factor(make_float2(tile[0], tile[1]), make_float2(tile[2], tile[3]));
        }
      UNROLL
      for (int c = 0; c < kDim / 32; ++c) {
        if constexpr (kDim > 64) __syncwarp();  // or the compiler fetches all columns at once: too many registers
        Products<kDown, 4> products;
        multiply_weights(products, factors, right + j * 8 * kDim + 32 * c, lane);
        UNROLL
        for (int i = 0; i < kDown; ++i)
          UNROLL
          for (int e = 0; e < 4; ++e)
            UNROLL
            for (int n = 0; n < 4; ++n) sums[i][c][e][n] += products[i][e][n];
      }
    }
  }

 private:
  /// 32 columns of such a product.
  template <int kDown, int kTiles>
  static DEVICE void multiply_weights(Products<kDown, 4>& sums, const Factor<4> (&weights)[kDown][kTiles],
                                      const float* right, int lane) {
    const int next = (lane ^ 16) + kDim;  // the next row, turned by 16 columns more
    UNROLL
    for (int i = 0; i < kDown; ++i) clear(sums[i]);
    UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const float4 first = *reinterpret_cast<const float4*>(right + j * 8 * kDim + lane);
      const float4 second = *reinterpret_cast<const float4*>(right + j * 8 * kDim + next);
      const Factor<2> columns[4] = {right_factor(first.x, second.x), right_factor(first.y, second.y),
                                    right_factor(first.z, second.z), right_factor(first.w, second.w)};
      UNROLL
      for (int e = 0; e < 4; ++e)
        UNROLL
        for (int i = 0; i < kDown; ++i) add_product(sums[i][e], weights[i][j], columns[e]);
    }
  }
};

/// Row r (half 0) or r + 8 (half 1) of a tile of sums, times `factor`, to a row in memory.
template <bool kVectors, int kChunks>
DEVICE void store_row_tf32(float* row, const float (&sums)[kChunks][4][4], int half, float factor, int dim) {
  UNROLL
  for (int c = 0; c < kChunks; ++c)
    UNROLL
    for (int side = 0; side < 2; ++side) {
      float four[4];
      UNROLL
      for (int e = 0; e < 4; ++e) four[e] = sums[c][e][2 * half + side] * factor;
      store_row<4, kVectors>(row, four, 32 * c + 8 * static_cast<int>(threadIdx.x % 4) + 4 * side, 0, dim);
    }
}

void attention_tf32_backward(const Attention<float>& call, cudaStream_t stream);
void attention_tf32_forward(const Attention<float>& call, cudaStream_t stream);

}  // namespace run_llm
