// upsample_argmax on the CPU, without ever holding [classes, out_height, out_width].
//
// Row by row of the grid's cells:
// 1. gather: re-lay [classes, points] of the next grid row as [points, positions], so that the four
//    corners of a cell are four contiguous class vectors, and note the best class of every point.
// 2. label: fill a cell if one class is clearly best at all four corners; else drop the classes
//    that cannot win and compare the few left at every pixel.
// A thread holds two grid rows only, which stay in its caches. Bound by arithmetic where many
// classes survive, by reading the logits and writing the labels where few do.
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/upsample_argmax.h"
#include "zsseg/ops/upsample_argmax_labels.h"
#include "zsseg/thread_pool.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

using namespace zsseg::upsample;

constexpr int kPoints = 16;  // grid points gathered together: a cache line of every class plane

ZSSEG_SIMD_FN void load_points(const float* from, float* to) {
  for (int i = 0; i < kPoints; i += kLanes) {
    store(to + i, load(from + i));
  }
}

ZSSEG_SIMD_FN void load_points(const Half* from, float* to) {
  for (int i = 0; i < kPoints; i += kLanes) {
    store(to + i, widen_half(&from[i].bits));
  }
}

ZSSEG_SIMD_FN void load_points(const Bfloat16* from, float* to) {
  for (int i = 0; i < kPoints; i += kLanes) {
    store(to + i, widen_bfloat16(&from[i].bits));
  }
}

// Best and second best logit of kPoints points in one group so far.
struct Ranking {
  VecF first[kPoints / kLanes];
  VecF second[kPoints / kLanes];
  VecI position[kPoints / kLanes];
};

ZSSEG_SIMD_FN void rank(Ranking& ranking, const float* logits, int position) {
  for (int i = 0; i < kPoints / kLanes; ++i) {
    const VecF x = load(logits + i * kLanes);
    const VecI better = x > ranking.first[i];
    ranking.second[i] = max(ranking.second[i], min(x, ranking.first[i]));
    ranking.first[i] = better ? x : ranking.first[i];
    ranking.position[i] = better ? splat_int(position) : ranking.position[i];
  }
}

// The logits of one class at kPoints points from `point` on, made finite; absent where the class is
// padding. Points past the image's end hold anything finite.
template <typename T>
ZSSEG_SIMD_FN void fetch(const Image& image, int position, int point, float* to) {
  if (image.ids[position] == kNoId) {
    for (int i = 0; i < kPoints; i += kLanes) {
      store(to + i, splat(-kLogitLimit));
    }
    return;
  }
  const std::int64_t plane = static_cast<std::int64_t>(image.in_height) * image.in_width;
  const int class_index = class_of_id(image.ids[position]);
  const T* from = static_cast<const T*>(image.logits) + class_index * plane + point;
  __builtin_prefetch(from + kPoints);  // the next points of this class: too far apart to be guessed
  T tail[kPoints] = {};
  if (plane - point < kPoints) {
    for (int i = 0; i < plane - point; ++i) {
      tail[i] = from[i];
    }
    from = tail;
  }
  load_points(from, to);
  for (int i = 0; i < kPoints; i += kLanes) {  // a comparison with NaN is false
    VecF x = load(to + i);
    x = x > splat(-kLogitLimit) ? x : splat(-kLogitLimit);
    store(to + i, min(x, splat(kLogitLimit)));
  }
}

ZSSEG_SIMD_FN void store_ranking(const Image& image, const Ranking& ranking, int group, int to,
                                 int count) {
  to += group * image.held_points();
  for (int i = 0; i < count; ++i) {
    const float first = ranking.first[i / kLanes][i % kLanes];
    const float second = ranking.second[i / kLanes][i % kLanes];
    const std::int32_t position = ranking.position[i / kLanes][i % kLanes];
    const bool clear = second < strictly_below(first) && first > 0.5f * kAbsentLogit;
    image.top_logit[to + i] = first;
    image.top[to + i] = clear ? position : ~position;
  }
}

// `count` grid points from `point` on, stored from place `place` on.
template <typename T>
void gather_points(const Image& image, int point, int place, int count) {
  const int positions = image.positions();
  for (int group = 0; group < image.num_groups; ++group) {
    Ranking ranking;
    for (int i = 0; i < kPoints / kLanes; ++i) {
      ranking.first[i] = ranking.second[i] = splat(-2.0f * kLogitLimit);
      ranking.position[i] = splat_int(image.group_begin[group]);
    }
    for (int p = image.group_begin[group]; p < image.group_begin[group + 1]; p += 4) {
      float tile[4][kPoints];
      for (int k = 0; k < 4; ++k) {
        fetch<T>(image, p + k, point, tile[k]);
        rank(ranking, tile[k], p + k);
      }
      float* to = image.vectors + static_cast<std::int64_t>(place) * positions + p;
      for (int i = 0; i < count; i += 4) {
        Vec4F row[4] = {load4(tile[0] + i), load4(tile[1] + i), load4(tile[2] + i),
                        load4(tile[3] + i)};
        transpose4(row[0], row[1], row[2], row[3]);
        for (int k = 0; k < 4 && i + k < count; ++k) {
          store4(to + static_cast<std::int64_t>(i + k) * positions, row[k]);
        }
      }
    }
    store_ranking(image, ranking, group, place, count);
  }
}

// Makes a thread hold a row of the grid.
template <typename T>
void gather_row(const Image& image, int row) {
  const int place = row % 2, width = image.in_width;
  if (image.rows[place] == row) {
    return;
  }
  image.rows[place] = row;
  for (int column = 0; column < width; column += kPoints) {
    gather_points<T>(image, row * width + column, place * width + column,
                     width - column < kPoints ? width - column : kPoints);
  }
}

// How output rows or columns lie on the grid: fractions, and where every cell begins. Steps through
// the indices with the integers of cell_position, without its divisions.
void lay_axis(const Axis& axis, float* s, float* t, std::int32_t* begin, int padding) {
  const int in_size = axis.in_size, out_size = axis.out_size, denominator = axis.denominator;
  const int cells = in_size > 1 ? in_size - 1 : 1;
  int next = 0;  // the first cell whose beginning is not yet known
  int cell = 0;
  int remainder = axis.offset;  // numerator - cell * denominator
  for (int i = 0; i < out_size; ++i, remainder += axis.step) {
    while (remainder >= denominator) {
      remainder -= denominator;
      ++cell;
    }
    const bool past = cell >= in_size - 1;
    const bool before = remainder <= 0 && cell == 0;
    for (const int reached = past ? cells - 1 : cell; next <= reached; ++next) {
      begin[next] = i;
    }
    t[i] = in_size == 1 || before ? 0.0f
           : past                 ? 1.0f
                                  : static_cast<float>(remainder) / static_cast<float>(denominator);
    s[i] = 1.0f - t[i];
  }
  for (; next <= cells; ++next) {
    begin[next] = out_size;
  }
  for (int i = 0; i < padding; ++i) {
    s[out_size + i] = t[out_size + i] = 0.0f;
  }
}

Image lay_out(const TensorView& logits, const CpuLayout& layout, char* base,
              const UpsampleArgmaxParams& params) {
  const auto floats = [base](std::size_t offset) {
    return reinterpret_cast<float*>(base + offset);
  };
  const auto ints = [base](std::size_t offset) {
    return reinterpret_cast<std::int32_t*>(base + offset);
  };
  Image image = {};
  image.in_height = static_cast<int>(logits.shape[2]);
  image.in_width = static_cast<int>(logits.shape[3]);
  image.out_height = static_cast<int>(params.height);
  image.out_width = static_cast<int>(params.width);
  image.num_groups = layout.num_groups;
  for (int i = 0; i < 3; ++i) {
    image.group_begin[i] = layout.group_begin[i];
  }
  image.ids = ints(layout.ids);
  lay_axis(make_axis(image.in_height, image.out_height, params.align), floats(layout.row_s),
           floats(layout.row_t), ints(layout.row_begin), kRows);
  lay_axis(make_axis(image.in_width, image.out_width, params.align), floats(layout.column_s),
           floats(layout.column_t), ints(layout.column_begin), kLanes);
  image.row_s = floats(layout.row_s);
  image.row_t = floats(layout.row_t);
  image.column_s = floats(layout.column_s);
  image.column_t = floats(layout.column_t);
  image.row_begin = ints(layout.row_begin);
  image.column_begin = ints(layout.column_begin);
  image.activation = params.activation;
  image.seen_bias = params.seen_bias;
  image.unknown_below = params.unknown_below;
  return image;
}

std::uint32_t stored_label(const TensorView* table, int class_index) {
  if (table == nullptr) {
    return static_cast<std::uint32_t>(class_index);
  }
  return table->dtype == DType::uint8 ? table->as<const std::uint8_t>()[class_index]
                                      : table->as<const std::uint16_t>()[class_index];
}

// Puts each class at its position, the classes of a group in order.
void place_classes(const CpuLayout& layout, const UpsampleArgmaxInputs& inputs, std::int32_t* ids) {
  for (int p = 0; p < layout.group_begin[layout.num_groups]; ++p) {
    ids[p] = kNoId;
  }
  const bool* seen = inputs.seen == nullptr ? nullptr : inputs.seen->as<const bool>();
  int next[2] = {0, layout.group_begin[1]};
  for (int c = 0; c < layout.num_classes; ++c) {
    const int group = layout.num_groups == 2 && seen[c] ? 1 : 0;
    ids[next[group]++] = class_id(c, stored_label(inputs.label_table, c));
  }
}

// Work in nanoseconds below which a second thread costs more than it brings.
constexpr std::int64_t kSmallWork = 50000;

// The memory of one thread: the rows it holds. Its scratch lies behind them.
Image with_slot(Image image, const CpuLayout& layout, char* slot) {
  image.vectors = reinterpret_cast<float*>(slot + layout.vectors);
  image.top_logit = reinterpret_cast<float*>(slot + layout.top_logit);
  image.top = reinterpret_cast<std::int32_t*>(slot + layout.top);
  image.rows = reinterpret_cast<std::int32_t*>(slot + layout.rows);
  return image;
}

// An item is a cell row, or a slice of its output rows where cell rows are too few to go round.
template <typename T, typename Label>
void label_image(const Image& image, const CpuLayout& layout, char* base) {
  const int cell_rows = image.in_height > 1 ? image.in_height - 1 : 1;
  const int chunks = 4 * layout.num_slots;  // that threads take by turns
  const int slices = cell_rows >= chunks ? 1 : (chunks - 1) / cell_rows + 1;
  const std::int64_t items = std::int64_t{cell_rows} * slices;
  const std::int64_t work = std::int64_t{image.in_height} * image.in_width * image.positions() / 2 +
                            std::int64_t{image.out_height} * image.out_width / 2;
  const std::int64_t grain = work < kSmallWork ? items : (items + chunks - 1) / chunks;
  const auto slot_of = [&](int slot) {
    return base + layout.slots + static_cast<std::size_t>(slot) * layout.slot_bytes;
  };
  for (int slot = 0; slot < layout.num_slots; ++slot) {
    std::int32_t* rows = reinterpret_cast<std::int32_t*>(slot_of(slot) + layout.rows);
    rows[0] = rows[1] = -1;
  }
  parallel_for_slots(
      0, items, grain, layout.num_slots, [&](int slot, std::int64_t begin, std::int64_t end) {
        const Image mine = with_slot(image, layout, slot_of(slot));
        float* scratch = reinterpret_cast<float*>(slot_of(slot) + layout.scratch);
        for (std::int64_t i = begin; i < end; ++i) {
          const int cell_row = static_cast<int>(i) / slices, slice = static_cast<int>(i) % slices;
          const int first = image.row_begin[cell_row], last = image.row_begin[cell_row + 1];
          const int quads = (last - first + kRows - 1) / kRows;
          const int from = first + kRows * (quads * slice / slices);
          const int to = first + kRows * (quads * (slice + 1) / slices);
          if (from == to) {
            continue;
          }
          gather_row<T>(mine, cell_row);
          if (image.in_height > 1) {
            gather_row<T>(mine, cell_row + 1);
          }
          label_cell_row<Label>(mine, cell_row, from, to < last ? to : last, scratch);
        }
      });
}

}  // namespace

void upsample_argmax_cpu(const UpsampleArgmaxInputs& inputs, const TensorView& labels,
                         const TensorView* scores, const TensorView& workspace,
                         const UpsampleArgmaxParams& params) {
  const TensorView& logits = inputs.logits;
  CpuLayout layout = upsample_argmax_cpu_layout(inputs, params, num_threads());
  while (layout.bytes > workspace.bytes() && layout.num_slots > 1) {
    layout = upsample_argmax_cpu_layout(inputs, params, layout.num_slots - 1);
  }
  char* base = workspace.as<char>();
  Image image = lay_out(logits, layout, base, params);
  image.needs_scores = scores != nullptr || params.unknown_below > -INFINITY;
  image.needs_denominator =
      params.activation == Activation::kSoftmax && (image.needs_scores || image.num_groups == 2);
  place_classes(layout, inputs, reinterpret_cast<std::int32_t*>(base + layout.ids));
  const std::int64_t in_step = logits.count() / logits.shape[0];
  const std::int64_t out_step = labels.count() / logits.shape[0];
  for (std::int64_t b = 0; b < logits.shape[0]; ++b) {
    image.logits = logits.as<const char>() + b * in_step * size_of(logits.dtype);
    image.labels = labels.as<char>() + b * out_step * size_of(labels.dtype);
    image.scores = scores == nullptr ? nullptr : scores->as<float>() + b * out_step;
    ZSSEG_DISPATCH_LABEL(labels.dtype, Label, {
      ZSSEG_DISPATCH_ANY_FLOAT(logits.dtype, T, (label_image<T, Label>(image, layout, base)));
    });
  }
}

}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
