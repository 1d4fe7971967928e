// The word that says where cells lie.
#pragma once

#include <string>

#include "zsseg/check.h"
#include "zsseg/ops/align.h"

namespace zsseg::bindings {

inline Align parse_align(const std::string& name) {
  if (name != "half_pixel" && name != "corners") {
    fail_argument("align", "'half_pixel' or 'corners'", "'" + name + "'");
  }
  return name == "corners" ? Align::kCorners : Align::kHalfPixel;
}

}  // namespace zsseg::bindings
