// What gelu_mlp.cu uses of cuBLASLt, NVIDIA's library of matrix products with epilogues. Many toolkits come without its
// header, so the names and numbers stand here; tests/packaging/test_cuda_build.py compares them with the header where
// there is one.
//
// Nothing is linked. libtorch_cuda.so, which this library needs, needs cuBLASLt itself, and the loader looks for a
// symbol in all of what a library needs. The symbols are weak: beside a torch without the library they are null, and
// the rest of csrc/cuda loads as ever.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minisora::lt {

// Types of numbers, and in what products are summed.
constexpr int kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14, kSumFloat32 = 68;
constexpr int32_t kTransposed = 1;

// Attributes of an operation, with the types of their values.
constexpr int kTransposeA = 3; // int32_t
constexpr int kEpilogue = 7; // uint32_t
constexpr int kBiasPointer = 8, kAuxPointer = 11; // void*
constexpr int kAuxStep = 12; // int64_t: the leading dimension

// Attributes of a preference.
constexpr int kMostWorkspace = 1; // uint64_t
constexpr int kReductions = 3; // uint32_t: none of the bits allows no sums over blocks
constexpr int kAlignments[] = {5, 6, 7, 8}; // uint32_t: of A, B, C and D

// Epilogues. GELU is the tanh form. Aux: what GELU reads is written too; DGELU reads it, and the gradient of the bias
// is written where the bias would be read.
constexpr uint32_t kPlain = 1, kBias = 4, kGelu = 32, kAux = 128, kGeluGradient = 64 | kAux, kBiasGradient = 16;

struct Algorithm {
  uint64_t data[8];
};

struct Choice {
  Algorithm algorithm;
  size_t workspace; // bytes
  int status;
  float waves;
  int reserved[4];
};

} // namespace minisora::lt

extern "C" {
#define MINISORA_CUBLASLT __attribute__((weak)) int
MINISORA_CUBLASLT cublasLtMatmulDescCreate(void** operation, int sums, int scale);
MINISORA_CUBLASLT cublasLtMatmulDescDestroy(void* operation);
MINISORA_CUBLASLT cublasLtMatmulDescSetAttribute(void* operation, int attribute, const void* value, size_t bytes);
MINISORA_CUBLASLT cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t step);
MINISORA_CUBLASLT cublasLtMatrixLayoutDestroy(void* layout);
MINISORA_CUBLASLT cublasLtMatmulPreferenceCreate(void** preference);
MINISORA_CUBLASLT cublasLtMatmulPreferenceDestroy(void* preference);
MINISORA_CUBLASLT cublasLtMatmulPreferenceSetAttribute(
    void* preference, int attribute, const void* value, size_t bytes);
MINISORA_CUBLASLT cublasLtMatmulAlgoGetHeuristic(
    void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference, int asked,
    minisora::lt::Choice* choices, int* found);
MINISORA_CUBLASLT cublasLtMatmulAlgoCheck(
    void* handle, void* operation, void* a, void* b, void* c, void* d, const minisora::lt::Algorithm* algorithm,
    minisora::lt::Choice* result);
MINISORA_CUBLASLT cublasLtMatmul(
    void* handle, void* operation, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
    const void* beta, const void* c, void* c_layout, void* d, void* d_layout, const minisora::lt::Algorithm* algorithm,
    void* workspace, size_t workspace_bytes, void* stream);
#undef MINISORA_CUBLASLT
}
