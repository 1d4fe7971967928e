#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/ink.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

void bound_ink(const py::object& picture, const py::object& weights,
               const std::pair<std::int64_t, std::int64_t>& place,
               const std::vector<std::array<std::uint8_t, 3>>& colours, StreamHandle stream) {
  const ArrayArg picture_arg = ArrayArg::output(picture, "picture", stream);
  const ArrayArg weights_arg = ArrayArg::input(weights, "weights", stream);
  const Shape& shape = weights_arg.view().shape;
  if (colours.empty() || colours.size() > kMostInks ||
      (shape.rank == 3 && shape[0] != static_cast<std::int64_t>(colours.size()))) {
    fail_argument("colours", "1 to 4, and weights of each",
                  std::to_string(colours.size()) + " and weights " + to_string(shape));
  }
  InkParams params{place.first, place.second};
  for (std::size_t i = 0; i < colours.size(); ++i) {
    std::copy(colours[i].begin(), colours[i].end(), params.colours[i]);
  }
  expect_apart({picture_arg}, {weights_arg});
  const py::gil_scoped_release unlocked;
  ink(picture_arg.view(), weights_arg.view(), params);
}

}  // namespace

void register_ink(py::module_& module) {
  module.def("ink", &bound_ink, py::arg("picture"), py::arg("weights"), py::arg("place"),
             py::arg("colours"), py::arg("stream"));
}

}  // namespace zsseg::bindings
