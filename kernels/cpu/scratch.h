// Scratch memory that stays: one arena for each thread and slot, which grows to the largest size asked for and is
// freed when the thread ends. Kernels that call each other use different slots.
//
// scratch() may throw, and no exception may leave an OpenMP region: ask before the region, in the calling thread,
// for the memory of all its threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace run_llm {

/// Who uses an arena. A kernel that runs inside another one, or beside it in one call, needs slots of its own.
enum ScratchSlot : int {
  kScratchGemmLeft,
  kScratchGemmRight,
  kScratchLossLogits,
  kScratchLossRows,
  kScratchAttentionKeys,
  kScratchAttentionValues,
  kScratchAttentionQueries,
  kScratchAttentionScores,
  kScratchAttentionSums,
  kScratchDecodeShared,
  kScratchDecodeOwn,
  kScratchSlots,
};

/// One block of memory that grows and is never given back before its thread ends; what it held is lost by growing.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(memory_); }

  void* at_least(size_t bytes) {
    if (bytes <= size_) return memory_;
    // From 2 MB on in huge pages: packed operands are walked with strides that would miss the TLB.
    const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
    if (bytes > SIZE_MAX - alignment) throw std::bad_alloc();
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    std::free(memory_);
    size_ = 0;
    memory_ = std::aligned_alloc(alignment, rounded);
    if (!memory_) throw std::bad_alloc();
    size_ = rounded;
#if defined(__linux__)
    if (alignment == kHugePage) madvise(memory_, rounded, MADV_HUGEPAGE);  // a refusal only makes it slower
#endif
    return memory_;
  }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;
  void* memory_ = nullptr;
  size_t size_ = 0;
};

/// This thread's arena of a slot.
inline Arena& arena(int slot) {
  static thread_local Arena arenas[kScratchSlots];
  return arenas[slot];
}

/// Room for `count` numbers of type T, aligned to 64 bytes, until this thread asks for the same slot again. Its
/// content is undefined. Throws std::bad_alloc.
template <class T>
inline T* scratch(int slot, size_t count) {
  if (count > SIZE_MAX / sizeof(T)) throw std::bad_alloc();
  return static_cast<T*>(arena(slot).at_least(count * sizeof(T)));
}

}  // namespace run_llm
