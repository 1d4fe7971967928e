#include "zsseg/ops/ink.h"

#include <gtest/gtest.h>

#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

using Bytes = std::vector<std::uint8_t>;

TensorView view(Bytes& data, const Shape& shape) {
  return {data.data(), DType::uint8, shape, {}};
}

TEST(Ink, LaysOneColourOverTheOtherAndCutsAtTheEdge) {
  for_every_isa([] {
    Bytes picture(3 * 2 * 2, 100);
    Bytes weights = {255, 255, 255, 51, 0, 0, 0, 255};  // two colours, two by two
    InkParams params{-1, 0, {{0, 0, 0}, {200, 150, 250}}};
    ink(view(picture, {2, 2, 3}), view(weights, {2, 2, 2}), params);
    EXPECT_EQ(picture, (Bytes{0, 0, 0, 200, 150, 250, 100, 100, 100, 100, 100, 100}));
    params.top = 0;
    params.left = 1;
    ink(view(picture, {2, 2, 3}), view(weights, {1, 2, 2}), params);
    EXPECT_EQ(picture, (Bytes{0, 0, 0, 0, 0, 0, 100, 100, 100, 0, 0, 0}));
    const Bytes before = picture;
    params.top = INT64_MIN;
    params.left = INT64_MAX;
    ink(view(picture, {2, 2, 3}), view(weights, {1, 2, 2}), params);
    EXPECT_EQ(picture, before);
  });
}

TEST(InkPixel, IsTheNearestOfEveryBlend) {
  for (std::uint32_t weight = 0; weight < 256; ++weight) {
    for (std::uint32_t own = 0; own < 256; own += 5) {
      for (const std::uint32_t colour : {0u, 90u, 255u}) {
        const double exact = own + weight / 255.0 * (static_cast<double>(colour) - own);
        ASSERT_NEAR(ink_blend(own, colour, weight), exact, 0.5);
      }
    }
  }
}

TEST(Ink, RefusesWeightsOfNoColour) {
  Bytes picture(12), weights(4);
  EXPECT_THROW(ink(view(picture, {2, 2, 3}), view(weights, {0, 2, 2}), {}), ArgumentError);
}

}  // namespace
}  // namespace zsseg
