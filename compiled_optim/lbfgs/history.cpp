// The vector work of one iteration of L-BFGS: the newest pair, and the direction by the two-loop recursion.
//
// The pairs stand in two rings, y[slots][stride] and s[slots][stride]. Sums are vectorised in T over blocks, and of
// doubles beyond that; nothing else is reassociated and there is no -ffast-math, so NaN and infinity keep their meaning.
// Nothing is allocated here, so nothing throws: an exception that left a function called by address would end the process.
#include <cstdint>
#include <omp.h>

namespace {

constexpr int kTeam = 256;        // threads at most
constexpr int64_t kBlock = 4096;  // elements in one sum of T
constexpr int64_t kLine = 64;     // bytes that threads should not share

struct Sums {
  alignas(kLine) double of[2][kTeam][kLine / sizeof(double)];
};

// What one thread of a team works on, and its way to add up what all of them found.
struct Share {
  Sums& sums;
  const int id = omp_get_thread_num(), team = omp_get_num_threads();
  int turn = 0;
  int64_t begin, end;

  Share(int64_t n, int64_t element, Sums& sums) : sums(sums) {
    const int64_t unit = kLine / element, each = ((n + team - 1) / team + unit - 1) / unit * unit;
    begin = id * each < n ? id * each : n;
    end = begin + each < n ? begin + each : n;
  }

  int64_t block_end(int64_t block) const { return block + kBlock < end ? block + kBlock : end; }

  // The sum over all threads, the same in each. The slots of the sum before may still be read: hence two sets in turn,
  // and one barrier.
  double total(double mine) {
    turn ^= 1;
    sums.of[turn][id][0] = mine;
#pragma omp barrier
    double all = 0;
    for (int i = 0; i < team; ++i) all += sums.of[turn][i][0];
    return all;
  }
};

// d[i] = value(i), and the product of next and d.
template <typename T, typename Value>
double pass(Share& share, T* d, const T* next, Value value) {
  double sum = 0;
  for (int64_t b = share.begin, end; b < share.end; b = end) {
    end = share.block_end(b);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = b; i < end; ++i) {
      const T v = value(i);
      d[i] = v;
      part += next[i] * v;
    }
    sum += part;
  }
  return share.total(sum);
}

// y = g - before and s = t * d into a slot; true if the pair counts, which is then complete with ro and scale.
template <typename T>
bool update(int64_t n, int64_t stride, int64_t slot, const T* g, const T* before, const T* d, double step, T* y_ring,
            T* s_ring, T* ro, T* scale, int threads) {
  Sums sums;
  double ys = 0, yy = 0;
#pragma omp parallel num_threads(threads < kTeam ? threads : kTeam)
  {
    Share share(n, sizeof(T), sums);
    T *y = y_ring + slot * stride, *s = s_ring + slot * stride;
    const T t = static_cast<T>(step);
    double my_ys = 0, my_yy = 0;
    for (int64_t b = share.begin, end; b < share.end; b = end) {
      end = share.block_end(b);
      T part_ys = 0, part_yy = 0;
#pragma omp simd reduction(+ : part_ys, part_yy)
      for (int64_t i = b; i < end; ++i) {
        const T yi = g[i] - before[i], si = d[i] * t;
        y[i] = yi;
        s[i] = si;
        part_ys += yi * si;
        part_yy += yi * yi;
      }
      my_ys += part_ys;
      my_yy += part_yy;
    }
    my_ys = share.total(my_ys);
    my_yy = share.total(my_yy);
    if (share.id == 0) ys = my_ys, yy = my_yy;
  }
  if (!(ys > 1e-10)) return false;
  ro[slot] = static_cast<T>(1 / ys);
  *scale = static_cast<T>(ys / yy);
  return true;
}

// d = -H g, for the `m` pairs from slot `first` on, the oldest first; `al` has room for m. Returns the product of g and d.
//
// Each pass changes d and takes the product with the vector that the next pass needs, so d is read and written once.
template <typename T>
double direction(int64_t n, int64_t stride, int64_t slots, int64_t first, int64_t m, const T* y_ring, const T* s_ring,
                 const T* ro, const T* scale, double* al, const T* g, T* d, int threads) {
  Sums sums;
  double gd = 0;
#pragma omp parallel num_threads(threads < kTeam ? threads : kTeam)
  {
    // By value: through references to what the team shares, the loops are not vectorised well and take 3 times as long.
    auto slot = [=](int64_t age) { return (first + age) % slots; };
    auto y = [=](int64_t age) { return y_ring + slot(age) * stride; };
    auto s = [=](int64_t age) { return s_ring + slot(age) * stride; };
    Share share(n, sizeof(T), sums);
    const T h = *scale, *const grad = g;
    T* const q = d;
    double dot = pass(share, q, m > 0 ? s(m - 1) : grad, [=](int64_t i) { return -grad[i]; });
    for (int64_t j = m - 1; j >= 0; --j) {
      const double alpha = dot * ro[slot(j)];
      if (share.id == 0) al[j] = alpha;
      const T a = static_cast<T>(alpha), by = j > 0 ? T(1) : h, *const x = y(j);
      dot = pass(share, q, j > 0 ? s(j - 1) : y(0), [=](int64_t i) { return (q[i] - a * x[i]) * by; });
    }
    for (int64_t j = 0; j < m; ++j) {
      const T c = static_cast<T>(al[j] - dot * ro[slot(j)]), *const x = s(j);
      dot = pass(share, q, j + 1 < m ? y(j + 1) : grad, [=](int64_t i) { return q[i] + c * x[i]; });
    }
    if (share.id == 0) gd = dot;
  }
  return gd;
}

}  // namespace

#define EXPORT(T, name)                                                                                              \
  extern "C" bool update_##name(int64_t n, int64_t stride, int64_t slot, const T* g, const T* before, const T* d,    \
                                double step, T* y, T* s, T* ro, T* scale, int threads) {                             \
    return update(n, stride, slot, g, before, d, step, y, s, ro, scale, threads);                                    \
  }                                                                                                                  \
  extern "C" double direction_##name(int64_t n, int64_t stride, int64_t slots, int64_t first, int64_t m, const T* y, \
                                     const T* s, const T* ro, const T* scale, double* al, const T* g, T* d,          \
                                     int threads) {                                                                  \
    return direction(n, stride, slots, first, m, y, s, ro, scale, al, g, d, threads);                                \
  }

EXPORT(float, lbfgs_float32)
EXPORT(double, lbfgs_float64)
