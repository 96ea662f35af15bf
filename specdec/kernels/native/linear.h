// Products of rows with weight rows, for any vector type. Included by each variant inside its own translation unit.
//
// A dot product is one vector accumulator that walks along K, then a fixed tree over its lanes. A tile holds many of
// them, but never lets one depend on another: so a row's result has the same bits in every tile shape.
#pragma once
#include "bf16.h"
#include "kernels.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {
using namespace specdec;

// `V` (a "dot type") offers: T storage, A accumulator scalar, Acc and Op registers, STEP elements per Op, MR rows of x
// in the largest tile, NR(mr) rows of weight beside them, and zero, load, load_some, pin, fma, reduce. `pin` keeps an
// operand in a register: compilers would read it again for each product, and loads are as scarce as products.
//
// dot_tile covers K inputs of MR x NR dot products; x is packed, vector by vector: first those of all rows at k = 0,
// then at k = STEP, and so on, padded with zeros. `saved` carries the accumulators from one piece of K to the next; the
// last piece gives `out`. Meanwhile a tile that comes later, at `next`, is fetched into the second-level cache.
template <class V, int MR, int NR, bool FETCH = true>
static INLINE void dot_tile(const typename V::T* x, const typename V::T* w, int64_t ldw, const typename V::T* next,
                            int64_t K, bool first, bool last, typename V::Acc* saved, typename V::A* out) {
  typename V::Acc acc[MR * NR];
#pragma GCC unroll 64
  for (int i = 0; i < MR * NR; i++) acc[i] = first ? V::zero() : saved[i];
  // Where loads are scarce, one of two neighbouring lines is asked for: the processor brings both.
  const auto step = [&](int64_t k, int parity) INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int j = 0; j < NR; j++)
      if (FETCH && (NR <= 4 || j % 2 == parity)) __builtin_prefetch(next + j * ldw + k, 0, 2);
    if constexpr (MR < NR) {  // the fewer operands stay in registers
      typename V::Op a[MR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) a[i] = V::load(x + i * V::STEP);
#pragma GCC unroll 16
      for (int j = 0; j < NR; j++) {
        typename V::Op b = V::load(w + j * ldw + k);
        V::pin(b);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) V::fma(acc[i * NR + j], a[i], b);
      }
    } else {
      typename V::Op b[NR];
#pragma GCC unroll 16
      for (int j = 0; j < NR; j++) b[j] = V::load(w + j * ldw + k);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        typename V::Op a = V::load(x + i * V::STEP);
        V::pin(a);
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) V::fma(acc[i * NR + j], a, b[j]);
      }
    }
    x += MR * V::STEP;
  };
  int64_t k = 0;
  for (; k + 2 * V::STEP <= K; k += 2 * V::STEP) {
    step(k, 0);
    step(k + V::STEP, 1);
  }
  if (k + V::STEP <= K) {
    step(k, 0);
    k += V::STEP;
  }
  if (!last) {
#pragma GCC unroll 64
    for (int i = 0; i < MR * NR; i++) saved[i] = acc[i];
    return;
  }
  if (k < K) {
    typename V::Op b[NR];
#pragma GCC unroll 16
    for (int j = 0; j < NR; j++) b[j] = V::load_some(w + j * ldw + k, int(K - k));
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      typename V::Op a = V::load(x + i * V::STEP);
#pragma GCC unroll 16
      for (int j = 0; j < NR; j++) V::fma(acc[i * NR + j], a, b[j]);
    }
  }
  V::template reduce<MR * NR>(acc, out);
}

// Where `count` dot products of x row i with the weight rows from j on go.
template <class V>
struct LinearSink {
  const typename V::T* bias;
  typename V::T* y;
  int64_t ldy;
  INLINE void put(int64_t i, int64_t j, int64_t count, const typename V::A* dots) const {
    typename V::T* to = y + i * ldy + j;
    if (bias)
      for (int64_t n = 0; n < count; n++) round_to(dots[n] + to_float(bias[j + n]), to + n);
    else
      for (int64_t n = 0; n < count; n++) round_to(dots[n], to + n);
  }
};

template <class V>
struct ScoreSink {
  typename V::A* scores;
  int64_t ld;
  INLINE void put(int64_t i, int64_t j, int64_t count, const typename V::A* dots) const {
    memcpy(scores + i * ld + j, dots, count * sizeof(*dots));
  }
};

// Bytes of x that one tile reads again and again: they stay in the first-level cache beside the weights that stream by.
// Longer rows are cut into pieces, which leave room for the accumulators that wait for the next piece.
constexpr int64_t kHotBytes = 24 * 1024, kPieceBytes = 16 * 1024;
// Weight streams read side by side are this many rows long, so that the processor's own prefetching keeps up.
constexpr int64_t kStream = 32;
// Tiles between the one that is computed and the one that is fetched: enough time for memory to answer.
constexpr int64_t kAhead = 3;

template <class V, int MR>
static INLINE int64_t piece_of(int64_t K) {
  constexpr int64_t item = MR * int64_t(sizeof(typename V::T));
  if (K * item <= kHotBytes) return K;
  const int64_t most = kPieceBytes / item, pieces = (K + most - 1) / most;
  return ((K + pieces - 1) / pieces + V::STEP - 1) / V::STEP * V::STEP;
}

// Rows whose distance is a power of two would push each other out of the first-level cache: packed, they do not.
template <class V, int MR>
static INLINE void pack(const typename V::T* x, int64_t ldx, int64_t K, typename V::T* packed) {
  int64_t k = 0;
  for (; k + V::STEP <= K; k += V::STEP)
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++, packed += V::STEP) memcpy(packed, x + i * ldx + k, sizeof(*x) * V::STEP);
  if (k == K) return;
  memset(packed, 0, sizeof(*x) * MR * V::STEP);
  for (int i = 0; i < MR; i++, packed += V::STEP) memcpy(packed, x + i * ldx + k, sizeof(*x) * (K - k));
}

// MR rows of x with NR * streams rows of weight: NR streams of neighbouring rows, side by side.
template <class V, int MR, int NR, class Sink>
static void panel(const typename V::T* x, int64_t ldx, const typename V::T* w, int64_t ldw, int64_t K, int64_t i0,
                  int64_t j0, int64_t streams, const typename V::T* next_panel, const Sink& sink) {
  typename V::Acc saved[kStream * MR * NR];
  typename V::A out[MR * NR], dots[MR][kStream * NR];
  alignas(64) typename V::T packed[kHotBytes / sizeof(typename V::T) + MR * V::STEP];
  const int64_t piece = piece_of<V, MR>(K);
  for (int64_t k = 0; k < K; k += piece) {
    const bool last = k + piece >= K;
    const int64_t length = last ? K - k : piece;
    pack<V, MR>(x + i0 * ldx + k, ldx, length, packed);
    for (int64_t s = 0; s < streams; s++) {
      const typename V::T* row = w + (j0 + s) * ldw + k;
      const int64_t over = s + kAhead - streams;  // the fetched tile may lie in the next piece or panel
      const typename V::T* after = last ? next_panel : w + j0 * ldw + k + piece;
      const typename V::T* next = over < 0 ? row + kAhead * ldw : after + over * ldw;
      dot_tile<V, MR, NR>(packed, row, streams * ldw, next, length, k == 0, last, saved + s * MR * NR, out);
      if (!last) continue;
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) dots[i][s + j * streams] = out[i * NR + j];
    }
  }
  for (int i = 0; i < MR; i++) sink.put(i0 + i, j0, streams * NR, dots[i]);
}

// x rows [i0, i0 + MR) with weight rows [j0, j1).
template <class V, int MR, class Sink>
static void strip(const typename V::T* x, int64_t ldx, const typename V::T* w, int64_t ldw, int64_t K, int64_t i0,
                  int64_t j0, int64_t j1, const Sink& sink) {
  constexpr int NR = V::NR(MR);
  int64_t j = j0;
  while (j1 - j >= NR) {
    const int64_t streams = (j1 - j) / NR < kStream ? (j1 - j) / NR : kStream, end = j + streams * NR;
    panel<V, MR, NR>(x, ldx, w, ldw, K, i0, j, streams, w + (end < j1 ? end : j) * ldw, sink);
    j = end;
  }
  if (j < j1 && j1 - j0 >= NR)  // the last rows once more: the same bits, written twice
    panel<V, MR, NR>(x, ldx, w, ldw, K, i0, j1 - NR, 1, w + j * ldw, sink);
  else
    for (; j < j1; j++) panel<V, MR, 1>(x, ldx, w, ldw, K, i0, j, 1, w + j * ldw, sink);
}

// x rows [0, M) with weight rows [j0, j1): the rows are split into strips of nearly equal height, at most V::MR.
template <class V, class Sink>
static void strips(const typename V::T* x, int64_t ldx, int64_t M, const typename V::T* w, int64_t ldw, int64_t K,
                   int64_t j0, int64_t j1, const Sink& sink) {
  for (int64_t left = M, i = 0; left > 0;) {
    int64_t num_strips = (left + V::MR - 1) / V::MR;
    int height = int((left + num_strips - 1) / num_strips);
    switch (height) {
#define SPECDEC_STRIP(h) \
  case h:                \
    if constexpr (h <= V::MR) strip<V, h>(x, ldx, w, ldw, K, i, j0, j1, sink); \
    break;
      SPECDEC_STRIP(1)
      SPECDEC_STRIP(2)
      SPECDEC_STRIP(3)
      SPECDEC_STRIP(4)
      SPECDEC_STRIP(5)
      SPECDEC_STRIP(6)
      SPECDEC_STRIP(7)
      SPECDEC_STRIP(8)
#undef SPECDEC_STRIP
    }
    i += height;
    left -= height;
  }
}

template <class V>
static void linear(const Linear& op, int64_t n_begin, int64_t n_end) {
  using T = typename V::T;
  const T* x = static_cast<const T*>(op.x);
  const T* w = static_cast<const T*>(op.weight);
  LinearSink<V> sink{static_cast<const T*>(op.bias), static_cast<T*>(op.y), op.N};
  // Weight rows that stay in the second-level cache while all strips of x pass over them.
  int64_t block = (256 * 1024) / (op.K * int64_t(sizeof(T)) + 1) / V::UNIT * V::UNIT;
  if (op.M <= V::MR || block < V::UNIT) block = op.M <= V::MR ? n_end - n_begin : V::UNIT;
  for (int64_t j = n_begin; j < n_end; j += block)
    strips<V>(x, op.K, op.M, w, op.K, op.K, j, j + block < n_end ? j + block : n_end, sink);
}

}  // namespace
