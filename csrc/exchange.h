// How a torch tensor is read without a header of torch and without a method call: the table
// that torch from 2.10 on gives for DLPack, whose layout DLPack 1 fixes.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace peftops {

inline pybind11::object own(PyObject* object) {
  if (!object) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

struct DLTensor {
  void* data;
  int32_t device[2];  // its type and its index
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  char* start() const { return (char*)data + byte_offset; }
};

struct Exchange {
  uint32_t major, minor;
  void *before, *allocate, *give, *take;
  int (*look)(void*, DLTensor*);

  // The table, or null where torch has none that we know.
  static const Exchange* of_torch() {
    namespace py = pybind11;
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return nullptr;
    const auto* table =
        (const Exchange*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    PyErr_Clear();
    return table && table->major == 1 && table->look ? table : nullptr;
  }
};

}  // namespace peftops
