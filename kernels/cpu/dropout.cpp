// Dropout whose every bit is a function of a key, of a place in the model and of where an element lies in its array: the
// function of llm_core/ops/reference/dropout.py, where its parts are explained, bit for bit.
#include "loops.h"

namespace run_llm {

namespace {

/// Of one number or of a vector of them: three rounds of xor-shift and multiply, a key coming in half-way.
template <class T>
INLINE T mixed(T x, uint32_t middle_key) {
  x = (x ^ (x >> 17)) * 0xED5AD4BBu;
  x = (x ^ (x >> 11)) * 0xAC4C1B51u;
  x = x ^ middle_key;
  x = (x ^ (x >> 15)) * 0x31848BABu;
  return x ^ (x >> 14);
}

/// What an element is multiplied by, from the 16 bits that are its own.
INLINE vec kept_or_dropped(uvec own, uint32_t threshold, float kept) {
  return (ivec)own >= static_cast<int32_t>(threshold) ? broadcast(kept) : broadcast(0.f);
}

}  // namespace

// y = x, with elements dropped and the others scaled up. key: two words; place: the place's word, and the rate in
// 1 / 65536. Each hash serves two elements: the lower half of the array, and the upper one.
KERNEL(dropout) {
  auto x = args.input<float>("x", "N D");
  auto key = args.input<int32_t>("key", "2");
  auto place = args.input<int32_t>("place", "2");
  auto y = args.output<float>("y", "N D");
  args.done();
  args.require(place[1] >= 0 && place[1] < 65536, "place", "the rate must be below 1");
  const uint32_t threshold = static_cast<uint32_t>(place[1]);
  const float kept = static_cast<float>(65536.0 / (65536.0 - threshold));
  const uint32_t site = static_cast<uint32_t>(key[0]) + static_cast<uint32_t>(place[0]);
  const uint32_t first = mixed(mixed(site, 0) + static_cast<uint32_t>(key[1]), 0);
  const uint32_t second = mixed(first + 0x85EBCA6Bu, 0);

  const int64_t count = args.size("N") * args.size("D"), half = (count + 1) / 2;
  const auto bits = [&](int64_t i) {
    return mixed<uvec>(((uvec)lane_numbers() + static_cast<uint32_t>(i)) ^ first, second);
  };
  each_block(count - half, [&](int64_t begin, int64_t end) {
    each_vector(begin, end, [&](int64_t i, auto at) {
      const uvec own = bits(i);
      at.store(y + i, at.load(x + i) * kept_or_dropped(own & 0xFFFFu, threshold, kept));
      at.store(y + half + i, at.load(x + half + i) * kept_or_dropped(own >> 16, threshold, kept));
    });
  });
  if (half > count - half) {  // an odd number of elements: the last of the lower half has no partner
    const int64_t i = half - 1;
    y[i] = x[i] * kept_or_dropped(bits(i) & 0xFFFFu, threshold, kept)[0];
  }
}

}  // namespace run_llm
