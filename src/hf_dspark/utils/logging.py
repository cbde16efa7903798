"""Log messages that appear once, however often their cause comes up."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time that this message comes from this logger."""
    logger.warning(message)
