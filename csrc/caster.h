// pybind11 casters: from a torch tensor to a Tensor, from a list of them to Tensors, and from
// the name of a form to a Form. They need no header of torch.
#pragma once
#include <pybind11/pybind11.h>

#include "exchange.h"
#include "tensor.h"

namespace py = pybind11;
using peftops::DLTensor;
using peftops::Dtype;
using peftops::Exchange;
using peftops::Form;
using peftops::own;
using peftops::Tensor;
using peftops::Tensors;

namespace {

// What the casters ask of Python, looked up once. The one instance is never freed, because the
// interpreter may end before static objects are destroyed.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* dtypes[8];  // torch's, in the order of Dtype
  const Exchange* exchange = Exchange::of_torch();
  Names() {
    const char* torch_names[] = {"float32", "float16", "bfloat16", "uint8",
                                 "int64",   "int32",   "bool",     "float64"};
    auto torch = py::module_::import("torch");
    for (int i = 0; i < 8; ++i)
      dtypes[i] = py::object(torch.attr(torch_names[i])).release().ptr();
  }
};

// DLPack's code and bits as a Dtype.
Dtype dtype_of(const DLTensor& t) {
  if (t.lanes != 1) return Dtype::none;
  switch (t.code << 8 | t.bits) {
    case 0x220:
      return Dtype::f32;
    case 0x210:
      return Dtype::f16;
    case 0x410:
      return Dtype::bf16;
    case 0x108:
      return Dtype::u8;
    case 0x040:
      return Dtype::i64;
    case 0x020:
      return Dtype::i32;
    case 0x608:
      return Dtype::bit;
    case 0x240:
      return Dtype::f64;
  }
  return Dtype::none;
}

// Reads a tensor through torch's DLPack table. False if there is no table or torch refuses.
// numel receives the number of elements.
bool look(PyObject* source, const Exchange* exchange, Tensor& tensor, int64_t& numel) {
  DLTensor t;
  if (!exchange || exchange->look(source, &t)) {
    PyErr_Clear();
    return false;
  }
  tensor = {t.start(), {1, 1}, dtype_of(t)};
  numel = 1;
  for (int i = 0; i < t.dims; ++i) {
    tensor.shape[i < 2 ? i : 1] = t.shape[i];
    numel *= t.shape[i];
  }
  return true;
}

// A torch tensor as kernels see it. Raises TypeError for a dtype without kernels and ValueError
// for elements without memory, as a fake tensor has them.
Tensor view(PyObject* source) {
  static const Names& names = *new Names;
  Tensor tensor{nullptr, {1, 1}, Dtype::none};
  int64_t numel = 1;
  if (!look(source, names.exchange, tensor, numel)) {
    tensor.data =
        PyLong_AsVoidPtr(own(PyObject_CallMethodNoArgs(source, names.data_ptr)).ptr());
    const auto shape = own(PyObject_GetAttr(source, names.shape));
    const auto dims = PyTuple_GET_SIZE(shape.ptr());
    for (Py_ssize_t i = 0; i < dims; ++i) {
      const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      tensor.shape[i < 2 ? i : 1] = size;
      numel *= size;
    }
    const auto dtype = own(PyObject_GetAttr(source, names.dtype));
    for (int i = 0; i < 8; ++i)
      if (dtype.ptr() == names.dtypes[i]) tensor.dtype = Dtype(i);
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  if (tensor.dtype == Dtype::none) {
    const auto dtype = own(PyObject_GetAttr(source, names.dtype));
    throw py::type_error("peftops: no kernel for " + std::string(py::str(dtype)));
  }
  if (!tensor.data && numel)
    throw py::value_error("peftops: a kernel got a tensor without memory");
  return tensor;
}

}  // namespace

template <>
struct pybind11::detail::type_caster<Tensor> {
  PYBIND11_TYPE_CASTER(Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = source.is_none() ? Tensor{nullptr, {0, 0}, Dtype::none} : view(source.ptr());
    return true;
  }
};

template <>
struct pybind11::detail::type_caster<Tensors> {
  PYBIND11_TYPE_CASTER(Tensors, const_name("list[torch.Tensor]"));
  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr()) || PyList_GET_SIZE(source.ptr()) > 6) return false;
    value.count = PyList_GET_SIZE(source.ptr());
    for (int64_t i = 0; i < value.count; ++i)
      value.at[i] = view(PyList_GET_ITEM(source.ptr(), i));
    return true;
  }
};

template <>
struct pybind11::detail::type_caster<Form> {
  PYBIND11_TYPE_CASTER(Form, const_name("str"));
  bool load(handle source, bool) {
    if (!PyUnicode_Check(source.ptr()) || !PyUnicode_GET_LENGTH(source.ptr())) return false;
    switch (PyUnicode_READ_CHAR(source.ptr(), 0)) {  // no two forms begin with the same letter
      case 'd':
        value = Form::dense;
        return true;
      case 't':
        value = Form::transposed;
        return true;
      case 'g':
        value = Form::given;
        return true;
      case 'n':
        value = Form::nf4;
        return true;
    }
    return false;
  }
};
