"""The one loop of lightning attention, as Triton kernels: a program walks its tokens and carries a state in registers.

For rows a, b [T, A] and c [T, C], both ways along a segment, ``walk`` computes

    forward    o_t = sum over u <= t of exp(-s (t - u)) (a_t . b_u) c_u     reverse    the same over u >= t

which is the output (a, b, c = q, k, v), dq (do, v, k), and in reverse dk (v, do, q) and dv (k, q, do). README.md says
what the states at a segment's two ends are and why one loop is enough. Exponents are never positive.
"""

import triton
import triton.language as tl

from megatron_m1.kernels.triton_rounding import INTERPRETED, narrow

START = tl.constexpr(0)
LENGTH = tl.constexpr(1)
STATE_IN = tl.constexpr(2)
CARRY_IN = tl.constexpr(3)
STATE_OUT = tl.constexpr(4)
COLUMNS = tl.constexpr(5)
"""A segment's row of the table: first token, tokens, and the slots of its states; -1 is none."""


@triton.jit
def made_once(x):
    """``x`` as it is. The compiler would repeat what led to it in every product that reads it, each in its layout."""
    if INTERPRETED:
        return x
    packed: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=packed)


@triton.jit
def load_rows(base, steps, inside, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
    """Rows of ``base`` [T, ...], columns [first, first + BLOCK): zero outside, through SiLU if asked."""
    columns = first + tl.arange(0, BLOCK)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(base + (steps[:, None] * stride + columns[None, :]), mask=mask, other=0.0)
    if SILU:
        wide = x.to(tl.float32)
        x = made_once(narrow(wide * tl.sigmoid(wide), x.dtype))
    return x


@triton.jit
def state_tile(base, slot, head, heads, stride_a, stride_c, A: tl.constexpr, C: tl.constexpr, first_c, like):
    """Pointers and mask, shaped as ``like``, of a tile of state ``slot`` in ``base`` [N, H, A x C]; -1 has none."""
    a, c = tl.arange(0, like.shape[0]), first_c + tl.arange(0, like.shape[1])
    pointers = base + (slot.to(tl.int64) * heads + head) * (A * C) + a[:, None] * stride_a + c[None, :] * stride_c
    return pointers, (a < tl.where(slot >= 0, A, 0))[:, None] & (c < C)[None, :]


@triton.jit
def add_state(state, base, slot, head, heads, stride_a, stride_c, A: tl.constexpr, C: tl.constexpr, first_c):
    """``state`` plus state ``slot`` of ``base``."""
    pointers, mask = state_tile(base, slot, head, heads, stride_a, stride_c, A, C, first_c, state)
    return state + tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def multiply(x, y, to):
    """``to + x y`` in float32, of float32 not through TF32."""
    if INTERPRETED:
        # Triton's interpreter multiplies bfloat16 as if its bits were integers.
        return tl.dot(x.to(tl.float32), y.to(tl.float32), to)
    return tl.dot(x, y, to, input_precision="ieee")


@triton.jit
def add_keys(state, b, c, weight):
    """``state + b^T (weight c)``; in 16 bits the weighted rows are two terms, so that states keep more than 8 bits."""
    weighted = c.to(tl.float32) * weight[:, None]
    high = narrow(weighted, c.dtype)
    state = multiply(tl.trans(b), high, state)
    if c.dtype != tl.float32:
        low = narrow(weighted - high.to(tl.float32), c.dtype)
        state = multiply(tl.trans(b), low, state)
    return state


@triton.jit
def store_rows(base, steps, inside, stride, first, x, raw, raw_stride, WIDTH: tl.constexpr, SILU_GRAD: tl.constexpr):
    """Store ``x``, times the derivative of SiLU at ``raw`` if asked."""
    columns = first + tl.arange(0, x.shape[1])
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    if SILU_GRAD:
        wide = tl.load(raw + (steps[:, None] * raw_stride + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(wide)
        x = x * gate * (1.0 + wide * (1.0 - gate))
    tl.store(base + (steps[:, None] * stride + columns[None, :]), narrow(x, base.dtype.element_ty), mask=mask)


@triton.jit
def walk(
    a, b, c, o, raw, slopes, table, state_in, carry_in, state_out,
    heads, a_t, a_h, b_t, b_h, c_t, c_h, o_t, o_h, raw_t, raw_h, stride_a, stride_c,
    A: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
    REVERSE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    STATES_IN: tl.constexpr, CARRIES_IN: tl.constexpr, STATES_OUT: tl.constexpr,
    SILU_A: tl.constexpr, SILU_B: tl.constexpr, SILU_C: tl.constexpr, SILU_GRAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a segment of one document, a head, BLOCK_C columns of c and o. Grid: (C tiles x heads, segments).

    Tiles of a head are neighbours, so that they find its rows in L2.
    """
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first_c = (tl.program_id(0) % tiles) * BLOCK_C
    row = table + tl.program_id(1) * COLUMNS
    start, length = tl.load(row + START).to(tl.int64), tl.load(row + LENGTH)
    slope = tl.load(slopes + head).to(tl.float32)
    steps = tl.arange(0, BLOCK_T)
    lag = steps[None, :] - steps[:, None] if REVERSE else steps[:, None] - steps[None, :]
    decay = tl.where(lag >= 0, tl.exp(-slope * tl.maximum(lag, 0)), 0.0)

    state = tl.zeros([BLOCK_A, BLOCK_C], dtype=tl.float32)
    if STATES_IN:
        slot = tl.load(row + STATE_IN)
        state = add_state(state, state_in, slot, head, heads, stride_a, stride_c, A, C, first_c)
    if CARRIES_IN:
        slot = tl.load(row + CARRY_IN)
        state = add_state(state, carry_in, slot, head, heads, stride_a, stride_c, A, C, first_c)

    a, b, c = a + head * a_h, b + head * b_h, c + head * c_h
    o, raw = o + head * o_h, raw + head * raw_h
    chunks = tl.cdiv(length, BLOCK_T)
    for i in tl.range(0, chunks, num_stages=STAGES):
        first = (chunks - 1 - i if REVERSE else i) * BLOCK_T
        at, inside = start + first, first + steps < length
        size = tl.minimum(BLOCK_T, length - first)
        from_first = tl.exp(-slope * (steps + 1))
        to_last = tl.exp(-slope * tl.maximum(size - 1 - steps, 0))
        if KEYS:
            b_rows = load_rows(b + at * b_t, steps, inside, b_t, 0, A, BLOCK_A, SILU_B)
            c_rows = load_rows(c + at * c_t, steps, inside, c_t, first_c, C, BLOCK_C, SILU_C)
        if QUERIES:
            a_rows = load_rows(a + at * a_t, steps, inside, a_t, 0, A, BLOCK_A, SILU_A)
            result = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
            result = multiply(a_rows, narrow(state, a_rows.dtype), result)
            result *= (to_last if REVERSE else from_first)[:, None]
            if KEYS:
                scores = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
                scores = multiply(a_rows, tl.trans(b_rows), scores) * decay
                result = multiply(narrow(scores, c_rows.dtype), c_rows, result)
            store_rows(o + at * o_t, steps, inside, o_t, first_c, result, raw + at * raw_t, raw_t, C, SILU_GRAD)
        state *= tl.exp(-slope * size)
        if KEYS:
            state = add_keys(state, b_rows, c_rows, from_first if REVERSE else to_last)

    if STATES_OUT:
        slot = tl.load(row + STATE_OUT)
        pointers, mask = state_tile(state_out, slot, head, heads, stride_a, stride_c, A, C, first_c, state)
        tl.store(pointers, state, mask=mask)


@triton.jit
def chain(carries, slopes, table, chains, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Turn each segment's own state into the state of its document up to there, in place.

    One program: BLOCK of a state's SIZE numbers, a head, a document. Grid: (SIZE / BLOCK, heads, documents).
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    first, count = tl.load(chains + 2 * tl.program_id(2)), tl.load(chains + 2 * tl.program_id(2) + 1)
    slope = tl.load(slopes + head).to(tl.float32)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(0, count):
        slot = first + i
        length = tl.load(table + slot * COLUMNS + LENGTH)
        pointers = carries + (slot.to(tl.int64) * heads + head) * SIZE + at
        state = state * tl.exp(-slope * length) + tl.load(pointers, mask=at < SIZE, other=0.0)
        tl.store(pointers, state, mask=at < SIZE)
