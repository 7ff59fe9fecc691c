// Rotary positions (arXiv 2104.09864) for queries and keys at once: channels i and i + D/2 of every head are a pair
// that is turned by an angle of its position.
#include "layer_rows.h"

namespace run_llm {
namespace {

/// The heads [count, 2 * half] of one position.
INLINE void turn_heads(const float* x, float* y, int64_t count, int64_t half, const float* cos, const float* sin_low,
                       const float* sin_high) {
  for (int64_t head = 0; head < count; ++head, x += 2 * half, y += 2 * half)
    turn_head(x, y, half, cos, sin_low, sin_high);
}

/// The gradient is the same turn with the halves of sin exchanged: the transposed matrix of each pair.
void turn(Args& args, bool gradient) {
  const char* first = gradient ? "dq_out" : "q";
  auto q = args.input<float>(first, "B S H D");
  auto k = args.input<float>(gradient ? "dk_out" : "k", "B S K D");
  auto cos = args.input<float>("cos", "C S 1 D");
  auto sin = args.input<float>("sin", "C S 1 D");
  auto q_turned = args.output<float>(gradient ? "dq" : "q_out", "B S H D");
  auto k_turned = args.output<float>(gradient ? "dk" : "k_out", "B S K D");
  args.done();
  const int64_t batch = args.size("B"), length = args.size("S"), tables = args.size("C");
  const int64_t q_heads = args.size("H"), k_heads = args.size("K"), dim = args.size("D"), half = dim / 2;
  args.require(dim % 2 == 0, first, "the head size must be even");
  args.require(tables == 1 || tables == batch, "cos", "the first dimension must be 1 or the batch");
  const int64_t positions = batch * length;
#pragma omp parallel for schedule(static) if (positions * (q_heads + k_heads) * dim >= kParallelFrom)
  for (int64_t position = 0; position < positions; ++position) {
    const int64_t angle = (tables == 1 ? position % length : position) * dim;
    const float* sin_low = sin + angle + (gradient ? half : 0);
    const float* sin_high = sin + angle + (gradient ? 0 : half);
    const int64_t q_at = position * q_heads * dim, k_at = position * k_heads * dim;
    turn_heads(q + q_at, q_turned + q_at, q_heads, half, cos + angle, sin_low, sin_high);
    turn_heads(k + k_at, k_turned + k_at, k_heads, half, cos + angle, sin_low, sin_high);
  }
}

}  // namespace

KERNEL(rope_forward) { turn(args, false); }

KERNEL(rope_backward) { turn(args, true); }

}  // namespace run_llm
