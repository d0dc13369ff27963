// Merging: w = round(p ⊙ Ŵ + q), where q sums what the adapters add, in fp64.
//
// The product of two floats is exact in fp64, and sums go over adapters and ranks in order. So
// all instruction sets, any number of threads and every other backend give the same bits.
#include "ops.h"
#include "vec.h"

namespace peftops::ISA {
namespace {

constexpr int DOUBLES = LANES / 2;  // of a register
typedef double wide __attribute__((vector_size(8 * DOUBLES)));
typedef double wide_at __attribute__((vector_size(8 * DOUBLES), aligned(8), may_alias));
typedef int64_t longs __attribute__((vector_size(8 * DOUBLES)));

constexpr int64_t PANEL = 1 << 18;  // bytes of the columns' factor that a cache holds
constexpr int64_t BLOCKS = 8;       // blocks of ROWS rows that a thread takes at once

PEFTOPS_INLINE wide in_all(double v) { return v - wide{}; }
PEFTOPS_INLINE wide load_wide(const double* p) { return *(const wide_at*)p; }

// a · b + c. The product of two floats is exact, so it does not matter whether this is fused.
PEFTOPS_INLINE wide add_product(wide a, wide b, wide c) {
#if defined(__AVX512BW__)
  return (wide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (wide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// LANES values in fp64. They are converted as vectors: GCC 12 miscompiles single lanes in
// `undone`.
struct Pair {
  wide half[2];
};

PEFTOPS_INLINE Pair widened(vec v) {
#if defined(__AVX512BW__)
  return {(wide)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (wide)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(wide)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (wide)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
  return {__builtin_convertvector(__builtin_shufflevector(v, v, 0, 1), wide),
          __builtin_convertvector(__builtin_shufflevector(v, v, 2, 3), wide)};
#endif
}
PEFTOPS_INLINE vec narrowed(Pair v) {
#if defined(__AVX512BW__)
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)v.half[0]));
  return (vec)_mm512_insertf32x8(low, _mm512_cvtpd_ps((__m512d)v.half[1]), 1);
#elif defined(__AVX2__)
  return (vec)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)v.half[1]),
                              _mm256_cvtpd_ps((__m256d)v.half[0]));
#else
  typedef float two __attribute__((vector_size(8)));
  return __builtin_shufflevector(__builtin_convertvector(v.half[0], two),
                                 __builtin_convertvector(v.half[1], two), 0, 1, 2, 3);
#endif
}

// A bit for each lane of a comparison, the first lane's in the lowest bit.
PEFTOPS_INLINE uint32_t bits_of(words set) {
#if defined(__AVX512BW__)
  return _mm512_movepi32_mask((__m512i)set);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)set));
#else
  uint32_t bits = 0;
  for (int l = 0; l < LANES; ++l) bits |= (set[l] >> 31) << l;
  return bits;
#endif
}

// The smallest normal number of a 16-bit type, the power of two that is too large, and what
// moves the last bit that the type has in a number to the last bit of a double.
struct Grid {
  double smallest, largest, shift;
};
constexpr Grid grid_of(bf16) { return {0x1p-126, 0x1p128, 0x1.8p45}; }
constexpr Grid grid_of(fp16) { return {0x1p-14, 0x1p16, 0x1.8p42}; }

// v rounded to the values of T, except that what is too large stays so.
template <class T>
wide on_grid(wide v) {
  constexpr Grid grid = grid_of(T{});
  const wide smallest = in_all(grid.smallest), largest = in_all(grid.largest);
  wide binade = (wide)((longs)v & 0x7ff0000000000000);
  binade = binade > smallest ? binade : smallest;
  binade = binade < largest ? binade : largest;
  const wide shift = binade * in_all(grid.shift);
  const longs sign = (longs)v & (longs)in_all(-0.0);  // zero keeps it
  return (wide)((longs)((v + shift) - shift) | sign);
}
template <class T>
__attribute__((noinline)) vec rounded_on_grid(Pair v) {
  return round_to(narrowed({on_grid<T>(v.half[0]), on_grid<T>(v.half[1])}), T{});
}

// Where a float may lie in the middle between two values of T. fp16 has fewer digits below its
// smallest normal number.
PEFTOPS_INLINE words in_the_middle(vec f, bf16) {
  return (words)(((words)f & 0xffff) == 0x8000);
}
PEFTOPS_INLINE words in_the_middle(vec f, fp16) {
  const words size = (words)f & 0x7fffffff;
  return (words)(((words)f & 0x1fff) == 0x1000) | (words)(size - 1 < 0x38800000 - 1);
}

// v rounded once to T, as floats. To round to fp32 first is the same, unless that gives the
// middle between two values of T.
PEFTOPS_INLINE vec rounded_once(Pair v, float) { return narrowed(v); }
template <class T>
PEFTOPS_INLINE vec rounded_once(Pair v, T) {
  const vec f = narrowed(v);
  if (__builtin_expect(bits_of(in_the_middle(f, T{})), 0)) return rounded_on_grid<T>(v);
  return round_to(f, T{});
}

// Stores up to LANES floats that are values of T.
template <class T>
PEFTOPS_INLINE void store_exact(T* p, vec v, int64_t count) {
  store(p, v, count);
}
PEFTOPS_INLINE void store_exact(bf16* p, vec v, int64_t count) {
  if (count < LANES) return store(p, v, count);
  const halves high = __builtin_convertvector((words)v >> 16, halves);
  memcpy(p, &high, sizeof high);
}

// A block of p and q: ROWS rows of LANES columns.
struct Sums {
  Pair p[ROWS], q[ROWS];
};

// What the adapters add to a weight that is stored as (rows, columns).
struct Delta {
  const double* left;   // (rows, R), with zeros up to a whole number of blocks
  const double* right;  // (columns / LANES, R, LANES), likewise
  const double* scale;  // (adapters,)
  const int32_t* ranks;
  const double* gain;  // (adapters, rows or columns), or null
  int64_t rows, columns, r, adapters;
  bool of_columns;  // gain is

  // The gain of adapter e for row i, or for the columns from c on.
  wide gain_at(int64_t e, int64_t i, int64_t c) const {
    if (!of_columns) return in_all(i < rows ? gain[e * rows + i] : 0);
    wide some = {};
    for (int64_t l = 0; l < min(DOUBLES, columns - c); ++l) some[l] = gain[e * columns + c + l];
    return some;
  }

  // p and q of ROWS rows from i on, LANES columns from c on. PLAIN: one adapter without gain,
  // whose p is left out
  template <bool PLAIN>
  PEFTOPS_INLINE void sum(int64_t i, int64_t c, Sums& sums) const {
    if (PLAIN) {
      products(i, c, 0, min(r, max(0, ranks[0])), sums.q);
#pragma GCC unroll 8
      for (Pair& q : sums.q)
        for (wide& half : q.half) half *= in_all(scale[0]);
      return;
    }
    for (int e = 0; e < ROWS; ++e) {
      sums.p[e] = {in_all(1), in_all(1)};
      sums.q[e] = {in_all(-0.0), in_all(-0.0)};  // to which any number adds without a change
    }
    int64_t first = 0;
    for (int64_t e = 0; e < adapters; ++e) {
      const int64_t end = min(r, first + max(0, ranks[e]));
      Pair d[ROWS];
      products(i, c, first, end, d);
      for (int row = 0; row < ROWS; ++row)
        for (int h = 0; h < 2; ++h) {
          wide &p = sums.p[row].half[h], &q = sums.q[row].half[h];
          q += in_all(scale[e]) * d[row].half[h];
          if (!gain) continue;
          const wide g = gain_at(e, i + row, c + DOUBLES * h);
          p *= g;
          q *= g;
        }
      first = end;
    }
  }

  // d = Σ left · right over the ranks from first to end.
  PEFTOPS_INLINE void products(int64_t i, int64_t c, int64_t first, int64_t end,
                               Pair (&d)[ROWS]) const {
    const double* row[ROWS];
    wide acc[ROWS][2];
#pragma GCC unroll 8
    for (int e = 0; e < ROWS; ++e) {
      row[e] = left + (i + e) * r;
      acc[e][0] = acc[e][1] = wide{};
    }
    const double* panel = right + c * r;
    for (int64_t j = first; j < end; ++j) {
      const wide low = load_wide(panel + j * LANES);
      const wide high = load_wide(panel + j * LANES + DOUBLES);
#pragma GCC unroll 8
      for (int e = 0; e < ROWS; ++e) {
        const wide l = in_all(row[e][j]);
        acc[e][0] = add_product(l, low, acc[e][0]);
        acc[e][1] = add_product(l, high, acc[e][1]);
      }
    }
#pragma GCC unroll 8
    for (int e = 0; e < ROWS; ++e) d[e] = {acc[e][0], acc[e][1]};
  }
};

// Sets bits of a row's mask for LANES columns from c on, which is a multiple of LANES.
PEFTOPS_INLINE void store_bits(uint8_t* row, int64_t c, uint32_t bits) {
  if (LANES == 4)
    row[c / 8] = uint8_t(c % 8 ? row[c / 8] | bits << 4 : bits);
  else
    memcpy(row + c / 8, &bits, LANES / 8);
}

// What merge_undo makes of w: (w - q) / p, rounded once.
template <class T, bool PLAIN>
PEFTOPS_INLINE vec undone(vec w, const Pair& p, const Pair& q) {
  Pair v = widened(w);
  for (int h = 0; h < 2; ++h) {
    v.half[h] -= q.half[h];
    if (!PLAIN) v.half[h] /= p.half[h];
  }
  return rounded_once(v, T{});
}

// ROWS rows from i on and LANES columns from c on, of which `count` exist, of merge_add.
// T: the type of Ŵ; U: of w
template <class T, class U, bool PLAIN>
PEFTOPS_INLINE void add_block(const Delta& delta, U* w, uint8_t* lost, const T* base, int64_t i,
                              int64_t c, int64_t count) {
  Sums sums;
  delta.sum<PLAIN>(i, c, sums);
  const uint32_t inside = uint32_t((uint64_t(1) << count) - 1);
  const int64_t rows = min(ROWS, delta.rows - i);
#pragma GCC unroll 1
  for (int64_t e = 0; e < rows; ++e) {
    const int64_t at = (i + e) * delta.columns + c;
    const vec from = load(base + at, count);
    Pair v = widened(from);
    for (int h = 0; h < 2; ++h) {
      if (!PLAIN) v.half[h] *= sums.p[e].half[h];
      v.half[h] += sums.q[e].half[h];
    }
    const vec merged = rounded_once(v, U{});
    store_exact(w + at, merged, count);
    if (!lost) continue;
    const vec back = undone<U, PLAIN>(merged, sums.p[e], sums.q[e]);
    const words differ = (words)((words)back != (words)from) | (words)(from != from);
    store_bits(lost + (i + e) * mask_bytes(delta.columns), c, bits_of(differ) & inside);
  }
}

// The same of merge_undo.
template <class T, bool PLAIN>
PEFTOPS_INLINE void undo_block(const Delta& delta, T* out, const T* w, int64_t i, int64_t c,
                               int64_t count) {
  Sums sums;
  delta.sum<PLAIN>(i, c, sums);
  const int64_t rows = min(ROWS, delta.rows - i);
#pragma GCC unroll 1
  for (int64_t e = 0; e < rows; ++e) {
    const int64_t at = (i + e) * delta.columns + c;
    const vec back = undone<T, PLAIN>(load(w + at, count), sums.p[e], sums.q[e]);
    store_exact(out + at, back, count);
  }
}

thread_local Scratch t_left, t_right;

// The factor (lines, r) whose element (i, j) is t[i · down + j · along], as doubles in blocks
// of `height` lines: (lines / height, r, height), or (lines / height, height, r) if by_line.
// The last block is filled with zeros.
const double* packed(Tensor t, int64_t lines, int64_t r, int64_t down, int64_t along,
                     int64_t height, bool by_line, Scratch& scratch) {
  const int64_t blocks = ceil_div(lines, height);
  double* out = scratch.get<double>(blocks * height * r);
  with_type(t.dtype, [&](auto e) {
    const auto* from = as<decltype(e)>(t);
#pragma omp parallel for num_threads(threads_for(8 * lines * r)) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t l = 0; l < height; ++l) {
        const int64_t i = block * height + l;
        double* to = out + (by_line ? i * r : block * height * r + l);
        for (int64_t j = 0; j < r; ++j)
          to[by_line ? j : j * height] = i < lines ? widen(from[i * down + j * along]) : 0;
      }
  });
  return out;
}

Delta delta_of(Tensor a, Tensor b, Tensor scale, Tensor ranks, Tensor gain, bool transposed) {
  const int64_t r = a.shape[0], n = b.shape[0], k = a.shape[1];
  Delta d;
  d.r = r;
  d.rows = transposed ? k : n;
  d.columns = transposed ? n : k;
  if (transposed) {
    d.left = packed(a, k, r, 1, k, ROWS, true, t_left);
    d.right = packed(b, n, r, r, 1, LANES, false, t_right);
  } else {
    d.left = packed(b, n, r, r, 1, ROWS, true, t_left);
    d.right = packed(a, k, r, 1, k, LANES, false, t_right);
  }
  d.scale = as<double>(scale);
  d.ranks = as<int32_t>(ranks);
  d.gain = as<double>(gain);
  d.adapters = scale.shape[0];
  d.of_columns = transposed;
  return d;
}

// Calls f(row, column, count of columns) for all blocks, in panels of columns whose factor
// stays in a cache.
template <class F>
void in_blocks(const Delta& d, F f) {
  const int64_t fit = PANEL / int64_t(sizeof(double)) / max(1, d.r) / 32 * 32;  // whole words
  const int64_t width = max(32, fit), height = BLOCKS * ROWS;
  const int64_t panels = ceil_div(d.columns, width), teams = ceil_div(d.rows, height);
  const int64_t work = d.rows * d.columns * (d.r + 16);
#pragma omp parallel for collapse(2) num_threads(threads_for(work)) schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t team = 0; team < teams; ++team) {
      const int64_t begin = panel * width, end = min(d.columns, begin + width);
      for (int64_t i = team * height; i < min(d.rows, (team + 1) * height); i += ROWS) {
        int64_t c = begin;
        for (; c + LANES <= end; c += LANES) f(i, c, LANES);
        if (c < end) f(i, c, end - c);
      }
    }
}

// Calls f with whether there is one adapter without gain, as a type.
template <class F>
void with_plain(const Delta& d, F f) {
  if (d.adapters == 1 && !d.gain) return f(Count<1>{});
  f(Count<0>{});
}

}  // namespace

void merge_add(Tensor w, Tensor lost, Tensor base, Tensor a, Tensor b, Tensor scale,
               Tensor ranks, Tensor gain, bool transposed) {
  const Delta delta = delta_of(a, b, scale, ranks, gain, transposed);
  const int64_t size = delta.rows * mask_bytes(delta.columns);
  if (lost.data) memset(lost.data, 0, size_t(size));
  const auto run = [&](auto t, auto u, auto plain) {
    using T = decltype(t);
    using U = decltype(u);
    in_blocks(delta, [&](int64_t i, int64_t c, int64_t count) {
      add_block<T, U, decltype(plain)::value>(delta, as<U>(w), as<uint8_t>(lost), as<T>(base),
                                              i, c, count);
    });
  };
  with_type(base.dtype, [&](auto t) {
    with_type(w.dtype, [&](auto u) { with_plain(delta, [&](auto p) { run(t, u, p); }); });
  });
}

void merge_undo(Tensor out, Tensor w, Tensor a, Tensor b, Tensor scale, Tensor ranks,
                Tensor gain, bool transposed) {
  const Delta delta = delta_of(a, b, scale, ranks, gain, transposed);
  with_type(w.dtype, [&](auto t) {
    using T = decltype(t);
    with_plain(delta, [&](auto plain) {
      in_blocks(delta, [&](int64_t i, int64_t c, int64_t count) {
        undo_block<T, decltype(plain)::value>(delta, as<T>(out), as<T>(w), i, c, count);
      });
    });
  });
}

}  // namespace peftops::ISA
