"""Names and texts from outside as they may stand in a message."""


def shown(name: str) -> str:
    """A name on one line: control characters, line feeds and bytes that are no UTF-8 are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in name)


def listed(names: list[str], limit: int = 20) -> str:
    """The first `limit` names, comma separated, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + more
