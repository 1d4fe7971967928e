// The arithmetic of one similarity, shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>

#include "zsseg/host_device.h"

namespace zsseg {

// What a row is multiplied by to have unit norm; 0 for a row of zeros, whose cosine is defined as
// 0.
ZSSEG_HOST_DEVICE float inverse_norm(float sum_of_squares) {
  return sum_of_squares == 0.0f ? 0.0f : 1.0f / sqrtf(sum_of_squares);
}

}  // namespace zsseg
