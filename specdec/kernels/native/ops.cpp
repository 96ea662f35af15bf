// The operators: checks, threads and memory. All arithmetic is in the variants.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dispatch.h"
#include "slots.h"

namespace specdec {
namespace {

// Below this much work (bytes of weights, or multiplications) a second thread costs more than it brings.
constexpr int64_t kLinearGrain = 128 * 1024;
constexpr int64_t kAttendGrain = 128 * 1024;

Type type_of(const at::Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kDouble:
      return kFloat64;
    default:
      TORCH_CHECK(false, op, ": float32, bfloat16 and float64 are supported, got ", t.scalar_type());
  }
}

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

// Memory for one thread's tile: a growing buffer that is carved from the front.
struct Scratch {
  std::vector<char> memory;
  size_t used = 0;
  void reset(size_t bytes) {
    if (memory.size() < bytes) memory.resize(bytes);
    used = 0;
  }
  void* take(size_t bytes) {
    void* out = memory.data() + (used + 63 - (reinterpret_cast<uintptr_t>(memory.data()) + used + 63) % 64);
    used = static_cast<char*>(out) + bytes - memory.data();
    return out;
  }
};

struct Attention {
  const Kernels& table;
  const Type type;
  const at::Tensor &q, &k, &v;
  at::Tensor out;
  const Steps& steps;
  const int64_t layer, H, KV, D, E, group, item, wide;
  const double scale, softcap;
  std::vector<Row> rows;

  struct Unit {
    const Steps::Segment* segment;
    int64_t row, num_rows, head, first_chunk, end_chunk;  // `row` counts from the start of the packed step
  };

  int64_t queries(const Unit& unit) const { return unit.num_rows * group; }
  size_t partial_bytes(const Unit& unit) const { return queries(unit) * ((2 + E) * wide + 1) + 4 * 64; }

  Partial partial(const Unit& unit, Scratch& scratch) const {
    const int64_t Q = queries(unit);
    Partial out{scratch.take(Q * wide), scratch.take(Q * wide), scratch.take(Q * E * wide),
                static_cast<uint8_t*>(scratch.take(Q))};
    std::memset(out.seen, 0, Q);
    return out;
  }

  // Queries side by side, because transposed views scatter them.
  Tile tile(const Unit& unit, Scratch& scratch) const {
    char* packed = static_cast<char*>(scratch.take(queries(unit) * D * item));
    const char* from = static_cast<const char*>(q.const_data_ptr());
    for (int64_t r = 0; r < unit.num_rows; r++)
      for (int64_t g = 0; g < group; g++)
        std::memcpy(packed + (r * group + g) * D * item,
                    from + ((unit.head * group + g) * q.stride(1) + (unit.row + r) * q.stride(2)) * item, D * item);
    const Slots::Layer& cache = unit.segment->slots->layer(layer);
    const int64_t capacity = cache.keys.size(1);
    return {packed,
            static_cast<const char*>(cache.keys.const_data_ptr()) + unit.head * capacity * D * item,
            static_cast<const char*>(cache.values.const_data_ptr()) + unit.head * capacity * E * item,
            rows.data() + unit.row, unit.num_rows, group, D, E, unit.segment->prefix, scale, softcap};
  }

  size_t tile_bytes(const Unit& unit) const { return queries(unit) * (D * item + kChunk * wide) + 2 * 64; }

  void finish(const Unit& unit, const Partial& part, std::vector<int64_t>& offsets) const {
    offsets.resize(queries(unit));
    for (int64_t r = 0; r < unit.num_rows; r++)
      for (int64_t g = 0; g < group; g++)
        offsets[r * group + g] = ((unit.row + r) * H + unit.head * group + g) * E;
    table.finish[type](part, queries(unit), E, out.mutable_data_ptr(), offsets.data());
  }

  void whole(const Unit& unit) const {
    static thread_local Scratch scratch;
    static thread_local std::vector<int64_t> offsets;
    scratch.reset(tile_bytes(unit) + 2 * partial_bytes(unit));
    const Tile work = tile(unit, scratch);
    void* scores = scratch.take(queries(unit) * kChunk * wide);
    const Partial sum = partial(unit, scratch), part = partial(unit, scratch);
    for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; chunk++) {
      table.attend[type](work, chunk, scores, part);
      table.merge[type](sum, part, queries(unit), E);
    }
    finish(unit, sum, offsets);
  }

  // Few tiles and a long context: chunks run on all threads, then each tile's chunks are merged in order.
  void split(const std::vector<Unit>& units) const {
    std::vector<std::pair<const Unit*, int64_t>> pieces;
    size_t bytes = 0;
    for (const Unit& unit : units)
      for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; chunk++) {
        pieces.emplace_back(&unit, chunk);
        bytes += partial_bytes(unit);
      }
    Scratch shared;
    shared.reset(bytes);
    std::vector<Partial> parts;
    for (const auto& [unit, chunk] : pieces) parts.push_back(partial(*unit, shared));
    at::parallel_for(0, int64_t(pieces.size()), 1, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      for (int64_t i = begin; i < end; i++) {
        const Unit& unit = *pieces[i].first;
        scratch.reset(tile_bytes(unit));
        const Tile work = tile(unit, scratch);
        table.attend[type](work, pieces[i].second, scratch.take(queries(unit) * kChunk * wide), parts[i]);
      }
    });
    std::vector<int64_t> offsets;
    size_t at = 0;
    for (const Unit& unit : units) {
      Scratch scratch;
      scratch.reset(partial_bytes(unit));
      const Partial sum = partial(unit, scratch);
      for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; chunk++)
        table.merge[type](sum, parts[at++], queries(unit), E);
      finish(unit, sum, offsets);
    }
  }

  void see(int64_t window) {
    rows.resize(steps.num_rows());
    for (const Steps::Segment& segment : steps.segments)
      for (int64_t i = 0; i < segment.rows; i++) {
        const Steps::Seen& seen = steps.seen[segment.first_row + i];
        Row& row = rows[segment.first_row + i];
        row = {steps.columns.data() + seen.offset, seen.count, seen.lead, 0};
        if (window == 0) continue;
        const int64_t oldest = segment.positions[i] - window + 1;  // the first position that the row may see
        row.first = std::max<int64_t>(0, std::min(oldest, segment.prefix));
        while (row.first >= segment.prefix && row.first < row.count) {
          const int64_t j = row.first - segment.prefix;
          if (segment.block_positions[j < row.lead ? j : row.columns[j - row.lead]] >= oldest) break;
          row.first++;
        }
      }
  }

  void run() {
    std::vector<Unit> units;
    int64_t work = 0, most_chunks = 0;
    const int64_t height = std::max<int64_t>(1, kTileQueries / group);
    for (const Steps::Segment& segment : steps.segments)
      for (int64_t r = 0; r < segment.rows; r += height) {
        Unit unit{&segment, segment.first_row + r, std::min(height, segment.rows - r), 0, INT64_MAX, 0};
        for (int64_t i = unit.row; i < unit.row + unit.num_rows; i++) {
          unit.first_chunk = std::min(unit.first_chunk, rows[i].first / kChunk);
          unit.end_chunk = std::max(unit.end_chunk, (rows[i].count + kChunk - 1) / kChunk);
          work += (rows[i].count - rows[i].first) * H * (D + E);
        }
        most_chunks = std::max(most_chunks, unit.end_chunk - unit.first_chunk);
        for (unit.head = 0; unit.head < KV; unit.head++) units.push_back(unit);
      }
    const int64_t threads = at::get_num_threads(), num = int64_t(units.size());
    if (threads == 1 || work < 2 * kAttendGrain) {
      for (const Unit& unit : units) whole(unit);
    } else if (num < 4 * threads && most_chunks > 1) {
      split(units);
    } else {
      at::parallel_for(0, num, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) whole(units[i]);
      });
    }
  }
};

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
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "attend: q, k, v differ in type");
  TORCH_CHECK(q.device().is_cpu() && k.device().is_cpu() && v.device().is_cpu(), "attend: q, k, v must be on the CPU");
  TORCH_CHECK(handle.scalar_type() == at::kLong && handle.numel() == 1 && handle.device().is_cpu(),
              "attend: handle must come from Steps.handle()");
  TORCH_CHECK(window >= 0 && softcap >= 0, "attend: window and softcap must be 0 (none) or more");
  const auto steps = Steps::find(*handle.const_data_ptr<int64_t>());
  TORCH_CHECK(steps->num_rows() == M, "attend: the step describes ", steps->num_rows(), " rows, q has ", M);
  const at::Tensor queries = dense_rows(q), new_keys = dense_rows(k), new_values = dense_rows(v);
  for (const Steps::Segment& segment : steps->segments)
    segment.slots->write(layer, new_keys, new_values, segment.first_row, segment.rows, segment.start);
  Attention attention{kernels(), type, queries, new_keys, new_values,
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
      .def(torch::init<int64_t>())
      .def("reserve", &Slots::reserve)
      .def("capacity", &Slots::capacity)
      .def("num_layers", &Slots::num_layers)
      .def("gather", [](const c10::intrusive_ptr<Slots>& self, std::vector<int64_t> slots, int64_t start) {
        self->gather(slots, start);
      })
      .def("fork", &Slots::fork)
      .def("num_bytes", &Slots::num_bytes)
      .def("keys", &Slots::keys)
      .def("values", &Slots::values);
  m.class_<Steps>("Steps")
      .def(torch::init<>())
      .def("clear", &Steps::clear)
      .def("num_rows", &Steps::num_rows)
      .def("add", [](const c10::intrusive_ptr<Steps>& self, const c10::intrusive_ptr<Slots>& slots, int64_t start,
                     int64_t rows, int64_t prefix, const at::Tensor& block, const at::Tensor& positions,
                     const at::Tensor& block_positions) {
        self->add(slots, start, rows, prefix, block, positions, block_positions);
      })
      .def("handle", [](const c10::intrusive_ptr<Steps>& self) { return Steps::handle(self); });
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor handle, int layer, float scale, float softcap, int window) -> Tensor",
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
