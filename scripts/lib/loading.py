"""What is said of a base that transformers cannot load."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.console import note
from lib.errors import ModelmillError, first_line


class BaseModelError(ModelmillError):
    """A base cannot be loaded, or not on these devices."""


@contextmanager
def explain_loading(what: str, base: Path) -> Iterator[None]:
    """
    Say of a base that transformers refuses which folder it is; the library's own errors seldom do.

    It checks little itself: a damaged file ends in whatever exception its reading happens to meet, a plain
    one from the tokenizers library, or a KeyError, TypeError, RuntimeError, SafetensorError and others.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        note(traceback.format_exc())
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BaseModelError(
            f"{base}: transformers cannot load its {what} ({reason}); check the files there"
        ) from error
