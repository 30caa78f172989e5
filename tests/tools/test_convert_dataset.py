"""The tool that checks, completes and splits annotation files."""

import importlib.util
import json
from pathlib import Path

import pytest

from mamba_vision.data import draw_shapes

TOOL = Path(__file__).parents[2] / "tools" / "prepare_coco.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("prepare_coco", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *args: module.main([str(arg) for arg in args])


@pytest.fixture
def drawn(tmp_path):
    draw_shapes(tmp_path / "set", 4)
    return tmp_path / "set" / "annotations.json"


def spoil(path, count):
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:count]:
        del annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(content))


def test_check(run, drawn, capsys):
    objects = len(json.loads(drawn.read_text())["annotations"])
    assert run("check", drawn, "--images", drawn.parent / "images") == 0
    *classes, last = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in classes][:2] == ["circle", "triangle"]
    assert sum(int(line.split()[0]) for line in classes) == objects
    assert last.split()[:6] == [str(objects), "objects", "in", "4", "images;", "nothing"]

    (drawn.parent / "images" / "000003.jpg").unlink()
    assert run("check", drawn) == 0
    assert run("check", drawn, "--images", drawn.parent / "images") == 1
    assert "000003.jpg" in capsys.readouterr().out


def test_check_lists_the_first_problems(run, drawn, capsys):
    content = json.loads(drawn.read_text())
    content["annotations"] = [item | {"category_id": 9} for item in content["annotations"] * 9]
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i
    drawn.write_text(json.dumps(content))
    assert run("check", drawn) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    assert len(problems) == 20
    assert all("has category_id 9" in line for line in problems)
    assert f"{len(content['annotations'])} problems, 20 shown" in last


def test_complete(run, drawn, tmp_path, capsys):
    whole = json.loads(drawn.read_text())
    spoil(drawn, 3)
    assert run("check", drawn) == 1
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
        (["check", tmp_path / "none.json"], "none.json does not exist"),
        (["check", broken], "broken.json is not JSON"),
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
