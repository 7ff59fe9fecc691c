#include "block.h"

#include <signal.h>
#include <sys/mman.h>

#include <cstdio>
#include <numeric>
#include <random>

namespace emulator {

thread_local Block* current = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned char kUnset = 0xff;  // a NaN in every floating-point type

struct sigaction before_us;

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

}  // namespace

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
  races_.begin(arrays, launch, number, random_seed);
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
static void on_fault(int, siginfo_t* info, void*) {
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

}  // namespace emulator
