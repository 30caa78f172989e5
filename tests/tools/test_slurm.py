"""The batch scripts, with stand-ins for srun and scontrol."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mamba_vision.engine.stopping import EXIT_CODE

SCRIPTS = Path(__file__).parents[2] / "tools" / "slurm"


@pytest.fixture
def start(tmp_path):
    """Start a script; its srun does what is asked for."""

    def run(script, srun, *arguments):
        for name, body in {"srun": srun, "scontrol": 'echo "$@" > requeued'}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", SCRIPTS / script, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "SLURM_JOB_ID": "42", "PYTHON": "python"},
            stdout=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (EXIT_CODE, True), (137, False)]
)
def test_a_stopped_training_goes_back_into_the_queue(start, tmp_path, code, requeued):
    job = start(
        "train.sbatch", f'echo "$@" > called; exit {code}', "--config-file", "a b.py", "x=1"
    )
    job.communicate(timeout=60)
    assert job.returncode == code
    called = (tmp_path / "called").read_text()
    assert called.endswith(
        "python tools/lazyconfig_train_net.py --resume --config-file a b.py x=1\n"
    )
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n"


def test_a_signal_to_the_script_does_not_end_its_waiting(start, tmp_path):
    job = start(
        "train.sbatch",
        f"touch started; while [ ! -e stop ]; do sleep 0.05; done; exit {EXIT_CODE}",
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        job.send_signal(number)
        time.sleep(0.1)
        assert job.poll() is None
    (tmp_path / "stop").touch()
    job.communicate(timeout=60)
    assert job.returncode == EXIT_CODE
    assert (tmp_path / "requeued").exists()


def test_evaluation(start, tmp_path):
    job = start("test.sbatch", 'echo "$@" > called; exit 2', "--config-file", "a.py")
    job.communicate(timeout=60)
    assert job.returncode == 2
    assert "--eval-only --config-file a.py" in (tmp_path / "called").read_text()
    assert not (tmp_path / "requeued").exists()
