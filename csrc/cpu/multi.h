// Multi-LoRA's routes: which rows share an adapter, and where its rank-rows lie in the pools.
#pragma once
#include "product.h"

namespace peftops::ISA {
namespace {

constexpr int64_t PAGE = 8;  // rank-rows of a page of a pool, which lie together

thread_local Scratch t_order, t_runs, t_lines, t_adapters;  // of the caller, read by its team

// Rows that share a slot.
struct Run {
  int64_t slot;
  int64_t begin, end;  // of the rows, as places in Route::order
  int64_t r;           // the slot's rank, 0 of slot -1
  int64_t first;       // its first rank-row among those of all runs
};

struct Route {
  const int32_t* slots;  // (m,)
  const int64_t* order;  // (m,) all rows, sorted by slot
  const Run* runs;       // (count,) in order
  const int64_t* lines;  // (r,) the row of a pool that is each rank-row of the runs
  int64_t m, count, r;
};

// Raises ValueError for a slot, a rank or the page of a rank-row that does not exist.
void check_route(Tensor slots, Tensor table, Tensor rank, int64_t pool) {
  const int64_t count = table.shape[0], pages = table.shape[1];
  const auto expect = [](const char* name, int64_t begin, int64_t end, int64_t value) {
    if (value < begin || value >= end) out_of_range(name, begin, end, value);
  };
  for (int64_t i = 0; i < slots.shape[0]; ++i)
    expect("slots", -1, count, as<int32_t>(slots)[i]);
  for (int64_t s = 0; s < count; ++s) {
    const int64_t r = as<int32_t>(rank)[s];
    expect("rank", 0, PAGE * pages + 1, r);
    for (int64_t j = 0; j < ceil_div(r, PAGE); ++j)
      expect("table", 0, pool / PAGE, as<int32_t>(table)[s * pages + j]);
  }
}

// The route of these slots through pools of so many rank-rows. Raises as check_route does.
Route routed(Tensor slots, Tensor table, Tensor rank, int64_t pool) {
  check_route(slots, table, rank, pool);
  const int64_t m = slots.shape[0], count = table.shape[0], pages = table.shape[1];
  Route route{};
  route.slots = as<int32_t>(slots);
  route.m = m;
  int64_t* order = t_order.get<int64_t>(m + count + 2);
  int64_t* next = order + m;  // the place of the next row of each slot, from slot -1 on
  memset(next, 0, size_t(count + 2) * sizeof(int64_t));
  for (int64_t i = 0; i < m; ++i) ++next[route.slots[i] + 2];
  for (int64_t s = 0; s < count; ++s) next[s + 1] += next[s];
  for (int64_t i = 0; i < m; ++i) order[next[route.slots[i] + 1]++] = i;

  Run* runs = t_runs.get<Run>(min(m, count + 1));
  for (int64_t slot = -1, begin = 0; slot < count; begin = next[++slot]) {
    const int64_t end = next[slot + 1];
    if (begin == end) continue;
    Run& run = runs[route.count++];
    run.slot = slot;
    run.begin = begin;
    run.end = end;
    run.r = slot < 0 ? 0 : as<int32_t>(rank)[slot];
    run.first = route.r;
    route.r += run.r;
  }
  int64_t* lines = t_lines.get<int64_t>(route.r);
  for (const Run* run = runs; run < runs + route.count; ++run)
    for (int64_t j = 0; j < run->r; ++j)
      lines[run->first + j] =
          PAGE * as<int32_t>(table)[run->slot * pages + j / PAGE] + j % PAGE;
  route.order = order;
  route.runs = runs;
  route.lines = lines;
  return route;
}

// The same for product.h. It lives until the next call.
//   slots: how many there are; scale: scale(slot) is that of its adapter
//   gain: (slots, n), or null
template <class F>
Routes routes(const Route& route, int64_t slots, int64_t ldh, F scale, const float* gain,
              int64_t n) {
  Adapter* adapters = t_adapters.get<Adapter>(slots + 1) + 1;
  adapters[-1] = Adapter{};
  for (const Run* run = route.runs; run < route.runs + route.count; ++run) {
    if (run->slot < 0) continue;
    Adapter& adapter = adapters[run->slot];
    adapter.first = run->first;
    adapter.r = run->r;
    adapter.s = scale(run->slot);
    adapter.gain = gain ? gain + run->slot * n : nullptr;
  }
  Routes out{};
  out.slots = route.slots;
  out.adapters = adapters;
  out.lines = route.lines;
  out.ldh = ldh;
  return out;
}

}  // namespace
}  // namespace peftops::ISA
