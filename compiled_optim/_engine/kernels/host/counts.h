// Step counts: those that a step finds, and where the host keeps them.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace {

// Rows of (param group or code of `Plan::code`, counts): the step count after this step, then the recurrent scalars
// before it. Each row has scalars of its own.
struct Counts {
  size_t width = 1;
  std::vector<int> groups;     // [row]
  std::vector<double> values;  // [row][width]

  void clear() {
    groups.clear();
    values.clear();
    seen_.clear();
  }
  size_t rows() const { return groups.size(); }
  const double* of(size_t row) const { return values.data() + row * width; }
  void add(int group, const double* counts) {
    groups.push_back(group);
    values.insert(values.end(), counts, counts + width);
  }
  // The row of these, which is added unless it is there.
  int32_t row(int group, const double* counts) {
    const size_t before = rows();
    for (size_t r = before; r-- > 0 && r + kFew >= before;)
      if (groups[r] == group && same(of(r), counts, width)) return static_cast<int32_t>(r);
    if (before < kFew) {
      add(group, counts);
      return static_cast<int32_t>(before);
    }
    for (size_t r = seen_.size(); r < before; r++) seen_.emplace(key(groups[r], of(r)), static_cast<int32_t>(r));
    auto [at, is_new] = seen_.try_emplace(key(group, counts), static_cast<int32_t>(before));
    if (is_new) add(group, counts);
    return at->second;
  }
  bool operator==(const Counts& other) const {
    return groups == other.groups && same(values.data(), other.values.data(), values.size());
  }

 private:
  static constexpr size_t kFew = 8;  // rows that are compared one by one

  // By bytes, because NaN does not equal itself.
  static bool same(const double* a, const double* b, size_t n) { return !n || !std::memcmp(a, b, n * sizeof(double)); }
  std::string key(int group, const double* counts) const {
    std::string bytes(reinterpret_cast<const char*>(&group), sizeof group);
    return bytes.append(reinterpret_cast<const char*>(counts), width * sizeof(double));
  }
  std::unordered_map<std::string, int32_t> seen_;  // empty while there are few rows
};

// A step count or recurrent scalar in host memory, float or double, and the row that has its new value.
struct HostCount {
  Range at;
  int32_t row;
  size_t slot;

  double rounded(double value) const { return at.is_float() ? static_cast<float>(value) : value; }
  double read() const { return at.is_float() ? *reinterpret_cast<const float*>(at.begin) : *as_double(); }
  void write(double value) const {
    if (at.is_float()) *reinterpret_cast<float*>(const_cast<char*>(at.begin)) = static_cast<float>(value);
    else *const_cast<double*>(as_double()) = value;
  }

 private:
  const double* as_double() const { return reinterpret_cast<const double*>(at.begin); }
};

}  // namespace
