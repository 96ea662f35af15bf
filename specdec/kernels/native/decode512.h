// Stored weights to bfloat16 with AVX-512, 32 at a time. Floating-point elements are looked up in a table of the values
// that their block's scale gives them; whole numbers are multiplied by it. Where products would leave the normal range
// of float32, blocks take the plain way of stored.h.
#pragma once
#include <immintrin.h>

#include "stored.h"

namespace {

// For each scale the values of the codes, in bfloat16; of codes of 8 bits the 128 without a sign.
template <class E>
struct Table {
  static constexpr int SIZE = E::BITS == 8 ? 128 : 1 << E::BITS;
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
        memcpy(values[scale] + first, out, sizeof(out) < sizeof(values[0]) ? sizeof(out) : sizeof(values[0]));
      }
  }
};

template <class E>
static const Table<E>& table_of() {
  static const Table<E> table;
  return table;
}

static INLINE void ask(const uint8_t* from, int64_t far) {
  if (far) __builtin_prefetch(from + far, 0, 2);
}

// `bytes` of scales, zeros or masks, which are read alongside the codes.
static INLINE void ask_all(const void* from, int64_t far, int64_t bytes) {
  for (int64_t i = 0; far && i < bytes; i += 64) ask(static_cast<const uint8_t*>(from) + i, far);
}

// Sixteen bytes to the 32 values of their codes: `values` has one for each code. Shifts are products, which leave the
// units free that permute; and two halves take less time than one whole.
static INLINE void look_up(const uint8_t* from, __m256i values, Bf16* out) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i shifts = _mm256_set1_epi32(0x00100100);  // a byte on top of each word moves down by 8 bits, and by 12
  const __m256i low = _mm256_shuffle_epi8(bytes, _mm256_set_epi64x(0x0780078006800680, 0x0580058004800480,
                                                                   0x0380038002800280, 0x0180018000800080));
  const __m256i high = _mm256_shuffle_epi8(bytes, _mm256_set_epi64x(0x0f800f800e800e80, 0x0d800d800c800c80,
                                                                    0x0b800b800a800a80, 0x0980098008800880));
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permutexvar_epi16(_mm256_mulhi_epu16(low, shifts), values));
  _mm256_storeu_si256(to + 1, _mm256_permutexvar_epi16(_mm256_mulhi_epu16(high, shifts), values));
}

static void decode_mxfp4(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const Table<E2M1>& table = table_of<E2M1>();
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + k / kBlock;
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * weight.num_scales, length / kBlock);
  for (int64_t b = 0; b < length / kBlock; b++) {
    if (b % 4 == 0) ask(codes + b * 16, far);
    look_up(codes + b * 16, _mm256_load_si256(reinterpret_cast<const __m256i*>(table.values[scales[b]])),
            out + b * kBlock);
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
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * weight.num_scales, length / kBlock);
  for (int64_t b = 0; b < length / kBlock; b++) {
    ask(codes + b * 24, far);
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
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * weight.num_scales, length / kBlock);
  for (int64_t b = 0; b < length / kBlock; b++) {
    ask(codes + b * 32, far);
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
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * weight.num_scales, length / kBlock);
  for (int64_t b = 0; b < length / kBlock; b++) {
    ask(codes + b * 32, far);
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

#endif

// Whether all products of the sixteen points with a scale are normal numbers.
static INLINE bool is_plain(Bf16 scale) {
  return uint32_t((scale.bits & 0x7fff) - (16 << 7)) < uint32_t(224 << 7);
}

// The products of the sixteen points of symmetric int4 with the 128 significands of a scale. The scale's sign and
// exponent are added where they stand, but for zero.
struct Points {
  alignas(64) uint16_t values[128][16];
  Points() {
    for (int m = 0; m < 128; m++)
      for (int q = 0; q < 16; q++) {
        Bf16 out;
        round_to(float(q - 8) * to_float(Bf16{uint16_t(127 << 7 | m)}), &out);
        values[m][q] = q == 8 ? 0 : uint16_t(out.bits - (127 << 7));
      }
  }
};

template <int GROUP>
static void decode_int4_symmetric(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out,
                                  int64_t ahead) {
  static const Points points;
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const Bf16* scales = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales + k / GROUP;
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * 2 * weight.num_scales, 2 * length / GROUP);
  for (int64_t g = 0; g < length / GROUP; g++, codes += GROUP / 2, out += GROUP) {
    const Bf16 scale = scales[g];
    ask(codes, far);
    if (__builtin_expect(!is_plain(scale), 0)) {
      for (int j = 0; j < GROUP; j += kBlock) int4_block(codes + j / 2, to_float(scale), 8, out + j);
      continue;
    }
    const __m256i unit = _mm256_load_si256(reinterpret_cast<const __m256i*>(points.values[scale.bits & 127]));
    const __m256i values =
        _mm256_mask_add_epi16(unit, __mmask16(0xfeff), unit, _mm256_set1_epi16(int16_t(scale.bits & 0xff80)));
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; j += kBlock) look_up(codes + j / 2, values, out + j);
  }
}

#ifdef __AVX512BF16__
static void decode_int4_zeros(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  const int64_t group = weight.group;
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const Bf16* scales = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales + k / group;
  const uint8_t* zeros = weight.zeros + n * weight.num_scales + k / group;
  const __m512 points = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * 2 * weight.num_scales, 2 * length / group);
  for (int64_t i = 0; i < length; i += group, scales++, zeros++) {
    if (__builtin_expect(!is_plain(*scales), 0)) {
      for (int64_t j = i; j < i + group; j += kBlock) int4_block(codes + j / 2, to_float(*scales), *zeros, out + j);
      continue;
    }
    const __m512 apart = _mm512_sub_ps(points, _mm512_set1_ps(float(*zeros)));
    const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(apart, _mm512_set1_ps(to_float(*scales))));
    for (int64_t j = i; j < i + group; j += kBlock) {
      if (j % 128 == 0) ask(codes + j / 2, far);
      look_up(codes + j / 2, values, out + j);
    }
  }
}

static void decode_int4_any(const Stored& weight, int64_t n, int64_t k, int64_t length, Bf16* out, int64_t ahead) {
  if (weight.zeros) return decode_int4_zeros(weight, n, k, length, out, ahead);
  if (weight.group == 32) return decode_int4_symmetric<32>(weight, n, k, length, out, ahead);
  if (weight.group == 64) return decode_int4_symmetric<64>(weight, n, k, length, out, ahead);
  decode_int4_symmetric<128>(weight, n, k, length, out, ahead);
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
  const int64_t far = ahead * weight.num_scales * 2;
  ask_all(mask, ahead * weight.code_bytes, length / 8);
  for (int64_t b = 0; b < length / kBlock; b++) {
    uint32_t bits;
    memcpy(&bits, mask + b * 4, 4);
    ask(reinterpret_cast<const uint8_t*>(values), far);
    const __m512i stored = __builtin_expect(end - values >= kBlock, 1)
                               ? _mm512_loadu_si512(values)
                               : _mm512_maskz_loadu_epi16((1u << (end - values)) - 1, values);
    _mm512_storeu_si512(out + b * kBlock, _mm512_maskz_expand_epi16(bits, stored));
    values += __builtin_popcount(bits);
  }
}

}  // namespace
