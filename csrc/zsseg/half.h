// float16 and bfloat16 bits <-> float32 where the compiler has no such types: exact, subnormals and
// NaN included.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"

namespace zsseg {

// IEEE 754 binary16 as it lies in memory.
struct Half {
  std::uint16_t bits;
};

ZSSEG_HOST_DEVICE float bits_to_float(std::uint32_t bits) {
  union {
    std::uint32_t bits;
    float value;
  } pun = {bits};
  return pun.value;
}

ZSSEG_HOST_DEVICE std::uint32_t float_to_bits(float value) {
  union {
    float value;
    std::uint32_t bits;
  } pun = {value};
  return pun.bits;
}

// Branch-free, so that compilers vectorise loops over it: shift exponent and mantissa into place,
// then rebias by a multiplication, which also normalises subnormals.
ZSSEG_HOST_DEVICE float half_to_float(Half half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half.bits & 0x7fffu) << 13;
  const float rebias = bits_to_float((254u - 15u) << 23);  // 2^112
  const std::uint32_t finite = float_to_bits(bits_to_float(magnitude) * rebias);
  const std::uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their payload
  const std::uint32_t is_special = magnitude >= 0x0f800000u ? 0xffffffffu : 0u;
  return bits_to_float(sign | (finite & ~is_special) | (special & is_special));
}

// Rounds to nearest, ties to even; overflows to infinity; every NaN becomes a quiet one.
ZSSEG_HOST_DEVICE Half float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t result;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    result = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: let float addition round the subnormal
    const float magic = 0.5f;
    result = float_to_bits(bits_to_float(magnitude) + magic) - float_to_bits(magic);
  } else {
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    result = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return Half{static_cast<std::uint16_t>(sign | result)};
}

// The upper half of a float32.
struct Bfloat16 {
  std::uint16_t bits;
};

ZSSEG_HOST_DEVICE float bfloat16_to_float(Bfloat16 value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}

// Rounds to nearest, ties to even; overflows to infinity; every NaN becomes a quiet one.
ZSSEG_HOST_DEVICE Bfloat16 float_to_bfloat16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return Bfloat16{static_cast<std::uint16_t>(is_nan ? (bits >> 16 | 0x40u) : rounded)};
}

}  // namespace zsseg
