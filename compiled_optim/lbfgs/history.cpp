// The vector work of one iteration of L-BFGS: the newest pair, and the direction by the two-loop recursion.
//
// The pairs stand in two rings, y[slots][n] and s[slots][n]. Sums are vectorised in T over blocks, and of doubles beyond
// that; nothing else is reassociated and no -ffast-math is used, so NaN and infinity keep their meaning.
#include <cstdint>
#include <omp.h>
#include <vector>

namespace {

constexpr int kTeam = 256;        // threads at most
constexpr int64_t kBlock = 4096;  // elements in one sum of T
constexpr int64_t kLine = 64;     // bytes that threads should not share

// What one thread of a team works on, and its way to add up what all of them found.
struct Share {
  struct Sums {
    alignas(kLine) double of[2][kTeam][kLine / sizeof(double)];
  };

  Share(int64_t n, int64_t element, Sums& sums) : sums(sums), id(omp_get_thread_num()), team(omp_get_num_threads()) {
    const int64_t unit = kLine / element, each = ((n + team - 1) / team + unit - 1) / unit * unit;
    begin = id * each < n ? id * each : n;
    end = begin + each < n ? begin + each : n;
  }

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

  template <typename Block>
  void blocks(Block block) const {
    for (int64_t b = begin; b < end; b += kBlock) block(b, b + kBlock < end ? b + kBlock : end);
  }

  Sums& sums;
  int id, team, turn = 0;
  int64_t begin, end;
};

// y = g - before and s = t * d into a slot; true if the pair counts, which is then complete with ro and scale.
template <typename T>
bool update(int64_t n, int64_t slot, const T* g, const T* before, const T* d, double step, T* y_ring, T* s_ring, T* ro,
            T* scale, int threads) {
  T *y = y_ring + slot * n, *s = s_ring + slot * n;
  const T t = static_cast<T>(step);
  Share::Sums sums;
  double ys = 0, yy = 0;
#pragma omp parallel num_threads(threads)
  {
    Share share(n, sizeof(T), sums);
    double my_ys = 0, my_yy = 0;
    share.blocks([&](int64_t begin, int64_t end) {
      T block_ys = 0, block_yy = 0;
#pragma omp simd reduction(+ : block_ys, block_yy)
      for (int64_t i = begin; i < end; ++i) {
        const T yi = g[i] - before[i], si = d[i] * t;
        y[i] = yi;
        s[i] = si;
        block_ys += yi * si;
        block_yy += yi * yi;
      }
      my_ys += block_ys;
      my_yy += block_yy;
    });
    my_ys = share.total(my_ys);
    my_yy = share.total(my_yy);
    if (share.id == 0) ys = my_ys, yy = my_yy;
  }
  if (!(ys > 1e-10)) return false;
  ro[slot] = static_cast<T>(1 / ys);
  *scale = static_cast<T>(ys / yy);
  return true;
}

// d = -H g, for the `m` pairs from slot `first` on, the oldest first. Returns the product of g and d.
//
// Each pass changes d and takes the product with the vector that the next pass needs, so d is read and written once.
template <typename T>
double direction(int64_t n, int64_t slots, int64_t first, int64_t m, const T* y_ring, const T* s_ring, const T* ro,
                 const T* scale, const T* g, T* d, int threads) {
  auto slot = [=](int64_t age) { return (first + age) % slots; };
  auto y = [=](int64_t age) { return y_ring + slot(age) * n; };
  auto s = [=](int64_t age) { return s_ring + slot(age) * n; };
  std::vector<double> al(m);
  Share::Sums sums;
  double gd = 0;
#pragma omp parallel num_threads(threads)
  {
    Share share(n, sizeof(T), sums);
    // d[i] = value(i); the product of next and d
    auto pass = [&](auto value, const T* next) {
      double sum = 0;
      share.blocks([&](int64_t begin, int64_t end) {
        T block = 0;
#pragma omp simd reduction(+ : block)
        for (int64_t i = begin; i < end; ++i) {
          const T v = value(i);
          d[i] = v;
          block += next[i] * v;
        }
        sum += block;
      });
      return share.total(sum);
    };
    const T h = *scale;
    double dot = m > 0 ? pass([=](int64_t i) { return -g[i]; }, s(m - 1)) : pass([=](int64_t i) { return -g[i] * h; }, g);
    for (int64_t j = m - 1; j >= 0; --j) {
      const double alpha = dot * ro[slot(j)];
      if (share.id == 0) al[j] = alpha;
      const T a = static_cast<T>(alpha), by = j > 0 ? T(1) : h;
      dot = pass([=, x = y(j)](int64_t i) { return (d[i] - a * x[i]) * by; }, j > 0 ? s(j - 1) : y(0));
    }
    for (int64_t j = 0; j < m; ++j) {
      const T c = static_cast<T>(al[j] - dot * ro[slot(j)]);
      dot = pass([=, x = s(j)](int64_t i) { return d[i] + c * x[i]; }, j + 1 < m ? y(j + 1) : g);
    }
    if (share.id == 0) gd = dot;
  }
  return gd;
}

}  // namespace

#define EXPORT(T, name)                                                                                              \
  extern "C" bool update_##name(int64_t n, int64_t slot, const T* g, const T* before, const T* d, double step, T* y, \
                                T* s, T* ro, T* scale, int threads) {                                                \
    return update(n, slot, g, before, d, step, y, s, ro, scale, threads < kTeam ? threads : kTeam);                  \
  }                                                                                                                  \
  extern "C" double direction_##name(int64_t n, int64_t slots, int64_t first, int64_t m, const T* y, const T* s,     \
                                     const T* ro, const T* scale, const T* g, T* d, int threads) {                   \
    return direction(n, slots, first, m, y, s, ro, scale, g, d, threads < kTeam ? threads : kTeam);                  \
  }

EXPORT(float, float32)
EXPORT(double, float64)
