#include <cmath>
#include <cstddef>
#include <cstdint>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"
#include "zsseg/dtype_dispatch.h"
#include "zsseg/ops/add_layer_norm.h"
#include "zsseg/ops/ptx.h"
#include "zsseg/wide_cuda.h"

namespace zsseg {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;  // of a block, which has a row
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kOwnValues = static_cast<int>(kMaxNormWidth) / kThreads;

struct Problem {
  const char* x;            // rows that lie x_row_bytes apart
  const void* y;            // [rows, width]
  const float* scale;       // [norms, width]
  const float* shift;       // [norms, width]
  void* total;              // [rows, width] or null
  void* out;                // [rows, width]
  std::size_t x_row_bytes;  // in bytes, as an index would take more registers
  int width, norms, total_after;
  float eps, second_eps;
};

// The same for every thread of the block.
__device__ float sum_of_block(float value) {
  __shared__ float sums[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, step);
  }
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  value = 0.0f;
  for (const float sum : sums) {
    value += sum;
  }
  return value;
}

// What a thread has of a row: pieces of kPiece neighbours, every kThreads-th of them.
template <int kPiece>
struct OwnValues {
  float value[kOwnValues];

  // Calls `body(column, values of the piece)` for each piece that lies in the row.
  template <typename Body>
  __device__ void each(int width, const Body& body) {
    ZSSEG_UNROLL(16)
    for (int piece = 0; piece < kOwnValues / kPiece; ++piece) {
      const int column = (piece * kThreads + static_cast<int>(threadIdx.x)) * kPiece;
      if (column < width) {
        body(column, value + piece * kPiece);
      }
    }
  }
};

// What is stored in `to`, unless that is null, is rounded to T, and so are the values then.
template <typename T, int kPiece>
__device__ void normalise(OwnValues<kPiece>& row, int width, const float* scale, const float* shift,
                          float eps, T* to) {
  float total = 0.0f, squares = 0.0f;
  row.each(width, [&](int, const float* values) {
    for (int i = 0; i < kPiece; ++i) {
      total += values[i];
    }
  });
  const float count = static_cast<float>(width);
  const float mean = sum_of_block(total) / count;
  row.each(width, [&](int, const float* values) {
    for (int i = 0; i < kPiece; ++i) {
      squares += (values[i] - mean) * (values[i] - mean);
    }
  });
  const float factor = 1.0f / sqrtf(sum_of_block(squares) / count + eps);
  row.each(width, [&](int column, float* values) {
    const auto scales = *reinterpret_cast<const Wide<float, kPiece>*>(scale + column);
    const auto shifts = *reinterpret_cast<const Wide<float, kPiece>*>(shift + column);
    Wide<T, kPiece> rounded;
    for (int i = 0; i < kPiece; ++i) {
      values[i] = (values[i] - mean) * factor * scales.value[i] + shifts.value[i];
      rounded.value[i] = ptx::narrow<T>(values[i]);
    }
    if (to != nullptr) {
      for (int i = 0; i < kPiece; ++i) {
        values[i] = ptx::widen(rounded.value[i]);
      }
      *reinterpret_cast<Wide<T, kPiece>*>(to + column) = rounded;
    }
  });
}

// A block has a row, which its threads keep in registers between one reading and one writing;
// kPiece neighbours are read at once. Bound by memory: 1025 rows of 768 in float16 read 3.1 MB and
// write 3.1 MB, about 12 operations a value. Floors: 1.3 us by bytes, 0.3 us by operations on an
// H200 (4.8 TB/s, 33 T/s); 31 and 3.5 us on an Orin AGX (205 GB/s, 2.7 T/s).
template <typename T, int kPiece>
__global__ void __launch_bounds__(kThreads) add_layer_norm_kernel(Problem problem) {
  using Piece = Wide<T, kPiece>;
  const std::int64_t begin = std::int64_t{blockIdx.x} * problem.width;
  const T* x = reinterpret_cast<const T*>(problem.x + blockIdx.x * problem.x_row_bytes);
  const T* y = static_cast<const T*>(problem.y) + begin;
  T* total = problem.total == nullptr ? nullptr : static_cast<T*>(problem.total) + begin;
  OwnValues<kPiece> own;
  own.each(problem.width, [&](int column, float* values) {
    const Piece left = *reinterpret_cast<const Piece*>(x + column);
    const Piece right = *reinterpret_cast<const Piece*>(y + column);
    Piece sums;
    for (int i = 0; i < kPiece; ++i) {
      sums.value[i] = ptx::narrow<T>(ptx::widen(left.value[i]) + ptx::widen(right.value[i]));
      values[i] = ptx::widen(sums.value[i]);
    }
    if (total != nullptr && problem.total_after == 0) {
      *reinterpret_cast<Piece*>(total + column) = sums;
    }
  });
  ZSSEG_UNROLL(1)
  for (int norm = 0; norm < problem.norms; ++norm) {
    T* to = norm + 1 == problem.total_after ? total : nullptr;
    normalise(own, problem.width, problem.scale + norm * problem.width,
              problem.shift + norm * problem.width, norm == 0 ? problem.eps : problem.second_eps,
              norm + 1 == problem.norms ? static_cast<T*>(problem.out) + begin : to);
  }
}

template <typename T>
void run(const Problem& problem, std::int64_t rows, StreamHandle stream) {
  constexpr int kPiece = 8 / sizeof(T);  // more would take 16 registers for weights
  const bool fits = problem.width % kPiece == 0 && problem.x_row_bytes % 8 == 0 &&
                    is_aligned(problem.x, 8) && is_aligned(problem.y, 8) &&
                    is_aligned(problem.total, 8) && is_aligned(problem.out, 8) &&
                    is_aligned(problem.scale, 4 * kPiece) && is_aligned(problem.shift, 4 * kPiece);
  launch("add_layer_norm_kernel",
         fits ? add_layer_norm_kernel<T, kPiece> : add_layer_norm_kernel<T, 1>,
         {static_cast<unsigned>(rows), kThreads}, to_stream(stream), problem);
}

}  // namespace

void add_layer_norm_cuda(const AddLayerNormArgs& args, const AddLayerNormOutputs& outputs,
                         StreamHandle stream) {
  const DeviceGuard guard(outputs.out.device.index);
  Problem problem = {};
  problem.x = args.x.as<const char>();
  problem.y = args.y.data;
  problem.scale = args.scale.as<const float>();
  problem.shift = args.shift.as<const float>();
  problem.total = outputs.total.data;
  problem.out = outputs.out.data;
  problem.x_row_bytes = static_cast<std::size_t>(args.x.shape[1]) * size_of(args.x.dtype);
  problem.width = static_cast<int>(args.y.shape[1]);
  problem.norms = static_cast<int>(args.scale.shape[0]);
  problem.total_after = static_cast<int>(args.total_after);
  problem.eps = args.eps[0];
  problem.second_eps = args.eps[1];
  ZSSEG_DISPATCH_ANY_FLOAT(args.x.dtype, T, run<T>(problem, args.x.shape[0], stream));
}

}  // namespace zsseg
