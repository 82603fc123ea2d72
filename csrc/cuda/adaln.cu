// adaln: equation and derivation in minisora_kernels/ops/adaln.py.
//
// The sizes chosen below are not measured. tests/packaging/test_cuda_build.py compiles this file, and runs it on a CPU
// with every CUDA thread emulated.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>

namespace minisora {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 384; // leaves each thread 168 registers; with vectors, holds tokens of D up to 6144
constexpr int kVector = 8; // neighbouring columns a thread takes at once: 16 bytes of a 16-bit dtype
constexpr int kSlots = 2; // vectors of a token that a thread keeps in registers; wider tokens are read again
constexpr int kSumLanes = 16;

// ---- columns in fp32

template <class T>
struct Type {
  using type = T;
};

template <int V, class T>
struct alignas(V == 1 ? sizeof(T) : 16) Pack {
  T values[V];
};

template <int V, class T>
__device__ void load(const T* in, float (&out)[V]) {
  const auto pack = *reinterpret_cast<const Pack<V, T>*>(in);
  for (int i = 0; i < V; ++i) out[i] = static_cast<float>(pack.values[i]);
}

template <int V, class T>
__device__ void store(T* out, const float (&in)[V]) {
  Pack<V, T> pack;
  for (int i = 0; i < V; ++i) pack.values[i] = static_cast<T>(in[i]);
  *reinterpret_cast<Pack<V, T>*>(out) = pack;
}

// An array of floats of type T, or of a type that is looked at when it is read, for T = void. That is cheap enough for
// the parameters, which are small beside the tokens, and for rare dtypes of the tokens.
struct Input {
  const void* data;
  ScalarType dtype;

  template <class T = void, int V>
  __device__ void read(int64_t at, float (&out)[V]) const {
    if constexpr (!std::is_void_v<T>) {
      load(static_cast<const T*>(data) + at, out);
    } else if (dtype == ScalarType::Float) {
      read<float>(at, out);
    } else if (dtype == ScalarType::BFloat16) {
      read<BFloat16>(at, out);
    } else {
      read<Half>(at, out);
    }
  }
};

// Without data for a gradient that is not asked for: nothing is written.
struct Output {
  void* data;
  ScalarType dtype;

  template <class T = void, int V>
  __device__ void write(int64_t at, const float (&in)[V]) const {
    if (data == nullptr) return;
    if constexpr (!std::is_void_v<T>) {
      store(static_cast<T*>(data) + at, in);
    } else if (dtype == ScalarType::Float) {
      write<float>(at, in);
    } else if (dtype == ScalarType::BFloat16) {
      write<BFloat16>(at, in);
    } else {
      write<Half>(at, in);
    }
  }
};

// ---- parameters

// A parameter; no data, and a constant, where it is not given.
struct Parameter {
  Input values;
  float absent;

  template <int V>
  __device__ void read(int64_t at, float (&out)[V]) const {
    if (values.data != nullptr) {
      values.read(at, out);
    } else {
      for (int i = 0; i < V; ++i) out[i] = absent;
    }
  }
};

// A modulation parameter [B, R, D] with any strides over B and R; the row of token n is n / (N / R).
struct Rows {
  Parameter values;
  int64_t batch_stride, row_stride, count, tokens_per_row;

  // Where the row of token n begins.
  __device__ int64_t row(int64_t b, int64_t n) const { return b * batch_stride + n / tokens_per_row * row_stride; }
};

struct Modulation {
  Rows shift, scale;
  Parameter weight, bias;

  // one_plus_scale, and gain = weight * one_plus_scale
  template <int V>
  __device__ void read_gain(int64_t scale_row, int column, float (&one_plus_scale)[V], float (&gain)[V]) const {
    scale.values.read(scale_row + column, one_plus_scale);
    weight.read(column, gain);
    for (int i = 0; i < V; ++i) {
      one_plus_scale[i] += 1.0f;
      gain[i] *= one_plus_scale[i];
    }
  }
};

// ---- groups of threads
//
// A group of blockDim.x threads, whole warps, works on one token. A block is several groups of one warp, or one group
// of several warps: where a group has to wait at a barrier, it is the whole block.

__device__ int64_t group_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ int64_t group_count() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

struct Pair {
  float first, second;
};

// The sum over the group, in an order that depends on the shape alone; every thread gets it.
__device__ Pair group_sum(Pair value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value.first += __shfl_xor_sync(0xffffffffu, value.first, distance);
    value.second += __shfl_xor_sync(0xffffffffu, value.second, distance);
  }
  if (blockDim.x == kWarp) return value;
  __shared__ Pair warps[kMaxThreads / kWarp];
  __syncthreads(); // the sums of the call before have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = {0.0f, 0.0f};
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    value.first += warps[warp].first;
    value.second += warps[warp].second;
  }
  return value;
}

// The columns of this thread: held(column, slot) for those that stay in registers, then streamed(column). Vectors are
// only taken where all columns can be held.
template <int V, class Held, class Streamed>
__device__ void for_columns(int width, Held held, Streamed streamed) {
  int column = threadIdx.x * V;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot, column += blockDim.x * V) {
    if (column < width) held(column, slot);
  }
  if constexpr (V == 1) {
    for (; column < width; column += blockDim.x) streamed(column);
  }
}

// ---- forward

template <int V, class TX, class TY>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_forward(
    Input x, Modulation modulation, bool rms, float eps, Output y, float* mean, float* rstd, int64_t batch,
    int64_t tokens, int width) {
  for (int64_t token = group_index(); token < batch * tokens; token += group_count()) {
    const int64_t b = token / tokens, n = token % tokens;
    const int64_t shift_row = modulation.shift.row(b, n), scale_row = modulation.scale.row(b, n);
    float values[kSlots][V];

    float sum = 0.0f;
    const auto add = [&](int column, float (&v)[V]) {
      x.read<TX>(token * width + column, v);
      for (int i = 0; i < V; ++i) sum += v[i];
    };
    for_columns<V>(
        width, [&](int column, int slot) { add(column, values[slot]); },
        [&](int column) {
          float v[V];
          add(column, v);
        });
    const float center = rms ? 0.0f : group_sum({sum, 0.0f}).first / width;

    float squares = 0.0f;
    const auto add_square = [&](const float (&v)[V]) {
      for (int i = 0; i < V; ++i) squares += (v[i] - center) * (v[i] - center);
    };
    for_columns<V>(
        width, [&](int, int slot) { add_square(values[slot]); },
        [&](int column) {
          float v[V];
          x.read<TX>(token * width + column, v);
          add_square(v);
        });
    const float inverse = 1.0f / sqrtf(group_sum({squares, 0.0f}).first / width + eps);

    // y = h * gain + (bias * (1 + scale) + shift)
    const auto modulate = [&](int column, const float (&v)[V]) {
      float one_plus_scale[V], gain[V], offset[V], out[V];
      modulation.read_gain(scale_row, column, one_plus_scale, gain);
      modulation.bias.read(column, offset);
      modulation.shift.values.read(shift_row + column, out);
      for (int i = 0; i < V; ++i) out[i] += offset[i] * one_plus_scale[i] + (v[i] - center) * inverse * gain[i];
      y.write<TY>(token * width + column, out);
    };
    for_columns<V>(
        width, [&](int column, int slot) { modulate(column, values[slot]); },
        [&](int column) {
          float v[V];
          x.read<TX>(token * width + column, v);
          modulate(column, v);
        });
    if (threadIdx.x == 0) {
      mean[token] = center;
      rstd[token] = inverse;
    }
  }
}

// ---- backward

// The tokens of every row of the finest division (at which all parameters are constant), cut into pieces of at most
// `piece_tokens`. Pieces are numbered in the order of their tokens, so those of a coarser row are neighbours too. A
// group takes `task_pieces` of them, one after the other.
struct Pieces {
  int64_t tokens, row_tokens, piece_tokens, row_pieces, sample_pieces, total, task_pieces, tasks;

  Pieces(int64_t batch, int64_t tokens, int64_t rows) : tokens(tokens), row_tokens(tokens / rows) {
    // More tokens a task cost parallelism, fewer cost traffic: a piece leaves a row of fp32 for each parameter.
    const int64_t task_tokens = std::clamp<int64_t>(batch * tokens / 1024, 16, 64);
    piece_tokens = std::min(task_tokens, row_tokens);
    row_pieces = (row_tokens + piece_tokens - 1) / piece_tokens;
    sample_pieces = rows * row_pieces;
    total = batch * sample_pieces;
    task_pieces = task_tokens / piece_tokens;
    tasks = (total + task_pieces - 1) / task_pieces;
  }

  __host__ __device__ int64_t sample(int64_t piece) const { return piece / sample_pieces; }
  __host__ __device__ int64_t begin(int64_t piece) const {
    const int64_t in_sample = piece % sample_pieces;
    return in_sample / row_pieces * row_tokens + in_sample % row_pieces * piece_tokens;
  }
  __host__ __device__ int64_t end(int64_t piece) const {
    const int64_t row_end = (piece % sample_pieces / row_pieces + 1) * row_tokens;
    const int64_t full = begin(piece) + piece_tokens;
    return full < row_end ? full : row_end;
  }
};

// Where a group writes its sums. shift, scale: a row for each piece, which is the gradient itself if the piece is a
// whole row of the parameter; weight, bias: a row for each task, no data if the gradient is not wanted.
struct Sums {
  Output shift, scale;
  float *weight, *bias;
};

// With P = sum dy and Q = sum dy * h over the tokens of a piece:
//   dshift += P, dscale += weight * Q + bias * P, dweight += (1 + scale) * Q, dbias += (1 + scale) * P
template <int V>
__device__ void write_sums(
    const Modulation& modulation, const Sums& sums, int64_t scale_row, int64_t piece, int64_t task, bool first_of_task,
    int column, int width, const float (&sum_dy)[V], const float (&sum_dy_h)[V]) {
  const int64_t at = piece * width + column;
  float w[V], c[V], dscale[V];
  modulation.weight.read(column, w);
  modulation.bias.read(column, c);
  for (int i = 0; i < V; ++i) dscale[i] = w[i] * sum_dy_h[i] + c[i] * sum_dy[i];
  sums.shift.write(at, sum_dy);
  sums.scale.write(at, dscale);
  if (sums.weight == nullptr && sums.bias == nullptr) return;

  float scale[V];
  modulation.scale.values.read(scale_row + column, scale);
  const auto add_scaled = [&](float* out, const float (&sum)[V]) {
    if (out == nullptr) return;
    out += task * width + column;
    float total[V] = {};
    if (!first_of_task) load(out, total);
    for (int i = 0; i < V; ++i) total[i] += (1.0f + scale[i]) * sum[i];
    store(out, total);
  };
  add_scaled(sums.weight, sum_dy_h);
  add_scaled(sums.bias, sum_dy);
}

// wide: [groups, 2, D], the two sums of the columns that are not held in registers; empty if there are none.
template <int V, class TX, class TY>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_backward(
    Input dy, Input x, Modulation modulation, const float* mean, const float* rstd, bool rms, Output dx, Sums sums,
    float* wide, Pieces pieces, int width) {
  float* wide_dy = wide + group_index() * 2 * width;
  float* wide_dy_h = wide_dy + width;

  for (int64_t task = group_index(); task < pieces.tasks; task += group_count()) {
    const int64_t first_piece = task * pieces.task_pieces;
    for (int64_t piece = first_piece; piece < first_piece + pieces.task_pieces && piece < pieces.total; ++piece) {
      const int64_t b = pieces.sample(piece), begin = pieces.begin(piece), end = pieces.end(piece);
      const int64_t scale_row = modulation.scale.row(b, begin);
      float gain[kSlots][V], sum_dy[kSlots][V] = {}, sum_dy_h[kSlots][V] = {};
      const auto read_gain = [&](int column, float (&out)[V]) {
        float one_plus_scale[V];
        modulation.read_gain(scale_row, column, one_plus_scale, out);
      };
      for_columns<V>(
          width, [&](int column, int slot) { read_gain(column, gain[slot]); },
          [&](int column) { wide_dy[column] = wide_dy_h[column] = 0.0f; });

      for (int64_t n = begin; n < end; ++n) {
        const int64_t token = b * pieces.tokens + n;
        const float center = mean[token], inverse = rstd[token];
        float dys[kSlots][V], h[kSlots][V];
        const auto read = [&](int column, float (&g)[V], float (&v)[V]) {
          dy.read<TY>(token * width + column, g);
          x.read<TX>(token * width + column, v);
          for (int i = 0; i < V; ++i) v[i] = (v[i] - center) * inverse;
        };

        Pair token_sums = {0.0f, 0.0f}; // of dh and dh * h, with dh = dy * gain
        const auto add = [&](const float (&g)[V], const float (&v)[V], const float (&a)[V], float (&p)[V],
                             float (&q)[V]) {
          for (int i = 0; i < V; ++i) {
            p[i] += g[i];
            q[i] += g[i] * v[i];
            token_sums.first += g[i] * a[i];
            token_sums.second += g[i] * a[i] * v[i];
          }
        };
        for_columns<V>(width, [&](int column, int slot) { read(column, dys[slot], h[slot]); }, [](int) {});
        for_columns<V>(
            width, [&](int, int slot) { add(dys[slot], h[slot], gain[slot], sum_dy[slot], sum_dy_h[slot]); },
            [&](int column) {
              float g[V], v[V], a[V], p[V] = {wide_dy[column]}, q[V] = {wide_dy_h[column]};
              read(column, g, v);
              read_gain(column, a);
              add(g, v, a, p, q);
              wide_dy[column] = p[0];
              wide_dy_h[column] = q[0];
            });

        token_sums = group_sum(token_sums);
        const float mean_dh = rms ? 0.0f : token_sums.first / width, mean_dh_h = token_sums.second / width;
        const auto write = [&](int column, const float (&g)[V], const float (&v)[V], const float (&a)[V]) {
          float out[V];
          for (int i = 0; i < V; ++i) out[i] = inverse * ((g[i] * a[i] - mean_dh) - v[i] * mean_dh_h);
          dx.write<TX>(token * width + column, out);
        };
        for_columns<V>(
            width, [&](int column, int slot) { write(column, dys[slot], h[slot], gain[slot]); },
            [&](int column) {
              float g[V], v[V], a[V];
              read(column, g, v);
              read_gain(column, a);
              write(column, g, v, a);
            });
      }

      const auto finish = [&](int column, const float (&p)[V], const float (&q)[V]) {
        write_sums(modulation, sums, scale_row, piece, task, piece == first_piece, column, width, p, q);
      };
      for_columns<V>(
          width, [&](int column, int slot) { finish(column, sum_dy[slot], sum_dy_h[slot]); },
          [&](int column) {
            const float p[V] = {wide_dy[column]}, q[V] = {wide_dy_h[column]};
            finish(column, p, q);
          });
    }
  }
}

// out [rows, D] = the sum over count of in [rows, count, D]; lane k of a column adds k, k + kSumLanes, ...
__global__ void __launch_bounds__(kWarp* kSumLanes)
    sum_partials(const float* in, Output out, int64_t rows, int64_t count, int width) {
  __shared__ float lanes[kSumLanes][kWarp];
  const int64_t tiles = (width + kWarp - 1) / kWarp;
  for (int64_t task = blockIdx.x; task < rows * tiles; task += gridDim.x) {
    const int64_t row = task / tiles;
    const int column = static_cast<int>(task % tiles) * kWarp + threadIdx.x;
    float sum = 0.0f;
    if (column < width) {
      for (int64_t i = threadIdx.y; i < count; i += kSumLanes) sum += in[(row * count + i) * width + column];
    }
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
      float total[1] = {0.0f};
      for (int lane = 0; lane < kSumLanes; ++lane) total[0] += lanes[lane][threadIdx.x];
      out.write(row * width + column, total);
    }
    __syncthreads(); // the lanes have been read
  }
}

// ---- checks

void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
      " must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(tensor.get_device_index() == x.get_device_index(), name, " must be on the device of x");
  STD_TORCH_CHECK(
      tensor.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(), " dimensions, got ",
      tensor.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(
        tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", tensor.size(dim));
    ++dim;
  }
}

void check_dense(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& x) {
  check(tensor, name, shape, x);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

struct Shape {
  int64_t batch, tokens;
  int width;

  explicit Shape(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, "x must be [B, N, D], got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.size(2) < (int64_t{1} << 30), "x must have D below 2^30, got ", x.size(2));
    batch = x.size(0);
    tokens = x.size(1);
    width = static_cast<int>(x.size(2));
    check_dense(x, "x", {batch, tokens, width}, x);
  }
};

void check_rows(int64_t count, const char* name, const Shape& shape) {
  STD_TORCH_CHECK(
      count > 0 && shape.tokens % count == 0, name, " has ", count, " rows, which do not divide ", shape.tokens,
      " tokens");
}

Input input(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type()}; }
Output output(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.scalar_type()}; }

Rows rows(const std::optional<Tensor>& given, const char* name, const Shape& shape, const Tensor& x) {
  if (!given) return {{{nullptr, ScalarType::Float}, 0.0f}, 0, 0, 1, std::max<int64_t>(shape.tokens, 1)};
  const Tensor& parameter = *given;
  STD_TORCH_CHECK(parameter.dim() == 3, name, " must be [B, R, D], got ", parameter.dim(), " dimensions");
  const int64_t count = parameter.size(1);
  check(parameter, name, {shape.batch, count, shape.width}, x);
  check_rows(count, name, shape);
  STD_TORCH_CHECK(shape.width <= 1 || parameter.stride(2) == 1, name, " must have stride 1 over D");
  // The stride of a dimension of size 1 is never used and may be anything.
  return {
      {input(parameter), 0.0f},
      shape.batch > 1 ? parameter.stride(0) : 0,
      count > 1 ? parameter.stride(1) : 0,
      count,
      shape.tokens / count};
}

Parameter affine(
    const std::optional<Tensor>& parameter, const char* name, float absent, const Shape& shape, const Tensor& x) {
  if (!parameter) return {{nullptr, ScalarType::Float}, absent};
  check_dense(*parameter, name, {shape.width}, x);
  return {input(*parameter), absent};
}

Modulation modulation_of(
    const std::optional<Tensor>& shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Shape& shape, const Tensor& x) {
  return {
      rows(shift, "shift", shape, x), rows(scale, "scale", shape, x), affine(weight, "weight", 1.0f, shape, x),
      affine(bias, "bias", 0.0f, shape, x)};
}

// ---- launches

// Whether a token of D columns can be held in vectors, and each vector of every tensor starts at a multiple of 16
// bytes.
bool takes_vectors(const Modulation& m, std::initializer_list<const void*> tokens, int width) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto aligned_rows = [&](const Rows& r) {
    return aligned(r.values.values.data) && r.batch_stride % kVector == 0 && r.row_stride % kVector == 0;
  };
  return width % kVector == 0 && width <= kMaxThreads * kVector * kSlots && aligned_rows(m.shift) &&
         aligned_rows(m.scale) && aligned(m.weight.values.data) && aligned(m.bias.values.data) &&
         std::all_of(tokens.begin(), tokens.end(), aligned);
}

// f(integral_constant V, TX, TY): vectors of the usual dtypes (TY is TX, or what autocast makes of fp32), or else one
// column at a time of any dtypes.
template <class F>
void with_kernel(bool vectors, ScalarType x, ScalarType y, F&& f) {
  const std::integral_constant<int, kVector> V;
  if (vectors && x == ScalarType::Float && y == ScalarType::Float) return f(V, Type<float>{}, Type<float>{});
  if (vectors && x == ScalarType::Float && y == ScalarType::BFloat16) return f(V, Type<float>{}, Type<BFloat16>{});
  if (vectors && x == ScalarType::Float && y == ScalarType::Half) return f(V, Type<float>{}, Type<Half>{});
  if (vectors && x == ScalarType::BFloat16 && y == ScalarType::BFloat16)
    return f(V, Type<BFloat16>{}, Type<BFloat16>{});
  if (vectors && x == ScalarType::Half && y == ScalarType::Half) return f(V, Type<Half>{}, Type<Half>{});
  f(std::integral_constant<int, 1>{}, Type<void>{}, Type<void>{});
}

struct Launch {
  dim3 threads;
  int64_t blocks;

  // A group for each task, of as many warps as it takes to keep a token in registers.
  Launch(int64_t tasks, int width, int vector) {
    const int64_t columns = static_cast<int64_t>(kWarp) * vector * kSlots;
    const unsigned warps = std::clamp<int64_t>((width + columns - 1) / columns, 1, kMaxThreads / kWarp);
    threads = dim3(kWarp * warps, warps == 1 ? 4 : 1, 1);
    blocks = (tasks + threads.y - 1) / threads.y;
  }

  Launch(dim3 threads, int64_t tasks) : threads(threads), blocks(tasks) {}

  template <class... Parameters, class... Arguments>
  void operator()(const Tensor& on, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    cudaLaunchConfig_t config = {};
    // The kernels loop over their tasks: any number of blocks gives the same result.
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max())), 1, 1);
    config.blockDim = threads;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "adaln: the launch of a CUDA kernel failed: ", cudaGetErrorString(error));
  }
};

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

Tensor empty_if_asked(
    const Tensor& like, std::initializer_list<int64_t> shape, const std::optional<ScalarType>& dtype) {
  return dtype ? empty(like, shape, *dtype) : empty(like, {0}, like.scalar_type());
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
const float* const_floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// A gradient [rows, D], and the partial sums [rows, count, D] in fp32 that it is made of; neither if it is not asked
// for.
struct Gradient {
  Tensor gradient;
  bool asked;
  int64_t rows, count;
  std::optional<Tensor> partial;

  // Writing in place serves a row that has one partial sum, written once.
  Gradient(Tensor gradient_, bool asked, int64_t rows, int64_t partials, int width, bool in_place)
      : gradient(gradient_), asked(asked), rows(rows), count(asked ? partials / rows : 0) {
    if (asked && (!in_place || count > 1)) partial = empty(gradient, {partials, width}, ScalarType::Float);
  }

  Output target() const {
    return asked ? output(partial ? *partial : gradient) : Output{nullptr, gradient.scalar_type()};
  }
  float* sums() const { return partial ? floats(*partial) : nullptr; }

  void finish(int width) const {
    if (!partial || width == 0) return;
    const Launch launch(dim3(kWarp, kSumLanes, 1), rows * ((width + kWarp - 1) / kWarp));
    launch(gradient, sum_partials, const_floats(*partial), output(gradient), rows, count, width);
  }
};

// ---- ops

std::tuple<Tensor, Tensor, Tensor> adaln_fwd(
    const Tensor& x, std::optional<Tensor> shift, std::optional<Tensor> scale, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> index, bool rms, double eps, ScalarType out_dtype) {
  STD_TORCH_CHECK(!index, "the CUDA kernels take no index");
  const Shape shape(x);
  const Modulation modulation = modulation_of(shift, scale, weight, bias, shape, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = empty(x, {shape.batch, shape.tokens, shape.width}, out_dtype);
  Tensor mean = empty(x, {shape.batch, shape.tokens}, ScalarType::Float),
         rstd = empty(x, {shape.batch, shape.tokens}, ScalarType::Float);
  if (shape.batch * shape.tokens == 0) return {y, mean, rstd};

  const bool vectors = takes_vectors(modulation, {x.const_data_ptr(), y.const_data_ptr()}, shape.width);
  with_kernel(vectors, x.scalar_type(), out_dtype, [&]<class V, class TX, class TY>(V, Type<TX>, Type<TY>) {
    const Launch launch(shape.batch * shape.tokens, shape.width, V::value);
    launch(
        x, adaln_forward<V::value, TX, TY>, input(x), modulation, rms, static_cast<float>(eps), output(y), floats(mean),
        floats(rstd), shape.batch, shape.tokens, shape.width);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_bwd(
    const Tensor& dy, const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> weight,
    std::optional<Tensor> bias, const Tensor& mean, const Tensor& rstd, std::optional<Tensor> index, bool rms,
    bool need_x, std::optional<ScalarType> shift_dtype, int64_t shift_rows, std::optional<ScalarType> scale_dtype,
    int64_t scale_rows, std::optional<ScalarType> weight_dtype, std::optional<ScalarType> bias_dtype) {
  STD_TORCH_CHECK(!index, "the CUDA kernels take no index");
  const Shape shape(x);
  const auto [batch, tokens, width] = shape;
  check_dense(dy, "dy", {batch, tokens, width}, x);
  check_dense(mean, "mean", {batch, tokens}, x);
  check_dense(rstd, "rstd", {batch, tokens}, x);
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float, "mean must be float32");
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float, "rstd must be float32");
  const Modulation modulation = modulation_of(std::nullopt, scale, weight, bias, shape, x);
  if (shift_dtype) check_rows(shift_rows, "shift", shape);
  if (scale_dtype) check_rows(scale_rows, "scale", shape);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

  const std::optional<ScalarType> x_dtype = need_x ? std::optional(x.scalar_type()) : std::nullopt;
  Tensor dx = empty_if_asked(x, {batch, tokens, width}, x_dtype);
  Tensor dshift = empty_if_asked(x, {batch, shift_rows, width}, shift_dtype);
  Tensor dscale = empty_if_asked(x, {batch, scale_rows, width}, scale_dtype);
  Tensor dweight = empty_if_asked(x, {width}, weight_dtype), dbias = empty_if_asked(x, {width}, bias_dtype);
  if (batch * tokens == 0) {
    for (Tensor* gradient : {&dshift, &dscale, &dweight, &dbias}) torch::stable::zero_(*gradient);
    return {dx, dshift, dscale, dweight, dbias};
  }

  const int64_t cut = std::lcm(std::max<int64_t>(shift_rows, 1), std::max<int64_t>(scale_rows, 1));
  const Pieces pieces(batch, tokens, std::lcm(cut, modulation.scale.count));
  const Gradient shift_sums(dshift, shift_dtype.has_value(), batch * shift_rows, pieces.total, width, true);
  const Gradient scale_sums(dscale, scale_dtype.has_value(), batch * scale_rows, pieces.total, width, true);
  const Gradient weight_sums(dweight, weight_dtype.has_value(), 1, pieces.tasks, width, false);
  const Gradient bias_sums(dbias, bias_dtype.has_value(), 1, pieces.tasks, width, false);
  const Sums sums = {shift_sums.target(), scale_sums.target(), weight_sums.sums(), bias_sums.sums()};
  const Output target = need_x ? output(dx) : Output{nullptr, x.scalar_type()};

  const bool vectors = takes_vectors(
      modulation, {dy.const_data_ptr(), x.const_data_ptr(), target.data, sums.shift.data, sums.scale.data}, width);
  with_kernel(vectors, x.scalar_type(), dy.scalar_type(), [&]<class V, class TX, class TY>(V, Type<TX>, Type<TY>) {
    const Launch launch(pieces.tasks, shape.width, V::value);
    const bool held = shape.width <= static_cast<int64_t>(launch.threads.x) * V::value * kSlots;
    const Tensor wide = empty(x, {held ? 0 : launch.blocks * launch.threads.y, 2, shape.width}, ScalarType::Float);
    launch(
        x, adaln_backward<V::value, TX, TY>, input(dy), input(x), modulation, const_floats(mean), const_floats(rstd),
        rms, target, sums, floats(wide), pieces, shape.width);
  });
  for (const Gradient* gradient : {&shift_sums, &scale_sums, &weight_sums, &bias_sums}) gradient->finish(width);
  return {dx, dshift, dscale, dweight, dbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(minisora, CUDA, m) {
  m.impl("adaln_fwd", TORCH_BOX(&adaln_fwd));
  m.impl("adaln_bwd", TORCH_BOX(&adaln_bwd));
}

} // namespace minisora
