// Runs CUDA kernels on the host, to see what they compute where there is no GPU.
//
// Every thread of a block is a fibre that runs until it waits. Which one runs next is drawn at random from a seed, so
// that a missing barrier shows as a wrong or a changing result. Blocks run one after the other in a random order; those
// of a cluster, and all of a cooperative grid, run together, some faster than others. Shared memory is full of NaN when
// a block starts, and so is what torch allocates for results when the tests ask it to. Launches that no device would
// take are errors, a barrier that some threads never reach ends the process.
//
// What it cannot see: registers, timing, and memory order between blocks that run together.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int64_t kUnaskedSharedBytes = 48 * 1024;

enum class State { kReady, kBlock, kWarpBarrier, kCluster, kGrid, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// A fibre starts with setcontext; from then on it is switched to with longjmp, which asks nothing of the kernel.
struct Fibre {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  int block;        // among those that run together
  unsigned thread;
  int exchanges;    // alternates the two slots, so that a fast thread does not overwrite what a slow one still reads
  float slots[2];
  int cluster_arrivals, cluster_waits;
  std::vector<Copy> copies;  // started, not finished
};

struct Device {
  std::map<int, int> attributes;
};

std::map<int, Device> devices;
int current_device = 0;
std::map<std::pair<int, const void*>, int64_t> allowed_shared;  // per device and kernel
std::mt19937 random_order;
std::string trace;

std::vector<Fibre> fibres;
std::vector<std::vector<unsigned char>> shared;  // of the blocks that run together
jmp_buf scheduler;
Fibre* running = nullptr;
const std::function<void()>* body = nullptr;
unsigned first_block = 0;
std::vector<unsigned> block_order;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void wait(State state) {
  running->state = state;
  if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

void run_fibre() {
  (*body)();
  running->state = State::kDone;
  _longjmp(scheduler, 1);
}

// Runs `running` until it waits.
__attribute__((noinline)) void resume() {
  if (_setjmp(scheduler) != 0) return;
  if (running->started) _longjmp(running->resume, 1);
  running->started = true;
  setcontext(&running->start);
}

Fibre& fibre(int block, unsigned thread) { return fibres[static_cast<size_t>(block) * blockDim.x + thread]; }

// Lets those go on whose barrier is complete; false when there is none.
bool release(int blocks) {
  const unsigned threads = blockDim.x;
  bool released = false;
  const auto let_go = [&](int block, unsigned from, unsigned to, State state) {
    for (unsigned t = from; t < to; ++t) {
      if (fibre(block, t).state != state) return;
    }
    for (unsigned t = from; t < to; ++t) fibre(block, t).state = State::kReady;
    released = true;
  };
  bool all_in_grid = true;
  int fewest = std::numeric_limits<int>::max();
  for (int block = 0; block < blocks; ++block) {
    for (unsigned warp = 0; warp < threads; warp += kWarp) let_go(block, warp, warp + kWarp, State::kWarpBarrier);
    let_go(block, 0, threads, State::kBlock);
    for (unsigned t = 0; t < threads; ++t) {
      all_in_grid = all_in_grid && fibre(block, t).state == State::kGrid;
      fewest = std::min(fewest, fibre(block, t).cluster_arrivals);
    }
  }
  for (int i = 0; i < blocks * static_cast<int>(threads); ++i) {
    Fibre& f = fibres[static_cast<size_t>(i)];
    if (all_in_grid || (f.state == State::kCluster && f.cluster_waits <= fewest)) {
      f.state = State::kReady;
      released = true;
    }
  }
  return released;
}

// Blocks that wait for one another: one, those of a cluster, or the whole grid.
void run_together(int blocks, size_t shared_bytes) {
  const size_t count = static_cast<size_t>(blocks) * blockDim.x;
  if (fibres.size() < count) fibres.resize(count);
  // As bytes of 0xff every float and half is a NaN.
  shared.assign(static_cast<size_t>(blocks), std::vector<unsigned char>(shared_bytes + 16, 0xff));
  std::vector<unsigned> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = static_cast<unsigned>(i);
    Fibre& f = fibres[i];
    f.block = static_cast<int>(i / blockDim.x);
    f.thread = static_cast<unsigned>(i % blockDim.x);
    f.state = State::kReady;
    f.exchanges = f.cluster_arrivals = f.cluster_waits = 0;
    f.started = false;
    f.copies.clear();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, run_fibre, 0);
  }
  // Of 16 rounds, a block sits out so many.
  std::vector<unsigned> rests(static_cast<size_t>(blocks));
  std::vector<bool> rest(static_cast<size_t>(blocks));
  for (unsigned& r : rests) r = blocks == 1 ? 0 : random_order() % 16;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_order);
    for (size_t block = 0; block < rests.size(); ++block) rest[block] = random_order() % 16 < rests[block];
    bool ready = false, done = true;
    for (unsigned i : order) {
      Fibre& f = fibres[i];
      done = done && f.state == State::kDone;
      if (f.state != State::kReady) continue;
      ready = true;
      if (rest[static_cast<size_t>(f.block)]) continue;
      running = &f;
      threadIdx.x = f.thread;
      blockIdx.x = block_order[first_block + static_cast<unsigned>(f.block)];
      resume();
    }
    if (done) return;
    if (!release(blocks) && !ready) fail("threads wait at a barrier that the others never reach");
  }
}

int attribute_of(cudaDeviceAttr attribute) { return devices[current_device].attributes[attribute]; }

}  // namespace

unsigned char* dynamic_shared() {
  unsigned char* const memory = shared[static_cast<size_t>(running->block)].data();
  return memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
}

void wait_for_block() { wait(State::kBlock); }

void arrive_in_cluster() {
  if (running->cluster_arrivals != running->cluster_waits) fail("a thread arrives twice without waiting");
  ++running->cluster_arrivals;
}

void wait_for_cluster() {
  if (++running->cluster_waits != running->cluster_arrivals) fail("a thread waits for a cluster without arriving");
  wait(State::kCluster);
}

const void* in_block_of_cluster(const void* address, unsigned rank) {
  const auto* memory = static_cast<const unsigned char*>(address);
  const Fibre& other = fibre(static_cast<int>(rank), 0);
  if (rank >= shared.size()) fail("a block that the cluster does not have");
  bool lives = false;
  for (unsigned t = 0; t < blockDim.x; ++t) lives = lives || fibre(static_cast<int>(rank), t).state != State::kDone;
  if (!lives) fail("the shared memory of a block that has ended");
  const std::ptrdiff_t offset = memory - dynamic_shared();
  unsigned char* const start = shared[static_cast<size_t>(other.block)].data();
  return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16 + offset;
}

void wait_for_grid() { wait(State::kGrid); }

float exchange_in_warp(float value, int lane_mask) {
  const int slot = running->exchanges++ & 1;
  running->slots[slot] = value;
  Fibre* const own = running;
  wait(State::kWarpBarrier);
  return fibre(own->block, own->thread ^ static_cast<unsigned>(lane_mask)).slots[slot];
}

void start_copy(void* shared_memory, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared_memory) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("an asynchronous copy whose address is no multiple of its size");
  }
  running->copies.push_back({shared_memory, from, bytes});
}

void finish_copies() {
  for (const Copy& copy : running->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  running->copies.clear();
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim.x;
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config.attrs[i].val.cooperative != 0;
  }
  const unsigned threads = config.blockDim.x, blocks = config.gridDim.x;
  const auto bytes = static_cast<int64_t>(config.dynamicSmemBytes);
  trace += (cooperative ? "cooperative " : cluster > 1 ? "cluster of " + std::to_string(cluster) + ' ' : "plain ") +
           std::to_string(blocks) + " x " + std::to_string(threads) + '\n';
  if (threads < 1 || threads % kWarp != 0 || threads > 1024 || blocks < 1 || blocks % cluster != 0) {
    return cudaErrorInvalidValue;
  }
  if (cluster > 1 && (cluster > 8 || attribute_of(cudaDevAttrClusterLaunch) == 0)) return cudaErrorInvalidValue;
  if (bytes > std::max(kUnaskedSharedBytes, allowed_shared[{current_device, kernel}])) return cudaErrorInvalidValue;
  if (cooperative && static_cast<int>(blocks) > attribute_of(cudaDevAttrMultiProcessorCount)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  body = &thread;
  const unsigned together = cooperative ? blocks : cluster;
  // Clusters in any order; within one, blocks keep theirs, because ranks are places in it.
  std::vector<unsigned> order(blocks / together);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_order);
  block_order.clear();
  for (unsigned run : order) {
    for (unsigned rank = 0; rank < together; ++rank) block_order.push_back(run * together + rank);
  }
  for (first_block = 0; first_block < blocks; first_block += together) {
    run_together(static_cast<int>(together), config.dynamicSmemBytes);
  }
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = emulator::devices[device].attributes[attribute];
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const int64_t allowed = emulator::allowed_shared[{emulator::current_device, kernel}];
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(allowed);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulator::attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return cudaErrorInvalidValue;
  emulator::allowed_shared[{emulator::current_device, kernel}] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = emulator::attribute_of(cudaDevAttrCooperativeLaunch) == 2 ? 0 : 1;
  return cudaSuccess;
}

// What the tests call: ctypes on the library.
extern "C" {

// From now on launches go to device `index`; its limits are those of its first description. `cooperative` 2: the device
// could, but the driver finds no room.
__attribute__((visibility("default"))) void emulator_use_device(int index, int multiprocessors, int threads,
                                                                int shared_bytes, int clusters, int cooperative) {
  emulator::current_device = index;
  emulator::devices[index].attributes = {{cudaDevAttrMultiProcessorCount, multiprocessors},
                                         {cudaDevAttrMaxThreadsPerBlock, threads},
                                         {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes},
                                         {cudaDevAttrL2CacheSize, 50 << 20},
                                         {cudaDevAttrClusterLaunch, clusters},
                                         {cudaDevAttrCooperativeLaunch, cooperative}};
}

// The order in which threads and blocks run from now on.
__attribute__((visibility("default"))) void emulator_seed(unsigned seed) { emulator::random_order.seed(seed); }

// A line per launch since the last call.
__attribute__((visibility("default"))) const char* emulator_trace() {
  static std::string last;
  last.swap(emulator::trace);
  emulator::trace.clear();
  return last.c_str();
}

// torch's functions that a torch without CUDA cannot serve; the library finds these first.
struct AtenTensorOpaque;
__attribute__((visibility("default"))) int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
__attribute__((visibility("default"))) int32_t aoti_torch_delete_device_guard(void*) { return 0; }
__attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // extern "C"
