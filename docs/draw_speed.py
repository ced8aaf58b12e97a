"""Draws images/speed.svg, the chart of the README, from committed results: `make chart`.

The numbers are written into the picture's description as well; a test holds them to the files.
"""

import csv
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-amx-2-cores"
IMAGE = Path(__file__).with_name("images") / "speed.svg"
FOLDERS = {"": "float32", "bfloat16": "bfloat16"}  # folder -> what the legend says
# T, B, H, L, D, variant, and what the axis says; I = H, but for the one of 200
SHAPES = [
    (1, 1, 128, 1, 1, "plain", "one step, B 1, H 128"),
    (100, 1, 128, 1, 1, "plain", "T 100, B 1, H 128"),
    (100, 1, 512, 1, 1, "plain", "T 100, B 1, H 512"),
    (64, 8, 512, 1, 1, "plain", "T 64, B 8, H 512"),
    (64, 16, 256, 1, 1, "plain", "T 64, B 16, H 256"),
    (64, 32, 512, 1, 1, "plain", "T 64, B 32, H 512"),
    (64, 64, 256, 1, 1, "plain", "T 64, B 64, H 256"),
    (64, 64, 1024, 1, 1, "plain", "T 64, B 64, H 1024"),
    (100, 16, 256, 2, 2, "plain", "2 layers, both directions, B 16, H 256"),
    (100, 32, 256, 1, 1, "lengths", "lengths, B 32, H 256"),
]


def ratios():
    """{folder: {mode: [for each shape nn.LSTM's time over that of `auto`; None where it was not measured]}}"""
    found = {}
    for folder in FOLDERS:
        with open(RESULTS / folder / "results.csv", newline="") as file:
            rows = [
                row for row in csv.DictReader(file) if row["contender"] == "fusedrnn auto" and row["status"] == "ok"
            ]
        by_case = {
            (row["mode"], *(int(row[name]) for name in "TBHLD"), row["variant"]): round(float(row["ratio"]), 2)
            for row in rows
        }
        found[folder] = {mode: [by_case.get((mode, *shape[:-1])) for shape in SHAPES] for mode in ("infer", "train")}
    return found


def draw(found):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "fusedrnn", "svg.fonttype": "none", "font.size": 9})
    colours = {"float32": "#0072b2", "bfloat16": "#e69f00"}
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (mode, title) in zip(panels, (("infer", "inference"), ("train", "training")), strict=True):
        for k, (folder, label) in enumerate(FOLDERS.items()):
            at = [row + (k - 0.5) * 0.38 for row in range(len(SHAPES))]
            values = found[folder][mode]
            panel.barh(at, [value or 0 for value in values], 0.36, color=colours[label], label=label)
            for y, value in zip(at, values, strict=True):
                if value is not None:
                    panel.text(
                        value * 1.04,
                        y,
                        f"{value:.2g}" if value >= 2 else f"{value:.2f}",
                        va="center",
                        fontsize=7,
                        weight="bold" if value < 1 else "normal",
                        color="#b00020" if value < 1 else "black",
                    )
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", xlim=(0.7, 16), title=title, xlabel="times as fast as nn.LSTM")
        panel.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(SHAPES)), [shape[-1] for shape in SHAPES])
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, loc="upper right")
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None, "Description": json.dumps(found)})


if __name__ == "__main__":
    draw(ratios())
