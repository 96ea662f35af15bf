// Products of rows rounded to int8 with weights that are small whole numbers times a scale for each group: int4, and
// MXFP4, whose elements are halves of whole numbers. The sum over 32 inputs is exact in int32; it is multiplied by the
// group's scale, and lane g of sixteen adds up, in order along K, those of the groups g, g + 16, g + 32, ... The lanes
// are added in halves at the end. All variants and the reference in torch do just that, with the same bits.
#pragma once
#include "linear.h"
#include "rounding.h"

namespace {
using namespace specdec;

constexpr int kLanes = 16, kLane = 32, kStripe = kLanes * kLane;  // groups, inputs of one, inputs of all
constexpr int64_t kRowsAtOnce = 8;

// Twice the elements of MXFP4, and the nibbles of int4 without a zero of their own.
alignas(16) constexpr int8_t kTwiceE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
alignas(16) constexpr int8_t kAroundEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

static INLINE const int8_t* whole_numbers(const Stored& weight) {
  return weight.kind == kMxfp4 ? kTwiceE2M1 : kAroundEight;
}

static INLINE float scale_of_lane(const Stored& weight, int64_t n, int64_t group) {
  const int64_t at = n * weight.num_scales + group * kLane / weight.group;
  if (weight.kind == kInt4) return to_float(static_cast<const Bf16*>(weight.scales)[at]);
  const uint8_t power = static_cast<const uint8_t*>(weight.scales)[at];
  return float_of(power == 255 ? 0x7fc00000u : power ? uint32_t(power) << 23 : 0x00400000u);
}

// What a row's scale is multiplied by: the whole numbers of MXFP4 are twice its elements.
static INLINE float unit_of(const Stored& weight) { return weight.kind == kMxfp4 ? 0.5f : 1.f; }

template <class T>
static INLINE void put_a8(const A8& op, int64_t i, int64_t n, float sum) {
  float out = sum * (op.rows.scales[i] * unit_of(op.weight));
  if (op.bias) out += float(to_float(static_cast<const T*>(op.bias)[n]));
  round_to(out, static_cast<T*>(op.y) + i * op.N + n);
}

static INLINE float in_halves(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Plain C++ for any machine.
struct PlainA8 {
  static int64_t row_bytes(int64_t K) { return K; }
  static void lay_out(const int8_t* codes, int64_t M, int64_t K, uint8_t* out) { memcpy(out, codes, M * K); }
  static int64_t scratch(const A8& op) { return op.K; }

  template <class T>
  static void run(const A8& op, int64_t n_begin, int64_t n_end, void* memory) {
    int8_t* numbers = static_cast<int8_t*>(memory);
    const int8_t* table = whole_numbers(op.weight);
    const int8_t* x = reinterpret_cast<const int8_t*>(op.rows.x);
    for (int64_t n = n_begin; n < n_end; n++) {
      const uint8_t* codes = op.weight.codes + n * op.weight.code_bytes;
      const uint8_t* zeros = op.weight.zeros ? op.weight.zeros + n * op.weight.num_scales : nullptr;
      for (int64_t k = 0; k < op.K; k += 2) {
        const uint8_t both = codes[k / 2];
        const int zero = zeros ? zeros[k / op.weight.group] : 0;
        numbers[k] = int8_t(zeros ? int(both & 15) - zero : int(table[both & 15]));
        numbers[k + 1] = int8_t(zeros ? int(both >> 4) - zero : int(table[both >> 4]));
      }
      for (int64_t i = 0; i < op.M; i++) {
        float lanes[kLanes] = {0};
        for (int64_t g = 0; g < op.K / kLane; g++) {
          int32_t sum = 0;
          for (int64_t k = g * kLane; k < (g + 1) * kLane; k++) sum += int32_t(x[i * op.K + k]) * numbers[k];
          lanes[g % kLanes] += float(sum) * scale_of_lane(op.weight, n, g);
        }
        put_a8<T>(op, i, n, in_halves(lanes));
      }
    }
  }
};

template <class Engine, class T>
static void a8_linear(const A8& op, int64_t n_begin, int64_t n_end, void* scratch) {
  Engine::template run<T>(op, n_begin, n_end, scratch);
}

}  // namespace
