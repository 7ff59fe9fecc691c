// The operators of attention.h: which kernel runs.
#include "attention.h"
#include "attention_fp32.h"
#include "attention_mma.h"
#include "attention_tf32.h"

using namespace run_llm;

KERNEL(attention_forward) {
  auto* stream = static_cast<cudaStream_t>(args.stream());
  if (args.next_is("float32")) return attention_fp32_forward(Attention<float>::forward(args), stream);
  if (args.next_is("bfloat16")) return attention_mma_forward(Attention<bf16>::forward(args), stream);
  if (args.next_is("float16")) return attention_mma_forward(Attention<fp16>::forward(args), stream);
  args.require(false, "q", kDtypes);
}

KERNEL(attention_backward) {
  auto* stream = static_cast<cudaStream_t>(args.stream());
  if (args.next_is("float32")) return attention_fp32_backward(Attention<float>::backward(args), stream);
  if (args.next_is("bfloat16")) return attention_mma_backward(Attention<bf16>::backward(args), stream);
  if (args.next_is("float16")) return attention_mma_backward(Attention<fp16>::backward(args), stream);
  args.require(false, "q", kDtypes);
}

/// fp32 tensors, products in 3xTF32.
KERNEL(attention_forward_tf32) {
  require_float32(args);
  attention_tf32_forward(Attention<float>::forward(args), static_cast<cudaStream_t>(args.stream()));
}
KERNEL(attention_backward_tf32) {
  require_float32(args);
  attention_tf32_backward(Attention<float>::backward(args), static_cast<cudaStream_t>(args.stream()));
}
