// Launches every CUDA kernel at every dtype on odd sizes and offset pointers and compares its
// results with the CPU kernels'. Needs a GPU but no test library, and is small enough to run under
// compute-sanitizer:
//
//   zsseg_cuda_tests [--unpoisoned]      exit status 0: all agree, 1: some differ, 4: no GPU
//
// --unpoisoned leaves results and workspaces untouched before a kernel runs, for initcheck.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda_tests/tensors.h"
#include "zsseg/ops/all_finite.h"
#include "zsseg/ops/count_labels.h"
#include "zsseg/ops/crop_regions.h"
#include "zsseg/ops/label_regions.h"
#include "zsseg/ops/merge_windows.h"
#include "zsseg/ops/overlay.h"
#include "zsseg/ops/patch_text_similarity.h"
#include "zsseg/ops/preprocess.h"
#include "zsseg/ops/relationship_descriptor.h"
#include "zsseg/ops/upsample_argmax.h"
#include "zsseg/ops/warp_blend.h"
#if defined(ZSSEG_CUDA_EMULATED)
#include <cuda_runtime_api.h>
#endif

namespace zsseg::cuda_tests {
namespace {

constexpr const char* kActivationNames[] = {"none", "sigmoid", "softmax"};  // by value

using upsample::Activation;
using Views = std::vector<TensorView>;

// How much a result may differ from the CPU's.
struct Tolerance {
  double absolute = 0.0;     // of an element
  double wrong_share = 0.0;  // elements that may differ by more, at near ties
};
constexpr Tolerance kExact{};
constexpr Tolerance kRounding{2e-5, 0.0};  // sums in another order, and fused products
constexpr Tolerance kHalf{4e-3, 0.0};
constexpr Tolerance kBfloat16{2e-2, 0.0};
constexpr Tolerance kLongSums{5e-5, 0.0};  // matrix units cut off what float32 would round
constexpr Tolerance kNearTies{2e-5, 2e-3};

struct Result {
  DType dtype;
  Shape shape;
  Tolerance tolerance;
};

// Runs an operation on both devices. `run` gets the inputs, the results and a workspace.
class Comparison {
 public:
  Comparison(bool poisoned, StreamHandle stream) : poisoned_(poisoned), stream_(stream) {}

  using Run = std::function<void(const Views& inputs, const Views& results, const TensorView& work,
                                 StreamHandle stream)>;
  using WorkspaceBytes = std::function<std::size_t(const Views& inputs)>;

  void compare(const std::string& name, const std::vector<HostTensor>& inputs,
               const std::vector<Result>& results, const Run& run,
               const WorkspaceBytes& workspace_bytes = nullptr) {
    std::string wrong;
    try {
      wrong = difference(inputs, results, run, workspace_bytes);
    } catch (const std::exception& error) {
      wrong = error.what();
    }
    ++count_;
    failures_ += wrong.empty() ? 0 : 1;
    std::printf("%-6s %s%s%s\n", wrong.empty() ? "ok" : "FAILED", name.c_str(),
                wrong.empty() ? "" : ": ", wrong.c_str());
    std::fflush(stdout);
  }

  bool aligned_inputs = false;   // for the kernels that then take wider loads
  bool aligned_results = false;  // and wider stores

  int count() const { return count_; }
  int failures() const { return failures_; }

 private:
  std::string difference(const std::vector<HostTensor>& inputs, const std::vector<Result>& results,
                         const Run& run, const WorkspaceBytes& workspace_bytes) const {
    Views host_inputs, gpu_inputs, host_results, gpu_results;
    std::vector<GpuTensor> placed, written;
    std::vector<HostTensor> expected;
    for (const HostTensor& input : inputs) {
      host_inputs.push_back(input.view());
      placed.push_back(GpuTensor::input(input, aligned_inputs, stream_));
    }
    for (const Result& result : results) {
      expected.emplace_back(result.dtype, result.shape);
      written.push_back(
          GpuTensor::result(result.dtype, result.shape, poisoned_, aligned_results, stream_));
    }
    for (std::size_t i = 0; i < placed.size(); ++i) {
      gpu_inputs.push_back(placed[i].view());
    }
    for (std::size_t i = 0; i < results.size(); ++i) {
      host_results.push_back(expected[i].view());
      gpu_results.push_back(written[i].view());
    }
    const std::size_t host_bytes = workspace_bytes ? workspace_bytes(host_inputs) : 0;
    const HostTensor host_work(DType::uint8, {static_cast<std::int64_t>(host_bytes)});
    run(host_inputs, host_results, host_work.view(), 0);
    const std::size_t gpu_bytes = workspace_bytes ? workspace_bytes(gpu_inputs) : 0;
    const GpuTensor gpu_work = GpuTensor::workspace(gpu_bytes, poisoned_, stream_);
    run(gpu_inputs, gpu_results, gpu_work.view(), stream_);
    cuda::synchronize_stream(stream_, 0);
    for (std::size_t i = 0; i < results.size(); ++i) {
      std::string wrong = first_difference(expected[i], written[i].fetch(), results[i].tolerance);
      if (wrong.empty() && written[i].was_written_around()) {
        wrong = "memory beside it was written";
      }
      if (!wrong.empty()) {
        return "result " + std::to_string(i) + ": " + wrong;
      }
    }
    return gpu_work.was_written_around() ? "memory beside the workspace was written" : "";
  }

  static std::string first_difference(const HostTensor& expected, const HostTensor& got,
                                      const Tolerance& tolerance) {
    const std::int64_t count = expected.view().count();
    std::int64_t wrong = 0, first = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const double a = expected.at(i), b = got.at(i);
      const double limit = tolerance.absolute * std::max(1.0, std::abs(a));
      const bool same = a == b || (std::isnan(a) && std::isnan(b)) || std::abs(a - b) <= limit;
      if (!same && wrong++ == 0) {
        first = i;
      }
    }
    if (static_cast<double>(wrong) <= tolerance.wrong_share * static_cast<double>(count)) {
      return "";
    }
    return std::to_string(wrong) + " of " + std::to_string(count) +
           " elements differ, the first, " + std::to_string(first) + ", is " +
           std::to_string(got.at(first)) + ", expected " + std::to_string(expected.at(first));
  }

  bool poisoned_;
  StreamHandle stream_;
  int count_ = 0, failures_ = 0;
};

void run_preprocess(Comparison& comparison, Randomness& random) {
  for (const bool bgr : {false, true}) {
    PreprocessParams params;
    params.height = 37;
    params.width = 41;
    params.mean = {0.48, 0.46, 0.41};
    params.std = {0.27, 0.26, 0.28};
    params.bgr = bgr;
    params.align = bgr ? Align::kCorners : Align::kHalfPixel;
    if (bgr) {  // a part that reaches beyond the whole
      params.whole_height = 60;
      params.whole_width = 50;
      params.top = 20;
      params.left = 15;
    }
    comparison.compare(std::string("preprocess ") + (bgr ? "bgr, corners" : "rgb"),
                       {random.whole(DType::uint8, {29, 53, 3}, 256)},
                       {{DType::float32, {3, 37, 41}, kRounding}},
                       [&](const Views& in, const Views& out, const TensorView&,
                           StreamHandle stream) { preprocess({in[0]}, out[0], params, stream); });
  }
}

// NV12, and results in half precision. Two that differ by rounding differ, below 4, by 2^-9 in
// float16 and by 2^-6 in bfloat16.
void run_preprocess_formats(Comparison& comparison, Randomness& random) {
  PreprocessParams params;
  params.height = 36;
  params.width = 42;
  params.mean = {0.48, 0.46, 0.41};
  params.std = {0.27, 0.26, 0.28};
  params.matrix = ColourMatrix::kBt709Full;
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    const Tolerance rounded = dtype == DType::float16 ? kHalf : kBfloat16;
    for (const bool nv12 : {false, true}) {
      const Shape pixels = nv12 ? Shape{30, 54} : Shape{30, 54, 3};
      comparison.compare(
          std::string("preprocess ") + (nv12 ? "NV12 to " : "to ") + name_of(dtype),
          {random.whole(DType::uint8, pixels, 256), random.whole(DType::uint8, {15, 27, 2}, 256)},
          {{dtype, {3, 36, 42}, dtype == DType::float32 ? kRounding : rounded}},
          [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
            preprocess({in[0], nv12 ? &in[1] : nullptr}, out[0], params, stream);
          });
    }
  }
}

// Matrix units take cls * text rounded to 11 or 8 bits, which moves each of `depth` terms by a
// third of its last bit, as a rule: twelve times what random signs leave of that, because few terms
// are far larger than the rest, and the result's rounding.
Tolerance descriptor_tolerance(DType embeds, std::int64_t depth) {
  if (embeds == DType::float32) {
    return kLongSums;
  }
  const double bits = embeds == DType::float16 ? 2048.0 : 256.0;
  return {(4.0 * std::sqrt(static_cast<double>(depth)) + 1.0) / bits, 0.0};
}

struct ProductSizes {
  std::int64_t batch, classes, columns, depth;  // columns: patches or outputs
  bool aligned;
  int multiprocessors;  // of an emulated GPU
};
// As many images as give each multiprocessor a large tile; the emulated GPU has one of them.
#if defined(ZSSEG_CUDA_EMULATED)
constexpr std::int64_t kImages = 3;
#else
constexpr std::int64_t kImages = 160;
#endif
// Small tiles, large ones on every GPU, and small ones whose depth several blocks share; element by
// element, and 16 bytes at a time.
constexpr ProductSizes kProducts[] = {{2, 19, 67, 35, false, 1},      {2, 19, 67, 136, true, 1},
                                      {kImages, 35, 3, 35, false, 1}, {kImages, 35, 3, 72, true, 1},
                                      {1, 19, 67, 515, false, 40},    {1, 35, 19, 648, true, 132},
                                      {2, 35, 19, 520, true, 1000000}};

std::string name_of(const ProductSizes& sizes) {
  return " " + std::to_string(sizes.batch) + "x" + std::to_string(sizes.classes) + "x" +
         std::to_string(sizes.depth);
}

// Prepares for one case: the GPU's size, where it is emulated, and where arrays begin.
void begin_product(Comparison& comparison, const ProductSizes& sizes) {
  comparison.aligned_inputs = sizes.aligned;
#if defined(ZSSEG_CUDA_EMULATED)
  cuda_emulation::set_multiprocessors(sizes.multiprocessors);
#endif
}

// What an input of zeros holds from `bytes` past a multiple of 4; nothing on the CPU.
TensorView part_of_zeros(const TensorView& zeros, std::int64_t bytes, bool aligned) {
  if (!zeros.device.is_cuda()) {
    return TensorView{};
  }
  TensorView workspace = zeros;
  workspace.shape = {bytes};
  workspace.data = zeros.as<char>() + (aligned ? 0 : 3);
  return workspace;
}

void run_descriptor(Comparison& comparison, Randomness& random, const ProductSizes& sizes,
                    DType embeds, DType result) {
  const std::int64_t width = sizes.columns;
  const std::int64_t batch = sizes.batch, classes = sizes.classes, depth = sizes.depth;
  const std::string dtypes = std::string(name_of(embeds)) + " to " + name_of(result);
  const Tolerance tolerance = descriptor_tolerance(embeds, depth);
  const HostTensor zeros(DType::uint8, {DepthWorkspace::kBytes + 4});
  begin_product(comparison, sizes);
  for (const bool with_queries : {false, true}) {
    comparison.compare(
        "relationship_descriptor " + dtypes + (with_queries ? " text queries" : " whole") +
            name_of(sizes),
        {random.normal(embeds, {batch, depth}), random.normal(embeds, {classes, depth}),
         random.normal(embeds, {width, 2 * depth}), random.normal(DType::float32, {width}),
         random.normal(DType::float32, {classes, width}), zeros},
        {{result, {batch, classes, width}, tolerance}},
        [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
          const TensorView queries = with_queries ? in[4] : TensorView{};
          const TensorView work = part_of_zeros(in[5], DepthWorkspace::kBytes, sizes.aligned);
          for (int repeat = 0; repeat < 2; ++repeat) {  // the first leaves zeros for the second
            relationship_descriptor({in[0], in[1], in[2], in[3], queries, work}, out[0], stream);
          }
        });
  }
  comparison.compare(
      "relationship_descriptor " + dtypes + " text half" + name_of(sizes),
      {random.normal(embeds, {classes, depth}), random.normal(embeds, {width, 2 * depth}),
       random.normal(DType::float32, {width}), zeros},
      {{result, {classes, width}, tolerance}},
      [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
        const TensorView work = part_of_zeros(in[3], DepthWorkspace::kBytes, sizes.aligned);
        relationship_descriptor_text({TensorView{}, in[0], in[1], in[2], TensorView{}, work},
                                     out[0], stream);
      });
  begin_product(comparison, {1, 1, 1, 1, false, 1});
}

void run_similarity_case(Comparison& comparison, Randomness& random, const ProductSizes& sizes,
                         DType patch, DType text, bool normalize) {
  const std::int64_t num_patches = sizes.columns;
  const std::int64_t batch = sizes.batch, classes = sizes.classes, depth = sizes.depth;
  PatchTextSimilarityParams params;
  params.normalize = normalize;
  params.classes_last = normalize;
  const Shape shape =
      normalize ? Shape{batch, num_patches, classes} : Shape{batch, classes, num_patches};
  const Shape text_shape = normalize ? Shape{classes, depth} : Shape{batch, classes, depth};
  HostTensor patches = random.normal(patch, {batch, num_patches, depth});
  if (!normalize && patch == DType::float32) {
    patches.as<float>()[5] = NAN;
  }
  const bool is_shared = sizes.multiprocessors > 1;
  const std::int64_t work_bytes = is_shared ? DepthWorkspace::kBytes : FiniteCheck::kWorkspaceBytes;
  begin_product(comparison, sizes);
  comparison.compare(
      std::string("patch_text_similarity ") + name_of(patch) + " " + name_of(text) +
          (normalize ? " cosine" : " product") + name_of(sizes),
      {patches, random.normal(text, text_shape), HostTensor(DType::uint8, {work_bytes + 56})},
      {{DType::float32, shape, kLongSums}, {DType::uint8, {1}, kExact}},
      [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
        const TensorView workspace = part_of_zeros(in[2], work_bytes, sizes.aligned);
        for (int repeat = 0; repeat < 2; ++repeat) {  // the first leaves zeros for the second
          patch_text_similarity(in[0], in[1], out[0], params, stream, {out[1], workspace});
        }
      });
  begin_product(comparison, {1, 1, 1, 1, false, 1});
}

void run_products(Comparison& comparison, Randomness& random) {
  constexpr DType kTypes[] = {DType::float32, DType::float16, DType::bfloat16};
  for (const ProductSizes& sizes : kProducts) {
    for (const DType embeds : kTypes) {
      run_descriptor(comparison, random, sizes, embeds, DType::float32);
      if (embeds != DType::float32 && sizes.batch == 2) {
        run_descriptor(comparison, random, sizes, embeds, embeds);
      }
    }
    for (const DType patch : kTypes) {
      for (const DType text : kTypes) {
        if (patch != text && patch != DType::float32 && text != DType::float32) {
          continue;
        }
        for (const bool normalize : {false, true}) {
          run_similarity_case(comparison, random, sizes, patch, text, normalize);
        }
      }
    }
  }
}

struct UpsampleCase {
  DType dtype;
  std::int64_t classes;
  Activation activation;
  bool seen_on_host, with_scores;
  float unknown_below;
};

void run_upsample_case(Comparison& comparison, Randomness& random, const UpsampleCase& c) {
  UpsampleArgmaxParams params;
  params.height = 53;
  params.width = 47;
  params.activation = c.activation;
  params.seen_bias = c.classes == 257 ? 0.0f : 0.1f;  // one group of classes, or two
  params.align = c.with_scores ? Align::kCorners : Align::kHalfPixel;
  params.unknown_below = c.unknown_below;
  const HostTensor seen = random.whole(DType::boolean, {c.classes}, 2);
  const auto flags = [&](const Views& in) { return c.seen_on_host ? seen.view() : in[1]; };
  const bool exact = c.activation == Activation::kNone && params.seen_bias == 0.0f;
  const Tolerance tolerance = exact ? kExact : kNearTies;
  const DType label = c.classes > 254 ? DType::uint16 : DType::uint8;
  std::vector<Result> results = {{label, {2, 53, 47}, tolerance}};
  if (c.with_scores) {
    results.push_back({DType::float32, {2, 53, 47}, tolerance});
  }
  comparison.compare(
      std::string("upsample_argmax ") + name_of(c.dtype) + " " + std::to_string(c.classes) +
          " classes " + kActivationNames[static_cast<int>(c.activation)] +
          (c.with_scores ? " with scores" : "") + (c.seen_on_host ? ", flags on the host" : ""),
      {random.normal(c.dtype, {2, c.classes, 7, 5}), seen}, results,
      [&](const Views& in, const Views& out, const TensorView& work, StreamHandle stream) {
        const TensorView given = flags(in);
        upsample_argmax({in[0], &given}, out[0], c.with_scores ? &out[1] : nullptr, work, params,
                        stream);
      },
      [&](const Views& in) {
        const TensorView given = flags(in);
        return upsample_argmax_workspace_bytes({in[0], &given}, params);
      });
}

// A recorded call serves vocabularies of several sizes.
void run_upsample_tables(Comparison& comparison, Randomness& random) {
  UpsampleArgmaxParams params;
  params.height = 53;
  params.width = 47;
  for (const DType label : {DType::uint8, DType::uint16}) {
    for (const std::int32_t counted : {0, 5, 300}) {
      HostTensor count = random.whole(DType::int32, {1}, 2);
      *count.view().as<std::int32_t>() = counted;
      comparison.compare(
          std::string("upsample_argmax to ") + name_of(label) + " by a table, " +
              std::to_string(counted) + " of 300 classes",
          {random.normal(DType::float32, {2, 300, 7, 5}), random.whole(label, {300}, 250), count},
          {{label, {2, 53, 47}, kExact}},
          [&](const Views& in, const Views& out, const TensorView& work, StreamHandle stream) {
            upsample_argmax({in[0], nullptr, &in[1], &in[2]}, out[0], nullptr, work, params,
                            stream);
          },
          [&](const Views& in) {
            return upsample_argmax_workspace_bytes({in[0], nullptr, &in[1], &in[2]}, params);
          });
    }
  }
}

// Labels and, in the same launch, their colours on a frame.
void run_upsample_overlay(Comparison& comparison, Randomness& random) {
  for (const Activation activation :
       {Activation::kNone, Activation::kSigmoid, Activation::kSoftmax}) {
    for (const float bias : {0.0f, 0.1f}) {
      for (const std::int64_t width : {47, 52}) {
        UpsampleArgmaxParams params;
        params.height = 53;
        params.width = width;
        params.activation = activation;
        params.seen_bias = bias;
        params.unknown_below = activation == Activation::kNone ? -INFINITY : 0.05f;
        const auto inputs = [](const Views& in, const LabelOverlay* drawn) {
          return UpsampleArgmaxInputs{in[0], &in[1], nullptr, nullptr, drawn};
        };
        comparison.compare(
            std::string("upsample_argmax and overlay ") +
                kActivationNames[static_cast<int>(activation)] +
                (bias == 0.0f ? "" : " with a bias") + ", width " + std::to_string(width),
            {random.normal(DType::float32, {1, 30, 7, 5}), random.whole(DType::boolean, {30}, 2),
             random.whole(DType::uint8, {53, width, 3}, 256),
             random.whole(DType::uint8, {25, 3}, 256)},
            {{DType::uint8, {1, 53, width}, kNearTies}, {DType::uint8, {53, width, 3}, kNearTies}},
            [&](const Views& in, const Views& out, const TensorView& work, StreamHandle stream) {
              const LabelOverlay drawn{in[2], in[3], out[1], 0.4};
              upsample_argmax(inputs(in, &drawn), out[0], nullptr, work, params, stream);
            },
            [&](const Views& in) {
              return upsample_argmax_workspace_bytes(inputs(in, nullptr), params);
            });
      }
    }
  }
}

void run_upsample(Comparison& comparison, Randomness& random) {
  constexpr float kNever = -INFINITY;
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const std::int64_t classes : {1, 21, 257}) {
      for (const Activation activation :
           {Activation::kNone, Activation::kSigmoid, Activation::kSoftmax}) {
        const bool with_scores = activation != Activation::kNone;
        run_upsample_case(comparison, random,
                          {dtype, classes, activation, classes == 21, with_scores,
                           classes == 257 ? kNever : 0.3f});
      }
    }
  }
}

void run_pictures(Comparison& comparison, Randomness& random) {
  for (const DType label : {DType::uint8, DType::uint16}) {
    comparison.compare(
        std::string("overlay ") + name_of(label),
        {random.whole(DType::uint8, {31, 45, 3}, 256), random.whole(label, {31, 45}, 256),
         random.whole(DType::uint8, {9, 3}, 256)},
        {{DType::uint8, {31, 45, 3}, kExact}},
        [](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
          overlay({in[0]}, in[1], in[2], out[0], {}, stream);
        });
    for (const std::int64_t width : {46, 64}) {  // by pixels, and four at a time
      const Shape picture{30, width, 3};
      comparison.compare(
          std::string("overlay NV12 ") + name_of(label) + ", width " + std::to_string(width),
          {random.whole(DType::uint8, {30, width}, 256),
           random.whole(DType::uint8, {15, width / 2, 2}, 256),
           random.whole(label, {30, width}, 256), random.whole(DType::uint8, {9, 3}, 256)},
          {{DType::uint8, picture, kExact}},
          [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
            const OverlayParams params{0.4, ColourMatrix::kBt709, width == 64};
            overlay({in[0], &in[1]}, in[2], in[3], out[0], params, stream);
          });
    }
    const std::int64_t classes = label == DType::uint8 ? 9 : 4099;  // several windows of bins
    comparison.compare(std::string("count_labels ") + name_of(label),
                       {random.whole(label, {31, 45}, label == DType::uint8 ? 256 : 65536)},
                       {{DType::int64, {classes + 1}, kExact}},
                       [&](const Views& in, const Views& out, const TensorView&,
                           StreamHandle stream) { count_labels(in[0], classes, out[0], stream); });
  }
}

void run_finite(Comparison& comparison, Randomness& random) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const bool finite : {true, false}) {
      HostTensor values = random.normal(dtype, {3, 7, 101});
      if (!finite && dtype == DType::float16) {
        values.as<Half>()[2120] = float_to_half(INFINITY);
      } else if (!finite && dtype == DType::bfloat16) {
        values.as<Bfloat16>()[2120] = float_to_bfloat16(-INFINITY);
      } else if (!finite) {
        values.as<float>()[2120] = NAN;
      }
      comparison.compare(
          std::string("all_finite ") + name_of(dtype) + (finite ? " finite" : " not finite"),
          {values}, {{DType::uint8, {1}, kExact}},
          [](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
            all_finite(in[0], out[0], stream);
          });
    }
  }
}

void run_warp(Comparison& comparison, Randomness& random) {
  const Shape shape{2, 5, 9, 7};
  comparison.compare(
      "warp_blend",
      {random.normal(DType::float32, shape), random.normal(DType::float32, shape),
       random.normal(DType::float32, {2, 9, 7, 2}), random.normal(DType::float32, {2, 9, 7})},
      {{DType::float32, shape, kExact}},
      [](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
        warp_blend({in[0], in[1], in[2], in[3]}, out[0], stream);
      });
}

void run_windows(Comparison& comparison, Randomness& random) {
  WindowPlaces places;
  places.count = 2;
  places.left[1] = 4;
  places.top[1] = 3;  // the window reaches beyond the grid
  for (const bool add : {false, true}) {
    comparison.compare(
        std::string("merge_windows") + (add ? " onto others" : ""),
        {random.normal(DType::float32, {2, 11, 9, 7}), random.normal(DType::float32, {10, 13})},
        {{DType::float32, {1, 11, 10, 13}, kExact}},
        [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
          merge_windows({in[0], in[1], places, false}, out[0], stream);
          if (add) {
            merge_windows({in[0], in[1], places, true}, out[0], stream);
          }
        });
  }
}

void run_crops(Comparison& comparison, Randomness& random) {
  constexpr std::int64_t kMasks = 3, kCanvas = 45, kSide = 19;
  const std::vector<HostTensor> inputs = {random.normal(DType::float32, {kMasks, 11, 13}),
                                          random.normal(DType::float32, {3, kCanvas, kCanvas})};
  for (const HostTensor& masks : {inputs[0], random.normal(DType::float32, {kMasks, 11, 12})}) {
    comparison.aligned_inputs = masks.view().shape[2] % 4 == 0;
    comparison.compare(
        "mask_boxes of width " + std::to_string(masks.view().shape[2]), {masks},
        {{DType::int32, {kMasks, 5}, kExact}},
        [](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
          mask_boxes(in[0], out[0], kCanvas, kCanvas, stream);
        });
  }
  comparison.aligned_inputs = false;
  HostTensor regions(DType::int32, {2}), boxes(DType::int32, {2, 4});
  const std::int32_t corners[8] = {3, 5, 40, 41, 0, 0, 45, 45};
  regions.as<std::int32_t>()[0] = 2;
  regions.as<std::int32_t>()[1] = 0;
  std::memcpy(boxes.as<char>(), corners, sizeof corners);
  HostTensor bounds(DType::int32, {kMasks, 5});  // of every mask, as mask_boxes writes them
  for (int region = 0; region < 2; ++region) {
    std::int32_t* of_mask = bounds.as<std::int32_t>() + 5 * regions.as<std::int32_t>()[region];
    std::copy_n(boxes.as<std::int32_t>() + 4 * region, 4, of_mask);
  }
  for (int style = 0; style < 3; ++style) {
    CropRegionsParams params;
    params.side = kSide;
    params.style = static_cast<regions::Style>(style);
    comparison.compare(
        "crop_regions style " + std::to_string(style), inputs,
        {{DType::float32, {2, 3, kSide, kSide}, kRounding}},
        [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
          crop_regions(in[1], in[0], regions.view(), boxes.view(), out[0], params, stream);
        });
    comparison.compare(
        "crop_regions style " + std::to_string(style) + " of regions on the device",
        {inputs[0], inputs[1], regions, bounds},
        {{DType::float32, {2, 3, kSide, kSide}, kRounding}},
        [&](const Views& in, const Views& out, const TensorView&, StreamHandle stream) {
          crop_regions(in[1], in[0], in[2], in[3], out[0], params, stream);
        });
  }
}

void run_votes_case(Comparison& comparison, Randomness& random, std::int64_t classes,
                    std::int64_t masks, const Shape& out_hw) {
  LabelRegionsParams params;
  params.canvas_height = 13;
  params.canvas_width = 15;
  params.height = out_hw[0];
  params.width = out_hw[1];
  const auto gather = [](const Views& in) { return LabelRegionsInputs{in[0], in[1], &in[2]}; };
  comparison.compare(
      "label_regions " + std::to_string(classes) + " classes, " + std::to_string(masks) + " masks",
      {random.normal(DType::float32, {masks, 9, 11}),
       random.normal(DType::float32, {classes, masks}), random.normal(DType::float32, {classes})},
      {{classes > 254 ? DType::uint16 : DType::uint8, out_hw, kNearTies},
       {DType::float32, out_hw, kNearTies}},
      [&](const Views& in, const Views& out, const TensorView& work, StreamHandle stream) {
        label_regions(gather(in), out[0], &out[1], work, params, stream);
      },
      [&](const Views& in) { return label_regions_workspace_bytes(gather(in), params); });
}

// With many masks a block takes fewer rows; labels of the canvas's own size are not resized.
void run_votes(Comparison& comparison, Randomness& random) {
  for (const std::int64_t masks : {7, 250}) {
    run_votes_case(comparison, random, 19, masks, {20, 21});
    run_votes_case(comparison, random, 257, masks, {13, 15});
  }
}

int run_all(bool poisoned) {
  if (cuda::device_count() == 0) {
    std::fprintf(stderr, "zsseg_cuda_tests: expected a CUDA device, got none\n");
    return 4;
  }
  const StreamHandle stream = cuda::create_stream(0);
  Comparison comparison(poisoned, stream);
  Randomness random;
  run_preprocess(comparison, random);
  run_preprocess_formats(comparison, random);
  run_products(comparison, random);
  run_upsample(comparison, random);
  run_upsample_tables(comparison, random);
  run_upsample_overlay(comparison, random);
  run_pictures(comparison, random);
  run_finite(comparison, random);
  run_warp(comparison, random);
  run_windows(comparison, random);
  run_crops(comparison, random);
  run_votes(comparison, random);
  cuda::destroy_stream(stream, 0);
#if defined(ZSSEG_CUDA_EMULATED)
  std::printf("%llu kernels launched\n",
              static_cast<unsigned long long>(cuda_emulation::counts().kernels));
#endif
  std::printf("%d of %d cases passed\n", comparison.count() - comparison.failures(),
              comparison.count());
  return comparison.failures() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace zsseg::cuda_tests

int main(int count, char** arguments) {
  const std::string option = count > 1 ? arguments[1] : "";
  if (count > 2 || (count == 2 && option != "--unpoisoned")) {
    std::fprintf(stderr, "usage: %s [--unpoisoned]\n", arguments[0]);
    return 2;
  }
  return zsseg::cuda_tests::run_all(option.empty());
}
