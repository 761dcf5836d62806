"""Every error that NarrowKV raises on purpose: one sentence that names the cause and the remedy."""


class NarrowKVError(Exception):
    """Base class of all errors of this package."""


class NarrowKVWarning(UserWarning):
    """What was asked for was done, but its result is not what it could be: one sentence with the cause and the remedy."""


class RecipeError(NarrowKVError, ValueError):
    """A recipe that does not exist, contradicts itself or cannot be built."""


class CalibrationError(NarrowKVError, ValueError):
    """A calibration that cannot be made, or that belongs to another model or recipe."""


class FileFormatError(NarrowKVError, ValueError):
    """A file that is missing, truncated, altered, or of another version."""


class UnsupportedModelError(NarrowKVError, ValueError):
    """A model, or a way of calling it, that the packed cache cannot serve."""


class CacheUseError(NarrowKVError, RuntimeError):
    """A cache used in a way that does not fit what it holds."""


class ActivationError(NarrowKVError, ValueError):
    """Keys or values that cannot be stored: NaN, infinity, or beyond the range of 16 bits."""


class BudgetError(NarrowKVError, ValueError):
    """Memory, devices or a context that cannot be planned for."""


class TextError(NarrowKVError, ValueError):
    """A text that is missing, empty or too short for what was asked."""


class OutputError(NarrowKVError, OSError):
    """A result that could not be written."""


class MissingPackageError(NarrowKVError, ImportError):
    """A package that is not installed, which only what was asked for needs."""


class ReportError(NarrowKVError, ValueError):
    """A report that cannot be made of what was asked for."""


def reason(error: BaseException) -> str:
    """What somebody else's error says, in one line: with what follows where its first line ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    for line in lines[1:3]:
        text = f"{text} {line}" if text.endswith(":") else text
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | IndexError) else text.rstrip(" .:")
