from pydantic import Field
from torch import Tensor

from ds_gradmix.rules.base import RngKey, WrongParam
from ds_gradmix.rules.decision import MixingDecision
from ds_gradmix.rules.mixing.krum import Krum


class MultiKrum(Krum):
    """The mean of the gradients that are closest to their neighbours: between Krum and the mean.

    Blanchard, El Mhamdi, Guerraoui, Stainer 2017, arXiv 1703.02757: Krum's scores, and the mean of the
    `num_selected` workers with the least of them, of the first ones where scores are equal. Without
    `num_selected` as many as a score has neighbours, `W - f - 2`; where workers are left out, no more than
    are there.
    """

    num_selected: int | None = Field(
        None, ge=1, description="workers whose mean is taken; W - num_byzantine - 2 by default"
    )

    def refused(self, num_workers: int) -> WrongParam | None:
        """More than there are."""
        if self.num_selected is not None and self.num_selected > num_workers:
            allowed = f"an integer, >= 1, <= {num_workers} with {num_workers} workers"
            return WrongParam("num_selected", allowed, "lower it, or remove it for the default")
        return super().refused(num_workers)

    def decide(self, gram_SWW: Tensor, present_W: Tensor, key: RngKey) -> MixingDecision:
        """Weights `[S, W]`, equal for those selected."""
        num_present = present_W.sum()
        usual = (num_present - self.num_byzantine - 2).clamp(min=1)
        wanted = usual if self.num_selected is None else num_present.clamp(max=self.num_selected)
        return self.best(gram_SWW, present_W, wanted)
