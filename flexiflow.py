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
    11 Component and engine    12 Views    13 Command line

A message travels one way: command line or Python call -> engine (one turn at a time for a
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
    import importlib.util
    import os

    _spec = globals().get("__spec__")
    if getattr(_spec, "loader", None) is None:  # a script, or a profiler's idea of one
        _name = os.path.splitext(os.path.basename(__file__))[0]
        _spec = importlib.util.spec_from_file_location(_name, __file__)
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
    sys.exit(importlib.import_module(_spec.name).main())

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import logging
import math
import operator
import os
import re
import time
import traceback
import types
import zlib
from collections import deque, namedtuple
from contextvars import ContextVar
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import asyncio
    import datetime
    import difflib
    import hashlib
    import inspect
    import random
    import sqlite3
    import tempfile
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn, TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])
    Scope = dict[str, Any]  # what a guard or value may look at: see `decide`
    Row = tuple[str, tuple[Any, ...]]  # an SQL statement and its parameters
else:

    class _Later:
        """A module imported at its first use: `status` starts in half the time without asyncio."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            module = globals()[self._name] = importlib.import_module(self._name)
            return getattr(module, attribute)

    for _name in (
            "argparse asyncio datetime difflib hashlib inspect random sqlite3 tempfile").split():
        globals()[_name] = _Later(_name)

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
    "StateResolution", "visualize", "load_symbol",
    # errors
    "FlexiFlowError", "ConfigError", "StateError", "PersistenceError", "ImportError_",
    "ArgumentError", "ErrorContext",
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

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Escape what could forge a line or turn the text around: controls, bidi marks, surrogates."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


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
        for label, text in (("Why", self.why), ("Fix", self.fix)):
            if text:
                lines.append(f"{label}: " + "\n     ".join(map(printable, text.splitlines())))
        if self.context.items:
            lines.append("Context:\n" + self.context.format())
        return "\n".join(lines)

    def __reduce__(self) -> Any:
        return _restore_error, (type(self), self.what, self.__dict__)


def _restore_error(kind: type[FlexiFlowError], what: str, attributes: dict[str, Any]) -> Any:
    """Unpickle an error, whatever its subclass asks of a constructor."""
    error = kind.__new__(kind, what)
    error.__dict__.update(attributes)
    return error


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


def choose(word: object, choices: Iterable[str]) -> str:
    """Return a `fix` text: the close match among `choices`, or all of them when they are few."""
    known = sorted(map(str, choices))
    close = difflib.get_close_matches(str(word), known, 1)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(map(repr, known[:12])) + (f" and {len(known) - 12} more" * (len(known) > 12))
    return f"use one of {shown}" if known else "none is known here"


# --------------------------------------------------------------------------------------------
# 2. Ground: strict JSON, ids, logging
# --------------------------------------------------------------------------------------------
# One reader and one writer of JSON stand behind configs, messages, snapshots and the store, so
# that what was written can be read. Every log record is one line and carries a correlation id.

MAX_JSON = 1_000_000  # bytes of one document
MAX_DEPTH = 100  # brackets within brackets
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _whole(digits: str) -> int:
    # Some builds of Python have no limit of their own, and reading digits takes quadratic time.
    if len(digits) > 4300:
        raise ValueError(f"a number of {len(digits)} digits; 4300 are allowed")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


_decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_whole, parse_float=_finite,
    object_pairs_hook=_distinct).decode
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"),
    sort_keys=True).encode


def _check_depth(text: str) -> None:
    """Raise ValueError where brackets stand deeper than MAX_DEPTH; nothing is parsed for it."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for mark in _BRACKETS.findall(text):
        depth += (mark in "[{") - (mark in "]}") if len(mark) == 1 else 0
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} brackets within brackets")


def parse_json(source: str | bytes, limit: int = MAX_JSON) -> Any:
    """Return the value of a JSON document; raise ValueError for whatever is not strict JSON.

    Refused: duplicate keys, NaN and Infinity, numbers that do not fit, lone surrogates, bytes
    that are not UTF-8, more than MAX_DEPTH levels or `limit` bytes.
    """
    if len(source) > limit:
        raise ValueError(f"more than {limit} bytes")
    text = source if isinstance(source, str) else source.decode("utf-8")
    _check_depth(text)
    value = _decode(text)
    if "\\u" in text:
        _encode(value).encode("utf-8")  # raises for a lone surrogate
    return value


def read_json(source: str | bytes, name: str, error: type[FlexiFlowError]) -> Any:
    """Return the value of the JSON document called `name`; raise `error` if it is not good."""
    try:
        return parse_json(source)
    except (ValueError, RecursionError, MemoryError) as problem:
        raise error(f"Not valid JSON: {name}", why=str(problem)) from problem


def _flaw(value: Any, path: str) -> str | None:
    """Say what keeps `value` from being JSON, and where."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                return f"the key {key!r} at {path} is not a string"
            flaw = _flaw(inner, f"{path}.{key}")
            if flaw:
                return flaw
        return None
    if isinstance(value, list):
        flaws = (_flaw(inner, f"{path}[{index}]") for index, inner in enumerate(value))
        return next(filter(None, flaws), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}"
    if value is None or isinstance(value, (str, int, float)):
        return None
    return f"{path} is a {type(value).__name__}"


def write_json(value: Any, name: str = "value", limit: int = MAX_JSON) -> str:
    """Return `value` as compact JSON with sorted keys; raise ValueError if reading would differ.

    A tuple, a key that is not a string, NaN, a date: refused by name instead of changed.
    """
    try:
        text = _encode(value)
        size = len(text.encode("utf-8"))
        _check_depth(text)
        if _decode(text) == value and size <= limit:
            return text
        problem = f"{name} takes {size} bytes; {limit} are allowed" if size > limit else None
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        problem = f"{name}: {error}"
    with contextlib.suppress(RecursionError):
        problem = _flaw(value, name) or problem
    raise ValueError(problem or f"{name} reads back as another value")


def fresh(value: Any) -> Any:
    """Return a copy of a JSON value that shares no list or dict with it."""
    if value.__class__ is dict:
        return {key: fresh(inner) for key, inner in value.items()}
    if value.__class__ is list:
        return [fresh(inner) for inner in value]
    return value


_ids: Iterator[int]
_id_prefix: str


def _renew_ids() -> None:
    global _ids, _id_prefix
    _ids, _id_prefix = itertools.count(1), os.urandom(6).hex() + "-"


_renew_ids()
if hasattr(os, "register_at_fork"):  # parent and child would count the same ids
    os.register_at_fork(after_in_child=_renew_ids)


def new_id() -> str:
    """Return an id that no other call, process or machine returns."""
    return f"{_id_prefix}{next(_ids):x}"


class Context:
    """What surrounds the running code: a correlation id, or a turn (section 11)."""

    __slots__ = ("parent", "_correlation_id")
    machine: Any = None  # of a turn, the state machine that it works on

    def __init__(self, parent: Context | None, correlation_id: str | None = None) -> None:
        self.parent = parent
        self._correlation_id = correlation_id

    @property
    def correlation_id(self) -> str | None:
        """The id that log records, sends and timers made here carry."""
        return self._correlation_id


_context: ContextVar[Context | None] = ContextVar("flexiflow", default=None)


def set_correlation_id(value: str | None = None) -> str:
    """Use `value`, or a new id, for the records and messages of this task from here on; return it."""
    chosen = value or new_id()
    _context.set(Context(_context.get(), chosen))
    return chosen


def get_correlation_id() -> str | None:
    """Return the correlation id of the current task, if it has one."""
    context = _context.get()
    return None if context is None else context.correlation_id


_SECRET = re.compile(r"token|password|passwd|secret|api_?key|authorization", re.IGNORECASE)


def masked(value: Any) -> Any:
    """Return a JSON value with what stands under keys like token, password or secret hidden."""
    if isinstance(value, dict):
        return {key: "***" if _SECRET.search(str(key)) else masked(inner) for key,
            inner in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list) else value


class CorrelationIdFilter(logging.Filter):
    """Put `correlation_id` on every record, and fold message and traceback into one safe line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass; one that already has a correlation id keeps it."""
        if not hasattr(record, "correlation_id"):
            record.correlation_id = get_correlation_id() or "-"
        text = record.getMessage()
        if record.exc_info and record.exc_info[0]:
            lines = traceback.format_exception(*record.exc_info)
            text += " | " + " | ".join(line.strip() for line in lines)
        record.msg, record.args = printable(text), None
        record.exc_info = record.exc_text = None
        return True


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON: time, level, logger, correlation_id, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps({"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname, "logger": record.name, "correlation_id": getattr(record,
            "correlation_id", "-"), "message": record.getMessage()})


LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s correlation_id=%(correlation_id)s %(message)s"
logger = logging.getLogger("flexiflow")
logger.addFilter(CorrelationIdFilter())


def get_logger(name: str = "flexiflow", level: int | None = None, *,
        style: str = "text") -> logging.Logger:
    """Return a logger that prints to stderr, unless the application has set up logging itself.

    `style` is "text" or "json" (a JSON object a line). Called twice it adds nothing; a level
    is only set when given, or when the logger has none.
    """
    formats = {"text": logging.Formatter(LOG_FORMAT), "json": JsonFormatter()}
    if style not in formats:
        raise ArgumentError(f"Unknown log style: {style!r}", fix=choose(style, formats))
    log = logging.getLogger(name)
    if not any(isinstance(one, CorrelationIdFilter) for one in log.filters):
        log.addFilter(CorrelationIdFilter())
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
# One generator of delays serves sync and async functions, and the queue of section 11. Only
# Exceptions are tried again, never a cancellation; the last one is raised as it was.


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
        numbers = {name: getattr(self, name) for name in ("max_attempts", "base_delay", "max_delay",
            "backoff", "jitter")}
        if self.timeout is not None:
            numbers["timeout"] = self.timeout
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ArgumentError(f"{name} is not a number of zero or more: {value!r}")
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise ArgumentError(f"max_attempts is not a whole number: {self.max_attempts!r}")
        if self.jitter > 1:
            raise ArgumentError(f"jitter is a fraction, at most 1: {self.jitter!r}")

    def delay(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after `failures` failed calls; `chance` is from 0 to 1."""
        # The jitter comes after the cap: many clients at the cap must not knock together.
        try:
            pause = min(self.base_delay * float(self.backoff) ** (failures - 1), self.max_delay)
        except OverflowError:
            pause = self.max_delay
        return pause * (1 + self.jitter * chance)


def _pauses(config: RetryConfig, start: float) -> Iterator[float]:
    """Yield the seconds to sleep after each failure; end when no call is to be made any more."""
    for failures in range(1, config.max_attempts):
        pause = config.delay(failures, random.random())
        if config.timeout is not None and time.monotonic() - start + pause > config.timeout:
            return
        yield pause


def is_async(function: Any) -> bool:
    """Tell whether calling `function` gives a coroutine: partials and callable objects too."""
    call = getattr(function, "func", function)  # functools.partial
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
        getattr(call, "__call__", None))


def retry_async(config: RetryConfig | None = None) -> Callable[[Function], Function]:
    """Decorate a function, async or plain, so that a failed call is made again.

    The exception of the last call is raised as it is. CancelledError is never tried again.
    """
    settings = RetryConfig() if config is None else config
    if not isinstance(settings, RetryConfig):
        raise ArgumentError(f"Not a RetryConfig: {config!r}", fix="@retry_async(RetryConfig())")

    def again(error: BaseException, pauses: Iterator[float]) -> float:
        pause = None if isinstance(error, asyncio.CancelledError) else next(pauses, None)
        if pause is None:
            raise error
        logger.debug("Trying again in %.3f s after %r", pause, error)
        return pause

    def decorate(function: Any) -> Any:
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            pauses = _pauses(settings, time.monotonic())
            while True:
                try:
                    return await function(*args, **kwargs)
                except settings.retry_on as error:
                    pause = again(error, pauses)
                await asyncio.sleep(pause)

        def call(*args: Any, **kwargs: Any) -> Any:
            pauses = _pauses(settings, time.monotonic())
            while True:
                try:
                    return function(*args, **kwargs)
                except settings.retry_on as error:
                    pause = again(error, pauses)
                time.sleep(pause)

        return functools.wraps(function)(call_async if is_async(function) else call)

    return decorate


# --------------------------------------------------------------------------------------------
# 4. Events: the bus
# --------------------------------------------------------------------------------------------
# `publish` awaits every handler: by priority 1 to 5, then in the order of subscription. What a
# handler or filter does wrong is its own failure: logged, and published once. A subscription
# keeps its handler alive until it is removed.

MAX_NESTING = 32  # publishes within publishes
HANDLER_FAILED = "event.handler.failed"
_Coroutine = types.CoroutineType

if sys.version_info >= (3, 11):
    HandlerErrors = ExceptionGroup
else:

    class HandlerErrors(Exception):
        """Several handlers failed in one concurrent publish: a stand-in for ExceptionGroup."""

        def __init__(self, message: str, exceptions: Sequence[Exception]) -> None:
            super().__init__(message, tuple(exceptions))
            self.message, self.exceptions = message, tuple(exceptions)


class Subscription:
    """One handler of one event, and the handle that `unsubscribe` takes."""

    __slots__ = ("event_name", "component_name", "handler", "priority", "filter_fn", "once",
        "number", "active")

    def __init__(self, event_name: str, component_name: str, handler: Callable[[Any], Any],
            priority: int, filter_fn: Callable[[str, Any], Any] | None, once: bool,
            number: int) -> None:
        self.event_name, self.component_name, self.handler = event_name, component_name, handler
        self.priority, self.filter_fn, self.once = priority, filter_fn, once
        self.number = number  # counts subscriptions of a bus
        self.active = True  # until unsubscribed

    @property
    def subscription_id(self) -> str:
        """The number as text, as 1.0.1's users know it."""
        return str(self.number)

    def __repr__(self) -> str:
        return f"<Subscription {self.number} of {self.component_name!r} to {self.event_name!r}>"


SubscriptionHandle = Subscription


class AsyncEventManager:
    """Publish events to subscribed functions, within one process and one event loop."""

    __slots__ = ("_events", "_owners", "_ready", "_numbers", "_in_flight", "_logger", "__weakref__")

    def __init__(self, logger: Any = None) -> None:
        self._events: dict[str, dict[Subscription, None]] = {}
        # Most owners have one subscription: a dict for each would double what a million cost.
        self._owners: dict[str, Subscription | dict[Subscription, None]] = {}
        self._ready: dict[str, tuple[Subscription, ...]] = {}  # in order of delivery, until changed
        self._numbers = itertools.count(1)
        self._in_flight = 0
        self._logger = logger

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
        if filter_fn is not None:
            self._check_filter(filter_fn)
        sub = Subscription(event_name, component_name, handler, priority, filter_fn, once,
            next(self._numbers))
        self._events.setdefault(event_name, {})[sub] = None
        owned = self._owners.setdefault(component_name, sub)
        if owned.__class__ is dict:
            owned[sub] = None
        elif owned is not sub:
            self._owners[component_name] = {owned: None, sub: None}
        self._changed(event_name)
        return sub

    def unsubscribe(self, handle: Subscription) -> bool:
        """End a subscription, also for a publish that has not called it yet; False if it had ended."""
        if handle not in self._events.get(handle.event_name, ()):
            return False
        owned = self._owners[handle.component_name]
        if owned is handle or len(owned) == 1:
            del self._owners[handle.component_name]
        else:
            del owned[handle]
        self._drop(handle)
        return True

    def unsubscribe_all(self, component_name: str) -> int:
        """End every subscription of a component; return how many there were."""
        owned = self._owners.pop(component_name, {})
        subs = list(owned) if owned.__class__ is dict else [owned]
        for sub in subs:
            self._drop(sub)
        return len(subs)

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
                self._check_nesting(event_name)
            if delivery == "concurrent":
                return await self._publish_together(ready, event_name, data, on_error)
            for sub in ready:
                if not sub.active:
                    continue
                try:
                    if sub.filter_fn is not None or sub.once:
                        if not self._admits(sub, event_name, data):
                            continue
                    result = sub.handler(data)
                    if result.__class__ is _Coroutine:
                        await result
                    elif result is not None and inspect.isawaitable(result):
                        await result
                except BaseException as error:
                    if not _is_own_failure(error):
                        raise
                    await self._failed(sub, event_name, data, error)
                    if on_error == "raise":
                        raise
        finally:
            self._in_flight -= 1

    def listens(self, event_name: str) -> bool:
        """Tell whether anybody would hear the event: where not, its payload need not be made."""
        return event_name in self._events or "*" in self._events

    async def _publish_together(self, ready: tuple[Subscription, ...], event_name: str, data: Any,
            on_error: str) -> None:
        token = _nesting.set(self._nested())
        try:
            calls = [self._call(sub, event_name, data) for sub in ready]
            # Cancelled here, gather cancels the handlers and waits for them.
            results = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            _nesting.reset(token)
        errors = []
        for sub, result in zip(ready, results):
            if result is not None:
                await self._failed(sub, event_name, data, result)
                errors.append(result)
        if errors and on_error == "raise":
            if len(errors) == 1:
                raise errors[0]
            proper = [error if isinstance(error, Exception) else StateError(
                f"Handler ended by {error!r}") for error in errors]
            raise HandlerErrors(f"{len(errors)} handlers of {event_name!r} failed", proper)

    async def _call(self, sub: Subscription, event_name: str, data: Any) -> None:
        if sub.active and self._admits(sub, event_name, data):
            result = sub.handler(data)
            if result is not None and inspect.isawaitable(result):
                await result

    def _admits(self, sub: Subscription, event_name: str, data: Any) -> bool:
        """Ask the filter; a subscription for one call ends before the call, not after it."""
        if sub.filter_fn is not None and not sub.filter_fn(event_name, data):
            return False
        return not sub.once or self.unsubscribe(sub)

    async def _failed(self, sub: Subscription, event_name: str, data: Any,
            error: BaseException) -> None:
        """Log a failure with its traceback and publish it, once, and never about itself."""
        (self._logger or logger).error("Handler of %r for event %r failed", sub.component_name,
            event_name, exc_info=error)
        if event_name != HANDLER_FAILED and self.listens(HANDLER_FAILED):
            facts = data if isinstance(data, dict) else {}
            await self.publish(HANDLER_FAILED, {"event_name": event_name,
                "component_name": sub.component_name, "exception": repr(error),
                "seq": facts.get("seq"), "correlation_id": get_correlation_id()})

    def _order(self, event_name: str) -> tuple[Subscription, ...]:
        """Return the subscriptions that hear an event, in order of delivery."""
        subs, every = self._events.get(event_name), self._events.get("*")
        if subs is None:
            return () if every is None else self._ready.get("*") or self._order("*")
        both = [*subs, *every] if every and event_name != "*" else list(subs)
        both.sort(key=operator.attrgetter("priority", "number"))
        ready = self._ready[event_name] = tuple(both)
        return ready

    def _drop(self, sub: Subscription) -> None:
        subs = self._events[sub.event_name]
        del subs[sub]
        if not subs:
            del self._events[sub.event_name]
        sub.active = False
        self._changed(sub.event_name)

    def _changed(self, event_name: str) -> None:
        if event_name == "*":
            self._ready.clear()
        else:
            self._ready.pop(event_name, None)

    @staticmethod
    def _check_filter(filter_fn: Any) -> None:
        if not callable(filter_fn):
            raise ArgumentError(f"Not a function: {filter_fn!r}", why="a filter is called")
        if is_async(filter_fn):
            raise ArgumentError(f"Async filter: {filter_fn!r}",
                why="a coroutine is always true, so every event would pass",
                fix="write `def` instead of `async def`")

    def _nested(self) -> tuple[str, ...]:
        """Return the events whose publishes surround this call, the outermost first.

        They are read off the stack, so that a publish that is not nested pays nothing; the
        tasks of a concurrent publish start with a stack of their own and inherit the rest.
        """
        events = []
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _PUBLISH and frame.f_locals["self"] is self:
                events.append(frame.f_locals["event_name"])
            frame = frame.f_back
        return _nesting.get() + tuple(reversed(events))

    def _check_nesting(self, event_name: str) -> None:
        chain = self._nested()
        if len(chain) > MAX_NESTING + (event_name == HANDLER_FAILED):
            raise StateError(f"Events published within events, {len(chain)} deep: {event_name!r}",
                why="a handler publishes, and what it publishes leads back to it",
                fix="break the circle, or publish from a task of its own",
                chain=" -> ".join(chain[-8:]))


_PUBLISH = AsyncEventManager.publish.__code__
_nesting: ContextVar[tuple[str, ...]] = ContextVar("flexiflow_nesting", default=())


def _is_own_failure(error: BaseException) -> bool:
    """Tell a handler's failure from the cancellation of the task that publishes."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and hasattr(task, "cancelling") and not task.cancelling()
    return isinstance(error, Exception)


# --------------------------------------------------------------------------------------------
# 5. Guards and values
# --------------------------------------------------------------------------------------------
# What a config may ask and compute: comparisons, sums of two numbers, a list with one item
# more. Each is compiled once into a closure over a scope (message, data, component, state, id,
# now). Only dicts and lists are looked into; nothing is called, imported or evaluated.

MISSING: Any = type("MISSING", (), {"__repr__": lambda self: "nothing", "__slots__": ()})()
ROOTS = ("message", "data", "component", "state", "id", "now")


class MissingValue(Exception):
    """A value whose path leads nowhere; the argument is the path."""


def _steps(text: str) -> tuple[str, ...]:
    """Split a path like `items.0.price`; refuse what looks like code or hides attributes."""
    steps = tuple(text.split("."))
    for step in steps:
        if not step or step.startswith("__") or re.search(r"[()\[\]{}]", step):
            raise ConfigError(f"Not a path: {text!r}",
                why="a path names keys and list indexes, joined by dots; nothing is called",
                fix='write it like "message.items.0.price"')
        if step.isdecimal() and len(step) > 9:
            raise ConfigError(f"Index too large in path: {text!r}")
    return steps


def _walk(value: Any, steps: tuple[str, ...]) -> Any:
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
    return value


def _reader(root: str, steps: tuple[str, ...]) -> Callable[[Scope], Any]:
    """Compile a path into a function that returns what it leads to, or MISSING."""
    if not steps:
        return lambda scope: scope[root]
    if len(steps) == 1:
        (key,) = steps
        return lambda scope: scope[root].get(key, MISSING)
    return lambda scope: _walk(scope[root], steps)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$") and not value.startswith("$$")


def _plus(left: Any, right: Any) -> Any:
    return left + right


def _minus(left: Any, right: Any) -> Any:
    return left - right


def _append(left: Any, right: Any) -> Any:
    return [*left, right]


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"+": _plus, "-": _minus, "append": _append}


def _compile_operation(name: str, operands: Any) -> Callable[[Scope], Any]:
    if not isinstance(operands, list) or len(operands) != 2:
        raise ConfigError(f"{name!r} takes a list of two values: {operands!r}")
    for operand, wanted in zip(operands, (list, None) if name == "append" else ((), ())):
        fits = wanted is None or (isinstance(operand, list) if wanted is list
            else _is_number(operand))
        if not fits and not _is_reference(operand) and not isinstance(operand, dict):
            raise ConfigError(f"{name!r} cannot work on {operand!r}")
    left, right = map(compile_value, operands)
    operate = OPERATIONS[name]

    def value(scope: Scope) -> Any:
        a, b = left(scope), right(scope)
        if not (isinstance(a, list) if name == "append" else _is_number(a) and _is_number(b)):
            raise StateError(f"Cannot compute {{{name!r}: [{a!r}, {b!r}]}}", operands=operands)
        result = operate(a, b)
        if isinstance(result, float) and not math.isfinite(result):
            raise StateError(f"The result of {a!r} {name} {b!r} is not finite")
        return result

    return value


def _compile_reference(text: str) -> Callable[[Scope], Any]:
    root, _, rest = text[1:].partition(".")
    if root not in ROOTS or (rest and root not in ("message", "data")):
        raise ConfigError(f"Unknown value: {text!r}", fix=choose(text, ["$" + r for r in ROOTS]))
    read = _reader(root, _steps(rest) if rest else ())

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
    if isinstance(value, str) and value.startswith("$$"):
        literal = value[1:]
        return lambda scope: literal
    if _is_reference(value):
        return _compile_reference(value)
    if isinstance(value, dict):
        if len(value) == 1 and next(iter(value)) in OPERATIONS:
            return _compile_operation(*next(iter(value.items())))
        parts = [(key, compile_value(inner)) for key, inner in value.items()]
        return lambda scope: {key: inner(scope) for key, inner in parts}
    if isinstance(value, list):
        items = [compile_value(inner) for inner in value]
        return lambda scope: [inner(scope) for inner in items]
    return lambda scope: value


def same(left: Any, right: Any) -> bool:
    """Compare JSON values: 1 equals 1.0, and neither equals true."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def ordered(left: Any, right: Any) -> bool:
        comparable = (_is_number(left) and _is_number(right)) or (isinstance(left, str)
            and isinstance(right, str))
        return comparable and compare(left, right)

    return ordered


def _contains(whole: Any, part: Any) -> bool:
    if isinstance(whole, str):
        return isinstance(part, str) and part in whole
    if isinstance(whole, list):
        return any(same(part, one) for one in whole)
    return isinstance(whole, dict) and isinstance(part, str) and part in whole


def _not_in(part: Any, whole: Any) -> bool:
    return isinstance(whole, (str, list)) and not _contains(whole, part)


def _on_text(test: Callable[[str, str], bool]) -> Callable[[Any, Any], bool]:
    return lambda left, right: isinstance(left, str) and isinstance(right, str) and test(left, right)


# A value that is missing is compared by none of them: see `_compile_comparison`.
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": same,
    "!=": lambda left, right: not same(left, right),
    "<": _ordered(operator.lt),
    "<=": _ordered(operator.le),
    ">": _ordered(operator.gt),
    ">=": _ordered(operator.ge),
    "in": lambda part, whole: _contains(whole, part),
    "not_in": _not_in,
    "contains": _contains,
    "startswith": _on_text(str.startswith),
    "endswith": _on_text(str.endswith),
    "exists": lambda found, wanted: True,  # answered by `_compile_comparison` itself
}
# What an operand written in the config must be for the comparison ever to hold.
_OPERANDS: dict[str, tuple[type, ...]] = {**dict.fromkeys(("<", "<=", ">", ">="),
    (int, float, str)), **dict.fromkeys(("in", "not_in"), (list, str)),
    **dict.fromkeys(("startswith", "endswith"), (str,)), "exists": (bool,)}


class Guard:
    """A compiled guard. `holds(scope)` answers; `seen(scope)` tells what it compared."""

    __slots__ = ("holds", "seen")

    def __init__(self, holds: Callable[[Scope], bool], seen: Callable[[Scope], str]) -> None:
        self.holds, self.seen = holds, seen


def _shown(value: Any) -> str:
    text = repr(value) if value is MISSING else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _compile_comparison(path: str, op: str, wanted: Any) -> Guard:
    if op not in OPERATORS:
        raise ConfigError(f"Unknown operator: {op!r}",
            why=f"what stands under {path!r} is an object, so its keys are operators",
            fix=choose(op, OPERATORS) + '; to compare with an object write {"==": {...}}')
    kinds = _OPERANDS.get(op)
    if kinds and not _is_reference(wanted):
        if not isinstance(wanted, kinds) or (isinstance(wanted, bool) and bool not in kinds):
            raise ConfigError(f"{op!r} can never hold for {wanted!r}", why="it compares with "
                + " or ".join(kind.__name__ for kind in kinds))
    root, _, rest = path.partition(".")
    if root in ("message", "data") and rest:
        read = _reader(root, _steps(rest))
    else:
        read = _reader("message", _steps(path))
    operand, compare = compile_value(wanted), OPERATORS[op]

    def holds(scope: Scope) -> bool:
        found = read(scope)
        if found is MISSING:
            return False
        try:
            return compare(found, operand(scope))
        except MissingValue:
            return False

    def seen(scope: Scope) -> str:
        against = _shown(wanted)
        if _is_reference(wanted):
            with contextlib.suppress(MissingValue):
                against += f" = {_shown(operand(scope))}"
        return f"{path} {op} {against} (saw {_shown(read(scope))})"

    if op == "exists":
        return Guard(lambda scope: (read(scope) is not MISSING) is wanted, seen)
    if op == "==" and isinstance(wanted, str) and not wanted.startswith("$"):
        return Guard(lambda scope: read(scope) == wanted, seen)  # text equals nothing but text
    return Guard(holds, seen)


def _both(parts: list[Guard]) -> Guard:
    def seen(scope: Scope) -> str:
        false = [part for part in parts if not part.holds(scope)]
        return "; ".join(part.seen(scope) for part in false or parts)

    if len(parts) == 1:
        return parts[0]
    return Guard(lambda scope: all([part.holds(scope) for part in parts]), seen)


def _either(parts: list[Guard]) -> Guard:
    return Guard(lambda scope: any(part.holds(scope) for part in parts), lambda scope: "none of: "
        + " | ".join(part.seen(scope) for part in parts))


def _compile_predicate(path: str, predicate: Any) -> Guard:
    if not callable(predicate) or is_async(predicate):
        raise ConfigError(f"Not a plain function: {path!r}",
            why="a guard is asked in the middle of a decision, where nothing can be awaited",
            fix="write `def guard(message, component): return ...`")

    def holds(scope: Scope) -> bool:
        answer = predicate(scope["message"], scope["self"])
        if inspect.isawaitable(answer):
            raise StateError(f"Guard {path!r} returned an awaitable", fix="return true or false")
        return bool(answer)

    return Guard(holds, lambda scope: f"{path} said no")


def compile_guard(guard: Any, load: Callable[[str], Any]) -> Guard:
    """Compile a guard; `load` turns a dotted path into a function. Raise ConfigError if wrong.

    A missing or incomparable value makes every comparison false, except `exists`.
    """
    if isinstance(guard, str):
        return _compile_predicate(guard, load(guard))
    if not isinstance(guard, dict):
        raise ConfigError(f"Not a guard: {guard!r}", fix='write {"message.total": {">": 0}}')
    parts = []
    for key, wanted in guard.items():
        if key in ("all", "any"):
            if not isinstance(wanted, list) or not wanted:
                raise ConfigError(f"{key!r} takes a list of guards: {wanted!r}")
            inner = [compile_guard(one, load) for one in wanted]
            parts.append(_both(inner) if key == "all" else _either(inner))
        elif key == "not":
            parts.append(_negated(compile_guard(wanted, load)))
        elif isinstance(wanted, dict):
            if not wanted:
                raise ConfigError(f"No operator under {key!r}", fix=f"one of {list(OPERATORS)}")
            parts += [_compile_comparison(key, op, operand) for op, operand in wanted.items()]
        else:
            parts.append(_compile_comparison(key, "==", wanted))
    if not parts:
        raise ConfigError("Empty guard", why="it always holds", fix="leave it out")
    return _both(parts)


def _negated(inner: Guard) -> Guard:
    return Guard(lambda scope: not inner.holds(scope), lambda scope: f"not ({inner.seen(scope)})")


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


class DeclaredState(State):
    """A state of a config: it has no code, its component's rules do the work."""

    async def handle_message(self, message: dict[str, Any], component: Any) -> tuple[bool, State]:
        """Accept nothing: the rules are asked by the component."""
        return False, self


class _BuiltInState(State):
    """A state of the machine that 1.0.1 came with: `moves` maps a message type to a state."""

    moves: dict[str, str] = {}

    async def handle_message(self, message: dict[str, Any], component: Any) -> tuple[bool, State]:
        """Follow `moves`; `confirm` also wants the content "confirmed"."""
        kind = message.get("type")
        name = self.moves.get(kind) if isinstance(kind, str) else None
        if name is None or (kind == "confirm" and message.get("content") != "confirmed"):
            return False, self
        return True, DEFAULT_REGISTRY.create(name)


class InitialState(_BuiltInState):
    """Wait for `start`."""

    moves = {"start": "AwaitingConfirmation"}


class AwaitingConfirmation(_BuiltInState):
    """Wait for `confirm` with content "confirmed", or `cancel`."""

    moves = {"confirm": "ProcessingRequest", "cancel": "InitialState"}


class ProcessingRequest(_BuiltInState):
    """Wait for `complete` or `error`."""

    moves = {"complete": "InitialState", "error": "ErrorHandling"}


class ErrorHandling(_BuiltInState):
    """Wait for `acknowledge`."""

    moves = {"acknowledge": "InitialState"}


class StateRegistry:
    """State classes by name; what is not found here is looked up in `parent`."""

    __slots__ = ("_states", "_names", "_parent")

    def __init__(self, parent: StateRegistry | None = None) -> None:
        self._states: dict[str, type[State]] = {}
        self._names: dict[type[State], str] = {}
        self._parent = parent

    def register(self, name: str, state_cls: type[State]) -> None:
        """Let `name` stand for a State class; an earlier class of that name is replaced."""
        if not (isinstance(state_cls, type) and issubclass(state_cls, State)):
            raise StateError(f"Not a State class: {state_cls!r}", fix="inherit from State")
        self.unregister(name)
        self._states[name], self._names[state_cls] = state_cls, name

    def unregister(self, name: str) -> None:
        """Forget a name; a name that is not known is no error."""
        state_cls = self._states.pop(name, None)
        if state_cls is not None and self._names.get(state_cls) == name:
            del self._names[state_cls]

    def get(self, name: str) -> type[State] | None:
        """Return the class of a name, or None."""
        found = self._states.get(name)
        return self._parent.get(name) if found is None and self._parent else found

    def create(self, name: str) -> State:
        """Return a new state; raise StateError for an unknown name."""
        state_cls = self.get(name)
        if state_cls is None:
            raise StateError(f"Unknown state: {name!r}",
                why="no class is registered under this name", fix=choose(name, self.names()))
        return state_cls()

    def names(self) -> list[str]:
        """Return the known names in alphabetical order."""
        inherited = self._parent.names() if self._parent else []
        return sorted({*self._states, *inherited})

    def name_of(self, state: State) -> str:
        """Return the name that a state object goes by: its key here, else its class's name."""
        name = self._names.get(state.__class__)
        if name is None and self._parent is not None:
            return self._parent.name_of(state)
        return name or state.__class__.__name__


DEFAULT_REGISTRY = StateRegistry()
BUILT_IN = (InitialState, AwaitingConfirmation, ProcessingRequest, ErrorHandling)
for _state in BUILT_IN:
    DEFAULT_REGISTRY.register(_state.__name__, _state)


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
        turn: Any = _context.get()
        while turn is not None:
            if turn.machine is self and turn.live:
                return turn.state  # type: ignore[no-any-return]
            turn = turn.parent
        return self._state

    @current_state.setter
    def current_state(self, state: State) -> None:
        self._state = state

    async def handle_message(self, message: dict[str, Any], component: Any) -> bool:
        """Ask the current state alone, without rules, turn or commit; tell whether it accepted."""
        proceed, state = await ask(self._state, message, component)
        if proceed:
            self._state = state
        return proceed


async def ask(state: State, message: dict[str, Any], component: Any) -> tuple[bool, State]:
    """Return a state's answer to a message; raise StateError where it is not (bool, State)."""
    answer = await state.handle_message(message, component)
    if answer.__class__ is tuple and len(answer) == 2 and isinstance(answer[1], State):
        return answer
    if isinstance(answer, tuple) and len(answer) == 2 and not answer[0]:
        return False, state
    raise StateError(f"State {type(state).__name__} answered {answer!r}",
        why="an answer is a pair: accepted or not, and the next state",
        fix="return True, NextState() or return False, self")


def load_symbol(dotted_path: str, allow_imports: Sequence[str] | None = None) -> Any:
    """Import `package.module:name` and return what it names; raise ImportError_ if that fails.

    `allow_imports` lists the modules that may be imported, with all below them; None allows all.
    A failure inside the module is chained as the cause, SystemExit too.
    """
    module_name, colon, symbol = (part.strip() for part in dotted_path.partition(":"))
    if not colon or not module_name or not symbol:
        raise ImportError_(f"Not a dotted path: {dotted_path!r}",
            fix="write it like 'package.module:name'")
    if module_name.split(".")[0] == "flexiflow":  # this file, whatever it is called here
        module_name = __name__
    _check_allowed(module_name, dotted_path, allow_imports)
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name
        raise ImportError_(f"Module not found: {module_name!r}" if missing
            else f"Cannot import {module_name!r}", why=f"{type(error).__name__}: {error}",
            fix="check the spelling and sys.path" if missing else "mend the module",
            dotted_path=dotted_path) from error
    try:
        found = operator.attrgetter(symbol)(module)
    except AttributeError as error:
        raise ImportError_(f"No {symbol!r} in module {module_name!r}",
            fix=choose(symbol, [name for name in vars(module) if not name.startswith("_")]),
            dotted_path=dotted_path) from error
    # A module that is allowed may have imported what is not.
    _check_allowed(getattr(found, "__module__", None) or module_name, dotted_path, allow_imports)
    return found


def _check_allowed(module: str, dotted_path: str, allowed: Sequence[str] | None) -> None:
    if allowed is None or module == __name__:
        return
    if not any((module + ".").startswith(prefix.rstrip(".") + ".") for prefix in allowed if prefix):
        raise ImportError_(f"Import not allowed: {dotted_path!r}",
            why=f"the code of {module!r} may not be run here",
            fix=f"allow it with allow_imports=({module!r},) or --allow-import {module}")


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
                why=f"{type(error).__name__}: {error}") from error
    lacks = [member for member in ("provides", "transitions", "depends_on")
        if not callable(getattr(found, member, None))] + ["name"] * (
        not isinstance(getattr(found, "name", None), str))
    if lacks:
        raise ConfigError(f"Not a StatePack: {pack!r}", why=f"it has no {', '.join(lacks)}",
            fix="inherit from StatePack")
    return found  # type: ignore[no-any-return]


def load_packs(*, states: Mapping[str, type[State]] | None = None, packs: Sequence[Any]
        | None = None, builtin_keys: Iterable[str] | None = None) -> list[StatePack]:
    """Return packs, checked against each other: no state twice, none named like a built-in.

    `packs` lists dotted paths and objects; or `states` is wrapped into one MappingPack.
    """
    if states is not None and packs is not None:
        raise ConfigError("Both states and packs given", fix="wrap the states into a MappingPack")
    loaded = [MappingPack(states)] if states is not None else [load_pack(p) for p in packs or ()]
    problem = next(pack_collisions(loaded, set(builtin_keys or ())), None)
    if problem:
        raise problem
    return list(loaded)


def pack_collisions(packs: Sequence[StatePack], builtin: set[str]) -> Iterator[ConfigError]:
    """Yield an error for each state that two packs provide or that hides a built-in one."""
    owners: dict[str, str] = {}
    for pack in packs:
        for key in pack.provides():
            if key in owners:
                both = f"{owners[key]!r} and {pack.name!r}"
                yield ConfigError(f"State {key!r} is provided twice", why=f"by {both}")
            if key in builtin:
                yield ConfigError(f"State {key!r} hides a built-in one",
                    why=f"pack {pack.name!r} provides it")
            owners.setdefault(key, pack.name)


def collect_provided_keys(packs: Sequence[StatePack]) -> dict[str, str]:
    """Return which pack provides each state: state name -> pack name."""
    provided: dict[str, str] = {}
    for pack in packs:
        for key in pack.provides():
            provided.setdefault(key, pack.name)
    return provided


# --------------------------------------------------------------------------------------------
# 7. Rules: compile and decide
# --------------------------------------------------------------------------------------------
# A definition is a config compiled once, however many components run it. `decide` is pure: it
# finds the rule that a message fires and works out everything that follows from it. It never
# awaits, reads the clock, opens a file or logs; asked twice, it answers the same.

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_DELAY = 100 * 366 * 86400  # a hundred years


def seconds(value: Any) -> float:
    """Return a delay in seconds: a number, or "90s", "15m", "2h", "7d"; else raise StateError."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    delay = float(found[1]) * _UNITS[found[2]] if found else value
    if not _is_number(delay) or not 0 <= delay <= MAX_DELAY:
        raise StateError(f"Not a delay: {value!r}", fix='seconds, or like "90s", "15m", "2h", "7d"')
    return float(delay)


class Outgoing:
    """A message that a turn sends: to whom, what, after how many seconds, under which id."""

    __slots__ = ("to", "message", "delay", "id")

    def __init__(self, to: str, message: dict[str, Any], delay: float = 0.0, id: str
            | None = None) -> None:
        self.to, self.message, self.delay, self.id = to, message, delay, id


@dataclass(frozen=True)
class Effects:
    """What happens beside the change of state, in a rule or at a state's entry or exit."""

    assign: tuple[tuple[str, Callable[[Scope], Any]], ...] = ()
    sends: tuple[Callable[[Scope], Outgoing], ...] = ()
    emits: tuple[tuple[str, Callable[[Scope], Any] | None], ...] = ()
    actions: tuple[Callable[..., Any], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.assign or self.sends or self.emits or self.actions)


@dataclass(eq=False)
class Node:
    """A state of a definition."""

    name: str
    parent: Node | None = None
    initial: str | None = None  # the child that is entered with it
    final: bool = False
    entry: Effects = Effects()
    exit: Effects = Effects()
    cls: type[State] = DeclaredState
    description: str = ""
    instance: State | None = None  # of a declared state, one for all components

    @property
    def declared(self) -> bool:
        """Whether rules alone answer for it; else its class is asked last."""
        return issubclass(self.cls, DeclaredState)

    def create(self, attributes: dict[str, Any] | None = None) -> State:
        """Return a state object, new or with the attributes that one had."""
        if attributes is None:
            return self.instance or self.cls()
        state = self.cls.__new__(self.cls)
        vars(state).update(fresh(attributes))
        return state

    def lineage(self) -> Iterator[Node]:
        """Yield the state and what surrounds it, innermost first."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(eq=False)
class Rule:
    """A rule that executes."""

    number: int  # its place in the config's list
    sources: tuple[str, ...]  # states, or "*"
    on: tuple[str, ...] = ()  # message types; empty for a timer
    after: Callable[[Scope], Any] | None = None
    guard: Guard | None = None
    to: str | None = None
    reenter: bool = False
    effects: Effects = Effects()
    text: dict[str, Any] = field(default_factory=dict)  # as written


@dataclass(eq=False)
class Passage:
    """A way from one state to another: what is left and entered, in which order, and the effects."""

    node: Node  # the state at the end
    exits: tuple[str, ...] = ()
    enters: tuple[str, ...] = ()
    steps: tuple[tuple[str, Effects], ...] = ()  # (value of $state, effects), if there are any
    timers: tuple[tuple[Rule, str], ...] = ()  # (rule, owning state) that start here
    completes: bool = False
    busy: bool = False  # whether the queue has anything to do with it

    def __post_init__(self) -> None:
        self.active = tuple(node.name for node in self.node.lineage())[::-1]


@dataclass(eq=False)
class Candidate:
    """A rule that may take a message in a certain state, and where it would lead."""

    rule: Rule
    passage: Passage

    def __post_init__(self) -> None:
        self.guard = self.rule.guard


class Plan:
    """What a message does: made by `decide`, carried out by a turn."""

    reason: str | None = None
    candidate: Candidate | None = None
    state: State | None = None  # the object afterwards; the turn sets it
    sends: Sequence[Outgoing] = ()
    emits: Sequence[tuple[str, Any]] = ()
    actions: Sequence[Callable[..., Any]] = ()
    timers: Sequence[tuple[float, str, int]] = ()  # (due, owning state, rule number)
    refused: Sequence[Candidate] = ()  # asked before, their guards false

    def __init__(self, outcome: str, data: dict[str, Any], passage: Passage | None = None) -> None:
        self.outcome, self.data, self.passage = outcome, data, passage


class Definition:
    """States and rules, compiled. `source` is the config without name and data."""

    def __init__(self, source: dict[str, Any], nodes: dict[str, Node], rules: list[Rule],
            initial: str, registry: StateRegistry, retry: RetryConfig, has_code: bool) -> None:
        self.source, self.nodes, self.rules, self.initial = source, nodes, rules, initial
        self.registry, self.retry, self.has_code = registry, retry, has_code
        self.types = frozenset(kind for rule in rules for kind in rule.on)
        self.by_number = {rule.number: rule for rule in rules}
        # Where a class answers, or "*" is taken, no message type is unknown.
        self.open = "*" in self.types or any(not node.declared for node in nodes.values())
        self.has_timers = any(rule.after for rule in rules)
        self._by_source: dict[str, list[Rule]] = {}
        for rule in rules:
            for source_name in rule.sources:
                self._by_source.setdefault(source_name, []).append(rule)
        self._candidates: dict[tuple[str, str], tuple[Candidate, ...]] = {}
        for node in nodes.values():
            node.instance = node.cls() if node.declared else None
        self.birth = self.passage(None, "*", initial)

    @functools.cached_property
    def text(self) -> str:
        """The source as canonical JSON: equal definitions have equal texts."""
        return write_json(self.source, "config")

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of the text, by which the store keeps it once."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def candidates(self, leaf: str, kind: str) -> tuple[Candidate, ...]:
        """Return the rules that may take a message, in the order in which they are asked.

        The leaf's first, then its ancestors', then those from "*"; in each, the exact type
        before "*", and file order.
        """
        key = (leaf, kind if kind in self.types else "*")
        found = self._candidates.get(key)
        if found is None:
            found = self._candidates[key] = tuple(
                self.candidate(leaf, rule, source) for source in self.sources(leaf)
                for wanted in dict.fromkeys((key[1], "*"))
                for rule in self.rules_of(source) if wanted in rule.on)
        return found

    def candidate(self, leaf: str, rule: Rule, source: str) -> Candidate:
        """Return a rule with its way from `leaf`; `source` is the state it was found on."""
        if rule.to is None:
            steps = ((leaf, rule.effects),) if rule.effects else ()
            return Candidate(rule, Passage(self.nodes[leaf], (), (), steps, busy=bool(steps)))
        return Candidate(rule, self.passage(leaf, source, rule.to, rule))

    def passage(
        self, leaf: str | None, source: str, target: str, rule: Rule | None = None
    ) -> Passage:
        """Return the way from `leaf` (None: from outside) to `target`.

        Left is what stands within the innermost state that holds both source and target and is
        neither (SCXML's domain of a transition); a descendant is entered without leaving the
        source, unless the rule says `reenter`.
        """
        outer = [node.name for node in self.nodes[source].lineage()] if source != "*" else []
        inner = [node.name for node in self.nodes[target].lineage()]
        if source in inner[1:] and not (rule and rule.reenter):
            domain = outer
        else:
            domain = [name for name in outer[1:] if name in inner[1:]]
        left = [] if leaf is None else list(self.nodes[leaf].lineage())
        exits = [node for node in left if node.name not in domain]
        entered = [self.nodes[name] for name in reversed(inner) if name not in domain]
        while entered[-1].initial is not None:
            entered.append(self.nodes[entered[-1].initial])
        end, begin = entered[-1].name, leaf or entered[-1].name
        steps = [(begin, node.exit) for node in exits]
        steps += [(begin, rule.effects)] if rule else []
        steps += [(end, node.entry) for node in entered]
        owners = [node.name for node in entered] + ["*"] * (leaf is None)
        timers = tuple((timer, name) for name in owners for timer in self.timers(name))
        completes = entered[-1].final and entered[-1].parent is None
        return Passage(
            entered[-1], tuple(node.name for node in exits), tuple(node.name for node in entered),
            tuple(step for step in steps if step[1]), timers, completes,
            busy=bool(timers or completes or any(effects.sends for _, effects in steps)
                      or any(self.timers(node.name) for node in exits)))

    def timers(self, owner: str) -> list[Rule]:
        """Return the timer rules of a state, or of "*"."""
        return [rule for rule in self.rules_of(owner) if rule.after]

    def sources(self, leaf: str) -> list[str]:
        """Return where rules for a leaf are found, in the order in which they are asked."""
        return [*(node.name for node in self.nodes[leaf].lineage()), "*"]

    def rules_of(self, source: str) -> list[Rule]:
        """Return the rules that stand on a state, or on "*"."""
        return self._by_source.get(source, [])


def decide(definition: Definition, leaf: str, scope: Scope, timer: Candidate | None = None) -> Plan:
    """Return what a message, or the firing of a timer, does in state `leaf`.

    `scope` holds `message`, `data`, `component` (the name), `state`, `id`, `now` (epoch seconds)
    and `self` (what Python guards are shown). The outcome is moved, stayed, blocked, ignored,
    unknown, or "class" where the leaf's class is to be asked. A guard that raises, and an effect
    whose value is missing, raise: no later candidate is tried.
    """
    kind = scope["message"]["type"]
    refused = []
    for candidate in (timer,) if timer else definition.candidates(leaf, kind):
        guard = candidate.guard
        if guard is None or guard.holds(scope):
            plan = Plan("stayed" if candidate.rule.to is None else "moved", scope["data"],
                candidate.passage)
            plan.candidate = candidate
            if refused:
                plan.refused = refused
            if candidate.passage.steps or candidate.passage.timers:
                follow(plan, scope)
            return plan
        refused.append(candidate)
    if timer is None and not definition.nodes[leaf].declared:
        outcome = "class"
    elif refused:
        outcome = "blocked"
    else:
        outcome = "ignored" if definition.open or kind in definition.types else "unknown"
    plan = Plan(outcome, scope["data"])
    plan.refused = refused
    if outcome == "blocked":
        plan.reason = "; ".join(f"rules[{one.rule.number}] wants {one.guard.seen(scope)}"
            for one in refused if one.guard)
    elif outcome != "class":
        plan.reason = f"{leaf} does not take {kind!r}"
    return plan


def follow(plan: Plan, scope: Scope) -> None:
    """Work out the effects along a plan's passage: all values first, in order, then the actions.

    Within one rule, entry or exit all values are seen before any is set; what it sends and
    emits sees the data after. `scope` is used up: its data and state are changed.
    """
    passage = plan.passage
    if passage is None:
        return
    sends, emits, actions = [], [], []
    try:
        for state, effects in passage.steps:
            scope["state"] = state
            if effects.assign:
                values = [(key, value(scope)) for key, value in effects.assign]
                scope["data"] = {**scope["data"], **dict(values)}
            sends += [send(scope) for send in effects.sends]
            emits += [(name, value and value(scope)) for name, value in effects.emits]
            actions += effects.actions
        scope["state"] = passage.node.name
        plan.timers = [
            (scope["now"] + seconds(rule.after(scope)), owner, rule.number)  # type: ignore[misc]
            for rule, owner in passage.timers
        ]
    except MissingValue as error:
        raise StateError(f"No value at {error}",
            why=f"an effect needs it, on the way to {passage.node.name!r}",
            fix="guard the rule with {\"exists\": true}, or give the value in the config's data",
            component=scope["component"]) from None
    plan.data, plan.sends, plan.emits, plan.actions = scope["data"], sends, emits, actions


# --------------------------------------------------------------------------------------------
# 8. Config: one walk of problems; load and explain
# --------------------------------------------------------------------------------------------
# One walk over a config yields everything that is wrong with it and compiles what is right.
# Loading raises the first error it yields, `explain` lists them all: they cannot disagree.

_TEXT, _LIST, _OBJECT, _NUMBER = (str,), (list,), (dict,), (int, float)
_EFFECT_KEYS: dict[str, tuple[type, ...]] = {"assign": _OBJECT, "action": (str, list),
    "emit": (str, dict, list), "send": (dict, list)}
# The keys that mean something, with what may stand under them; () is any JSON.
KEYS: dict[str, dict[str, tuple[type, ...]]] = {"config": {"name": _TEXT, "description": _TEXT,
    "version": (), "$schema": _TEXT, "initial_state": _TEXT, "states": _OBJECT, "rules": _LIST,
    "data": _OBJECT, "retry": _OBJECT, "packs": _LIST, "initial_state_resolution": _LIST},
    "state": {"description": _TEXT, "initial": _TEXT, "final": (bool,), "entry": _OBJECT,
    "exit": _OBJECT}, "rule": {"from": (str, list), "on": (str, list), "after": (str, int, float),
    "guard": (dict, str), "to": _TEXT, "reenter": (bool,), "description": _TEXT, **_EFFECT_KEYS},
    "effects": _EFFECT_KEYS, "send": {"to": _TEXT, "type": _TEXT, "after": (str, int, float),
    "id": _TEXT, "with": _OBJECT}, "emit": {"name": _TEXT, "with": ()},
    "retry": {"max_attempts": (int,), "base_delay": _NUMBER, "max_delay": _NUMBER,
    "backoff": _NUMBER, "jitter": _NUMBER}}
_KIND_NAMES = {str: "text", list: "a list", dict: "an object", bool: "true or false",
    int: "a number", float: "a number"}
ENGINE_EVENTS = frozenset(
    "engine.component.registered component.message.received state.changed event.handler.failed "
    "component.completed message.dead rules.updated".split())
QUEUE_RETRY = RetryConfig(max_attempts=5, base_delay=0.2, max_delay=60.0)
BUILT_IN_NAMES = [state.__name__ for state in BUILT_IN]


@dataclass
class Diagnostic:
    """Something wrong, or at least odd, with a config."""

    level: str  # "error" or "warning"
    what: str  # begins with the place in the config
    why: str | None = None
    fix: str | None = None
    context: dict[str, Any] = field(default_factory=dict)
    error: FlexiFlowError | None = field(default=None, repr=False, compare=False)

    def format(self) -> str:
        """Return it in the shape of an error, its level in front."""
        error = FlexiFlowError(self.what, why=self.why, fix=self.fix, **self.context)
        return f"[{self.level.upper()}] {error}"


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


def one_edit(word: str, other: str) -> bool:
    """Tell whether one letter more, less, other or swapped makes one word the other."""
    if abs(len(word) - len(other)) > 1 or word == other:
        return False
    same_head = len(os.path.commonprefix([word, other]))
    a, b = word[same_head:], other[same_head:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[1::-1] == b[:2] and a[2:] == b[2:])


def _typo_of(key: str, known: Iterable[str]) -> str | None:
    return next((one for one in known if one_edit(key.lower(), one) or key.lower() == one), None)


def _diagnose(place: str, error: FlexiFlowError, level: str = "error") -> Diagnostic:
    """Turn an error into a diagnostic with a place."""
    context = dict(error.context.items)
    if place:
        context["at"] = place
    what = f"{place}: {error.what}" if place else error.what
    return Diagnostic(level, what, error.why, error.fix, context, error)


class _Walk:
    """One look at a config; `problems` must be used up before the rest is read."""

    def __init__(self, config: Any, imports: bool = True, allow_imports: Sequence[str]
            | None = None, registry: StateRegistry = DEFAULT_REGISTRY) -> None:
        self.config = config
        self.imports, self.allow_imports = imports, allow_imports
        self.unchecked: list[str] = []  # dotted paths not imported
        self.nodes: dict[str, Node] = {}
        self.rules: list[Rule] = []
        self.packs: list[PackInfo] = []
        self.providers: dict[str, str] = {}  # state -> pack
        self.states: list[StateResolution] = []
        self.policy = ["packs", "builtin"]
        self.initial = "InitialState"
        self.retry = QUEUE_RETRY
        self.registry = StateRegistry(registry)
        self.has_code = False

    def problems(self) -> Iterator[Diagnostic]:
        """Yield everything wrong with the config, compiling as far as that is possible."""
        if not isinstance(self.config, dict):
            got = _KIND_NAMES.get(type(self.config), type(self.config).__name__)
            yield _diagnose("", ConfigError("A config is an object", why=f"this is {got}"))
            return
        try:
            write_json(self.config, "config")
        except ValueError as error:
            yield _diagnose("", ConfigError("The config is not JSON", why=str(error)))
            return
        yield from self._keys("config", self.config, "")
        if not self.config.get("name"):
            yield _diagnose("", ConfigError("No 'name'", fix='add "name": "order" to the config'))
        yield from self._packs()
        yield from self._states()
        yield from self._initial()
        yield from self._retry()
        yield from self._rules()
        yield from self._shadowed()
        if not self._get("rules", list):
            yield _diagnose("rules", ConfigError("No rules defined"), "warning")

    def definition(self) -> Definition:
        """Return what was compiled; only for a config without errors."""
        source = {key: self.config[key] for key in self.config if key not in ("name", "data")}
        return Definition(fresh(source), self.nodes, self.rules, self.initial, self.registry,
            self.retry, self.has_code)

    def _get(self, key: str, kind: type) -> Any:
        """Return a top-level value, empty where it is missing or of the wrong kind."""
        value = self.config.get(key)
        return value if isinstance(value, kind) else kind()

    def _keys(self, kind: str, value: dict[str, Any], place: str) -> Iterator[Diagnostic]:
        """Check the keys of an object against KEYS."""
        known = KEYS[kind]
        for key, inner in value.items():
            at = f"{place}.{key}" if place else key
            if key not in known:
                typo = _typo_of(key, known)
                if kind == "rule" and not typo:
                    continue
                if typo:
                    error = ConfigError(f"Unknown key: {key!r}", fix=f"did you mean {typo!r}?")
                    yield _diagnose(at, error)
                elif not key.startswith("x-"):
                    strict = kind not in ("config", "state")
                    error = ConfigError(f"Unknown key: {key!r}", fix=choose(key, known))
                    yield _diagnose(at, error, "error" if strict else "warning")
            elif known[key] and not isinstance(inner, known[key]) and inner is not None:
                yield self._wrong_kind(at, known[key], inner)
            elif isinstance(inner, bool) and known[key] and bool not in known[key]:
                yield self._wrong_kind(at, known[key], inner)

    @staticmethod
    def _wrong_kind(place: str, kinds: tuple[type, ...], value: Any) -> Diagnostic:
        wanted = " or ".join(dict.fromkeys(_KIND_NAMES[kind] for kind in kinds))
        return _diagnose(place, ConfigError(f"Not {wanted}: {value!r}"))

    def _load(self, path: str) -> Any:
        """Import a dotted path, or note it as unchecked and return a function that does nothing."""
        self.has_code = True
        if self.imports:
            return load_symbol(path, self.allow_imports)
        self.unchecked.append(path)
        return lambda message, component: None

    def _packs(self) -> Iterator[Diagnostic]:
        policy = self.config.get("initial_state_resolution")
        if isinstance(policy, list):
            if sorted(map(str, policy)) != ["builtin", "packs"]:
                error = ConfigError(f"Not an order of resolution: {policy!r}",
                    fix='["packs", "builtin"] or ["builtin", "packs"]')
                yield _diagnose("initial_state_resolution", error)
            else:
                self.policy = policy
        packs: list[StatePack] = []
        for index, path in enumerate(self._get("packs", list)):
            self.has_code = True
            if isinstance(path, str) and not self.imports:
                self.unchecked.append(path)
                continue
            try:
                packs.append(load_pack(path, self.allow_imports))
            except FlexiFlowError as error:
                yield _diagnose(f"packs[{index}]", error)
        try:
            for pack in packs:
                provided, needed = pack.provides(), sorted(pack.depends_on())
                edges = list(pack.transitions())
                self.packs.append(PackInfo(pack.name, sorted(provided), edges, needed))
                for key, spec in provided.items():
                    if key not in self.providers:
                        yield from self._add_class(f"packs.{pack.name}", key, spec.state_class)
                    self.providers.setdefault(key, pack.name)
            for collision in pack_collisions(packs, set(BUILT_IN_NAMES)):
                yield _diagnose("packs", collision)
        except Exception as error:
            broken = ConfigError("A pack does not work", why=f"{type(error).__name__}: {error}")
            yield _diagnose("packs", broken)
        provided_here = {*self.providers, *BUILT_IN_NAMES, *self._get("states", dict)}
        for info in self.packs:
            for lack in info.depends_on:
                if lack not in provided_here:
                    needs = ConfigError(f"Pack {info.name!r} needs a state {lack!r}")
                    yield _diagnose("packs", needs, "warning")

    def _add_class(self, place: str, key: str, cls: Any) -> Iterator[Diagnostic]:
        """Add a state that is a class."""
        other = next((node.name for node in self.nodes.values() if node.cls is cls), None)
        if not (isinstance(cls, type) and issubclass(cls, State)):
            got = f"it is {cls!r}"
            error = ConfigError("Not a State class", why=got, fix="inherit from State", state=key)
            yield _diagnose(place, error)
        elif other is not None:
            error = ConfigError(f"One class for two states: {other!r} and {key!r}",
                why="a saved state could not be told from the other",
                fix="make a subclass for one of them")
            yield _diagnose(place, error)
        else:
            self.nodes[key] = Node(key, cls=cls)
            self.registry.register(key, cls)

    def _states(self) -> Iterator[Diagnostic]:
        states = self._get("states", dict)
        for key, value in states.items():
            place = f"states.{key}"
            if not key or key == "*" or "\0" in key:
                yield _diagnose(place, ConfigError(f"Not a name for a state: {key!r}"))
            elif key in self.nodes:
                yield _diagnose(place, ConfigError(f"State {key!r} is provided by a pack too"))
            elif isinstance(value, str):
                yield from self._class_state(place, key, value)
            elif isinstance(value, dict):
                yield from self._keys("state", value, place)
                cls = type(key, (DeclaredState,), {"__module__": __name__, "__slots__": ()})
                self.nodes[key] = Node(key, final=value.get("final") is True, cls=cls,
                    description=str(value.get("description") or ""))
                self.registry.register(key, cls)
                self.states.append(StateResolution(key, None, True, True))
            else:
                yield self._wrong_kind(place, (dict, str), value)
        for key, value in states.items():
            if key in self.nodes:
                yield from self._family(key, value)

    def _class_state(self, place: str, key: str, path: str) -> Iterator[Diagnostic]:
        """Resolve the dotted path of a state."""
        self.has_code = True
        resolution = StateResolution(key, path, False, False)
        self.states.append(resolution)
        try:
            if ":" not in path:
                raise ImportError_(f"Not a dotted path: {path!r}",
                    fix="write it like 'package.module:Class'")
            if not self.imports:
                self.unchecked.append(path)
                self.nodes[key] = Node(key, cls=State)
                return
            cls = load_symbol(path, self.allow_imports)
        except FlexiFlowError as error:
            resolution.error = error.what
            yield _diagnose(place, error)
            return
        resolution.resolved = True
        for problem in self._add_class(place, key, cls):
            resolution.error = problem.what
            yield problem
        resolution.is_state_subclass = isinstance(cls, type) and issubclass(cls, State)

    def _family(self, key: str, value: Any) -> Iterator[Diagnostic]:
        """Find a state's parent, its initial child, and what happens at its entry and exit."""
        node, place = self.nodes[key], f"states.{key}"
        above = key
        while "." in above and node.parent is None:
            above = above.rpartition(".")[0]
            node.parent = self.nodes.get(above)
        if node.parent and not node.parent.declared:
            error = ConfigError(f"{above!r} is a class, so it has no children")
            yield _diagnose(place, error)
        if not isinstance(value, dict):
            return
        children = [name for name in self.nodes if name.startswith(key + ".")]
        initial = value.get("initial")
        if children and initial not in children:
            fix = choose(initial or "", children)
            what = "No 'initial' child" if initial is None else f"Unknown child: {initial!r}"
            yield _diagnose(f"{place}.initial", ConfigError(what, fix=fix))
        elif initial is not None and not children:
            yield _diagnose(f"{place}.initial", ConfigError(f"{key!r} has no children"))
        elif children:
            node.initial = initial
            if node.final:
                yield _diagnose(place, ConfigError("A final state has no children"))
        for edge in ("entry", "exit"):
            effects = value.get(edge)
            if isinstance(effects, dict):
                yield from self._keys("effects", effects, f"{place}.{edge}")
                compiled, problems = self._effects(effects, f"{place}.{edge}")
                setattr(node, edge, compiled)
                yield from problems

    def _initial(self) -> Iterator[Diagnostic]:
        name = self.config.get("initial_state")
        if not isinstance(name, str):
            name = "InitialState"
        if ":" in name and name not in self.nodes:
            before = set(self.nodes)
            yield from self._class_state("initial_state", _last_name(name), name)
            name = next(iter(set(self.nodes) - before), name)
            if name in before or name not in self.nodes:
                return
        elif self.policy[0] == "builtin" and name in BUILT_IN_NAMES:
            self.nodes.pop(name, None)
        if self._known(name):
            self.initial = name
        else:
            yield _diagnose("initial_state", ConfigError(f"Unknown state: {name!r}",
                fix=choose(name, self._all_names())))

    def _all_names(self) -> list[str]:
        return [*self.nodes, *BUILT_IN_NAMES]

    def _known(self, name: str) -> bool:
        """Tell whether there is such a state, adding a registered one the first time it is named."""
        if name in self.nodes:
            return True
        cls = self.registry.get(name)
        if cls is None:
            return False
        if name in BUILT_IN_NAMES:  # one leads to the others
            self.nodes.update((state.__name__, Node(state.__name__, cls=state))
                for state in BUILT_IN if state.__name__ not in self.nodes)
        else:
            self.has_code = True
            self.nodes[name] = Node(name, cls=cls)
        return True

    def _retry(self) -> Iterator[Diagnostic]:
        settings = self._get("retry", dict)
        bad = list(self._keys("retry", settings, "retry"))
        yield from bad
        if settings and not bad:
            try:
                self.retry = dataclasses.replace(QUEUE_RETRY, **settings)
            except ArgumentError as error:
                yield _diagnose("retry", error)

    def _rules(self) -> Iterator[Diagnostic]:
        executing = set(KEYS["rule"]) - {"description"}
        for number, rule in enumerate(self._get("rules", list)):
            place = f"rules[{number}]"
            if not isinstance(rule, dict):
                yield self._wrong_kind(place, _OBJECT, rule)
            elif executing & rule.keys():
                yield from self._rule(number, rule, place)
            else:
                for key in rule:
                    typo = _typo_of(key, executing)
                    if typo:
                        note = ConfigError(f"Unknown key: {key!r}",
                            why="without a key of the engine a rule is a note and does nothing",
                            fix=f"did you mean {typo!r}?")
                        yield _diagnose(f"{place}.{key}", note, "warning")

    def _rule(self, number: int, rule: dict[str, Any], place: str) -> Iterator[Diagnostic]:
        """Compile a rule; it is kept only if nothing is wrong with it."""
        bad = list(self._keys("rule", rule, place))
        sources, problems = self._names(rule.get("from", "*"), f"{place}.from")
        bad += [problem for problem in problems]
        for source in sources:
            if source != "*" and not self._known(source):
                error = ConfigError(f"Unknown state: {source!r}", fix=choose(source, self._all_names()))
                bad.append(_diagnose(f"{place}.from", error))
        target = rule.get("to")
        if isinstance(target, str) and not self._known(target):
            error = ConfigError(f"Unknown state: {target!r}", fix=choose(target, self._all_names()))
            bad.append(_diagnose(f"{place}.to", error))
        kinds, problems = self._names(rule["on"], f"{place}.on") if "on" in rule else ((), [])
        bad += problems
        if ("on" in rule) == ("after" in rule):
            both = "both 'on' and 'after'" if "on" in rule else "neither 'on' nor 'after'"
            error = ConfigError(f"A rule with {both}", fix="one rule for a message, one for a timer")
            bad.append(_diagnose(place, error))
        after = guard = None
        try:
            if "after" in rule:
                after = self._delay(rule["after"])
        except FlexiFlowError as error:
            bad.append(_diagnose(f"{place}.after", error))
        try:
            if rule.get("guard") is not None:
                guard = compile_guard(rule["guard"], self._load)
        except FlexiFlowError as error:
            bad.append(_diagnose(f"{place}.guard", error))
        effects, problems = self._effects(rule, place)
        bad += problems
        yield from bad
        if not any(problem.level == "error" for problem in bad):
            self.rules.append(
                Rule(
                    number, sources, kinds, after, guard, target, rule.get("reenter") is True,
                    effects, rule,
                )  # fmt: skip
            )

    @staticmethod
    def _names(value: Any, place: str) -> tuple[tuple[str, ...], list[Diagnostic]]:
        """Return one name or a list of them as a tuple."""
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and names and all(isinstance(n, str) and n for n in names):
            return tuple(dict.fromkeys(names)), []
        error = ConfigError(f"Not a name or a list of names: {value!r}")
        return (), [_diagnose(place, error)]

    @staticmethod
    def _delay(value: Any) -> Callable[[Scope], Any]:
        if not _is_reference(value):
            seconds(value)
        return compile_value(value)

    def _effects(self, value: dict[str, Any], place: str) -> tuple[Effects, list[Diagnostic]]:
        """Compile what a rule, entry or exit does beside the change of state."""
        bad: list[Diagnostic] = []
        found: dict[str, list[Any]] = {"assign": [], "send": [], "emit": [], "action": []}
        assign = value.get("assign")
        parts = [("assign", f".{key}", (key, inner)) for key, inner in (assign.items()
            if isinstance(assign, dict) else ())]
        for key in ("send", "emit", "action"):
            inner = value.get(key)
            listed = isinstance(inner, list)
            for index, one in enumerate(inner if listed else [] if inner is None else [inner]):
                parts.append((key, f"[{index}]" * listed, one))
        for key, suffix, part in parts:
            at = f"{place}.{key}{suffix}"
            try:
                found[key].append(getattr(self, f"_compile_{key}")(part))
            except FlexiFlowError as error:
                bad.append(_diagnose(at, error))
        return Effects(*(tuple(one) for one in found.values())), bad

    @staticmethod
    def _compile_assign(part: tuple[str, Any]) -> tuple[str, Callable[[Scope], Any]]:
        return part[0], compile_value(part[1])

    def _compile_action(self, path: Any) -> Callable[..., Any]:
        if not isinstance(path, str):
            raise ConfigError(f"Not a dotted path: {path!r}")
        action = self._load(path)
        if not callable(action):
            raise ConfigError(f"Not a function: {path!r}", why=f"it is {action!r}")
        return action  # type: ignore[no-any-return]

    def _strictly(self, kind: str, value: Any, needs: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"Not an object: {value!r}")
        for problem in self._keys(kind, value, ""):
            raise ConfigError(problem.what, why=problem.why, fix=problem.fix)
        for key in needs:
            if not value.get(key):
                raise ConfigError(f"No {key!r} in {value!r}")

    def _compile_emit(self, part: Any) -> tuple[str, Callable[[Scope], Any] | None]:
        event = {"name": part} if isinstance(part, str) else part
        self._strictly("emit", event, ("name",))
        if event["name"] in ENGINE_EVENTS or event["name"] == "*":
            raise ConfigError(f"An event of the engine's own: {event['name']!r}",
                fix="emit under another name")
        return event["name"], compile_value(event["with"]) if "with" in event else None

    def _compile_send(self, part: Any) -> Callable[[Scope], Outgoing]:
        self._strictly("send", part, ("to", "type"))
        envelope = {"type", "id", "correlation_id", "component"} & set(part.get("with") or ())
        if envelope:
            raise ConfigError(f"{sorted(envelope)[0]!r} cannot stand in 'with'")
        to, kind = compile_value(part["to"]), compile_value(part["type"])
        payload, delay = compile_value(part.get("with") or {}), self._delay(part.get("after", 0))
        id = compile_value(part.get("id"))

        def send(scope: Scope) -> Outgoing:
            message = {"type": kind(scope), **payload(scope)}
            return Outgoing(to(scope), message, seconds(delay(scope)), id(scope))

        return send

    def _shadowed(self) -> Iterator[Diagnostic]:
        """Find the rules that never fire because an earlier one takes each of their messages."""
        taken: dict[tuple[str, str], int] = {}
        for rule in self.rules:
            pairs = [(source, kind) for source in rule.sources for kind in rule.on]
            owners = {taken[pair] for pair in pairs if pair in taken}
            if pairs and all(pair in taken for pair in pairs):
                error = ConfigError("This rule can never fire",
                    why=f"rules[{min(owners)}] takes its messages before and has no guard",
                    fix="give that one a guard, or put this one before it")
                yield _diagnose(f"rules[{rule.number}]", error)
            if rule.guard is None:
                for pair in pairs:
                    taken.setdefault(pair, rule.number)


def _last_name(dotted_path: str) -> str:
    return dotted_path.rpartition(":")[2].strip().rpartition(".")[2] or dotted_path


@dataclass(frozen=True)
class ComponentConfig:
    """A checked config. Made by ConfigLoader, or by hand from a name, rules and a state."""

    name: str
    rules: list[dict[str, Any]]
    initial_state: str = "InitialState"
    data: dict[str, Any] = field(default_factory=dict)
    definition: Definition | None = field(default=None, repr=False, compare=False)


class MissingConfig(ConfigError, FileNotFoundError):
    """A config file that is not there; also a FileNotFoundError."""


def read_config(path: str | os.PathLike[str]) -> Any:
    """Return the value in a config file; raise ConfigError if it cannot be read as JSON."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON + 1)
    except FileNotFoundError as error:
        raise MissingConfig(f"No config file: {os.fspath(path)!r}", fix="check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"Cannot read config: {os.fspath(path)!r}", why=str(error)) from error
    if os.fspath(path).lower().endswith((".yaml", ".yml")):
        return _read_yaml(content, os.fspath(path))
    return read_json(content, os.fspath(path), ConfigError)


def _read_yaml(content: bytes, path: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            f"YAML cannot be read here: {path!r}",
            why="PyYAML is not installed, and FlexiFlow itself reads JSON",
            fix="where it is: python -c 'import sys,json,yaml; "
            f"print(json.dumps(yaml.safe_load(sys.stdin),indent=2))' < {path} > config.json",
        ) from error
    try:
        return yaml.safe_load(content) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"Not valid YAML: {path!r}", why=str(error)) from error


class ConfigLoader:
    """Read and check configs."""

    @staticmethod
    def load_component_config(config: str | os.PathLike[str] | dict[str, Any] | ComponentConfig, *,
            allow_imports: Sequence[str] | None = None) -> ComponentConfig:
        """Return a checked config from a path or a dict; raise the first error found in it.

        State classes it names are added to DEFAULT_REGISTRY where their names are free there.
        """
        if isinstance(config, ComponentConfig):
            if config.definition is not None:
                return config
            config = {"name": config.name, "rules": config.rules, "data": config.data,
                "initial_state": config.initial_state}
        content = config if isinstance(config, dict) else read_config(config)
        walk = _Walk(content, allow_imports=allow_imports)
        errors = [problem for problem in walk.problems() if problem.level == "error"]
        if errors:
            raise _as_error(errors, None if content is config else os.fspath(config))  # type: ignore[arg-type]
        for name, node in walk.nodes.items():
            if not node.declared and DEFAULT_REGISTRY.get(name) is None:
                DEFAULT_REGISTRY.register(name, node.cls)
        return ComponentConfig(content["name"], fresh(content.get("rules") or []), walk.initial,
            fresh(content.get("data") or {}), walk.definition())

    @staticmethod
    def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
        """Return the object in a config file, JSON or YAML, unchecked."""
        content = read_config(path)
        if not isinstance(content, dict):
            raise ConfigError(f"A config is an object: {os.fspath(path)!r}")
        return content

    @staticmethod
    def load_rules(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Return the rules in a file: a list, or an object with `rules`."""
        content = read_config(path)
        rules = content.get("rules") or [] if isinstance(content, dict) else content
        if not isinstance(rules, list):
            raise ConfigError(f"No list of rules in {os.fspath(path)!r}", fix='{"rules": [...]}')
        return rules


def _as_error(errors: list[Diagnostic], path: str | None) -> FlexiFlowError:
    """Return the first of the errors, ready to be raised, that names the others."""
    error = errors[0].error or ConfigError(errors[0].what)
    error.what = errors[0].what
    if path is not None:
        error.context.add("config", path)
    if len(errors) > 1:
        error.context.add("also", [other.what for other in errors[1:6]])
    return error


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

    def format(self) -> str:
        """Return the explanation as text."""
        lines = ["FlexiFlow Config Explanation", "=" * 40, f"Source: {self.config_path}", ""]
        lines += ["Component:", f"  name: {self.name or '(missing)'}",
            f"  initial_state: {self.initial_state or '(missing)'}",
            f"  rules: {self.rules_count} rule(s)", ""]
        if self.packs:
            lines.append("Packs:")
            for pack in self.packs:
                lines.append(f"  {pack.name}:")
                lines.append(f"    provides: {', '.join(pack.provided_keys) or '(none)'}")
                if pack.transitions:
                    lines.append(f"    transitions: {len(pack.transitions)} defined")
                if pack.depends_on:
                    lines.append(f"    depends_on: {', '.join(pack.depends_on)}")
            lines += ["", f"Pack order: {' -> '.join(self.pack_order)}", ""]
        lines += [f"Resolution policy: {' -> '.join(self.initial_state_resolution)}", ""]
        lines += ["States:", *self._state_lines()]
        lines += [f"  Built-in: {', '.join(sorted(self.builtin_states))}", ""]
        if self.unchecked:
            lines += ["Not checked (imports are off):", *(f"  {p}" for p in self.unchecked), ""]
        for title, mark, problems in (("Warnings:", "WARN", self.warnings),
                ("Errors:", "ERROR", self.errors)):
            if problems:
                lines += [title, *_problem_lines(mark, problems), ""]
        lines.append("Status: OK - config will load" if self.is_valid
            else f"Status: INVALID - {len(self.errors)} error(s) found")
        return "\n".join(map(printable, lines))

    def _state_lines(self) -> Iterator[str]:
        if not self.states and not self.state_providers:
            yield "  (no custom states)"
        for one in sorted(self.states, key=operator.attrgetter("key")):
            good = "OK" if one.resolved and one.is_state_subclass else "??"
            yield f"  {good} {one.key}" + (f": {one.dotted_path}" if one.dotted_path else "")
            if one.error:
                yield f"      Error: {one.error}"
        for key in sorted(self.state_providers):
            yield f"  OK {key} (from {self.state_providers[key]})"


def _problem_lines(mark: str, problems: list[Diagnostic]) -> Iterator[str]:
    for problem in problems:
        yield f"  {mark} {problem.what}"
        if problem.why:
            yield f"    Why: {problem.why}"
        if problem.fix:
            yield f"    Fix: {problem.fix}"


def explain(config: str | os.PathLike[str] | dict[str, Any], *, imports: bool = True,
        allow_imports: Sequence[str] | None = None) -> ConfigExplanation:
    """Say what a config means and whether it will load; never raises for what is wrong with it.

    Dotted paths are imported, as loading will; `imports=False` runs none of the config's code
    and lists what was therefore not checked.
    """
    result = ConfigExplanation("(dict)" if isinstance(config, dict) else os.fspath(config))
    result.builtin_states = list(BUILT_IN_NAMES)
    try:
        content = config if isinstance(config, dict) else read_config(config)
    except ConfigError as error:
        result.errors.append(_diagnose("", error))
        return result
    walk = _Walk(content, imports, allow_imports)
    for problem in walk.problems():
        (result.errors if problem.level == "error" else result.warnings).append(problem)
    if isinstance(content, dict):
        name, rules = content.get("name"), content.get("rules")
        result.name = name if isinstance(name, str) else None
        result.rules_count = len(rules) if isinstance(rules, list) else 0
        result.initial_state = walk.initial
    result.states, result.unchecked = walk.states, walk.unchecked
    result.initial_state_resolution = walk.policy
    result.packs, result.state_providers = walk.packs, walk.providers
    result.pack_order = [pack.name for pack in walk.packs]
    if result.is_valid:
        result.definition = walk.definition()
    return result


# --------------------------------------------------------------------------------------------
# 9. Snapshots: JSON file, SQLite history
# --------------------------------------------------------------------------------------------
# 1.0.1's way to save a component: one JSON file, or a growing table in the caller's database.
# A file is the old one or the new one, never half; what comes back is what was saved, or an
# error. An engine with a store (section 10) needs none of this.


@dataclass(frozen=True)
class ComponentSnapshot:
    """A component at one moment; everything in it is JSON."""

    name: str
    current_state: str
    rules: list[dict[str, Any]]
    metadata: dict[str, Any]  # the caller's own, carried along
    data: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)  # of a class-based state's object
    id: int | None = field(default=None, compare=False)  # of the row it was loaded from


_SNAPSHOT_FIELDS: dict[str, type] = {"name": str, "current_state": str, "rules": list,
    "metadata": dict, "data": dict, "attributes": dict}


def take_snapshot(component: Any, metadata: dict[str, Any] | None = None) -> ComponentSnapshot:
    """Return a component as a snapshot; `metadata` defaults to what it was restored with."""
    state = component.state_machine.current_state
    return ComponentSnapshot(component.name, component.state_machine.registry.name_of(state),
        fresh(component.rules), dict(metadata if metadata is not None else component.metadata
        or {}), component.data, dict(getattr(state, "__dict__", {})))


def _snapshot_text(snapshot: ComponentSnapshot) -> str:
    """Return a snapshot as JSON with a checksum over the rest; raise PersistenceError if it is not."""
    content = {name: getattr(snapshot, name) for name in _SNAPSHOT_FIELDS}
    text = _written(content, f"snapshot of {snapshot.name}")
    return f'{{"checksum":{checksum(text)},{text[1:]}'


def _snapshot_from(text: str | bytes, source: str, id: int | None = None) -> ComponentSnapshot:
    content = read_json(text, source, PersistenceError)
    if not isinstance(content, dict):
        raise PersistenceError(f"Not an object: {source}")
    crc = content.pop("checksum", None)
    if crc is not None and checksum(_encode(content)) != crc:
        raise PersistenceError(f"Damaged snapshot: {source}", why="its checksum does not fit",
            fix="use an older one")
    fields: dict[str, Any] = {}
    for name, kind in _SNAPSHOT_FIELDS.items():
        value = content.get(name, kind())
        if not isinstance(value, kind) or (kind is str and not value):
            raise PersistenceError(f"No good {name!r} in {source}", why=f"it is {value!r}")
        fields[name] = value
    return ComponentSnapshot(**fields, id=id)


def save_component(component: Any, path: str | os.PathLike[str], metadata: dict[str, Any]
        | None = None) -> None:
    """Save a component as a JSON file, durably; a crash leaves the old file or the new one."""
    write_file(path, _snapshot_text(take_snapshot(component, metadata)) + "\n")


def load_snapshot(path: str | os.PathLike[str]) -> ComponentSnapshot:
    """Read a snapshot file; raise PersistenceError (a FileNotFoundError too, if it is not there)."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return _snapshot_from(file.read(2 * MAX_JSON), name)
    except FileNotFoundError as error:
        raise MissingSnapshot(f"No snapshot file: {name!r}", fix="check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FlexiFlowError):
            raise
        raise PersistenceError(f"Cannot read snapshot: {name!r}", why=str(error)) from error


def restore_component(snapshot: ComponentSnapshot, engine: Any, registry: StateRegistry
        | None = None) -> Any:
    """Make a component from a snapshot and register it; raise StateError for an unknown state."""
    known = DEFAULT_REGISTRY if registry is None else registry
    state = known.create(snapshot.current_state)
    for name, value in snapshot.attributes.items():
        setattr(state, name, fresh(value))
    return engine.restore(snapshot, StateMachine(state, known))


_swept: set[str] = set()  # folders in which this process has looked for leftovers


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by another, durably: write aside, fsync, rename, fsync the folder."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    aside = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        _sweep(folder)
        mode = os.stat(target).st_mode & 0o777 if os.path.exists(target) else 0o600
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
        if os.name != "nt":  # there, a folder cannot be opened
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except (OSError, ValueError) as error:
        raise PersistenceError(f"Cannot write {os.fspath(path)!r}", why=str(error),
            fix="the old file is untouched") from error


def _sweep(folder: str) -> None:
    """Remove what crashed processes left aside, once for each folder."""
    if folder in _swept:
        return
    _swept.add(folder)
    for entry in os.scandir(folder):
        if re.fullmatch(r"\..+\.\d+\.tmp", entry.name):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > 60:
                    os.unlink(entry.path)


_SNAPSHOT_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS flexiflow_snapshots(id INTEGER PRIMARY KEY,"
    " component_name TEXT NOT NULL, created_at TEXT NOT NULL, current_state TEXT,"
    " snapshot_json TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS flexiflow_snapshots_component ON flexiflow_snapshots(component_name)",
)


def save_snapshot_sqlite(conn: sqlite3.Connection, snapshot: ComponentSnapshot, *,
        created_at: datetime.datetime | None = None, expect: int | None = None) -> int:
    """Append a snapshot to the caller's database and return its id.

    It is committed, unless the caller has a transaction open: then that decides. With `expect`,
    the id of the snapshot this one follows, a newer one by somebody else is a PersistenceError.
    """
    if created_at is None:
        created_at = datetime.datetime.now(datetime.timezone.utc)
    values = (snapshot.name, created_at.isoformat(), snapshot.current_state,
        _snapshot_text(snapshot))
    insert = (
        "INSERT INTO flexiflow_snapshots(component_name, created_at, current_state, snapshot_json)"
        " SELECT ?,?,?,?")
    given: tuple[Any, ...] = values
    if expect is not None:
        insert += (" WHERE ?=(SELECT MAX(id) FROM flexiflow_snapshots WHERE component_name=?)")
        given = (*values, expect, snapshot.name)
    with _in_callers_database(conn):
        try:
            cursor = conn.execute(insert, given)
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error) and "no column" not in str(error):
                raise
            _make_snapshot_table(conn)
            cursor = conn.execute(insert, given)
        if cursor.rowcount == 0:
            raise PersistenceError(f"A newer snapshot of {snapshot.name!r} exists than {expect}",
                why="somebody else has saved meanwhile",
                fix="load it, and apply your change to that")
        return cursor.lastrowid or 0


def _make_snapshot_table(conn: sqlite3.Connection) -> None:
    """Make the table, or bring 1.0.1's up to date."""
    for statement in _SNAPSHOT_SCHEMA:
        conn.execute(statement)
    columns = [row[1] for row in conn.execute("PRAGMA table_info(flexiflow_snapshots)")]
    if "current_state" not in columns:
        conn.execute("ALTER TABLE flexiflow_snapshots ADD COLUMN current_state TEXT")


@contextlib.contextmanager
def _in_callers_database(conn: sqlite3.Connection) -> Iterator[None]:
    """Commit what is done within, but never what the caller has begun."""
    begun = conn.in_transaction
    try:
        yield
        if not begun:
            conn.commit()
    except BaseException as error:
        if not begun and not isinstance(error, sqlite3.ProgrammingError):
            with contextlib.suppress(sqlite3.Error):
                conn.rollback()
        if isinstance(error, sqlite3.Error):
            raise PersistenceError("The database failed", why=str(error)) from error
        raise


def _snapshot_rows(conn: sqlite3.Connection, sql: str, values: Sequence[Any]) -> list[Any]:
    """Read from a table that may not be there; nothing is created for it."""
    try:
        return conn.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        if "no such table" in str(error):
            return []
        raise PersistenceError("The database failed", why=str(error)) from error


def load_latest_snapshot_sqlite(conn: sqlite3.Connection,
        component_name: str) -> ComponentSnapshot | None:
    """Return the snapshot that was saved last, whatever the clock said; None if there is none."""
    rows = _snapshot_rows(conn,
        "SELECT id, snapshot_json FROM flexiflow_snapshots WHERE component_name=?"
        " ORDER BY id DESC LIMIT 1", (component_name,))
    return _snapshot_from(rows[0][1], f"snapshot of {component_name!r}", rows[0][0]) if rows else None


def list_snapshots_sqlite(conn: sqlite3.Connection, component_name: str, *,
        limit: int = 10) -> list[dict[str, Any]]:
    """Return `id`, `created_at` and `current_state` of the latest snapshots, newest first."""
    try:
        rows = conn.execute(
            "SELECT id, created_at, current_state FROM flexiflow_snapshots WHERE component_name=?"
            " ORDER BY id DESC LIMIT ?", (component_name, limit)).fetchall()
    except sqlite3.OperationalError as error:
        if "no such column" not in str(error):
            rows = _snapshot_rows(conn, "SELECT 1 FROM flexiflow_snapshots WHERE ?", (0,))
        else:  # 1.0.1's table, which nobody has written to since
            rows = _snapshot_rows(conn,
                "SELECT id, created_at, NULL FROM flexiflow_snapshots WHERE component_name=?"
                " ORDER BY id DESC LIMIT ?", (component_name, limit))
    return [{"id": id, "created_at": at, "current_state": state or _state_in(conn, id)} for id, at,
        state in rows]


def _state_in(conn: sqlite3.Connection, id: int) -> str:
    """Read the state out of a row of 1.0.1."""
    ((text,),) = conn.execute("SELECT snapshot_json FROM flexiflow_snapshots WHERE id=?", (id,))
    try:
        return _snapshot_from(text, f"snapshot {id}").current_state
    except PersistenceError:
        return "invalid"


def prune_snapshots_sqlite(conn: sqlite3.Connection, component_name: str, *,
        keep_last: int = 10) -> int:
    """Delete all but the `keep_last` snapshots that were saved last; return how many went."""
    if keep_last.__class__ is not int or keep_last < 1:
        raise ArgumentError(f"keep_last is a whole number from 1: {keep_last!r}")
    if not _snapshot_rows(conn, "SELECT 1 FROM flexiflow_snapshots LIMIT 1", ()):
        return 0
    with _in_callers_database(conn):
        return conn.execute("DELETE FROM flexiflow_snapshots WHERE component_name=? AND id <="
            " (SELECT id FROM flexiflow_snapshots WHERE component_name=?"
            " ORDER BY id DESC LIMIT 1 OFFSET ?)", (component_name, component_name,
            keep_last)).rowcount


# The names that these have in 1.0.1's module extras.persist_sqlite.
save_snapshot = save_snapshot_sqlite
load_latest_snapshot = load_latest_snapshot_sqlite
list_snapshots = list_snapshots_sqlite
prune_snapshots = prune_snapshots_sqlite


# --------------------------------------------------------------------------------------------
# 10. Store: schema, the one write, views
# --------------------------------------------------------------------------------------------
# One SQLite file keeps every component, its journal and its queue. Every change goes through
# `write`: a check and rows, in one transaction with whatever else is ready; what `write` has
# returned is on disk. Every row that is believed later carries a checksum, so that a damaged
# file gives the same answer or an error. Nothing awaits within a transaction.

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE flexiflow_definitions(hash TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
-- seq: version, and number of the last journal row; since: active state -> time of its entry
CREATE TABLE flexiflow_components(name TEXT PRIMARY KEY, definition TEXT NOT NULL,
    state TEXT NOT NULL, attributes TEXT, data TEXT NOT NULL, seq INTEGER NOT NULL,
    since TEXT NOT NULL, completed REAL, crc INTEGER NOT NULL) WITHOUT ROWID;
-- receipt: [outcome, from, to, reason]; data: where it changed; prior: crc of the row before
CREATE TABLE flexiflow_journal(number INTEGER PRIMARY KEY, component TEXT NOT NULL,
    seq INTEGER NOT NULL, message_id TEXT NOT NULL, correlation_id TEXT, message TEXT NOT NULL,
    receipt TEXT NOT NULL, data TEXT, time REAL NOT NULL, prior INTEGER NOT NULL,
    crc INTEGER NOT NULL);
CREATE UNIQUE INDEX flexiflow_journal_seq ON flexiflow_journal(component, seq);
CREATE UNIQUE INDEX flexiflow_journal_id ON flexiflow_journal(component, message_id);
-- queue, timers, dead letters. place: order of delivery, once it is due; state, rule: of a timer;
-- owner, lease: who is at work on it, and until when; dead: when it was given up
CREATE TABLE flexiflow_messages(number INTEGER PRIMARY KEY, component TEXT NOT NULL,
    message_id TEXT NOT NULL, correlation_id TEXT, message TEXT NOT NULL, due REAL NOT NULL,
    state TEXT, rule INTEGER, place INTEGER, owner TEXT, lease REAL,
    attempts INTEGER NOT NULL DEFAULT 0, error TEXT, sent REAL NOT NULL, dead REAL,
    crc INTEGER NOT NULL);
CREATE UNIQUE INDEX flexiflow_messages_id ON flexiflow_messages(component, message_id);
CREATE INDEX flexiflow_messages_due ON flexiflow_messages(due) WHERE dead IS NULL;
"""
BUSY_LIMIT = 30.0  # seconds that a write waits for other processes
SLOW_COMMIT = 0.001  # seconds; a mean above sends COMMIT to a thread
_HEAD = ("definition", "state", "attributes", "data", "seq", "since", "completed")
_ENTRY = ("component", "seq", "id", "correlation_id", "message", "receipt", "data", "time")
_MESSAGE = ("component", "id", "correlation_id", "message", "due", "state", "rule")


def checksum(*parts: Any, start: int = 0) -> int:
    """Return the CRC-32 of the parts' texts; `start` chains it to another one."""
    return zlib.crc32("\0".join(map(str, parts)).encode("utf-8"), start)


def _is_busy(error: Exception) -> bool:
    return "locked" in str(error) or "busy" in str(error)


class SQLiteStore:
    """A store in one SQLite file, for one process and one event loop; others open it as well.

    `synchronous` is "FULL" (an acknowledged message survives a power cut) or "NORMAL" (it
    survives a killed process). The file is made at the first use, unless `readonly`.
    """

    def __init__(
        self, path: str | os.PathLike[str], synchronous: str = "FULL", *, readonly: bool = False
    ) -> None:
        if synchronous not in ("FULL", "NORMAL"):
            raise ArgumentError(f"Unknown synchronous: {synchronous!r}", fix="FULL or NORMAL")
        self.path, self.synchronous, self.readonly = os.fspath(path), synchronous, readonly
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[Any] = []  # writes: namespaces of check, rows, done, future, answer
        self._flushing = False
        self._busy_since: float | None = None
        self._mean = 0.0  # seconds that a commit takes of late

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path!r}>"

    def close(self) -> None:
        """Close the file; a write that still waits fails."""
        connection, self._connection = self._connection, None
        if connection is not None and self._process == os.getpid():
            connection.close()
        waiting, self._waiting = self._waiting, []
        self._settle(waiting, PersistenceError(f"Store {self.path!r} was closed"))

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, opened at first use."""
        if self._process != os.getpid():
            # Closing or using it here would break the parent's locks (sqlite.org/howtocorrupt).
            raise PersistenceError(
                f"Store {self.path!r} was opened before a fork",
                fix="make an engine of its own in each process")
        if self._connection is None:
            with self._translated():
                self._connection = self._open()
        return self._connection

    # ---- the one write

    async def write(
        self, check: Callable[..., Any] | None, rows: Sequence[Row],
        done: Callable[[], None] | None = None
    ) -> Any:
        """Carry out `rows` in a transaction, if `check(execute)` returns None; return its answer.

        Writes that are ready in one pass of the loop share a transaction. `done()` is called as
        soon as the commit is known, also when the caller has been cancelled meanwhile. A write
        that is cancelled before its transaction begins is not carried out. Raises
        PersistenceError; after a failed COMMIT the outcome is unknown, and the same message id
        may be sent again.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop and self._waiting:
            raise PersistenceError(f"Store {self.path!r} is in use by another event loop")
        self._loop = loop
        write = types.SimpleNamespace(
            check=check, rows=rows, done=done, future=loop.create_future(), answer=None, error=None)
        self._waiting.append(write)
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush, loop)
        return await write.future

    def write_now(self, rows: Sequence[Row]) -> None:
        """Carry out `rows` at once: for a store in memory, where nobody else can be writing."""
        with self._translated(), self.db:
            self.db.execute("BEGIN")
            for sql, values in rows:
                self.db.execute(sql, values)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Commit all that waits, or come back when the file is free."""
        batch = [write for write in self._waiting if not write.future.done()]
        try:
            if batch and not self._begin():
                loop.call_later(random.uniform(0.0005, 0.02), self._flush, loop)
                return
        except Exception as error:
            self._settle(batch, error)
            batch = []
        self._waiting = []
        if not batch:
            self._flushing = False
            return
        self._carry_out(batch)
        if self._mean > SLOW_COMMIT:
            with contextlib.suppress(RuntimeError):  # no threads here: commit in the loop
                future = loop.run_in_executor(None, self._commit)
                future.add_done_callback(lambda done: self._after(loop, batch, done.result()))
                return
        self._after(loop, batch, self._commit())

    def _begin(self) -> bool:
        """Take the write lock, or return False while another process has it.

        SQLite's own way of waiting starves writers; ours is random, from 0.5 to 20 ms.
        """
        db = self.db
        now = time.monotonic()
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            self._busy_since = self._busy_since or now
            if _is_busy(error) and now - self._busy_since <= BUSY_LIMIT:
                return False
            self._busy_since = None
            raise
        self._busy_since = None
        return True

    def _carry_out(self, batch: list[Any]) -> None:
        """Execute every write of the batch; one that fails is left out, and the rest done again."""
        execute = self.db.execute
        while True:
            try:
                for write in batch:
                    if write.error is None:
                        write.answer = write.check(execute) if write.check else None
                        for sql, values in write.rows if write.answer is None else ():
                            execute(sql, values)
                return
            except Exception as error:
                write.error = error
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                execute("ROLLBACK")
            try:
                execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                for write in batch:
                    write.error = write.error or error
                return

    def _commit(self) -> Exception | None:
        """Commit, and return what went wrong; may run in a thread."""
        start = time.monotonic()
        try:
            # Without WAL, a reader can hold up a commit; the transaction stays open.
            if self.db.in_transaction:
                self._insist(self.db, "COMMIT")
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            return error
        self._mean += 0.1 * (time.monotonic() - start - self._mean)
        return None

    def _after(
        self, loop: asyncio.AbstractEventLoop, batch: list[Any], failure: Exception | None
    ) -> None:
        self._settle(batch, failure, unknown=True)
        if self._waiting:
            loop.call_soon(self._flush, loop)
        else:
            self._flushing = False

    def _settle(
        self, batch: list[Any], failure: Exception | None, unknown: bool = False
    ) -> None:
        """Tell every write of a batch how it went."""
        for write in batch:
            error = write.error or failure
            if error is None and write.answer is None and write.done is not None:
                write.done()
            if write.future.done():
                continue
            if error is None:
                write.future.set_result(write.answer)
            elif isinstance(error, FlexiFlowError):
                write.future.set_exception(error)
            else:
                write.future.set_exception(self._translate(error, unknown and not write.error))

    # ---- opening and failing

    def _open(self) -> sqlite3.Connection:
        if self.readonly:
            return self._open_readonly()
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "journal_mode=WAL"):
                self._insist(db, f"PRAGMA {pragma}")
            self._insist(db, f"PRAGMA synchronous={self.synchronous}")
            if not self._version(db):
                self._insist(db, "BEGIN IMMEDIATE")
                if not self._version(db):  # nobody was quicker
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                self._insist(db, "COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def _open_readonly(self) -> sqlite3.Connection:
        """Open for reading; a file in WAL mode on a read-only medium can only be opened frozen."""
        if not os.path.exists(self.path):
            raise PersistenceError(
                f"No store: {self.path!r}", fix="register a component first, or check the path")
        uri = "file:" + "".join(
            char if char.isascii() and (char.isalnum() or char in "/._-") else f"%{ord(char):02X}"
            for char in os.fsencode(os.path.abspath(self.path)).decode("latin-1"))
        for options in ("?mode=ro", "?mode=ro&immutable=1"):
            db = sqlite3.connect(uri + options, timeout=BUSY_LIMIT, isolation_level=None, uri=True)
            try:
                if self._version(db):
                    return db
                raise PersistenceError(f"Not a store: {self.path!r}", fix="register a component")
            except BaseException as error:
                db.close()
                if "unable to open" not in str(error) or "immutable" in options:
                    raise
        raise AssertionError("unreachable")

    def _version(self, db: sqlite3.Connection) -> int:
        """Return the schema's version, 0 where there is none yet; refuse a newer one."""
        (version,) = self._insist(db, "PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise PersistenceError(
                f"Store {self.path!r} was written by a newer FlexiFlow",
                why=f"its schema is version {version}, this file knows {SCHEMA_VERSION}",
                fix="use the newer flexiflow.py")
        return int(version)

    @staticmethod
    def _insist(db: sqlite3.Connection, sql: str) -> Any:
        """Execute a statement, waiting for other processes; return its first row."""
        start = time.monotonic()
        while True:
            try:
                return db.execute(sql).fetchone()
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() - start > BUSY_LIMIT:
                    raise
                time.sleep(random.uniform(0.0005, 0.02))

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what SQLite raises into PersistenceError."""
        try:
            yield
        except FlexiFlowError:
            raise
        except Exception as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception, unknown: bool = False) -> PersistenceError:
        fixes = {
            "full": "free some space on the disk; nothing that was acknowledged is lost",
            "readonly": "make the file and its folder writable",
            "locked": "another process holds the file; try again",
            "malformed": "the file is damaged; restore a backup",
            "not a database": "this is no SQLite file, or a damaged one",
            "unable to open": "check the path, and that the folder is writable",
            "No module named": "this Python has no SQLite; use FlexiFlowEngine(store=None)"}
        fix = next((fix for sign, fix in fixes.items() if sign in str(error)), None)
        if unknown:
            fix = "the outcome is unknown: repeat with the same id" + (f"; {fix}" if fix else "")
        translated = PersistenceError(
            f"Store {self.path!r} failed", why=f"{type(error).__name__}: {error}", fix=fix)
        translated.__cause__ = error
        return translated

    def damaged(self, what: str, **where: Any) -> PersistenceError:
        """Return the error for a row that is not as it was written."""
        return PersistenceError(
            f"Store {self.path!r} is damaged: {what}", why="a checksum does not fit",
            fix="restore a backup", **where)

    # ---- views: what is read, each row checked

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return what a SELECT finds."""
        with self._translated():
            return self.db.execute(sql, values).fetchall()

    def names(self) -> list[str]:
        """Return the names of all components."""
        rows = self.rows("SELECT name FROM flexiflow_components ORDER BY name")
        return [row[0] for row in rows]

    def head(self, name: str) -> dict[str, Any] | None:
        """Return a component's row as a dict, with `chain`, the crc of its last journal row."""
        # One statement reads one state of the file: another process may commit in between two.
        last = "(SELECT %s FROM flexiflow_journal WHERE component=name ORDER BY seq DESC LIMIT 1)"
        found = self.rows(
            f"SELECT {', '.join(_HEAD)}, crc, {last % 'seq'}, {last % 'crc'}"
            " FROM flexiflow_components WHERE name=?", (name,))
        if not found:
            if self.rows("SELECT 1 FROM flexiflow_journal WHERE component=? LIMIT 1", (name,)):
                if not self.rows("SELECT 1 FROM flexiflow_components WHERE name=?", (name,)):
                    raise self.damaged(f"component {name!r} has only a history", component=name)
                return self.head(name)  # made in this moment
            return None
        *values, crc, last_seq, chain = found[0]
        head = dict(zip(_HEAD, values), name=name, chain=chain)
        if chain is None or checksum(name, *values, start=chain) != crc or head["seq"] != last_seq:
            raise self.damaged(f"component {name!r}", component=name)
        for key in ("data", "since", "attributes"):
            head[key + "_text"] = head[key]
            head[key] = None if head[key] is None else json.loads(head[key])
        return head

    def definition(self, hash: str) -> dict[str, Any]:
        """Return the source of a stored definition."""
        found = self.rows("SELECT body FROM flexiflow_definitions WHERE hash=?", (hash,))
        if not found or hashlib.sha256(found[0][0].encode()).hexdigest() != hash:
            raise self.damaged(f"definition {hash[:12]}")
        return json.loads(found[0][0])  # type: ignore[no-any-return]

    def journal(
        self, component: str | None = None, limit: int | None = None, where: str = "1",
        values: Sequence[Any] = ()
    ) -> list[dict[str, Any]]:
        """Return journal rows as dicts, the newest first."""
        sql = (
            "SELECT component, seq, message_id, correlation_id, message, receipt, data, time, prior,"
            f" crc, number FROM flexiflow_journal WHERE {where}"
            + " AND component=?" * (component is not None)
            + f" ORDER BY {'number' if component is None else 'seq'} DESC LIMIT ?")
        own = () if component is None else (component,)
        entries = []
        for *fields, prior, crc, number in self.rows(
            sql, (*values, *own, -1 if limit is None else limit)
        ):
            if checksum(*fields, start=prior) != crc:
                raise self.damaged(f"journal row {number}", component=fields[0], seq=fields[1])
            entry = dict(zip(_ENTRY, fields), number=number, message=json.loads(fields[4]))
            outcome, before, after, reason = json.loads(entry.pop("receipt"))
            entry.update(outcome=outcome, from_state=before, to_state=after, reason=reason)
            entry["data"] = None if entry["data"] is None else json.loads(entry["data"])
            if entries and entries[-1]["component"] == entry["component"] and where == "1":
                if (entries[-1]["seq"] - 1, earlier) != (entry["seq"], crc) and component:
                    raise self.damaged(f"history of {component!r} has a gap", seq=entry["seq"])
            earlier = prior
            entries.append(entry)
        return entries

    def message_row(
        self, component: str, id: str, correlation_id: str | None, text: str, due: float,
        sent: float, state: str | None = None, rule: int | None = None
    ) -> Row:
        """Return the INSERT of a message; an id that the queue holds already adds nothing."""
        values = (component, id, correlation_id, text, due, state, rule)
        place = "(SELECT COALESCE(MAX(place), 0) + 1 FROM flexiflow_messages)"
        return (
            "INSERT OR IGNORE INTO flexiflow_messages(component, message_id, correlation_id,"
            " message, due, state, rule, sent, crc, place) VALUES (?,?,?,?,?,?,?,?,?,"
            + (place if state is None and due <= sent else "NULL") + ")", (*values, sent, checksum(*values)))

    def messages(self, where: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return rows of the queue as dicts, unchecked and with the message as text."""
        keys = (*_MESSAGE, "number", "place", "attempts", "error", "sent", "dead", "crc")
        columns = ", ".join("message_id" if key == "id" else key for key in keys)
        found = self.rows(f"SELECT {columns} FROM flexiflow_messages WHERE {where}", values)
        return [dict(zip(keys, row)) for row in found]

    def change_message(self, row: dict[str, Any], **changed: Any) -> Row:
        """Return the UPDATE of a row of the queue, checksum included."""
        if checksum(*(row[key] for key in _MESSAGE)) == row["crc"]:  # damage stays visible
            changed["crc"] = checksum(*({**row, **changed}[key] for key in _MESSAGE))
        columns = ", ".join(f"{key}=?" for key in changed)
        sql = f"UPDATE flexiflow_messages SET {columns} WHERE number=?"
        return (sql, (*changed.values(), row["number"]))


# --------------------------------------------------------------------------------------------
# 11. Component and engine: turns, receipts, delivery, timers
# --------------------------------------------------------------------------------------------
# A component takes one message at a time, in the task of whoever sends it. A turn decides, acts,
# commits, announces; what goes wrong before the commit leaves everything as if the message had
# not come. A message sent from within a component's own turn waits in the queue until that turn
# is over, so nothing nests and nothing deadlocks.

TURN_LIMIT = 30.0  # seconds that a message waits for its turn
DRAIN_LIMIT = 1000  # messages of its own that a component handles before the next stranger's
UNKNOWN_TARGET_LIMIT = 3600.0  # seconds that a message waits for its component to be made
_ENVELOPE = ("id", "correlation_id", "component")  # keys of a message that are not its payload
_UPDATE_HEAD = (
    f"UPDATE flexiflow_components SET {'=?, '.join(_HEAD)}=?, crc=? WHERE name=? AND seq=?")
_NEW_HEAD = (
    f"INSERT OR IGNORE INTO flexiflow_components({', '.join(_HEAD)}, crc, name)"
    " VALUES (?,?,?,?,?,?,?,?,?)")
_NEW_ENTRY = (
    "INSERT INTO flexiflow_journal(component, seq, message_id, correlation_id, message, receipt,"
    " data, time, prior, crc) VALUES (?,?,?,?,?,?,?,?,?,?)")
_EMPTY: dict[str, Any] = {}  # shared by all components without data; never changed in place


class Receipt(
    namedtuple(
        "Receipt", "outcome component id from_state to_state seq reason data duplicate",
        defaults=(None, None, None, None, None, False))
):
    """What became of a message; true if it was accepted.

    `outcome` is moved, stayed, blocked (its guards were false), ignored (not accepted in this
    state), unknown (declared nowhere) or queued. `seq` counts the messages that the component
    has answered, `data` is its data afterwards. A `duplicate` repeats an earlier receipt.
    """

    __slots__ = ()

    @property
    def data(self) -> dict[str, Any]:
        """The component's data afterwards; a copy."""
        return fresh(self[7])  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return self[0] == "moved" or self[0] == "stayed"

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as a JSON object."""
        return {**self._asdict(), "data": self.data}


class Turn(Context):
    """The handling of one message: what is set while it lasts, and seen by the code it calls."""

    live = True
    sent: Sequence[Outgoing] = ()  # what the commit takes along
    data: dict[str, Any] | None = None  # a copy of `base`, once code has asked for it
    outbox: list[Outgoing] | None = None  # what is sent from within the turn

    def __init__(
        self, component: AsyncComponent, parent: Context | None, message: dict[str, Any]
    ) -> None:
        self.parent, self._correlation_id = parent, None
        self.component, self.message = component, message
        self.machine = machine = component.state_machine
        self.state, self.base = machine._state, component._data

    def begin(self) -> None:
        """Start again from the component as it is now."""
        self.state, self.base = self.machine._state, self.component._data
        self.data = None

    def end(self) -> None:
        """Give the context back to who surrounds the turn."""
        self.live = False
        _context.set(self.parent)

    @property
    def correlation_id(self) -> str:
        """The message's correlation id, else that of the code that sent it, else a new one."""
        if self._correlation_id is None:
            given = self.message.get("correlation_id")
            outer = self.parent.correlation_id if self.parent is not None else None
            self._correlation_id = given or outer or new_id()
        return self._correlation_id

    def post(self, out: Outgoing) -> Receipt:
        """Put a message into the outbox: it leaves with the turn's commit."""
        self.outbox = self.outbox or []
        self.outbox.append(out)
        return Receipt("queued", out.to, out.id)


def live_turn(component: AsyncComponent | None = None) -> Turn | None:
    """Return the innermost live turn, of any or of one component, that the running code is in."""
    context = _context.get()
    while context is not None:
        if isinstance(context, Turn) and context.live and component in (None, context.component):
            return context
        context = context.parent
    return None


def check_message(message: Any) -> dict[str, Any]:
    """Return a message as a dict; raise ArgumentError if it is not one with a type."""
    if not isinstance(message, dict):
        raise ArgumentError(f"Not a message: {message!r}", fix='write {"type": "start"}')
    for key in ("type", "id", "correlation_id"):
        value = message.get(key)
        if (value is not None or key == "type") and not (isinstance(value, str) and value):
            raise ArgumentError(f"The {key!r} of a message is text, and not empty: {value!r}")
    return message if message.__class__ is dict else dict(message)


def _written(value: Any, name: str) -> str:  # TEMP until s02 has it
    """Return JSON for the store; raise PersistenceError for what would not come back the same."""
    try:
        return write_json(value, name)
    except ValueError as error:
        raise PersistenceError(
            f"Cannot save {name}", why=str(error),
            fix="keep it to JSON: text, numbers, lists, dicts with text as keys") from error


@functools.lru_cache(maxsize=4096)
def _receipt_text(*parts: str | None) -> str:
    return _encode(parts)


class AsyncComponent:
    """A name, a state, data and rules; made by an engine from a config, or by hand.

    `seq` counts what has happened to it; `completed` is when it reached a final state, in epoch
    seconds; `metadata` is what a snapshot carried along.
    """

    __slots__ = (
        "name", "state_machine", "logger", "event_bus", "seq", "completed", "definition", "metadata",
        "_rules", "_engine", "_data", "_data_text", "_since", "_chain", "_unready", "_birth",
        "_turn", "_waiters", "_internal", "_update")

    def __init__(
        self, name: str, rules: list[dict[str, Any]] | None = None,
        state_machine: StateMachine | None = None, logger: Any = None,
        event_bus: AsyncEventManager | None = None
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"Not a name for a component: {name!r}")
        self.name, self.logger, self.event_bus = name, logger, event_bus
        self.state_machine = state_machine or StateMachine.from_name("InitialState")
        self.seq = self._chain = 0  # _chain: crc of the last journal row
        self.completed: float | None = None
        self.definition: Any = None  # None: made by hand, without rules
        self.metadata: dict[str, Any] | None = None
        self._rules = rules
        self._engine: Any = None
        self._data, self._since = _EMPTY, _EMPTY
        self._data_text: str | None = None  # as stored
        self._unready = bool(rules)  # whether `_prepare` comes before the next message
        self._birth: Plan | None = None  # of a new component, until it is carried out
        self._update: Definition | None = None  # to be adopted before the next message
        self._turn: Turn | None = None
        self._waiters: deque[tuple[asyncio.Future[None], Turn]] | None = None
        self._internal: deque[dict[str, Any]] | None = None  # sent to itself, not handled yet

    def __repr__(self) -> str:
        return f"<AsyncComponent {self.name!r} in {self.state!r}>"

    # ---- what users see

    @property
    def state(self) -> str:
        """The name of the current state; within a turn, of the next."""
        return self.state_machine.registry.name_of(self.state_machine.current_state)

    @property
    def data(self) -> dict[str, Any]:
        """The data: within a turn the working copy, else a copy that changes nothing."""
        turn = live_turn(self)
        if turn is None:
            return fresh(self._data)  # type: ignore[no-any-return]
        if turn.data is None:
            turn.data = fresh(turn.base)
        return turn.data  # type: ignore[return-value]

    @data.setter
    def data(self, value: dict[str, Any]) -> None:
        turn = live_turn(self)
        if turn is None:
            raise StateError(
                f"Data of {self.name!r} set outside a turn", why="it would not be saved",
                fix="change it in an action, or with `assign` in a rule")
        turn.data = value

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The rules, notes included; `update_rules` changes them."""
        if self._rules is None:
            self._rules = []
        return self._rules

    async def add_rule(self, rule: dict[str, Any]) -> None:
        """Add a rule."""
        await self.update_rules([rule])

    async def update_rules(
        self, new_rules: list[dict[str, Any]], *, replace: bool = False
    ) -> list[dict[str, Any]]:
        """Add rules, or put them in place of the old ones; return the rules that hold now.

        A rule that is there already is not added again. Raises ConfigError, and changes
        nothing, if the result is not a good config or the current state would be gone.
        """
        if not isinstance(new_rules, list):
            raise ArgumentError(f"Not a list of rules: {new_rules!r}")
        async with self._own_turn("rules.updated") as turn:
            if self._engine is not None and self._engine.store is not None:
                self._refresh(turn, self._engine.store)
            old = [] if replace else self.rules
            rules = list(old)
            for rule in new_rules:
                rules += [] if rule in rules else [rule]
            await self._swap(turn, self._compiled(rules, replace))
            return self.rules

    # ---- turns

    async def handle_message(
        self, message: dict[str, Any], *, _row: dict[str, Any] | None = None, _strict: bool = True
    ) -> Receipt:
        """Handle a message and return its receipt, when its events have been published.

        Raises StateError for a message type that is declared nowhere, and whatever the code of
        a state, guard or action raises; then nothing has changed.
        """
        if (message.__class__ is not dict or message.get("type").__class__ is not str
                or not message["type"] or "id" in message or "correlation_id" in message):
            message = check_message(message)
        outer = _context.get()
        turn = Turn(self, outer, message)
        if self._turn is None:
            self._turn = turn
            _context.set(turn)
        else:
            own = live_turn(self)
            if own is not None:  # called from within: it runs when the turn is over
                body = {key: value for key, value in message.items() if key not in _ENVELOPE}
                return own.post(Outgoing(self.name, body, 0.0, message.get("id") or new_id()))
            await self._wait_for(turn)
        try:
            if self._unready or self._internal:
                await self._prepare(turn)
            receipt = await self._run(turn, _row)
            if self._internal:
                await self._drain(turn)
        finally:
            turn.live = False
            _context.set(outer)
            self._turn = None
            if self._waiters:
                self._pass_on()
        if _strict and receipt[0] == "unknown":
            raise self._unknown(message, receipt)
        return receipt

    def _keep(self, turn: Turn, outbox: Sequence[Outgoing]) -> None:
        """Remember what was sent to the component itself, to be handled before anything else."""
        self._internal = self._internal or deque()
        self._internal += [
            {"component": self.name, "message": out.message, "id": out.id,
             "correlation_id": turn.correlation_id}
            for out in outbox if out.to == self.name and not out.delay]

    @contextlib.asynccontextmanager
    async def _own_turn(self, kind: str) -> AsyncIterator[Turn]:
        """Hold the turn for something that is not a message."""
        turn = Turn(self, _context.get(), {"type": kind})
        if live_turn(self) is not None:
            raise StateError(f"{self.name!r} is in the middle of a turn", fix="do it afterwards")
        if self._turn is not None:
            await self._wait_for(turn)
        self._turn = turn
        _context.set(turn)
        try:
            await self._prepare(turn)
            yield turn
        finally:
            turn.end()
            self._pass_on()

    async def _wait_for(self, turn: Turn) -> None:
        """Wait until every message that came before has been handled."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiters = self._waiters or deque()
        self._waiters.append((future, turn))
        alarm = loop.call_later(TURN_LIMIT, self._wait_too_long, future)
        try:
            await future
        except BaseException:
            if self._turn is turn:  # cancelled in the moment in which the turn was given
                self._pass_on()
            raise
        finally:
            alarm.cancel()
        turn.begin()
        _context.set(turn)

    def _wait_too_long(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_exception(StateError(
                f"No turn for {TURN_LIMIT:g} seconds: {self.name!r}",
                why="the message before this one is not done; perhaps two components wait for each"
                " other", component=self.name))

    def _pass_on(self) -> None:
        """Give the turn to who has waited longest."""
        self._turn = None
        while self._waiters:
            future, turn = self._waiters.popleft()
            if not future.done():
                self._turn = turn
                return future.set_result(None)

    async def _drain(self, holder: Turn) -> None:
        """Handle the messages that the component sent to itself."""
        assert self._internal is not None
        for count in itertools.count(1):
            if not self._internal:
                break
            row = self._internal.popleft()
            turn = Turn(self, holder, message_of(row))
            _context.set(turn)
            try:
                if count > DRAIN_LIMIT:
                    raise StateError(
                        f"{self.name!r} sent itself more than {DRAIN_LIMIT} messages in one turn",
                        fix="break the circle, or send with a delay")
                receipt = await self._run(turn, row)
                if receipt.outcome == "unknown":
                    raise self._unknown(turn.message, receipt)
            except Exception as error:
                await self._gave_up(row, error, count > DRAIN_LIMIT)
            except BaseException:
                self._internal.appendleft(row)  # the next turn will run it
                raise
            finally:
                turn.end()
        holder.begin()

    async def _gave_up(self, row: dict[str, Any], error: Exception, dead: bool) -> None:
        if self._engine is not None:
            await self._engine._failed(row, error, dead)
        else:
            (self.logger or logger).error(
                "Message %r to %r failed", row["message"]["type"], self.name, exc_info=error)

    def _unknown(self, message: dict[str, Any], receipt: Receipt) -> StateError:
        error = StateError(
            f"Unknown message: {message['type']!r}",
            why=f"no rule of {self.name!r} takes it in any state",
            fix=choose(message["type"], self.definition.types), component=self.name,
            state=receipt.from_state)
        error.receipt = receipt  # type: ignore[attr-defined]
        return error

    async def _run(self, turn: Turn, row: dict[str, Any] | None) -> Receipt:
        """Decide, act, commit and announce; in a store again, while other processes are quicker."""
        store = None if self._engine is None else self._engine.store
        id, text, machine = turn.message.get("id"), "", self.state_machine
        try:
            if store is not None:
                given, id = id, id or new_id()
                turn.message = {**turn.message, "id": id}
                text = _written({k: v for k, v in turn.message.items() if k not in _ENVELOPE}, "message")
            while True:
                if store is not None:
                    if self.definition.has_code:  # code must not run on what is over
                        self._refresh(turn, store)
                    earlier = self._earlier(store, id, text) if given else None
                    if earlier is not None:
                        if row is not None:
                            await store.write(None, [self._unqueue(row)])
                        self._refresh(turn, store)
                        return earlier
                before = machine.registry.name_of(turn.state)
                if row is not None and not self._queued(row):
                    reason = "it has been handled elsewhere"
                    return Receipt("ignored", self.name, id, before, before, self.seq, reason)
                plan = self._decided(turn, row, before)
                if plan.outcome == "class":
                    await self._ask_class(turn, plan, before)
                if plan.actions:
                    await self._act(turn, plan)
                if plan.outcome == "unknown":
                    if store is None or not self._refresh(turn, store):
                        break
                    continue
                answer = self._commit(turn, plan, before, id, text, row)
                if answer is None or await answer is None:
                    break
                self._refresh(turn, store)
                turn.begin()
        except Exception:
            await self._publish("component.message.received", turn, message=turn.message)
            raise
        receipt = self._receipt(plan, id, before)
        try:
            if self.event_bus is not None and (plan.emits or self.event_bus._events):
                await self._announce(turn, plan, receipt)
        finally:
            if turn.outbox:
                await self._send_late(turn)
        return receipt

    def _refresh(self, turn: Turn, store: Any) -> bool:
        """Read the component again if another process has changed it; tell whether it has."""
        sql = "SELECT seq FROM flexiflow_components WHERE name=?"
        if store.rows(sql, (self.name,)) == [(self.seq,)]:
            return False
        self._load(self._engine._head(self.name))
        turn.begin()
        return True

    def _receipt(self, plan: Plan, id: str | None, before: str) -> Receipt:
        machine, seq = self.state_machine, self.seq
        after = machine.registry.name_of(machine._state) if plan.outcome == "moved" else before
        if plan.outcome == "unknown":
            id = seq = None
        return tuple.__new__(Receipt, (  # quicker than calling Receipt
            plan.outcome, self.name, id, before, after, seq, plan.reason, plan.data, False))

    def _earlier(self, store: SQLiteStore, id: str, text: str) -> Receipt | None:
        """Return the receipt of a message that was handled before, as a duplicate."""
        found = store.journal(self.name, 1, "message_id=?", (id,))
        if not found:
            return None
        (entry,) = found
        if _encode(entry["message"]) != text:
            raise StateError(
                f"The id {id!r} was used for another message to {self.name!r}",
                why="an id stands for one message, its type and payload included",
                fix="send the new message under a new id", first=entry["message"].get("type"))
        last = store.journal(self.name, 1, "seq<=? AND data IS NOT NULL", (entry["seq"],))
        return Receipt(
            entry["outcome"], self.name, id, entry["from_state"], entry["to_state"], entry["seq"],
            entry["reason"], last[0]["data"] if last else None, True)

    # ---- deciding and acting

    def _decided(self, turn: Turn, row: dict[str, Any] | None, leaf: str) -> Plan:
        """Return what the rules say, with the state object that it leads to."""
        definition = self.definition
        if definition is None:
            return Plan("class", turn.base)
        if self.completed is not None:
            plan = Plan("ignored", turn.base)
            plan.reason = f"completed in {leaf}"
            plan.state = turn.state
            return plan
        timer = None
        if row is not None and row.get("state") is not None:
            timer = definition.candidate(leaf, definition.by_number[row["rule"]], row["state"])
        plan = decide(definition, leaf, self._scope(turn, leaf), timer)
        passage: Any = plan.passage
        if plan.outcome == "moved":
            plan.state = passage.node.instance or passage.node.create()
        else:
            plan.state = turn.state
        return plan

    def _scope(self, turn: Turn, leaf: str, now: float | None = None) -> Scope:
        clock = time.time if self._engine is None else self._engine.clock
        return {
            "message": turn.message, "data": turn.base, "component": self.name, "state": leaf,
            "id": turn.message.get("id"), "now": clock() if now is None else now, "self": self}

    async def _ask_class(self, turn: Turn, plan: Plan, leaf: str) -> None:
        """Let the current state's class answer; put back its attributes if it fails."""
        state = turn.state
        kept = getattr(state, "__dict__", None)
        kept = fresh(kept) if kept else None
        try:
            proceed, plan.state = await ask(state, turn.message, self)
        except BaseException:
            if kept is not None:
                vars(state).clear()
                vars(state).update(kept)
            raise
        if turn.data is not None:
            self._take_data(turn, plan)
        if not proceed:
            plan.outcome, plan.state = "blocked" if plan.refused else "ignored", state
            plan.reason = f"{leaf} does not take {turn.message['type']!r}"
        elif plan.state is state:
            plan.outcome = "stayed"
        else:
            plan.outcome = "moved"
            if self.definition is not None:
                self._follow_class(turn, plan, leaf)

    def _take_data(self, turn: Turn, plan: Plan) -> None:
        """Take over the data as the code that was called has left it."""
        if turn.data is not None:
            if turn.data.__class__ is not dict:
                raise StateError(f"Data of {self.name!r} is not a dict: {turn.data!r}")
            plan.data = turn.base = fresh(turn.data)
            turn.data = None

    def _follow_class(self, turn: Turn, plan: Plan, leaf: str) -> None:
        """Go where a class has answered to go, as a rule would."""
        definition, cls = self.definition, type(plan.state)
        name = self.state_machine.registry.name_of(plan.state)  # type: ignore[arg-type]
        if name not in definition.nodes:
            if self._engine is not None and self._engine.store is not None:
                raise StateError(
                    f"State {name!r} is not in the config of {self.name!r}",
                    why="a store could not bring it back",
                    fix=f'add it to "states": "{name}": "{cls.__module__}:{cls.__name__}"')
            definition.nodes[name] = Node(name, cls=cls)
        plan.passage = definition.passage(leaf, leaf, name)
        follow(plan, self._scope(turn, leaf))

    async def _act(self, turn: Turn, plan: Plan) -> None:
        """Run the actions; they see the new state, and data that they may change."""
        turn.state, turn.base, turn.data = plan.state, plan.data, None
        for action in plan.actions:
            result = action(turn.message, self)
            if result is not None and inspect.isawaitable(result):
                await result
        self._take_data(turn, plan)

    # ---- committing

    def _commit(
        self, turn: Turn, plan: Plan, before: str, id: str = "", text: str = "",
        row: dict[str, Any] | None = None, definition: Any = None, rows: Sequence[Row] = ()
    ) -> Any:
        """Make a plan true: at once in memory; in the store, return what is to be awaited for it."""
        engine, passage, since, completed = self._engine, plan.passage, self._since, self.completed
        seq = self.seq + (plan.outcome != "created")
        now = 0.0 if engine is None else engine.clock()
        if passage is not None and passage.enters and plan.outcome != "created":
            since = {name: now if name in passage.enters else since.get(name, now)
                     for name in passage.active}
            completed = now if passage.completes else None
        turn.sent = plan.sends
        if turn.outbox:
            turn.sent, turn.outbox = [*plan.sends, *turn.outbox], None
        if row is not None or turn.sent or (passage is not None and passage.busy):
            rows = [*rows, *self._effect_rows(turn, plan, row, now)]
        if engine is not None and engine.store is not None:
            return self._write(
                turn, plan, before, id, text, row, rows, now, seq, since, completed, definition)
        if rows:
            engine.queue.write_now(rows)
        self._adopt(turn, plan.state, plan.data, None, seq, since, completed, 0, definition)
        return None

    def _write(
        self, turn: Turn, plan: Plan, before: str, id: str, text: str, row: Any,
        rows: Sequence[Row], now: float, seq: int, since: Any, completed: float | None,
        definition: Any
    ) -> Any:
        """Return the write of a plan: the component's row, the journal's, and `rows`."""
        state: Any = plan.state
        stored, attributes = definition or self.definition, getattr(state, "__dict__", None)
        after = stored.registry.name_of(state)
        data = self._data_text if plan.data is self._data else None
        data = data or _written(plan.data, "data")
        kept = _written(attributes, f"attributes of {after}") if attributes else None
        changed = data if data != self._data_text or not seq else None
        receipt = _receipt_text(plan.outcome, before, after, plan.reason)
        entry = (self.name, seq, id, turn.correlation_id, text, receipt, changed, now)
        chain = checksum(*entry, start=self._chain)
        head = (stored.hash, after, kept, data, seq, _encode(since), completed)
        values = (*head, checksum(self.name, *head, start=chain), self.name)

        def claim(execute: Callable[..., Any]) -> str | None:
            if row is not None and not self._queued(row):
                return "moved on"
            done = execute(_UPDATE_HEAD, (*values, seq - 1)) if seq else execute(_NEW_HEAD, values)
            return None if done.rowcount == 1 else "moved on"

        journal: list[Row] = [(_NEW_ENTRY, (*entry, self._chain, chain))]
        if not seq or definition is not None:
            journal.append((
                "INSERT OR IGNORE INTO flexiflow_definitions(hash, body) VALUES (?,?)",
                (stored.hash, stored.text)))
        return self._engine.queue.write(claim, [*journal, *rows], functools.partial(
            self._adopt, turn, state, plan.data, data, seq, since, completed, chain, definition))

    def _effect_rows(
        self, turn: Turn, plan: Plan, row: dict[str, Any] | None, now: float
    ) -> list[Row]:
        """Return the queue's rows for a plan: what is sent, and the timers made and removed."""
        rows: list[Row] = [] if row is None else [self._unqueue(row)]
        passage, engine = plan.passage, self._engine
        if engine is None and (plan.sends or plan.timers):
            raise StateError(
                f"{self.name!r} sends or waits without an engine", fix="engine.register(it)")
        if passage is not None and self.definition.has_timers:
            gone = [name for name in passage.exits if self.definition.timers(name)]
            rows += [
                ("DELETE FROM flexiflow_messages WHERE component=? AND state=? AND dead IS NULL",
                 (self.name, name)) for name in gone + ["*"] * passage.completes]
        rows += self._sent_rows(turn, turn.sent, now)
        for due, owner, number in plan.timers if passage and not passage.completes else ():
            rows.append(self._timer_row(turn, self.definition.by_number[number], owner, due, now))
        return rows

    def _sent_rows(self, turn: Turn, outbox: Sequence[Outgoing], now: float) -> list[Row]:
        rows, engine = [], self._engine
        for out in outbox:
            out.id = out.id or new_id()
            if engine is not None:
                engine.posted.add(out.to)
                text = _written(out.message, f"message to {out.to}")
                rows.append(engine.queue.message_row(
                    out.to, out.id, turn.correlation_id, text, now + out.delay, now))
        return rows

    async def _send_late(self, turn: Turn) -> None:
        """Send what handlers and tasks of the turn have sent since its commit."""
        late, turn.outbox, engine = turn.outbox or (), None, self._engine
        rows = self._sent_rows(turn, late, engine.clock() if engine else 0.0)
        if rows and engine.store is not None:
            await engine.store.write(None, rows)
        elif rows:
            engine.queue.write_now(rows)
        self._keep(turn, late)

    def _timer_row(self, turn: Turn, rule: Rule, owner: str, due: float, now: float) -> Row:
        text = _encode({"type": f"after {rule.text['after']}"})
        row: Row = self._engine.queue.message_row(
            self.name, new_id(), turn.correlation_id, text, due, now, owner,
            rule.number)
        return row

    def _queued(self, row: dict[str, Any]) -> bool:
        """Tell whether a message still waits in the queue: another process may have handled it."""
        if self._engine is None:
            return True
        sql = "SELECT 1 FROM flexiflow_messages WHERE component=? AND message_id=?"
        return bool(self._engine.queue.rows(sql, (self.name, row["id"])))

    def _unqueue(self, row: dict[str, Any]) -> Row:
        return ("DELETE FROM flexiflow_messages WHERE component=? AND message_id=?",
                (self.name, row["id"]))

    def _adopt(
        self, turn: Turn | None, state: Any, data: dict[str, Any], data_text: str | None, seq: int,
        since: dict[str, float], completed: float | None, chain: int, definition: Any
    ) -> None:
        """Become what was committed."""
        self.state_machine._state, self._data, self._data_text = state, data, data_text
        self.seq, self._since, self.completed, self._chain = seq, since, completed, chain
        if definition is not None and definition is not self.definition:
            self.definition = definition
            self.state_machine.registry = definition.registry
            self._rules = fresh(definition.source.get("rules") or [])
        if self._engine is not None and self._engine._alarm is not None:
            self._engine._wake()
        if turn is not None:
            turn.state, turn.base = state, data
            if turn.sent:
                self._keep(turn, turn.sent)

    # ---- creation, rules, reloading

    async def _prepare(self, turn: Turn) -> None:
        """Do what must be done before the next message: be born, be read again, be compiled."""
        engine = self._engine
        if self._unready:
            if self._birth is not None:
                await self._be_born(self._birth)
            elif engine is not None and engine.store is not None:
                self._load(engine._head(self.name))
            elif any(isinstance(one, dict) and {"on", "after"} & one.keys() for one in self.rules):
                self._define(self._compiled(self.rules))
            if self._update is not None:
                await self._swap(turn, self._update)
                self._update = None
                engine._unborn.pop(self.name, None)
            self._unready = False
        if self._internal:  # left over by a turn that was cancelled
            await self._drain(turn)
        turn.begin()

    def _define(self, definition: Definition) -> None:
        self.definition, self.state_machine.registry = definition, definition.registry

    def _compiled(self, rules: list[dict[str, Any]], replace: bool = True) -> Definition:
        """Return a definition with these rules instead; raise ConfigError if it is not good."""
        machine = self.state_machine
        registry = StateRegistry(machine.registry)
        source = {"initial_state": self.state} if self.definition is None else self.definition.source
        if registry.get(self.state) is None:
            registry.register(self.state, type(machine._state))
        walk = _Walk(
            {"name": self.name, **source, "rules": rules}, registry=registry,
            allow_imports=self._engine and self._engine.allow_imports)
        errors = [problem for problem in walk.problems() if problem.level == "error"]
        if errors:
            error = _as_error(errors, None)
            if not replace and "can never fire" in error.what:
                error.fix = "replace the rules: update_rules(rules, replace=True), or --replace"
            raise error
        return self._checked(walk.definition())

    def _checked(self, definition: Definition) -> Definition:
        """Return a definition that the component can go over to; else raise ConfigError."""
        if self.state not in definition.nodes:
            raise ConfigError(
                f"State {self.state!r} of {self.name!r} would be gone",
                fix="keep the state, or let the component leave it first", component=self.name)
        return definition

    async def _be_born(self, plan: Plan) -> None:
        """Turn 0: run the entry actions; write the component, its data and its timers."""
        engine = self._engine
        turn = Turn(self, _context.get(), {"type": "created"})
        _context.set(turn)
        try:
            await self._act(turn, plan)
            text = _encode({"created": self.definition.hash}) if engine.store else ""
            answer = self._commit(turn, plan, self.state, "", text)
            self._birth, lost = None, answer is not None and await answer is not None
            engine._unborn.pop(self.name, None)
            if lost:  # another process made it first
                self._load(engine._head(self.name))
            else:
                await self._emit(turn, plan)
        finally:
            turn.end()

    def _load(self, head: dict[str, Any]) -> None:
        """Become what the store says."""
        definition = self._engine._stored_definition(head["definition"])
        if head["state"] not in definition.nodes:
            raise StateError(f"State {head['state']!r} of {self.name!r} is not in its definition")
        state = definition.nodes[head["state"]].create(head["attributes"])
        self._adopt(
            None, state, head["data"], head["data_text"], head["seq"], head["since"], head["completed"],
            head["chain"], definition)
        self._unready = False

    async def _swap(self, turn: Turn, changed: Definition) -> None:
        """Go over to another definition, between two messages; timers of kept rules run on."""
        engine, state = self._engine, self.state_machine._state
        plan, leaf = Plan("updated", self._data), self.state
        kept = vars(state) if getattr(state, "__dict__", None) else None
        plan.state = changed.nodes[leaf].create(kept)
        rows = [] if engine is None else self._timer_changes(turn, changed, leaf)
        stored = engine is not None and engine.store is not None
        text = _encode({"definition": changed.hash}) if stored else ""
        id = new_id() if stored else ""
        answer = self._commit(turn, plan, leaf, id, text, definition=changed, rows=rows)
        if answer is not None and await answer is not None:
            self._unready = True
            raise StateError(f"{self.name!r} was changed meanwhile", fix="update it again")
        await self._publish("rules.updated", turn, rules=len(self.rules))

    def _timer_changes(self, turn: Turn, changed: Definition, leaf: str) -> list[Row]:
        """Drop the timers of vanished rules, keep those of equal ones, make those of new ones."""
        old, queue = self.definition, self._engine.queue
        if not changed.has_timers and not (old and old.has_timers):
            return []
        before = {_encode(rule.text): rule.number for rule in (old.rules if old else ())}
        after = {_encode(rule.text): rule for rule in changed.rules}
        kept = {before[text]: rule for text, rule in after.items() if text in before}
        where = "component=? AND state IS NOT NULL AND dead IS NULL"
        rows: list[Row] = []
        for row in queue.messages(where, (self.name,)):
            if row["rule"] in kept:
                rows.append(queue.change_message(row, rule=kept[row["rule"]].number))
            else:
                rows.append(self._unqueue(row))
        now = self._engine.clock()
        scope = self._scope(turn, leaf, now)
        for owner in changed.sources(leaf):
            for rule in changed.timers(owner):
                if _encode(rule.text) not in before:
                    delay = seconds(rule.after(scope))  # type: ignore[misc]
                    due = self._since.get(owner, now) + delay
                    rows.append(self._timer_row(turn, rule, owner, due, now))
        return rows

    # ---- events

    async def _announce(self, turn: Turn, plan: Plan, receipt: Receipt) -> None:
        """Publish what happened, as long as the turn lasts; no handler changes the outcome."""
        await self._emit(turn, plan)
        bus: Any = self.event_bus
        if bus.listens("component.message.received"):
            await self._publish("component.message.received", turn, message=turn.message)
        if receipt.outcome == "moved":
            if bus.listens("state.changed"):
                await self._publish(
                    "state.changed", turn, from_state=receipt.from_state,
                    to_state=receipt.to_state, state=receipt.to_state)
            if self.completed is not None:
                await self._publish("component.completed", turn, state=receipt.to_state)

    async def _emit(self, turn: Turn, plan: Plan) -> None:
        for name, payload in plan.emits:
            facts = {"message": turn.message, "state": self.state}
            await self._publish(name, turn, payload, **facts)

    async def _publish(self, event: str, turn: Turn, payload: Any = None, **facts: Any) -> None:
        if self.event_bus is None or not self.event_bus.listens(event):
            return
        if payload is None:
            payload = {"component": self.name, **{key: fresh(one) for key, one in facts.items()},
                       "seq": self.seq, "correlation_id": turn.correlation_id}
        try:
            await self.event_bus.publish(event, payload)
        except StateError as error:  # published too deep
            (self.logger or logger).error("Event %r was not published", event, exc_info=error)


def message_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the queue as its component is to see it."""
    return {**row["message"], "id": row["id"], "correlation_id": row["correlation_id"]}


class FlexiFlowEngine:
    """Components by name, one bus, and the store that keeps them.

    `store` is a path, a SQLiteStore, or None for memory. `clock` returns epoch seconds.
    `allow_imports` lists the modules that configs may import from; None allows all. An engine
    belongs to one event loop; other threads and processes open the same file with their own.
    """

    def __init__(
        self, store: str | os.PathLike[str] | SQLiteStore | None = None, *, logger: Any = None,
        clock: Callable[[], float] = time.time, allow_imports: Sequence[str] | None = None
    ) -> None:
        given = store is None or isinstance(store, SQLiteStore)
        self.store: SQLiteStore | None = store if given else SQLiteStore(store)  # type: ignore
        self.logger = logger or globals()["logger"]
        self.clock, self.allow_imports = clock, allow_imports
        self.event_bus = AsyncEventManager(logger=self.logger)
        self.components: dict[str, AsyncComponent] = {}
        self.posted: set[str] = set()  # components that turns of this engine have sent to
        self._unborn: dict[str, AsyncComponent] = {}
        self._unannounced: deque[AsyncComponent] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks weakly
        self._configs: dict[str, ComponentConfig] = {}
        self._definitions: dict[str, Definition] = {}  # by hash
        self._warned: set[str] = set()  # components whose config differs
        self._memory: SQLiteStore | None = None
        self._alarm: asyncio.Future[None] | None = None
        self._stopping = False

    async def __aenter__(self) -> FlexiFlowEngine:
        self._spawn(self.run())
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Write what has not been written, wait for what runs, and close the store."""
        self._stopping = True
        self._wake()
        try:
            while self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._settle()
        finally:
            for store in (self.store, self._memory):
                if store is not None:
                    store.close()

    @property
    def queue(self) -> SQLiteStore:
        """Where messages wait: the store, or one in memory."""
        if self.store is None and self._memory is None:
            self._memory = SQLiteStore(":memory:")
        return self.store or self._memory  # type: ignore[return-value]

    # ---- components

    def create_component(
        self, config: str | os.PathLike[str] | dict[str, Any] | ComponentConfig, *,
        name: str | None = None, data: dict[str, Any] | None = None, update: bool = False
    ) -> AsyncComponent:
        """Return the component of this name (by default the config's), made if it is new.

        A component that the store knows goes on where it stopped, with its stored definition; a
        config that differs from it gives one warning, or with `update` takes its place (else
        ConfigError, where the state would be gone). `data` is put over the config's data. What
        is new is written with the first message, `register_async`, `run` or `close`.
        """
        loaded = self._config(config)
        definition: Any = loaded.definition
        known = self.get(name or loaded.name)
        if known is not None:
            if known.definition is None or known.definition.text != definition.text:
                if update:
                    known._update = known._checked(definition)
                    known._unready, self._unborn[known.name] = True, known
                elif known.name not in self._warned:
                    self._warned.add(known.name)
                    self.logger.warning(
                        "Component %r goes on with its own definition, which differs from the"
                        " config", known.name)
            return known
        state = definition.birth.node.create()
        component = AsyncComponent(name or loaded.name, None, StateMachine(state))
        component._adopt(None, state, _EMPTY, None, 0, _EMPTY, None, 0, definition)
        self._conceive(component, {**fresh(loaded.data), **fresh(data or {})}, definition.birth)
        self._add(component)
        return component

    def register(self, component: AsyncComponent) -> None:
        """Take in a component made by hand; one whose name the store knows takes that state.

        Raises StateError where another object has the name.
        """
        other = self.components.get(component.name)
        if other is component:
            return
        if other is not None or component._engine is not None:
            raise StateError(
                f"Component {component.name!r} is registered already",
                why="two of one name would overwrite each other", fix="use another name")
        if component.definition is None and (self.store is not None or component._rules):
            component._define(component._compiled(component.rules))
        component._engine, definition = self, component.definition
        head = None if self.store is None else self.store.head(component.name)
        if head is not None:
            component._load(head)
        elif definition is not None:
            passage = definition.passage(None, "*", component.state)
            self._conceive(component, component._data, passage)
        self._add(component)

    async def register_async(self, component: AsyncComponent) -> None:
        """Register a component, write it, and publish that, before returning."""
        self.register(component)
        await self._settle(strict=True)

    def restore(self, snapshot: ComponentSnapshot, machine: StateMachine) -> AsyncComponent:
        """Make a component from a snapshot, and register it."""
        component = AsyncComponent(snapshot.name, fresh(snapshot.rules) or None, machine)
        component._data, component.metadata = fresh(snapshot.data), fresh(snapshot.metadata)
        self.register(component)
        return component

    def get(self, name: str) -> AsyncComponent | None:
        """Return a component, from the store if need be, or None."""
        component = self.components.get(name)
        head = self.store.head(name) if component is None and self.store is not None else None
        if head is not None:
            component = AsyncComponent(name, None, StateMachine(DeclaredState()))
            component._engine = self
            component._load(head)
            self._add(component)
        return component

    def _find(self, name: str) -> AsyncComponent:
        component = self.components.get(name) or self.get(name)
        if component is None:
            names = {*self.components, *(self.store.names() if self.store is not None else ())}
            raise StateError(f"Unknown component: {name!r}", fix=choose(name, names))
        return component

    def _head(self, name: str) -> dict[str, Any]:
        assert self.store is not None
        head = self.store.head(name)
        if head is None:
            raise StateError(f"Component {name!r} is gone", why="it was removed from the store")
        return head

    def _conceive(self, component: AsyncComponent, data: dict[str, Any], birth: Passage) -> None:
        """Plan a new component's turn 0; it is carried out before its first message."""
        _written(data, "data")
        component._engine, component._data = self, data
        now, plan = self.clock(), Plan("created", data, birth)
        turn = Turn(component, None, {"type": "created"})
        follow(plan, component._scope(turn, birth.node.name, now))
        component._data, plan.state = plan.data, component.state_machine._state
        component._since = dict.fromkeys(birth.active, now)
        component.completed = now if birth.completes else None
        if self.store is not None or birth.steps or birth.timers:
            component._birth, component._unready = plan, True
            self._unborn[component.name] = component

    def _add(self, component: AsyncComponent) -> None:
        component.logger = component.logger or self.logger
        component.event_bus = component.event_bus or self.event_bus
        self.components[component.name] = component
        self.logger.debug("Registered component: %s", component.name)
        self._unannounced.append(component)
        with contextlib.suppress(RuntimeError):  # no loop: the first call that awaits publishes it
            asyncio.get_running_loop()
            if self.event_bus.listens("engine.component.registered"):
                self._spawn(self._announce())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _announce(self) -> None:
        while self._unannounced:
            component = self._unannounced.popleft()
            await self.event_bus.publish("engine.component.registered", {
                "component": component.name, "seq": component.seq,
                "correlation_id": get_correlation_id()})

    async def _settle(self, strict: bool = False) -> None:
        """Announce and write the components that are still new."""
        await self._announce()
        for component in list(self._unborn.values()):
            try:
                async with component._own_turn("created"):
                    pass  # which prepares it
            except Exception as error:
                if strict:
                    raise
                self.logger.error("%r could not be made", component.name, exc_info=error)

    def _config(self, config: Any) -> ComponentConfig:
        """Return a checked config; equal ones are compiled once."""
        if isinstance(config, ComponentConfig) and config.definition is not None:
            return config
        content = config if isinstance(config, (dict, ComponentConfig)) else read_config(config)
        key = repr(content)
        if key not in self._configs:
            self._configs[key] = ConfigLoader.load_component_config(
                content, allow_imports=self.allow_imports)
        return self._configs[key]

    def _stored_definition(self, hash: str) -> Definition:
        """Return a definition of the store, compiled once."""
        if hash not in self._definitions:
            assert self.store is not None
            self._definitions[hash] = ConfigLoader.load_component_config(
                {"name": "stored", **self.store.definition(hash)}, allow_imports=self.allow_imports
            ).definition  # type: ignore[assignment]
        return self._definitions[hash]

    # ---- messages

    async def handle_message(
        self, name: str, message: str | dict[str, Any], /, **fields: Any
    ) -> Receipt:
        """Handle a message to a component: `("order-17", "pay", amount=120, id="k-88")`.

        Raises StateError for an unknown component, and for a message that is declared nowhere.
        """
        if message.__class__ is str:
            fields["type"] = message
            message = fields
        elif fields:
            message = {**check_message(message), **fields}
        component = self.components.get(name) or self._find(name)
        if self._unannounced:
            await self._announce()
        return await component.handle_message(message)  # type: ignore[arg-type]

    async def send(
        self, name: str, message: str | dict[str, Any], /, *, delay: float | str = 0,
        id: str | None = None, **fields: Any
    ) -> Receipt:
        """Put a message into the queue: it is delivered by `run`, `delay` seconds from now.

        From within a turn it leaves with the turn's commit. The component need not exist yet.
        """
        given = {"type": message} if isinstance(message, str) else check_message(message)
        given = check_message({**given, **fields})
        key, pause = id or given.get("id") or new_id(), seconds(delay)
        body = {key: value for key, value in given.items() if key not in _ENVELOPE}
        turn = live_turn()
        if turn is not None and turn.component._engine is self:
            return turn.post(Outgoing(name, body, pause, key))
        text, now = _written(body, "message"), self.clock()
        correlation_id = given.get("correlation_id") or get_correlation_id() or new_id()
        row = self.queue.message_row(name, key, correlation_id, text, now + pause, now)

        def sent_before(execute: Callable[..., Any]) -> str | None:
            for kind in ("journal", "messages"):
                sql = f"SELECT message FROM flexiflow_{kind} WHERE component=? AND message_id=?"
                found = execute(sql, (name, key)).fetchone()
                if found is not None:
                    return "duplicate" if found[0] == text else "other"
            return None

        answer = await self.queue.write(sent_before, [row])
        if answer == "other":
            raise StateError(
                f"The id {key!r} was used for another message to {name!r}",
                fix="send the new message under a new id")
        self._wake()
        return Receipt("queued", name, key, duplicate=answer is not None)

    async def run(
        self, *, until_idle: bool = False, concurrency: int = 100, component: str | None = None
    ) -> int:
        """Deliver queued messages and due timers, of one component or of all; return how many.

        Goes on until `close`, or until nothing is due. Components run concurrently, the
        messages of one in order.
        """
        delivered = 0
        if live_turn() is not None:
            raise StateError("Delivery from within a turn", fix="let the turn end first")
        await self._settle()
        while True:
            rows = await self._ready(component)
            await asyncio.gather(*[self._deliver(row) for row in rows[:concurrency]])
            delivered += len(rows[:concurrency])
            if self._stopping or (until_idle and not rows):
                return delivered
            if not rows:
                await self._sleep()

    async def _ready(self, component: str | None) -> list[dict[str, Any]]:
        """Give what has come due its place, in due order; return each component's first message."""
        queue, mine = self.queue, "component=?" if component is not None else "1"
        values = () if component is None else (component,)
        late = queue.rows(
            "SELECT number FROM flexiflow_messages WHERE place IS NULL AND dead IS NULL AND due<=?"
            f" AND {mine} ORDER BY due, number", (self.clock(), *values))
        if late:
            sql = ("UPDATE flexiflow_messages SET place="
                   "(SELECT COALESCE(MAX(place), 0) + 1 FROM flexiflow_messages)"
                   " WHERE number=? AND place IS NULL")
            await queue.write(None, [(sql, row) for row in late])
        first = "SELECT MIN(place) FROM flexiflow_messages WHERE dead IS NULL GROUP BY component"
        return queue.messages(f"place IN ({first}) AND {mine} ORDER BY place", values)

    async def _deliver(self, row: dict[str, Any]) -> None:
        """Deliver one row of the queue; what fails is tried again later."""
        dead = True  # what cannot be read is not tried again
        try:
            if checksum(*(row[key] for key in _MESSAGE)) != row["crc"]:
                raise self.queue.damaged(f"message {row['number']}")
            message = message_of({**row, "message": json.loads(row["message"])})
            dead = False
            component = self._find(row["component"])
            if self._unannounced:
                await self._announce()
            await component.handle_message(message, _row=row)
        except BaseException as error:
            if not _is_own_failure(error) and not isinstance(error, SystemExit):
                raise
            await self._failed(row, error, dead)

    async def _failed(self, row: dict[str, Any], error: Any, dead: bool = False) -> None:
        """Count a failed attempt: the message comes again later, or is given up."""
        self.logger.error("Message %s to %r failed", row["id"], row["component"], exc_info=error)
        found = self.queue.messages(
            "component=? AND message_id=?", (row["component"], row["id"]))
        if not found:
            return
        (row,), now = found, self.clock()
        component = self.components.get(row["component"])
        if component is None:
            dead, pause = dead or now - row["sent"] > UNKNOWN_TARGET_LIMIT, 60.0
        else:
            retry = component.definition.retry if component.definition else QUEUE_RETRY
            dead = dead or hasattr(error, "receipt") or row["attempts"] + 1 >= retry.max_attempts
            pause = retry.delay(row["attempts"] + 1, random.random())
        await self.queue.write(None, [self.queue.change_message(
            row, attempts=row["attempts"] + 1, error=f"{type(error).__name__}: {error}", place=None,
            due=row["due"] if dead else now + pause, dead=now if dead else None)])
        if dead:
            with contextlib.suppress(ValueError):
                row["message"] = json.loads(row["message"])
            await self.event_bus.publish("message.dead", {
                **{key: row[key] for key in ("component", "message", "id", "correlation_id")},
                "error": str(error), "seq": component and component.seq})

    async def _sleep(self) -> None:
        """Sleep until something is due, a second at most: the wall clock may be set meanwhile."""
        ((due,),) = self.queue.rows("SELECT MIN(due) FROM flexiflow_messages WHERE dead IS NULL")
        pause = 1.0 if due is None else min(1.0, max(0.001, due - self.clock()))
        loop = asyncio.get_running_loop()
        self._alarm = loop.create_future()
        timer = loop.call_later(pause, self._wake)
        try:
            await self._alarm
        finally:
            timer.cancel()
            self._alarm = None

    def _wake(self) -> None:
        if self._alarm is not None and not self._alarm.done():
            self._alarm.set_result(None)

    # ---- rules and views

    async def update_rules(
        self, name: str, rules: list[dict[str, Any]], *, replace: bool = False
    ) -> list[dict[str, Any]]:
        """Add rules to a component, or replace them; see AsyncComponent.update_rules."""
        return await self._find(name).update_rules(rules, replace=replace)

    def accepts(self, name: str) -> list[str]:
        """Return the message types that a component takes now, guards aside."""
        component = self._find(name)
        definition, state = component.definition, component.state_machine._state
        kinds = [] if component.completed is not None else list(getattr(state, "moves", ()))
        if definition is not None and component.completed is None:
            for source in definition.sources(component.state):
                kinds += [kind for rule in definition.rules_of(source) for kind in rule.on]
        return list(dict.fromkeys(kinds))

    def history(
        self, name: str | None = None, *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Return what happened, to one component or to all, the newest first.

        Each entry is a dict of number, component, seq, id, correlation_id, message, outcome,
        from_state, to_state, reason, data (where it changed) and time (epoch seconds).
        """
        return [] if self.store is None else self.store.journal(name, limit)

    def status(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return what is known of one component or of all, as dicts, by name.

        Each has name, state, seq, since (epoch seconds), data, completed, waiting, dead and
        timers: dicts of message and due. Raises StateError for an unknown name.
        """
        known = set(self.components if self.store is None else self.store.names())
        known |= self._unborn.keys()
        if name is not None and name not in known:
            raise StateError(f"Unknown component: {name!r}", fix=choose(name, known))
        return [self._facts(one) for one in (sorted(known) if name is None else [name])]

    def _facts(self, name: str) -> dict[str, Any]:
        if self.store is None or name in self._unborn:
            live = self.components[name]
            facts = {"name": name, "state": live.state, "seq": live.seq, "data": live.data,
                     "since": live._since, "completed": live.completed}
        else:
            head = self._head(name)
            facts = {key: head[key] for key in
                     ("name", "state", "seq", "data", "since", "completed")}
        rows = self.queue.messages("component=? ORDER BY due, number", (name,))
        timers = [row for row in rows if row["dead"] is None and row["state"] is not None]
        facts["since"] = facts["since"].get(facts["state"])
        facts["dead"] = sum(row["dead"] is not None for row in rows)
        facts["waiting"] = len(rows) - facts["dead"] - len(timers)
        facts["timers"] = [
            {"message": json.loads(row["message"])["type"], "due": row["due"]} for row in timers]
        return facts


# --------------------------------------------------------------------------------------------
# 12. Views: Mermaid
# --------------------------------------------------------------------------------------------
# A picture is made from the config alone, so it shows what will be executed. Whatever a name
# holds, it stays a label.

_MERMAID_WORDS = frozenset(
    "end graph flowchart subgraph class classdef click style linkstyle default direction call "
    "href interpolate".split())


def visualize(config: str | os.PathLike[str] | dict[str, Any] | ConfigExplanation, *,
        format: str = "mermaid", active: str | None = None) -> str:
    """Return a Mermaid flowchart of a config: states, rules, packs; `active` marks a state."""
    if format != "mermaid":
        raise ArgumentError(f"Unknown format: {format!r}", fix="mermaid")
    found = config if isinstance(config, ConfigExplanation) else explain(config)
    return "\n".join(_Mermaid(found, active).lines())


class _Mermaid:
    """One flowchart being drawn."""

    def __init__(self, found: ConfigExplanation, active: str | None) -> None:
        self.found, self.active = found, active
        self.nodes = found.definition.nodes if found.definition else {}
        self.ids: dict[str, str] = {}

    def id_of(self, name: str) -> str:
        """Return an id that Mermaid takes, the name itself where that is one."""
        if name not in self.ids:
            plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name)
            if plain and name.lower() not in _MERMAID_WORDS:
                self.ids[name] = name
            else:
                number = len(self.ids)
                while f"state_{number}" in self.nodes or f"state_{number}" in self.ids.values():
                    number += 1
                self.ids[name] = f"state_{number}"
        return self.ids[name]

    def lines(self) -> Iterator[str]:
        found = self.found
        yield "flowchart LR"
        yield ""
        yield "%% Edge labels: message [guard]"
        if found.pack_order:
            yield "%% pack_order: " + ", ".join(map(_mermaid_label, found.pack_order))
        yield f"%% initial_state_resolution: [{', '.join(found.initial_state_resolution)}]"
        yield ""
        owned = set(found.state_providers)
        for number, pack in enumerate(found.packs):
            yield f'subgraph pack_{number}["pack: {_mermaid_label(pack.name)}"]'
            for key in pack.provided_keys:
                yield f'  {self.id_of(key)}["{_mermaid_label(key)}"]'
            yield "end"
            yield ""
        for node in self.nodes.values():
            if node.parent is None and node.name not in owned:
                yield from self._state(node, "")
        yield from self._unknown_states()
        yield ""
        if self.nodes and found.initial_state:
            yield f"start_(( )) --> {self.id_of(found.initial_state)}"
        yield from self._edges()
        if self.active is not None and self.active in self.nodes:
            yield f"style {self.id_of(self.active)} stroke-width:4px"

    def _state(self, node: Node, indent: str) -> Iterator[str]:
        children = [one for one in self.nodes.values() if one.parent is node]
        label = _mermaid_label(node.name)
        if not children:
            ends = ("([", "])") if node.final else ("[", "]")
            yield f'{indent}{self.id_of(node.name)}{ends[0]}"{label}"{ends[1]}'
            return
        yield f'{indent}subgraph {self.id_of(node.name)}["{label}"]'
        for child in children:
            yield from self._state(child, indent + "  ")
        yield f"{indent}end"

    def _pack_edges(self) -> Iterator[TransitionSpec]:
        for pack in self.found.packs:
            yield from pack.transitions

    def _unknown_states(self) -> Iterator[str]:
        known = {*self.nodes, *self.found.builtin_states, *self.found.state_providers}
        ends = {end for edge in self._pack_edges() for end in (edge.from_state, edge.to_state)}
        for name in sorted(ends - known):
            yield f'{self.id_of(name)}["{_mermaid_label(name)}"]:::unknown'
        if ends - known:
            yield "classDef unknown stroke-dasharray: 5 5, stroke: #999"

    def _edges(self) -> Iterator[str]:
        for edge in self._pack_edges():
            label = edge.on_message + (f" [{edge.guard}]" if edge.guard else "")
            yield self._edge(edge.from_state, label, edge.to_state)
        for rule in self.found.definition.rules if self.found.definition else ():
            label = ", ".join(rule.on) or f"after {rule.text['after']}"
            guard = rule.text.get("guard")
            if guard is not None:
                label += f" [{guard if isinstance(guard, str) else _guard_text(guard)}]"
            for source in rule.sources:
                if source == "*" and "any" not in self.ids:
                    self.ids["*"] = "any_"
                    yield 'any_(("*"))'
                yield self._edge(source, label, rule.to or source)
        for node in self.nodes.values():
            for kind, target in getattr(node.cls, "moves", {}).items():
                yield self._edge(node.name, kind, target)

    def _edge(self, source: str, label: str, target: str) -> str:
        return f'{self.id_of(source)} -->|"{_mermaid_label(label)}"| {self.id_of(target)}'


def _mermaid_label(text: str) -> str:
    """Escape a label: every character that Mermaid or HTML might read becomes its number."""
    return "".join(char if char.isalnum() or char in " _-.,:/+*=()[]>" and char.isprintable()
        else f"#{ord(char)};" for char in text)


def _guard_text(guard: dict[str, Any]) -> str:
    """Return a guard in a short form: `total > 0, vip == true`."""
    parts = []
    for key, wanted in guard.items():
        if key in ("all", "any", "not"):
            inner = wanted if isinstance(wanted, list) else [wanted]
            parts.append(f"{key}({' | '.join(map(_guard_text, inner))})")
        elif isinstance(wanted, dict):
            parts += [f"{key} {op} {_shown(operand)}" for op, operand in wanted.items()]
        else:
            parts.append(f"{key} == {_shown(wanted)}")
    return ", ".join(parts)


# --------------------------------------------------------------------------------------------
# 13. Command line, `main`, 1.0.1's import paths
# --------------------------------------------------------------------------------------------
# A command is a function: its options stand on it, it prints data to stdout and talk to stderr,
# and returns the exit code: 0 done, 1 failed, 2 wrong usage, 3 message not accepted, 130
# interrupted, 141 the reader went away. State lives in a store between two commands.

NOT_ACCEPTED = 3
CHUNK = 1 << 18  # bytes of NDJSON that are taken in at a time
COMMANDS: dict[str, tuple[Callable[[Any], int], str, str, tuple[Any, ...]]] = {}


def _option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


_CONFIG = _option("--config", metavar="FILE", help="the component's config (or FLEXIFLOW_CONFIG)")
_NAME = _option("--name", help="the component's name, where it is not the config's")
_DB = _option("--db", metavar="FILE", help="the store (or FLEXIFLOW_DB; default flexiflow.db)")
_JSON = _option("--json", action="store_true", help="print JSON, one value a line")
_ALLOW = _option("--allow-import", action="append", metavar="MODULE",
    help="import code from this module only (again for more; '' for none)")
_WORK = (_CONFIG, _NAME, _DB, _JSON, _ALLOW)


def command(name: str, text: str, example: str, *options: Any) -> Callable[[Function], Function]:
    """Make a function a command."""

    def add(run: Any) -> Any:
        COMMANDS[name] = (run, text, example, options)
        return run

    return add


def say(text: str = "") -> None:
    """Print a line of data, whatever it holds."""
    print(printable(text))


def say_json(value: Any) -> None:
    """Print a JSON value on one line."""
    print(json.dumps(value, default=str))


def hint(text: str) -> None:
    """Print a suggestion to a person at a terminal."""
    if sys.stderr.isatty():
        print(printable(text), file=sys.stderr)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print columns, one record a line."""
    lines = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def age(seconds: float) -> str:
    """Return a span of time in its largest unit: 40s, 3m, 2h, 12d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _config_path(args: Any) -> str | None:
    return args.config or os.environ.get("FLEXIFLOW_CONFIG")


def _engine(args: Any, readonly: bool = False) -> FlexiFlowEngine:
    path = args.db or os.environ.get("FLEXIFLOW_DB") or "flexiflow.db"
    allowed = getattr(args, "allow_import", None)
    store = SQLiteStore(path, readonly=readonly)
    return FlexiFlowEngine(store, allow_imports=allowed)


def _component(engine: FlexiFlowEngine, args: Any) -> AsyncComponent:
    """Return the component that the arguments name, made from the config if it is new."""
    path = _config_path(args)
    if path is not None:
        if os.path.dirname(os.path.abspath(path)) not in sys.path:
            sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # states beside the config
        return engine.create_component(path, name=args.name)
    if args.name is None:
        raise ConfigError("No config and no name given",
            fix="use --config FILE, --name, or set FLEXIFLOW_CONFIG")
    return engine._find(args.name)


def _working(args: Any, work: Callable[[FlexiFlowEngine], Any]) -> int:
    """Run `work(engine)` to its end and close the engine."""

    async def session() -> int:
        engine = _engine(args)
        try:
            return int(await work(engine))
        finally:
            await engine.close()

    return asyncio.run(session())


async def _deliver_caused(engine: FlexiFlowEngine) -> None:
    """Deliver what the messages handled here have sent, and what that sends in turn."""
    while engine.posted:
        await engine.run(until_idle=True, component=engine.posted.pop())


def _show_receipt(engine: FlexiFlowEngine, receipt: Receipt, kind: str, as_json: bool) -> int:
    """Print a receipt; return the exit code it stands for."""
    if as_json:
        say_json(receipt.as_dict())
    else:
        again = "   (handled before)" * receipt.duplicate
        if receipt.outcome == "moved":
            timers = [f"   timer in {age(timer['due'] - engine.clock())}"
                for timer in engine.status(receipt.component)[0]["timers"]]
            say(f"{kind}: {receipt.from_state} -> {receipt.to_state}{''.join(timers)}{again}")
        elif receipt:
            say(f"{kind}: stays in {receipt.to_state}{again}")
        elif receipt.outcome == "blocked":
            say(f"{kind}: blocked in {receipt.from_state}: {receipt.reason}{again}")
        else:
            accepted = engine.accepts(receipt.component)
            close = difflib.get_close_matches(kind, accepted, 1)
            say(f"{kind}: not accepted in {receipt.from_state}"
                f" (accepts: {', '.join(accepted) or 'nothing'})"
                + (f'; did you mean "{close[0]}"?' if close else "") + again)
    return 0 if receipt else NOT_ACCEPTED


@command("register", "create a component from a config and remember it",
    "register --config order.json --start", *_WORK, _option("--start", action="store_true",
    help='send "start", if it has not begun yet'))
def _register(args: Any) -> int:
    async def work(engine: FlexiFlowEngine) -> int:
        component = _component(engine, args)
        known = component.name not in engine._unborn
        await engine.register_async(component)
        await engine.run(until_idle=True, component=component.name)
        definition = component.definition
        assert definition is not None
        timers = sum(rule.after is not None for rule in definition.rules)
        facts = {"component": component.name, "new": not known, "state": component.state,
            "states": len(definition.nodes), "rules": len(component.rules), "timers": timers}
        if args.json:
            say_json(facts)
        elif known:
            say(f"{component.name} is registered already, in {component.state}")
        else:
            counts = ", ".join(
                _counted(facts[key + "s"], key) for key in ("state", "rule", "timer")  # type: ignore
            )
            assert engine.store is not None
            say(f"{component.name} registered in {engine.store.path}: {counts}")
        if not args.start:
            return 0
        if known and component.state != definition.birth.node.name:
            return 0
        receipt = await component.handle_message({"type": "start"}, _strict=False)
        await _deliver_caused(engine)
        return _show_receipt(engine, receipt, "start", args.json)

    code = _working(args, work)
    hint("next: flexiflow status")
    return code


@command("handle", "send a message, or NDJSON messages from stdin (-)",
    'handle --config order.json pay --data \'{"amount": 120}\'',
    _option("message_type", metavar="TYPE", help="the message's type, or - to read stdin"), *_WORK,
    _option("--content", help="the message's content"), _option("--data", metavar="JSON",
    help="the message's other fields, as an object"), _option("--id",
    help="an id: the same one again repeats the answer, not the work"))
def _handle_command(args: Any) -> int:
    if args.message_type == "-":
        return _working(args, lambda engine: _Intake(engine, args).run())

    async def work(engine: FlexiFlowEngine) -> int:
        message: dict[str, Any] = {}
        if args.data is not None:
            message = read_json(args.data, "--data", ArgumentError)
            if not isinstance(message, dict):
                raise ArgumentError(f"--data is not an object: {args.data}")
        if args.content:
            message["content"] = args.content
        if args.id:
            message["id"] = args.id
        message["type"] = args.message_type
        component = _component(engine, args)
        await engine.run(until_idle=True, component=component.name)
        receipt = await component.handle_message(message, _strict=False)
        await _deliver_caused(engine)
        return _show_receipt(engine, receipt, args.message_type, args.json)

    return _working(args, work)


class _Intake:
    """NDJSON from stdin: lines that are ready together share transactions."""

    def __init__(self, engine: FlexiFlowEngine, args: Any) -> None:
        self.engine, self.args = engine, args
        self.counts: dict[str, int] = {}
        self.failed = self.again = self.lines = 0
        self.seen: dict[str, None] = {}  # components, in the order of their first message

    async def run(self) -> int:
        """Read to the end; return the exit code."""
        import signal

        # asyncio's own handling of Ctrl-C would wait for the read to end.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor, rest = sys.stdin.fileno(), b""
        if sys.stdin.isatty():
            hint("reading messages, a JSON object a line; end with Ctrl-D")
        while True:
            chunk = os.read(descriptor, CHUNK)
            *lines, rest = (rest + chunk).split(b"\n") if chunk else (rest, b"")
            await self._take(lines)
            if not chunk:
                break
            if sys.stderr.isatty():
                print(f"\r{self.lines:,} lines", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        await _deliver_caused(self.engine)
        self._summarise()
        return 1 if self.failed else 0

    async def _take(self, lines: list[bytes]) -> None:
        """Handle some lines: components side by side, the messages of each in order."""
        streams: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for line in lines:
            self.lines += 1
            if not line.strip():
                continue
            try:
                message = check_message(read_json(line.strip(b"\r\n \t"), f"line {self.lines}",
                    ArgumentError))
                name = message.get("component") or self.args.name or self._component_name()
                if not isinstance(name, str):
                    raise ArgumentError(f"Not a component's name: {name!r}")
                if name not in self.seen:
                    await self._meet(name)
            except FlexiFlowError as error:
                self._fail(self.lines, error)
                continue
            streams.setdefault(name, []).append((self.lines, message))
        answers: list[tuple[int, Receipt]] = []
        streamed = [self._stream(name, given, answers) for name, given in streams.items()]
        await asyncio.gather(*streamed)
        for _, receipt in sorted(answers, key=operator.itemgetter(0)):
            self.counts[receipt.outcome] = self.counts.get(receipt.outcome, 0) + 1
            self.again += receipt.duplicate
            if self.args.json:
                say_json(receipt.as_dict())
        sys.stdout.flush()

    def _component_name(self) -> str:
        path = _config_path(self.args)
        if path is None:
            raise ArgumentError('No "component" in the line', fix="add it, or use --name")
        return self.engine._config(path).name

    async def _meet(self, name: str) -> None:
        """Make a component that is named for the first time, and deliver what is due for it."""
        if self.engine.get(name) is None:
            _component(self.engine, argparse.Namespace(config=self.args.config, name=name))
        else:
            await self.engine.run(until_idle=True, component=name)
        self.seen[name] = None

    async def _stream(self, name: str, given: list[tuple[int, dict[str, Any]]],
            answers: list[Any]) -> None:
        component = self.engine.components[name]
        for number, message in given:
            try:
                answers.append((number, await component.handle_message(message, _strict=False)))
            except Exception as error:
                self._fail(number, error)

    def _fail(self, number: int, error: Exception) -> None:
        self.failed += 1
        text = str(error) if isinstance(error, FlexiFlowError) else f"{type(error).__name__}: {error}"
        print(f"line {number}: " + "; ".join(map(printable, text.splitlines())), file=sys.stderr)

    def _summarise(self) -> None:
        states: dict[str, int] = {}
        for name in self.seen:
            state = self.engine.components[name].state
            states[state] = states.get(state, 0) + 1
        counts = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(self.counts.items()))
        text = f"{_counted(sum(self.counts.values()), 'message')} to "
        text += _counted(len(self.seen), "component") + (f": {counts}" if counts else "")
        text += f", {self.again:,} handled before" * bool(self.again)
        text += f", {self.failed:,} failed" * bool(self.failed)
        with contextlib.redirect_stdout(sys.stderr if self.args.json else sys.stdout):
            say(text)
            if states:
                ranked = sorted(states.items(), key=lambda item: (-item[1], item[0]))
                table(("STATE", "COMPONENTS"), [(state, f"{n:,}") for state, n in ranked])


@command("update_rules", "add rules to a component, or replace them, without losing its state",
    "update_rules --config order.json new_rules.json", _option("rule_file", metavar="FILE",
    help='a list of rules, or an object with "rules"'), *_WORK,
    _option("--replace", action="store_true", help="put them in place of the old ones"))
def _update_rules(args: Any) -> int:
    async def work(engine: FlexiFlowEngine) -> int:
        component = _component(engine, args)
        before = fresh(component.rules)
        rules = ConfigLoader.load_rules(args.rule_file)
        after = await component.update_rules(rules, replace=args.replace)
        if args.json:
            say_json({"component": component.name, "before": len(before), "after": len(after)})
            return 0
        say(f"{component.name}: rules {len(before)} -> {len(after)}")
        for mark, ones, others in (("+", after, before), ("-", before, after)):
            for rule in ones:
                if rule not in others:
                    say(f"  {mark} {_rule_text(rule)}")
        return 0

    return _working(args, work)


def _rule_text(rule: Any) -> str:
    """Return a rule on one line: `Open --pay--> Paid`, or a note as JSON."""
    if not isinstance(rule, dict) or not ("on" in rule or "after" in rule):
        return json.dumps(rule)
    cause = rule.get("on") or f"after {rule['after']}"
    shown = [", ".join(one) if isinstance(one, list) else str(one)
        for one in (rule.get("from", "*"), cause, rule.get("to", "(stays)"))]
    return f"{shown[0]} --{shown[1]}--> {shown[2]}"


@command("diagnose", "check this Python, this file and this store", "diagnose", _DB, _JSON)
def _diagnose_command(args: Any) -> int:
    checks: list[tuple[str, str, bool]] = [("flexiflow",
        f"{__version__} in {os.path.abspath(__file__)}", True),
        ("python", sys.version.split()[0], sys.version_info >= (3, 9)),
        ("platform", sys.platform, True)]
    try:
        checks.append(("sqlite", sqlite3.sqlite_version, sqlite3.sqlite_version_info >= (3, 34)))
        path = args.db or os.environ.get("FLEXIFLOW_DB") or "flexiflow.db"
        if os.path.exists(path):
            checks += _store_checks(path)
        else:
            checks.append(("store", f"{path}: not made yet", True))
    except (ImportError, FlexiFlowError) as error:
        checks.append(("store", str(error).splitlines()[0], False))
    good = all(ok for _, _, ok in checks)
    if args.json:
        say_json({"ok": good, "checks": [{"check": c, "value": v, "ok": ok} for c, v,
            ok in checks]})
    else:
        say(f"FlexiFlow environment: {'OK' if good else 'ISSUES FOUND'}")
        for check, value, ok in checks:
            say(f"  [{'OK' if ok else 'FAIL'}] {check}: {value}")
    return 0 if good else 1


def _store_checks(path: str) -> Iterator[tuple[str, str, bool]]:
    store = SQLiteStore(path, readonly=True)
    with contextlib.closing(store):
        ((answer,),) = store.rows("PRAGMA integrity_check(1)")
        yield "store", f"{path}: {answer}", answer == "ok"
        ((mode,),) = store.rows("PRAGMA journal_mode")
        yield "journal", mode, True
        ((components,),) = store.rows("SELECT COUNT(*) FROM flexiflow_components")
        yield "components", f"{components:,}", True


@command("status", "list the components, or show all about one", "status order-17",
    _option("component", nargs="?", help="a component's name"), _DB, _JSON)
def _status(args: Any) -> int:
    engine = _engine(args, readonly=True)
    with contextlib.closing(engine.store):  # type: ignore[type-var]
        found = engine.status(args.component)
        if args.json:
            for facts in found:
                say_json(facts)
        elif args.component is not None:
            _show_component(engine, found[0])
        else:
            now = engine.clock()
            table(("COMPONENT", "STATE", "SINCE", "V", "WAITING", "NEXT TIMER", "DEAD"),
                [(facts["name"], facts["state"], age(now - (facts["since"] or now)), facts["seq"],
                facts["waiting"], _timer_text(facts["timers"][0], now) if facts["timers"] else "-",
                facts["dead"] or "-") for facts in found])
            waiting = sum(facts["waiting"] for facts in found)
            dead = sum(facts["dead"] for facts in found)
            say(f"{_counted(len(found), 'component')}, {_counted(waiting, 'message')} waiting, "
                + _counted(dead, "dead letter"))
    return 0


def _timer_text(timer: dict[str, Any], now: float) -> str:
    due = timer["due"] - now
    return f"{timer['message']}, in {age(due)}" if due > 0 else f"{timer['message']}, due"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _show_component(engine: FlexiFlowEngine, facts: dict[str, Any]) -> None:
    now = engine.clock()
    since = facts["since"] or now
    say(f"state    {facts['state']}, version {facts['seq']}, since {_when(since)}"
        f" ({age(now - since)})" + ", completed" * (facts["completed"] is not None))
    try:
        say(f"accepts  {', '.join(engine.accepts(facts['name'])) or 'nothing'}")
    except ImportError_ as error:
        say(f"accepts  not known here: {error.what}")
    for timer in facts["timers"]:
        say(f"timer    {_timer_text(timer, now)}")
    say(f"data     {json.dumps(facts['data'], ensure_ascii=False)}")
    say(f"queue    {facts['waiting']} waiting, {facts['dead']} dead")


@command("history", "show what happened to a component, the newest last",
    "history order-17 --limit 20", _option("component", nargs="?",
    help="a component's name; without it, all of them"), _option("--limit", type=int, default=50,
    help="how many steps (default 50)"), _DB, _JSON)
def _history(args: Any) -> int:
    engine = _engine(args, readonly=True)
    with contextlib.closing(engine.store):  # type: ignore[type-var]
        if args.component is not None:
            engine.status(args.component)  # raises if there is none
        steps = engine.history(args.component, limit=max(args.limit, 0))[::-1]
        if args.json:
            for step in steps:
                say_json(step)
            return 0
        table(("V", "WHEN", "COMPONENT", "MESSAGE", "FROM", "TO", "OUTCOME", "ID"),
            [(step["seq"], _when(step["time"]), step["component"], step["message"].get("type", "-"),
            step["from_state"], step["to_state"], step["outcome"], step["id"]) for step in steps])
    return 0


_FILE = _option("file", nargs="?", help="the config (or --config)")


def _given_config(args: Any) -> str:
    path = args.file or _config_path(args)
    if path is None:
        raise ConfigError("No config given", fix="name a file, or set FLEXIFLOW_CONFIG")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return str(path)


@command("explain", "check a config and say what it means", "explain order.json", _FILE, _CONFIG,
    _JSON, _ALLOW, _option("--no-imports", action="store_true",
    help="run none of the config's code"))
def _explain_command(args: Any) -> int:
    found = explain(_given_config(args), imports=not args.no_imports,
        allow_imports=args.allow_import)
    if args.json:
        facts = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)
            if f.name not in ("errors", "warnings", "definition", "states", "packs")}
        facts["states"] = [dataclasses.asdict(one) for one in found.states]
        facts["packs"] = [dataclasses.asdict(one) for one in found.packs]
        for level in ("errors", "warnings"):
            facts[level] = [{"what": one.what, "why": one.why, "fix": one.fix}
                for one in getattr(found, level)]
        say_json({"valid": found.is_valid, **facts})
    else:
        print(found.format())
    return 0 if found.is_valid else 1


@command("visualize", "draw a config as a Mermaid flowchart", "visualize order.json", _FILE,
    _CONFIG, _option("--format", default="mermaid", help="mermaid"),
    _option("-o", "--output", metavar="FILE", help="write to a file"),
    _option("--no-imports", action="store_true", help="run none of the config's code"))
def _visualize_command(args: Any) -> int:
    found = explain(_given_config(args), imports=not args.no_imports)
    if found.errors:
        raise _as_error(found.errors, found.config_path)
    text = visualize(found, format=args.format)
    if args.output:
        write_file(args.output, text + "\n")
    else:
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    examples = "\n".join(f"  flexiflow {example}" for _, _, example, _ in COMMANDS.values())
    parser = argparse.ArgumentParser(prog="flexiflow",
        description=f"examples:\n{examples}\n\nDurable components with JSON state machines.",
        epilog="exit status: 0 done, 1 failed, 2 wrong usage, 3 message not accepted",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-V", "--version", action="version", version=f"flexiflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (run, text, example, options) in COMMANDS.items():
        one = commands.add_parser(name, help=text,
            description=f"example: flexiflow {example}\n\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter, aliases=[name.replace("_", "-")]
            if "_" in name else [], allow_abbrev=False)
        for names, settings in options:
            one.add_argument(*names, **settings)
        one.set_defaults(run=run)
    return parser


def _parse(argv: list[str]) -> Any:
    parser = _parser()
    known = [*COMMANDS, *(name.replace("_", "-") for name in COMMANDS)]
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        parser.error(f"no command {argv[0]!r}; {choose(argv[0], COMMANDS)}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII console is no reason to die
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        get_logger(level=logging.WARNING)
        code = args.run(args)
        sys.stdout.flush()
        return int(code)
    except SystemExit as stop:  # argparse: help, version, usage
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("FLEXIFLOW_DEBUG") == "1":
            raise
        known = isinstance(error, FlexiFlowError)
        text = str(error) if known else f"{type(error).__name__}: {printable(error)}"
        print(f"error: {text}", file=sys.stderr)
        if not known:
            print("Fix: FLEXIFLOW_DEBUG=1 shows where it comes from", file=sys.stderr)
        return 1


# 1.0.1 was a package: each of its modules is this one, so that `from flexiflow.engine import
# FlexiFlowEngine` and the pickles of its users still find what they name. Last, because another
# thread must not find a module half made.
for _old in ("api cli component config_loader engine errors event_manager explain imports logger "
        "pack_loader reload state_machine statepack visualize extras extras.persist_json "
        "extras.persist_sqlite extras.retry").split():
    sys.modules[f"{__name__}.{_old}"] = sys.modules[__name__]
    globals().setdefault(_old.rpartition(".")[2], sys.modules[__name__])
