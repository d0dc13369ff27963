// DoRA's norm in bf16 on AVX-512 with dot products, which multiply two ranks at a time.
#ifdef __AVX512BW__
#include <immintrin.h>
#pragma GCC target("avx512bf16")
#include "dora.h"
#include "ops.h"
#include "tile_bf16.h"

namespace peftops::ISA {
namespace {

// The engine of dora.h for pairs of bf16: a step is two ranks.
struct Dots {
  using Item = uint32_t;
  using Vector = __m512bh;
  static constexpr int64_t CHAIN = 64;  // steps of one sum

  static int64_t steps(int64_t r) { return (r + 1) / 2; }
  static Vector load(const Item* w) { return pairs(w); }
  static vec multiply(Vector w, Item x, vec sum) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32(int32_t(x)));
  }

  template <class T>
  static Operand<Dots> of_a(Tensor a) {
    const int64_t r = a.shape[0], k = a.shape[1], ld = Operand<Dots>::padded(k);
    Item* out = t_a.get<Item>(steps(r) * ld);
    with_operand<bf16>(a, [&](auto* from) { pack_rows(from, k, r, k, out, ld); });
    return {out, ld};
  }

  template <class T>
  static Operand<Dots> of_b(Tensor b) {
    const int64_t n = b.shape[0], r = b.shape[1], ld = Operand<Dots>::padded(n);
    Item* out = t_b.get<Item>(steps(r) * ld);
    with_operand<bf16>(b, [&](auto* from) {
#pragma omp parallel for num_threads(threads_for(8 * n * r)) schedule(static)
      for (int64_t i = 0; i < n; i += PANEL)
        pack_columns(from + i * r, r, min(PANEL, n - i), r, out + i, PANEL, nullptr, ld);
    });
    return {out, ld};
  }
};

}  // namespace

void dora_norm_bf16(Tensor n, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale,
                    Form form, int64_t block) {
  norm<Dots, bf16>(n, x, base, a, b, scale, form, block);
}

}  // namespace peftops::ISA
#endif
