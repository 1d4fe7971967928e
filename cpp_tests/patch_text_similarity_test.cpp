#include "zsseg/ops/patch_text_similarity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "every_isa.h"
#include "zsseg/half.h"

namespace zsseg {
namespace {

struct Rows {
  std::vector<float> values;
  std::vector<Half> halves;

  Rows(std::int64_t count, std::uint32_t seed) {
    for (std::int64_t i = 0; i < count; ++i) {
      halves.push_back(float_to_half(noise(seed + static_cast<std::uint32_t>(i))));
      values.push_back(half_to_float(halves.back()));  // both dtypes hold the same numbers
    }
  }
  TensorView view(DType dtype, const Shape& shape) {
    void* data = dtype == DType::float16 ? static_cast<void*>(halves.data()) : values.data();
    return {data, dtype, shape, {}};
  }
};

double cosine(const float* a, const float* b, std::int64_t depth) {
  double dot = 0, aa = 0, bb = 0;
  for (std::int64_t k = 0; k < depth; ++k) {
    dot += static_cast<double>(a[k]) * b[k];
    aa += static_cast<double>(a[k]) * a[k];
    bb += static_cast<double>(b[k]) * b[k];
  }
  return dot / std::sqrt(aa * bb);
}

void expect_matches(std::int64_t classes, std::int64_t patches, std::int64_t depth, DType patch,
                    DType text) {
  const std::int64_t batch = 2;
  Rows patch_rows(batch * patches * depth, 1);
  Rows text_rows(batch * classes * depth, 77777);
  std::vector<float> out(static_cast<std::size_t>(batch * classes * patches),
                         std::numeric_limits<float>::quiet_NaN());
  patch_text_similarity(patch_rows.view(patch, {batch, patches, depth}),
                        text_rows.view(text, {batch, classes, depth}),
                        {out.data(), DType::float32, {batch, classes, patches}, {}},
                        PatchTextSimilarityParams{3.0, true}, 0);
  std::size_t index = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t c = 0; c < classes; ++c) {
      for (std::int64_t n = 0; n < patches; ++n, ++index) {
        const double expected =
            3.0 * cosine(&text_rows.values[static_cast<std::size_t>((b * classes + c) * depth)],
                         &patch_rows.values[static_cast<std::size_t>((b * patches + n) * depth)],
                         depth);
        ASSERT_NEAR(out[index], expected, 2e-6);  // 512-term float32 dots of unit rows, times 3
      }
    }
  }
}

TEST(PatchTextSimilarity, MatchesTheDefinitionOnAwkwardSizes) {
  for_every_isa([] {
    for (const std::int64_t classes : {1, 13, 20}) {
      for (const std::int64_t patches : {1, 67}) {
        for (const std::int64_t depth : {1, 31, 512}) {
          expect_matches(classes, patches, depth, DType::float32, DType::float32);
          expect_matches(classes, patches, depth, DType::float16, DType::float16);
          expect_matches(classes, patches, depth, DType::float16, DType::float32);
        }
      }
    }
  });
}

TEST(PatchTextSimilarity, ARowOfZerosIsSimilarToNothing) {
  for_every_isa([] {
    std::vector<float> patches(9, 0.0f);
    std::vector<float> text(9, 1.0f);
    float out = std::numeric_limits<float>::quiet_NaN();
    patch_text_similarity({patches.data(), DType::float32, {1, 1, 9}, {}},
                          {text.data(), DType::float32, {1, 9}, {}},
                          {&out, DType::float32, {1, 1, 1}, {}}, PatchTextSimilarityParams{}, 0);
    EXPECT_EQ(out, 0.0f);
  });
}

}  // namespace
}  // namespace zsseg
