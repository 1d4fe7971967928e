// zsseg_rt._C. Signatures and types are described in zsseg_rt/_C.pyi.
#include <pybind11/pybind11.h>

#include "bindings/array_export.h"
#include "bindings/register.h"

PYBIND11_MODULE(_C, module) {
  using namespace zsseg::bindings;
  register_errors(module);
  register_device_array(module);
  register_device(module);
  register_capture(module);
  register_pinned(module);
  register_preprocess(module);
  register_relationship_descriptor(module);
  register_patch_text_similarity(module);
  register_upsample_argmax(module);
  register_overlay(module);
  register_ink(module);
  register_crop_regions(module);
  register_label_regions(module);
  register_all_finite(module);
  register_count_labels(module);
  register_warp_blend(module);
  register_merge_windows(module);
  register_move_labels(module);
}
