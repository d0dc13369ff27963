// Multi-LoRA in fp32 arithmetic, for every dtype and instruction set. Rows are walked in the
// order of their slots, so that rows of one adapter are multiplied together; the base's product
// is that of product.h. Many adapters have few rows each, so none is packed for h or dh.
#include "multi.h"

#include "multi_expand.h"
#include "multi_shrink.h"
#include "ops.h"

namespace peftops::ISA {
namespace {

thread_local Scratch t_rows;  // of each thread of a team
// Of the caller, read by its team.
thread_local Scratch t_h, t_bias, t_dz, t_turned, t_dh, t_owned, t_added;

constexpr int64_t WIDE = 64;       // columns of a tile
constexpr int64_t HIGH = 64;       // rows of a tile, which stays in the nearest cache
constexpr int64_t LD = WIDE + 16;  // from row to row, so that rows do not share a cache set

// dz (m, n) = gain[slot] ⊙ dy, rounded to T.
template <class T>
Tensor gained(const Route& route, Tensor dy, const float* gain) {
  const int64_t m = dy.shape[0], n = dy.shape[1];
  T* out = t_dz.get<T>(m * n);
#pragma omp parallel for num_threads(threads_for(4 * m * n)) schedule(static)
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < n; c += LANES) {
      vec v = load(as<T>(dy) + i * n + c, n - c);
      if (route.slots[i] >= 0) v *= load(gain + route.slots[i] * n + c, n - c);
      store(out + i * n + c, v, n - c);
    }
  dy.data = out;
  return dy;
}

// dgain = Σ dy ⊙ z over the rows of each slot, as sums of sums of 16 rows.
template <class T>
void sum_gain(const Route& route, Tensor dgain, Tensor dy, Tensor z) {
  const int64_t n = dy.shape[1], tall = 16, parts = ceil_div(n, WIDE);
  memset(dgain.data, 0, size_t(dgain.shape[0] * n) * sizeof(float));
#pragma omp parallel for num_threads(threads_for(2 * route.m * n)) schedule(dynamic)
  for (int64_t item = 0; item < route.count * parts; ++item) {
    const Run& run = route.runs[item / parts];
    const int64_t c0 = item % parts * WIDE, some = min(WIDE, n - c0);
    float total[WIDE] = {};
    for (int64_t i0 = run.begin; i0 < run.end; i0 += tall) {
      float part[WIDE] = {};
      for (int64_t i = i0; i < min(run.end, i0 + tall); ++i) {
        const int64_t at = route.order[i] * n + c0;
        for (int64_t c = 0; c < some; ++c)
          part[c] += widen(as<T>(dy)[at + c]) * widen(as<T>(z)[at + c]);
      }
      for (int64_t c = 0; c < WIDE; ++c) total[c] += part[c];
    }
    if (run.slot >= 0)
      memcpy(as<float>(dgain) + run.slot * n + c0, total, size_t(some) * sizeof(float));
  }
}

// hᵀ (ldh, ld), whose columns are rows of h in the order of the route. What is beyond a row's
// rank is undefined.
struct Turned {
  const float* at;
  int64_t ld;  // from row to row
};

Turned turned(const Route& route, const float* h, int64_t ldh) {
  const int64_t ld = pad16(route.m) + 16;
  float* out = t_turned.get<float>(ldh * ld);
  // What a run writes beyond its own columns is written again by the next one.
  for (const Run* run = route.runs; run < route.runs + route.count; ++run)
    for (int64_t i = run->begin; i < run->end; i += LANES) {
      const int64_t count = min(LANES, run->end - i), *row = route.order + i;
      if (row[count - 1] - row[0] == count - 1) {
        transpose_into<float>(h + row[0] * ldh, ldh, count, run->r, out + i, ld);
        continue;
      }
      for (int64_t e = 0; e < count; ++e)
        for (int64_t j = 0; j < run->r; ++j) out[j * ld + i + e] = h[row[e] * ldh + j];
    }
  return {out, ld};
}

// out (R, columns) = s · hᵀ·drop(t) in the rank-rows of each run, and zeros elsewhere. Each
// element is one thread's, so that the result has the same bits every time.
template <class T>
struct Reduction {
  const Route& route;
  Tensor out;
  Tensor t;             // (m, columns)
  const uint8_t* bits;  // the mask of t, or null
  Turned h;
  const Adapter* of;  // by slot; their s is that of the formula

  // For WIDE columns of a run from c on.
  void sum_run(const Run& run, int64_t c) const {
    const int64_t columns = t.shape[1], bytes = mask_bytes(columns);
    const int64_t some = min(WIDE, columns - c);
    float* tile = t_rows.get<float>((HIGH + run.r) * LD);
    float* v = tile + HIGH * LD;
    for (int64_t i = run.begin; i < run.end; i += HIGH) {
      const int64_t rows = min(HIGH, run.end - i);
      for (int64_t e = 0; e < rows; ++e) {
        const int64_t row = route.order[i + e];
        widen_row(as<T>(t) + row * columns + c, some,
                  bits ? bits + row * bytes + c / 8 : nullptr, tile + e * LD);
      }
      multiply_into(v, LD, i > run.begin, h.at + i, h.ld, run.r, rows, tile, LD, pad16(some));
    }
    with_operand<T>(out, [&](auto* to) {
      for (int64_t j = 0; j < run.r; ++j)
        for (int64_t at = 0; at < some; at += LANES)
          store(to + route.lines[run.first + j] * columns + c + at,
                load(v + j * LD + at) * all(of[run.slot].s), some - at);
    });
  }

  void sum_all() const {
    clear_others();
    const int64_t columns = t.shape[1], parts = ceil_div(columns, WIDE);
    Team team;
    const int64_t rank = ceil_div(route.r, max(route.count, 1));  // on average
    const int threads = threads_for(route.m * columns * rank);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t item = 0; item < route.count * parts; ++item) {
      const Run& run = route.runs[item / parts];
      if (run.r) team.run([&] { sum_run(run, item % parts * WIDE); });
    }
    team.finish();
  }

  // Sets rank-rows that no run has to zero.
  void clear_others() const {
    const int64_t rows = out.shape[0], columns = out.shape[1];
    uint8_t* owned = t_owned.get<uint8_t>(rows);
    if (rows) memset(owned, 0, size_t(rows));
    for (int64_t j = 0; j < route.r; ++j) owned[route.lines[j]] = 1;
    with_operand<T>(out, [&](auto* to) {
#pragma omp parallel for num_threads(threads_for(rows* columns)) schedule(static)
      for (int64_t i = 0; i < rows; ++i)
        if (!owned[i]) memset((void*)(to + i * columns), 0, size_t(columns) * sizeof *to);
    });
  }
};

// multi_bwd of ops.h, without dgain.
//   dz: gain ⊙ dy, rounded to T; scale, p: (S,), and p may be null
template <class T>
void backward(const Route& route, Tensor dx, Tensor da, Tensor db, Tensor dz, Tensor x,
              Tensors base, Tensor a, Tensor b, const float* scale, Tensor h,
              const uint8_t* bits, const float* p, int64_t slots, Form form, int64_t block) {
  const int64_t ldh = h.shape[1];
  const auto scale_of = [&](int64_t slot) { return scale[slot]; };
  const Routes scaled = routes(route, slots, ldh, scale_of, nullptr, 0);
  if (db.data) {
    Reduction<T> sums{route};
    sums.out = db;
    sums.t = dz;
    sums.h = turned(route, gated<T>(h, Tensor{}, ldh, t_h), ldh);
    sums.of = scaled.adapters;
    sums.sum_all();
  }
  if (!dx.data && !da.data) return;
  Shrink<T> shrink{route};
  shrink.h = h;
  shrink.h.data = t_dh.get<T>(route.m * ldh);
  shrink.x = dz;
  shrink.a = b;
  shrink.of = scaled.adapters;
  shrink.multiply_all();

  const float* dh = gated<T>(shrink.h, Tensor{}, ldh, t_h);
  const auto factor_of = [&](int64_t slot) { return p ? dropout_factor(p[slot]) : 1.0f; };
  const Routes dropped = routes(route, slots, ldh, factor_of, nullptr, 0);
  if (dx.data) {
    Product t{};
    t.out = dx;
    if (form != Form::given) t.x = dz;
    t.h = dh;
    t.m = route.m;
    t.n = x.shape[1];
    t.k = dz.shape[1];
    t.r = route.r;
    t.bits = bits;
    t.base = base;
    t.form = form;
    t.block = block;
    t.delta = a;
    t.backward = true;
    t.routes = &dropped;
    product(t);
  }
  if (da.data) {
    Reduction<T> sums{route};
    sums.out = da;
    sums.t = x;
    sums.bits = bits;
    sums.h = turned(route, dh, ldh);
    sums.of = dropped.adapters;
    sums.sum_all();
  }
}

// Layers that lie side by side in y; see multi_add of ops.h.
template <class T>
struct Parts {
  Route& route;
  Tensor y, x, a, b, table, rank, scale, widths;

  // Calls f(part, its first column, its columns) for each part that has columns, once the route
  // has the part's rank-rows.
  template <class F>
  void each(F f) const {
    int64_t begin = 0;
    for (int64_t part = 0; part < widths.shape[0]; ++part) {
      const int64_t columns = as<int32_t>(widths)[part];
      expect("widths", 0, b.shape[1] - begin + 1, columns);
      set_ranks(route, table, as<int32_t>(rank) + part * table.shape[0], b.shape[0]);
      if (columns) f(part, begin, columns);
      begin += columns;
    }
  }

  // y += s · (x·aᵀ)·b in the columns of a part.
  void add(int64_t part, int64_t begin, int64_t columns) const {
    const int64_t slots = table.shape[0], ldh = PAGE * table.shape[1];
    const float* scales = as<float>(scale) + part * slots;
    if (!route.r) return;
    Shrink<T> shrink{route};
    shrink.h = {t_added.get<T>(route.m * ldh), {route.m, ldh}, x.dtype};
    shrink.x = x;
    shrink.a = from(a, part * b.shape[0] * x.shape[1]);
    shrink.of = routes(route, slots, ldh, [](int64_t) { return 1.0f; }, nullptr, 0).adapters;
    shrink.multiply_all();

    const auto scale_of = [&](int64_t slot) { return scales[slot]; };
    const Routes scaled = routes(route, slots, ldh, scale_of, nullptr, 0);
    Expand<T> expand{route};
    expand.y = expand.y0 = from(y, begin);
    expand.n = columns;
    expand.ldo = y.shape[1];
    expand.ldp = b.shape[1];
    expand.h = gated<T>(shrink.h, Tensor{}, ldh, t_h);
    expand.ldh = ldh;
    expand.b = from(b, begin);
    expand.of = scaled.adapters;
    expand.expand_all();
  }

  // A tensor from one of its elements on.
  static Tensor from(Tensor t, int64_t element) {
    with_operand<T>(t, [&](auto* data) { t.data = data + element; });
    return t;
  }
};

}  // namespace

void multi_fwd(Tensor y, Tensor h, Tensor bits, Tensor z, Tensor x, Tensors base, Tensor a,
               Tensor b, Tensor slots, Tensor table, Tensor rank, Tensor scale, Tensor p,
               Tensor bias, Tensor gain, Tensor seed, Form form, int64_t block) {
  const Route route = routed(slots, table, rank, a.shape[0]);
  const int64_t n = b.shape[1], count = table.shape[0], ldh = h.shape[1];
  const float *scales = as<float>(scale), *drop = as<float>(p);
  with_type(x.dtype, [&](auto e) {
    using T = decltype(e);
    const auto factor_of = [&](int64_t slot) {
      return drop ? dropout_factor(drop[slot]) : 1.0f;
    };
    Shrink<T> shrink{route};
    shrink.h = h;
    shrink.x = x;
    shrink.a = a;
    shrink.of = routes(route, count, ldh, factor_of, nullptr, 0).adapters;
    shrink.bits = as<uint8_t>(bits);
    shrink.p = drop;
    shrink.seed = drop ? *as<uint64_t>(seed) : 0;
    shrink.multiply_all();
    const auto scale_of = [&](int64_t slot) { return scales[slot]; };
    const Routes scaled = routes(route, count, ldh, scale_of, as<float>(gain), n);
    if (form == Form::given) {
      Expand<T> expand{route};
      expand.y = y;
      expand.z = z;
      expand.y0 = base.at[0];
      expand.n = expand.ldo = expand.ldp = n;
      expand.h = gated<T>(h, Tensor{}, ldh, t_h);
      expand.ldh = ldh;
      expand.b = b;
      expand.of = scaled.adapters;
      expand.bias = as_float<T>(bias, t_bias);
      return expand.expand_all();
    }
    Product t{};
    t.out = y;
    t.z = z;
    t.x = x;
    t.h = gated<T>(h, Tensor{}, ldh, t_h);
    t.m = route.m;
    t.n = n;
    t.k = x.shape[1];
    t.r = route.r;
    t.bias = as_float<T>(bias, t_bias);
    t.base = base;
    t.form = form;
    t.block = block;
    t.delta = b;
    t.routes = &scaled;
    product(t);
  });
}

void multi_add(Tensor y, Tensor x, Tensor a, Tensor b, Tensor slots, Tensor table, Tensor rank,
               Tensor scale, Tensor widths) {
  Route route = grouped(slots, table.shape[0]);
  with_type(x.dtype, [&](auto e) {
    const Parts<decltype(e)> parts{route, y, x, a, b, table, rank, scale, widths};
    parts.each([](int64_t, int64_t, int64_t) {});  // raises before anything is written
    parts.each(
        [&](int64_t part, int64_t begin, int64_t columns) { parts.add(part, begin, columns); });
  });
}

void multi_bwd(Tensor dx, Tensor da, Tensor db, Tensor dgain, Tensor dy, Tensor x, Tensors base,
               Tensor a, Tensor b, Tensor slots, Tensor table, Tensor rank, Tensor scale,
               Tensor h, Tensor bits, Tensor z, Tensor p, Tensor gain, Form form,
               int64_t block) {
  const Route route = routed(slots, table, rank, a.shape[0]);
  with_type(x.dtype, [&](auto e) {
    using T = decltype(e);
    if (dgain.data) sum_gain<T>(route, dgain, dy, z);
    const Tensor dz = gain.data ? gained<T>(route, dy, as<float>(gain)) : dy;
    backward<T>(route, dx, da, db, dz, x, base, a, b, as<float>(scale), h, as<uint8_t>(bits),
                as<float>(p), table.shape[0], form, block);
  });
}

}  // namespace peftops::ISA
