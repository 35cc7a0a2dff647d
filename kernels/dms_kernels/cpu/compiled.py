"""``rows.append`` and paged decode attention as machine code, by numba: fp32, no call into torch for each operation.

A layer's step on a small model costs what torch needs for a few operations, and on long rows keys are read once for a
whole GQA group.  The first call compiles, some seconds, and the result is kept on disk.
"""

import ctypes

import numpy as np
from numba import carray, cfunc, njit, types

LOG2E = np.float32(1.4426950408889634)
ZERO, HALF, ONE, LOWEST = np.float32(0), np.float32(0.5), np.float32(1), np.float32(-np.inf)
FLOOR = np.float32(-126)  # 2^-126 is the smallest normal number: what is below weighs nothing
# 2^x on [-1/2, 1/2] with the coefficients ln(2)^n / n!: relative error 2.4e-7 in fp32, two units in the last place.
C1, C2, C3, C4, C5, C6 = (
    np.float32(c) for c in (0.6931471806, 0.2402265069, 0.0555041086, 0.0096181291, 0.0013333558, 0.000154035)
)
OPTIONS = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}}  # NaN and infinity stay
compiled, inlined = njit(**OPTIONS), njit(**OPTIONS, inline="always")


@compiled
def append(
    keys, values, table, length, owned, free, free_count, ring_slot, ring_evict, seen, reads, overflow,
    k, v, evict, active, lag,
):  # fmt: skip
    """See rows.append; the arrays are its tensors."""
    cells, page, columns = ring_slot.shape[1], keys.shape[1], table.shape[1]
    share = len(length) // len(active)
    for r in range(len(length)):
        if not active[r // share]:
            continue
        now = seen[r]
        cell = now % cells
        marked = evict[r] if lag == cells else ring_evict[r, (now + lag) % cells]
        reuse = marked and now >= cells
        slot = ring_slot[r, cell] if reuse else length[r]
        if slot >= owned[r] * page:
            if owned[r] == columns or free_count[0] == 0:
                overflow[0] = True
                continue
            free_count[0] -= 1
            table[r, slot // page] = free[free_count[0]]
            owned[r] += 1
        number, at = table[r, slot // page], slot % page
        keys[number, at] = k[r]
        values[number, at] = v[r]
        if not reuse:
            length[r] += 1
        seen[r] = now + 1
        if now > 0:
            reads[r] += length[r]
        ring_slot[r, cell] = slot
        ring_evict[r, cell] = evict[r]


@compiled
def attend(q, keys, values, table, lengths, scale, sinks, out, start, stop):
    """out (R, G, D) of rows start .. stop: softmax over pages one by one, q (R, G, D), the rest as in naive.

    sinks (Hq,), or (0,) for none.
    """
    group, width, page = q.shape[1], q.shape[2], keys.shape[1]
    scores = np.empty((group, page), np.float32)
    exponents = np.empty(page, np.int32)
    top, norm = np.empty(group, np.float32), np.empty(group, np.float32)
    for r in range(start, stop):
        top[:] = LOWEST
        norm[:] = ZERO
        for g in range(group if len(sinks) else 0):
            top[g], norm[g] = sinks[(r * group + g) % len(sinks)] * LOG2E, ONE
        acc = out[r]
        acc[:] = ZERO
        for first in range(0, lengths[r], page):
            count = min(page, lengths[r] - first)
            number = table[r, first // page]
            _scores(q[r], keys[number], scores, count)
            for g in range(group):
                new = _scaled_top(scores[g], count, scale, top[g])
                if new > top[g]:  # what was summed so far shrinks
                    shrink = np.exp2(top[g] - new)
                    norm[g] *= shrink
                    for d in range(width):
                        acc[g, d] *= shrink
                    top[g] = new
                norm[g] += _weigh(scores[g], exponents, count, new)
            _add(scores, values[number], acc, count)
        for g in range(group):
            if norm[g] > ZERO:
                for d in range(width):
                    acc[g, d] /= norm[g]


@inlined
def _scores(q, k, scores, count):
    """scores (G, page) = q (G, D) . k (page, D), four tokens at once: a component of q is loaded once for them."""
    fours = count - count % 4
    for t in range(0, fours, 4):
        for g in range(len(q)):
            s0 = s1 = s2 = s3 = ZERO
            for d in range(q.shape[1]):
                x = q[g, d]
                s0 += x * k[t, d]
                s1 += x * k[t + 1, d]
                s2 += x * k[t + 2, d]
                s3 += x * k[t + 3, d]
            scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = s0, s1, s2, s3
    for t in range(fours, count):
        for g in range(len(q)):
            s0 = ZERO
            for d in range(q.shape[1]):
                s0 += q[g, d] * k[t, d]
            scores[g, t] = s0


@inlined
def _scaled_top(scores, count, scale, top):
    """Scale scores in place and return the largest of them and ``top``."""
    for t in range(count):
        scores[t] *= scale
        top = max(top, scores[t])
    return top


@inlined
def _weigh(scores, exponents, count, top):
    """Replace scores by 2^(score - top) and return the sum; ``exponents`` is room for ``count`` integers."""
    powers = exponents.view(np.float32)
    for t in range(count):
        x = max(scores[t] - top, FLOOR)
        near = np.int32(x - HALF)  # x <= 0: to the nearest whole number
        x -= np.float32(near)
        exponents[t] = (near + np.int32(127)) << np.int32(23)  # the bits of 2^near
        scores[t] = ONE + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * (C5 + x * C6)))))
    total = ZERO
    for t in range(count):
        scores[t] *= powers[t]
        total += scores[t]
    return total


@inlined
def _add(weights, v, acc, count):
    """acc (G, D) += weights (G, page) . v (page, D), four tokens at once: acc is loaded and stored once for them."""
    fours = count - count % 4
    for t in range(0, fours, 4):
        for g in range(len(acc)):
            w0, w1, w2, w3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
            for d in range(acc.shape[1]):
                acc[g, d] += w0 * v[t, d] + w1 * v[t + 1, d] + w2 * v[t + 2, d] + w3 * v[t + 3, d]
    for t in range(fours, count):
        for g in range(len(acc)):
            w0 = weights[g, t]
            for d in range(acc.shape[1]):
                acc[g, d] += w0 * v[t, d]


# A small model calls these in every layer and step.  They take addresses: to look into an array costs numba 2 us.

FLOATS, INTS, LONGS, FLAGS = (types.CPointer(kind) for kind in (types.float32, types.int32, types.int64, types.boolean))
ROWS = [FLOATS] * 2 + [INTS] * 6 + [FLAGS, INTS, LONGS, FLAGS]  # the tensors of rows.Rows, in order


def _foreign(*kinds):
    """Compile a function for calls with addresses and numbers of these types."""
    plain = {types.int64: ctypes.c_int64, types.float32: ctypes.c_float}
    prototype = ctypes.CFUNCTYPE(None, *(plain.get(kind, ctypes.c_void_p) for kind in kinds))
    return lambda function: prototype(cfunc(types.void(*kinds), cache=True)(function).address)


@_foreign(*ROWS, *[FLOATS] * 2, *[FLAGS] * 2, *[FLOATS] * 3, *[types.int64] * 10, types.float32)
def step(
    keys, values, table, length, owned, free, free_count, ring_slot, ring_evict, seen, reads, overflow,
    k, v, evict, active, q, out, sinks, rows, pages, page, width, columns, cells, group, batch, lag, heads, scale,
):  # fmt: skip
    """``append``, then ``attend`` on all rows."""
    pool, rings, queries = (pages, page, width), (rows, cells), (rows, group, width)
    keys, values, table = carray(keys, pool), carray(values, pool), carray(table, (rows, columns))
    length = carray(length, rows)
    append(
        keys, values, table, length, carray(owned, rows), carray(free, pages), carray(free_count, 1),
        carray(ring_slot, rings), carray(ring_evict, rings), carray(seen, rows), carray(reads, rows),
        carray(overflow, 1), carray(k, (rows, width)), carray(v, (rows, width)), carray(evict, rows),
        carray(active, batch), lag,
    )  # fmt: skip
    sinks = carray(sinks, heads)
    attend(carray(q, queries), keys, values, table, length, scale, sinks, carray(out, queries), 0, rows)


@compiled
def _gate(hidden, norm, weight, out, eps, scale, offset):
    width = len(norm)
    for r in range(len(hidden)):
        square = ZERO
        for d in range(width):
            square += hidden[r, d] * hidden[r, d]
        factor = scale / np.sqrt(square / np.float32(width) + eps)
        for h in range(len(weight)):
            dot = ZERO
            for d in range(width):
                dot += hidden[r, d] * norm[d] * weight[h, d]
            out[r, h] = factor * dot - offset


@_foreign(*[FLOATS] * 4, *[types.int64] * 3, *[types.float32] * 3)
def gate(hidden, norm, weight, out, rows, heads, width, eps, scale, offset):
    """z (rows, heads) of hidden (rows, width), see naive.gate_logits."""
    shapes = (rows, width), (heads, width), (rows, heads)
    _gate(
        carray(hidden, shapes[0]), carray(norm, width), carray(weight, shapes[1]), carray(out, shapes[2]),
        eps, scale, offset,
    )  # fmt: skip
