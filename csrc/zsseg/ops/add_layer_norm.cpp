#include "zsseg/ops/add_layer_norm.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/error.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {
namespace {

// Of float32 or a half precision.
void expect_alike(const char* name, const TensorView& view, const TensorView& x,
                  const Shape& shape) {
  expect_dtype(name, view, {x.dtype});
  expect_shape(name, view, shape);
  expect_same_device(name, view, "x", x);
}

void expect_weights(const char* name, const TensorView& view, const Shape& shape,
                    const TensorView& x) {
  expect_dtype(name, view, {DType::float32});
  expect_shape(name, view, shape);
  expect_same_device(name, view, "x", x);
}

}  // namespace

Shape add_layer_norm_shape(const AddLayerNormArgs& args) {
  const Shape& shape = args.y.shape;
  expect_dtype("x", args.x, {DType::float32, DType::float16, DType::bfloat16});
  expect_shape("x", args.x, {kAnySize, kAnySize});
  expect_alike("y", args.y, args.x, {args.x.shape[0], kAnySize});
  if (shape[1] < 1 || shape[1] > kMaxNormWidth) {
    throw ShapeError("y: expected rows of 1 to " + std::to_string(kMaxNormWidth) + ", got " +
                     to_string(shape) + ". Add and normalise wider rows in two steps.");
  }
  if (args.x.shape[1] < shape[1]) {
    throw ShapeError("x: expected rows of at least " + std::to_string(shape[1]) + ", got " +
                     to_string(args.x.shape) + ". Give rows that are as wide as those of y.");
  }
  expect_weights("scale", args.scale, {kAnySize, shape[1]}, args.x);
  if (args.scale.shape[0] < 1 || args.scale.shape[0] > kMaxNorms) {
    throw ShapeError("scale: expected 1 or 2 rows, one a norm, got " + to_string(args.scale.shape) +
                     ". Call it once more for a third norm.");
  }
  expect_weights("shift", args.shift, args.scale.shape, args.x);
  if (args.total_after < 0 || args.total_after >= args.scale.shape[0]) {
    fail_argument("total_after", "0 to " + std::to_string(args.scale.shape[0] - 1),
                  std::to_string(args.total_after));
  }
  return shape;
}

void add_layer_norm(const AddLayerNormArgs& args, const AddLayerNormOutputs& outputs,
                    StreamHandle stream) {
  static_cast<void>(add_layer_norm_shape(args));
  expect_alike("out", outputs.out, args.x, args.y.shape);
  if (outputs.total.data != nullptr) {
    expect_alike("total", outputs.total, args.x, args.y.shape);
  }
  if (outputs.out.count() > 0) {
    ZSSEG_RUN_KERNEL(outputs.out, add_layer_norm, stream, args, outputs);
  }
}

}  // namespace zsseg
