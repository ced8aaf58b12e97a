// Long short-term memory, as fusedrnn/cells/lstm.py defines it. Maps and saved values: i, f, g, o. The carry is c.
#pragma once

#include "spec.h"

namespace fusedrnn {

struct Lstm {
  static constexpr CellSpec kSpec = {"lstm", 4, 4, 4, {0, 4, {0, 1, 2, 3}}, {0, 4, {0, 1, 2, 3}}, Carry::kCell, true};

  template <class F, int R>
  static FUSEDRNN_CELL void forward(typename F::V (&a)[R][4], typename F::V (&c)[R], typename F::V (&m)[R]) {
    for (int r = 0; r < R; ++r) {
      F::template apply<typename F::Sigmoid, typename F::Sigmoid, typename F::Tanh, typename F::Sigmoid>(a[r]);
      m[r] = c[r] = a[r][1] * c[r] + a[r][0] * a[r][2];
    }
    F::tanh(m);
    for (int r = 0; r < R; ++r) m[r] *= a[r][3];
  }

  template <class F>
  static FUSEDRNN_CELL typename F::V backward(typename F::V (&a)[4], typename F::V c_in, typename F::V c,
                                              typename F::V dm, typename F::V& dc) {
    using A = typename F::Number;
    using V = typename F::V;
    const V i = a[0], f = a[1], g = a[2], o = a[3];
    V tanh_c[1] = {c};
    F::tanh(tanh_c);
    const V dc_t = dc + dm * o * (A(1) - tanh_c[0] * tanh_c[0]);
    a[0] = dc_t * g * i * (A(1) - i);
    a[1] = dc_t * c_in * f * (A(1) - f);
    a[2] = dc_t * i * (A(1) - g * g);
    a[3] = dm * tanh_c[0] * o * (A(1) - o);
    dc = dc_t * f;
    return o * tanh_c[0];
  }
};

}  // namespace fusedrnn
