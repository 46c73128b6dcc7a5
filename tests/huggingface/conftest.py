"""What the tests of checkpoint folders share."""

import pytest
import torch

from tests.checkpoint_folders import VOCABULARY


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
