// The functions of hopper.h for the emulator. Everything asynchronous happens as late, or at as bad a moment, as it may:
//
// * A bulk copy fills its target with NaNs when it is issued and lands at a random later moment, out of order.
// * wgmma reads its operands, shared memory and registers alike, when a warp waits for its group, that warp's 16 rows
//   only; until then the registers of the sums hold NaNs. So a tile given back too early, a left operand overwritten or
//   a sum read before its wait shows in the results. A product without a wgmma_fence() since the thread's last wait ends
//   the launch.
// * A phase that never ends is a wait in vain like any other.
//
// What this takes from the PTX ISA's text, and the first run on a GPU has to confirm: the bits of the matrix descriptor
// and what LBO and SBO mean in it; the swizzle as an XOR of the final address's bits 4-6 with bits 7-9, by copies and
// operands alike, also where a start address lies 32, 64 or 96 bytes inside an atom; the fragments of sums and of a left
// operand in registers; that a box's numbers outside the tensor are written as zeros, and counted at the barrier; that
// the wait for the parity before the first phase does not wait.
#pragma once

#include <map>

#include "emulated_instructions.h"

#define __grid_constant__

namespace run_llm {

inline int thread_number() { return static_cast<int>(threadIdx.x); }

/// A barrier in shared memory. Its 8 bytes there only say that it is one.
struct Mbarrier {
  static constexpr uint64_t kMagic = 0x6d62617272696572;
  int arrivals, pending, bytes;
  int phase;  // the current one's parity
  std::vector<int> waiting;

  void advance() {
    if (pending || bytes) return;
    phase ^= 1;
    pending = arrivals;
    emulator::wake(waiting);
  }
};

/// What the lanes of a warp hand in to a product.
struct ProductLane {
  float* sum;
  const uint32_t* left;  // null: left_descriptor
  uint64_t left_descriptor, right_descriptor;
  bool add;
};

/// The sums of a warp's products that it has not waited for: numbers[lane], to go to registers[lane].
struct WarpSums {
  int products = 0;
  float* registers[emulator::kWarp];
  std::vector<float> numbers[emulator::kWarp];
};

struct WarpProduct {
  const float* sum;  // the first lane's
  std::function<void(WarpSums&)> carry_out;
};

/// Products of a warp: its 16 rows of those of its warpgroup.
struct WarpProducts {
  std::vector<WarpProduct> open;
  std::vector<std::vector<WarpProduct>> groups;  // closed by a commit, the oldest first
  std::map<const float*, WarpSums> sums;
};

struct Warpgroup {
  const char* what = nullptr;
  int arrived = 0;
  void* given[kWarpgroup] = {};
  std::vector<int> waiting;
};

/// What a block keeps.
struct HopperBlock {
  std::map<uint64_t*, Mbarrier> barriers;
  std::map<int, Warpgroup> warpgroups;
  std::map<int, WarpProducts> warps;
  std::map<int, bool> fenced;  // threads

  static HopperBlock& get() {
    auto& state = emulator::block_state();
    if (!state) state = std::make_shared<HopperBlock>();
    return *static_cast<HopperBlock*>(state.get());
  }
  WarpProducts& products() { return warps[thread_number() / emulator::kWarp]; }
};

/// All threads of the calling warpgroup hand in a pointer each; when the last has, `act` sees all 128.
inline void in_warpgroup(const char* what, void* mine, const std::function<void(void**)>& act) {
  Warpgroup& group = HopperBlock::get().warpgroups[thread_number() / kWarpgroup];
  if (group.arrived && std::strcmp(group.what, what) != 0)
    emulator::fail(std::string("threads of a warpgroup part ways: ") + group.what + " and " + what);
  group.what = what;
  group.given[thread_number() % kWarpgroup] = mine;
  if (++group.arrived < kWarpgroup) return emulator::wait_in(group.waiting, what);
  act(group.given);
  group.arrived = 0;
  emulator::wake(group.waiting);
}

// ---- barriers in shared memory

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::check_shared("mbarrier_init", barrier, 8, 8);
  *barrier = Mbarrier::kMagic;
  HopperBlock::get().barriers[barrier] = Mbarrier{arrivals, arrivals, 0, 0, {}};
}
inline Mbarrier& mbarrier_at(uint64_t* barrier) {
  auto& barriers = HopperBlock::get().barriers;
  const auto found = barriers.find(barrier);
  if (found == barriers.end() || *barrier != Mbarrier::kMagic) emulator::fail("a barrier that nobody has initialised");
  return found->second;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  Mbarrier& state = mbarrier_at(barrier);
  if (--state.pending < 0) emulator::fail("more arrivals at a barrier than it was made for");
  state.bytes += bytes;
  state.advance();
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect(barrier, 0); }
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  Mbarrier& state = mbarrier_at(barrier);
  while (state.phase == parity) emulator::wait_in(state.waiting, "a barrier in shared memory");
}
inline void fence_async() {}

// ---- bulk copies of boxes

/// The address that the number at `address` of a tile really has.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

/// Where an address of shared memory lies.
inline unsigned char* at_shared(const char* what, uint32_t address, size_t bytes) {
  auto* place = static_cast<unsigned char*>(emulator::shared()) + (static_cast<int64_t>(address) - emulator::kSharedStart);
  emulator::check_shared(what, place, bytes, bytes);
  return place;
}

/// [batch, rows, heads, dim] of 16-bit numbers.
struct TensorMap {
  const unsigned char* from;
  int batch, rows, heads, dim, box_rows;
};

inline TensorMap tensor_map(const void* from, int batch, int rows, int heads, int dim, int box_rows) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || dim % 8 || box_rows < 1 || box_rows > 256)
    throw std::runtime_error("a tensor map: a misaligned tensor, or a box that is none");
  return {static_cast<const unsigned char*>(from), batch, rows, heads, dim, box_rows};
}

inline void prefetch_map(const TensorMap&) {}

/// Write the box's numbers, swizzled, zeros for those outside the tensor.
inline void land(uint32_t to, const TensorMap& map, int column, int head, int row, int batch) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < kSwizzledColumns; ++c) {
      const int x = column + c, y = row + r;
      const bool inside = x >= 0 && x < map.dim && y >= 0 && y < map.rows && head >= 0 && head < map.heads &&
                          batch >= 0 && batch < map.batch;
      unsigned char* place = at_shared("a bulk copy", swizzled(to + static_cast<uint32_t>(r * kSwizzledRow + 2 * c)), 2);
      if (inside)
        std::memcpy(place, map.from + 2 * (((int64_t{batch} * map.rows + y) * map.heads + head) * map.dim + x), 2);
      else
        std::memset(place, 0, 2);
    }
}

inline void copy_box(void* to, const TensorMap& map, int column, int head, int row, int batch, uint64_t* barrier) {
  const int bytes = map.box_rows * kSwizzledRow;
  emulator::check_shared("a bulk copy", to, static_cast<size_t>(bytes), 1024);
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  emulator::later([start = shared_address(to), map, column, head, row, batch, bytes, &state = mbarrier_at(barrier)] {
    land(start, map, column, head, row, batch);
    state.bytes -= bytes;
    state.advance();
  });
}

inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulator::check_shared("a bulk copy", to, static_cast<size_t>(bytes), 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) emulator::fail("a bulk copy: not multiples of 16");
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  emulator::later([to, from, bytes, &state = mbarrier_at(barrier)] {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    state.bytes -= bytes;
    state.advance();
  });
}

// ---- registers from one warpgroup to another: nothing moves, all 128 threads must come

template <int kRegisters>
void decrease_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  in_warpgroup("decrease_registers", nullptr, [](void**) {});
}
template <int kRegisters>
void increase_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  in_warpgroup("increase_registers", nullptr, [](void**) {});
}

// ---- products of a warpgroup

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

/// The number of an operand in shared memory at position `mn` of M or N and `k` of the sum.
template <class T>
float operand(uint64_t descriptor, bool mn_major, int mn, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    emulator::fail("a matrix descriptor: not the 128-byte swizzle, or a base offset");
  const auto field = [&](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; };
  const int start = field(0), leading = field(16), stride = field(32);
  const int offset = mn_major ? mn % 64 * 2 + mn / 64 * leading + k % 8 * kSwizzledRow + k / 8 * stride
                              : mn % 8 * kSwizzledRow + mn / 8 * stride + k * 2;
  T number;
  std::memcpy(&number, at_shared("wgmma", swizzled(static_cast<uint32_t>(start + offset)), 2), 2);
  return to_float(number);
}

/// A warp's 16 rows of a product, those from `first` on: sum [16][kN] (+)= left [16][16] right [16][kN].
template <class T, int kN, bool kTransposed>
void multiply_warp(int first, const std::vector<ProductLane>& lanes, WarpSums& sums) {
  float left[16][16], right[16][kN], sum[16][kN];
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
      warp.open.push_back({lanes[0].sum, [=](WarpSums& to) { multiply_warp<T, kN, kTransposed>(16 * w, lanes, to); }});
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
