#include "zsseg/ops/relationship_descriptor.h"

#include "zsseg/check.h"
#include "zsseg/kernel_dispatch.h"

namespace zsseg {
namespace {

void expect_text_half(const RelationshipDescriptorInputs& inputs) {
  expect_dtype("text_embeds", inputs.text_embeds,
               {DType::float32, DType::float16, DType::bfloat16});
  expect_shape("text_embeds", inputs.text_embeds, {kAnySize, kAnySize});
  expect_dtype("weight", inputs.weight, {inputs.text_embeds.dtype});
  expect_shape("weight", inputs.weight, {kAnySize, 2 * inputs.text_embeds.shape[1]});
  expect_dtype("bias", inputs.bias, {DType::float32});
  expect_shape("bias", inputs.bias, {inputs.weight.shape[0]});
  expect_same_device("weight", inputs.weight, "text_embeds", inputs.text_embeds);
  expect_same_device("bias", inputs.bias, "text_embeds", inputs.text_embeds);
}

void expect_out_dtype(const TensorView& out, DType text) {
  if (text == DType::float32) {
    expect_dtype("out", out, {DType::float32});
  } else {
    expect_dtype("out", out, {DType::float32, text});
  }
}

void run(const RelationshipDescriptorInputs& inputs, const TensorView& out, const Shape& shape,
         StreamHandle stream) {
  expect_out_dtype(out, inputs.text_embeds.dtype);
  expect_shape("out", out, shape);
  expect_same_device("out", out, "text_embeds", inputs.text_embeds);
  expect_workspace(inputs.workspace, "text_embeds", inputs.text_embeds);
  if (out.count() > 0) {
    ZSSEG_RUN_KERNEL(out, relationship_descriptor, stream, inputs, out);
  }
}

}  // namespace

Shape relationship_descriptor_shape(const RelationshipDescriptorInputs& inputs) {
  expect_text_half(inputs);
  const Shape& text = inputs.text_embeds.shape;
  const Shape shape{inputs.cls_embed.shape[0], text[0], inputs.weight.shape[0]};
  expect_dtype("cls_embed", inputs.cls_embed, {inputs.text_embeds.dtype});
  expect_shape("cls_embed", inputs.cls_embed, {kAnySize, text[1]});
  expect_same_device("cls_embed", inputs.cls_embed, "text_embeds", inputs.text_embeds);
  if (inputs.text_queries.dtype != DType::other || inputs.text_queries.data != nullptr) {
    expect_dtype("text_queries", inputs.text_queries, {DType::float32});
    expect_shape("text_queries", inputs.text_queries, {text[0], inputs.weight.shape[0]});
    expect_same_device("text_queries", inputs.text_queries, "text_embeds", inputs.text_embeds);
  }
  return shape;
}

Shape relationship_descriptor_text_shape(const RelationshipDescriptorInputs& inputs) {
  expect_text_half(inputs);
  return {inputs.text_embeds.shape[0], inputs.weight.shape[0]};
}

void relationship_descriptor(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                             StreamHandle stream) {
  run(inputs, out, relationship_descriptor_shape(inputs), stream);
}

void relationship_descriptor_text(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                                  StreamHandle stream) {
  RelationshipDescriptorInputs text_half = inputs;
  text_half.cls_embed = TensorView{};
  text_half.text_queries = TensorView{};
  run(text_half, out, relationship_descriptor_text_shape(text_half), stream);
}

}  // namespace zsseg
