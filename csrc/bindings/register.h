// One function a bind_*.cpp; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace zsseg::bindings {

void register_errors(pybind11::module_& module);
void register_device(pybind11::module_& module);
void register_capture(pybind11::module_& module);
void register_pinned(pybind11::module_& module);
void register_preprocess(pybind11::module_& module);
void register_relationship_descriptor(pybind11::module_& module);
void register_patch_text_similarity(pybind11::module_& module);
void register_upsample_argmax(pybind11::module_& module);
void register_overlay(pybind11::module_& module);
void register_ink(pybind11::module_& module);
void register_crop_regions(pybind11::module_& module);
void register_label_regions(pybind11::module_& module);
void register_all_finite(pybind11::module_& module);
void register_count_labels(pybind11::module_& module);
void register_warp_blend(pybind11::module_& module);
void register_merge_windows(pybind11::module_& module);
void register_move_labels(pybind11::module_& module);

}  // namespace zsseg::bindings
