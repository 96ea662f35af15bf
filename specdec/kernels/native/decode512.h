// Stored weights to bfloat16 with AVX-512, 32 at a time. Floating-point elements are looked up in a table of the values
// that their block's scale gives them; whole numbers are multiplied by it. Where products would leave the normal range
// of float32, blocks take the plain way of stored.h.
#pragma once
#include <immintrin.h>

#include "stored.h"

namespace {

// For each scale the values of the codes, in bfloat16: of 4 bits twice, so that a fifth bit of the index does not
// matter; of 6 bits all 64; of 8 bits the 128 without a sign.
template <class E>
struct Table {
  static constexpr int SIZE = E::BITS == 4 ? 32 : E::BITS == 6 ? 64 : 128;
  alignas(64) uint16_t values[256][SIZE];
  Table() {
    for (int scale = 0; scale < 256; scale++)
      for (int first = 0; first < SIZE; first += kBlock) {
        uint8_t codes[kBlock] = {0};
        for (int i = 0; i < kBlock; i++) {
          const int at = i * E::BITS, code = (first + i) & ((1 << E::BITS) - 1);
          codes[at / 8] |= uint8_t(code << (at % 8));
          if (at % 8 + E::BITS > 8) codes[at / 8 + 1] |= uint8_t(code >> (8 - at % 8));
        }
        Bf16 out[kBlock];
        mx_block<E>(codes, uint8_t(scale), out);
        memcpy(values[scale] + first, out, sizeof(out));
      }
  }
};

template <class E>
static const Table<E>& table_of() {
  static const Table<E> table;
  return table;
}

static INLINE void ask(const uint8_t* from, int64_t ahead) {
  if (ahead) __builtin_prefetch(from + ahead, 0, 2);
}

// Shifts by products: they leave the units free that permute.

// Sixteen bytes as 32 words whose low four bits are the codes, in order; above them lies the neighbour.
static INLINE __m512i nibbles(const uint8_t* from) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m512i twice = _mm512_shuffle_epi8(
      bytes, _mm512_set_epi64(0x0f800f800e800e80, 0x0d800d800c800c80, 0x0b800b800a800a80, 0x0980098008800880,
                              0x0780078006800680, 0x0580058004800480, 0x0380038002800280, 0x0180018000800080));
  return _mm512_mulhi_epu16(twice, _mm512_set1_epi32(0x00100100));  // by 8 bits, and by 12
}

static void decode_mxfp4(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const Table<E2M1>& table = table_of<E2M1>();
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + k / kBlock;
  for (int64_t b = 0; b < length / kBlock; b++) {
    if (b % 4 == 0) ask(codes + b * 16, ahead);
    const __m512i values = _mm512_load_si512(table.values[scales[b]]);
    _mm512_storeu_si512(out + b * kBlock, _mm512_permutexvar_epi16(nibbles(codes + b * 16), values));
  }
}

// 24 bytes as 32 words whose low six bits are the codes: every 128 bits take the seven bytes that hold their eight.
static INLINE __m512i sextets(const uint8_t* from) {
  const __m512i raw = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(0x00ffffffu, from));
  const __m512i apart = _mm512_permutexvar_epi16(
      _mm512_set_epi16(16, 15, 14, 13, 12, 11, 10, 9, 13, 12, 11, 10, 9, 8, 7, 6, 10, 9, 8, 7, 6, 5, 4, 3, 7, 6, 5, 4,
                       3, 2, 1, 0),
      raw);
  const __m512i pairs = _mm512_shuffle_epi8(
      apart, _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, 0, 1, 1, 2, -1, 2, -1, 3, 3, 4, 4, 5, -1, 5)));
  return _mm512_mulhi_epu16(pairs, _mm512_set1_epi64(0x0040100004000100));  // by 8, 6, 4 and 10 bits
}

template <class E>
static void decode_mxfp6(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const Table<E>& table = table_of<E>();
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 4 * 3;
  const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + k / kBlock;
  for (int64_t b = 0; b < length / kBlock; b++) {
    ask(codes + b * 24, ahead);
    const uint16_t* values = table.values[scales[b]];
    _mm512_storeu_si512(out + b * kBlock,
                        _mm512_permutex2var_epi16(_mm512_load_si512(values), sextets(codes + b * 24),
                                                  _mm512_load_si512(values + 32)));
  }
}

template <class E>
static void decode_mxfp8(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const Table<E>& table = table_of<E>();
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k;
  const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + k / kBlock;
  const __m512i sign = _mm512_set1_epi16(int16_t(0x8000)), half = _mm512_set1_epi16(0x40);
  for (int64_t b = 0; b < length / kBlock; b++) {
    ask(codes + b * 32, ahead);
    const uint16_t* values = table.values[scales[b]];
    const __m512i words =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * 32)));
    const __m512i small =
        _mm512_permutex2var_epi16(_mm512_load_si512(values), words, _mm512_load_si512(values + 32));
    const __m512i large =
        _mm512_permutex2var_epi16(_mm512_load_si512(values + 64), words, _mm512_load_si512(values + 96));
    const __m512i sizes = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(words, half), small, large);
    _mm512_storeu_si512(out + b * kBlock, _mm512_ternarylogic_epi32(sizes, words, sign, 0xf8));  // sizes | words & sign
  }
}

#ifdef __AVX512BF16__
static void decode_mxint8(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k;
  const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + k / kBlock;
  for (int64_t b = 0; b < length / kBlock; b++) {
    ask(codes + b * 32, ahead);
    if (__builtin_expect(scales[b] < 16 || scales[b] == 255, 0)) {
      mx_block<SignedByte>(codes + b * 32, scales[b], out + b * kBlock);
      continue;
    }
    const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32((int(scales[b]) - 6) << 23));
    const __m128i* from = reinterpret_cast<const __m128i*>(codes + b * 32);
    const __m512 low = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from))), factor);
    const __m512 top = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1))), factor);
    _mm512_storeu_si512(out + b * kBlock, (__m512i)_mm512_cvtne2ps_pbh(top, low));
  }
}

// Products of the sixteen points with a scale may be subnormal, which the conversion below would flush.
static INLINE bool is_tiny(Bf16 scale) { return (scale.bits & 0x7f80) < (16 << 7); }

static void decode_int4_groups(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const int64_t group = weight.group, blocks = group / kBlock;
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const Bf16* scales = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales + k / group;
  const uint8_t* zeros = weight.zeros ? weight.zeros + n * weight.num_scales + k / group : nullptr;
  const __m512 points = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 symmetric = _mm512_sub_ps(points, _mm512_set1_ps(8));
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u)), low = _mm512_set1_epi16(15), later = _mm512_set1_epi16(16);
  int64_t g = 0;
  for (; g + 2 <= length / group; g += 2) {  // two groups: one table has sixteen values for each
    const uint8_t* from = codes + g * group / 2;
    if (__builtin_expect(is_tiny(scales[g]) || is_tiny(scales[g + 1]), 0)) {
      for (int64_t b = 0; b < 2 * blocks; b++)
        int4_block(from + b * 16, to_float(scales[g + b / blocks]), zeros ? zeros[g + b / blocks] : 8,
                   out + g * group + b * kBlock);
      continue;
    }
    int pair;
    memcpy(&pair, scales + g, 4);
    const __m512i both = _mm512_set1_epi32(pair);
    __m512 first = symmetric, second = symmetric;
    if (zeros) {
      first = _mm512_sub_ps(points, _mm512_set1_ps(float(zeros[g])));
      second = _mm512_sub_ps(points, _mm512_set1_ps(float(zeros[g + 1])));
    }
    first = _mm512_mul_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
    second = _mm512_mul_ps(second, _mm512_castsi512_ps(_mm512_and_si512(both, high)));
    const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    Bf16* to = out + g * group;
    for (int64_t b = 0; b < blocks; b++) {
      if (b % 4 == 0) ask(from + b * 16, ahead);
      const __m512i index = _mm512_and_si512(nibbles(from + b * 16), low);
      _mm512_storeu_si512(to + b * kBlock, _mm512_permutexvar_epi16(index, values));
    }
    from += group / 2;
    to += group;
    for (int64_t b = 0; b < blocks; b++) {
      // nibble & 15 | 16
      const __m512i index = _mm512_ternarylogic_epi32(nibbles(from + b * 16), low, later, 0xea);
      _mm512_storeu_si512(to + b * kBlock, _mm512_permutexvar_epi16(index, values));
    }
  }
  for (; g < length / group; g++)
    for (int64_t b = 0; b < blocks; b++)
      int4_block(codes + g * group / 2 + b * 16, to_float(scales[g]), zeros ? zeros[g] : 8,
                 out + g * group + b * kBlock);
}
#endif

// AVX512_VBMI2 spreads 16-bit values by a mask; machines of this variant may lack it.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt"))) static void decode_spread(
    const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const uint8_t* mask = weight.codes + n * weight.code_bytes;
  const Bf16* values = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales;
  const Bf16* end = values + weight.num_scales;
  values += stored_before(mask, k);
  mask += k / 8;
  for (int64_t b = 0; b < length / kBlock; b++) {
    uint32_t bits;
    memcpy(&bits, mask + b * 4, 4);
    if (ahead) __builtin_prefetch(reinterpret_cast<const uint8_t*>(values) + 16 * weight.num_scales, 0, 2);
    const __m512i stored = __builtin_expect(end - values >= kBlock, 1)
                               ? _mm512_loadu_si512(values)
                               : _mm512_maskz_loadu_epi16((1u << (end - values)) - 1, values);
    _mm512_storeu_si512(out + b * kBlock, _mm512_maskz_expand_epi16(bits, stored));
    values += __builtin_popcount(bits);
  }
}

struct Decoders512 {
  template <class T>
  static Decode<T> get(int kind) {
    if constexpr (std::is_same<T, Bf16>::value) {
      static const bool spreads = __builtin_cpu_supports("avx512vbmi2");
      switch (kind) {
        case kMxfp4:
          return decode_mxfp4;
        case kMxfp6E2m3:
          return decode_mxfp6<E2M3>;
        case kMxfp6E3m2:
          return decode_mxfp6<E3M2>;
        case kMxfp8E4m3:
          return decode_mxfp8<E4M3>;
        case kMxfp8E5m2:
          return decode_mxfp8<E5M2>;
#ifdef __AVX512BF16__
        case kMxint8:
          return decode_mxint8;
        case kInt4:
          return decode_int4_groups;
#endif
        case kSparse:
          if (spreads) return decode_spread;
      }
    }
    return PlainDecoders::get<T>(kind);
  }
};

}  // namespace
