// See cuda_on_cpu.py, which describes what this emulates.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
dim3 threadIdx, blockIdx, blockDim, gridDim;
uint4 shared_memory[1]; // its address stands for address 0 of the block's shared memory

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;

// What a test plants, and how it has threads ordered.
struct Settings {
  unsigned seed;
  long blocks; // at most, of a grid
  long skipped_barrier, skipped_wait; // the how manieth of a thread does nothing; -1: none
  long missing_bytes; // of shared memory, that the block does not get
  long shifted_bytes; // by which copies read too far
};

long setting(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atol(value);
}

[[noreturn]] void fail(const std::string& what);

// ---- fibers: a stack each, and the registers that a call keeps

struct Fiber {
  void* stack_pointer;
  dim3 index;
  bool done;
  long barriers = 0, waits = 0;
};

asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulation_switch(void** from, void* to) __attribute__((visibility("hidden")));

std::vector<Fiber> fibers;
std::vector<std::unique_ptr<char[]>> stacks;
void* scheduler;
unsigned me; // the fiber that runs
bool progress;
std::string failure;
std::function<void()> body;
Settings settings;
std::mt19937 random;

void back_to_scheduler() { emulation_switch(&fibers[me].stack_pointer, scheduler); }

void fail(const std::string& what) {
  failure = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(me) + ")";
  for (;;) back_to_scheduler();
}

// ---- barriers

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  const void* what = nullptr;
};

Barrier block_barrier;
std::vector<Barrier> warp_barriers;
std::vector<uint64_t> warp_epochs; // of barriers that order memory
uint64_t block_epoch;

void wait(Barrier& barrier, unsigned count, const void* what) {
  if (barrier.arrived > 0 && barrier.what != what) fail("threads wait at different places");
  const uint64_t generation = barrier.generation;
  barrier.what = what;
  progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (generation == barrier.generation) back_to_scheduler();
}

void wait_for_warp(const void* what) { wait(warp_barriers[me / kWarp], kWarp, what); }

// What a planted fault leaves of a barrier: threads meet, but it orders nothing, and each goes on when it likes.
bool skipped() { return fibers[me].barriers++ == settings.skipped_barrier; }

// ---- shared memory, word by word

struct Access {
  uint64_t block = 0, warp = 0; // epochs
  int thread = -1; // -1: none; -2: several of the warp
};

struct Word {
  bool written = false;
  int copying = -1; // the thread whose copy has not come
  Access write;
  std::vector<Access> reads; // by warp
};

std::unique_ptr<char[]> memory;
size_t memory_bytes;
std::vector<Word> words;

bool before(const Access& access, int thread) {
  if (access.thread == -1 || access.thread == thread || access.block < block_epoch) return true;
  const bool of_warp = access.thread == -2 || access.thread / int(kWarp) == thread / int(kWarp);
  return of_warp && access.warp < warp_epochs[thread / kWarp];
}

Word& word_at(uint32_t at) {
  if (at + 4 > memory_bytes) fail("an access outside shared memory");
  return words[at / 4];
}

void note_write(uint32_t at, unsigned bytes, int thread) {
  for (uint32_t word = at; word < at + bytes; word += 4) {
    Word& here = word_at(word);
    if (here.copying >= 0) fail("a write where a copy has not come");
    if (!before(here.write, thread)) fail("a race: two writes of a word of shared memory");
    for (unsigned warp = 0; warp < here.reads.size(); ++warp) {
      // Several readers of the thread's own warp may be past; of another warp only a barrier of the block tells.
      const Access& read = here.reads[warp];
      Access as_one = read;
      if (read.thread == -2) as_one.thread = int(warp * kWarp) + (int(warp * kWarp) == thread ? 1 : 0);
      if (!before(as_one, thread)) fail("a race: a write of a word of shared memory that another thread reads");
    }
    here.written = true;
    here.write = {block_epoch, warp_epochs[thread / kWarp], thread};
  }
}

void note_read(uint32_t at, unsigned bytes, int thread) {
  for (uint32_t word = at; word < at + bytes; word += 4) {
    Word& here = word_at(word);
    if (here.copying >= 0) fail("a read of what a copy has not brought: a wait is missing");
    if (!here.written) fail("a read of shared memory that nothing wrote");
    if (!before(here.write, thread)) fail("a race: a read of a word of shared memory that another thread writes");
    Access& read = here.reads[thread / kWarp];
    const bool now = read.thread != -1 && read.block == block_epoch && read.warp == warp_epochs[thread / kWarp];
    read = {block_epoch, warp_epochs[thread / kWarp], now && read.thread != thread ? -2 : thread};
  }
}

void check_address(uint32_t at, unsigned bytes) {
  if (at % bytes != 0) fail("an address of shared memory that is not a multiple of " + std::to_string(bytes));
  if (at + bytes > memory_bytes) fail("an access outside shared memory");
}

void load(uint32_t at, void* to, unsigned bytes, int thread) {
  check_address(at, bytes);
  note_read(at, bytes, thread);
  std::memcpy(to, memory.get() + at, bytes);
}

void store(uint32_t at, const void* from, unsigned bytes, int thread) {
  check_address(at, bytes);
  note_write(at, bytes, thread);
  std::memcpy(memory.get() + at, from, bytes);
}

// ---- cp.async

struct Copy {
  uint32_t to, bytes;
  const char* from;
};

std::vector<std::vector<std::vector<Copy>>> copies; // by thread: its groups, the open one last

void copy_later(uint32_t to, const void* from, uint32_t bytes) {
  check_address(to, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async from an address that is not a multiple of 16");
  if (bytes > 16) fail("cp.async of more than 16 bytes");
  from = static_cast<const char*>(from) + settings.shifted_bytes;
  if (__asan_region_is_poisoned(const_cast<void*>(from), bytes) != nullptr) fail("a copy from outside a tensor");
  note_write(to, 16, me);
  for (uint32_t word = to; word < to + 16; word += 4) word_at(word).copying = me;
  copies[me].back().push_back({to, bytes, static_cast<const char*>(from)});
}

void wait_for_copies(size_t left) {
  if (fibers[me].waits++ == settings.skipped_wait) return;
  auto& groups = copies[me];
  while (groups.size() - 1 > left) {
    for (const Copy& copy : groups.front()) {
      for (uint32_t word = copy.to; word < copy.to + 16; word += 4) {
        word_at(word).copying = -1;
        word_at(word).write = {block_epoch, warp_epochs[me / kWarp], int(me)};
      }
      for (uint32_t i = 0; i < 16; ++i) memory[copy.to + i] = i < copy.bytes ? copy.from[i] : 0;
    }
    groups.erase(groups.begin());
  }
}

// ---- PTX

struct Operand {
  void* data;
  size_t size;
};

template <class T>
Operand operand(const T& value) {
  return {const_cast<void*>(static_cast<const void*>(&value)), sizeof(T)};
}

struct Instruction {
  std::string name;
  std::vector<std::vector<int>> arguments; // numbers of operands; those of an immediate less 1000
};

Instruction parse(const std::string& text) {
  Instruction result;
  size_t at = text.find_first_of(" ;");
  result.name = text.substr(0, at);
  bool braces = false;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '{') {
      braces = true;
      result.arguments.emplace_back();
    } else if (c == '}') {
      braces = false;
    } else if (text.compare(at, 2, "%%") == 0) { // a special register
      result.arguments.emplace_back();
      at = text.find_first_of(",;", at) - 1;
    } else if (c == '%' || std::isdigit(c)) {
      size_t used;
      const int number = std::stoi(text.substr(at + (c == '%')), &used);
      if (!braces) result.arguments.emplace_back();
      result.arguments.back().push_back(c == '%' ? number : number - 1000);
      at += used - (c != '%');
    }
  }
  return result;
}

std::vector<std::vector<uint32_t>> exchanged; // by thread, what a warp hands round

float number(uint32_t word, int which, bool bf16) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * which);
  if (bf16) return static_cast<float>(torch::headeronly::BFloat16(bits, torch::headeronly::BFloat16::from_bits()));
  return static_cast<float>(torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()));
}

// Lane `lane` has row `lane / 4`, columns `2 (lane % 4)` and the next, of each 8 x 8 block of a and c; of b it has
// these rows of column `lane / 4`. Blocks of a: rows first. m16n8k8 has two of a and one of b, m16n8k16 four and two.
void mma(const Instruction& instruction, const std::vector<Operand>& operands, bool bf16) {
  const auto& arguments = instruction.arguments;
  const auto register_of = [&](int argument, size_t i) {
    return static_cast<uint32_t*>(operands[arguments[argument].at(i)].data);
  };
  const size_t parts = arguments[2].size(); // of 8 in k
  auto& mine = exchanged[me];
  mine.clear();
  for (size_t i = 0; i < 2 * parts; ++i) mine.push_back(*register_of(1, i));
  for (size_t i = 0; i < parts; ++i) mine.push_back(*register_of(2, i));
  wait_for_warp(instruction.name.data());
  const unsigned first = me / kWarp * kWarp, lane = me % kWarp;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    float sum;
    std::memcpy(&sum, register_of(3, e), 4);
    for (unsigned k = 0; k < 8 * parts; ++k) {
      const auto& a = exchanged[first + row % 8 * 4 + k % 8 / 2];
      const auto& b = exchanged[first + column * 4 + k % 8 / 2];
      sum += number(a[row / 8 + 2 * (k / 8)], k % 2, bf16) * number(b[2 * parts + k / 8], k % 2, bf16);
    }
    std::memcpy(register_of(0, e), &sum, 4);
  }
  wait_for_warp(instruction.name.data());
}

void ldmatrix(const Instruction& instruction, const std::vector<Operand>& operands, bool transposed) {
  const auto& to = instruction.arguments[0];
  uint32_t address;
  std::memcpy(&address, operands[instruction.arguments[1][0]].data, 4);
  const unsigned lane = me % kWarp, first = me - lane;
  auto& mine = exchanged[me];
  mine.assign(4, 0);
  if (lane < 8 * to.size()) load(address, mine.data(), 16, me);
  wait_for_warp(instruction.name.data());
  for (size_t matrix = 0; matrix < to.size(); ++matrix) {
    const auto at = [&](unsigned row, unsigned column) {
      return exchanged[first + 8 * matrix + row][column / 2] >> 16 * (column % 2) & 0xffff;
    };
    const unsigned g = lane / 4, t = 2 * (lane % 4);
    const uint32_t word = transposed ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
    std::memcpy(operands[to[matrix]].data, &word, 4);
  }
  wait_for_warp(instruction.name.data());
}

void run(const char* text, const std::vector<Operand>& operands) {
  static std::unordered_map<const char*, Instruction> known;
  auto found = known.find(text);
  if (found == known.end()) found = known.emplace(text, parse(text)).first;
  const Instruction& instruction = found->second;
  const std::string& name = instruction.name;
  const auto& arguments = instruction.arguments;
  const auto address = [&](int argument) {
    uint32_t value;
    std::memcpy(&value, operands[arguments[argument][0]].data, 4);
    return value;
  };
  const auto is = [&](const char* what) { return name == what; };
  if (is("ld.shared.u32") || is("ld.shared.f32") || is("ld.shared.v2.f32") || is("ld.shared.v4.u32")) {
    uint32_t values[4];
    load(address(1), values, 4 * arguments[0].size(), me);
    for (size_t i = 0; i < arguments[0].size(); ++i) std::memcpy(operands[arguments[0][i]].data, &values[i], 4);
  } else if (is("st.shared.u32") || is("st.shared.f32")) {
    store(address(0), operands[arguments[1][0]].data, 4, me);
  } else if (is("cp.async.cg.shared.global")) {
    if (arguments[2][0] != 16 - 1000) fail("cp.async.cg of other than 16 bytes");
    copy_later(address(0), *static_cast<void* const*>(operands[arguments[1][0]].data), address(3));
  } else if (is("mov.u32") && std::strstr(text, "%%tid.x") != nullptr) {
    std::memcpy(operands[0].data, &threadIdx.x, 4);
  } else if (is("cp.async.commit_group")) {
    copies[me].emplace_back();
  } else if (is("cp.async.wait_group")) {
    wait_for_copies(address(0));
  } else if (name.starts_with("ldmatrix.sync.aligned.m8n8.x") && name.ends_with(".shared.b16")) {
    ldmatrix(instruction, operands, name.find(".trans.") != std::string::npos);
  } else if (is("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") || is("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32")) {
    mma(instruction, operands, true);
  } else if (is("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") || is("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32")) {
    mma(instruction, operands, false);
  } else if (is("cvt.rn.bf16x2.f32") || is("cvt.rn.f16x2.f32")) {
    float high, low;
    std::memcpy(&high, operands[arguments[1][0]].data, 4);
    std::memcpy(&low, operands[arguments[2][0]].data, 4);
    const bool bf16 = is("cvt.rn.bf16x2.f32");
    const auto bits = [&](float value) -> uint32_t {
      return bf16 ? torch::headeronly::BFloat16(value).x : torch::headeronly::Half(value).x;
    };
    const uint32_t word = bits(high) << 16 | bits(low);
    std::memcpy(operands[arguments[0][0]].data, &word, 4);
  } else {
    fail("no emulation of " + name);
  }
}

// ---- blocks

void run_fiber() {
  body();
  for (const auto& group : copies[me]) {
    if (!group.empty()) fail("a thread ends before its copies have come");
  }
  fibers[me].done = progress = true;
  for (;;) back_to_scheduler();
}

void run_block(size_t bytes) {
  const unsigned count = blockDim.x * blockDim.y, warps = count / kWarp;
  memory_bytes = bytes - settings.missing_bytes;
  memory.reset(new char[memory_bytes]);
  std::memset(memory.get(), 0xff, memory_bytes); // NaN
  words.assign(memory_bytes / 4, {});
  for (Word& word : words) word.reads.resize(warps);
  copies.assign(count, {{}});
  exchanged.assign(count, {});
  block_barrier = {};
  block_epoch = 1;
  warp_barriers.assign(warps, {});
  warp_epochs.assign(warps, 1);
  fibers.assign(count, {});
  while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
  for (unsigned i = 0; i < count; ++i) {
    fibers[i].index = dim3(i % blockDim.x, i / blockDim.x);
    ASAN_UNPOISON_MEMORY_REGION(stacks[i].get(), kStack); // what the fiber before left there
    // Aligned as a call leaves it: six registers, the address to start at, and one that is never returned to.
    auto top = reinterpret_cast<uintptr_t>(stacks[i].get() + kStack) / 16 * 16;
    void** stack = reinterpret_cast<void**>(top) - 8;
    std::fill(stack, stack + 8, nullptr);
    stack[6] = reinterpret_cast<void*>(run_fiber);
    fibers[i].stack_pointer = stack;
  }
  std::vector<unsigned> order(warps), lanes(kWarp);
  std::iota(order.begin(), order.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  bool any = true;
  while (any) {
    any = false;
    if (settings.seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned warp : order) {
      if (settings.seed != 0) std::shuffle(lanes.begin(), lanes.end(), random);
      do {
        progress = false;
        for (const unsigned lane : lanes) {
          me = warp * kWarp + lane;
          if (fibers[me].done) continue;
          threadIdx = fibers[me].index;
          emulation_switch(&scheduler, fibers[me].stack_pointer);
          if (!failure.empty()) {
            stacks.clear(); // what unfinished fibers left on them
            throw std::runtime_error(std::exchange(failure, {}));
          }
        }
        any = any || progress;
      } while (progress && (settings.seed == 0 || random() % 4 != 0)); // a warp may fall behind the others
    }
  }
  for (const Fiber& fiber : fibers) {
    if (!fiber.done) throw std::runtime_error("not all threads reach a barrier");
  }
}

} // namespace emulation

void __syncwarp() {
  static const char what = 0;
  emulation::wait_for_warp(&what);
  const bool counts = !emulation::skipped();
  // The first to go on starts the new epoch for all.
  if (counts && emulation::me % 32 == 0) ++emulation::warp_epochs[emulation::me / 32];
  emulation::wait_for_warp(&what);
}

void __syncthreads() {
  static const char what = 0;
  emulation::wait(emulation::block_barrier, emulation::fibers.size(), &what);
  const bool counts = !emulation::skipped();
  if (counts && emulation::me == 0) ++emulation::block_epoch;
  emulation::wait(emulation::block_barrier, emulation::fibers.size(), &what);
}

float __shfl_xor_sync(unsigned lanes, float value, int distance) {
  static const char what = 0;
  auto& mine = emulation::exchanged[emulation::me];
  mine.resize(1);
  std::memcpy(mine.data(), &value, 4);
  emulation::wait_for_warp(&what);
  std::memcpy(&value, emulation::exchanged[emulation::me ^ distance].data(), 4);
  emulation::wait_for_warp(&what);
  return value;
}

unsigned __ballot_sync(unsigned lanes, bool value) {
  static const char what = 0;
  emulation::exchanged[emulation::me].assign(1, value);
  emulation::wait_for_warp(&what);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    result |= emulation::exchanged[emulation::me / 32 * 32 + lane][0] << lane;
  }
  emulation::wait_for_warp(&what);
  return result;
}

size_t __cvta_generic_to_shared(const void*) { return 0; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 1 << 20, cudaSuccess; }
template <class F>
cudaError_t cudaFuncSetAttribute(F, int, int) {
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using emulation::setting;
  emulation::settings = {
      static_cast<unsigned>(setting("CUDA_ON_CPU_SEED", 0)), setting("CUDA_ON_CPU_BLOCKS", 1 << 20),
      setting("CUDA_ON_CPU_SKIPPED_BARRIER", -1), setting("CUDA_ON_CPU_SKIPPED_WAIT", -1),
      setting("CUDA_ON_CPU_MISSING_BYTES", 0), setting("CUDA_ON_CPU_SHIFTED_BYTES", 0)};
  emulation::random.seed(emulation::settings.seed);
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  gridDim.x = std::min<unsigned>(gridDim.x, emulation::settings.blocks);
  emulation::body = [=] { kernel(arguments...); };
  std::vector<unsigned> blocks(gridDim.x * gridDim.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (emulation::settings.seed != 0) std::shuffle(blocks.begin(), blocks.end(), emulation::random);
  for (const unsigned block : blocks) {
    blockIdx = dim3(block % gridDim.x, block / gridDim.x);
    emulation::run_block(config->dynamicSmemBytes);
  }
}

int no_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
int some_blas_handle(void** handle) {
  *handle = handle;
  return 0;
}
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
} // namespace torch::stable::accelerator

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream
#define torch_get_current_cuda_blas_handle some_blas_handle
#define is_cuda is_cpu
#define CUDA CPU
#define minisora minisora_emulated
