"""ICC profiles for tests, byte by byte, so that they are not made by the code under test."""

import struct
from collections.abc import Sequence

P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
"""XYZ of red, green and blue, adapted to D50."""


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc_file(
    space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", connection: bytes = b"XYZ ", version: int = 2
) -> bytes:
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none\0\0\0\0"} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table, data = table + name + struct.pack(">II", start + len(data), len(content)), data + content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s6H", start + len(data), bytes(4), version << 24, kind, space, connection, 2020, 1, 1, 0, 0, 0)
    return head + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48) + table + data


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))


def parametric_curve(*values: float) -> bytes:
    """ICC version 4's curve of type 3, such as sRGB's: g, a, b, c, d."""
    return b"para\0\0\0\0" + struct.pack(">Hxx", 3) + fixed(*values)


def rgb_profile(primaries: Sequence[Sequence[float]], curve: bytes, version: int = 2) -> bytes:
    tags = {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    return icc_file(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve), version=version)


def grey_profile(gamma: float) -> bytes:
    return icc_file(b"GRAY", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile() -> bytes:
    """A printer whose inks are those of a newspaper: full cyan is a dull blue, and so on. Two grid points for each ink."""
    inks = ((55, -30, -40), (50, 60, 0), (85, -5, 80), (20, 0, 0))
    table = b""
    for index in range(16):
        lightness, a, b = 95.0, 0.0, 0.0
        for bit, ink in enumerate(inks):
            if index >> (3 - bit) & 1:
                lightness, a, b = lightness * ink[0] / 95, a + ink[1], b + ink[2]
        table += bytes((round(lightness * 2.55), max(0, min(255, round(a) + 128)), max(0, min(255, round(b) + 128))))
    identity = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4 + table + identity * 3
    return icc_file(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, kind=b"prtr", connection=b"Lab ")
