// Sixteen numbers at a time, in the vector extension that GCC and Clang share. There are no intrinsics, so that one
// source serves every instruction set with the same order of operations.
//
// Everything here is inlined into functions that name an instruction set (isa.h), and is compiled for that one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define COVGRPO_INLINE inline __attribute__((always_inline))

namespace covgrpo {

constexpr int LANES = 16;

using F32 = float __attribute__((vector_size(LANES * 4)));
using I32 = int32_t __attribute__((vector_size(LANES * 4)));
using F64 = double __attribute__((vector_size(LANES * 8)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <class T>
using Vector = typename VectorOf<T>::type;

// Memory may have any alignment.
template <class T>
COVGRPO_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
COVGRPO_INLINE void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
COVGRPO_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // x - 0 is x, for -0 and NaN too
}

// A NaN in b is kept and one in a is not, as by the processor's own instructions.
template <class V>
COVGRPO_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
COVGRPO_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

// The sum of all lanes: halves are added until one number is left, in this order on every processor.
template <class T>
COVGRPO_INLINE T sum_of(Vector<T> v) {
  T parts[LANES];
  std::memcpy(parts, &v, sizeof v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

template <class T>
COVGRPO_INLINE T largest_of(Vector<T> v) {
  T parts[LANES];
  std::memcpy(parts, &v, sizeof v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] = larger(parts[i + width], parts[i]);
  return parts[0];
}

COVGRPO_INLINE float exponential(float x) { return std::exp(x); }
COVGRPO_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 88, at most 2 units in the last place off (tests/test_cpp.py). It is zero below log 2^-126 = -87.34,
// where the result would be denormal. With x = n log 2 + r, log 2 being split into two parts so that r is exact enough,
// it is 2^n times the polynomial in r of Cephes' expf.
COVGRPO_INLINE F32 exponential(F32 x) {
  constexpr float LOWEST = -87.33654F, ROUND = 12582912.0F;  // adding 1.5 * 2^23 rounds to an integer
  const F32 y = x < LOWEST ? broadcast(LOWEST) : x;          // NaN stays
  const F32 shifted = y * 1.44269504F + ROUND;
  const F32 n = shifted - ROUND;
  F32 r = y - n * 0.693359375F;
  r = r - n * -2.12194440e-4F;
  F32 p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  I32 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + (127 - 0x4B400000)) << 23;  // 2^n; 0x4B400000 are the bits of ROUND
  F32 power;
  std::memcpy(&power, &bits, sizeof power);
  return x < LOWEST ? F32{} : p * power;
}

COVGRPO_INLINE F64 exponential(F64 x) {
  for (int i = 0; i < LANES; ++i) x[i] = std::exp(x[i]);
  return x;
}

// At most 3 units in the last place off. Below 0.625 it is the polynomial of Cephes' tanhf, which is for these x, and
// elsewhere 1 - 2 / (exp(2|x|) + 1), which is 1 long before |x| = 20, where x is cut off to keep exp finite.
COVGRPO_INLINE F32 hyperbolic_tangent(F32 x) {
  const F32 size = x < 0.0F ? -x : x;
  const F32 z = x * x;
  F32 p = z * -5.70498872745e-3F + 2.06390887954e-2F;
  p = p * z + -5.37397155531e-2F;
  p = p * z + 1.33314422036e-1F;
  p = p * z + -3.33332819422e-1F;
  const F32 near = x + x * (z * p);
  const F32 capped = size > 20.0F ? broadcast(20.0F) : size;
  const F32 far = 1.0F - 2.0F / (exponential(2.0F * capped) + 1.0F);
  return size < 0.625F ? near : (x < 0.0F ? -far : far);
}

COVGRPO_INLINE F64 hyperbolic_tangent(F64 x) {
  for (int i = 0; i < LANES; ++i) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace covgrpo
