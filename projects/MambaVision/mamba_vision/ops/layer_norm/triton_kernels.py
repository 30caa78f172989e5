"""Triton kernels of the residual connection with LayerNorm.

Shape legend: M tokens, in windows of L, C channels, P programs. A program takes ROWS tokens at a
time, each held whole in a row of COLUMNS >= C numbers, and STEPS times as many in all: what all
tokens share it reads once.
"""

import triton
import triton.language as tl


@triton.jit
def _load(x, there, stride, columns, inside):
    return tl.load(x + there * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_keep(keep, token, M, L):
    return tl.load(keep + token // L, mask=token < M, other=0.0).to(tl.float32)[:, None]


@triton.jit
def add_normalize(
    x, branch, gamma, weight, bias, keep, sums, normed, statistics,
    M, C, L, eps, x_row, branch_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    ADD: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """sums and normed (M, C) from x and branch (M, C); statistics (2, M): means, 1 / deviations."""
    columns = tl.arange(0, COLUMNS)[None, :]
    there = columns < C
    scale = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)
    if SCALE:
        factor = tl.load(gamma + columns, mask=there, other=0.0).to(tl.float32)
    for step in range(STEPS):
        token = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row = token[:, None]
        inside = (row < M) & there
        total = _load(x, row, x_row, columns, inside)
        if ADD:
            added = _load(branch, row, branch_row, columns, inside)
            if SCALE:
                added *= factor
            if KEEP:
                added *= _load_keep(keep, token, M, L)
            # The statistics are those of the numbers as they are stored.
            total = (total + added).to(sums.dtype.element_ty)
            tl.store(sums + row * C + columns, total, mask=inside)
            total = total.to(tl.float32)
        mean = tl.sum(total, 1) / C
        centred = tl.where(there, total - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        out = centred * inverse[:, None] * scale + shift
        tl.store(normed + row * C + columns, out.to(normed.dtype.element_ty), mask=inside)
        tl.store(statistics + token, mean, mask=token < M)
        tl.store(statistics + M + token, inverse, mask=token < M)


@triton.jit
def add_normalize_back(
    sums, dsums, dnormed, branch, gamma, weight, keep, statistics, dx, dbranch, parts,
    M, C, L, steps, sums_row, dsums_row, dnormed_row, branch_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ADD: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """dx (M, C) and, if it is not the same, dbranch (M, C); parts (P, 2 or 3, C): dweight, dbias
    and dgamma, each the sum over a program's tokens."""
    columns = tl.arange(0, COLUMNS)[None, :]
    there = columns < C
    scale = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    if SCALE:
        factor = tl.load(gamma + columns, mask=there, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias, dgamma = dweight, dweight
    step = 0
    while step < steps:
        token = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        row = token[:, None]
        inside = (row < M) & there
        mean = tl.load(statistics + token, mask=token < M, other=0.0)[:, None]
        inverse = tl.load(statistics + M + token, mask=token < M, other=0.0)[:, None]
        total = _load(sums, row, sums_row, columns, inside)
        given = _load(dnormed, row, dnormed_row, columns, inside)
        normal = tl.where(inside, (total - mean) * inverse, 0.0)
        dweight += given * normal
        dbias += given
        given *= scale
        along = tl.sum(given * normal, 1)[:, None] / C
        gradient = (given - tl.sum(given, 1)[:, None] / C - normal * along) * inverse
        if ADD:
            gradient += _load(dsums, row, dsums_row, columns, inside)
        tl.store(dx + row * C + columns, gradient.to(dx.dtype.element_ty), mask=inside)
        if KEEP:
            gradient *= _load_keep(keep, token, M, L)
        if SCALE:
            dgamma += gradient * _load(branch, row, branch_row, columns, inside)
            gradient *= factor
        if SCALE or KEEP:
            out = gradient.to(dbranch.dtype.element_ty)
            tl.store(dbranch + row * C + columns, out, mask=inside)
        step += 1
    parts += tl.program_id(0).to(tl.int64) * (3 if SCALE else 2) * C + columns
    tl.store(parts, tl.sum(dweight, 0)[None, :], mask=there)
    tl.store(parts + C, tl.sum(dbias, 0)[None, :], mask=there)
    if SCALE:
        tl.store(parts + 2 * C, tl.sum(dgamma, 0)[None, :], mask=there)
