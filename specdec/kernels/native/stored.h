// Weights in few bits: how they lie in memory, and what they stand for, in plain C++ that each variant's compiler
// turns into its own vectors. Included inside each variant's translation unit.
//
// A row's codes are one little-endian bit string. Decoding gives the exact value, rounded to the wanted type once.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "rounding.h"

namespace {
using namespace specdec;

constexpr int64_t kBlock = 32;  // weights decoded at a time; a scale belongs to one or more whole blocks

// Writes `length` weights of row n from input k on, both multiples of the group. What is stored of the same inputs
// `ahead` rows later is asked for meanwhile; 0: nothing.
template <class T>
using Decode = void (*)(const Stored& weight, int64_t n, int64_t k, int64_t length, T* out, int64_t ahead);

// Elements with `EXPONENT` and `MANTISSA` bits under a sign bit. Moved to where float32 keeps them they are the value
// times 2^-SHIFT, subnormal ones too.
template <int EXPONENT, int MANTISSA, int BIAS>
struct Small {
  static constexpr int BITS = 1 + EXPONENT + MANTISSA, SHIFT = 127 - BIAS;
  static INLINE float raw(uint32_t code) {
    const uint32_t size = code & ((1u << (BITS - 1)) - 1);
    return float_of(((code >> (BITS - 1)) << 31) | (size << (23 - MANTISSA)));
  }
};
using E2M1 = Small<2, 1, 1>;
using E2M3 = Small<2, 3, 1>;
using E3M2 = Small<3, 2, 3>;

struct E4M3 : Small<4, 3, 7> {
  static INLINE float raw(uint32_t code) {
    const float out = Small::raw(code);
    return (code & 0x7f) == 0x7f ? float_of(0x7fc00000u) : out;
  }
};

struct E5M2 : Small<5, 2, 15> {
  static INLINE float raw(uint32_t code) {
    const uint32_t sign = (code >> 7) << 31, size = code & 0x7f;
    const float out = Small::raw(code), past = size == 0x7c ? float_of(0x7f800000u | sign) : float_of(0x7fc00000u);
    return size >= 0x7c ? past : out;
  }
};

struct SignedByte {
  static constexpr int BITS = 8, SHIFT = -6;
  static INLINE float raw(uint32_t code) { return float(int8_t(code)); }
};

template <int BITS>
static INLINE void spread(const uint8_t* from, uint8_t* codes) {
  if constexpr (BITS == 8) {
    memcpy(codes, from, kBlock);
  } else if constexpr (BITS == 4) {
    for (int i = 0; i < kBlock / 2; i++) {
      codes[2 * i] = from[i] & 15;
      codes[2 * i + 1] = from[i] >> 4;
    }
  } else {
    for (int i = 0; i < kBlock / 4; i++) {
      const uint32_t word = from[3 * i] | uint32_t(from[3 * i + 1]) << 8 | uint32_t(from[3 * i + 2]) << 16;
      for (int j = 0; j < 4; j++) codes[4 * i + j] = (word >> (6 * j)) & 63;
    }
  }
}

// One block of a Microscaling row: element times 2^(scale - 127), where 255 is NaN.
template <class E, class T>
static INLINE void mx_block(const uint8_t* from, uint8_t scale, T* out) {
  uint8_t codes[kBlock];
  spread<E::BITS>(from, codes);
  const int power = int(scale) + E::SHIFT;  // of the factor, with float32's bias
  if (power >= 1 && power <= 254) {
    const float factor = float_of(uint32_t(power) << 23);
    for (int i = 0; i < kBlock; i++) round_to(E::raw(codes[i]) * factor, out + i);
  } else {  // the factor is no normal number: two exact steps
    const float shift = float_of(uint32_t(127 + E::SHIFT) << 23);
    const float factor = scale == 255 ? float_of(0x7fc00000u) : scale ? float_of(uint32_t(scale) << 23) : 0x1p-127f;
    for (int i = 0; i < kBlock; i++) round_to(E::raw(codes[i]) * shift * factor, out + i);
  }
}

template <class E, class T>
static void decode_mx(const Stored& weight, int64_t n, int64_t k, int64_t length, T* out, int64_t) {
  constexpr int64_t bytes = kBlock * E::BITS / 8;
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / kBlock * bytes;
  const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + k / kBlock;
  for (int64_t b = 0; b < length / kBlock; b++) mx_block<E>(codes + b * bytes, scales[b], out + b * kBlock);
}

template <class T>
static INLINE void int4_block(const uint8_t* from, float scale, int zero, T* out) {
  uint8_t codes[kBlock];
  spread<4>(from, codes);
  for (int i = 0; i < kBlock; i++) round_to(float(int(codes[i]) - zero) * scale, out + i);
}

template <class T>
static void decode_int4(const Stored& weight, int64_t n, int64_t k, int64_t length, T* out, int64_t) {
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const Bf16* scales = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales;
  const uint8_t* zeros = weight.zeros ? weight.zeros + n * weight.num_scales : nullptr;
  for (int64_t i = 0; i < length; i += kBlock) {
    const int64_t group = (k + i) / weight.group;
    int4_block(codes + i / 2, to_float(scales[group]), zeros ? zeros[group] : 8, out + i);
  }
}

// Stored values of a row that stand before input k, a multiple of 32.
static INLINE int64_t stored_before(const uint8_t* mask, int64_t k) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= k / 8; i += 8) {
    uint64_t word;
    memcpy(&word, mask + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < k / 8; i++) count += __builtin_popcount(mask[i]);
  return count;
}

template <class T>
static void decode_sparse(const Stored& weight, int64_t n, int64_t k, int64_t length, T* out, int64_t) {
  const uint8_t* mask = weight.codes + n * weight.code_bytes;
  const Bf16* values = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales + stored_before(mask, k);
  mask += k / 8;
  for (int64_t i = 0; i < length; i++) out[i] = T{};
  for (int64_t b = 0; b < length / 8; b++)
    for (uint32_t bits = mask[b]; bits; bits &= bits - 1)
      round_to(to_float(*values++), out + b * 8 + __builtin_ctz(bits));
}

struct PlainDecoders {
  template <class T>
  static Decode<T> get(int kind) {
    static const Decode<T> all[kNumKinds] = {decode_mx<E2M1, T>, decode_mx<E2M3, T>, decode_mx<E3M2, T>,
                                             decode_mx<E4M3, T>, decode_mx<E5M2, T>, decode_mx<SignedByte, T>,
                                             decode_int4<T>,     decode_sparse<T>};
    return all[kind];
  }
};

}  // namespace
