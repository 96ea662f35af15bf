// The key/value cache of one sequence, and the description of one forward over one or several sequences.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.h"

namespace specdec {

inline Storage storage_of(const std::string& kind) {
  if (kind == "plain") return kPlain;
  if (kind == "int8") return kInt8;
  TORCH_CHECK(kind == "mxfp8", "Slots: kind must be 'plain', 'int8' or 'mxfp8', got '", kind, "'");
  return kMxfp8;
}

struct Slots : torch::CustomClassHolder {
  // Keys, or values, of one layer.
  struct Rows {
    at::Tensor codes;   // [KV, C, D]; kPlain: the rows themselves; undefined before the first write
    at::Tensor scales;  // [KV, C, S]: kInt8 one float32, kMxfp8 one byte per block; undefined for kPlain

    static void* at(const at::Tensor& t, int64_t head, int64_t slot) {
      return static_cast<char*>(t.data_ptr()) + (head * t.size(1) + slot) * t.size(2) * t.element_size();
    }
    void* row(int64_t head, int64_t slot) const { return at(codes, head, slot); }
    void* scale(int64_t head, int64_t slot) const { return at(scales, head, slot); }
  };
  struct Layer {
    Rows keys, values;
    template <class F>
    void each(F use) {
      for (at::Tensor* t : {&keys.codes, &keys.scales, &values.codes, &values.scales})
        if (t->defined()) use(*t);
    }
  };

  Slots(int64_t num_layers, Storage storage) : storage_(storage) {
    TORCH_CHECK(num_layers > 0, "Slots: num_layers must be positive, got ", num_layers);
    layers_.resize(num_layers);
  }
  Slots(int64_t num_layers, const std::string& kind) : Slots(num_layers, storage_of(kind)) {}

  int64_t capacity() const { return capacity_; }
  int64_t num_layers() const { return int64_t(layers_.size()); }
  Storage storage() const { return storage_; }

  // Never shrinks.
  void reserve(int64_t capacity) {
    if (capacity <= capacity_) return;
    for (Layer& layer : layers_) layer.each([&](at::Tensor& t) { t = resized(t, capacity, capacity_); });
    capacity_ = capacity;
  }

  void gather(const std::vector<int64_t>& slots, int64_t start) {
    const int64_t num = int64_t(slots.size());
    bool still = true;
    for (int64_t i = 0; i < num; i++) {
      TORCH_CHECK(slots[i] >= 0 && slots[i] < capacity_, "gather: slot ", slots[i], " is not below the capacity ",
                  capacity_);
      still = still && slots[i] == start + i;
    }
    TORCH_CHECK(start >= 0 && start + num <= capacity_, "gather: ", num, " slots from ", start,
                " pass the capacity ", capacity_);
    if (still) return;
    for (Layer& layer : layers_) layer.each([&](at::Tensor& t) { move(t, slots, start); });
  }

  c10::intrusive_ptr<Slots> fork(int64_t length) const {
    TORCH_CHECK(length >= 0 && length <= capacity_, "fork: length ", length, " passes the capacity ", capacity_);
    auto twin = c10::make_intrusive<Slots>(num_layers(), storage_);
    twin->capacity_ = capacity_;
    twin->layers_ = layers_;
    for (Layer& layer : twin->layers_) layer.each([&](at::Tensor& t) { t = resized(t, capacity_, length); });
    return twin;
  }

  int64_t num_bytes() const {
    int64_t total = 0;
    for (Layer layer : layers_) layer.each([&](const at::Tensor& t) { total += int64_t(t.nbytes()); });
    return total;
  }

  const Layer& layer(int64_t index) const {
    TORCH_CHECK(index >= 0 && index < num_layers(), "layer ", index, " of ", num_layers());
    return layers_[index];
  }

  at::Tensor written(const at::Tensor& buffer, int64_t index) const {
    TORCH_CHECK(buffer.defined(), "layer ", index, " holds nothing yet; its first forward allocates it");
    return buffer;
  }
  at::Tensor keys(int64_t index) const { return written(layer(index).keys.codes, index); }
  at::Tensor values(int64_t index) const { return written(layer(index).values.codes, index); }
  at::Tensor scales(const Rows& rows, int64_t index) const {
    TORCH_CHECK(storage_ != kPlain, "keys and values are stored as they are: there are no scales");
    return written(rows.scales, index);
  }
  at::Tensor key_scales(int64_t index) const { return scales(layer(index).keys, index); }
  at::Tensor value_scales(int64_t index) const { return scales(layer(index).values, index); }

  // Stores rows [row, row + rows) of k [1, KV, M, D] and v [1, KV, M, E] in the slots from `start`.
  void write(const Kernels& table, Type type, int64_t index, const at::Tensor& k, const at::Tensor& v, int64_t row,
             int64_t rows, int64_t start) {
    TORCH_CHECK(index >= 0 && index < num_layers(), "layer ", index, " of ", num_layers());
    TORCH_CHECK(start + rows <= capacity_, "slots ", start, " .. ", start + rows - 1, " pass the capacity ", capacity_,
                "; reserve() more first");
    Layer& layer = layers_[index];
    if (!layer.keys.codes.defined()) layer = {allocated(k, index), allocated(v, index)};
    const auto encode = table.encode[type][storage_];
    write_one(encode, layer.keys, k, row, rows, start, index);
    write_one(encode, layer.values, v, row, rows, start, index);
  }

 private:
  Rows allocated(const at::Tensor& rows, int64_t index) const {
    const int64_t size = rows.size(3);
    const auto empty = [&](int64_t width, at::ScalarType type) {
      return at::empty({rows.size(1), capacity_, width}, rows.options().dtype(type));
    };
    if (storage_ == kPlain) return {empty(size, rows.scalar_type()), at::Tensor()};
    if (storage_ == kInt8) return {empty(size, at::kChar), empty(1, at::kFloat)};
    TORCH_CHECK(size % kBlock == 0, "layer ", index, " has heads of size ", size, ", and mxfp8 keys and values are ",
                "stored in blocks of ", kBlock, "; use int8 for this model");
    return {empty(size, at::kByte), empty(size / kBlock, at::kByte)};
  }

  static at::Tensor resized(const at::Tensor& old, int64_t capacity, int64_t length) {
    at::Tensor out = at::empty({old.size(0), capacity, old.size(2)}, old.options());
    const int64_t bytes = old.size(2) * old.element_size();
    for (int64_t h = 0; h < old.size(0); h++) std::memcpy(Rows::at(out, h, 0), Rows::at(old, h, 0), length * bytes);
    return out;
  }

  static void move(const at::Tensor& buffer, const std::vector<int64_t>& slots, int64_t start) {
    const int64_t bytes = buffer.size(2) * buffer.element_size(), num = int64_t(slots.size());
    std::vector<char> held(num * bytes);  // every source is read before any is overwritten
    for (int64_t h = 0; h < buffer.size(0); h++) {
      for (int64_t i = 0; i < num; i++) std::memcpy(held.data() + i * bytes, Rows::at(buffer, h, slots[i]), bytes);
      std::memcpy(Rows::at(buffer, h, start), held.data(), num * bytes);
    }
  }

  // `encode` is null where rows are stored as they are.
  void write_one(void (*encode)(const void*, int64_t, void*, void*), const Rows& to, const at::Tensor& rows_of,
                 int64_t row, int64_t rows, int64_t start, int64_t index) const {
    TORCH_CHECK(to.codes.size(0) == rows_of.size(1) && to.codes.size(2) == rows_of.size(3) &&
                    (encode || to.codes.scalar_type() == rows_of.scalar_type()),
                "layer ", index, " holds ", to.codes.size(0), " heads of size ", to.codes.size(2), " in ",
                to.codes.scalar_type(), "; the new rows have ", rows_of.size(1), " of size ", rows_of.size(3), " in ",
                rows_of.scalar_type());
    const int64_t item = rows_of.element_size(), size = rows_of.size(3);
    const int64_t head_step = rows_of.stride(1) * item, row_step = rows_of.stride(2) * item;
    const int64_t width = size * to.codes.element_size();
    const int64_t scale_width = encode ? to.scales.size(2) * to.scales.element_size() : 0;
    for (int64_t h = 0; h < rows_of.size(1); h++) {
      const char* from = static_cast<const char*>(rows_of.const_data_ptr()) + h * head_step + row * row_step;
      char* codes = static_cast<char*>(to.row(h, start));
      char* scales = encode ? static_cast<char*>(to.scale(h, start)) : nullptr;
      for (int64_t r = 0; r < rows; r++)
        if (encode)
          encode(from + r * row_step, size, codes + r * width, scales + r * scale_width);
        else
          std::memcpy(codes + r * width, from + r * row_step, width);
    }
  }

  const Storage storage_;
  std::vector<Layer> layers_;
  int64_t capacity_ = 0;
};

// The rows of one forward: whose they are, where they are written, and what each sees.
struct Steps : torch::CustomClassHolder {
  struct Seen {
    int64_t offset, lead, count;  // columns behind the leading ones stand in `columns` from `offset`
  };
  struct Segment {
    c10::intrusive_ptr<Slots> slots;
    int64_t start, rows, prefix, first_row;
    std::vector<int64_t> block_positions;

    // Row i is written to slot start + i, and stands where that slot stands.
    int64_t position(int64_t i) const { return block_positions[start - prefix + i]; }
  };

  ~Steps() override {
    if (id_ == 0) return;
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().steps.erase(id_);
  }

  void clear() {
    segments.clear();
    seen.clear();
    columns.clear();
  }

  void add(const c10::intrusive_ptr<Slots>& slots, int64_t start, int64_t rows, int64_t prefix, const at::Tensor& block,
           const at::Tensor& block_positions) {
    const int64_t width = start + rows - prefix;
    TORCH_CHECK(slots, "add: slots is None");
    TORCH_CHECK(rows > 0 && prefix >= 0 && prefix <= start, "add: needs rows > 0 and 0 <= prefix <= start; got rows ",
                rows, ", prefix ", prefix, ", start ", start);
    TORCH_CHECK(start + rows <= slots->capacity(), "add: slots ", start, " .. ", start + rows - 1,
                " pass the capacity ", slots->capacity(), "; reserve() more first");
    TORCH_CHECK(block.scalar_type() == at::kBool && block.device().is_cpu() && block.dim() == 2 &&
                    block.size(0) == rows && block.size(1) == width,
                "add: block must be a bool CPU tensor [", rows, ", ", width, "] (rows, start + rows - prefix), got ",
                block.scalar_type(), " ", block.sizes());
    TORCH_CHECK(block_positions.scalar_type() == at::kLong && block_positions.device().is_cpu() &&
                    block_positions.dim() == 1 && block_positions.size(0) == width,
                "add: block_positions must be an int64 CPU tensor [", width, "], got ", block_positions.scalar_type(),
                " ", block_positions.sizes());
    for (const Segment& other : segments)
      TORCH_CHECK(other.slots != slots, "add: a sequence stands twice in one step; pack its rows into one add()");
    const at::Tensor mask = block.contiguous();
    Segment segment{slots, start, rows, prefix, num_rows(), copied(block_positions)};
    const size_t num_seen = seen.size(), num_columns = columns.size();
    try {
      for (int64_t i = 0; i < rows; i++) see(segment, i, mask.const_data_ptr<bool>() + i * width, width);
    } catch (...) {  // an error leaves the step as it was
      seen.resize(num_seen);
      columns.resize(num_columns);
      throw;
    }
    segments.push_back(std::move(segment));
  }

  int64_t num_rows() const { return int64_t(seen.size()); }

  static at::Tensor handle(const c10::intrusive_ptr<Steps>& self) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    if (self->id_ == 0) {
      self->id_ = ++registry().last;
      registry().steps.emplace(self->id_, c10::weak_intrusive_ptr<Steps>(self));
    }
    at::Tensor out = at::empty({1}, at::kLong);
    *out.mutable_data_ptr<int64_t>() = self->id_;
    return out;
  }

  static c10::intrusive_ptr<Steps> find(int64_t id) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    auto found = registry().steps.find(id);
    auto steps = found == registry().steps.end() ? c10::intrusive_ptr<Steps>() : found->second.lock();
    TORCH_CHECK(steps, "attend: no Steps object has the handle ", id, "; keep the object alive during the forward");
    return steps;
  }

  std::vector<Segment> segments;
  std::vector<Seen> seen;        // one per row of the packed step
  std::vector<int32_t> columns;  // of all rows

 private:
  struct Registry {
    std::mutex mutex;
    std::unordered_map<int64_t, c10::weak_intrusive_ptr<Steps>> steps;
    int64_t last = 0;
  };
  static Registry& registry() {
    static Registry* all = new Registry;  // never destroyed: Steps objects may outlive static destructors
    return *all;
  }

  static std::vector<int64_t> copied(const at::Tensor& t) {
    const at::Tensor flat = t.contiguous();
    return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
  }

  // Reads one mask row. Visible slots must stand in increasing position order: their place in it is the row's own
  // numbering of what it sees.
  void see(const Segment& segment, int64_t i, const bool* mask, int64_t width) {
    const int64_t own = segment.start - segment.prefix + i;
    TORCH_CHECK(mask[own], "add: row ", i, " does not see itself: block[", i, ", ", own, "] is false");
    Seen row{int64_t(columns.size()), 0, segment.prefix};
    int64_t last = segment.prefix - 1;
    for (int64_t c = 0; c < width; c++) {
      if (!mask[c]) continue;
      TORCH_CHECK(segment.block_positions[c] > last, "add: row ", i, " sees slot ", segment.prefix + c, " at position ",
                  segment.block_positions[c], " behind position ", last, "; positions must grow with the slots");
      last = segment.block_positions[c];
      if (row.count - segment.prefix == c)
        row.lead++;
      else
        columns.push_back(int32_t(c));
      row.count++;
    }
    seen.push_back(row);
  }

  int64_t id_ = 0;
};

}  // namespace specdec
