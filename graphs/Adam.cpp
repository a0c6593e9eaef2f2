// launches per step: 1, bytes per element: 28
// Adam()[float32]
// inputs: param, grad, exp_avg, exp_avg_sq, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps
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
                       const float* in_ptr9,
                       float* out_ptr3,
                       float* out_ptr4,
                       float* out_ptr5,
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
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp5 = at::vec::Vectorized<float>::loadu(in_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp15 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp16 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp19 = in_ptr6[static_cast<int64_t>(0L)];
                    auto tmp25 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp28 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp32 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp2 = static_cast<float>(0.5);
                    auto tmp3 = tmp1 < tmp2;
                    auto tmp6 = at::vec::VecMask<float,1>::from(tmp3);
                    auto tmp7 = decltype(tmp4)::blendv(tmp5, tmp4, tmp6.template cast<float,1>());
                    auto tmp8 = tmp5 - tmp4;
                    auto tmp9 = static_cast<float>(1.0);
                    auto tmp10 = float(tmp1 - tmp9);
                    auto tmp11 = tmp3 ? tmp1 : tmp10;
                    auto tmp12 = at::vec::Vectorized<float>(tmp11);
                    auto tmp13 = tmp8 * tmp12;
                    auto tmp14 = tmp7 + tmp13;
                    auto tmp17 = at::vec::Vectorized<float>(tmp16);
                    auto tmp18 = tmp15 * tmp17;
                    auto tmp20 = at::vec::Vectorized<float>(tmp19);
                    auto tmp21 = tmp5 * tmp20;
                    auto tmp22 = tmp21 * tmp5;
                    auto tmp23 = tmp18 + tmp22;
                    auto tmp24 = tmp23.sqrt();
                    auto tmp26 = at::vec::Vectorized<float>(tmp25);
                    auto tmp27 = tmp24 * tmp26;
                    auto tmp29 = at::vec::Vectorized<float>(tmp28);
                    auto tmp30 = tmp27 + tmp29;
                    auto tmp31 = tmp14 / tmp30;
                    auto tmp33 = at::vec::Vectorized<float>(tmp32);
                    auto tmp34 = tmp31 * tmp33;
                    auto tmp35 = tmp0 - tmp34;
                    tmp35.store(out_ptr3 + static_cast<int64_t>(x0));
                    tmp14.store(out_ptr4 + static_cast<int64_t>(x0));
                    tmp23.store(out_ptr5 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp5 = at::vec::Vectorized<float>::loadu(in_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp15 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp16 = in_ptr5[static_cast<int64_t>(0L)];
                    auto tmp19 = in_ptr6[static_cast<int64_t>(0L)];
                    auto tmp25 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp28 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp32 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp2 = static_cast<float>(0.5);
                    auto tmp3 = tmp1 < tmp2;
                    auto tmp6 = at::vec::VecMask<float,1>::from(tmp3);
                    auto tmp7 = decltype(tmp4)::blendv(tmp5, tmp4, tmp6.template cast<float,1>());
                    auto tmp8 = tmp5 - tmp4;
                    auto tmp9 = static_cast<float>(1.0);
                    auto tmp10 = float(tmp1 - tmp9);
                    auto tmp11 = tmp3 ? tmp1 : tmp10;
                    auto tmp12 = at::vec::Vectorized<float>(tmp11);
                    auto tmp13 = tmp8 * tmp12;
                    auto tmp14 = tmp7 + tmp13;
                    auto tmp17 = at::vec::Vectorized<float>(tmp16);
                    auto tmp18 = tmp15 * tmp17;
                    auto tmp20 = at::vec::Vectorized<float>(tmp19);
                    auto tmp21 = tmp5 * tmp20;
                    auto tmp22 = tmp21 * tmp5;
                    auto tmp23 = tmp18 + tmp22;
                    auto tmp24 = tmp23.sqrt();
                    auto tmp26 = at::vec::Vectorized<float>(tmp25);
                    auto tmp27 = tmp24 * tmp26;
                    auto tmp29 = at::vec::Vectorized<float>(tmp28);
                    auto tmp30 = tmp27 + tmp29;
                    auto tmp31 = tmp14 / tmp30;
                    auto tmp33 = at::vec::Vectorized<float>(tmp32);
                    auto tmp34 = tmp31 * tmp33;
                    auto tmp35 = tmp0 - tmp34;
                    tmp35.store(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp14.store(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp23.store(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
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
      float k[7];
      for (int64_t i = 0; i < 7; i++) k[i] = scalars[rows[t] * columns + i];
      kernel(Address{table[t * 4 + 0], o * 4}, &k[1], Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 1], o * 4}, Address{table[t * 4 + 3], o * 4}, &k[2], &k[3], &k[5], &k[6], &k[4], Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 3], o * 4}, n);
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

extern "C" int64_t signature() { return 407; }
