"""Scenes of overlapping, textured shapes with exact visible masks.

A shape is a list of closed contours filled by the even-odd rule: a hole is one more contour.
Shapes are painted back to front; the pixels of an object are those that it, and nothing later,
covers by half or more.

Legend: H, W: height and width of the image in pixels; N: number of objects; P: points of a contour.
Coordinates are (x, y) in pixels, pixel (i, j) covering [j, j + 1) x [i, i + 1).
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "COLORS", "Scene", "draw_scene"]

Array = NDArray[np.float32]
Generator = np.random.Generator

SIDES = (192, 320)  # of an image, in pixels
OBJECTS = (3, 10)  # tried per image; hardly visible ones are taken out
RADII = (11.0, 0.36)  # of an object: the least in pixels, the largest over the image's short side
MIN_AREA = 48  # pixels that an object must show
MIN_VISIBLE = 0.3  # part of its whole area that an object must show
OVERSAMPLING = 4  # along each side, for smooth edges


@dataclass(frozen=True)
class Scene:
    """An image and its objects, back to front.

    ``image``: (H, W, 3) uint8, RGB; ``masks``: (N, H, W) bool, disjoint, none empty; ``labels``: N
    indices into :data:`CLASSES`.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: list[int]


def draw_scene(rng: Generator) -> Scene:
    """Draw one scene; it depends on the state of ``rng`` alone."""
    height, width = (int(side) for side in rng.integers(*SIDES, size=2, endpoint=True))
    labels, coverages = _arrange(rng, height, width)
    owner = _owners(coverages, height, width)

    light = rng.uniform(0, 2 * np.pi)
    towards_light = np.array([np.cos(light), np.sin(light)], np.float32)
    canvas = _background(rng, height, width)
    for coverage in coverages:
        _paint(rng, canvas, coverage, towards_light)
    canvas += rng.normal(0, rng.uniform(0, 0.02), canvas.shape).astype(np.float32)
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(image, owner == np.arange(len(labels))[:, None, None], labels)


# Contours, within the unit circle about (0, 0): each a list of (P, 2) arrays.


def _circle_points(radius: float) -> Array:
    return radius * _on_circle(np.linspace(0, 2 * np.pi, 72, endpoint=False))


def _on_circle(angles: NDArray[np.floating]) -> Array:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def _circle(rng: Generator) -> list[Array]:
    return [_circle_points(1)]


def _triangle(rng: Generator) -> list[Array]:
    return [_on_circle(np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.3, 0.3, 3))]


def _rectangle(rng: Generator) -> list[Array]:
    slant = rng.uniform(0.4, np.pi / 4)
    x, y = np.cos(slant), np.sin(slant)
    return [np.array([(x, y), (-x, y), (-x, -y), (x, -y)], np.float32)]


def _star(rng: Generator) -> list[Array]:
    tips = int(rng.integers(5, 7, endpoint=True))
    points = _on_circle(np.arange(2 * tips) * np.pi / tips)
    points[1::2] *= rng.uniform(0.4, 0.5)
    return [points]


def _ring(rng: Generator) -> list[Array]:
    return [_circle_points(1), _circle_points(rng.uniform(0.45, 0.65))]


def _cross(rng: Generator) -> list[Array]:
    a = rng.uniform(0.24, 0.36)  # half the width of an arm
    arm = np.array([(1, -a), (1, a), (a, a)], np.float32)
    quarter_turn = np.array([(0, -1), (1, 0)], np.float32)
    turns = [np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return [np.concatenate([arm @ turn.T for turn in turns])]


_CONTOURS: dict[str, Callable[[Generator], list[Array]]] = {
    "circle": _circle,
    "triangle": _triangle,
    "rectangle": _rectangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}

CLASSES: tuple[str, ...] = tuple(_CONTOURS)

COLORS: tuple[tuple[int, int, int], ...] = (
    (230, 57, 70),
    (255, 183, 3),
    (42, 157, 143),
    (131, 56, 236),
    (33, 118, 255),
    (251, 86, 7),
)
"""RGB per class, for pictures of masks and boxes; the objects themselves have any colour."""


# Where the objects lie.


def _arrange(rng: Generator, height: int, width: int) -> tuple[list[int], list[Array]]:
    """Choose objects that all show enough of themselves: labels and (H, W) coverages in [0, 1]."""
    labels: list[int] = []
    coverages: list[Array] = []
    areas: list[float] = []
    for _ in range(rng.integers(*OBJECTS, endpoint=True)):
        label = int(rng.integers(len(CLASSES)))
        contours = _place(rng, _CONTOURS[CLASSES[label]](rng), height, width)
        outer, *holes = (cv2.contourArea(contour) for contour in contours)
        labels.append(label)
        coverages.append(_coverage(contours, height, width))
        areas.append(outer - sum(holes))
    owner = _owners(coverages, height, width)
    visible = np.bincount(owner[owner >= 0], minlength=len(labels))
    # Taking an object out only uncovers others, so one pass is enough.
    keep = [
        i for i, area in enumerate(areas) if visible[i] >= max(MIN_AREA, MIN_VISIBLE * area)
    ] or [len(labels) - 1]  # nothing lies on the last one
    return [labels[i] for i in keep], [coverages[i] for i in keep]


def _place(rng: Generator, contours: list[Array], height: int, width: int) -> list[Array]:
    """Stretch, turn, scale and move unit contours into an image."""
    smallest, largest = RADII[0], RADII[1] * min(height, width)
    radius = smallest * (largest / smallest) ** rng.uniform()
    angle, stretch = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.1, 0.1))
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    matrix = radius * turn * np.array([stretch, 1 / stretch])
    margin = 0.5 * radius  # an object may leave the image, but not by more than its outer part
    centre = rng.uniform([margin, margin], [width - margin, height - margin])
    return [(contour @ matrix.T + centre).astype(np.float32) for contour in contours]


def _coverage(contours: Sequence[Array], height: int, width: int) -> Array:
    """How much of each pixel lies inside the contours: (H, W) float32 in [0, 1]."""
    fixed_point = 4  # fractional bits of fillPoly's coordinates, whose integers are pixel centres
    points = [
        np.round((contour * OVERSAMPLING - 0.5) * (1 << fixed_point)).astype(np.int32)
        for contour in contours
    ]
    fine = np.zeros((height * OVERSAMPLING, width * OVERSAMPLING), np.uint8)
    cv2.fillPoly(fine, points, 255, shift=fixed_point)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return coverage.astype(np.float32) / np.float32(255)


def _owners(coverages: Sequence[Array], height: int, width: int) -> NDArray[np.int64]:
    """The index of the object seen at each pixel, (H, W), and -1 for the background."""
    owner = np.full((height, width), -1, np.int64)
    for i, coverage in enumerate(coverages):
        owner[coverage >= 0.5] = i
    return owner


# What they look like. A pattern maps coordinates (H, W) in pixels to a mixture in [0, 1].


def _plain(rng: Generator, u: Array, v: Array) -> Array:
    return np.zeros_like(u)


def _gradient(rng: Generator, u: Array, v: Array) -> Array:
    return ((u - u.min()) / (np.ptp(u) + 1)) ** rng.uniform(0.5, 2)


def _stripes(rng: Generator, u: Array, v: Array) -> Array:
    return _steep(_wave(rng, u))


def _checker(rng: Generator, u: Array, v: Array) -> Array:
    k, phase = 2 * np.pi / rng.uniform(10, 28), rng.uniform(0, 2 * np.pi)
    return _steep(2 * np.sin(k * u + phase) * np.sin(k * v + phase))


def _dots(rng: Generator, u: Array, v: Array) -> Array:
    k = 2 * np.pi / rng.uniform(9, 20)
    return _steep(np.cos(k * u) + np.cos(k * v) - 0.8)


def _noise(rng: Generator, u: Array, v: Array) -> Array:
    height, width = u.shape
    grain = rng.uniform(2.5, 12)
    coarse = rng.random((int(height / grain) + 2, int(width / grain) + 2), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def _wave(rng: Generator, u: Array) -> Array:
    return np.sin(2 * np.pi / rng.uniform(8, 26) * u + rng.uniform(0, 2 * np.pi))


def _steep(wave: Array) -> Array:
    """Make a step of a slope, with a soft edge."""
    return (0.5 + 2.5 * wave).clip(0, 1)


_PATTERNS = (_plain, _gradient, _stripes, _checker, _dots, _noise)


def _colors(
    rng: Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> tuple[Array, Array]:
    """Two random colours of neighbouring hue: (3,) float32 each, RGB in [0, 1]."""
    hue, shift = rng.uniform(), rng.uniform(-0.15, 0.15)
    first, second = (
        colorsys.hsv_to_rgb((hue + turn) % 1, rng.uniform(*saturation), rng.uniform(*value))
        for turn in (0, shift)
    )
    return np.array(first, np.float32), np.array(second, np.float32)


def _texture(rng: Generator, height: int, width: int, colors: tuple[Array, Array]) -> Array:
    """Mix two colours by a random pattern: (H, W, 3) float32."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
    mixture = pattern(rng, c * x + s * y, c * y - s * x)[..., None]
    return colors[0] + mixture * (colors[1] - colors[0])


def _background(rng: Generator, height: int, width: int) -> Array:
    """A pale or dark ground with soft blobs and thin pen strokes: (H, W, 3) float32."""
    tone = rng.uniform(0.15, 0.9)
    tones = (max(0.0, tone - 0.12), min(1.0, tone + 0.12))
    canvas = _texture(rng, height, width, _colors(rng, (0.05, 0.4), tones))
    for _ in range(rng.integers(0, 5)):
        centre = rng.uniform((0, 0), (width, height)).astype(int).tolist()
        axes = rng.uniform(6, 40, 2).astype(int).tolist()
        color = _colors(rng, (0.1, 0.5), tones)[0].tolist()
        cv2.ellipse(canvas, centre, axes, 0, 0, 360, color, -1)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(1.5, 6)).astype(np.float32)
    for _ in range(rng.integers(0, 7)):
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.35, 24))
        stroke = rng.uniform((0, 0), (width, height)) + np.cumsum(5 * _on_circle(heading), axis=0)
        color = _colors(rng, (0.1, 0.7), (0.1, 0.95))[0].tolist()
        fixed_point = np.round(stroke * 16).astype(np.int32)
        cv2.polylines(canvas, [fixed_point], False, color, 1, cv2.LINE_AA, shift=4)
    return canvas


def _paint(rng: Generator, canvas: Array, coverage: Array, towards_light: Array) -> None:
    """Lay an object with a soft shadow and a lit rim upon the (H, W, 3) canvas, in place."""
    depth = rng.uniform(2, 5)
    reach = 20  # of the shadow, in pixels: its shift and three standard deviations of its blur
    left, top, width, height = cv2.boundingRect((coverage > 0).astype(np.uint8))
    rows = slice(max(0, top - reach), top + height + reach)
    columns = slice(max(0, left - reach), left + width + reach)
    ground, coverage = canvas[rows, columns], coverage[rows, columns]
    height, width = coverage.shape
    right, down = (float(x) for x in towards_light)

    shift = np.array([(1, 0, -depth * right), (0, 1, -depth * down)])
    shadow = cv2.warpAffine(cv2.GaussianBlur(coverage, (0, 0), depth), shift, (width, height))
    ground *= 1 - 0.45 * shadow[..., None]

    hill = cv2.GaussianBlur(coverage, (0, 0), 2.5)
    rise = cv2.Sobel(hill, -1, 1, 0) * right + cv2.Sobel(hill, -1, 0, 1) * down
    texture = _texture(rng, height, width, _colors(rng, (0.45, 1.0), (0.4, 1.0)))
    lit = texture * (1 - 0.3 * rise.clip(-1, 1))[..., None]
    ground += coverage[..., None] * (lit - ground)
