// Launches on a CUDA device. `entry` is what plan.h calls a kernel: it fills the words that the Triton kernels read
// (backends/triton_text.py), brings those that changed to the device, and starts `prologue` and `update`. No header of
// torch is included, so that this builds in a second.
//
// The words of a launch have 64 bits each and lie in one buffer on the device:
//
//   constants   one word: the float32 numbers 0 and 1
//   rows        [row]: the scalars in the dtype of the kernel's arithmetic, padded to whole words. Of a launch with a
//               prologue: the tagged addresses of the hyperparameters, then a float64 for each, which is where the
//               address points if the host has the number
//   table       [tensor]: addresses of parameter, gradient and buffers; of its scalars; of the float32 that is not zero if
//               the tensor is to be skipped; the other cells of plan.h, which are the rows that a sparse gradient touches
//               and tagged addresses of counts; with a prologue, the address of its row; otherwise, if gradients are
//               multiplied by a factor, the address of that
//   sizes       [tensor]: elements, first chunk
//   tensor_of   [chunk]: int32. A chunk is `repeat` blocks of one tensor
//   scalars     [tensor], padded to whole words: written by the prologue
//   numbers     [tensor][counts and hyperparameters]: float64, the prologue's own
//
// A tagged address is that of a float32 if its lowest bit is set, otherwise that of a float64.
#include "cuda_driver.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

// What Python says once of a launch.
struct Form {
  Handle update, prologue;  // kernels; no prologue if the host counts the steps
  int64_t device;           // its index
  int64_t flat;             // addresses of a tensor: parameter, gradient and buffers
  int64_t cells;            // of a tensor in the table of plan.h
  int64_t scalars, scalar_bytes;
  int64_t factor;           // which of the scalars has an address of its own, or -1
  int64_t counts, hypers;   // that the prologue reads, or 0
  int64_t block;            // elements that a block of `update` updates at a time
  int64_t threads;          // of such a block
  int64_t shared, prologue_shared;  // bytes of memory that the threads of a block share
};

class Launch;

// The context of plan.h. Python sets the fields before each step.
struct Step {
  Launch* launch;
  Handle stream;
  int64_t buffer;     // where the words are
  int64_t capacity;   // of the buffer, in words
  int64_t factor;     // where the scalar of `Form` lies on the device; 0 if the host has it
  int64_t capturing;  // A graph replays what is sent while it is captured. So that is everything, to a new buffer.
};

constexpr int64_t kMostChunks = 16384;  // besides one for each tensor
constexpr int64_t kMostBlocks = 65535;  // along one axis of a grid
constexpr int64_t kLanes = 32;          // tensors, and threads, of a block of `prologue`

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Launch {
 public:
  Launch(const Driver& driver, const Form& form)
      : driver_(driver), form_(form), context_(driver, static_cast<int>(form.device)) {
    scalar_words_ = divide_up(form.scalars * form.scalar_bytes, 8);
    row_words_ = form.prologue ? 2 * form.hypers : scalar_words_;
    stride_ = form.cells + (form.prologue || form.factor >= 0 ? 3 : 2);
    context_.with([&] {
      form_.update = driver.function_of(form.update);
      form_.prologue = driver.function_of(form.prologue);
      for (size_t w = 0; w < writers_.size(); w++) writers_[w] = driver.function_of(driver.writers[w].kernel);
    });
  }

  // Words that are enough for any launch of so many tensors.
  int64_t capacity(int64_t tensors) const { return places(tensors, tensors, kMostChunks + tensors).end; }

  void run(const Step& step, int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
           const double* scalars, const void* const* addresses, int64_t columns) {
    number(rows, tensors);
    const bool same = is_sent_ && !step.capturing && step.buffer == buffer_ && step.capacity == capacity_ &&
                      used_.size() == rows_ && std::equal(begins, begins + tensors + 1, begins_.begin(), begins_.end());
    is_sent_ = false;
    buffer_ = step.buffer, capacity_ = step.capacity, rows_ = used_.size();
    if (!same) cut(begins, tensors);
    at_ = 1, first_ = words_.size(), last_ = 0;
    for (const int32_t row : used_) put_row(scalars + row * columns, addresses + row * columns);
    for (int64_t t = 0; t < tensors; t++, table += form_.cells) {
      const int64_t row = rows[t] < 0 ? ~rows[t] : rows[t];
      const int64_t its_row = address(1 + numbers_[row] * row_words_);
      for (int64_t c = 0; c < form_.flat; c++) put(table[c]);
      put(form_.prologue ? address(places_.scalars + t * scalar_words_) : its_row);
      put(rows[t] < 0 ? address(0) + 4 : skip(scalars + row * columns, addresses + row * columns));
      for (int64_t c = form_.flat; c < form_.cells; c++) put(table[c]);
      if (form_.prologue) put(its_row);
      else if (form_.factor >= 0) put(step.factor ? step.factor : its_row + form_.factor * form_.scalar_bytes);
    }
    context_.with([&] {
      if (same) send(step.stream, first_, last_);
      else send(step.stream, 0, places_.scalars);
      if (form_.prologue)
        start(step.stream, form_.prologue, divide_up(tensors, kLanes), kLanes, form_.prologue_shared,
              {address(places_.table), address(places_.numbers), tensors});
      if (chunks_)
        start(step.stream, form_.update, chunks_, form_.threads, form_.shared,
              {address(places_.table), address(places_.sizes), address(places_.tensor_of), chunks_, repeat_});
    });
    is_sent_ = true;
  }

 private:
  struct Places {  // in the buffer, in words
    int64_t table, sizes, tensor_of, scalars, numbers, end;
  };
  Places places(int64_t tensors, int64_t rows, int64_t chunks) const {
    Places p;
    p.table = 1 + rows * row_words_;
    p.sizes = p.table + tensors * stride_;
    p.tensor_of = p.sizes + 2 * tensors;
    p.scalars = p.tensor_of + divide_up(chunks, 2);
    p.numbers = p.scalars + (form_.prologue ? tensors * scalar_words_ : 0);
    p.end = p.numbers + tensors * (form_.counts + form_.hypers);
    return p;
  }
  int64_t address(int64_t place) const { return buffer_ + 8 * place; }

  // Numbers the rows that these tensors take: the tables of a step also have those of other launches.
  void number(const int32_t* rows, int64_t tensors) {
    for (const int32_t row : used_) numbers_[row] = -1;
    used_.clear();
    for (int64_t t = 0; t < tensors; t++) {
      const int32_t row = rows[t] < 0 ? ~rows[t] : rows[t];
      if (static_cast<size_t>(row) >= numbers_.size()) numbers_.resize(row + 1, -1);
      if (numbers_[row] >= 0) continue;
      numbers_[row] = static_cast<int32_t>(used_.size());
      used_.push_back(row);
    }
  }

  // Cuts the tensors into chunks, so few that a chunk of one large tensor is several blocks.
  void cut(const int64_t* begins, int64_t tensors) {
    begins_.assign(begins, begins + tensors + 1);
    repeat_ = std::max<int64_t>(1, divide_up(begins[tensors], form_.block * kMostChunks));
    auto chunks_of = [&](int64_t t) { return divide_up(begins[t + 1] - begins[t], form_.block * repeat_); };
    chunks_ = 0;
    for (int64_t t = 0; t < tensors; t++) chunks_ += chunks_of(t);
    places_ = places(tensors, static_cast<int64_t>(rows_), chunks_);
    if (places_.end > capacity_)
      throw std::runtime_error("a launch of " + std::to_string(tensors) + " tensors needs " +
                               std::to_string(places_.end) + " words, and its buffer has " + std::to_string(capacity_));
    words_.assign(places_.scalars + kMostWords, 0);  // a writer reads beyond the words that it is to write
    words_[0] = int64_t{0x3f800000} << 32;
    auto* sizes = words_.data() + places_.sizes;
    auto* tensor_of = reinterpret_cast<int32_t*>(words_.data() + places_.tensor_of);
    for (int64_t t = 0, first = 0; t < tensors; t++) {
      sizes[2 * t] = begins[t + 1] - begins[t];
      sizes[2 * t + 1] = first;
      for (const int64_t end = first + chunks_of(t); first < end; first++) tensor_of[first] = static_cast<int32_t>(t);
    }
  }

  void put(int64_t word) {
    if (words_[at_] != word) {
      words_[at_] = word;
      first_ = std::min(first_, at_);
      last_ = at_ + 1;
    }
    at_++;
  }
  void put(const void* cell) { put(reinterpret_cast<int64_t>(cell)); }
  template <class Number>
  void put(const Number (&numbers)[8 / sizeof(Number)]) {
    int64_t word;
    std::memcpy(&word, numbers, 8);
    put(word);
  }

  void put_row(const double* values, const void* const* addresses) {
    if (form_.prologue) {
      const int64_t here = address(static_cast<int64_t>(at_) + form_.hypers);
      for (int64_t h = 0; h < form_.hypers; h++) put(addresses[h] ? reinterpret_cast<int64_t>(addresses[h]) : here + 8 * h);
      for (int64_t h = 0; h < form_.hypers; h++) put<double>({values[h]});
    } else if (form_.scalar_bytes == 8) {
      for (int64_t i = 0; i < form_.scalars; i++) put<double>({values[i]});
    } else {
      for (int64_t i = 0; i < form_.scalars; i += 2)
        put<float>({static_cast<float>(values[i]), i + 1 < form_.scalars ? static_cast<float>(values[i + 1]) : 0});
    }
  }

  // The address of the float32 that tells whether the tensors of a row are skipped. A prologue's row ends in it.
  int64_t skip(const double* values, const void* const* addresses) const {
    if (!form_.prologue) return address(0);
    const auto found_inf = reinterpret_cast<int64_t>(addresses[form_.hypers]);
    if (!found_inf) return address(0) + (values[form_.hypers] ? 4 : 0);
    if (!(found_inf & 1)) throw std::runtime_error("found_inf must be a float32 tensor, got float64");
    return found_inf - 1;
  }

  void send(Handle stream, size_t from, size_t to) const {
    while (from < to) {
      size_t w = 0;
      while (driver_.writers[w].words < static_cast<int64_t>(to - from) && w + 1 < writers_.size() && writers_[w + 1]) w++;
      uint32_t count = static_cast<uint32_t>(std::min<size_t>(to - from, driver_.writers[w].words));
      int64_t there = address(static_cast<int64_t>(from));
      void* parameters[] = {&there, &count, const_cast<int64_t*>(words_.data() + from)};
      driver_.launch(writers_[w], static_cast<unsigned>(divide_up(count, kWriterThreads)), 1, 1, kWriterThreads, 1, 1, 0,
                     stream, parameters, nullptr);
      from += count;
    }
  }

  // Starts a kernel of Triton. The last two parameters of each are scratch memory, which none of ours needs.
  void start(Handle stream, Handle function, int64_t blocks, int64_t threads, int64_t shared,
             std::array<int64_t, 7> given) const {
    std::array<void*, 7> parameters;
    for (size_t i = 0; i < given.size(); i++) parameters[i] = &given[i];
    driver_.launch(function, 1, static_cast<unsigned>(std::min(blocks, kMostBlocks)),
                   static_cast<unsigned>(divide_up(blocks, kMostBlocks)), static_cast<unsigned>(threads), 1, 1,
                   static_cast<unsigned>(shared), stream, parameters.data(), nullptr);
  }

  const Driver& driver_;
  Form form_;
  Context context_;
  std::array<Handle, 3> writers_{};
  int64_t scalar_words_, row_words_, stride_;

  // what the buffer holds
  bool is_sent_ = false;
  int64_t buffer_ = 0;
  int64_t capacity_ = 0, chunks_ = 0, repeat_ = 1;
  size_t rows_ = 0;
  std::vector<int64_t> begins_;
  Places places_{};
  std::vector<int64_t> words_;

  // of the step under way
  std::vector<int32_t> used_;     // [row of the words]: its row in the tables of all launches
  std::vector<int32_t> numbers_;  // [row of the tables]: its row of the words, or -1
  size_t at_ = 0, first_ = 0, last_ = 0;
};

// What a function throws, until the next call in this thread; or nullptr.
template <class Body>
const char* guarded(Body body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

const Driver& driver_of(const void* driver) { return *static_cast<const Driver*>(driver); }

}  // namespace

// For Python. What returns text says what went wrong, or nothing did if it is null.
extern "C" {

// Opens the driver for the rest of the process.
const char* driver_open(const char* name, void** driver) {
  return guarded([&] {
    Handle library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("the CUDA driver cannot be opened: ") + dlerror());
    *driver = new Driver(library);
  });
}

// A kernel in a cubin, which stays loaded: a CUDA graph may hold it for ever.
const char* kernel_load(const void* driver, const void* image, const char* name, void** kernel) {
  return guarded([&] { *kernel = driver_of(driver).load(image, name); });
}

const char* launch_make(const void* driver, const void* form, void** launch) {
  return guarded([&] { *launch = new Launch(driver_of(driver), *static_cast<const Form*>(form)); });
}

void launch_drop(void* launch) { delete static_cast<Launch*>(launch); }

int64_t launch_capacity(const void* launch, int64_t tensors) {
  return static_cast<const Launch*>(launch)->capacity(tensors);
}

// `Kernel` of plan.h; it throws.
void entry(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows, const double* scalars,
           const void* const* addresses, int64_t columns, void* context) {
  const auto& step = *static_cast<const Step*>(context);
  step.launch->run(step, tensors, table, begins, rows, scalars, addresses, columns);
}
}
