// DoRA's norm in fp32 arithmetic, for every dtype and instruction set, and the two passes that
// DoRA with dropout needs in addition.
#include "dora.h"

#include "ops.h"

namespace peftops::ISA {
namespace {

// The engine of dora.h for floats: a step is one rank.
struct Fma {
  using Item = float;
  using Vector = vec;
  // Steps of one sum. If b·a cancels Ŵ, the errors of a longer sum would remain.
  static constexpr int64_t CHAIN = 8;

  static int64_t steps(int64_t r) { return r; }
  static Vector load(const Item* w) { return *(const vec_at*)w; }
  static vec multiply(Vector w, Item x, vec sum) { return fma(w, x - vec{}, sum); }

  // t (r, columns), or its transpose if t is (columns, r), rounded to T.
  template <class T>
  static Operand<Fma> pack(Tensor t, bool transposed, Scratch& scratch) {
    const int64_t r = t.shape[transposed ? 1 : 0], columns = t.shape[transposed ? 0 : 1];
    const int64_t ld = Operand<Fma>::padded(columns);
    const int64_t down = transposed ? 1 : columns, along = transposed ? r : 1;
    Item* out = scratch.get<Item>(r * ld);
    with_type(t.dtype, [&](auto e) {
      const auto* from = as<decltype(e)>(t);
#pragma omp parallel for num_threads(threads_for(8 * r * columns)) schedule(static)
      for (int64_t j = 0; j < r; ++j) {
        for (int64_t i = 0; i < columns; ++i)
          out[j * ld + i] = rounded<T>(widen(from[j * down + i * along]));
        for (int64_t i = columns; i < ld; ++i) out[j * ld + i] = 0;
      }
    });
    return {out, ld};
  }
  template <class T>
  static Operand<Fma> of_a(Tensor a) {
    return pack<T>(a, false, t_a);
  }
  template <class T>
  static Operand<Fma> of_b(Tensor b) {
    return pack<T>(b, true, t_b);
  }
};

// mask ⊙ factor · v for the columns from c on. Without bits all are kept.
PEFTOPS_INLINE vec drop(vec v, const uint8_t* bits, int64_t c, float factor) {
  v *= all(factor);
  return bits ? kept(v, bits_at(bits, c)) : v;
}

// dropped = drop(x), rest = x - dropped. bits: the row's mask
template <class T>
void drop_row(T* dropped, T* rest, const T* x, const uint8_t* bits, int64_t k, float factor) {
  for (int64_t c = 0; c < k; c += LANES) {
    const vec every = load(x + c, k - c), some = drop(every, bits, c, factor);
    store(dropped + c, some, k - c);
    store(rest + c, every - some, k - c);
  }
}

// out = drop(u) + v - drop(v). v may be null; without bits all are kept.
template <class T>
void mix_row(T* out, const T* u, const T* v, const uint8_t* bits, int64_t k, float factor) {
  for (int64_t c = 0; c < k; c += LANES) {
    vec sum = drop(load(u + c, k - c), bits, c, factor);
    if (v) {
      const vec other = load(v + c, k - c);
      sum += other - drop(other, bits, c, factor);
    }
    store(out + c, sum, k - c);
  }
}

}  // namespace

void dora_norm(Tensor n, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale, Form form,
               int64_t block) {
  with_type(x.dtype,
            [&](auto e) { norm<Fma, decltype(e)>(n, x, base, a, b, scale, form, block); });
}

void dora_drop(Tensor dropped, Tensor rest, Tensor bits, Tensor x, Tensor seed, double p) {
  const int64_t m = x.shape[0], k = x.shape[1], bytes = mask_bytes(k);
  const Philox generator(*as<uint64_t>(seed), p);
  with_type(x.dtype, [&](auto e) {
    using T = decltype(e);
#pragma omp parallel for num_threads(threads_for(8 * m * k)) schedule(static)
    for (int64_t i = 0; i < m; ++i) {
      uint8_t* keep = as<uint8_t>(bits) + i * bytes;
      generator.draw(keep, i, bytes);
      drop_row(as<T>(dropped) + i * k, as<T>(rest) + i * k, as<T>(x) + i * k, keep, k,
               dropout_factor(p));
    }
  });
}

void dora_mix(Tensor out, Tensor u, Tensor v, Tensor bits, double p) {
  const int64_t m = u.shape[0], k = u.shape[1], bytes = mask_bytes(k);
  with_type(u.dtype, [&](auto e) {
    using T = decltype(e);
#pragma omp parallel for num_threads(threads_for(2 * m * k)) schedule(static)
    for (int64_t i = 0; i < m; ++i)
      mix_row(as<T>(out) + i * k, as<T>(u) + i * k, v.data ? as<T>(v) + i * k : nullptr,
              p ? as<uint8_t>(bits) + i * bytes : nullptr, k, dropout_factor(p));
  });
}

}  // namespace peftops::ISA
