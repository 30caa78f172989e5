# COCO 2017, read and resized by OpenCV as for the released weights. In training: flip; then, with
# even odds, a resize, or a resize, a crop and a resize (the augmentation of DETR).

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from mamba_vision.data import build_train_loader
from mamba_vision.data.bitmasks import BitmaskMapper
from mamba_vision.data.mappers import OpenCVDatasetMapper, OpenCVResize
from mamba_vision.engine import COCOEvaluator

dataloader = model_zoo.get_config("common/data/coco.py").dataloader

dataloader.train._target_ = build_train_loader  # which --resume can put back to its place
dataloader.train.mapper.update(
    _target_=BitmaskMapper,
    image_format="RGB",
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.RandomApply)(
            tfm_or_aug=L(T.AugmentationList)(
                augs=[
                    L(OpenCVResize)(short_edge_length=(400, 500, 600), max_size=4200),
                    L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
                ]
            ),
            prob=0.5,
        ),
        L(OpenCVResize)(short_edge_length=tuple(range(480, 801, 32)), max_size=1333),
    ],
)
dataloader.test.mapper.update(
    _target_=OpenCVDatasetMapper,
    augmentations=[L(OpenCVResize)(short_edge_length=800, max_size=1333)],
)
dataloader.evaluator._target_ = COCOEvaluator
