// The inputs of a step of the backward: the cell's saved values and its carry, dy and dc.
//
// Copied into shared memory a few steps ahead, 16 bytes at a time (runs.h), by the threads that work on these units and
// rows: a row of a step is the arrays of its units, one after the other.
#pragma once

#include "geometry.h"
#include "math.h"
#include "runs.h"

namespace fusedrnn::cuda {

// Prefetches the inputs of kUnits units and kRows batch rows; thread is 0 to kThreads - 1. C is a cell (cell.h).
template <class M, class C, int kUnits, int kRows, int kThreads>
class BackwardInputs {
 public:
  using S = typename M::Storage;
  using A = typename M::Compute;
  static constexpr int kSaved = C::kSpec.saved, kArrays = copied_arrays(C::kSpec);
  static constexpr bool kCarries = C::kSpec.carry != Carry::kNone, kHasCellState = has_cell_state(C::kSpec);
  static constexpr int kC = kSaved, kDy = kSaved + (kCarries ? 1 : 0), kDc = kDy + 1;
  static constexpr int kRow = copied_row(C::kSpec, M::kMath, kUnits), kStep = kRows * kRow;  // bytes

  // Begins a slice at its last step. first_unit + kUnits may exceed H. steps: kSteps buffers in shared memory; arrays
  // that are not given are zeros in them.
  template <int kSteps>
  FUSEDRNN_DEVICE void start(const BackwardParams& p, const Direction& direction, int thread, int64_t first_row,
                             int64_t first_unit, bool backwards, char* steps) {
    thread_ = thread;
    ragged_ = false;
    const int64_t H = p.sizes.H, last = direction.at(p.sizes.T - 1);
    FUSEDRNN_UNROLL for (int m = 0; m < kCopies; ++m) {
      const int array = at(m).array;
      const int64_t b = first_row + at(m).row, unit = first_unit + at(m).chunk * kPerQuad;
      const bool is_saved = array < kSaved, is_carry = kCarries && array == kC;
      const void* base = is_saved ? p.saved : is_carry ? p.c : array == kDy ? p.dy : p.dc;
      const Strides& strides = is_carry ? p.c_strides : array == kDy ? p.dy_strides : p.dc_strides;
      const int64_t begin =
          is_saved ? direction.step(last, b, kSaved * H) + array * H : direction.offset(strides, last, b);
      const int64_t step = is_saved ? p.sizes.B * kSaved * H : strides.t;
      const bool exists = array < kArrays && base != nullptr && b < p.sizes.B;
      copies_[m] = Run(static_cast<const char*>(base) + (begin + unit) * kBytes, (backwards ? step : -step) * kBytes,
                       exists ? (H - unit) * kBytes : 0);
      ragged_ |= copies_[m].is_ragged();
      if (base != nullptr || array >= kArrays) continue;
      for (int step = 0; step < kSteps; ++step) *quad(steps + step * kStep, m) = Quad{{0, 0, 0, 0}};
    }
  }

  // Begins to copy the step that comes before those copied, if there is one.
  FUSEDRNN_DEVICE void copy(bool exists, char* to) {
    if (exists) ragged_ ? copy<true>(to) : copy<false>(to);
    commit_copies();
  }

  // A number of a step, in shared memory; unit of the kUnits.
  static FUSEDRNN_DEVICE A number(const char* step, int row, int array, int unit) {
    return to_compute(*reinterpret_cast<const S*>(step + row * kRow + (array * kUnits + unit) * kBytes));
  }
  // The carry that left a step, and the gradient of it that the caller gives; zero where the cell has none.
  static FUSEDRNN_DEVICE A carry(const char* step, int row, int unit) {
    return kCarries ? number(step, row, kC, unit) : A(0);
  }
  static FUSEDRNN_DEVICE A dcarry(const char* step, int row, int unit) {
    return kHasCellState ? number(step, row, kDc, unit) : A(0);
  }

 private:
  static constexpr int kBytes = sizeof(S), kPerQuad = sizeof(Quad) / sizeof(S), kChunks = kUnits / kPerQuad;
  static constexpr int kCopies = (kRows * kArrays * kChunks + kThreads - 1) / kThreads;

  template <bool kRagged>
  FUSEDRNN_DEVICE void copy(char* to) {
    FUSEDRNN_UNROLL for (int m = 0; m < kCopies; ++m) {
      copies_[m].template copy<kRagged>(reinterpret_cast<char*>(quad(to, m)));
    }
  }

  // The thread's m-th quad. Array after array, so that few threads have several kinds of steps from one to the next.
  struct Place {
    int array, row, chunk;
  };
  FUSEDRNN_DEVICE Place at(int m) const {
    const int q = thread_ + m * kThreads;
    return {q / (kChunks * kRows), q / kChunks % kRows, q % kChunks};
  }
  // The m-th quad of this thread in the buffer of a step.
  FUSEDRNN_DEVICE Quad* quad(char* step, int m) const {
    return reinterpret_cast<Quad*>(step + at(m).row * kRow) + at(m).array * kChunks + at(m).chunk;
  }

  int thread_ = 0;
  bool ragged_ = false;  // whether any of the copies is
  Run copies_[kCopies];
};

// Layout of a row of staged map gradients of kUnits units in shared memory: first the maps that are multiplied with
// w_hh, in the order of K (backward.h); from byte kOthers on the others, in the same order.
template <class M, class C, int kUnits, int kOthers>
struct StagedGradients {
  static constexpr int kMaps = C::kSpec.maps, kFirst = C::kSpec.recurrent.begin;
  static constexpr int kRecurrentMaps = width(C::kSpec.recurrent), kNotMeeting = kMaps - kRecurrentMaps;
  static constexpr int kBytes = sizeof(typename M::Storage);

  // Offset of unit 8 * group + unit.
  static FUSEDRNN_DEVICE int byte_of(int map, int group, int unit) {
    if (map >= kFirst && map < kFirst + kRecurrentMaps)
      return ((group * kRecurrentMaps + map - kFirst) * 8 + unit) * kBytes;
    const int other = map < kFirst ? map : map - kRecurrentMaps;
    return kOthers + ((group * kNotMeeting + other) * 8 + unit) * kBytes;
  }

  struct Place {
    int map, unit, byte;
  };
  // Map, unit and offset of the k-th number of a row.
  static FUSEDRNN_DEVICE Place place(int k) {
    if (kNotMeeting == 0 || k < kUnits * kRecurrentMaps) {
      return {kFirst + k / 8 % kRecurrentMaps, k / (8 * kRecurrentMaps) * 8 + k % 8, k * kBytes};
    }
    constexpr int kOf = kNotMeeting > 0 ? kNotMeeting : 1;
    const int behind = k - kUnits * kRecurrentMaps, other = behind / 8 % kOf;
    return {other < kFirst ? other : other + kRecurrentMaps, behind / (8 * kOf) * 8 + k % 8, kOthers + behind * kBytes};
  }
};

// The gradients of kUnits units and kRows batch rows, which are Staged in shared memory, to where the launch leaves
// them; likewise.
template <class M, class Staged, int kUnits, int kRows, int kThreads>
class GradientStores {
 public:
  using S = typename M::Storage;
  static constexpr int kMaps = Staged::kMaps, kQuadsOfRow = kUnits * kMaps * sizeof(S) / sizeof(Quad);
  static constexpr int kStores = (kRows * kQuadsOfRow + kThreads - 1) / kThreads;
  using Quads = Quad[kStores];

  FUSEDRNN_DEVICE void start(const BackwardParams& p, const Direction& direction, int thread, int64_t first_row,
                             int64_t first_unit, bool backwards) {
    constexpr int kBytes = sizeof(S);
    thread_ = thread;
    ragged_ = false;
    const int64_t H = p.sizes.H, last = direction.at(p.sizes.T - 1), step = p.sizes.B * kMaps * H;
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) {
      const int q = thread + m * kThreads, row = q / kQuadsOfRow;
      const typename Staged::Place place = Staged::place(q % kQuadsOfRow * kPerQuad);
      const int64_t b = first_row + row, unit = first_unit + place.unit;
      const int64_t at = direction.step(last, b, kMaps * H) + place.map * H + unit;
      stores_[m] = Run(static_cast<const char*>(p.da) + at * kBytes, (backwards ? step : -step) * kBytes,
                       row < kRows && b < p.sizes.B ? (H - unit) * kBytes : 0);
      ragged_ |= stores_[m].is_ragged();
    }
  }

  // Reads the quads that this thread stores for a step. at(row, byte): address of that byte of a row.
  template <class At>
  FUSEDRNN_DEVICE void read(Quads& da, const At& at) const {
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) {
      const int q = thread_ + m * kThreads;
      da[m] = Quad{{0, 0, 0, 0}};
      if (q < kRows * kQuadsOfRow) {
        da[m] = *reinterpret_cast<const Quad*>(at(q / kQuadsOfRow, Staged::place(q % kQuadsOfRow * kPerQuad).byte));
      }
    }
  }
  FUSEDRNN_DEVICE void store(const Quads& da) { ragged_ ? store<true>(da) : store<false>(da); }

 private:
  static constexpr int kPerQuad = sizeof(Quad) / sizeof(S);

  template <bool kRagged>
  FUSEDRNN_DEVICE void store(const Quads& da) {
    FUSEDRNN_UNROLL for (int m = 0; m < kStores; ++m) stores_[m].template store<kRagged>(da[m]);
  }

  int thread_ = 0;
  bool ragged_ = false;
  Run stores_[kStores];
};

}  // namespace fusedrnn::cuda
