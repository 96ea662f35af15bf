// AVX-512 with products of bfloat16 pairs, summed in float32 by the instruction. It treats denormals as zero.
#include "a8vnni.h"
#include "avx512.h"

namespace {

struct B16 {
  using T = Bf16;
  using A = float;
  using Acc = __m512;
  using Op = __m512i;
  static constexpr int STEP = 32, MR = 8, UNIT = 24;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm512_setzero_ps(); }
  static INLINE Op load(const T* p) { return _mm512_loadu_si512(p); }
  static INLINE Op load_some(const T* p, int n) { return _mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p); }
  static INLINE void pin(Op& a) { __asm__("" : "+v"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    F32::reduce<COUNT>(acc, out);
  }
};

// Products of unsigned and signed bytes, four at a time. Weights become unsigned by adding 128.
struct I8 {
  using T = int8_t;
  using A = int32_t;
  using Acc = __m512i;
  using Op = __m512i;
  static constexpr int STEP = 64, MR = 8, UNIT = 24, OFFSET = 128;
  static constexpr int NR(int mr) { return tile_width(mr); }
  static INLINE Acc zero() { return _mm512_setzero_si512(); }
  static INLINE Op load(const T* p) { return _mm512_loadu_si512(p); }
  static INLINE Op load_some(const T* p, int n) { return _mm512_maskz_loadu_epi8(__mmask64((1ull << n) - 1), p); }
  static INLINE void pin(Op& a) { __asm__("" : "+v"(a)); }
  static INLINE void fma(Acc& acc, Op a, Op b) {
    acc = _mm512_dpbusd_epi32(acc, _mm512_xor_si512(b, _mm512_set1_epi8(-128)), a);
  }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    reduce_int<COUNT>(acc, out);
  }
};

}  // namespace

namespace specdec {
const Kernels* avx512bf16_kernels() { return table<F32, Lanes32, B16, F64, Lanes64, I8, Decoders512, VnniA8>("avx512bf16"); }
}  // namespace specdec
