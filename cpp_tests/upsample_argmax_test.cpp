#include "zsseg/ops/upsample_argmax.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/error.h"
#include "zsseg/half.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace {

using namespace zsseg::upsample;

struct Case {
  int num_classes, in_height, in_width, out_height, out_width;
  Activation activation = Activation::kNone;
  float seen_bias = 0.0f;
  float unknown_below = -INFINITY;
  int batch = 1;
  Align align = Align::kHalfPixel;

  Axis rows() const { return make_axis(in_height, out_height, align); }
  Axis columns() const { return make_axis(in_width, out_width, align); }
};

struct Result {
  std::vector<int> labels;  // kNoClass where unknown
  std::vector<float> scores;
  std::vector<float> margins;  // between the two best classes; empty from the kernel
};

std::vector<float> noise(const Case& c, unsigned seed, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> logits(std::size_t(c.batch) * c.num_classes * c.in_height * c.in_width);
  for (float& logit : logits) {
    logit = normal(random);
  }
  return logits;
}

std::vector<std::uint8_t> every_third_seen(const Case& c) {
  std::vector<std::uint8_t> seen(c.num_classes);
  for (int i = 0; i < c.num_classes; ++i) {
    seen[i] = i % 3 == 0;
  }
  return seen;
}

// One pixel's value for every class, straight from the definition.
std::vector<float> upsampled(const Case& c, const float* logits, int y, int x) {
  const CellPosition row = cell_position(y, c.rows());
  const CellPosition column = cell_position(x, c.columns());
  const int below = c.in_height > 1 ? c.in_width : 0, beside = c.in_width > 1 ? 1 : 0;
  std::vector<float> values(c.num_classes);
  for (int k = 0; k < c.num_classes; ++k) {
    const float* at = logits + (k * c.in_height + row.cell) * c.in_width + column.cell;
    const float corner[4] = {sanitize(at[0]), sanitize(at[beside]), sanitize(at[below]),
                             sanitize(at[below + beside])};
    values[k] = bilinear(corner, 1.0f - row.t, row.t, 1.0f - column.t, column.t);
  }
  return values;
}

std::vector<float> activated(const Case& c, const std::vector<float>& values) {
  std::vector<float> result = values;
  float peak = -INFINITY;
  for (const float value : values) {
    peak = value > peak ? value : peak;
  }
  double sum = 0.0;
  for (const float value : values) {
    sum += std::exp(double(value) - peak);
  }
  for (float& value : result) {
    if (c.activation == Activation::kSigmoid) {
      value = float(1.0 / (1.0 + std::exp(-double(value))));
    } else if (c.activation == Activation::kSoftmax) {
      value = float(std::exp(double(value) - peak) / sum);
    }
  }
  return result;
}

Result definition(const Case& c, const std::vector<float>& logits,
                  const std::vector<std::uint8_t>& seen) {
  Result result;
  const std::size_t step = std::size_t(c.num_classes) * c.in_height * c.in_width;
  for (int b = 0; b < c.batch; ++b) {
    for (int y = 0; y < c.out_height; ++y) {
      for (int x = 0; x < c.out_width; ++x) {
        const std::vector<float> values = upsampled(c, logits.data() + b * step, y, x);
        const std::vector<float> scores = activated(c, values);
        int best = kNoClass;
        float first = -INFINITY, second = -INFINITY;
        for (int k = 0; k < c.num_classes; ++k) {
          const float value = seen[k] ? scores[k] - c.seen_bias : scores[k];
          if (values[k] > kAbsentLogit && value > first) {
            second = first;
            first = value;
            best = k;
          } else if (values[k] > kAbsentLogit && value > second) {
            second = value;
          }
        }
        const float none = c.activation == Activation::kNone ? -INFINITY : 0.0f;
        const float score = best == kNoClass ? none : scores[best];
        result.labels.push_back(score < c.unknown_below ? kNoClass : best);
        result.scores.push_back(score);
        result.margins.push_back(first - second);
      }
    }
  }
  return result;
}

template <typename T>
TensorView view_of(std::vector<T>& data, DType dtype, const Shape& shape) {
  return TensorView{data.data(), dtype, shape, Device{}};
}

UpsampleArgmaxParams params_of(const Case& c) {
  return {c.out_height, c.out_width, c.activation, c.seen_bias, c.unknown_below, c.align};
}

Result kernel(const Case& c, std::vector<float> logits, std::vector<std::uint8_t> seen,
              bool with_scores) {
  const TensorView logits_view =
      view_of(logits, DType::float32, {c.batch, c.num_classes, c.in_height, c.in_width});
  const TensorView seen_view = view_of(seen, DType::boolean, {c.num_classes});
  const UpsampleArgmaxInputs inputs{logits_view, &seen_view};
  const UpsampleArgmaxParams params = params_of(c);
  const Shape shape = upsample_argmax_shape(inputs, params);
  const DType dtype = upsample_argmax_label_dtype(inputs);
  // One element more than the result, to see whether anything is written past its end.
  std::vector<std::uint8_t> bytes((shape.count() + 1) * size_of(dtype), 0xAB);
  std::vector<float> scores(shape.count() + 1, -7.0f);
  const TensorView labels_view = view_of(bytes, dtype, shape);
  const TensorView scores_view = view_of(scores, DType::float32, shape);
  std::vector<std::uint8_t> workspace(upsample_argmax_workspace_bytes(inputs, params));
  upsample_argmax(inputs, labels_view, with_scores ? &scores_view : nullptr,
                  view_of(workspace, DType::uint8, {std::int64_t(workspace.size())}), params, 0);
  EXPECT_EQ(bytes.back(), 0xAB);
  EXPECT_EQ(scores.back(), -7.0f);
  Result result;
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const int label = dtype == DType::uint8 ? labels_view.as<std::uint8_t>()[i]
                                            : labels_view.as<std::uint16_t>()[i];
    result.labels.push_back(dtype == DType::uint8 && label == 255 ? kNoClass : label);
  }
  scores.pop_back();
  result.scores = with_scores ? scores : std::vector<float>{};
  return result;
}

// Labels must be equal wherever the two best classes differ by more than `tolerance`.
void expect_equal(const Case& c, const Result& expected, const Result& got, float tolerance) {
  ASSERT_EQ(got.labels.size(), expected.labels.size());
  std::size_t excluded = 0;
  for (std::size_t i = 0; i < expected.labels.size(); ++i) {
    const bool near_threshold = std::abs(expected.scores[i] - c.unknown_below) <= tolerance;
    if (tolerance > 0.0f && (expected.margins[i] <= tolerance || near_threshold)) {
      ++excluded;
      continue;
    }
    ASSERT_EQ(got.labels[i], expected.labels[i]) << "pixel " << i;
    if (!got.scores.empty() && expected.scores[i] != got.scores[i]) {
      ASSERT_NEAR(got.scores[i], expected.scores[i], 2e-6f * (1.0f + std::abs(got.scores[i])));
    }
  }
  EXPECT_LE(excluded, 2 + expected.labels.size() / 200);
}

void check(const Case& c, const std::vector<float>& logits) {
  const std::vector<std::uint8_t> seen = every_third_seen(c);
  const Result expected = definition(c, logits, seen);
  // Without an activation or a bias the same roundings are made: labels are equal bit for bit.
  const bool exact = c.activation == Activation::kNone && c.seen_bias == 0.0f;
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(name_of(isa));
    for (const bool with_scores : {false, true}) {
      SCOPED_TRACE(std::string(name_of(isa)) + (with_scores ? " with scores" : ""));
      expect_equal(c, expected, kernel(c, logits, seen, with_scores), exact ? 0.0f : 1e-5f);
    }
  }
  set_cpu_isa(name_of(available_cpu_isas().back()));
}

const int kShapes[][5] = {
    // classes, grid, image
    {1, 1, 1, 1, 1},     {2, 1, 1, 7, 5},     {3, 1, 4, 9, 33},   {5, 6, 1, 50, 3},
    {7, 3, 5, 1, 40},    {20, 4, 4, 64, 64},  {17, 5, 7, 61, 83}, {33, 9, 8, 4, 3},
    {171, 4, 3, 50, 37}, {300, 3, 4, 20, 31}, {16, 2, 2, 130, 9}, {4, 33, 17, 33, 17},
};

TEST(UpsampleArgmax, EqualsTheDefinition) {
  for (const auto& s : kShapes) {
    for (const Activation activation :
         {Activation::kNone, Activation::kSigmoid, Activation::kSoftmax}) {
      for (const float bias : {0.0f, 0.3f, -0.2f}) {
        SCOPED_TRACE(testing::Message()
                     << s[0] << " classes, " << s[1] << "x" << s[2] << " to " << s[3] << "x" << s[4]
                     << ", activation " << int(activation) << ", bias " << bias);
        const Case c{s[0], s[1], s[2], s[3], s[4], activation, bias};
        check(c, noise(c, 7, 2.0f));
      }
    }
  }
}

TEST(UpsampleArgmax, LaysGridPointsOnTheCorners) {
  for (const auto& s : kShapes) {
    SCOPED_TRACE(testing::Message()
                 << s[0] << " classes, " << s[1] << "x" << s[2] << " to " << s[3] << "x" << s[4]);
    Case c{s[0], s[1], s[2], s[3], s[4]};
    c.align = Align::kCorners;
    check(c, noise(c, 7, 2.0f));
  }
}

TEST(UpsampleArgmax, MarksScoresBelowTheThreshold) {
  for (const Activation activation :
       {Activation::kNone, Activation::kSigmoid, Activation::kSoftmax}) {
    Case c{21, 5, 6, 40, 52, activation, 0.1f, 0.6f, 2};
    check(c, noise(c, 11, 1.0f));
  }
}

TEST(UpsampleArgmax, GivesTiesToTheLowestIndex) {
  Case c{40, 4, 4, 37, 41};
  std::vector<float> logits = noise(c, 3, 1.0f);  // many equal classes at every corner:
  std::transform(logits.begin(), logits.end(), logits.begin(),
                 [](float x) { return std::round(x); });
  check(c, logits);
  check(c, std::vector<float>(logits.size(), 0.0f));
}

// One unit in the last place between classes at the corners may vanish in the products: whichever
// class then wins by index must not have been dropped.
TEST(UpsampleArgmax, KeepsClassesThatRoundingMakesEqual) {
  Case c{24, 4, 5, 75, 61};
  std::vector<float> logits = noise(c, 5, 1.0f);
  const int plane = c.in_height * c.in_width;
  for (int k = 1; k < c.num_classes; ++k) {
    for (int i = 0; i < plane; ++i) {
      const float below = logits[(k - 1) * plane + i];
      logits[k * plane + i] = k % 2 ? std::nextafter(below, 9.0f) : below;
    }
  }
  check(c, logits);
}

TEST(UpsampleArgmax, CopesWithExtremeAndMissingLogits) {
  for (const Activation activation :
       {Activation::kNone, Activation::kSigmoid, Activation::kSoftmax}) {
    Case c{9, 4, 4, 30, 30, activation};
    std::vector<float> logits = noise(c, 13, activation == Activation::kNone ? 3000.0f : 3.0f);
    logits[5] = NAN;
    logits[40] = -INFINITY;
    logits[77] = -1e4f;
    check(c, logits);
    const Result absent =
        kernel(c, std::vector<float>(logits.size(), NAN), every_third_seen(c), true);
    for (std::size_t i = 0; i < absent.labels.size(); ++i) {
      ASSERT_EQ(absent.labels[i], kNoClass);
      ASSERT_EQ(absent.scores[i], activation == Activation::kNone ? -INFINITY : 0.0f);
    }
  }
}

TEST(UpsampleArgmax, DoesNotDependOnTheNumberOfThreads) {
  const int threads_before = num_threads();
  for (const int height : {2, 24}) {
    Case c{60, height, 24, 300, 400, Activation::kSigmoid, 0.2f};
    const std::vector<float> logits = noise(c, 17, 1.0f);
    set_num_threads(1);
    const Result alone = kernel(c, logits, every_third_seen(c), true);
    for (const int threads : {2, 3, 7}) {
      set_num_threads(threads);
      const Result shared = kernel(c, logits, every_third_seen(c), true);
      EXPECT_EQ(shared.labels, alone.labels);
      EXPECT_EQ(shared.scores, alone.scores);
    }
  }
  set_num_threads(threads_before);
}

const Align kAligns[] = {Align::kHalfPixel, Align::kCorners};

TEST(UpsampleArgmax, CellPositionsAreThoseOfTheirAlignment) {
  for (const Align align : kAligns) {
    for (const int in_size : {1, 2, 5, 32}) {
      for (const int out_size : {1, 3, 32, 375, 513, 32767}) {
        const Axis axis = make_axis(in_size, out_size, align);
        for (int i = 0; i < out_size; ++i) {
          const double position = align == Align::kCorners
                                      ? double(i) * (in_size - 1) / std::max(out_size - 1, 1)
                                      : (i + 0.5) * in_size / out_size - 0.5;
          const double source = std::min(std::max(position, 0.0), double(in_size - 1));
          const CellPosition at = cell_position(i, axis);
          ASSERT_NEAR(at.cell + double(at.t), source, 1e-7 * in_size) << in_size << ' ' << out_size;
          ASSERT_LE(at.cell, std::max(in_size - 2, 0));
          ASSERT_EQ(fraction_in_cell(i, at.cell, axis), at.t) << in_size << ' ' << out_size;
        }
      }
    }
  }
}

TEST(UpsampleArgmax, CellsBeginWherePositionsSay) {
  for (const Align align : kAligns) {
    for (const int in_size : {1, 2, 5, 32, 700, 32767}) {
      for (const int out_size : {1, 3, 32, 375, 513, 32767}) {
        const Axis axis = make_axis(in_size, out_size, align);
        const int cells = std::max(in_size - 1, 1);
        EXPECT_EQ(cell_begin(cells, axis), out_size);
        for (int cell = 0, i = 0; cell < cells; ++cell) {
          while (i < out_size && cell_position(i, axis).cell < cell) {
            ++i;
          }
          ASSERT_EQ(cell_begin(cell, axis), i) << in_size << ' ' << out_size;
        }
      }
    }
  }
}

// What a block of the CUDA kernel does for one cell, on one thread: the shared arithmetic without
// the shared memory.
void label_cell(const Case& c, const std::vector<float>& logits,
                const std::vector<std::uint8_t>& seen, int cell_row, int cell_column,
                Result& result) {
  const int below = c.in_height > 1 ? c.in_width : 0, beside = c.in_width > 1 ? 1 : 0;
  const auto group = [&](int k) { return c.seen_bias != 0.0f && seen[k] ? 1 : 0; };
  const float slack = c.activation == Activation::kSoftmax ? kSoftmaxSlack : 0.0f;
  std::vector<std::vector<float>> corners;
  std::vector<Dominator> dominators[2];  // every class: the strictest pruning there can be
  for (int k = 0; k < c.num_classes; ++k) {
    const float* at = logits.data() + (k * c.in_height + cell_row) * c.in_width + cell_column;
    corners.push_back(
        {sanitize(at[0]), sanitize(at[beside]), sanitize(at[below]), sanitize(at[below + beside])});
    dominators[group(k)].push_back(make_dominator(corners[k].data(), k, slack));
  }
  std::vector<int> kept;
  for (int k = 0; k < c.num_classes; ++k) {
    const std::vector<Dominator>& by = dominators[group(k)];
    if (std::none_of(by.begin(), by.end(),
                     [&](const Dominator& d) { return is_dominated(corners[k].data(), k, d); })) {
      kept.push_back(k);
    }
  }
  const int bottom = cell_begin(cell_row + 1, c.rows());
  const int right = cell_begin(cell_column + 1, c.columns());
  for (int y = cell_begin(cell_row, c.rows()); y < bottom; ++y) {
    for (int x = cell_begin(cell_column, c.columns()); x < right; ++x) {
      const float ty = cell_position(y, c.rows()).t;
      const float tx = cell_position(x, c.columns()).t;
      Best best[2] = {{kAbsentLogit, kNoClass}, {kAbsentLogit, kNoClass}};
      std::vector<float> values;
      for (const int k : kept) {
        values.push_back(bilinear(corners[k].data(), 1.0f - ty, ty, 1.0f - tx, tx));
        take_better(best[group(k)], values.back(), k);
      }
      float denominator = 0.0f;
      for (const float value : values) {
        denominator += std::exp(value - std::max(best[0].logit, best[1].logit));
      }
      const Winner winner = pick_winner(best[0], best[1], c.activation, c.seen_bias, denominator);
      const std::size_t pixel = std::size_t(y) * c.out_width + x;
      result.labels[pixel] = winner.score < c.unknown_below ? kNoClass : winner.index;
      result.scores[pixel] = winner.score;
    }
  }
}

TEST(UpsampleArgmax, TheArithmeticOfCudaCellsEqualsTheDefinition) {
  for (const auto& s : kShapes) {
    for (const Activation activation :
         {Activation::kNone, Activation::kSigmoid, Activation::kSoftmax}) {
      for (const float bias : {0.0f, 0.3f, -0.2f}) {
        const Case c{s[0], s[1], s[2], s[3], s[4], activation, bias};
        SCOPED_TRACE(testing::Message()
                     << s[0] << " classes, activation " << int(activation) << ", bias " << bias);
        std::vector<float> logits = noise(c, 23, 2.0f);
        if (bias == 0.0f && activation == Activation::kNone) {
          for (float& logit : logits) {
            logit = std::round(logit);  // ties
          }
        }
        const std::vector<std::uint8_t> seen = every_third_seen(c);
        const std::size_t pixels = std::size_t(c.out_height) * c.out_width;
        Result got{std::vector<int>(pixels, -1), std::vector<float>(pixels), {}};
        for (int row = 0; row < std::max(c.in_height - 1, 1); ++row) {
          for (int column = 0; column < std::max(c.in_width - 1, 1); ++column) {
            label_cell(c, logits, seen, row, column, got);
          }
        }
        const bool exact = activation == Activation::kNone && bias == 0.0f;
        expect_equal(c, definition(c, logits, seen), got, exact ? 0.0f : 1e-5f);
      }
    }
  }
}

// Classes beyond their number do not exist, and what is stored is the table's.
TEST(UpsampleArgmax, StoresTheTablesLabelsOfTheClassesThatCount) {
  Case c{37, 5, 6, 41, 53};
  std::vector<float> logits = noise(c, 3, 2.0f);
  std::vector<std::uint8_t> seen = every_third_seen(c);
  std::vector<std::uint16_t> table(c.num_classes);
  for (int i = 0; i < c.num_classes; ++i) {
    table[i] = static_cast<std::uint16_t>(60000 - 3 * i);
  }
  for (std::int32_t counted : {0, 1, 16, 30, 37}) {
    std::vector<std::int32_t> count = {counted};
    const TensorView seen_view = view_of(seen, DType::boolean, {c.num_classes});
    const TensorView table_view = view_of(table, DType::uint16, {c.num_classes});
    const TensorView count_view = view_of(count, DType::int32, {1});
    const TensorView logits_view = view_of(logits, DType::float32, {1, c.num_classes, 5, 6});
    const UpsampleArgmaxInputs inputs{logits_view, &seen_view, &table_view, &count_view};
    Case fewer = c;
    fewer.num_classes = counted;
    fewer.seen_bias = 0.25f;
    const UpsampleArgmaxParams params = params_of(fewer);
    std::vector<std::uint16_t> labels(std::size_t(c.out_height) * c.out_width, 7);
    std::vector<std::uint8_t> workspace(upsample_argmax_workspace_bytes(inputs, params));
    ASSERT_EQ(upsample_argmax_label_dtype(inputs), DType::uint16);
    upsample_argmax(inputs, view_of(labels, DType::uint16, {1, c.out_height, c.out_width}), nullptr,
                    view_of(workspace, DType::uint8, {std::int64_t(workspace.size())}), params, 0);
    const Result expected = definition(fewer, logits, seen);
    for (std::size_t i = 0; i < labels.size(); ++i) {
      const int winner = expected.labels[i];
      ASSERT_EQ(labels[i], winner == kNoClass ? 65535 : table[winner]) << counted << " " << i;
    }
  }
}

TEST(UpsampleArgmax, RejectsASmallWorkspace) {
  Case c{3, 4, 4, 8, 8};
  std::vector<float> logits = noise(c, 1, 1.0f);
  std::vector<std::uint8_t> labels(64), workspace(64);
  const TensorView logits_view = view_of(logits, DType::float32, {1, 3, 4, 4});
  EXPECT_THROW(upsample_argmax({logits_view}, view_of(labels, DType::uint8, {1, 8, 8}), nullptr,
                               view_of(workspace, DType::uint8, {64}), params_of(c), 0),
               ShapeError);
}

}  // namespace
}  // namespace zsseg
