"""docs/language.md says what the tests say."""

from __future__ import annotations

from pathlib import Path

import aicc

from .table import BEGIN, END, table

PAGE = Path(aicc.__file__).parent / "docs" / "language.md"


def test_the_table_is_that_of_the_tests(update_golden: bool) -> None:
    """`pytest tests/language/test_docs.py --update-golden` writes it anew."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    found, tail = rest.split(END)
    made = f"\n{table()}\n\n"
    if update_golden:
        PAGE.write_text(head + BEGIN + made + END + tail)
        return
    assert found == made
