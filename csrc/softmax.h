// What is done to one logit, or to sixteen at a time: from the raw product to the logit, the running softmax, and the
// gradient. V is a vector (vectors.h), or a plain number. covgrpo_kernels/kernels/eager.py has the same formulas in
// PyTorch, and covgrpo_kernels/kernels/interface.py the same names.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "vectors.h"

namespace covgrpo {

// The next three are those of interface.py, which says why they have these values.
constexpr float NO_MAX = -1e30F;
constexpr float LOG_ZERO = -1e3F;
constexpr int64_t VOCAB_BLOCK = 1024;

// From a raw product to a logit: softcap(scale * (product + bias)) / temperature, softcap(x) being cap * tanh(x / cap).
// The bias is added before, and the temperature divided by after what is here.
template <class T>
struct LogitTransform {
  T scale;
  bool has_softcap;
  T softcap;

  LogitTransform(double scale_, std::optional<double> softcap_)
      : scale(static_cast<T>(scale_)),
        has_softcap(softcap_.has_value()),
        softcap(static_cast<T>(softcap_.value_or(1.0))) {}

  COVGRPO_INLINE bool is_identity() const { return !has_softcap && scale == 1; }

  // tanh(scale * raw / cap). The derivative of softcap is one minus its square.
  template <class V>
  COVGRPO_INLINE V tanh_of(V raw) const {
    return hyperbolic_tangent(raw * (scale / softcap));
  }

  template <class V>
  COVGRPO_INLINE V apply(V raw) const {
    return has_softcap ? tanh_of(raw) * softcap : raw * scale;
  }
};

// The softmax of the logits of a row that were seen so far. The maximum is kept out of both sums.
template <class V>
struct OnlineSoftmax {
  V maximum;      // m
  V sum;          // sum of exp(z - m) over the other logits z
  V entropy_sum;  // sum of exp(z - m) (m - z) over the other logits; zero without entropy

  // Adds the logits of b. The smaller of the two maxima joins the sum.
  COVGRPO_INLINE void merge(const OnlineSoftmax& b) {
    const V top = larger(maximum, b.maximum);
    const V gap = top - maximum, gap_b = top - b.maximum;
    const V w = exponential(-gap), w_b = exponential(-gap_b);
    const V lesser = smaller(w, w_b), lesser_gap = larger(gap, gap_b);
    entropy_sum = w * (entropy_sum + gap * sum) + w_b * (b.entropy_sum + gap_b * b.sum) + lesser * lesser_gap;
    sum = w * sum + w_b * b.sum + lesser;
    maximum = top;
  }
};

// The running softmax of R rows in memory.
template <class T>
struct OnlineSoftmaxRows {
  T *maximum, *sum, *entropy_sum;  // [R]
  T* target;                       // [R] logit of the target
};

// The sums of a block of logits whose maximum is known, made one vector after the other.
template <class V>
struct BlockSums {
  V sum{}, entropy_sum{};  // as in OnlineSoftmax
  V ties{};                // how many logits are equal to the maximum

  COVGRPO_INLINE void add(V z, V maximum, bool entropy) {
    const V zero{};
    const V d = z - maximum;
    const auto at_maximum = d == zero;
    const V e = exponential(d);
    sum += at_maximum ? zero : e;
    ties += at_maximum ? zero + 1 : zero;
    if (entropy) entropy_sum -= larger(zero + LOG_ZERO, d) * e;
  }
};

// The vocabulary ids of each row whose logit reaches the row's min_logits and its floor, in any order. A row that has
// no room for one more keeps the larger half, and its floor rises above all that go. Equal logits stay or go together,
// so that what is left in the end does not depend on the order.
template <class T>
struct Candidates {
  const T* min_logits;  // [R]; null where no candidates are wanted
  int32_t* found;       // [R] how many there are
  int32_t* vocab_ids;   // [R, room]
  T* logits;            // [R, room]
  T* floors;            // [R]
  int64_t room;         // at most MAX_ROOM

  static constexpr int64_t MAX_ROOM = 256;

  // Several threads may add to the same row.
  void add(int64_t row, int64_t vocab_id, T logit) const {
    const std::atomic_ref<T> floor(floors[row]);
    if (logit < floor.load(std::memory_order_relaxed)) return;
    const std::atomic_ref<int32_t> count(found[row]);
    int32_t n;
    while ((n = count.exchange(LOCKED, std::memory_order_acquire)) == LOCKED) {
    }
    if (n == room) n = drop_smaller_half(row);
    if (logit >= floor.load(std::memory_order_relaxed)) {
      vocab_ids[row * room + n] = static_cast<int32_t>(vocab_id);
      logits[row * room + n++] = logit;
    }
    count.store(n, std::memory_order_release);
  }

 private:
  static constexpr int32_t LOCKED = -1;  // in place of the count, while a thread changes the row

  // Returns how many are left of a row that is full.
  int32_t drop_smaller_half(int64_t row) const {
    T* z = logits + row * room;
    int32_t* ids = vocab_ids + row * room;
    T sorted[MAX_ROOM];  // no allocation, which may throw, while the row is locked
    std::copy(z, z + room, sorted);
    T* const next_largest = sorted + room / 2;
    std::nth_element(sorted, next_largest, sorted + room, std::greater<T>());
    const T floor = std::nextafter(*next_largest, std::numeric_limits<T>::infinity());
    int32_t n = 0;
    for (int64_t k = 0; k < room; ++k)
      if (z[k] > *next_largest) {  // not >= floor, which many equal infinities would pass
        ids[n] = ids[k];
        z[n++] = z[k];
      }
    std::atomic_ref<T>(floors[row]).store(floor, std::memory_order_relaxed);
    return n;
  }
};

// What the gradient of a row takes besides its logits: Coefficients of interface.py.
template <class V>
struct Coefficients {
  V maximum, log_sum;
  V at_target;              // dL/dlogit of the target
  V logprob_grad;           // g
  V entropy, entropy_grad;  // H and e; not read without has_entropy
  bool has_entropy;

  // dL/dlogit: g (1[v = y] - p) - e p (log p + H).
  template <class Mask>
  COVGRPO_INLINE V gradient(V z, Mask is_target) const {
    V log_p = (z - maximum) - log_sum;
    V dz;
    if (has_entropy) {
      log_p = larger(V{} + LOG_ZERO, log_p);
      dz = -exponential(log_p) * (logprob_grad + entropy_grad * (log_p + entropy));
    } else {
      dz = -logprob_grad * exponential(log_p);
    }
    return is_target ? at_target : dz;
  }

  COVGRPO_INLINE V probability(V z) const { return exponential((z - maximum) - log_sum); }
};

// The coefficients of R rows in memory.
template <class T>
struct CoefficientRows {
  const T *maximum, *log_sum, *at_target, *logprob_grad;  // [R]
  const T *entropy, *entropy_grad;                        // [R], or both null: the entropy has no gradient
};

}  // namespace covgrpo
