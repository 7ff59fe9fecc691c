// Products of a warpgroup for the emulator: how late they happen stands in emulated_hopper.h.
#pragma once

#include "emulated_hopper.h"

namespace run_llm {

inline void wgmma_fence() { HopperBlock::get().fenced[thread_number()] = true; }

inline void wgmma_commit() {
  emulator::in_warp("wgmma_commit", nullptr, [](void**) {
    WarpProducts& warp = HopperBlock::get().products();
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

/// Carry out a group's products; sums that no later product adds to go to their registers.
inline void finish(WarpProducts& warp, const std::vector<WarpProduct>& group) {
  for (const WarpProduct& product : group) {
    const auto sums = warp.sums.find(product.sum);
    product.carry_out(sums->second);
    if (--sums->second.products) continue;
    for (int i = 0; i < emulator::kWarp; ++i)
      std::copy(sums->second.numbers[i].begin(), sums->second.numbers[i].end(), sums->second.registers[i]);
    warp.sums.erase(sums);
  }
}

template <int kLeft>
void wgmma_wait() {
  emulator::in_warp("wgmma_wait", nullptr, [](void**) {
    WarpProducts& warp = HopperBlock::get().products();
    for (; warp.groups.size() > kLeft; warp.groups.erase(warp.groups.begin())) finish(warp, warp.groups.front());
  });
  HopperBlock::get().fenced[thread_number()] = false;
}

template <int kCount>
void hold(float (&)[kCount]) {}
template <int kCount>
void hold(uint32_t (&)[kCount][4]) {}

/// Where the number of an operand in shared memory at position `mn` of M or N and `k` of the sum lies.
inline unsigned char* operand_place(uint64_t descriptor, bool mn_major, int mn, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    emulator::fail("a matrix descriptor: not the 128-byte swizzle, or a base offset");
  const auto field = [&](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; };
  const int start = field(0), leading = field(16), stride = field(32);
  const int offset = mn_major ? mn % 64 * 2 + mn / 64 * leading + k % 8 * kSwizzledRow + k / 8 * stride
                              : mn % 8 * kSwizzledRow + mn / 8 * stride + k * 2;
  return at_shared("wgmma", swizzled(static_cast<uint32_t>(start + offset)), 2);
}
template <class T>
float operand(uint64_t descriptor, bool mn_major, int mn, int k) {
  T number;
  std::memcpy(&number, operand_place(descriptor, mn_major, mn, k), 2);
  return to_float(number);
}

/// A thread's warp reads `count` positions of an operand, and 16 of the sum, as of now.
inline void note_operand(int thread, uint64_t descriptor, bool mn_major, int count) {
  for (int mn = 0; mn < count; mn += mn_major ? 8 : 1)  // 8 numbers in a row, 16 bytes, stay together
    for (int k = 0; k < 16; k += mn_major ? 1 : 8)
      emulator::races().read_by_wgmma(thread, operand_place(descriptor, mn_major, mn, k), 16);
}

/// Which rows of the left operand a warp of the four reads is not said: all.
template <int kN, bool kTransposed>
void note_operands(int thread, const ProductLane& lane) {
  if (!lane.left) note_operand(thread, lane.left_descriptor, false, 64);
  note_operand(thread, lane.right_descriptor, kTransposed, kN);
}

/// A warp's 16 rows of a product, those from `first` on: sum [16][kN] (+)= left [16][16] right [16][kN].
template <class T, int kN, bool kTransposed>
void multiply_warp(int thread, int first, const std::vector<ProductLane>& lanes, WarpSums& sums) {
  float left[16][16], right[16][kN], sum[16][kN];
  note_operands<kN, kTransposed>(thread, lanes[0]);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k) {
      const ProductLane& lane = lanes[static_cast<size_t>(r % 8 * 4 + k % 8 / 2)];
      left[r][k] = lane.left ? to_float(T{static_cast<uint16_t>(lane.left[r / 8 + k / 8 * 2] >> k % 2 * 16)})
                             : operand<T>(lane.left_descriptor, false, first + r, k);
    }
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < kN; ++n) right[k][n] = operand<T>(lanes[0].right_descriptor, kTransposed, n, k);
  const auto number = [&](int r, int n) -> float& {
    return sums.numbers[r % 8 * 4 + n % 8 / 2][static_cast<size_t>(n / 8 * 4 + r / 8 * 2 + n % 2)];
  };
  for (int r = 0; r < 16; ++r) {
    for (int n = 0; n < kN; ++n) sum[r][n] = lanes[0].add ? number(r, n) : 0;
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < kN; ++n) sum[r][n] += left[r][k] * right[k][n];
    for (int n = 0; n < kN; ++n) number(r, n) = sum[r][n];
  }
}

/// Note the product down for the four warps, and take the registers of its sums.
template <class T, int kN, bool kTransposed>
void issue(ProductLane mine) {
  if (!HopperBlock::get().fenced[thread_number()]) emulator::fail("a product of a warpgroup without wgmma_fence()");
  const char* what = mine.left ? "multiply_async, left in registers" : "multiply_async, left in shared memory";
  in_warpgroup(what, &mine, [](void** given) {
    const auto lane = [&](int i) -> const ProductLane& { return *static_cast<ProductLane*>(given[i]); };
    for (int i = 0; i < kWarpgroup; ++i)
      if (lane(i).left_descriptor != lane(0).left_descriptor || lane(i).add != lane(0).add ||
          lane(i).right_descriptor != lane(0).right_descriptor)
        emulator::fail("a product of a warpgroup whose threads disagree on operands");
    for (int w = 0; w < kWarpgroup / emulator::kWarp; ++w) {
      WarpProducts& warp = HopperBlock::get().warps[thread_number() / kWarpgroup * 4 + w];
      std::vector<ProductLane> lanes;
      for (int i = 0; i < emulator::kWarp; ++i) lanes.push_back(lane(w * emulator::kWarp + i));
      WarpSums& sums = warp.sums[lanes[0].sum];
      if (!sums.products++)
        for (size_t i = 0; i < emulator::kWarp; ++i) {
          sums.registers[i] = lanes[i].sum;
          sums.numbers[i].assign(lanes[i].sum, lanes[i].sum + kN / 2);
          std::memset(lanes[i].sum, 0xff, kN / 2 * sizeof(float));
        }
      const int thread = thread_number() / kWarpgroup * kWarpgroup + w * emulator::kWarp;
      note_operands<kN, kTransposed>(thread, lanes[0]);  // the read may take place at once, or as late as:
      warp.open.push_back(
          {lanes[0].sum, [=](WarpSums& to) { multiply_warp<T, kN, kTransposed>(thread, 16 * w, lanes, to); }});
    }
  });
}

template <class T, int kN, bool kTransposed>
void multiply_async(float (&sum)[kN / 2], uint64_t left, uint64_t right, bool add) {
  issue<T, kN, kTransposed>({sum, nullptr, left, right, add});
}
template <class T, int kN, bool kTransposed>
void multiply_async(float (&sum)[kN / 2], const uint32_t (&left)[4], uint64_t right, bool add) {
  issue<T, kN, kTransposed>({sum, left, 0, right, add});
}

}  // namespace run_llm
