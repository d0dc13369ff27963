// LoRA's backward pass in fp32 arithmetic, for every dtype and instruction set. One read of dy
// makes both u = dy·b and b's gradient; u gives the gradients of h and gate; then come dx, by
// the product of product.h, and a's gradient, from a read of x.
#include "ops.h"
#include "product.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_tile;  // of each thread of a team
// Of the caller, read by its team.
thread_local Scratch t_b, t_h, t_turned, t_parts, t_sum, t_grad, t_dh;

constexpr int64_t WIDE = 64;       // columns of a tile
constexpr int64_t HIGH = 64;       // rows of a tile, which stays in the nearest cache
constexpr int64_t LD = WIDE + 16;  // from row to row, so that rows do not share a cache set

// out (n, pad16(r)) = gain ⊙ b, where b is rounded to T before, with zeros beyond.
template <class T>
float* pack_b(Tensor b, const float* gain) {
  const int64_t n = b.shape[0], r = b.shape[1], width = pad16(r);
  float* out = t_b.get<float>(n * width);
  with_operand<T>(b, [&](const auto* from) {
#pragma omp parallel for num_threads(threads_for(8 * n * r)) schedule(static)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < width; j += LANES) {
        const vec v = load_as<T>(from + i * r + j, r - j);
        store(out + i * width + j, gain ? v * all(gain[i]) : v);
      }
  });
  return out;
}

// hᵀ (pad16(r), m), with zeros beyond.
struct Turned {
  const float* at;
  int64_t ld;  // from row to row
};

Turned turned(const float* h, int64_t m, int64_t r) {
  const int64_t ld = pad16(m) + 16;
  float* out = t_turned.get<float>(pad16(r) * ld);
  for (int64_t i = 0; i < m; i += LANES)
    transpose_into<float>(h + i * r, r, m - i, r, out + i, ld);
  for (int64_t j = r; j < pad16(r); ++j) memset(out + j * ld, 0, size_t(m) * sizeof(float));
  return {out, ld};
}

// u (m, padded) = t·b and v (padded, ldv) = hᵀ·drop(t) in one read of t (m, n). u or v may be
// null. A group of columns is one thread's, however many threads there are, and groups are
// added in order, so that the result has the same bits every time. bits: the mask of t, or null
template <class T>
void reduce(float* u, float* v, int64_t ldv, Tensor t, const uint8_t* bits, Turned h,
            const float* b, int64_t padded) {
  const int64_t m = t.shape[0], n = t.shape[1], bytes = mask_bytes(n);
  const int64_t groups = min(u ? 4 : 8, ceil_div(n, WIDE));
  if (v) memset(v, 0, size_t(padded * ldv) * sizeof(float));
  float* parts = u ? t_parts.get<float>(groups * m * padded) : nullptr;
  const int threads = threads_for(m * n * padded);
  const auto share = [&](int64_t group) {
    const int64_t begin = group * n / groups / 32 * 32;
    const int64_t end = group + 1 < groups ? (group + 1) * n / groups / 32 * 32 : n;
    float* tile = t_tile.get<float>(HIGH * LD);
    for (int64_t i0 = 0; i0 < m; i0 += HIGH)
      for (int64_t c0 = begin; c0 < end; c0 += WIDE) {
        const int64_t rows = min(HIGH, m - i0), columns = min(WIDE, end - c0);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = i0 + i;
          widen_row(as<T>(t) + row * n + c0, columns,
                    bits ? bits + row * bytes + c0 / 8 : nullptr, tile + i * LD);
        }
        if (u)
          multiply_into(parts + (group * m + i0) * padded, padded, c0 > begin, tile, LD, rows,
                        columns, b + c0 * padded, padded, padded);
        if (v)
          multiply_into(v + c0, ldv, true, h.at + i0, h.ld, padded, rows, tile, LD,
                        pad16(columns));
      }
  };
  Team team;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) team.run([&] { share(group); });
  team.finish();
  for (int64_t i = 0; u && i < m * padded; i += LANES) {
    vec sum = load(parts + i);
    for (int64_t g = 1; g < groups; ++g) sum += load(parts + g * m * padded + i);
    store(u + i, sum);
  }
}

// Returns h's gradient (m, r), rounded to T, and stores gate's. u (m, padded) times s is the
// gradient of the gated h, which has `columns` columns.
template <class T>
float* ungated(Tensor dgate, Tensor h, Tensor gate, const float* u, int64_t columns,
               int64_t padded, float s) {
  const int64_t m = h.shape[0], r = h.shape[1];
  float* dh = t_dh.get<float>(m * r);
  if (!gate.data) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < r; j += LANES)
        store(dh + i * r + j, round_to(load(u + i * padded + j) * all(s), T{}), r - j);
    return dh;
  }
  const int64_t experts = gate.shape[1], each = columns / experts;
  for (int64_t i = 0; i < m; ++i) {
    float* sum = dh + i * r;
    for (int64_t j = 0; j < r; ++j) sum[j] = 0;
    for (int64_t e = 0; e < experts; ++e) {
      float part = 0;
      for (int64_t j = e * each; j < (e + 1) * each; ++j) {
        const float d = s * u[i * padded + j];
        sum[j % r] += as<float>(gate)[i * experts + e] * d;
        part += d * widen(as<T>(h)[i * r + j % r]);
      }
      if (dgate.data) as<float>(dgate)[i * experts + e] = part;
    }
    for (int64_t j = 0; j < r; ++j) sum[j] = rounded<T>(sum[j]);
  }
  return dh;
}

// lora_bwd of ops.h. factor: 1 / (1 - p)
template <class T>
void backward(Tensor dx, Tensor da, Tensor db, Tensor dgate, Tensor dy, Tensor x, Tensors base,
              Tensor a, Tensor b, float s, Tensor h, const uint8_t* bits, const float* gain,
              Tensor gate, Form form, int64_t block, float factor) {
  const int64_t m = x.shape[0], k = x.shape[1], n = b.shape[0], r = a.shape[0];
  const int64_t columns = b.shape[1];
  const int64_t padded = pad16(columns), ranks = pad16(r), ldv = pad16(n), ldk = pad16(k);
  const bool inner = dx.data || da.data || dgate.data;  // what needs u
  float* u = inner ? t_sum.get<float>(m * padded) : nullptr;
  float* v = db.data ? t_grad.get<float>(padded * ldv) : nullptr;
  const Turned hp = v ? turned(gated<T>(h, gate, columns, t_h), m, columns) : Turned{};
  if (u || v) reduce<T>(u, v, ldv, dy, nullptr, hp, u ? pack_b<T>(b, gain) : nullptr, padded);
  if (v) store_gradient<T>(db, v, ldv, true, s, gain);
  if (!inner) return;

  const float* dh = ungated<T>(dgate, h, gate, u, columns, padded, s);
  if (dx.data) {
    Product t{};
    t.out = dx;
    if (form != Form::given) t.x = dy;
    t.h = dh;
    t.m = m;
    t.n = k;
    t.k = n;
    t.r = r;
    t.s = factor;
    t.bits = bits;
    t.base = base;
    t.form = form;
    t.block = block;
    t.delta = a;
    t.backward = true;
    t.row_gain = gain;
    product(t);
  }
  if (da.data) {
    v = t_grad.get<float>(ranks * ldk);
    reduce<T>(nullptr, v, ldk, x, bits, turned(dh, m, r), nullptr, ranks);
    store_gradient<T>(da, v, ldk, false, factor, nullptr);
  }
}

// dbias = Σ dy and dgain = Σ dy ⊙ z over the rows, as sums of sums of 16 rows.
template <class T>
void sums(Tensor dbias, Tensor dgain, Tensor dy, Tensor z) {
  const int64_t m = dy.shape[0], n = dy.shape[1], tall = 16;
  const int threads = threads_for(m * n);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c0 = 0; c0 < n; c0 += WIDE) {
    const int64_t some = min(WIDE, n - c0);
    float total[2][WIDE] = {};
    for (int64_t i0 = 0; i0 < m; i0 += tall) {
      float part[2][WIDE] = {};
      for (int64_t i = i0; i < min(m, i0 + tall); ++i) {
        const T *t_dy = as<T>(dy) + i * n + c0, *t_z = as<T>(z) + i * n + c0;
        for (int64_t c = 0; dbias.data && c < some; ++c) part[0][c] += widen(t_dy[c]);
        for (int64_t c = 0; dgain.data && c < some; ++c)
          part[1][c] += widen(t_dy[c]) * widen(t_z[c]);
      }
      for (int64_t c = 0; c < WIDE; ++c) {
        total[0][c] += part[0][c];
        total[1][c] += part[1][c];
      }
    }
    with_operand<T>(dbias, [&](auto* out) {
      for (int64_t c = 0; out && c < some; ++c) narrow(total[0][c], out + c0 + c);
    });
    if (dgain.data) memcpy(as<float>(dgain) + c0, total[1], size_t(some) * sizeof(float));
  }
}

}  // namespace

void lora_bwd(Tensor dx, Tensor da, Tensor db, Tensor dgate, Tensor dy, Tensor x, Tensors base,
              Tensor a, Tensor b, Tensor scale, Tensor h, Tensor bits, Tensor gain, Tensor gate,
              Form form, int64_t block, double p) {
  with_type(x.dtype, [&](auto e) {
    backward<decltype(e)>(dx, da, db, dgate, dy, x, base, a, b, *as<float>(scale), h,
                          as<uint8_t>(bits), as<float>(gain), gate, form, block,
                          dropout_factor(p));
  });
}

void lora_sums(Tensor dbias, Tensor dgain, Tensor dy, Tensor z) {
  with_type(dy.dtype, [&](auto e) { sums<decltype(e)>(dbias, dgain, dy, z); });
}

}  // namespace peftops::ISA
