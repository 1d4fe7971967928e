// Labels of one frame, moved to where what they name is in a later one.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

// Levels of 255. A place moves where that explains it better than rest does by more than `gain`; it
// is unknown where neither comes nearer than `lost`, or where it comes from outside and rest is off
// by more than `entered`. 255 for the last two leaves no place unknown.
struct MoveLimits {
  int gain = 0, lost = 255, entered = 255;
};

struct MoveLabels {
  TensorView labels;    // uint8 or uint16 [H,W], of the start; its type's largest value is unknown
  TensorView flow;      // float32 [h,w,2], x then y: where each pixel of the later frame was
  TensorView refined;   // another such flow, taken where it explains the frame as well; or nothing
  TensorView start;     // uint8 [h,w,3]: the frame that was labelled, made small
  TensorView now;       // uint8 [h,w,3]: the later one
  TensorView out;       // as labels
  TensorView out_flow;  // as flow: what was taken at each place, zero at rest
};

// On the CPU. Frames above 640 pixels are moved in squares of 2x2; places at rest stay as they are.
void move_labels(const MoveLabels& arrays, const MoveLimits& limits);

// Arguments are checked.
ZSSEG_DECLARE_CPU_KERNEL(void move_labels_cpu(const MoveLabels& arrays, const MoveLimits& limits))

}  // namespace zsseg
