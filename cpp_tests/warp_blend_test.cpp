#include "zsseg/ops/warp_blend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

using Floats = std::vector<float>;

struct Problem {
  std::int64_t batch, classes, height, width;
  Floats logits, past, flow, weight, out;

  Problem(std::int64_t images, std::int64_t num_classes, std::int64_t rows, std::int64_t columns)
      : batch(images), classes(num_classes), height(rows), width(columns) {
    logits.resize(static_cast<std::size_t>(batch * classes * cells()));
    past.resize(logits.size());
    for (std::size_t i = 0; i < logits.size(); ++i) {
      logits[i] = noise(static_cast<std::uint32_t>(i));
      past[i] = noise(static_cast<std::uint32_t>(i + 77777));
    }
    flow.assign(static_cast<std::size_t>(2 * batch * cells()), 0.0f);
    weight.assign(static_cast<std::size_t>(batch * cells()), 0.75f);
    out.assign(logits.size(), std::nanf(""));
  }

  std::int64_t cells() const { return height * width; }
  Shape shape() const { return {batch, classes, height, width}; }

  static TensorView view(Floats& data, const Shape& shape) {
    return {data.data(), DType::float32, shape, {}};
  }
  void run(Floats& into) {
    const TensorView logits_view = view(logits, shape());
    const TensorView past_view = view(past, shape());
    const TensorView flow_view = view(flow, {batch, height, width, 2});
    const TensorView weight_view = view(weight, {batch, height, width});
    warp_blend({logits_view, past_view, flow_view, weight_view}, view(into, shape()), 0);
  }
  float past_at(std::int64_t plane, std::int64_t y, std::int64_t x) const {
    return past[static_cast<std::size_t>((plane * height + y) * width + x)];
  }
};

// From the definition, in double precision but for positions, which are float32.
double expected_at(const Problem& p, std::int64_t plane, std::int64_t y, std::int64_t x) {
  const auto cell = static_cast<std::size_t>((plane / p.classes * p.height + y) * p.width + x);
  const double logit = p.logits[static_cast<std::size_t>((plane * p.height + y) * p.width + x)];
  const double from_x = static_cast<float>(x) + p.flow[2 * cell];
  const double from_y = static_cast<float>(y) + p.flow[2 * cell + 1];
  const auto outside = [](double at, std::int64_t size) {
    return !(at >= -0.5 && at <= static_cast<double>(size) - 0.5);
  };
  if (!(p.weight[cell] > 0.0f) || outside(from_x, p.width) || outside(from_y, p.height)) {
    return logit;
  }
  const double cx = std::fmin(std::fmax(from_x, 0.0), static_cast<double>(p.width - 1));
  const double cy = std::fmin(std::fmax(from_y, 0.0), static_cast<double>(p.height - 1));
  const auto left = static_cast<std::int64_t>(cx);
  const auto top = static_cast<std::int64_t>(cy);
  double past = 0.0;
  for (const std::int64_t dy : {0, 1}) {
    for (const std::int64_t dx : {0, 1}) {
      const double share_x =
          dx ? cx - static_cast<double>(left) : 1.0 - cx + static_cast<double>(left);
      const double share_y =
          dy ? cy - static_cast<double>(top) : 1.0 - cy + static_cast<double>(top);
      if (share_x * share_y > 0.0) {
        past += share_x * share_y * p.past_at(plane, top + dy, left + dx);
      }
    }
  }
  const double weight = std::fmin(p.weight[cell], 1.0f);
  return (1.0 - weight) * logit + weight * past;
}

TEST(WarpBlend, FollowsItsDefinition) {
  for_every_isa([] {
    for (const Shape& size : {Shape{1, 1, 1, 1}, Shape{1, 3, 1, 7}, Shape{2, 5, 11, 1},
                              Shape{2, 37, 13, 17}, Shape{1, 171, 32, 32}}) {
      Problem problem(size[0], size[1], size[2], size[3]);
      for (std::size_t i = 0; i < problem.flow.size(); ++i) {
        problem.flow[i] = 3.0f * noise(static_cast<std::uint32_t>(3 * i + 1));
      }
      for (std::size_t i = 0; i < problem.weight.size(); ++i) {
        problem.weight[i] = 1.5f * noise(static_cast<std::uint32_t>(5 * i + 2));  // some < 0, > 1
      }
      problem.run(problem.out);
      for (std::int64_t plane = 0, i = 0; plane < problem.batch * problem.classes; ++plane) {
        for (std::int64_t y = 0; y < problem.height; ++y) {
          for (std::int64_t x = 0; x < problem.width; ++x, ++i) {
            // Three mixes of numbers below 1, six roundings each of at most 2^-24.
            ASSERT_NEAR(problem.out[static_cast<std::size_t>(i)], expected_at(problem, plane, y, x),
                        2e-6)
                << i;
          }
        }
      }
    }
  });
}

TEST(WarpBlend, MayBeWrittenOverTheLogits) {
  Problem problem(2, 3, 5, 7);
  problem.flow.assign(problem.flow.size(), 0.3f);
  problem.run(problem.out);
  const Floats expected = problem.out;
  problem.run(problem.logits);
  EXPECT_EQ(problem.logits, expected);
}

TEST(WarpBlend, NothingOfThePastWhereItIsUnknown) {
  Problem problem(1, 2, 1, 6);
  problem.past.assign(problem.past.size(), std::nanf(""));
  const float infinity = std::numeric_limits<float>::infinity();
  problem.flow = {-0.51f, 0, infinity, 0, std::nanf(""), 0, 0, 0.51f, 0, 0, 0, 0};
  problem.weight = {1, 1, 1, 1, std::nanf(""), -1};
  problem.run(problem.out);
  EXPECT_EQ(problem.out, problem.logits);
}

TEST(WarpBlend, RefusesOtherSizesAndTypes) {
  Problem problem(1, 2, 4, 4);
  const TensorView logits = Problem::view(problem.logits, problem.shape());
  const TensorView flow = Problem::view(problem.flow, {1, 4, 4, 2});
  const TensorView weight = Problem::view(problem.weight, {1, 4, 4});
  const TensorView turned = Problem::view(problem.past, {1, 4, 4, 2});
  EXPECT_THROW(warp_blend_shape({logits, turned, flow, weight}), ShapeError);
  EXPECT_THROW(warp_blend_shape({logits, logits, weight, weight}), ShapeError);
  EXPECT_THROW(warp_blend_shape({logits, logits, flow, flow}), ShapeError);
  const TensorView wide{problem.past.data(), DType::float64, problem.shape(), {}};
  EXPECT_THROW(warp_blend_shape({logits, wide, flow, weight}), DTypeError);
}

TEST(WarpBlend, TakesNoImageButNotNoClassOrRow) {
  Problem problem(0, 3, 4, 4);
  problem.run(problem.out);
  Problem without_classes(1, 0, 4, 4);
  EXPECT_THROW(without_classes.run(without_classes.out), ShapeError);
  Problem without_rows(1, 2, 0, 4);
  EXPECT_THROW(without_rows.run(without_rows.out), ShapeError);
}

}  // namespace
}  // namespace zsseg
