"""Random numbers that depend on a name, not on what is drawn before or elsewhere."""

import hashlib


def named_seed(seed: int, name: str) -> int:
    """The seed, from 0 to 2**64 - 1, for what has this name, such as a weight."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


__all__ = ["named_seed"]
