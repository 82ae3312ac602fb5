"""The rules, and what the author of one needs: the bases, `RngKey` and `MixingDecision`."""

from ds_gradmix.rules.base import (
    Extrapolation,
    GradientFreeMixing,
    GramianMixing,
    Mixing,
    RngKey,
    Rule,
    Scaling,
)
from ds_gradmix.rules.decision import MixingDecision
from ds_gradmix.rules.extrapolation import Noise, PastGradient
from ds_gradmix.rules.mixing import GAF, GradientMix, Mean
from ds_gradmix.rules.scaling import VRGD

MIXING: tuple[type[Mixing], ...] = (GAF, GradientMix, Mean)
SCALING: tuple[type[Scaling], ...] = (VRGD,)
EXTRAPOLATION: tuple[type[Extrapolation], ...] = (Noise, PastGradient)

__all__ = [
    "EXTRAPOLATION",
    "GAF",
    "MIXING",
    "SCALING",
    "VRGD",
    "Extrapolation",
    "GradientFreeMixing",
    "GradientMix",
    "GramianMixing",
    "Mean",
    "Mixing",
    "MixingDecision",
    "Noise",
    "PastGradient",
    "RngKey",
    "Rule",
    "Scaling",
]
