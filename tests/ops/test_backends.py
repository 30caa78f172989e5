"""How a backend is chosen."""

import logging
import os
import subprocess
import sys
import types

import pytest
import torch

from mamba_vision.errors import UserError
from mamba_vision.ops import backends as backends_module
from mamba_vision.ops import depthwise_conv1d_silu, selective_scan
from mamba_vision.ops.backends import Backends

VARIABLE = "MAMBAVISION_TEST_BACKEND"
PREFIX = "backends_under_test_"


@pytest.fixture
def choose(monkeypatch):
    """``Backends.choose`` over: absent (cannot be imported), large (only long tensors), plain."""

    def module(name, obstacle):
        made = types.ModuleType(PREFIX + name)
        made.obstacle = obstacle
        monkeypatch.setitem(sys.modules, made.__name__, made)

    def large(device, dtypes, numbers):
        return None if numbers > 9 else "it takes ten numbers or more"

    module("large", large)
    module("plain", lambda device, dtypes, numbers: None)
    monkeypatch.delenv(VARIABLE, raising=False)
    backends_module._load.cache_clear()
    names = ("absent", "large", "plain")
    backends = Backends(
        "add",
        VARIABLE,
        {name: PREFIX + name for name in names},
        {"absent": "install it with `pip install absent`"},
    )
    return lambda asked, numbers: backends.choose(
        asked, torch.zeros(numbers), numbers=numbers
    ).__name__.removeprefix(PREFIX)


def test_auto_takes_the_first_that_can_run(choose):
    assert choose(None, 10) == "large"
    assert choose("auto", 10) == "large"
    assert choose(None, 9) == "plain"


def test_auto_says_once_what_it_took(choose, caplog):
    caplog.set_level(logging.INFO)
    for numbers in (10, 11, 9, 8, 10):
        choose("auto", numbers)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("add on cpu: using backend 'large' (absent: No module named")
    assert "pip install absent" in first
    assert second.startswith("add on cpu: using backend 'plain' (absent: ")
    assert second.endswith("; large: it takes ten numbers or more)")
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_name_given_is_not_logged(choose, caplog):
    caplog.set_level(logging.INFO)
    assert choose("plain", 10) == "plain"
    assert not caplog.records


def test_the_variable_names_a_backend_and_the_argument_beats_it(choose, monkeypatch):
    monkeypatch.setenv(VARIABLE, "plain")
    assert choose(None, 10) == "plain"
    assert choose("large", 10) == "large"
    assert choose("auto", 10) == "large"
    monkeypatch.setenv(VARIABLE, "")
    assert choose(None, 10) == "large"


def test_a_missing_backend_asked_for_is_an_error_with_the_remedy(choose, monkeypatch):
    message = (
        r"^add: backend 'absent' \(given by {}\) cannot be used: .*; install it with `pip .*`$"
    )
    with pytest.raises(UserError, match=message.format("argument")):
        choose("absent", 10)
    monkeypatch.setenv(VARIABLE, "absent")
    with pytest.raises(UserError, match=message.format(VARIABLE)):
        choose(None, 10)


def test_a_backend_asked_for_that_cannot_take_the_tensors_is_an_error(choose):
    with pytest.raises(
        UserError, match=r"'large' .* cannot be used: it takes ten numbers or more$"
    ):
        choose("large", 9)


def test_an_unknown_name_lists_the_known_ones(choose, monkeypatch):
    with pytest.raises(UserError, match=r"'tritn' .* choose from: auto, absent, large, plain$"):
        choose("tritn", 10)
    monkeypatch.setenv(VARIABLE, "tritn")
    with pytest.raises(UserError, match=f"'tritn' .given by {VARIABLE}.*; choose from: auto, "):
        choose(None, 10)


def test_none_left_is_an_error(choose, monkeypatch):
    monkeypatch.setattr(sys.modules[PREFIX + "plain"], "obstacle", lambda *_, **__: "not today")
    with pytest.raises(UserError, match=r"no backend can take these tensors: .*plain: not today"):
        choose("auto", 9)


def test_both_operators_read_their_variable_at_every_call(monkeypatch):
    x = torch.randn(1, 5, 4)
    scan = (x, x, -torch.ones(4, 2), x[..., :2], x[..., 2:])
    for variable, call in (
        ("MAMBAVISION_SCAN_BACKEND", lambda **options: selective_scan(*scan, **options)),
        (
            "MAMBAVISION_CONV_BACKEND",
            lambda **options: depthwise_conv1d_silu(x, x[0, :4, :3], **options),
        ),
    ):
        monkeypatch.delenv(variable, raising=False)
        expected = call(backend="torch")
        assert torch.equal(call(), expected)
        monkeypatch.setenv(variable, "reference")
        assert torch.equal(call(), call(backend="reference"))
        monkeypatch.setenv(variable, "nonsense")
        with pytest.raises(UserError, match=f"'nonsense' .given by {variable}"):
            call()
        assert torch.equal(call(backend="torch"), expected)


@pytest.mark.parametrize("name", ["mamba_ssm", "causal_conv1d", "triton"])
def test_an_accelerator_never_runs_on_the_cpu_in_silence(name):
    x = torch.randn(1, 5, 4)
    operator, inputs = {
        "mamba_ssm": (selective_scan, (x, x, -torch.ones(4, 2), x[..., :2], x[..., 2:])),
        "causal_conv1d": (depthwise_conv1d_silu, (x, x[0, :4, :3])),
        "triton": (depthwise_conv1d_silu, (x, x[0, :4, :3])),
    }[name]
    with pytest.raises(UserError, match=f"backend '{name}' .given by argument. cannot be used: "):
        operator(*inputs, backend=name)


def test_importing_the_operators_imports_no_accelerator():
    code = (
        "import sys, mamba_vision.ops\n"
        "names = {'mamba_ssm', 'selective_scan_cuda', 'causal_conv1d', 'causal_conv1d_cuda'}\n"
        "names |= {f'mamba_vision.ops.{x}' for x in ('triton_support', 'inner.triton_inner')}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == "[]\n"
