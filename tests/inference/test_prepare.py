"""A prepared detector finds what the model finds."""

import copy
import warnings

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import box_iou

from mamba_vision import UserError, model_zoo
from mamba_vision.inference import Graphs, prepare

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"
SIZES = [(90, 130), (130, 90), (64, 64)]


def nano(device="cpu", edit=lambda config: None, **roi_heads):
    """The nano detector, with weights and statistics that find something in noise."""
    config = model_zoo.get_config(NANO).model
    for predictor in config.roi_heads.box_predictors:
        predictor.update(test_score_thresh=0.15, test_topk_per_image=30)
    config.roi_heads.update(roi_heads)
    edit(config)
    model = instantiate(config).eval()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean, std=0.1)
    for predictor in model.roi_heads.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=0.1)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.01)
    for head in model.roi_heads.mask_head if model.roi_heads.mask_on else ():
        nn.init.normal_(head.predictor.weight, std=0.1)
    return model.to(device)


def images(*sizes):
    """Noise of the given sizes, the results wanted in another size."""
    return [
        {
            "image": torch.randint(256, (3, height, width), dtype=torch.uint8),
            "height": 2 * height,
            "width": 2 * width,
        }
        for height, width in sizes
    ]


def assert_same(found, expected, tolerance=1e-3):
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert list(f) == ["instances"]
        f, e = f["instances"], e["instances"]
        assert f.image_size == e.image_size
        assert list(f.get_fields()) == list(e.get_fields())
        assert len(f) == len(e)
        close = {"rtol": 0, "atol": tolerance}
        torch.testing.assert_close(f.pred_boxes.tensor, e.pred_boxes.tensor, rtol=0, atol=0.1)
        torch.testing.assert_close(f.scores, e.scores, **close)
        assert torch.equal(f.pred_classes, e.pred_classes)
        assert f.pred_masks.shape == e.pred_masks.shape
        if len(e):
            assert (f.pred_masks != e.pred_masks).float().mean() < 1e-3


@torch.no_grad()
def run(model, inputs):
    return model(copy.deepcopy(inputs))


@pytest.fixture
def played():
    """Graphs that on a CPU do all that they do on a GPU, except to be fast."""
    return Graphs(torch.device("cpu"), record=lambda *runs: runs)


@pytest.mark.parametrize("fuse", [False, True])
def test_finds_the_same(fuse):
    model = nano()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model.train(), fuse=fuse)
    assert model.training
    assert not any(m.training for m in prepared.train().modules())
    assert any(isinstance(m, _BatchNorm) for m in prepared.modules()) != fuse
    total = 0
    for sizes in (SIZES, SIZES[:1], SIZES[1:]):
        inputs = images(*sizes)
        expected = run(model.eval(), inputs)
        assert_same(prepared(inputs), expected)
        total += sum(len(e["instances"]) for e in expected)
    assert total > 20
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def compare_over_sizes(model, prepare_it, same):
    """Call both again and again, on images of both orientations, alone and in batches.

    Once few objects are found and once many. A graph holds the threshold that it was recorded with.
    """
    counts = set()
    for threshold in (0.15, 0.42):
        getattr(model, "model", model).roi_heads.box_predictor[-1].test_score_thresh = threshold
        prepared = prepare_it()
        prepared.model.roi_heads.box_predictor[-1].test_score_thresh = threshold
        for _ in range(3):
            for sizes in (SIZES[:1], SIZES[1:2], SIZES, SIZES[:1] * 2):
                inputs = images(*sizes)
                expected = run(model, inputs)
                counts |= {len(e["instances"]) for e in expected}
                same(run(prepared, inputs), expected)
        assert prepared.graphs.captures == 12  # of four forms: backbone, detections and masks
    assert min(counts) <= 16 < max(counts)


def test_graphs_change_nothing():
    """In their padding, in memory that is used again and again, and whatever comes in between."""
    model = nano()

    def prepare_it():
        prepared = prepare(model)
        prepared.use_graphs(Graphs(torch.device("cpu"), record=lambda *runs: runs))
        return prepared

    compare_over_sizes(model, prepare_it, assert_same)


def test_results_are_not_overwritten_by_the_next_image(played):
    prepared = prepare(nano())
    prepared.use_graphs(played)
    inputs = [images(SIZES[0]) for _ in range(6)]
    found = [prepared(x) for x in inputs[2:]]
    kept = copy.deepcopy(found)
    prepared(inputs[0])
    for f, k in zip(found, kept):
        assert_same(f, k, tolerance=0)


@pytest.mark.parametrize("threshold", [2.0, -1.0])
def test_no_detection_and_as_many_as_there_may_be(played, threshold):
    model = nano()
    model.roi_heads.box_predictor[-1].test_score_thresh = threshold
    prepared = prepare(model)
    prepared.use_graphs(played)
    for _ in range(3):
        inputs = images(SIZES[0], SIZES[2])
        expected = run(model, inputs)
        assert {len(e["instances"]) for e in expected} == {0 if threshold > 1 else 30}
        assert_same(prepared(inputs), expected)


def test_no_proposal(played):
    model = nano()
    model.proposal_generator.min_box_size = 1e4
    prepared = prepare(model)
    prepared.use_graphs(played)
    for _ in range(3):
        found = prepared(images(*SIZES))
        assert [len(f["instances"]) for f in found] == [0, 0, 0]
        assert found[0]["instances"].pred_masks.shape == (0, 180, 260)


def test_without_masks(played):
    model = nano(mask_heads=None)
    prepared = prepare(model)
    prepared.use_graphs(played)
    for _ in range(3):
        inputs = images(*SIZES)
        for f, e in zip(prepared(inputs), run(model, inputs)):
            assert not f["instances"].has("pred_masks")
            torch.testing.assert_close(
                f["instances"].pred_boxes.tensor, e["instances"].pred_boxes.tensor
            )


def replace_pooler(config):
    config.roi_heads.box_pooler._target_ = ROIPooler


def replace_anchors(config):
    config.proposal_generator.anchor_generator._target_ = DefaultAnchorGenerator


def replace_predictor(config):
    config.roi_heads.box_predictors[-1]._target_ = FastRCNNOutputLayers


def replace_rpn(config):
    config.proposal_generator._target_ = RPN


@pytest.mark.parametrize(
    ("replace", "graphs"),
    [
        (replace_pooler, 2),  # of the backbone and the proposals
        (replace_predictor, 2),
        (replace_anchors, 1),
        (replace_rpn, 1),
    ],
)
def test_parts_that_would_wait_for_a_gpu_run_as_they_are(played, replace, graphs):
    model = nano(edit=replace)
    prepared = prepare(model)
    prepared.use_graphs(played)
    for _ in range(3):
        inputs = images(SIZES[0])
        assert_same(prepared(inputs), run(model, inputs))
    assert played.captures == graphs


def test_boxes_that_are_empty_when_rescaled_are_dropped_as_detectron2_does(played):
    model = nano(mask_heads=None)
    tiny = 1e-45  # the least number, of which half is none
    boxes = torch.tensor(
        [[4.0, 6, 30, 50], [9, 9, 9, 40], [0, 3, 64, 3], [0, 0, 64, tiny], [20, 8, 70, 90], [0] * 4]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, -torch.inf])
    classes = torch.arange(6) % 3
    inputs = [{"image": torch.zeros(3, 64, 64), "height": 32, "width": 200}]
    raw = Instances(
        (64, 64), pred_boxes=Boxes(boxes[:5].clone()), scores=scores[:5], pred_classes=classes[:5]
    )
    expected = detector_postprocess(raw, 32, 200)
    assert expected.scores.tolist() == scores[[0, 4]].tolist()
    prepared = prepare(model)
    rois = torch.arange(6)
    found = boxes[None], scores[None], classes[None], rois[None], torch.tensor([5])
    prepared.model.roi_heads.detect = lambda *args: found
    prepared.use_graphs(played)
    for _ in range(3):
        same = prepared(inputs)[0]["instances"]
        assert same.image_size == (32, 200)
        torch.testing.assert_close(same.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(same.scores, expected.scores)
        assert torch.equal(same.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "fp16"])
def test_cast_weights_give_what_autocast_gives(dtype):
    """Exactly: they are rounded before instead of in every call."""
    model = nano().to(memory_format=torch.channels_last)
    prepared = prepare(model, dtype=dtype, fuse=False)
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    mixer = prepared.model.backbone.bottom_up.levels[2].blocks[0].mixer
    for name, parameter in mixer.named_parameters():
        as_it_is = name in ("A_log", "D", "conv1d_x.weight", "conv1d_z.weight", "dt_proj.bias")
        assert parameter.dtype == (torch.float32 if as_it_is else half)
    assert all(
        p.dtype == torch.float32
        for m in prepared.modules()
        if isinstance(m, (nn.LayerNorm, _BatchNorm))
        for p in m.parameters()
    )
    for sizes in (SIZES, SIZES[:1]):
        inputs = images(*sizes)
        with torch.autocast("cpu", dtype=half):
            expected = run(model, inputs)
        found = prepared(inputs)
        assert not torch.is_autocast_enabled("cpu")
        assert found[0]["instances"].scores.dtype == expected[0]["instances"].scores.dtype
        for f, e in zip(found, expected):
            assert len(e["instances"]) > 0
            for name, value in e["instances"].get_fields().items():
                same = f["instances"].get(name)
                if name == "pred_boxes":
                    value, same = value.tensor, same.tensor
                assert torch.equal(same, value), name


def test_a_model_that_is_not_known_runs_as_it_is(played):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, inputs):
            return [{"mean": self.conv(x["image"].float()).mean((1, 2))} for x in inputs]

    model = Own()
    prepared = prepare(model, dtype="bf16")
    prepared.use_graphs(played)
    assert prepared.model.conv.weight.dtype == torch.float32
    inputs = images(*SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(inputs)
    for f, e in zip(prepared(inputs), expected):
        assert torch.equal(f["mean"], e["mean"])
    assert played.captures == 0


def test_precisions_that_are_none_are_refused():
    for dtype in ("fp8", torch.int8):
        with pytest.raises(UserError, match=r"dtype=\w+ is no precision; give fp16 or bf16"):
            prepare(nn.Linear(1, 1), dtype=dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("fuse", [False, True])
def test_on_a_gpu_it_finds_the_same(fuse, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = nano("cuda")
    compare_over_sizes(model, lambda: prepare(model, fuse=fuse), assert_same)


def assert_alike(found, expected):
    """Most of the detections are the same, in half precision: which one is suppressed may vary."""
    for f, e in zip(found, expected):
        f, e = f["instances"], e["instances"]
        assert abs(len(f) - len(e)) <= 2 + 0.2 * len(e)
        if len(f) and len(e):
            overlap = box_iou(e.pred_boxes.tensor, f.pred_boxes.tensor)
            overlap[e.pred_classes[:, None] != f.pred_classes] = 0
            best, place = overlap.max(dim=1)
            kept = best > 0.8
            assert kept.sum() >= 0.8 * len(e) - 2
            difference = (e.scores - f.scores[place]).abs()[kept]
            assert difference.numel() == 0 or difference.max() < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_so_it_does_in_half_precision(dtype):
    model = nano("cuda")
    plain = prepare(model, fuse=False, cuda_graphs=False, dtype=dtype)
    compare_over_sizes(plain, lambda: prepare(model, dtype=dtype), assert_alike)


@pytest.mark.cuda
def test_its_memory_goes_with_it():
    model = nano("cuda")
    inputs = images(*SIZES)
    left = []
    for _ in range(2):  # the first time leaves a library's workspace
        prepared = prepare(model)
        for _ in range(3):
            prepared(inputs)
        assert prepared.graphs.captures
        del prepared
        left.append(torch.cuda.memory_allocated())
    assert left[1] <= left[0]


@pytest.mark.cuda
def test_it_waits_for_the_numbers_of_detections_alone():
    """That wait, for an event, PyTorch does not warn of; images uploaded before need none."""
    prepared = prepare(nano("cuda"))
    inputs = [x | {"image": x["image"].cuda()} for x in images(*SIZES)]
    for _ in range(3):
        found = prepared(inputs)
    assert sum(len(x["instances"]) for x in found) > 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            prepared(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in waits if "synchroniz" in str(w.message)]
