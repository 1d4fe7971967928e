#include "zsseg/tensor_view.h"

#include <gtest/gtest.h>

#include "zsseg/check.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

template <typename Exception, typename Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Shape, CountsElements) {
  EXPECT_EQ(Shape({2, 3, 5}).count(), 30);
  EXPECT_EQ(Shape({2, 0, 5}).count(), 0);
  EXPECT_EQ(Shape({}).count(), 1);
}

TEST(Shape, ComparesRankAndSizes) {
  EXPECT_EQ(Shape({2, 3}), Shape({2, 3}));
  EXPECT_NE(Shape({2, 3}), Shape({2, 3, 1}));
  EXPECT_NE(Shape({2, 3}), Shape({3, 2}));
}

TEST(Shape, PrintsLikeAPythonTuple) {
  EXPECT_EQ(to_string(Shape({})), "()");
  EXPECT_EQ(to_string(Shape({7})), "(7,)");
  EXPECT_EQ(to_string(Shape({kAnySize, 4})), "(*, 4)");
}

TEST(TensorView, KnowsItsBytes) {
  const TensorView view{nullptr, DType::float16, {3, 5}, {}};
  EXPECT_EQ(view.bytes(), 30u);
}

TEST(Check, ShapeErrorNamesArgumentExpectedAndGot) {
  const TensorView view{nullptr, DType::float32, {3, 5}, {}};
  EXPECT_NO_THROW(expect_shape("x", view, {kAnySize, 5}));
  EXPECT_EQ(message_of<ShapeError>([&] { expect_shape("text_embeds", view, {kAnySize, 4}); }),
            "text_embeds: expected shape (*, 4), got (3, 5). "
            "Check its sizes and the order of its axes.");
  EXPECT_THROW(expect_shape("x", view, {3, 5, 1}), ShapeError);
}

TEST(Check, DTypeErrorListsWhatIsAllowed) {
  const TensorView view{nullptr, DType::float64, {1}, {}};
  EXPECT_EQ(
      message_of<DTypeError>([&] { expect_dtype("x", view, {DType::float32, DType::float16}); }),
      "x: expected float32 or float16, got float64. Convert it first.");
}

TEST(Check, DeviceErrorNamesBothArrays) {
  const TensorView here{nullptr, DType::uint8, {1}, {}};
  const TensorView there{nullptr, DType::uint8, {1}, {DeviceKind::cuda, 1}};
  EXPECT_EQ(message_of<DeviceError>([&] { expect_same_device("out", there, "frame", here); }),
            "out: expected to be on cpu like frame, got cuda:1. Put all arrays on one device.");
}

}  // namespace
}  // namespace zsseg
