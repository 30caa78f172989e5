"""The comparison of backbones."""

import pytest
import torch

from mamba_vision.benchmarks import backbone
from mamba_vision.errors import UserError


def test_table(run, tables):
    assert run(backbone, "--dtype", "bf16", "--window-padding", "full", "fit") == 0
    ((first, *others),) = tables()
    assert (first["row"], first["padding"]) == ("plain", "full")
    assert {row["padding"] for row in others} == {"full", "fit"}
    assert others[-1]["row"].startswith("all (+ ")
    for row in (first, *others):
        assert float(row["forward ms"]) > 0
        assert 0 < float(row["error"]) < 0.1
        assert row["memory MiB"] == "-"
    assert float(first["forward and backward ms"]) > 0
    assert 0 < float(first["of gradients"]) < 0.3
    assert first["speed"] == "1.00 x"


def test_a_right_switch_passes(run, tables, switches, right):
    switches(right)
    assert run(backbone) == 0
    ((plain, row),) = tables()
    assert row["row"] == "all (+ right)"
    assert float(row["error"]) == float(plain["error"]) == 0
    assert float(row["of gradients"]) == 0


def test_a_wrong_row_fails(run, tables, switches, wrong):
    switches(wrong)
    assert run(backbone, "--forward-only") == 1
    ((plain, row),) = tables()
    assert row["forward and backward ms"] == row["of gradients"] == "-"
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
    ((plain, row),) = tables()
    assert float(row["of gradients"]) == pytest.approx(1e-3, rel=0.1)
    assert row["error"].endswith(" WRONG")
    assert "WRONG" not in plain["error"]


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
    (found,) = tables()
    assert found[-1]["row"] == "all (+ cuda_graphs)"
    assert all(float(row["memory MiB"]) > 0 for row in found)
