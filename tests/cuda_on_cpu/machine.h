// What translated kernels call: arithmetic on registers, loads and stores in three memory
// spaces, and what a thread does together with others.
//
// Global addresses are host pointers. Shared memory lies below 4 GiB, so that its 32-bit
// addresses are host pointers, too. As generic addresses they are shifted by a constant. So an
// address of one of the three sorts is never mistaken for one of another.
//
// This file is compiled with the sanitizers, which see a kernel's own loads and stores.
// machine.cpp and hopper.cpp, where threads meet, are compiled without.
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

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using b8 = u8; using b16 = u16; using b32 = u32; using b64 = u64;
using f16 = _Float16; using f32 = float; using f64 = double; using pred = bool;

struct bf16 {
  u16 bits;
  bf16() = default;
  bf16(float value) {
    const u32 whole = std::bit_cast<u32>(value);
    bits = value != value ? 0x7fff : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(u32(bits) << 16); }
};
template <class T> struct Two { T low, high; };
using f16x2 = Two<f16>;
using bf16x2 = Two<bf16>;

template <int BYTES> using Bits =
    std::tuple_element_t<std::countr_zero(u32(BYTES)), std::tuple<u8, u16, u32, u64>>;
template <class T> constexpr bool integral = std::is_integral_v<T>;
template <class T> constexpr bool has_sign = std::is_signed_v<T>;
template <class T> using Wider =
    std::tuple_element_t<2 * std::countr_zero(sizeof(T)) + has_sign<T>,
                         std::tuple<u16, s16, u32, s32, u64, s64, unsigned __int128, __int128>>;

// What an operand holds. The instruction says as which type it is read.
struct Any {
  u64 bits;
  template <class T> Any(T value) : bits(u64(value)) {}
};
template <class T> T as(Any value) {
  if constexpr (std::is_same_v<T, bool>) return value.bits;
  else return std::bit_cast<T>(Bits<sizeof(T)>(value.bits));
}
template <class R, class T> void set(R& target, T value) {
  if constexpr (std::is_same_v<R, bool>) target = value != T(0);
  else if constexpr (integral<T>) target = R(value);  // a signed value brings its sign along
  else target = R(std::bit_cast<Bits<sizeof(T)>>(value));
}

struct Dim { u32 x, y, z; };
struct Thread { Dim tid; u32 lane, warp; };     // its place in the block and in the warp
struct Launch { Dim blocks, threads, block; };  // sizes of grid and block; the block that runs
struct Shared { u32* at; u32 align, size; };    // a variable; at: receives its address
struct Parameter { u32 at, size; };             // bytes from the first parameter, and its bytes
struct Kernel {
  void (*body)(const unsigned char* parameters);  // what one thread does
  std::vector<Shared> shared;
  std::vector<Parameter> parameters;
  bool asynchronous;  // has mbarriers, tiles or products of warpgroups
};
struct Schedule {
  std::string order = "forward";  // of threads and blocks: forward, reverse, or random
  // Whether cp.async arrives only when it is waited for, and a launch that may overlap does so;
  // else both happen at once.
  bool lazy = true;
};
struct Counts {
  u64 launches, blocks, mma, wgmma;
  u64 matrices;   // that ldmatrix has loaded
  u64 conflicts;  // replays of ldmatrix because of shared memory's banks
};
extern Thread* self;
extern Launch launch;
extern u64 dynamic_shared;
extern Schedule schedule;
extern int shared_limit;  // bytes a block may have
extern Counts counts;

std::map<std::string, Kernel>& kernels();  // by their names
// Runs a launch. Returns an empty string, or what went wrong. `before` is called when a thread
// first waits for the launch before this one. dynamic: bytes of dynamic shared memory
std::string run(const Kernel& kernel, Dim blocks, Dim threads, size_t dynamic,
                const std::vector<unsigned char>& parameters,
                std::function<std::string()> before);
std::string finish();  // runs what has been launched and has not run
[[noreturn]] void fail(const std::string& what);

// Arithmetic: op_<instruction> and compare_<comparison>. The macros declare one each; f is the
// result in terms of x, y, z (the operands), n (how far to shift) and all (n is past the
// width).

template <class T> T fused(T x, T y, T z) {
  if constexpr (sizeof(T) == 2) return T(std::fma(double(x), double(y), double(z)));
  else return std::fma(x, y, z);
}
template <class T, class F> T each(F f, Any a, Any b, Any c) {
  if constexpr (std::is_same_v<T, f16x2> || std::is_same_v<T, bf16x2>) {
    const T x = as<T>(a), y = as<T>(b), z = as<T>(c);
    return {f(x.low, y.low, z.low), f(x.high, y.high, z.high)};
  } else if constexpr (integral<T>) {  // without a sign, since that may overflow
    return T(f(as<Bits<sizeof(T)>>(a), as<Bits<sizeof(T)>>(b), as<Bits<sizeof(T)>>(c)));
  } else {
    return T(f(as<T>(a), as<T>(b), as<T>(c)));
  }
}
template <class D> D rounded(double v) {  // saturates where D is whole
  if constexpr (!integral<D>) return D(v);
  const double least(std::numeric_limits<D>::min()), most(std::numeric_limits<D>::max());
  return v != v ? D(0) : D(std::clamp(v, least, most));
}

#define EACH(name, f)                                                                      \
  template <class T> T op_##name(Any a, Any b, Any c = 0) {                                \
    return each<T>([](auto x, auto y, auto z) -> decltype(x) { (void)z; return f; }, a, b, c); \
  }
#define ONE(name, f) \
  template <class T> auto op_##name(Any a) { const T x = as<T>(a); return f; }
#define TWO(name, f) \
  template <class T> auto op_##name(Any a, Any b) { const T x = as<T>(a), y = as<T>(b); return f; }
#define SHIFT(name, f)                              \
  template <class T> T op_##name(Any a, Any b) {    \
    const T x = as<T>(a);                           \
    const u32 n = as<u32>(b);                       \
    const bool all = n >= 8 * sizeof(T);            \
    return f;                                       \
  }
#define FUNNEL(name, f)                                       \
  template <class> u32 op_shf_##name(Any a, Any b, Any c) {   \
    const u64 x = u64(as<u32>(b)) << 32 | as<u32>(a);         \
    const u32 n = as<u32>(c);                                 \
    return f;                                                 \
  }
#define ROUNDING(name, f) \
  template <class D, class S> D op_cvt_##name(Any a) { return rounded<D>(f(double(as<S>(a)))); }
#define COMPARE(name, f)                                \
  template <class T> bool compare_##name(Any a, Any b) { \
    const T x = as<T>(a), y = as<T>(b);                 \
    return f;                                           \
  }
#define COMPARE_BOTH(name, f) \
  COMPARE(name, (f) && x == x && y == y) COMPARE(name##u, (f) || x != x || y != y)
EACH(add, x + y) EACH(sub, x - y) EACH(mul, x * y) EACH(mul_lo, x * y) EACH(mad_lo, x * y + z)
EACH(fma, fused(x, y, z)) EACH(and, x & y) EACH(or, x | y) EACH(xor, x ^ y)
ONE(not, (std::is_same_v<T, bool> ? T(!x) : T(~x))) ONE(neg, T(-x)) ONE(abs, T(std::abs(x)))
ONE(sqrt, std::sqrt(x))
ONE(rcp, 1 / x) ONE(rsqrt, 1 / std::sqrt(x)) ONE(ex2, std::exp2(x)) ONE(lg2, std::log2(x))
ONE(popc, u32(std::popcount(x))) ONE(clz, u32(std::countl_zero(x)))
TWO(div, T(x / y)) TWO(rem, T(x % y)) TWO(mul_wide, Wider<T>(Wider<T>(x) * y))
TWO(mul_hi, T(Wider<T>(x) * Wider<T>(y) >> 8 * sizeof(T))) TWO(copysign, std::copysign(y, x))
TWO(min, (y != y || x < y ? x : y)) TWO(max, (y != y || x > y ? x : y))
SHIFT(shl, all ? T(0) : T(x << n)) SHIFT(shr, all ? T(has_sign<T> && x < 0 ? -1 : 0) : T(x >> n))
FUNNEL(l_wrap, x << (n & 31) >> 32) FUNNEL(r_wrap, x >> (n & 31))
FUNNEL(l_clamp, x << std::min(n, 32u) >> 32) FUNNEL(r_clamp, x >> std::min(n, 32u))
ROUNDING(rzi, std::trunc) ROUNDING(rni, std::nearbyint)
ROUNDING(rmi, std::floor) ROUNDING(rpi, std::ceil)
COMPARE_BOTH(eq, x == y) COMPARE_BOTH(ne, x != y) COMPARE_BOTH(lt, x < y)
COMPARE_BOTH(le, x <= y) COMPARE_BOTH(gt, x > y) COMPARE_BOTH(ge, x >= y)
COMPARE(lo, x < y) COMPARE(ls, x <= y) COMPARE(hi, x > y) COMPARE(hs, x >= y)
COMPARE(nan, x != x || y != y) COMPARE(num, x == x && y == y)
template <class T> auto op_mad_wide(Any a, Any b, Any c) {
  return Wider<T>(u64(op_mul_wide<T>(a, b)) + c.bits);
}
template <class T> T op_selp(Any a, Any b, Any p) { return as<bool>(p) ? as<T>(a) : as<T>(b); }
template <class D, class S> D op_cvt(Any a) {
  return D(std::conditional_t<std::is_same_v<S, bf16>, float, S>(as<S>(a)));
}
template <class D, class S> D op_cvt(Any b, Any a) {
  return {decltype(D::low)(as<S>(a)), decltype(D::low)(as<S>(b))};
}
template <class T> T op_brev(Any a) {
  T result = 0;
  for (u32 i = 0; i < 8 * sizeof(T); ++i)
    result |= T(as<T>(a) >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
inline u64 field(u32 at, u32 count) {  // a mask of `count` bits
  if (at > 63) return 0;
  return (count > 63 ? ~0ull : (1ull << count) - 1) << at;
}
template <class T> T op_bfe(Any a, Any at, Any count) {
  static_assert(!has_sign<T>, "a signed field");
  return T((a.bits & field(as<u8>(at), as<u8>(count))) >> (as<u8>(at) & 63));
}
template <class T> T op_bfi(Any a, Any b, Any at, Any count) {
  const u64 mask = field(as<u8>(at), as<u8>(count));
  return T((b.bits & ~mask) | (a.bits << (as<u8>(at) & 63) & mask));
}
template <class> u32 op_prmt(Any a, Any b, Any select) {
  const u64 bytes = u64(as<u32>(b)) << 32 | as<u32>(a);
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 k = as<u32>(select) >> 4 * i;
    const u8 byte = bytes >> 8 * (k & 7);
    result |= u32(k & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}
template <class> u32 op_lop3(Any a, Any b, Any c, Any table) {
  u64 result = 0;
  for (u32 i = 0; i < 8; ++i)
    if (table.bits >> i & 1)
      result |= (i & 4 ? a.bits : ~a.bits) & (i & 2 ? b.bits : ~b.bits) &
                (i & 1 ? c.bits : ~c.bits);
  return u32(result);
}
template <class T, size_t N> T pack(const Any (&parts)[N]) {
  u64 bits = 0;
  const size_t width = 8 * sizeof(T) / N;
  for (size_t i = 0; i < N; ++i) bits |= (parts[i].bits & field(0, width)) << i * width;
  return T(bits);
}
template <int BITS, int N> std::array<u64, N> unpack(Any whole) {
  std::array<u64, N> parts;
  for (int i = 0; i < N; ++i) parts[i] = whole.bits >> i * BITS & field(0, BITS);
  return parts;
}

// Memory

enum class Space { generic, global, shared, local };

// A host pointer. Fails if the address is of another space, or not a multiple of `size`.
// site: the line of the kernel, here and below
u64 checked(Space space, u64 address, u32 size, const char* site);
u64 from_shared(u64 address);  // a generic address

template <class T, int N> std::array<T, N> load(Space space, u64 address, const char* site) {
  const T* from = reinterpret_cast<const T*>(checked(space, address, N * sizeof(T), site));
  std::array<T, N> values;
  for (int i = 0; i < N; ++i) values[i] = from[i];
  return values;
}
template <class T, int N>
void store(Space space, u64 address, const T (&values)[N], const char* site) {
  T* to = reinterpret_cast<T*>(checked(space, address, N * sizeof(T), site));
  for (int i = 0; i < N; ++i) to[i] = values[i];
}
template <class T, int N> std::array<T, N> parameter(const unsigned char* from) {
  std::array<T, N> values;
  memcpy(values.data(), from, sizeof values);
  return values;
}
template <class T, class F>
T atomic(Space space, u64 address, const char* site, F f) {  // fibers switch only where they wait
  T *at = reinterpret_cast<T*>(checked(space, address, sizeof(T), site)), old;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  T now = T(f(old));
  __atomic_store(at, &now, __ATOMIC_RELAXED);
  return old;
}
#define ATOMIC(name, f)                                                                    \
  template <class T>                                                                       \
  T atomic_##name(Space space, u64 address, const char* site, Any a, Any b = 0) {          \
    const auto next = [x = as<T>(a), y = as<T>(b)](T old) { (void)y; return f; };           \
    return atomic<T>(space, address, site, next);                                          \
  }
ATOMIC(add, old + x) ATOMIC(min, std::min(old, x)) ATOMIC(max, std::max(old, x))
ATOMIC(and, old & x) ATOMIC(or, old | x)
ATOMIC(exch, x) ATOMIC(cas, old == x ? y : old)

// Of cp.async. filled: bytes that are read; the others up to size become zero
struct Copy { unsigned char* to; const unsigned char* from; u32 size, filled; };
bool postponed(Copy copy);  // false: it is to be performed now
void commit_copies();
bool due_copy(u32 groups_left, Copy& copy);  // the next to perform; false if there is none

inline void perform(Copy copy) {
  for (u32 i = 0; i < copy.size; ++i) copy.to[i] = i < copy.filled ? copy.from[i] : 0;
}
inline void copy_later(u32 size, u64 to, u64 from, Any filled, const char* site) {
  const u32 bytes = as<u32>(filled);
  if (bytes > size) fail(std::string("cp.async reads more than it writes at ") + site);
  const u64 source = bytes ? checked(Space::global, from, size, site) : 0;
  const Copy copy{reinterpret_cast<unsigned char*>(checked(Space::shared, to, size, site)),
                  reinterpret_cast<unsigned char*>(source), size, bytes};
  if (!postponed(copy)) perform(copy);
}
inline void wait_copies(u32 groups_left) {
  for (Copy copy; due_copy(groups_left, copy);) perform(copy);
}

// Threads together

void sync_block(Any barrier, Any threads, const char* site);  // 0 threads: all
void arrive_block(Any barrier, Any threads, const char* site);
void sync_warp(Any mask, const char* site);
void wait_for_launch_before();
// What every lane of the mask brings; 0 outside of it.
std::array<u64, 32> gather(Any mask, u64 value, const char* site);
// {value, whether it is of another lane}. mode: up, down, butterfly or index, its first letter
std::array<u64, 2> shuffle(char mode, Any value, Any lane, Any clamp, Any mask,
                           const char* site);
// mma. brain: of bfloat16, else of half
std::array<f32, 4> multiply(bool brain, const Any (&a)[4], const Any (&b)[2], const Any (&c)[4],
                            const char* site);
// ldmatrix. row: what this lane has read at address
void transpose_matrices(int count, bool turned, u64 address, const u16* row, u32* out,
                        const char* site);

inline u32 vote_ballot(Any value, Any mask, const char* site) {
  u32 votes = 0;
  const auto values = gather(mask, as<bool>(value), site);
  for (int i = 0; i < 32; ++i) votes |= u32(values[i]) << i;
  return votes;
}
inline bool vote_any(Any value, Any mask, const char* site) {
  return vote_ballot(value, mask, site);
}
inline bool vote_all(Any value, Any mask, const char* site) {
  return !vote_ballot(!as<bool>(value), mask, site);
}

template <class T, class F> T reduce(Any value, Any mask, const char* site, F f) {
  const auto values = gather(mask, value.bits, site);
  T result = as<T>(value);
  for (u32 i = 0; i < 32; ++i)
    if (mask.bits >> i & 1 && i != self->lane) result = f(result, as<T>(values[i]));
  return result;
}
#define REDUCE(name, f)                                                          \
  template <class T> T reduce_##name(Any value, Any mask, const char* site) {    \
    return reduce<T>(value, mask, site, [](T a, T b) { return T(f); });          \
  }
REDUCE(add, a + b) REDUCE(min, std::min(a, b)) REDUCE(max, std::max(a, b))
REDUCE(and, a & b) REDUCE(or, a | b)

template <int COUNT, bool TURNED>
std::array<u32, COUNT> load_matrices(u64 address, const char* site) {
  // Rows are read here, where a sanitizer sees it. Lanes without a row of their own read none.
  std::array<u16, 8> row{};
  if (self->lane < 8 * COUNT) row = load<u16, 8>(Space::shared, address, site);
  std::array<u32, COUNT> out;
  transpose_matrices(COUNT, TURNED, address, row.data(), out.data(), site);
  return out;
}

#include "hopper.h"

}  // namespace emulator
