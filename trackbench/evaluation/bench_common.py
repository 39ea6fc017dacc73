"""What ``trackbench bench`` does alike for trackers and for data: settings, processes, results, text of tables."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trackbench.evaluation.results import Row, write_atomically, write_rows

SUFFIXES = (".json", ".csv")
Settings = TypeVar("Settings")
Result = TypeVar("Result")


def parse_arguments(arguments: Sequence[str], appended: str | None = None) -> Iterator[tuple[str, Any, str]]:
    """Key, value and text of each ``KEY=VALUE``, in Hydra's syntax, as train.py takes them.

    Args:
        arguments: of the command line.
        appended: keys that start so may be new ones, ``+KEY=VALUE``.

    Raises:
        ValueError: something else.
    """
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise ValueError(f"{argument}: expected KEY=VALUE ({str(error).splitlines()[0]})") from None
        key = parsed.key_or_group
        is_new = parsed.is_add() and not (appended and key.startswith(appended))
        if is_new or parsed.is_delete() or parsed.is_sweep_override():
            raise ValueError(f"{argument}: expected one KEY=VALUE, e.g. points=[1,64]")
        yield key, parsed.value(), argument


def fill_settings(kind: type[Settings], arguments: Sequence[tuple[str, Any, str]]) -> Settings:
    """Settings, a dataclass, from what :func:`parse_arguments` gives. Fields with a help text are keys.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    config = OmegaConf.structured(kind)
    keys = _keys(kind)
    for key, value, argument in arguments:
        if key not in keys:
            close = get_close_matches(key, keys, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(keys)}"
            raise ValueError(f"unknown key {key!r}: {hint}")
        is_mapping = OmegaConf.is_dict(config[key])
        try:
            config[key] = {} if is_mapping and value is None else value
        except OmegaConfBaseException as error:
            hint = f"; quote it: '{key}={{A:1,B:2}}'" if is_mapping else ""  # shells expand {A,B}
            raise ValueError(f"{argument}: {str(error).splitlines()[0]}{hint}") from None
    settings: Settings = OmegaConf.to_object(config)  # type: ignore[assignment]
    return settings


def settings_help(kind: type[Any]) -> str:
    """A line for every key of settings: its default and what it is."""
    defaults = kind()
    lines = []
    for name, text in _keys(kind).items():
        value = json.dumps(getattr(defaults, name), separators=(",", ":")).replace('"', "")
        lines.append(f"  {name + '=' + value:24s} {text}")
    return "\n".join(lines)


def check_output(output: str | None, overwrite: bool) -> None:
    """Raises ValueError where results cannot go to ``output``: another suffix, or it exists."""
    if output is None:
        return
    if Path(output).suffix not in SUFFIXES:
        raise ValueError(f"output={output}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if Path(output).exists() and not overwrite:
        raise ValueError(f"output={output} exists; overwrite=true replaces it")


def write_result(path: str | Path, result: Row, rows: Sequence[Row]) -> None:
    """Write all of a result as .json, or its rows, flat, as .csv."""
    if Path(path).suffix == ".csv":
        write_rows(path, rows)
    else:
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def in_own_process(what: str, call: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a new process, so that memory and threads are its own.

    Args:
        what: is measured there, for the error.
        call: a function of a module, or a ``functools.partial`` of one.
        arguments: picklable.

    Raises:
        ChildProcessError: the process died.
    """
    # not forked: CUDA and thread pools do not survive that, and memory would be the parent's
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_called, multiprocessing.get_start_method(), call, *arguments).result()
        except BrokenProcessPool:
            raise ChildProcessError(f"the process that measured {what} died; is there enough memory?") from None


def _called(start_method: str, call: Callable[..., Result], *arguments: Any) -> Result:
    """The processes that this one starts, such as a loader's, start as in training."""
    multiprocessing.set_start_method(start_method, force=True)
    return call(*arguments)


def number_text(value: float | None, digits: int = 1) -> str:
    """A number for a table; ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent_text(value: float | None) -> str:
    """A share for a table."""
    return "-" if value is None else f"{100 * value:.1f}%"


def _keys(kind: type[Any]) -> dict[str, str]:
    return {setting.name: setting.metadata["help"] for setting in fields(kind) if "help" in setting.metadata}
