// Product and softmax in one pass: the operations that take the place of a matrix product and of fold or grad, for
// processors with AVX512-BF16. Logits live in registers and in a block of 12 KiB.
//
// Logits are computed as W h^T: vocabulary entries are the rows of A, read where the head lies, tokens are the lanes.
#pragma once

#include "gemm.h"

#if COVGRPO_X86

#include "softmax.h"

namespace covgrpo {

constexpr int BLOCK = 48;              // vocabulary entries whose logits exist at the same time, for PANEL tokens
constexpr int64_t SEGMENT = 1024;      // entries folded in order before they join a row's statistics: BLOCK of
                                       // interface.py. Bits don't depend on threads, since a segment is not divided.
constexpr int64_t PANELS_AT_ONCE = 4;  // panels of tokens that a task goes through with each block of the head

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Offsets of one array after the other, each at a cache line.
struct Offsets {
  int64_t end = 0;

  int64_t operator()(int64_t bytes) {
    const int64_t begin = end;
    end += ceil_div(bytes, 64) * 64;
    return begin;
  }
};

// Hidden states of R tokens and a slice of the head, C vocabulary entries from `first` on.
template <class Format>
struct Slice {
  Matrix<Format> hidden;   // [R, D]
  Matrix<Format> weight;   // [C, D]
  const int64_t* targets;  // [R]
  int64_t first;
  Head<float> head;
  const float* bias;         // [C] or null
  const float* temperature;  // [R] or null

  int64_t panels() const { return ceil_div(hidden.rows, PANEL); }
};

// Sixteen tokens of a panel, or fewer in the last one.
struct Lanes {
  int64_t first;
  int64_t count;

  template <class Format>
  static Lanes of(const Slice<Format>& s, int64_t panel, int64_t vector) {
    const int64_t first = panel * PANEL + vector * LANES;
    return {first, smaller<int64_t>(LANES, s.hidden.rows - first)};
  }
  // Their numbers, and `other` where there is no token.
  COVGRPO_AVX512BF16 F32 load(const float* values, float other) const {
    const __m512 rest = _mm512_set1_ps(other);
    return values ? reinterpret_cast<F32>(_mm512_mask_loadu_ps(rest, first_lanes(count), values + first))
                  : reinterpret_cast<F32>(rest);
  }
};

// The raw products of a block with a panel of packed hidden states: [rows][PANEL].
template <class Format>
void block_products(const Slice<Format>& s, const Rows<Format, BLOCK>& entries, int64_t rows, int64_t panel,
                    const uint32_t* packed, float* products) {
  const int64_t tokens = smaller<int64_t>(PANEL, s.hidden.rows - panel * PANEL);
  const Output out{products, PANEL, ceil_div(tokens, LANES) * LANES, false};
  multiply<Format>(rows, entries, s.hidden.columns, packed + panel * s.hidden.units() * PANEL, out);
}

// One vector of logits of a block: softcap(scale * (product + bias)) / temperature.
template <class Format>
COVGRPO_AVX512BF16 COVGRPO_INLINE F32 logits(const Slice<Format>& s, int64_t row, F32 raw, F32 temperature) {
  if (s.bias) raw += broadcast(s.bias[row]);
  if (!s.head.plain()) raw = s.head.before_temperature(raw);
  return s.temperature ? raw / temperature : raw;
}

// --------------------------------------------------------------------------------------------------- forward

// Statistics of the rows so far, updated.
struct RunningRows {
  float *maximum, *total, *moment, *target;  // [R]
  bool entropy;
  Candidates<float> candidates;
};

COVGRPO_AVX512BF16 COVGRPO_INLINE __mmask16 reaches(F32 z, F32 threshold) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(z), reinterpret_cast<__m512>(threshold), _CMP_GE_OQ);
}

// Of a block of logits of 16 tokens, `entry` the first.
COVGRPO_AVX512BF16 __attribute__((noinline)) inline void add_candidates(int64_t entry, int64_t rows, const Lanes& lanes,
                                                                        const float* z, F32 threshold,
                                                                        const Candidates<float>& candidates) {
  for (int64_t r = 0; r < rows; ++r)
    for (unsigned here = reaches(load(z + r * PANEL), threshold); here; here &= here - 1) {
      const int lane = __builtin_ctz(here);
      candidates.add(lanes.first + lane, entry + r, z[r * PANEL + lane]);
    }
}

// Folds a block of products of 16 tokens into their statistics. Not inlined: whatever else is in the panel, the same
// instructions make the same bits.
template <class Format>
COVGRPO_AVX512BF16 __attribute__((noinline)) void fold_block(const Slice<Format>& s, int64_t row, int64_t rows,
                                                             const Lanes& lanes, float* products,
                                                             const RunningRows& out, Statistics<F32>& running) {
  const F32 temperature = lanes.load(s.temperature, 1.0F);
  F32 top = broadcast(NO_MAX);
  for (int64_t r = 0; r < rows; ++r) {
    const F32 z = logits(s, row + r, load(products + r * PANEL), temperature);
    store(products + r * PANEL, z);
    top = larger(z, top);
  }
  if (out.candidates.threshold) {
    const F32 threshold = lanes.load(out.candidates.threshold, INFINITY);
    if (reaches(top, threshold)) add_candidates(s.first + row, rows, lanes, products, threshold, out.candidates);
  }
  BlockSums<F32> sums;
  for (int64_t r = 0; r < rows; ++r) sums.add(load(products + r * PANEL), top, out.entropy);
  running.merge({top, sums.total + larger(sums.ties - 1.0F, F32{}), sums.moment});
}

// One segment of the slice, for `PANELS_AT_ONCE` panels from `panel` on: statistics of it alone, [panels][4] vectors.
template <class Format>
COVGRPO_AVX512BF16 void fold_segment(const Slice<Format>& s, int64_t segment, int64_t panel, const uint32_t* packed,
                                     const RunningRows& out, Statistics<F32>* segments) {
  alignas(64) float products[BLOCK * PANEL];
  Rows<Format, BLOCK> entries(s.weight);
  const int64_t end = smaller(s.weight.rows, (segment + 1) * SEGMENT);
  const int64_t last_panel = smaller(s.panels(), panel + PANELS_AT_ONCE);
  const int64_t vectors = ceil_div(s.hidden.rows, LANES);
  for (int64_t v = panel * 4; v < smaller(vectors, last_panel * 4); ++v)
    segments[v] = {broadcast(NO_MAX), F32{}, F32{}};
  for (int64_t row = segment * SEGMENT; row < end; row += BLOCK) {
    const int64_t rows = smaller<int64_t>(BLOCK, end - row);
    entries.take(row);
    for (int64_t p = panel; p < last_panel; ++p) {
      block_products(s, entries, rows, p, packed, products);
      for (int64_t v = p * 4; v < smaller(vectors, p * 4 + 4); ++v)
        fold_block(s, row, rows, Lanes::of(s, p, v % 4), products + v % 4 * LANES, out, segments[v]);
      for (int64_t t = p * PANEL; t < smaller(s.hidden.rows, (p + 1) * PANEL); ++t) {
        const int64_t r = s.targets[t] - s.first - row;
        if (r >= 0 && r < rows) out.target[t] = products[r * PANEL + t % PANEL];
      }
    }
  }
}

// Joins the statistics of all segments, in their order, to those of 16 tokens.
COVGRPO_AVX512BF16 inline void merge_segments(const Lanes& lanes, const Statistics<F32>* segments, int64_t count,
                                              int64_t stride, const RunningRows& out) {
  Statistics<F32> running{lanes.load(out.maximum, NO_MAX), lanes.load(out.total, 0), lanes.load(out.moment, 0)};
  for (int64_t i = 0; i < count; ++i) running.merge(segments[i * stride]);
  const __mmask16 mask = first_lanes(lanes.count);
  _mm512_mask_storeu_ps(out.maximum + lanes.first, mask, reinterpret_cast<__m512>(running.maximum));
  _mm512_mask_storeu_ps(out.total + lanes.first, mask, reinterpret_cast<__m512>(running.total));
  _mm512_mask_storeu_ps(out.moment + lanes.first, mask, reinterpret_cast<__m512>(running.moment));
}

// Where in the workspace what lies, as offsets in bytes.
struct FoldWorkspace {
  int64_t packed, statistics, bytes;

  FoldWorkspace(int64_t tokens, int64_t entries, int64_t units) {
    Offsets next;
    packed = next(ceil_div(tokens, PANEL) * units * PANEL * sizeof(uint32_t));
    statistics = next(ceil_div(entries, SEGMENT) * ceil_div(tokens, LANES) * sizeof(Statistics<F32>));
    bytes = next(0);
  }
};

// parallel(tasks, f) calls f(i) for every task. `packed_before`: the workspace is that of a call with the same hidden
// states.
template <class Format, class Parallel>
void fold_products(const Slice<Format>& s, const RunningRows& out, const Parallel& parallel, char* workspace,
                   bool packed_before) {
  const int64_t panels = s.panels(), vectors = ceil_div(s.hidden.rows, LANES);
  const int64_t segments = ceil_div(s.weight.rows, SEGMENT), groups = ceil_div(panels, PANELS_AT_ONCE);
  const FoldWorkspace at(s.hidden.rows, s.weight.rows, s.hidden.units());
  auto* packed = reinterpret_cast<uint32_t*>(workspace + at.packed);
  auto* statistics = reinterpret_cast<Statistics<F32>*>(workspace + at.statistics);
  if (!packed_before) parallel(panels, [&](int64_t p) { pack_rows(s.hidden, p, packed); });
  parallel(segments * groups, [&](int64_t i) {
    const int64_t segment = i / groups, panel = i % groups * PANELS_AT_ONCE;
    fold_segment(s, segment, panel, packed, out, statistics + segment * vectors);
  });
  parallel(vectors,
           [&](int64_t v) { merge_segments(Lanes::of(s, v / 4, v % 4), statistics + v, segments, vectors, out); });
}

// -------------------------------------------------------------------------------------------------- backward

// Entries from one row to the next where `count` are in use: an odd number of cache lines, since rows a power of two
// apart would compete for the same few lines of the cache.
inline int64_t apart(int64_t count, int64_t bytes) { return (ceil_div(count * bytes, 64) | 1) * 64 / bytes; }

// Row 0 may stand for the tails of rows that are not here: its gradient is what the probabilities of the other fifteen
// of its vector make of entries below their floors. `bias` is what that row counts in the sum of the bias.
struct Tail {
  const float* weights;  // [LANES], of the first rows; null where row 0 is one like the others
  const float* floors;   // [LANES] logits
  float bias;
};

// What the gradient takes of each row, and where it goes; what is null is not wanted. Sums over rows or entries are
// written, or added to what is there. dW is scaled and rounded by the call that has the last rows of a slice.
template <class Format>
struct RowGradients {
  const float *maximum, *log_total, *at_target, *logprob_grad, *entropy;  // [R]
  const float* entropy_grad;                                              // [R] or null
  float* hidden;                                                          // [R, D] or null
  bool add_to_hidden;
  float* weight_sum;  // [C, D], or null where there is one call for all rows
  bool add_to_weight;
  typename Format::Element* weight;  // [C, D], or null where rows follow
  float scale;
  float* bias;  // [C] or null, added to
  Tail tail;
  const float* addend;         // rows that are added to dW before it is scaled
  const int32_t* addend_rows;  // [C] the row of it that belongs to an entry, or -1; null where there are none
};

// dL/dproducts of the slice, rounded to the format of its products.
template <class Format>
struct ProductGradients {
  typename Format::Element* by_entry;  // [C, R rounded up to LANES], rows `row_stride` apart
  uint32_t* by_token;                  // [R, units of C]
  float* bias;                         // [vectors of tokens, C]
  int64_t row_stride, unit_stride;
};

// dL/dproducts of a block and 16 tokens, from their products.
template <class Format>
COVGRPO_AVX512BF16 __attribute__((noinline)) void grad_block(const Slice<Format>& s, int64_t row, int64_t rows,
                                                             const Lanes& lanes, const float* products,
                                                             const RowGradients<Format>& g,
                                                             const ProductGradients<Format>& out) {
  const F32 temperature = lanes.load(s.temperature, 1.0F);
  // Without a token the maximum is infinite: probability and gradient are zero, whatever the bias.
  const Coefficients<F32> coefficients{lanes.load(g.maximum, INFINITY), lanes.load(g.log_total, 0),
                                       lanes.load(g.at_target, 0),      lanes.load(g.logprob_grad, 0),
                                       lanes.load(g.entropy, 0),        lanes.load(g.entropy_grad, 0),
                                       g.entropy_grad != nullptr};
  const F32 slope = s.head.scale / temperature;
  // The target's place in the block, out of reach where it is elsewhere.
  alignas(64) int32_t places[LANES];
  for (int i = 0; i < LANES; ++i) {
    const int64_t r = i < lanes.count ? s.targets[lanes.first + i] - s.first - row : -1;
    places[i] = r >= 0 && r < rows ? static_cast<int32_t>(r) : -1;
  }
  const __m512i place = _mm512_load_si512(places);
  const bool has_tail = g.tail.weights && lanes.first == 0;
  const F32 tail_weights = lanes.load(has_tail ? g.tail.weights : nullptr, 0);
  const F32 floors = lanes.load(has_tail ? g.tail.floors : nullptr, 0);

  const auto gradient = [&](int64_t r) COVGRPO_AVX512BF16 -> F32 {
    if (r >= rows) return F32{};
    const F32 raw = load(products + r * PANEL);
    const I32 here = reinterpret_cast<I32>(
        _mm512_maskz_set1_epi32(_mm512_cmpeq_epi32_mask(place, _mm512_set1_epi32(static_cast<int>(r))), -1));
    const F32 z = logits(s, row + r, raw, temperature);
    F32 dz = coefficients.gradient(z, here);
    if (has_tail) {
      const F32 p = exponential((z - coefficients.maximum) - coefficients.log_total);
      dz[0] = sum_of<float>(here || !(z < floors) ? F32{} : tail_weights * p);
    }
    if (s.head.capped) {
      const F32 t = s.head.per_cap(s.bias ? raw + broadcast(s.bias[row + r]) : raw);
      dz *= 1.0F - t * t;
    }
    dz *= slope;
    if (out.bias) {
      F32 counted = dz;
      if (has_tail) counted[0] *= g.tail.bias;
      out.bias[lanes.first / LANES * s.weight.rows + row + r] = sum_of<float>(counted);
    }
    return dz;
  };
  for (int64_t r = 0; r < rows; r += LANES * Format::PER_UNIT) {
    __m512i units[LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      const int64_t entry = r + i * Format::PER_UNIT;
      auto* place_of_entry = out.by_entry + (row + entry) * out.row_stride + lanes.first;
      if constexpr (Format::PER_UNIT == 2) {
        const auto low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(gradient(entry))));
        const auto high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(gradient(entry + 1))));
        units[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        if (out.by_entry && entry < rows) _mm256_storeu_si256(reinterpret_cast<__m256i*>(place_of_entry), low);
        if (out.by_entry && entry + 1 < rows)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(place_of_entry + out.row_stride), high);
      } else {
        units[i] = reinterpret_cast<__m512i>(gradient(entry));
        if (out.by_entry && entry < rows) _mm512_storeu_si512(place_of_entry, units[i]);
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
COVGRPO_AVX512BF16 void grad_panel(const Slice<Format>& s, int64_t row, int64_t panel, const uint32_t* packed,
                                   const Rows<Format, BLOCK>& entries, const RowGradients<Format>& g,
                                   const ProductGradients<Format>& out) {
  alignas(64) float products[BLOCK * PANEL];
  const int64_t rows = smaller<int64_t>(BLOCK, s.weight.rows - row);
  block_products(s, entries, rows, panel, packed, products);
  for (int64_t v = 0; v < 4; ++v) {
    const Lanes lanes = Lanes::of(s, panel, v);
    if (lanes.count > 0) grad_block(s, row, rows, lanes, products + v * LANES, g, out);
  }
}

// Task `task` of A * B for all `rows` rows of A and `columns` columns of B: a block of rows with several panels, so
// that the rows come from a near cache all but the first time. write(sums, row, column, count) takes `count` sums of a
// row from a column on.
template <class Format, class Row, class Write>
void multiply_panels(int64_t task, int64_t rows, const Row& row_of, int64_t depth, int64_t columns, const uint32_t* b,
                     const Write& write) {
  alignas(64) float block[BLOCK * PANEL];
  const int64_t panels = ceil_div(columns, PANEL);
  const int64_t units = ceil_div(depth, Format::PER_UNIT);
  const int64_t blocks = ceil_div(rows, BLOCK), row = task % blocks * BLOCK, first = task / blocks * PANELS_AT_ONCE;
  const int64_t count = smaller<int64_t>(BLOCK, rows - row);
  const auto in_block = [&](int64_t r) { return row_of(row + r); };
  for (int64_t p = first; p < smaller(panels, first + PANELS_AT_ONCE); ++p) {
    const int64_t width = smaller<int64_t>(PANEL, columns - p * PANEL);
    multiply<Format>(count, in_block, depth, b + p * units * PANEL,
                     {block, PANEL, ceil_div(width, LANES) * LANES, false});
    for (int64_t r = 0; r < count; ++r) write(block + r * PANEL, row + r, p * PANEL, width);
  }
}

// `count` sums from `place` on, written or added to what is there.
COVGRPO_AVX512BF16 inline void write_sums(const float* sums, float* out, int64_t count, bool add) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = first_lanes(count - i);
    __m512 v = _mm512_loadu_ps(sums + i);
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, out + i));
    _mm512_mask_storeu_ps(out + i, mask, v);
  }
}

// The same for the last sums of dW, which are scaled and rounded.
template <class Format>
COVGRPO_AVX512BF16 void write_weight(const float* sums, const RowGradients<Format>& g, int64_t place,
                                     const float* addend, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = first_lanes(count - i);
    __m512 v = _mm512_loadu_ps(sums + i);
    if (g.add_to_weight) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, g.weight_sum + place + i));
    if (addend) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, addend + i));
    Format::store_rounded(g.weight + place + i, mask, _mm512_mul_ps(v, _mm512_set1_ps(g.scale)));
  }
}

// Where in the workspace what lies, as offsets in bytes: first what depends on the hidden states alone, so that it can
// stay for the next slice of the head.
struct GradWorkspace {
  int64_t row_stride, unit_stride;  // of ProductGradients
  int64_t packed, states, by_entry, by_token, bias, head, bytes;

  // `per_unit` numbers of 4 / per_unit bytes are a unit.
  GradWorkspace(int64_t tokens, int64_t entries, int64_t depth, int64_t per_unit, bool hidden, bool weight,
                bool bias_) {
    const int64_t vectors = ceil_div(tokens, LANES), panel = PANEL * sizeof(uint32_t);
    const int64_t depth_panels = ceil_div(depth, PANEL), element = 4 / per_unit;
    row_stride = apart(vectors * LANES, element);
    unit_stride = apart(ceil_div(entries, per_unit), 4);
    Offsets next;
    packed = next(ceil_div(tokens, PANEL) * ceil_div(depth, per_unit) * panel);
    states = next(weight ? depth_panels * ceil_div(tokens, per_unit) * panel : 0);
    by_entry = next(weight ? entries * row_stride * element : 0);
    by_token = next(hidden ? tokens * unit_stride * 4 : 0);
    bias = next(bias_ ? vectors * entries * 4 : 0);
    head = next(hidden ? depth_panels * ceil_div(entries, per_unit) * panel : 0);
    bytes = next(0);
  }
};

// The products again, dL/dproducts of them, and the products of that with W and h. `packed_before`: the workspace is
// that of a call with the same hidden states.
template <class Format, class Parallel>
void grad_products(const Slice<Format>& s, const RowGradients<Format>& g, const Parallel& parallel, char* workspace,
                   bool packed_before) {
  using Element = typename Format::Element;
  const int64_t tokens = s.hidden.rows, entries = s.weight.rows, depth = s.hidden.columns;
  const int64_t panels = s.panels(), blocks = ceil_div(entries, BLOCK), groups = ceil_div(panels, PANELS_AT_ONCE);
  const int64_t token_units = ceil_div(tokens, Format::PER_UNIT), entry_units = ceil_div(entries, Format::PER_UNIT);
  const int64_t depth_groups = ceil_div(ceil_div(depth, PANEL), PANELS_AT_ONCE);

  const bool wants_weight = g.weight || g.weight_sum;
  const GradWorkspace at(tokens, entries, depth, Format::PER_UNIT, g.hidden, wants_weight, g.bias);
  const auto units_at = [&](int64_t offset) { return reinterpret_cast<uint32_t*>(workspace + offset); };
  uint32_t *packed = units_at(at.packed), *states = units_at(at.states), *head = units_at(at.head);
  const ProductGradients<Format> dz{wants_weight ? reinterpret_cast<Element*>(workspace + at.by_entry) : nullptr,
                                    g.hidden ? units_at(at.by_token) : nullptr,
                                    g.bias ? reinterpret_cast<float*>(workspace + at.bias) : nullptr, at.row_stride,
                                    at.unit_stride};
  if (!packed_before) {
    parallel(panels, [&](int64_t p) { pack_rows(s.hidden, p, packed); });
    if (wants_weight) parallel(token_units, [&](int64_t u) { pack_columns(s.hidden, u, token_units, states); });
  }
  parallel(blocks * groups, [&](int64_t i) {
    Rows<Format, BLOCK> rows(s.weight);
    const int64_t row = i / groups * BLOCK, first = i % groups * PANELS_AT_ONCE;
    rows.take(row);
    for (int64_t p = first; p < smaller(panels, first + PANELS_AT_ONCE); ++p)
      grad_panel(s, row, p, packed, rows, g, dz);
    if (g.hidden && first == 0)  // the block of the head is packed while it is in a near cache
      for (int64_t u = row / Format::PER_UNIT; u < smaller(entry_units, (row + BLOCK) / Format::PER_UNIT); ++u)
        pack_columns(s.weight, u, entry_units, head);
  });
  if (g.bias)
    for (int64_t v = 0; v < ceil_div(tokens, LANES); ++v)
      for (int64_t c = 0; c < entries; ++c) g.bias[c] += dz.bias[v * entries + c];

  const auto multiply_weight = [&](int64_t task) {  // dW = dZ^T h
    const auto row_of = [&](int64_t r) { return dz.by_entry + r * dz.row_stride; };
    const auto write = [&](const float* sums, int64_t entry, int64_t column, int64_t count) {
      const int64_t place = entry * depth + column;
      if (!g.weight) return write_sums(sums, g.weight_sum + place, count, g.add_to_weight);
      const int64_t row = g.addend_rows ? g.addend_rows[entry] : -1;
      write_weight(sums, g, place, row < 0 ? nullptr : g.addend + row * depth + column, count);
    };
    multiply_panels<Format>(task, entries, row_of, tokens, depth, states, write);
  };
  const auto multiply_hidden = [&](int64_t task) {  // dh = dZ W
    const auto row_of = [&](int64_t r) { return dz.by_token + r * dz.unit_stride; };
    const auto write = [&](const float* sums, int64_t token, int64_t column, int64_t count) {
      write_sums(sums, g.hidden + token * depth + column, count, g.add_to_hidden);
    };
    multiply_panels<Format>(task, tokens, row_of, entries, depth, head, write);
  };
  const int64_t weight_tasks = wants_weight ? blocks * depth_groups : 0;
  const int64_t hidden_tasks = g.hidden ? ceil_div(tokens, BLOCK) * depth_groups : 0;
  parallel(weight_tasks + hidden_tasks,
           [&](int64_t i) { i < weight_tasks ? multiply_weight(i) : multiply_hidden(i - weight_tasks); });
}

}  // namespace covgrpo

#endif
