// The products of a8.h by the instruction that sums four products of an unsigned and a signed byte. A lane of a vector
// is a group of 32 inputs; sixteen groups, a stripe, are summed before anything becomes a float.
//
// A group's codes are four words of eight nibbles. Words r of the sixteen groups make vector r; its low nibbles are the
// even inputs of words r, its high ones the odd. Lane 4 i + j is group 4 j + i, as transposing four words leaves it.
// Rows lie in the same order. Weights are the unsigned factors: what they are too large by, times a row's sum over the
// group, is taken off again. Those sums lie behind each stripe of a row.
//
// Where at most half a stripe is left at the end, two outputs share one: groups j = 0, 1 of the first, then of the
// second. So lie the pairs of lanes that are added first, when lanes are added in halves.
#pragma once
#include <immintrin.h>

#include "a8.h"

namespace {

struct VnniA8 {
  static constexpr int64_t kCodes = kStripe / 2;   // bytes of an output's stripe
  static constexpr int64_t kPiece = kStripe + 64;  // of a row's: numbers, and for each group their sum, negative
  static constexpr int64_t kHalf = kLanes / 2;     // groups
  static constexpr int kTogether = 4;              // outputs whose lanes are added up at once
  static constexpr int64_t kHotBytes = 28 * 1024;  // of rows that stay in the first cache while weights stream by
  // Bytes from what is read to what is asked for: into the second cache, then into the first. Either alone is slower,
  // the one where rows are short, the other where they are long.
  static constexpr int64_t kFar = 8192, kNear = 2048;

  static int64_t row_bytes(int64_t K) { return (K + kStripe - 1) / kStripe * kPiece; }
  static int64_t scratch(const A8&) { return 0; }
  static bool ends_in_half(int64_t groups) { return groups % kLanes != 0 && groups % kLanes <= kHalf; }

  // Of `left` rows, so many are multiplied at once next.
  static int64_t height(int64_t left, int64_t K) {
    const int64_t hot = kHotBytes / row_bytes(K), most = hot > kRowsAtOnce ? kRowsAtOnce : hot < 2 ? 2 : hot;
    const int64_t times = (left + most - 1) / most;
    return (left + times - 1) / times;
  }

  static void lay_out(const int8_t* codes, int64_t M, int64_t K, uint8_t* out) {
    const int64_t groups = K / kLane, whole = groups / kLanes * kLanes;
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m256i both = _mm256_broadcastsi128_si256(order), ones = _mm256_set1_epi8(1);
    memset(out, 0, M * row_bytes(K));
    // Rows that are multiplied at once lie side by side, stripe by stripe: a power of two apart they would push each
    // other out of the cache.
    for (int64_t first = 0, together; first < M; first += together) {
      together = height(M - first, K);
      for (int64_t i = first; i < first + together; i++) {
        uint8_t* row = out + first * row_bytes(K) + (i - first) * kPiece;
        for (int64_t g = 0; g < groups; g++) {
          const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * K + g * kLane));
          int32_t words[9];  // even and odd inputs of the four words, and the sum
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_shuffle_epi8(from, both));
          const __m256i eight = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, from);
          __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
          sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
          words[8] = -_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
          uint8_t* to = row + g / kLanes * kPiece * together;
          put_words(words, g % kLanes, to);
          if (g >= whole && ends_in_half(groups)) put_words(words, g % kLanes + kHalf, to);
        }
      }
    }
  }

  static INLINE void put_words(const int32_t words[9], int64_t in, uint8_t* to) {
    to += (4 * (in % 4) + in / 4) * 4;
    for (int v = 0; v < 9; v++) memcpy(to + v * 64, words + v, 4);
  }

  enum Numbers { kTwice, kEight, kZeros };  // twice MXFP4's elements; nibbles less eight; nibbles less a group's zero

  // Which of up to sixteen scales, or zeros, belongs to each lane; in halves eight of one output, eight of another.
  template <Numbers NUMBERS, bool HALF>
  struct Shared {
    __m512i owner;
    __m128i owner_bytes;
    __mmask16 there;

    INLINE Shared(int shift, int64_t groups) {
      const __m512i group = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i output = _mm512_and_si512(group, _mm512_set1_epi32(HALF ? int(kHalf) : 0));
      owner = _mm512_or_si512(_mm512_srli_epi32(_mm512_andnot_si512(output, group), shift), output);
      owner_bytes = _mm512_cvtepi32_epi8(owner);
      there = __mmask16((1u << (groups >> shift)) - 1);
    }

    INLINE __m512i bytes(const void* all, int64_t first, int64_t second) const {
      const uint8_t* from = static_cast<const uint8_t*>(all);
      __m128i found = _mm_maskz_loadu_epi8(there, from + first);
      if constexpr (HALF) found = _mm_unpacklo_epi64(found, _mm_maskz_loadu_epi8(there, from + second));
      return _mm512_cvtepu8_epi32(_mm_shuffle_epi8(found, owner_bytes));
    }

    INLINE __m512 scales(const Stored& weight, int64_t first, int64_t second) const {
      if constexpr (NUMBERS == kTwice) {
        const __m512i powers = bytes(weight.scales, first, second);
        const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(powers, 23), _mm512_set1_epi32(0x00400000));
        const __mmask16 none = _mm512_cmpeq_epi32_mask(powers, _mm512_set1_epi32(255));
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, none, _mm512_set1_epi32(0x7fc00000)));
      }
      const Bf16* from = static_cast<const Bf16*>(weight.scales);
      __m256i found = _mm256_maskz_loadu_epi16(there, from + first);
      if constexpr (HALF)
        found = _mm256_inserti128_si256(found, _mm_maskz_loadu_epi16(__mmask8(there), from + second), 1);
      const __m512i places = _mm512_slli_epi32(owner, 16);  // into the upper halves, under which are zeros
      return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_castsi256_si512(found)));
    }

    // What the unsigned factors are too large by.
    INLINE __m512i offsets(const Stored& weight, int64_t first, int64_t second) const {
      if constexpr (NUMBERS == kZeros) return bytes(weight.zeros, first, second);
      return _mm512_set1_epi32(NUMBERS == kEight ? 8 : 12);
    }
  };

  // The first `bytes` of 64, the others zero.
  static INLINE __m512i some(const uint8_t* from, int64_t bytes) {
    if (bytes >= 64) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi32(bytes > 0 ? __mmask16((1u << (bytes / 4)) - 1) : __mmask16(0), from);
  }

  template <int LINES>
  static INLINE void ask(const uint8_t* codes) {
    for (int line = 0; line < LINES; line++) {
      __builtin_prefetch(codes + kFar + 64 * line, 0, 2);
      __builtin_prefetch(codes + kNear + 64 * line, 0, 3);
    }
  }

  // Sums of MR rows over the groups of a stripe, times their scales, on top of `acc`. `from`: codes, four groups each.
  template <int MR, bool TABLE>
  static INLINE void stripe(const uint8_t* x, const __m512i from[4], __m512i offset, __m512 scale, __m512* acc) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m128i twice = _mm_load_si128(reinterpret_cast<const __m128i*>(kTwiceE2M1));
    const __m512i table = _mm512_broadcast_i32x4(_mm_add_epi8(twice, _mm_set1_epi8(12)));
    const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
    const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
    const __m512i word[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                             _mm512_unpackhi_epi64(b, d)};
    __m512i sum[MR];
    for (int i = 0; i < MR; i++) sum[i] = _mm512_madd_epi16(_mm512_load_si512(x + i * kPiece + kStripe), offset);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m512i w = _mm512_and_si512(half ? _mm512_srli_epi16(word[r], 4) : word[r], nibble);
        if constexpr (TABLE) w = _mm512_shuffle_epi8(table, w);
        for (int i = 0; i < MR; i++)
          sum[i] = _mm512_dpbusd_epi32(sum[i], w, _mm512_load_si512(x + i * kPiece + (2 * r + half) * 64));
      }
    for (int i = 0; i < MR; i++) acc[i] = _mm512_add_ps(acc[i], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i]), scale));
  }

  // A stripe of one output, whose codes are `bytes` and whose scales are those from `first` on; some after `far`.
  template <int MR, Numbers NUMBERS>
  static INLINE void one(const uint8_t* x, const Stored& weight, const uint8_t* codes, int64_t bytes, int64_t first,
                         int64_t far, const Shared<NUMBERS, false>& shared, __m512* acc) {
    ask<4>(codes);
    __builtin_prefetch(static_cast<const uint8_t*>(weight.scales) + far * (NUMBERS == kTwice ? 1 : 2), 0, 2);
    const __m512i from[4] = {some(codes, bytes), some(codes + 64, bytes - 64), some(codes + 128, bytes - 128),
                             some(codes + 192, bytes - 192)};
    stripe<MR, NUMBERS == kTwice>(x, from, shared.offsets(weight, first, 0), shared.scales(weight, first, 0), acc);
  }

  // MR rows with the outputs n[0], n[1], ...: the sums of all lanes to `out`, four for each row.
  template <int MR, Numbers NUMBERS>
  static void four(const A8& op, const uint8_t* x, const int64_t* n, float* out) {
    const Stored weight = op.weight;
    const int shift = weight.group == 32 ? 0 : weight.group == 64 ? 1 : 2;
    const int64_t groups = op.K / kLane, rest = groups % kLanes, stripes = groups / kLanes;
    const Shared<NUMBERS, false> all(shift, kLanes), most(shift, rest);
    const Shared<NUMBERS, true> half(shift, rest);
    const uint8_t* end = x + stripes * kPiece * MR;
    __m512 acc[kTogether][MR], ends[kTogether / 2][MR];
    for (int j = 0; j < kTogether; j++) {
      const uint8_t* codes = weight.codes + n[j] * weight.code_bytes;
      int64_t first = n[j] * weight.num_scales;
      __m512 sum[MR];
      for (int i = 0; i < MR; i++) sum[i] = _mm512_setzero_ps();
      for (const uint8_t* piece = x; piece != end; piece += kPiece * MR) {
        one<MR>(piece, weight, codes, 4 * 64, first, first + (kFar / 16 >> shift), all, sum);
        codes += kCodes;
        first += kLanes >> shift;
      }
      if (rest > kHalf) one<MR>(end, weight, codes, rest * 16, first, first, most, sum);
      for (int i = 0; i < MR; i++) acc[j][i] = sum[i];
    }
#pragma GCC unroll 2
    for (int j = 0; j < kTogether / 2; j++) {
      __m512 sum[MR];
      for (int i = 0; i < MR; i++) sum[i] = _mm512_setzero_ps();
      if (ends_in_half(groups)) {
        const int64_t first = n[2 * j] * weight.num_scales + (stripes * kLanes >> shift);
        const int64_t second = n[2 * j + 1] * weight.num_scales + (stripes * kLanes >> shift);
        const uint8_t* a = weight.codes + n[2 * j] * weight.code_bytes + stripes * kCodes;
        const uint8_t* b = weight.codes + n[2 * j + 1] * weight.code_bytes + stripes * kCodes;
        ask<2>(a);
        ask<2>(b);
        const __m512i from[4] = {some(a, rest * 16), some(a + 64, rest * 16 - 64), some(b, rest * 16),
                                 some(b + 64, rest * 16 - 64)};
        stripe<MR, NUMBERS == kTwice>(end, from, half.offsets(weight, first, second),
                                      half.scales(weight, first, second), sum);
      }
      for (int i = 0; i < MR; i++) ends[j][i] = sum[i];
    }
    for (int i = 0; i < MR; i++) _mm_storeu_ps(out + kTogether * i, lanes_of_four(acc, ends, i));
  }

  // In halves: groups g and g + 8, then g and g + 4, and so on.
  template <int MR>
  static INLINE __m128 lanes_of_four(const __m512 acc[kTogether][MR], const __m512 ends[kTogether / 2][MR], int i) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const __m512d a = _mm512_castps_pd(acc[2 * j][i]), b = _mm512_castps_pd(acc[2 * j + 1][i]);
      const __m512d first = _mm512_unpacklo_pd(a, b), second = _mm512_unpackhi_pd(a, b);
      pair[j] = _mm512_add_ps(_mm512_add_ps(_mm512_castpd_ps(first), ends[j][i]), _mm512_castpd_ps(second));
    }
    const __m512 even = _mm512_shuffle_ps(pair[0], pair[1], 0x88), odd = _mm512_shuffle_ps(pair[0], pair[1], 0xdd);
    const __m512 four = _mm512_add_ps(even, odd);
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  }

  using Four = void (*)(const A8&, const uint8_t* x, const int64_t* n, float* out);

  template <Numbers NUMBERS>
  static Four by_rows(int64_t rows) {
    static const Four all[kRowsAtOnce] = {four<1, NUMBERS>, four<2, NUMBERS>, four<3, NUMBERS>, four<4, NUMBERS>,
                                          four<5, NUMBERS>, four<6, NUMBERS>, four<7, NUMBERS>, four<8, NUMBERS>};
    return all[rows - 1];
  }

  template <class T>
  static void outputs(const A8& op, int64_t row, int64_t rows, int64_t n_begin, int64_t n_end) {
    const Four product = op.weight.kind == kMxfp4 ? by_rows<kTwice>(rows)
                         : op.weight.zeros        ? by_rows<kZeros>(rows)
                                                  : by_rows<kEight>(rows);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(op.rows.x) + row * row_bytes(op.K);
    float sums[kRowsAtOnce * kTogether];
    for (int64_t n = n_begin; n < n_end; n += kTogether) {
      int64_t which[kTogether];  // the last one again where there are no more
      for (int j = 0; j < kTogether; j++) which[j] = n + j < n_end ? n + j : n_end - 1;
      product(op, x, which, sums);
      const int64_t count = n_end - n < kTogether ? n_end - n : kTogether;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < count; j++) put_a8<T>(op, row + i, n + j, sums[i * kTogether + j]);
    }
  }

  template <class T>
  static void run(const A8& op, int64_t n_begin, int64_t n_end, void*) {
    // Where rows are multiplied in several turns, the weights that all of them pass over stay in a near cache.
    const int64_t near = (256 * 1024 / (op.K / 2) + kTogether) / kTogether * kTogether;
    const int64_t block = height(op.M, op.K) == op.M ? n_end - n_begin : near;
    for (int64_t n = n_begin; n < n_end; n += block)
      for (int64_t i = 0, rows; i < op.M; i += rows) {
        rows = height(op.M - i, op.K);
        outputs<T>(op, i, rows, n, n + block < n_end ? n + block : n_end);
      }
  }
};

}  // namespace
