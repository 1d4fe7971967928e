// Labels of a full-size image from low-resolution class logits, without full-size logits.
#pragma once

#include <cstddef>
#include <limits>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/ops/upsample_argmax_math.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

struct UpsampleArgmaxParams {
  std::int64_t height = 0;  // of the result
  std::int64_t width = 0;
  upsample::Activation activation = upsample::Activation::kNone;
  float seen_bias = 0.0f;                                         // taken off seen classes
  float unknown_below = -std::numeric_limits<float>::infinity();  // no threshold
  Align align = Align::kHalfPixel;                                // where grid points lie
};

// A drawing of the labels as they are stored: as `overlay` does afterwards, bit for bit.
struct LabelOverlay {
  TensorView frame;    // uint8 [H,W,3]
  TensorView palette;  // uint8 [K,3]
  TensorView picture;  // uint8 [H,W,3]; may be `frame` itself
  double alpha = 0.5;  // weight of the palette's colour, in [0, 1]
};

// Null is left out. All on the logits' device, but `seen` may be on the CPU.
struct UpsampleArgmaxInputs {
  TensorView logits;                 // float32, float16 or bfloat16 [B,C,h,w]
  const TensorView* seen = nullptr;  // bool [C]
  const TensorView* label_table =
      nullptr;  // uint8 or uint16 [C or more]: stored in a class's stead
  // int32 [1]: how many of the C classes count, the first ones; read when the kernel runs. Outside
  // 0 to C: an error on the CPU, on CUDA as the nearest of them.
  const TensorView* num_classes = nullptr;
  const LabelOverlay* overlay = nullptr;  // of one image; part of the same launch on CUDA
};

// -> labels [B,H,W], scores float32 [B,H,W]: bilinear upsampling (by `align`, edges clamped) ->
// activation -> minus seen_bias where seen -> argmax, ties to the lowest index. A score
// is the winner's activated value without the bias; below unknown_below the pixel is unknown (255,
// 65535). A NaN or infinitely negative logit never wins; a pixel without any other is unknown, its
// score 0, or -infinity if the activation is none. Checks the inputs and returns the shape of
// labels and scores.
Shape upsample_argmax_shape(const UpsampleArgmaxInputs& inputs, const UpsampleArgmaxParams& params);

// The table's; without one uint8 up to 254 classes, uint16 above.
DType upsample_argmax_label_dtype(const UpsampleArgmaxInputs& inputs);

// Bytes of workspace, on the logits' device, that a call needs, whatever the number of classes;
// none on CUDA.
std::size_t upsample_argmax_workspace_bytes(const UpsampleArgmaxInputs& inputs,
                                            const UpsampleArgmaxParams& params);

// `scores` may be null. `workspace` is any array of at least the bytes above, aligned to 64; its
// content does not matter.
void upsample_argmax(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                     const TensorView* scores, const TensorView& workspace,
                     const UpsampleArgmaxParams& params, StreamHandle stream);

// Where the CPU kernel keeps what in its workspace: byte offsets, all multiples of 64.
struct CpuLayout {
  int num_classes;     // that count
  int num_groups;      // 2 where some classes are seen, some not, and the bias is not 0
  int group_begin[3];  // positions of each group's classes; see upsample_argmax_cells.h
  std::size_t ids, row_s, row_t, column_s, column_t, row_begin, column_begin;
  std::size_t slots;  // the first thread's; the next one's is slot_bytes later
  std::size_t vectors, top_logit, top, rows, scratch;  // from the beginning of a slot
  int num_slots;
  std::size_t slot_bytes, bytes;
};
CpuLayout upsample_argmax_cpu_layout(const UpsampleArgmaxInputs& inputs,
                                     const UpsampleArgmaxParams& params, int num_slots);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void upsample_argmax_cpu(
    const UpsampleArgmaxInputs& inputs, const TensorView& labels, const TensorView* scores,
    const TensorView& workspace, const UpsampleArgmaxParams& params))
void upsample_argmax_cuda(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                          const TensorView* scores, const TensorView& workspace,
                          const UpsampleArgmaxParams& params, StreamHandle stream);

}  // namespace zsseg
