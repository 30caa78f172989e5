"""Every backend of RoIAlign over levels against torchvision's kernel in float64, level by level."""

import pytest
import torch
from torchvision.ops import roi_align

from mamba_vision.errors import UserError
from mamba_vision.ops import multi_level_roi_align
from mamba_vision.ops.roi_align import triton_kernels, triton_roi_align

CHANNELS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
SIZES = ((17, 26), (9, 13), (5, 7), (3, 4))  # of images of 68 x 104
IN_THE_INTERPRETER = pytest.mark.skipif(
    DEVICE == "cuda", reason="Triton compiles its kernels where there is a CUDA GPU"
)
BACKENDS = (
    pytest.param("torchvision", "cpu", id="torchvision-cpu"),
    pytest.param("torchvision", "cuda", id="torchvision-cuda", marks=pytest.mark.cuda),
    pytest.param("triton", "cpu", id="triton-interpreter", marks=IN_THE_INTERPRETER),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.cuda),
)
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[len("torch.") :]
)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_roi_align, "obstacle", lambda *_, **__: None)


def draw_maps(sizes=SIZES, channels=CHANNELS, dtype=torch.float32):
    return [torch.randn(2, channels, *size).to(dtype) for size in sizes]


def draw_boxes(count, height=68, width=104, levels=4):
    """Boxes of all sizes, of which some reach beyond the image; their images and levels."""
    centres = torch.rand(count, 2) * torch.tensor([width, height])
    sides = torch.rand(count, 2) * torch.tensor([width, height]) * 0.5
    boxes = torch.cat((centres - sides / 2, centres + sides / 2), dim=1)
    return boxes, torch.arange(count) % 2, torch.randint(levels, (count,))


def by_level(maps, boxes, images, levels, scales, size):
    """The definition: torchvision's, on the boxes of one level after the other."""
    rois = torch.cat((images[:, None], boxes), dim=1).to(maps[0])
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for level, (x, scale) in enumerate(zip(maps, scales)):
        own = levels == level
        pooled[own] = roi_align(x, rois[own], size, scale, 0, aligned=True)
    return pooled


def differentiate(function, maps, weights):
    """What a function of the maps gives, and the gradients of its weighted sum; on the CPU."""
    maps = [x.detach().requires_grad_() for x in maps]
    pooled = function(maps)
    gradients = torch.autograd.grad((pooled * weights.to(pooled)).sum(), maps)
    return [x.detach().cpu() for x in (pooled, *gradients)]


def compare(judge, maps, places, scales, size, device, layout=torch.channels_last, **options):
    """Judge a backend; half precision beside float32 that is rounded at the end."""
    weights = torch.randn(len(places[0]), maps[0].shape[1], size, size).to(maps[0].dtype)

    def outcome(dtype):
        wide = [x.to(DEVICE, dtype) for x in maps]
        there = [x.to(DEVICE) for x in places]
        return differentiate(lambda maps: by_level(maps, *there, scales, size), wide, weights)

    there = [x.to(device) for x in places]
    results = differentiate(
        lambda maps: multi_level_roi_align(maps, *there, scales, size, **options),
        [x.to(device, memory_format=layout) for x in maps],
        weights,
    )
    names = ["pooled", *(f"gradient of level {i}" for i in range(len(maps)))]
    plain = [x.to(maps[0].dtype) for x in outcome(torch.float32)]
    judge(names, results, outcome(torch.float64), plain)


@every_backend
def test_of_a_slope_by_hand(backend, device):
    """Where the map is 10 y + x at pixel (y, x), a bin holds the value at its centre.

    The box of 12 x 8 pixels from (8, 4) is one of 3 x 2 pixels from (2, 1) on the map of stride 4;
    between the pixels' centres at + 1/2 its bins have theirs at x = 2.25, 3.75 and y = 1, 2.
    """
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    slope = torch.stack((10 * y + x, -y))[None].to(device)
    maps = [torch.full_like(slope, 100.0), slope]
    boxes = torch.tensor([[8.0, 4.0, 20.0, 12.0]], device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    pooled = multi_level_roi_align(maps, boxes, one - 1, one, (1 / 2, 1 / 4), 2, backend=backend)
    expected = [[[12.25, 13.75], [22.25, 23.75]], [[-1.0, -1.0], [-2.0, -2.0]]]
    torch.testing.assert_close(pooled.cpu(), torch.tensor([expected]))
    assert pooled.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@DTYPES
@every_backend
def test_agrees_with_the_definition(judge, backend, device, dtype, layout):
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds it")
    places = draw_boxes(8)
    compare(judge, draw_maps(dtype=dtype), places, SCALES, 3, device, layout, backend=backend)


@pytest.mark.parametrize("levels", [1, 2, 5])
@every_backend
def test_any_number_of_levels(judge, backend, device, levels):
    sizes, scales = [*SIZES, (2, 2)][:levels], [*SCALES, 1 / 64][:levels]
    places = draw_boxes(6, levels=levels)
    compare(judge, draw_maps(sizes), places, scales, 2, device, backend=backend)


@every_backend
def test_boxes_without_samples_or_beyond_the_map(judge, backend, device):
    """Of no width, no height or turned around, and off each side of the image: all zeros."""
    boxes = torch.tensor(
        [
            [8.0, 8.0, 8.0, 8.0],
            [8.0, 8.0, 8.0, 40.0],
            [8.0, 8.0, 40.0, 8.0],
            [40.0, 40.0, 8.0, 8.0],
            [-90.0, 8.0, -50.0, 40.0],
            [8.0, -90.0, 40.0, -50.0],
            [200.0, 8.0, 240.0, 40.0],
            [8.0, 200.0, 40.0, 240.0],
            [
                0.0,
                0.0,
                104.0,
                68.0,
            ],  # the whole image, on the smallest map: the only one that is not
        ]
    )
    images, levels = torch.arange(len(boxes)) % 2, torch.arange(len(boxes)) % 4
    levels[-1] = 3
    maps = draw_maps()
    places = (boxes, images, levels)
    pooled = multi_level_roi_align(
        [x.to(device) for x in maps], *(x.to(device) for x in places), SCALES, 2, backend=backend
    )
    assert pooled[:-1].count_nonzero() == 0
    assert pooled[-1].count_nonzero() == pooled[-1].numel()
    compare(judge, maps, places, SCALES, 2, device, backend=backend)


@every_backend
def test_no_boxes(backend, device):
    maps = [x.to(device).requires_grad_() for x in draw_maps()]
    places = [x.to(device) for x in draw_boxes(0)]
    pooled = multi_level_roi_align(maps, *places, SCALES, 7, backend=backend)
    assert pooled.shape == (0, CHANNELS, 7, 7)
    for x, gradient in zip(maps, torch.autograd.grad(pooled.sum(), maps)):
        assert gradient.shape == x.shape
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_backend
def test_autocast_keeps_the_dtype(judge, backend, device, dtype):
    maps, places = draw_maps(dtype=dtype), draw_boxes(6)
    with torch.autocast(device, dtype=torch.bfloat16):
        compare(judge, maps, places, SCALES, 2, device, backend=backend)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_torchvision_takes_float64(device):
    maps = [x.double() for x in draw_maps()]
    boxes, images, levels = draw_boxes(8)
    places = (boxes.double(), images, levels)
    weights = torch.randn(8, CHANNELS, 3, 3).double()
    expected = differentiate(lambda maps: by_level(maps, *places, SCALES, 3), maps, weights)
    there = [x.to(device) for x in places]
    results = differentiate(
        lambda maps: multi_level_roi_align(maps, *there, SCALES, 3, backend="torchvision"),
        [x.to(device) for x in maps],
        weights,
    )
    for result, wanted in zip(results, expected):
        torch.testing.assert_close(result, wanted)


def test_wrong_arguments():
    maps, (boxes, images, levels) = draw_maps(), draw_boxes(3)
    for arguments, error, message in (
        ((maps, boxes, images, levels, SCALES[1:]), ValueError, "for each level, not 4 and 3"),
        ((maps, boxes[:, 1:], images, levels, SCALES), ValueError, r"boxes .* not \(3, 3\)"),
        ((maps, boxes, images[1:], levels, SCALES), ValueError, r"images .*R = 3, not \(2,\)"),
        ((maps, boxes, images, levels.float(), SCALES), TypeError, "levels must hold int32 or"),
        (([*maps[:3], maps[3][:1]], boxes, images, levels, SCALES), ValueError, r"features\[3\]"),
        (([*maps[:3], maps[3].half()], boxes, images, levels, SCALES), TypeError, r"features\[3\]"),
    ):
        with pytest.raises(error, match=message):
            multi_level_roi_align(*arguments, 7)


def test_the_variable_names_a_backend(monkeypatch):
    variable = "MAMBAVISION_ROI_ALIGN_BACKEND"
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(UserError, match=f"'nonsense' .given by {variable}"):
        multi_level_roi_align(draw_maps(), *draw_boxes(1), SCALES, 7)


def test_what_triton_cannot_take(monkeypatch):
    monkeypatch.undo()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    reason = triton_roi_align.obstacle(cuda, (torch.float32,), levels=6)
    assert reason == "it pools from at most 5 levels, not 6"
    reason = triton_roi_align.obstacle(cpu, (torch.float32,), levels=5)
    assert reason == "it needs tensors on a CUDA device, these are on cpu"
    with pytest.raises(UserError, match=r"backend 'triton' .* these are on cpu"):
        multi_level_roi_align(draw_maps(), *draw_boxes(1), SCALES, 7, backend="triton")


def test_the_operators_are_well_formed():
    maps = [x.to(DEVICE).requires_grad_() for x in draw_maps(SIZES[2:])]
    places = [x.to(DEVICE) for x in draw_boxes(2, levels=2)]
    names = torch.ops.mamba_vision
    forward = (maps, *places, list(SCALES[2:]), 2)
    torch.library.opcheck(names.multi_level_roi_align.default, forward)
    dpooled = torch.randn(2, CHANNELS, 2, 2, device=DEVICE)
    backward = (dpooled, *places, list(SCALES[2:]), [n for size in SIZES[2:] for n in size], 2)
    torch.library.opcheck(names.multi_level_roi_align_backward.default, backward)


def test_it_compiles_whole():
    maps = [x.to(DEVICE) for x in draw_maps()]
    places = [x.to(DEVICE) for x in draw_boxes(4)]
    weights = torch.randn(4, CHANNELS, 2, 2)

    def pool(maps):
        return multi_level_roi_align(maps, *places, SCALES, 2, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        *(differentiate(function, maps, weights) for function in (compiled, pool))
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("size", [7, 14])
def test_maps_of_a_detectors_size(judge, size, dtype):
    sizes = [(200, 336), (100, 168), (50, 84), (25, 42)]
    maps, places = draw_maps(sizes, 256, dtype), draw_boxes(256, 800, 1344)
    compare(judge, maps, places, SCALES, size, "cuda", backend="triton")


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["triton", "torchvision"])
def test_it_never_waits_for_the_device(backend):
    maps = [x.to(DEVICE).requires_grad_() for x in draw_maps()]
    places = [x.to(DEVICE) for x in draw_boxes(12)]

    def step():
        pooled = multi_level_roi_align(maps, *places, SCALES, 7, backend=backend)
        return torch.autograd.grad(pooled.sum(), maps)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(gradients, expected):
        torch.testing.assert_close(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["triton", "torchvision"])
def test_cuda_graph(backend):
    """Captured once, it pools other boxes of other levels when it is replayed."""
    maps = [x.to(DEVICE).requires_grad_() for x in draw_maps()]
    places = [x.to(DEVICE) for x in draw_boxes(12)]

    def step():
        pooled = multi_level_roi_align(maps, *places, SCALES, 7, backend=backend)
        return pooled, *torch.autograd.grad(pooled.square().sum(), maps)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for place, other in zip(places, draw_boxes(12)):
        place.copy_(other)
    graph.replay()
    for one, other in zip(captured, step()):
        torch.testing.assert_close(one, other)


@pytest.mark.cuda
def test_other_sizes_compile_nothing_new():
    kernels = (triton_kernels.pool, triton_kernels.pool_back)

    def compiled():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    def step(width, count, size):
        maps = [x.to(DEVICE).requires_grad_() for x in draw_maps([(16, width), (1, 8)], 32)]
        places = [x.to(DEVICE) for x in draw_boxes(count, levels=2)]
        multi_level_roi_align(maps, *places, SCALES[:2], size, backend="triton").sum().backward()

    step(24, 8, 7)
    before = compiled()
    assert min(before) > 0
    for width, count, size in ((16, 1, 7), (1, 7, 14), (33, 16, 1)):
        step(width, count, size)
    assert compiled() == before
