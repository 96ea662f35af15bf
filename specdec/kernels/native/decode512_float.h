// Stored weights to float32 with AVX-512, and which decoder serves which kind of weights.
#pragma once
#include "decode512.h"

namespace {

static INLINE __m512 widened(const Bf16* from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

constexpr int64_t kPlainPiece = 512;  // inputs that are decoded at a time on the way to float32

// To float32 by way of bfloat16, which holds the same values but for the smallest: E is what the scales belong to.
template <class E, Decode<Bf16> DECODE>
static void decode_wide(const Stored& weight, int64_t n, int64_t k, int64_t length, float* out, int64_t ahead) {
  alignas(64) Bf16 narrow[kPlainPiece];
  for (int64_t i = 0; i < length; i += kPlainPiece) {
    const int64_t size = length - i < kPlainPiece ? length - i : kPlainPiece;
    if constexpr (!std::is_void<E>::value) {
      const uint8_t* scales = static_cast<const uint8_t*>(weight.scales) + n * weight.num_scales + (k + i) / kBlock;
      uint8_t least = 255;
      for (int64_t b = 0; b < size / kBlock; b++) least = scales[b] < least ? scales[b] : least;
      if (__builtin_expect(least < 32, 0)) {  // products may be too small for bfloat16
        decode_mx<E, float>(weight, n, k + i, size, out + i, 0);
        continue;
      }
    }
    DECODE(weight, n, k + i, size, narrow, ahead);
    for (int64_t j = 0; j < size; j += 16) _mm512_storeu_ps(out + i + j, widened(narrow + j));
  }
}

// Sixteen bytes to the 32 values of their codes: `values` has one for each code.
static INLINE void look_up_wide(const uint8_t* from, __m512 values, float* out) {
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m512 even = _mm512_permutexvar_ps(pairs, values);
  const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), values);
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, second, odd));
}

static void decode_int4_wide(const Stored& weight, int64_t n, int64_t k, int64_t length, float* out, int64_t ahead) {
  const int64_t group = weight.group;
  const uint8_t* codes = weight.codes + n * weight.code_bytes + k / 2;
  const Bf16* scales = static_cast<const Bf16*>(weight.scales) + n * weight.num_scales + k / group;
  const uint8_t* zeros = weight.zeros ? weight.zeros + n * weight.num_scales + k / group : nullptr;
  const __m512 points = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t far = ahead * weight.code_bytes;
  ask_all(scales, ahead * 2 * weight.num_scales, 2 * length / group);
  for (int64_t i = 0; i < length; i += group, scales++) {
    const float zero = zeros ? float(*zeros++) : 8;
    const __m512 values = _mm512_mul_ps(_mm512_sub_ps(points, _mm512_set1_ps(zero)), _mm512_set1_ps(to_float(*scales)));
    for (int64_t j = i; j < i + group; j += kBlock) {
      if (j % 128 == 0) ask(codes + j / 2, far);
      look_up_wide(codes + j / 2, values, out + j);
    }
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
          return decode_int4_any;
#endif
        case kSparse:
          if (spreads) return decode_spread;
      }
    }
    if constexpr (std::is_same<T, float>::value) {
      static const bool spreads = __builtin_cpu_supports("avx512vbmi2");
      switch (kind) {
        case kMxfp4:
          return decode_wide<E2M1, decode_mxfp4>;
        case kMxfp6E2m3:
          return decode_wide<E2M3, decode_mxfp6<E2M3>>;
        case kMxfp6E3m2:
          return decode_wide<E3M2, decode_mxfp6<E3M2>>;
        case kMxfp8E4m3:
          return decode_wide<E4M3, decode_mxfp8<E4M3>>;
        case kMxfp8E5m2:
          return decode_wide<E5M2, decode_mxfp8<E5M2>>;
#ifdef __AVX512BF16__
        case kMxint8:
          return decode_wide<SignedByte, decode_mxint8>;
#endif
        case kInt4:
          return decode_int4_wide;
        case kSparse:
          if (spreads) return decode_wide<void, decode_spread>;
      }
    }
    return PlainDecoders::get<T>(kind);
  }
};

}  // namespace
