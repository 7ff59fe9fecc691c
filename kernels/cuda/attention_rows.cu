// The forward as one would write it first: a thread for each query, softmax as it goes along, nothing shared. It is a
// yardstick for the benchmark and nothing else: no model calls it.
#include <cmath>

#include "attention_fp32.h"

using namespace run_llm;

namespace {

constexpr int kThreads = 128;

/// kDim: at least call.dim, so that a query's output stays in registers.
template <int kDim>
KERNEL_FUNCTION __launch_bounds__(kThreads) attend_row(Attention<float> call, float scale) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= call.queries) return;
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z), dim = call.dim;
  const float* q = call.q + call.q_start(b, head) + i * call.q_stride();
  const float* k = call.k + call.k_start(b, call.kv_head(head));
  const float* v = call.v + call.k_start(b, call.kv_head(head));
  const float* bias = call.bias_of(b, head);

  float out[kDim], largest = kHidden, sum = 0;
  UNROLL
  for (int d = 0; d < kDim; ++d) out[d] = 0;
  const int2 range = call.range(b, i);
  const int prefix = call.prefix_length(), end = call.max_of(prefix, range.y);
  for (int j = prefix > 0 ? 0 : range.x; j < end; ++j) {
    if (j >= prefix && (j < range.x || j >= range.y)) continue;
    float score = bias ? bias_term(bias[j]) : 0.f;
    for (int d = 0; d < dim; ++d) score += q[d] * k[j * call.k_stride() + d];
    score *= scale;
    if (score == kHidden) continue;
    const float now_largest = fmaxf(largest, score);
    const float factor = std::exp(largest - now_largest), weight = std::exp(score - now_largest);
    largest = now_largest;
    sum = sum * factor + weight;
    UNROLL
    for (int d = 0; d < kDim; ++d)
      if (d < dim) out[d] = out[d] * factor + weight * v[j * call.k_stride() + d];
  }
  UNROLL
  for (int d = 0; d < kDim; ++d)
    if (d < dim) call.out[call.q_start(b, head) + i * call.q_stride() + d] = sum == 0 ? 0 : out[d] / sum;
  call.lse[call.lse_start(b, head) + i] = sum == 0 ? 0 : largest + std::log(sum);
}

template <int kDim>
void attend_rows(const Attention<float>& call, cudaStream_t stream) {
  const dim3 blocks((call.queries + kThreads - 1) / kThreads, call.heads, call.batch);
  launch(attend_row<kDim>, blocks, kThreads, 0, stream, call, call.scale());
}

}  // namespace

/// attention_forward of attention.h, in float32.
KERNEL(attention_rows_forward) {
  require_float32(args);
  const auto call = Attention<float>::forward(args);
  auto* stream = static_cast<cudaStream_t>(args.stream());
  if (call.dim <= 64) return attend_rows<64>(call, stream);
  attend_rows<128>(call, stream);
}
