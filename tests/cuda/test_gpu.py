"""What only a GPU can show, of every backend that has kernels for it: graphs, streams, launches side by side, and sizes
that nothing else has the time or memory for.

Results that are the same to the bit are asked of every backend with kernels, on whatever device it computes; torch's
switch for GEMMs is there without a GPU, too.
"""

import os
import subprocess
import sys
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

import fusedrnn
from fusedrnn import dispatch, gpu, testing

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]
KERNELS = [name for name in fusedrnn.backends() if name not in ("aten", "reference")]


def places():
    """Backends with kernels that are available, each on the device that it computes on."""
    found = []
    for name in KERNELS:
        if dispatch.backends()[name] is None:
            with fusedrnn.use_backend(name):
                for device in testing.devices():
                    if dispatch.supports(name, dispatch.Problem(device, torch.float32, 2, 2, 3, 4, 4, 1)) is None:
                        found.append((name, device))
    return found


PLACES = places()
GPU_BACKENDS = [name for name, device in PLACES if device == "cuda"]


@pytest.fixture(
    params=GPU_BACKENDS or [pytest.param(None, marks=pytest.mark.skip("no backend computes on a GPU here"))]
)
def backend(request):
    """Each backend that computes on a GPU, in use."""
    with fusedrnn.use_backend(request.param):
        yield request.param


@pytest.mark.skipif(not ON_GPU, reason="torch finds no GPU")
def test_the_backends_that_are_expected_here_are_here():
    """FUSEDRNN_EXPECT names them: what is skipped for want of them would not be seen otherwise."""
    expected = [name for name in os.environ.get("FUSEDRNN_EXPECT", "").split(",") if name]
    missing = {name: fusedrnn.backends().get(name, "there is no such backend") for name in expected}
    assert {name: reason for name, reason in missing.items() if name not in GPU_BACKENDS} == {}


def test_two_threads_take_turns_with_the_switch_for_gemms():
    """It is one for all threads: what another has set is neither computed with nor put back."""
    x = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    switch = torch.backends.cuda.matmul
    entered, may_leave, seen, before = Event(), Event(), [], switch.fp32_precision

    def first():
        with gpu._gemms_in("tf32", x):
            entered.set()
            may_leave.wait(60)
            seen.append(switch.fp32_precision)

    def second():
        entered.wait(60)
        with gpu._gemms_in("ieee", x):
            seen.append(switch.fp32_precision)

    threads = [Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    threads[1].join(0.1)
    may_leave.set()
    for thread in threads:
        thread.join(60)
    assert seen == ["tf32", "ieee"]
    assert switch.fp32_precision == before


def layer(H, dtype, **options):
    """A layer on the GPU with input, lengths and resets, and a call of it that returns outputs and all gradients."""
    lstm = fusedrnn.LSTM(16, H, bidirectional=True, device="cuda", dtype=dtype, **options)
    x = torch.randn(9, 5, 16, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(9, 5, 2 * H, device="cuda", dtype=dtype)
    lengths, reset = torch.tensor([9, 1, 0, 4, 7], device="cuda"), torch.rand(9, 5, device="cuda") < 0.2

    def call():
        y, (hn, cn) = lstm(x, lengths=lengths, reset=reset)
        return [y, hn, cn, *torch.autograd.grad(y, [x, *lstm.parameters()], dy)]

    return call, x, lengths, reset


def same(ours, expected):
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [64, 300, 1024])
def test_a_graph_is_replayed_on_other_values(backend, H, dtype):
    """Forward and backward are captured; then input, lengths and resets change, without another capture."""
    call, x, lengths, reset = layer(H, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            lengths.copy_(torch.randint(0, 10, (5,)))
            reset.copy_(torch.rand(9, 5) < 0.2)
        graph.replay()
        torch.cuda.synchronize()
        same(captured, call())


@pytest.mark.parametrize("H", [64, 300, 1024])
def test_work_goes_to_the_current_stream(backend, H):
    call, *_ = layer(H, torch.bfloat16)
    expected = call()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got = call()
    side.synchronize()
    same(got, expected)


def two_streams(name, H):
    """Launches in two streams at the same time, with the results that they have one after the other."""
    with fusedrnn.use_backend(name):
        calls = [layer(H, torch.bfloat16)[0] for _ in range(2)]
        expected = [call() for call in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        for _ in range(20):
            got = []
            for call, stream in zip(calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    got.append(call())
            torch.cuda.synchronize()
            for ours, theirs in zip(got, expected, strict=True):
                same(ours, theirs)


def test_a_process_that_hangs_is_ended():
    """What `in_a_process` is for: a wait inside of a C call, which no signal of Python's interrupts."""
    with pytest.raises(subprocess.TimeoutExpired):
        in_a_process("threading.Lock().acquire() and threading.Event().wait()", seconds=2)
    in_a_process("assert two_streams", seconds=60)


def in_a_process(statement, seconds):
    """Runs a statement in this module, in a process of its own, which is ended after so many seconds."""
    code = f"import runpy, threading; globals().update(runpy.run_path({__file__!r})); {statement}"
    subprocess.run([sys.executable, "-c", code], timeout=seconds, check=True)


@pytest.mark.parametrize("H", [300, 1024])
def test_two_streams_at_the_same_time(backend, H):
    """Blocks that wait for one another have to be on the device together, whoever else is. Were two such launches to
    hold a part of it each, neither would ever end: in a process of its own, so that this is a failure and not a hang.
    """
    in_a_process(f"two_streams({backend!r}, {H})", seconds=90)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [30, 256])
@pytest.mark.parametrize(("name", "device"), PLACES or [("", "")], ids=lambda part: part or "none")
def test_the_same_bits_every_time(name, device, H, dtype):
    """Outputs and gradients, dropout between the layers included."""
    if not name:
        pytest.skip("no backend with kernels is available")
    case = testing.Case(6, 5, 7, H, dtype, layers=2, bidirectional=True, lengths=True, reset=True)

    def dropping(*arguments, **options):
        return fusedrnn.LSTM(*arguments, **options, dropout=0.5)

    def compute():
        torch.manual_seed(3)
        return testing.evaluate(testing.call, dropping, case, device)

    with fusedrnn.use_backend(name):
        first = compute()
        for _ in range(4):
            again = compute()
            assert all(torch.equal(again[key], value) for key, value in first.items())
        with torch.no_grad():
            torch.manual_seed(4)
            module, inputs = case.module(dropping, device), case.inputs(device)
            assert not torch.equal(testing.call(module, case, inputs)["y"], first["y"]), "nothing was dropped"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(backend):
    """Tensors on a device that is not the current one."""
    lstm, x = fusedrnn.LSTM(16, 300), torch.randn(9, 5, 16)
    with torch.no_grad():
        first, second = (lstm.to(f"cuda:{k}")(x.to(f"cuda:{k}"))[0] for k in (0, 1))
    assert second.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(first.cpu(), second.cpu())


def test_many_time_steps(backend):
    """T above 65535: in one launch, equal to two launches with the state passed on."""
    lstm, x = fusedrnn.LSTM(2, 20, device="cuda"), torch.randn(70_000, 3, 2, device="cuda")
    with torch.no_grad():
        y, (hn, cn) = lstm(x)
        _, state = lstm(x[:35_000])
        later, (hn2, cn2) = lstm(x[35_000:], state)
    assert torch.equal(y[35_000:], later)
    assert torch.equal(hn, hn2)
    torch.testing.assert_close(cn, cn2)


def test_more_than_2_to_the_31_elements(backend):
    """T * B * 4H above 2^31: the last steps are those of a short run that starts from the state before them."""
    T, B, H = 4200, 512, 256
    lstm = fusedrnn.LSTM(8, H, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, B, 8, device="cuda", dtype=torch.bfloat16)
    assert T * B * 4 * H > 2**31
    y, _ = lstm(x)
    with torch.no_grad():
        _, state = lstm(x[: T - 5])
        later, _ = lstm(x[T - 5 :], state)
    torch.testing.assert_close(y[T - 5 :].detach(), later)
    grads = torch.autograd.grad(y.float().sum(), lstm.weight_hh_l0)
    assert grads[0].isfinite().all()
