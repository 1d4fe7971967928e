// Products of many lines with many rows on the CPU: the lines (classes) are packed so that a vector
// holds one element of several of them, the rows (patches, outputs) stay as they are and are read
// element by element. Better than dot_tile.h where there are enough lines to fill vectors. For
// inclusion in <op>_cpu.cpp only.
#pragma once

#include <cstdint>

#include "zsseg/ops/dot_tile.h"

namespace zsseg {
namespace ZSSEG_ISA_NAMESPACE {
namespace {

// Lines lie in panels of kPanelVectors vectors, fewer in the last. kSums vectors of sums, a panel's
// vectors and one more live at once: 29 of 32 or 16 of 16 registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelVectors = 4;
constexpr int kSums = 24;
#else
constexpr int kPanelVectors = 3;
constexpr int kSums = 12;
#endif
constexpr int kMostRows = 8;              // at once; their addresses take registers too
constexpr int kPackedRows = 48;           // of one call: a multiple of all numbers of rows at once
constexpr std::int64_t kDepthStep = 128;  // sums of so many products are added: less rounding
constexpr std::int64_t kPackedFrom = 2 * kPanelVectors * kLanes / 3;  // lines

constexpr int rows_at_once(int vectors) {
  return kSums / vectors < kMostRows ? kSums / vectors : kMostRows;
}

// Floats of the packed form: lines are filled up to whole vectors.
inline std::int64_t packed_count(std::int64_t num_lines, std::int64_t depth) {
  return (num_lines + kLanes - 1) / kLanes * kLanes * depth;
}

ZSSEG_SIMD_FN Vec4F four_of(const PlainRow<float>& row, std::int64_t k) {
  return load4(row.data + k);
}
template <typename Row>
ZSSEG_SIMD_FN Vec4F four_of(const Row& row, std::int64_t k) {
  return Vec4F{row.scalar(k), row.scalar(k + 1), row.scalar(k + 2), row.scalar(k + 3)};
}
ZSSEG_SIMD_FN Vec4F four_of(const ProductRow<float>& row, std::int64_t k) {
  return load4(row.left + k) * load4(row.right + k);
}

// Writes elements [0, depth) of lines line(0) to line(num_lines - 1) as elements [begin, begin +
// depth) of the packed form, whose lines are whole_depth long. The last line fills the rest.
template <typename Line>
inline void pack_lines(const Line& line, std::int64_t num_lines, std::int64_t begin,
                       std::int64_t depth, std::int64_t whole_depth, float* packed) {
  constexpr std::int64_t kPanel = kPanelVectors * kLanes;
  const std::int64_t filled = packed_count(num_lines, 1);
  for (std::int64_t first = 0; first < filled; first += 4) {
    const std::int64_t panel = first / kPanel * kPanel;
    const std::int64_t width = smaller(kPanel, filled - panel);
    float* to = packed + panel * whole_depth + begin * width + (first - panel);
    const auto a = line(smaller(first, num_lines - 1));
    const auto b = line(smaller(first + 1, num_lines - 1));
    const auto c = line(smaller(first + 2, num_lines - 1));
    const auto d = line(smaller(first + 3, num_lines - 1));
    std::int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
      Vec4F rows[4] = {four_of(a, k), four_of(b, k), four_of(c, k), four_of(d, k)};
      transpose4(rows[0], rows[1], rows[2], rows[3]);
      for (int i = 0; i < 4; ++i) {
        store4(to + (k + i) * width, rows[i]);
      }
    }
    for (; k < depth; ++k) {
      store4(to + k * width, Vec4F{a.scalar(k), b.scalar(k), c.scalar(k), d.scalar(k)});
    }
  }
}

// sums[row][vector] += rows[row][k] * panel[k][vector], over k < depth.
template <int kVectors, int kRows>
inline __attribute__((always_inline)) void add_panel(const float* panel,
                                                     const float* const (&rows)[kRows],
                                                     std::int64_t depth,
                                                     Vector (&sums)[kRows][kVectors]) {
  Vector own[kRows][kVectors] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector lines[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      lines[v] = load_vector(panel + (k * kVectors + v) * kLanes);
    }
    for (int row = 0; row < kRows; ++row) {
      const Vector element = Vector{} + rows[row][k];
      for (int v = 0; v < kVectors; ++v) {
        own[row][v] += element * lines[v];
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] += own[row][v];
    }
  }
}

inline const float* widened(const float* row, std::int64_t, float*) {
  return row;
}
template <typename Element>
inline const float* widened(const Element* row, std::int64_t count, float* scratch) {
  std::int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    *reinterpret_cast<UnalignedVector*>(scratch + k) = load_vector(row + k);
  }
  for (; k < count; ++k) {
    scratch[k] = load_scalar(row + k);
  }
  return scratch;
}

// Rows that lie row_stride elements apart; packed lines; both `depth` long.
template <typename Element>
struct PackedProduct {
  const float* packed;
  const Element* rows;
  std::int64_t num_lines, row_stride, depth;
};

// The sums of row i and line j are at values[i * pitch + j].
struct PackedSums {
  const float* values;
  std::int64_t pitch, first_line, num_lines, first_row, num_rows;
};

// A panel of lines by all rows from first_row to before end_row; finish(PackedSums) gets a few
// rows' sums at a time.
template <int kVectors, typename Element, typename Finish>
inline void multiply_panel(const PackedProduct<Element>& product, std::int64_t first_line,
                           std::int64_t first_row, std::int64_t end_row, const Finish& finish) {
  constexpr int kRows = rows_at_once(kVectors);
  constexpr int kWidth = kVectors * kLanes;
  const float* panel = product.packed + first_line * product.depth;
  const std::int64_t lines = smaller(kWidth, product.num_lines - first_line);
  alignas(64) float scratch[kRows][sizeof(Element) == sizeof(float) ? 1 : kDepthStep];
  for (std::int64_t row = first_row; row < end_row; row += kRows) {
    alignas(64) Vector sums[kRows][kVectors] = {};
    for (std::int64_t begin = 0; begin < product.depth; begin += kDepthStep) {
      const std::int64_t step = smaller(kDepthStep, product.depth - begin);
      const float* rows[kRows];
      for (int i = 0; i < kRows; ++i) {
        const std::int64_t index = smaller(row + i, end_row - 1);
        rows[i] = widened(product.rows + index * product.row_stride + begin, step, scratch[i]);
      }
      add_panel<kVectors, kRows>(panel + begin * kWidth, rows, step, sums);
    }
    finish(PackedSums{reinterpret_cast<const float*>(sums), kWidth, first_line, lines, row,
                      smaller(kRows, end_row - row)});
  }
}

template <typename Element, typename Finish>
inline void multiply_packed(const PackedProduct<Element>& product, std::int64_t first_row,
                            std::int64_t end_row, const Finish& finish) {
  constexpr std::int64_t kPanel = kPanelVectors * kLanes;
  for (std::int64_t line = 0; line < product.num_lines; line += kPanel) {
    const std::int64_t vectors =
        smaller(kPanelVectors, (product.num_lines - line + kLanes - 1) / kLanes);
    if (vectors == 1) {
      multiply_panel<1>(product, line, first_row, end_row, finish);
    } else if (vectors == 2) {
      multiply_panel<2>(product, line, first_row, end_row, finish);
    } else if (vectors == 3) {
      multiply_panel<3>(product, line, first_row, end_row, finish);
    } else {
      multiply_panel<kPanelVectors>(product, line, first_row, end_row, finish);
    }
  }
}

}  // namespace
}  // namespace ZSSEG_ISA_NAMESPACE
}  // namespace zsseg
