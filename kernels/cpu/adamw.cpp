// The optimizer's two passes over all numbers: the squared norm of the gradients, and AdamW's update.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "loops.h"
#include "math.h"

namespace run_llm {
namespace {

/// Dimension names for an argument of any rank up to eight: the last `rank` names of the list.
constexpr int kMostRanks = 8;
const char* any_shape(const Args& args, const char* argument) {
  const int rank = args.next_rank();
  args.require(rank <= kMostRanks, argument, "at most 8 dimensions");
  return "H G F E D C B A" + 2 * (kMostRanks - rank) - (rank == 0);
}
int64_t elements(const Args& args, const char* shape) {
  int64_t count = 1;
  for (; *shape; ++shape)
    if (*shape != ' ') count *= args.size(std::string(1, *shape).c_str());
  return count;
}

/// The decimal number that was meant by a float: the shortest that rounds to it. 1 - 0.999 is 0.001, but one minus
/// the float next to 0.999 is off by 1e-5 of that.
double decimal(float x) {
  char text[32];
  for (int digits = 1;; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, static_cast<double>(x));
    const double value = std::strtod(text, nullptr);
    if (digits == 9 || static_cast<float>(value) == x) return value;
  }
}

}  // namespace

// AdamW (arXiv 1711.05101) as torch has it: eps is added outside the corrected root, decay is decoupled.
KERNEL(adamw) {
  const char* shape = any_shape(args, "param");
  // In place: the caller's arrays are this operator's state.
  auto param = const_cast<float*>(args.input<float>("param", shape));
  auto m = const_cast<float*>(args.input<float>("m", shape));
  auto v = const_cast<float*>(args.input<float>("v", shape));
  auto grad = args.input<float>("grad", shape);
  auto scalars = args.input<float>("scalars", "8");
  auto done = args.output<float>("done", "1");
  args.done();
  const double lr = scalars[0], beta1 = decimal(scalars[1]), beta2 = decimal(scalars[2]);
  const float eps = scalars[3], coef = scalars[5];
  const double step = scalars[6];
  const bool corrected = scalars[7] != 0;
  const float decay = static_cast<float>(lr * scalars[4]);
  const float rate = static_cast<float>(corrected ? lr / (1 - std::pow(beta1, step)) : lr);
  const float root = static_cast<float>(corrected ? 1 / std::sqrt(1 - std::pow(beta2, step)) : 1);
  const float old_m = static_cast<float>(beta1), new_m = static_cast<float>(1 - beta1);
  const float old_v = static_cast<float>(beta2), new_v = static_cast<float>(1 - beta2);
  each_block(elements(args, shape), [&](int64_t begin, int64_t end) {
    each_aligned_vector(param, begin, end, [&](int64_t i, auto at) {
      const vec g = at.load(grad + i) * coef;
      const vec mean = at.load(m + i) * old_m + g * new_m;
      const vec square = at.load(v + i) * old_v + g * g * new_v;
      at.store(m + i, mean);
      at.store(v + i, square);
      // Not p (1 - decay): decay is so small that a float next to 1 holds few of its digits.
      const vec p = at.load(param + i);
      at.store(param + i, p - (p * decay + rate * mean / (sqrt(square) * root + eps)));
    });
  });
  done[0] = 1;
}

// Sums of a few additions are floats, their sum is a double: accurate however long x is. An infinity or NaN anywhere in
// x is one in the result.
KERNEL(squared_norm) {
  const char* shape = any_shape(args, "x");
  auto x = args.input<float>("x", shape);
  auto total = args.output<float>("total", "1");
  args.done();
  const int64_t count = elements(args, shape);
  constexpr int64_t kShort = 16 * 4 * kLanes, kLong = 65536;  // four chains of 16 additions
  std::vector<double> parts(static_cast<size_t>((count + kLong - 1) / kLong));
#pragma omp parallel for schedule(static) if (count >= kParallelFrom)
  for (int64_t begin = 0; begin < count; begin += kLong) {
    double sum = 0;
    for (int64_t i = begin; i < std::min(count, begin + kLong); i += kShort) {
      float square[1];
      sum_vectors(std::min(kShort, count - i), square, [&](int64_t j, auto at, vec* sums) {
        const vec value = at.load(x + i + j);
        sums[0] += value * value;
      });
      sum += square[0];
    }
    parts[static_cast<size_t>(begin / kLong)] = sum;
  }
  double sum = 0;
  for (const double part : parts) sum += part;
  total[0] = static_cast<float>(sum);
}

}  // namespace run_llm
