// Checks of the sizes of class logits [B, C, h, w], for every op on them.
#pragma once

#include <cstdint>
#include <string>

#include "zsseg/error.h"
#include "zsseg/ops/upsample_argmax_math.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kMaxLogitClasses = 65534;  // 65535 is unknown
constexpr std::int64_t kMaxLogitBatch = 65535;    // grid.z

inline bool is_image_side(std::int64_t side) {
  return side >= 1 && side <= upsample::kLongestSide;
}

// Throws ShapeError unless a tensor of four axes holds 1 to 65534 classes, sides from 1 to 32767
// and at most 65535 images.
inline void expect_class_logits(const TensorView& logits, const std::string& name = "logits") {
  if (logits.shape[1] < 1 || logits.shape[1] > kMaxLogitClasses) {
    throw ShapeError(name + ": expected from 1 to 65534 classes, got " + to_string(logits.shape) +
                     ". Set the classes first.");
  }
  if (!is_image_side(logits.shape[2]) || !is_image_side(logits.shape[3])) {
    throw ShapeError(name + ": expected sides from 1 to 32767, got " + to_string(logits.shape) +
                     ". Check the order of its axes.");
  }
  if (logits.shape[0] > kMaxLogitBatch) {
    throw ShapeError(name + ": expected at most 65535 images, got " + to_string(logits.shape) +
                     ". Split the batch.");
  }
}

}  // namespace zsseg
