#include "zsseg/ops/preprocess.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"
#include "zsseg/ops/preprocess_pixel.h"

namespace zsseg {
namespace {

struct Case {
  std::int64_t height, width, out_height, out_width;
};

std::vector<std::uint8_t> test_frame(const Case& c) {
  std::vector<std::uint8_t> frame(static_cast<std::size_t>(3 * c.height * c.width));
  for (std::size_t i = 0; i < frame.size(); ++i) {
    frame[i] = static_cast<std::uint8_t>(127.5f + 127.0f * noise(static_cast<std::uint32_t>(i)));
  }
  return frame;
}

double position(std::int64_t i, std::int64_t source, std::int64_t target, Align align) {
  if (align == Align::kCorners) {
    return double(i) * (source - 1) / std::max<std::int64_t>(target - 1, 1);
  }
  return std::clamp((i + 0.5) * source / target - 0.5, 0.0, source - 1.0);
}

double expected_value(const std::vector<std::uint8_t>& frame, const Case& c, int channel,
                      std::int64_t y, std::int64_t x, Align align) {
  const double sy = position(y, c.height, c.out_height, align);
  const double sx = position(x, c.width, c.out_width, align);
  const auto y0 = static_cast<std::int64_t>(sy);
  const auto x0 = static_cast<std::int64_t>(sx);
  const std::int64_t y1 = std::min(y0 + 1, c.height - 1);
  const std::int64_t x1 = std::min(x0 + 1, c.width - 1);
  const auto at = [&](std::int64_t row, std::int64_t column) {
    return static_cast<double>(
        frame[static_cast<std::size_t>(3 * (row * c.width + column) + channel)]);
  };
  const double above = (1 - (sx - x0)) * at(y0, x0) + (sx - x0) * at(y0, x1);
  const double below = (1 - (sx - x0)) * at(y1, x0) + (sx - x0) * at(y1, x1);
  return (1 - (sy - y0)) * above + (sy - y0) * below;
}

void expect_definition(Align align) {
  const Case cases[] = {{1, 1, 1, 1},   {1, 1, 5, 3},     {7, 13, 7, 13},
                        {31, 17, 5, 3}, {5, 3, 129, 131}, {211, 307, 97, 260}};
  for_every_isa([&] {
    for (const Case& c : cases) {
      std::vector<std::uint8_t> frame = test_frame(c);
      std::vector<float> out(static_cast<std::size_t>(3 * c.out_height * c.out_width),
                             std::numeric_limits<float>::quiet_NaN());
      PreprocessParams params{c.out_height, c.out_width, {0.4, 0.5, 0.6}, {0.2, 0.3, 0.4}, true};
      params.align = align;
      preprocess({frame.data(), DType::uint8, {c.height, c.width, 3}, {}},
                 {out.data(), DType::float32, {3, c.out_height, c.out_width}, {}}, params, 0);
      std::size_t index = 0;
      for (int plane = 0; plane < 3; ++plane) {
        for (std::int64_t y = 0; y < c.out_height; ++y) {
          for (std::int64_t x = 0; x < c.out_width; ++x, ++index) {
            const double value = expected_value(frame, c, 2 - plane, y, x, align);
            const double expected = (value / 255 - params.mean[plane]) / params.std[plane];
            ASSERT_NEAR(out[index], expected, 2e-6);  // float32 arithmetic on values up to 5
          }
        }
      }
    }
  });
}

TEST(Preprocess, MatchesTheDefinitionOnAwkwardSizes) {
  expect_definition(Align::kHalfPixel);
  expect_definition(Align::kCorners);
}

TEST(BilinearTap, CoversTheWholeRangeOfSizesWithoutOverflow) {
  const auto max = static_cast<std::uint32_t>(kMaxSide);
  for (const std::uint32_t source : {1u, 2u, max}) {
    for (const std::uint32_t target : {1u, 3u, max}) {
      const BilinearTap last = bilinear_tap(target - 1, source, target, Align::kHalfPixel);
      const double position = std::clamp((target - 0.5) * source / target - 0.5, 0.0, source - 1.0);
      EXPECT_NEAR(last.lower + static_cast<double>(last.t), position, 1e-6);
      EXPECT_LT(last.upper, source);
      const BilinearTap corner = bilinear_tap(target - 1, source, target, Align::kCorners);
      EXPECT_EQ(corner.lower, target > 1 ? source - 1 : 0);
      EXPECT_EQ(corner.t, 0.0f);
    }
  }
}

TEST(Preprocess, RefusesAZeroDeviation) {
  std::uint8_t pixel[3] = {};
  const PreprocessParams params{1, 1, {0, 0, 0}, {1, 0, 1}, false};
  EXPECT_THROW(preprocess_shape({pixel, DType::uint8, {1, 1, 3}, {}}, params), ArgumentError);
}

}  // namespace
}  // namespace zsseg
