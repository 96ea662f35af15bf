// Numbers by their bits, and the rounding of rows to int8. No loop here sums floats, so that all variants agree.
#pragma once
#include "bf16.h"

#ifndef INLINE
#define INLINE inline __attribute__((always_inline))
#endif

namespace {

// Rows of smaller magnitude are divided by this, so that nothing overflows: such a row is zero for every purpose.
constexpr float kSmallest = 1e-30f;
// Added to a number below 2^22, this rounds it to the nearest whole one, ties to even, which stands in the lowest bits.
constexpr float kRounder = 12582912.f;

static INLINE uint32_t bits_of(float x) {
  uint32_t out;
  memcpy(&out, &x, 4);
  return out;
}

static INLINE float float_of(uint32_t bits) {
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// Bits of the largest magnitude in a row. Magnitudes compare like their bits, and NaN is the largest of all; signed,
// because older processors have no other maximum.
template <class T>
static INLINE uint32_t largest_of(const T* row, int64_t size) {
  int32_t top = 0;
  for (int64_t i = 0; i < size; i++) {
    const int32_t bits = int32_t(bits_of(float(to_float(row[i]))) & 0x7fffffffu);
    top = bits > top ? bits : top;
  }
  return uint32_t(top);
}

}  // namespace
