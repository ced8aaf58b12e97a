"""Measures in a worker process with a timeout, and handles hangs and crashes of it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..benchmarks import provenance
from . import machine, profile
from .profile import Key, Measurement, Profile

WORKER = (sys.executable, "-m", "fusedrnn.tuning.worker")


@dataclass(frozen=True)
class Settings:
    """Sampling parameters."""

    rounds: int = 12  # maximum samples of each backend
    budget: float = 1.0  # seconds for a key: after these, five rounds suffice
    limit: float = 180.0  # timeout in seconds for checking and timing one key
    command: Sequence[str] = WORKER


class LostError(Exception):
    """The worker crashed or hung while running `backend`, "" if none."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(reason)
        self.backend = backend


class Worker:
    """A worker process that runs one job at a time."""

    def __init__(self, setup: dict[str, Any], command: Sequence[str]) -> None:
        handle, name = tempfile.mkstemp(prefix="fusedrnn-tune-")
        os.close(handle)
        self._state = Path(name)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        environment = {k: v for k, v in os.environ.items() if k != "FUSEDRNN_BACKEND"}
        environment |= {profile.PROFILE_VARIABLE: "none", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [*command, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C goes to the parent only
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._send(setup)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _send(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has exited; `ask` handles the missing answer

    def ask(self, job: dict[str, Any], limit: float) -> Measurement:
        """The answer to a job.

        Raises:
            LostError: no answer within `limit` seconds, or the process ended.
        """
        self._send(job)
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            at_work = self._at_work()
            self.close()
            raise LostError(at_work, f"hung: no answer within {limit:g} seconds") from None
        if line:
            return profile.from_line(json.loads(line))
        at_work = self._at_work()
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:  # it closed its output but still runs
            self._process.kill()
            code = self._process.wait()
        told = self._last_words()
        self.close()
        ended = f"signal {-code}" if code < 0 else f"status {code}"
        raise LostError(at_work, f"crashed: the process ended with {ended}{f' ({told})' if told else ''}")

    def _at_work(self) -> str:
        return self._state.read_text().strip()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass  # unsent data for an ended process
        self._state.unlink(missing_ok=True)


def measure(
    keys: Iterable[Key],
    device: str,
    backends: Sequence[str],
    keep: Callable[[Measurement], None],
    settings: Settings | None = None,
    until: float | None = None,
) -> None:
    """Verifies and measures each key in worker processes.

    A backend that hangs, crashes, raises or is wrong is skipped for the rest of its cell and dtype; the failure is part
    of the measurement.

    Args:
        keys: what to measure, in this order.
        device: "cpu" or "cuda".
        backends: names of backends with kernels, to be compared with the baseline.
        keep: called with each measurement.
        settings: sampling parameters.
        until: a time of `time.monotonic()` after which no measurement starts.
    """
    how = settings or Settings()
    setup = {
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "rounds": how.rounds,
        "budget": how.budget,
    }
    bad: dict[tuple[str, str], set[str]] = {}  # cell and dtype -> backends
    worker: Worker | None = None
    try:
        for key in keys:
            if until is not None and time.monotonic() > until:
                break
            lost: dict[str, str] = {}
            while True:
                about = key.cell, key.dtype
                trusted = [name for name in backends if name not in bad.setdefault(about, set())]
                if not trusted:
                    if lost:
                        keep(Measurement(key, failures=lost))
                    break
                worker = worker or Worker(setup, how.command)
                job = {"key": profile.to_line(Measurement(key)), "backends": trusted}
                try:
                    answer = worker.ask(job, how.limit)
                except LostError as error:
                    worker = None
                    if error.backend in trusted:
                        lost[error.backend] = str(error)
                        bad[about].add(error.backend)
                        continue
                    if error.backend != profile.baseline(key.cell):  # "" if it crashed before it started
                        raise RuntimeError(f"the process that measures cannot work: {error}") from None
                    if lost:
                        keep(Measurement(key, failures=lost))
                    break
                answer = Measurement(key, answer.ms, answer.ratios, answer.failures | lost, answer.samples)
                bad[about] |= answer.failures.keys()
                keep(answer)
                if device != "cpu" and answer.failures:
                    worker.close()
                    worker = None
                break
    finally:
        if worker is not None:
            worker.close()


def new_profile(device: str) -> Profile:
    """An empty profile of this machine and torch's number of threads."""
    facts = {name: value for name, value in provenance.collect(device).items() if value}
    return Profile(machine.here(device), torch.get_num_threads() if device == "cpu" else None, facts)


class Keeper:
    """A profile in a file that is rewritten after each measurement."""

    def __init__(self, device: str, path: Path | None = None) -> None:
        """Continues the file if machine, number of threads, fusedrnn and torch are the same; otherwise starts anew.

        Args:
            device: "cpu" or "cuda".
            path: by default the file in the user's cache folder.
        """
        self.made: list[Measurement] = []  # the measurements of this run
        self.profile = new_profile(device)
        name = profile.file_name(self.profile.machine, self.profile.threads)
        self.path = profile.cache_folder() / name if path is None else path
        try:
            before = profile.load(self.path)
        except profile.ProfileError:
            return
        alike = all(before.provenance.get(v) == self.profile.provenance.get(v) for v in ("fusedrnn", "torch"))
        if alike and (before.machine, before.threads) == (self.profile.machine, self.profile.threads):
            self.profile = self.profile.with_added(before.measurements.values())

    def keep(self, measurement: Measurement) -> None:
        """Adds a measurement, unless it is empty, and writes the file."""
        if measurement.ms or measurement.failures:
            self.made.append(measurement)
            self.profile = self.profile.with_added([measurement])
            profile.save(self.profile, self.path)
