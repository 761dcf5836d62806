"""Every error that NarrowKV raises on purpose: one sentence that names the cause and the remedy."""


class NarrowKVError(Exception):
    """Base class of all errors of this package."""


class NarrowKVWarning(UserWarning):
    """The request was carried out, but the result may be poor: one sentence with the cause and the remedy."""


class RecipeError(NarrowKVError, ValueError):
    """A recipe that does not exist, contradicts itself or cannot be built."""


class CalibrationError(NarrowKVError, ValueError):
    """A calibration that cannot be made, or that belongs to another model or recipe."""


class FileFormatError(NarrowKVError, ValueError):
    """A file that is missing, truncated, altered, or of another version."""


class UnsupportedModelError(NarrowKVError, ValueError):
    """A model, or a way of calling it, that the packed cache does not support."""


class CacheUseError(NarrowKVError, RuntimeError):
    """A cache used in a way that does not match its contents."""


class ActivationError(NarrowKVError, ValueError):
    """Keys or values that cannot be stored: NaN, infinity, or beyond the range of 16 bits."""


class TrainingError(NarrowKVError, RuntimeError):
    """Training that cannot go on: there is nothing to train, or its loss is no number any more."""


class BudgetError(NarrowKVError, ValueError):
    """Memory, devices or a context for which no plan exists."""


class TextError(NarrowKVError, ValueError):
    """A text that is missing, empty or too short."""


class OutputError(NarrowKVError, OSError):
    """A result that could not be written."""


class MissingPackageError(NarrowKVError, ImportError):
    """An optional package that is needed here but not installed."""


class ReportError(NarrowKVError, ValueError):
    """A report that cannot be written from what was requested."""


def reason(error: BaseException) -> str:
    """The message of another package's error in one line, with the next lines if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    for line in lines[1:3]:
        text = f"{text} {line}" if text.endswith(":") else text
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | IndexError) else text.rstrip(" .:")
