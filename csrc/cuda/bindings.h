// Binds the CUDA launchers to Python, one line for each op. What a launcher returns as CUDA's
// error becomes a RuntimeError with the op's name.
#pragma once
#include <utility>

#include "../caster.h"
#include "ops.h"

// The launcher as a function that raises instead of returning an error.
template <class... Args>
auto raising(const char* name, int (*launcher)(Args...)) {
  return [name, launcher](Args... args) {
    if (const int code = launcher(std::move(args)...))
      throw std::runtime_error(std::string(name) + ": CUDA error " + std::to_string(code) +
                               ", " + device_error(code));
  };
}

// A launcher keeps the GIL, since a launch returns at once.
#define BIND_CUDA(name) m.def(#name, raising(#name, name))

inline void bind_cuda(pybind11::module_& m) {
  m.def("driver", device_driver);
  m.def("runtime", device_runtime);
  m.def("runs", device_runs);
  BIND_CUDA(dora_norm);
  BIND_CUDA(lora_gemv);
  BIND_CUDA(multi_gemv);
  BIND_CUDA(nf4_quantize);
  BIND_CUDA(nf4_dequantize);
}
