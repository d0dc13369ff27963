// Replay: a callable that stands for an op's launcher. When it is called a second time with the
// same sort of arguments, it has Python make a plan; from then on it plays that plan.
#include "replay.h"

#include <structmember.h>

#include <string>
#include <unordered_map>

#include "plan.h"

namespace peftops {

namespace {

// What is known of arguments that share a key. Arguments that come only once get no plan.
struct Entry {
  std::vector<uint64_t> words;  // of the key
  bool tried = false;           // whether Python was asked for a plan
  std::shared_ptr<Plan> plan;   // null if there is none
};
using Entries = std::unordered_multimap<uint64_t, Entry>;  // by the hash of their keys

uint64_t forgotten = 0;  // how often forget() was called
int paused = 0;          // how many callers are inside of paused()

// The Python object.
struct Replay {
  PyObject_HEAD vectorcallfunc call;
  PyObject* first;     // (whether to plan, *args) -> (outputs, Plan or None): runs the launcher
  PyObject* forced;    // a dict; if it is not empty, the key of arguments includes state()
  PyObject* state;     // a function that returns something hashable
  size_t most;         // entries that are kept
  uint64_t forgotten;  // value of the global `forgotten` when the entries were last emptied
  Entries* entries;
};

// Destroying a plan runs Python, and then other threads may look into the entries. So the
// entries are emptied before their plans are destroyed.
void clear(Replay& replay) {
  Entries old;
  std::swap(old, *replay.entries);
}

// The entry of this key, or null. Anything that runs Python may remove the entry.
Entry* find(Replay& replay, const Key& key) {
  if (replay.forgotten != forgotten) {
    replay.forgotten = forgotten;
    clear(replay);
  }
  const auto [from, to] = replay.entries->equal_range(key.hash);
  for (auto it = from; it != to; ++it) {
    const auto& words = it->second.words;
    if (words.size() == (size_t)key.count && !memcmp(words.data(), key.words, 8 * key.count))
      return &it->second;
  }
  return nullptr;
}

void add(Replay& replay, const Key& key) {
  if (replay.entries->size() >= replay.most) clear(replay);
  replay.entries->emplace(key.hash, Entry{{key.words, key.words + key.count}});
}

// Whether the current CUDA device is the one that holds these tensors.
bool on_current_device(const Arguments& arguments) {
  if (arguments.device[0] != ON_CUDA) return true;
  const Torch& torch = Torch::get();
  const py::object now = torch.inside.attr(torch.device)();
  return PyLong_AsLong(now.ptr()) == arguments.device[1];
}

// Reads args. Whether a plan may serve them; what else it depends on is added to their key.
bool read(Replay& replay, Arguments& arguments, PyObject* const* args, Py_ssize_t count) {
  if (paused || !Torch::get().exchange) return false;
  if (!arguments.read(args, count) || !on_current_device(arguments)) return false;
  if (PyDict_GET_SIZE(replay.forced)) {
    const py::object state = py::handle(replay.state)();
    arguments.key.add(PyObject_Hash(state.ptr()));
  }
  return arguments.key.complete;
}

py::object call(Replay& replay, PyObject* const* args, Py_ssize_t count) {
  Arguments arguments;
  bool plan = false;  // whether to ask for a plan
  if (read(replay, arguments, args, count)) {
    if (Entry* entry = find(replay, arguments.key)) {
      const auto held = entry->plan;
      plan = !entry->tried;
      if (held && held->allowed()) return held->play(arguments);
    } else {
      add(replay, arguments.key);
    }
  }
  std::vector<PyObject*> all = {plan ? Py_True : Py_False};
  all.insert(all.end(), args, args + count);
  const auto answer = py::reinterpret_steal<py::tuple>(
      PyObject_Vectorcall(replay.first, all.data(), all.size(), nullptr));
  if (!answer) throw py::error_already_set();
  Entry* entry = plan ? find(replay, arguments.key) : nullptr;
  if (entry) {
    entry->tried = true;
    if (!entry->plan && !answer[1].is_none())
      entry->plan = answer[1].cast<std::shared_ptr<Plan>>();
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
  replay->entries = new Entries;
  return (PyObject*)replay;
}

void drop(PyObject* self) {
  auto* replay = (Replay*)self;
  PyTypeObject* type = Py_TYPE(self);
  delete replay->entries;
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
    for (const auto& entry : *replay->entries) count += entry.second.plan != nullptr;
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
