"""Mixing rules on the gradients themselves, in float64, in loops, from the papers and their code alone:
nothing of ds_gradmix is imported.
"""

from __future__ import annotations

import math

import numpy as np

from tests.support.reference import Array


def adasum(grads: list[Array]) -> Array:
    """arXiv 2006.02924: the combined gradient; who has no neighbour goes to the next level."""
    while len(grads) > 1:
        level = []
        for i in range(0, len(grads), 2):
            if i + 1 == len(grads):
                level.append(grads[i])
                continue
            a, b = grads[i], grads[i + 1]
            dot, square_a, square_b = float(a @ b), float(a @ a), float(b @ b)
            of_a = 1.0 - dot / square_a * 0.5 if square_a > 0 else 1.0
            of_b = 1.0 - dot / square_b * 0.5 if square_b > 0 else 1.0
            level.append(of_a * a + of_b * b)
        grads = level
    return grads[0]


def adacons(steps: list[list[Array]], momentum: float, restored: bool = True) -> list[Array]:
    """arXiv 2411.03742: the combined gradients of several steps.

    Published are unit vectors' sums (`restored` False), and an average of coefficients in the gradients' own
    units. Restored, a step's gradients are in units of their mean length, and so is what comes of them.
    """
    average: list[float] | None = None
    combined = []
    for grads in steps:
        of_step, average = adacons_step(grads, average, momentum, restored)
        combined.append(of_step)
    return combined


def adacons_step(
    grads: list[Array], average: list[float] | None, momentum: float, restored: bool = True
) -> tuple[Array, list[float]]:
    """The combined gradient, and the next average of sorted coefficients; None before the first step."""
    lengths = [math.sqrt(float(g @ g)) for g in grads]
    unit = sum(lengths) / len(lengths) if restored else 1.0
    mean = sum(grads, np.zeros_like(grads[0])) / len(grads)
    coefficients = [float(mean @ g) / length / unit for g, length in zip(grads, lengths, strict=True)]
    order = sorted(range(len(grads)), key=lambda i: coefficients[i])
    ranked = [coefficients[i] for i in order]
    if average is not None:
        ranked = [momentum * old + (1 - momentum) * new for old, new in zip(average, ranked, strict=True)]
    for place, i in enumerate(order):
        coefficients[i] = ranked[place] / sum(ranked)
    parts = [c * g / n * unit for c, g, n in zip(coefficients, grads, lengths, strict=True)]
    return sum(parts, np.zeros_like(grads[0])), ranked


def krum_order(grads: list[Array], num_byzantine: int) -> list[int]:
    """arXiv 1703.02757: the workers by their scores, the best first; of equal ones the first."""
    scores = []
    for i, g in enumerate(grads):
        distances = sorted(float((g - h) @ (g - h)) for j, h in enumerate(grads) if j != i)
        scores.append(sum(distances[: len(grads) - num_byzantine - 2]))
    return sorted(range(len(grads)), key=lambda i: (scores[i], i))


def sum_of_distances(grads: list[Array], point: Array) -> float:
    """What the geometric median makes least."""
    return sum(math.sqrt(float((g - point) @ (g - point))) for g in grads)


def geometric_median(grads: list[Array], steps: int = 20_000) -> Array:
    """arXiv 1912.13445: Weiszfeld's algorithm on the gradients, until it stands still."""
    point = sum(grads, np.zeros_like(grads[0])) / len(grads)
    for _ in range(steps):
        distances = [max(math.sqrt(float((g - point) @ (g - point))), 1e-12) for g in grads]
        weighted = sum((g / d for g, d in zip(grads, distances, strict=True)), np.zeros_like(point))
        before, point = point, weighted / sum(1 / d for d in distances)
        if np.abs(before - point).max() <= 1e-14 * np.abs(point).max():
            break
    return point
