// How the attention of one step is cut into tiles and chunks, and shared among threads.
#pragma once
#include <ATen/Parallel.h>

#include <vector>

#include "slots.h"

namespace specdec {

// Below so many multiplications a second thread costs more than it brings.
constexpr int64_t kAttendGrain = 128 * 1024;

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
  const at::Tensor& q;
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
    return {packed, cache.keys.row(unit.head, 0), cache.values.row(unit.head, 0), rows.data() + unit.row,
            unit.num_rows, group, D, E, unit.segment->prefix, 0, scale, softcap};
  }

  // One chunk of a tile. Rows that are stored in fewer bits are decoded first, all that its rows find there, once.
  void one_chunk(const Unit& unit, Tile& work, int64_t chunk, void* scores, const Partial& part) const {
    const Storage storage = unit.segment->slots->storage();
    if (storage != kPlain) {
      static thread_local Scratch decoded;
      int64_t begin = INT64_MAX, end = 0;
      for (int64_t i = unit.row; i < unit.row + unit.num_rows; i++) {
        const int64_t first = std::max(rows[i].first, chunk * kChunk);
        const int64_t last = std::min(rows[i].count, (chunk + 1) * kChunk) - 1;
        if (first > last) continue;
        begin = std::min(begin, slot_of(work.prefix, rows[i], first));
        end = std::max(end, slot_of(work.prefix, rows[i], last) + 1);
      }
      const int64_t num = std::max<int64_t>(0, end - begin);
      decoded.reset(num * (D + E) * item + 2 * 64);
      const Slots::Layer& cache = unit.segment->slots->layer(layer);
      const auto read = [&](const Slots::Rows& from, int64_t size) {
        void* to = decoded.take(num * size * item);
        if (num > 0)
          table.decode[type][storage](from.row(unit.head, begin), from.scale(unit.head, begin), num, size, to);
        return to;
      };
      work.keys = read(cache.keys, D);
      work.values = read(cache.values, E);
      work.first_slot = num > 0 ? begin : 0;
    }
    table.attend[type](work, chunk, scores, part);
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
    Tile work = tile(unit, scratch);
    void* scores = scratch.take(queries(unit) * kChunk * wide);
    const Partial sum = partial(unit, scratch), part = partial(unit, scratch);
    for (int64_t chunk = unit.first_chunk; chunk < unit.end_chunk; chunk++) {
      one_chunk(unit, work, chunk, scores, part);
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
        Tile work = tile(unit, scratch);
        one_chunk(unit, work, pieces[i].second, scratch.take(queries(unit) * kChunk * wide), parts[i]);
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
        const int64_t oldest = segment.position(i) - window + 1;  // the first position that the row may see
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

}  // namespace specdec
