// The tile operations of covgrpo_kernels/tiles/interface.py on row-major tiles of raw products, float or double, for
// any processor. A row is read once and, by grad, written once.
#pragma once

#include "isa.h"
#include "softmax.h"

namespace covgrpo {

// Entries folded together before they join a row's statistics: BLOCK of interface.py. Fixed, so that every bit is the
// same however the vocabulary is cut into tiles.
constexpr int64_t FOLD_BLOCK = 1024;

// A tile of R rows by C vocabulary entries from `first` on.
template <class T>
struct Tile {
  T* products;             // [R, C]
  int64_t columns;         // C
  const int64_t* targets;  // [R]
  int64_t first;
  Head<T> head;
  const T* bias;         // [C] or null
  const T* temperature;  // [R] or null
};

template <class T>
struct FoldTile : Tile<T> {
  T *maximum, *total, *moment, *target;  // [R], updated
  bool entropy;
  Candidates<T> candidates;
};

template <class T>
struct GradTile : Tile<T> {
  const T *maximum, *log_total, *at_target, *logprob_grad, *entropy;  // [R]
  const T* entropy_grad;                                              // [R] or null
};

// Sixteen logits of a row from column `c` on; those past the end of the row are `padding`.
template <class T>
COVGRPO_INLINE Vector<T> row_logits(const Tile<T>& tile, const T* row, int64_t c, T temperature, T padding,
                                    Vector<T>* raw = nullptr) {
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
  if (raw) *raw = z;
  if (!tile.head.plain()) z = tile.head.before_temperature(z);
  if (tile.temperature) z /= broadcast(temperature);
  for (int64_t i = left; i < LANES; ++i) z[i] = padding;
  return z;
}

// Rows [begin, end) of the tile, block after block from left to right.
template <class T>
COVGRPO_INLINE void fold_rows(const FoldTile<T>& tile, int64_t begin, int64_t end) {
  using V = Vector<T>;
  alignas(64) T block[FOLD_BLOCK];
  for (int64_t r = begin; r < end; ++r) {
    const T* row = tile.products + r * tile.columns;
    const T temperature = tile.temperature ? tile.temperature[r] : T(1);
    const int64_t y = tile.targets[r] - tile.first;
    Statistics<T> running{tile.maximum[r], tile.total[r], tile.moment[r]};
    for (int64_t o = 0; o < tile.columns; o += FOLD_BLOCK) {
      const int64_t width = smaller(FOLD_BLOCK, tile.columns - o);
      V top = broadcast(T(NO_MAX));
      for (int64_t c = 0; c < width; c += LANES) {
        const V z = row_logits(tile, row, o + c, temperature, T(-INFINITY));
        store(block + c, z);
        top = larger(z, top);
      }
      if (y >= o && y < o + width) tile.target[r] = block[y - o];
      const T m = largest_of<T>(top);
      if (tile.candidates.threshold && m >= tile.candidates.threshold[r])
        for (int64_t c = 0; c < width; ++c)
          if (block[c] >= tile.candidates.threshold[r]) tile.candidates.add(r, tile.first + o + c, block[c]);
      BlockSums<V> sums;
      for (int64_t c = 0; c < width; c += LANES) sums.add(load(block + c), broadcast(m), tile.entropy);
      const T ties = larger(sum_of<T>(sums.ties) - T(1), T(0));
      running.merge({m, sum_of<T>(sums.total) + ties, sum_of<T>(sums.moment)});
    }
    tile.maximum[r] = running.maximum;
    tile.total[r] = running.total;
    tile.moment[r] = running.moment;
  }
}

// Rows [begin, end) of the tile become dL/dproducts.
template <class T>
COVGRPO_INLINE void grad_rows(const GradTile<T>& tile, int64_t begin, int64_t end) {
  using V = Vector<T>;
  for (int64_t r = begin; r < end; ++r) {
    T* row = tile.products + r * tile.columns;
    const T temperature = tile.temperature ? tile.temperature[r] : T(1);
    const bool with_entropy = tile.entropy_grad != nullptr;
    const Coefficients<V> coefficients{broadcast(tile.maximum[r]),
                                       broadcast(tile.log_total[r]),
                                       broadcast(tile.at_target[r]),
                                       broadcast(tile.logprob_grad[r]),
                                       broadcast(tile.entropy[r]),
                                       broadcast(with_entropy ? tile.entropy_grad[r] : T(0)),
                                       with_entropy};
    const V slope = broadcast(tile.head.scale / temperature);
    const int64_t y = tile.targets[r] - tile.first;
    for (int64_t c = 0; c < tile.columns; c += LANES) {
      V raw;
      const V z = row_logits(tile, row, c, temperature, T(0), &raw);
      V dz = coefficients.gradient(z, V{} > V{});
      if (y >= c && y < c + LANES) dz[y - c] = tile.at_target[r];
      if (tile.head.capped) {
        const V t = tile.head.per_cap(raw);
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

// The same for each instruction set. The double ones are for exact comparisons: libm's exponential is what they wait
// for.
template <class T>
void fold_baseline(const FoldTile<T>& tile, int64_t begin, int64_t end) {
  fold_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX2 void fold_avx2(const FoldTile<T>& tile, int64_t begin, int64_t end) {
  fold_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX512 void fold_avx512(const FoldTile<T>& tile, int64_t begin, int64_t end) {
  fold_rows(tile, begin, end);
}

template <class T>
void grad_baseline(const GradTile<T>& tile, int64_t begin, int64_t end) {
  grad_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX2 void grad_avx2(const GradTile<T>& tile, int64_t begin, int64_t end) {
  grad_rows(tile, begin, end);
}
template <class T>
COVGRPO_AVX512 void grad_avx512(const GradTile<T>& tile, int64_t begin, int64_t end) {
  grad_rows(tile, begin, end);
}

template <class F>
F* by_isa(Isa isa, F* baseline, F* avx2, F* avx512) {
  return isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
}

}  // namespace covgrpo
