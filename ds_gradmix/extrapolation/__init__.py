"""Where each worker looks. To add a rule, write its file and import it here."""

from ds_gradmix.extrapolation.noise import Noise as Noise
from ds_gradmix.extrapolation.pastgradient import PastGradient as PastGradient
from ds_gradmix.extrapolation.rule import Extrapolation as Extrapolation
from ds_gradmix.rules import rules_among

RULES = rules_among(globals(), Extrapolation)  # type: ignore[type-abstract]
