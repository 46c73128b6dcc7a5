"""How the next token is chosen from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The next token is the likeliest, or drawn if the temperature is above 0.

    Tokens are drawn with torch's global generator: `torch.manual_seed` makes a text repeatable.
    """

    temperature: float = 0.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Only the fewest tokens whose probabilities add up to this are drawn from."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] to tokens [B]. Waits for no host, so that a CUDA graph can hold it."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        # From 0 down, and a temperature that float32 knows: no logit can overflow.
        below = logits - logits.amax(dim=-1, keepdim=True)
        log_p = (below / max(self.temperature, torch.finfo(torch.float32).tiny)).log_softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = log_p.sort(dim=-1, descending=True)
            before = ordered.exp().cumsum(dim=-1) - ordered.exp()
            # A token stays if those before it do not reach top_p: so at least one does.
            log_p = torch.full_like(log_p, -torch.inf).scatter(
                -1, order, ordered.masked_fill(before >= self.top_p, -torch.inf)
            )
        # The largest of p / e with exponential e is a draw from p.
        noise = torch.empty_like(log_p).exponential_()
        return (log_p - noise.log()).argmax(dim=-1)
