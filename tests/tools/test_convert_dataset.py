"""The tool that converts, completes and splits annotation files."""

import json

import numpy as np
import pytest
from PIL import Image

from mamba_vision.data import coco_format, draw_shapes


@pytest.fixture
def run(tool):
    main = tool("convert_dataset")
    return lambda *args: main([str(arg) for arg in args])


@pytest.fixture
def drawn(tmp_path):
    draw_shapes(tmp_path / "set", 4)
    return tmp_path / "set" / "annotations.json"


def spoil(path, count):
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:count]:
        del annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(content))


def test_complete(run, drawn, tmp_path, capsys):
    whole = json.loads(drawn.read_text())
    spoil(drawn, 3)
    assert run("complete", drawn, tmp_path / "new" / "whole.json") == 0
    assert "3 annotations completed" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "whole.json").read_text()) == whole


def test_split(run, drawn, tmp_path, capsys):
    files = tmp_path / "train.json", tmp_path / "val.json"
    assert run("split", drawn, *files, "--part", "0.25") == 0
    assert [len(json.loads(file.read_text())["images"]) for file in files] == [3, 1]
    before = [file.read_bytes() for file in files]
    assert run("split", drawn, *files, "--part", "0.5") == 2  # nothing is written over
    assert "exists already" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


def test_bad_input(run, drawn, tmp_path, capsys):
    new = tmp_path / "new.json", tmp_path / "newer.json"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for arguments, message in (
        (["split", tmp_path / "none.json", *new], "none.json does not exist"),
        (["complete", broken, new[0]], "broken.json is not JSON"),
        (["complete", drawn, drawn], "exists already"),
        (["split", drawn, new[0], new[0]], "named twice"),
        (["split", drawn, *new, "--part", "1"], "leaves a set empty"),
        (["split", drawn, *new, "--part", "half"], "--part"),
        ([], "COMMAND"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    spoil(drawn, 1)
    assert run("split", drawn, *new) == 2
    assert "lacks 'area', 'iscrowd'; add them" in capsys.readouterr().err
    assert not any(path.exists() for path in new)


# YOLO


def picture(path, width=200, height=100, orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, exif=exif)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def yolo(tmp_path):
    """Two pictures to train on, the first with two boxes, and one to evaluate."""
    root = tmp_path / "yolo"
    for name in ("train/a", "train/b", "val/c"):
        picture(root / "images" / f"{name}.jpg")
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.9 0.1 0.2 0.2\n")
    write(root / "labels/val/c.txt", "0 .25 .25 .5 .5")
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n")
    return root


def converted(path):
    content = coco_format.read(path)
    assert list(coco_format.problems(content, None)) == []
    names = {image["id"]: image["file_name"] for image in content["images"]}
    labels = {category["id"]: category["name"] for category in content["categories"]}
    return content, [
        (names[item["image_id"]], labels[item["category_id"]], item["bbox"])
        for item in content["annotations"]
    ]


def test_yolo(run, yolo, tmp_path, capsys):
    output = tmp_path / "new" / "train.json"
    assert run("yolo", yolo / "data.yaml", output, "--split", "train") == 0
    content, objects = converted(output)
    # by hand: the middle and the sides, times 200 and 100
    assert objects == [
        ("a.jpg", "dog", [75, 25, 50, 50]),
        ("a.jpg", "cat", [160, 0, 40, 20]),
    ]
    assert [item["area"] for item in content["annotations"]] == [2500, 800]
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("a.jpg", 200, 100),
        ("b.jpg", 200, 100),  # a background
    ]
    assert list(coco_format.problems(content, yolo / "images/train")) == []
    said = capsys.readouterr().out
    assert f"2 images in {yolo / 'images/train'} (1 without an object), 2 boxes, 2 classes" in said

    assert run("yolo", yolo / "data.yaml", tmp_path / "val.json", "--split", "val") == 0
    val, objects = converted(tmp_path / "val.json")
    assert objects == [("c.jpg", "cat", [0, 0, 100, 50])]
    assert val["categories"] == content["categories"]


def test_yolo_outlines(run, yolo, tmp_path, capsys):
    write(yolo / "labels/train/a.txt", "1 0.1 0.1 0.5 0.1 0.5 0.9\n")
    assert run("yolo", yolo / "data.yaml", tmp_path / "a.json", "--split", "train") == 0
    content, objects = converted(tmp_path / "a.json")
    assert objects == [("a.jpg", "dog", [20, 10, 80, 80])]
    (item,) = content["annotations"]
    assert item["segmentation"] == [[20, 10, 100, 10, 100, 90]]
    assert item["area"] == pytest.approx(80 * 80 / 2, rel=0.02)  # in whole pixels

    write(yolo / "labels/train/b.txt", "1 0.5 0.5 0.25 0.5\n")
    assert run("yolo", yolo / "data.yaml", tmp_path / "b.json", "--split", "train") == 2
    assert "1 objects are boxes and 1 outlines" in capsys.readouterr().err
    assert run("yolo", yolo / "data.yaml", tmp_path / "b.json", "--split=train", "--boxes") == 0
    content, objects = converted(tmp_path / "b.json")
    assert [box for *_, box in objects] == [[20, 10, 80, 80], [75, 25, 50, 50]]
    assert not any("segmentation" in item for item in content["annotations"])


def test_yolo_names_every_malformed_line(run, yolo, tmp_path, capsys):
    reasons = {
        "1 0.5 0.5 0.25": "4 values",
        "1 0.5 0.5 0.25 0.5 0.9": "6 values",
        "1 0.1 0.1 0.5 0.1 0.5 0.9 0.2": "8 values",
        "2 0.5 0.5 0.25 0.5": "class 2 is none of 0 to 1",
        "-1 0.5 0.5 0.25 0.5": "class -1 is none",
        "0.5 0.5 0.5 0.25 0.5": "class 0.5 is none",
        "dog 0.5 0.5 0.25 0.5": "'dog' is not a number",
        "1 0.5 nan 0.25 0.5": "'nan' is not finite",
        "1 100 50 50 50": "outside of 0 to 1",
        "1 0.5 0.5 0 0.5": "no area",
        "1 0.5 0.5 0.25 0.5": None,
    }
    write(yolo / "labels/train/a.txt", "\n".join(reasons))
    (yolo / "labels/train/b.txt").write_bytes(b"\xff\xfe")
    (yolo / "images/train/broken.jpg").write_bytes(b"no image")
    output = tmp_path / "a.json"
    assert run("yolo", yolo / "data.yaml", output, "--split", "train") == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if f"{yolo}/labels" in line]
    for number, reason in enumerate(reasons.values(), 1):
        found = [line for line in lines if line.startswith(f"{yolo}/labels/train/a.txt:{number}: ")]
        assert len(found) == (reason is not None)
        assert all(reason in line for line in found)
    assert f"{yolo}/labels/train/b.txt: is not a text file" in lines
    assert not output.exists()

    assert run("yolo", yolo / "data.yaml", output, "--split", "train", "--skip") == 1
    caught = capsys.readouterr()
    assert caught.err.count("skipped: ") == 12
    assert "1 boxes, 2 classes; skipped: 12" in caught.out
    content, objects = converted(output)
    assert objects == [("a.jpg", "dog", [75, 25, 50, 50])]
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jpg"]


def test_yolo_rounding_is_forgiven_and_images_are_turned(run, yolo, tmp_path):
    picture(yolo / "images/train/b.jpg", orientation=6)  # seen as 100 x 200
    write(yolo / "labels/train/b.txt", "0 0.5 0.5 1.000001 1.0\n0 0.05 0.5 0.2 0.1")
    assert run("yolo", yolo / "data.yaml", tmp_path / "a.json", "--split", "train") == 0
    content, objects = converted(tmp_path / "a.json")
    assert content["images"][1] | {"id": 0, "file_name": ""} == {
        "id": 0, "file_name": "", "height": 200, "width": 100,
    }  # fmt: skip
    assert [box for name, _, box in objects if name == "b.jpg"] == [
        [0, 0, 100, 200],
        [0, 90, 15, 20],  # cut off at the border
    ]


def test_yolo_layouts(run, yolo, tmp_path, capsys):
    """Labels beside the images, a list of images, another exporter's paths, other class files."""
    beside = tmp_path / "beside"
    picture(beside / "a.png")
    write(beside / "a.txt", "0 0.5 0.5 0.25 0.5")
    assert run("yolo", beside, tmp_path / "1.json") == 2
    assert "give --classes FILE" in capsys.readouterr().err
    write(beside / "classes.txt", "mouse\n")
    assert run("yolo", beside, tmp_path / "1.json") == 0
    assert converted(tmp_path / "1.json")[1] == [("a.png", "mouse", [75, 25, 50, 50])]
    assert run("yolo", beside, tmp_path / "2.json", "--classes", yolo / "data.yaml") == 0
    assert converted(tmp_path / "2.json")[1][0][1] == "cat"
    assert run("yolo", beside, tmp_path / "3.json", "--classes", tmp_path / "1.json") == 0
    assert converted(tmp_path / "3.json")[1][0][1] == "mouse"

    write(yolo / "list.txt", "images/train/a.jpg\n./images/val/c.jpg\n")
    write(yolo / "roboflow.yaml", "train: ../images/train\nnc: 2\nnames: [cat, dog]")
    for text, names in (
        ("train: list.txt\nnames: [cat, dog]", ["train/a.jpg", "train/a.jpg", "val/c.jpg"]),
        (
            "train: [images/train, images/val]\nnames: [cat, dog]",
            ["train/a.jpg"] * 2 + ["val/c.jpg"],
        ),
        (f"path: {yolo}\ntrain: ../images/train\nnames: [cat, dog]", ["a.jpg"] * 2),
    ):
        write(tmp_path / "yolo" / "other.yaml", text)
        (tmp_path / "4.json").unlink(missing_ok=True)
        assert run("yolo", yolo / "other.yaml", tmp_path / "4.json", "--split", "train") == 0
        assert [name for name, *_ in converted(tmp_path / "4.json")[1]] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: nowhere\nnames: [a]", "nowhere does not exist"),
        ("train: images/train\nnames: [a, a]", "names class 'a' twice"),
        ("train: images/train\nnames: {1: a}", "are not 0, 1, 2"),
        ("train: images/train", "holds no list of class names"),
        ("val: images/val\nnames: [a]", "no split 'train'"),
        ("train: labels/train\nnames: [a]", "no image is in"),
        ("train: images/train\nnames: [a]\nkpt_shape: [17, 3]", "keypoints"),
        ("- a", "is not a mapping"),
        ("a: [", "cannot read"),
    ],
)
def test_bad_data_yaml(run, yolo, tmp_path, capsys, text, message):
    write(yolo / "data.yaml", text)
    assert run("yolo", yolo / "data.yaml", tmp_path / "a.json", "--split", "train") == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "a.json").exists()


def test_yolo_without_labels(run, yolo, tmp_path, capsys):
    (yolo / "labels/train/a.txt").unlink()
    assert run("yolo", yolo / "data.yaml", tmp_path / "a.json", "--split", "train") == 2
    assert "no object is annotated" in capsys.readouterr().err


# Pascal VOC


def xml(name, *objects, size=(200, 100), filename=None):
    lines = ["<annotation>", f"<filename>{filename or name}.jpg</filename>"]
    lines.append("<size><width>{}</width><height>{}</height></size>".format(*size))
    for label, *corners in objects:
        box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
        lines.append(f"<object><name>{label}</name><bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>"])


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    for name in "abc":
        picture(root / "JPEGImages" / f"{name}.jpg")
    write(root / "Annotations/a.xml", xml("a", ("dog", 76, 26, 125, 75), ("cat", 1, 1, 200, 100)))
    write(root / "Annotations/b.xml", xml("b", ("owl", 10.5, 20, 30, 40), size=(0, 0)))
    write(root / "Annotations/c.xml", xml("c"))
    write(root / "ImageSets/Main/train.txt", "a\nc\n")
    write(root / "ImageSets/Main/val.txt", "b  1\n")
    return root


def test_voc(run, voc, tmp_path, capsys):
    assert run("voc", voc, tmp_path / "train.json", "--split", "train") == 0
    assert (
        f"2 images in {voc / 'JPEGImages'} (1 without an object), 2 boxes, 3 classes"
        in capsys.readouterr().out
    )
    content, objects = converted(tmp_path / "train.json")
    assert objects == [  # pixel 1 is the first: [0, 1) along each side
        ("a.jpg", "dog", [75, 25, 50, 50]),
        ("a.jpg", "cat", [0, 0, 200, 100]),
    ]
    assert run("voc", voc, tmp_path / "val.json", "--split", "val") == 0
    val, objects = converted(tmp_path / "val.json")
    assert objects == [("b.jpg", "owl", [9.5, 19, 20.5, 21])]
    assert val["categories"] == content["categories"]  # of all files, whatever the split
    assert run("voc", voc, tmp_path / "all.json") == 0
    assert len(converted(tmp_path / "all.json")[1]) == 3

    # XML files beside the images, named otherwise, and the classes of another file
    flat = tmp_path / "flat"
    picture(flat / "photo.jpg")
    write(flat / "1.xml", xml("1", ("owl", 1, 1, 10, 10), filename="photo"))
    assert run("voc", flat, tmp_path / "flat.json", "--classes", tmp_path / "all.json") == 0
    flat, objects = converted(tmp_path / "flat.json")
    assert objects == [("photo.jpg", "owl", [0, 0, 10, 10])]
    assert flat["categories"] == content["categories"]


def test_voc_names_every_malformed_line(run, voc, tmp_path, capsys):
    objects = (
        ("dog", 76, 26, 125, 75),  # line 4
        ("", 76, 26, 125, 75),
        ("dog", "x", 26, 125, 75),
        ("dog", 76, 26, 125),
        ("dog", 125, 26, 76, 75),
        ("dog", 76, 26, 250, 75),
        ("dog", "1e9", 26, "1e10", 75),
    )
    write(voc / "Annotations/a.xml", xml("a", *objects))
    write(voc / "Annotations/b.xml", xml("b", ("owl", 1, 1, 9, 9), size=(100, 200)))
    write(voc / "Annotations/c.xml", "<annotation>\n<object></annotation>")
    write(voc / "Annotations/d.xml", xml("d"))
    write(voc / "Annotations/e.xml", "<!DOCTYPE a [<!ENTITY x 'y'>]><annotation/>")
    write(voc / "ImageSets/Main/train.txt", "a\nb\nd\nlost\n")
    assert run("voc", voc, tmp_path / "a.json", "--split", "train") == 2
    errors = capsys.readouterr().err
    for place, reason in (
        ("a.xml:5: ", "has no name"),
        ("a.xml:6: ", "bndbox needs a number"),
        ("a.xml:7: ", "bndbox needs a number"),
        ("a.xml:8: ", "no area"),
        ("a.xml:9: ", "over the border of the 200 x 100 image"),
        ("a.xml:10: ", "no pixels"),
        ("b.xml:3: ", "says 100 x 200, the image is 200 x 100"),
        ("c.xml:2: ", "is not XML: mismatched tag"),
        ("d.xml: ", "its image is not in"),
        ("e.xml:1: ", "declares an entity"),
        ("lost.xml: ", "there is no such file"),
    ):
        (line,) = [line for line in errors.splitlines() if f"Annotations/{place}" in line]
        assert reason in line
    assert "11 of its lines or files cannot be converted" in errors
    assert not (tmp_path / "a.json").exists()
    assert run("voc", voc, tmp_path / "a.json", "--split", "train", "--skip") == 1
    assert converted(tmp_path / "a.json")[1] == [("a.jpg", "dog", [75, 25, 50, 50])]


def test_bad_voc_folders(run, voc, tmp_path, capsys):
    write(tmp_path / "names.txt", "dog\ncat\n")
    for arguments, message in (
        (["voc", tmp_path / "none"], "no XML file is in"),
        (["voc", voc, "--split", "all"], "one of those that are there: train, val"),
        (["voc", voc, "--images", tmp_path / "none"], "image folder"),
        (["voc", voc, "--classes", tmp_path / "none.txt"], "cannot read classes"),
        (["voc", voc, "--classes", tmp_path / "names.txt"], "cannot be converted"),
    ):
        assert run(*arguments, tmp_path / "a.json") == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert run("voc", voc, voc / "Annotations/a.xml") == 2
    assert "exists already" in capsys.readouterr().err
