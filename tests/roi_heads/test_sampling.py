"""Random samples of RoIs: how many of which, how often, and the same for the same seed."""

import pytest
import torch
from detectron2.modeling.sampling import subsample_labels

from mamba_vision.roi_heads.sampling import draw_samples

BACKGROUND = 5


def draw(classes, size=8, fraction=0.25):
    """The samples of each image, and how many of them are foreground."""
    images = [torch.full_like(c, i) for i, c in enumerate(classes)]
    drawn, foreground, others = draw_samples(
        torch.cat(classes),
        torch.cat(images),
        len(classes),
        background=BACKGROUND,
        batch_size_per_image=size,
        positive_fraction=fraction,
    )
    assert len(drawn) == size * len(classes)
    foreground, others = torch.stack([foreground, others]).tolist()
    sizes = [f + b for f, b in zip(foreground, others)]
    assert (drawn[sum(sizes) :] == -1).all()
    return drawn[: sum(sizes)].split(sizes), foreground


def labels(foreground, background, ignored):
    parts = [torch.arange(foreground) % BACKGROUND]
    parts += [torch.full((n,), c) for n, c in ((background, BACKGROUND), (ignored, -1))]
    mixed = torch.cat(parts)
    return mixed[torch.randperm(len(mixed))]


# (foreground, background, ignored) of each image
IMAGES = {
    "enough of both": [(9, 20, 3), (5, 30, 0)],
    "too little foreground": [(1, 20, 3), (0, 20, 3)],
    "too little background": [(9, 3, 3), (9, 0, 1)],
    "one only": [(1, 0, 0), (0, 1, 0), (0, 0, 1)],
    "an image without any": [(9, 20, 3), (0, 0, 0), (1, 1, 1)],
    "nothing at all": [(0, 0, 0)],
}


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("case", IMAGES)
def test_as_many_as_detectron2_draws(case, fraction):
    classes = [labels(*counts) for counts in IMAGES[case]]
    starts = [sum(len(c) for c in classes[:i]) for i in range(len(classes))]
    samples, foreground = draw(classes, fraction=fraction)
    for own, sample, start, count in zip(classes, samples, starts, foreground, strict=True):
        expected = subsample_labels(own, 8, fraction, BACKGROUND)
        places = sample - start
        assert len(set(places.tolist())) == len(places)
        drawn = own[places]
        assert (drawn[:count] != BACKGROUND).all()
        assert (drawn[count:] == BACKGROUND).all()
        assert (drawn != -1).all()
        assert [count, len(places) - count] == [len(part) for part in expected]


def test_every_candidate_is_drawn_as_often():
    classes = [labels(6, 12, 2), labels(3, 10, 0)]
    flat = torch.cat(classes)
    times = torch.zeros(len(flat))
    together = torch.zeros(len(flat), len(flat))
    rounds = 3000
    for _ in range(rounds):
        samples, _ = draw(classes)
        chosen = torch.zeros(len(flat)).index_fill_(0, torch.cat(samples), 1)
        times += chosen
        together += chosen[:, None] * chosen
    first = torch.arange(len(flat)) < 20
    for own, foreground, background in ((first, 2 / 6, 6 / 12), (~first, 2 / 3, 6 / 10)):
        for kind, share in (
            (flat[own] == BACKGROUND, background),
            ((flat[own] != BACKGROUND) & (flat[own] != -1), foreground),
        ):
            # five standard deviations of a binomial's share
            slack = 5 * (share * (1 - share) / rounds) ** 0.5
            assert ((times[own][kind] / rounds - share).abs() < slack).all()
    assert times[flat == -1].sum() == 0
    # pairs of one kind, of which 2 of 6 are drawn: 1 in 15 draws; of two images: independently
    kind = (first & (flat != BACKGROUND) & (flat != -1)).nonzero().flatten()
    pairs = together[kind][:, kind] / rounds
    pairs = pairs[~torch.eye(6, dtype=torch.bool)]
    assert ((pairs - 1 / 15).abs() < 5 * (1 / 15 / rounds) ** 0.5).all()
    other = (~first & (flat != BACKGROUND)).nonzero().flatten()
    across = together[kind][:, other] / rounds
    assert ((across - 2 / 6 * 2 / 3).abs() < 5 * (2 / 9 / rounds) ** 0.5).all()


def test_the_seed_tells_what_is_drawn():
    classes = [labels(20, 80, 3), labels(20, 80, 3)]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(torch.cat(draw(classes)[0]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.cuda
def test_a_gpu_draws_as_many_and_is_not_waited_for():
    classes = [labels(9, 20, 3).cuda(), labels(1, 900, 0).cuda()]
    options = {"background": BACKGROUND, "batch_size_per_image": 8, "positive_fraction": 0.25}
    images = torch.cat([torch.full_like(c, i) for i, c in enumerate(classes)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_samples(torch.cat(classes), images, 2, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    samples, foreground = draw(classes)
    assert foreground == [2, 1]
    assert [len(s) for s in samples] == [8, 8]
    assert (torch.cat(classes)[torch.cat(samples)] != -1).all()
