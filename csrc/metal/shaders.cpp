#include "metal/shaders.h"

#include <cstring>

#include "formats/format_table.h"

namespace lowbit::metal {
namespace {

const char* enumerator_of(Format format) {
  switch (format) {
    case Format::kInt2:
      return "kInt2";
    case Format::kInt3:
      return "kInt3";
    case Format::kInt4:
      return "kInt4";
    case Format::kInt5:
      return "kInt5";
    case Format::kInt6:
      return "kInt6";
    case Format::kInt8:
      return "kInt8";
    case Format::kFp8E4m3:
      return "kFp8E4m3";
    case Format::kFp8E5m2:
      return "kFp8E5m2";
    case Format::kFp4E2m1:
      return "kFp4E2m1";
    case Format::kNf4:
      return "kNf4";
    case Format::kIq4Nl:
      return "kIq4Nl";
    case Format::kBnbFp4:
      return "kBnbFp4";
  }
  fail("format=", static_cast<int>(format), " has no shaders");
}

const char* type_of(Element element) {
  switch (element) {
    case Element::kFloat32:
      return "float";
    case Element::kFloat16:
      return "half";
    case Element::kBFloat16:
      return "bfloat";
    default:
      fail("no shader computes in 8 bits");
  }
}

}  // namespace

const char* name_of(Shader shader) {
  static const char* const names[kShaderCount] = {"stream",
                                                  "matrix",
                                                  "matrix_exact",
                                                  "grad",
                                                  "general",
                                                  "dequantize",
                                                  "pack",
                                                  "quantize",
                                                  "quantize_search",
                                                  "quantize_activation",
                                                  "prepare_rows"};
  return names[static_cast<int>(shader)];
}

const char* element_name(Element element) {
  return element == Element::kFloat32 ? "f32" : element == Element::kFloat16 ? "f16" : "bf16";
}

std::string source_of(const Variant& v) {
  std::string text;
  if (v.format != Format(0)) {
    const FormatInfo& info = format_info(v.format);
    text += concat("#define LOWBIT_FORMAT ::lowbit::Format::", enumerator_of(v.format),
                   "\n#define LOWBIT_FORMAT_NAME \"", info.name,
                   "\"\n#define LOWBIT_FORMAT_IS_INTEGER ", info.is_integer ? 1 : 0, "\n");
  }
  if (v.has_element) {
    text += concat("#define LOWBIT_ELEMENT ", type_of(v.element),
                   "\n#define LOWBIT_ELEMENT_NAME \"", element_name(v.element), "\"\n");
  }
  for (int i = 0; i < kShaderSourceCount; ++i) {
    if (std::strcmp(kShaderSources[i].name, name_of(v.shader)) == 0)
      return text + kShaderSources[i].text;
  }
  fail("this build has no source of the shader ", name_of(v.shader));
}

std::vector<std::pair<std::string, std::string>> shader_sources() {
  std::vector<std::pair<std::string, std::string>> all;
  for (int i = 0; i < kShaderSourceCount; ++i)
    all.emplace_back(kShaderSources[i].name, kShaderSources[i].text);
  return all;
}

}  // namespace lowbit::metal
