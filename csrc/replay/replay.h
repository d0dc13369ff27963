// The types Replay and Plan of the module; forget(), after which no plan of before is played,
// and pause(±1), while which none is.
#pragma once
#include <pybind11/pybind11.h>

namespace peftops {

void bind_replay(pybind11::module_& m);

}  // namespace peftops
