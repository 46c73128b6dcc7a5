"""What is warned of, once, while experts are looked at."""

import pytest
import torch

from ssd_lit.training.activation_monitor import WINDOW, RoutingWatch

EVEN = [0.5, 0.5, 0.5, 0.5]


def looks(watch: RoutingWatch, loads: list[list[float]], times: int = WINDOW) -> None:
    for _ in range(times):
        watch.update(torch.tensor(loads), top_k=2)


def test_experts_without_tokens_over_a_window_are_told_once_a_layer(caplog: pytest.LogCaptureFixture) -> None:
    watch = RoutingWatch("ssd-seed0 02-sparse")
    looks(watch, [EVEN, [0.8, 0.6, 0.6, 0.0], [1.0, 0.5, 0.5, 0.0]], WINDOW - 1)
    looks(watch, [EVEN, [0.8, 0.6, 0.6, 0.0], EVEN], 1)
    assert caplog.messages == ["ssd-seed0 02-sparse: of 4 experts no token chose 1 in layer 1"]
    looks(watch, [EVEN, [0.8, 0.6, 0.6, 0.0], EVEN])
    assert len(caplog.messages) == 1
    looks(watch, [[0.0, 0.7, 0.7, 0.6], [0.8, 0.6, 0.6, 0.0], EVEN])
    assert caplog.messages[1:] == ["ssd-seed0 02-sparse: of 4 experts no token chose 1 in layer 0"]


def test_routing_that_takes_the_same_experts_for_all_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = RoutingWatch("sparse-seed0 01-sparse")
    looks(watch, [EVEN, [0.99, 0.99, 0.01, 0.01]])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("routing has collapsed: of 4 experts it uses 2.12 in layer 1")


def test_a_phase_shorter_than_a_window_is_judged_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    watch = RoutingWatch("a")
    looks(watch, [[1.0, 1.0, 0.0, 0.0]], 3)
    assert not caplog.messages
    watch.close(top_k=2)
    watch.close(top_k=2)
    assert [message.split(":")[1] for message in caplog.messages] == [
        " of 4 experts no token chose 2 in layer 0", " routing has collapsed",
    ]  # fmt: skip


@pytest.mark.parametrize("load", [EVEN, [1.0, 0.4, 0.3, 0.3]])
def test_sound_routing_is_not_warned_of(load: list[float], caplog: pytest.LogCaptureFixture) -> None:
    watch = RoutingWatch("a")
    looks(watch, [load])
    assert not caplog.messages
    every = RoutingWatch("all experts on")
    for _ in range(WINDOW):
        every.update(torch.ones(1, 4), top_k=4)
    assert not caplog.messages
