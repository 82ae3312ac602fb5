"""The rules once more, in float64, in loops, from the papers alone: nothing of ds_gradmix is imported."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def philox(seed: int, step: int, stream: int) -> np.random.Generator:
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64))
    )


def gaf_weights(
    grads: list[Array],
    threshold: float = 1.0,
    merge: str = "mean",
    order: list[int] | None = None,
    on_disagreement: str = "skip",
) -> tuple[Array, bool]:
    """arXiv 2412.18052: weights of the workers, and whether anybody agreed."""
    num_workers = len(grads)
    order = list(range(num_workers)) if order is None else order
    a = grads[order[0]].copy()
    share = np.zeros(num_workers)
    share[order[0]] = 1.0
    count = 1
    for i in order[1:]:
        norms = math.sqrt(float(a @ a)) * math.sqrt(float(grads[i] @ grads[i]))
        cosine = float(a @ grads[i]) / norms if norms > 0 else 0.0
        if 1.0 - cosine <= threshold:
            if merge == "mean":
                a = a + grads[i]
                share[i] = 1.0
            else:
                a = (a + grads[i]) / 2
                share /= 2
                share[i] = 0.5
            count += 1
    if count == 1:
        return (
            np.full(num_workers, 1 / num_workers) if on_disagreement == "mean" else np.zeros(num_workers)
        ), (on_disagreement == "mean")
    return share / share.sum(), True


def sketch(values: Array, size: int, seed: int, step: int) -> Array:
    """The sketch of ops/sketch.py, element by element: block b has a shift and a sign, place j a sign."""
    if len(values) <= size:
        return values
    packed = philox(seed, step, 2**32).integers(0, 256, -(-size // 8), dtype=np.uint8)
    signs = [2 * (int(packed[j // 8]) >> (j % 8) & 1) - 1 for j in range(size)]
    random, num_blocks = philox(seed, step, 2**32 + 1), -(-len(values) // size)
    shifts = random.integers(0, size, num_blocks).tolist()
    of_blocks = [2 * int(bit) - 1 for bit in random.integers(0, 2, num_blocks)]
    found = np.zeros(size)
    for k, value in enumerate(values.tolist()):
        block, j = divmod(k, size)
        found[(j + shifts[block]) % size] += of_blocks[block] * signs[j] * value
    return found


def vrgd(grads: list[Array], weights: Array, sizes: list[int], gamma: float) -> tuple[Array, Array]:
    """arXiv 2309.13681, Algorithm 1: weighted mean and factors, element by element."""
    total = len(grads[0])
    mean, factors = np.zeros(total), np.zeros(total)
    begin = 0
    for size in sizes:
        ratios: dict[int, float] = {}
        noiseless = set()
        for j in range(begin, begin + size):
            m = sum(float(w) * float(g[j]) for w, g in zip(weights, grads, strict=True))
            v = sum(float(w) * (float(g[j]) - m) ** 2 for w, g in zip(weights, grads, strict=True))
            mean[j] = m
            if v > 1e-24 * m * m:
                ratios[j] = m * m / v
            elif m != 0:
                ratios[j] = 1.0
                noiseless.add(j)
        layer = sum(ratios.values()) / max(len(ratios), 1)
        for j in range(begin, begin + size):
            scaled = ratios[j] / layer if j in ratios and layer > 0 else 0.0
            factors[j] = 1.0 if j in noiseless else min(max(scaled, gamma), 1.0)
        begin += size
    return mean, factors


def and_mask(grads: list[Array], weights: Array, threshold: float) -> tuple[Array, Array]:
    """arXiv 2009.00329: weighted mean, and 1 where enough of the workers with weight have the same sign."""
    counted = [g for g, w in zip(grads, weights, strict=True) if w != 0]
    mean, factors = np.zeros(len(grads[0])), np.zeros(len(grads[0]))
    for j in range(len(mean)):
        mean[j] = sum(float(w) * float(g[j]) for w, g in zip(weights, grads, strict=True))
        signs = sum(int(np.sign(g[j])) for g in counted)
        factors[j] = float(abs(signs) >= threshold * len(counted))
    return mean, factors


def trust(
    grads: list[Array], state: Array, decay: float, skip_below: float = -2.0
) -> tuple[Array, bool, Array]:
    """`outside_rules.Trust`: weights, whether the step is taken, and the next state of every worker."""
    total = sum(grads, np.zeros_like(grads[0]))
    cosines = np.zeros(len(grads))
    for i, g in enumerate(grads):
        lengths = math.sqrt(float(g @ g)) * math.sqrt(float(total @ total))
        cosines[i] = float(g @ total) / lengths if lengths > 0 else 0.0
    following = decay * state + (1 - decay) * cosines
    agreed = bool(cosines[0] >= skip_below)
    return np.exp(following) / np.exp(following).sum() * agreed, agreed, following


def spread(grads: list[Array], weights: Array, sizes: list[int]) -> tuple[Array, Array]:
    """`outside_rules.Spread`: weighted mean, and a factor for every layer."""
    mean = weights @ np.stack(grads)
    factors, begin = np.ones(len(mean)), 0
    for size in sizes:
        noise = size_of_mean = 0.0
        for j in range(begin, begin + size):
            variance = sum(
                float(w) * (float(g[j]) - mean[j]) ** 2 for w, g in zip(weights, grads, strict=True)
            )
            noise, size_of_mean = noise + math.sqrt(variance), size_of_mean + abs(float(mean[j]))
        if size_of_mean > 0:
            factors[begin : begin + size] = 1 / (1 + noise / size_of_mean)
        begin += size
    return mean, factors


def guard_decision(
    norms: list[float], present: NDArray[np.bool_], e: Array, count: int, params: dict[str, float]
) -> Array:
    """RULES.md's Guard: weights from lengths, and from the running sums of agreement of `count` steps."""
    ratio, share = params.get("max_norm_ratio", 2.0), params.get("agreement", 0.5)
    keep = [bool(p) for p in present]
    if count >= 5:
        means = [float(value) / (1 - params.get("smoothing", 0.9) ** count) for value in e]
        middle = float(np.median(means))
        out = [middle > 0 and mean < share * middle for mean in means]
        if 2 * sum(out) <= len(out) and any(k and not o for k, o in zip(keep, out, strict=True)):
            keep = [k and not o for k, o in zip(keep, out, strict=True)]
    limit = ratio * float(np.median([n for n, p in zip(norms, present, strict=True) if p] or [0.0]))
    weights = np.zeros(len(norms))
    for i, norm in enumerate(norms):
        if keep[i]:
            weights[i] = (limit / norm if 0 < limit < norm else 1.0) / sum(keep)
    return weights


def agreements(gram: Array) -> Array:
    """The cosine of each gradient with the sum of the others, each cut to the median length; by loops over
    the eigenvectors' coordinates, which are gradients with this Gram matrix.
    """
    values, vectors = np.linalg.eigh(gram)
    rows = vectors * np.sqrt(np.clip(values, 0, None))
    norms = [math.sqrt(max(float(square), 0.0)) for square in np.diag(gram)]
    middle = float(np.median(norms))
    cut = [row * min(1.0, middle / norm) if norm > 0 else row for row, norm in zip(rows, norms, strict=True)]
    found = np.zeros(len(rows))
    for i, row in enumerate(rows):
        others = sum((c for j, c in enumerate(cut) if j != i), np.zeros_like(row))
        scale = norms[i] * math.sqrt(float(others @ others))
        found[i] = float(row @ others) / scale if scale > 1e-300 else 0.0
    return found


def guard_observation(gram: Array, e: Array, count: int, smoothing: float) -> tuple[Array, int]:
    """The running sums after a step with this Gram matrix."""
    if not np.isfinite(gram).all():
        return e, count
    return smoothing * e + (1 - smoothing) * agreements(gram), count + 1
