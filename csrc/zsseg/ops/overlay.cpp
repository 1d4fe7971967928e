#include "zsseg/ops/overlay.h"

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {

Shape overlay_shape(const TensorView& frame, const TensorView& labels, const TensorView& palette,
                    const OverlayParams& params) {
  expect_dtype("frame", frame, {DType::uint8});
  expect_shape("frame", frame, {kAnySize, kAnySize, 3});
  expect_dtype("labels", labels, {DType::uint8, DType::uint16});
  expect_shape("labels", labels, {frame.shape[0], frame.shape[1]});
  expect_dtype("palette", palette, {DType::uint8});
  expect_shape("palette", palette, {kAnySize, 3});
  expect_same_device("labels", labels, "frame", frame);
  expect_same_device("palette", palette, "frame", frame);
  if (!(params.alpha >= 0.0 && params.alpha <= 1.0)) {
    fail_argument("alpha", "a number in [0, 1]", to_text(params.alpha));
  }
  return frame.shape;
}

void overlay(const TensorView& frame, const TensorView& labels, const TensorView& palette,
             const TensorView& out, const OverlayParams& params, StreamHandle stream) {
  const Shape shape = overlay_shape(frame, labels, palette, params);
  expect_dtype("out", out, {DType::uint8});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "frame", frame);
  if (out.count() > 0) {
    ZSSEG_RUN_KERNEL(out, overlay, stream, frame, labels, palette, out, params);
  }
}

}  // namespace zsseg
