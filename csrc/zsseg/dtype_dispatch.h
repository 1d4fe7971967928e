// From a run-time element type to a compile-time one.
#pragma once

#include "zsseg/half.h"
#include "zsseg/tensor_view.h"

// Runs the statements with `T` naming float or zsseg::Half. The caller has checked that the dtype
// is one of the two. A macro because the kernels it calls are compiled once per instruction set.
#define ZSSEG_DISPATCH_FLOAT(dtype, T, ...)   \
  do {                                        \
    if ((dtype) == ::zsseg::DType::float16) { \
      using T = ::zsseg::Half;                \
      __VA_ARGS__;                            \
    } else {                                  \
      using T = float;                        \
      __VA_ARGS__;                            \
    }                                         \
  } while (false)

// As above with three types: float, zsseg::Half or zsseg::Bfloat16.
#define ZSSEG_DISPATCH_ANY_FLOAT(dtype, T, ...)      \
  do {                                               \
    if ((dtype) == ::zsseg::DType::bfloat16) {       \
      using T = ::zsseg::Bfloat16;                   \
      __VA_ARGS__;                                   \
    } else {                                         \
      ZSSEG_DISPATCH_FLOAT((dtype), T, __VA_ARGS__); \
    }                                                \
  } while (false)

// As above for label types: std::uint8_t or std::uint16_t.
#define ZSSEG_DISPATCH_LABEL(dtype, T, ...)  \
  do {                                       \
    if ((dtype) == ::zsseg::DType::uint16) { \
      using T = std::uint16_t;               \
      __VA_ARGS__;                           \
    } else {                                 \
      using T = std::uint8_t;                \
      __VA_ARGS__;                           \
    }                                        \
  } while (false)
