"""The tool that verifies the environment, on a good one and on bad ones."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

from mamba_vision.ops.conv1d import BACKENDS as CONV
from mamba_vision.ops.conv1d import torch_conv1d
from mamba_vision.ops.selective_scan import BACKENDS as SCAN


@pytest.fixture
def verify(tool, monkeypatch, capsys):
    """Run the tool on the CPU; returns its exit code and what it printed of each thing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = tool("verify_env")

    def verify():
        code = main([])
        table, what = {}, ""
        for line in capsys.readouterr().out.splitlines():
            if line[:36].strip():
                what = line[:36].strip()
            table[what] = f"{table.get(what, '')}{line[36:]}".strip()
        return code, table

    return verify


def test_a_good_environment(verify):
    code, table = verify()
    assert code == 0
    assert table["torch"].split() == ["ok", importlib.metadata.version("torch")]
    for operator in (SCAN, CONV):
        rows = {name: table[f"{operator.operator}: {name}"] for name in operator.modules}
        assert sum("chosen on cpu" in row for row in rows.values()) == 1
        assert rows["torch"].startswith("ok")
        assert rows["reference"].startswith("ok")
    assert table["selective_scan: mamba_ssm"].startswith("-     not on cpu: ")
    assert table["nano detector, forward and backward"].startswith("ok    on cpu; the loss")


def test_what_is_missing_is_named_with_a_remedy(verify, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    code, table = verify()
    assert code == 1
    assert table["pycocotools"].startswith("FAIL")
    assert "-> pip install" in table["pycocotools"]
    assert not any("detector" in what for what in table)


def test_a_backend_that_is_asked_for_and_missing(verify, monkeypatch):
    monkeypatch.setenv(CONV.variable, "causal_conv1d")
    code, table = verify()
    assert code == 1
    assert table["depthwise_conv1d_silu"].startswith("FAIL")
    assert f"mend or unset {CONV.variable}" in table["depthwise_conv1d_silu"]
    assert not any("chosen" in row for what, row in table.items() if what.startswith("depthwise"))
    assert table["nano detector, forward and backward"].startswith("FAIL")


def test_a_backend_that_computes_something_wrong(verify, monkeypatch):
    run = torch_conv1d.run
    monkeypatch.setattr(torch_conv1d, "run", lambda *tensors: 1.01 * run(*tensors))
    code, table = verify()
    assert code == 1
    row = table["depthwise_conv1d_silu: torch"]
    assert row.startswith("FAIL")
    assert "largest error 1e-02" in row or "largest error 2e-02" in row
    assert f"set {CONV.variable} to another backend" in row


def test_a_backend_that_fails(verify, monkeypatch):
    def run(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch_conv1d, "run", run)
    code, table = verify()
    assert code == 1
    assert "chosen, and fails: CUDA error: no kernel" in table["depthwise_conv1d_silu: torch"]


@pytest.mark.cuda
def test_on_a_gpu(tool, capsys, monkeypatch):
    # Whether Detectron2's extension is there is another row's matter.
    monkeypatch.setitem(sys.modules, "detectron2._C", ModuleType("detectron2._C"))
    assert tool("verify_env")([]) == 0
    said = capsys.readouterr().out
    assert torch.cuda.get_device_name() in said
    assert "chosen on cuda" in said
