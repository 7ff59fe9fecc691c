// The functions of hopper.h for the emulator. Everything asynchronous happens as late, or at as bad a moment, as it
// may:
//
// * A bulk copy lands at a random later moment, out of order; who looks at its target before ends the launch.
// * wgmma reads its operands, shared memory and registers alike, when a warp waits for its group, that warp's 16 rows
//   only; until then the registers of the sums hold NaNs. So a tile given back too early, a left operand overwritten or
//   a sum read before its wait shows in the results. A product without a wgmma_fence() since the thread's last wait
//   ends the launch.
// * A phase that never ends is a wait in vain like any other.
//
// What this takes from the PTX ISA's text, and the first run on a GPU has to confirm, though CUTLASS,
// FlashAttention-3, ThunderKittens and DeepGEMM, which do run, pass the same numbers wherever they could be
// compared: the bits of the matrix descriptor and what LBO and SBO mean in it; the swizzle as an XOR of the final
// address's bits 4-6 with bits 7-9, by copies and operands alike, also where a start address lies 32, 64 or 96 bytes
// inside an atom; the fragments of sums and of a left operand in registers; that a box's numbers outside the tensor
// are written as zeros, and counted at the barrier; that the wait for the parity before the first phase does not
// wait; that dynamic shared memory begins at a multiple of 1024. And two that it does not emulate: copies of boxes
// that swizzle need global addresses at multiples of 128; a kernel of 384 threads starts with 168 registers each,
// which is what setmaxnreg shares out (3 x 168 = 24 + 2 x 240).
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
  emulator::Gathering arrived;  // clocks of those who have
  emulator::Snapshot ended;     // their largest at the end of the latest phase

  void advance() {
    if (pending || bytes) return;
    phase ^= 1;
    pending = arrivals;
    ended = arrived.snapshot();
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
  const emulator::Quiet quiet;
  act(group.given);
  group.arrived = 0;
  emulator::wake(group.waiting);
}

// ---- barriers in shared memory

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::check_shared("mbarrier_init", barrier, 8, 8);
  *barrier = Mbarrier::kMagic;
  HopperBlock::get().barriers[barrier] = Mbarrier{arrivals, arrivals, 0, 0, {}, {}, {}};
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
  emulator::races().release(thread_number(), state.arrived);
  state.advance();
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect(barrier, 0); }
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  Mbarrier& state = mbarrier_at(barrier);
  while (state.phase == parity) emulator::wait_in(state.waiting, "a barrier in shared memory");
  emulator::races().acquire(thread_number(), state.ended);
}
inline void fence_async() { emulator::races().fence_async(thread_number()); }

// ---- bulk copies of boxes

/// The address that the number at `address` of a tile really has.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

/// Where an address of shared memory lies.
inline unsigned char* at_shared(const char* what, uint32_t address, size_t bytes) {
  auto* start = static_cast<unsigned char*>(emulator::shared());
  auto* place = start + (static_cast<int64_t>(address) - emulator::kSharedStart);
  emulator::check_shared(what, place, bytes, bytes);
  return place;
}

/// [batch, rows, heads, dim] of 16-bit numbers.
struct TensorMap {
  const unsigned char* from;
  int batch, rows, heads, dim, box_rows;
};

inline TensorMap tensor_map(const void* from, int batch, int rows, int heads, int dim, int box_rows) {
  if (reinterpret_cast<uintptr_t>(from) % 128 || dim % 8 || box_rows < 1 || box_rows > 256)
    throw std::runtime_error("a tensor map: a misaligned tensor, or a box that is none");
  return {static_cast<const unsigned char*>(from), batch, rows, heads, dim, box_rows};
}

/// Write the box's numbers, swizzled, zeros for those outside the tensor.
inline void land(uint32_t to, const TensorMap& map, int column, int head, int row, int batch) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < kSwizzledColumns; ++c) {
      const int x = column + c, y = row + r;
      const bool inside = x >= 0 && x < map.dim && y >= 0 && y < map.rows && head >= 0 && head < map.heads &&
                          batch >= 0 && batch < map.batch;
      const uint32_t address = to + static_cast<uint32_t>(r * kSwizzledRow + 2 * c);
      unsigned char* place = at_shared("a bulk copy", swizzled(address), 2);
      if (inside)
        std::memcpy(place, map.from + 2 * (((int64_t{batch} * map.rows + y) * map.heads + head) * map.dim + x), 2);
      else
        std::memset(place, 0, 2);
    }
}

inline void copy_box(void* to, const TensorMap& map, int column, int head, int row, int batch, uint64_t* barrier) {
  const int bytes = map.box_rows * kSwizzledRow;
  emulator::check_shared("a bulk copy", to, static_cast<size_t>(bytes), 1024);
  const uint32_t copy = emulator::races().begin_bulk_copy(thread_number(), to, static_cast<size_t>(bytes));
  emulator::later([=, &state = mbarrier_at(barrier)] {
    land(shared_address(to), map, column, head, row, batch);
    emulator::races().end_bulk_copy(copy, to, static_cast<size_t>(bytes), state.arrived);
    state.bytes -= bytes;
    state.advance();
  });
}

inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulator::check_shared("a bulk copy", to, static_cast<size_t>(bytes), 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) emulator::fail("a bulk copy: not multiples of 16");
  const uint32_t copy = emulator::races().begin_bulk_copy(thread_number(), to, static_cast<size_t>(bytes));
  emulator::later([=, &state = mbarrier_at(barrier)] {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    emulator::races().end_bulk_copy(copy, to, static_cast<size_t>(bytes), state.arrived);
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

}  // namespace run_llm

#include "emulated_wgmma.h"
