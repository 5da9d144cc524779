// Runs CUDA kernels as plain C++, so that tests see their values without a GPU: one fiber per thread, blocks one after
// the other. Barriers and warp exchanges wait for each other as on a GPU; a barrier that some threads never reach is
// an error, shared memory starts as NaN, and the order in which threads run can be chosen. What it cannot show: races
// between blocks, the memory model, timing.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define STAR_LAUNCH(kernel, blocks, threads, stream, ...) \
  cuda_on_host::launch(#kernel, blocks, threads, [&] { kernel(__VA_ARGS__); })
#define STAR_LAUNCH_EARLY STAR_LAUNCH
#define STAR_SHARED(T, name) T& name = cuda_on_host::shared<T>()

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

namespace cuda_on_host {

enum class Order { forward, reverse, shuffled };

struct Index {
  unsigned x;
};

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
  void* shadow = nullptr;
};

constexpr size_t STACK = 256 << 10;

struct Fiber {
  std::unique_ptr<char[]> memory{new char[STACK]};
  Stack stack{memory.get(), STACK};
  ucontext_t start;
  jmp_buf resume;
  bool started, done;
};

struct Warp {
  uint32_t arrived = 0;
  uint64_t generation = 0;
  uint64_t slot[2][32];  // the lanes that are a generation behind still read the other one
};

struct Device {
  Order order = Order::forward;
  unsigned random = 1;
  Index block, thread;
  int threads, alive, waiting;
  uint64_t generation, progress;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  jmp_buf scheduler;
  Stack stack;
  std::function<void()> body;
};

inline Device device;
// Tell the address sanitizer, where there is one, that another stack is coming, and that it has come.
inline void leave_for([[maybe_unused]] Stack& from, [[maybe_unused]] const Stack& to, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.shadow, to.bottom, to.size);
#endif
}

inline void arrive([[maybe_unused]] Stack& here, [[maybe_unused]] Stack* from) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(here.shadow, &bottom, &size);
  if (from) from->bottom = bottom, from->size = size;
#endif
}

inline void to_scheduler(Fiber& fiber, bool for_good) {
  leave_for(fiber.stack, device.stack, for_good);
  _longjmp(device.scheduler, 1);
}

inline void yield() {
  Fiber& fiber = device.fibers[device.thread.x];
  if (!_setjmp(fiber.resume)) to_scheduler(fiber, false);
  arrive(fiber.stack, &device.stack);
}

inline void run_thread() {
  Fiber& fiber = device.fibers[device.thread.x];
  arrive(fiber.stack, &device.stack);
  device.body();
  fiber.done = true;
  device.progress++;
  // A thread that has returned no longer takes part in barriers.
  if (--device.alive && device.waiting == device.alive) device.waiting = 0, device.generation++;
  to_scheduler(fiber, true);
}

inline void to_fiber(Fiber& fiber) {
  leave_for(device.stack, fiber.stack, false);
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.memory.get();
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_thread, 0);
  setcontext(&fiber.start);
}

inline void barrier() {
  const uint64_t generation = device.generation;
  device.progress++;
  if (++device.waiting == device.alive) {
    device.waiting = 0;
    device.generation++;
  } else {
    while (device.generation == generation) yield();
  }
}

// Every lane of the warp gives a value and reads that of `from`.
template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  const int lane = device.thread.x % 32;
  Warp& warp = device.warps[device.thread.x / 32];
  const uint64_t generation = warp.generation;
  std::memcpy(&warp.slot[generation & 1][lane], &value, sizeof(T));
  warp.arrived |= 1u << lane;
  device.progress++;
  if (warp.arrived == 0xffffffff) {
    warp.arrived = 0;
    warp.generation++;
  } else {
    while (warp.generation == generation) yield();
  }
  std::memcpy(&value, &warp.slot[generation & 1][from], sizeof(T));
  return value;
}

template <typename T>
T& shared() {
  if (!device.shared) {
    device.shared.reset(new unsigned char[sizeof(T)]);
    std::memset(device.shared.get(), 0xff, sizeof(T));  // NaN, in every floating type
  }
  return *reinterpret_cast<T*>(device.shared.get());
}

inline void run_block(const char* name) {
  const int count = device.threads;
  std::vector<int> order(count);
  for (int i = 0; i < count; i++) order[i] = device.order == Order::reverse ? count - 1 - i : i;
  while (device.alive) {
    const uint64_t before = device.progress;
    if (device.order == Order::shuffled)
      for (int i = count - 1; i > 0; i--) {
        device.random = device.random * 1664525u + 1013904223u;
        std::swap(order[i], order[(device.random >> 8) % (i + 1)]);
      }
    for (int next = 0; next < count;) {
      device.thread.x = order[next++];
      Fiber& fiber = device.fibers[device.thread.x];
      if (fiber.done) continue;
      if (!_setjmp(device.scheduler)) to_fiber(fiber);
      arrive(device.stack, nullptr);
    }
    if (device.alive && device.progress == before)
      throw std::runtime_error(std::string(name) + ": threads wait for others that never come, in block " +
                               std::to_string(device.block.x));
  }
}

template <typename F>
void launch(const char* name, int64_t blocks, int threads, F body) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || threads % 32)
    throw std::runtime_error(std::string(name) + ": a GPU would refuse this launch");
  device.threads = threads;
  device.body = body;
  if (int(device.fibers.size()) < threads) device.fibers.resize(threads);
  for (int64_t block = 0; block < blocks; block++) {
    device.block.x = block;
    device.alive = threads;
    device.waiting = 0;
    device.warps.assign(threads / 32, {});
    device.shared.reset();
    for (Fiber& fiber : device.fibers) fiber.started = fiber.done = false, fiber.stack.shadow = nullptr;
    run_block(name);
  }
}

// The function with its threads in the given order, as another function.
template <Order order, auto function>
struct Ordered;

template <Order order, typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Ordered<order, function> {
  static Result call(Arguments... arguments) {
    device.order = order;
    return function(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::device.thread)
#define blockIdx (cuda_on_host::device.block)

inline void __syncthreads() { cuda_on_host::barrier(); }

template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

inline uint4 __ldcs(const uint4* from) { return *from; }

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_host::exchange(value, from);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return cuda_on_host::exchange(value, (cuda_on_host::device.thread.x % 32) ^ offset);
}
