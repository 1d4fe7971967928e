#include <cstdint>

#include "zsseg/ops/crop_regions.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

using regions::BinAxis;
using regions::BinSample;
using regions::MaskGrid;
using regions::Style;

constexpr int kBandRows = 28;  // rows of a crop that one task makes: 8 tasks a crop of 224
constexpr int kMaxColumnSamples = kMaxCanvasSide + kMaxCropSide;  // side * num_samples at most

// Which canvas pixels of a row are inside a mask: tables of the columns, made once for many rows.
class MaskRows {
 public:
  MaskRows(const float* logits, const MaskGrid& grid) : logits_(logits), grid_(grid) {
    for (int x = 0; x < grid.canvas_width; ++x) {
      const upsample::CellPosition at = upsample::cell_position(x, grid.width, grid.canvas_width);
      cell_[x] = at.cell;
      t_[x] = at.t;
    }
  }

  // Upsamples down the rows; false if no pixel of row y can be inside.
  bool start_row(int y) {
    const upsample::CellPosition at = upsample::cell_position(y, grid_.height, grid_.canvas_height);
    const float* above = logits_ + std::int64_t{at.cell} * grid_.width;
    const float* below = above + (grid_.height > 1 ? grid_.width : 0);
    const float s = 1.0f - at.t;
    bool any = false;
    for (int x = 0; x < grid_.width; ++x) {
      row_[x] = upsample::mix(s, above[x], at.t, below[x]);
      any |= row_[x] > 0.0f;
    }
    row_[grid_.width] = row_[grid_.width - 1];  // read where the grid is one column wide
    return any;
  }

  bool inside(int x) const {
    return upsample::mix(1.0f - t_[x], row_[cell_[x]], t_[x], row_[cell_[x] + 1]) > 0.0f;
  }

 private:
  const float* logits_;
  MaskGrid grid_;
  std::int32_t cell_[kMaxCanvasSide];
  float t_[kMaxCanvasSide];
  float row_[kMaxCanvasSide + 1];
};

// Bounds and number of the pixels inside one mask.
void bound_mask(const float* logits, const MaskGrid& grid, std::int32_t* box) {
  MaskRows rows(logits, grid);
  std::int32_t x1 = grid.canvas_width, y1 = grid.canvas_height, x2 = -1, y2 = -1, count = 0;
  for (int y = 0; y < grid.canvas_height; ++y) {
    if (!rows.start_row(y)) {
      continue;
    }
    std::int32_t first = grid.canvas_width, last = -1, inside = 0;
    for (std::int32_t x = 0; x < grid.canvas_width; ++x) {
      const bool is_inside = rows.inside(x);
      inside += is_inside;
      first = is_inside && x < first ? x : first;
      last = is_inside ? x : last;
    }
    if (inside > 0) {
      count += inside;
      x1 = first < x1 ? first : x1;
      x2 = last > x2 ? last : x2;
      y1 = y < y1 ? y : y1;
      y2 = y;
    }
  }
  const bool degenerate = x2 <= x1 || y2 <= y1;
  box[0] = degenerate ? 0 : x1;
  box[1] = degenerate ? 0 : y1;
  box[2] = degenerate ? grid.canvas_width : x2;
  box[3] = degenerate ? grid.canvas_height : y2;
  box[4] = count;
}

struct Problem {
  const float* image;   // [3, canvas_height, canvas_width]
  const float* logits;  // [height, width], the region's
  const std::int32_t* box;
  float* out;  // [3, side, side], the region's
  MaskGrid grid;
  int side;
  Style style;
  float scale[3];
  float offset[3];
};

// Where the samples of every bin of a row of a crop lie.
struct ColumnSamples {
  std::int32_t lower[kMaxColumnSamples];
  float t[kMaxColumnSamples];

  ColumnSamples(const BinAxis& axis, int side) {
    int at = 0;
    for (int bin = 0; bin < side; ++bin) {
      for (int k = 0; k < axis.num_samples; ++k, ++at) {
        const BinSample sample = regions::bin_sample(axis, bin, k);
        lower[at] = sample.lower;
        t[at] = sample.t;
      }
    }
  }
};

// A row of a crop before it is sampled along the columns: a weighted sum of rows of the image.
class RowSum {
 public:
  RowSum(const Problem& problem, int first, int last)
      : problem_(problem), mask_(problem.logits, problem.grid), first_(first), last_(last) {}

  void clear() {
    for (auto& plane : sum_) {
      for (int x = first_; x <= last_; ++x) {
        plane[x] = 0.0f;
      }
      plane[last_ + 1] = 0.0f;  // the right neighbour of the last pixel, at t = 0
    }
  }

  void add(int y, float weight) {
    const MaskGrid& grid = problem_.grid;
    const std::int64_t plane_size = std::int64_t{grid.canvas_height} * grid.canvas_width;
    const float* pixels = problem_.image + std::int64_t{y} * grid.canvas_width;
    if (problem_.style == Style::kCropMask) {
      if (!mask_.start_row(y)) {
        return;
      }
      for (int x = first_; x <= last_; ++x) {
        shown_[x] = mask_.inside(x) ? weight : 0.0f;
      }
    } else {
      for (int x = first_; x <= last_; ++x) {
        shown_[x] = weight;
      }
    }
    for (int plane = 0; plane < 3; ++plane, pixels += plane_size) {
      const float scale = problem_.scale[plane];
      const float offset = problem_.offset[plane];
      for (int x = first_; x <= last_; ++x) {
        sum_[plane][x] += shown_[x] * (pixels[x] * scale + offset);
      }
    }
  }

  // Mean of the samples of every bin.
  void sample(const ColumnSamples& samples, int num_samples, float scale, int row) const {
    const std::int64_t plane_size = std::int64_t{problem_.side} * problem_.side;
    float* to = problem_.out + std::int64_t{row} * problem_.side;
    for (int plane = 0; plane < 3; ++plane, to += plane_size) {
      const float* sum = sum_[plane];
      for (int bin = 0, at = 0; bin < problem_.side; ++bin) {
        float value = 0.0f;
        for (int k = 0; k < num_samples; ++k, ++at) {
          const float* pair = sum + samples.lower[at];
          value += upsample::mix(1.0f - samples.t[at], pair[0], samples.t[at], pair[1]);
        }
        to[bin] = value * scale;
      }
    }
  }

 private:
  const Problem& problem_;
  MaskRows mask_;
  int first_, last_;
  float shown_[kMaxCanvasSide];
  float sum_[3][kMaxCanvasSide + 1];
};

void crop_band(const Problem& problem, int begin, int end) {
  const std::int32_t* box = problem.box;
  const MaskGrid& grid = problem.grid;
  const BinAxis rows = regions::bin_axis(box[1], box[3], problem.side, grid.canvas_height);
  const BinAxis columns = regions::bin_axis(box[0], box[2], problem.side, grid.canvas_width);
  const ColumnSamples samples(columns, problem.side);
  const BinSample last = regions::bin_sample(columns, problem.side - 1, columns.num_samples - 1);
  RowSum sum(problem, samples.lower[0], last.upper);
  const float scale = 1.0f / static_cast<float>(rows.num_samples * columns.num_samples);
  for (int row = begin; row < end; ++row) {
    sum.clear();
    int y = -1;
    float weight = 0.0f;
    float next_weight = 0.0f;  // of row y + 1; samples rise, so each row is visited once
    for (int k = 0; k < rows.num_samples; ++k) {
      const BinSample sample = regions::bin_sample(rows, row, k);
      while (y >= 0 && y < sample.lower) {
        if (weight != 0.0f) {
          sum.add(y, weight);
        }
        ++y;
        weight = next_weight;
        next_weight = 0.0f;
      }
      y = sample.lower;
      weight += 1.0f - sample.t;
      next_weight += sample.t;
    }
    sum.add(y, weight);
    if (next_weight != 0.0f) {
      sum.add(y + 1, next_weight);
    }
    sum.sample(samples, columns.num_samples, scale, row);
  }
}

void mask_band(const Problem& problem, int begin, int end) {
  const MaskGrid& grid = problem.grid;
  const std::int64_t image_size = std::int64_t{grid.canvas_height} * grid.canvas_width;
  const std::int64_t crop_size = std::int64_t{problem.side} * problem.side;
  for (int row = begin; row < end; ++row) {
    for (int column = 0; column < problem.side; ++column) {
      const bool inside =
          regions::inside_resized_mask(problem.logits, grid, problem.side, row, column);
      float* to = problem.out + std::int64_t{row} * problem.side + column;
      for (int plane = 0; plane < 3; ++plane) {
        const float value =
            inside ? regions::resized_pixel(problem.image + plane * image_size, grid.canvas_height,
                                            grid.canvas_width, problem.side, row, column) *
                             problem.scale[plane] +
                         problem.offset[plane]
                   : 0.0f;
        to[plane * crop_size] = value;
      }
    }
  }
}

}  // namespace

void mask_boxes_cpu(const TensorView& mask_logits, const TensorView& boxes, std::int64_t height,
                    std::int64_t width) {
  const MaskGrid grid{static_cast<int>(mask_logits.shape[1]),
                      static_cast<int>(mask_logits.shape[2]), static_cast<int>(height),
                      static_cast<int>(width)};
  const std::int64_t step = mask_logits.shape[1] * mask_logits.shape[2];
  parallel_for(0, mask_logits.shape[0], 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t q = begin; q < end; ++q) {
      bound_mask(mask_logits.as<const float>() + q * step, grid, boxes.as<std::int32_t>() + 5 * q);
    }
  });
}

void crop_regions_cpu(const TensorView& image, const TensorView& mask_logits,
                      const TensorView& regions, const TensorView& boxes, const TensorView& out,
                      const CropRegionsParams& params) {
  Problem first{};
  first.image = image.as<const float>();
  first.grid = {static_cast<int>(mask_logits.shape[1]), static_cast<int>(mask_logits.shape[2]),
                static_cast<int>(image.shape[1]), static_cast<int>(image.shape[2])};
  first.side = static_cast<int>(params.side);
  first.style = params.style;
  for (int plane = 0; plane < 3; ++plane) {
    first.scale[plane] = static_cast<float>(params.scale[plane]);
    first.offset[plane] = static_cast<float>(params.offset[plane]);
  }
  const std::int64_t mask_size = mask_logits.shape[1] * mask_logits.shape[2];
  const std::int64_t crop_size = 3 * params.side * params.side;
  const std::int64_t bands = (params.side + kBandRows - 1) / kBandRows;
  parallel_for(0, regions.shape[0] * bands, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t region = task / bands;
      const int row = static_cast<int>(task % bands) * kBandRows;
      const int row_end = row + kBandRows < first.side ? row + kBandRows : first.side;
      Problem problem = first;
      problem.logits =
          mask_logits.as<const float>() + regions.as<const std::int32_t>()[region] * mask_size;
      problem.box = boxes.as<const std::int32_t>() + 4 * region;
      problem.out = out.as<float>() + region * crop_size;
      problem.style == Style::kMask ? mask_band(problem, row, row_end)
                                    : crop_band(problem, row, row_end);
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
