import numpy as np
import numpy.typing as npt

from ds_gradmix.rules.base import GradientFreeMixing, RngKey


class Mean(GradientFreeMixing):
    """Plain averaging, `w_i = 1/W`: the control, and the default."""

    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        return np.full((1, num_workers), 1.0 / num_workers)
