// The operations on a tile of covgrpo_kernels/kernels/interface.py, for any processor: row-major raw products, float or
// double. Each reads a row of the tile once; dlogits writes it once.
#pragma once

#include "isa.h"
#include "softmax.h"

namespace covgrpo {

// A tile of R rows by C vocabulary ids from `first` on.
template <class T>
struct Tile {
  T* products;             // [R, C]
  int64_t columns;         // C
  const int64_t* targets;  // [R]
  int64_t first;
  LogitTransform<T> transform;
  const T* bias;         // [C] or null
  const T* temperature;  // [R] or null
};

template <class T>
struct OnlineSoftmaxTile : Tile<T> {
  OnlineSoftmaxRows<T> running;
  bool entropy;
  Candidates<T> candidates;
};

template <class T>
struct DlogitsTile : Tile<T> {
  CoefficientRows<T> coefficients;
};

// Sixteen logits of a row from column `c` on. Those past the end of the row are `padding`. `biased` takes what the
// transform is applied to, the product plus the bias.
template <class T>
COVGRPO_INLINE Vector<T> row_logits(const Tile<T>& tile, const T* row, int64_t c, T temperature, T padding,
                                    Vector<T>* biased = nullptr) {
  Vector<T> z, b{};
  const int64_t left = tile.columns - c;
  if (left >= LANES) {
    z = load(row + c);
    if (tile.bias) b = load(tile.bias + c);
  } else {
    T some[LANES] = {}, biases[LANES] = {};
    for (int64_t i = 0; i < left; ++i) some[i] = row[c + i];
    for (int64_t i = 0; tile.bias && i < left; ++i) biases[i] = tile.bias[c + i];
    z = load(some);
    b = load(biases);
  }
  if (tile.bias) z += b;
  if (biased) *biased = z;
  if (!tile.transform.is_identity()) z = tile.transform.apply(z);
  if (tile.temperature) z /= broadcast(temperature);
  for (int64_t i = left; i < LANES; ++i) z[i] = padding;
  return z;
}

// Adds rows [begin, end) of the tile to their running softmax, one VOCAB_BLOCK after the other from left to right.
template <class T>
COVGRPO_INLINE void online_softmax_rows(const OnlineSoftmaxTile<T>& tile, int64_t begin, int64_t end) {
  using V = Vector<T>;
  alignas(64) T logits[VOCAB_BLOCK];
  const OnlineSoftmaxRows<T>& rows = tile.running;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = tile.products + r * tile.columns;
    const T temperature = tile.temperature ? tile.temperature[r] : T(1);
    const int64_t y = tile.targets[r] - tile.first;
    OnlineSoftmax<T> running{rows.maximum[r], rows.sum[r], rows.entropy_sum[r]};
    for (int64_t o = 0; o < tile.columns; o += VOCAB_BLOCK) {
      const int64_t width = smaller(VOCAB_BLOCK, tile.columns - o);
      V top = broadcast(T(NO_MAX));
      for (int64_t c = 0; c < width; c += LANES) {
        const V z = row_logits(tile, row, o + c, temperature, T(-INFINITY));
        store(logits + c, z);
        top = larger(z, top);
      }
      if (y >= o && y < o + width) rows.target[r] = logits[y - o];
      const T m = largest_of<T>(top);
      if (tile.candidates.min_logits && m >= tile.candidates.min_logits[r])
        for (int64_t c = 0; c < width; ++c)
          if (logits[c] >= tile.candidates.min_logits[r]) tile.candidates.add(r, tile.first + o + c, logits[c]);
      BlockSums<V> sums;
      for (int64_t c = 0; c < width; c += LANES) sums.add(load(logits + c), broadcast(m), tile.entropy);
      // One of the ties is the maximum, which is not in the sum; a block of -inf has none.
      const T ties = larger(sum_of<T>(sums.ties) - T(1), T(0));
      running.merge({m, sum_of<T>(sums.sum) + ties, sum_of<T>(sums.entropy_sum)});
    }
    rows.maximum[r] = running.maximum;
    rows.sum[r] = running.sum;
    rows.entropy_sum[r] = running.entropy_sum;
  }
}

// Rows [begin, end) of the tile become dL/dproducts.
template <class T>
COVGRPO_INLINE void dlogits_rows(const DlogitsTile<T>& tile, int64_t begin, int64_t end) {
  using V = Vector<T>;
  const CoefficientRows<T>& rows = tile.coefficients;
  const bool has_entropy = rows.entropy_grad != nullptr;
  for (int64_t r = begin; r < end; ++r) {
    T* row = tile.products + r * tile.columns;
    const T temperature = tile.temperature ? tile.temperature[r] : T(1);
    const Coefficients<V> coefficients{broadcast(rows.maximum[r]),
                                       broadcast(rows.log_sum[r]),
                                       broadcast(rows.at_target[r]),
                                       broadcast(rows.logprob_grad[r]),
                                       broadcast(has_entropy ? rows.entropy[r] : T(0)),
                                       broadcast(has_entropy ? rows.entropy_grad[r] : T(0)),
                                       has_entropy};
    const V slope = broadcast(tile.transform.scale / temperature);
    const int64_t y = tile.targets[r] - tile.first;
    for (int64_t c = 0; c < tile.columns; c += LANES) {
      V biased;
      const V z = row_logits(tile, row, c, temperature, T(0), &biased);
      V dz = coefficients.gradient(z, V{} > V{});  // of no target, which follows in its own lane
      if (y >= c && y < c + LANES) dz[y - c] = rows.at_target[r];
      if (tile.transform.has_softcap) {
        const V t = tile.transform.tanh_of(biased);
        dz *= 1 - t * t;
      }
      dz *= slope;
      if (tile.columns - c >= LANES)
        store(row + c, dz);
      else
        for (int64_t i = 0; i < tile.columns - c; ++i) row[c + i] = dz[i];
    }
  }
}

// The same for each instruction set. The double ones are for exact comparisons; their time is that of the exponential
// of libm, so a faster instruction set gains little.
template <class T>
void online_softmax_baseline(const OnlineSoftmaxTile<T>& tile, int64_t begin, int64_t end) {
  online_softmax_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX2 void online_softmax_avx2(const OnlineSoftmaxTile<T>& tile, int64_t begin, int64_t end) {
  online_softmax_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX512 void online_softmax_avx512(const OnlineSoftmaxTile<T>& tile, int64_t begin, int64_t end) {
  online_softmax_rows(tile, begin, end);
}

template <class T>
void dlogits_baseline(const DlogitsTile<T>& tile, int64_t begin, int64_t end) {
  dlogits_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX2 void dlogits_avx2(const DlogitsTile<T>& tile, int64_t begin, int64_t end) {
  dlogits_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX512 void dlogits_avx512(const DlogitsTile<T>& tile, int64_t begin, int64_t end) {
  dlogits_rows(tile, begin, end);
}

template <class F>
F* by_isa(Isa isa, F* baseline, F* avx2, F* avx512) {
  return isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
}

}  // namespace covgrpo
