import pytest

from hf_moe_ted import ZCodeM3Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> ZCodeM3Tokenizer:
    """One token per byte."""
    return ZCodeM3Tokenizer(languages=["en", "de", "sw"], model_max_length=64)
