"""What the tools add to Detectron2's engine."""

from .coco_evaluator import COCOEvaluator
from .config import find_config, load_config
from .drawing import draw_instances
from .evaluation import do_test
from .images import find_images, name_pictures, write_png
from .launching import check_processes, launch
from .machine import build_model, fit_to_machine
from .own_data import drop_masks, fit_to_data
from .predictor import Predictor
from .train import do_train
from .train_net import argument_parser, train_net

__all__ = [
    "COCOEvaluator",
    "Predictor",
    "argument_parser",
    "build_model",
    "check_processes",
    "do_test",
    "do_train",
    "draw_instances",
    "drop_masks",
    "find_config",
    "find_images",
    "fit_to_data",
    "fit_to_machine",
    "launch",
    "load_config",
    "name_pictures",
    "train_net",
    "write_png",
]
