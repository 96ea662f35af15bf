// Vector types for AVX-512F/BW/VL/DQ. Included by the two AVX-512 variants, which differ in bfloat16 products only.
#pragma once
#include <immintrin.h>

#include "attention.h"
#include "decode512_float.h"

namespace {

// Sums of lanes, all in one order: lanes 16 -> 8 -> 4 -> 2 -> 1, upper half onto lower half. Several accumulators are
// summed together; each takes the same steps as it would alone.

// [a0+a1, a2+a3 | b0+b1, b2+b3] becomes halves: of 128-bit blocks, (0,1) + (2,3) of a, then of b.
static INLINE __m512 fold_two(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

static INLINE __m512 fold_four(__m512 ab, __m512 cd) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Four accumulators, one per 128-bit block, four lanes each.
static INLINE __m512 quarter(const __m512* acc) {
  return fold_four(fold_two(acc[0], acc[1]), fold_two(acc[2], acc[3]));
}

static INLINE __m512 fold_lanes(__m512 a, __m512 b) {  // in each block: a 2 sums, b 2 sums, interleaved
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

static INLINE void reduce16(const __m512* acc, float* out) {
  const __m512 ab = fold_lanes(quarter(acc), quarter(acc + 4)), cd = fold_lanes(quarter(acc + 8), quarter(acc + 12));
  const __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
  const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, sums));
}

static INLINE void reduce8(const __m512* acc, float* out) {
  const __m512 ab = fold_lanes(quarter(acc), quarter(acc + 4));
  const __m512 sums = _mm512_add_ps(ab, _mm512_shuffle_ps(ab, ab, 0x4e));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
}

static INLINE void reduce4(const __m512* acc, float* out) {
  __m512 sums = quarter(acc);
  sums = _mm512_add_ps(sums, _mm512_shuffle_ps(sums, sums, 0x4e));
  sums = _mm512_add_ps(sums, _mm512_shuffle_ps(sums, sums, 0xb1));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(order, sums)));
}

static INLINE float reduce1(__m512 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Tile shapes: as many accumulators as 32 registers hold beside the operands.
static constexpr int tile_width(int mr) { return mr <= 3 ? 8 : mr == 4 ? 6 : mr <= 6 ? 4 : 3; }

struct F32 {
  using T = float;
  using A = float;
  using Acc = __m512;
  using Op = __m512;
  static constexpr int STEP = 16, MR = 8, UNIT = 24;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm512_setzero_ps(); }
  static INLINE Op load(const T* p) { return _mm512_loadu_ps(p); }
  static INLINE Op load_some(const T* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
  static INLINE void pin(Op& a) { __asm__("" : "+v"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm512_fmadd_ps(a, b, acc); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    if constexpr (COUNT >= 16) {
      reduce16(acc, out);
      reduce<COUNT - 16>(acc + 16, out + 16);
    } else if constexpr (COUNT >= 8) {
      reduce8(acc, out);
      reduce<COUNT - 8>(acc + 8, out + 8);
    } else if constexpr (COUNT >= 4) {
      reduce4(acc, out);
      reduce<COUNT - 4>(acc + 4, out + 4);
    } else if constexpr (COUNT > 0) {
      *out = reduce1(*acc);
      reduce<COUNT - 1>(acc + 1, out + 1);
    }
  }
};

struct F64 {
  using T = double;
  using A = double;
  using Acc = __m512d;
  using Op = __m512d;
  static constexpr int STEP = 8, MR = 8, UNIT = 24;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm512_setzero_pd(); }
  static INLINE Op load(const T* p) { return _mm512_loadu_pd(p); }
  static INLINE Op load_some(const T* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
  static INLINE void pin(Op& a) { __asm__("" : "+v"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm512_fmadd_pd(a, b, acc); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    for (int i = 0; i < COUNT; i++) {
      const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(acc[i]), _mm512_extractf64x4_pd(acc[i], 1));
      const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
      out[i] = _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
  }
};

// Sums of the lanes of int32 accumulators.
template <int COUNT>
static INLINE void reduce_int(const __m512i* acc, int32_t* out) {
  if constexpr (COUNT >= 4) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[0], acc[1]), _mm512_unpackhi_epi32(acc[0], acc[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2], acc[3]), _mm512_unpackhi_epi32(acc[2], acc[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    reduce_int<COUNT - 4>(acc + 4, out + 4);
  } else if constexpr (COUNT > 0) {
    *out = _mm512_reduce_add_epi32(*acc);
    reduce_int<COUNT - 1>(acc + 1, out + 1);
  }
}

struct Lanes32 {
  using S = float;
  using R = __m512;
  static constexpr int W = 16, QR = 6, MIX = 24;
  static INLINE R set1(S x) { return _mm512_set1_ps(x); }
  static INLINE R load(const S* p) { return _mm512_loadu_ps(p); }
  static INLINE R load(const Bf16* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static INLINE void store(S* p, R x) { _mm512_storeu_ps(p, x); }
  static INLINE R add(R a, R b) { return _mm512_add_ps(a, b); }
  static INLINE R mul(R a, R b) { return _mm512_mul_ps(a, b); }
  static INLINE R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE R max(R a, R b) { return _mm512_max_ps(a, b); }
  // For arguments up to 0: 2^n times a polynomial of the rest. Minus infinity gives 0, NaN stays.
  static INLINE R exp(R x) {
    x = _mm512_max_ps(set1(-120.f), x);
    const R n = _mm512_roundscale_ps(mul(x, set1(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const R r = exp_rest<Lanes32>(x, n);
    return _mm512_scalef_ps(exp_series<Lanes32>(r), n);
  }
};

struct Lanes64 {
  using S = double;
  using R = __m512d;
  static constexpr int W = 8, QR = 6, MIX = 24;
  static INLINE R set1(S x) { return _mm512_set1_pd(x); }
  static INLINE R load(const S* p) { return _mm512_loadu_pd(p); }
  static INLINE void store(S* p, R x) { _mm512_storeu_pd(p, x); }
  static INLINE R add(R a, R b) { return _mm512_add_pd(a, b); }
  static INLINE R mul(R a, R b) { return _mm512_mul_pd(a, b); }
  static INLINE R fma(R a, R b, R c) { return _mm512_fmadd_pd(a, b, c); }
  static INLINE R max(R a, R b) { return _mm512_max_pd(a, b); }
  static INLINE R exp(R x) {
    double lanes[W];
    store(lanes, x);
    for (int i = 0; i < W; i++) lanes[i] = ::exp(lanes[i]);
    return load(lanes);
  }
};

}  // namespace
