// How a team shares a product of m rows with a base of n columns: panels of columns, packed by
// who multiplies them.
#pragma once
#include "vec.h"

namespace peftops::ISA {
namespace {

constexpr int64_t PANEL = 64;  // columns of a packed panel
constexpr int64_t SLAB =
    768;  // rows that are walked for every panel before the next ones: they stay in the cache

// The rows [first, first + rows) are walked for the panel that begins at the column c, and for
// `next` after it
struct Panel {
  int64_t c, next, first, rows;
};

// make() in each thread of the team gives what it works with: pack(panel) and then rows(panel,
// begin, end). Threads take equal runs of (slab of rows, panel, six rows).
template <class Make>
void by_panels(int64_t m, int64_t n, int64_t work, Make make) {
  const int64_t panels = ceil_div(n, PANEL), slabs = ceil_div(m, SLAB);
  const int64_t blocks = slabs ? ceil_div(ceil_div(m, slabs), ROWS) : 0;
  const int threads = threads_for(work);
  Team work_of_all;
#pragma omp parallel num_threads(threads)
  work_of_all.run([&] {
    auto worker = make();
    const int64_t team = omp_get_num_threads(), id = omp_get_thread_num();
    const int64_t end = slabs * panels * blocks * (id + 1) / team;
    for (int64_t item = slabs * panels * blocks * id / team; item < end;) {
      const int64_t run = item / blocks, stop = min(end, (run + 1) * blocks),
                    c = run % panels * PANEL;
      const Panel panel{c, c + PANEL < n ? c + PANEL : 0, run / panels * ROWS * blocks,
                        ROWS * blocks};
      worker.pack(panel);
      const int64_t last = panel.first + (stop - run * blocks) * ROWS;
      worker.rows(panel, panel.first + item % blocks * ROWS, min(m, last));
      item = stop;
    }
  });
  work_of_all.finish();
}

}  // namespace
}  // namespace peftops::ISA
