// A register-blocked tile of dot products between rows: the inner loop of the two matrix-like CPU
// kernels. For inclusion in <op>_cpu.cpp only: everything is in the instruction set's namespace.
#pragma once

#include <cstdint>

#include "zsseg/half.h"
#include "zsseg/ops/vec4.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// kTileRows * kTileColumns sums, kTileRows vectors and one more live at once: 16 of 16 registers
// (AVX2, SSE) or 21 of 32 (AVX-512, NEON).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 3;
#endif
constexpr int kTileColumns = 4;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t VectorBits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));
// Loads through these pointers, not memcpy: GCC 12 copies 32 bytes through the stack in two halves.
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::uint16_t UnalignedHalfBits
    __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline Vector load_vector(const float* from) {
  return *reinterpret_cast<const UnalignedVector*>(from);
}

inline Vector load_vector(const Half* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Vector>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector>(
      vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from)))));
#else
  // half_to_float, a vector at a time.
  const HalfBits halves = *reinterpret_cast<const UnalignedHalfBits*>(from);
  const VectorBits bits = __builtin_convertvector(halves, VectorBits);
  const VectorBits magnitude = (bits & 0x7fffu) << 13;
  const Vector rebias = Vector{} + bits_to_float((254u - 15u) << 23);
  const VectorBits finite =
      reinterpret_cast<VectorBits>(reinterpret_cast<Vector>(magnitude) * rebias);
  const VectorBits is_special = reinterpret_cast<VectorBits>(magnitude >= 0x0f800000u);
  const VectorBits value = (finite & ~is_special) | ((magnitude | 0x7f800000u) & is_special);
  return reinterpret_cast<Vector>(value | ((bits & 0x8000u) << 16));
#endif
}

inline Vector load_vector(const Bfloat16* from) {
  const HalfBits halves = *reinterpret_cast<const UnalignedHalfBits*>(from);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, VectorBits) << 16);
}

inline float load_scalar(const float* from) {
  return *from;
}
inline float load_scalar(const Half* from) {
  return half_to_float(*from);
}
inline float load_scalar(const Bfloat16* from) {
  return bfloat16_to_float(*from);
}

ZSSEG_SIMD_FN Vec4F fold_to_four(const Vector& vector) {
  float lanes[kLanes];
  *reinterpret_cast<UnalignedVector*>(lanes) = vector;
  Vec4F sum = load4(lanes);
  for (int lane = 4; lane < kLanes; lane += 4) {
    sum += load4(lanes + lane);
  }
  return sum;
}

// The sum over the lanes of each of four vectors.
ZSSEG_SIMD_FN Vec4F sums_of_lanes(const Vector (&vectors)[4]) {
  Vec4F a = fold_to_four(vectors[0]), b = fold_to_four(vectors[1]);
  Vec4F c = fold_to_four(vectors[2]), d = fold_to_four(vectors[3]);
  transpose4(a, b, c, d);
  return (a + b) + (c + d);
}

ZSSEG_SIMD_FN float sum_of_lanes(const Vector& vector) {
  const Vec4F sum = fold_to_four(vector);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// A row as it lies in memory.
template <typename Element>
struct PlainRow {
  const Element* data = nullptr;

  Vector vector(std::int64_t k) const { return load_vector(data + k); }
  float scalar(std::int64_t k) const { return load_scalar(data + k); }
};

// The elementwise product of two rows, never stored.
template <typename Element>
struct ProductRow {
  const Element* left = nullptr;
  const Element* right = nullptr;

  Vector vector(std::int64_t k) const { return load_vector(left + k) * load_vector(right + k); }
  float scalar(std::int64_t k) const { return load_scalar(left + k) * load_scalar(right + k); }
};

// sums[r][c] += dot(rows[r], columns[c]). Vector lanes run along the rows, so nothing is packed.
template <typename Row, typename Column>
inline void add_dot_tile(const Row (&rows)[kTileRows], const Column (&columns)[kTileColumns],
                         std::int64_t depth, float (&sums)[kTileRows][kTileColumns]) {
  Vector partial[kTileRows][kTileColumns] = {};
  std::int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vector left[kTileRows];
    for (int row = 0; row < kTileRows; ++row) {
      left[row] = rows[row].vector(k);
    }
    for (int column = 0; column < kTileColumns; ++column) {
      const Vector right = columns[column].vector(k);
      for (int row = 0; row < kTileRows; ++row) {
        partial[row][column] += left[row] * right;
      }
    }
  }
  for (int row = 0; row < kTileRows; ++row) {
    store4(sums[row], load4(sums[row]) + sums_of_lanes(partial[row]));
    for (std::int64_t rest = k; rest < depth; ++rest) {
      for (int column = 0; column < kTileColumns; ++column) {
        sums[row][column] += rows[row].scalar(rest) * columns[column].scalar(rest);
      }
    }
  }
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
inline std::int64_t larger(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}

}  // namespace
}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
