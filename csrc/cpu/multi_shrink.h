// Multi-LoRA's first half: rows of x times the rank-rows of their slots.
#pragma once
#include "dots.h"
#include "multi.h"

namespace peftops::ISA {
namespace {

// Of each thread of a team, and of the caller, read by its team.
thread_local Scratch t_drawn, t_blocks;

// Rows of a run that are multiplied at once.
struct Block {
  const Run* run;
  int64_t begin, end;  // in Route::order
};

// h = factor · drop(x)·aᵀ with the adapter of each row, rounded to T, and zeros beyond its
// rank. The adapters are read as they are stored.
template <class T>
struct Shrink {
  const Route& route;
  Tensor h;           // (m, ldh)
  Tensor x;           // (m, k)
  Tensor a;           // (R, k)
  const Adapter* of;  // by slot; their s is the factor
  uint8_t* bits;      // receives the mask, or null
  const float* p;     // (S,), or null
  uint64_t seed;

  void multiply_block(const Block& block) const {
    const Run& run = *block.run;
    const int64_t k = x.shape[1], bytes = mask_bytes(k), ld = pad16(k) + 16;
    const int64_t width = pad16(run.r), count = block.end - block.begin;
    const int64_t* row = route.order + block.begin;
    const float drop = p && run.slot >= 0 ? p[run.slot] : 0;
    const Philox generator(seed, drop);
    float* wide = t_drawn.get<float>(2 * ROWS * (ld + width));  // rows of drop(x)
    float* sums = wide + 2 * ROWS * ld;
    const bool as_it_lies =
        sizeof(T) == sizeof(float) && !drop && row[count - 1] - row[0] == count - 1;
    for (int64_t e = 0; e < count; ++e) {
      uint8_t* keep = bits ? bits + row[e] * bytes : nullptr;
      if (keep && drop) generator.draw(keep, row[e], bytes);
      if (keep && !drop) memset(keep, 0xff, size_t(bytes));
      if (run.r && !as_it_lies)
        widen_row(as<T>(x) + row[e] * k, k, drop ? keep : nullptr, wide + e * ld);
    }
    with_operand<T>(a, [&](const auto* from) {
      dot_rows<T>(from, k, route.lines + run.first, run.r, route.r - run.first,
                  as_it_lies ? as<float>(x) + row[0] * k : wide, as_it_lies ? k : ld, count,
                  sums, width);
    });
    for (int64_t e = 0; e < count; ++e) {
      T* out = as<T>(h) + row[e] * h.shape[1];
      for (int64_t j = 0; j < run.r; j += LANES)
        store(out + j, load(sums + e * width + j) * all(of[run.slot].s), run.r - j);
      for (int64_t j = run.r; j < h.shape[1]; ++j) narrow(0, out + j);
    }
  }

  void multiply_all() const {
    constexpr int64_t tall = 2 * ROWS;
    Block* blocks = t_blocks.get<Block>(route.m / tall + route.count);
    int64_t count = 0;
    for (const Run* run = route.runs; run < route.runs + route.count; ++run)
      for (int64_t i = run->begin; i < run->end; i += tall)
        blocks[count++] = {run, i, min(i + tall, run->end)};
    Team team;
    const int threads = threads_for(route.m * x.shape[1] * h.shape[1]);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) team.run([&] { multiply_block(blocks[i]); });
    team.finish();
  }
};

}  // namespace
}  // namespace peftops::ISA
