// The norm of many tensors, and setting them to zero, in one pass over each. Their elements are laid end to end and cut
// into one equal share per thread, so a result depends on the tensors and the number of threads only.
//
// This library knows nothing of torch, which makes it fast to compile for the processor at hand. Nothing is allocated
// here, so nothing throws: an exception that left a function called by address would end the process.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

constexpr int kLanes = 16;        // elements per vector; the compiler splits vectors into registers of the machine
constexpr int kVectors = 4;       // vectors that are in flight, because an addition takes longer than it takes to issue
constexpr int64_t kBlock = 2048;  // elements in one sum of float32
constexpr int kTeam = 256;        // threads at most
constexpr int kAhead = 1024;      // bytes that are fetched before they are read

// Below this many elements or bytes, starting a team of threads costs more than it saves.
constexpr int64_t kOneThreadNorm = 1 << 16, kOneThreadZero = 1 << 18;

int team_for(int64_t units, int64_t one_thread, int threads) { return units < one_thread ? 1 : std::min(threads, kTeam); }

template <class T>
using Vector [[gnu::vector_size(kLanes * sizeof(T))]] = T;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class V>
V read(const void* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <class To, class V>
To as_bits(V v) {
  return read<To>(&v);
}

Vector<float> load(const float* x) { return read<Vector<float>>(x); }
Vector<double> load(const double* x) { return read<Vector<double>>(x); }

Vector<uint32_t> widened(const uint16_t* x) {
  return __builtin_convertvector(read<Vector<uint16_t>>(x), Vector<uint32_t>);
}

Vector<float> load(const BFloat16* x) { return as_bits<Vector<float>>(widened(&x->bits) << 16); }

// The absolute values, which are all that a norm needs. Exponents are rebased by a multiplication, which also
// normalizes subnormal numbers; infinity and NaN get the exponent that they have in float32.
Vector<float> load(const Half* x) {
  const auto bits = widened(&x->bits) & 0x7fffu;
  const auto rebased = as_bits<Vector<uint32_t>>(as_bits<Vector<float>>(bits << 13) * 0x1p112f);
  return as_bits<Vector<float>>(rebased | (as_bits<Vector<uint32_t>>(bits > 0x7bffu) & 0x7f800000u));
}

// Calls use(i, v) for all elements as vectors v, the last of them filled up with zeros. Successive i < kVectors differ.
template <class T, class Use>
void for_vectors(const T* x, int64_t n, Use use) {
  const T* const end = x + n;
  for (; end - x >= kLanes * kVectors; x += kLanes * kVectors)
    for (int i = 0; i < kVectors; i++) {
      // One stream alone does not fill the bandwidth of a core. An address behind the end does no harm.
      __builtin_prefetch(reinterpret_cast<const char*>(x + i * kLanes) + kAhead);
      use(i, load(x + i * kLanes));
    }
  for (; end - x >= kLanes; x += kLanes) use(0, load(x));
  if (x == end) return;
  T rest[kLanes] = {};
  std::memcpy(rest, x, (end - x) * sizeof(T));
  use(0, load(rest));
}

// The sum of the squares of one block, added up in the given type.
template <class Wide, class T>
Wide squares(const T* x, int64_t n) {
  Vector<Wide> sums[kVectors] = {};
  for_vectors(x, n, [&](int i, auto v) {
    const auto wide = __builtin_convertvector(v, Vector<Wide>);
    sums[i] += wide * wide;
  });
  const auto lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  Wide sum = 0;
  for (int i = 0; i < kLanes; i++) sum += lanes[i];
  return sum;
}

long double exact_squares(const double* x, int64_t n) {
  long double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += static_cast<long double>(x[i]) * x[i];
  return sum;
}

template <class T>
long double exact_squares(const T* x, int64_t n) {
  return squares<double>(x, n);
}

// Each block is added up in the type of its vectors. If that may have lost a square, because it is too large for the
// type or too small beside the sum, the block is added up again in a wider one. So only an element that is not finite
// makes the sum so.
struct SumOfSquares {
  long double sum = 0;

  template <class T>
  void add(const T* x, int64_t n) {
    using Element = std::remove_reference_t<decltype(load(x)[0])>;
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t size = std::min(kBlock, n - at);
      const auto narrow = squares<Element>(x + at, size);
      const auto smallest = std::numeric_limits<Element>::min() * Element(0x1p60);
      const bool is_safe = narrow > smallest && narrow <= std::numeric_limits<Element>::max();
      sum += is_safe ? narrow : exact_squares(x + at, size);
    }
  }
  void add(const SumOfSquares& other) { sum += other.sum; }
  double norm() const { return static_cast<double>(std::sqrt(sum)); }
};

// The bits of absolute values, taken for integers, are in the order of the values, and NaN comes after infinity.
struct Largest {
  int64_t bits = 0;  // of a double

  template <class T>
  void add(const T* x, int64_t n) {
    using Element = std::remove_reference_t<decltype(load(x)[0])>;
    using Integer = std::conditional_t<sizeof(Element) == 4, int32_t, int64_t>;
    Vector<Integer> largest[kVectors] = {};
    for_vectors(x, n, [&](int i, auto v) {
      const auto magnitude = as_bits<Vector<Integer>>(v) & std::numeric_limits<Integer>::max();
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    });
    Integer found = 0;
    for (const auto& vector : largest)
      for (int i = 0; i < kLanes; i++) found = std::max(found, Integer(vector[i]));
    bits = std::max(bits, as_bits<int64_t>(static_cast<double>(as_bits<Element>(found))));
  }
  void add(const Largest& other) { bits = std::max(bits, other.bits); }
  double norm() const { return read<double>(&bits); }
};

// Calls use(i, from, size) for the pieces of tensors that make up a thread's share.
template <class Use>
void for_share(int64_t tensors, const int64_t* begins, Use use) {
  const int64_t total = begins[tensors], team = omp_get_num_threads(), id = omp_get_thread_num();
  const int64_t share = (total / team + kBlock) / kBlock * kBlock, end = std::min((id + 1) * share, total);
  int64_t at = std::min(id * share, total);
  for (int64_t i = std::upper_bound(begins, begins + tensors + 1, at) - begins - 1; at < end; i++) {
    const int64_t size = std::min(begins[i + 1], end) - at;
    if (size) use(i, at - begins[i], size);
    at += size;
  }
}

template <class Total>
double norm_of(int64_t tensors, const void* const* data, const int64_t* begins, const int8_t* types, int threads) {
  struct alignas(64) Line {  // which threads do not share
    Total total;
  } lines[kTeam];
#pragma omp parallel num_threads(threads)
  {
    Total total;
    for_share(tensors, begins, [&](int64_t i, int64_t from, int64_t size) {
      const auto add = [&](auto element) { total.add(static_cast<const decltype(element)*>(data[i]) + from, size); };
      switch (types[i]) {
        case 0: return add(float());
        case 1: return add(double());
        case 2: return add(BFloat16());
        case 3: return add(Half());
      }
    });
    lines[omp_get_thread_num()].total = total;
  }
  for (int i = 1; i < threads; i++) lines[0].total.add(lines[i].total);
  return lines[0].total.norm();
}

}  // namespace

// `begins` has `tensors + 1` entries, in elements. `types`: 0 float32, 1 float64, 2 bfloat16, 3 float16.
extern "C" double norm(int64_t tensors, const void* const* data, const int64_t* begins, const int8_t* types,
                       bool largest, int threads) {
  threads = team_for(begins[tensors], kOneThreadNorm, threads);
  return largest ? norm_of<Largest>(tensors, data, begins, types, threads)
                 : norm_of<SumOfSquares>(tensors, data, begins, types, threads);
}

// `begins` is in bytes.
extern "C" void zero(int64_t tensors, void* const* data, const int64_t* begins, int threads) {
#pragma omp parallel num_threads(team_for(begins[tensors], kOneThreadZero, threads))
  for_share(tensors, begins,
            [&](int64_t i, int64_t from, int64_t size) { std::memset(static_cast<char*>(data[i]) + from, 0, size); });
}
