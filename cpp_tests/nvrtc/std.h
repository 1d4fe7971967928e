// The little of the standard library that the .cu files use, for NVRTC, which has none of it. Every
// header of that library is this one here.
#pragma once

#define INFINITY (__int_as_float(0x7f800000))
#define NAN (__int_as_float(0x7fc00000))
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f

namespace std {

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using size_t = decltype(sizeof 0);
using uintptr_t = unsigned long;

template <typename T, size_t kCount>
struct array {
  T values[kCount];
  constexpr const T& operator[](size_t index) const { return values[index]; }
  constexpr T& operator[](size_t index) { return values[index]; }
  constexpr const T* begin() const { return values; }
  constexpr const T* data() const { return values; }
};

template <typename T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static float infinity() { return INFINITY; }
};

template <typename T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <typename T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}
template <typename T>
constexpr const T& clamp(const T& value, const T& low, const T& high) {
  return value < low ? low : high < value ? high : value;
}
template <typename From, typename To>
To* copy_n(const From* from, size_t count, To* to) {
  for (size_t index = 0; index < count; ++index) {
    to[index] = from[index];
  }
  return to + count;
}

template <typename A, typename B>
constexpr bool is_same_v = false;
template <typename A>
constexpr bool is_same_v<A, A> = true;
template <bool kFirst, typename A, typename B>
struct conditional {
  using type = A;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool kFirst, typename A, typename B>
using conditional_t = typename conditional<kFirst, A, B>::type;

}  // namespace std
