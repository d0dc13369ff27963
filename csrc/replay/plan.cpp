#include "plan.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

namespace peftops {

namespace {

using Driver = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned, unsigned shared, void* stream, void** parameters,
                       void** extra);

// cuLaunchKernel of the driver that Triton has loaded
Driver driver() {
  static const auto launch = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    return library ? (Driver)dlsym(library, "cuLaunchKernel") : nullptr;
  }();
  if (!launch) throw std::runtime_error("peftops: libcuda.so.1 has no cuLaunchKernel");
  return launch;
}

// The current stream, asked for once in a replay
const py::object& stream(const Slots& slots) {
  if (!slots.stream) {
    const Torch& torch = Torch::get();
    const auto function = own(PyObject_GetAttr(torch.inside.ptr(), torch.stream.ptr()));
    slots.stream =
        own(PyObject_CallOneArg(function.ptr(), own(PyLong_FromLong(slots.device[1])).ptr()));
  }
  return slots.stream;
}

void add(Slots& slots, PyObject* tensor, char* start) {
  if (slots.count == Slots::MOST)
    throw std::runtime_error("peftops: a plan of too many tensors");
  slots.tensors[slots.count] = tensor;
  slots.starts[slots.count++] = start;
}

}  // namespace

Operand::Operand(const py::tuple& told) {
  static const std::map<std::string, Kind> kinds = {
      {"constant", CONSTANT}, {"slot", SLOT}, {"turned", TURNED},
      {"strided", STRIDED},   {"list", LIST}, {"stream", STREAM}};
  kind = kinds.at(told[0].cast<std::string>());
  if (kind == CONSTANT) constant = told[1];
  if (kind == SLOT || kind == TURNED || kind == STRIDED) slot = told[1].cast<int>();
  if (kind == STRIDED) constant = told[2];
  if (kind == LIST)
    for (const auto item : told[1]) items.emplace_back(item.cast<py::tuple>());
}

py::object Operand::make(const Slots& slots) const {
  const Torch& torch = Torch::get();
  switch (kind) {
    case SLOT:
      return py::reinterpret_borrow<py::object>(slots.tensors[slot]);
    case TURNED:
      return own(PyObject_GetAttr(slots.tensors[slot], torch.turned.ptr()));
    case STRIDED: {
      const auto tuple = constant.ptr();
      return own(PyObject_CallFunctionObjArgs(
          torch.as_strided.ptr(), slots.tensors[slot], PyTuple_GET_ITEM(tuple, 0),
          PyTuple_GET_ITEM(tuple, 1), PyTuple_GET_ITEM(tuple, 2), nullptr));
    }
    case LIST: {
      auto list = own(PyList_New(items.size()));
      for (size_t i = 0; i < items.size(); ++i)
        PyList_SET_ITEM(list.ptr(), i, items[i].make(slots).release().ptr());
      return list;
    }
    case STREAM:
      return stream(slots);
    default:
      return constant;
  }
}

Call::Call(const py::tuple& told) : function(told[1]), names(told[3]) {
  for (const auto operand : told[2]) operands.emplace_back(operand.cast<py::tuple>());
}

void Call::run(const Slots& slots) const {
  std::vector<py::object> made;
  std::vector<PyObject*> args;
  made.reserve(operands.size());
  args.reserve(operands.size());
  for (const auto& operand : operands) {
    made.push_back(operand.make(slots));
    args.push_back(made.back().ptr());
  }
  PyObject* named = names.is_none() ? nullptr : names.ptr();
  const size_t positional = args.size() - (named ? PyTuple_GET_SIZE(named) : 0);
  own(PyObject_Vectorcall(function.ptr(), args.data(), positional, named));
}

Launch::Launch(const py::tuple& told) {
  function = (void*)told[1].cast<uint64_t>();
  for (int i = 0; i < 3; ++i) grid[i] = told[2].cast<py::tuple>()[i].cast<unsigned>();
  threads = told[3].cast<unsigned>();
  shared = told[4].cast<unsigned>();
  values = told[5].cast<std::vector<uint64_t>>();
  if (values.size() > MOST)
    throw std::runtime_error("peftops: a kernel of too many parameters");
  for (const auto pointer : told[6]) {
    const auto [parameter, slot, offset] = pointer.cast<std::tuple<int, int, int64_t>>();
    pointers.push_back({parameter, slot, offset});
  }
}

void Launch::run(const Slots& slots) const {
  uint64_t held[MOST];
  void* parameters[MOST];
  for (size_t i = 0; i < values.size(); ++i) {
    held[i] = values[i];
    parameters[i] = held + i;
  }
  for (const auto& pointer : pointers)
    held[pointer.parameter] = (uint64_t)slots.starts[pointer.slot] + pointer.offset;
  void* handle = PyLong_AsVoidPtr(stream(slots).ptr());
  const auto launch = driver();
  PyThreadState* state = PyEval_SaveThread();  // a full queue makes the driver wait
  const int code = launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, handle,
                          parameters, nullptr);
  PyEval_RestoreThread(state);
  if (code)
    throw std::runtime_error("peftops: a launch failed with CUDA error " +
                             std::to_string(code));
}

Fresh::Fresh(const py::object& told) {
  if (!py::isinstance<py::tuple>(told)) {
    shared = told;
    return;
  }
  const auto pair = told.cast<py::tuple>();
  place = pair[0];
  options = pair[1];
}

py::object Fresh::make() const {
  return shared ? shared
                : own(PyObject_Call(Torch::get().empty.ptr(), place.ptr(), options.ptr()));
}

Plan::Plan(py::list outputs, bool single, py::list temporaries, py::object scratch,
           py::list steps, py::object unless, py::object kept)
    : outputs(outputs.size()), single(single), unless(unless), kept(kept) {
  for (const auto& told : {outputs, temporaries})
    for (const auto one : told) fresh.emplace_back(py::reinterpret_borrow<py::object>(one));
  if (!scratch.is_none()) {
    const auto pair = scratch.cast<py::tuple>();
    fresh.emplace_back(pair[0]);
    parts = pair[1].cast<std::vector<int64_t>>();
  }
  for (const auto one : steps) {
    const auto told = one.cast<py::tuple>();
    const bool call = told[0].cast<std::string>() == "call";
    this->steps.push_back(call ? std::unique_ptr<Step>(new Call(told))
                               : std::unique_ptr<Step>(new Launch(told)));
  }
}

bool Plan::allowed() const {
  if (unless.is_none()) return true;
  const auto answer = own(PyObject_CallNoArgs(unless.ptr()));
  return answer.ptr() == Py_False;
}

py::object Plan::play(const Arguments& given) const {
  Slots slots;
  slots.device = given.device;
  for (int i = 0; i < given.count; ++i) add(slots, given.tensors[i], given.starts[i]);
  std::vector<py::object> made;
  made.reserve(fresh.size());
  for (const auto& one : fresh) {
    made.push_back(one.make());
    DLTensor t;
    if (Torch::get().exchange->look(made.back().ptr(), &t)) throw py::error_already_set();
    if (parts.empty() || made.size() < fresh.size())
      add(slots, made.back().ptr(), t.start());
    else
      for (const int64_t offset : parts) add(slots, nullptr, t.start() + offset);
  }
  for (const auto& step : steps) step->run(slots);
  if (single) return made[0];
  auto result = own(PyTuple_New(outputs));
  for (size_t i = 0; i < outputs; ++i)
    PyTuple_SET_ITEM(result.ptr(), i, made[i].release().ptr());
  return result;
}

}  // namespace peftops
