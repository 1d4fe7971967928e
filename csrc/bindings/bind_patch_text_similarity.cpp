#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/patch_text_similarity.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

py::object bound_patch_text_similarity(const py::object& patch_embeds,
                                       const py::object& text_embeds, double logit_scale,
                                       bool normalize, bool classes_last, const py::object& out,
                                       const py::object& finite, const py::object& workspace,
                                       StreamHandle stream) {
  const ArrayArg patches = ArrayArg::input(patch_embeds, "patch_embeds", stream);
  const ArrayArg text = ArrayArg::input(text_embeds, "text_embeds", stream);
  const PatchTextSimilarityParams params{logit_scale, normalize, classes_last};
  const Shape shape = patch_text_similarity_shape(patches.view(), text.view(), params);
  const OutputArg result(out, "out", shape, DType::float32, patches.view().device, stream);
  const auto held_finite = ArrayArg::optional_output(finite, "finite", stream);
  const auto held_workspace = ArrayArg::optional_output(workspace, "workspace", stream);
  const FiniteCheck check{view_or_none(held_finite), view_or_none(held_workspace)};
  expect_apart({result, held_finite, held_workspace}, {patches, text});
  {
    const py::gil_scoped_release unlocked;
    patch_text_similarity(patches.view(), text.view(), result.view(), params, stream, check);
  }
  return result.result();
}

}  // namespace

void register_patch_text_similarity(py::module_& module) {
  module.attr("DEPTH_WORKSPACE_BYTES") = DepthWorkspace::kBytes;
  module.def("patch_text_similarity", &bound_patch_text_similarity, py::arg("patch_embeds"),
             py::arg("text_embeds"), py::arg("logit_scale"), py::arg("normalize"),
             py::arg("classes_last"), py::arg("out"), py::arg("finite"), py::arg("workspace"),
             py::arg("stream"));
}

}  // namespace zsseg::bindings
