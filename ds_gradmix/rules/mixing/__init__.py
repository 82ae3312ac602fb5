"""Rules that give workers weights, one a file."""

from ds_gradmix.rules.mixing.gaf import GAF as GAF
from ds_gradmix.rules.mixing.gradientmix import GradientMix as GradientMix
from ds_gradmix.rules.mixing.mean import Mean as Mean
