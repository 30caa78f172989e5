"""The training tool: what it leaves behind, and what it says to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_vision.engine.trainer import Trainer

TOOLS = Path(__file__).parents[2] / "tools"


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def train(tool, toy):
    main = tool("lazyconfig_train_net")
    return lambda *arguments: main(["--config-file", str(toy), *map(str, arguments)])


@pytest.fixture
def refused(toy, capsys):
    """Check that a call ends in one line on stderr, exit code 2, and leaves all files alone."""

    def check(call, *parts):
        before = files(toy.parent)
        assert call() == 2
        assert files(toy.parent) == before
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        for part in parts:
            assert str(part) in lines[0]

    return check


def test_trains_resumes_and_evaluates(train, toy, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = toy.parent / "output"
    assert train("train.max_iter=3") == 0
    assert train("--resume") == 0
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    steps = [json.loads(line)["iteration"] for line in (output / "metrics.json").open()]
    assert set(range(6)) < set(steps)
    assert list(output.glob("events.out.tfevents.*"))
    assert "model" in (output / "config.yaml").read_text()

    said = capsys.readouterr().out
    assert "No GPU found: using the CPU" in said
    assert "train.amp is off" in said
    assert "eta: " in said
    assert "Resuming after step 3" in said
    assert "copypaste: Task: segm" in said
    for logged in ("No GPU found: using the CPU", "Resuming after step 3"):
        assert logged in (output / "log.txt").read_text()

    elsewhere = toy.parent / "evaluation"
    weights = f"train.init_checkpoint={output / 'model_final.pth'}"
    assert train("--eval-only", weights, f"train.output_dir={elsewhere}") == 0
    results = json.loads((elsewhere / "results.json").read_text())
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100)
        assert results[task]["APl"] is None  # there is no large square
        assert results[task]["AP-square"] == pytest.approx(100)
    assert not list(elsewhere.glob("*.pth"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.max_itr=3"], ["train.max_itr", "did you mean train.max_iter?"]),
        (["train.max_iter=abc"], ["train.max_iter=abc"]),
        (["train.max_iter=3", "--resume"], ["--resume", "move it before"]),
        (["--num-gpus", "999"], ["--num-gpus 999", "this machine has"]),
        (["--num-gpus", "many"], ["--num-gpus", "many"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
        (["--eval-only"], ["--eval-only needs weights", "train.init_checkpoint=FILE"]),
        (["--config-file", "no_such.py"], ["no_such.py does not exist"]),
        (["train.init_checkpoint=no_such.pth"], ["no_such.pth"]),
        (["train.output_dir={}/toy.py"], ["toy.py is not a folder"]),
        (["dataloader.test.dataset.names=coco_2017_vall"], ["coco_2017_vall", "coco_2017_val'?"]),
    ],
)
def test_refuses_bad_arguments(train, toy, refused, arguments, parts):
    refused(lambda: train(*(a.format(toy.parent) for a in arguments)), *parts)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 half a file"])
def test_refuses_a_weights_file_that_is_not_one(train, toy, refused, content):
    path = toy.parent / "weights.pth"
    path.write_bytes(content)
    refused(lambda: train(f"train.init_checkpoint={path}"), path)
    refused(lambda: train("--eval-only", f"train.init_checkpoint={path}"), path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda text: text[:100], "is not JSON"),
        (lambda text: text.replace('"categories"', '"classes"'), "'categories' is missing"),
        (lambda text: text.replace('"category_id": 2', '"category_id": 9'), "category"),
        (lambda text: text.replace('"1.png"', '"one.png"'), "one.png"),
    ],
)
def test_refuses_damaged_annotations(train, toy, refused, split, damage, part):
    path = toy.parent / f"{split}_images" / "annotations.json"
    path.write_text(damage(path.read_text()))
    refused(train, path, part)


def test_refuses_a_missing_data_set(tmp_path):
    """As a user meets it: a config of the project, its data nowhere."""
    config = "cascade_mask_rcnn_mamba_vision_tiny_3x_coco"
    result = subprocess.run(
        [sys.executable, TOOLS / "lazyconfig_train_net.py", "--config-file", config],
        cwd=tmp_path,
        env=os.environ
        | {"DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: annotation file " + str(tmp_path / "coco"))
    assert "DETECTRON2_DATASETS" in result.stderr
    assert not list(tmp_path.iterdir())


def test_writes_over_no_training(train, toy, refused):
    assert train("train.max_iter=1") == 0
    refused(train, toy.parent / "output", "--resume", "train.output_dir")


def test_refuses_to_resume_without_the_newest_checkpoint(train, toy, refused):
    assert train("train.max_iter=1") == 0
    newest = toy.parent / "output" / "model_final.pth"
    newest.write_bytes(newest.read_bytes()[:500])
    refused(lambda: train("--resume"), newest)
    newest.unlink()
    refused(lambda: train("--resume"), newest)


def test_ctrl_c_leaves_what_resume_needs(train, toy, capsys, monkeypatch):
    step = Trainer.run_step

    def stopped(trainer):
        if trainer.iter == 4:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(Trainer, "run_step", stopped)
    assert train("train.amp.enabled=false") == 130
    caught = capsys.readouterr()
    assert caught.err.splitlines()[-1] == "interrupted"
    newest = toy.parent / "output" / "model_0000002.pth"
    assert f"Interrupted in step 5; --resume goes on from {newest}" in caught.out

    monkeypatch.setattr(Trainer, "run_step", step)
    assert train("--resume") == 0
    assert "Resuming after step 3" in capsys.readouterr().out


def test_help_shows_every_option(tool, capsys):
    with pytest.raises(SystemExit) as exited:
        tool("lazyconfig_train_net")(["--help"])
    assert exited.value.code == 0
    said = capsys.readouterr().out
    for option in ("--config-file", "--num-gpus", "--num-machines", "--machine-rank"):
        assert option in said
    for option in ("--dist-url", "--resume", "--eval-only", "train.max_iter=1000"):
        assert option in said
