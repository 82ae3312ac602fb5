"""Who counts: every rule that gives workers weights. To add one, write its file and import it here."""

from ds_gradmix.mixing.gaf import GAF as GAF
from ds_gradmix.mixing.gradientmix import GradientMix as GradientMix
from ds_gradmix.mixing.mean import Mean as Mean
from ds_gradmix.mixing.rule import Decision as Decision
from ds_gradmix.mixing.rule import GramMixing as GramMixing
from ds_gradmix.mixing.rule import KnownMixing as KnownMixing
from ds_gradmix.mixing.rule import Mixing as Mixing
from ds_gradmix.mixing.rule import Moment as Moment
from ds_gradmix.rules import rules_among

RULES = rules_among(globals(), Mixing)
