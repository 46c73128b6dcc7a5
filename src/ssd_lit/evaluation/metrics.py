"""Numbers made from losses; needs no torch."""

import math


def perplexity(loss: float) -> float:
    """e to the loss in nats; infinite where a float cannot hold it, as for a model that learnt nothing."""
    return math.inf if loss >= 700 else math.exp(loss)
