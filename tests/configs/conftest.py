"""Detectron2's own training tool, and a COCO-like data set of a few small pictures."""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from urllib.parse import urlparse

import cv2
import numpy as np
import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

TOOL = "tools/lazyconfig_train_net.py"


def _fetch(url, commit, folder):
    """The tool's text at a commit of Detectron2, by git, without the rest of the repository."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", folder, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "--quiet")
    git("fetch", "--quiet", "--depth=1", "--filter=blob:none", url, commit)
    git("config", "remote.origin.url", url)
    git("config", "remote.origin.promisor", "true")
    return git("show", f"FETCH_HEAD:{TOOL}")


@pytest.fixture(scope="session")
def stock_tool(request, tmp_path_factory):
    """Path of Detectron2's tools/lazyconfig_train_net.py, of the version that is installed.

    Detectron2's package does not hold its tools. They come from the source that it was installed
    from: a folder, or the git repository, in which case the file is kept in pytest's cache.
    """
    source = json.loads(
        importlib.metadata.distribution("detectron2").read_text("direct_url.json") or "{}"
    )
    url, commit = source.get("url", ""), source.get("vcs_info", {}).get("commit_id")
    if urlparse(url).scheme == "file" and (Path(urlparse(url).path) / TOOL).is_file():
        return Path(urlparse(url).path) / TOOL
    if commit is None:  # a wheel: the tested version's
        pin = next(
            line
            for line in (request.config.rootpath / "requirements.txt").read_text().splitlines()
            if line.startswith("detectron2 @ git+")
        )
        url, _, commit = pin.removeprefix("detectron2 @ git+").rpartition("@")
    path = Path(request.config.cache.mkdir("detectron2")) / commit / Path(TOOL).name
    if not path.is_file():
        try:
            text = _fetch(url, commit, tmp_path_factory.mktemp("detectron2"))
        except subprocess.CalledProcessError as error:
            pytest.fail(
                f"{TOOL} could not be fetched from {url} at {commit}; these tests need it, so run "
                f"them once with a network: {error.stderr}"
            )
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return path


@pytest.fixture
def datasets(tmp_path):
    """A folder for $DETECTRON2_DATASETS with a COCO of four pictures of a square each."""
    images, annotations = [], []
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / split).mkdir(parents=True)
    for i in range(4):
        image = np.full((96, 128, 3), 40 * i, np.uint8)
        x, y, side = 16 * i, 8 * i, 48
        image[y : y + side, x : x + side] = (255, 60 * i, 0)
        for split in ("train2017", "val2017"):
            cv2.imwrite(str(tmp_path / "coco" / split / f"{i}.jpg"), image)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 128})
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": i + 1,
                "bbox": [x, y, side, side],
                "area": side * side,
                "iscrowd": 0,
                "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
            }
        )
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (tmp_path / "coco" / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        path = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return tmp_path
