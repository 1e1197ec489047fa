// Sources of shaders, as the build has embedded them (cmake/embed_shaders.py): one string per .metal file, its headers in it.
#pragma once

#include <string>
#include <vector>

#include "common/check.h"
#include "common/enums.h"

namespace lowbit::metal {

struct ShaderSource {
  const char* name;  // of the file, without its folder and ".metal"
  const char* text;
};
extern const ShaderSource kShaderSources[];
extern const int kShaderSourceCount;

// The .metal files, in this order in no list but this one.
enum class Shader : int {
  kStream,
  kMatrix,
  kMatrixExact,
  kGrad,
  kGeneral,
  kDequantize,
  kPack,
  kQuantize,
  kQuantizeSearch,
  kQuantizeActivation,
  kPrepareRows
};
inline constexpr int kShaderCount = 11;
const char* name_of(Shader shader);

// What a source is compiled for; `format` 0 and `has_element` false where a shader asks for neither.
struct Variant {
  Shader shader;
  Format format;  // Format(0): none
  bool has_element;
  Element element;
};

const char* element_name(Element element);  // f32, f16, bf16

// What the host hands to Metal's compiler. Throws Error where no such file was embedded.
std::string source_of(const Variant& variant);

// Every .metal file as (name, source), for Python's fallback (torch.mps.compile_shader).
LOWBIT_API std::vector<std::pair<std::string, std::string>> shader_sources();

}  // namespace lowbit::metal
