// Starting kernels. For sources that are compiled as CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "zsseg/cuda_check.h"

// Before a loop of a kernel: how often its body is repeated, which takes registers.
#if defined(__CUDACC__)
#define ZSSEG_PRAGMA(text) _Pragma(#text)
#define ZSSEG_UNROLL(times) ZSSEG_PRAGMA(unroll times)
#else
#define ZSSEG_UNROLL(times)
#endif

// Before a function of a kernel that is called: what it computes with takes no registers of the
// caller's loops.
#if defined(__CUDACC__)
#define ZSSEG_CALLED __noinline__
#else
#define ZSSEG_CALLED
#endif

namespace zsseg {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;  // of dynamic shared memory a block
};

// Enqueues `kernel` on the current device and checks that it was accepted; `name` is for the error.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
            cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cuda_check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name,
             ZSSEG_FILE_NAME, __LINE__);
}

// A block's dynamic shared memory.
template <typename T>
__device__ T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return static_cast<T*>(cuda_emulation::dynamic_shared_memory());
#endif
}

}  // namespace zsseg
