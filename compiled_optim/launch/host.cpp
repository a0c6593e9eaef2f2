// The host side of a CPU step: walks parameters, gradients and state where they are kept now, checks every tensor before
// any is dereferenced, and makes one call per kernel. 100 tensors cost about 4 us here; reading the same addresses from
// Python costs 50 (issue 2). Nothing is remembered that could dangle: a plan holds names, shapes of dictionaries and
// dtypes, and takes each address from the live object in the step that uses it.
#include "plan.h"

namespace {

bool forked = false;

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
  auto* plan = new Plan;
  plan->counts = static_cast<size_t>(counts);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++)
    plan->slot_names.emplace_back(PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i)));
  return PyCapsule_New(plan, "compiled_optim.plan", drop_plan);
}

// add_launch(plan, kernel address, parameter, buffers by slot): dtypes are taken from the samples.
PyObject* add_launch(PyObject*, PyObject* args) {
  PyObject *capsule, *param, *buffers;
  unsigned long long kernel;
  if (!PyArg_ParseTuple(args, "OKOO!", &capsule, &kernel, &param, &PyDict_Type, &buffers)) return nullptr;
  return guarded([&]() -> PyObject* {
    Launch launch{reinterpret_cast<Kernel>(kernel)};
    launch.param_type = unpack(param)->scalar_type();
    launch.width = c10::isComplexType(launch.param_type) ? 2 : 1;
    PyObject *slot, *sample;
    Py_ssize_t at = 0;
    while (PyDict_Next(buffers, &at, &slot, &sample)) {
      launch.roles.push_back(static_cast<int>(PyLong_AsLong(slot)));
      launch.types.push_back(unpack(sample)->scalar_type());
    }
    plan_of(capsule)->launches.push_back(std::move(launch));
    Py_RETURN_NONE;
  });
}

// add_group(plan, [(parameter, launch, fresh), ...])
PyObject* add_group(PyObject*, PyObject* args) {
  PyObject *capsule, *list;
  if (!PyArg_ParseTuple(args, "OO!", &capsule, &PyList_Type, &list)) return nullptr;
  auto* plan = plan_of(capsule);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
    Entry entry{nullptr, static_cast<int>(plan->group_sizes.size()), 0, false};
    int fresh;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "Oip", &entry.param, &entry.launch, &fresh)) return nullptr;
    entry.fresh = fresh;
    plan->entries.push_back(entry);
  }
  plan->group_sizes.push_back(PyList_GET_SIZE(list));
  Py_RETURN_NONE;
}

// seal(plan, state): notes the order and the keys of the optimizer's state.
PyObject* seal(PyObject*, PyObject* args) {
  PyObject *capsule, *state, *key, *value;
  if (!PyArg_ParseTuple(args, "OO!", &capsule, &PyDict_Type, &state)) return nullptr;
  auto* plan = plan_of(capsule);
  std::unordered_map<PyObject*, int64_t> entry_of;
  for (size_t i = 0; i < plan->entries.size(); i++)
    if (plan->entries[i].launch >= 0) entry_of[plan->entries[i].param] = i;
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
      const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : "";
      int slot = -1;
      for (size_t s = 0; s < plan->slot_names.size(); s++)
        if (plan->slot_names[s] == text) slot = static_cast<int>(s);
      layout.keys.push_back(name);
      layout.slots.push_back(slot);
    }
    int index = 0;
    for (; index < static_cast<int>(plan->layouts.size()); index++)
      if (plan->layouts[index].keys == layout.keys) break;
    if (index == static_cast<int>(plan->layouts.size())) {
      for (auto* k : layout.keys) Py_INCREF(k);
      plan->layouts.push_back(std::move(layout));
    }
    plan->tracked.push_back({key, found->second, index});
  }
  plan->slots.assign(plan->entries.size() * plan->slot_names.size(), nullptr);
  Py_RETURN_NONE;
}

// Below this many elements a step is shorter than handing over the interpreter lock and the references is worth.
constexpr int64_t kReleaseLock = 1 << 19;
// Below this, starting a team of threads costs more than it saves.
constexpr int64_t kOneThread = 1 << 13;

void launch_all(Plan* plan, const std::vector<double>& table, int64_t columns, int threads) {
  for (auto& launch : plan->launches) {
    const auto tensors = static_cast<int64_t>(launch.rows.size());
    if (!tensors) continue;
    const int team = forked || launch.begins.back() < kOneThread ? 1 : threads;
    launch.kernel(tensors, launch.table.data(), launch.begins.data(), launch.rows.data(), table.data(), columns, team);
  }
}

// run(plan, lists of parameters, state, rows, stand-ins, threads): None after a step. Otherwise nothing was written: a
// string says why the plan no longer fits, a list names the (group, counts) whose scalars are needed.
// `rows` lists (group, counts, scalars and what is carried on) as foreseen; `stand-ins` lists (parameter, copy of its
// gradient), or (parameter, values, indices) of a sparse one.
// No Python runs between the first look at a tensor and the last write but in the launch without the interpreter lock,
// where tensors are referenced; holding references in every step would cost 15 us of 100 tensors (issue 2).
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "run takes 6 arguments, got %zd", count);
  auto* plan = plan_of(args[0]);
  if (plan->busy) return PyErr_Format(PyExc_RuntimeError, "step() of this optimizer is already running in another thread");
  return guarded([&]() -> PyObject* {
    struct Busy {
      bool& flag;
      ~Busy() { flag = false; }
    } busy{plan->busy};
    if (!same_params(plan, args[1])) return PyUnicode_FromString("the param groups changed");
    Steps steps{std::max<size_t>(1, plan->counts)};
    std::vector<Count> counters;
    std::vector<Entry*> fresh;
    std::vector<double> table;
    if (const char* why = fill(plan, args[2], args[4], steps, counters, fresh)) return PyUnicode_FromString(why);
    const int64_t columns = foreseen(steps, args[3], table);
    if (columns < 0) return PyErr_Occurred() ? nullptr : needed(steps);
    plan->busy = true;
    const int threads = static_cast<int>(PyLong_AsLong(args[5]));
    int64_t elements = 0;
    const double* carried = table.data() + columns - (plan->counts ? plan->counts - 1 : 0);
    for (const auto& c : counters) {
      write_count(c.tensor, c.slot ? carried[c.row * columns + c.slot - 1] : steps.of(c.row)[0]);
      c.tensor->bump_version();
    }
    for (auto& launch : plan->launches) {
      elements += launch.begins.back();
      const size_t stride = 2 + launch.roles.size();
      for (size_t i = 0; i < launch.tensors.size(); i++)
        if (i % stride != 1) launch.tensors[i]->bump_version();  // gradients are only read
    }
    if (elements < kReleaseLock) {
      launch_all(plan, table, columns, threads);
    } else {
      for (auto& launch : plan->launches)
        for (auto* t : launch.tensors) c10::raw::intrusive_ptr::incref(t);
      Py_BEGIN_ALLOW_THREADS;
      launch_all(plan, table, columns, threads);
      Py_END_ALLOW_THREADS;
      for (auto& launch : plan->launches)
        for (auto* t : launch.tensors) c10::raw::intrusive_ptr::decref(t);
    }
    for (auto* entry : fresh) entry->fresh = false;
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

// matches(tensor, like): whether both have one dtype and one layout in memory.
PyObject* matches(PyObject*, PyObject* args) {
  PyObject *tensor, *like;
  if (!PyArg_ParseTuple(args, "OO", &tensor, &like)) return nullptr;
  const auto *a = unpack(tensor), *b = unpack(like);
  return PyBool_FromLong(a && b && plain(a->unsafeGetTensorImpl()) &&
                         same_layout(a->unsafeGetTensorImpl(), b->unsafeGetTensorImpl()));
}

// start(Tensor, Parameter, sample tensor, its data_ptr): the types, the dispatch keys, and the check of PyTensor.
PyObject* start(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *sample;
  unsigned long long pointer;
  if (!PyArg_ParseTuple(args, "OOOK", &tensor, &parameter, &sample, &pointer)) return nullptr;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  const auto* t = unpack(sample);
  if (!t || t->dim() != 2 || t->size(1) != 7 || t->scalar_type() != at::kDouble ||
      t->const_data_ptr() != reinterpret_cast<void*>(pointer))
    return PyErr_Format(PyExc_ImportError, "torch lays out its tensors in another way than this library was built for");
  plain_keys = t->unsafeGetTensorImpl()->key_set();
  Py_RETURN_NONE;
}

// after_fork(): OpenMP's threads do not survive a fork, so the child runs one (pitfall in issue 2).
PyObject* after_fork(PyObject*, PyObject*) {
  forked = true;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"make", make, METH_VARARGS, nullptr},
                         {"add_launch", add_launch, METH_VARARGS, nullptr},
                         {"add_group", add_group, METH_VARARGS, nullptr},
                         {"seal", seal, METH_VARARGS, nullptr},
                         {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run)), METH_FASTCALL, nullptr},
                         {"refusal", refusal, METH_O, nullptr},
                         {"matches", matches, METH_VARARGS, nullptr},
                         {"start", start, METH_VARARGS, nullptr},
                         {"after_fork", after_fork, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "host", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_host() { return PyModule_Create(&module); }
