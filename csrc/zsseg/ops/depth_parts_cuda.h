// Several blocks share the depth of a tile of dot products. For inclusion in <op>_cuda.cu only.
//
// Each block leaves its sums in global memory, and the last to arrive adds them in the order of
// their parts, so that results repeat bit for bit. Nobody waits for another block.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "zsseg/ops/depth_parts.h"
#include "zsseg/ops/dot_tile_cuda.h"

namespace zsseg {
namespace {

struct DepthParts {
  int count;     // of blocks a tile; 1: nothing is shared
  int* arrived;  // [tiles]: blocks, zeros before and after
  float* sums;   // [tiles, count, DepthWorkspace::kBlockBytes / 4]

  __device__ int own() const { return static_cast<int>(blockIdx.z) % count; }
  __device__ std::int64_t image() const { return blockIdx.z / count; }
  __device__ std::int64_t image_step() const { return gridDim.z / count; }

  // The slabs of this block are those from first_of(slabs, own()) to before first_of(.., own() +
  // 1).
  __device__ int first_of(int slabs, int part) const { return slabs * part / count; }
};

// Whether this block is the last of `count` to come here.
__device__ inline bool is_last(int* arrived, int count) {
  __shared__ int before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(arrived, 1);
    if (before == count - 1) {
      *arrived = 0;
    }
  }
  __syncthreads();
  __threadfence();
  return before == count - 1;
}

// Adds the sums of the tile's other blocks, and the numbers of its lines, to those of the last
// block to arrive; false for the blocks before it, which have nothing left to do.
template <typename Tile>
__device__ bool add_parts(const DepthParts& parts, float* of_lines) {
  if (!Tile::kSplits || parts.count == 1) {
    return true;
  }
  constexpr int kResults = Tile::kRows * Tile::kColumns, kLines = Tile::kRows + Tile::kColumns;
  constexpr int kFloats = DepthWorkspace::kBlockBytes / 4;
  static_assert(!Tile::kSplits || kResults + kLines == kFloats, "one block's part");
  const std::int64_t tile = (parts.image() * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  volatile float* all = parts.sums + tile * parts.count * kFloats;
  volatile float* own = all + parts.own() * kFloats;
  ZSSEG_UNROLL(1)  // here and below: registers are for the products
  for (int i = threadIdx.x; i < kResults; i += Tile::kThreads) {
    own[i] = PartialSums<Tile>::total(i / Tile::kColumns, i % Tile::kColumns);
  }
  if (of_lines != nullptr && threadIdx.x < kLines) {
    own[kResults + threadIdx.x] = of_lines[threadIdx.x];
  }
  if (!is_last(parts.arrived + tile, parts.count)) {
    return false;
  }
  ZSSEG_UNROLL(1)
  for (int i = threadIdx.x; i < kFloats; i += Tile::kThreads) {
    if (i >= kResults && of_lines == nullptr) {
      break;
    }
    float sum = all[i];
    ZSSEG_UNROLL(1)
    for (int part = 1; part < parts.count; ++part) {
      sum += all[part * kFloats + i];
    }
    if (i < kResults) {
      PartialSums<Tile>::set(i / Tile::kColumns, i % Tile::kColumns, sum);
    } else {
      of_lines[i - kResults] = sum;
    }
  }
  __syncthreads();
  return true;
}

template <typename Tile>
ZSSEG_CALLED __device__ bool called_add_parts(int count, int* arrived, float* sums,
                                              float* of_lines) {
  return add_parts<Tile>({count, arrived, sums}, of_lines);
}

// add_parts by a call.
template <typename Tile>
__device__ bool call_add_parts(const DepthParts& parts, float* of_lines) {
  if constexpr (Tile::kSplits) {
    return parts.count == 1 ||
           called_add_parts<Tile>(parts.count, parts.arrived, parts.sums, of_lines);
  } else {
    return true;
  }
}

// As many blocks a tile as keep the multiprocessors busy and fit into the workspace, each with two
// slabs at least.
template <typename Tile>
DepthParts depth_parts(const TensorView& workspace, const dim3& grid, std::int64_t slabs) {
  DepthParts parts = {1, nullptr, nullptr};
  const std::int64_t tiles = std::int64_t{grid.x} * grid.y * grid.z;
  const std::int64_t bytes = workspace.data == nullptr ? 0 : workspace.count();
  if (!Tile::kSplits || tiles > DepthWorkspace::kMostTiles || bytes < DepthWorkspace::kHeadBytes) {
    return parts;
  }
  const std::int64_t fitting =
      (bytes - DepthWorkspace::kHeadBytes) / DepthWorkspace::kBlockBytes / tiles;
  const std::int64_t count = std::min(std::min(multiprocessors() / tiles, slabs / 2), fitting);
  if (count > 1) {
    parts.count = static_cast<int>(count);
    parts.arrived = reinterpret_cast<int*>(workspace.as<char>() + DepthWorkspace::kVoteBytes);
    parts.sums = reinterpret_cast<float*>(workspace.as<char>() + DepthWorkspace::kHeadBytes);
  }
  return parts;
}

}  // namespace
}  // namespace zsseg
