// fp32 products on the tensor cores, as three products of tf32 numbers each (3xTF32).
//
// A tf32 number has fp32's exponent and 11 significant bits. x = big + small, both tf32, is right to 2^-23 of x; of
// the four products of two such sums the one of the small parts is left out: 2^-22 of the result at most.
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

  DEVICE void set(int i, float x) {
    big[i] = to_tf32(x);
    float rounded;
    std::memcpy(&rounded, &big[i], sizeof rounded);
    small[i] = to_tf32(x - rounded);
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

/// sums [16][8 kTiles] = 16 rows of `left` times 8 kTiles rows of `right`, kDim numbers long. Of both the address is
/// that of row lane / 4, column 4 (lane % 4): a lane reads 4 neighbours, terms of two steps of 8.
template <int kTiles, int kDim>
DEVICE void multiply_rows_tf32(float (&sums)[kTiles][4], const float* left, int left_stride, const float* right,
                               int right_stride) {
  clear(sums);
#pragma unroll 1  // a step is long enough, and two at once take too many registers
  for (int d = 0; d < kDim; d += 16) {
    const float4 row = *reinterpret_cast<const float4*>(left + d);
    const float4 row_8 = *reinterpret_cast<const float4*>(left + 8 * left_stride + d);
    const Factor<4> first = left_factor(make_float2(row.x, row.y), make_float2(row_8.x, row_8.y));
    const Factor<4> second = left_factor(make_float2(row.z, row.w), make_float2(row_8.z, row_8.w));
    UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const float4 other = *reinterpret_cast<const float4*>(right + j * 8 * right_stride + d);
      add_product(sums[j], first, right_factor(other.x, other.y));
      add_product(sums[j], second, right_factor(other.z, other.w));
    }
  }
}

/// 32 columns of a product: sums[e] holds the columns e, e + 4, e + 8, ...: lane 4 r + t has the columns 8 t .. 8 t + 7
/// of the rows r and r + 8. They become weights [16][8 kTiles] times as many rows of `right`, whose address is that of
/// row 2 (lane % 4), column 4 (lane / 4).
template <int kTiles>
DEVICE void multiply_weights_tf32(float (&sums)[4][4], const Factor<4> (&weights)[kTiles], const float* right,
                                  int right_stride) {
  clear(sums);
  UNROLL
  for (int j = 0; j < kTiles; ++j) {
    const float4 first = *reinterpret_cast<const float4*>(right + j * 8 * right_stride);
    const float4 second = *reinterpret_cast<const float4*>(right + (j * 8 + 1) * right_stride);
    add_product(sums[0], weights[j], right_factor(first.x, second.x));
    add_product(sums[1], weights[j], right_factor(first.y, second.y));
    add_product(sums[2], weights[j], right_factor(first.z, second.z));
    add_product(sums[3], weights[j], right_factor(first.w, second.w));
  }
}

/// Sums of zero, for add_weighted_tf32.
template <int kChunks>
DEVICE void clear_sums(float (&sums)[kChunks][4][4]) {
  UNROLL
  for (int c = 0; c < kChunks; ++c) clear(sums[c]);
}

/// sums += weights [16][8 kTiles] times as many rows of `right`, as above. Tensor cores cut off what does not fit a sum
/// instead of rounding it: so the products of at most 32 rows are summed on their own there and added by the fp32
/// units, or long sums would drift towards zero.
template <int kChunks, int kTiles>
DEVICE void add_weighted_tf32(float (&sums)[kChunks][4][4], const float (&weights)[kTiles][4], const float* right,
                              int right_stride) {
  constexpr int kAtOnce = kTiles < 4 ? kTiles : 4;
  UNROLL
  for (int j = 0; j < kTiles; j += kAtOnce) {
    Factor<4> factors[kAtOnce];
    UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const float(&tile)[4] = weights[j + i];
      factors[i] = left_factor(make_float2(tile[0], tile[1]), make_float2(tile[2], tile[3]));
    }
    UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (kChunks > 2) __syncwarp();  // or the compiler fetches all chunks at once and runs out of registers
      float products[4][4];
      multiply_weights_tf32(products, factors, right + j * 8 * right_stride + 32 * c, right_stride);
      UNROLL
      for (int e = 0; e < 4; ++e)
        UNROLL
        for (int i = 0; i < 4; ++i) sums[c][e][i] += products[e][i];
    }
  }
}

/// Row r (half 0) or r + 8 (half 1) of sums as add_weighted_tf32 leaves them, 32 columns each, times `factor`.
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
