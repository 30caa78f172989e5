"""The cascade in training: sampling, losses and gradients of every stage."""

import pytest
import torch
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import box_iou, roi_align

from mamba_vision.errors import UserError
from mamba_vision.matcher import Matcher
from mamba_vision.roi_heads import ClassSpecificOutputLayers
from mamba_vision.scalars import flush_scalars
from mamba_vision.training_graphs import TrainingGraphs

IOUS = (0.5, 0.6, 0.7)
WEIGHTS = (1.0, 0.5, 0.25)


def giou(a, b):
    """Generalised IoU of paired boxes, from its definition (arXiv:1902.09630), in float64."""
    a, b = a.double(), b.double()
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(dim=1) for x in (a, b))
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    outer = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    union = area_a + area_b - inner.prod(dim=1)
    return inner.prod(dim=1) / union - (outer.prod(dim=1) - union) / outer.prod(dim=1)


def decode(deltas, boxes, stds):
    """Boxes moved by deltas, from the definition (arXiv:1311.2524, appendix C)."""
    deltas = deltas.double() * torch.tensor(stds)
    sizes = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + sizes / 2 + deltas[:, :2] * sizes
    sizes = sizes * deltas[:, 2:].clamp(max=torch.tensor(1000 / 16).log()).exp()
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)


STDS = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]


def test_every_stage_samples_the_refined_boxes_of_the_one_before(
    make_heads, features, scene, train
):
    heads = make_heads(batch_size_per_image=24)
    proposals, targets = scene
    _, samples, predictions, _ = train(heads, features, proposals, targets)
    candidates = [p.proposal_boxes.tensor for p in proposals]
    for k, (samples_k, (logits, deltas)) in enumerate(zip(samples, predictions)):
        sizes = [len(s) for s in samples_k]
        next_candidates = []
        for i, (sample, logits_i, deltas_i) in enumerate(
            zip(samples_k, logits.split(sizes), deltas.split(sizes))
        ):
            gt = targets[i].gt_boxes.tensor
            boxes = sample.proposal_boxes.tensor
            # the samples are candidates or ground truth, each at most once, and marked as such
            pool = torch.cat([candidates[i], gt])
            places = [(pool == box).all(dim=1).nonzero().flatten().tolist() for box in boxes]
            assert all(len(p) == 1 for p in places)
            places = [p[0] for p in places]
            assert len(set(places)) == len(places)
            positive = (box_iou(pool, gt).amax(dim=1) >= IOUS[k]).sum().item()
            wanted = min(positive, 24 // 4)
            assert len(places) == wanted + min(len(pool) - positive, 24 - wanted)
            is_gt = torch.tensor([p >= len(candidates[i]) for p in places])
            assert torch.equal(is_gt, sample.is_ground_truth)
            # they are labelled by IoU with that stage's threshold
            best, matched = box_iou(boxes, gt).max(dim=1)
            labels = targets[i].gt_classes[matched].where(best >= IOUS[k], torch.tensor(3))
            assert torch.equal(sample.gt_classes, labels)
            assert torch.equal(sample.gt_boxes.tensor, gt[matched])
            assert (labels < 3).sum() == wanted >= 1
            # the next stage's candidates
            classes = labels.where(labels < 3, logits_i[:, :3].argmax(dim=1))
            deltas_i = deltas_i.view(-1, 3, 4)[torch.arange(len(boxes)), classes]
            refined = decode(deltas_i, boxes, STDS[k]).float()[~is_gt]
            limits = torch.tensor([96.0, 64, 96, 64])
            next_candidates.append(refined.clamp(min=0).minimum(limits))
        if k < 2:
            for i, sample in enumerate(samples[k + 1]):
                # round to what the cascade computed, that equality above can be exact
                boxes = sample.proposal_boxes.tensor[~sample.is_ground_truth]
                near = torch.cdist(boxes, next_candidates[i]).min(dim=1)
                assert near.values.max() < 1e-3
                next_candidates[i][near.indices] = boxes
        candidates = next_candidates


def test_losses_are_their_definitions(make_heads, features, scene, train):
    heads = make_heads()
    proposals, targets = scene
    losses, samples, predictions, _ = train(heads, features, proposals, targets)
    assert set(losses) == {
        f"loss_{part}_stage{k}" for part in ("cls", "box_reg", "mask") for k in range(3)
    }
    for k, (samples_k, (logits, deltas)) in enumerate(zip(samples, predictions)):
        labels = torch.cat([s.gt_classes for s in samples_k])
        boxes = torch.cat([s.proposal_boxes.tensor for s in samples_k])
        gt = torch.cat([s.gt_boxes.tensor for s in samples_k])
        log_p = logits.double().log_softmax(dim=1)
        loss_cls = -log_p[torch.arange(len(labels)), labels].mean() * WEIGHTS[k]
        assert_close(losses[f"loss_cls_stage{k}"].double(), loss_cls)

        foreground = (labels < 3).nonzero().flatten()
        assert len(foreground)
        decoded = decode(
            deltas.view(-1, 3, 4)[foreground, labels[foreground]], boxes[foreground], STDS[k]
        )
        loss_box = (1 - giou(decoded, gt[foreground])).sum() / len(labels) * 10 * WEIGHTS[k]
        assert_close(losses[f"loss_box_reg_stage{k}"].double(), loss_box, rtol=1e-4, atol=1e-5)

        terms = []
        for i, sample in enumerate(samples_k):
            for box, gt_box, label in zip(
                sample.proposal_boxes.tensor, sample.gt_boxes.tensor, sample.gt_classes
            ):
                if label == 3:
                    continue
                own = (targets[i].gt_boxes.tensor == gt_box).all(dim=1).nonzero().item()
                mask = targets[i].gt_masks.tensor[own][None, None].float()
                target = roi_align(mask, [box[None]], 28, 1.0, 0, True)[0, 0] >= 0.5
                pooled = heads.mask_pooler(
                    [features["p2"][i : i + 1], features["p3"][i : i + 1]],
                    [sample.proposal_boxes[:1].__class__(box[None])],
                )
                mask_logits = heads.mask_head[k].layers(pooled)[0, label].double()
                p = mask_logits.sigmoid().where(target, 1 - mask_logits.sigmoid())
                terms.append(-p.log().mean())
        loss_mask = torch.stack(terms).mean() * WEIGHTS[k]
        assert_close(losses[f"loss_mask_stage{k}"].double(), loss_mask, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_features_whole_and_stop_at_refined_boxes(
    make_heads, features, scene, train
):
    heads = make_heads(norm="")
    losses, samples, _, _ = train(heads, features, *scene)
    boxes = [s.proposal_boxes for s in samples[1]]
    pooled = heads.box_pooler([features["p2"], features["p3"]], boxes)
    logits, _ = heads.box_predictor[1](heads.box_head[1](pooled))
    loss = 0.5 * F.cross_entropy(logits, torch.cat([s.gt_classes for s in samples[1]]))
    expected = torch.autograd.grad(loss, features["p2"])
    assert_close(
        torch.autograd.grad(losses["loss_cls_stage1"], features["p2"], retain_graph=True), expected
    )
    first = list(heads.box_head[0].parameters()) + list(heads.box_predictor[0].parameters())
    later = sum(loss for name, loss in losses.items() if not name.endswith("stage0"))
    assert torch.autograd.grad(later, first, allow_unused=True) == (None,) * len(first)


def test_one_stage_of_one_class_trains_as_detectron2s(make_heads, parts, features, scene):
    everything = {"batch_size_per_image": 1000, "positive_fraction": 1.0}  # so no other numbers
    ours = make_heads(num_classes=1, stages=1, masks=False, **everything)
    theirs = CascadeROIHeads(**parts(1, stages=1, agnostic=True) | everything)
    theirs.load_state_dict(ours.state_dict())
    proposals, targets = scene
    for target in targets:
        target.gt_classes.zero_()
    results = []
    for heads in (ours, theirs):
        with EventStorage():
            _, losses = heads.train()(None, features, proposals, targets)
        grad = torch.autograd.grad(sum(losses.values()), heads.box_head[0].conv1.weight)
        results.append((losses, grad))
    assert_close(results[0], results[1])


NO_BOXES = ([], [])
CASES = {
    "one image without objects": ("scene", [([[8, 8, 40, 40]], [0]), NO_BOXES]),
    "no objects": ("scene", [NO_BOXES, NO_BOXES]),
    "one image without proposals": ("one", [([[8, 8, 40, 40]], [0]), ([[20, 4, 60, 60]], [1])]),
    "no proposals": ("none", [([[8, 8, 40, 40]], [0]), ([[20, 4, 60, 60]], [1])]),
    "no proposals, one image without objects": ("none", [([[8, 8, 40, 40]], [0]), NO_BOXES]),
    "nothing at all": ("none", [NO_BOXES, NO_BOXES]),
}


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize("append_gt", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_gradient_whatever_is_missing(
    make_heads, features, scene, proposals_at, targets_at, train, case, append_gt, norm
):
    given, objects = CASES[case]
    proposals = {
        "scene": scene[0],
        "one": [scene[0][0], proposals_at([])],
        "none": [proposals_at([]), proposals_at([])],
    }[given]
    targets = [targets_at(boxes, classes) for boxes, classes in objects]
    if case == "no objects":  # as Detectron2's mapper leaves an image without annotations
        for target in targets:
            target.remove("gt_masks")
    heads = make_heads(norm=norm, proposal_append_gt=append_gt)
    losses, _, _, _ = train(heads, features, proposals, targets)
    assert len(losses) == 9
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, buffer in heads.named_buffers():
        assert buffer.isfinite().all(), name


def test_without_foreground_only_the_class_loss_is_not_zero(
    make_heads, features, proposals_at, targets_at, train
):
    heads = make_heads(proposal_append_gt=False)
    far = [proposals_at([[60, 40, 90, 60], [70, 30, 80, 60]])] * 2
    targets = [targets_at([[2, 2, 20, 20]], [1])] * 2
    losses, _, _, _ = train(heads, features, far, targets)
    for k in range(3):
        assert losses[f"loss_box_reg_stage{k}"] == 0
        assert losses[f"loss_mask_stage{k}"] == 0
        assert losses[f"loss_cls_stage{k}"] > 0


def test_scalars_are_named_by_stage(make_heads, features, scene, train):
    _, _, _, storage = train(make_heads(), features, *scene)
    for k in range(3):
        for name in ("roi_head/num_fg_samples", "fast_rcnn/cls_accuracy", "mask_rcnn/accuracy"):
            assert f"stage{k}/{name}" in storage.histories()


def test_proposals_and_targets_are_left_as_they_were(make_heads, features, scene, train):
    proposals, targets = scene
    before = [set(x.get_fields()) for x in proposals + targets]
    boxes = [p.proposal_boxes.tensor.clone() for p in proposals]
    train(make_heads(), features, proposals, targets)
    assert [set(x.get_fields()) for x in proposals + targets] == before
    assert_close([p.proposal_boxes.tensor for p in proposals], boxes)


def _run_again(*runs):
    """Stands in for a recording, where there is no GPU."""
    with torch.random.fork_rng([]):
        for run in runs:
            run()
    return runs


def _graphs(heads):
    return [*heads._sampling, *heads._ending, *(head.graphs for head in heads.mask_head)]


@pytest.mark.parametrize("append_gt", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_recorded_steps_equal_the_others(make_heads, features, scene, train, device, append_gt):
    """Losses, statistics and gradients, whatever is drawn; most samples of an image are missing."""
    options = {"batch_size_per_image": 64, "proposal_append_gt": append_gt}
    options["proposal_matchers"] = [Matcher([iou], [0, 1]) for iou in IOUS]
    plain, recorded = make_heads(cuda_graphs=False, **options), make_heads(**options)
    recorded.load_state_dict(plain.state_dict())
    plain, recorded = plain.to(device), recorded.to(device)
    if device == "cpu":
        recorded._sampling = [TrainingGraphs(8, _run_again) for _ in range(3)]
        recorded._ending = [TrainingGraphs(8, _run_again) for _ in range(3)]
        for head in recorded.mask_head:
            head.graphs = TrainingGraphs(8, _run_again)
    proposals, targets = ([x.to(device) for x in group] for group in scene)
    for step in range(6):
        results = []
        for heads in (plain, recorded):
            torch.manual_seed(step)
            maps = {k: f.detach().to(device).requires_grad_() for k, f in features.items()}
            # an object less, and others, in some of the steps
            some = [t[step % 2 :] for t in targets]
            with EventStorage() as storage:
                _, losses = heads.train()(None, maps, proposals, some)
                flush_scalars()
            leaves = [*maps.values(), *heads.parameters()]
            gradients = torch.autograd.grad(sum(losses.values()), leaves)
            scalars = {name: value for name, (value, _) in storage.latest().items()}
            results.append((losses, gradients, scalars))
        (losses, gradients, scalars), (expected, others, noted) = results
        assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        assert_close(gradients, others, rtol=1e-3, atol=1e-5)
        assert scalars == pytest.approx(noted, rel=1e-2)
        assert len(scalars) > 10
    assert [graphs.recordings for graphs in _graphs(recorded)[:6]] == [1] * 6
    assert all(graphs.recordings for graphs in _graphs(recorded)[6:])


def test_a_predictor_with_losses_of_its_own_keeps_them(make_heads, features, scene, train):
    class Doubled(ClassSpecificOutputLayers):
        def losses(self, predictions, proposals):
            return {k: 2 * loss for k, loss in super().losses(predictions, proposals).items()}

    plain, doubled = make_heads(), make_heads()
    doubled.load_state_dict(plain.state_dict())
    for predictor in doubled.box_predictor:
        predictor.__class__ = Doubled
    results = []
    for heads in (plain, doubled):
        torch.manual_seed(0)
        results.append(train(heads, features, *scene)[0])
    for name, loss in results[0].items():
        assert_close(results[1][name], loss * (1 if "mask" in name else 2))


def test_low_quality_matches_are_one_clear_error(make_heads):
    matchers = [Matcher([0.5], [0, 1], allow_low_quality_matches=k == 1) for k in range(3)]
    with pytest.raises(UserError, match=r"proposal_matchers.1.allow_low.*set it to False") as error:
        make_heads(proposal_matchers=matchers)
    assert "\n" not in str(error.value)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_same_losses(make_heads, features, scene, train, dtype):
    """In half precision too, and with SyncBN; every RoI is sampled, so none is left to chance."""
    heads = make_heads(norm="SyncBN", batch_size_per_image=1000, positive_fraction=1.0)
    with torch.no_grad():  # boxes that barely move, whose labels no rounding changes
        for predictor in heads.box_predictor:
            predictor.bbox_pred.weight.mul_(1e-3)
    expected, _, _, _ = train(heads, features, *scene)
    features = {name: f.detach().cuda().requires_grad_() for name, f in features.items()}
    proposals, targets = ([x.to("cuda") for x in group] for group in scene)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        losses, _, _, _ = train(heads.cuda(), features, proposals, targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())
    rtol = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    for name, loss in expected.items():
        assert_close(losses[name].cpu().float(), loss, rtol=rtol, atol=rtol / 10)


@pytest.mark.cuda
@pytest.mark.parametrize("given", [True, False])
def test_a_gpu_trains_on_images_without_objects(
    make_heads, features, scene, proposals_at, targets_at, train, given
):
    proposals = scene[0] if given else [proposals_at([]), proposals_at([])]
    features = {name: f.detach().cuda() for name, f in features.items()}
    heads = make_heads(norm="SyncBN").cuda()
    with torch.autocast("cuda"):
        losses, _, _, _ = train(
            heads,
            features,
            [p.to("cuda") for p in proposals],
            [targets_at([], []).to("cuda") for _ in proposals],
        )
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
