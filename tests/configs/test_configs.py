"""The configs: what they build, and the recipe they hold."""

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import LRMultiplier
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from mamba_vision import model_zoo
from mamba_vision.roi_heads import ROIPooler

COCO = "cascade_mask_rcnn_mamba_vision_{}_3x_coco"
BOXES = "cascade_rcnn_mamba_vision_{}_3x_coco"
LEAVES = [name.format(size) for name in (COCO, BOXES) for size in ("tiny", "small", "base")] + [
    "cascade_mask_rcnn_mamba_vision_nano_shapes"
]


def parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_leaf_is_listed_here():
    assert set(model_zoo.names()) >= set(LEAVES)


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_holds_what_detectron2s_tool_reads_and_no_more(name):
    config = model_zoo.get_config(name)
    assert set(config) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    assert set(config.dataloader) == {"train", "test", "evaluator"}
    assert config.train.output_dir.endswith(name)
    assert config.dataloader.train.mapper.image_format == "RGB"
    assert config.model.input_format == "RGB"


@pytest.mark.parametrize(
    ("size", "count"), [("tiny", 89_202_034), ("small", 107_482_034), ("base", 154_894_066)]
)
def test_detectors_have_the_references_parameters(size, count):
    with torch.device("meta"):
        model = instantiate(model_zoo.get_config(COCO.format(size)).model)
    assert parameters(model) == count


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_detectors_without_masks_are_the_others_without_mask_heads(size):
    configs = [model_zoo.get_config(name.format(size)) for name in (COCO, BOXES)]
    with torch.device("meta"):
        whole, boxes = (
            {n: p.shape for n, p in instantiate(c.model).named_parameters()} for c in configs
        )
    assert boxes == {n: shape for n, shape in whole.items() if "mask_head" not in n}
    assert len(boxes) == len(whole) - 3 * 12  # 4 convs, a deconvolution and a predictor a stage
    assert instantiate(configs[0].dataloader.train.mapper).use_instance_mask
    assert not instantiate(configs[1].dataloader.train.mapper).use_instance_mask
    for part in ("optimizer", "lr_multiplier"):
        assert configs[0][part] == configs[1][part]


@pytest.mark.parametrize(("size", "lr"), [("tiny", 1e-4), ("small", 1e-4), ("base", 2e-4)])
def test_coco_recipe(size, lr):
    config = model_zoo.get_config(COCO.format(size))
    assert list(config.model.backbone.bottom_up.window_size) == [8, 8, 112, 56]
    assert config.model.backbone.bottom_up.drop_path_rate == 0.2
    assert config.train.amp.enabled
    assert config.dataloader.train.total_batch_size == 16
    config.optimizer.params.model = torch.nn.ModuleDict({"backbone": torch.nn.LayerNorm(2)})
    config.optimizer.params.no_decay = []
    optimizer = instantiate(config.optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    schedule = LRMultiplier(optimizer, instantiate(config.lr_multiplier), config.train.max_iter)
    rates = {}
    for step, expected in (
        (0, 0.001),
        (500, 0.5005),  # half-way from 0.001 to 1
        (1000, 1),
        (27 * 7330 - 1, 1),
        (27 * 7330, 0.1),
        (33 * 7330 - 1, 0.1),
        (33 * 7330, 0.01),
        (36 * 7330 - 1, 0.01),
    ):
        schedule.last_epoch = step
        rates[step] = schedule.get_lr()[0]
        assert rates[step] == pytest.approx(lr * expected)
    assert config.train.max_iter == 36 * 7330
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05


def test_the_schedule_follows_train_max_iter():
    config = model_zoo.get_config(COCO.format("tiny"))
    LazyConfig.apply_overrides(config, ["train.max_iter=1600", "lr_multiplier.warmup_iters=100"])
    schedule = instantiate(config.lr_multiplier)
    for step, factor in ((100, 1), (1199, 1), (1200, 0.1), (1466, 0.1), (1467, 0.01)):
        assert schedule(step / 1600) == pytest.approx(factor)  # 27/36 and 33/36 of 1600
    LazyConfig.apply_overrides(config, ["train.max_iter=3"])  # shorter than the warm-up
    schedule = instantiate(config.lr_multiplier)
    assert [schedule(step / 3) for step in range(3)] == pytest.approx(
        [0.001, 0.001 + 0.00999, 0.001 + 0.01998]
    )


def test_weight_decay_spares_what_the_reference_spares():
    with torch.device("meta"):
        model = instantiate(model_zoo.get_config(COCO.format("base")).model)
    config = model_zoo.get_config(COCO.format("base"))
    config.optimizer.params.model = model
    spared, decayed = set(), set()
    names = {id(p): name for name, p in model.named_parameters()}
    for group in instantiate(config.optimizer).param_groups:
        (decayed if group["weight_decay"] else spared).update(names[id(p)] for p in group["params"])
    assert len(spared) + len(decayed) == len(names)
    up = "backbone.bottom_up"
    for name in (
        f"{up}.levels.0.blocks.0.norm1.weight",
        f"{up}.levels.1.blocks.2.norm2.bias",
        f"{up}.levels.2.blocks.9.norm1.bias",
        f"{up}.levels.3.blocks.0.norm2.weight",
        f"{up}.outnorm0.weight",
        f"{up}.outnorm3.bias",
    ):
        assert name in spared
    for name in (
        f"{up}.patch_embed.conv_down.1.weight",
        f"{up}.patch_embed.conv_down.4.bias",
        f"{up}.levels.0.blocks.0.conv1.bias",
        f"{up}.levels.2.blocks.0.mixer.A_log",
        f"{up}.levels.2.blocks.0.mixer.D",
        f"{up}.levels.2.blocks.0.mixer.dt_proj.bias",
        f"{up}.levels.2.blocks.0.gamma_1",
        "backbone.fpn_lateral2.bias",
        "proposal_generator.rpn_head.conv.weight",
        "roi_heads.box_head.0.conv1.norm.weight",
        "roi_heads.box_head.2.conv4.norm.bias",
        "roi_heads.box_predictor.1.bbox_pred.bias",
        "roi_heads.mask_head.2.predictor.weight",
    ):
        assert name in decayed
    # two norms of two numbers a block, and the four features'
    assert len(spared) == (3 + 3 + 10 + 5) * 4 + 4 * 2


def test_what_differs_from_detectron2s_cascade():
    model = model_zoo.get_config(COCO.format("tiny")).model
    assert list(model.pixel_mean) == [123.675, 116.28, 103.53]
    assert list(model.pixel_std) == [58.395, 57.12, 57.375]
    with torch.device("meta"):
        detector = instantiate(model)
    rpn, heads = detector.proposal_generator, detector.roi_heads
    assert rpn.anchor_boundary_thresh == 0
    assert rpn.smooth_l1_beta == pytest.approx(1 / 9)
    assert rpn.pre_nms_topk == {True: 2000, False: 1000}
    assert rpn.post_nms_topk == {True: 2000, False: 1000}
    for predictor, matcher, mask_head, weight, iou, weights in zip(
        heads.box_predictor,
        heads.proposal_matchers,
        heads.mask_head,
        (1, 0.5, 0.25),
        (0.5, 0.6, 0.7),
        ((10, 5), (20, 10), (1 / 0.033, 1 / 0.067)),
    ):
        assert predictor.loss_weight == {"loss_cls": weight, "loss_box_reg": 10 * weight}
        assert predictor.box_reg_loss_type == "giou"
        wx, wy, ww, wh = predictor.box2box_transform.weights
        assert (wx, wy, ww, wh) == pytest.approx((weights[0],) * 2 + (weights[1],) * 2)
        assert matcher.thresholds[1] == iou
        assert mask_head.loss_weight == weight
    assert type(heads.box_pooler) is type(heads.mask_pooler) is ROIPooler
    assert all(
        isinstance(conv.norm, torch.nn.SyncBatchNorm)
        for head in heads.box_head
        for conv in head.conv_norm_relus
    )


def test_every_width_follows_few_numbers():
    """A detector of other sizes is a handful of overrides."""
    config = model_zoo.get_config(COCO.format("tiny"))
    LazyConfig.apply_overrides(
        config,
        [
            "model.backbone.bottom_up.dim=16",
            "model.backbone.out_channels=24",
            "model.roi_heads.num_classes=5",
            *(f"model.roi_heads.box_heads.{k}.fc_dims=[32]" for k in range(3)),
        ],
    )
    detector = instantiate(config.model)
    shapes = {name: tuple(p.shape) for name, p in detector.named_parameters()}
    assert shapes["backbone.fpn_lateral5.weight"] == (24, 128, 1, 1)
    assert shapes["proposal_generator.rpn_head.conv.weight"] == (24, 24, 3, 3)
    for k in range(3):
        assert shapes[f"roi_heads.box_head.{k}.conv4.weight"] == (24, 24, 3, 3)
        assert shapes[f"roi_heads.box_head.{k}.fc1.weight"] == (32, 24 * 49)
        assert shapes[f"roi_heads.box_predictor.{k}.cls_score.weight"] == (6, 32)
        assert shapes[f"roi_heads.box_predictor.{k}.bbox_pred.weight"] == (20, 32)
        assert shapes[f"roi_heads.mask_head.{k}.mask_fcn4.weight"] == (24, 24, 3, 3)
        assert shapes[f"roi_heads.mask_head.{k}.predictor.weight"] == (5, 24, 1, 1)


def test_coco_images_are_resized_as_the_recipe_says():
    config = model_zoo.get_config(COCO.format("tiny")).dataloader
    augmentations = instantiate(config.train.mapper).augmentations
    lengths = set(range(480, 801, 32))
    kept = cropped = 0
    for seed in range(300):
        seed_all_rng(seed)
        image = np.zeros((427, 640, 3), np.uint8)
        resize = augmentations(T.AugInput(image)).transforms[-1]
        short, long = sorted((resize.new_h, resize.new_w))
        assert long <= 1333
        assert short in lengths or long == 1333
        # a crop of a picture of 400, 500 or 600 rows, of which one side may be whole
        if (resize.h, resize.w) == (427, 640):
            kept += 1
        else:
            assert 384 <= resize.h <= 600
            assert 384 <= resize.w <= 600
            cropped += 1
    assert min(kept, cropped) > 107  # even odds: 150, less five standard deviations of 8.7
    test = instantiate(config.test.mapper).augmentations
    for size, expected in (((427, 640), (800, 1199)), ((300, 900), (444, 1333))):
        (resize,) = test(T.AugInput(np.zeros((*size, 3), np.uint8))).transforms
        assert (resize.new_h, resize.new_w) == expected


@pytest.mark.parametrize("objects", [True, False])
def test_a_step_of_the_nano_detector_reaches_every_parameter(objects):
    model = instantiate(model_zoo.get_config(LEAVES[-1]).model).train()
    batch = []
    for height, width in ((64, 96), (70, 50)):
        instances = Instances((height, width))
        boxes = [[8.0, 8.0, 40.0, 48.0]] if objects else []
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.tensor([1] * len(boxes), dtype=torch.int64)
        instances.gt_masks = BitMasks(torch.ones(len(boxes), height, width, dtype=torch.bool))
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
