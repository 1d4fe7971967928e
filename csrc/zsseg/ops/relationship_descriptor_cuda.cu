// relationship_descriptor on CUDA, in one launch.
//
// Bytes: text, weight and result once, the weight's first half only where the text half comes
// ready, which is then read too; for 171 classes, D=512, E=768: 4.0 MB, or 3.0 MB with
// text_queries; from half to half 2.0 or 1.8 MB. Operations: 4 * C * D * E, or half of that: 0.27
// or 0.13 G. Floors on an H200 (4.8 TB/s; 67 T float32 and 990 T half operations a second): float32
// 0.8 or 0.6 us by bytes, 4.0 or 2.0 us by operations; half 0.4 us by bytes, 0.3 or 0.1 us by
// operations; on an Orin AGX (205 GB/s; 5.3 and 43 T): float32 20 or 15 us by bytes, 51 or 25 us by
// operations; half 10 or 9 us by bytes, 6 or 3 us by operations. For 20 classes the weight is
// nearly all: with text_queries 1.7 MB in float32 and 0.9 MB in half, 0.4 and 0.2 us by bytes on an
// H200, 8 and 4 us on an Orin AGX; 0.02 G operations take less.
//
// float16 and bfloat16 meet in the matrix units: cls * text is rounded to their precision, the sums
// are float32. sm_75 has no matrix units for bfloat16: there it is widened to float32.
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/depth_parts_cuda.h"
#include "zsseg/ops/dot_tile_cuda.h"
#include "zsseg/ops/relationship_descriptor.h"

namespace zsseg {
namespace {

template <typename Element>
struct Problem {
  const Element* cls;         // [batch, depth] or null
  const Element* text;        // [num_classes, depth]
  const Element* weight;      // [num_outputs, 2 * depth]
  const float* bias;          // [num_outputs]
  const float* text_queries;  // [num_classes, num_outputs] or null
  void* out;                  // [batch, num_classes, num_outputs], float or Element
  std::int64_t batch, num_classes, num_outputs, depth;
  bool wide, is_narrow;  // 16 bytes at a time; out is Element
  DepthParts parts;
};

// The factor of every element of a class's row: the image's embedding, or 1 for the half
// that holds the text alone.
template <typename Element>
__device__ void load_factors(unsigned char* to, const Element* cls, std::int64_t left, int depth,
                             bool wide) {
  constexpr int kChunk = 16 / sizeof(Element);
  const int k = threadIdx.x;
  auto* factors = reinterpret_cast<Element*>(to);
  if (cls != nullptr && wide) {
    if (kChunk * k < depth) {
      ptx::copy_16_bytes(factors + kChunk * k, cls + kChunk * k, kChunk * k < left);
    }
  } else if (k < depth) {
    factors[k] = cls == nullptr ? ptx::narrow<Element>(1.0f) : (k < left ? cls[k] : Element{});
  }
}

template <typename Tile, typename Element>
__device__ void write_tile(const Problem<Element>& problem, std::int64_t image) {
  const std::int64_t first_class = std::int64_t{blockIdx.y} * Tile::kRows;
  const std::int64_t first_output = std::int64_t{blockIdx.x} * Tile::kColumns;
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kColumns; index += Tile::kThreads) {
    const int row = index / Tile::kColumns, column = index % Tile::kColumns;
    const std::int64_t c = first_class + row, output = first_output + column;
    if (c < problem.num_classes && output < problem.num_outputs) {
      const std::int64_t at = c * problem.num_outputs + output;
      const float rest =
          problem.text_queries != nullptr ? problem.text_queries[at] : problem.bias[output];
      const float value = PartialSums<Tile>::total(row, column) + rest;
      const std::int64_t to = image * problem.num_classes * problem.num_outputs + at;
      if (problem.is_narrow) {
        static_cast<Element*>(problem.out)[to] = ptx::narrow<Element>(value);
      } else {
        static_cast<float*>(problem.out)[to] = value;
      }
    }
  }
}

// Blocks at least on a multiprocessor. Five of small tiles leave each thread 96 registers.
template <typename Tile, bool kUnits>
constexpr int kResident = Tile::kResident + (Tile::kSplits && kUnits ? 1 : 0);

// One block a tile of classes by outputs of one image. The slabs of the image's half come first,
// then those of the text half, into the same sums. Caller guarantees: contiguous arrays, no empty
// result.
template <typename Element, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads,
                                  (kResident<Tile, kByMatrixUnits<Element, Element>>))
    relationship_descriptor_kernel(Problem<Element> problem) {
  using Product = ProductOf<Tile, Element, Element, true>;
  constexpr bool kUnits = kByMatrixUnits<Element, Element>;
  constexpr int kDepth = Product::kDepth, kFactors = Tile::kRows * Product::kRowPitch;
  constexpr int kRowBytes = kFactors + Product::kRowPitch;
  const std::int64_t first_class = std::int64_t{blockIdx.y} * Tile::kRows;
  const std::int64_t first_output = std::int64_t{blockIdx.x} * Tile::kColumns;
  const std::int64_t depth = problem.depth;
  const auto slabs = static_cast<int>((depth + kDepth - 1) / kDepth);
  const int of_image = problem.cls != nullptr ? slabs : 0;
  const int of_text = problem.text_queries == nullptr ? slabs : 0;
  const DepthParts& parts = problem.parts;
  const int first_slab = parts.first_of(of_image + of_text, parts.own());
  const int own_slabs = parts.first_of(of_image + of_text, parts.own() + 1) - first_slab;
  for (std::int64_t image = parts.image(); image < problem.batch; image += parts.image_step()) {
    using Rows = HoistedLines<Tile, Tile::kRows, kDepth, Element>;
    using Columns = HoistedLines<Tile, Tile::kColumns, kDepth, Element>;
    const std::conditional_t<kUnits, Rows, NoLines> rows(problem.text + first_class * depth, depth,
                                                         problem.num_classes - first_class);
    const std::conditional_t<kUnits, Columns, NoLines> columns(
        problem.weight + 2 * first_output * depth, 2 * depth, problem.num_outputs - first_output);
    const auto load = [&](int own_slab, unsigned char* stage) {
      const int slab = first_slab + own_slab;
      const bool is_text = slab >= of_image;
      const std::int64_t start = std::int64_t{is_text ? slab - of_image : slab} * kDepth;
      const std::int64_t left = depth - start;
      const Element* cls = is_text ? nullptr : problem.cls + image * depth + start;
      load_factors<Element>(stage + kFactors, cls, left, kDepth, problem.wide);
      if constexpr (kUnits) {
        rows.load(stage, start, left, problem.wide);
        columns.load(stage + kRowBytes, (is_text ? depth : 0) + start, left, problem.wide);
        return;
      }
      load_lines<Tile, Tile::kRows, kDepth, Element>(
          stage,
          [&](int line) {
            const std::int64_t index = first_class + line;
            return index < problem.num_classes ? problem.text + index * depth + start : nullptr;
          },
          left, problem.wide);
      load_lines<Tile, Tile::kColumns, kDepth, Element>(
          stage + kRowBytes,
          [&](int line) {
            const std::int64_t index = first_output + line;
            return index < problem.num_outputs
                       ? problem.weight + (2 * index + (is_text ? 1 : 0)) * depth + start
                       : nullptr;
          },
          left, problem.wide);
    };
    Product product;
    go_through_slabs<Tile>(own_slabs, load, [&](const unsigned char* stage) {
      product.add(stage, stage + kRowBytes);
    });
    PartialSums<Tile>::put(product);
    __syncthreads();
    if (!add_parts<Tile>(parts, nullptr)) {
      return;
    }
    write_tile<Tile>(problem, image);
    __syncthreads();
  }
}

template <typename Element, typename Tile>
void launch_tiles(Problem<Element> problem, const TensorView& workspace, StreamHandle stream) {
  constexpr int kDepth = ProductOf<Tile, Element, Element, true>::kDepth;
  const int halves = (problem.cls != nullptr ? 1 : 0) + (problem.text_queries == nullptr ? 1 : 0);
  dim3 grid = tile_grid<Tile>(problem.num_classes, problem.num_outputs, problem.batch);
  problem.parts =
      depth_parts<Tile>(workspace, grid, halves * ((problem.depth + kDepth - 1) / kDepth));
  grid.z *= static_cast<unsigned>(problem.parts.count);
  launch("relationship_descriptor_kernel", relationship_descriptor_kernel<Element, Tile>,
         {grid, Tile::kThreads}, to_stream(stream), problem);
}

template <typename Element>
void descriptor(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                StreamHandle stream) {
  Problem<Element> problem = {};
  problem.cls = inputs.cls_embed.as<const Element>();
  problem.text = inputs.text_embeds.as<const Element>();
  problem.weight = inputs.weight.as<const Element>();
  problem.bias = inputs.bias.as<const float>();
  problem.text_queries = inputs.text_queries.as<const float>();
  problem.out = out.data;
  problem.batch = problem.cls != nullptr ? inputs.cls_embed.shape[0] : 1;
  problem.num_classes = inputs.text_embeds.shape[0];
  problem.num_outputs = inputs.weight.shape[0];
  problem.depth = inputs.text_embeds.shape[1];
  const auto row_bytes = problem.depth * static_cast<std::int64_t>(sizeof(Element));
  problem.wide = is_wide(problem.cls, row_bytes) && is_wide(problem.text, row_bytes) &&
                 is_wide(problem.weight, row_bytes);
  problem.is_narrow = out.dtype != DType::float32;
  if (fits_large_tiles(problem.num_classes, problem.num_outputs, problem.batch)) {
    launch_tiles<Element, LargeTile>(problem, inputs.workspace, stream);
  } else {
    launch_tiles<Element, SmallTile>(problem, inputs.workspace, stream);
  }
}

}  // namespace

void relationship_descriptor_cuda(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                                  StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  ZSSEG_DISPATCH_ANY_FLOAT(inputs.text_embeds.dtype, Element,
                           descriptor<Element>(inputs, out, stream));
}

}  // namespace zsseg
