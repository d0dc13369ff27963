// The emulator's own functions, which each emulated Python module has besides its launchers.
#pragma once
#include <pybind11/pybind11.h>

#include "machine.h"

inline void bind_emulator(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("schedule", [](const std::string& order, bool lazy) {
    emulator::schedule = {.order = order, .lazy = lazy};
  });
  m.def("limit_shared", [](int bytes) { return std::exchange(emulator::shared_limit, bytes); });
  m.def("finish", [] {
    if (const std::string error = emulator::finish(); !error.empty())
      throw std::runtime_error(error);
  });
  m.def("counts", [] {  // since the call before
    const auto counts = std::exchange(emulator::counts, {});
    return py::dict(py::arg("launches") = counts.launches, py::arg("blocks") = counts.blocks,
                    py::arg("mma") = counts.mma, py::arg("wgmma") = counts.wgmma,
                    py::arg("matrices") = counts.matrices,
                    py::arg("conflicts") = counts.conflicts);
  });
}
