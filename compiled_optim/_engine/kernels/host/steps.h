// The scalars of a step: one row for each distinct (param group, counts). The counts of a parameter are its step count
// and its recurrent scalars. A launch on a device has a row for each of its param groups (see `Plan::code`).
#pragma once
#include <cstring>
#include <unordered_map>

#include "plan.h"

namespace {

// The distinct (param group or code, counts) that are found in a step.
struct FoundCounts {
  size_t width;                 // of one row: the step count after this step, then the recurrent scalars before it
  std::vector<int> groups;      // [row]
  std::vector<double> counts;   // [row][width]
  std::unordered_map<std::string, int32_t> seen;  // by bytes, because NaN does not equal itself

  const double* of(size_t row) const { return counts.data() + row * width; }
  bool is(size_t row, int group, const double* values) const {
    return groups[row] == group && !std::memcmp(of(row), values, width * sizeof(double));
  }
  int32_t row(int group, const double* values) {
    const auto rows = static_cast<int32_t>(groups.size());
    if (rows && is(rows - 1, group, values)) return rows - 1;
    std::string key(reinterpret_cast<const char*>(&group), sizeof group);
    key.append(reinterpret_cast<const char*>(values), width * sizeof(double));
    auto [at, is_new] = seen.try_emplace(std::move(key), rows);
    if (is_new) {
      groups.push_back(group);
      counts.insert(counts.end(), values, values + width);
    }
    return at->second;
  }
};

// The scalars that Python evaluated for the counts it expects. The new recurrent scalars are at the end of each row that
// the host counts. Rows are padded to the width of the longest.
struct PredictedScalars {
  const Plan& plan;
  std::vector<int> groups;
  std::vector<double> counts, table;
  std::vector<const void*> addresses;  // instead of numbers in the table
  std::vector<size_t> ends;            // of rows in the table, without padding
  int64_t columns = 0;

  bool are_numbers = true;  // if not, reading stopped there

  // False on a Python error. Runs no Python.
  bool read(PyObject* rows, size_t width) {
    for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); r++) {
      PyObject* row = PyList_GET_ITEM(rows, r);
      if (PyTuple_Check(row) && PyTuple_GET_SIZE(row) == 3 && PyTuple_Check(PyTuple_GET_ITEM(row, 2)))
        columns = std::max<int64_t>(columns, PyTuple_GET_SIZE(PyTuple_GET_ITEM(row, 2)));
    }
    for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); r++)
      if (!read_row(PyList_GET_ITEM(rows, r), width)) return false;
    return true;
  }

  bool fits(const FoundCounts& found) const {
    return groups == found.groups &&
           (counts.empty() || !std::memcmp(counts.data(), found.counts.data(), counts.size() * sizeof(double)));
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

  bool read_row(PyObject* row, size_t width) {
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
    const Launch* launch = plan.launch_of(group);
    if (!launch && found < static_cast<Py_ssize_t>(width) - 1) {
      PyErr_Format(PyExc_ValueError, "a row must have %zu recurrent scalars, got %zd values", width - 1, found);
      return false;
    }
    groups.push_back(group);
    if (!append(counts, given)) return false;
    if (!are_numbers) {
      PyErr_SetString(PyExc_TypeError, "counts must be numbers");
      return false;
    }
    if (!append(table, values, launch)) return false;
    ends.push_back(table.size());
    table.resize(groups.size() * columns);
    addresses.resize(table.size());
    return true;
  }
};

// [(group, counts), ...], whose scalars are needed; nullptr on a Python error.
PyObject* needed(const FoundCounts& found) {
  PyObject* list = PyList_New(0);
  for (size_t r = 0; list && r < found.groups.size(); r++) {
    PyObject* counts = PyTuple_New(static_cast<Py_ssize_t>(found.width));
    for (size_t i = 0; counts && i < found.width; i++) {
      PyObject* number = PyFloat_FromDouble(found.of(r)[i]);
      if (!number) Py_CLEAR(counts);
      else PyTuple_SET_ITEM(counts, static_cast<Py_ssize_t>(i), number);
    }
    PyObject* pair = counts ? Py_BuildValue("iN", found.groups[r], counts) : nullptr;  // which takes `counts`
    if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
    Py_XDECREF(pair);
  }
  return list;
}

}  // namespace
