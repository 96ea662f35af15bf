// Attention of one tile over one chunk of positions, for any vector type. Included by each variant.
//
// Everything is tied to the virtual index j of a visible slot (its place among the slots that the row sees), so a
// row's bits do not depend on the slots that its ancestors happen to stand in, or on the rows beside it.
#pragma once
#include <math.h>

#include "a8.h"
#include "int8.h"
#include "kv.h"
#include "packed.h"

namespace {

static INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls run(j, slot, length) for stretches of j in [begin, end) that stand in neighbouring slots.
template <class F>
static INLINE void runs(const Tile& tile, const Row& row, int64_t begin, int64_t end, F run) {
  for (int64_t j = begin; j < end;) {
    int64_t slot = slot_of(tile.prefix, row, j), length = 1;
    while (j + length < end && slot_of(tile.prefix, row, j + length) == slot + length) length++;
    run(j, slot, length);
    j += length;
  }
}

// What the rows of a tile see of a chunk: every row sees [shared_begin, shared_end), each in the slot of that number;
// before and behind it rows differ.
struct Span {
  int64_t begin, end, shared_begin, shared_end;
};

static Span span_of(const Tile& tile, int64_t chunk) {
  Span span{chunk * kChunk, (chunk + 1) * kChunk, 0, INT64_MAX};
  for (int64_t r = 0; r < tile.num_rows; r++) {
    const Row& row = tile.rows[r];
    span.shared_begin = most(span.shared_begin, row.first);
    span.shared_end = least(span.shared_end, tile.prefix + row.lead);
  }
  span.shared_begin = most(span.shared_begin, span.begin);
  span.shared_end = least(span.shared_end, span.end);
  if (span.shared_end < span.shared_begin) span.shared_begin = span.shared_end = span.end;
  return span;
}

// A (an "accumulator vector"): W lanes, R register, S scalar; set1, load, store, add, mul, fma, max, exp.

// exp(x) = 2^n * exp(r), r = x - n log 2 in two steps, |r| <= log 2 / 2; the minimax polynomial of Cephes' expf.
template <class A>
static INLINE typename A::R exp_rest(typename A::R x, typename A::R n) {
  return A::fma(n, A::set1(2.12194440e-4f), A::fma(n, A::set1(-0.693359375f), x));
}

template <class A>
static INLINE typename A::R exp_series(typename A::R r) {
  typename A::R y = A::set1(1.9875691500e-4f);
  y = A::fma(y, r, A::set1(1.3981999507e-3f));
  y = A::fma(y, r, A::set1(8.3334519073e-3f));
  y = A::fma(y, r, A::set1(4.1665795894e-2f));
  y = A::fma(y, r, A::set1(1.6666665459e-1f));
  y = A::fma(y, r, A::set1(5.0000001201e-1f));
  return A::add(A::fma(y, A::mul(r, r), r), A::set1(1.f));
}

template <class A>
static INLINE typename A::S lane_exp(typename A::S x) {
  typename A::S out[A::W];
  A::store(out, A::exp(A::set1(x)));
  return out[0];
}

// tanh: the series near 0, where 1 - exp(-2|x|) would cancel.
template <class A>
static INLINE typename A::S soft_tanh(typename A::S x) {
  using S = typename A::S;
  if (sizeof(S) == 8) return S(::tanh(double(x)));
  S size = x < 0 ? -x : x, y;
  if (size < S(0.35)) {
    S t = size * size;
    S series = S(62.0 / 2835) - t * S(1382.0 / 155925);
    series = S(-1.0 / 3) + t * (S(2.0 / 15) + t * (S(-17.0 / 315) + t * series));
    y = size + size * t * series;
  } else {
    S e = lane_exp<A>(-2 * size);
    y = (1 - e) / (1 + e);
  }
  return x < 0 ? -y : y;
}

// Raw dot products of a run of slots with `num` queries.
template <class V>
static void score_run(const Tile& tile, int64_t q, int64_t num, int64_t slot, int64_t length, typename V::A* scores) {
  using T = typename V::T;
  const T* queries = static_cast<const T*>(tile.queries) + q * tile.D;
  const T* keys = static_cast<const T*>(tile.keys) + (slot - tile.first_slot) * tile.D;
  ScoreSink<V> sink{scores, kChunk};
  strips<V>(queries, tile.D, num, keys, tile.D, tile.D, 0, length, sink);
}

// outputs[q, e0 .. e0 + EB*W) += sum over j, in order, of weights[q, j] * values[j].
template <class V, class A, int QR, int EB>
static INLINE void mix_tile(const typename A::S* weights, const typename V::T* values, int64_t E, int64_t length,
                            typename A::S* outputs) {
  typename A::R acc[QR][EB];
#pragma GCC unroll 8
  for (int q = 0; q < QR; q++)
#pragma GCC unroll 8
    for (int e = 0; e < EB; e++) acc[q][e] = A::load(outputs + q * E + e * A::W);
  for (int64_t j = 0; j < length; j++) {
    typename A::R v[EB];
#pragma GCC unroll 8
    for (int e = 0; e < EB; e++) v[e] = A::load(values + j * E + e * A::W);
#pragma GCC unroll 8
    for (int q = 0; q < QR; q++) {
      typename A::R p = A::set1(weights[q * kChunk + j]);
#pragma GCC unroll 8
      for (int e = 0; e < EB; e++) acc[q][e] = A::fma(p, v[e], acc[q][e]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < QR; q++)
#pragma GCC unroll 8
    for (int e = 0; e < EB; e++) A::store(outputs + q * E + e * A::W, acc[q][e]);
}

template <class V, class A, int QR>
static void mix_queries(const typename A::S* weights, const typename V::T* values, int64_t E, int64_t length,
                        typename A::S* outputs) {
  constexpr int EB = A::MIX / QR >= 4 ? 4 : (A::MIX / QR >= 2 ? 2 : 1);
  int64_t e = 0;
  for (; e + EB * A::W <= E; e += EB * A::W) mix_tile<V, A, QR, EB>(weights, values + e, E, length, outputs + e);
  for (; e + A::W <= E; e += A::W) mix_tile<V, A, QR, 1>(weights, values + e, E, length, outputs + e);
  for (; e < E; e++)  // value sizes that are no multiple of the lanes
    for (int q = 0; q < QR; q++) {
      typename A::S sum = outputs[q * E + e];
      for (int64_t j = 0; j < length; j++) sum += weights[q * kChunk + j] * to_float(values[j * E + e]);
      outputs[q * E + e] = sum;
    }
}

template <class V, class A>
static void mix_run(const Tile& tile, int64_t num, int64_t slot, int64_t length, const typename A::S* weights,
                    typename A::S* outputs) {
  const typename V::T* values = static_cast<const typename V::T*>(tile.values) + (slot - tile.first_slot) * tile.E;
  for (; num > 0; num -= A::QR, weights += A::QR * kChunk, outputs += A::QR * tile.E) {
    switch (least(num, A::QR)) {
#define SPECDEC_MIX(n) \
  case n:              \
    if constexpr (n <= A::QR) mix_queries<V, A, n>(weights, values, tile.E, length, outputs); \
    break;
      SPECDEC_MIX(1)
      SPECDEC_MIX(2)
      SPECDEC_MIX(3)
      SPECDEC_MIX(4)
      SPECDEC_MIX(5)
      SPECDEC_MIX(6)
#undef SPECDEC_MIX
    }
  }
}

// Scores to weights exp(score - maximum) in place; returns maximum and sum. Lanes follow the position in the chunk.
template <class A>
static void soften(const Tile& tile, typename A::S* scores, int64_t begin, int64_t end, typename A::S* maximum,
                   typename A::S* sum) {
  using S = typename A::S;
  int64_t from = begin / A::W * A::W, to = (end + A::W - 1) / A::W * A::W;
  for (int64_t j = from; j < begin; j++) scores[j] = S(-INFINITY);
  for (int64_t j = end; j < to; j++) scores[j] = S(-INFINITY);
  if (tile.softcap != 0) {
    S scale = S(tile.scale), cap = S(tile.softcap);
    for (int64_t j = begin; j < end; j++) scores[j] = cap * soft_tanh<A>(scores[j] * scale / cap);
  } else {
    typename A::R scale = A::set1(S(tile.scale));
    for (int64_t j = from; j < to; j += A::W) A::store(scores + j, A::mul(A::load(scores + j), scale));
    for (int64_t j = from; j < begin; j++) scores[j] = S(-INFINITY);  // a scale of 0 or less undid it
    for (int64_t j = end; j < to; j++) scores[j] = S(-INFINITY);
  }
  typename A::R high = A::load(scores + from);
  for (int64_t j = from + A::W; j < to; j += A::W) high = A::max(high, A::load(scores + j));
  S lanes[A::W];
  A::store(lanes, high);
  S top = lanes[0];
  for (int i = 1; i < A::W; i++) top = lanes[i] > top ? lanes[i] : top;
  typename A::R minus = A::set1(-top), total = A::set1(0);
  for (int64_t j = from; j < to; j += A::W) {
    typename A::R p = A::exp(A::add(A::load(scores + j), minus));
    A::store(scores + j, p);
    total = A::add(total, p);
  }
  A::store(lanes, total);
  for (int half = A::W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  *maximum = top;
  *sum = lanes[0];
}

template <class V, class A>
static void attend(const Tile& tile, int64_t chunk, void* scratch, const Partial& part) {
  using S = typename A::S;
  S* scores = static_cast<S*>(scratch);
  S* outputs = static_cast<S*>(part.outputs);
  const int64_t group = tile.group, num_queries = tile.num_rows * group;
  const Span span = span_of(tile, chunk);
  const int64_t shared = span.shared_end - span.shared_begin;
  if (shared > 0)
    score_run<V>(tile, 0, num_queries, span.shared_begin, shared, scores + (span.shared_begin - span.begin));
  // Rows of their own: each in turn, its group of heads together.
  for (int64_t r = 0; r < tile.num_rows; r++) {
    const Row& row = tile.rows[r];
    S* mine = scores + r * group * kChunk;
    auto score = [&](int64_t j, int64_t slot, int64_t length) {
      score_run<V>(tile, r * group, group, slot, length, mine + (j - span.begin));
    };
    const int64_t begin = most(row.first, span.begin), end = least(row.count, span.end);
    runs(tile, row, begin, least(end, span.shared_begin), score);
    runs(tile, row, most(begin, span.shared_end), end, score);
    for (int64_t q = r * group; q < (r + 1) * group; q++) {
      part.seen[q] = begin < end;
      if (begin < end)
        soften<A>(tile, scores + q * kChunk, begin - span.begin, end - span.begin, static_cast<S*>(part.maxima) + q,
                  static_cast<S*>(part.sums) + q);
    }
  }
  memset(outputs, 0, num_queries * tile.E * sizeof(S));
  // Per row: its own slots before the shared ones, the shared ones, its own behind them: positions in order.
  auto mix_own = [&](int64_t r, int64_t begin, int64_t end) {
    runs(tile, tile.rows[r], begin, end, [&](int64_t j, int64_t slot, int64_t length) {
      mix_run<V, A>(tile, group, slot, length, scores + r * group * kChunk + (j - span.begin),
                    outputs + r * group * tile.E);
    });
  };
  for (int64_t r = 0; r < tile.num_rows; r++)
    mix_own(r, most(tile.rows[r].first, span.begin), least(least(tile.rows[r].count, span.end), span.shared_begin));
  if (shared > 0)
    mix_run<V, A>(tile, num_queries, span.shared_begin, shared, scores + (span.shared_begin - span.begin), outputs);
  for (int64_t r = 0; r < tile.num_rows; r++)
    mix_own(r, most(tile.rows[r].first, most(span.begin, span.shared_end)), least(tile.rows[r].count, span.end));
}

template <class A>
static void merge(const Partial& into, const Partial& part, int64_t num_queries, int64_t E) {
  using S = typename A::S;
  S* maxima = static_cast<S*>(into.maxima);
  S* sums = static_cast<S*>(into.sums);
  for (int64_t q = 0; q < num_queries; q++) {
    if (!part.seen[q]) continue;
    S* out = static_cast<S*>(into.outputs) + q * E;
    const S* add = static_cast<const S*>(part.outputs) + q * E;
    const S top = static_cast<const S*>(part.maxima)[q], sum = static_cast<const S*>(part.sums)[q];
    if (!into.seen[q]) {
      into.seen[q] = 1;
      maxima[q] = top;
      sums[q] = sum;
      memcpy(out, add, E * sizeof(S));
      continue;
    }
    const S high = maxima[q] > top ? maxima[q] : top;
    const S keep = lane_exp<A>(maxima[q] - high), gain = lane_exp<A>(top - high);
    maxima[q] = high;
    sums[q] = sums[q] * keep + sum * gain;
    for (int64_t e = 0; e < E; e++) out[e] = out[e] * keep + add[e] * gain;
  }
}

template <class V, class A>
static void finish(const Partial& part, int64_t num_queries, int64_t E, void* out, const int64_t* q_offsets) {
  using S = typename A::S;
  for (int64_t q = 0; q < num_queries; q++) {
    const S* from = static_cast<const S*>(part.outputs) + q * E;
    typename V::T* to = static_cast<typename V::T*>(out) + q_offsets[q];
    const S sum = static_cast<const S*>(part.sums)[q];
    for (int64_t e = 0; e < E; e++) round_to(from[e] / sum, to + e);
  }
}

// `Decoders::get<T>(kind)`: how a variant decodes stored weights. `A8s`: how it multiplies rows rounded to int8 with them.
template <class F32, class A32, class B16, class F64, class A64, class I8, class Decoders, class A8s>
static const Kernels* table(const char* name) {
  static const Kernels kernels = {
      name,
      F32::UNIT,
      {linear<F32>, linear<B16>, linear<F64>},
      {packed<F32, Decoders>, packed<B16, Decoders>, packed<F64, Decoders>},
      {packed_scratch<F32>, packed_scratch<B16>, packed_scratch<F64>},
      {round_rows<float>, round_rows<Bf16>, round_rows<double>},
      {int8_linear<I8, float>, int8_linear<I8, Bf16>, int8_linear<I8, double>},
      A8s::row_bytes,
      A8s::lay_out,
      A8s::scratch,
      {a8_linear<A8s, float>, a8_linear<A8s, Bf16>, a8_linear<A8s, double>},
      {attend<F32, A32>, attend<B16, A32>, attend<F64, A64>},
      {merge<A32>, merge<A32>, merge<A64>},
      {finish<F32, A32>, finish<B16, A32>, finish<F64, A64>},
      {{nullptr, encode_int8<float>, encode_mxfp8<float>},
       {nullptr, encode_int8<Bf16>, encode_mxfp8<Bf16>},
       {nullptr, encode_int8<double>, encode_mxfp8<double>}},
      {{nullptr, decode_int8<float>, decode_mxfp8<float>},
       {nullptr, decode_int8<Bf16>, decode_mxfp8<Bf16>},
       {nullptr, decode_int8<double>, decode_mxfp8<double>}},
  };
  return &kernels;
}

}  // namespace
