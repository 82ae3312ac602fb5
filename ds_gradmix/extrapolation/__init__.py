"""Where each worker looks. To add a rule, write its file and name it in `RULES`."""

from ds_gradmix.extrapolation.noise import Noise
from ds_gradmix.extrapolation.pastgradient import PastGradient
from ds_gradmix.extrapolation.rule import Extrapolation

RULES: tuple[type[Extrapolation], ...] = (PastGradient, Noise)

__all__ = ["RULES", "Extrapolation", "Noise", "PastGradient"]
