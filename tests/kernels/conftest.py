import pytest
import torch


@pytest.fixture
def poisoned_buffers():
    """New tensors are full of NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
