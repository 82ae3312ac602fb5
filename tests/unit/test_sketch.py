"""The sketch of a vector: against its definition in loops, and the error of cosines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ds_gradmix import combine
from ds_gradmix.ops.sketch import COSINE_ERROR, SketchMaps
from ds_gradmix.rules import GAF, RngKey
from ds_gradmix.rules.apply import decide_from_gram, sketched_gram
from tests.support.reference import sketch

CPU = torch.device("cpu")


def sketch_of(vector_N: torch.Tensor, size: int, key: RngKey, cuts: tuple[int, ...] = ()) -> torch.Tensor:
    found = SketchMaps(size, key.generator, CPU).of_length(len(vector_N))
    out = torch.empty(found.size)
    found.of(vector_N.tensor_split(list(cuts)), out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "length, size", [(1000, 64), (999, 100), (101, 100), (100, 100), (5, 100), (70_000, 66_000)]
)
def test_it_is_what_the_loops_give(length: int, size: int, dtype: torch.dtype) -> None:
    vector = torch.randn(length, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = sketch(vector.double().numpy(), size, 7, 3)
    for cuts in ((), (length // 3, length // 3 + 1)):
        found = sketch_of(vector, size, RngKey(7, 3), cuts)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_many_parts_that_stay_in_cache() -> None:
    """More places than a part of the sums has, so that blocks wrap and are cut."""
    vector, size = torch.randn(500_000), 150_000
    maps = SketchMaps(size, RngKey(1, 1).generator, CPU)
    found, out = maps.of_length(len(vector)), torch.empty(size)
    found.of([vector], out)
    wanted = torch.zeros(size, dtype=torch.float64)
    for block, part in enumerate(vector.double().split(size)):
        padded = torch.nn.functional.pad(part * maps._signs_M[: len(part)], (0, size - len(part)))
        wanted += found._block_signs[block] * padded.roll(found._shifts[block])
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)


def test_keys() -> None:
    vector = torch.randn(1000)
    first = sketch_of(vector, 64, RngKey(1, 2))
    assert torch.equal(first, sketch_of(vector, 64, RngKey(1, 2)))
    for key in (RngKey(1, 3), RngKey(2, 2)):
        assert not torch.equal(first, sketch_of(vector, 64, key))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    vector = torch.randn(1000)
    vector[777] = bad
    assert not sketch_of(vector, 64, RngKey(1, 2)).isfinite().all()


def gradients(kind: str, seed: int, workers: int, length: int) -> torch.Tensor:
    """Structured as gradients are: what blocks have in common must not add up."""
    random, side = torch.Generator().manual_seed(seed), math.isqrt(length)
    noise = torch.randn(workers, length, generator=random)
    if kind == "low rank":
        return (noise[:, :side, None] * torch.randn(side, generator=random)).flatten(1)
    if kind == "constant":
        return noise + 1
    if kind == "sparse rows":
        rows = torch.rand(workers, side, 1, generator=random) < 0.02
        rows[:, 0] = True
        return (noise.unflatten(1, (side, side)) * rows).flatten(1)
    if kind == "heavy tails":
        return noise * torch.exp(2 * torch.randn(length, generator=random))
    if kind == "one huge coordinate":
        noise[:, length // 3] = math.sqrt(2 * length)
        return noise
    return noise + 0.3 * torch.randn(length, generator=random)


def cosines(rows_WN: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows_WN.double(), dim=1)
    first, second = torch.triu_indices(len(rows_WN), len(rows_WN), 1)
    return (unit @ unit.t())[first, second]


KINDS = ["random", "low rank", "constant", "sparse rows", "heavy tails", "one huge coordinate"]


@pytest.mark.parametrize("kind", KINDS)
def test_standard_error_and_bias_of_cosines(kind: str) -> None:
    size, length, workers, keys = 1024, 2**16, 6, 40
    errors = []
    for step in range(keys):
        grads_WN = gradients(kind, step, workers, length)
        found = torch.stack([sketch_of(row, size, RngKey(5, step)) for row in grads_WN])
        errors.append(cosines(found) - cosines(grads_WN))
    error = torch.stack(errors)
    assert float(error.square().mean().sqrt()) <= COSINE_ERROR / math.sqrt(size)
    # The mean over keys and pairs: pairs of one key are not independent, so it is compared over keys.
    by_key = error.mean(1)
    assert abs(float(by_key.mean())) < 3.5 * float(by_key.std()) / math.sqrt(keys)


def test_decisions_agree_unless_they_are_close_calls() -> None:
    """10,000 cases in 400 steps: of workers that agree a little, much or not at all, of several lengths."""
    size, close, together = 256, 0, 25
    for step in range(400):
        random = torch.Generator().manual_seed(step)
        workers, length = 2 + step % 5, 300 + 997 * (step % 3)
        shared = torch.tensor([0.0, 0.3, 0.6, 1.0]).repeat(7)[:together, None, None]
        grads_SWN = shared * torch.randn(together, 1, length, generator=random)
        grads_SWN = grads_SWN + torch.randn(together, workers, length, generator=random)
        key, rule = RngKey(3, step), GAF(threshold=(0.8, 0.95, 1.0, 1.05)[step % 4])
        present_W, state_KW = torch.ones(workers, dtype=torch.bool), torch.zeros(0, workers)
        gram_SWW = torch.cat([sketched_gram(grads_WN, [length], size, key) for grads_WN in grads_SWN])
        sketched = decide_from_gram(rule, gram_SWW, present_W, key, state_KW)
        exact_SWN = grads_SWN.double()
        exact = rule.decide(exact_SWN @ exact_SWN.transpose(1, 2), present_W, key)
        close_S = sketched.margin_S < 3 * COSINE_ERROR / math.sqrt(size)
        agree_S = torch.isclose(sketched.decision.weights_SW, exact.weights_SW).all(1)
        assert (agree_S | close_S).all(), step
        close += int(close_S.sum())
    assert 1000 < close < 9000  # both kinds are there


@pytest.mark.parametrize("scope", ["bucket", "parameter"])
def test_combine_decides_by_sketches(scope: str) -> None:
    grads_WN = gradients("random", 1, 4, 64**2)
    block = {"mixing": {"type": "GAF", "params": {"threshold": 0.95}}, "scope": scope}
    sizes = [96, 4000]
    _, exact = combine(grads_WN, block, sizes=sizes)
    _, info = combine(grads_WN, {**block, "gram": {"sketch": 100}}, sizes=sizes)
    _, wide = combine(grads_WN, {**block, "gram": {"sketch": 5000}}, sizes=sizes)
    assert torch.equal(wide["weights"], exact["weights"])
    if scope == "parameter":  # the small one is exact
        assert torch.equal(info["weights"][0], exact["weights"][0])
    sketches = [sketch(row, 100, 1234, 0) for row in grads_WN.double().numpy()]
    if scope == "bucket":
        gram = torch.from_numpy(np.stack(sketches) @ np.stack(sketches).T)[None]
        wanted = GAF(threshold=0.95).decide(gram, torch.ones(4, dtype=torch.bool), RngKey(1234, 0))
        assert torch.equal(info["weights"], wanted.weights_SW[0])
