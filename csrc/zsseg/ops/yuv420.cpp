#include "zsseg/ops/yuv420.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {

Shape yuv420_shape(const TensorView& image, const Yuv420Params& params, int plane) {
  expect_dtype("image", image, {DType::uint8});
  expect_shape("image", image, {kAnySize, kAnySize, 3});
  expect_sides("image", image);
  const std::int64_t rows = (image.shape[0] + 1) / 2, columns = (image.shape[1] + 1) / 2;
  if (plane == 0) {
    return {2 * rows, 2 * columns};
  }
  return params.planar ? Shape{rows, columns} : Shape{rows, columns, 2};
}

void yuv420(const TensorView& image, const Yuv420Planes& out, const Yuv420Params& params,
            StreamHandle stream) {
  for (int i = 0; i < yuv420_count(params); ++i) {
    const std::string name = "out[" + std::to_string(i) + "]";
    expect_dtype(name.c_str(), out.plane[i], {DType::uint8});
    expect_shape(name.c_str(), out.plane[i], yuv420_shape(image, params, i));
    expect_same_device(name.c_str(), out.plane[i], "image", image);
  }
  ZSSEG_RUN_KERNEL(image, yuv420, stream, image, out, params);
}

}  // namespace zsseg
