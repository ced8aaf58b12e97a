"""bench --busy: a process that computes in its own rounds only and never stays, and what is made of the times.

None of this depends on how long anything takes: what the process does is read from the state that the system gives it.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
from fusedrnn.benchmarks import busy, ceilings, command, memory, results, run, timing
from fusedrnn.benchmarks.contender import BASELINE, OURS
from fusedrnn.benchmarks.results import Row, Writer
from fusedrnn.benchmarks.timing import Lane, take_turns

from fusedrnn import cli

SMALL = ["--shape", "3,2,4,5", "--rounds", "2", "--time-budget", "0", "--backend", "reference", "--baseline", BASELINE]
FACTS = {"cpu": "one", "gpu": "", "threads": "2", "torch": "2.13"}
PATIENCE = 60  # seconds, for what takes none

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system binds a process to a core")


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """What is measured here does not matter, and the memory of this process is that of all tests."""
    monkeypatch.setattr(memory, "settle", lambda freed: "")
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)
    monkeypatch.setattr(timing, "REST", 0.0)
    monkeypatch.setattr(ceilings, "_SAMPLE", 1e-4)


@pytest.fixture
def started(monkeypatch):
    """The busy processes, as they are started."""
    found = []

    class Popen(subprocess.Popen):
        def __init__(self, command, *args, **kwargs):
            super().__init__(command, *args, **kwargs)
            if busy.__file__ in command:
                found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    return found


@pytest.fixture
def two_cores(monkeypatch):
    """As far as the command can tell; the process needs only one."""
    monkeypatch.setattr(busy, "unavailable", lambda: None)


def state(pid):
    """R: it computes or would like to; S: it waits; None: it is gone, or nothing is left but its status."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if letter in "ZX" else letter


def becomes(pid, expected):
    """Whether a process gets into a state, however busy the machine is."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if state(pid) == expected:
            return True
        time.sleep(0.001)
    return False


def bench(*arguments):
    return cli.main(["bench", "--device", "cpu", *map(str, arguments)])


def rows_of(folder):
    return results.read(folder / "results.csv")[0]


# ------------------------------------------------------------------------------------------------ the process


@linux
def test_it_computes_in_its_context_only_and_on_one_core(started):
    with busy.process() as computing:
        (it,) = started
        assert os.sched_getaffinity(it.pid) == {min(os.sched_getaffinity(0))}
        for _ in range(3):
            assert becomes(it.pid, "S")
            with computing():
                assert becomes(it.pid, "R")
                assert it.poll() is None
    assert state(it.pid) is None


@linux
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["computing", "waiting"])
def test_it_is_gone_after_an_error(started, error, when):
    with pytest.raises(error), busy.process() as computing, computing() if when == "computing" else nullcontext():
        raise error
    (it,) = started
    assert it.returncode is not None, "it was waited for"
    assert state(it.pid) is None


@linux
@pytest.mark.parametrize("when", ["computing", "waiting"])
def test_it_ends_when_the_benchmark_is_killed(when):
    code = f"""
import contextlib, runpy, subprocess, time
start, pids = subprocess.Popen, []
subprocess.Popen = lambda *args, **kwargs: [it := start(*args, **kwargs), pids.append(it.pid)][0]
with runpy.run_path({busy.__file__!r})["process"]() as computing:
    with computing():
        pass
    with computing() if {when == "computing"} else contextlib.nullcontext():
        print(pids[0], flush=True)
        time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as benchmark:
        pid = int(benchmark.stdout.readline())
        assert becomes(pid, "R" if when == "computing" else "S")
        benchmark.kill()
    assert becomes(pid, None)


@linux
def test_ctrl_c_is_for_the_benchmark(started):
    with busy.process() as computing:
        (it,) = started
        with computing():
            it.send_signal(signal.SIGINT)
        with computing():
            assert it.poll() is None


@linux
def test_nothing_is_measured_without_it(started):
    with busy.process() as computing:
        started[0].kill()
        started[0].wait()
        with pytest.raises(OSError), computing():
            pytest.fail("this would be measured")


# ------------------------------------------------------------------------------------------------ rounds and rows


class FakeClock(timing.CpuClock):
    """A clock that only work moves on: each call takes a second, and three beside the busy process."""

    def __init__(self):
        self.time, self.log, self.slow = 0.0, "", False

    def now(self):
        return self.time

    def rest(self):
        self.log += "."

    def work(self, name):
        def work():
            self.log += name
            self.time += 3.0 if self.slow else 1.0

        return work

    @contextmanager
    def busy(self):
        self.log, self.slow = self.log + "[", True
        yield
        self.log, self.slow = self.log + "]", False


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 1.0)
    return FakeClock()


def test_every_round_has_a_second_one_beside_the_busy_process(fake):
    lanes = [Lane(fake.work(name)) for name in "ab"]
    take_turns(lanes, fake, rounds=2, budget=1e9, busy=fake.busy)
    assert fake.log == "aabb" + ".a.b[.a.b]" + ".b.a[.b.a]"
    for lane in lanes:
        assert (lane.seconds, lane.busy_seconds) == ([1, 1], [3, 3])


def test_both_rounds_are_within_the_budget(fake):
    lane = Lane(fake.work("a"))
    take_turns([lane], fake, rounds=100, budget=27, busy=fake.busy)
    assert len(lane.seconds) == len(lane.busy_seconds) == 7, "the eighth would begin after 28 seconds"


def test_who_fails_beside_the_busy_process_is_out(fake):
    def work():
        if fake.slow:
            raise MemoryError("all gone")

    bad, good = Lane(work), Lane(fake.work("a"))
    take_turns([bad, good], fake, rounds=3, budget=1e9, busy=fake.busy)
    assert isinstance(bad.error, MemoryError)
    assert len(bad.seconds) == 1
    assert len(good.busy_seconds) == 3


def test_a_row_has_the_median_and_the_factor():
    row = Row("s", BASELINE)
    run.fill(row, Lane(print, seconds=[0.001, 0.002, 0.009], busy_seconds=[0.002, 0.009, 0.005]), units=1)
    assert (row.median_ms, row.busy_ms, row.busy_factor) == pytest.approx((2.0, 5.0, 2.5))
    quiet = Row("s", BASELINE)
    run.fill(quiet, Lane(print, seconds=[0.001, 0.002, 0.009]), units=1)
    assert (quiet.median_ms, quiet.busy_ms, quiet.busy_factor) == (2.0, None, None)


# ------------------------------------------------------------------------------------------------ end to end


@linux
def test_it_computes_exactly_while_busy_rounds_are_measured(started, two_cores, monkeypatch, tmp_path):
    """With one call to a sample, calls are samples: what the process does is looked up in each."""
    seen = []

    def sample(self, work, calls):
        work()
        (it,) = started
        expected = "R" if inside else "S"
        seen.append(expected if becomes(it.pid, expected) else "wrong")
        return 1.0

    inside, process = [], busy.process

    @contextmanager
    def watched():
        with process() as computing:

            @contextmanager
            def watched_computing():
                with computing():
                    inside.append(True)
                    yield
                    inside.clear()

            yield watched_computing

    monkeypatch.setattr(timing.CpuClock, "sample", sample)
    monkeypatch.setattr(ceilings.Ceilings, "limit", lambda *_: None)
    monkeypatch.setattr(busy, "process", watched)
    assert bench(*SMALL, "--busy", "--limit", 2, "--out", tmp_path) == 0
    assert "".join(seen) == ("SS" + "SSRR" * 2) * 2, "two contenders are calibrated, then sampled in two rounds of each"
    (it,) = started
    assert state(it.pid) is None


@linux
def test_a_busy_run_end_to_end(started, two_cores, capsys, tmp_path):
    assert bench(*SMALL, "--busy", "--mode", "infer", "--out", tmp_path) == 0
    timed = [row for row in rows_of(tmp_path) if row.status == "ok"]
    assert [row.contender for row in timed] == [BASELINE, OURS + "reference"]
    for row in timed:
        assert row.busy_ms > 0
        assert row.busy_factor == pytest.approx(row.busy_ms / row.median_ms)
    out = capsys.readouterr().out
    assert "busy ms" in out
    assert "with another process busy on one core" in out
    assert '"busy_factor": ' in (tmp_path / "results.json").read_text()
    report = (tmp_path / "report.md").read_text()
    assert "## With another process busy on one core" in report
    (it,) = started
    assert state(it.pid) is None
    assert bench("plot", tmp_path / "results.csv") == 0
    assert (tmp_path / "report.md").read_text() == report


@linux
def test_models_are_measured_beside_it_as_well(started, two_cores, monkeypatch, tmp_path):
    tasks = command.models.tasks
    monkeypatch.setattr(command.models, "tasks", lambda shrink: tasks(16)[2:3])
    assert bench(*SMALL[2:], "--busy", "--suite", "models", "--steps", 2, "--out", tmp_path) == 0
    timed = [row for row in rows_of(tmp_path) if row.status == "ok"]
    assert [row.contender for row in timed] == [BASELINE, OURS + "reference"]
    assert all(row.suite == "models" and row.busy_factor > 0 for row in timed)


@linux
def test_interrupting_leaves_no_process(started, two_cores, monkeypatch, tmp_path):
    states = []

    def interrupted(*arguments):
        with arguments[-1].busy():
            states.append(becomes(started[0].pid, "R"))
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    assert bench(*SMALL, "--busy", "--out", tmp_path) == 130
    assert states == [True]
    assert [state(it.pid) for it in started] == [None]


@linux
def test_without_the_option_there_is_nothing_of_it(started, capsys, tmp_path):
    assert bench(*SMALL, "--mode", "infer", "--out", tmp_path) == 0
    assert started == []
    assert all(row.busy_ms is row.busy_factor is None for row in rows_of(tmp_path))
    assert "busy" not in capsys.readouterr().out
    assert "busy" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("devices", "cores", "message"),
    [
        (["cpu"], {3}, "there is only one core here"),
        (["cpu"], None, "this system has no sched_setaffinity"),
        (["cpu", "cuda"], {0, 1}, "this would run on a GPU"),
    ],
    ids=["one-core", "other-system", "gpu"],
)
def test_where_it_cannot_be_measured_it_says_so(started, capsys, monkeypatch, tmp_path, devices, cores, message):
    monkeypatch.setattr(command.testing, "devices", lambda: devices)
    if cores is None:
        monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", *SMALL, "--busy", "--out", str(tmp_path / "new")])
    assert exit.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "argument --busy: " in error
    assert message in error
    assert started == []
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ files and reports


def row(contender, factor, case="c", status="ok"):
    times = {"p20_ms": 2.0, "median_ms": 2.0, "p80_ms": 2.0}
    return Row(
        "s", contender, status, case=case, mode="infer", **times, busy_ms=factor and 2 * factor, busy_factor=factor
    )


ROWS = [
    row(BASELINE, 1.5),
    row(OURS + "cpu", 2.5),
    row(BASELINE, 3.25, "d"),
    row(OURS + "cpu", 2.75, "d"),
    row(OURS + "cuda", None),
    row(OURS + "reference", 9.0, status="wrong"),
]


def write(path, rows):
    writer = Writer(path, FACTS)
    writer.write(rows)
    writer.close()


def write_old(path, rows):
    """As the version before this one did: its columns ended with `excess`."""
    columns = [field.name for field in fields(Row)]
    columns = [*columns[: columns.index("excess") + 1], *FACTS]
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        lines.writeheader()
        lines.writerows({**vars(row), **FACTS} for row in rows)


def test_the_worst_of_each_contender_and_the_cells_beyond_the_goal():
    assert results.worst_busy(ROWS) == [(BASELINE, 3.25, "d infer", 2), (OURS + "cpu", 2.75, "d infer", 2)]
    assert results.beyond_goal(ROWS) == ["d infer, fusedrnn cpu: 2.75 times the quiet time"], "2.5 is still the goal"
    assert results.beyond_goal(ROWS[:3]) == []


def test_the_report_has_a_section_and_columns(tmp_path):
    def written(rows):
        command.report.write(rows, FACTS, [], tmp_path / "report.md")
        return (tmp_path / "report.md").read_text()

    text = written(ROWS)
    section = text.split("## With another process busy on one core")[1].split("\n## ")[0]
    assert "| nn.LSTM | 3.25 | d infer | 2 |" in section
    assert "| fusedrnn cpu | 2.75 | d infer | 2 |" in section
    assert section.endswith("Cells of fusedrnn beyond 2.5:\n\n- d infer, fusedrnn cpu: 2.75 times the quiet time\n")
    assert "| p80 | busy ms | busy/quiet | ratio |" in text
    assert "| c | infer | fusedrnn cpu | 2 | 2 | 2 | 5 | 2.50 | - |" in text
    assert "| c | infer | fusedrnn cuda | 2 | 2 | 2 | - | - | - |" in text
    assert "beyond 2.5:\n\nNone." in written(ROWS[:3])
    assert "busy" not in written([replace(row, busy_ms=None, busy_factor=None) for row in ROWS])


def test_the_table_has_columns_where_there_are_times():
    heads, first, *_ = results.table(ROWS)
    assert "  p80  busy ms  busy/quiet  ratio  " in heads
    assert "1.50" in first.split()
    assert results.summary(ROWS)[-3:] == [
        "with another process busy on one core, times the quiet time at worst:",
        "  nn.LSTM       3.25 over 2, d infer",
        "  fusedrnn cpu  2.75 over 2, d infer",
    ]
    assert "busy" not in results.table([row(BASELINE, None)])[0]


def test_files_keep_the_columns(tmp_path):
    write(tmp_path / "r.csv", ROWS)
    assert results.read(tmp_path / "r.csv") == (ROWS, FACTS)


def test_older_files_are_read_compared_and_reported(capsys, tmp_path):
    write_old(tmp_path / "old.csv", ROWS)
    write(tmp_path / "new.csv", ROWS)
    rows, facts = results.read(tmp_path / "old.csv")
    assert rows == [replace(row, busy_ms=None, busy_factor=None) for row in ROWS]
    assert facts == FACTS
    for pair in (("old", "new"), ("new", "old")):
        assert cli.main(["bench", "compare", *(str(tmp_path / f"{name}.csv") for name in pair)]) == 0
        assert "5 of 5 rows are the same" in capsys.readouterr().out
    assert cli.main(["bench", "plot", str(tmp_path / "old.csv")]) == 0
    assert "busy" not in (tmp_path / "report.md").read_text()


def test_a_run_in_an_older_file_is_resumed(tmp_path):
    path = tmp_path / "results.csv"
    write_old(path, ROWS)
    with path.open("a") as file:
        file.write("s,nn.LSTM,ok")  # a line that was cut off
    writer = Writer(path, FACTS, append=True)
    writer.write(ROWS[:2])
    writer.close()
    assert rows_of(tmp_path) == [*(replace(row, busy_ms=None, busy_factor=None) for row in ROWS), *ROWS[:2]]
    assert {file.name for file in tmp_path.iterdir()} == {"results.csv"}


@linux
def test_a_quiet_run_is_resumed_with_it(started, two_cores, monkeypatch, tmp_path):
    assert bench(*SMALL, "--limit", 1, "--out", tmp_path) == 0
    assert bench(*SMALL, "--limit", 2, "--busy", "--resume", "--out", tmp_path) == 0
    found = {(row.mode, row.contender): row.busy_factor is not None for row in rows_of(tmp_path) if row.case}
    assert found == {
        (mode, c): mode == "forward" for mode in ("infer", "forward") for c in (BASELINE, OURS + "reference")
    }
    assert [state(it.pid) for it in started] == [None]
