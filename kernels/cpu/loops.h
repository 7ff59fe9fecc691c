// The loops of the elementwise kernels: over the vectors of a row, whose last, partial one is handled alike, and
// over the blocks of a long array on all threads.
#pragma once

#include <algorithm>

#include "simd.h"

namespace run_llm {

/// Work on fewer numbers than this is not worth waking the other threads.
constexpr int64_t kParallelFrom = 32768;

/// How a step of a loop reads and writes: all lanes, or the first few (zeros are read into the others). `only` makes
/// the other lanes zero again.
struct AllLanes {
  INLINE vec load(const float* p) const { return run_llm::load(p); }
  INLINE void store(float* p, vec x) const { run_llm::store(p, x); }
  INLINE vec only(vec x) const { return x; }
};
struct FirstLanes {
  int count;
  INLINE vec load(const float* p) const { return load_first(p, count); }
  INLINE void store(float* p, vec x) const { store_first(p, x, count); }
  INLINE vec only(vec x) const { return lane_numbers() < count ? x : broadcast(0.f); }
};

/// All lanes of rows that are only read, in two halves with AVX-512: at most one of them crosses a cache line, and that
/// makes reading from memory up to a third faster where the rows do not lie on boundaries.
struct ReadLanes {
  INLINE vec load(const float* p) const {
#if defined(__AVX512F__)
    return (vec)_mm512_insertf32x8(_mm512_zextps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(p + 8), 1);
#else
    return run_llm::load(p);
#endif
  }
  INLINE vec only(vec x) const { return x; }
};

/// step(i, at) for the vectors that start at i = begin, begin + kLanes ...; `at` loads and stores.
template <class Step>
INLINE void each_vector(int64_t begin, int64_t end, Step step) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) step(i, AllLanes{});
  if (i < end) step(i, FirstLanes{static_cast<int>(end - i)});
}

/// The same, after a first, partial step that brings `written` + i to a boundary of vectors: stores across cache lines
/// cost a third of the memory bandwidth, and large arrays often lie 16 bytes past a line, as malloc gives them.
template <class Step>
INLINE void each_aligned_vector(const float* written, int64_t begin, int64_t end, Step step) {
  const int64_t past = reinterpret_cast<uintptr_t>(written + begin) / sizeof(float) % kLanes;
  const int64_t first = std::min((kLanes - past) % kLanes, end - begin);
  if (first) step(begin, FirstLanes{static_cast<int>(first)});
  each_vector(begin + first, end, step);
}

/// Sums over a row: step(i, at, sums) adds its vectors to sums[0 .. COUNT - 1], and zeros in lanes past the end.
/// Four chains of additions run side by side, so that none waits for the one before it.
template <int COUNT, class Step>
INLINE void sum_vectors(int64_t n, float (&totals)[COUNT], Step step) {
  vec chains[4][COUNT];
  for (auto& chain : chains)
    for (vec& sum : chain) sum = broadcast(0);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < 4; ++chain) step(i + chain * kLanes, ReadLanes{}, chains[chain]);
  }
  each_vector(i, n, [&](int64_t j, auto at) { step(j, at, chains[0]); });
  for (int k = 0; k < COUNT; ++k)
    totals[k] = sum_of((chains[0][k] + chains[1][k]) + (chains[2][k] + chains[3][k]));
}

/// work(begin, end) for the blocks of [0, n), on all threads. The blocks are the same for every number of threads,
/// and with them every bit of the result.
template <class Work>
INLINE void each_block(int64_t n, Work work) {
  constexpr int64_t kBlock = 8192;
#pragma omp parallel for schedule(static) if (n >= kParallelFrom)
  for (int64_t begin = 0; begin < n; begin += kBlock) work(begin, std::min(begin + kBlock, n));
}

}  // namespace run_llm
