#include <cstdint>

#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/count_labels.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

constexpr int kTables = 4;
constexpr std::int64_t kGrainLabels = 1 << 17;  // about 50 us of work; far below a counter's limit

template <typename Label>
using Bins = std::uint32_t[kTables][kLabelBins<Label>];

// Eight bytes of labels at a time. Labels of an image are mostly equal to their neighbours: eight
// equal bytes take one addition. Others take turns between tables, because adding to one counter
// again would wait for the store before.
template <typename Label>
void fill_bins(const Label* labels, int count, std::int64_t first, Bins<Label>& bins) {
  constexpr int word_labels = sizeof(std::uint64_t) / sizeof(Label);
  constexpr int label_bits = 8 * sizeof(Label);
  int at = 0;
  for (; at + word_labels <= count; at += word_labels) {
    std::uint64_t word;
    __builtin_memcpy(&word, labels + at, sizeof word);
    if (word == (word << label_bits | word >> (64 - label_bits))) {
      bins[0][label_bin(labels[at], first)] += word_labels;
      continue;
    }
    for (int i = 0; i < word_labels; ++i) {
      ++bins[i % kTables][label_bin(labels[at + i], first)];
    }
  }
  for (; at < count; ++at) {
    ++bins[0][label_bin(labels[at], first)];
  }
}

// Moves what falls into one window of classes from the result's last entry to its own.
template <typename Label>
void count_window(const Label* labels, int count, std::int64_t first,
                  std::int64_t* out,  // [num_classes + 1], shared by all threads
                  std::int64_t num_classes) {
  Bins<Label> bins = {};
  fill_bins(labels, count, first, bins);
  std::int64_t counted = 0;
  const int classes = window_classes<Label>(first, num_classes);
  for (int c = 0; c < classes; ++c) {
    std::int64_t sum = 0;
    for (int table = 0; table < kTables; ++table) {
      sum += bins[table][c];
    }
    if (sum != 0) {
      __atomic_fetch_add(out + first + c, sum, __ATOMIC_RELAXED);
      counted += sum;
    }
  }
  __atomic_fetch_sub(out + num_classes, counted, __ATOMIC_RELAXED);
}

template <typename Label>
void count_range(const Label* labels, std::int64_t count, std::int64_t* out,
                 std::int64_t num_classes) {
  for (std::int64_t at = 0; at < count; at += kGrainLabels) {
    const auto here = static_cast<int>(count - at < kGrainLabels ? count - at : kGrainLabels);
    for (std::int64_t first = 0; first < countable_classes<Label>(num_classes);
         first += kWindowClasses<Label>) {
      count_window(labels + at, here, first, out, num_classes);
    }
  }
}

}  // namespace

void count_labels_cpu(const TensorView& labels, const TensorView& out) {
  const std::int64_t num_classes = out.shape[0] - 1;
  auto* counts = out.as<std::int64_t>();
  for (std::int64_t c = 0; c < num_classes; ++c) {
    counts[c] = 0;
  }
  counts[num_classes] = labels.count();
  parallel_for(0, labels.count(), kGrainLabels, [&](std::int64_t begin, std::int64_t end) {
    ZSSEG_DISPATCH_LABEL(
        labels.dtype, Label,
        count_range(labels.as<const Label>() + begin, end - begin, counts, num_classes));
  });
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
