// The cross entropy of one row of logits x with its label: log(sum of e^x) - x[label], and the gradient of it.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>

#include "loops.h"

namespace run_llm {

constexpr float kUnderflow = -200.f;  // e^-200 is 0; exp() is not for numbers far below

/// Largest of `count` logits.
inline float largest_logit(const float* x, int64_t count) {
  vec largest = broadcast(x[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(load(x + i), largest);
  float result = largest_of(largest);
  for (; i < count; ++i) result = std::max(result, x[i]);
  return result;
}

/// Sum of e^x over the logits of one row, which may come in several pieces.
class RowTotal {
 public:
  /// Take `count` more logits. Memory is read once: a block is in the first-level cache when its sum is taken.
  void add(const float* x, int64_t count) {
    constexpr int64_t kBlock = 2048;
    for (int64_t start = 0; start < count; start += kBlock)
      add_block(x + start, std::min(kBlock, count - start));
  }

  /// Logarithm of the sum; not finite if one of the logits was not.
  double log() const { return largest_ + std::log(total_) + not_finite_; }
  /// Cross entropy for the logit of the label. It is not the difference of two large rounded numbers.
  double loss(float label_logit) const { return (largest_ - label_logit) + std::log(total_) + not_finite_; }

 private:
  void add_block(const float* x, int64_t count) {
    const float largest = largest_logit(x, count);
    if (largest > largest_) {
      total_ *= std::exp(largest_ - largest);
      largest_ = largest;
    }
    const vec shift = broadcast(static_cast<float>(largest_));
    vec sum = {}, zeros = {};
    each_vector(0, count, [&](int64_t i, auto at) {
      const vec logits = at.load(x + i);
      sum += at.only(exp(max(logits - shift, broadcast(kUnderflow))));
      zeros = logits * broadcast(0.f) + zeros;  // max() and exp() may lose inf and NaN; this becomes NaN
    });
    total_ += sum_of(sum);
    not_finite_ += sum_of(zeros);
  }

  double largest_ = -FLT_MAX;
  double total_ = 0;
  double not_finite_ = 0;
};

/// x becomes softmax(x) * scale: the gradient of scale * cross entropy, but for the label's own -scale.
inline void softmax_in_place(float* x, int64_t count, float lse, float scale) {
  if (!std::isfinite(lse)) scale = std::numeric_limits<float>::quiet_NaN();
  const vec shift = broadcast(lse), factor = broadcast(scale);
  each_vector(0, count, [&](int64_t i, auto at) {
    at.store(x + i, exp(max(at.load(x + i) - shift, broadcast(kUnderflow))) * factor);
  });
}

/// Throw unless every label is below the vocabulary size. Negative ones mark rows that do not count.
inline void check_labels(const Args& args, const int32_t* labels, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; ++row)
    if (labels[row] >= vocabulary)
      args.require(false, "labels", ("label " + std::to_string(labels[row]) + " of row " + std::to_string(row) +
                                     " is not below the vocabulary size " + std::to_string(vocabulary)).c_str());
}

}  // namespace run_llm
