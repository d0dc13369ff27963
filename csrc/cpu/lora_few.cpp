// LoRA for few rows in fp32 arithmetic, for every dtype and instruction set. Reading the weight
// takes much of the time, so it is read once, as it is stored, and not packed.
#include "dots.h"
#include "few.h"
#include "nf4.h"
#include "ops.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_few, t_bias;         // of the caller, read by its team
thread_local Scratch t_decoded, t_columns;  // of each thread

// Rows of x up to which sums run along the rows of the weight: of floats, 16 bits and 4 bits.
constexpr int64_t ALONE_F32 = 2, ALONE_16 = 4, ALONE_NF4 = 12;
constexpr int COLUMNS = 4;  // rows of the weight that are read side by side then

// The arguments of the op, and memory: rows of x as floats, h and s · (gate ⊙ h).
template <class T>
struct Few {
  Tensor y;          // (m, n), in T or fp32
  const T* base;     // (n, k), or null if it has 4 bits
  const NF4* codes;  // of a 4-bit base, or null
  Tensor a;          // (r, k)
  Tensor b;          // (n, columns)
  Tensor gate;       // (m, experts), or without data
  float s;
  const float *gain, *bias;  // (n,), or null
  int64_t m, n, k, r, columns;
  float *x, *h, *hs;

  // Rows of a 4-bit base, until the thread's next call.
  const T* decoded(int64_t first, int64_t rows) const {
    T* out = t_decoded.get<T>(rows * k);
    for (int64_t i = 0; i < rows; ++i) decode(*codes, (first + i) * k, k, out + i * k);
    return out;
  }

  // hs = s · (gate ⊙ h), with h and its product with the gate rounded to T. Element (i, j) of a
  // matrix lies at i · row + j · column.
  void scale_h(int64_t row_of_h, int64_t row_of_hs, int64_t column) const {
    const int64_t experts = gate.data ? gate.shape[1] : 1, each = columns / experts;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float value = rounded<T>(h[i * row_of_h + j % r * column]);
        if (gate.data) value = rounded<T>(value * as<float>(gate)[i * experts + j / each]);
        hs[i * row_of_hs + j * column] = s * value;
      }
  }
};

// Rows of x that are few even here. x is (m, k), h (m, r) and hs (m, columns).
template <class T>
struct Alone {
  const Few<T>& t;

  // sums (X, W) = x · w for W rows of a weight, or += if `add`.
  template <int W, int X, class From>
  static void add_dots(const From* w, const float* x, int64_t k, bool add, float* sums,
                       int64_t ld) {
    constexpr int64_t step = CHAIN * LANES;  // so that each lane adds CHAIN terms
    constexpr int SOME = W < BESIDE<X> ? W : BESIDE<X>;
    for (int64_t c = 0; c < max(k, 1); c += step)
      for (int e = 0; e < W; e += SOME)
        put_dots<T, SOME, X, false>(w + e * k + c, k, x + c, k, min(step, k - c), add || c,
                                    sums + e, ld, w);
  }

  // W columns of y, from column c on.
  template <int W>
  void columns_from(int64_t c) const {
    const T* w = t.codes ? t.decoded(c, W) : t.base + c * t.k;
    by_rows<4, 3, 2, 1>(0, t.m, [&](int64_t i, auto rows) {
      constexpr int X = decltype(rows)::value;
      float sums[X * W];
      with_operand<T>(t.b, [&](const auto* b) {
        add_dots<W, X>(b + c * t.columns, t.hs + i * t.columns, t.columns, false, sums, W);
      });
      add_dots<W, X>(w, t.x + i * t.k, t.k, true, sums, W);
      with_operand<T>(t.y, [&](auto* y) {
        for (int q = 0; q < X; ++q)
          for (int e = 0; e < W; ++e) {
            float value = sums[q * W + e];
            if (t.gain) value *= t.gain[c + e];
            if (t.bias) value += t.bias[c + e];
            narrow(value, y + (i + q) * t.n + c + e);
          }
      });
    });
  }

  void run(const T* x) const {
    widen_row(x, t.m * t.k, nullptr, t.x);
    with_operand<T>(t.a, [&](const auto* a) {
#pragma omp parallel for num_threads(threads_for(t.m* t.r* t.k)) schedule(static)
      for (int64_t j = 0; j < t.r; ++j)
        by_rows<4, 3, 2, 1>(0, t.m, [&](int64_t i, auto rows) {
          add_dots<1, decltype(rows)::value>(a + j * t.k, t.x + i * t.k, t.k, false,
                                             t.h + i * t.r + j, t.r);
        });
    });
    t.scale_h(t.r, t.columns, 1);
    Team team;
#pragma omp parallel for num_threads(threads_for_few(t.m, t.n, t.k)) schedule(static)
    for (int64_t c = 0; c < t.n; c += COLUMNS)
      team.run([&] {
        if (c + COLUMNS <= t.n) return columns_from<COLUMNS>(c);
        for (int64_t at = c; at < t.n; ++at) columns_from<1>(at);
      });
    team.finish();
  }
};

// More rows of x, which lie side by side: x is (k, ld), h (r, ld) and hs (columns, ld).
template <class T>
struct Together {
  const Few<T>& t;
  int64_t ld;

  // Up to TALL columns of y, from c on.
  void columns_from(int64_t c, int64_t count) const {
    float* sums = t_columns.get<float>(TALL * ld);
    with_operand<T>(t.b, [&](const auto* b) {
      multiply_side_by_side(dense_rows<T>(b, t.columns), c, count, t.hs, ld, t.columns, false,
                            sums);
    });
    if (t.codes)
      add_coded(c, count, sums);
    else
      multiply_side_by_side(dense_rows<T>(t.base, t.k), c, count, t.x, ld, t.k, true, sums);
    for (int64_t j = 0; j < count; j += LANES)
      for (int64_t i = 0; i < t.m; i += LANES) store_square(c + j, i, sums + j * ld + i);
  }

  // sums += the product with rows of a 4-bit base. A few are decoded at a time, to stay in a
  // cache.
  void add_coded(int64_t first, int64_t count, float* sums) const {
    for (int64_t e = 0; e < count; e += SUMS) {
      const int64_t rows = min(SUMS, count - e);
      const T* w = t.decoded(first + e, rows);
      multiply_side_by_side(dense_rows<T>(w, t.k), 0, rows, t.x, ld, t.k, true, sums + e * ld);
    }
  }

  // LANES columns of LANES rows of y.
  void store_square(int64_t c, int64_t i, const float* sums) const {
    const int64_t left = t.n - c;
    vec v[LANES];
    for (int e = 0; e < LANES; ++e) v[e] = e < left ? load(sums + e * ld) : vec{};
    transpose(v);
    for (int e = 0; e < min(LANES, t.m - i); ++e) {
      if (t.gain) v[e] *= load(t.gain + c, left);
      if (t.bias) v[e] += load(t.bias + c, left);
      with_operand<T>(t.y, [&](auto* y) { store(y + (i + e) * t.n + c, v[e], left); });
    }
  }

  void run(const T* x) const {
    constexpr int64_t some = SUMS / WIDEST;  // rows of a
    lay_side_by_side(x, t.m, t.k, t.x, ld);
    with_operand<T>(t.a, [&](const auto* a) {
#pragma omp parallel for num_threads(threads_for(t.m* t.r* t.k)) schedule(static)
      for (int64_t j = 0; j < t.r; j += some)
        multiply_side_by_side(dense_rows<T>(a, t.k), j, min(some, t.r - j), t.x, ld, t.k, false,
                              t.h + j * ld);
    });
    t.scale_h(1, 1, ld);
    const int threads = threads_for_few(t.m, t.n, t.k);
    by_columns(t.n, threads, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c += TALL) columns_from(c, min(TALL, end - c));
    });
  }
};

}  // namespace

void lora_few(Tensor y, Tensor x, Tensors base, Tensor a, Tensor b, Tensor scale, Tensor bias,
              Tensor gain, Tensor gate, Form form, int64_t block) {
  const NF4 codes(base, form == Form::nf4 ? block : 0);
  with_type(x.dtype, [&](auto e) {
    using T = decltype(e);
    Few<T> few{};
    few.y = y;
    if (form == Form::nf4)
      few.codes = &codes;
    else
      few.base = as<T>(base.at[0]);
    few.a = a;
    few.b = b;
    few.gate = gate;
    few.gain = as<float>(gain);
    few.bias = as_float<T>(bias, t_bias);
    few.m = x.shape[0];
    few.n = b.shape[0];
    few.k = x.shape[1];
    few.r = a.shape[0];
    few.columns = b.shape[1];
    few.s = few.columns ? *as<float>(scale) : 0;  // multi-LoRA without an adapter has none
    const int64_t ld = ceil_div(few.m, LANES) * LANES;
    few.x = t_few.get<float>(pad16(few.k * ld) + (few.r + few.columns) * ld);
    few.h = few.x + pad16(few.k * ld);
    few.hs = few.h + few.r * ld;
    const int64_t alone = few.codes ? ALONE_NF4 : sizeof(T) < 4 ? ALONE_16 : ALONE_F32;
    if (few.m <= alone)
      Alone<T>{few}.run(as<T>(x));
    else
      Together<T>{few, ld}.run(as<T>(x));
  });
}

}  // namespace peftops::ISA
