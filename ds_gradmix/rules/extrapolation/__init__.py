"""Rules that move a worker's weights before it takes its gradient, one a file."""

from ds_gradmix.rules.extrapolation.noise import Noise as Noise
from ds_gradmix.rules.extrapolation.pastgradient import PastGradient as PastGradient
