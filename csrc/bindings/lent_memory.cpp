#include "bindings/lent_memory.h"

#include <cstdint>
#include <string>

#include "bindings/host_workspace.h"
#include "zsseg/check.h"
#include "zsseg/error.h"

namespace py = pybind11;

namespace zsseg::bindings {

std::pair<py::object, py::object> label_results(const py::object& out, bool with_scores) {
  std::pair<py::object, py::object> results = {out, py::none()};
  if (py::isinstance<py::tuple>(out)) {
    const auto pair = out.cast<py::tuple>();
    if (pair.size() != 2) {
      fail_argument("out", "labels or a pair of labels and scores",
                    std::to_string(pair.size()) + " arrays");
    }
    results = {pair[0], pair[1]};
  }
  if (!with_scores && !results.second.is_none()) {
    fail_argument("out", "labels only, because with_scores is False", "labels and scores");
  }
  return results;
}

ScratchMemory::ScratchMemory(const py::object& workspace, std::size_t bytes, const Device& device,
                             StreamHandle stream) {
  constexpr std::uintptr_t kAlignment = 64;
  if (!workspace.is_none()) {
    lent_.emplace(ArrayArg::output(workspace, "workspace", stream));
    view_ = lent_->view();
    if (reinterpret_cast<std::uintptr_t>(view_.data) % kAlignment != 0) {
      throw ShapeError(
          "workspace: expected an address at a multiple of 64 bytes, got another one. Pass an "
          "array of its own, not a slice of a larger one.");
    }
  } else if (bytes == 0) {
    view_ = {nullptr, DType::uint8, {0}, device};
  } else if (device.is_cuda()) {
    const Shape shape{static_cast<std::int64_t>(bytes)};
    pooled_.emplace(DeviceArray::empty(shape, DType::uint8, device.index, stream));
    view_ = pooled_->view();
  } else {
    view_ = host_workspace(bytes);
  }
}

}  // namespace zsseg::bindings
