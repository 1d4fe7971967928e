// The product inside label_regions on CUDA: class scores and soft masks as matrix units take them.
// For inclusion in label_regions_cuda.cu only.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "zsseg/cuda_launch.h"
#include "zsseg/half.h"
#include "zsseg/ops/crop_regions_math.h"
#include "zsseg/ops/ptx.h"

namespace zsseg {
namespace {

using upsample::CellPosition;

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr int kClassWarps = 4;                  // warps side by side along the classes
constexpr int kStepClasses = kClassWarps * 16;  // classes whose maps are held at once
constexpr int kDepth = 16;                      // masks a product adds up
constexpr int kColumns = 8;                     // of a tile, of one product
constexpr int kPasses = 2;                      // pixels of the result a thread resizes
constexpr int kMostColumns = 32;                // of the result that a block makes
constexpr std::size_t kMostShared = 48 * 1024 - 256;
constexpr int kNoClass = 65535;
constexpr unsigned kFullWarp = 0xffffffffu;

// Four registers as they lie in memory, for one load or store.
struct alignas(16) Registers {
  std::uint32_t word[4];
};

// A class's score at a pixel is its sum * scale + constant; the constant is zero, but NaN or
// infinite where a class score is, and NaN for classes that only fill up a step.
struct alignas(16) ClassRule {
  float scale, constant, bias, unused;
};

// How many blocks share a tile's part of the result along one axis, and how much each takes.
struct Slices {
  int count, length;
};

struct Problem {
  const float* mask_logits;   // [Q, height, width]
  const float* class_scores;  // [C, Q]
  const float* bias;          // [C], or null
  Registers* packed;          // [steps * kClassWarps, depths, high and low, lanes]
  ClassRule* rules;           // [steps * kStepClasses]
  void* labels;               // [out_height, out_width] of uint8 or uint16
  float* scores;              // [out_height, out_width], or null
  regions::MaskGrid grid;
  int num_regions, num_classes, depths, steps;
  int out_height, out_width;
  Slices slices_x, slices_y;
  float unknown_below;
  bool wide_labels;

  __host__ __device__ bool is_in_place() const {
    return out_height == grid.canvas_height && out_width == grid.canvas_width;
  }
};

struct HalfPair {
  std::uint32_t high, low;  // of two numbers each
};

// Two numbers as sums of two float16, rounded to nearest.
__device__ HalfPair split(float first, float second) {
#if defined(__CUDACC__)
  const __half2 high = __floats2half2_rn(first, second);
  const float2 rounded = __half22float2(high);
  const __half2 low = __floats2half2_rn(first - rounded.x, second - rounded.y);
  HalfPair pair;
  memcpy(&pair.high, &high, sizeof high);
  memcpy(&pair.low, &low, sizeof low);
  return pair;
#else
  const auto join = [](Half a, Half b) { return a.bits | std::uint32_t{b.bits} << 16; };
  const Half a = float_to_half(first), b = float_to_half(second);
  return {join(a, b),
          join(float_to_half(first - half_to_float(a)), float_to_half(second - half_to_float(b)))};
#endif
}

// To 2e-7: an error of the exponential counts by at most a quarter.
__device__ float soft(float logit) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + __expf(-logit));
#else
  return upsample::sigmoid(logit);
#endif
}

// ---- class scores as the matrix units take them -------------------------------------------------
struct RowScale {
  float up, down;  // powers of two, one the inverse of the other
};

// `up` takes the largest score of a class to [1, 4), if it is not almost a subnormal.
__device__ RowScale row_scale(float peak) {
  const int exponent = static_cast<int>(float_to_bits(peak) >> 23);
  const int up = max(1, min(253, 254 - exponent));
  return {bits_to_float(static_cast<std::uint32_t>(up) << 23),
          bits_to_float(static_cast<std::uint32_t>(254 - up) << 23)};
}

__device__ bool is_finite(float value) {
  return fabsf(value) <= FLT_MAX;
}

// One warp a class. Bound by its launch.
__global__ void pack_scores_kernel(Problem problem) {
  const int lane = threadIdx.x % kLanes;
  const int c = blockIdx.x * kWarps + threadIdx.x / kLanes;
  const int count = c < problem.num_classes ? problem.num_regions : 0;
  const float* row = problem.class_scores + std::int64_t{c} * problem.num_regions;
  float peak = 0.0f;
  float constant = c < problem.num_classes ? 0.0f : NAN;
  for (int q = lane; q < count; q += kLanes) {
    const bool finite = is_finite(row[q]);
    peak = finite && fabsf(row[q]) > peak ? fabsf(row[q]) : peak;
    constant += finite ? 0.0f : row[q];
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, peak, step);
    peak = other > peak ? other : peak;
    constant += __shfl_xor_sync(kFullWarp, constant, step);
  }
  const RowScale scale = row_scale(peak);
  const bool usable = constant == 0.0f;
  const int line = c % 16;
  for (int q = 2 * lane; q < problem.depths * kDepth; q += 2 * kLanes) {
    const float first = usable && q < count ? row[q] * scale.up : 0.0f;
    const float second = usable && q + 1 < count ? row[q + 1] * scale.up : 0.0f;
    const HalfPair pair = split(first, second);
    const int to_lane = line % 8 * 4 + q % 8 / 2, word = line / 8 + q % kDepth / 8 * 2;
    Registers* to =
        problem.packed + (std::int64_t{c / 16} * problem.depths + q / kDepth) * 2 * kLanes;
    to[to_lane].word[word] = pair.high;
    to[kLanes + to_lane].word[word] = pair.low;
  }
  if (lane == 0) {
    const bool lowered = problem.bias != nullptr && c < problem.num_classes;
    // Resizing to the same size adds the next pixel at weight zero: NaN, where scores are infinite.
    constant = problem.is_in_place() ? constant * 0.0f : constant;
    problem.rules[c] = {scale.down, constant, lowered ? problem.bias[c] : 0.0f, 0.0f};
  }
}

// ---- a tile -------------------------------------------------------------------------------------

// The canvas from (y, x) on, and the part of the result that a block makes.
struct Tile {
  int y, x;
  int out_y, out_x, out_rows, out_columns;
};

struct Range {
  int cell, begin, end;
};

// Along one axis: where block `index` begins on the canvas, and its part of the result.
__device__ Range block_range(int index, const Slices& slices, int cells, int canvas, int out) {
  const int cell = index / slices.count * cells;
  const int begin = upsample::cell_begin(cell, canvas, out) + index % slices.count * slices.length;
  const int end = upsample::cell_begin(cell + cells, canvas, out);
  return {cell, begin, min(end, begin + slices.length)};
}

template <int kRows, bool kResized>
__device__ Tile tile_of_block(const Problem& problem) {
  if (!kResized) {
    const int y = blockIdx.y * kRows, x = blockIdx.x * kColumns;
    return {y, x, y, x, min(kRows, problem.out_height - y), min(kColumns, problem.out_width - x)};
  }
  const Range y = block_range(blockIdx.y, problem.slices_y, kRows - 1, problem.grid.canvas_height,
                              problem.out_height);
  const Range x = block_range(blockIdx.x, problem.slices_x, kColumns - 1, problem.grid.canvas_width,
                              problem.out_width);
  return {y.cell, x.cell, y.begin, x.begin, y.end - y.begin, x.end - x.begin};
}

// The soft masks of a tile as the matrix units take them: [depths, rows of the tile, lanes], each
// the high halves of two pairs of masks and the low ones.
//
// A warp makes half the rows of 16 masks, a lane its four masks at one column: corners are loaded
// again only where the rows reach the next row of the masks' grid.
template <int kRows>
__device__ void soften_tile(const Problem& problem, const Tile& tile, const CellPosition* rows,
                            Registers* softs) {
  const regions::MaskGrid& grid = problem.grid;
  const int lane = threadIdx.x % kLanes;
  const CellPosition column =
      regions::mask_column(grid, min(tile.x + lane / 4, grid.canvas_width - 1));
  for (int task = threadIdx.x / kLanes; task < 2 * problem.depths; task += kWarps) {
    const int first = task / 2 * kDepth + lane % 4 * 2;
    const int first_row = task % 2 * (kRows / 2);
    float corner[4][4] = {};
    int cell = -1;
    for (int row = first_row; row < first_row + kRows / 2; ++row) {
      float value[4];
      for (int k = 0; k < 4; ++k) {
        const int q = first + k % 2 + k / 2 * 8;
        if (rows[row].cell != cell && q < problem.num_regions) {
          regions::load_corners(problem.mask_logits + std::int64_t{q} * grid.height * grid.width,
                                grid, rows[row].cell, column.cell, corner[k]);
        }
        value[k] = q < problem.num_regions
                       ? soft(regions::blend_corners(corner[k], rows[row], column))
                       : 0.0f;
      }
      cell = rows[row].cell;
      const HalfPair near = split(value[0], value[1]), far = split(value[2], value[3]);
      softs[(task / 2 * kRows + row) * kLanes + lane] = {near.high, far.high, near.low, far.low};
    }
  }
}

// Sums of 16 classes over all masks at half the tile's rows.
template <int kRows>
__device__ void add_votes(const Registers* packed, const Registers* softs, int depths,
                          ptx::Sums (&sums)[kRows / 2]) {
  for (int depth = 0; depth < depths; ++depth) {
    const Registers high = packed[depth * 2 * kLanes], low = packed[(depth * 2 + 1) * kLanes];
    for (int row = 0; row < kRows / 2; ++row) {
      const Registers right = softs[(depth * kRows + row) * kLanes];
      const std::uint32_t right_high[2] = {right.word[0], right.word[1]};
      const std::uint32_t right_low[2] = {right.word[2], right.word[3]};
      ptx::add_product_16(sums[row], low.word, right_high);
      ptx::add_product_16(sums[row], high.word, right_low);
      ptx::add_product_16(sums[row], high.word, right_high);
    }
  }
}

}  // namespace
}  // namespace zsseg
