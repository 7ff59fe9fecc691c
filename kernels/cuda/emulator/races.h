// Races, for the emulator: of two accesses to one place, one of them a write, one must come before the other on every
// GPU, and not just in the order in which the fibers happen to run.
//
// What comes before what stands in vector clocks (Mattern 1989; with one write and few reads a place, as in FastTrack,
// Flanagan and Freund 2009). A thread counts its moments; its clock says up to which moment of each other thread all
// that one did comes before its own present. A barrier gathers the clocks of those who arrive, and gives the largest to
// those who wait. Of every two bytes of shared memory, and of the arrays that kernels write, the last write is kept,
// and some of the reads since: enough to find each kind of race sooner or later, not each single one at once. Blocks of
// a launch have no order at all.
//
// Shuffles, votes and products order nothing, as in CUDA; __syncwarp() does. Nobody may touch the target of an
// asynchronous copy from its start to the wait for it. wgmma and bulk copies reach memory in another way than threads
// do (PTX: the async proxy): what threads have written is there for wgmma behind a fence_async() only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulator {

/// [t]: the moment of thread t up to which all that it did comes before; [count + t]: up to which a fence_async() has
/// shown what it wrote. The last of the `count` threads stands for the bulk copies.
using Clock = std::vector<uint32_t>;
using Snapshot = std::shared_ptr<const Clock>;

/// The largest of several clocks: what a barrier knows.
class Gathering {
 public:
  void join(const Snapshot& clock);
  /// One thread's own moments, which are further on than its clock.
  void join(size_t thread, uint32_t now, uint32_t fenced);
  Snapshot snapshot() const { return std::make_shared<const Clock>(largest_); }

 private:
  Clock largest_;
  Snapshot last_;  // joined already: threads that waited together have one clock
};

/// An array in global memory that kernels write.
struct Watched {
  struct Cell {
    std::atomic<uint64_t> writer{0}, reader{0};
  };
  Watched(void* start, size_t bytes);

  const unsigned char* start;
  size_t bytes;
  std::unique_ptr<Cell[]> cells;
};

/// What the threads of one block do to memory. A race ends the launch.
class Races {
 public:
  Races(int threads, const unsigned char* shared, size_t shared_bytes);

  /// A block begins: the `number`-th of a launch, the `launch`-th of all.
  void begin(const std::vector<Watched>& arrays, unsigned launch, size_t number, unsigned random_seed);

  void access(int thread, const void* address, size_t bytes, bool write);
  void read_by_wgmma(int thread, const void* address, size_t bytes);

  /// Nobody may touch the target of a copy between these two.
  void begin_copy(int thread, const void* to, size_t bytes);
  void end_copy(int thread, const void* to, size_t bytes);
  /// The same for a bulk copy; its end comes before what those do who wait for `barrier`.
  uint32_t begin_bulk_copy(int thread, const void* to, size_t bytes);
  void end_bulk_copy(uint32_t copy, const void* to, size_t bytes, Gathering& barrier);

  /// What the thread has done comes before what those do who acquire the gathering.
  void release(int thread, Gathering& to);
  void acquire(int thread, const Snapshot& from);
  void fence_async(int thread);

 private:
  struct Cell {
    uint32_t writer, readers[2];  // thread and moment, 0: nobody
    bool coming;                  // from the start of a copy to its end
  };
  struct Thread {
    Snapshot known;
    uint32_t now, fenced;
  };
  struct Range {
    size_t first, last;  // cells; last is the first behind
  };

  uint32_t present(int thread) const;
  bool ordered(uint32_t event, int thread) const;
  bool shown(uint32_t event, int thread) const;
  Range cells(const void* address, size_t bytes) const;
  void read(int thread, uint32_t now, size_t cell);
  void write(int thread, uint32_t now, size_t cell);
  void access(int thread, const Watched& array, size_t first, size_t last, bool write);
  std::string name(uint32_t event) const;  // of whoever did it
  [[noreturn]] void fail(const std::string& what, size_t cell) const;
  [[noreturn]] void fail_between(int thread, const char* does, uint32_t event, const char* did, size_t cell) const;

  int count_;
  const unsigned char* shared_;
  size_t shared_bytes_;
  std::vector<Cell> cells_;
  std::vector<Thread> threads_;
  Snapshot nothing_;
  const std::vector<Watched>* arrays_ = nullptr;
  uint64_t block_ = 0;
  uint32_t copies_ = 0;
  std::minstd_rand random_;
};

}  // namespace emulator
