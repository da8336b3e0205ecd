// What is done to one logit, or to sixteen: from the raw product to the logit, the running statistics of a softmax, the
// gradient. V is a vector (vectors.h), or a plain number where statistics are merged. The same formulas as
// covgrpo_kernels/tiles/eager.py.
#pragma once

#include <atomic>
#include <optional>

#include "vectors.h"

namespace covgrpo {

// Stands for the maximum of no entry, and for the logarithm of zero: covgrpo_kernels/tiles/interface.py says why.
constexpr float NO_MAX = -1e30F;
constexpr float LOG_ZERO = -1e3F;

// softcap(scale * (product + bias)) / temperature.
template <class T>
struct Head {
  T scale;
  bool capped;
  T softcap;

  Head(double scale_, std::optional<double> softcap_)
      : scale(static_cast<T>(scale_)), capped(softcap_.has_value()), softcap(static_cast<T>(softcap_.value_or(1.0))) {}

  COVGRPO_INLINE bool plain() const { return !capped && scale == 1; }

  // tanh of what softcap caps.
  template <class V>
  COVGRPO_INLINE V per_cap(V raw) const {
    return hyperbolic_tangent(raw * (scale / softcap));
  }

  template <class V>
  COVGRPO_INLINE V before_temperature(V raw) const {
    return capped ? per_cap(raw) * softcap : raw * scale;
  }
};

// Of the entries of a row so far; the maximum stays out of the sums.
template <class V>
struct Statistics {
  V maximum;  // m
  V total;    // sum of exp(z - m) over the other entries
  V moment;   // sum of exp(z - m) (m - z) over the other entries; zero without entropy

  // The smaller of the two maxima joins the sum of the others.
  COVGRPO_INLINE void merge(const Statistics& b) {
    const V top = larger(maximum, b.maximum);
    const V gap = top - maximum, gap_b = top - b.maximum;
    const V w = exponential(-gap), w_b = exponential(-gap_b);
    const V lesser = smaller(w, w_b), lesser_gap = larger(gap, gap_b);
    moment = w * (moment + gap * total) + w_b * (b.moment + gap_b * b.total) + lesser * lesser_gap;
    total = w * total + w_b * b.total + lesser;
    maximum = top;
  }
};

// Entries of each row whose logit reaches the row's threshold, in no order. Where there are more than `capacity`, the
// rest is counted but not kept.
template <class T>
struct Candidates {
  const T* threshold;  // [R]; null where none are wanted
  int32_t* count;      // [R]
  int32_t* entries;    // [R, capacity]
  T* logits;           // [R, capacity]
  int64_t capacity;

  // From any thread.
  void add(int64_t row, int64_t entry, T logit) const {
    const int64_t place = std::atomic_ref<int32_t>(count[row]).fetch_add(1, std::memory_order_relaxed);
    if (place >= capacity) return;
    entries[row * capacity + place] = static_cast<int32_t>(entry);
    logits[row * capacity + place] = logit;
  }
};

// Entries of a block one vector after the other, once the block's maximum is known.
template <class V>
struct BlockSums {
  V total{}, moment{}, ties{};

  COVGRPO_INLINE void add(V z, V maximum, bool entropy) {
    const V zero{};
    const V d = z - maximum;
    const auto at_maximum = d == zero;
    const V e = exponential(d);
    total += at_maximum ? zero : e;
    ties += at_maximum ? zero + 1 : zero;
    if (entropy) moment -= larger(zero + LOG_ZERO, d) * e;
  }
};

// Per row (or, for the fused operations, per lane): what the gradient takes besides the logits.
template <class V>
struct Coefficients {
  V maximum, log_total;
  V at_target;  // dL/dlogit of the target itself
  V logprob_grad;
  V entropy, entropy_grad;
  bool with_entropy;

  // dL/dlogit: g (1[v = y] - p) - e p (log p + H).
  template <class Mask>
  COVGRPO_INLINE V gradient(V z, Mask at_target_here) const {
    V log_p = (z - maximum) - log_total;
    V dz;
    if (with_entropy) {
      log_p = larger(V{} + LOG_ZERO, log_p);
      dz = -exponential(log_p) * (logprob_grad + entropy_grad * (log_p + entropy));
    } else {
      dz = -logprob_grad * exponential(log_p);
    }
    return at_target_here ? at_target : dz;
  }
};

}  // namespace covgrpo
