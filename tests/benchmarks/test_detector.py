"""The comparison of detectors, its training steps and its loops."""

import pytest
import torch
import torch._dynamo
from detectron2.config import LazyConfig
from torch import nn

from mamba_vision.benchmarks import detector, loops, subject, training
from mamba_vision.errors import UserError


def test_tables(run, tables):
    arguments = ["--batch-sizes", "1", "2", "--checkpointing", "--only", "plain", "all"]
    assert run(detector, *arguments) == 0
    evaluation, throughput, steps = tables()
    assert [row["row"] for row in evaluation] == ["plain", "all (+ fuse)"]
    for row in evaluation:
        for column in ("latency ms", "first ms", "second ms", "new size: first ms"):
            assert float(row[column]) > 0
        assert row["lost in fp32"] == row["lost as timed"] == "0.0%"
    assert evaluation[0]["speed"] == "1.00 x"
    for row in throughput:
        assert float(row["images/s, 1 at a time"]) > 0
        assert float(row["images/s, 2 at a time"]) > 0
    names = ["plain", "all (+ fused_adamw)", "all, checkpointed"]
    assert [row["row"] for row in steps] == names
    for row in steps:
        phases = [float(row[f"{phase} ms"]) for phase in training.PHASES]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(float(row["step ms"]), abs=0.1)
    assert steps[1]["loss"] == steps[2]["loss"]


@pytest.mark.parametrize("tasks", [("latency",), ("training",)])
def test_a_wrong_row_fails(run, tables, switches, wrong, monkeypatch, tasks):
    switches(wrong)
    monkeypatch.setattr(training, "LOSS", 1e-6)
    assert run(detector, "--tasks", *tasks) == 1
    ((plain, row),) = tables()
    column = "lost as timed" if tasks == ("latency",) else "loss"
    assert "WRONG" not in plain[column]
    assert row[column].endswith(" WRONG")


def test_a_loss_that_is_not_finite_fails(run, tables, switches, monkeypatch):
    switches()
    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(training._Training, "loss", lambda *_: next(losses))
    assert run(detector, "--tasks", "training") == 1
    ((row,),) = tables()
    assert row["loss"] == "nan WRONG"


def test_in_half_precision(run, tables):
    assert run(detector, "--dtype", "fp16", "--tasks", "latency", "--only", "cast_once") == 0
    ((row,),) = tables()
    assert row["row"] == "+ cast_once"
    assert float(row["lost as timed"].rstrip("%")) < 50


def test_varied_sizes(run, tables, switches, right):
    switches(right)
    assert run(detector, "--tasks", "--varied", "2", "--only", "all") == 0
    ((row,),) = tables()
    assert row["sizes"] == "2"
    assert float(row["slowest ms"]) >= float(row["first pass ms"]) > 0
    assert (row["CUDA graphs"], row["torch.compile"]) == ("0", "0")


@pytest.mark.parametrize("count", [1, 50, 900])
def test_sizes_are_those_of_coco(count):
    sizes = loops.varied_sizes(count, 800)
    assert len(set(sizes)) == len(sizes) == count
    for height, width in sizes:
        assert max(height, width) <= 1333
        assert min(height, width) == 800 or max(height, width) == 1333
    landscape = sum(width >= height for height, width in sizes)
    assert landscape in (count // 2, (count + 1) // 2, (count + 1) // 2 + 1)


def test_counts_what_torch_compiles():
    torch._dynamo.reset()
    with loops._counted() as count:
        compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        for size in (2, 3, 2):
            compiled(torch.zeros(size))
        assert count()[:2] == ["0", "2"]


@pytest.mark.cuda
def test_counts_cuda_graphs_and_kernels():
    from mamba_vision.ops import selective_scan

    x = torch.randn(1, 40, 24, device="cuda")  # of a dtype and form that no other test has
    state, rates = torch.randn(1, 40, 3, device="cuda"), -torch.rand(24, 3, device="cuda")
    with loops._counted() as count:
        selective_scan(x, x, rates, state, state, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x + 1
        graphs, _, kernels = count()
    assert graphs == "1"
    assert int(kernels) >= 1
    with loops._counted() as count:
        selective_scan(x, x, rates, state, state, backend="triton")
        assert count() == ["0", "0", "0"]


def test_evaluation_loop(run, tables, switches, toy):
    switches()
    name = LazyConfig.load(str(toy)).dataloader.test.dataset.names
    classes = "model.roi_heads.num_classes=2"
    arguments = ["--tasks", "--dataset", name, "--dataset-images", "2"]
    assert run(detector, *arguments, "dataloader.test.num_workers=0", classes) == 0
    ((row,),) = tables()
    assert row["images"] == "2"
    parts = [float(row[f"{part} ms"]) for part in ("loader", "model", "evaluator")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(float(row["image ms"]), abs=0.1)
    assert row["GPU busy"] == "-"


def test_an_unknown_data_set(run, switches):
    switches()
    with pytest.raises(UserError, match="nowhere"):
        run(detector, "--tasks", "--dataset", "nowhere")


def test_profiles_are_of_all(run, tables, switches, right):
    switches(right)
    assert run(detector, "--tasks", "--profile") == 0
    (image,), (step,) = tables()
    assert image["per call"] == "an image of all (+ right), full"
    assert step["per call"] == "a step of all (+ right), full"
    for row in (image, step):
        assert (row["kernel launches"], row["GPU busy ms"]) == ("0", "-")


def test_training_on_the_loader(run, tables, switches, toy):
    switches()
    name = LazyConfig.load(str(toy)).dataloader.train.dataset.names
    overrides = [f"dataloader.train.dataset.names={name}", "dataloader.train.num_workers=0"]
    arguments = ["--tasks", "training", "--data", "--train-images", "1"]
    assert run(detector, *arguments, *overrides, "model.roi_heads.num_classes=2") == 0
    ((row,),) = tables()
    assert float(row["data ms"]) > 0


def test_rows_share_their_weights():
    """Not even a prepared row changes what the others compute with."""
    from mamba_vision.benchmarks.rows import Switch, make_rows
    from mamba_vision.engine import load_config

    config = load_config("cascade_mask_rcnn_mamba_vision_nano_shapes")
    switches = [Switch("fuse", prepare="fuse")]
    plain, fused = make_rows(config, switches, ["full"], [])
    weights = subject.draw_weights(plain, (64, 64), "cpu")
    before = {name: x.clone() for name, x in weights.state.items()}
    model = subject.detector(plain, weights, torch.float32, "cpu")
    prepared = subject.detector(fused, weights, torch.float32, "cpu")
    name, parameter = next(iter(model.named_parameters()))
    assert parameter.data_ptr() == weights.state[name].data_ptr()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_on_a_gpu(run, tables, dtype):
    arguments = ["--device", "cuda", "--dtype", dtype, "--batch-sizes", "1", "2", "--varied", "3"]
    assert run(detector, *arguments) == 0
    evaluation, _, steps, varied = tables()
    assert steps[-1]["row"] == "all (+ cuda_graphs)"
    assert evaluation[-1]["row"] == "all (+ cuda_graphs)"
    assert all(float(row["memory MiB"]) > 0 for row in (*evaluation, *steps))
    assert varied[0]["CUDA graphs"] == "0"
    assert int(varied[-1]["CUDA graphs"]) > 0
