// The arithmetic of bilateral_upsample, shared by the CPU and CUDA kernels. Products and sums are
// rounded separately on every target, so that results are bit-equal everywhere.
#pragma once

#include <cstdint>

#include "zsseg/host_device.h"
#include "zsseg/ops/align.h"
#include "zsseg/ops/upsample_argmax_math.h"

namespace zsseg::bilateral {

using upsample::add;
using upsample::multiply;

constexpr int kLeastScale = 3, kMostScale = 9;
constexpr float kLeastLikeness = 1e-3f;  // of unlike colours: where none is like, all count

// 1 for equal colours, falling to kLeastLikeness where they are `reach` apart; `inverse` is one
// over its square. NaN is unlike everything.
ZSSEG_HOST_DEVICE float likeness(float red, float green, float blue, float inverse) {
  const float squares = add(add(multiply(red, red), multiply(green, green)), multiply(blue, blue));
  const float left = add(1.0f, -multiply(squares, inverse));
  const float kept = left > 0.0f ? left : 0.0f;
  const float square = multiply(kept, kept);
  const float fourth = multiply(square, square);
  return fourth > kLeastLikeness ? fourth : kLeastLikeness;
}

// Points of the finer grid, first and one past the last, that belong to a cell of an axis.
struct CellPoints {
  int begin, end;
};

ZSSEG_HOST_DEVICE CellPoints cell_points(int cell, int scale, int num_points, Align align) {
  const int begin = cell * scale - (align == Align::kCorners ? scale / 2 : 0);
  const int end = begin + scale;
  return {begin > 0 ? begin : 0, end < num_points ? end : num_points};
}

// The four cells' bilinear weights times their likeness, which sum to one. Order: top left, top
// right, bottom left, bottom right.
struct Weights {
  float of[4];
};

ZSSEG_HOST_DEVICE Weights weights(float ty, float tx, const float alike[4]) {
  const float top = add(1.0f, -ty), left = add(1.0f, -tx);
  Weights found;
  found.of[0] = multiply(multiply(top, left), alike[0]);
  found.of[1] = multiply(multiply(top, tx), alike[1]);
  found.of[2] = multiply(multiply(ty, left), alike[2]);
  found.of[3] = multiply(multiply(ty, tx), alike[3]);
  const float sum = add(add(add(found.of[0], found.of[1]), found.of[2]), found.of[3]);
  const float share = 1.0f / sum;
  for (int k = 0; k < 4; ++k) {
    found.of[k] = multiply(found.of[k], share);
  }
  return found;
}

ZSSEG_HOST_DEVICE float blend(float w0, float logit0, float w1, float logit1, float w2,
                              float logit2, float w3, float logit3) {
  return add(add(add(multiply(w0, logit0), multiply(w1, logit1)), multiply(w2, logit2)),
             multiply(w3, logit3));
}

}  // namespace zsseg::bilateral
