// What -fsanitize=thread makes of the kernels' sources: a call for each access to memory. These stand in for the
// functions of the sanitizer's own runtime, which is not linked, and hand the access on to races.h.
#include <cstddef>
#include <cstdint>

#include "emulator.h"

namespace {

inline void note(const void* address, size_t bytes, bool write) {
  if (emulator::sight.sees(address)) emulator::access(address, bytes, write);
}

}  // namespace

#define HOOKS(bytes)                                                                   \
  void __tsan_read##bytes(void* address) { note(address, bytes, false); }              \
  void __tsan_write##bytes(void* address) { note(address, bytes, true); }              \
  void __tsan_unaligned_read##bytes(void* address) { note(address, bytes, false); }    \
  void __tsan_unaligned_write##bytes(void* address) { note(address, bytes, true); }    \
  void __tsan_volatile_read##bytes(void* address) { note(address, bytes, false); }     \
  void __tsan_volatile_write##bytes(void* address) { note(address, bytes, true); }

extern "C" {

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) { note(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { note(address, bytes, true); }

// Of the C++ library's shared pointers; kernels have no atomics.
int32_t __tsan_atomic32_fetch_add(volatile int32_t* address, int32_t more, int) {
  return __atomic_fetch_add(address, more, __ATOMIC_SEQ_CST);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
