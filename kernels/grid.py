"""Grid barrier of the programs of a group, which share a layer's hidden units and exchange states at each step.

Each group has a monotonic counter in global memory, zero at the launch. A program increments it after its stores, and
waits until all programs of the group have arrived. The launch is cooperative, so all programs are resident. Overflow at
2^31 is harmless: only the difference is compared, which never exceeds the number of programs.

`GRID_SYNC` is false for a group of one program, and under Triton's interpreter, which runs programs sequentially: there
a launch covers one phase of one step (see `launch.py`).
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter, GRID_SYNC: tl.constexpr):
    """Arrive, with release semantics: publishes all stores of this program to the group."""
    if GRID_SYNC:
        tl.debug_barrier()  # the stores of every thread, before the one thread that announces them
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target, GRID_SYNC: tl.constexpr):
    """Wait, with acquire semantics: returns after `target` arrivals, when the stores before them are visible."""
    if GRID_SYNC:
        # One thread polls with acquire; the barrier makes the stores visible to the others. If every warp polled,
        # each would invalidate the L1, and all would contend for one line.
        thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        if thread == 0:
            while _seen(counter) - target < 0:
                pass
    tl.debug_barrier()  # also for the stores of this program's other threads


@triton.jit
def _seen(counter):
    # An atomic read would queue behind the arrivals.
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1
    )
