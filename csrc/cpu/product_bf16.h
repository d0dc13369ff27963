// The product of rows of x with a base, dense or of 4 bits, plus LoRA's part, in bf16. Panels
// hold pairs of bf16 for the dot-product instruction. LoRA's sums are made first.
#pragma once
#include "nf4_panels.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_panel, t_delta, t_rows;  // of each thread of a team

// out = gain ⊙ (y0 + x·w + s · mask ⊙ (h·b)) + bias; z = what gain multiplies. What may be
// absent is null.
struct Product {
  bf16* out;            // (m, n)
  bf16* z;              // (m, n), or null
  const bf16* x;        // (m, k), or null: then there is no x·w
  const bf16* h;        // (m, r)
  const bf16* y0;       // (m, n), or null
  int64_t m, n, k, r;   // of this product, not of the layer
  float s;              // LoRA's scale
  const uint8_t* bits;  // the mask (m, mask_bytes(n)), or null
  const float* gain;    // (n,), or null
  const float* bias;    // (n,), or null
};

// MR rows of out from i on, of the panel that begins at column c. w, b: packed panels
template <int MR>
PEFTOPS_INLINE void tile(const Product& t, int64_t i, int64_t c, const uint32_t* w,
                         const uint32_t* b) {
  for (int e = 0; e < MR; ++e)  // out is fetched while the sums are made
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
        lo = _mm512_add_ps(lo, low(y0));
        hi = _mm512_add_ps(hi, high(y0));
      }
      if (t.z) _mm512_mask_storeu_epi16(t.z + at, mask32(count), narrow32(lo, hi));
      if (t.gain) {
        lo = _mm512_mul_ps(lo, _mm512_maskz_loadu_ps(mask16(count), t.gain + c + 16 * v));
        hi = _mm512_mul_ps(hi,
                           _mm512_maskz_loadu_ps(mask16(count - 16), t.gain + c + 16 * v + 16));
      }
      if (t.bias) {
        lo = _mm512_add_ps(lo, _mm512_maskz_loadu_ps(mask16(count), t.bias + c + 16 * v));
        hi = _mm512_add_ps(hi,
                           _mm512_maskz_loadu_ps(mask16(count - 16), t.bias + c + 16 * v + 16));
      }
      if (count >= 32)
        _mm512_storeu_si512(t.out + at, narrow32(lo, hi));
      else
        _mm512_mask_storeu_epi16(t.out + at, mask32(count), narrow32(lo, hi));
    }
}

// What one thread does; see by_panels.
template <class W, class B, class H>
struct Worker {
  const Product& t;
  W pack_w;     // pack_w(out, c) packs the 64 columns of w from c on
  B pack_b;     // the same of b
  H hint;       // hint(c, i, j) prefetches what pack_w(out, c) reads for the part [i, j) of k
  uint32_t* w;  // the base's panel
  uint32_t* b;  // LoRA's panel

  Worker(const Product& t, W pack_w, B pack_b, H hint)
      : t(t), pack_w(pack_w), pack_b(pack_b), hint(hint) {
    w = t_panel.get<uint32_t>((t.k + 1) / 2 * PANEL);
    b = t_delta.get<uint32_t>((t.r + 1) / 2 * PANEL);
  }

  void pack(const Panel& panel) {
    if (t.x) pack_w(w, panel.c);
    pack_b(b, panel.c);
  }

  void rows(const Panel& panel, int64_t begin, int64_t end) {
    by_rows<ROWS, 4, 2, 1>(begin, end, [&](int64_t i, auto count) {
      constexpr int MR = decltype(count)::value;
      const int64_t done = i - panel.first;
      if (t.x) hint(panel.next, t.k * done / panel.rows, t.k * (done + MR) / panel.rows);
      if (t.x && !panel.c) prefetch(t.x + (i + MR) * t.k, 0, 1, MR * t.k);
      tile<MR>(t, i, panel.c, w, b);
    });
  }
};

template <class W, class B, class H>
void product(const Product& t, W pack_w, B pack_b, H hint) {
  by_panels(t.m, t.n, t.m * t.n * (t.k + t.r),
            [&] { return Worker<W, B, H>(t, pack_w, pack_b, hint); });
}

// The product for any form of base. A dense base (n, k) is packed along its columns, a
// transposed one (k, n) along its rows; backward it is the other way round.
//   delta: LoRA's b (n, r), or backward its a (r, k)
//   gain: (k,) multiplies the rows of w, or null
void product_with(const Product& t, Form form, int64_t block, bool backward, Tensors base,
                  Tensor delta, const float* gain) {
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
        with_operand<bf16>(delta, [&](auto* from) {
          if (backward)
            pack_rows(from + c, t.n, t.r, min(PANEL, t.n - c), out, PANEL);
          else
            pack_columns(from + c * t.r, t.r, min(PANEL, t.n - c), t.r, out, PANEL);
        });
      },
      [&](int64_t c, int64_t i, int64_t j) {
        if (form == Form::nf4 && along_rows)
          for (; i < j; ++i)
            _mm_prefetch((const char*)(codes.codes + (i * t.n + c) / 2), _MM_HINT_T0);
        else if (form == Form::nf4)
          for (int64_t at = (c * t.k + i * PANEL) / 2; at < (c * t.k + j * PANEL) / 2; at += 64)
            _mm_prefetch((const char*)(codes.codes + at), _MM_HINT_T0);
        else if (along_rows)
          prefetch(as<bf16>(w) + i * t.n + c, t.n, j - i, PANEL);
        else
          prefetch(as<bf16>(w) + c * t.k + i * PANEL, 0, 1, (j - i) * PANEL);
      });
}

// (m, columns) = h if there is no gate, else h once for each expert, times the expert's gate.
// scratch: memory for the result
bf16* gated(Tensor h, Tensor gate, int64_t columns, Scratch& scratch) {
  if (!gate.data) return as<bf16>(h);
  const int64_t m = h.shape[0], r = h.shape[1];
  const int64_t experts = gate.shape[1], each = columns / experts;
  bf16* out = scratch.get<bf16>(m * columns);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j)
      narrow(widen(as<bf16>(h)[i * r + j % r]) * as<float>(gate)[i * experts + j / each],
             out + i * columns + j);
  return out;
}

}  // namespace
}  // namespace peftops::ISA
