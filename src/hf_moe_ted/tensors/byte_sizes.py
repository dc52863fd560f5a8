"""Sizes that users give as numbers of bytes or as strings."""

from accelerate.utils import convert_file_size_to_int


def num_bytes_of(size: int | float | str, name: str) -> int:
    """A size as a number of bytes.

    Args:
        size: number of bytes, or a string such as `"8GB"` or `"7.5GiB"`.
        name: of the option, for the message.

    Raises:
        ValueError: `size` is no size, or not positive.
    """
    if (isinstance(size, int) and not isinstance(size, bool)) or (isinstance(size, float) and size.is_integer()):
        num_bytes = int(size)
    elif isinstance(size, str) and size.strip().startswith("-"):
        num_bytes = -1
    else:
        text = str(size).strip()
        try:
            if text.endswith("b"):
                raise ValueError("'8gb' would be bits")
            num_bytes = int(text) if text.isdecimal() else convert_file_size_to_int(text)
        except (ValueError, OverflowError):
            raise ValueError(
                f"{name} ({size!r}) must be a number of bytes or a string such as '8GB', in KB, MB, GB, KiB, MiB or "
                "GiB, with a capital B"
            ) from None
    if num_bytes < 1:
        raise ValueError(f"{name} ({size!r}) must be positive")
    return num_bytes


__all__ = ["num_bytes_of"]
