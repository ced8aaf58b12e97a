"""How the programs of a group meet: they share a layer's units, and each step needs what all of them have published.

A counter in global memory, one for each group, only ever grows: a program adds 1 when it has published, and waits until
the counter shows that all have. The launch is cooperative, so all of them run at the same time; the counter is zero
when it begins. 2^31 is not a limit: what is compared is the difference, which never exceeds the number of programs.

`MEET` is off where there is nobody to meet, and under Triton's interpreter, which runs one program after another: there
a launch covers one phase of one step (see `launch.py`).
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter, MEET: tl.constexpr):
    """Tells the group that everything this program has stored so far may be read."""
    if MEET:
        tl.debug_barrier()  # the stores of every thread, before the one thread that announces them
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target, MEET: tl.constexpr):
    """Returns when `target` arrivals have been counted; what those programs had stored can then be read."""
    if MEET:
        # One thread looks and acquires, and the barrier hands on to the others what it has seen. If every warp looked,
        # each would empty the L1, and all would queue for one line.
        thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        if thread == 0:
            while _seen(counter) - target < 0:
                pass
    tl.debug_barrier()  # also for the stores of this program's other threads


@triton.jit
def _seen(counter):
    # An atomic operation would queue up behind the arrivals.
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1
    )
