// Products of rows with weight rows, for any vector type. Included by each variant inside its own translation unit.
//
// A dot product is one vector accumulator that walks along K, then a fixed tree over its lanes. A tile holds many of
// them, but never lets one depend on another: so a row's result has the same bits in every tile shape.
#pragma once
#include "bf16.h"
#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

namespace {
using namespace specdec;

// `V` (a "dot type") offers: T storage, A accumulator scalar, Acc and Op registers, STEP elements per Op, MR rows of x
// in the largest tile, NR(mr) rows of weight beside them, and zero, load, load_some, fma, reduce.
template <class V, int MR, int NR>
static INLINE void dot_tile(const typename V::T* x, int64_t ldx, const typename V::T* w, int64_t ldw, int64_t K,
                            typename V::A* out) {
  typename V::Acc acc[MR * NR];
#pragma GCC unroll 64
  for (int i = 0; i < MR * NR; i++) acc[i] = V::zero();
  int64_t k = 0;
  for (; k + V::STEP <= K; k += V::STEP) {
    if constexpr (MR < NR) {  // the fewer operands stay in registers
      typename V::Op a[MR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) a[i] = V::load(x + i * ldx + k);
#pragma GCC unroll 16
      for (int j = 0; j < NR; j++) {
        typename V::Op b = V::load(w + j * ldw + k);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) V::fma(acc[i * NR + j], a[i], b);
      }
    } else {
      typename V::Op b[NR];
#pragma GCC unroll 16
      for (int j = 0; j < NR; j++) b[j] = V::load(w + j * ldw + k);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        typename V::Op a = V::load(x + i * ldx + k);
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) V::fma(acc[i * NR + j], a, b[j]);
      }
    }
  }
  if (k < K) {
    typename V::Op b[NR];
#pragma GCC unroll 16
    for (int j = 0; j < NR; j++) b[j] = V::load_some(w + j * ldw + k, int(K - k));
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      typename V::Op a = V::load_some(x + i * ldx + k, int(K - k));
#pragma GCC unroll 16
      for (int j = 0; j < NR; j++) V::fma(acc[i * NR + j], a, b[j]);
    }
  }
  V::template reduce<MR * NR>(acc, out);
}

// Where the dot product of x row i and weight row j goes.
template <class V>
struct LinearSink {
  const typename V::T* bias;
  typename V::T* y;
  int64_t ldy;
  INLINE void put(int64_t i, int64_t j, typename V::A dot) const {
    round_to(bias ? dot + to_float(bias[j]) : dot, y + i * ldy + j);
  }
};

template <class V>
struct ScoreSink {
  typename V::A* scores;
  int64_t ld;
  INLINE void put(int64_t i, int64_t j, typename V::A dot) const { scores[i * ld + j] = dot; }
};

template <class V, int MR, int NR, class Sink>
static void tile_at(const typename V::T* x, int64_t ldx, const typename V::T* w, int64_t ldw, int64_t K, int64_t i0,
                    int64_t j0, const Sink& sink) {
  typename V::A out[MR * NR];
  dot_tile<V, MR, NR>(x + i0 * ldx, ldx, w + j0 * ldw, ldw, K, out);
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) sink.put(i0 + i, j0 + j, out[i * NR + j]);
}

// x rows [i0, i0 + MR) with weight rows [j0, j1).
template <class V, int MR, class Sink>
static void strip(const typename V::T* x, int64_t ldx, const typename V::T* w, int64_t ldw, int64_t K, int64_t i0,
                  int64_t j0, int64_t j1, const Sink& sink) {
  constexpr int NR = V::NR(MR);
  int64_t j = j0;
  for (; j + NR <= j1; j += NR) tile_at<V, MR, NR>(x, ldx, w, ldw, K, i0, j, sink);
  for (; j < j1; j++) tile_at<V, MR, 1>(x, ldx, w, ldw, K, i0, j, sink);
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
