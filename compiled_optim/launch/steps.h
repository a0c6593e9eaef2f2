// Step counts and what is carried beside them, and the scalars that belong to each: one row for each distinct (param
// group, counts).
#pragma once
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Steps {
  size_t width;                 // counts of one row: the step count after this step, then the carried values before it
  std::vector<int> groups;      // [row]
  std::vector<double> counts;   // [row][width]
  std::unordered_map<std::string, int32_t> seen;  // by bytes, for which NaN is equal to itself

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

// Appends the numbers in a tuple to `out`; false on a Python error.
bool append(std::vector<double>& out, PyObject* tuple) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) out.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i)));
  return !PyErr_Occurred();
}

// The scalars of every row, with what is carried on at its end, as one table; -1 if `rows` holds others, or on a Python
// error.
int64_t foreseen(const Steps& steps, PyObject* rows, std::vector<double>& table) {
  int64_t columns = 0;
  if (PyList_GET_SIZE(rows) != static_cast<Py_ssize_t>(steps.groups.size())) return -1;
  std::vector<double> counts;
  for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); r++) {
    int group;
    PyObject *given, *values;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(rows, r), "iO!O!", &group, &PyTuple_Type, &given, &PyTuple_Type, &values))
      return -1;
    counts.clear();
    if (!append(counts, given) || counts.size() != steps.width || !steps.is(r, group, counts.data())) return -1;
    if (r && columns != PyTuple_GET_SIZE(values)) {
      PyErr_SetString(PyExc_ValueError, "scalars must return as many values for every param group and step");
      return -1;
    }
    columns = PyTuple_GET_SIZE(values);
    if (!append(table, values)) return -1;
  }
  return columns;
}

// [(group, counts), ...]
PyObject* needed(const Steps& steps) {
  PyObject* list = PyList_New(0);
  for (size_t r = 0; list && r < steps.groups.size(); r++) {
    PyObject* counts = PyTuple_New(static_cast<Py_ssize_t>(steps.width));
    for (size_t i = 0; counts && i < steps.width; i++)
      PyTuple_SET_ITEM(counts, static_cast<Py_ssize_t>(i), PyFloat_FromDouble(steps.of(r)[i]));
    PyObject* pair = counts ? Py_BuildValue("iN", steps.groups[r], counts) : nullptr;
    if (!pair || PyList_Append(list, pair) < 0) return nullptr;
    Py_DECREF(pair);
  }
  return list;
}

}  // namespace
