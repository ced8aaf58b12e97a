// What makes a cell, for kernels in C++: the maps it reads, the state it carries, its pointwise function and the
// derivative of it. The same in Python, with the definitions: fusedrnn/cells/spec.py. docs/math.md derives them.
//
// A cell is a struct of a file of its own here, which includes nothing else and knows neither torch nor a processor:
//
//   static constexpr CellSpec kSpec;
//   template <class F, int R>
//   static void forward(V (&a)[R][kSpec.maps], V (&carry)[R], V (&m)[R]);
//   template <class F>
//   static V backward(V (&a)[kSpec.maps], V carry_in, V carry, V dm, V& dcarry);
//
// forward is of R units of one kind: a holds their maps on entry and what is saved on exit, carry the state that enters
// and then the one that leaves; m becomes the new hidden state, or what a projection makes it of. backward: a holds
// what is saved on entry and the gradients of the maps on exit; carry_in and carry are as in forward, dm is the
// gradient of m, dcarry that of the carry that left by all ways but m, and then that of the carry that entered. Returns
// m.
//
// F, of who uses a cell, has
//   V, Number                  what a unit's number is, maybe some units' in a vector, and the type of the number
//   sigmoid(x), tanh(x)        of an array V (&x)[N], in place
//   apply<G...>(x)             of an array of as many as there are G, each Sigmoid or Tanh, another for each element
//   relu(x)                    of a V
//   where_positive(x, value)   value where x is more than 0, else 0
#pragma once

#if defined(__CUDACC__)
#define FUSEDRNN_CELL __device__ __forceinline__
#else
#define FUSEDRNN_CELL inline __attribute__((always_inline))
#endif

namespace fusedrnn {

constexpr int kMostMaps = 4;

// A matrix product of a cell: maps [begin, end) have its affine map, of these blocks of rows of torch's weights.
struct MapWindow {
  int begin, end;
  int gates[kMostMaps];
};

// What goes from step to step besides h, in the precision of the arithmetic: a state of its own, or h unrounded.
enum class Carry { kNone, kCell, kHidden };

// See the attributes of the same names in Python.
struct CellSpec {
  const char* name;
  int gates, maps, saved;
  MapWindow input, recurrent;
  Carry carry;
  bool projects;  // whether there may be a projection of m
  // How many parameters a unit has, of a cell that takes them and noise at run time: see lstm_variants.h.
  int parameters = 0;
};

}  // namespace fusedrnn
