// Scalar bfloat16, rounded to nearest even as torch does.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct Bf16 {
  uint16_t bits;
};

static inline float to_float(Bf16 x) {
  uint32_t word = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &word, 4);
  return out;
}
static inline float to_float(float x) { return x; }
static inline double to_float(double x) { return x; }

static inline void round_to(float x, float* out) { *out = x; }
static inline void round_to(double x, double* out) { *out = x; }
static inline void round_to(float x, double* out) { *out = x; }
static inline void round_to(float x, Bf16* out) {
  uint32_t word;
  memcpy(&word, &x, 4);
  out->bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

}  // namespace
