// Runs blocks of fibers: who goes next, and what the threads of a warp or block wait for.
#include "emulator.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"
#include "races.h"
#include "random.h"
#include "shared_memory.h"

namespace sparse_rcnn {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

namespace {

// Where threads wait for each other.
struct Site {
  const char* what = nullptr;
  Where where;
  const std::type_info* type = nullptr;

  bool operator==(const Site& other) const {
    return where.line() == other.where.line() && where.column() == other.where.column() &&
           same(what, other.what) && same(where.file_name(), other.where.file_name()) &&
           (type == other.type || *type == *other.type);
  }

  // Mostly the same literal, which two object files may each have a copy of.
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

  std::string text() const {
    return std::string(what) + " at " + where.file_name() + ":" + std::to_string(where.line());
  }
};

// A cp.async under way, in the group that was open when it started.
struct Copy {
  void* shared;
  const void* global;
  bool valid;
  int group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t number;  // in the block
  std::vector<Copy> copies;
  int open_group;
};

struct Warp {
  uint32_t ready;   // lanes that can go on
  uint32_t joined;  // lanes that wait in a warp operation
  Site operation;   // which one
  uint32_t syncs;   // __syncwarp() since the block's last barrier
  std::array<void*, warpSize> operands;
};

// How warps advance against each other.
enum class Pace { ahead, interrupted, together };

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr size_t kCopyBytes = 16;

void enter_thread();

class Device {
 public:
  void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
  void run_threads();
  void block_barrier(Where where);
  void* const* join_warp(void* operand, const std::type_info& type, const char* what, Where where);
  void leave_warp();

  void set_seed(uint64_t seed) {
    random_.seed(seed);
    started_blocks_ = 0;
  }
  Thread& current() { return *current_; }
  [[maybe_unused]] void check_access(const void* address, size_t bytes, Access access,
                                     const void* code);

  Statistics statistics{};
  int poison = 0xff;
  SharedMemory shared;
  bool checks_paused = false;

 private:
  void check_launch(dim3 grid, dim3 block, size_t shared_bytes);
  void prepare_threads(dim3 block);
  void run_block();
  void make_all_ready();
  Thread* next_ready();
  void reschedule();
  std::string who_waits() const;

  std::mutex mutex_;
  Random random_;
  Fiber host_;
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as any block had
  std::vector<Warp> warps_;                       // of this launch
  std::vector<uint32_t> warp_order_;
  uint32_t ready_warps_ = 0;
  Pace pace_ = Pace::ahead;
  uint64_t started_blocks_ = 0;  // since set_seed()
  uint64_t block_barriers_ = 0;  // of this block
  uint32_t block_number_ = 0;    // of this block, since the process began
  uint32_t count_ = 0, ended_ = 0, at_barrier_ = 0;
  Site barrier_;
  Thread* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;  // empty while there is none
  RaceDetector races_;
};

Device& device() {
  static Device device;
  return device;
}

// ------------------------------------------------------------------------------------------------
// Grids and blocks
// ------------------------------------------------------------------------------------------------

void Device::check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  std::ostringstream text;
  if (count == 0 || count > 1024 || count % warpSize != 0) {
    text << "a block of " << count << " threads: expected a multiple of 32, at most 1024";
  } else if (block.z > 64) {
    text << "block.z is " << block.z << ": at most 64";
  } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    text << "a grid of " << grid.x << "x" << grid.y << "x" << grid.z
         << ": at most 2147483647x65535x65535";
  } else if (shared_bytes > SharedMemory::kLimit) {
    text << shared_bytes << " bytes of dynamic shared memory: at most " << SharedMemory::kLimit;
  }
  if (!text.str().empty()) fail(text.str());
}

void Device::prepare_threads(dim3 block) {
  count_ = block.x * block.y * block.z;
  while (threads_.size() < count_) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->number = static_cast<uint32_t>(threads_.size() - 1);
    threads_.back()->fiber.start(enter_thread);
  }
  for (uint32_t i = 0; i < count_; ++i) {
    threads_[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  warps_.resize(count_ / warpSize);
  warp_order_.resize(warps_.size());
  std::iota(warp_order_.begin(), warp_order_.end(), 0u);
}

void Device::run_grid(dim3 grid, dim3 block, size_t shared_bytes,
                      const std::function<void()>& kernel) {
  check_launch(grid, block, shared_bytes);
  const std::lock_guard lock(mutex_);
  prepare_threads(block);
  gridDim = grid;
  blockDim = block;
  kernel_ = &kernel;
  shared.begin_launch(shared_bytes);
  statistics.launches += 1;
  races_.begin_launch(block_number_ + 1);

  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  random_.shuffle(blocks);
  for (const uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
  }
}

void Device::run_block() {
  shared.begin_block(poison);
  for (Warp& warp : warps_) warp.joined = 0;
  for (uint32_t i = 0; i < count_; ++i) {
    threads_[i]->copies.clear();
    threads_[i]->open_group = 0;
  }
  ended_ = at_barrier_ = 0;
  block_barriers_ = 0;
  make_all_ready();
  started_blocks_ += 1;
  block_number_ += 1;
  current_ = next_ready();
  threadIdx = current_->index;
  host_.switch_to(current_->fiber);
  current_ = nullptr;

  statistics.blocks += 1;
  statistics.threads += count_;
  statistics.shared_bytes = std::max<uint64_t>(statistics.shared_bytes, shared.bytes());
  if (!error_.empty()) {  // threads stand where it found them
    for (uint32_t i = 0; i < count_; ++i) threads_[i]->fiber.start(enter_thread);
  } else {
    error_ = shared.damage();
  }
  if (error_.empty()) return;
  std::ostringstream text;
  text << "emulated kernel, block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
       << "): " << std::exchange(error_, "");
  throw std::runtime_error(text.str());
}

// ------------------------------------------------------------------------------------------------
// Threads
// ------------------------------------------------------------------------------------------------

// Warps come in a new random order. What one does is then compared with others before, after and in
// the middle of it: by turns each runs as far as it can before the next one starts, or does so but
// for a few changes of mind, or all advance together. Of two blocks one begins in the first way.
void Device::make_all_ready() {
  constexpr Pace kTurns[] = {Pace::ahead, Pace::interrupted, Pace::ahead, Pace::together};
  for (Warp& warp : warps_) {
    warp.ready = kAllLanes;
    warp.syncs = 0;
  }
  ready_warps_ = static_cast<uint32_t>((uint64_t{1} << warps_.size()) - 1);
  random_.shuffle(warp_order_);
  pace_ = kTurns[(started_blocks_ + block_barriers_) % std::size(kTurns)];
}

// A random lane of the warp whose turn it is, or null.
Thread* Device::next_ready() {
  if (ready_warps_ == 0) return nullptr;
  const uint32_t count = static_cast<uint32_t>(warps_.size());
  const uint32_t first = pace_ == Pace::together ? random_.below(count) : 0;
  if (pace_ == Pace::interrupted && random_.below(warpSize) == 0) random_.shuffle(warp_order_);
  uint32_t place = first;
  while ((ready_warps_ >> warp_order_[place] & 1) == 0) place = place + 1 < count ? place + 1 : 0;
  const uint32_t chosen = warp_order_[place];
  Warp& warp = warps_[chosen];
  const int turn = static_cast<int>(random_.below(warpSize));
  const uint32_t lane = (std::countr_zero(std::rotr(warp.ready, turn)) + turn) % warpSize;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps_ &= ~(1u << chosen);
  return threads_[chosen * warpSize + lane].get();
}

// Leaves the running thread, which waits or is ready itself, for the next.
void Device::reschedule() {
  Thread* next = next_ready();
  Thread* self = current_;
  if (next == self) return;
  if (next == nullptr) {
    if (ended_ < count_) error_ = "not all threads reach a barrier: " + who_waits();
    self->fiber.switch_to(host_);
    return;
  }
  current_ = next;
  threadIdx = next->index;
  self->fiber.switch_to(next->fiber);
}

std::string name_of(uint3 thread) {
  std::ostringstream text;
  text << "thread (" << thread.x << ", " << thread.y << ", " << thread.z << "): ";
  return text.str();
}

// The life of a fiber: one thread after the other, a block each.
void Device::run_threads() {
  current_->fiber.entered();
  for (;;) {
    try {
      (*kernel_)();
    } catch (const std::exception& error) {
      error_ = name_of(threadIdx) + error.what();
    }
    if (!error_.empty()) current_->fiber.switch_to(host_);  // for good
    ++ended_;
    reschedule();
  }
}

void enter_thread() { device().run_threads(); }

std::string Device::who_waits() const {
  std::ostringstream text;
  text << ended_ << " of " << count_ << " threads have returned";
  if (at_barrier_ > 0) text << ", " << at_barrier_ << " wait in " << barrier_.text();
  for (size_t i = 0; i < warps_.size(); ++i) {
    if (warps_[i].joined == 0) continue;
    text << ", " << std::popcount(warps_[i].joined) << " of warp " << i << " wait in "
         << warps_[i].operation.text();
  }
  return text.str();
}

// ------------------------------------------------------------------------------------------------
// Barriers and warp operations
// ------------------------------------------------------------------------------------------------

void Device::block_barrier(Where where) {
  const Site site{"__syncthreads", where, &typeid(void)};
  if (at_barrier_ == 0) {
    barrier_ = site;
  } else if (!(site == barrier_)) {
    fail("divergent barrier: it is in " + site.text() + ", others are in " + barrier_.text());
  }
  if (++at_barrier_ == count_) {
    at_barrier_ = 0;
    statistics.barriers += 1;
    block_barriers_ += 1;
    make_all_ready();
  }
  reschedule();
}

void* const* Device::join_warp(void* operand, const std::type_info& type, const char* what,
                               Where where) {
  Warp& warp = warps_[current_->number / warpSize];
  const uint32_t lane = current_->number % warpSize;
  const Site site{what, where, &type};
  if (warp.joined == 0) {
    warp.operation = site;
  } else if (!(site == warp.operation)) {
    fail("divergent warp: it is in " + site.text() + ", others are in " + warp.operation.text());
  }
  warp.operands[lane] = operand;
  warp.joined |= 1u << lane;
  if (warp.joined == kAllLanes) return warp.operands.data();
  reschedule();
  return nullptr;
}

// The lane that came last goes on first.
void Device::leave_warp() {
  const uint32_t number = current_->number / warpSize;
  warps_[number].joined = 0;
  warps_[number].syncs += std::strcmp(warps_[number].operation.what, "__syncwarp") == 0;
  warps_[number].ready = kAllLanes & ~(1u << current_->number % warpSize);
  ready_warps_ |= 1u << number;
  statistics.warp_operations += 1;
}

// ------------------------------------------------------------------------------------------------
// Races
// ------------------------------------------------------------------------------------------------

void Device::check_access(const void* address, size_t bytes, Access access, const void* code) {
  if (current_ == nullptr || checks_paused || current_->fiber.owns(address)) return;
  const uint32_t number = current_->number;
  const Accessor now{block_number_, static_cast<uint16_t>(block_barriers_),
                     static_cast<uint16_t>(warps_[number / warpSize].syncs),
                     static_cast<uint16_t>(number)};
  const std::string race =
      races_.check(address, bytes, access, now, code, shared.contains(address, bytes));
  if (race.empty()) return;
  error_ = name_of(threadIdx) + race;
  current_->fiber.switch_to(host_);  // for good: the callers are not prepared for exceptions
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// What emulator.h declares
// ------------------------------------------------------------------------------------------------

void fail(const std::string& message) { throw std::runtime_error(message); }

Statistics& statistics() { return device().statistics; }
void set_seed(uint64_t seed) { device().set_seed(seed); }
void set_poison(int byte) { device().poison = byte; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  device().run_grid(grid, block, shared_bytes, kernel);
}

void block_barrier(Where where) { device().block_barrier(where); }

void* const* join_warp(void* operand, const std::type_info& type, const char* what, Where where) {
  return device().join_warp(operand, type, what, where);
}

void leave_warp() { device().leave_warp(); }

#ifdef SPARSE_RCNN_RACES
void check_access(const void* address, size_t bytes, Access access, const void* code) {
  device().check_access(address, bytes, access, code);
}

void note_access(const void* address, size_t bytes, Access access) {
  device().check_access(address, bytes, access, __builtin_return_address(0));
}

void pause_checks(bool pause) { device().checks_paused = pause; }
#endif

void* dynamic_shared() { return device().shared.dynamic(); }

void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name) {
  SharedMemory& shared = device().shared;
  void* array = shared.static_array(key, bytes, alignment, name, device().poison);
  if (array == nullptr || shared.bytes() > SharedMemory::kLimit) {
    fail(std::string("no room for the shared array '") + name + "': with it " +
         std::to_string(shared.static_bytes()) + " bytes are static (at most " +
         std::to_string(SharedMemory::kStaticLimit) + ") and " + std::to_string(shared.bytes()) +
         " in all (at most " + std::to_string(SharedMemory::kLimit) + ")");
  }
  return array;
}

void check_shared(const void* address, size_t bytes, const char* what) {
  if (!device().shared.contains(address, bytes)) {
    fail(std::string(what) + ": the address is not in shared memory");
  }
}

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("an address is not a multiple of " + std::to_string(alignment));
  }
}

void cp_async(void* shared, const void* global, bool valid) {
  check_shared(shared, kCopyBytes, "cp.async");
  check_alignment(shared, kCopyBytes);
  check_alignment(global, kCopyBytes);
  const void* const code = __builtin_return_address(0);
  if (valid) check_access(global, kCopyBytes, Access::read, code);
  check_access(shared, kCopyBytes, Access::write, code);
  Thread& thread = device().current();
  if (device().poison >= 0) std::memset(shared, device().poison, kCopyBytes);
  thread.copies.push_back({shared, global, valid, thread.open_group});
  statistics().cp_async_bytes += valid ? kCopyBytes : 0;
}

void cp_async_commit() { ++device().current().open_group; }

void cp_async_wait(int pending) {
  Thread& thread = device().current();
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < thread.open_group - pending; ++copy) {
    check_access(copy->shared, kCopyBytes, Access::write, __builtin_return_address(0));
    if (copy->valid) {
      std::memcpy(copy->shared, copy->global, kCopyBytes);
    } else {
      std::memset(copy->shared, 0, kCopyBytes);
    }
  }
  thread.copies.erase(thread.copies.begin(), copy);
}

}  // namespace emulator
}  // namespace sparse_rcnn
