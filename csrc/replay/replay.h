// Adds to the module the types Replay and Plan, forget() and pause(). After forget() no earlier
// plan is played. pause(1) stops all replays, pause(-1) lets them go on.
#pragma once
#include <pybind11/pybind11.h>

namespace peftops {

void bind_replay(pybind11::module_& m);

}  // namespace peftops
