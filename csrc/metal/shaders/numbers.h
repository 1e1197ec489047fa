// Elements of tensors whose type is known at run time only, as float and back.
#pragma once

#include "common/enums.h"
#include "metal/shaders/codec.h"

namespace lowbit {

// Without bfloat, so that everything that looks at one number at a time is the same on every GPU.
inline float bfloat16_value(ushort bits) { return as_type<float>(uint(bits) << 16); }

// By its bits: a compiler that is told to expect no NaN cannot drop it.
inline bool is_nan(float value) { return (as_type<uint>(value) & 0x7fffffffu) > 0x7f800000u; }

// To nearest even; a NaN stays one.
inline ushort bfloat16_bits(float value) {
  const uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return ushort((bits >> 16) | 0x40u);
  return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Eight exponents' difference to half, hence the factor; the two codes of all ones are NaN (OCP OFP8 v1.0).
inline float fp8_e4m3_value(uint code) {
  const half magnitude = as_type<half>(ushort((code & 0x7fu) << 7)) * half(256.0f);
  const float value = (code & 0x7fu) == 0x7fu ? NAN : float(magnitude);
  return (code & 0x80u) != 0u ? -value : value;
}

inline float load_element(device const uchar* data, long index, Element type) {
  switch (type) {
    case Element::kFloat32:
      return ((device const float*)data)[index];
    case Element::kFloat16:
      return float(((device const half*)data)[index]);
    case Element::kBFloat16:
      return bfloat16_value(((device const ushort*)data)[index]);
    case Element::kInt8:
      return float(((device const char*)data)[index]);
    default:
      return fp8_e4m3_value(data[index]);
  }
}

inline void store_element(device uchar* data, long index, float value, Element type) {
  switch (type) {
    case Element::kFloat32:
      ((device float*)data)[index] = value;
      break;
    case Element::kFloat16:
      ((device half*)data)[index] = half(value);
      break;
    default:
      ((device ushort*)data)[index] = bfloat16_bits(value);
      break;
  }
}

// The number that a code of any format stands for.
inline float code_value(uint code, Format format) {
  switch (format) {
    case Format::kFp8E4m3:
      return fp8_e4m3_value(code);
    case Format::kFp8E5m2:
      return float(as_type<half>(ushort(code << 8)));
    case Format::kFp4E2m1:
      return float(as_type<half>(ushort((code & 8u) << 12 | (code & 7u) << 9)) * half(16384.0f));
    case Format::kNf4:
      return kNf4[code];
    case Format::kIq4Nl:
      return kIq4Nl[code];
    case Format::kBnbFp4:
      return kBnbFp4[code];
    default:
      return float(code);
  }
}

}  // namespace lowbit
