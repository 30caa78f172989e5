"""A training that is killed at given moments and resumed, over and over; run as a script.

    killed.py CONFIG MOMENTS OVERRIDE...

MOMENTS is a JSON list. A number is a delay in seconds after the first step of a run; "write" is
inside the second checkpoint, half of whose bytes are written, and "tag" before the note which
checkpoint is the newest. Every run is a fork of this process, which has imported all: a new one
would take seconds. Prints a line of JSON for each run, then lets a run end.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback

import torch
from detectron2.utils.env import seed_all_rng

from mamba_vision.checkpoint import MambaVisionCheckpointer
from mamba_vision.engine import do_train, load_config
from mamba_vision.engine.trainer import Trainer


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(moment, started):
    """Let this process tell its first step, and die where it is to."""
    step = Trainer.run_step

    def run_step(self):
        step(self)
        os.write(started, b"%d\n" % self.iter)

    Trainer.run_step = run_step
    save, tag, count = torch.save, MambaVisionCheckpointer.tag_last_checkpoint, [0]

    def half(data, file):
        count[0] += 1
        save(data, file)
        if moment == "write" and count[0] == 2:
            file.truncate(file.tell() // 2)
            file.flush()
            kill()

    def untagged(self, name):
        if moment == "tag" and count[0] == 2:
            kill()
        tag(self, name)

    torch.save = half
    MambaVisionCheckpointer.tag_last_checkpoint = untagged


def run(config_file, overrides, moment):
    """Resume in a process of its own; returns how it ended, its first step and its last."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        prepare(moment, writing)
        config = load_config(config_file, overrides)
        seed_all_rng(config.train.seed)
        code = 1
        try:
            do_train(argparse.Namespace(resume=True), config)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as steps:
        first = last = steps.readline().strip()
        if isinstance(moment, (int, float)):
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
        for line in steps:  # until the process has ended
            last = line.strip()
    status = os.waitpid(child, 0)[1]
    return {"code": os.waitstatus_to_exitcode(status), "first": first, "last": last}


if __name__ == "__main__":
    config_file, moments, *overrides = sys.argv[1:]
    for moment in [*json.loads(moments), None]:
        print(json.dumps(run(config_file, overrides, moment)), flush=True)
