#include "zsseg/ops/all_finite.h"

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {

Shape all_finite_shape(const TensorView& values) {
  expect_dtype("values", values, {DType::float32, DType::float16, DType::bfloat16});
  return {1};
}

void all_finite(const TensorView& values, const TensorView& out, StreamHandle stream) {
  const Shape shape = all_finite_shape(values);
  expect_dtype("out", out, {DType::uint8});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "values", values);
  ZSSEG_RUN_KERNEL(out, all_finite, stream, values, out);
}

}  // namespace zsseg
