// gelu_mlp, its products by cuBLASLt, which applies bias and GELU where it has the product in registers: equation in
// minisora_kernels/ops/gelu_mlp.py. There is no kernel of our own.
//
// cuBLASLt counts by columns: a tensor [rows, columns] of torch is a matrix of columns x rows to it, whose leading
// dimension is the number of columns. So y = x w^T is D = A^T B with A of w and B of x, and dx = dy w is D = A B. A
// bias has a number for each row of D, that is for each column of torch's tensor.
//
// The algorithm follows from the shapes, the dtype and the GPU alone: it is asked for with addresses that are multiples
// of 16 bytes and no more, whatever the tensors have, and without sums that are split over blocks.
// tests/packaging/test_cuda_build.py runs this file on a CPU, before a stand-in for cuBLASLt.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "cublaslt.h"
#include "tensors.h"

namespace minisora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr uintptr_t kAlignment = 16; // bytes, of every tensor
constexpr uintptr_t kWorkspaceAlignment = 256;
constexpr uint64_t kMostWorkspace = 32 << 20; // bytes

void check_status(int status, const char* call) {
  STD_TORCH_CHECK(status == 0, "gelu_mlp: ", call, " of cuBLASLt failed with status ", status);
}

// A descriptor, which is destroyed with this.
using Owned = std::unique_ptr<void, int (*)(void*)>;

Owned layout(ScalarType dtype, int64_t rows, int64_t columns) {
  void* made = nullptr;
  const int type = dtype == ScalarType::BFloat16 ? lt::kBFloat16 : lt::kFloat16;
  check_status(cublasLtMatrixLayoutCreate(&made, type, rows, columns, rows), "cublasLtMatrixLayoutCreate");
  return {made, cublasLtMatrixLayoutDestroy};
}

Owned preference() {
  void* made = nullptr;
  check_status(cublasLtMatmulPreferenceCreate(&made), "cublasLtMatmulPreferenceCreate");
  Owned result{made, cublasLtMatmulPreferenceDestroy};
  const auto set = [&](int attribute, const auto value) {
    check_status(
        cublasLtMatmulPreferenceSetAttribute(made, attribute, &value, sizeof(value)),
        "cublasLtMatmulPreferenceSetAttribute");
  };
  set(lt::kMostWorkspace, kMostWorkspace);
  set(lt::kReductions, uint32_t{0});
  for (const int attribute : lt::kAlignments) set(attribute, static_cast<uint32_t>(kAlignment));
  return result;
}

struct Product {
  const Tensor& tokens; // [count, k]
  const Tensor& weight; // [m, k], or [k, m] where not transposed
  bool transposed;
  Tensor& out; // [count, m]
  uint32_t epilogue;
  void* bias; // [m], if the epilogue has one
  void* aux; // [count, m]; null for GELU whose input nobody needs
};

void run(const Product& product) {
  STD_TORCH_CHECK(
      cublasLtMatmul != nullptr,
      "gelu_mlp: this build of torch has no cuBLASLt that other libraries can call; take another backend for this op");
  const ScalarType dtype = product.out.scalar_type();
  const int64_t count = product.out.size(0), m = product.out.size(1), k = product.tokens.size(1);

  void* operation = nullptr;
  check_status(cublasLtMatmulDescCreate(&operation, lt::kSumFloat32, lt::kFloat32), "cublasLtMatmulDescCreate");
  const Owned owned(operation, cublasLtMatmulDescDestroy);
  const auto set = [&](int attribute, const auto value) {
    check_status(
        cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  };
  const bool has_bias = (product.epilogue & (lt::kBias | lt::kBiasGradient)) != 0;
  const bool has_aux = (product.epilogue & lt::kAux) != 0;
  const auto set_pointers = [&](void* bias, void* aux) {
    if (has_bias) set(lt::kBiasPointer, bias);
    if (has_aux) set(lt::kAuxPointer, aux);
  };
  if (product.transposed) set(lt::kTransposeA, lt::kTransposed);
  set(lt::kEpilogue, product.epilogue);
  if (has_aux) set(lt::kAuxStep, m);
  void* const any = reinterpret_cast<void*>(kAlignment); // the choice asks for the alignment of an address alone
  set_pointers(any, any);

  const Owned a = product.transposed ? layout(dtype, k, m) : layout(dtype, m, k);
  const Owned b = layout(dtype, k, count), d = layout(dtype, m, count), preferred = preference();
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle)); // stands for a handle of cuBLASLt too
  lt::Choice choice = {};
  int found = 0;
  check_status(
      cublasLtMatmulAlgoGetHeuristic(
          handle, operation, a.get(), b.get(), d.get(), d.get(), preferred.get(), 1, &choice, &found),
      "cublasLtMatmulAlgoGetHeuristic");
  STD_TORCH_CHECK(
      found == 1 && choice.status == 0, "gelu_mlp: cuBLASLt has no algorithm for a product of ", m, " x ", count, " x ",
      k, " with epilogue ", product.epilogue, "; take another backend for this op");

  // The same algorithm where the input of GELU is not kept, so that the bits are the same: a checkpoint's first forward
  // keeps nothing, the second one does. An algorithm that needs to write it writes it to nobody.
  void* aux = product.aux;
  std::optional<Tensor> spare;
  if (has_aux && aux == nullptr) {
    lt::Choice without = {};
    set(lt::kEpilogue, product.epilogue & ~lt::kAux);
    const int refused =
        cublasLtMatmulAlgoCheck(handle, operation, a.get(), b.get(), d.get(), d.get(), &choice.algorithm, &without);
    if (refused == 0) {
      choice.workspace = without.workspace;
    } else {
      set(lt::kEpilogue, product.epilogue);
      aux = spare.emplace(empty(product.out, {count, m}, dtype)).mutable_data_ptr();
    }
  }
  set_pointers(product.bias, aux);

  const auto bytes = static_cast<int64_t>(choice.workspace);
  const Tensor memory = empty(product.out, {bytes + static_cast<int64_t>(kWorkspaceAlignment)}, ScalarType::Byte);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + kWorkspaceAlignment - 1;
  void* const workspace = reinterpret_cast<void*>(begin / kWorkspaceAlignment * kWorkspaceAlignment);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(product.out.get_device_index(), &stream));
  const float one = 1.0f, zero = 0.0f;
  void* const out = product.out.mutable_data_ptr();
  check_status(
      cublasLtMatmul(
          handle, operation, &one, product.weight.const_data_ptr(), a.get(), product.tokens.const_data_ptr(), b.get(),
          &zero, out, d.get(), out, d.get(), &choice.algorithm, workspace, choice.workspace, stream),
      "cublasLtMatmul");
}

// ---- tensors

// A tensor as a product takes it.
Tensor ready(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& first) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(
      tensor.get_device_index() == first.get_device_index(), name, " must be on the device of the first tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), name, " must have the dtype of the first tensor");
  check_shape(tensor, name, shape);
  return aligned(torch::stable::contiguous(tensor));
}

void check_call(const Tensor& first, bool exact, std::initializer_list<int64_t> widths) {
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "cuBLASLt takes bfloat16 and float16");
  STD_TORCH_CHECK(!exact, "cuBLASLt has one form of GELU, which stands for the tanh form");
  for (const int64_t width : widths) {
    STD_TORCH_CHECK(width > 0 && width % 8 == 0, "widths must be multiples of 8, got ", width);
  }
}

// GELU of what the forward kept, by torch: cuBLASLt gives it in the forward alone.
Tensor gelu(const Tensor& h) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(h), torch::stable::detail::from(std::string("tanh"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- ops

std::tuple<Tensor, Tensor> gelu_mlp_fwd(
    const Tensor& x, const Tensor& w1, std::optional<Tensor> b1, const Tensor& w2, std::optional<Tensor> b2, bool exact,
    bool keep) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2, "x must be [..., D], w1 and w2 matrices");
  const int64_t width = x.size(x.dim() - 1), hidden = w1.size(0), out = w2.size(0);
  check_call(x, exact, {width, hidden, out});
  const int64_t count = x.numel() / width;
  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) shape.push_back(x.size(dim));
  shape.push_back(out);

  const Tensor tokens = ready(torch::stable::reshape(x, {count, width}), "x", {count, width}, x);
  const Tensor first = ready(w1, "w1", {hidden, width}, x), second = ready(w2, "w2", {out, hidden}, x);
  if (b1) b1 = ready(*b1, "b1", {hidden}, x);
  if (b2) b2 = ready(*b2, "b2", {out}, x);
  // y is no view of another tensor: a caller may write to it in place, where autograd refuses that of a view.
  const Tensor y = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  Tensor rows = torch::stable::view(y, {count, out}), a = empty(x, {count, hidden}, dtype);
  Tensor h = keep ? empty(x, {count, hidden}, dtype) : empty(x, {0, 0}, dtype);
  if (count > 0) {
    const auto data = [](const std::optional<Tensor>& bias) { return bias ? bias->mutable_data_ptr() : nullptr; };
    const uint32_t gelu = lt::kGelu | lt::kAux | (b1 ? lt::kBias : 0);
    run({tokens, first, true, a, gelu, data(b1), keep ? h.mutable_data_ptr() : nullptr});
    run({a, second, true, rows, b2 ? lt::kBias : lt::kPlain, data(b2), nullptr});
  }
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gelu_mlp_bwd(
    const Tensor& dy, const Tensor& h, std::optional<Tensor> w1, std::optional<Tensor> w2, bool exact, bool need_a,
    bool need_dh, bool need_b1) {
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  STD_TORCH_CHECK(dy.dim() == 2 && h.dim() == 2, "dy and h must be matrices");
  STD_TORCH_CHECK(w2 || (!w1 && !need_dh && !need_b1), "dx, dh and db1 need w2");
  const int64_t count = dy.size(0), out = dy.size(1), hidden = h.size(1);
  const ScalarType dtype = dy.scalar_type();
  check_call(dy, exact, {out, hidden});
  const Tensor kept = ready(h, "h", {count, hidden}, dy);
  const auto none = [&] { return empty(dy, {0}, dtype); };
  Tensor dx = none(), dh = none(), db1 = none();
  if (w2) {
    const Tensor upstream = ready(dy, "dy", {count, out}, dy), second = ready(*w2, "w2", {out, hidden}, dy);
    dh = empty(dy, {count, hidden}, dtype);
    if (need_b1) db1 = empty(dy, {hidden}, dtype);
    if (count > 0) {
      const uint32_t gradient = lt::kGeluGradient | (need_b1 ? lt::kBiasGradient : 0);
      run({upstream, second, false, dh, gradient, db1.mutable_data_ptr(), kept.mutable_data_ptr()});
    } else if (need_b1) {
      torch::stable::zero_(db1);
    }
  }
  if (w1) {
    const int64_t width = w1->size(1);
    check_call(dy, exact, {width});
    const Tensor first = ready(*w1, "w1", {hidden, width}, dy);
    dx = empty(dy, {count, width}, dtype);
    if (count > 0) run({dh, first, false, dx, lt::kPlain, nullptr, nullptr});
  }
  return {dx, need_a ? gelu(kept) : none(), need_dh ? dh : none(), db1};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CUDA, m) {
  m.impl("gelu_mlp_fwd", TORCH_BOX(&gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&gelu_mlp_bwd));
}

} // namespace minisora
