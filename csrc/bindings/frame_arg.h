// A frame of three bytes a pixel or in two planes, and the words that say what its bytes mean.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "bindings/array_arg.h"
#include "zsseg/check.h"
#include "zsseg/ops/camera_frame.h"

namespace zsseg::bindings {

inline bool is_bgr(const std::string& channel_order) {
  if (channel_order != "rgb" && channel_order != "bgr") {
    fail_argument("channel_order", "'rgb' or 'bgr'", "'" + channel_order + "'");
  }
  return channel_order == "bgr";
}

inline ColourMatrix parse_matrix(const std::string& name) {
  if (name == "bt601") {
    return ColourMatrix::kBt601;
  }
  if (name == "bt709") {
    return ColourMatrix::kBt709;
  }
  if (name == "bt601-full") {
    return ColourMatrix::kBt601Full;
  }
  if (name != "bt709-full") {
    fail_argument("colour_matrix", "'bt601', 'bt709', 'bt601-full' or 'bt709-full'",
                  "'" + name + "'");
  }
  return ColourMatrix::kBt709Full;
}

// One array, or a tuple of two planes.
class FrameArg {
 public:
  FrameArg(const pybind11::object& frame, StreamHandle stream) {
    if (!pybind11::isinstance<pybind11::tuple>(frame)) {
      pixels_.emplace(ArrayArg::input(frame, "frame", stream));
      return;
    }
    const auto planes = frame.cast<pybind11::tuple>();
    if (planes.size() != 2) {
      fail_argument("frame", "an array or two planes", std::to_string(planes.size()) + " planes");
    }
    pixels_.emplace(ArrayArg::pitched(planes[0], "frame[0]", stream));
    chroma_.emplace(ArrayArg::pitched(planes[1], "frame[1]", stream));
  }

  bool is_planes() const { return chroma_.has_value(); }
  CallArray pixels() const { return pixels_; }
  CallArray chroma() const { return chroma_; }
  CameraFrame view() const {
    if (!chroma_) {
      return {pixels_->view()};
    }
    return {pixels_->view(), &chroma_->view(), pixels_->row_bytes(), chroma_->row_bytes()};
  }

 private:
  std::optional<ArrayArg> pixels_, chroma_;
};

}  // namespace zsseg::bindings
