// The one inner loop of all matrix products here: a tile of C kept in registers while k runs,
//
//     C[r][lanes of v] += sum over k of A(r, k) * B(k, lanes of v)
//
// A is read one number at a time and broadcast, so it may lie in any order; B is read a vector at a time. The
// number type says what one step along k is: one float, or (bfloat16) a pair of neighbours in one 32-bit word.
#pragma once

#include "simd.h"

namespace run_llm {

/// Products of floats.
struct Fp32 {
  using word = float;
  using vector = vec;
  static constexpr int kPack = 1;  // numbers of the k axis in a word
  static INLINE vector spread(word a) { return broadcast(a); }
  static INLINE vector read(const word* p) { return load(p); }
  static INLINE vec multiply_add(vector a, vector b, vec c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
/// Products of bfloat16 numbers, summed in fp32: a word holds those of k = 2i (low half) and 2i + 1.
struct Bf16 {
  using word = uint32_t;
  using vector = __m512i;
  static constexpr int kPack = 2;
  static INLINE vector spread(word a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static INLINE vector read(const word* p) { return _mm512_loadu_si512(p); }
  static INLINE vec multiply_add(vector a, vector b, vec c) {
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

/// Add `steps` steps along k to the tile. a(r, k) = a[r * a_row + k * a_step]; row k of B starts at b + k * b_step.
/// ROWS * VECS + VECS + 1 vectors must fit the registers: 32 with AVX-512, 16 with AVX2.
template <class T, int ROWS, int VECS>
INLINE void accumulate(vec (&c)[ROWS][VECS], const typename T::word* a, ptrdiff_t a_row, ptrdiff_t a_step,
                       const typename T::word* b, ptrdiff_t b_step, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    typename T::vector right[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) right[v] = T::read(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const typename T::vector left = T::spread(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) c[r][v] = T::multiply_add(left, right[v], c[r][v]);
    }
  }
}

}  // namespace run_llm
