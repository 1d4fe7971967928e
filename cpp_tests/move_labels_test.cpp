#include "zsseg/ops/move_labels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

constexpr std::int64_t kSide = 16;

// A bright block of 6 rows and `width` columns, first at column 3, then `by` further right.
struct Scene {
  explicit Scene(int by) : start(3 * kSide * kSide, 20), now(start), flow(2 * kSide * kSide, 0.0f) {
    for (std::int64_t y = 4; y < 10; ++y) {
      for (std::int64_t x = 3; x < 9; ++x) {
        for (int channel = 0; channel < 3; ++channel) {
          start[3 * (y * kSide + x) + channel] = 200;
          now[3 * (y * kSide + x + by) + channel] = 200;
        }
        flow[2 * (y * kSide + x + by)] = static_cast<float>(-by);
      }
    }
  }

  template <typename Label>
  std::vector<Label> moved(const std::vector<Label>& labels, std::int64_t height,
                           std::int64_t width, const MoveLimits& limits) {
    constexpr DType kType = sizeof(Label) == 1 ? DType::uint8 : DType::uint16;
    std::vector<Label> out(labels.size(), 99);
    std::vector<float> taken(flow.size());
    const Shape small{kSide, kSide, 3}, flows{kSide, kSide, 2};
    auto* from = const_cast<Label*>(labels.data());
    move_labels({{from, kType, {height, width}, {}},
                 {flow.data(), DType::float32, flows, {}},
                 {},
                 {start.data(), DType::uint8, small, {}},
                 {now.data(), DType::uint8, small, {}},
                 {out.data(), kType, {height, width}, {}},
                 {taken.data(), DType::float32, flows, {}}},
                limits);
    return out;
  }

  std::vector<std::uint8_t> start, now;
  std::vector<float> flow;
};

TEST(MoveLabels, FollowTheFlowWhereItExplainsTheFrame) {
  for_every_isa([] {
    for (const std::int64_t scale : {1, 3, 80}) {  // 80: a large frame, in squares
      const std::int64_t side = kSide * scale;
      std::vector<std::uint16_t> labels(side * side, 1);
      for (std::int64_t y = 4 * scale; y < 10 * scale; ++y) {
        std::fill_n(labels.begin() + y * side + 3 * scale, 6 * scale, std::uint16_t{300});
      }
      const auto out = Scene(4).moved(labels, side, side, {3, 255, 255});
      const std::int64_t middle = 7 * scale * side;
      EXPECT_EQ(out[middle + 11 * scale], 300);  // where the block is now
      EXPECT_EQ(out[middle + 14 * scale], 1);
      EXPECT_EQ(out[1 * scale * side + 5 * scale], 1);
    }
  });
}

TEST(MoveLabels, StayAtRestAndAreUnknownWhereNothingExplainsTheFrame) {
  for_every_isa([] {
    std::vector<std::uint8_t> labels(7 * 5);
    for (std::size_t i = 0; i < labels.size(); ++i) {
      labels[i] = static_cast<std::uint8_t>(i);
    }
    EXPECT_EQ(Scene(0).moved(labels, 7, 5, {3, 60, 20}), labels);
    Scene other(0);
    std::fill(other.now.begin(), other.now.end(), std::uint8_t{255});
    const auto lost = other.moved(labels, 7, 5, {3, 60, 20});
    EXPECT_EQ(lost[0], 255);
    EXPECT_EQ(other.moved(labels, 7, 5, {3, 255, 255}), labels);
    std::fill(other.flow.begin(), other.flow.end(), std::nanf(""));  // no place, and no crash
    EXPECT_EQ(other.moved(labels, 7, 5, {3, 255, 255}), labels);
  });
}

TEST(MoveLabels, AreRefusedWhereShapesDiffer) {
  Scene scene(0);
  std::vector<std::uint8_t> labels(4, 0);
  std::vector<float> taken(scene.flow.size());
  const Shape small{kSide, kSide, 3}, flows{kSide, kSide, 2};
  MoveLabels arrays{{labels.data(), DType::uint8, {2, 2}, {}},
                    {scene.flow.data(), DType::float32, flows, {}},
                    {},
                    {scene.start.data(), DType::uint8, small, {}},
                    {scene.now.data(), DType::uint8, {kSide, kSide - 1, 3}, {}},
                    {labels.data(), DType::uint8, {2, 2}, {}},
                    {taken.data(), DType::float32, flows, {}}};
  EXPECT_THROW(move_labels(arrays, {}), ShapeError);
  arrays.start.shape = arrays.now.shape = {2, 2, 3};
  EXPECT_THROW(move_labels(arrays, {}), ArgumentError);
  arrays.labels.dtype = DType::float32;
  EXPECT_THROW(move_labels(arrays, {}), DTypeError);
}

}  // namespace
}  // namespace zsseg
