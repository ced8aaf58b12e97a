// The device primitives on the host; see device.h and testing/cuda_emulator/runtime.h.
#pragma once

#include <cmath>
#include <cstring>

#include "../testing/cuda_emulator/runtime.h"
#include "device.h"

namespace fusedrnn::cuda {

// ---------------------------------------------------------------------------------------------- where a thread is

inline int thread_index() { return host::thread_index(); }
inline int block_index() { return host::block_index(); }
inline int cluster_rank() { return host::block_index() % host::cluster_size(); }

// ---------------------------------------------------------------------------------------------- barriers, warps

inline void sync_block(const char* name) { host::barrier(0, host::block_threads(), name); }
inline void sync_threads(int id, int count, const char* name) { host::barrier(id, count, name); }
inline void sync_warp(const char* name) { host::warp_collective(nullptr, nullptr, nullptr, name); }
inline void sync_cluster(const char* name) { host::cluster_barrier(name); }

template <class A>
inline A shuffle_xor(A value, int mask) {
  struct In {
    A value;
    int mask;
  } in{value, mask};
  A out{};
  host::warp_collective(
      [](const void* const* in, void* const* out) {
        for (int lane = 0; lane < kWarp; ++lane) {
          const int from = lane ^ static_cast<const In*>(in[lane])->mask;
          *static_cast<A*>(out[lane]) = static_cast<const In*>(in[from])->value;
        }
      },
      &in, &out, "shuffle");
  return out;
}

inline int64_t fresh(int64_t value) { return value; }
inline int kept(int value) { return value; }

// ---------------------------------------------------------------------------------------------- numbers

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_compute(BFloat16 value) { return bits_as<float>(uint32_t{value.bits} << 16); }
inline float to_compute(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u, mantissa = value.bits & 1023u;
  float magnitude = std::ldexp(static_cast<float>(mantissa | (exponent ? 1024u : 0u)),
                               exponent ? static_cast<int>(exponent) - 25 : -24);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return bits_as<float>(bits_as<uint32_t>(magnitude) | sign);
}
inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }

template <class S, class A>
inline S to_storage(A value) {
  return static_cast<S>(value);
}
template <>
inline BFloat16 to_storage<BFloat16, float>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Float16 to_storage<Float16, float>(float value) {
  const uint32_t sign = bits_as<uint32_t>(value) >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude == 0) return {static_cast<uint16_t>(sign)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int shift = exponent < -13 ? 24 : 11 - exponent;  // units of 2^-shift; subnormals share the smallest
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, shift)));
  // A carry out of the mantissa becomes the next exponent.
  return {static_cast<uint16_t>(sign | (exponent < -13 ? units : units - 1024u + ((exponent + 14u) << 10)))};
}
inline float to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return bits_as<float>((bits_as<uint32_t>(value) + 0x1000u) & ~0x1fffu);  // nearest, ties away from zero
}
inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float quick_exponential(float x) { return std::exp(x); }
// The result of std::tanh with the error that the instruction may have: cut to 11 bits, which is up to 2^-10.
inline float rough_tangent(float x) { return bits_as<float>(bits_as<uint32_t>(std::tanh(x)) & ~0x1fffu); }
inline float quick_divide(float a, float b) { return a / b; }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

inline uint32_t as_word(float value) { return bits_as<uint32_t>(value); }
template <class E>
inline E element(const Quad& quad, int k) {
  E value;
  std::memcpy(&value, reinterpret_cast<const char*>(&quad) + k * sizeof(E), sizeof(E));
  return value;
}

// ---------------------------------------------------------------------------------------------- matrix instructions

// The lanes' fragments, put together to matrices as the PTX ISA draws them ("Matrix Fragments for mma.m16n8k16 with
// floating point type", "Matrix Fragments for mma.m16n8k8"), multiplied, and taken apart.
template <Operands kOperands>
struct Fragments {
  static constexpr int kPerWord = kOperands == Operands::kTf32 ? 1 : 2;  // numbers in a register
  static constexpr int kK = 8 * kPerWord;

  float* c;
  uint32_t a[4], b[2];

  static float number(uint32_t word, int k) {
    if constexpr (kOperands == Operands::kTf32) {
      return bits_as<float>(word & ~0x1fffu);  // the unit does not read the last 13 bits
    } else {
      const auto half = static_cast<uint16_t>(word >> (16 * k));
      return kOperands == Operands::kBFloat16 ? to_compute(BFloat16{half}) : to_compute(Float16{half});
    }
  }

  static void multiply(const void* const* in, void* const*) {
    float a[16][kK], b[kK][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& own = *static_cast<const Fragments*>(in[lane]);
      const int group = lane / 4, position = lane % 4;
      for (int k = 0; k < kPerWord; ++k) {
        const int low = position * kPerWord + k, high = low + kK / 2;
        a[group][low] = number(own.a[0], k);
        a[group + 8][low] = number(own.a[1], k);
        a[group][high] = number(own.a[2], k);
        a[group + 8][high] = number(own.a[3], k);
        b[low][group] = number(own.b[0], k);
        b[high][group] = number(own.b[1], k);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& own = *static_cast<const Fragments*>(in[lane]);
      for (int n = 0; n < 4; ++n) {
        const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        float sum = own.c[n];
        for (int k = 0; k < kK; ++k) sum += a[row][k] * b[k][column];
        own.c[n] = sum;
      }
    }
  }
};

template <Operands kOperands>
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const Fragments<kOperands> in{c, {a0, a1, a2, a3}, {b0, b1}};
  host::warp_collective(Fragments<kOperands>::multiply, &in, nullptr, "mma");
}

// ---------------------------------------------------------------------------------------------- memory

inline Quad load_streamed(const Quad* address) { return *address; }
inline void copy_async(void* shared, const void* global) { host::copy_later(shared, global, sizeof(Quad)); }
inline void wait_copies(const char* name) {
  if (host::present(name)) host::finish_copies();
}
inline void end_copies() { host::finish_copies(); }
inline void copy_async_if(bool condition, void* shared, const void* global) {
  if (condition) copy_async(shared, global);
}
inline void commit_copies() { host::commit_copies(); }
template <int kGroups>
inline void wait_copies_but(const char* name) {
  if (host::present(name)) host::finish_copies(kGroups);
}
inline void store_global_if(bool condition, void* address, const Quad& quad) {
  if (condition) std::memcpy(address, &quad, sizeof(quad));
}
template <class A>
void load_global_if(bool condition, const A* address, A& value) {
  if (condition) value = *address;
}
inline void store_exchanged(void* address, const Quad& quad) { host::store_late(address, &quad, sizeof(quad)); }
// Removed, the flag is still set, but nothing is released.
inline void release_flag(uint32_t* flag, uint32_t value, const char* name) {
  if (host::present(name)) host::release_stores();
  *flag = value;
}
inline uint32_t flag(const uint32_t* flag) { return *flag; }

// ---------------------------------------------------------------------------------------------- mbarrier

struct HostMbarrier {
  int32_t bytes;              // still to come in this phase; negative if they come before they are expected
  uint8_t expected, pending;  // arrivals
  uint16_t phase;

  void complete() {
    if (pending != 0 || bytes != 0) return;
    pending = expected;
    ++phase;
  }
};
static_assert(sizeof(HostMbarrier) == sizeof(Mbarrier));

inline HostMbarrier& host_state(void* barrier) { return *static_cast<HostMbarrier*>(barrier); }

inline void init_mbarrier(Mbarrier* barrier, int arrivals) {
  host_state(barrier) = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
}
inline void expect_bytes(Mbarrier* barrier, uint32_t bytes) {
  HostMbarrier& state = host_state(barrier);
  state.bytes += static_cast<int32_t>(bytes);
  --state.pending;
  state.complete();
}
inline bool mbarrier_passed(Mbarrier* barrier, uint32_t parity) { return (host_state(barrier).phase & 1) != parity; }
inline void push(void* shared, Mbarrier* barrier, int rank, const Quad& quad) {
  host::push_later(rank, shared, &quad, sizeof(quad), barrier, [](void* peers_barrier, int bytes) {
    HostMbarrier& state = host_state(peers_barrier);
    state.bytes -= bytes;
    state.complete();
  });
}

// ---------------------------------------------------------------------------------------------- waiting

template <class F>
inline void wait(const F& condition, const char* name) {
  host::wait_until([](void* argument) { return (*static_cast<const F*>(argument))(); }, const_cast<F*>(&condition),
                   name);
}

}  // namespace fusedrnn::cuda
