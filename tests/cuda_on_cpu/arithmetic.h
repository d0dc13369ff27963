// Arithmetic on registers: a function op_<instruction> or compare_<comparison> for each.
//
// A macro declares a function by the expression of its result. The expression may contain
// x, y, z: the operands
// n: by how many bits to shift
// all: whether n is at least the width of the operand
#pragma once
#include "types.h"

namespace emulator {

template <class T>
T fused(T x, T y, T z) {
  if constexpr (sizeof(T) == 2)
    return T(std::fma(double(x), double(y), double(z)));
  else
    return std::fma(x, y, z);
}

// Applies a function to both halves of a pair, or to the whole operands.
template <class T, class F>
T each(F function, Any a, Any b, Any c) {
  if constexpr (std::is_same_v<T, f16x2> || std::is_same_v<T, bf16x2>) {
    const T x = as<T>(a);
    const T y = as<T>(b);
    const T z = as<T>(c);
    return {.low = function(x.low, y.low, z.low), .high = function(x.high, y.high, z.high)};
  } else if constexpr (integral<T>) {  // unsigned, since signed integers must not overflow
    using U = Bits<sizeof(T)>;
    return T(function(as<U>(a), as<U>(b), as<U>(c)));
  } else {
    return T(function(as<T>(a), as<T>(b), as<T>(c)));
  }
}

// A rounded value as a D. An integer saturates, and NaN becomes 0.
template <class D>
D saturated(double value) {
  if constexpr (!integral<D>) return D(value);
  const double least(std::numeric_limits<D>::min());
  const double most(std::numeric_limits<D>::max());
  return value != value ? D(0) : D(std::clamp(value, least, most));
}

#define EACH(name, result)                                           \
  template <class T>                                                 \
  T op_##name(Any a, Any b, Any c = 0) {                             \
    const auto compute = [](auto x, auto y, auto z) -> decltype(x) { \
      (void)z;                                                       \
      return result;                                                 \
    };                                                               \
    return each<T>(compute, a, b, c);                                \
  }
EACH(add, x + y)
EACH(sub, x - y)
EACH(mul, (x * y))
EACH(mul_lo, (x * y))
EACH(mad_lo, (x * y) + z)
EACH(fma, fused(x, y, z))
EACH(and, (x & y))
EACH(or, x | y)
EACH(xor, x ^ y)
#undef EACH

#define ONE(name, result) \
  template <class T>      \
  auto op_##name(Any a) { \
    const T x = as<T>(a); \
    return result;        \
  }
ONE(not, (std::is_same_v<T, bool> ? T(!x) : T(~x)))
ONE(neg, T(-x))
ONE(abs, T(std::abs(x)))
ONE(sqrt, std::sqrt(x))
ONE(rcp, 1 / x)
ONE(rsqrt, 1 / std::sqrt(x))
ONE(ex2, std::exp2(x))
ONE(lg2, std::log2(x))
ONE(popc, u32(std::popcount(x)))
ONE(clz, u32(std::countl_zero(x)))
#undef ONE

#define TWO(name, result)        \
  template <class T>             \
  auto op_##name(Any a, Any b) { \
    const T x = as<T>(a);        \
    const T y = as<T>(b);        \
    return result;               \
  }
TWO(div, T(x / y))
TWO(rem, T(x % y))
TWO(mul_wide, Wider<T>(Wider<T>(x) * y))
TWO(mul_hi, T(Wider<T>(x) * Wider<T>(y) >> 8 * sizeof(T)))
TWO(copysign, std::copysign(y, x))
TWO(min, (y != y || x < y ? x : y))
TWO(max, (y != y || x > y ? x : y))
#undef TWO

#define SHIFT(name, result)              \
  template <class T>                     \
  T op_##name(Any a, Any b) {            \
    const T x = as<T>(a);                \
    const u32 n = as<u32>(b);            \
    const bool all = n >= 8 * sizeof(T); \
    return result;                       \
  }
SHIFT(shl, all ? T(0) : T(x << n))
SHIFT(shr, all ? T(has_sign<T> && x < 0 ? -1 : 0) : T(x >> n))
#undef SHIFT

#define FUNNEL(name, result)                          \
  template <class>                                    \
  u32 op_shf_##name(Any a, Any b, Any c) {            \
    const u64 x = u64(as<u32>(b)) << 32 | as<u32>(a); \
    const u32 n = as<u32>(c);                         \
    return result;                                    \
  }
FUNNEL(l_wrap, x << (n & 31) >> 32)
FUNNEL(r_wrap, x >> (n & 31))
FUNNEL(l_clamp, x << std::min(n, 32u) >> 32)
FUNNEL(r_clamp, x >> std::min(n, 32u))
#undef FUNNEL

#define ROUNDING(name, round)                     \
  template <class D, class S>                     \
  D op_cvt_##name(Any a) {                        \
    return saturated<D>(round(double(as<S>(a)))); \
  }
ROUNDING(rzi, std::trunc)
ROUNDING(rni, std::nearbyint)
ROUNDING(rmi, std::floor)
ROUNDING(rpi, std::ceil)
#undef ROUNDING

#define COMPARE(name, result)         \
  template <class T>                  \
  bool compare_##name(Any a, Any b) { \
    const T x = as<T>(a);             \
    const T y = as<T>(b);             \
    return result;                    \
  }
// Two comparisons: with a NaN the first is false, and the second, whose name ends in u, is
// true.
#define COMPARE_BOTH(name, result)            \
  COMPARE(name, (result) && x == x && y == y) \
  COMPARE(name##u, (result) || x != x || y != y)
COMPARE_BOTH(eq, x == y)
COMPARE_BOTH(ne, x != y)
COMPARE_BOTH(lt, x < y)
COMPARE_BOTH(le, x <= y)
COMPARE_BOTH(gt, x > y)
COMPARE_BOTH(ge, x >= y)
COMPARE(lo, x < y)
COMPARE(ls, x <= y)
COMPARE(hi, x > y)
COMPARE(hs, x >= y)
COMPARE(nan, x != x || y != y)
COMPARE(num, x == x && y == y)
#undef COMPARE_BOTH
#undef COMPARE

template <class T>
auto op_mad_wide(Any a, Any b, Any c) {
  return Wider<T>(u64(op_mul_wide<T>(a, b)) + c.bits);
}

template <class T>
T op_selp(Any a, Any b, Any condition) {
  return as<bool>(condition) ? as<T>(a) : as<T>(b);
}

template <class D, class S>
D op_cvt(Any a) {
  return D(std::conditional_t<std::is_same_v<S, bf16>, float, S>(as<S>(a)));
}

template <class D, class S>
D op_cvt(Any high, Any low) {
  using Half = decltype(D::low);
  return {.low = Half(as<S>(low)), .high = Half(as<S>(high))};
}

template <class T>
T op_brev(Any a) {
  constexpr u32 WIDTH = 8 * sizeof(T);
  T reversed = 0;
  for (u32 i = 0; i < WIDTH; ++i) reversed |= T(as<T>(a) >> i & 1) << (WIDTH - 1 - i);
  return reversed;
}

// A mask of `count` bits, of which the lowest is bit `first`.
inline u64 bit_field(u32 first, u32 count) {
  if (first > 63) return 0;
  return (count > 63 ? ~0ull : (1ull << count) - 1) << first;
}

template <class T>
T op_bfe(Any a, Any first, Any count) {
  static_assert(!has_sign<T>, "a signed field");
  const u64 mask = bit_field(as<u8>(first), as<u8>(count));
  return T((a.bits & mask) >> (as<u8>(first) & 63));
}

template <class T>
T op_bfi(Any a, Any b, Any first, Any count) {
  const u64 mask = bit_field(as<u8>(first), as<u8>(count));
  return T((b.bits & ~mask) | (a.bits << (as<u8>(first) & 63) & mask));
}

template <class>
u32 op_prmt(Any a, Any b, Any selectors) {
  const u64 bytes = u64(as<u32>(b)) << 32 | as<u32>(a);
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 selector = as<u32>(selectors) >> 4 * i;
    const u8 byte = bytes >> 8 * (selector & 7);
    const u8 sign = byte & 128 ? 255 : 0;
    result |= u32(selector & 8 ? sign : byte) << 8 * i;
  }
  return result;
}

template <class>
u32 op_lop3(Any a, Any b, Any c, Any table) {
  u64 result = 0;
  for (u32 i = 0; i < 8; ++i)
    if (table.bits >> i & 1) {
      const u64 from_a = i & 4 ? a.bits : ~a.bits;
      const u64 from_b = i & 2 ? b.bits : ~b.bits;
      const u64 from_c = i & 1 ? c.bits : ~c.bits;
      result |= from_a & from_b & from_c;
    }
  return u32(result);
}

template <class T, size_t N>
T pack(const Any (&elements)[N]) {
  u64 bits = 0;
  const size_t width = 8 * sizeof(T) / N;
  for (size_t i = 0; i < N; ++i) bits |= (elements[i].bits & bit_field(0, width)) << i * width;
  return T(bits);
}

template <int BITS, int N>
std::array<u64, N> unpack(Any vector) {
  std::array<u64, N> elements;
  for (int i = 0; i < N; ++i) elements[i] = vector.bits >> i * BITS & bit_field(0, BITS);
  return elements;
}

}  // namespace emulator
