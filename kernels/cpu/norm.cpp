// RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) over the last axis, with their gradients. A row is
// read from memory once: what comes back to it finds it in the cache.
#include <cmath>
#include <vector>

#include "layer_rows.h"

namespace run_llm {
namespace {

/// The rows cut into parts, each of which sums its share of a weight's gradient. How they are cut depends on the
/// shape alone, so the sums come out the same for every number of threads.
struct Parts {
  int64_t rows, rows_each, count;
  explicit Parts(int64_t rows_)
      : rows(rows_), rows_each(std::max<int64_t>(32, (rows_ + 63) / 64)), count((rows_ + rows_each - 1) / rows_each) {}
  int64_t begin(int64_t part) const { return part * rows_each; }
  int64_t end(int64_t part) const { return std::min(rows, begin(part) + rows_each); }
};

/// total [width] = the sum of the parts' rows, which lie `stride` numbers apart.
void add_parts(const float* sums, int64_t parts, int64_t stride, int64_t width, float* total) {
  each_vector(0, width, [&](int64_t i, auto at) {
    vec sum = at.load(sums + i);
    for (int64_t part = 1; part < parts; ++part) sum += at.load(sums + part * stride + i);
    at.store(total + i, sum);
  });
}

}  // namespace

// y = x r weight with r = 1 / sqrt(mean(x^2) + eps).
KERNEL(rms_norm_forward) {
  auto x = args.input<float>("x", "N D");
  auto weight = args.input<float>("weight", "D");
  const float eps = *args.input<float>("eps", "1");
  auto y = args.output<float>("y", "N D");
  auto rstd = args.output<float>("rstd", "N");
  args.done();
  const int64_t rows = args.size("N"), width = args.size("D");
#pragma omp parallel for schedule(static) if (rows * width >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    rstd[row] = rms_norm_row(x + row * width, weight, width, eps, y + row * width);
  }
}

// dx = r (dy weight - x r^2 mean(dy weight x)), dweight = the sum over the rows of dy x r.
KERNEL(rms_norm_backward) {
  auto x = args.input<float>("x", "N D");
  auto weight = args.input<float>("weight", "D");
  auto rstd = args.input<float>("rstd", "N");
  auto dy = args.input<float>("dy", "N D");
  auto dx = args.output<float>("dx", "N D");
  auto dweight = args.output<float>("dweight", "D");
  args.done();
  const int64_t rows = args.size("N"), width = args.size("D");
  const Parts parts(rows);
  std::vector<float> sums(static_cast<size_t>(parts.count * width));
#pragma omp parallel for schedule(static) if (rows * width >= kParallelFrom)
  for (int64_t part = 0; part < parts.count; ++part) {
    float* dw = sums.data() + part * width;
    for (int64_t row = parts.begin(part); row < parts.end(part); ++row) {
      const float* in = x + row * width;
      const float* pull = dy + row * width;
      float* out = dx + row * width;
      float product[1];
      sum_vectors(width, product, [&](int64_t i, auto at, vec* total) {
        total[0] += at.load(pull + i) * at.load(weight + i) * at.load(in + i);
      });
      const float r = rstd[row];
      const float back = r * r * r * (product[0] / static_cast<float>(width));
      each_aligned_vector(out, 0, width, [&](int64_t i, auto at) {
        const vec value = at.load(in + i), scaled = at.load(pull + i) * r;
        at.store(out + i, scaled * at.load(weight + i) - value * back);
        at.store(dw + i, at.load(dw + i) + scaled * value);
      });
    }
  }
  add_parts(sums.data(), parts.count, width, width, dweight);
}

// y = (x - mean) r weight + bias with r = 1 / sqrt(variance + eps), the variance that of the row (divided by D).
KERNEL(layer_norm_forward) {
  auto x = args.input<float>("x", "N D");
  auto weight = args.input<float>("weight", "D");
  auto bias = args.input<float>("bias", "D");
  const float eps = *args.input<float>("eps", "1");
  auto y = args.output<float>("y", "N D");
  auto mean = args.output<float>("mean", "N");
  auto rstd = args.output<float>("rstd", "N");
  args.done();
  const int64_t rows = args.size("N"), width = args.size("D");
  const float size = static_cast<float>(width);
#pragma omp parallel for schedule(static) if (rows * width >= kParallelFrom)
  for (int64_t row = 0; row < rows; ++row) {
    const float* in = x + row * width;
    float* out = y + row * width;
    float sum[1];
    sum_vectors(width, sum, [&](int64_t i, auto at, vec* sums) { sums[0] += at.load(in + i); });
    // The rounded mean is only the origin from which the second pass measures: the differences are nearly exact
    // however far from zero the row lies, and their own mean says how far off the origin is.
    const float origin = sum[0] / size;
    float moments[2];
    sum_vectors(width, moments, [&](int64_t i, auto at, vec* sums) {
      const vec away = at.only(at.load(in + i) - origin);
      sums[0] += away;
      sums[1] += away * away;
    });
    const float rest = moments[0] / size;
    const float r = 1.f / std::sqrt(std::max(moments[1] / size - rest * rest, 0.f) + eps);
    mean[row] = origin + rest;
    rstd[row] = r;
    each_aligned_vector(out, 0, width, [&](int64_t i, auto at) {
      at.store(out + i, ((at.load(in + i) - origin) - rest) * r * at.load(weight + i) + at.load(bias + i));
    });
  }
}

// With h = (x - mean) r and g = dy weight: dx = r (g - mean(g) - h mean(g h)), dweight and dbias are the sums over
// the rows of dy h and of dy.
KERNEL(layer_norm_backward) {
  auto x = args.input<float>("x", "N D");
  auto weight = args.input<float>("weight", "D");
  auto mean = args.input<float>("mean", "N");
  auto rstd = args.input<float>("rstd", "N");
  auto dy = args.input<float>("dy", "N D");
  auto dx = args.output<float>("dx", "N D");
  auto dweight = args.output<float>("dweight", "D");
  auto dbias = args.output<float>("dbias", "D");
  args.done();
  const int64_t rows = args.size("N"), width = args.size("D");
  const Parts parts(rows);
  std::vector<float> sums(static_cast<size_t>(parts.count * 2 * width));  // of a part: dweight, then dbias
#pragma omp parallel for schedule(static) if (rows * width >= kParallelFrom)
  for (int64_t part = 0; part < parts.count; ++part) {
    float* dw = sums.data() + part * 2 * width;
    float* db = dw + width;
    for (int64_t row = parts.begin(part); row < parts.end(part); ++row) {
      const float* in = x + row * width;
      const float* pull = dy + row * width;
      float* out = dx + row * width;
      const float r = rstd[row], middle = mean[row];
      float products[2];
      sum_vectors(width, products, [&](int64_t i, auto at, vec* total) {
        const vec g = at.load(pull + i) * at.load(weight + i);
        total[0] += g;
        total[1] += g * (at.load(in + i) - middle);
      });
      const float shift = products[0] / static_cast<float>(width);
      const float back = r * r * (products[1] / static_cast<float>(width));
      each_aligned_vector(out, 0, width, [&](int64_t i, auto at) {
        const vec d = at.load(pull + i), away = at.load(in + i) - middle;
        at.store(out + i, (d * at.load(weight + i) - shift - away * back) * r);
        at.store(dw + i, at.load(dw + i) + d * (away * r));
        at.store(db + i, at.load(db + i) + d);
      });
    }
  }
  add_parts(sums.data(), parts.count, 2 * width, width, dweight);
  add_parts(sums.data() + width, parts.count, 2 * width, width, dbias);
}

}  // namespace run_llm
