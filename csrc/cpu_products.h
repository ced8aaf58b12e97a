// The large matrix products around a launch, and how their operands are packed, by all threads.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/plan.h"
#include "cpu_layer.h"

namespace fusedrnn {
namespace {

// A way to pack a matrix into panels (panel.h): how many blocks of how many inputs, and which of the two are counted.
struct Packing {
  Pack Kernels::* pack;
  int64_t blocks, inputs;
  bool by_blocks;
  bool pairs = false;  // an input is two of the matrix, which is of 16-bit numbers

  int64_t numbers(const Kernels& kernels) const { return blocks * inputs * 4 * kernels.lanes; }
};
Packing gates_of(const Kernels& kernels, int64_t H, int64_t inputs) {
  return {&Kernels::pack_gates, blocks_of(H, kernels.lanes), inputs, true};
}
Packing rows_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {&Kernels::pack_rows, blocks_of(outputs, 4 * kernels.lanes), inputs, true};
}
Packing columns_of(const Kernels& kernels, int64_t outputs, int64_t inputs) {
  return {&Kernels::pack_columns, blocks_of(outputs, 4 * kernels.lanes), inputs, false};
}

// The same of pairs of inputs, where the kernels multiply pairs, and all inputs are in one.
Packing paired(Packing (*packing)(const Kernels&, int64_t, int64_t), const Kernels& kernels, int64_t outputs,
               int64_t inputs) {
  const bool pairs = kernels.take_pairs() && inputs % 2 == 0;
  Packing result = packing(kernels, outputs, pairs ? inputs / 2 : inputs);
  result.pairs = pairs;
  return result;
}
// Columns of rows of steps, of which a last one may be without another.
Packing steps_of(const Kernels& kernels, int64_t outputs, int64_t steps) {
  return paired(columns_of, kernels, outputs, kernels.take_pairs() ? steps + steps % 2 : steps);
}

// Runs f(d, begin, end) for parts of the blocks, or inputs, of D matrices.
template <class F>
void for_each_part(const Kernels& kernels, const Packing& packing, int64_t D, const F& f) {
  const int64_t count = packing.by_blocks ? packing.blocks : packing.inputs;
  const int64_t grain = std::max<int64_t>(1, 16384 * count / std::max<int64_t>(1, packing.numbers(kernels)));
  torch::stable::parallel_for(0, D * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t d = 0; d < D; ++d) {
      const int64_t first = std::max(begin - d * count, int64_t{0}), last = std::min(end - d * count, count);
      if (first < last) f(d, first, last);
    }
  });
}

// Pairs [begin, end) of rows of so many columns, which are inputs of a panel; row(k) is null for zeros.
template <class Row>
void pack_row_pairs(const Kernels& kernels, const Packing& packing, const Row& row, int64_t columns, void* panels,
                    int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    kernels.pack_pair(row(2 * k), row(2 * k + 1), columns, panels, packing.inputs, k);
  }
}

// The panels of matrix(d) for each direction, one after the other.
template <class F>
Scratch packed(const Layer& layer, const Packing& packing, const F& matrix) {
  const Kernels& kernels = packing.pairs ? kernels_of(ScalarType::Float) : layer.kernels;
  const int64_t numbers = packing.numbers(kernels), width = packing.pairs ? 2 : 1;
  Scratch panels(layer.sizes.D * numbers, layer.compute);
  for_each_part(kernels, packing, layer.sizes.D, [&](int64_t d, int64_t begin, int64_t end) {
    const Tensor& w = matrix(d);
    if (packing.pairs && !packing.by_blocks) {
      const auto row = [&](int64_t k) { return at(w, k * w.size(1)); };
      return pack_row_pairs(layer.kernels, packing, row, w.size(1), panels.at(d * numbers), begin, end);
    }
    (kernels.*packing.pack)(w.const_data_ptr(), w.size(0), w.size(1) / width, panels.at(d * numbers), begin, end);
  });
  return panels;
}

// c = start + a @ b or c += a @ b, see params.h.
void gemm(const Kernels& kernels, GemmParams params, bool pairs = false) {
  const auto run = pairs ? kernels.gemm_pairs : kernels.gemm;
  const int64_t tiles = blocks_of(params.M, kernels.tile_rows), halves = blocks_of(params.N, 2 * kernels.lanes);
  const int64_t blocks = blocks_of(halves, 2);
  const int64_t columns = params.N + (params.also != nullptr ? params.also->N : 0);
  const bool is_large = 2.0 * params.M * columns * params.K >= kSerialFlops;
  const int64_t threads = is_large ? torch::stable::get_num_threads() : 1;
  // Rows are shared, unless there are so few that a worker would hardly use what it reads of b.
  int64_t row_parts = blocks_of(params.M, kGemmRows), column_parts = 1;
  if (tiles >= 4 * threads && !params.by_columns) {
    row_parts = blocks_of(row_parts, threads) * threads;
  } else {
    if (params.also != nullptr) gemm(kernels, *std::exchange(params.also, nullptr), pairs);
    column_parts = std::min(threads, blocks);
  }
  const int64_t own_bytes = kernels.gemm_scratch(params);
  torch::stable::parallel_for(0, row_parts * column_parts, 1, [&](int64_t begin, int64_t end) {
    OptionalScratch own;
    if (own_bytes > 0) own.emplace(blocks_of(own_bytes, sizeof(float)), ScalarType::Float);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / column_parts, column = part % column_parts;
      const int64_t m = row * tiles / row_parts * kernels.tile_rows;
      const int64_t m_end = std::min((row + 1) * tiles / row_parts * kernels.tile_rows, params.M);
      const int64_t half = column * blocks / column_parts * 2, half_end = (column + 1) * blocks / column_parts * 2;
      run(params, m, m_end, half, std::min(half_end, halves), pointer(own));
    }
  });
}

}  // namespace
}  // namespace fusedrnn
