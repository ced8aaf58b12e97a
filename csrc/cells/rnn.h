// The plain recurrent cell, as fusedrnn/cells/rnn.py defines it: h = tanh(a) or relu(a). Saved: h. There is no carry.
#pragma once

#include "spec.h"

namespace fusedrnn {

struct RnnTanh {
  static constexpr CellSpec kSpec = {"rnn_tanh", 1, 1, 1, {0, 1, {0}}, {0, 1, {0}}, Carry::kNone, false};

  template <class F, int R>
  static FUSEDRNN_CELL void forward(typename F::V (&a)[R][1], typename F::V (&)[R], typename F::V (&m)[R]) {
    for (int r = 0; r < R; ++r) m[r] = a[r][0];
    F::tanh(m);
    for (int r = 0; r < R; ++r) a[r][0] = m[r];
  }

  template <class F>
  static FUSEDRNN_CELL typename F::V backward(typename F::V (&a)[1], typename F::V, typename F::V, typename F::V dm,
                                              typename F::V&) {
    using A = typename F::Number;
    const typename F::V h = a[0];
    a[0] = dm * (A(1) - h * h);
    return h;
  }
};

struct RnnRelu {
  static constexpr CellSpec kSpec = {"rnn_relu", 1, 1, 1, {0, 1, {0}}, {0, 1, {0}}, Carry::kNone, false};

  template <class F, int R>
  static FUSEDRNN_CELL void forward(typename F::V (&a)[R][1], typename F::V (&)[R], typename F::V (&m)[R]) {
    for (int r = 0; r < R; ++r) m[r] = a[r][0] = F::relu(a[r][0]);
  }

  template <class F>
  static FUSEDRNN_CELL typename F::V backward(typename F::V (&a)[1], typename F::V, typename F::V, typename F::V dm,
                                              typename F::V&) {
    const typename F::V h = a[0];
    a[0] = F::where_positive(h, dm);
    return h;
  }
};

}  // namespace fusedrnn
