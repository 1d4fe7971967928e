// Four floats in a register, and their transposition: the same on every instruction set.
#pragma once

#include <cstdint>

#define ZSSEG_SIMD_FN static inline __attribute__((always_inline))

namespace zsseg {
// Internal linkage: each instruction set compiles its own copy of everything below.
namespace {

typedef float Vec4F __attribute__((vector_size(16)));
typedef std::int32_t Vec4I __attribute__((vector_size(16)));
typedef float Vec4FMemory __attribute__((vector_size(16), aligned(4), may_alias));

ZSSEG_SIMD_FN Vec4F load4(const float* from) {
  return *reinterpret_cast<const Vec4FMemory*>(from);
}
ZSSEG_SIMD_FN void store4(float* to, Vec4F v) {
  *reinterpret_cast<Vec4FMemory*>(to) = v;
}

#if defined(__clang__)
#define ZSSEG_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define ZSSEG_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Vec4I{i, j, k, l})
#endif

// rows[k][column] for k in 0..3 -> column[k]
ZSSEG_SIMD_FN void transpose4(Vec4F& a, Vec4F& b, Vec4F& c, Vec4F& d) {
  const Vec4F ab_low = ZSSEG_SHUFFLE(a, b, 0, 4, 1, 5);
  const Vec4F ab_high = ZSSEG_SHUFFLE(a, b, 2, 6, 3, 7);
  const Vec4F cd_low = ZSSEG_SHUFFLE(c, d, 0, 4, 1, 5);
  const Vec4F cd_high = ZSSEG_SHUFFLE(c, d, 2, 6, 3, 7);
  a = ZSSEG_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  b = ZSSEG_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  c = ZSSEG_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  d = ZSSEG_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

}  // namespace
}  // namespace zsseg
