"""Names and texts from outside as they may stand in a message."""

import difflib
from collections.abc import Iterable, Sequence


def shown(name: str) -> str:
    """A name on one line: control characters, line feeds and bytes that are no UTF-8 are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in name)


def listed(names: Sequence[str], limit: int = 20, total: int | None = None) -> str:
    """The first `limit` names, comma separated, and how many more there are; `total`: of all, where `names` are only the first."""
    num_more = (len(names) if total is None else total) - limit
    more = f", and {num_more} more" if num_more > 0 else ""
    return ", ".join(shown(name) for name in names[:limit]) + more


def printable(text: str) -> str:
    """A text of several lines, each as `shown`, so that a caption or a file name cannot command the terminal."""
    return "\n".join(shown(line) for line in text.split("\n"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one as a question; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f'; did you mean "{near[0]}"?' if near else ""
