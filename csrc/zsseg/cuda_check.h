// Every CUDA call is checked where it is made; cuda_launch.h checks launches. For sources that are
// built with CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "zsseg/error.h"

namespace zsseg {

inline void cuda_check(cudaError_t status, const char* call, const char* file, int line) {
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // do not let the next check report it again
    throw CudaError(std::string(call) + ": expected success, got " + cudaGetErrorName(status) +
                    " (" + cudaGetErrorString(status) + ") at " + file + ":" +
                    std::to_string(line) + ". Run 'zsseg-rt doctor'.");
  }
}

}  // namespace zsseg

// The file's own name where the compiler tells it: build paths do not belong into messages.
#if defined(__FILE_NAME__)
#define ZSSEG_FILE_NAME __FILE_NAME__
#else
#define ZSSEG_FILE_NAME __FILE__
#endif

#define ZSSEG_CUDA_CHECK(call) ::zsseg::cuda_check((call), #call, ZSSEG_FILE_NAME, __LINE__)
