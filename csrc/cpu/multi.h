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
  Run* runs;             // (count,) in order
  const int64_t* lines;  // (r,) the row of a pool that is each rank-row of the runs
  int64_t m, count, r;
};

// Raises ValueError for a value that is none of [begin, end).
void expect(const char* name, int64_t begin, int64_t end, int64_t value) {
  if (value < begin || value >= end) out_of_range(name, begin, end, value);
}

// The rows 0 .. m - 1 in the order of their slots, from slot -1 on; rows of a slot stay in
// order. A counting sort by 8 bits at a time, so that the number of slots hardly matters.
//   slots: (m,), each in [-1, count)
const int64_t* sorted(const int32_t* slots, int64_t m, int64_t count) {
  int64_t* order = t_order.get<int64_t>(2 * m);
  int64_t* other = order + m;
  for (int64_t i = 0; i < m; ++i) order[i] = i;
  for (int shift = 0; count >> shift; shift += 8) {
    const auto digit = [&](int64_t row) { return (int64_t(slots[row]) + 1) >> shift & 255; };
    int64_t next[257] = {};  // the place of the next row of each digit
    for (int64_t i = 0; i < m; ++i) ++next[digit(i) + 1];
    for (int64_t d = 0; d < 256; ++d) next[d + 1] += next[d];
    for (int64_t i = 0; i < m; ++i) other[next[digit(order[i])]++] = order[i];
    int64_t* before = order;
    order = other;
    other = before;
  }
  return order;
}

// The rows of one run of Route::order that begins at `begin`.
Run run_from(int64_t begin, const Route& route) {
  Run run{};
  run.slot = route.slots[route.order[begin]];
  run.begin = begin;
  run.end = begin + 1;
  while (run.end < route.m && route.slots[route.order[run.end]] == run.slot) ++run.end;
  return run;
}

// The runs of these slots, without their rank-rows. It takes the same time however many slots
// there are. Raises ValueError for a slot that is none of `count`.
Route grouped(Tensor slots, int64_t count) {
  const int64_t m = slots.shape[0];
  Route route{};
  route.slots = as<int32_t>(slots);
  route.m = m;
  for (int64_t i = 0; i < m; ++i) expect("slots", -1, count, route.slots[i]);
  route.order = sorted(route.slots, m, count);
  route.runs = t_runs.get<Run>(m);
  for (int64_t begin = 0; begin < m; begin = route.runs[route.count++].end)
    route.runs[route.count] = run_from(begin, route);
  return route;
}

// Gives the runs the rank-rows that their slots have in pools of so many.
//   rank: (S,)
// Raises ValueError for a rank, or for a page, of a row's slot that does not exist.
void set_ranks(Route& route, Tensor table, const int32_t* rank, int64_t pool) {
  const int64_t pages = table.shape[1];
  route.r = 0;
  for (Run* run = route.runs; run < route.runs + route.count; ++run) {
    run->r = run->slot >= 0 ? rank[run->slot] : 0;
    expect("rank", 0, PAGE * pages + 1, run->r);
    run->first = route.r;
    route.r += run->r;
  }
  int64_t* lines = t_lines.get<int64_t>(route.r);
  for (const Run* run = route.runs; run < route.runs + route.count; ++run)
    for (int64_t j = 0; j < run->r; ++j) {
      const int64_t page = as<int32_t>(table)[run->slot * pages + j / PAGE];
      expect("table", 0, pool / PAGE, page);
      lines[run->first + j] = PAGE * page + j % PAGE;
    }
  route.lines = lines;
}

// The route of these slots through pools of so many rank-rows.
Route routed(Tensor slots, Tensor table, Tensor rank, int64_t pool) {
  Route route = grouped(slots, table.shape[0]);
  set_ranks(route, table, as<int32_t>(rank), pool);
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
    adapter.s = run->r ? scale(run->slot) : 0;  // what is not used may be NaN
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
