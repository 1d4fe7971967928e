// How many pixels carry each label.
#pragma once

#include <cstdint>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/host_device.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

// Kernels count one window of classes at a time, so that the bins stay in the fastest memory. The
// last bin takes the labels outside the window; bytes need one window only.
template <typename Label>
constexpr int kLabelBins = sizeof(Label) == 1 ? 256 : 2048;

template <typename Label>
constexpr int kWindowClasses = kLabelBins<Label> - 1;

// The classes that labels can name: the largest value of the label's type means unknown.
template <typename Label>
ZSSEG_HOST_DEVICE std::int64_t countable_classes(std::int64_t num_classes) {
  constexpr std::int64_t unknown = static_cast<Label>(~Label{0});
  return num_classes < unknown ? num_classes : unknown;
}

// How many classes the window that starts at class `first` holds.
template <typename Label>
ZSSEG_HOST_DEVICE int window_classes(std::int64_t first, std::int64_t num_classes) {
  const std::int64_t left = countable_classes<Label>(num_classes) - first;
  return left < kWindowClasses<Label> ? static_cast<int>(left) : kWindowClasses<Label>;
}

// The bin of a label in that window. A label below it wraps round to beyond the last class.
template <typename Label>
ZSSEG_HOST_DEVICE int label_bin(Label label, std::int64_t first) {
  const auto offset = static_cast<Label>(label - first);
  return offset < kWindowClasses<Label> ? offset : kWindowClasses<Label>;
}

// labels uint8 or uint16 of any shape -> int64 [num_classes + 1]: how many labels equal each class,
// then how many equal none: unknown (255, 65535) or not below num_classes.
// Checks the inputs and returns the result's shape.
Shape count_labels_shape(const TensorView& labels, std::int64_t num_classes);

void count_labels(const TensorView& labels, std::int64_t num_classes, const TensorView& out,
                  StreamHandle stream);

// Arguments are checked; `labels` may be empty.
ZSSEG_DECLARE_CPU_KERNEL(void count_labels_cpu(const TensorView& labels, const TensorView& out))
void count_labels_cuda(const TensorView& labels, const TensorView& out, StreamHandle stream);

}  // namespace zsseg
