// The products of a8.h by the instruction that sums four products of an unsigned and a signed byte. A lane of a vector
// is a group of 32 inputs; sixteen groups, a stripe, are summed before anything becomes a float.
//
// A group's codes are four words of eight nibbles. Words r of the sixteen groups make vector r; its low nibbles are the
// even inputs of words r, its high ones the odd. Lane 4 i + j is group 4 j + i, as transposing four words leaves it. Rows
// lie in the same order, as unsigned bytes: 128 too large, which the products of the weights with 128 take off again.
#pragma once
#include <immintrin.h>

#include "a8.h"

namespace {

struct VnniA8 {
  static int64_t row_bytes(int64_t K) { return (K + kStripe - 1) / kStripe * kStripe; }
  static int64_t scratch(const A8&) { return 0; }

  static void lay_out(const int8_t* codes, int64_t M, int64_t K, uint8_t* out) {
    const int64_t pitch = row_bytes(K);
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    memset(out, 128, M * pitch);  // what is beyond K stays a zero
    for (int64_t i = 0; i < M; i++) {
      // Rows that are multiplied at once lie side by side, stripe by stripe: a power of two apart they would push each
      // other out of the cache.
      const int64_t first = i / kRowsAtOnce * kRowsAtOnce, together = M - first < kRowsAtOnce ? M - first : kRowsAtOnce;
      uint8_t* row = out + first * pitch + (i - first) * kStripe;
      for (int64_t g = 0; g < K / kLane; g++) {
        const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * K + g * kLane));
        uint32_t words[8];  // even and odd inputs of the four words
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words),
                            _mm256_xor_si256(_mm256_shuffle_epi8(from, order), _mm256_set1_epi8(-128)));
        const int64_t in = g % kLanes, lane = 4 * (in % 4) + in / 4;
        uint8_t* to = row + g / kLanes * kStripe * together + lane * 4;
        for (int v = 0; v < 8; v++) memcpy(to + v * 64, words + v, 4);
      }
    }
  }

  // The groups' order in a vector's lanes; it is its own inverse.
  static INLINE __m512i order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }

  // Scales or zeros of a stripe whose group g has number g * 32 / group: which one belongs to each lane.
  static INLINE __m512i owners(int64_t group) { return _mm512_srlv_epi32(order(), _mm512_set1_epi32(group == 32 ? 0 : group == 64 ? 1 : 2)); }

  static INLINE __m512 scales(const Stored& weight, int64_t first, __mmask16 there, __m512i owner) {
    if (weight.kind == kInt4) {
      const __m256i words = _mm256_maskz_loadu_epi16(there, static_cast<const Bf16*>(weight.scales) + first);
      return _mm512_castsi512_ps(_mm512_permutexvar_epi32(owner, _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)));
    }
    const __m128i bytes = _mm_maskz_loadu_epi8(there, static_cast<const uint8_t*>(weight.scales) + first);
    const __m512i powers = _mm512_permutexvar_epi32(owner, _mm512_cvtepu8_epi32(bytes));
    __m512i bits = _mm512_slli_epi32(powers, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(powers, powers), _mm512_set1_epi32(0x00400000));
    const __mmask16 none = _mm512_cmpeq_epi32_mask(powers, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, none, _mm512_set1_epi32(0x7fc00000)));
  }

  // Four words of sixteen groups, of which `groups` are there.
  static INLINE void words(const uint8_t* codes, int64_t groups, __m512i out[4]) {
    __m512i from[4];
    for (int j = 0; j < 4; j++) {
      const int64_t rest = (groups - 4 * j) * 4;
      from[j] = rest >= 16 ? _mm512_loadu_si512(codes + 64 * j)
                           : _mm512_maskz_loadu_epi32(rest > 0 ? __mmask16((1u << rest) - 1) : __mmask16(0), codes + 64 * j);
    }
    const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
    const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
  }

  // One stripe: sums of MR rows with one output's weights, and their products with the scales, on top of `acc`.
  template <int MR, bool ZEROS>
  static INLINE void stripe(const uint8_t* x, const uint8_t* codes, int64_t groups, __m512i table,
                            __m512 scale, __m512* acc) {
    const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(-128);
    __m512i word[4], surplus = _mm512_setzero_si512(), sum[MR];
    words(codes, groups, word);
    for (int i = 0; i < MR; i++) sum[i] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512i nibbles = _mm512_and_si512(half ? _mm512_srli_epi16(word[r], 4) : word[r], nibble);
        const __m512i w = ZEROS ? _mm512_sub_epi8(nibbles, table) : _mm512_shuffle_epi8(table, nibbles);
        surplus = _mm512_dpbusd_epi32(surplus, offset, w);
        for (int i = 0; i < MR; i++)
          sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_loadu_si512(x + i * kStripe + (2 * r + half) * 64), w);
      }
    for (int i = 0; i < MR; i++) {
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i], surplus));
      acc[i] = _mm512_add_ps(acc[i], _mm512_mul_ps(whole, scale));
    }
  }

  template <int MR, bool ZEROS, class T>
  static INLINE void output(const A8& op, int64_t row, int64_t n) {
    const Stored& weight = op.weight;
    const int64_t groups = op.K / kLane, per = weight.group / kLane;
    const uint8_t* x = reinterpret_cast<const uint8_t*>(op.rows.x) + row * row_bytes(op.K);
    const uint8_t* codes = weight.codes + n * weight.code_bytes;
    const __m512i owner = owners(weight.group);
    __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(whole_numbers(weight))));
    __m512 acc[MR];
    for (int i = 0; i < MR; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += kLanes) {
      const int64_t left = groups - g < kLanes ? groups - g : kLanes, first = n * weight.num_scales + g / per;
      const __mmask16 there = __mmask16((1u << (left / per)) - 1);
      for (int line = 0; line < 4; line++) __builtin_prefetch(codes + g * 16 + 2048 + 64 * line, 0, 3);
      if constexpr (ZEROS) {
        const __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, weight.zeros + first));
        table = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(owner, zero),
                                    _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)));
      }
      const __m512 scale = scales(weight, first, there, owner);
      stripe<MR, ZEROS>(x + g * kLane * MR, codes + g * 16, left, table, scale, acc);
    }
    for (int i = 0; i < MR; i++) {
      float lanes[kLanes];
      _mm512_storeu_ps(lanes, _mm512_permutexvar_ps(order(), acc[i]));
      put_a8<T>(op, row + i, n, in_halves(lanes));
    }
  }

  template <int MR, class T>
  static void outputs(const A8& op, int64_t row, int64_t n_begin, int64_t n_end) {
    if (op.weight.zeros)
      for (int64_t n = n_begin; n < n_end; n++) output<MR, true, T>(op, row, n);
    else
      for (int64_t n = n_begin; n < n_end; n++) output<MR, false, T>(op, row, n);
  }

  template <class T>
  static void run(const A8& op, int64_t n_begin, int64_t n_end, void*) {
    using Outputs = void (*)(const A8&, int64_t, int64_t, int64_t);
    static const Outputs by_rows[kRowsAtOnce] = {outputs<1, T>, outputs<2, T>, outputs<3, T>, outputs<4, T>,
                                                 outputs<5, T>, outputs<6, T>, outputs<7, T>, outputs<8, T>};
    // Where more rows come than are multiplied at once, the weights that all of them pass over stay in a near cache.
    const int64_t block = op.M <= kRowsAtOnce ? n_end - n_begin : 256 * 1024 / (op.K / 2) + 1;
    for (int64_t n = n_begin; n < n_end; n += block)
      for (int64_t i = 0; i < op.M; i += kRowsAtOnce) {
        const int64_t rows = op.M - i < kRowsAtOnce ? op.M - i : kRowsAtOnce;
        by_rows[rows - 1](op, i, n, n + block < n_end ? n + block : n_end);
      }
  }
};

}  // namespace
