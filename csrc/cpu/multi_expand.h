// Multi-LoRA's second half for few rows, which adds h·b to a product that is there. The
// adapters are read as they are stored: packing them would take longer than the sum, where each
// row has its own.
#pragma once
#include "few.h"
#include "multi.h"

namespace peftops::ISA {
namespace {

constexpr int64_t EXPANDED = 48;  // rows up to which it is used
// Columns of a piece of a row. An adapter that several rows share stays in a near cache; one
// that a row has alone is read in long stretches.
constexpr int64_t SHARED = 256, ALONE = 2048;

// y = gain ⊙ z + bias with z = y0 + s · h·b and the adapter of each row.
template <class T>
struct Expand {
  const Route& route;
  Tensor y, z;     // (m, n); z may be absent
  Tensor y0;       // (m, n), in fp32 or T
  const float* h;  // (m, ldh)
  int64_t ldh;
  Tensor b;           // (R, n)
  const Adapter* of;  // by slot
  const float* bias;  // (n,), or null

  // out += Σ h[e] · b[e] over W rows b, which lie together.
  template <int W, class From>
  static void add_ranks(const float* h, const From* b, int64_t ld, int64_t count, float* out) {
    vec factor[W];
    for (int e = 0; e < W; ++e) factor[e] = all(h[e]);
    for (int64_t c = 0; c < count; c += LANES) {
      vec sum = load(out + c);
#pragma GCC unroll 4
      for (int e = 0; e < W; ++e)
        sum = fma(factor[e], load_as<T>(b + e * ld + c, count - c), sum);
      store(out + c, sum);
    }
  }

  // A piece of a row, from column c on. Long sums are cut into sums of CHAIN terms.
  void piece(int64_t row, const Adapter& own, int64_t c, int64_t count) const {
    const int64_t n = y.shape[1], first = row * n + c;
    const int64_t* lines = route.lines + own.first;
    float total[ALONE], part[ALONE];
    with_operand<T>(y0, [&](const auto* at) { widen_row(at + first, count, nullptr, total); });
    with_operand<T>(b, [&](const auto* pool) {
      for (int64_t done = 0; done < own.r; done += CHAIN) {
        memset(part, 0, size_t(pad16(count)) * sizeof(float));
        by_rows<4, 1>(done, min(own.r, done + CHAIN), [&](int64_t j, auto together) {
          add_ranks<decltype(together)::value>(h + row * ldh + j, pool + lines[j] * n + c, n,
                                               count, part);
        });
        for (int64_t v = 0; v < count; v += LANES)
          store(total + v, fma(load(part + v), all(own.s), load(total + v)));
      }
    });
    for (int64_t v = 0; v < count; v += LANES) {
      const int64_t left = count - v;
      vec value = load(total + v);
      if (z.data) store(as<T>(z) + first + v, value, left);
      if (own.gain) value *= load(own.gain + c + v, left);
      if (bias) value += load(bias + c + v, left);
      store(as<T>(y) + first + v, value, left);
    }
  }

  void expand_all() const {
    const int64_t n = y.shape[1], work = 4 * route.m * n + route.r * n;
    by_columns(n, threads_for(work), [&](int64_t begin, int64_t end) {
      for (const Run* run = route.runs; run < route.runs + route.count; ++run) {
        const int64_t broad = run->end - run->begin > 2 ? SHARED : ALONE;
        for (int64_t c = begin; c < end; c += broad)
          for (int64_t i = run->begin; i < run->end; ++i)
            piece(route.order[i], of[run->slot], c, min(broad, end - c));
      }
    });
  }
};

}  // namespace
}  // namespace peftops::ISA
