"""The exception tree: whose fault a failure is decides its type, and nothing else does.

Owns the names only; it does not know HTTP bodies or log lines. Invariant: every error that a user can cause is one of
these, carries the name of the offending field (``param``) and says the value; everything else is a bug and stays loud.
"""


class OctavoError(Exception):
    """Root of every error that Octavo raises on purpose."""


class ConfigError(OctavoError, ValueError):
    """The operator's mistake at start: an option, a model folder or a machine that does not fit. Exit code 1.

    Args:
        message: one sentence that names the option and the value.
        param: name of the option, where there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelError(ConfigError):
    """A checkpoint that cannot be used: unknown architecture, missing or left-over tensor, truncated file, wrong hash."""


class RequestError(OctavoError, ValueError):
    """The client's mistake in one request (HTTP 400).

    Args:
        message: one sentence that names the field and the value.
        param: name of the field.
        code: machine-readable reason, such as ``context_length_exceeded``; None where OpenAI has none.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(OctavoError):
    """The engine is full for now (HTTP 503 with ``Retry-After``).

    Args:
        message: what is full.
        retry_after: seconds after which a retry is likely to succeed.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDown(CapacityError):
    """There is no engine that could take a request: it starts, or starts again (HTTP 503 with ``Retry-After``)."""


class EngineDead(OctavoError):
    """The engine has ended (a lost device context, or three failed steps in a row) and answers nothing any more."""


class DeviceLost(EngineDead):
    """The device's context is lost: nothing but a new process can use the device again."""
