// The product of few rows of x with a weight, which is read once, as it lies: each of its
// elements is multiplied with all rows of x, which lie side by side.
#pragma once
#include "vec.h"

namespace peftops::ISA {
namespace {

// Vectors of sums that fill the registers, beside what they are made of.
#if defined(__AVX512BW__)
constexpr int SUMS = 24;
#elif defined(__AVX2__)
constexpr int SUMS = 12;
#else
constexpr int SUMS = 8;
#endif
constexpr int WIDEST = 4;  // vectors of rows of x that meet a weight at once
// Rows of the weight whose sums are stored together. It is a multiple of LANES, and of the
// rows that meet up to two vectors at once.
constexpr int64_t TALL = LANES == 4 ? 8 : 3 * LANES;

// Calls f(begin, end) in each thread of a team that shares n columns; begin is a multiple of
// LANES.
template <class F>
void by_columns(int64_t n, int threads, F f) {
  const int64_t squares = ceil_div(n, LANES);
  Team team;
#pragma omp parallel num_threads(threads)
  team.run([&] {
    const int64_t all = omp_get_num_threads(), id = omp_get_thread_num();
    f(squares * id / all * LANES, min(n, squares * (id + 1) / all * LANES));
  });
  team.finish();
}

// Rows of x (rows, k), side by side: (k, ld), with zeros beyond the last one.
template <class T>
void lay_side_by_side(const T* x, int64_t rows, int64_t k, float* out, int64_t ld) {
  for (int64_t i = 0; i < ld; i += LANES)
    transpose_into<T>(x + i * k, k, rows - i, k, out + i, ld);
}

// Rows of a dense weight, rounded to T if they are wider.
template <class T, class From>
struct DenseRows {
  const From* at;
  int64_t ld;

  // Fetches rows ahead. With as many rows as there are sums, it was slower.
  template <int W>
  PEFTOPS_INLINE void prefetch_rows(const From* from, int64_t count) const {
    constexpr int64_t line = 64 / sizeof(From);
    for (int64_t e = 0; W < SUMS && e < W; ++e)
      for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + e * ld + i);
  }

  // Some columns of W rows as floats. ldw receives the distance from row to row.
  //   memory: for W · CHAIN floats
  template <int W>
  PEFTOPS_INLINE const float* floats(int64_t row, int64_t c, int64_t count, float* memory,
                                     int64_t& ldw) const {
    const From* from = at + row * ld + c;
    if constexpr (sizeof(From) == sizeof(float) && sizeof(T) == sizeof(float)) {
      ldw = ld;
      prefetch_rows<W>(from + W * ld, count);
      return from;
    }
    ldw = CHAIN;
    for (int64_t e = 0; e < W; ++e)
      for (int64_t i = 0; i < count; i += LANES)
        store(memory + e * CHAIN + i, load_as<T>(from + e * ld + i, count - i));
    return memory;
  }
};

template <class T, class From>
DenseRows<T, From> dense_rows(const From* at, int64_t ld) {
  return {at, ld};
}

// out (W, LANES · V) = w · x, or += if `add`, for W rows of the weight from `row` on. Long sums
// are cut into sums of CHAIN terms.
//   x: (k, LANES · V), rows side by side
template <int W, int V, class Weight>
void add_side_by_side(const Weight& weight, int64_t row, const float* x, int64_t ldx, int64_t k,
                      bool add, float* out, int64_t ldo) {
  float memory[W * CHAIN];
  for (int64_t c = 0; c < max(k, 1); c += CHAIN) {  // without k, zeros are written
    const int64_t count = min(CHAIN, k - c);
    int64_t ldw = 0;
    const float* w = weight.template floats<W>(row, c, count, memory, ldw);
    vec acc[W][V];
    clear(acc);
    multiply(w, ldw, count, x + c * ldx, ldx, acc);
#pragma GCC unroll 24
    for (int e = 0; e < W; ++e)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* at = out + e * ldo + LANES * v;
        store(at, add || c ? load(at) + acc[e][v] : acc[e][v]);
      }
  }
}

// out (rows, ld) = w · x, or += if `add`, for rows of the weight from `first` on.
//   x: (k, ld), rows side by side
template <class Weight>
void multiply_side_by_side(const Weight& weight, int64_t first, int64_t rows, const float* x,
                           int64_t ld, int64_t k, bool add, float* out) {
  const int64_t vectors = ld / LANES, groups = ceil_div(vectors, WIDEST);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = vectors * group / groups, end = vectors * (group + 1) / groups;
    const auto run = [&](auto wide) {
      constexpr int V = decltype(wide)::value;
      by_rows<SUMS / V, 2, 1>(0, rows, [&](int64_t e, auto tall) {
        add_side_by_side<decltype(tall)::value, V>(weight, first + e, x + begin * LANES, ld, k,
                                                   add, out + e * ld + begin * LANES, ld);
      });
    };
    if (end - begin == 1) run(Count<1>{});
    if (end - begin == 2) run(Count<2>{});
    if (end - begin == 3) run(Count<3>{});
    if (end - begin == 4) run(Count<4>{});
  }
}

}  // namespace
}  // namespace peftops::ISA
