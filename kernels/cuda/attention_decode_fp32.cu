// The pieces of attention_decode.h in exact fp32, on the CUDA cores.
//
// The lanes of a warp lie across the width of a key, four numbers each: one load of 16 bytes a lane reads one key of
// 128 numbers, or two of 64, from end to end, and later its value likewise. A lane so has a part of each row's product
// with the key. The parts are summed by halves: with a neighbour a lane first exchanges the products of the rows that
// the other keeps, so that it goes on with half as many; in the end it has the score of one row, lane % kRows, and
// keeps that row's maximum and sum. Every exponential is computed once instead of by all lanes.
//
// A lane's weighted sum of values has its four columns, for all rows: the weights come to it by shuffles.
#include "attention_decode.h"

namespace run_llm {
namespace {

constexpr int kAtOnce = 8;  // keys of which a lane has loads in flight

template <int kDim>
struct Lanes {
  static constexpr int kAcross = kDim / 4, kGroups = 32 / kAcross;  // lanes of a key; keys side by side in a warp
  static constexpr int kWarpStep = kAtOnce * kGroups, kStep = kDecodeWarps * kWarpStep;
};

/// Four numbers of a row of `dim` at `column`; zeros from `dim` on, or if not `valid`.
template <bool kVectors>
DEVICE void load_four(float (&to)[4], const float* row, int column, int dim, bool valid) {
  if constexpr (kVectors) {
    load_once_16(to, row + column, valid && column < dim);
  } else {
    UNROLL
    for (int e = 0; e < 4; ++e) to[e] = valid && column + e < dim ? row[column + e] : 0.f;
  }
}

/// The sum over kAcross neighbouring lanes of parts[lane % kRows], as that lane wants it.
template <int kRows, int kAcross>
DEVICE float sum_of_row(float (&parts)[kRows], int lane) {
  UNROLL
  for (int half = kRows / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
    UNROLL
    for (int r = 0; r < half; ++r) {
      const float kept = upper ? parts[r + half] : parts[r], given = upper ? parts[r] : parts[r + half];
      parts[r] = kept + shuffle_xor(given, half);
    }
  }
  UNROLL
  for (int other = kRows; other < kAcross; other *= 2) parts[0] += shuffle_xor(parts[0], other);
  return parts[0];
}

// Two blocks at a time on a multiprocessor: with their loads in flight that is enough, and leaves them registers.
template <int kDim, int kRows, bool kVectors, class Cache>
KERNEL_FUNCTION __launch_bounds__(kDecodeThreads, 2) attend_pieces(Decode<float, Cache> call, float scale) {
  using L = Lanes<kDim>;
  const Piece piece = Piece::of<kRows, L::kStep>(call);
  if (piece.begin == piece.end) return leave_nothing<kRows>(call, piece);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = lane / L::kAcross, column = lane % L::kAcross * 4;
  const int mine = lane % kRows, my_end = piece.end_of(call, mine);
  const float* bias = call.bias && my_end ? call.bias_of(piece.b, piece.kv, piece.first + mine) : nullptr;

  float q[kRows][4], out[kRows][4];
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    const bool valid = piece.first + r < call.rows();
    const int64_t row = valid ? call.row_of_out(piece.b, piece.kv, piece.first + r) : 0;
    load_four<kVectors>(q[r], call.q + row * call.dim, column, call.dim, valid);
    UNROLL
    for (int e = 0; e < 4; ++e) out[r][e] = 0;
  }
  float largest = kNoScore, sum = 0;  // of row `mine`, over this group's keys

  const auto load = [&](float(&to)[kAtOnce][4], const float* from, int first) {
    UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      const int key = first + u * L::kGroups + group;
      const bool valid = key < piece.end;
      const float* row = from + call.cache.at(piece.b, piece.kv, valid ? key : piece.begin);
      load_four<kVectors>(to[u], row, column, call.dim, valid);
    }
  };
  float keys[kAtOnce][4], values[kAtOnce][4];
  int first = piece.begin + warp * L::kWarpStep;
  load(keys, call.k, first);
  load(values, call.v, first);
  for (; first < piece.end; first += L::kStep) {
    float weights[kAtOnce], most = largest;
    UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      float parts[kRows];
      UNROLL
      for (int r = 0; r < kRows; ++r)
        parts[r] = q[r][0] * keys[u][0] + q[r][1] * keys[u][1] + q[r][2] * keys[u][2] + q[r][3] * keys[u][3];
      const int key = first + u * L::kGroups + group;
      const bool sees = key < my_end && key < piece.end;
      const float added = bias && sees ? bias_term(bias[key]) : 0.f;
      const float score = (sum_of_row<kRows, L::kAcross>(parts, lane) + added) * scale;
      weights[u] = sees ? score : kNoScore;
      most = fmaxf(most, weights[u]);
    }
    load(keys, call.k, first + L::kStep);

    const float shift = most == kNoScore ? 0.f : most;  // nothing seen yet: weights of 0
    const float factor = exp2_fast(largest - shift);
    largest = most;
    sum *= factor;
    UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      weights[u] = exp2_fast(weights[u] - shift);
      sum += weights[u];
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int source = group * L::kAcross + r;  // a lane that has this row
      const float row_factor = shuffle(factor, source);
      UNROLL
      for (int e = 0; e < 4; ++e) out[r][e] *= row_factor;
      UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const float weight = shuffle(weights[u], source);
        UNROLL
        for (int e = 0; e < 4; ++e) out[r][e] += weight * values[u][e];
      }
    }
    load(values, call.v, first + L::kStep);
  }

  using S = States<kDecodeWarps * L::kGroups, kRows, kDim>;
  S& states = *shared_memory<S>();
  const int state = warp * L::kGroups + group;
  if (lane % L::kAcross < kRows) {
    states.largest[state][mine] = largest;
    states.sum[state][mine] = sum;
  }
  UNROLL
  for (int r = 0; r < kRows; ++r)
    *reinterpret_cast<float4*>(&states.out[state][r][column]) = make_float4(out[r][0], out[r][1], out[r][2], out[r][3]);
  states.leave(call, piece);
}

template <int kDim, int kRows, bool kVectors, class Cache>
void attend_with(const Decode<float, Cache>& call, int blocks, cudaStream_t stream) {
  using S = States<kDecodeWarps * Lanes<kDim>::kGroups, kRows, kDim>;
  launch(attend_pieces<kDim, kRows, kVectors, Cache>, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, sizeof(S),
         stream, call, call.scale_log2());
}

template <int kDim, class Cache>
void attend(const Decode<float, Cache>& call, int blocks, cudaStream_t stream) {
  if (!call.vectors) return attend_with<kDim, 4, false>(call, blocks, stream);
  const int rows = attention_decode_fp32_rows(call.rows(), true);
  if (rows == 1) return attend_with<kDim, 1, true>(call, blocks, stream);
  if (rows == 4) return attend_with<kDim, 4, true>(call, blocks, stream);
  attend_with<kDim, 8, true>(call, blocks, stream);
}

}  // namespace

int attention_decode_fp32_rows(int rows, bool vectors) {
  if (!vectors) return 4;  // odd widths and addresses: one kernel is enough
  return rows == 1 ? 1 : rows <= 4 ? 4 : 8;
}

template <class Cache>
void attention_decode_fp32(const Decode<float, Cache>& call, int blocks, cudaStream_t stream) {
  if (call.dim <= 64) return attend<64>(call, blocks, stream);
  attend<128>(call, blocks, stream);
}
template void attention_decode_fp32(const Decode<float, Contiguous>&, int, cudaStream_t);
template void attention_decode_fp32(const Decode<float, Paged>&, int, cudaStream_t);

}  // namespace run_llm
