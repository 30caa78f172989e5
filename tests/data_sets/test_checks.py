"""Data sets that cannot be used are refused in one line; good ones are loaded once."""

import copy
import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mamba_vision.data import check_dataset, checks, coco_format, draw_shapes
from mamba_vision.errors import UserError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "set"
    draw_shapes(folder, 3)
    return folder


@pytest.fixture
def content(drawn):
    return copy.deepcopy(json.loads((drawn / "annotations.json").read_text()))


@pytest.fixture
def register(drawn, tmp_path):
    """Register the drawn images with other annotations, for the length of a test."""

    def register(content, images=drawn / "images", file="annotations.json"):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / file).write_text(text)
        register_coco_instances("checked", {}, str(tmp_path / file), str(images))
        return "checked"

    yield register
    if "checked" in DatasetCatalog:
        DatasetCatalog.remove("checked")
        MetadataCatalog.remove("checked")


def change(section, index, **values):
    return lambda content: content[section][index].update(values)


def without(section, index, key):
    return lambda content: content[section][index].pop(key)


def refused(name, match, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        check_dataset(name, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_set_is_loaded_once(register, content, monkeypatch):
    name = register(content)
    calls = []
    load = DatasetCatalog[name]
    DatasetCatalog[name] = lambda: calls.append(1) or load()
    check_dataset(name, 6)
    check_dataset(name)
    assert len(calls) == 2
    records = DatasetCatalog.get(name)
    assert len(calls) == 2  # handed over
    assert len(records) == 3
    assert DatasetCatalog.get(name) == records
    assert len(calls) == 3  # and not kept for ever


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("<!DOCTYPE html>", "not JSON: Expecting value: line 1 column 1"),
        ('{"images": [', "not JSON"),
        ("\x00\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "holds a list"),
        ('"text"', "holds a str"),
        ('{"images": {}}', "'images' is not a list"),
    ],
)
def test_file_that_is_not_coco(register, text, match):
    assert "annotations.json" in refused(register(text), match)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_section(register, content, key):
    del content[key]
    refused(register(content), f"key '{key}' is missing in annotation file .*annotations.json")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (change("annotations", 1, category_id=7), "annotation 2 has category_id 7"),
        (change("annotations", 1, category_id=0), "annotation 2 has category_id 0"),
        (change("annotations", 1, id=1), r"annotations\[1\] \(id 1\) has the id of an earlier one"),
        (change("annotations", 1, bbox=[]), r"annotation 2 has bbox \[\]"),
        (change("annotations", 1, ignore=1), "annotation 2 has 'ignore' set"),
        (without("annotations", 1, "category_id"), r"annotations\[1\].* lacks 'category_id'"),
        (without("annotations", 1, "image_id"), r"annotations\[1\].* lacks 'image_id'"),
        (without("images", 0, "height"), r"images\[0\] \(id 1\) lacks 'height'; add it"),
        (without("images", 0, "file_name"), r"images\[0\].* lacks 'file_name'"),
        (without("images", 0, "id"), r"images\[0\] \(id None\) lacks 'id'"),
        (without("categories", 2, "name"), r"categories\[2\].* lacks 'name'"),
        (change("images", 2, file_name="lost.jpg"), r"1 image is missing .*lost.jpg"),
        (lambda content: content["categories"].clear(), "which 'categories' does not list"),
        (lambda content: content["images"].clear(), "'images' is empty|holds no image"),
        (lambda content: content["annotations"].clear(), "no annotated object"),
        (lambda content: content["annotations"].append("text"), "is a str, not an object"),
    ],
)
def test_spoilt_annotations(register, content, spoil, match, large, monkeypatch):
    """What Detectron2's reader stumbles over is told, however large the file."""
    if large:
        monkeypatch.setattr(checks, "SMALL", 0)
    spoil(content)
    refused(register(content), match)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (change("annotations", 1, image_id=9), "annotation 2 belongs to image 9"),
        (change("annotations", 1, bbox=[1, 2, -3, 4]), "annotation 2 has bbox"),
        (change("annotations", 1, bbox=[1, 2, 3, float("nan")]), "annotation 2 has bbox"),
        (change("categories", 0, name=7), r"categories\[0\].* has a name that is not text"),
        (without("annotations", 1, "bbox"), r"annotations\[1\].* lacks 'bbox'"),
        (without("annotations", 1, "area"), r"lacks 'area'; add it, or have tools/convert_dataset"),
        (change("images", 0, width=0), "image 1 has height .* and width 0"),
        (change("annotations", 1, segmentation=None), "annotation 2 has no segmentation"),
        (change("annotations", 1, segmentation=[1, 2]), "annotation 2 has a segmentation that"),
        (
            lambda content: content["annotations"][1]["segmentation"].update(size=[5, 5]),
            "annotation 2 has a segmentation that",
        ),
    ],
)
def test_annotations_that_the_reader_takes(register, content, spoil, match):
    """Of a small file, what would be met later, in training or evaluation, is told as well."""
    spoil(content)
    refused(register(content), match)


def test_missing_files(register, content, tmp_path, monkeypatch):
    name = register(content, images=tmp_path / "nowhere")
    refused(name, "image folder .*nowhere does not exist; .*DETECTRON2_DATASETS")
    monkeypatch.setattr(checks, "SMALL", 0)
    refused(name, "image folder .*nowhere does not exist")
    (tmp_path / "annotations.json").unlink()
    refused(name, "annotation file .*annotations.json does not exist; .*DETECTRON2_DATASETS")
    (tmp_path / "annotations.json").mkdir()
    refused(name, "cannot read annotation file .*annotations.json")


def test_images_in_folders(register, content, drawn, tmp_path):
    for i, image in enumerate(content["images"]):
        folder = tmp_path / "images" / f"part{i}"
        folder.mkdir(parents=True)
        (folder / image["file_name"]).symlink_to(drawn / "images" / image["file_name"])
        image["file_name"] = f"part{i}/{image['file_name']}"
    check_dataset(register(content, images=tmp_path / "images"))
    (tmp_path / "images/part1/000002.jpg").unlink()
    refused("checked", r"1 image is missing .*part1/000002.jpg")


def test_number_of_classes(register, content):
    name = register(content)
    refused(name, "6 classes and the model 80; set model.roi_heads.num_classes=6", num_classes=80)


def test_unknown_name():
    refused("coco_2017_vla", "did you mean 'coco_2017_val'")
    refused("????", "register it first")


def test_test_set_without_annotations(register, content):
    del content["annotations"]
    check_dataset(register(content, file="image_info_test.json"))


def test_set_of_another_kind():
    """A set registered by a function of the user's own: the function's errors pass as they are."""
    DatasetCatalog.register("own", list)
    try:
        refused("own", "'own' holds no image")
        DatasetCatalog["own"] = lambda: 1 // 0
        with pytest.raises(ZeroDivisionError):
            check_dataset("own")
        DatasetCatalog["own"] = lambda: [{"file_name": "a.jpg", "annotations": [{}]}]
        check_dataset("own", 3)
    finally:
        DatasetCatalog.remove("own")
        MetadataCatalog.pop("own", None)


# The format.


def test_split(content):
    train, val = coco_format.split(content, 1 / 3, seed=1)
    assert len(train["images"]) == 2
    assert len(val["images"]) == 1
    for section in ("images", "annotations"):
        together = sorted(train[section] + val[section], key=lambda item: item["id"])
        assert together == content[section]
    for part in (train, val):
        assert list(coco_format.problems(part, None)) == []
        assert part["categories"] == content["categories"]
    assert coco_format.split(content, 1 / 3, seed=1) == (train, val)
    assert (
        len({coco_format.split(content, 1 / 3, seed=s)[1]["images"][0]["id"] for s in range(9)}) > 1
    )
    for part in (0, 0.1, 0.9, 2):
        with pytest.raises(UserError, match=f"a part of {part:g} of 3 images"):
            coco_format.split(content, part)


def test_complete(content):
    expected = copy.deepcopy(content)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    square = {"id": 900, "image_id": 1, "category_id": 1, "bbox": [4, 4, 10, 20]}
    polygon = [[4, 4, 14, 4, 14, 24, 4, 24], [1, 2]]
    content["annotations"] += [square, square | {"id": 901, "segmentation": polygon}]
    assert coco_format.complete(content) == len(content["annotations"])
    assert content["annotations"][:-2] == expected["annotations"]
    assert [item["area"] for item in content["annotations"][-2:]] == [200, 200]
    assert coco_format.complete(content) == 0
