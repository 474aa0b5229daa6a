"""Typed reading of a TOML table with errors that say file, line, key and what is allowed.

Entry point: `TableReader.from_file`. A reader hands out values by key and remembers which keys were asked for, so that
`finish()` can reject unknown ones by name. Every complaint is a `ConfigError` such as

    clusters/lab.toml:14: device.memory_bandwidth = -3.0: must be a positive number (bytes/s)
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ConfigError", "TableReader", "nearest"]


class ConfigError(ValueError):
    """A user's file, mesh or name is wrong. The message is one line: where, what, what is allowed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A phrase that names the closest allowed names: `did you mean 'x'? allowed: x, y, z`."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name.lower(), choices, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}allowed: {', '.join(choices)}"


@dataclass
class TableReader:
    """One TOML table. `prefix` is its dotted path in the file (`levels[1]`); `source` is the file's text, for line
    numbers.
    """

    file: str
    source: str
    table: Mapping[str, Any]
    prefix: str = ""
    seen: set[str] = field(default_factory=set)

    @classmethod
    def from_file(cls, path: Path) -> TableReader:
        """Read a TOML file. Raises ConfigError when it is absent or is not TOML."""
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        return cls.from_text(source, str(path))

    @classmethod
    def from_text(cls, source: str, file: str) -> TableReader:
        try:
            return cls(file, source, tomllib.loads(source))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{file}: not TOML: {error}") from error

    def path(self, key: str) -> str:
        return f"{self.prefix}.{key}" if self.prefix else key

    def line(self, key: str) -> int | None:
        """The line where this table's `key` is written: the last header of this table, then the first `key =` after it."""
        lines = self.source.splitlines()
        start = 0
        if self.prefix:
            name = re.sub(r"\[\d+\]", "", self.prefix)
            index = (re.findall(r"\[(\d+)\]", self.prefix) or [""])[-1]
            headers = [i for i, text in enumerate(lines) if text.strip().strip("[]").strip() == name]
            nth = int(index) if index else 0
            start = headers[nth] if nth < len(headers) else 0
        written = re.compile(rf'\s*"?{re.escape(key)}"?\s*[=:]')  # TOML or JSON
        for number in range(start, len(lines)):
            if written.match(lines[number]):
                return number + 1
        return start + 1 if self.prefix else None

    def error(self, key: str, problem: str) -> ConfigError:
        line = self.line(key)
        where = f"{self.file}:{line}" if line else self.file
        shown = f" = {self.table[key]!r}" if key in self.table else ""
        return ConfigError(f"{where}: {self.path(key)}{shown}: {problem}")

    def _take(self, key: str, default: Any, allowed: str) -> Any:
        self.seen.add(key)
        if key in self.table:
            return self.table[key]
        if default is None:
            raise self.error(key, f"is missing; must be {allowed}")
        return default

    def number(self, key: str, unit: str, default: float | None = None, *, low: float = 0.0, high: float = float("inf"),
               open_low: bool = True) -> float:
        """A float in (low, high] (or [low, high] with `open_low=False`)."""
        ceiling = f" and at most {high:g}" if high < float("inf") else ""
        bounds = f"a number {'above' if open_low else 'of at least'} {low:g}{ceiling}"
        if low == 0 and open_low and not ceiling:
            bounds = "a positive number"
        allowed = f"{bounds} ({unit})"
        value = self._take(key, default, allowed)
        inside = isinstance(value, int | float) and not isinstance(value, bool) and value <= high and (
            value > low if open_low else value >= low)
        if not inside:
            raise self.error(key, f"must be {allowed}")
        return float(value)

    def integer(self, key: str, unit: str, default: int | None = None, *, low: int = 1) -> int:
        allowed = f"an integer of at least {low} ({unit})"
        value = self._take(key, default, allowed)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.error(key, f"must be {allowed}")
        return value

    def text(self, key: str, default: str | None = None, *, choices: Iterable[str] = ()) -> str:
        options = list(choices)
        value = self._take(key, default, "a string" + (f", one of {', '.join(options)}" if options else ""))
        if not isinstance(value, str):
            raise self.error(key, "must be a string")
        if options and value not in options:
            raise self.error(key, f"is unknown; {nearest(value, options)}")
        return value

    def child(self, key: str) -> TableReader:
        value = self._take(key, None, "a table")
        if not isinstance(value, dict):
            raise self.error(key, "must be a table")
        return TableReader(self.file, self.source, value, self.path(key))

    def children(self, key: str, *, required: bool = True) -> list[TableReader]:
        value = self._take(key, None if required else [], "a list of tables")
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self.error(key, "must be a list of tables")
        return [TableReader(self.file, self.source, v, f"{self.path(key)}[{i}]") for i, v in enumerate(value)]

    def finish(self) -> None:
        """Raise for the first key that nobody asked for."""
        for key in self.table:
            if key not in self.seen:
                raise self.error(key, f"is not a key of this table; {nearest(key, self.seen)}")
