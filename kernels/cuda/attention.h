// What every attention kernel is given, and which blocks of keys a block of queries has to look at.
//
//   attention_forward(q, k, v, ranges, bias, prefix) -> out, lse
//   attention_backward(q, k, v, ranges, bias, prefix, out, lse, dout) -> dq, dk, dv
//
// The operators of the CPU kernels (kernels/cpu/attention_args.h), all arrays on the device: q, out, dout, dq
// [B, Sq, H, D]; k, v, dk, dv [B, Sk, K, D]; all float32, all bfloat16 or all float16, H a multiple of K, D at most
// 128. ranges int32 [1 | B, Sq, 2]; prefix int32 [1]. Query i of row b sees the keys j with j < prefix or
// ranges[b, i, 0] <= j < ranges[b, i, 1]: causal and full attention, packed documents, padding are ranges. bias float32
// [1 | B, H, Sk], or [1] for none, is added to the products before they are scaled by 1 / sqrt(D). lse float32
// [B, H, Sq]: natural log of the sum of exp(score). A query that sees no key gives 0 and lse 0. What lies on the device
// cannot be checked before the launch: ranges and prefix are cut to 0 .. Sk where they are read. A NaN may spread from
// a key or query to those of its block that do not see it: they have weight 0, and 0 times NaN is NaN.
#pragma once

#include <type_traits>

#include "abi.h"
#include "instructions.h"
#include "launch.h"

namespace run_llm {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHidden = -INFINITY;  // the score of a key that is not seen
constexpr int kMostDim = 128;
constexpr const char* kTooWide =
    "its heads are wider than 128, the most that these kernels take: use the reference operators (KERNELS=reference)";
constexpr const char* kDtypes = "these kernels take float32, bfloat16 and float16: cast q, k and v to one of them";
constexpr int kMostBatch = 65535;  // of a grid's second and third size

/// Of the kernels for fp32 tensors alone.
inline void require_float32(const Args& args) {
  args.require(args.next_is("float32"), "q",
               "this kernel takes float32: cast q, k and v to it, or call attention_forward and attention_backward, "
               "which take bfloat16 and float16 too");
}

/// A bias as it is added: one below -1e29 hides its key, as -infinity does.
DEVICE float bias_term(float bias) { return bias < -1e29f ? -INFINITY : bias; }

/// Arguments of a kernel, passed by value. T: float, bf16 or fp16.
template <class T>
struct Attention {
  int batch, queries, keys, heads, kv_heads, dim;
  const T *q, *k, *v;
  const int* ranges;
  int64_t ranges_row;  // numbers from one batch row's ranges to the next: 0 if all share one
  const float* bias;   // null: none
  int64_t bias_row;
  const int* prefix;
  T* out;
  float* lse;
  // backward only
  const T *given_out, *dout;
  const float* given_lse;
  T *dq, *dk, *dv;

  static Attention forward(Args& args) {
    Attention call = inputs(args);
    call.out = args.output<T>("out", "B Sq H D");
    call.lse = args.output<float>("lse", "B H Sq");
    args.done();
    return call;
  }

  static Attention backward(Args& args) {
    Attention call = inputs(args);
    call.given_out = args.input<T>("out", "B Sq H D");
    call.given_lse = args.input<float>("lse", "B H Sq");
    call.dout = args.input<T>("dout", "B Sq H D");
    call.dq = args.output<T>("dq", "B Sq H D");
    call.dk = args.output<T>("dk", "B Sk K D");
    call.dv = args.output<T>("dv", "B Sk K D");
    args.done();
    return call;
  }

  DEVICE int kv_head(int head) const { return head / (heads / kv_heads); }
  /// Numbers from one position to the next in q, out, dout, dq; in k, v, dk, dv.
  DEVICE int64_t q_stride() const { return static_cast<int64_t>(heads) * dim; }
  DEVICE int64_t k_stride() const { return static_cast<int64_t>(kv_heads) * dim; }
  /// Where a head of a batch row begins in them. inputs() has seen to it that the positions of all rows can be counted.
  DEVICE int64_t q_start(int b, int head) const { return b * queries * q_stride() + static_cast<int64_t>(head) * dim; }
  DEVICE int64_t k_start(int b, int kv) const { return b * keys * k_stride() + static_cast<int64_t>(kv) * dim; }
  DEVICE int64_t lse_start(int b, int head) const { return (static_cast<int64_t>(b) * heads + head) * queries; }
  DEVICE const float* bias_of(int b, int head) const {
    return bias ? bias + b * bias_row + static_cast<int64_t>(head) * keys : nullptr;
  }

  /// The keys [x, y) that a query sees beside the prefix.
  DEVICE int2 range(int b, int query) const {
    const int* both = ranges + b * ranges_row + 2 * static_cast<int64_t>(query);
    return make_int2(max_of(both[0], 0), min_of(both[1], keys));
  }
  DEVICE bool sees(int b, int query, int key) const {
    const int2 own = range(b, query);
    return key < prefix_length() || (own.x <= key && key < own.y);
  }
  DEVICE int prefix_length() const { return max_of(min_of(*prefix, keys), 0); }
  /// Whether the rows of all heads begin at multiples of 16 bytes.
  bool rows_at_16_bytes() const {
    bool all = dim * sizeof(T) % 16 == 0;
    for (const void* array : {static_cast<const void*>(q), static_cast<const void*>(k), static_cast<const void*>(v),
                              static_cast<const void*>(out), static_cast<const void*>(given_out),
                              static_cast<const void*>(dout), static_cast<const void*>(dq),
                              static_cast<const void*>(dk), static_cast<const void*>(dv)})
      all = all && reinterpret_cast<uintptr_t>(array) % 16 == 0;
    return all;
  }
  /// 1 / sqrt(D) for exponentials of base 2.
  float scale_log2() const { return kLog2E / std::sqrt(static_cast<float>(dim)); }
  float scale() const { return 1 / std::sqrt(static_cast<float>(dim)); }

  static DEVICE int min_of(int a, int b) { return a < b ? a : b; }
  static DEVICE int max_of(int a, int b) { return a > b ? a : b; }

 private:
  static Attention inputs(Args& args) {
    Attention call{};
    call.q = args.input<T>("q", "B Sq H D");
    call.k = args.input<T>("k", "B Sk K D");
    call.v = args.input<T>("v", "B Sk K D");
    for (const char* name : {"B", "Sq", "Sk", "H", "K", "D"})
      args.require(args.size(name) < 1 << 30, "q", "a size of 2^30 or more");
    call.batch = static_cast<int>(args.size("B"));
    call.queries = static_cast<int>(args.size("Sq"));
    call.keys = static_cast<int>(args.size("Sk"));
    call.heads = static_cast<int>(args.size("H"));
    call.kv_heads = static_cast<int>(args.size("K"));
    call.dim = static_cast<int>(args.size("D"));
    args.require(call.heads % call.kv_heads == 0, "k", "its number of heads must divide that of q");
    args.require(call.dim <= kMostDim, "q", kTooWide);
    args.require(call.batch <= kMostBatch && call.heads <= kMostBatch, "q", "more than 65535 rows or heads");
    constexpr int64_t kMostPositions = int64_t{1} << 31;
    args.require(int64_t{call.batch} * call.queries < kMostPositions, "q", "2^31 positions or more in all rows");
    args.require(int64_t{call.batch} * call.keys < kMostPositions, "k", "2^31 positions or more in all rows");
    call.ranges = args.input<int32_t>("ranges", "R Sq 2");
    const int64_t range_rows = args.size("R");
    args.require(range_rows == 1 || range_rows == call.batch, "ranges", "its first size must be 1 or the batch");
    call.ranges_row = range_rows > 1 ? 2 * static_cast<int64_t>(call.queries) : 0;
    if (args.absent()) {
      args.skip();
    } else {
      call.bias = args.input<float>("bias", "P H Sk");
      const int64_t bias_rows = args.size("P");
      args.require(bias_rows == 1 || bias_rows == call.batch, "bias", "its first size must be 1 or the batch");
      call.bias_row = bias_rows > 1 ? static_cast<int64_t>(call.heads) * call.keys : 0;
    }
    call.prefix = args.input<int32_t>("prefix", "1");
    return call;
  }
};

/// f of the narrowest width that kernels of tiles are compiled for and a head of `dim` numbers fits in, as a constant.
template <class F>
void at_width(int dim, F f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>());
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  if (dim <= 96) return f(std::integral_constant<int, 96>());
  f(std::integral_constant<int, kMostDim>());
}

/// Whether blocks of 128 positions of each head and row are enough for the whole GPU.
inline bool enough_blocks(int batch, int heads, int positions) {
  return static_cast<int64_t>(batch) * heads * ((positions + 127) / 128) >= multiprocessors();
}

/// Which keys a block of queries sees: [0, prefix) and [some.x, some.y) by one query at least, [all.x, all.y) by all.
struct Seen {
  int prefix;
  int2 some, all;

  /// Of `count` queries from `first` on, as far as there are so many. A warp calls it together; all lanes get it.
  template <class T>
  static DEVICE Seen of(const Attention<T>& call, int b, int first, int count) {
    constexpr int kFar = 1 << 30;
    Seen seen{call.prefix_length(), make_int2(kFar, 0), make_int2(0, kFar)};
    for (int i = first + static_cast<int>(threadIdx.x % 32); i < first + count && i < call.queries; i += 32) {
      const int2 range = call.range(b, i);
      if (range.x < range.y) {
        seen.some.x = call.min_of(seen.some.x, range.x);
        seen.some.y = call.max_of(seen.some.y, range.y);
      }
      seen.all.x = call.max_of(seen.all.x, range.x);
      seen.all.y = call.min_of(seen.all.y, range.y);
    }
    for (int other = 16; other > 0; other /= 2) {
      seen.some.x = call.min_of(seen.some.x, shuffle_xor(seen.some.x, other));
      seen.some.y = call.max_of(seen.some.y, shuffle_xor(seen.some.y, other));
      seen.all.x = call.max_of(seen.all.x, shuffle_xor(seen.all.x, other));
      seen.all.y = call.min_of(seen.all.y, shuffle_xor(seen.all.y, other));
    }
    return seen;
  }

  /// Blocks of kKeys keys that some query sees, in order: for (int n = begin<64>(); n < end<64>(); n = next<64>(n)).
  template <int kKeys>
  DEVICE int begin() const {
    return prefix > 0 ? 0 : some.x / kKeys;
  }
  template <int kKeys>
  DEVICE int end() const {
    const int own = some.x < some.y ? (some.y + kKeys - 1) / kKeys : 0, shared = (prefix + kKeys - 1) / kKeys;
    return own > shared ? own : shared;
  }
  template <int kKeys>
  DEVICE int next(int n) const {
    ++n;
    return n * kKeys >= prefix && n < some.x / kKeys ? some.x / kKeys : n;
  }
  /// Whether some query may see a key of a block.
  template <int kKeys>
  DEVICE bool sees(int n) const {
    return n * kKeys < prefix || (some.x < (n + 1) * kKeys && n * kKeys < some.y);
  }
  /// Whether every query sees all keys of a block: no mask is needed.
  template <int kKeys>
  DEVICE bool whole(int n) const {
    return (n + 1) * kKeys <= prefix || (all.x <= n * kKeys && (n + 1) * kKeys <= all.y);
  }
};

}  // namespace run_llm
