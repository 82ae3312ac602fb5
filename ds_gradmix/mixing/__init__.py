"""Who counts: every rule that gives workers weights. To add one, write its file and name it in `RULES`."""

from ds_gradmix.mixing.gaf import GAF
from ds_gradmix.mixing.gradientmix import GradientMix
from ds_gradmix.mixing.mean import Mean
from ds_gradmix.mixing.rule import Decision, GramMixing, KnownMixing, Mixing, Moment

RULES: tuple[type[Mixing], ...] = (Mean, GradientMix, GAF)

__all__ = ["GAF", "RULES", "Decision", "GradientMix", "GramMixing", "KnownMixing", "Mean", "Mixing", "Moment"]
