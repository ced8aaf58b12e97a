// The interface of a cell in C++: its maps, its carry, its pointwise function and the derivative of that. Definitions:
// fusedrnn/cells/spec.py; derivation: docs/math.md.
//
// Each cell is a struct in its own file, which includes nothing else and is independent of torch and the processor:
//
//   static constexpr CellSpec kSpec;
//   template <class F, int R>
//   static void forward(V (&a)[R][kSpec.maps], V (&carry)[R], V (&m)[R]);
//   template <class F>
//   static V backward(V (&a)[kSpec.maps], V carry_in, V carry, V dm, V& dcarry);
//
// forward, for R independent units: a holds the maps on entry and the saved values on exit; carry is replaced by the
// new carry; m is set to the new hidden state, or the input of the projection. backward: a holds the saved values on
// entry and the gradients of the maps on exit; carry_in and carry are the old and the new carry; dm is the gradient of
// m; dcarry is the gradient of the new carry, without the path through m, and is replaced by that of the old carry.
// Returns m.
//
// F, supplied by the kernel, has
//   V, Number                  a number of one unit, or a vector with those of several units; and its element type
//   sigmoid(x), tanh(x)        of an array V (&x)[N], in place
//   apply<G...>(x)             in place on an array of sizeof...(G) elements: Sigmoid or Tanh for each
//   relu(x)                    of a V
//   where_positive(x, value)   value where x > 0, else 0
#pragma once

#if defined(__CUDACC__)
#define FUSEDRNN_CELL __device__ __forceinline__
#else
#define FUSEDRNN_CELL inline __attribute__((always_inline))
#endif

namespace fusedrnn {

constexpr int kMostMaps = 4;

// A matrix product of a cell: it contributes to maps [begin, end), by these blocks of rows of torch's weights.
struct MapWindow {
  int begin, end;
  int gates[kMostMaps];
};

// The state passed from step to step besides h, in the arithmetic dtype: c, or h unrounded.
enum class Carry { kNone, kCell, kHidden };

// See the attributes of the same names in Python.
struct CellSpec {
  const char* name;
  int gates, maps, saved;
  MapWindow input, recurrent;
  Carry carry;
  bool projects;  // whether a projection of m is supported
  // Number of per-unit parameters, for cells with parameters and noise: see lstm_variants.h.
  int parameters = 0;
};

}  // namespace fusedrnn
