// Vectors for upsample_argmax_cpu.cpp, as wide as the instruction set it is compiled for.
// Compiler vector types give the arithmetic; only what they lack is spelled per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "zsseg/ops/vec4.h"

#if defined(__AVX512F__)
#define ZSSEG_LANES 16
#elif defined(__AVX2__)
#define ZSSEG_LANES 8
#else
#define ZSSEG_LANES 4
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace zsseg::upsample {
// Internal linkage: each instruction set compiles its own copy of everything below.
namespace {

constexpr int kLanes = ZSSEG_LANES;
typedef float VecF __attribute__((vector_size(4 * ZSSEG_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * ZSSEG_LANES)));

// Unaligned loads and stores go through these types: memcpy of 32 bytes becomes two 16-byte copies
// through the stack under GCC 12's generic tuning.
typedef float VecFMemory __attribute__((vector_size(4 * ZSSEG_LANES), aligned(4), may_alias));
typedef int32_t VecIMemory __attribute__((vector_size(4 * ZSSEG_LANES), aligned(4), may_alias));
typedef uint16_t HalfBitsMemory
    __attribute__((vector_size(2 * ZSSEG_LANES), aligned(2), may_alias));

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

// Bit i is set where lane i of a comparison is true.
ZSSEG_SIMD_FN uint32_t bits(VecI mask) {
#if ZSSEG_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask);
#elif ZSSEG_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  const VecI bit = mask & VecI{1, 2, 4, 8};
  return static_cast<uint32_t>(bit[0] | bit[1] | bit[2] | bit[3]);
#endif
}

ZSSEG_SIMD_FN VecF widen_half(const uint16_t* from) {
  const VecI half = __builtin_convertvector(*reinterpret_cast<const HalfBitsMemory*>(from), VecI);
  const VecI magnitude = half & 0x7fff;
  // Shifting puts exponent and fraction in place; the product re-biases, subnormals included.
  VecF value = (VecF)(magnitude << 13) * splat(0x1p112f);
  value = magnitude > 0x7c00 ? splat(__builtin_nanf("")) : value;
  value = magnitude == 0x7c00 ? splat(__builtin_inff()) : value;
  return (VecF)((VecI)value | ((half & 0x8000) << 16));
}

ZSSEG_SIMD_FN VecF widen_bfloat16(const uint16_t* from) {
  return (VecF)(__builtin_convertvector(*reinterpret_cast<const HalfBitsMemory*>(from), VecI)
                << 16);
}

// exp(x) for x in [-87, 88], clamped to it; within 2 units in the last place.
ZSSEG_SIMD_FN VecF exp_vec(VecF x) {
  x = max(min(x, splat(88.0f)), splat(-87.0f));
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
  p = p * r + splat(1.0f);
  return p * (VecF)exponent;
}

ZSSEG_SIMD_FN VecF sigmoid_vec(VecF x) {
  return splat(1.0f) / (splat(1.0f) + exp_vec(-x));
}

// The low 8 or 16 bits of every lane. Spelled out: GCC 12 narrows vectors through scalars. (The
// unmasked 512-bit forms draw its warning about uninitialised values.)
#if ZSSEG_LANES == 16
ZSSEG_SIMD_FN void store_narrow(uint8_t* to, VecI v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
}
ZSSEG_SIMD_FN void store_narrow(uint16_t* to, VecI v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v));
}
#elif ZSSEG_LANES == 8
ZSSEG_SIMD_FN __m128i narrow_to_words(VecI v) {
  const __m256i lanes = (__m256i)v;
  return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}
ZSSEG_SIMD_FN void store_narrow(uint8_t* to, VecI v) {
  const __m128i words = narrow_to_words(v & 0xff);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}
ZSSEG_SIMD_FN void store_narrow(uint16_t* to, VecI v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow_to_words(v & 0xffff));
}
#elif defined(__SSE2__)
ZSSEG_SIMD_FN void store_narrow(uint8_t* to, VecI v) {
  const __m128i bytes = (__m128i)(v & 0xff);
  const __m128i words = _mm_packs_epi32(bytes, bytes);
  const int four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  __builtin_memcpy(to, &four, 4);
}
ZSSEG_SIMD_FN void store_narrow(uint16_t* to, VecI v) {
  const __m128i lanes = (__m128i)((v << 16) >> 16);  // signed saturation then keeps all 16 bits
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(lanes, lanes));
}
#else
template <typename Label>
ZSSEG_SIMD_FN void store_narrow(Label* to, VecI v) {
  for (int i = 0; i < kLanes; ++i) {
    to[i] = static_cast<Label>(v[i]);
  }
}
#endif

}  // namespace
}  // namespace zsseg::upsample
