// AVX2 and FMA: eight floats, sixteen registers.
#include <immintrin.h>

#include "attention.h"

namespace {

static constexpr int tile_width(int mr) { return mr == 1 ? 8 : mr == 2 ? 4 : 3; }

struct F32 {
  using T = float;
  using A = float;
  using Acc = __m256;
  using Op = __m256;
  static constexpr int STEP = 8, MR = 4, UNIT = 24;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm256_setzero_ps(); }
  static INLINE Op load(const T* p) { return _mm256_loadu_ps(p); }
  static INLINE Op load_some(const T* p, int n) {
    float lanes[8] = {0};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }
  static INLINE void pin(Op& a) { __asm__("" : "+x"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm256_fmadd_ps(a, b, acc); }
  // Lanes 8 -> 4 -> 2 -> 1, upper half onto lower half.
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) {
      const __m128 four = _mm_add_ps(_mm256_castps256_ps128(acc[i]), _mm256_extractf128_ps(acc[i], 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      out[i] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
  }
};

struct F64 {
  using T = double;
  using A = double;
  using Acc = __m256d;
  using Op = __m256d;
  static constexpr int STEP = 4, MR = 4, UNIT = 24;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm256_setzero_pd(); }
  static INLINE Op load(const T* p) { return _mm256_loadu_pd(p); }
  static INLINE Op load_some(const T* p, int n) {
    double lanes[4] = {0};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }
  static INLINE void pin(Op& a) { __asm__("" : "+x"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm256_fmadd_pd(a, b, acc); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) {
      const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(acc[i]), _mm256_extractf128_pd(acc[i], 1));
      out[i] = _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
  }
};

// Sixteen numbers as the eight even and the eight odd ones in float32.
struct B16 {
  using T = Bf16;
  using A = float;
  using Acc = __m256;
  struct Op {
    __m256 even, odd;
  };
  static constexpr int STEP = 16, MR = 4, UNIT = 24;
  static constexpr int NR(int mr) { return mr == 1 ? 6 : mr == 2 ? 3 : 2; }
  static INLINE Acc zero() { return _mm256_setzero_ps(); }
  static INLINE Op load(const T* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))))};
  }
  static INLINE Op load_some(const T* p, int n) {
    Bf16 lanes[16] = {};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }
  static INLINE void pin(Op& a) { __asm__("" : "+x"(a.even), "+x"(a.odd)); }
  static INLINE void fma(Acc& acc, const Op& a, const Op& b) {
    acc = _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, acc));
  }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    F32::reduce<COUNT>(acc, out);
  }
};

// Sixteen bytes, widened: pairs of products are summed in 32 bits.
struct I8 {
  using T = int8_t;
  using A = int32_t;
  using Acc = __m256i;
  using Op = __m256i;
  static constexpr int STEP = 16, MR = 4, UNIT = 24, OFFSET = 0;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm256_setzero_si256(); }
  static INLINE Op load(const T* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static INLINE Op load_some(const T* p, int n) {
    T lanes[16] = {0};
    memcpy(lanes, p, n);
    return load(lanes);
  }
  static INLINE void pin(Op& a) { __asm__("" : "+x"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) {
      __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(acc[i]), _mm256_extracti128_si256(acc[i], 1));
      sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
      out[i] = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
    }
  }
};

struct Lanes32 {
  using S = float;
  using R = __m256;
  static constexpr int W = 8, QR = 3, MIX = 12;
  static INLINE R set1(S x) { return _mm256_set1_ps(x); }
  static INLINE R load(const S* p) { return _mm256_loadu_ps(p); }
  static INLINE R load(const Bf16* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static INLINE void store(S* p, R x) { _mm256_storeu_ps(p, x); }
  static INLINE R add(R a, R b) { return _mm256_add_ps(a, b); }
  static INLINE R mul(R a, R b) { return _mm256_mul_ps(a, b); }
  static INLINE R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
  static INLINE R max(R a, R b) { return _mm256_max_ps(a, b); }
  // For arguments up to 0: 2^n times a polynomial of the rest. Below -87.7 the exponent field is 0, and so is the
  // result; NaN stays.
  static INLINE R exp(R x) {
    x = _mm256_max_ps(set1(-88.f), x);
    const R n = _mm256_round_ps(mul(x, set1(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const R r = exp_rest<Lanes32>(x, n);
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return mul(exp_series<Lanes32>(r), _mm256_castsi256_ps(power));
  }
};

struct Lanes64 {
  using S = double;
  using R = __m256d;
  static constexpr int W = 4, QR = 3, MIX = 12;
  static INLINE R set1(S x) { return _mm256_set1_pd(x); }
  static INLINE R load(const S* p) { return _mm256_loadu_pd(p); }
  static INLINE void store(S* p, R x) { _mm256_storeu_pd(p, x); }
  static INLINE R add(R a, R b) { return _mm256_add_pd(a, b); }
  static INLINE R mul(R a, R b) { return _mm256_mul_pd(a, b); }
  static INLINE R fma(R a, R b, R c) { return _mm256_fmadd_pd(a, b, c); }
  static INLINE R max(R a, R b) { return _mm256_max_pd(a, b); }
  static INLINE R exp(R x) {
    double lanes[W];
    store(lanes, x);
    for (int i = 0; i < W; i++) lanes[i] = ::exp(lanes[i]);
    return load(lanes);
  }
};

}  // namespace

namespace specdec {
const Kernels* avx2_kernels() { return table<F32, Lanes32, B16, F64, Lanes64, I8, PlainDecoders, PlainA8>("avx2"); }
}  // namespace specdec
