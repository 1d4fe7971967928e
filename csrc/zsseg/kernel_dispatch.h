// The last step of every <op>.cpp: from checked arguments to the kernel of their device.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/cuda_runtime.h"
#include "zsseg/tensor_view.h"

// ZSSEG_RUN_KERNEL(out, overlay, stream, frame, labels, palette, out, params) calls
//   isa_<set>::overlay_cpu(frame, labels, palette, out, params)          where out is on the CPU,
//   overlay_cuda(frame, labels, palette, out, params, stream)            where out is on CUDA,
// and throws DeviceError for CUDA arrays in a build without CUDA.
#define ZSSEG_RUN_KERNEL(view, op, stream, ...)       \
  do {                                                \
    if (!(view).device.is_cuda()) {                   \
      ZSSEG_CALL_CPU_KERNEL(op##_cpu, __VA_ARGS__);   \
    } else {                                          \
      ZSSEG_RUN_CUDA_KERNEL(op, stream, __VA_ARGS__); \
    }                                                 \
  } while (false)

#if ZSSEG_WITH_CUDA
#define ZSSEG_RUN_CUDA_KERNEL(op, stream, ...) op##_cuda(__VA_ARGS__, stream)
#else
#define ZSSEG_RUN_CUDA_KERNEL(op, stream, ...) \
  static_cast<void>(stream);                   \
  ::zsseg::cuda::expect_device("device", 0)
#endif
