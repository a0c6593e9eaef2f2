// launches per step: 1, bytes per element: 28
// Adadelta(maximize, weight_decay)[float32]
// inputs: param, grad, square_avg, acc_delta, lr, rho, one_minus_rho, eps, weight_decay
#include <torch/csrc/inductor/cpp_prefix.h>

// Inductor points a process-wide flag at a local of each call; calls from several threads would race on it.
static thread_local std::atomic<int>* division_flag;
#define inductor_cpu_integer_div_error_flag division_flag

#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void C10_ALWAYS_INLINE_ATTRIBUTE kernel(const float* in_ptr0,
                       const float* in_ptr1,
                       const float* in_ptr2,
                       const float* in_ptr3,
                       const float* in_ptr4,
                       const float* in_ptr5,
                       const float* in_ptr6,
                       const float* in_ptr7,
                       const float* in_ptr8,
                       float* out_ptr4,
                       float* out_ptr5,
                       float* out_ptr6,
                       const int64_t ks0)
{
    std::atomic<int> inductor_cpu_integer_div_error{0};
    inductor_cpu_integer_div_error_flag = &inductor_cpu_integer_div_error;
    {
        for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(ks0); x0+=static_cast<int64_t>(8L))
        {
            {
                if(C10_LIKELY(x0 >= static_cast<int64_t>(0) && x0 < static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L))))))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr6 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = at::vec::Vectorized<float>::loadu(in_ptr2 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp6 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp7 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp11 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp16 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp17 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp25 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp5 = tmp4.neg();
                    auto tmp8 = at::vec::Vectorized<float>(tmp7);
                    auto tmp9 = tmp6 * tmp8;
                    auto tmp10 = tmp5 + tmp9;
                    auto tmp12 = at::vec::Vectorized<float>(tmp11);
                    auto tmp13 = tmp10 * tmp12;
                    auto tmp14 = tmp13 * tmp10;
                    auto tmp15 = tmp3 + tmp14;
                    auto tmp18 = at::vec::Vectorized<float>(tmp17);
                    auto tmp19 = tmp16 + tmp18;
                    auto tmp20 = tmp19.sqrt();
                    auto tmp21 = tmp15 + tmp18;
                    auto tmp22 = tmp21.sqrt();
                    auto tmp23 = tmp20 / tmp22;
                    auto tmp24 = tmp23 * tmp10;
                    auto tmp26 = at::vec::Vectorized<float>(tmp25);
                    auto tmp27 = tmp24 * tmp26;
                    auto tmp28 = tmp6 - tmp27;
                    auto tmp29 = tmp16 * tmp2;
                    auto tmp30 = tmp24 * tmp12;
                    auto tmp31 = tmp30 * tmp24;
                    auto tmp32 = tmp29 + tmp31;
                    tmp28.store(out_ptr4 + static_cast<int64_t>(x0));
                    tmp32.store(out_ptr5 + static_cast<int64_t>(x0));
                    tmp15.store(out_ptr6 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr6 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = at::vec::Vectorized<float>::loadu(in_ptr2 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp6 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp7 = in_ptr4[static_cast<int64_t>(0L)];
                    auto tmp11 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp16 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp17 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp25 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp5 = tmp4.neg();
                    auto tmp8 = at::vec::Vectorized<float>(tmp7);
                    auto tmp9 = tmp6 * tmp8;
                    auto tmp10 = tmp5 + tmp9;
                    auto tmp12 = at::vec::Vectorized<float>(tmp11);
                    auto tmp13 = tmp10 * tmp12;
                    auto tmp14 = tmp13 * tmp10;
                    auto tmp15 = tmp3 + tmp14;
                    auto tmp18 = at::vec::Vectorized<float>(tmp17);
                    auto tmp19 = tmp16 + tmp18;
                    auto tmp20 = tmp19.sqrt();
                    auto tmp21 = tmp15 + tmp18;
                    auto tmp22 = tmp21.sqrt();
                    auto tmp23 = tmp20 / tmp22;
                    auto tmp24 = tmp23 * tmp10;
                    auto tmp26 = at::vec::Vectorized<float>(tmp25);
                    auto tmp27 = tmp24 * tmp26;
                    auto tmp28 = tmp6 - tmp27;
                    auto tmp29 = tmp16 * tmp2;
                    auto tmp30 = tmp24 * tmp12;
                    auto tmp31 = tmp30 * tmp24;
                    auto tmp32 = tmp29 + tmp31;
                    tmp28.store(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp32.store(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp15.store(out_ptr6 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                }
            }
        }
    }
    inductor_cpu_integer_div_error_flag = nullptr;
    inductor_cpu_throw_if_integer_div_error(inductor_cpu_integer_div_error);
}

#undef inductor_cpu_integer_div_error_flag

namespace {
struct Address {
  void* base;
  int64_t bytes;
  template <class T> operator T*() const { return reinterpret_cast<T*>(static_cast<char*>(base) + bytes); }
};
}

extern "C" void launch(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
                       const double* scalars, int64_t columns, int threads) {
  const int64_t total = begins[tensors];
  auto span = [&](int64_t at, int64_t end) {
    for (int64_t t = std::upper_bound(begins, begins + tensors + 1, at) - begins - 1; at < end; t++) {
      const int64_t o = at - begins[t], n = std::min(begins[t + 1], end) - at;
      if (n == 0) continue;
      float k[5];
      for (int64_t i = 0; i < 5; i++) k[i] = scalars[rows[t] * columns + i];
      kernel(Address{table[t * 4 + 2], o * 4}, &k[1], Address{table[t * 4 + 1], o * 4}, Address{table[t * 4 + 0], o * 4}, &k[4], &k[2], Address{table[t * 4 + 3], o * 4}, &k[3], &k[0], Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 3], o * 4}, Address{table[t * 4 + 2], o * 4}, n);
      at += n;
    }
  };
  if (threads == 1) return span(0, total);
  #pragma omp parallel num_threads(threads)
  {
    // a multiple of 64 elements: no two threads write to one cache line of a tensor that begins on one
    const int64_t team = omp_get_num_threads(), id = omp_get_thread_num(), share = (total / team + 64) / 64 * 64;
    span(std::min(id * share, total), std::min((id + 1) * share, total));
  }
}

extern "C" int64_t signature() { return 405; }
