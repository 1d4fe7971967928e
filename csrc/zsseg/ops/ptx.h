// The instructions that CUDA C++ has no name for: matrix products of a warp, loads of their
// operands and copies that run behind a thread's back. Each stands beside a twin in C++, which the
// emulated GPU runs. For inclusion in <op>_cuda.cu only.
//
// In the layouts of fragments below, a lane has a group, lane / 4, and a place in it, lane % 4. A
// is [rows, depth], B is given as [columns, depth], so that both operands are rows of numbers that
// lie beside each other; "2 p, 2 p + 1" are the two halves of one register, the lower half first.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k8" and "... mma.m16n8k16".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "zsseg/half.h"

namespace zsseg::ptx {

// sm_75 has neither copies in the background nor matrix units for bfloat16 and tf32.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define ZSSEG_PTX_SM75 1
#else
#define ZSSEG_PTX_SM75 0
#endif

// sums[0], sums[1]: row group,     columns 2 place and 2 place + 1
// sums[2], sums[3]: row group + 8, the same columns
using Sums = float[4];

#if !defined(__CUDACC__)
namespace twin {

inline float from_half(std::uint32_t bits) {
  return half_to_float(Half{static_cast<std::uint16_t>(bits)});
}
inline float from_bfloat16(std::uint32_t bits) {
  return bits_to_float(bits << 16);
}

// The matrix units read the upper 19 bits of a float.
inline float from_tf32(std::uint32_t bits) {
  return bits_to_float(bits & 0xffffe000u);
}

// The `kRegisters` registers of every lane of the warp.
template <int kRegisters>
struct Warp {
  std::uint32_t lane[32][kRegisters];

  explicit Warp(const std::uint32_t (&own)[kRegisters]) {
    for (int first = 0; first < kRegisters; first += 2) {
      const bool pair = first + 1 < kRegisters;
      const std::uint64_t high = pair ? own[first + 1] : 0;
      const std::uint64_t* words =
          cuda_emulation::exchange_all(high << 32 | own[first], __FILE__, __LINE__);
      for (int other = 0; other < 32; ++other) {
        lane[other][first] = static_cast<std::uint32_t>(words[other]);
        if (pair) {
          lane[other][first + 1] = static_cast<std::uint32_t>(words[other] >> 32);
        }
      }
    }
  }
};

// Adds this lane's part of the product of two operands whose registers hold pairs of 16-bit
// numbers: register r of A is row group + 8 (r % 2), depth 8 (r / 2) + 2 place and the next;
// register r of B is column group, the same depths.
template <int kDepth>
inline void add_product_of_pairs(Sums& sums, const std::uint32_t (&a)[kDepth / 4],
                                 const std::uint32_t (&b)[kDepth / 8],
                                 float (*widen)(std::uint32_t)) {
  const Warp<kDepth / 4> rows(a);
  const Warp<kDepth / 8> columns(b);
  const int lane = cuda_emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < kDepth; ++k) {
      const int place = k % 8 / 2, shift = k % 2 * 16;
      const std::uint32_t left = rows.lane[row % 8 * 4 + place][row / 8 + k / 8 * 2];
      const std::uint32_t right = columns.lane[column * 4 + place][k / 8];
      sums[i] += widen(left >> shift & 0xffffu) * widen(right >> shift & 0xffffu);
    }
  }
}

inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b, float (*widen)(std::uint32_t),
                                    std::uint16_t (*round)(float)) {
  const std::uint32_t low = round(widen(a & 0xffffu) * widen(b & 0xffffu));
  return low | static_cast<std::uint32_t>(round(widen(a >> 16) * widen(b >> 16))) << 16;
}

}  // namespace twin
#endif

// A product of 16 rows by 8 columns at depth 8, float16 with sums in float32. From sm_75 on.
//   a[0], a[1]: rows group, group + 8, depths 2 place and 2 place + 1
//   b[0]:       column group, the same depths
__device__ inline void add_product_8(Sums& sums, const std::uint32_t (&a)[2],
                                     const std::uint32_t (&b)[1]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#else
  twin::add_product_of_pairs<8>(sums, a, b, twin::from_half);
#endif
}

// The same at depth 16; on sm_75, two products at depth 8.
//   a[0], a[1]: rows group, group + 8, depths 2 place and 2 place + 1;  a[2], a[3]: depths 8
//   further b[0], b[1]: column group, depths 2 place and 2 place + 1, and 8 further
__device__ inline void add_product_16(Sums& sums, const std::uint32_t (&a)[4],
                                      const std::uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  twin::add_product_of_pairs<16>(sums, a, b, twin::from_half);
#elif ZSSEG_PTX_SM75
  add_product_8(sums, {a[0], a[1]}, {b[0]});
  add_product_8(sums, {a[2], a[3]}, {b[1]});
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same for bfloat16, from sm_80 on.
__device__ inline void add_product_16_bfloat16(Sums& sums, const std::uint32_t (&a)[4],
                                               const std::uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  twin::add_product_of_pairs<16>(sums, a, b, twin::from_bfloat16);
#elif ZSSEG_PTX_SM75
  __trap();  // callers look at ZSSEG_PTX_SM75
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A product of 16 rows by 8 columns at depth 8 of numbers with 10 bits of mantissa and the
// exponents of float32, in the upper 19 bits of a register. From sm_80 on.
//   a[0], a[1]: rows group, group + 8, depth place;  a[2], a[3]: depth place + 4
//   b[0], b[1]: column group, depths place and place + 4
__device__ inline void add_product_8_tf32(Sums& sums, const std::uint32_t (&a)[4],
                                          const std::uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  const twin::Warp<4> rows(a);
  const twin::Warp<2> columns(b);
  const int lane = cuda_emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      sums[i] += twin::from_tf32(rows.lane[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]) *
                 twin::from_tf32(columns.lane[column * 4 + k % 4][k / 4]);
    }
  }
#elif ZSSEG_PTX_SM75
  __trap();  // callers look at ZSSEG_PTX_SM75
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Loads four matrices of 8 rows by 16 bytes from shared memory. Lane i names row i % 8 of matrix
// i / 8, at a multiple of 16 bytes. Afterwards registers[m] holds bytes 4 place to 4 place + 3 of
// row `group` of matrix m: where a product of pairs wants them.
__device__ inline void load_matrices(std::uint32_t (&registers)[4], const void* row) {
#if defined(__CUDACC__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
#else
  cuda_emulation::check_alignment(row, 16, __FILE__, __LINE__);
  const std::uint64_t* rows =
      cuda_emulation::exchange_all(reinterpret_cast<std::uintptr_t>(row), __FILE__, __LINE__);
  const int lane = cuda_emulation::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* from = reinterpret_cast<const char*>(rows[matrix * 8 + lane / 4]) + lane % 4 * 4;
    __builtin_memcpy(&registers[matrix], from, 4);
  }
  cuda_emulation::exchange_all(0, __FILE__, __LINE__);  // nobody goes on before all have read
#endif
}

// The same number, by one instruction.
__device__ inline float widen(float value) {
  return value;
}
__device__ inline float widen(Half value) {
#if defined(__CUDACC__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return half_to_float(value);
#endif
}

__device__ inline float widen(Bfloat16 value) {
  return bfloat16_to_float(value);
}

// The element with the nearest value.
template <typename Element>
__device__ inline Element narrow(float value) {
  if constexpr (std::is_same_v<Element, Half>) {
#if defined(__CUDACC__)
    std::uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return Half{bits};
#else
    return float_to_half(value);
#endif
  } else if constexpr (std::is_same_v<Element, Bfloat16>) {
    return float_to_bfloat16(value);
  } else {
    return value;
  }
}

// Both halves of a register times those of another, each product rounded once.
__device__ inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDACC__)
  std::uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
#else
  return twin::multiply_pairs(a, b, twin::from_half,
                              [](float value) { return float_to_half(value).bits; });
#endif
}

// The same for bfloat16, from sm_80 on: a product and the sum with -0, which changes nothing.
__device__ inline std::uint32_t multiply_pairs_bfloat16(std::uint32_t a, std::uint32_t b) {
#if !defined(__CUDACC__)
  return twin::multiply_pairs(a, b, twin::from_bfloat16,
                              [](float value) { return float_to_bfloat16(value).bits; });
#elif ZSSEG_PTX_SM75
  __trap();  // callers look at ZSSEG_PTX_SM75
  return 0;
#else
  std::uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
#endif
}

// Copies 16 bytes from global to shared memory, both at multiples of 16 bytes, or writes zeros
// where `inside` is false; `from` is not read then. Once wait_for_copies says so, this thread sees
// them; after a barrier then, its block does. On sm_75, a load and a store.
__device__ inline void copy_16_bytes(void* to_shared, const void* from, bool inside) {
#if !defined(__CUDACC__)
  cuda_emulation::copy_later(to_shared, inside ? from : nullptr, __FILE__, __LINE__);
#elif ZSSEG_PTX_SM75
  *static_cast<uint4*>(to_shared) =
      inside ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#else
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of this thread's copies; it may be empty.
__device__ inline void end_copy_group() {
#if !defined(__CUDACC__)
  cuda_emulation::end_copy_group();
#elif !ZSSEG_PTX_SM75
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the newest `kLeft`.
template <int kLeft>
__device__ inline void wait_for_copies() {
#if !defined(__CUDACC__)
  cuda_emulation::wait_for_copies(kLeft);
#elif !ZSSEG_PTX_SM75
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace zsseg::ptx
