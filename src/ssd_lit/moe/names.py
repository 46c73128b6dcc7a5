"""Names of constructions, routers, backends, schedules of k and activations in settings; numbers of experts.

Does not import torch.
"""

from typing import Literal

Construction = Literal["kmeans", "kmeans_activations", "coactivation", "random", "contiguous"]
NEEDS_ACTIVATIONS = ("kmeans_activations", "coactivation")
"""Constructions that use activations on calibration tokens."""
RouterName = Literal["center", "random", "gate"]
PosthocRouter = Literal["mass_mlp", "norm_mlp", "centers"]
UntrainedRouter = Literal["center", "random", PosthocRouter]
"""What can choose the experts of a model that is not trained on."""
Mode = Literal["dense", "sparse"]
BackendName = Literal["auto", "masked", "loop", "grouped", "decode_cpu", "fused", "decode_gpu", "quack"]
ScheduleKind = Literal["constant", "linear", "cosine", "step"]
Activation = Literal["relu", "relu2", "gelu", "gelu_new", "silu"]


def allowed_experts(d_ff: int) -> str:
    """The numbers of experts that divide F neurons, for messages."""
    return ", ".join(str(experts) for experts in range(1, d_ff + 1) if d_ff % experts == 0)
