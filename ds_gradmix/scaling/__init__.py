"""How much each coordinate counts. To add a rule, write its file and import it here."""

from ds_gradmix.rules import rules_among
from ds_gradmix.scaling.rule import Scaling as Scaling
from ds_gradmix.scaling.rule import Signal as Signal
from ds_gradmix.scaling.vrgd import VRGD as VRGD

RULES = rules_among(globals(), Scaling)  # type: ignore[type-abstract]
