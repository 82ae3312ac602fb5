"""Stacks of gradients that rules are tried on, nasty ones too, and blocks to try."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZES = [7, 0, 64, 1, 200, 128, 3]
N = sum(SIZES)


def gaussian(workers: int, columns: int = N, seed: int = 0, shared: float = 0.3) -> Tensor:
    """Gradients with a common part, so that some workers agree and some do not."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(columns, generator=random, dtype=torch.float64)
    return shared * common + torch.randn(workers, columns, generator=random, dtype=torch.float64)


def rows(grads_WN: Tensor) -> list[np.ndarray]:
    return list(grads_WN.double().numpy())


def block(mixing: str | None = None, scaling: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    params = {k: keys.pop(k) for k in list(keys) if k not in ("scope", "seed", "nonfinite")}
    out: dict[str, Any] = dict(keys)
    if mixing:
        out["mixing"] = {"type": mixing, "params": params}
    if scaling is not None:
        out["scaling"] = {"type": "VRGD", "params": scaling}
    return out


RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "gradientmix": block("GradientMix"),
    "beta": block("GradientMix", distribution="beta", granularity="parameter"),
    "gaf": block("GAF"),
    "gaf midpoint": block("GAF", threshold=0.97, merge="midpoint", scope="parameter"),
    "guard": block("Guard"),
    "guard by parameter": block("Guard", max_norm_ratio=1.0, scope="parameter"),
    "norm clip": block("NormClip"),
    "vrgd": block(scaling={}),
    "gaf vrgd": block("GAF", {"momentum": 0.9}, threshold=0.97),
    "adacons": block("AdaCons"),
    "adasum": block("Adasum"),
    "adasum by parameter": block("Adasum", scope="parameter"),
    "krum": block("Krum", num_byzantine=0),
    "multikrum": block("MultiKrum", num_byzantine=0, num_selected=2, scope="parameter"),
    "median": block("GeometricMedian"),
    "upgrad": block("TorchJD", weighting="UPGradWeighting"),
    "mgda": block("TorchJD", weighting="MGDAWeighting", scope="parameter"),
}
ANY_SUM = ("adacons", "adasum", "adasum by parameter", "upgrad", "norm clip", "guard", "guard by parameter")
# of weights; the others' sum to 1, or 0
MIN_WORKERS = {"krum": 3, "multikrum": 3}  # besides one, which needs no rule


NASTY: dict[str, Tensor] = {
    "no elements": torch.zeros(3, 0),
    "one element": torch.tensor([[1.0], [2.0], [-1.0]]),
    "all zero": torch.zeros(4, 9),
    "one zero worker": torch.cat([torch.zeros(1, 9), gaussian(3, 9).float()]),
    "one worker": gaussian(1, 9).float(),
    "denormal": gaussian(4, 9).float() * 1e-40,
    "large": gaussian(4, 9).float() * 1e30,
    "opposed": torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
    "wide": gaussian(40, 3).float(),
}
