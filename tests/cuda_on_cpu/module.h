// What every emulated module says besides its launchers.
#pragma once
#include <pybind11/pybind11.h>

#include "machine.h"

inline void bind_emulator(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("schedule",
        [](const std::string& order, bool lazy) { emulator::schedule = {order, lazy}; });
  m.def("limit_shared", [](int bytes) { return std::exchange(emulator::shared_limit, bytes); });
  m.def("finish", [] {
    if (const std::string error = emulator::finish(); !error.empty())
      throw std::runtime_error(error);
  });
  m.def("counts", [] {
    const auto c = std::exchange(emulator::counts, {});
    return py::dict(py::arg("launches") = c.launches, py::arg("blocks") = c.blocks,
                    py::arg("mma") = c.mma, py::arg("wgmma") = c.wgmma,
                    py::arg("matrices") = c.matrices, py::arg("conflicts") = c.conflicts);
  });
}
