// launches per step: 1, bytes per element: 28
// RAdam(maximize, weight_decay, decoupled_weight_decay)[float32]
// inputs: param, grad, exp_avg, exp_avg_sq, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, rectification, eps
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
                       const float* in_ptr10,
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
                    auto tmp4 = in_ptr2[static_cast<int64_t>(0L)];
                    auto tmp7 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp10 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp11 = at::vec::Vectorized<float>::loadu(in_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp22 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(8));
                    auto tmp23 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp26 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp32 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp40 = in_ptr10[static_cast<int64_t>(0L)];
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp5 = static_cast<float>(0.0);
                    auto tmp6 = tmp4 > tmp5;
                    auto tmp8 = static_cast<float>(0.5);
                    auto tmp9 = tmp7 < tmp8;
                    auto tmp12 = tmp11.neg();
                    auto tmp13 = at::vec::VecMask<float,1>::from(tmp9);
                    auto tmp14 = decltype(tmp10)::blendv(tmp12, tmp10, tmp13.template cast<float,1>());
                    auto tmp15 = tmp12 - tmp10;
                    auto tmp16 = static_cast<float>(1.0);
                    auto tmp17 = float(tmp7 - tmp16);
                    auto tmp18 = tmp9 ? tmp7 : tmp17;
                    auto tmp19 = at::vec::Vectorized<float>(tmp18);
                    auto tmp20 = tmp15 * tmp19;
                    auto tmp21 = tmp14 + tmp20;
                    auto tmp24 = at::vec::Vectorized<float>(tmp23);
                    auto tmp25 = tmp22 * tmp24;
                    auto tmp27 = at::vec::Vectorized<float>(tmp26);
                    auto tmp28 = tmp12 * tmp27;
                    auto tmp29 = tmp28 * tmp12;
                    auto tmp30 = tmp25 + tmp29;
                    auto tmp31 = tmp30.sqrt();
                    auto tmp33 = at::vec::Vectorized<float>(tmp32);
                    auto tmp34 = tmp31 + tmp33;
                    auto tmp35 = tmp21 / tmp34;
                    auto tmp36 = at::vec::Vectorized<float>(tmp4);
                    auto tmp37 = tmp35 * tmp36;
                    auto tmp38 = at::vec::VecMask<float,1>::from(tmp6);
                    auto tmp39 = decltype(tmp37)::blendv(tmp21, tmp37, tmp38.template cast<float,1>());
                    auto tmp41 = at::vec::Vectorized<float>(tmp40);
                    auto tmp42 = tmp39 * tmp41;
                    auto tmp43 = tmp3 - tmp42;
                    tmp43.store(out_ptr3 + static_cast<int64_t>(x0));
                    tmp21.store(out_ptr4 + static_cast<int64_t>(x0));
                    tmp30.store(out_ptr5 + static_cast<int64_t>(x0));
                }
                if(C10_UNLIKELY(x0 >= static_cast<int64_t>(8L*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))) && x0 < static_cast<int64_t>(ks0)))
                {
                    auto tmp0 = at::vec::Vectorized<float>::loadu(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp1 = in_ptr1[static_cast<int64_t>(0L)];
                    auto tmp4 = in_ptr2[static_cast<int64_t>(0L)];
                    auto tmp7 = in_ptr3[static_cast<int64_t>(0L)];
                    auto tmp10 = at::vec::Vectorized<float>::loadu(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp11 = at::vec::Vectorized<float>::loadu(in_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp22 = at::vec::Vectorized<float>::loadu(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    auto tmp23 = in_ptr7[static_cast<int64_t>(0L)];
                    auto tmp26 = in_ptr8[static_cast<int64_t>(0L)];
                    auto tmp32 = in_ptr9[static_cast<int64_t>(0L)];
                    auto tmp40 = in_ptr10[static_cast<int64_t>(0L)];
                    auto tmp2 = at::vec::Vectorized<float>(tmp1);
                    auto tmp3 = tmp0 * tmp2;
                    auto tmp5 = static_cast<float>(0.0);
                    auto tmp6 = tmp4 > tmp5;
                    auto tmp8 = static_cast<float>(0.5);
                    auto tmp9 = tmp7 < tmp8;
                    auto tmp12 = tmp11.neg();
                    auto tmp13 = at::vec::VecMask<float,1>::from(tmp9);
                    auto tmp14 = decltype(tmp10)::blendv(tmp12, tmp10, tmp13.template cast<float,1>());
                    auto tmp15 = tmp12 - tmp10;
                    auto tmp16 = static_cast<float>(1.0);
                    auto tmp17 = float(tmp7 - tmp16);
                    auto tmp18 = tmp9 ? tmp7 : tmp17;
                    auto tmp19 = at::vec::Vectorized<float>(tmp18);
                    auto tmp20 = tmp15 * tmp19;
                    auto tmp21 = tmp14 + tmp20;
                    auto tmp24 = at::vec::Vectorized<float>(tmp23);
                    auto tmp25 = tmp22 * tmp24;
                    auto tmp27 = at::vec::Vectorized<float>(tmp26);
                    auto tmp28 = tmp12 * tmp27;
                    auto tmp29 = tmp28 * tmp12;
                    auto tmp30 = tmp25 + tmp29;
                    auto tmp31 = tmp30.sqrt();
                    auto tmp33 = at::vec::Vectorized<float>(tmp32);
                    auto tmp34 = tmp31 + tmp33;
                    auto tmp35 = tmp21 / tmp34;
                    auto tmp36 = at::vec::Vectorized<float>(tmp4);
                    auto tmp37 = tmp35 * tmp36;
                    auto tmp38 = at::vec::VecMask<float,1>::from(tmp6);
                    auto tmp39 = decltype(tmp37)::blendv(tmp21, tmp37, tmp38.template cast<float,1>());
                    auto tmp41 = at::vec::Vectorized<float>(tmp40);
                    auto tmp42 = tmp39 * tmp41;
                    auto tmp43 = tmp3 - tmp42;
                    tmp43.store(out_ptr3 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp21.store(out_ptr4 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
                    tmp30.store(out_ptr5 + static_cast<int64_t>(x0), static_cast<int64_t>(ks0 + (-8L)*(c10::div_floor_integer(static_cast<int64_t>(ks0), static_cast<int64_t>(8L)))));
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
      kernel(Address{table[t * 4 + 0], o * 4}, &k[0], &k[5], &k[1], Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 1], o * 4}, Address{table[t * 4 + 3], o * 4}, &k[2], &k[3], &k[6], &k[4], Address{table[t * 4 + 0], o * 4}, Address{table[t * 4 + 2], o * 4}, Address{table[t * 4 + 3], o * 4}, n);
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
