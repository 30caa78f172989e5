"""One step of training: in parts, in mixed precision, without a finite loss, out of memory."""

import copy
import json
import math
import traceback
import warnings
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mamba_vision import model_zoo
from mamba_vision.engine.trainer import Trainer
from mamba_vision.errors import UserError
from mamba_vision.scalars import put_scalars


class Net(nn.Module):
    """Of each image a squared error, and the mean over the images."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.seen = []
        self.drawn = []

    def forward(self, images):
        self.seen.append([image["file_name"] for image in images])
        self.drawn.append(torch.rand(()).item())
        values = torch.stack([image["image"][0, 0] * self.scale for image in images])
        weights = torch.tensor([image.get("weight", 1.0) for image in images])
        loss = (weights * (values - 1).square().sum(1)).mean()
        return {"loss_a": loss, "loss_b": 0.5 * loss}


def batches(size=4, **first):
    """Batches without end; ``first`` is of the first image of the second batch."""
    generator = torch.Generator().manual_seed(0)
    number = 0
    while True:
        batch = []
        for _ in range(size):
            pixels = torch.rand(3, 8, 6, generator=generator)
            batch.append({"file_name": f"{number}.jpg", "image": pixels})
            if number == size:
                batch[0].update(first)
            number += 1
        yield batch


def trainer(data, net=None, lr=0.1, **options):
    net = Net() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return Trainer(net, data, optimizer, **{"seed": 3} | options)


def weights(trained):
    return trained.model.scale.detach().clone()


def run(trained, steps, start=0):
    trained.train(start, steps)
    return weights(trained)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_the_update_of_the_whole(parts, dtype):
    whole = trainer(batches(), dtype=dtype)
    expected = run(whole, 5)
    in_parts = trainer(batches(), dtype=dtype, accumulate=parts)
    torch.testing.assert_close(run(in_parts, 5), expected, rtol=0, atol=1e-6)
    assert len(in_parts.model.seen) == 5 * parts
    assert list(chain(*in_parts.model.seen)) == list(chain(*whole.model.seen))
    # by hand: a step's gradient is the mean over its images
    net, velocity = Net(), 0
    for batch in [b for b, _ in zip(batches(), range(5))]:
        loss = sum(net(batch).values())
        (gradient,) = torch.autograd.grad(loss, [net.scale])
        velocity = 0.9 * velocity + gradient
        net.scale.data -= 0.1 * velocity
    torch.testing.assert_close(expected, net.scale.data, rtol=0, atol=1e-6)


def test_logs_the_mean_of_the_parts():
    data = next(batches())
    trained = trainer(iter([data]), accumulate=2)
    with torch.no_grad():
        expected = Net()(data)
    run(trained, 1)
    for name, value in expected.items():
        assert trained.storage.latest()[name][0] == pytest.approx(value.item())


def test_what_the_model_logs_is_of_its_step():
    class Logging(Net):
        def forward(self, images):
            losses = super().forward(images)
            put_scalars({"accuracy": losses["loss_a"] * 0 + len(self.seen)})
            return losses

    trained = trainer(batches(), Logging(), accumulate=2)
    run(trained, 3)
    values = trained.storage.history("accuracy").values()
    assert values == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    losses = trained.storage.history("loss_b").values()
    assert [step for _, step in losses] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(("saved", "used"), [(None, True), (True, None), (True, True)])
def test_a_checkpoint_of_another_kind_of_step_goes_on(saved, used, dtype):
    def adam(fused):
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        return Trainer(net, batches(), optimizer, seed=3, dtype=dtype)

    whole, first, second = adam(used), adam(saved), adam(used)
    run(whole, 1)
    run(first, 1)
    with EventStorage():
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.model.load_state_dict(first.model.state_dict())
    assert [group["fused"] for group in second.optimizer.param_groups] == [used]
    for resumed in (whole, second):
        resumed._data_loader_iter_obj = iter(batches())
    torch.testing.assert_close(run(second, 3, start=1), run(whole, 3, start=1))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 8 * 3 * 3 * 3).view(8, 3, 3, 3))

    def forward(self, images):
        x = torch.stack([image["image"] for image in images])
        return {"loss": nn.functional.conv2d(x, self.scale).square().mean()}


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(("saved", "used"), [FORMATS, FORMATS[::-1], FORMATS[1:] * 2])
def test_a_checkpoint_from_other_memory_goes_on(saved, used):
    """Fused, AdamW takes any numbers of an average for those of the weight beside it."""

    def adam(memory_format):
        net = Convolution().to(memory_format=memory_format)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
        return Trainer(net, batches(), optimizer, seed=3)

    whole, first, second = adam(used), adam(saved), adam(used)
    run(whole, 2)
    run(first, 2)
    state = copy.deepcopy(first.state_dict())
    averages = state["optimizer"]["state"][0]
    assert averages["exp_avg"].is_contiguous()
    assert averages["exp_avg_sq"].is_contiguous()
    with EventStorage():
        second.load_state_dict(state)
    second.model.load_state_dict(first.model.state_dict())
    for resumed in (whole, second):
        resumed._data_loader_iter_obj = iter(batches())
    torch.testing.assert_close(run(second, 4, start=2), run(whole, 4, start=2))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_talk_once_a_step(one_process):
    net = DistributedDataParallel(Net())
    talks = []

    def hook(state, bucket):
        talks.append(bucket.buffer().clone())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    net.register_comm_hook(None, hook)
    trained = trainer(batches(), net, accumulate=4)
    trained.train(0, 3)
    assert len(net.module.seen) == 12
    assert len(talks) == 3
    whole = trainer(batches())
    run(whole, 3)
    torch.testing.assert_close(net.module.scale, whole.model.scale, rtol=0, atol=1e-6)


def test_a_gradient_that_overflows_skips_the_step_and_lowers_the_scale():
    """In float16: the loss is finite, the scaled gradient is not."""
    trained = trainer(batches(weight=1e34), dtype=torch.float16, accumulate=2)
    steps = []
    for k in range(3):
        trained.train(k, k + 1)
        steps.append((weights(trained), trained.grad_scaler.get_scale()))
    (first, scale), (second, lower), (third, last) = steps
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert (scale, lower, last) == (65536, 32768, 32768)
    assert trained.state_dict()["grad_scaler"]["scale"] == 32768


def test_a_loss_that_is_not_finite_skips_the_step_and_is_written_down(tmp_path, caplog):
    trained = trainer(batches(weight=math.nan), max_nonfinite=2, output_dir=tmp_path)
    first = run(trained, 1)
    assert torch.equal(run(trained, 2, start=1), first)
    assert not torch.equal(run(trained, 3, start=2), first)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "iteration": 1,
        "process": 0,
        "images": [{"file_name": f"{i}.jpg", "size": [8, 6]} for i in range(4, 8)],
        "losses": {"loss_a": "nan", "loss_b": "nan"},
    }
    for part in ("Step 2 skipped (1 in a row)", "loss_b = nan", "4.jpg, 5.jpg, 6.jpg, 7.jpg"):
        assert part in caplog.text


def test_too_many_in_a_row_stop_the_training(tmp_path, caplog):
    data = [{"file_name": "a.jpg", "image": torch.full((3, 8, 6), math.inf)}]
    good = next(batches(1))
    order = [data, data, good, data, data, data, good]
    trained = trainer(iter(order), max_nonfinite=3, output_dir=tmp_path)
    with pytest.raises(UserError, match=r"stopped at step 6, .* 3 times in a row \(train.max_nonf"):
        trained.train(0, 7)
    assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 5
    assert "Traceback" not in caplog.text


def test_the_count_goes_on_after_a_stop(tmp_path):
    data = [{"file_name": "a.jpg", "image": torch.full((3, 8, 6), math.inf)}]
    trained = trainer(iter([data] * 9), max_nonfinite=3, output_dir=tmp_path)
    trained.train(0, 2)
    state = copy.deepcopy(trained.state_dict())
    resumed = trainer(iter([data] * 9), max_nonfinite=3, output_dir=tmp_path)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match="stopped at step 3"):
        resumed.train(2, 9)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_out_of_memory_names_the_images_and_what_to_lower(accumulate):
    class Greedy(Net):
        def forward(self, images):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    data = [{"image": torch.zeros(3, 8 + i, 6)} for i in range(4)]
    with pytest.raises(UserError) as caught:
        trainer(iter([data]), Greedy(), accumulate=accumulate).train(0, 1)
    message = str(caught.value)
    assert message.startswith("the GPU's memory is used up in step 1, on images of 8 x 6, 9 x 6, ")
    assert f"{4 // accumulate} at a time" in message
    assert ("raise train.accumulate" in message) == (accumulate < 4)
    for remedy in ("mapper.augmentations", "activation_checkpointing=true", "train.amp.enabled"):
        assert remedy in message


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone():
    trained = trainer(batches())
    run(trained, 4)
    resumed = trainer(batches(), seed=99)
    with EventStorage():
        state = copy.deepcopy(trained.state_dict())
    resumed.load_state_dict(state)
    torch.rand(17)  # as evaluation might
    run(resumed, 4, start=2)
    assert resumed.model.drawn == trained.model.drawn[2:]
    assert len(set(trained.model.drawn)) == 4
    other = trainer(batches(), seed=4)
    run(other, 4)
    assert not set(other.model.drawn) & set(trained.model.drawn)


def test_a_checkpoint_of_mixed_precision_goes_on_without():
    mixed = trainer(batches(), dtype=torch.float16)
    run(mixed, 2)
    state = copy.deepcopy(mixed.state_dict())
    trainer(batches()).load_state_dict(state)
    again = trainer(batches(), dtype=torch.float16)
    again.load_state_dict(state)
    assert again.grad_scaler.state_dict() == mixed.grad_scaler.state_dict()


@pytest.fixture(scope="module")
def detector():
    """The nano detector, and a batch of two images for it."""
    model = instantiate(model_zoo.get_config("cascade_mask_rcnn_mamba_vision_nano_shapes").model)
    images = []
    for k in range(2):
        instances = Instances((96, 128))
        instances.gt_boxes = Boxes(torch.tensor([[16.0, 16.0, 48.0, 48.0]]))
        instances.gt_classes = torch.tensor([k])
        instances.gt_masks = BitMasks(torch.ones(1, 96, 128, dtype=torch.bool))
        pixels = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
        images.append({"file_name": f"{k}.jpg", "image": pixels, "instances": instances})
    return model, images


@pytest.mark.parametrize(
    "overflowing",
    [
        "backbone.fpn_output3",
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_predictor.0.bbox_pred",
        "roi_heads.box_predictor.1.cls_score",
        "roi_heads.mask_head.2.predictor",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_detector_outlives_an_overflow_anywhere(detector, overflowing, value, tmp_path):
    """Detectron2 raises where boxes are not finite; and a norm's statistics would never recover."""
    model, images = detector
    before = copy.deepcopy(model.state_dict())
    trained = Trainer(
        model,
        iter([images]),
        torch.optim.SGD(model.parameters(), lr=0.1),
        seed=0,
        max_nonfinite=9,
        output_dir=tmp_path,
    )

    handle = model.get_submodule(overflowing).register_forward_hook(
        lambda module, inputs, output: output + value
    )
    trained.train(0, 1)
    handle.remove()
    record = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert [image["file_name"] for image in record["images"]] == ["0.jpg", "1.jpg"]
    assert {"nan", "inf"} & set(record["losses"].values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


WAITS_OF_HEADS = 3  # of each stage, for how many RoIs it samples
WAITS_OF_PROPOSALS = 2 * 6  # of each image for how many boxes remain


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_cpu_waits_for_the_gpu_seldom(detector, dtype, tmp_path):
    model, images = copy.deepcopy(detector)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    options = {"seed": 0, "dtype": dtype, "max_nonfinite": 9, "output_dir": tmp_path}
    trained = Trainer(model, iter([images] * 4), optimizer, **options)
    trained.train(0, 3)  # kernels are built, and the scale of gradients is found
    waits, skipped = [], (__file__, warnings.__file__)

    def record(message, *_, **__):
        if "synchronizing" in str(message):
            callers = [f for f in traceback.extract_stack()[::-1] if f.filename not in skipped]
            waits.append(" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in callers))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trained.train(3, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    of_heads = [wait for wait in waits if "cascade.py" in wait]
    told = "\n".join(waits)
    assert len(of_heads) == WAITS_OF_HEADS, told
    assert all(wait.startswith("cascade.py") for wait in of_heads), told
    assert len(waits) <= WAITS_OF_HEADS + WAITS_OF_PROPOSALS, told
