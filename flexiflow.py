#!/usr/bin/env python3
"""FlexiFlow: durable async components with JSON state machines, in one file.

Copy this file into your project. It needs CPython 3.9 or later, or PyPy, and nothing else.

    import asyncio
    from flexiflow import FlexiFlowEngine

    DOOR = {
        "name": "door",
        "initial_state": "Closed",
        "states": {"Closed": {}, "Open": {}},
        "rules": [
            {"from": "Closed", "on": "open", "guard": {"key": "brass"}, "to": "Open"},
            {"from": "Open", "on": "close", "to": "Closed"},
        ],
    }

    async def main():
        async with FlexiFlowEngine(store="doors.db") as engine:
            door = engine.create_component(DOOR)
            receipt = await engine.handle_message("door", "open", key="brass")
            print(receipt.outcome, door.state)          # moved Open

    asyncio.run(main())

Started again, the program finds the door as it was left: `doors.db` holds every state,
every message and every answer. From a shell: `python -m flexiflow --help`.

Sections, each using only what stands above it
    0 Header    1 Errors    2 Ground    3 Retry    4 Events    5 Guards and values
    6 States, registry, packs    7 Rules    8 Config    9 Snapshots    10 Store
    11 Component and engine    12 Views    13 HTTP    14 Inspector page    15 Command line

A message travels one way: command line, HTTP or Python call -> engine (one turn at a time for a
component) -> `decide` (pure: definition, state, data, message, time -> plan) -> actions ->
one transaction -> receipt -> events on the bus.

Before you edit: nothing awaits between the decision to commit and the commit; every change
of the store goes through `SQLiteStore.write`; a new check of a config belongs into section
8's walk, which loading and `explain` both read.

Version 2.0.0. Licence: MIT (SPDX-License-Identifier: MIT). Home: the project "flexiflow".
"""
from __future__ import annotations

import sys

__version__ = "2.0.0"

if __name__ == "__main__":
    # Started with -m or as a script: hand over to the one importable copy, so that the `State`
    # that a user's module imports is the `State` that runs.
    if sys.argv[1:] in (["--version"], ["-V"]):
        print("flexiflow", __version__)
        sys.exit(0)
    try:
        import gc

        gc.disable()  # nearly all that comes with the modules stays until the end
        import importlib.util
        import os

        _spec: Any = globals().get("__spec__")
        if getattr(_spec, "loader", None) is None:  # a script, or a profiler's idea of one
            _name = os.path.splitext(os.path.basename(__file__))[0]
            _spec = importlib.util.spec_from_file_location(_name, __file__)
            sys.modules[_name] = importlib.util.module_from_spec(_spec)
            _spec.loader.exec_module(sys.modules[_name])
        _main = importlib.import_module(_spec.name).main
        getattr(gc, "freeze", int)()  # not in PyPy; with the above an eighth of `status`
        gc.enable()
        sys.exit(_main())
    except KeyboardInterrupt:  # while modules are imported; later `main` sees to it
        print("interrupted", file=sys.stderr)
        sys.exit(130)

import contextlib
import copy
import copyreg
import dataclasses
import functools
import importlib
import itertools
import json
import math
import operator
import os
import re
import time
import types
import weakref
import zlib
from collections import deque, namedtuple
from contextvars import ContextVar
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import asyncio
    import base64
    import bisect
    import collections
    import datetime
    import difflib
    import hashlib
    import hmac
    import http
    import inspect
    import logging
    import random
    import shlex
    import signal
    import sqlite3
    import threading
    import traceback
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, TypeVar, Union
    from urllib import parse as urllib_parse

    Function = TypeVar("Function", bound=Callable[..., Any])
    Json = dict[str, Any]  # an object
    Path = Union[str, os.PathLike[str]]
    Scope = dict[str, Any]  # what a guard or value may look at: see `decide`
    Row = tuple[str, Any]  # an SQL statement and its parameters, a tuple or a dict
    _Later: Any
else:

    class _Later:
        """A module, or our logger, made at its first use: `status` starts in half the time."""

        def __init__(self, name, make=importlib.import_module):
            vars(self).update(_name=name, _make=make)

        def __getattr__(self, attribute):
            made = globals()[self._name] = self._make(self._name)
            return getattr(made, attribute)

        def __setattr__(self, attribute, value):
            setattr(self._make(self._name), attribute, value)

    for _name in ("argparse asyncio base64 bisect collections datetime difflib hashlib hmac http "
            "inspect logging random shlex signal sqlite3 threading traceback").split():
        globals()[_name] = _Later(_name)
    urllib_parse = _Later("urllib_parse", lambda name: importlib.import_module("urllib.parse"))

__all__ = [
    # engine
    "FlexiFlowEngine", "AsyncComponent", "Receipt", "SQLiteStore",
    # states
    "State", "StateMachine", "StateRegistry", "DEFAULT_REGISTRY",
    "InitialState", "AwaitingConfirmation", "ProcessingRequest", "ErrorHandling",
    "StatePack", "StateSpec", "TransitionSpec", "MappingPack", "load_packs",
    "collect_provided_keys",
    # config
    "ConfigLoader", "ComponentConfig", "explain", "ConfigExplanation", "Diagnostic", "PackInfo",
    "StateResolution", "schema", "visualize", "load_symbol",
    # errors
    "FlexiFlowError", "ConfigError", "StateError", "PersistenceError", "ImportError_",
    "ArgumentError", "ErrorContext",
    # HTTP, reloading
    "create_app", "watch_path", "run_hot_reload",
    # events, retry, logging
    "AsyncEventManager", "Subscription", "SubscriptionHandle", "retry_async", "RetryConfig",
    "get_logger", "set_correlation_id", "get_correlation_id", "CorrelationIdFilter",
    # snapshots
    "ComponentSnapshot", "save_component", "load_snapshot", "restore_component",
    "save_snapshot_sqlite", "load_latest_snapshot_sqlite", "list_snapshots_sqlite",
    "prune_snapshots_sqlite",
    # command line
    "main",
]


# --------------------------------------------------------------------------------------------
# 1. Errors
# --------------------------------------------------------------------------------------------
# Everything that FlexiFlow refuses is a FlexiFlowError that says what happened, why, how to
# mend it, and with which values. Whatever the values hold, it prints no control characters.

_UNSAFE = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def printable(text: object) -> str:
    """Escape what could forge a line or turn the text around: controls, bidi marks, surrogates."""
    shown = str(text)
    return shown if shown.isprintable() else re.sub(
        _UNSAFE, lambda found: found[0].encode("unicode_escape").decode(), shown)


@dataclass
class ErrorContext:
    """The values that an error speaks of."""

    items: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, value: Any) -> ErrorContext:
        """Add a value and return the context, so that calls chain."""
        self.items[key] = value
        return self

    def format(self) -> str:
        """Return one indented `key=value` line for each value; long ones are cut."""
        pairs = ((key, repr(value)) for key, value in self.items.items())
        return "\n".join(printable(f"  {key}={text if len(text) <= 500 else text[:497] + '...'}")
            for key, text in pairs)


class FlexiFlowError(Exception):
    """What every error of FlexiFlow is: `what`, `why`, `fix` and a `context` of values."""

    def __init__(self, what: str, *, why: str | None = None, fix: str | None = None,
            context: ErrorContext | None = None, **values: Any) -> None:
        self.what, self.why, self.fix = what, why, fix
        self.context = ErrorContext({**(context.items if context else {}), **values})
        super().__init__(what)

    def __str__(self) -> str:
        """Return What, Why, Fix and Context, one below the other; what is not known is left out."""
        lines = [printable(self.what)]
        lines += [f"{label}: " + "\n     ".join(map(printable, text.splitlines()))
            for label, text in (("Why", self.why), ("Fix", self.fix)) if text]
        if self.context.items:
            lines.append("Context:\n" + self.context.format())
        return "\n".join(lines)

    def __reduce__(self) -> Any:
        # No constructor is called: a subclass may ask for more. An OSError would forget its args.
        state = {**vars(self), "args": (self.what,)}
        return copyreg.__newobj__, (type(self), self.what), state  # type: ignore[attr-defined]


class ConfigError(FlexiFlowError):
    """A config that cannot be read, or that says something impossible."""


class StateError(FlexiFlowError):
    """A state or message that is not known, or a turn that went wrong."""


class PersistenceError(FlexiFlowError):
    """A snapshot or store that cannot be read or written."""


class ImportError_(FlexiFlowError):
    """A dotted path whose module or symbol could not be imported; the cause is chained."""


class ArgumentError(FlexiFlowError, ValueError):
    """A call with an argument that makes no sense; also a ValueError."""


class MissingSnapshot(PersistenceError, FileNotFoundError):
    """A snapshot file that is not there; also a FileNotFoundError."""


def check_count(name: str, value: Any) -> None:
    """Raise ArgumentError unless a value is a whole number from 1, as SQLite has them."""
    if value.__class__ is not int or not 0 < value < 1 << 63:
        raise ArgumentError(f"{name} is a whole number from 1: {value!r}")


def said(error: BaseException) -> str:
    """Return an error's text, also where its own code cannot make it."""
    with contextlib.suppress(Exception):
        return str(error)
    return "its text cannot be made"


def place_of(error: BaseException) -> str:
    """Return which line of the code that we called has failed, like " (acts.py:7)"; or nothing."""
    theirs = [*itertools.takewhile(lambda frame: frame.filename != __file__,
        reversed(traceback.extract_tb(error.__traceback__)))][-1:]
    return "" if isinstance(error, FlexiFlowError) else "".join(
        f" ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in theirs)


# What others call it, and what it is called here.
_SYNONYMS = {"when": "guard", "if": "guard", "cond": "guard", "condition": "guard",
    "source": "from", "target": "to", "event": "on", "trigger": "on", "actions": "action",
    "do": "action", "set": "assign", "initial": "initial_state", "transitions": "rules",
    "=>": ">=", "=<": "<=", "=": "==", "===": "==", "<>": "!=", "and": "all", "or": "any"}


def choose(word: object, choices: Iterable[str]) -> str:
    """Return a `fix` text: the close match among `choices`, or all of them when they are few."""
    names = sorted(set(map(str, choices)))
    known = {one.casefold(): one for one in names}
    wanted = str(word).casefold()
    wanted = _SYNONYMS.get(wanted, wanted)
    close = [wanted] if wanted in known else difflib.get_close_matches(wanted, known, 1)
    if close:
        return f"did you mean {known[close[0]]!r}?"
    shown = ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" * (len(names) > 12))
    return f"use one of {shown}" if names else "none is known here"


# --------------------------------------------------------------------------------------------
# 2. Ground: strict JSON, ids, logging
# --------------------------------------------------------------------------------------------
# One reader and one writer of JSON stand behind configs, messages, snapshots and the store, so
# that what was written can be read. Every log record is one line and carries a correlation id.

MAX_JSON = 1_000_000  # bytes of one document
MAX_DEPTH = 100  # brackets within brackets
_BRACKETS = r'(?s)"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]'  # compiled when needed: starting is quick


def _whole(digits: str) -> int:
    # Some builds of Python have no limit of their own, and reading digits takes quadratic time.
    if len(digits) > 4300 and len(digits.lstrip("-")) > 4300:
        raise ValueError(f"a number of {len(digits)} digits; 4300 are allowed")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large" if digits[-1].isdigit()
            else f"{digits} is not JSON")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = next(name for name, _ in pairs if found.pop(name, pairs) is pairs)
    raise ValueError(f"the key {twice!r} stands twice in one object")


_decode = json.JSONDecoder(parse_constant=_finite, parse_int=_whole, parse_float=_finite,
    object_pairs_hook=_distinct).decode
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"),
    sort_keys=True, check_circular=False).encode  # for what `_exact` has seen, or was read


def _depth(text: str) -> int:
    """Return how deep brackets stand within brackets; nothing is parsed for it."""
    steps = ((mark in "[{") - (mark in "]}") for mark in re.findall(_BRACKETS, text))
    return max(itertools.accumulate(steps))


def read_json(source: str | bytes, name: str, error: type[FlexiFlowError],
        fix: str | None = None) -> Any:
    """Return the value of the JSON document called `name`; raise `error` if it is not strict.

    Refused: duplicate keys, NaN and Infinity, numbers that do not fit, lone surrogates, bytes
    that are not UTF-8, more than MAX_DEPTH levels or MAX_JSON bytes.
    """
    try:
        octets = source.encode("utf-8") if isinstance(source, str) else source
        if len(octets) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes")
        text = octets.decode("utf-8-sig")  # some editors begin with a byte order mark
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} brackets within brackets")
        value = _decode(text)
        if "\\u" in text:
            _encode(value).encode("utf-8")  # raises for a lone surrogate
        return value
    except (ValueError, RecursionError, MemoryError) as problem:
        raise error(f"Not valid JSON: {name}", why=str(problem), fix=fix) from problem


_ATOMS = frozenset({str, bool, type(None)})  # each value of these reads back as it is
_NUMBERS = frozenset({int, float})  # of these, what is below _HUGE: NaN and Infinity are not
_HUGE = 10**4300


def _exact(parts: Any, path: str, room: list[int], depth: int = 0) -> bool:
    """Tell whether all types are JSON's own, so that reading is bound to give the same values.

    Raises ValueError for what is no JSON, and where; also for too deep, and for too much: one
    list may stand in many places.
    """
    room[0] -= len(parts)
    if depth > MAX_DEPTH or room[0] < 0:
        raise ValueError(
            f"{path[:60]}: more than {MAX_DEPTH} brackets within brackets, or too much")
    keyed, exact = isinstance(parts, dict), parts.__class__ is dict or parts.__class__ is list
    for key, part in parts.items() if keyed else enumerate(parts):
        if keyed and key.__class__ is not str:
            exact = False
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} at {path} is not a string")
        kind = part.__class__
        if kind in _ATOMS or (kind in _NUMBERS and abs(part) < _HUGE):
            continue
        where = f"{path}[{key}]" if not keyed else f"{path}.{key}" if path else str(key)
        if isinstance(part, (dict, list)):
            exact = _exact(part, where, room, depth + 1) and exact
        elif isinstance(part, str) or (isinstance(part, (int, float)) and abs(part) < _HUGE):
            exact = False  # a subclass
        else:
            flaw = "too long a number" if kind is int else f"a {kind.__name__}"
            raise ValueError(f"{where} is {part if isinstance(part, float) else flaw}")
    return exact


def write_json(value: Any, name: str = "value", limit: int = MAX_JSON) -> str:
    """Return `value` as compact JSON with sorted keys; raise ValueError if reading would differ.

    A tuple, a key that is not a string, NaN, a date: refused by name instead of changed.
    """
    exact = _exact({name: value}, "", [limit + 1])
    try:
        text = _encode(value)
        size = len(text.encode("utf-8"))
        exact = exact or _decode(text) == value
    except (TypeError, ValueError, MemoryError) as error:  # a lone surrogate, say
        raise ValueError(f"{name}: {error}") from error
    if size > limit:
        raise ValueError(f"{name} takes {size} bytes; {limit} are allowed")
    if not exact:
        raise ValueError(f"{name} reads back as another value")
    return text


def _written(value: Any, name: str, limit: int = MAX_JSON) -> str:
    """Return JSON for the store; raise PersistenceError for what would not come back the same."""
    try:
        return write_json(value, name, limit)
    except ValueError as error:
        raise PersistenceError(f"Cannot save {name}", why=str(error),
            fix="keep it to JSON: text, numbers, lists, dicts with text as keys") from error


def checksum(*parts: Any, start: int = 0) -> int:
    """Return the CRC-32 of the parts' texts; `start` chains it to another one."""
    return zlib.crc32("\0".join(map(str, parts)).encode("utf-8"), start)


def read_file(path: str | os.PathLike[str], kind: str, error: type[FlexiFlowError],
        missing: type[FlexiFlowError]) -> bytes:
    """Return a file, cut one byte after MAX_JSON; raise `missing` or `error` if it cannot be."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return file.read(MAX_JSON + 1)
    except FileNotFoundError as problem:
        raise missing(f"No {kind} file: {name!r}", fix="check the path") from problem
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"Cannot read {kind}: {name!r}", why=str(problem)) from problem


def fresh(value: Any) -> Any:
    """Return a copy of a JSON value that shares no list or dict with it."""
    if value.__class__ is dict:
        return {key: fresh(inner) for key, inner in value.items()}
    if value.__class__ is list:
        return [fresh(inner) for inner in value]
    return value


_numbers = itertools.count(1)


def new_id() -> str:
    """Return an id that no other call, process or machine returns."""
    return f"{os.urandom(6).hex()}-{next(_numbers):x}"  # a fork goes on with the same numbers


class Context:
    """What surrounds the running code: a correlation id, or a turn (section 11)."""

    __slots__ = ("parent", "correlation_id")
    machine: Any = None  # of a turn, the state machine that it works on
    live = False  # whether it is a turn that is not over

    def __init__(self, parent: Context | None, correlation_id: str | None = None) -> None:
        self.parent = parent
        self.correlation_id = correlation_id  # that log records, sends and timers made here carry


_context: ContextVar[Context | None] = ContextVar("flexiflow", default=None)


def live_turn(machine: Any = None) -> Turn | None:
    """Return the innermost live turn that the running code is in, of any or of one machine."""
    context: Any = _context.get()
    while context is not None and not (context.live and machine in (None, context.machine)):
        context = context.parent
    return context  # type: ignore[no-any-return]


def set_correlation_id(value: str | None = None) -> str:
    """Use `value`, or a new id, for this task's records and messages from here on; return it."""
    chosen = value or new_id()
    _context.set(Context(_context.get(), chosen))
    return chosen


def get_correlation_id() -> str | None:
    """Return the correlation id of the current task, if it has one."""
    context = _context.get()
    return None if context is None else context.correlation_id


_SECRET = "(?i)token|password|passwd|secret|api_?key|authorization"


def masked(value: Any) -> Any:
    """Return a value with what stands under keys like token, password or secret hidden."""
    if isinstance(value, dict):
        return {key: "***" if re.search(_SECRET, str(key)) else masked(inner)
            for key, inner in value.items()}
    return type(value)(map(masked, value)) if type(value) in (list, tuple) else value


class CorrelationIdFilter:
    """Put `correlation_id` on every record, and fold message and traceback into one safe line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass; one that already has a correlation id keeps it."""
        vars(record).setdefault("correlation_id", get_correlation_id() or "-")
        lines = traceback.format_exception(*record.exc_info) if record.exc_info else []
        with contextlib.suppress(Exception):  # arguments that do not fit: the handler will say so
            record.args = masked(record.args)
            text = " | ".join([record.getMessage(), *map(str.strip, lines)])
            record.msg, record.args = printable(text), None
            record.exc_info = record.exc_text = None
        return True


class JsonFormatter:
    """Format a record as one line of JSON: time, level, logger, correlation_id, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        return json.dumps({"time": at, "level": record.levelname, "logger": record.name,
            "message": record.getMessage(),
            "correlation_id": getattr(record, "correlation_id", "-")})


LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s correlation_id=%(correlation_id)s %(message)s"
_one_line = CorrelationIdFilter()


def _our_logger(name: str = "flexiflow") -> logging.Logger:
    log = logging.getLogger(name)
    log.addFilter(_one_line)  # once, however often it is called
    return log


# An application that has imported logging may use this logger itself, and before we do.
logger = _our_logger() if "logging" in sys.modules else _Later("logger", lambda _: _our_logger())


def get_logger(name: str = "flexiflow", level: int | None = None, *,
        style: str = "text") -> logging.Logger:
    """Return a logger that prints to stderr, unless the application has set up logging itself.

    `style` is "text" or "json" (a JSON object a line). Called twice it adds nothing; a level
    is only set when given, or when the logger has none.
    """
    formats: Any = {"text": logging.Formatter(LOG_FORMAT), "json": JsonFormatter()}
    if style not in formats:
        raise ArgumentError(f"Unknown log style: {style!r}", fix=choose(style, formats))
    log = _our_logger(name)
    if level is not None or log.level == logging.NOTSET:
        log.setLevel(logging.INFO if level is None else level)
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(formats[style])
        log.addHandler(handler)
        log.propagate = False  # an application that sets up logging later prints nothing twice
    return log


# --------------------------------------------------------------------------------------------
# 3. Retry
# --------------------------------------------------------------------------------------------
# One rule of pauses serves sync and async functions, and the queue of section 11. Only Exceptions
# are tried again, never a cancellation; the last one is raised as it was.


@dataclass(frozen=True)
class RetryConfig:
    """How often and how patiently to try again; times are seconds."""

    max_attempts: int = 3  # calls in all, the first included
    base_delay: float = 0.1  # before the second call
    max_delay: float = 2.0  # no delay is longer, jitter aside
    backoff: float = 2.0  # each delay against the one before
    jitter: float = 0.0  # a delay grows by up to this fraction of it, at random
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    timeout: float | None = None  # no call is begun later than this after the first

    def __post_init__(self) -> None:
        for name, value in {**vars(self), "retry_on": 0, "timeout": self.timeout or 0}.items():
            least = 1 if name in ("max_attempts", "backoff") else 0
            most = 1 if name == "jitter" else sys.float_info.max
            words = "from 0 to 1" if name == "jitter" else f"of at least {least}"
            if type(value) not in (int, float) or not least <= value <= most:
                raise ArgumentError(f"{name} is not a number {words}: {value!r}")
        if type(self.max_attempts) is not int:
            raise ArgumentError(f"max_attempts is not a whole number: {self.max_attempts!r}")

    def delay(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after `failures` failed calls; `chance` is from 0 to 1."""
        # The jitter comes after the cap: many clients at the cap must not knock together.
        pause = self.max_delay
        with contextlib.suppress(OverflowError):
            pause = min(self.base_delay * float(self.backoff) ** (failures - 1), pause)
        return pause * (1 + self.jitter * chance)


def _patience(config: RetryConfig, error: BaseException, failures: int, start: float) -> float:
    """Return the seconds to sleep before the next call; raise `error` where none is to be made."""
    pause = config.delay(failures, random.random())
    late = config.timeout is not None and time.monotonic() - start + pause > config.timeout
    if late or failures >= config.max_attempts or isinstance(error, asyncio.CancelledError):
        raise error
    logger.debug("Trying again in %.3f s after %r", pause, error)
    return pause


def is_async(function: Any) -> bool:
    """Tell whether calling `function` gives a coroutine: partials and callable objects too."""
    call = getattr(function, "func", function)  # functools.partial
    return inspect.iscoroutinefunction(call) or (
        callable(call) and inspect.iscoroutinefunction(type(call).__call__))


def retry_async(config: RetryConfig | None = None) -> Callable[[Function], Function]:
    """Decorate a function, async or plain, so that a failed call is made again.

    The exception of the last call is raised as it is. CancelledError is never tried again.
    """
    settings = RetryConfig() if config is None else config
    if not isinstance(settings, RetryConfig):
        raise ArgumentError(f"Not a RetryConfig: {config!r}", fix="@retry_async(RetryConfig())")

    def decorate(function: Any) -> Any:
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            for failures in itertools.count(1):
                try:
                    return await function(*args, **kwargs)
                except settings.retry_on as error:
                    await asyncio.sleep(_patience(settings, error, failures, start))

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            for failures in itertools.count(1):
                try:
                    return function(*args, **kwargs)
                except settings.retry_on as error:
                    time.sleep(_patience(settings, error, failures, start))

        return functools.wraps(function)(call_async if is_async(function) else call)

    return decorate


# --------------------------------------------------------------------------------------------
# 4. Events: the bus
# --------------------------------------------------------------------------------------------
# `publish` awaits every handler: by priority 1 to 5, then in the order of subscription. What a
# handler or filter does wrong is its own failure: logged, and published once. Each of several
# handlers gets a copy of its own of a dict. Subscriptions keep their handlers alive.

MAX_NESTING = 32  # publishes within publishes
HANDLER_FAILED = "event.handler.failed"
_NESTED: frozenset[type] = frozenset((dict, list))

if sys.version_info >= (3, 11):
    HandlerErrors = ExceptionGroup  # noqa: F821
else:

    class HandlerErrors(Exception):
        """Several handlers failed in one concurrent publish: a stand-in for ExceptionGroup."""

        message = property(lambda self: self.args[0])
        exceptions = property(lambda self: tuple(self.args[1]))


def _copier(data: Any) -> Callable[[Any], Any] | None:
    """Return what copies a payload for each handler, if one could change what the next sees.

    Nothing that is cheaper is as good: a read-only view is no dict, which json.dumps wants, and
    one that is shared until it changes still changes for whoever kept it.
    """
    if data.__class__ is dict and _NESTED.isdisjoint(map(type, data.values())):
        return dict.copy
    return fresh if data.__class__ in _NESTED else None


_LEAVING = (KeyboardInterrupt, GeneratorExit)  # the end of the program, whosever code it meets


def _is_own_failure(error: BaseException) -> bool:
    """Tell a failure of code that is called here from the cancellation of the task that calls."""
    if isinstance(error, asyncio.CancelledError):  # before Python 3.11 always the caller's
        return not getattr(asyncio.current_task(), "cancelling", lambda: True)()
    return not isinstance(error, _LEAVING)


class Subscription:
    """One handler of one event, and the handle that `unsubscribe` takes."""

    __slots__ = ("event_name", "component_name", "handler", "priority", "filter_fn", "once",
        "number", "active", "direct")

    def __init__(self, event_name: str, component_name: str, handler: Function, priority: int,
            filter_fn: Function | None, once: bool, number: int) -> None:
        self.event_name, self.component_name, self.handler = event_name, component_name, handler
        self.priority, self.filter_fn, self.once = priority, filter_fn, once
        self.number = number  # counts subscriptions of a bus
        self.active = True  # until unsubscribed
        # The handler again, while it is an `async def` that may be awaited without a look at it.
        code = None if once or filter_fn is not None else getattr(handler, "__code__", None)
        self.direct = handler if code and code.co_flags & inspect.CO_COROUTINE else None

    subscription_id = property(lambda self: str(self.number), doc="What 1.0.1 called the number.")


SubscriptionHandle = Subscription


class AsyncEventManager:
    """Publish events to subscribed functions, within one process and one event loop."""

    def __init__(self, logger: Any = None) -> None:
        self._events: dict[str, dict[Subscription, None]] = {}
        # By component: most have one subscription, and a dict for each would double their cost.
        self._owners: dict[str, Any] = {}
        self._ready: dict[str, tuple[Subscription, ...]] = {}  # in order of delivery, until changed
        self._numbers, self._in_flight = itertools.count(1), 0
        self._logger = logger or logging.getLogger("flexiflow")

    async def subscribe(self, event_name: str, component_name: str, handler: Callable[[Any], Any],
            priority: int = 3, filter_fn: Callable[[str, Any], Any] | None = None, *,
            once: bool = False) -> Subscription:
        """Call `handler(data)` for each event of this name; `"*"` hears everything.

        `handler` may be async or plain. Priority 1 is called first, 5 last. `filter_fn(event,
        data)` decides whether it is called. `once` ends the subscription with its first call.
        """
        if priority.__class__ is not int or not 1 <= priority <= 5:
            raise ArgumentError(f"Priority must be an integer from 1 to 5: {priority!r}")
        if not callable(handler):
            raise ArgumentError(f"Not a function: {handler!r}", why="a handler is called with data")
        if not (filter_fn is None or callable(filter_fn)):
            raise ArgumentError(f"Not a function: {filter_fn!r}", why="a filter is called")
        if filter_fn is not None and is_async(filter_fn):
            raise ArgumentError(f"Async filter: {filter_fn!r}",
                why="a coroutine is always true, so every event would pass",
                fix="write `def` instead of `async def`")
        sub = Subscription(event_name, component_name, handler, priority, filter_fn, once,
            next(self._numbers))
        self._events.setdefault(event_name, {})[sub] = None
        owned = self._owners.setdefault(component_name, sub)
        if owned is not sub:
            self._owners[component_name] = owned if type(owned) is dict else {owned: None}
            self._owners[component_name][sub] = None
        self._changed(event_name)
        return sub

    def unsubscribe(self, handle: Subscription) -> bool:
        """End a subscription, also for a publish that has not called it; False if it had ended."""
        event_name, owner = handle.event_name, handle.component_name
        subs = self._events.get(event_name, {})
        if handle not in subs:
            return False
        handle.active, handle.direct = False, None
        del subs[handle]
        if not subs:
            del self._events[event_name]
        owned = self._owners[owner]
        if owned is handle or len(owned) == 1:
            del self._owners[owner]
        else:
            del owned[handle]
        self._changed(event_name)
        return True

    def unsubscribe_all(self, component_name: str) -> int:
        """End every subscription of a component; return how many there were."""
        owned = self._owners.get(component_name, {})
        return sum(map(self.unsubscribe, list(owned) if owned.__class__ is dict else [owned]))

    async def publish(self, event_name: str, data: Any = None, *, delivery: str = "sequential",
            on_error: str = "continue") -> None:
        """Call the handlers of an event and return when all are done.

        `delivery` is "sequential" or "concurrent". With `on_error="continue"` a failure is
        logged and published as `event.handler.failed`; with "raise" the first one is raised
        (sequential), or all of them when every handler is done (concurrent; several come as an
        ExceptionGroup). Publishing within publishing goes MAX_NESTING deep, then StateError.
        """
        if delivery != "sequential" and delivery != "concurrent":
            raise ArgumentError(f"Unknown delivery: {delivery!r}", fix="sequential or concurrent")
        if on_error != "continue" and on_error != "raise":
            raise ArgumentError(f"Unknown error policy: {on_error!r}", fix="continue or raise")
        ready = self._ready.get(event_name) or self._order(event_name)
        if not ready:
            return
        self._in_flight += 1
        try:
            if self._in_flight > MAX_NESTING:
                self._chain()
            copy = _copier(data) if len(ready) > 1 else None
            if delivery == "concurrent":
                return await self._publish_together(ready, event_name, data, copy, on_error)
            for sub in ready:
                own, direct = data if copy is None else copy(data), sub.direct
                try:
                    await (self._call(sub, event_name, own) if direct is None else direct(own))
                except BaseException as error:
                    if isinstance(error, SystemExit) or not _is_own_failure(error):
                        raise
                    await self._failed(sub, event_name, data, error)
                    if on_error == "raise":
                        raise
        finally:
            self._in_flight -= 1

    def listens(self, event_name: str) -> bool:
        """Tell whether anybody would hear the event: where not, its payload need not be made."""
        return event_name in self._events or "*" in self._events

    async def _publish_together(self, ready: Sequence[Subscription], event: str, data: Any,
            copy: Callable[[Any], Any] | None, on_error: str) -> None:
        chain = self._chain() if self._in_flight > 1 else [event]
        # Cancelled here, gather cancels the handlers and waits for them.
        results = await asyncio.gather(*[self._call(sub, event, data if copy is None else
            copy(data), chain) for sub in ready], return_exceptions=True)
        failures = [(sub, error) for sub, error in zip(ready, results) if error is not None]
        for sub, error in failures:
            await self._failed(sub, event, data, error)
        if failures and on_error == "raise":
            if len(failures) == 1:
                raise failures[0][1]
            raise HandlerErrors(f"{len(failures)} handlers of {event!r} failed",
                [error if isinstance(error, Exception) else StateError(
                f"Handler ended by {error!r}") for _, error in failures])

    async def _call(self, sub: Subscription, event: str, data: Any, above: Any = None) -> Any:
        """Call a handler whose subscription has not ended, if its filter lets the event pass.

        In a task of its own (`above` is given) it returns its failure, with the traceback.
        """
        try:
            heard = sub.active and (sub.filter_fn is None or sub.filter_fn(event, data))
            if heard and (not sub.once or self.unsubscribe(sub)):  # first, for the call may publish
                result = sub.handler(data)
                if type(result) is types.CoroutineType or (
                        result is not None and inspect.isawaitable(result)):
                    await result
        except BaseException as error:
            if above is None or isinstance(error, (SystemExit, *_LEAVING)):
                raise
            return error

    async def _failed(self, sub: Subscription, event: str, data: Any, error: BaseException) -> None:
        """Log a failure with its traceback and publish it, once, and never about itself."""
        name, seq = sub.component_name, data.get("seq") if isinstance(data, dict) else None
        self._logger.error("Handler of %r for event %r failed", name, event, exc_info=error)
        if event != HANDLER_FAILED:
            await self.publish(HANDLER_FAILED, {"event_name": event, "component_name": name,
                "exception": repr(error), "seq": seq, "correlation_id": get_correlation_id()})

    def _order(self, event_name: str) -> tuple[Subscription, ...]:
        """Return the subscriptions that hear an event, in order of delivery."""
        if event_name not in self._events:  # kept for no name that nobody subscribed to by itself
            return self._ready.get("*") or self._order("*") if "*" in self._events else ()
        subs = {**self._events[event_name], **self._events.get("*", {})}
        self._ready[event_name] = tuple(sorted(subs, key=operator.attrgetter("priority", "number")))
        return self._ready[event_name]

    def _changed(self, event_name: str) -> None:
        if event_name == "*":
            self._ready.clear()
        else:
            self._ready.pop(event_name, None)

    def _chain(self) -> list[str]:
        """Return the events whose publishes surround this call; raise StateError for too many.

        They are read off the stack, so that a publish that is not nested pays nothing. The tasks
        of a concurrent publish have stacks of their own: there `_call` knows what is `above`.
        """
        chain: list[str] = []
        for frame, _ in traceback.walk_stack(sys._getframe(1)):
            if frame.f_code is _PUBLISH and frame.f_locals["self"] is self:
                chain.insert(0, frame.f_locals["event_name"])
            elif frame.f_code is _CALL and frame.f_locals["self"] is self:
                chain[:0] = frame.f_locals["above"] or ()
        if len(chain) > MAX_NESTING + (chain[-1] == HANDLER_FAILED):
            raise StateError(f"Events published within events, {len(chain)} deep: {chain[-1]!r}",
                why="a handler publishes, and what it publishes leads back to it",
                fix="break the circle, or publish from a task of its own",
                chain=" -> ".join(chain[-8:]))
        return chain


_PUBLISH, _CALL = AsyncEventManager.publish.__code__, AsyncEventManager._call.__code__


# --------------------------------------------------------------------------------------------
# 5. Guards and values
# --------------------------------------------------------------------------------------------
# What a config may ask and compute: comparisons, sums of two numbers, a list with one item
# more. Each is compiled once into a closure over a scope (message, data, component, state, id,
# now). Only dicts and lists are looked into; nothing is evaluated; nothing is imported and called
# but a guard that is a dotted path.

MISSING: Any = type("MISSING", (), {"__repr__": lambda self: "nothing", "__slots__": ()})()
ROOTS = ("message", "data", "component", "state", "id", "now")
_STEP = r"(?!__|\d{10,}\Z)[^()\[\]{}]+"  # of a path: no call, no hidden attribute, no huge index


class MissingValue(Exception):
    """A value whose path leads nowhere; the argument is the path."""


def _inner(value: Any, step: str) -> Any:
    """Return what one step of a path leads to, or MISSING."""
    if isinstance(value, dict):
        return value.get(step, MISSING)
    if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
        return value[int(step)]
    return MISSING


def _reader(path: str) -> Callable[[Scope], Any]:
    """Compile a path like `message.items.0.price`; it leads to a value, or to MISSING."""
    steps = path.split(".")
    if not all(re.fullmatch(_STEP, step) for step in steps):
        raise ConfigError(f"Not a path: {path!r}", fix='write it like "message.items.0.price"',
            why="a path names keys and list indexes, joined by dots; nothing is called")
    if len(steps) == 2:  # most are like this
        root, key = steps
        return lambda scope: scope[root].get(key, MISSING)
    return lambda scope: functools.reduce(_inner, steps, scope)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except ValueError:  # more digits than Python writes
        return f"a huge {type(value).__name__}"
    return "nothing" if value is MISSING else text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$") and not value.startswith("$$")


# What the two operands must be, in words and as tests, and what is made of them.
OPERATIONS: dict[str, tuple[str, Any, Any, Any]] = {
    "+": ("[number, number]", _is_number, _is_number, operator.add),
    "-": ("[number, number]", _is_number, _is_number, operator.sub),
    "append": ("[list, item]", lambda left: isinstance(left, list), lambda right: True,
        lambda left, right: [*left, right])}


def _is_computed(value: Any) -> bool:
    """Tell whether a value of a config is known only when a message comes."""
    return _is_reference(value) or (isinstance(value, dict) and len(value) == 1
        and next(iter(value)) in OPERATIONS)


def _compile_operation(name: str, operands: Any) -> Callable[[Scope], Any]:
    takes, fits_left, fits_right, operate = OPERATIONS[name]
    if not (isinstance(operands, list) and len(operands) == 2 and all(_is_computed(one) or fits(one)
            for one, fits in zip(operands, (fits_left, fits_right)))):
        raise ConfigError(f"{name!r} takes {takes}: {operands!r}")
    left, right = map(compile_value, operands)

    def value(scope: Scope) -> Any:
        a, b = left(scope), right(scope)
        if fits_left(a) and fits_right(b):
            with contextlib.suppress(OverflowError):
                result = operate(a, b)
                if not isinstance(result, float) or math.isfinite(result):
                    return result
        raise StateError(f"Cannot compute {{{name!r}: [{_shown(a)}, {_shown(b)}]}}",
            why=f"it takes {takes}, and the result must be finite", operands=operands)

    return value


def _compile_reference(text: str) -> Callable[[Scope], Any]:
    path = text[1:]
    if path not in ROOTS and not path.startswith(("message.", "data.")):
        raise ConfigError(f"Unknown value: {text!r}", fix=choose(text, ["$" + r for r in ROOTS]))
    read = _reader(path)

    def value(scope: Scope) -> Any:
        found = read(scope)
        if found is MISSING:
            raise MissingValue(text)
        return fresh(found)

    return value


def compile_value(value: Any) -> Callable[[Scope], Any]:
    """Compile a value of a config into a function of a scope; raise ConfigError if it is wrong.

    The function raises MissingValue where a `$` path leads nowhere. It never returns a list or
    dict that belongs to the config, the message or the data.
    """
    if _is_reference(value):
        return _compile_reference(value)
    if _is_computed(value):
        return _compile_operation(*next(iter(value.items())))
    if isinstance(value, dict):
        parts = [(key, compile_value(inner)) for key, inner in value.items()]
        return lambda scope: {key: inner(scope) for key, inner in parts}
    if isinstance(value, list):
        items = [compile_value(inner) for inner in value]
        return lambda scope: [inner(scope) for inner in items]
    literal = value[1:] if isinstance(value, str) and value.startswith("$$") else value
    return lambda scope: literal


def same(left: Any, right: Any) -> bool:
    """Compare JSON values: 1 equals 1.0, and neither equals true."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _alike(compare: Callable[[Any, Any], bool], numbers: bool = True) -> Callable[[Any, Any], bool]:
    """Let a comparison hold only between two texts, or between two numbers if it can."""
    return lambda left, right: (isinstance(left, str) and isinstance(right, str) or numbers
        and _is_number(left) and _is_number(right)) and compare(left, right)


def _contains(whole: Any, part: Any) -> bool | None:
    """Tell whether a list, text or object has an item, piece or key; None if it cannot have it."""
    if isinstance(whole, list):
        return any(part == one and same(part, one) for one in whole)  # `==` is quick to deny
    return part in whole if isinstance(whole, (str, dict)) and isinstance(part, str) else None


# How two values are compared, and what an operand written in the config must be for that ever to
# hold. Only `exists` is asked about a value that is missing.
OPERATORS: dict[str, tuple[Callable[[Any, Any], Any], tuple[type, ...]]] = {
    "==": (same, ()), "!=": (lambda found, wanted: not same(found, wanted), ()),
    **{text: (_alike(test), (int, float, str)) for text, test in (
        ("<", operator.lt), ("<=", operator.le), (">", operator.gt), (">=", operator.ge))},
    "in": (lambda found, wanted: _contains(wanted, found), (list, str)),
    "not_in": (lambda found, wanted: _contains(wanted, found) is False, (list, str)),
    "contains": (_contains, ()), "startswith": (_alike(str.startswith, numbers=False), (str,)),
    "endswith": (_alike(str.endswith, numbers=False), (str,)),
    "exists": (lambda found, wanted: (found is not MISSING) is wanted, (bool,))}


# A compiled guard: `holds(scope)` answers, `seen(scope)` tells what it compared, and `text()` is
# its short form: `total > 0 and (vip == true or not (late exists true))`.
Guard = namedtuple("Guard", "holds seen text")


def _comparison(path: str, op: str, wanted: Any) -> Guard:
    if op not in OPERATORS:
        raise ConfigError(f"Unknown operator: {op!r}",
            why=f"what stands under {path!r} is an object, so its keys are operators",
            fix=choose(op, OPERATORS) + '; to compare with an object write {"==": {...}}')
    (compare, kinds), computed = OPERATORS[op], _is_computed(wanted)
    if kinds and not computed and not (isinstance(wanted, kinds) and (
            bool in kinds or not isinstance(wanted, bool))):
        raise ConfigError(f"{op!r} can never hold for {wanted!r}",
            why="it compares with " + " or ".join(kind.__name__ for kind in kinds))
    read = _reader(path if path.startswith(("message.", "data.")) else f"message.{path}")
    operand = compile_value(wanted)

    def against(scope: Scope) -> Any:
        try:
            return operand(scope)
        except MissingValue:
            return MISSING

    def holds(scope: Scope) -> Any:
        found, other = read(scope), against(scope)
        possible = other is not MISSING and (found is not MISSING or op == "exists")
        return possible and compare(found, other)

    def text() -> str:
        return f"{path} {op} {wanted if _is_reference(wanted) else _shown(wanted)}"

    def seen(scope: Scope) -> str:
        told = f" = {_shown(against(scope))}" if computed else ""
        return f"{text()}{told} (saw {_shown(read(scope))})"

    if op == "==" and isinstance(wanted, str) and not wanted.startswith("$"):
        return Guard(lambda scope: read(scope) == wanted, seen, text)  # text equals text alone
    return Guard(holds, seen, text)


# Whether guards hold together, how it is told what they saw, and their short form; None stands for
# the keys of one object, and a guard is `not` with one guard in it.
_TOGETHER: dict[str | None, tuple[Any, str, str, str, str]] = {
    None: (all, "{}", "; ", "{}", " and "), "all": (all, "{}", "; ", "({})", " and "),
    "any": (any, "none of: {}", " | ", "({})", " or "),
    "not": (lambda answers: not any(answers), "not ({})", "", "not ({})", "")}


def _together(word: str | None, parts: list[Guard]) -> Guard:
    test, told, glue, short, joint = _TOGETHER[word]

    def holds(scope: Scope) -> Any:
        return test(part.holds(scope) for part in parts)

    def seen(scope: Scope) -> str:
        telling = [part for part in parts if test is not all or not part.holds(scope)] or parts
        return told.format(glue.join(part.seen(scope) for part in telling))

    return Guard(holds, seen, lambda: short.format(joint.join(part.text() for part in parts)))


def _predicate(path: str, function: Any) -> Guard:
    if not callable(function) or is_async(function):
        raise ConfigError(f"Not a plain function: {path!r}",
            why="a guard is asked in the middle of a decision, where nothing can be awaited",
            fix="write `def guard(message, component): return ...`")

    def holds(scope: Scope) -> Any:
        answer = function(scope["message"], scope["self"])
        if inspect.isawaitable(answer):
            raise StateError(f"Guard {path!r} returned an awaitable", fix="return true or false")
        return answer

    return Guard(holds, lambda scope: f"{path} said no", lambda: path)


def compile_guard(guard: Any, load: Callable[[str], Any]) -> Guard:
    """Compile a guard; `load` turns a dotted path into a function. Raise ConfigError if wrong.

    A missing or incomparable value makes every comparison false, except `exists`.
    """
    if isinstance(guard, str):
        return _predicate(guard, load(guard))
    if not isinstance(guard, dict):
        raise ConfigError(f"Not a guard: {guard!r}", fix='write {"message.total": {">": 0}}')
    parts = []
    for key, wanted in guard.items():
        if key in _TOGETHER:
            inner = [wanted] if key == "not" else wanted
            if not isinstance(inner, list) or not inner:
                raise ConfigError(f"{key!r} takes a list of guards: {wanted!r}")
            parts.append(_together(key, [compile_guard(one, load) for one in inner]))
        elif wanted == {}:
            raise ConfigError(f"No operator under {key!r}", fix=f"one of {list(OPERATORS)}")
        else:
            tests = wanted if isinstance(wanted, dict) else {"==": wanted}
            parts += [_comparison(key, op, operand) for op, operand in tests.items()]
    if not parts:
        raise ConfigError("Empty guard", why="it always holds", fix="leave it out")
    return _together(None, parts) if len(parts) > 1 else parts[0]


# --------------------------------------------------------------------------------------------
# 6. States, registry, packs
# --------------------------------------------------------------------------------------------
# A state is declared in a config, or a class that answers messages itself. A registry maps
# names to classes; each config has its own, over the default one, so that no config changes
# what another means. A dotted path is code: it is imported only where imports are allowed.


class State:
    """A state that answers messages in Python; subclass it and name it in a config."""

    async def handle_message(self, message: dict[str, Any], component: Any) -> tuple[bool, State]:
        """Return (True, the next state), or (False, self) where the message is not accepted.

        Answering (True, self) stays. Attributes of the object are saved with its component, so
        they must be JSON.
        """
        raise NotImplementedError(f"{type(self).__name__} has no handle_message")


class _TableState(State):
    """A state without code of its own: `moves` maps a message type to the name of a state."""

    moves: dict[str, str] = {}

    async def handle_message(self, message: dict[str, Any], component: Any) -> tuple[bool, State]:
        """Follow `moves`; `confirm` also wants the content "confirmed"."""
        name = self.moves.get(str(message.get("type")))
        if name and (message["type"] != "confirm" or message.get("content") == "confirmed"):
            return True, DEFAULT_REGISTRY.create(name)
        return False, self


def moves_of(cls: Any) -> dict[str, str]:
    """Return the table of a state class; none of one with code of its own, whatever it calls so."""
    own = getattr(cls, "handle_message", None) is not _TableState.handle_message
    return {} if own else cls.moves


class DeclaredState(_TableState):
    """A state of a config: its class accepts nothing, its component's rules do the work."""


class InitialState(_TableState):
    """Wait for `start`."""

    moves = {"start": "AwaitingConfirmation"}


class AwaitingConfirmation(_TableState):
    """Wait for `confirm` with content "confirmed", or `cancel`."""

    moves = {"confirm": "ProcessingRequest", "cancel": "InitialState"}


class ProcessingRequest(_TableState):
    """Wait for `complete` or `error`."""

    moves = {"complete": "InitialState", "error": "ErrorHandling"}


class ErrorHandling(_TableState):
    """Wait for `acknowledge`."""

    moves = {"acknowledge": "InitialState"}


class StateRegistry:
    """State classes by name; what is not found here is looked up in `parent`."""

    def __init__(self, parent: StateRegistry | None = None) -> None:
        self._states: dict[str, type[State]] = {}
        self._names: dict[type[State], str] = {}
        self._parent = parent

    def register(self, name: str, state_cls: type[State]) -> None:
        """Let `name` stand for a State class; an earlier class of that name is replaced."""
        if not (isinstance(state_cls, type) and issubclass(state_cls, State)):
            raise StateError(f"Not a State class: {state_cls!r}", fix="inherit from State")
        self.unregister(name)
        self._states[name] = state_cls
        self._names.setdefault(state_cls, name)  # a class goes by its first name

    def unregister(self, name: str) -> None:
        """Forget a name; a name that is not known is no error."""
        state_cls = self._states.pop(name, None)
        if state_cls is not None and self._names.get(state_cls) == name:
            del self._names[state_cls]

    def get(self, name: str) -> type[State] | None:
        """Return the class of a name, or None."""
        return self._states.get(name) or (self._parent.get(name) if self._parent else None)

    def create(self, name: str) -> State:
        """Return a new state; raise StateError for an unknown name."""
        state_cls = self.get(name)
        if state_cls is None:
            raise StateError(f"Unknown state: {name!r}",
                why="no class is registered under this name", fix=choose(name, self.names()))
        return state_cls()

    def names(self) -> list[str]:
        """Return the known names in alphabetical order."""
        return sorted({*self._states, *(self._parent.names() if self._parent else ())})

    def name_of(self, state: State) -> str:
        """Return the name that a state object goes by: its key here, else its class's name."""
        cls = type(state)
        return self._names.get(cls) or (self._parent.name_of(state) if self._parent
            else cls.__name__)


DEFAULT_REGISTRY = StateRegistry()
BUILT_IN = (InitialState, AwaitingConfirmation, ProcessingRequest, ErrorHandling)
for _state in BUILT_IN:
    DEFAULT_REGISTRY.register(_state.__name__, _state)


async def ask(state: State, message: dict[str, Any], component: Any) -> tuple[bool, State]:
    """Return a state's answer to a message; raise StateError where it is not (bool, State)."""
    answer = await state.handle_message(message, component)
    if isinstance(answer, tuple) and len(answer) == 2:
        if not answer[0] or isinstance(answer[1], State):
            return (True, answer[1]) if answer[0] else (False, state)
    raise StateError(f"State {type(state).__name__} answered {answer!r}",
        why="an answer is a pair: accepted or not, and the next state",
        fix="return True, NextState() or return False, self")


class StateMachine:
    """The current state of one component, as an object.

    Within a turn, in its context, `current_state` is already the next one; everybody else sees
    the old until the commit.
    """

    __slots__ = ("_state", "registry")

    def __init__(self, current_state: State, registry: StateRegistry = DEFAULT_REGISTRY) -> None:
        self._state, self.registry = current_state, registry

    @classmethod
    def from_name(cls, state_name: str, registry: StateRegistry = DEFAULT_REGISTRY) -> StateMachine:
        """Start in a registered state; raise StateError for an unknown name."""
        return cls(registry.create(state_name), registry)

    @property
    def current_state(self) -> State:
        """The state object; its class's name is the state's name."""
        turn = live_turn(self)
        return self._state if turn is None else turn.state

    @current_state.setter
    def current_state(self, state: State) -> None:
        self._state = state

    async def handle_message(self, message: dict[str, Any], component: Any) -> bool:
        """Ask the current state alone, without rules, turn or commit; tell whether it accepted."""
        proceed, state = await ask(self._state, message, component)
        if proceed:
            self._state = state
        return proceed


def load_symbol(dotted_path: str, allow_imports: Sequence[str] | None = None) -> Any:
    """Import `package.module:name` and return what it names; raise ImportError_ if that fails.

    `allow_imports` lists the modules that may be imported, with all below them; None allows all.
    A failure inside the module is chained as the cause, SystemExit too.
    """
    def check(module: str) -> None:
        allowed = (__name__, *(allow_imports or ()))
        if allow_imports is not None and not any(
                (module + ".").startswith(one.rstrip(".") + ".") for one in allowed if one):
            raise ImportError_(f"Import not allowed: {dotted_path!r}",
                why=f"the code of {module!r} may not be run here",
                fix=f"allow it with allow_imports=({module!r},) or --allow-import {module}")

    module_name, _, symbol = (part.strip() for part in dotted_path.partition(":"))
    if not all(map(str.isidentifier, f"{module_name}.{symbol}".split("."))):
        near = re.fullmatch(r"([\w.]+)\.(\w+)", dotted_path)
        like = "{}:{}".format(*near.groups()) if near else "package.module:name"
        raise ImportError_(f"Not a dotted path: {dotted_path!r}", fix=f"write it like {like!r}")
    if module_name.split(".")[0] == "flexiflow":  # this file, whatever it is called here
        module_name = __name__
    check(module_name)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = (isinstance(error, ModuleNotFoundError)
            and f"{module_name}.".startswith(f"{error.name}."))
        raise ImportError_(f"{'Module not found:' if missing else 'Cannot import'} {module_name!r}",
            why=f"{type(error).__name__}: {said(error)}", dotted_path=dotted_path,
            fix="check the spelling and sys.path" if missing else "mend the module") from error
    try:
        found = operator.attrgetter(symbol)(module)
    except AttributeError as error:
        raise ImportError_(f"No {symbol!r} in module {module_name!r}", dotted_path=dotted_path,
            fix=choose(symbol, [name for name in vars(module) if name[0] != "_"])) from error
    check(getattr(found, "__module__", None) or module_name)  # an allowed module may import others
    return found


@dataclass(frozen=True)
class StateSpec:
    """A state that a pack provides."""

    state_class: type[State]
    description: str | None = None


@dataclass(frozen=True)
class TransitionSpec:
    """A transition that a pack's classes make: for explanations and pictures, never executed."""

    from_state: str
    on_message: str
    to_state: str
    guard: str | None = None
    description: str | None = None


class StatePack:
    """What a pack offers: subclass it, or have the same four members."""

    name = "pack"

    def provides(self) -> dict[str, StateSpec]:
        """Return the states by name."""
        return {}

    def transitions(self) -> list[TransitionSpec]:
        """Return the transitions that the states make."""
        return []

    def depends_on(self) -> set[str]:
        """Return the names of the states that other packs must provide."""
        return set()


class MappingPack(StatePack):
    """A pack made from a plain mapping of names to State classes."""

    name = "mapping"

    def __init__(self, states: Mapping[str, type[State]]) -> None:
        self._mapping = dict(states)

    def provides(self) -> dict[str, StateSpec]:
        """Return the states by name, in alphabetical order."""
        return {key: StateSpec(self._mapping[key]) for key in sorted(self._mapping)}


def load_pack(pack: Any, allow_imports: Sequence[str] | None = None) -> StatePack:
    """Return a pack from a dotted path (to a class or an object) or an object; else raise."""
    found = load_symbol(pack, allow_imports) if isinstance(pack, str) else pack
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(f"Pack could not be made: {pack!r}",
                why=f"{type(error).__name__}: {said(error)}") from error
    lacks = [member for member in ("provides", "transitions", "depends_on")
        if not callable(getattr(found, member, None))]
    lacks += [] if isinstance(getattr(found, "name", None), str) else ["name"]
    if lacks:
        raise ConfigError(f"Not a StatePack: {pack!r}", why=f"it has no {', '.join(lacks)}",
            fix="inherit from StatePack")
    return found  # type: ignore[no-any-return]


def pack_collisions(packs: Sequence[StatePack], builtin: set[str]) -> Iterator[ConfigError]:
    """Yield an error for each state that two packs provide or that hides a built-in one."""
    owners: dict[str, str] = {}
    for pack in packs:
        for key in pack.provides():
            if key in owners:
                yield ConfigError(f"State {key!r} is provided twice",
                    why=f"by {owners[key]!r} and {pack.name!r}")
            if key in builtin:
                yield ConfigError(f"State {key!r} hides a built-in one",
                    why=f"pack {pack.name!r} provides it")
            owners.setdefault(key, pack.name)


def load_packs(*, states: Mapping[str, type[State]] | None = None, packs: Sequence[Any]
        | None = None, builtin_keys: Iterable[str] | None = None) -> list[StatePack]:
    """Return packs, checked against each other: no state twice, none named like a built-in.

    `packs` lists dotted paths and objects; or `states` is wrapped into one MappingPack.
    """
    if states is not None and packs is not None:
        raise ConfigError("Both states and packs given", fix="wrap the states into a MappingPack")
    given: Sequence[Any] = packs or () if states is None else (MappingPack(states),)
    loaded = [load_pack(pack) for pack in given]
    for problem in pack_collisions(loaded, set(builtin_keys or ())):
        raise problem
    return loaded


def collect_provided_keys(packs: Sequence[StatePack]) -> dict[str, str]:
    """Return which pack provides each state: state name -> pack name."""
    return {key: pack.name for pack in reversed(packs) for key in pack.provides()}  # the first wins


# --------------------------------------------------------------------------------------------
# 7. Rules: compile and decide
# --------------------------------------------------------------------------------------------
# A definition is a config compiled once, however many components run it. `decide` is pure: it
# finds the rule that a message fires and works out everything that follows from it. It never
# awaits, reads the clock, opens a file or logs; of equal scopes it says the same (it uses one up).

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_DELAY = 100 * 366 * 86400  # a hundred years


def seconds(value: Any) -> float:
    """Return a delay in seconds: a number, or "90s", "15m", "2h", "7d"; else raise StateError."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    delay = float(found[1]) * _UNITS[found[2]] if found else value
    if not _is_number(delay) or not 0 <= delay <= MAX_DELAY:
        raise StateError(f"Not a delay: {value!r}", fix='seconds, or like "90s", "15m", "2h", "7d"')
    return float(delay)


def _is_name(value: Any) -> bool:
    """Tell whether a value is a text that can stand in a store: not empty, no lone surrogate."""
    return isinstance(value, str) and bool(value) and (
        value.isascii() or value.encode("utf-8", "replace").decode() == value)


def check_name(name: Any) -> None:
    """Raise ArgumentError unless a value can be the name of a component."""
    if not _is_name(name):
        raise ArgumentError(f"Not a name for a component: {name!r}")


# A message that a turn sends: to whom, what, after how many seconds, under which id.
Outgoing = namedtuple("Outgoing", "to message delay id correlation_id", defaults=(0.0, None, None))
# What happens beside the change of state, in a rule or at a state's entry or exit: tuples of
# (key, value), of Outgoings, of (event, payload or None), all of them functions of a scope; and of
# the actions.
Effects = namedtuple("Effects", "assign send emit action", defaults=((), (), (), ()))
NOTHING = Effects()


class Node:
    """A state of a definition."""

    def __init__(self, name: str, cls: type[State] = DeclaredState, *, initial: str | None = None,
            final: bool = False, entry: Effects = NOTHING, exit: Effects = NOTHING,
            description: str = "") -> None:
        self.name, self.cls, self.description = name, cls, description
        # `initial` names the child that is entered with it.
        self.initial, self.final, self.entry, self.exit = initial, final, entry, exit
        self.around: list[Node] = []  # the states that it stands in, innermost first
        self.children: list[Node] = []
        # Rules alone answer for a declared state, and all components share one object; else the
        # class is asked last.
        self.declared = issubclass(cls, DeclaredState)
        self.instance = cls() if self.declared else None

    completes = property(lambda self: self.final and not self.around,
        doc="Whether the component is done with it: a final state, and within no other.")

    def create(self, attributes: Json | None = None) -> State:
        """Return a state object, new or with the attributes that one had."""
        if attributes is None:
            return self.instance or self.cls()
        state = self.cls.__new__(self.cls)
        vars(state).update(fresh(attributes))
        return state

    def lineage(self) -> list[Node]:
        """Return the state and what surrounds it, innermost first."""
        return [self, *self.around]


class Rule:
    """A rule that executes."""

    def __init__(self, number: int, text: Json, sources: Iterable[str], effects: Effects, *,
            on: Iterable[str] = (), after: Any = None, guard: Guard | None = None,
            to: str | None = None, reenter: bool = False, description: str = "") -> None:
        # Its place in the config's list, and how it is written there.
        self.number, self.text, self.description = number, text, description
        self.sources = tuple(dict.fromkeys(sources))  # states, or "*"
        # What fires it: message types, or a timer's delay, which is a function of a scope.
        self.on, self.after = tuple(dict.fromkeys(on)), after
        self.guard, self.to, self.reenter, self.effects = guard, to, reenter, effects

    timer_type = property(lambda self: f"after {self.text['after']}",
        doc="The type of the message by which a timer fires.")


class Passage:
    """A way from one state to another: what is entered in which order, effects, and timers."""

    def __init__(self, node: Node, enters: Sequence[Node] = (),
            steps: Iterable[tuple[str, Effects]] = (), timers: Sequence[tuple[Rule, str]] = (),
            ended: Sequence[str] = ()) -> None:
        self.node = node  # the state at the end
        self.active, self.enters = (
            tuple(one.name for one in nodes) for nodes in (node.lineage()[::-1], enters))
        self.steps = tuple(step for step in steps if any(step[1]))  # (value of $state, effects)
        # (rule, owning state) of those that start here; and the owners of those that end.
        self.timers, self.ended = timers, ended
        self.completes = node.completes


class Plan:
    """What a message does: made by `decide`, carried out by a turn."""

    reason: str | None = None
    state: Any = None  # the object afterwards; the turn sets it
    sends: Sequence[Outgoing] = ()
    emits: Sequence[tuple[str, Any]] = ()
    actions: Sequence[Callable[..., Any]] = ()
    timers: Sequence[tuple[float, str, int]] = ()  # (due, owning state, rule number)
    ended = property(lambda self: self.passage.ended if self.passage else ())  # timers' owners

    def __init__(self, outcome: str, data: Json, passage: Passage | None = None) -> None:
        self.outcome, self.data, self.passage = outcome, data, passage


class Definition:
    """States and rules, compiled. `source` is the config without name and data."""

    def __init__(self, source: Json, nodes: dict[str, Node], rules: list[Rule],
            initial: str, registry: StateRegistry, retry: RetryConfig, has_code: bool) -> None:
        self.source, self.nodes, self.rules, self.registry = source, nodes, rules, registry
        self.retry, self.has_code = retry, has_code
        self.types = frozenset(kind for rule in rules for kind in rule.on)
        self.by_number = {rule.number: rule for rule in rules}
        # Where a class answers, or "*" is taken, no message type is unknown.
        self.open = "*" in self.types or any(not node.declared for node in nodes.values())
        self.renamed: dict[str, str] = source.get("renamed") or {}  # what became of old states
        self._by_source: dict[str, list[Rule]] = {}
        for rule in rules:
            for name in rule.sources:
                self._by_source.setdefault(name, []).append(rule)
        self._candidates: dict[tuple[str, str], tuple[tuple[Rule, Passage], ...]] = {}
        self.birth = self.passage(None, "*", initial)

    @functools.cached_property
    def text(self) -> str:
        """The source as canonical JSON: equal definitions have equal texts."""
        return write_json(self.source, "config")

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of the text, by which the store keeps it once."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def candidates(self, leaf: str, kind: str) -> tuple[tuple[Rule, Passage], ...]:
        """Return the rules that may take a message, and their ways, in the order of asking.

        The leaf's first, then its ancestors', then those from "*"; in each, the exact type
        before "*", and file order.
        """
        kind = kind if kind in self.types else "*"  # whatever no rule names is kept but once
        found = self._candidates.get((leaf, kind))
        if found is None:
            found = self._candidates[leaf, kind] = tuple(self.candidate(leaf, rule, source)
                for source in self.sources(leaf) for wanted in dict.fromkeys((kind, "*"))
                for rule in self.rules_of(source) if wanted in rule.on)
        return found

    def candidate(self, leaf: str, rule: Rule, source: str) -> tuple[Rule, Passage]:
        """Return a rule with its way from `leaf`; `source` is the state it was found on."""
        return rule, (self.passage(leaf, source, rule.to, rule) if rule.to is not None
            else Passage(self.nodes[leaf], steps=[(leaf, rule.effects)]))

    def passage(self, leaf: str | None, source: str, target: str,
            rule: Rule | None = None) -> Passage:
        """Return the way from `leaf` (None: from outside) to `target`.

        Left is what stands within the innermost state that holds both source and target and is
        neither (SCXML's domain of a transition); a descendant is entered without leaving the
        source, unless the rule says `reenter`.
        """
        outer = [] if source == "*" else self.nodes[source].lineage()
        kept = outer[1:] if rule and rule.reenter else outer
        domain = [node for node in kept if node in self.nodes[target].around]
        exits = [node for node in self.nodes[leaf].lineage() if node not in domain] if leaf else []
        end = self.innermost(target)
        enters = [node for node in end.lineage()[::-1] if node not in domain]
        steps = [(leaf or end.name, node.exit) for node in exits]
        steps += [(leaf or end.name, rule.effects)] if rule else []
        steps += [(end.name, node.entry) for node in enters]
        begun = [] if end.completes else [node.name for node in enters] + ["*"] * (leaf is None)
        timers = [(timer, name) for name in begun for timer in self.timers(name)]
        left = [node.name for node in exits] + ["*"] * end.completes
        return Passage(end, enters, steps, timers, [name for name in left if self.timers(name)])

    def timers(self, owner: str) -> list[Rule]:
        """Return the timer rules of a state, or of "*"."""
        return [rule for rule in self.rules_of(owner) if rule.after]

    def innermost(self, name: str) -> Node:
        """Return the state in which one ends up who enters a state: itself, or a child."""
        node = self.nodes[name]
        while node.initial is not None:
            node = self.nodes[node.initial]
        return node

    def sources(self, leaf: str) -> list[str]:
        """Return where rules for a leaf are found, in the order in which they are asked."""
        return [*(node.name for node in self.nodes[leaf].lineage()), "*"]

    def rules_of(self, source: str) -> list[Rule]:
        """Return the rules that stand on a state, or on "*"."""
        return self._by_source.get(source, [])


def follow(plan: Plan, scope: Scope) -> None:
    """Work out the effects along a plan's passage: all values first, in order, then the actions.

    Within one rule, entry or exit all values are seen before any is set; what it sends and
    emits sees the data after. `scope` is used up: its data and state are changed.
    """
    passage: Any = plan.passage
    sends, emits, actions = [], [], []
    try:
        for state, (assign, send, emit, action) in passage.steps:
            scope["state"] = state
            if assign:
                scope["data"] = {**scope["data"], **{key: value(scope) for key, value in assign}}
            sends += [outgoing(scope) for outgoing in send]
            emits += [(name, value and value(scope)) for name, value in emit]
            actions += action
        scope["state"] = passage.node.name
        plan.timers = [(scope["now"] + seconds(rule.after(scope)), owner, rule.number)
            for rule, owner in passage.timers]
    except MissingValue as error:
        raise StateError(f"No value at {error}", component=scope["component"],
            why=f"an effect needs it, on the way to {passage.node.name!r}",
            fix=f'guard the rule with {{"{str(error)[1:]}": {{"exists": true}}}}' + ", or give it"
            " a first value in the config's data" * str(error).startswith("$data")) from None
    plan.data, plan.sends, plan.emits, plan.actions = scope["data"], sends, emits, actions


def decide(definition: Definition, leaf: str, scope: Scope,
        timer: tuple[Rule, Passage] | None = None) -> Plan:
    """Return what a message, or the firing of a timer, does in state `leaf`.

    `scope` holds `message`, `data`, `component` (the name), `state`, `id`, `now` (epoch seconds)
    and `self` (what Python guards are shown). The outcome is moved, stayed, blocked, ignored,
    unknown, or "class" where the leaf's class is to be asked. A guard that raises, and an effect
    whose value is missing, raise: no later candidate is tried.
    """
    kind = scope["message"]["type"]
    asked = (timer,) if timer else definition.candidates(leaf, kind)
    for rule, passage in asked:
        if rule.guard is None or rule.guard.holds(scope):
            plan = Plan("moved" if rule.to else "stayed", scope["data"], passage)
            if passage.steps or passage.timers:
                follow(plan, scope)
            return plan
    plan = Plan("class", scope["data"])
    if timer or definition.nodes[leaf].declared:
        known = definition.open or kind in definition.types
        plan.outcome = "blocked" if asked else "ignored" if known else "unknown"
        plan.reason = "; ".join(f"rules[{rule.number}] wants {rule.guard.seen(scope)}"
            for rule, _ in asked if rule.guard) or f"{leaf} does not take {kind!r}"
    return plan


# --------------------------------------------------------------------------------------------
# 8. Config: one walk of problems; load
# --------------------------------------------------------------------------------------------
# One walk over a config finds everything that is wrong with it and compiles what is right. Each
# check is a function that raises; the walk knows the place, reports it there and goes on.
# Loading raises the first error found, `explain` (section 12) lists them all: they cannot disagree.

_KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number",
    float: "a number"}
_EFFECTS = {"assign": "an object", "send": "an object or a list",
    "emit": "text or an object or a list", "action": "text or a list"}
_EXECUTING = {"from": "text or a list", "to": "text", "on": "text or a list",
    "after": "text or a number", "guard": "", "reenter": "true or false", **_EFFECTS}
# The keys that mean something, in the order of the walk, and what may stand under them ("":
# anything that compiles).
KEYS = {
    "config": {"name": "text", "description": "text", "version": "", "$schema": "text",
        "data": "an object", "initial_state_resolution": "a list", "packs": "a list",
        "states": "an object", "initial_state": "text", "renamed": "an object",
        "retry": "an object", "rules": "a list"},
    "state": {"description": "text", "initial": "text", "final": "true or false",
        "entry": "an object", "exit": "an object"},
    "rule": {**_EXECUTING, "description": "text"}, "note": _EXECUTING, "effects": _EFFECTS,
    "send": {"to": "text", "type": "text", "after": "text or a number", "id": "text",
        "with": "an object"},
    "emit": {"name": "text", "with": ""},
    "retry": dict.fromkeys("max_attempts base_delay max_delay backoff jitter".split(), "a number")}
_REQUIRED = {"config": ("name",), "send": ("to", "type"), "emit": ("name",)}
_DEFAULTS: Json = {"rule": {"from": "*"}, "send": {"after": 0, "with": {}},
    "config": {"states": {}, "initial_state": "InitialState", "rules": []}}
_JSON_TYPES = {"text": "string", "a list": "array", "an object": "object",
    "true or false": "boolean", "a number": "number"}
# What a key one typo away from these is, and what any other is; "" lets it pass.
_STRANGE_KEYS = {"config": ("error", "warning"), "state": ("error", "warning"),
    "rule": ("error", "warning"), "note": ("warning", "")}
_WHY_STRANGE = {"note": "without a key of the engine a rule is a note and does nothing",
    "rule": "it is kept, and does nothing"}
ENGINE_EVENTS = frozenset("* engine.component.registered component.message.received state.changed "
    "event.handler.failed component.completed message.dead rules.updated".split())
QUEUE_RETRY = RetryConfig(max_attempts=5, base_delay=0.2, max_delay=60.0)
BUILT_IN_NAMES = [state.__name__ for state in BUILT_IN]
_FROM_CONFIGS: Json = {}  # what loading has registered; no other config sees it


@dataclass
class Diagnostic:
    """Something wrong, or at least odd, with a config."""

    level: str  # "error" or "warning"
    what: str  # begins with the place in the config
    why: str | None = None
    fix: str | None = None
    context: Json = field(default_factory=dict)
    error: Any = field(default=None, repr=False, compare=False)  # the exception that loading raises

    def format(self) -> str:
        """Return it in the shape of an error, its level in front."""
        return f"[{self.level.upper()}] " + str(FlexiFlowError(self.what, why=self.why,
            fix=self.fix, context=ErrorContext(self.context)))


@dataclass(frozen=True)
class ComponentConfig:
    """A checked config. Made by ConfigLoader, or by hand from a name, rules and a state."""

    name: str
    rules: list[Json]
    initial_state: str = "InitialState"
    data: Json = field(default_factory=dict)
    definition: Definition | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> Any:
        """Pickle as what was loaded: the classes of declared states belong to no module."""
        if self.definition is None:
            return ComponentConfig, (self.name, self.rules, self.initial_state, self.data)
        source = {**self.definition.source, "name": self.name, "data": self.data}
        return ConfigLoader.load_component_config, (source,)


class MissingConfig(ConfigError, FileNotFoundError):
    """A config file that is not there; also a FileNotFoundError."""


def _read_yaml(content: bytes, path: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"YAML cannot be read here: {path!r}", fix="where it is: python -c "
            "'import sys,json,yaml; print(json.dumps(yaml.safe_load(sys.stdin),indent=2))' "
            f"< {path} > config.json", why="PyYAML is not installed, and FlexiFlow itself "
            "reads JSON") from error

    class Reader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _distinct([(key.value, value) for key, value in node.value])
            return super().construct_mapping(node, deep)

    try:
        if len(content) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes")
        return yaml.load(content, Reader) or {}
    except Exception as error:  # PyYAML lets through whatever converting a value raises
        raise ConfigError(f"Not valid YAML: {path!r}", why=str(error)) from error


def read_config(path: Path) -> Any:
    """Return the value in a config file; raise ConfigError if it cannot be read as JSON."""
    content, name = read_file(path, "config", ConfigError, MissingConfig), os.fsdecode(path)
    is_yaml = name.lower().endswith((".yaml", ".yml"))
    return _read_yaml(content, name) if is_yaml else read_json(content, name, ConfigError)


def schema() -> Json:
    """Return the JSON Schema of a config (draft 2020-12), made from the table of its keys.

    Every config that loads fits it. What fits it may be wrong still, in a way that `explain`
    knows: a state that there is not, say.
    """
    def below(key: str) -> Json:
        kind = {"entry": "effects", "exit": "effects", "rules": "rule", "states": "state"}.get(
            key, key)
        return {"$ref": f"#/$defs/{kind}"} if kind in KEYS and kind != "config" else {}

    def value(key: str, kinds: str) -> Json:
        allowed = [word for kind, word in _JSON_TYPES.items() if kind in kinds]
        single = [word for word in allowed if word != "array"]
        found: Json = {"type": [*allowed, "null"]} if allowed else {}
        if key == "states":
            return {**found, "additionalProperties": {"type": ["object", "string"], **below(key)}}
        if "array" in allowed:
            single = single or ["object" if key == "rules" else "string"]
            found["items"] = {"type": single, **below(key)}
        return {**found, **(below(key) if "object" in allowed else {})}

    def known(kind: str) -> Json:
        kinds = dict.fromkeys(KEYS["rule"], "") | KEYS["note"] if kind == "rule" else KEYS[kind]
        found = {"properties": {key: value(key, kinds[key]) for key in kinds},
            "patternProperties": {"^x-": {}}, "additionalProperties": kind in _STRANGE_KEYS}
        return {**found, "required": [*_REQUIRED[kind]]} if kind in _REQUIRED else found

    return {"$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A FlexiFlow config", "type": "object", **known("config"),
        "$defs": {kind: known(kind) for kind in KEYS if kind not in ("config", "note")}}


def one_edit(word: str, other: str) -> bool:
    """Tell whether at most one letter more, less, other or swapped makes one word the other."""
    if abs(len(word) - len(other)) > 1:
        return False
    same_head = len(os.path.commonprefix([word, other]))
    a, b = word[same_head:], other[same_head:]
    return b[1:] in (a, a[1:]) or a[1:] == b or (a[1::-1] == b[:2] and a[2:] == b[2:])


def _need(good: Any, what: str, *values: Any, **details: Any) -> None:
    """Raise ConfigError unless something is as it must be; `values` go into the text."""
    if not good:
        raise ConfigError(what % values if values else what, **details)


def _require(value: Any, kinds: str) -> None:
    """Raise ConfigError unless a value is of one of these kinds."""
    _need(not kinds or _KINDS.get(type(value), "nothing") in kinds, "Not %s: %r", kinds, value)


def _not_empty(value: Any) -> Any:
    """Return a text that is not empty; else raise ConfigError."""
    _need(isinstance(value, str) and value, "Not a name: %r", value)
    return value


class _Walk:
    """One look at a config; `problems` must be called before the rest is read."""

    def __init__(self, config: Any, imports: bool = True, allow_imports: Sequence[str]
            | None = None, registry: StateRegistry = DEFAULT_REGISTRY) -> None:
        self.config, self.imports, self.allow_imports = config, imports, allow_imports
        # What `explain` tells. A pack is a PackInfo's values; a state leads to its dotted path.
        self.found: Any = types.SimpleNamespace(errors=[], warnings=[], unchecked=[], packs=[],
            providers={}, states={}, policy=["packs", "builtin"], definition=None,
            path=os.fsdecode(config) if isinstance(config, (str, os.PathLike)) else None)
        self.registry = StateRegistry(registry)
        self.hidden = _FROM_CONFIGS if registry is DEFAULT_REGISTRY else {}
        self.place: list[Any] = []  # the keys and indexes that lead to what is looked at
        self.has_code = False
        self.good: Json = {}  # the top-level values, compiled
        self.nodes: dict[str, Node] = {}
        self.rules: list[Rule] = []
        self.taken: dict[tuple[str, str], int] = {}  # (state, type) -> rule without a guard
        self.compilers: dict[str, Callable[[Any], Any]] = {
            "initial_state_resolution": self._policy, "packs": self._packs, "states": self._states,
            "initial_state": self._initial, "rules": self._rules, "to": self._find,
            "renamed": lambda names: self._each(names.items(), self._renamed),
            "from": lambda name: name if name == "*" else self._find(_not_empty(name)),
            "after": lambda value: compile_value(value if _is_reference(value) else seconds(value)),
            "guard": lambda guard: compile_guard(guard, self._load),
            "retry": lambda value: dataclasses.replace(QUEUE_RETRY, **self._clean("retry", value)),
            **dict.fromkeys(("entry", "exit"), lambda one: Effects(**self._clean("effects", one))),
            "assign": self._values, "send": self._send, "emit": self._emit, "action": self._action,
            "on": _not_empty, "with": self._values, "type": compile_value, "id": compile_value}

    def problems(self) -> Any:
        """Look at everything; return what was found, `errors` and `warnings` and the rest."""
        try:
            self._read()
            self.good = self._clean("config", self.config)
            for pack, _, _, wanted in self.found.packs:
                for lack in sorted({*wanted} - {*self.nodes, *BUILT_IN_NAMES}):
                    error = ConfigError(f"Pack {pack!r} needs a state {lack!r}")
                    self._report(error, "warning", "packs")
            if not self.found.errors:
                self.found.definition = self._definition()
        except FlexiFlowError as error:
            self._report(error)
        return self.found

    def _definition(self) -> Definition:
        """Return what was compiled; only for a config without errors."""
        source = {key: self.config[key] for key in self.config if key not in ("name", "data")}
        classes = {node.cls for node in self.nodes.values() if not node.declared}
        return Definition(source, self.nodes, self.rules, self.good["initial_state"], self.registry,
            self.good.get("retry", QUEUE_RETRY), self.has_code or not classes <= {*BUILT_IN})

    def _report(self, error: FlexiFlowError, level: str = "error", *step: str) -> None:
        """Note a problem of what the walk looks at, or of what is a step further."""
        if not isinstance(error, (ConfigError, ImportError_)):  # a delay, the numbers of a retry
            error = ConfigError(error.what, why=error.why, fix=error.fix)
        steps = (f"[{key}]" if isinstance(key, int) else f".{key}"
            for key in (*self.place, *step) if key is not None)
        place, context = "".join(steps)[1:], dict(error.context.items)
        if place:
            error.what, context["at"] = f"{place}: {error.what}", place
        found = self.found.errors if level == "error" else self.found.warnings
        found.append(Diagnostic(level, error.what, error.why, error.fix, context, error))

    def _each(self, parts: Iterable[tuple[Any, Any]], compiled: Callable[[Any, Any], Any]) -> Json:
        """Compile parts, each at its place, from its key and value; return the good ones by key.

        What is raised for one is reported, and the walk goes on with the next.
        """
        good: Json = {}
        for key, value in parts:
            self.place.append(key)
            try:
                good[key] = compiled(key, value)
            except FlexiFlowError as error:
                self._report(error)
            self.place.pop()
        return good

    def _clean(self, kind: str, value: Any, **compilers: Callable[[Any], Any]) -> Json:
        """Return the known keys of an object, their values compiled; report the rest.

        null is as good as nothing. Where a list may stand for one, the value is a tuple.
        """
        _require(value, "an object")
        known, given = KEYS[kind], {**_DEFAULTS.get(kind, {})}
        given.update((key, inner) for key, inner in value.items() if inner is not None)
        for key in value:
            if key not in known and not key.startswith("x-"):
                near = [one for one in known if one_edit(key.lower(), one)]
                level = _STRANGE_KEYS.get(kind, ("error", "error"))[not near]
                if level:
                    fix = f"did you mean {near[0]!r}?" if near else choose(key, known)
                    self._report(ConfigError(f"Unknown key: {key!r}", why=_WHY_STRANGE.get(kind),
                        fix=fix), level, key)
        for key in _REQUIRED.get(kind, ()):
            if given.get(key) in (None, ""):
                self._report(ConfigError("No 'name'", fix='add "name": "order" to the config')
                    if kind == "config" else ConfigError(f"No {key!r} in {value!r}"))

        def compiled(key: str, inner: Any) -> Any:
            _require(inner, known[key])
            compiler = compilers.get(key) or self.compilers.get(key) or (lambda value: value)
            if not known[key].endswith(" or a list"):
                return compiler(inner)
            _need(inner or key in _EFFECTS, "Not a name or a list of names: %r", inner)
            parts = enumerate(inner) if isinstance(inner, list) else [(None, inner)]
            return tuple(self._each(parts, lambda _, part: compiler(part)).values())

        return self._each(((key, given[key]) for key in known if key in given), compiled)

    def _values(self, value: Json) -> tuple[Any, ...]:
        return tuple(self._each(value.items(), lambda _, inner: compile_value(inner)).items())

    def _load(self, path: Any) -> Any:
        """Import a dotted path; where imports are off, note it and let State stand for it."""
        _need(isinstance(path, str), "Not a dotted path: %r", path)
        self.has_code = True
        if self.imports or ":" not in path:
            return load_symbol(path, self.allow_imports)
        self.found.unchecked.append(path)
        return State  # which is callable, as functions are

    def _read(self) -> None:
        """Read the config and copy it, once it is known to be an object of JSON."""
        if isinstance(self.config, (str, os.PathLike)):
            self.config = read_config(self.config)
        _need(isinstance(self.config, dict), "A config is an object",
            why=f"this is a {type(self.config).__name__}")
        try:
            write_json(self.config, "config")
        except ValueError as error:
            hint = 'in YAML, put "on" in quotes' if "the key True" in str(error) else None
            raise ConfigError("The config is not JSON", why=str(error), fix=hint) from error
        # Dicts and lists of our own. A message's keys are interned where code names them, so that
        # ours are found there by identity.
        self.config = json.loads(json.dumps(self.config), object_pairs_hook=lambda pairs: {
            sys.intern(key): value for key, value in pairs})

    def _policy(self, order: list[Any]) -> None:
        _need(order in (["packs", "builtin"], ["builtin", "packs"]), "Not an order of resolution: "
            "%r", order, fix='["packs", "builtin"] or ["builtin", "packs"]')
        self.found.policy = order

    def _packs(self, paths: list[Any]) -> None:
        if not self.imports:
            self.found.unchecked += map(str, paths)
            return
        loaded = self._each(enumerate(paths), self._pack)
        for collision in pack_collisions([*loaded.values()], set()):
            self._report(collision)

    def _pack(self, index: int, path: Any) -> StatePack:
        """Add the states of a pack."""
        pack, found = load_pack(path, self.allow_imports), self.found
        try:
            classes = {str(key): spec.state_class for key, spec in pack.provides().items()}
            found.packs.append((pack.name, sorted(classes), list(pack.transitions()),
                sorted(map(str, pack.depends_on()))))
        except Exception as error:  # it is anybody's code
            raise ConfigError(
                "A pack does not work", why=f"{type(error).__name__}: {said(error)}") from error
        taken = {*found.providers, *(BUILT_IN_NAMES if found.policy[0] == "builtin" else ())}
        self._each([(key, cls) for key, cls in classes.items() if key not in taken], self._add)
        found.providers = {**dict.fromkeys(classes, pack.name), **found.providers}
        return pack

    def _add(self, name: str, cls: Any, **declared: Any) -> None:
        """Add a state that is a class; of DeclaredState and State it gets a subclass of its own."""
        _need(name not in ("", "*") and "\0" not in name, "Not a name for a state: %r", name)
        if cls is DeclaredState or cls is State:
            cls = type(name, (cls,), {})
        _need(isinstance(cls, type) and issubclass(cls, State), "Not a State class", state=name,
            why=f"it is {cls!r}", fix="inherit from State")
        owner = self.registry._names.get(cls)  # of its own, not of those around it
        _need(owner is None, "One class for two states: %r and %r", owner, name, why="a saved "
            "state could not be told from the other", fix="make a subclass for one of them")
        _need(name not in self.nodes, "State %r is provided by a pack too", name)
        self.nodes[name] = Node(name, cls, **declared)
        self.registry.register(name, cls)

    def _states(self, states: Json) -> None:
        self._each(states.items(), self._state)
        above: list[Node] = []  # what surrounds the next one, outermost first
        for name in sorted(self.nodes, key=lambda name: name.split(".")):
            while above and not name.startswith(above[-1].name + "."):
                above.pop()
            self.nodes[name].around = above[::-1]
            above.append(self.nodes[name])
        for node in self.nodes.values():
            if node.around:
                node.around[0].children.append(node)
        self._each(self.nodes.items(), self._family)

    def _state(self, key: str, value: Any) -> str:
        """Add a state: an object declares one, text is the dotted path of a class."""
        _require(value, "an object or text")
        self.found.states[key] = value if isinstance(value, str) else None
        if isinstance(value, dict):
            self._add(key, DeclaredState, **self._clean("state", value))
        else:
            self._add(key, self._load(value))
        return key

    def _family(self, name: str, node: Node) -> None:
        """Raise unless what a state says of its children is so."""
        children = [child.name for child in node.children]
        _need(node.declared or not children, "%r is a class, so it has no children", name)
        _need(not (children and node.final), "A final state has no children")
        if node.initial not in (children or (None,)):  # who has no children names none
            what = f"Unknown child: {node.initial!r}" if node.initial else "No 'initial' child"
            self._report(ConfigError(what if children else f"{name!r} has no children",
                fix=choose(node.initial or "", children) if children else None), "error", "initial")

    def _initial(self, name: str) -> str:
        """Return the name of the initial state; a dotted path to a class adds it."""
        if ":" in name and name not in self.nodes:
            named = [key for key, path in self.found.states.items() if path == name]
            name = named[0] if named else self._state(re.split("[:.]", name)[-1].strip(), name)
        return self._find(name)

    def _find(self, name: str) -> str:
        """Return the name of a state; a registered one is added when it is first named."""
        if name in self.nodes:
            return name
        cls = self.registry.get(name)
        if cls is None and self.config.get("packs") and not self.imports:
            cls = State  # a pack may provide it
        if cls is None or cls is self.hidden.get(name):
            few = len(self.found.errors) < 20  # to look for a thousand would take a minute
            close = choose(name, {*self.nodes, *BUILT_IN_NAMES}) if few else None
            raise ConfigError(f"Unknown state: {name!r}", fix=close)
        self._add(name, cls)
        for other in BUILT_IN if cls in BUILT_IN else ():  # one leads to the others
            if other not in self.registry._names and other.__name__ not in self.nodes:
                self._add(other.__name__, other)
        return name

    def _renamed(self, old: str, new: Any) -> None:
        """Check what became of an old state: it leads to one of today's, and is none itself."""
        _require(new, "text")
        _need(old not in self.nodes, f"{old!r} is a state still")
        _not_empty(old)
        self._find(new)

    def _rules(self, rules: list[Any]) -> list[Any]:
        if not rules:
            self._report(ConfigError("No rules defined"), "warning")
        self._each(enumerate(rules), self._rule)
        return rules

    def _rule(self, number: int, text: Any) -> None:
        """Compile a rule. One without a key of the engine is a note, and only looked at."""
        _require(text, "an object")
        if _EXECUTING.keys().isdisjoint(text):
            self._clean("note", text)
            return
        errors_before = len(self.found.errors)
        rule = self._clean("rule", text)
        on, after = (text.get(key) is not None for key in ("on", "after"))
        _need(on != after, "A rule with both 'on' and 'after'" if on else
            "A rule with neither 'on' nor 'after'", fix="one rule for a message, one for a timer")
        if len(self.found.errors) > errors_before:
            return
        pairs = [*itertools.product(rule["from"], rule.get("on", ()))]
        if pairs and all(pair in self.taken for pair in pairs):
            raise ConfigError("This rule can never fire",
                why=f"rules[{min(self.taken[pair] for pair in pairs)}] takes its messages before "
                "and has no guard", fix="give that one a guard, or put this one before it")
        if "guard" not in rule:
            self.taken.update({pair: number for pair in pairs if pair not in self.taken})
        effects = Effects(**{key: rule.pop(key) for key in _EFFECTS if key in rule})
        self.rules.append(Rule(number, text, rule.pop("from"), effects, **rule))

    def _action(self, path: Any) -> Any:
        action = self._load(path)
        _need(callable(action), "Not a function: %r", path, why=f"it is {action!r}")
        return action

    def _emit(self, part: Any) -> tuple[str, Callable[[Scope], Any] | None]:
        event = self._clean("emit", {"name": part} if isinstance(part, str) else part,
            **{"with": compile_value})
        name = event.get("name", "")
        _need(name not in ENGINE_EVENTS, "An event of the engine's own: %r", name,
            fix="emit under another name")
        return name, event.get("with")

    def _send(self, part: Any) -> Callable[[Scope], Outgoing]:
        found: Any = self._clean("send", part, to=compile_value)
        to, kind, id, delay, payload = map(found.get, ("to", "type", "id", "after", "with"))
        for key, _ in payload or ():
            _need(key not in ("type", "id", "correlation_id", "component")
                and (len(payload) > 1 or key not in OPERATIONS), "%r cannot stand in 'with'", key)

        def send(scope: Scope) -> Outgoing:
            message = {"type": kind(scope), **{key: value(scope) for key, value in payload}}
            out = Outgoing(to(scope), message, seconds(delay(scope)), id and id(scope))
            if not all(map(_is_name, [out.to, message["type"], out.id if id else "-"])):
                raise StateError(f"Cannot send {message!r} to {out.to!r} with id {out.id!r}",
                    why="'to', 'type' and 'id' are text", component=scope["component"])
            return out

        return send


def _as_error(errors: list[Diagnostic], path: str | None) -> FlexiFlowError:
    """Return the first of the errors, ready to be raised, that names the others.

    `path` is the config's, or None where the error speaks of the file itself.
    """
    error: FlexiFlowError = errors[0].error
    values = {"config": path, "also": [other.what for other in errors[1:6]]}
    error.context.items.update((key, value) for key, value in values.items() if value)
    return error


def _walked(config: Any, **how: Any) -> _Walk:
    """Return the walk over a good config; raise the first error found. `how`: see `_Walk`."""
    walk = _Walk(config, **how)
    if walk.problems().errors:
        raise _as_error(walk.found.errors, None if walk.config is config else walk.found.path)
    return walk


class ConfigLoader:
    """Read and check configs."""

    @staticmethod
    def load_component_config(config: Path | Json | ComponentConfig, *,
            allow_imports: Sequence[str] | None = None) -> ComponentConfig:
        """Return a checked config from a path or a dict; raise the first error found in it.

        State classes it names are added to DEFAULT_REGISTRY where their names are free there.
        """
        if isinstance(config, ComponentConfig):
            if config.definition is not None:
                return config
            config = {key: value for key, value in vars(config).items() if key != "definition"}
        walk = _walked(config, allow_imports=allow_imports)
        good, known = walk.good, DEFAULT_REGISTRY
        for name, node in walk.nodes.items():
            if not (node.declared or node.cls in known._names or known.get(name)):
                known.register(name, node.cls)
                _FROM_CONFIGS[name] = node.cls
        return ComponentConfig(good["name"], fresh(good["rules"]), good["initial_state"],
            good.get("data", {}), walk.found.definition)

    @staticmethod
    def load_yaml(path: Path) -> Json:
        """Return the object in a config file, JSON or YAML, unchecked."""
        content = read_config(path)
        _need(isinstance(content, dict), "A config is an object: %r", os.fspath(path))
        return content  # type: ignore[no-any-return]

    @staticmethod
    def load_rules(path: Path) -> list[Json]:
        """Return the rules in a file: a list, or an object with `rules`."""
        content = read_config(path)
        rules = content.get("rules") or [] if isinstance(content, dict) else content
        _need(isinstance(rules, list), "No list of rules in %r", os.fspath(path),
            fix='{"rules": [...]}')
        return rules


# --------------------------------------------------------------------------------------------
# 9. Snapshots: JSON file, SQLite history
# --------------------------------------------------------------------------------------------
# 1.0.1's way to save a component: one JSON file, or a growing table in the caller's database.
# A file is the old one or the new one, never half; what comes back is what was saved, or an
# error. An engine with a store (section 10) needs none of this.

_SNAPSHOT_SCHEMA = """
CREATE TABLE IF NOT EXISTS flexiflow_snapshots(id INTEGER PRIMARY KEY AUTOINCREMENT,
    component_name TEXT NOT NULL, created_at TEXT NOT NULL, current_state TEXT,
    snapshot_json TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS flexiflow_snapshots_component ON flexiflow_snapshots(component_name);
ALTER TABLE flexiflow_snapshots ADD COLUMN current_state TEXT
"""


@dataclass(frozen=True)
class ComponentSnapshot:
    """A component at one moment; everything in it is JSON."""

    name: str
    current_state: str
    rules: list[Json]
    metadata: Json  # the caller's own, carried along
    data: Json = field(default_factory=dict)
    attributes: Json = field(default_factory=dict)  # of a class-based state's object
    states: Json = field(default_factory=dict)  # as they are declared; classes stay in the code
    id: int | None = field(default=None, compare=False)  # of the row it was loaded from


_SNAPSHOT_FIELDS: dict[str, type] = {"name": str, "current_state": str, "rules": list,
    "metadata": dict, "data": dict, "attributes": dict, "states": dict}


def take_snapshot(component: Any, metadata: Json | None = None) -> ComponentSnapshot:
    """Return a component as a snapshot; `metadata` defaults to what it was restored with."""
    state = component.state_machine.current_state
    states = component.definition.source.get("states") if component.definition else None
    return ComponentSnapshot(component.name, component.state_machine.registry.name_of(state),
        fresh(component.rules), dict(component.metadata or {} if metadata is None else metadata),
        component.data, dict(getattr(state, "__dict__", {})),
        {name: fresh(body) for name, body in (states or {}).items() if isinstance(body, dict)})


def _snapshot_text(snapshot: ComponentSnapshot) -> str:
    """Return a snapshot as JSON that begins with the checksum of the rest."""
    content = {name: getattr(snapshot, name) for name in _SNAPSHOT_FIELDS}
    text = _written(content, f"snapshot of {snapshot.name}", MAX_JSON - 24)  # for the checksum
    return f'{{"checksum":{checksum(text)},{text[1:]}'


def _snapshot_from(text: str | bytes, source: str, id: int | None = None) -> ComponentSnapshot:
    octets = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    head, _, rest = octets.partition(b",")
    # As `_snapshot_text` made it, it need not be looked at closely; one edited by hand is.
    whole = head == b'{"checksum":%d' % zlib.crc32(b"{" + rest)
    content = json.loads(b"{" + rest) if whole else read_json(text, source, PersistenceError)
    if not isinstance(content, dict):
        raise PersistenceError(f"Not an object: {source}")
    crc = content.pop("checksum", None)
    if crc is not None and checksum(_encode(content)) != crc:
        raise PersistenceError(f"Damaged snapshot: {source}", why="its checksum does not fit",
            fix="use an older one")
    fields: dict[str, Any] = {}
    for name, kind in _SNAPSHOT_FIELDS.items():
        fields[name] = value = content.get(name, kind())
        if not isinstance(value, kind) or (kind is str and not value):
            raise PersistenceError(f"No good {name!r} in {source}", why=f"it is {value!r}")
    return ComponentSnapshot(**fields, id=id)


@functools.cache
def _sweep(folder: str) -> None:
    """Remove what crashed processes left aside; being cached, it looks once in each folder."""
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        if re.fullmatch(r"\..+\.\d+\.tmp", entry.name):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > 60:
                    os.unlink(entry.path)


def _sync(path: str) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name != "nt":  # there, a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Name a file beside another one to write into: at the end it takes the other's place."""
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.{os.getpid()}{threading.get_ident()}.tmp")
    _sweep(folder)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def write_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file by another, durably: write aside, fsync, rename, fsync the folder.

    A new file is its owner's, as data is; `mode` lets others read what is no secret.
    """
    fix = "the old file is untouched"
    try:
        # A link itself must not be replaced; links among the folders do no harm.
        target = os.path.realpath(path) if os.path.islink(path) else os.path.join(".", path)
        is_new, (folder, name) = not os.path.exists(target), os.path.split(target)
        if not (name and (is_new or os.path.isfile(target))):
            raise OSError("it is a folder, or a device, which must not be replaced")
        os.makedirs(folder, exist_ok=True)
        mode = mode if is_new else os.stat(target).st_mode & 0o777
        opener = functools.partial(os.open, mode=mode)
        with _replacing(target) as aside, open(aside, "wb", opener=opener) as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        fix = "the new file is there, but might not survive a power cut"
        _sync(folder)
    except (OSError, ValueError) as error:
        raise PersistenceError(
            f"Cannot write {os.fspath(path)!r}", why=str(error), fix=fix) from error


def save_component(component: Any, path: Path, metadata: Json | None = None) -> None:
    """Save a component as a JSON file, durably; a crash leaves the old file or the new one."""
    write_file(path, _snapshot_text(take_snapshot(component, metadata)) + "\n")


def load_snapshot(path: Path) -> ComponentSnapshot:
    """Read a snapshot file; raise PersistenceError, also a FileNotFoundError if there is none."""
    text = read_file(path, "snapshot", PersistenceError, MissingSnapshot)
    return _snapshot_from(text.rstrip(b"\n"), os.fspath(path))


def restore_component(snapshot: ComponentSnapshot, engine: Any,
        registry: StateRegistry | None = None) -> Any:
    """Make a component from a snapshot and register it; raise StateError for an unknown state.

    Declared states come with the snapshot; classes are looked up in `registry`.
    """
    known = StateRegistry(DEFAULT_REGISTRY if registry is None else registry)
    for name in snapshot.states:
        known.register(name, type(name, (DeclaredState,), {}))
    state = known.create(snapshot.current_state)
    vars(state).update(fresh(snapshot.attributes))
    return engine.restore(snapshot, StateMachine(state, known))


def _execute(conn: sqlite3.Connection, sql: str, *values: Any) -> Any:
    """Execute a statement in the caller's database; return its `rows`, `count` and `id`.

    A change is committed, unless the caller has a transaction open: then that decides. Without
    the table, or without the column that 1.0.1's has not, there are no rows and a count of None.
    """
    try:
        with contextlib.nullcontext() if conn.in_transaction else conn:
            cursor = conn.execute(sql, values)
            return types.SimpleNamespace(rows=cursor.fetchall(), count=cursor.rowcount,
                id=cursor.lastrowid)
    except sqlite3.Error as error:
        if re.search("no such table|current_state", str(error)):
            return types.SimpleNamespace(rows=[], count=None, id=None)
        raise PersistenceError("The database failed", why=str(error)) from error


def save_snapshot_sqlite(conn: sqlite3.Connection, snapshot: ComponentSnapshot, *,
        created_at: datetime.datetime | None = None, expect: int | None = None) -> int:
    """Append a snapshot to the caller's database and return its id.

    It is committed, unless the caller has a transaction open: then that decides. With `expect`,
    the id of the snapshot this one follows, a newer one by somebody else is a PersistenceError.
    """
    insert = functools.partial(_execute, conn, "INSERT INTO flexiflow_snapshots"
        "(component_name, created_at, current_state, snapshot_json) SELECT ?,?,?,? WHERE"
        " ? IS NULL OR ?=(SELECT MAX(id) FROM flexiflow_snapshots WHERE component_name=?)",
        snapshot.name, (created_at or datetime.datetime.now(datetime.timezone.utc)).isoformat(),
        snapshot.current_state, _snapshot_text(snapshot), expect, expect, snapshot.name)
    saved = insert()
    if saved.count is None:
        for statement in _SNAPSHOT_SCHEMA.split(";\n"):
            _execute(conn, statement)
        saved = insert()
    if not saved.count:
        raise PersistenceError(f"A newer snapshot of {snapshot.name!r} exists than {expect}",
            why="somebody else has saved meanwhile", fix="load it, and apply your change to that")
    return int(saved.id)


def load_latest_snapshot_sqlite(conn: sqlite3.Connection,
        component_name: str) -> ComponentSnapshot | None:
    """Return the snapshot that was saved last, whatever the clock said; None if there is none."""
    for id, text in _execute(conn, "SELECT id, snapshot_json FROM flexiflow_snapshots"
            " WHERE component_name=? ORDER BY id DESC LIMIT 1", component_name).rows:
        return _snapshot_from(text, f"snapshot of {component_name!r}", id)
    return None


def _state_in(text: str) -> str:
    """Read the state out of a snapshot of 1.0.1."""
    try:
        return _snapshot_from(text, "snapshot").current_state
    except PersistenceError:
        return "invalid"


def list_snapshots_sqlite(conn: sqlite3.Connection, component_name: str, *,
        limit: int = 10) -> list[Json]:
    """Return `id`, `created_at` and `current_state` of the latest snapshots, newest first."""
    sql = ("SELECT id, created_at, {0}, CASE WHEN {0} IS NULL THEN snapshot_json END"
        " FROM flexiflow_snapshots WHERE component_name=? ORDER BY id DESC LIMIT ?")
    found = _execute(conn, sql.format("current_state"), component_name, limit)
    if found.count is None:
        found = _execute(conn, sql.format("NULL"), component_name, limit)
    return [{"id": id, "created_at": at, "current_state": state or _state_in(text)}
        for id, at, state, text in found.rows]


def prune_snapshots_sqlite(conn: sqlite3.Connection, component_name: str, *,
        keep_last: int = 10) -> int:
    """Delete all but the `keep_last` snapshots that were saved last; return how many went."""
    check_count("keep_last", keep_last)
    return _execute(conn, "DELETE FROM flexiflow_snapshots WHERE component_name=? AND id<="
        "(SELECT id FROM flexiflow_snapshots WHERE component_name=? ORDER BY id DESC"
        " LIMIT 1 OFFSET ?)", component_name, component_name, keep_last).count or 0


# The names that these have in 1.0.1's module extras.persist_sqlite.
save_snapshot, load_latest_snapshot = save_snapshot_sqlite, load_latest_snapshot_sqlite
list_snapshots, prune_snapshots = list_snapshots_sqlite, prune_snapshots_sqlite


# --------------------------------------------------------------------------------------------
# 10. Store: schema, the one write, views
# --------------------------------------------------------------------------------------------
# One SQLite file keeps every component, its journal and its queue. Every change goes through
# `write`: a check and rows, in one transaction with whatever else is ready; what `write` has
# returned is on disk. Every row that is believed later carries a checksum, so that a damaged
# file gives the same answer or an error. Nothing awaits within a transaction.

SCHEMA_VERSION = 2  # in 1, the checksum of a message was made from _MESSAGE_1
# components: seq is its version, and the number of its last journal row; since: active state ->
# time of its entry; owner, lease: whose engine runs its code, and until when. journal: receipt is
# [outcome, from, to, reason]; data: where it changed; prior: crc of the row before. messages:
# queue, timers and dead letters; number: never given twice, for workers act by it on what they
# have read; place: order of delivery, once it is due; state, rule: of a timer; error: of the last
# attempt, {error, traceback, state, attempts, intact}; dead: when it was given up.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS flexiflow_definitions(hash TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS flexiflow_components(name TEXT PRIMARY KEY, definition TEXT NOT NULL,
    state TEXT NOT NULL, attributes TEXT, data TEXT NOT NULL, seq INTEGER NOT NULL,
    since TEXT NOT NULL, completed REAL, crc INTEGER NOT NULL, owner TEXT, lease REAL)
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS flexiflow_components_owner ON flexiflow_components(owner)
    WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS flexiflow_journal(number INTEGER PRIMARY KEY, component TEXT NOT NULL,
    seq INTEGER NOT NULL, message_id TEXT NOT NULL, correlation_id TEXT, message TEXT NOT NULL,
    receipt TEXT NOT NULL, data TEXT, time REAL NOT NULL, prior INTEGER NOT NULL,
    crc INTEGER NOT NULL, UNIQUE(component, seq), UNIQUE(component, message_id));
CREATE TABLE IF NOT EXISTS flexiflow_messages(number INTEGER PRIMARY KEY AUTOINCREMENT,
    component TEXT NOT NULL, message_id TEXT NOT NULL, correlation_id TEXT, message TEXT NOT NULL,
    due REAL NOT NULL, state TEXT, rule INTEGER, place INTEGER, attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT, sent REAL NOT NULL, dead REAL, crc INTEGER NOT NULL, UNIQUE(component,message_id));
CREATE INDEX IF NOT EXISTS flexiflow_messages_due ON flexiflow_messages(due, number)
    WHERE place IS NULL AND dead IS NULL;
CREATE INDEX IF NOT EXISTS flexiflow_messages_place ON flexiflow_messages(place)
    WHERE place IS NOT NULL;
"""
BUSY_LIMIT = 30.0  # seconds that a write waits for other processes
LOG_LIMIT = 1 << 24  # bytes that the write-ahead log keeps when a long reader has ended
SLOW_COMMIT = 0.001  # seconds; a mean above sends COMMIT to a thread
# What the checksums of a component, a journal row and a message are made from, in this order.
_HEAD = ("definition", "state", "attributes", "data", "seq", "since", "completed")
_ENTRY = ("component", "seq", "id", "correlation_id", "message", "receipt", "data", "time")
_MESSAGE_1 = ("component", "id", "correlation_id", "message", "due", "state", "rule")
_MESSAGE = (*_MESSAGE_1, "place", "attempts", "error", "sent", "dead")
_FIXES = {"full": "free some space on the disk; nothing that was acknowledged is lost",
    "readonly": "make the file and its folder writable",
    "locked": "another process holds the file; try again",
    "malformed": "the file is damaged; restore a backup",
    "not a database": "this is no SQLite file, or a damaged one",
    "unable to open": "check the path, and that the folder is writable",
    "_sqlite3": "this Python has no SQLite; use FlexiFlowEngine(store=None)"}


def _columns(keys: Sequence[str]) -> str:
    return ", ".join("message_id" if key == "id" else key for key in keys)


def _update_queue(**changed: str) -> str:
    """Return an UPDATE of the queue, without its WHERE, that sets columns to SQL expressions.

    Checksums are made of what is there by then, whoever has changed it; damage stays visible.
    """
    def seal(keys: Sequence[str], **new: str) -> str:
        columns = _columns(keys).split(", ")  # text comes as bytes: it may be damaged
        return "checksum({})".format(", ".join(new.get(one) or (
            f"IIF(typeof({one})='text', CAST({one} AS BLOB), {one})") for one in columns))

    return (f"UPDATE flexiflow_messages SET {', '.join(map('='.join, changed.items()))}, crc=CASE"
        f" WHEN crc={seal(_MESSAGE)} OR crc={seal(_MESSAGE_1)}"
        f" THEN {seal(_MESSAGE, **changed)} ELSE crc END")


_QUEUE_ROW = (*_MESSAGE, "number", "crc")
_READ_QUEUE = f"SELECT {_columns(_QUEUE_ROW)} FROM flexiflow_messages WHERE"


class IdTaken(StateError):
    """An id that stands for another message already."""


def id_taken(component: Any, id: Any, **values: Any) -> StateError:
    """Return the error for the id of another message to a component."""
    return IdTaken(f"The id {id!r} was used for another message to {component!r}",
        why="an id stands for one message, its type and payload included",
        fix="send the new message under a new id", **values)


def _pause() -> float:
    """Return how long to wait for other processes: SQLite's own way of waiting starves writers."""
    return random.uniform(0.0005, 0.02)


def _fits(crc: Any, *parts: Any, start: Any = 0) -> bool:
    """Tell whether a row is as it was written; `start` is the crc of the one before it."""
    return isinstance(start, int) and checksum(*parts, start=start) == crc


def _intact(row: Json) -> bool:
    """Tell whether a row of the queue is as it was written."""
    return any(_fits(row["crc"], *map(row.get, keys)) for keys in (_MESSAGE, _MESSAGE_1))


def _is_busy(error: Exception, since: float) -> bool:
    """Tell whether another process has the file, and has not had it for too long."""
    busy = re.search("locked|busy", str(error)) and not isinstance(error, FlexiFlowError)
    return bool(busy) and time.monotonic() - since <= BUSY_LIMIT


class SQLiteStore:
    """A store in one SQLite file, for one process and one event loop; others open it as well.

    `synchronous` is "FULL" (an acknowledged message survives a power cut) or "NORMAL" (it
    survives a killed process). The file is made at the first use, unless `readonly`.
    """

    def __init__(self, path: Path, synchronous: str = "FULL", *, readonly: bool = False) -> None:
        if synchronous not in ("FULL", "NORMAL"):
            raise ArgumentError(f"Unknown synchronous: {synchronous!r}", fix="FULL or NORMAL")
        self.path, self.synchronous, self.readonly = os.fspath(path), synchronous, readonly
        # Where it lies, whatever folder the process is in by then.
        self.file = self.path if self.path == ":memory:" else os.path.abspath(self.path)
        self._connection: sqlite3.Connection | None = None
        self._last: Any = lambda: None  # closes it, once
        self._process = self._thread = 0  # that opened it; and in which its loop runs
        self._loop: Any = None
        self._waiting: list[Any] = []  # writes: namespaces of check, rows, done, future, answer
        self._flushing, self._lock = False, threading.RLock()
        self._committing: asyncio.Future[Any] | None = None  # while a thread commits
        # Seconds that a commit takes of late; and when the files were looked at.
        self._mean = self._looked = 0.0

    def close(self) -> None:
        """Close the file; a write that still waits fails."""
        self._connection = None
        with self._lock:  # a COMMIT may be under way in its thread
            self._last()
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._settle(waiting, PersistenceError(f"Store {self.path!r} was closed"))

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, opened at first use."""
        if self._connection is None:
            with self._translated():
                self._connection = self._open("?mode=ro" if self.readonly else "")
                self._process = os.getpid()
            # A store that is dropped closes its file, but not one that a parent process opened.
            self._last = weakref.finalize(self, lambda connection, process: connection.close()
                if process == os.getpid() else None, self._connection, self._process)
            self._last.atexit = False
        if self._thread != threading.get_ident() and self._loop and self._loop.is_running():
            raise PersistenceError(f"Store {self.path!r} is in use by another thread",
                fix="make an engine of its own in each thread")
        if self._process != os.getpid():
            # Closing or using it here would break the parent's locks (sqlite.org/howtocorrupt).
            raise PersistenceError(f"Store {self.path!r} was opened before a fork",
                fix="make an engine of its own in each process")
        if time.monotonic() - self._looked > 0.01:  # not each time: it makes an fsync slower
            for path, opened in self._files:  # SQLite would go on with what has no name any more
                if not (os.path.exists(path) and os.path.samestat(os.stat(path), opened)):
                    raise PersistenceError(f"Store {self.path!r} was moved, deleted or replaced",
                        fix=f"put {path} back; or take its old -wal away as well, and start again")
            self._looked = time.monotonic()
        return self._connection

    # ---- the one write

    def write(self, check: Callable[..., Any] | None, rows: Sequence[Row],
            done: Callable[[], Any] | None = None) -> asyncio.Future[Any]:
        """Carry out `rows` in a transaction, if `check(execute)` returns None; its answer comes.

        Writes that are ready in one pass of the loop share a transaction, in their order.
        `done()` is called as soon as the commit is known, also when nobody waits any more. A
        write that is cancelled before its transaction begins is not carried out. The future
        raises PersistenceError, or StateError for an id that another message has; after a failed
        COMMIT the outcome is unknown, and the same message id may be sent again.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._flushing and self._loop.is_running():
                raise PersistenceError(f"Store {self.path!r} is in use by another event loop",
                    fix="make an engine of its own in each thread")
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")  # left behind by a loop that is over
            self._loop, self._waiting, self._flushing = loop, [], False
            self._thread = threading.get_ident()
        future = loop.create_future()
        self._waiting.append(types.SimpleNamespace(
            check=check, rows=rows, done=done, future=future, answer=None))
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        return future

    async def settled(self) -> None:
        """Wait while a thread commits: what is read meanwhile would hold up the loop."""
        if self._committing is not None and self._loop is asyncio.get_running_loop():
            await asyncio.wait([self._committing])

    def _flush(self, since: float = 0.0) -> None:
        """Carry out and commit all that waits, or come back when the file is free."""
        try:
            self._carry_out(since)
        except BaseException:  # Ctrl-C in the middle: who waits is cancelled, or carried out now
            with contextlib.suppress(Exception):
                self.db.execute("ROLLBACK")
            self._loop.call_soon(self._flush)
            raise

    def _carry_out(self, since: float) -> None:
        batch = self._waiting = [write for write in self._waiting if not write.future.done()]
        self._flushing = bool(batch)
        if not batch:
            return
        since = since or time.monotonic()
        try:
            db = self.db
            db.execute("BEGIN IMMEDIATE")
        except Exception as error:
            if _is_busy(error, since):
                self._loop.call_later(_pause(), self._flush, since)
            else:
                self._settle(batch, error)
            return
        for write in batch:
            try:
                write.answer = write.check(db.execute) if write.check else None
                for sql, values in write.rows if write.answer is None else ():
                    db.execute(sql, values)
            except Exception as error:  # the others are carried out without it
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                    db.execute("ROLLBACK")
                clash = "UNIQUE constraint failed: flexiflow_messages" in str(error)
                self._settle([write], id_taken(*values[:2]) if clash else error)
                return
        self._waiting = []
        if self._mean > SLOW_COMMIT:
            with contextlib.suppress(RuntimeError):  # no threads here: commit in the loop
                self._committing = self._loop.run_in_executor(None, self._commit, db)
                self._committing.add_done_callback(
                    lambda done: self._settle(batch, done.result(), True))
                return
        self._settle(batch, self._commit(db), True)

    def _commit(self, db: sqlite3.Connection) -> Exception | None:
        """Commit, and return what went wrong; may run in a thread."""
        with self._lock:
            start = time.monotonic()
            try:
                # Without WAL, a reader can hold up a commit; the transaction stays open.
                self._insist(db.execute, "COMMIT")
            except Exception as error:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                return error
            self._mean += 0.1 * (time.monotonic() - start - self._mean)
        return None

    def _settle(self, batch: list[Any], failure: Exception | None, unknown: bool = False) -> None:
        """Tell every write of a batch how it went, and go on with those that wait by now."""
        self._committing = None
        for write in batch:
            if failure is None and write.answer is None and write.done is not None:
                write.done()
            if failure is not None and not write.future.done():
                write.future.set_exception(self._translate(failure, unknown))
            elif not write.future.done():
                write.future.set_result(write.answer)
        self._loop.call_soon(self._loop.call_soon, self._flush)  # first, who waits in `settled`

    def backup(self, path: str) -> None:
        """Copy the store as it is now into a new file, whole or not at all."""
        if path in ("", ":memory:"):
            raise ArgumentError(f"Not a file: {path!r}", fix="name a new one")
        for there in (path, f"{path}-wal", f"{path}-journal"):  # what SQLite would take with it
            if os.path.lexists(there):
                raise PersistenceError(f"There is a file already: {there!r}", fix="name a new one")
        with _replacing(os.path.join(".", path)) as aside:
            with contextlib.closing(sqlite3.connect(aside)) as copy_of_it:
                self.db.backup(copy_of_it)
            _sync(aside)
        _sync(os.path.dirname(path) or ".")

    # ---- opening and failing

    def _open(self, options: str) -> sqlite3.Connection:
        """Open the file; one in WAL mode on a read-only medium can only be read as if frozen."""
        if options and not os.path.isfile(self.file):
            raise PersistenceError(f"No store: {self.path!r}",
                fix="register a component first, or check the path")
        if os.path.isfile(self.file) and 0 < os.path.getsize(self.file) < 100:
            raise self.damaged("its header")  # SQLite takes a single byte for an empty file
        path = re.sub("[%?#]", lambda char: f"%{ord(char[0]):x}", self.file)
        db = sqlite3.connect(f"file:{path}{options}" if options else self.file, uri=bool(options),
            timeout=BUSY_LIMIT * self.readonly, isolation_level=None, check_same_thread=False)
        db.text_factory = lambda text: text.decode("utf-8", "replace")  # it may be damaged
        db.create_function("checksum", -1, lambda *parts: checksum(*[
            str(part, "utf-8", "replace") if isinstance(part, bytes) else part for part in parts]))
        try:
            self._set_up(db)
        except BaseException as error:
            db.close()
            log = os.path.realpath(self.file) + "-wal"  # without it, the file would say less
            frozen = options == "?mode=ro" and not (os.path.exists(log) and os.path.getsize(log))
            if frozen and re.search("unable to open|readonly", str(error)):
                return self._open("?mode=ro&immutable=1")
            raise
        return db

    def _set_up(self, db: sqlite3.Connection) -> None:
        """Check the schema's version, or make the schema where there is none; note the files."""
        self._insist(db.executescript, "PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON;"
            f" PRAGMA synchronous={self.synchronous}; PRAGMA journal_size_limit={LOG_LIMIT}")
        ((version,),) = self._insist(db.execute, "PRAGMA user_version")
        found = self._insist(db.execute, "SELECT sql, rootpage FROM sqlite_master")
        tables, roots = {sql for sql, _ in found}, [root for _, root in found if root]
        ours = any(sql and "flexiflow_" in sql for sql in tables)
        if (version == 0 and self.readonly) or (version and not ours):
            raise PersistenceError(f"Not a store: {self.path!r}",
                why="it is a database of something else" if found else "it is empty",
                fix="check the path" if found else "register a component")
        if version > SCHEMA_VERSION:
            raise PersistenceError(f"Store {self.path!r} was written by a newer FlexiFlow",
                why=f"its schema is version {version}, this file knows {SCHEMA_VERSION}",
                fix="use the newer flexiflow.py")
        schema = {*_SCHEMA.replace("IF NOT EXISTS ", "").strip(";\n").split(";\n")}
        if version and not (schema <= tables and len(roots) == len({*roots})):
            raise self.damaged("its schema")  # or two tables in one place: one would seem empty
        if not self.readonly:
            self._insist(db.execute, "PRAGMA journal_mode=WAL")
        if version < SCHEMA_VERSION and not self.readonly:
            self._insist(db.executescript, f"BEGIN IMMEDIATE; {_SCHEMA}"
                f" PRAGMA user_version={SCHEMA_VERSION}; COMMIT")
        ((*_, file), *_) = self._insist(db.execute, "PRAGMA database_list")  # "" for memory
        self._files = [(path, os.stat(path)) for path in (self.file,
            f"{file}-wal")[:2 - self.readonly] if file and os.path.exists(path)]

    @staticmethod
    def _insist(execute: Callable[[str], sqlite3.Cursor], sql: str) -> Any:
        """Execute a statement, waiting for other processes; return its rows."""
        start = time.monotonic()
        while True:
            try:
                return execute(sql).fetchall()
            except sqlite3.OperationalError as error:
                if not _is_busy(error, start):
                    raise
                time.sleep(_pause())

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what SQLite raises into PersistenceError."""
        try:
            yield
        except Exception as error:
            translated = self._translate(error)
            raise translated from translated.__cause__

    def _translate(self, error: Exception, unknown: bool = False) -> FlexiFlowError:
        if isinstance(error, FlexiFlowError):
            return error
        fix = next((fix for sign, fix in _FIXES.items() if sign in str(error)), None)
        if unknown:
            fix = "the outcome is unknown: repeat with the same id" + (f"; {fix}" if fix else "")
        translated = PersistenceError(
            f"Store {self.path!r} failed", why=f"{type(error).__name__}: {error}", fix=fix)
        translated.__cause__ = error
        return translated

    def damaged(self, what: str, **where: Any) -> PersistenceError:
        """Return the error for what is not as it was written."""
        return PersistenceError(f"Store {self.path!r} is damaged: {what}",
            why="it is not as it was written", fix="restore a backup", **where)

    # ---- views: what is read, each row checked

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Read one state of the file, whatever other processes do meanwhile."""
        with self._lock, contextlib.ExitStack() as stack:
            if not self.db.in_transaction:  # else this is within another, or a COMMIT waits for us
                self.rows("BEGIN")
                stack.callback(self.db.rollback)
            yield

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return what a SELECT finds."""
        with self._translated():
            return self.db.execute(sql, values).fetchall()

    def names(self) -> list[str]:
        """Return the names of all components, those of which only the history is left included."""
        # From name to name through the index: a long history costs nothing.
        after = "(SELECT MIN(component) FROM flexiflow_journal WHERE component > name)"
        names = [name for (name,) in self.rows(
            "SELECT name FROM flexiflow_components UNION SELECT * FROM (WITH RECURSIVE found(name)"
            f" AS (VALUES ('') UNION ALL SELECT {after} FROM found WHERE name IS NOT NULL)"
            " SELECT name FROM found WHERE name <> '') ORDER BY 1")]
        if not all(isinstance(name, str) for name in names):
            raise self.damaged("the name of a component")
        return names

    def head(self, name: str) -> Json | None:
        """Return a component's row as a dict, with `crc` and that of its last journal row, `chain`.

        What is JSON comes decoded; `data_text` is the data as it is stored.
        """
        # One statement reads one state of the file: another process may commit in between two.
        last = "(SELECT %s FROM flexiflow_journal WHERE component=asked ORDER BY seq DESC LIMIT 1)"
        ((found, *values, crc, last_seq, chain),) = self.rows(
            f"SELECT name, {', '.join(_HEAD)}, crc, {last % 'seq'}, {last % 'crc'}"
            " FROM (SELECT ? AS asked) LEFT JOIN flexiflow_components ON name=asked", (name,))
        if found is None and chain is None:
            return None
        head = dict(zip(_HEAD, values), name=name, chain=chain, crc=crc)
        if found is None:
            raise self.damaged(f"component {name!r} has only a history", component=name)
        if not _fits(crc, name, *values, start=chain) or head["seq"] != last_seq:
            raise self.damaged(f"component {name!r}", component=name)
        head["data_text"] = head["data"]
        for key in ("data", "since", "attributes"):
            head[key] = head[key] and json.loads(head[key])
        return head

    def definition(self, hash: str) -> Json:
        """Return the source of a stored definition."""
        found = self.rows("SELECT body FROM flexiflow_definitions WHERE hash=?", (hash,))
        if not found or hashlib.sha256(str(found[0][0]).encode()).hexdigest() != hash:
            raise self.damaged(f"definition {hash[:12]}")
        return json.loads(found[0][0])  # type: ignore[no-any-return]

    def journal(self, component: str | None = None, limit: int | None = None, where: str = "1",
            values: Sequence[Any] = ()) -> list[Json]:
        """Return journal rows as dicts, the newest first."""
        whole, order = component is not None and where == "1", "number"
        if component is not None:
            where, values, order = f"{where} AND component=?", (*values, component), "seq"
        found = self.rows(f"SELECT {_columns(_ENTRY)}, prior, crc, number FROM flexiflow_journal"
            f" WHERE {where} ORDER BY {order} DESC LIMIT COALESCE(?, -1)", (*values, limit))
        entries: list[Json] = []
        expected = None  # seq and crc of the row before, where none is left out
        for *fields, prior, crc, number in found:
            entry = dict(zip(_ENTRY, fields), number=number)
            if not _fits(crc, *fields, start=prior):
                raise self.damaged(f"journal row {number}", component=fields[0], seq=fields[1])
            if whole and expected not in (None, (entry["seq"], crc)):
                raise self.damaged(f"history of {component!r} has a gap", seq=entry["seq"])
            expected = (entry["seq"] - 1, prior)
            receipt = json.loads(entry.pop("receipt"))
            entry.update(zip(("outcome", "from_state", "to_state", "reason"), receipt))
            for key in ("message", "data"):
                entry[key] = entry[key] and json.loads(entry[key])
            entries.append(entry)
        return entries

    def message_row(self, now: float, component: str, id: str, correlation_id: str | None,
            text: str, due: float, state: str | None = None, rule: int | None = None) -> Row:
        """Return what puts a message, or the timer of a state, into the queue, without a place.

        Again the same adds nothing; another message of the same id is an error of the write.
        """
        fields = (component, id, correlation_id, text, due, state, rule, None, 0, None, now, None)
        insert = (f"INSERT INTO flexiflow_messages({_columns(_MESSAGE)}, crc)"
            " SELECT ?,?,?,?,?,?,?,?,?,?,?,?,? WHERE NOT EXISTS (SELECT 1 FROM"
            " flexiflow_messages WHERE component=? AND message_id=? AND message=?)")
        return insert, (*fields, checksum(*fields), component, id, text)

    def sealed(self, row: Json) -> Json:
        """Return a row of the queue with its message decoded; raise if it is not intact."""
        if not _intact(row):
            raise self.damaged(f"message {row['number']}")
        return {**row, "message": json.loads(row["message"])}

    def messages(self, where: str, values: Sequence[Any] = ()) -> list[Json]:
        """Return rows of the queue as dicts, unchecked and with the message as text."""
        return [dict(zip(_QUEUE_ROW, row)) for row in self.rows(f"{_READ_QUEUE} {where}", values)]

    def change_message(self, row: Json, **changed: Any) -> Row:
        """Return the UPDATE of a row of the queue."""
        sql = _update_queue(**{key: f":{key}" for key in changed})
        return f"{sql} WHERE number=:number", {**changed, "number": row["number"]}


# --------------------------------------------------------------------------------------------
# 11. Component and engine: turns, receipts, delivery, timers
# --------------------------------------------------------------------------------------------
# A component takes one message at a time, in the task of whoever hands it over. A turn decides,
# acts, commits, announces; what goes wrong before the commit leaves everything as if the message
# had not come. A message sent from within a component's own turn waits in the queue until that turn
# is over, so nothing nests and nothing deadlocks. Code runs under a claim, so that no other
# process runs it for the same message; rules alone are only checked when they are committed.

TURN_LIMIT = 30.0  # seconds that a message waits for its turn
LEASE = 30.0  # seconds that a claim holds unless it is renewed
DRAIN_LIMIT = 1000  # messages of its own that a component handles before the next stranger's
UNKNOWN_TARGET_LIMIT = 3600.0  # seconds that a message waits for its component to be made
_BATCH = 256  # rows of the queue that are read at a time
_ENVELOPE = ("id", "correlation_id", "component")  # keys of a message that are not its payload
# By its crc, a component that was removed and made anew is told from what it was.
_STAMP = "SELECT seq, crc FROM flexiflow_components WHERE name=?"
_UPDATE_HEAD = (f"UPDATE flexiflow_components SET {'=?, '.join(_HEAD)}=?, crc=?, owner=NULL,"
    " lease=NULL WHERE name=? AND seq=? AND crc=? AND ? IN (owner, '')")
_NEW_HEAD = (f"INSERT OR IGNORE INTO flexiflow_components({', '.join(_HEAD)}, crc, name)"
    " VALUES (?,?,?,?,?,?,?,?,?)")
_NEW_ENTRY = (f"INSERT INTO flexiflow_journal({_columns(_ENTRY)}, prior, crc)"
    " VALUES (?,?,?,?,?,?,?,?,?,?)")
_NEW_DEFINITION = "INSERT OR IGNORE INTO flexiflow_definitions(hash, body) VALUES (?,?)"
_NO_TIMERS = "DELETE FROM flexiflow_messages WHERE component=? AND state=? AND dead IS NULL"
# A dead timer of a state that is left belongs to no rule any more: given back, it is over.
_OLD_TIMERS = _update_queue(rule="NULL") + " WHERE component=? AND state=? AND dead NOT NULL"
_UNQUEUE = "DELETE FROM flexiflow_messages WHERE"
_NOT_PLACED = "place IS NULL AND dead IS NULL"
# What has come due runs in due order, and before what comes due later.
_GIVE_PLACES = (_update_queue(place="rank + (SELECT COALESCE(MAX(place), 0)"
    " FROM flexiflow_messages WHERE place IS NOT NULL)") + " FROM (SELECT number AS ranked,"
    " ROW_NUMBER() OVER (ORDER BY due, number) AS rank FROM flexiflow_messages"
    f" WHERE {_NOT_PLACED} AND due<=?) WHERE number=ranked")
_COUNT = (_update_queue(attempts="attempts + :by")
    + " WHERE component=:component AND message_id=:id AND place IS NOT NULL")
_CLAIM = "UPDATE flexiflow_components SET owner=?, lease=? WHERE name=?"
_RECLAIM = f"{_CLAIM} AND owner=?"
# Whose code another process runs. A lease further away than any can be is a clock that was set.
_CLAIMED = ("SELECT name FROM flexiflow_components WHERE owner IS NOT NULL AND owner<>? AND lease>?"
    " AND lease<=?")
# Of a component: its rows, the last one, the first one that is not old (if asked), its completion.
_SPAN = ("SELECT COUNT(*), CAST(COALESCE(MAX(seq), -1) AS INTEGER), (SELECT CAST(seq AS INTEGER)"
    " FROM flexiflow_journal WHERE ?2 AND component=?1 AND time>=?3 ORDER BY seq LIMIT 1), (SELECT"
    " completed FROM flexiflow_components WHERE name=?1) FROM flexiflow_journal WHERE component=?1")
_PAST = "SELECT message_id FROM flexiflow_journal WHERE component=? AND seq<? ORDER BY seq"
_FORGET = "DELETE FROM flexiflow_journal WHERE component=? AND seq<?"
_REMOVE = tuple(f"DELETE FROM flexiflow_{table} WHERE {column}=?" for table, column in (
    ("components", "name"), ("journal", "component"), ("messages", "component")))
_EMPTY: Json = {}  # shared by all components without data; never changed in place


# ----------------------------------------------------------------------------
# 11.1 Messages and receipts
# ----------------------------------------------------------------------------
# What is given to a component, and what comes back.


class Receipt(namedtuple("Receipt", "outcome component id from_state to_state seq reason data "
        "duplicate", defaults=(None, None, None, None, None, False))):
    """What became of a message; true if it was accepted.

    `outcome` is moved, stayed, blocked (its guards were false), ignored (not accepted in this
    state), unknown (declared nowhere) or queued. `seq` is the component's version, and the number
    of its journal row, `data` its data afterwards. A `duplicate` repeats an earlier receipt; its
    data is None where what it was then has been pruned.
    """

    __slots__ = ()

    @property
    def data(self) -> Json:
        """The component's data afterwards; a copy."""
        return fresh(self[7])  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return self[0] in ("moved", "stayed")

    def as_dict(self) -> Json:
        """Return the receipt as a JSON object."""
        return {**self._asdict(), "data": self.data}


# What is committed of a component, beside its state object: replaced as a whole. `text` is the
# data as it is stored, `chain` the crc of the last journal row, `crc` that of the component.
Head = namedtuple("Head", "definition data seq since completed text chain crc")
_NO_HEAD = Head(None, _EMPTY, 0, _EMPTY, None, None, 0, 0)


def check_message(message: Any) -> Json:
    """Return a message as a dict; raise ArgumentError if it is not one with a type."""
    if not isinstance(message, dict):
        raise ArgumentError(f"Not a message: {message!r}", fix='write {"type": "start"}')
    for key in ("type", "id", "correlation_id", "component"):
        value = message.get(key)
        if (value is not None or key == "type") and not _is_name(value):
            raise ArgumentError(f"The {key!r} of a message is text, and not empty: {value!r}",
                fix='write {"type": "start"}' if key == "type" else "leave it out, or name it")
    return message if message.__class__ is dict else dict(message)


def payload(message: Json) -> Json:
    """Return a message without its envelope."""
    return {key: value for key, value in message.items() if key not in _ENVELOPE}


def _of_row(sql: str, row: Json) -> Row:
    """Complete a statement's WHERE: a row of the queue, by its number where that is known."""
    return (f"{sql} number=?", (row["number"],)) if "number" in row else (
        f"{sql} component=? AND message_id=?", (row["component"], row["id"]))


def message_of(row: Json) -> Json:
    """Return a message of the queue as its component is to see it."""
    return {**row["message"], "id": row["id"], "correlation_id": row["correlation_id"]}


def _recorded(row: Json) -> Json:
    """Return what is kept of the last attempt at a message: error, traceback, state, attempts."""
    with contextlib.suppress(ValueError, TypeError):  # None, or damaged
        return {**json.loads(row["error"])}
    return {}


def _deaths(row: Json) -> int:
    """Return how often a process has died of a message since it failed the last time."""
    return row["attempts"] - _recorded(row).get("attempts", 0)  # type: ignore[no-any-return]


def _timer_message(rule: Rule, owner: str) -> str:
    """Return the message of a timer, as it stands in the queue and in the journal."""
    return _encode({"type": rule.timer_type, "state": owner, "rule": rule.number})


_receipt_text = functools.lru_cache(maxsize=4096)(_encode)  # most moves are made again and again


class NotThere(StateError):
    """What there is not: a component that was removed or never made, a dead letter."""


class ProcessDied(StateError):
    """A message that has killed its process as often as it may be tried."""


def _gone(name: str) -> NotThere:
    return NotThere(f"Component {name!r} is gone", why="it was removed")


def _no_turn(name: str, why: str) -> StateError:
    return StateError(f"No turn for {TURN_LIMIT:g} seconds: {name!r}", why=why, component=name)


# ----------------------------------------------------------------------------
# 11.2 A turn
# ----------------------------------------------------------------------------
# One message, from its arrival to its events: decided, claimed, acted, committed, announced.


class Turn(Context):
    """The handling of one message, from its arrival to its receipt.

    `row` is the message's in the queue, if it comes from there; `head` is the component's at the
    begin, `leaf` names its state then; `state` is the object that the turn's own code sees,
    `base` its data.
    """

    live = True  # until the component takes the next message
    over = False  # committed, failed, or with nothing to commit: what is sent now leaves at once
    id: str | None = None  # the message's; in a store a new one, where it has none
    text = ""  # its payload
    data: Json | None = None  # a copy of `base`, once code has asked for it
    kept: Any = None  # the state object that was asked, and its attributes before
    sent: Sequence[Outgoing] = ()  # what the commit takes along
    outbox: list[Outgoing]  # what code has sent so far
    late: Sequence[asyncio.Future[Any]] = ()  # writes that are made after the commit

    def __init__(self, component: AsyncComponent, parent: Context | None, message: Json,
            row: Json | None = None) -> None:
        self.parent, self._correlation_id = parent, None
        self.component, self.message, self.row, self.outbox = component, message, row, []
        self.machine = component.state_machine
        self.begin()

    def begin(self) -> None:
        """Start again from the component as it is now."""
        self.state, self.head, self.data = self.machine._state, self.component.head, None
        self.base, self.leaf = self.head.data, self.machine.registry.name_of(self.state)
        self.engine = self.component._engine
        self.now: float = self.engine.clock()

    def __enter__(self) -> Turn:
        _context.set(self)
        return self

    def __exit__(self, *failure: Any) -> None:
        self.end()
        self.live = False
        _context.set(self.parent)
        if self.component._turn is self:
            self.component._pass_on()

    @property
    def correlation_id(self) -> str:  # type: ignore[override]
        """The message's correlation id, else that of the code that sent it, else a new one."""
        self._correlation_id = (self._correlation_id or self.message.get("correlation_id")
            or (self.parent and self.parent.correlation_id) or new_id())
        return self._correlation_id

    async def post(self, name: str, message: Json, delay: float = 0.0) -> Receipt:
        """Send a message: with the turn's commit, or at once where that has been."""
        body = payload(message)
        _written(body, f"message to {name}")
        out = Outgoing(name, fresh(body), delay, message.get("id") or new_id(),
            message.get("correlation_id") or self.correlation_id)
        if not self.over:
            self.outbox.append(out)
        elif self._post_late(out):
            await self.late[-1]
        return Receipt("queued", out.to, out.id)

    def _post_late(self, out: Outgoing) -> list[Row]:
        self.sent, keep = [out], functools.partial(self._keep, [out])
        rows = self._queue_rows(Plan("sent", _EMPTY))
        if rows:
            self.late = [*self.late, self.engine.queue.write(None, rows, keep)]
        else:
            keep()
        return rows

    async def settled(self) -> None:
        """Wait for the late writes; what fails among them has no bearing on the message."""
        while self.late:
            late, self.late = self.late, ()
            await asyncio.wait(late)
            for write in late:
                if not write.cancelled() and write.exception() is not None:
                    self.engine.logger.error("A write after a message to %r failed",
                        self.component.name, exc_info=write.exception())

    def undo(self) -> None:
        """Forget what the turn's code has done to the state, and what it has sent."""
        self.outbox, self.state = [], self.machine._state
        if self.kept is not None:
            state, attributes = self.kept
            vars(state).clear()
            vars(state).update(attributes)
            self.component._unready = True  # a commit under way may still succeed: read it again

    def end(self, failed: bool = False) -> None:
        """Undo what is not committed, and let go of the claim.

        At a queued message that failed it is let go together with the count of the failure, or
        another process would try again at once.
        """
        self.over = True
        self.undo()
        if not failed or self.row is None:
            self.let_go()

    def let_go(self) -> None:
        """Let go of the claim; what was counted as an attempt at a queued message was none."""
        if self.row is not None:
            self.engine._give_back(self.row)
        elif self.claimed:
            self.late = [*self.late, self.engine.store.write(
                None, self.engine._release(self.component.name))]

    # ---- from the message to the receipt

    async def run(self) -> Receipt:
        """Decide, act, commit and announce; in a store again, while other processes are quicker."""
        component, store, begun = self.component, self.engine.store, time.perf_counter()
        given = self.id = self.message.get("id")
        try:
            if store is not None:
                self.id = given or new_id()
                self.text = _written(payload(self.message), "message")
                self.message = {**self.message, "id": self.id}
            while True:
                if self.row is not None or (given and store is not None):
                    answer = await self._answered()
                    if answer is not None:
                        self.end()
                        return answer
                if store is not None and self.head.definition.has_code and not self.claimed:
                    await self.claim()
                    continue
                try:
                    plan = self._decided()
                except Exception:
                    if await self.refresh():  # it was decided on what is over
                        continue
                    raise
                if plan.outcome == "class":
                    await self._ask_class(plan)
                if plan.actions:
                    await self.act(plan)
                if plan.outcome == "unknown":
                    if await self.refresh():
                        continue
                    self.end(failed=True)
                    break
                if await self.commit(plan) is None:
                    break
                self.undo()
                self.let_go()
                await self.refresh()
        except BaseException as error:
            self.end(failed=True)
            if _is_own_failure(error):
                self.engine.count("failed", begun)
                await self.publish("component.message.received", message=self.message)
                await self.settled()
            raise
        outcome, before = plan.outcome, self.leaf
        self.engine.count(outcome, begun)
        after = self.machine.registry.name_of(self.state) if outcome == "moved" else before
        id, seq = (None, None) if outcome == "unknown" else (self.id, self.head.seq)
        receipt: Receipt = tuple.__new__(Receipt, (  # quicker than calling Receipt
            outcome, component.name, id, before, after, seq, plan.reason, plan.data, False))
        if component.event_bus is not None and component.event_bus._events:
            await self._announce(plan, receipt)
        return receipt

    async def refresh(self) -> bool:
        """Begin again with what the store says; tell whether that is something else by now."""
        await self.engine.queue.settled()
        before = self.head
        self.component._catch_up()
        self.begin()
        return self.head is not before

    async def _answered(self) -> Receipt | None:
        """Return the receipt of a message that is over, here or in another process."""
        name, store = self.component.name, self.engine.store
        await self.engine.queue.settled()
        found = store.journal(name, 1, "message_id=?", (self.id,)) if store else []
        if not found:
            if self.row is None and store and store.messages(
                    "component=? AND message_id=? AND message<>?", (name, self.id, self.text)):
                raise id_taken(name, self.id)
            if self._queued():
                return None
            return Receipt("ignored", name, self.id, self.leaf, self.leaf, self.component.seq,
                "it has been handled elsewhere", duplicate=True)
        entry = found[0]
        if _encode(entry["message"]) != self.text:
            raise id_taken(name, self.id, first=entry["message"].get("type"))
        if self.row is not None:
            await store.write(None, [_of_row(_UNQUEUE, self.row)])
        await self.refresh()
        last = store.journal(name, 1, "data IS NOT NULL AND seq<=?", (entry["seq"],))
        later = last or store.journal(name, 1, "data IS NOT NULL")
        data = last[0]["data"] if last else None if later else self.base  # pruned, or the same
        return Receipt._make([*map(entry.get, Receipt._fields[:7]), data, True])

    def _queued(self) -> bool:
        """Tell whether the message still waits in the queue, if that is where it comes from."""
        if self.row is None or self.engine is _ALONE:
            return True
        queue = self.engine.queue  # without a place it is dead, or put off: by another worker
        found = queue.messages(*_of_row("place IS NOT NULL AND", self.row))
        if found and found[0]["crc"] != self.row.get("crc"):  # claimed, or by others
            self.row.update(queue.sealed(found[0]))
        return bool(found)

    claimed = property(lambda self: self.engine._claimed.get(self.component.name) is (
        self.row or self), doc="Whether its component is its own, among all turns anywhere.")

    async def claim(self) -> None:
        """Let nobody else run the component's code; count the attempt at a queued message.

        The count is kept before the code runs: a message that kills its process counts, too, and
        is not begun any more when it has been tried as often as it may be.
        """
        engine, name, start = self.engine, self.component.name, time.monotonic()

        def check(execute: Callable[..., Any]) -> str | None:
            if engine._held(name):
                return "held"
            if not self._queued():
                return "over"  # for now: another worker has failed at it
            limit = self.head.definition.retry.max_attempts
            if self.row and self.row["attempts"] >= limit and _deaths(self.row) > 0:
                raise ProcessDied(f"Its process died of it {_deaths(self.row)} times",
                    why="each time it was begun, and neither done nor failed")
            return None

        def done() -> None:
            engine._hold(name, self.row or self)
            if self.over:  # cancelled meanwhile
                self.let_go()

        rows: list[Row] = [] if self.row is None else [(_COUNT, {**self.row, "by": 1})]
        while await engine.store.write(check, [
                (_CLAIM, (engine.id, engine.clock() + LEASE, name)), *rows], done) == "held":
            if self.row is None and time.monotonic() - start > TURN_LIMIT + 1:  # its lease is over
                raise _no_turn(name, "another process is at work on the message before this one")
            await asyncio.sleep(_pause())
        await self.refresh()  # nothing runs on what is over

    # ---- deciding and acting

    def _decided(self) -> Plan:
        """Return what the rules say, with the state object that it leads to."""
        definition, row = self.head.definition, self.row
        timer = reason = None
        if definition is None:
            return Plan("class", self.base)
        if self.head.completed is not None:
            reason = f"completed in {self.leaf}"
        elif row is not None and row.get("state") is not None:
            rule = definition.by_number.get(row["rule"])
            if rule is None or row["state"] not in definition.sources(self.leaf):
                reason = f"the timer of {row['state']} is over"  # it was dead when that was left
            else:
                timer = definition.candidate(self.leaf, rule, row["state"])
        plan = Plan("ignored", self.base) if reason else decide(
            definition, self.leaf, self.scope(self.leaf), timer)
        plan.reason, plan.state = reason or plan.reason, self.state
        if plan.passage is not None and plan.outcome == "moved":
            plan.state = plan.passage.node.create()
        return plan

    def scope(self, leaf: str) -> Scope:
        """Return what guards and values may look at."""
        return {"message": self.message, "data": self.base, "component": self.component.name,
            "state": leaf, "id": self.id, "now": self.now, "self": self.component}

    async def _ask_class(self, plan: Plan) -> None:
        """Let the current state's class answer."""
        definition, state, kind = self.head.definition, self.state, self.message["type"]
        self.kept = state, fresh(vars(state))
        proceed, plan.state = await ask(state, self.message, self.component)
        self._take_data(plan)
        if not proceed:
            rules = definition.candidates(self.leaf, kind) if definition else ()  # asked before
            plan.outcome = "blocked" if rules else "ignored"
            plan.reason = f"{self.leaf} does not take {kind!r}"
        else:
            plan.outcome = "stayed" if plan.state is state else "moved"
        cls = plan.state.__class__
        if definition is not None and plan.outcome == "moved":  # go there as a rule would
            name = self.machine.registry.name_of(plan.state)
            if name not in definition.nodes:
                if self.engine.store is not None:
                    raise StateError(f"State {name!r} is not in the config of "
                        f"{self.component.name!r}", why="a store could not bring it back",
                        fix=f'add it to "states": "{name}": "{cls.__module__}:{cls.__name__}"')
                definition.nodes[name] = Node(name, cls=cls)
            plan.passage = definition.passage(self.leaf, self.leaf, name)
            follow(plan, self.scope(self.leaf))

    async def act(self, plan: Plan) -> None:
        """Run the actions; they see the new state, and data that they may change."""
        self.state, self.base, self.data = plan.state, plan.data, None
        for action in plan.actions:
            result = action(self.message, self.component)
            if result is not None and inspect.isawaitable(result):
                await result
        self._take_data(plan)

    def _take_data(self, plan: Plan) -> None:
        """Take over the data, if the code that was called has asked for it, as that has left it."""
        if self.data is not None:
            self.base = plan.data = fresh(self.data)
            self.data = None

    # ---- committing

    async def commit(self, plan: Plan, rows: Sequence[Row] = ()) -> Any:
        """Make a plan true, in memory at once; return None, or why it was not: others were quicker.

        `rows` is what another definition in `head` changes in the queue.
        """
        engine, passage, now, name = self.engine, plan.passage, self.now, self.component.name
        if engine is not _ALONE and engine.components.get(name) is not self.component:
            raise _gone(name)
        definition, _, seq, since, completed, *_ = self.head
        seq += plan.outcome != "created"
        if seq and passage is not None and passage.enters:
            since = {name: now if name in passage.enters else since.get(name, now)
                     for name in passage.active}
            completed = now if passage.completes else None
        if plan.sends:
            self.outbox = [*(out._replace(id=out.id or new_id(), correlation_id=self.correlation_id)
                for out in plan.sends), *self.outbox]
        self.sent, self.outbox = self.outbox, []
        if self.row is not None or self.sent or plan.timers or plan.ended:
            rows = [*rows, *self._queue_rows(plan)]
        head = tuple.__new__(Head, (  # quicker than calling Head
            definition, plan.data, seq, since, completed, None, 0, 0))
        check = None
        if engine.store is not None:
            check, rows, head = self._store_rows(plan, head, rows)
        adopt = functools.partial(self.component._adopt, head, plan.state, self)
        return await engine.queue.write(check, rows, adopt) if rows else adopt()

    def _store_rows(self, plan: Plan, head: Any, rows: Sequence[Row]) -> tuple[Any, list[Row], Any]:
        """Return the check and the rows by which a store keeps a plan; and the head, with crc."""
        component, (definition, data, seq, since, completed, *_) = self.component, head
        name, attributes = definition.registry.name_of(plan.state), vars(plan.state)
        kept = _written(attributes, f"attributes of {name}") if attributes else None
        old = self.head
        text = (old.text if data is old.data else None) or _written(data, "data")
        receipt = _receipt_text((plan.outcome, self.leaf, name, plan.reason))
        entry = (component.name, seq, self.id, self.correlation_id, self.text, receipt,
            text if text != old.text or not seq else None, self.now)
        chain = checksum(*entry, start=old.chain)
        values: Any = (definition.hash, name, kept, text, seq, _encode(since), completed)
        crc = checksum(component.name, *values, start=chain)
        values += (crc, component.name)
        owner = self.engine.id if self.claimed else ""  # rules alone mind no claim

        change = (_UPDATE_HEAD, (*values, old.seq, old.crc, owner)) if seq else (_NEW_HEAD, values)

        def check(execute: Callable[..., Any]) -> str | None:
            here = seq or self.engine.components.get(component.name) is component  # not removed
            fits = here and self._queued() and execute(*change).rowcount == 1
            return None if fits else "moved on"

        journal: list[Row] = [(_NEW_ENTRY, (*entry, old.chain, chain))]
        if not seq or definition is not component.definition:
            journal.append((_NEW_DEFINITION, (definition.hash, definition.text)))
        return check, [*journal, *rows], head._replace(text=text, chain=chain, crc=crc)

    def _queue_rows(self, plan: Plan) -> list[Row]:
        """Return what changes in the queue: the message itself, timers, what is sent."""
        name, definition = self.component.name, self.head.definition
        if self.engine is _ALONE:
            if plan.timers or any(out.to != name or out.delay for out in self.sent):
                raise StateError(
                    f"{name!r} sends or waits without an engine", fix="engine.register(it)")
            return []
        rows = [] if self.row is None or self.over else [_of_row(_UNQUEUE, self.row)]
        rows += [(sql, (name, owner)) for owner in plan.ended for sql in (_NO_TIMERS, _OLD_TIMERS)]
        rows += [self.engine.queue.message_row(self.now, out.to, out.id, out.correlation_id,
            _written(out.message, f"message to {out.to}"), self.now + out.delay)
            for out in self.sent]
        if any(self.now + out.delay <= self.now for out in self.sent):
            rows.append((_GIVE_PLACES, (self.now,)))
        return rows + [self.engine.queue.message_row(self.now, name, new_id(), self.correlation_id,
                _timer_message(definition.by_number[number], owner), due, owner, number)
            for due, owner, number in plan.timers]

    def _keep(self, sent: Sequence[Outgoing]) -> None:
        """Remember what was sent to the component itself, to be handled before anything else."""
        component, engine = self.component, self.engine
        if engine is not _ALONE:
            engine.posted.update(out.to for out in sent)
            engine._wake()
        component._internal = [*(component._internal or ()), *({"component": out.to} | out._asdict()
            for out in sent if out.to == component.name and not out.delay)]

    def committed(self) -> None:
        """Take note of the commit, and send what a task has sent while it was under way."""
        self.state, self.head = self.machine._state, self.component.head
        self.base, self.kept = self.head.data, None
        self.engine._claimed.pop(self.component.name, None)  # a commit lets go
        self.over = True
        if self.sent:
            self._keep(self.sent)
        for out in self.outbox:
            self._post_late(out)

    # ---- events

    async def _announce(self, plan: Plan, receipt: Receipt) -> None:
        """Publish what happened, as long as the turn lasts; no handler changes the outcome."""
        await self.emit(plan)
        await self.publish("component.message.received", message=self.message)
        if receipt.outcome == "moved":
            before, to = receipt.from_state, receipt.to_state
            await self.publish("state.changed", from_state=before, to_state=to, state=to)
            if self.component.completed is not None:
                await self.publish("component.completed", state=to)

    async def emit(self, plan: Plan) -> None:
        """Publish the events that rules and states emit."""
        for name, content in plan.emits:
            await self.publish(name, content, message=self.message, state=self.component.state)

    async def publish(self, event: str, content: Any = None, **facts: Any) -> None:
        """Publish an event with `content`, or with facts about the component and its turn."""
        component = self.component
        if component.event_bus is None or not component.event_bus.listens(event):
            return
        if content is None:
            content = {"component": component.name, **fresh(facts), "seq": component.seq,
                "correlation_id": self.correlation_id}
        try:
            await component.event_bus.publish(event, content)
        except StateError as error:  # published too deep
            (component.logger or logger).error("Event %r was not published", event, exc_info=error)


# ----------------------------------------------------------------------------
# 11.3 A component
# ----------------------------------------------------------------------------
# Who waits for its turn, and what a component is by now.


class AsyncComponent:
    """A name, a state, data and rules; made by an engine from a config, or by hand.

    `metadata` is what a snapshot carried along.
    """

    __slots__ = ("name", "state_machine", "logger", "event_bus", "metadata", "head", "_rules",
        "_engine", "_unready", "_birth", "_update", "_turn", "_waiters", "_internal")

    def __init__(self, name: str, rules: list[Json] | None = None, state_machine: StateMachine
            | None = None, logger: Any = None, event_bus: AsyncEventManager | None = None) -> None:
        check_name(name)
        self.name, self.logger, self.event_bus = name, logger, event_bus
        self.state_machine = state_machine or StateMachine.from_name("InitialState")
        self._engine = _ALONE
        nothing: Any = None
        self.head: Any = _NO_HEAD  # its definition is None: made by hand, without rules
        # `_prepare` comes before the next message where there is something to compile, read or
        # carry out: `_birth`, the plan of a new component, and `_update`, a definition.
        self._rules, self._unready = rules, bool(rules)
        self.metadata = self._birth = self._update = nothing
        # Whose turn it is, who waits for it, and what was sent to itself and is not handled yet.
        self._turn = self._waiters = self._internal = nothing

    def __repr__(self) -> str:
        return f"<AsyncComponent {self.name!r} in {self.state!r}>"

    def _repr_svg_(self) -> str | None:
        """What a notebook shows: a picture, drawn by section 12."""
        return picture(self) if self.definition is not None else None

    # ---- what users see

    seq = property(lambda self: self.head.seq, doc="How many things have happened to it.")
    completed = property(lambda self: self.head.completed,
        doc="When it reached a final state, in epoch seconds, or None.")
    definition = property(lambda self: self.head.definition, doc="What its config was compiled to.")

    @property
    def state(self) -> str:
        """The name of the current state; within a turn, of the next."""
        return self.state_machine.registry.name_of(self.state_machine.current_state)

    @property
    def data(self) -> Json:
        """The data: within a turn the working copy, else a copy that changes nothing."""
        turn = live_turn(self.state_machine)
        if turn is None:
            return fresh(self.head.data)  # type: ignore[no-any-return]
        if turn.data is None:
            turn.data = fresh(turn.base)
        return turn.data

    @data.setter
    def data(self, value: Json) -> None:
        turn = live_turn(self.state_machine)
        if turn is None:
            raise StateError(f"Data of {self.name!r} set outside a turn", why="it would not be "
                "saved", fix="change it in an action, or with `assign` in a rule")
        if value.__class__ is not dict:
            raise StateError(f"Data of {self.name!r} is not a dict: {value!r}")
        turn.data = value

    @property
    def rules(self) -> list[Json]:
        """The rules, notes included; `update_rules` changes them."""
        if self._rules is None:
            definition = self.head.definition
            self._rules = fresh(definition.source.get("rules") or []) if definition else []
        return self._rules

    async def add_rule(self, rule: Json) -> None:
        """Add a rule."""
        await self.update_rules([rule])

    async def update_rules(self, new_rules: list[Json], *, replace: bool = False) -> list[Json]:
        """Add rules, or put them in place of the old ones; return the rules that hold now.

        A rule that is there already is not added again. Raises ConfigError, and changes
        nothing, if the result is not a good config or the current state would be gone.
        """
        if not isinstance(new_rules, list):
            raise ArgumentError(f"Not a list of rules: {new_rules!r}")

        def changed() -> Definition:
            rules = [] if replace else list(self.rules)
            for rule in new_rules:
                rules += [] if _contains(rules, rule) else [rule]
            return self._compiled(rules, replace)

        await self._own_turn(changed)
        return self.rules

    async def handle_message(self, message: Json, *, _row: Json | None = None,
            _strict: bool = True) -> Receipt:
        """Handle a message and return its receipt, when its events have been published.

        Raises StateError for a message type that is declared nowhere, and whatever the code of
        a state, guard or action raises; then nothing has changed.
        """
        if (message.__class__ is not dict or message.get("type").__class__ is not str
                or not message["type"] or "id" in message or "correlation_id" in message):
            message = check_message(message)
        turn = Turn(self, _context.get(), message, _row)
        if self._turn is not None:
            own = live_turn(self.state_machine)
            if own is not None:  # called from within: it runs when the turn is over
                return await own.post(self.name, message)
            await self._wait_for(turn)
        self._turn = turn
        _context.set(turn)  # as `with turn` does, but quicker
        try:
            if self._unready or self._internal:
                await self._prepare(turn)
                turn.over = False
            receipt = await turn.run()
            if self._internal or turn.late:
                await self._drain(turn)
        finally:
            turn.live = False
            _context.set(turn.parent)
            self._pass_on()
        if _strict and receipt[0] == "unknown":
            raise self._unknown(turn, receipt)
        return receipt

    # ---- turns: one at a time, in the order of their coming

    async def _own_turn(self, change: Callable[[], Definition] | None = None) -> None:
        """Take a turn that has no message: to be prepared, and to go over to a definition."""
        if live_turn(self.state_machine) is not None:
            raise StateError(f"{self.name!r} is in the middle of a turn", fix="do it afterwards")
        turn = Turn(self, _context.get(), {})
        if self._turn is not None:
            await self._wait_for(turn)
        self._turn = turn
        with turn:
            await self._prepare(turn)
            if change is not None:
                await self._swap(turn, change)
            await self._drain(turn)

    async def _wait_for(self, turn: Turn) -> None:
        """Wait until every message that came before has been handled."""
        future = asyncio.get_running_loop().create_future()
        self._waiters = self._waiters or deque()
        self._waiters.append((future, turn))
        try:
            # Who comes from the queue holds up nobody, and has not been tried yet.
            await asyncio.wait([future], timeout=TURN_LIMIT if turn.row is None else None)
            if not future.done():
                raise _no_turn(self.name, "the message before this one is not done; perhaps two"
                    " components wait for each other")
        except BaseException:
            future.cancel()
            if self._turn is turn:  # cancelled in the moment in which the turn was given
                self._pass_on()
            raise
        turn.begin()

    def _pass_on(self) -> None:
        """Give the turn to who has waited longest."""
        self._turn = None
        while self._waiters and self._turn is None:
            future, turn = self._waiters.popleft()
            if not future.done():
                self._turn = turn
                future.set_result(None)

    async def _drain(self, holder: Turn) -> None:
        """Handle the messages that the component sent to itself."""
        for count in itertools.count(1):
            await holder.settled()
            if not self._internal:
                break
            row = self._internal.pop(0)
            with Turn(self, holder, message_of(row), row) as turn:
                try:
                    if count > DRAIN_LIMIT:
                        raise StateError(f"{self.name!r} sent itself more than {DRAIN_LIMIT}"
                            " messages in one turn", fix="break the circle, or send with a delay")
                    receipt = await turn.run()
                    if receipt.outcome == "unknown":
                        raise self._unknown(turn, receipt)
                except BaseException as error:
                    if not _is_own_failure(error):
                        self._internal.insert(0, row)  # the next turn will run it
                        raise
                    turn.end(failed=True)
                    await self._engine._failed(row, error, count > DRAIN_LIMIT)
                await turn.settled()

    def _unknown(self, turn: Turn, receipt: Receipt) -> StateError:
        kind = turn.message["type"]
        error = StateError(f"Unknown message: {kind!r}",
            why=f"no rule of {self.name!r} takes it in any state",
            fix=choose(kind, self.definition.types), component=self.name, state=turn.leaf)
        error.receipt = receipt  # type: ignore[attr-defined]
        return error

    def _adopt(self, head: Any, state: State, turn: Turn | None = None) -> None:
        """Become what was committed."""
        if head.definition is not self.head.definition:
            self.state_machine.registry, self._rules = head.definition.registry, None
        self.head, self.state_machine._state = head, state
        if turn is not None:
            turn.committed()
        self._engine._wake()

    # ---- creation, rules, reloading

    async def _prepare(self, turn: Turn) -> None:
        """Do what must be done before the next message: be born, be read again, be compiled."""
        engine = self._engine
        turn.over = True  # what is sent before it begins leaves at once, and hangs on no message
        if engine is not _ALONE and engine.components.get(self.name) is not self:
            raise _gone(self.name)
        if self._birth is not None:
            await self._be_born(turn)
        elif self._unready and self.definition is None and any(
                isinstance(rule, dict) and {"on", "after"} & rule.keys() for rule in self.rules):
            self._define(self._compiled(self.rules))
        elif self._unready and engine.store is not None:  # even where its head is the same
            await engine.store.settled()
            self._reload()
        while (update := self._update) is not None:  # by `create_component(update=True)`
            try:
                if update.text != getattr(self.definition, "text", None):
                    await self._swap(turn, lambda: self._update)
            except ConfigError as error:  # meanwhile it went where the new config has no state
                engine.logger.error("%r keeps its definition", self.name, exc_info=error)
                engine._refused[self.name] = error
            if self._update is update:  # else another one has come meanwhile
                self._update = None
        self._unready = False
        engine._unborn.pop(self.name, None)
        await self._drain(turn)  # what a turn that was cancelled has left over
        turn.begin()

    def _define(self, definition: Definition) -> None:
        self.head = self.head._replace(definition=definition)
        self.state_machine.registry = definition.registry

    def _compiled(self, rules: list[Json], replace: bool = True,
            states: Json = _EMPTY) -> Definition:
        """Return a definition with these rules instead; raise ConfigError if it is not good.

        `states` are those that a component made by hand is to have.
        """
        machine, old = self.state_machine, self.definition
        registry = machine.registry._parent if old else StateRegistry(machine.registry)
        if registry is None or registry is DEFAULT_REGISTRY:
            registry = StateRegistry(DEFAULT_REGISTRY)
        if old is None and registry.get(self.state) is None:
            registry.register(self.state, type(machine._state))
        source = old.source if old else {"initial_state": self.state, "states": states}
        config = {"name": self.name, **source, "rules": rules}
        try:
            return _walked(config, registry=registry,  # type: ignore[no-any-return]
                allow_imports=self._engine.allow_imports).found.definition
        except ConfigError as error:
            if not replace and "can never fire" in error.what:
                error.fix = "replace the rules: update_rules(rules, replace=True), or --replace"
            raise

    def _counterpart(self, definition: Definition) -> Node:
        """Return the current state's node in another definition; else raise ConfigError."""
        node = definition.nodes.get(definition.renamed.get(self.state, self.state))
        if node is None:
            raise ConfigError(f"State {self.state!r} of {self.name!r} would be gone",
                fix="keep the state, let the component leave it first, or say in the config what"
                f' became of it: "renamed": {{"{self.state}": ...}}', component=self.name)
        return definition.innermost(node.name)  # it may have children by now

    async def _be_born(self, holder: Turn) -> None:
        """Turn 0: run the entry actions; write the component, its data and its timers."""
        with Turn(self, holder, {"type": "created"}) as turn:
            plan = copy.copy(self._birth)
            await turn.act(plan)
            turn.id, turn.text = "", _encode({"created": self.definition.hash})
            lost = await turn.commit(plan)
            self._birth = None
            if lost:  # another process made it first
                self._reload()
            else:
                await turn.emit(plan)
                await turn.settled()

    def _load(self, head: Json) -> None:
        """Become what the store says."""
        definition = self._engine._definition(head["definition"], self.state_machine.registry)
        node = definition.nodes.get(head["state"])
        if node is None:
            raise StateError(f"State {head['state']!r} of {self.name!r} is not in its definition")
        facts = map(head.get, ("data", "seq", "since", "completed", "data_text", "chain", "crc"))
        self._adopt(Head(definition, *facts), node.create(head["attributes"]))

    def _catch_up(self) -> None:
        """Become what the store says by now, though another process may have changed it."""
        store, head = self._engine.store, self.head
        if store is not None and store.rows(_STAMP, (self.name,)) != [(head.seq, head.crc)]:
            self._reload()

    def _reload(self) -> None:
        """Become what the store says; raise NotThere, and be forgotten, if it is not there."""
        head = self._engine.store.head(self.name)
        if head is None or self._engine.components.get(self.name) is not self:
            self._engine._forget(self)
            raise _gone(self.name)
        self._load(head)

    async def _swap(self, holder: Turn, change: Callable[[], Definition]) -> None:
        """Go over to another definition, between two messages; timers of kept rules run on."""
        with Turn(self, holder, {"type": "rules.updated"}) as turn:
            while True:
                await turn.refresh()
                if self._engine.store and self.definition.has_code:
                    await turn.claim()  # what another process runs comes first
                changed, plan, old = change(), Plan("updated", self.head.data), self.definition
                node = self._counterpart(changed)
                plan.state = node.create(vars(turn.state) or None)
                then = {changed.renamed.get(name, name): at for name, at in turn.head.since.items()}
                turn.head = turn.head._replace(definition=changed,
                    completed=(turn.head.completed or turn.now) if node.completes else None,
                    since={one.name: then.get(one.name, turn.now) for one in node.lineage()})
                hashes = {"definition": changed.hash, "before": old and old.hash}
                turn.id, turn.text = new_id(), _encode(hashes)
                if await turn.commit(plan, self._timer_changes(turn, plan, node)) is None:
                    break
                turn.let_go()  # another process was quicker
            await turn.publish("rules.updated", rules=len(self.rules))
            await turn.settled()

    def _timer_changes(self, turn: Turn, plan: Plan, node: Node) -> list[Row]:
        """Drop the timers of vanished rules, keep those of equal ones, plan those of new ones."""
        queue, old, changed = self._engine.queue, self.definition, turn.head.definition
        rules: Sequence[Rule] = old.rules if old else ()
        if self._engine is _ALONE or not any(rule.after for rule in [*rules, *changed.rules]):
            return []

        def gist(rule: Rule, names: Json = _EMPTY) -> str:
            """Return what makes a rule the same, whatever its number and its states' names."""
            rest = {key: rule.text[key] for key in rule.text.keys() - {"from", "to", "description"}}
            to = rule.to and names.get(rule.to, rule.to)
            return _encode([[names.get(one, one) for one in rule.sources], to, rest])

        before = {rule.number: gist(rule, changed.renamed) for rule in rules}
        after = {gist(rule): rule.number for rule in changed.rules}
        active = () if node.completes else changed.sources(node.name)
        rows: list[Row] = []
        for row in queue.messages("component=? AND state IS NOT NULL", (self.name,)):
            new = after.get(before.get(row["rule"], ""))  # its rule's number, if that is kept
            owner: Any = changed.renamed.get(row["state"], row["state"])
            if row["dead"] is None and (new is None or owner not in active):
                rows.append(_of_row(_UNQUEUE, row))
                continue
            # A dead one may be given back, and must not find another rule at its number.
            text = row["message"] if new is None else _timer_message(changed.by_number[new], owner)
            rows.append(queue.change_message(row, rule=new, state=owner, message=text))
        scope, since = turn.scope(node.name), turn.head.since
        begun = {(before[rule.number], changed.renamed.get(name, name)) for name in (old.sources(
            turn.leaf) if old and self.completed is None else ()) for rule in old.timers(name)}
        try:
            plan.timers = [
                (since.get(owner, turn.now) + seconds(rule.after(scope)), owner, rule.number)
                for owner in active for rule in changed.timers(owner)
                if (gist(rule), owner) not in begun]
        except (MissingValue, StateError) as error:
            raise ConfigError(f"A timer of {self.name!r} would have to begin now, and cannot",
                why=f"its delay: {error}", fix="give it one that is known by now") from error
        return rows


# ----------------------------------------------------------------------------
# 11.4 Replay
# ----------------------------------------------------------------------------
# A history decided again; nothing is run.


def _on_paper(config: Any) -> tuple[Definition, str]:
    """Return a definition whose code is not imported, and the names of that code."""
    found = _walked(config, imports=False).found
    classes = [node.name for node in found.definition.nodes.values() if not node.declared]
    return found.definition, ", ".join({**dict.fromkeys(found.unchecked + classes)})


def _decided_again(definition: Definition, then: Definition, name: str, leaf: str, data: Json,
        entry: Json) -> tuple[list[Any], Json]:
    """Return outcome, state before and after, and data of what a journal row's message does now.

    `then` is the definition by which it was decided, and which knows the number of a timer's rule.
    """
    message, node, timer = entry["message"], definition.nodes.get(leaf), None
    if node is None or node.completes:
        return ["ignored" if node else "gone", leaf, leaf], data
    if {"state", "rule"} <= message.keys() and message["type"].startswith("after "):
        owner = definition.renamed.get(message["state"], message["state"])
        fired = then.by_number.get(message["rule"])
        rules = definition.timers(owner) if owner in definition.sources(leaf) else []
        rules.sort(key=lambda rule: fired is None or rule.text != fired.text)  # the same one first
        rule = next((one for one in rules if one.timer_type == message["type"]), None)
        if rule is None or entry["outcome"] == "ignored":  # it was over by then
            return ["ignored", leaf, leaf], data
        timer = definition.candidate(leaf, rule, owner)
    scope = {"message": message_of(entry), "data": data, "component": name, "state": leaf,
        "id": entry["id"], "now": entry["time"], "self": None}
    try:
        plan = decide(definition, leaf, scope, timer)
    except FlexiFlowError:
        return ["failed", leaf, leaf], data
    return [plan.outcome, leaf, plan.passage.node.name if plan.passage else leaf], plan.data


def _replayed(name: str, history: list[Json], last: str,
        definition_of: Callable[[str], tuple[Definition, str, Definition]]) -> Json:
    """Decide a history again, its oldest entry first; see `FlexiFlowEngine.replay`.

    `last` is the hash of the definition that holds now.
    """
    answer: Json = {"component": name, "steps": 0, "same": 0, "differences": [],
        "state": history[-1]["to_state"], "would_be": None, "skipped": None}
    history = [*itertools.dropwhile(lambda entry: entry["data"] is None, history)]
    if not history:
        return {**answer, "skipped": "what is left of its history begins without its data"}
    swaps = [one["message"] for one in history if one["outcome"] == "updated"]
    definition, code, then = definition_of(swaps[0]["before"] if swaps else last)
    data = data_then = history[0]["data"]

    def now_called(state: str) -> str:
        state = definition.renamed.get(state, state)  # and it may have children by now
        return definition.innermost(state).name if state in definition.nodes else state

    leaf = now_called(history[0]["to_state"])
    for entry in history[1:]:
        data_then = data_then if entry["data"] is None else entry["data"]
        if entry["outcome"] == "updated":
            definition, code, then = definition_of(entry["message"]["definition"])
            leaf = now_called(leaf)
            continue
        if code:
            return {**answer, "skipped": f"its definition runs code: {code}"}
        was = [entry["outcome"], entry["from_state"], entry["to_state"]]
        now, data = _decided_again(definition, then, name, leaf, data, entry)
        leaf, differs = now[2], now != [was[0], *map(now_called, was[1:])]
        if not same(data, data_then):
            was, now, differs = [*was, data_then], [*now, data], True
        if answer["differences"] or differs:
            answer["differences"].append({"seq": entry["seq"], "message": entry["message"]["type"],
                "was": was, "now": now})
        answer["steps"] += 1
        answer["same"] += not answer["differences"]
    return {**answer, "would_be": leaf}


# ----------------------------------------------------------------------------
# 11.5 Delivery
# ----------------------------------------------------------------------------
# The messages and timers that are due, to all components that have some.


def _pending(row: Json) -> Json:
    """Return when a message or timer of the queue is due, and how it has fared so far."""
    return {"due": row["due"], "id": row["id"], "attempts": row["attempts"],
        "error": _recorded(row).get("error")}


class _Delivery:
    """One `run` of an engine: a stream of messages for each component that has some."""

    def __init__(self, engine: FlexiFlowEngine, component: str | None, concurrency: int,
            until_idle: bool) -> None:
        self.engine, self.queue, self.component = engine, engine.queue, component
        self.until_idle, self.stops, self.delivered = until_idle, engine._stops, 0
        self.concurrency, self.called_off, self.alone, self.rest = concurrency, False, False, 0.0
        self.streams: dict[str, asyncio.Task[Any]] = {}

    async def run(self) -> int:
        """Deliver until the engine is closed, or nothing is due; return how many messages."""
        await self.engine._settle(quick=True)  # what has come due by now runs in due order
        self.engine._newcomers = bool(self.engine._unborn or self.engine._unannounced)
        try:
            while True:
                if self.engine._newcomers and not ("" in self.streams or self._stopped()):
                    self.engine._newcomers = False
                    # Under "", which is the name of no component.
                    self.streams[""] = asyncio.ensure_future(self.engine._settle())
                more = not self._stopped() and await self._begin()
                if not (self.streams or more) and (self.until_idle or self._stopped()):
                    return self.delivered
                await self.engine._sleep(0.02 if more else 1.0, *self.streams.values())
                for name in [name for name, task in self.streams.items() if task.done()]:
                    self.streams.pop(name).result()
        finally:
            self.called_off = True
            for task in self.streams.values():
                task.cancel()
            if self.streams:
                await asyncio.wait(self.streams.values())

    def _stopped(self) -> bool:
        """Tell whether to begin nothing more; what came before a run until idle does not count."""
        return self.engine._stops > self.stops or (self.engine._stopping and not self.until_idle)

    async def _begin(self) -> bool:
        """Give what has come due its place, and begin to deliver it, by component, in its order.

        Return whether to look again soon: other processes are at work on more, or a long queue
        has not been looked through.
        """
        await self.queue.settled()
        if self.engine._next_due() <= self.engine.clock():
            await self.queue.write(None, [(_GIVE_PLACES, (self.engine.clock(),))])
        claimed = self.engine._held()
        self.alone = self.alone and bool(self.streams)
        room = 0 if self.alone else self.concurrency - len(self.streams)
        start = time.monotonic()  # to look in vain through the queue of who runs: a sixth of it
        resting = bool(self.streams) and start < self.rest
        rows = self._placed([*self.streams, *claimed]) if room and not resting else []
        self.rest = self.rest if rows or resting else start + 5 * (time.monotonic() - start)
        found: dict[str, list[Json]] = {}
        deadly = [row for row in rows if row["attempts"] and _intact(row) and _deaths(row) > 1]
        if deadly:  # its process died of it twice: it would take down what runs beside it
            self.alone = not self.streams
            rows = deadly[:1] if self.alone else []
        for row in rows:
            if row["component"] in found or len(found) < room:
                found.setdefault(row["component"], []).append(row)
        for name, due in found.items():
            self.streams[name] = asyncio.ensure_future(self._deliver(due))
        return resting or bool(claimed and not found and self._placed([*self.streams]))

    def _placed(self, besides: list[str]) -> list[Json]:
        """Return the first rows that may run, besides those of some components."""
        foreign = self.engine._foreign
        marks = [",".join("?" * len(values)) for values in (foreign, besides)]
        return self.queue.messages("place IS NOT NULL AND dead IS NULL AND component IS"
            f"{' NOT' * (self.component is None)} ? AND component NOT IN ({marks[1]}) AND NOT"
            " EXISTS (SELECT 1 FROM flexiflow_components WHERE name=component AND definition IN"
            f" ({marks[0]})) ORDER BY place LIMIT {_BATCH}", (self.component, *besides, *foreign))

    async def _deliver(self, rows: list[Json]) -> None:
        """Deliver rows of one component; those that are not handled come again.

        Dead at once is what cannot be read, or whose component cannot, and what has killed its
        process too often.
        """
        engine = self.engine
        for row in rows:
            if self._stopped():
                break
            hopeless: Any = PersistenceError, ValueError  # what there is no use in trying again
            try:
                message = message_of(self.queue.sealed(row))
                hopeless = ConfigError
                component = engine._find(row["component"])
                hopeless = ProcessDied
                await engine._announce()
                receipt = await component.handle_message(message, _row=row)
                self.delivered += not receipt.duplicate
            except _LEAVING:
                raise
            except BaseException as error:
                if self.called_off:
                    engine._give_back(row)
                    raise
                if isinstance(error, ImportError_) and self._is_foreign(row["component"], error):
                    engine._give_back(row)
                    break
                await engine._failed(row, error, isinstance(error, hopeless))

    def _is_foreign(self, name: str, error: ImportError_) -> bool:
        """Tell whether a component's own code is not to be had here; say so once."""
        engine = self.engine
        known, head = engine.components.get(name), engine.store and engine.store.head(name)
        if not head or (known and known.definition.hash == head["definition"]):
            return False
        if head["definition"] not in engine._foreign:
            engine._foreign.add(head["definition"])
            engine.logger.warning("Messages to %r are left alone: %s", name, error.what)
        return True


# ----------------------------------------------------------------------------
# 11.6 The engine
# ----------------------------------------------------------------------------
# What users call: everything above, by the name of a component.


def _message(message: str | Json, fields: Json) -> Json:
    """Return the message that a call names: by its type, or as a dict, and with fields."""
    if isinstance(message, str):
        return {**fields, "type": message}
    return {**check_message(message), **fields} if fields else message


def _check_query(name: Any, limit: Any) -> None:
    """Raise ArgumentError unless these, where given, are a component's name and a count."""
    if name is not None:
        check_name(name)
    check_count("limit", 1 if limit is None else limit)


class FlexiFlowEngine:
    """Components by name, one bus, and the store that keeps them.

    `store` is a path, a SQLiteStore, or None for memory. `clock` returns epoch seconds.
    `allow_imports` lists the modules that configs may import from; None allows all. An engine
    belongs to one event loop; other threads and processes open the same file with their own.
    """

    def __init__(self, store: Path | SQLiteStore | None = None, *, logger: Any = None, clock:
            Callable[[], float] = time.time, allow_imports: Sequence[str] | None = None) -> None:
        if store is not None and not isinstance(store, SQLiteStore):
            store = SQLiteStore(store)
        self.store: Any = store
        self.queue = store or SQLiteStore(":memory:")  # where messages wait
        self.logger = logger or globals()["logger"]
        # A float, as it comes back from the store: checksums are made of its text.
        self.clock = clock if clock is time.time else lambda: float(clock())
        self.allow_imports = allow_imports
        self.event_bus = AsyncEventManager(logger=self.logger)
        self.components: dict[str, AsyncComponent] = {}
        self.posted: set[str] = set()  # components that turns of this engine have sent to
        self.id = new_id()  # under which it claims components
        # The components whose code runs here, and the message of the queue, or else the turn,
        # that it runs for.
        self._claimed: dict[str, Json | Turn] = {}
        self._renewing: Any = None  # the loop that is to renew claims
        self._unborn: dict[str, AsyncComponent] = {}
        self._unannounced: deque[AsyncComponent] = deque()
        self._newcomers = False  # for `run` to see to
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks weakly
        self._configs: dict[str, ComponentConfig] = {}  # by what they say
        self._definitions: dict[str, Definition] = {}  # of the store, by hash
        self._foreign: set[str] = set()  # hashes of definitions whose code is not to be had here
        self._warned: set[str] = set()  # components whose config differs
        self._refused: dict[str, ConfigError] = {}  # by components, of the configs for them
        self._alarm: asyncio.Future[None] | None = None
        self._stopping, self._stops = False, 0  # how often told: it ends what was begun before
        self._worker: asyncio.Task[Any] | None = None
        self.outcomes: dict[str, int] = {}  # of the messages handled here: outcome -> how many
        # Seconds that they took; and failed attempts at messages that come again.
        self.handling, self.retries = 0.0, 0
        # Component -> hashes of the definitions from which and to which `adopt` has led.
        self._versions: dict[str, set[str]] = {}
        self.reload_error: str | None = None  # why `watch_config` did not take over a config

    async def __aenter__(self) -> FlexiFlowEngine:
        self.start()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self.close()

    def start(self) -> bool:
        """Begin to deliver, as `async with` does; return False if it does already."""
        if self._worker is not None and not self._worker.done():
            return False
        self._worker = self._spawn(self._work)
        return True

    async def _work(self) -> None:
        """Deliver until `close`: a full disk, say, is not the end of it."""
        while not self._stopping:
            try:
                await self.run()
            except Exception as error:
                self.logger.error("Delivery failed, and goes on in a second", exc_info=error)
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """Write what has not been written, wait for what `start` has begun, and close the store.

        The engine can go on to be used: it opens its store again. What memory alone held is lost.
        Raises StateError from within a turn of its own.
        """
        if getattr(live_turn(), "engine", None) is self:
            raise StateError("Closing from within a turn", fix="let the turn end first")
        self._stop()
        try:
            while self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
                # Not left to their callbacks, which Ctrl-C may have kept from being called.
                self._tasks.difference_update([task for task in self._tasks if task.done()])
            await self._settle()
            if self.queue._waiting or self.queue._committing:
                await self.queue.write(None, ())  # after all others, and what they let go of
            if self.store is None and self.queue._connection is not None:
                lost = self.queue.rows("SELECT component, COUNT(*) FROM flexiflow_messages"
                    " WHERE dead IS NULL AND state IS NULL GROUP BY 1")  # timers are no news
                if lost:
                    self.logger.warning("Not delivered, and kept in memory only: %s", ", ".join(
                        f"{count} to {name!r}" for name, count in lost))
            await asyncio.sleep(0)  # a `run` that was called before, and begins only now, ends
        finally:
            self._stopping, self._stops = False, self._stops + 1  # also for who began meanwhile
            self.queue.close()

    def _stop(self) -> None:
        """Let `run` end when what it is at work on is done."""
        self._stopping, self._stops = True, self._stops + 1
        self._wake()

    # ---- components

    def create_component(self, config: Path | Json | ComponentConfig, *, name: str | None = None,
            data: Json | None = None, update: bool = False) -> AsyncComponent:
        """Return the component of this name (by default the config's), made if it is new.

        A component that the store knows goes on where it stopped, with its stored definition; a
        config that differs from it gives one warning, or with `update` takes its place (else
        ConfigError, where the state would be gone). A new one's data is the config's, with `data`
        over it; it is written with the first message, `register_async`, `run` or `close`.
        """
        loaded = self._config(config)
        name = loaded.name if name is None else name
        _need(data is None or isinstance(data, dict), "Data is an object: %r", data)
        definition: Any = loaded.definition
        known = self._known(name)
        if known is None:
            machine = StateMachine(definition.birth.node.create(), definition.registry)
            component = AsyncComponent(name, None, machine)
            given = {**fresh(loaded.data), **fresh(data or {})} or _EMPTY
            component.head = _NO_HEAD._replace(definition=definition, data=given)
            return self._add(component)
        differs = known.definition is None or known.definition.text != definition.text
        if update:
            self._refused.pop(name, None)  # of an earlier config
        if update and (differs or known._update is not None or known._turn is not None):
            # The last one wins, and who is in a turn may differ by its end.
            known._counterpart(definition)
            known._update = definition
            known._unready, self._unborn[known.name] = True, known
            self._newcomers = True
            self._wake()
        elif differs and known.name not in self._warned:
            self._warned.add(known.name)
            self.logger.warning("Component %r goes on with its own definition, which differs from"
                " the config", known.name)
        return known

    async def adopt(self, config: Path | Json | ComponentConfig, name: str | None = None) -> bool:
        """Take over a config for a component (by default the config's), and all that are like it.

        Like it are those that have its definition, or one that it was to have or has had here: who
        was refused a config follows the next one. Returns False where the definition is the
        config's already. Raises StateError for an unknown component, and, when it has done the
        others, what went wrong with the first that keeps its own: its state would be gone, say.
        """
        loaded: Any = self._config(config)
        known: Any = self._current(loaded.name if name is None else name)
        before, alike = getattr(known.definition, "text", None), [known.name]
        if self.store is not None:
            versions = self._versions.setdefault(known.name, set())
            versions.add(known.definition.hash)
            alike += [one for (one,) in self.store.rows("SELECT name FROM flexiflow_components"
                f" WHERE definition IN ({','.join('?' * len(versions))}) AND name<>? ORDER BY name",
                (*versions, known.name))]
            versions.add(loaded.definition.hash)
        refused: list[BaseException] = []
        for one in alike:
            try:
                self.create_component(loaded, name=one, update=True)
            except FlexiFlowError as error:
                refused.append(error)
        for first in refused + await self._settle(alike):
            if not isinstance(first, NotThere):  # it has been removed meanwhile
                raise first
        return bool(before != loaded.definition.text)

    def register(self, component: AsyncComponent, *, _states: Json = _EMPTY) -> None:
        """Take in a component made by hand; one whose name the store knows takes that state.

        Raises StateError where another object has the name.
        """
        other = self._known(component.name) if component.name in self.components else None
        if other is component:
            return
        if other is not None or component._engine is not _ALONE:
            raise StateError(f"Component {component.name!r} is registered already",
                why="two of one name would overwrite each other", fix="use another name")
        component._engine = self  # which says what may be imported
        try:
            if component.definition is None and (self.store or component._rules or _states):
                component._define(component._compiled(component.rules, states=_states))
            self._add(component, self.store and self.store.head(component.name))
        except BaseException:
            component._engine = _ALONE
            raise

    async def register_async(self, component: AsyncComponent) -> None:
        """Register a component, write it, and publish that, before returning."""
        self.register(component)
        for error in await self._settle([component.name]):
            raise error

    def restore(self, snapshot: ComponentSnapshot, machine: StateMachine) -> AsyncComponent:
        """Make a component from a snapshot, and register it."""
        component = AsyncComponent(snapshot.name, fresh(snapshot.rules) or None, machine)
        component.head = _NO_HEAD._replace(data=fresh(snapshot.data))
        component.metadata = fresh(snapshot.metadata)
        self.register(component, _states=snapshot.states)
        return component

    def get(self, name: str) -> AsyncComponent | None:
        """Return a component, from the store if need be, or None."""
        check_name(name)
        component = self.components.get(name)
        if component is None and self.store and (head := self.store.head(name)):
            component = self._add(AsyncComponent(name, None, StateMachine(DeclaredState())), head)
        return component

    def _find(self, name: str) -> AsyncComponent:
        component = self.get(name)
        if component is None:
            raise self._unknown(name)
        return component

    def _known(self, name: str) -> AsyncComponent | None:
        """Return a component as it is by now, or None, also where another process removed it."""
        with contextlib.suppress(NotThere):
            return self.get(name) and self._current(name)
        return None

    def _current(self, name: str) -> AsyncComponent:
        """Return a component as it is by now, though another process may have changed it."""
        component = self._find(name)
        # In its turn, it does not know yet that it is gone: then catching up raises.
        if component._birth is None and (component._turn is None or (
                self.store and not self.store.rows(_STAMP, (name,)))):
            component._catch_up()
        return component

    def _unknown(self, name: str) -> StateError:
        close = difflib.get_close_matches(name, sorted(self._names()), 1)
        return NotThere(f"Unknown component: {name!r}",
            fix=f"did you mean {close[0]!r}?" if close else "make it first: "
            "create_component(config, name=...), or register --config FILE")

    def _names(self) -> set[str]:
        unborn = [name for name, one in self._unborn.items() if one._birth is not None]
        return {*(self.components if self.store is None else self.store.names()), *unborn}

    def _add(self, component: AsyncComponent, head: Json | None = None) -> AsyncComponent:
        """Take in a component: with the state that the store has for it, or as a new one."""
        component._engine = self
        if head is not None:
            component._load(head)
        elif component.definition is not None:
            self._conceive(component, component.definition)
        component.logger = component.logger or self.logger
        component.event_bus = component.event_bus or self.event_bus
        self.components[component.name] = component
        self.logger.debug("Registered component: %s", component.name)
        self._unannounced.append(component)
        self._newcomers = True
        self._wake()
        if self.event_bus.listens("engine.component.registered"):
            with contextlib.suppress(RuntimeError):  # no loop: a call that awaits publishes it
                self._spawn(self._announce)
        return component

    def _conceive(self, component: AsyncComponent, definition: Definition) -> None:
        """Plan a new component's turn 0; it is carried out before its first message."""
        _written(component.head.data, "data")
        birth = definition.birth if definition.birth.node.name == component.state else (
            definition.passage(None, "*", component.state))  # made by hand, and elsewhere
        if component.metadata is not None:  # restored: its entry is over, its timers begin again
            birth = copy.copy(birth)
            birth.steps = ()
        plan = Plan("created", component.head.data, birth)
        turn = Turn(component, None, {"type": "created"})
        follow(plan, turn.scope(birth.node.name))
        plan.state = component.state_machine._state
        component.head = component.head._replace(data=plan.data, since=dict.fromkeys(
            birth.active, turn.now), completed=turn.now if birth.completes else None)
        if self.store is not None or birth.steps or birth.timers:
            component._birth, component._unready = plan, True
            self._unborn[component.name] = component

    def _spawn(self, work: Callable[[], Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _announce(self) -> None:
        """Publish which components are new here, and let run what waited for them."""
        while self._unannounced:
            one = self._unannounced.popleft()
            if self.queue._connection is not None:
                early = self.queue.messages(f"component=? AND attempts=0 AND error IS NOT NULL"
                    f" AND {_NOT_PLACED}", (one.name,))
                rows = [self.queue.change_message(row, due=self.clock()) for row in early]
                if rows:
                    await self.queue.write(None, rows)
            facts = {"component": one.name, "seq": one.seq, "correlation_id": get_correlation_id()}
            await self.event_bus.publish("engine.component.registered", facts)

    async def _settle(self, wanted: Sequence[str] = (), quick: bool = False) -> list[BaseException]:
        """Announce and write what is new, or to be updated: all, those wanted, or the `quick` ones.

        Quick are those still to be born whose birth runs no action and sends nothing.

        What goes wrong is logged, or with those wanted returned. Who is in a turn now sees to it
        afterwards.
        """
        await self._announce()
        failed: list[BaseException] = []
        for component in [one for one in self._unborn.values()
                if (not wanted or one.name in wanted) and not live_turn(one.state_machine)
                and not (quick and (not one._birth or one._birth.actions or one._birth.sends))]:
            try:
                await component._own_turn()
            except BaseException as error:
                if not _is_own_failure(error):
                    raise
                if wanted:
                    failed.append(error)
                elif not quick:  # they are tried again at once, and said then
                    self.logger.error("%r could not be made", component.name, exc_info=error)
        return failed + [self._refused.pop(name) for name in wanted if name in self._refused]

    def _config(self, config: Any) -> ComponentConfig:
        """Return a checked config; equal ones are compiled once."""
        if isinstance(config, ComponentConfig) and config.definition is not None:
            return config
        content = read_config(config) if isinstance(config, (str, os.PathLike)) else config
        key = repr(content)
        if len(self._configs) > 1000:  # each has its own name, say
            self._configs.clear()
        if key not in self._configs:
            self._configs[key] = ConfigLoader.load_component_config(
                content, allow_imports=self.allow_imports)
        return self._configs[key]

    def _definition(self, hash: str, registry: StateRegistry) -> Definition:
        """Return a definition of the store, compiled once."""
        if hash not in self._definitions:
            self._definitions[hash] = _walked({"name": "stored", **self.store.definition(hash)},
                registry=registry, allow_imports=self.allow_imports).found.definition
        return self._definitions[hash]

    async def remove(self, name: str) -> None:
        """Remove a component with its history, timers and queued messages, for good.

        Raises StateError for an unknown name, and from within its own turn.
        """
        check_name(name)
        component = self.components.get(name)
        if component is not None and live_turn(component.state_machine) is not None:
            raise StateError(f"{name!r} is in the middle of a turn", fix="remove it afterwards")
        if await self.queue.write(lambda execute: None if sum(execute(sql, (name,)).rowcount
                for sql in _REMOVE) or component else name, (), lambda: self._forget(component)):
            raise self._unknown(name)

    def _forget(self, component: AsyncComponent | None) -> None:
        """Let go of a removed component; whoever still holds it is told at its next message."""
        if component is not None and self.components.get(component.name) is component:  # no new one
            self._unborn.pop(component.name, None)
            del self.components[component.name]
            component._birth, component._unready = None, True

    # ---- messages

    async def handle_message(self, name: str, message: str | Json, /, **fields: Any) -> Receipt:
        """Handle a message to a component: `("order-17", "pay", amount=120, id="k-88")`.

        Raises StateError for an unknown component, and for a message that is declared nowhere.
        """
        message, component = _message(message, fields), self._find(name)
        await self._announce()
        return await component.handle_message(message)

    async def send(self, name: str, message: str | Json, /, *, delay: float | str = 0,
            id: str | None = None, **fields: Any) -> Receipt:
        """Put a message into the queue: it is delivered by `run`, `delay` seconds from now.

        From within a turn it leaves with the turn's commit. The component need not exist yet.
        """
        check_name(name)
        given = check_message(_message(message, fields if id is None else {**fields, "id": id}))
        turn, pause = live_turn(), seconds(delay)
        if turn is not None and turn.component._engine is self:
            return await turn.post(name, given, pause)
        text, now = _written(payload(given), "message"), self.clock()
        key = given.get("id") or new_id()
        correlation_id = given.get("correlation_id") or get_correlation_id() or new_id()
        row = self.queue.message_row(now, name, key, correlation_id, text, now + pause)
        rows = [row, (_GIVE_PLACES, (now,))] if now + pause <= now else [row]
        sql = ("SELECT message FROM flexiflow_journal WHERE component=? AND message_id=? UNION ALL"
               " SELECT message FROM flexiflow_messages WHERE component=? AND message_id=?")
        earlier = await self.queue.write(
            lambda execute: next(execute(sql, (name, key) * 2), (None,))[0], rows)
        if earlier not in (None, text):
            raise id_taken(name, key)
        self._wake()
        return Receipt("queued", name, key, duplicate=earlier is not None)

    async def cancel(self, name: str, id: str) -> bool:
        """Take a queued message, or a timer, out of the queue; False if it is not there.

        The id of a timer stands in `status`. A dead letter stays.
        """
        check_name(name)
        sql = f"{_UNQUEUE} component=? AND message_id=? AND dead IS NULL"
        return bool(await self.queue.write(lambda execute: execute(sql, (name, id)).rowcount, ()))

    async def wait(self, name: str, *states: str,
            timeout: float | str | None = None) -> AsyncComponent:
        """Return a component once it is in one of the states, or in a child of one.

        Another process may bring it there. Raises StateError after `timeout` seconds, for a state
        that there is not, and when the component completes in another one.
        """
        component, start = self._find(name), time.monotonic()
        limit = math.inf if timeout is None else seconds(timeout)
        if not states:
            raise ArgumentError(
                f"No state to wait for: {name!r}", fix='name one or more: wait(name, "Done")')
        if live_turn(component.state_machine) is not None:
            raise StateError(f"{name!r} waits for itself", fix="wait outside its turn")
        while True:
            component = self._current(name)
            state, definition = component.state, component.definition
            known = definition.nodes if definition else component.state_machine.registry.names()
            for wanted in states:
                if wanted not in known:
                    raise StateError(f"Unknown state: {wanted!r}", fix=choose(wanted, known))
            if {*(definition.sources(state) if definition else [state])} & {*states}:
                return component
            left = limit - (time.monotonic() - start)
            if left <= 0 or component.completed is not None:
                raise StateError(f"{name!r} is in {state!r}, not in {' or '.join(states)}", why=
                    f"waited {limit:g} s" if left <= 0 else "it has completed", component=name)
            await self._sleep(min(left, 0.05 if self.store is not None else 1.0))

    async def run(self, *, until_idle: bool = False, concurrency: int = 100,
            component: str | None = None) -> int:
        """Deliver queued messages and due timers, of one component or of all; return how many.

        Those that failed do not count. Goes on until `close`, or until nothing is due. Components
        run concurrently, the messages of one in order. Being cancelled gives back what it was at
        work on.
        """
        check_count("concurrency", concurrency)
        if live_turn() is not None:
            raise StateError("Delivery from within a turn", fix="let the turn end first")
        return await _Delivery(self, component, concurrency, until_idle).run()

    async def _failed(self, row: Json, error: Any, dead: bool = False) -> None:
        """Count a failed attempt: the message comes again later, or is given up."""
        name, now, component = row["component"], self.clock(), self.components.get(row["component"])
        begun = self._claimed.get(name) is row  # and counted then
        release = self._release(name) if begun else []
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        facts: Json = {"state": component and component.state}

        def count(execute: Callable[..., Any]) -> Json | None:
            """Return the row as it is then, or None where somebody else sees to it."""
            for statement in release:
                execute(*statement)
            found = self.queue.messages(*_of_row("dead IS NULL AND", row))
            made = isinstance(error, NotThere) and component is None and (
                name in self.components or execute(_STAMP, (name,)).fetchone())
            if made or not found or (begun and self._held(name)):
                return None  # its component is there by now; it is over; it is another's
            before, attempts, due, intact = found[0], 0, now + 60.0, _intact(found[0])
            if component is None or not intact:  # nobody has tried it, or knows how often
                last = dead or now - before["sent"] > UNKNOWN_TARGET_LIMIT
            else:
                attempts = before["attempts"] + (not (begun or dead))
                retry = getattr(component.definition, "retry", QUEUE_RETRY)
                refused = isinstance(getattr(error, "receipt", None), Receipt)
                last = dead or refused or attempts >= retry.max_attempts
                due = now + retry.delay(attempts, random.random())
            facts.update(error=f"{type(error).__name__}: {said(error)}{place_of(error)}",
                traceback="".join(lines)[-4000:], attempts=attempts, intact=intact)
            changed = {"attempts": attempts, "place": None, "error": json.dumps(facts),
                **({"dead": now} if last else {"due": due})}
            execute(*self.queue.change_message(before, **changed))
            return {**before, **changed, "seq": component and component.seq}

        counted = None if self is _ALONE else await self.queue.write(count, ())
        if counted is None:  # nobody, or somebody else, sees to it
            self.logger.error("Message %s to %r failed", row["id"], name, exc_info=error)
            return
        self.retries += counted["dead"] is None
        self.logger.error("Message %s to %r failed, attempt %d, %s", counted["id"], name,
            counted["attempts"], "given up" if counted["dead"] is not None else
            f"again in {counted['due'] - now:.1f} s", exc_info=error)
        if counted["dead"] is not None:
            with contextlib.suppress(ValueError, TypeError):
                counted["message"] = json.loads(counted["message"])
            await self.event_bus.publish("message.dead", {"error": said(error), **{key: counted[key]
                for key in ("component", "message", "id", "correlation_id", "seq")}})

    # ---- claims: see `Turn.claim`

    def _held(self, *name: str) -> list[str]:
        """Return the names of components whose code another process runs: of all, or of one."""
        now = self.clock()
        return [one for (one,) in self.queue.rows(_CLAIMED + " AND name=?" * len(name),
            (self.id, now, now + 2 * LEASE, *name))]

    def _hold(self, name: str, claimant: Json | Turn) -> None:
        """Renew the claim on a component for as long as its code runs."""
        self._claimed[name] = claimant
        loop = asyncio.get_running_loop()
        if self._renewing is not loop:
            self._renewing = loop
            loop.call_later(LEASE / 3, self._renew)

    def _renew(self) -> None:
        self._renewing = None
        for name, claimant in self._claimed.items():
            self._write_unwaited([(_RECLAIM, (self.id, self.clock() + LEASE, name, self.id))])
            self._hold(name, claimant)

    def _release(self, name: str) -> list[Row]:
        """Return what lets go of a component."""
        self._claimed.pop(name, None)
        return [(_RECLAIM, (None, None, name, self.id))]

    def _give_back(self, row: Json) -> None:
        """Let go of a queued message whose attempt was broken off, and does not count."""
        if self._claimed.get(row["component"]) is row:
            self._write_unwaited([(_COUNT, {**row, "by": -1}), *self._release(row["component"])])

    def _write_unwaited(self, rows: list[Row]) -> None:
        """Write what nobody waits for; where that fails, the lease ends by itself."""
        def told(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is not None:
                self.logger.warning("A claim was not written", exc_info=done.exception())

        self.store.write(None, rows).add_done_callback(told)

    # ---- sleeping

    def _next_due(self) -> float:
        """Return when the next message or timer comes due that has no place yet."""
        sql = f"SELECT MIN(due) FROM flexiflow_messages WHERE {_NOT_PLACED}"
        return next((due for (due,) in self.queue.rows(sql) if _is_number(due)), math.inf)

    async def _sleep(self, limit: float, *tasks: Any) -> None:
        """Sleep until a task is done, something is sent or due, but no longer than `limit`.

        The wall clock may be set meanwhile, and other processes do not wake us.
        """
        loop = asyncio.get_running_loop()
        if self._alarm is None or self._alarm.get_loop() is not loop:
            self._alarm = loop.create_future()
        await asyncio.wait([self._alarm, *tasks], return_when=asyncio.FIRST_COMPLETED,
            timeout=min(limit, max(0.001, self._next_due() - self.clock())))

    def _wake(self) -> None:
        alarm, self._alarm = self._alarm, None
        if alarm is not None and not alarm.done() and not alarm.get_loop().is_closed():
            alarm.set_result(None)

    # ---- dead letters, rules, history

    def count(self, outcome: str, begun: float) -> None:
        """Note how a message came out that was begun at a moment of `time.perf_counter`."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.handling += time.perf_counter() - begun

    def dead_letters(self, name: str | None = None, *, limit: int | None = None,
            after: int | None = None) -> list[Json]:
        """Return the messages that were given up, the oldest first, as dicts.

        Each has number, component, id, correlation_id, message (text where it is damaged),
        attempts, error, traceback (its end), state (at the failure), sent and dead (epoch seconds).
        `after` is the number of the last one that has been seen.
        """
        _check_query(name, limit)
        letters = self.queue.messages(
            f"dead IS NOT NULL AND component IS{' NOT' * (name is None)} ? AND number>?"
            " ORDER BY number LIMIT COALESCE(?, -1)", (name, after or 0, limit))
        keys = "number component id correlation_id message attempts sent dead".split()
        found = []
        for letter in letters:
            recorded = _recorded(letter)
            intact = recorded.pop("intact", True)  # when it was given up: else that is why it was
            if (letter["error"] and not recorded) or (intact and not _intact(letter)):
                raise self.queue.damaged(f"message {letter['number']}")
            with contextlib.suppress(ValueError, TypeError):
                letter["message"] = json.loads(letter["message"])
            found.append({**{key: letter[key] for key in keys}, **recorded})
        return found

    async def redrive(self, *numbers: int, name: str | None = None,
            discard: bool = False) -> list[Json]:
        """Give dead letters back to the queue, as new: those numbers, a component's, or all.

        With `discard` they are deleted instead, and their ids forgotten. Returns those that no
        other call was quicker at. Raises StateError for a number that is no dead letter's.
        """
        known, now = self.dead_letters(name), self.clock()
        letters = [one for one in known if not numbers or one["number"] in numbers]
        missing = {*numbers} - {one["number"] for one in letters}
        if missing:
            raise NotThere(f"No dead letter has the number {min(missing)}",
                fix=choose(min(missing), [str(one["number"]) for one in known]))
        rows = [_of_row(_UNQUEUE, one) if discard else self.queue.change_message(
            one, dead=None, due=now, attempts=0, error=None, place=None) for one in letters]

        def carry_out(execute: Callable[..., Any]) -> list[Json]:
            found = [one for one, (sql, values) in zip(letters, rows)  # else others were quicker
                if execute(f"{sql} AND dead IS NOT NULL", values).rowcount]
            execute(_GIVE_PLACES, (now,))
            return found

        letters = await self.queue.write(carry_out, ()) if rows else []
        self._wake()
        return letters

    async def update_rules(self, name: str, rules: list[Json], *,
            replace: bool = False) -> list[Json]:
        """Add rules to a component, or replace them; see AsyncComponent.update_rules."""
        return await self._find(name).update_rules(rules, replace=replace)

    def accepts(self, name: str) -> list[Json]:
        """Return what a component takes now, as dicts, in the order in which they are asked.

        Each has type, from (the state that it is declared on), guard (as text, or None) and to
        (None: it stays). What a state class of one's own takes is not known.
        """
        component = self._current(name)
        if component.completed is not None:
            return []
        definition, leaf = component.definition, component.state
        found = [(kind, source, rule.guard and rule.guard.text(), rule.to)
            for source in (definition.sources(leaf) if definition else ())
            for rule in definition.rules_of(source) for kind in rule.on]
        moves = moves_of(type(component.state_machine._state))
        found += [(kind, leaf, None, target) for kind, target in moves.items()]
        return [dict(zip(("type", "from", "guard", "to"), one)) for one in found]

    async def dry_run(self, name: str, message: str | Json, /, **fields: Any) -> Json:
        """Return what handling a message would do now, and do nothing of it.

        A dict of a receipt's component, id, outcome, from_state, to_state, reason and duplicate;
        of changes (what `assign` makes of the data: key -> [before, after], None where it is
        not), sends (dicts of to, message, delay, id), emits and actions (names), timers (that
        begin: dicts of message, due, state) and ended (those that end). Guards are asked;
        actions and the user's state classes are not run: the outcome of a class is "class".
        Raises what handling the message would raise before its actions run.
        """
        given, component = check_message(_message(message, fields)), self._current(name)
        turn = Turn(component, None, given)
        turn.id, turn.text = given.get("id") or new_id(), _written(payload(given), "message")
        earlier = await turn._answered()
        plan = turn._decided() if earlier is None else Plan(earlier.outcome, turn.base)
        if plan.outcome == "class" and moves_of(type(turn.state)):  # a built-in's table
            await turn._ask_class(plan)
        node = plan.passage.node.name if plan.passage else turn.leaf
        receipt = Receipt(plan.outcome, name, turn.id, turn.leaf, node,
            reason=plan.reason) if earlier is None else earlier
        was, now = turn.base, plan.data
        return {**{key: getattr(receipt, key) for key in (
                "component", "id", "outcome", "from_state", "to_state", "reason", "duplicate")},
            "changes": {key: [was.get(key), now.get(key)] for key in {**was, **now}
                if not same(was.get(key, MISSING), now.get(key, MISSING))},
            "sends": [{"to": one.to, "message": one.message, "delay": one.delay, "id": one.id}
                for one in plan.sends],
            "emits": [event for event, _ in plan.emits],
            "actions": [f"{one.__module__}:{one.__qualname__}" for one in plan.actions],
            "timers": [{"message": turn.head.definition.by_number[number].timer_type, "due": due,
                "state": owner} for due, owner, number in plan.timers],
            "ended": [one for one in self._facts(name)["timers"] if one["state"] in plan.ended]}

    def history(self, name: str | None = None, *, limit: int | None = None,
            before: int | None = None, since: float | str = 0) -> list[Json]:
        """Return what happened, to one component or to all, the newest first.

        Each entry is a dict of number, component, seq, id, correlation_id, message, outcome,
        from_state, to_state, reason, data (where it changed) and time (epoch seconds). `before`
        is the number of an entry that has been seen: what follows are those before it. `since`
        is an age, "2h", or a moment in epoch seconds.
        """
        _check_query(name, limit)
        check_count("before", 1 if before is None else before)
        moment = self.clock() - seconds(since) if isinstance(since, str) else since
        where: Any = () if not (before or moment) else (
            "number<COALESCE(?, number+1) AND time>=?", (before, moment))
        return self.queue.journal(name, limit, *where)

    async def prune(self, name: str | None = None, *, keep: int | None = None, older_than: float
            | str | None = None, completed: bool = False, dry_run: bool = False) -> Json:
        """Forget history: of one component or of all; the last row of each always stays.

        What goes is not among the last `keep` rows and older than `older_than` (seconds, or like
        "30d"). `completed` also removes the components that completed before then. Returns `rows`
        and `of` (journal rows that go, and that there are), `ids` (component and id of each
        message that is forgotten, so that the same id would be handled again) and `components`.
        """
        if keep is None and older_than is None and not completed:
            raise ArgumentError("Nothing to prune by", fix="keep=, older_than= or completed=True")
        check_count("keep", 1 if keep is None else keep)
        before = math.inf if older_than is None else self.clock() - seconds(older_than)
        kept = keep or (math.inf if older_than is None else 1)  # if by completion alone: all rows
        store, known = self._stored(), {**self.components}
        found: Json = {}

        def forget(execute: Callable[..., Any]) -> None:
            found.update(rows=0, of=0, ids=[], components=[])  # it may be carried out again
            for one in self._kept(name):
                ((count, last, young, done),) = store.rows(_SPAN, (one, before < math.inf, before))
                gone = completed and _is_number(done) and done < before
                end = last + 1 if gone else min(last + 1 - kept, last if young is None else young)
                ids = [id for (id,) in store.rows(_PAST, (one, end))]
                if ids or gone:
                    store.head(one)  # raises if that is damaged by which it was decided
                    execute(_FORGET, (one, end))
                found["rows"], found["of"] = found["rows"] + len(ids), found["of"] + count
                found["ids"] += [{"component": one, "id": id} for id in ids if id]
                found["components"] += [one] * gone
                for sql in _REMOVE * gone:
                    execute(sql, (one,))

        if dry_run:
            with store.at_once():
                forget(lambda *statement: None)
        else:
            await store.write(forget, (), lambda: [
                *map(self._forget, map(known.get, found["components"]))])
        return found

    async def backup(self, path: Path) -> None:
        """Copy the store, as it is at one moment, into a file that is a store by itself."""
        await self._stored().settled()  # a commit under way may fail
        with self.store._translated():
            self.store.backup(os.fspath(path))

    def replay(self, name: str | None = None, config: Any = None) -> list[Json]:
        """Decide a component's history again, or everybody's, and say where that differs.

        By the definitions that are stored, or by `config`; nothing is run or changed. Each
        answer is a dict of component, steps, same, differences (seq, message, was, now: outcome,
        state before and after, data if that differs), state, would_be, and skipped: why not.
        """
        store, other = self._stored(), None if config is None else _on_paper(config)

        @functools.cache
        def definition_of(hash: str) -> tuple[Definition, str, Definition]:
            stored = _on_paper({"name": "stored", **store.definition(hash)})
            return (*(other or stored), stored[0])

        with store.at_once():
            return [_replayed(one, store.journal(one)[::-1], (store.head(one) or {})["definition"],
                definition_of) for one in self._kept(name)]

    def _kept(self, name: str | None) -> list[str]:
        """Return the names of the components that have a history: one, or all."""
        _check_query(name, None)
        if name is not None and self._stored().head(name) is None:
            if name not in self._unborn:
                raise self._unknown(name)
            return []
        return self._stored().names() if name is None else [name]

    def _stored(self) -> SQLiteStore:
        if self.store is None:
            raise StateError("This engine keeps no history", fix='FlexiFlowEngine(store="flow.db")')
        return self.store  # type: ignore[no-any-return]

    def status(self, name: str | None = None) -> list[Json]:
        """Return what is known of one component or of all, as dicts, by name.

        Each has name, state, seq, since (epoch seconds), data, completed, waiting, dead and
        timers: dicts of message, state (whose timer it is), due, id, attempts and error (of the
        last attempt, or None); that of one component also what it `accepts`, None where its code
        is not to be had here, and its queue: dicts of number, message, due, id, attempts and
        error. Raises StateError for an unknown name.
        """
        with self.queue.at_once():
            if name is None:
                return [self._facts(one) for one in sorted(self._names())]
            facts = {**self._facts(name), "accepts": None}
            waiting = self.queue.messages("component=? AND dead IS NULL AND state IS NULL"
                " ORDER BY place IS NULL, place, due, number", (name,))
            facts["queue"] = [{"number": row["number"], "message": row["message"], **_pending(row)}
                for row in map(self.queue.sealed, waiting)]
            with contextlib.suppress(ImportError_):
                facts["accepts"] = self.accepts(name)
            return [facts]

    def find(self, part: str = "", *, state: str | None = None, failed: bool = False,
            waiting: bool = False, after: str = "", limit: int) -> tuple[list[str], int]:
        """Return at most `limit` names, in order, of components, and how many there are in all.

        Those whose name has a `part`, that are in a `state`, `failed` (they have dead letters),
        `waiting` (they have timers). `after` is the last name that has been seen.
        """
        if self.store is None:
            names = [one["name"] for one in self.status() if part.lower() in one["name"].lower()
                and state in (None, one["state"]) and (one["dead"] or not failed)
                and (one["timers"] or not waiting)]
            return [name for name in names if name > after][:limit], len(names)
        matching = ("FROM flexiflow_components WHERE instr(lower(name), lower(?))"
            " AND COALESCE(?, state)=state AND (NOT ? OR EXISTS (SELECT 1 FROM flexiflow_messages"
            " WHERE component=name AND dead IS NOT NULL)) AND (NOT ? OR EXISTS (SELECT 1 FROM"
            " flexiflow_messages AS m WHERE component=name AND dead IS NULL AND m.state NOT NULL))")
        asked = (part, state, failed, waiting)
        ((total,),) = self.store.rows(f"SELECT COUNT(*) {matching}", asked)
        found = self.store.rows(
            f"SELECT name {matching} AND name>? ORDER BY name LIMIT ?", (*asked, after, limit))
        return [name for (name,) in found], total

    def _facts(self, name: str) -> Json:
        check_name(name)
        live = self.components.get(name)
        if live is not None and (self.store is None or live._birth is not None):
            head: Any = {**live.head._asdict(), "data": live.data, "state": live.state}
        else:
            head = self.store and self.store.head(name)
        if head is None:
            raise self._unknown(name)
        rows = self.queue.messages("component=? ORDER BY due, number", (name,))
        alive = [row for row in rows if row["dead"] is None]
        # A damaged row may be a timer that has lost its state: `sealed` raises.
        timers = [{"message": self.queue.sealed(row)["message"]["type"], "state": row["state"],
            **_pending(row)} for row in alive if row["state"] is not None or not _intact(row)]
        return {"name": name, "state": head["state"], "seq": head["seq"], "data": head["data"],
            "since": head["since"].get(head["state"]), "completed": head["completed"],
            "dead": len(rows) - len(alive), "waiting": len(alive) - len(timers), "timers": timers}


_ALONE = FlexiFlowEngine()  # of the components that belong to none: it delivers and keeps nothing


# --------------------------------------------------------------------------------------------
# 12. Views: explain, Mermaid, SVG, text
# --------------------------------------------------------------------------------------------
# What a config means, as values, text and a picture. All is made from what the walk has found, so
# it shows what will be executed. Whatever a name holds, it stays a label.


def _entries(pairs: Iterable[tuple[str, Json]]) -> list[str]:
    """Return lines: each head, and below it those of its facts that there are."""
    return [line for head, facts in pairs for line in (f"  {head}",
        *(f"    {label}: {fact}" for label, fact in facts.items() if fact))]


@dataclass
class StateResolution:
    """How a state of a config was found."""

    key: str
    dotted_path: str | None  # None for a declared state
    resolved: bool
    is_state_subclass: bool
    error: str | None = None


@dataclass
class PackInfo:
    """A pack of a config."""

    name: str
    provided_keys: list[str]
    transitions: list[TransitionSpec]
    depends_on: list[str]


def _tree(nodes: Iterable[Node]) -> Iterator[Node]:
    """Yield states, each before its children."""
    for node in nodes:
        yield node
        yield from _tree(node.children)


@dataclass
class ConfigExplanation:
    """What a config means, and what is wrong with it."""

    config_path: str
    name: str | None = None
    initial_state: str | None = None
    rules_count: int = 0
    states: list[StateResolution] = field(default_factory=list)
    builtin_states: list[str] = field(default_factory=list)
    packs: list[PackInfo] = field(default_factory=list)
    state_providers: dict[str, str] = field(default_factory=dict)  # state -> pack
    pack_order: list[str] = field(default_factory=list)
    initial_state_resolution: list[str] = field(default_factory=lambda: ["packs", "builtin"])
    warnings: list[Diagnostic] = field(default_factory=list)
    errors: list[Diagnostic] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)  # dotted paths that were not imported
    definition: Definition | None = field(default=None, repr=False, compare=False)

    @property
    def is_valid(self) -> bool:
        """Whether the config will load."""
        return not self.errors

    def _repr_svg_(self) -> str | None:
        """What a notebook shows: a picture of a good config."""
        return visualize(self, format="svg") if self.definition is not None else None

    def format(self) -> str:
        """Return the explanation as text, in blocks of lines; what is empty is left out."""
        packs = _entries((f"{pack.name}:", {"provides": ", ".join(pack.provided_keys) or "(none)",
            "transitions": pack.transitions and f"{len(pack.transitions)} defined",
            "depends_on": ", ".join(pack.depends_on)}) for pack in self.packs)
        states = _entries((f"{'OK' if one.resolved and one.is_state_subclass else '??'} {one.key}"
            + (f": {one.dotted_path}" if one.dotted_path else ""), {"  Error": one.error})
            for one in sorted(self.states, key=operator.attrgetter("key")))
        states += [f"  OK {key} (from {self.state_providers[key]})"
            for key in sorted(self.state_providers)]
        nodes = [*self.definition.nodes.values()] if self.definition else []
        initial = {node.initial for node in nodes}
        nested = ["  " * len(node.around) + f"  {node.name}"
            + " (initial)" * (node.name in initial) + " (final)" * node.final
            for node in _tree(node for node in nodes if node.children and not node.around)]
        read = self.initial_state is not None
        blocks: list[tuple[str, list[str]]] = [
            ("FlexiFlow Config Explanation", ["=" * 40, f"Source: {self.config_path}"]),
            ("Component:", [f"  name: {self.name or '(missing)'}",
                f"  initial_state: {self.initial_state or '(missing)'}",
                f"  rules: {self.rules_count} rule(s)"] if read else ["  (not read)"]),
            ("Packs:", packs and [*packs, "", f"Pack order: {' -> '.join(self.pack_order)}"]),
            (f"Resolution policy: {' -> '.join(self.initial_state_resolution)}", ["", "States:",
                *(states or ["  (no custom states)"]),
                f"  Built-in: {', '.join(sorted(self.builtin_states))}"] if read else []),
            ("Nested states:", nested),
            ("Not checked (imports are off):", [f"  {path}" for path in self.unchecked]),
            ("Warnings:", _entries((f"WARN {one.what}", {"Why": one.why, "Fix": one.fix})
                for one in self.warnings)),
            ("Errors:", _entries((f"ERROR {one.what}", {"Why": one.why, "Fix": one.fix})
                for one in self.errors))]
        text = ["\n".join(map(printable, [title, *lines])) for title, lines in blocks if lines]
        return "\n\n".join([*text, "Status: OK - config will load" if self.is_valid
            else f"Status: INVALID - {len(self.errors)} error(s) found"])


def _rules_of(definition: Definition, sources: Iterable[str]) -> Iterator[Rule]:
    return itertools.chain.from_iterable(map(definition.rules_of, sources))


def _ways(definition: Definition, leaf: Node, sources: Iterable[str]) -> Iterator[Node]:
    """Yield to which states the rules on some, or the table of a built-in class, lead."""
    moves = [*map(DEFAULT_REGISTRY.get, moves_of(leaf.cls).values())]
    yield from (node for node in definition.nodes.values() if node.cls in moves) if moves else ()
    yield from (definition.innermost(rule.to) for rule in _rules_of(definition, sources) if rule.to)


def _reached(definition: Definition) -> set[str]:
    """Return the states that can be reached, with those around them.

    All of them, where a class of the user's can be reached: it may lead anywhere.
    """
    found: set[str] = set()
    ahead = [definition.birth.node]
    for node in ahead:  # which grows
        if not (node.declared or node.cls in BUILT_IN):
            return {*definition.nodes}
        if node.name not in found:  # the rules on one state, or "*", are followed but once
            new = () if node.completes else {*definition.sources(node.name)} - found
            found.update((node.name, *new))
            ahead += _ways(definition, node, new)
    return found


def _effects_of(source: Json) -> Iterator[tuple[str, Json]]:
    """Yield the place and the text of every part of a config that may have effects."""
    yield from ((f"rules[{number}]", rule) for number, rule in enumerate(source.get("rules") or []))
    for name, state in (source.get("states") or {}).items():
        for key in ("entry", "exit"):
            if isinstance(state, dict) and state.get(key):
                yield f"states.{name}.{key}", state[key]


def _near_types(types: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of message types of which one may be a slip of the pen for the other."""
    like: dict[str, list[str]] = {}  # a type with one letter left out -> such types
    for kind in sorted(one for one in types if len(one) < 100):  # no essay: it takes the square
        parts = [kind[:at] + kind[at + 1:] for at in range(len(kind) + 1)]
        for other in sorted({other for part in parts for other in like.get(part, ())}):
            if (min(len(kind), len(other)) > 4 and kind[-1] == other[-1] and one_edit(kind, other)
                    and re.sub("[^a-z]", "", kind) != re.sub("[^a-z]", "", other)):
                yield other, kind
        for part in parts:
            like.setdefault(part, []).append(kind)


def _advice(definition: Definition, name: str, given: Iterable[str]) -> Iterator[Diagnostic]:
    """Yield what is odd about a good config; `given` are the states that it names itself."""
    def odd(place: str, what: str, why: str | None = None, fix: str | None = None) -> Diagnostic:
        return Diagnostic("warning", f"{place}: {what}", why, fix, {"at": place})

    nodes, reached = definition.nodes, _reached(definition)
    for key in given:
        node, place = nodes[key], f"states.{key}"
        if key not in reached:
            yield odd(place, "This state is never reached", fix="let a rule lead to it")
        elif node.declared and not (node.children or node.final or len(nodes) == 1):
            sources = definition.sources(key)
            if all(one is node for one in _ways(definition, node, sources)):
                yield odd(place, "This state cannot be left, and is not final",
                    fix='"final": true, or a rule that leads on')
            elif all(rule.after and rule.guard for rule in _rules_of(definition, sources)
                    if rule.to):
                yield odd(place, "This state may never be left", "only timers lead on, and one "
                    "whose guard is false is used up", "a rule without a guard, or for a message")
    dead = {name for name, node in nodes.items() if node.completes or name not in reached}
    for rule in definition.rules:
        place = f"rules[{rule.number}]"
        if dead.issuperset(rule.sources):
            yield odd(place, "This rule can never fire",
                "where it stands is never reached, or final: " + ", ".join(rule.sources))
        if rule.after and not (rule.to or any(rule.effects)):
            yield odd(place, "This timer does nothing",
                fix="let it lead to a state, or have an effect")
    for first, second in _near_types(definition.types):
        yield odd("rules", f"Message types that differ by one letter: {first!r}, {second!r}",
            fix="if they are the same, write them the same")
    for place, text in _effects_of(definition.source):
        sends = text.get("send") or []
        for send in sends if isinstance(sends, list) else [sends]:
            own, kind = send["to"] in ("$component", name), send["type"]
            if own and not (definition.open or kind[:1] == "$" or kind in definition.types):
                yield odd(f"{place}.send", f"Nobody takes {kind!r} here",
                    "it would end as a dead letter", choose(kind, definition.types))


def _resolutions(walk: _Walk) -> Iterator[StateResolution]:
    """Yield how each state was found: by what is wrong at the place that names it."""
    wrong = {one.context.get("at"): one for one in reversed(walk.found.errors)}
    for key, path in walk.found.states.items():
        place = f"states.{key}"
        if place not in wrong and path is not None and path == walk.config.get("initial_state"):
            place = "initial_state"
        problem, checked = wrong.get(place), path is None or walk.imports
        yield StateResolution(key, path, is_state_subclass=checked and not problem,
            resolved=checked and not isinstance(problem and problem.error, ImportError_),
            error=problem and problem.what[len(place) + 2:])


def explain(config: Path | Json, *, imports: bool = True,
        allow_imports: Sequence[str] | None = None) -> ConfigExplanation:
    """Say what a config means and whether it will load; never raises for what is wrong with it.

    Dotted paths are imported, as loading will; `imports=False` runs none of the config's code
    and lists what was therefore not checked.
    """
    walk = _Walk(config, imports, allow_imports)
    found, good = walk.problems(), walk.good
    if good:  # it could be read: what is wrong is not missing
        good = {**{key: str(walk.config[key]) for key in ("name", "initial_state")
            if key in walk.config}, **good}
    if found.definition is not None:
        found.warnings += _advice(found.definition, good["name"], found.states)
    return ConfigExplanation(found.path or "(dict)", good.get("name"), good.get("initial_state"),
        rules_count=len(good.get("rules", ())), states=[*_resolutions(walk)],
        builtin_states=[*BUILT_IN_NAMES], packs=[PackInfo(*pack) for pack in found.packs],
        state_providers=found.providers, pack_order=[pack[0] for pack in found.packs],
        initial_state_resolution=found.policy, warnings=found.warnings, errors=found.errors,
        unchecked=found.unchecked, definition=found.definition)


def columns(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield rows of cells as lines, each column as wide as its widest cell."""
    lines = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()


class _Graph:
    """What a picture shows: states, and the ways between them; and that as a table of text."""

    def __init__(self, found: ConfigExplanation) -> None:
        self.found, definition = found, found.definition
        self.nodes, self.rules = (definition.nodes, definition.rules) if definition else ({}, [])
        self.pack_edges = [edge for pack in found.packs for edge in pack.transitions]
        self.roots = [node for node in self.nodes.values() if not node.around]

    def edges(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield source, cause, guard and target (or "") of what packs, rules and classes tell."""
        for edge in self.pack_edges:
            yield edge.from_state, edge.on_message, edge.guard or "", edge.to_state
        for rule in self.rules:
            cause = ", ".join(rule.on) or rule.timer_type
            guard = rule.guard.text() if rule.guard else ""
            yield from ((source, cause, guard, rule.to or "") for source in rule.sources)
        yield from ((node.name, kind, "", target) for node in self.nodes.values()
            for kind, target in moves_of(node.cls).items())

    def lines(self, active: str | None) -> Iterable[str]:
        """Return the picture: here, a way a line; `>` is where it begins, `*` where it is."""
        ways: dict[str, list[list[str]]] = {}
        for source, *way in self.edges():
            ways.setdefault(source, []).append(way)
        rows: list[tuple[str, ...]] = [("STATE", "ON", "GUARD", "TO")]
        shown = {node.name: "  " * len(node.around) + node.name + " (final)" * node.final
            for node in _tree(self.roots)}
        for name in {**shown, **ways}:
            mark = "* " if name == active else "> " if name == self.found.initial_state else "  "
            rows += [(mark + shown.get(name, name), cause, guard or "-", target or "(stays)")
                for cause, guard, target in ways.get(name) or [["-", "", "-"]]]
        return columns(rows)


def _with_guard(cause: str, guard: str) -> str:
    return f"{cause} [{guard}]" if guard else cause


class _Mermaid(_Graph):
    """One flowchart being drawn."""

    WORDS = frozenset("end graph flowchart subgraph class classdef click style linkstyle default "
        "direction call href interpolate".split())
    # A name that may be an id; the ids that we make up ourselves are none.
    PLAIN_ID = "(?!state_|pack_|start_|any_)[A-Za-z][A-Za-z0-9_]*"
    UNSAFE = r"[^\w .,:/+*=()\[\]>-]"  # whatever Mermaid or HTML might read

    def lines(self, active: str | None) -> Iterator[str]:
        """Yield the lines of the flowchart."""
        found = self.found
        self.ids: dict[str, str] = {}
        yield from ("flowchart LR", "", "%% Edge labels: message [guard]")
        if found.pack_order:
            yield "%% pack_order: " + ", ".join(map(self.label, found.pack_order))
        yield f"%% initial_state_resolution: [{', '.join(found.initial_state_resolution)}]\n"
        for number, pack in enumerate(found.packs):
            yield f'subgraph pack_{number}["pack: {self.label(pack.name)}"]'
            yield from (f"  {self.box(key)}" for key in pack.provided_keys)
            yield from ("end", "")
        for node in self.roots:
            if node.name not in found.state_providers:
                yield from self.state(node)
        ends = {end for edge in self.pack_edges for end in (edge.from_state, edge.to_state)}
        unknown = ends.difference(self.nodes, found.builtin_states, found.state_providers)
        yield from (f"{self.box(name)}:::unknown" for name in sorted(unknown))
        if unknown:
            yield "classDef unknown stroke-dasharray: 5 5, stroke: #999"
        yield ""
        if self.nodes and found.initial_state:
            yield f"start_(( )) --> {self.id_of(found.initial_state)}"
        for source, cause, guard, target in self.edges():
            if source == "*" and "*" not in self.ids:
                self.ids["*"] = "any_"
                yield 'any_(("*"))'
            label = self.label(_with_guard(cause, guard))
            yield f'{self.id_of(source)} -->|"{label}"| {self.id_of(target or source)}'
        if active in self.nodes:
            yield f"style {self.id_of(active)} stroke-width:4px"

    def id_of(self, name: str) -> str:
        """Return an id that Mermaid takes, the name itself where that is one."""
        if name not in self.ids:
            plain = re.fullmatch(self.PLAIN_ID, name) and name.lower() not in self.WORDS
            self.ids[name] = name if plain else f"state_{len(self.ids)}"
        return self.ids[name]

    def label(self, text: str) -> str:
        """Escape a label: every unsafe character becomes its number."""
        return re.sub(self.UNSAFE, lambda found: f"#{ord(found[0])};", text)

    def box(self, name: str, shape: str = '{}["{}"]') -> str:
        return shape.format(self.id_of(name), self.label(name))

    def state(self, node: Node) -> list[str]:
        """Return the lines of a state: a box, or a subgraph of its children."""
        if not node.children:
            return [self.box(node.name, '{}(["{}"])' if node.final else '{}["{}"]')]
        inner = (f"  {line}" for child in node.children for line in self.state(child))
        return [f"subgraph {self.box(node.name)}", *inner, "end"]


_Size = tuple[float, float]  # width, height; or x, y


class _Layers:
    """Boxes in layers, joined by edges whose labels are boxes of their own: nothing overlaps.

    After Sugiyama, Tagawa and Toda (1981): break circles, rank, order, place. `sizes` are (width,
    height) of boxes by name; an edge is (source, target, size of its label), never to itself.
    `boxes` are their sizes as drawn, where edges end: what stands beside a box takes room, too.
    """

    GAP = 20.0

    def __init__(self, sizes: dict[Any, _Size], edges: list[tuple[Any, Any, _Size]],
            boxes: dict[Any, _Size]) -> None:
        self.sizes, self.edges, self.boxes = dict(sizes), edges, boxes
        self.back: set[int] = set()  # edges that close a circle: they are drawn upwards
        # Neighbours above and below, and how strongly they pull.
        self.near: dict[int, dict[Any, dict[Any, int]]] = {
            side: collections.defaultdict(dict) for side in (-1, 1)}
        rank = self._ranks()
        self.layers: list[list[Any]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
        for name, layer in rank.items():
            self.layers[layer].append(name)
        self.labels: list[Any] = []
        self.chains = [self._chain(number, rank) for number in range(len(edges))]
        rounds = max(2, min(60, 40_000 // (len(self.sizes) + 1)))
        self.layers = min(self._orders(min(rounds, 16)), key=self._crossings)
        x = self._place(rounds)
        left = min((x[one] - self.sizes[one][0] / 2 for one in x), default=0.0)
        self.at: dict[Any, tuple[float, float]] = {}  # the middles of all
        top = 0.0
        for row in self.layers:
            height = max(self.sizes[one][1] for one in row)
            self.at.update((one, (x[one] - left, top + height / 2)) for one in row)
            top += height + self.GAP
        self.height = max(0.0, top - self.GAP)
        self.width = max((self.at[one][0] + self.sizes[one][0] / 2 for one in x), default=0.0)

    def _ranks(self) -> dict[Any, int]:
        """Return the layer of each box: even ones, the longest way from the top; labels between.

        It goes depth first, and notes on the way which edges lead back. To what no edge leads, as
        to `*`, stands right above the first box that it leads to.
        """
        ahead: dict[Any, list[tuple[int, Any]]] = {name: [] for name in self.sizes}
        for number, (source, target, _) in enumerate(self.edges):
            ahead[source].append((number, target))
        way: set[Any] = set()  # the boxes on the way to where we are
        done: dict[Any, None] = {}  # in the order in which they were left
        # What is to be done, the last first: edges to follow (-1: none leads here), and boxes to
        # leave (None), below all that is reached from them.
        steps: list[tuple[int | None, Any]] = [(-1, name) for name in reversed(self.sizes)]
        while steps:
            edge, name = steps.pop()
            if edge is None:
                way.remove(name)
                done[name] = None
            elif name in way:
                self.back.add(edge)
            elif name not in done:
                way.add(name)
                steps += [(None, name), *reversed(ahead[name])]
        below = {name: [target for number, target in ways if number not in self.back]
            for name, ways in ahead.items()}
        rank = dict.fromkeys(reversed(done), 0)
        for name in rank:
            for target in below[name]:
                rank[target] = max(rank[target], rank[name] + 2)
        for name in rank.keys() - {*itertools.chain.from_iterable(below.values())}:
            rank[name] = min((rank[target] for target in below[name]), default=2) - 2
        return rank

    def _chain(self, number: int, rank: dict[Any, int]) -> list[Any]:
        """Lay an edge through the layers between; return its boxes, bends and label, from above."""
        source, target, label = self.edges[number]
        above, below = (target, source) if number in self.back else (source, target)
        bends = [(number, layer) for layer in range(rank[above] + 1, rank[below])]
        self.sizes.update(dict.fromkeys(bends, (4.0, 0.0)))
        self.labels.append(bends[len(bends) // 4 * 2])  # where no boxes are
        self.sizes[self.labels[-1]] = label
        for bend in bends:
            self.layers[bend[1]].append(bend)
        chain = [above, *bends, below]
        for upper, lower in zip(chain, chain[1:]):
            pull = 8 if isinstance(upper, tuple) and isinstance(lower, tuple) else 1
            self.near[1][upper][lower] = self.near[-1][lower][upper] = pull
        return chain

    def _orders(self, rounds: int) -> Iterator[list[list[Any]]]:
        """Put the boxes of layers in the order of their neighbours, again and again; yield all."""
        layers = self.layers
        places = {one: at for layer in layers for at, one in enumerate(layer)}
        for turn in range(rounds):
            side = 1 if turn % 2 else -1
            for rank in range(len(layers))[::-side]:
                means = {}
                for one in layers[rank]:
                    near = [places[other] for other in self.near[side][one]]
                    means[one] = sum(near) / len(near) if near else places[one]
                layers[rank] = sorted(means, key=means.__getitem__)
                places.update((one, at) for at, one in enumerate(layers[rank]))
            yield layers[:]

    def _crossings(self, layers: list[list[Any]]) -> int:
        """Count how often edges would cross."""
        places = {one: at for layer in layers for at, one in enumerate(layer)}
        total = 0
        for layer in layers:
            seen: list[int] = []
            for one in layer:
                for end in sorted(places[other] for other in self.near[1][one]):
                    total += len(seen) - bisect.bisect_right(seen, end)
                    bisect.insort(seen, end)
        return total

    def _place(self, rounds: int) -> dict[Any, float]:
        """Draw every box towards its neighbours, bends most of all; keep order and distance."""
        at: dict[Any, float] = {}
        for layer in self.layers:
            steps = (self.sizes[one][0] + self.GAP for one in layer)
            for one, start in zip(layer, itertools.accumulate(steps, initial=0.0)):
                at[one] = start + self.sizes[one][0] / 2
        for turn in range(rounds):
            for layer in self.layers[::-1 if turn % 2 else 1]:
                low = [self._wish(one, at) for one in layer]
                high, gaps = low[:], [(self.sizes[one][0] + self.sizes[two][0]) / 2 + self.GAP
                    for one, two in zip(layer, layer[1:])]
                for left, gap in enumerate(gaps):
                    low[left + 1] = max(low[left + 1], low[left] + gap)
                for left in reversed(range(len(gaps))):
                    high[left] = min(high[left], high[left + 1] - gaps[left])
                at.update((one, (a + b) / 2) for one, a, b in zip(layer, low, high))
        return at

    def _wish(self, one: Any, at: dict[Any, float]) -> float:
        """Return where a box would like to be."""
        near = {**self.near[-1][one], **self.near[1][one]}
        pulls = sum(at[other] * pull for other, pull in near.items())
        return pulls / sum(near.values()) if near else at[one]

    def way(self, number: int) -> str:
        """Return the path of an edge, as SVG writes it."""
        chain = self.chains[number]
        points = [self.at[one] for one in chain]
        for end, side in ((0, 1), (-1, -1)):  # out of the box above, into the one below
            (x, y), (width, height) = points[end], self.boxes[chain[end]]
            ends = sorted(self.near[side][chain[end]], key=self.at.__getitem__)
            gap = min(16.0, max(0.0, width - 24) / max(1, len(ends) - 1))
            x += gap * (ends.index(chain[end + side]) - (len(ends) - 1) / 2)  # a place of its own
            points[end] = x, y + side * height / 2
            if self.sizes[chain[end]][1] > height:  # straight on, past a label that stands beside
                points.insert(side, (x, y + side * self.sizes[chain[end]][1] / 2))
        points = points[::-1] if number in self.back else points
        steps = [(c - a) / (d - b) for (a, b), (c, d) in zip(points, points[1:])]
        # Straight out of a box and into one; between, never further out than a bend is.
        slopes = [0.0, *(2 * a * b / (a + b) if a * b > 0 else 0.0
            for a, b in zip(steps, steps[1:])), 0.0]
        text = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
        for (a, b), (c, d), out, into in zip(points, points[1:], slopes, slopes[1:]):
            reach = 0.4 * (d - b)
            text += (f"C{a + out * reach:.1f},{b + reach:.1f} {c - into * reach:.1f},"
                f"{d - reach:.1f} {c:.1f},{d:.1f}")
        return text


def _xml(text: str) -> str:
    """Return text that is text in XML, whatever it holds."""
    shown = re.sub("[\ufffe\uffff]", "\ufffd", printable(text))
    return shown.translate({38: "&amp;", 60: "&lt;", 62: "&gt;", 34: "&quot;"})


def _text_width(text: str, size: float = 7.4) -> float:
    """Return about how wide a text is, in pixels; wide characters take two places."""
    return size * sum(1.0 if ord(one) < 0x1100 else 1.9 for one in printable(text))


LONG_LABEL = 40  # characters; what is longer is cut, and stands in full in the <title>


def _cut(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= LONG_LABEL else shown[:LONG_LABEL - 1] + "…"


def _label_size(texts: list[str]) -> tuple[float, float]:
    widths = [_text_width(_cut(text), 6.6) for text in texts]
    return max(widths, default=0.0) + 6 * bool(texts), 15.0 * len(texts)


_Drawn = tuple[list[str], float, float]  # lines of SVG, width, height


class _Svg(_Graph):
    """A picture being drawn: layers of boxes, and layers within the boxes that have children."""

    STYLE = (
        ".flexiflow{--ink:#1e293b;--soft:#475569;--line:#94a3b8;--fill:#fff;--paper:#fff;"
        "--lit:#dbeafe;--lit-line:#2563eb;--nest:#f8fafc;font:13px system-ui,sans-serif}"
        "@media(prefers-color-scheme:dark){.flexiflow{--ink:#e2e8f0;--soft:#a9b6c8;--line:#64748b;"
        "--fill:#1e293b;--paper:#0f172a;--lit:#1e3a8a;--lit-line:#60a5fa;--nest:#162033}}"
        ".flexiflow text{fill:var(--ink)}.flexiflow .label{font-size:11.5px;fill:var(--soft);"
        "paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}"
        ".flexiflow rect{fill:var(--fill);stroke:var(--line);stroke-width:1.4}"
        ".flexiflow .nest>rect{fill:var(--nest)}.flexiflow .nest>text{fill:var(--soft)}"
        ".flexiflow .any rect{stroke-dasharray:4 3}.flexiflow .inner{fill:none}"
        ".flexiflow .active>rect{fill:var(--lit);stroke:var(--lit-line);stroke-width:2.2}"
        ".flexiflow .around>rect{stroke:var(--lit-line)}"
        ".flexiflow .edge{fill:none;stroke:var(--line);stroke-width:1.4}"
        ".flexiflow .tip{fill:var(--line)}.flexiflow .start{fill:var(--ink)}")
    EDGE = '<path class="edge" d="{}" marker-end="url(#flexiflow-tip)"/>'

    def lines(self, active: str | None) -> Iterable[str]:
        """Return the lines of the document."""
        self.lit = dict.fromkeys(self._line(active or ""), " around")
        self.lit[active or ""] = " active"
        self.joined: dict[Any, dict[tuple[str, str], list[str]]] = {}
        for source, cause, guard, target in self.edges():
            self._join(source, cause, guard, target or source)
        lines, width, height = self._inside(None, self.roots, self.found.initial_state)
        size = f"{width + 32:.0f}", f"{height + 32:.0f}"
        name = _xml(self.found.name or "FlexiFlow")
        return [
            '<svg xmlns="http://www.w3.org/2000/svg" class="flexiflow" role="img" width="{}"'
            ' height="{}" viewBox="-16 -16 {} {}">'.format(*size, *size), f"<title>{name}</title>",
            f"<style>{self.STYLE}</style>", '<defs><marker id="flexiflow-tip" viewBox="0 0 8 8"'
            ' refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path class="tip"'
            ' d="M0,0L8,4L0,8z"/></marker></defs>', *lines, "</svg>"]

    def _line(self, name: str) -> list[str]:
        """Return a state and what is around it, outermost first."""
        node = self.nodes.get(name)
        return [one.name for one in node.lineage()][::-1] if node else [name]

    def _join(self, source: str, cause: str, guard: str, target: str) -> None:
        """Note an edge where it is drawn: between two boxes that stand in the same one.

        A guard that would make its label wide stands on a line of its own.
        """
        a, b = self._line(source), self._line(target)
        at = min(len(os.path.commonprefix([a, b])), len(a) - 1, len(b) - 1)
        before = f"{self._short(source)}: " if len(a) > at + 1 else ""
        after = f" → {self._short(target)}" if len(b) > at + 1 else ""
        label = before + _with_guard(cause, guard) + after
        wide = guard and len(label) > LONG_LABEL * 0.6
        ends = self.joined.setdefault(a[at - 1] if at else None, {})
        ends.setdefault((a[at], b[at]), []).extend(
            [before + cause + after, f"[{guard}]"] if wide else [label])

    def _short(self, name: str) -> str:
        """Return a state's name without that of its parent."""
        around = self._line(name)[:-1]
        return name[len(around[-1]) + 1:] if around else name

    def _inside(self, owner: str | None, nodes: list[Node], initial: str | None) -> _Drawn:
        """Draw what stands in a box, or in the whole picture."""
        joined = self.joined.get(owner, {})
        names = [*(node.name for node in nodes), *itertools.chain.from_iterable(joined)]
        drawn = {name: self._box(name) for name in dict.fromkeys(names)}
        first = [name for name in self._line(initial or "") if name in drawn]  # one, or none
        sizes = {"": (10.0, 10.0)} if first else {}  # the point where all begins
        for name in [*first, *drawn]:
            width, height = _label_size(joined.get((name, name), []))
            sizes[name] = drawn[name][1] + 2 * (width and width + 30), max(height, drawn[name][2])
        ways: dict[tuple[str, str], list[str]] = {("", name): [] for name in first}
        ways.update((ends, texts) for ends, texts in joined.items() if ends[0] != ends[1])
        layers = _Layers(sizes, [(*ends, _label_size(texts)) for ends, texts in ways.items()],
            {"": (10.0, 10.0), **{name: size[1:] for name, size in drawn.items()}})
        lines = [self.EDGE.format(layers.way(number)) for number in range(len(ways))]
        lines += ['<circle class="start" cx="{:.1f}" cy="{:.1f}" r="5"/>'.format(*layers.at[""])
            for _ in first]
        for name, (box, width, height) in drawn.items():
            x, y = layers.at[name]
            right = x + width / 2
            lines += [f'<g transform="translate({x - width / 2:.1f},{y - height / 2:.1f})">', *box,
                "</g>"]
            if (name, name) in joined:
                lines.append(self.EDGE.format(f"M{right:.1f},{y - 7:.1f}c24,-12 24,26 1,14"))
                lines += self._label(joined[name, name], right + 24, y, "start")
        for texts, label in zip(ways.values(), layers.labels):
            lines += self._label(texts, *layers.at[label])
        return lines, layers.width, layers.height

    def _box(self, name: str) -> _Drawn:
        """Draw a state: its name in the middle of a box, or above its children."""
        node, short = self.nodes.get(name), self._short(name)
        kind = "any" if node is None else "nest" if node.children else "state"
        inner, final, text_width = [], node is not None and node.final, _text_width(short)
        width, height = max(64.0, text_width + 28), 34.0
        x, y, anchor = width / 2, 21.5, "middle"
        if node is not None and node.children:
            lines, width, height = self._inside(name, node.children, node.initial)
            inner = ['<g transform="translate(16,36)">', *lines, "</g>"]
            width, height = max(width, text_width) + 32, height + 52
            x, y, anchor = 16.0, 22.0, "start"
        lines = [f'<g class="{kind}{self.lit.get(name, "")}{" final" * final}"'
            f' data-state="{_xml(name)}"><rect width="{width:.1f}" height="{height:.1f}" rx="9"/>']
        lines += [f'<rect class="inner" x="3.5" y="3.5" width="{width - 7:.1f}"'
            f' height="{height - 7:.1f}" rx="6"/>'] * final
        lines.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{_xml(short)}</text>')
        return [*lines, *inner, "</g>"], width, height

    def _label(self, texts: list[str], x: float, y: float, anchor: str = "middle") -> Iterator[str]:
        """Write the lines of a label around a point."""
        for at, text in enumerate(texts):
            line = y + 15 * (at - (len(texts) - 1) / 2) + 4
            yield (f'<text class="label" x="{x:.1f}" y="{line:.1f}" text-anchor="{anchor}">'
                f"<title>{_xml(text)}</title>{_xml(_cut(text))}</text>")


FORMATS = {"mermaid": _Mermaid, "svg": _Svg, "text": _Graph}


def visualize(config: str | os.PathLike[str] | dict[str, Any] | ConfigExplanation, *,
        format: str = "mermaid", active: str | None = None) -> str:
    """Return a picture of a config: a Mermaid flowchart, an SVG document, or a table of text.

    It shows states, rules and packs; `active` marks a state. Raises ArgumentError for another
    `format`.
    """
    if format not in FORMATS:
        raise ArgumentError(f"Unknown format: {format!r}", fix=f"one of {', '.join(FORMATS)}")
    found = config if isinstance(config, ConfigExplanation) else explain(config)
    return "\n".join(FORMATS[format](found).lines(active))


def picture(component: AsyncComponent, format: str = "svg") -> str:
    """Return a picture of a component's machine, its state lit; see `visualize`."""
    definition = component.definition
    if definition is None:
        raise StateError(f"{component.name!r} was made by hand: there is no picture of it")
    found = ConfigExplanation("", component.name, definition.birth.node.name, definition=definition)
    return visualize(found, format=format, active=component.state)


# --------------------------------------------------------------------------------------------
# 13. HTTP: ASGI app, the small server, hot reload
# --------------------------------------------------------------------------------------------
# The routes only print what the engine's views say. One callable serves under any ASGI server,
# mounted in another app, or under the small server below, which is for local use: put a grown
# one before it on the open internet. Whatever is not in order is refused before a body is read.
# GET changes nothing; no config and no dotted path comes in by HTTP.

PATIENCE = 10.0  # seconds that a request may take
CONNECTIONS = 64  # that the small server has at once
MAX_HEAD = 1 << 14  # bytes
PAGE = 50  # entries of a list, unless `limit` says otherwise; at most ten times as many
POLL = 0.25  # seconds between two looks at the journal, or at a file that is watched
STATUS = {"moved": 200, "stayed": 200, "queued": 202, "blocked": 409, "ignored": 409}
# Of an error without a receipt: the first that fits, else 500.
_STATUS_OF = {NotThere: 404, IdTaken: 422, ArgumentError: 400, PersistenceError: 503}
_TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
_HOST = r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::[0-9]{1,5})?"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Refused(FlexiFlowError):
    """A request that is not served; `status` is its HTTP status, `headers` go with the answer."""

    def __init__(self, status: int, what: str, *headers: tuple[str, str], **details: Any) -> None:
        super().__init__(what, **details)
        self.status, self.headers = status, headers


def _of_code(error: BaseException) -> bool:
    """Tell whether the code of a state, guard or action has raised an error."""
    return any(frame.f_globals is globals() and frame.f_code.co_name in (
        "act", "_ask_class", "_decided") for frame, _ in traceback.walk_tb(error.__traceback__))


def _plain(value: Any) -> Any:
    """Return what JSON is to show of an object: the fields that its repr shows, or its text."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.repr}


def _json_answer(value: Any, status: int = 200, *headers: tuple[str, str]) -> tuple[Any, ...]:
    """Return what `_send` sends: a status, the kind of the content, the content, more headers."""
    return (status, "application/json", json.dumps(value, default=_plain).encode(), *headers)


def _error_answer(error: Exception) -> tuple[Any, ...]:
    """Answer with What, Why, Fix and Context of an error; and its receipt, if it has one."""
    if not isinstance(error, FlexiFlowError):
        error = FlexiFlowError(
            f"{type(error).__name__}: {said(error)}", fix="look into the log of the server")
    facts = {"what": error.what, "why": error.why, "fix": error.fix,
        "context": {key: str(value) for key, value in error.context.items.items()}}
    if isinstance(error, Refused):
        return _json_answer(facts, error.status, *error.headers)
    receipt = getattr(error, "receipt", None)
    if isinstance(receipt, Receipt):
        return _json_answer({**facts, "receipt": receipt.as_dict()}, 422)
    known = {} if _of_code(error) else _STATUS_OF
    status = next((status for kind, status in known.items() if isinstance(error, kind)), 500)
    return _json_answer(facts, status)


@functools.lru_cache(8)
def _policy(content: bytes) -> str:
    """Return a content security policy that allows a page its own scripts and styles alone."""
    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), content, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'"
            for one in found) or "'none'"

    return ("default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        f" connect-src 'self'; img-src 'self' data:; script-src {hashes(b'script')};"
        f" style-src {hashes(b'style')}")


async def _send(send: Any, status: int, kind: str, content: bytes | None,
        *headers: tuple[str, str], bodiless: bool = False) -> None:
    """Send an answer; of a stream and of one that is `bodiless`, the head alone."""
    page = content if content and kind.startswith(("text", "image")) else b""
    given = [("content-type", kind), ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"),
        ("content-security-policy", _policy(page)), *headers]
    if content is not None:
        given.append(("content-length", str(len(content))))
    await send({"type": "http.response.start", "status": status,
        "headers": [(key.encode(), value.encode("latin-1", "replace")) for key, value in given]})
    if content is not None:
        await send({"type": "http.response.body", "body": b"" if bodiless else content})


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def read_object(text: str | bytes, name: str, fix: str) -> Json:
    """Return the object of a JSON document; raise ArgumentError if it is none."""
    value = read_json(text, name, ArgumentError, fix)
    if not isinstance(value, dict):
        raise ArgumentError(f"{name} is not an object: {_shown(value)}", fix=fix)
    return value


class Request:
    """What a request says, apart from its body."""

    def __init__(self, scope: Json) -> None:
        root = (scope.get("root_path") or "").rstrip("/")
        path = scope.get("raw_path") or urllib_parse.quote(scope["path"]).encode()
        path = path.decode("latin-1").partition("?")[0]
        mounts = (root, urllib_parse.quote(root))
        mount = next((one for one in mounts if f"{path}/".startswith(f"{one}/")), "")
        self.method: str = scope["method"]
        steps = path[len(mount) + 1:].removesuffix("/").split("/")
        self.steps = [urllib_parse.unquote(step) for step in steps]
        self.query = dict(urllib_parse.parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        self.headers = [(key.decode("latin-1").lower(), value.decode("latin-1"))
            for key, value in scope["headers"]]

    def header(self, name: str) -> str | None:
        """Return the value of a header, or None; refuse what comes twice."""
        values = [value for key, value in self.headers if key == name]
        if len(values) > 1:
            raise Refused(400, f"More than one header {name!r}")
        return values[0] if values else None

    def count(self, name: str) -> int | None:
        """Return a whole number of the query, from 1."""
        text = self.query.get(name)
        if text is not None and not (re.fullmatch("[0-9]{1,15}", text) and int(text)):
            raise Refused(400, f"{name} is a whole number from 1: {text!r}", fix=f"{name}=20")
        return int(text) if text else None

    def length(self) -> int | None:
        """Return the length of the body, if it is told; refuse one that is too long."""
        text = self.header("content-length")
        if text is not None and not re.fullmatch("[0-9]{1,15}", text):
            raise Refused(400, f"Not a length: {text!r}")
        if int(text or 0) > MAX_JSON:
            raise Refused(413, f"More than {MAX_JSON} bytes")
        return None if text is None else int(text)

    @property
    def limit(self) -> int:
        """How many entries of a list are asked for."""
        return min(self.count("limit") or PAGE, 10 * PAGE)


class HttpApp:
    """An ASGI application that shows an engine, and hands messages to it: `create_app(engine)`.

    `hosts` are the names under which it may be called (None: any); with a `token`, requests
    need the header `Authorization: Bearer TOKEN`. `readonly` refuses every POST. The engine
    begins to deliver with the application, or where nobody tells it to start, with the first POST.
    """

    def __init__(self, engine: FlexiFlowEngine, hosts: Iterable[str] | None = None,
            token: str | None = None, *, readonly: bool = False) -> None:
        self.engine, self.token, self.readonly = engine, token, readonly
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.routes: Any = {tuple(path.split("/")): (method, serve) for method, path, serve in (
            ("GET", "", self.page), ("GET", "health", self.health), ("GET", "events", self.events),
            ("GET", "metrics", self.metrics), ("GET", "components", self.components),
            ("GET", "components/*", self.component), ("GET", "components/*/history", self.history),
            ("GET", "components/*/diagram.svg", self.diagram),
            ("POST", "components/*/message", self.message),
            ("GET", "dead-letters", self.dead_letters),
            ("POST", "dead-letters/*/redrive", self.redrive))}

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        """Serve one request, or the life of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(Request(scope), receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()  # lifespan.startup
        begun = not self.readonly and self.engine.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        if begun:
            await self.engine.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, request: Request, receive: Any, send: Any) -> None:
        given = next((value for key, value in request.headers if key == "x-correlation-id"), "")
        correlation_id = set_correlation_id(
            given[:200] if given.isascii() and given.isprintable() else None)
        try:
            self._check(request)
            call, names = self._route(request)
            if request.method == "POST":
                names.append(await self._body(request, receive))
                self.engine.start()
            await self.engine.queue.settled()  # what is shown has been committed
            if call == self.events:
                return await self.events(request, receive, send)
            answer = await call(request, *names)
        except ConnectionError:  # the client went away
            return
        except Exception as error:
            answer = _error_answer(error)
            if answer[0] == 500:
                self.engine.logger.error("A request failed", exc_info=error)
        await _send(send, *answer, ("x-correlation-id", correlation_id),
            bodiless=request.method == "HEAD")

    # ---- what is refused

    def _check(self, request: Request) -> None:
        """Refuse who may not ask, before anything is done."""
        host = request.header("host") or ""
        name = re.fullmatch(_HOST, host)
        if self.hosts is not None and (not name or name[1].lower() not in self.hosts):
            raise Refused(403 if name else 400, f"Not a host of ours: {host!r}",
                why="another site may have led a browser here")
        origin, site = request.header("origin"), request.header("sec-fetch-site")
        visit = request.method == "GET" and request.header("sec-fetch-mode") == "navigate"
        if (origin is not None and origin.partition("://")[2].lower() != host.lower()) or (
                site not in (None, "same-origin", "none") and not visit):
            raise Refused(403, "A page of another site asks", why=f"its origin is {origin!r}")
        if self.token is not None and request.steps not in ([""], ["health"]):
            given = (request.header("authorization") or "").encode("latin-1")  # as it came
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                raise Refused(401, "No valid token", ("www-authenticate", "Bearer"),
                    fix="send Authorization: Bearer TOKEN")
        if request.method == "POST":
            kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, f"Not JSON: {kind!r}", fix="Content-Type: application/json")
            request.length()
            if self.readonly:
                raise Refused(403, "Nothing can be changed here", why="it is served read-only")

    def _route(self, request: Request) -> tuple[Callable[..., Any], list[Any]]:
        """Return what serves a request, and the name in its path: its second step, if any."""
        first, *names = request.steps[:2]
        path = (first, *["*" for _ in names], *request.steps[2:])
        if path not in self.routes or "" in names:
            raise Refused(404, f"Nothing here: {'/'.join(request.steps)!r}",
                fix="GET / shows all there is, GET /components lists the components")
        verb, call = self.routes[path]
        if verb != request.method and (verb, request.method) != ("GET", "HEAD"):
            raise Refused(405, f"Not with {request.method}", ("allow", verb), fix=f"use {verb}")
        return call, names

    @staticmethod
    async def _body(request: Request, receive: Any) -> Json:
        """Return the object that a body holds; an empty body is an empty object."""
        body, more = b"", True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":
                raise ConnectionError
            body += part.get("body", b"")
            if len(body) > MAX_JSON:
                raise Refused(413, f"More than {MAX_JSON} bytes")
            more = part.get("more_body")
        return read_object(body.strip() or b"{}", "body", '{"type": "start"}')

    # ---- routes

    async def page(self, request: Request) -> Any:
        """The inspector."""
        return 200, "text/html; charset=utf-8", INSPECTOR_PAGE.encode()

    async def health(self, request: Request) -> Any:
        """1.0.1's sign of life."""
        return _json_answer({"status": "ok"})

    async def components(self, request: Request) -> Any:
        """A page of components by name; filters q, state, failed=1, waiting=1."""
        query, limit = request.query, request.limit
        with self.engine.queue.at_once():
            names, total = self.engine.find(after=query.get("after", ""), limit=limit + 1,
                part=query.get("q", ""), state=query.get("state"),
                failed=query.get("failed") == "1", waiting=query.get("waiting") == "1")
            found = [self.engine._facts(name) for name in names[:limit]]
        return _json_answer({"components": found, "total": total,
            "next": names[limit - 1] if len(names) > limit else None, "readonly": self.readonly,
            "reload_error": self.engine.reload_error})

    async def component(self, request: Request, name: str) -> Any:
        """All about a component."""
        (facts,) = self.engine.status(name)
        return _json_answer({**facts, "dead_letters": self.engine.dead_letters(name)})

    async def history(self, request: Request, name: str) -> Any:
        """A page of a component's history, the newest first."""
        self.engine._facts(name)  # raises if there is none
        found = self.engine.history(name, limit=request.limit + 1, before=request.count("before"))
        return _json_answer({"history": found[:request.limit],
            "next": found[request.limit - 1]["number"] if len(found) > request.limit else None})

    async def diagram(self, request: Request, name: str) -> Any:
        """The picture of a component's machine, its state lit."""
        return 200, "image/svg+xml", picture(self.engine._current(name)).encode()

    async def message(self, request: Request, name: str, message: Json) -> Any:
        """Hand a message to a component, and return the receipt."""
        key = request.header("idempotency-key")
        if key is not None and message.setdefault("id", key) != key:
            raise Refused(400, "Two ids for a message: in it, and as Idempotency-Key")
        message.setdefault("correlation_id", get_correlation_id())
        receipt = await self.engine.handle_message(name, message)
        status = STATUS[receipt.outcome]
        return _json_answer(
            {"status": "sent" if status < 300 else "refused", **receipt.as_dict()}, status)

    async def dead_letters(self, request: Request) -> Any:
        """A page of dead letters, the oldest first."""
        found = self.engine.dead_letters(limit=request.limit + 1, after=request.count("after"))
        return _json_answer({"dead_letters": found[:request.limit],
            "next": found[request.limit - 1]["number"] if len(found) > request.limit else None})

    async def redrive(self, request: Request, number: str, body: Json) -> Any:
        """Give a dead letter back to the queue."""
        if not re.fullmatch("[0-9]{1,15}", number):
            raise Refused(404, f"No dead letter has the number {number!r}")
        letters = await self.engine.redrive(int(number))
        return _json_answer({"status": "redriven", "dead_letters": letters})

    async def metrics(self, request: Request) -> Any:
        """Counters of this process, and the queue, in the text format of Prometheus."""
        engine = self.engine
        ((depth, timers, oldest, dead),) = engine.queue.rows(
            "SELECT TOTAL(dead IS NULL AND state IS NULL), TOTAL(dead IS NULL AND state IS NOT"
            " NULL), MIN(CASE WHEN dead IS NULL THEN due END), COUNT(dead) FROM flexiflow_messages")
        late = max(0.0, engine.clock() - oldest) if oldest is not None else 0.0
        outcomes = {f'{{outcome="{outcome}"}}': n for outcome, n in sorted(engine.outcomes.items())}
        lines = []
        spent = {"_sum": engine.handling, "_count": sum(outcomes.values())}
        for name, kind, values in (
                ("messages_total", "counter", outcomes), ("queue_depth", "gauge", {"": int(depth)}),
                ("timers", "gauge", {"": int(timers)}), ("oldest_due_seconds", "gauge", {"": late}),
                ("dead_letters", "gauge", {"": dead}), ("handling_seconds", "summary", spent)):
            lines += [f"# TYPE flexiflow_{name} {kind}"] * bool(values)
            lines += [f"flexiflow_{name}{which} {value}" for which, value in values.items()]
        return 200, "text/plain; version=0.0.4; charset=utf-8", "\n".join([*lines, ""]).encode()

    async def events(self, request: Request, receive: Any, send: Any) -> None:
        """Send journal rows as they come, of every process; see the HTML standard, section 9.2."""
        last = request.header("last-event-id") or request.query.get("after") or ""
        number = self._known_until(int(last) if re.fullmatch("[0-9]{1,15}", last) else math.inf)
        await _send(send, 200, "text/event-stream", None)
        gone = asyncio.ensure_future(_disconnected(receive))
        text = ": hello\n\n"
        try:
            while request.method == "GET" and not gone.done():
                if text:
                    sent = time.monotonic()
                    await send({"type": "http.response.body", "more_body": True,
                        "body": text.encode()})
                await self.engine.queue.settled()
                entries = self.engine.queue.journal(None, None, "number IN (SELECT number FROM"
                    f" flexiflow_journal WHERE number>? ORDER BY number LIMIT {PAGE})",
                    (number,))[::-1]
                text = "".join(f"id: {one['number']}\ndata: {json.dumps(one)}\n\n"
                    for one in entries)
                if entries:
                    number = entries[-1]["number"]
                else:
                    number = self._known_until(number)
                    await asyncio.wait([gone], timeout=POLL)
                    text = ": still here\n\n" * (time.monotonic() - sent > PATIENCE)
        except FlexiFlowError as error:  # too late for another status: the client comes again
            self.engine.logger.error("A stream of events ended", exc_info=error)
        finally:
            gone.cancel()
        await send({"type": "http.response.body", "body": b""})

    def _known_until(self, number: float) -> int:
        """Return the number of the journal's last row, if it is less: where rows were removed."""
        sql = "SELECT COALESCE(MIN(?, MAX(number)), 0) FROM flexiflow_journal"
        return int(self.engine.queue.rows(sql, (number,))[0][0])


create_app = HttpApp  # as 1.0.1 called it


class _Connection:
    """A client of the small server: its one request, and the answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.length: int | None = None  # of the body that is still to be read
        # The request has been read to its end; the answer has begun; it is a stream of events,
        # which ends when it is told to.
        self.asked = self.begun = self.endless = False

    async def receive(self) -> Json:
        """Return the body as an ASGI event, and after that, that the client has gone."""
        length, self.length = self.length, None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if length is not None:
                body = await self.reader.readexactly(length)
                if not self.writer.is_closing():  # else it had to go: nothing may come of it
                    self.asked = True
                    return {"type": "http.request", "body": body}
            while await self.reader.read(MAX_HEAD):  # which nobody asked for
                pass
        return {"type": "http.disconnect"}

    async def send(self, event: Json) -> None:
        """Write an ASGI event."""
        if event["type"] == "http.response.start":
            self.begun, status = True, event["status"]
            lines = [b"HTTP/1.1 %d %s" % (status, http.HTTPStatus(status).phrase.encode()),
                *(b"%s: %s" % header for header in event["headers"]), b"connection: close"]
            self.writer.write(b"\r\n".join([*lines, b"", b""]))
        else:
            self.writer.write(event.get("body", b""))
        await self.writer.drain()
        if self.length and "body" in event and not event.get("more_body"):
            self.length = None  # closing on an unread body resets the connection: no answer
            self.writer.write_eof()
            await asyncio.wait_for(_disconnected(self.receive), PATIENCE)


class HttpServer:
    """An ASGI server on asyncio streams, for local use: one request a connection."""

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 8765) -> None:
        self.app, self.host, self.port = app, host, port
        self.open: dict[asyncio.Task[Any], _Connection] = {}  # the oldest first

    async def __aenter__(self) -> HttpServer:
        try:
            self.server = await asyncio.start_server(
                self._connected, self.host, self.port, limit=MAX_HEAD)
        except (OSError, OverflowError) as error:
            raise PersistenceError(f"Cannot listen on {self.host}, port {self.port}",
                why=str(error), fix="another --port or --host") from error
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *failure: Any) -> None:
        """Take nothing more; let what runs end, streams of events apart."""
        self.server.close()
        for task, client in self.open.items():
            if not client.asked:
                client.writer.transport.abort()
            if client.endless:
                task.cancel()
        for patience in (PATIENCE, None):
            if self.open:
                await asyncio.wait(self.open, timeout=patience)
            for task in self.open:
                task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        full = len(self.open) >= CONNECTIONS
        slow = next((one for one in self.open.values() if not one.asked), None)
        if full and slow:  # the slowest of those who have not asked yet must go
            slow.asked = True
            slow.writer.transport.abort()
        client = self.open[task] = _Connection(reader, writer)
        try:
            try:
                if full and not slow:
                    raise Refused(503, f"{CONNECTIONS} connections are open", fix="try again later")
                await self._serve(client)
            except Refused as error:
                if not client.begun:
                    await _send(client.send, *_error_answer(error))
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # the client went away, or had to
        finally:
            del self.open[task]
            writer.close()

    async def _serve(self, client: _Connection) -> None:
        """Read a request, and let the app answer it."""
        end = time.monotonic() + PATIENCE
        client.length = 1  # at least, until its head says how long the body is
        try:
            head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), PATIENCE)
        except asyncio.LimitOverrunError:
            raise Refused(431, f"A head of more than {MAX_HEAD} bytes") from None
        scope, client.length = self._scope(head)
        client.asked = client.asked or not client.length  # it stays so where it had to go
        client.endless = scope["path"].endswith("/events")
        serving = self.app(scope, client.receive, client.send)
        try:
            await asyncio.wait_for(serving, None if client.endless else end - time.monotonic())
        except asyncio.TimeoutError:
            raise Refused(408, f"It took more than {PATIENCE:g} s") from None

    def _scope(self, head: bytes) -> tuple[Json, int]:
        """Return the ASGI scope that a head means, and the length of its body."""
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        found = re.fullmatch(rf"({_TOKEN}) (/[!-~]*) HTTP/1\.[01]", first)
        if not found:
            raise Refused(400, f"Not a request: {first[:80]!r}")
        headers = []
        for line in lines:
            field = re.fullmatch(rf"({_TOKEN}):[ \t]*([\t -~\x80-\xff]*?)[ \t]*", line)
            if not field:
                raise Refused(400, f"Not a header: {line[:80]!r}")
            headers.append((field[1].lower().encode(), field[2].encode("latin-1")))
        request = Request({"method": found[1], "path": "/", "headers": headers})
        if re.fullmatch(_HOST, request.header("host") or "") is None:
            raise Refused(400, "No valid Host")
        if request.header("transfer-encoding") is not None:
            raise Refused(411, "A body without a length", fix="send Content-Length")
        length = request.length()
        if length is None and found[1] == "POST":
            raise Refused(411, "A request without a length", fix="send Content-Length; curl does"
                " with: -H 'Content-Type: application/json' -d '{}'")
        path, _, query = found[2].partition("?")
        return {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
            "method": found[1], "scheme": "http", "path": urllib_parse.unquote(path),
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": headers, "server": (self.host, self.port)}, length or 0


def _stamps(path: Path) -> Json:
    """Return what tells whether a file, or those in a folder, may have changed: name -> stamps."""
    found = {}
    names = [path] if not os.path.isdir(path) else [
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for name in names:
        with contextlib.suppress(OSError):  # gone, or about to be replaced
            about = os.stat(name)
            found[os.fspath(name)] = about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode
    return found


def _contents(stamps: Json) -> Json:
    found = {}
    for name in filter(os.path.isfile, stamps):  # a pipe might never end
        with contextlib.suppress(OSError), open(name, "rb") as file:
            found[name] = zlib.crc32(file.read())
    return found


async def watch_path(path: Path, on_change: Callable[[], Any]) -> None:
    """Call `on_change` whenever the content of a file, or of files in a folder, has changed.

    It may be a coroutine function. One that fails is logged, and watching goes on; until it is
    cancelled. A file that is not there is waited for.
    """
    stamps = _stamps(path)
    contents = _contents(stamps)
    while True:
        await asyncio.sleep(POLL)
        known, before, stamps = contents, stamps, _stamps(path)
        if stamps not in (before, {}):
            contents = _contents(stamps)
        if contents == known:
            continue
        try:
            answer = on_change()
            if inspect.isawaitable(answer):
                await answer
        except Exception as error:
            logger.error("Reloading %s failed", os.fspath(path), exc_info=error)


def run_hot_reload(path: Path, on_change: Callable[[], Any]) -> None:
    """Watch a path for ever, in a loop of its own; see `watch_path`."""
    asyncio.run(watch_path(path, on_change))


async def watch_config(engine: FlexiFlowEngine, path: Path, name: str | None = None) -> None:
    """Keep components on a config's file: now, and whenever it changes.

    They are the one of this name (by default the config's), and all that share its definition.
    A file that is not good changes nothing; a component whose state it would take away keeps its
    definition, and follows at the next change that fits. `engine.reload_error` and the log say why.
    """
    async def adopt() -> None:
        failed, engine.reload_error = engine.reload_error, None
        try:
            if await engine.adopt(path, name) or failed:
                engine.logger.warning("%s is taken over", os.fspath(path))
        except Exception as error:
            engine.reload_error = said(error)
            engine.logger.error("%s is not taken over", os.fspath(path), exc_info=error)

    # In this order: when the config is read, the watch has seen its file, and what is written from
    # then on counts.
    await asyncio.gather(watch_path(path, adopt), adopt())


# --------------------------------------------------------------------------------------------
# 14. Inspector page
# --------------------------------------------------------------------------------------------
# What `/` shows: what is stuck, what happens, and why. It asks the routes above and nothing else,
# works offline and under any mount, and puts names and payloads in as text, never as markup.

INSPECTOR_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FlexiFlow</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ground: #f5f6f7; --panel: #fff; --line: #dfe3e8; --hover: #eff1f4; --chosen: #e8eefb;
  --text: #1a1f26; --muted: #5b6673; --accent: #2456c0;
  --bad: #b3261e; --bad-ground: #fdeeec; --late: #8a5300; --mark: #fbf0d8; --good: #1c7a45;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #101316; --panel: #171b1f; --line: #2b3138; --hover: #21272d; --chosen: #1c2a45;
    --text: #e4e8ec; --muted: #98a3af; --accent: #86aeff;
    --bad: #ff9a90; --bad-ground: #3a1f1d; --late: #e5b75c; --mark: #352c18; --good: #6cc795;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
body {
  display: flex; flex-direction: column; height: 100vh; height: 100dvh; margin: 0;
  background: var(--ground); color: var(--text);
  font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
h1, h2, h3, p, ol, ul, pre { margin: 0; padding: 0; font: inherit; list-style: none; }
h1, h2 { font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; line-height: 1.25; }
h3, nav h2, aside h2 { font-size: 13px; font-weight: 600; letter-spacing: 0; color: var(--muted); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
pre, textarea { font: 12.5px/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 60vh; overflow: auto; }
button, input, textarea {
  min-height: 32px; padding: 5px 11px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--panel); color: inherit; font-family: inherit; font-size: inherit;
}
button { color: var(--accent); font-weight: 550; cursor: pointer; overflow-wrap: anywhere; }
button:hover { background: var(--hover); }
button:disabled { opacity: 0.5; cursor: default; }
input[type=checkbox] { min-height: 0; margin: 0 6px 0 0; accent-color: var(--accent); }
textarea { display: block; width: 100%; resize: vertical; }
[aria-invalid] { border-color: var(--bad); }
table { border-collapse: collapse; width: 100%; }
th { font-weight: inherit; color: var(--muted); text-align: left; white-space: nowrap; }
td { min-width: 5em; vertical-align: top; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
summary { color: var(--muted); cursor: pointer; }
dialog, .box {
  padding: 12px 14px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--panel); color: var(--text);
}
dialog { width: 340px; padding: 20px; }
dialog input { width: 100%; margin: 6px 0 12px; }
.bad { color: var(--bad); }
.late { color: var(--late); }
.muted { color: var(--muted); }
.name, #title { unicode-bidi: isolate; font-weight: 600; }
.badge {
  padding: 0 7px; border-radius: 9px; background: var(--hover); color: var(--muted);
  font-size: 12px; line-height: 18px; white-space: nowrap;
}
.badge:is(.bad, :has(.bad)) { background: var(--bad-ground); color: var(--bad); font-weight: 600; }

header {
  display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; padding: 10px 16px;
  border-bottom: 1px solid var(--line); background: var(--panel); color: var(--muted);
}
header a { color: var(--text); }
header button { min-height: 0; padding: 0; border: 0; background: none; font-weight: inherit; }
header button:not(.bad) { color: inherit; }
#waiting { margin-left: auto; }
#live::before {
  content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px;
  border-radius: 50%; background: var(--late);
}
#live.on::before { background: var(--good); }
#banner {
  padding: 8px 16px; background: var(--bad-ground); color: var(--bad);
  white-space: pre-line; overflow-wrap: anywhere;
}

main { flex: 1; display: grid; grid-template-columns: 320px minmax(0, 1fr) 360px; min-height: 0; }
nav, aside { display: flex; flex-direction: column; min-height: 0; background: var(--panel); }
nav { border-right: 1px solid var(--line); }
aside { border-left: 1px solid var(--line); }
.head { padding: 14px 16px 10px; border-bottom: 1px solid var(--line); }
.head input[type=search] { width: 100%; margin: 8px 0; }
.head label { display: inline-flex; align-items: center; margin-right: 16px; }
.scroll { flex: 1; overflow: auto; }
.scroll > p, .scroll > button { margin: 12px 16px; }
.middle { overflow: auto; padding: 20px 24px 32px; }
.middle section { margin-top: 22px; }
.middle h3 { margin-bottom: 6px; }
li { content-visibility: auto; contain-intrinsic-height: auto 58px; }
.row {
  display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 10px; width: 100%;
  padding: 8px 16px; border: 0; border-bottom: 1px solid var(--line); border-radius: 0;
  background: none; color: inherit; font-weight: inherit; text-align: left;
}
.row:hover { background: var(--hover); text-decoration: none; }
.row[aria-current] { background: var(--chosen); box-shadow: inset 3px 0 var(--accent); }
.row:focus-visible { outline-offset: -2px; }
.row > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.row > time { color: var(--muted); text-align: right; }
.row > .sub {
  display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 2px 6px; grid-column: 1 / -1;
  color: var(--muted); font-size: 13px; white-space: normal; overflow-wrap: anywhere;
}
.sub > :first-child { margin-right: auto; }
#history .sub { flex-wrap: nowrap; }

#facts { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 4px; color: var(--muted); }
#facts strong { color: var(--text); overflow-wrap: anywhere; }
#back { display: none; margin-bottom: 8px; }
#frame { margin-top: 16px; overflow: auto; }
#picture { display: block; max-width: none; height: auto; }
#messages { margin-top: 14px; }
#messages label { display: block; margin: 10px 0 4px; color: var(--muted); }
#buttons { display: flex; flex-wrap: wrap; gap: 8px; }
#receipt { margin-top: 6px; overflow-wrap: anywhere; }
.letter {
  display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 2px 12px; align-items: start;
  margin-bottom: 8px; border-left: 3px solid var(--bad); overflow-wrap: anywhere;
}
.letter > details, .letter > p { grid-column: 1 / -1; }
#letters > p, #letters > button, #stuck > button { margin-bottom: 8px; }
mark { background: var(--mark); color: inherit; }
#then { margin-bottom: 8px; background: var(--chosen); }
#then pre { margin-top: 6px; max-height: 12em; }
#said {
  position: fixed; right: 16px; bottom: 16px; max-width: min(420px, 100vw - 32px);
  padding: 10px 14px; border-radius: 6px; background: var(--text); color: var(--ground);
}
#said:empty { display: none; }
#empty { max-width: 640px; margin: 12vh auto; padding: 0 24px; }
#empty pre { margin: 16px 0; }

@media (min-width: 1700px) {
  main { grid-template-columns: 360px minmax(0, 1fr) 420px; }
  #parts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 32px; }
}
@media (max-width: 1180px) {
  main { grid-template: minmax(0, 3fr) minmax(0, 2fr) / 280px minmax(0, 1fr); }
  nav { grid-row: 1 / 3; }
  aside { border-left: 0; border-top: 1px solid var(--line); }
}
@media (max-width: 760px) {
  body { height: auto; min-height: 100dvh; }
  main { display: flex; flex-direction: column; }
  .scroll { overflow: visible; }
  nav { border: 0; }
  .middle { padding: 16px; }
  #back { display: block; }
  #overview { order: -1; max-height: 50dvh; padding-bottom: 8px; }
  #overview:has(#stuck[hidden]), body:not(.chosen) aside, body.chosen nav { display: none; }
  .middle button, [type=search] { min-height: 40px; }
  textarea, [type=search], dialog input { font-size: 16px; }
}
</style>
</head>
<body>
<header>
  <h1><a href="#">FlexiFlow</a></h1>
  <span id="live" role="status">Connecting</span>
  <span id="readonly" class="badge" hidden>read-only</span>
  <span id="waiting"></span>
  <button id="dead" type="button" title="Show the components that have some" hidden></button>
</header>
<p id="banner" role="alert" hidden></p>
<div id="empty" hidden>
  <h2>No components yet</h2>
  <p>Send a message: its component is made, and appears here.</p>
  <pre class="box">python -m flexiflow init
python -m flexiflow handle start --config config.json</pre>
  <p class="muted">Use the same store (<b>--db</b>) as this server. This page is live.</p>
</div>
<main id="main">
  <nav aria-labelledby="components">
    <div class="head" role="search">
      <h2 id="components">Components</h2>
      <input id="search" type="search" placeholder="Name, or state:Paid" title="Press / to search"
        aria-label="Search components" autocomplete="off" spellcheck="false" maxlength="200">
      <label><input id="failed" type="checkbox">Dead letters</label>
      <label><input id="timed" type="checkbox">On a timer</label>
    </div>
    <div class="scroll" id="pane">
      <ul id="list"></ul>
      <p id="none" class="muted" hidden>No component fits.</p>
      <button id="more" type="button" hidden></button>
    </div>
  </nav>
  <div class="middle" id="overview">
    <h2>Dead letters</h2>
    <p id="calm" class="muted"></p>
    <section id="stuck" aria-label="Dead letters"></section>
  </div>
  <article class="middle" id="one" aria-labelledby="title" hidden>
    <p id="back"><a href="#">All components</a></p>
    <h2 id="title" tabindex="-1"></h2>
    <p id="facts"></p>
    <div id="parts"><div>
    <section id="letters" aria-label="Dead letters"></section>
    <div id="frame" tabindex="0" role="group" aria-label="Machine"><img id="picture" alt=""></div>
    <form id="messages" hidden>
      <div id="buttons" role="group" aria-label="Messages it takes now"></div>
      <p id="any" hidden><input id="type" placeholder="type" aria-label="Type of a message"
        autocomplete="off" spellcheck="false"> <button>Send</button></p>
      <label for="payload">Payload, a JSON object (optional)</label>
      <textarea id="payload" rows="1" spellcheck="false" placeholder='{"amount": 120}'></textarea>
      <p id="receipt" role="status"></p>
    </form>
    </div><div>
    <section id="timers" aria-label="Timers"></section>
    <section id="queue" aria-label="Queue"></section>
    <section id="data" aria-labelledby="data-title">
      <h3 id="data-title">Data</h3>
      <div id="then" class="box" hidden></div>
      <pre class="box" id="json" tabindex="0" aria-labelledby="data-title"></pre>
    </section>
    </div></div>
  </article>
  <aside aria-labelledby="history-title">
    <div class="head"><h2 id="history-title">History</h2></div>
    <div class="scroll">
      <ol id="history"></ol>
      <p id="quiet" class="muted" hidden>What happens from now on appears here.</p>
      <button id="older" type="button" hidden>Older</button>
    </div>
  </aside>
</main>
<p id="said" role="status"></p>
<dialog id="login">
  <form id="key">
    <label for="token">This server asks for its token</label>
    <input id="token" type="password" autocomplete="off" required>
    <button>Continue</button>
  </form>
</dialog>
<script>
"use strict";
const MEND = "Given up. Mend the cause (rules, data; code takes a new start), then redrive.";
const PAGE = 100, POLL = 5000, PATIENCE = 40000;  // rows; ms between looks, and of a silent stream
const $ = id => document.getElementById(id);
const on = (id, event, task) => $(id).addEventListener(event, task);
const rows = new Map();  // name -> link, of the components that are listed
let chosen = null, facts = null, readonly = false;
let journal = [], pinned = null, recent = [];  // of the chosen one; the row looked at; of all

// --- Text. Names and payloads may be anything: they become text nodes and attributes, no more.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.filter(child => child instanceof Node || typeof child === "string"));
  return node;
}
const show = text => String(text).replace(  // controls, bidi marks and surrogates
  /[\0-\t\v-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]/gu,
  found => "\\u" + found.charCodeAt(0).toString(16).padStart(4, "0"));
function button(text, task, attributes, ...children) {
  const node = el("button", {type: "button", ...attributes}, text, ...children);
  node.addEventListener("click", () => task(node));
  return node;
}
const count = (number, noun) => `${number.toLocaleString()} ${noun}${number === 1 ? "" : "s"}`;
const parse = text => JSON.parse(text, (key, value, found) =>  // large integers stay what they are
  JSON.rawJSON && typeof value === "number" && !Number.isSafeInteger(value)
    && /^-?\d+$/.test(found.source) ? JSON.rawJSON(found.source) : value);
const pretty = value => show(JSON.stringify(value, null, 2));

function json(now, before) {  // an object; its keys that are not as before are marked
  const same = key => !before || (key in before && pretty(now[key]) === pretty(before[key]));
  const lines = Object.keys(now).map(key => [same(key),
    `  ${show(JSON.stringify(key))}: ${pretty(now[key]).replaceAll("\n", "\n  ")}`]);
  return lines.length === 0 ? ["{}"] : ["{", ...lines.flatMap(([same, line], index) =>
    [index ? ",\n" : "\n", same ? line : el("mark", null, line)]), "\n}"];
}
const span = seconds => {
  const units = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];
  const [unit, size] = units.find(one => seconds >= one[1]) || units[3];
  return Math.max(0, Math.floor(seconds / size)) + unit;
};
function say(node) {  // a time element knows its moment, and is told anew every second
  const left = node.dataset.at - Date.now() / 1000, late = left < -2, {how} = node.dataset;
  const text = how === "due" ? (late ? "overdue " : "in ") + span(Math.abs(left))
    : how === "for" ? "for " + span(-left) : span(-left) + " ago";
  if (node.textContent !== text) node.textContent = text;
  node.classList.toggle("bad", how === "due" && late);
}
function when(at, how = "ago") {
  const day = new Date(at * 1000);
  const node = el("time", {"data-at": at, "data-how": how, title: day.toLocaleString()});
  if (!isNaN(day)) node.dateTime = day.toISOString();
  say(node);
  return node;
}

// --- Asking. Addresses are relative: the page may be mounted anywhere.

class Problem extends Error {}
let asked = null, silence, listing = 0, untouched = true;

function login() {  // whoever asks meanwhile waits for the same answer
  return asked ||= new Promise(done => {
    $("login").showModal();
    $("key").addEventListener("submit", event => {
      event.preventDefault();
      sessionStorage.setItem("flexiflow-token", $("token").value);
      $("key").reset();
      $("login").close();
      asked = null;
      done();
    }, {once: true});
  });
}
async function ask(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem("flexiflow-token");
    const headers = {...options.headers, ...(token && {Authorization: "Bearer " + token})};
    const answer = await fetch(path,
      {signal: AbortSignal.timeout(PATIENCE), ...options, headers, cache: "no-store"});
    if (answer.status !== 401) return answer;
    await login();
  }
}
async function api(path, message) {
  const answer = await ask(path, message && {method: "POST", body: JSON.stringify(message),
    headers: {"Content-Type": "application/json"}});
  const text = await answer.text();
  let body = {};
  try { body = parse(text); } catch { body.what = `${answer.status} ${text.slice(0, 200)}`; }
  if (!body.what && (answer.ok || body.outcome)) return body;
  const {what, why, fix} = body;
  throw new Problem([what, why, fix && "Fix: " + fix].filter(Boolean).join(". "));
}
function of(name, part = "") {
  if (name === "." || name === "..") throw new Problem(`A browser cannot ask for ${name}`);
  return "components/" + encodeURIComponent(name) + part;
}
function said(text) {
  $("said").textContent = show(text);
  clearTimeout(silence);
  silence = setTimeout(() => $("said").textContent = "", 8000);
}
function soon(task, delay) {  // asked for often, done once; never twice at a time
  let planned = false, busy = false, again = false;
  const plan = () => {
    again = busy;
    if (planned || busy) return;
    planned = true;
    setTimeout(async () => {
      [planned, busy] = [false, true];
      try { await task(); } catch (error) { if (error instanceof Problem) said(error.message); }
      busy = false;
      if (again) plan();
    }, delay);
  };
  return plan;
}

// --- Panel 1: components. Of thousands, only those in sight are asked for again.

const filters = () => {
  const state = $("search").value.match(/(?:^|\s)state:(\S+)/), found = {};
  found.q = (state ? $("search").value.replace(state[0], "") : $("search").value).trim();
  if (state) found.state = state[1];
  if ($("failed").checked) found.failed = 1;
  if ($("timed").checked) found.waiting = 1;
  return found;
};
function item(one) {
  const link = rows.get(one.name) || el("a", {class: "row", tabindex: -1,
    href: "#" + encodeURIComponent(one.name), "data-name": one.name});
  if (!rows.has(one.name)) { el("li", null, link); rows.set(one.name, link); current(one.name); }
  const due = Math.min(...(one.timers || []).map(timer => timer.due));
  const seen = JSON.stringify([one.state, one.since, one.dead, one.waiting, due, one.completed]);
  if (link.dataset.seen === seen) return link.parentNode;
  link.dataset.seen = seen;
  link.replaceChildren(el("span", {class: "name"}, show(one.name)),
    one.since ? when(one.since, "for") : "",
    el("span", {class: "sub"}, el("span", null, show(one.state)),
      one.dead > 0 && el("span", {class: "badge bad"}, count(one.dead, "dead letter")),
      one.waiting > 0 && el("span", {class: "badge"}, `${one.waiting} queued`),
      due < Infinity && el("span", {class: "badge"}, when(due, "due")),
      one.completed && el("span", {class: "badge"}, "completed")));
  return link.parentNode;
}
function inSight(items) {  // the number of the first that can be seen, and how many can be
  const {top, bottom} = $("pane").getBoundingClientRect();
  const ends = items.map(one => one.getBoundingClientRect().bottom);
  const above = ends.filter(end => end <= Math.max(0, top)).length;
  return [above, ends.filter(end => end <= Math.min(innerHeight, bottom)).length - above];
}
async function list(how) {
  const ticket = how === "anew" ? ++listing : listing, wanted = filters();
  const items = how === "anew" ? [] : [...$("list").children];
  const [first, seen] = how === "more" ? [items.length] : inSight(items);
  const before = items[first - 1];
  wanted.limit = how || !items.length ? PAGE : seen + 3;
  if (before) wanted.after = before.firstChild.dataset.name;
  const page = await api("components?" + new URLSearchParams(wanted));
  if (ticket !== listing) return;
  if (how === "anew") { rows.clear(); $("list").replaceChildren(); $("pane").scrollTop = 0; }
  const fresh = page.components.map(item), known = items.slice(first);
  const end = page.next === null ? known.length
    : 1 + Math.max(-1, ...fresh.map(one => known.indexOf(one)));
  for (const gone of known.slice(0, end).filter(one => !fresh.includes(one))) {
    rows.delete(gone.firstChild.dataset.name);
    gone.remove();
  }
  let place = before ? before.nextSibling : $("list").firstChild;
  for (const one of fresh)
    if (one === place) place = place.nextSibling; else $("list").insertBefore(one, place);
  const any = page.total > 0 || chosen !== null || Object.values(filters()).some(Boolean);
  if (readonly !== page.readonly) { readonly = page.readonly; facts = null; reload(); }
  $("components").textContent = count(page.total, "component");
  $("none").hidden = page.total > 0;
  $("more").hidden = rows.size >= page.total;
  $("more").textContent = `${(page.total - rows.size).toLocaleString()} more`;
  $("empty").hidden = any;
  $("main").hidden = !any;
  $("readonly").hidden = !readonly;
  const {reload_error: bad} = page, news = `The changed config is not taken over.\n${show(bad)}`;
  if ($("banner").textContent !== news) $("banner").textContent = news;
  $("banner").hidden = !bad;
  if (untouched && page.total === 1 && rows.size) location.replace(fresh[0].firstChild.href);
  rove($("list"));
}
async function totals() {
  const text = await (await ask("metrics")).text(), found = {};
  for (const [, name, value] of text.matchAll(/^(\w+)(?:\{.*\})? (\S+)/gm))
    found[name] = (found[name] || 0) + Number(value);
  const {flexiflow_dead_letters: dead, flexiflow_queue_depth: queued, flexiflow_timers: timers} =
    {flexiflow_dead_letters: 0, flexiflow_queue_depth: 0, flexiflow_timers: 0, ...found};
  $("waiting").textContent = `${queued.toLocaleString()} queued, ${count(timers, "timer")}`;
  $("dead").textContent = count(dead, "dead letter");
  $("dead").classList.toggle("bad", dead > 0);
  $("dead").hidden = false;
  document.title = `${dead ? `(${dead}) ` : ""}${chosen ? show(chosen) + " - " : ""}FlexiFlow`;
}

// --- Panels 2 and 3: the chosen component; without one, what is stuck anywhere.

async function load() {
  const name = chosen;
  if (name === null) {
    const {dead_letters: letters} = await api("dead-letters?limit=100");
    if (chosen !== null) return;
    section("stuck", "", letters, part => stuck(part, true));
    $("calm").textContent = letters.length ? MEND : "None. Choose a component to see its machine.";
    $("quiet").hidden = recent.length > 0;
    if (journal !== recent) $("history").replaceChildren(...recent.map(one => step(one, true)));
    journal = recent;
    return rove($("history"));
  }
  try {
    const [found, {history}] = await Promise.all([api(of(name)),
      api(of(name, "/history?limit=50"))]);
    if (name !== chosen) return;
    remember(history);
    const before = facts;
    facts = found;
    if (JSON.stringify(before) === JSON.stringify(facts)) return;
    detail(before);
    await draw(name);
  } catch (error) {
    if (name !== chosen || !(error instanceof Problem)) return;
    facts = null;
    $("facts").replaceChildren(el("span", {class: "bad"}, show(error.message)));
  }
}
function section(id, title, part, make) {  // made anew only when there is something new
  const seen = JSON.stringify([chosen, readonly, part]);
  $(id).hidden = part.length === 0;
  if ($(id).dataset.seen === seen) return;
  $(id).dataset.seen = seen;
  $(id).replaceChildren(...(title ? [el("h3", null, title)] : []), ...make(part));
}
function table(heads, lines) {
  const line = (tag, cells) => el("tr", null, ...cells.map(cell => el(tag, null, cell)));
  return [el("table", null, el("thead", null, line("th", heads)),
    el("tbody", null, ...lines.map(cells => line("td", cells))))];
}
function detail(before) {
  const takes = new Map((facts.accepts || [{type: "*"}]).map(one => [one.type, one]));
  if (readonly || facts.completed) takes.clear();
  const focus = document.activeElement.dataset.type;
  $("facts").replaceChildren(el("strong", null, show(facts.state)),
    facts.since ? when(facts.since, "for") : "",
    el("span", null, `version ${facts.seq}`), facts.completed ? "completed" : "");
  $("messages").hidden = takes.size === 0;
  $("any").hidden = !takes.delete("*");  // of any type: it is asked for
  $("buttons").replaceChildren(...[...takes].map(([type, {guard, to}]) => button(show(type),
    () => send(type), {"data-type": type, title: show(`${guard ? `if ${guard}, ` : ""}${
      to ? `to ${to}` : "stays"}`)})));
  const same = [...$("buttons").children].find(one => one.dataset.type === focus);
  if (focus !== undefined && takes.size) (same || $("buttons").firstChild).focus();
  section("letters", "Dead letters", facts.dead_letters, part =>
    [el("p", {class: "muted"}, MEND), ...stuck(part)]);
  const tried = one => one.error ? el("span", {title: show(one.error)},
    `${one.attempts}: ${show(one.error.split("\n")[0])}`) : String(one.attempts);
  section("timers", "Timers", facts.timers, part => table(["Message", "Due", "Attempts"],
    part.map(one => [show(one.message), when(one.due, "due"), tried(one)])));
  section("queue", "Queue", facts.queue, part => table(["Message", "Due", "Attempts"],
    part.map(one => [el("span", {title: pretty(one.message)}, show(one.message.type)),
      when(one.due, "due"), tried(one)])));
  if (pinned === null) $("json").replaceChildren(...json(facts.data, before && before.data));
}
async function draw(name) {
  const answer = await ask(of(name, "/diagram.svg")), text = await answer.text();
  if (name !== chosen || !facts) return;
  const source = "data:image/svg+xml," + encodeURIComponent(text);  // as an image, it runs nothing
  $("frame").hidden = !answer.ok;
  $("picture").alt = `The machine of ${show(name)}, in ${show(facts.state)}`;
  if ($("picture").src !== source) $("picture").src = source;
}
function redrive(letters, text, told) {
  return readonly ? "" : button(text, async pressed => {
    pressed.disabled = true;
    try {
      for (const one of letters) await api(`dead-letters/${one.number}/redrive`, {});
      said(told);
    } catch (error) {
      said(error.message);
      pressed.disabled = false;
    }
    all();
  });
}
function stuck(letters, named) {
  const many = count(letters.length, "message");
  return [letters.length > 1 ? redrive(letters, `Redrive all ${letters.length}`,
    `${many} are in the queue again`) : "", ...letters.map(one => letter(one, named))];
}
function letter(one, named) {
  const type = show(one.message.type || "damaged message");
  const [what, ...rest] = show(one.error).split("\n");
  return el("div", {class: "letter box"}, el("div", null, el("span", {class: "name"}, type),
    named && " to ", named && el("a", {href: "#" + encodeURIComponent(one.component),
      class: "name"}, show(one.component)), el("div", {class: "muted"}, "given up ", when(one.dead),
      `, ${count(one.attempts, "attempt")}${one.state ? ", in " + show(one.state) : ""}`)),
    redrive([one], "Redrive", `${type} is in the queue again`), el("p", {class: "bad"}, what),
    ...rest.filter(line => /^(Why|Fix):/.test(line)).map(line => el("p", {class: "muted"}, line)),
    el("details", null, el("summary", null, "Message and traceback"),
      el("pre", null, pretty(one.message)), el("pre", null, show(one.traceback || ""))));
}
async function send(type) {
  const name = chosen, text = $("payload").value.trim(), buttons = [...$("buttons").children];
  const tell = (good, line) => {
    $("receipt").textContent = show(`${type}: ${line}`);
    $("receipt").className = good ? "" : "bad";
  };
  let payload = {};
  $("payload").removeAttribute("aria-invalid");
  try {
    payload = text ? parse(text) : {};
    if (typeof payload !== "object" || !payload || Array.isArray(payload)) throw Error("no object");
  } catch (error) {
    $("payload").setAttribute("aria-invalid", "true");
    return tell(false, `the payload is no JSON object: ${error.message}`);
  }
  buttons.forEach(button => button.disabled = true);
  try {
    const receipt = await api(of(name, "/message"), {...payload, type});
    if (name !== chosen) return;
    tell(["moved", "stayed", "queued"].includes(receipt.outcome), became(receipt));
    if (!$("receipt").className) $("payload").value = "";
  } catch (error) {
    tell(false, error.message);
  } finally {
    buttons.forEach(button => button.disabled = false);
    all();
  }
}

// --- Panel 4: history.

const uncurrent = list => list.querySelectorAll("[aria-current]").forEach(
  one => one.removeAttribute("aria-current"));
function became({outcome, from_state: from, to_state: to, reason}) {
  const known = {moved: `${from} \u2192 ${to}`, stayed: `stays in ${to}`, created: `in ${to}`};
  return known[outcome] || outcome + (reason ? `: ${reason}` : "");
}

function remember(newest) {  // take the newest rows in; those that are shown stay
  const last = journal.length ? journal[0].seq : -1, fresh = newest.filter(one => one.seq > last);
  if (fresh.length === newest.length) { journal = []; $("history").replaceChildren(); }
  journal.unshift(...fresh);
  $("history").prepend(...fresh.map(one => step(one)));
  $("older").hidden = !journal.length || journal.at(-1).seq === 0;
  $("quiet").hidden = true;
  rove($("history"));
}
async function older() {  // tells whether there were any
  const name = chosen, from = journal.at(-1).number;
  const {history} = await api(of(name, `/history?limit=100&before=${from}`));
  if (name !== chosen || journal.at(-1).number !== from) return false;
  journal.push(...history);
  $("history").append(...history.map(one => step(one)));
  $("older").hidden = history.length === 0 || journal.at(-1).seq === 0;
  return history.length > 0;
}
function step(one, named) {
  const type = one.message.type || one.outcome, bad = ["blocked", "ignored"].includes(one.outcome);
  return el("li", null, button(
    el("span", {class: "name"}, show(named ? `${one.component}: ${type}` : type)),
    row => named ? location.hash = encodeURIComponent(one.component) : look(one, row),
    {class: "row", tabindex: -1}, when(one.time), el("span", {class: "sub"},
      el("span", {class: bad ? "late" : ""}, show(became(one))), `#${one.seq}`)));
}
async function look(one, row) {  // the data as it was then: of that row, or the last before it
  const again = pinned === one, name = chosen;
  now();
  if (again) return;
  pinned = one;
  row.setAttribute("aria-current", "true");
  const data = await dataAt(one), previous = one.data && one.seq ? await dataAt(one, 1) : data;
  if (name !== chosen || pinned !== one) return;
  $("then").replaceChildren(`After #${one.seq}, ${new Date(one.time * 1000).toLocaleString()} `,
    button("Back to now", now), el("pre", null, pretty(one.message)));
  $("then").hidden = false;
  $("json").replaceChildren(...(data ? json(data, previous) : ["Forgotten: history was pruned."]));
  $("data").scrollIntoView({block: "nearest"});
}
async function dataAt(one, back = 0) {
  for (let index = journal.indexOf(one) + back;; index++) {
    if (index >= journal.length && !(await older())) return null;
    if (journal[index].data) return journal[index].data;
  }
}
function now() {
  pinned = null;
  $("then").hidden = true;
  uncurrent($("history"));
  if (facts) $("json").replaceChildren(...json(facts.data));
}

// --- Keys: a list is one stop of Tab, and arrows walk in it; "/" goes to the search.

function rove(list) {
  const first = list.querySelector("[aria-current]") || list.querySelector(".row");
  if (first && !list.querySelector('[tabindex="0"]')) first.tabIndex = 0;
}
for (const list of [$("list"), $("history")]) {
  list.addEventListener("focusin", event => {
    list.querySelectorAll('[tabindex="0"]').forEach(one => one.tabIndex = -1);
    event.target.tabIndex = 0;
  });
  list.addEventListener("keydown", event => {
    const items = [...list.children], here = items.indexOf(event.target.parentNode);
    const to = {ArrowDown: here + 1, ArrowUp: here - 1, PageDown: here + 10, PageUp: here - 10,
      Home: 0, End: items.length - 1}[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const link = items[Math.max(0, Math.min(to, items.length - 1))].firstChild;
    link.focus();
    if (link.href) { history.replaceState(null, "", link.href); choose(); }
  });
}
document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.matches("input, textarea")) {
    event.preventDefault();
    if (!$("search").offsetParent) { location.hash = ""; choose(); }
    $("search").focus();
  } else if (event.key === "ArrowDown" && event.target === $("search") && rows.size) {
    event.preventDefault();
    $("list").querySelector('[tabindex="0"]').focus();
  }
});

// --- What is chosen stands in the address; what happens comes as a stream.

function current(name) {
  if (name === chosen && rows.has(name)) rows.get(name).setAttribute("aria-current", "true");
}
function choose() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch { /* typed by hand: taken as it is */ }
  if (name === chosen) return;
  if (name) untouched = false;  // until then, the only component there is is opened
  uncurrent($("list"));
  [chosen, facts, journal] = [name || null, null, []];
  now();
  current(chosen);
  document.body.classList.toggle("chosen", chosen !== null);
  for (const id of ["facts", "history", "json", "receipt"]) $(id).replaceChildren();
  for (const id of ["messages", "letters", "timers", "queue", "older"]) $(id).hidden = true;
  $("one").hidden = chosen === null;
  $("overview").hidden = chosen !== null;
  $("history-title").textContent = chosen === null ? "Activity" : "History";
  $("title").textContent = show(chosen || "");
  $("picture").removeAttribute("src");
  reload();
}
const refresh = soon(() => list(), 250), anew = soon(() => list("anew"), 150);
const more = soon(() => list("more"), 0), sum = soon(totals, 400), reload = soon(load, 60);
const all = () => { refresh(); sum(); reload(); };

addEventListener("hashchange", () => {
  choose();
  if (chosen !== null && !$("list").offsetParent) { scrollTo(0, 0); $("title").focus(); }
});
on("search", "input", anew);
on("failed", "change", anew);
on("timed", "change", anew);
on("dead", "click", () => { $("failed").checked = true; location.hash = ""; anew(); });
on("more", "click", more);
on("older", "click", () => older().catch(error => said(error.message)));
on("pane", "scroll", refresh);
on("login", "cancel", event => event.preventDefault());
on("messages", "submit", event => { event.preventDefault(); send($("type").value); });
const fit = () => {  // a wide picture shrinks as long as it can be read
  const {naturalWidth: wide} = $("picture");
  $("picture").width = Math.max(Math.min(wide, $("frame").clientWidth), wide * 0.7);
};
on("picture", "load", fit);
new ResizeObserver(fit).observe($("frame"));
addEventListener("scroll", refresh);
new IntersectionObserver(([seen]) => seen.isIntersecting && more()).observe($("more"));
setInterval(() => document.querySelectorAll("[data-at]").forEach(say), 1000);
setInterval(() => document.hidden || all(), POLL);

async function stream() {  // read one; its end is an error or a return
  const stop = new AbortController(), over = () => stop.abort();
  let text = "", timer;
  const alive = () => { clearTimeout(timer); timer = setTimeout(over, PATIENCE); };
  addEventListener("pagehide", over);
  document.addEventListener("visibilitychange", over);
  try {
    alive();
    const answer = await ask("events", {signal: stop.signal, headers: stream.last});
    if (!answer.ok) return;
    $("live").textContent = "Live";
    $("live").className = "on";
    all();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      alive();
      const lines = (text + value).split("\n");
      text = lines.pop();
      for (const [, key, value] of lines.map(line => line.match(/^(id|data): ?(.*)/) || [])) {
        if (key === "id") stream.last = {"Last-Event-ID": value};
        if (key === "data") happened(parse(value));
      }
    }
  } finally {
    clearTimeout(timer);
    removeEventListener("pagehide", over);
    document.removeEventListener("visibilitychange", over);
  }
}
function happened(one) {
  recent = [one, ...recent].slice(0, 100);
  refresh();
  sum();
  if (one.component === chosen || chosen === null) reload();
}
async function listen() {
  for (let wait = 500;; wait = Math.min(wait * 2, 10000)) {
    try { await stream(); } catch { /* the connection is gone: try again */ }
    if ($("live").className === "on") wait = 500;
    $("live").textContent = "Reconnecting";
    $("live").className = "";
    await new Promise(done => setTimeout(done, wait));
    while (document.hidden)  // a browser has six connections to a server, for all its tabs
      await new Promise(done => document.addEventListener("visibilitychange", done, {once: true}));
  }
}
chosen = undefined;  // nothing has been chosen yet, not even nothing
choose();
anew();
listen();
</script>
</body>
</html>
"""


# --------------------------------------------------------------------------------------------
# 15. Command line, `main`, 1.0.1's import paths
# --------------------------------------------------------------------------------------------
# A command is a function: its options stand on it, it prints data to stdout and talk to stderr,
# and returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 message not accepted, 130
# interrupted, 141 the reader went away. State lives in a store between two commands.

CHUNK = 1 << 18  # bytes of NDJSON that are taken in at a time
COMMANDS: dict[str, Any] = {}  # name -> namespace of run, example, text, options, opens
OPTIONS: dict[str, dict[str, Any]] = {
    "TYPE": {"help": "the message's type, or - to read messages from stdin"},
    "RULES": {"help": 'a file with a list of rules, or an object with "rules"'},
    "NAME": {"help": "the component's name"},
    "ID": {"nargs": "*", "type": int, "help": "the numbers of dead letters"},
    "FILE": {"help": "the copy"},
    "component": {"nargs": "?", "help": "a component's name; without it, all of them"},
    "file": {"nargs": "?", "help": "the config (or --config)"},
    "--config": {"metavar": "FILE", "help": "a config (where one is needed: or FLEXIFLOW_CONFIG)"},
    "--name": {"help": "the component's name, where it is not the config's"},
    "--db": {"metavar": "FILE", "help": "the store (or FLEXIFLOW_DB; default flexiflow.db)"},
    "--json": {"action": "store_true", "help": "print JSON, one value a line"},
    "--allow-import": {"metavar": "MODULE", "action": "append",
        "help": "import code from this module only (again for more; '' for none)"},
    "--no-imports": {"action": "store_true", "help": "run none of the config's code"},
    "--schema": {"action": "store_true", "help": "print the JSON Schema of configs, for editors"},
    "--start": {"action": "store_true", "help": 'send "start", if it has not begun yet'},
    "--update": {"action": "store_true", "help": "take over a config that has changed"},
    "--content": {"metavar": "TEXT", "help": "the message's content"},
    "--data": {"metavar": "JSON", "default": "{}", "help": "its other fields, as an object"},
    "--id": {"help": "an id: the same one again repeats the answer, not the work"},
    "--replace": {"action": "store_true", "help": "put the rules in place of the old ones"},
    "--limit": {"type": int, "default": 50, "help": "how many steps (default 50)"},
    "--before": {"type": int, "metavar": "NUMBER", "help": "only what came before this entry"},
    "--since": {"metavar": "AGE", "help": "only what is newer: 90s, 15m, 2h, 30d"},
    "--by-state": {"action": "store_true", "help": "count the components in each state"},
    "--host": {"default": "127.0.0.1", "help": "the address to listen on (default 127.0.0.1)"},
    "--port": {"type": int, "default": 8765, "help": "the port (default 8765; 0: any)"},
    "--token": {"metavar": "SECRET", "help": "what requests must carry (or FLEXIFLOW_TOKEN)"},
    "--read-only": {"action": "store_true", "help": "change nothing, deliver nothing"},
    "--watch": {"action": "store_true", "help": "take over the config whenever its file changes"},
    "--until-idle": {"action": "store_true", "help": "end when nothing is due any more"},
    "--concurrency": {"type": int, "default": 100, "help": "components at once (default 100)"},
    "--all": {"action": "store_true", "help": "all of them (or --name: the component's)"},
    "--discard": {"action": "store_true", "help": "delete them instead, for good"},
    "--keep": {"type": int, "metavar": "N", "help": "keep each component's last N rows"},
    "--older-than": {"metavar": "AGE", "help": "only what is older: 90s, 15m, 2h, 30d"},
    "--completed": {"action": "store_true", "help": "remove completed components, too"},
    "--dry-run": {"action": "store_true", "help": "only say what would be done"},
    "--yes": {"action": "store_true", "help": "do not ask"},
    "--format": {"metavar": "FORMAT", "help": "mermaid, svg or text (else by the output's name)"},
    "-o/--output": {"metavar": "FILE", "help": "write to a file"},
}


def command(example: str, text: str, opens: str, options: str) -> Callable[[Function], Function]:
    """Make a function a command: of its arguments and, if it `opens` a store, of an engine.

    To "read" it is an ordinary function; to "write", or to "make" the store, a coroutine function,
    which `--dry-run` calls with a store that can only be read, if there is one.
    """

    def add(run: Any) -> Any:
        name = example.split()[0]
        COMMANDS[name] = types.SimpleNamespace(alias=name.replace("_", "-"), text=text, opens=opens,
            run=run, example=example, options=f"{options} --json{' --db' * bool(opens)}".split())
        return run

    return add


class ReaderGone(BaseException):
    """Whoever reads our output has gone away: `flexiflow history | head -1`."""


def put(text: str = "", stream: Any = None, end: str = "\n", flush: bool = False) -> None:
    """Print text that holds no controls; all that a command says goes through here."""
    try:
        print(text, file=stream, end=end, flush=flush)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        raise PersistenceError("The output cannot be written", why=str(error)) from error


def tell(args: Any, facts: Iterable[Any], lines: Iterable[str], code: int = 0) -> int:
    """Print facts with --json, a value a line; else lines of text. Return the exit code.

    It is out then: whoever reads a pipe need not wait for the end of the command.
    """
    for line in (json.dumps(fact, default=_plain) for fact in facts) if args.json else lines:
        put(printable(line))
    put(end="", flush=True)
    return code


def _error_text(error: BaseException, flat: bool = False) -> str:
    """Return an error's text, FlexiFlow's own or any other's; `flat` on one line."""
    text = str(error) if isinstance(error, FlexiFlowError) else (
        f"{type(error).__name__}: {printable(said(error))}{place_of(error)}")
    return text if not flat else "; ".join(
        line.strip() for line in text.splitlines() if line != "Context:")


def program() -> str:
    """Return what starts a command here: what has started this one."""
    if not sys.argv[0].endswith(".py"):
        return "flexiflow"  # which a package manager has installed
    as_module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {__name__}" if as_module else f"python {shlex.quote(sys.argv[0])}"


def hint(text: str, end: str = "\n") -> None:
    """Print a suggestion or progress to a person at a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        put(text, sys.stderr, end, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Return a header and rows in columns, as wide as the output shows them."""
    code = getattr(sys.stdout, "encoding", None) or "utf-8"
    return columns([printable(cell).encode(code, "backslashreplace").decode(code) for cell in row]
        for row in (header, *rows))


def age(seconds: float) -> str:
    """Return a span of time in its largest unit: 40s, 3m, 2h, 12d."""
    unit = next((one for one in "dhm" if abs(seconds) >= _UNITS[one]), "s")
    return f"{seconds / _UNITS[unit]:.0f}{unit}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _store_path(args: Any) -> Any:
    return args.db or os.environ.get("FLEXIFLOW_DB") or "flexiflow.db"


def _config_path(args: Any, needed: bool = True, what: str = "No config given") -> Any:
    """Return the config's path, and let it import the code that lies beside it."""
    path = args.file or args.config or os.environ.get("FLEXIFLOW_CONFIG") or None
    if path is None and needed:
        raise ArgumentError(what, fix="add --config FILE, or set FLEXIFLOW_CONFIG")
    folder = os.path.dirname(os.path.abspath(path or ""))
    if path is not None and folder not in sys.path:
        sys.path.append(folder)  # last: it hides no module
    return path


def _component(args: Any, engine: FlexiFlowEngine) -> AsyncComponent:
    """Return the component that the arguments name, made from the config if it is new."""
    config = _config_path(args, not args.name, "Neither a component (--name) nor a config given")
    if config is None:
        return engine._find(args.name)
    return engine.create_component(config, name=args.name, update=args.update)


async def _handled(args: Any, engine: FlexiFlowEngine, component: AsyncComponent,
        message: Json) -> int:
    """Handle a message and what it causes, and print the receipt; return the exit code."""
    receipt = await component.handle_message(message, _strict=False)
    await _deliver_caused(engine)
    line = f"{message['type']}: {_outcome(engine, receipt, message['type'])}"
    if receipt.outcome == "moved":
        for timer in engine.status(component.name)[0]["timers"]:
            line += f"   timer in {age(timer['due'] - engine.clock())}"
    line += "   (handled before)" * receipt.duplicate
    return tell(args, [receipt.as_dict()], [line], 0 if receipt else 3)


async def _deliver_caused(engine: FlexiFlowEngine) -> None:
    """Deliver what the messages handled here have sent, and what that sends in turn."""
    while engine.posted:
        await engine.run(until_idle=True, component=engine.posted.pop())


def _outcome(engine: FlexiFlowEngine, receipt: Receipt, kind: str) -> str:
    """Return what became of a message, for people."""
    before, after, reason = receipt.from_state, receipt.to_state, receipt.reason
    text = {"moved": f"{before} -> {after}", "stayed": f"stays in {after}",
        "blocked": f"blocked in {before}: {reason}"}.get(receipt.outcome, "")
    if not text:
        accepted = [*dict.fromkeys(one["type"] for one in engine.accepts(receipt.component))]
        ended = str(reason).startswith("completed")
        why = reason if ended else f"accepts: {', '.join(accepted) or 'nothing'}"
        text = f"not accepted in {before} ({why})"
        for close in difflib.get_close_matches(kind, accepted, 1):
            text += f'; did you mean "{close}"?'
    return text


async def _foreseen(args: Any, engine: FlexiFlowEngine, name: str, message: Json) -> int:
    """Print what a message would do; return the exit code that handling it would have."""
    found, now = await engine.dry_run(name, message), engine.clock()
    receipt = Receipt(*map(found.get, Receipt._fields))
    text = "would ask the class of its state" if found["outcome"] == "class" else _outcome(
        engine, receipt, message["type"])
    lines = [f"{message['type']}: {text}   (dry run{', handled before' * found['duplicate']})"]
    lines += [f"  data    {key}: {_shown(was)} -> {_shown(then)}"
        for key, (was, then) in found["changes"].items()]
    lines += [f"  send    {one['message']['type']} to {one['to']}"
        + f", in {age(one['delay'])}" * bool(one["delay"]) for one in found["sends"]]
    lines += [f"  emit    {name}" for name in found["emits"]]
    lines += [f"  action  {name} (not run)" for name in found["actions"]]
    lines += [f"  timer   {_timer_text(one, now)}" for one in found["timers"]]
    lines += [f"  ends    {one['message']}" for one in found["ended"]]
    return tell(args, [found], lines, 0 if receipt or found["outcome"] == "class" else 3)


STARTER = """{
  "name": %s,
  "description": "A question to the support. Make it a machine of your own",
  "initial_state": "New",
  "data": {"answers": 0},
  "states": {
    "New": {"description": "Somebody should answer"},
    "Waiting": {"description": "For the customer"},
    "Closed": {"final": true}
  },
  "rules": [
    {"from": "New", "on": "answer", "guard": {"text": {"exists": true}}, "to": "Waiting",
     "assign": {"answers": {"+": ["$data.answers", 1]}}},
    {"from": "Waiting", "on": "reply", "to": "New"},
    {"from": "Waiting", "after": "7d", "to": "Closed", "description": "No reply for a week"},
    {"from": "*", "on": "close", "to": "Closed"}
  ]
}
"""


@command("init ticket.json", "write a config to start from, and say how to go on", "", "file")
def cmd_init(args: Any) -> int:
    path = args.file or "ticket.json"
    name = os.path.splitext(os.path.basename(path))[0]
    text = STARTER % json.dumps(name)
    _walked(read_json(text, path, ConfigError))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise PersistenceError(f"Cannot write {path!r}", why=str(error),
            fix="name a new file, in a folder that is there") from error
    run = f"  {program()}"
    return tell(args, [{"config": path, "name": name}], [
        f"{path} written; next:", f"{run} explain {shlex.quote(path)}",
        f"""{run} handle --config {shlex.quote(path)} answer --data '{{"text": "Try again"}}'""",
        f"{run} status {shlex.quote(name)}"])


@command("register --config order.json", "create a component from a config, once", "make",
    "--config --name --allow-import --start --update")
async def cmd_register(args: Any, engine: FlexiFlowEngine) -> int:
    component = _component(args, engine)
    known, before = component._birth is None, component.definition.text
    await engine.register_async(component)
    await engine.run(until_idle=True, component=component.name)
    name, state, definition = component.name, component.state, component.definition
    updated = known and definition.text != before
    new = not known and definition.text == before
    counts = {"states": len(definition.nodes), "rules": len(component.rules),
        "timers": sum(rule.after is not None for rule in definition.rules)}
    text = f"{name} is registered already, in {state}"
    if new or updated:
        parts = ", ".join(_counted(number, noun[:-1]) for noun, number in counts.items())
        text = f"{name} {'registered' if new else 'updated'} in {engine.queue.path}: {parts}"
    tell(args, [dict(component=name, new=new, updated=updated, state=state, **counts)], [text])
    if args.start and (new or state == definition.birth.node.name):
        return await _handled(args, engine, component, {"type": "start"})
    return 0


@command("handle --name order-17 pay --data '{\"amount\": 12}'",
    "send a message, or NDJSON messages from stdin (-)", "make",
    "TYPE --config --name --allow-import --content --data --id --dry-run")
async def cmd_handle(args: Any, engine: FlexiFlowEngine) -> int:
    if args.TYPE == "-":
        if args.dry_run:
            raise ArgumentError(
                "A dry run is of one message", fix=f"{program()} handle pay --dry-run")
        return await _Intake(args, engine).run()
    data = read_object(args.data, "--data", """--data '{"amount": 12}'""")
    given = {"content": args.content, "id": args.id, "type": args.TYPE}
    data.update((key, value) for key, value in given.items() if value is not None)
    message, component = check_message(data), _component(args, engine)
    if args.dry_run:
        return await _foreseen(args, engine, component.name, message)
    await engine.run(until_idle=True, component=component.name)
    return await _handled(args, engine, component, message)


class _Intake:
    """NDJSON from stdin: lines that are ready together share transactions."""

    def __init__(self, args: Any, engine: FlexiFlowEngine) -> None:
        path = _config_path(args, needed=False)
        self.args, self.engine, self.config = args, engine, path and engine._config(path)
        self.name = args.name or (self.config and self.config.name)
        self.lines = self.again = self.failed = 0
        self.answers: dict[int, Json] = {}  # line -> its receipt or error, until they are shown
        self.counts: collections.Counter[str] = collections.Counter()  # outcome -> messages
        self.seen: dict[str, AsyncComponent] = {}  # in the order of their first message

    async def run(self) -> int:
        """Read to the end; return the exit code."""
        stdin: Any = sys.stdin
        if stdin is None:
            raise ArgumentError("No stdin to read from",
                fix=f"{program()} handle - < messages.ndjson")
        if stdin.isatty():
            hint("reading messages, a JSON object a line; end with Ctrl-D")
        rest, chunk = b"", b"..."
        while chunk:
            await _readable(stdin)
            chunk = stdin.buffer.read1(CHUNK)
            *lines, rest = (rest + (chunk or b"\n")).split(b"\n")
            rest = rest[:MAX_JSON + 1]  # a longer line is refused anyway
            await self.take(lines)
            hint(f"\r{self.lines:,} lines", end="" if chunk else "\n")
        await _deliver_caused(self.engine)
        for line in self.summary():
            put(line, sys.stderr if self.args.json else None)
        return 1 if self.failed else 0

    async def take(self, lines: list[bytes]) -> None:
        """Handle some lines: components side by side, the messages of each in order."""
        streams: dict[AsyncComponent, list[tuple[int, Json]]] = {}
        for line in lines:
            self.lines += 1
            try:
                if line.strip():
                    message = check_message(read_json(line, f"line {self.lines}", ArgumentError))
                    component = await self.meet(message.get("component") or self.name)
                    streams.setdefault(component, []).append((self.lines, message))
            except Exception as error:
                self.fail(self.lines, error)
        await asyncio.gather(*[self.stream(*one) for one in streams.items()])
        tell(self.args, [answer for _, answer in sorted(self.answers.items())], ())
        self.answers.clear()

    async def meet(self, name: Any) -> AsyncComponent:
        """Make a component that is named for the first time, or deliver what is due for it."""
        if not isinstance(name, str):
            raise ArgumentError(f"Not a component's name: {name!r}",
                fix='give the line a "component", or use --name')
        if name not in self.seen:
            if self.config is not None and self.engine.get(name) is None:
                component = self.engine.create_component(self.config, name=name)
            else:
                component = self.engine._find(name)
                await self.engine.run(until_idle=True, component=name)
            self.seen[name] = component
        return self.seen[name]

    async def stream(self, component: AsyncComponent, given: list[tuple[int, Json]]) -> None:
        for number, message in given:
            try:
                receipt = await component.handle_message(message, _strict=False)
                self.answers[number] = receipt.as_dict()
                self.counts[receipt.outcome] += 1
                self.again += receipt.duplicate
            except BaseException as error:
                if not _is_own_failure(error):
                    raise
                self.fail(number, error)

    def fail(self, number: int, error: BaseException) -> None:
        text = _error_text(error, flat=True)
        self.answers[number] = {"line": number, "error": text}
        self.failed += 1
        put(f"line {number}: {text}", sys.stderr)

    def summary(self) -> Iterator[str]:
        late = [("handled before", self.again), ("failed", self.failed)]
        counts = ", ".join(f"{n:,} {what}" for what, n in sorted(self.counts.items()) + late if n)
        yield (f"{_counted(sum(self.counts.values()), 'message')} to "
            f"{_counted(len(self.seen), 'component')}" + ": " * bool(counts) + counts)
        states = _ranked(component.state for component in self.seen.values())
        if states:
            yield from _state_table(states)


def _ranked(states: Iterable[str]) -> list[tuple[str, int]]:
    """Return each state with how often it is there, the most frequent first, ties by name."""
    return collections.Counter(sorted(states)).most_common()


def _state_table(ranked: Iterable[tuple[str, int]]) -> Iterator[str]:
    return table(("STATE", "COMPONENTS"), [(state, f"{n:,}") for state, n in ranked])


@command("update_rules --name order-17 new_rules.json", "add rules, or replace them", "make",
    "RULES --config --name --allow-import --replace")
async def cmd_update_rules(args: Any, engine: FlexiFlowEngine) -> int:
    component = _component(args, engine)
    before, rules = fresh(component.rules), ConfigLoader.load_rules(args.RULES)
    after = await component.update_rules(rules, replace=args.replace)
    return tell(args, [{"component": component.name, "before": len(before), "after": len(after)}],
        [f"{component.name}: rules {len(before)} -> {len(after)}",
        *(f"  + {_rule_text(rule)}" for rule in after if not _contains(before, rule)),
        *(f"  - {_rule_text(rule)}" for rule in before if not _contains(after, rule))])


def _rule_text(rule: Json) -> str:
    """Return a rule on one line: `Open --pay--> Paid`, or a note as JSON."""
    if not {"on", "after"} & rule.keys():
        return json.dumps(rule)
    words = [rule.get("from") or "*", rule.get("on") or f"after {rule['after']}"]
    return "{} --{}--> {}".format(*(one if isinstance(one, str) else ", ".join(one)
        for one in [*words, rule.get("to") or "(stays)"]))


@command("diagnose", "check this Python, this file and this store", "", "--db")
def cmd_diagnose(args: Any) -> int:
    found = list(_checks(args))
    checks = [{"check": check, "value": value, "ok": ok} for check, value, ok in found]
    good = all(ok for *_, ok in found)
    lines = [f"  [{'OK' if ok else 'FAIL'}] {check}: {value}" for check, value, ok in found]
    title = f"FlexiFlow environment: {'OK' if good else 'ISSUES FOUND'}"
    return tell(args, [{"ok": good, "checks": checks}], [title, *lines], 0 if good else 1)


def _checks(args: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield what is checked, what was found, and whether that is good."""
    yield "flexiflow", f"{__version__} in {os.path.abspath(__file__)}", True
    yield "python", sys.version.split()[0], sys.version_info >= (3, 9)
    yield "platform", sys.platform, True
    try:
        yield "sqlite", sqlite3.sqlite_version, sqlite3.sqlite_version_info >= (3, 34)
        with contextlib.closing(SQLiteStore(_store_path(args), readonly=True)) as store:
            if not os.path.exists(store.path):
                yield "store", f"{store.path}: not made yet", True
                return
            ((answer,),) = store.rows("PRAGMA integrity_check(1)")
            yield "store", f"{store.path}: {answer}", answer == "ok"
            yield "journal", store.rows("PRAGMA journal_mode")[0][0], True
            yield "components", f"{len(store.names()):,}", True
    except (ImportError, FlexiFlowError) as error:
        yield "store", _error_text(error, flat=True), False


@command("status order-17", "list the components, or show all about one", "read",
    "component --by-state")
def cmd_status(args: Any, engine: FlexiFlowEngine) -> int:
    found, now = engine.status(args.component), engine.clock()
    if args.by_state:
        states = _ranked(one["state"] for one in found)
        return tell(args, [{"state": state, "components": n} for state, n in states],
            _state_table(states))
    return tell(args, found, _details(found[0], now) if args.component
        else itertools.chain(_overview(found, now), _astray(engine)))


def _astray(engine: FlexiFlowEngine) -> Iterator[str]:
    """Yield for which components that are not there messages wait: a name may be misspelt."""
    for name, number, dead in engine.queue.rows(
            "SELECT component, COUNT(*) - COUNT(dead), COUNT(dead) FROM flexiflow_messages WHERE"
            " component NOT IN (SELECT name FROM flexiflow_components) GROUP BY 1 ORDER BY 1"):
        parts = [_counted(n, what) for n, what in ((number, "message"), (dead, "dead letter")) if n]
        yield f"{' and '.join(parts)} for {name!r}, which is not there (yet)"


def _overview(found: list[Json], now: float) -> Iterator[str]:
    rows = ((one["name"], one["state"], age(now - (one["since"] or now)), one["seq"],
        one["waiting"], _timer_text(one["timers"][0], now) if one["timers"] else "-",
        one["dead"] or "-") for one in found)
    yield from table(("COMPONENT", "STATE", "SINCE", "V", "WAITING", "NEXT TIMER", "DEAD"), rows)
    waiting, dead = (sum(one[key] for one in found) for key in ("waiting", "dead"))
    yield (f"{_counted(len(found), 'component')}, {_counted(waiting, 'message')} waiting, "
        + _counted(dead, "dead letter"))


def _timer_text(timer: Json, now: float) -> str:
    due = timer["due"] - now
    return f"{timer['message']}, " + (f"in {age(due)}" if due > 0 else "due")


def _failure_text(one: Json) -> str:
    """Return why a timer or a message of the queue comes again, if it has failed."""
    return f" (attempt {one['attempts']}: {one['error'].splitlines()[0]})" if one["error"] else ""


def _details(facts: Json, now: float) -> Iterator[str]:
    since = facts["since"] or now
    yield (f"state    {facts['state']}, version {facts['seq']}, since {_when(since)}"
        f" ({age(now - since)})" + ", completed" * (facts["completed"] is not None))
    if facts["accepts"] is None:
        yield "accepts  not known: the code of its states cannot be imported here"
    else:
        what = (one["type"] + f" [{one['guard']}]" * bool(one["guard"]) for one in facts["accepts"])
        yield f"accepts  {', '.join(what) or 'nothing'}"
    yield from (f"timer    {_timer_text(one, now)}{_failure_text(one)}" for one in facts["timers"])
    yield f"data     {json.dumps(facts['data'], ensure_ascii=False)}"
    yield f"queue    {facts['waiting']} waiting, {facts['dead']} dead"
    again = ({**one, "message": one["message"]["type"]} for one in facts["queue"] if one["error"])
    yield from (f"retry    {_timer_text(one, now)}{_failure_text(one)}" for one in again)
    if facts["dead"]:
        yield f"see      {program()} dead-letters {shlex.quote(facts['name'])}"


@command("history order-17", "show the steps, the newest last", "read",
    "component --limit --before --since")
def cmd_history(args: Any, engine: FlexiFlowEngine) -> int:
    if args.component is not None:
        engine._kept(args.component)  # raises if there is none
    steps = engine.history(
        args.component, limit=args.limit, before=args.before, since=args.since or 0)[::-1]
    every = args.component is None
    header = ("V", "WHEN", *["COMPONENT"] * every, "MESSAGE", "FROM", "TO", "OUTCOME", "ID")
    return tell(args, steps, table(header, ((step["seq"], _when(step["time"]),
        *[step["component"]] * every, step["message"].get("type", "-"), step["from_state"],
        step["to_state"], step["outcome"], step["id"]) for step in steps)))


@command("run --until-idle", "deliver messages and timers when they are due, until Ctrl-C", "write",
    "--until-idle --concurrency --allow-import --watch --config --name")
async def cmd_run(args: Any, engine: FlexiFlowEngine) -> int:
    start, seen = time.monotonic(), itertools.count(1)
    if sys.stderr is not None and sys.stderr.isatty():
        await engine.event_bus.subscribe("component.message.received", "run",
            lambda event: hint(f"\r{_counted(next(seen), 'message')}", end=""))
    _on_signal(signal.SIGTERM, lambda: args.task.cancel() if engine._stopping else engine._stop())
    work = asyncio.ensure_future(
        engine.run(until_idle=args.until_idle, concurrency=args.concurrency))
    try:
        await asyncio.wait([work])
    finally:  # also of Ctrl-C: what runs comes to its end, unless it is told again
        if engine._stopping:
            work.cancel()
        engine._stop()
        delivered, spent = await work, time.monotonic() - start
        hint("\r", end="")
        facts = {"delivered": delivered, "failed": engine.retries, "dead": len(args.dead)}
        counts = ", ".join(f"{number:,} {what}" for what, number in facts.items())
        tell(args, [{**facts, "seconds": round(spent, 3)}], [f"{counts}, {spent:.2f} s"])
    return 0


@command("serve --port 8765", "show what goes on in a browser, and answer HTTP", "make",
    "--config --name --allow-import --host --port --token --read-only --watch")
async def cmd_serve(args: Any, engine: FlexiFlowEngine) -> int:
    # What stands in the environment, no list of processes shows.
    token = os.environ.get("FLEXIFLOW_TOKEN") if args.token is None else args.token
    if token == "":
        raise ArgumentError("The token is empty", fix="--token SECRET, or unset FLEXIFLOW_TOKEN")
    if args.read_only and args.watch:
        raise ArgumentError("--watch changes components", fix="leave out --read-only")
    host = args.host.strip("[]")
    shown = f"[{host}]" if ":" in host else host
    if shown not in _LOOPBACK and not token:
        raise ArgumentError(f"{args.host} can be reached by others",
            fix="FLEXIFLOW_TOKEN or --token, or leave --host out")
    hosts = None if host in ("0.0.0.0", "::") else [*_LOOPBACK, shown]
    app = create_app(engine, hosts, token, readonly=args.read_only)
    path = _config_path(args, needed=False)
    engine.queue.rows("PRAGMA user_version")  # raises if the store cannot be opened
    if path and not args.read_only:
        await engine.register_async(engine.create_component(path, name=args.name))
    stop = asyncio.Event()

    def end() -> None:  # told twice, it waits for nothing
        for task in asyncio.all_tasks() if stop.is_set() else ():
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        _on_signal(number, end)
    async with HttpServer(app, host, args.port) as server:
        if not args.read_only:
            engine.start()
        url = f"http://{shown}:{server.port}/"
        tell(args, [{"url": url}], [f"FlexiFlow inspector on {url} (Ctrl-C stops)"])
        await stop.wait()
    return 0


@command("dead-letters", "list the messages that were given up", "read", "component")
def cmd_dead_letters(args: Any, engine: FlexiFlowEngine) -> int:
    letters, now = engine.dead_letters(args.component), engine.clock()
    if args.component is not None and not letters:
        engine._kept(args.component)  # raises if there is none
    header = ("ID", "COMPONENT", "MESSAGE", "TRIES", "AGE", "ERROR")
    return tell(args, letters, table(header, ((one["number"], one["component"],
        one["message"]["type"] if isinstance(one["message"], dict) else "-", one["attempts"],
        age(now - one["dead"]), one["error"].partition("\n")[0]) for one in letters)))


@command("redrive 17", "give dead letters back to the queue", "write",
    "ID --all --name --discard")
async def cmd_redrive(args: Any, engine: FlexiFlowEngine) -> int:
    if (args.ID and args.all) or not (args.ID or args.all or args.name):
        raise ArgumentError("Either numbers of dead letters, --name or --all is needed",
            fix="redrive 17, redrive --name order-17, or redrive --all\n"
            "dead-letters shows the numbers")
    letters = await engine.redrive(*args.ID, name=args.name, discard=args.discard)
    if args.name and not letters:
        engine._kept(args.name)  # raises if there is none
    counts = collections.Counter(letter["component"] for letter in letters)
    did = "discarded, of" if args.discard else "back in the queue of"
    return tell(args, letters, [f"{_counted(n, 'message')} {did} {name}"
        for name, n in counts.items()] or ["no dead letters"])


@command("replay --config new.json", "decide again: what differs?", "read", "component --config")
def cmd_replay(args: Any, engine: FlexiFlowEngine) -> int:
    found = engine.replay(args.component, args.config)
    lines = itertools.chain.from_iterable(map(_replay_lines, found))
    return tell(args, found, lines, int(any(one["differences"] for one in found)))


def _replay_lines(found: Json) -> Iterator[str]:
    """Yield how a component's history comes out now, and each step that differs."""
    text = f"{found['same']:,} of {_counted(found['steps'], 'step')} same"
    if found["differences"]:
        text += f"; it would be in {found['would_be']}, and is in {found['state']}"
    if found["skipped"]:
        text = f"skipped: {found['skipped']}"
    yield f"{found['component']}: {text}"
    for one in found["differences"]:
        now, was = _step_text(*one["now"]), _step_text(*one["was"])
        yield f"  step {one['seq']}: {one['message']} gave {now}, history says {was}"


def _step_text(outcome: str, before: str, after: str, *data: Json) -> str:
    text = f"{before} -> {after}" if outcome == "moved" else f"{outcome} in {before}"
    return text + "".join(f" with {json.dumps(one, ensure_ascii=False)}" for one in data)


@command("prune --keep 100 --dry-run", "delete history, and forget its messages' ids", "write",
    "component --keep --older-than --completed --dry-run")
async def cmd_prune(args: Any, engine: FlexiFlowEngine) -> int:
    if args.keep is None and args.older_than is None and not args.completed:
        raise ArgumentError("Nothing says what to prune",
            fix="--keep 100, --older-than 30d, or both (what neither keeps), or --completed")
    found = await engine.prune(args.component, keep=args.keep, older_than=args.older_than,
        completed=args.completed, dry_run=args.dry_run)
    did = "would delete" if args.dry_run else "deleted"
    gone = [f"with them: {_counted(len(found['ids']), 'message id')}",
        *(f"component {name}" for name in found["components"])]
    return tell(args, [{**found, "dry_run": args.dry_run}], [
        f"{did} {found['rows']:,} of {_counted(found['of'], 'history row')}", ", ".join(gone)])


@command("remove order-17", "remove a component with all that is its own", "write", "NAME --yes")
async def cmd_remove(args: Any, engine: FlexiFlowEngine) -> int:
    agreed = args.yes
    if not agreed:
        if sys.stdin is None or not sys.stdin.isatty():
            raise ArgumentError("Nobody to ask: stdin is no terminal", fix="add --yes")
        put(f"Remove {printable(args.NAME)}, history and all? [y/N] ", sys.stderr, "", flush=True)
        await _readable(sys.stdin)
        agreed = sys.stdin.readline().strip().lower() in ("y", "yes")
    if agreed:
        await engine.remove(args.NAME)
    return tell(args, [{"component": args.NAME, "removed": agreed}],
        [f"{args.NAME} {'removed' if agreed else 'stays'}"], 0 if agreed else 1)


@command("backup copy.db", "copy the store, as it is at one moment", "read", "FILE")
def cmd_backup(args: Any, engine: FlexiFlowEngine) -> int:
    asyncio.run(engine.backup(args.FILE))
    return tell(args, [{"store": engine.queue.path, "backup": args.FILE}],
        [f"{engine.queue.path} copied to {args.FILE}"])


_CHECKED = "file --config --allow-import --no-imports"


def _explained(args: Any) -> ConfigExplanation:
    return explain(_config_path(args), imports=not args.no_imports, allow_imports=args.allow_import)


@command("explain order.json", "check a config and say what it means", "", f"{_CHECKED} --schema")
def cmd_explain(args: Any) -> int:
    if args.schema:
        return tell(args, [schema()], json.dumps(schema(), indent=2).splitlines())
    found = _explained(args)
    lines = found.format().splitlines()
    if found.is_valid:
        show = f"{program()} visualize {shlex.quote(found.config_path)}"
        lines += ["", f"Its rules: {show} --format text", f"A picture: {show} -o FILE.svg"]
    return tell(args, [{"valid": found.is_valid, **_plain(found)}], lines, int(not found.is_valid))


@command("visualize order.json -o order.svg", "draw a config, or a component where it stands", "",
    f"{_CHECKED} --name --db --format -o/--output")
def cmd_visualize(args: Any) -> int:
    suffix = os.path.splitext(args.output or "")[1].lower()
    format = args.format or {"": "mermaid", ".mmd": "mermaid", ".md": "mermaid", ".svg": "svg",
        ".txt": "text"}.get(suffix, suffix)
    if args.name:
        with contextlib.closing(SQLiteStore(_store_path(args), readonly=True)) as store:
            text = picture(FlexiFlowEngine(store)._find(args.name), format)
    else:
        found = _explained(args)
        if found.errors:
            raise _as_error(found.errors, found.config_path)
        text = visualize(found, format=format)
    if args.output:
        write_file(args.output, text + "\n", mode=0o666)
    return tell(args, [{"format": format, "output": args.output, "text": text}],
        () if args.output else text.splitlines())


def _parse(argv: list[str]) -> Any:
    # Without a width and a prog, argparse would import shutil and look at the terminal.
    make: Any = functools.partial(argparse.ArgumentParser, allow_abbrev=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=79))
    examples = "\n".join(f"  {program()} {one.example}" for one in COMMANDS.values())
    parser = make(prog=program(),
        description=f"examples:\n{examples}\n\nDurable components with JSON state machines.",
        epilog="exit status: 0 done, 1 failed, 2 wrong usage, 3 message not accepted")
    parser.add_argument("-V", "--version", action="version", version=f"flexiflow {__version__}")
    parser.set_defaults(file=None, allow_import=None, update=False, dry_run=False, read_only=False)
    commands = parser.add_subparsers(
        prog=program(), metavar="COMMAND", required=True, parser_class=make)
    asked = {name: one for name, one in COMMANDS.items() if argv[:1] in ([name], [one.alias])}
    for name, one in (asked or COMMANDS).items():  # to make all takes `status` a twentieth longer
        added = commands.add_parser(name, help=one.text, aliases={one.alias} - {name},
            description=f"example: {program()} {one.example}\n\n{one.text}")
        for option in one.options if asked else ():
            added.add_argument(*option.split("/"), **OPTIONS[option])
        added.set_defaults(command=one)
    if argv and argv[0] not in {*commands.choices, "-h", "--help", "-V", "--version"}:
        parser.error(f"options stand after the command: {argv[0]!r}" if argv[0][:1] == "-"
            else f"no command {argv[0]!r}; {choose(argv[0], COMMANDS)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        given = " ".join(map(printable, unknown))
        commands.choices.get(argv[0], parser).error(
            f"unrecognized arguments: {given}; like this: {program()} {args.command.example}")
    return args


def _run(args: Any) -> Any:
    """Call the command with what it opens, and close that; return the exit code."""
    opens, call = args.command.opens, args.command.run
    if not opens:
        return call(args)
    path = _store_path(args)
    with contextlib.closing(SQLiteStore(path, readonly=True)) as store:
        if opens == "read" or args.dry_run or args.read_only:
            there = None if args.dry_run and opens == "make" and not os.path.exists(path) else store
            answer = call(args, FlexiFlowEngine(there, allow_imports=args.allow_import))
            return asyncio.run(answer) if inspect.iscoroutine(answer) else answer
        if opens == "write":
            store.rows("PRAGMA user_version")  # raises if there is no store
    return asyncio.run(_session(args, SQLiteStore(path)))


async def _session(args: Any, store: SQLiteStore) -> Any:
    """Run a command that writes; Ctrl-C cancels it, because a cancelled turn undoes itself."""
    log = logging.getLogger("flexiflow.cli")
    log.addFilter(_brief)
    engine = FlexiFlowEngine(store, logger=log, allow_imports=args.allow_import)
    args.task, args.dead = asyncio.current_task(), []
    _on_signal(signal.SIGINT, args.task.cancel)
    watch = getattr(args, "watch", False) and asyncio.ensure_future(
        watch_config(engine, _config_path(args), args.name))
    await engine.event_bus.subscribe("message.dead", "flexiflow", args.dead.append)
    try:
        return await args.command.run(args, engine)
    finally:
        if watch:
            watch.cancel()
        await engine.close()
        if args.dead:
            put(f"{_counted(len(args.dead), 'message')} given up: {program()} dead-letters says "
                "why; mend that (update_rules adds a rule), then redrive", sys.stderr)


def _brief(record: logging.LogRecord) -> bool:
    """Say of an exception what it is; FLEXIFLOW_DEBUG=1 keeps the traceback."""
    if record.exc_info and record.exc_info[1] and os.environ.get("FLEXIFLOW_DEBUG") != "1":
        why = _error_text(record.exc_info[1], flat=True)
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {why}", None, None
    return _one_line.filter(record)


def _on_signal(number: int, action: Any) -> None:
    """Let the loop act on a signal until it is closed."""
    with contextlib.suppress(NotImplementedError, RuntimeError):  # Windows; not the main thread
        asyncio.get_running_loop().add_signal_handler(number, action)


async def _readable(stdin: Any) -> None:
    """Wait until stdin can be read: reading itself would not notice that it is cancelled."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.suppress(NotImplementedError, OSError, ValueError):  # Windows; a file
        loop.add_reader(stdin, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(stdin)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII console is no reason to die
    try:
        try:
            args = _parse(sys.argv[1:] if argv is None else argv)
        except SystemExit as stop:  # argparse: help, version, usage
            code = int(stop.code or 0)
        else:
            code = int(_run(args))
        put(end="", flush=True)
        return code
    except ReaderGone:
        return 141
    except BaseException as error:  # SystemExit, say, out of a user's action
        if isinstance(error, KeyboardInterrupt) or "asyncio.exceptions.Cancel" in str(type(error)):
            put("interrupted", sys.stderr)  # without asking asyncio, which may not be there yet
            return 130
        if os.environ.get("FLEXIFLOW_DEBUG") == "1":
            raise
        put(f"error: {_error_text(error)}", sys.stderr)
        if not isinstance(error, FlexiFlowError):
            put("Fix: FLEXIFLOW_DEBUG=1 shows where it comes from", sys.stderr)
        return 2 if isinstance(error, ArgumentError) and not _of_code(error) else 1


# 1.0.1 was a package: each of its modules is this one, so that `from flexiflow.engine import
# FlexiFlowEngine` and the pickles of its users still find what they name. Last, because another
# thread must not find a module half made.
for _old in ("api cli component config_loader engine errors event_manager explain imports logger "
        "pack_loader reload state_machine statepack visualize extras extras.persist_json "
        "extras.persist_sqlite extras.retry").split():
    sys.modules[f"{__name__}.{_old}"] = sys.modules[__name__]
    globals().setdefault(_old.rpartition(".")[2], sys.modules[__name__])
