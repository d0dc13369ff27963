// The CPU's 4-bit kernels in a module of their own, which is built with a sanitizer.
#include "caster.h"
#include "cpu/ops.h"

PYBIND11_MODULE(emulated, m) {
  m.def("nf4_quantize", peftops::ISA::nf4_quantize);
  m.def("nf4_dequantize", peftops::ISA::nf4_dequantize);
}
