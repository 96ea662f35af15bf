// Rows of keys and values in fewer bits, and back, for any compute type. Included by each variant.
//
// Plain loops that the variant's compiler turns into vectors. Nothing is summed and nothing fused, so that all variants
// give the same codes and the same numbers, bit for bit; `specdec/quant/kv.py` gives them in torch.
#pragma once
#include <math.h>

#include "linear.h"
#include "rounding.h"

namespace {

constexpr uint32_t kInfinite = 0x7f800000u;  // bits of a float's magnitude from which on it is infinite or no number
// E4M3: the largest exponent is 8, the bias 7, and the largest code 448; numbers below 2^-6 are multiples of 2^-9.
constexpr uint32_t kTopExponent = 8, kLargestCode = 0x7e;

// Both are computed: compilers turn a choice between numbers into a jump, and a loop with jumps into no vectors.
static INLINE uint32_t either(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - uint32_t(first);
  return (a & mask) | (b & ~mask);
}

// One scale per row: the largest magnitude becomes 127. A row that is not finite comes back as NaN throughout.
template <class T>
static void encode_int8(const void* row, int64_t size, void* codes, void* scales) {
  const T* from = static_cast<const T*>(row);
  int8_t* to = static_cast<int8_t*>(codes);
  const uint32_t bits = largest_of(from, size);
  if (bits >= kInfinite) {
    memset(to, 0, size);
    *static_cast<float*>(scales) = NAN;
    return;
  }
  const float top = float_of(bits) < kSmallest ? kSmallest : float_of(bits), factor = 127.f / top;
  for (int64_t i = 0; i < size; i++) to[i] = int8_t(bits_of(float(to_float(from[i])) * factor + kRounder));
  *static_cast<float*>(scales) = top / 127.f;
}

template <class T>
static void decode_int8(const void* codes, const void* scales, int64_t rows, int64_t size, void* out) {
  const int8_t* from = static_cast<const int8_t*>(codes);
  T* to = static_cast<T*>(out);
  for (int64_t r = 0; r < rows; r++, from += size, to += size) {
    const float scale = static_cast<const float*>(scales)[r];
    for (int64_t i = 0; i < size; i++) round_to(float(from[i]) * scale, to + i);
  }
}

// One scale 2^(byte - 127) per block, so that the largest magnitude lies in [2^8, 2^9); what passes 448 becomes 448. A
// block that is not finite comes back as NaN throughout.
template <class T>
static void encode_mxfp8(const void* row, int64_t size, void* codes, void* scales) {
  const T* from = static_cast<const T*>(row);
  uint8_t* to = static_cast<uint8_t*>(codes);
  uint8_t* scale = static_cast<uint8_t*>(scales);
  for (; size > 0; size -= kBlock, from += kBlock, to += kBlock, scale++) {
    const uint32_t bits = largest_of(from, kBlock);
    if (bits >= kInfinite) {
      memset(to, 0, kBlock);
      *scale = 255;
      continue;
    }
    const uint32_t exponent = bits >> 23, byte = exponent > kTopExponent ? exponent - kTopExponent : 0;
    *scale = uint8_t(byte);
    const float factor = float_of((254 - byte) << 23);
    for (int64_t i = 0; i < kBlock; i++) {
      const uint32_t word = bits_of(float(to_float(from[i])) * factor), size_bits = word & 0x7fffffffu;
      // Dropping 20 bits of 23 leaves the exponent, which is biased by 127 and not by 7, and three bits.
      const uint32_t normal = ((size_bits + 0x7ffffu + ((size_bits >> 20) & 1)) >> 20) - (120u << 3);
      const uint32_t tiny = bits_of(float_of(size_bits) * 512.f + kRounder) & 0xffu;
      uint32_t code = either(size_bits < (121u << 23), tiny, normal);
      code = code > kLargestCode ? kLargestCode : code;
      to[i] = uint8_t(code | (word >> 24 & 0x80u));
    }
  }
}

template <class T>
static void decode_mxfp8(const void* codes, const void* scales, int64_t rows, int64_t size, void* out) {
  const uint8_t* from = static_cast<const uint8_t*>(codes);
  const uint8_t* byte = static_cast<const uint8_t*>(scales);
  T* to = static_cast<T*>(out);
  for (int64_t left = rows * size; left > 0; left -= kBlock, from += kBlock, to += kBlock, byte++) {
    const float scale = *byte == 255 ? NAN : *byte == 0 ? float_of(1u << 22) : float_of(uint32_t(*byte) << 23);
    for (int64_t i = 0; i < kBlock; i++) {
      const uint32_t code = from[i], number = (code & 0x7fu) << 20;
      // Below 2^-6 there is no leading one: as if there were, and then without it.
      const float tiny = float_of(number + (121u << 23)) - 0.015625f, normal = float_of(number + (120u << 23));
      const uint32_t size_bits = either((code & 0x7fu) < 8, bits_of(tiny), bits_of(normal));
      round_to(float_of(size_bits | (code & 0x80u) << 24) * scale, to + i);
    }
  }
}

}  // namespace
