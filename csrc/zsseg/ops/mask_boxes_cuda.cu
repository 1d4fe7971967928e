// mask_boxes on CUDA: the rows of the canvas once, blended down the masks' grid, and pixels only on
// a mask's edge. Positions of rows and columns are found once a block, and several blocks share a
// mask.
//
// Q masks of h x w on a canvas of H x W:
//   bytes       4 Q h w                              7.7 MB for 100 masks of 120 x 160
//   operations  4 Q H w and 10 a pixel on an edge    31 M at H, W = 480, 640
//   floors      1.6 us by bytes, 0.5 us by operations on an H200 (4.8 TB/s, 60 T/s)
#include <algorithm>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/crop_regions.h"

namespace zsseg {
namespace {

using regions::MaskGrid;
using upsample::CellPosition;

constexpr int kThreads = 256;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kBandRows = 64;   // of the canvas, a block's share of a mask, if kMostBands allow
constexpr int kMostBands = 32;  // a mask; they are counted above the bits of its pixels
constexpr int kMostBandRows = (kMaxCanvasSide + kMostBands - 1) / kMostBands;
constexpr int kCountBits = 25;  // of a number of pixels, kMaxCanvasSide squared at most
constexpr int kQuad = 4;        // grid columns a thread takes at once

// Between two values that are not above zero none is; between two that are not below this all are
// above zero, because no product underflows.
constexpr float kSurelyInside = 1e-30f;

struct Bounds {
  int x1, y1, x2, y2, count;
};

__device__ Bounds no_bounds(const MaskGrid& grid) {
  return {grid.canvas_width, grid.canvas_height, -1, -1, 0};
}

__device__ void take_pixels(Bounds& bounds, int y, int begin, int end) {
  bounds.count += end - begin;
  bounds.x1 = min(bounds.x1, begin);
  bounds.x2 = max(bounds.x2, end - 1);
  bounds.y1 = min(bounds.y1, y);
  bounds.y2 = max(bounds.y2, y);
}

// One thread a mask.
__global__ void begin_boxes_kernel(std::int32_t* __restrict__ boxes,  // [Q, 5]
                                   int num_masks, MaskGrid grid) {
  const int q = blockIdx.x * kThreads + threadIdx.x;
  if (q < num_masks) {
    const Bounds start = no_bounds(grid);
    std::int32_t* box = boxes + 5 * std::int64_t{q};
    box[0] = start.x1;
    box[1] = start.y1;
    box[2] = start.x2;
    box[3] = start.y2;
    box[4] = start.count;
  }
}

struct alignas(16) Quad {
  float value[kQuad];
};

// Four logits of a row and the one after them; the last one repeats.
template <bool kWide>
__device__ void load_quad(const float* row, int first, int width, float (&value)[kQuad + 1]) {
  if (kWide) {
    const Quad quad = *reinterpret_cast<const Quad*>(row + first);
    for (int k = 0; k < kQuad; ++k) {
      value[k] = quad.value[k];
    }
  } else {
    for (int k = 0; k < kQuad; ++k) {
      value[k] = row[min(first + k, width - 1)];
    }
  }
  value[kQuad] = row[min(first + kQuad, width - 1)];
}

// Row y of the canvas, from one grid column to the next.
__device__ void bound_cell(Bounds& bounds, const MaskGrid& grid, int y, float left, float right,
                           int begin, int end) {
  if (begin == end || (left <= 0.0f && right <= 0.0f)) {
    return;
  }
  if (left >= kSurelyInside && right >= kSurelyInside) {
    take_pixels(bounds, y, begin, end);
    return;
  }
  ZSSEG_UNROLL(1)
  for (int x = begin; x < end; ++x) {
    const float t = regions::mask_column(grid, x).t;
    if (upsample::mix(1.0f - t, left, t, right) > 0.0f) {
      take_pixels(bounds, y, x, x + 1);
    }
  }
}

template <bool kWide>
__device__ void bound_quad(Bounds& bounds, const MaskGrid& grid, const float* logits, int y,
                           const CellPosition& at, int first, const int* begins) {
  const float* above = logits + std::int64_t{at.cell} * grid.width;
  float upper[kQuad + 1], lower[kQuad + 1];
  load_quad<kWide>(above, first, grid.width, upper);
  load_quad<kWide>(above + (grid.height > 1 ? grid.width : 0), first, grid.width, lower);
  for (int k = 0; k <= kQuad; ++k) {
    upper[k] = upsample::mix(1.0f - at.t, upper[k], at.t, lower[k]);
  }
  for (int k = 0; k < kQuad; ++k) {
    bound_cell(bounds, grid, y, upper[k], upper[k + 1], begins[first + k], begins[first + k + 1]);
  }
}

// The warp's bounds, in every lane.
__device__ Bounds join_lanes(Bounds bounds) {
  for (int step = 16; step > 0; step /= 2) {
    bounds.x1 = min(bounds.x1, __shfl_xor_sync(kFullWarp, bounds.x1, step));
    bounds.y1 = min(bounds.y1, __shfl_xor_sync(kFullWarp, bounds.y1, step));
    bounds.x2 = max(bounds.x2, __shfl_xor_sync(kFullWarp, bounds.x2, step));
    bounds.y2 = max(bounds.y2, __shfl_xor_sync(kFullWarp, bounds.y2, step));
    bounds.count += __shfl_xor_sync(kFullWarp, bounds.count, step);
  }
  return bounds;
}

// Joins one band's bounds to its mask's; the last band to come replaces thin boxes by the canvas.
__device__ void join_bands(std::int32_t* box, const Bounds& band, const MaskGrid& grid) {
  atomicMin(&box[0], band.x1);
  atomicMin(&box[1], band.y1);
  atomicMax(&box[2], band.x2);
  atomicMax(&box[3], band.y2);
  __threadfence();
  const int before = atomicAdd(&box[4], band.count + (1 << kCountBits));
  if (before >> kCountBits != static_cast<int>(gridDim.y) - 1) {
    return;
  }
  __threadfence();
  volatile std::int32_t* joined = box;
  joined[4] = (before & ((1 << kCountBits) - 1)) + band.count;
  if (joined[2] <= joined[0] || joined[3] <= joined[1]) {
    joined[0] = 0;
    joined[1] = 0;
    joined[2] = grid.canvas_width;
    joined[3] = grid.canvas_height;
  }
}

// blockIdx.x counts masks, blockIdx.y bands of canvas rows; threads take four grid columns of a row
// at once, in 16-byte loads if kWide. Minima, maxima and sums of integers: their order does not
// matter. Caller guarantees: boxes begun, band_rows <= kMostBandRows, gridDim.y <= kMostBands,
// (width rounded up to quads, and one) integers of shared memory.
template <bool kWide>
__global__ void mask_boxes_kernel(const float* __restrict__ mask_logits,  // [Q, height, width]
                                  std::int32_t* boxes,                    // [Q, 5]
                                  MaskGrid grid, int band_rows) {
  int* begins = dynamic_shared<int>();  // the first canvas column of every cell
  __shared__ CellPosition rows[kMostBandRows];
  __shared__ Bounds band;
  const int quads = (grid.width + kQuad - 1) / kQuad;
  const int first_y = blockIdx.y * band_rows;
  const int num_rows = min(band_rows, grid.canvas_height - first_y);
  ZSSEG_UNROLL(1)
  for (int cell = threadIdx.x; cell <= quads * kQuad; cell += kThreads) {
    begins[cell] = upsample::cell_begin(cell, grid.width, grid.canvas_width);
  }
  ZSSEG_UNROLL(1)
  for (int row = threadIdx.x; row < num_rows; row += kThreads) {
    rows[row] = regions::mask_row(grid, first_y + row);
  }
  if (threadIdx.x == 0) {
    band = no_bounds(grid);
  }
  __syncthreads();
  const float* logits = mask_logits + std::int64_t{blockIdx.x} * grid.height * grid.width;
  Bounds bounds = no_bounds(grid);
  int row = threadIdx.x / quads, quad = threadIdx.x % quads;
  while (row < num_rows) {
    bound_quad<kWide>(bounds, grid, logits, first_y + row, rows[row], quad * kQuad, begins);
    row += kThreads / quads;
    quad += kThreads % quads;
    if (quad >= quads) {
      quad -= quads;
      ++row;
    }
  }
  bounds = join_lanes(bounds);
  if (threadIdx.x % 32 == 0 && bounds.count > 0) {
    atomicMin(&band.x1, bounds.x1);
    atomicMin(&band.y1, bounds.y1);
    atomicMax(&band.x2, bounds.x2);
    atomicMax(&band.y2, bounds.y2);
    atomicAdd(&band.count, bounds.count);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    join_bands(boxes + 5 * std::int64_t{blockIdx.x}, band, grid);
  }
}

MaskGrid mask_grid(const TensorView& mask_logits, std::int64_t height, std::int64_t width) {
  return {static_cast<int>(mask_logits.shape[1]), static_cast<int>(mask_logits.shape[2]),
          static_cast<int>(height), static_cast<int>(width)};
}

int num_parts(int whole, int part) {
  return (whole + part - 1) / part;
}

}  // namespace

void mask_boxes_cuda(const TensorView& mask_logits, const TensorView& boxes, std::int64_t height,
                     std::int64_t width, StreamHandle stream) {
  const DeviceGuard guard(boxes.device.index);
  const MaskGrid grid = mask_grid(mask_logits, height, width);
  const int num_masks = static_cast<int>(mask_logits.shape[0]);
  launch("begin_boxes_kernel", begin_boxes_kernel,
         {static_cast<unsigned>(num_parts(num_masks, kThreads)), kThreads}, to_stream(stream),
         boxes.as<std::int32_t>(), num_masks, grid);
  const int band_rows = std::max(kBandRows, num_parts(grid.canvas_height, kMostBands));
  const dim3 blocks(static_cast<unsigned>(num_masks),
                    static_cast<unsigned>(num_parts(grid.canvas_height, band_rows)));
  const std::size_t begins = sizeof(int) * (num_parts(grid.width, kQuad) * kQuad + 1);
  const bool wide = grid.width % kQuad == 0 &&
                    reinterpret_cast<std::uintptr_t>(mask_logits.data) % sizeof(Quad) == 0;
  launch("mask_boxes_kernel", wide ? mask_boxes_kernel<true> : mask_boxes_kernel<false>,
         {blocks, kThreads, begins}, to_stream(stream), mask_logits.as<const float>(),
         boxes.as<std::int32_t>(), grid, band_rows);
}

}  // namespace zsseg
