// Shared by every CPU kernel: argument checks at the boundary, fp32 vectors over any float dtype, loops over columns.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../check.h"

namespace minisora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Vec = at::vec::Vectorized<float>;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int64_t V = Vec::size();

inline int64_t whole(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
inline int64_t whole_vectors(int64_t size) { return whole(size, V); }

// Marks the lambdas that for_columns takes. Otherwise the compiler calls some of them, at several times the cost.
#define MINISORA_INLINE __attribute__((always_inline))

// ---- checks

inline void check_dtype(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
}

// A dense tensor of one of the three dtypes; the kernels index it without strides.
inline void check_dense(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check_dtype(tensor, name);
  check_shape(tensor, name, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_statistic(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check_dense(tensor, name, shape);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// Asks for huge pages under a large tensor before its first write. Most distributions leave that choice to the program
// ("madvise"). Without it a fresh tensor costs one page fault per 4 KiB, which takes several times as long as a kernel.
// Memory that has its pages already does not change.
inline Tensor with_huge_pages(Tensor tensor) {
#if defined(__linux__)
  constexpr int64_t page = int64_t{2} << 20;
  const int64_t bytes = tensor.numel() * (tensor.scalar_type() == ScalarType::Float ? 4 : 2);
  if (bytes >= 2 * page) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // a hint: the system may ignore it
  }
#endif
  return tensor;
}

// Dense, on the device of `like`. torch::stable::new_empty goes through the dispatcher by the op's name, which takes
// longer than a small kernel.
inline Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    strides[dim] = step;
    step *= std::max<int64_t>(shape[dim], 1);
  }
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, index, &made));
  return with_huge_pages(Tensor(made));
}

// The tensor of a gradient that is asked for by its dtype; else one without elements.
inline Tensor empty_if_asked(
    const Tensor& like, const std::vector<int64_t>& shape, const std::optional<ScalarType>& dtype) {
  return dtype ? empty_like_shape(like, shape, *dtype) : empty_like_shape(like, {0}, like.scalar_type());
}

// The data of such a tensor, or null.
template <class T>
inline T* data_if(bool asked, Tensor& tensor) {
  return asked ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// ---- dtypes

template <class F>
inline void with_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "the CPU kernels take float32, bfloat16 and float16");
  }
}

// f(tag of a, tag of b). Each pair that is compiled takes seconds, so there is none of the two 16-bit dtypes: an op
// whose call has both makes one of them float32 before, which changes no value.
template <class F>
inline void with_types(ScalarType a, ScalarType b, F&& f) {
  with_type(a, [&](auto a_tag) {
    with_type(b, [&](auto b_tag) {
      using A = decltype(a_tag);
      using B = decltype(b_tag);
      if constexpr (std::is_same_v<A, B> || std::is_same_v<A, float> || std::is_same_v<B, float>) {
        f(a_tag, b_tag);
      } else {
        STD_TORCH_CHECK(false, "the CPU kernels take no bfloat16 beside float16");
      }
    });
  });
}

// The same for tokens x and a result y of a norm, which is of x's dtype or of autocast's.
template <class F>
inline void with_result(ScalarType x, ScalarType y, F&& f) {
  with_types(x, y, [&](auto x_tag, auto y_tag) {
    if constexpr (std::is_same_v<decltype(x_tag), decltype(y_tag)> || std::is_same_v<decltype(x_tag), float>) {
      f(x_tag, y_tag);
    } else {
      STD_TORCH_CHECK(false, "the CPU kernels make no float32 of 16-bit tokens");
    }
  });
}

// The number of columns of a step: a constant in the body of a row, a variable in its tail.
using Full = std::integral_constant<int64_t, V>;

inline Vec load(const float* p, Full) { return Vec::loadu(p); }
inline void store(float* p, Vec value, Full) { value.store(p); }

// The 16-bit halves of a Vec, and its own register type.
#if defined(CPU_CAPABILITY_AVX512)
using Wide = __m512;
using Narrow = __m256i;
inline Narrow load_narrow(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_narrow(void* p, Narrow value) { _mm256_storeu_si256(static_cast<__m256i*>(p), value); }
#else
using Wide = __m256;
using Narrow = __m128i;
inline Narrow load_narrow(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_narrow(void* p, Narrow value) { _mm_storeu_si128(static_cast<__m128i*>(p), value); }
#endif

inline Vec widen(Narrow bits, BFloat16) {
  Wide value;
  at::vec::cvtbf16_fp32(bits, value);
  return value;
}

inline Vec widen(Narrow bits, Half) {
  Wide value;
  at::vec::cvtfp16_fp32(bits, value);
  return value;
}

inline Vec load(const BFloat16* p, Full) { return widen(load_narrow(p), BFloat16{}); }
inline Vec load(const Half* p, Full) { return widen(load_narrow(p), Half{}); }

inline Narrow narrow(Vec value, BFloat16) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Narrow>(_mm512_cvtneps_pbh(value));
#else
  return at::vec::cvtfp32_bf16(value);
#endif
}
#if defined(__AVX512BF16__)
inline __m512i narrow(Vec low, Vec high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }
#endif
inline Narrow narrow(Vec value, Half) { return at::vec::cvtfp32_fp16(value); }

inline void store(BFloat16* p, Vec value, Full) { store_narrow(p, narrow(value, BFloat16{})); }
inline void store(Half* p, Vec value, Full) { store_narrow(p, narrow(value, Half{})); }

// The value after a store to T rounds it.
template <class T>
inline Vec round_to(Vec value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return widen(narrow(value, T{}), T{});
  }
}

// The same for the tail of a row. A load sets lanes past `count` to zero; a store leaves them out.
#if defined(CPU_CAPABILITY_AVX512)
inline __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vec load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
inline void store(float* p, Vec value, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), value); }

template <class T>
inline Vec load(const T* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(lanes(count), p), T{});
}

template <class T>
inline void store(T* p, Vec value, int64_t count) {
  _mm256_mask_storeu_epi16(p, lanes(count), narrow(value, T{}));
}

inline Vec first_lanes(Vec value, int64_t count) { return _mm512_maskz_mov_ps(lanes(count), value); }
#else
template <class T>
inline Vec load(const T* p, int64_t count) {
  T lanes[V];
  std::fill(lanes, lanes + V, T(0.0f));
  std::copy(p, p + count, lanes);
  return load(lanes, Full{});
}

template <class T>
inline void store(T* p, Vec value, int64_t count) {
  T lanes[V];
  store(lanes, value, Full{});
  std::copy(lanes, lanes + count, p);
}

inline Vec first_lanes(Vec value, int64_t count) { return Vec::set(Vec(0.0f), value, count); }
#endif
inline Vec first_lanes(Vec value, Full) { return value; }

// Stores past the caches, for results that are too large to stay there until somebody reads them. A plain store would
// first read the line that it overwrites.
#if defined(CPU_CAPABILITY_AVX512)
inline void stream(float* p, Vec value) { _mm512_stream_ps(p, value); }
inline void stream_bits(void* p, Narrow bits) { _mm256_stream_si256(static_cast<Narrow*>(p), bits); }
#else
inline void stream(float* p, Vec value) { _mm256_stream_ps(p, value); }
inline void stream_bits(void* p, Narrow bits) { _mm_stream_si128(static_cast<Narrow*>(p), bits); }
#endif
template <class T>
inline void stream(T* p, Vec value) {
  stream_bits(p, narrow(value, T{}));
}

constexpr int64_t kStreamed = int64_t{8} << 20; // bytes; about a core's share of the caches

// Whether to store rows of `width` numbers at `out` past the caches: all of them together are large, and each is
// aligned.
template <class T>
inline bool past_caches(const T* out, int64_t size, int64_t width) {
  const bool large = size * static_cast<int64_t>(sizeof(T)) >= kStreamed;
  return large && width % (2 * V) == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

struct Stored {
  template <class T, class N>
  static void put(T* p, Vec value, N count) {
    store(p, value, count);
  }
#if defined(__AVX512BF16__)
  static void put(BFloat16* p, Vec low, Vec high) { _mm512_storeu_si512(p, narrow(low, high)); }
#endif
  template <class T>
  static void copy(const T* from, T* to, int64_t size) {
    std::copy_n(from, size, to);
  }
};

struct Streamed {
  template <class T, class N>
  static void put(T* p, Vec value, N) {
    stream(p, value);
  }
#if defined(__AVX512BF16__)
  static void put(BFloat16* p, Vec low, Vec high) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(low, high));
  }
#endif
  template <class T>
  static void copy(const T* from, T* to, int64_t size) {
    constexpr int64_t step = sizeof(Narrow) / sizeof(T);
    for (int64_t i = 0; i < size; i += step) stream_bits(to + i, load_narrow(from + i));
  }
};

// f(how): how.put(p, value, count) stores, past the caches or not. A thread ends with _mm_sfence().
template <class F>
inline void with_put(bool past_caches, F&& f) {
  past_caches ? f(Streamed{}) : f(Stored{});
}

// Swaps lanes 2i and 2i + 1.
inline Vec swap_pairs(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permute_ps(x, 0xb1);
#else
  return _mm256_permute_ps(x, 0xb1);
#endif
}

inline float sum_lanes(Vec value) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, value);
}

// f(column, count), or f(column, count, u) for a reduction. u cycles through 0..3: with four independent sums the
// latency of one addition is not the limit.
template <class F>
MINISORA_INLINE inline void for_columns(int64_t width, F&& f) {
  int64_t i = 0;
  if constexpr (std::is_invocable_v<F, int64_t, Full>) {
    for (; i + V <= width; i += V) f(i, Full{});
    if (i < width) f(i, width - i);
  } else {
    for (; i + 4 * V <= width; i += 4 * V) {
      f(i, Full{}, std::integral_constant<int, 0>{});
      f(i + V, Full{}, std::integral_constant<int, 1>{});
      f(i + 2 * V, Full{}, std::integral_constant<int, 2>{});
      f(i + 3 * V, Full{}, std::integral_constant<int, 3>{});
    }
    for (; i + V <= width; i += V) f(i, Full{}, std::integral_constant<int, 0>{});
    if (i < width) f(i, width - i, std::integral_constant<int, 1>{});
  }
}

template <class T, class S>
inline void copy_row(const T* in, S* out, int64_t width) {
  if constexpr (std::is_same_v<T, S>) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) std::memcpy(out + i, in + i, 16 * sizeof(T));
    for (; i < width; ++i) out[i] = in[i];
  } else {
    for_columns(width, [&](int64_t i, auto count) MINISORA_INLINE { store(out + i, load(in + i, count), count); });
  }
}

struct Sum {
  Vec part[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  float total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

} // namespace minisora
