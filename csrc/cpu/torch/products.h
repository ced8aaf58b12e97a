// The large matrix products around a launch, and how their operands are packed, by all threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>

#include "../plan.h"
#include "layer.h"

namespace fusedrnn {
namespace {

// Panels (panel.h): how many of how many inputs, and which of the two are counted where packing is shared.
struct PanelLayout {
  int64_t panels, inputs;
  bool by_panels;
  Pack Kernels::* pack = nullptr;   // or null: Kernels::pack_input, input by input
  const MapWindow* maps = nullptr;  // or not null: Kernels::pack_maps

  int64_t numbers(const Kernels& kernels) const { return panels * inputs * 4 * kernels.lanes; }
};
// Panels of the maps of a product, by hidden units, and of weights or steps, by inputs, in the kernels' operand type.
PanelLayout maps_of(const Kernels& kernels, const MapWindow& maps, int64_t H, int64_t inputs) {
  const int64_t count = maps.end - maps.begin, blocks = chunk_blocks(count);
  const int64_t panels = blocks_of(blocks_of(H, kernels.lanes), blocks) * count * blocks / 4;
  return {panels, kernels.inputs(inputs), true, nullptr, &maps};
}
PanelLayout inputs_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {blocks_of(outputs, 4 * kernels.lanes), kernels.inputs(inputs), false};
}
// Panels of plain numbers, for any operand type.
PanelLayout rows_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {blocks_of(outputs, 4 * kernels.lanes), inputs, true, &Kernels::pack_rows};
}
PanelLayout columns_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {blocks_of(outputs, 4 * kernels.lanes), inputs, false, &Kernels::pack_columns};
}

// Runs f(d, begin, end) for parts of the panels, or inputs, of D matrices.
template <class F>
void for_each_part(const Kernels& kernels, const PanelLayout& layout, int64_t D, const F& f) {
  const int64_t count = layout.by_panels ? layout.panels : layout.inputs;
  const int64_t grain = std::max<int64_t>(1, 16384 * count / std::max<int64_t>(1, layout.numbers(kernels)));
  torch::stable::parallel_for(0, D * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t d = 0; d < D; ++d) {
      const int64_t first = std::max(begin - d * count, int64_t{0}), last = std::min(end - d * count, count);
      if (first < last) f(d, first, last);
    }
  });
}

// Inputs [begin, end) of panels of them, of so many columns; row(k) is row k of the matrix, or null for zeros.
template <class Row>
void pack_inputs(const Kernels& kernels, const PanelLayout& layout, const Row& row, int64_t columns, void* panels,
                 int64_t begin, int64_t end) {
  const int64_t rows = kernels.take_pairs() ? 2 : 1;
  for (int64_t k = begin; k < end; ++k) {
    kernels.pack_input(row(rows * k), rows == 2 ? row(2 * k + 1) : nullptr, columns, panels, layout.inputs, k);
  }
}

// The panels of matrix(d) for each direction, one after the other.
template <class F>
Scratch packed(const Layer& layer, const PanelLayout& layout, const F& matrix) {
  const Kernels& kernels = layer.kernels;
  const int64_t numbers = layout.numbers(kernels);
  Scratch panels(layer.sizes.D * numbers, layer.compute);
  for_each_part(kernels, layout, layer.sizes.D, [&](int64_t d, int64_t begin, int64_t end) {
    const Tensor& w = matrix(d);
    void* const own = panels.at(d * numbers);
    if (layout.maps != nullptr) {
      return kernels.pack_maps(w.const_data_ptr(), *layout.maps, layer.sizes.H, w.size(1), own, begin, end);
    }
    if (layout.pack != nullptr) {
      return (kernels.*layout.pack)(w.const_data_ptr(), w.size(0), w.size(1), own, begin, end);
    }
    const auto row = [&](int64_t k) { return k < w.size(0) ? at(w, k * w.size(1)) : nullptr; };
    pack_inputs(kernels, layout, row, w.size(1), own, begin, end);
  });
  return panels;
}

// Rows of pairs, with zeros up to the inputs of a panel; or none where they are as long already.
OptionalTensor padded_rows(const Kernels& kernels, const Tensor& rows) {
  const int64_t count = rows.numel() / std::max<int64_t>(1, rows.size(rows.dim() - 1)),
                size = rows.size(rows.dim() - 1);
  const int64_t stride = kernels.padded(size), bytes = static_cast<int64_t>(rows.element_size());
  if (stride == size) return std::nullopt;
  Tensor padded = empty({count, stride}, rows.scalar_type());
  const char* const from = static_cast<const char*>(rows.const_data_ptr());
  char* const to = static_cast<char*>(pointer(padded));
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / stride), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::memcpy(to + k * stride * bytes, from + k * size * bytes, size * bytes);
      std::memset(to + (k * stride + size) * bytes, 0, (stride - size) * bytes);
    }
  });
  return padded;
}

// x, or another matrix of that dtype, as the operand of products with panels.
Tensor operand_rows(const Kernels& kernels, const Tensor& rows, ScalarType compute) {
  const OptionalTensor padded = padded_rows(kernels, rows);
  return padded.has_value() ? *padded : kernels.take_pairs() ? rows : as(rows, compute);
}

constexpr int64_t kPartsOfThread = 4;  // of a product, if a part then has
constexpr int64_t kLeastRows = 96;     // or more: every part reads all of b

// c = start + a @ b or c += a @ b, see params.h. Each worker takes the next part when it is done with one: a slow core,
// which another process uses too, delays the product by at most one part.
void gemm(const Kernels& kernels, GemmParams params) {
  const int64_t tiles = blocks_of(params.M, kernels.tile_rows), halves = blocks_of(params.N, 2 * kernels.lanes);
  const int64_t blocks = blocks_of(halves, 2);
  const int64_t columns = params.N + (params.also != nullptr ? params.also->N : 0);
  const bool is_large = 2.0 * params.M * columns * params.K * (kernels.take_pairs() ? 2 : 1) >= kSerialFlops;
  const int64_t threads = is_large ? torch::stable::get_num_threads() : 1;
  // Rows are shared, unless there are so few that a worker would hardly use what it reads of b, or packs.
  int64_t row_parts = blocks_of(params.M, kGemmRows), column_parts = 1;
  if (params.panels == nullptr) {
    column_parts = std::max<int64_t>(1, std::min(threads, blocks));
    row_parts = std::max(row_parts, fusedrnn::row_parts(params.M, column_parts, threads));
  } else if (tiles >= 4 * threads && !params.by_columns) {
    const int64_t more = std::min(kPartsOfThread * threads, params.M / kLeastRows) / threads * threads;
    row_parts = std::max(blocks_of(row_parts, threads) * threads, more);
  } else {
    if (params.also != nullptr) gemm(kernels, *std::exchange(params.also, nullptr));
    column_parts = std::min(threads, blocks);
  }
  const int64_t own_bytes = kernels.gemm_scratch(params);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    OptionalScratch own;
    if (own_bytes > 0) own.emplace(blocks_of(own_bytes, sizeof(float)), ScalarType::Float);
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < row_parts * column_parts;) {
      const int64_t row = part / column_parts, column = part % column_parts;
      const int64_t m = row * tiles / row_parts * kernels.tile_rows;
      const int64_t m_end = std::min((row + 1) * tiles / row_parts * kernels.tile_rows, params.M);
      const int64_t half = column * blocks / column_parts * 2, half_end = (column + 1) * blocks / column_parts * 2;
      kernels.gemm(params, m, m_end, half, std::min(half_end, halves), pointer(own));
    }
  });
}

}  // namespace
}  // namespace fusedrnn
