"""Triton kernels of NMS.

Bit k of overlaps[g, w, j], int32 (G, words, n), tells whether box i = 32 w + k of group g lies
before box j and overlaps it. Words of which every box lies behind j are not written, nor read.
"""

import triton
import triton.language as tl


@triton.jit
def _corners(boxes, places, n):
    """x0, y0, x1 and y1 of boxes (n, 4)."""
    inside = places < n
    boxes += places * 4
    x0 = tl.load(boxes, mask=inside, other=0.0)
    y0 = tl.load(boxes + 1, mask=inside, other=0.0)
    x1 = tl.load(boxes + 2, mask=inside, other=0.0)
    y1 = tl.load(boxes + 3, mask=inside, other=0.0)
    return x0, y0, x1, y1


@triton.jit
def find_overlaps(boxes, overlaps, n, words, threshold, BOXES: tl.constexpr):
    """A word of overlaps for each of BOXES boxes."""
    group, word = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.program_id(2) * BOXES
    if start + BOXES > word * 32:
        lane = tl.arange(0, 32)
        i, j = word * 32 + lane, start + tl.arange(0, BOXES)
        boxes += group * n * 4
        left, top, right, bottom = _corners(boxes, i, n)
        x0, y0, x1, y1 = _corners(boxes, j, n)
        area = (right - left) * (bottom - top)
        width = tl.minimum(right[:, None], x1) - tl.maximum(left[:, None], x0)
        height = tl.minimum(bottom[:, None], y1) - tl.maximum(top[:, None], y0)
        shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        union = area[:, None] + (x1 - x0) * (y1 - y0) - shared
        hit = (tl.div_rn(shared, union) > threshold) & (i[:, None] < j)
        bits = tl.sum(hit.to(tl.int32) << lane[:, None], 0)
        tl.store(overlaps + (group * words + word) * n + j, bits, mask=j < n)


@triton.jit
def choose(overlaps, valid, kept, keep, n, words, WORDS: tl.constexpr):
    """keep (G, n) from valid (G, n), 32 boxes after 32; kept (G, words) holds its bits."""
    group = tl.program_id(0).to(tl.int64)
    overlaps, kept = overlaps + group * words * n, kept + group * words
    valid, keep = valid + group * n, keep + group * n
    lane = tl.arange(0, 32)
    word = 0
    while word < words:
        j = word * 32 + lane
        inside = j < n
        alive = tl.load(valid + j, mask=inside, other=0) != 0
        own = tl.load(overlaps + word * n + j, mask=inside, other=0)

        hits = tl.zeros([WORDS, 32], tl.int32)
        first = 0
        while first < word:
            w = first + tl.arange(0, WORDS)
            earlier = w < word
            there = overlaps + w[:, None] * n + j
            bits = tl.load(there, mask=earlier[:, None] & inside, other=0)
            hits |= bits & tl.load(kept + w, mask=earlier, other=0)[:, None]
            first += WORDS
        alive &= tl.max((hits != 0).to(tl.int32), 0) == 0

        # Box k no longer changes after k + 1 rounds, as only those before it bear on it.
        chosen = tl.sum(alive.to(tl.int32) << lane, 0)
        before = ~chosen
        while before != chosen:
            before = chosen
            chosen = tl.sum((alive & (own & before == 0)).to(tl.int32) << lane, 0)

        tl.store(keep + j, (chosen >> lane) & 1 != 0, mask=inside)
        tl.store(kept + word, chosen)
        tl.debug_barrier()  # the next round reads what was stored
        word += 1
