// The twins of the warp's matrix instructions follow the PTX ISA's written definition, and copies
// that nobody waited for show.
#include "zsseg/ops/ptx.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "zsseg/cuda_launch.h"
#include "zsseg/cuda_raii.h"

namespace {

using zsseg::Half;
using zsseg::launch;
namespace ptx = zsseg::ptx;

constexpr int kWarp = 32;

class Ptx : public testing::Test {
 protected:
  void SetUp() override { cudaDeviceReset(); }
  void TearDown() override { cudaDeviceReset(); }
};

template <typename T>
T* on_device(const std::vector<T>& values) {
  void* pointer = nullptr;
  ZSSEG_CUDA_CHECK(cudaMalloc(&pointer, values.size() * sizeof(T)));
  ZSSEG_CUDA_CHECK(cudaMemcpyAsync(pointer, values.data(), values.size() * sizeof(T),
                                   cudaMemcpyHostToDevice, nullptr));
  ZSSEG_CUDA_CHECK(cudaStreamSynchronize(nullptr));
  return static_cast<T*>(pointer);
}

template <typename T>
std::vector<T> fetch(const T* from, std::size_t count) {
  std::vector<T> host(count);
  ZSSEG_CUDA_CHECK(
      cudaMemcpyAsync(host.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, nullptr));
  return host;
}

// ---- the definition --------------------------------------------------------------------------
// In the ISA's words: groupID = %laneid >> 2, threadID_in_group = %laneid % 4; a_i, b_i and c_i are
// a lane's elements in the order of its registers, the lower half first.
struct Place {
  int row, column;
};

// .f16 and .bf16; m16n8k8 has i from 0 to 3 in A and to 1 in B.
Place pair_of_a(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 || (4 <= i && i < 6) ? group : group + 8, thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Place pair_of_b(int lane, int i) {
  return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2};
}
// .tf32, m16n8k8
Place tf32_of_a(int lane, int i) {
  return {(lane >> 2) + (i == 1 || i == 3 ? 8 : 0), lane % 4 + (i >= 2 ? 4 : 0)};
}
Place tf32_of_b(int lane, int i) {
  return {lane % 4 + (i == 1 ? 4 : 0), lane >> 2};
}
Place place_of_sum(int lane, int i) {
  return {(lane >> 2) + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)};
}

// Small whole numbers, which every type holds and whose sums are exact.
float left_value(int row, int k) {
  return static_cast<float>((row * 7 + k * 3) % 11 - 5);
}
float right_value(int k, int column) {
  return static_cast<float>((k * 5 + column * 2) % 9 - 4);
}
float start_value(int row, int column) {
  return static_cast<float>(100 * row + column);
}

enum class Kind { half8, half16, bfloat16, tf32 };

std::uint32_t encoded(Kind kind, float value) {
  if (kind == Kind::bfloat16) {
    return zsseg::float_to_bits(value) >> 16;
  }
  // The matrix units do not look at the lowest bits.
  return kind == Kind::tf32 ? zsseg::float_to_bits(value) | 0x1fffu
                            : zsseg::float_to_half(value).bits;
}

template <int kRegisters>
std::vector<std::uint32_t> fragments(Kind kind, Place (*place)(int, int), bool is_left) {
  const int in_register = kind == Kind::tf32 ? 1 : 2;
  std::vector<std::uint32_t> registers(kWarp * kRegisters, 0);
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < kRegisters * in_register; ++i) {
      const Place at = place(lane, i);
      const float value = is_left ? left_value(at.row, at.column) : right_value(at.row, at.column);
      registers[static_cast<std::size_t>(lane * kRegisters + i / in_register)] |=
          encoded(kind, value) << (i % in_register * 16);
    }
  }
  return registers;
}

template <Kind kKind, int kA, int kB>
__global__ void product_kernel(const std::uint32_t* a, const std::uint32_t* b, float* sums) {
  std::uint32_t left[kA], right[kB];
  ptx::Sums own;
  for (int i = 0; i < kA; ++i) {
    left[i] = a[threadIdx.x * kA + i];
  }
  for (int i = 0; i < kB; ++i) {
    right[i] = b[threadIdx.x * kB + i];
  }
  for (int i = 0; i < 4; ++i) {
    own[i] = sums[threadIdx.x * 4 + i];
  }
  if constexpr (kKind == Kind::half8) {
    ptx::add_product_8(own, left, right);
  } else if constexpr (kKind == Kind::half16) {
    ptx::add_product_16(own, left, right);
  } else if constexpr (kKind == Kind::bfloat16) {
    ptx::add_product_16_bfloat16(own, left, right);
  } else {
    ptx::add_product_8_tf32(own, left, right);
  }
  for (int i = 0; i < 4; ++i) {
    sums[threadIdx.x * 4 + i] = own[i];
  }
}

template <Kind kKind, int kA, int kB>
void expect_product(int depth, Place (*of_a)(int, int), Place (*of_b)(int, int)) {
  std::vector<float> start;
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = place_of_sum(lane, i);
      start.push_back(start_value(at.row, at.column));
    }
  }
  const auto* a = on_device(fragments<kA>(kKind, of_a, true));
  const auto* b = on_device(fragments<kB>(kKind, of_b, false));
  float* sums = on_device(start);
  launch("product_kernel", product_kernel<kKind, kA, kB>, {1, kWarp}, nullptr, a, b, sums);
  const std::vector<float> found = fetch(sums, start.size());
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = place_of_sum(lane, i);
      float expected = start_value(at.row, at.column);
      for (int k = 0; k < depth; ++k) {
        expected += left_value(at.row, k) * right_value(k, at.column);
      }
      EXPECT_EQ(found[static_cast<std::size_t>(lane * 4 + i)], expected)
          << "row " << at.row << ", column " << at.column;
    }
  }
}

TEST_F(Ptx, ProductsFollowTheDefinition) {
  expect_product<Kind::half8, 2, 1>(8, pair_of_a, pair_of_b);
  expect_product<Kind::half16, 4, 2>(16, pair_of_a, pair_of_b);
  expect_product<Kind::bfloat16, 4, 2>(16, pair_of_a, pair_of_b);
}

TEST_F(Ptx, ProductsOfFloatsLoseTheLowestBits) {
  expect_product<Kind::tf32, 4, 2>(8, tf32_of_a, tf32_of_b);
}

// A number of either type by its fields: sign, exponent with its bias, fraction.
struct HalfFormat {
  static constexpr int kFraction = 10, kBias = 15, kExponent = 11;
};
struct Bfloat16Format {
  static constexpr int kFraction = 7, kBias = 127, kExponent = 120;
};

template <typename Format>
std::uint32_t bits_of(int number) {
  const int exponent = Format::kExponent + number % 9;
  const int fraction = number * 37 % (1 << Format::kFraction);
  return static_cast<std::uint32_t>(number % 3 == 0 ? 0x8000 : 0) |
         static_cast<std::uint32_t>(exponent << Format::kFraction | fraction);
}

template <typename Format>
double value_of(std::uint32_t bits) {
  const int fraction = static_cast<int>(bits & ((1u << Format::kFraction) - 1));
  const int exponent = static_cast<int>((bits & 0x7fffu) >> Format::kFraction);
  const double size =
      std::ldexp((1 << Format::kFraction) + fraction, exponent - Format::kBias - Format::kFraction);
  return (bits & 0x8000u) != 0 ? -size : size;
}

// With one digit before the binary point and kFraction behind it; ties go to the even neighbour.
template <typename Format>
double rounded(double value) {
  int exponent = 0;
  const double digits = std::ldexp(std::frexp(value, &exponent), Format::kFraction + 1);
  return std::ldexp(std::nearbyint(digits), exponent - Format::kFraction - 1);
}

template <typename Format>
__global__ void pairs_kernel(const std::uint32_t* a, const std::uint32_t* b,
                             std::uint32_t* products) {
  const auto i = threadIdx.x;
  if constexpr (std::is_same_v<Format, HalfFormat>) {
    products[i] = ptx::multiply_pairs(a[i], b[i]);
  } else {
    products[i] = ptx::multiply_pairs_bfloat16(a[i], b[i]);
  }
}

template <typename Format>
void expect_products_of_pairs() {
  constexpr int kCount = 1024;
  std::vector<std::uint32_t> a, b;
  for (int i = 0; i < kCount; ++i) {
    a.push_back(bits_of<Format>(i) | bits_of<Format>(i + 5) << 16);
    b.push_back(bits_of<Format>(7 * i + 1) | bits_of<Format>(3 * i + 2) << 16);
  }
  auto* products = on_device(std::vector<std::uint32_t>(kCount));
  launch("pairs_kernel", pairs_kernel<Format>, {1, kCount}, nullptr,
         static_cast<const std::uint32_t*>(on_device(a)),
         static_cast<const std::uint32_t*>(on_device(b)), products);
  const std::vector<std::uint32_t> found = fetch(products, kCount);
  for (std::size_t i = 0; i < kCount; ++i) {
    for (const int shift : {0, 16}) {
      const double exact =
          value_of<Format>(a[i] >> shift & 0xffffu) * value_of<Format>(b[i] >> shift & 0xffffu);
      EXPECT_EQ(value_of<Format>(found[i] >> shift & 0xffffu), rounded<Format>(exact));
    }
  }
}

TEST_F(Ptx, ProductsOfPairsAreRoundedOnce) {
  expect_products_of_pairs<HalfFormat>();
  expect_products_of_pairs<Bfloat16Format>();
}

// Matrix m, row r, element e holds 64 m + 8 r + e. "Each thread receives the elements of row
// laneid / 4, columns 2 (laneid % 4) and the next", lane i names row i % 8 of matrix i / 8.
__global__ void load_kernel(std::uint32_t* loaded) {  // [32, 4]
  __shared__ std::uint16_t rows[4][8][8];
  for (int i = threadIdx.x; i < 256; i += kWarp) {
    rows[i / 64][i / 8 % 8][i % 8] = static_cast<std::uint16_t>(i);
  }
  __syncthreads();
  std::uint32_t registers[4];
  ptx::load_matrices(registers, rows[threadIdx.x / 8][threadIdx.x % 8]);
  for (int i = 0; i < 4; ++i) {
    loaded[threadIdx.x * 4 + i] = registers[i];
  }
}

TEST_F(Ptx, MatricesAreLoadedAsDefined) {
  auto* loaded = on_device(std::vector<std::uint32_t>(kWarp * 4));
  launch("load_kernel", load_kernel, {1, kWarp}, nullptr, loaded);
  const std::vector<std::uint32_t> found = fetch(loaded, kWarp * 4);
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int first = 64 * matrix + 8 * (lane / 4) + 2 * (lane % 4);
      EXPECT_EQ(found[static_cast<std::size_t>(lane * 4 + matrix)],
                static_cast<std::uint32_t>(first | (first + 1) << 16));
    }
  }
}

// Thread t copies four floats in each of two groups, waits for the first or for both and writes the
// first float of each; the last thread's second group is outside.
__global__ void copy_kernel(const float* from, float* seen, bool for_both) {
  alignas(16) __shared__ float stage[2][kWarp][4];
  const int thread = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    ptx::copy_16_bytes(stage[group][thread], from + 4 * thread, group == 0 || thread < kWarp - 1);
    ptx::end_copy_group();
  }
  if (for_both) {
    ptx::wait_for_copies<0>();
  } else {
    ptx::wait_for_copies<1>();
  }
  for (int group = 0; group < 2; ++group) {
    seen[group * kWarp + thread] = stage[group][thread][0];
  }
}

std::vector<float> rising(int count) {
  std::vector<float> values;
  for (int i = 0; i < count; ++i) {
    values.push_back(static_cast<float>(i));
  }
  return values;
}

TEST_F(Ptx, CopiesThatWereWaitedForAreThere) {
  const auto* from = on_device(rising(4 * kWarp));
  auto* seen = on_device(std::vector<float>(2 * kWarp));
  launch("copy_kernel", copy_kernel, {1, kWarp}, nullptr, from, seen, true);
  const std::vector<float> found = fetch(seen, 2 * kWarp);
  for (int i = 0; i < 2 * kWarp; ++i) {
    EXPECT_EQ(found[static_cast<std::size_t>(i)], i == 2 * kWarp - 1 ? 0.0f : 4 * (i % kWarp));
  }
}

TEST_F(Ptx, CopiesThatNobodyWaitedForShow) {
  const auto* from = on_device(rising(4 * kWarp));
  auto* seen = on_device(std::vector<float>(2 * kWarp));
  launch("copy_kernel", copy_kernel, {1, kWarp}, nullptr, from, seen, false);
  const std::vector<float> found = fetch(seen, 2 * kWarp);
  int missing[2] = {0, 0};
  for (int i = 0; i < 2 * kWarp; ++i) {
    missing[i / kWarp] += std::isnan(found[static_cast<std::size_t>(i)]) ? 1 : 0;
  }
  EXPECT_EQ(missing[0], 0);  // the older group has arrived
  EXPECT_GT(missing[1], 0);
  EXPECT_LT(missing[1], kWarp);  // some copies run early
}

__global__ void skewed_kernel(const float* from) {
  alignas(16) __shared__ float stage[8];
  ptx::copy_16_bytes(stage, from + 1, true);
}

TEST_F(Ptx, CopiesFromOddAddressesAreAFault) {
  launch("skewed_kernel", skewed_kernel, {1, 1}, nullptr,
         static_cast<const float*>(on_device(rising(8))));
  const cudaError_t status = cudaStreamSynchronize(nullptr);
  ASSERT_EQ(status, cudaErrorLaunchFailure);
  EXPECT_NE(std::string(cudaGetErrorString(status)).find("not a multiple of 16 bytes"),
            std::string::npos);
}

}  // namespace
