// Gated recurrent unit, as fusedrnn/cells/gru.py defines it. Maps: nx, r, z, nh, of which the input's affine map is in
// the first three and that of the state in the last three. Saved: n, r, z, nh. The carry is h, unrounded.
#pragma once

#include "spec.h"

namespace fusedrnn {

struct Gru {
  static constexpr CellSpec kSpec = {"gru", 3, 4, 4, {0, 3, {2, 0, 1}}, {1, 4, {0, 1, 2}}, Carry::kHidden, false};

  template <class F, int R>
  static FUSEDRNN_CELL void forward(typename F::V (&a)[R][4], typename F::V (&h)[R], typename F::V (&m)[R]) {
    using A = typename F::Number;
    typename F::V gates[2 * R];  // r and z of each
    for (int r = 0; r < R; ++r) {
      gates[2 * r] = a[r][1];
      gates[2 * r + 1] = a[r][2];
    }
    F::sigmoid(gates);
    for (int r = 0; r < R; ++r) {
      a[r][1] = gates[2 * r];
      a[r][2] = gates[2 * r + 1];
      m[r] = a[r][0] + a[r][1] * a[r][3];
    }
    F::tanh(m);
    for (int r = 0; r < R; ++r) {
      a[r][0] = m[r];
      m[r] = h[r] = (A(1) - a[r][2]) * m[r] + a[r][2] * h[r];
    }
  }

  template <class F>
  static FUSEDRNN_CELL typename F::V backward(typename F::V (&a)[4], typename F::V h_in, typename F::V h,
                                              typename F::V dm, typename F::V& dh) {
    using A = typename F::Number;
    using V = typename F::V;
    const V n = a[0], r = a[1], z = a[2], nh = a[3], all = dh + dm;
    const V da_nx = all * (A(1) - z) * (A(1) - n * n);
    a[0] = da_nx;
    a[1] = da_nx * nh * r * (A(1) - r);
    a[2] = all * (h_in - n) * z * (A(1) - z);
    a[3] = da_nx * r;
    dh = all * z;
    return h;
  }
};

}  // namespace fusedrnn
