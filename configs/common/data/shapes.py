# The drawn scenes of mamba_vision.data.shapes, at the size they are drawn.

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from mamba_vision.data import build_train_loader  # and shapes_train and shapes_val are registered
from mamba_vision.engine import COCOEvaluator

dataloader = model_zoo.get_config("common/data/coco.py").dataloader

dataloader.train._target_ = build_train_loader  # which --resume can put back to its place
dataloader.train.dataset.names = "shapes_train"
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.instance_mask_format = "bitmask"  # rings have holes: run-length masks
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True)]
dataloader.test.dataset.names = "shapes_val"
dataloader.test.mapper.augmentations = []
dataloader.evaluator._target_ = COCOEvaluator
