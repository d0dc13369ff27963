// Dot products of rows of x with rows of a pool of adapters, which is read as it is stored.
#pragma once
#include "vec.h"

namespace peftops::ISA {
namespace {

// acc[e][i] += w[e] · x[i] lane by lane, for up to LANES columns from c on. w is rounded to T
// if it is wider.
template <class T, int W, int X, class From>
PEFTOPS_INLINE void add_lanes(const From* const (&w)[W], const float* const (&x)[X], int64_t c,
                              int64_t count, vec (&acc)[W][X]) {
  vec t_w[W];
#pragma GCC unroll 4
  for (int e = 0; e < W; ++e) t_w[e] = load_as<T>(w[e] + c, count);
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
    const vec t_x = load(x[i] + c, count);
#pragma GCC unroll 4
    for (int e = 0; e < W; ++e) acc[e][i] = fma(t_w[e], t_x, acc[e][i]);
  }
}

// Fetches the memory lines of LANES elements of W rows. Streams of a few pages of memory each
// are too short for the CPU to foresee.
template <int W, class From>
PEFTOPS_INLINE void fetch_rows(const From* from, int64_t ld) {
#pragma GCC unroll 4
  for (int e = 0; e < W; ++e) __builtin_prefetch(from + e * ld, 0, 2);
}

// Rows of a weight whose sums with X rows of x fit into the registers.
template <int X>
constexpr int BESIDE = X > 2 ? VECTORS : 4;

// out[i · ldo + e] = w[e]·x[i] over k columns, or += if `add`. It is not inlined, so that its
// pointers stay in registers.
//   next: W rows of the weight that are fetched for a later call, if FETCH
template <class T, int W, int X, bool FETCH, class From>
__attribute__((noinline)) void put_dots(const From* w, int64_t ldw, const float* x, int64_t ldx,
                                        int64_t k, bool add, float* out, int64_t ldo,
                                        const From* next) {
  const From* w_row[W];
  const float* x_row[X];
  for (int e = 0; e < W; ++e) w_row[e] = w + e * ldw;
  for (int i = 0; i < X; ++i) x_row[i] = x + i * ldx;
  vec acc[W][X];
  clear(acc);
  int64_t c = 0;
  for (; c + LANES <= k; c += LANES) {
    if (FETCH) fetch_rows<W>(next + c, ldw);
    add_lanes<T>(w_row, x_row, c, LANES, acc);
  }
  if (c < k) add_lanes<T>(w_row, x_row, c, k - c, acc);
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i)
#pragma GCC unroll 4
    for (int e = 0; e < W; ++e) {
      float* at = out + i * ldo + e;
      *at = (add ? *at : 0) + sum(acc[e][i]);
    }
}

// out (rows, ≥ r) = x (rows, k) · wᵀ for some rows w of a pool, rounded to T. The columns are
// cut into parts that stay in the nearest cache.
//   lines: (known ≥ r,) which rows of the pool, and of those that come next; four of them lie
//     together, from the first on
template <class T, class From>
void dot_rows(const From* pool, int64_t k, const int64_t* lines, int64_t r, int64_t known,
              const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo) {
  constexpr int64_t step = CHAIN * LANES;        // so that each lane adds CHAIN terms
  for (int64_t c = 0; c < max(k, 1); c += step)  // without k, zeros are written
    by_rows<ROWS, 4, 2, 1>(0, rows, [&](int64_t i, auto count) {
      constexpr int X = decltype(count)::value;
      by_rows<BESIDE<X>, 1>(0, r, [&](int64_t j, auto beside) {
        constexpr int W = decltype(beside)::value;
        put_dots<T, W, X, true>(pool + lines[j] * k + c, k, x + i * ldx + c, ldx,
                                min(step, k - c), c > 0, out + i * ldo + j, ldo,
                                pool + lines[min(j + W, known - 1)] * k + c);
      });
    });
}

}  // namespace
}  // namespace peftops::ISA
