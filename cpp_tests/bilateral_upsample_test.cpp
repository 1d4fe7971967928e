#include "zsseg/ops/bilateral_upsample.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"
#include "zsseg/ops/bilateral_upsample_math.h"

namespace zsseg {
namespace {

using Floats = std::vector<float>;

TensorView view(Floats& data, const Shape& shape) {
  return {data.data(), DType::float32, shape, {}};
}

float cell_mean(const float* plane, int width, bilateral::CellPoints rows,
                bilateral::CellPoints columns) {
  float sum = 0.0f;
  for (int x = columns.begin; x < columns.end; ++x) {
    float column = 0.0f;
    for (int y = rows.begin; y < rows.end; ++y) {
      column += plane[y * width + x];
    }
    sum += column;
  }
  return sum / static_cast<float>((rows.end - rows.begin) * (columns.end - columns.begin));
}

TEST(BilateralUpsample, WeighsTheFourCellsAroundAPointByTheirColours) {
  constexpr int kClasses = 3, kRows = 5, kColumns = 7, kScale = 5;
  for (const Align align : {Align::kHalfPixel, Align::kCorners}) {
    const bool corners = align == Align::kCorners;
    const int height = corners ? (kRows - 1) * kScale + 1 : kRows * kScale;
    const int width = corners ? (kColumns - 1) * kScale + 1 : kColumns * kScale;
    const auto plane = static_cast<std::size_t>(height * width);
    Floats logits(kClasses * kRows * kColumns), guide(3 * plane), out(kClasses * plane);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      logits[i] = noise(static_cast<std::uint32_t>(i));
    }
    for (std::size_t i = 0; i < guide.size(); ++i) {
      guide[i] = noise(static_cast<std::uint32_t>(i + 999));
    }
    const auto rows = upsample::make_axis(kRows, height, align);
    const auto columns = upsample::make_axis(kColumns, width, align);
    for_every_isa([&] {
      bilateral_upsample({view(logits, {1, kClasses, kRows, kColumns}),
                          view(guide, {1, 3, height, width}), kScale, 1.5f, align},
                         view(out, {1, kClasses, height, width}), 0);
      for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x) {
          const auto row = upsample::cell_position(y, rows);
          const auto column = upsample::cell_position(x, columns);
          float alike[4];
          for (int k = 0; k < 4; ++k) {
            const auto of_rows = bilateral::cell_points(row.cell + k / 2, kScale, height, align);
            const auto of_columns =
                bilateral::cell_points(column.cell + k % 2, kScale, width, align);
            float apart[3];
            for (std::size_t channel = 0; channel < 3; ++channel) {
              const float* from = guide.data() + channel * plane;
              apart[channel] = from[y * width + x] - cell_mean(from, width, of_rows, of_columns);
            }
            alike[k] = bilateral::likeness(apart[0], apart[1], apart[2], 1.0f / (1.5f * 1.5f));
          }
          const auto w = bilateral::weights(row.t, column.t, alike);
          for (int c = 0; c < kClasses; ++c) {
            const float* at = logits.data() + (c * kRows + row.cell) * kColumns + column.cell;
            const float expected = bilateral::blend(w.of[0], at[0], w.of[1], at[1], w.of[2],
                                                    at[kColumns], w.of[3], at[kColumns + 1]);
            ASSERT_EQ(out[static_cast<std::size_t>((c * height + y) * width + x)], expected)
                << c << ' ' << y << ' ' << x;
          }
        }
      }
    });
  }
}

TEST(BilateralUpsample, RefusesOtherSizesAndSettings) {
  Floats data(3 * 9 * 9);
  const TensorView logits = view(data, {1, 1, 3, 3}), guide = view(data, {1, 3, 9, 9});
  const Align align = Align::kHalfPixel;
  EXPECT_EQ(bilateral_upsample_shape({logits, guide, 3, 0.2f, align}), (Shape{1, 1, 9, 9}));
  EXPECT_THROW(bilateral_upsample_shape({logits, guide, 5, 0.2f, align}), ShapeError);
  EXPECT_THROW(bilateral_upsample_shape({logits, guide, 3, 0.2f, Align::kCorners}), ShapeError);
  for (const int scale : {-3, 0, 1, 4, 11}) {
    EXPECT_THROW(bilateral_upsample_shape({logits, guide, scale, 0.2f, align}), ArgumentError);
  }
  for (const float reach : {0.0f, -1.0f, 17.0f, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_THROW(bilateral_upsample_shape({logits, guide, 3, reach, align}), ArgumentError);
  }
  const TensorView wide = view(data, {1, 1, 1, 10923});
  EXPECT_THROW(bilateral_upsample_shape({wide, guide, 3, 0.2f, align}), ShapeError);
}

}  // namespace
}  // namespace zsseg
