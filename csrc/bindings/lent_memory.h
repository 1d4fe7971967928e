// Memory that callers lend to operations that label pixels.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <utility>

#include "bindings/array_arg.h"
#include "zsseg/device_array.h"
#include "zsseg/tensor_view.h"

namespace zsseg::bindings {

// Splits `out`, which is the labels' array, or a pair of labels and scores, or None. ArgumentError
// where it is neither, or holds scores that are not asked for.
std::pair<pybind11::object, pybind11::object> label_results(const pybind11::object& out,
                                                            bool with_scores);

// The scratch memory of one call: what `workspace` lends, at a multiple of 64 bytes; where that is
// None, this thread's on the CPU and some of the stream's memory pool on CUDA, back to it when
// done.
class ScratchMemory {
 public:
  ScratchMemory(const pybind11::object& workspace, std::size_t bytes, const Device& device,
                StreamHandle stream);

  const TensorView& view() const { return view_; }
  CallArray lent() const { return lent_; }

 private:
  std::optional<ArrayArg> lent_;
  std::optional<DeviceArray> pooled_;
  TensorView view_;
};

}  // namespace zsseg::bindings
