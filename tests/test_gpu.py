"""What only a GPU can show of the GPU backends: streams, graphs, sizes that nothing else has the time or memory for."""

import shutil
import subprocess
import sys

import pytest
import torch

import fusedrnn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE, BF16 = "cuda", torch.bfloat16


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = fusedrnn.backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(backend):
    """Tensors on a device that is not the current one."""
    lstm, x = fusedrnn.LSTM(16, 300), torch.randn(9, 5, 16)
    with fusedrnn.use_backend(backend), torch.no_grad():
        first, second = (lstm.to(f"cuda:{k}")(x.to(f"cuda:{k}"))[0] for k in (0, 1))
    assert second.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(first.cpu(), second.cpu())


def test_many_time_steps(backend):
    """T above 65535: in one launch, equal to two launches with the state passed on."""
    lstm, x = fusedrnn.LSTM(2, 20, device=DEVICE), torch.randn(70_000, 3, 2, device=DEVICE)
    with fusedrnn.use_backend(backend), torch.no_grad():
        y, (hn, cn) = lstm(x)
        _, state = lstm(x[:35_000])
        later, (hn2, cn2) = lstm(x[35_000:], state)
    assert torch.equal(y[35_000:], later)
    assert torch.equal(hn, hn2)
    torch.testing.assert_close(cn, cn2)


def test_more_than_2_to_the_31_elements(backend):
    """T * B * 4H above 2^31: the last steps are those of a short run that starts from the state before them."""
    T, B, H = 4200, 512, 256
    lstm = fusedrnn.LSTM(8, H, device=DEVICE, dtype=BF16)
    x = torch.randn(T, B, 8, device=DEVICE, dtype=BF16)
    assert T * B * 4 * H > 2**31
    with fusedrnn.use_backend(backend):
        y, _ = lstm(x)
        with torch.no_grad():
            _, state = lstm(x[: T - 5])
            later, _ = lstm(x[T - 5 :], state)
        torch.testing.assert_close(y[T - 5 :].detach(), later)
        grads = torch.autograd.grad(y.float().sum(), lstm.weight_hh_l0)
    assert grads[0].isfinite().all()


@pytest.mark.parametrize("H", [64, 300])
def test_cuda_graph_with_changed_inputs(backend, H):
    """Forward and backward with lengths and resets are captured, and replayed on other values."""
    lstm = fusedrnn.LSTM(16, H, bidirectional=True, device=DEVICE)
    x, dy = torch.randn(9, 5, 16, device=DEVICE), torch.randn(9, 5, 2 * H, device=DEVICE)
    x.requires_grad_()
    lengths, reset = torch.tensor([9, 1, 0, 4, 7], device=DEVICE), torch.rand(9, 5, device=DEVICE) < 0.2

    def work():
        y, _ = lstm(x, lengths=lengths, reset=reset)
        return y, *torch.autograd.grad(y, [x, *lstm.parameters()], dy)

    with fusedrnn.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            lengths.copy_(torch.tensor([3, 9, 2, 0, 9]))
            reset.copy_(torch.rand(9, 5, device=DEVICE) < 0.2)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, work(), strict=True):
            assert torch.equal(a, b)


def test_another_stream(backend):
    lstm, x = fusedrnn.LSTM(16, 300, device=DEVICE), torch.randn(50, 5, 16, device=DEVICE)
    with fusedrnn.use_backend(backend), torch.no_grad():
        expected, _ = lstm(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y, _ = lstm(x)
        side.synchronize()
    assert torch.equal(y, expected)


SMALL = """
import sys
import torch, fusedrnn
from fusedrnn import testing
from fusedrnn.testing import Case
with fusedrnn.use_backend(sys.argv[1]):
    for H in (30, 160):
        case = Case(4, 5, 7, H, bidirectional=True, lengths=True, reset=True, states=True)
        testing.evaluate(testing.call, fusedrnn.LSTM, case, "cuda")
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(backend, tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL, backend]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
