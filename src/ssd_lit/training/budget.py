"""A run whose number of steps is what another run's FLOPs pay for."""

from ssd_lit.config import RunConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.flops import forward_costs


def with_steps_for(config: RunConfig, flops: float, vocab: VocabInfo) -> RunConfig:
    """The config with as many training steps as dense training can take for `flops`, rounded down.

    Raises ValueError if that is no more than the warm-up of the learning rate.
    """
    costs = forward_costs(config.model, config.moe, vocab, config.data.sequence_length)
    steps = int(flops / (config.training.batch_size * costs.dense()))
    if steps <= config.optim.warmup_steps:
        raise ValueError(
            f"match_flops_of_arm {config.match_flops_of_arm}: pays for {steps} steps, no more than optim.warmup_steps "
            f"{config.optim.warmup_steps}; choose a smaller model or a shorter warm-up"
        )
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
