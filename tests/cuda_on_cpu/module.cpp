// A Python module of the project's CUDA launchers, linked with machine.cpp and runtime.cpp
// instead of CUDA.
#include "module.h"

#include "bindings.h"

PYBIND11_MODULE(emulated, m) {
  bind_cuda(m);
  bind_emulator(m);
}
