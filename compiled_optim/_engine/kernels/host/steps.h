// The scalars of a step: one row for each distinct (param group, counts). The counts of a parameter are its step count
// and its recurrent scalars. A launch on a device has a row for each of its param groups (see `Plan::code`).
#pragma once
#include "plan.h"

namespace {

// The scalars that Python evaluated for the counts it expects. The new recurrent scalars are at the end of each row that
// the host counts. Rows are padded to the width of the longest.
struct PredictedScalars {
  Counts rows;
  std::vector<double> table;
  std::vector<const void*> addresses;  // instead of numbers in the table
  std::vector<size_t> ends;            // of rows in the table, without padding
  int64_t columns = 0;

  bool are_numbers = true;  // if not, reading stopped there

  void clear() {
    rows.clear();
    table.clear();
    addresses.clear();
    ends.clear();
    columns = 0;
  }

  // False on a Python error. Runs no Python.
  bool read(const Plan* plan, PyObject* list) {
    rows.width = plan->found.width;
    for (Py_ssize_t r = 0; r < PyList_GET_SIZE(list); r++) {
      PyObject* row = PyList_GET_ITEM(list, r);
      if (PyTuple_Check(row) && PyTuple_GET_SIZE(row) == 3 && PyTuple_Check(PyTuple_GET_ITEM(row, 2)))
        columns = std::max<int64_t>(columns, PyTuple_GET_SIZE(PyTuple_GET_ITEM(row, 2)));
    }
    for (Py_ssize_t r = 0; are_numbers && r < PyList_GET_SIZE(list); r++)
      if (!read_row(plan, PyList_GET_ITEM(list, r))) return false;
    return true;
  }

 private:
  bool append(std::vector<double>& out, PyObject* tuple, const Launch* launch = nullptr) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
      PyObject* value = PyTuple_GET_ITEM(tuple, i);
      if (const void* there = launch ? address_of(unpack(value), launch->plain) : nullptr) {
        addresses.resize(out.size() + 1);
        addresses.back() = there;
        out.push_back(0);
        continue;
      }
      are_numbers = are_numbers && (PyFloat_Check(value) || PyLong_CheckExact(value) || PyBool_Check(value));
      if (!are_numbers) return true;
      out.push_back(PyFloat_AsDouble(value));
      if (out.back() == -1.0 && PyErr_Occurred()) return false;
    }
    return true;
  }

  // Tagged; nullptr for anything but a number that lies on the device.
  static const void* address_of(const at::TensorBase* t, const Plain& plain) {
    if (!is_number(t, plain) || !is_whole(t->unsafeGetTensorImpl())) return nullptr;
    return tagged(t->const_data_ptr(), t->scalar_type() == at::kFloat);
  }

  bool read_row(const Plan* plan, PyObject* row) {
    const size_t width = rows.width;
    int group;
    PyObject *given, *values;
    if (!PyTuple_Check(row)) {
      PyErr_SetString(PyExc_TypeError, "a row must be a tuple");
      return false;
    }
    if (!PyArg_ParseTuple(row, "iO!O!", &group, &PyTuple_Type, &given, &PyTuple_Type, &values)) return false;
    const Py_ssize_t found = PyTuple_GET_SIZE(values);
    if (PyTuple_GET_SIZE(given) != static_cast<Py_ssize_t>(width)) {
      PyErr_Format(PyExc_ValueError, "a row must have %zu counts, got %zd", width, PyTuple_GET_SIZE(given));
      return false;
    }
    const Launch* launch = plan->launch_of(group);
    if (!launch && found < static_cast<Py_ssize_t>(width) - 1) {
      PyErr_Format(PyExc_ValueError, "a row must have %zu recurrent scalars, got %zd values", width - 1, found);
      return false;
    }
    rows.groups.push_back(group);
    if (!append(rows.values, given)) return false;
    if (!are_numbers) {
      PyErr_SetString(PyExc_TypeError, "counts must be numbers");
      return false;
    }
    if (!append(table, values, launch)) return false;
    ends.push_back(table.size());
    table.resize(rows.rows() * columns);
    addresses.resize(table.size());
    return true;
  }
};

// [(group, counts), ...]; nullptr on a Python error.
PyObject* as_list(const Counts& counts) {
  PyObject* list = PyList_New(0);
  for (size_t r = 0; list && r < counts.rows(); r++) {
    PyObject* values = PyTuple_New(static_cast<Py_ssize_t>(counts.width));
    for (size_t i = 0; values && i < counts.width; i++) {
      PyObject* number = PyFloat_FromDouble(counts.of(r)[i]);
      if (!number) Py_CLEAR(values);
      else PyTuple_SET_ITEM(values, static_cast<Py_ssize_t>(i), number);
    }
    PyObject* pair = values ? Py_BuildValue("iN", counts.groups[r], values) : nullptr;  // which takes `values`
    if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
    Py_XDECREF(pair);
  }
  return list;
}

}  // namespace
