"""Being written."""

from __future__ import annotations

from typing import Any


def add_command(names: Any) -> None:
    """Add the command."""
