// The arithmetic of one similarity and the dtypes it takes, shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>
#include <type_traits>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/host_device.h"

// Runs the statement with `Patch` and `Text` naming the two types; float16 does not meet bfloat16,
// which the caller has checked.
#define ZSSEG_DISPATCH_SIMILARITY(patch_dtype, text_dtype, ...) \
  ZSSEG_DISPATCH_ANY_FLOAT(                                     \
      patch_dtype, Patch,                                       \
      ZSSEG_DISPATCH_ANY_FLOAT(                                 \
          text_dtype, Text, if constexpr (::zsseg::kMeet<Patch, Text>) { __VA_ARGS__; }))

namespace zsseg {

template <typename Patch, typename Text>
constexpr bool kMeet =
    std::is_same_v<Patch, Text> || std::is_same_v<Patch, float> || std::is_same_v<Text, float>;

// The factor that gives a row unit norm; 0 for a row of zeros, whose cosine is defined as 0.
ZSSEG_HOST_DEVICE float inverse_norm(float sum_of_squares) {
  return sum_of_squares == 0.0f ? 0.0f : 1.0f / sqrtf(sum_of_squares);
}

}  // namespace zsseg
