// Runs the portable CPU kernels on one layer, forward and backward, without torch: standard input to standard output.
//
// tests/cpu/portable/test_portable.py compiles this with the kernels, for the host and for other processors, which an
// emulator stands in for. In: the numbers of Header, then the tensors in the order in which they are read below. Out:
// y, hn, cn, da, dh0, dc0. Shapes: csrc/cpu/params.h. All is contiguous and without gaps.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string_view>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/params.h"

namespace {

using namespace fusedrnn;
using Bytes = std::vector<char>;

struct Header {
  int64_t dtype, cell, T, B, I, H, D, packs, threads, has_lengths, has_reset;
};

void fail(const char* what) {
  std::fprintf(stderr, "run_kernels: %s\n", what);
  std::exit(1);
}

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) fail("the input is too short");
}
Bytes read(int64_t bytes) {
  Bytes values(bytes);
  read(values.data(), values.size());
  return values;
}
void write(const Bytes& values) {
  if (std::fwrite(values.data(), 1, values.size(), stdout) != values.size()) fail("the output cannot be written");
}

// Memory that begins with a cache line; every byte is set, to what is NaN in any dtype unless it shall be zero.
class Scratch {
 public:
  explicit Scratch(int64_t bytes, int value = 0xff) : storage_(bytes + kLine, static_cast<char>(value)) {}
  char* begin() {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + (kLine - address % kLine) % kLine;
  }

 private:
  static constexpr int64_t kLine = 64;
  Bytes storage_;
};

const Kernels& portable_kernels(int64_t dtype) {
  for (const Isa* const* isa = instruction_sets(); *isa != nullptr; ++isa) {
    if (std::string_view((*isa)->name) == "portable") return (*(*isa)->kernels)[dtype];
  }
  fail("there are no portable kernels");
  std::abort();
}

template <class F>
void launch(Team& team, const Sizes& s, int64_t lanes, const F& f) {
  Scratch lines((1 + s.D * blocks_of(s.H, lanes)) * 64, 0);
  team.lines = lines.begin();
  std::vector<std::thread> others;
  for (int worker = 1; worker < team.workers; ++worker) others.emplace_back([&f, worker] { f(worker); });
  f(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

int main() {
  Header header;
  read(&header, sizeof(header));
  const auto& [dtype, kind, T, B, I, H, D, packs, threads, has_lengths, has_reset] = header;
  const Kernels& kernels = portable_kernels(dtype);
  const CellKernels& cell = kernels.cells[kind];
  const CellSpec& spec = cell.spec;
  const int64_t N = T * B, G = spec.gates, M = spec.maps, C = spec.carry == Carry::kCell ? H : 0, lanes = kernels.lanes;
  const int64_t S = dtype == 0 ? 4 : dtype == 1 ? 8 : 2, A = dtype == 1 ? 8 : 4;  // bytes of a number
  const Sizes sizes{T, B, N, I, H, H, D, false};

  const Bytes x = read(N * I * S), x_computed = read(N * I * A);
  std::vector<Bytes> w_ih, w_hh, b_ih, b_hh;
  for (int64_t d = 0; d < D; ++d) {
    w_ih.push_back(read(G * H * I * S));
    w_hh.push_back(read(G * H * H * S));
    b_ih.push_back(read(G * H * S));
    b_hh.push_back(read(G * H * S));
  }
  const Bytes h0 = read(D * B * H * S), c0 = read(D * B * C * S);
  const Bytes dy = read(N * D * H * S), dhn = read(D * B * H * S), dcn = read(D * B * C * S);
  const Bytes lengths = read(has_lengths ? B * 8 : 0), reset = read(has_reset ? N : 0);
  const Sequence sequence{has_lengths ? reinterpret_cast<const int64_t*>(lengths.data()) : nullptr, nullptr,
                          has_reset ? reinterpret_cast<const uint8_t*>(reset.data()) : nullptr};
  Team team{threads > 1 ? Team::Split::kUnits : Team::Split::kRows, static_cast<int>(threads), nullptr};

  // Forward.
  Bytes y(N * D * H * S), hn(D * B * H * S), cn(D * B * C * S), c(N * D * C * S), saved(D * N * spec.saved * H * S);
  const int64_t units = blocks_of(H, lanes) * lanes;
  Scratch h(2 * D * B * H * A), carry(D * B * units * A);
  ForwardParams forward{};
  forward.sizes = sizes;
  forward.sequence = sequence;
  forward.x = x.data();
  forward.end = T;
  forward.h0 = h0.data();
  forward.c0 = C > 0 ? c0.data() : nullptr;
  forward.y = y.data();
  forward.hn = hn.data();
  forward.cn = cn.data();
  forward.c = C > 0 ? c.data() : nullptr;
  forward.saved = saved.data();
  forward.h = h.begin();
  forward.carry = carry.begin();
  forward.team = team;
  std::deque<Scratch> kept;  // none of them moves
  const auto panels_of = [&](const MapWindow& maps) {
    const int64_t count = maps.end - maps.begin, blocks = chunk_blocks(count);
    return blocks_of(blocks_of(H, lanes), blocks) * count * blocks / 4;
  };
  const int64_t panels_ih = panels_of(spec.input), panels_hh = panels_of(spec.recurrent), wide = 4 * lanes;
  Scratch panel_hh(D * panels_hh * H * wide * A);
  for (int64_t d = 0; d < D; ++d) {
    forward.w_ih[d] = w_ih[d].data();
    forward.w_hh[d] = w_hh[d].data();
    forward.b_ih[d] = b_ih[d].data();
    forward.b_hh[d] = b_hh[d].data();
    if (!packs) continue;
    kernels.pack_maps(w_hh[d].data(), spec.recurrent, H, H, panel_hh.begin() + d * panels_hh * H * wide * A, 0,
                      panels_hh);
    Scratch panel_ih(panels_ih * I * wide * A);
    kernels.pack_maps(w_ih[d].data(), spec.input, H, I, panel_ih.begin(), 0, panels_ih);
    const int64_t room = M * (H + 8 * wide) * A;
    Scratch& start = kept.emplace_back(room);
    cell.add_biases(b_ih[d].data(), b_hh[d].data(), H, spec.input.begin, spec.input.end, true, start.begin());
    Scratch& xg = kept.emplace_back(panels_ih * wide * N * A);
    GemmParams gemm{};
    gemm.M = N;
    gemm.N = panels_ih * wide;
    gemm.K = I;
    gemm.a = x_computed.data();
    gemm.a_stride = I;
    gemm.panels = panel_ih.begin();
    gemm.c = xg.begin();
    gemm.c_in_blocks = true;
    gemm.start = start.begin();
    Scratch own(kernels.gemm_scratch(gemm));
    for (int64_t m = 0; m < N; m += kGemmRows) {
      kernels.gemm(gemm, m, m + kGemmRows < N ? m + kGemmRows : N, 0, blocks_of(gemm.N, 2 * lanes), own.begin());
    }
    forward.xg[d] = xg.begin();
    forward.xg_rows[d] = N;
    if (spec.maps > spec.input.end) {
      Scratch& others = kept.emplace_back(room);
      cell.add_biases(b_ih[d].data(), b_hh[d].data(), H, spec.input.end, spec.maps, true, others.begin());
      forward.biases[d] = others.begin();
    }
  }
  if (packs) forward.panel_hh = panel_hh.begin();
  launch(forward.team, sizes, lanes, [&](int worker) { cell.forward(forward, worker); });

  // Backward.
  Bytes da(D * N * M * H * A), dh0(D * B * H * S), dc0(D * B * C * S);
  const int64_t panels = blocks_of(H, wide);
  Scratch columns(D * panels * G * H * wide * A), dh_state(D * B * H * A), dcarry(D * B * H * A);
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t k = 0; k < G * H; ++k) {
      const int64_t row = spec.recurrent.gates[k / H] * H + k % H;
      kernels.pack_input(w_hh[d].data() + row * H * S, nullptr, H, columns.begin() + d * panels * G * H * wide * A,
                         G * H, k);
    }
  }
  BackwardParams backward{};
  backward.begin = -1;
  backward.end = T;
  backward.sizes = sizes;
  backward.sequence = sequence;
  backward.panel_hh = columns.begin();
  backward.dy = dy.data();
  backward.dhn = dhn.data();
  backward.dcn = C > 0 ? dcn.data() : nullptr;
  backward.h0 = h0.data();
  backward.y = y.data();
  backward.saved = saved.data();
  backward.carry0 = C > 0 ? c0.data() : h0.data();
  backward.carry = C > 0 ? c.data() : y.data();
  backward.da = da.data();
  backward.da_stride = M * H;
  backward.da_begin = spec.recurrent.begin * H;
  backward.da_inputs = G * H;
  backward.dh0 = dh0.data();
  backward.dc0 = C > 0 ? dc0.data() : nullptr;
  backward.dh_state = dh_state.begin();
  backward.dcarry = dcarry.begin();
  backward.team = team;
  launch(backward.team, sizes, lanes, [&](int worker) { cell.backward(backward, worker); });

  for (const Bytes* values : {&y, &hn, &cn, &da, &dh0, &dc0}) write(*values);
}
