from __future__ import annotations

WORDS_MAX = 1000
"""Characters of what went wrong that are shown; a server may answer anything."""


class WireError(Exception):
    """A request was not answered, or not with success; ``status`` is 0 if nothing came back."""

    def __init__(self, message: str, status: int = 0, content: bytes = b"") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.content = content
        """All of what was answered without success."""
