"""Errors in the user's input: one line with what was expected, what was found, and what to do.

The command line prints them without a traceback and exits with code 2. Any other exception that reaches it is a bug in
DINOCell and keeps its traceback (exit code 1).
"""


class DinocellError(ValueError):
    """Invalid user input: a recipe, a file, an option."""


class ConfigError(DinocellError):
    """A recipe or a ``key=value`` override that does not fit the schema."""


class WeightsError(DinocellError):
    """A checkpoint that cannot be found, read, trusted or fitted to the requested model."""


class ImageError(DinocellError):
    """An image, mask or labelled set that cannot be read completely, or cannot be written."""


class StackError(ImageError):
    """A file of several images where one was expected."""


class ShardError(DinocellError):
    """A shard set that cannot be built, is missing, or is damaged."""


def require(condition: object, problem: str, kind: type[DinocellError] = DinocellError) -> None:
    """Raise an error with this problem unless the condition holds."""
    if not condition:
        raise kind(problem)


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line of at most 200 characters; its class if it has no message."""
    text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
