from __future__ import annotations

from ovm.text.printable import GuestText


class WireError(Exception):
    """A request was not answered, or not with success; ``status`` is 0 if nothing came back."""

    def __init__(self, message: str, status: int = 0, content: bytes = b"") -> None:
        self.message = str(GuestText(message))
        """What went wrong, as one printable line: a server may have chosen the words."""
        super().__init__(self.message)
        self.status = status
        self.content = content
        """All of what was answered without success."""
