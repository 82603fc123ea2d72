// One function for each PTX instruction that the kernels use, and no other asm: tests/packaging/cuda_on_cpu.py reads
// the instruction and its operands from here and runs them. Names, fragments and restrictions are those of NVIDIA's PTX
// ISA.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

extern __shared__ uint4 shared_memory[];

namespace minisora {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// threadIdx.x, read anew: what follows from it is computed where it is used, and takes no register until then.
__device__ inline int thread_now() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// ---- shared memory, by the 32-bit addresses of its own space

using Shared = uint32_t;

__device__ inline Shared shared_begin() { return static_cast<Shared>(__cvta_generic_to_shared(shared_memory)); }

__device__ inline uint32_t load_word(Shared at) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}

__device__ inline void store_word(Shared at, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(at), "r"(word) : "memory");
}

__device__ inline float load_float(Shared at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}

__device__ inline void store_float(Shared at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" : : "r"(at), "f"(value) : "memory");
}

__device__ inline float2 load_float2(Shared at) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(at) : "memory");
  return pair;
}

__device__ inline uint4 load_words(Shared at) {
  uint4 four;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "r"(at)
               : "memory");
  return four;
}

// ---- copies from global to shared memory that the thread does not wait for

// 16 bytes, of which the first `bytes` are read and the rest is zero.
__device__ inline void copy_later(Shared to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until at most N of this thread's latest groups of copies are not done.
template <int N>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

// ---- matrices of 8 x 8 numbers of 16 bits

// Thread t of each quad g gets numbers 2t and 2t + 1 of row g of each matrix; lane i gives the address of row i % 8 of
// matrix i / 8. Transposed, it gets them of column g.
template <bool TRANSPOSED>
__device__ void load_matrices(Shared at, uint32_t (&to)[4]) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  }
}

// Two matrices; the addresses of lanes 16 to 31 are not used.
template <bool TRANSPOSED>
__device__ void load_matrices(Shared at, uint32_t (&to)[2]) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(at)
                 : "memory");
  }
}

// c += a b with a of 16 x 16 and b of 16 x 8 numbers of T, c of 16 x 8 fp32.
template <class T>
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same with a of 16 x 8 and b of 8 x 8.
template <class T>
__device__ void multiply(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// ---- pairs of numbers of T in a word, the first in the lower half

template <class T>
__device__ uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
}

template <class T>
__device__ void unpack(uint32_t word, float& first, float& second) {
  const auto number = [](uint32_t bits) {
    T value;
    value.x = static_cast<uint16_t>(bits);
    return static_cast<float>(value);
  };
  first = number(word & 0xffff);
  second = number(word >> 16);
}

// Whether one of the two is infinite or NaN.
template <class T>
__device__ bool not_finite(uint32_t word) {
  constexpr uint32_t exponent = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
  return (word & exponent) == exponent || (word >> 16 & exponent) == exponent;
}

} // namespace minisora
