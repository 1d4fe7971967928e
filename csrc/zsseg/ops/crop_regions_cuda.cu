// crop_regions on CUDA: the image is summed down the rows of each bin, then sampled across.
// Positions of rows and columns are found once a block, and many blocks share a crop.
//
// R crops of S x S from boxes of b x c, n = ceil(c / S), in an image of H x W, masks of h x w:
//   bytes       12 R S S written, 12 H W + 4 R h w read    10 MB for 10 crops of 224, 480 x 640
//   operations  40 R c (b + S / 4) + 12 R S S n            155 M for boxes of 480 x 640
//   floors      2 us by bytes, 3 us by operations on an H200 (4.8 TB/s, 60 T/s)
#include <algorithm>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/crop_regions.h"

namespace zsseg {
namespace {

using regions::BinAxis;
using regions::BinSample;
using regions::MaskGrid;
using regions::Style;
using upsample::CellPosition;

constexpr int kThreads = 256;
constexpr int kCropRows = 4;  // of a crop, made by one block together
constexpr int kChunk = 256;   // columns of the canvas summed at once
constexpr int kSlice = 32;    // rows of the canvas weighed at once

// The regions of one launch: in its parameters, for which they are few enough, or, where `indices`
// is not null, on the device.
struct Regions {
  std::int32_t mask[kMaxCropRegions];
  std::int32_t box[kMaxCropRegions][4];
  const std::int32_t* indices;  // [R], which masks
  const std::int32_t* bounds;   // [Q, 5], of every mask
  int num_masks;
};

struct Region {
  int mask, x1, y1, x2, y2;
};

// Nobody has checked what is on the device: whatever lies outside is moved inside.
__device__ Region region_at(const Regions& of, int index, const MaskGrid& grid) {
  if (of.indices == nullptr) {
    const std::int32_t* box = of.box[index];
    return {of.mask[index], box[0], box[1], box[2], box[3]};
  }
  const int mask = min(max(of.indices[index], 0), of.num_masks - 1);
  const std::int32_t* box = of.bounds + 5 * std::int64_t{mask};
  const int x1 = min(max(box[0], 0), grid.canvas_width - 1);
  const int y1 = min(max(box[1], 0), grid.canvas_height - 1);
  return {mask, x1, y1, min(max(box[2], x1 + 1), grid.canvas_width),
          min(max(box[3], y1 + 1), grid.canvas_height)};
}

struct Planes {
  float scale[3];
  float offset[3];
};

struct CropProblem {
  const float* image;        // [3, canvas_height, canvas_width]
  const float* mask_logits;  // [Q, height, width]
  float* out;                // [R, 3, side, side]
  MaskGrid grid;
  Planes planes;
  int side;

  __device__ const float* logits(int mask) const {
    return mask_logits + std::int64_t{mask} * grid.height * grid.width;
  }
  __device__ std::int64_t plane_size() const {
    return std::int64_t{grid.canvas_height} * grid.canvas_width;
  }
};

struct alignas(16) RowWeights {
  float of_row[kCropRows];
};

// A block's shared memory: the image summed down the rows of each bin, for some of its columns.
struct CropMemory {
  float sums[kCropRows][3][kChunk + 1];
  RowWeights weights[kSlice];
  CellPosition mask_rows[kSlice];
};

// How much each row of the canvas from y on counts in each of the block's rows.
__device__ void weigh_rows(CropMemory& memory, const CropProblem& problem, const BinAxis& rows,
                           int first_row, int y) {
  ZSSEG_UNROLL(1)
  for (int at = threadIdx.x; at < kSlice * kCropRows; at += blockDim.x) {
    const int row = first_row + at % kCropRows;
    const int of_y = y + at / kCropRows;
    float weight = 0.0f;
    ZSSEG_UNROLL(1)
    for (int k = 0; k < (row < problem.side ? rows.num_samples : 0); ++k) {
      const BinSample sample = regions::bin_sample(rows, row, k);
      weight += sample.lower == of_y ? 1.0f - sample.t : 0.0f;
      weight += sample.upper == of_y ? sample.t : 0.0f;
    }
    memory.weights[at / kCropRows].of_row[at % kCropRows] = weight;
  }
  ZSSEG_UNROLL(1)
  for (int at = threadIdx.x; at < kSlice; at += blockDim.x) {
    memory.mask_rows[at] = regions::mask_row(problem.grid, y + at);
  }
}

// Adds up column x of the canvas, rows y to y + num_rows, for every row of the block.
template <bool kMasked>
__device__ void sum_column(const CropMemory& memory, const CropProblem& problem,
                           const float* logits, int x, int y, int num_rows,
                           float (&sums)[kCropRows][3]) {
  const CellPosition column = regions::mask_column(problem.grid, x);
  const float* pixel = problem.image + std::int64_t{y} * problem.grid.canvas_width + x;
  float corner[4] = {};
  int cell = -1;  // the grid row of these corners
  ZSSEG_UNROLL((kMasked ? 1 : 4))
  for (int i = 0; i < num_rows; ++i, pixel += problem.grid.canvas_width) {
    if (kMasked) {
      const CellPosition row = memory.mask_rows[i];
      if (row.cell != cell) {
        regions::load_corners(logits, problem.grid, row.cell, column.cell, corner);
        cell = row.cell;
      }
      if (!(regions::blend_corners(corner, row, column) > 0.0f)) {
        continue;
      }
    }
    const RowWeights weights = memory.weights[i];
    for (int plane = 0; plane < 3; ++plane) {
      const float value = pixel[plane * problem.plane_size()] * problem.planes.scale[plane] +
                          problem.planes.offset[plane];
      for (int r = 0; r < kCropRows; ++r) {
        sums[r][plane] += weights.of_row[r] * value;
      }
    }
  }
}

// memory.sums of the columns x to last_x, kChunk + 1 at most.
template <bool kMasked>
__device__ void sum_chunk(CropMemory& memory, const CropProblem& problem, const float* logits,
                          const BinAxis& rows, int first_row, int x, int last_x) {
  const int last_row = min(first_row + kCropRows, problem.side) - 1;
  const int first_y = regions::bin_sample(rows, first_row, 0).lower;
  const int last_y = regions::bin_sample(rows, last_row, rows.num_samples - 1).upper;
  for (int y = first_y; y <= last_y; y += kSlice) {
    __syncthreads();  // the last weights, and sums, have been read
    weigh_rows(memory, problem, rows, first_row, y);
    __syncthreads();
    ZSSEG_UNROLL(1)
    for (int at = threadIdx.x; at <= last_x - x; at += blockDim.x) {
      float sums[kCropRows][3] = {};
      sum_column<kMasked>(memory, problem, logits, x + at, y, min(kSlice, last_y - y + 1), sums);
      for (int r = 0; r < kCropRows; ++r) {
        for (int plane = 0; plane < 3; ++plane) {
          float* to = &memory.sums[r][plane][at];
          *to = y == first_y ? sums[r][plane] : *to + sums[r][plane];
        }
      }
    }
  }
  __syncthreads();
}

// Adds a bin's samples k and on that lie in the chunk at x; returns the first that does not.
__device__ int sample_chunk(const CropMemory& memory, const BinAxis& columns, int column, int k,
                            int x, float (&value)[kCropRows][3]) {
  ZSSEG_UNROLL(1)
  for (; k < columns.num_samples; ++k) {
    const BinSample sample = regions::bin_sample(columns, column, k);
    const int at = sample.lower - x;
    if (at >= kChunk) {
      break;
    }
    const int next = sample.upper - x;
    for (int r = 0; r < kCropRows; ++r) {
      for (int plane = 0; plane < 3; ++plane) {
        const float* sums = memory.sums[r][plane];
        value[r][plane] += (1.0f - sample.t) * sums[at] + sample.t * sums[next];
      }
    }
  }
  return k;
}

__device__ void write_rows(const CropProblem& problem, int first_row, int column,
                           const float (&value)[kCropRows][3], float scale) {
  const int side = problem.side;
  float* to = problem.out + (std::int64_t{blockIdx.z} * 3 * side + first_row) * side + column;
  for (int r = 0; r < kCropRows && first_row + r < side; ++r) {
    for (int plane = 0; plane < 3; ++plane) {
      to[(plane * side + r) * side] = value[r][plane] * scale;
    }
  }
}

// One block kCropRows rows of a crop, one thread a column: sums down the rows go to shared memory
// and are sampled from there, so a pixel is looked at once a block. Bound by operations; loads are
// of neighbours by neighbours, whole lines. blockIdx.z counts regions. Caller guarantees: boxes lie
// within the canvas, blocks of whole warps.
template <bool kMasked>
__global__ void __launch_bounds__(kThreads)
    crop_regions_kernel(CropProblem problem, Regions regions_of) {
  __shared__ CropMemory memory;
  const int side = problem.side;
  const int first_column = blockIdx.x * blockDim.x;
  const int last_column = min(first_column + static_cast<int>(blockDim.x), side) - 1;
  const int column = first_column + threadIdx.x;
  const int first_row = blockIdx.y * kCropRows;
  const Region region = region_at(regions_of, blockIdx.z, problem.grid);
  const BinAxis rows = regions::bin_axis(region.y1, region.y2, side, problem.grid.canvas_height);
  const BinAxis columns = regions::bin_axis(region.x1, region.x2, side, problem.grid.canvas_width);
  const float* logits = problem.logits(region.mask);
  const int last_x = regions::bin_sample(columns, last_column, columns.num_samples - 1).upper;
  float value[kCropRows][3] = {};
  int k = 0;
  for (int x = regions::bin_sample(columns, first_column, 0).lower; x <= last_x; x += kChunk) {
    sum_chunk<kMasked>(memory, problem, logits, rows, first_row, x, min(x + kChunk, last_x));
    if (column < side) {
      k = sample_chunk(memory, columns, column, k, x, value);
    }
  }
  if (column < side) {
    write_rows(problem, first_row, column, value,
               1.0f / static_cast<float>(rows.num_samples * columns.num_samples));
  }
}

// Where a row or column of a resized image lies: on the canvas, and there on the masks' grid.
struct ResizedPosition {
  CellPosition at, first, second;
};

__device__ ResizedPosition resized_position(int index, int side, int canvas, int grid) {
  const CellPosition at = upsample::cell_position(index, canvas, side);
  const int second = at.cell + (canvas > 1 ? 1 : 0);
  return {at, upsample::cell_position(at.cell, grid, canvas),
          upsample::cell_position(second, grid, canvas)};
}

// Style kMask: kCropRows rows a block, one thread a column; positions of rows are shared. Bound by
// its loads, four corners of the image's planes and up to sixteen logits a pixel. kOnDevice tells
// where the regions are: looking there takes registers.
template <bool kOnDevice>
__global__ void __launch_bounds__(kThreads)
    mask_picture_kernel(CropProblem problem, Regions regions_of) {
  __shared__ ResizedPosition rows[kCropRows];
  const MaskGrid grid = problem.grid;
  const int side = problem.side;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  const int first_row = blockIdx.y * kCropRows;
  if (threadIdx.x < kCropRows) {
    const int row = min(first_row + static_cast<int>(threadIdx.x), side - 1);
    rows[threadIdx.x] = resized_position(row, side, grid.canvas_height, grid.height);
  }
  __syncthreads();
  if (column >= side) {
    return;
  }
  const float* logits = problem.logits(kOnDevice ? region_at(regions_of, blockIdx.z, grid).mask
                                                 : regions_of.mask[blockIdx.z]);
  const ResizedPosition x = resized_position(column, side, grid.canvas_width, grid.width);
  const MaskGrid image{grid.canvas_height, grid.canvas_width, side, side};
  float* to = problem.out + (std::int64_t{blockIdx.z} * 3 * side + first_row) * side + column;
  ZSSEG_UNROLL(1)
  for (int r = 0; r < kCropRows && first_row + r < side; ++r) {
    const ResizedPosition y = rows[r];
    const float corner[4] = {regions::mask_logit(logits, grid, y.first, x.first),
                             regions::mask_logit(logits, grid, y.first, x.second),
                             regions::mask_logit(logits, grid, y.second, x.first),
                             regions::mask_logit(logits, grid, y.second, x.second)};
    const bool inside = regions::blend_corners(corner, y.at, x.at) > 0.0f;
    for (int plane = 0; plane < 3; ++plane) {
      const float* pixels = problem.image + plane * problem.plane_size();
      const float value = regions::mask_logit(pixels, image, y.at, x.at);
      to[(plane * side + r) * side] =
          inside ? value * problem.planes.scale[plane] + problem.planes.offset[plane] : 0.0f;
    }
  }
}

MaskGrid mask_grid(const TensorView& mask_logits, std::int64_t height, std::int64_t width) {
  return {static_cast<int>(mask_logits.shape[1]), static_cast<int>(mask_logits.shape[2]),
          static_cast<int>(height), static_cast<int>(width)};
}

int num_parts(int whole, int part) {
  return (whole + part - 1) / part;
}

Regions regions_of(const TensorView& regions, const TensorView& boxes) {
  Regions of{};
  if (regions.device.is_cuda()) {
    of.indices = regions.as<const std::int32_t>();
    of.bounds = boxes.as<const std::int32_t>();
    of.num_masks = static_cast<int>(boxes.shape[0]);
  } else {
    std::copy_n(regions.as<const std::int32_t>(), regions.shape[0], of.mask);
    std::copy_n(boxes.as<const std::int32_t>(), boxes.count(), &of.box[0][0]);
  }
  return of;
}

}  // namespace

void crop_regions_cuda(const TensorView& image, const TensorView& mask_logits,
                       const TensorView& regions, const TensorView& boxes, const TensorView& out,
                       const CropRegionsParams& params, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  const Regions of = regions_of(regions, boxes);
  CropProblem problem{};
  problem.image = image.as<const float>();
  problem.mask_logits = mask_logits.as<const float>();
  problem.out = out.as<float>();
  problem.grid = mask_grid(mask_logits, image.shape[1], image.shape[2]);
  problem.side = static_cast<int>(params.side);
  for (int plane = 0; plane < 3; ++plane) {
    problem.planes.scale[plane] = static_cast<float>(params.scale[plane]);
    problem.planes.offset[plane] = static_cast<float>(params.offset[plane]);
  }
  const int threads = std::min(kThreads, num_parts(problem.side, 32) * 32);
  const dim3 blocks(static_cast<unsigned>(num_parts(problem.side, threads)),
                    static_cast<unsigned>(num_parts(problem.side, kCropRows)),
                    static_cast<unsigned>(regions.shape[0]));
  const auto mask_image =
      regions.device.is_cuda() ? mask_picture_kernel<true> : mask_picture_kernel<false>;
  const auto kernel = params.style == Style::kMask       ? mask_image
                      : params.style == Style::kCropMask ? crop_regions_kernel<true>
                                                         : crop_regions_kernel<false>;
  launch("crop_regions_kernel", kernel, {blocks, static_cast<unsigned>(threads)}, to_stream(stream),
         problem, of);
}

}  // namespace zsseg
