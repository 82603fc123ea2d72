// A stand-in for cuBLASLt on a CPU, written from NVIDIA's documentation of its types and functions: what gelu_mlp.cu
// calls of it, on host memory. It throws std::runtime_error where a call is not as the documentation asks.
//
// It declares everything anew, with numbers of its own: the two sides must agree on them. Its algorithms differ in
// bits, so that a result tells which one was taken: the first sums in fp32; the second, which is the choice for GELU
// without an aux matrix, rounds a sum half way; the third, where sums may be split over blocks, at another place in
// every call.
//
// What a test plants, by environment variables: CUBLASLT_ON_CPU_FORGETS, an attribute of an operation (or of a
// preference, plus 100) that is not set; _STEP, numbers that are added to each leading dimension; _WORKSPACE, bytes
// that the workspace lacks; _REFUSES, a check that takes no algorithm.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kSuccess = 0, kInvalid = 7, kUnsupported = 15;
constexpr size_t kNeeded = 1000; // bytes of workspace that every algorithm asks for

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("cuBLASLt: " + what); }

void require(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

long setting(const char* name, long otherwise) {
  const char* value = std::getenv((std::string("CUBLASLT_ON_CPU_") + name).c_str());
  return value == nullptr ? otherwise : std::atol(value);
}

// Attributes of a descriptor by number, as the bytes that were set.
struct Attributes {
  std::map<int, std::vector<char>> values;

  void set(int attribute, const void* value, size_t bytes, const std::map<int, size_t>& sizes, int forgotten) {
    require(value != nullptr, "an attribute without a value");
    const auto found = sizes.find(attribute);
    require(found != sizes.end(), "an attribute that is not known here: " + std::to_string(attribute));
    require(found->second == bytes, "attribute " + std::to_string(attribute) + " of another size");
    const char* begin = static_cast<const char*>(value);
    if (attribute != forgotten) values[attribute].assign(begin, begin + bytes);
  }

  template <class T>
  T get(int attribute, T otherwise) const {
    const auto found = values.find(attribute);
    if (found == values.end()) return otherwise;
    T value;
    std::memcpy(&value, found->second.data(), sizeof(T));
    return value;
  }
};

struct Operation : Attributes {
  bool transposed_a() const { return get<int32_t>(3, 0) != 0; }
  bool transposed_b() const { return get<int32_t>(4, 0) != 0; }
  uint32_t epilogue() const { return get<uint32_t>(7, 1); }
  void* bias() const { return get<void*>(8, nullptr); }
  void* aux() const { return get<void*>(11, nullptr); }
  int64_t aux_step() const { return get<int64_t>(12, 0); }
};

struct Layout {
  int type; // 2: float16, 14: bfloat16
  uint64_t rows, columns;
  int64_t step;
};

std::set<void*> alive; // descriptors that were made and not destroyed

template <class T>
T& of(void* descriptor) {
  require(alive.count(descriptor) == 1, "a descriptor that was not made, or was destroyed");
  return *static_cast<T*>(descriptor);
}

template <class T>
int make(void** descriptor, T* made) {
  require(alive.size() < 16, "descriptors that are not destroyed");
  alive.insert(*descriptor = made);
  return kSuccess;
}

template <class T>
int destroy(void* descriptor) {
  T& made = of<T>(descriptor);
  alive.erase(descriptor);
  delete &made;
  return kSuccess;
}

float read(const void* data, int type, int64_t at) {
  return type == 14 ? static_cast<float>(static_cast<const BFloat16*>(data)[at])
                    : static_cast<float>(static_cast<const Half*>(data)[at]);
}

void write(void* data, int type, int64_t at, float value) {
  if (type == 14) {
    static_cast<BFloat16*>(data)[at] = static_cast<BFloat16>(value);
  } else {
    static_cast<Half*>(data)[at] = static_cast<Half>(value);
  }
}

float round_to(int type, float value) {
  return type == 14 ? static_cast<float>(static_cast<BFloat16>(value)) : static_cast<float>(static_cast<Half>(value));
}

float tanh_of(float x) { return std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)); }

float gelu(float x) { return 0.5f * x * (1.0f + tanh_of(x)); }

float gelu_slope(float x) {
  const float t = tanh_of(x);
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3 * 0.044715f * x * x);
}

bool has_bias(uint32_t epilogue) { return (epilogue & (4 | 16)) != 0; }
bool has_aux(uint32_t epilogue) { return (epilogue & 128) != 0; }

// What an algorithm was chosen for: it is good for this only.
struct Algorithm {
  int32_t id, m, n, k;
  uint32_t epilogue, transposed;
  uint32_t alignments[6]; // of A, B, C, D, bias and aux, as bytes
  int32_t type, unused[3];
};
static_assert(sizeof(Algorithm) == 64);

struct Choice {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

uint32_t alignment_of(const void* address) {
  const auto number = reinterpret_cast<uintptr_t>(address);
  return number == 0 ? 0 : static_cast<uint32_t>(number & -number & 0xfff);
}

// Sizes of a product whose descriptors agree, and its algorithm but for the alignments.
Algorithm agreed(const Operation& operation, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const bool ta = operation.transposed_a(), tb = operation.transposed_b();
  const uint64_t m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns;
  const uint64_t n = tb ? b.rows : b.columns, kb = tb ? b.columns : b.rows;
  require(k == kb && d.rows == m && d.columns == n, "the sizes of A, B and D do not agree");
  require(c.rows == m && c.columns == n && c.type == d.type, "C is of another size or type than D");
  require(a.type == d.type && b.type == d.type, "A, B and D are of different types");
  require(d.type == 2 || d.type == 14, "a type that is not emulated");
  for (const Layout& each : {a, b, c, d}) {
    require(each.step >= static_cast<int64_t>(each.rows), "a leading dimension is less than the rows");
    require(each.step % 8 == 0, "a leading dimension is no multiple of 16 bytes");
  }
  const uint32_t epilogue = operation.epilogue();
  const std::set<uint32_t> known = {1, 4, 32, 36, 160, 164, 192, 208};
  require(known.count(epilogue) == 1, "an epilogue that is not emulated: " + std::to_string(epilogue));
  if (has_bias(epilogue)) require(operation.bias() != nullptr, "an epilogue with a bias and no address of it");
  if (has_aux(epilogue)) {
    require(operation.aux() != nullptr, "an epilogue with an aux matrix and no address of it");
    require(operation.aux_step() % 8 == 0, "the leading dimension of the aux matrix is no multiple of 8");
    require(operation.aux_step() >= static_cast<int64_t>(m), "the leading dimension of the aux matrix is too small");
  }
  Algorithm result = {};
  result.m = static_cast<int32_t>(m);
  result.n = static_cast<int32_t>(n);
  result.k = static_cast<int32_t>(k);
  result.epilogue = epilogue;
  result.transposed = (ta ? 1u : 0u) | (tb ? 2u : 0u);
  result.type = d.type;
  return result;
}

void check_address(const void* address, uint32_t alignment, const std::string& name) {
  require(address != nullptr && alignment != 0, name + " has no address");
  require(reinterpret_cast<uintptr_t>(address) % alignment == 0, name + " is less aligned than was promised");
}

// Whether [rows, columns] with this step lie in memory that may be used.
void check_memory(void* data, uint64_t rows, uint64_t columns, int64_t step, const std::string& name) {
  for (uint64_t column = 0; column < columns; ++column) {
    char* begin = static_cast<char*>(data) + 2 * column * step;
    require(__asan_region_is_poisoned(begin, 2 * rows) == nullptr, name + " reaches outside a tensor");
  }
}

} // namespace

extern "C" {

int cublasLtMatmulDescCreate(void** operation, int sums, int scale) {
  require(sums == 68 && scale == 0, "sums or scales that are not fp32");
  return make(operation, new Operation());
}

int cublasLtMatmulDescDestroy(void* operation) { return destroy<Operation>(operation); }

int cublasLtMatmulDescSetAttribute(void* operation, int attribute, const void* value, size_t bytes) {
  const std::map<int, size_t> sizes = {{3, 4}, {4, 4}, {7, 4}, {8, 8}, {11, 8}, {12, 8}};
  of<Operation>(operation).set(attribute, value, bytes, sizes, static_cast<int>(setting("FORGETS", -1)));
  return kSuccess;
}

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t step) {
  return make(layout, new Layout{type, rows, columns, step + setting("STEP", 0)});
}

int cublasLtMatrixLayoutDestroy(void* layout) { return destroy<Layout>(layout); }

int cublasLtMatmulPreferenceCreate(void** preference) { return make(preference, new Attributes()); }

int cublasLtMatmulPreferenceDestroy(void* preference) { return destroy<Attributes>(preference); }

int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
  const std::map<int, size_t> sizes = {{1, 8}, {3, 4}, {5, 4}, {6, 4}, {7, 4}, {8, 4}};
  of<Attributes>(preference).set(attribute, value, bytes, sizes, static_cast<int>(setting("FORGETS", -1)) - 100);
  return kSuccess;
}

int cublasLtMatmulAlgoGetHeuristic(
    void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference, int asked, Choice* choices,
    int* found) {
  require(handle != nullptr && asked >= 1 && choices != nullptr && found != nullptr, "a choice without arguments");
  const Operation& made = of<Operation>(operation);
  const Attributes& preferred = of<Attributes>(preference);
  Algorithm result = agreed(made, of<Layout>(a), of<Layout>(b), of<Layout>(c), of<Layout>(d));
  *found = 0;
  if (preferred.get<uint64_t>(1, 0) < kNeeded) return kUnsupported;
  result.id = preferred.get<uint32_t>(3, 7) != 0 ? 3 : (result.epilogue & ~4u) == 32 ? 2 : 1;
  for (int i = 0; i < 4; ++i) result.alignments[i] = preferred.get<uint32_t>(5 + i, 256);
  if (has_bias(result.epilogue)) result.alignments[4] = alignment_of(made.bias());
  if (has_aux(result.epilogue)) result.alignments[5] = alignment_of(made.aux());
  choices[0] = {result, kNeeded, kSuccess, 1.0f, {}};
  *found = 1;
  return kSuccess;
}

int cublasLtMatmulAlgoCheck(
    void* handle, void* operation, void* a, void* b, void* c, void* d, const Algorithm* algorithm, Choice* result) {
  require(handle != nullptr && algorithm != nullptr && result != nullptr, "a check without arguments");
  if (setting("REFUSES", 0) != 0) return kUnsupported;
  const Algorithm here = agreed(of<Operation>(operation), of<Layout>(a), of<Layout>(b), of<Layout>(c), of<Layout>(d));
  const bool same = here.m == algorithm->m && here.n == algorithm->n && here.k == algorithm->k &&
                    here.type == algorithm->type && here.transposed == algorithm->transposed;
  if (!same || (here.epilogue & ~128u) != (algorithm->epilogue & ~128u)) return kInvalid;
  *result = {*algorithm, kNeeded, kSuccess, 1.0f, {}};
  return kSuccess;
}

int cublasLtMatmul(
    void* handle, void* operation, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
    const void* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* algorithm,
    void* workspace, size_t workspace_bytes, void* stream) {
  require(handle != nullptr && algorithm != nullptr, "a product without arguments");
  require(alpha != nullptr && *static_cast<const float*>(alpha) == 1.0f, "an alpha that is not emulated");
  require(beta != nullptr && *static_cast<const float*>(beta) == 0.0f, "a beta that is not emulated");
  const Operation& made = of<Operation>(operation);
  const Layout &la = of<Layout>(a_layout), &lb = of<Layout>(b_layout), &ld = of<Layout>(d_layout);
  const Algorithm here = agreed(made, la, lb, of<Layout>(c_layout), ld);
  require((here.epilogue & ~128u) == (algorithm->epilogue & ~128u), "an algorithm for another epilogue");
  require(here.m == algorithm->m && here.n == algorithm->n && here.k == algorithm->k, "an algorithm for other sizes");
  require(here.transposed == algorithm->transposed && here.type == algorithm->type, "an algorithm for other matrices");
  const void* addresses[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) check_address(addresses[i], algorithm->alignments[i], std::string(1, "ABCD"[i]));
  const uint32_t epilogue = here.epilogue;
  if (has_bias(epilogue)) check_address(made.bias(), algorithm->alignments[4], "the bias");
  if (has_aux(epilogue)) check_address(made.aux(), algorithm->alignments[5], "the aux matrix");

  require(workspace_bytes - setting("WORKSPACE", 0) >= kNeeded, "the workspace is too small");
  check_address(workspace, 256, "the workspace");
  std::memset(workspace, 0xff, kNeeded);
  check_memory(const_cast<void*>(a), la.rows, la.columns, la.step, "A");
  check_memory(const_cast<void*>(b), lb.rows, lb.columns, lb.step, "B");
  check_memory(d, ld.rows, ld.columns, ld.step, "D");
  if (has_bias(epilogue)) check_memory(made.bias(), here.m, 1, here.m, "the bias");
  if (has_aux(epilogue)) check_memory(made.aux(), here.m, here.n, made.aux_step(), "the aux matrix");

  static int calls = 0;
  const int rounded = algorithm->id == 1 ? -1 : algorithm->id == 2 ? here.k / 2 : ++calls * 3 % here.k;
  std::vector<float> sums(here.m);
  for (int64_t column = 0; column < here.n; ++column) {
    for (int64_t row = 0; row < here.m; ++row) {
      float value = 0.0f;
      for (int64_t k = 0; k < here.k; ++k) {
        const float left = read(a, la.type, made.transposed_a() ? k + row * la.step : row + k * la.step);
        const float right = read(b, lb.type, made.transposed_b() ? column + k * lb.step : k + column * lb.step);
        value += left * right;
        if (k == rounded) value = round_to(ld.type, value);
      }
      if ((epilogue & 4) != 0) value += read(made.bias(), ld.type, row);
      const int64_t at = row + column * made.aux_step();
      if ((epilogue & 32) != 0) {
        if (has_aux(epilogue)) write(made.aux(), ld.type, at, value);
        value = gelu(value);
      } else if ((epilogue & 64) != 0) {
        value *= gelu_slope(read(made.aux(), ld.type, at));
      }
      sums[row] += value;
      write(d, ld.type, row + column * ld.step, value);
    }
  }
  for (int64_t row = 0; (epilogue & 16) != 0 && row < here.m; ++row) write(made.bias(), ld.type, row, sums[row]);
  return kSuccess;
}

} // extern "C"
