#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/align_arg.h"
#include "bindings/array_arg.h"
#include "bindings/frame_arg.h"
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

// The dtype of the result: that of `out`, if it is one that can be.
DType result_dtype(const py::object& out, StreamHandle stream) {
  if (out.is_none()) {
    return DType::float32;
  }
  const ArrayArg result = ArrayArg::output(out, "out", stream);
  const DType dtype = result.view().dtype;
  return dtype == DType::float16 || dtype == DType::bfloat16 ? dtype : DType::float32;
}

using Sides = std::pair<std::int64_t, std::int64_t>;

py::object bound_preprocess(const py::object& frame, Sides size_hw, const std::vector<double>& mean,
                            const std::vector<double>& std, const std::string& channel_order,
                            const std::string& colour_matrix, const std::string& align,
                            std::optional<Sides> whole_hw, Sides origin, const py::object& out,
                            StreamHandle stream) {
  const FrameArg frame_arg(frame, stream);
  const Sides whole = whole_hw ? *whole_hw : size_hw;
  const PreprocessParams params{size_hw.first,
                                size_hw.second,
                                three_numbers("mean", mean, "3 finite numbers"),
                                three_numbers("std", std, "3 finite numbers above 0"),
                                is_bgr(channel_order),
                                parse_matrix(colour_matrix),
                                parse_align(align),
                                whole.first,
                                whole.second,
                                origin.first,
                                origin.second};
  const CameraFrame view = frame_arg.view();
  const Shape shape = preprocess_shape(view, params);
  const OutputArg result(out, "out", shape, result_dtype(out, stream), view.pixels.device, stream);
  expect_apart({result}, {frame_arg.pixels(), frame_arg.chroma()});
  {
    const py::gil_scoped_release unlocked;
    preprocess(view, result.view(), params, stream);
  }
  return result.result();
}

}  // namespace

void register_preprocess(py::module_& module) {
  module.def("preprocess", &bound_preprocess, py::arg("frame"), py::arg("size_hw"), py::arg("mean"),
             py::arg("std"), py::arg("channel_order"), py::arg("colour_matrix"), py::arg("align"),
             py::arg("whole_hw"), py::arg("origin"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
