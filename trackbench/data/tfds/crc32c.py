"""CRC-32C (Castagnoli), the checksum of TFRecord files, over many bytes at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78  # bits reversed
MASK_DELTA = 0xA282EAD8  # of TFRecord, so that a checksum of checksums is not degenerate
ROW = 1024  # bytes that each lane takes


def _byte_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


_TABLE = _byte_table()
_TABLE_LIST = [int(value) for value in _TABLE]
_PAIR_TABLE = np.arange(1 << 16, dtype=np.uint32)  # two bytes in one step
for _ in range(2):
    _PAIR_TABLE = _TABLE[_PAIR_TABLE & 0xFF] ^ (_PAIR_TABLE >> np.uint32(8))


def crc32c(data: bytes) -> int:
    """The checksum of ``data``."""
    if len(data) < 4 * ROW:
        state = 0xFFFFFFFF
        for byte in data:
            state = _TABLE_LIST[(state ^ byte) & 0xFF] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    # The CRC is linear: rows are summed up side by side, then joined in pairs. Zeros in front change nothing.
    rows = -(-len(data) // ROW)
    padded = np.zeros(rows * ROW, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 0xFF  # the initial state
    state_of = np.zeros(rows, np.uint32)
    for column in np.ascontiguousarray(padded.view("<u2").reshape(rows, ROW // 2).T):
        state_of = _PAIR_TABLE[state_of.astype(np.uint16) ^ column] ^ (state_of >> np.uint32(16))
    over_row = _after_zeros(ROW)
    while len(state_of) > 1:
        if len(state_of) % 2:
            state_of = np.concatenate([np.zeros(1, np.uint32), state_of])
        state_of = _apply(over_row, state_of[::2]) ^ state_of[1::2]
        over_row = _apply(over_row, over_row)
    return int(state_of[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord stores it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def _after_zeros(count: int) -> NDArray[np.uint32]:
    """What ``count`` zero bytes, a power of 2, make of each of the 32 bits of the state, (32,)."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    operator = np.asarray(_TABLE[bits & 0xFF] ^ (bits >> np.uint32(8)), np.uint32)
    for _ in range(count.bit_length() - 1):
        operator = _apply(operator, operator)
    return operator


def _apply(operator: NDArray[np.uint32], states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The operator (32,), an image for each bit, on many states."""
    result = np.zeros_like(states)
    for bit, image in enumerate(operator):
        result ^= np.where(states >> np.uint32(bit) & 1, image, np.uint32(0))
    return result
