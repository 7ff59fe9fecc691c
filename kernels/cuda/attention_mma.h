// Tiles of bf16 and fp16 numbers for the tensor cores: how they lie in shared memory, come there, and are multiplied.
//
// A tile is rows of kDim numbers, kDim 32, 64, 96 or 128: heads that are narrower get columns of zeros. The row is cut
// into chunks of 16 bytes, what load_matrices reads of a row and copy_async_16 writes. load_matrices takes the same
// columns of 8 neighbouring rows at a time, which lie kDim numbers apart: so that they fall into the 8 different
// groups of 4 banks, the chunks of a row are exchanged by an exclusive or with the row's number. Rows of 128 or 256
// bytes: chunk c of row r lies at c ^ r % 8. Rows of 64 or 192 bytes begin alternately at bank 0 and 16: c ^ r / 2 % 4.
#pragma once

#include "attention.h"

namespace run_llm {

/// Heads are copied 8 numbers at a time: what a head's width is rounded up to.
inline int whole_chunks(int dim) { return (dim + 7) / 8 * 8; }

/// Products of 16 x 8 tiles: registers of a lane are [tile][row / 8 * 2 + column % 2], row lane / 4 + 0 or 8, column
/// 2 (lane % 4) + 0 or 1.
template <int kDown, int kAcross>
using Sums = float[kDown][kAcross][4];

template <class T, int kDim>
struct Tile {
  static constexpr int kRowBytes = 2 * kDim, kSteps = kDim / 16;
  static constexpr int kTurned = kDim % 64 == 0 ? 8 : 4;  // so many neighbouring chunks change places

  /// Bytes from a tile's start to a chunk of a row.
  static DEVICE int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (kTurned == 8 ? row % 8 : row / 2 % 4)) * 16;
  }
  /// From the offset of chunk 0 or 1 of a row to that of the chunk 2 * step further on.
  static DEVICE int along(int offset, int step) {
    constexpr int kMask = 16 * (kTurned - 1);
    return (offset ^ (32 * step & kMask)) + (32 * step & ~kMask);
  }
  /// The chunk that a lane points at for 16 rows x 16 columns: as the left factor, or transposed as the right one.
  static DEVICE int left_lane() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return offset(lane % 16, lane / 16);
  }
  /// The same as the right factor, a row of the tile being a column of the product.
  static DEVICE int right_lane() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  /// Rows [first, first + kCount) of a head, `stride` numbers apart, into a tile; zeros for rows from `rows` on and
  /// columns from `dim` on, a multiple of 8. Asynchronous: the caller commits and waits.
  template <int kCount, int kThreads>
  static DEVICE void copy(unsigned char* to, const T* from, int64_t stride, int first, int rows, int dim) {
    constexpr int kPass = kThreads / kTurned;
    static_assert(kPass % 8 == 0 && kCount % kPass == 0);
    const int thread = fresh(static_cast<int>(threadIdx.x)), chunk = thread % kTurned, row = thread / kTurned;
    const T* source = from + (first + row) * stride + 8 * chunk;
    to += offset(row, chunk);
    UNROLL
    for (int r = 0; r < kCount; r += kPass) {
      UNROLL
      for (int c = 0; c < kDim / 8; c += kTurned) {
        const bool valid = first + row + r < rows && 8 * (chunk + c) < dim;
        copy_async_16(to + r * kRowBytes + c * 16, valid ? source + 8 * c : from, valid);
      }
      source += kPass * stride;
    }
  }

  /// A warp's rows of `tile` as left factors.
  template <int kDown>
  static DEVICE void load_left(uint32_t (&to)[kDown][4], const unsigned char* tile, int lane, int step) {
    UNROLL
    for (int i = 0; i < kDown; ++i) load_matrices<false>(to[i], tile + i * 16 * kRowBytes + along(lane, step));
  }

  /// sums += one step of 16 columns: left [kDown * 16 rows], `right` kAcross * 8 rows.
  template <int kDown, int kAcross>
  static DEVICE void add_step(Sums<kDown, kAcross>& sums, const uint32_t (&left)[kDown][4], const unsigned char* right,
                              int lane, int step) {
    UNROLL
    for (int j = 0; j < kAcross; j += 2) {
      uint32_t both[4];
      load_matrices<false>(both, right + j * 8 * kRowBytes + along(lane, step));
      UNROLL
      for (int i = 0; i < kDown; ++i) multiply_pair(sums[i][j], sums[i][j + 1], left[i], both);
    }
  }

  /// sums += rows of `left` times rows of `right`, along kDim. (Lane offsets are made fresh: their eight variants would
  /// else stay in registers over a loop around this.)
  template <int kDown, int kAcross>
  static DEVICE void add_row_products(Sums<kDown, kAcross>& sums, const unsigned char* left, int left_lane,
                                      const unsigned char* right, int right_lane) {
    left_lane = fresh(left_lane), right_lane = fresh(right_lane);
    UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kDown][4];
      load_left(a, left, left_lane, step);
      add_step(sums, a, right, right_lane, step);
    }
  }

  /// The same with left factors that are in registers.
  template <int kDown, int kAcross>
  static DEVICE void add_row_products(Sums<kDown, kAcross>& sums, const uint32_t (&left)[kSteps][kDown][4],
                                      const unsigned char* right, int right_lane) {
    right_lane = fresh(right_lane);
    UNROLL
    for (int step = 0; step < kSteps; ++step) add_step(sums, left[step], right, right_lane, step);
  }

  /// sums [..][kDim] += weights, rounded to T, times the kRows * 8 rows of `tile`. The registers of a sum are those of
  /// a left factor: weights do not leave the lanes that computed them.
  template <int kDown, int kRows>
  static DEVICE void add_weighted_rows(Sums<kDown, kDim / 8>& sums, const Sums<kDown, kRows>& weights,
                                       const unsigned char* tile, int left_lane) {
    left_lane = fresh(left_lane);
    UNROLL
    for (int n = 0; n < kRows; n += 2) {
      uint32_t a[kDown][4];
      UNROLL
      for (int i = 0; i < kDown; ++i)
        UNROLL
        for (int part = 0; part < 4; ++part) {
          const float(&pair)[4] = weights[i][n + part / 2];
          a[i][part] = pack<T>(pair[part % 2 * 2], pair[part % 2 * 2 + 1]);
        }
      UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t both[4];
        load_matrices<true>(both, tile + n * 8 * kRowBytes + along(left_lane, step));
        UNROLL
        for (int i = 0; i < kDown; ++i) multiply_pair(sums[i][2 * step], sums[i][2 * step + 1], a[i], both);
      }
    }
  }

  /// A warp's sums, rounded, to the rows of a head from `first` on, as far as there are `rows`. They go by way of
  /// `tile`, shared memory that only this warp uses, so that lanes write 16 bytes each and rows as a whole.
  template <int kDown>
  static DEVICE void store(unsigned char* tile, const Sums<kDown, kDim / 8>& sums, T* to, int64_t stride, int first,
                           int rows, int dim) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    __syncwarp();  // other lanes may have read what lies there
    UNROLL
    for (int i = 0; i < kDown; ++i)
      UNROLL
      for (int c = 0; c < kDim / 8; ++c)
        UNROLL
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(tile + offset(i * 16 + half * 8 + lane / 4, c) + lane % 4 * 4) =
              pack<T>(sums[i][c][2 * half], sums[i][c][2 * half + 1]);
    __syncwarp();
    UNROLL
    for (int row = lane / kTurned; row < kDown * 16; row += 32 / kTurned)
      UNROLL
      for (int c = lane % kTurned; c < kDim / 8; c += kTurned)
        if (first + row < rows && 8 * c < dim)
          *reinterpret_cast<uint4*>(to + (first + row) * stride + 8 * c) =
              *reinterpret_cast<const uint4*>(tile + offset(row, c));
  }

 private:
  static DEVICE void multiply_pair(float (&first)[4], float (&second)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[4]) {
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    multiply_16x8x16<T>(first, a, low);
    multiply_16x8x16<T>(second, a, high);
  }
};

/// Sums of zero.
template <int kDown, int kAcross>
DEVICE void clear(Sums<kDown, kAcross>& sums) {
  UNROLL
  for (int i = 0; i < kDown; ++i)
    UNROLL
    for (int j = 0; j < kAcross; ++j)
      UNROLL
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
}

template <int kDown, int kAcross>
DEVICE void scale_all(Sums<kDown, kAcross>& sums, float factor) {
  UNROLL
  for (int i = 0; i < kDown; ++i)
    UNROLL
    for (int j = 0; j < kAcross; ++j)
      UNROLL
      for (int e = 0; e < 4; ++e) sums[i][j][e] *= factor;
}

/// Scores that begin with the bias of each column.
template <int kDown, int kAcross>
DEVICE void begin_with(Sums<kDown, kAcross>& sums, const float* bias) {
  UNROLL
  for (int j = 0; j < kAcross; ++j) {
    const float2 both = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
    const float2 two = make_float2(bias_term(both.x), bias_term(both.y));
    UNROLL
    for (int i = 0; i < kDown; ++i) {
      sums[i][j][0] = sums[i][j][2] = two.x;
      sums[i][j][1] = sums[i][j][3] = two.y;
    }
  }
}

/// Scores of keys that a query does not see become kHidden; `query` and `key` are the lane's first.
template <class T, int kDown, int kAcross>
DEVICE void hide(Sums<kDown, kAcross>& scores, const Attention<T>& call, int b, int query, int key, int prefix) {
  query = fresh(query);
  UNROLL
  for (int i = 0; i < kDown; ++i)
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = query + i * 16 + half * 8;
      const int2 range = row < call.queries ? call.range(b, row) : make_int2(0, 0);
      UNROLL
      for (int j = 0; j < kAcross; ++j)
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const int column = key + 8 * j + e;
          const bool sees = column < prefix || (range.x <= column && column < range.y);
          if (!sees) scores[i][j][2 * half + e] = kHidden;
        }
    }
}

/// Attention on the tensor cores; T is bf16 or fp16. Scores, sums and softmax are fp32.
template <class T>
void attention_mma_forward(const Attention<T>& call, cudaStream_t stream);
template <class T>
void attention_mma_backward(const Attention<T>& call, cudaStream_t stream);

}  // namespace run_llm
