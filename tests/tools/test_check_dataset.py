"""The tool that looks a data set over: what it finds, and its exit code."""

import json
import shutil

import pytest
from PIL import Image

from mamba_vision.data import draw_shapes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "set"
    draw_shapes(folder, 4)
    return folder


@pytest.fixture
def check(tool, drawn, tmp_path, capsys):
    """Check the drawn set with some spoilt records; returns exit code, output lines and errors."""
    main = tool("check_dataset")
    images = tmp_path / "images"
    shutil.copytree(drawn / "images", images)

    def check(spoil=lambda content: None, *arguments, read_images=True):
        content = json.loads((drawn / "annotations.json").read_text())
        spoil(content)
        (tmp_path / "a.json").write_text(json.dumps(content))
        folder = ("--images", images) if read_images else ()
        capsys.readouterr()
        code = main([str(a) for a in (tmp_path / "a.json", *folder, *arguments)])
        caught = capsys.readouterr()
        return code, caught.out.splitlines(), caught.err

    check.images = images
    return check


def test_a_good_set(check, drawn):
    content = json.loads((drawn / "annotations.json").read_text())
    code, lines, errors = check()
    assert code == 0
    assert lines[-1].endswith("a.json: no problems")
    assert "4/4" in errors  # the progress bar
    table = [line.split() for line in lines[1:7]]
    for category, (objects, images, name) in zip(content["categories"], table, strict=True):
        own = [a for a in content["annotations"] if a["category_id"] == category["id"]]
        assert name == category["name"]
        assert int(objects) == len(own)
        assert int(images) == len({a["image_id"] for a in own})
    assert lines[7].split()[:2] == [str(len(content["annotations"])), "4"]
    assert check(read_images=False)[1][-1].endswith("the images were not read (--images DIR)")


def test_crowds_and_empty_images_are_no_problems(check):
    def spoil(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
        content["annotations"][0]["iscrowd"] = 1

    code, lines, _ = check(spoil)
    assert code == 0
    assert "images without an object: 1, crowd regions: 1" in "\n".join(lines)


def change(section, index, **values):
    return lambda content: content[section][index].update(values)


def again(section, **values):
    return lambda content: content[section].append(content[section][0] | values)


def another_size(content):
    content["images"][1].update(width=7, height=8)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]


@pytest.mark.parametrize(
    ("spoil", "kind", "line"),
    [
        (change("annotations", 0, category_id=99), "annotation file: 1", "has category_id 99"),
        (again("annotations"), "annotation file: 1", "has the id of an earlier one"),
        (again("images"), "annotation file: 1", "has the id of an earlier one"),
        (lambda content: content["images"][0].pop("height"), "annotation file: 1", "'height'"),
        (change("annotations", 0, image_id=99), "annotation file: 1", "belongs to image 99"),
        (
            change("annotations", 0, bbox=[-1.5, 0, 9, 9]),
            "boxes outside of their image: 1",
            "annotation 1 (image 1): bbox [-1.5, 0, 9, 9] reaches 1.5 pixels over",
        ),
        (change("annotations", 0, bbox=[5, 5, 0, 9]), "boxes without area: 1", "[5, 5, 0, 9]"),
        (change("annotations", 0, segmentation=[[1, 2, 3, 4]]), "masks without area: 1", "three"),
        (again("annotations", id=999), "objects annotated twice: 1", "annotation 999 (image 1)"),
        (again("images", id=999), "files listed twice: 1", "000001.jpg is image 1 and image 999"),
        (again("categories", id=9), "classes of the same name: 1", "circle: 2 categories"),
        (change("images", 1, file_name="lost.jpg"), "missing images: 1", "lost.jpg"),
        (another_size, "sizes that differ: 1", "listed as 7 x 8"),
    ],
)
def test_problems(check, spoil, kind, line):
    code, lines, _ = check(spoil)
    assert code == 1
    assert kind in lines
    assert line in lines[lines.index(kind) + 1]
    assert lines[-1].endswith("a.json: 1 problem")


def test_images_are_decoded(check):
    whole = (check.images / "000001.jpg").read_bytes()
    (check.images / "000001.jpg").write_bytes(whole[: len(whole) // 2])  # its header is right
    (check.images / "000002.jpg").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(check.images / "000003.jpg") as image:
        width, height = image.size
        image.save(check.images / "000003.jpg", exif=exif)
    assert width != height
    code, lines, _ = check()
    assert code == 1
    at = lines.index("images that cannot be decoded: 2")
    assert "000001.jpg" in lines[at + 1]
    assert "truncated" in lines[at + 1]
    assert "000002.jpg" in lines[at + 2]
    at = lines.index("sizes that differ: 1")
    assert f"is {height} x {width}, listed as {width} x {height}; the file's EXIF" in lines[at + 1]
    assert lines[-1].endswith("3 problems")


def test_what_cannot_be_read(check, tmp_path, tool, capsys):
    main = tool("check_dataset")
    (tmp_path / "broken.json").write_text("{")
    for arguments, message in (
        (["none.json"], "does not exist"),
        ([tmp_path / "broken.json"], "is not JSON"),
        ([], "annotations"),
    ):
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    code, _, error = check(lambda content: None, "--images", tmp_path / "none")
    assert code == 2
    assert "image folder" in error
    assert check(lambda content: None, "--show", "-1")[0] == 2


def test_the_first_of_each_kind_are_shown(check):
    def spoil(content):
        for annotation in content["annotations"]:
            annotation["bbox"][2] = 0

    code, lines, _ = check(spoil, "--show", "2", read_images=False)
    assert code == 1
    at = next(i for i, line in enumerate(lines) if line.startswith("boxes without area"))
    count = int(lines[at].split()[-1])
    assert lines[at + 3] == f"  ... and {count - 2} more (--show)"
