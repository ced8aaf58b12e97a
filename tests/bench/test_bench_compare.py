"""bench compare: what counts as a change, what as noise, and what as a regression."""

import pytest
from fusedrnn.benchmarks.compare import compare
from fusedrnn.benchmarks.contender import BASELINE, OURS
from fusedrnn.benchmarks.results import Row, Writer

from fusedrnn import cli

FACTS = {"cpu": "one", "gpu": "", "threads": "2", "torch": "2.13"}


def row(p20, median, p80, contender=OURS + "cpu", case="T1", status="ok"):
    return Row("cpu", contender, status, case=case, mode="infer", p20_ms=p20, median_ms=median, p80_ms=p80)


def lost(status, contender=OURS + "cpu"):
    return row(None, None, None, contender, status=status)


def words(before, after, threshold=0.05, relative=False):
    return [change.word for change in compare(before, after, threshold, relative)]


OLD = row(0.9, 1.0, 1.1)


@pytest.mark.parametrize(
    ("new", "word"),
    [
        (row(0.9, 1.0, 1.1), "same"),
        (row(1.2, 1.3, 1.4), "slower"),
        (row(0.6, 0.7, 0.8), "faster"),
        (row(1.05, 1.4, 1.9), "same"),  # the median is far off, but the two overlap
        (row(0.2, 0.6, 0.95), "same"),
        (lost("wrong"), "lost"),
        (lost("out of memory"), "lost"),
    ],
    ids=["same", "slower", "faster", "noisy-slower", "noisy-faster", "wrong", "memory"],
)
def test_a_change_is_more_than_the_noise(new, word):
    assert words([OLD], [new]) == [word]


def test_a_change_is_more_than_the_threshold():
    before, after = [row(0.999, 1.0, 1.001)], [row(1.039, 1.04, 1.041)]
    assert words(before, after) == ["same"]
    assert words(before, after, threshold=0.03) == ["slower"]
    assert words(after, before) == ["same"]
    assert words(after, before, threshold=0.03) == ["faster"]


def test_rows_of_one_file_only_are_told():
    other = row(1, 1, 1, case="T2")
    assert words([OLD], [other]) == ["only in A", "only in B"]
    assert words([lost("failed")], [OLD]) == ["gained"]


def test_the_same_case_on_another_contender_is_another_row():
    assert words([OLD], [row(5, 5, 5, contender=OURS + "cuda")]) == ["only in A", "only in B"]


def test_relative_to_nn_lstm_a_slower_machine_is_no_change():
    def baseline(p20, median, p80):
        return row(p20, median, p80, BASELINE)

    before, slower = [baseline(1.9, 2.0, 2.1), OLD], [baseline(3.8, 4.0, 4.2), row(1.8, 2.0, 2.2)]
    assert words(before, slower) == ["slower", "slower"]
    assert words(before, slower, relative=True) == ["same", "same"]
    regressed = [baseline(3.8, 4.0, 4.2), row(3.6, 4.0, 4.4)]
    assert words(before, regressed, relative=True) == ["same", "slower"]
    shaky = [baseline(0.5, 4.0, 9.0), row(3.6, 4.0, 4.4)]
    assert words(before, shaky, relative=True) == ["same", "same"], "the noise of nn.LSTM is noise of the quotient"


@pytest.fixture
def files(tmp_path):
    def write(before, after, facts=FACTS):
        paths = []
        for name, rows, its_facts in (("a", before, FACTS), ("b", after, facts)):
            writer = Writer(tmp_path / f"{name}.csv", its_facts)
            writer.write(rows)
            writer.close()
            paths.append(str(tmp_path / f"{name}.csv"))
        return paths

    return write


@pytest.mark.parametrize(
    ("new", "status", "line"),
    [
        (row(0.9, 1.0, 1.1), 0, "1 of 1 rows are the same within noise; 0 regressions"),
        (row(0.6, 0.7, 0.8), 0, "faster     T1 infer, fusedrnn cpu: 1 ms -> 0.7 ms (0.70 of the time)"),
        (row(1.2, 1.3, 1.4), 1, "slower     T1 infer, fusedrnn cpu: 1 ms -> 1.3 ms (1.30 of the time)"),
        (row(1.05, 1.4, 1.9), 0, "1 of 1 rows are the same"),
        (lost("wrong"), 1, "lost       T1 infer, fusedrnn cpu: 1 ms -> - wrong"),
    ],
    ids=["same", "faster", "slower", "noise", "wrong"],
)
def test_status_tells_a_regression(capsys, files, new, status, line):
    assert cli.main(["bench", "compare", *files([OLD], [new])]) == status
    assert line in capsys.readouterr().out


def test_a_baseline_that_became_slower_is_shown_and_no_regression(capsys, files):
    paths = files([row(1, 1, 1, BASELINE)], [row(2, 2, 2, BASELINE)])
    assert cli.main(["bench", "compare", *paths]) == 0
    assert "slower     T1 infer, nn.LSTM" in capsys.readouterr().out


def test_threshold_and_relative_on_the_command_line(files):
    paths = files([row(1, 1, 1, BASELINE), row(1, 1, 1)], [row(2, 2, 2, BASELINE), row(2, 2, 2)])
    assert cli.main(["bench", "compare", *paths]) == 1
    assert cli.main(["bench", "compare", *paths, "--threshold", "1.5"]) == 0
    assert cli.main(["bench", "compare", *paths, "--relative"]) == 0


def test_another_machine_is_pointed_out(capsys, files):
    cli.main(["bench", "compare", *files([OLD], [OLD], {**FACTS, "threads": "8"})])
    assert "note: threads is '2' in A and '8' in B" in capsys.readouterr().out


def test_a_file_of_something_else(capsys, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "compare", str(path), str(path)])
    assert exit.value.code == 2
    assert "is not a file of results: it lacks the columns" in capsys.readouterr().err
