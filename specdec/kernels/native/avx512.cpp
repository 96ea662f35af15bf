// AVX-512 without bfloat16 products: each 32 numbers become the 16 even and the 16 odd ones in float32.
#include "avx512.h"

namespace {

struct B16 {
  using T = Bf16;
  using A = float;
  using Acc = __m512;
  struct Op {
    __m512 even, odd;
  };
  static constexpr int STEP = 32, MR = 8, UNIT = 24;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm512_setzero_ps(); }
  static INLINE Op split(__m512i words) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))))};
  }
  static INLINE Op load(const T* p) { return split(_mm512_loadu_si512(p)); }
  static INLINE Op load_some(const T* p, int n) {
    return split(_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p));
  }
  static INLINE void pin(Op& a) { __asm__("" : "+v"(a.even), "+v"(a.odd)); }
  static INLINE void fma(Acc& acc, const Op& a, const Op& b) {
    acc = _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, acc));
  }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    F32::reduce<COUNT>(acc, out);
  }
};

// Bytes widened to 16 bits: pairs of products are summed in 32 bits.
struct I8 {
  using T = int8_t;
  using A = int32_t;
  using Acc = __m512i;
  using Op = __m512i;
  static constexpr int STEP = 32, MR = 8, UNIT = 24, OFFSET = 0;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm512_setzero_si512(); }
  static INLINE Op load(const T* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static INLINE Op load_some(const T* p, int n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(__mmask32((1ull << n) - 1), p));
  }
  static INLINE void pin(Op& a) { __asm__("" : "+v"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    reduce_int<COUNT>(acc, out);
  }
};

}  // namespace

namespace specdec {
const Kernels* avx512_kernels() { return table<F32, Lanes32, B16, F64, Lanes64, I8, Decoders512, PlainA8>("avx512"); }
}  // namespace specdec
