// The rows of a parameter that a sparse COO gradient in host memory touches. Each becomes one span of elements; the
// values of an index that occurs several times are added up first.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "tensors.h"

namespace {

// How many dimensions of a parameter the numbers of its rows stand for, if these are the contiguous values [nnz, ...].
int64_t sparse_dims(const c10::TensorImpl* values, const c10::TensorImpl* param) {
  return param->dim() - values->dim() + 1;
}

// Whether these are the contiguous values [nnz, ...] of a gradient of a contiguous parameter, and their indices: [sparse
// dimensions, nnz], or contiguous numbers of rows [nnz] if they are `flat`.
bool rows_fit(const Plain& plain, const c10::TensorImpl* indices, const c10::TensorImpl* values, at::ScalarType type,
              const c10::TensorImpl* param, bool flat) {
  if (!plain(indices) || !plain(values) || indices->dim() != (flat ? 1 : 2) || values->dim() < 1) return false;
  const int64_t dims = sparse_dims(values, param);
  return c10::typeMetaToScalarType(indices->dtype()) == at::kLong &&
         c10::typeMetaToScalarType(values->dtype()) == type && values->is_contiguous() && param->is_contiguous() &&
         (flat ? dims >= 0 && indices->is_contiguous() : dims == indices->size(0)) &&
         indices->sizes().back() == values->size(0) &&
         std::equal(values->sizes().begin() + 1, values->sizes().end(), param->sizes().begin() + dims);
}

class TouchedRows {
 public:
  struct Span {
    int64_t first, elements;  // in the parameter
    char* values;
  };

  void begin() { sums_.clear(); }

  // The spans in order, none overlapping. `data` is the address of the values. The spans are valid until the next call,
  // what their `values` point to until the next `begin`.
  const std::vector<Span>& gather(const c10::TensorImpl* indices, const c10::TensorImpl* values, char* data,
                                  const c10::TensorImpl* param) {
    const int64_t touched = indices->size(1), dims = indices->size(0);
    const auto* index = reinterpret_cast<const int64_t*>(indices->data());
    const int64_t along = indices->strides()[0], next = indices->strides()[1];
    int64_t elements = 1;
    for (int64_t d = dims; d < param->dim(); d++) elements *= param->size(d);
    const int64_t bytes = elements * static_cast<int64_t>(values->itemsize());
    order_.clear();
    for (int64_t i = 0; i < touched; i++) {
      int64_t row = 0;
      for (int64_t d = 0; d < dims; d++) {
        const int64_t at = index[d * along + i * next];
        if (at < 0 || at >= param->size(d)) throw std::out_of_range("a sparse gradient has an index out of range");
        row = row * param->size(d) + at;
      }
      order_.push_back({row, data + i * bytes});
    }
    auto before = [](const TouchedRow& a, const TouchedRow& b) { return a.row < b.row; };
    if (!std::is_sorted(order_.begin(), order_.end(), before)) std::stable_sort(order_.begin(), order_.end(), before);
    spans_.clear();
    for (size_t i = 0; i < order_.size();) {
      size_t end = i + 1;
      while (end < order_.size() && order_[end].row == order_[i].row) end++;
      char* sum = end - i > 1 ? add_up(values, elements, i, end) : order_[i].values;
      const int64_t first = order_[i].row * elements;
      if (!spans_.empty() && spans_.back().first + spans_.back().elements == first &&
          spans_.back().values + spans_.back().elements * values->itemsize() == sum)
        spans_.back().elements += elements;
      else
        spans_.push_back({first, elements, sum});
      i = end;
    }
    return spans_;
  }

 private:
  struct TouchedRow {
    int64_t row;
    char* values;
  };

  template <class T, class Wide>
  void add_rows(char* sum, int64_t elements, size_t begin, size_t end) {
    for (int64_t e = 0; e < elements; e++) {
      Wide total = 0;
      for (size_t i = begin; i < end; i++) total += static_cast<Wide>(reinterpret_cast<T*>(order_[i].values)[e]);
      reinterpret_cast<T*>(sum)[e] = static_cast<T>(total);
    }
  }

  char* add_up(const c10::TensorImpl* values, int64_t elements, size_t begin, size_t end) {
    sums_.emplace_back(elements * values->itemsize());
    char* sum = sums_.back().data();
    switch (c10::typeMetaToScalarType(values->dtype())) {
      case at::kFloat: add_rows<float, float>(sum, elements, begin, end); break;
      case at::kDouble: add_rows<double, double>(sum, elements, begin, end); break;
      case at::kBFloat16: add_rows<c10::BFloat16, float>(sum, elements, begin, end); break;
      case at::kHalf: add_rows<c10::Half, float>(sum, elements, begin, end); break;
      default: throw std::runtime_error("a sparse gradient has an unexpected dtype");
    }
    return sum;
  }

  std::vector<TouchedRow> order_;
  std::vector<Span> spans_;
  std::vector<std::vector<char>> sums_;  // of the indices that occur several times
};

}  // namespace
