#include "zsseg/ops/label_regions.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

struct Plane {
  int height, width;
  std::vector<double> values;

  // Half-pixel bilinear in double precision.
  Plane resized(int to_height, int to_width) const {
    Plane result{to_height, to_width, {}};
    const auto place = [](int index, int source, int target) {
      return std::min(std::max((index + 0.5) * source / target - 0.5, 0.0), source - 1.0);
    };
    for (int y = 0; y < to_height; ++y) {
      for (int x = 0; x < to_width; ++x) {
        const double row = place(y, height, to_height), column = place(x, width, to_width);
        const int top = static_cast<int>(row), left = static_cast<int>(column);
        const int bottom = std::min(top + 1, height - 1), right = std::min(left + 1, width - 1);
        const double ty = row - top, tx = column - left;
        const auto at = [&](int r, int c) {
          return values[static_cast<std::size_t>(r * width + c)];
        };
        result.values.push_back((1 - ty) * ((1 - tx) * at(top, left) + tx * at(top, right)) +
                                ty * ((1 - tx) * at(bottom, left) + tx * at(bottom, right)));
      }
    }
    return result;
  }
};

struct Vote {
  int masks, classes, mask_side, canvas_height, canvas_width, height, width;
  std::vector<float> logits = filled(masks * mask_side * mask_side, 1);
  std::vector<float> scores = filled(classes * masks, 900000);
  std::vector<float> bias = filled(classes, 5000000);
  std::vector<std::uint8_t> labels = std::vector<std::uint8_t>(count(), 0xcd);
  std::vector<float> winners = std::vector<float>(count(), std::numeric_limits<float>::quiet_NaN());

  static std::vector<float> filled(int count, std::uint32_t seed) {
    std::vector<float> values;
    for (int i = 0; i < count; ++i) {
      values.push_back(0.4f * noise(seed + static_cast<std::uint32_t>(i)));
    }
    return values;
  }
  std::size_t count() const { return static_cast<std::size_t>(height * width); }

  void run(bool enough_memory = true) {
    const TensorView lowered{bias.data(), DType::float32, {classes}, {}};
    const LabelRegionsInputs inputs{
        {logits.data(), DType::float32, {masks, mask_side, mask_side}, {}},
        {scores.data(), DType::float32, {classes, masks}, {}},
        &lowered};
    LabelRegionsParams params;
    params.canvas_height = canvas_height;
    params.canvas_width = canvas_width;
    params.height = height;
    params.width = width;
    const std::size_t bytes = label_regions_workspace_bytes(inputs, params);
    std::vector<float> memory(bytes / sizeof(float) + 16, std::numeric_limits<float>::quiet_NaN());
    const auto misaligned = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
    float* aligned = memory.data() + (misaligned == 0 ? 0 : (64 - misaligned) / sizeof(float));
    const std::int64_t given = enough_memory ? static_cast<std::int64_t>(bytes) : 64;
    const TensorView workspace{aligned, DType::uint8, {given}, {}};
    const TensorView winner_view{winners.data(), DType::float32, {height, width}, {}};
    label_regions(inputs, {labels.data(), DType::uint8, {height, width}, {}}, &winner_view,
                  workspace, params, 0);
  }

  std::vector<Plane> maps() const {
    std::vector<Plane> sums(static_cast<std::size_t>(classes));
    for (int c = 0; c < classes; ++c) {
      Plane canvas{
          canvas_height, canvas_width,
          std::vector<double>(static_cast<std::size_t>(canvas_height * canvas_width), 0.0)};
      for (int q = 0; q < masks; ++q) {
        const auto begin = logits.begin() + q * mask_side * mask_side;
        const Plane mask{mask_side, mask_side, {begin, begin + mask_side * mask_side}};
        const Plane upsampled = mask.resized(canvas_height, canvas_width);
        for (std::size_t i = 0; i < canvas.values.size(); ++i) {
          canvas.values[i] += scores[static_cast<std::size_t>(c * masks + q)] /
                              (1.0 + std::exp(-upsampled.values[i]));
        }
      }
      sums[static_cast<std::size_t>(c)] = canvas.resized(height, width);
    }
    return sums;
  }

  void expect_correct() const {
    const std::vector<Plane> sums = maps();
    for (std::size_t pixel = 0; pixel < count(); ++pixel) {
      const auto lowered = [&](std::size_t c) { return sums[c].values[pixel] - bias[c]; };
      std::size_t best = 0;
      for (std::size_t c = 1; c < sums.size(); ++c) {
        best = lowered(c) > lowered(best) ? c : best;
      }
      const std::size_t found = labels[pixel];
      ASSERT_LT(found, sums.size());
      ASSERT_NEAR(lowered(found), lowered(best), 2e-5);  // float32 sums of up to 33 terms
      ASSERT_NEAR(winners[pixel], std::min(1.0, sums[found].values[pixel]), 2e-5);
    }
  }
};

TEST(LabelRegions, MatchTheDefinitionOnAwkwardSizes) {
  for_every_isa([] {
    for (const int classes : {1, 7}) {
      for (const int masks : {1, 33}) {
        for (const int side : {1, 5}) {
          Vote vote{masks, classes, side, 19, 37, 23, 41};
          vote.run();
          vote.expect_correct();
        }
      }
    }
    Vote smaller{5, 3, 8, 40, 40, 7, 3};
    smaller.run();
    smaller.expect_correct();
    Vote single{2, 2, 1, 1, 1, 1, 1};
    single.run();
    single.expect_correct();
  });
}

TEST(LabelRegions, RefuseTooSmallAWorkspace) {
  Vote vote{5, 3, 8, 40, 40, 7, 3};
  try {
    vote.run(false);
    FAIL() << "expected a ShapeError";
  } catch (const ShapeError& error) {
    EXPECT_NE(std::string(error.what()).find("workspace: expected at least"), std::string::npos);
  }
}

}  // namespace
}  // namespace zsseg
