"""The names that settings know for constructions, routers, backends and schedules of k. Imports nothing of torch."""

from typing import Literal

Construction = Literal["kmeans", "kmeans_activations", "coactivation", "random", "contiguous"]
RouterName = Literal["center", "random", "gate"]
PosthocRouter = Literal["mass_mlp", "norm_mlp", "centers"]
BackendName = Literal["auto", "masked", "loop", "grouped", "decode_cpu", "fused", "decode_gpu"]
ScheduleKind = Literal["constant", "linear", "cosine", "step"]
Activation = Literal["relu", "relu2", "gelu", "gelu_new", "silu"]
