// Walks tensors with the loops of a rule in stages: kernels/stages.py says what a stage is, kernels/staged.py makes the
// tables. A value belongs to one space of a tensor of shape (matrices, rows, columns).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace stages {

enum Space { NUMBER, MATRIX, ROW, COLUMN, ELEMENT };
enum Place { INPUT, ARRAY, SLOT, TILE };

// What a loop is given. `at` is the column in the table of an INPUT, the number of an ARRAY or a SLOT; a TILE holds what
// is reduced at once. `size`: of one element in bytes.
struct Argument { Place place; int at, space, size; };
struct Part { int stage, space, count; const Argument* arguments; void (*run)(void* const*, int64_t); };

// `operand`: an argument of the part over elements of that stage, or else an array; `at`: an array or a slot.
struct Mean { int stage, operand, from, space, at; };

// A value that is kept. `home`: the column of the state whose memory it has, or -1; `copy`: of the state it is copied to.
struct Array { int space, size, home, copy; };

template <class T> struct Table {
  const T* first;
  int count;
  const T* begin() const { return first; }
  const T* end() const { return first + count; }
};

struct Program {
  int columns, given, slots;  // `given`: the slots that Python wrote
  Table<Part> parts;
  Table<Mean> means;
  Table<Array> arrays;
};

constexpr int64_t TILE_ELEMENTS = 2048;      // of a loop: all it reads and writes stays in the first cache
constexpr int64_t CHUNK_ELEMENTS = 1 << 16;  // of a tensor: the unit that threads share out
constexpr int64_t WIDE = 1 << 17;            // tensors of more elements are shared among threads
constexpr int64_t MOST_CHUNKS = 64;          // of one matrix, because each has column sums of its own
constexpr int TILES = 12, MOST_ARGUMENTS = 64;  // as in kernels/stages.py
constexpr size_t KEPT_BYTES = 1 << 25;          // of a thread, from step to step

// Whole rows, or a part of one.
struct Span { int64_t row, rows, column, width; int64_t elements() const { return rows * width; } };

struct Shape {
  int64_t matrices, rows, columns;
  int64_t elements() const { return matrices * rows * columns; }
  int64_t count(int space) const {
    switch (space) {
      case NUMBER: return 1;
      case MATRIX: return matrices;
      case ROW: return matrices * rows;
      case COLUMN: return matrices * columns;
      default: return elements();
    }
  }
};

// Calls `f` with a width that is a constant if it is that of usual convolutions: loops over so few are unrolled.
template <class F> void with_width(int64_t width, F f) {
  switch (width) {
    case 1: return f(std::integral_constant<int64_t, 1>{});
    case 2: return f(std::integral_constant<int64_t, 2>{});
    case 3: return f(std::integral_constant<int64_t, 3>{});
    case 4: return f(std::integral_constant<int64_t, 4>{});
    case 5: return f(std::integral_constant<int64_t, 5>{});
    case 7: return f(std::integral_constant<int64_t, 7>{});
    case 8: return f(std::integral_constant<int64_t, 8>{});
    default: return f(width);
  }
}

// The values that the elements of a span read, in `out` or where they stand. What `out` holds of a span is kept if the
// next needs the same.
template <class T> const T* spread(const T* base, int space, const Shape& s, const Span& at, T* out, Span& held) {
  int64_t matrix = at.row / s.rows, row = at.row % s.rows;
  if (space == ELEMENT) return base + at.row * s.columns + at.column;
  if (space == COLUMN && (at.rows == 1 || s.rows == 1)) return base + matrix * s.columns + at.column;
  if (space == ROW && s.columns == 1) return base + at.row;
  if (space == MATRIX && s.columns == 1 && s.rows == 1) return base + at.row;
  const bool within = row + at.rows <= s.rows;
  if (within && held.rows >= at.rows && held.width == at.width) {
    if (space != ROW && held.row == matrix) return out;
    if (space == ROW && at.rows == 1 && held.row == at.row) return out;
  }
  held = {space == ROW ? at.row : matrix, within ? at.rows : 0, 0, at.width};
  with_width(at.width, [&](auto width) {
    T* to = out;
    for (int64_t i = 0; i < at.rows; i++, to += width) {
      const T* from = base + (space == ROW ? at.row + i : space == MATRIX ? matrix : matrix * s.columns);
      if (space == COLUMN) for (int64_t j = 0; j < width; j++) to[j] = from[j];
      else for (int64_t j = 0; j < width; j++) to[j] = *from;
      if (++row == s.rows) row = 0, matrix++;
    }
  });
  return out;
}

inline void* spread(void* base, const Argument& a, const Shape& s, const Span& at, void* out, Span& held) {
  auto as = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    return const_cast<T*>(spread(static_cast<const T*>(base), a.space, s, at, static_cast<T*>(out), held));
  };
  switch (a.size) {
    case 1: return as(static_cast<uint8_t*>(nullptr));
    case 2: return as(static_cast<uint16_t*>(nullptr));
    case 4: return as(static_cast<uint32_t*>(nullptr));
    default: return as(static_cast<uint64_t*>(nullptr));
  }
}

template <class Width> Width sum(const Width* v, int64_t n) {
  Width total = 0;
  #pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += v[i];
  return total;
}

inline std::vector<char>& memory() {
  static thread_local std::vector<char> kept;
  return kept;
}

// One tensor. `row`: its row of the table; `slots`: its numbers, eight bytes each.
template <class Width> class Walk {
 public:
  Walk(const Program& program, const int64_t* row, double* slots, int threads)
      : program_(program), row_(row), slots_(reinterpret_cast<char*>(slots)), shape_{row[0], row[1], row[2]},
        threads_(threads) {}

  void run(int first, int last) {
    if (first == 0)  // as doubles
      for (int i = 0; i < program_.given; i++) {
        double value;
        std::memcpy(&value, slots_ + 8 * i, 8);
        *static_cast<Width*>(slot(i)) = static_cast<Width>(value);
      }
    if (shape_.elements() == 0) return;
    take_memory();
    for (int stage = first; stage <= last; stage++) {
      for (const Part& part : program_.parts)
        if (part.stage == stage) part.space == ELEMENT ? over_elements(part) : over_few(part);
      for (const Mean& mean : program_.means)
        if (mean.stage == stage && mean.from != ELEMENT) reduce_few(mean);
    }
    for (size_t i = 0; i < arrays_.size(); i++) {
      const Array& a = program_.arrays.first[i];
      if (a.copy >= 0) std::memcpy(column(a.copy), arrays_[i], shape_.count(a.space) * a.size);
    }
    if (memory().size() > KEPT_BYTES) std::vector<char>().swap(memory());
  }

 private:
  void* column(int at) const { return reinterpret_cast<void*>(row_[at]); }
  void* slot(int at) const { return slots_ + 8 * at; }

  void* base(const Argument& a) const {
    switch (a.place) {
      case INPUT: return column(a.at);
      case ARRAY: return arrays_[a.at];
      case SLOT: return slot(a.at);
      default: return nullptr;
    }
  }

  void take_memory() {
    int64_t bytes = 0;
    auto place = [&](const Array& a) {
      const int64_t at = bytes;
      if (a.home < 0) bytes += (shape_.count(a.space) * a.size + 63) / 64 * 64;
      return at;
    };
    for (const Array& a : program_.arrays) place(a);
    auto& kept = memory();
    if (static_cast<int64_t>(kept.size()) < bytes + 64) kept.resize(bytes + 64);
    bytes = 0;
    for (const Array& a : program_.arrays) {
      const int64_t at = place(a);
      arrays_.push_back(a.home >= 0 ? column(a.home) : kept.data() + at);
    }
  }

  // Over rows, columns or matrices: to the loop they are one row of elements.
  void over_few(const Part& part) {
    const int64_t count = shape_.count(part.space);
    const int64_t per_matrix = part.space == ROW ? shape_.rows : part.space == COLUMN ? shape_.columns : 1;
    const Shape few{count / per_matrix, 1, per_matrix};
    #pragma omp parallel for schedule(static) num_threads(threads_) if (threads_ > 1 && count > 8 * TILE_ELEMENTS)
    for (int64_t from = 0; from < count; from += TILE_ELEMENTS) {
      const int64_t n = std::min(TILE_ELEMENTS, count - from);
      alignas(64) double tiles[TILES][TILE_ELEMENTS];
      void* given[MOST_ARGUMENTS];
      int tile = 0;
      for (int i = 0; i < part.count; i++) {
        const Argument& a = part.arguments[i];
        if (a.place == SLOT) given[i] = base(a);
        else if (a.space == part.space) given[i] = static_cast<char*>(base(a)) + from * a.size;
        else given[i] = of_matrices(a, few.columns, from, n, tiles[tile++]);
      }
      part.run(given, n);
    }
  }

  // The value of the matrix of each of `n` rows or columns.
  void* of_matrices(const Argument& a, int64_t per_matrix, int64_t from, int64_t n, void* out) const {
    if (per_matrix == 1) return static_cast<char*>(base(a)) + from * a.size;
    char* to = static_cast<char*>(out);
    const char* values = static_cast<char*>(base(a));
    for (int64_t i = from; i < from + n; i++, to += a.size) std::memcpy(to, values + i / per_matrix * a.size, a.size);
    return out;
  }

  void reduce_few(const Mean& mean) {
    const Width* from = static_cast<Width*>(arrays_[mean.operand]);
    const int64_t count = shape_.count(mean.from), groups = shape_.count(mean.space), each = count / groups;
    Width* to = static_cast<Width*>(mean.space == NUMBER ? slot(mean.at) : arrays_[mean.at]);
    if (each == 1) {
      std::memcpy(to, from, count * sizeof(Width));
      return;
    }
    #pragma omp parallel for schedule(static) num_threads(threads_) if (threads_ > 1 && count > 8 * TILE_ELEMENTS)
    for (int64_t i = 0; i < groups; i++) {
      double total = 0;
      for (int64_t j = 0; j < each; j += TILE_ELEMENTS)
        total += sum(from + i * each + j, std::min(TILE_ELEMENTS, each - j));
      to[i] = static_cast<Width>(total / each);
    }
  }

  // ---- over elements, in chunks of whole rows: of one matrix that is large, or of several small ones

  void over_elements(const Part& part) {
    const int64_t area = shape_.rows * shape_.columns;
    const int64_t splits = std::min({(area + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS, shape_.rows, MOST_CHUNKS});
    const int64_t together = std::max<int64_t>(1, CHUNK_ELEMENTS / area);
    const int64_t rows = splits > 1 ? (shape_.rows + splits - 1) / splits : together * shape_.rows;
    const int64_t chunks = splits > 1 ? shape_.matrices * splits : (shape_.matrices + together - 1) / together;
    std::vector<const Mean*> means;
    int columns = 0;
    for (const Mean& mean : program_.means)
      if (mean.stage == part.stage && mean.from == ELEMENT) {
        means.push_back(&mean);
        columns += mean.space == COLUMN;
        if (mean.space == COLUMN && shape_.rows > 1) std::memset(arrays_[mean.at], 0, shape_.count(COLUMN) * sizeof(Width));
      }
    std::vector<double> totals(chunks * means.size());
    std::vector<Width> partial(splits > 1 ? chunks * columns * shape_.columns : 0);
    #pragma omp parallel for schedule(dynamic) num_threads(threads_) if (threads_ > 1 && chunks > 1)
    for (int64_t i = 0; i < chunks; i++) {
      int64_t begin = i * rows, end = std::min(begin + rows, shape_.matrices * shape_.rows);
      if (splits > 1) {
        const int64_t matrix = i / splits * shape_.rows;
        begin = matrix + std::min(i % splits * rows, shape_.rows);
        end = matrix + std::min((i % splits + 1) * rows, shape_.rows);
      }
      Width* own = splits > 1 ? partial.data() + i * columns * shape_.columns : nullptr;
      chunk(part, means, begin, end, totals.data() + i * means.size(), own);
    }
    for (size_t m = 0, c = 0; m < means.size(); m++) {
      double total = 0;
      for (size_t i = m; i < totals.size(); i += means.size()) total += totals[i];
      if (means[m]->space == COLUMN && splits > 1) add_partial(*means[m], partial, splits, columns, c++);
      finish(*means[m], total);
    }
  }

  // Rows from `begin` to `end`. `totals`: of each mean of all; `partial`: column sums, of each mean over rows.
  void chunk(const Part& part, const std::vector<const Mean*>& means, int64_t begin, int64_t end, double* totals,
             Width* partial) const {
    alignas(64) double tiles[TILES][TILE_ELEMENTS];
    Span held[TILES] = {};
    void* given[MOST_ARGUMENTS];
    const int64_t at_once = std::max<int64_t>(1, TILE_ELEMENTS / shape_.columns);
    const int64_t most = std::min(shape_.columns, TILE_ELEMENTS);
    for (int64_t row = begin; row < end; row += at_once)
      for (int64_t column = 0; column < shape_.columns; column += most) {
        const Span at{row, std::min(at_once, end - row), column, std::min(most, shape_.columns - column)};
        int tile = 0;
        for (int i = 0; i < part.count; i++) {
          const Argument& a = part.arguments[i];
          if (a.place == TILE) given[i] = tiles[tile++];
          else if (a.place == SLOT) given[i] = base(a);
          else if (a.space == ELEMENT) given[i] = static_cast<char*>(base(a)) + (row * shape_.columns + column) * a.size;
          else given[i] = spread(base(a), a, shape_, at, tiles[tile], held[tile]), tile++;
        }
        part.run(given, at.elements());
        int c = 0;
        for (size_t m = 0; m < means.size(); m++) {
          const Width* v = static_cast<Width*>(given[means[m]->operand]);
          const int space = means[m]->space;
          if (space == NUMBER) {
            totals[m] += sum(v, at.elements());
            continue;
          }
          Width* to = static_cast<Width*>(arrays_[means[m]->at]);
          if (space == ROW) add_rows(v, to, at);
          else add_columns(v, to, partial ? partial + c++ * shape_.columns : nullptr, at);
        }
      }
  }

  void add_rows(const Width* v, Width* rows, const Span& at) const {
    rows += at.row;
    if (at.rows == 1) *rows = at.column ? *rows + sum(v, at.width) : sum(v, at.width);
    else with_width(at.width, [&](auto width) {
      for (int64_t i = 0; i < at.rows; i++, v += width) {
        Width total = 0;
        #pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < width; j++) total += v[j];
        rows[i] = total;
      }
    });
  }

  void add_columns(const Width* v, Width* columns, Width* partial, const Span& at) const {
    int64_t matrix = at.row / shape_.rows, row = at.row % shape_.rows;
    if (shape_.rows == 1) {
      std::memcpy(columns + at.row * shape_.columns + at.column, v, at.elements() * sizeof(Width));
      return;
    }
    with_width(at.width, [&](auto width) {
      for (int64_t i = 0; i < at.rows; i++, v += width) {
        Width* to = (partial ? partial : columns + matrix * shape_.columns) + at.column;
        for (int64_t j = 0; j < width; j++) to[j] += v[j];
        if (++row == shape_.rows) row = 0, matrix++;
      }
    });
  }

  void add_partial(const Mean& mean, const std::vector<Width>& partial, int64_t splits, int columns, size_t c) {
    Width* to = static_cast<Width*>(arrays_[mean.at]);
    for (int64_t matrix = 0; matrix < shape_.matrices; matrix++)
      for (int64_t j = 0; j < shape_.columns; j++) {
        double total = 0;
        for (int64_t i = matrix * splits; i < (matrix + 1) * splits; i++)
          total += partial[(i * columns + c) * shape_.columns + j];
        *to++ = static_cast<Width>(total);
      }
  }

  // From sums to means; `total` is the sum of all.
  void finish(const Mean& mean, double total) {
    if (mean.space == NUMBER) {
      *static_cast<Width*>(slot(mean.at)) = static_cast<Width>(total / shape_.elements());
      return;
    }
    Width* to = static_cast<Width*>(arrays_[mean.at]);
    const int64_t each = mean.space == ROW ? shape_.columns : shape_.rows;
    if (each > 1)
      for (int64_t i = 0; i < shape_.count(mean.space); i++) to[i] /= each;
  }

  const Program& program_;
  const int64_t* row_;
  char* slots_;
  const Shape shape_;
  const int threads_;
  std::vector<void*> arrays_;
};

// The stages from `first` to `last` of all tensors: small ones by one thread each, large ones by all threads.
template <class Width>
void run(const Program& program, int64_t tensors, const int64_t* table, double* slots, int first, int last, int threads) {
  auto is_wide = [&](int64_t i) {
    const int64_t* row = table + i * program.columns;
    return row[0] * row[1] * row[2] > WIDE;
  };
  auto walk = [&](int64_t i, int team) {
    Walk<Width>(program, table + i * program.columns, slots + i * program.slots, team).run(first, last);
  };
  for (int64_t i = 0; i < tensors; i++)
    if (threads == 1 || is_wide(i)) walk(i, threads);
  if (threads == 1) return;
  #pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < tensors; i++)
    if (!is_wide(i)) walk(i, 1);
}

}  // namespace stages
