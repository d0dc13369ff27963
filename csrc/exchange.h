// Reads a torch tensor without a header of torch and without a method call: through the table
// of functions that torch 2.10 and newer exports for DLPack. DLPack 1 fixes the table's layout.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace peftops {

// Takes over a new reference, or raises the Python error that is set.
inline pybind11::object own(PyObject* object) {
  if (!object) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

// DLPack's description of a tensor, field by field.
struct DLTensor {
  void* data;
  int32_t device[2];     // type and index
  int32_t dims;          // number of dimensions
  uint8_t code;          // of the element type: integer, float, bfloat16 ...
  uint8_t bits;          // of an element
  uint16_t lanes;        // elements of a vector type, else 1
  int64_t* shape;        // of `dims` sizes
  int64_t* strides;      // in elements; null means contiguous
  uint64_t byte_offset;  // from data to the first element

  char* start() const { return (char*)data + byte_offset; }
};

// DLPack's DLPackExchangeAPI up to the one function that is used here.
struct Exchange {
  uint32_t major;  // version
  uint32_t minor;
  void* before;                   // the table of an older version
  void* allocate;                 // makes a tensor
  void* give;                     // exports a tensor and shares its ownership
  void* take;                     // imports a tensor
  int (*look)(void*, DLTensor*);  // describes a tensor without sharing ownership; 0: success

  // The table, or null if torch exports none of a version known here.
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
