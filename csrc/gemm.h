// Matrix products for processors with AVX512-BF16: bfloat16 or float32 operands, float32 sums.
//
//   out[r, c] (+)= sum_k A[r, k] * B[k, c]
//
// A is read where it lies: each unit of a row is broadcast to all lanes. The columns of B are in the lanes, and B is
// packed. A *unit* is 32 bits of depth, two bfloat16 or one float: what one instruction multiplies in each lane. Packed
// B is [panels of 64 columns][units of depth][64 columns] of units.
//
// The sum over the depth is cut into chains of fixed length. Each output adds up its chains in order, and its bits
// depend on nothing but its own operands. The bfloat16 instruction treats denormal operands as zero.
#pragma once

#include "isa.h"

#if COVGRPO_X86

#include <immintrin.h>

#include <vector>

#include "vectors.h"

namespace covgrpo {

constexpr int PANEL = 64;  // columns of B: four vectors
constexpr int STRIP = 6;   // rows of A: 6 x 4 sums, 4 vectors of B and a broadcast unit take 29 of the 32 registers

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int PER_UNIT = 2;
  static constexpr int64_t CHAIN = 1024;  // units: 256 KiB of a panel, which a second-level cache holds beside A

  COVGRPO_AVX512BF16 static COVGRPO_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // To the nearest, ties to even, as PyTorch rounds. The processor's own instruction would make denormals zero.
  COVGRPO_AVX512BF16 static COVGRPO_INLINE void store_rounded(Element* p, __mmask16 mask, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
};

struct Float32 {
  using Element = float;
  static constexpr int PER_UNIT = 1;
  static constexpr int64_t CHAIN = 128;  // units: longer chains are less accurate than PyTorch's products

  COVGRPO_AVX512BF16 static COVGRPO_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }

  COVGRPO_AVX512BF16 static COVGRPO_INLINE void store_rounded(Element* p, __mmask16 mask, __m512 x) {
    _mm512_mask_storeu_ps(p, mask, x);
  }
};

// A matrix of any strides, which are counted in elements.
template <class Format>
struct Matrix {
  using Element = typename Format::Element;
  const Element* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  int64_t units() const { return (columns + Format::PER_UNIT - 1) / Format::PER_UNIT; }
};

// Some rows of a matrix, COUNT at most, each contiguous: where they lie, or in a copy if the elements of a row lie
// apart.
template <class Format, int COUNT>
class Rows {
 public:
  using Element = typename Format::Element;

  explicit Rows(const Matrix<Format>& m) : m_(m) {
    if (m.column_stride != 1) copies_.resize(COUNT * m.columns);
  }

  // Makes them the rows from `first` on. Rows past the end of the matrix are null.
  void take(int64_t first) {
    for (int64_t i = 0; i < COUNT; ++i) {
      rows_[i] = nullptr;
      if (first + i >= m_.rows) continue;
      rows_[i] = m_.data + (first + i) * m_.row_stride;
      if (copies_.empty()) continue;
      Element* copy = copies_.data() + i * m_.columns;
      for (int64_t j = 0; j < m_.columns; ++j) copy[j] = rows_[i][j * m_.column_stride];
      rows_[i] = copy;
    }
  }

  const Element* operator()(int64_t i) const { return rows_[i]; }

 private:
  const Matrix<Format>& m_;
  const Element* rows_[COUNT];
  std::vector<Element> copies_;
};

// The mask of the first n lanes, of none or all where n is out of range.
COVGRPO_AVX512BF16 COVGRPO_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= LANES ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1U << n) - 1);
}

// Where the product with a panel goes. Its first `columns` columns are written, or added to what is there.
struct Output {
  float* data;
  int64_t stride;
  int64_t columns;
  bool add;
};

// The strip of A whose rows are at `a` times VECTORS vectors of a panel of B. Only the first `rows` rows are written.
template <class Format, int VECTORS>
COVGRPO_AVX512BF16 void multiply_vectors(int64_t rows, const char* const (&a)[STRIP], int64_t depth, const uint32_t* b,
                                         const Output& out) {
  __m512 sums[STRIP][VECTORS];
  for (int r = 0; r < STRIP; ++r)
    for (int j = 0; j < VECTORS; ++j) sums[r][j] = _mm512_setzero_ps();
  const char *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];

  const auto step = [&](auto unit_of) COVGRPO_AVX512BF16 __attribute__((always_inline)) {
    __m512i panel[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) panel[j] = _mm512_loadu_si512(b + j * LANES);
    const char* strip[STRIP] = {a0, a1, a2, a3, a4, a5};
#pragma GCC unroll 6
    for (int r = 0; r < STRIP; ++r) {
      const __m512i unit = _mm512_set1_epi32(unit_of(strip[r]));
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[r][j] = Format::multiply_add(sums[r][j], unit, panel[j]);
    }
  };
  for (int64_t k = 0; k < depth / Format::PER_UNIT; ++k) {
    step([](const char* p) __attribute__((always_inline)) {
      int32_t unit;
      std::memcpy(&unit, p, sizeof unit);
      return unit;
    });
    a0 += 4, a1 += 4, a2 += 4, a3 += 4, a4 += 4, a5 += 4;
    b += PANEL;
  }
  if (depth % Format::PER_UNIT) {  // half a unit: nothing behind the end of the row may be read
    step([](const char* p) __attribute__((always_inline)) {
      uint16_t half;
      std::memcpy(&half, p, sizeof half);
      return static_cast<int32_t>(half);
    });
  }

  for (int r = 0; r < STRIP && r < rows; ++r)
    for (int j = 0; j < VECTORS; ++j) {
      float* p = out.data + r * out.stride + j * LANES;
      const __mmask16 mask = first_lanes(out.columns - j * LANES);
      __m512 sum = sums[r][j];
      if (out.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), sum);
      _mm512_mask_storeu_ps(p, mask, sum);
    }
}

// A strip of A times a panel of B, over `depth` elements of the depth from unit `unit` on.
template <class Format, class Row>
void multiply_strip(int64_t rows, const Row& row, int64_t unit, int64_t depth, const uint32_t* b, const Output& out) {
  const char* a[STRIP];
  // In place of rows past the end stands the last one; its sums are not written again.
  for (int i = 0; i < STRIP; ++i)
    a[i] = reinterpret_cast<const char*>(row(i < rows ? i : rows - 1)) + unit * sizeof(uint32_t);
  b += unit * PANEL;
  switch ((out.columns + LANES - 1) / LANES) {
    case 1:
      return multiply_vectors<Format, 1>(rows, a, depth, b, out);
    case 2:
      return multiply_vectors<Format, 2>(rows, a, depth, b, out);
    case 3:
      return multiply_vectors<Format, 3>(rows, a, depth, b, out);
    default:
      return multiply_vectors<Format, 4>(rows, a, depth, b, out);
  }
}

// `rows` rows of A, where row(i) points to row i, times one panel of B.
template <class Format, class Row>
void multiply(int64_t rows, const Row& row, int64_t depth, const uint32_t* b, const Output& out) {
  constexpr int64_t CHAIN = Format::CHAIN * Format::PER_UNIT;
  for (int64_t k = 0; k == 0 || k < depth; k += CHAIN) {
    for (int64_t r = 0; r < rows; r += STRIP) {
      const auto in_strip = [&](int64_t i) { return row(r + i); };
      const Output strip{out.data + r * out.stride, out.stride, out.columns, out.add || k > 0};
      multiply_strip<Format>(rows - r, in_strip, k / Format::PER_UNIT, smaller(CHAIN, depth - k), b, strip);
    }
  }
}

// Transposes 16 x 16 units in three steps: blocks of 2 x 2 units, then of 4 x 4, then the quarters of vectors.
COVGRPO_AVX512BF16 COVGRPO_INLINE void transpose(__m512i (&v)[LANES]) {
  __m512i t[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD), d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xDD);
    t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) v[i] = t[i];
}

// Sixteen units of a row from unit `u` on; zeros past the end of the row.
template <class Format>
COVGRPO_AVX512BF16 COVGRPO_INLINE __m512i units_of_row(const typename Format::Element* row, int64_t columns,
                                                       int64_t u) {
  const int64_t left = columns - u * Format::PER_UNIT;
  if constexpr (Format::PER_UNIT == 2) {
    const __mmask32 mask = left >= 32 ? 0xFFFFFFFFU : (1U << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, row + 2 * u);
  } else {
    return _mm512_maskz_loadu_epi32(first_lanes(left), row + u);
  }
}

// Packs panel `panel` of B = m^T: the rows of m are the columns of B, and the columns of m are its depth.
template <class Format>
COVGRPO_AVX512BF16 void pack_rows(const Matrix<Format>& m, int64_t panel, uint32_t* packed) {
  const int64_t units = m.units();
  Rows<Format, LANES> rows(m);
  packed += panel * units * PANEL;
  for (int64_t lane = 0; lane < PANEL; lane += LANES) {
    rows.take(panel * PANEL + lane);
    for (int64_t u = 0; u < units; u += LANES) {
      __m512i v[LANES];
      for (int i = 0; i < LANES; ++i)
        v[i] = rows(i) ? units_of_row<Format>(rows(i), m.columns, u) : _mm512_setzero_si512();
      transpose(v);
      for (int i = 0; i < LANES && u + i < units; ++i) _mm512_storeu_si512(packed + (u + i) * PANEL + lane, v[i]);
    }
  }
}

// Packs unit `unit` of the depth of B = m, which is PER_UNIT rows of m, in all panels. B has `depth` units of depth.
template <class Format>
COVGRPO_AVX512BF16 void pack_columns(const Matrix<Format>& m, int64_t unit, int64_t depth, uint32_t* packed) {
  Rows<Format, Format::PER_UNIT> rows(m);
  rows.take(unit * Format::PER_UNIT);
  const auto* first = rows(0);
  const auto* second = rows(Format::PER_UNIT - 1);  // null where only half of the last unit is there
  for (int64_t c = 0; c < m.columns; c += LANES) {
    const __mmask16 mask = first_lanes(m.columns - c);
    __m512i v;
    if constexpr (Format::PER_UNIT == 2) {
      v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + c));
      if (second) {
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + c));
        v = _mm512_or_si512(v, _mm512_slli_epi32(high, 16));
      }
    } else {
      v = _mm512_maskz_loadu_epi32(mask, first + c);
    }
    _mm512_storeu_si512(packed + ((c / PANEL) * depth + unit) * PANEL + c % PANEL, v);
  }
}

}  // namespace covgrpo

#endif
