#include "zsseg/ops/yuv420.h"

#include <gtest/gtest.h>

#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

using Bytes = std::vector<std::uint8_t>;

TensorView view(Bytes& data, const Shape& shape) {
  return {data.data(), DType::uint8, shape, {}};
}

// OpenCV's numbers for red, and grey; the last row and column are repeated.
TEST(Yuv420, KnowsRedAndRepeatsTheEdge) {
  for_every_isa([] {
    Bytes image;
    for (int pixel = 0; pixel < 3 * 3; ++pixel) {
      const bool red = pixel % 3 < 2;  // the last column is grey
      image.insert(image.end(), {static_cast<std::uint8_t>(red ? 255 : 100),
                                 static_cast<std::uint8_t>(red ? 0 : 100),
                                 static_cast<std::uint8_t>(red ? 0 : 100)});
    }
    Bytes luma(4 * 6, 7), chroma(2 * 4);  // rows of brightness lie 6 bytes apart
    yuv420(view(image, {3, 3, 3}), {{view(luma, {4, 4}), view(chroma, {2, 2, 2})}, {6, 4}}, {}, 0);
    const Bytes row = {82, 82, 102, 102, 7, 7};
    for (std::size_t i = 0; i < luma.size(); ++i) {
      ASSERT_EQ(luma[i], row[i % 6]) << i;
    }
    EXPECT_EQ(chroma, (Bytes{90, 240, 128, 128, 90, 240, 128, 128}));
  });
}

TEST(Yuv420, PutsUAndVApartInOrder) {
  Bytes image = {0, 0, 255, 0, 0, 255}, luma(4), u(1), v(1);
  const Yuv420Planes planes = {{view(luma, {2, 2}), view(u, {1, 1}), view(v, {1, 1})}, {2, 1, 1}};
  yuv420(view(image, {1, 2, 3}), planes, {true, true, ColourMatrix::kBt601Full}, 0);
  EXPECT_EQ(luma, Bytes(4, 76));
  EXPECT_EQ(u[0], 85);
  EXPECT_EQ(v[0], 255);
}

TEST(Yuv420, RefusesPlanesOfTheOtherLayout) {
  Bytes image(12), luma(4), chroma(2);
  const Yuv420Planes planes = {{view(luma, {2, 2}), view(chroma, {1, 1, 2})}, {2, 2}};
  EXPECT_THROW(yuv420(view(image, {2, 2, 3}), planes, {true}, 0), ShapeError);
}

}  // namespace
}  // namespace zsseg
