// FlashAttention-2, backward (arXiv 2307.08691, algorithm 2): the weights are formed again from the log-sum-exp that
// the forward pass kept, tile by tile, and never exist as a whole.
//
// With c = 1 / sqrt(D), P = exp(c (q k^T + bias) - lse), dP = dO v^T and delta = rowsum(dO O):
//
//     dV = P^T dO      dS = P (dP - delta)      dQ = c dS K      dK = c dS^T Q
//
// A unit of work is a (batch, key/value head, chunk of keys): it owns its rows of dK and dV, over all the query heads
// of the group. Its share of dQ goes to a buffer of its own, and the shares of a head's chunks are added in order at
// the end, so the result does not depend on who computed what. The number of chunks follows from the shapes alone.
#pragma once

#include <utility>

#include "attention_args.h"

namespace run_llm {

constexpr int kQueryTile = 16 * kRows;   // queries and
constexpr int kKeyTile = 192;            // keys of a tile of P and dS
constexpr int kKeyGroups = kKeyTile / kRows;
constexpr int64_t kWantedUnits = 16;     // enough for the cores of a small machine to share evenly
static_assert(kKeyTile % kPanel == 0 && kKeyTile % kRows == 0);

template <class T, class S>
struct Backward {
  using Word = typename T::word;
  const AttentionCall<S>& call;
  const int64_t steps, row_words, width, chunk_keys, chunks;
  const float scale;

  Backward(const AttentionCall<S>& c)
      : call(c), steps(steps_of<T>(c.dim)), row_words(round_up(steps, kLanes)), width(round_up(c.dim, kLanes)),
        chunk_keys(chunk_size(c)), chunks((c.keys + chunk_keys - 1) / chunk_keys), scale(c.scale()) {}

  static int64_t chunk_size(const AttentionCall<S>& c) {
    const int64_t tiles = (c.keys + kKeyTile - 1) / kKeyTile;
    const int64_t wanted = (kWantedUnits + c.batch * c.kv_heads - 1) / (c.batch * c.kv_heads);
    return (tiles + std::min(wanted, tiles) - 1) / std::min(wanted, tiles) * kKeyTile;
  }

  /// What one thread keeps: the packed operands of a tile of keys and a tile of queries, P and dS, and its sums.
  struct State {
    Word *key_panels, *value_panels, *key_stack;              // of the chunk
    Word *query_rows, *query_stack, *dout_rows, *dout_stack;  // of a tile
    Word *weights, *slopes_across, *slopes_along;             // P and dS in words across rows; dS in words along a row
    float *dk, *dv;                                           // of the chunk [chunk_keys][width]
    float* bias;                                              // of a tile of keys
    float scores[kRows * kPanel];
  };
  int64_t state_floats() const {
    return chunk_keys * (2 * steps + width / T::kPack + 2 * width) + 2 * kQueryTile * (row_words + width / T::kPack) +
           3 * kQueryTile * kKeyTile + kKeyTile;
  }
  State state(float* memory) const {
    State s;
    auto take = [&memory](int64_t count) { return std::exchange(memory, memory + count); };
    auto words = [&take](int64_t count) { return reinterpret_cast<Word*>(take(count)); };
    s.key_panels = words(chunk_keys * steps);
    s.value_panels = words(chunk_keys * steps);
    s.key_stack = words(chunk_keys * width / T::kPack);
    s.query_rows = words(kQueryTile * row_words);
    s.query_stack = words(kQueryTile * width / T::kPack);
    s.dout_rows = words(kQueryTile * row_words);
    s.dout_stack = words(kQueryTile * width / T::kPack);
    s.weights = words(kQueryTile * kKeyTile);
    s.slopes_across = words(kQueryTile * kKeyTile);
    s.slopes_along = words(kQueryTile * kKeyTile);
    s.dk = take(chunk_keys * width);
    s.dv = take(chunk_keys * width);
    s.bias = take(kKeyTile);
    return s;
  }

  /// dK and dV of one chunk, and its share of dQ: [group heads][padded queries][width] at `dq`.
  void unit(int64_t b, int64_t kv_head, int64_t chunk, float* memory, const float* delta, float* dq) const {
    State s = state(memory);
    const int64_t first = chunk * chunk_keys, count = std::min(chunk_keys, call.keys - first);
    const Rows<const S> k = call.k.head(b, kv_head).from(first), v = call.v.head(b, kv_head).from(first);
    pack_panels<T>(k, count, call.dim, s.key_panels);
    pack_panels<T>(v, count, call.dim, s.value_panels);
    stack_rows<T>(k, count, chunk_keys, call.dim, s.key_stack);
    std::fill_n(s.dk, chunk_keys * width, 0.f);
    std::fill_n(s.dv, chunk_keys * width, 0.f);
    const int64_t group = call.heads / call.kv_heads, padded = round_up(call.queries, kRows);
    for (int64_t g = 0; g < group; ++g)
      head(s, b, kv_head * group + g, first, count, delta, dq + g * padded * width);
    write(s.dk, scale, call.dk.head(b, kv_head).from(first), count);
    write(s.dv, 1.f, call.dv.head(b, kv_head).from(first), count);
  }

  void head(State& s, int64_t b, int64_t h, int64_t first_key, int64_t keys, const float* delta, float* dq) const {
    std::fill_n(dq, round_up(call.queries, kRows) * width, 0.f);
    const float* lse = call.given_lse + (b * call.heads + h) * call.queries;
    const float* head_delta = delta + (b * call.heads + h) * call.queries;
    const Visibility seen = call.visibility(b);
    for (int64_t query = 0; query < call.queries; query += kQueryTile) {
      const int64_t queries = std::min<int64_t>(kQueryTile, call.queries - query);
      const Limits all = limits_of(seen.from(query), queries);
      bool packed = false;
      for (int64_t key = 0; key < keys; key += kKeyTile) {
        const int64_t key_end = std::min<int64_t>(key + kKeyTile, keys);
        if (span_of(all, seen.prefix, first_key + key, first_key + key_end).empty()) continue;
        if (!packed) pack_queries(s, b, h, query, queries);
        packed = true;
        if (call.bias) call.copy_bias(b, h, first_key + key, first_key + key_end, s.bias);
        tile(s, seen.from(query), queries, first_key, key, key_end, lse + query, head_delta + query,
             dq + query * width);
      }
    }
  }

  void pack_queries(const State& s, int64_t b, int64_t h, int64_t query, int64_t queries) const {
    const Rows<const S> q = call.q.head(b, h).from(query), dout = call.dout.head(b, h).from(query);
    copy_rows<T>(q, queries, call.dim, s.query_rows);
    copy_rows<T>(dout, queries, call.dim, s.dout_rows);
    const int64_t padded = round_up(queries, kRows);
    stack_rows<T>(q, queries, padded, call.dim, s.query_stack);
    stack_rows<T>(dout, queries, padded, call.dim, s.dout_stack);
  }

  /// One tile of P and dS, and what it adds to dV, dK and dQ. Keys are counted from the chunk's first one.
  void tile(State& s, const Visibility& seen, int64_t queries, int64_t first_key, int64_t key, int64_t key_end,
            const float* lse, const float* delta, float* dq) const {
    Limits limits[kQueryTile / kRows];  // of each six queries
    Span spans[kQueryTile / kRows];     // keys that they see, counted from the chunk's first
    int64_t from[kKeyGroups], to[kKeyGroups];  // queries that see any of each six keys
    std::fill_n(from, kKeyGroups, int64_t{kQueryTile});
    std::fill_n(to, kKeyGroups, int64_t{0});
    const int64_t row_groups = (queries + kRows - 1) / kRows;
    for (int64_t g = 0; g < row_groups; ++g) {
      const int64_t row = g * kRows;
      limits[g] = limits_of(seen.from(row), std::min<int64_t>(kRows, queries - row));
      spans[g] = span_of(limits[g], seen.prefix, first_key + key, first_key + key_end);
      spans[g].begin -= first_key;
      spans[g].end -= first_key;
      if (spans[g].empty()) continue;
      for (int64_t c = (spans[g].begin - key) / kRows; c * kRows < spans[g].end - key; ++c) {
        from[c] = std::min(from[c], row);
        to[c] = std::max(to[c], row + kRows);
      }
    }
    int64_t first_group = 0;
    while (first_group < row_groups && spans[first_group].empty()) ++first_group;
    for (int64_t panel = key; panel < key_end; panel += kPanel) {
      for (int64_t g = first_group; g < row_groups; ++g)
        panel_of(s, seen, g * kRows, queries, first_key, key, panel, spans[g], limits[g], lse, delta);
    }
    // Each six keys: dV += P^T dO and dK += dS^T Q over the queries that see them.
    for (int64_t c = 0; c < kKeyGroups; ++c) {
      if (from[c] >= to[c]) continue;
      const int64_t row = key + c * kRows, words = (to[c] - from[c]) / T::kPack, skipped = from[c] / T::kPack;
      const Word* p = s.weights + skipped * kKeyTile + c * kRows;
      const Word* ds = s.slopes_across + skipped * kKeyTile + c * kRows;
      multiply_rows<T>(s.dv + row * width, width, nullptr, p, 1, kKeyTile, s.dout_stack + skipped * width, words);
      multiply_rows<T>(s.dk + row * width, width, nullptr, ds, 1, kKeyTile, s.query_stack + skipped * width, words);
    }
    // Each six queries: dQ += dS K over the keys that they see.
    for (int64_t g = 0; g < row_groups; ++g) {
      if (spans[g].empty()) continue;
      const int64_t words = (spans[g].end - spans[g].begin) / T::kPack, skipped = (spans[g].begin - key) / T::kPack;
      const Word* ds = along(s) + g * kRows * kAlongRow + skipped;
      multiply_rows<T>(dq + g * kRows * width, width, nullptr, ds, kAlongRow, 1,
                       s.key_stack + spans[g].begin / T::kPack * width, words);
    }
  }

  // dS in words along its rows: for floats that is the same array as in words across rows.
  static constexpr int64_t kAlongRow = kKeyTile / T::kPack;
  static Word* along(const State& s) { return T::kPack == 1 ? s.slopes_across : s.slopes_along; }

  /// Six queries against one panel of keys: their part of P and dS; zeros where none of the six sees a key.
  void panel_of(State& s, const Visibility& seen, int64_t row, int64_t queries, int64_t first_key, int64_t key,
                int64_t panel, const Span& span, const Limits& all, const float* lse, const float* delta) const {
    const int64_t begin = std::clamp(span.begin, panel, panel + kPanel);
    const int64_t end = std::clamp(span.end, begin, panel + kPanel);
    for (int64_t j = panel; j < panel + kPanel; j += kLanes)
      if (j < begin || j >= end) write_zeros(s, row, j - key);
    if (begin >= end) return;
    const bool unmasked = all_see(all, seen.prefix, first_key + begin, first_key + end);
    Part part{row, begin - key, first_key + begin, unmasked ? 0 : kRows, &seen, {}, {}};
    for (int r = 0; r < kRows; ++r) {
      const bool real = row + r < queries;
      part.lse[r] = real ? lse[row + r] : -kHidden;  // the weights of a padding row are 0
      part.delta[r] = real ? delta[row + r] : 0.f;
      if (!real) part.masked_rows = std::min<int>(part.masked_rows, r);  // it has no range either
    }
    const int64_t offset = panel * steps + (begin - panel);
    switch ((end - begin) / kLanes) {
#if defined(__AVX512F__) || defined(__aarch64__)
      case 4: scores<4>(s, part, offset); break;
      case 3: scores<3>(s, part, offset); break;
#endif
      case 2: scores<2>(s, part, offset); break;
      default: scores<1>(s, part, offset); break;
    }
  }

  struct Part {
    int64_t row, column, first_key;  // in the tile, in the tile, among all keys
    int masked_rows;
    const Visibility* seen;
    float lse[kRows], delta[kRows];
  };

  template <int VECS>
  INLINE void scores(State& s, const Part& part, int64_t offset) const {
    vec c[kRows][VECS];
    clear(c);
    accumulate<T, kRows, VECS>(c, s.query_rows + part.row * row_words, row_words, 1, s.key_panels + offset, kPanel,
                               steps);
    const vec factor = broadcast(scale);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        vec score = c[r][v];
        if (call.bias) score += load(s.bias + part.column + v * kLanes);
        if (r < part.masked_rows) score = hide_unseen(score, part.seen->from(part.row), r, part.first_key + v * kLanes);
        store(s.scores + r * kPanel + v * kLanes, exp(score * factor - broadcast(part.lse[r])));
      }
    clear(c);
    accumulate<T, kRows, VECS>(c, s.dout_rows + part.row * row_words, row_words, 1, s.value_panels + offset, kPanel,
                               steps);
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      vec p[kRows], ds[kRows];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        p[r] = load(s.scores + r * kPanel + v * kLanes);
        ds[r] = p[r] * (c[r][v] - broadcast(part.delta[r]));
      }
      write_across(s.weights, part.row, part.column + v * kLanes, p);
      write_across(s.slopes_across, part.row, part.column + v * kLanes, ds);
#if defined(__AVX512BF16__)
      if constexpr (T::kPack == 2)
        for (int r = 0; r < kRows; ++r) {
          const __m256bh narrow = _mm512_cvtneps_pbh((__m512)ds[r]);
          Word* to = s.slopes_along + (part.row + r) * kAlongRow + (part.column + v * kLanes) / 2;
          std::memcpy(to, &narrow, sizeof narrow);
        }
#endif
    }
  }

  template <int VECS>
  static INLINE void clear(vec (&c)[kRows][VECS]) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) c[r][v] = vec{};
  }

  /// One vector of six rows into P or dS, in words across rows: [row / kPack][kKeyTile].
  static INLINE void write_across(Word* to, int64_t row, int64_t column, const vec (&rows)[kRows]) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r += T::kPack) {
      Word* word = to + (row + r) / T::kPack * kKeyTile + column;
      if constexpr (T::kPack == 1) store(word, rows[r]);
#if defined(__AVX512BF16__)
      if constexpr (T::kPack == 2) write_words(word, pair_words(rows[r], rows[r + 1]));
#endif
    }
  }

  static INLINE void write_zeros(const State& s, int64_t row, int64_t column) {
    const vec zeros[kRows] = {};
    write_across(s.weights, row, column, zeros);
    write_across(s.slopes_across, row, column, zeros);
  }

  void write(const float* sums, float factor, const Rows<S>& to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < call.dim; c += kLanes)
        write_first(to[i] + c, load(sums + i * width + c) * broadcast(factor), call.dim - c);
  }
};

}  // namespace run_llm
