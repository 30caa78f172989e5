"""The documents: their links lead somewhere, and their examples in Python run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for folder in (".", "docs", "projects/MambaVision", "tools")
    for page in sorted((ROOT / folder).glob("*.md"))
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def anchors(page):
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["README.md", "projects/MambaVision/README.md"])
def test_examples_run(name):
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.M)
    assert examples
    for example in examples:
        names: dict = {}
        exec(example, names)
        if "features" in names:  # the comment beside it
            shapes = {feature: tuple(x.shape) for feature, x in names["features"].items()}
            assert shapes == {"res3": (1, 160, 28, 40), "res5": (1, 640, 7, 10)}
        if "model" in names:
            from detectron2.config import instantiate

            shapes = instantiate(names["model"].backbone).output_shape()
            assert list(shapes) == ["p2", "p3", "p4", "p5", "p6"]
