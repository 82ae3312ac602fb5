"""What ds_gradmix relies on in DeepSpeed and patches into it: checked by version, restored, and shared with
other code that patches the same.
"""

from __future__ import annotations

import functools
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_gradmix.comm import peers
from ds_gradmix.config import ConfigError
from ds_gradmix.engines import deepspeed_api
from ds_gradmix.engines.deepspeed_api import TABLE, TESTED_VERSIONS, DeepSpeedApiError
from tests.support.engines import log_lines
from tests.support.models import Regression
from tests.support.ranks import run_ranks
from tests.support.training import Case, build, ds_config, train

ROOT = Path(__file__).parents[2]
GAF: dict[str, Any] = {"mixing": {"type": "GAF", "params": {"threshold": 0.9}}}
NEVER: dict[str, Any] = {"mixing": {"type": "GAF", "params": {"threshold": 0.0}}}
STEP = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.step"


def test_one_file_says_which_versions_are_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no parser for it
    (newest,) = TESTED_VERSIONS
    major, minor, _ = newest.split(".")
    assert f'"deepspeed>={newest},<{major}.{int(minor) + 1}"' in project
    assert f"deepspeed=={newest}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert f"Tested with DeepSpeed {newest}" in (ROOT / "docs" / "parallelism.md").read_text()
    command = [sys.executable, "-m", "ds_gradmix", "env"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert re.search(rf"deepspeed +\S+ \(tested: {re.escape(newest)}\)", printed)


def functions() -> None:
    """The table fits the tested version; what does not fit is named."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from ds_gradmix.engines.zero12 import GradmixZeroOptimizer

    with log_lines() as lines:
        deepspeed_api.check_functions()
    assert not lines
    prefix = STEP.removesuffix("step")
    overridden = [name for name in vars(GradmixZeroOptimizer) if name in vars(DeepSpeedZeroOptimizer)]
    overridden = [name for name in overridden if name not in ("__module__", "__doc__")]
    assert {prefix + name for name in overridden} <= TABLE["functions"].keys()
    stock, relied = DeepSpeedZeroOptimizer.step, TABLE["functions"][STEP]
    TABLE["functions"][STEP] = relied.replace("(self, closure=None)", "(self)")
    with pytest.raises(DeepSpeedApiError) as caught:
        deepspeed_api.check_functions()
    for word in (STEP, "(self, closure=None)", "(self)", f"tested: {TESTED_VERSIONS[0]}"):
        assert word in str(caught.value)
    TABLE["functions"][STEP] = f"0000 {relied.partition(' ')[2]}"
    overflow = prefix + "check_overflow"
    TABLE["functions"][overflow] = TABLE["functions"][overflow].replace(" ", "0 ", 1)
    with log_lines() as lines:
        deepspeed_api.check_functions()
    assert len(lines) == 1 and STEP in lines[0] and overflow in lines[0] and "mixing Mean" in lines[0]
    TABLE["functions"] = {STEP: relied}
    DeepSpeedZeroOptimizer.step = lambda self, *args: None
    with log_lines() as lines:
        deepspeed_api.check_functions()
    assert len(lines) == 1 and f"{STEP} (replaced by other code)" in lines[0]
    DeepSpeedZeroOptimizer.step = counted(stock)[0]  # what wraps DeepSpeed's is looked through
    with log_lines() as lines:
        deepspeed_api.check_functions()
    assert not lines
    del DeepSpeedZeroOptimizer.step
    with pytest.raises(DeepSpeedApiError, match=r"step is missing"):
        deepspeed_api.check_functions()
    TABLE["attributes"]["Regression"] = ["first", "gone", "lost"]
    with pytest.raises(DeepSpeedApiError, match=r"Regression has no attribute gone, lost;"):
        deepspeed_api.check_attributes(Regression(), "Regression")


def counted(function: Any, wraps: bool = True) -> tuple[Any, list[int]]:
    """A wrapper as others put around DeepSpeed's functions, and the calls it has seen."""
    calls: list[int] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return (functools.wraps(function)(wrapper) if wraps else wrapper), calls


def test_functions_are_checked() -> None:
    run_ranks(1, functions)


def is_active(engine: Any) -> bool:
    return hasattr(engine.optimizer, "gradmix")


def switching() -> None:
    import deepspeed

    import ds_gradmix

    engine_class = deepspeed.DeepSpeedEngine
    stock = engine_class.__init__
    ds_gradmix.disable()  # was not on
    case = Case(GAF, steps=2)
    engine = build(case)
    ours = engine_class.__init__
    ds_gradmix.enable()
    assert engine_class.__init__ is ours and ours.__wrapped__ is stock
    with log_lines() as lines:
        ds_gradmix.disable()
        assert engine_class.__init__ is stock and not lines
        assert not is_active(initialize(case)) and not lines
        assert train(engine, case)["stats"][-1]["kept_fraction"] > 0  # an engine that lives keeps its rules
    for wraps in (True, False):
        ds_gradmix.enable()
        engine_class.__init__, calls = counted(engine_class.__init__, wraps)
        assert is_active(initialize(case)) and len(calls) == 1
        with log_lines() as lines:
            ds_gradmix.disable()
        assert len(lines) == 1 and "test_deepspeed_api.py, line" in lines[0] and "not restored" in lines[0]
        with log_lines() as lines:
            assert not is_active(initialize(case)) and not lines and len(calls) == 2
            ds_gradmix.enable()
            assert is_active(initialize(case)) and len(calls) == 3
        ds_gradmix.disable()
        engine_class.__init__ = stock  # others restore without regard to order
    ds_gradmix.enable()
    assert is_active(initialize(case))


def initialize(case: Case, model: torch.nn.Module | None = None, **kwargs: Any) -> Any:
    import deepspeed

    model = model or Regression()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"model": model, "optimizer": optimizer, "config": ds_config(case), **kwargs}
    return deepspeed.initialize(**options)[0]


def test_enable_and_disable() -> None:
    run_ranks(2, switching)


def classes() -> None:
    """A subclass stands in the place of DeepSpeed's optimizer, also of one that somebody has put there."""
    from deepspeed.runtime import engine as engine_module

    from ds_gradmix.engines.zero12 import GradmixZeroOptimizer

    stock = engine_module.DeepSpeedZeroOptimizer
    seen: list[Any] = []
    configure = engine_module.DeepSpeedEngine._configure_zero_optimizer

    def looking(self: Any, optimizer: Any) -> Any:
        seen.append(engine_module.DeepSpeedZeroOptimizer)
        return configure(self, optimizer)

    engine_module.DeepSpeedEngine._configure_zero_optimizer = looking
    optimizer = build(Case(GAF)).optimizer
    assert isinstance(seen[0], type) and issubclass(seen[0], stock)
    assert engine_module.DeepSpeedZeroOptimizer is stock and isinstance(optimizer, stock)
    assert type(optimizer).__name__ == "GradmixZeroOptimizer"
    assert pickle.loads(pickle.dumps(type(optimizer))) is GradmixZeroOptimizer

    class Theirs(stock):  # type: ignore[misc, valid-type]
        steps = 0

        def step(self, closure: Any = None) -> None:
            self.steps += 1
            super().step(closure)

    engine_module.DeepSpeedZeroOptimizer = Theirs
    case = Case(GAF, steps=2)
    engine = build(case)
    assert isinstance(engine.optimizer, Theirs) and isinstance(engine.optimizer, GradmixZeroOptimizer)
    assert len(train(engine, case)["stats"][-1]) > 1 and engine.optimizer.steps == 2
    engine_module.DeepSpeedZeroOptimizer = stock
    deepspeed_api.TABLE["attributes"]["DeepSpeedEngine"] += ["lost"]
    with pytest.raises(DeepSpeedApiError, match="DeepSpeedEngine has no attribute lost"):
        build(case)


def test_a_class_in_the_place_of_the_optimizers() -> None:
    run_ranks(2, classes)


def wrapping(before: bool) -> dict[str, Any]:
    """`average_tensor` of DeepSpeed's class wrapped by somebody else, before or after `enable`."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    import ds_gradmix

    stock = DeepSpeedZeroOptimizer.average_tensor
    seen: list[tuple[Any, Any]] = []

    def wrapper(self: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raw = tensor.double().numpy().copy()
        stock(self, tensor, *args, **kwargs)
        seen.append((raw, tensor.double().numpy().copy()))

    case = Case(GAF, steps=2, config={"gradient_accumulation_steps": 1})
    expected = train(build(case), case)
    ds_gradmix.disable()
    if not before:
        ds_gradmix.enable()
    DeepSpeedZeroOptimizer.average_tensor = wrapper
    engine = build(case)
    found = train(engine, case)
    np.testing.assert_equal(found["weights"], expected["weights"])
    assert found["stats"] == expected["stats"]
    partition = int(engine.optimizer.partition_size[0])
    return {"seen": seen, "partition": partition, "order": found["buckets"]}


@pytest.mark.parametrize("before", [True, False])
def test_others_may_wrap_average_tensor(before: bool) -> None:
    """They see the raw bucket before, and this rank's part of the combination after the call they wrap."""
    from tests.support.reference import gaf_weights, philox

    ranks = run_ranks(2, wrapping, before)
    assert len(ranks[0]["seen"]) == 2
    for step in range(2):
        raw = [rank["seen"][step][0] for rank in ranks]
        order = philox(1234, step, 1).permutation(2).tolist()
        weights, agreed = gaf_weights(raw, order=order, threshold=0.9)
        combined = weights @ np.stack(raw) if agreed else np.zeros_like(raw[0])
        assert not np.array_equal(raw[0], raw[1])
        found = [np.isclose(rank["seen"][step][1], combined, rtol=1e-5, atol=1e-8) for rank in ranks]
        assert (found[0] | found[1]).all()  # every element is reduced on the rank that owns it
        assert found[0].any() and found[1].any()


def without_norm() -> dict[str, Any]:
    found = {}
    for stage in (1, 2):
        for compute in (True, False):
            zero = {"compute_grad_norm": compute}
            case = Case(GAF, stage=stage, zero=zero, steps=3)
            engine = build(case)
            run = train(engine, case)
            assert (engine.get_global_grad_norm() is None) == (not compute)
            found[f"{stage} {compute}"] = run["weights"]
            skipped = Case(NEVER, stage=stage, zero=zero, steps=2)
            engine = build(skipped)
            run = train(engine, skipped)
            assert run["skipped"] == [1, 2] and run["stats"][-1]["skipped"] == 1.0
            initial = dict(Regression().named_parameters())
            for name, weight in run["weights"].items():
                np.testing.assert_equal(weight, initial[name].detach().double().numpy())
    return found


def test_without_the_gradients_norm() -> None:
    for rank in run_ranks(2, without_norm):
        for stage in (1, 2):
            np.testing.assert_equal(rank[f"{stage} False"], rank[f"{stage} True"])


WITHOUT = 'building the engine: rank 1 has no "gradmix" block, while others have one'


def outcome(function: Any) -> tuple[str, float]:
    """What an engine's construction raised, and after how many seconds."""
    begin = time.monotonic()
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "built", time.monotonic() - begin


def one_without(late_s: float, block: Any) -> tuple[str, float, list[str]]:
    """Rank 1 has another block, or none, and comes some seconds later than the others, or before them."""
    import ds_gradmix

    ds_gradmix.enable()
    peers.TIMEOUT_S = 3.0
    without = dist.get_rank() == 1
    time.sleep(max(late_s if without else -late_s, 0.0))
    case = Case(block if without else GAF)
    with log_lines() as lines:
        told, seconds = outcome(lambda: initialize(case))
    time.sleep(1.0)  # the thread's message, if it is still on its way
    return told, seconds, lines


@pytest.mark.parametrize("late_s", [0.0, 1.0, -1.0])
def test_a_rank_without_a_block_is_told_on_all_ranks(late_s: float) -> None:
    found = run_ranks(3, one_without, late_s, None, timeout=60)
    for rank in (0, 2):
        told, seconds, _ = found[rank]
        assert told.startswith(f"MismatchError: {WITHOUT}") and seconds < 8, told
    told, seconds, lines = found[1]
    assert WITHOUT in told + "".join(lines)
    assert seconds < 8


def test_a_refused_block_on_one_rank_is_told_on_all() -> None:
    found = run_ranks(3, one_without, 0.0, {"mixing": {"type": "GAFF"}}, timeout=60)
    assert all('rank 1 has a "gradmix" block that is refused' in found[rank][0] for rank in (0, 2))
    assert found[1][0].startswith("ConfigError: gradmix.mixing.type") and max(t for _, t, _ in found) < 8


class Some:
    """An mpu of data parallelism among some of the ranks."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.data = dist.new_group(ranks)
        self.alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.ranks.index(dist.get_rank())

    def get_data_parallel_world_size(self) -> int:
        return len(self.ranks)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.ranks

    def get_model_parallel_group(self) -> Any:
        return self.alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def on_some_ranks() -> list[str]:
    """Ranks 0 and 1 build an engine of their own, then all build one."""
    import ds_gradmix

    ds_gradmix.enable()
    peers.TIMEOUT_S = 3.0
    mpu = Some([0, 1])
    found = []
    if dist.get_rank() < 2:
        plain = initialize(Case(None, stage=1, steps=1), mpu=mpu)
        train(plain, Case(None, stage=1, steps=1))
        found.append(outcome(lambda: initialize(Case(GAF, stage=1), mpu=mpu))[0])
    from deepspeed.utils import groups

    groups.mpu = None
    case = Case(GAF, steps=1)
    found.append(str(train(initialize(case), case)["stats"][-1]["kept_fraction"] > 0))
    return found


def test_engines_on_some_of_the_ranks() -> None:
    first, second, third = run_ranks(3, on_some_ranks, timeout=100)
    assert first == second and third == ["True"] and first[1] == "True"
    assert first[0].startswith(
        "ConfigError: mpu: its groups have the ranks [0, 1], which are not all there are"
    )


def refused_before(folder: str) -> None:
    """Nothing of DeepSpeed's is built before a refusal, and what means nothing at stage 0 is none."""
    import deepspeed

    import ds_gradmix

    zero = {"contiguous_gradients": False, "reduce_scatter": False}
    assert is_active(build(Case(GAF, stage=0, zero=zero)))
    ds_gradmix.disable()
    stock = deepspeed.DeepSpeedEngine.__init__
    deepspeed.DeepSpeedEngine.__init__, calls = counted(stock)
    ds_gradmix.enable()

    class Muon(torch.optim.SGD):
        pass

    plain, bare = Regression(), ds_config(Case(GAF))
    del bare["optimizer"]
    tries = {
        "the engine has no optimizer": lambda: initialize(Case(GAF), optimizer=None, config=bare),
        "the optimizer Muon reduces": lambda: initialize(
            Case(GAF), plain, optimizer=Muon([p for p in plain.parameters() if p.requires_grad], lr=0.1)
        ),
        "gradmix.worker: 2, but a data-parallel group has 1 ranks": lambda: initialize(
            Case({**GAF, "worker": 2})
        ),
        "prescale_gradients: true": lambda: initialize(Case(GAF, config={"prescale_gradients": True})),
        "zero_optimization.zero_hpz_partition_size: 2": lambda: initialize(
            Case(GAF, stage=3, zero={"zero_hpz_partition_size": 2})
        ),
    }
    for words, attempt in tries.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            attempt()
    assert not calls


def test_refusals_come_before_anything_is_built(tmp_path: Path) -> None:
    run_ranks(1, refused_before, str(tmp_path))


def test_the_table_is_in_the_package() -> None:
    assert '"engines/*.json"' in (ROOT / "pyproject.toml").read_text()
    assert Path(deepspeed_api.__file__).with_suffix(".json").parent.name == "engines"
