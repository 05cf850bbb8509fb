"""The root of every error that a user can cause or mend; scripts print it without a traceback."""


class ModelmillError(Exception):
    """A failure with a message for the user: what, found, expected, and which setting to change."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
