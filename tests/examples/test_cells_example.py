"""examples/cells.py: every cell is trained, and the numbers are numbers."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "cells.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fusedrnn_example_cells", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_is_trained(example, capsys):
    example.main(["--steps", "3", "--length", "4", "--hidden", "4"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines] == list(example.MODULES)
    assert all(math.isfinite(float(line.split()[-1])) for line in lines)
    assert len(header) > 0


def test_the_answer_is_the_sum_of_the_marked_numbers(example):
    x, lengths, answers = example.batch(9, B=5)
    assert x.shape == (9, 5, 2)
    for b, T in enumerate(lengths.tolist()):
        assert x[:T, b, 1].sum() == 2
        torch.testing.assert_close((x[:T, b, 0] * x[:T, b, 1]).sum(), answers[b])


def test_bad_arguments(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--length", "1"])
    assert "--length must be 2 or more" in capsys.readouterr().err
