"""The family of errors: each names the problem, quotes the line where there is one, and ends with the remedy."""

from __future__ import annotations

_WINDOW = 88  # characters of the line that an error quotes


class TnpeftError(ValueError):
    """Base class of every error that tnpeft raises on bad input.

    >>> from tnpeft import network
    >>> try:
    ...     network("A[out")
    ... except TnpeftError as error:
    ...     print(type(error).__name__)
    NetworkError
    """


class NetworkError(TnpeftError):
    """A bad network, size or factorization.

    The message names the problem, quotes the line with a caret under ``position`` (when both are known) and
    ends with the remedy. The three parts stay readable as attributes.

    >>> print(NetworkError("index 'q' has no size", line="A[q] -> q", position=2, remedy="pass q=..."))
    index 'q' has no size
      A[q] -> q
        ^
    pass q=...
    """

    def __init__(self, problem: str, *, line: str = "", position: int | None = None, remedy: str = "") -> None:
        self.problem, self.line, self.position, self.remedy = problem, line, position, remedy
        parts = [problem]
        if line:
            parts += _quote(line, position)
        if remedy:
            parts.append(remedy)
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.line, self.position, self.remedy)


class ConfigError(NetworkError):
    """A bad adapter configuration, or one that does not fit the model.

    A subclass of `NetworkError`: code that catches only that class keeps catching what a configuration can raise.

    >>> print(ConfigError("dropout is 2.0", remedy="choose a number from 0 to 1"))
    dropout is 2.0
    choose a number from 0 to 1
    """


class AdapterFileError(NetworkError):
    """An adapter folder or file that is damaged, incomplete or belongs to another model.

    A subclass of `NetworkError` for the same reason as `ConfigError`.

    >>> print(AdapterFileError("adapter_config.json is not there", remedy="pass an adapter's folder"))
    adapter_config.json is not there
    pass an adapter's folder
    """


class StudyError(TnpeftError):
    """A bad study file, task, record or training setting; the message says where and what to change.

    >>> print(StudyError("unknown key 'step'", where="mine.toml", remedy="did you mean 'steps'?"))
    mine.toml: unknown key 'step'; did you mean 'steps'?
    """

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__("".join((f"{where}: " if where else "", problem, f"; {remedy}" if remedy else "")))


def _rebuild(kind: type[NetworkError], problem: str, line: str, position: int | None, remedy: str) -> NetworkError:
    return kind(problem, line=line, position=position, remedy=remedy)


def _quote(line: str, position: int | None) -> list[str]:
    """The line (or a window of a long one) on one row, and a caret below it."""
    at = 0 if position is None else position
    start = 0 if len(line) <= _WINDOW else max(0, min(at - _WINDOW // 2, len(line) - _WINDOW))
    window = "".join(c if c.isprintable() else " " for c in line[start : start + _WINDOW])
    head = "..." if start else ""
    tail = "..." if start + _WINDOW < len(line) else ""
    rows = [f"  {head}{window}{tail}"]
    if position is not None:
        rows.append(" " * (2 + len(head) + at - start) + "^")
    return rows
