// What a decoder layer does to a row besides products: shared by the operators of their own and by decode_layer.
#pragma once

#include <cmath>

#include "loops.h"
#include "math.h"

namespace run_llm {

/// out = in r weight with r = 1 / sqrt(mean(in^2) + eps), over `width` numbers; returns r.
INLINE float rms_norm_row(const float* in, const float* weight, int64_t width, float eps, float* out) {
  float square[1];
  sum_vectors(width, square, [&](int64_t i, auto at, vec* sums) {
    const vec value = at.load(in + i);
    sums[0] += value * value;
  });
  const float r = 1.f / std::sqrt(square[0] / static_cast<float>(width) + eps);
  each_aligned_vector(out, 0, width, [&](int64_t i, auto at) {
    at.store(out + i, at.load(in + i) * r * at.load(weight + i));
  });
  return r;
}

/// One head of 2 * half channels: y = x * cos + (upper half of x, lower half of x) * sin, where sin is given in its two
/// halves. y may be x.
INLINE void turn_head(const float* x, float* y, int64_t half, const float* cos, const float* sin_low,
                      const float* sin_high) {
  each_vector(0, half, [&](int64_t i, auto at) {
    const vec low = at.load(x + i), high = at.load(x + half + i);
    at.store(y + i, low * at.load(cos + i) + high * at.load(sin_low + i));
    at.store(y + half + i, high * at.load(cos + half + i) + low * at.load(sin_high + i));
  });
}

/// y = silu(gate) up for i in [begin, end), silu(g) = g sigmoid(g). y may be gate.
INLINE void swiglu_row(const float* gate, const float* up, float* y, int64_t begin, int64_t end) {
  each_aligned_vector(y, begin, end, [&](int64_t i, auto at) {
    const vec g = at.load(gate + i);
    at.store(y + i, g * sigmoid(g) * at.load(up + i));
  });
}

}  // namespace run_llm
