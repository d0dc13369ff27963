// LoRA in bf16 on AVX-512 with dot products: whole ops, the base product included.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "ops.h"
#include "tile_bf16.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_panel, t_delta, t_rows;               // of each thread of a team
thread_local Scratch t_a, t_b, t_h, t_parts, t_grad, t_sum;  // of the caller, read by its team

// ap[k / 2][pad16(r)] from a (r, k), by the whole team
uint32_t* pack_a(Tensor a) {
  const int64_t r = a.shape[0], k = a.shape[1], width = pad16(r), step = 512;
  uint32_t* out = t_a.get<uint32_t>((k + 1) / 2 * width);
  with_operand(a, [&](auto* from) {
#pragma omp parallel for num_threads(threads_for(32 * r * k))
    for (int64_t c = 0; c < k; c += step) pack_columns(from + c, k, r, min(step, k - c), out + c / 2 * width, width);
  });
  return out;
}

// Rows of x, or their copies with what is dropped set to zero.
const bf16* dropped(const bf16* x, int64_t k, const uint8_t* bits, int64_t rows) {
  if (!bits) return x;
  const int64_t bytes = mask_bytes(k), ld = 8 * bytes;
  bf16* to = t_rows.get<bf16>(rows * ld);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < k; c += 32) {
      uint32_t word;
      memcpy(&word, bits + i * bytes + c / 8, 4);
      _mm512_storeu_si512(to + i * ld + c, _mm512_maskz_loadu_epi16(word & mask32(k - c), x + i * k + c));
    }
  return to;
}

// h = factor · drop(x)·aᵀ; bits are drawn where there is a generator
void shrink(Tensor h, uint8_t* bits, Tensor x, Tensor a, const Philox* generator, float factor) {
  const int64_t m = x.shape[0], k = x.shape[1], r = a.shape[0], padded = pad16(r), bytes = mask_bytes(k);
  const uint32_t* ap = pack_a(a);
#pragma omp parallel for num_threads(threads_for(m * k * padded)) schedule(static)
  for (int64_t block = 0; block < m; block += 8) {
    const int64_t end = min(block + 8, m);
    if (generator)
      for (int64_t i = block; i < end; ++i) generator->draw(bits + i * bytes, i, bytes);
    prefetch(as<bf16>(x) + end * k, k, min(8, m - end), k);
    const bf16* from = dropped(as<bf16>(x) + block * k, k, bits ? bits + block * bytes : nullptr, end - block);
    const int64_t ld = bits ? 8 * bytes : k;
    by_ranks(padded, [&](int64_t group, auto vectors) {
      constexpr int NV = decltype(vectors)::value, MR = NV == 4 ? 4 : 8;
      by_rows<MR, 4, 2, 1>(block, end, [&](int64_t i, auto rows) {
        constexpr int M = decltype(rows)::value;
        __m512 acc[M][NV] = {};
        multiply<M, NV>(from + (i - block) * ld, ld, k, ap + 16 * group, padded, acc);
        for (int t = 0; t < M; ++t)
          for (int v = 0; v < NV; ++v) {
            const int64_t j = 16 * (group + v);
            const __m256i out = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(acc[t][v], _mm512_set1_ps(factor)));
            _mm256_mask_storeu_epi16(as<bf16>(h) + (i + t) * r + j, mask16(r - j), out);
          }
      });
    });
  }
}

// out = gain ⊙ (y0 + x·w + s · mask ⊙ (h·b)) + bias, z = what gain multiplies; x·w or y0 may be absent
struct Product {
  bf16 *out, *z;
  const bf16 *x, *h, *y0;
  int64_t m, n, k, r;
  float s;
  const uint8_t* bits;
  const float *gain, *bias;
};

template <int MR>
PEFTOPS_INLINE void tile(const Product& t, int64_t i, int64_t c, const uint32_t* w, const uint32_t* b) {
  for (int e = 0; e < MR; ++e)  // asked for now, written after the sums
    for (int v = 0; v < 2; ++v) __builtin_prefetch(t.out + (i + e) * t.n + c + 32 * v, 1);
  __m512 acc[MR][4] = {};
  multiply<MR, 4>(t.h + i * t.r, t.r, t.r, b, PANEL, acc);
  const int64_t bytes = mask_bytes(t.n), left = t.n - c;
  for (int e = 0; e < MR; ++e)
    for (int v = 0; v < 4; ++v) {
      uint16_t keep = 0xffff;
      if (t.bits && 16 * v < left) memcpy(&keep, t.bits + (i + e) * bytes + c / 8 + 2 * v, 2);
      acc[e][v] = _mm512_maskz_mul_ps(keep, acc[e][v], _mm512_set1_ps(t.s));
    }
  if (t.x) multiply<MR, 4>(t.x + i * t.k, t.k, t.k, w, PANEL, acc);
  for (int e = 0; e < MR; ++e)
    for (int v = 0; v < 4 && 16 * v < left; v += 2) {
      const int64_t at = (i + e) * t.n + c + 16 * v, count = left - 16 * v;
      __m512 lo = acc[e][v], hi = acc[e][v + 1];
      if (t.y0) {
        const __m512i y0 = load32(t.y0 + at, count);
        lo = _mm512_add_ps(lo, low(y0)), hi = _mm512_add_ps(hi, high(y0));
      }
      if (t.z) _mm512_mask_storeu_epi16(t.z + at, mask32(count), narrow32(lo, hi));
      if (t.gain) {
        lo = _mm512_mul_ps(lo, _mm512_maskz_loadu_ps(mask16(count), t.gain + c + 16 * v));
        hi = _mm512_mul_ps(hi, _mm512_maskz_loadu_ps(mask16(count - 16), t.gain + c + 16 * v + 16));
      }
      if (t.bias) {
        lo = _mm512_add_ps(lo, _mm512_maskz_loadu_ps(mask16(count), t.bias + c + 16 * v));
        hi = _mm512_add_ps(hi, _mm512_maskz_loadu_ps(mask16(count - 16), t.bias + c + 16 * v + 16));
      }
      if (count >= 32)
        _mm512_storeu_si512(t.out + at, narrow32(lo, hi));
      else
        _mm512_mask_storeu_epi16(t.out + at, mask32(count), narrow32(lo, hi));
    }
}

constexpr int64_t TALL = 768;  // rows of x that are walked for every panel before the next ones: they stay in the cache

// pack_w(panel, c) and pack_b(panel, c) pack the 64 columns from c on, hint(c, i, j) asks for the part [i, j) of k of
// what pack_w will read for c. Threads take equal runs of (slab of rows, panel, six rows).
template <class W, class B, class H>
void product(const Product& t, W pack_w, B pack_b, H hint) {
  const int64_t panels = ceil_div(t.n, PANEL), slabs = ceil_div(t.m, TALL);
  const int64_t blocks = slabs ? ceil_div(ceil_div(t.m, slabs), 6) : 0, rows = 6 * blocks;
  const int threads = threads_for(t.m * t.n * (t.k + t.r));
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), id = omp_get_thread_num();
    uint32_t* w = t_panel.get<uint32_t>((t.k + 1) / 2 * PANEL);
    uint32_t* b = t_delta.get<uint32_t>((t.r + 1) / 2 * PANEL);
    const int64_t end = slabs * panels * blocks * (id + 1) / team;
    for (int64_t item = slabs * panels * blocks * id / team; item < end;) {
      const int64_t run = item / blocks, c = run % panels * PANEL, next = c + PANEL < t.n ? c + PANEL : 0;
      const int64_t first = run / panels * rows, stop = min(end, (run + 1) * blocks);
      if (t.x) pack_w(w, c);
      pack_b(b, c);
      const int64_t from = first + item % blocks * 6, to = min(t.m, first + (stop - run * blocks) * 6);
      by_rows<6, 4, 2, 1>(from, to, [&](int64_t i, auto count) {
        constexpr int MR = decltype(count)::value;
        if (t.x) hint(next, t.k * (i - first) / rows, t.k * (i - first + MR) / rows);
        if (t.x && !c) prefetch(t.x + (i + MR) * t.k, 0, 1, MR * t.k);
        tile<MR>(t, i, c, w, b);
      });
      item = stop;
    }
  }
}

// Columns of x·wᵀ: w (n, k) is packed along its columns, transposed w (k, n) along its rows; backward the other way.
void product_with(const Product& t, Form form, bool backward, Tensor w, Tensor delta, const float* gain) {
  const bool along_rows = (form == Form::transposed) != backward;
  product(
      t,
      [&](uint32_t* out, int64_t c) {
        if (along_rows)
          pack_rows(as<bf16>(w) + c, t.n, t.k, min(PANEL, t.n - c), out, PANEL, gain);
        else
          pack_columns(as<bf16>(w) + c * t.k, t.k, min(PANEL, t.n - c), t.k, out, PANEL, gain);
      },
      [&](uint32_t* out, int64_t c) {
        with_operand(delta, [&](auto* from) {  // forward b (n, r), backward a (r, k)
          if (backward)
            pack_rows(from + c, t.n, t.r, min(PANEL, t.n - c), out, PANEL);
          else
            pack_columns(from + c * t.r, t.r, min(PANEL, t.n - c), t.r, out, PANEL);
        });
      },
      [&](int64_t c, int64_t i, int64_t j) {
        if (along_rows)
          prefetch(as<bf16>(w) + i * t.n + c, t.n, j - i, PANEL);
        else
          prefetch(as<bf16>(w) + c * t.k + i * PANEL, 0, 1, (j - i) * PANEL);
      });
}

// v[j][c] += Σ h[i][j] · t[i][c] over the rows [i0, i1) of t and the columns [c, c + 32); h as pairs of rows
PEFTOPS_INLINE void outer(float* v, int64_t ldv, const bf16* t, int64_t n, const uint8_t* bits, const uint32_t* h,
                          int64_t padded, int64_t i0, int64_t i1, int64_t c, bool first, bool last) {
  const int64_t bytes = mask_bytes(n);
  const uint32_t inside = mask32(n - c);
  const auto row = [&](int64_t i) {
    uint32_t keep = inside;
    if (bits) {
      memcpy(&keep, bits + i * bytes + c / 8, 4);
      keep &= inside;
    }
    return _mm512_maskz_loadu_epi16(keep, t + i * n + c);
  };
  for (int64_t j = 0; j < padded; j += 8) {
    __m512 acc[8][2] = {};
    float* at = v + j * ldv + c;
    for (int64_t i = i0; i < i1; i += 2) {
      const __m512i u0 = row(i), u1 = i + 1 < i1 ? row(i + 1) : _mm512_setzero_si512();
      const __m512bh lo = (__m512bh)_mm512_unpacklo_epi16(u0, u1), hi = (__m512bh)_mm512_unpackhi_epi16(u0, u1);
      const uint32_t* pair_of_h = h + i / 2 * padded + j;
#pragma GCC unroll 8
      for (int e = 0; e < 8; ++e) {
        const __m512bh t_h = (__m512bh)_mm512_set1_epi32(int(pair_of_h[e]));
        acc[e][0] = _mm512_dpbf16_ps(acc[e][0], lo, t_h), acc[e][1] = _mm512_dpbf16_ps(acc[e][1], hi, t_h);
      }
    }
    if (!first)
      for (int e = 0; e < 8; ++e) {
        acc[e][0] = _mm512_add_ps(acc[e][0], _mm512_loadu_ps(at + e * ldv));
        acc[e][1] = _mm512_add_ps(acc[e][1], _mm512_loadu_ps(at + e * ldv + 16));
      }
    if (last) {  // the unpacks left the columns as 0–3 8–11 16–19 24–27 and 4–7 12–15 20–23 28–31
      const __m512i lo = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
      const __m512i hi = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
      for (int e = 0; e < 8; ++e) {
        const __m512 both[2] = {acc[e][0], acc[e][1]};
        acc[e][0] = _mm512_permutex2var_ps(both[0], lo, both[1]);
        acc[e][1] = _mm512_permutex2var_ps(both[0], hi, both[1]);
      }
    }
    for (int e = 0; e < 8; ++e)
      _mm512_storeu_ps(at + e * ldv, acc[e][0]), _mm512_storeu_ps(at + e * ldv + 16, acc[e][1]);
  }
}

// u (m, padded) = t·b and v (padded, ldv) = hᵀ·drop(t) in one read of t (m, n); u or v may be absent.
// A column group is one thread's, whatever their number, and groups are added in order: the same bits every time.
void reduce(float* u, float* v, int64_t ldv, Tensor t, const uint8_t* bits, const uint32_t* h, const uint32_t* b,
            int64_t padded) {
  const int64_t m = t.shape[0], n = t.shape[1], wide = 128, tall = 64;
  const int64_t groups = min(4, ceil_div(n, wide));
  const bf16* from = as<bf16>(t);
  if (v && !m) memset(v, 0, size_t(padded * ldv) * sizeof(float));
  float* parts = u ? t_parts.get<float>(groups * m * padded) : nullptr;
  const int threads = threads_for(m * n * padded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * n / groups / 32 * 32,
                  end = group + 1 < groups ? (group + 1) * n / groups / 32 * 32 : n;
    for (int64_t i0 = 0; i0 < m; i0 += tall) {
      const int64_t i1 = min(i0 + tall, m);
      for (int64_t c0 = begin; c0 < end; c0 += wide) {
        const int64_t c1 = min(c0 + wide, end);
        const int64_t next = c1 < end ? i0 : i1, to = c1 < end ? c1 : begin;
        prefetch(from + next * n + to, n, min(tall, m - next), min(wide, end - to));
        if (u)
          by_ranks(padded, [&](int64_t rank, auto vectors) {
            constexpr int NV = decltype(vectors)::value, MR = NV == 4 ? 4 : 8;
            by_rows<MR, 4, 2, 1>(i0, i1, [&](int64_t i, auto rows) {
              constexpr int M = decltype(rows)::value;
              __m512 acc[M][NV] = {};
              float* at = parts + (group * m + i) * padded + 16 * rank;
              if (c0 > begin)
                for (int e = 0; e < M; ++e)
                  for (int q = 0; q < NV; ++q) acc[e][q] = _mm512_loadu_ps(at + e * padded + 16 * q);
              multiply<M, NV>(from + i * n + c0, n, c1 - c0, b + c0 / 2 * padded + 16 * rank, padded, acc);
              for (int e = 0; e < M; ++e)
                for (int q = 0; q < NV; ++q) _mm512_storeu_ps(at + e * padded + 16 * q, acc[e][q]);
            });
          });
        if (v)
          for (int64_t c = c0; c < c1; c += 32) outer(v, ldv, from, n, bits, h, padded, i0, i1, c, i0 == 0, i1 == m);
      }
    }
  }
  if (u)
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < m * padded; i += 16) {
      __m512 sum = _mm512_loadu_ps(parts + i);
      for (int64_t g = 1; g < groups; ++g) sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts + g * m * padded + i));
      _mm512_storeu_ps(u + i, sum);
    }
}

// (m, columns of b): h, or each expert's columns of h times its gate
bf16* gated(Tensor h, Tensor gate, int64_t columns, Scratch& scratch) {
  if (!gate.data) return as<bf16>(h);
  const int64_t m = h.shape[0], r = h.shape[1], experts = gate.shape[1], each = columns / experts;
  bf16* out = scratch.get<bf16>(m * columns);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j)
      narrow(widen(as<bf16>(h)[i * r + j % r]) * as<float>(gate)[i * experts + j / each], out + i * columns + j);
  return out;
}

// dh (m, r) in bf16 and dgate from u (m, padded): s · u is the gradient of the gated h
bf16* ungated(Tensor dgate, Tensor h, Tensor gate, const float* u, int64_t columns, int64_t padded, float s) {
  const int64_t m = h.shape[0], r = h.shape[1];
  bf16* dh = t_h.get<bf16>(m * r);
  if (!gate.data) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < r; j += 16) {
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(u + i * padded + j), _mm512_set1_ps(s));
        _mm256_mask_storeu_epi16(dh + i * r + j, mask16(r - j), (__m256i)_mm512_cvtneps_pbh(value));
      }
    return dh;
  }
  const int64_t experts = gate.shape[1], each = columns / experts;
  float* sum = t_panel.get<float>(r + experts);
  for (int64_t i = 0; i < m; ++i) {
    memset(sum, 0, size_t(r + experts) * sizeof(float));
    float part = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const float d = s * u[i * padded + j];
      sum[j % r] += as<float>(gate)[i * experts + j / each] * d;
      part += d * widen(as<bf16>(h)[i * r + j % r]);
      if ((j + 1) % each && j % 16 < 15) continue;
      sum[r + j / each] += part;
      part = 0;
    }
    for (int64_t j = 0; j < r; ++j) narrow(sum[j], dh + i * r + j);
    if (dgate.data) memcpy(as<float>(dgate) + i * experts, sum + r, size_t(experts) * sizeof(float));
  }
  return dh;
}

// v (padded, ldv), scaled, as the gradient of a (r, k), or transposed as that of b (n, columns)
void store_gradient(Tensor to, const float* v, int64_t ldv, bool transposed, float s, const float* gain) {
  const int64_t rows = to.shape[0], columns = to.shape[1];
  const auto store = [&](auto* out) {
#pragma omp parallel for num_threads(threads_for(16 * rows * columns))
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const float value = transposed ? v[j * ldv + i] * (gain ? gain[i] : 1.0f) : v[i * ldv + j];
        narrow(s * value, out + i * columns + j);
      }
  };
  with_operand(to, store);
}

const float* as_float(Tensor t, Scratch& scratch) {
  if (!t.data || t.dtype == Dtype::f32) return as<float>(t);
  float* out = scratch.get<float>(t.shape[0]);
  for (int64_t i = 0; i < t.shape[0]; ++i) out[i] = widen(as<bf16>(t)[i]);
  return out;
}

float inverse(double p) { return p < 1 ? float(1 / (1 - p)) : 0.0f; }

}  // namespace

void lora_fwd(Tensor y, Tensor h, Tensor bits, Tensor z, Tensor x, Tensor base, Tensor a, Tensor b, Tensor scale,
              Tensor bias, Tensor gain, Tensor gate, Tensor seed, Form form, double p) {
  const Philox generator(p ? *as<uint64_t>(seed) : 0, p);
  shrink(h, as<uint8_t>(bits), x, a, p ? &generator : nullptr, inverse(p));
  const bf16 *from = as<bf16>(x), *y0 = nullptr, *hg = gated(h, gate, b.shape[1], t_h);
  if (form == Form::given) from = nullptr, y0 = as<bf16>(base);
  const int64_t m = x.shape[0], n = b.shape[0], k = x.shape[1], r = b.shape[1];
  const float s = *as<float>(scale), *wide_bias = as_float(bias, t_sum);
  const Product t{as<bf16>(y), as<bf16>(z), from, hg, y0, m, n, k, r, s, nullptr, as<float>(gain), wide_bias};
  product_with(t, form, false, base, b, nullptr);
}

void lora_bwd(Tensor dx, Tensor da, Tensor db, Tensor dgate, Tensor dy, Tensor x, Tensor base, Tensor a, Tensor b,
              Tensor scale, Tensor h, Tensor bits, Tensor gain, Tensor gate, Form form, double p) {
  const int64_t m = x.shape[0], k = x.shape[1], n = b.shape[0], r = a.shape[0], columns = b.shape[1];
  const int64_t padded = pad16(columns), ldv = (n + 31) / 32 * 32, ranks = pad16(r), ldk = (k + 31) / 32 * 32;
  const float s = *as<float>(scale);
  const float* g = as<float>(gain);
  const bool inner = dx.data || da.data || dgate.data;
  float *u = inner ? t_sum.get<float>(m * padded) : nullptr, *v = db.data ? t_grad.get<float>(padded * ldv) : nullptr;
  uint32_t *bp = nullptr, *hp = nullptr;
  if (u) {
    bp = t_b.get<uint32_t>((n + 1) / 2 * padded);
    with_operand(b, [&](auto* from) { pack_rows(from, columns, n, columns, bp, padded, g); });
  }
  if (v) {
    hp = t_a.get<uint32_t>((m + 1) / 2 * padded);
    pack_rows(gated(h, gate, columns, t_h), columns, m, columns, hp, padded);
  }
  if (u || v) reduce(u, v, ldv, dy, nullptr, hp, bp, padded);
  if (v) store_gradient(db, v, ldv, true, s, g);
  if (!inner) return;

  const bf16* dh = ungated(dgate, h, gate, u, columns, padded, s);
  if (dx.data) {
    const bf16* dz = form == Form::given ? nullptr : as<bf16>(dy);  // with g in the packed w
    const Product t{as<bf16>(dx), nullptr,           dz,      dh,     nullptr, m, k, n, r,
                    inverse(p),   as<uint8_t>(bits), nullptr, nullptr};
    product_with(t, form, true, base, a, g);
  }
  if (da.data) {
    hp = t_a.get<uint32_t>((m + 1) / 2 * ranks);
    v = t_grad.get<float>(ranks * ldk);
    pack_rows(dh, r, m, r, hp, ranks);
    reduce(nullptr, v, ldk, x, as<uint8_t>(bits), hp, nullptr, ranks);
    store_gradient(da, v, ldk, false, inverse(p), nullptr);
  }
}

}  // namespace peftops::ISA
#endif
