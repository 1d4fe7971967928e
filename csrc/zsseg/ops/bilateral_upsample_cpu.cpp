#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "zsseg/cpu_scratch.h"
#include "zsseg/ops/bilateral_upsample.h"
#include "zsseg/ops/bilateral_upsample_math.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kGrainValues = 1 << 15;  // about 50 us of work

struct Problem {
  const float* logits;  // [B, C, h, w]
  const float* guide;   // [B, 3, H, W]
  float* out;           // [B, C, H, W]
  std::int64_t num_classes;
  upsample::Axis rows, columns;
  int scale;
  float inverse;
  Align align;

  int bands() const { return std::max(rows.in_size - 1, 1); }
  // Points between two rows of cells; the strips beyond the outermost ones belong to the outer two.
  int band_begin(int band) const {
    if (band <= 0) {
      return 0;
    }
    if (band >= bands()) {
      return rows.out_size;
    }
    const std::int64_t from = std::int64_t{band} * rows.denominator - rows.offset;
    return static_cast<int>((from + rows.step - 1) / rows.step);
  }
};

constexpr int kRun = 16;  // points that are written at once, of which a cell has most often fewer

// What a band of rows needs for the time of its work; each row has `stride` floats: one a point,
// and room for a run beyond the last.
struct Scratch {
  std::int64_t stride;
  float* memory;

  static std::int64_t stride_of(std::int64_t width) { return width + kRun; }
  static std::size_t floats(std::int64_t width, int scale) {
    return static_cast<std::size_t>(stride_of(width) * (19 + 8 * scale));
  }
  float* fraction() const { return memory; }       // of the right cell
  float* sums() const { return memory + stride; }  // down a row of cells
  float* colour(int corner, int channel) const {   // of the four cells, one after another
    return memory + (2 + 3 * corner + channel) * stride;
  }
  float* logit(int corner) const { return memory + (14 + corner) * stride; }
  std::int32_t* first() const {  // point that lies right of a cell; then the number of points
    return reinterpret_cast<std::int32_t*>(memory + 18 * stride);
  }
  float* weight(int row, int corner) const {  // of at most 2 * scale rows
    return memory + (19 + 4 * row + corner) * stride;
  }
};

void find_columns(const Problem& problem, const Scratch& scratch) {
  int cell = -1;
  for (int x = 0; x < problem.columns.out_size; ++x) {
    const upsample::CellPosition at = upsample::cell_position(x, problem.columns);
    scratch.fraction()[x] = at.t;
    if (at.cell != cell) {
      scratch.first()[++cell] = x;
    }
  }
  scratch.first()[cell + 1] = problem.columns.out_size;
}

void fill_run(float* run, float value, int count) {
  for (int k = 0; k < kRun; ++k) {
    run[k] = value;  // what is too much is written over by the next run
  }
  for (int k = kRun; k < count; ++k) {
    run[k] = value;
  }
}

// A row of cells' values at the cells left and right of every point.
void spread(const Problem& problem, const Scratch& scratch, const float* cells, float* left,
            float* right) {
  const std::int32_t* first = scratch.first();
  const int next = problem.columns.in_size > 1 ? 1 : 0;
  const int runs = problem.columns.in_size - next;
  for (int cell = 0; cell < runs; ++cell) {
    const int count = first[cell + 1] - first[cell];
    fill_run(left + first[cell], cells[cell], count);
    fill_run(right + first[cell], cells[cell + next], count);
  }
}

// The mean colour of every cell of a row, at the points' left and right cells.
void find_colours(const Problem& problem, const Scratch& scratch, const float* guide, int row,
                  int corner) {
  using bilateral::cell_points;
  const int width = problem.columns.out_size;
  const auto rows = cell_points(row, problem.scale, problem.rows.out_size, problem.align);
  for (int channel = 0; channel < 3; ++channel) {
    const float* plane = guide + std::int64_t{channel} * problem.rows.out_size * width;
    float* sums = scratch.sums();
    std::fill(sums, sums + width, 0.0f);
    for (int y = rows.begin; y < rows.end; ++y) {
      const float* from = plane + std::int64_t{y} * width;
      for (int x = 0; x < width; ++x) {
        sums[x] = sums[x] + from[x];
      }
    }
    float* means = sums;  // a cell's is written once its sums have been read
    for (int cell = 0; cell < problem.columns.in_size; ++cell) {
      const auto points = cell_points(cell, problem.scale, width, problem.align);
      float sum = 0.0f;
      for (int x = points.begin; x < points.end; ++x) {
        sum = sum + sums[x];
      }
      const int count = (rows.end - rows.begin) * (points.end - points.begin);
      means[cell] = sum / static_cast<float>(count);
    }
    spread(problem, scratch, means, scratch.colour(corner, channel),
           scratch.colour(corner + 1, channel));
  }
}

void find_weights(const Problem& problem, const Scratch& scratch, const float* guide, int y,
                  int number) {
  const int width = problem.columns.out_size;
  const std::int64_t plane = std::int64_t{problem.rows.out_size} * width;
  const float* red = guide + std::int64_t{y} * width;
  const float *green = red + plane, *blue = green + plane, *fraction = scratch.fraction();
  const float ty = upsample::cell_position(y, problem.rows).t, inverse = problem.inverse;
  float* alike[4];
  for (int k = 0; k < 4; ++k) {
    alike[k] = scratch.weight(number, k);
    const float *r = scratch.colour(k, 0), *g = scratch.colour(k, 1), *b = scratch.colour(k, 2);
    for (int x = 0; x < width; ++x) {
      alike[k][x] = bilateral::likeness(red[x] - r[x], green[x] - g[x], blue[x] - b[x], inverse);
    }
  }
  float *w0 = alike[0], *w1 = alike[1], *w2 = alike[2], *w3 = alike[3];
  for (int x = 0; x < width; ++x) {
    const float of[4] = {w0[x], w1[x], w2[x], w3[x]};
    const bilateral::Weights found = bilateral::weights(ty, fraction[x], of);
    w0[x] = found.of[0];
    w1[x] = found.of[1];
    w2[x] = found.of[2];
    w3[x] = found.of[3];
  }
}

void blend_rows(const Problem& problem, const Scratch& scratch, int begin, int end, float* plane) {
  const int width = problem.columns.out_size;
  const float *l0 = scratch.logit(0), *l1 = scratch.logit(1);
  const float *l2 = scratch.logit(2), *l3 = scratch.logit(3);
  for (int y = begin; y < end; ++y) {
    const float *w0 = scratch.weight(y - begin, 0), *w1 = scratch.weight(y - begin, 1);
    const float *w2 = scratch.weight(y - begin, 2), *w3 = scratch.weight(y - begin, 3);
    float* to = plane + std::int64_t{y} * width;
    for (int x = 0; x < width; ++x) {
      to[x] = bilateral::blend(w0[x], l0[x], w1[x], l1[x], w2[x], l2[x], w3[x], l3[x]);
    }
  }
}

// All points between two rows of cells find their weights once, for all classes.
void upsample_band(const Problem& problem, const Scratch& scratch, std::int64_t image, int band) {
  const int height = problem.rows.out_size, width = problem.columns.out_size;
  const int begin = problem.band_begin(band), end = problem.band_begin(band + 1);
  const int below = problem.rows.in_size > 1 ? band + 1 : band;
  const float* guide = problem.guide + image * 3 * height * width;
  find_colours(problem, scratch, guide, band, 0);
  find_colours(problem, scratch, guide, below, 2);
  for (int y = begin; y < end; ++y) {
    find_weights(problem, scratch, guide, y, y - begin);
  }
  const std::int64_t row = problem.columns.in_size, cells = problem.rows.in_size * row;
  for (std::int64_t c = image * problem.num_classes; c < (image + 1) * problem.num_classes; ++c) {
    const float* from = problem.logits + c * cells;
    spread(problem, scratch, from + band * row, scratch.logit(0), scratch.logit(1));
    spread(problem, scratch, from + below * row, scratch.logit(2), scratch.logit(3));
    blend_rows(problem, scratch, begin, end, problem.out + c * height * width);
  }
}

}  // namespace

void bilateral_upsample_cpu(const BilateralUpsampleArgs& args, const TensorView& out) {
  const Shape& grid = args.logits.shape;
  Problem problem = {};
  problem.logits = args.logits.as<const float>();
  problem.guide = args.guide.as<const float>();
  problem.out = out.as<float>();
  problem.num_classes = grid[1];
  problem.rows =
      upsample::make_axis(static_cast<int>(grid[2]), static_cast<int>(out.shape[2]), args.align);
  problem.columns =
      upsample::make_axis(static_cast<int>(grid[3]), static_cast<int>(out.shape[3]), args.align);
  problem.scale = args.scale;
  problem.inverse = 1.0f / (args.reach * args.reach);
  problem.align = args.align;
  const std::int64_t bands = problem.bands(), width = out.shape[3];
  const std::int64_t grain = kGrainValues / (args.scale * width * (grid[1] + 12)) + 1;
  parallel_for(0, grid[0] * bands, grain, [&](std::int64_t first, std::int64_t last) {
    const Scratch scratch{Scratch::stride_of(width),
                          cpu_scratch(Scratch::floats(width, args.scale))};
    find_columns(problem, scratch);
    for (std::int64_t band = first; band < last; ++band) {
      upsample_band(problem, scratch, band / bands, static_cast<int>(band % bands));
    }
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
