// Multi-LoRA's second half, which adds h·b to a product that is there. An adapter that one or
// two rows have is read as it is stored: packing it would take longer than the sum.
#pragma once
#include <type_traits>

#include "dots.h"
#include "few.h"
#include "multi.h"

namespace peftops::ISA {
namespace {

// Columns of a piece of a row. An adapter that several rows share stays in a near cache; one
// that a row has alone is read in long stretches.
constexpr int64_t SHARED = 256, ALONE = 2048;
thread_local Scratch t_shared;  // of each thread of a team

// How sums h·b become elements of y, for rows of one slot. It is passed by value, so that
// nothing is loaded anew after each store.
template <class T, class Given>
struct Finish {
  const Given* y0;
  T *y, *z;                  // z may be null
  const float *gain, *bias;  // null if absent
  vec s;                     // the scale

  // Up to `left` elements from `at` on, of column c.
  PEFTOPS_INLINE void put(vec sum, int64_t at, int64_t c, int64_t left) const {
    vec value = fma(sum, s, load(y0 + at, left));
    if (z) store(z + at, value, left);
    if (gain) value *= load(gain + c, left);
    if (bias) value += load(bias + c, left);
    store(y + at, value, left);
  }
};

// y = gain ⊙ z + bias with z = y0 + s · h·b and the adapter of each row.
template <class T>
struct Expand {
  const Route& route;
  Tensor y, z;  // (m, n); z may be absent
  Tensor y0;    // (m, n), in fp32 or T; if it is y, rows without rank-rows stay as they are
  int64_t n;    // columns
  int64_t ldo, ldp;  // from row to row of y, z and y0, and of b
  const float* h;    // (m, ldh)
  int64_t ldh;
  Tensor b;           // (R, n)
  const Adapter* of;  // by slot
  const float* bias;  // (n,), or null

  // out += Σ h[e] · b[e] over W rows b, which lie together. next: rows that come after them
  template <int W, class From>
  static void add_ranks(const float* h, const From* b, const From* next, int64_t ld,
                        int64_t count, float* out) {
    vec factor[W];
    for (int e = 0; e < W; ++e) factor[e] = all(h[e]);
    for (int64_t c = 0; c < count; c += LANES) {
      fetch_rows<W>(next + c, ld);
      vec sum = load(out + c);
#pragma GCC unroll 4
      for (int e = 0; e < W; ++e)
        sum = fma(factor[e], load_as<T>(b + e * ld + c, count - c), sum);
      store(out + c, sum);
    }
  }

  // Adds h·b of a row to sums, from column c on. Long sums are cut into sums of CHAIN terms.
  void add_alone(int64_t row, const Adapter& own, int64_t c, int64_t count, float* sums) const {
    const int64_t* lines = route.lines + own.first;
    float part[ALONE];
    with_operand<T>(b, [&](const auto* pool) {
      for (int64_t done = 0; done < own.r; done += CHAIN) {
        float* out = done ? part : sums;
        memset(out, 0, size_t(pad16(count)) * sizeof(float));
        by_rows<4, 1>(done, min(own.r, done + CHAIN), [&](int64_t j, auto together) {
          constexpr int W = decltype(together)::value;
          const int64_t next = lines[min(j + W, route.r - own.first - 1)];
          add_ranks<W>(h + row * ldh + j, pool + lines[j] * ldp + c, pool + next * ldp + c, ldp,
                       count, out);
        });
        for (int64_t v = 0; done && v < count; v += LANES)
          store(sums + v, load(sums + v) + load(part + v));
      }
    });
  }

  // Calls f with a Finish for rows of an adapter.
  template <class F>
  void finishing(const Adapter& own, F f) const {
    with_operand<T>(y0, [&](const auto* given) {
      f(Finish<T, std::remove_const_t<std::remove_reference_t<decltype(*given)>>>{
          given, as<T>(y), as<T>(z), own.gain, bias, all(own.s)});
    });
  }

  // The columns from begin to end of rows that share an adapter. Its rank-rows are laid side by
  // side first: in the pool they may be whole pages of memory apart, and then a near cache
  // holds only a few of them.
  void expand_shared(const Run& run, int64_t begin, int64_t end) const {
    const int64_t count = run.end - run.begin, *row = route.order + run.begin;
    float* wide = t_shared.get<float>(run.r * (SHARED + count));
    float* own_h = wide + run.r * SHARED;
    for (int64_t e = 0; e < count; ++e)
      widen_row(h + row[e] * ldh, run.r, nullptr, own_h + e * run.r);
    finishing(of[run.slot], [&](auto finish) {
      for (int64_t c = begin; c < end; c += SHARED) {
        const int64_t some = min(SHARED, end - c);
        with_operand<T>(b, [&](const auto* pool) {
          constexpr int64_t line = 64 / sizeof *pool;
          const bool last = c + SHARED >= end;
          for (int64_t j = 0; j < run.r; ++j) {
            const int64_t* lines = route.lines + run.first + j;
            const int64_t ahead = min(run.r, route.r - 1 - run.first - j);
            const auto* next =
                pool + lines[last ? ahead : 0] * ldp + (last ? begin : c + SHARED);
            for (int64_t i = 0; i < SHARED; i += line) __builtin_prefetch(next + i, 0, 2);
            widen_row(pool + *lines * ldp + c, some, nullptr, wide + j * SHARED);
          }
        });
        for (int64_t v = 0; v < some; v += WIDTH)
          by_rows<ROWS, 4, 2, 1>(0, count, [&](int64_t i, auto rows) {
            add_rows<decltype(rows)::value>(finish, own_h + i * run.r, run.r, wide + v, row + i,
                                            c + v, some - v);
          });
      }
    });
  }

  // WIDTH columns of MR rows, from column c on. Long sums are cut into sums of CHAIN terms.
  //   own_h: (MR, r); w: (r, SHARED); row: the rows' numbers; left: columns that there are
  template <int MR, class F>
  PEFTOPS_INLINE void add_rows(F finish, const float* own_h, int64_t r, const float* w,
                               const int64_t* row, int64_t c, int64_t left) const {
    vec acc[MR][VECTORS];
    clear(acc);
    multiply(own_h, r, min(CHAIN, r), w, SHARED, acc);
    for (int64_t done = CHAIN; done < r; done += CHAIN) {
      vec part[MR][VECTORS];
      clear(part);
      multiply(own_h + done, r, min(CHAIN, r - done), w + done * SHARED, SHARED, part);
      for (int e = 0; e < MR; ++e)
        for (int v = 0; v < VECTORS; ++v) acc[e][v] += part[e][v];
    }
#pragma GCC unroll 8
    for (int e = 0; e < MR; ++e)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t first = LANES * v;
        if (left >= WIDTH)
          finish.put(acc[e][v], row[e] * ldo + c + first, c + first, LANES);
        else
          finish.put(acc[e][v], row[e] * ldo + c + first, c + first, left - first);
      }
  }

  // The same of one row after the other.
  void expand_alone(const Run& run, int64_t begin, int64_t end) const {
    const Adapter& own = of[run.slot];
    float sums[ALONE] = {};
    finishing(own, [&](auto finish) {
      for (int64_t i = run.begin; i < run.end; ++i)
        for (int64_t c = begin; c < end; c += ALONE) {
          const int64_t some = min(ALONE, end - c), at = route.order[i] * ldo + c;
          if (own.r) add_alone(route.order[i], own, c, some, sums);
          int64_t v = 0;
          for (; v + LANES <= some; v += LANES)
            finish.put(load(sums + v), at + v, c + v, LANES);
          if (v < some) finish.put(load(sums + v), at + v, c + v, some - v);
        }
    });
  }

  void expand_all() const {
    const int64_t work = 4 * route.m * n + route.r * n;
    const bool in_place = y0.data == y.data;
    by_columns(n, threads_for(work), [&](int64_t begin, int64_t end) {
      for (const Run* run = route.runs; run < route.runs + route.count; ++run) {
        if (in_place && !run->r) continue;
        if (run->r && run->end - run->begin > 2)
          expand_shared(*run, begin, end);
        else
          expand_alone(*run, begin, end);
      }
    });
  }
};

}  // namespace
}  // namespace peftops::ISA
