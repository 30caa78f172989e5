# The drawn scenes of mamba_vision.data.shapes, at the size they are drawn.

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

import mamba_vision.data  # registers shapes_train and shapes_val

dataloader = model_zoo.get_config("common/data/coco.py").dataloader

dataloader.train.dataset.names = "shapes_train"
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.instance_mask_format = "bitmask"  # rings have holes: run-length masks
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True)]
dataloader.test.dataset.names = "shapes_val"
dataloader.test.mapper.augmentations = []
