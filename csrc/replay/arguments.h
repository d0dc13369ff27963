// The arguments of an op as a replay sees them: where the tensors start, and a key that holds
// everything else, such as shapes, dtypes and numbers.
#pragma once
#include <cstring>

#include "../exchange.h"

namespace peftops {

namespace py = pybind11;

constexpr int32_t ON_CUDA = 2;  // DLPack's number of the device type

// What is asked of torch, looked up once. The one instance is never freed, because the
// interpreter may end before static objects are destroyed.
struct Torch {
  const Exchange* exchange = Exchange::of_torch();
  py::object module = py::module_::import("torch");
  py::object inside = module.attr("_C");
  py::object tensor = module.attr("Tensor");
  py::object dtype = module.attr("dtype");
  py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  py::object empty = module.attr("empty_strided");
  py::object as_strided = module.attr("as_strided");
  // names of attributes
  py::str is_neg{"is_neg"};
  py::str turned{"T"};
  py::str device{"_cuda_getDevice"};
  py::str stream{"_cuda_getCurrentRawStream"};

  static const Torch& get() {
    static const Torch& torch = *new Torch;
    return torch;
  }
};

// What a plan depends on. Two calls with equal words differ at most in where their tensors lie.
struct Key {
  static constexpr int MOST = 192;
  uint64_t words[MOST];
  uint64_t hash = 0xcbf29ce484222325;  // of the words so far
  int count = 0;                       // of the words
  bool complete = true;                // false if there were more than MOST words

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

// The arguments of one call.
struct Arguments {
  static constexpr int MOST = 48;
  Key key;
  PyObject* tensors[MOST];       // borrowed references
  char* starts[MOST];            // the first element of each tensor
  int count = 0;                 // of tensors
  int32_t device[2] = {-1, -1};  // DLPack's type and index, of all tensors

  // Reads the arguments. False if the call cannot be replayed: all of them have to be None,
  // numbers, names, dtypes, or plain contiguous tensors on one device that start at a multiple
  // of 16 bytes.
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
      key.add((uint64_t)value);  // torch has one object for each dtype
    } else {
      return read_tensor(value, type);
    }
    return true;
  }

  bool read_tensor(PyObject* value, PyTypeObject* type) {
    const Torch& torch = Torch::get();
    // Parameters are never negated views, so they are not asked.
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

  // Whether this is a view that torch negates when it reads it.
  static bool negated(PyObject* value) {
    PyObject* answer = PyObject_CallMethodNoArgs(value, Torch::get().is_neg.ptr());
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return answer != Py_False;
  }

  // Adds the sizes to the key. False if the tensor is not contiguous.
  bool add_shape(const DLTensor& t) {
    int64_t elements = 1;
    int64_t stride = 1;  // that a contiguous tensor has in dimension i
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
