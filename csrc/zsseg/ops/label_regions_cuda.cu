#include <cmath>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/crop_regions_math.h"
#include "zsseg/ops/label_regions.h"

namespace zsseg {
namespace {

constexpr int kPixels = 32;  // of a block, one a lane
constexpr int kGroups = 8;   // warps that share the masks, then the classes
constexpr int kNoClass = 65535;

struct Problem {
  const float* mask_logits;   // [Q, height, width]
  const float* class_scores;  // [C, Q]
  const float* bias;          // [C], or null
  float* scores;              // [out_height, out_width], or null
  regions::MaskGrid grid;
  int num_regions;
  int num_classes;
  int out_height, out_width;
  float unknown_below;
};

// The soft mask, resized from the canvas to one pixel of the result. Summing over masks commutes
// with this resize, so no score map is made.
__device__ float soft_mask(const Problem& problem, int q, int row, int column) {
  const regions::MaskGrid& grid = problem.grid;
  const float* logits = problem.mask_logits + std::int64_t{q} * grid.height * grid.width;
  const upsample::CellPosition y =
      upsample::cell_position(row, grid.canvas_height, problem.out_height);
  const upsample::CellPosition x =
      upsample::cell_position(column, grid.canvas_width, problem.out_width);
  float value = 0.0f;
  for (int corner = 0; corner < 4; ++corner) {
    const float weight = (corner < 2 ? 1.0f - y.t : y.t) * (corner % 2 == 0 ? 1.0f - x.t : x.t);
    if (weight != 0.0f) {
      const int canvas_y = y.cell + (corner < 2 ? 0 : 1);
      const int canvas_x = x.cell + corner % 2;
      value += weight * upsample::sigmoid(regions::mask_logit(logits, grid, canvas_y, canvas_x));
    }
  }
  return value;
}

// One block 32 pixels of a row: its warps first share the masks, then the classes. Bound by
// arithmetic: Q * C products a pixel. Caller guarantees: Q * 128 bytes of shared memory.
template <typename Label>
__global__ void label_regions_kernel(Problem problem, Label* __restrict__ labels) {
  float* soft = dynamic_shared<float>();  // [Q, kPixels]
  __shared__ float best_of[kGroups][kPixels];
  __shared__ float score_of[kGroups][kPixels];
  __shared__ int index_of[kGroups][kPixels];
  const int lane = threadIdx.x;
  const int group = threadIdx.y;
  const int row = blockIdx.y;
  const int column = blockIdx.x * kPixels + lane;
  const int clamped = column < problem.out_width ? column : problem.out_width - 1;
  for (int q = group; q < problem.num_regions; q += kGroups) {
    soft[q * kPixels + lane] = soft_mask(problem, q, row, clamped);
  }
  __syncthreads();
  float best = -INFINITY, score = 0.0f;
  int index = kNoClass;
  for (int c = group; c < problem.num_classes; c += kGroups) {
    const float* weights = problem.class_scores + std::int64_t{c} * problem.num_regions;
    float value = 0.0f;
    for (int q = 0; q < problem.num_regions; ++q) {
      value += weights[q] * soft[q * kPixels + lane];
    }
    const float lowered = value - (problem.bias == nullptr ? 0.0f : problem.bias[c]);
    if (lowered > best) {
      best = lowered;
      score = value;
      index = c;
    }
  }
  best_of[group][lane] = best;
  score_of[group][lane] = score;
  index_of[group][lane] = index;
  __syncthreads();
  if (group != 0 || column >= problem.out_width) {
    return;
  }
  for (int other = 1; other < kGroups; ++other) {
    const float value = best_of[other][lane];
    if (value > best || (value == best && index_of[other][lane] < index)) {
      best = value;
      score = score_of[other][lane];
      index = index_of[other][lane];
    }
  }
  score = score < 1.0f ? score : 1.0f;
  const std::int64_t at = std::int64_t{row} * problem.out_width + column;
  labels[at] = static_cast<Label>(score < problem.unknown_below ? kNoClass : index);
  if (problem.scores != nullptr) {
    problem.scores[at] = score;
  }
}

}  // namespace

void label_regions_cuda(const LabelRegionsInputs& inputs, const TensorView& labels,
                        const TensorView* scores, const TensorView& /*workspace*/,
                        const LabelRegionsParams& params, StreamHandle stream) {
  const DeviceGuard guard(labels.device.index);
  Problem problem = {};
  problem.mask_logits = inputs.mask_logits.as<const float>();
  problem.class_scores = inputs.class_scores.as<const float>();
  problem.bias = inputs.bias == nullptr ? nullptr : inputs.bias->as<const float>();
  problem.scores = scores == nullptr ? nullptr : scores->as<float>();
  problem.grid = {static_cast<int>(inputs.mask_logits.shape[1]),
                  static_cast<int>(inputs.mask_logits.shape[2]),
                  static_cast<int>(params.canvas_height), static_cast<int>(params.canvas_width)};
  problem.num_regions = static_cast<int>(inputs.class_scores.shape[1]);
  problem.num_classes = static_cast<int>(inputs.class_scores.shape[0]);
  problem.out_height = static_cast<int>(params.height);
  problem.out_width = static_cast<int>(params.width);
  problem.unknown_below = params.unknown_below;
  const dim3 grid((problem.out_width + kPixels - 1) / kPixels, problem.out_height);
  const std::size_t soft_bytes = sizeof(float) * kPixels * problem.num_regions;
  ZSSEG_DISPATCH_LABEL(labels.dtype, Label,
                       launch("label_regions_kernel", label_regions_kernel<Label>,
                              {grid, dim3(kPixels, kGroups), soft_bytes}, to_stream(stream),
                              problem, labels.as<Label>()));
}

}  // namespace zsseg
