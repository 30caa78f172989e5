"""The comparison of backbones."""

import pytest
import torch

from mamba_vision.benchmarks import backbone
from mamba_vision.errors import UserError


def test_tables(run, tables):
    assert run(backbone, "--dtype", "bf16", "--window-padding", "full", "fit") == 0
    forward, both = tables()
    for rows, column in ((forward, "forward ms"), (both, "forward and backward ms")):
        assert [rows[0][c] for c in ("row", "padding", "speed")] == ["plain", "full", "1.00 x"]
        assert {row["padding"] for row in rows} == {"full", "fit"}
        assert rows[-1]["row"].startswith("all (+ ")
        assert all(float(row[column]) > 0 for row in rows)
        assert {row["memory MiB"] for row in rows} == {"-"}
    assert all(0 < float(row["error"]) < 0.1 for row in forward)
    assert all(0 < float(row["error of gradients"]) < 0.3 for row in both)


def test_plain_and_all_are_in_both_tables(run, tables):
    assert run(backbone, "--only", "plain", "all") == 0
    for rows in tables():
        plain, everything = rows
        assert plain["row"] == "plain"
        assert everything["row"].startswith("all (+ ")


def test_a_right_switch_passes(run, tables, switches, right):
    switches(right)
    assert run(backbone) == 0
    (plain, row), (_, both) = tables()
    assert row["row"] == both["row"] == "all (+ right)"
    assert float(row["error"]) == float(plain["error"]) == 0
    assert float(both["error of gradients"]) == 0


def test_a_wrong_row_fails(run, tables, switches, wrong):
    switches(wrong)
    assert run(backbone, "--forward-only") == 1
    ((plain, row),) = tables()
    assert "WRONG" not in plain["error"]
    assert row["error"].endswith(" WRONG")


def test_wrong_gradients_fail(run, tables, switches, right, monkeypatch):
    switches(right)
    gradients = backbone._Step.gradients
    calls = []

    def spoiled(step):
        calls.append(step)
        return [1.001 * x if len(calls) == 4 else x for x in gradients(step)]  # the last row's

    monkeypatch.setattr(backbone._Step, "gradients", spoiled)
    assert run(backbone) == 1
    _, (plain, row) = tables()
    error, word = row["error of gradients"].split()
    assert float(error) == pytest.approx(1e-3, rel=0.1)
    assert word == "WRONG"
    assert "WRONG" not in plain["error of gradients"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "al"], "--only: 'al' is none of the rows plain, "),
        (["--config-file", "nano"], "config nano does not exist"),
        (["--size", "60x96"], "60 x 96 pixels, not multiples of 32"),
    ],
)
def test_bad_arguments(run, arguments, message):
    with pytest.raises(UserError, match=message):
        run(backbone, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "800"], "'800' is not HEIGHTxWIDTH"),
        (["--size", "0x32"], "'0' is not a whole number from 1"),
        (["--rounds", "0"], "'0' is not a whole number from 1"),
    ],
)
def test_bad_numbers(run, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(backbone, *arguments)
    assert message in capsys.readouterr().err


def test_no_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU here; take --device cpu"):
        run(backbone, "--device", "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_on_a_gpu(run, tables, dtype):
    assert run(backbone, "--device", "cuda", "--dtype", dtype) == 0
    for rows in tables():
        assert rows[-1]["row"] == "all (+ cuda_graphs)"
        assert all(float(row["memory MiB"]) > 0 for row in rows)
