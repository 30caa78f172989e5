"""Weights & Biases, which is not installed for the tests: a stand-in notes what it is given."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from mamba_vision.engine import argument_parser, train_net
from mamba_vision.engine.hooks import WandbWriter
from mamba_vision.errors import UserError

ON = "train.wandb_project=toys"


class Run:
    def __init__(self, **options):
        self.options, self.logged, self.saved, self.finished = options, [], [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "iteration")

    def save(self, path, base_path):
        self.saved.append((path, base_path))

    def log(self, values):
        assert not self.finished
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """The runs that are started."""
    runs = []

    def init(**options):
        runs.append(Run(**options))
        return runs[-1]

    wandb = SimpleNamespace(init=init, Image=lambda array: ("image", array.shape), __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return runs


def test_logs_metrics_and_pictures(runs, train, metrics):
    out = train(ON, "train.eval_period=3", "train.draw_images=1")
    (run,) = runs
    assert run.finished
    assert run.options["project"] == "toys"
    assert run.options["name"] == "out"
    assert run.options["config"]["max_iter"] == 6
    logged = {}
    for values in run.logged:
        logged.setdefault(values["iteration"], {}).update(values)
    pictures = {step: values.pop("predictions/00_0", None) for step, values in logged.items()}
    assert pictures == {k: ("image", (800, 800, 3)) if k in (2, 6) else None for k in range(7)}
    expected = metrics(out)
    assert set(logged) == set(expected)
    for step, values in expected.items():
        assert logged[step] == pytest.approx(values, nan_ok=True)


def test_a_resumed_training_goes_on_with_its_run(runs, train):
    out = train(ON, "train.max_iter=2")
    train(ON, output=out, resume=True)
    first, second = (run.options for run in runs)
    assert first["id"] == second["id"] == (out / "wandb_id").read_text()
    assert first["resume"] == second["resume"] == "allow"
    assert [values["iteration"] for values in runs[1].logged][:1] == [2]
    train(ON, "train.max_iter=1", output=out.parent / "other")
    assert runs[2].options["id"] != first["id"]


def test_without_tensorboard_the_pictures_are_let_go(runs, train, monkeypatch):
    seen = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb" or None)
    monkeypatch.setattr(Run, "finish", lambda run: seen.extend(run.logged))
    train(ON, "train.eval_period=2", "train.draw_images=1")
    assert sum("predictions/00_0" in values for values in seen) == 3


def test_a_run_that_cannot_start_is_told(runs, train, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured (no-tty)\nmore of it")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(UserError, match=r"wandb_project=toys: api_key not .*; run wandb login"):
        train(ON)


def test_a_broken_installation_is_told(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if a part were missing
    with pytest.raises(UserError, match="wandb_project=toys: wandb cannot be imported"):
        train(ON)


def test_missing_it_is_told_before_anything_is_written(toy):
    arguments = ["--config-file", str(toy), f"+{ON}"]
    with pytest.raises(UserError, match=r"train\.wandb_project=toys needs .*pip install wandb"):
        train_net(argument_parser("").parse_args(arguments))
    assert not (toy.parent / "output").exists()


def test_it_is_not_imported_unless_asked_for(train, monkeypatch):
    class Refusing:
        def find_spec(self, name, *_):
            assert name != "wandb"

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, WandbWriter.__module__)
    importlib.import_module(WandbWriter.__module__)
    train("train.max_iter=1")
