// Products of rows with stored weights, for any vector type. Weights are decoded once for all rows of a step, a few
// thousand at a time, into the first-level cache; the dot products are those of linear.h, and so are their bits: what
// comes out is the product with the decoded matrix.
#pragma once
#include "linear.h"
#include "stored.h"

namespace {

// Inputs decoded at a time: NR rows of them stay in the first-level cache, beside the same piece of x.
template <class V>
constexpr int64_t kPiece = 2048 / int64_t(sizeof(typename V::T));
template <class V, int MR, int NR>
static INLINE void packed_tile(const typename V::T* x, const Stored& weight, Decode<typename V::T> decode, int64_t n,
                               int64_t k, int64_t length, bool first, bool last, typename V::Acc* saved,
                               typename V::A* out) {
  // Rows that lie a power of two apart would push each other out of the cache.
  constexpr int64_t pitch = kPiece<V> + 64 / int64_t(sizeof(typename V::T));
  alignas(64) typename V::T decoded[NR * pitch];
  for (int j = 0; j < NR; j++) decode(weight, n + j, k, length, decoded + j * pitch, 2 * NR);
  dot_tile<V, MR, NR, false>(x, decoded, pitch, nullptr, length, first, last, saved, out);
}

// MR rows of packed x with NR weight rows from n on.
template <class V, int MR, int NR, class Sink>
static INLINE void packed_panel(const typename V::T* packed, const Stored& weight, Decode<typename V::T> decode,
                                int64_t K, int64_t n, const Sink& sink) {
  typename V::Acc saved[MR * NR];
  typename V::A out[MR * NR];
  for (int64_t k = 0; k < K; k += kPiece<V>) {
    const bool last = k + kPiece<V> >= K;
    packed_tile<V, MR, NR>(packed + k * MR, weight, decode, n, k, last ? K - k : kPiece<V>, k == 0, last, saved, out);
  }
  for (int i = 0; i < MR; i++) sink.put(i, n, NR, out + i * NR);
}

template <class V, int MR, class Sink>
static void packed_strip(const Packed& op, Decode<typename V::T> decode, int64_t n0, int64_t n1,
                         typename V::T* packed, const Sink& sink) {
  constexpr int NR = V::NR(MR);
  const int64_t K = op.K;
  for (int64_t k = 0; k < K; k += kPiece<V>)
    pack<V, MR>(static_cast<const typename V::T*>(op.x) + k, K, K - k < kPiece<V> ? K - k : kPiece<V>,
                packed + k * MR);
  // Weights are read in the order in which they lie; x comes from the second-level cache where it is too long for the
  // first, which takes less time than decoding.
  int64_t n = n0;
  for (; n1 - n >= NR; n += NR) packed_panel<V, MR, NR>(packed, op.weight, decode, K, n, sink);
  if (n < n1 && n1 - n0 >= NR)  // the last rows once more: the same bits, written twice
    packed_panel<V, MR, NR>(packed, op.weight, decode, K, n1 - NR, sink);
  else
    for (; n < n1; n++) packed_panel<V, MR, 1>(packed, op.weight, decode, K, n, sink);
}

// More rows than a strip holds: blocks of weights are decoded into the second-level cache, and all rows pass over them.
template <class V>
static void packed_many(const Packed& op, Decode<typename V::T> decode, int64_t n_begin, int64_t n_end,
                        typename V::T* decoded) {
  using T = typename V::T;
  for (int64_t n = n_begin; n < n_end; n += V::UNIT) {
    const int64_t rows = n_end - n < V::UNIT ? n_end - n : V::UNIT;
    for (int64_t j = 0; j < rows; j++) decode(op.weight, n + j, 0, op.K, decoded + j * op.K, 0);
    const T* bias = static_cast<const T*>(op.bias);
    const LinearSink<V> sink{bias ? bias + n : nullptr, static_cast<T*>(op.y) + n, op.N};
    strips<V>(static_cast<const T*>(op.x), op.K, op.M, decoded, op.K, op.K, 0, rows, sink);
  }
}

// Bytes of scratch that a call of packed() needs.
template <class V>
static int64_t packed_scratch(const Packed& op) {
  return op.K * (op.M > V::MR ? V::UNIT : V::MR) * int64_t(sizeof(typename V::T));
}

template <class V, class Decoders>
static void packed(const Packed& op, int64_t n_begin, int64_t n_end, void* scratch) {
  using T = typename V::T;
  const Decode<T> decode = Decoders::template get<T>(op.weight.kind);
  T* memory = static_cast<T*>(scratch);
  if (op.M > V::MR) return packed_many<V>(op, decode, n_begin, n_end, memory);
  const LinearSink<V> sink{static_cast<const T*>(op.bias), static_cast<T*>(op.y), op.N};
  switch (op.M) {
#define SPECDEC_STRIP(h) \
  case h:                \
    if constexpr (h <= V::MR) packed_strip<V, h>(op, decode, n_begin, n_end, memory, sink); \
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
}

}  // namespace
