// AddressSanitizer's interface, or nothing where the build is without it.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace sparse_rcnn::emulator {

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kAddressSanitizer = true;
inline void make_unaddressable(const void* address, size_t bytes) {
  __asan_poison_memory_region(address, bytes);
}
inline void make_addressable(const void* address, size_t bytes) {
  __asan_unpoison_memory_region(address, bytes);
}
#else
inline constexpr bool kAddressSanitizer = false;
inline void make_unaddressable(const void*, size_t) {}
inline void make_addressable(const void*, size_t) {}
#endif

}  // namespace sparse_rcnn::emulator
