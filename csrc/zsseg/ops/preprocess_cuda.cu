#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/preprocess.h"
#include "zsseg/ops/preprocess_pixel.h"
#include "zsseg/wide_cuda.h"

namespace zsseg {
namespace {

constexpr int kBlockX = 32;
constexpr int kBlockY = 8;
constexpr int kRun = 2;  // pixels of a row that a thread takes
constexpr int kColumns = kBlockX * kRun;

struct Problem {
  const std::uint8_t* pixels;          // [height, width, 3], or [height, width] with
  const std::uint8_t* chroma;          // [height / 2, width / 2, 2]
  std::uint32_t luma_row, chroma_row;  // bytes from one row of these two to the next
  void* out;                           // float, Half or Bfloat16 [3, out_height, out_width]
  std::uint32_t height, width, out_height, out_width;
  std::uint32_t whole_height, whole_width, top, left;  // of the resized frame, and of the part
  bool words;  // the frame may be read in words of four bytes
  bool runs;   // the result may be written in runs
  PlaneTransform transform;
  YuvToRgb matrix;
  Align align;
};

// Two neighbours of a row, red in the low byte of each, or blue.
struct Pair {
  std::uint32_t left, right;
};

// From three words, of which the pixels begin `offset` bytes in.
__device__ Pair pair_of_words(std::uint32_t first, std::uint32_t second, std::uint32_t third,
                              std::uint32_t offset) {
  const std::uint64_t low = std::uint64_t{second} << 32 | first;
  const std::uint64_t high = std::uint64_t{third} << 32 | second;
  const std::uint32_t shift = 8 * offset;
  return {static_cast<std::uint32_t>(low >> shift),
          static_cast<std::uint32_t>(shift == 0 ? low >> 24 : high >> (shift - 8))};
}

__device__ Pair rgb_pair(const Problem& problem, std::uint32_t row, const BilinearTap& column) {
  const std::int64_t at = 3 * (std::int64_t{row} * problem.width + column.lower);
  const std::int64_t first_word = at / 4;
  const std::int64_t end = 3 * std::int64_t{problem.height} * problem.width;
  if (problem.words && 4 * first_word + 12 <= end) {
    const std::uint32_t* word = reinterpret_cast<const std::uint32_t*>(problem.pixels) + first_word;
    Pair pair = pair_of_words(word[0], word[1], word[2], static_cast<std::uint32_t>(at % 4));
    pair.right = column.upper == column.lower ? pair.left : pair.right;
    return pair;
  }
  const std::uint8_t* left = problem.pixels + at;
  const std::uint8_t* right = left + 3 * (column.upper - column.lower);
  return {left[0] | std::uint32_t{left[1]} << 8 | std::uint32_t{left[2]} << 16,
          right[0] | std::uint32_t{right[1]} << 8 | std::uint32_t{right[2]} << 16};
}

__device__ std::uint32_t nv12_pixel(const Problem& problem, std::uint32_t row, std::uint32_t x) {
  const std::uint8_t* uv = problem.chroma + std::int64_t{row / 2} * problem.chroma_row + (x & ~1u);
  const int y = problem.pixels[std::int64_t{row} * problem.luma_row + x];
  return yuv_word(y, uv[0], uv[1], problem.matrix);
}

template <bool kNv12>
__device__ Pair read_pair(const Problem& problem, std::uint32_t row, const BilinearTap& column) {
  if (kNv12) {
    return {nv12_pixel(problem, row, column.lower), nv12_pixel(problem, row, column.upper)};
  }
  return rgb_pair(problem, row, column);
}

__device__ float channel_of(std::uint32_t word, int channel) {
  return static_cast<float>(word >> (8 * channel) & 0xffu);
}

__device__ void convert(float value, float& to) {
  to = value;
}
__device__ void convert(float value, Half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  to = float_to_half(value);
#endif
}
__device__ void convert(float value, Bfloat16& to) {
  to = float_to_bfloat16(value);
}

// A block computes the taps of its kColumns x kBlockY pixels once; a thread then takes kRun pixels
// of a row, all three planes, and reads two neighbours of the frame in three words.
// Bytes: 1080p to 512 x 512 reads at most 6.2 MB and writes 1.6 MB (float16) or 3.1 MB. Operations:
// about 90 a pixel. Floors in float16: 1.6 us by bytes, 0.7 us by operations on an H200; 38 and 9
// us on an Orin AGX. Caller guarantees: sides of at most kMaxSide, no empty dimension.
template <typename T, bool kNv12>
__global__ void __launch_bounds__(kBlockX* kBlockY) preprocess_kernel(Problem problem) {
  __shared__ BilinearTap columns[kColumns];
  __shared__ BilinearTap rows[kBlockY];
  const std::uint32_t first_x = blockIdx.x * kColumns, first_y = blockIdx.y * kBlockY;
  const std::uint32_t thread = threadIdx.y * kBlockX + threadIdx.x;
  if (thread < kColumns && first_x + thread < problem.out_width) {
    columns[thread] = bilinear_tap(problem.left + first_x + thread, problem.width,
                                   problem.whole_width, problem.align);
  } else if (thread >= kColumns && thread < kColumns + kBlockY) {
    const std::uint32_t y = first_y + thread - kColumns;
    if (y < problem.out_height) {
      rows[thread - kColumns] =
          bilinear_tap(problem.top + y, problem.height, problem.whole_height, problem.align);
    }
  }
  __syncthreads();
  const std::uint32_t x = first_x + kRun * threadIdx.x, y = first_y + threadIdx.y;
  if (x >= problem.out_width || y >= problem.out_height) {
    return;
  }
  const BilinearTap row = rows[threadIdx.y];
  const int count = x + 1 < problem.out_width ? kRun : 1;
  Wide<T, kRun> result[3];
  for (int p = 0; p < kRun; ++p) {
    const BilinearTap column = columns[kRun * threadIdx.x + (p < count ? p : 0)];
    const Pair above = read_pair<kNv12>(problem, row.lower, column);
    const Pair below = read_pair<kNv12>(problem, row.upper, column);
    for (int plane = 0; plane < 3; ++plane) {
      const int channel = problem.transform.source[plane];
      const float value = lerp(
          lerp(channel_of(above.left, channel), channel_of(above.right, channel), column.t),
          lerp(channel_of(below.left, channel), channel_of(below.right, channel), column.t), row.t);
      convert(value * problem.transform.scale[plane] + problem.transform.shift[plane],
              result[plane].value[p]);
    }
  }
  const std::int64_t stride = std::int64_t{problem.out_height} * problem.out_width;
  T* to = static_cast<T*>(problem.out) + std::int64_t{y} * problem.out_width + x;
  for (int plane = 0; plane < 3; ++plane, to += stride) {
    if (problem.runs) {
      *reinterpret_cast<Wide<T, kRun>*>(to) = result[plane];
      continue;
    }
    to[0] = result[plane].value[0];
    if (count > 1) {
      to[1] = result[plane].value[1];
    }
  }
}

}  // namespace

void preprocess_cuda(const CameraFrame& frame, const TensorView& out,
                     const PreprocessParams& params, StreamHandle stream) {
  const DeviceGuard guard(out.device.index);
  Problem problem = {};
  problem.pixels = frame.pixels.as<const std::uint8_t>();
  problem.chroma = frame.chroma == nullptr ? nullptr : frame.chroma->as<const std::uint8_t>();
  problem.luma_row = static_cast<std::uint32_t>(frame.luma_row());
  problem.chroma_row = static_cast<std::uint32_t>(frame.chroma_row());
  problem.out = out.data;
  problem.height = static_cast<std::uint32_t>(frame.pixels.shape[0]);
  problem.width = static_cast<std::uint32_t>(frame.pixels.shape[1]);
  problem.out_height = static_cast<std::uint32_t>(params.height);
  problem.out_width = static_cast<std::uint32_t>(params.width);
  problem.whole_height = static_cast<std::uint32_t>(params.resized_height());
  problem.whole_width = static_cast<std::uint32_t>(params.resized_width());
  problem.top = static_cast<std::uint32_t>(params.top);
  problem.left = static_cast<std::uint32_t>(params.left);
  problem.words = is_aligned(frame.pixels.data, 4);
  problem.runs = params.width % kRun == 0 && is_aligned(out.data, kRun * size_of(out.dtype));
  problem.transform = plane_transform(params);
  problem.matrix = yuv_to_rgb(params.matrix);
  problem.align = params.align;
  const dim3 grid((problem.out_width + kColumns - 1) / kColumns,
                  (problem.out_height + kBlockY - 1) / kBlockY);
  ZSSEG_DISPATCH_ANY_FLOAT(out.dtype, T, {
    launch("preprocess_kernel",
           frame.chroma == nullptr ? preprocess_kernel<T, false> : preprocess_kernel<T, true>,
           {grid, dim3(kBlockX, kBlockY)}, to_stream(stream), problem);
  });
}

}  // namespace zsseg
