"""Several processes: what starts them, and that they do what one does."""

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

from mamba_vision.engine import do_train, load_config

TESTS = Path(__file__).parents[1]
TOOL = TESTS.parent / "tools" / "lazyconfig_train_net.py"


def environment(**variables):
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **variables,
    }


def finish(*processes):
    """Wait for processes; all have to succeed."""
    ended = [(p.communicate(timeout=300), p.returncode) for p in processes]
    for (out, err), code in ended:
        assert code == 0, out[-2000:] + err[-2000:]


def start(command, **variables):
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_arguments(arguments):
    return [start([sys.executable, TOOL, "--num-gpus=2", "--dist-url=auto", *arguments])]


def by_torchrun(arguments):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [start([*run, TOOL, *arguments])]


def by_srun(arguments):
    """The variables that srun sets for two tasks on one node."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    return [
        start([sys.executable, TOOL, *arguments], SLURM_PROCID=k, SLURM_LOCALID=k, **step)
        for k in "01"
    ]


def train(config_file, output, *overrides, resume=False):
    config = load_config(config_file, [f"train.output_dir={output}", *overrides])
    config.train.device = "cpu"
    config.train.amp.enabled = False
    seed_all_rng(config.train.seed)
    do_train(argparse.Namespace(resume=resume), config)
    return weights(output)


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_equal(actual, expected, tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_arguments, by_torchrun, by_srun])
def test_two_processes_equal_one(toy, tmp_path, launcher):
    """Gradients averaged, batch norms synchronised, detections gathered from both.

    What one process alone meets, a loss that is not finite or a bad image, both know.
    """
    (toy.parent / "train_images" / "4.png").write_bytes(b"no image")
    overrides = ["model.jitter=2.5", "model.poison=3.png", "+train.max_nonfinite=9"]
    overrides += ["train.device=cpu"]
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    expected = train(toy, one, *overrides)
    finish(*launcher(["--config-file", toy, f"train.output_dir={two}", *overrides]))
    names = ("conv.weight", "norm.weight", "norm.running_mean")
    expected = {name: expected[name] for name in names}
    assert_equal(weights(two), expected, 1e-5)
    results, shared = (json.loads((path / "results.json").read_text()) for path in (one, two))
    assert shared == results  # to the digit
    assert 0 < results["bbox"]["AP"] < 100

    skipped, both = (
        [json.loads(line) for line in (path / "nonfinite.jsonl").read_text().splitlines()]
        for path in (one, two)
    )
    steps = [record["iteration"] for record in skipped]
    assert 0 < len(steps) < 6
    assert [record["iteration"] for record in both] == [step for step in steps for _ in range(2)]
    for record in both:
        names = [Path(image["file_name"]).name for image in record["images"]]
        assert (record["losses"] == {"loss_toy": "nan"}) == (names == ["3.png"])
    saved = [torch.load(p / "model_final.pth", weights_only=True)["data"] for p in (one, two)]
    assert saved[0] == saved[1]
    assert [Path(name).name for name in saved[0]["bad_images"]] == ["4.png"]

    # One process goes on, after the third step, with the images that two would have taken.
    mixed.mkdir()
    shutil.copy(two / "model_0000002.pth", mixed)
    (mixed / "last_checkpoint").write_text("model_0000002.pth")
    assert_equal(train(toy, mixed, *overrides, resume=True), expected, 1e-5)


@pytest.mark.slow
def test_the_detector_learns_the_same_in_two_processes_and_in_two_parts(tmp_path):
    """Every loss, those of the masks too: each process, and each part, divides by its own RoIs."""
    config = TESTS / "data" / "fixed_nano_config.py"
    parts = train(config, tmp_path / "parts", "train.accumulate=2")
    arguments = ["--config-file", config, f"train.output_dir={tmp_path / 'two'}"]
    finish(*by_srun(arguments))
    assert_equal(weights(tmp_path / "two"), parts, 1e-5)


@pytest.mark.slow
def test_a_step_in_parts_equals_the_whole_step(tmp_path):
    """Where all images bring as many RoIs. Masks are left out: foreground RoIs differ."""
    config = TESTS / "data" / "fixed_nano_config.py"
    same = ("model.detector.roi_heads.proposal_append_gt=False",)
    same += ("model.detector.roi_heads.mask_heads=null",)
    whole = train(config, tmp_path / "whole", *same)
    for parts in (2, 4):
        changed = train(config, tmp_path / str(parts), f"train.accumulate={parts}", *same)
        assert_equal(changed, whole, 1e-6)
    first = train(config, tmp_path / "first", "train.max_iter=1", *same)
    moved = max((first[name] - whole[name]).abs().max().item() for name in whole)
    assert moved > 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(tmp_path):
    """Over NCCL, started by Detectron2's launch: the same losses and weights but for rounding."""
    config = TESTS / "data" / "fixed_nano_config.py"
    arguments = ["--config-file", config, "train.device=cuda", "train.amp.enabled=false"]
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_TF32_OVERRIDE": "0"}
    one = [*arguments, "train.accumulate=2", f"train.output_dir={tmp_path / 'one'}"]
    two = ["--num-gpus=2", "--dist-url=auto", *arguments, f"train.output_dir={tmp_path / 'two'}"]
    for command in (one, two):
        finish(start([sys.executable, TOOL, *command], **gpus))
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-4)
    losses = [
        [
            json.loads(line)["total_loss"]
            for line in (path / "metrics.json").read_text().splitlines()
        ]
        for path in (tmp_path / "one", tmp_path / "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


WORKER = """
import argparse, atexit, os, sys
from mamba_vision.engine.launching import launch

class Left:
    def __del__(self, write=os.write):
        write(1, b"torn down\\n")

def work(args):
    global left
    left = Left()
    atexit.register(sys.stdout.write, "tidied\\n")
    sys.stdout.write("worked\\n")
    raise SystemExit(args.code)

if __name__ == "__main__":
    words = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    launch(work, argparse.Namespace(code=int(sys.argv[1]), **words))
    print("returned")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("code", "last"), [(0, ["returned"]), (75, [])])
def test_processes_tidy_and_end_before_python_is_torn_down(tmp_path, code, last):
    """While it is torn down, a thread of gloo that lags behind may abort the process."""
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    process = start([sys.executable, script, code])
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert sorted(out.splitlines()) == sorted(2 * ["worked", "tidied"] + last)
