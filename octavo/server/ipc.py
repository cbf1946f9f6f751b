"""What travels between API processes and the engine process, and its codec: MessagePack of fixed types, never pickle.

Owns the messages, the names of the sockets and the most bytes that one message may have; it does not know sockets or
processes. A multipart ZeroMQ message holds any number of messages, one per part.

Invariant: bytes that decode are a legal message (values of SamplingParams are checked as they are where a user makes one);
all others raise ``BadFrame`` and nothing else.
"""

import math
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from octavo.config import EngineConfig
from octavo.engine.stats import Stats
from octavo.errors import RequestError
from octavo.messages import EngineRequest, StepOutput
from octavo.plan import GroupInfo

MAX_FRAME = 32 * 2**20
"""Bytes of one message to the engine: a prompt of some six million tokens."""

PARTS = 64
"""Messages that a client puts into one multipart message: the engine looks at its clock between two of these."""

ALIVE = b""
"""A part without a message: the engine asks ZeroMQ whether a client is still there."""


class BadFrame(ValueError):
    """Bytes that are no message."""


class Add(msgspec.Struct, tag="add"):
    """API -> engine: a new request. Its id must differ from those of all clients' unfinished requests."""

    request: EngineRequest


class Abort(msgspec.Struct, tag="abort"):
    """API -> engine: end a request, or with ``index`` one of its continuations, now."""

    request_id: str
    index: int | None = None


class Stepped(msgspec.Struct, tag="step"):
    """Engine -> API: what a step said about the client's requests."""

    output: StepOutput


class Refused(msgspec.Struct, tag="refused"):
    """Engine -> API: a request that was not accepted; message, param and code as of RequestError."""

    request_id: str
    message: str
    param: str | None = None
    code: str | None = None


class CutOff(msgspec.Struct, tag="cut_off"):
    """Engine -> API: the client did not read, its requests have been aborted, and nothing more comes over this link."""


class Start(msgspec.Struct, kw_only=True):
    """Supervisor -> engine process, once: all that it has to know.

    Attributes:
        config: the engine's options. directory: where the sockets lie.
        epoch: how many engine processes the server has had before. max_waiting: messages that may wait for a client
            before the engine waits. faults: of faults.py, "" outside of tests.
    """

    config: dict[str, Any]
    directory: str
    epoch: int
    max_waiting: int
    faults: str = ""


class Heartbeat(msgspec.Struct, kw_only=True):
    """Engine -> every API process, once a second and with every change of phase.

    Attributes:
        epoch: counts the engine processes of a server from 0. pid: of the engine process.
        phase: "starting", "fetching", "loading", "preparing" or "ready". progress: 0 to 1, which share of the way to ready
            lies behind.
        sent: monotonic seconds (one clock for all processes of a machine). step_seconds: how long the present step has
            been computing, 0 between steps.
        bad_frames: messages that were dropped because they could not be decoded. unknown_aborts: aborts of requests that
            had ended or never were the client's. cut_off: clients that did not read.
        stats: of the engine, None before it is ready. info: of the workers, likewise.
    """

    epoch: int
    pid: int
    phase: str
    progress: float
    sent: float
    step_seconds: float = 0.0
    bad_frames: int = 0
    unknown_aborts: int = 0
    cut_off: int = 0
    stats: Stats | None = None
    info: GroupInfo | None = None


def engine_address(directory: str, epoch: int) -> str:
    """Where the engine process of an epoch takes requests: a new place each time, so that no frame outlives its engine."""
    return f"ipc://{directory}/engine-{epoch}"


def heartbeat_address(directory: str) -> str:
    """Where engine processes, one after the other, publish their heartbeats."""
    return f"ipc://{directory}/heartbeat"


def encode_start(config: EngineConfig, directory: Path, epoch: int, max_waiting: int, faults: str) -> bytes:
    """The start message of an engine process."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return _requests.encode(Start(config=values, directory=str(directory), epoch=epoch, max_waiting=max_waiting, faults=faults))


def decode_start(data: bytes) -> tuple[Start, EngineConfig]:
    """The start message and the options in it."""
    start = msgspec.msgpack.decode(data, type=Start)
    return start, EngineConfig.from_kwargs(**start.config)


def _request_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        raise RequestError("logits_processors are for the offline API only: a function cannot be sent.", "logits_processors")
    raise NotImplementedError(f"cannot send {type(value)}")


def _output_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<i4", copy=False).tobytes()
    raise NotImplementedError(f"cannot send {type(value)}")


def _heartbeat_hook(kind: Any, value: Any) -> Any:
    return Counter(value)


_requests = msgspec.msgpack.Encoder(enc_hook=_request_hook)
_outputs = msgspec.msgpack.Encoder(enc_hook=_output_hook)
_request = msgspec.msgpack.Decoder(Add | Abort)
_output = msgspec.msgpack.Decoder(Stepped | Refused | CutOff)
_ABORT = msgspec.msgpack.encode("type") + msgspec.msgpack.encode("abort")
_heartbeat = msgspec.msgpack.Decoder(Heartbeat, dec_hook=_heartbeat_hook)


def encode_request(message: Add | Abort) -> bytes:
    """Bytes for the engine.

    Raises:
        RequestError: the request has logits processors, or is larger than MAX_FRAME.
    """
    try:
        data = _requests.encode(message)
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:  # an integer of 65 bits, half a surrogate pair
        raise RequestError("the request holds a value that cannot be sent to the engine.") from error
    if len(data) > MAX_FRAME:
        raise RequestError(f"the request must have at most {MAX_FRAME} bytes, got {len(data)}.", "prompt")
    return data


def decode_request(data: bytes) -> Add | Abort:
    """A message to the engine; BadFrame for all other bytes."""
    if len(data) > MAX_FRAME:
        raise BadFrame(f"{len(data)} bytes, at most {MAX_FRAME} are allowed")
    try:
        message: Add | Abort = _request.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFrame(str(error)) from error
    if isinstance(message, Add) and not math.isfinite(message.request.arrival):
        raise BadFrame("the time of arrival is not finite")
    return message


def is_abort(data: bytes) -> bool:
    """Whether a message to the engine is an Abort, by its first bytes: the tag comes first."""
    return data[1 : 1 + len(_ABORT)] == _ABORT


def encode_output(message: Stepped | Refused | CutOff) -> bytes:
    """Bytes for a client."""
    return _outputs.encode(message)


def decode_output(data: bytes) -> Stepped | Refused | CutOff:
    """A message to a client, tokens as int32 array; BadFrame for all other bytes."""
    try:
        message: Stepped | Refused | CutOff = _output.decode(data)
        if isinstance(message, Stepped) and message.output.tokens is not None:
            message.output.tokens = np.frombuffer(message.output.tokens, "<i4")
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadFrame(str(error)) from error
    return message


def encode_heartbeat(message: Heartbeat) -> bytes:
    """Bytes for everybody who listens."""
    return _outputs.encode(message)


def decode_heartbeat(data: bytes) -> Heartbeat:
    """A heartbeat; BadFrame for all other bytes."""
    try:
        return _heartbeat.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadFrame(str(error)) from error
