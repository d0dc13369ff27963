// A Python module with the function ask() of a .cu file, which runs the kernel of a name.
#include "module.h"

extern "C" int ask(const char* name, uintptr_t out, uintptr_t in, uintptr_t bits, int n,
                   int blocks, int threads);
extern "C" const char* cudaGetErrorString(int error);

PYBIND11_MODULE(emulated, m) {
  bind_emulator(m);
  m.def("ask", [](const std::string& name, uintptr_t out, uintptr_t in, uintptr_t bits, int n,
                  int blocks, int threads) {
    const int error = ask(name.c_str(), out, in, bits, n, blocks, threads);
    if (error) throw std::runtime_error(cudaGetErrorString(error));
  });
}
