// How a team of threads shares a product of m rows with a base of n columns. The base is cut
// into panels of columns; a thread packs a panel before it multiplies rows with it.
#pragma once
#include "vec.h"

namespace peftops::ISA {
namespace {

constexpr int64_t PANEL = 64;  // columns of a packed panel
// Rows that are multiplied with every panel before the next rows are. They stay in the cache.
constexpr int64_t SLAB = 768;

// A panel, and the slab of rows that is multiplied with it.
struct Panel {
  int64_t c;      // the panel's first column
  int64_t next;   // the first column of the panel after it, 0 after the last
  int64_t first;  // the slab's first row
  int64_t rows;   // of the slab
};

// Cuts the work into items, one for each slab, panel and ROWS rows; threads take equal runs of
// items.
//   work: multiply-adds of the product
//   make: is called in each thread, and returns what has pack(panel) and then
//     rows(panel, begin, end) called
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
      const int64_t run = item / blocks, stop = min(end, (run + 1) * blocks);
      Panel panel;
      panel.c = run % panels * PANEL;
      panel.next = panel.c + PANEL < n ? panel.c + PANEL : 0;
      panel.first = run / panels * ROWS * blocks;
      panel.rows = ROWS * blocks;
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
