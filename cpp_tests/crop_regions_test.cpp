#include "zsseg/ops/crop_regions.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

struct Scene {
  int masks, mask_height, mask_width, height, width;
  std::vector<float> image = filled(3 * height * width, 1);
  std::vector<float> logits = filled(masks * mask_height * mask_width, 70000);

  static std::vector<float> filled(int count, std::uint32_t seed) {
    std::vector<float> values;
    for (int i = 0; i < count; ++i) {
      values.push_back(noise(seed + static_cast<std::uint32_t>(i)));
    }
    return values;
  }
  TensorView image_view() { return {image.data(), DType::float32, {3, height, width}, {}}; }
  TensorView mask_view() {
    return {logits.data(), DType::float32, {masks, mask_height, mask_width}, {}};
  }

  // Bilinear in double precision; the tests keep away from logits near zero.
  double logit(int mask, int y, int x) const {
    const auto place = [](int index, int source, int target) {
      const double at = (index + 0.5) * source / target - 0.5;
      return std::min(std::max(at, 0.0), source - 1.0);
    };
    const double row = place(y, mask_height, height);
    const double column = place(x, mask_width, width);
    const int top = static_cast<int>(row), left = static_cast<int>(column);
    const int bottom = std::min(top + 1, mask_height - 1),
              right = std::min(left + 1, mask_width - 1);
    const auto value = [&](int r, int c) {
      return double{logits[static_cast<std::size_t>((mask * mask_height + r) * mask_width + c)]};
    };
    const double ty = row - top, tx = column - left;
    return (1 - ty) * ((1 - tx) * value(top, left) + tx * value(top, right)) +
           ty * ((1 - tx) * value(bottom, left) + tx * value(bottom, right));
  }
};

std::vector<std::int32_t> bound(Scene& scene) {
  std::vector<std::int32_t> boxes(static_cast<std::size_t>(5 * scene.masks), -77);
  const TensorView out{boxes.data(), DType::int32, {scene.masks, 5}, {}};
  mask_boxes(scene.mask_view(), out, scene.height, scene.width, 0);
  return boxes;
}

TEST(MaskBoxes, AreTheBoundsOfThePixelsInside) {
  for_every_isa([] {
    for (const int side : {1, 5, 16}) {
      Scene scene{4, side, side + 2, 31, 47};
      const std::vector<std::int32_t> boxes = bound(scene);
      for (int mask = 0; mask < scene.masks; ++mask) {
        std::vector<int> rows, columns;
        for (int y = 0; y < scene.height; ++y) {
          for (int x = 0; x < scene.width; ++x) {
            if (scene.logit(mask, y, x) > 0) {
              rows.push_back(y);
              columns.push_back(x);
            }
          }
        }
        const std::int32_t* box = &boxes[static_cast<std::size_t>(5 * mask)];
        EXPECT_NEAR(box[4], static_cast<int>(rows.size()), 1);
        if (!rows.empty() && rows.front() < rows.back()) {
          EXPECT_EQ(box[1], rows.front());
          EXPECT_EQ(box[3], rows.back());
          EXPECT_EQ(box[0], *std::min_element(columns.begin(), columns.end()));
          EXPECT_EQ(box[2], *std::max_element(columns.begin(), columns.end()));
        }
      }
    }
  });
}

TEST(MaskBoxes, OfEmptyAndThinMasksAreTheCanvas) {
  for_every_isa([] {
    Scene scene{2, 3, 4, 3, 4};
    std::fill(scene.logits.begin(), scene.logits.end(), -1.0f);
    for (int x = 0; x < 4; ++x) {
      scene.logits[static_cast<std::size_t>(12 + 4 + x)] = 1.0f;  // the second mask's middle row
    }
    const std::vector<std::int32_t> expected = {0, 0, 4, 3, 0, 0, 0, 4, 3, 4};
    EXPECT_EQ(bound(scene), expected);
  });
}

// RoIAlign by its definition, in double precision.
double expected_crop(const Scene& scene, const std::int32_t* box, int mask, bool masked, int plane,
                     int row, int column, int side) {
  const auto samples = [&](int start, int end, int bin, int size) {
    const int count = std::max(1, (end - start + side - 1) / side);
    const double length = static_cast<double>(end - start) / side;
    std::vector<double> at;
    for (int k = 0; k < count; ++k) {
      at.push_back(std::min(std::max(start - 0.5 + bin * length + (k + 0.5) * length / count, 0.0),
                            size - 1.0));
    }
    return at;
  };
  double sum = 0;
  const auto rows = samples(box[1], box[3], row, scene.height);
  const auto columns = samples(box[0], box[2], column, scene.width);
  for (const double y : rows) {
    for (const double x : columns) {
      for (int corner = 0; corner < 4; ++corner) {
        const int r = static_cast<int>(y) + (corner < 2 ? 0 : 1),
                  c = static_cast<int>(x) + corner % 2;
        const double weight = (1 - std::fabs(y - r)) * (1 - std::fabs(x - c));
        if (weight > 0 && r < scene.height && c < scene.width &&
            (!masked || scene.logit(mask, r, c) > 0)) {
          const int at = (plane * scene.height + r) * scene.width + c;
          sum += weight * (scene.image[static_cast<std::size_t>(at)] * 2.0 + 0.5);
        }
      }
    }
  }
  return sum / static_cast<double>(rows.size() * columns.size());
}

TEST(CropRegions, MatchTheDefinition) {
  for_every_isa([] {
    for (const int side : {1, 9, 40}) {
      Scene scene{3, 8, 12, 61, 97};
      std::vector<std::int32_t> regions = {2, 0, 1};
      std::vector<std::int32_t> boxes = {0, 0, 97, 61, 3, 5, 4, 6, 10, 0, 96, 60};
      for (const regions::Style style : {regions::Style::kCropMask, regions::Style::kCrop}) {
        CropRegionsParams params{side, style, {2, 2, 2}, {0.5, 0.5, 0.5}};
        std::vector<float> crops(static_cast<std::size_t>(9 * side * side),
                                 std::numeric_limits<float>::quiet_NaN());
        crop_regions(scene.image_view(), scene.mask_view(), {regions.data(), DType::int32, {3}, {}},
                     {boxes.data(), DType::int32, {3, 4}, {}},
                     {crops.data(), DType::float32, {3, 3, side, side}, {}}, params, 0);
        std::size_t at = 0;
        for (int region = 0; region < 3; ++region) {
          for (int plane = 0; plane < 3; ++plane) {
            for (int row = 0; row < side; ++row) {
              for (int column = 0; column < side; ++column, ++at) {
                const double expected =
                    expected_crop(scene, &boxes[static_cast<std::size_t>(4 * region)],
                                  regions[static_cast<std::size_t>(region)],
                                  style == regions::Style::kCropMask, plane, row, column, side);
                // float32 sample positions are off by 1e-5 pixels of a noisy picture
                ASSERT_NEAR(crops[at], expected, 2e-4);
              }
            }
          }
        }
      }
    }
  });
}

TEST(CropRegions, RefuseWhatTheyWouldReadOutside) {
  Scene scene{2, 4, 4, 16, 16};
  std::vector<std::int32_t> region = {2};
  std::vector<std::int32_t> box = {0, 0, 16, 16};
  std::vector<float> crops(3);
  const CropRegionsParams params{1, regions::Style::kCrop, {1, 1, 1}, {0, 0, 0}};
  const auto run = [&] {
    crop_regions(scene.image_view(), scene.mask_view(), {region.data(), DType::int32, {1}, {}},
                 {box.data(), DType::int32, {1, 4}, {}},
                 {crops.data(), DType::float32, {1, 3, 1, 1}, {}}, params, 0);
  };
  EXPECT_THROW(run(), ArgumentError);
  region = {1};
  EXPECT_NO_THROW(run());
  box = {0, 0, 17, 16};
  EXPECT_THROW(run(), ArgumentError);
}

}  // namespace
}  // namespace zsseg
