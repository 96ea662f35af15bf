// The operators: checks, threads and memory. All arithmetic is in the variants.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "attend.h"
#include "dispatch.h"
#include "types.h"

namespace specdec {
namespace {

// Below so many bytes of weights a second thread costs more than it brings.
constexpr int64_t kLinearGrain = 128 * 1024;

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const Type type = type_of(x, "linear");
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "linear: x ", x.sizes(),
              " does not fit weight ", weight.sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "linear: x is ", x.scalar_type(), ", weight ",
              weight.scalar_type());
  TORCH_CHECK(x.device().is_cpu() && weight.device().is_cpu(), "linear: x and weight must be on the CPU");
  TORCH_CHECK(weight.is_contiguous(), "linear: weight must be contiguous, row by row; call .contiguous() once");
  const bool has_bias = bias.has_value() && bias->defined();
  const int64_t K = weight.size(1), N = weight.size(0);
  if (has_bias)
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N && bias->scalar_type() == x.scalar_type() &&
                    bias->is_contiguous() && bias->device().is_cpu(),
                "linear: bias must be a contiguous ", x.scalar_type(), " tensor [", N, "], got ", bias->sizes());
  const auto rows = x.expect_contiguous();
  c10::DimVector sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  at::Tensor y = at::empty(sizes, x.options());
  const int64_t M = K > 0 ? rows->numel() / K : 0;
  TORCH_CHECK(K > 0, "linear: K must be positive");
  if (M == 0 || N == 0) return y;
  const Linear op{rows->const_data_ptr(), weight.const_data_ptr(), has_bias ? bias->const_data_ptr() : nullptr,
                  y.mutable_data_ptr(), M, K, N};
  const Kernels& table = kernels();
  const auto run = table.linear[type];
  const int64_t units = (N + table.unit - 1) / table.unit;
  const int64_t unit_bytes = table.unit * K * weight.element_size() * ((M + 7) / 8);
  const int64_t grain = (kLinearGrain + unit_bytes - 1) / unit_bytes;
  if (units <= grain || at::get_num_threads() == 1) {
    run(op, 0, N);
  } else {
    at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      run(op, begin * table.unit, std::min(N, end * table.unit));
    });
  }
  return y;
}

at::Tensor dense_rows(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& handle,
                  int64_t layer, double scale, double softcap, int64_t window) {
  const Type type = type_of(q, "attend");
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == 1 && k.size(0) == 1 && v.size(0) == 1,
              "attend: q, k, v must be [1, heads, M, size], got ", q.sizes(), " ", k.sizes(), " ", v.sizes());
  const int64_t H = q.size(1), M = q.size(2), KV = k.size(1);
  TORCH_CHECK(k.size(2) == M && v.size(2) == M && v.size(1) == KV && k.size(3) == q.size(3),
              "attend: shapes do not fit: q ", q.sizes(), " k ", k.sizes(), " v ", v.sizes());
  TORCH_CHECK(KV > 0 && H % KV == 0, "attend: ", H, " query heads are no multiple of ", KV, " key/value heads");
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "attend: q, k, v differ in type");
  TORCH_CHECK(q.device().is_cpu() && k.device().is_cpu() && v.device().is_cpu(), "attend: q, k, v must be on the CPU");
  TORCH_CHECK(handle.scalar_type() == at::kLong && handle.numel() == 1 && handle.device().is_cpu(),
              "attend: handle must come from Steps.handle()");
  TORCH_CHECK(window >= 0 && softcap >= 0, "attend: window and softcap must be 0 (none) or more");
  const auto steps = Steps::find(*handle.const_data_ptr<int64_t>());
  TORCH_CHECK(steps->num_rows() == M, "attend: the step describes ", steps->num_rows(), " rows, q has ", M);
  const at::Tensor queries = dense_rows(q), new_keys = dense_rows(k), new_values = dense_rows(v);
  for (const Steps::Segment& segment : steps->segments)
    segment.slots->write(kernels(), type, layer, new_keys, new_values, segment.first_row, segment.rows, segment.start);
  Attention attention{kernels(), type, queries,
                      at::empty({1, M, H, v.size(3)}, q.options()), *steps, layer, H, KV, q.size(3), v.size(3), H / KV,
                      int64_t(q.element_size()), type == kFloat64 ? 8 : 4, scale, softcap, {}};
  attention.see(window);
  attention.run();
  return attention.out;
}

std::string isa() { return kernels().name; }

void set_isa(const std::string& name) {
  const Kernels* found = named(name);
  TORCH_CHECK(found, "no kernels named '", name, "' on this machine");
  chosen().store(found);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* each : usable()) names.emplace_back(each->name);
  return names;
}

}  // namespace

TORCH_LIBRARY(specdec, m) {
  m.class_<Slots>("Slots")
      .def(torch::init<int64_t, std::string>(), "", {torch::arg("num_layers"), torch::arg("kind") = "plain"})
      .def("reserve", &Slots::reserve)
      .def("capacity", &Slots::capacity)
      .def("num_layers", &Slots::num_layers)
      .def("gather", [](const c10::intrusive_ptr<Slots>& self, std::vector<int64_t> slots, int64_t start) {
        self->gather(slots, start);
      })
      .def("fork", &Slots::fork)
      .def("num_bytes", &Slots::num_bytes)
      .def("keys", &Slots::keys)
      .def("values", &Slots::values)
      .def("key_scales", &Slots::key_scales)
      .def("value_scales", &Slots::value_scales);
  m.class_<Steps>("Steps")
      .def(torch::init<>())
      .def("clear", &Steps::clear)
      .def("num_rows", &Steps::num_rows)
      .def("add", [](const c10::intrusive_ptr<Steps>& self, const c10::intrusive_ptr<Slots>& slots, int64_t start,
                     int64_t rows, int64_t prefix, const at::Tensor& block, const at::Tensor& block_positions) {
        self->add(slots, start, rows, prefix, block, block_positions);
      })
      .def("handle", [](const c10::intrusive_ptr<Steps>& self) { return Steps::handle(self); });
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor handle, int layer, float scale, float softcap, int window) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("isa() -> str", &isa);
  m.def("isas() -> str[]", &isas);
  m.def("set_isa(str name) -> ()", &set_isa);
}

TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("linear", &linear);
  m.impl("attend", &attend);
}

}  // namespace specdec
