// relationship_descriptor on CUDA, in one launch.
//
// Bytes: text, weight and result once, the weight's first half only where the text half comes
// ready; for 171 classes, D=512, E=768: 4.0 MB, or 2.5 MB with text_queries. Operations: 4 * C * D
// * E, or half of that: 0.27 or 0.13 G. Floors on an H200 (4.8 TB/s, 67 T float32 operations a
// second): 0.8 or 0.5 us by bytes, 4.0 or 2.0 us by operations; on an Orin AGX (205 GB/s, 5.3 T):
// 20 or 12 us by bytes, 51 or 25 us by operations. For 20 classes the weight is all: 0.3 us by
// bytes on an H200.
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/ops/dot_tile_cuda.h"
#include "zsseg/ops/relationship_descriptor.h"

namespace zsseg {
namespace {

struct Problem {
  const float* cls;           // [batch, depth] or null
  const float* text;          // [num_classes, depth]
  const float* weight;        // [num_outputs, 2 * depth]
  const float* bias;          // [num_outputs]
  const float* text_queries;  // [num_classes, num_outputs] or null
  float* out;                 // [batch, num_classes, num_outputs]
  std::int64_t batch, num_classes, num_outputs, depth;
  bool wide;
};

// What every element of a class's row is multiplied by: the image's embedding, or 1 for the half
// that holds the text alone.
__device__ void load_factors(unsigned char* to, const float* cls, std::int64_t left, int depth,
                             bool wide) {
  const int k = threadIdx.x;
  auto* factors = reinterpret_cast<float*>(to);
  if (cls != nullptr && wide) {
    if (4 * k < depth) {
      ptx::copy_16_bytes(factors + 4 * k, cls + 4 * k, 4 * k < left);
    }
  } else if (k < depth) {
    factors[k] = cls == nullptr ? 1.0f : (k < left ? cls[k] : 0.0f);
  }
}

template <typename Tile>
__device__ void write_tile(const Problem& problem, std::int64_t image) {
  const std::int64_t first_class = std::int64_t{blockIdx.y} * Tile::kRows;
  const std::int64_t first_output = std::int64_t{blockIdx.x} * Tile::kColumns;
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kColumns; index += Tile::kThreads) {
    const int row = index / Tile::kColumns, column = index % Tile::kColumns;
    const std::int64_t c = first_class + row, output = first_output + column;
    if (c < problem.num_classes && output < problem.num_outputs) {
      const std::int64_t at = c * problem.num_outputs + output;
      const float rest =
          problem.text_queries != nullptr ? problem.text_queries[at] : problem.bias[output];
      problem.out[image * problem.num_classes * problem.num_outputs + at] =
          PartialSums<Tile>::total(row, column) + rest;
    }
  }
}

// One block a tile of classes by outputs of one image. The slabs of the image's half come first,
// then those of the text half, into the same sums. Caller guarantees: contiguous float32, no empty
// result.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    relationship_descriptor_kernel(Problem problem) {
  using Product = FloatProduct<Tile, float, float, true>;
  constexpr int kDepth = Product::kDepth, kFactors = Tile::kRows * Product::kRowPitch;
  constexpr int kRowBytes = kFactors + Product::kRowPitch;
  const std::int64_t first_class = std::int64_t{blockIdx.y} * Tile::kRows;
  const std::int64_t first_output = std::int64_t{blockIdx.x} * Tile::kColumns;
  const std::int64_t depth = problem.depth;
  const auto slabs = static_cast<int>((depth + kDepth - 1) / kDepth);
  const int of_image = problem.cls != nullptr ? slabs : 0;
  const int of_text = problem.text_queries == nullptr ? slabs : 0;
  for (std::int64_t image = blockIdx.z; image < problem.batch; image += gridDim.z) {
    const auto load = [&](int slab, unsigned char* stage) {
      const bool is_text = slab >= of_image;
      const std::int64_t start = std::int64_t{is_text ? slab - of_image : slab} * kDepth;
      const std::int64_t left = depth - start;
      load_lines<Tile, Tile::kRows, kDepth, float>(
          stage,
          [&](int line) {
            const std::int64_t index = first_class + line;
            return index < problem.num_classes ? problem.text + index * depth + start : nullptr;
          },
          left, problem.wide);
      load_factors(stage + kFactors, is_text ? nullptr : problem.cls + image * depth + start, left,
                   kDepth, problem.wide);
      load_lines<Tile, Tile::kColumns, kDepth, float>(
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
    go_through_slabs<Tile>(of_image + of_text, load, [&](const unsigned char* stage) {
      product.add(stage, stage + kRowBytes);
    });
    PartialSums<Tile>::put(product);
    __syncthreads();
    write_tile<Tile>(problem, image);
    __syncthreads();
  }
}

template <typename Tile>
void launch_tiles(const Problem& problem, StreamHandle stream) {
  launch("relationship_descriptor_kernel", relationship_descriptor_kernel<Tile>,
         {tile_grid<Tile>(problem.num_classes, problem.num_outputs, problem.batch), Tile::kThreads},
         to_stream(stream), problem);
}

}  // namespace

void relationship_descriptor_cuda(const RelationshipDescriptorInputs& inputs, const TensorView& out,
                                  StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  Problem problem = {};
  problem.cls = inputs.cls_embed.as<const float>();
  problem.text = inputs.text_embeds.as<const float>();
  problem.weight = inputs.weight.as<const float>();
  problem.bias = inputs.bias.as<const float>();
  problem.text_queries = inputs.text_queries.as<const float>();
  problem.out = out.as<float>();
  problem.batch = problem.cls != nullptr ? inputs.cls_embed.shape[0] : 1;
  problem.num_classes = inputs.text_embeds.shape[0];
  problem.num_outputs = inputs.weight.shape[0];
  problem.depth = inputs.text_embeds.shape[1];
  const auto row_bytes = problem.depth * static_cast<std::int64_t>(sizeof(float));
  problem.wide = is_wide(problem.cls, row_bytes) && is_wide(problem.text, row_bytes) &&
                 is_wide(problem.weight, row_bytes);
  if (fits_large_tiles(problem.num_classes, problem.num_outputs, problem.batch)) {
    launch_tiles<LargeTile>(problem, stream);
  } else {
    launch_tiles<SmallTile>(problem, stream);
  }
}

}  // namespace zsseg
