// Multiplying in place: for gradients that were computed before their factor was known.
#include "loops.h"

namespace run_llm {

KERNEL(scale_in_place) {
  auto x = const_cast<float*>(args.input<float>("x", "N D"));
  const float factor = *args.input<float>("factor", "1");
  auto done = args.output<float>("done", "1");
  args.done();
  each_block(args.size("N") * args.size("D"), [&](int64_t begin, int64_t end) {
    each_vector(begin, end, [&](int64_t i, auto at) { at.store(x + i, at.load(x + i) * factor); });
  });
  done[0] = 1;
}

}  // namespace run_llm
