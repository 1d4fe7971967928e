// Vectors for upsample_argmax_cpu.cpp, as wide as the instruction set it is compiled for.
// Compiler vector types give the arithmetic; only what they lack is spelled per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "zsseg/ops/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace zsseg::upsample {
// Internal linkage: each instruction set compiles its own copy of everything below.
namespace {

using namespace simd;

typedef uint16_t HalfBitsMemory
    __attribute__((vector_size(2 * ZSSEG_LANES), aligned(2), may_alias));

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
