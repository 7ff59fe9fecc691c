// Attention of one query to keys that lie in one block of memory, as a cache keeps them.
#pragma once

#include "attention.h"

namespace run_llm {

/// Products of q with kLanes rows of keys, of which the first `count` exist, one a lane.
INLINE vec products(const float* q, const float* keys, int64_t count, int64_t dim) {
  vec block[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const float* key = keys + (i < count ? i : 0) * dim;
    vec sum{};
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) sum += load(q + c) * load(key + c);
    if (c < dim) sum += read_first(q + c, dim - c) * read_first(key + c, dim - c);
    block[i] = sum;
  }
  transpose(block);
  vec total = block[0];
  for (int i = 1; i < kLanes; ++i) total += block[i];
  return total;
}

/// sums[0 .. dim) = sum over `count` keys of weights[j] * values[j].
inline void weighted_sum(const float* weights, const float* values, int64_t count, int64_t dim, float* sums) {
  for (int64_t c = 0; c < dim; c += 4 * kLanes) {
    vec sum[4] = {};
    const int64_t left = dim - c;
    for (int64_t j = 0; j < count; ++j) {
      const vec weight = broadcast(weights[j]);
      const float* value = values + j * dim + c;
      for (int64_t v = 0; v < 4; ++v)
        if (v * kLanes < left) sum[v] += weight * read_first(value + v * kLanes, left - v * kLanes);
    }
    for (int64_t v = 0; v < 4; ++v) write_first(sums + c + v * kLanes, sum[v], left - v * kLanes);
  }
}

/// Partial softmax of one query over `count` keys: part = (largest score, sum of weights, weighted values [dim]).
/// bias: of the keys, readable up to a whole vector, or null. scores: room for `count` numbers and a vector more.
inline void partial_softmax(const float* q, const float* keys, const float* values, int64_t count, int64_t dim,
                            float scale, const float* bias, float* scores, float* part) {
  vec largest = broadcast(kNothingSeen);
  for (int64_t j = 0; j < count; j += kLanes) {
    vec score = products(q, keys + j * dim, count - j, dim);
    if (bias) score += load(bias + j);
    score *= broadcast(scale);
    if (count - j < kLanes) score = lane_numbers() < static_cast<int32_t>(count - j) ? score : broadcast(kHidden);
    largest = max(largest, score);
    store(scores + j, score);
  }
  const float top = largest_of(largest);
  vec total{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const vec weight = exp(load(scores + j) - broadcast(top));
    total += weight;
    store(scores + j, weight);
  }
  part[0] = top;
  part[1] = sum_of(total);
  weighted_sum(scores, values, count, dim, part + 2);
}

}  // namespace run_llm
