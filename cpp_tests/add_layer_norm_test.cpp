#include "zsseg/ops/add_layer_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"
#include "zsseg/half.h"

namespace zsseg {
namespace {

using Floats = std::vector<float>;

struct Problem {
  std::int64_t rows, width, norms, total_after = 0, x_width = width;
  Floats x, y, scale, shift, out, total;
  float eps[kMaxNorms] = {1e-5f, 1e-6f};

  Problem(std::int64_t num_rows, std::int64_t columns, std::int64_t num_norms)
      : rows(num_rows), width(columns), norms(num_norms) {
    const auto fill = [](Floats& values, std::int64_t count, std::uint32_t from) {
      for (std::int64_t i = 0; i < count; ++i) {
        values.push_back(noise(from + static_cast<std::uint32_t>(i)));
      }
    };
    fill(x, rows * width, 1);
    fill(y, rows * width, 100001);
    fill(scale, norms * width, 200003);
    fill(shift, norms * width, 300007);
    out.assign(x.size(), std::nanf(""));
    total = out;
  }

  static TensorView view(Floats& data, const Shape& shape) {
    return {data.data(), DType::float32, shape, {}};
  }
  void run(bool with_total = true) {
    const Shape shape{rows, width}, weights{norms, width};
    const TensorView views[] = {view(x, {rows, x_width}), view(y, shape), view(scale, weights),
                                view(shift, weights), view(out, shape)};
    AddLayerNormArgs args{views[0], views[1], views[2], views[3], {eps[0], eps[1]}, total_after};
    add_layer_norm(args, {views[4], with_total ? view(total, shape) : TensorView{}}, 0);
  }

  // One row by the definition, in double precision.
  std::vector<double> expected(std::int64_t row) const {
    std::vector<double> values;
    for (std::int64_t i = 0; i < width; ++i) {
      const auto at = static_cast<std::size_t>(row * width + i);
      values.push_back(x[at] + y[at]);
    }
    for (std::int64_t norm = 0; norm < norms; ++norm) {
      double mean = 0.0, variance = 0.0;
      for (const double value : values) {
        mean += value / static_cast<double>(width);
      }
      for (const double value : values) {
        variance += (value - mean) * (value - mean) / static_cast<double>(width);
      }
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t at = static_cast<std::size_t>(norm * width) + i;
        values[i] = (values[i] - mean) / std::sqrt(variance + eps[norm]) * scale[at] + shift[at];
      }
    }
    return values;
  }
};

TEST(AddLayerNorm, FollowsItsDefinition) {
  for_every_isa([] {
    for (const std::int64_t norms : {1, 2}) {
      for (const Shape& size : {Shape{1, 2}, Shape{5, 37}, Shape{131, 768}, Shape{3, 2048}}) {
        Problem problem(size[0], size[1], norms);
        problem.run();
        for (std::int64_t row = 0, i = 0; row < problem.rows; ++row) {
          for (const double expected : problem.expected(row)) {
            const auto at = static_cast<std::size_t>(i++);
            ASSERT_EQ(problem.total[at], problem.x[at] + problem.y[at]);
            ASSERT_NEAR(problem.out[at], expected, 2e-5) << at;  // a few roundings of numbers to 4
          }
        }
      }
    }
  });
}

TEST(AddLayerNorm, GivesTheFirstNormAsTheTotal) {
  Problem both(5, 37, 2), first(5, 37, 1);
  both.total_after = 1;
  first.scale.assign(both.scale.begin(), both.scale.begin() + 37);
  first.shift.assign(both.shift.begin(), both.shift.begin() + 37);
  first.run();
  both.run();
  EXPECT_EQ(both.total, first.out);
  both.total_after = 2;
  EXPECT_THROW(both.run(), ArgumentError);
}

TEST(AddLayerNorm, ReadsTheFirstColumnsOfWiderRows) {
  Problem plain(5, 37, 1), cut(5, 37, 1);
  for (std::size_t row = 0; row < 5; ++row) {
    const auto place = cut.x.begin() + static_cast<std::ptrdiff_t>(row * 40 + 37);
    cut.x.insert(place, 3, std::nanf(""));
  }
  cut.x_width = 40;
  for_every_isa([&] {
    plain.run();
    cut.run();
    EXPECT_EQ(cut.out, plain.out);
    EXPECT_EQ(cut.total, plain.total);
  });
}

TEST(AddLayerNorm, WritesNoTotalWhereNoneIsGiven) {
  Problem with(3, 5, 1), without(3, 5, 1);
  with.run();
  without.run(false);
  EXPECT_EQ(with.out, without.out);
  EXPECT_TRUE(std::isnan(without.total[0]));
}

TEST(AddLayerNorm, TakesEqualNumbersAndNoRow) {
  Problem equal(1, 4, 1);
  equal.x.assign(4, 3.0f);
  equal.y.assign(4, 1.0f);
  equal.run();
  EXPECT_EQ(equal.out, equal.shift);
  Problem empty(0, 4, 1);
  empty.run();
}

TEST(AddLayerNorm, RefusesOtherSizesAndTypes) {
  Floats data(6000, 0.0f);
  const TensorView x = Problem::view(data, {2, 4}), row = Problem::view(data, {1, 4});
  EXPECT_THROW(add_layer_norm_shape({x, row, row, row, {}}), ShapeError);
  EXPECT_THROW(add_layer_norm_shape({x, x, x, row, {}}), ShapeError);
  const TensorView narrow = Problem::view(data, {2, 3});
  EXPECT_THROW(add_layer_norm_shape({narrow, x, row, row, {}}), ShapeError);
  const TensorView three = Problem::view(data, {3, 4});
  EXPECT_THROW(add_layer_norm_shape({x, x, three, three, {}}), ShapeError);
  const TensorView wide = Problem::view(data, {1, kMaxNormWidth + 1});
  EXPECT_THROW(add_layer_norm_shape({wide, wide, wide, wide, {}}), ShapeError);
  const TensorView half{data.data(), DType::float16, {2, 4}, {}};
  EXPECT_THROW(add_layer_norm_shape({x, half, row, row, {}}), DTypeError);
}

}  // namespace
}  // namespace zsseg
