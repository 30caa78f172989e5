"""Training: resumed, on several processes, stopped by its loss."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from mamba_vision.engine import do_train, load_config, trainer
from mamba_vision.errors import UserError
from mamba_vision.transfer import send

TOOL = Path(__file__).parents[2] / "tools" / "lazyconfig_train_net.py"


def train(toy, output, *overrides, resume=False, device="cpu"):
    config = load_config(toy, [f"train.output_dir={output}", f"train.device={device}", *overrides])
    config.train.amp.enabled = device != "cpu"
    seed_all_rng(config.train.seed)
    do_train(argparse.Namespace(resume=resume), config)


def checkpoint(folder):
    return torch.load(
        folder / (folder / "last_checkpoint").read_text(), map_location="cpu", weights_only=True
    )


def metrics(folder):
    """Step to metrics, from the JSON writer's lines."""
    steps = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        values = json.loads(line)
        steps.setdefault(values["iteration"], {}).update(values)
    return steps


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_resumed_training_equals_one_that_never_stopped(toy, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(toy, whole, "train.max_iter=8")

    # As a stop between the third step and the sixth leaves it.
    parts.mkdir()
    shutil.copy(whole / "model_0000002.pth", parts)
    (parts / "last_checkpoint").write_text("model_0000002.pth")
    train(toy, parts, "train.max_iter=8", resume=True)

    expected, resumed = checkpoint(whole), checkpoint(parts)
    assert resumed["iteration"] == expected["iteration"] == 7
    assert resumed["trainer"]["iteration"] == 7
    equal(resumed["model"], expected["model"])
    momentum = expected["trainer"]["optimizer"]["state"]
    assert momentum[0]["momentum_buffer"].abs().max() > 1e-4
    equal(resumed["trainer"]["optimizer"]["state"], momentum)

    before, after = metrics(whole), metrics(parts)
    assert list(after) == [3, 4, 5, 6, 7, 8]  # what comes last is of the evaluation
    rates = [before[step]["lr"] for step in range(8)]
    assert [after[step]["lr"] for step in range(3, 8)] == pytest.approx(rates[3:])
    assert rates[0] < rates[3] < rates[4] > rates[7]  # so a schedule that began anew would show
    assert after[8]["bbox/AP"] == after[8]["segm/AP"] == pytest.approx(100)


@pytest.mark.cuda
def test_a_resumed_training_keeps_the_gradient_scale(toy, tmp_path):
    train(toy, tmp_path / "whole", device="cuda")
    train(toy, tmp_path / "parts", "train.max_iter=3", device="cuda")
    train(toy, tmp_path / "parts", resume=True, device="cuda")
    expected, resumed = (checkpoint(tmp_path / n)["trainer"] for n in ("whole", "parts"))
    assert resumed["iteration"] == expected["iteration"] == 5
    assert resumed["grad_scaler"] == expected["grad_scaler"]
    assert expected["grad_scaler"]["_growth_tracker"] == 6  # a new scaler would have counted 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("told", [None, False, True])
def test_images_are_pinned_for_a_gpu_unless_told_otherwise(
    toy, tmp_path, monkeypatch, pinning, device, told
):
    pinned = []

    def watched(images, device):
        pinned.extend(image["image"].is_pinned() for image in images)
        return send(images, device)

    monkeypatch.setattr(trainer, "send", watched)
    options = [
        "train.max_iter=1",
        f"dataloader.train.pin_memory={'null' if told is None else told}",
    ]
    train(toy, tmp_path / "out", *options, device=device)
    assert pinned == [device == "cuda" if told is None else told] * 2


def test_training_goes_on_to_a_higher_max_iter(toy, tmp_path):
    train(toy, tmp_path / "out", "train.max_iter=2")
    train(toy, tmp_path / "out", "train.max_iter=5", resume=True)
    assert checkpoint(tmp_path / "out")["iteration"] == 4


def test_a_training_that_is_done_is_evaluated_and_left_alone(toy, tmp_path, caplog):
    output = tmp_path / "out"
    train(toy, output)
    before = {p.name: p.read_bytes() for p in output.glob("*.pth")}
    (output / "results.json").unlink()
    caplog.clear()
    train(toy, output, resume=True)
    assert "is of step 6 and train.max_iter is 6" in caplog.text
    assert {p.name: p.read_bytes() for p in output.glob("*.pth")} == before
    assert json.loads((output / "results.json").read_text())["bbox"]["AP"] == pytest.approx(100)


def test_nothing_to_resume_starts_anew(toy, tmp_path, caplog):
    train(toy, tmp_path / "out", resume=True)
    assert "No checkpoint to resume" in caplog.text
    assert checkpoint(tmp_path / "out")["iteration"] == 5


def test_a_loss_that_is_not_finite_stops_the_training(toy, tmp_path):
    with pytest.raises(UserError, match=r"stopped at step 1, .* no checkpoint was written yet"):
        train(toy, tmp_path / "out", "model.scale=nan")


def test_without_tensorboard_the_other_writers_work(toy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    train(toy, tmp_path / "out")
    assert "TensorBoard is not installed" in caplog.text
    assert not list((tmp_path / "out").glob("events.*"))
    assert set(metrics(tmp_path / "out")) >= set(range(6))


def run(toy, output, *arguments):
    overrides = (
        f"train.output_dir={output}",
        "train.device=cpu",
    )
    return subprocess.run(
        [sys.executable, TOOL, "--config-file", toy, "--dist-url=auto", *arguments, *overrides],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_an_error_in_a_process_ends_in_its_own_line(toy, tmp_path):
    result = run(toy, tmp_path / "out", "--num-gpus", "2", "model.scale=nan")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: training stopped at step 1,")
    assert result.stderr.count("error: ") == 1
