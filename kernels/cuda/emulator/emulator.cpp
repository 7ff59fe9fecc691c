#include "emulator.h"

#include <omp.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "abi.h"
#include "block.h"

namespace emulator {
namespace {

unsigned seed = 0;
size_t most_shared = 227 << 10;
thread_local std::vector<Watched> watched;  // by the kernels that this thread launches
std::atomic<unsigned> launches = 0;

void carry_out(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.from)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
    current->races().end_copy(current->number(), copy.to, copy.bytes);
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
  current->races().release(current->number(), meeting.clocks);
  in_warp("__syncwarp", nullptr, [&](void**) { current->order(meeting); });
}

void barrier(int index, int threads, bool stay) {
  if (index < 0 || index >= kBarriers || threads % kWarp)
    fail("no such barrier: " + std::to_string(index) + " of " + std::to_string(threads) + " threads");
  Meeting& meeting = current->barrier(index);
  current->races().release(current->number(), meeting.clocks);
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
  current->races().begin_copy(current->number(), to, bytes);
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

Races& races() { return current->races(); }
int running_thread() { return current->number(); }

void watch(void* start, size_t bytes) {
  watched.emplace_back(start, bytes);
}
void unwatch(void* start) {
  const auto gone = [&](const Watched& array) { return array.start == start; };
  watched.erase(std::remove_if(watched.begin(), watched.end(), gone), watched.end());
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
