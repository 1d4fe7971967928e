// Where the cells of a grid, and the pixels of a resized image, lie on what they are made from.
#pragma once

namespace zsseg {

// kHalfPixel: a side is cut into cells of equal width, each of which is its centre's. kCorners: the
// first and the last cell lie on the first and the last pixel.
enum class Align { kHalfPixel, kCorners };

}  // namespace zsseg
