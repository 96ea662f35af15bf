// The table of kernels that each instruction-set variant fills in. No torch here: variants compile in seconds, and no
// inline function of a shared header is emitted with instructions that the machine may lack.
//
// Sizes: M rows, K inputs, N outputs, D key size, E value size, Q queries (rows of a tile x heads of a group).
#pragma once
#include <stdint.h>

namespace specdec {

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2, kNumTypes = 3 };

// How a cache stores a row of keys or values: as it is; as int8 codes with one float32 scale; as E4M3 codes with one
// E8M0 scale per block.
enum Storage { kPlain = 0, kInt8 = 1, kMxfp8 = 2, kNumStorages = 3 };
constexpr int64_t kBlock = 32;

// Positions are split into chunks of this many, in prefix order, and chunks are merged in order: part of the result.
constexpr int64_t kChunk = 256;
// Queries of one attention tile, unless one row's group alone is larger.
constexpr int64_t kTileQueries = 24;

struct Linear {
  const void* x;       // [M, K] contiguous
  const void* weight;  // [N, K] contiguous
  const void* bias;    // [N] or null
  void* y;             // [M, N] contiguous
  int64_t M, K, N;
};

// How the weights of a product are stored.
enum Kind { kMxfp4, kMxfp6E2m3, kMxfp6E3m2, kMxfp8E4m3, kMxfp8E5m2, kMxint8, kInt4, kSparse, kNumKinds };

struct Stored {
  int kind;
  int64_t group;         // inputs that share a scale
  const uint8_t* codes;  // [N, code_bytes]: a bit string per row; kSparse: one bit per input that has a value
  const void* scales;    // [N, num_scales]: bytes of exponents, or bfloat16; kSparse: the values in bfloat16
  const uint8_t* zeros;  // kInt4: [N, num_scales] or null
  int64_t code_bytes, num_scales;
};

struct Packed {
  const void* x;  // [M, K] contiguous
  Stored weight;
  const void* bias;  // [N] or null
  void* y;           // [M, N] contiguous
  int64_t M, K, N;
};

// Rows rounded to int8, by one scale each.
struct Rounded {
  const int8_t* x;      // [M, K]
  const float* scales;  // [M]
  const int32_t* sums;  // [M], of each row's codes
};

struct Int8 {
  Rounded rows;
  const int8_t* weight;  // [N, K]
  const float* scales;   // [N]
  const void* bias;      // [N] of the type of y, or null
  void* y;               // [M, N] contiguous
  int64_t M, K, N;
};

// Rows rounded to int8 with weights that are whole numbers times a scale for each group.
struct A8 {
  Rounded rows;  // x laid out by the variant, see a8_rows; no sums
  Stored weight;
  const void* bias;  // [N] of the type of y, or null
  void* y;           // [M, N] contiguous
  int64_t M, K, N;
};

// One row: it sees virtual slots j in [first, count). For j < prefix + lead that is slot j, then come the slots
// prefix + columns[0], prefix + columns[1], ...
struct Row {
  const int32_t* columns;
  int64_t count, lead, first;
};

// Where a row finds virtual slot j. Grows with j.
static inline int64_t slot_of(int64_t prefix, const Row& row, int64_t j) {
  const int64_t late = j - prefix - row.lead;
  return late < 0 ? j : prefix + row.columns[late];
}

// Consecutive rows of one sequence and the query heads that share one key/value head. Query q = row * group + head.
struct Tile {
  const void* queries;  // [Q, D]
  const void* keys;     // [C, D], the first that of slot `first_slot`
  const void* values;   // [C, E], likewise
  const Row* rows;
  int64_t num_rows, group, D, E, prefix, first_slot;
  double scale, softcap;
};

// The attention of a tile over some chunks. Accumulators are double for float64, float otherwise.
struct Partial {
  void* maxima;   // [Q]
  void* sums;     // [Q]
  void* outputs;  // [Q, E]
  uint8_t* seen;  // [Q], 0 while the query has seen nothing
};

struct Kernels {
  const char* name;
  int64_t unit;  // outputs per indivisible piece of a linear
  void (*linear[kNumTypes])(const Linear&, int64_t n_begin, int64_t n_end);
  // The same with stored weights; `scratch` is packed_scratch bytes of its own thread's memory.
  void (*packed[kNumTypes])(const Packed&, int64_t n_begin, int64_t n_end, void* scratch);
  int64_t (*packed_scratch[kNumTypes])(const Packed&);
  // Rows [M, K] to int8.
  void (*round_rows[kNumTypes])(const void* x, int64_t M, int64_t K, int8_t* codes, float* scales, int32_t* sums);
  // Products of int8 rows, summed exactly, then scaled; by the type of y.
  void (*int8[kNumTypes])(const Int8&, int64_t n_begin, int64_t n_end);
  // The same for A8. Its rows are laid out once for all outputs, in a8_row_bytes each from a cache line's edge on;
  // a8_scratch bytes per thread.
  int64_t (*a8_row_bytes)(int64_t K);
  void (*a8_rows)(const int8_t* codes, int64_t M, int64_t K, uint8_t* out);
  int64_t (*a8_scratch)(const A8&);
  void (*a8[kNumTypes])(const A8&, int64_t n_begin, int64_t n_end, void* scratch);
  // Fills `part` from one chunk. `scores` is scratch of Q * kChunk accumulators.
  void (*attend[kNumTypes])(const Tile&, int64_t chunk, void* scores, const Partial& part);
  void (*merge[kNumTypes])(const Partial& into, const Partial& part, int64_t num_queries, int64_t E);
  // Writes query q of the partial, divided by its sum, to out + q_offsets[q] (in elements).
  void (*finish[kNumTypes])(const Partial&, int64_t num_queries, int64_t E, void* out, const int64_t* q_offsets);
  // One row of a cache to codes and scales, and some rows back, rounded once to the type. Null for kPlain.
  void (*encode[kNumTypes][kNumStorages])(const void* row, int64_t size, void* codes, void* scales);
  void (*decode[kNumTypes][kNumStorages])(const void* codes, const void* scales, int64_t rows, int64_t size, void* out);
};

const Kernels* portable_kernels();
#if defined(__x86_64__)
// Absent (null) when the compiler could not build the variant.
__attribute__((weak)) const Kernels* avx2_kernels();
__attribute__((weak)) const Kernels* avx512_kernels();
__attribute__((weak)) const Kernels* avx512bf16_kernels();
#endif

}  // namespace specdec
