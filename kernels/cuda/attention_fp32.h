// Products of tiles in shared memory by the fp32 units, each thread a small tile in registers; and copies of rows.
#pragma once

#include "attention.h"

namespace run_llm {

/// The weight of a key, from lse in the logarithm of base 2. One that is not seen has none, also where lse is no
/// number.
DEVICE float weight_of(float score, float scale_log2, float lse_log2) {
  return score == kHidden ? 0.f : exp2_fast(score * scale_log2 - lse_log2);
}

/// Rows [first, first + kCount) of a head, `stride` numbers apart, into shared memory, kStride apart; zeros for rows
/// from `rows` on and columns from `dim` on. kVectors: rows begin at multiples of 16 bytes.
/// Asynchronous: the caller commits and waits.
template <int kDim, int kCount, int kStride, int kThreads, bool kVectors>
DEVICE void copy_rows(float* to, const float* from, int64_t stride, int first, int rows, int dim) {
  constexpr int kStep = kVectors ? 4 : 1, kAcross = kDim / kStep;
#pragma unroll(kVectors ? 4 : 1)
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kAcross; i += kThreads) {
    const int row = i / kAcross, column = i % kAcross * kStep;
    const bool valid = first + row < rows && column < dim;
    const float* source = valid ? from + (first + row) * stride + column : from;
    if constexpr (kVectors)
      copy_async_16(to + row * kStride + column, source, valid);
    else
      copy_async_4(to + row * kStride + column, source, valid);
  }
}

/// All numbers zero.
template <int kDown, int kAcross>
DEVICE void clear(float (&numbers)[kDown][kAcross]) {
  UNROLL
  for (int i = 0; i < kDown; ++i)
    UNROLL
    for (int j = 0; j < kAcross; ++j) numbers[i][j] = 0;
}

/// to[i][j] = the product of row i * kLeftStep of `left` and row j * kRightStep of `right`, kDim numbers long.
template <int kLeft, int kRight, int kLeftStep, int kRightStep, int kDim>
DEVICE void multiply_rows(float (&to)[kLeft][kRight], const float* left, int left_stride, const float* right,
                          int right_stride) {
  clear(to);
#pragma unroll 2
  for (int d = 0; d < kDim; d += 4) {
    float4 a[kLeft];
    UNROLL
    for (int i = 0; i < kLeft; ++i) a[i] = *reinterpret_cast<const float4*>(left + i * kLeftStep * left_stride + d);
    UNROLL
    for (int j = 0; j < kRight; ++j) {
      const float4 b = *reinterpret_cast<const float4*>(right + j * kRightStep * right_stride + d);
      UNROLL
      for (int i = 0; i < kLeft; ++i) {  // one at a time: four fused multiply-adds
        to[i][j] += a[i].x * b.x;
        to[i][j] += a[i].y * b.y;
        to[i][j] += a[i].z * b.z;
        to[i][j] += a[i].w * b.w;
      }
    }
  }
}

/// to[i][4 c + e] += sum over d < kDepth of left[i * kLeftStep][d] * right[d][c * right_jump + e], e < 4.
template <int kLeft, int kColumns, int kLeftStep, int kDepth>
DEVICE void add_products(float (&to)[kLeft][kColumns], const float* left, int left_stride, const float* right,
                         int right_stride, int right_jump) {
#pragma unroll 2
  for (int d = 0; d < kDepth; d += 4) {
    float4 a[kLeft];
    UNROLL
    for (int i = 0; i < kLeft; ++i) a[i] = *reinterpret_cast<const float4*>(left + i * kLeftStep * left_stride + d);
    UNROLL
    for (int c = 0; c < kColumns / 4; ++c)
      UNROLL
      for (int step = 0; step < 4; ++step) {
        const float4 b = *reinterpret_cast<const float4*>(right + (d + step) * right_stride + c * right_jump);
        UNROLL
        for (int i = 0; i < kLeft; ++i) {
          const float factor = step == 0 ? a[i].x : step == 1 ? a[i].y : step == 2 ? a[i].z : a[i].w;
          to[i][4 * c] += factor * b.x;
          to[i][4 * c + 1] += factor * b.y;
          to[i][4 * c + 2] += factor * b.z;
          to[i][4 * c + 3] += factor * b.w;
        }
      }
  }
}

/// Four numbers of `row` at `column`, then four at `column + jump`, ...; none from `dim` on.
template <int kColumns, bool kVectors>
DEVICE void store_row(float* row, const float (&numbers)[kColumns], int column, int jump, int dim) {
  UNROLL
  for (int c = 0; c < kColumns / 4; ++c) {
    const int at = column + c * jump;
    if constexpr (kVectors) {
      if (at < dim)
        *reinterpret_cast<float4*>(row + at) =
            make_float4(numbers[4 * c], numbers[4 * c + 1], numbers[4 * c + 2], numbers[4 * c + 3]);
    } else {
      UNROLL
      for (int e = 0; e < 4; ++e)
        if (at + e < dim) row[at + e] = numbers[4 * c + e];
    }
  }
}

void attention_fp32_forward(const Attention<float>& call, cudaStream_t stream);
void attention_fp32_backward(const Attention<float>& call, cudaStream_t stream);

}  // namespace run_llm
