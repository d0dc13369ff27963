// The arguments of an op as a replay sees them: where its tensors start, and a key in which all
// else is.
#pragma once
#include <cstring>

#include "../exchange.h"

namespace peftops {

namespace py = pybind11;

constexpr int32_t ON_CUDA = 2;  // a device's type in DLPack

// What is asked of torch, looked up once; a leak on purpose, since the interpreter may be gone
// before we are.
struct Torch {
  const Exchange* exchange = Exchange::of_torch();
  py::object module = py::module_::import("torch");
  py::object inside = module.attr("_C");
  py::object tensor = module.attr("Tensor"), dtype = module.attr("dtype");
  py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  py::object empty = module.attr("empty_strided"), as_strided = module.attr("as_strided");
  py::str is_neg{"is_neg"}, turned{"T"}, device{"_cuda_getDevice"},
      stream{"_cuda_getCurrentRawStream"};

  static const Torch& get() {
    static const Torch& torch = *new Torch;
    return torch;
  }
};

// Equal words are equal arguments, but for the memory of tensors.
struct Key {
  static constexpr int MOST = 192;
  uint64_t words[MOST], hash = 0xcbf29ce484222325;
  int count = 0;
  bool complete = true;

  void add(uint64_t word) {
    if (count == MOST) {
      complete = false;
      return;
    }
    words[count++] = word;
    hash = (hash ^ word) * 0x100000001b3;
    hash ^= hash >> 29;
  }
};

struct Arguments {
  static constexpr int MOST = 48;
  Key key;
  PyObject* tensors[MOST];  // borrowed
  char* starts[MOST];
  int count = 0;
  int32_t device[2] = {-1, -1};

  // Whether these can be replayed: numbers, names, and plain tensors of one device as kernels
  // want them.
  bool read(PyObject* const* args, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (PyList_CheckExact(args[i])) {
        const Py_ssize_t length = PyList_GET_SIZE(args[i]);
        key.add(LIST + length);
        for (Py_ssize_t j = 0; j < length; ++j)
          if (!read_one(PyList_GET_ITEM(args[i], j))) return false;
      } else if (!read_one(args[i])) {
        return false;
      }
    }
    return key.complete;
  }

 private:
  enum Tag : uint64_t {
    NONE = 1,
    TRUE,
    FALSE,
    INT,
    FLOAT,
    NAME,
    DTYPE,
    LIST = 0x1000,
    TENSOR = 0x100000
  };

  bool read_one(PyObject* value) {
    PyTypeObject* type = Py_TYPE(value);
    if (value == Py_None) {
      key.add(NONE);
    } else if (value == Py_True || value == Py_False) {
      key.add(value == Py_True ? TRUE : FALSE);
    } else if (PyLong_CheckExact(value)) {
      int beyond = 0;
      key.add(INT);
      key.add(PyLong_AsLongLongAndOverflow(value, &beyond));
      return !beyond;
    } else if (PyFloat_CheckExact(value)) {
      const double number = PyFloat_AS_DOUBLE(value);
      uint64_t bits;
      memcpy(&bits, &number, 8);
      key.add(FLOAT);
      key.add(bits);
    } else if (PyUnicode_CheckExact(value)) {
      key.add(NAME);
      key.add(PyObject_Hash(value));
    } else if (type == (PyTypeObject*)Torch::get().dtype.ptr()) {
      key.add(DTYPE);
      key.add((uint64_t)value);  // there is one of each
    } else {
      return read_tensor(value, type);
    }
    return true;
  }

  bool read_tensor(PyObject* value, PyTypeObject* type) {
    const Torch& torch = Torch::get();
    const bool plain = type == (PyTypeObject*)torch.tensor.ptr();
    if (count == MOST || !(plain || type == (PyTypeObject*)torch.parameter.ptr())) return false;
    DLTensor t;
    if (torch.exchange->look(value, &t)) {
      PyErr_Clear();
      return false;
    }
    if (count == 0) {
      memcpy(device, t.device, sizeof device);
      key.add((uint64_t)t.device[0] << 32 | (uint32_t)t.device[1]);
    }
    if (memcmp(device, t.device, sizeof device) || (uint64_t)t.start() % 16) return false;
    if (plain && negated(value)) return false;
    key.add(TENSOR | t.dims << 16 | t.code << 8 | t.bits);
    tensors[count] = value;
    starts[count++] = t.start();
    return add_shape(t);
  }

  // Whether torch negates this view when it reads it.
  static bool negated(PyObject* value) {
    PyObject* answer = PyObject_CallMethodNoArgs(value, Torch::get().is_neg.ptr());
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return answer != Py_False;
  }

  // False for a tensor that is not contiguous.
  bool add_shape(const DLTensor& t) {
    int64_t elements = 1, stride = 1;
    for (int i = 0; i < t.dims; ++i) elements *= t.shape[i];
    for (int i = t.dims - 1; i >= 0; --i) {
      if (elements && t.shape[i] != 1 && t.strides && t.strides[i] != stride) return false;
      stride *= t.shape[i];
      key.add(t.shape[i]);
    }
    return true;
  }
};

}  // namespace peftops
