// A tile of dot products between rows: what patch_text_similarity and relationship_descriptor have
// in common on CUDA. For inclusion in <op>_cuda.cu only.
//
// A block computes Tile::kRows x Tile::kColumns sums. It goes through the depth in slabs, which
// 16-byte copies bring to shared memory some slabs ahead. Every warp holds the sums of 32 rows and
// Tile::kWarpColumns columns; Tile::kDepthWarps warps share the depth of a slab, and their sums are
// added in a fixed order at the end, so results repeat. Small tiles keep more multiprocessors busy
// where results are small; depth_parts_cuda.h shares the depth among blocks where they do not
// suffice.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "zsseg/cuda_launch.h"
#include "zsseg/half.h"
#include "zsseg/ops/ptx.h"

namespace zsseg {
namespace {

constexpr int kPad = 16;         // bytes after a line of a slab: eight lines meet all banks
constexpr int kSteps = 4;        // of a slab's depth, which warps share
constexpr int kMostPitch = 144;  // bytes from a line to the next

// kResident blocks at least fit on a multiprocessor.
// Memory in functions that are no templates: the emulated GPU poisons only such.
struct SmallTile {
  static constexpr int kRows = 32, kColumns = 16, kWarpColumns = 16, kDepthWarps = 4;
  static constexpr int kThreads = 128, kStages = 4, kResident = 4;
  static constexpr bool kSplits = true;  // several blocks may share the depth of one
  static constexpr int kStageBytes = (kRows + kColumns + 1) * kMostPitch;

  __device__ static unsigned char* memory() {
    alignas(16) __shared__ unsigned char bytes[kStages * kStageBytes];
    return bytes;
  }
};

struct LargeTile {
  static constexpr int kRows = 64, kColumns = 64, kWarpColumns = 32, kDepthWarps = 2;
  static constexpr int kThreads = 256, kStages = 2, kResident = 1;
  static constexpr bool kSplits = false;
  static constexpr int kStageBytes = (kRows + kColumns + 1) * kMostPitch;

  __device__ static unsigned char* memory() {
    alignas(16) __shared__ unsigned char bytes[kStages * kStageBytes];
    return bytes;
  }
};

// Where a warp works.
template <typename Tile>
struct WarpPlace {
  int first_row, first_column, first_step;

  __device__ static WarpPlace mine() {
    constexpr int kAcross = Tile::kColumns / Tile::kWarpColumns;
    const int warp = threadIdx.x / 32, part = warp / Tile::kDepthWarps;
    return {part / kAcross * 32, part % kAcross * Tile::kWarpColumns, warp % Tile::kDepthWarps};
  }
};

// Four elements of a line, at a multiple of four.
template <typename Element>
__device__ void read_four(const unsigned char* line, int k, float (&values)[4]) {
  struct alignas(4 * sizeof(Element)) Four {
    Element element[4];
  };
  const Four four = reinterpret_cast<const Four*>(line)[k / 4];
  ZSSEG_UNROLL()
  for (int i = 0; i < 4; ++i) {
    values[i] = ptx::widen(four.element[i]);
  }
}

// float16 or bfloat16 by matrix units, sums in float32. A step is 16 deep. kFactors: line
// Tile::kRows of the rows holds what each element of every row is multiplied by, which rounds it.
template <typename Tile, typename Element, bool kFactors>
struct PairProduct {
  using Row = Element;
  using Column = Element;
  static constexpr int kDepth = 16 * kSteps;  // of a slab
  static constexpr int kPitch = 2 * kDepth + kPad;
  static constexpr int kRowPitch = kPitch, kColumnPitch = kPitch;
  static constexpr int kAtoms = Tile::kWarpColumns / 8;
  static constexpr int kSums = 8 * kAtoms;  // of a thread

  ptx::Sums sums[2][kAtoms] = {};

  __device__ void add(const unsigned char* rows, const unsigned char* columns) {
    const auto place = WarpPlace<Tile>::mine();
    const int lane = threadIdx.x % 32;
    const unsigned char* left = rows + (place.first_row + lane % 16) * kPitch + lane / 16 * 16;
    const unsigned char* right =
        columns + (place.first_column + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
    ZSSEG_UNROLL()
    for (int step = 0; step < kSteps / Tile::kDepthWarps; ++step) {
      const int offset = (place.first_step + step * Tile::kDepthWarps) * 32;
      std::uint32_t a[2][4];
      ptx::load_matrices(a[0], left + offset);
      ptx::load_matrices(a[1], left + 16 * kPitch + offset);
      if (kFactors) {
        scale(a, rows + Tile::kRows * kPitch + offset);
      }
      ZSSEG_UNROLL()
      for (int pair = 0; pair < kAtoms / 2; ++pair) {
        std::uint32_t b[4];
        ptx::load_matrices(b, right + pair * 16 * kPitch + offset);
        ZSSEG_UNROLL()
        for (int half = 0; half < 2; ++half) {
          add_product(sums[half][2 * pair], a[half], {b[0], b[1]});
          add_product(sums[half][2 * pair + 1], a[half], {b[2], b[3]});
        }
      }
    }
  }

  __device__ static void add_product(ptx::Sums& sums, const std::uint32_t (&a)[4],
                                     const std::uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<Element, Half>) {
      ptx::add_product_16(sums, a, b);
    } else {
      ptx::add_product_16_bfloat16(sums, a, b);
    }
  }

  __device__ static void scale(std::uint32_t (&a)[2][4], const unsigned char* factors) {
    ZSSEG_UNROLL()
    for (int i = 0; i < 8; ++i) {
      const auto pair =
          reinterpret_cast<const std::uint32_t*>(factors + i % 4 / 2 * 16)[threadIdx.x % 4];
      std::uint32_t& value = a[i / 4][i % 4];
      if constexpr (std::is_same_v<Element, Half>) {
        value = ptx::multiply_pairs(value, pair);
      } else {
        value = ptx::multiply_pairs_bfloat16(value, pair);
      }
    }
  }

  __device__ float value(int i) const { return sums[i / (4 * kAtoms)][i / 4 % kAtoms][i % 4]; }
  __device__ static int row(int i) {
    return i / (4 * kAtoms) * 16 + i % 4 / 2 * 8 + threadIdx.x % 32 / 4;
  }
  __device__ static int column(int i) { return i / 4 % kAtoms * 8 + threadIdx.x % 4 * 2 + i % 2; }
};

// Any element types by float32 products. A step is 8 deep. kFactors: line Tile::kRows of the rows
// holds what each element of every row is multiplied by.
template <typename Tile, typename RowElement, typename ColumnElement, bool kFactors>
struct FloatProduct {
  using Row = RowElement;
  using Column = ColumnElement;
  static constexpr int kDepth = 8 * kSteps;
  static constexpr int kRowPitch = sizeof(Row) * kDepth + kPad;
  static constexpr int kColumnPitch = sizeof(Column) * kDepth + kPad;
  static constexpr int kAcross = Tile::kWarpColumns / 4;  // a thread's columns; it has four rows
  static constexpr int kSums = 4 * kAcross;

  float sums[4][kAcross] = {};

  __device__ void add(const unsigned char* rows, const unsigned char* columns) {
    const auto place = WarpPlace<Tile>::mine();
    const int lane = threadIdx.x % 32;
    const unsigned char* left = rows + (place.first_row + lane / 4) * kRowPitch;
    const unsigned char* right = columns + (place.first_column + lane % 4) * kColumnPitch;
    ZSSEG_UNROLL()
    for (int quarter = 0; quarter < 2 * kSteps / Tile::kDepthWarps; ++quarter) {
      const int k = place.first_step * 8 + quarter / 2 * 8 * Tile::kDepthWarps + quarter % 2 * 4;
      float of_row[4][4];
      ZSSEG_UNROLL()
      for (int i = 0; i < 4; ++i) {
        read_four<Row>(left + 8 * i * kRowPitch, k, of_row[i]);
      }
      if (kFactors) {
        scale(of_row, rows + Tile::kRows * kRowPitch, k);
      }
      ZSSEG_UNROLL()
      for (int j = 0; j < kAcross; ++j) {
        float of_column[4];
        read_four<Column>(right + 4 * j * kColumnPitch, k, of_column);
        ZSSEG_UNROLL()
        for (int i = 0; i < 4; ++i) {
          ZSSEG_UNROLL()
          for (int e = 0; e < 4; ++e) {
            sums[i][j] += of_row[i][e] * of_column[e];
          }
        }
      }
    }
  }

  __device__ static void scale(float (&rows)[4][4], const unsigned char* factors, int k) {
    float factor[4];
    read_four<Row>(factors, k, factor);
    ZSSEG_UNROLL()
    for (int i = 0; i < 16; ++i) {
      rows[i / 4][i % 4] *= factor[i % 4];
    }
  }

  __device__ float value(int i) const { return sums[i / kAcross][i % kAcross]; }
  __device__ static int row(int i) { return i / kAcross * 8 + threadIdx.x % 32 / 4; }
  __device__ static int column(int i) { return i % kAcross * 4 + threadIdx.x % 4; }
};

// Matrix units where both operands are float16, or both bfloat16 and the GPU has units for it.
template <typename Row, typename Column>
constexpr bool kByMatrixUnits =
    std::is_same_v<Row, Column> &&
    (std::is_same_v<Row, Half> || (std::is_same_v<Row, Bfloat16> && !ZSSEG_PTX_SM75));

template <typename Tile, typename Row, typename Column, bool kFactors>
using ProductOf = std::conditional_t<kByMatrixUnits<Row, Column>, PairProduct<Tile, Row, kFactors>,
                                     FloatProduct<Tile, Row, Column, kFactors>>;

// Fills kLines lines of a slab, kDepth elements each, from address(line) on; elements from `left`
// on, and lines whose address is null, are zeros. `wide`: the addresses and `left` are multiples of
// 16 bytes.
template <typename Tile, int kLines, int kDepth, typename Element, typename Address>
__device__ void load_lines(unsigned char* to, const Address& address, std::int64_t left,
                           bool wide) {
  constexpr int kChunk = 16 / sizeof(Element), kChunks = kDepth / kChunk;
  constexpr int kPitch = kDepth * sizeof(Element) + kPad;
  ZSSEG_UNROLL(1)  // nobody waits for a copy here, and addresses take registers
  for (int index = threadIdx.x; index < kLines * kChunks; index += Tile::kThreads) {
    const int line = index / kChunks, k = index % kChunks * kChunk;
    const Element* from = address(line);
    auto* chunk = reinterpret_cast<Element*>(to + line * kPitch) + k;
    if (wide) {
      ptx::copy_16_bytes(chunk, from + k, from != nullptr && k < left);
      continue;
    }
    ZSSEG_UNROLL(1)
    for (int i = 0; i < kChunk; ++i) {
      chunk[i] = from != nullptr && k + i < left ? from[k + i] : Element{};
    }
  }
}

// Fills kLines lines of slabs, kDepth elements each. A thread copies the same part of every
// kStep-th line for all slabs, so its addresses are computed once.
template <typename Tile, int kLines, int kDepth, typename Element>
struct HoistedLines {
  static constexpr int kChunk = 16 / sizeof(Element), kChunks = kDepth / kChunk;
  static constexpr int kPitch = kDepth * sizeof(Element) + kPad;
  static constexpr int kStep = Tile::kThreads / kChunks, kTimes = (kLines + kStep - 1) / kStep;
  static_assert(Tile::kThreads % kChunks == 0, "a thread's part is the same in all of its lines");

  const Element* from;  // its part of its first line
  std::int64_t step;    // elements to its next line
  int lines;            // that exist from its first on

  // Lines that follow `first` at `stride` elements, `count` of them; beyond are zeros.
  __device__ HoistedLines(const Element* first, std::int64_t stride, std::int64_t count)
      : from(first + threadIdx.x / kChunks * stride + threadIdx.x % kChunks * kChunk),
        step(kStep * stride),
        lines(static_cast<int>(count < kLines ? count : kLines) -
              static_cast<int>(threadIdx.x / kChunks)) {}

  // One slab, from `offset` elements on; those from `left` on are zeros. `wide`: all addresses and
  // `left` are multiples of 16 bytes.
  __device__ void load(unsigned char* to, std::int64_t offset, std::int64_t left, bool wide) const {
    const int own = threadIdx.x % kChunks * kChunk;
    const Element* source = from + offset;
    unsigned char* chunk = to + threadIdx.x / kChunks * kPitch + own * sizeof(Element);
    ZSSEG_UNROLL()
    for (int i = 0; i < kTimes; ++i) {
      if (kLines % kStep != 0 && static_cast<int>(threadIdx.x / kChunks) + i * kStep >= kLines) {
        break;
      }
      const bool inside = i * kStep < lines;
      if (wide) {
        ptx::copy_16_bytes(chunk, source, inside && own < left);
      } else {
        copy_slowly(reinterpret_cast<Element*>(chunk), source, inside ? left - own : 0);
      }
      source += step;
      chunk += kStep * kPitch;
    }
  }

  __device__ static void copy_slowly(Element* to, const Element* source, std::int64_t left) {
    ZSSEG_UNROLL(1)
    for (int i = 0; i < kChunk; ++i) {
      to[i] = i < left ? source[i] : Element{};
    }
  }
};

// In the place of HoistedLines where a float32 product leaves no registers for addresses.
struct NoLines {
  template <typename... Ignored>
  __device__ explicit NoLines(Ignored...) {}
};

// Calls load(slab, stage) for `count` slabs, Tile::kStages - 1 slabs ahead of multiply(stage). The
// stages are free afterwards.
template <typename Tile, typename Load, typename Multiply>
__device__ void go_through_slabs(int count, const Load& load, const Multiply& multiply) {
  constexpr int kAhead = Tile::kStages - 1;
  for (int slab = 0; slab < kAhead; ++slab) {
    if (slab < count) {
      load(slab, Tile::memory() + slab * Tile::kStageBytes);
    }
    ptx::end_copy_group();
  }
  for (int slab = 0; slab < count; ++slab) {
    ptx::wait_for_copies<kAhead - 1>();
    __syncthreads();
    if (slab + kAhead < count) {
      load(slab + kAhead, Tile::memory() + (slab + kAhead) % Tile::kStages * Tile::kStageBytes);
    }
    ptx::end_copy_group();
    multiply(Tile::memory() + slab % Tile::kStages * Tile::kStageBytes);
  }
  ptx::wait_for_copies<0>();
  __syncthreads();
}

// The warps' sums, side by side in the memory of the stages.
template <typename Tile>
struct PartialSums {
  static constexpr int kPitch = Tile::kColumns + 1;
  static constexpr int kPart = Tile::kRows * kPitch;
  static constexpr int kCount = Tile::kDepthWarps * kPart;

  __device__ static float* values() { return reinterpret_cast<float*>(Tile::memory()); }

  template <typename Product>
  __device__ static void put(const Product& product) {
    const auto place = WarpPlace<Tile>::mine();
    ZSSEG_UNROLL()
    for (int i = 0; i < Product::kSums; ++i) {
      const int row = place.first_row + Product::row(i);
      values()[place.first_step * kPart + row * kPitch + place.first_column + Product::column(i)] =
          product.value(i);
    }
  }

  __device__ static float total(int row, int column) {
    float sum = values()[row * kPitch + column];
    ZSSEG_UNROLL()
    for (int part = 1; part < Tile::kDepthWarps; ++part) {
      sum += values()[part * kPart + row * kPitch + column];
    }
    return sum;
  }

  // Makes total(row, column) this value.
  __device__ static void set(int row, int column, float value) {
    values()[row * kPitch + column] = value;
    ZSSEG_UNROLL()
    for (int part = 1; part < Tile::kDepthWarps; ++part) {
      values()[part * kPart + row * kPitch + column] = 0.0f;
    }
  }
};

inline bool is_wide(const void* data, std::int64_t line_bytes) {
  return (reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(line_bytes)) % 16 ==
         0;
}

// Of the current device.
inline std::int64_t multiprocessors() {
  int device = 0, count = 1;
  ZSSEG_CUDA_CHECK(cudaGetDevice(&device));
  ZSSEG_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Large tiles read less, but only where they keep every multiprocessor busy and are mostly full.
inline bool fits_large_tiles(std::int64_t rows, std::int64_t columns, std::int64_t batch) {
  const std::int64_t tiles = ((rows + LargeTile::kRows - 1) / LargeTile::kRows) *
                             ((columns + LargeTile::kColumns - 1) / LargeTile::kColumns) * batch;
  return rows > LargeTile::kRows / 2 && tiles >= multiprocessors();
}

template <typename Tile>
dim3 tile_grid(std::int64_t rows, std::int64_t columns, std::int64_t batch) {
  constexpr std::int64_t kMostImages = 65535;
  return dim3(static_cast<unsigned>((columns + Tile::kColumns - 1) / Tile::kColumns),
              static_cast<unsigned>((rows + Tile::kRows - 1) / Tile::kRows),
              static_cast<unsigned>(batch < kMostImages ? batch : kMostImages));
}

}  // namespace
}  // namespace zsseg
