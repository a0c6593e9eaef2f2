// A step in one call while nothing but values changes: there is no hook, profiler, GradScaler or closure, and the rule,
// the switches, the parameters and the keys of the state are those of the last step. All else is left to Python.
#pragma once
#include "launch.h"

namespace {

// The arguments of `quick` in host.cpp, which says what they are, and the memory of its steps. The objects belong to the
// function that `quick` returns, where the garbage collector sees them: a rule may refer to its optimizer.
struct Quick {
  Plan* plan;
  PyObject *absent, *empty, *observed, *watched, *owner, *update, *evaluate, *hyper_type, *options, *groups, *contexts;
  std::vector<bool> is_number, is_switch;  // of each value of a hyper_type
  std::vector<Owned> hypers;               // by param group
  Inputs inputs;
  bool is_running = false;
};

// Attributes of optimizers, param groups and rules.
struct Names {
  PyObject *param_groups = interned("param_groups"), *params = interned("params"), *state = interned("state"),
           *attached = interned("_attached"), *check = interned("check"), *update = interned("update"),
           *scalars = interned("scalars");
};

const Names& names() {
  static const Names names;
  return names;
}

// A watch is (dict, key, attribute, ..., value): whether what is found there is this value, if anything is there.
bool is_as_allowed(PyObject* watch) {
  const Py_ssize_t last = PyTuple_GET_SIZE(watch) - 1;
  Owned found = Owned::borrowed(PyDict_GetItemWithError(PyTuple_GET_ITEM(watch, 0), PyTuple_GET_ITEM(watch, 1)));
  if (!found) return !PyErr_Occurred();
  for (Py_ssize_t i = 2; found && i < last; i++) found = Owned(PyObject_GetAttr(found, PyTuple_GET_ITEM(watch, i)));
  return found == PyTuple_GET_ITEM(watch, last);
}

// Whether nobody is to be told of a step of the optimizer with these attributes, and nobody scales its gradients.
bool is_unobserved(const Quick& quick, PyObject* attributes) {
  auto is_absent = [&](PyObject* name) { return !PyDict_GetItemWithError(attributes, name); };
  auto is_empty = [&](PyObject* hooks) {
    if (!PyDict_Check(hooks)) hooks = PyDict_GetItemWithError(attributes, hooks);
    return hooks && PyDict_Check(hooks) && !PyDict_GET_SIZE(hooks);
  };
  return all_of(quick.absent, is_absent) && all_of(quick.empty, is_empty) &&
         (quick.observed == Py_None || Owned(PyObject_CallNoArgs(quick.observed)) == Py_False);
}

// Whether the kernels may be used, and are still those of the rule.
bool is_current(const Quick& quick) {
  return all_of(quick.watched, is_as_allowed) && Owned(PyObject_GetAttr(quick.owner, names().update)) == quick.update;
}

// The hyperparameters of a param group as `Declaration.read` hands them to rules. Nothing if it has other switches than
// these, or holds what only Python can read.
Owned read_hyper(const Quick& quick, PyObject* group, PyObject* switches) {
  auto* type = reinterpret_cast<PyTypeObject*>(quick.hyper_type);
  Owned hyper(type->tp_alloc(type, static_cast<Py_ssize_t>(quick.is_number.size())));
  size_t at = 0;
  Py_ssize_t s = 0;
  auto put = [&](PyObject* value) {
    Owned read = Owned::borrowed(value);
    double number = 0;
    if (PyFloat_CheckExact(value)) {
      number = PyFloat_AS_DOUBLE(value);
    } else if (PyLong_CheckExact(value) || PyBool_Check(value)) {
      number = PyLong_AsDouble(value);
      if (PyErr_Occurred()) return false;
    } else if (quick.is_number[at]) {
      const auto* tensor = unpack(value);
      if (!is_number(tensor, on_host) || !is_whole(tensor->unsafeGetTensorImpl())) return false;
      number = number_of(tensor);
      read = Owned(PyFloat_FromDouble(number));
    } else if (value != Py_None) {
      return false;
    }
    if (quick.is_switch[at] && (number != 0) != (PyTuple_GET_ITEM(switches, s++) == Py_True)) return false;
    PyTuple_SET_ITEM(hyper.get(), at++, read.release());
    return true;
  };
  auto put_option = [&](PyObject* option) {
    PyObject* value = PyDict_GetItemWithError(group, PyTuple_GET_ITEM(option, 0));
    const Py_ssize_t parts = PyLong_AsSsize_t(PyTuple_GET_ITEM(option, 1));
    if (!value || !parts) return value && put(value);
    return PyTuple_CheckExact(value) && PyTuple_GET_SIZE(value) == parts && all_of(value, put);
  };
  return hyper && all_of(quick.options, put_option) ? std::move(hyper) : Owned();
}

// A param group, if the groups are a plain list of plain dicts.
Owned group_of(PyObject* groups, Py_ssize_t g) {
  if (!groups || !PyList_CheckExact(groups) || PyList_GET_SIZE(groups) <= g) return {};
  PyObject* group = PyList_GET_ITEM(groups, g);
  return Owned::borrowed(PyDict_CheckExact(group) ? group : nullptr);
}

bool append_number(std::vector<double>& table, PyObject* value) {
  if (!PyFloat_Check(value) && !PyLong_CheckExact(value) && !PyBool_Check(value)) return false;
  table.push_back(PyFloat_AsDouble(value));
  return table.back() != -1 || !PyErr_Occurred();
}

// What each of these returns. False after a Python error.
bool read_contexts(PyObject* functions, std::vector<void*>& contexts) {
  return all_of(functions, [&](PyObject* function) {
    const Owned context(PyObject_CallNoArgs(function));
    contexts.push_back(context ? PyLong_AsVoidPtr(context) : nullptr);
    return !PyErr_Occurred();
  });
}

// What `evaluate` returns for a row: (scalars by name, recurrent scalars). Without it, what the rule's `scalars` returns.
Owned scalars_of(const Quick& quick, PyObject* hyper, const double* counts) {
  const auto width = static_cast<Py_ssize_t>(quick.plan->expected.width);
  if (quick.evaluate == Py_None) {
    const Owned scalars(PyObject_GetAttr(quick.owner, names().scalars)), step(PyFloat_FromDouble(counts[0]));
    PyObject* arguments[] = {hyper, step};
    return Owned(scalars && step ? PyObject_Vectorcall(scalars, arguments, 2, nullptr) : nullptr);
  }
  Owned tuple(PyTuple_New(width));
  for (Py_ssize_t i = 0; tuple && i < width; i++) {
    PyObject* count = PyFloat_FromDouble(counts[i]);
    if (!count) return {};
    PyTuple_SET_ITEM(tuple.get(), i, count);
  }
  PyObject* arguments[] = {hyper, tuple};
  return Owned(tuple ? PyObject_Vectorcall(quick.evaluate, arguments, 2, nullptr) : nullptr);
}

// Evaluates the scalars that the step is expected to need. False if it may be another step, or there was a Python error.
bool evaluate(Quick& quick, PyObject* groups) {
  auto& scalars = quick.inputs.scalars;
  const auto& expected = quick.plan->expected;
  const auto recurrent = static_cast<Py_ssize_t>(expected.width) - 1;
  for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(quick.groups); g++) {
    PyObject* known = PyTuple_GET_ITEM(quick.groups, g);
    const Owned group = group_of(groups, g);
    quick.hypers.push_back(group ? read_hyper(quick, group, PyTuple_GET_ITEM(known, 0)) : Owned());
    if (!quick.hypers.back()) return false;
    scalars.columns = std::max<int64_t>(scalars.columns, PyTuple_GET_SIZE(PyTuple_GET_ITEM(known, 1)) + recurrent);
  }
  scalars.rows.width = expected.width;
  scalars.rows.groups = expected.groups;  // a copy: the rule may step the optimizer
  scalars.rows.values = expected.values;
  for (size_t r = 0; r < scalars.rows.rows(); r++) {
    const int g = scalars.rows.groups[r];
    const Owned result = scalars_of(quick, quick.hypers[g], scalars.rows.of(r));
    if (!result) return false;
    const bool is_pair = quick.evaluate != Py_None;
    PyObject* values = is_pair ? PyTuple_GET_ITEM(result.get(), 0) : result.get();
    PyObject* names = PyTuple_GET_ITEM(PyTuple_GET_ITEM(quick.groups, g), 1);
    if (!PyDict_CheckExact(values) || PyDict_GET_SIZE(values) != PyTuple_GET_SIZE(names)) return false;
    PyObject *name, *value;
    Py_ssize_t at = 0;
    for (Py_ssize_t i = 0; PyDict_Next(values, &at, &name, &value); i++)
      if (name != PyTuple_GET_ITEM(names, i) || !append_number(scalars.table, value)) return false;
    if (is_pair && !all_of(PyTuple_GET_ITEM(result.get(), 1), [&](PyObject* v) { return append_number(scalars.table, v); }))
      return false;
    scalars.ends.push_back(scalars.table.size());
    scalars.table.resize((r + 1) * scalars.columns);
  }
  scalars.addresses.assign(scalars.table.size(), nullptr);
  return read_contexts(quick.contexts, quick.inputs.contexts);
}

// Takes the parameters and the state from where they are now, and then the step. False if Python has to take it.
bool finish(Quick& quick, PyObject* attributes) {
  auto& inputs = quick.inputs;
  const Owned groups = Owned::borrowed(PyDict_GetItemWithError(attributes, names().param_groups));
  for (Py_ssize_t g = 0; g < PyTuple_GET_SIZE(quick.groups); g++) {
    const Owned group = group_of(groups, g);
    inputs.lists.push_back(Owned::borrowed(group ? PyDict_GetItemWithError(group, names().params) : nullptr));
    if (!inputs.lists.back()) return false;
  }
  if (PyList_GET_SIZE(groups.get()) != PyTuple_GET_SIZE(quick.groups)) return false;
  inputs.state = PyDict_GetItemWithError(attributes, names().state);
  return inputs.state && PyDict_Check(inputs.state) && !take_step(quick.plan, inputs);
}

// step(optimizer): whether the step was taken. Raises what it raises, or an attached schedule that has ended.
PyObject* quick_step(PyObject* self, PyObject* optimizer) {
  auto* quick = static_cast<Quick*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(self, 0), "compiled_optim.quick"));
  if (!quick) return nullptr;
  if (quick->is_running) Py_RETURN_FALSE;  // a rule steps the optimizer, or another thread does
  struct Running {
    Quick& quick;
    explicit Running(Quick& which) : quick(which) { quick.is_running = true; }
    ~Running() {
      quick.hypers.clear();
      quick.inputs.clear();
      quick.is_running = false;
    }
  };
  return guarded([&]() -> PyObject* {
    const Running running(*quick);
    const Owned attributes(PyObject_GenericGetDict(optimizer, nullptr));
    if (!attributes) return nullptr;
    bool taken = is_unobserved(*quick, attributes);
    if (taken) {
      const Owned attached = Owned::borrowed(PyDict_GetItemWithError(attributes, names().attached));
      if (attached && attached != Py_None && !Owned(PyObject_CallMethodNoArgs(attached, names().check))) return nullptr;
      const Owned groups = Owned::borrowed(PyDict_GetItemWithError(attributes, names().param_groups));
      taken = is_current(*quick) && evaluate(*quick, groups) && finish(*quick, attributes);
    }
    if (PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
      PyErr_Clear();  // Python raises it again, in better words
    }
    return PyBool_FromLong(taken);
  });
}

void drop_quick(PyObject* capsule) { delete static_cast<Quick*>(PyCapsule_GetPointer(capsule, "compiled_optim.quick")); }

}  // namespace
