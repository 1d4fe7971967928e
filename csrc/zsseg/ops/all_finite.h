// Whether an array holds neither NaN nor infinity: one byte crosses the bus instead of the array.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/half.h"
#include "zsseg/host_device.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

ZSSEG_HOST_DEVICE bool is_finite(float value) {
  return (float_to_bits(value) & 0x7f800000u) != 0x7f800000u;
}
ZSSEG_HOST_DEVICE bool is_finite(Half value) {
  return (value.bits & 0x7c00u) != 0x7c00u;
}
ZSSEG_HOST_DEVICE bool is_finite(Bfloat16 value) {
  return (value.bits & 0x7f80u) != 0x7f80u;
}

// values float32, float16 or bfloat16 of any shape -> uint8 [1]: 1 if every value is finite, else
// 0. Checks the input and returns the result's shape.
Shape all_finite_shape(const TensorView& values);

void all_finite(const TensorView& values, const TensorView& out, StreamHandle stream);

// Arguments are checked; `values` may be empty.
ZSSEG_DECLARE_CPU_KERNEL(void all_finite_cpu(const TensorView& values, const TensorView& out))
void all_finite_cuda(const TensorView& values, const TensorView& out, StreamHandle stream);

}  // namespace zsseg
