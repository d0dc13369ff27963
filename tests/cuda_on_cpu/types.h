// The types of PTX as C++ types, and operands whose type depends on the instruction.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f16 = _Float16;
using f32 = float;
using f64 = double;
using pred = bool;

struct bf16 {
  u16 bits;
  bf16() = default;
  bf16(float value) {
    const u32 float_bits = std::bit_cast<u32>(value);
    const u32 rounding = 0x7fff + (float_bits >> 16 & 1);
    bits = value != value ? 0x7fff : (float_bits + rounding) >> 16;
  }
  operator float() const { return std::bit_cast<float>(u32(bits) << 16); }
};

template <class T>
struct Two {
  T low;
  T high;
};
using f16x2 = Two<f16>;
using bf16x2 = Two<bf16>;

// The unsigned type of this size.
template <int BYTES>
using Bits = std::tuple_element_t<std::countr_zero(u32(BYTES)), std::tuple<u8, u16, u32, u64>>;

template <class T>
constexpr bool integral = std::is_integral_v<T>;
template <class T>
constexpr bool has_sign = std::is_signed_v<T>;

// The integer type of twice this size and the same sign.
template <class T>
using Wider =
    std::tuple_element_t<2 * std::countr_zero(sizeof(T)) + has_sign<T>,
                         std::tuple<u16, s16, u32, s32, u64, s64, unsigned __int128, __int128>>;

// The bits of an operand. as<T>() reads them as the type that the instruction names.
struct Any {
  u64 bits;
  template <class T>
  Any(T value) : bits(u64(value)) {}
};

template <class T>
T as(Any value) {
  if constexpr (std::is_same_v<T, bool>)
    return value.bits;
  else
    return std::bit_cast<T>(Bits<sizeof(T)>(value.bits));
}

// Writes a value to a register, which may be of another size.
template <class R, class T>
void set(R& target, T value) {
  if constexpr (std::is_same_v<R, bool>)
    target = value != T(0);
  else if constexpr (integral<T>)
    target = R(value);  // extends the sign of a signed value
  else
    target = R(std::bit_cast<Bits<sizeof(T)>>(value));
}

}  // namespace emulator
