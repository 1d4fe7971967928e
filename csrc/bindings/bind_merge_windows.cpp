#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/check.h"
#include "zsseg/ops/merge_windows.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

using Places = std::vector<std::pair<std::int64_t, std::int64_t>>;

WindowPlaces places_of(const Places& corners) {
  constexpr std::int64_t kFarthest = 32766;
  if (corners.size() > kMostWindows) {
    fail_argument("places", "at most 16 windows", std::to_string(corners.size()));
  }
  WindowPlaces places;
  for (const auto& [top, left] : corners) {
    if (top < 0 || top > kFarthest || left < 0 || left > kFarthest) {
      fail_argument("places", "rows and columns from 0 to 32766",
                    "(" + std::to_string(top) + ", " + std::to_string(left) + ")");
    }
    places.top[places.count] = static_cast<std::int32_t>(top);
    places.left[places.count] = static_cast<std::int32_t>(left);
    ++places.count;
  }
  return places;
}

py::object bound_merge_windows(const py::object& logits, const py::object& shares,
                               const Places& places, bool add, const py::object& out,
                               StreamHandle stream) {
  const ArrayArg logits_arg = ArrayArg::input(logits, "logits", stream);
  const ArrayArg shares_arg = ArrayArg::input(shares, "shares", stream);
  if (add && out.is_none()) {
    fail_argument("out", "an array to add to", "None");
  }
  const WindowPlaces where = places_of(places);
  const MergeWindowsArgs args{logits_arg.view(), shares_arg.view(), where, add};
  const OutputArg result(out, "out", merge_windows_shape(args), DType::float32,
                         logits_arg.view().device, stream);
  expect_apart({result}, {logits_arg, shares_arg});
  {
    const py::gil_scoped_release unlocked;
    merge_windows(args, result.view(), stream);
  }
  return result.result();
}

}  // namespace

void register_merge_windows(py::module_& module) {
  module.def("merge_windows", &bound_merge_windows, py::arg("logits"), py::arg("shares"),
             py::arg("places"), py::arg("add"), py::arg("out"), py::arg("stream"));
}

}  // namespace zsseg::bindings
