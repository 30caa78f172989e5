"""Everything switched on, in two processes: they stop together, and agree with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[3] / "tools" / "lazyconfig_train_net.py"

# The toy's AP is always 100: its second evaluation, after step 4, is in vain.
SWITCHES = (
    "train.max_iter=8",
    "train.eval_period=2",
    "train.best_metric=bbox/AP",
    "train.patience=1",
    "train.ema_decay=0.9",
    "train.val_loss=True",
    "train.draw_images=1",
    "train.eval_amp=bf16",
)


@pytest.mark.slow
def test_two_processes_agree_with_one(toy, train, read, metrics):
    start = train("train.max_iter=1") / "model_final.pth"
    switches = (*SWITCHES, f"train.init_checkpoint={start}")
    one, two = train(*switches, output=toy.parent / "one"), toy.parent / "two"
    overrides = [f"+{x}" for x in switches] + ["train.device=cpu", f"train.output_dir={two}"]
    result = subprocess.run(
        [sys.executable, TOOL, "--config-file", toy, "--num-gpus=2", "--dist-url=auto", *overrides],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Stopping early, after step 4" in result.stdout
    for name in ("model_final", "model_ema", "model_best"):
        expected, found = (read(folder / f"{name}.pth") for folder in (one, two))
        assert found["iteration"] == expected["iteration"] == (1 if name == "model_best" else 3)
        torch.testing.assert_close(
            found["model"]["conv.weight"], expected["model"]["conv.weight"], rtol=1e-4, atol=1e-5
        )
    for step in (1, 3):
        expected, found = (metrics(folder)[step]["val/total_loss"] for folder in (one, two))
        assert found == pytest.approx(expected, rel=1e-3)  # in bfloat16
