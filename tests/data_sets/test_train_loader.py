"""The training loader: its order, going on in the midst of it, and images that cannot be used."""

import itertools
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from detectron2.utils import comm

from mamba_vision.data import build_train_loader
from mamba_vision.data.sampling import Cursor, GroupSampler
from mamba_vision.errors import UserError
from mamba_vision.transfer import send

SIZE = 37


def records():
    return [
        {"file_name": f"{i}.jpg", "image_id": i, "width": 30 if i % 3 else 20, "height": 25}
        for i in range(SIZE)
    ]


def draw(record):
    """What augmentation does: draw from all generators."""
    return record | {"drawn": (random.random(), np.random.rand(), torch.rand(()).item())}  # noqa: NPY002


def picture(record):
    """What Detectron2's mapper makes of a record, and other things."""
    count = record["image_id"] % 4
    objects = Instances((200, 300), gt_boxes=Boxes(torch.rand(count, 4)))
    objects.gt_classes = torch.arange(count)
    objects.gt_masks = BitMasks(torch.rand(count, 200, 300) > 0.5)
    objects.names = ["a"] * count
    made = {"image": torch.rand(3, 200, 300), "instances": objects}
    return draw(record) | made | {"array": np.arange(count), "list": [count], "nothing": None}


def tensors(record):
    objects = record["instances"]
    return [
        record["image"],
        objects.gt_boxes.tensor,
        objects.gt_classes,
        objects.gt_masks.tensor,
    ]


def loader(mapper=draw, **options):
    np.random.seed(5)  # noqa: NPY002  the order's seed is drawn from here
    return build_train_loader(
        options.pop("dataset", None) or records(),
        mapper=mapper,
        **{"total_batch_size": 4} | options,
    )


def take(batches, count):
    return [[(x["image_id"], x["drawn"]) for x in b] for b in itertools.islice(batches, count)]


def ids(batches):
    return [[image for image, _ in batch] for batch in batches]


@pytest.fixture
def processes(monkeypatch):
    def pretend(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return pretend


def test_one_process_sees_what_detectron2_shows_it():
    expected = build_detection_train_loader(
        records(), mapper=lambda x: x, sampler=TrainingSampler(SIZE, seed=8), total_batch_size=4
    )
    ours = loader(sampler=TrainingSampler(SIZE, seed=8))
    shown = [[x["image_id"] for x in batch] for batch in itertools.islice(expected, 50)]
    assert ids(take(ours, 50)) == shown


def test_augmentation_does_not_depend_on_workers_and_leaves_other_random_numbers_alone():
    torch.manual_seed(3)
    alone = take(loader(num_workers=0), 20)
    after = torch.rand(3)
    assert take(loader(num_workers=1), 20) == take(loader(num_workers=2), 20) == alone
    drawn = [numbers for batch in alone for _, numbers in batch]
    assert len(set(drawn)) == 80  # the same image is augmented otherwise each time
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("grouping", [True, False])
def test_goes_on_after_any_batch(grouping):
    whole = loader(aspect_ratio_grouping=grouping)
    batches, states = [], []
    for batch in itertools.islice(whole, 30):
        batches.append([(x["image_id"], x["drawn"]) for x in batch])
        states.append(whole.state_dict())
    for k in (0, 1, 7, 28):
        other = loader(aspect_ratio_grouping=grouping)
        other._groups.seed = 0
        other.load_state_dict(states[k])
        assert take(other, 29 - k) == batches[k + 1 :]


def test_goes_on_behind_what_the_workers_had_read_ahead():
    whole = take(loader(), 12)
    stopped = loader(num_workers=2, prefetch_factor=8)
    take(stopped, 5)
    resumed = loader(num_workers=1)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 7) == whole[5:]


def test_a_batch_is_of_one_kind_and_every_image_comes_once_an_epoch():
    seen = []
    for batch in ids(take(loader(), 60)):
        assert len({image % 3 == 0 for image in batch}) == 1
        seen += batch
    for epoch in range(5):  # a few wait for their group, and come in the next
        assert len(set(seen[SIZE * epoch : SIZE * (epoch + 1)])) > SIZE - 7
    assert len(set(seen)) == SIZE


def positions(sampler, cursor, count):
    groups = list(itertools.islice(sampler.after(cursor), count))
    return [s.position for group, _ in groups for s in group], groups[-1][1]


def test_processes_share_the_groups_of_one(processes):
    kinds = [i % 2 for i in range(SIZE)]

    def sampler():
        return GroupSampler(TrainingSampler(SIZE, seed=2), 3, kinds)

    alone = list(itertools.islice(sampler().after(Cursor()), 20))
    shared = []
    for rank in range(2):
        processes(rank, 2)
        shared.append(list(itertools.islice(sampler().after(Cursor()), 10)))
    for step, both in enumerate(zip(*shared)):
        assert [group for group, _ in both] == [g for g, _ in alone[2 * step : 2 * step + 2]]
        assert both[0][1] == both[1][1] == alone[2 * step + 1][1]  # all know the same place


@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8), (4, 4)])
def test_no_image_is_lost_or_comes_twice_when_the_groups_change(before, after):
    kinds = [i % 2 for i in range(SIZE)]
    order = TrainingSampler(SIZE, seed=2)
    first, cursor = positions(GroupSampler(order, before, kinds), Cursor(), 9)
    then, end = positions(GroupSampler(order, after, kinds), cursor, 40)
    seen = sorted(first + then + list(end.waiting))
    assert seen == list(range(end.position))


def test_takes_detectron2s_other_samplers():
    factors = torch.tensor([3.0] + [1.0] * (SIZE - 1))
    sampler = RepeatFactorTrainingSampler(factors, seed=1)
    batches = ids(take(loader(sampler=sampler, aspect_ratio_grouping=False), 39))
    seen = [image for batch in batches for image in batch]
    assert seen.count(0) > 2 * seen.count(1)


def unreadable(*images):
    def mapper(record):
        if record["image_id"] in images:
            raise OSError("image file is truncated")
        return draw(record)

    return mapper


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_counted_named_and_replaced(num_workers, caplog):
    good = take(loader(), 30)
    ours = loader(unreadable(7, 9), num_workers=num_workers)
    found = take(ours, 30)
    for before, now in zip(good, found):
        for (image, _), (other, _) in zip(before, now):
            # the next of the same orientation
            assert other == {7: 8, 9: 12}.get(image, image)
    assert set(ours.bad_images.found) == {"7.jpg", "9.jpg"}
    assert "7.jpg: image file is truncated" in caplog.text
    assert caplog.text.count("Bad training image") == 2  # once each, however often they come

    again = loader(unreadable(7, 9))
    again.load_state_dict(ours.state_dict())
    assert set(again.bad_images.found) == {"7.jpg", "9.jpg"}


def test_a_mapper_may_leave_images_out():
    ours = loader(lambda x: None if x["image_id"] == 7 else draw(x))
    assert {image for batch in ids(take(ours, 30)) for image in batch} == {*range(SIZE)} - {7}
    assert not ours.bad_images.found
    with pytest.raises(UserError, match=r"no image of the training set can be used$"):
        take(loader(lambda x: None), 1)


def test_too_many_bad_images_stop():
    ours = loader(unreadable(*range(3)), max_bad_images=2)
    with pytest.raises(UserError, match=r"^3 bad training images, .*=2, the last: "):
        take(ours, 100)


def test_images_that_others_found_count():
    ours = loader(unreadable(1), max_bad_images=2)
    take(ours, 20)
    ours.bad_images.merge([ours.bad_images.take_news(), {"1.jpg": "x", "2.jpg": "y"}])
    assert len(ours.bad_images.found) == 2
    assert not ours.bad_images.has_news()
    ours.bad_images.merge([{"3.jpg": "z"}])
    with pytest.raises(UserError, match="3 bad training images"):
        ours.bad_images.check()


ALONE, PINNED = {}, {"num_workers": 1, "pin_memory": True}


def test_no_image_that_can_be_used():
    ours = loader(unreadable(*range(SIZE)), max_bad_images=SIZE)
    with pytest.raises(UserError, match="no image of the training set can be used, the last: "):
        take(ours, 1)


@pytest.mark.parametrize("options", [ALONE, PINNED])
def test_no_image_among_those_that_may_be_tried(pinning, options):
    with pytest.raises(UserError, match="11 bad training images"):
        take(loader(unreadable(*range(SIZE)), **options), 1)


@pytest.mark.parametrize("options", [ALONE, PINNED])
def test_an_error_in_the_mapper_is_no_bad_image(pinning, options):
    def broken(record):
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        take(loader(broken, **options), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_in_pinned_memory_are_the_same(pinning, num_workers):
    plain = loader(picture, num_workers=num_workers)
    pinned = loader(picture, num_workers=num_workers, pin_memory=True)
    for expected, batch in itertools.islice(zip(plain, pinned), 20):
        for before, now in zip(expected, batch, strict=True):
            for old, new in zip(tensors(before), tensors(now), strict=True):
                assert torch.equal(old, new)
                assert old.dtype == new.dtype
                assert not old.is_pinned()
                assert new.is_pinned() or not new.numel()
            assert list(now) == list(before)
            for name in ("file_name", "image_id", "width", "drawn", "list", "nothing"):
                assert now[name] == before[name]
            assert isinstance(now["array"], np.ndarray)
            assert np.array_equal(now["array"], before["array"])
            assert type(now["instances"]) is Instances
            assert now["instances"].names == before["instances"].names
    assert pinned.state_dict() == plain.state_dict()


def test_the_thread_that_pins_ends_with_the_batches(pinning):
    def pins():
        return any("_pin_memory_loop" in thread.name for thread in threading.enumerate())

    batches = iter(loader(picture, **PINNED))
    next(batches)
    assert pins()
    batches.close()
    assert not pins()


@pytest.mark.cuda
def test_a_gpu_takes_the_workers_batches_without_being_waited_for():
    device, options = torch.device("cuda"), {"num_workers": 2, "pin_memory": True}
    expected = list(itertools.islice(loader(picture), 2))
    first, second = itertools.islice(loader(picture, **options), 2)

    def moved(batch):
        return [image | {"instances": image["instances"].to(device)} for image in batch]

    moved(send(first, device))  # memory is allocated
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # cycles: half a second
        ours = moved(send(second, device))
        assert not torch.cuda.current_stream().query()  # it still sleeps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for before, now in zip(expected[1], ours, strict=True):
        for old, new in zip(tensors(before), tensors(now), strict=True):
            assert new.is_cuda
            assert torch.equal(old, new.cpu())


def test_annotations_without_area_are_left_out_and_named(caplog):
    data = records()
    boxes = ([0, 0, 5, 5], [1, 2, 0, 4], [3, 3, 2, 0])
    data[4]["annotations"] = [{"bbox": b, "bbox_mode": BoxMode.XYWH_ABS} for b in boxes]
    data[6]["annotations"] = [{"bbox": [4, 4, 4, 9], "bbox_mode": BoxMode.XYXY_ABS}]
    data[8]["annotations"] = [{"bbox": [4, 4, 1, 1], "bbox_mode": BoxMode.XYWH_ABS}]
    kept = {}
    ours = loader(lambda x: kept.setdefault(x["image_id"], draw(x)), dataset=data)
    take(ours, 20)
    assert [a["bbox"] for a in kept[4]["annotations"]] == [[0, 0, 5, 5]]
    assert kept[6]["annotations"] == []
    assert len(kept[8]["annotations"]) == 1
    assert set(ours.bad_images.found) == {"4.jpg", "6.jpg"}
    assert "4.jpg: left out 2 annotation(s) whose box has no area" in caplog.text
    with pytest.raises(UserError, match="2 bad training images"):
        take(loader(dataset=data, max_bad_images=1), 1)


@pytest.mark.slow  # PyTorch looks after its workers every five seconds
@pytest.mark.filterwarnings(  # the thread may ask a dead worker for its tensors, and then ends
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize("pin_memory", [False, True])
def test_a_worker_that_dies_costs_nothing(tmp_path, caplog, pinning, pin_memory):
    """Killed once by chance; the second time at the same image, this is taken to be the cause."""
    whole = take(loader(picture), 30)
    options = {"num_workers": 1, "pin_memory": pin_memory}

    def deadly(times):
        def mapper(record):
            if record["image_id"] == 11:
                deaths = tmp_path / f"{times}-{len(list(tmp_path.glob(f'{times}-*')))}"
                if int(deaths.name[2:]) < times:
                    deaths.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return picture(record)

        return mapper

    once = loader(deadly(1), **options)
    assert take(once, 30) == whole
    assert list(once.bad_images.found) == ["11.jpg"]
    assert "was killed by SIGKILL while it was loading it" in caplog.text

    always = take(loader(deadly(9), **options), 30)
    assert not any(image == 11 for batch in always for image, _ in batch)
    assert len(list(tmp_path.glob("9-*"))) == 2

    with pytest.raises(UserError, match=r"1 bad training images, more than .*SIGKILL while it was"):
        take(loader(lambda x: os.kill(os.getpid(), 9), max_bad_images=0, **options), 1)


def test_refuses_what_it_cannot_group_or_share(processes):
    with pytest.raises(UserError, match="lack 'width'"):
        loader(dataset=[{"file_name": "a.jpg"}])
    processes(0, 3)
    with pytest.raises(UserError, match="=4 cannot be shared by 3 processes"):
        loader(sampler=TrainingSampler(SIZE, seed=0))
