// The operators attention_backward and attention_backward_bf16; their arguments are described in attention_args.h.
#include "attention_backward.h"

#include <omp.h>

#include "scratch.h"

namespace run_llm {
namespace {

/// delta[b, h, i] = sum over channels of dout * out.
template <class S>
void row_products(const AttentionCall<S>& call, float* delta) {
#pragma omp for schedule(static)
  for (int64_t pair = 0; pair < call.batch * call.heads; ++pair) {
    const Rows<const S> out = call.given_out.head(pair / call.heads, pair % call.heads);
    const Rows<const S> dout = call.dout.head(pair / call.heads, pair % call.heads);
    for (int64_t i = 0; i < call.queries; ++i) {
      vec sum{};
      for (int64_t c = 0; c < call.dim; c += kLanes)
        sum += read_first(out[i] + c, call.dim - c) * read_first(dout[i] + c, call.dim - c);
      delta[pair * call.queries + i] = sum_of(sum);
    }
  }
}

template <class T, class S>
void backward(Args& args) {
  const AttentionCall<S> call = AttentionCall<S>::backward(args);
  const Backward<T, S> kernel(call);
  const int64_t padded = round_up(call.queries, kRows), group = call.heads / call.kv_heads;
  const int64_t pairs = call.batch * call.kv_heads, share = group * padded * kernel.width;
  const int64_t per_thread = round_up(kernel.state_floats(), 16);
  float* states = scratch<float>(kScratchAttentionScores, omp_get_max_threads() * per_thread);
  float* delta = scratch<float>(kScratchAttentionQueries, call.batch * call.heads * call.queries);
  float* dq = scratch<float>(kScratchAttentionSums, pairs * kernel.chunks * share);
#pragma omp parallel
  {
    row_products(call, delta);
    float* memory = states + omp_get_thread_num() * per_thread;
    // The first chunks of keys are seen by the most queries under a causal mask: they go first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < pairs * kernel.chunks; ++unit) {
      const int64_t chunk = unit / pairs, pair = unit % pairs;
      kernel.unit(pair / call.kv_heads, pair % call.kv_heads, chunk, memory, delta,
                  dq + (pair * kernel.chunks + chunk) * share);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < call.batch * call.heads; ++pair) {
      const int64_t b = pair / call.heads, h = pair % call.heads;
      float* sum = dq + (b * call.kv_heads + h / group) * kernel.chunks * share + h % group * padded * kernel.width;
      for (int64_t chunk = 1; chunk < kernel.chunks; ++chunk)
        for (int64_t i = 0; i < call.queries * kernel.width; i += kLanes)
          store(sum + i, load(sum + i) + load(sum + chunk * share + i));
      kernel.write(sum, kernel.scale, call.dq.head(b, h), call.queries);
    }
  }
}

}  // namespace

KERNEL(attention_backward) {
  if (!args.next_is("bfloat16")) return backward<Fp32, float>(args);
#if defined(__AVX512BF16__)
  return backward<Bf16, bf16>(args);
#else
  return backward<Fp32, bf16>(args);
#endif
}

KERNEL(attention_backward_bf16) {
#if defined(__AVX512BF16__)
  backward<Bf16, float>(args);
#else
  args.require(false, "products", "bfloat16 needs AVX512_BF16");
#endif
}

}  // namespace run_llm
