"""README and docs: their code runs, their links lead somewhere, and what they list is what there is."""

import ast
import csv
import doctest
import importlib
import json
import re
import runpy
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch

import fusedrnn

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_blocks_run_as_they_stand(page, capsys, monkeypatch, tmp_path):
    """One after the other, as somebody who reads the page would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    with fusedrnn.use_backend("auto"):
        names = {"__name__": "__main__"}
        for block in re.finditer(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            line = page.read_text()[: block.start()].count("\n") + 1
            exec(compile("\n" * line + block[1], str(page), "exec"), names)


@pytest.mark.parametrize("name", ["convert", "dispatch", "functional", "module"])
def test_examples_in_docstrings(name):
    names = {"fusedrnn": fusedrnn, "torch": torch, "nn": torch.nn}
    module = importlib.import_module(f"fusedrnn.{name}")
    with fusedrnn.use_backend("auto"):
        result = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"auto(?:class|function):: (\w+)", pages))
    assert documented == set(fusedrnn.__all__) - {"functional"}
    listed = re.search(r"automodule:: fusedrnn\.functional\n +:members: (.+)", pages)[1].split(", ")
    tree = ast.parse((ROOT / "fusedrnn" / "functional.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    assert set(listed) == functions


def test_every_environment_variable_is_in_the_table():
    read = set()
    folders = ("fusedrnn", "benchmarks", "kernels", "csrc", "tests")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    for path in (ROOT / "setup.py", *files):
        if path == Path(__file__) or path.suffix not in (".py", ".h", ".cpp"):
            continue
        for line in path.read_text().splitlines():
            if re.search(r"environ|getenv|_VARIABLE =", line):
                read |= set(re.findall(r'"(FUSEDRNN_[A-Z_0-9]+)"', line))
    read |= {"FUSEDRNN_BUILD_CPU", "FUSEDRNN_BUILD_CUDA"}  # by setup.py, which puts their names together
    listed = set(re.findall(r"FUSEDRNN_[A-Z_0-9]+", (ROOT / "docs" / "environment.md").read_text()))
    assert listed == read


def test_messages_in_the_list_of_troubles_are_in_the_code():
    texts = []
    for path in (ROOT / "setup.py", *(ROOT / "fusedrnn").rglob("*.py")):
        constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        texts += [value for value in constants if isinstance(value, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 5
    assert [message for message in messages if not any(message in text for text in texts)] == []


def test_the_chart_shows_the_committed_results():
    draw = runpy.run_path(str(ROOT / "docs" / "draw_speed.py"))
    picture = draw["IMAGE"].read_text()
    shown = json.loads(re.search(r"<dc:description>(.*?)</dc:description>", picture)[1].replace("&quot;", '"'))
    assert shown == draw["ratios"]()


def test_the_readme_is_short_and_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text()

    def mean(folder, mode):
        path = ROOT / "benchmarks" / "results" / "intel-xeon-amx-2-cores" / folder / "results.csv"
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["contender"], row["mode"]) == ("fusedrnn auto", mode)]
        return f"{geometric_mean(float(row['ratio']) for row in rows):.1f}"

    lstm, gru = ([mean(folder, mode) for mode in ("infer", "train")] for folder in ("", "gru"))
    assert f"**{lstm[0]} times as fast in inference and {lstm[1]} times in training**" in readme
    assert f"a GRU {gru[0]} and {gru[1]} times" in readme
    assert readme.count("\n") <= 100
    assert "make demo" in readme
    assert "make test" in readme
