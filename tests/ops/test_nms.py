"""Both backends of NMS against its definition in float64, and against torchvision.

The coordinates are whole numbers: areas are then exact in float32, and a tie is a tie for everyone.
Without a GPU Triton's kernels run in its interpreter.
"""

import pytest
import torch
from torchvision.ops import box_iou, nms

from mamba_vision.ops import grouped_nms
from mamba_vision.ops.nms import BACKENDS, triton_kernels, triton_nms

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 / 0

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def suppress(backend, boxes, valid, threshold):
    """By a backend; the interpreter takes tensors that the choice of a backend would refuse."""
    if backend == "triton":
        keep = triton_nms.run(boxes.to(DEVICE), valid.to(DEVICE), threshold=threshold)
    else:
        keep = grouped_nms(boxes, valid, threshold, backend=backend)
    assert keep.dtype == torch.bool
    return keep.cpu()


def by_definition(boxes, valid, threshold):
    keep = torch.zeros_like(valid)
    for boxes_g, valid_g, keep_g in zip(boxes.double(), valid, keep):
        overlaps = box_iou(boxes_g, boxes_g) > threshold
        for j in range(len(boxes_g)):
            keep_g[j] = valid_g[j] and not (keep_g[:j] & overlaps[:j, j]).any()
    return keep


def crowd(groups, n, places=40, most=30):
    """Boxes of sides from 1 to ``most`` at random places."""
    corners = torch.randint(0, places, (groups, n, 2))
    return torch.cat([corners, corners + torch.randint(1, most + 1, (groups, n, 2))], dim=2).float()


def chain(groups, n):
    """Each box overlaps the next two by more than a half: by turns kept and not."""
    left = 2.0 * torch.arange(n).expand(groups, n)
    return torch.stack([left, torch.zeros_like(left), left + 12, left + 20 - left], dim=2)


def repeated(groups, n):
    return torch.tensor([[0.0, 0, 8, 8], [40, 0, 48, 8], [0, 0, 8, 7]])[
        torch.randint(0, 3, (groups, n))
    ]


def degenerate(groups, n):
    """Some without area, some inside out."""
    boxes = crowd(groups, n)
    boxes[:, ::3, 2] = boxes[:, ::3, 0]
    boxes[:, 1::5, 3] = boxes[:, 1::5, 1]
    boxes[:, 2::7] = boxes[:, 2::7].roll(2, dims=2)
    boxes[:, 4::11] = 0
    return boxes


every_backend = pytest.mark.parametrize("backend", ["triton", "torchvision"])


@every_backend
def test_by_hand(backend):
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],
            [0, 0, 10, 5],  # half of the first: IoU 1/2, not more
            [0, 0, 10, 6],  # IoU 6/10 with the first, which suppresses it
            [0, 0, 10, 4],  # IoU 4/5 with the second
            [0, 2, 10, 6],  # IoU 2/5 with the first, 1/2 with the second; 4/6 with the third, gone
            [50, 50, 60, 60],  # the next one's, not valid
            [50, 50, 60, 60],
            [0, 0, 10, 10],
        ]
    )
    valid = torch.tensor([True] * 5 + [False, True, True])
    kept = torch.tensor([True, True, False, False, True, False, True, False])
    assert torch.equal(suppress(backend, boxes[None], valid[None], 0.5), kept[None])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 130])
@pytest.mark.parametrize("draw", [crowd, chain, repeated, degenerate])
@every_backend
def test_agrees_with_the_definition(backend, draw, n, threshold):
    boxes, valid = draw(3, n), torch.rand(3, n) < 0.8
    expected = by_definition(boxes, valid, threshold)
    assert torch.equal(suppress(backend, boxes, valid, threshold), expected)


def test_more_boxes_than_are_read_together(monkeypatch):
    monkeypatch.setattr(triton_nms, "WORDS", 2)
    boxes, valid = crowd(1, 230), torch.ones(1, 230, dtype=torch.bool)
    expected = by_definition(boxes, valid, 0.5)
    assert 0 < expected[:, 160:].sum() < 70
    assert torch.equal(suppress("triton", boxes, valid, 0.5), expected)


@every_backend
def test_what_is_not_valid_counts_for_nothing(backend):
    boxes, valid = crowd(4, 50), torch.rand(4, 50) < 0.5
    valid[2] = False
    expected = suppress(backend, boxes, valid, 0.5)
    assert not expected[2].any()
    for value in (float("nan"), float("inf")):
        spoilt = boxes.where(valid[..., None], value)
        assert torch.equal(suppress(backend, spoilt, valid, 0.5), expected)


@every_backend
@pytest.mark.parametrize(("groups", "n"), [(0, 5), (3, 0)])
def test_nothing_to_choose_from(backend, groups, n):
    keep = suppress(backend, torch.zeros(groups, n, 4), torch.ones(groups, n) > 0, 0.5)
    assert keep.shape == (groups, n)


@every_backend
def test_strided_views(backend):
    boxes, valid = crowd(40, 3), torch.rand(40, 3) < 0.8
    expected = suppress(
        backend, boxes.transpose(0, 1).contiguous(), valid.mT.contiguous(), threshold=0.5
    )
    assert torch.equal(suppress(backend, boxes.transpose(0, 1), valid.mT, 0.5), expected)


def test_the_operator_is_well_formed():
    inputs = (crowd(2, 20).to(DEVICE), torch.ones(2, 20, dtype=torch.bool, device=DEVICE), 0.5)
    torch.library.opcheck(torch.ops.mamba_vision.grouped_nms.default, inputs)


def test_wrong_arguments():
    boxes, valid = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"boxes must have shape \(G, n, C\) with C = 4"):
        grouped_nms(boxes[0], valid, 0.5)
    with pytest.raises(ValueError, match=r"valid must have shape \(G, n\) = \(2, 3\), not \(3,\)"):
        grouped_nms(boxes, valid[0], 0.5)
    with pytest.raises(TypeError, match=r"boxes must be torch\.float32, not torch\.float16"):
        grouped_nms(boxes.half(), valid, 0.5)
    with pytest.raises(TypeError, match=r"valid must be torch\.bool, not torch\.int64"):
        grouped_nms(boxes, valid.long(), 0.5)


@pytest.mark.cuda
@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize("n", [1, 33, 1000, 2000, 5000])
@pytest.mark.parametrize("draw", [crowd, chain, repeated, degenerate])
def test_agrees_with_torchvision_on_a_gpu(draw, n, groups):
    options = {"places": 800, "most": 200} if draw is crowd else {}
    boxes = draw(groups, n, **options).cuda()
    scores = -torch.arange(n, device="cuda").float()
    valid = torch.ones(groups, n, dtype=torch.bool, device="cuda")
    valid[groups // 2, ::2] = False
    keep = grouped_nms(boxes, valid, 0.7, backend="triton")
    for boxes_g, valid_g, keep_g in zip(boxes, valid, keep):
        places = valid_g.nonzero()[:, 0]
        expected = places[nms(boxes_g[places], scores[places], 0.7)]
        assert torch.equal(keep_g.nonzero()[:, 0], expected)


@pytest.mark.cuda
def test_a_cuda_graph_and_no_wait():
    assert BACKENDS.name_for(None, torch.zeros(1, device="cuda")) == "triton"
    boxes, others = crowd(4, 300).cuda(), crowd(4, 300).cuda()
    valid = torch.ones(4, 300, dtype=torch.bool, device="cuda")
    first, second = (grouped_nms(x, valid, 0.5) for x in (boxes, others))
    assert not torch.equal(first, second)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = grouped_nms(boxes, valid, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = grouped_nms(boxes, valid, 0.5)
    boxes.copy_(others)
    graph.replay()
    assert torch.equal(keep, second)


@pytest.mark.cuda
def test_the_number_of_boxes_compiles_nothing_anew():
    def compiled():
        kernels = (triton_kernels.find_overlaps, triton_kernels.choose)
        return [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels]

    def call(n):
        valid = torch.ones(2, n, dtype=torch.bool, device="cuda")
        assert grouped_nms(crowd(2, n).cuda(), valid, 0.5).any()

    for n in (512, 1024, 528, 500, 1030):  # n and the words divisible by 16, or either, or neither
        call(n)
    before = compiled()
    assert min(before) > 0
    for n in (70, 333, 600, 1200, 2001):
        call(n)
    assert compiled() == before
