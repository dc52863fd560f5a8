"""Random numbers that depend only on a name, not on other draws."""

import hashlib


def named_seed(seed: int, name: str) -> int:
    """The seed, from 0 to 2**64 - 1, for a name, such as that of a weight."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


__all__ = ["named_seed"]
