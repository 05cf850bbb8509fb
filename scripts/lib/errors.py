"""The root of every error that a user can cause or mend; scripts print it without a traceback."""


class ModelmillError(Exception):
    """A failure with a message for the user: what, found, expected, and which setting to change."""
