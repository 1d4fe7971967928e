#include "zsseg/ops/count_labels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "every_isa.h"
#include "zsseg/error.h"

namespace zsseg {
namespace {

using Counts = std::vector<std::int64_t>;

template <typename T>
Counts run(std::vector<T> labels, DType dtype, std::int64_t num_classes) {
  Counts out(static_cast<std::size_t>(num_classes + 1), -7);
  count_labels({labels.data(), dtype, {static_cast<std::int64_t>(labels.size())}, {}}, num_classes,
               {out.data(), DType::int64, {num_classes + 1}, {}}, 0);
  return out;
}

// Pixel after pixel.
template <typename T>
Counts counted(const std::vector<T>& labels, std::int64_t num_classes) {
  Counts out(static_cast<std::size_t>(num_classes + 1), 0);
  for (const T label : labels) {
    const bool known = label < num_classes && label != static_cast<T>(~T{0});
    ++out[known ? label : static_cast<std::size_t>(num_classes)];
  }
  return out;
}

TEST(CountLabels, CountsBytes) {
  for_every_isa([] {
    std::vector<std::uint8_t> labels(300001);  // three grains, the last one cut short
    for (std::size_t i = 0; i < labels.size(); ++i) {
      labels[i] = static_cast<std::uint8_t>(i * 2654435761u >> 24);
    }
    for (const std::int64_t num_classes : {0, 1, 20, 254, 255, 256, 1000}) {
      ASSERT_EQ(run(labels, DType::uint8, num_classes), counted(labels, num_classes))
          << num_classes;
    }
  });
}

TEST(CountLabels, CountsWideLabelsWindowByWindow) {
  for_every_isa([] {
    std::vector<std::uint16_t> labels(300001);
    for (std::size_t i = 0; i < labels.size(); ++i) {
      labels[i] = static_cast<std::uint16_t>(i * 2654435761u >> 16);
    }
    for (const std::int64_t num_classes : {0, 1, 2046, 2047, 2048, 4094, 65504, 65534}) {
      ASSERT_EQ(run(labels, DType::uint16, num_classes), counted(labels, num_classes))
          << num_classes;
    }
  });
}

TEST(CountLabels, RunsOfEveryLengthAtEveryPlaceAreCounted) {
  for_every_isa([] {
    for (int before = 0; before < 9; ++before) {
      for (int length = 0; length < 40; ++length) {
        std::vector<std::uint8_t> labels(50, 3);
        std::fill_n(labels.begin() + before, length, static_cast<std::uint8_t>(1));
        const std::vector<std::uint16_t> wide(labels.begin(), labels.end());
        const Counts expected{0, length, 0, 50 - length, 0};
        ASSERT_EQ(run(labels, DType::uint8, 4), expected) << before << ", " << length;
        ASSERT_EQ(run(wide, DType::uint16, 4), expected) << before << ", " << length;
      }
    }
  });
}

TEST(CountLabels, UnknownIsInTheLastEntryWithEveryNumberOfClasses) {
  std::vector<std::uint8_t> bytes{254, 255, 255};
  EXPECT_EQ(run(bytes, DType::uint8, 300)[254], 1);
  EXPECT_EQ(run(bytes, DType::uint8, 300)[255], 0);
  EXPECT_EQ(run(bytes, DType::uint8, 300)[300], 2);
  std::vector<std::uint16_t> wide{65533, 65535, 65534};
  EXPECT_EQ(run(wide, DType::uint16, 65534)[65533], 1);
  EXPECT_EQ(run(wide, DType::uint16, 65534)[65534], 2);
}

TEST(CountLabels, NothingIsCountedAsZeros) {
  std::vector<std::uint8_t> none;
  EXPECT_EQ(run(none, DType::uint8, 2), (Counts{0, 0, 0}));
}

TEST(CountLabels, RefusesOtherTypesAndNumbersOfClasses) {
  std::vector<std::uint8_t> bytes(4);
  EXPECT_THROW(run(bytes, DType::int8, 2), DTypeError);
  EXPECT_THROW(count_labels_shape({bytes.data(), DType::uint8, {4}, {}}, -1), ArgumentError);
  EXPECT_THROW(count_labels_shape({bytes.data(), DType::uint8, {4}, {}}, 65535), ArgumentError);
}

}  // namespace
}  // namespace zsseg
