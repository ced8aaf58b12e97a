"""Measuring in a worker process with a time limit, and what becomes of one that hangs or crashes."""

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
from .profile import BASELINE, Key, Measurement, Profile

WORKER = (sys.executable, "-m", "fusedrnn.tuning.worker")


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    rounds: int = 12  # samples of each backend, at most
    budget: float = 1.0  # seconds for a key: when they are over, five rounds have to do
    limit: float = 180.0  # seconds that checking and timing one key may take: what takes longer hangs
    command: Sequence[str] = WORKER


class LostError(Exception):
    """The worker is gone; `backend` was at work, "" if none was."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(reason)
        self.backend = backend


class Worker:
    """A process that answers one question at a time."""

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
            start_new_session=True,  # Ctrl-C is for the process that can say what was measured
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
            pass  # it is gone, and `ask` will see that there is no answer

    def ask(self, job: dict[str, Any], limit: float) -> Measurement:
        """The answer to a job.

        Raises:
            LostError: there was none within `limit` seconds, or the process ended.
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
        except subprocess.TimeoutExpired:  # it answers no more, and goes on
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
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass  # what was not yet sent to a process that is gone
        self._state.unlink(missing_ok=True)


def measure(
    keys: Iterable[Key],
    device: str,
    backends: Sequence[str],
    keep: Callable[[Measurement], None],
    settings: Settings | None = None,
    until: float | None = None,
) -> None:
    """Verifies and measures each key, in processes of their own.

    A backend that hangs, crashes, raises or is wrong is left out for the rest of its cell and dtype; `keep` is told.

    Args:
        keys: what to measure, in this order.
        device: "cpu" or "cuda".
        backends: names of backends with kernels, to be measured against torch's own layer.
        keep: is given each measurement as it comes.
        settings: how.
        until: a time of `time.monotonic()` after which none is begun.
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
                    if error.backend != BASELINE:  # it did not even begin
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
    """A profile in a file that grows with each measurement, so that nothing is lost."""

    def __init__(self, device: str, path: Path | None = None) -> None:
        """Goes on with the file, if it is of the same machine, number of threads, fusedrnn and torch; else anew.

        Args:
            device: "cpu" or "cuda".
            path: by default the one in the user's cache folder that calls then find.
        """
        self.made: list[Measurement] = []  # what came since
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
        """Adds a measurement, unless nothing came of it, and writes the file."""
        if measurement.ms or measurement.failures:
            self.made.append(measurement)
            self.profile = self.profile.with_added([measurement])
            profile.save(self.profile, self.path)
