// The operands of each dtype's products, and what computes those around a launch.
#pragma once

#include "gemm.h"
#if defined(FUSEDRNN_TILES)
#include "tile_gemm.h"
#endif
#include "weight_rows.h"

namespace fusedrnn::FUSEDRNN_ISA {

#if defined(FUSEDRNN_TILES)
template <class S>
constexpr Operands kOperands = std::is_same_v<S, BFloat16> ? Operands::kTiles : Operands::kNumbers;
template <class S>
using GemmOf = std::conditional_t<kOperands<S> == Operands::kTiles, TileGemm, Gemm<Compute<S>>>;
#elif defined(FUSEDRNN_PAIRS)
template <class S>
constexpr Operands kOperands = std::is_same_v<S, BFloat16> ? Operands::kPairs : Operands::kNumbers;
template <class S>
using GemmOf = Gemm<std::conditional_t<kOperands<S> == Operands::kPairs, Pair, Compute<S>>>;
#else
template <class S>
constexpr Operands kOperands = Operands::kNumbers;
template <class S>
using GemmOf = Gemm<Compute<S>>;
#endif

}  // namespace fusedrnn::FUSEDRNN_ISA
