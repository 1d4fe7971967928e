#include "zsseg/ops/all_finite.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

template <typename T>
int run(std::vector<T>& values, DType dtype) {
  std::uint8_t out = 0xcd;
  all_finite({values.data(), dtype, {static_cast<std::int64_t>(values.size())}, {}},
             {&out, DType::uint8, {1}, {}}, 0);
  return out;
}

TEST(AllFinite, FindsOneAtAnyPlace) {
  for_every_isa([] {
    const float kinds[] = {std::nanf(""), -std::nanf(""), std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity()};
    std::vector<float> values(67, std::numeric_limits<float>::max());
    values[3] = -std::numeric_limits<float>::denorm_min();
    EXPECT_EQ(run(values, DType::float32), 1);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float before = values[i];
      values[i] = kinds[i % 4];
      EXPECT_EQ(run(values, DType::float32), 0) << i;
      values[i] = before;
    }
  });
}

TEST(AllFinite, KnowsHalvesToo) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    std::vector<Half> values(1, Half{static_cast<std::uint16_t>(bits)});
    ASSERT_EQ(run(values, DType::float16) == 1, std::isfinite(half_to_float(values[0]))) << bits;
  }
}

TEST(AllFinite, SeveralThreadsAgree) {
  std::vector<float> values(3 << 20, 1.0f);
  EXPECT_EQ(run(values, DType::float32), 1);
  values.back() = std::nanf("");
  EXPECT_EQ(run(values, DType::float32), 0);
}

TEST(AllFinite, NothingIsFinite) {
  std::vector<float> none;
  EXPECT_EQ(run(none, DType::float32), 1);
}

TEST(AllFinite, RefusesOtherTypes) {
  std::vector<std::uint8_t> bytes(4);
  EXPECT_THROW(run(bytes, DType::uint8), DTypeError);
}

}  // namespace
}  // namespace zsseg
