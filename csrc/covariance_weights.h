// Gaussian covariance weights of every scope (arXiv 2605.11538): covariance_weights of covgrpo_kernels/covariance.py,
// which has the formulas. Means are taken first and deviations from them summed after, both in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace covgrpo {

// A partition of N tokens: Segments of covgrpo_kernels/segments.py.
struct Segments {
  const int64_t* segment;  // [N] the segment of each token
  const int64_t* offsets;  // [bound + 1] where each segment begins in the order, and the end
  const int64_t* order;    // [N] the tokens, segment after segment; null where they are in that order already
  int64_t bound;           // segments there may be; some may be empty

  int64_t token(int64_t i) const { return order ? order[i] : i; }
};

template <class T>
struct Tokens {
  const T *logprobs, *advantages;  // [N], zero where masked
  const bool* valid;               // [N]
};

// The number of valid tokens of sequence s, and the mean of their log-probs.
template <class T>
void sequence_mean(const Tokens<T>& tokens, const Segments& sequences, int64_t s, double* length, double* mean) {
  double n = 0, sum = 0;
  for (int64_t i = sequences.offsets[s]; i < sequences.offsets[s + 1]; ++i) {
    const int64_t t = sequences.token(i);
    n += tokens.valid[t];
    sum += static_cast<double>(tokens.logprobs[t]);
  }
  length[s] = n;
  mean[s] = sum / std::fmax(n, 1.0);
}

struct Weighting {
  const int64_t* sequence;  // [N] the sequence of each token; null where the next two are
  const double* lengths;    // of the sequences: the advantage's mean is over responses; null: over tokens
  const double* means;      // of the sequences: log-probs are centred by these; null: by the mean of the scope
  bool numel;               // weights add up to the number of all tokens, masked ones included; else of valid ones
  double bandwidth_eps;     // added to the standard deviation
};

// CovarianceStats of covariance.py.
struct CovarianceStats {
  double *weights, *covariance, *deviation;  // [N]
  double* std;                               // [bound]
};

// The weights of one scope. A NaN among its tokens reaches all weights of the scope, and of no other.
template <class T>
void weigh_scope(const Tokens<T>& tokens, const Segments& scopes, const Weighting& how, int64_t scope,
                 const CovarianceStats& out) {
  const int64_t begin = scopes.offsets[scope], end = scopes.offsets[scope + 1];
  double n = 0, shares = 0, sum_x = 0, sum_a = 0, largest_x = 0, largest_a = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = scopes.token(i);
    if (!tokens.valid[t]) continue;
    const double x = tokens.logprobs[t], a = tokens.advantages[t];
    // 1 / length per token makes every response count once.
    const double share = how.lengths ? 1.0 / how.lengths[how.sequence[t]] : 1.0;
    n += 1;
    shares += share;
    sum_x += x;
    sum_a += a * share;
    largest_x = std::fmax(largest_x, std::fabs(x));
    largest_a = std::fmax(largest_a, std::fabs(a));
  }
  const double mean_x = sum_x / std::fmax(n, 1.0);
  const double mean_a = how.lengths ? sum_a / (shares > 0 ? shares : 1.0) : sum_a / std::fmax(n, 1.0);

  double sum_c = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = scopes.token(i);
    double da = 0, c = 0;
    if (tokens.valid[t]) {
      da = static_cast<double>(tokens.advantages[t]) - mean_a;
      c = (static_cast<double>(tokens.logprobs[t]) - (how.means ? how.means[how.sequence[t]] : mean_x)) * da;
    }
    out.deviation[t] = da;
    out.covariance[t] = c;
    sum_c += c;
  }
  const double mean_c = sum_c / std::fmax(n, 1.0);

  double squares = 0, least = std::numeric_limits<double>::infinity();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = scopes.token(i);
    if (!tokens.valid[t]) continue;
    const double c = out.covariance[t];
    squares += (c - mean_c) * (c - mean_c);
    least = std::fmin(least, c * c);
  }
  const double variance = squares / std::fmax(n, 1.0);
  // A variance that rounding alone could have made is zero: two tokens have equal c in exact arithmetic, and so have
  // all tokens where x or A is constant. Rounding makes c differ by at most about 8 eps max|x| max|A|. A NaN is not
  // zero.
  const double noise = 8 * static_cast<double>(std::numeric_limits<T>::epsilon()) * largest_x * largest_a;
  const double sigma = variance <= noise * noise ? 0.0 : std::sqrt(variance);
  out.std[scope] = sigma;
  const double bandwidth = sigma + how.bandwidth_eps;
  // Without variance every exponent is zero and every weight is one.
  const double factor = sigma == 0 ? 0.0 : 0.5 / (bandwidth * bandwidth);

  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = scopes.token(i);
    const double c = out.covariance[t];
    const double kernel = tokens.valid[t] ? std::exp((least - c * c) * factor) : 0.0;
    out.weights[t] = kernel;
    total += kernel;
  }
  const double goal = how.numel ? static_cast<double>(end - begin) : n;
  const double normaliser = goal / (n > 0 ? total : 1.0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = scopes.token(i);
    if (tokens.valid[t]) out.weights[t] *= normaliser;
  }
}

}  // namespace covgrpo
