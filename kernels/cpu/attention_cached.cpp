// Attention of new tokens over a cache of keys and values, for generation.
//
//   attention_cached(q [B S H D], k [N T D], v [N T D], columns int32 [S], kv_start int32 [B], bias) -> out [B S H D]
//
// N = B * key heads: heads lie outside positions, so a head's keys are one block of memory. Token s of row b sees the
// cache columns kv_start[b] <= j <= columns[s]. bias float32 [1 | B, H, T], or [1] for none, is added to the products
// before they are scaled by 1 / sqrt(D).
//
// A prompt's many tokens go through the blocks of attention_forward. One or a few tokens are a matter of reading the
// cache once: nothing is packed, and long caches are shared out in pieces of kPiece keys whose partial softmaxes are
// merged in order (as "flash decoding" does), whatever the number of threads.
#include "attention_few.h"
#include "attention_forward.h"

namespace run_llm {
namespace {

constexpr int64_t kPiece = 512;
constexpr int64_t kFewTokens = 8;

struct CachedCall {
  AttentionCall<float> call;
  const int32_t *columns, *kv_start;
  int64_t cache;  // columns of the cache; call.keys are those that any token sees

  int64_t begin(int64_t b) const { return std::min<int64_t>(kv_start[b], call.keys); }
  int64_t end(int64_t token) const { return columns[token] + 1; }
};

CachedCall arguments(Args& args) {
  CachedCall cached{};
  AttentionCall<float>& call = cached.call;
  const float* q = args.input<float>("q", "B S H D");
  const float* k = args.input<float>("k", "N T D");
  const float* v = args.input<float>("v", "N T D");
  call.batch = args.size("B");
  call.queries = args.size("S");
  call.heads = args.size("H");
  call.dim = args.size("D");
  cached.cache = args.size("T");
  args.require(args.size("N") % call.batch == 0, "k", "its first size must be a multiple of the batch");
  call.kv_heads = args.size("N") / call.batch;
  args.require(call.heads % call.kv_heads == 0, "k", "its heads must divide those of q");
  args.require(cached.cache < kMostPositions && call.queries < kMostPositions, "k", "too many positions");
  cached.columns = args.input<int32_t>("columns", "S");
  cached.kv_start = args.input<int32_t>("kv_start", "B");
  for (int64_t s = 0; s < call.queries; ++s) {
    args.require(cached.columns[s] >= 0 && cached.columns[s] < cached.cache, "columns", "outside the cache");
    call.keys = std::max<int64_t>(call.keys, cached.columns[s] + 1);
  }
  for (int64_t b = 0; b < call.batch; ++b) args.require(cached.kv_start[b] >= 0, "kv_start", "negative");
  if (args.absent()) {
    args.skip();
  } else {
    call.bias = args.input<float>("bias", "P H T");
    args.require(args.size("P") == 1 || args.size("P") == call.batch, "bias", "its first size must be 1 or the batch");
    call.bias_per_row = args.size("P") > 1;
    call.bias_keys = cached.cache;
  }
  call.q = Heads<const float>::inside(q, call.queries, call.heads, call.dim);
  call.k = Heads<const float>::outside(k, call.kv_heads, cached.cache, call.dim);
  call.v = Heads<const float>::outside(v, call.kv_heads, cached.cache, call.dim);
  call.out = Heads<float>::inside(args.output<float>("out", "B S H D"), call.queries, call.heads, call.dim);
  args.done();
  return cached;
}

/// Partial softmax of one query over keys [begin, end), see partial_softmax.
void piece(const CachedCall& cached, int64_t b, int64_t token, int64_t h, int64_t begin, int64_t end, float* part) {
  const AttentionCall<float>& call = cached.call;
  const int64_t kv_head = h / (call.heads / call.kv_heads);
  float scores[kPiece + kLanes], bias[kPiece + kPanel];
  if (call.bias) call.copy_bias(b, h, begin, end, bias);
  partial_softmax(call.q.head(b, h)[token], call.k.head(b, kv_head)[begin], call.v.head(b, kv_head)[begin], end - begin,
                  call.dim, call.scale(), call.bias ? bias : nullptr, scores, part);
}

void few_tokens(const CachedCall& cached) {
  const AttentionCall<float>& call = cached.call;
  const int64_t pieces = (call.keys + kPiece - 1) / kPiece, rows = call.batch * call.heads * call.queries;
  const int64_t part_size = 2 + call.dim;
  float* parts = scratch<float>(kScratchAttentionSums, rows * pieces * part_size);
  const bool parallel = rows * call.keys * call.dim > 1 << 16;
#pragma omp parallel if (parallel)
  {
    // A group's heads read the same keys: neighbouring rows go to one thread.
#pragma omp for schedule(static)
    for (int64_t item = 0; item < rows * pieces; ++item) {
      const int64_t row = item / (pieces * call.queries) * call.queries + item % call.queries;
      const int64_t number = item / call.queries % pieces;
      const int64_t token = row % call.queries, h = row / call.queries % call.heads;
      const int64_t b = row / call.queries / call.heads;
      const int64_t begin = std::max(number * kPiece, cached.begin(b));
      const int64_t end = std::min((number + 1) * kPiece, cached.end(token));
      float* part = parts + (row * pieces + number) * part_size;
      if (begin < end) piece(cached, b, token, h, begin, end, part);
      else std::fill_n(part, part_size, 0.f), part[0] = kNothingSeen;
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float* part = parts + row * pieces * part_size;
      float top = kNothingSeen, total = 0;
      for (int64_t n = 0; n < pieces; ++n) top = std::max(top, part[n * part_size]);
      float* out = call.out.head(row / call.queries / call.heads, row / call.queries % call.heads)[row % call.queries];
      std::fill_n(out, call.dim, 0.f);
      for (int64_t n = 0; n < pieces; ++n, part += part_size) {
        const float fading = std::exp(part[0] - top);
        total += fading * part[1];
        for (int64_t c = 0; c < call.dim; ++c) out[c] += fading * part[2 + c];
      }
      if (total > 0)
        for (int64_t c = 0; c < call.dim; ++c) out[c] /= total;
    }
  }
}

void many_tokens(CachedCall& cached) {
  AttentionCall<float>& call = cached.call;
  int32_t* ranges = scratch<int32_t>(kScratchAttentionQueries, call.batch * call.queries * 2);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t s = 0; s < call.queries; ++s) {
      ranges[2 * (b * call.queries + s)] = static_cast<int32_t>(cached.begin(b));
      ranges[2 * (b * call.queries + s) + 1] = static_cast<int32_t>(cached.end(s));
    }
  call.ranges = ranges;
  call.ranges_per_row = true;
  attend<Fp32, float>(call);
}

}  // namespace

KERNEL(attention_cached) {
  CachedCall cached = arguments(args);
  if (cached.call.queries <= kFewTokens) few_tokens(cached);
  else many_tokens(cached);
}

}  // namespace run_llm
