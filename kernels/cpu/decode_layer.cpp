// One decoder layer for one new token in each of a few rows: what generating text repeats for every token.
//
//   decode_layer(x [N H], attention_norm [H], wq [Q H], wk [C H], wv [C H], wo [H Q], ffn_norm [H], w1 [F H],
//                w3 [F H], w2 [H F], keys [R D], values [R D], cos [A 1 1 D], sin [A 1 1 D], column int32 [1],
//                kv_start int32 [N], eps [1]) -> y [N H]
//
// of the sequential kind (Llama): x + attention(RMSNorm(x)), then + SwiGLU(RMSNorm(.)), without biases. The new keys
// and values are written IN PLACE into column `column` of the cache, R = N * (C / D) * T rows with heads outside
// positions; row n then attends to its columns kv_start[n] ... column. cos and sin as in rope_forward, A = 1 or N.
//
// As seventeen operators the time of a small model goes into starting them, and into waking threads for each. Here the
// threads start once a layer and wait for each other five times, for microseconds: so they spin.
#include <omp.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "attention_few.h"
#include "few_rows.h"
#include "layer_rows.h"
#include "scratch.h"

namespace run_llm {
namespace {

/// Where the threads of a team wait for the last one. They spin at first: a wait here is shorter than waking up.
class Meeting {
 public:
  explicit Meeting(int members) : members_(members) {}

  void wait() {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      if (spins >= kSpins) std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 4096;
  const int members_;
  std::atomic<int> arrived_{0}, round_{0};
};

struct Layer {
  int64_t rows, hidden, q_size, kv_size, ffn, dim, cache, tables;
  const float *x, *attention_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w1, *w3, *w2, *cos, *sin;
  float *keys, *values;
  int64_t column;
  const int32_t* kv_start;
  float eps;
  float* y;
  // scratch of the team
  float *q, *k, *v, *attended, *middle, *activated;

  /// This thread's share of `count` things, in whole groups.
  struct Share {
    int64_t first, last;
  };
  static Share share(int64_t count, int64_t group) {
    const int64_t groups = (count + group - 1) / group, team = omp_get_num_threads(), me = omp_get_thread_num();
    return {std::min(groups * me / team * group, count), std::min(groups * (me + 1) / team * group, count)};
  }

  void norm(const float* in, const float* weight, float* out) const {
    for (int64_t row = 0; row < rows; ++row) rms_norm_row(in + row * hidden, weight, hidden, eps, out + row * hidden);
  }

  /// This thread's columns of in weight^T.
  void product(const float* in, int64_t width, const float* weight, int64_t columns, float* out) const {
    const Share mine = share(columns, kFewColumns);
    few_rows(in, rows, weight, width, mine.first, mine.last, out, columns);
  }

  /// This thread's columns of out = added + in weight^T.
  void product_added(const float* in, int64_t width, const float* weight, const float* added, float* out) const {
    product(in, width, weight, hidden, out);
    const Share mine = share(hidden, kFewColumns);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = mine.first; c < mine.last; ++c) out[row * hidden + c] += added[row * hidden + c];
  }

  /// The heads of one row, turned; to may be from.
  void turn(int64_t row, const float* from, float* to) const {
    const int64_t half = dim / 2;
    const float *c = cos + (tables == 1 ? 0 : row) * dim, *s = sin + (tables == 1 ? 0 : row) * dim;
    turn_head(from, to, half, c, s, s + half);
  }

  /// One head of new keys and values into the cache.
  void remember(int64_t row, int64_t head) const {
    const int64_t heads = kv_size / dim, from = row * kv_size + head * dim;
    const int64_t to = ((row * heads + head) * cache + column) * dim;
    turn(row, k + from, keys + to);
    std::copy_n(v + from, dim, values + to);
  }

  void attend(int64_t row, int64_t head, float* scores, float* part) const {
    const int64_t kv_heads = kv_size / dim, kv_head = head / (q_size / kv_size);
    float* query = q + row * q_size + head * dim;
    float* out = attended + row * q_size + head * dim;
    turn(row, query, query);
    const int64_t begin = std::min<int64_t>(kv_start[row], column + 1), block = (row * kv_heads + kv_head) * cache;
    std::fill_n(out, dim, 0.f);
    if (begin > column) return;
    partial_softmax(query, keys + (block + begin) * dim, values + (block + begin) * dim, column + 1 - begin, dim,
                    1 / std::sqrt(static_cast<float>(dim)), nullptr, scores, part);
    for (int64_t c = 0; c < dim; ++c) out[c] = part[2 + c] / part[1];
  }

  /// What every thread of the team does. mine: scratch of this thread.
  void run(Meeting& meeting, float* mine) const {
    float *normed = mine, *scores = normed + rows * hidden, *part = scores + cache + kLanes;
    norm(x, attention_norm, normed);
    product(normed, hidden, wq, q_size, q);
    product(normed, hidden, wk, kv_size, k);
    product(normed, hidden, wv, kv_size, v);
    meeting.wait();
    const int64_t kv_heads = kv_size / dim, heads = q_size / dim;
    const Share remembered = share(rows * kv_heads, 1), attending = share(rows * heads, 1);
    for (int64_t i = remembered.first; i < remembered.last; ++i) remember(i / kv_heads, i % kv_heads);
    meeting.wait();
    for (int64_t i = attending.first; i < attending.last; ++i) attend(i / heads, i % heads, scores, part);
    meeting.wait();
    product_added(attended, q_size, wo, x, middle);
    meeting.wait();
    norm(middle, ffn_norm, normed);
    product(normed, hidden, w1, ffn, activated);
    product(normed, hidden, w3, ffn, activated + rows * ffn);
    const Share columns = share(ffn, kFewColumns);
    for (int64_t row = 0; row < rows; ++row) {
      float* gate = activated + row * ffn;
      swiglu_row(gate, activated + (rows + row) * ffn, gate, columns.first, columns.last);
    }
    meeting.wait();
    product_added(activated, ffn, w2, middle, y);
  }
};

}  // namespace

KERNEL(decode_layer) {
  Layer layer{};
  layer.x = args.input<float>("x", "N H");
  layer.attention_norm = args.input<float>("attention_norm", "H");
  layer.wq = args.input<float>("wq", "Q H");
  layer.wk = args.input<float>("wk", "C H");
  layer.wv = args.input<float>("wv", "C H");
  layer.wo = args.input<float>("wo", "H Q");
  layer.ffn_norm = args.input<float>("ffn_norm", "H");
  layer.w1 = args.input<float>("w1", "F H");
  layer.w3 = args.input<float>("w3", "F H");
  layer.w2 = args.input<float>("w2", "H F");
  layer.keys = const_cast<float*>(args.input<float>("keys", "R D"));
  layer.values = const_cast<float*>(args.input<float>("values", "R D"));
  layer.cos = args.input<float>("cos", "A 1 1 D");
  layer.sin = args.input<float>("sin", "A 1 1 D");
  layer.column = *args.input<int32_t>("column", "1");
  layer.kv_start = args.input<int32_t>("kv_start", "N");
  layer.eps = *args.input<float>("eps", "1");
  layer.y = args.output<float>("y", "N H");
  args.done();
  layer.rows = args.size("N"), layer.hidden = args.size("H"), layer.q_size = args.size("Q");
  layer.kv_size = args.size("C"), layer.ffn = args.size("F"), layer.dim = args.size("D"), layer.tables = args.size("A");
  const int64_t heads = layer.rows * (layer.kv_size / layer.dim);
  args.require(layer.dim % 2 == 0, "keys", "the head size must be even");
  args.require(layer.kv_size % layer.dim == 0 && layer.q_size % layer.kv_size == 0, "wk",
               "its rows must be whole heads, and divide those of wq");
  args.require(args.size("R") % heads == 0, "keys", "its rows must be a multiple of the rows' heads");
  layer.cache = args.size("R") / heads;
  args.require(layer.tables == 1 || layer.tables == layer.rows, "cos", "its first size must be 1 or the rows");
  args.require(layer.column >= 0 && layer.column < layer.cache, "column", "outside the cache");
  for (int64_t row = 0; row < layer.rows; ++row) args.require(layer.kv_start[row] >= 0, "kv_start", "negative");

  const int64_t shared = layer.rows * (2 * layer.q_size + 2 * layer.kv_size + layer.hidden + 2 * layer.ffn);
  layer.q = scratch<float>(kScratchDecodeShared, shared);
  layer.k = layer.q + layer.rows * layer.q_size;
  layer.v = layer.k + layer.rows * layer.kv_size;
  layer.attended = layer.v + layer.rows * layer.kv_size;
  layer.middle = layer.attended + layer.rows * layer.q_size;
  layer.activated = layer.middle + layer.rows * layer.hidden;
  const int64_t per_thread = layer.rows * layer.hidden + layer.cache + kLanes + 2 + layer.dim + 16;
  float* own = scratch<float>(kScratchDecodeOwn, omp_get_max_threads() * per_thread);
  // Threads that the system does not give would be waited for in vain: the meeting is made by the team that there is.
  alignas(64) char place[sizeof(Meeting)];
  Meeting* meeting = nullptr;
#pragma omp parallel
  {
#pragma omp single
    meeting = new (place) Meeting(omp_get_num_threads());
    layer.run(*meeting, own + omp_get_thread_num() * per_thread);
  }
}

}  // namespace run_llm
