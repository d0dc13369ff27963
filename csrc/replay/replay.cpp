// Replay: an op whose launcher is planned when a kind of arguments comes a second time, and
// whose plan is played then.
#include "replay.h"

#include <structmember.h>

#include <string>
#include <unordered_map>

#include "plan.h"

namespace peftops {

namespace {

// One kind of arguments. What comes once only is not worth a plan.
struct Kind {
  std::vector<uint64_t> words;
  bool tried = false;          // to plan
  std::shared_ptr<Plan> plan;  // null where there can be none
};

uint64_t forgotten = 0;  // how often all plans were forgotten
int paused = 0;          // how many are inside of paused()

struct Replay {
  PyObject_HEAD vectorcallfunc call;
  PyObject* first;  // (whether to plan, *args) -> (outputs, Plan or None)
  PyObject*
      forced;  // a dict; where it is not empty, state() is part of what arguments are alike by
  PyObject* state;
  size_t most;
  uint64_t forgotten;
  std::unordered_multimap<uint64_t, Kind>* kinds;
};

// Empties first what other threads may look into while plans are destroyed, which runs Python.
void clear(Replay& replay) {
  std::unordered_multimap<uint64_t, Kind> old;
  std::swap(old, *replay.kinds);
}

// The kind of these arguments, or null; it may be gone after anything that runs Python.
Kind* find(Replay& replay, const Key& key) {
  if (replay.forgotten != forgotten) {
    replay.forgotten = forgotten;
    clear(replay);
  }
  const auto [from, to] = replay.kinds->equal_range(key.hash);
  for (auto it = from; it != to; ++it) {
    const auto& words = it->second.words;
    if (words.size() == (size_t)key.count && !memcmp(words.data(), key.words, 8 * key.count))
      return &it->second;
  }
  return nullptr;
}

void add(Replay& replay, const Key& key) {
  if (replay.kinds->size() >= replay.most) clear(replay);
  replay.kinds->emplace(key.hash, Kind{{key.words, key.words + key.count}});
}

// Whether a kernel that is launched now runs where these tensors are.
bool here(const Arguments& given) {
  if (given.device[0] != ON_CUDA) return true;
  const Torch& torch = Torch::get();
  const py::object now = torch.inside.attr(torch.device)();
  return PyLong_AsLong(now.ptr()) == given.device[1];
}

// Whether a plan may serve these arguments; what else it depends on goes into their key.
bool alike(Replay& replay, Arguments& given, PyObject* const* args, Py_ssize_t count) {
  if (paused || !Torch::get().exchange || !given.read(args, count) || !here(given))
    return false;
  if (PyDict_GET_SIZE(replay.forced)) {
    const py::object state = py::handle(replay.state)();
    given.key.add(PyObject_Hash(state.ptr()));
  }
  return given.key.complete;
}

py::object call(Replay& replay, PyObject* const* args, Py_ssize_t count) {
  Arguments given;
  bool plan = false;
  if (alike(replay, given, args, count)) {
    if (Kind* kind = find(replay, given.key)) {
      const auto held = kind->plan;
      plan = !kind->tried;
      if (held && held->allowed()) return held->play(given);
    } else {
      add(replay, given.key);
    }
  }
  std::vector<PyObject*> all = {plan ? Py_True : Py_False};
  all.insert(all.end(), args, args + count);
  const auto answer = py::reinterpret_steal<py::tuple>(
      PyObject_Vectorcall(replay.first, all.data(), all.size(), nullptr));
  if (!answer) throw py::error_already_set();
  if (Kind* kind = plan ? find(replay, given.key) : nullptr) {
    kind->tried = true;
    if (!kind->plan && !answer[1].is_none())
      kind->plan = answer[1].cast<std::shared_ptr<Plan>>();
  }
  return answer[0];
}

PyObject* vectorcall(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  try {
    if (names && PyTuple_GET_SIZE(names))
      throw py::type_error("an op takes its arguments in order");
    return call(*(Replay*)self, args, PyVectorcall_NARGS(flags)).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  PyObject *first, *forced, *state;
  Py_ssize_t most;
  if (!PyArg_ParseTuple(args, "OO!On", &first, &PyDict_Type, &forced, &state, &most))
    return nullptr;
  auto* replay = (Replay*)type->tp_alloc(type, 0);
  if (!replay) return nullptr;
  replay->call = vectorcall;
  replay->first = Py_NewRef(first);
  replay->forced = Py_NewRef(forced);
  replay->state = Py_NewRef(state);
  replay->most = most;
  replay->forgotten = forgotten;
  replay->kinds = new std::unordered_multimap<uint64_t, Kind>;
  return (PyObject*)replay;
}

void drop(PyObject* self) {
  auto* replay = (Replay*)self;
  PyTypeObject* type = Py_TYPE(self);
  delete replay->kinds;
  Py_DECREF(replay->first);
  Py_DECREF(replay->forced);
  Py_DECREF(replay->state);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* plans(PyObject* self, PyObject*) {
  auto* replay = (Replay*)self;
  size_t count = 0;
  if (replay->forgotten == forgotten)
    for (const auto& one : *replay->kinds) count += one.second.plan != nullptr;
  return PyLong_FromSize_t(count);
}

PyMethodDef methods[] = {{"plans", plans, METH_NOARGS, "How many plans it keeps."}, {}};
PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Replay, call), READONLY},
                         {}};
PyType_Slot slots[] = {{Py_tp_new, (void*)make},
                       {Py_tp_dealloc, (void*)drop},
                       {Py_tp_methods, methods},
                       {Py_tp_members, members},
                       {Py_tp_call, (void*)PyVectorcall_Call},
                       {Py_tp_doc, (void*)"Replay(first, forced, state, most)"},
                       {}};
PyType_Spec spec = {"peftops._C.Replay", sizeof(Replay), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

}  // namespace

void bind_replay(py::module_& m) {
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan").def(
      py::init<py::list, bool, py::list, py::object, py::list, py::object, py::object>());
  m.attr("Replay") = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  m.def("forget", [] { ++forgotten; });
  m.def("pause", [](int more) { paused += more; });
}

}  // namespace peftops
