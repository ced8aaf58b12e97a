"""The pictures of the benchmark: which there are, and that they show what is in the rows."""

import pytest
from fusedrnn.benchmarks import plot
from fusedrnn.benchmarks.contender import BASELINE, OURS
from fusedrnn.benchmarks.results import Row

FACTS = {"cpu": "a processor", "threads": "2", "torch": "2.13"}


def rows(*, contender=OURS + "cpu", ratio=2.0, status="ok", mode="train", **sizes):
    sizes = {"T": 10, "B": 1, "I": 4, "H": 4, "L": 1, "D": 1, "dtype": "float32", "variant": "plain", **sizes}
    time = None if status != "ok" else 1.0
    times = {"p20_ms": time, "median_ms": time, "p80_ms": time}
    return Row("s", contender, status, case=str(sizes), mode=mode, ratio=ratio, **sizes, **times)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by the name of their file."""
    saved = {}
    save = plot._save

    def keep(figure, path):
        saved[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(plot, "_save", keep)
    return saved


def test_heat_map_shows_every_cell_also_those_that_lose_or_failed(figures, tmp_path):
    made = [
        rows(B=1, H=4, ratio=3.0),
        rows(B=1, H=8, ratio=0.5),
        rows(B=2, H=4, ratio=None, status="wrong"),
        rows(B=2, H=8, ratio=None, status="out of memory"),
    ]
    paths = plot.draw(made, FACTS, tmp_path)
    assert tmp_path / "ratio_fusedrnn_cpu_train.png" in paths
    figure = figures["ratio_fusedrnn_cpu_train.png"]
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["3.00x", "0.50x", "wrong", "out of\nmemory"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8"]
    assert "float32, T 10" in axes.get_title()
    assert "a processor, 2 threads" in figure.get_suptitle()
    assert (tmp_path / "ratio_fusedrnn_cpu_train.png").stat().st_size > 5_000


def test_heat_maps_are_drawn_for_every_backend_and_mode(tmp_path):
    pairs = [(name, mode) for name in ("cpu", "cuda") for mode in ("infer", "train")]
    made = [rows(contender=OURS + name, mode=mode, H=H) for name, mode in pairs for H in (4, 8)]
    names = {path.name for path in plot.draw(made, FACTS, tmp_path)}
    assert {f"ratio_fusedrnn_{name}_{mode}.png" for name, mode in pairs} <= names


def test_lines_are_drawn_where_only_one_size_changes(figures, tmp_path):
    made = [rows(contender=contender, T=T) for contender in (BASELINE, OURS + "cpu") for T in (40, 10, 20)]
    names = {path.name for path in plot.draw(made, FACTS, tmp_path)}
    assert names == {"time_T_train.png"}, "there is one H and one B"
    axes = figures["time_T_train.png"].axes[0]
    assert [line.get_label() for line in axes.get_lines()] == [BASELINE, OURS + "cpu"]
    assert list(axes.get_lines()[0].get_xdata()) == [10, 20, 40]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20", "40"]


def test_what_is_not_comparable_is_not_drawn_together(tmp_path):
    made = [rows(T=10), rows(T=20, variant="packed"), rows(T=40, L=2), rows(T=80, dtype="bfloat16"), rows(T=160, B=2)]
    assert plot.draw(made, FACTS, tmp_path) == []


def test_losses_are_drawn_for_every_model(figures, tmp_path):
    lines = ["model,contender,step,loss"]
    lines += [f"{m},{c},{k},{1 / k}" for m in "pq" for c in ("float64", BASELINE, OURS + "cpu") for k in (1, 2, 3)]
    (tmp_path / "losses.csv").write_text("\n".join(lines) + "\n")
    assert plot.draw_losses(tmp_path / "losses.csv") == tmp_path / "losses.png"
    axes = figures["losses.png"].axes
    assert [panel.get_title() for panel in axes] == ["p", "q"]
    assert all(len(panel.get_lines()) == 3 for panel in axes)
