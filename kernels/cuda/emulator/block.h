// A block of the emulator: its threads as fibers, what they wait for, and who runs next.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>

#include "emulator.h"

namespace emulator {

constexpr size_t kSharedAlign = 1024;
constexpr int kBarriers = 16;
constexpr size_t kGuard = 4096;  // bytes behind shared memory that nothing may change

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

/// A place where threads wait for each other.
struct Meeting {
  const char* what = nullptr;
  Gathering clocks;
  int arrived = 0;
  std::vector<int> waiting;
  void* given[kWarp] = {};
};

struct Fiber {
  jmp_buf where;
  ucontext_t start;
  bool started = false, ended = false;
  const char* waits_for = nullptr;
  dim3 thread;
  std::deque<std::vector<Copy>> groups;  // closed by commit(), the oldest first
  std::vector<Copy> open;
};

class Block {
 public:
  Block(int threads, size_t shared_bytes, const std::function<void()>& kernel)
      : kernel_(kernel), shared_bytes_(shared_bytes), fibers_(threads), warps_(threads / kWarp), barriers_(kBarriers),
        memory_(shared_bytes + kGuard + kSharedAlign), shared_(aligned(memory_.data())),
        races_(threads, shared_, shared_bytes) {}

  void run(dim3 index, dim3 blocks, unsigned random_seed, const std::vector<Watched>& arrays, unsigned launch,
           size_t number);

  void suspend(const char* waits_for) {
    Fiber& fiber = *running_;
    fiber.waits_for = waits_for;
    if (_setjmp(fiber.where) == 0) _longjmp(scheduler_, 1);
  }
  void wake(const std::vector<int>& those) { ready_.insert(ready_.end(), those.begin(), those.end()); }
  int number() const { return static_cast<int>(running_ - fibers_.data()); }
  Fiber& running() { return *running_; }
  void later(std::function<void()> act) { events_.push_back(std::move(act)); }
  Meeting& warp() { return warps_[static_cast<size_t>(number() / kWarp)]; }
  Meeting& barrier(int index) { return barriers_[static_cast<size_t>(index)]; }
  unsigned char* shared() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  Races& races() { return races_; }
  [[noreturn]] void stop(const std::string& text) {
    error_ = text;
    _longjmp(scheduler_, 2);
  }

  /// What those did who came to a meeting comes before what those do who waited.
  void order(Meeting& meeting) {
    const Snapshot all = meeting.clocks.snapshot();
    for (const int thread : meeting.waiting) races_.acquire(thread, all);
    races_.acquire(number(), all);
    meeting.clocks = {};
  }

  Place place;
  std::shared_ptr<void> state;

 private:
  static unsigned char* aligned(unsigned char* start) {
    const auto address = reinterpret_cast<uintptr_t>(start);
    return start + ((address + kSharedAlign - 1) / kSharedAlign * kSharedAlign - address);
  }
  static void enter();
  int resume();
  void carry_out_event(unsigned which);

  const std::function<void()>& kernel_;
  size_t shared_bytes_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, barriers_;
  std::vector<unsigned char> memory_;
  unsigned char* shared_;
  std::vector<int> ready_;
  std::vector<std::function<void()>> events_;
  Fiber* running_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
  Races races_;
};

/// The block that runs in this thread; null while none does.
extern thread_local Block* current;

/// Make an access to memory that is not there an error of the kernel that runs.
void watch_faults();

}  // namespace emulator
