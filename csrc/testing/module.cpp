// Python's handle on the emulator: importing it registers the operators of csrc/cuda as
// torch.ops.sparse_rcnn_emulated.*, which take CPU tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "emulator.h"
#include "races.h"
#include "sanitizer.h"

namespace {

namespace py = pybind11;
namespace emulator = sparse_rcnn::emulator;

py::dict statistics() {
  const emulator::Statistics& now = emulator::statistics();
  py::dict result;
  result["launches"] = now.launches;
  result["blocks"] = now.blocks;
  result["threads"] = now.threads;
  result["barriers"] = now.barriers;
  result["warp_operations"] = now.warp_operations;
  result["mma"] = now.mma;
  result["ldmatrix"] = now.ldmatrix;
  result["ldmatrix_conflicts"] = now.ldmatrix_conflicts;
  result["cp_async_bytes"] = now.cp_async_bytes;
  result["shared_bytes"] = now.shared_bytes;
  return result;
}

void set_poison(std::optional<uint8_t> byte) { emulator::set_poison(byte ? *byte : -1); }

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.def("set_seed", &emulator::set_seed, py::arg("seed"),
        "Fix the order of blocks and threads from here on.");
  m.def("set_poison", &set_poison, py::arg("byte"),
        "The byte that shared memory starts with (0xff: NaN); None: what was there before.");
  m.def("statistics", &statistics, "What the kernels did since reset_statistics().");
  m.def("reset_statistics", [] { emulator::statistics() = {}; });
  m.attr("address_sanitizer") = emulator::kAddressSanitizer;
  m.attr("races") = emulator::kRaces;
}
