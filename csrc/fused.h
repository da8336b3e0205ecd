// Matrix products and softmax in one pass, for processors with AVX512-BF16: fused_forward does what a matrix product
// and online_softmax_ do, fused_backward what a matrix product, dlogits and two more products do. The logits are never
// stored: they exist one block of 12 KiB at a time.
//
// Logits are computed as W h^T. The rows of the first operand are those of the slice of lm_head, one for each
// vocabulary id, read where they lie. Its columns are tokens: LANES = 16 of them in a vector, PANEL = 64 (four vectors)
// in a panel. In this file `row` is a row of that slice, and `row + first` its vocabulary id.
//
// The vocabulary is divided twice: into vocab blocks of VOCAB_BLOCK ids, whose softmax is computed by one task and
// joins the running softmax in order, so that no bit depends on the number of threads; and these into the GEMM_ROWS
// rows whose products with a panel are computed at once.
#pragma once

#include "gemm.h"

#if COVGRPO_X86

#include "softmax.h"

namespace covgrpo {

// Eight times the STRIP rows that gemm.h multiplies together. GEMM_ROWS * PANEL floats are 12 KiB, less than half of
// the smallest first-level cache (32 KiB), so that products are still in it when the softmax reads them.
constexpr int GEMM_ROWS = 48;
static_assert(GEMM_ROWS % STRIP == 0);

// Panels of tokens that a task goes through with the same GEMM_ROWS rows. The rows come from memory for the first panel
// and from the second-level cache for the others (48 rows of 4096 bfloat16 are 384 KiB); more panels a task would leave
// too few tasks for many threads.
constexpr int64_t PANELS_PER_TASK = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Offsets in bytes of arrays that lie one behind the other, each at the start of a cache line.
struct Offsets {
  int64_t end = 0;

  int64_t operator()(int64_t bytes) {
    const int64_t begin = end;
    end += ceil_div(bytes, 64) * 64;
    return begin;
  }
};

// The hidden states of R tokens, a slice of lm_head with C vocabulary ids from `first` on, and what makes logits of
// their products.
template <class Format>
struct Slice {
  Matrix<Format> hidden;   // [R, D]
  Matrix<Format> weight;   // [C, D]
  const int64_t* targets;  // [R]
  int64_t first;
  LogitTransform<float> transform;
  const float* bias;         // [C] or null
  const float* temperature;  // [R] or null

  int64_t panels() const { return ceil_div(hidden.rows, PANEL); }
};

// The tokens of one vector of a panel: sixteen, or fewer at the end.
struct Lanes {
  int64_t first;
  int64_t count;  // not positive where the vector is past the end

  template <class Format>
  static Lanes of(const Slice<Format>& s, int64_t panel, int64_t vector) {
    const int64_t first = panel * PANEL + vector * LANES;
    return {first, smaller<int64_t>(LANES, s.hidden.rows - first)};
  }
  // The tokens' values of an array [R]. Lanes without a token are `padding`, and all lanes where the array is null.
  COVGRPO_AVX512BF16 F32 load(const float* values, float padding) const {
    const __m512 rest = _mm512_set1_ps(padding);
    return values ? reinterpret_cast<F32>(_mm512_mask_loadu_ps(rest, first_lanes(count), values + first))
                  : reinterpret_cast<F32>(rest);
  }
};

// The raw products of `rows` rows with a panel of packed hidden states: [rows][PANEL].
template <class Format>
void block_products(const Slice<Format>& s, const Rows<Format, GEMM_ROWS>& weight_rows, int64_t rows, int64_t panel,
                    const uint32_t* packed, float* products) {
  const int64_t tokens = smaller<int64_t>(PANEL, s.hidden.rows - panel * PANEL);
  const Output out{products, PANEL, ceil_div(tokens, LANES) * LANES, false};
  multiply<Format>(rows, weight_rows, s.hidden.columns, packed + panel * s.hidden.units() * PANEL, out);
}

// The logits of one row and sixteen tokens.
template <class Format>
COVGRPO_AVX512BF16 COVGRPO_INLINE F32 logits(const Slice<Format>& s, int64_t row, F32 raw, F32 temperature) {
  if (s.bias) raw += broadcast(s.bias[row]);
  if (!s.transform.is_identity()) raw = s.transform.apply(raw);
  return s.temperature ? raw / temperature : raw;
}

// --------------------------------------------------------------------------------------------------- forward

// What the forward updates.
struct ForwardOutput {
  OnlineSoftmaxRows<float> running;  // of R tokens
  bool entropy;
  Candidates<float> candidates;
};

COVGRPO_AVX512BF16 COVGRPO_INLINE __mmask16 reaches(F32 z, F32 min_logits) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(z), reinterpret_cast<__m512>(min_logits), _CMP_GE_OQ);
}

// Of a block of logits of sixteen tokens, whose first row has the vocabulary id `first_id`.
COVGRPO_AVX512BF16 __attribute__((noinline)) inline void add_candidates(int64_t first_id, int64_t rows,
                                                                        const Lanes& lanes, const float* z,
                                                                        F32 min_logits,
                                                                        const Candidates<float>& candidates) {
  for (int64_t r = 0; r < rows; ++r)
    for (unsigned here = reaches(load(z + r * PANEL), min_logits); here; here &= here - 1) {
      const int lane = __builtin_ctz(here);
      candidates.add(lanes.first + lane, first_id + r, z[r * PANEL + lane]);
    }
}

// Adds `rows` rows from `row` on to the running softmax of sixteen tokens; their products become logits. Not inlined,
// so that the same instructions make the bits of a token wherever in a panel it is.
template <class Format>
COVGRPO_AVX512BF16 __attribute__((noinline)) void online_softmax_block(const Slice<Format>& s, int64_t row,
                                                                       int64_t rows, const Lanes& lanes,
                                                                       float* products, const ForwardOutput& out,
                                                                       OnlineSoftmax<F32>& running) {
  const F32 temperature = lanes.load(s.temperature, 1.0F);
  F32 top = broadcast(NO_MAX);
  for (int64_t r = 0; r < rows; ++r) {
    const F32 z = logits(s, row + r, load(products + r * PANEL), temperature);
    store(products + r * PANEL, z);
    top = larger(z, top);
  }
  if (out.candidates.min_logits) {
    // NaN, which nothing reaches: a bias of infinity is in the lanes without a token too.
    const F32 min_logits = lanes.load(out.candidates.min_logits, NAN);
    if (reaches(top, min_logits)) add_candidates(s.first + row, rows, lanes, products, min_logits, out.candidates);
  }
  BlockSums<F32> sums;
  for (int64_t r = 0; r < rows; ++r) sums.add(load(products + r * PANEL), top, out.entropy);
  // One of the ties is the maximum, which is not in the sum; a block of -inf has none.
  running.merge({top, sums.sum + larger(sums.ties - 1.0F, F32{}), sums.entropy_sum});
}

// The softmax of one vocab block of the slice, by itself, for PANELS_PER_TASK panels from `panel` on. `softmaxes` has
// one for each vector of tokens.
template <class Format>
COVGRPO_AVX512BF16 void softmax_of_vocab_block(const Slice<Format>& s, int64_t vocab_block, int64_t panel,
                                               const uint32_t* packed, const ForwardOutput& out,
                                               OnlineSoftmax<F32>* softmaxes) {
  alignas(64) float products[GEMM_ROWS * PANEL];
  Rows<Format, GEMM_ROWS> weight_rows(s.weight);
  const int64_t end = smaller(s.weight.rows, (vocab_block + 1) * VOCAB_BLOCK);
  const int64_t last_panel = smaller(s.panels(), panel + PANELS_PER_TASK);
  const int64_t vectors = ceil_div(s.hidden.rows, LANES);
  for (int64_t v = panel * 4; v < smaller(vectors, last_panel * 4); ++v)
    softmaxes[v] = {broadcast(NO_MAX), F32{}, F32{}};
  for (int64_t row = vocab_block * VOCAB_BLOCK; row < end; row += GEMM_ROWS) {
    const int64_t rows = smaller<int64_t>(GEMM_ROWS, end - row);
    weight_rows.take(row);
    for (int64_t p = panel; p < last_panel; ++p) {
      block_products(s, weight_rows, rows, p, packed, products);
      for (int64_t v = p * 4; v < smaller(vectors, p * 4 + 4); ++v)
        online_softmax_block(s, row, rows, Lanes::of(s, p, v % 4), products + v % 4 * LANES, out, softmaxes[v]);
      for (int64_t t = p * PANEL; t < smaller(s.hidden.rows, (p + 1) * PANEL); ++t) {
        const int64_t r = s.targets[t] - s.first - row;
        if (r >= 0 && r < rows) out.running.target[t] = products[r * PANEL + t % PANEL];
      }
    }
  }
}

// Adds the softmaxes of `count` vocab blocks, `stride` apart, to the running one of sixteen tokens, in order.
COVGRPO_AVX512BF16 inline void merge_vocab_blocks(const Lanes& lanes, const OnlineSoftmax<F32>* softmaxes,
                                                  int64_t count, int64_t stride, const OnlineSoftmaxRows<float>& out) {
  OnlineSoftmax<F32> running{lanes.load(out.maximum, NO_MAX), lanes.load(out.sum, 0), lanes.load(out.entropy_sum, 0)};
  for (int64_t i = 0; i < count; ++i) running.merge(softmaxes[i * stride]);
  const __mmask16 mask = first_lanes(lanes.count);
  _mm512_mask_storeu_ps(out.maximum + lanes.first, mask, reinterpret_cast<__m512>(running.maximum));
  _mm512_mask_storeu_ps(out.sum + lanes.first, mask, reinterpret_cast<__m512>(running.sum));
  _mm512_mask_storeu_ps(out.entropy_sum + lanes.first, mask, reinterpret_cast<__m512>(running.entropy_sum));
}

// Where the arrays of the workspace begin, in bytes.
struct ForwardWorkspace {
  int64_t packed;     // hidden states
  int64_t softmaxes;  // [vocab blocks][vectors of tokens]
  int64_t bytes;

  ForwardWorkspace(int64_t tokens, int64_t vocab, int64_t units) {
    Offsets next;
    packed = next(ceil_div(tokens, PANEL) * units * PANEL * sizeof(uint32_t));
    softmaxes = next(ceil_div(vocab, VOCAB_BLOCK) * ceil_div(tokens, LANES) * sizeof(OnlineSoftmax<F32>));
    bytes = next(0);
  }
};

// parallel(tasks, f) calls f(i) for every task i. `keep_packed`: the workspace was used by a call with the same hidden
// states.
template <class Format, class Parallel>
void fused_forward(const Slice<Format>& s, const ForwardOutput& out, const Parallel& parallel, char* workspace,
                   bool keep_packed) {
  const int64_t panels = s.panels(), vectors = ceil_div(s.hidden.rows, LANES);
  const int64_t vocab_blocks = ceil_div(s.weight.rows, VOCAB_BLOCK), groups = ceil_div(panels, PANELS_PER_TASK);
  const ForwardWorkspace at(s.hidden.rows, s.weight.rows, s.hidden.units());
  auto* packed = reinterpret_cast<uint32_t*>(workspace + at.packed);
  auto* softmaxes = reinterpret_cast<OnlineSoftmax<F32>*>(workspace + at.softmaxes);
  if (!keep_packed) parallel(panels, [&](int64_t p) { pack_rows(s.hidden, p, packed); });
  parallel(vocab_blocks * groups, [&](int64_t i) {
    const int64_t vocab_block = i / groups, panel = i % groups * PANELS_PER_TASK;
    softmax_of_vocab_block(s, vocab_block, panel, packed, out, softmaxes + vocab_block * vectors);
  });
  parallel(vectors, [&](int64_t v) {
    merge_vocab_blocks(Lanes::of(s, v / 4, v % 4), softmaxes + v, vocab_blocks, vectors, out.running);
  });
}

// -------------------------------------------------------------------------------------------------- backward

// How far apart rows of `count` elements are kept: an odd number of cache lines. Rows a power of two apart would share
// a few sets of the cache and drive each other out.
inline int64_t padded_stride(int64_t count, int64_t bytes) { return (ceil_div(count * bytes, 64) | 1) * 64 / bytes; }

// The first sixteen tokens, one vector, may have no logits of their own. Lane k then has in place of dL/dproducts the
// tail of token 16 + k, which is lane k of the second vector: scale * p * softcap' of the vocabulary ids whose logit is
// below min_logits[k] and that are not the target of token 16 + k.
struct Tails {
  const float* min_logits;   // [LANES]; null where the first tokens are like all others
  const float* bias_counts;  // [LANES] how often a lane counts in the sum of the bias
  float scale;
};

// What the backward takes besides the slice, and where it writes. Null: not wanted.
template <class Format>
struct BackwardArguments {
  CoefficientRows<float> coefficients;  // of R tokens
  Tails tails;
  // dL/dhidden, the sum over the vocabulary ids of this slice, written or added to what is there.
  float* hidden;  // [R, D]
  bool add_to_hidden;
  // dL/dweight. Each call has some tokens of a slice. All but the last write their sum, or add it to what is there, in
  // weight_sum; the last adds its own, and rounds the scaled sum into weight.
  float* weight_sum;  // [C, D], null where there is one call
  bool add_to_weight;
  typename Format::Element* weight;  // [C, D], null in all calls but the last
  float weight_scale;
  const float* addend;         // [n, D] rows that are added to dL/dweight before it is scaled
  const int32_t* addend_rows;  // [C] which of them belongs to a vocabulary id, or -1; null where there are none
  float* bias;                 // [C] dL/dbias, added to
};

// dL/dproducts of the slice, rounded to the format of its operands: once as the rows of dZ^T and once as those of dZ.
template <class Format>
struct ProductGradients {
  typename Format::Element* by_vocab_id;  // [C, R rounded up to LANES], rows `row_stride` apart; null: not wanted
  uint32_t* by_token;                     // [R, units of C], rows `unit_stride` apart; null: not wanted
  float* bias;                            // [vectors of tokens, C] sums over the tokens of a vector; null: not wanted
  int64_t row_stride, unit_stride;
};

// dL/dproducts of `rows` rows from `row` on and the tokens of one vector of a panel. `products` are those of the panel.
template <class Format>
COVGRPO_AVX512BF16 __attribute__((noinline)) void dlogits_block(const Slice<Format>& s, int64_t row, int64_t rows,
                                                                int64_t panel, int64_t vector, const float* products,
                                                                const BackwardArguments<Format>& g,
                                                                const ProductGradients<Format>& out) {
  const Lanes lanes = Lanes::of(s, panel, vector);
  const bool is_tail = g.tails.min_logits && lanes.first == 0;
  const int64_t source = is_tail ? 1 : vector;  // the vector whose logits are read
  const Lanes tokens = Lanes::of(s, panel, source);
  products += source * LANES;

  const F32 temperature = tokens.load(s.temperature, 1.0F);
  // In lanes without a token the maximum is infinite: probability and gradient are zero, whatever the bias, or NaN
  // where an infinite weight meets their zeros: the sum over tokens leaves these lanes out.
  const Coefficients<F32> coefficients{
      tokens.load(g.coefficients.maximum, INFINITY), tokens.load(g.coefficients.log_sum, 0),
      tokens.load(g.coefficients.at_target, 0),      tokens.load(g.coefficients.logprob_grad, 0),
      tokens.load(g.coefficients.entropy, 0),        tokens.load(g.coefficients.entropy_grad, 0),
      g.coefficients.entropy_grad != nullptr};
  const F32 slope = is_tail ? broadcast(g.tails.scale) : s.transform.scale / temperature;
  const F32 min_logits = lanes.load(is_tail ? g.tails.min_logits : nullptr, 0);
  const F32 bias_counts = lanes.load(is_tail ? g.tails.bias_counts : nullptr, 1);
  // The row of the target of each token; -1 where it is not in this block.
  alignas(64) int32_t target_rows[LANES];
  for (int i = 0; i < LANES; ++i) {
    const int64_t r = i < tokens.count ? s.targets[tokens.first + i] - s.first - row : -1;
    target_rows[i] = r >= 0 && r < rows ? static_cast<int32_t>(r) : -1;
  }
  const __m512i target_row = _mm512_load_si512(target_rows);

  const auto gradient = [&](int64_t r) COVGRPO_AVX512BF16 -> F32 {
    if (r >= rows) return F32{};
    const F32 raw = load(products + r * PANEL);
    const I32 is_target = reinterpret_cast<I32>(
        _mm512_maskz_set1_epi32(_mm512_cmpeq_epi32_mask(target_row, _mm512_set1_epi32(static_cast<int>(r))), -1));
    const F32 z = logits(s, row + r, raw, temperature);
    F32 dz;
    if (is_tail)
      dz = is_target || !(z < min_logits) ? F32{} : coefficients.probability(z);
    else
      dz = coefficients.gradient(z, is_target);
    if (s.transform.has_softcap) {
      const F32 t = s.transform.tanh_of(s.bias ? raw + broadcast(s.bias[row + r]) : raw);
      dz *= 1.0F - t * t;
    }
    dz *= slope;
    if (out.bias) {
      const F32 counted = is_tail ? dz * bias_counts : dz;
      out.bias[lanes.first / LANES * s.weight.rows + row + r] = sum_of<float>(
          reinterpret_cast<F32>(_mm512_maskz_mov_ps(first_lanes(lanes.count), reinterpret_cast<__m512>(counted))));
    }
    return dz;
  };
  for (int64_t r = 0; r < rows; r += LANES * Format::PER_UNIT) {
    __m512i units[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      const int64_t id = r + i * Format::PER_UNIT;
      auto* place = out.by_vocab_id + (row + id) * out.row_stride + lanes.first;
      if constexpr (Format::PER_UNIT == 2) {
        const auto low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(gradient(id))));
        const auto high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(gradient(id + 1))));
        units[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        if (out.by_vocab_id && id < rows) _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), low);
        if (out.by_vocab_id && id + 1 < rows)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + out.row_stride), high);
      } else {
        units[i] = reinterpret_cast<__m512i>(gradient(id));
        if (out.by_vocab_id && id < rows) _mm512_storeu_si512(place, units[i]);
      }
    }
    if (!out.by_token) continue;
    transpose(units);
    const int64_t unit = (row + r) / Format::PER_UNIT;
    const __mmask16 mask = first_lanes(ceil_div(rows - r, Format::PER_UNIT));
    for (int64_t i = 0; i < lanes.count; ++i)
      _mm512_mask_storeu_epi32(out.by_token + (lanes.first + i) * out.unit_stride + unit, mask, units[i]);
  }
}

template <class Format>
COVGRPO_AVX512BF16 void dlogits_panel(const Slice<Format>& s, int64_t row, int64_t panel, const uint32_t* packed,
                                      const Rows<Format, GEMM_ROWS>& weight_rows, const BackwardArguments<Format>& g,
                                      const ProductGradients<Format>& out) {
  alignas(64) float products[GEMM_ROWS * PANEL];
  const int64_t rows = smaller<int64_t>(GEMM_ROWS, s.weight.rows - row);
  block_products(s, weight_rows, rows, panel, packed, products);
  for (int64_t v = 0; v < 4; ++v)
    if (Lanes::of(s, panel, v).count > 0) dlogits_block(s, row, rows, panel, v, products, g, out);
}

// Task `task` of the product A * B with `rows` rows of A and `columns` columns of B: GEMM_ROWS rows times
// PANELS_PER_TASK panels, so that the rows come from a near cache for all panels but the first. Each row of sums goes
// to write(sums, row, column, count), which takes `count` of them for the columns from `column` on.
template <class Format, class Row, class Write>
void multiply_panels(int64_t task, int64_t rows, const Row& row_of, int64_t depth, int64_t columns, const uint32_t* b,
                     const Write& write) {
  alignas(64) float block[GEMM_ROWS * PANEL];
  const int64_t panels = ceil_div(columns, PANEL);
  const int64_t units = ceil_div(depth, Format::PER_UNIT);
  const int64_t blocks = ceil_div(rows, GEMM_ROWS);
  const int64_t row = task % blocks * GEMM_ROWS, first = task / blocks * PANELS_PER_TASK;
  const int64_t count = smaller<int64_t>(GEMM_ROWS, rows - row);
  const auto in_block = [&](int64_t r) { return row_of(row + r); };
  for (int64_t p = first; p < smaller(panels, first + PANELS_PER_TASK); ++p) {
    const int64_t width = smaller<int64_t>(PANEL, columns - p * PANEL);
    multiply<Format>(count, in_block, depth, b + p * units * PANEL,
                     {block, PANEL, ceil_div(width, LANES) * LANES, false});
    for (int64_t r = 0; r < count; ++r) write(block + r * PANEL, row + r, p * PANEL, width);
  }
}

// Writes `count` sums, or adds them to what is there.
COVGRPO_AVX512BF16 inline void write_sums(const float* sums, float* out, int64_t count, bool add) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = first_lanes(count - i);
    __m512 v = _mm512_loadu_ps(sums + i);
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, out + i));
    _mm512_mask_storeu_ps(out + i, mask, v);
  }
}

// Writes dL/dweight from `place` on, scaled and rounded: the last `count` sums, the earlier ones, and the addend.
template <class Format>
COVGRPO_AVX512BF16 void write_weight(const float* sums, const BackwardArguments<Format>& g, int64_t place,
                                     const float* addend, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = first_lanes(count - i);
    __m512 v = _mm512_loadu_ps(sums + i);
    if (g.add_to_weight) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, g.weight_sum + place + i));
    if (addend) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, addend + i));
    Format::store_rounded(g.weight + place + i, mask, _mm512_mul_ps(v, _mm512_set1_ps(g.weight_scale)));
  }
}

// Where the arrays of the workspace begin, in bytes. Those that depend on the hidden states alone come first, so that
// they are in the same place for the next slice of lm_head, whatever its size.
struct BackwardWorkspace {
  int64_t row_stride, unit_stride;      // of ProductGradients
  int64_t packed, packed_columns;       // hidden states, the depth of the product being that of h and the tokens
  int64_t by_vocab_id, by_token, bias;  // ProductGradients
  int64_t packed_weight;                // the slice of lm_head, the depth being vocabulary ids
  int64_t bytes;

  // `per_unit` elements are a unit of 4 bytes.
  BackwardWorkspace(int64_t tokens, int64_t vocab, int64_t depth, int64_t per_unit, bool needs_hidden,
                    bool needs_weight, bool needs_bias) {
    const int64_t vectors = ceil_div(tokens, LANES), panel = PANEL * sizeof(uint32_t);
    const int64_t depth_panels = ceil_div(depth, PANEL), element = 4 / per_unit;
    row_stride = padded_stride(vectors * LANES, element);
    unit_stride = padded_stride(ceil_div(vocab, per_unit), 4);
    Offsets next;
    packed = next(ceil_div(tokens, PANEL) * ceil_div(depth, per_unit) * panel);
    packed_columns = next(needs_weight ? depth_panels * ceil_div(tokens, per_unit) * panel : 0);
    by_vocab_id = next(needs_weight ? vocab * row_stride * element : 0);
    by_token = next(needs_hidden ? tokens * unit_stride * 4 : 0);
    bias = next(needs_bias ? vectors * vocab * 4 : 0);
    packed_weight = next(needs_hidden ? depth_panels * ceil_div(vocab, per_unit) * panel : 0);
    bytes = next(0);
  }
};

// Computes the products again, dL/dproducts of them, and the products of that with weight and hidden. `keep_packed`:
// the workspace was used by a call with the same hidden states and the same gradients wanted.
template <class Format, class Parallel>
void fused_backward(const Slice<Format>& s, const BackwardArguments<Format>& g, const Parallel& parallel,
                    char* workspace, bool keep_packed) {
  using Element = typename Format::Element;
  const int64_t tokens = s.hidden.rows, vocab = s.weight.rows, depth = s.hidden.columns;
  const int64_t panels = s.panels(), blocks = ceil_div(vocab, GEMM_ROWS), groups = ceil_div(panels, PANELS_PER_TASK);
  const int64_t token_units = ceil_div(tokens, Format::PER_UNIT), vocab_units = ceil_div(vocab, Format::PER_UNIT);
  const int64_t depth_groups = ceil_div(ceil_div(depth, PANEL), PANELS_PER_TASK);

  const bool needs_weight = g.weight || g.weight_sum;
  const BackwardWorkspace at(tokens, vocab, depth, Format::PER_UNIT, g.hidden, needs_weight, g.bias);
  const auto units_at = [&](int64_t offset) { return reinterpret_cast<uint32_t*>(workspace + offset); };
  uint32_t *packed = units_at(at.packed), *packed_columns = units_at(at.packed_columns);
  uint32_t* packed_weight = units_at(at.packed_weight);
  const ProductGradients<Format> dz{needs_weight ? reinterpret_cast<Element*>(workspace + at.by_vocab_id) : nullptr,
                                    g.hidden ? units_at(at.by_token) : nullptr,
                                    g.bias ? reinterpret_cast<float*>(workspace + at.bias) : nullptr, at.row_stride,
                                    at.unit_stride};
  if (!keep_packed) {
    parallel(panels, [&](int64_t p) { pack_rows(s.hidden, p, packed); });
    if (needs_weight) parallel(token_units, [&](int64_t u) { pack_columns(s.hidden, u, token_units, packed_columns); });
  }
  parallel(blocks * groups, [&](int64_t i) {
    Rows<Format, GEMM_ROWS> weight_rows(s.weight);
    const int64_t row = i / groups * GEMM_ROWS, first = i % groups * PANELS_PER_TASK;
    weight_rows.take(row);
    for (int64_t p = first; p < smaller(panels, first + PANELS_PER_TASK); ++p)
      dlogits_panel(s, row, p, packed, weight_rows, g, dz);
    if (g.hidden && first == 0)  // these rows are packed here because they are in a near cache now
      for (int64_t u = row / Format::PER_UNIT; u < smaller(vocab_units, (row + GEMM_ROWS) / Format::PER_UNIT); ++u)
        pack_columns(s.weight, u, vocab_units, packed_weight);
  });
  if (g.bias)
    for (int64_t v = 0; v < ceil_div(tokens, LANES); ++v)
      for (int64_t c = 0; c < vocab; ++c) g.bias[c] += dz.bias[v * vocab + c];

  const auto multiply_weight = [&](int64_t task) {  // dL/dweight = dZ^T h
    const auto row_of = [&](int64_t r) { return dz.by_vocab_id + r * dz.row_stride; };
    const auto write = [&](const float* sums, int64_t row, int64_t column, int64_t count) {
      const int64_t place = row * depth + column;
      if (!g.weight) return write_sums(sums, g.weight_sum + place, count, g.add_to_weight);
      const int64_t addend_row = g.addend_rows ? g.addend_rows[row] : -1;
      write_weight(sums, g, place, addend_row < 0 ? nullptr : g.addend + addend_row * depth + column, count);
    };
    multiply_panels<Format>(task, vocab, row_of, tokens, depth, packed_columns, write);
  };
  const auto multiply_hidden = [&](int64_t task) {  // dL/dhidden = dZ W
    const auto row_of = [&](int64_t r) { return dz.by_token + r * dz.unit_stride; };
    const auto write = [&](const float* sums, int64_t token, int64_t column, int64_t count) {
      write_sums(sums, g.hidden + token * depth + column, count, g.add_to_hidden);
    };
    multiply_panels<Format>(task, tokens, row_of, vocab, depth, packed_weight, write);
  };
  const int64_t weight_tasks = needs_weight ? blocks * depth_groups : 0;
  const int64_t hidden_tasks = g.hidden ? ceil_div(tokens, GEMM_ROWS) * depth_groups : 0;
  parallel(weight_tasks + hidden_tasks,
           [&](int64_t i) { i < weight_tasks ? multiply_weight(i) : multiply_hidden(i - weight_tasks); });
}

}  // namespace covgrpo

#endif
