#include "shared_memory.h"

#include <cstring>
#include <new>
#include <sstream>

#include "sanitizer.h"

namespace sparse_rcnn::emulator {

namespace {

constexpr std::align_val_t kAlignment{128};

// 16-bit words 0xffa5: a NaN in every floating-point type, so that reads out of bounds show too,
// and not what shared memory is usually poisoned with, so that a copy of poison is seen.
unsigned char fence_byte(size_t offset) { return offset % 2 == 0 ? 0xa5 : 0xff; }

}  // namespace

SharedMemory::SharedMemory() : arena_(static_cast<char*>(::operator new(kArena, kAlignment))) {}

SharedMemory::~SharedMemory() {
  make_addressable(arena_, kArena);
  ::operator delete(arena_, kAlignment);
}

void SharedMemory::begin_launch(size_t dynamic_bytes) {
  regions_ = {{nullptr, "dynamic shared memory", kDynamicStart, dynamic_bytes, kDynamicFence}};
  static_bytes_ = 0;
  make_addressable(arena_, kArena);
  for (size_t offset = 0; offset < kArena; ++offset) {
    arena_[offset] = static_cast<char>(fence_byte(offset));
  }
  make_unaddressable(arena_, kArena);
  make_addressable(arena_ + kDynamicStart, dynamic_bytes);
}

void SharedMemory::begin_block(int poison) {
  if (poison < 0) return;
  for (const Region& region : regions_) std::memset(arena_ + region.start, poison, region.bytes);
}

void* SharedMemory::static_array(const void* key, size_t bytes, size_t alignment, const char* name,
                                 int poison) {
  for (const Region& region : regions_) {
    if (region.key == key) return arena_ + region.start;
  }
  const Region& last = regions_.back();
  const size_t free = regions_.size() == 1 ? kStaticStart : last.start + last.bytes + kStaticFence;
  const size_t step = alignment < 16 ? 16 : alignment;
  const size_t start = (free + step - 1) / step * step;
  static_bytes_ += bytes;
  if (static_bytes_ > kStaticLimit || start + bytes + kStaticFence > kArena) return nullptr;
  regions_.push_back({key, std::string("the array '") + name + "'", start, bytes, kStaticFence});
  make_addressable(arena_ + start, bytes);
  if (poison >= 0) std::memset(arena_ + start, poison, bytes);
  return arena_ + start;
}

std::string SharedMemory::damage() const {
  if (kAddressSanitizer) return "";  // which has stopped at the write itself
  std::ostringstream text;
  for (const Region& region : regions_) {
    const size_t end = region.start + region.bytes;
    const auto search = [&](size_t from, size_t to) {
      for (size_t offset = from; offset < to; ++offset) {
        if (static_cast<unsigned char>(arena_[offset]) == fence_byte(offset)) continue;
        text << "written outside " << region.name << " (" << region.bytes << " bytes): ";
        offset < region.start ? text << region.start - offset << " bytes before its start"
                              : text << offset - end << " bytes after its end";
        return true;
      }
      return false;
    };
    if (search(end, end + region.fence) || search(region.start - region.fence, region.start)) break;
  }
  return text.str();
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
  const char* first = static_cast<const char*>(address);
  for (const Region& region : regions_) {
    const char* start = arena_ + region.start;
    if (first >= start && first + bytes <= start + region.bytes) return true;
  }
  return false;
}

}  // namespace sparse_rcnn::emulator
