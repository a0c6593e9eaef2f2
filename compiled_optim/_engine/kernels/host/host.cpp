// The host side of a CPU step: walks parameters, gradients and state where they are kept now, checks every tensor before
// any is dereferenced, and makes one call per kernel. 100 tensors cost about 4 us here; reading the same addresses from
// Python costs 50 (issue 2). Nothing is remembered that could dangle: a plan holds names, shapes of dictionaries and
// dtypes, and takes each address from the live object in the step that uses it.
#include <memory>

#include "step.h"

namespace {

// nullptr with a Python error for anything but a plan.
Plan* plan_of(PyObject* capsule) { return static_cast<Plan*>(PyCapsule_GetPointer(capsule, "compiled_optim.plan")); }

void drop_plan(PyObject* capsule) { delete plan_of(capsule); }

template <class Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// make(slot_names, how many of the first are counts): an empty plan.
PyObject* make(PyObject*, PyObject* args) {
  PyObject* names;
  Py_ssize_t counts;
  if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &names, &counts)) return nullptr;
  if (counts < 0 || counts > PyTuple_GET_SIZE(names))
    return PyErr_Format(PyExc_ValueError, "%zd of %zd slots cannot be counts", counts, PyTuple_GET_SIZE(names));
  return guarded([&]() -> PyObject* {
    auto plan = std::make_unique<Plan>();
    plan->counts = static_cast<size_t>(counts);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
      const char* name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i));
      if (!name) return nullptr;
      plan->slot_names.emplace_back(name);
    }
    PyObject* capsule = PyCapsule_New(plan.get(), "compiled_optim.plan", drop_plan);
    if (capsule) plan.release();
    return capsule;
  });
}

// add_launch(plan, kernel address, parameter, buffers by slot): dtypes are taken from the samples.
PyObject* add_launch(PyObject*, PyObject* args) {
  PyObject *capsule, *param, *buffers;
  unsigned long long kernel;
  if (!PyArg_ParseTuple(args, "OKOO!", &capsule, &kernel, &param, &PyDict_Type, &buffers)) return nullptr;
  return guarded([&]() -> PyObject* {
    auto* plan = plan_of(capsule);
    if (!plan) return nullptr;
    const auto* tensor = unpack(param);
    if (!tensor || !kernel) throw std::invalid_argument("a launch needs a kernel and a plain tensor");
    Launch launch{reinterpret_cast<Kernel>(kernel), tensor->scalar_type()};
    launch.itemsize = static_cast<int64_t>(tensor->itemsize());
    launch.width = c10::isComplexType(launch.param_type) ? 2 : 1;
    PyObject *slot, *sample;
    Py_ssize_t at = 0;
    while (PyDict_Next(buffers, &at, &slot, &sample)) {
      const size_t role = PyLong_AsSize_t(slot);
      if (PyErr_Occurred()) return nullptr;
      const auto* buffer = unpack(sample);
      if (!buffer || role < plan->counts || role >= plan->slot_names.size())
        throw std::invalid_argument("a buffer must be a plain tensor in one of the slots");
      launch.roles.push_back(role);
      launch.types.push_back(buffer->scalar_type());
      launch.itemsizes.push_back(static_cast<int64_t>(buffer->itemsize()));
    }
    plan->launches.push_back(std::move(launch));
    Py_RETURN_NONE;
  });
}

// add_group(plan, [(parameter, launch, fresh), ...])
PyObject* add_group(PyObject*, PyObject* args) {
  PyObject *capsule, *list;
  if (!PyArg_ParseTuple(args, "OO!", &capsule, &PyList_Type, &list)) return nullptr;
  return guarded([&]() -> PyObject* {
    auto* plan = plan_of(capsule);
    if (!plan) return nullptr;
    std::vector<Entry> entries;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
      PyObject* item = PyList_GET_ITEM(list, i);
      Entry entry{nullptr, static_cast<int>(plan->group_sizes.size()), 0, false};
      int fresh;
      if (!PyTuple_Check(item)) throw std::invalid_argument("an entry must be a tuple");
      if (!PyArg_ParseTuple(item, "Oip", &entry.param, &entry.launch, &fresh)) return nullptr;
      if (entry.launch < kStateless || entry.launch >= static_cast<int>(plan->launches.size()))
        throw std::invalid_argument("an entry names a launch that there is not");
      entry.fresh = fresh;
      entries.push_back(entry);
    }
    plan->entries.insert(plan->entries.end(), entries.begin(), entries.end());
    plan->group_sizes.push_back(static_cast<int64_t>(entries.size()));
    Py_RETURN_NONE;
  });
}

// seal(plan, state): notes the order and the keys of the optimizer's state. Nothing can be added after.
PyObject* seal(PyObject*, PyObject* args) {
  PyObject *capsule, *state, *key, *value;
  if (!PyArg_ParseTuple(args, "OO!", &capsule, &PyDict_Type, &state)) return nullptr;
  return guarded([&]() -> PyObject* {
    auto* plan = plan_of(capsule);
    if (!plan) return nullptr;
    std::unordered_map<PyObject*, int64_t> entry_of;
    std::vector<bool> eager;
    for (size_t i = 0; i < plan->entries.size(); i++) {
      eager.push_back(plan->entries[i].launch == kElsewhere);
      if (plan->entries[i].launch != kStateless) entry_of[plan->entries[i].param] = static_cast<int64_t>(i);
    }
    Py_ssize_t at = 0;
    while (PyDict_Next(state, &at, &key, &value)) {
      auto found = entry_of.find(key);
      if (found == entry_of.end() || !PyDict_Check(value)) {
        plan->tracked.push_back({key, kElsewhere, 0});
        continue;
      }
      Layout layout;
      PyObject *name, *tensor;
      Py_ssize_t inner = 0;
      while (PyDict_Next(value, &inner, &name, &tensor)) {
        const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
        if (!text) PyErr_Clear();  // a lone surrogate, say: not ours
        int slot = -1;
        for (size_t s = 0; text && s < plan->slot_names.size(); s++)
          if (plan->slot_names[s] == text) slot = static_cast<int>(s);
        layout.keys.push_back(name);
        layout.slots.push_back(slot);
      }
      int index = 0;
      for (; index < static_cast<int>(plan->layouts.size()); index++)
        if (plan->layouts[index].keys == layout.keys) break;
      if (index == static_cast<int>(plan->layouts.size())) {
        plan->layouts.push_back(std::move(layout));
        for (auto* k : plan->layouts.back().keys) Py_INCREF(k);
      }
      plan->tracked.push_back({key, found->second, index});
    }
    plan->slots.assign(plan->entries.size() * plan->slot_names.size(), nullptr);
    plan->tensors.assign(plan->entries.size() * plan->cells(), nullptr);
    plan->memory = Memory(std::move(eager), plan->slot_names.size(), plan->counts);
    plan->sealed = true;
    Py_RETURN_NONE;
  });
}

// conflicts(members, how many counts): why no kernel takes each (updated eagerly, parameter, gradient, slots), or None.
PyObject* conflicts(PyObject*, PyObject* args) {
  PyObject* members;
  Py_ssize_t counts;
  if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &members, &counts)) return nullptr;
  return guarded([&]() -> PyObject* {
    std::vector<bool> eager;
    std::vector<std::vector<const c10::TensorImpl*>> tensors;
    size_t slots_at_most = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(members); i++) {
      PyObject *param, *grad, *slots, *member = PyList_GET_ITEM(members, i);
      int is_eager;
      if (!PyTuple_Check(member)) throw std::invalid_argument("a member must be a tuple");
      if (!PyArg_ParseTuple(member, "pOOO!", &is_eager, &param, &grad, &PyTuple_Type, &slots)) return nullptr;
      eager.push_back(is_eager);
      tensors.push_back({in_memory(grad), in_memory(param)});
      for (Py_ssize_t s = 0; s < PyTuple_GET_SIZE(slots); s++)
        tensors.back().push_back(in_memory(PyTuple_GET_ITEM(slots, s)));
      slots_at_most = std::max(slots_at_most, static_cast<size_t>(PyTuple_GET_SIZE(slots)));
    }
    Memory memory(std::move(eager), slots_at_most, static_cast<size_t>(counts));
    for (size_t e = 0; e < tensors.size(); e++)
      for (size_t c = 0; c < tensors[e].size(); c++)
        if (const auto* t = tensors[e][c]) memory.note(e, c, range(t, reach(t), static_cast<int64_t>(t->itemsize()), c == Memory::kGradient));
    std::vector<const char*> reasons(tensors.size(), nullptr);
    for (bool found = true; found;) {  // what is refused is updated eagerly, and so is what overlaps that
      found = false;
      const auto sharing = memory.sharing();
      for (size_t e = 0; e < tensors.size(); e++) {
        if (memory.is_eager(e) || !(sharing[e] & kRefused)) continue;
        reasons[e] = why_refused(sharing[e]);
        memory.make_eager(e);
        found = true;
      }
    }
    PyObject* list = PyList_New(0);
    for (size_t e = 0; list && e < reasons.size(); e++) {
      PyObject* reason = Py_BuildValue("z", reasons[e]);
      if (!reason || PyList_Append(list, reason) < 0) Py_CLEAR(list);
      Py_XDECREF(reason);
    }
    return list;
  });
}

// Below this many elements a step is shorter than handing over the interpreter lock and holding memory is worth.
constexpr int64_t kReleaseLock = 1 << 19;
// Below this, starting a team of threads costs more than it saves.
constexpr int64_t kOneThread = 1 << 13;

void launch_all(Plan* plan, const Foreseen& scalars, int threads) {
  auto call = [&](const Launch& launch, const Table& table) {
    const auto tensors = static_cast<int64_t>(table.rows.size());
    if (!tensors) return;
    const int team = table.begins.back() < kOneThread ? 1 : threads;
    launch.kernel(tensors, table.cells.data(), table.begins.data(), table.rows.data(), scalars.table.data(),
                  scalars.columns, team);
  };
  for (const auto& launch : plan->launches) call(launch, launch.table);
  for (auto& turn : plan->turns) {
    if (!turn.copy.empty()) std::copy(turn.gradient.begin, turn.gradient.end, turn.copy.begin());
    call(plan->launches[turn.launch], turn.table);
  }
}

// Keeps the memory of tensors while other threads run Python: they may give a tensor other data, so it is the storage
// that is held; and to resize one frees its memory nevertheless, so that raises until the launch is over.
class Held {
 public:
  void hold(const c10::TensorImpl* t) {
    auto* storage = t->storage().unsafeGetStorageImpl();
    held_.push_back({t->storage(), storage->resizable()});
    storage->set_resizable(false);
  }
  ~Held() {
    for (auto& [storage, resizable] : held_)
      if (resizable) storage.unsafeGetStorageImpl()->set_resizable(true);
  }

 private:
  std::vector<std::pair<c10::Storage, bool>> held_;
};

// run(plan, lists of parameters, state, rows, stand-ins, threads): None after a step. Otherwise nothing was written: a
// string says why the plan no longer fits, a list names the (group, counts) whose scalars are needed, and False says
// that a row holds other objects than numbers, of which to make some would run Python.
// `rows` lists (group, counts, scalars and what is carried on) as foreseen; `stand-ins` lists (parameter, copy of its
// gradient), or (parameter, values, indices) of a sparse one.
// No Python runs between the first look at a tensor and the last write but in the launch without the interpreter lock,
// where memory is held; holding it in every step would cost 15 us of 100 tensors (issue 2).
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "run takes 6 arguments, got %zd", count);
  auto* plan = plan_of(args[0]);
  if (!plan) return nullptr;
  if (!plan->sealed || !PyTuple_Check(args[1]) || !PyDict_Check(args[2]) || !PyList_Check(args[3]) ||
      !PyList_Check(args[4]))
    return PyErr_Format(PyExc_TypeError, "run takes a sealed plan, a tuple, a dict and two lists");
  return guarded([&]() -> PyObject* {
    Steps steps{std::max<size_t>(1, plan->counts)};
    Foreseen scalars;
    if (!scalars.read(args[3], steps.width)) return nullptr;
    if (!scalars.are_numbers) Py_RETURN_FALSE;
    const int64_t carried = plan->counts ? static_cast<int64_t>(plan->counts) - 1 : 0;
    const long threads = std::max(1L, PyLong_AsLong(args[5]));
    if (PyErr_Occurred()) return nullptr;
    StandIns stand_ins;
    if (!read_stand_ins(args[4], stand_ins)) throw std::invalid_argument("a stand-in must be a tuple of 2 or 3");
    // from here on no Python runs
    if (plan->busy) throw std::runtime_error("step() of this optimizer is already running in another thread");
    if (!same_params(plan, args[1])) return PyUnicode_FromString("the param groups changed");
    std::vector<Count> counters;
    const char* why = collect(plan, args[2], stand_ins);
    if (!why) why = tabulate(plan, steps, counters);
    if (why) return PyUnicode_FromString(why);
    if (!scalars.fits(steps)) return needed(steps);
    if (!counters.empty() && scalars.columns < carried) throw std::invalid_argument("a row lacks what is carried on");
    int64_t elements = 0;
    for (const auto& launch : plan->launches) elements += launch.table.begins.back();
    for (const auto& turn : plan->turns) elements += turn.table.begins.back();
    Held held;  // and let go after `busy` is reset: what frees memory may run Python
    struct Busy {
      bool& flag;
      ~Busy() { flag = false; }
    } busy{plan->busy};
    auto each_tensor = [&](auto action) {
      for (const size_t e : plan->updated)
        for (size_t c = 0; c < plan->cells(); c++)
          if (const auto* t = plan->tensors[e * plan->cells() + c]) action(const_cast<c10::TensorImpl*>(t), c);
    };
    if (elements >= kReleaseLock) each_tensor([&](auto* t, size_t) { held.hold(t); });
    plan->busy = true;
    for (const auto& c : counters) {
      const double* last = scalars.table.data() + (c.row + 1) * scalars.columns - carried;
      c.write(c.slot ? last[c.slot - 1] : steps.of(c.row)[0]);
    }
    each_tensor([](auto* t, size_t cell) {
      if (cell != Memory::kGradient) t->bump_version();  // gradients are only read
    });
    if (elements < kReleaseLock) {
      launch_all(plan, scalars, static_cast<int>(threads));
    } else {
      Py_BEGIN_ALLOW_THREADS;
      launch_all(plan, scalars, static_cast<int>(threads));
      Py_END_ALLOW_THREADS;
    }
    for (const size_t e : plan->updated) plan->entries[e].fresh = false;
    Py_RETURN_NONE;
  });
}

// refusal(tensor): None for a tensor the kernels can walk, else the reason.
PyObject* refusal(PyObject*, PyObject* object) {
  const auto* tensor = unpack(object);
  if (!tensor) return PyUnicode_FromFormat("its type is %s", Py_TYPE(object)->tp_name);
  if (!plain(tensor->unsafeGetTensorImpl())) return PyUnicode_FromString("it is not a plain strided CPU tensor");
  if (!tensor->unsafeGetTensorImpl()->is_non_overlapping_and_dense())
    return PyUnicode_FromString("its elements overlap or leave gaps");
  Py_RETURN_NONE;
}

// is_whole(tensor): whether it can be read; a storage that was resized may end before its tensor.
PyObject* is_whole(PyObject*, PyObject* object) {
  const auto* t = in_memory(object);
  return PyBool_FromLong(!t || is_whole(t));
}

// matches(tensor, like): whether both have one dtype and one layout in memory.
PyObject* matches(PyObject*, PyObject* args) {
  PyObject *tensor, *like;
  if (!PyArg_ParseTuple(args, "OO", &tensor, &like)) return nullptr;
  const auto *a = unpack(tensor), *b = unpack(like);
  return PyBool_FromLong(a && b && plain(a->unsafeGetTensorImpl()) &&
                         same_layout(a->unsafeGetTensorImpl(), b->unsafeGetTensorImpl()));
}

// start(Tensor, Parameter, sample tensor, its data_ptr): the types, and the check of PyTensor.
PyObject* start(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *sample;
  unsigned long long pointer;
  if (!PyArg_ParseTuple(args, "O!O!OK", &PyType_Type, &tensor, &PyType_Type, &parameter, &sample, &pointer))
    return nullptr;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  const auto* t = unpack(sample);
  if (!t || t->dim() != 2 || t->size(1) != 7 || t->scalar_type() != at::kDouble ||
      t->const_data_ptr() != reinterpret_cast<void*>(pointer))
    return PyErr_Format(PyExc_ImportError, "torch lays out its tensors in another way than this library was built for");
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"make", make, METH_VARARGS, nullptr},
                         {"add_launch", add_launch, METH_VARARGS, nullptr},
                         {"add_group", add_group, METH_VARARGS, nullptr},
                         {"seal", seal, METH_VARARGS, nullptr},
                         {"conflicts", conflicts, METH_VARARGS, nullptr},
                         {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run)), METH_FASTCALL, nullptr},
                         {"refusal", refusal, METH_O, nullptr},
                         {"is_whole", is_whole, METH_O, nullptr},
                         {"matches", matches, METH_VARARGS, nullptr},
                         {"start", start, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "compiled_optim._host", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&module); }
