#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/preprocess.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

std::array<double, 3> three_numbers(const char* name, const std::vector<double>& values,
                                    const char* expected) {
  if (values.size() != 3) {
    fail_argument(name, expected, std::to_string(values.size()) + " numbers");
  }
  return {values[0], values[1], values[2]};
}

bool is_bgr(const std::string& channel_order) {
  if (channel_order != "rgb" && channel_order != "bgr") {
    fail_argument("channel_order", "'rgb' or 'bgr'", "'" + channel_order + "'");
  }
  return channel_order == "bgr";
}

py::object bound_preprocess(const py::object& frame, std::pair<std::int64_t, std::int64_t> size_hw,
                            const std::vector<double>& mean, const std::vector<double>& std,
                            const std::string& channel_order, const py::object& out,
                            StreamHandle stream) {
  const ArrayArg frame_arg = ArrayArg::input(frame, "frame", stream);
  const PreprocessParams params{
      size_hw.first, size_hw.second, three_numbers("mean", mean, "3 finite numbers"),
      three_numbers("std", std, "3 finite numbers above 0"), is_bgr(channel_order)};
  const Shape shape = preprocess_shape(frame_arg.view(), params);
  const OutputArg result(out, "out", shape, DType::float32, frame_arg.view().device, stream);
  {
    const py::gil_scoped_release unlocked;
    preprocess(frame_arg.view(), result.view(), params, stream);
  }
  return result.result();
}

}  // namespace

void register_preprocess(py::module_& module) {
  module.def("preprocess", &bound_preprocess, py::arg("frame"), py::arg("size_hw"), py::arg("mean"),
             py::arg("std"), py::arg("channel_order"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
