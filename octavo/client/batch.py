"""OpenAI's batch format: lines of requests in, lines of results out, to be gone on with after any interruption.

Owns what a line means, the output file and when a request is tried again; it does not know who serves. Invariant: every
line of the input has at most one result, results are appended whole or not at all, and nothing that a line holds can
end the run.
"""

import asyncio
import fcntl
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.client.connection import Answer, Client, Unreachable
from octavo.client.wire import ConnectionFailed
from octavo.errors import ConfigError, OctavoError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
INVALID, DUPLICATE, BROKEN = "invalid_line", "duplicate_custom_id", "connection_failed"
BUSY = (429, 503)  # the server asks to come again
PATIENCE = 600.0  # seconds for which a busy server is asked again
TRIES = 3  # of a request whose connection broke


@dataclass(frozen=True, slots=True)
class Job:
    """One line of the input: a request, or why it is none.

    Attributes:
        custom_id: None where the line has none. url, body: of the request. code, problem: "" for a request.
    """

    custom_id: str | None
    url: str = ""
    body: bytes = b""
    code: str = ""
    problem: str = ""


def parse(line: bytes, number: int) -> Job:
    """The request of a line, or a Job that says what is wrong with it; ``number`` counts from 1."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        return Job(None, code=INVALID, problem=f"line {number} is not JSON: {error}")
    if not isinstance(found, dict):
        return Job(None, code=INVALID, problem=f"line {number} must be an object")
    name, method, url, body = (found.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(name, str) or not name:
        return Job(None, code=INVALID, problem=f"line {number}: custom_id must be a string that is not empty, got {name!r:.100}")
    problem = ""
    if method != "POST":
        problem = f"method must be POST, got {method!r:.100}"
    elif url not in URLS:
        problem = f"url must be one of {', '.join(URLS)}, got {url!r:.100}"
    elif not isinstance(body, dict):
        problem = f"body must be an object, got {body!r:.100}"
    elif body.get("stream"):
        problem = "stream must be left out: a batch has no streams"
    if problem:
        return Job(name, code=INVALID, problem=f"line {number}: {problem}")
    return Job(name, str(url), msgspec.json.encode(body))


def jobs(path: str, output: "Output") -> Iterator[Job]:
    """The lines of a file that have no result yet; a ``custom_id`` that came before makes a line a wrong one."""
    seen: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        job = parse(line, number)
        if job.custom_id is not None and job.custom_id in seen:
            job = Job(job.custom_id, code=DUPLICATE, problem=f"line {number}: custom_id {job.custom_id!r:.100} came before")
        elif job.custom_id is not None:
            seen.add(job.custom_id)
        if not output.holds(job):
            yield job


def count(path: str) -> int:
    """Lines that are not blank; ConfigError when the file cannot be read."""
    return sum(1 for line in _lines(path) if line.strip())


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"input_file {path!r} cannot be read: {error}.", "input_file") from None


class Output:
    """The file of results: what it holds already, and appending to it.

    A last line that was cut off is removed. The file is locked while it is open.

    Attributes:
        held: results that it held when it was opened. failed: results in it that are no success.

    Raises:
        ConfigError: it cannot be written, another process writes it, or it holds something else than results.
    """

    def __init__(self, path: str) -> None:
        self.path, self.held, self.failed = path, 0, 0
        self._names: set[str] = set()
        self._problems: set[str] = set()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigError(f"output_file {path!r} cannot be written: {error}.", "output_file") from None
        try:
            self._lock()
            self._size = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def holds(self, job: Job) -> bool:
        """True when the job has a result in the file."""
        if job.code == DUPLICATE or job.custom_id is None:
            return job.problem in self._problems
        return job.custom_id in self._names

    def write(self, job: Job, response: dict[str, Any] | None, error: dict[str, str] | None) -> None:
        """Append one result; OSError when the disk is full, and then nothing of it stays."""
        entry = {"id": f"batch_req-{uuid.uuid4().hex}", "custom_id": job.custom_id, "response": response, "error": error}
        self._note(entry)
        self._append(msgspec.json.encode(entry) + b"\n")

    def close(self) -> None:
        """Make sure that all is on the disk, and let go of the file."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def _append(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._file, data):]
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size = os.fstat(self._file).st_size

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output_file {self.path!r} is being written by another process.", "output_file") from None
        except OSError:
            pass  # a file system without locks, or a pipe: the user has to see to it

    def _read(self) -> int:
        """Note the results that are there; returns the size of the file, mended."""
        size = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                whole = line.endswith(b"\n")
                entry = _entry(line)
                if entry is None and not whole:
                    os.ftruncate(self._file, size)
                    return size
                if entry is None:
                    raise ConfigError(f"output_file {self.path!r} line {number} is no result of a batch.", "output_file")
                self._note(entry)
                self.held += 1
                size += len(line)
                if not whole:
                    size += os.write(self._file, b"\n")
        return size

    def _note(self, entry: dict[str, Any]) -> None:
        name, response, error = entry.get("custom_id"), entry.get("response"), entry.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(error, dict) and (name is None or code == DUPLICATE):
            self._problems.add(str(error.get("message")))
        elif isinstance(name, str):
            self._names.add(name)
        self.failed += error is not None or not isinstance(response, dict) or response.get("status_code") != 200


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) and {"custom_id", "response", "error"} <= set(found) else None


async def run(client: Client, todo: Iterator[Job], output: Output, max_concurrency: int,
              done: Callable[[], None] = lambda: None, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Answer all jobs and write their results in the order in which they end.

    Args:
        max_concurrency: requests under way, 1 or more. done: is called after every result.

    Raises:
        OctavoError: the server is gone; what has been written stays. OSError: the output cannot be written.
    """
    async def worker() -> None:
        for job in todo:
            if job.problem:
                output.write(job, None, {"code": job.code, "message": job.problem})
            else:
                output.write(job, *await _result(client, job, sleep))
            done()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _result(client: Client, job: Job, sleep: Callable[[float], Awaitable[None]]
                  ) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """response and error of a job; a server that is busy, or that hung up, is asked again."""
    waited, broken = 0.0, 0
    while True:
        try:
            answer = await client.request("POST", job.url, job.body)
        except ConnectionFailed as error:
            broken += 1
            if broken == TRIES and isinstance(error, Unreachable):
                raise OctavoError(f"{error}. Run the command again to go on where it stopped.") from None
            if broken == TRIES:
                return None, {"code": BROKEN, "message": str(error)}
            await sleep(2.0**(broken - 1))
            continue
        wait = _wait(answer)
        if wait is None or waited + wait > PATIENCE:
            return _response(answer)
        waited += wait
        await sleep(wait)


def _wait(answer: Answer) -> float | None:
    """Seconds after which a busy server wants to be asked again; None when it has answered."""
    if answer.status not in BUSY:
        return None
    return min(max(answer.retry_after or 1.0, 0.1), 60.0)


def _response(answer: Answer) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    try:
        body = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, RecursionError):
        return None, {"code": "invalid_answer",
                      "message": f"the server answered {answer.status} with a body that is no JSON: {answer.body[:200]!r}"}
    return {"status_code": answer.status, "request_id": answer.headers.get("x-request-id", ""), "body": body}, None
