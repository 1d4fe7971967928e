#include "zsseg/ops/relationship_descriptor.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "every_isa.h"

namespace zsseg {
namespace {

struct Problem {
  std::int64_t batch, classes, outputs, depth;
  std::vector<float> cls = filled(batch * depth, 1);
  std::vector<float> text = filled(classes * depth, 5000);
  std::vector<float> weight = filled(2 * outputs * depth, 90000);
  std::vector<float> bias = filled(outputs, 700000);
  std::vector<float> out = std::vector<float>(static_cast<std::size_t>(batch * classes * outputs),
                                              std::numeric_limits<float>::quiet_NaN());

  static std::vector<float> filled(std::int64_t count, std::uint32_t seed) {
    std::vector<float> values;
    for (std::int64_t i = 0; i < count; ++i) {
      values.push_back(noise(seed + static_cast<std::uint32_t>(i)));
    }
    return values;
  }
  static TensorView view(std::vector<float>& values, const Shape& shape) {
    return {values.data(), DType::float32, shape, {}};
  }
  RelationshipDescriptorInputs inputs() {
    return {view(cls, {batch, depth}),
            view(text, {classes, depth}),
            view(weight, {outputs, 2 * depth}),
            view(bias, {outputs}),
            TensorView{},
            TensorView{}};
  }
  TensorView result() { return view(out, {batch, classes, outputs}); }

  double expected(std::int64_t b, std::int64_t c, std::int64_t e) const {
    double sum = bias[static_cast<std::size_t>(e)];
    for (std::int64_t k = 0; k < depth; ++k) {
      const double t = text[static_cast<std::size_t>(c * depth + k)];
      const float* row = &weight[static_cast<std::size_t>(2 * e * depth)];
      sum += cls[static_cast<std::size_t>(b * depth + k)] * t * row[k] + t * row[depth + k];
    }
    return sum;
  }
  void expect_correct() const {
    std::size_t index = 0;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t c = 0; c < classes; ++c) {
        for (std::int64_t e = 0; e < outputs; ++e, ++index) {
          ASSERT_NEAR(out[index], expected(b, c, e), 2e-5);  // 1024-term float32 sums of about 10
        }
      }
    }
  }
};

TEST(RelationshipDescriptor, MatchesTheDefinitionOnAwkwardSizes) {
  for_every_isa([] {
    for (const std::int64_t classes : {1, 13}) {
      for (const std::int64_t outputs : {1, 37}) {
        for (const std::int64_t depth : {1, 31, 512}) {
          Problem problem{2, classes, outputs, depth};
          relationship_descriptor(problem.inputs(), problem.result(), 0);
          problem.expect_correct();
        }
      }
    }
  });
}

TEST(RelationshipDescriptor, ATextHalfComputedBeforeGivesTheSame) {
  for_every_isa([] {
    Problem problem{2, 13, 37, 31};
    std::vector<float> queries(13 * 37, std::numeric_limits<float>::quiet_NaN());
    relationship_descriptor_text(problem.inputs(), Problem::view(queries, {13, 37}), 0);
    RelationshipDescriptorInputs inputs = problem.inputs();
    inputs.text_queries = Problem::view(queries, {13, 37});
    relationship_descriptor(inputs, problem.result(), 0);
    problem.expect_correct();
  });
}

}  // namespace
}  // namespace zsseg
