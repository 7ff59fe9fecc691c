// The operators attention_forward and attention_forward_bf16; their arguments are described in attention_args.h.
#include "attention_forward.h"

namespace run_llm {

KERNEL(attention_forward) {
  if (!args.next_is("bfloat16")) return attend<Fp32, float>(AttentionCall<float>::forward(args));
#if defined(__AVX512BF16__)
  return attend<Bf16, bf16>(AttentionCall<bf16>::forward(args));
#else
  return attend<Fp32, bf16>(AttentionCall<bf16>::forward(args));
#endif
}

/// The same for float32 tensors, whose products are taken of numbers rounded to bfloat16.
KERNEL(attention_forward_bf16) {
#if defined(__AVX512BF16__)
  attend<Bf16, float>(AttentionCall<float>::forward(args));
#else
  args.require(false, "products", "bfloat16 needs AVX512_BF16");
#endif
}

}  // namespace run_llm
