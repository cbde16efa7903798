"""Every exception of the package, in one file. Knows nothing else.

DSparkError
├── UnsupportedTargetError (ValueError)    this target cannot be decoded exactly, and why
├── UnsupportedOptionError (ValueError)    this `generate` option cannot be honoured, and what to do instead
├── BindingError (ValueError)              drafter and target do not fit each other
├── CheckpointError (ValueError)           a checkpoint that is partial, foreign or malformed
├── DataError (ValueError)                 a row or file of prompts or responses that cannot be used
├── HubError (OSError)                     the Hub refused, or could not be reached
├── OutputError (OSError)                  something could not be written: a full disk, a missing right
└── UnboundDrafterError (RuntimeError)     a drafter used before it knows its target
"""

from __future__ import annotations


class DSparkError(Exception):
    """Base of all errors that hf_dspark raises on purpose."""


class UnsupportedTargetError(DSparkError, ValueError):
    """The target cannot be verified exactly (no roll-back, attention interface ignored, ..).

    Args:
        reason (`str`): what is wrong, and the next step unless one row works.
        one_row_works (`bool`): whether a single row can still be decoded exactly through transformers' own assisted loop; the message then
            says so.
    """

    def __init__(self, reason: str, one_row_works: bool = False) -> None:
        advice = " Decode it at batch size 1, where transformers' own assisted loop drives the drafter." if one_row_works else ""
        super().__init__(reason + advice)
        self.reason = reason
        self.one_row_works = one_row_works


class UnsupportedOptionError(DSparkError, ValueError):
    """An option of `generate` that this decoding cannot honour."""


class BindingError(DSparkError, ValueError):
    """Drafter and target do not fit each other."""


class CheckpointError(DSparkError, ValueError):
    """A checkpoint that is partial, foreign or malformed; lists every offending tensor."""


class DataError(DSparkError, ValueError):
    """A prompt or response file, or a row of it, that cannot be used."""


class HubError(DSparkError, OSError):
    """The Hub did not take what was to be pushed, or could not be reached."""


class OutputError(DSparkError, OSError):
    """What a command was to write could not be written; what it wrote before is whole."""


class UnboundDrafterError(DSparkError, RuntimeError):
    """A drafter was asked to draft before it was bound to a target."""
