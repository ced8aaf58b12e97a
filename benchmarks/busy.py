"""Another process that computes all the time on one core, for how fast a contender is when the machine is not its own.

The process is this file. It waits for a byte, computes until the next one, and so on; it ends where there are no more,
so that it never outlives whoever started it, however that one ended.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


def unavailable() -> str | None:
    """Why there is nothing to be measured beside a busy process here, or None."""
    if not hasattr(os, "sched_setaffinity"):
        return "this system has no sched_setaffinity, which binds a process to a core"
    if len(os.sched_getaffinity(0)) < 2:
        return "there is only one core here, and it leaves none free"
    return None


@contextmanager
def process() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Starts it, bound to the first core that may be used here; it computes inside of the context that is yielded.

    Raises:
        OSError: it cannot be started or bound, or another process ended it.
    """
    command = [sys.executable, "-IS", __file__]
    with subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        commands, answers = started.stdin, started.stdout

        def turn() -> None:
            """From waiting to computing, or back, and returns when it has."""
            commands.write(b".")
            if not answers.read(1):
                raise ChildProcessError("the busy process has ended")

        @contextmanager
        def computing() -> Iterator[None]:
            turn()
            try:
                yield
            finally:
                turn()

        try:
            os.sched_setaffinity(started.pid, {min(os.sched_getaffinity(0))})
            yield computing
        finally:
            started.kill()


def _run() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark, which then ends this process
    computing = False
    while os.read(0, 1):
        os.write(1, b".")
        computing = not computing
        while computing and not select.select([0], [], [], 0)[0]:
            sum(range(10_000))


if __name__ == "__main__":
    _run()
