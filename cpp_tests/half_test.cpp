#include "zsseg/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace zsseg {
namespace {

// The value by its definition: sign, 5 exponent bits biased by 15, 10 mantissa bits.
float value_by_definition(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN()
                         : sign * std::numeric_limits<float>::infinity();
  }
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

TEST(Half, EveryValueWidensExactlyAndReturns) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const float expected = value_by_definition(half.bits);
    const float widened = half_to_float(half);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(widened)) << bits;
      ASSERT_TRUE(std::isnan(half_to_float(float_to_half(widened)))) << bits;
    } else {
      ASSERT_EQ(float_to_bits(widened), float_to_bits(expected)) << bits;
      ASSERT_EQ(float_to_half(widened).bits, half.bits);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7bff; ++bits) {  // every finite positive neighbour pair
    const double lower = value_by_definition(static_cast<std::uint16_t>(bits));
    const double upper = value_by_definition(static_cast<std::uint16_t>(bits + 1));
    const auto middle = static_cast<float>((lower + upper) / 2);
    ASSERT_EQ(float_to_half(middle).bits, bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(float_to_half(std::nextafter(middle, 0.0f)).bits, bits);
    ASSERT_EQ(float_to_half(std::nextafter(middle, 1e9f)).bits, bits + 1);
  }
}

TEST(Half, OverflowsToInfinity) {
  EXPECT_EQ(float_to_half(65519.0f).bits, 0x7bff);
  EXPECT_EQ(float_to_half(65520.0f).bits, 0x7c00);
  EXPECT_EQ(float_to_half(-1e30f).bits, 0xfc00);
}

}  // namespace
}  // namespace zsseg
