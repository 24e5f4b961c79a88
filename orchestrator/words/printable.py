"""Text from a ledger, a file or a failure on its way to a terminal. Standard library only."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns ``text`` as one line that a terminal shows and does not obey.

    Line ends and other white space become spaces; what else is not printable, the escape character of terminals and marks that
    turn the direction of writing among it, is written out: ``\\x1b``. Everything that commands print for people goes through
    this at the last moment, so that rows, JSON and files keep the text as it is.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else _written_out(c) for c in text)


def _written_out(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
