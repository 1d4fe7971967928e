#include <cstdint>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/label_regions.h"
#include "zsseg/ops/upsample_argmax_math.h"
#include "zsseg/ops/upsample_argmax_simd.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

using upsample::kLanes;
using upsample::VecF;

constexpr int kTileClasses = 4;
constexpr int kTileColumns = 2 * kLanes;
constexpr std::int32_t kNoClass = 65535;

// Everything a task reads, and its own memory.
struct Task {
  const LabelRegionsInputs& inputs;
  const LabelRegionsParams& params;
  const LabelRegionsLayout& layout;
  float* shared;
  float* own;
  std::int64_t rows[2];  // the canvas rows in maps; -1 for none

  std::int64_t num_regions() const { return inputs.class_scores.shape[1]; }
  std::int64_t num_classes() const { return inputs.class_scores.shape[0]; }
  float* map(std::int64_t row, std::int64_t c) const {
    return own + layout.maps + ((row % 2) * num_classes() + c) * layout.row;
  }
};

// cell and t of every column, the last one repeated up to `padded`.
void fill_columns(float* shared, std::int64_t cell_at, std::int64_t t_at, std::int64_t columns,
                  std::int64_t padded, std::int64_t source) {
  auto* cell = reinterpret_cast<std::int32_t*>(shared + cell_at);
  for (std::int64_t x = 0; x < padded; ++x) {
    const upsample::CellPosition at =
        upsample::cell_position(static_cast<int>(x < columns ? x : columns - 1),
                                static_cast<int>(source), static_cast<int>(columns));
    cell[x] = at.cell;
    shared[t_at + x] = at.t;
  }
}

// soft[q] = sigmoid of row y of every mask on the canvas.
void soften_row(const Task& task, std::int64_t y) {
  const Shape& masks = task.inputs.mask_logits.shape;
  const std::int64_t width = masks[2];
  const upsample::CellPosition at = upsample::cell_position(
      static_cast<int>(y), static_cast<int>(masks[1]), static_cast<int>(task.params.canvas_height));
  const auto* cell = reinterpret_cast<const std::int32_t*>(task.shared + task.layout.cell);
  const float* t = task.shared + task.layout.t;
  float* low = task.own + task.layout.blend;
  const std::int64_t below = masks[1] > 1 ? width : 0;
  for (std::int64_t q = 0; q < task.num_regions(); ++q) {
    const float* above =
        task.inputs.mask_logits.as<const float>() + (q * masks[1] + at.cell) * width;
    for (std::int64_t x = 0; x < width; ++x) {
      low[x] = upsample::mix(1.0f - at.t, above[x], at.t, above[below + x]);
    }
    low[width] = low[width - 1];  // read where the grid is one column wide
    float* soft = task.own + task.layout.soft + q * task.layout.row;
    for (std::int64_t x = 0; x < task.layout.row; ++x) {
      soft[x] = upsample::mix(1.0f - t[x], low[cell[x]], t[x], low[cell[x] + 1]);
    }
    for (std::int64_t x = 0; x < task.layout.row; x += kLanes) {
      upsample::store(soft + x, upsample::sigmoid_vec(upsample::load(soft + x)));
    }
  }
}

// maps[c, x] = sum over q of class_scores[c, q] * soft[q, x] for up to kTileClasses classes.
void add_up_tile(const Task& task, std::int64_t y, std::int64_t first, std::int64_t x) {
  const std::int64_t num_regions = task.num_regions();
  const float* weights[kTileClasses];
  VecF sums[kTileClasses][2];
  for (int c = 0; c < kTileClasses; ++c) {
    const std::int64_t index = first + c < task.num_classes() ? first + c : task.num_classes() - 1;
    weights[c] = task.inputs.class_scores.as<const float>() + index * num_regions;
    sums[c][0] = sums[c][1] = upsample::splat(0.0f);
  }
  const float* soft = task.own + task.layout.soft + x;
  for (std::int64_t q = 0; q < num_regions; ++q, soft += task.layout.row) {
    const VecF left = upsample::load(soft);
    const VecF right = upsample::load(soft + kLanes);
    for (int c = 0; c < kTileClasses; ++c) {
      const VecF weight = upsample::splat(weights[c][q]);
      sums[c][0] += weight * left;
      sums[c][1] += weight * right;
    }
  }
  for (int c = 0; c < kTileClasses && first + c < task.num_classes(); ++c) {
    upsample::store(task.map(y, first + c) + x, sums[c][0]);
    upsample::store(task.map(y, first + c) + x + kLanes, sums[c][1]);
  }
}

void hold_row(Task& task, std::int64_t y) {
  if (task.rows[y % 2] == y) {
    return;
  }
  soften_row(task, y);
  for (std::int64_t x = 0; x < task.layout.row; x += kTileColumns) {
    for (std::int64_t c = 0; c < task.num_classes(); c += kTileClasses) {
      add_up_tile(task, y, c, x);
    }
  }
  task.rows[y % 2] = y;
}

// Lets class c compete for every pixel of a row of the result.
void compete(const Task& task, std::int64_t c, float bias) {
  const auto* cell = reinterpret_cast<const std::int32_t*>(task.shared + task.layout.out_cell);
  const float* t = task.shared + task.layout.out_t;
  const float* blend = task.own + task.layout.blend;
  float* best = task.own + task.layout.best;
  float* score = task.own + task.layout.score;
  auto* index = reinterpret_cast<std::int32_t*>(task.own + task.layout.index);
  for (std::int64_t x = 0; x < task.layout.out_row; ++x) {
    const float value = upsample::mix(1.0f - t[x], blend[cell[x]], t[x], blend[cell[x] + 1]);
    const float lowered = value - bias;
    const bool wins = lowered > best[x];
    best[x] = wins ? lowered : best[x];
    score[x] = wins ? value : score[x];
    index[x] = wins ? static_cast<std::int32_t>(c) : index[x];
  }
}

template <typename Label>
void write_row(const Task& task, Label* labels, float* scores) {
  const auto* index = reinterpret_cast<const std::int32_t*>(task.own + task.layout.index);
  const float* score = task.own + task.layout.score;
  for (std::int64_t x = 0; x < task.params.width; ++x) {
    const float value = score[x] < 1.0f ? score[x] : 1.0f;
    labels[x] = value < task.params.unknown_below ? static_cast<Label>(kNoClass)
                                                  : static_cast<Label>(index[x]);
    if (scores != nullptr) {
      scores[x] = value;
    }
  }
}

template <typename Label>
void label_row(Task& task, std::int64_t out_y, Label* labels, float* scores) {
  const std::int64_t height = task.params.canvas_height;
  const upsample::CellPosition at = upsample::cell_position(
      static_cast<int>(out_y), static_cast<int>(height), static_cast<int>(task.params.height));
  const std::int64_t below = at.cell + (height > 1 ? 1 : 0);
  hold_row(task, at.cell);
  hold_row(task, below);
  float* best = task.own + task.layout.best;
  float* score = task.own + task.layout.score;
  auto* index = reinterpret_cast<std::int32_t*>(task.own + task.layout.index);
  for (std::int64_t x = 0; x < task.layout.out_row; ++x) {
    best[x] = -INFINITY;
    score[x] = 0.0f;
    index[x] = kNoClass;
  }
  float* blend = task.own + task.layout.blend;
  const VecF s = upsample::splat(1.0f - at.t);
  const VecF t = upsample::splat(at.t);
  for (std::int64_t c = 0; c < task.num_classes(); ++c) {
    const float* upper = task.map(at.cell, c);
    const float* lower = task.map(below, c);
    for (std::int64_t x = 0; x < task.layout.row; x += kLanes) {
      upsample::store(blend + x, s * upsample::load(upper + x) + t * upsample::load(lower + x));
    }
    compete(task, c, task.inputs.bias == nullptr ? 0.0f : task.inputs.bias->as<const float>()[c]);
  }
  write_row(task, labels + out_y * task.params.width,
            scores == nullptr ? nullptr : scores + out_y * task.params.width);
}

}  // namespace

void label_regions_cpu(const LabelRegionsInputs& inputs, const TensorView& labels,
                       const TensorView* scores, const TensorView& workspace,
                       const LabelRegionsParams& params) {
  LabelRegionsLayout layout = label_regions_layout(inputs, params, num_threads());
  while (bytes_of(layout) > workspace.bytes() && layout.num_tasks > 1) {
    --layout.num_tasks;  // threads were added since the workspace was made
  }
  auto* shared = workspace.as<float>();
  fill_columns(shared, layout.cell, layout.t, params.canvas_width, layout.row,
               inputs.mask_logits.shape[2]);
  fill_columns(shared, layout.out_cell, layout.out_t, params.width, layout.out_row,
               params.canvas_width);
  float* to = scores == nullptr ? nullptr : scores->as<float>();
  parallel_for(0, layout.num_tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      float* own = shared + layout.tasks + index * layout.task_floats;
      Task task{inputs, params, layout, shared, own, {-1, -1}};
      const std::int64_t last = (index + 1) * params.height / layout.num_tasks;
      for (std::int64_t y = index * params.height / layout.num_tasks; y < last; ++y) {
        ZSSEG_DISPATCH_LABEL(labels.dtype, Label, label_row(task, y, labels.as<Label>(), to));
      }
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
