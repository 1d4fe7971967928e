#include "zsseg/ops/count_labels.h"

#include <string>

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {
namespace {

constexpr std::int64_t kMaxClasses = 65534;  // 65535 is unknown

}  // namespace

Shape count_labels_shape(const TensorView& labels, std::int64_t num_classes) {
  expect_dtype("labels", labels, {DType::uint8, DType::uint16});
  if (num_classes < 0 || num_classes > kMaxClasses) {
    fail_argument("num_classes", "from 0 to " + std::to_string(kMaxClasses),
                  std::to_string(num_classes));
  }
  return {num_classes + 1};
}

void count_labels(const TensorView& labels, std::int64_t num_classes, const TensorView& out,
                  StreamHandle stream) {
  const Shape shape = count_labels_shape(labels, num_classes);
  expect_dtype("out", out, {DType::int64});
  expect_shape("out", out, shape);
  expect_same_device("out", out, "labels", labels);
  ZSSEG_RUN_KERNEL(out, count_labels, stream, labels, out);
}

}  // namespace zsseg
