// label_regions on CUDA: masks become soft once a pixel of the canvas, a product of class scores
// and soft masks on tensor cores gives a tile of score maps in shared memory, and the pixels of the
// result between the tile's pixels take the best of 64 classes at a time. Nothing of the canvas is
// ever in global memory.
//
// Soft masks and class scores are sums of two float16 numbers, high and low, and three of the four
// products are added up in float32: 22 bits of either operand, where one float16 (11 bits) would
// change labels. A class's scores are scaled by a power of two first, so that any float32 fits.
// Against three products of tf32 it takes half the time of the matrix units and half the shared
// memory, and sm_75 has it.
//
// C classes, Q masks of h x w, a canvas of P pixels, a result of as many (171, 100, 480 x 640):
//   bytes       4 Q h w + 4 C Q + P                                  8 MB
//   operations  6 C Q P on tensor cores, 40 Q P + 6 C P others       31 G and 1.5 G
//   floors      2 us by bytes, 53 us by operations on an H200 (4.8 TB/s; 600 T/s and 60 T/s)
// A result of another size, of R pixels, takes 64 / 49 of that, because tiles share their edges,
// and 10 C R operations more. Workspace: 4 bytes a class and mask, 0.1 MB.
#include <cmath>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/label_regions.h"
#include "zsseg/ops/label_regions_votes_cuda.h"

namespace zsseg {
namespace {

struct Best {
  float lowered = -INFINITY;
  int index = kNoClass;
};

__device__ float score_of(const ClassRule& rule, float sum) {
  return sum * rule.scale + rule.constant;
}

__device__ void compete(Best& best, float lowered, int index) {
  if (lowered > best.lowered) {
    best.lowered = lowered;
    best.index = index;
  }
}

__device__ void join(Best& best, float lowered, int index) {
  if (lowered > best.lowered || (lowered == best.lowered && index < best.index)) {
    best.lowered = lowered;
    best.index = index;
  }
}

__device__ void write_pixel(const Problem& problem, const Best& best, int y, int x) {
  float score = 0.0f;
  if (best.index != kNoClass) {
    score = best.lowered + problem.rules[best.index].bias;
    score = score < 1.0f ? score : 1.0f;
  }
  const int label = score < problem.unknown_below ? kNoClass : best.index;
  const std::int64_t at = std::int64_t{y} * problem.out_width + x;
  if (problem.wide_labels) {
    static_cast<std::uint16_t*>(problem.labels)[at] = static_cast<std::uint16_t>(label);
  } else {
    static_cast<std::uint8_t*>(problem.labels)[at] = static_cast<std::uint8_t>(label);
  }
  if (problem.scores != nullptr) {
    problem.scores[at] = score;
  }
}

// ---- a result of the canvas's size: sums compete where they are made ----------------------------
template <int kRows>
__device__ void label_in_place(const Problem& problem, const Tile& tile, Registers* softs) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int class_warp = warp % kClassWarps, first_row = warp / kClassWarps * (kRows / 2);
  Best best[kRows / 2][2];
  ZSSEG_UNROLL(1)
  for (int step = 0; step < problem.steps; ++step) {
    const int tile16 = step * kClassWarps + class_warp;
    ptx::Sums sums[kRows / 2] = {};
    add_votes<kRows>(problem.packed + std::int64_t{tile16} * problem.depths * 2 * kLanes + lane,
                     softs + first_row * kLanes + lane, problem.depths, sums);
    for (int half = 0; half < 2; ++half) {
      const int c = tile16 * 16 + lane / 4 + 8 * half;
      const ClassRule rule = problem.rules[c];
      for (int row = 0; row < kRows / 2; ++row) {
        compete(best[row][0], score_of(rule, sums[row][2 * half]) - rule.bias, c);
        compete(best[row][1], score_of(rule, sums[row][2 * half + 1]) - rule.bias, c);
      }
    }
  }
  __syncthreads();                                 // every warp has read the soft masks
  auto* partial = reinterpret_cast<Best*>(softs);  // [kClassWarps, kRows, kColumns]
  for (int row = 0; row < kRows / 2; ++row) {
    for (int k = 0; k < 2; ++k) {
      for (int step = 4; step < kLanes; step *= 2) {
        const float lowered = __shfl_xor_sync(kFullWarp, best[row][k].lowered, step);
        join(best[row][k], lowered, __shfl_xor_sync(kFullWarp, best[row][k].index, step));
      }
      if (lane < 4) {
        partial[(class_warp * kRows + first_row + row) * kColumns + 2 * lane + k] = best[row][k];
      }
    }
  }
  __syncthreads();
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  if (row >= tile.out_rows || column >= tile.out_columns) {
    return;
  }
  Best whole = partial[threadIdx.x];
  for (int other = 1; other < kClassWarps; ++other) {
    const Best& next = partial[other * kRows * kColumns + threadIdx.x];
    join(whole, next.lowered, next.index);
  }
  write_pixel(problem, whole, tile.out_y + row, tile.out_x + column);
}

// ---- a result of another size: scores go to shared memory and are resized there -----------------
template <int kRows>
constexpr int kMapFloats = kRows * kColumns + 8;  // of a class; the eight keep stores off one bank

struct alignas(8) Neighbours {
  float left, right;
};

// A pixel of the result: its place among the tile's pixels.
struct Taps {
  int at = -1;
  float y = 0.0f, x = 0.0f;
};

__device__ Taps find_taps(const Problem& problem, const Tile& tile, int pixel) {
  if (pixel >= tile.out_rows * tile.out_columns) {
    return {};
  }
  const CellPosition y = upsample::cell_position(tile.out_y + pixel / tile.out_columns,
                                                 problem.grid.canvas_height, problem.out_height);
  const CellPosition x = upsample::cell_position(tile.out_x + pixel % tile.out_columns,
                                                 problem.grid.canvas_width, problem.out_width);
  return {(y.cell - tile.y) * kColumns + x.cell - tile.x, y.t, x.t};
}

template <int kRows>
__device__ void store_maps(float* maps, const ClassRule* rules,  // of the warp's 16 classes
                           const ptx::Sums (&sums)[kRows / 2]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int row = warp / kClassWarps * (kRows / 2);
  float* to = maps + (warp % kClassWarps * 16 + lane / 4) * kMapFloats<kRows> + row * kColumns +
              lane % 4 * 2;
  for (int half = 0; half < 2; ++half) {
    const ClassRule rule = rules[lane / 4 + 8 * half];
    for (int i = 0; i < kRows / 2; ++i) {
      *reinterpret_cast<Neighbours*>(to + 8 * half * kMapFloats<kRows> + i * kColumns) = {
          score_of(rule, sums[i][2 * half]), score_of(rule, sums[i][2 * half + 1])};
    }
  }
}

template <int kRows>
__device__ void compete_resized(const Problem& problem, const float* maps, const Taps& taps,
                                int first_class, Best& best) {
  const float* map = maps + taps.at;
  const float above[2] = {(1.0f - taps.y) * (1.0f - taps.x), (1.0f - taps.y) * taps.x};
  const float below[2] = {taps.y * (1.0f - taps.x), taps.y * taps.x};
  ZSSEG_UNROLL(4)
  for (int c = 0; c < kStepClasses; ++c, map += kMapFloats<kRows>) {
    const float score = above[0] * map[0] + above[1] * map[1] + below[0] * map[kColumns] +
                        below[1] * map[kColumns + 1];
    compete(best, score - problem.rules[first_class + c].bias, first_class + c);
  }
}

template <int kRows>
__device__ void label_resized(const Problem& problem, const Tile& tile, const Registers* softs,
                              float* maps) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  Taps taps[kPasses];
  Best best[kPasses];
  ZSSEG_UNROLL(kPasses)
  for (int pass = 0; pass < kPasses; ++pass) {
    taps[pass] = find_taps(problem, tile, threadIdx.x + pass * kThreads);
  }
  ZSSEG_UNROLL(1)
  for (int step = 0; step < problem.steps; ++step) {
    const int tile16 = step * kClassWarps + warp % kClassWarps;
    ptx::Sums sums[kRows / 2] = {};
    add_votes<kRows>(problem.packed + std::int64_t{tile16} * problem.depths * 2 * kLanes + lane,
                     softs + warp / kClassWarps * (kRows / 2) * kLanes + lane, problem.depths,
                     sums);
    __syncthreads();  // the maps before have been read
    store_maps<kRows>(maps, problem.rules + tile16 * 16, sums);
    __syncthreads();
    ZSSEG_UNROLL(kPasses)
    for (int pass = 0; pass < kPasses; ++pass) {
      if (taps[pass].at >= 0) {
        compete_resized<kRows>(problem, maps, taps[pass], step * kStepClasses, best[pass]);
      }
    }
  }
  ZSSEG_UNROLL(kPasses)
  for (int pass = 0; pass < kPasses; ++pass) {
    const int pixel = threadIdx.x + pass * kThreads;
    if (taps[pass].at >= 0) {
      write_pixel(problem, best[pass], tile.out_y + pixel / tile.out_columns,
                  tile.out_x + pixel % tile.out_columns);
    }
  }
}

// One block kRows x 8 pixels of the canvas: eight warps share the soft masks, then the classes,
// then the pixels. Caller guarantees: the class scores are packed, and shared_bytes of shared
// memory.
template <int kRows, bool kResized>
__global__ void __launch_bounds__(kThreads) label_regions_kernel(Problem problem) {
  auto* softs = dynamic_shared<Registers>();
  __shared__ CellPosition rows[kRows];
  const Tile tile = tile_of_block<kRows, kResized>(problem);
  if (tile.out_rows <= 0 || tile.out_columns <= 0) {
    return;
  }
  if (threadIdx.x < kRows) {
    const int y = min(tile.y + static_cast<int>(threadIdx.x), problem.grid.canvas_height - 1);
    rows[threadIdx.x] = regions::mask_row(problem.grid, y);
  }
  __syncthreads();
  soften_tile<kRows>(problem, tile, rows, softs);
  __syncthreads();
  if (kResized) {
    label_resized<kRows>(problem, tile, softs,
                         reinterpret_cast<float*>(softs + problem.depths * kRows * kLanes));
  } else {
    label_in_place<kRows>(problem, tile, softs);
  }
}

// ---- host ---------------------------------------------------------------------------------------
int num_parts(int whole, int part) {
  return (whole + part - 1) / part;
}

// The longest part of the result that belongs to a tile, along one axis.
int longest_part(int cells, int canvas, int out) {
  int longest = 1;
  const int num_cells = canvas > 1 ? canvas - 1 : 1;
  for (int cell = 0; cell < num_cells; cell += cells) {
    const int length =
        upsample::cell_begin(cell + cells, canvas, out) - upsample::cell_begin(cell, canvas, out);
    longest = length > longest ? length : longest;
  }
  return longest;
}

Slices slices_of(int longest, int most) {
  const int length = longest < most ? longest : most;
  return {num_parts(longest, length), length};
}

// Blocks along one axis.
int num_blocks(int cells, int canvas, const Slices& slices) {
  return (canvas > 1 ? num_parts(canvas - 1, cells) : 1) * slices.count;
}

template <int kRows, bool kResized>
std::size_t shared_bytes(const Problem& problem) {
  return sizeof(Registers) * problem.depths * kRows * kLanes +
         (kResized ? sizeof(float) * kStepClasses * kMapFloats<kRows> : 0);
}

template <int kRows, bool kResized>
void launch_labels(Problem problem, cudaStream_t stream) {
  const regions::MaskGrid& canvas = problem.grid;
  int tiles_x = num_parts(problem.out_width, kColumns);
  int tiles_y = num_parts(problem.out_height, kRows);
  if (kResized) {
    const int longest_x = longest_part(kColumns - 1, canvas.canvas_width, problem.out_width);
    const int longest_y = longest_part(kRows - 1, canvas.canvas_height, problem.out_height);
    problem.slices_x = slices_of(longest_x, kMostColumns);
    problem.slices_y = slices_of(longest_y, kPasses * kThreads / problem.slices_x.length);
    tiles_x = num_blocks(kColumns - 1, canvas.canvas_width, problem.slices_x);
    tiles_y = num_blocks(kRows - 1, canvas.canvas_height, problem.slices_y);
  }
  const dim3 blocks(static_cast<unsigned>(tiles_x), static_cast<unsigned>(tiles_y));
  launch("label_regions_kernel", label_regions_kernel<kRows, kResized>,
         {blocks, kThreads, shared_bytes<kRows, kResized>(problem)}, stream, problem);
}

template <bool kResized>
void launch_fitting(const Problem& problem, cudaStream_t stream) {
  if (shared_bytes<8, kResized>(problem) <= kMostShared) {
    launch_labels<8, kResized>(problem, stream);
  } else {
    launch_labels<4, kResized>(problem, stream);
  }
}

Problem make_problem(const LabelRegionsInputs& inputs, const TensorView& labels,
                     const TensorView* scores, const TensorView& workspace,
                     const LabelRegionsParams& params) {
  Problem problem = {};
  problem.mask_logits = inputs.mask_logits.as<const float>();
  problem.class_scores = inputs.class_scores.as<const float>();
  problem.bias = inputs.bias == nullptr ? nullptr : inputs.bias->as<const float>();
  problem.labels = labels.data;
  problem.scores = scores == nullptr ? nullptr : scores->as<float>();
  problem.grid = {static_cast<int>(inputs.mask_logits.shape[1]),
                  static_cast<int>(inputs.mask_logits.shape[2]),
                  static_cast<int>(params.canvas_height), static_cast<int>(params.canvas_width)};
  problem.num_regions = static_cast<int>(inputs.class_scores.shape[1]);
  problem.num_classes = static_cast<int>(inputs.class_scores.shape[0]);
  problem.depths = num_parts(problem.num_regions, kDepth);
  problem.steps = num_parts(problem.num_classes, kStepClasses);
  problem.packed = workspace.as<Registers>();
  problem.rules = reinterpret_cast<ClassRule*>(
      problem.packed + std::int64_t{problem.steps} * kClassWarps * problem.depths * 2 * kLanes);
  problem.out_height = static_cast<int>(params.height);
  problem.out_width = static_cast<int>(params.width);
  problem.unknown_below = params.unknown_below;
  problem.wide_labels = labels.dtype == DType::uint16;
  return problem;
}

}  // namespace

void label_regions_cuda(const LabelRegionsInputs& inputs, const TensorView& labels,
                        const TensorView* scores, const TensorView& workspace,
                        const LabelRegionsParams& params, StreamHandle stream) {
  const DeviceGuard guard(labels.device.index);
  const Problem problem = make_problem(inputs, labels, scores, workspace, params);
  const auto pack_blocks = static_cast<unsigned>(problem.steps * kStepClasses / kWarps);
  launch("pack_scores_kernel", pack_scores_kernel, {pack_blocks, kThreads}, to_stream(stream),
         problem);
  if (problem.is_in_place()) {
    launch_fitting<false>(problem, to_stream(stream));
  } else {
    launch_fitting<true>(problem, to_stream(stream));
  }
}

}  // namespace zsseg
