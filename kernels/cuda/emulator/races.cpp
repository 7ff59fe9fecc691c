#include "races.h"

#include <algorithm>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kCell = 2;  // bytes: the smallest number that a thread writes
constexpr int kMomentBits = 21, kThreadBits = 11, kBlockBits = 24;

uint32_t event(int thread, uint32_t moment) {
  if (moment >> kMomentBits) fail("a block with more barriers than the watch for races can count");
  return static_cast<uint32_t>(thread) << kMomentBits | moment;
}
int thread_of(uint32_t event) { return static_cast<int>(event >> kMomentBits); }
uint32_t moment_of(uint32_t event) { return event & ((1u << kMomentBits) - 1); }

}  // namespace

void Gathering::join(const Snapshot& clock) {
  if (clock == last_) return;
  last_ = clock;
  if (largest_.empty()) {
    largest_ = *clock;
    return;
  }
  for (size_t i = 0; i < largest_.size(); ++i) largest_[i] = std::max(largest_[i], (*clock)[i]);
}

void Gathering::join(size_t thread, uint32_t now, uint32_t fenced) {
  largest_[thread] = std::max(largest_[thread], now);
  auto& shown = largest_[largest_.size() / 2 + thread];
  shown = std::max(shown, fenced);
}

Watched::Watched(void* start, size_t bytes)
    : start(static_cast<unsigned char*>(start)), bytes(bytes),
      cells(std::make_unique<Cell[]>((bytes + kCell - 1) / kCell)) {}

Races::Races(int threads, const unsigned char* shared, size_t shared_bytes)
    : count_(threads + 1), shared_(shared), shared_bytes_(shared_bytes), cells_((shared_bytes + kCell - 1) / kCell),
      threads_(static_cast<size_t>(threads)), nothing_(std::make_shared<const Clock>(2 * (threads + 1), 0)) {}

void Races::begin(const std::vector<Watched>& arrays, unsigned launch, size_t number, unsigned random_seed) {
  std::fill(cells_.begin(), cells_.end(), Cell{0, {0, 0}, false});
  std::fill(threads_.begin(), threads_.end(), Thread{nothing_, 1, 0});
  arrays_ = &arrays;
  block_ = uint64_t{launch % 255 + 1} << kBlockBits | (number & ((1u << kBlockBits) - 1));
  copies_ = 0;
  random_.seed(random_seed);
}

// ---- the order of moments

uint32_t Races::present(int thread) const { return event(thread, threads_[static_cast<size_t>(thread)].now); }

bool Races::ordered(uint32_t event, int thread) const {
  const auto other = static_cast<size_t>(thread_of(event)), mine = static_cast<size_t>(thread);
  return other == mine || moment_of(event) <= (*threads_[mine].known)[other];
}

bool Races::shown(uint32_t event, int thread) const {
  const int other = thread_of(event);
  if (other == count_ - 1) return true;  // by a bulk copy
  const Thread& mine = threads_[static_cast<size_t>(thread)];
  return moment_of(event) <= (other == thread ? mine.fenced : (*mine.known)[static_cast<size_t>(count_ + other)]);
}

void Races::release(int thread, Gathering& to) {
  Thread& mine = threads_[static_cast<size_t>(thread)];
  to.join(mine.known);
  to.join(static_cast<size_t>(thread), mine.now, mine.fenced);
  ++mine.now;
}

void Races::acquire(int thread, const Snapshot& from) {
  Thread& mine = threads_[static_cast<size_t>(thread)];
  if (!from || from == mine.known) return;
  const bool newer = std::equal(from->begin(), from->end(), mine.known->begin(),
                                [](uint32_t theirs, uint32_t ours) { return theirs >= ours; });
  if (newer) {
    mine.known = from;
    return;
  }
  Gathering both;
  both.join(mine.known);
  both.join(from);
  mine.known = both.snapshot();
}

void Races::fence_async(int thread) {
  Thread& mine = threads_[static_cast<size_t>(thread)];
  mine.fenced = mine.now++;
  Clock known = *mine.known;
  std::copy_n(known.begin(), count_, known.begin() + count_);
  mine.known = std::make_shared<const Clock>(std::move(known));
}

std::string Races::name(uint32_t event) const {
  const int thread = thread_of(event);
  return thread == count_ - 1 ? "a bulk copy" : "thread " + std::to_string(thread);
}

// ---- shared memory

Races::Range Races::cells(const void* address, size_t bytes) const {
  const auto first = static_cast<size_t>(static_cast<const unsigned char*>(address) - shared_);
  return {first / kCell, std::min((first + bytes + kCell - 1) / kCell, cells_.size())};
}

void Races::fail(const std::string& what, size_t cell) const {
  emulator::fail(what + ": byte " + std::to_string(cell * kCell) + " of shared memory");
}

void Races::fail_between(int thread, const char* does, uint32_t event, const char* did, size_t cell) const {
  fail("a race: thread " + std::to_string(thread) + does + name(event) + did + ", with no barrier in between", cell);
}

void Races::read(int thread, uint32_t now, size_t cell) {
  Cell& here = cells_[cell];
  if (here.coming) fail("a race: thread " + std::to_string(thread) + " reads what an asynchronous copy writes", cell);
  if (here.readers[0] == now || here.writer == now) return;
  if (here.writer && !ordered(here.writer, thread))
    fail_between(thread, " reads what ", here.writer, " has written", cell);
  for (uint32_t& reader : here.readers)
    if (!reader || ordered(reader, thread)) {
      reader = now;
      return;
    }
  here.readers[random_() % 2] = now;
}

void Races::write(int thread, uint32_t now, size_t cell) {
  Cell& here = cells_[cell];
  if (here.coming) fail("a race: thread " + std::to_string(thread) + " writes where an asynchronous copy writes", cell);
  if (here.writer == now && !here.readers[0]) return;
  if (here.writer && !ordered(here.writer, thread))
    fail_between(thread, " writes what ", here.writer, " has written", cell);
  for (uint32_t& reader : here.readers) {
    if (reader && !ordered(reader, thread)) fail_between(thread, " writes what ", reader, " has read", cell);
    reader = 0;
  }
  here.writer = now;
}

void Races::access(int thread, const void* address, size_t bytes, bool write) {
  const auto* start = static_cast<const unsigned char*>(address);
  if (start >= shared_ && start < shared_ + shared_bytes_) {
    const Range range = cells(address, bytes);
    const uint32_t now = present(thread);
    for (size_t cell = range.first; cell < range.last; ++cell)
      write ? this->write(thread, now, cell) : read(thread, now, cell);
    return;
  }
  for (const Watched& array : *arrays_)
    if (start >= array.start && start < array.start + array.bytes) {
      const auto first = static_cast<size_t>(start - array.start);
      return access(thread, array, first / kCell, (std::min(first + bytes, array.bytes) + kCell - 1) / kCell, write);
    }
}

void Races::read_by_wgmma(int thread, const void* address, size_t bytes) {
  const Range range = cells(address, bytes);
  const uint32_t now = present(thread);
  for (size_t cell = range.first; cell < range.last; ++cell) {
    read(thread, now, cell);
    if (const uint32_t writer = cells_[cell].writer; writer && !shown(writer, thread))
      fail("wgmma reads what " + name(writer) + " has written, with no fence_async() after", cell);
  }
}

void Races::begin_copy(int thread, const void* to, size_t bytes) {
  const Range range = cells(to, bytes);
  const uint32_t now = present(thread);
  for (size_t cell = range.first; cell < range.last; ++cell) {
    write(thread, now, cell);
    cells_[cell].coming = true;
  }
}

void Races::end_copy(int thread, const void* to, size_t bytes) {
  const Range range = cells(to, bytes);
  const Cell written{present(thread), {0, 0}, false};
  std::fill(cells_.begin() + range.first, cells_.begin() + range.last, written);
}

uint32_t Races::begin_bulk_copy(int thread, const void* to, size_t bytes) {
  begin_copy(thread, to, bytes);
  return ++copies_;
}

void Races::end_bulk_copy(uint32_t copy, const void* to, size_t bytes, Gathering& barrier) {
  const Range range = cells(to, bytes);
  const Cell written{event(count_ - 1, copy), {0, 0}, false};
  std::fill(cells_.begin() + range.first, cells_.begin() + range.last, written);
  barrier.join(nothing_);  // a clock of the right size, if nobody has arrived yet
  barrier.join(static_cast<size_t>(count_ - 1), copy, copy);
}

// ---- global memory

void Races::access(int thread, const Watched& array, size_t first, size_t last, bool write) {
  const uint64_t mine = block_ << 32 | present(thread);
  const auto clash = [&](uint64_t other, const char* did) {
    const uint64_t block = other >> 32;
    if (block >> kBlockBits != block_ >> kBlockBits) return;  // of another launch
    const auto event = static_cast<uint32_t>(other);
    if (block == block_ && ordered(event, thread)) return;
    const std::string who = block == block_ ? name(event) : "another block";
    emulator::fail("a race: thread " + std::to_string(thread) + (write ? " writes" : " reads") + " what " + who + did +
                   ", with nothing in between: byte " + std::to_string(first * kCell) + " of an output or of scratch");
  };
  for (; first < last; ++first) {
    Watched::Cell& cell = array.cells[first];
    if (!write) {
      const uint64_t reader = cell.reader;  // another block's stays
      if (reader >> 32 == block_ || reader >> (32 + kBlockBits) != block_ >> kBlockBits) cell.reader = mine;
      clash(cell.writer, " has written");
      continue;
    }
    clash(cell.writer.exchange(mine), " has written");
    clash(cell.reader, " has read");
  }
}

}  // namespace emulator
