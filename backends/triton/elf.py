"""Registers and stack of a kernel, read from its cubin (an ELF file): what `ptxas -v` would print.

The section `.nv.info` has an entry EIATTR_REGCOUNT (0x2f) and one EIATTR_FRAME_SIZE (0x11) per function, each two words:
symbol number, and
registers or bytes of stack. Older assemblers leave the register count in the top byte of sh_info of `.text.NAME`. A Triton
kernel has no
arrays of its own, so its stack is spilled registers (and what libdevice's slow paths of sin and cos need).
"""

from __future__ import annotations

import struct

__all__ = ["resource_usage"]

_FRAME_SIZE, _REGISTERS, _SIZED = 0x11, 0x2F, 0x04


def resource_usage(cubin: bytes, name: str) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread); (0, 0) for what cannot be found."""
    if cubin[:4] != b"\x7fELF":
        return 0, 0
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    table = headers[names][4]

    def text(at: int) -> str:
        return cubin[table + at : cubin.index(b"\0", table + at)].decode()

    registers = stack = 0
    for header in headers:
        section = text(header[0])
        if section == f".text.{name}":
            registers = max(registers, header[7] >> 24)
        elif section == ".nv.info":
            data = cubin[header[4] : header[4] + header[5]]
            stack, registers = _largest(data, _FRAME_SIZE), max(registers, _largest(data, _REGISTERS))
    return registers, stack


def _largest(data: bytes, wanted: int) -> int:
    """The largest value of one attribute. Entries are (format, attribute, 16-bit value or length); sized ones carry that
    many bytes."""
    at = largest = 0
    while at + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _SIZED:
            if attribute == wanted and value == 8:
                largest = max(largest, struct.unpack_from("<II", data, at)[1])
            at += value
    return largest
