#include "zsseg/ops/overlay.h"

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {

Shape overlay_shape(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
                    const OverlayParams& params) {
  const TensorView& pixels = frame.pixels;
  if (frame.chroma != nullptr) {
    expect_planes(frame);
  } else {
    expect_dtype("frame", pixels, {DType::uint8});
    expect_shape("frame", pixels, {kAnySize, kAnySize, 3});
  }
  expect_dtype("labels", labels, {DType::uint8, DType::uint16});
  expect_shape("labels", labels, {pixels.shape[0], pixels.shape[1]});
  expect_dtype("palette", palette, {DType::uint8});
  expect_shape("palette", palette, {kAnySize, 3});
  expect_same_device("labels", labels, "frame", pixels);
  expect_same_device("palette", palette, "frame", pixels);
  if (!(params.alpha >= 0.0 && params.alpha <= 1.0)) {
    fail_argument("alpha", "a number in [0, 1]", to_text(params.alpha));
  }
  return {pixels.shape[0], pixels.shape[1], 3};
}

void overlay(const CameraFrame& frame, const TensorView& labels, const TensorView& palette,
             const TensorView& out, const OverlayParams& params, StreamHandle stream) {
  const Shape shape = overlay_shape(frame, labels, palette, params);
  expect_dtype("out", out, {DType::uint8});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "frame", frame.pixels);
  if (out.count() > 0) {
    ZSSEG_RUN_KERNEL(out, overlay, stream, frame, labels, palette, out, params);
  }
}

}  // namespace zsseg
