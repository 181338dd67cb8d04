// Races between a kernel's threads: two accesses to a byte, one of them a write, that no barrier
// puts in order. Blocks are never in order; threads of a block are by __syncthreads(), lanes of a
// warp by __syncwarp() too; atomic accesses do not race with each other.
//
// It needs SPARSE_RCNN_RACES defined and the .cu files compiled (nothing linked) with
// -fsanitize=thread: the compiler then calls the functions at the end of races.cpp wherever memory
// is accessed. Unlike wrong values, a race is found in whatever order the threads ran, and where
// every order is right on the CPU too, as for `*sum += x` in place of an atomicAdd.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

namespace sparse_rcnn::emulator {

enum class Access : uint8_t { read, write, atomic };

#ifdef SPARSE_RCNN_RACES
inline constexpr bool kRaces = true;

// An access by the thread that runs, at the instruction `code`: it does not return if it is a race.
void check_access(const void* address, size_t bytes, Access access, const void* code);
// One at the place of the call: of those that the compiler does not see as what they are.
void note_access(const void* address, size_t bytes, Access access);
void pause_checks(bool pause);

// In its lifetime accesses are not checked.
struct Unchecked {
  Unchecked() { pause_checks(true); }
  ~Unchecked() { pause_checks(false); }
};
#else
inline constexpr bool kRaces = false;
inline void check_access(const void*, size_t, Access, const void*) {}
inline void note_access(const void*, size_t, Access) {}
struct Unchecked {
  Unchecked() {}  // not trivial: else unused variables are warned about
};
#endif

// Who accesses memory, and when.
struct Accessor {
  uint32_t block;       // counted from the first launch on
  uint16_t barriers;    // of the block until then
  uint16_t warp_syncs;  // of the warp after those
  uint16_t thread;      // in the block
};

// What is known of every byte's past.
class RaceDetector {
 public:
  // What blocks before this one did, those of earlier launches, races with nothing.
  void begin_launch(uint32_t first_block);

  // The race that an access makes, in words; empty if none. `shared`: the block's own memory.
  std::string check(const void* address, size_t bytes, Access access, Accessor now,
                    const void* code, bool shared);

 private:
  // Readers since the last barrier, beside the one on record.
  enum class Others : uint8_t { none, lanes, warps, blocks };

  struct Record {
    Accessor who;
    Access access;
    Others others;
    int32_t code;  // 0: nothing is on record
  };

  struct Byte {
    Record read{}, write{};
  };

  static constexpr size_t kPage = 1024;       // bytes that are neighbours on record
  static constexpr size_t kMostPages = 8192;  // that outlive a launch

  Byte& at(uintptr_t place);
  bool current(const Record& past, const Accessor& now, bool shared) const;
  static bool ordered(const Record& past, const Accessor& now);
  Others other_readers(const Record& past, const Accessor& now, bool shared) const;

  uint32_t first_block_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages_;
  uintptr_t last_page_ = 0;
  Byte* last_bytes_ = nullptr;
};

}  // namespace sparse_rcnn::emulator
