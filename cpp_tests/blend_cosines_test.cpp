#include "zsseg/ops/blend_cosines.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

using Floats = std::vector<float>;

struct Problem {
  Shape shape;
  Floats logits, cosines, weights, shares;

  explicit Problem(const Shape& sizes) : shape(sizes) {
    const auto count = static_cast<std::size_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
    for (std::size_t i = 0; i < count; ++i) {
      logits.push_back(6.0f * noise(static_cast<std::uint32_t>(i)));
      cosines.push_back(10.0f * noise(static_cast<std::uint32_t>(i + 77777)));
    }
    for (std::int64_t c = 0; c < sizes[1]; ++c) {
      weights.push_back(0.25f * static_cast<float>(c % 5));
      shares.push_back(c % 4 == 3 ? 0.0f : 1.0f / static_cast<float>(c % 3 + 1));
    }
  }

  std::int64_t cells() const { return shape[2] * shape[3]; }
  std::size_t at(std::int64_t image, std::int64_t c, std::int64_t cell) const {
    return static_cast<std::size_t>((image * shape[1] + c) * cells() + cell);
  }

  void run(Floats& out, blend::Activation activation) {
    const auto view = [](Floats& data, const Shape& sizes) {
      return TensorView{data.data(), DType::float32, sizes, {}};
    };
    const TensorView logit_view = view(logits, shape);
    const TensorView cosine_view = view(cosines, shape);
    const TensorView weight_view = view(weights, {shape[1]});
    const TensorView share_view = view(shares, {shape[1]});
    blend_cosines({logit_view, cosine_view, weight_view, share_view, activation}, view(out, shape),
                  0);
  }

  // The probability by the definition, in double precision.
  double expected(std::int64_t image, std::int64_t c, std::int64_t cell,
                  blend::Activation activation) const {
    double masks = 0.0, near = 0.0;
    for (std::int64_t other = 0; other < shape[1]; ++other) {
      const double share = shares[static_cast<std::size_t>(other)];
      masks += share > 0.0 ? std::exp(static_cast<double>(logits[at(image, other, cell)])) : 0.0;
      near += share * std::exp(static_cast<double>(cosines[at(image, other, cell)]));
    }
    const double logit = logits[at(image, c, cell)];
    const double mask = activation == blend::Activation::kSoftmax ? std::exp(logit) / masks
                                                                  : 1.0 / (1.0 + std::exp(-logit));
    const double cosine = std::exp(static_cast<double>(cosines[at(image, c, cell)])) / near;
    const double weight = weights[static_cast<std::size_t>(c)];
    return std::fmin(std::pow(mask, 1.0 - weight) * std::pow(cosine, weight), 1.0 - 1e-6);
  }
};

TEST(BlendCosines, EqualsTheDefinition) {
  for_every_isa([] {
    for (const auto activation : {blend::Activation::kSigmoid, blend::Activation::kSoftmax}) {
      Problem problem({2, 19, 7, 13});
      Floats out(problem.logits.size(), std::nanf(""));
      problem.run(out, activation);
      for (std::int64_t image = 0; image < 2; ++image) {
        for (std::int64_t c = 0; c < 19; ++c) {
          for (std::int64_t cell = 0; cell < problem.cells(); ++cell) {
            const double found =
                1.0 / (1.0 + std::exp(-static_cast<double>(out[problem.at(image, c, cell)])));
            ASSERT_NEAR(found, problem.expected(image, c, cell, activation), 1e-5);
          }
        }
      }
    }
  });
}

TEST(BlendCosines, LeavesWhatIsNoNumberOrAbsent) {
  Problem problem({1, 3, 1, 4});
  const float kept[4] = {NAN, INFINITY, -INFINITY, -3e20f};
  for (std::int64_t cell = 0; cell < 4; ++cell) {
    problem.logits[problem.at(0, 1, cell)] = kept[cell];
  }
  Floats out(problem.logits.size(), 0.0f);
  problem.run(out, blend::Activation::kSigmoid);
  EXPECT_TRUE(std::isnan(out[problem.at(0, 1, 0)]));
  for (std::int64_t cell = 1; cell < 4; ++cell) {
    EXPECT_EQ(out[problem.at(0, 1, cell)], kept[cell]);
    EXPECT_TRUE(std::isfinite(out[problem.at(0, 0, cell)]));
  }
}

TEST(BlendCosines, WritesInPlace) {
  Problem problem({1, 5, 3, 3});
  Floats expected(problem.logits.size());
  problem.run(expected, blend::Activation::kSigmoid);
  problem.run(problem.logits, blend::Activation::kSigmoid);
  EXPECT_EQ(problem.logits, expected);
}

TEST(BlendCosines, RefusesOtherSizes) {
  Problem problem({1, 3, 2, 2});
  Floats out(problem.logits.size());
  problem.shares.pop_back();
  const TensorView logits{problem.logits.data(), DType::float32, problem.shape, {}};
  const TensorView weights{problem.weights.data(), DType::float32, {3}, {}};
  const TensorView shares{problem.shares.data(), DType::float32, {2}, {}};
  const TensorView result{out.data(), DType::float32, problem.shape, {}};
  EXPECT_THROW(
      blend_cosines({logits, logits, weights, shares, blend::Activation::kSigmoid}, result, 0),
      ShapeError);
}

}  // namespace
}  // namespace zsseg
