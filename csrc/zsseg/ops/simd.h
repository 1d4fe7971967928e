// Vectors of float as wide as the instruction set they are compiled for, their exponentials and
// logarithms. Compiler vector types give the arithmetic.
#pragma once

#include <cstdint>

#include "zsseg/ops/vec4.h"

#if defined(__AVX512F__)
#define ZSSEG_LANES 16
#elif defined(__AVX2__)
#define ZSSEG_LANES 8
#else
#define ZSSEG_LANES 4
#endif

namespace zsseg::simd {
// Internal linkage: each instruction set compiles its own copy of everything below.
namespace {

constexpr int kLanes = ZSSEG_LANES;
typedef float VecF __attribute__((vector_size(4 * ZSSEG_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * ZSSEG_LANES)));

// Unaligned loads and stores go through these types: memcpy of 32 bytes becomes two 16-byte copies
// through the stack under GCC 12's generic tuning.
typedef float VecFMemory __attribute__((vector_size(4 * ZSSEG_LANES), aligned(4), may_alias));
typedef int32_t VecIMemory __attribute__((vector_size(4 * ZSSEG_LANES), aligned(4), may_alias));

ZSSEG_SIMD_FN VecF load(const float* from) {
  return *reinterpret_cast<const VecFMemory*>(from);
}
ZSSEG_SIMD_FN void store(float* to, VecF v) {
  *reinterpret_cast<VecFMemory*>(to) = v;
}
ZSSEG_SIMD_FN void store(int32_t* to, VecI v) {
  *reinterpret_cast<VecIMemory*>(to) = v;
}

#if ZSSEG_LANES == 16
#define ZSSEG_SPLAT(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#define ZSSEG_COUNT {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif ZSSEG_LANES == 8
#define ZSSEG_SPLAT(x) {x, x, x, x, x, x, x, x}
#define ZSSEG_COUNT {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define ZSSEG_SPLAT(x) {x, x, x, x}
#define ZSSEG_COUNT {0, 1, 2, 3}
#endif

ZSSEG_SIMD_FN VecF splat(float x) {
  return VecF ZSSEG_SPLAT(x);
}
ZSSEG_SIMD_FN VecI splat_int(int32_t x) {
  return VecI ZSSEG_SPLAT(x);
}
ZSSEG_SIMD_FN VecI lane_numbers() {
  return VecI ZSSEG_COUNT;
}

ZSSEG_SIMD_FN VecF min(VecF a, VecF b) {
  return a < b ? a : b;
}
ZSSEG_SIMD_FN VecF max(VecF a, VecF b) {
  return a > b ? a : b;
}

// exp(x) = power * (1 + r * slope), for x in [-87, 88].
struct Exponential {
  VecF power, r, slope;
};

ZSSEG_SIMD_FN Exponential reduce(VecF x) {
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const VecF shifted = x * splat(0x1.715476p+0f) + splat(0x1.8p23f);
  const VecF n = shifted - splat(0x1.8p23f);
  const VecI exponent = ((VecI)shifted - (VecI)splat(0x1.8p23f) + 127) << 23;
  // ln 2 in two parts, the first short enough for n * part to be exact; |r| <= ln(2) / 2.
  const VecF r = x - n * splat(0x1.62ep-1f) - n * splat(0x1.0bfbe8p-15f);
  VecF p = splat(1.0f / 5040.0f);  // Taylor to the 7th power: the rest is below 6e-9
  p = p * r + splat(1.0f / 720.0f);
  p = p * r + splat(1.0f / 120.0f);
  p = p * r + splat(1.0f / 24.0f);
  p = p * r + splat(1.0f / 6.0f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  return {(VecF)exponent, r, p};
}

// exp(x) for x in [-87, 88], clamped to it; within 2 units in the last place.
ZSSEG_SIMD_FN VecF exp_vec(VecF x) {
  const Exponential e = reduce(max(min(x, splat(88.0f)), splat(-87.0f)));
  return (e.slope * e.r + splat(1.0f)) * e.power;
}

// exp(x) - 1 for x in [-87, 0], clamped below; its relative error is small near 0 too.
ZSSEG_SIMD_FN VecF expm1_vec(VecF x) {
  const Exponential e = reduce(max(x, splat(-87.0f)));
  return e.slope * e.r * e.power + (e.power - splat(1.0f));
}

// log(x) for normal x > 0, as 2 artanh((m - 1) / (m + 1)) of the mantissa m in [1/sqrt 2, sqrt 2).
ZSSEG_SIMD_FN VecF log_vec(VecF x) {
  const VecI from_root = (VecI)x - 0x3f3504f3;  // 1/sqrt 2
  const VecI exponent = from_root >> 23;
  const VecF m = (VecF)((from_root & 0x7fffff) + 0x3f3504f3);
  const VecF s = (m - splat(1.0f)) / (m + splat(1.0f));
  const VecF z = s * s;
  VecF p = splat(2.0f / 9.0f);  // the rest is below 1e-9
  p = p * z + splat(2.0f / 7.0f);
  p = p * z + splat(2.0f / 5.0f);
  p = p * z + splat(2.0f / 3.0f);
  p = p * z + splat(2.0f);
  return p * s + __builtin_convertvector(exponent, VecF) * splat(0x1.62e43p-1f);
}

// log(1 + x) for x in [0, 1]; what rounding 1 + x loses is put back.
ZSSEG_SIMD_FN VecF log1p_vec(VecF x) {
  const VecF sum = x + splat(1.0f);
  return log_vec(sum) + (x - (sum - splat(1.0f))) / sum;
}

}  // namespace
}  // namespace zsseg::simd
