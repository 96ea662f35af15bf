// Kernels for any machine: four floats or two doubles at a time, in the compiler's own vector types.
#include "attention.h"

namespace {

typedef float f4 __attribute__((vector_size(16)));
typedef double d2 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));

template <class R>
static INLINE R fused(R a, R b, R c) {
#if defined(__aarch64__)
  R out;
  for (unsigned i = 0; i < sizeof(R) / sizeof(a[0]); i++)
    out[i] = sizeof(a[0]) == 4 ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
  return out;
#else
  return a * b + c;
#endif
}

template <class Scalar, class Reg, int LANES>
struct Plain {
  using T = Scalar;
  using A = Scalar;
  using Acc = Reg;
  using Op = Reg;
  static constexpr int STEP = LANES, MR = 4, UNIT = 12;
  static constexpr int NR(int mr) { return mr == 1 ? 6 : mr == 2 ? 4 : mr == 3 ? 3 : 2; }
  static INLINE Acc zero() { return Acc{}; }
  static INLINE Op load(const T* p) {
    Op out;
    memcpy(&out, p, sizeof(out));
    return out;
  }
  static INLINE Op load_some(const T* p, int n) {
    Op out{};
    memcpy(&out, p, n * sizeof(T));
    return out;
  }
  static INLINE void pin(Op&) {}
  static INLINE void fma(Acc& acc, Op a, Op b) { acc = fused(a, b, acc); }
  // Lanes are added in halves.
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    for (int i = 0; i < COUNT; i++) {
      Scalar lanes[LANES];
      memcpy(lanes, &acc[i], sizeof(lanes));
      for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
      out[i] = lanes[0];
    }
  }
};

using F32 = Plain<float, f4, 4>;
using F64 = Plain<double, d2, 2>;

// Eight numbers as two vectors of four: the odd ones and the even ones.
struct B16 {
  using T = Bf16;
  using A = float;
  using Acc = f4;
  struct Op {
    f4 even, odd;
  };
  static constexpr int STEP = 8, MR = 4, UNIT = 12;
  static constexpr int NR(int mr) { return mr == 1 ? 4 : 2; }
  static INLINE Acc zero() { return Acc{}; }
  static INLINE Op split(u4 words) { return {f4(words << 16), f4(words & 0xffff0000u)}; }
  static INLINE Op load(const T* p) {
    u4 words;
    memcpy(&words, p, sizeof(words));
    return split(words);
  }
  static INLINE Op load_some(const T* p, int n) {
    u4 words{};
    memcpy(&words, p, n * sizeof(T));
    return split(words);
  }
  static INLINE void pin(Op&) {}
  static INLINE void fma(Acc& acc, const Op& a, const Op& b) { acc = fused(a.odd, b.odd, fused(a.even, b.even, acc)); }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    F32::reduce<COUNT>(acc, out);
  }
};

// Sixteen bytes at a time; a product of two fits sixteen bits.
struct I8 {
  typedef int8_t Op __attribute__((vector_size(16)));
  typedef int16_t Wide __attribute__((vector_size(32)));
  typedef int32_t Acc __attribute__((vector_size(64)));
  using T = int8_t;
  using A = int32_t;
  static constexpr int STEP = 16, MR = 4, UNIT = 12, OFFSET = 0;
  static constexpr int NR(int mr) { return mr == 1 ? 2 : 1; }
  static INLINE Acc zero() { return Acc{}; }
  static INLINE Op load(const T* p) {
    Op out;
    memcpy(&out, p, sizeof(out));
    return out;
  }
  static INLINE Op load_some(const T* p, int n) {
    Op out{};
    memcpy(&out, p, n);
    return out;
  }
  static INLINE void pin(Op&) {}
  static INLINE void fma(Acc& acc, Op a, Op b) {
    const Wide products = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    acc += __builtin_convertvector(products, Acc);
  }
  template <int COUNT>
  static INLINE void reduce(const Acc* acc, A* out) {
    for (int i = 0; i < COUNT; i++) {
      out[i] = 0;
      for (int l = 0; l < 16; l++) out[i] += acc[i][l];
    }
  }
};

template <class Scalar, class Reg, int LANES>
struct Lanes {
  using S = Scalar;
  using R = Reg;
  static constexpr int W = LANES, QR = 2, MIX = 8;
  static INLINE R set1(S x) { return x - R{}; }
  static INLINE R load(const S* p) {
    R out;
    memcpy(&out, p, sizeof(out));
    return out;
  }
  static INLINE R load(const Bf16* p) {
    R out;
    for (int i = 0; i < W; i++) out[i] = to_float(p[i]);
    return out;
  }
  static INLINE void store(S* p, R x) { memcpy(p, &x, sizeof(x)); }
  static INLINE R add(R a, R b) { return a + b; }
  static INLINE R mul(R a, R b) { return a * b; }
  static INLINE R fma(R a, R b, R c) { return fused(a, b, c); }
  static INLINE R max(R a, R b) {
    for (int i = 0; i < W; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
  static INLINE R exp(R x) {
    for (int i = 0; i < W; i++) x[i] = sizeof(S) == 4 ? S(::expf(float(x[i]))) : S(::exp(double(x[i])));
    return x;
  }
};

}  // namespace

namespace specdec {
const Kernels* portable_kernels() {
  return table<F32, Lanes<float, f4, 4>, B16, F64, Lanes<double, d2, 2>, I8, PlainDecoders, PlainA8>("portable");
}
}  // namespace specdec
