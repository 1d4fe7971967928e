#include "zsseg/ops/merge_windows.h"

#include <gtest/gtest.h>

#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

using Floats = std::vector<float>;

TensorView view(Floats& data, const Shape& shape) {
  return {data.data(), DType::float32, shape, {}};
}

WindowPlaces two_places(int top, int left) {
  WindowPlaces places;
  places.count = 2;
  places.top[1] = top;
  places.left[1] = left;
  return places;
}

TEST(MergeWindows, SumsSharesOfWhatCoversACell) {
  constexpr std::int64_t kClasses = 3, kHeight = 5, kWidth = 18, kRows = 7, kColumns = 23;
  const WindowPlaces places = two_places(4, 9);  // reaches beyond the grid
  Floats logits(2 * kClasses * kHeight * kWidth), shares(kRows * kColumns);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = noise(static_cast<std::uint32_t>(i));
  }
  for (std::size_t i = 0; i < shares.size(); ++i) {
    shares[i] = noise(static_cast<std::uint32_t>(i + 5555));
  }
  const TensorView given = view(logits, {2, kClasses, kHeight, kWidth});
  const TensorView weights = view(shares, {kRows, kColumns});
  for_every_isa([&] {
    Floats out(kClasses * kRows * kColumns, 100.0f);
    for (const bool add : {false, true}) {
      const Floats before = add ? out : Floats(out.size(), 0.0f);
      merge_windows({given, weights, places, add}, view(out, {1, kClasses, kRows, kColumns}), 0);
      std::size_t index = 0;
      for (std::int64_t c = 0; c < kClasses; ++c) {
        for (std::int64_t y = 0; y < kRows; ++y) {
          for (std::int64_t x = 0; x < kColumns; ++x, ++index) {
            volatile float expected = before[index];
            for (int b = 0; b < 2; ++b) {
              const std::int64_t row = y - places.top[b], column = x - places.left[b];
              if (row >= 0 && row < kHeight && column >= 0 && column < kWidth) {
                const std::int64_t at = ((b * kClasses + c) * kHeight + row) * kWidth + column;
                volatile float product = shares[static_cast<std::size_t>(y * kColumns + x)] *
                                         logits[static_cast<std::size_t>(at)];
                expected = expected + product;
              }
            }
            ASSERT_EQ(out[index], expected) << c << ' ' << y << ' ' << x;
          }
        }
      }
    }
  });
}

TEST(MergeWindows, RefusesOtherNumbersOfPlacesAndOtherTypes) {
  Floats data(2 * 4);
  const TensorView logits = view(data, {2, 1, 2, 2}), shares = view(data, {2, 4});
  WindowPlaces places = two_places(0, 2);
  EXPECT_EQ(merge_windows_shape({logits, shares, places, false}), (Shape{1, 1, 2, 4}));
  places.count = 1;
  EXPECT_THROW(merge_windows_shape({logits, shares, places, false}), ArgumentError);
  const TensorView flat = view(data, {8});
  places.count = 2;
  EXPECT_THROW(merge_windows_shape({logits, flat, places, false}), ShapeError);
}

}  // namespace
}  // namespace zsseg
