#include "races.h"

#include <dlfcn.h>

#include <cstdio>
#include <sstream>

namespace sparse_rcnn::emulator {

namespace {

constexpr int kWarp = 32;

// Instructions are kept as distances from here.
const char* code_base() { return reinterpret_cast<const char*>(&code_base); }

// The lines that an instruction comes from, if the build has line numbers and binutils are at hand.
std::string source_of(const char* code) {
  Dl_info info{};
  if (dladdr(code, &info) == 0 || info.dli_fname == nullptr) return "?";
  std::ostringstream command;
  command << "addr2line -i -e '" << info.dli_fname << "' 0x" << std::hex
          << code - 1 - static_cast<const char*>(info.dli_fbase) << " 2>/dev/null";
  std::string lines;
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof(line), pipe) != nullptr) {
      const std::string text(line);
      lines += (lines.empty() ? "" : ", from ") + text.substr(0, text.find_first_of(" \n"));
    }
    pclose(pipe);
  }
  return lines.empty() ? info.dli_fname : lines;
}

const char* verb(Access access) {
  constexpr const char* kVerbs[] = {"reads", "writes", "updates atomically"};
  return kVerbs[static_cast<int>(access)];
}

bool same_warp(const Accessor& a, const Accessor& b) {
  return a.thread / kWarp == b.thread / kWarp;
}

}  // namespace

void RaceDetector::begin_launch(uint32_t first_block) {
  first_block_ = first_block;
  if (pages_.size() > kMostPages) {
    pages_.clear();
    last_bytes_ = nullptr;
  }
}

// Whether what is on record belongs to this launch, and to this block if memory is the block's.
bool RaceDetector::current(const Record& past, const Accessor& now, bool shared) const {
  return past.code != 0 && past.who.block >= first_block_ &&
         (!shared || past.who.block == now.block);
}

bool RaceDetector::ordered(const Record& past, const Accessor& now) {
  if (past.others == Others::blocks || past.who.block != now.block) return false;
  if (past.who.barriers != now.barriers) return true;
  if (past.others == Others::warps || !same_warp(past.who, now)) return false;
  if (past.who.warp_syncs != now.warp_syncs) return true;
  return past.others == Others::none && past.who.thread == now.thread;
}

// Who is left beside `now`, a reader, when it takes the place of `past`.
RaceDetector::Others RaceDetector::other_readers(const Record& past, const Accessor& now,
                                                 bool shared) const {
  if (!current(past, now, shared)) return Others::none;
  if (past.others == Others::blocks || past.who.block != now.block) return Others::blocks;
  if (past.who.barriers != now.barriers) return Others::none;
  if (past.others == Others::warps || !same_warp(past.who, now)) return Others::warps;
  if (past.who.warp_syncs != now.warp_syncs) return Others::none;
  return past.who.thread == now.thread ? past.others : Others::lanes;
}

RaceDetector::Byte& RaceDetector::at(uintptr_t place) {
  if (last_bytes_ == nullptr || place / kPage != last_page_) {
    std::unique_ptr<Byte[]>& page = pages_[place / kPage];
    if (!page) page = std::make_unique<Byte[]>(kPage);
    last_page_ = place / kPage;
    last_bytes_ = page.get();
  }
  return last_bytes_[place % kPage];
}

std::string RaceDetector::check(const void* address, size_t bytes, Access access, Accessor now,
                                const void* code, bool shared) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  const auto offset = static_cast<int32_t>(static_cast<const char*>(code) - code_base());
  const auto races = [&](const Record& past) {
    const bool both_atomic = past.access == Access::atomic && access == Access::atomic;
    return current(past, now, shared) && !both_atomic && !ordered(past, now);
  };
  for (uintptr_t place = first; place < first + bytes; ++place) {
    Byte& byte = at(place);
    const bool after_read = access != Access::read && races(byte.read);
    if (after_read || races(byte.write)) {
      const Record& past = after_read ? byte.read : byte.write;
      std::ostringstream text;
      text << "race: it " << verb(access) << (shared ? " shared" : " global") << " memory at "
           << source_of(static_cast<const char*>(code)) << ", which thread " << past.who.thread
           << (past.who.block == now.block ? "" : " of another block") << " " << verb(past.access)
           << " at " << source_of(code_base() + past.code) << ", and nothing orders the two";
      return text.str();
    }
    if (access == Access::read) {
      byte.read = {now, access, other_readers(byte.read, now, shared), offset};
    } else {
      byte.write = {now, access, Others::none, offset};
    }
  }
  return "";
}

}  // namespace sparse_rcnn::emulator

// ------------------------------------------------------------------------------------------------
// What -fsanitize=thread calls
// ------------------------------------------------------------------------------------------------

#ifdef SPARSE_RCNN_RACES

#define SPARSE_RCNN_ACCESS(name, bytes, access)                                          \
  void name(void* address) {                                                             \
    sparse_rcnn::emulator::check_access(address, bytes,                                  \
                                        sparse_rcnn::emulator::Access::access,           \
                                        __builtin_return_address(0));                    \
  }
#define SPARSE_RCNN_ACCESSES(bytes)                            \
  SPARSE_RCNN_ACCESS(__tsan_read##bytes, bytes, read)          \
  SPARSE_RCNN_ACCESS(__tsan_write##bytes, bytes, write)        \
  SPARSE_RCNN_ACCESS(__tsan_unaligned_read##bytes, bytes, read) \
  SPARSE_RCNN_ACCESS(__tsan_unaligned_write##bytes, bytes, write)

extern "C" {

SPARSE_RCNN_ACCESSES(1)
SPARSE_RCNN_ACCESSES(2)
SPARSE_RCNN_ACCESSES(4)
SPARSE_RCNN_ACCESSES(8)
SPARSE_RCNN_ACCESSES(16)

void __tsan_read_range(void* address, size_t bytes) {
  sparse_rcnn::emulator::check_access(address, bytes, sparse_rcnn::emulator::Access::read,
                                      __builtin_return_address(0));
}

void __tsan_write_range(void* address, size_t bytes) {
  sparse_rcnn::emulator::check_access(address, bytes, sparse_rcnn::emulator::Access::write,
                                      __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Host code: the guards of static variables, the counters of std::shared_ptr.
char __tsan_atomic8_load(const volatile char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

int __tsan_atomic32_fetch_add(volatile int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

}  // extern "C"

#endif
