// Logits of overlapping windows, averaged on the grid of the whole image.
#pragma once

#include "zsseg/cpu_dispatch.h"
#include "zsseg/tensor_view.h"

namespace zsseg {

constexpr int kMostWindows = 16;  // that one call merges

// Where the windows' first cells lie on the grid, in cells; as plain numbers, so that a launch
// carries them. Cells of a window that lie beyond the grid are left out.
struct WindowPlaces {
  int count = 0;
  std::int32_t top[kMostWindows] = {};
  std::int32_t left[kMostWindows] = {};
};

struct MergeWindowsArgs {
  const TensorView& logits;  // float32 [B, C, h, w]
  const TensorView& shares;  // float32 [H, W]: as a rule one over the windows that cover a cell
  const WindowPlaces& places;
  bool add;  // to what `out` holds; else to 0
};

// float32 [1, C, H, W] += shares * logits, window by window in order, products and sums rounded
// separately: CPU and CUDA agree bit for bit. Checks the inputs and returns the result's shape.
Shape merge_windows_shape(const MergeWindowsArgs& args);

void merge_windows(const MergeWindowsArgs& args, const TensorView& out, StreamHandle stream);

// Arguments are checked and not empty.
ZSSEG_DECLARE_CPU_KERNEL(void merge_windows_cpu(const MergeWindowsArgs& args,
                                                const TensorView& out))
void merge_windows_cuda(const MergeWindowsArgs& args, const TensorView& out, StreamHandle stream);

}  // namespace zsseg
