// The product of rows of x with a base, dense or of 4 bits, in bf16: panels of pairs, LoRA's sums first.
#pragma once
#include "nf4_panels.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_panel, t_delta, t_rows;  // of each thread of a team

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
void product_with(const Product& t, Form form, int64_t block, bool backward, Tensors base, Tensor delta,
                  const float* gain) {
  const bool along_rows = (form == Form::transposed) != backward;
  const Tensor w = base.at[0];
  const NF4 codes(base, form == Form::nf4 ? block : 0);
  product(
      t,
      [&](uint32_t* out, int64_t c) {
        if (form == Form::nf4 && along_rows)
          pack_rows(codes, t.k, t.n, c, out, gain);
        else if (form == Form::nf4)
          pack_columns(codes, t.n, t.k, c, out);
        else if (along_rows)
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
        if (form == Form::nf4 && along_rows)
          for (; i < j; ++i) _mm_prefetch((const char*)(codes.codes + (i * t.n + c) / 2), _MM_HINT_T0);
        else if (form == Form::nf4)
          for (i = (c * t.k + i * PANEL) / 2, j = (c * t.k + j * PANEL) / 2; i < j; i += 64)
            _mm_prefetch((const char*)(codes.codes + i), _MM_HINT_T0);
        else if (along_rows)
          prefetch(as<bf16>(w) + i * t.n + c, t.n, j - i, PANEL);
        else
          prefetch(as<bf16>(w) + c * t.k + i * PANEL, 0, 1, (j - i) * PANEL);
      });
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

}  // namespace
}  // namespace peftops::ISA
