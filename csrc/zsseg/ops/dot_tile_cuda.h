// A shared-memory tile of dot products between rows: the inner loop of the two matrix-like CUDA
// kernels. For inclusion in <op>_cuda.cu only.
#pragma once

#include <cstdint>

#include "zsseg/half.h"

namespace zsseg {

constexpr int kTile = 64;  // rows and columns a block
constexpr int kSlab = 16;  // depth a step
constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // rows and columns a thread

__device__ inline float as_float(float value) {
  return value;
}
__device__ inline float as_float(Half value) {
  return half_to_float(value);
}

// Shared memory of one block. The extra column keeps the transposed stores off one bank.
struct DotTileStorage {
  float rows[kSlab][kTile + 1];
  float columns[kSlab][kTile + 1];
};

// sums[i][j] += sum over k < depth of row(ty + 16 i, k) * column(tx + 16 j, k), where tx and ty are
// threadIdx.x's low and high four bits. `row` and `column` return 0 outside their matrix and are
// called by neighbouring threads for neighbouring k. visit(storage) runs on every slab. All
// kThreads threads of the block call this.
template <typename Row, typename Column, typename Visit>
__device__ void add_dot_tile(DotTileStorage& storage, const Row& row, const Column& column,
                             std::int64_t depth, const Visit& visit,
                             float (&sums)[kPerThread][kPerThread]) {
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  for (std::int64_t start = 0; start < depth; start += kSlab) {
    for (int index = threadIdx.x; index < kTile * kSlab; index += kThreads) {
      const int line = index / kSlab;
      const int k = index % kSlab;
      const bool inside = start + k < depth;
      storage.rows[k][line] = inside ? row(line, start + k) : 0.0f;
      storage.columns[k][line] = inside ? column(line, start + k) : 0.0f;
    }
    __syncthreads();
    visit(storage);
    for (int k = 0; k < kSlab; ++k) {
      float left[kPerThread];
      float right[kPerThread];
      for (int i = 0; i < kPerThread; ++i) {
        left[i] = storage.rows[k][ty + 16 * i];
        right[i] = storage.columns[k][tx + 16 * i];
      }
      for (int i = 0; i < kPerThread; ++i) {
        for (int j = 0; j < kPerThread; ++j) {
          sums[i][j] += left[i] * right[j];
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace zsseg
