// FlashAttention-1 (arXiv 2205.14135) as the paper writes it: blocks of keys in the outer loop, queries in the inner
// one, the output rescaled at every step. It is here to be read and to check the faster kernels against; the comments
// on the right give the lines of the paper's algorithms 2 (forward: algorithm 1 with scaling and mask) and 4
// (backward), but for dropout. A block of queries is one query here (B_r = 1), a block of keys is kBlock of them
// (B_c). Threads share out batch rows and heads, and change no bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_args.h"
#include "loops.h"

using namespace run_llm;

namespace {

using Call = AttentionCall<float>;

constexpr int64_t kBlock = 64;

float dot(const float* a, const float* b, int64_t count) {
  vec sum = {};
  each_vector(0, count, [&](int64_t i, auto at) { sum += at.load(a + i) * at.load(b + i); });
  return sum_of(sum);
}

/// y += factor * x
void add_scaled(float* y, float factor, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

/// x[0 .. kBlock) becomes e^(x - shift), 0 where x is kHidden; returns the sum.
float exponentials(float* x, float shift) {
  vec sum = {};
  for (int64_t c = 0; c < kBlock; c += kLanes) {
    const vec e = exp(load(x + c) - broadcast(shift));
    store(x + c, e);
    sum += e;
  }
  return sum_of(sum);
}

/// One head of one batch row.
class Head {
 public:
  Head(const Call& call, int64_t b, int64_t h)
      : queries_(call.queries), keys_(call.keys), dim_(call.dim), scale_(call.scale()), seen_(call.visibility(b)),
        q_(call.q.head(b, h)), k_(call.k.head(b, key_head(call, h))), v_(call.v.head(b, key_head(call, h))),
        bias_(call.bias ? call.bias + ((call.bias_per_row ? b * call.heads : 0) + h) * call.keys : nullptr) {}

  static int64_t key_head(const Call& call, int64_t h) { return h / (call.heads / call.kv_heads); }

  /// out and lse from m and l, the paper's names: `m` is where lse will be, `l` holds as many numbers.
  void forward(Rows<float> out, float* m, float* l) const {
    float scores[kBlock];
    for (int64_t i = 0; i < queries_; ++i) {  // O = 0, l = 0, m = -infinity
      std::fill_n(out[i], dim_, 0.f);
      l[i] = 0;
      m[i] = -std::numeric_limits<float>::infinity();
    }
    for (int64_t first = 0; first < keys_; first += kBlock) {     // for each block j of keys
      for (int64_t i = 0; i < queries_; ++i) {                    // for each block i of queries
        const float m_block = score_block(scores, i, first);      // S_ij, m~_ij = rowmax(S_ij)
        if (m_block == kHidden) continue;                         // nothing to be seen in this block
        const float l_block = exponentials(scores, m_block);      // P~_ij = e^(S_ij - m~_ij), l~_ij
        const float m_new = std::max(m[i], m_block);              // m_i^new
        const float old_factor = std::exp(m[i] - m_new), block_factor = std::exp(m_block - m_new);
        const float l_new = old_factor * l[i] + block_factor * l_block;  // l_i^new
        // O_i = (l_i e^(m_i - m_new) O_i + e^(m~_ij - m_new) P~_ij V_j) / l_new
        for (int64_t d = 0; d < dim_; ++d) out[i][d] *= l[i] * old_factor / l_new;
        for (int64_t j = first; j < block_end(first); ++j)
          add_scaled(out[i], block_factor * scores[j - first] / l_new, v_[j], dim_);
        l[i] = l_new;  // l_i = l_i^new
        m[i] = m_new;  // m_i = m_i^new
      }
    }
    // All that backward needs of m and l: it divides e^(S - m) by l.
    for (int64_t i = 0; i < queries_; ++i) m[i] = l[i] == 0 ? 0 : m[i] + std::log(l[i]);
  }

  /// Adds to dq, dk and dv.
  void backward(Rows<const float> out, const float* lse, Rows<const float> dout, Rows<float> dq, Rows<float> dk,
                Rows<float> dv) const {
    float weights[kBlock];
    for (int64_t first = 0; first < keys_; first += kBlock) {          // for each block j of keys
      for (int64_t i = 0; i < queries_; ++i) {                         // for each block i of queries
        if (score_block(weights, i, first) == kHidden) continue;       // S_ij
        exponentials(weights, lse[i]);                                 // P_ij = e^(S_ij - m_i) / l_i
        const float delta = dot(dout[i], out[i], dim_);                // D_i = rowsum(dO_i o O_i)
        for (int64_t j = first; j < block_end(first); ++j) {
          const float weight = weights[j - first];
          add_scaled(dv[j], weight, dout[i], dim_);                    // dV_j += P_ij^T dO_i
          const float d_weight = dot(dout[i], v_[j], dim_);            // dP_ij = dO_i V_j^T
          const float d_score = scale_ * weight * (d_weight - delta);  // tau dS_ij = tau P_ij o (dP_ij - D_i)
          add_scaled(dq[i], d_score, k_[j], dim_);                     // dQ_i += tau dS_ij K_j
          add_scaled(dk[j], d_score, q_[i], dim_);                     // dK_j += tau dS_ij^T Q_i
        }
      }
    }
  }

 private:
  int64_t block_end(int64_t first) const { return std::min(first + kBlock, keys_); }

  bool sees(int64_t i, int64_t j) const {
    return j < seen_.prefix || (seen_.ranges[2 * i] <= j && j < seen_.ranges[2 * i + 1]);
  }

  /// scores[c] = tau (q_i . k_(first + c) + bias), kHidden where query i sees nothing; returns the largest.
  float score_block(float* scores, int64_t i, int64_t first) const {
    std::fill_n(scores, kBlock, kHidden);
    float largest = kHidden;
    for (int64_t j = first; j < block_end(first); ++j) {
      if (!sees(i, j)) continue;
      const float score = scale_ * (dot(q_[i], k_[j], dim_) + (bias_ ? bias_[j] : 0.f));
      scores[j - first] = score;
      if (!(score <= largest)) largest = score;  // a NaN too: the block must not pass for one that is hidden
    }
    return largest;
  }

  int64_t queries_, keys_, dim_;
  float scale_;  // tau of the paper
  Visibility seen_;
  Rows<const float> q_, k_, v_;
  const float* bias_;
};

}  // namespace

/// The operators of attention_args.h, in float32.
KERNEL(attention_v1_forward) {
  const Call call = Call::forward(args);
  std::vector<float> sums(static_cast<size_t>(call.batch * call.heads * call.queries));
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t row = (b * call.heads + h) * call.queries;
      Head(call, b, h).forward(call.out.head(b, h), call.lse + row, sums.data() + row);
    }
}

KERNEL(attention_v1_backward) {
  const Call call = Call::backward(args);
  std::fill_n(call.dq.data, call.batch * call.queries * call.heads * call.dim, 0.f);  // dQ = dK = dV = 0
  std::fill_n(call.dk.data, call.batch * call.keys * call.kv_heads * call.dim, 0.f);
  std::fill_n(call.dv.data, call.batch * call.keys * call.kv_heads * call.dim, 0.f);
  const int64_t group = call.heads / call.kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t kv = 0; kv < call.kv_heads; ++kv)
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)  // these add to the same dk and dv
        Head(call, b, h).backward(call.given_out.head(b, h), call.given_lse + (b * call.heads + h) * call.queries,
                                  call.dout.head(b, h), call.dq.head(b, h), call.dk.head(b, kv), call.dv.head(b, kv));
}
