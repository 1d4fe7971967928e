#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/array_arg.h"
#include "bindings/frame_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/yuv420.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

constexpr const char* kNames[3] = {"out[0]", "out[1]", "out[2]"};

bool is_planar(const std::string& layout) {
  if (layout != "nv12" && layout != "i420") {
    fail_argument("layout", "'nv12' or 'i420'", "'" + layout + "'");
  }
  return layout == "i420";
}

py::tuple bound_yuv420(const py::object& image, const std::string& layout,
                       const std::string& channel_order, const std::string& colour_matrix,
                       const std::optional<py::tuple>& out, StreamHandle stream) {
  const ArrayArg image_arg = ArrayArg::input(image, "image", stream);
  const Yuv420Params params{is_planar(layout), is_bgr(channel_order), parse_matrix(colour_matrix)};
  const int count = yuv420_count(params);
  if (out && static_cast<int>(out->size()) != count) {
    fail_argument("out", std::to_string(count) + " planes",
                  std::to_string(out->size()) + " planes");
  }
  std::optional<OutputArg> made[3];
  Yuv420Planes planes = {};
  py::tuple results(count);
  for (int i = 0; i < count; ++i) {
    const py::object given = out ? py::object((*out)[i]) : py::none();
    made[i].emplace(given, kNames[i], yuv420_shape(image_arg.view(), params, i), DType::uint8,
                    image_arg.view().device, stream, true);
    planes.plane[i] = made[i]->view();
    planes.row_bytes[i] = made[i]->row_bytes();
    results[i] = made[i]->result();
  }
  expect_apart({made[0], made[1], made[2]}, {image_arg});
  {
    const py::gil_scoped_release unlocked;
    yuv420(image_arg.view(), planes, params, stream);
  }
  return results;
}

}  // namespace

void register_yuv420(py::module_& module) {
  module.def("yuv420", &bound_yuv420, py::arg("image"), py::arg("layout"), py::arg("channel_order"),
             py::arg("colour_matrix"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
