// Blocks tell together whether all that they wrote is finite. For inclusion in <op>_cuda.cu only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace zsseg {
namespace {

// The last block to come here writes the answer of all and leaves zeros behind.
__device__ inline void vote(std::uint8_t* out, int* votes, int voters, bool finite) {
  __shared__ int bad;
  __syncthreads();
  if (threadIdx.x == 0) {
    bad = 0;
  }
  __syncthreads();
  if (!finite) {
    atomicMax(&bad, 1);
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  if (bad != 0) {
    atomicAdd(&votes[1], 1);
    __threadfence();
  }
  if (atomicAdd(&votes[0], 1) == voters - 1) {
    __threadfence();
    *out = atomicAdd(&votes[1], 0) == 0 ? 1 : 0;
    votes[0] = 0;
    votes[1] = 0;
  }
}

}  // namespace
}  // namespace zsseg
