// `lowbit._C`: importing it loads liblowbit_ops, which registers the ops; beyond that, introspection. No torch here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/desc.h"
#include "common/explain.h"
#include "common/introspect.h"
#include "common/strict.h"
#include "cpu/isa.h"
#include "cuda/choice.h"
#include "cuda/select.h"
#include "metal/launcher.h"
#include "metal/select.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

py::list format_table() {
  py::list rows;
  for (const lowbit::FormatRow& row : lowbit::list_formats()) {
    rows.append(py::dict("id"_a = row.id, "name"_a = row.name, "bits"_a = row.bits,
                         "kind"_a = row.is_integer ? "int" : "code", "max"_a = row.max,
                         "code"_a = row.code));
  }
  return rows;
}

py::list scale_table() {
  py::list rows;
  for (const lowbit::ScaleRow& row : lowbit::list_scales()) {
    rows.append(py::dict("id"_a = row.id, "name"_a = row.name, "bits"_a = row.bits,
                         "needs_super"_a = row.needs_super, "code"_a = row.code));
  }
  return rows;
}

py::dict enums() {
  py::dict all;
  for (const auto& [name, values] : lowbit::list_enums()) {
    py::dict one;
    for (const auto& [key, value] : values) one[py::str(key)] = value;
    all[py::str(name)] = one;
  }
  return all;
}

int64_t make_desc(int format, int64_t group_size, int zero_kind, int scale_dtype, int scaling,
                  bool has_perm, int layout, int super_dtype, int64_t super_groups) {
  return lowbit::encode_desc(
      {static_cast<lowbit::Format>(format), static_cast<lowbit::ZeroKind>(zero_kind),
       static_cast<lowbit::ScaleDtype>(scale_dtype), static_cast<lowbit::Scaling>(scaling),
       has_perm, static_cast<lowbit::Layout>(layout), group_size,
       static_cast<lowbit::ScaleDtype>(super_dtype), super_groups});
}

py::dict parse_desc(int64_t desc) {
  const lowbit::Desc d = lowbit::decode_desc(desc);
  return py::dict(
      "format"_a = static_cast<int>(d.format), "group_size"_a = d.group_size,
      "zero_kind"_a = static_cast<int>(d.zero_kind),
      "scale_dtype"_a = static_cast<int>(d.scale_dtype), "scaling"_a = static_cast<int>(d.scaling),
      "has_perm"_a = d.has_perm, "layout"_a = static_cast<int>(d.layout),
      "super_dtype"_a = static_cast<int>(d.super_dtype), "super_groups"_a = d.super_groups);
}

py::tuple as_tuple(const std::vector<int64_t>& shape) {
  py::tuple result(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) result[i] = shape[i];
  return result;
}

py::dict canonical_shapes(int64_t N, int64_t K, int64_t desc) {
  const lowbit::CanonicalShapes shapes = lowbit::canonical_shapes(N, K, desc);
  const auto optional = [](const std::vector<int64_t>& shape) -> py::object {
    return shape.empty() ? py::object(py::none()) : py::object(as_tuple(shape));
  };
  return py::dict("packed"_a = as_tuple(shapes.packed), "scales"_a = as_tuple(shapes.scales),
                  "zeros"_a = optional(shapes.zeros), "perm"_a = optional(shapes.perm),
                  "super_scales"_a = optional(shapes.super_scales),
                  "super_zeros"_a = optional(shapes.super_zeros));
}

py::list kernel_table(bool compiled) {
  py::list rows;
  for (const lowbit::KernelInfo& row : lowbit::list_kernels(compiled)) {
    rows.append(py::dict("backend"_a = row.backend, "op"_a = row.op, "name"_a = row.name,
                         "isa"_a = row.isa, "general"_a = row.general, "takes"_a = row.takes));
  }
  return rows;
}

py::list explain(const std::string& op, const std::string& device, int64_t M, int64_t N, int64_t K,
                 int64_t desc, const std::string& dtype, int64_t flags) {
  py::list rows;
  for (const lowbit::Verdict& verdict : lowbit::explain(op, device, M, N, K, desc, dtype, flags))
    rows.append(py::make_tuple(verdict.kernel, verdict.reason));
  return rows;
}

// Some names belong to kernels of both; what neither knows, CUDA's table refuses.
void force_kernel(const std::string& name) {
  const bool is_metal = lowbit::metal::force_kernel(name);
  bool is_cuda = false;
  for (const lowbit::KernelInfo& row : lowbit::list_kernels(true))
    is_cuda = is_cuda || (row.backend == "cuda" && row.name == name);
  lowbit::cuda::force_kernel(is_metal && !is_cuda ? "" : name);
}

void set_metal_launcher(uintptr_t compile, uintptr_t launch) {
  lowbit::metal::set_launcher(
      {reinterpret_cast<decltype(lowbit::metal::Launcher::compile)>(compile),
       reinterpret_cast<decltype(lowbit::metal::Launcher::launch)>(launch)});
}

py::dict cpu_features() {
  py::dict features;
  for (const auto& [name, present] : lowbit::cpu_features()) features[py::str(name)] = present;
  return features;
}

py::dict isa_refusals() {
  py::dict refusals;
  for (const auto& [level, reason] : lowbit::isa_refusals()) refusals[py::str(level)] = reason;
  return refusals;
}

void set_extra_isa(const std::string& name, uintptr_t tile_kernels) {
  lowbit::set_extra_isa(name, reinterpret_cast<const lowbit::AmxKernels*>(tile_kernels));
}

py::dict build_info() {
  py::dict info;
  for (const auto& [name, value] : lowbit::build_info()) info[py::str(name)] = value;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "lowbit's compiled side: registers torch.ops.lowbit on import, and answers questions about "
      "formats, layouts and kernels.";
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const lowbit::Error& found) {
      PyErr_SetString(PyExc_ValueError, found.what());
    }
  });
  m.def("format_table", &format_table, "Every weight format: id, name, bits, kind, max, code.");
  m.def("scale_table", &scale_table, "Every dtype of scales: id, name, bits, needs_super, code.");
  m.def("enums", &enums, "The enumerations in desc and flags, by name.");
  m.def("make_desc", &make_desc, "format"_a, "group_size"_a, "zero_kind"_a, "scale_dtype"_a,
        "scaling"_a, "has_perm"_a, "layout"_a, "super_dtype"_a = 0, "super_groups"_a = 0,
        "The int that tells an op what a weight is. ValueError where no such weight exists.");
  m.def("parse_desc", &parse_desc, "desc"_a, "The fields of a desc.");
  m.def("canonical_shapes", &canonical_shapes, "N"_a, "K"_a, "desc"_a,
        "Shapes of the canonical tensors; None where there is none.");
  m.def("packed_size", &lowbit::packed_size, "N"_a, "K"_a, "desc"_a,
        "Bytes of a weight in desc's kernel layout.");
  m.def("workspace_size", &lowbit::workspace_size, "op"_a, "M"_a, "N"_a, "K"_a, "desc"_a,
        "device"_a = "", "Bytes of workspace for an out variant.");
  m.def("preferred_layout", &lowbit::preferred_layout, "device_type"_a, "desc"_a,
        "The kernel layout of a device, as the int in desc.");
  m.def(
      "metal_model",
      [](const std::string& chip) {
        return lowbit::metal::model_name(chip.empty() ? lowbit::metal::this_device()
                                                      : lowbit::metal::chip_model(chip));
      },
      "chip"_a = "",
      "This machine's Apple GPU, or that of a chip such as 'Apple M3 Max', as explain() takes it.");
  m.def("has_metal_interface", &lowbit::metal::has_metal_interface,
        "Whether this torch has the C interface that the Metal kernels are started through.");
  m.def("set_metal_launcher", &set_metal_launcher, "compile"_a, "launch"_a,
        "Start Metal kernels by these C functions (csrc/metal/launcher.h); two zeros: by torch's.");
  m.def("cpu_features", &cpu_features, "What this CPU offers.");
  m.def("isa", &lowbit::current_isa, "The instruction set that the CPU kernels use.");
  m.def("isa_levels", &lowbit::isa_levels, "Instruction sets this machine can run, best first.");
  m.def("set_isa", &lowbit::set_isa, "name"_a,
        "Use another instruction set from now on, in every thread.");
  m.def("isa_refusals", &isa_refusals,
        "Instruction sets that this build has and this machine cannot run, with the reason, where "
        "it is not plain from "
        "cpu_features.");
  m.def("set_extra_isa", &set_extra_isa, "name"_a, "tile_kernels"_a,
        "For tests: add a level that runs only when named, with the AmxKernels at this address; 0 "
        "removes it.");
  m.def("strict", &lowbit::strict, "Whether picking a general kernel is an error.");
  m.def("set_strict", &lowbit::set_strict, "on"_a, "Set what LOWBIT_STRICT sets.");
  m.def("build_info", &build_info, "Version, compiler, flags, ABI target.");
  m.def("kernel_table", &kernel_table, "compiled"_a = false,
        "One row per kernel and instruction set of this machine, or of this build, and per CUDA "
        "and Metal kernel.");
  m.def("explain", &explain, "op"_a, "device"_a, "M"_a, "N"_a, "K"_a, "desc"_a, "dtype"_a,
        "flags"_a,
        "Kernels in order of preference, each with why it was refused; '' for the one that runs.");
  m.def("describe_config", &lowbit::describe_config, "op"_a, "device"_a, "M"_a, "N"_a, "K"_a,
        "desc"_a, "dtype"_a, "flags"_a,
        "How the chosen kernel cuts the problem into tiles, steps and blocks; '' on the CPU.");
  m.def(
      "force_kernel", &force_kernel, "name"_a,
      "Run this CUDA or Metal kernel wherever it can, until called with ''. For tests and sweeps.");
  m.def("load_tuning", &lowbit::cuda::load_tuning, "text"_a,
        "Take this table of bench/sweep.py instead of the one that is built in; \"\" ends it.");
  m.def("forced_kernel", &lowbit::cuda::forced_kernel, "What force_kernel or LOWBIT_KERNEL said.");
}
