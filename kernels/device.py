"""The inputs of the planners: the GPU and the problem. Pure data: no Triton, no torch, no GPU.

Devices for tests and the ahead-of-time compiler are listed here; at run time the figures come from the driver. Times
are in microseconds, sizes in bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Device(NamedTuple):
    """The properties of a GPU that the cost models use."""

    name: str
    capability: int  # 90 for sm_90
    multiprocessors: int
    shared: int  # maximum bytes of one block
    clock: float  # GHz
    l2: float  # bytes per microsecond, all SMs together
    grid_barrier: float  # microseconds of a grid barrier of a Triton launch
    measured: bool = False  # whether l2 and grid_barrier were measured on this device


# L2 bandwidth and barrier time are estimates: a round trip through L2 for the arrival, another for the poll.
A100 = Device("NVIDIA A100-SXM4-80GB", 80, 108, 166_912, 1.41, 4.0e6, 1.6)
H100 = Device("NVIDIA H100 80GB HBM3", 90, 132, 232_448, 1.755, 5.5e6, 1.3)
H200 = Device("NVIDIA H200", 90, 132, 232_448, 1.785, 5.5e6, 1.3)
RTX4090 = Device("NVIDIA GeForce RTX 4090", 89, 128, 101_376, 2.52, 5.0e6, 1.2)
B200 = Device("NVIDIA B200", 100, 148, 232_448, 1.85, 7.0e6, 1.4)
DEVICES = (A100, H100, H200, RTX4090, B200)


def device_of(properties: Any) -> Device:
    """The device of torch.cuda.get_device_properties; values that are absent or 0 come from the nearest one above."""
    capability = 10 * properties.major + properties.minor
    known = next((d for d in DEVICES if d.name == properties.name), None)
    like = known or most_alike(capability)
    return Device(
        properties.name,
        capability,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 0) or like.shared,
        (getattr(properties, "clock_rate", 0) or like.clock * 1e6) / 1e6,
        like.l2,
        like.grid_barrier,
        like.measured and known is not None,
    )


def most_alike(capability: int) -> Device:
    """The device above with the nearest compute capability."""
    return min(DEVICES, key=lambda d: abs(d.capability - capability))


class Shape(NamedTuple):
    """One launch: the sizes of a layer, and the dtype and precision of its kernel."""

    T: int
    B: int
    I: int
    H: int
    P: int  # H without a projection
    D: int
    itemsize: int  # 2, 4 or 8
    precision: str  # of float32: "ieee", "tf32" or "tf32x3"; ignored for other dtypes
    ragged: bool = False  # with lengths or resets
    cell: str = "lstm"

    @property
    def projected(self) -> bool:
        return self.P != self.H


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()
