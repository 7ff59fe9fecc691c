// What the forward and the backward kernels for Hopper share: the ring of tiles, and scores of a warpgroup in
// registers.
//
// A thread of a warpgroup has two rows of a tile of 64, 8 apart (j = 0 and 1), and of each the columns 8 i + 2 (lane %
// 4) + e: numbers[4 i + 2 j + e] (multiply_async, hopper.h).
#pragma once

#include "attention.h"
#include "hopper.h"

namespace run_llm {

constexpr const char* kHopperDtypes =
    "these kernels take bfloat16 and float16: cast q, k and v to one of them, or call attention_forward and "
    "attention_backward, which take float32 too";
constexpr int kTileRows = 64;         // of a warpgroup's product

/// Results are written 16 bytes at a time.
inline void require_writable(const Args& args, const void* tensor, const char* name) {
  args.require(reinterpret_cast<uintptr_t>(tensor) % 16 == 0, name, "it does not begin at a multiple of 16 bytes");
}
/// Copies of boxes that swizzle start at multiples of 128 bytes (CUDA's Programming Guide; the driver's own check is
/// for 16).
inline void require_boxes(const Args& args, const void* tensor, const char* name) {
  args.require(reinterpret_cast<uintptr_t>(tensor) % 128 == 0, name,
               "it does not begin at a multiple of 128 bytes; attention_forward and attention_backward take any");
}

template <class T>
void require_hopper_shapes(const Args& args, const Attention<T>& call) {
  args.require(call.dim == 64 || call.dim == 128, "q",
               "its heads are neither 64 nor 128 wide; attention_forward and attention_backward take any up to 128");
  require_boxes(args, call.q, "q");
  require_boxes(args, call.k, "k");
  require_boxes(args, call.v, "v");
}

/// Where in the ring of stages a tile lies. parity: of the phase in which it is filled.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

/// One thread: start the copies of a tile, 64 columns each; as many rows as the map's box has.
template <int kParts, int kRows>
DEVICE void copy_tile(uint16_t (&tile)[kParts][kRows][kSwizzledColumns], const TensorMap& map, int head, int row, int b,
                      uint64_t* full) {
  for (int part = 0; part < kParts; ++part) copy_box(tile[part], map, part * kSwizzledColumns, head, row, b, full);
}

/// Start to = left right^T, [64 x kRows] of [64 x 64 kParts] and [kRows x 64 kParts], all in shared memory; a group.
template <class T, int kParts, int kRows>
DEVICE void start_scores(float (&to)[kRows / 2], const uint16_t (&left)[kParts][kTileRows][kSwizzledColumns],
                         const uint16_t (&right)[kParts][kRows][kSwizzledColumns]) {
  const uint64_t a = k_major_descriptor(left), b = k_major_descriptor(right);
  wgmma_fence();
  UNROLL
  for (int d = 0; d < 4 * kParts; ++d)
    multiply_async<T, kRows, false>(to, moved(a, d / 4 * kTileRows * kSwizzledRow + d % 4 * 32),
                                    moved(b, d / 4 * kRows * kSwizzledRow + d % 4 * 32), d > 0);
  wgmma_commit();
}

/// Start to += left right, [64 x 64 kParts] of [64 x kRows] in registers and [kRows x 64 kParts]; a group.
template <class T, int kParts, int kRows>
DEVICE void start_sums(float (&to)[32 * kParts], uint32_t (&left)[kRows / 16][4],
                       const uint16_t (&right)[kParts][kRows][kSwizzledColumns]) {
  const uint64_t b = mn_major_descriptor(right, kRows * kSwizzledRow);
  hold(to);
  hold(left);
  wgmma_fence();
  UNROLL
  for (int i = 0; i < kRows / 16; ++i)
    multiply_async<T, kSwizzledColumns * kParts, true>(to, left[i], moved(b, i * 2 * kAtom), true);
  wgmma_commit();
}

/// A warp needs the stage no more. One lane says so for all: __syncwarp() orders what the others have read before it.
DEVICE void give_back(uint64_t* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

/// Scores of keys that a row does not see become kHidden. `ranges`: of the thread's rows; `first`: its first key.
template <int kCount>
DEVICE void hide(float (&scores)[kCount], const int2 (&ranges)[2], int first, int prefix) {
  UNROLL
  for (int j = 0; j < 2; ++j) {
    const int low = ranges[j].x - first, high = ranges[j].y - first, shared = prefix - first;
    UNROLL
    for (int i = 0; i < kCount / 4; ++i)
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int key = 8 * i + e;
        if (key >= shared && (key < low || key >= high)) scores[4 * i + 2 * j + e] = kHidden;
      }
  }
}

/// Add the bias of the thread's keys, `first` the first; none from `keys` on.
template <int kCount>
DEVICE void add_bias(float (&scores)[kCount], const float* bias, int first, int keys) {
  UNROLL
  for (int i = 0; i < kCount / 4; ++i)
    UNROLL
    for (int e = 0; e < 2; ++e) {
      const int key = first + 8 * i + e;
      const float added = key < keys ? bias_term(bias[key]) : 0.f;
      scores[4 * i + e] += added;
      scores[4 * i + 2 + e] += added;
    }
}

/// A warpgroup's numbers [64 x 16 kSteps] as left operands, 16 columns each.
template <class T, int kSteps, int kCount>
DEVICE void pack_left(uint32_t (&left)[kSteps][4], const float (&numbers)[kCount]) {
  static_assert(kCount == 8 * kSteps);
  UNROLL
  for (int i = 0; i < kSteps; ++i)
    UNROLL
    for (int c = 0; c < 4; ++c) left[i][c] = pack<T>(numbers[8 * i + 2 * c], numbers[8 * i + 2 * c + 1]);
}

/// The warp's 16 rows of 64, from `row` on, by way of its rows of `tile` so that 16 bytes go out at a time. Nobody
/// reads the tile any more. `rows_left`: what is left of the tensor from the warpgroup's first row on.
template <class T, int kDim>
DEVICE void store_rows(uint16_t (*tile)[kTileRows][kSwizzledColumns], const float (&numbers)[kDim / 2], T* to,
                       int64_t stride, int row, int rows_left) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4;
  // 16 bytes of a row change places by the row's number, as in the swizzle: eight rows use different banks.
  const auto place = [&](int r, int column) {
    return &tile[column / kSwizzledColumns][row + r][((column / 8 % 8) ^ (r % 8)) * 8 + column % 8];
  };
  UNROLL
  for (int i = 0; i < kDim / 8; ++i)
    UNROLL
    for (int j = 0; j < 2; ++j)
      *reinterpret_cast<uint32_t*>(place(group + 8 * j, 8 * i + 2 * pair)) =
          pack<T>(numbers[4 * i + 2 * j], numbers[4 * i + 2 * j + 1]);
  __syncwarp();
  constexpr int kAcross = kDim / 8;  // lanes of a row
  UNROLL
  for (int r = lane / kAcross; r < 16; r += 32 / kAcross) {
    if (row + r >= rows_left) continue;
    const int column = lane % kAcross * 8;
    *reinterpret_cast<uint4*>(to + (row + r) * stride + column) = *reinterpret_cast<const uint4*>(place(r, column));
  }
}

}  // namespace run_llm
