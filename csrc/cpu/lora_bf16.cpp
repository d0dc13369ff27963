// LoRA's forward pass in bf16 on AVX-512 with dot products. First h = drop(x)·aᵀ is made, then
// the whole of y by the product of product_bf16.h.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "ops.h"
#include "product_bf16.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_a, t_h, t_bias;  // of the caller, read by its team

// out[⌈k / 2⌉][pad16(r)] = pairs along the rows of a (r, k).
uint32_t* pack_a(Tensor a) {
  const int64_t r = a.shape[0], k = a.shape[1], width = pad16(r), step = 512;
  uint32_t* out = t_a.get<uint32_t>((k + 1) / 2 * width);
  with_operand<bf16>(a, [&](auto* from) {
#pragma omp parallel for num_threads(threads_for(32 * r * k))
    for (int64_t c = 0; c < k; c += step)
      pack_columns(from + c, k, r, min(step, k - c), out + c / 2 * width, width);
  });
  return out;
}

// Rows of x as they are, or copies in which what is dropped is zero. bits: the rows' masks, or
// null
const bf16* dropped(const bf16* x, int64_t k, const uint8_t* bits, int64_t rows) {
  if (!bits) return x;
  const int64_t bytes = mask_bytes(k), ld = 8 * bytes;
  bf16* to = t_rows.get<bf16>(rows * ld);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < k; c += 32) {
      uint32_t word;
      memcpy(&word, bits + i * bytes + c / 8, 4);
      _mm512_storeu_si512(to + i * ld + c,
                          _mm512_maskz_loadu_epi16(word & mask32(k - c), x + i * k + c));
    }
  return to;
}

// h = factor · drop(x)·aᵀ.
//   bits: receives the mask; generator: of the mask, or null if nothing is dropped
void shrink(Tensor h, uint8_t* bits, Tensor x, Tensor a, const Philox* generator,
            float factor) {
  const int64_t m = x.shape[0], k = x.shape[1], r = a.shape[0];
  const int64_t padded = pad16(r), bytes = mask_bytes(k);
  const uint32_t* ap = pack_a(a);
  const auto rows_from = [&](int64_t block) {
    const int64_t end = min(block + 8, m);
    if (generator)
      for (int64_t i = block; i < end; ++i) generator->draw(bits + i * bytes, i, bytes);
    prefetch(as<bf16>(x) + end * k, k, min(8, m - end), k);
    const bf16* from =
        dropped(as<bf16>(x) + block * k, k, bits ? bits + block * bytes : nullptr, end - block);
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
            const __m256i out =
                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(acc[t][v], _mm512_set1_ps(factor)));
            _mm256_mask_storeu_epi16(as<bf16>(h) + (i + t) * r + j, mask16(r - j), out);
          }
      });
    });
  };
  Team team;
#pragma omp parallel for num_threads(threads_for(m * k * padded)) schedule(static)
  for (int64_t block = 0; block < m; block += 8) team.run([&] { rows_from(block); });
  team.finish();
}

}  // namespace

void lora_fwd_bf16(Tensor y, Tensor h, Tensor bits, Tensor z, Tensor x, Tensors base, Tensor a,
                   Tensor b, Tensor scale, Tensor bias, Tensor gain, Tensor gate, Tensor seed,
                   Form form, int64_t block, double p) {
  const Philox generator(p ? *as<uint64_t>(seed) : 0, p);
  shrink(h, as<uint8_t>(bits), x, a, p ? &generator : nullptr, dropout_factor(p));
  Product t{};
  t.out = as<bf16>(y);
  t.z = as<bf16>(z);
  if (form == Form::given)
    t.y0 = as<bf16>(base.at[0]);
  else
    t.x = as<bf16>(x);
  t.h = gated(h, gate, b.shape[1], t_h);
  t.m = x.shape[0];
  t.n = b.shape[0];
  t.k = x.shape[1];
  t.r = b.shape[1];
  t.s = *as<float>(scale);
  t.gain = as<float>(gain);
  t.bias = as_float<bf16>(bias, t_bias);
  product_with(t, form, block, false, base, b, nullptr);
}

}  // namespace peftops::ISA
#endif
