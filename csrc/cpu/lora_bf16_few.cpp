// LoRA in bf16 for few rows. Reading the weight takes most of the time, so each of its rows is
// streamed once and multiplied with all rows of x, from left to right.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "nf4_dots.h"
#include "ops.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_h, t_spread, t_x, t_lanes;  // of the caller, read by its team
thread_local Scratch t_rows, t_scales;             // of each thread of a team

constexpr int64_t AHEAD = 16384;  // bytes between what is read and what is prefetched

// The arguments of the op.
struct Few {
  bf16* y;        // (m, n)
  const bf16* x;  // (m, k)
  const bf16* w;  // (n, k), or null if it has 4 bits
  int64_t m, n, k;
  int64_t r;          // columns of b
  float s;            // LoRA's scale
  const float* gain;  // (n,), or null
  Tensor bias;        // (n,), or without data

  // y[i][c] = gain ⊙ value + bias
  PEFTOPS_INLINE void store(float value, int64_t i, int64_t c) const {
    if (gain) value *= gain[c];
    if (bias.data)
      value += bias.dtype == Dtype::f32 ? as<float>(bias)[c] : widen(as<bf16>(bias)[c]);
    narrow(value, y + i * n + c);
  }
};

// What the loops below call with each element of y.
struct Stored {
  const Few& t;
  PEFTOPS_INLINE void operator()(float value, int64_t i, int64_t c) const {
    t.store(value, i, c);
  }
};

// Lane j of the result is the sum over the lanes of v[j].
PEFTOPS_INLINE __m512 sums(const __m512 (&v)[16]) {
  __m512 t[8], q[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                         _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
    q[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  const __m512 u = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88),
                                 _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
  const __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88),
                                 _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(u, w, 0x88), _mm512_shuffle_f32x4(u, w, 0xdd));
}

// Loads 32 values as bf16.
PEFTOPS_INLINE __m512i whole32(const bf16* p) { return _mm512_loadu_si512(p); }
PEFTOPS_INLINE __m512i whole32(const float* p) {
  return narrow32(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16));
}

// acc + w · x lane by lane, for one row of the weight.
template <class T>
PEFTOPS_INLINE __m512 dot(const T* w, const bf16* x, int64_t k, __m512 acc) {
  __m512 s[4] = {acc};
  int64_t c = 0;
  for (; c + 128 <= k; c += 128)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      _mm_prefetch((const char*)(w + c + 32 * q) + AHEAD, _MM_HINT_T0);
      s[q] = _mm512_dpbf16_ps(s[q], (__m512bh)whole32(w + c + 32 * q), pairs(x + c + 32 * q));
    }
  for (; c < k; c += 32)
    s[1] =
        _mm512_dpbf16_ps(s[1], (__m512bh)load32(w + c, k - c), (__m512bh)load32(x + c, k - c));
  return _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
}

// acc[MX · e + i] += w[e] · x[i] lane by lane.
template <int MX, int NW, class T>
PEFTOPS_INLINE void dots(const T* w, const bf16* x, int64_t k, __m512 (&acc)[16]) {
  if constexpr (MX == 1) {
    for (int e = 0; e < NW; ++e) acc[e] = dot(w + e * k, x, k, acc[e]);
    return;
  }
  int64_t c = 0;
  for (; c + 32 <= k; c += 32)
#pragma GCC unroll 8
    for (int e = 0; e < NW; ++e) {
      const __m512bh t_w = (__m512bh)whole32(w + e * k + c);
      _mm_prefetch((const char*)(w + e * k + c) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int i = 0; i < MX; ++i)
        acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w, pairs(x + i * k + c));
    }
  if (c < k)
    for (int e = 0; e < NW; ++e)
      for (int i = 0; i < MX; ++i) {
        const __m512bh t_w = (__m512bh)load32(w + e * k + c, k - c);
        const __m512bh t_x = (__m512bh)load32(x + i * k + c, k - c);
        acc[MX * e + i] = _mm512_dpbf16_ps(acc[MX * e + i], t_w, t_x);
      }
}

// acc[MX · e + i] += h[i] · b[c + e] lane by lane.
template <int MX, int NW, class B>
PEFTOPS_INLINE void delta(const float* h, const B* b, int64_t r, int64_t c, __m512 (&acc)[16]) {
  for (int64_t j = 0; j < r; j += 16)
    for (int e = 0; e < NW; ++e) {
      const __m512 t_b = load16(b + (c + e) * r + j, r - j);
      for (int i = 0; i < MX; ++i) {
        const __m512 t_h = _mm512_maskz_loadu_ps(mask16(r - j), h + i * r + j);
        acc[MX * e + i] = _mm512_fmadd_ps(t_b, t_h, acc[MX * e + i]);
      }
    }
}

// Stores MX rows from i0 on and NW columns from c on of y, whose weights begin at w; or of h,
// if w is a. LoRA's part enters the sums first.
//   h, b, r: of LoRA's part; r = 0: none
//   store: called with (value, row, column)
template <int MX, int NW, class T, class B, class STORE>
PEFTOPS_INLINE void block(const T* w, const bf16* x, int64_t k, const float* h, const B* b,
                          int64_t r, int64_t i0, int64_t c, STORE store) {
  __m512 acc[16] = {};
  delta<MX, NW>(h + i0 * r, b, r, c, acc);
  dots<MX, NW>(w, x + i0 * k, k, acc);
  float out[16];
  _mm512_storeu_ps(out, sums(acc));
  for (int e = 0; e < NW; ++e)
    for (int i = 0; i < MX; ++i) store(out[MX * e + i], i0 + i, c + e);
}

// The same for all rows, four at a time, so that the weights come from memory only once. NW is
// 16 for one row, 8 for two, else 4 at most.
template <int NW, class T, class B, class STORE>
PEFTOPS_INLINE void columns(const T* w, const bf16* x, int64_t m, int64_t k, const float* h,
                            const B* b, int64_t r, int64_t c, STORE store) {
  if constexpr (NW > 4) {
    block<16 / NW, NW>(w, x, k, h, b, r, 0, c, store);
  } else {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) block<4, NW>(w, x, k, h, b, r, i, c, store);
    if (m - i == 3) block<3, NW>(w, x, k, h, b, r, i, c, store);
    if (m - i == 2) block<2, NW>(w, x, k, h, b, r, i, c, store);
    if (m - i == 1) block<1, NW>(w, x, k, h, b, r, i, c, store);
  }
}

// Calls f(c, Count<NW>) for this thread's share of n columns, NW at a time. The last columns
// are taken one at a time.
template <int NW, class F>
PEFTOPS_INLINE void share(int64_t n, F f) {
  const int64_t id = omp_get_thread_num(), team = omp_get_num_threads(), runs = n / NW;
  for (int64_t c = runs * id / team * NW; c < runs * (id + 1) / team * NW; c += NW)
    f(c, Count<NW>{});
  if (id + 1 == team)
    for (int64_t c = runs * NW; c < n; ++c) f(c, Count<1>{});
}

// All columns of this thread's share; arguments as in block.
template <int NW, class T, class B, class STORE>
PEFTOPS_INLINE void all_columns(const T* w, const bf16* x, int64_t m, int64_t k, const float* h,
                                const B* b, int64_t r, int64_t n, STORE store) {
  share<NW>(n, [&](int64_t c, auto count) __attribute__((always_inline)) {
    columns<decltype(count)::value>(w + c * k, x, m, k, h, b, r, c, store);
  });
}

// The same of a 4-bit weight, for MX rows of split x.
template <int MX, int NW, bool NESTED, class B, class STORE>
void coded_columns(const NF4& w, const bf16* x, int64_t k, const float* h, const B* b,
                   int64_t r, int64_t n, STORE store) {
  Scales<NW, NESTED> scale(t_scales.get<float>(Scales<NW, NESTED>::floats(k / 64)));
  share<NW>(n, [&](int64_t c, auto count) {
    constexpr int W = decltype(count)::value;
    __m512 acc[16] = {};
    delta<MX, W>(h, b, r, c, acc);
    if constexpr (W == NW) {
      scale.rows(w, c, k / 64);
      dots<MX, W, NESTED>(w, scale, x, k, c, acc);
    } else {
      Scales<1, false> one(t_rows.get<float>(k / 64 + 16));
      one.rows(w, c, k / 64);
      dots<MX, 1, false>(w, one, x, k, c, acc);
    }
    float out[16];
    _mm512_storeu_ps(out, sums(acc));
    for (int e = 0; e < W; ++e)
      for (int i = 0; i < MX; ++i) store(out[MX * e + i], i, c + e);
  });
}

// The same for up to 16 · L rows, each of which is a lane. x: what lanes() makes; h (r, 16 · L)
template <int L, class B, class STORE>
void coded_lanes(const NF4& w, const uint32_t* x, int64_t m, int64_t k, const float* h,
                 const B* b, int64_t r, int64_t n, STORE store) {
  constexpr int NW = 8;
  bf16* buffer = t_rows.get<bf16>(NW * (RUNS * 64 + 32));
  float* scales = t_scales.get<float>(Scales<NW, false>::floats(k / 64));
  share<NW>(n, [&](int64_t c, auto count) {
    constexpr int W = decltype(count)::value;
    Scales<W, false> scale(scales);
    __m512 acc[W][L] = {};
    for (int64_t j = 0; j < r; ++j)
      for (int e = 0; e < W; ++e) {
        const __m512 t_b = _mm512_set1_ps(rounded<bf16>(widen(b[(c + e) * r + j])));
        for (int l = 0; l < L; ++l)
          acc[e][l] = _mm512_fmadd_ps(t_b, _mm512_loadu_ps(h + (j * L + l) * 16), acc[e][l]);
      }
    scale.rows(w, c, k / 64);
    lane_dots<L, W>(w, scale, x, k, c, buffer, acc);
    float out[W][16 * L];
    for (int e = 0; e < W; ++e)
      for (int l = 0; l < L; ++l) _mm512_storeu_ps(out[e] + 16 * l, acc[e][l]);
    for (int64_t i = 0; i < m; ++i)
      for (int e = 0; e < W; ++e) store(out[e][i], i, c + e);
  });
}

// out (m, r) = s · (gate ⊙ h), rounded before s. h (m, ra) = x·aᵀ; gate may be without data.
void spread(float* out, const bf16* h, Tensor gate, int64_t m, int64_t ra, int64_t r, float s) {
  const int64_t experts = gate.data ? gate.shape[1] : 1;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < r; ++j) {
      bf16 value = h[i * ra + j % ra];
      if (gate.data)
        narrow(widen(value) * as<float>(gate)[i * experts + j / (r / experts)], &value);
      out[i * r + j] = s * widen(value);
    }
}

// A 4-bit weight, and what is made of x for it before the team begins.
struct Coded {
  NF4 w;
  const bf16* x;          // split; null if blocks are not whole runs of a row
  const uint32_t* lanes;  // x as lanes; null for up to eight rows
};

Coded coded(const Few& t, Tensors base, int64_t block) {
  const NF4 w(base, block);
  if (!in_runs(w, t.k)) return {w, nullptr, nullptr};
  const int64_t ld = pad128(t.k);
  bf16* x = t_x.get<bf16>(t.m * ld);
  split(t.x, t.m, t.k, x);
  if (t.m <= 8) return {w, x, nullptr};
  const int count = t.m > 16 ? 2 : 1;
  uint32_t* out = t_lanes.get<uint32_t>(ld / 2 * count * 16);
  if (count == 1)
    lanes<1>(x, t.m, t.k, out);
  else
    lanes<2>(x, t.m, t.k, out);
  return {w, x, out};
}

// out (r, width) = the transpose of h (m, r), with zeros beyond m.
const float* turned(const float* h, int64_t m, int64_t r, int64_t width, float* out) {
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = 0; i < width; ++i) out[j * width + i] = i < m ? h[i * r + j] : 0.0f;
  return out;
}

// y of a 4-bit weight.
template <class B>
void product(const Coded& v, const Few& t, const float* h, const B* b) {
  const Stored store{t};
  const bool nested = v.w.absmax8 && v.w.shift == 6 && 256 % (t.k / 64 ? t.k / 64 : 1) == 0;
  const auto columns_of = [&](auto rows, auto width) {
    constexpr int MX = decltype(rows)::value, NW = decltype(width)::value;
    if (nested)
      coded_columns<MX, NW, true>(v.w, v.x, t.k, h, b, t.r, t.n, store);
    else
      coded_columns<MX, NW, false>(v.w, v.x, t.k, h, b, t.r, t.n, store);
  };
  if (!v.x) {  // decodes rows first
    bf16* rows = t_rows.get<bf16>(4 * t.k);
    share<4>(t.n, [&](int64_t c, auto count) {
      constexpr int W = decltype(count)::value;
      decode(v.w, c * t.k, W * t.k, rows);
      columns<W>(rows, t.x, t.m, t.k, h, b, t.r, c, store);
    });
  } else if (t.m > 16) {
    coded_lanes<2>(v.w, v.lanes, t.m, t.k, h, b, t.r, t.n, store);
  } else if (t.m > 8) {
    coded_lanes<1>(v.w, v.lanes, t.m, t.k, h, b, t.r, t.n, store);
  } else {
    switch (t.m) {
      case 1:
        return columns_of(Count<1>{}, Count<4>{});
      case 2:
        return columns_of(Count<2>{}, Count<4>{});
      case 3:
        return columns_of(Count<3>{}, Count<4>{});
      case 4:
        return columns_of(Count<4>{}, Count<4>{});
      case 5:
        return columns_of(Count<5>{}, Count<2>{});
      case 6:
        return columns_of(Count<6>{}, Count<2>{});
      case 7:
        return columns_of(Count<7>{}, Count<2>{});
      case 8:
        return columns_of(Count<8>{}, Count<2>{});
    }
  }
}

// Calls f(Count<NW>), where NW columns are summed at once for m rows.
template <class F>
void by_width(int64_t m, F f) {
  if (m == 1) return f(Count<16>{});
  if (m == 2) return f(Count<8>{});
  f(Count<4>{});
}

// h (m, ranks) = x·aᵀ.
template <class A>
void down(const Few& t, const A* a, int64_t ranks, bf16* h) {
  const auto store = [&](float v, int64_t i, int64_t j) { narrow(v, h + i * ranks + j); };
  by_width(t.m, [&](auto width) {
    all_columns<decltype(width)::value>(a, t.x, t.m, t.k, nullptr, (const bf16*)nullptr, 0,
                                        ranks, store);
  });
}

// y. codes: a 4-bit weight, or null; h: s · (gate ⊙ h)
template <class B>
void up(const Few& t, const Coded* codes, const float* h, const B* b) {
  if (codes) return product(*codes, t, h, b);
  by_width(t.m, [&](auto width) {
    all_columns<decltype(width)::value>(t.w, t.x, t.m, t.k, h, b, t.r, t.n, Stored{t});
  });
}

// The whole op in one parallel region: h, then its gating by one thread, then y.
void few(const Few& t, Tensor a, Tensor b, Tensor gate, const Coded* codes) {
  const int64_t ranks = a.shape[0];
  bf16* h = t_h.get<bf16>(t.m * ranks);
  float* hs = t_spread.get<float>(t.m * t.r + 32 * t.r);
  const float* delta_h = hs;
  const int threads = threads_for_few(t.m, t.n, t.k);
  Team team;
#pragma omp parallel num_threads(threads)
  {
    team.run(
        [&] { with_operand<bf16>(a, [&](const auto* from) { down(t, from, ranks, h); }); });
#pragma omp barrier
#pragma omp single
    {
      spread(hs, h, gate, t.m, ranks, t.r, t.s);
      if (codes && codes->lanes)
        delta_h = turned(hs, t.m, t.r, t.m > 16 ? 32 : 16, hs + t.m * t.r);
    }
    team.run(
        [&] { with_operand<bf16>(b, [&](const auto* from) { up(t, codes, delta_h, from); }); });
  }
  team.finish();
}

}  // namespace

void lora_few_bf16(Tensor y, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale,
                   Tensor bias, Tensor gain, Tensor gate, Form form, int64_t block) {
  Few t{};
  t.y = as<bf16>(y);
  t.x = as<bf16>(x);
  if (form == Form::dense) t.w = as<bf16>(base.at[0]);
  t.m = x.shape[0];
  t.n = b.shape[0];
  t.k = x.shape[1];
  t.r = b.shape[1];
  t.s = *as<float>(scale);
  t.gain = as<float>(gain);
  t.bias = bias;
  const Coded codes = coded(t, base, form == Form::nf4 ? block : 0);
  few(t, a, b, gate, form == Form::nf4 ? &codes : nullptr);
}

}  // namespace peftops::ISA
#endif
