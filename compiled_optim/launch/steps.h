// Step counts and the scalars that belong to them: one row for each distinct (param group, step count).
#pragma once
#include <Python.h>

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

struct Steps {  // distinct (group, step) pairs, and the row of scalars each has
  std::vector<std::pair<int, double>> pairs;
  std::unordered_map<double, int32_t> seen;
  int32_t row(int group, double step) {
    if (!pairs.empty() && pairs.back() == std::make_pair(group, step)) return static_cast<int32_t>(pairs.size() - 1);
    if (pairs.empty() || pairs.back().first != group) seen.clear();
    auto [at, is_new] = seen.try_emplace(step, static_cast<int32_t>(pairs.size()));
    if (is_new) pairs.emplace_back(group, step);
    return at->second;
  }
};

// The scalars of every (group, step) as one table; -1 if `rows` holds others, or on a Python error.
int64_t foreseen(const Steps& steps, PyObject* rows, std::vector<double>& table) {
  int64_t columns = 0;
  if (PyList_GET_SIZE(rows) != static_cast<Py_ssize_t>(steps.pairs.size())) return -1;
  for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); r++) {
    int group;
    double step;
    PyObject* values;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(rows, r), "idO!", &group, &step, &PyTuple_Type, &values)) return -1;
    if (steps.pairs[r] != std::make_pair(group, step)) return -1;
    if (r && columns != PyTuple_GET_SIZE(values)) {
      PyErr_SetString(PyExc_ValueError, "scalars must return as many values for every param group and step");
      return -1;
    }
    columns = PyTuple_GET_SIZE(values);
    for (Py_ssize_t i = 0; i < columns; i++) table.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(values, i)));
    if (PyErr_Occurred()) return -1;
  }
  return columns;
}

PyObject* needed(const Steps& steps) {
  PyObject* list = PyList_New(0);
  for (const auto& [group, step] : steps.pairs) {
    PyObject* pair = Py_BuildValue("id", group, step);
    if (!pair || PyList_Append(list, pair) < 0) return nullptr;
    Py_DECREF(pair);
  }
  return list;
}

}  // namespace
