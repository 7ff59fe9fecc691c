// SwiGLU (arXiv 2002.05202) and GELU in its exact form (arXiv 1606.08415), with their gradients.
#include "layer_rows.h"

namespace run_llm {

// y = silu(gate) up, silu(g) = g sigmoid(g).
KERNEL(swiglu_forward) {
  auto gate = args.input<float>("gate", "N F");
  auto up = args.input<float>("up", "N F");
  auto y = args.output<float>("y", "N F");
  args.done();
  each_block(args.size("N") * args.size("F"), [&](int64_t begin, int64_t end) {
    swiglu_row(gate, up, y, begin, end);
  });
}

// The derivative of silu is s + g s (1 - s) with s = sigmoid(g).
KERNEL(swiglu_backward) {
  auto gate = args.input<float>("gate", "N F");
  auto up = args.input<float>("up", "N F");
  auto dy = args.input<float>("dy", "N F");
  auto dgate = args.output<float>("dgate", "N F");
  auto dup = args.output<float>("dup", "N F");
  args.done();
  each_block(args.size("N") * args.size("F"), [&](int64_t begin, int64_t end) {
    each_aligned_vector(dgate, begin, end, [&](int64_t i, auto at) {
      const vec g = at.load(gate + i), d = at.load(dy + i), s = sigmoid(g), silu = g * s;
      at.store(dgate + i, d * at.load(up + i) * (s + silu * (1.f - s)));
      at.store(dup + i, d * silu);
    });
  });
}

// y = x P(x), P the normal distribution: x (1 + erf(x / sqrt(2))) / 2.
KERNEL(gelu_forward) {
  auto x = args.input<float>("x", "N F");
  auto y = args.output<float>("y", "N F");
  args.done();
  each_block(args.size("N") * args.size("F"), [&](int64_t begin, int64_t end) {
    each_aligned_vector(y, begin, end, [&](int64_t i, auto at) {
      const vec value = at.load(x + i);
      at.store(y + i, value * normal(value).below);
    });
  });
}

KERNEL(gelu_backward) {
  auto x = args.input<float>("x", "N F");
  auto dy = args.input<float>("dy", "N F");
  auto dx = args.output<float>("dx", "N F");
  args.done();
  each_block(args.size("N") * args.size("F"), [&](int64_t begin, int64_t end) {
    each_aligned_vector(dx, begin, end, [&](int64_t i, auto at) {
      const vec value = at.load(x + i);
      const Normal p = normal(value);
      at.store(dx + i, at.load(dy + i) * (p.below + value * p.density));
    });
  });
}

}  // namespace run_llm
