// The functions of instructions.h for the emulator. A warp's instruction is carried out when its last lane comes.
#pragma once

#include <cmath>
#include <cstring>

#include "abi.h"
#include "emulator.h"

namespace run_llm {

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

/// Shared memory's addresses begin at 1024, as on a GPU whose system takes the first kilobyte.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               static_cast<const unsigned char*>(emulator::shared())) + emulator::kSharedStart;
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, rest = x.bits & 1023;
  if (exponent == 31) return same_bits<float>(sign | 0x7f800000u | rest << 13);
  const float size = exponent ? std::ldexp(static_cast<float>(1024 + rest), static_cast<int>(exponent) - 25)
                              : std::ldexp(static_cast<float>(rest), -24);
  return sign ? -size : size;
}

/// Rounded to the nearest, ties to even.
template <class T>
T rounded_to(float x);
template <>
inline bf16 rounded_to<bf16>(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 rounded_to<fp16>(float x) {
  if (x != x) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // One unit in the last place is 2^(e - 10), but never below 2^-24; nearbyint rounds ties to even.
  const int exponent = size < std::ldexp(1.f, -14) ? -14 : std::ilogb(size);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};  // units counts the hidden bit: 1024
}

template <class T>
uint32_t pack(float low, float high) {
  return rounded_to<T>(low).bits | static_cast<uint32_t>(rounded_to<T>(high).bits) << 16;
}

inline int fresh(int x) { return x; }

template <class T>
T exchanged(const char* what, T x, int other) {
  struct Lane {
    T give, get;
    int from;
  } mine{x, x, other};
  emulator::in_warp(what, &mine, [](void** lanes) {
    for (int i = 0; i < emulator::kWarp; ++i) {
      auto* lane = static_cast<Lane*>(lanes[i]);
      lane->get = static_cast<Lane*>(lanes[lane->from & 31])->give;
    }
  });
  return mine.get;
}
inline int lane_number() { return static_cast<int>(threadIdx.x) % emulator::kWarp; }
inline float shuffle_xor(float x, int mask) { return exchanged("shuffle_xor", x, lane_number() ^ mask); }
inline int shuffle_xor(int x, int mask) { return exchanged("shuffle_xor", x, lane_number() ^ mask); }
inline float shuffle(float x, int lane) { return exchanged("shuffle", x, lane); }
inline int shuffle(int x, int lane) { return exchanged("shuffle", x, lane); }
inline bool any_lane(bool x) {
  emulator::in_warp("any_lane", &x, [](void** lanes) {
    bool any = false;
    for (int i = 0; i < emulator::kWarp; ++i) any = any || *static_cast<bool*>(lanes[i]);
    for (int i = 0; i < emulator::kWarp; ++i) *static_cast<bool*>(lanes[i]) = any;
  });
  return x;
}

inline uint32_t vote(bool x) {
  struct Lane {
    bool give;
    uint32_t get;
  } mine{x, 0};
  emulator::in_warp("vote", &mine, [](void** lanes) {
    uint32_t all = 0;
    for (int i = 0; i < emulator::kWarp; ++i) all |= static_cast<uint32_t>(static_cast<Lane*>(lanes[i])->give) << i;
    for (int i = 0; i < emulator::kWarp; ++i) static_cast<Lane*>(lanes[i])->get = all;
  });
  return mine.get;
}
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }

inline void barrier_wait(int index, int threads) { emulator::barrier(index, threads); }
inline void barrier_arrive(int index, int threads) { emulator::barrier(index, threads, false); }

inline void copy_async_16(void* to, const void* from, bool valid) {
  emulator::copy_later(to, valid ? from : nullptr, 16);
}
inline void copy_async_4(void* to, const void* from, bool valid) {
  emulator::copy_later(to, valid ? from : nullptr, 4);
}
inline void copy_async_commit() { emulator::commit(); }
template <int kLeft>
void copy_async_wait() {
  emulator::wait_for_copies(kLeft);
}

template <class T>
void load_once_16(T (&to)[4], const void* from, bool valid) {
  static_assert(sizeof to == 16);
  if (valid && reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("load_once_16: a misaligned source");
  std::memset(to, 0, 16);
  if (valid) std::memcpy(to, from, 16);
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Lane {
    uint32_t* to;
    const unsigned char* row;
  } mine{to, static_cast<const unsigned char*>(row)};
  emulator::check_shared("load_matrices", row, 16, 16);
  emulator::access(row, 16, false);
  emulator::in_warp(kTransposed ? "load_matrices transposed" : "load_matrices", &mine, [](void** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < emulator::kWarp; ++i) {
        uint16_t pair[2];
        for (int n = 0; n < 2; ++n) {
          const int row = kTransposed ? i % 4 * 2 + n : i / 4, column = kTransposed ? i / 4 : i % 4 * 2 + n;
          std::memcpy(&pair[n], static_cast<Lane*>(lanes[matrix * 8 + row])->row + 2 * column, 2);
        }
        static_cast<Lane*>(lanes[i])->to[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
  });
}

struct FragmentLane {
  float* sum;
  const uint32_t *a, *b;
};

/// sum [16][8] += a [16][kDepth] b [kDepth][8], and back into the lanes' fragments.
template <int kDepth>
void multiply_tile(void** lanes, const float (&a)[16][kDepth], const float (&b)[8][kDepth]) {
  for (int i = 0; i < emulator::kWarp; ++i)
    for (int n = 0; n < 4; ++n) {
      const int row = i / 4 + n / 2 * 8, column = i % 4 * 2 + n % 2;
      float sum = 0;
      for (int d = 0; d < kDepth; ++d) sum += a[row][d] * b[column][d];
      static_cast<FragmentLane*>(lanes[i])->sum[n] += sum;
    }
}

template <class T>
void multiply_16x8x16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FragmentLane mine{sum, a, b};
  const char* what = std::is_same<T, bf16>::value ? "multiply bf16" : "multiply fp16";
  emulator::in_warp(what, &mine, [](void** lanes) {
    float left[16][16], right[8][16];
    for (int i = 0; i < emulator::kWarp; ++i) {
      const auto* lane = static_cast<const FragmentLane*>(lanes[i]);
      for (int n = 0; n < 8; ++n) {  // a: registers are (row + 0, + 8) x (columns + 0, + 8), two columns each
        const uint32_t bits = lane->a[n / 2] >> n % 2 * 16;
        left[i / 4 + n / 2 % 2 * 8][i % 4 * 2 + n % 2 + n / 4 * 8] = to_float(T{static_cast<uint16_t>(bits)});
      }
      for (int n = 0; n < 4; ++n) {
        const uint32_t bits = lane->b[n / 2] >> n % 2 * 16;
        right[i / 4][i % 4 * 2 + n % 2 + n / 2 * 8] = to_float(T{static_cast<uint16_t>(bits)});
      }
    }
    multiply_tile(lanes, left, right);
  });
}

inline void multiply_16x8x8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FragmentLane mine{sum, a, b};
  emulator::in_warp("multiply tf32", &mine, [](void** lanes) {
    float left[16][8], right[8][8];
    const auto number = [](uint32_t bits) { return same_bits<float>(bits & ~0x1fffu); };
    for (int i = 0; i < emulator::kWarp; ++i) {
      const auto* lane = static_cast<const FragmentLane*>(lanes[i]);
      for (int n = 0; n < 4; ++n) left[i / 4 + n % 2 * 8][i % 4 + n / 2 * 4] = number(lane->a[n]);
      for (int n = 0; n < 2; ++n) right[i / 4][i % 4 + n * 4] = number(lane->b[n]);
    }
    multiply_tile(lanes, left, right);
  });
}

}  // namespace run_llm
