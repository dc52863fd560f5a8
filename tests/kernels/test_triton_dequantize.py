"""The PTX that makes floats of packed integers, which Triton's interpreter does not run, executed for each byte."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels import triton_dequantize

DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
INT4 = {"_LOW_INT4_AS_BF16": 0, "_HIGH_INT4_AS_BF16": 1, "_LOW_INT4_AS_FP16": 0, "_HIGH_INT4_AS_FP16": 1}


def bits_of(values: torch.Tensor) -> int:
    low, high = values.view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def halves(register: int, dtype: torch.dtype) -> torch.Tensor:
    parts = [register & 0xFFFF, register >> 16]
    return torch.tensor([part - (part >> 15 << 16) for part in parts], dtype=torch.int16).view(dtype)


def fma(dtype: torch.dtype, *registers: int) -> int:
    a, b, c = (halves(register, dtype).double() for register in registers)
    return bits_of((a * b + c).to(dtype))


def permuted(low: int, high: int, selector: int) -> int:
    """PTX ISA, `prmt.b32` in its default mode."""
    data = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    return int.from_bytes(bytes(data[selector >> 4 * place & 7] for place in range(4)), "little")


def run(ptx: str, word: int) -> torch.Tensor:
    """The four numbers of both outputs."""
    registers = {"$2": word}
    text = re.sub(r"//.*", "", ptx).strip(" {}\n")
    for statement in filter(None, (part.strip() for part in text.split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[source] if source in registers else int(source, 0) for source in sources]
        operation, *_, kind = name.split(".")
        if operation == "fma":
            registers[target] = fma(DTYPES[kind], *values)
        else:
            functions = {
                "mov": lambda a: a,
                "and": lambda a, b: a & b,
                "xor": lambda a, b: a ^ b,
                "shr": lambda a, b: a >> b,
                "prmt": permuted,
            }
            registers[target] = functions[operation](*values)
    return torch.cat([halves(registers[output], DTYPES[kind]) for output in ("$0", "$1")]).double()


@pytest.mark.parametrize("name", [*INT4, "_INT8_AS_BF16", "_INT8_AS_FP16"])
def test_each_byte(name: str) -> None:
    ptx = getattr(triton_dequantize, name).value
    for byte in range(256):
        # at each of the four places, beside others
        data = [byte, byte ^ 0xFF, (byte * 7) & 0xFF, (byte + 131) & 0xFF]
        expected = [(one >> 4 * INT4[name] & 15) - 8 if name in INT4 else one - (one >> 7 << 8) for one in data]
        assert run(ptx, int.from_bytes(bytes(data), "little")).tolist() == expected
