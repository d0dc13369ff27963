// A Python module with the project's CUDA launchers. It is linked with the emulator instead of
// CUDA.
#include "module.h"

#include "bindings.h"

PYBIND11_MODULE(emulated, m) {
  bind_cuda(m);
  bind_emulator(m);
}
