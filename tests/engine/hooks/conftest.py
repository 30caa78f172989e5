"""Short trainings of the toy config."""

import argparse
import json

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from mamba_vision.engine import do_train, load_config


@pytest.fixture
def train(toy, tmp_path):
    """Train the toy config with overrides into ``tmp_path / "out"``, or another; returns that."""

    def run(*overrides, output=None, resume=False):
        output = output or tmp_path / "out"
        config = load_config(
            toy,
            [
                f"train.output_dir={output}",
                "train.device=cpu",
                "train.amp.enabled=False",
                *(f"+{x}" for x in overrides),
            ],
        )
        seed_all_rng(config.train.seed)
        do_train(argparse.Namespace(resume=resume), config)
        return output

    return run


@pytest.fixture
def scripted(monkeypatch):
    """Let evaluations give these values of ``bbox/AP`` in turn, instead of evaluating.

    Returns:
        The list of the models evaluated, as they were.
    """

    def script(*values):
        left, models = list(values), []

        def do_test(config, model):
            models.append({k: v.clone() for k, v in model.state_dict().items()})
            return {"bbox": {"AP": left.pop(0)}}

        monkeypatch.setattr("mamba_vision.engine.watching.do_test", do_test)
        return models

    return script


@pytest.fixture
def read():
    """Read a checkpoint."""
    return lambda path: torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def metrics():
    """From an output folder, the step to its metrics."""

    def read(folder):
        steps = {}
        for line in (folder / "metrics.json").read_text().splitlines():
            values = json.loads(line)
            steps.setdefault(values["iteration"], {}).update(values)
        return steps

    return read
