// Operators on stored weights: checks, threads and memory. All arithmetic is in the variants.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "dispatch.h"
#include "types.h"

namespace specdec {
namespace {

// Below so many weights a second thread costs more than it brings.
constexpr int64_t kGrain = 64 * 1024;
// 255 * 127 * K stays within int32.
constexpr int64_t kMostInputs = 65536;

void check_matrix(const at::Tensor& t, const char* op, const char* name, int64_t rows, int64_t columns,
                  at::ScalarType type) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == type &&
                  t.is_contiguous() && t.device().is_cpu(),
              op, ": ", name, " must be a contiguous ", type, " CPU tensor [", rows, ", ", columns, "], got ",
              t.scalar_type(), " ", t.sizes());
}

// The output for rows x [..., K], and the bias's memory or null.
struct Rows {
  c10::MaybeOwned<at::Tensor> x;
  at::Tensor y;
  int64_t M, K, N;
  const void* bias;
};

Rows rows_of(const at::Tensor& x, int64_t N, const std::optional<at::Tensor>& bias, const char* op) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && x.device().is_cpu(), op, ": x must be a CPU tensor [..., K], got ",
              x.sizes());
  const bool has_bias = bias.has_value() && bias->defined();
  if (has_bias)
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N && bias->scalar_type() == x.scalar_type() &&
                    bias->is_contiguous() && bias->device().is_cpu(),
                op, ": bias must be a contiguous ", x.scalar_type(), " tensor [", N, "], got ", bias->sizes());
  c10::DimVector sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  auto rows = x.expect_contiguous();
  const int64_t K = x.size(-1), M = rows->numel() / K;
  return {std::move(rows), at::empty(sizes, x.options()), M, K, N, has_bias ? bias->const_data_ptr() : nullptr};
}

// Calls run(n_begin, n_end) on all threads, in whole units.
template <class F>
void over_outputs(const Kernels& table, const Rows& rows, const F& run) {
  const int64_t units = (rows.N + table.unit - 1) / table.unit;
  const int64_t unit_work = table.unit * rows.K * ((rows.M + 7) / 8), grain = (kGrain + unit_work - 1) / unit_work;
  if (units <= grain || at::get_num_threads() == 1) return run(0, rows.N);
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    run(begin * table.unit, std::min(rows.N, end * table.unit));
  });
}

// Checks what is stored of [N, K] weights; `group` is what kinds without int4's choice set themselves.
Stored stored_of(const Rows& rows, const at::Tensor& codes, const at::Tensor& scales,
                 const std::optional<at::Tensor>& zeros, int64_t kind, int64_t group, const char* op) {
  TORCH_CHECK(kind >= 0 && kind < kNumKinds, op, ": no kind ", kind);
  static constexpr int64_t bits[kNumKinds] = {4, 6, 6, 8, 8, 8, 4, 1};
  const bool scaled = kind != kSparse, floats = kind == kInt4 || kind == kSparse;
  if (kind != kInt4) group = 32;
  TORCH_CHECK(group > 0 && group % 32 == 0 && 128 % group == 0, op, ": groups of ", group,
              " are not supported; use 32, 64 or 128");
  TORCH_CHECK(rows.K % group == 0, op, ": K is ", rows.K, ", no multiple of ", group);
  check_matrix(codes, op, "codes", rows.N, rows.K * bits[kind] / 8, at::kByte);
  check_matrix(scales, op, "scales", rows.N, scaled ? rows.K / group : scales.size(1),
               floats ? at::kBFloat16 : at::kByte);
  const bool has_zeros = zeros.has_value() && zeros->defined();
  TORCH_CHECK(!has_zeros || kind == kInt4, op, ": only int4 has zeros");
  if (has_zeros) check_matrix(*zeros, op, "zeros", rows.N, rows.K / group, at::kByte);
  return {int(kind), group, codes.const_data_ptr<uint8_t>(), scales.const_data_ptr(),
          has_zeros ? zeros->const_data_ptr<uint8_t>() : nullptr, codes.size(1), scales.size(1)};
}

// Rows as int8 codes with a scale and a sum each.
struct RoundedRows {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  RoundedRows(const Kernels& table, const Rows& rows, Type type, const char* op)
      : codes(rows.M * rows.K), scales(rows.M), sums(rows.M) {
    TORCH_CHECK(rows.K <= kMostInputs, op, ": sums over ", rows.K, " inputs may leave int32; at most ", kMostInputs);
    table.round_rows[type](rows.x->const_data_ptr(), rows.M, rows.K, codes.data(), scales.data(), sums.data());
  }
};

// The first edge of a cache line from there on, at most kLine - 1 bytes away.
constexpr int64_t kLine = 64;
uint8_t* line_of(uint8_t* memory) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + kLine - 1) / kLine * kLine);
}

// At least so many bytes of this thread's, on a cache line's edge.
void* scratch_of(int64_t bytes) {
  static thread_local std::vector<uint8_t> scratch;
  if (scratch.size() < size_t(bytes + kLine)) scratch.resize(size_t(bytes + kLine));
  return line_of(scratch.data());
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                         const std::optional<at::Tensor>& zeros, int64_t kind, int64_t group,
                         const std::optional<at::Tensor>& bias) {
  constexpr const char* op = "packed_linear";
  const Type type = type_of(x, op);
  TORCH_CHECK(codes.dim() == 2 && scales.dim() == 2, op, ": codes and scales must be matrices");
  Rows rows = rows_of(x, codes.size(0), bias, op);
  const Stored weight = stored_of(rows, codes, scales, zeros, kind, group, op);
  if (rows.M == 0 || rows.N == 0) return rows.y;
  const Packed call{rows.x->const_data_ptr(), weight, rows.bias, rows.y.mutable_data_ptr(), rows.M, rows.K, rows.N};
  const Kernels& table = kernels();
  over_outputs(table, rows, [&](int64_t begin, int64_t end) {
    table.packed[type](call, begin, end, scratch_of(table.packed_scratch[type](call)));
  });
  return rows.y;
}

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                       const std::optional<at::Tensor>& bias) {
  constexpr const char* op = "int8_linear";
  const Type type = type_of(x, op);
  TORCH_CHECK(codes.dim() == 2, op, ": codes must be a matrix");
  Rows rows = rows_of(x, codes.size(0), bias, op);
  check_matrix(codes, op, "codes", rows.N, rows.K, at::kChar);
  TORCH_CHECK(scales.dim() == 1 && scales.size(0) == rows.N && scales.scalar_type() == at::kFloat &&
                  scales.is_contiguous() && scales.device().is_cpu(),
              op, ": scales must be a contiguous float32 CPU tensor [", rows.N, "], got ", scales.scalar_type(), " ",
              scales.sizes());
  if (rows.M == 0 || rows.N == 0) return rows.y;
  const Kernels& table = kernels();
  const RoundedRows rounded(table, rows, type, op);
  const Int8 call{{rounded.codes.data(), rounded.scales.data(), rounded.sums.data()}, codes.const_data_ptr<int8_t>(),
                  scales.const_data_ptr<float>(), rows.bias, rows.y.mutable_data_ptr(), rows.M, rows.K, rows.N};
  over_outputs(table, rows, [&](int64_t begin, int64_t end) { table.int8[type](call, begin, end); });
  return rows.y;
}

at::Tensor a8_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, int64_t kind, int64_t group,
                     const std::optional<at::Tensor>& bias) {
  constexpr const char* op = "a8_linear";
  const Type type = type_of(x, op);
  TORCH_CHECK(kind == kInt4 || kind == kMxfp4, op, ": kind ", kind, " has no whole numbers");
  TORCH_CHECK(codes.dim() == 2 && scales.dim() == 2, op, ": codes and scales must be matrices");
  Rows rows = rows_of(x, codes.size(0), bias, op);
  const Stored weight = stored_of(rows, codes, scales, zeros, kind, group, op);
  if (rows.M == 0 || rows.N == 0) return rows.y;
  const Kernels& table = kernels();
  const RoundedRows rounded(table, rows, type, op);
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[size_t(rows.M * table.a8_row_bytes(rows.K) + kLine)]);
  uint8_t* laid = line_of(memory.get());
  table.a8_rows(rounded.codes.data(), rows.M, rows.K, laid);
  const A8 call{{reinterpret_cast<const int8_t*>(laid), rounded.scales.data(), nullptr}, weight, rows.bias,
                rows.y.mutable_data_ptr(), rows.M, rows.K, rows.N};
  over_outputs(table, rows, [&](int64_t begin, int64_t end) {
    table.a8[type](call, begin, end, scratch_of(table.a8_scratch(call)));
  });
  return rows.y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(specdec, m) {
  m.def(
      "packed_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int kind, int group, Tensor? bias=None) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "a8_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int kind, int group, Tensor? bias=None) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("a8_linear", &a8_linear);
  m.impl("int8_linear", &int8_linear);
}

}  // namespace specdec
