"""What a user can mend: reported as one message and exit code 2, without a traceback."""

from __future__ import annotations

__all__ = ["SettingError", "UserError"]


class UserError(Exception):
    """The message says what is wrong, where, and what to do."""


class SettingError(UserError, ValueError):
    """An environment variable or option whose value makes no sense."""
