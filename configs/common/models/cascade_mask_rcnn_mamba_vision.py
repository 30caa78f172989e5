# Cascade Mask R-CNN with a MambaVision backbone, class-specific boxes and a mask head per stage.
# Detectron2's own Cascade R-CNN, and below it all that differs. Every width of the neck and of the
# heads follows backbone.out_channels.

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from mamba_vision.backbone import VARIANTS as _VARIANTS
from mamba_vision.backbone import MambaVision
from mamba_vision.box_regression import Box2BoxTransform
from mamba_vision.matcher import Matcher
from mamba_vision.proposal_generator import RPN, AnchorGenerator
from mamba_vision.roi_heads import (
    ClassSpecificCascadeROIHeads,
    ClassSpecificOutputLayers,
    MaskHead,
    ROIPooler,
)


def bottom_up(variant):
    """The backbone of a detector: wide windows, and a drop path of 0.2 for every variant."""
    return L(MambaVision)(
        **_VARIANTS[variant]
        | {
            "window_size": (8, 8, 112, 56),
            "drop_path_rate": 0.2,
            "out_features": ("res2", "res3", "res4", "res5"),
        }
    )


model = model_zoo.get_config("common/models/cascade_rcnn.py").model
_constants = model_zoo.get_config("common/data/constants.py").constants

model.pixel_mean = _constants.imagenet_rgb256_mean
model.pixel_std = _constants.imagenet_rgb256_std
model.input_format = "RGB"

model.backbone.bottom_up = bottom_up("tiny")

model.proposal_generator.anchor_generator._target_ = AnchorGenerator
model.proposal_generator.anchor_matcher._target_ = Matcher
model.proposal_generator.box2box_transform._target_ = Box2BoxTransform
model.proposal_generator.head.in_channels = "${...backbone.out_channels}"
model.proposal_generator.update(
    _target_=RPN,
    anchor_boundary_thresh=0,  # anchors that cross the image border are ignored
    smooth_l1_beta=1 / 9,
    post_nms_topk=(2000, 1000),
)

model.roi_heads.box_pooler._target_ = ROIPooler
model.roi_heads.mask_pooler._target_ = ROIPooler
model.roi_heads.pop("mask_head")
model.roi_heads.update(
    _target_=ClassSpecificCascadeROIHeads,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7),
            conv_dims=["${.....backbone.out_channels}"] * 4,
            fc_dims=[1024],
            conv_norm="SyncBN",
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(ClassSpecificOutputLayers)(
            input_shape=L(ShapeSpec)(channels=f"${{....box_heads[{stage}].fc_dims[0]}}"),
            box2box_transform=L(Box2BoxTransform)(weights=[1 / std for std in stds]),
            num_classes="${...num_classes}",
            test_score_thresh=0.05,
            box_reg_loss_type="giou",
            loss_weight={"loss_cls": weight, "loss_box_reg": 10.0 * weight},
        )
        for stage, (weight, stds) in enumerate(
            [
                (1.0, (0.1, 0.1, 0.2, 0.2)),
                (0.5, (0.05, 0.05, 0.1, 0.1)),
                (0.25, (0.033, 0.033, 0.067, 0.067)),
            ]
        )
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou in (0.5, 0.6, 0.7)
    ],
    mask_heads=[
        L(MaskHead)(
            input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=14, width=14),
            conv_dims=["${.....backbone.out_channels}"] * 5,
            num_classes="${...num_classes}",
            loss_weight=weight,
        )
        for weight in (1.0, 0.5, 0.25)
    ],
)
