"""The comparison of backends: its table, its verdict, and what it says to bad arguments."""

import argparse
import sys

import pytest
import torch

from mamba_vision.benchmarks import timing
from mamba_vision.errors import UserError
from mamba_vision.ops import benchmark

SMALL = ["--device", "cpu", "--shapes", "1,40,8,2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_PER_TIMING", 0)


def run(*arguments):
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return benchmark.run(parser.parse_args([*SMALL, *arguments]))


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {len(benchmark.COLUMNS)}
    return cells[2:]


def test_table(capsys):
    assert run("--dtypes", "fp32", "bf16") == 0
    table = rows(capsys.readouterr().out)
    assert [row[:4] for row in table] == [
        [operator, "1, 40, 8, 2", dtype, backend]
        for operator in benchmark.OPERATORS
        for dtype in ("fp32", "bf16")
        for backend in ("reference", "torch")
    ]
    for row in table:
        assert float(row[4]) > 0
        assert float(row[5]) > 0
        assert row[7].endswith(" x")
        assert row[9] == "-"
        assert 0 < float(row[10]) < 1e-1


def test_says_what_cannot_run(capsys):
    assert run() == 0
    assert "selective_scan without mamba_ssm: " in capsys.readouterr().out


def test_a_wrong_result_fails(capsys, monkeypatch):
    module = sys.modules["mamba_vision.ops.selective_scan.torch_chunked"]
    right = module.run
    monkeypatch.setattr(module, "run", lambda *x, **options: 1.001 * right(*x, **options))
    assert run("--operators", "selective_scan") == 1
    reference, wrong = rows(capsys.readouterr().out)
    assert "WRONG" not in reference[10]
    assert wrong[10].endswith(" WRONG")


def test_only_the_backends_asked_for(capsys):
    assert run("--operators", "selective_scan", "--backends", "torch") == 0
    assert [row[3] for row in rows(capsys.readouterr().out)] == ["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "tritn"], "--backends: 'tritn' is none of causal_conv1d, mamba_ssm, "),
        (["--backends", "mamba_ssm"], "--backends: 'mamba_ssm' cannot be used: .+"),
        (["--rounds", "0"], "--rounds: at least one round is needed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        run(*arguments)


@pytest.mark.parametrize("shape", ["1,40,8", "1,40,8,0", "1,40,8,x", "1,40,8,2,2"])
def test_bad_shape(shape, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--shapes", shape)
    assert f"'{shape}' is not four positive numbers B,L,D,N" in capsys.readouterr().err


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU here; take --device cpu"):
        run("--device", "cuda")
