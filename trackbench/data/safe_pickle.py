"""Read pickles of plain data and numpy arrays without running anything that they ask for.

TAP-Vid is published as pickles, and a pickle is a program: ``pickle.load`` calls whatever the file names.
Here a small interpreter knows the opcodes that build plain values (PEP 307, PEP 3154) and the few numpy
functions that numpy's own pickles name; it imports nothing, calls nothing by name, and refuses the rest. As
it reads opcode by opcode, it can also leave large payloads in the file, so that a file of many videos opens
at once and gives one video at a time.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

LAZY_BYTES = 4096  # payloads below are cheaper to keep than to find again


class UnsafePickleError(ValueError):
    """A pickle asks for something other than plain data and numpy arrays."""


@dataclass(frozen=True)
class PickledBytes:
    """Bytes that are still in the file."""

    path: Path
    offset: int
    length: int

    def load(self) -> bytes:
        """Read them.

        Raises:
            ValueError: if the file has become shorter.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) != self.length:
            raise ValueError(f"{self.path}: expected {self.length} bytes at {self.offset}, got {len(data)}")
        return data


@dataclass(frozen=True)
class PickledArray:
    """A numpy array whose values are still in the file."""

    source: PickledBytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str

    def load(self) -> NDArray[Any]:
        """Read it.

        Raises:
            ValueError: if the file has become shorter.
        """
        source = self.source
        count = math.prod(self.shape)
        flat = np.fromfile(source.path, self.dtype, count, offset=source.offset)  # no second copy
        if len(flat) != count:
            raise ValueError(f"{source.path}: expected {count} values at {source.offset}, got {len(flat)}")
        return flat.reshape(self.shape, order="F" if self.order == "F" else "C")


def load_pickle(path: str | Path, lazy: bool = False) -> Any:
    """Read a pickle of plain values and numpy arrays.

    Plain values are None, bool, int, float, str, bytes, list, tuple, dict and set.

    Args:
        path: a file in pickle protocol 2 to 5.
        lazy: leave bytes and arrays of :data:`LAZY_BYTES` or more in the file, as :class:`PickledBytes` and
            :class:`PickledArray`.

    Returns:
        The pickled value. Arrays may hold bool, int, uint, float, complex, bytes, str, or plain values.

    Raises:
        UnsafePickleError: the file names any other class or function; nothing of it was run.
        ValueError: the file is truncated, corrupt, or not a pickle.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        return _Interpreter(file, path, lazy).run()


def load_npy_dict(path: str | Path, lazy: bool = False) -> dict[str, Any]:
    """Read an ``.npy`` file that holds one dict, as ``numpy.save`` writes it.

    Args:
        path: an ``.npy`` file with a 0-d object array; inside, what :func:`load_pickle` admits.
        lazy: as in :func:`load_pickle`.

    Returns:
        The dict.

    Raises:
        UnsafePickleError: as :func:`load_pickle`.
        ValueError: the file is truncated, corrupt, no ``.npy`` file, or holds something other than one dict.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in read_header:
                raise ValueError(f"unknown .npy version {version}")
            shape, _, dtype = read_header[version](file)
        except ValueError as error:
            raise ValueError(f"{path}: not an .npy file: {error}") from error
        if shape != () or dtype != np.dtype(object):
            raise ValueError(f"{path}: expected one dict (a 0-d object array), got {dtype} {shape}")
        array = _Interpreter(file, path, lazy).run()
    value = array.item() if isinstance(array, np.ndarray) and array.shape == () else array
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dict, got {type(value).__name__}")
    return value


class _Callable(Enum):
    """What a pickle may name; each stands for code of ours, not for the function of that name."""

    RECONSTRUCT = "an array, filled later"
    NDARRAY = "the type of an array"
    DTYPE = "a dtype"
    SCALAR = "a numpy scalar"
    FROM_BUFFER = "an array"
    ENCODE = "bytes, as protocol 2 writes them"
    BYTES = "no bytes, as protocol 2 writes them"
    SET = "a set, as protocols 2 and 3 write it"


_ALLOWED = {
    "numpy.core.multiarray._reconstruct": _Callable.RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _Callable.RECONSTRUCT,
    "numpy.core.multiarray.scalar": _Callable.SCALAR,
    "numpy._core.multiarray.scalar": _Callable.SCALAR,
    "numpy.core.numeric._frombuffer": _Callable.FROM_BUFFER,
    "numpy._core.numeric._frombuffer": _Callable.FROM_BUFFER,
    "numpy.ndarray": _Callable.NDARRAY,
    "numpy.dtype": _Callable.DTYPE,
    "_codecs.encode": _Callable.ENCODE,
    "__builtin__.bytes": _Callable.BYTES,
    "__builtin__.set": _Callable.SET,
    "builtins.set": _Callable.SET,
}
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9][0-9]{0,8}|O8?")
_KEY_TYPES = (str, bytes, int, float, bool, type(None))


class _Unfilled:
    """An array or dtype that the pickle has created but not yet described (its BUILD comes later)."""

    def __init__(self, dtype: np.dtype[Any] | None = None) -> None:
        self.dtype = dtype
        self.memo_keys: list[int] = []


class _Interpreter:
    """A pickle machine that can build plain values only."""

    def __init__(self, file: BinaryIO, path: Path, lazy: bool) -> None:
        self.file = file
        self.path = path
        self.lazy = lazy
        self.size = os.fstat(file.fileno()).st_size
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            while (opcode := self._read(1)) != pickle.STOP:
                self._step(opcode)
            (value,) = self.stack
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{self.path}: {error}") from error
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(f"{self.path}: not a readable pickle: {error!r}") from error
        if isinstance(value, (_Unfilled, _Callable)):
            raise ValueError(f"{self.path}: not a readable pickle: it ends before its value is complete")
        return value

    def _step(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _NUMBERS:
            layout = _NUMBERS[opcode]
            self.stack.append(layout.unpack(self._read(layout.size))[0])
        elif opcode in _PAYLOADS:
            layout, push = _PAYLOADS[opcode]
            push(self, layout.unpack(self._read(layout.size))[0])
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self)
        elif opcode == pickle.INST:
            self._name(self._line(), self._line())
        else:
            raise ValueError(f"opcode {opcode!r} at {self.file.tell() - 1} is not one of plain data")

    # reading

    def _read(self, length: int) -> bytes:
        if length >= LAZY_BYTES:
            self._check_length(length)  # before memory is taken for it
        data = self.file.read(length)
        if len(data) != length:
            raise ValueError("the file ends early")
        return data

    def _check_length(self, length: int) -> None:
        left = self.size - self.file.tell()
        if length > left:
            raise ValueError(f"the file ends {length - left} bytes early")

    def _line(self) -> str:
        line = self.file.readline(1024)
        if not line.endswith(b"\n"):
            raise ValueError("a name without an end")
        return line[:-1].decode()

    # plain values

    def _push_integer(self, length: int) -> None:
        self.stack.append(int.from_bytes(self._read(length), "little", signed=True))

    def _push_text(self, length: int) -> None:
        self.stack.append(self._read(length).decode("utf-8", "surrogatepass"))

    def _push_bytes(self, length: int) -> None:
        if self.lazy and length >= LAZY_BYTES:
            self._check_length(length)
            self.stack.append(PickledBytes(self.path, self.file.tell(), length))
            self.file.seek(length, os.SEEK_CUR)
        else:
            self.stack.append(self._read(length))

    def _skip_frame_length(self) -> None:
        self._read(8)  # frames only tell a reader how much to fetch at once

    def _check_protocol(self) -> None:
        protocol = self._read(1)[0]
        if not 2 <= protocol <= 5:
            raise ValueError(f"pickle protocol {protocol}, expected 2 to 5")

    # containers

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _append(self) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def _extend(self) -> None:
        values = self._pop_mark()
        self._top(list).extend(values)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[_checked_key(key)] = value

    def _set_items(self) -> None:
        values = self._pop_mark()
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_checked_key(key)] = value

    def _add_to_set(self) -> None:
        values = self._pop_mark()
        self._top(set).update(_checked_key(value) for value in values)

    def _frozenset(self) -> None:
        values = self._pop_mark()
        self.stack.append(frozenset(_checked_key(value) for value in values))

    def _marked_tuple(self) -> None:
        values = self._pop_mark()
        self.stack.append(tuple(values))

    def _tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise ValueError("a tuple of values that are not there")
        values = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.stack.append(values)

    def _top(self, kind: type) -> Any:
        top = self.stack[-1]
        if type(top) is not kind:
            raise ValueError(f"expected a {kind.__name__} to fill, got {type(top).__name__}")
        return top

    # shared values

    def _remember(self, key: int) -> None:
        value = self.stack[-1]
        self.memo[key] = value
        if isinstance(value, _Unfilled):
            value.memo_keys.append(key)

    def _remember_next(self) -> None:
        self._remember(len(self.memo))

    def _recall(self, key: int) -> None:
        self.stack.append(self.memo[key])

    # names and what they build

    def _global(self) -> None:
        self._name(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is not text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        full_name = f"{module}.{name}"
        if full_name not in _ALLOWED:
            raise UnsafePickleError(
                f"refused: it asks for {full_name!r}; expected plain values and numpy arrays only"
            )
        self.stack.append(_ALLOWED[full_name])

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Callable) or not isinstance(arguments, tuple):
            raise UnsafePickleError(f"refused: it calls a {type(function).__name__}")
        self.stack.append(self._call(function, arguments))

    def _call(self, function: _Callable, arguments: tuple[Any, ...]) -> Any:
        if function is _Callable.RECONSTRUCT:
            if arguments[0] is not _Callable.NDARRAY:
                raise UnsafePickleError("refused: an array of a class other than numpy.ndarray")
            return _Unfilled()
        if function is _Callable.DTYPE:
            name = arguments[0]
            if not isinstance(name, str) or not _DTYPE.fullmatch(name):
                raise UnsafePickleError(f"refused: a numpy dtype that is {_shown(name)}")
            return _Unfilled(np.dtype(name))
        if function is _Callable.SCALAR:
            dtype, raw = arguments
            return self._array(raw, _described(dtype), (), "C")[()]
        if function is _Callable.FROM_BUFFER:
            raw, dtype, shape, order = arguments
            return self._array(raw, _described(dtype), shape, order)
        if function is _Callable.ENCODE:
            text, encoding = arguments
            if encoding != "latin1" or not isinstance(text, str):
                raise ValueError(f"bytes encoded as {_shown(encoding)}, expected latin1")
            return text.encode("latin1")
        if function is _Callable.BYTES and arguments == ():
            return b""
        if function is _Callable.SET and len(arguments) == 1 and isinstance(arguments[0], list):
            return {_checked_key(value) for value in arguments[0]}
        raise UnsafePickleError(f"refused: it calls {function.value}")

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack.pop()
        if not isinstance(target, _Unfilled) or not isinstance(state, tuple):
            raise UnsafePickleError(f"refused: it sets the state of a {type(target).__name__}")
        value: Any
        if target.dtype is not None:
            value = _dtype_with_state(target.dtype, state)
        else:
            _, shape, dtype, is_fortran, raw = state
            value = self._array(raw, _described(dtype), shape, "F" if is_fortran else "C")
        for key in target.memo_keys:
            self.memo[key] = value
        self.stack.append(value)

    def _array(self, raw: Any, dtype: np.dtype[Any], shape: Any, order: str) -> Any:
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("an array whose shape is not a tuple of sizes")
        if order not in ("C", "F"):
            raise ValueError(f"an array in order {_shown(order)}, expected C or F")
        length = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
        if not isinstance(raw, (list,) if dtype.hasobject else (bytes, PickledBytes)):
            raise ValueError(f"an array of {dtype} from a {type(raw).__name__}")
        given = raw.length if isinstance(raw, PickledBytes) else len(raw)
        if given != length:
            raise ValueError(f"an array of {dtype} {shape} from {given} bytes or values, expected {length}")
        if isinstance(raw, PickledBytes):
            return PickledArray(raw, dtype, shape, order)
        if isinstance(raw, bytes):
            return _array_from_bytes(raw, dtype, shape, order)
        array = np.empty(length, dtype=object)
        for index, value in enumerate(raw):
            array[index] = value
        return array.reshape(shape, order="F" if order == "F" else "C")


def _described(dtype: Any) -> np.dtype[Any]:
    if isinstance(dtype, _Unfilled):
        dtype = dtype.dtype
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"an array whose dtype is a {type(dtype).__name__}")
    return dtype


def _dtype_with_state(dtype: np.dtype[Any], state: tuple[Any, ...]) -> np.dtype[Any]:
    """State: version, byte order, subarray, names, fields, item size, alignment, flags."""
    if len(state) != 8 or state[2:5] != (None, None, None):
        raise UnsafePickleError("refused: a structured numpy dtype")
    if state[1] not in ("<", ">", "=", "|"):
        raise ValueError("a dtype of unknown byte order")
    return dtype if state[1] == "|" else dtype.newbyteorder(state[1])


def _array_from_bytes(raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> NDArray[Any]:
    flat = np.frombuffer(bytearray(raw), dtype) if raw else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _shown(value: Any) -> str:
    """For messages: text as it is, never what a crafted structure would unfold to."""
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


def _checked_key(key: Any) -> Any:
    if type(key) not in _KEY_TYPES:  # hashing nested tuples can be made to take for ever
        raise ValueError(f"a {type(key).__name__} as a key, expected text, bytes or a number")
    return key


_U1, _U2, _U4, _U8 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")

_CONSTANTS: dict[bytes, Callable[[], Any]] = {
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_TUPLE: tuple,
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_SET: set,
}
_NUMBERS = {pickle.BININT: _I4, pickle.BININT1: _U1, pickle.BININT2: _U2, pickle.BINFLOAT: _F8}
_PAYLOADS: dict[bytes, tuple[struct.Struct, Callable[[_Interpreter, int], None]]] = {
    pickle.LONG1: (_U1, _Interpreter._push_integer),
    pickle.LONG4: (_U4, _Interpreter._push_integer),
    pickle.SHORT_BINUNICODE: (_U1, _Interpreter._push_text),
    pickle.BINUNICODE: (_U4, _Interpreter._push_text),
    pickle.BINUNICODE8: (_U8, _Interpreter._push_text),
    pickle.SHORT_BINBYTES: (_U1, _Interpreter._push_bytes),
    pickle.BINBYTES: (_U4, _Interpreter._push_bytes),
    pickle.BINBYTES8: (_U8, _Interpreter._push_bytes),
    pickle.BYTEARRAY8: (_U8, _Interpreter._push_bytes),
    pickle.BINPUT: (_U1, _Interpreter._remember),
    pickle.LONG_BINPUT: (_U4, _Interpreter._remember),
    pickle.BINGET: (_U1, _Interpreter._recall),
    pickle.LONG_BINGET: (_U4, _Interpreter._recall),
}
_ACTIONS: dict[bytes, Callable[[_Interpreter], None]] = {
    pickle.PROTO: _Interpreter._check_protocol,
    pickle.FRAME: _Interpreter._skip_frame_length,
    pickle.MARK: _Interpreter._mark,
    pickle.APPEND: _Interpreter._append,
    pickle.APPENDS: _Interpreter._extend,
    pickle.SETITEM: _Interpreter._set_item,
    pickle.SETITEMS: _Interpreter._set_items,
    pickle.ADDITEMS: _Interpreter._add_to_set,
    pickle.FROZENSET: _Interpreter._frozenset,
    pickle.TUPLE: _Interpreter._marked_tuple,
    pickle.TUPLE1: lambda machine: machine._tuple(1),
    pickle.TUPLE2: lambda machine: machine._tuple(2),
    pickle.TUPLE3: lambda machine: machine._tuple(3),
    pickle.MEMOIZE: _Interpreter._remember_next,
    pickle.GLOBAL: _Interpreter._global,
    pickle.STACK_GLOBAL: _Interpreter._stack_global,
    pickle.REDUCE: _Interpreter._reduce,
    pickle.BUILD: _Interpreter._build,
}
