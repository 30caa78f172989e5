"""On a CPU recordings are stood in for by running the same functions again."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from mamba_vision.backbone import MambaVision
from mamba_vision.backbone.attention import Attention
from mamba_vision.backbone.blocks import MixerBlock
from mamba_vision.backbone.mixer import MambaVisionMixer
from mamba_vision.errors import UserError
from mamba_vision.precision import weights_to_cast
from mamba_vision.recorder import copy_each
from mamba_vision.training_graphs import TrainingGraphs

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


def _run_again(*runs):
    with torch.random.fork_rng([]):
        for run in runs:
            run()
    return runs


def _graphs(device) -> TrainingGraphs:
    return TrainingGraphs(record=_run_again if device == "cpu" else None)


def _blocks(device, drop_path=0.0, layer_scale=None) -> nn.Sequential:
    options = {"mlp_ratio": 2.0, "drop_path": drop_path, "layer_scale": layer_scale}
    mixers = MambaVisionMixer(32), MambaVisionMixer(32), Attention(32, 2)
    return nn.Sequential(*(MixerBlock(32, mixer, **options) for mixer in mixers)).to(device)


def _tokens(device, windows=2, length=12) -> torch.Tensor:
    return torch.randn(windows, length, 32, device=device, requires_grad=True)


def _one_by_one(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def _is_replayed(y) -> bool:
    return y.grad_fn.name() == "_ReplayBackward"


def _train(run, x, steps=3) -> None:
    """Some passes over the same input, whose gradients are not kept."""
    for _ in range(steps):
        y = run(x)
        torch.autograd.grad(y, x, torch.ones_like(y))


def _gradients(run, blocks, *inputs) -> list[torch.Tensor]:
    """Of all inputs and weights, summed over inputs."""
    blocks.zero_grad()
    for x in inputs:
        x.grad = None
        run(x).square().sum().backward()
    return [t.grad for t in (*inputs, *blocks.parameters())]


def _assert_close(actual, expected, tolerance=1e-4):
    """That tensors differ by little of their size, attention's sums in any order."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert a.dtype == b.dtype
        assert (a - b).double().norm() <= tolerance * b.double().norm() + 1e-7


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_steps_equal_those_of_the_blocks(device, layer_scale):
    plain, graphs = _blocks(device, layer_scale=layer_scale), _graphs(device)
    replayed = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (plain, replayed)]
    for step in range(6):
        x = _tokens(device)
        twin = x.detach().clone().requires_grad_()
        expected, y = _one_by_one(plain, x), graphs(replayed, twin)
        assert _is_replayed(y) == (step >= 2)
        target = torch.randn_like(y)
        for optimizer, output in zip(optimizers, (expected, y)):
            optimizer.zero_grad()
            (output - target).square().sum().backward()
        _assert_close([y, twin.grad], [expected, x.grad])
        _assert_close([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
        for optimizer in optimizers:
            optimizer.step()
        _assert_close(list(replayed.parameters()), list(plain.parameters()))
    assert graphs.recordings == 1


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
        pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    ],
)
def test_mixed_precision_with_scaled_gradients(device, dtype):
    plain, graphs = _blocks(device), _graphs(device)
    replayed = copy.deepcopy(plain)
    runs = [lambda x: _one_by_one(plain, x), lambda x: graphs(replayed, x)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (plain, replayed)]
    scalers = [torch.amp.GradScaler(device, init_scale=2.0**10) for _ in runs]
    for step in range(6):
        x = _tokens(device).detach()
        before = [p.detach().clone() for p in replayed.parameters()]
        for run, optimizer, scaler in zip(runs, optimizers, scalers):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                y = run(x)
            loss = y.float().square().mean() * (float("inf") if step == 4 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert _is_replayed(y) == (step >= 2)
        kept = [torch.equal(a, b) for a, b in zip(before, replayed.parameters())]
        assert all(kept) == (step == 4)
        assert [s.get_scale() for s in scalers] == [2.0**10 if step < 4 else 2.0**9] * 2
        if step != 4:
            gradients = [[p.grad for p in m.parameters()] for m in (replayed, plain)]
            _assert_close(*gradients, tolerance=0.05)
    _assert_close(list(replayed.parameters()), list(plain.parameters()), tolerance=1e-3)


def test_all_weights_of_a_recording_are_cast_together():
    blocks, graphs = _blocks("cpu"), _graphs("cpu")
    x = _tokens("cpu")

    def casts():
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as seen:
            graphs(blocks, x).float().sum().backward()
        counts = {event.key: event.count for event in seen.key_averages()}
        return counts.get("aten::_to_copy", 0)

    called = [casts() for _ in range(4)]
    assert called[0] == called[1]
    weights = len(weights_to_cast(blocks))
    assert called[0] - called[3] >= 2 * weights  # there, and their gradients back


def test_autocast_is_part_of_the_form(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    expected = _one_by_one(blocks, x)
    _train(lambda x: graphs(blocks, x), x)
    with torch.autocast(device, torch.bfloat16):
        rounded = _one_by_one(blocks, x)
        _train(lambda x: graphs(blocks, x), x)
        y = graphs(blocks, x)
    assert graphs.recordings == 2
    assert _is_replayed(y)
    _assert_close([y], [rounded], tolerance=0.02)
    del y
    _assert_close([graphs(blocks, x)], [expected])


def test_weights_cast_outside_follow_the_weights(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    with torch.autocast(device, torch.bfloat16):
        _one_by_one(blocks, x)  # autocast keeps casts of the weights for the rest of the context
        _train(lambda x: graphs(blocks, x), x)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.mul_(1.5)
    with torch.autocast(device, torch.bfloat16):
        _assert_close([graphs(blocks, x)], [_one_by_one(blocks, x)], tolerance=0.02)


def test_accumulation(device):
    blocks, graphs = _blocks(device), _graphs(device)
    inputs = [_tokens(device) for _ in range(3)]
    expected = _gradients(lambda x: _one_by_one(blocks, x), blocks, *inputs)
    _train(lambda x: graphs(blocks, x), inputs[0])
    _assert_close(_gradients(lambda x: graphs(blocks, x), blocks, *inputs), expected)


def test_what_was_given_out_is_not_overwritten(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)

    def gives():
        y = graphs(blocks, x)
        assert _is_replayed(y)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()])]

    first = gives()
    copies = [t.clone() for t in first]
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    second = gives()
    for given, kept, other in zip(first, copies, second):
        assert torch.equal(given, kept)
        assert not torch.equal(given, other)


def test_drop_path_follows_the_seed(device):
    blocks, graphs, x = _blocks(device, drop_path=0.5), _graphs(device), _tokens(device, 32)

    def run(seed, run=lambda x: graphs(blocks, x)):
        torch.manual_seed(seed)
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()])]

    runs = [run(seed) for seed in (1, 2, 3, 1, 4)]  # the third is recorded
    for seed, actual in zip((1, 2, 3, 1, 4), runs):
        _assert_close(actual, run(seed, lambda x: _one_by_one(blocks, x)))
    assert not torch.allclose(runs[3][0], runs[4][0])
    assert graphs.recordings == 1


def test_a_changed_drop_path_is_recorded_anew(device):
    blocks, graphs, x = _blocks(device, drop_path=0.5), _graphs(device), _tokens(device, 32)
    _train(lambda x: graphs(blocks, x), x)
    for module in blocks.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    for _ in range(4):
        _assert_close([graphs(blocks, x)], [_one_by_one(blocks, x)])
    assert graphs.recordings == 2


def test_evaluation_in_between(device):
    blocks, graphs, x = _blocks(device, drop_path=0.5), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)
    blocks.eval()
    with torch.no_grad():
        assert torch.equal(graphs(blocks, x), _one_by_one(blocks, x))
    _assert_close([graphs(blocks, x)], [_one_by_one(blocks, x)])  # with gradients
    blocks.train()
    with torch.no_grad():
        assert graphs(blocks, x).grad_fn is None
    assert _is_replayed(graphs(blocks, x))
    assert graphs.recordings == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_passes_at_once(device, order):
    blocks, graphs = _blocks(device), _graphs(device)
    inputs = [_tokens(device), _tokens(device)]
    expected = _gradients(lambda x: _one_by_one(blocks, x), blocks, *inputs)
    _train(lambda x: graphs(blocks, x), inputs[0])

    blocks.zero_grad()
    for x in inputs:
        x.grad = None
    outputs = [graphs(blocks, x) for x in inputs]
    assert [_is_replayed(y) for y in outputs] == [True, False]
    for i in order:
        outputs[i].square().sum().backward()
    _assert_close([t.grad for t in (*inputs, *blocks.parameters())], expected)
    assert _is_replayed(graphs(blocks, inputs[0]))


def test_a_pass_thrown_away_holds_up_nothing(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)
    for _ in range(3):
        assert _is_replayed(graphs(blocks, x))


def test_a_second_backward_pass_is_an_error(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)
    loss = graphs(blocks, x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match=r"argument cuda_graphs is True .*: give False") as error:
        loss.backward()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_blocks(device, reentrant):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    expected = _gradients(lambda x: _one_by_one(blocks, x), blocks, x)

    def run(x):
        return checkpoint(lambda x: graphs(blocks, x), x, use_reentrant=reentrant)

    for _ in range(4):
        _assert_close(_gradients(run, blocks, x), expected)
    _train(lambda x: graphs(blocks, x), x)
    _assert_close(_gradients(run, blocks, x), expected)


def test_frozen_and_moved_weights_are_recorded_anew(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)

    blocks[1].requires_grad_(False)
    for _ in range(4):
        blocks.zero_grad()
        y = graphs(blocks, x)
        y.sum().backward()
        assert all((p.grad is None) == (not p.requires_grad) for p in blocks.parameters())
    assert _is_replayed(y)
    assert graphs.recordings == 2

    for parameter in blocks.parameters():
        parameter.data = torch.randn_like(parameter)
    for _ in range(4):
        y = graphs(blocks, x)
        _assert_close([y], [_one_by_one(blocks, x)])
    del y
    assert _is_replayed(graphs(blocks, x))
    assert graphs.recordings == 3


def test_without_a_gradient_of_the_input(device):
    blocks, graphs = _blocks(device), _graphs(device)
    x = _tokens(device).detach()
    for _ in range(4):
        blocks.zero_grad()
        y = graphs(blocks, x)
        y.square().sum().backward()
    assert _is_replayed(y)
    gradients = [p.grad for p in blocks.parameters()]
    blocks.zero_grad()
    _one_by_one(blocks, x).square().sum().backward()
    _assert_close(gradients, [p.grad for p in blocks.parameters()])

    blocks.requires_grad_(False)
    for _ in range(4):
        y = graphs(blocks, x)
        assert y.grad_fn is None
        _assert_close([y], [_one_by_one(blocks, x)])
    assert graphs.recordings == 2


def test_hooks_on_weights_run_once(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    expected = _gradients(lambda x: _one_by_one(blocks, x), blocks, x)
    for parameter in blocks.parameters():
        parameter.register_hook(lambda gradient: 3 * gradient)
    for _ in range(4):
        _assert_close(
            _gradients(lambda x: graphs(blocks, x), blocks, x),
            [expected[0], *(3 * gradient for gradient in expected[1:])],
        )
    assert graphs.recordings == 1


def test_hooks_on_modules_run(device):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)
    module, calls = blocks[0].mlp, []
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        hook = getattr(module, f"register_{register}")(lambda *_: calls.append(1))
        _train(lambda x: graphs(blocks, x), x, steps=2)
        assert len(calls) == 2, register
        calls.clear()
        hook.remove()
    assert _is_replayed(graphs(blocks, x))


def test_compiled_blocks_are_left_alone(device):
    blocks = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(device)
    in_place, wrapped = copy.deepcopy(blocks), copy.deepcopy(blocks)
    in_place[0].compile(backend="eager")
    wrapped[0] = torch.compile(wrapped[0], backend="eager")
    x = _tokens(device)
    for kind, recordings in ((blocks, 1), (in_place, 0), (wrapped, 0)):
        graphs = _graphs(device)
        _train(lambda x: graphs(kind, x), x, steps=4)  # noqa: B023
        assert graphs.recordings == recordings


def test_the_first_forms_are_kept(device):
    blocks, graphs = _blocks(device), _graphs(device)
    inputs = [_tokens(device, length=length) for length in (5, 6, 7)]
    for _ in range(5):
        for x in inputs:
            expected = _gradients(lambda x: _one_by_one(blocks, x), blocks, x)
            _assert_close(_gradients(lambda x: graphs(blocks, x), blocks, x), expected)
    assert graphs.recordings == 2
    assert [_is_replayed(graphs(blocks, x)) for x in inputs] == [True, True, False]


class _Unrecordable(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.abs().sum().item() > 0 else x


def test_blocks_that_cannot_be_recorded(device, caplog):
    def fail(*runs):
        raise RuntimeError("not here\nbecause")

    graphs = TrainingGraphs(record=fail if device == "cpu" else None)
    blocks, x = nn.Sequential(_Unrecordable(32, 32)).to(device), _tokens(device)
    with caplog.at_level(logging.WARNING, "mamba_vision"):
        for _ in range(8):
            expected = _gradients(blocks[0], blocks, x)
            _assert_close(_gradients(lambda x: graphs(blocks, x), blocks, x), expected)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("mamba_vision")]
    assert len(messages) == 1
    assert messages[0].startswith("No CUDA graphs of a part of the model")
    assert "\n" not in messages[0]
    assert graphs.recordings == 0
    torch.randn(8, device=device).clone()  # neither the generator nor the allocator took harm


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_a_copy_starts_empty(device, copied):
    blocks, graphs, x = _blocks(device), _graphs(device), _tokens(device)
    _train(lambda x: graphs(blocks, x), x)
    twin = copied(graphs)
    assert isinstance(twin, TrainingGraphs)
    assert (graphs.recordings, twin.recordings) == (1, 0)
    assert not _is_replayed(twin(blocks, x))


def test_under_distributed_data_parallel(device, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = _blocks(device)
            self.graphs = None

        def forward(self, x):
            return self.graphs(self.blocks, x) if self.graphs else _one_by_one(self.blocks, x)

    plain = Model()
    replayed = copy.deepcopy(plain)
    replayed.graphs = _graphs(device)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(replayed, gradient_as_bucket_view=True)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (plain, parallel)]
        for _ in range(6):
            x = _tokens(device).detach()
            for model, optimizer in zip((plain, parallel), optimizers):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            _assert_close(
                [p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()]
            )
        _assert_close(list(replayed.parameters()), list(plain.parameters()))
        assert replayed.graphs.recordings == 1
    finally:
        torch.distributed.destroy_process_group()


def test_parts_in_a_row(device):
    """Each goes backward while the forward passes of those before it are still needed."""
    parts = [_blocks(device) for _ in range(3)]
    graphs = [_graphs(device) for _ in parts]

    def gradients(calls, x):
        for call in calls:
            x = call(x)
        weights = [p for part in parts for p in part.parameters()]
        return torch.autograd.grad(x.square().sum(), weights)

    for _ in range(5):
        x = _tokens(device)
        recorded = [lambda x, p=p, g=g: g(p, x) for p, g in zip(parts, graphs)]
        _assert_close(gradients(recorded, x), gradients(parts, x))
    assert [g.recordings for g in graphs] == [1, 1, 1]


@pytest.mark.cuda
def test_backward_passes_share_memory():
    parts = [_blocks("cuda") for _ in range(3)]
    graphs = [_graphs("cuda") for _ in parts]

    def common():
        (pool,) = {
            id(g._record._common): g._record._common for g in graphs if g.recordings
        }.values()
        segments = torch.cuda.memory_snapshot()
        own = [s for s in segments if tuple(s["segment_pool_id"]) == tuple(pool.handle)]
        return sum(segment["total_size"] for segment in own)

    sizes = []
    for count in (1, 3):
        for _ in range(3):
            y = _tokens("cuda", windows=8, length=4096)
            for part, graph in zip(parts[:count], graphs):
                y = graph(part, y)
            y.square().sum().backward()
        assert [g.recordings for g in graphs] == [1] * count + [0] * (3 - count)
        sizes.append(common())
    assert 0 < sizes[1] < 2 * sizes[0]


@pytest.mark.cuda
def test_memory_of_recordings_is_used_again():
    def record():
        blocks, graphs, x = _blocks("cuda"), _graphs("cuda"), _tokens("cuda")
        _train(lambda x: graphs(blocks, x), x)
        assert graphs.recordings == 1

    for _ in range(3):  # PyTorch refuses memory that it has forgotten
        record()


@pytest.mark.cuda
def test_memory_does_not_grow():
    blocks, graphs = _blocks("cuda"), _graphs("cuda")
    optimizer = torch.optim.SGD(blocks.parameters(), lr=1e-3)

    def step(length):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            y = graphs(blocks, _tokens("cuda", length=length))
        y.float().square().mean().backward()
        optimizer.step()

    lengths = (64, 96, 128)
    for _ in range(5):
        for length in lengths:
            step(length)
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(20):
        for length in lengths:
            step(length)
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
    assert graphs.recordings == 2


def _losses(backbone, device, sizes) -> list[float]:
    """Of training steps over images of some sizes."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
    losses = []
    for height, width in sizes:
        optimizer.zero_grad()
        features = backbone(torch.randn(2, 3, height, width, device=device))
        loss = sum((f - 0.1).square().mean() for f in features.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("padding", ["full", "fit"])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_backbone_trains_alike(nano, device, padding, layer_scale):
    options = nano | {
        "depths": (1, 1, 4, 3),
        "window_size": (8, 8, 14, 7),  # the whole map's, of up to 224 x 224 pixels
        "window_padding": padding,
        "layer_scale": layer_scale,
        "drop_path_rate": 0.3,
    }
    replayed = MambaVision(**options).to(device).train()
    plain = MambaVision(**options, cuda_graphs=False).to(device).train()
    plain.load_state_dict(replayed.state_dict())
    # As many tokens in both orientations, so even windows that fit repeat.
    sizes = [(64, 96), (96, 64), (64, 64), (96, 96), (64, 96), (96, 64)]
    if device == "cpu":
        sizes = sizes[:2]
    expected = _losses(plain, device, sizes)
    assert _losses(replayed, device, sizes) == pytest.approx(expected, rel=1e-3)
    graphs = [level.graphs for level in replayed.levels[2:]]
    assert [g.recordings for g in graphs] == [int(device == "cuda")] * 2
    assert [level.graphs for level in plain.levels[2:]] == [None, None]
    assert list(replayed.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_backbone(nano, device, copied):
    backbone = MambaVision(**nano, drop_path_rate=0.0).to(device).train()
    sizes = [(64, 96)] * 4
    _losses(backbone, device, sizes)
    twin = copied(backbone)
    assert [level.graphs.recordings for level in twin.levels[2:]] == [0, 0]
    assert _losses(twin, device, sizes) == pytest.approx(_losses(backbone, device, sizes), rel=1e-3)


def test_checkpointed_stages_record_nothing(nano, device):
    backbone = MambaVision(**nano, activation_checkpointing=True).to(device).train()
    for level in backbone.levels[2:]:
        level.graphs = _graphs(device)
    _losses(backbone, device, [(64, 64)] * 4)
    assert [level.graphs.recordings for level in backbone.levels[2:]] == [0, 0]


def test_tensors_of_any_forms_are_copied(device):
    sources = [
        torch.randn(3, 5, device=device),
        torch.randn(5, 3, device=device).t(),
        torch.randn(4, device=device, dtype=torch.float16),
        torch.arange(6, device=device),
    ]
    dtypes = (torch.float16, torch.float32, torch.float32, torch.int64)
    targets = [
        torch.empty(x.shape, dtype=dtype, device=device) for x, dtype in zip(sources, dtypes)
    ]
    copy_each(sources, targets)
    for source, target in zip(sources, targets):
        assert torch.equal(target, source.to(target.dtype))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        copy_each(sources, targets[:2])
