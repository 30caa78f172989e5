"""What the tools add to Detectron2's engine."""

from .config import find_config, load_config
from .evaluation import do_test
from .machine import build_model, check_processes, fit_to_machine, launch
from .train import do_train
from .train_net import argument_parser, train_net

__all__ = [
    "argument_parser",
    "build_model",
    "check_processes",
    "do_test",
    "do_train",
    "find_config",
    "fit_to_machine",
    "launch",
    "load_config",
    "train_net",
]
