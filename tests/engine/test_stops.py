"""A training that is stopped or killed, and goes on; and which checkpoints it leaves."""

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import SimpleTrainer
from detectron2.utils.env import seed_all_rng

from mamba_vision.engine import do_train, load_config
from mamba_vision.engine.stopping import EXIT_CODE
from mamba_vision.engine.trainer import Trainer
from mamba_vision.errors import UserError

TESTS = Path(__file__).parents[1]
NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"


def environment():
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def train(config_file, output, *overrides, resume=False):
    overrides = [f"train.output_dir={output}", "train.amp.enabled=False", *overrides]
    config = load_config(config_file, ["train.device=cpu", *overrides])
    seed_all_rng(None if resume else 1)
    do_train(argparse.Namespace(resume=resume), config)


def weights(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def stop_in(monkeypatch):
    """Let a signal come in a step, counted from 0."""

    def prepare(iteration, number):
        step = Trainer.run_step

        def run_step(self):
            if self.iter == iteration:
                os.kill(os.getpid(), number)
            step(self)

        monkeypatch.setattr(Trainer, "run_step", run_step)

    yield prepare
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


@pytest.fixture
def losses(monkeypatch):
    """By step, the losses as they are, not as the writers smooth them."""
    found = {}
    write = SimpleTrainer.write_metrics

    def keep(loss_dict, data_time, iteration, *rest):
        found[iteration] = {name: loss.item() for name, loss in loss_dict.items()}
        write(loss_dict, data_time, iteration, *rest)

    monkeypatch.setattr(SimpleTrainer, "write_metrics", staticmethod(keep))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_the_step_end_and_a_checkpoint_be_written(
    toy, tmp_path, stop_in, losses, number, caplog
):
    train(toy, tmp_path / "whole", "train.max_iter=9")
    expected = dict(losses)
    losses.clear()
    stop_in(4, number)
    with pytest.raises(SystemExit) as stopped:
        train(toy, tmp_path / "parts", "train.max_iter=9")
    assert stopped.value.code == EXIT_CODE == 75
    assert list(losses) == [0, 1, 2, 3, 4]
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000004.pth"
    assert f"Stopped after step 5 by {number.name}; --resume goes on from" in caplog.text
    train(toy, tmp_path / "parts", "train.max_iter=9", resume=True)
    assert losses == expected
    equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_signal_in_the_last_step_lets_the_training_end(toy, tmp_path, stop_in):
    stop_in(5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(toy, tmp_path / "out")
    train(toy, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_the_detector_goes_on_with_the_next_image(tmp_path, stop_in, losses):
    """Augmentation, grouping, RoI sampling, batch norms; with workers that have read ahead."""
    common = (NANO, "train.max_iter=6", "lr_multiplier.warmup_iters=2", "dataloader.evaluator=null")
    common += ("dataloader.train.total_batch_size=2",)
    train(common[0], tmp_path / "whole", *common[1:], "dataloader.train.num_workers=2")
    expected = dict(losses)
    losses.clear()
    stop_in(2, signal.SIGUSR1)
    parts = tmp_path / "parts"
    with pytest.raises(SystemExit):
        train(common[0], parts, *common[1:], "dataloader.train.num_workers=1")
    train(common[0], parts, *common[1:], "dataloader.train.num_workers=0", resume=True)
    assert sorted(losses) == [0, 1, 2, 3, 4, 5]
    for step, terms in expected.items():
        assert losses[step] == pytest.approx(terms, abs=1e-5)
    equal(weights(parts), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(toy, tmp_path):
    def run(output, *moments):
        options = ("train.max_iter=40", "train.checkpointer.period=3", "dataloader.evaluator=null")
        options += ("train.device=cpu", "train.amp.enabled=false", f"train.output_dir={output}")
        result = subprocess.run(
            [sys.executable, TESTS / "data" / "killed.py", toy, json.dumps(moments), *options],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole)[-1]["code"] == 0
    delays = [random.Random(4).uniform(0, 0.2) for _ in range(3)]
    runs = run(killed, "write", "tag", *delays)
    assert [r["code"] for r in runs[:-1]] == [-signal.SIGKILL] * 5
    assert runs[-1]["code"] == 0
    for before, after in pairwise(runs):
        lost = int(before["last"]) + 1 - int(after["first"])
        assert 0 <= lost <= 3  # what was not in a checkpoint yet
    equal(weights(killed), weights(whole))
    assert not list(killed.glob(".*"))  # what a killed process had begun
    names = {p.name for p in killed.glob("*.pth")}
    assert names == {"model_0000035.pth", "model_0000038.pth", "model_final.pth"}


@pytest.mark.slow
def test_processes_stop_together(toy, tmp_path):
    """The signal comes to the process that started them alone."""
    tool = TESTS.parent / "tools" / "lazyconfig_train_net.py"
    arguments = ["--num-gpus=2", "--dist-url=auto", "train.device=cpu", "train.max_iter=100000"]
    process = subprocess.Popen(
        [sys.executable, tool, "--config-file", toy, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = toy.parent / "output" / "metrics.json"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_CODE, said[-3000:]
    assert "Traceback" not in said
    stopped = int(said.rpartition("Stopped after step ")[2].partition(" ")[0])
    name = (toy.parent / "output" / "last_checkpoint").read_text()
    assert name == f"model_{stopped - 1:07d}.pth"


def test_a_full_disk_leaves_the_last_good_checkpoint(toy, tmp_path, monkeypatch):
    save, count = torch.save, [0]

    def until_full(data, file):
        count[0] += 1
        if count[0] == 2:
            file.write(b"PK\x03\x04 half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(data, file)

    train(toy, tmp_path / "whole", "train.max_iter=9")
    monkeypatch.setattr(torch, "save", until_full)
    output = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        train(toy, output, "train.max_iter=9")
    for part in ("model_0000005.pth", "No space left on device", "--resume goes on from"):
        assert part in str(caught.value)
    assert [p.name for p in output.glob("*.pth")] == ["model_0000002.pth"]
    assert not list(output.glob(".*"))
    train(toy, output, "train.max_iter=9", resume=True)
    equal(weights(output), weights(tmp_path / "whole"))


def test_a_disk_without_room_for_metrics(toy, tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", full)
    with pytest.raises(
        UserError, match=r"No space left on device after step 1; make room; no check"
    ):
        train(toy, tmp_path / "out")


@pytest.fixture
def precision(monkeypatch):
    """Let evaluations find these box APs, one after the other."""

    def prepare(*values):
        results = iter(values)
        monkeypatch.setattr(
            "mamba_vision.engine.watching.do_test",
            lambda config, model: {"bbox": {"AP": next(results)}},
        )

    return prepare


def test_keeps_the_best_and_the_last(toy, tmp_path, stop_in, precision):
    output = tmp_path / "out"
    options = ("train.max_iter=10", "train.eval_period=2", "train.checkpointer.period=1")
    options += ("+train.best_metric=bbox/AP",)
    precision(10.0, 30.0, float("nan"))
    stop_in(6, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(toy, output, *options)
    best = weights(output, "model_best.pth")
    assert json.loads((output / "model_best.json").read_text()) == {
        "metric": "bbox/AP",
        "value": 30.0,
        "iteration": 3,
    }
    assert {p.name for p in output.glob("*.pth")} == {
        "model_best.pth",
        "model_0000005.pth",
        "model_0000006.pth",
    }
    precision(20.0, 25.0)  # less than before the stop
    train(toy, output, *options, resume=True)
    equal(weights(output, "model_best.pth"), best)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    names = {p.name for p in output.glob("*.pth")}
    assert names == {"model_best.pth", "model_0000008.pth", "model_0000009.pth", "model_final.pth"}


def test_a_loader_that_cannot_be_resumed_is_told(toy, tmp_path, caplog):
    train(toy, tmp_path / "out", "train.max_iter=1")
    config = load_config(toy, [f"train.output_dir={tmp_path / 'out'}", "train.device=cpu"])
    config.dataloader.train._target_ = build_detection_train_loader
    config.train.amp.enabled = False
    do_train(argparse.Namespace(resume=True), config)
    assert "The data are shuffled anew" in caplog.text


def test_bad_images_are_counted_and_stop_the_run(toy, tmp_path, caplog):
    """They cost no step: when there are too many, a checkpoint is written first."""
    for i in (1, 3):
        (toy.parent / "train_images" / f"{i}.png").write_bytes(b"no image")
    train(toy, tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["data"]
    assert {Path(name).name for name in saved["bad_images"]} == {"1.png", "3.png"}
    assert caplog.text.count("Bad training image ") == 2

    strict = tmp_path / "strict"
    often = "train.checkpointer.period=100"
    with pytest.raises(UserError, match=r"2 bad training images, .* --resume goes on from"):
        train(toy, strict, often, "+train.max_bad_images=1")
    with pytest.raises(UserError, match="2 bad training images"):
        train(toy, strict, often, "+train.max_bad_images=1", resume=True)
    train(toy, strict, often, resume=True)
    equal(weights(strict), weights(tmp_path / "out"))
