// The operators of attention.h: which kernel runs.
#include "attention.h"
#include "attention_fp32.h"

using namespace run_llm;

KERNEL(attention_forward) {
  auto* stream = static_cast<cudaStream_t>(args.stream());
  attention_fp32_forward(Attention<float>::forward(args), stream);
}
