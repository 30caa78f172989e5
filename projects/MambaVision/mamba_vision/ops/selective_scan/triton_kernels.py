"""Triton kernels of the chunked selective scan; README.md beside this has the maths.

One program is one warp. It takes a chunk of T tokens of one image and a block of channels, a
channel or two a lane, and walks the tokens with the channels' states in registers: a state is a
tuple of N vectors (channels,). Everything is computed in float32; tokens past the end of the
sequence have a step size of 0, with which a state stays as it is.

Shapes, besides those of ``ops``: K chunks; rows of u, delta, y are contiguous, rows of B and C too.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to float32's rounding, also where it is tiny."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) / e for e in [0, 1]: its interpolation in the ten Chebyshev nodes.
    p = 0.019542528 - 0.003176057 * e
    p = p * e - 0.056373615
    p = p * e + 0.105436236
    p = p * e - 0.15269667
    p = p * e + 0.19663274
    p = p * e - 0.24951616
    p = p * e + 0.3332971
    p = p * e - 0.49999893
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _vector(pointer, columns, inside, GIVEN: tl.constexpr):
    """A number per channel; zeros if it is not given."""
    if GIVEN:
        return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.zeros(columns.shape, tl.float32)


@triton.jit
def _row(pointer, columns, inside):
    """A token's numbers."""
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _zeros(columns, N: tl.constexpr):
    state = ()
    for _ in tl.static_range(N):
        state += (tl.zeros(columns.shape, tl.float32),)
    return state


@triton.jit
def _load_rates(A, columns, inside, N: tl.constexpr):
    """A (D, N), for powers of 2."""
    rates = ()
    for n in tl.static_range(N):
        rates += (tl.load(A + columns * N + n, mask=inside, other=0.0).to(tl.float32) * LOG2E,)
    return rates


@triton.jit
def _load_state(pointer, columns, inside, D, N: tl.constexpr):
    state = ()
    for n in tl.static_range(N):
        state += (tl.load(pointer + n * D + columns, mask=inside, other=0.0),)
    return state


@triton.jit
def _store_state(pointer, state, columns, inside, D, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(pointer + n * D + columns, state[n], mask=inside)


@triton.jit
def _step_size(delta, bias, valid, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        return tl.where(valid, _softplus(delta + bias), 0.0)
    return tl.where(valid, delta + bias, 0.0)


@triton.jit
def _advance(state, rates, step, drive, B, valid, N: tl.constexpr):
    """exp(delta_t A) h + delta_t u_t B_t, for a pointer to B_t."""
    after = ()
    for n in tl.static_range(N):
        weight = tl.load(B + n, mask=valid, other=0.0).to(tl.float32)
        after += (tl.exp2(rates[n] * step) * state[n] + drive * weight,)
    return after


@triton.jit
def scan_chunks(
    u, delta, A, B, bias, ends, totals,
    L, D, K, u_batch, u_row, delta_batch, delta_row, B_batch, B_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Run every chunk but the last from a zero state.

    Its end state goes where the next chunk's start will stand, ends (B, K, N, D), and the sum of
    its step sizes to totals (B, K, D).
    """
    batch, k = (tl.program_id(0) // (K - 1)).to(tl.int64), tl.program_id(0) % (K - 1)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    rates = _load_rates(A, columns, inside, N)
    shift = _vector(bias, columns, inside, BIAS)
    u, delta, B = u + batch * u_batch, delta + batch * delta_batch, B + batch * B_batch
    state = _zeros(columns, N)
    total = tl.zeros(columns.shape, tl.float32)
    for s in range(T // S):
        for i in tl.static_range(S):
            t = k * T + s * S + i
            step = _step_size(_row(delta + t * delta_row, columns, inside), shift, True, SOFTPLUS)
            drive = step * _row(u + t * u_row, columns, inside)
            state = _advance(state, rates, step, drive, B + t * B_row, True, N)
            total += step
    _store_state(ends + (batch * K + k + 1) * N * D, state, columns, inside, D, N)
    tl.store(totals + (batch * K + k) * D + columns, total, mask=inside)


@triton.jit
def _then(decay, state, later_decay, later_state):
    return later_decay * decay, later_decay * state + later_state


@triton.jit
def join_chunks(
    states, totals, A, D, K,
    N: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what chunks leave when they start from zero into what enters them, in place.

    states (B, K, N, D): for each chunk what the one before it left, "before" being to the right if
    REVERSE. A state decays over a chunk by exp(A * total). The first chunk's becomes zero.
    """
    blocks = tl.cdiv(D, CHANNELS)
    row = tl.program_id(0) // blocks
    batch, n = (row // N).to(tl.int64), row % N
    columns = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    rates = tl.load(A + columns * N + n, mask=inside, other=0.0).to(tl.float32) * LOG2E
    states += batch * K * N * D + n * D
    totals += batch * K * D
    carry = tl.zeros(columns.shape, tl.float32)
    first = 0
    while first < K:
        place = first + tl.arange(0, CHUNKS)
        before = place - 1
        if REVERSE:
            place, before = K - 1 - place, K - place
        known = ((place >= 0) & (place < K) & (before >= 0) & (before < K))[:, None] & inside
        total = tl.load(totals + before[:, None] * D + columns, mask=known, other=0.0)
        left = tl.load(states + place[:, None] * N * D + columns, mask=known, other=0.0)
        decay, state = tl.associative_scan((tl.exp2(rates * total), left), 0, _then)
        state += decay * carry
        within = ((place >= 0) & (place < K))[:, None] & inside
        tl.store(states + place[:, None] * N * D + columns, state, mask=within)
        last = tl.arange(0, CHUNKS)[:, None] == CHUNKS - 1
        carry = tl.sum(tl.where(last, state, 0.0), axis=0)
        first += CHUNKS


@triton.jit
def scan_outputs(
    u, delta, A, B, C, skip, bias, starts, y,
    L, D, K, u_batch, u_row, delta_batch, delta_row, B_batch, B_row, C_batch, C_row, y_batch, y_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Run every chunk from its true start, starts (B, K, N, D), and write y."""
    batch, k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    rates = _load_rates(A, columns, inside, N)
    shift = _vector(bias, columns, inside, BIAS)
    through = _vector(skip, columns, inside, SKIP)
    u, delta, y = u + batch * u_batch, delta + batch * delta_batch, y + batch * y_batch
    B, C = B + batch * B_batch, C + batch * C_batch
    state = _load_state(starts + (batch * K + k) * N * D, columns, inside, D, N)
    for s in range(T // S):
        for i in tl.static_range(S):
            t = k * T + s * S + i
            valid = t < L
            here = inside & valid
            step = _step_size(_row(delta + t * delta_row, columns, here), shift, valid, SOFTPLUS)
            u_t = _row(u + t * u_row, columns, here)
            state = _advance(state, rates, step, step * u_t, B + t * B_row, valid, N)
            y_t = through * u_t
            for n in tl.static_range(N):
                weight = tl.load(C + t * C_row + n, mask=valid, other=0.0).to(tl.float32)
                y_t += weight * state[n]
            tl.store(y + t * y_row + columns, y_t.to(y.dtype.element_ty), mask=here)


@triton.jit
def scan_chunks_back(
    delta, A, C, bias, dy, ends, totals,
    L, D, K, delta_batch, delta_row, C_batch, C_row, dy_batch, dy_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Run every chunk but the first from right to left, from a zero adjoint.

    What it leaves goes to the place of the chunk on its left, ends (B, K, N, D), and the sum of its
    step sizes to totals (B, K, D).
    """
    batch, k = (tl.program_id(0) // (K - 1)).to(tl.int64), tl.program_id(0) % (K - 1) + 1
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    rates = _load_rates(A, columns, inside, N)
    shift = _vector(bias, columns, inside, BIAS)
    delta, dy, C = delta + batch * delta_batch, dy + batch * dy_batch, C + batch * C_batch
    carry = _zeros(columns, N)
    total = tl.zeros(columns.shape, tl.float32)
    for s in range(T // S):
        for i in tl.static_range(S):
            t = k * T + T - 1 - s * S - i
            valid = t < L
            here = inside & valid
            step = _step_size(_row(delta + t * delta_row, columns, here), shift, valid, SOFTPLUS)
            dy_t = _row(dy + t * dy_row, columns, here)
            leaving = ()
            for n in tl.static_range(N):
                weight = tl.load(C + t * C_row + n, mask=valid, other=0.0).to(tl.float32)
                leaving += (tl.exp2(rates[n] * step) * (carry[n] + weight * dy_t),)
            carry = leaving
            total += step
    _store_state(ends + (batch * K + k - 1) * N * D, carry, columns, inside, D, N)
    tl.store(totals + (batch * K + k) * D + columns, total, mask=inside)


@triton.jit
def scan_gradients(
    u, delta, A, B, C, skip, bias, dy, starts, carries, du, ddelta, dBC, dweights,
    L, D, K, u_batch, u_row, delta_batch, delta_row, B_batch, B_row, C_batch, C_row,
    dy_batch, dy_row, du_batch, du_row, ddelta_batch, ddelta_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Walk every chunk from right to left, S tokens at a time, whose states are run again first.

    starts and carries (B, K, N, D) are what enters a chunk from the left and from the right.
    dBC (blocks of channels, B, L, 2 N) and dweights (B, K, N + 2, D) are parts of the sums over
    channels, dB and then dC, and over tokens: dA, then dD and dbias.
    """
    program, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, k = program // K, (program % K).to(tl.int32)
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    rates = _load_rates(A, columns, inside, N)
    shift = _vector(bias, columns, inside, BIAS)
    through = _vector(skip, columns, inside, SKIP)
    u, delta, dy = u + batch * u_batch, delta + batch * delta_batch, dy + batch * dy_batch
    B, C = B + batch * B_batch, C + batch * C_batch
    du, ddelta = du + batch * du_batch, ddelta + batch * ddelta_batch
    dBC += (block * tl.num_programs(0) // K + batch) * L * 2 * N
    start = _load_state(starts + program * N * D, columns, inside, D, N)
    carry = _load_state(carries + program * N * D, columns, inside, D, N)
    dA, dD, dbias = _zeros(columns, N), tl.zeros(columns.shape, tl.float32), tl.zeros(
        columns.shape, tl.float32
    )  # fmt: skip
    for s in range(T // S - 1, -1, -1):
        state = start
        for j in range(s):
            for i in tl.static_range(S):
                t = k * T + j * S + i
                valid = t < L
                here = inside & valid
                step = _step_size(
                    _row(delta + t * delta_row, columns, here), shift, valid, SOFTPLUS
                )
                drive = step * _row(u + t * u_row, columns, here)
                state = _advance(state, rates, step, drive, B + t * B_row, valid, N)
        states = ()  # before each of the S tokens
        for i in tl.static_range(S):
            states += (state,)
            if i + 1 < S:
                t = k * T + s * S + i
                valid = t < L
                here = inside & valid
                step = _step_size(
                    _row(delta + t * delta_row, columns, here), shift, valid, SOFTPLUS
                )
                drive = step * _row(u + t * u_row, columns, here)
                state = _advance(state, rates, step, drive, B + t * B_row, valid, N)
        for i in tl.static_range(S - 1, -1, -1):
            t = k * T + s * S + i
            valid = t < L
            here = inside & valid
            raw = _row(delta + t * delta_row, columns, here) + shift
            step = _step_size(raw, 0.0, valid, SOFTPLUS)
            u_t = _row(u + t * u_row, columns, here)
            dy_t = _row(dy + t * dy_row, columns, here)
            drive = step * u_t
            ddrive = tl.zeros(columns.shape, tl.float32)
            dstep = tl.zeros(columns.shape, tl.float32)
            leaving, dA_on = (), ()
            for n in tl.static_range(N):
                B_t = tl.load(B + t * B_row + n, mask=valid, other=0.0).to(tl.float32)
                C_t = tl.load(C + t * C_row + n, mask=valid, other=0.0).to(tl.float32)
                decay = tl.exp2(rates[n] * step)
                kept = decay * states[i][n]
                adjoint = carry[n] + C_t * dy_t
                sums = dBC + t * 2 * N + n
                tl.store(sums, tl.sum(adjoint * drive), mask=valid)
                tl.store(sums + N, tl.sum(dy_t * (kept + drive * B_t)), mask=valid)
                ddrive += adjoint * B_t
                dexponent = adjoint * kept
                dstep += dexponent * rates[n]
                dA_on += (dA[n] + dexponent * step,)
                leaving += (decay * adjoint,)
            carry, dA = leaving, dA_on
            dstep = dstep * LN2 + ddrive * u_t
            if SOFTPLUS:
                dstep *= _sigmoid(raw)
            dstep = tl.where(valid, dstep, 0.0)
            du_t = ddrive * step + through * dy_t
            tl.store(
                ddelta + t * ddelta_row + columns, dstep.to(ddelta.dtype.element_ty), mask=here
            )
            tl.store(du + t * du_row + columns, du_t.to(du.dtype.element_ty), mask=here)
            dbias += dstep
            dD += dy_t * u_t
    dweights += program * (N + 2) * D
    _store_state(dweights, dA, columns, inside, D, N)
    tl.store(dweights + N * D + columns, dD, mask=inside)
    tl.store(dweights + (N + 1) * D + columns, dbias, mask=inside)
