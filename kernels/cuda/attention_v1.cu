// FlashAttention-1 (arXiv 2205.14135) as the paper writes it, in fp32: blocks of keys in the outer loop, blocks of
// queries in the inner one, m and l in memory, the output rescaled at every step. It is here to be read: plain loops
// over tiles in shared memory, no thread with more than one number at a time. The comments on the right give the lines
// of the paper's algorithms 2 (forward: algorithm 1 with scaling and mask) and 4 (backward), but for dropout.
//
// One CUDA block works on one head of one batch row, in the backward on all query heads of one key head: they add to
// the same dK and dV, and one block adds in one order. Its threads share out the elements of every tile. Compare
// kernels/cpu/attention_v1.cpp, the same algorithm without tiles.
#include <cmath>

#include "attention_fp32.h"

using namespace run_llm;

namespace {

constexpr int kThreads = 128;
constexpr int kQueries = 16;  // B_r of the paper
constexpr int kKeys = 32;     // B_c

/// A tile in shared memory: rows of `width` numbers. In memory they are one number longer, so that threads that read
/// the same column of neighbouring rows use different banks.
struct Tile {
  float* numbers;
  int width;

  DEVICE float& at(int row, int column) const { return numbers[row * (width + 1) + column]; }
  static size_t size(int rows, int width) { return static_cast<size_t>(rows) * (width + 1); }
};

/// Hands out the block's shared memory piece by piece.
struct SharedMemory {
  float* next;

  DEVICE Tile tile(int rows, int width) {
    const Tile tile{next, width};
    next += rows * (width + 1);
    return tile;
  }
};

/// f(row, column) for the elements of a tile that are this thread's.
template <class F>
DEVICE void each_element(int rows, int columns, F f) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) f(i / columns, i % columns);
}

/// Rows first, first + 1, ... of a head [positions, dim], `stride` numbers apart, into a tile; zeros past the last.
DEVICE void load(const Tile& to, int rows, const float* head, int64_t stride, int first, int positions) {
  each_element(rows, to.width, [&](int row, int d) {
    to.at(row, d) = first + row < positions ? head[(first + row) * stride + d] : 0.f;
  });
}

/// Row `i` of `a` times row `j` of `b`.
DEVICE float dot(const Tile& a, int i, const Tile& b, int j) {
  float sum = 0;
  for (int d = 0; d < a.width; ++d) sum += a.at(i, d) * b.at(j, d);
  return sum;
}

/// tau (q_i . k_j + bias_j) of query and key number `row` and `column` of their tiles; kHidden if i does not see j.
DEVICE float score(const Attention<float>& call, float tau, int b, const float* bias, const Tile& q, int first_query,
                   int row, const Tile& k, int first_key, int column) {
  const int i = first_query + row, j = first_key + column;
  if (i >= call.queries || j >= call.keys || !call.sees(b, i, j)) return kHidden;
  return tau * (dot(q, row, k, column) + (bias ? bias_term(bias[j]) : 0.f));
}

/// The row of S_ij that one thread looks after becomes P~_ij; m and l of its query are brought up to date. O and the
/// products P~_ij V_j are to be multiplied by the two factors that come back.
DEVICE float2 softmax_step(const Tile& s, int row, float& m, float& l) {
  float m_block = kHidden;  // m~_ij = rowmax(S_ij)
  for (int j = 0; j < kKeys; ++j)
    if (!(s.at(row, j) <= m_block)) m_block = s.at(row, j);  // a NaN too: it must not pass for a hidden key
  float l_block = 0;                                         // l~_ij = rowsum(P~_ij)
  for (int j = 0; j < kKeys; ++j) {
    s.at(row, j) = m_block == kHidden ? 0.f : std::exp(s.at(row, j) - m_block);  // P~_ij = e^(S_ij - m~_ij)
    l_block += s.at(row, j);
  }
  if (m_block == kHidden) return make_float2(1, 0);                // nothing to be seen in this block
  const float m_new = m_block <= m ? m : m_block;                  // m_i^new = max(m_i, m~_ij)
  const float old_part = std::exp(m - m_new) * l, block_factor = std::exp(m_block - m_new);
  const float l_new = old_part + block_factor * l_block;           // l_i^new = e^(m_i - m_new) l_i + e^(m~ - m_new) l~
  m = m_new;                                                       // m_i = m_i^new
  l = l_new;                                                       // l_i = l_i^new
  return make_float2(old_part / l_new, block_factor / l_new);
}

/// m lies where lse will be; `sums` [B, H, Sq] is l.
KERNEL_FUNCTION __launch_bounds__(kThreads, 1) forward(Attention<float> call, float tau, float* sums) {
  const int head = static_cast<int>(blockIdx.x), b = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), kv = call.kv_head(head), dim = call.dim;
  const float* bias = call.bias_of(b, head);
  float* o = call.out + call.q_start(b, head);
  float* m = call.lse + call.lse_start(b, head);
  float* l = sums + call.lse_start(b, head);
  SharedMemory memory{shared_memory<float>()};
  const Tile q = memory.tile(kQueries, dim), k = memory.tile(kKeys, dim), v = memory.tile(kKeys, dim);
  const Tile p = memory.tile(kQueries, kKeys);     // S_ij, then P~_ij
  const Tile factors = memory.tile(kQueries, 2);  // of O_i and of P~_ij V_j

  for (int i = 0; i < call.queries; ++i)  // O = 0
    each_element(1, dim, [&](int, int d) { o[i * call.q_stride() + d] = 0; });
  for (int i = thread; i < call.queries; i += kThreads) {
    l[i] = 0;        // l = 0
    m[i] = kHidden;  // m = -infinity
  }
  for (int j = 0; j < call.keys; j += kKeys) {                                   // for each block j of keys
    load(k, kKeys, call.k + call.k_start(b, kv), call.k_stride(), j, call.keys);  // load K_j
    load(v, kKeys, call.v + call.k_start(b, kv), call.k_stride(), j, call.keys);  // load V_j
    for (int i = 0; i < call.queries; i += kQueries) {                           // for each block i of queries
      load(q, kQueries, call.q + call.q_start(b, head), call.q_stride(), i, call.queries);  // load Q_i
      __syncthreads();
      each_element(kQueries, kKeys, [&](int row, int key) {                      // S_ij = tau Q_i K_j^T, masked
        p.at(row, key) = score(call, tau, b, bias, q, i, row, k, j, key);
      });
      __syncthreads();
      if (thread < kQueries && i + thread < call.queries) {
        const float2 both = softmax_step(p, thread, m[i + thread], l[i + thread]);
        factors.at(thread, 0) = both.x;
        factors.at(thread, 1) = both.y;
      }
      __syncthreads();
      // O_i = (l_i e^(m_i - m_new) O_i + e^(m~_ij - m_new) P~_ij V_j) / l_new
      each_element(kQueries, dim, [&](int row, int d) {
        if (i + row >= call.queries) return;
        float sum = 0;
        for (int key = 0; key < kKeys; ++key) sum += p.at(row, key) * v.at(key, d);
        float& number = o[(i + row) * call.q_stride() + d];
        number = factors.at(row, 0) * number + factors.at(row, 1) * sum;
      });
    }
    __syncthreads();  // nobody reads K_j and V_j any more
  }
  // All that the backward needs of m and l: it divides e^(S - m) by l.
  for (int i = thread; i < call.queries; i += kThreads) m[i] = l[i] == 0 ? 0 : m[i] + std::log(l[i]);
}

KERNEL_FUNCTION __launch_bounds__(kThreads, 1) backward(Attention<float> call, float tau) {
  const int kv = static_cast<int>(blockIdx.x), b = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), dim = call.dim, group = call.heads / call.kv_heads;
  SharedMemory memory{shared_memory<float>()};
  const Tile q = memory.tile(kQueries, dim), dout = memory.tile(kQueries, dim);
  const Tile k = memory.tile(kKeys, dim), v = memory.tile(kKeys, dim);
  const Tile dk = memory.tile(kKeys, dim), dv = memory.tile(kKeys, dim);
  const Tile p = memory.tile(kQueries, kKeys), ds = memory.tile(kQueries, kKeys);
  const Tile deltas = memory.tile(kQueries, 1);

  for (int head = kv * group; head < (kv + 1) * group; ++head)  // dQ = 0
    for (int i = 0; i < call.queries; ++i)
      each_element(1, dim, [&](int, int d) { call.dq[call.q_start(b, head) + i * call.q_stride() + d] = 0; });
  for (int j = 0; j < call.keys; j += kKeys) {                                   // for each block j of keys
    load(k, kKeys, call.k + call.k_start(b, kv), call.k_stride(), j, call.keys);  // load K_j
    load(v, kKeys, call.v + call.k_start(b, kv), call.k_stride(), j, call.keys);  // load V_j
    each_element(kKeys, dim, [&](int key, int d) { dk.at(key, d) = dv.at(key, d) = 0; });  // dK_j = dV_j = 0
    for (int head = kv * group; head < (kv + 1) * group; ++head) {
      const int64_t start = call.q_start(b, head), stride = call.q_stride();
      const float* bias = call.bias_of(b, head);
      const float* lse = call.given_lse + call.lse_start(b, head);
      for (int i = 0; i < call.queries; i += kQueries) {                 // for each block i of queries
        load(q, kQueries, call.q + start, stride, i, call.queries);        // load Q_i
        load(dout, kQueries, call.dout + start, stride, i, call.queries);  // load dO_i
        __syncthreads();
        if (thread < kQueries) {                                         // D_i = rowsum(dO_i o O_i)
          float sum = 0;
          const float* o = call.given_out + start + (i + thread) * stride;
          for (int d = 0; d < dim && i + thread < call.queries; ++d) sum += dout.at(thread, d) * o[d];
          deltas.at(thread, 0) = sum;
        }
        __syncthreads();
        each_element(kQueries, kKeys, [&](int row, int key) {
          const float s = score(call, tau, b, bias, q, i, row, k, j, key);         // S_ij
          const float weight = s == kHidden ? 0.f : std::exp(s - lse[i + row]);    // P_ij = e^(S_ij - m_i) / l_i
          const float d_weight = dot(dout, row, v, key);                           // dP_ij = dO_i V_j^T
          p.at(row, key) = weight;
          ds.at(row, key) = weight * (d_weight - deltas.at(row, 0));               // dS_ij = P_ij o (dP_ij - D_i)
        });
        __syncthreads();
        each_element(kKeys, dim, [&](int key, int d) {
          for (int row = 0; row < kQueries; ++row) {
            dv.at(key, d) += p.at(row, key) * dout.at(row, d);     // dV_j += P_ij^T dO_i
            dk.at(key, d) += tau * ds.at(row, key) * q.at(row, d);  // dK_j += tau dS_ij^T Q_i
          }
        });
        each_element(kQueries, dim, [&](int row, int d) {
          if (i + row >= call.queries) return;
          float sum = 0;
          for (int key = 0; key < kKeys; ++key) sum += ds.at(row, key) * k.at(key, d);
          call.dq[start + (i + row) * stride + d] += tau * sum;    // dQ_i += tau dS_ij K_j
        });
        __syncthreads();  // nobody reads Q_i and dO_i any more
      }
    }
    each_element(kKeys, dim, [&](int key, int d) {  // write dK_j and dV_j
      if (j + key >= call.keys) return;
      call.dk[call.k_start(b, kv) + (j + key) * call.k_stride() + d] = dk.at(key, d);
      call.dv[call.k_start(b, kv) + (j + key) * call.k_stride() + d] = dv.at(key, d);
    });
  }
}

}  // namespace

/// The operators of attention.h, in float32.
KERNEL(attention_v1_forward) {
  require_float32(args);
  const auto call = Attention<float>::forward(args);
  auto* stream = static_cast<cudaStream_t>(args.stream());
  const size_t numbers =
      Tile::size(kQueries + 2 * kKeys, call.dim) + Tile::size(kQueries, kKeys) + Tile::size(kQueries, 2);
  const Scratch<float> sums(static_cast<size_t>(call.batch) * call.heads * call.queries, stream);
  launch(forward, dim3(call.heads, call.batch), kThreads, numbers * sizeof(float), stream, call, call.scale(),
         sums.get());
}

KERNEL(attention_v1_backward) {
  require_float32(args);
  const auto call = Attention<float>::backward(args);
  auto* stream = static_cast<cudaStream_t>(args.stream());
  const size_t numbers =
      Tile::size(2 * kQueries + 4 * kKeys, call.dim) + 2 * Tile::size(kQueries, kKeys) + Tile::size(kQueries, 1);
  launch(backward, dim3(call.kv_heads, call.batch), kThreads, numbers * sizeof(float), stream, call, call.scale());
}
