// Labels of an image from soft masks that vote for classes, without full-size score maps.
#pragma once

#include <cstddef>
#include <limits>

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr std::int64_t kMaxRegions = 256;  // 32 pixels of every soft mask fill a block's memory

struct LabelRegionsParams {
  std::int64_t canvas_height = 0;  // where masks become soft
  std::int64_t canvas_width = 0;
  std::int64_t height = 0;  // of the result
  std::int64_t width = 0;
  float unknown_below = -std::numeric_limits<float>::infinity();  // no threshold
};

// All float32; `bias` may be null.
struct LabelRegionsInputs {
  TensorView mask_logits;   // [Q,h,w]
  TensorView class_scores;  // [C,Q]
  const TensorView* bias;   // [C]
};

// -> labels uint8 or uint16 [H,W], scores float32 [H,W]. Score maps are the sums over the masks of
// class_scores * sigmoid(mask_logits upsampled to the canvas), resized to the result (bilinear,
// half-pixel centres, edges clamped, both times). The label is the class whose score less its bias
// is largest, ties to the lowest index; its score, without the bias and at most 1, is the pixel's;
// below unknown_below the pixel is unknown (255, 65535). NaN never wins. Checks the inputs and
// returns the shape of labels and scores.
Shape label_regions_shape(const LabelRegionsInputs& inputs, const LabelRegionsParams& params);

// uint8 up to 254 classes, uint16 above.
DType label_regions_dtype(const LabelRegionsInputs& inputs);

// Bytes of workspace, on the masks' device, that a call needs.
std::size_t label_regions_workspace_bytes(const LabelRegionsInputs& inputs,
                                          const LabelRegionsParams& params);

// The same for arrays on CUDA, of so many classes and masks: 4 bytes a class and mask, and 16 a
// class, rounded up to 64 classes and 16 masks. Its size does not depend on the canvas.
std::size_t label_regions_device_bytes(std::int64_t num_classes, std::int64_t num_regions);

// `scores` may be null. `workspace` is any array of at least the bytes above, aligned to 64; its
// content does not matter.
void label_regions(const LabelRegionsInputs& inputs, const TensorView& labels,
                   const TensorView* scores, const TensorView& workspace,
                   const LabelRegionsParams& params, StreamHandle stream);

// Where the CPU kernel keeps what: floats from the start of the workspace, or of a task's part.
struct LabelRegionsLayout {
  std::int64_t row;                 // padded length of a row of the canvas
  std::int64_t out_row;             // padded length of a row of the result
  std::int64_t cell, t;             // where a column of the canvas lies on the masks' grid
  std::int64_t out_cell, out_t;     // where a column of the result lies on the canvas
  std::int64_t soft;                // of a task: [Q, row]
  std::int64_t maps;                // [2, C, row], one for even rows of the canvas, one for odd
  std::int64_t blend;               // [row]
  std::int64_t best, score, index;  // [out_row]
  std::int64_t tasks;               // start of the first task
  std::int64_t task_floats;
  std::int64_t num_tasks;
};
LabelRegionsLayout label_regions_layout(const LabelRegionsInputs& inputs,
                                        const LabelRegionsParams& params, std::int64_t num_tasks);
std::size_t bytes_of(const LabelRegionsLayout& layout);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void label_regions_cpu(const LabelRegionsInputs& inputs,
                                                const TensorView& labels, const TensorView* scores,
                                                const TensorView& workspace,
                                                const LabelRegionsParams& params))
void label_regions_cuda(const LabelRegionsInputs& inputs, const TensorView& labels,
                        const TensorView* scores, const TensorView& workspace,
                        const LabelRegionsParams& params, StreamHandle stream);

}  // namespace zsseg
