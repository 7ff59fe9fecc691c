// FlashAttention-2, forward (arXiv 2307.08691, algorithm 1): query blocks outside, key blocks inside, the softmax
// kept by a running maximum and sum, normalised once at the end.
//
// Keys and values are packed once for each (batch, key/value head); then every (batch, head, block of queries) is a
// unit of work of its own. A unit walks over blocks of keys that stay in the L2 cache, and takes kGroup queries at a
// time: their scores stay in L1 from the product with the keys, through exp, to the product with the values. Keys that
// none of six queries sees are skipped, a vector at a time.
#pragma once

#include <omp.h>

#include "attention_args.h"
#include "scratch.h"

namespace run_llm {

constexpr int kGroup = 2 * kRows;          // queries whose scores are in L1 at a time
constexpr int kKeyBlock = 256;             // keys that are in L2 at a time
constexpr int kQueryBlock = 16 * kGroup;   // queries of a unit
constexpr int64_t kPackedWords = 1 << 24;  // keys and values packed at a time: 64 MB
static_assert(kKeyBlock % kPanel == 0);

template <class T, class S>
struct Forward {
  const AttentionCall<S>& call;
  const int64_t steps, q_row, width, padded_keys;
  const float scale;  // of the scores, into powers of two

  explicit Forward(const AttentionCall<S>& c)
      : call(c), steps(steps_of<T>(c.dim)), q_row(round_up(steps, kLanes)), width(round_up(c.dim, kLanes)),
        padded_keys(round_up(c.keys, kPanel)), scale(c.scale() * kLog2e) {}

  /// What one thread keeps of a unit.
  struct State {
    typename T::word* queries;  // copied rows [kQueryBlock][q_row]
    float* sums;                // weighted values [kQueryBlock][width]
    float* totals;              // lane-wise sums of the weights [kQueryBlock][kLanes]
    float* largest;             // running maxima of the scaled scores [kQueryBlock]
    float* bias;                // of a block of keys [kKeyBlock]
  };
  int64_t state_floats() const { return kQueryBlock * (q_row + width + kLanes + 1) + kKeyBlock; }
  State state(float* memory) const {
    float* sums = memory + kQueryBlock * q_row;
    float* totals = sums + kQueryBlock * width;
    float* largest = totals + kQueryBlock * kLanes;
    return {reinterpret_cast<typename T::word*>(memory), sums, totals, largest, largest + kQueryBlock};
  }

  /// Queries [first, first + count) of one head, against its packed keys and values.
  void unit(int64_t b, int64_t h, int64_t first, int64_t count, const typename T::word* panels,
            const typename T::word* stacks, float* memory) const {
    const State s = state(memory);
    const int64_t padded = round_up(count, kRows);
    copy_rows<T>(call.q.head(b, h).from(first), count, call.dim, s.queries);
    std::fill_n(s.sums, padded * width, 0.f);
    std::fill_n(s.totals, padded * kLanes, 0.f);
    std::fill_n(s.largest, padded, kNothingSeen);
    const Visibility seen = call.visibility(b).from(first);
    const Limits all = limits_of(seen, count);
    for (int64_t key = 0; key < call.keys; key += kKeyBlock) {
      const int64_t key_end = std::min<int64_t>(key + kKeyBlock, call.keys);
      if (span_of(all, seen.prefix, key, key_end).empty()) continue;
      if (call.bias) call.copy_bias(b, h, key, key_end, s.bias);
      for (int64_t row = 0; row < count; row += kGroup)
        group(s, seen, row, std::min<int64_t>(kGroup, count - row), key, key_end, panels, stacks);
    }
    finish(s, b, h, first, count);
  }

  /// kGroup queries against one block of keys.
  void group(const State& s, const Visibility& seen, int64_t row, int64_t rows, int64_t key, int64_t key_end,
             const typename T::word* panels, const typename T::word* stacks) const {
    alignas(64) float scores[kGroup * kKeyBlock];
    alignas(64) float largest[kGroup][kLanes];
    Span spans[2];
    Limits limits[2];
    const int tiles = rows > kRows ? 2 : 1;
    for (int t = 0; t < tiles; ++t) {
      const int64_t begin = row + t * kRows;
      limits[t] = limits_of(seen.from(begin), std::min<int64_t>(kRows, row + rows - begin));
      spans[t] = span_of(limits[t], seen.prefix, key, key_end);
      for (int r = 0; r < kRows; ++r) store(largest[t * kRows + r], broadcast(kNothingSeen));
    }
    for (int64_t panel = key; panel < key_end; panel += kPanel)
      for (int t = 0; t < tiles; ++t) {
        const int64_t begin = std::max(panel, spans[t].begin), end = std::min(panel + kPanel, spans[t].end);
        if (begin >= end) continue;
        const int64_t first_row = row + t * kRows;
        const auto* a = s.queries + first_row * q_row;
        const auto* b = panels + panel * steps + (begin - panel);
        float* out = scores + t * kRows * kKeyBlock + (begin - key);
        const Visibility rows_seen = seen.from(first_row);
        const int64_t real = std::min<int64_t>(kRows, row + rows - first_row);
        const Tile tile{out, largest[t * kRows], call.bias ? s.bias + (begin - key) : nullptr, &rows_seen,
                        all_see(limits[t], seen.prefix, begin, end) ? 0 : real, begin};
        switch ((end - begin) / kLanes) {
#if defined(__AVX512F__) || defined(__aarch64__)
          case 4: score<4>(a, b, tile); break;
          case 3: score<3>(a, b, tile); break;
#endif
          case 2: score<2>(a, b, tile); break;
          default: score<1>(a, b, tile); break;
        }
      }
    for (int t = 0; t < tiles; ++t) {
      const int64_t first_row = row + t * kRows;
      if (spans[t].empty()) continue;
      const int64_t begin = spans[t].begin - key, keys = round_up(spans[t].end - spans[t].begin, T::kPack);
      float* weights = scores + t * kRows * kKeyBlock + begin;
      float fading[kRows];
      for (int r = 0; r < kRows; ++r)
        fading[r] = softmax(weights + r * kKeyBlock, keys, largest[t * kRows + r], s.largest[first_row + r],
                            s.totals + (first_row + r) * kLanes);
      multiply_rows<T>(s.sums + first_row * width, width, fading, reinterpret_cast<const typename T::word*>(weights),
                       kKeyBlock, 1, stacks + spans[t].begin / T::kPack * width, keys / T::kPack);
    }
  }

  /// Where the scores of a tile go and what is done to them on the way.
  struct Tile {
    float* scores;          // [kRows][kKeyBlock]
    float* largest;         // lane-wise maxima so far, [kRows][kLanes]
    const float* bias;      // of these keys, or null
    const Visibility* seen;
    int64_t masked_rows;    // rows to be masked: 0 where every query sees every key of the tile
    int64_t first_key;
  };

  template <int VECS>
  void score(const typename T::word* a, const typename T::word* b, const Tile& tile) const {
    vec c[kRows][VECS];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) c[r][v] = vec{};
    accumulate<T, kRows, VECS>(c, a, q_row, 1, b, kPanel, steps);
    if (tile.bias || tile.masked_rows) {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) {
          if (tile.bias) c[r][v] += load(tile.bias + v * kLanes);
          if (r < tile.masked_rows) c[r][v] = hide_unseen(c[r][v], *tile.seen, r, tile.first_key + v * kLanes);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      vec top = load(tile.largest + r * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        top = max(top, c[r][v]);
        store(tile.scores + r * kKeyBlock + v * kLanes, c[r][v]);
      }
      store(tile.largest + r * kLanes, top);
    }
  }

  /// One row's scores become weights exp(score - maximum), in place, as words of T; the sum of the lanes grows by them.
  /// Returns what the row's earlier sums are to be multiplied with.
  float softmax(float* row, int64_t keys, const float* lane_largest, float& largest, float* totals) const {
    const float before = largest;
    largest = std::max(before, largest_of(load(lane_largest)) * scale);
    const float fading = std::exp2(before - largest);
    const vec top = broadcast(largest), factor = broadcast(scale);
    vec total = load(totals) * broadcast(fading);
    if constexpr (T::kPack == 1) {
      for (int64_t j = 0; j < keys; j += kLanes) {
        const vec weight = exp2(load(row + j) * factor - top);
        total += weight;
        store(row + j, weight);
      }
    } else {
#if defined(__AVX512BF16__)
      auto* words = reinterpret_cast<uint32_t*>(row);
      for (int64_t j = 0; j < keys; j += 2 * kLanes) {
        const vec low = exp2(load(row + j) * factor - top);
        const bool more = j + kLanes < keys;
        const vec high = more ? exp2(load(row + j + kLanes) * factor - top) : vec{};
        total += low + high;
        write_words(words + j / 2, (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
#endif
    }
    store(totals, total);
    return fading;
  }

  /// Normalise; write the output and the log-sum-exp of the scores.
  void finish(const State& s, int64_t b, int64_t h, int64_t first, int64_t count) const {
    const Rows<S> out = call.out.head(b, h).from(first);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kRowsAhead < count) prefetch(out[i + kRowsAhead], call.dim);
      const float total = sum_of(load(s.totals + i * kLanes));
      const float inverse = total > 0 || total != total ? 1 / total : 0.f;  // nothing seen: 0
      for (int64_t c = 0; c < call.dim; c += kLanes)
        write_first(out[i] + c, load(s.sums + i * width + c) * broadcast(inverse), call.dim - c);
      if (call.lse)
        call.lse[(b * call.heads + h) * call.queries + first + i] =
            total == 0 ? 0.f : static_cast<float>((s.largest[i] + std::log2(static_cast<double>(total))) * M_LN2);
    }
  }
};

/// Attention of a whole call; call.lse may be null. Key/value heads are packed and used in waves, so that the packed
/// copies of a long batch do not double its memory.
template <class T, class S>
void attend(const AttentionCall<S>& call) {
  using Word = typename T::word;
  const Forward<T, S> kernel(call);
  const int64_t pairs = call.batch * call.kv_heads, group = call.heads / call.kv_heads;
  const int64_t panel_words = kernel.padded_keys * kernel.steps;
  const int64_t stack_words = kernel.padded_keys / T::kPack * kernel.width;
  const int64_t wave = std::clamp<int64_t>(kPackedWords / (panel_words + stack_words), 1, pairs);
  Word* panels = scratch<Word>(kScratchAttentionKeys, wave * panel_words);
  Word* stacks = scratch<Word>(kScratchAttentionValues, wave * stack_words);
  const int64_t per_thread = round_up(kernel.state_floats(), 16);
  float* states = scratch<float>(kScratchAttentionSums, omp_get_max_threads() * per_thread);
  const int64_t blocks = (call.queries + kQueryBlock - 1) / kQueryBlock;
#pragma omp parallel
  for (int64_t first_pair = 0; first_pair < pairs; first_pair += wave) {
    const int64_t packed = std::min(wave, pairs - first_pair);
#pragma omp for schedule(static)
    for (int64_t slot = 0; slot < packed; ++slot) {
      const int64_t b = (first_pair + slot) / call.kv_heads, h = (first_pair + slot) % call.kv_heads;
      pack_panels<T>(call.k.head(b, h), call.keys, call.dim, panels + slot * panel_words);
      stack_rows<T>(call.v.head(b, h), call.keys, kernel.padded_keys, call.dim, stacks + slot * stack_words);
    }
    // The last blocks of queries see the most keys under a causal mask: they go first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < packed * group * blocks; ++unit) {
      const int64_t slot = unit % (packed * group) / group, pair = first_pair + slot;
      const int64_t b = pair / call.kv_heads, h = pair % call.kv_heads * group + unit % group;
      const int64_t first = (blocks - 1 - unit / (packed * group)) * kQueryBlock;
      kernel.unit(b, h, first, std::min<int64_t>(kQueryBlock, call.queries - first), panels + slot * panel_words,
                  stacks + slot * stack_words, states + omp_get_thread_num() * per_thread);
    }
  }
}

}  // namespace run_llm
