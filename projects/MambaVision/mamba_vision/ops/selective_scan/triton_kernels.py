"""Triton kernels of the chunked selective scan; README.md beside this has the maths.

One program is one warp. It takes a chunk of T tokens of one image and a block of 32 channels, one a
lane, and walks the tokens with the channels' states in registers: a state is a tuple of N vectors
of 32. B_t and C_t come in one load, a number a lane, and go round by shuffles. All is computed in
float32.

Tokens past the end and channels past the last are read from the last ones. Their step sizes, and
what their outputs would send back, are 0: so they change no state and add to no sum.

Shapes, besides those of ``ops``: K chunks. The rows of u, delta, B, C, y and the gradients follow
each other at a constant distance, image after image; B and C have the same dtype and distance.
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
def _vector(pointer, columns, D, GIVEN: tl.constexpr):
    """A number per channel; zeros if it is not given."""
    if GIVEN:
        return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)
    return tl.zeros(columns.shape, tl.float32)


@triton.jit
def _zeros(columns, N: tl.constexpr):
    state = ()
    for _ in tl.static_range(N):
        state += (tl.zeros(columns.shape, tl.float32),)
    return state


@triton.jit
def _load_rates(A, columns, D, N: tl.constexpr):
    """A (D, N), for powers of 2."""
    rates = ()
    for n in tl.static_range(N):
        rates += (tl.load(A + columns * N + n, mask=columns < D, other=0.0).to(tl.float32) * LOG2E,)
    return rates


@triton.jit
def _load_state(pointer, columns, D, N: tl.constexpr):
    state = ()
    for n in tl.static_range(N):
        state += (tl.load(pointer + n * D + columns, mask=columns < D, other=0.0),)
    return state


@triton.jit
def _store_state(pointer, state, columns, D, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(pointer + n * D + columns, state[n], mask=columns < D)


@triton.jit
def _weights(B, C, lanes, N: tl.constexpr):
    """Where a lane finds its number among B_t and C_t: B_0 .. B_(N - 1), C_0 .. C_(N - 1), any."""
    place = lanes % (2 * N)
    return tl.where(place < N, B + place, C + place - N)


@triton.jit
def _row(pointers, t, stride):
    """A token's numbers, one a lane."""
    return tl.load(pointers + t * stride).to(tl.float32)


@triton.jit
def _of(weights, n: tl.constexpr):
    """The number of lane n, for all lanes."""
    return tl.gather(weights, tl.full(weights.shape, n, tl.int32), 0)


@triton.jit
def _step_size(delta, here, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        return tl.where(here, _softplus(delta), 0.0)
    return tl.where(here, delta, 0.0)


@triton.jit
def _advance(state, rates, step, drive, weights, N: tl.constexpr):
    """exp(delta A) h + delta u B."""
    after = ()
    for n in tl.static_range(N):
        after += (tl.exp2(rates[n] * step) * state[n] + drive * _of(weights, n),)
    return after


@triton.jit
def _run(
    state, first, rates, shift, u, delta, BC, L, inside, u_row, delta_row, BC_row,
    TOKENS: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The state after tokens first .. first + TOKENS - 1."""
    for i in tl.static_range(TOKENS):
        t = tl.minimum(first + i, L - 1)
        here = inside & (first + i < L)
        step = _step_size(_row(delta, t, delta_row) + shift, here, SOFTPLUS)
        drive = step * _row(u, t, u_row)
        state = _advance(state, rates, step, drive, _row(BC, t, BC_row), N)
    return state


@triton.jit
def scan_chunks(
    u, delta, A, B, C, bias, ends, totals, L, D, K, u_row, delta_row, BC_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Run every chunk but the last from a zero state.

    Its end state goes where the next chunk's start will stand, ends (B, K, N, D), and the sum of
    its step sizes to totals (B, K, D).
    """
    batch, k = (tl.program_id(0) // (K - 1)).to(tl.int64), tl.program_id(0) % (K - 1)
    lanes = tl.arange(0, 32)
    columns = tl.program_id(1) * 32 + lanes
    inside, there = columns < D, tl.minimum(columns, D - 1)
    rates = _load_rates(A, columns, D, N)
    shift = _vector(bias, columns, D, BIAS)
    first = batch * L + k * T
    u, delta = u + first * u_row + there, delta + first * delta_row + there
    BC = _weights(B, C, lanes, N) + first * BC_row
    state = _zeros(columns, N)
    total = tl.zeros(columns.shape, tl.float32)
    for s in range(T // S):
        for i in tl.static_range(S):
            t = s * S + i
            step = _step_size(_row(delta, t, delta_row) + shift, inside, SOFTPLUS)
            drive = step * _row(u, t, u_row)
            state = _advance(state, rates, step, drive, _row(BC, t, BC_row), N)
            total += step
    _store_state(ends + (batch * K + k + 1) * N * D, state, columns, D, N)
    tl.store(totals + (batch * K + k) * D + columns, total, mask=inside)


@triton.jit
def _then(decay, state, later_decay, later_state):
    return later_decay * decay, later_decay * state + later_state


@triton.jit
def join_chunks(
    states, totals, A, D, K,
    N: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what chunks leave when they start from zero into what enters them, in place.

    states (B, K, N, D): for each chunk what the one before it left, "before" being to the right if
    REVERSE. A state decays over a chunk by exp(A * total). The first chunk's becomes zero. CHUNKS
    of them are taken at a time, each lane going through those of its channel.
    """
    batch, n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    columns = tl.program_id(1) * 32 + tl.arange(0, 32)
    inside = columns < D
    rates = tl.load(A + columns * N + n, mask=inside, other=0.0).to(tl.float32) * LOG2E
    states += batch * K * N * D + n * D
    totals += batch * K * D
    entering = tl.zeros(columns.shape, tl.float32)
    first = 0
    while first < K:
        turn = first + tl.arange(0, CHUNKS)[:, None]
        place, before = turn, turn - 1
        if REVERSE:
            place, before = K - 1 - turn, K - turn
        known = inside & (turn < K) & (turn > 0)
        total = tl.load(totals + before * D + columns, mask=known, other=0.0)
        left = tl.load(states + place * N * D + columns, mask=known, other=0.0)
        decay, state = tl.associative_scan((tl.exp2(rates * total), left), 0, _then)
        state += decay * entering
        tl.store(states + place * N * D + columns, state, mask=inside & (turn < K))
        last = tl.arange(0, CHUNKS)[:, None] == CHUNKS - 1
        entering = tl.sum(tl.where(last, state, 0.0), axis=0)
        first += CHUNKS


@triton.jit
def scan_outputs(
    u, delta, A, B, C, skip, bias, starts, y, L, D, K, u_row, delta_row, BC_row, y_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Run every chunk from its true start, starts (B, K, N, D), and write y."""
    program, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, 32)
    batch, k = program // K, (program % K).to(tl.int32)
    columns = tl.program_id(1) * 32 + lanes
    inside, there = columns < D, tl.minimum(columns, D - 1)
    rates = _load_rates(A, columns, D, N)
    shift = _vector(bias, columns, D, BIAS)
    through = _vector(skip, columns, D, SKIP)
    first, left = batch * L + k * T, L - k * T
    u, delta = u + first * u_row + there, delta + first * delta_row + there
    BC, y = _weights(B, C, lanes, N) + first * BC_row, y + first * y_row + columns
    state = _load_state(starts + program * N * D, columns, D, N)
    for s in range(T // S):
        for i in tl.static_range(S):
            t = tl.minimum(s * S + i, left - 1)
            here = inside & (s * S + i < left)
            step = _step_size(_row(delta, t, delta_row) + shift, here, SOFTPLUS)
            u_t, weights = _row(u, t, u_row), _row(BC, t, BC_row)
            state = _advance(state, rates, step, step * u_t, weights, N)
            y_t = through * u_t
            for n in tl.static_range(N):
                y_t += _of(weights, N + n) * state[n]
            tl.store(y + t * y_row, y_t.to(y.dtype.element_ty), mask=here)


@triton.jit
def scan_chunks_back(
    delta, A, B, C, bias, dy, ends, totals, L, D, K, delta_row, BC_row, dy_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Run every chunk but the first from right to left, from a zero adjoint.

    What it leaves goes to the place of the chunk on its left, ends (B, K, N, D), and the sum of its
    step sizes to totals (B, K, D).
    """
    batch, k = (tl.program_id(0) // (K - 1)).to(tl.int64), tl.program_id(0) % (K - 1) + 1
    lanes = tl.arange(0, 32)
    columns = tl.program_id(1) * 32 + lanes
    inside, there = columns < D, tl.minimum(columns, D - 1)
    rates = _load_rates(A, columns, D, N)
    shift = _vector(bias, columns, D, BIAS)
    first, left = batch * L + k * T, L - k * T
    delta, dy = delta + first * delta_row + there, dy + first * dy_row + there
    BC = _weights(B, C, lanes, N) + first * BC_row
    carry = _zeros(columns, N)
    total = tl.zeros(columns.shape, tl.float32)
    for s in range(T // S - 1, -1, -1):
        for i in tl.static_range(S - 1, -1, -1):
            t = tl.minimum(s * S + i, left - 1)
            here = inside & (s * S + i < left)
            step = _step_size(_row(delta, t, delta_row) + shift, here, SOFTPLUS)
            dy_t, weights = tl.where(here, _row(dy, t, dy_row), 0.0), _row(BC, t, BC_row)
            leaving = ()
            for n in tl.static_range(N):
                adjoint = carry[n] + _of(weights, N + n) * dy_t
                leaving += (tl.exp2(rates[n] * step) * adjoint,)
            carry = leaving
            total += step
    _store_state(ends + (batch * K + k - 1) * N * D, carry, columns, D, N)
    tl.store(totals + (batch * K + k) * D + columns, total, mask=inside)


@triton.jit
def _exchange(values, lanes, distance: tl.constexpr, COUNT: tl.constexpr):
    """Half of COUNT vectors, which lanes so far apart add up each for both."""
    kept = ()
    if COUNT > 1:
        upper = (lanes & distance) != 0
        for i in tl.static_range(COUNT // 2):
            low, high = values[i], values[i + COUNT // 2]
            sent = tl.gather(tl.where(upper, low, high), lanes ^ distance, 0)
            kept += (tl.where(upper, high, low) + sent,)
    else:
        kept += (values[0] + tl.gather(values[0], lanes ^ distance, 0),)
    return kept


@triton.jit
def _sums(values, lanes, COUNT: tl.constexpr):
    """The sums over 32 lanes of COUNT vectors, a power of 2 of at most 32.

    Lane l has that of vector l * COUNT // 32. Summed one by one they would take five shuffles each.
    """
    values = _exchange(values, lanes, 16, COUNT)
    values = _exchange(values, lanes, 8, COUNT // 2)
    values = _exchange(values, lanes, 4, COUNT // 4)
    values = _exchange(values, lanes, 2, COUNT // 8)
    values = _exchange(values, lanes, 1, COUNT // 16)
    return values[0]


@triton.jit
def scan_gradients(
    u, delta, A, B, C, skip, bias, dy, starts, carries, du, ddelta, dBC, dweights,
    L, D, K, u_row, delta_row, BC_row, dy_row,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Walk every chunk from right to left, S tokens at a time, whose states are run again first.

    starts and carries (B, K, N, D) are what enters a chunk from the left and from the right.
    dBC (blocks of channels, B, L, 2 N) and dweights (B, K, N + 2, D) are parts of the sums over
    channels, dB and then dC, and over tokens: dA, then dD and dbias. COUNT is the power of 2 from
    2 N on.
    """
    program, block, lanes = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, 32)
    batch, k = program // K, (program % K).to(tl.int32)
    columns = block * 32 + lanes
    inside, there = columns < D, tl.minimum(columns, D - 1)
    rates = _load_rates(A, columns, D, N)
    shift = _vector(bias, columns, D, BIAS)
    through = _vector(skip, columns, D, SKIP)
    first, left = batch * L + k * T, L - k * T
    u, delta = u + first * u_row + there, delta + first * delta_row + there
    BC, dy = _weights(B, C, lanes, N) + first * BC_row, dy + first * dy_row + there
    du, ddelta = du + first * D + columns, ddelta + first * D + columns
    sum_of = lanes * COUNT // 32
    one_of = (lanes * COUNT % 32 == 0) & (sum_of < 2 * N)
    images = tl.num_programs(0) // K
    dBC += (block.to(tl.int64) * images * L + first) * 2 * N + sum_of
    carry = _load_state(carries + program * N * D, columns, D, N)
    dA = _zeros(columns, N)
    dD = tl.zeros(columns.shape, tl.float32)
    dbias = tl.zeros(columns.shape, tl.float32)
    for half in range(1, -1, -1):
        middle = _load_state(starts + program * N * D, columns, D, N)
        for j in range(half * (T // 2 // 2)):
            middle = _run(
                middle, j * 2, rates, shift, u, delta, BC, left, inside, u_row, delta_row, BC_row,
                2, N, SOFTPLUS,
            )  # fmt: skip
        for s in range(T // 2 // S - 1, -1, -1):
            state = middle
            for j in range(s * (S // 2)):
                t = half * (T // 2) + j * 2
                state = _run(
                    state, t, rates, shift, u, delta, BC, left, inside, u_row, delta_row, BC_row,
                    2, N, SOFTPLUS,
                )  # fmt: skip
            start = half * (T // 2) + s * S
            steps, us, BCs, states = (), (), (), ()  # of S tokens; the states before each
            for i in tl.static_range(S):
                t = tl.minimum(start + i, left - 1)
                here = inside & (start + i < left)
                steps += (_step_size(_row(delta, t, delta_row) + shift, here, SOFTPLUS),)
                us += (_row(u, t, u_row),)
                BCs += (_row(BC, t, BC_row),)
                states += (state,)
                if i + 1 < S:
                    state = _advance(state, rates, steps[i], steps[i] * us[i], BCs[i], N)
            for i in tl.static_range(S - 1, -1, -1):
                t = tl.minimum(start + i, left - 1)
                here = inside & (start + i < left)
                step, u_t, weights = steps[i], us[i], BCs[i]
                dy_t = tl.where(here, _row(dy, t, dy_row), 0.0)
                drive = step * u_t
                ddrive = tl.zeros(columns.shape, tl.float32)
                dstep = tl.zeros(columns.shape, tl.float32)
                leaving, dA_on, dB_t, dC_t = (), (), (), ()
                for n in tl.static_range(N):
                    B_t, decay = _of(weights, n), tl.exp2(rates[n] * step)
                    kept = decay * states[i][n]
                    adjoint = carry[n] + _of(weights, N + n) * dy_t
                    dB_t += (adjoint * drive,)
                    dC_t += (dy_t * (kept + drive * B_t),)
                    ddrive += adjoint * B_t
                    dexponent = adjoint * kept
                    dstep += dexponent * rates[n]
                    dA_on += (dA[n] + dexponent * step,)
                    leaving += (decay * adjoint,)
                carry, dA = leaving, dA_on
                sums = _sums(dB_t + dC_t + _zeros(columns, COUNT - 2 * N), lanes, COUNT)
                tl.store(dBC + t * (2 * N), sums, mask=one_of & (start + i < left))
                dstep = dstep * LN2 + ddrive * u_t
                if SOFTPLUS:
                    dstep *= _sigmoid(_row(delta, t, delta_row) + shift)
                du_t = ddrive * step + through * dy_t
                tl.store(ddelta + t * D, dstep.to(ddelta.dtype.element_ty), mask=here)
                tl.store(du + t * D, du_t.to(du.dtype.element_ty), mask=here)
                dbias += dstep
                dD += dy_t * u_t
    dweights += program * (N + 2) * D
    _store_state(dweights, dA, columns, D, N)
    tl.store(dweights + N * D + columns, dD, mask=inside)
    tl.store(dweights + (N + 1) * D + columns, dbias, mask=inside)
