// The scalars of a step: one row for each distinct (param group, counts). The counts of a parameter are its step count
// and its recurrent scalars.
#pragma once
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

// The distinct (param group, counts) that are found in a step.
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

// The scalars that Python evaluated for the counts it expects. The new recurrent scalars are at the end of each row.
struct PredictedScalars {
  std::vector<int> groups;
  std::vector<double> counts, table;
  int64_t columns = 0;

  bool are_numbers = true;  // if not, reading stopped there

  // False on a Python error. Runs no Python.
  bool read(PyObject* rows, size_t width) {
    for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); r++) {
      if (!read_row(PyList_GET_ITEM(rows, r), width)) return false;
    }
    return true;
  }

  bool fits(const FoundCounts& found) const {
    return groups == found.groups &&
           (counts.empty() || !std::memcmp(counts.data(), found.counts.data(), counts.size() * sizeof(double)));
  }

 private:
  bool append(std::vector<double>& out, PyObject* tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
      PyObject* value = PyTuple_GET_ITEM(tuple, i);
      are_numbers = are_numbers && (PyFloat_Check(value) || PyLong_CheckExact(value) || PyBool_Check(value));
      if (!are_numbers) return true;
      out.push_back(PyFloat_AsDouble(value));
      if (out.back() == -1.0 && PyErr_Occurred()) return false;
    }
    return true;
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
    if (!groups.empty() && columns != found) {
      PyErr_SetString(PyExc_ValueError, "scalars must return as many values for every param group and step");
      return false;
    }
    columns = found;
    groups.push_back(group);
    if (!append(counts, given)) return false;
    if (!are_numbers) {
      PyErr_SetString(PyExc_TypeError, "counts must be numbers");
      return false;
    }
    return append(table, values);
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
