#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/register.h"
#include "zsseg/ops/relationship_descriptor.h"

namespace py = pybind11;

namespace zsseg::bindings {
namespace {

// The dtype of the result: that of `out`, if it is one that can be.
DType descriptor_dtype(const py::object& out, DType text, StreamHandle stream) {
  if (out.is_none()) {
    return DType::float32;
  }
  return ArrayArg::output(out, "out", stream).view().dtype == text ? text : DType::float32;
}

py::object bound_relationship_descriptor(const py::object& cls_embed, const py::object& text_embeds,
                                         const py::object& weight, const py::object& bias,
                                         const py::object& text_queries, const py::object& out,
                                         const py::object& workspace, StreamHandle stream) {
  const ArrayArg cls = ArrayArg::input(cls_embed, "cls_embed", stream);
  const ArrayArg text = ArrayArg::input(text_embeds, "text_embeds", stream);
  const ArrayArg weights = ArrayArg::input(weight, "weight", stream);
  const ArrayArg biases = ArrayArg::input(bias, "bias", stream);
  const auto queries = ArrayArg::optional_input(text_queries, "text_queries", stream);
  const auto work = ArrayArg::optional_output(workspace, "workspace", stream);
  const RelationshipDescriptorInputs inputs{
      cls.view(),    text.view(),           weights.view(),
      biases.view(), view_or_none(queries), view_or_none(work)};
  const Shape shape = relationship_descriptor_shape(inputs);
  const OutputArg result(out, "out", shape, descriptor_dtype(out, text.view().dtype, stream),
                         text.view().device, stream);
  expect_apart({result, work}, {cls, text, weights, biases, queries});
  {
    const py::gil_scoped_release unlocked;
    relationship_descriptor(inputs, result.view(), stream);
  }
  return result.result();
}

py::object bound_relationship_descriptor_text(const py::object& text_embeds,
                                              const py::object& weight, const py::object& bias,
                                              const py::object& out, const py::object& workspace,
                                              StreamHandle stream) {
  const ArrayArg text = ArrayArg::input(text_embeds, "text_embeds", stream);
  const ArrayArg weights = ArrayArg::input(weight, "weight", stream);
  const ArrayArg biases = ArrayArg::input(bias, "bias", stream);
  const auto work = ArrayArg::optional_output(workspace, "workspace", stream);
  const RelationshipDescriptorInputs inputs{TensorView{},  text.view(),  weights.view(),
                                            biases.view(), TensorView{}, view_or_none(work)};
  const Shape shape = relationship_descriptor_text_shape(inputs);
  const OutputArg result(out, "out", shape, descriptor_dtype(out, text.view().dtype, stream),
                         text.view().device, stream);
  expect_apart({result, work}, {text, weights, biases});
  {
    const py::gil_scoped_release unlocked;
    relationship_descriptor_text(inputs, result.view(), stream);
  }
  return result.result();
}

}  // namespace

void register_relationship_descriptor(py::module_& module) {
  module.def("relationship_descriptor", &bound_relationship_descriptor, py::arg("cls_embed"),
             py::arg("text_embeds"), py::arg("weight"), py::arg("bias"), py::arg("text_queries"),
             py::arg("out"), py::arg("workspace"), py::arg("stream"));
  module.def("relationship_descriptor_text", &bound_relationship_descriptor_text,
             py::arg("text_embeds"), py::arg("weight"), py::arg("bias"), py::arg("out"),
             py::arg("workspace"), py::arg("stream"));
}

}  // namespace zsseg::bindings
