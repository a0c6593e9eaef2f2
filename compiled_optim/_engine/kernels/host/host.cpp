// The host side of a step, the same for every device. It takes parameters, gradients and state from where Python keeps
// them now, checks every tensor before any is dereferenced, and calls each kernel once. 100 tensors cost about 4 us here;
// reading their addresses from Python costs 50. Nothing is remembered that could dangle: a plan holds names, keys of
// dictionaries and dtypes, and takes each address from the live object in the step that uses it.
#include <memory>

#include "averages.h"
#include "gradients.h"

namespace {

void drop_plan(PyObject* capsule) { delete plan_of(capsule); }

// make(names of the slots, how many of the first are counts): an empty plan.
PyObject* make(PyObject*, PyObject* args) {
  PyObject* names;
  Py_ssize_t counts;
  if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &names, &counts)) return nullptr;
  if (counts < 0 || counts > PyTuple_GET_SIZE(names))
    return PyErr_Format(PyExc_ValueError, "%zd of %zd slots cannot be counts", counts, PyTuple_GET_SIZE(names));
  return guarded([&]() -> PyObject* {
    auto plan = std::make_unique<Plan>();
    plan->counts = static_cast<size_t>(counts);
    plan->found.width = plan->expected.width = std::max<size_t>(1, plan->counts);
    plan->counts_of_row.resize(plan->found.width);
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

// add_launch(plan, kernel, parameter, buffers by slot, elements of a long launch[, on_device, by_rows, scaled[, gradient]]):
// the device and the dtypes are those of the given tensors, and a gradient has the parameter's unless one is given; for
// the rest see plan.h.
PyObject* add_launch(PyObject*, PyObject* args) {
  PyObject *capsule, *param, *buffers, *grad = nullptr;
  unsigned long long kernel;
  long long long_elements;
  int on_device = 0, by_rows = 0, scaled = 0;
  if (!PyArg_ParseTuple(args, "OKOO!L|pppO", &capsule, &kernel, &param, &PyDict_Type, &buffers, &long_elements, &on_device,
                        &by_rows, &scaled, &grad))
    return nullptr;
  return guarded([&]() -> PyObject* {
    auto* plan = plan_of(capsule);
    if (!plan) return nullptr;
    const auto *tensor = unpack(param), *gradient = unpack(grad ? grad : param);
    if (!tensor || !gradient || !kernel || long_elements < 1)
      throw std::invalid_argument("a launch needs a kernel, plain tensors and a number of elements");
    Launch launch{reinterpret_cast<Kernel>(kernel), Plain(tensor->unsafeGetTensorImpl()), long_elements};
    launch.param_type = tensor->scalar_type();
    launch.grad_type = gradient->scalar_type();
    launch.itemsize = static_cast<int64_t>(tensor->itemsize());
    launch.grad_itemsize = static_cast<int64_t>(gradient->itemsize());
    launch.width = c10::isComplexType(launch.param_type) ? 2 : 1;
    launch.off_host = !launch.plain.device.is_cpu();
    launch.on_device = on_device, launch.by_rows = by_rows, launch.scaled = scaled;
    launch.refused = refused_sharing(launch.off_host, on_device);
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
    launch.cells = 2 + launch.roles.size() + (by_rows ? 3 : 0) + (on_device ? plan->counts : 0);
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
      if (entry.launch < kNoState || entry.launch >= static_cast<int>(plan->launches.size()))
        throw std::invalid_argument("an entry names a launch that there is not");
      entry.fresh = fresh;
      entries.push_back(entry);
    }
    plan->entries.insert(plan->entries.end(), entries.begin(), entries.end());
    plan->group_sizes.push_back(static_cast<int64_t>(entries.size()));
    Py_RETURN_NONE;
  });
}

// seal(plan, state): notes the order and the keys of the optimizer's state. Nothing can be added to the plan afterwards.
PyObject* seal(PyObject*, PyObject* args) {
  PyObject *capsule, *state, *key, *value;
  if (!PyArg_ParseTuple(args, "OO!", &capsule, &PyDict_Type, &state)) return nullptr;
  return guarded([&]() -> PyObject* {
    auto* plan = plan_of(capsule);
    if (!plan) return nullptr;
    std::unordered_map<PyObject*, int64_t> entry_of;
    std::vector<bool> eager;
    for (size_t i = 0; i < plan->entries.size(); i++) {
      eager.push_back(plan->entries[i].launch == kNoLaunch);
      if (plan->entries[i].launch != kNoState) entry_of[plan->entries[i].param] = static_cast<int64_t>(i);
    }
    Py_ssize_t at = 0;
    while (PyDict_Next(state, &at, &key, &value)) {
      auto found = entry_of.find(key);
      if (found == entry_of.end() || !PyDict_Check(value)) {
        plan->tracked.push_back({key, kNoLaunch, 0});
        continue;
      }
      StateKeys known;
      PyObject *name, *tensor;
      Py_ssize_t inner = 0;
      while (PyDict_Next(value, &inner, &name, &tensor)) {
        const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
        if (!text) PyErr_Clear();  // not one of our slots, such as a lone surrogate
        int slot = -1;
        for (size_t s = 0; text && s < plan->slot_names.size(); s++)
          if (plan->slot_names[s] == text) slot = static_cast<int>(s);
        known.keys.push_back(name);
        known.slots.push_back(slot);
      }
      int index = 0;
      for (; index < static_cast<int>(plan->state_keys.size()); index++)
        if (plan->state_keys[index].keys == known.keys) break;
      if (index == static_cast<int>(plan->state_keys.size())) {
        plan->state_keys.push_back(std::move(known));
        for (auto* k : plan->state_keys.back().keys) Py_INCREF(k);
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

// conflicts(members, how many counts): for each (whether it is updated eagerly, parameter, gradient, slots), why no
// kernel can update it because of memory that it shares, or None.
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
    auto off_host = [&](size_t e, size_t cell) {
      return cell < tensors[e].size() && tensors[e][cell] && !tensors[e][cell]->is_cpu();
    };
    auto refused = [&](size_t e) {
      return refused_sharing(off_host(e, Memory::kParam), counts && off_host(e, Memory::kCounts0));
    };
    Memory memory(std::move(eager), slots_at_most, static_cast<size_t>(counts));
    for (size_t e = 0; e < tensors.size(); e++)
      for (size_t c = 0; c < tensors[e].size(); c++)
        if (const auto* t = tensors[e][c])
          memory.note(e, c, range(t, reach(t), static_cast<int64_t>(t->itemsize()), c == Memory::kGradient));
    std::vector<const char*> reasons(tensors.size(), nullptr);
    for (bool found = true; found;) {  // a refused parameter is updated eagerly, and so is what overlaps it
      found = false;
      const auto sharing = memory.sharing();
      for (size_t e = 0; e < tensors.size(); e++) {
        if (memory.is_eager(e) || !(sharing[e] & refused(e))) continue;
        reasons[e] = why_refused(sharing[e] & refused(e));
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

// run(plan, lists of parameters, state, rows, substitutes, contexts): one step. It returns None if it was done. Otherwise
// nothing was written: a string says why the plan no longer fits; a list names the (group, counts) whose scalars are
// needed; False says that a row holds objects that are no numbers, because converting them would run Python.
// `rows` lists (group, counts, scalars followed by the new recurrent scalars) as predicted; and for a launch `on_device`
// (code, zeros, hyperparameters followed by found_inf), each a number or a tensor of one on the launch's device, float32
// or float64. `substitutes` lists (parameter, gradient) for gradients that are not taken from the parameter, and
// (parameter, values, indices) for sparse ones, where the indices are numbers of rows, each once, if the launch is
// `by_rows`. `contexts` has the last argument of the kernel of each launch, as a number.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "run takes 6 arguments, got %zd", count);
  auto* plan = plan_of(args[0]);
  if (!plan) return nullptr;
  if (!plan->sealed || !PyTuple_Check(args[1]) || !PyDict_Check(args[2]) || !PyList_Check(args[3]) ||
      !PyList_Check(args[4]) || !PyTuple_Check(args[5]))
    return PyErr_Format(PyExc_TypeError, "run takes a sealed plan, a tuple, a dict, two lists and a tuple");
  return guarded([&]() -> PyObject* {
    Inputs inputs;
    if (!inputs.scalars.read(plan, args[3])) return nullptr;
    if (!inputs.scalars.are_numbers) Py_RETURN_FALSE;
    if (PyTuple_GET_SIZE(args[5]) != static_cast<Py_ssize_t>(plan->launches.size()))
      throw std::invalid_argument("each launch needs a context");
    for (Py_ssize_t l = 0; l < PyTuple_GET_SIZE(args[5]); l++) {
      inputs.contexts.push_back(PyLong_AsVoidPtr(PyTuple_GET_ITEM(args[5], l)));
      if (PyErr_Occurred()) return nullptr;
    }
    if (!read_substitutes(args[4], inputs.substitutes)) throw std::invalid_argument("a substitute must be a tuple of 2 or 3");
    for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(args[1]); g++) inputs.lists.push_back(Owned::borrowed(PyTuple_GET_ITEM(args[1], g)));
    inputs.state = args[2];
    const char* why = take_step(plan, inputs);
    if (why == kUnexpected) return as_list(plan->found);
    if (why) return PyUnicode_FromString(why);
    Py_RETURN_NONE;
  });
}

// expected(plan): the (group, counts) whose scalars the next step needs, if gradients come as in the last.
PyObject* expected(PyObject*, PyObject* capsule) {
  const auto* plan = plan_of(capsule);
  return plan ? as_list(plan->expected) : nullptr;
}

// quick(plan, absent, empty, observed, watched, owner, update, evaluate, hyper_type, options, groups, contexts): a function
// that takes one step of an optimizer in one call, or returns False and leaves it to `run`.
//   absent: names of attributes that the optimizer must not have; empty: dicts, or names of its attributes that are dicts,
//     which must be empty; observed(): must be False, or None.
//   watched: [(dict, key, attribute, ..., value)]: this value must be found there, or nothing.
//   owner: the class of the rule. Its `update` must be this one.
//   evaluate(hyper, counts): the scalars and the recurrent scalars; None for a rule that has its `scalars` and no others.
//   hyper_type: of the hyperparameters; options: [(name, how many values of a hyper_type it is, or 0 for one that is no
//     tuple, whether it is a number, whether it is a switch)] in their order.
//   groups: [(switches, names of the scalars)] by param group.
//   contexts: what returns the context of each launch.
// All lists are tuples.
PyObject* quick(PyObject*, PyObject* args) {
  static PyMethodDef method = {"quick_step", quick_step, METH_O, nullptr};
  auto quick = std::make_unique<Quick>();
  PyObject* plan;
  if (!PyArg_ParseTuple(args, "OO!O!OO!OOOO!O!O!O!", &plan, &PyTuple_Type, &quick->absent, &PyTuple_Type, &quick->empty,
                        &quick->observed, &PyTuple_Type, &quick->watched, &quick->owner, &quick->update, &quick->evaluate,
                        &PyType_Type, &quick->hyper_type, &PyTuple_Type, &quick->options, &PyTuple_Type, &quick->groups,
                        &PyTuple_Type, &quick->contexts) ||
      !(quick->plan = plan_of(plan)))
    return nullptr;
  return guarded([&]() -> PyObject* {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(quick->options); i++) {
      const char* name;
      Py_ssize_t parts;
      int is_number, is_switch;
      PyObject* option = PyTuple_GET_ITEM(quick->options, i);
      if (!PyTuple_Check(option)) throw std::invalid_argument("an option must be a tuple");
      if (!PyArg_ParseTuple(option, "snpp", &name, &parts, &is_number, &is_switch)) return nullptr;
      for (Py_ssize_t p = 0; p < std::max<Py_ssize_t>(1, parts); p++) {
        quick->is_number.push_back(is_number);
        quick->is_switch.push_back(is_switch);
      }
    }
    const Owned capsule(PyCapsule_New(quick.get(), "compiled_optim.quick", drop_quick));
    if (!capsule) return nullptr;
    quick.release();
    const Owned self(PyTuple_Pack(2, capsule.get(), args));
    return self ? PyCFunction_New(&method, self) : nullptr;
  });
}

// refusal(tensor): why no kernel can walk a tensor, or None.
PyObject* refusal(PyObject*, PyObject* object) {
  const auto* tensor = unpack(object);
  if (!tensor) return PyUnicode_FromFormat("its type is %s", Py_TYPE(object)->tp_name);
  const auto* t = tensor->unsafeGetTensorImpl();
  if (!Plain(t)(t))
    return PyUnicode_FromFormat("it is not a plain strided %s tensor", c10::DeviceTypeName(t->device().type()).c_str());
  if (!t->is_non_overlapping_and_dense())
    return PyUnicode_FromString("its elements overlap or leave gaps");
  Py_RETURN_NONE;
}

// is_whole(tensor): whether it can be read. A storage that was resized may end before its tensor.
PyObject* is_whole(PyObject*, PyObject* object) {
  const auto* t = in_memory(object);
  return PyBool_FromLong(!t || is_whole(t));
}

// matches(tensor, like): whether both are plain tensors of one device and one layout in memory.
PyObject* matches(PyObject*, PyObject* args) {
  PyObject *tensor, *like;
  if (!PyArg_ParseTuple(args, "OO", &tensor, &like)) return nullptr;
  const auto *a = unpack(tensor), *b = unpack(like);
  return PyBool_FromLong(a && b && Plain(b->unsafeGetTensorImpl())(a->unsafeGetTensorImpl()) &&
                         same_layout(a->unsafeGetTensorImpl(), b->unsafeGetTensorImpl()));
}

// start(Tensor, Parameter, tensor of shape (5, 7), its data_ptr): keeps the types and checks PyTensor.
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
                         {"quick", quick, METH_VARARGS, nullptr},
                         {"quick_average", quick_average, METH_VARARGS, nullptr},
                         {"expected", expected, METH_O, nullptr},
                         {"norm", norm, METH_VARARGS, nullptr},
                         {"zero", zero, METH_VARARGS, nullptr},
                         {"refusal", refusal, METH_O, nullptr},
                         {"is_whole", is_whole, METH_O, nullptr},
                         {"matches", matches, METH_VARARGS, nullptr},
                         {"start", start, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "compiled_optim._host", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&module); }
