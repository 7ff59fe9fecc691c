#include "emulator.h"

#include <omp.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "abi.h"

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kSharedAlign = 1024;
constexpr size_t kGuard = 4096;          // bytes behind shared memory that nothing may change
constexpr unsigned char kUnset = 0xff;  // a NaN in every floating-point type
constexpr int kBarriers = 16;

unsigned seed = 0;
size_t most_shared = 227 << 10;

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
  void* stack = nullptr;
  bool started = false, ended = false;
  const char* waits_for = nullptr;
  dim3 thread;
  std::deque<std::vector<Copy>> groups;  // closed by commit(), the oldest first
  std::vector<Copy> open;
};

/// Stacks, kept from block to block.
class Stacks {
 public:
  ~Stacks() {
    for (void* stack : all_) munmap(stack, kStack);
  }
  void* get(size_t index) {
    while (all_.size() <= index) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      all_.push_back(stack);
    }
    return all_[index];
  }

 private:
  std::vector<void*> all_;
};

class Block {
 public:
  Block(int threads, size_t shared_bytes, const std::function<void()>& kernel)
      : kernel_(kernel), shared_bytes_(shared_bytes), fibers_(threads), warps_(threads / kWarp), barriers_(kBarriers),
        memory_(shared_bytes + kGuard + kSharedAlign), shared_(aligned(memory_.data())),
        races(threads, shared_, shared_bytes) {}

  void run(dim3 index, dim3 blocks, unsigned random_seed, const std::vector<Watched>& arrays, unsigned launch,
           size_t number);

  void suspend(const char* waits_for) {
    Fiber& fiber = *running_;
    fiber.waits_for = waits_for;
    if (_setjmp(fiber.where) == 0) _longjmp(scheduler_, 1);
  }
  void wake(const std::vector<int>& those) { ready_.insert(ready_.end(), those.begin(), those.end()); }
  void stay_ready() { ready_.push_back(number()); }
  int number() const { return static_cast<int>(running_ - fibers_.data()); }
  Fiber& running() { return *running_; }
  void later(std::function<void()> act) { events_.push_back(std::move(act)); }
  Meeting& warp() { return warps_[static_cast<size_t>(number() / kWarp)]; }
  Meeting& barrier(int index) { return barriers_[static_cast<size_t>(index)]; }
  unsigned char* shared() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  [[noreturn]] void stop(const std::string& text) {
    error_ = text;
    _longjmp(scheduler_, 2);
  }

  /// What those did who came to a meeting comes before what those do who waited.
  void order(Meeting& meeting) {
    const Snapshot all = meeting.clocks.snapshot();
    for (const int thread : meeting.waiting) races.acquire(thread, all);
    races.acquire(number(), all);
    meeting.clocks = {};
  }

  Place place;
  std::shared_ptr<void> state;

 private:
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

 public:
  Races races;

 private:
  static unsigned char* aligned(unsigned char* start) {
    const auto address = reinterpret_cast<uintptr_t>(start);
    return start + ((address + kSharedAlign - 1) / kSharedAlign * kSharedAlign - address);
  }
  static void enter();
  int resume();
  void carry_out_event(unsigned which);
};

thread_local std::vector<Watched> watched;  // by the kernels that this thread launches
std::atomic<unsigned> launches = 0;
thread_local Block* current = nullptr;  // null while none runs in this thread
struct sigaction before_us;
thread_local Stacks stacks;

struct Running {
  Running(Block* block, const std::vector<Watched>& arrays) {
    current = block;
    sight = {block->shared(), nullptr, block->shared_bytes(), 0};
    for (const Watched& array : arrays) {
      const auto* last = std::max(sight.arrays + sight.arrays_bytes, array.start + array.bytes);
      sight.arrays = sight.arrays ? std::min(sight.arrays, array.start) : array.start;
      sight.arrays_bytes = static_cast<size_t>(last - sight.arrays);
    }
  }
  ~Running() { current = nullptr, sight = {}; }
};

/// A thread, for an error's text.
std::string name_of(dim3 thread, dim3 block) {
  return "thread " + std::to_string(thread.x) + " of block (" + std::to_string(block.x) + ", " +
         std::to_string(block.y) + ", " + std::to_string(block.z) + ") ";
}

void Block::enter() {
  current->kernel_();
  current->running_->ended = true;
  _longjmp(current->scheduler_, 1);
}

/// Let the chosen fiber run until it waits, ends (1) or fails (2).
int Block::resume() {
  const int back = _setjmp(scheduler_);
  if (back) return back;
  if (running_->started) _longjmp(running_->where, 1);
  running_->started = true;
  setcontext(&running_->start);
  return 2;  // never: setcontext does not return
}

void Block::carry_out_event(unsigned which) {
  if (std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& fiber) { return fiber.ended; }))
    throw std::runtime_error("a block ended before its bulk copies");
  std::swap(events_[which], events_.back());
  const auto act = std::move(events_.back());
  events_.pop_back();
  if (_setjmp(scheduler_)) throw std::runtime_error(error_);
  const Quiet quiet;
  act();
}

void Block::run(dim3 index, dim3 blocks, unsigned random_seed, const std::vector<Watched>& arrays, unsigned launch,
                size_t number) {
  std::mt19937 random(random_seed);
  races.begin(arrays, launch, number, random_seed);
  std::memset(shared_, kUnset, shared_bytes_ + kGuard);
  place.block = index;
  place.blocks = blocks;
  place.threads = dim3(static_cast<unsigned>(fibers_.size()));
  ready_.resize(fibers_.size());
  std::iota(ready_.begin(), ready_.end(), 0);
  for (size_t i = 0; i < fibers_.size(); ++i) {
    Fiber& fiber = fibers_[i];
    fiber.thread = dim3(static_cast<unsigned>(i), 0, 0);
    fiber.started = fiber.ended = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks.get(i);
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
  }
  barriers_.assign(kBarriers, {});  // some may have been left half full
  for (Meeting& warp : warps_) warp.clocks = {};
  const Running while_it_runs(this, arrays);
  state.reset();
  const unsigned patience = 1u << random() % 16;  // turns of threads from one event to the next
  while (!ready_.empty() || !events_.empty()) {
    if (!events_.empty() && (ready_.empty() || random() % patience == 0)) {
      carry_out_event(random() % static_cast<unsigned>(events_.size()));
      continue;
    }
    std::swap(ready_[random() % ready_.size()], ready_.back());
    running_ = &fibers_[static_cast<size_t>(ready_.back())];
    ready_.pop_back();
    place.thread = running_->thread;
    if (resume() == 2) throw std::runtime_error(error_);
  }
  for (const Fiber& fiber : fibers_) {
    if (!fiber.ended) throw std::runtime_error(name_of(fiber.thread, index) + "waits for ever: " + fiber.waits_for);
    if (!fiber.open.empty() || !fiber.groups.empty())
      throw std::runtime_error(name_of(fiber.thread, index) + "ended before its asynchronous copies");
  }
  for (size_t i = 0; i < kGuard; ++i)
    if (shared_[shared_bytes_ + i] != kUnset)
      throw std::runtime_error("written past the end of shared memory: byte " + std::to_string(shared_bytes_ + i) +
                               " of " + std::to_string(shared_bytes_));
}

/// An access to memory that is not there: an error of the kernel, if one runs in this thread.
void on_fault(int, siginfo_t* info, void*) {
  if (!current) {  // not ours: once more, for whoever was here before
    sigaction(SIGSEGV, &before_us, nullptr);
    return;
  }
  char where[32];
  std::snprintf(where, sizeof where, "%p", info->si_addr);
  current->stop(name_of(current->place.thread, current->place.block) +
                "reads or writes outside the kernel's arrays, or writes to an input: at " + where);
}

void watch_faults() {
  static const bool once = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // it is left by a jump
    return sigaction(SIGSEGV, &action, &before_us) == 0;
  }();
  static_cast<void>(once);
}

void carry_out(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.from)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
    current->races.end_copy(current->number(), copy.to, copy.bytes);
  }
}

}  // namespace

const Place& place() { return current->place; }

void* shared() { return current->shared(); }

void fail(const std::string& text) { current->stop(text); }

void check_shared(const char* what, const void* address, size_t bytes, size_t align) {
  const auto* first = static_cast<const unsigned char*>(address);
  if (first < current->shared() || first + bytes > current->shared() + current->shared_bytes())
    fail(std::string(what) + ": an address outside shared memory");
  if (reinterpret_cast<uintptr_t>(address) % align) fail(std::string(what) + ": a misaligned address");
}

void in_warp(const char* what, void* mine, const std::function<void(void**)>& act) {
  Meeting& meeting = current->warp();
  if (meeting.arrived && std::strcmp(meeting.what, what) != 0)
    fail(std::string("lanes of a warp part ways: ") + meeting.what + " and " + what);
  meeting.what = what;
  meeting.given[current->number() % kWarp] = mine;
  if (++meeting.arrived < kWarp) {
    meeting.waiting.push_back(current->number());
    current->suspend(what);
    return;
  }
  {
    const Quiet quiet;
    act(meeting.given);
  }
  meeting.arrived = 0;
  current->wake(meeting.waiting);
  meeting.waiting.clear();
}

void sync_warp() {
  Meeting& meeting = current->warp();
  current->races.release(current->number(), meeting.clocks);
  in_warp("__syncwarp", nullptr, [&](void**) { current->order(meeting); });
}

void barrier(int index, int threads, bool stay) {
  if (index < 0 || index >= kBarriers || threads % kWarp)
    fail("no such barrier: " + std::to_string(index) + " of " + std::to_string(threads) + " threads");
  Meeting& meeting = current->barrier(index);
  current->races.release(current->number(), meeting.clocks);
  if (++meeting.arrived < threads) {
    if (!stay) return;
    meeting.waiting.push_back(current->number());
    current->suspend("a barrier");
    return;
  }
  current->order(meeting);
  meeting.arrived = 0;
  current->wake(meeting.waiting);
  meeting.waiting.clear();
}

void yield() {
  current->stay_ready();
  current->suspend("its turn");
}

void wait_in(std::vector<int>& list, const char* what) {
  list.push_back(current->number());
  current->suspend(what);
}

void wake(std::vector<int>& list) {
  current->wake(list);
  list.clear();
}

void later(std::function<void()> act) { current->later(std::move(act)); }

std::shared_ptr<void>& block_state() { return current->state; }

void copy_later(void* to, const void* from, size_t bytes) {
  check_shared("an asynchronous copy", to, bytes, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("an asynchronous copy: a misaligned source");
  current->races.begin_copy(current->number(), to, bytes);
  current->running().open.push_back({to, from, bytes});
}

void commit() {
  Fiber& fiber = current->running();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_copies(int left) {
  auto& groups = current->running().groups;
  for (; groups.size() > static_cast<size_t>(left); groups.pop_front()) carry_out(groups.front());
}

thread_local Sight sight;

void access(const void* address, size_t bytes, bool write) {
  current->races.access(current->number(), address, bytes, write);
}
void read_by_wgmma(int thread, const void* address, size_t bytes) {
  current->races.read_by_wgmma(thread, address, bytes);
}
void release(Gathering& to) { current->races.release(current->number(), to); }
void acquire(const Snapshot& from) { current->races.acquire(current->number(), from); }
void fence_async() { current->races.fence_async(current->number()); }
uint32_t begin_bulk_copy(void* to, size_t bytes) {
  return current->races.begin_bulk_copy(current->number(), to, bytes);
}
void end_bulk_copy(uint32_t copy, void* to, size_t bytes, Gathering& barrier) {
  current->races.end_bulk_copy(copy, to, bytes, barrier);
}

void watch(void* start, size_t bytes) {
  watched.push_back({static_cast<unsigned char*>(start), bytes, std::make_unique<Watched::Cell[]>((bytes + 1) / 2)});
}
void unwatch(void* start) {
  watched.erase(std::remove_if(watched.begin(), watched.end(), [&](const Watched& array) { return array.start == start; }),
                watched.end());
}

size_t shared_memory_limit() { return most_shared; }

void run(dim3 blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads < 1 || threads > 1024 || threads % kWarp)
    throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  const size_t count = static_cast<size_t>(blocks.x) * blocks.y * blocks.z;
  if (count == 0 || blocks.x > 0x7fffffff || blocks.y > 65535 || blocks.z > 65535)
    throw std::runtime_error("a grid of (" + std::to_string(blocks.x) + ", " + std::to_string(blocks.y) + ", " +
                             std::to_string(blocks.z) + ") blocks");
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  watch_faults();
  const std::vector<Watched>& arrays = watched;
  const unsigned launch = launches++;
  std::string error;  // the first one
  std::mutex lock;
  std::atomic<bool> failed = false;
#pragma omp parallel
  {
    auto block = std::make_unique<Block>(threads, shared_bytes, kernel);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < count; ++i) {
      const size_t n = order[i];
      const dim3 index(n % blocks.x, n / blocks.x % blocks.y, n / blocks.x / blocks.y);
      try {
        if (!failed) block->run(index, blocks, seed * 7919 + static_cast<unsigned>(n), arrays, launch, n);
      } catch (const std::exception& caught) {
        block = std::make_unique<Block>(threads, shared_bytes, kernel);
        const std::lock_guard<std::mutex> held(lock);
        if (!failed) error = caught.what();
        failed = true;
      }
    }
  }
  if (failed) throw std::runtime_error(error);
}

}  // namespace emulator

/// Watch an array that kernels write for races, until it is forgotten.
EXPORT void emulator_watch(void* start, size_t bytes) { emulator::watch(start, bytes); }
EXPORT void emulator_unwatch(void* start) { emulator::unwatch(start); }
/// Draw the order of threads and blocks from this number from now on.
EXPORT void emulator_seed(unsigned value) { emulator::seed = value; }
/// Let a block have at most so many bytes of shared memory from now on, as on a smaller GPU.
EXPORT void emulator_shared_memory(unsigned bytes) { emulator::most_shared = bytes; }
