#include "zsseg/ops/overlay.h"

#include <gtest/gtest.h>

#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"
#include "zsseg/ops/overlay_pixel.h"

namespace zsseg {
namespace {

constexpr std::int64_t kHeight = 61;
constexpr std::int64_t kWidth = 67;

struct Picture {
  std::vector<std::uint8_t> frame = std::vector<std::uint8_t>(3 * kHeight * kWidth);
  std::vector<std::uint8_t> labels = std::vector<std::uint8_t>(kHeight * kWidth);
  std::vector<std::uint8_t> palette{255, 0, 10, 20, 200, 30};
  std::vector<std::uint8_t> out = std::vector<std::uint8_t>(3 * kHeight * kWidth, 0xcd);

  Picture() {
    const std::uint8_t values[] = {0, 1, 2, 254, 255};  // two colours, two without, unknown
    for (std::size_t i = 0; i < frame.size(); ++i) {
      frame[i] = static_cast<std::uint8_t>(i * 37);
    }
    for (std::size_t i = 0; i < labels.size(); ++i) {
      labels[i] = values[i % 5];
    }
  }

  TensorView view(std::vector<std::uint8_t>& data, const Shape& shape) {
    return {data.data(), DType::uint8, shape, {}};
  }
  void run(double alpha) {
    overlay({view(frame, {kHeight, kWidth, 3})}, view(labels, {kHeight, kWidth}),
            view(palette, {2, 3}), view(out, {kHeight, kWidth, 3}), OverlayParams{alpha}, 0);
  }
};

TEST(Overlay, BlendsColoursAndLeavesTheRest) {
  for_every_isa([] {
    Picture picture;
    picture.run(0.25);
    for (std::size_t i = 0; i < picture.out.size(); ++i) {
      const std::uint8_t label = picture.labels[i / 3];
      const double colour = label < 2 ? picture.palette[3 * label + i % 3] : picture.frame[i];
      const auto expected =
          static_cast<int>(0.75 * picture.frame[i] + 0.25 * colour + 0.5);  // exact in binary
      ASSERT_EQ(picture.out[i], expected) << i;
    }
  });
}

TEST(Overlay, AlphaZeroIsTheFrameAndOneThePalette) {
  Picture picture;
  picture.run(0.0);
  EXPECT_EQ(picture.out, picture.frame);
  picture.run(1.0);
  EXPECT_EQ(picture.out[0], picture.palette[0]);
  EXPECT_EQ(picture.out[3], picture.palette[3]);
}

// Grey planes are grey pictures, of whatever matrix; rows of brightness lie apart.
TEST(Overlay, TakesPlanes) {
  for_every_isa([] {
    Picture picture;
    picture.labels.assign(picture.labels.size(), 255);
    std::vector<std::uint8_t> luma(4 * 512, 99), chroma(2 * 300, 128), out(4 * 300 * 3);
    for (std::size_t i = 0; i < 4 * 300; ++i) {
      luma[i / 300 * 512 + i % 300] = static_cast<std::uint8_t>(i * 7);
    }
    const TensorView colour = picture.view(chroma, {2, 150, 2});
    const CameraFrame frame{picture.view(luma, {4, 300}), &colour, 512};
    overlay(frame, picture.view(picture.labels, {4, 300}), picture.view(picture.palette, {2, 3}),
            picture.view(out, {4, 300, 3}), {0.5, ColourMatrix::kBt709Full}, 0);
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(out[i], static_cast<std::uint8_t>(i / 3 * 7)) << i;
    }
  });
}

TEST(Overlay, RefusesAnAlphaAboveOne) {
  Picture picture;
  EXPECT_THROW(picture.run(1.5), ArgumentError);
}

TEST(OverlayPixel, AgreesWithTheRealBlendForEveryPairOfValues) {
  for (const double alpha : {0.0, 0.1, 1.0 / 3, 0.5, 0.9, 1.0}) {
    const std::uint32_t weight = overlay_weight(alpha);
    for (std::uint32_t frame = 0; frame < 256; ++frame) {
      for (std::uint32_t colour = 0; colour < 256; ++colour) {
        const double exact = (1 - alpha) * frame + alpha * colour;
        // Half a step of rounding, and 255 * 2^-17 for the rounded alpha.
        ASSERT_NEAR(overlay_blend(frame, colour, weight), exact, 0.5 + 255.0 / 131072);
      }
    }
  }
}

}  // namespace
}  // namespace zsseg
