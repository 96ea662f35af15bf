// Products of int8 rows with int8 weights: sums are exact in int32, so their order does not matter, and rows cannot
// change each other.
#pragma once
#include "linear.h"
#include "rounding.h"

namespace {

// `I8` (a dot type of linear.h over bytes) adds `OFFSET` to every weight; that much times the row's sum is taken off.
template <class I8, class T>
struct Int8Sink {
  const Int8& op;
  INLINE void put(int64_t i, int64_t j, int64_t count, const int32_t* dots) const {
    const float scale = op.rows.scales[i];
    const int32_t surplus = I8::OFFSET * op.rows.sums[i];
    const T* bias = static_cast<const T*>(op.bias);
    T* to = static_cast<T*>(op.y) + i * op.N + j;
    for (int64_t n = 0; n < count; n++) {
      float out = float(dots[n] - surplus) * scale * op.scales[j + n];
      if (bias) out += float(to_float(bias[j + n]));
      round_to(out, to + n);
    }
  }
};

// One row to int8: its largest magnitude becomes 127. A row with NaN gets a scale of NaN, and so does all that comes of
// it.
template <class T>
static void round_row(const T* x, int64_t K, int8_t* codes, float* scale, int32_t* sum) {
  const float top = float_of(largest_of(x, K)), largest = top < kSmallest ? kSmallest : top, factor = 127.f / largest;
  int32_t total = 0;
  for (int64_t k = 0; k < K; k++) {
    codes[k] = int8_t(bits_of(float(to_float(x[k])) * factor + kRounder));
    total += codes[k];
  }
  *scale = largest / 127.f;
  *sum = total;
}

template <class T>
static void round_rows(const void* x, int64_t M, int64_t K, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t i = 0; i < M; i++)
    round_row(static_cast<const T*>(x) + i * K, K, codes + i * K, scales + i, sums + i);
}

template <class I8, class T>
static void int8_linear(const Int8& op, int64_t n_begin, int64_t n_end) {
  const Int8Sink<I8, T> sink{op};
  int64_t block = (256 * 1024) / (op.K + 1) / I8::UNIT * I8::UNIT;
  if (op.M <= I8::MR || block < I8::UNIT) block = op.M <= I8::MR ? n_end - n_begin : I8::UNIT;
  for (int64_t j = n_begin; j < n_end; j += block)
    strips<I8>(op.rows.x, op.K, op.M, op.weight, op.K, op.K, j, j + block < n_end ? j + block : n_end, sink);
}

}  // namespace
