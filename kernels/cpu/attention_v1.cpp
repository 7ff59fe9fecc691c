// FlashAttention-1 (arXiv 2205.14135) as the paper writes it: blocks of keys in the outer loop, queries in the inner
// one, the output rescaled at every step. It is here to be read and to check the faster kernels against; the
// comments give the lines of the paper's algorithms 1, 2 (forward) and 4 (backward). A block of queries is one query
// (B_r = 1), a block of keys kBlock of them (B_c). Threads share out batch rows and heads: they change no bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

using namespace run_llm;

namespace {

constexpr int64_t kBlock = 64;    // a multiple of kLanes
constexpr float kHidden = -1e30f;  // score of a key that the query does not see: exp() of it is 0

float dot(const float* a, const float* b, int64_t count) {
  vec sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += load(a + i) * load(b + i);
  const int rest = static_cast<int>(count - i);
  if (rest) sum += load_first(a + i, rest) * load_first(b + i, rest);
  return sum_of(sum);
}

/// y += factor * x
void add_scaled(float* y, float factor, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

/// The arguments that forward and backward share.
struct Problem {
  const float *q, *k, *v, *bias = nullptr;
  const int32_t* ranges;
  int32_t prefix;
  int64_t batch, q_len, k_len, heads, kv_heads, dim, range_rows, bias_rows = 0;
  float scale;  // tau of the paper

  explicit Problem(Args& args) {
    q = args.input<float>("q", "B Sq H D");
    k = args.input<float>("k", "B Sk K D");
    v = args.input<float>("v", "B Sk K D");
    ranges = args.input<int32_t>("ranges", "R Sq 2");
    if (args.absent()) {
      args.skip();
    } else {
      bias = args.input<float>("bias", "P H Sk");
      bias_rows = args.size("P");
    }
    prefix = *args.input<int32_t>("prefix", "1");
    batch = args.size("B"), q_len = args.size("Sq"), k_len = args.size("Sk");
    heads = args.size("H"), kv_heads = args.size("K"), dim = args.size("D"), range_rows = args.size("R");
    scale = 1 / std::sqrt(static_cast<float>(dim));
    args.require(heads % kv_heads == 0, "k", "the number of its heads must divide that of q");
    args.require(range_rows == 1 || range_rows == batch, "ranges", "one row, or one for each batch row");
    args.require(!bias || bias_rows == 1 || bias_rows == batch, "bias", "one row, or one for each batch row");
    args.require(0 <= prefix && prefix <= k_len, "prefix", "must lie between 0 and the number of keys");
    for (int64_t i = 0; i < range_rows * q_len; ++i)
      args.require(ranges[2 * i] >= 0 && ranges[2 * i + 1] <= k_len, "ranges", "outside 0 .. number of keys");
  }

  int64_t query_at(int64_t b, int64_t i, int64_t h) const { return ((b * q_len + i) * heads + h) * dim; }
  int64_t key_at(int64_t b, int64_t j, int64_t h) const { return ((b * k_len + j) * kv_heads + h) * dim; }
  /// Index into lse, and into whatever else is kept for each query of each head.
  int64_t row_at(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * q_len + i; }
  int64_t key_head(int64_t h) const { return h / (heads / kv_heads); }

  bool sees(int64_t b, int64_t i, int64_t j) const {
    const int32_t* range = ranges + 2 * ((range_rows > 1 ? b : 0) * q_len + i);
    return j < prefix || (range[0] <= j && j < range[1]);
  }

  /// scores[c] = tau (q_i . k_(first + c) + bias), kHidden where it sees nothing; returns the largest.
  float score_block(float* scores, int64_t b, int64_t h, int64_t i, int64_t first) const {
    const float* added = bias ? bias + ((bias_rows > 1 ? b : 0) * heads + h) * k_len : nullptr;
    std::fill(scores, scores + kBlock, kHidden);
    float largest = kHidden;
    for (int64_t j = first; j < std::min(first + kBlock, k_len); ++j) {
      if (!sees(b, i, j)) continue;
      const float product = dot(q + query_at(b, i, h), k + key_at(b, j, key_head(h)), dim);
      scores[j - first] = scale * (product + (added ? added[j] : 0.f));
      largest = std::max(largest, scores[j - first]);
    }
    return largest;
  }
};

/// x becomes e^(x - shift); returns the sum.
float exponentials(float* x, float shift) {
  vec sum = {};
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    const vec e = exp(load(x + c) - broadcast(shift));
    store(x + c, e);
    sum += e;
  }
  return sum_of(sum);
}

void forward_head(const Problem& p, int64_t b, int64_t h, float* out, float* m, float* l) {
  float scores[kBlock];
  for (int64_t i = 0; i < p.q_len; ++i) {  // line 2: O = 0, l = 0, m = -inf
    float* o = out + p.query_at(b, i, h);
    std::fill(o, o + p.dim, 0.f);
    l[i] = 0;
    m[i] = -std::numeric_limits<float>::infinity();
  }
  for (int64_t first = 0; first < p.k_len; first += kBlock) {  // line 5: for each block j of keys
    for (int64_t i = 0; i < p.q_len; ++i) {                    // line 7: for each block i of queries
      const float m_block = p.score_block(scores, b, h, i, first);  // lines 9, 10: S_ij, m~_ij = rowmax(S_ij)
      if (m_block == kHidden) continue;                             // nothing to be seen in this block
      const float l_block = exponentials(scores, m_block);          // line 10: P~_ij = exp(S_ij - m~_ij), l~_ij
      const float m_new = std::max(m[i], m_block);                  // line 11
      const float old_factor = std::exp(m[i] - m_new), block_factor = std::exp(m_block - m_new);
      const float l_new = old_factor * l[i] + block_factor * l_block;
      // line 12: O_i = (l_i e^(m_i - m_new) O_i + e^(m~_ij - m_new) P~_ij V_j) / l_new
      float* o = out + p.query_at(b, i, h);
      for (int64_t d = 0; d < p.dim; ++d) o[d] *= l[i] * old_factor / l_new;
      for (int64_t j = first; j < std::min(first + kBlock, p.k_len); ++j)
        add_scaled(o, block_factor / l_new * scores[j - first], p.v + p.key_at(b, j, p.key_head(h)), p.dim);
      l[i] = l_new;  // line 13
      m[i] = m_new;
    }
  }
}

/// Algorithm 4 for the queries of one head; dq, dk and dv are added to.
void backward_head(const Problem& p, int64_t b, int64_t h, const float* out, const float* lse, const float* dout,
                   float* dq, float* dk, float* dv) {
  float weights[kBlock];
  for (int64_t first = 0; first < p.k_len; first += kBlock) {  // line 7: for each block j of keys
    for (int64_t i = 0; i < p.q_len; ++i) {                    // line 10: for each block i of queries
      if (p.score_block(weights, b, h, i, first) == kHidden) continue;  // lines 12 to 14: S_ij, masked
      exponentials(weights, lse[i]);                            // line 15: P_ij = exp(S_ij - m_i) / l_i
      const int64_t at = p.query_at(b, i, h);
      const float delta = dot(dout + at, out + at, p.dim);      // line 22: D_i = rowsum(dO_i o O_i)
      for (int64_t j = first; j < std::min(first + kBlock, p.k_len); ++j) {
        const float weight = weights[j - first];
        if (weight == 0) continue;
        const int64_t key = p.key_at(b, j, p.key_head(h));
        add_scaled(dv + key, weight, dout + at, p.dim);                     // line 19: dV_j += P_ij^T dO_i
        const float d_weight = dot(dout + at, p.v + key, p.dim);            // line 20: dP_ij = dO_i V_j^T
        const float d_score = p.scale * weight * (d_weight - delta);        // line 23: dS_ij = P_ij o (dP_ij - D_i)
        add_scaled(dq + at, d_score, p.k + key, p.dim);                     // line 24: dQ_i += tau dS_ij K_j
        add_scaled(dk + key, d_score, p.q + at, p.dim);                     // line 25: dK_j += tau dS_ij^T Q_i
      }
    }
  }
}

}  // namespace

/// q [B Sq H D], k and v [B Sk K D], ranges [R Sq 2], bias [P H Sk] or [1] for none, prefix [1] -> out [B Sq H D] and
/// lse [B H Sq], the logarithm of the sum of exponentials (-inf, and out 0, for a query that sees no key).
KERNEL(attention_v1_forward) {
  const Problem p(args);
  float* out = args.output<float>("out", "B Sq H D");
  float* lse = args.output<float>("lse", "B H Sq");
  args.done();
  std::vector<float> sums(static_cast<size_t>(p.batch * p.heads * p.q_len));
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t row = p.row_at(b, h, 0);
      float* m = lse + row;
      float* l = sums.data() + row;
      forward_head(p, b, h, out, m, l);
      for (int64_t i = 0; i < p.q_len; ++i) m[i] += std::log(l[i]);
    }
  }
}

/// The forward's inputs, its out and lse, and dout -> dq, dk, dv. The heads that share a key head are one thread's.
KERNEL(attention_v1_backward) {
  const Problem p(args);
  const float* out = args.input<float>("out", "B Sq H D");
  const float* lse = args.input<float>("lse", "B H Sq");
  const float* dout = args.input<float>("dout", "B Sq H D");
  float* dq = args.output<float>("dq", "B Sq H D");
  float* dk = args.output<float>("dk", "B Sk K D");
  float* dv = args.output<float>("dv", "B Sk K D");
  args.done();
  std::fill(dq, dq + p.batch * p.q_len * p.heads * p.dim, 0.f);  // line 5
  std::fill(dk, dk + p.batch * p.k_len * p.kv_heads * p.dim, 0.f);
  std::fill(dv, dv + p.batch * p.k_len * p.kv_heads * p.dim, 0.f);
  const int64_t group = p.heads / p.kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t kv = 0; kv < p.kv_heads; ++kv)
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        backward_head(p, b, h, out, lse + p.row_at(b, h, 0), dout, dq, dk, dv);
}
