// The product of product.h: panels of the base and of LoRA's matrix are packed as floats, and
// rows of x are multiplied with them, six rows at a time.
#include "product.h"

#include "nf4.h"
#include "panels.h"

namespace peftops::ISA {
namespace {

// Of each thread of a team: the base's panel, LoRA's, rows of x as floats, and a part of a
// 4-bit base.
thread_local Scratch t_panel, t_delta, t_wide, t_decoded;

// A panel of `depth` rows lies as parts of WIDTH columns:
// out[column / WIDTH][row][column % WIDTH].
inline float* in_panel(float* out, int64_t depth, int64_t row, int64_t column) {
  return out + (column / WIDTH * depth + row) * WIDTH + column % WIDTH;
}

// Packs rows of a panel.
//   from: (rows, columns ≤ PANEL), ld elements from row to row
//   depth: rows of the whole panel; first: where these rows begin in it
//   gain: (rows,) multiplies rows, or null
template <class T, class From>
void pack_rows(const From* from, int64_t ld, int64_t rows, int64_t columns, float* out,
               int64_t depth, int64_t first, const float* gain) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < PANEL; c += LANES) {
      vec v = load_as<T>(from + i * ld + c, columns - c);
      if (gain) v *= all(gain[i]);
      store(in_panel(out, depth, first + i, c), v);
    }
}

// The same from the transpose (columns, rows), for columns of the panel from `column` on, which
// is a multiple of LANES.
template <class T, class From>
void pack_columns(const From* from, int64_t ld, int64_t columns, int64_t rows, float* out,
                  int64_t depth, int64_t first, int64_t column, const float* gain) {
  transpose_into<T>(from, ld, columns, rows, in_panel(out, depth, first, column), WIDTH, gain);
}

// Packs the panel of w (depth, n) that begins at column c. along_rows: w lies as it is; else it
// lies transposed.
template <class T>
void pack_base(Tensor w, bool along_rows, int64_t depth, int64_t n, int64_t c, float* out,
               const float* gain) {
  const T* from = as<T>(w);
  const int64_t columns = min(PANEL, n - c);
  if (along_rows) return pack_rows<T>(from + c, n, depth, columns, out, depth, 0, gain);
  for (int64_t j = 0; j < PANEL; j += LANES)
    pack_columns<T>(from + (c + j) * depth, depth, columns - j, depth, out, depth, 0, j, gain);
}

// The same of a 4-bit base. It is decoded in parts that stay in the nearest cache.
template <class T>
void pack_base(const NF4& w, bool along_rows, int64_t depth, int64_t n, int64_t c, float* out,
               const float* gain) {
  constexpr int64_t tall = 32,
                    run = 256;  // rows, or elements of a row, that are decoded at once
  constexpr int64_t ld = run + 32;
  const int64_t columns = min(PANEL, n - c);
  T* part = t_decoded.get<T>(max(tall * PANEL, LANES * ld));
  if (along_rows) {
    for (int64_t i = 0; i < depth; i += tall) {
      const int64_t rows = min(tall, depth - i);
      for (int64_t e = 0; e < rows; ++e) decode(w, (i + e) * n + c, columns, part + e * PANEL);
      pack_rows<T>(part, PANEL, rows, columns, out, depth, i, gain ? gain + i : nullptr);
    }
    return;
  }
  for (int64_t j = 0; j < PANEL; j += LANES)
    for (int64_t i = 0; i < depth; i += run) {
      const int64_t count = max(0, min(LANES, columns - j)), rows = min(run, depth - i);
      for (int64_t e = 0; e < count; ++e)
        decode(w, (c + j + e) * depth + i, rows, part + e * ld);
      pack_columns<T>(part, ld, count, rows, out, depth, i, j, gain ? gain + i : nullptr);
    }
}

// What one thread does; see by_panels.
template <class T>
struct Worker {
  const Product& t;
  const NF4 codes;  // of a 4-bit base
  int64_t ld;       // of `wide`; chosen so that rows do not fall into one cache set
  float* w;         // the base's panel
  float* b;         // LoRA's panel
  float* wide;      // rows of x as floats, or null if x has floats

  explicit Worker(const Product& t)
      : t(t), codes(t.base, t.form == Form::nf4 ? t.block : 0), ld(pad16(t.k) + 16) {
    w = t_panel.get<float>(t.k * PANEL);
    b = t_delta.get<float>(t.r * PANEL);
    wide = sizeof(T) < sizeof(float) ? t_wide.get<float>(ROWS * ld) : nullptr;
  }

  // A dense base (n, k) is packed along its columns, a transposed one (k, n) along its rows.
  // Backward it is the other way round.
  void pack(const Panel& panel) {
    const bool along_rows = (t.form == Form::transposed) != t.backward;
    if (t.x.data && t.form == Form::nf4)
      pack_base<T>(codes, along_rows, t.k, t.n, panel.c, w, t.row_gain);
    if (t.x.data && t.form != Form::nf4)
      pack_base<T>(t.base.at[0], along_rows, t.k, t.n, panel.c, w, t.row_gain);
    with_operand<T>(t.delta, [&](auto* from) {
      const int64_t columns = min(PANEL, t.n - panel.c);
      if (t.routes) return pack_pool(from + panel.c, columns);
      if (t.backward)
        return pack_rows<T>(from + panel.c, t.n, t.r, columns, b, t.r, 0, nullptr);
      for (int64_t j = 0; j < PANEL; j += LANES)
        pack_columns<T>(from + (panel.c + j) * t.r, t.r, columns - j, t.r, b, t.r, 0, j,
                        nullptr);
    });
  }

  // Packs the rank-rows of routes. They lie apart, so they are fetched ahead.
  template <class From>
  void pack_pool(const From* from, int64_t columns) {
    constexpr int64_t ahead = 8, line = 64 / sizeof(From);
    for (int64_t i = 0; i < t.r; ++i) {
      const From* later = from + t.routes->lines[min(i + ahead, t.r - 1)] * t.n;
      for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(later + c);
      pack_rows<T>(from + t.routes->lines[i] * t.n, t.n, 1, columns, b, t.r, i, nullptr);
    }
  }

  void rows(const Panel& panel, int64_t begin, int64_t end) {
    by_rows<ROWS, 4, 2, 1>(
        begin, end, [&](int64_t i, auto count) { tile<decltype(count)::value>(i, panel.c); });
  }

  // MR rows of out from i on, of the panel that begins at column c.
  template <int MR>
  void tile(int64_t i, int64_t c) {
    float sums[MR * PANEL];
    const float* x = nullptr;
    int64_t ldx = t.k;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (t.x.data) x = as<T>(t.x) + i * t.k;
    } else if (t.x.data) {
      for (int e = 0; e < MR; ++e)
        widen_row(as<T>(t.x) + (i + e) * t.k, t.k, nullptr, wide + e * ld);
      x = wide;
      ldx = ld;
    }
    const bool one = alike<MR>(i);
    for (int e = 0; e < MR && !one; ++e) put_delta(i + e, c, sums + e * PANEL);
    for (int64_t j = 0; j < min(PANEL, t.n - c); j += WIDTH)
      multiply_part<MR>(x, ldx, i, c, j, one, sums + j);
    for (int e = 0; e < MR; ++e) finish(sums + e * PANEL, i + e, c);
  }

  // The adapter of row i.
  PEFTOPS_INLINE Adapter adapter(int64_t i) const {
    return t.routes ? t.routes->adapters[t.routes->slots[i]] : Adapter{0, t.r, t.s, t.gain};
  }

  // Whether MR rows from i on have the adapter of row i.
  template <int MR>
  PEFTOPS_INLINE bool alike(int64_t i) const {
    for (int e = 1; t.routes && e < MR; ++e)
      if (t.routes->slots[i + e] != t.routes->slots[i]) return false;
    return true;
  }

  // s · mask ⊙ sum for LANES columns of row i from `at` on.
  PEFTOPS_INLINE vec finished(vec sum, float s, int64_t i, int64_t at) const {
    sum *= all(s);
    if (!t.bits || at >= t.n) return sum;
    return kept(sum, bits_at(t.bits + i * mask_bytes(t.n), at));
  }

  // sums (PANEL,) = s · mask ⊙ (h·b) for row i, whose neighbours have other adapters.
  void put_delta(int64_t i, int64_t c, float* sums) const {
    constexpr int64_t parts = PANEL / WIDTH;
    const Adapter own = adapter(i);
    const float *h = t.h + i * t.routes->ldh, *rows = b + own.first * WIDTH;
    for (int64_t done = 0; done < max(own.r, 1); done += CHAIN) {
      vec acc[parts][VECTORS];
      clear(acc);
      for (int64_t j = done; j < min(done + CHAIN, own.r); ++j)
#pragma GCC unroll 8
        for (int64_t part = 0; part < parts; ++part)
#pragma GCC unroll 4
          for (int64_t v = 0; v < VECTORS; ++v) {
            const vec w = load(rows + (part * t.r + j) * WIDTH + LANES * v);
            acc[part][v] = fma(w, all(h[j]), acc[part][v]);
          }
#pragma GCC unroll 16
      for (int64_t at = 0; at < PANEL; at += LANES) {
        const vec sum = finished(acc[at / WIDTH][at % WIDTH / LANES], own.s, i, c + at);
        store(sums + at, done ? load(sums + at) + sum : sum);
      }
    }
  }

  // sums (MR, WIDTH) = x·w + s · mask ⊙ (h·b) for the columns from c + j on. Long sums are cut
  // into sums of CHAIN terms, whose rounding errors are smaller.
  //   one: all rows have one adapter; else sums holds LoRA's part
  template <int MR>
  PEFTOPS_INLINE void multiply_part(const float* x, int64_t ldx, int64_t i, int64_t c,
                                    int64_t j, bool one, float* sums) const {
    vec acc[MR][VECTORS];
    const Adapter own = adapter(i);
    const int64_t ldh = t.routes ? t.routes->ldh : t.r;
    const float* rows = b + j * t.r + own.first * WIDTH;
    const int64_t ranks = max(own.r, 1);  // without a rank, zeros are written
    for (int64_t done = 0; one && done < ranks; done += CHAIN) {
      clear(acc);
      multiply(t.h + i * ldh + done, ldh, min(CHAIN, own.r - done), rows + done * WIDTH, WIDTH,
               acc);
#pragma GCC unroll 8
      for (int e = 0; e < MR; ++e)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
          acc[e][v] = finished(acc[e][v], own.s, i + e, c + j + LANES * v);
      put(acc, sums, done > 0);
    }
    for (int64_t done = 0; x && done < t.k; done += CHAIN) {
      clear(acc);
      multiply(x + done, ldx, min(CHAIN, t.k - done), w + j * t.k + done * WIDTH, WIDTH, acc);
      put(acc, sums, true);
    }
  }

  // sums = acc, or += acc.
  template <int MR>
  PEFTOPS_INLINE static void put(const vec (&acc)[MR][VECTORS], float* sums, bool add) {
#pragma GCC unroll 8
    for (int e = 0; e < MR; ++e)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        float* at = sums + e * PANEL + LANES * v;
        store(at, add ? load(at) + acc[e][v] : acc[e][v]);
      }
  }

  // Stores row i of the panel: adds y0 to its sums, applies gain and bias, and rounds once.
  void finish(const float* sums, int64_t i, int64_t c) const {
    const float* gain = adapter(i).gain;
    for (int64_t v = 0; v < min(PANEL, t.n - c); v += LANES) {
      const int64_t at = i * t.n + c + v, left = t.n - c - v;
      vec value = load(sums + v);
      if (t.y0.data) with_operand<T>(t.y0, [&](auto* y0) { value += load(y0 + at, left); });
      if (t.z.data) store(as<T>(t.z) + at, value, left);
      if (gain) value *= load(gain + c + v, left);
      if (t.bias) value += load(t.bias + c + v, left);
      store(as<T>(t.out) + at, value, left);
    }
  }
};

}  // namespace

void product(const Product& t) {
  with_type(t.out.dtype, [&](auto e) {
    by_panels(t.m, t.n, t.m * t.n * (t.k + t.r), [&] { return Worker<decltype(e)>(t); });
  });
}

}  // namespace peftops::ISA
