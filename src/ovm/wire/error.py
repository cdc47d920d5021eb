from __future__ import annotations

from ovm.text.printable import GuestText


class WireError(Exception):
    """A request failed; ``status`` is 0 if there was no response."""

    def __init__(self, message: str, status: int = 0, content: bytes = b"") -> None:
        self.message = str(GuestText(message))
        """The failure as one printable line: a server may have written it."""
        super().__init__(self.message)
        self.status = status
        self.content = content
        """The body of the error response."""
