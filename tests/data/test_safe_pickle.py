"""Pickles of data come through unchanged; pickles that ask for anything else do not."""

from __future__ import annotations

import collections
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trackbench.data.safe_pickle import (
    LAZY_BYTES,
    PickledArray,
    PickledBytes,
    UnsafePickleError,
    load_npy_dict,
    load_pickle,
)


def plain_and_numpy_values() -> dict[str, Any]:
    large = np.arange(5000.0)
    return {
        "array": large,
        "the same array": large,
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "large fortran": np.asfortranarray(np.arange(9000, dtype=np.int16).reshape(30, 300)),
        "jpeg-like": np.array([b"\xff\xd8" + bytes(3000) + b"\xd9", b"short"]),
        "text": np.array(["a", "öö"]),
        "objects": np.array([1, "a", b"c", None, [1, 2]], dtype=object),
        "big endian": np.arange(4, dtype=">i4"),
        "empty": np.zeros((0, 3)),
        "no axes": np.array(5),
        "complex": np.complex64(1 + 2j),
        "scalars": [np.float32(3), np.int64(-3), np.bool_(True)],
        "tuple": (1, (), ("nested", (2, 3, 4, 5))),
        "numbers": [0, 255, 65535, -1, 2**70, -(2**70), 1.5, float("inf"), True, False, None],
        "bytes": [b"", b"\x00\xff" * 3000],
        "set": {1, 2},
        "words": ["", "ünïcode", "x" * 70000],
        3: "a number as a key",
    }


def assert_same(ours: Any, expected: Any) -> None:
    if isinstance(ours, (PickledArray, PickledBytes)):
        ours = ours.load()
    assert type(ours) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        assert ours.flags.writeable
        np.testing.assert_array_equal(ours, expected)
    elif isinstance(expected, dict):
        assert list(ours) == list(expected)
        for key in expected:
            assert_same(ours[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert_same(one, other)
    else:
        assert ours == expected


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_equals_pickle_load(tmp_path, protocol, lazy) -> None:
    file = tmp_path / "plain.pkl"
    file.write_bytes(pickle.dumps(plain_and_numpy_values(), protocol))
    assert_same(load_pickle(file, lazy=lazy), plain_and_numpy_values())


@pytest.mark.parametrize("lazy", [False, True])
def test_equals_pickle_load_on_benchmark_files(data_fixtures, lazy) -> None:
    files = sorted((data_fixtures / "tapvid").rglob("*.pkl"))
    assert len(files) == 10
    for file in files:
        assert_same(load_pickle(file, lazy=lazy), pickle.loads(file.read_bytes()))


def test_lazy_leaves_large_payloads_in_the_file(tmp_path) -> None:
    file = tmp_path / "large.pkl"
    file.write_bytes(pickle.dumps({"video": np.ones((64, 64), np.uint8), "jpeg": [bytes(LAZY_BYTES)], "n": b"x"}))
    content = load_pickle(file, lazy=True)
    assert isinstance(content["video"], PickledArray)
    assert content["video"].shape == (64, 64)
    assert isinstance(content["jpeg"][0], PickledBytes)
    assert content["n"] == b"x"
    file.write_bytes(file.read_bytes()[:300])
    for value in (content["video"], content["jpeg"][0]):
        with pytest.raises(ValueError, match=r"large\.pkl: expected \d+"):
            value.load()


class Touch:
    """Unpickling an instance with ``pickle.load`` creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Foreign:
    pass


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda evil: evil,
        lambda evil: {"video": [evil]},
        lambda evil: np.array([evil, None], dtype=object),
        lambda evil: np.array([{"video": np.array([[evil]], dtype=object)}], dtype=object),
        lambda evil: {"points": np.array(evil, dtype=object)},
    ],
    ids=["alone", "in containers", "object array", "nested object array", "0-d object array"],
)
def test_command_is_refused_and_not_run(tmp_path, wrap, protocol, lazy) -> None:
    trap, file = tmp_path / "trap", tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps(wrap(Touch(trap)), protocol))
    with pytest.raises(ValueError, match=r"evil\.pkl: ") as refusal:
        load_pickle(file, lazy=lazy)
    if protocol >= 2:
        assert isinstance(refusal.value, UnsafePickleError)
        assert "system" in str(refusal.value)
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists(), "the trap itself must work"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Foreign(), "Foreign"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (np.ma.masked_array([1]), "numpy.ma"),
        (print, "builtins.print"),
        (np.random.default_rng(0), "numpy.random"),
        (np.zeros(2, dtype=[("a", "f4")]), "structured numpy dtype|dtype that is 'V4'"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "dtype that is 'M8'"),
        (np.zeros(1).view(np.recarray), "numpy"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, value, name) -> None:
    file = tmp_path / "foreign.pkl"
    file.write_bytes(pickle.dumps(value))
    with pytest.raises(UnsafePickleError, match=rf"foreign\.pkl: refused: .*({name})"):
        load_pickle(file)


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\ndtype\n\x85R.",
        b"\x80\x02}X\x01\x00\x00\x00a\x85b.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00V9\x85R.",
    ],
)
def test_crafted_programs_are_refused(tmp_path, program) -> None:
    file = tmp_path / "crafted.pkl"
    file.write_bytes(program)
    with pytest.raises(ValueError, match=r"crafted\.pkl"):
        load_pickle(file)


def test_dotted_names_do_not_slip_through(tmp_path) -> None:
    file = tmp_path / "dotted.pkl"
    file.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__class__.\x93.")
    with pytest.raises(UnsafePickleError, match=r"ndarray\.__class__"):
        load_pickle(file)


def test_structures_that_unfold_without_end_are_harmless(tmp_path) -> None:
    file = tmp_path / "unfolding.pkl"
    doubled_200_times = b")\x94" + b"".join(b"h%c\x86\x94" % n for n in range(200))
    file.write_bytes(b"\x80\x04" + doubled_200_times + b".")
    assert len(load_pickle(file)) == 2
    file.write_bytes(b"\x80\x04}" + doubled_200_times + b"Ns.")
    with pytest.raises(ValueError, match="a tuple as a key"):
        load_pickle(file)
    file.write_bytes(b"\x80\x04cnumpy\ndtype\n" + doubled_200_times + b"R.")
    with pytest.raises(UnsafePickleError, match="a numpy dtype that is a tuple"):
        load_pickle(file)


def test_every_truncation_is_a_value_error(tmp_path) -> None:
    whole = pickle.dumps(
        {"video": np.arange(6000), "names": ["a", b"b", (1.5, 2**80)], "occluded": np.ones(3, bool)}
    )
    file = tmp_path / "cut.pkl"
    for length in [*range(0, len(whole), 97), *range(len(whole) - 200, len(whole))]:
        file.write_bytes(whole[:length])
        for lazy in (False, True):
            with pytest.raises(ValueError, match=r"cut\.pkl: not a readable pickle"):
                load_pickle(file, lazy=lazy)


def test_damage_is_a_value_error_or_another_value(data_fixtures, tmp_path) -> None:
    whole = (data_fixtures / "tapvid/tapvid_kinetics/0009_of_0010.pkl").read_bytes()
    generator, file, refused = random.Random(0), tmp_path / "damaged.pkl", 0
    structure = [*range(400), *range(len(whole) - 1500, len(whole))]
    for _ in range(1500):
        damaged = bytearray(whole)
        for position in generator.sample(structure, 3):
            damaged[position] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            load_pickle(file, lazy=True)
        except ValueError:  # any other exception fails the test
            refused += 1
    assert refused > 100


def test_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pkl"):
        load_pickle(tmp_path / "nothing.pkl")


@pytest.mark.parametrize("lazy", [False, True])
def test_npy_dict_as_numpy_writes_it(tmp_path, lazy) -> None:
    annotations = {
        "coords": np.random.default_rng(0).random((40, 24, 2)),
        "visibility": np.ones((40, 24), bool),
    }
    np.save(tmp_path / "clip.npy", annotations, allow_pickle=True)
    assert_same(load_npy_dict(tmp_path / "clip.npy", lazy=lazy), annotations)


def test_npy_dict_of_the_movi_f_folder(data_fixtures) -> None:
    files = sorted((data_fixtures / "movi_f_disk").rglob("*.npy"))
    assert files
    for file in files:
        assert_same(load_npy_dict(file), np.load(file, allow_pickle=True).item())


def test_npy_without_a_dict_is_refused(tmp_path) -> None:
    file = tmp_path / "other.npy"
    np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npy: expected one dict .* got float64 \(3,\)"):
        load_npy_dict(file)
    np.save(file, np.array([1, "a"], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"other\.npy: expected one dict .* got object \(2,\)"):
        load_npy_dict(file)
    np.save(file, np.array("text", dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"other\.npy: expected a dict, got str"):
        load_npy_dict(file)
    file.write_bytes(b"no numpy file")
    with pytest.raises(ValueError, match=r"other\.npy: not an \.npy file"):
        load_npy_dict(file)


def test_npy_with_a_command_is_refused_and_not_run(tmp_path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "evil.npy"
    np.save(file, {"coords": Touch(trap)}, allow_pickle=True)
    with pytest.raises(UnsafePickleError, match=r"evil\.npy: refused: it asks for '.*system'"):
        load_npy_dict(file)
    assert not trap.exists()
    np.load(file, allow_pickle=True)
    assert trap.exists(), "the trap itself must work"


def test_cut_npy_is_a_value_error(tmp_path) -> None:
    file = tmp_path / "cut.npy"
    np.save(file, {"coords": np.zeros((40, 24, 2))}, allow_pickle=True)
    whole = file.read_bytes()
    for length in (0, 5, 60, 130, 200, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npy: not "):
            load_npy_dict(file)
