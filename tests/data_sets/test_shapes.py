"""The drawn data set: scenes, files and registration."""

import json
import multiprocessing
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle

from mamba_vision.data import CLASSES, __main__, draw_shapes, register_shapes, scenes, shapes
from mamba_vision.errors import UserError


@pytest.fixture
def register():
    """Register data sets for the length of a test."""
    names = []

    def register(folder, images=3, **kwargs):
        name = f"drawn_{len(names)}"
        names.append(name)
        register_shapes(name, folder, images, **kwargs)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def read(folder):
    return json.loads((folder / "annotations.json").read_text())


def contents(folder):
    return [path.read_bytes() for path in sorted((folder / "images").iterdir())]


# Scenes.


def test_masks_are_disjoint_and_large_enough():
    labels = set()
    for i in range(40):
        scene = scenes.draw_scene(np.random.default_rng(i))
        height, width = scene.image.shape[:2]
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        assert all(192 <= side <= 320 for side in (height, width))
        assert scene.masks.shape == (len(scene.labels), height, width)
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.masks.sum(axis=(1, 2)).min() >= 48
        labels.update(scene.labels)
    assert labels == set(range(len(CLASSES)))


def test_coverage_of_known_shapes():
    # A rectangle whose sides lie on and between pixel borders: 10 x 6 pixels and half a column.
    rectangle = np.array([(4, 3), (14.5, 3), (14.5, 9), (4, 9)], np.float32)
    coverage = scenes._coverage([rectangle], 20, 30)
    expected = np.zeros((20, 30))
    expected[3:9, 4:14] = 1
    expected[3:9, 14] = 0.5
    # The filled outline is thicker by up to one of the four fine pixels.
    np.testing.assert_allclose(coverage, expected, atol=0.26)
    np.testing.assert_array_equal(coverage[3:9, 4:14], 1)

    circles = [radius * scenes._circle_points(1) + 50 for radius in (40, 20)]
    ring = scenes._coverage(circles, 100, 100)
    assert ring[50, 50] == 0  # the hole
    assert ring[50, 80] == 1
    assert ring.sum() == pytest.approx(np.pi * (40**2 - 20**2), rel=0.02)


def test_later_objects_hide_earlier_ones():
    below, above = np.zeros((2, 6, 8), np.float32)
    below[:, :5] = 1
    above[2:, 3:] = 1
    owner = scenes._owners([below, above], 6, 8)
    np.testing.assert_array_equal(owner[:2, :5], 0)
    np.testing.assert_array_equal(owner[2:, :3], 0)
    np.testing.assert_array_equal(owner[2:, 3:], 1)
    np.testing.assert_array_equal(owner[:2, 5:], -1)


def test_every_object_shows_enough_of_itself(monkeypatch):
    # All objects in one place: the last hides the others unless they are much larger.
    def place(rng, contours, height, width):
        return [30 * contour + 100 for contour in contours]

    monkeypatch.setattr(scenes, "_place", place)
    for i in range(20):
        rng = np.random.default_rng(i)
        labels, coverages = scenes._arrange(rng, 200, 200)
        owner = scenes._owners(coverages, 200, 200)
        for k in range(len(labels)):
            whole = (coverages[k] >= 0.5).sum()
            assert (owner == k).sum() >= max(48, 0.28 * whole)  # 0.3 of the contour's own area


# Files.


def test_image_depends_on_seed_split_and_number_alone(tmp_path):
    for name, images, seed, split in (
        ("a", 3, 1, "train"),
        ("b", 2, 1, "train"),
        ("c", 2, 2, "train"),
        ("d", 2, 1, "val"),
    ):
        draw_shapes(tmp_path / name, images, seed=seed, split=split)
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert a[:2] == b
    assert len({*a, *c, *d}) == 7
    kept = [item for item in read(tmp_path / "a")["annotations"] if item["image_id"] < 3]
    assert kept == read(tmp_path / "b")["annotations"]


def test_annotations_are_what_is_drawn(tmp_path, monkeypatch):
    drawn = []

    def draw(rng):
        drawn.append(scenes.draw_scene(rng))
        return drawn[-1]

    monkeypatch.setattr(shapes, "draw_scene", draw)
    draw_shapes(tmp_path / "set", 4)
    content = read(tmp_path / "set")
    for image, scene in zip(content["images"], drawn, strict=True):
        assert (image["height"], image["width"]) == scene.image.shape[:2]
        stored = cv2.imread(str(tmp_path / "set/images" / image["file_name"]))[..., ::-1]
        assert np.abs(stored.astype(int) - scene.image).mean() < 6  # JPEG
        items = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        for item, mask, label in zip(items, scene.masks, scene.labels, strict=True):
            np.testing.assert_array_equal(rle.decode(item["segmentation"]), mask)
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert item["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert item["area"] == mask.sum()
            assert content["categories"][item["category_id"] - 1]["name"] == CLASSES[label]
    assert [item["id"] for item in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )


def test_failed_drawing_leaves_nothing(tmp_path, monkeypatch):
    def draw(rng, scenes_left=[2]):  # noqa: B006
        scenes_left[0] -= 1
        if scenes_left[0] < 0:
            raise KeyboardInterrupt
        return scenes.draw_scene(rng)

    monkeypatch.setattr(shapes, "draw_scene", draw)
    with pytest.raises(KeyboardInterrupt):
        draw_shapes(tmp_path / "set", 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "seed", "message"), [(0, 0, "0 images"), (1, -1, "seed -1"), (1, 0, "exists")]
)
def test_what_cannot_be_drawn(tmp_path, images, seed, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        draw_shapes(tmp_path, images, seed=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command(tmp_path, capsys):
    assert __main__.main([str(tmp_path / "new/set"), "--images", "2", "--seed", "3"]) == 0
    assert len(read(tmp_path / "new/set")["images"]) == 2
    assert "drew 2 images" in capsys.readouterr().out
    assert __main__.main([str(tmp_path / "new/set")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert __main__.main([str(tmp_path / "other"), "--images", "many"]) == 2
    assert not (tmp_path / "other").exists()


# Registration.


def test_drawn_on_first_use_and_no_more(tmp_path, register):
    name = register(tmp_path / "set")
    metadata = MetadataCatalog.get(name)
    assert not (tmp_path / "set").exists()
    assert metadata.thing_classes == list(CLASSES)
    assert len(metadata.thing_colors) == len(CLASSES)
    records = DatasetCatalog.get(name)
    assert len(records) == 3
    assert {item["category_id"] for r in records for item in r["annotations"]} <= set(range(6))
    before = (tmp_path / "set").stat().st_ino
    assert DatasetCatalog.get(name) == records
    assert (tmp_path / "set").stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.lock"]


@pytest.mark.parametrize("change", ["version", "images", "seed"])
def test_stale_set_is_drawn_anew(tmp_path, register, change, monkeypatch):
    DatasetCatalog.get(register(tmp_path / "set", seed=1))
    old = contents(tmp_path / "set")
    if change == "version":
        (tmp_path / "set/images/000001.jpg").write_bytes(b"old")
        monkeypatch.setattr(shapes, "VERSION", "another")
    arguments = {"version": (3, 1), "images": (2, 1), "seed": (3, 2)}[change]
    DatasetCatalog.get(register(tmp_path / "set", arguments[0], seed=arguments[1]))
    expected = {"version": old, "images": old[:2]}.get(change)
    new = contents(tmp_path / "set")
    assert new == expected if expected else not set(new) & set(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.lock"]


@pytest.mark.parametrize("annotations", [None, "<html>", "[]", '{"info": {"generator": "mine"}}'])
def test_folder_of_someone_else_is_left_alone(tmp_path, register, annotations):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"mine")
    if annotations is not None:
        (folder / "annotations.json").write_text(annotations)
    with pytest.raises(UserError, match="was not drawn by it"):
        DatasetCatalog.get(register(folder))
    assert (folder / "photo.jpg").read_bytes() == b"mine"


def test_folder_that_cannot_be_made(tmp_path, register):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        DatasetCatalog.get(register(tmp_path / "file" / "set"))


def test_two_processes_at_once(tmp_path, register, monkeypatch):
    name = register(tmp_path / "set", 5)
    started = tmp_path / "started"

    def draw(folder, *args, **kwargs):
        with started.open("a") as file:
            file.write("x")
        draw_shapes(folder, *args, **kwargs)

    monkeypatch.setattr(shapes, "draw_shapes", draw)
    context = multiprocessing.get_context("fork")
    counts = context.SimpleQueue()
    processes = [
        context.Process(target=lambda: counts.put(len(DatasetCatalog.get(name)))) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [counts.get() for process in processes] == [5, 5, 5]
    assert started.read_text() == "x"


def test_evaluator_gives_the_truth_full_marks(tmp_path, register):
    name = register(tmp_path / "set", 4)
    records = DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=None)
    evaluator.reset()
    for record in records:
        truth = Instances((record["height"], record["width"]))
        items = record["annotations"]
        boxes = torch.tensor([item["bbox"] for item in items])
        boxes[:, 2:] += boxes[:, :2]
        truth.pred_boxes = Boxes(boxes)
        truth.scores = torch.ones(len(items))
        truth.pred_classes = torch.tensor([item["category_id"] for item in items])
        masks = np.stack([rle.decode(item["segmentation"]) for item in items])
        truth.pred_masks = torch.from_numpy(masks).bool()
        evaluator.process([record], [{"instances": truth}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_import_registers_but_draws_nothing(tmp_path):
    code = (
        "import mamba_vision.data; from detectron2.data import MetadataCatalog as M; "
        "print(M.get('shapes_train').json_file, M.get('shapes_val').json_file)"
    )
    environment = {
        "DETECTRON2_DATASETS": str(tmp_path),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    root = tmp_path / "shapes"
    assert output.split() == [str(root / s / "annotations.json") for s in ("train", "val")]
    assert list(tmp_path.iterdir()) == []
