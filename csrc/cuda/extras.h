// The additional inputs of the LSTM's variants: peepholes, and the multipliers of noise.
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

// C: of cell.h. Empty where it is no variant. With a projection there is no zoneout.
template <class M, class C, class Params, bool kProjected, bool kVariant = is_variant(C::kSpec)>
class CellExtras {
 public:
  struct Peepholes {};
  struct Multipliers {};
  static constexpr bool kKeeps = false;
  FUSEDRNN_DEVICE CellExtras(const Params&, int) {}
};

template <class M, class C, class Params, bool kProjected>
class CellExtras<M, C, Params, kProjected, true> {
 public:
  using S = typename M::Storage;
  using A = typename M::Compute;
  static constexpr int kPeepholes = C::kSpec.parameters;
  using Peepholes = A[kPeepholes];
  // The multipliers of a unit, a batch row and a step. dropped: of the candidate, or of the state in the product with
  // w_hh, which is the same at all steps. No variant has both.
  struct Multipliers {
    A h = 0, c = 0, dropped = 0;
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
        has_h_(!kProjected && given(Noise::kH)),
        has_c_(!kProjected && given(Noise::kC)),
        has_g_(given(Noise::kG)),
        has_r_(given(Noise::kR)) {}

  // Whether a thread holds values that are the same at all steps in registers; else it loads them at each use:
  // in float64 there are too few registers.
  static constexpr bool kKeeps = sizeof(A) == sizeof(float);

  // Loads the peepholes of a unit; zeros if unit >= H.
  FUSEDRNN_DEVICE void load(Peepholes& p, int64_t unit) const {
    const S* w_p = static_cast<const S*>(extras_.w_p[direction_]) + unit;
    const bool exist = has_peepholes_ && unit < H_;
    FUSEDRNN_UNROLL for (int k = 0; k < kPeepholes; ++k) p[k] = exist ? to_compute(w_p[k * H_]) : A(0);
  }
  // p = the peepholes of a unit: those held in registers, or loaded.
  FUSEDRNN_DEVICE void take(Peepholes& p, const Peepholes& kept, int64_t unit) const {
    if constexpr (kKeeps) {
      FUSEDRNN_UNROLL for (int k = 0; k < kPeepholes; ++k) p[k] = kept[k];
    } else {
      load(p, fresh(unit));
    }
  }
  // Whether there are multipliers to load at every step. With a projection, those of r are not of a unit.
  FUSEDRNN_DEVICE bool has_noise() const { return kProjected ? has_g_ : extras_.noise_strides.b != 0; }
  // Index of the multipliers of a step, a row and a unit.
  FUSEDRNN_DEVICE int64_t place(int64_t t, int64_t b, int64_t unit) const {
    const Strides& strides = extras_.noise_strides;  // which are of 32 bits, and so are t and b
    const int64_t of_row = int64_t{static_cast<int>(b)} * to_next_row(),
                  of_step = int64_t{static_cast<int>(t)} * static_cast<int>(strides.t);
    return of_step + of_row + (unit + (direction_ == 1 ? strides.d : 0));
  }
  // place() with the unit clamped to those that exist.
  FUSEDRNN_DEVICE int64_t place_of_nearest(int64_t t, int64_t b, int64_t unit) const {
    const int64_t units = extras_.noise_strides.d;
    return place(t, b, unit < units ? unit : units > 0 ? units - 1 : 0);
  }
  FUSEDRNN_DEVICE int to_next_row() const { return static_cast<int>(fresh(extras_.noise_strides.b)); }
  FUSEDRNN_DEVICE int to_next_step() const { return static_cast<int>(extras_.noise_strides.t); }
  // Loads the multipliers at an index from place(). Kinds that are not given get values that are never used.
  FUSEDRNN_DEVICE void load(Multipliers& v, int64_t at) const {
    if constexpr (!kProjected) {
      v.h = noise(0)[at];
      v.c = noise(1)[at];
    }
    v.dropped = noise(2)[at];
  }
  // As above, if `exist`.
  FUSEDRNN_DEVICE void load(Multipliers& v, bool exist, int64_t at) const {
    if constexpr (!kProjected) {
      load_global_if(exist, noise(0) + at, v.h);
      load_global_if(exist, noise(1) + at, v.c);
    }
    load_global_if(exist, noise(2) + at, v.dropped);
  }
  // The multiplier of an element of h in the product with w_hh. With a projection it belongs to an output, not a unit.
  FUSEDRNN_DEVICE A of_state(const Multipliers& v) const { return has_r_ ? v.dropped : A(1); }
  FUSEDRNN_DEVICE A of_state(bool exists, int64_t b, int64_t output) const {
    return exists && has_r_ ? noise(2)[place(0, b, output)] : A(1);
  }

  FUSEDRNN_DEVICE Operands operands(const Peepholes& p, const Multipliers& v) const {
    return {{p, has_peepholes_}, {v.dropped, has_g_}, {v.c, has_c_}};
  }

  // h_t from the one that entered and the cell's m, by zoneout.
  FUSEDRNN_DEVICE A zoned_out(const Multipliers& v, A h_in, A m) const {
    return has_h_ ? v.h * h_in + (A(1) - v.h) * m : m;
  }
  // The part of the gradient of h_t that bypasses the cell to h_{t-1}. The rest is the gradient of m.
  FUSEDRNN_DEVICE A passed(const Multipliers& v, A dh) const { return has_h_ ? v.h * dh : A(0); }

 private:
  FUSEDRNN_DEVICE bool given(Noise kind) const { return extras_.given[static_cast<int>(kind)] != 0; }
  FUSEDRNN_DEVICE const A* noise(int k) const { return static_cast<const A*>(extras_.noise[k]); }

  const Extras& extras_;
  const int64_t& H_;
  const int direction_;
  const bool has_peepholes_, has_h_, has_c_, has_g_, has_r_;
};

}  // namespace fusedrnn::cuda
