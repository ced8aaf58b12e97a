// What a variant of the LSTM takes beside its maps and its carry: peepholes, and the multipliers of noise.
//
// One kernel serves all variants of as many gates. Which of these a launch has is the same for all of its threads, and
// asked at run time: what is not given is not computed with, but for factors of one, so that no infinity becomes a NaN.
// The multipliers of a step are loaded into registers a step ahead, while a thread waits for what others send.
#pragma once

#include <cstddef>

#include "geometry.h"
#include "math.h"

namespace fusedrnn::cuda {

// In the place of a pointer that may be null: see LstmVariant.
template <class V>
struct IfGiven {
  const V& value;
  bool given;

  FUSEDRNN_DEVICE bool operator==(std::nullptr_t) const { return !given; }
  FUSEDRNN_DEVICE bool operator!=(std::nullptr_t) const { return given; }
  FUSEDRNN_DEVICE const V& operator[](int) const { return value; }
};

// C: of cell.h. Empty where it is no variant.
template <class M, class C, class Params, bool kVariant = is_variant(C::kSpec)>
class CellExtras {
 public:
  struct Peepholes {};
  struct Multipliers {};
  FUSEDRNN_DEVICE CellExtras(const Params&, int) {}
};

template <class M, class C, class Params>
class CellExtras<M, C, Params, true> {
 public:
  using S = typename M::Storage;
  using A = typename M::Compute;
  static constexpr int kPeepholes = C::kSpec.parameters;
  using Peepholes = A[kPeepholes];
  struct Multipliers {  // of a unit, a batch row and a step
    A h, c, g;
  };
  struct Operands {
    IfGiven<Peepholes> p;
    IfGiven<A> g, c;
  };

  FUSEDRNN_DEVICE CellExtras(const Params& p, int direction)
      : extras_(p.extras),
        H_(p.sizes.H),
        direction_(direction),
        has_peepholes_(extras_.w_p[direction] != nullptr),
        has_h_(of(Noise::kH) != nullptr),
        has_c_(of(Noise::kC) != nullptr) {}

  // Of a unit; zeros where it does not exist.
  FUSEDRNN_DEVICE void load(Peepholes& p, int64_t unit) const {
    const S* w_p = static_cast<const S*>(extras_.w_p[direction_]) + unit;
    const bool exist = has_peepholes_ && unit < H_;
    FUSEDRNN_UNROLL for (int k = 0; k < kPeepholes; ++k) p[k] = exist ? to_compute(w_p[k * H_]) : A(0);
  }
  // Of a step; whatever where the unit or the row does not exist.
  FUSEDRNN_DEVICE void load(Multipliers& v, bool exist, int64_t t, int64_t b, int64_t unit) const {
    const int64_t at = offset(t, b) + unit;
    v = {number(Noise::kH, exist, at), number(Noise::kC, exist, at), number(Noise::kG, exist, at)};
  }
  // Of the hidden state in the product with w_hh, at all steps.
  FUSEDRNN_DEVICE A of_state(bool exists, int64_t b, int64_t output) const {
    return number(Noise::kR, exists, offset(0, b) + output);
  }

  FUSEDRNN_DEVICE Operands operands(const Peepholes& p, const Multipliers& v) const {
    return {{p, has_peepholes_}, {v.g, true}, {v.c, has_c_}};
  }

  // h_t from the one that entered and the cell's m, by zoneout.
  FUSEDRNN_DEVICE A zoned_out(const Multipliers& v, A h_in, A m) const {
    return has_h_ ? v.h * h_in + (A(1) - v.h) * m : m;
  }
  // Of the gradient of h_t, what goes past the cell to the state that entered. The rest is that of m.
  FUSEDRNN_DEVICE A passed(const Multipliers& v, A dh) const { return has_h_ ? v.h * dh : A(0); }

 private:
  FUSEDRNN_DEVICE const A* of(Noise kind) const { return static_cast<const A*>(extras_.noise[static_cast<int>(kind)]); }
  FUSEDRNN_DEVICE int64_t offset(int64_t t, int64_t b) const {
    const Strides& strides = extras_.noise_strides;
    return direction_ * strides.d + t * strides.t + b * strides.b;
  }
  // One where there is no such noise.
  FUSEDRNN_DEVICE A number(Noise kind, bool exists, int64_t at) const {
    return exists && of(kind) != nullptr ? of(kind)[at] : A(1);
  }

  const Extras& extras_;
  const int64_t& H_;
  const int direction_;
  const bool has_peepholes_, has_h_, has_c_;
};

}  // namespace fusedrnn::cuda
