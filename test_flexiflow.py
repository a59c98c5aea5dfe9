"""What FlexiFlow promises, as tests: the sections of flexiflow.py in the same order.

    python -m unittest test_flexiflow

needs nothing but this file, flexiflow.py and examples/. Tests on `../shared/data` are skipped, and
say so, where that folder is missing.
"""
from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import html.parser
import http.client
import inspect
import io
import itertools
import json
import logging
import os
import pickle
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import unittest.mock
import zlib
from collections import Counter
from pathlib import Path
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import flexiflow as ff
from flexiflow import (
    AsyncComponent, AsyncEventManager, ConfigError, ConfigLoader, FlexiFlowEngine, FlexiFlowError,
    ImportError_, PersistenceError, Receipt, SQLiteStore, State, StateError, StateMachine, explain,
)

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared" / "data"


class Clock:
    """A clock that the test moves by hand."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def change_messages(db, sql, *values):
    """Change messages as another process would: their checksums fit."""
    db.create_function("checksum", -1, ff.checksum)
    db.execute(f"UPDATE flexiflow_messages SET {sql}", values)
    db.execute(f"UPDATE flexiflow_messages SET crc=checksum({ff._columns(ff._MESSAGE)})")


class Recorder:
    """A handler whose log is compared and cleared."""

    def __init__(self, *keys: str) -> None:
        self.keys, self.log = keys, []

    def __call__(self, data):
        self.log.append(tuple(data.get(key) for key in self.keys) if self.keys else data)

    def take(self):
        log, self.log = self.log, []
        return log


class Case(unittest.TestCase):
    """A test with a folder of its own, that runs coroutines and child processes."""

    maxDiff = None

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="flexiflow-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.addCleanup(self._forget_new_states, ff.DEFAULT_REGISTRY.names())

    @staticmethod
    def _forget_new_states(known) -> None:
        """Take out of the default registry what the test has put into it."""
        for name in set(ff.DEFAULT_REGISTRY.names()) - set(known):
            ff.DEFAULT_REGISTRY.unregister(name)

    def path(self, name: str = "flow.db") -> str:
        return str(self.folder / name)

    def write(self, name: str, content) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.path(name)

    def run_async(self, coroutine):
        return asyncio.run(coroutine)

    def python(self, *args: str, **settings):
        """Run a Python child process in the test's folder, flexiflow importable; return it."""
        env = {**os.environ, "PYTHONPATH": str(HERE), **settings.pop("env", {})}
        env = {key: value for key, value in env.items() if value is not None}
        return subprocess.run(
            [sys.executable, *args], cwd=settings.pop("cwd", self.folder), env=env, timeout=60,
            capture_output=True, encoding=settings.pop("encoding", "utf-8"), **settings,
        )

    def flexiflow(self, *args: str, **settings):
        """Run the command line in a child process; return it."""
        return self.python("-m", "flexiflow", *args, **settings)

    def raises(self, error, call, *args, **kwargs):
        """Return the error that a call raises."""
        with self.assertRaises(error) as caught:
            call(*args, **kwargs)
        return caught.exception

    def logged(self):
        """Collect what FlexiFlow logs, formatted, for the rest of the test; return the list."""
        lines = []

        class Keep(logging.Handler):
            def emit(self, record):
                lines.append(f"{record.levelname} {record.correlation_id} {record.getMessage()}")

        handler, log = Keep(), logging.getLogger("flexiflow")
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        self.addCleanup(log.setLevel, level)
        self.addCleanup(log.removeHandler, handler)
        return lines
# --------------------------------------------------------------------------------------------
# 1. Errors
# --------------------------------------------------------------------------------------------


class Errors(Case):
    def test_an_error_prints_what_why_fix_and_context(self):
        error = ConfigError(
            "No initial state", why="nothing says where to begin",
            fix='add "initial_state": "Idle"', config_path="a.json", count=2)
        self.assertEqual(str(error), textwrap.dedent("""\
            No initial state
            Why: nothing says where to begin
            Fix: add "initial_state": "Idle"
            Context:
              config_path='a.json'
              count=2"""))

    def test_what_is_not_known_is_left_out(self):
        table = [
            ({}, "Gone"),
            ({"why": "it was removed"}, "Gone\nWhy: it was removed"),
            ({"fix": ""}, "Gone"),
            ({"n": 1}, "Gone\nContext:\n  n=1"),
        ]
        for given, expected in table:
            with self.subTest(given):
                self.assertEqual(str(FlexiFlowError("Gone", **given)), expected)

    def test_a_context_is_built_by_hand_as_in_1_0_1(self):
        context = ff.ErrorContext().add("key", "value").add("n", 1)
        error = StateError("Gone", context=context)
        self.assertEqual(context.format(), "  key='value'\n  n=1")
        self.assertEqual(str(error), "Gone\nContext:\n  key='value'\n  n=1")
        self.assertEqual(ff.ErrorContext().format(), "")
        self.assertEqual(FlexiFlowError("Gone").context.items, {})

    def test_one_base_class_stands_above_all(self):
        builtin = {
            ConfigError: False, StateError: False, PersistenceError: False, ImportError_: False,
            ff.ArgumentError: True,
        }
        found = {
            kind: issubclass(kind, ValueError) for kind in builtin
            if issubclass(kind, FlexiFlowError) and not issubclass(kind, ImportError)
        }
        self.assertEqual(found, builtin)

    def test_several_lines_of_a_fix_stand_below_each_other(self):
        error = StateError("Gone", fix="register it\nor use another")
        self.assertEqual(str(error), "Gone\nFix: register it\n     or use another")

    def test_control_and_bidi_characters_are_printed_escaped(self):
        bad = "a\n\x1b[2J\u202e\u2028\x85\ud800b"
        safe = r"a\n\x1b[2J\u202e\u2028\x85\ud800b"
        error = StateError(f"Gone: {bad}", why="it is\x07 bad", fix="\x9bdo", key="a\u202eb\u2066")
        self.assertEqual(str(error), "\n".join([
            f"Gone: {safe}", r"Why: it is\x07 bad", r"Fix: \x9bdo", "Context:",
            r"  key='a\u202eb\u2066'",
        ]))

    def test_a_long_value_is_cut(self):
        error = StateError("Gone", data="x" * 10_000)
        shown = "'" + "x" * 496 + "..."
        self.assertEqual(error.context.format(), f"  data={shown}")

    def test_errors_survive_pickling(self):
        config = {"name": "m", "initial_state": "A", "states": {"A": {}}, "rules": []}
        engine = FlexiFlowEngine()
        engine.create_component({**config, "rules": [{"on": "go"}]})
        unknown = self.raises(StateError, self.run_async, engine.handle_message("m", "og"))
        missing = self.raises(FileNotFoundError, ff.load_snapshot, self.path("none.json"))
        given = [
            ConfigError("No", why="w", fix="f", a=1), ff.ArgumentError("No", b=[2]), unknown,
            missing,
        ]
        for error in given:
            with self.subTest(type(error).__name__):
                copy = pickle.loads(pickle.dumps(error))
                expected = (type(error), str(error), error.args, vars(error).keys())
                found = (type(copy), str(copy), copy.args, vars(copy).keys())
                self.assertEqual(found, expected)
        self.assertEqual(pickle.loads(pickle.dumps(unknown)).receipt, unknown.receipt)

    def test_the_cause_is_chained(self):
        table = [
            (ConfigLoader.load_component_config, self.write("a.json", "{"), ConfigError,
             json.JSONDecodeError),
            (ff.load_snapshot, self.write("s.json", "{"), PersistenceError, json.JSONDecodeError),
            (ff.load_symbol, "no_such_module_here:X", ImportError_, ModuleNotFoundError),
            (ff.load_symbol, "json:no_such_name", ImportError_, AttributeError),
        ]
        for call, argument, kind, cause in table:
            with self.subTest(argument):
                error = self.raises(kind, call, argument)
                self.assertIsInstance(error.__cause__, cause)

    def test_a_module_whose_own_import_fails_shows_why(self):
        """E3: the real cause was dropped, and the module called missing."""
        self.write("broken_t01.py", "import the_missing_part")
        child = self.python("-c", "import flexiflow; flexiflow.load_symbol('broken_t01:X')")
        lines = child.stderr.splitlines()
        self.assertIn("ModuleNotFoundError: No module named 'the_missing_part'", lines)
        self.assertNotIn("not found: 'broken_t01'", child.stderr)

    def test_a_close_match_is_suggested(self):
        error = self.raises(ff.ArgumentError, ff.get_logger, "t01", style="jsno")
        self.assertEqual(str(error), "Unknown log style: 'jsno'\nFix: did you mean 'json'?")


# --------------------------------------------------------------------------------------------
# 2. Ground: strict JSON, ids, logging
# --------------------------------------------------------------------------------------------


class ReadingJson(Case):
    def read(self, source):
        return ff.read_json(source, "a.json", ConfigError)

    def suite(self, *expected):
        """Yield name and bytes of the documents of JSONTestSuite that a parser is to take so."""
        import base64

        path = SHARED / "json_test_suite.ndjson"
        if not path.exists():
            self.skipTest(f"{path} is missing")
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["expect"] in expected:
                text, count = entry.get("repeat", ("", 0))
                source = base64.b64decode(entry.get("base64", ""))
                yield entry["name"], source or (text * count + entry.get("tail", "")).encode()

    def test_every_document_to_reject_is_refused(self):
        taken, count = [], 0
        for name, source in self.suite("reject"):
            count += 1
            with self.subTest(name), contextlib.suppress(ConfigError):
                taken.append((name, self.read(source)))
        self.assertEqual((taken, count), ([], 188))

    def test_every_document_to_accept_is_taken_but_those_with_duplicate_keys(self):
        refused, count = set(), 0
        for name, source in self.suite("accept"):
            count += 1
            try:
                self.assertEqual(self.read(source), json.loads(source))
            except ConfigError:
                refused.add(name)
        duplicates = {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}
        self.assertEqual((refused, count), (duplicates, 95))

    def test_every_other_document_is_taken_or_refused_by_name(self):
        for name, source in self.suite("either"):
            with self.subTest(name), contextlib.suppress(ConfigError):
                value = self.read(source)
                self.assertEqual(self.read(ff.write_json(value)), value)

    def test_what_is_not_strict_json_is_refused(self):
        """P8: raw UnicodeDecodeError, RecursionError and ValueError; the rest was accepted."""
        table = [
            (b'"\xff"', "'utf-8' codec can't decode byte 0xff in position 1: invalid start byte"),
            ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
            ("[NaN]", "NaN is not JSON"),
            ("[-Infinity]", "-Infinity is not JSON"),
            ("[1e400]", "the number 1e400 is too large"),
            ("1" * 5000, "a number of 5000 digits; 4300 are allowed"),
            ("[" * 101 + "]" * 101, "more than 100 brackets within brackets"),
            ('{"":' * 101 + "1" + "}" * 101, "more than 100 brackets within brackets"),
            (b'"' + b"a" * 1_000_000 + b'"', "more than 1000000 bytes"),
            ('"' + "a" * 1_000_000 + '"', "more than 1000000 bytes"),
            ('"' + "\u20ac" * 400_000 + '"', "more than 1000000 bytes"),
            ("", "Expecting value: line 1 column 1 (char 0)"),
            ("{} {}", "Extra data: line 1 column 4 (char 3)"),
        ]
        for source, why in table:
            with self.subTest(why, source=source[:20]):
                error = self.raises(PersistenceError, ff.read_json, source, "a", PersistenceError)
                self.assertEqual(str(error), f"Not valid JSON: a\nWhy: {why}")

    def test_lone_surrogates_are_refused_wherever_they_stand(self):
        sources = ['"\\ud800"', '{"\\udc00": 1}', '["\\ud83d x"]', '"\ud800"', b'"\xed\xa0\x80"']
        for source in sources:
            with self.subTest(source):
                self.raises(ConfigError, self.read, source)
        self.assertEqual(self.read('"\\ud83d\\ude00"'), "\U0001f600")

    def test_a_hundred_levels_are_taken_and_brackets_in_text_do_not_count(self):
        deep = "[" * 100 + "]" * 100
        text = '["' + "[{" * 200 + '\\"[[[\\\\", {"a}]": "' + "{" * 101 + '"}]'
        self.assertEqual(self.read(deep), json.loads(deep))
        self.assertEqual(self.read(text), json.loads(text))

    def test_the_depth_is_checked_before_parsing_also_on_a_small_stack(self):
        child = self.python("-c", textwrap.dedent("""\
            import threading
            import flexiflow as ff

            def main():
                for source in ("[" * 10**5, '{"a":' * 10**5, '[{"":' * 50_000, "[[]," * 10**5):
                    try:
                        ff.read_json(source, "deep", ff.ConfigError)
                    except ff.ConfigError as error:
                        print(error.why)

            threading.stack_size(256 * 1024)
            thread = threading.Thread(target=main)
            thread.start()
            thread.join()
            """))
        lines = ["more than 100 brackets within brackets"] * 4
        self.assertEqual((child.returncode, child.stdout.splitlines()), (0, lines), child.stderr)


class WritingJson(Case):
    def test_what_is_written_reads_back_the_same(self):
        table = [
            None, True, 0, -7, 1.5, -0.0, 1e-320, 10**400, 10**4300 - 1, 1 - 10**4300, "",
            "a\u2028\u0000\U0001f600\"\\",
            [], {}, [1, [2, {"b": [], "a": {}}]], {"": None, "\u00e9": [False]},
            json.loads("[" * 100 + "]" * 100),
        ]
        for value in table:
            with self.subTest(str(value)[:40]):
                text = ff.write_json(value)
                self.assertEqual(ff.read_json(text, "a", ConfigError), value)

    def test_the_text_is_compact_and_its_keys_are_sorted(self):
        text = ff.write_json({"b": [1, 2.0], "a": {"d": "\u00e9", "c": None}})
        self.assertEqual(text, '{"a":{"c":null,"d":"\u00e9"},"b":[1,2.0]}')

    def test_what_would_change_is_refused_by_name(self):
        table = [
            ((1, 2), "data is a tuple"),
            ({"a": [{"b": (1,)}]}, "data.a[0].b is a tuple"),
            ({"a": {1: 2}}, "the key 1 at data.a is not a string"),
            ({None: 2}, "the key None at data is not a string"),
            ({True: 2}, "the key True at data is not a string"),
            ({"x": float("nan")}, "data.x is nan"),
            ([float("-inf")], "data[0] is -inf"),
            ({"x": {1, 2}}, "data.x is a set"),
            ({"x": b"1"}, "data.x is a bytes"),
            ({"x": Path("a")}, f"data.x is a {type(Path()).__name__}"),
            ("a" * 1_000_000, "data takes 1000002 bytes; 1000000 are allowed"),
            ("\u00e9" * 500_000, "data takes 1000002 bytes; 1000000 are allowed"),
        ]
        for value, problem in table:
            with self.subTest(problem):
                error = self.raises(ValueError, ff.write_json, value, "data")
                self.assertEqual(str(error), problem)

    def test_subclasses_of_json_s_types_are_written_if_they_read_back_equal(self):
        import collections
        import enum

        class Text(str):
            pass

        class Apart(str):  # two of them are two keys of a dict, and one of an object
            __hash__ = object.__hash__

            def __eq__(self, other):
                return self is other

        class Half(float):
            def __eq__(self, other):
                return False

        number = enum.IntEnum("Number", "ONE")
        good = {Text("b"): number.ONE, "a": collections.OrderedDict(x=[Text("t"), 1.5])}
        self.assertEqual(ff.write_json(good), '{"a":{"x":["t",1.5]},"b":1}')
        for value, problem in [
            ({Apart("a"): 1, Apart("a"): 1}, "data: the key 'a' stands twice in one object"),
            ({"x": [Half(0.5)]}, "data reads back as another value"),
            ({"x": [type("Far", (float,), {})("inf")]}, "data.x[0] is inf"),
        ]:
            with self.subTest(problem):
                error = self.raises(ValueError, ff.write_json, value, "data")
                self.assertEqual(str(error), problem)

    def test_one_list_in_many_places_is_counted_each_time(self):
        value = []
        for _ in range(60):
            value = [value, value]
        error = self.raises(ValueError, ff.write_json, value, "data")
        self.assertRegex(str(error), "^data.*or too much$")

    def test_what_the_reader_refuses_is_not_written(self):
        circle = []
        circle.append(circle)
        deep = []
        for _ in range(100):
            deep = [deep]
        for value in ({"x": "\ud800"}, {"\udc00": 1}, deep, circle, 10**5000, {"x": -(10**5000)}):
            with self.subTest(repr(type(value))):
                error = self.raises(ValueError, ff.write_json, value, "data")
                self.assertRegex(str(error), "^data")

    def test_what_is_far_too_deep_is_refused_also_on_a_small_stack(self):
        child = self.python("-c", textwrap.dedent("""\
            import threading
            import flexiflow as ff

            def main():
                for key in (None, "a"):
                    value = 1
                    for _ in range(10**5):
                        value = [value] if key is None else {key: value}
                    try:
                        ff.write_json(value, "deep")
                    except ValueError as error:
                        print(str(error)[:4])
                    while value != 1:
                        value = value[key or 0]

            threading.stack_size(256 * 1024)
            thread = threading.Thread(target=main)
            thread.start()
            thread.join()
            """))
        lines = ["deep"] * 2
        self.assertEqual((child.returncode, child.stdout.splitlines()), (0, lines), child.stderr)

    def test_a_limit_is_the_size_that_still_passes(self):
        self.assertEqual(ff.write_json("\u00e9a", limit=5), '"\u00e9a"')
        error = self.raises(ValueError, ff.write_json, "\u00e9ab", "text", 5)
        self.assertEqual(str(error), "text takes 6 bytes; 5 are allowed")


class Ids(Case):
    def test_every_new_id_is_another(self):
        import contextvars

        ids = {contextvars.copy_context().run(ff.set_correlation_id) for _ in range(1000)}
        self.assertEqual((len(ids), {type(one) for one in ids}), (1000, {str}))

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_parent_and_child_make_different_ids(self):
        child = self.python("-c", textwrap.dedent("""\
            import os, flexiflow
            flexiflow.set_correlation_id()
            pid = os.fork()
            os.write(1, flexiflow.set_correlation_id().encode() + b"\\n")
            pid and os.waitpid(pid, 0)
            """))
        self.assertEqual(len(set(child.stdout.split())), 2, child)

    def test_an_id_is_set_for_this_task_only(self):
        async def task(value):
            ff.set_correlation_id(value)
            await asyncio.sleep(0)
            return ff.get_correlation_id()

        async def main():
            ff.set_correlation_id("outer")
            inner = await asyncio.gather(task("a"), task("b"))
            return [*inner, ff.get_correlation_id()]

        self.assertEqual(self.run_async(main()), ["a", "b", "outer"])

    def test_a_task_starts_with_the_id_of_who_made_it(self):
        async def task():
            return ff.get_correlation_id()

        async def main():
            before = await asyncio.ensure_future(task())
            ff.set_correlation_id("outer")
            return before, await asyncio.ensure_future(task())

        self.assertEqual(self.run_async(main()), (None, "outer"))


class LogCase(Case, unittest.IsolatedAsyncioTestCase):
    CONFIG = {
        "name": "m", "initial_state": "A", "states": {"A": {}, "B": {}},
        "rules": [{"from": "A", "on": "go", "to": "B", "action": "code_of_t02:act"}],
    }

    def setUp(self):
        super().setUp()
        self.module = types.ModuleType("code_of_t02")
        sys.modules["code_of_t02"] = self.module
        self.addCleanup(sys.modules.pop, "code_of_t02", None)
        self.log = logging.getLogger("flexiflow")

    async def asyncSetUp(self):
        self.engine = FlexiFlowEngine()
        self.addAsyncCleanup(self.engine.close)

    def printed(self, style="text", name="flexiflow.test"):
        """Return a logger as `get_logger` makes it, and the stream that it prints to."""
        stream = io.StringIO()
        for one in map(logging.getLogger, {"", "flexiflow", name}):
            self.addCleanup(one.setLevel, one.level)
            self.addCleanup(setattr, one, "handlers", one.handlers)
            self.addCleanup(setattr, one, "propagate", one.propagate)
            one.handlers = []
        with contextlib.redirect_stderr(stream):
            return ff.get_logger(name, style=style), stream

    def controls(self, text):
        """Return the characters that could forge a line or turn the text around."""
        import unicodedata

        bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        kinds = ("Cc", "Cs", "Zl", "Zp")
        return [one for one in text if one in bidi or unicodedata.category(one) in kinds]

    def naughty(self):
        path = SHARED / "naughty_strings.json"
        if not path.exists():
            self.skipTest(f"{path} is missing")
        return json.loads(path.read_text(encoding="utf-8"))


class CorrelationIds(LogCase):
    async def test_a_message_brings_its_id_to_actions_handlers_and_their_tasks(self):
        async def task():
            self.log.info("task")

        async def act(message, component):
            self.log.info("action")
            await asyncio.ensure_future(task())

        async def handler(data):
            self.log.info("handler")

        self.module.act = act
        self.engine.create_component(self.CONFIG)
        for delivery in ("state.changed", "component.message.received"):
            await self.engine.event_bus.subscribe(delivery, "test", handler)
        lines = self.logged()
        await self.engine.handle_message("m", "go", correlation_id="c-1")
        found = [line for line in lines if line.split()[-1] in ("action", "task", "handler")]
        self.assertEqual(found, [
            "INFO c-1 action", "INFO c-1 task", "INFO c-1 handler", "INFO c-1 handler"])

    async def test_a_message_without_an_id_takes_that_of_its_context_or_a_new_one(self):
        seen = []
        self.module.act = lambda message, component: seen.append(ff.get_correlation_id())
        for name in ("m", "n", "o"):
            self.engine.create_component(self.CONFIG, name=name)
        await self.engine.handle_message("m", "go")
        ff.set_correlation_id("mine")
        await self.engine.handle_message("n", "go")
        await self.engine.handle_message("o", "go", correlation_id="its own")
        self.assertEqual(seen[1:], ["mine", "its own"])
        self.assertRegex(seen[0], "^[0-9a-f-]{8,}$")

    async def test_the_id_is_restored_by_value_after_the_message(self):
        self.module.act = lambda message, component: ff.set_correlation_id("changed inside")
        self.engine.create_component(self.CONFIG)
        ff.set_correlation_id("before")
        await self.engine.handle_message("m", "go", correlation_id="c-1")
        self.assertEqual(ff.get_correlation_id(), "before")

    async def test_the_id_is_restored_after_a_failure(self):
        def act(message, component):
            raise KeyError("k")

        self.module.act = act
        self.engine.create_component(self.CONFIG)
        ff.set_correlation_id("before")
        with self.assertRaises(KeyError):
            await self.engine.handle_message("m", "go", correlation_id="c-1")
        self.assertEqual(ff.get_correlation_id(), "before")

    async def test_components_at_once_keep_their_ids_apart(self):
        async def act(message, component):
            await asyncio.sleep(0)
            self.log.info("in %s", component.name)

        self.module.act = act
        names = [f"m{number}" for number in range(5)]
        for name in names:
            self.engine.create_component(self.CONFIG, name=name)
        lines = self.logged()
        await asyncio.gather(*(
            self.engine.handle_message(name, "go", correlation_id=f"c-{name}") for name in names))
        found = sorted(line for line in lines if " in m" in line)
        self.assertEqual(found, [f"INFO c-{name} in {name}" for name in names])

    async def test_a_record_that_has_an_id_keeps_it(self):
        lines = self.logged()
        self.log.info("mine", extra={"correlation_id": "given"})
        self.log.info("none")
        self.assertEqual(lines, ["INFO given mine", "INFO - none"])

    def test_the_filter_of_1_0_1_works_on_any_handler(self):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.addFilter(ff.CorrelationIdFilter())
        handler.setFormatter(logging.Formatter("%(correlation_id)s %(message)s"))
        log = logging.Logger("of the application")
        log.addHandler(handler)

        def work():
            ff.set_correlation_id("c-9")
            log.warning("%s at %d", "fire", 5)

        import contextvars

        contextvars.copy_context().run(work)
        self.assertEqual(stream.getvalue(), "c-9 fire at 5\n")


class Logging(LogCase):
    async def test_a_name_with_line_breaks_forges_no_line(self):
        """L1: a newline in a name wrote a second line, and ESC went to the terminal."""
        self.module.act = print
        log, stream = self.printed(name="flexiflow")
        log.setLevel(logging.DEBUG)
        name = "m\n2026-01-01 INFO flexiflow paid\x1b[2J\u202e\u2028x"
        engine = FlexiFlowEngine()
        engine.register(AsyncComponent(name))
        with contextlib.suppress(StateError):
            await engine.handle_message(name, "no such message\n\x1b[31m")
        log.warning("Component %r and %s", name, name)
        *lines, last = stream.getvalue().split("\n")
        self.assertEqual((self.controls("".join(lines)), last), ([], ""))
        self.assertEqual([line for line in lines if line.startswith("2026-01-01 INFO")], [])

    def test_a_record_is_one_line_whatever_the_data_holds(self):
        log, stream = self.printed()
        strings = [*self.naughty(), "a\r\nb\x00\x0b\x0c\x1b\x85\u2028\u2029\u202e\ud800", "%s %d"]
        for text in strings:
            log.error("Bad %s and %r", text, {text: text})
        lines = stream.getvalue().split("\n")[:-1]
        bad = [one for line in lines for one in self.controls(line)]
        self.assertEqual((len(lines), bad), (len(strings), []))

    def test_a_traceback_stands_in_the_line(self):
        log, stream = self.printed()
        for text in ("simple", "two\nlines\u2028x", "\x1b[2J\ud800"):
            try:
                raise ValueError(text)
            except ValueError:
                log.exception("Failed")
        lines = stream.getvalue().splitlines()
        self.assertEqual([line.partition(" Failed | ")[2].split(" | ")[0] for line in lines], [
            "Traceback (most recent call last):"] * 3)
        self.assertEqual([line.split("ValueError: ")[1] for line in lines], [
            "simple", r"two\nlines\u2028x", r"\x1b[2J\ud800"])

    def test_a_line_says_when_how_bad_who_and_which_message(self):
        log, stream = self.printed()
        log.warning("Full: %d%%", 100, extra={"correlation_id": "c-1"})
        self.assertRegex(
            stream.getvalue(), r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING flexiflow\.test "
            r"correlation_id=c-1 Full: 100%\n$")

    def test_json_style_prints_an_object_a_line(self):
        log, stream = self.printed("json")
        log.warning("Full: %s", "\u00e9\n\"", extra={"correlation_id": "c-1"})
        entry = json.loads(stream.getvalue())
        self.assertRegex(entry.pop("time"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}$")
        self.assertEqual(entry, {
            "level": "WARNING", "logger": "flexiflow.test", "correlation_id": "c-1",
            "message": "Full: \u00e9\\n\""})

    def test_json_style_holds_whatever_the_data_holds(self):
        log, stream = self.printed("json")
        strings = self.naughty()
        for text in strings:
            log.error("Bad %s", text, extra={"correlation_id": text})
        entries = [json.loads(line) for line in stream.getvalue().splitlines()]
        self.assertTrue([entry["correlation_id"] for entry in entries] == strings)

    def test_an_unknown_style_is_refused(self):
        error = self.raises(ff.ArgumentError, ff.get_logger, "t02", style="xml")
        self.assertEqual(str(error), "Unknown log style: 'xml'\nFix: use one of 'json', 'text'")

    def test_get_logger_works_as_the_users_of_1_0_1_call_it(self):
        """L2: every call set the level again."""
        log, _ = self.printed(name="t02")
        first = log.level, len(log.handlers)
        log.setLevel(logging.ERROR)
        again = ff.get_logger("t02")
        second = again is log, again.level, len(again.handlers)
        third = ff.get_logger("t02", logging.DEBUG).level
        self.assertEqual(
            (first, second, third, ff.get_logger().name),
            ((logging.INFO, 1), (True, logging.ERROR, 1), logging.DEBUG, "flexiflow"))

    def test_nothing_is_printed_twice(self):
        """L2: an application with logging.basicConfig() saw every line twice."""
        setup = "logging.basicConfig(level='INFO', format='APP %(message)s')"
        work = (
            "bus = flexiflow.FlexiFlowEngine().event_bus\n"
            "asyncio.run(bus.subscribe('e', 'c', lambda data: 1 / 0))\n"
            "asyncio.run(bus.publish('e'))\n"
            "logging.getLogger('flexiflow').warning('two')\n"
        )
        table = {
            "no set-up": f"{work}",
            "set up before": f"{setup}\n{work}",
            "set up after": f"flexiflow.FlexiFlowEngine()\n{setup}\n{work}",
            "get_logger first": f"flexiflow.get_logger()\n{setup}\n{work}",
            "get_logger last": f"{setup}\nflexiflow.get_logger()\n{work}",
            "get_logger often": f"[flexiflow.get_logger() for _ in range(3)]\n{work}",
            "an own logger": f"{setup}\nflexiflow.get_logger('flexiflow.own')\n{work}",
        }
        for name, code in table.items():
            with self.subTest(name):
                child = self.python("-c", f"import asyncio, logging, flexiflow\n{code}")
                lines = child.stderr.splitlines()
                found = [line.rpartition("ZeroDivisionError")[1] or line[-3:] for line in lines]
                self.assertEqual((found, child.stdout), (["ZeroDivisionError", "two"], ""), lines)

    def test_an_import_changes_nothing_of_the_application_s_logging(self):
        child = self.python("-c", textwrap.dedent("""\
            import logging, flexiflow
            log = logging.getLogger("flexiflow")
            flexiflow.FlexiFlowEngine()
            print(logging.root.handlers, logging.root.level, log.handlers, log.level, log.propagate)
            """))
        self.assertEqual((child.stdout, child.stderr), ("[] 30 [] 0 True\n", ""))

    def test_logging_is_imported_when_something_is_logged(self):
        child = self.python("-I", "-S", "-c", textwrap.dedent(f"""\
            import sys
            sys.path.append({str(HERE)!r})
            import flexiflow
            before = "logging" in sys.modules
            ours = flexiflow.logger
            ours.propagate = False
            import logging
            log = logging.getLogger("flexiflow")
            log.addHandler(logging.StreamHandler(sys.stdout))
            log.handlers[0].setFormatter(logging.Formatter(flexiflow.LOG_FORMAT[12:]))
            ours.warning("%s", "two\\nlines")
            print(before, log.propagate, log.filters == [flexiflow._one_line])
            """))
        self.assertEqual((child.stdout, child.stderr), (
            "WARNING flexiflow correlation_id=- two\\nlines\nFalse False True\n", ""))

    async def test_a_message_is_logged_at_debug_only(self):
        self.module.act = lambda message, component: None
        lines = self.logged()
        self.engine.create_component(self.CONFIG)
        await self.engine.handle_message("m", "go")
        await self.engine.handle_message("m", "go")
        self.assertEqual({line.split()[0] for line in lines} - {"DEBUG"}, set())

    async def test_secrets_are_masked(self):
        self.module.act = lambda message, component: 1 / 0
        lines = self.logged()
        self.engine.create_component(self.CONFIG)
        await self.engine.event_bus.subscribe("state.changed", "test", lambda data: 1 / 0)
        for field in ("token", "password", "client_secret"):
            with contextlib.suppress(ZeroDivisionError):
                await self.engine.handle_message("m", "go", **{field: "hunter2"})
        await self.engine.send("m", "go", password="hunter2")
        await self.engine.run(until_idle=True)
        self.assertEqual([line for line in lines if "hunter2" in line], [])


# --------------------------------------------------------------------------------------------
# 3. Retry
# --------------------------------------------------------------------------------------------


class Retry(Case):
    """Calls, pauses and time are kept by the test: nothing sleeps."""

    def setUp(self):
        super().setUp()
        from unittest import mock

        self.calls, self.pauses, self.chance = [], [], 0.0
        now = [1000.0]

        def sleep(seconds):
            self.pauses.append(seconds)
            now[0] += seconds

        async def sleep_async(seconds, *result):
            sleep(seconds)

        self.spend = lambda seconds: now.__setitem__(0, now[0] + seconds)
        changes = [
            ("time.sleep", sleep), ("asyncio.sleep", sleep_async),
            ("time.monotonic", lambda: now[0]), ("random.random", lambda: self.chance),
        ]
        for name, value in changes:
            patch = mock.patch(name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def try_plain(self, errors, **settings):
        """Call a plain function whose calls end in these errors, then in "done"."""

        @ff.retry_async(ff.RetryConfig(**settings))
        def job(*args, **kwargs):
            self.calls.append((args, kwargs))
            if len(self.calls) <= len(errors):
                raise errors[len(self.calls) - 1]
            return "done"

        return job(1, two=2)

    def try_async(self, errors, **settings):
        """The same with a coroutine function."""

        @ff.retry_async(ff.RetryConfig(**settings))
        async def job(*args, **kwargs):
            self.calls.append((args, kwargs))
            if len(self.calls) <= len(errors):
                raise errors[len(self.calls) - 1]
            return "done"

        return self.run_async(job(1, two=2))

    def outcome(self, way, errors, **settings):
        """Return the result or error, the number of calls and the pauses, rounded."""
        self.calls.clear()
        self.pauses.clear()
        try:
            end = way(errors, **settings)
        except BaseException as error:
            end = error
        return end, len(self.calls), [round(pause, 6) for pause in self.pauses]

    def check(self, expected, errors, **settings):
        """Compare the outcome of both ways of calling."""
        for way in (self.try_plain, self.try_async):
            with self.subTest(way.__name__):
                self.assertEqual(self.outcome(way, errors, **settings), expected)

    def test_a_call_that_works_is_made_once(self):
        self.check(("done", 1, []), [])

    def test_a_failed_call_is_made_again_with_the_same_arguments(self):
        self.check(("done", 3, [0.1, 0.2]), [OSError(), KeyError()])
        self.assertEqual(self.calls, [((1,), {"two": 2})] * 3)

    def test_the_last_exception_is_raised_as_it_was(self):
        errors = [OSError(number) for number in range(9)]
        self.check((errors[3], 4, [0.1, 0.2, 0.4]), errors, max_attempts=4)

    def test_one_attempt_is_no_retry(self):
        error = OSError()
        self.check((error, 1, []), [error], max_attempts=1)

    def test_pauses_grow_up_to_the_cap(self):
        self.check(
            ("done", 7, [1, 3, 9, 20, 20, 20]), [OSError()] * 6,
            max_attempts=7, base_delay=1, backoff=3, max_delay=20)

    def test_jitter_survives_the_cap(self):
        """R1: jitter was 0 at the cap, so all clients knocked together."""
        self.chance = 0.5
        self.check(
            ("done", 5, [1.25, 2.5, 5, 5]), [OSError()] * 4,
            max_attempts=5, base_delay=1, max_delay=4, jitter=0.5)

    def test_a_pause_that_would_pass_the_timeout_is_not_begun(self):
        error = OSError()
        self.check(
            (error, 3, [1, 2]), [error] * 9, max_attempts=9, base_delay=1, max_delay=9, timeout=6)

    def test_a_pause_that_ends_with_the_timeout_is_taken(self):
        error = OSError()
        self.check(
            (error, 3, [1, 2]), [error] * 9, max_attempts=9, base_delay=1, max_delay=9, timeout=3)

    def test_the_calls_count_for_the_timeout(self):
        error, spend = OSError(), self.spend

        class Slow(list):
            def __getitem__(self, index):
                spend(3)
                return error

        self.check((error, 2, [1]), Slow([0] * 9), max_attempts=9, base_delay=1, timeout=8)

    def test_a_thousand_attempts_do_not_overflow(self):
        pauses = [0.1, 0.2, 0.4] + [0.5] * 1097
        self.check(
            ("done", 1101, pauses), [OSError()] * 1100, max_attempts=1101, max_delay=0.5)

    def test_only_what_is_named_is_tried_again(self):
        error = KeyError("k")
        self.check((error, 2, [0.1]), [OSError(), error], max_attempts=9, retry_on=(OSError,))

    def test_no_exception_that_ends_a_program_is_tried_again(self):
        for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
            error = kind()
            with self.subTest(kind.__name__):
                self.assertEqual(self.outcome(self.try_plain, [error]), (error, 1, []))

    def test_a_cancellation_is_never_tried_again(self):
        for way in (self.try_plain, self.try_async):
            with self.subTest(way.__name__):
                end, calls, pauses = self.outcome(
                    way, [asyncio.CancelledError()] * 2, retry_on=(BaseException,))
                self.assertEqual((type(end), calls, pauses), (asyncio.CancelledError, 1, []))

    def test_a_task_cancelled_in_a_pause_ends(self):
        from unittest import mock

        @ff.retry_async()
        async def job():
            self.calls.append("job")
            raise OSError

        async def main():
            paused = asyncio.Event()

            async def sleep(seconds):
                paused.set()
                await asyncio.Event().wait()

            with mock.patch("asyncio.sleep", sleep):
                task = asyncio.ensure_future(job())
                await paused.wait()
                task.cancel()
                await asyncio.wait([task])
            return task.cancelled()

        self.assertEqual((self.run_async(main()), self.calls), (True, ["job"]))

    def test_the_function_keeps_its_name_and_kind(self):
        """R1: functools.wraps was missing."""

        async def fetch(url: str) -> str:
            """Fetch it."""

        def load(url: str) -> str:
            """Load it."""

        import inspect

        for function in (fetch, load):
            with self.subTest(function.__name__):
                again = ff.retry_async()(function)
                found = (
                    again.__name__, again.__doc__, again.__wrapped__, inspect.signature(again),
                    inspect.iscoroutinefunction(again),
                )
                self.assertEqual(found, (
                    function.__name__, function.__doc__, function, inspect.signature(function),
                    inspect.iscoroutinefunction(function),
                ))

    def test_partials_and_callable_objects_are_awaited(self):
        import functools

        class Job:
            async def __call__(self, value):
                return value

            async def method(self, value):
                return value

        async def job(first, value):
            return value

        for function in (Job(), Job().method, functools.partial(job, 1)):
            with self.subTest(function):
                again = ff.retry_async()(functools.partial(function))
                self.assertEqual(self.run_async(again("x")), "x")

    def test_settings_that_make_no_sense_are_refused(self):
        """R1: max_attempts=1.5 and base_delay=nan were accepted."""
        table = [
            *(("max_attempts", value) for value in (0, -1, 1.5, True, "3", None)),
            *(("base_delay", value) for value in (-1, float("nan"), float("inf"), "1", True)),
            *(("max_delay", value) for value in (-0.1, float("nan"), float("inf"), None)),
            *(("backoff", value) for value in (0.5, -2, float("nan"), float("inf"))),
            *(("jitter", value) for value in (-0.1, 1.1, float("nan"), "0")),
            *(("timeout", value) for value in (-1, float("nan"), "1")),
        ]
        for name, value in table:
            with self.subTest(name, value=value):
                error = self.raises(ValueError, ff.RetryConfig, **{name: value})
                self.assertIsInstance(error, FlexiFlowError)
                self.assertIn(f"{name} is", error.what)
                self.assertIn(repr(value), error.what)

    def test_the_defaults_of_1_0_1_hold(self):
        settings = ff.RetryConfig()
        found = (
            settings.max_attempts, settings.base_delay, settings.max_delay, settings.backoff,
            settings.jitter, settings.retry_on,
        )
        self.assertEqual(found, (3, 0.1, 2.0, 2.0, 0.0, (Exception,)))

    def test_settings_are_a_record_that_dataclasses_know(self):
        import copy
        import dataclasses

        settings = ff.RetryConfig(5, base_delay=1)
        slower = dataclasses.replace(settings, max_attempts=3)
        self.assertEqual(slower, ff.RetryConfig(base_delay=1))
        self.assertEqual(ff.RetryConfig(**dataclasses.asdict(settings)), settings)
        self.assertEqual(len({settings, copy.copy(settings), ff.RetryConfig()}), 2)
        self.assertEqual(repr(settings), "RetryConfig(max_attempts=5, base_delay=1, max_delay=2.0, "
            "backoff=2.0, jitter=0.0, retry_on=(<class 'Exception'>,), timeout=None)")
        with self.assertRaises(dataclasses.FrozenInstanceError):
            settings.backoff = 3
        with self.assertRaisesRegex(TypeError, "__init__.* unexpected keyword argument 'pause'"):
            ff.RetryConfig(pause=3)

        @dataclasses.dataclass(frozen=True)
        class Longer(ff.RetryConfig):
            extra: float = 0.5

        longer = Longer(2, extra=1)
        self.assertEqual((longer.max_attempts, longer.backoff, longer.extra), (2, 2.0, 1))

    def test_something_else_than_settings_is_refused(self):
        error = self.raises(ff.ArgumentError, ff.retry_async, 5)
        self.assertEqual(str(error), "Not a RetryConfig: 5\nFix: @retry_async(RetryConfig())")


# --------------------------------------------------------------------------------------------
# 4. Events: the bus
# --------------------------------------------------------------------------------------------


class BusCase(Case, unittest.IsolatedAsyncioTestCase):
    """Tests on one bus; handlers leave their names in `self.heard`."""

    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)
        self.bus = AsyncEventManager()
        self.heard = []
        self.lines = self.logged()

    def plain(self, name):
        return lambda data: self.heard.append(name)

    def waiting(self, name, passes=2):
        """Return an async handler that notes its begin and its end, a few passes later."""

        async def handler(data):
            self.heard.append(f"{name} begins")
            for _ in range(passes):
                await asyncio.sleep(0)
            self.heard.append(f"{name} ends")

        return handler

    def failing(self, error):
        def handler(data):
            raise error

        return handler

    async def on(self, handler, event="e", owner="c", **settings):
        return await self.bus.subscribe(event, owner, handler, **settings)

    def take(self):
        """Return what was heard since the last time."""
        heard = list(self.heard)
        self.heard.clear()
        return heard

    def failures(self):
        """Return what was logged as failed: level, correlation id, text, exception."""
        found = [line.split(" | ") for line in self.lines if "Traceback" in line]
        self.lines.clear()
        return [(parts[0], parts[-1]) for parts in found]


class Publishing(BusCase):
    async def test_publish_returns_when_every_handler_is_done(self):
        await self.on(self.waiting("a"))
        await self.on(self.waiting("b"))
        await self.bus.publish("e")
        self.assertEqual(self.take(), ["a begins", "a ends", "b begins", "b ends"])
        await self.bus.publish("e", delivery="concurrent")
        self.assertEqual(self.take(), ["a begins", "b begins", "a ends", "b ends"])

    async def test_handlers_are_called_by_priority_then_subscription(self):
        for number, priority in enumerate([3, 5, 1, 3, 2, 1, 4]):
            await self.on(self.plain(f"{priority}-{number}"), priority=priority)
        await self.on(self.plain("3-default"))
        expected = ["1-2", "1-5", "2-4", "3-0", "3-3", "3-default", "4-6", "5-1"]
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(self.take(), expected)

    async def test_a_later_subscription_finds_its_place(self):
        await self.on(self.plain("a"), priority=2)
        await self.bus.publish("e")
        await self.on(self.plain("b"), priority=1)
        await self.on(self.plain("c"), "*", priority=1)
        self.take()
        await self.bus.publish("e")
        self.assertEqual(self.take(), ["b", "c", "a"])

    async def test_whatever_can_be_called_is_a_handler_and_what_is_awaitable_is_awaited(self):
        """B5: a plain handler in concurrent delivery raised TypeError."""
        import functools

        heard = self.heard

        class Callable:
            async def __call__(self, data):
                await asyncio.sleep(0)
                heard.append("object")

            async def method(self, data):
                await asyncio.sleep(0)
                heard.append("method")

        class Awaitable:
            def __init__(self, name):
                self.name = name

            def __await__(self):
                yield from asyncio.sleep(0).__await__()
                heard.append(self.name)

        async def two(name, data):
            await asyncio.sleep(0)
            heard.append(name)

        def future(data):
            made = asyncio.get_running_loop().create_future()
            made.add_done_callback(lambda done: heard.append("future"))
            asyncio.get_running_loop().call_soon(made.set_result, None)
            return made

        @types.coroutine
        def generator(data):
            yield
            heard.append("generator")

        handlers = [
            self.plain("plain"), functools.partial(two, "partial"), Callable(), Callable().method,
            lambda data: Awaitable("awaitable"), lambda data: asyncio.ensure_future(two("task", 0)),
            future, generator, lambda data: heard.append("answers") or [1],
        ]
        for handler in handlers:
            await self.on(handler)
        names = "plain partial object method awaitable task future generator answers".split()
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery, on_error="raise")
                heard_now = self.take()
                order = names if delivery == "sequential" else sorted(names)
                found = heard_now if delivery == "sequential" else sorted(heard_now)
                self.assertEqual(found, order)

    async def test_a_handler_gets_the_data_and_nothing_else(self):
        recorder = Recorder()
        await self.on(recorder)
        for data in (None, {"a": 1}, "text", 0):
            await self.bus.publish("e", data)
        self.assertEqual(recorder.take(), [None, {"a": 1}, "text", 0])

    async def test_what_one_handler_does_to_the_payload_no_other_sees(self):
        """B14: handler 1 changed what handler 2 saw."""
        recorder = Recorder()

        def spoil(data):
            data["items"].append("forged")
            data.clear()

        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                self.bus.unsubscribe_all("c")
                await self.on(spoil)
                await self.on(recorder)
                data = {"items": [1]}
                await self.bus.publish("e", data, delivery=delivery)
                self.assertEqual((recorder.take(), data), ([{"items": [1]}], {"items": [1]}))

    async def test_concurrent_handlers_run_at_once(self):
        first, second = asyncio.Event(), asyncio.Event()

        async def one(data):
            first.set()
            await asyncio.wait_for(second.wait(), 10)
            self.heard.append("one")

        async def two(data):
            await asyncio.wait_for(first.wait(), 10)
            second.set()
            self.heard.append("two")

        await self.on(one)
        await self.on(two)
        await self.bus.publish("e", delivery="concurrent", on_error="raise")
        self.assertEqual(sorted(self.take()), ["one", "two"])

    async def test_other_events_are_not_heard(self):
        await self.on(self.plain("e"))
        await self.on(self.plain("f"), "f")
        await self.bus.publish("f")
        await self.bus.publish("nobody hears this")
        self.assertEqual(self.take(), ["f"])

    async def test_the_star_hears_everything(self):
        await self.on(self.plain("e"), priority=2)
        await self.on(self.plain("all"), "*", priority=2)
        await self.on(self.plain("first of all"), "*", priority=1)
        for event in ("e", "f", "*"):
            await self.bus.publish(event)
            self.heard.append("|")
        self.assertEqual(self.take(), [
            "first of all", "e", "all", "|", "first of all", "all", "|", "first of all", "all", "|",
        ])

    async def test_a_star_with_a_filter_learns_the_event_s_name(self):
        recorder = Recorder()
        await self.on(recorder, "*", filter_fn=lambda event, data: event.startswith("order."))
        for event in ("order.paid", "state.changed", "order.sent"):
            await self.bus.publish(event, event)
        self.assertEqual(recorder.take(), ["order.paid", "order.sent"])

    async def test_a_filter_decides_with_the_event_and_the_data(self):
        asked, recorder = [], Recorder()

        def only_even(event, data):
            asked.append((event, data))
            return data % 2 == 0

        await self.on(recorder, filter_fn=only_even)
        for delivery in ("sequential", "concurrent"):
            for number in range(3):
                await self.bus.publish("e", number, delivery=delivery)
        self.assertEqual(recorder.take(), [0, 2, 0, 2])
        self.assertEqual(asked, [("e", number) for number in (0, 1, 2)] * 2)

    async def test_publishing_within_publishing_goes_depth_first(self):
        async def outer(data):
            self.heard.append("outer begins")
            await self.bus.publish("inner")
            self.heard.append("outer ends")

        await self.on(outer)
        await self.on(self.plain("next"))
        await self.on(self.plain("inner"), "inner")
        await self.bus.publish("e")
        self.assertEqual(self.take(), ["outer begins", "inner", "outer ends", "next"])

    async def test_a_sequential_handler_runs_in_the_publisher_s_context(self):
        async def handler(data):
            self.heard.append((ff.get_correlation_id(), asyncio.current_task()))

        await self.on(handler)
        ff.set_correlation_id("c-1")
        await self.bus.publish("e")
        await self.bus.publish("e", delivery="concurrent")
        (first, task), (second, _) = self.take()
        self.assertEqual((first, task, second), ("c-1", asyncio.current_task(), "c-1"))

    async def test_words_that_are_not_known_are_refused(self):
        table = [
            ({"delivery": "all"}, "Unknown delivery: 'all'\nFix: sequential or concurrent"),
            ({"on_error": "ignore"}, "Unknown error policy: 'ignore'\nFix: continue or raise"),
        ]
        for given, text in table:
            with self.subTest(given):
                with self.assertRaises(ff.ArgumentError) as caught:
                    await self.bus.publish("nobody", **given)
                self.assertEqual(str(caught.exception), text)


class Subscribing(BusCase):
    async def test_a_priority_is_a_whole_number_from_1_to_5(self):
        """B17: True and 2.5 were accepted; "3" and None were raw TypeErrors."""
        for priority in (0, 6, -1, True, False, 2.5, 3.0, "3", None, [1]):
            with self.subTest(priority=priority):
                with self.assertRaises(ValueError) as caught:
                    await self.on(print, priority=priority)
                self.assertIsInstance(caught.exception, FlexiFlowError)
                self.assertEqual(
                    str(caught.exception), f"Priority must be an integer from 1 to 5: {priority!r}")

    async def test_an_async_filter_is_refused(self):
        import functools

        async def always(event, data):
            return False

        class Always:
            async def __call__(self, event, data):
                return False

        for filter_fn in (always, functools.partial(always), Always(), Always().__call__):
            with self.subTest(filter_fn):
                with self.assertRaises(ff.ArgumentError) as caught:
                    await self.on(print, filter_fn=filter_fn)
                self.assertEqual(str(caught.exception), (
                    f"Async filter: {filter_fn!r}\n"
                    "Why: a coroutine is always true, so every event would pass\n"
                    "Fix: write `def` instead of `async def`"))

    async def test_what_cannot_be_called_is_refused(self):
        for given in ({"handler": 5}, {"handler": print, "filter_fn": "yes"}):
            with self.subTest(given):
                with self.assertRaises(ff.ArgumentError) as caught:
                    await self.bus.subscribe("e", "c", **given)
                self.assertRegex(str(caught.exception), r"^Not a function: (5|'yes')\nWhy: ")
        await self.bus.publish("e")
        self.assertEqual(self.failures(), [])

    async def test_arguments_may_be_given_by_position_as_in_1_0_1(self):
        recorder = Recorder()
        handle = await self.bus.subscribe("e", "c", recorder, 2, lambda event, data: data > 1)
        for number in (1, 2):
            await self.bus.publish("e", number)
        found = recorder.take(), handle.event_name, handle.component_name, handle.priority
        self.assertEqual(found, ([2], "e", "c", 2))
        self.assertIsInstance(handle, ff.SubscriptionHandle)
        self.assertIsInstance(handle.subscription_id, str)

    async def test_unsubscribe_says_whether_there_was_something_to_end(self):
        handle = await self.on(self.plain("a"))
        other = await AsyncEventManager().subscribe("e", "c", self.plain("b"))
        found = [self.bus.unsubscribe(one) for one in (other, handle, handle)]
        await self.bus.publish("e")
        self.assertEqual((found, self.take()), ([False, True, False], []))

    async def test_the_same_handler_may_subscribe_twice(self):
        handler = self.plain("a")
        first = await self.on(handler)
        await self.on(handler)
        await self.bus.publish("e")
        self.bus.unsubscribe(first)
        await self.bus.publish("e")
        self.assertEqual(self.take(), ["a", "a", "a"])

    async def test_unsubscribe_all_ends_what_one_component_has(self):
        for owner, event in (("c", "e"), ("c", "f"), ("c", "*"), ("d", "e")):
            await self.on(self.plain(f"{owner} {event}"), event, owner)
        counts = [self.bus.unsubscribe_all(owner) for owner in ("c", "c", "nobody")]
        await self.bus.publish("e")
        await self.bus.publish("f")
        self.assertEqual((counts, self.take()), ([3, 0, 0], ["d e"]))
        self.assertEqual(self.bus.unsubscribe_all("d"), 1)

    async def test_once_is_once(self):
        handle = await self.on(self.plain("once"), once=True)
        await self.on(self.plain("always"))
        for _ in range(3):
            await self.bus.publish("e")
        self.assertEqual(self.take(), ["once", "always", "always", "always"])
        self.assertEqual((self.bus.unsubscribe(handle), self.bus.unsubscribe_all("c")), (False, 1))

    async def test_once_is_once_for_publishes_at_the_same_time(self):
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.on(self.waiting("once"), once=True)
                await asyncio.gather(*(
                    self.bus.publish("e", delivery=delivery) for _ in range(3)))
                self.assertEqual(self.take(), ["once begins", "once ends"])

    async def test_once_is_not_used_up_by_an_event_that_its_filter_refuses(self):
        recorder = Recorder()
        await self.on(recorder, once=True, filter_fn=lambda event, data: data > 1)
        for number in range(5):
            await self.bus.publish("e", number)
        self.assertEqual(recorder.take(), [2])

    async def test_once_is_used_up_by_a_handler_that_fails(self):
        await self.on(self.failing(KeyError("k")), once=True)
        await self.bus.publish("e")
        await self.bus.publish("e")
        self.assertEqual(self.failures(), [
            ("ERROR - Handler of 'c' for event 'e' failed", "KeyError: 'k'")])

    async def test_a_handler_unsubscribed_during_a_publish_is_not_called(self):
        """B10: it still ran."""
        ends = (lambda: self.bus.unsubscribe(victim), lambda: self.bus.unsubscribe_all("v"))
        for delivery in ("sequential", "concurrent"):
            for end in ends:
                with self.subTest(delivery):
                    await self.on(lambda data, end=end: end(), priority=1, once=True)
                    victim = await self.on(self.plain("victim"), owner="v")
                    await self.on(self.plain("next"), once=True)
                    await self.bus.publish("e", delivery=delivery)
                    self.assertEqual(self.take(), ["next"])

    async def test_a_handler_subscribed_during_a_publish_waits_for_the_next(self):
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                async def first(data):
                    self.heard.append("first")
                    await self.on(self.plain("late"), owner="late", priority=5)

                self.bus.unsubscribe_all("c")
                await self.on(first)
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(self.take(), ["first"])
                self.bus.unsubscribe_all("c")
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(self.take(), ["late"])
                self.bus.unsubscribe_all("late")

    async def test_the_bus_alone_keeps_a_handler_alive(self):
        import gc

        class Handler:
            def __init__(self, test):
                self.test = test

            def hear(self, data):
                self.test.heard.append("method")

        await self.on(Handler(self).hear)
        await self.on(lambda data: self.heard.append("lambda"))
        gc.collect()
        await self.bus.publish("e")
        self.assertEqual(self.take(), ["method", "lambda"])

    async def test_an_ended_subscription_keeps_nothing_alive(self):
        import gc
        import weakref

        class Handler:
            def __call__(self, data):
                raise ValueError

        alive = weakref.WeakSet()
        for end in ("unsubscribe", "unsubscribe_all", "once"):
            handler = Handler()
            alive.add(handler)
            handle = await self.on(handler, once=end == "once")
            del handler
            if end == "unsubscribe":
                self.bus.unsubscribe(handle)
            await self.bus.publish("e")
            self.bus.unsubscribe_all("c")
            del handle
        gc.collect()
        self.assertEqual(list(alive), [])

    def sizes(self):
        """Return the sizes of whatever containers the bus has."""
        return {name: len(one) for name, one in vars(self.bus).items() if hasattr(one, "__len__")}

    async def test_a_hundred_thousand_subscriptions_leave_nothing_behind(self):
        for number in range(50_000):
            handle = await self.bus.subscribe(f"e{number % 7}", "c", print)
            await self.bus.subscribe(f"e{number}", f"c{number}", print)
            self.bus.unsubscribe(handle)
            self.bus.unsubscribe_all(f"c{number}")
        self.assertEqual(set(self.sizes().values()), {0}, self.sizes())

    async def test_events_published_leave_nothing_behind(self):
        await self.on(self.plain("all"), "*", once=True)
        for number in range(1000):
            await self.bus.publish(f"e{number}")
        self.assertEqual(set(self.sizes().values()), {0}, self.sizes())

    async def steps(self):
        """Return how many instructions a round of the bus takes; each time the same number."""
        count = [0]

        def trace(frame, event, argument):
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            count[0] += event == "opcode"
            return trace

        kept = sys.gettrace()
        for _ in range(3):
            count[0] = 0
            sys.settrace(trace)
            try:
                first = await self.bus.subscribe("mine", "me", self.nothing)
                await self.bus.subscribe("mine", "me", self.nothing)
                await self.bus.publish("mine")
                self.bus.unsubscribe(first)
                self.bus.unsubscribe_all("me")
            finally:
                sys.settrace(kept)
        return count[0]

    def nothing(self, data):
        """Hear, and do nothing."""

    async def test_nothing_takes_longer_because_others_are_subscribed(self):
        alone = await self.steps()
        for number in range(2000):
            await self.on(self.nothing, f"e{number % 50}", f"c{number % 50}")
        self.assertGreater(alone, 100)
        self.assertEqual(await self.steps(), alone)

    async def test_two_threads_of_a_program_may_have_a_bus_each(self):
        def work():
            async def main():
                bus = AsyncEventManager()
                await bus.subscribe("e", "c", self.plain("thread"))
                await bus.publish("e", delivery="concurrent", on_error="raise")

            asyncio.run(main())

        await asyncio.gather(*(
            asyncio.get_running_loop().run_in_executor(None, work) for _ in range(4)))
        self.assertEqual(self.take(), ["thread"] * 4)


class Failing(BusCase):
    BOOM = ("ERROR - Handler of 'c' for event 'e' failed", "ValueError: boom")

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.failed = Recorder()
        await self.on(self.failed, "event.handler.failed", "observer")

    def failure(self, exception="ValueError('boom')", owner="c", **changes):
        return {
            "event_name": "e", "component_name": owner, "exception": exception, "seq": None,
            "correlation_id": None, **changes}

    async def test_continue_logs_and_publishes_every_failure_and_goes_on(self):
        await self.on(self.failing(ValueError("boom")), priority=1)
        await self.on(self.plain("next"))
        await self.on(self.failing(KeyError("k")), owner="d", priority=5)
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(self.take(), ["next"])
                self.assertEqual(self.failed.take(), [
                    self.failure(), self.failure("KeyError('k')", "d")])
                self.assertEqual(self.failures(), [
                    self.BOOM, ("ERROR - Handler of 'd' for event 'e' failed", "KeyError: 'k'")])

    async def test_an_async_handler_fails_the_same_way(self):
        async def handler(data):
            await asyncio.sleep(0)
            raise ValueError("boom")

        await self.on(handler)
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(
                    (self.failed.take(), self.failures()), ([self.failure()], [self.BOOM]))

    async def test_the_failure_tells_what_the_payload_told(self):
        await self.on(self.failing(ValueError("boom")))
        ff.set_correlation_id("c-1")
        await self.bus.publish("e", {"seq": 7, "correlation_id": "c-1"})
        self.assertEqual(self.failed.take(), [self.failure(seq=7, correlation_id="c-1")])

    async def test_a_filter_that_raises_is_the_failure_of_its_subscription_alone(self):
        """B4: the exception reached the publisher, before any handler was called."""
        def broken(event, data):
            raise ValueError("boom")

        await self.on(self.plain("filtered"), filter_fn=broken, priority=1)
        await self.on(self.plain("other"))
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery)
                found = self.take(), self.failed.take(), self.failures()
                self.assertEqual(found, (["other"], [self.failure()], [self.BOOM]))

    async def test_a_filter_that_raises_stops_no_message(self):
        """B4: handle_message raised before the state machine, and the message was lost."""
        engine = FlexiFlowEngine()
        engine.create_component({
            "name": "m", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"on": "go", "to": "B"}]})
        await engine.event_bus.subscribe(
            "*", "observer", print, filter_fn=lambda event, data: data["no such key"])
        receipt = await engine.handle_message("m", "go")
        self.assertEqual((receipt.outcome, engine.get("m").state), ("moved", "B"))

    async def test_raise_stops_a_sequential_publish_at_the_first_failure(self):
        error = ValueError("boom")
        await self.on(self.plain("before"), priority=1)
        await self.on(self.failing(error))
        await self.on(self.plain("after"))
        with self.assertRaises(ValueError) as caught:
            await self.bus.publish("e", on_error="raise")
        self.assertIs(caught.exception, error)
        self.assertEqual((self.take(), self.failures()), (["before"], [self.BOOM]))

    async def test_raise_waits_for_all_concurrent_handlers_then_raises_the_one_failure(self):
        error = ValueError("boom")
        await self.on(self.failing(error), priority=1)
        await self.on(self.waiting("slow"))
        with self.assertRaises(ValueError) as caught:
            await self.bus.publish("e", delivery="concurrent", on_error="raise")
        self.assertIs(caught.exception, error)
        self.assertEqual(
            (self.take(), self.failures(), self.failed.take()),
            (["slow begins", "slow ends"], [self.BOOM], [self.failure()]))

    async def test_several_concurrent_failures_are_raised_together(self):
        """B8: of three failures one was raised, none logged, none published."""
        errors = [ValueError("boom"), KeyError("k"), OSError("o")]
        for number, error in enumerate(errors):
            await self.on(self.failing(error), priority=5 - number)
        with self.assertRaises(Exception) as caught:
            await self.bus.publish("e", delivery="concurrent", on_error="raise")
        group = sys.version_info >= (3, 11) and ExceptionGroup or Exception  # noqa: F821
        self.assertIsInstance(caught.exception, group)
        self.assertEqual(caught.exception.exceptions, tuple(reversed(errors)))
        self.assertEqual([text for _, text in self.failures()], [
            "OSError: o", "KeyError: 'k'", "ValueError: boom"])
        self.assertEqual([one["exception"] for one in self.failed.take()], [
            "OSError('o')", "KeyError('k')", "ValueError('boom')"])

    async def test_an_observer_of_failures_that_fails_is_logged_and_no_more(self):
        await self.on(self.failing(KeyError("k")), "event.handler.failed", "broken")
        await self.on(self.failing(ValueError("boom")))
        await self.bus.publish("e")
        self.assertEqual((self.failed.take(), self.failures()), ([self.failure()], [
            self.BOOM,
            ("ERROR - Handler of 'broken' for event 'event.handler.failed' failed",
             "KeyError: 'k'"),
        ]))

    async def test_a_star_that_fails_does_not_hear_itself_fail_for_ever(self):
        self.bus.unsubscribe_all("observer")
        await self.on(self.failing(ValueError("boom")), "*")
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(self.failures(), [
                    self.BOOM,
                    ("ERROR - Handler of 'c' for event 'event.handler.failed' failed",
                     "ValueError: boom"),
                ])

    async def test_a_failure_is_logged_by_the_logger_of_the_bus(self):
        log = logging.Logger("mine")
        records = []
        log.addFilter(lambda record: records.append(record.exc_info[1]))
        self.bus = AsyncEventManager(log)
        error = ValueError("boom")
        await self.on(self.failing(error))
        await self.bus.publish("e")
        self.assertEqual((records, self.failures()), ([error], []))

    async def test_what_ends_the_program_is_nobody_s_failure(self):
        for kind in (SystemExit, KeyboardInterrupt):
            with self.subTest(kind.__name__):
                handle = await self.on(self.failing(kind()))
                await self.on(self.plain("after"), once=True)
                with self.assertRaises(kind):
                    await self.bus.publish("e")
                self.bus.unsubscribe_all("c")
                found = self.take(), self.failures(), self.bus.unsubscribe(handle)
                self.assertEqual(found, ([], [], False))


class Cancelling(BusCase):
    """Who is cancelled: the publisher, or a handler for itself."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.failed = Recorder("event_name", "component_name", "exception")
        await self.on(self.failed, "event.handler.failed", "observer")

    def told(self):
        """Return the failures that were published; how an error is shown differs by version."""
        return [(*who, error.partition("(")[0]) for *who, error in self.failed.take()]

    async def own(self, data):
        """Await something that somebody else has cancelled."""
        other = asyncio.get_running_loop().create_future()
        other.cancel()
        await other

    def parked(self, name):
        """Return a handler that waits for ever, and takes its time to end when cancelled."""
        async def handler(data):
            self.heard.append(f"{name} waits")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                self.heard.append(f"{name} cleans up")

        return handler

    async def cancelled(self, **settings):
        """Publish in a task, cancel it when its handlers wait; return whether that arrived."""
        task = asyncio.ensure_future(self.bus.publish("e", **settings))
        while not self.heard:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    async def test_a_cancelled_publisher_cancels_and_awaits_its_handler(self):
        await self.on(self.parked("a"))
        await self.on(self.plain("b"))
        arrived = await self.cancelled()
        self.assertEqual(
            (arrived, self.take(), self.failures(), self.failed.take()),
            (True, ["a waits", "a cleans up"], [], []))

    async def test_a_cancelled_publisher_cancels_and_awaits_its_concurrent_handlers(self):
        await self.on(self.parked("a"))
        await self.on(self.plain("b"))
        await self.on(self.parked("c"))
        for on_error in ("continue", "raise"):
            with self.subTest(on_error):
                arrived = await self.cancelled(delivery="concurrent", on_error=on_error)
                self.assertEqual(
                    (arrived, self.take(), self.failures(), self.failed.take()),
                    (True, ["a waits", "b", "c waits", "a cleans up", "c cleans up"], [], []))

    async def test_a_publisher_cancelled_twice_still_awaits_its_handlers(self):
        async def stubborn(data):
            self.heard.append("waits")
            for _ in range(2):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            self.heard.append("ends")

        await self.on(stubborn)
        task = asyncio.ensure_future(self.bus.publish("e", delivery="concurrent"))
        while not self.heard:
            await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.wait([task], timeout=10)
        self.assertEqual((task.cancelled(), self.take()), (True, ["waits", "ends"]))

    async def test_a_bus_works_on_after_a_cancelled_publish(self):
        await self.on(self.parked("a"), once=True)
        await self.cancelled()
        await self.on(self.plain("b"))
        self.take()
        await self.bus.publish("e")
        self.assertEqual(self.take(), ["b"])

    async def test_a_sequential_handler_s_own_cancelled_error_is_its_failure(self):
        """B7: publish raised CancelledError although nobody had cancelled it."""
        await self.on(self.own)
        await self.on(self.plain("next"))
        if sys.version_info >= (3, 11):
            await self.bus.publish("e")
            self.assertEqual(
                (self.take(), self.told()), (["next"], [("e", "c", "CancelledError")]))
        else:  # nothing tells whose it is: it counts as the publisher's
            with self.assertRaises(asyncio.CancelledError):
                await self.bus.publish("e")
            self.assertEqual((self.take(), self.failed.take()), ([], []))

    async def test_a_concurrent_handler_s_own_cancelled_error_is_its_failure(self):
        """B6: publish returned as if nothing had been, and nothing was reported."""
        await self.on(self.own)
        await self.on(self.plain("next"))
        await self.bus.publish("e", delivery="concurrent")
        self.assertEqual(
            (self.take(), self.told(), [text for text, _ in self.failures()]),
            (["next"], [("e", "c", "CancelledError")],
             ["ERROR - Handler of 'c' for event 'e' failed"]))
        with self.assertRaises(asyncio.CancelledError):
            await self.bus.publish("e", delivery="concurrent", on_error="raise")
        self.assertEqual(self.told(), [("e", "c", "CancelledError")])

    async def test_a_cancelled_error_among_several_failures_is_told_with_them(self):
        await self.on(self.own)
        await self.on(self.failing(ValueError("boom")))
        with self.assertRaises(Exception) as caught:
            await self.bus.publish("e", delivery="concurrent", on_error="raise")
        first, second = caught.exception.exceptions
        self.assertIn("CancelledError", repr(first))
        self.assertEqual(repr(second), "ValueError('boom')")

    async def test_a_handler_that_lets_time_run_out_fails_alone(self):
        async def late(data):
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)

        await self.on(late)
        await self.on(self.plain("next"))
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                await self.bus.publish("e", delivery=delivery)
                self.assertEqual(
                    (self.take(), self.failed.take()),
                    (["next"], [("e", "c", "TimeoutError()")]))


class Nesting(BusCase):
    def publisher(self, event, **settings):
        """Return a handler that publishes another event."""
        async def handler(data):
            await self.bus.publish(event, **settings)

        return handler

    async def chain(self, length, **settings):
        """Let e1 publish e2, and so on; somebody hears the last."""
        for number in range(1, length):
            await self.on(self.publisher(f"e{number + 1}", **settings), f"e{number}")
        await self.on(self.plain(f"e{length}"), f"e{length}")

    async def test_events_within_events_may_be_32_deep(self):
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                self.bus.unsubscribe_all("c")
                await self.chain(32, delivery=delivery, on_error="raise")
                await self.bus.publish("e1", delivery=delivery, on_error="raise")
                self.assertEqual(self.take(), ["e32"])

    async def test_a_deeper_one_is_an_error_that_prints_the_chain(self):
        for delivery in ("sequential", "concurrent"):
            with self.subTest(delivery):
                self.bus.unsubscribe_all("c")
                await self.chain(33, delivery=delivery, on_error="raise")
                with self.assertRaises(StateError) as caught:
                    await self.bus.publish("e1", delivery=delivery, on_error="raise")
                self.assertEqual(str(caught.exception), textwrap.dedent("""\
                    Events published within events, 33 deep: 'e33'
                    Why: a handler publishes, and what it publishes leads back to it
                    Fix: break the circle, or publish from a task of its own
                    Context:
                      chain='e26 -> e27 -> e28 -> e29 -> e30 -> e31 -> e32 -> e33'"""))
                self.assertEqual(self.take(), [])

    async def test_a_circle_comes_to_an_end(self):
        await self.on(self.publisher("ping"), "pong")
        await self.on(self.publisher("pong"), "ping")
        await self.bus.publish("ping")
        ((_, text),) = self.failures()
        self.assertEqual(
            text.partition("chain=")[2],
            "'pong -> ping -> pong -> ping -> pong -> ping -> pong -> ping'")

    async def test_a_failure_at_the_bottom_is_still_published(self):
        failed = Recorder("event_name", "exception")
        await self.on(failed, "event.handler.failed", "observer")
        await self.chain(32)
        await self.on(self.failing(ValueError("boom")), "e32")
        await self.bus.publish("e1")
        self.assertEqual(failed.take(), [("e32", "ValueError('boom')")])

    async def test_many_publishes_at_once_are_not_nested(self):
        gate = asyncio.Event()

        async def handler(data):
            await gate.wait()
            await self.bus.publish("inner", on_error="raise")

        await self.on(handler)
        await self.on(self.plain("inner"), "inner")
        tasks = [
            asyncio.ensure_future(self.bus.publish("e", delivery=delivery, on_error="raise"))
            for delivery in ("sequential", "concurrent") for _ in range(50)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)
        self.assertEqual(self.take(), ["inner"] * 100)

    async def test_a_handler_that_publishes_to_many_is_not_nested(self):
        async def handler(data):
            for _ in range(100):
                await self.bus.publish("inner", on_error="raise")

        await self.on(handler)
        await self.on(self.plain("inner"), "inner")
        await self.bus.publish("e", on_error="raise")
        self.assertEqual(self.take(), ["inner"] * 100)

    async def test_a_task_of_its_own_begins_a_chain_of_its_own(self):
        """As the error's own advice says; it may outlive the publish that made it."""
        gate, tasks, rounds = asyncio.Event(), [], iter(range(100))

        async def again():
            await self.bus.publish("e", delivery="concurrent", on_error="raise")

        def handler(data):
            if next(rounds, None) is not None:
                tasks.append(asyncio.ensure_future(again()))

        await self.on(handler)
        await self.on(lambda data: gate.wait(), "park")
        parked = [asyncio.ensure_future(self.bus.publish("park")) for _ in range(40)]
        await asyncio.sleep(0)
        await again()
        while len(tasks) < 100 or not tasks[-1].done():
            await asyncio.sleep(0)
            if any(task.done() and task.exception() for task in tasks):
                break
        gate.set()
        await asyncio.gather(*parked)
        failed = [task.exception() for task in tasks if task.exception()]
        self.assertEqual((len(tasks), failed), (100, []))

    async def test_two_buses_count_for_themselves(self):
        other, depth = AsyncEventManager(), []

        async def there(data):
            depth.append(1)
            if len(depth) < 30:
                await other.publish("e", on_error="raise")

        async def here(data):
            depth.append(1)
            if len(depth) < 60:
                await self.bus.publish("e", on_error="raise")
            else:
                depth.clear()

        await other.subscribe("e", "c", there)
        await self.on(here)
        await other.publish("e", on_error="raise")
        await self.bus.publish("e", on_error="raise")
        self.assertEqual(depth, [])


class EventsOfTheEngine(BusCase):
    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0},
        "states": {"A": {}, "B": {}, "End": {"final": True}},
        "rules": [
            {"from": "A", "on": "go", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "B", "on": "back", "to": "A"},
            {"on": "note", "assign": {"noted": True}},
            {"on": "break", "assign": {"x": "$data.missing"}},
            {"on": "end", "to": "End"},
        ],
    }

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.engine = FlexiFlowEngine()
        self.addAsyncCleanup(self.engine.close)
        self.bus = self.engine.event_bus
        self.events = []

        def note(event, data):
            self.events.append((event, data))
            return False

        await self.bus.subscribe("*", "note", print, 1, note)
        self.component = self.engine.create_component(self.CONFIG)
        await self.send("note")
        self.events.clear()

    async def send(self, kind, **fields):
        return await self.engine.handle_message("m", kind, correlation_id="c-1", **fields)

    def event(self, name, seq=2, **facts):
        return name, {"component": "m", **facts, "seq": seq, "correlation_id": "c-1"}

    def received(self, kind, seq=2):
        return self.event(
            "component.message.received", seq, message={"type": kind, "correlation_id": "c-1"})

    def changed(self, before, after, seq=2):
        return self.event("state.changed", seq, from_state=before, to_state=after, state=after)

    async def test_a_move_is_told_when_it_is_committed_and_before_the_receipt(self):
        seen = []
        await self.on(lambda data: seen.append((self.component.state, data["to_state"])),
                      "state.changed")
        receipt = await self.send("go")
        self.assertEqual((receipt.outcome, seen), ("moved", [("B", "B")]))
        self.assertEqual(self.events, [self.received("go"), self.changed("A", "B")])

    async def test_a_message_that_stays_or_is_ignored_is_told_as_received_only(self):
        found = [(await self.send(kind)).outcome for kind in ("note", "back")]
        self.assertEqual(found, ["stayed", "ignored"])
        self.assertEqual(self.events, [self.received("note"), self.received("back", 3)])

    async def test_a_message_that_fails_is_told_as_received(self):
        with self.assertRaises(FlexiFlowError):
            await self.send("break")
        self.assertEqual(self.events, [self.received("break", 1)])

    async def test_completion_is_told_last(self):
        await self.send("end")
        self.assertEqual(self.events, [
            self.received("end"), self.changed("A", "End"),
            self.event("component.completed", state="End")])

    async def test_new_rules_are_told(self):
        await self.engine.update_rules("m", [{"on": "new", "to": "B"}])
        (event,) = self.events
        self.assertEqual((event[0], event[1]["component"], event[1]["seq"]), (
            "rules.updated", "m", 2))

    async def test_a_dead_message_is_told(self):
        await self.engine.send("m", "no such message")
        await self.engine.run(until_idle=True)
        found = [data for event, data in self.events if event == "message.dead"]
        self.assertEqual([(one["component"], one["message"]["type"]) for one in found], [
            ("m", "no such message")])

    async def test_a_registration_is_told_once(self):
        """B1: register_async published it twice."""
        self.engine.register(AsyncComponent("by hand"))
        await self.engine.register_async(AsyncComponent("awaited"))
        self.engine.create_component(self.CONFIG, name="n")
        await self.engine.handle_message("n", "go")
        await asyncio.sleep(0)
        names = [data["component"] for event, data in self.events
                 if event == "engine.component.registered"]
        self.assertEqual(names, ["by hand", "awaited", "n"])

    async def test_the_registration_survives_a_garbage_collection(self):
        """B2: nothing kept the task that published it."""
        import gc

        gate = asyncio.Event()

        async def handler(data):
            await gate.wait()
            self.heard.append(data["component"])

        handle = await self.on(handler, "engine.component.registered")
        self.engine.register(AsyncComponent("x"))
        await asyncio.sleep(0)
        self.bus.unsubscribe(handle)
        gc.collect()
        gate.set()
        await self.engine.close()
        self.assertEqual(self.take(), ["x"])

    def test_a_registration_without_a_running_loop_is_told_later(self):
        """B3: it was never published."""
        engine, recorder = FlexiFlowEngine(), Recorder("component")
        engine.register(AsyncComponent("x"))

        async def main():
            await engine.event_bus.subscribe("engine.component.registered", "test", recorder)
            await engine.handle_message("x", "start")

        with contextlib.closing(asyncio.new_event_loop()) as loop:
            loop.run_until_complete(main())
        self.assertEqual(recorder.take(), [("x",)])

    async def test_handlers_that_fail_change_nothing_about_the_outcome(self):
        def broken(data):
            raise ValueError("boom")

        for event in ("component.message.received", "state.changed"):
            await self.on(broken, event)
        receipt = await self.send("go")
        self.assertEqual((receipt.outcome, self.component.state, self.component.data["n"]), (
            "moved", "B", 1))

        def failure(event):
            return ("event.handler.failed", {
                "event_name": event, "component_name": "c", "exception": "ValueError('boom')",
                "seq": 2, "correlation_id": "c-1"})

        self.assertEqual(self.events, [
            self.received("go"), failure("component.message.received"),
            self.changed("A", "B"), failure("state.changed")])

    async def test_what_a_handler_does_to_a_payload_reaches_neither_message_nor_data(self):
        """B14: the payload was shared with the message and with the other handlers."""
        def spoil(data):
            data["message"]["type"] = "end"
            data["message"]["items"].append("forged")
            data["component"] = "other"

        message = {"type": "note", "items": [1], "correlation_id": "c-1"}
        recorder = Recorder("component", "message")
        await self.on(spoil, "component.message.received", priority=1)
        await self.on(recorder, "component.message.received", priority=2)
        await self.engine.handle_message("m", message)
        unchanged = {"type": "note", "items": [1], "correlation_id": "c-1"}
        self.assertEqual((recorder.take(), message), ([("m", unchanged)], unchanged))

    async def test_what_a_handler_sends_to_the_component_is_queued_and_runs_next(self):
        receipts = []

        async def handler(data):
            receipts.append((await self.engine.handle_message("m", "back")).outcome)
            self.heard.append(self.component.state)

        await self.on(handler, "state.changed", once=True)
        receipt = await self.send("go")
        self.assertEqual(
            (receipt.outcome, receipts, self.take(), self.component.state),
            ("moved", ["queued"], ["B"], "A"))
        moves = [(data["from_state"], data["to_state"], data["seq"])
                 for event, data in self.events if event == "state.changed"]
        self.assertEqual(moves, [("A", "B", 2), ("B", "A", 3)])

    async def test_events_come_in_the_order_of_seq_from_the_caller_s_task(self):
        tasks, seqs = [], []

        async def handler(data):
            await asyncio.sleep(0)
            tasks.append(asyncio.current_task())
            seqs.append(data["seq"])

        await self.on(handler, "component.message.received")
        senders = [asyncio.ensure_future(self.send("note")) for _ in range(5)]
        receipts = await asyncio.gather(*senders)
        self.assertEqual(([one.seq for one in receipts], seqs, tasks), (
            [2, 3, 4, 5, 6], [2, 3, 4, 5, 6], senders))

    async def test_a_circle_of_events_and_messages_changes_no_outcome(self):
        async def circle(data):
            await self.bus.publish("state.changed", data, on_error="raise")

        await self.on(circle, "state.changed")
        receipt = await self.send("go")
        self.assertEqual((receipt.outcome, self.component.state), ("moved", "B"))

    async def test_a_message_is_logged_at_debug(self):
        for kind in ("go", "back", "note", "end", "go"):
            await self.send(kind)
        self.assertEqual([line for line in self.lines if not line.startswith("DEBUG")], [])


# --------------------------------------------------------------------------------------------
# 5. Guards and values
# --------------------------------------------------------------------------------------------


class GuardCase(Case):
    """Tests of one rule on `go`, through an engine in memory."""

    def setUp(self):
        super().setUp()
        self.module = types.ModuleType("code_of_t05")
        sys.modules["code_of_t05"] = self.module
        self.addCleanup(sys.modules.pop, "code_of_t05", None)

    def config(self, data=None, **rule):
        return {
            "name": "m", "initial_state": "A", "data": data or {},
            "states": {"A": {}, "B": {}}, "rules": [{"from": "A", "on": "go", **rule}]}

    def go(self, data=None, message=None, rule=None):
        """Handle one message under one rule; return the component and the receipt."""
        engine = FlexiFlowEngine(clock=Clock())
        component = engine.create_component(self.config(data, **rule))
        message = {"type": "go", **(message or {})}
        return component, self.run_async(engine.handle_message("m", message))

    def holds(self, guard, data=None, /, **message):
        """Ask a guard about a message and data."""
        _, receipt = self.go(data, message, {"guard": guard, "to": "B"})
        return {"moved": True, "blocked": False}[receipt.outcome]

    def check(self, table):
        """Ask guards about `{"x": left}`; rows are (op, left, right, says)."""
        for op, left, right, says in table:
            with self.subTest(op, left=left, right=right):
                self.assertIs(self.holds({"x": {op: right}}, x=left), says)
                asked = self.holds({"x": {op: "$data.y"}}, {"y": right}, x=left)
                self.assertIs(asked, says)

    def refused(self, error=ConfigError, **rule):
        """Return the error that refuses a rule at load; explaining it gives an error, too."""
        config = self.config(**rule)
        self.assertFalse(explain(config).is_valid)
        return self.raises(error, ConfigLoader.load_component_config, config)


class Guards(GuardCase):
    def test_equality_compares_any_two_json_values(self):
        equal = [
            (1, 1), (1, 1.0), (0, -0.0), ("a", "a"), (None, None), (True, True), ([], []), ({}, {}),
            ([1, [2]], [1.0, [2]]), ({"a": {"b": 1}}, {"a": {"b": 1.0}}), (10**30, 10**30),
        ]
        unequal = [
            (1, 2), (1, True), (0, False), (True, 1.0), ("1", 1), ("a", "A"), (None, 0),
            (None, False), ("", None), ([1], [True]), ([1], [1, 1]), ({"a": 1}, {"a": True}),
            ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 1}), ([], {}), (10**30, 1e30 * 1.01),
        ]
        self.check([("==", left, right, True) for left, right in equal])
        self.check([("==", left, right, False) for left, right in unequal])
        self.check([("!=", left, right, False) for left, right in equal])
        self.check([("!=", left, right, True) for left, right in unequal])

    def test_order_compares_numbers_with_numbers_and_text_with_text(self):
        rows = [(1, 2, "<"), (2, 1.5, ">"), (1, 1.0, "="), ("a", "b", "<"), ("b", "a", ">"),
                ("a", "a", "="), ("", "a", "<"), (10**400, 1.5, ">"), (-1, 10**400, "<")]
        true = {"<": ("<", "<="), ">": (">", ">="), "=": ("<=", ">=")}
        for left, right, order in rows:
            self.check([
                (op, left, right, op in true[order]) for op in ("<", "<=", ">", ">=")])

    def test_what_cannot_be_compared_is_false(self):
        values = [True, False, None, [], [1], {}, {"a": 1}]
        rows = [(1, "1"), ("1", 1), *((one, 1) for one in values), *((one, "a") for one in values)]
        self.check([
            (op, left, right, False) for op in ("<", "<=", ">", ">=") for left, right in rows])
        for op in ("<", "<=", ">", ">="):
            for left, right in ((1, True), (1, None), ([1], [2]), (True, True), ({}, {})):
                with self.subTest(op, left=left, right=right):
                    asked = self.holds({"x": {op: "$data.y"}}, {"y": right}, x=left)
                    self.assertIs(asked, False)

    def test_in_and_not_in_look_into_lists_and_text(self):
        self.check([
            ("in", 1, [1, 2], True), ("in", 1.0, [1, 2], True), ("in", True, [1, 2], False),
            ("in", "b", "abc", True), ("in", "d", "abc", False), ("in", None, [None], True),
            ("in", [1], [[1]], True), ("in", 1, "123", False), ("in", "a", [], False),
            ("not_in", 1, [1, 2], False), ("not_in", 3, [1, 2], True),
            ("not_in", True, [1, 2], True), ("not_in", "d", "abc", True),
            ("not_in", "b", "abc", False), ("not_in", "a", [], True),
        ])

    def test_not_in_is_false_where_in_cannot_be_asked(self):
        for left, right in ((5, "abc"), (None, "abc"), ([1], "abc"), (5, 5), ("a", None)):
            with self.subTest(left=left, right=right):
                for op in ("in", "not_in"):
                    asked = self.holds({"x": {op: "$data.y"}}, {"y": right}, x=left)
                    self.assertIs(asked, False)

    def test_contains_looks_into_the_value_of_the_path(self):
        self.check([
            ("contains", [1, 2], 1, True), ("contains", [1, 2], True, False),
            ("contains", "abc", "b", True), ("contains", "abc", 1, False),
            ("contains", {"a": 1}, "a", True), ("contains", {"a": 1}, 1, False),
            ("contains", 5, 5, False), ("contains", None, "a", False), ("contains", [], "a", False),
        ])

    def test_startswith_and_endswith_are_for_text(self):
        self.check([
            ("startswith", "abc", "ab", True), ("startswith", "abc", "b", False),
            ("startswith", ["a"], "a", False), ("startswith", None, "a", False),
            ("startswith", 12, "1", False), ("endswith", "abc", "bc", True),
            ("endswith", "abc", "b", False), ("endswith", {"a": 1}, "a", False),
        ])

    def test_exists_asks_whether_the_path_leads_to_anything(self):
        table = [
            ({"x": 1}, True), ({"x": None}, True), ({"x": False}, True), ({}, False),
        ]
        for message, there in table:
            with self.subTest(message):
                for wanted in (True, False):
                    asked = self.holds({"x": {"exists": wanted}}, **message)
                    self.assertIs(asked, there is wanted)

    def test_missing_is_false_for_every_operator_but_exists(self):
        operands = {
            "==": None, "!=": 1, "<": 1, "<=": 1, ">": 1, ">=": "a", "in": [None, 1], "not_in": [1],
            "contains": None, "startswith": "a", "endswith": "a",
        }
        for op, operand in operands.items():
            for path in ("x", "message.x", "message.a.b", "data.x", "data.d.x", "data.l.3", "l.x"):
                with self.subTest(op, path=path):
                    asked = self.holds({path: {op: operand}}, {"d": {}, "l": [1]}, a=5, l=[])
                    self.assertIs(asked, False)
            with self.subTest(op, right="missing"):
                self.assertIs(self.holds({"x": {op: "$data.none"}}, x="a"), False)

    def test_paths_lead_into_message_and_data(self):
        data = {"a": {"b": [{"c": 1}, {"c": 2}]}, "message": "in data", "0": "zero"}
        message = {"order": {"total": 5, "0": "key"}, "items": [7, [8]], "data": "in message"}
        table = [
            ("data.a.b.1.c", 2), ("message.order.total", 5), ("order.total", 5), ("items.0", 7),
            ("items.1.0", 8), ("message.items.1", [8]), ("order.0", "key"), ("data.0", "zero"),
            ("data", "in message"), ("data.message", "in data"), ("message.data", "in message"),
            ("type", "go"), ("message.type", "go"),
        ]
        for path, value in table:
            with self.subTest(path):
                self.assertTrue(self.holds({path: value}, data, **message))
        for path in ("items.2", "items.-1", "items.x", "items.00x", "order.total.x", "a.b.0.c"):
            with self.subTest(path):
                self.assertFalse(self.holds({path: {"exists": True}}, data, **message))

    def test_a_value_is_compared_with_equality(self):
        table = [(5, 5), ("a", "a"), (None, None), (True, True), ([1], [1])]
        for wanted, value in table:
            with self.subTest(wanted):
                self.assertTrue(self.holds({"x": wanted}, x=value))
                self.assertFalse(self.holds({"x": wanted}, x="other"))
                self.assertFalse(self.holds({"x": wanted}))
        self.assertFalse(self.holds({"x": 1}, x=True))
        self.assertTrue(self.holds({"x": {"==": {"a": 1}}}, x={"a": 1}))

    def test_all_entries_hold_and_all_any_and_not_combine_them(self):
        one, two, no = {"a": 1}, {"b": {">": 1}}, {"c": {"exists": True}}
        table = [
            ({**one, **two}, True), ({**one, **no}, False), ({"b": {">": 1, "<": 3}}, True),
            ({"b": {">": 1, "<": 2}}, False), ({"all": [one, two]}, True),
            ({"all": [one, no]}, False), ({"any": [no, two]}, True), ({"any": [no]}, False),
            ({"not": no}, True), ({"not": one}, False), ({"not": {**one, **no}}, True),
            ({"any": [{"all": [one, no]}, {"not": {"any": [no]}}], **one}, True),
            ({"not": {"not": {"all": [one, {"any": [no, two]}]}}}, True),
        ]
        for guard, says in table:
            with self.subTest(guard):
                self.assertIs(self.holds(guard, a=1, b=2), says)

    def test_an_operand_may_be_a_value_of_message_data_or_the_moment(self):
        table = [
            {"x": {">=": "$data.limit"}}, {"x": "$message.y"}, {"who": "$component"},
            {"where": "$state"}, {"x": {"<": "$now"}}, {"cost": "$$5"}, {"x": {"in": "$data.list"}},
            {"x": {"==": {"+": ["$data.limit", 2]}}},
        ]
        for guard in table:
            with self.subTest(guard):
                self.assertTrue(self.holds(
                    guard, {"limit": 5, "list": [6, 7]}, x=7, y=7, who="m", where="A", cost="$5"))

    def test_the_receipt_names_each_guard_with_the_values_it_saw(self):
        table = [
            ({"message.total": {">": 0}}, "message.total > 0 (saw -5)"),
            ({"total": {">=": "$data.limit"}}, 'total >= $data.limit = 10 (saw -5)'),
            ({"none.x": 1}, "none.x == 1 (saw nothing)"),
            ({"total": -5, "who": "you"}, 'who == "you" (saw "me")'),
            ({"total": 1, "who": "you"}, 'total == 1 (saw -5); who == "you" (saw "me")'),
            ({"not": {"who": "me"}}, 'not (who == "me" (saw "me"))'),
            ({"any": [{"total": 1}, {"total": 2}]},
             "none of: total == 1 (saw -5) | total == 2 (saw -5)"),
            ({"total": {"exists": False}}, "total exists false (saw -5)"),
        ]
        for guard, reason in table:
            with self.subTest(guard):
                _, receipt = self.go(
                    {"limit": 10}, {"total": -5, "who": "me"}, {"guard": guard, "to": "B"})
                self.assertEqual(receipt, Receipt(
                    "blocked", "m", None, "A", "A", 1, f"rules[0] wants {reason}", {"limit": 10}))

    def test_huge_numbers_are_compared_and_shown_like_others(self):
        for value in (10**400, -(10**400), 10**5000):
            with self.subTest(digits=str(value > 0)):
                _, receipt = self.go(None, {"x": value}, {"guard": {"x": "a"}, "to": "B"})
                self.assertEqual(receipt.outcome, "blocked")

    def test_what_can_never_hold_is_refused_at_load(self):
        table = [
            ({"x": {"<": True}}, "'<' can never hold for True"),
            ({"x": {">": None}}, "'>' can never hold for None"),
            ({"x": {"<=": [1]}}, "'<=' can never hold for [1]"),
            ({"x": {"in": 5}}, "'in' can never hold for 5"),
            ({"x": {"not_in": {"a": 1}}}, "'not_in' can never hold for {'a': 1}"),
            ({"x": {"startswith": 1}}, "'startswith' can never hold for 1"),
            ({"x": {"exists": 1}}, "'exists' can never hold for 1"),
            ({"x": {"exists": "yes"}}, "'exists' can never hold for 'yes'"),
            ({"x": {"=>": 1}}, "Unknown operator: '=>'"),
            ({"x": {"a": 1}}, "Unknown operator: 'a'"),
            ({"x": {}}, "No operator under 'x'"),
            ({"any": []}, "'any' takes a list of guards: []"),
            ({"all": {"x": 1}}, "'all' takes a list of guards: {'x': 1}"),
            ({"all": [5]}, "Not a guard: 5"),
            ({"not": [{"x": 1}]}, "Not a guard: [{'x': 1}]"),
            ({}, "Empty guard"),
            ([], "Not a guard: []"),
            (True, "Not a guard: True"),
            (5, "Not a guard: 5"),
        ]
        for guard, what in table:
            with self.subTest(guard):
                self.assertIn(what, str(self.refused(guard=guard, to="B")))

    def test_a_misspelt_operator_gets_a_close_match(self):
        error = self.refused(guard={"x": {"start_with": "a"}}, to="B")
        self.assertIn("did you mean 'startswith'?", str(error))


class Escapes(GuardCase):
    """What has broken out of other machines' guards is refused when the config is loaded."""

    CODE = [
        "__import__('os').system('touch pwned')", "().__class__.__bases__[0].__subclasses__()",
        "[x for x in ().__class__.__mro__]", "(lambda: 1)()", "data.__class__", "exec('1')",
        "open('/etc/passwd').read()", "eval:__import__('os')", "1 and 1", "x if y else z",
        "message.total > 0", "f'{1}'", "9**9**9**9", "!True", "a^b", "not a", "", "  ", ":", "a:",
        ":b", "os.path", "a b:c", "__import__('os'):system", "../x:y", "/etc/passwd:x", "m:a.b.c()",
    ]
    PATHS = [
        "__class__", "message.__class__", "data.x.__init__.__globals__", "().__class__",
        "message.x()", "data[0]", "message.items[0].x", "x.__len__", "a..b", ".a", "a.", "data.",
        "{x}", "message.x(1).y", "items.99999999999", "data.items." + "9" * 5000,
    ]

    def test_a_guard_is_no_expression(self):
        for code in self.CODE:
            with self.subTest(code):
                self.refused((ConfigError, ImportError_), guard=code, to="B")
                config, engine = self.config(guard=code, to="B"), FlexiFlowEngine(allow_imports=())
                self.raises((ConfigError, ImportError_), engine.create_component, config)

    def test_a_path_is_no_code(self):
        for path in self.PATHS:
            with self.subTest(path[:40]):
                self.refused(guard={path: 1}, to="B")
                self.refused(guard={"all": [{"not": {path: {"exists": True}}}]}, to="B")

    def test_a_value_is_no_code(self):
        values = [
            *("$" + path for path in self.PATHS), "$message.__class__", "$data.x()", "$os",
            "$__import__('os')", "${7*7}", "$(id)", "$", "$ data.x", "$DATA.x",
            "$component.__class__", "$state.name", "$now.year", "$id.x", "$message..x",
        ]
        for value in values:
            with self.subTest(value[:40]):
                self.refused(assign={"x": value})
                self.refused(assign={"x": [{"y": {"append": [[], value]}}]})
                self.refused(guard={"x": {"==": value}}, to="B")
                self.refused(emit={"name": "e", "with": {"x": value}})
                self.refused(send={"to": "m", "type": "go", "with": {"x": value}})

    def test_a_sum_of_something_else_than_numbers_is_refused(self):
        operands = [
            [True, 1], [1, False], ["a", "b"], [1, None], [[1], 1], [1], [1, 2, 3], [], 5, "ab",
            {"a": 1}, [1, "1"],
        ]
        for given in operands:
            for op in ("+", "-"):
                with self.subTest(op, operands=given):
                    self.refused(assign={"x": {op: given}})
        for given in ([1, 2], ["ab", "c"], [{"a": [1]}["a"]], [None, 1], 5):
            with self.subTest("append", operands=given):
                self.refused(assign={"x": {"append": given}})

    def test_text_that_looks_like_code_is_only_text(self):
        for text in (*self.CODE, "{{7*7}}", "%s%n", "'; DROP TABLE x; --"):
            with self.subTest(text):
                self.assertTrue(self.holds({"x": {"==": text}}, x=text))
                rule = {"assign": {"a": text, "b": "$message.x"}}
                component, _ = self.go(None, {"x": text}, rule)
                self.assertEqual(component.data, {"a": text, "b": text})

    def test_numbers_that_are_no_json_are_refused(self):
        for number in ("1e400", "NaN", "-Infinity", "9" * 5000):
            with self.subTest(number[:10]):
                text = json.dumps(self.config(guard={"x": {"<": "NUMBER"}}, to="B"))
                path = self.write("m.json", text.replace('"NUMBER"', number))
                self.raises(ConfigError, ConfigLoader.load_component_config, path)
                self.assertFalse(explain(path).is_valid)

    def test_attributes_of_python_objects_are_out_of_reach(self):
        class Item(str):
            secret = 1

        for path in ("message.item.secret", "item.secret", "item.real", "items.count", "n.real"):
            with self.subTest(path):
                asked = self.holds({path: {"exists": True}}, item=Item("a"), items=[1], n=5)
                self.assertFalse(asked)

    def test_a_pure_json_component_imports_opens_and_evaluates_nothing(self):
        config = {
            "name": "m", "initial_state": "A", "data": {"n": 0, "list": []},
            "states": {"A": {"exit": {"assign": {"left": "$now"}}}, "B": {"initial": "B.C"},
                       "B.C": {"entry": {"emit": "entered"}}},
            "rules": [
                {"from": "A", "on": "go", "guard": {"any": [{"x": {">": 1}}, {"not": {"y": 1}}]},
                 "to": "B", "assign": {"n": {"+": ["$data.n", 1]}}},
                {"from": "B", "on": "back", "guard": {"why": {"startswith": "be"}}, "to": "A"},
                {"on": "note", "assign": {"list": {"append": ["$data.list", "$message.text"]}},
                 "send": {"to": "m", "type": "echo", "after": "1h"}},
                {"on": "echo"},
                {"on": "fail", "assign": {"x": "$data.none"}},
            ],
        }
        self.write("m.json", config)
        child = self.python("-c", textwrap.dedent("""\
            import asyncio, sys
            import flexiflow

            seen = []
            watching = False

            def hook(event, args):
                if watching and event in ("import", "exec", "compile", "open"):
                    seen.append((event, str(args)[:200]))

            async def main():
                global watching
                engine = flexiflow.FlexiFlowEngine()
                engine.create_component("m.json")
                await engine.handle_message("m", "note", text="warm")
                sys.addaudithook(hook)
                watching = True
                outcomes = []
                for kind, fields in [
                    ("go", {"y": 1}), ("back", {}), ("go", {"x": 2}), ("back", {"why": "late"}),
                    ("back", {"why": "because"}), ("note", {"text": "__import__('os')"}),
                    ("echo", {"id": "i-1"}), ("go", {}), ("fail", {}),
                ]:
                    try:
                        receipt = await engine.handle_message("m", kind, **fields)
                        outcomes.append(receipt.outcome)
                    except flexiflow.FlexiFlowError as error:
                        outcomes.append(type(error).__name__)
                watching = False
                print(*outcomes)
                print(seen)
                await engine.close()

            asyncio.run(main())
            """))
        self.assertEqual((child.stdout, child.stderr), (
            "blocked ignored moved blocked moved stayed stayed moved StateError\n[]\n",
            "Not delivered, and kept in memory only: 2 to 'm'\n"))


class Predicates(GuardCase):
    def code(self, function):
        setattr(self.module, function.__name__, function)
        return f"code_of_t05:{function.__name__}"

    def test_a_predicate_sees_message_and_component(self):
        seen = []

        def rich(message, component):
            seen.append((message["x"], component.name, component.state, component.data))
            return component.data["money"] > message["x"]

        guard = self.code(rich)
        found = [self.holds(guard, {"money": 5}, x=price) for price in (4, 6)]
        self.assertEqual(found, [True, False])
        self.assertEqual(seen, [(price, "m", "A", {"money": 5}) for price in (4, 6)])

    def test_predicates_combine_with_comparisons(self):
        def yes(message, component):
            return 1

        def no(message, component):
            return ""

        yes, no = self.code(yes), self.code(no)
        table = [
            ({"all": [yes, {"x": 1}]}, True), ({"all": [yes, no]}, False),
            ({"any": [no, yes]}, True), ({"not": no}, True),
        ]
        for guard, says in table:
            with self.subTest(guard):
                self.assertIs(self.holds(guard, x=1), says)

    def test_a_predicate_that_says_no_is_named(self):
        def no(message, component):
            return False

        _, receipt = self.go(rule={"guard": self.code(no), "to": "B"})
        self.assertEqual(receipt.reason, "rules[0] wants code_of_t05:no said no")

    def test_a_predicate_that_raises_opens_no_later_door(self):
        error = KeyError("k")

        def broken(message, component):
            raise error

        config = self.config(guard=self.code(broken), to="B")
        config["rules"].append({"on": "go", "to": "B"})
        engine = FlexiFlowEngine()
        component = engine.create_component(config)
        found = self.raises(KeyError, self.run_async, engine.handle_message("m", "go"))
        self.assertEqual((found is error, component.state, component.seq), (True, "A", 0))

    def test_an_async_predicate_is_refused_at_load(self):
        async def later(message, component):
            return True

        class Later:
            async def __call__(self, message, component):
                return True

        self.module.Object = Later()
        for guard in (self.code(later), "code_of_t05:Object"):
            with self.subTest(guard):
                error = self.refused(guard=guard, to="B")
                self.assertIn(f"Not a plain function: {guard!r}", str(error))
        self.module.number = 5
        self.refused(guard="code_of_t05:number", to="B")

    def test_a_predicate_that_answers_with_an_awaitable_fails_the_message(self):
        async def later():
            return False

        def sly(message, component):
            return later()

        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # never awaited
            error = self.raises(StateError, self.holds, self.code(sly))
        self.assertIn("code_of_t05:sly", str(error))


class Values(GuardCase):
    def value(self, value, data=None, /, **message):
        """Return what a value in an `assign` comes to."""
        component, receipt = self.go(data, message, {"assign": {"found": value}})
        self.assertEqual((receipt.outcome, receipt.data), ("stayed", component.data))
        return component.data["found"]

    def test_json_is_itself(self):
        for value in (None, True, 0, -1.5, "", "a", [], {}, [1, {"a": [None]}], "a$b", {"$x": 1}):
            with self.subTest(value=value):
                self.assertEqual(self.value(value), value)

    def test_references_lead_into_message_data_and_the_moment(self):
        data = {"n": 1, "d": {"list": [10, {"x": "deep"}]}}
        message = {"a": {"b": [5, [6]]}, "id": "i-1", "none": None}
        table = [
            ("$message.a.b", [5, [6]]), ("$message.a.b.1.0", 6), ("$data.n", 1),
            ("$data.d.list.1.x", "deep"), ("$component", "m"), ("$state", "A"), ("$id", "i-1"),
            ("$now", 1_000_000.0), ("$message.none", None), ("$message.type", "go"),
            ("$data", data), ({"x": ["$data.n", {"y": "$message.a.b.0"}]}, {"x": [1, {"y": 5}]}),
        ]
        for value, found in table:
            with self.subTest(value):
                self.assertEqual(self.value(value, data, **message), found)
        self.assertEqual(self.value("$message", x=1), {"type": "go", "x": 1})

    def test_two_dollars_start_a_literal_one(self):
        table = {"$$": "$", "$$data.n": "$data.n", "$$$": "$$", "$$5": "$5", "5$": "5$"}
        for value, found in table.items():
            with self.subTest(value):
                self.assertEqual(self.value(value), found)
                self.assertEqual(self.value([{"x": value}]), [{"x": found}])

    def test_sums_and_lists_with_one_item_more(self):
        data = {"n": 5, "list": [1], "x": 0.5}
        table = [
            ({"+": ["$data.n", 1]}, 6), ({"-": ["$data.n", "$data.x"]}, 4.5), ({"-": [1, 5]}, -4),
            ({"+": [{"-": ["$data.n", 1]}, {"+": [1, 1]}]}, 6),
            ({"append": ["$data.list", {"a": "$data.n"}]}, [1, {"a": 5}]),
            ({"append": [[], None]}, [None]), ({"append": ["$data.list", [2]]}, [1, [2]]),
            ({"append": [{"append": ["$data.list", 2]}, 3]}, [1, 2, 3]),
            ({"+": [10**400, 1]}, 10**400 + 1),
        ]
        for value, found in table:
            with self.subTest(str(value)[:60]):
                self.assertEqual(self.value(value, data), found)

    def failing(self, value, data):
        """Return the error of a message whose value cannot be computed; nothing has changed."""
        engine = FlexiFlowEngine()
        config = self.config(data, assign={"first": 1, "found": value}, to="B")
        component = engine.create_component(config)
        sent = engine.handle_message("m", {"type": "go"})
        error = self.raises(FlexiFlowError, self.run_async, sent)
        self.assertEqual(
            (component.state, component.data, component.seq), ("A", data, 0))
        return error

    def test_a_missing_path_fails_the_message_and_is_named(self):
        data = {"d": {"x": 1}, "list": [1]}
        for path in ("$data.none", "$data.d.y.z", "$data.list.1", "$data.d.x.y", "$message.none",
                     "$data.list.-1", "$data.list.x", "$message.type.x"):
            for value in (path, [{"x": path}], {"append": [[], path]}, {"+": [path, 1]}):
                with self.subTest(path, value=value):
                    self.assertIn(path, self.failing(value, data).what)

    def test_what_cannot_be_computed_fails_the_message(self):
        data = {
            "text": "a", "flag": True, "none": None, "list": [1], "big": 1e308, "huge": 10**400}
        table = [
            {"+": ["$data.text", 1]}, {"+": ["$data.flag", 1]}, {"-": [1, "$data.none"]},
            {"+": ["$data.list", "$data.list"]}, {"+": ["$data.text", "$data.text"]},
            {"append": ["$data.text", "b"]}, {"append": ["$data.none", 1]},
            {"+": ["$data.big", "$data.big"]}, {"-": [-1e308, "$data.big"]},
            {"+": ["$data.huge", 0.5]},
        ]
        for value in table:
            with self.subTest(value):
                self.failing(value, data)

    def test_all_values_are_seen_before_any_is_set(self):
        component, _ = self.go({"a": 1, "b": 2}, None, {"assign": {"a": "$data.b", "b": "$data.a"}})
        self.assertEqual(component.data, {"a": 2, "b": 1})

    def test_assign_sets_top_level_keys(self):
        component, _ = self.go({"a": {"x": 1}}, None, {"assign": {"a.x": 2, "b": {"y": 3}}})
        self.assertEqual(component.data, {"a": {"x": 1}, "a.x": 2, "b": {"y": 3}})

    def test_an_emit_sees_the_data_after(self):
        engine, recorder = FlexiFlowEngine(clock=Clock()), Recorder()
        engine.create_component(self.config(
            {"n": 1}, to="B", assign={"n": {"+": ["$data.n", 1]}},
            emit={"name": "told", "with": {"n": "$data.n", "x": "$message.x"}}))

        async def main():
            await engine.event_bus.subscribe("told", "test", recorder)
            await engine.handle_message("m", "go", x=[5])

        self.run_async(main())
        self.assertEqual(recorder.take(), [{"n": 2, "x": [5]}])


class Aliasing(GuardCase):
    """Message, data, config, receipts and payloads share nothing that can be changed."""

    def setUp(self):
        super().setUp()
        self.engine = FlexiFlowEngine()

    def handle(self, message, name="m"):
        return self.run_async(self.engine.handle_message(name, message))

    def test_data_keeps_its_own_copy_of_a_message(self):
        component = self.engine.create_component(self.config(assign={"kept": "$message.order"}))
        message = {"type": "go", "order": {"items": [1]}}
        receipt = self.handle(message)
        message["order"]["items"].append("forged")
        receipt.data["kept"]["items"].append("forged")
        self.assertEqual(component.data, {"kept": {"items": [1]}})
        self.assertEqual(receipt.data, {"kept": {"items": [1]}})

    def test_data_keeps_its_own_copy_of_the_config(self):
        config = self.config({"list": [1]}, assign={"new": [{"x": []}]})
        component = self.engine.create_component(config)
        config["data"]["list"].append("forged")
        config["rules"][0]["assign"]["new"].append("forged")
        self.handle({"type": "go"})
        self.assertEqual(component.data, {"list": [1], "new": [{"x": []}]})

    def test_what_is_read_from_data_changes_neither_data_nor_config(self):
        component = self.engine.create_component(
            self.config({"list": [1]}, assign={"new": [{"x": []}]}))
        for _ in range(2):
            self.handle({"type": "go"})
            with contextlib.suppress(TypeError):
                component.data["list"].append("forged")
                component.data["new"][0]["x"].append("forged")
        self.handle({"type": "go"})
        self.assertEqual(component.data["new"], [{"x": []}])

    def test_data_given_at_creation_is_copied(self):
        data = {"list": [1]}
        config = self.config({"own": [1]}, assign={"a": {"append": ["$data.list", 2]}})
        one = self.engine.create_component(config, data=data)
        two = self.engine.create_component(config, name="n", data=data)
        data["list"].append("forged")
        self.handle({"type": "go"})
        self.assertEqual((one.data, two.data), (
            {"own": [1], "list": [1], "a": [1, 2]}, {"own": [1], "list": [1]}))

    def test_two_keys_set_from_one_value_are_two(self):
        config = self.config({"list": [1]}, assign={"a": "$data.list", "b": "$data.list"})
        config["rules"].append({
            "from": "A", "on": "more", "assign": {"a": {"append": ["$data.a", 2]}}})
        component = self.engine.create_component(config)
        self.handle({"type": "go"})
        first = self.handle({"type": "more"})
        second = self.handle({"type": "more"})
        self.assertEqual(
            (first.data["a"], second.data), ([1, 2], {"list": [1], "a": [1, 2, 2], "b": [1]}))
        self.assertEqual(component.data, second.data)

    def test_an_action_s_change_of_the_message_is_not_in_the_data(self):
        def act(message, component):
            message["order"].append("forged")

        self.module.act = act
        component = self.engine.create_component(
            self.config(assign={"kept": "$message.order"}, action="code_of_t05:act"))
        self.handle({"type": "go", "order": [1]})
        self.assertEqual(component.data, {"kept": [1]})

    def test_a_payload_is_a_copy(self):
        def spoil(data):
            data["list"].append("forged")

        component = self.engine.create_component(self.config(
            {"list": [1]}, emit={"name": "told", "with": {"list": "$data.list"}}))

        async def main():
            await self.engine.event_bus.subscribe("told", "test", spoil)
            await self.engine.handle_message("m", "go")

        self.run_async(main())
        self.assertEqual(component.data, {"list": [1]})


# --------------------------------------------------------------------------------------------
# 6. States, registry, packs, imports
# --------------------------------------------------------------------------------------------


class CodeCase(Case):
    """Tests whose configs name Python code, in modules that vanish after the test."""

    def setUp(self):
        super().setUp()
        self.known = ff.DEFAULT_REGISTRY.names()
        self.addCleanup(self.forget_states)
        self.addCleanup(self.forget_modules, list(sys.path))
        sys.path.insert(0, str(self.folder))

    def forget_states(self):
        """Take out of the default registry what the test has put there."""
        for name in set(ff.DEFAULT_REGISTRY.names()) - set(self.known):
            ff.DEFAULT_REGISTRY.unregister(name)

    def forget_modules(self, path):
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if str(self.folder) in str(getattr(module, "__file__", None)) + str(
                    getattr(module, "__path__", None)):
                del sys.modules[name]

    def module(self, name: str, source: str = "") -> None:
        """Write a module that the test's configs may import; folders of packages are made."""
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")

    def imported(self, *names: str):
        """Tell which of these modules have been imported."""
        return [name for name in names if name in sys.modules]


class BuiltInStates(Case):

    def step(self, state, message):
        proceed, following = asyncio.run(state.handle_message(message, None))
        return proceed, type(following).__name__

    def test_the_built_in_machine_is_that_of_1_0_1(self):
        moves = {
            ("InitialState", "start"): "AwaitingConfirmation",
            ("AwaitingConfirmation", "cancel"): "InitialState",
            ("ProcessingRequest", "complete"): "InitialState",
            ("ProcessingRequest", "error"): "ErrorHandling",
            ("ErrorHandling", "acknowledge"): "InitialState",
        }
        kinds = {kind for _, kind in moves} | {"confirm", "", "START"}
        names = ff.DEFAULT_REGISTRY.names()
        answers = {
            (name, kind): self.step(ff.DEFAULT_REGISTRY.create(name), {"type": kind})
            for name in names for kind in kinds
        }
        self.assertEqual(answers, {
            (name, kind): (True, moves[name, kind]) if (name, kind) in moves else (False, name)
            for name in names for kind in kinds
        })

    def test_confirm_wants_exactly_the_content_confirmed(self):
        contents = ["confirmed", "Confirmed", " confirmed", "", None, True, ["confirmed"]]
        state = ff.AwaitingConfirmation()
        found = [self.step(state, {"type": "confirm", "content": one})[0] for one in contents]
        found.append(self.step(state, {"type": "confirm"})[0])
        self.assertEqual(found, [True] + [False] * 7)

    def test_a_built_in_state_takes_no_message_without_a_type(self):
        state = ff.InitialState()
        answers = [asyncio.run(state.handle_message(message, None))
            for message in ({}, {"type": None}, {"type": ["start"]})]
        self.assertEqual(answers, [(False, state)] * 3)

    def test_a_move_makes_a_new_object(self):
        state = ff.InitialState()
        _, first = asyncio.run(state.handle_message({"type": "start"}, None))
        _, second = asyncio.run(state.handle_message({"type": "start"}, None))
        self.assertIsNot(first, second)

    def test_a_state_without_code_says_its_name(self):
        class Lazy(State):
            pass

        with self.assertRaises(NotImplementedError) as caught:
            asyncio.run(Lazy().handle_message({"type": "x"}, None))
        self.assertEqual(str(caught.exception), "Lazy has no handle_message")


class StateMachines(Case):

    def test_a_machine_starts_by_name_and_moves_by_message(self):
        machine = StateMachine.from_name("InitialState")
        took = [asyncio.run(machine.handle_message({"type": kind}, None))
            for kind in ("confirm", "start", "start", "cancel", "start")]
        self.assertEqual(took, [False, True, False, True, True])
        self.assertIs(type(machine.current_state), ff.AwaitingConfirmation)

    def test_an_unknown_name_lists_the_known_ones(self):
        error = self.raises(StateError, StateMachine.from_name, "Nirvana")
        self.assertEqual(str(error), textwrap.dedent("""\
            Unknown state: 'Nirvana'
            Why: no class is registered under this name
            Fix: use one of 'AwaitingConfirmation', 'ErrorHandling', 'InitialState', """
            "'ProcessingRequest'"))

    def test_a_name_one_typo_away_is_suggested(self):
        error = self.raises(StateError, StateMachine.from_name, "InitalState")
        self.assertEqual(error.fix, "did you mean 'InitialState'?")

    def test_an_answer_that_is_no_pair_of_bool_and_state_is_refused(self):
        class Odd(State):
            async def handle_message(self, message, component):
                return message["answer"]

        for answer in ((True, None), (True, "Done"), (True, Odd), None, True, (True,),
                (True, Odd(), 1), [True, Odd()]):
            with self.subTest(answer=answer):
                machine = StateMachine(Odd())
                before = machine.current_state
                with self.assertRaises(StateError) as caught:
                    asyncio.run(machine.handle_message({"type": "x", "answer": answer}, None))
                self.assertEqual(
                    (caught.exception.what, caught.exception.fix, machine.current_state),
                    (f"State Odd answered {answer!r}",
                     "return True, NextState() or return False, self", before))

    def test_a_refusal_needs_no_state_beside_it(self):
        class Refusing(State):
            async def handle_message(self, message, component):
                return False, message["state"]

        for beside in (None, ff.InitialState(), "Done"):
            machine = StateMachine(Refusing())
            took = asyncio.run(machine.handle_message({"type": "x", "state": beside}, None))
            self.assertEqual((took, type(machine.current_state)), (False, Refusing))

    def test_an_exception_of_a_state_passes_and_moves_nothing(self):
        class Broken(State):
            async def handle_message(self, message, component):
                raise KeyError("my own")

        machine = StateMachine(Broken())
        with self.assertRaises(KeyError) as caught:
            asyncio.run(machine.handle_message({"type": "x"}, None))
        self.assertEqual((caught.exception.args, type(machine.current_state)),
            (("my own",), Broken))

    def test_a_state_may_leave_its_place_to_another_object(self):
        class Counting(State):
            def __init__(self, n=0):
                self.n = n

            async def handle_message(self, message, component):
                return True, Counting(self.n + 1)

        machine = StateMachine(Counting())
        for _ in range(3):
            asyncio.run(machine.handle_message({"type": "x"}, None))
        self.assertEqual(machine.current_state.n, 3)


class StateRegistries(Case):

    class Idle(State):
        pass

    class Busy(State):
        pass

    def test_a_name_is_registered_created_and_forgotten(self):
        registry = ff.StateRegistry()
        registry.register("Waiting", self.Idle)
        registry.register("Busy", self.Busy)
        names, state = registry.names(), registry.create("Waiting")
        registry.unregister("Waiting")
        registry.unregister("Waiting")
        self.assertEqual((names, type(state), registry.names()),
            (["Busy", "Waiting"], self.Idle, ["Busy"]))

    def test_a_later_class_replaces_an_earlier_one(self):
        registry = ff.StateRegistry()
        registry.register("Waiting", self.Idle)
        registry.register("Waiting", self.Busy)
        self.assertEqual((type(registry.create("Waiting")), registry.names()),
            (self.Busy, ["Waiting"]))

    def test_only_state_classes_are_registered(self):
        registry = ff.StateRegistry()
        for wrong in (dict, self.Idle(), "Idle", None, lambda: self.Idle()):
            with self.subTest(wrong=wrong):
                error = self.raises(StateError, registry.register, "X", wrong)
                self.assertEqual(str(error),
                    ff.printable(f"Not a State class: {wrong!r}") + "\nFix: inherit from State")
        self.assertEqual(registry.names(), [])

    def test_a_new_registry_knows_nothing(self):
        error = self.raises(StateError, ff.StateRegistry().create, "InitialState")
        self.assertEqual(error.fix, "none is known here")

    def test_a_registry_looks_up_in_its_parent_what_it_does_not_know(self):
        parent = ff.StateRegistry()
        parent.register("Idle", self.Idle)
        parent.register("Busy", self.Busy)
        child = ff.StateRegistry(parent)
        child.register("Idle", self.Busy)
        self.assertEqual(
            (child.get("Idle"), child.get("Busy"), child.get("Gone"), child.names(),
             parent.get("Idle"), child.name_of(self.Busy()), child.name_of(self.Idle())),
            (self.Busy, self.Busy, None, ["Busy", "Idle"], self.Idle, "Idle", "Idle"))

    def test_a_state_goes_by_its_key_and_an_unregistered_one_by_its_class(self):
        registry = ff.StateRegistry()
        registry.register("Waiting", self.Idle)
        self.assertEqual((registry.name_of(self.Idle()), registry.name_of(self.Busy())),
            ("Waiting", "Busy"))

    def test_the_default_registry_holds_the_built_in_states(self):
        self.assertEqual(
            {name: ff.DEFAULT_REGISTRY.get(name) for name in ff.DEFAULT_REGISTRY.names()},
            {"AwaitingConfirmation": ff.AwaitingConfirmation, "ErrorHandling": ff.ErrorHandling,
             "InitialState": ff.InitialState, "ProcessingRequest": ff.ProcessingRequest})


class DottedPaths(CodeCase):

    def test_a_dotted_path_names_what_a_module_holds(self):
        self.module("shop.states", """
            class Shelf:
                class Box:
                    size = 3
        """)
        found = ff.load_symbol(" shop.states : Shelf ")
        self.assertEqual((found.__name__, ff.load_symbol("shop.states:Shelf.Box.size")),
            ("Shelf", 3))

    def test_what_is_no_dotted_path_is_refused(self):
        like = {"shop.states": "shop:states", "shop.states.Shelf": "shop.states:Shelf"}
        for path in ("", ":", "shop", *like, "shop:", ":Shelf", " : "):
            with self.subTest(path=path):
                self.assertEqual(str(self.raises(ImportError_, ff.load_symbol, path)),
                    f"Not a dotted path: {path!r}\nFix: write it like "
                    f"{like.get(path, 'package.module:name')!r}")

    def test_odd_paths_are_refused_as_import_errors(self):
        paths = ("a:b:c", "shop/states:X", ".states:X", "..:X", "a b:X", "sh\0op:X", "json:.",
            "json:dumps.", "\ud800:X", "json:\ud800", "1:1", "con:con", "x" * 5000 + ":X")
        for path in paths:
            with self.subTest(path=path):
                self.assertIsInstance(self.raises(FlexiFlowError, ff.load_symbol, path),
                    ImportError_)

    def test_what_is_no_dotted_path_reaches_no_import(self):
        asked = []

        class Finder:
            def find_spec(self, name, path=None, target=None):
                asked.append(name)

        sys.meta_path.insert(0, Finder())
        self.addCleanup(sys.meta_path.pop, 0)
        paths = ("__import__('os'):system", "a b:c", "a-b:c", "a..b:c", ".a:b", "a.:b", "a/b:c",
            "1a:b", "a:b:c", "a:b.", "a:.b", "a:b c", "a:b()", "a:b[0]", "a\0:b", "a:\ud800")
        errors = [self.raises(ImportError_, ff.load_symbol, path) for path in paths]
        self.assertEqual(([error.what for error in errors], asked),
            ([f"Not a dotted path: {path!r}" for path in paths], []))

    def test_a_module_that_is_not_there_is_named(self):
        error = self.raises(ImportError_, ff.load_symbol, "no_such_shop.states:Shelf")
        self.assertEqual((str(error), type(error.__cause__)), (textwrap.dedent("""\
            Module not found: 'no_such_shop.states'
            Why: ModuleNotFoundError: No module named 'no_such_shop'
            Fix: check the spelling and sys.path
            Context:
              dotted_path='no_such_shop.states:Shelf'"""), ModuleNotFoundError))

    def test_a_module_whose_own_import_fails_shows_the_real_cause(self):
        self.module("broken", "import a_missing_library\n")
        error = self.raises(ImportError_, ff.load_symbol, "broken:X")
        self.assertEqual(str(error), textwrap.dedent("""\
            Cannot import 'broken'
            Why: ModuleNotFoundError: No module named 'a_missing_library'
            Fix: mend the module
            Context:
              dotted_path='broken:X'"""))
        self.assertIsInstance(error.__cause__, ModuleNotFoundError)

    def test_a_module_that_exits_is_an_import_error(self):
        self.module("exits", "raise SystemExit(7)\n")
        error = self.raises(ImportError_, ff.load_symbol, "exits:X")
        self.assertEqual((error.what, error.why, error.__cause__.code),
            ("Cannot import 'exits'", "SystemExit: 7", 7))

    def test_a_module_with_bad_syntax_is_an_import_error(self):
        self.module("typo", "def (:\n")
        error = self.raises(ImportError_, ff.load_symbol, "typo:X")
        self.assertEqual((error.what, type(error.__cause__)), ("Cannot import 'typo'", SyntaxError))

    def test_ctrl_c_during_an_import_is_passed_on(self):
        self.module("interrupted", "raise KeyboardInterrupt\n")
        with self.assertRaises(KeyboardInterrupt):
            ff.load_symbol("interrupted:X")

    def test_a_name_that_a_module_lacks_brings_a_close_match(self):
        self.module("shop.states", "class Shelf: pass\nclass Counter: pass\n")
        self.assertEqual(str(self.raises(ImportError_, ff.load_symbol, "shop.states:Shelv")),
            textwrap.dedent("""\
                No 'Shelv' in module 'shop.states'
                Fix: did you mean 'Shelf'?
                Context:
                  dotted_path='shop.states:Shelv'"""))

    def test_flexiflows_own_paths_lead_to_this_very_file(self):
        paths = ("flexiflow:State", "flexiflow.state_machine:State", "flexiflow.engine:State")
        self.assertEqual([ff.load_symbol(path) for path in paths], [State] * 3)

    def test_allow_imports_lets_modules_and_what_is_below_them_in(self):
        for name in ("shop", "shop.states", "shopping", "shop_other"):
            self.module(name if "." in name else f"{name}.__init__", "class X: pass\n")
        table = [
            (None, ["shop", "shop.states", "shopping", "shop_other"]),
            (("shop.",), ["shop", "shop.states"]),
            (("shop",), ["shop", "shop.states"]),
            (["shop.states"], ["shop.states"]),
            (("shopping", "shop.states"), ["shop.states", "shopping"]),
            ((), []),
            (("",), []),
            (("sho",), []),
        ]
        for allowed, wanted in table:
            with self.subTest(allowed=allowed):
                passed = []
                for name in ("shop", "shop.states", "shopping", "shop_other"):
                    with contextlib.suppress(ImportError_):
                        ff.load_symbol(f"{name}:X", allowed)
                        passed.append(name)
                self.assertEqual(passed, wanted)

    def test_what_is_not_allowed_is_not_imported(self):
        self.module("evil", "class X: pass\n")
        error = self.raises(ImportError_, ff.load_symbol, "evil:X", ("shop.",))
        self.assertEqual((str(error), self.imported("evil")), (textwrap.dedent("""\
            Import not allowed: 'evil:X'
            Why: the code of 'evil' may not be run here
            Fix: allow it with allow_imports=('evil',) or --allow-import evil"""), []))

    def test_what_an_allowed_module_has_imported_is_not_allowed_by_that(self):
        self.module("shop", "import os\nfrom subprocess import call\nclass X: pass\n")
        paths = ("shop:os.system", "shop:os.path.join", "shop:call")
        errors = [self.raises(ImportError_, ff.load_symbol, path, ("shop",)) for path in paths]
        self.assertEqual([error.what for error in errors],
            [f"Import not allowed: {path!r}" for path in paths])


class StatePacks(CodeCase):

    SESSION = """
        from flexiflow import State, StatePack, StateSpec, TransitionSpec

        class Idle(State):
            async def handle_message(self, message, component):
                return (True, Active()) if message["type"] == "start" else (False, self)

        class Active(State):
            async def handle_message(self, message, component):
                return (True, Idle()) if message["type"] == "timeout" else (False, self)

        class Initial(State):
            async def handle_message(self, message, component):
                return (True, Active()) if message["type"] == "go" else (False, self)

        class SessionPack(StatePack):
            name = "session"

            def provides(self):
                return {"SessionIdle": StateSpec(Idle), "SessionActive": StateSpec(Active, "On")}

            def transitions(self):
                return [TransitionSpec("SessionIdle", "start", "SessionActive"),
                        TransitionSpec("SessionActive", "timeout", "SessionIdle", "is_expired")]

            def depends_on(self):
                return {"ErrorHandling"}

        class StartPack(StatePack):
            name = "start"

            def provides(self):
                return {"InitialState": StateSpec(Initial)}

        class Stranger:
            name = "stranger"
            provides = transitions = depends_on = lambda self: {}

        class Broken(StatePack):
            def __init__(self):
                raise RuntimeError("no network")

        class Nameless:
            provides = transitions = depends_on = lambda self: {}

        ready = SessionPack()
        number = 5
    """

    def setUp(self):
        super().setUp()
        self.module("packs_of_test", self.SESSION)

    def test_records_have_the_fields_of_1_0_1(self):
        self.assertEqual(
            (ff.TransitionSpec("A", "go", "B"), ff.StateSpec(State)),
            (ff.TransitionSpec(from_state="A", on_message="go", to_state="B", guard=None,
                description=None), ff.StateSpec(state_class=State, description=None)))

    def test_a_mapping_is_a_pack(self):
        pack = ff.MappingPack({"B": ff.ErrorHandling, "A": ff.InitialState})
        self.assertEqual(
            (pack.name, list(pack.provides().items()), pack.transitions(), pack.depends_on()),
            ("mapping", [("A", ff.StateSpec(ff.InitialState)),
                ("B", ff.StateSpec(ff.ErrorHandling))],
             [], set()))

    def test_packs_are_loaded_from_paths_to_classes_or_objects_and_from_objects(self):
        mapping = ff.MappingPack({"A": ff.InitialState})
        packs = ff.load_packs(
            packs=["packs_of_test:SessionPack", "packs_of_test:Stranger", mapping])
        ready = ff.load_packs(packs=["packs_of_test:ready"])
        self.assertEqual(
            ([pack.name for pack in packs], packs[2] is mapping, [pack.name for pack in ready],
             ready[0] is sys.modules["packs_of_test"].ready),
            (["session", "stranger", "mapping"], True, ["session"], True))

    def test_no_packs_are_no_packs(self):
        (mapping,) = ff.load_packs(states={})
        self.assertEqual((ff.load_packs(), ff.load_packs(packs=[]), mapping.provides()),
            ([], [], {}))

    def test_states_and_packs_together_are_refused(self):
        error = self.raises(ConfigError, ff.load_packs, states={}, packs=[])
        self.assertEqual(str(error),
            "Both states and packs given\nFix: wrap the states into a MappingPack")

    def test_what_is_no_pack_is_refused(self):
        table = {
            "packs_of_test:number": (ConfigError, "Not a StatePack: 'packs_of_test:number'"),
            "packs_of_test:Nameless": (ConfigError, "Not a StatePack: 'packs_of_test:Nameless'"),
            "packs_of_test:Broken": (ConfigError, "Pack could not be made: 'packs_of_test:Broken'"),
            "packs_of_test:Gone": (ImportError_, "No 'Gone' in module 'packs_of_test'"),
            "no_packs:X": (ImportError_, "Module not found: 'no_packs'"),
            "no_colon": (ImportError_, "Not a dotted path: 'no_colon'"),
            5: (ConfigError, "Not a StatePack: 5"),
        }
        errors = {one: self.raises(FlexiFlowError, ff.load_packs, packs=[one]) for one in table}
        self.assertEqual({one: (type(error), error.what) for one, error in errors.items()}, table)

    def test_a_pack_that_cannot_be_made_keeps_its_cause(self):
        error = self.raises(ConfigError, ff.load_packs, packs=["packs_of_test:Broken"])
        self.assertEqual((error.why, repr(error.__cause__)),
            ("RuntimeError: no network", "RuntimeError('no network')"))

    def test_no_state_is_provided_twice(self):
        error = self.raises(ConfigError, ff.load_packs, packs=[
            "packs_of_test:ready", ff.MappingPack({"SessionIdle": ff.InitialState})])
        self.assertEqual(str(error),
            "State 'SessionIdle' is provided twice\nWhy: by 'session' and 'mapping'")

    def test_no_state_hides_a_built_in_one_where_these_are_told(self):
        packs = ["packs_of_test:StartPack"]
        error = self.raises(ConfigError, ff.load_packs, packs=packs, builtin_keys={"InitialState"})
        (unchecked,) = ff.load_packs(packs=packs)
        self.assertEqual((str(error), unchecked.name), (
            "State 'InitialState' hides a built-in one\nWhy: pack 'start' provides it", "start"))

    def test_the_first_provider_of_a_state_is_told(self):
        packs = [ff.MappingPack({"A": State, "B": State}), ff.load_symbol("packs_of_test:ready")]
        self.assertEqual(ff.collect_provided_keys(packs),
            {"A": "mapping", "B": "mapping", "SessionIdle": "session", "SessionActive": "session"})


# --------------------------------------------------------------------------------------------
# 7. Rules: compile and decide
# --------------------------------------------------------------------------------------------


class RuleCase(CodeCase):
    """Tests of rules, decided on alone or run by an engine in memory."""

    def definition(self, *rules, states=("A", "B"), initial=None, **settings):
        """Compile a config with these rules; the first state is initial."""
        return ConfigLoader.load_component_config(
            self.config(*rules, states=states, initial=initial, **settings)).definition

    @staticmethod
    def config(*rules, states=("A", "B"), initial=None, **settings):
        states = states if isinstance(states, dict) else {name: {} for name in states}
        return {"name": "m", "initial_state": initial or next(iter(states)), "states": states,
            "rules": list(rules), **settings}

    @staticmethod
    def scope(message, data=None, state="A", now=1000.0):
        return {"message": message, "data": {} if data is None else data, "component": "m",
            "state": state, "id": "id-1", "now": now, "self": None}

    def decide(self, definition, leaf, message, data=None, now=1000.0):
        """Return what is decided as plain values."""
        plan = ff.decide(definition, leaf, self.scope(message, data, leaf, now))
        sends = [(out.to, out.message, out.delay, out.id) for out in plan.sends]
        return {"outcome": plan.outcome, "reason": plan.reason, "data": plan.data, "sends": sends,
            "emits": list(plan.emits), "timers": list(plan.timers)}

    def talk(self, config, *messages, clock=None):
        """Give messages to a component in memory; return the receipts and the component."""
        async def run():
            engine = FlexiFlowEngine(clock=clock or Clock())
            component = engine.create_component(config)
            receipts = [await component.handle_message(
                {"type": message} if isinstance(message, str) else message) for message in messages]
            await engine.close()
            return receipts, component

        return self.run_async(run())


class RuleOrder(RuleCase):
    """Which states are left and entered, in which order."""

    TREE = ("A", "A.1", "A.1.a", "A.1.b", "A.2", "B", "B.1", "B.1.a", "C")
    INITIAL = {"A": "A.1", "A.1": "A.1.a", "B": "B.1", "B.1": "B.1.a"}

    def config_of(self, rule, initial):
        """Return a config whose `data.log` tells what was left (-) and entered (+)."""
        def note(mark):
            return {"log": {"append": ["$data.log", mark]}}

        states = {
            name: {"entry": {"assign": note("+" + name)}, "exit": {"assign": note("-" + name)}}
            for name in self.TREE
        }
        for name, child in self.INITIAL.items():
            states[name]["initial"] = child
        return self.config(
            {"on": "clear", "assign": {"log": []}}, {"on": "go", **rule, "assign": note("rule")},
            states=states, initial=initial, data={"log": []})

    # (what, state before, rule, what happens, state after)
    TABLE = [
        ("no to", "A.1.a", {"from": "A.1.a"}, "rule", "A.1.a"),
        ("no to, on the parent", "A.1.a", {"from": "A.1"}, "rule", "A.1.a"),
        ("no to, on the grandparent", "A.1.b", {"from": "A"}, "rule", "A.1.b"),
        ("no to, on the root", "A.1.b", {"from": "*"}, "rule", "A.1.b"),
        ("to self", "C", {"from": "C", "to": "C"}, "-C rule +C", "C"),
        ("to self, nested", "A.1.b", {"from": "A.1.b", "to": "A.1.b"},
         "-A.1.b rule +A.1.b", "A.1.b"),
        ("to self, of a parent", "A.1.b", {"from": "A.1", "to": "A.1"},
         "-A.1.b -A.1 rule +A.1 +A.1.a", "A.1.a"),
        ("to self, of the outermost", "A.1.b", {"from": "A", "to": "A"},
         "-A.1.b -A.1 -A rule +A +A.1 +A.1.a", "A.1.a"),
        ("to sibling", "A.1.a", {"from": "A.1.a", "to": "A.1.b"}, "-A.1.a rule +A.1.b", "A.1.b"),
        ("to sibling of the parent", "A.1.a", {"from": "A.1.a", "to": "A.2"},
         "-A.1.a -A.1 rule +A.2", "A.2"),
        ("to the parent's sibling, which has children", "A.2", {"from": "A.2", "to": "A.1"},
         "-A.2 rule +A.1 +A.1.a", "A.1.a"),
        ("to a cousin past its parent's initial", "A.2", {"from": "A.2", "to": "A.1.b"},
         "-A.2 rule +A.1 +A.1.b", "A.1.b"),
        ("to another tree", "A.1.a", {"from": "A.1.a", "to": "B"},
         "-A.1.a -A.1 -A rule +B +B.1 +B.1.a", "B.1.a"),
        ("to a leaf of another tree", "A.1.b", {"from": "A.1.b", "to": "B.1.a"},
         "-A.1.b -A.1 -A rule +B +B.1 +B.1.a", "B.1.a"),
        ("in from outside, three levels", "C", {"from": "C", "to": "A.1.b"},
         "-C rule +A +A.1 +A.1.b", "A.1.b"),
        ("out to a plain state, three levels", "A.1.a", {"from": "A.1.a", "to": "C"},
         "-A.1.a -A.1 -A rule +C", "C"),
        ("to the parent", "A.1.b", {"from": "A.1.b", "to": "A.1"},
         "-A.1.b -A.1 rule +A.1 +A.1.a", "A.1.a"),
        ("to the grandparent", "A.1.b", {"from": "A.1.b", "to": "A"},
         "-A.1.b -A.1 -A rule +A +A.1 +A.1.a", "A.1.a"),
        ("to a child", "A.1.a", {"from": "A.1", "to": "A.1.b"}, "-A.1.a rule +A.1.b", "A.1.b"),
        ("to the child that is active", "A.1.a", {"from": "A.1", "to": "A.1.a"},
         "-A.1.a rule +A.1.a", "A.1.a"),
        ("to a grandchild", "A.1.a", {"from": "A", "to": "A.1.b"},
         "-A.1.a -A.1 rule +A.1 +A.1.b", "A.1.b"),
        ("to a child, entering again", "A.1.a", {"from": "A.1", "to": "A.1.b", "reenter": True},
         "-A.1.a -A.1 rule +A.1 +A.1.b", "A.1.b"),
        ("to a grandchild, entering again", "A.2", {"from": "A", "to": "A.1.b", "reenter": True},
         "-A.2 -A rule +A +A.1 +A.1.b", "A.1.b"),
        ("a parent's rule taken in a child", "A.1.b", {"from": "A.1", "to": "A.2"},
         "-A.1.b -A.1 rule +A.2", "A.2"),
        ("a grandparent's rule taken in a child", "A.1.a", {"from": "A", "to": "C"},
         "-A.1.a -A.1 -A rule +C", "C"),
        ("a parent's rule to another tree", "A.1.a", {"from": "A.1", "to": "B.1"},
         "-A.1.a -A.1 -A rule +B +B.1 +B.1.a", "B.1.a"),
        ("from anywhere, out", "A.1.a", {"from": "*", "to": "C"}, "-A.1.a -A.1 -A rule +C", "C"),
        ("from anywhere, within one tree", "A.1.a", {"from": "*", "to": "A.2"},
         "-A.1.a -A.1 -A rule +A +A.2", "A.2"),
        ("from anywhere, to where it is", "C", {"from": "*", "to": "C"}, "-C rule +C", "C"),
        ("without from, which is from anywhere", "C", {"to": "A"},
         "-C rule +A +A.1 +A.1.a", "A.1.a"),
        ("from a list, each as if alone", "A.1.a", {"from": ["C", "A.1"], "to": "A.1.b"},
         "-A.1.a rule +A.1.b", "A.1.b"),
    ]

    def test_states_are_left_inside_out_and_entered_outside_in(self):
        for what, before, rule, steps, after in self.TABLE:
            with self.subTest(what):
                receipts, _ = self.talk(self.config_of(rule, before), "clear", "go")
                self.assertEqual(tuple(receipts[1])[:6] + (receipts[1].data,), (
                    "moved" if "to" in rule else "stayed", "m", receipts[1].id, before, after, 2,
                    {"log": steps.split()}))

    def test_a_new_component_enters_down_to_a_leaf(self):
        receipts, component = self.talk(self.config_of({"from": "A.1.a"}, "A"), "go")
        self.assertEqual((component.state, component.data),
            ("A.1.a", {"log": ["+A", "+A.1", "+A.1.a", "rule"]}))

    def test_a_new_component_may_start_past_an_initial_child(self):
        _, component = self.talk(self.config_of({"from": "A"}, "A.1.b"), "go")
        self.assertEqual((component.state, component.data),
            ("A.1.b", {"log": ["+A", "+A.1", "+A.1.b", "rule"]}))

    def test_a_dot_makes_a_child_only_where_the_parent_is_declared(self):
        states = {"A": {"initial": "A.x.y"}, "A.x.y": {}, "B.1": {}}
        config = self.config({"from": "A", "on": "go", "to": "B.1"},
            {"from": "B.1", "on": "go", "to": "A"}, states=states, initial="B.1")
        receipts, _ = self.talk(config, "go", "go")
        self.assertEqual([receipt.to_state for receipt in receipts], ["A.x.y", "B.1"])

    def test_values_then_actions_sends_and_events_follow_the_same_order(self):
        self.module("order_of_test", """
            log = []

            def note(mark):
                def action(message, component):
                    log.append((mark, component.state, dict(component.data)))
                return action

            left, rule, entered, child = map(note, ["left", "rule", "entered", "child"])
        """)

        def effects(mark):
            return {"assign": {mark: "$state", "last": mark}, "action": f"order_of_test:{mark}",
                "emit": {"name": mark, "with": "$data.last"},
                "send": {"to": "nobody", "type": mark, "with": {"last": "$data.last"}}}

        config = self.config(
            {"from": "A", "on": "go", "to": "B", **effects("rule")},
            states={"A": {"exit": effects("left")}, "B": {"initial": "B.1", "entry":
                effects("entered")}, "B.1": {"entry": effects("child")}})
        plan = self.decide(ConfigLoader.load_component_config(config).definition, "A",
            {"type": "go"})
        receipts, _ = self.talk(config, "go")
        marks = ["left", "rule", "entered", "child"]
        data = {"left": "A", "rule": "A", "entered": "B.1", "child": "B.1", "last": "child"}
        self.assertEqual(
            (plan, receipts[0].data, sys.modules["order_of_test"].log), (
                {"outcome": "moved", "reason": None, "data": data, "timers": [],
                 "sends": [("nobody", {"type": mark, "last": mark}, 0.0, None) for mark in marks],
                 "emits": [(mark, mark) for mark in marks]},
                data, [(mark, "B.1", data) for mark in marks]))


class RuleSelection(RuleCase):
    """Which of the rules takes a message."""

    TREE = {"A": {"initial": "A.1"}, "A.1": {"initial": "A.1.a"}, "A.1.a": {}, "B": {}}

    def first(self, *rules, message=None):
        """Return which rule took the message, by its number."""
        numbered = [{**rule, "assign": {"by": number}} for number, rule in enumerate(rules)]
        definition = self.definition(*numbered, states=self.TREE)
        plan = self.decide(definition, "A.1.a", {"type": "go", **(message or {})})
        return plan["data"].get("by", plan["outcome"])

    def test_the_order_of_asking(self):
        leaf, parent, outer = {"from": "A.1.a"}, {"from": "A.1"}, {"from": "A"}
        exact, star, no = {"on": "go"}, {"on": "*"}, {"guard": {"never": True}}
        table = [
            ("the leaf before its parents", [{**outer, **exact}, {**parent, **exact},
                {**leaf, **exact}], 2),
            ("the parent before its parent", [{**outer, **exact}, {**parent, **exact}], 1),
            ("a state before anywhere", [exact, {**outer, **exact}], 1),
            ("anywhere at last", [{"from": "B", **exact}, exact], 1),
            ("file order within a state", [{**leaf, **exact, "guard": {"n": 1}},
                {**leaf, **exact, "guard": {"n": {">": 0}}}, {**leaf, **exact}], 0),
            ("the exact type before any", [{**leaf, **star}, {**leaf, **exact}], 1),
            ("any of the leaf before the exact type of the parent",
                [{**parent, **exact}, {**leaf, **star}], 1),
            ("any where every exact guard is false", [{**leaf, **star},
                {**leaf, **exact, **no}], 0),
            ("the parent where every guard of the leaf is false",
                [{**parent, **exact}, {**leaf, **exact, **no}, {**leaf, **star, **no}], 0),
            ("any of anywhere at the very last", [star, exact], 1),
            ("a list of types", [{**leaf, "on": ["stop", "go"]}, {**parent, **exact}], 0),
            ("a list of types with any", [{**leaf, "on": ["x", "*"]}, {**leaf, **exact}], 1),
            ("a list of states", [{**outer, **exact}, {"from": ["B", "A.1.a"], **exact}], 1),
            ("none whose guard is false", [{**leaf, **exact, **no}], "blocked"),
            ("none of another state", [{"from": "B", **exact}], "ignored"),
            ("none at all", [{**leaf, "on": "stop"}], "unknown"),
        ]
        for what, rules, wanted in table:
            with self.subTest(what):
                self.assertEqual(self.first(*rules, message={"n": 1}), wanted)

    def test_the_leafs_class_is_asked_after_every_rule(self):
        self.module("asked_of_test", """
            from flexiflow import State, InitialState

            class Legacy(State):
                async def handle_message(self, message, component):
                    return True, InitialState()
        """)
        rules = [{"from": "Legacy", "on": "go", "guard": {"n": 1}, "assign": {"by": "state"}},
            {"from": "*", "on": "go", "guard": {"n": 2}, "assign": {"by": "anywhere"}}]
        config = self.config(*rules, states={"Legacy": "asked_of_test:Legacy"})
        receipts, _ = self.talk(config, *({"type": "go", "n": n} for n in (1, 2, 3)))
        self.assertEqual([(one.outcome, one.to_state, one.data) for one in receipts], [
            ("stayed", "Legacy", {"by": "state"}), ("stayed", "Legacy", {"by": "anywhere"}),
            ("moved", "InitialState", {"by": "anywhere"})])

    def test_a_guard_that_raises_fails_the_message_and_opens_no_later_door(self):
        self.module("guards_of_test", """
            asked = []

            def broken(message, component):
                raise LookupError("no list of guests")

            def later(message, component):
                asked.append("later")
                return True
        """)
        config = self.config(
            {"from": "A", "on": "go", "guard": "guards_of_test:broken", "to": "B"},
            {"from": "A", "on": "go", "guard": "guards_of_test:later", "to": "B"},
            {"on": "*", "to": "B"}, data={"n": 1})

        async def run():
            engine = FlexiFlowEngine()
            component = engine.create_component(config)
            with self.assertRaises(LookupError) as caught:
                await component.handle_message({"type": "go"})
            return caught.exception.args, component.state, component.data, component.seq

        self.assertEqual((self.run_async(run()), sys.modules["guards_of_test"].asked),
            ((("no list of guests",), "A", {"n": 1}, 0), []))

    def test_a_blocked_message_is_told_each_guard_with_what_it_saw(self):
        definition = self.definition(
            {"from": "A", "on": "pay", "guard": {"amount": {">=": "$data.total"}}, "to": "B"},
            {"from": "*", "on": "pay", "guard": {"vip": True, "data.total": {"<": 5}}, "to": "B"})
        plan = self.decide(definition, "A", {"type": "pay", "amount": 3}, {"total": 10})
        self.assertEqual((plan["outcome"], plan["reason"]), (
            "blocked", 'rules[0] wants amount >= $data.total = 10 (saw 3); '
            "rules[1] wants vip == true (saw nothing); data.total < 5 (saw 10)"))

    def test_what_is_not_accepted_is_told_from_what_is_not_known(self):
        definition = self.definition({"from": "B", "on": "pay"})
        plans = [self.decide(definition, "A", {"type": kind}) for kind in ("pay", "pray")]
        self.assertEqual([(plan["outcome"], plan["reason"]) for plan in plans],
            [("ignored", "A does not take 'pay'"), ("unknown", "A does not take 'pray'")])


class RuleDecide(RuleCase):
    """Deciding is pure, and values are computed in order."""

    def test_asked_twice_it_answers_the_same_and_changes_nothing(self):
        definition = self.definition(
            {"from": "A", "on": "go", "guard": {"message.items": {"contains": 1}}, "to": "B",
             "assign": {"items": {"append": ["$message.items", "$data.n"]}, "n":
                {"+": ["$data.n", 1]}, "kept": "$message.items", "deep": "$data.deep",
                "made": [[]]},
             "emit": {"name": "gone", "with": ["$data.items"]},
             "send": {"to": "$message.who", "type": "hi", "with": {"items": "$data.items"}}},
            {"from": "B", "after": "$data.n", "to": "A"},
            states={"A": {"exit": {"assign": {"left": "$now"}}}, "B": {}})
        message = {"type": "go", "items": [1, [2]], "who": "w"}
        data = {"n": 1, "deep": {"list": [1]}}
        inputs = json.dumps([message, data])
        plans = [self.decide(definition, "A", message, data) for _ in range(2)]
        for plan in plans:  # what comes out belongs to nobody else
            plan["data"]["items"].append("changed")
            for changed in ("kept", "made"):
                plan["data"][changed][-1].append("changed")
            plan["data"]["deep"]["list"].append("changed")
            plan["sends"][0][1]["items"].append("changed too")
        plans.append(self.decide(definition, "A", message, data))
        items = [1, [2], 1]
        self.assertEqual((plans[2], json.dumps([message, data])), ({
            "outcome": "moved", "reason": None, "emits": [("gone", [items])],
            "data": {"n": 2, "deep": {"list": [1]}, "left": 1000.0, "items": items,
                "kept": [1, [2]], "made": [[]]},
            "sends": [("w", {"type": "hi", "items": items}, 0.0, None)],
            "timers": [(1002.0, "B", 1)]}, inputs))

    def test_a_refused_message_leaves_data_and_answer_alike(self):
        definition = self.definition({"from": "A", "on": "go", "guard": {"x": 1}, "to": "B"})
        data = {"n": [1]}
        plans = [self.decide(definition, "A", {"type": "go"}, data) for _ in range(2)]
        self.assertEqual((plans[0], data), (plans[1], {"n": [1]}))

    def test_all_values_of_an_assign_are_seen_before_any_is_set(self):
        definition = self.definition(
            {"on": "swap", "assign": {"a": "$data.b", "b": "$data.a"}})
        plan = self.decide(definition, "A", {"type": "swap"}, {"a": 1, "b": 2})
        self.assertEqual(plan["data"], {"a": 2, "b": 1})

    def test_what_is_sent_and_emitted_sees_the_data_after(self):
        definition = self.definition({"on": "add", "assign": {"n": {"+": ["$data.n", 1]}},
            "emit": {"name": "added", "with": "$data.n"},
            "send": [{"to": "x", "type": "n", "with": {"n": "$data.n"}, "after": "$data.n",
                "id": "$id"}, {"to": "$component", "type": "again", "after": "2h"}]})
        plan = self.decide(definition, "A", {"type": "add"}, {"n": 1})
        self.assertEqual(plan, {"outcome": "stayed", "reason": None, "data": {"n": 2},
            "emits": [("added", 2)], "timers": [],
            "sends": [("x", {"type": "n", "n": 2}, 2.0, "id-1"),
                      ("m", {"type": "again"}, 7200.0, None)]})

    def test_a_send_to_or_of_what_is_no_text_fails_the_message(self):
        for key in ("to", "type", "id"):
            for value in (5, None, True, "", [], ["x"], {}):
                if key == "id" and value is None:
                    continue  # an id of its own is made
                with self.subTest(key, value=value):
                    definition = self.definition({"on": "go", "send":
                        {"to": "x", "type": "t", "id": "i", key: "$data.value"}})
                    error = self.raises(StateError, self.decide, definition, "A", {"type": "go"},
                        {"value": value})
                    self.assertIn(repr(value), str(error))

    def test_an_emit_without_a_payload_of_its_own_leaves_it_to_the_engine(self):
        definition = self.definition({"on": "go", "emit": ["a", {"name": "b", "with": None}]})
        self.assertEqual(self.decide(definition, "A", {"type": "go"})["emits"],
            [("a", None), ("b", None)])

    def test_assign_sets_top_level_keys_whatever_they_look_like(self):
        definition = self.definition({"on": "go", "assign": {"a.b": 1, "$x": "$$x", "": None}})
        self.assertEqual(self.decide(definition, "A", {"type": "go"}, {"a": {"b": 0}})["data"],
            {"a": {"b": 0}, "a.b": 1, "$x": "$x", "": None})

    def test_a_missing_value_in_an_effect_fails_and_names_the_path(self):
        table = {
            "assign": {"x": "$data.gone"}, "emit": {"name": "e", "with": ["$data.gone"]},
            "send": {"to": "x", "type": "t", "with": {"deep": {"er": "$data.gone"}}},
        }
        for key, effect in table.items():
            with self.subTest(key):
                definition = self.definition({"from": "A", "on": "go", "to": "B", key: effect})
                error = self.raises(StateError, self.decide, definition, "A", {"type": "go"})
                self.assertEqual(str(error), textwrap.dedent("""\
                    No value at $data.gone
                    Why: an effect needs it, on the way to 'B'
                    Fix: guard the rule with {"data.gone": {"exists": true}}, or give it a first """
                    """value in the config's data
                    Context:
                      component='m'"""))

    def test_a_message_with_a_missing_value_changes_nothing(self):
        config = self.config({"from": "A", "on": "go", "to": "B", "assign":
            {"n": 2, "x": "$message.x"}}, data={"n": 1})

        async def run():
            component = FlexiFlowEngine().create_component(config)
            with self.assertRaises(StateError):
                await component.handle_message({"type": "go"})
            before = component.state, component.data, component.seq
            await component.handle_message({"type": "go", "x": 5})
            return before, (component.state, component.data, component.seq)

        self.assertEqual(self.run_async(run()),
            (("A", {"n": 1}, 0), ("B", {"n": 2, "x": 5}, 1)))


class RuleTimers(RuleCase):
    """Due times, and which states own them."""

    def due(self, after, data=None, message=None):
        """Return when a timer is due that is started at 1000."""
        definition = self.definition({"from": "A", "on": "go", "to": "B"},
            {"from": "B", "after": after, "to": "A"})
        plan = self.decide(definition, "A", {"type": "go", **(message or {})}, data)
        return plan["timers"]

    def test_delays_are_seconds_or_a_number_with_a_unit(self):
        table = {0: 0, 5: 5, 1.5: 1.5, "0s": 0, "90s": 90, "15m": 900, "2h": 7200, "7d": 604800,
            "1.5h": 5400, "$data.wait": 3, "$message.wait": 240}
        found = {after: self.due(after, {"wait": 3}, {"wait": "4m"}) for after in table}
        self.assertEqual(found,
            {after: [(1000.0 + delay, "B", 1)] for after, delay in table.items()})

    def test_what_is_no_delay_is_refused_at_load(self):
        for after in (-1, "-1s", "90", "1w", "1 h", "", "h", True, None, [], {}, "1e3s",
                float("nan"), float("inf"), 1e300, "9999999999d", "$state.x", "$nope"):
            with self.subTest(after=after):
                self.raises(ConfigError, self.definition, {"from": "A", "after": after, "to": "B"})

    def test_a_computed_delay_that_is_none_fails_the_message(self):
        for value in (-1, "soon", None, True, [], 1e300):
            with self.subTest(value=value):
                error = self.raises(StateError, self.due, "$data.wait", {"wait": value})
                self.assertEqual(error.what, f"Not a delay: {value!r}")

    def test_a_computed_delay_that_is_missing_names_the_path(self):
        self.assertEqual(self.raises(StateError, self.due, "$data.wait").what,
            "No value at $data.wait")

    def test_a_state_that_a_rule_names_twice_has_one_timer(self):
        definition = self.definition({"from": "A", "on": ["go", "go"], "to": "B"},
            {"from": ["B", "B"], "after": 5, "to": "A"})
        plan = self.decide(definition, "A", {"type": "go"})
        self.assertEqual((plan["timers"], definition.rules[0].on), ([(1005.0, "B", 1)], ("go",)))

    NESTED = {"A": {}, "B": {"initial": "B.1"}, "B.1": {}, "B.2": {}}
    RULES = [
        {"from": "A", "on": "go", "to": "B"},
        {"from": "B", "on": "flip", "to": "B.2"},
        {"from": "B", "on": "again", "to": "B"},
        {"on": "look", "assign": {"seen": True}},
        {"from": ["B", "B.1"], "after": 10, "to": "A"},
        {"from": "B.2", "after": 20, "to": "A"},
        {"from": "*", "after": 100, "to": "A"},
    ]

    def test_each_state_that_is_entered_starts_its_timers(self):
        definition = self.definition(*self.RULES, states=self.NESTED)
        moves = [("A", "go"), ("B.1", "flip"), ("B.1", "again"), ("B.2", "again"), ("B.1", "look")]
        found = [self.decide(definition, leaf, {"type": kind})["timers"] for leaf, kind in moves]
        both = [(1010.0, "B", 4), (1010.0, "B.1", 4)]
        self.assertEqual(found, [both, [(1020.0, "B.2", 5)], both, both, []])

    def test_a_timer_lives_as_long_as_its_state_is_not_left(self):
        clock, seen = Clock(1000.0), []

        async def run():
            engine = FlexiFlowEngine(clock=clock)
            component = engine.create_component(self.config(*self.RULES, states=self.NESTED))
            for kind in ("look", "go", "look", "flip", "again"):
                clock.now += 1
                await component.handle_message({"type": kind})
                (status,) = engine.status("m")
                seen.append((kind, component.state, sorted(t["due"] for t in status["timers"])))
            await engine.close()

        self.run_async(run())
        self.assertEqual(seen, [
            ("look", "A", [1100.0]),
            ("go", "B.1", [1012.0, 1012.0, 1100.0]),
            ("look", "B.1", [1012.0, 1012.0, 1100.0]),
            ("flip", "B.2", [1012.0, 1024.0, 1100.0]),
            ("again", "B.1", [1015.0, 1015.0, 1100.0]),
        ])

    def test_a_timer_fires_when_it_is_due_and_not_before(self):
        clock = Clock(1000.0)
        config = self.config({"from": "A", "after": "1m", "to": "B"},
            {"from": "B", "after": "1m", "guard": {"data.go": True}, "to": "A"}, data={"go": False})

        async def run():
            engine = FlexiFlowEngine(clock=clock)
            component = engine.create_component(config)
            states = []
            for now in (1000.0, 1059.9, 1060.0, 1119.9, 1120.0, 9999.0):
                clock.now = now
                await engine.run(until_idle=True)
                states.append((now, component.state, len(engine.status("m")[0]["timers"])))
            await engine.close()
            return states

        self.assertEqual(self.run_async(run()), [
            (1000.0, "A", 1), (1059.9, "A", 1), (1060.0, "B", 1), (1119.9, "B", 1),
            (1120.0, "B", 0), (9999.0, "B", 0)])

    def test_a_final_state_completes_only_at_the_top(self):
        config = self.config({"on": "in", "to": "B.end"}, {"on": "out", "to": "End"},
            states={"A": {}, "B": {"initial": "B.end"}, "B.end": {"final": True},
                "End": {"final": True}})

        async def run():
            component = FlexiFlowEngine(clock=Clock(1000.0)).create_component(config)
            completed = []
            for kind in ("in", "out", "in"):
                receipt = await component.handle_message({"type": kind})
                completed.append((receipt.outcome, component.state, component.completed))
            return completed

        self.assertEqual(self.run_async(run()), [("moved", "B.end", None),
            ("moved", "End", 1000.0), ("ignored", "End", 1000.0)])

    def test_a_completed_component_starts_no_timers(self):
        config = self.config({"from": "A", "on": "end", "to": "End"}, {"after": 5, "to": "A"},
            states={"A": {}, "End": {"final": True}})

        async def run():
            engine = FlexiFlowEngine(clock=Clock(1000.0))
            engine.create_component(config)
            receipt = await engine.handle_message("m", "end")
            (status,) = engine.status("m")
            await engine.close()
            return receipt.to_state, status["completed"], status["timers"]

        self.assertEqual(self.run_async(run()), ("End", 1000.0, []))


@unittest.skipUnless((SHARED / "scion_scxml_tests.ndjson").exists(), "no ../shared/data")
class Statecharts(RuleCase):
    """The statecharts of the SCION test suite that use nothing but nested states."""

    SHADOWED = {"documentOrder/documentOrder0", "hierarchy+documentOrder/test0",
        "hierarchy+documentOrder/test1"}
    # SCXML matches "foo" against "foo.bar", and lets a first "*" win.
    NOT_OURS = {"scxml-prefix-event-name-matching/" + name for name in ("star0", "test0", "test1")}

    @staticmethod
    def charts():
        """Yield the tests that are marked plain."""
        with open(SHARED / "scion_scxml_tests.ndjson", encoding="utf-8") as file:
            for test in map(json.loads, file):
                if test.get("plain"):
                    yield test["test"], test

    def as_config(self, machine):
        """Return an SCXML machine as a config: ids get their parents' names in front."""
        names, states, moves = {}, {}, []

        def visit(node, prefix):
            for state in node.get("states", ()):
                name = names[state["id"]] = prefix + state["id"]
                states[name] = {}
                moves.extend((name, move) for move in state.get("transitions", ()))
                visit(state, name + ".")
                if state.get("states"):
                    first = state.get("initial") or [state["states"][0]["id"]]
                    states[name]["initial"] = names[first[0]]

        visit(machine, "")
        rules = [{"from": name, "on": move["event"].split(), "to": names[move["target"][0]]}
            for name, move in moves]
        initial = machine.get("initial") or [machine["states"][0]["id"]]
        return {"name": "chart", "initial_state": names[initial[0]], "states": states,
            "rules": rules}

    def test_there_are_twenty(self):
        names = [name for name, _ in self.charts()]
        self.assertEqual((len(names), set(names) >= self.SHADOWED | self.NOT_OURS), (20, True))

    def test_fourteen_reach_the_expected_configuration_after_every_event(self):
        played = 0
        for name, test in self.charts():
            if name in self.SHADOWED | self.NOT_OURS:
                continue
            with self.subTest(name):
                found = self.play(self.as_config(test["machine"]), test["events"])
                self.assertEqual(found, [test["initialConfiguration"],
                    *(event["nextConfiguration"] for event in test["events"])])
            played += 1
        self.assertEqual(played, 14)

    def play(self, config, events):
        async def run():
            engine = FlexiFlowEngine()
            component = engine.create_component(config)
            found = [component.state]
            for event in events:
                await component.handle_message({"type": event["event"]["name"]})
                found.append(component.state)
            await engine.close()
            return [[state.rpartition(".")[2]] for state in found]

        return self.run_async(run())

    def test_three_are_refused_because_a_rule_can_never_fire(self):
        refused = {}
        for name, test in self.charts():
            if name in self.SHADOWED:
                error = self.raises(ConfigError, ConfigLoader.load_component_config,
                    self.as_config(test["machine"]))
                refused[name] = str(error).splitlines()[0:2]
        self.assertEqual(sorted(refused), sorted(self.SHADOWED))
        self.assertEqual(refused["documentOrder/documentOrder0"], [
            "rules[1]: This rule can never fire",
            "Why: rules[0] takes its messages before and has no guard"])


# --------------------------------------------------------------------------------------------
# 8. Config: load, explain, visualize
# --------------------------------------------------------------------------------------------


class ConfigCase(CodeCase):
    """Tests of configs; `m` is the smallest good one."""

    M = {"name": "m", "initial_state": "A", "states": {"A": {}, "B": {}},
        "rules": [{"from": "A", "on": "go", "to": "B"}]}
    ORDER = {
        "name": "order",
        "initial_state": "Draft",
        "data": {"reminders": 0, "basket": []},
        "states": {
            "Draft": {},
            "Open": {"initial": "Open.Unpaid", "description": "Waiting for money"},
            "Open.Unpaid": {}, "Open.Reminded": {},
            "Paid": {"entry": {"emit": "order.paid", "assign": {"paid": "$now"}}},
            "Closed": {"final": True},
            "Legacy": "flexiflow:ErrorHandling",
        },
        "rules": [
            {"from": "Draft", "on": "add",
             "assign": {"basket": {"append": ["$data.basket", "$message.item"]}}},
            {"from": "Draft", "on": "place", "guard": {"message.total": {">": 0}}, "to": "Open",
             "assign": {"total": "$message.total"}},
            {"from": "Open.Unpaid", "after": "1d", "to": "Open.Reminded",
             "assign": {"reminders": {"+": ["$data.reminders", 1]}}},
            {"from": "Open", "on": "pay", "guard": {"amount": {">=": "$data.total"}}, "to": "Paid",
             "send": {"to": "warehouse", "type": "pick", "with": {"order": "$component"}}},
            {"from": "*", "on": ["cancel", "stop"], "to": "Closed", "description": "From anywhere"},
            {"rule1": "a note of 1.0.1"},
        ],
        "retry": {"max_attempts": 5, "base_delay": 0.2},
    }

    def load(self, config, **settings):
        return ConfigLoader.load_component_config(config, **settings)

    def refusal(self, config, **settings):
        """Return the text with which a config is refused."""
        error = self.raises(FlexiFlowError, self.load, config, **settings)
        self.assertIsInstance(error, (ConfigError, ImportError_))
        return str(error)

    def talk(self, config, *messages, engine=None):
        """Give messages to a component in memory; return the states that it goes through."""
        async def run():
            component = (engine or FlexiFlowEngine()).create_component(config)
            states = [component.state]
            for message in messages:
                await component.handle_message(
                    {"type": message} if isinstance(message, str) else message)
                states.append(component.state)
            return states

        return self.run_async(run())


class ConfigLoading(ConfigCase):

    def test_a_config_is_loaded_from_a_dict_a_path_or_a_config(self):
        path = self.write("m.json", self.M)
        configs = [self.load(self.M), self.load(path), self.load(Path(path))]
        configs.append(self.load(configs[0]))
        wanted = ff.ComponentConfig("m", self.M["rules"], "A", {})
        self.assertEqual((configs, configs[3] is configs[0]), ([wanted] * 4, True))

    def test_what_was_loaded_shares_nothing_with_the_config(self):
        config = json.loads(json.dumps(self.ORDER))
        loaded = self.load(config)
        config["data"]["basket"].append("changed")
        config["rules"][0]["on"] = "changed"
        self.assertEqual((loaded.data, loaded.rules),
            (self.ORDER["data"], self.ORDER["rules"]))

    def test_what_was_loaded_is_of_plain_dicts_and_lists(self):
        class Words(str):
            pass

        class Table(dict):
            pass

        config = Table(self.M, data=Table(word=Words("x")))
        loaded = self.load(config)
        config["data"]["word"] = "changed"
        self.assertEqual(
            (loaded, type(loaded.data), type(loaded.data["word"]), type(loaded.definition.source)),
            (ff.ComponentConfig("m", self.M["rules"], "A", {"word": "x"}), dict, str, dict))

    def test_a_config_of_1_0_1_runs_the_built_in_machine(self):
        config = {"name": "example_component", "initial_state": "InitialState",
            "rules": [{"rule1": "..."}, {"rule2": "..."}]}
        states = self.talk(config, "start", {"type": "confirm", "content": "confirmed"}, "error",
            "acknowledge")
        self.assertEqual((states, self.load(config).rules), ([
            "InitialState", "AwaitingConfirmation", "ProcessingRequest", "ErrorHandling",
            "InitialState"], config["rules"]))

    def test_a_config_by_hand_is_checked_when_it_is_used(self):
        by_hand = ff.ComponentConfig("m", [{"on": "start", "to": "ErrorHandling"}])
        bad = ff.ComponentConfig("m", [{"on": "start", "to": "Nowhere"}])
        self.assertEqual(
            (self.talk(by_hand, "start"), self.refusal(bad).splitlines()[0]),
            (["InitialState", "ErrorHandling"], "rules[0].to: Unknown state: 'Nowhere'"))

    def test_a_config_cannot_be_changed(self):
        config = self.load(self.M)
        with self.assertRaises(AttributeError):
            config.name = "other"

    def test_a_declared_state_is_a_class_named_by_its_key(self):
        async def run():
            component = FlexiFlowEngine().create_component(self.M)
            await component.handle_message({"type": "go"})
            state = component.state_machine.current_state
            return type(state).__name__, isinstance(state, State)

        self.assertEqual(self.run_async(run()), ("B", True))

    def test_null_is_as_good_as_leaving_a_key_out(self):
        config = {"name": "m", "initial_state": None, "states": None, "rules": None, "data": None,
            "retry": None, "packs": None, "description": None}
        self.assertEqual(self.load(config), ff.ComponentConfig("m", [], "InitialState", {}))

    def test_free_keys_stand_where_they_like(self):
        config = {**self.M, "$schema": "x", "description": "d", "version": [1], "x-team": {"a": 1}}
        found, plain = explain(config), explain(self.M)
        self.assertEqual((found.errors, found.warnings), ([], plain.warnings))

    def test_a_missing_file_is_a_file_not_found_error_too(self):
        path = self.path("gone.json")
        error = self.raises(FileNotFoundError, self.load, path)
        self.assertEqual((str(error), isinstance(error, ConfigError)),
            (f"No config file: {path!r}\nFix: check the path", True))

    def test_files_that_are_no_strict_json_are_refused(self):
        table = {
            '{"name": "m", "name": "n"}': "the key 'name' stands twice in one object",
            '{"name": NaN}': "NaN is not JSON",
            '{"name": -Infinity}': "-Infinity is not JSON",
            "[" * 101: "more than 100 brackets within brackets",
            '{"name": "m", "data": {"n": 1e999}}': "the number 1e999 is too large",
            '"' + " " * 1_000_000 + '"': "more than 1000000 bytes",
        }
        found = {}
        for text in table:
            path = self.write("bad.json", text)
            error = self.raises(ConfigError, self.load, path)
            found[text] = error.why
            self.assertEqual(error.what, f"Not valid JSON: {path}")
        self.assertEqual(found, table)

    def test_files_that_cannot_be_read_are_refused(self):
        (self.folder / "latin.json").write_bytes(b'{"name": "\xe4"}')
        (self.folder / "surrogate.json").write_bytes(b'{"name": "\\ud800"}')
        (self.folder / "bom.json").write_bytes(b'\xef\xbb\xbf{"name": "m"')
        for name in ("latin.json", "surrogate.json", "bom.json", "", "nul\0.json", "x" * 5000):
            with self.subTest(name=name):
                self.raises(ConfigError, self.load, self.path(name))

    def test_what_is_neither_config_nor_path_is_refused_and_opens_nothing(self):
        with open(self.write("open.txt", "{}"), encoding="utf-8") as file:
            for wrong in ([], None, 3.5, (), {1}, file.fileno(), True):
                with self.subTest(wrong=wrong):
                    self.raises(ConfigError, self.load, wrong)
                    self.assertEqual(explain(wrong).is_valid, False)
            self.assertEqual(file.read(), "{}")

    def test_rules_are_read_from_an_object_or_a_list(self):
        rules = [{"on": "go", "to": "A"}]
        table = [({"rules": rules}, rules), (rules, rules), ({"rules": None}, []), ({}, [])]
        found = [ConfigLoader.load_rules(self.write("r.json", content)) for content, _ in table]
        path = self.write("r.json", {"rules": 5})
        error = self.raises(ConfigError, ConfigLoader.load_rules, path)
        self.assertEqual((found, error.what),
            ([wanted for _, wanted in table], f"No list of rules in {path!r}"))

    def test_a_loaded_file_is_an_object(self):
        path = self.write("list.json", [1])
        error = self.raises(ConfigError, ConfigLoader.load_yaml, path)
        self.assertEqual(
            (ConfigLoader.load_yaml(self.write("m.json", self.M)), str(error)),
            (self.M, f"A config is an object: {path!r}"))


class YamlConfigs(ConfigCase):

    YAML = "name: m\ninitial_state: A\nstates:\n  A: {}\nrules:\n- {'on': go, to: A}\n"

    def need_yaml(self):
        try:
            import yaml  # noqa: F401
        except ImportError:
            self.skipTest("PyYAML is not installed")

    def test_yaml_is_read_where_pyyaml_is_installed(self):
        self.need_yaml()
        config = self.load(self.write("m.yaml", self.YAML))
        self.assertEqual(config, ff.ComponentConfig("m", [{"on": "go", "to": "A"}], "A"))

    def test_an_empty_yaml_file_is_an_empty_config(self):
        self.need_yaml()
        self.assertEqual(ConfigLoader.load_yaml(self.write("m.yml", "")), {})

    def test_a_key_that_stands_twice_in_yaml_is_refused(self):
        self.need_yaml()
        path = self.write("m.yaml", self.YAML + "name: other\n")
        self.raises(ConfigError, self.load, path)

    def test_yaml_that_cannot_be_read_or_is_no_json_is_refused(self):
        self.need_yaml()
        for text in ("name: [", "name: m\ndata: {day: 2020-01-01}", "name: m\ndata: {1: 2}",
                self.YAML.replace("'on'", "on"), "- a", "name: \t{", "\0",
                "name: m\nx-p: !!python/object/apply:os.getcwd []"):
            with self.subTest(text=text):
                self.raises(ConfigError, self.load, self.write("m.yaml", text))

    def test_without_pyyaml_the_error_tells_how_to_convert(self):
        path = self.write("m.yaml", self.YAML)
        self.addCleanup(sys.modules.pop, "yaml", None)
        before = sys.modules.get("yaml")
        sys.modules["yaml"] = None
        error = self.raises(ConfigError, self.load, path)
        if before is not None:
            sys.modules["yaml"] = before
            self.doCleanups()
        self.assertEqual(str(error), textwrap.dedent(f"""\
            YAML cannot be read here: {path!r}
            Why: PyYAML is not installed, and FlexiFlow itself reads JSON
            Fix: where it is: python -c 'import sys,json,yaml; """
            "print(json.dumps(yaml.safe_load(sys.stdin),indent=2))' "
            f"< {path} > config.json"))


class ConfigRefusals(ConfigCase):
    """What loading refuses, in the words that are printed; `explain` lists the same."""

    def rule(self, **rule):
        return {**ConfigCase.M, "rules": [rule]}

    def test_typical_errors_are_printed_with_place_cause_and_remedy(self):
        table = [
            ({}, """\
                No 'name'
                Fix: add "name": "order" to the config"""),
            ({**self.M, "name": 5}, "name: Not text: 5"),
            ({**self.M, "initial_state": "C"}, """\
                initial_state: Unknown state: 'C'
                Fix: use one of 'A', 'AwaitingConfirmation', 'B', 'ErrorHandling', """
                "'InitialState', 'ProcessingRequest'"),
            ({**self.M, "initail_state": "A"}, """\
                initail_state: Unknown key: 'initail_state'
                Fix: did you mean 'initial_state'?"""),
            ({**self.M, "states": ["A"], "rules": []}, """\
                states: Not an object: ['A']
                Context:
                  also=["initial_state: Unknown state: 'A'"]"""),
            ({**self.M, "rules": {"go": "B"}}, "rules: Not a list: {'go': 'B'}"),
            ({**self.M, "rules": ["go"]}, "rules[0]: Not an object: 'go'"),
            ({**self.M, "data": {"pair": (1, 2)}}, """\
                The config is not JSON
                Why: config.data.pair is a tuple"""),
            ({**self.M, "states": {"A": {"initial": "A.x"}, "A.y": {}}, "rules": []}, """\
                states.A.initial: Unknown child: 'A.x'
                Fix: did you mean 'A.y'?"""),
            ({**self.M, "states": {"A": {}, "A.y": {}}, "rules": []}, """\
                states.A.initial: No 'initial' child
                Fix: use one of 'A.y'"""),
            ({**self.M, "states": {"A": {"final": True, "initial": "A.y"}, "A.y": {}}, "rules": []},
                "states.A: A final state has no children"),
            (self.rule(on="go", to="BB"), """\
                rules[0].to: Unknown state: 'BB'
                Fix: did you mean 'B'?"""),
            (self.rule(on="go", to="B", **{"from": ["A", "BB", "CC"]}), """\
                rules[0].from[1]: Unknown state: 'BB'
                Fix: did you mean 'B'?
                Context:
                  also=["rules[0].from[2]: Unknown state: 'CC'"]"""),
            (self.rule(on="go", **{"from": []}),
                "rules[0].from: Not a name or a list of names: []"),
            (self.rule(on=["go", ""]), "rules[0].on[1]: Not a name: ''"),
            (self.rule(on="go", form="A"), """\
                rules[0].form: Unknown key: 'form'
                Why: it is kept, and does nothing
                Fix: did you mean 'from'?"""),
            (self.rule(onn="go", to="B"), """\
                rules[0].onn: Unknown key: 'onn'
                Why: it is kept, and does nothing
                Fix: did you mean 'on'?
                Context:
                  also=["rules[0]: A rule with neither 'on' nor 'after'"]"""),
            (self.rule(on="go", after=5, to="B"), """\
                rules[0]: A rule with both 'on' and 'after'
                Fix: one rule for a message, one for a timer"""),
            (self.rule(**{"from": "A"}, to="B"), """\
                rules[0]: A rule with neither 'on' nor 'after'
                Fix: one rule for a message, one for a timer"""),
            (self.rule(on="go", guard={"n": {"=>": 1}}, to="B"), """\
                rules[0].guard: Unknown operator: '=>'
                Why: what stands under 'n' is an object, so its keys are operators
                Fix: did you mean '>='?; to compare with an object write {"==": {...}}"""),
            (self.rule(on="go", assign={"x": "$dta.y"}), """\
                rules[0].assign.x: Unknown value: '$dta.y'
                Fix: did you mean '$data'?"""),
            (self.rule(on="go", emit="state.changed"), """\
                rules[0].emit: An event of the engine's own: 'state.changed'
                Fix: emit under another name"""),
            (self.rule(on="go", send={"to": "x"}), "rules[0].send: No 'type' in {'to': 'x'}"),
            ({**self.M, "rules": [*self.M["rules"], {"from": "A", "on": "go", "to": "A"}]}, """\
                rules[1]: This rule can never fire
                Why: rules[0] takes its messages before and has no guard
                Fix: give that one a guard, or put this one before it"""),
            ({**self.M, "retry": {"max_attemps": 3}}, """\
                retry.max_attemps: Unknown key: 'max_attemps'
                Fix: did you mean 'max_attempts'?"""),
            ({**self.M, "initial_state_resolution": ["packs"]}, """\
                initial_state_resolution: Not an order of resolution: ['packs']
                Fix: ["packs", "builtin"] or ["builtin", "packs"]"""),
            ({**self.M, "states": {"A": {}, "B": "json:JSONDecoder"}}, """\
                states.B: Not a State class
                Why: it is <class 'json.decoder.JSONDecoder'>
                Fix: inherit from State
                Context:
                  state='B'
                  also=["rules[0].to: Unknown state: 'B'"]"""),
            ({**self.M, "states": {"A": {}, "B": "no_such_module:B"}}, """\
                states.B: Module not found: 'no_such_module'
                Why: ModuleNotFoundError: No module named 'no_such_module'
                Fix: check the spelling and sys.path
                Context:
                  dotted_path='no_such_module:B'
                  also=["rules[0].to: Unknown state: 'B'"]"""),
            ({**self.M, "states": {"A": "flexiflow:InitialState", "B": "flexiflow:InitialState"}},
                """\
                states.B: One class for two states: 'A' and 'B'
                Why: a saved state could not be told from the other
                Fix: make a subclass for one of them
                Context:
                  also=["rules[0].to: Unknown state: 'B'"]"""),
        ]
        for config, wanted in table:
            with self.subTest(wanted.strip().splitlines()[0]):
                self.assertEqual(self.refusal(config), textwrap.dedent(wanted))

    def test_a_config_file_is_named_in_the_error(self):
        path = self.write("m.json", {**self.M, "initial_state": "AA"})
        self.assertEqual(self.refusal(path), textwrap.dedent(f"""\
            initial_state: Unknown state: 'AA'
            Fix: did you mean 'A'?
            Context:
              config={path!r}"""))

    def test_what_else_is_refused(self):
        states = [{"A": 5}, {"A": None}, {"A": []}, {"": {}, "A": {}}, {"*": {}, "A": {}},
            {"A": {"initial": "A"}}, {"A": {"final": "yes"}}, {"A": {"entry": []}},
            {"A": {"entry": {"assing": {}}}}, {"A": {"exit": {"to": "A"}}}, {"A": {"intial": "x"}},
            {"A": "no_colon"}, {"A": ":"}, {"A": "flexiflow:InitialState", "A.b": {}},
            {"A": "flexiflow:no_such"}, {"A": "flexiflow:main"}]
        rules = [{"on": []}, {"on": ""}, {"on": 5}, {"on": ["x", 5]}, {"on": None}, {"from": ""},
            {"on": "x", "from": []}, {"on": "x", "from": "Gone"}, {"on": "x", "reenter": "yes"},
            {"on": "x", "guard": {}}, {"on": "x", "guard": 5}, {"on": "x", "guard": {"all": []}},
            {"on": "x", "guard": {"n": {}}}, {"on": "x", "guard": {"n": {">": None}}},
            {"on": "x", "guard": {"a.__class__": 1}}, {"on": "x", "guard": {"a()": 1}},
            {"on": "x", "guard": "flexiflow:no_such"}, {"on": "x", "action": "no_colon"},
            {"on": "x", "action": 5}, {"on": "x", "action": ["flexiflow:main", 5]},
            {"on": "x", "action": "flexiflow:__version__"}, {"on": "x", "assign": []},
            {"on": "x", "assign": {"n": {"+": [1]}}}, {"on": "x", "assign": {"n": {"+": [1, "a"]}}},
            {"on": "x", "assign": {"n": "$data.__class__"}}, {"on": "x", "assign": {"n": "$id.x"}},
            {"on": "x", "emit": ""}, {"on": "x", "emit": "*"}, {"on": "x", "emit": {"with": 1}},
            {"on": "x", "emit": {"name": "message.dead"}}, {"on": "x", "emit": 5},
            {"on": "x", "send": {"to": "y", "type": "z", "whit": {}}}, {"on": "x", "send": "y"},
            {"on": "x", "send": {"to": "y", "type": "z", "after": "soon"}},
            {"on": "x", "send": {"to": "y", "type": "z", "with": {"id": 1}}},
            {"on": "x", "send": {"to": "y", "type": "z", "with": []}},
            {"on": "x", "send": {"to": "y", "type": "z", "with": {"+": [1, 2]}}},
            {"on": "x", "send": {"to": "y", "type": "z", "with": {"append": [[], 2]}}},
            {"on": "x", "tpo": "A"}, {"on": "x", "fro": "A"}, {"after": "soon"}, {"on": True}]
        others = [{"name": ""}, {"name": None}, {"data": []}, {"data": {"x": float("nan")}},
            {"data": {1: 2}}, {"data": {"x": {1}}}, {"retry": {"max_attempts": 0}},
            {"retry": {"max_attempts": True}}, {"retry": {"jitter": 2}}, {"packs": ["no:Pack"]},
            {"packs": [5]}, {"packs": "x:Y"}, {"initial_state": 5}, {"state": {}}, {"rule": []},
            {"initial_state_resolution": ["packs", "packs"]}, {"Rules": []},
            {"initial_state_resolution": "packs"}, {"initial_state": "flexiflow:main"},
            {"initial_state": "no_such:X"}, {"initial_state": ""}]
        configs = [{**self.M, "states": one, "rules": []} for one in states]
        configs += [self.rule(**one) for one in rules] + [{**self.M, **one} for one in others]
        for config in configs:
            with self.subTest(config=config):
                self.refusal(config)

    def test_what_can_never_fire_is_refused_and_nothing_else(self):
        a, b, both = {"from": "A"}, {"from": "B"}, {"from": ["A", "B"]}
        go, stop, to = {"on": "go"}, {"on": "stop"}, {"to": "A"}
        no = {"guard": {"n": 1}}
        table = [
            ([{**a, **go}, {**a, **go}], [1]),
            ([{**a, **go, **no}, {**a, **go}], []),
            ([{**a, **go}, {**a, **go, **no}], [1]),
            ([{**a, **go}, {**b, **go}, {**both, **go}], [2]),
            ([{**a, **go}, {**both, **go}], []),
            ([{**a, "on": ["go", "stop"]}, {**a, **stop}, {**a, "on": ["stop", "x"]}], [1]),
            ([{**a, "on": "*"}, {**a, **go}], []),
            ([{**a, "on": "*"}, {**a, "on": "*", **no}], [1]),
            ([go, {**a, **go}], []),
            ([{**go, **to}, {**go, "from": "*"}], [1]),
            ([{"after": 1, **a}, {"after": 1, **a}], []),
            ([{"note": 1}, {"note": 1}], []),
        ]
        for rules, wanted in table:
            with self.subTest(rules=rules):
                found = explain({**self.M, "rules": rules}).errors
                self.assertEqual([error.what for error in found],
                    [f"rules[{number}]: This rule can never fire" for number in wanted])

    def test_several_errors_are_named_at_once(self):
        config = {"name": "m", "initial_state": "A", "states": {"A": {"final": 5}},
            "rules": [{"on": "x", "to": "B"}, {"on": "x", "guard": {}}]}
        self.assertEqual(self.refusal(config), textwrap.dedent("""\
            states.A.final: Not true or false: 5
            Context:
              also=["rules[0].to: Unknown state: 'B'", 'rules[1].guard: Empty guard']"""))


class Explaining(ConfigCase):

    def test_a_good_config_is_explained(self):
        found = explain(self.write("order.json", self.ORDER))
        self.assertEqual(found.format(), textwrap.dedent(f"""\
            FlexiFlow Config Explanation
            ========================================
            Source: {self.path("order.json")}

            Component:
              name: order
              initial_state: Draft
              rules: 6 rule(s)

            Resolution policy: packs -> builtin

            States:
              OK Closed
              OK Draft
              OK Legacy: flexiflow:ErrorHandling
              OK Open
              OK Open.Reminded
              OK Open.Unpaid
              OK Paid
              Built-in: AwaitingConfirmation, ErrorHandling, InitialState, ProcessingRequest

            Nested states:
              Open
                Open.Unpaid (initial)
                Open.Reminded

            Warnings:
              WARN states.Legacy: This state is never reached
                Fix: let a rule lead to it

            Status: OK - config will load"""))

    def odd(self, rules, states="AB", **settings):
        """Return what is odd about a good config, a line each with its reason."""
        states = states if isinstance(states, dict) else {name: {} for name in states}
        found = explain({"name": "m", "initial_state": next(iter(states)), "states": states,
            "rules": rules, **settings})
        self.assertEqual(found.errors, [])
        return [": ".join(filter(None, [one.what, one.why])) for one in found.warnings]

    def test_states_and_rules_that_are_never_reached_are_odd(self):
        self.assertEqual(self.odd(
            [{"from": "A", "on": "go", "to": "D"}, {"from": ["B", "C"], "on": "go", "to": "A"},
                {"from": "D", "on": "go", "to": "A"}, {"from": "*", "on": "end", "to": "D"}],
            {"A": {}, "B": {}, "C": {"initial": "C.x"}, "C.x": {}, "D": {"final": True}}),
            ["states.B: This state is never reached", "states.C: This state is never reached",
             "states.C.x: This state is never reached",
             "rules[1]: This rule can never fire: where it stands is never reached, or final: B, C",
             "rules[2]: This rule can never fire: where it stands is never reached, or final: D"])

    def test_a_class_of_the_users_may_lead_anywhere(self):
        self.assertEqual(self.odd([{"from": "A", "on": "go", "to": "L"}],
            {"A": {}, "L": self.code_path(), "B": {"final": True}}), [])

    def code_path(self):
        class Anywhere(State):
            pass

        module = sys.modules["anywhere_of_test"] = types.ModuleType("anywhere_of_test")
        self.addCleanup(sys.modules.pop, "anywhere_of_test")
        self.addCleanup(self.forget_states)
        module.Anywhere = Anywhere
        return "anywhere_of_test:Anywhere"

    def test_states_that_cannot_be_left_are_odd(self):
        go, back = {"from": "A", "on": "go", "to": "B"}, {"from": "B", "on": "back", "to": "A"}
        odd = "states.B: This state cannot be left, and is not final"
        for rules, expected in (
            ([go, back], []), ([go, {"from": "B", "on": "go"}], [odd]),
            ([go, {"from": "B", "on": "go", "to": "B"}], [odd]),
            ([go, {"from": "*", "on": "back", "to": "A"}], []),
            ([go, {"from": "B", "after": 5, "to": "A"}], []),
            ([go, {"from": "B", "after": 5, "to": "A", "guard": {"data.n": 1}}],
                ["states.B: This state may never be left: only timers lead on, and one whose guard"
                 " is false is used up"]),
        ):
            with self.subTest(rules=rules):
                self.assertEqual(self.odd(rules), expected)
        self.assertEqual(self.odd([{"on": "add", "assign": {"n": 1}}], "A"), [])

    def test_timers_without_effect_and_sends_to_nobody_are_odd(self):
        self.assertEqual(self.odd([
            {"from": "A", "after": 5}, {"from": "A", "on": "go", "to": "B"},
            {"from": "B", "on": "back", "to": "A", "send": [{"to": "m", "type": "bakc"},
                {"to": "other", "type": "bakc"}, {"to": "$component", "type": "go"}]}],
            {"A": {"entry": {"send": {"to": "$component", "type": "gone"}}}, "B": {}}),
            ["rules[0]: This timer does nothing",
             "rules[2].send: Nobody takes 'bakc' here: it would end as a dead letter",
             "states.A.entry.send: Nobody takes 'gone' here: it would end as a dead letter"])

    def test_message_types_one_slip_apart_are_odd(self):
        kinds = ("approve aprove item1 item2 items start strat state send_A send_B ship shop "
            "cancel").split()
        self.assertEqual(self.odd([{"from": "A", "on": kind} for kind in kinds], "A"),
            ["rules: Message types that differ by one letter: 'approve', 'aprove'",
             "rules: Message types that differ by one letter: 'start', 'strat'"])

    def test_a_type_as_long_as_a_config_is_read_in_no_time(self):
        long = "a" * 300_000  # each of its letters left out would be 90 GB
        found = explain({"name": "x", "rules": [{"on": long}, {"on": long[1:]}]})
        self.assertEqual((found.errors, found.warnings), ([], []))

    def test_a_bad_config_is_explained_with_all_that_is_wrong(self):
        config = {"states": {"A": {}, "B": "no_such:B"}, "colour": "red", "rules": [
            {"on": "x", "to": "C", "guard": {"n": {"=>": 1}}}, {"giard": 1}]}
        self.assertEqual(explain(config).format(), textwrap.dedent("""\
            FlexiFlow Config Explanation
            ========================================
            Source: (dict)

            Component:
              name: (missing)
              initial_state: InitialState
              rules: 2 rule(s)

            Resolution policy: packs -> builtin

            States:
              OK A
              ?? B: no_such:B
                  Error: Module not found: 'no_such'
              Built-in: AwaitingConfirmation, ErrorHandling, InitialState, ProcessingRequest

            Warnings:
              WARN colour: Unknown key: 'colour'
                Fix: use one of '$schema', 'data', 'description', 'initial_state', """
            """'initial_state_resolution', 'name', 'packs', 'renamed', 'retry', 'rules', """
            """'states', 'version'
              WARN rules[1].giard: Unknown key: 'giard'
                Why: without a key of the engine a rule is a note and does nothing
                Fix: did you mean 'guard'?

            Errors:
              ERROR No 'name'
                Fix: add "name": "order" to the config
              ERROR states.B: Module not found: 'no_such'
                Why: ModuleNotFoundError: No module named 'no_such'
                Fix: check the spelling and sys.path
              ERROR rules[0].to: Unknown state: 'C'
                Fix: use one of 'A', 'AwaitingConfirmation', 'ErrorHandling', 'InitialState', """
            """'ProcessingRequest'
              ERROR rules[0].guard: Unknown operator: '=>'
                Why: what stands under 'n' is an object, so its keys are operators
                Fix: did you mean '>='?; to compare with an object write {"==": {...}}

            Status: INVALID - 4 error(s) found"""))

    def test_a_strange_key_of_a_rule_that_does_something_is_warned_of(self):
        found = explain({**self.M, "rules": [{"from": "A", "on": "go", "to": "B", "when": {"n": 1},
            "Colour": "red", "x-mine": 1, "description": "why"}]})
        self.assertEqual(([(one.what, one.why, one.fix) for one in found.warnings
            if "key" in one.what], found.errors), ([
                ("rules[0].when: Unknown key: 'when'", "it is kept, and does nothing",
                 "did you mean 'guard'?"),
                ("rules[0].Colour: Unknown key: 'Colour'", "it is kept, and does nothing",
                 "use one of 'action', 'after', 'assign', 'description', 'emit', 'from', 'guard', "
                 "'on', 'reenter', 'send', 'to'")], []))

    def test_a_close_match_may_differ_in_case_or_be_what_others_call_it(self):
        self.assertEqual([ff.choose(word, choices) for word, choices in (
            ("a", ["A", "B"]), ("PAID", ["paid", "open"]), ("=>", ff.OPERATORS),
            ("=", ff.OPERATORS), ("when", ["guard"]), ("when", ["on", "to"]), ("z", ["Z", "z "]),
            )], ["did you mean 'A'?", "did you mean 'paid'?", "did you mean '>='?",
                "did you mean '=='?", "did you mean 'guard'?", "use one of 'on', 'to'",
                "did you mean 'Z'?"])

    def test_what_is_there_and_wrong_is_not_called_missing(self):
        self.assertIn("  initial_state: a\n", explain({**self.M, "initial_state": "a"}).format())
        self.assertEqual(explain(b"no config").format().split("\n\n")[1:], [
            "Component:\n  (not read)", "Errors:\n  ERROR A config is an object\n"
            "    Why: this is a bytes", "Status: INVALID - 1 error(s) found"])

    def test_what_was_found_is_there_as_values_too(self):
        found = explain({**self.M, "states": {"A": {}, "B": "flexiflow:ErrorHandling"}})
        self.assertEqual(
            (found.config_path, found.name, found.initial_state, found.rules_count, found.states,
             found.builtin_states, found.packs, found.state_providers, found.pack_order,
             found.initial_state_resolution, found.warnings, found.errors, found.is_valid), (
                "(dict)", "m", "A", 1,
                [ff.StateResolution("A", None, True, True, None),
                 ff.StateResolution("B", "flexiflow:ErrorHandling", True, True, None)],
                ["InitialState", "AwaitingConfirmation", "ProcessingRequest", "ErrorHandling"],
                [], {}, [], ["packs", "builtin"], [], [], True))

    def test_a_diagnostic_is_printed_like_an_error(self):
        (error,) = explain({**self.M, "initial_state": "BB"}).errors
        self.assertEqual((error.level, error.format()), ("error", textwrap.dedent("""\
            [ERROR] initial_state: Unknown state: 'BB'
            Fix: did you mean 'B'?
            Context:
              at='initial_state'""")))

    def test_a_config_without_rules_is_odd_but_good(self):
        found = explain({"name": "m"})
        self.assertEqual(
            (found.is_valid, found.errors, [(one.level, one.what) for one in found.warnings]),
            (True, [], [("warning", "rules: No rules defined")]))

    def test_a_file_that_cannot_be_read_is_explained_too(self):
        found = [explain(self.path("gone.json")), explain(self.write("bad.json", "{")),
            explain(self.write("list.json", "[]")), explain(str(self.folder))]
        self.assertEqual([(one.is_valid, len(one.errors)) for one in found], [(False, 1)] * 4)

    def test_the_first_error_and_the_others_are_those_of_loading(self):
        configs = [{}, {"name": 5, "rules": 5, "states": 5, "retry": {"a": 1}},
            {**self.M, "states": {"A": "x", "C": 5, "D": {"initial": "no"}}},
            {**self.M, "rules": [{"on": ""}, {"to": "x"}, 5, {"guard": 5, "on": "x"}]}]
        for config in configs:
            with self.subTest(config=config):
                whats = [error.what for error in explain(config).errors]
                error = self.raises(FlexiFlowError, self.load, config)
                self.assertEqual([error.what, *error.context.items.get("also", [])], whats[:6])

    def test_explaining_registers_nothing(self):
        self.module("explained", "from flexiflow import State\nclass Fresh(State): pass\n")
        before = ff.DEFAULT_REGISTRY.names()
        explain({**self.M, "states": {"A": {}, "B": "explained:Fresh"}})
        self.assertEqual((ff.DEFAULT_REGISTRY.names(), self.imported("explained")),
            (before, ["explained"]))

    def test_without_imports_no_code_runs_and_what_was_not_checked_is_listed(self):
        self.module("unrun", "raise SystemExit\n")
        config = {**self.M, "states": {"A": {}, "B": "unrun:B"}, "packs": ["unrun:Pack"],
            "rules": [{"from": "A", "on": "go", "guard": "unrun:guard", "action": ["unrun:do",
                "unrun:more"], "to": "B"}]}
        found = explain(config, imports=False)
        self.assertEqual((found.is_valid, sorted(found.unchecked), self.imported("unrun")), (
            True, ["unrun:B", "unrun:Pack", "unrun:do", "unrun:guard", "unrun:more"], []))
        self.assertIn("Not checked (imports are off):", found.format())

    def test_each_state_that_is_not_imported_has_a_class_to_stand_for_it(self):
        config = {"name": "m", "initial_state": "In.Pack", "states": {"A": "unrun:A",
            "B": "unrun:B"}, "packs": ["unrun:Pack"], "rules": [{"from": "In.Pack", "on": "go",
                "to": "Too"}, {"from": "Too", "on": "go", "to": "A"}]}
        found = explain(config, imports=False)
        self.assertEqual((found.errors, sorted(found.definition.nodes), found.states), (
            [], ["A", "B", "In.Pack", "Too"], [
                ff.StateResolution("A", "unrun:A", False, False, None),
                ff.StateResolution("B", "unrun:B", False, False, None)]))

    def test_how_each_state_was_found_is_told(self):
        self.module("found", "from flexiflow import State\nclass Good(State): pass\n")
        states = {"A": {"final": 5}, "B": "found:Gone", "C": "json:dumps", "D": "found:Good",
            "E": {"final": True}, "E.x": {}}
        config = {"name": "m", "initial_state": "found:Gone", "states": states, "rules": []}
        named = [(one.key, one.resolved, one.is_state_subclass, one.error)
            for one in explain(config).states]
        other = explain({"name": "m", "initial_state": "found:Good"}).states
        bad = explain({"name": "m", "initial_state": "found:Gone"}).states
        self.assertEqual((named, other, bad), (
            [("A", True, True, None), ("B", False, False, "No 'Gone' in module 'found'"),
             ("C", True, False, "Not a State class"), ("D", True, True, None),
             ("E", True, False, "A final state has no children"), ("E.x", True, True, None)],
            [ff.StateResolution("Good", "found:Good", True, True, None)],
            [ff.StateResolution("Gone", "found:Gone", False, False, "No 'Gone' in module 'found'")],
        ))

    def test_a_module_that_exits_is_an_error_in_both(self):
        self.module("exiting", "import sys\nsys.exit(3)\n")
        config = {**self.M, "states": {"A": {}, "B": "exiting:B"}}
        (error, _) = explain(config).errors
        self.assertEqual((error.format(), self.refusal(config).splitlines()[0]), (
            textwrap.dedent("""\
                [ERROR] states.B: Cannot import 'exiting'
                Why: SystemExit: 3
                Fix: mend the module
                Context:
                  dotted_path='exiting:B'
                  at='states.B'"""), "states.B: Cannot import 'exiting'"))

    def test_a_broken_module_shows_its_own_cause(self):
        self.module("half", "import quarter\n")
        config = {**self.M, "states": {"A": {}, "B": "half:B"}}
        error = self.raises(ImportError_, self.load, config)
        self.assertEqual((error.why, type(error.__cause__), explain(config).errors[0].why), (
            "ModuleNotFoundError: No module named 'quarter'", ModuleNotFoundError,
            "ModuleNotFoundError: No module named 'quarter'"))


class Strangers(ConfigCase):
    """Whatever is given as a config: loading and explaining agree, and only our errors come out."""

    ATOMS = [None, True, False, 0, -1, 1, 1.5, 10**30, 1e300, float("nan"), float("inf"), "", "*",
        "A", "$", "$$", "$data", "$data.x", "$message.", "A.b", "x:y", "5m", "on", "\0", "\ud800",
        "flexiflow:ErrorHandling", "flexiflow:__version__", [], {}, [[]], {"": {}}, {"on": "x"},
        {"+": [1, 2]}, {"append": ["$data.x", 1]}, {"to": "x", "type": "y"}, {"name": "e"},
        {"all": [{"x": 1}]}, {"not": {"x": {"exists": True}}}, ["a", "b"], ["*"], (1,), b"x", 1j]

    def agree(self, config):
        """Check that loading and explaining agree; return the loaded config, if it is good."""
        found = explain(config, allow_imports=("flexiflow",))
        try:
            loaded = self.load(config, allow_imports=("flexiflow",))
        except FlexiFlowError as error:
            self.assertEqual((found.is_valid, str(error) > ""), (False, True))
            loaded = None
        else:
            self.assertEqual(found.is_valid, True, found.format())
        found.format()
        ff.visualize(found)
        return loaded

    def places(self, value, found):
        """Collect (container, key) of everything within a JSON value."""
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(pairs):
            found.append((value, key))
            if isinstance(inner, (dict, list)):
                self.places(inner, found)
        return found

    def mutate(self, chance, config):
        """Change one thing in a config."""
        container, key = chance.choice(self.places(config, []))
        kind = chance.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = pickle.loads(pickle.dumps(chance.choice(self.ATOMS)))
        elif kind == 2:
            other, place = chance.choice(self.places(config, []))
            container[key] = json.loads(json.dumps(other[place], default=str))
        elif kind == 3 and isinstance(container, list):
            container.insert(chance.randrange(len(container) + 1), container[key])
        elif kind == 4 and isinstance(container, list):
            chance.shuffle(container)
        elif isinstance(container, dict):
            at = chance.randrange(len(key) + 1)
            letter = chance.choice(["", "s", ".", "x", "*"])
            container[key[:at] + letter + key[at + chance.randrange(2):]] = container.pop(key)

    def test_of_mutated_configs_explain_calls_good_exactly_what_loads(self):
        seed = int(os.environ.get("FLEXIFLOW_SEED") or random.randrange(2**32))
        chance = random.Random(seed)
        good = 0
        with self.subTest(seed=seed):
            for _ in range(400):
                config = json.loads(json.dumps(chance.choice([self.ORDER, self.M])))
                for _ in range(chance.choice([1, 1, 1, 2, 3])):
                    self.mutate(chance, config)
                with self.subTest(config=config):
                    loaded = self.agree(config)
                    self.forget_states()
                    if loaded is not None:
                        good += 1
                        if str(config).count("flexiflow:") < 2:  # no code but the class Legacy
                            self.run_async(self.play(loaded))
            self.assertTrue(20 < good < 380, good)

    @staticmethod
    def fits(value, rule, root):
        """Tell whether a value fits a JSON Schema, as far as ours go."""
        types = {"string": str, "array": list, "object": dict, "boolean": bool, "null": type(None)}
        words = rule.get("type", ["number", *types])
        words = [words] if isinstance(words, str) else words
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and "number" in words or type(value) in {types.get(one) for one in words}):
            return False
        below = []  # what the value, and what is in it, must fit
        if "$ref" in rule:
            below.append((value, root["$defs"][rule["$ref"].rpartition("/")[2]]))
        if isinstance(value, list) and "items" in rule:
            below += [(inner, rule["items"]) for inner in value]
        if isinstance(value, dict):
            if not {*rule.get("required", ())} <= value.keys():
                return False
            for key, inner in value.items():
                other = {} if key.startswith("x-") else rule.get("additionalProperties", {})
                part = rule.get("properties", {}).get(key, other)
                if part is False:
                    return False
                below.append((inner, {} if part is True else part))
        return all(Strangers.fits(inner, part, root) for inner, part in below)

    def test_whatever_loads_fits_the_schema_and_wrong_kinds_and_keys_do_not(self):
        seed = int(os.environ.get("FLEXIFLOW_SEED") or random.randrange(2**32))
        chance, schema, seen = random.Random(seed), ff.schema(), Counter()
        for _ in range(1500):
            config = json.loads(json.dumps(chance.choice([self.ORDER, self.M])))
            for _ in range(chance.choice([0, 1, 1, 2])):
                self.mutate(chance, config)
            found, fits = explain(config, allow_imports=("flexiflow",)), self.fits(
                config, schema, schema)
            self.forget_states()
            closed = any(re.search(r"^(retry|rules\[\d+\]\.(send|emit)|states\.[^.]+\.(entry|exit)"
                r"(\.(send|emit))?)(\[\d+\])?\.[^.]+: Unknown key|(?<!\.description): Not (text|"
                r"a list|an object|a number|true or false)\b", one.what)
                and not re.search(r"\.(guard|assign|with)\b", one.what) for one in found.errors)
            with self.subTest(seed=seed, config=config, errors=[one.what for one in found.errors]):
                self.assertTrue(fits or not found.is_valid)
                self.assertFalse(fits and closed)
            seen[fits, found.is_valid] += 1
        self.assertTrue(min(seen[True, True], seen[False, False], seen[True, False]) > 20, seen)

    def test_every_example_fits_the_schema(self):
        schema = ff.schema()
        for path in sorted(EXAMPLES.rglob("*.json")):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and "initial_state" in content:
                with self.subTest(path=path.name):
                    self.assertTrue(self.fits(content, schema, schema))

    async def play(self, config):
        """Give a component every message that its rules name; only our own errors may come out."""
        engine = FlexiFlowEngine(clock=Clock(), logger=logging.getLogger("quiet"))
        engine.logger.addHandler(logging.NullHandler())
        component = engine.create_component(config)
        for message in ("add", "place", "pay", "cancel", "go"):
            with contextlib.suppress(FlexiFlowError):
                await component.handle_message({"type": message, "total": 1, "amount": 1})
        await engine.close()

    @unittest.skipUnless((SHARED / "asl_definitions.ndjson").exists(), "no ../shared/data")
    def test_step_functions_documents_are_refused_or_taken_without_a_crash(self):
        with open(SHARED / "asl_definitions.ndjson", encoding="utf-8") as file:
            documents = [json.loads(line)["definition"] for line in file]
        for document in documents:
            self.agree(document)
            states = document.get("States", document)
            steps = list(states.values()) if isinstance(states, dict) else states
            self.agree({"name": "asl", "initial_state": document.get("StartAt"), "states": states,
                "rules": steps, "data": document})
            self.agree({"name": "asl", "rules": [{"on": "x", "assign": {"x": document},
                "guard": document, "send": document, "emit": document}]})
        self.assertEqual(len(documents), 112)

    @unittest.skipUnless((SHARED / "naughty_strings.json").exists(), "no ../shared/data")
    def test_naughty_strings_break_nothing_wherever_they_stand(self):
        strings = json.loads((SHARED / "naughty_strings.json").read_text(encoding="utf-8"))

        def rule(**rule):
            return {**self.M, "rules": [rule]}

        slots = {
            "name": lambda s: {**self.M, "name": s},
            "state": lambda s: {"name": "m", "initial_state": s, "states": {s: {}},
                "rules": [{"from": s, "on": "go", "to": s}]},
            "child": lambda s: {"name": "m", "initial_state": "A", "states":
                {"A": {"initial": "A." + s}, "A." + s: {}}, "rules": []},
            "description": lambda s: {**self.M, "states": {"A": {"description": s}, "B": {}}},
            "path": lambda s: {**self.M, "states": {"A": {}, "B": s}},
            "type": lambda s: rule(on=s, to="B"),
            "target": lambda s: rule(on="go", to=s),
            "key of a rule": lambda s: rule(**{"on": "go", s: s}),
            "key of a config": lambda s: {s: s, **self.M},
            "key of data": lambda s: {**self.M, "data": {s: {s: s}}},
            "assign": lambda s: rule(on="go", assign={s: s}),
            "guard": lambda s: rule(on="go", guard={s: s}, to="B"),
            "operand": lambda s: rule(on="go", guard={"n": {"==": s, "in": [s]}}, to="B"),
            "operator": lambda s: rule(on="go", guard={"n": {s: s}}, to="B"),
            "predicate": lambda s: rule(on="go", guard=s, to="B"),
            "action": lambda s: rule(on="go", action=s),
            "delay": lambda s: rule(**{"from": "A"}, after=s, to="B"),
            "event": lambda s: rule(on="go", emit={"name": s, "with": s}),
            "send": lambda s: rule(on="go", send={"to": s, "type": s, "with": {s: s}}),
            "pack": lambda s: {**self.M, "packs": [s]},
            "initial": lambda s: {**self.M, "initial_state": s},
        }
        broken = []
        for slot, config_of in slots.items():
            for number, string in enumerate(strings):
                config = config_of(string)
                try:
                    is_valid = explain(config, allow_imports=()).is_valid
                    try:
                        self.load(config, allow_imports=())
                        loads = True
                    except FlexiFlowError as error:
                        loads = ff.printable(str(error).replace("\n", " ")) != str(
                            error).replace("\n", " ")
                    if is_valid is not loads:
                        broken.append((slot, number, "explain and load differ"))
                except Exception as error:
                    broken.append((slot, number, repr(error)))
        self.assertEqual((broken, len(strings)), ([], 515))

    @unittest.skipUnless((SHARED / "naughty_strings.json").exists(), "no ../shared/data")
    def test_components_called_by_naughty_strings_work(self):
        strings = json.loads((SHARED / "naughty_strings.json").read_text(encoding="utf-8"))
        strings = [one for one in dict.fromkeys(strings) if one and one != "*"]

        async def run():
            engine = FlexiFlowEngine()
            answers = []
            for text in strings:
                if "." in text or text.startswith("$"):
                    continue
                component = engine.create_component({
                    "name": text, "initial_state": text, "states": {text: {}, text + "2": {}},
                    "rules": [{"from": text, "on": text, "guard": {"==": text},
                        "to": text + "2", "assign": {text: "$message"}}]})
                message = {"type": text, "==": text}
                receipt = await component.handle_message(message)
                answers.append((receipt.component, receipt.to_state, receipt.data) == (
                    text, text + "2", {text: message}))
            await engine.close()
            return answers

        answers = self.run_async(run())
        self.assertEqual((set(answers), len(answers) > 300), ({True}, True))


class ConfigRegistries(ConfigCase):
    """Each config has its own states; the default registry sees what is loaded, and keeps it."""

    STATES = """
        from flexiflow import State

        class Waiting(State):
            async def handle_message(self, message, component):
                return (True, Done()) if message["type"] == "go" else (False, self)

        class Done(State):
            async def handle_message(self, message, component):
                return False, self

        class InitialState(State):
            async def handle_message(self, message, component):
                return True, Done()

        class NotAState:
            pass
    """

    def setUp(self):
        super().setUp()
        self.module("states_of_test", self.STATES)
        self.module("others_of_test", self.STATES)

    def test_the_key_is_the_states_name_whatever_the_class_is_called(self):
        config = {"name": "m", "initial_state": "Idle",
            "states": {"Idle": "states_of_test:Waiting", "End": "states_of_test:Done"}}
        self.assertEqual((explain(config).is_valid, self.talk(config, "go")),
            (True, ["Idle", "End"]))

    def test_the_default_registry_sees_what_was_loaded(self):
        self.load({"name": "m", "initial_state": "Idle",
            "states": {"Idle": "states_of_test:Waiting", "Flat": {}}})
        machine = StateMachine.from_name("Idle")
        self.assertEqual((type(machine.current_state).__name__, ff.DEFAULT_REGISTRY.get("Flat")),
            ("Waiting", None))

    def test_the_default_registry_is_never_overwritten(self):
        config = {"name": "m", "states": {"InitialState": "states_of_test:InitialState",
            "Done": "states_of_test:Done"}, "rules": []}
        other = {**config, "states": {"InitialState": "others_of_test:InitialState",
            "Done": "others_of_test:Done"}}
        self.load(config)
        self.load(other)
        found = ff.DEFAULT_REGISTRY.get("InitialState"), ff.DEFAULT_REGISTRY.get("Done").__module__
        self.assertEqual(
            (found, self.talk({"name": "plain"}, "start"), self.talk(config, "x")), (
                (ff.InitialState, "states_of_test"), ["InitialState", "AwaitingConfirmation"],
                ["InitialState", "Done"]))

    def test_two_configs_use_one_name_for_two_classes(self):
        configs = [{"name": module, "initial_state": "S", "states": {"S": f"{module}:Waiting",
            "Done": f"{module}:Done"}} for module in ("states_of_test", "others_of_test")]

        async def run():
            engine = FlexiFlowEngine()
            components = [engine.create_component(config) for config in configs]
            for component in components:
                await component.handle_message({"type": "go"})
            return [type(one.state_machine.current_state).__module__ for one in components]

        self.assertEqual(self.run_async(run()), ["states_of_test", "others_of_test"])

    def test_declared_states_of_one_config_are_unknown_to_another(self):
        self.load({**self.M, "states": {"A": {}, "B": {}, "Secret": {}}})
        other = {"name": "other", "rules": [{"on": "start", "to": "Secret"}]}
        self.assertEqual(
            (self.refusal(other).splitlines()[0], self.refusal(
                {"name": "other", "initial_state": "Secret"}).splitlines()[0],
             ff.DEFAULT_REGISTRY.get("Secret")), (
                "rules[0].to: Unknown state: 'Secret'", "initial_state: Unknown state: 'Secret'",
                None))

    def test_classes_of_one_config_are_unknown_to_another(self):
        other = {"name": "other", "rules": [{"on": "start", "to": "Idle"}]}
        before = explain(other).is_valid
        self.load({"name": "m", "initial_state": "Idle",
            "states": {"Idle": "states_of_test:Waiting"}})
        self.assertEqual((before, explain(other).is_valid), (False, False))

    def test_a_built_in_class_under_another_name_keeps_its_own_elsewhere(self):
        steps = ["start", {"type": "confirm", "content": "confirmed"}, "error", "acknowledge"]
        states = self.talk({"name": "m", "initial_state": "Oops",
            "states": {"Oops": "flexiflow:ErrorHandling"}}, "acknowledge")
        self.assertEqual((states, self.talk({"name": "plain"}, *steps)), (
            ["Oops", "InitialState"], ["InitialState", "AwaitingConfirmation",
                "ProcessingRequest", "ErrorHandling", "InitialState"]))

    def test_a_class_that_the_program_registers_itself_may_be_named(self):
        class Mine(State):
            async def handle_message(self, message, component):
                return True, self

        ff.DEFAULT_REGISTRY.register("Mine", Mine)
        config = {"name": "m", "rules": [{"on": "start", "to": "Mine"}]}
        self.assertEqual(self.talk(config, "start", "x"), ["InitialState", "Mine", "Mine"])

    def test_an_initial_state_may_be_a_dotted_path(self):
        config = {"name": "m", "initial_state": "states_of_test:Waiting"}
        loaded = self.load(config)
        self.assertEqual(
            (loaded.initial_state, explain(config).initial_state,
             ff.DEFAULT_REGISTRY.get("Waiting").__name__, self.talk(config, "x")),
            ("Waiting", "Waiting", "Waiting", ["Waiting", "Waiting"]))

    def test_a_class_that_is_no_state_is_found_and_refused(self):
        config = {"name": "m", "states": {"X": "states_of_test:NotAState"}}
        found = explain(config)
        self.assertEqual((found.states, found.errors[0].what), ([ff.StateResolution("X",
            "states_of_test:NotAState", True, False, "Not a State class")],
            "states.X: Not a State class"))


class ConfigPacks(ConfigCase):
    """Packs are loaded, and their states run."""

    def setUp(self):
        super().setUp()
        self.module("packs_of_test", StatePacks.SESSION)

    def test_a_packs_states_run(self):
        config = {"name": "m", "packs": ["packs_of_test:SessionPack"],
            "initial_state": "SessionIdle", "states": {"Over": {}},
            "rules": [{"from": "SessionActive", "on": "stop", "to": "Over"}]}
        self.assertEqual((explain(config).errors, self.talk(config, "start", "timeout", "start",
            "stop")), ([], ["SessionIdle", "SessionActive", "SessionIdle", "SessionActive",
                "Over"]))

    def test_packs_are_explained(self):
        config = {"name": "m", "packs": ["packs_of_test:SessionPack", "packs_of_test:Stranger"],
            "initial_state": "SessionIdle", "rules": [{"note": 1}]}
        found = explain(config)
        transitions = sys.modules["packs_of_test"].ready.transitions()
        self.assertEqual(
            (found.packs, found.pack_order, found.state_providers), (
                [ff.PackInfo("session", ["SessionActive", "SessionIdle"], transitions,
                    ["ErrorHandling"]), ff.PackInfo("stranger", [], [], [])],
                ["session", "stranger"], {"SessionIdle": "session", "SessionActive": "session"}))
        self.assertEqual(found.format(), textwrap.dedent("""\
            FlexiFlow Config Explanation
            ========================================
            Source: (dict)

            Component:
              name: m
              initial_state: SessionIdle
              rules: 1 rule(s)

            Packs:
              session:
                provides: SessionActive, SessionIdle
                transitions: 2 defined
                depends_on: ErrorHandling
              stranger:
                provides: (none)

            Pack order: session -> stranger

            Resolution policy: packs -> builtin

            States:
              OK SessionActive (from session)
              OK SessionIdle (from session)
              Built-in: AwaitingConfirmation, ErrorHandling, InitialState, ProcessingRequest

            Status: OK - config will load"""))

    def test_the_policy_says_whose_initial_state_it_is(self):
        found = {}
        for policy in (None, ["packs", "builtin"], ["builtin", "packs"]):
            config = {"name": "m", "packs": ["packs_of_test:StartPack",
                "packs_of_test:SessionPack"], "initial_state": "InitialState",
                "initial_state_resolution": policy}
            with contextlib.suppress(FlexiFlowError):
                found[str(policy)] = [self.talk(config, kind)[-1] for kind in ("go", "start")]
        packs, builtin = ["SessionActive", "InitialState"], ["InitialState", "AwaitingConfirmation"]
        self.assertEqual(found, {"None": packs, "['packs', 'builtin']": packs,
            "['builtin', 'packs']": builtin})

    def test_a_state_in_two_packs_or_in_pack_and_states_is_refused(self):
        twice = {"name": "m", "packs": ["packs_of_test:SessionPack", "packs_of_test:ready"]}
        both = {"name": "m", "packs": ["packs_of_test:ready"], "states": {"SessionIdle": {}}}
        self.assertEqual(
            [self.refusal(config).splitlines()[0] for config in (twice, both)],
            ["packs: State 'SessionIdle' is provided twice",
             "states.SessionIdle: State 'SessionIdle' is provided by a pack too"])

    def test_a_pack_without_what_it_needs_is_odd_but_good(self):
        self.module("needy", """
            from flexiflow import StatePack

            class Needy(StatePack):
                name = "needy"

                def depends_on(self):
                    return {"Printer", "InitialState"}
        """)
        found = explain({"name": "m", "packs": ["needy:Needy"], "rules": [{"note": 1}]})
        self.assertEqual((found.is_valid, [one.what for one in found.warnings]),
            (True, ["packs: Pack 'needy' needs a state 'Printer'"]))

    def test_packs_that_do_not_work_are_refused(self):
        self.module("bad_packs", """
            from flexiflow import StatePack, StateSpec

            class Raising(StatePack):
                def provides(self):
                    raise RuntimeError("offline")

            class Wrong(StatePack):
                def provides(self):
                    return {"X": StateSpec(dict)}

            class Nothing(StatePack):
                def provides(self):
                    return None

            class Naked(StatePack):
                def provides(self):
                    return {"X": dict}

            class Odd(StatePack):
                def provides(self):
                    return {5: StateSpec(dict)}

                def depends_on(self):
                    return {1, "a"}
        """)
        for name in ("Raising", "Wrong", "Nothing", "Naked", "Odd", "Missing"):
            with self.subTest(name):
                config = {"name": "m", "packs": [f"bad_packs:{name}"]}
                self.assertEqual((explain(config).is_valid, bool(self.refusal(config))),
                    (False, True))


class ConfigImports(ConfigCase):
    """A config with code runs only what it may, and one without runs nothing."""

    def test_allow_imports_holds_for_every_place_that_names_code(self):
        self.module("evil", "raise AssertionError('imported')\n")
        rule = {"from": "A", "on": "go", "to": "B"}
        configs = {
            "states.B": {**self.M, "states": {"A": {}, "B": "evil:X"}},
            "initial_state": {**self.M, "initial_state": "evil:X"},
            "packs[0]": {**self.M, "packs": ["evil:X"]},
            "rules[0].guard": {**self.M, "rules": [{**rule, "guard": "evil:X"}]},
            "rules[0].action": {**self.M, "rules": [{**rule, "action": "evil:X"}]},
            "rules[0].action[1]": {**self.M, "rules": [{**rule, "action": ["flexiflow:main",
                "evil:X"]}]},
            "states.A.entry.action": {**self.M, "states": {"A": {"entry": {"action": "evil:X"}},
                "B": {}}},
        }
        for allowed in ((), ("shop.",), ("flexiflow",)):
            for place, config in configs.items():
                with self.subTest(place, allowed=allowed):
                    found = explain(config, allow_imports=allowed)
                    error = self.raises(ImportError_, self.load, config, allow_imports=allowed)
                    wanted = f"{place}: Import not allowed: 'evil:X'"
                    self.assertEqual((found.errors[0].what, error.what), (wanted, wanted))
        self.assertEqual(self.imported("evil"), [])

    def test_what_is_allowed_is_imported(self):
        self.module("shop.__init__")
        self.module("shop.rules", "def gate(message, component): return message['n'] == 1\n")
        config = {**self.M, "rules": [{"from": "A", "on": "go", "guard": "shop.rules:gate",
            "to": "B"}]}
        engine = FlexiFlowEngine(allow_imports=("shop.",))
        self.assertEqual(self.talk(config, {"type": "go", "n": 2}, {"type": "go", "n": 1},
            engine=engine), ["A", "A", "B"])

    def test_an_engine_that_allows_nothing_refuses_code(self):
        engine = FlexiFlowEngine(allow_imports=())
        config = {**self.M, "states": {"A": {}, "B": "os:getcwd"}}
        error = self.raises(ImportError_, engine.create_component, config)
        self.assertEqual(error.what, "states.B: Import not allowed: 'os:getcwd'")

    def test_a_pure_json_config_imports_and_evaluates_nothing(self):
        child = self.python("-c", textwrap.dedent("""
            import asyncio, json, sys
            import flexiflow as ff

            async def use(name):
                config = {**json.loads(sys.argv[1]), "name": name}
                config["states"].pop("Legacy")
                ff.visualize(ff.explain(config))
                engine = ff.FlexiFlowEngine()
                engine.create_component(config)
                for kind, total in (("add", 0), ("place", 0), ("place", 5), ("pay", 3), ("pay", 5),
                        ("cancel", 0), ("add", 0)):
                    await engine.handle_message(name, kind, total=total, amount=total, item="x")
                try:
                    await engine.handle_message(name, "plcae")
                except ff.StateError:
                    pass
                await engine.close()

            async def main():
                await use("warm")
                sys.addaudithook(lambda event, args: seen.append((event, str(args)[:99]))
                    if event in ("import", "exec", "compile", "open") else None)
                await use("watched")

            seen = []
            asyncio.run(main())
            print(json.dumps(seen))
        """), json.dumps(self.ORDER))
        self.assertEqual((child.stdout, child.stderr),
            ("[]\n", "Not delivered, and kept in memory only: 1 to 'warehouse'\n" * 2))


class Pictures(ConfigCase):
    """Mermaid: what is drawn is what will be executed, and a name stays a label."""

    ID = r"[A-Za-z]\w*"
    LABEL = r'"((?:[\w .,:/+*=()\[\]>-]|#\d+;)*)"'
    LINES = {
        "node": rf"\s*({ID})(?:\[|\(\[|\(\()\s*{LABEL}\s*(?:\]|\]\)|\)\))(?::::unknown)?",
        "group": rf"\s*subgraph ({ID})\[{LABEL}\]",
        "end": r"\s*end",
        "edge": rf"({ID}) -->\|{LABEL}\| ({ID})",
        "start": rf"({ID})\(\( \)\) --> ({ID})",
        "style": rf"style {ID} stroke-width:4px",
        "rest": r"flowchart LR||classDef unknown stroke-dasharray: 5 5, stroke: #999|"
            r"%%(?: |[\w .,:/+*=()\[\]>-]|#\d+;)*",
    }
    KEYWORDS = {"end", "graph", "subgraph", "flowchart", "class", "click", "style", "default"}

    def read(self, picture):
        """Return what a picture shows: labels by id, and edges; fail at a line that is odd."""


        def unescaped(label):
            return re.sub(r"#(\d+);", lambda found: chr(int(found[1])), label)

        labels, edges, depth = {}, [], 0
        for line in picture.split("\n"):
            kind, found = next(((kind, found) for kind, pattern in self.LINES.items()
                for found in [re.fullmatch(pattern, line)] if found), (None, None))
            self.assertIsNotNone(kind, f"an odd line: {line!r}")
            depth += (kind == "group") - (kind == "end")
            if kind in ("node", "group"):
                name, label = found[1], unescaped(found[2])
                self.assertNotIn(name, labels, f"one id for {label!r} and another")
                self.assertNotIn(name.lower(), self.KEYWORDS)
                labels[name] = label
            elif kind == "edge":
                edges.append((found[1], unescaped(found[2]), found[3]))
            elif kind == "start":
                self.assertNotIn(found[1], labels)
                labels[found[1]] = None
                edges.append((found[1], None, found[2]))
        self.assertEqual(depth, 0, "groups that are not closed")
        return labels, [(labels.get(a, a), label, labels.get(b, b)) for a, label, b in edges]

    def test_an_order_is_drawn(self):
        config = {**self.ORDER, "rules": self.ORDER["rules"][1:], "initial_state": "Draft"}
        del config["states"]
        config["states"] = {key: value for key, value in self.ORDER["states"].items()
            if key != "Legacy"}
        self.assertEqual(ff.visualize(config, active="Open.Unpaid"), textwrap.dedent("""\
            flowchart LR

            %% Edge labels: message [guard]
            %% initial_state_resolution: [packs, builtin]

            Draft["Draft"]
            subgraph Open["Open"]
              state_2["Open.Unpaid"]
              state_3["Open.Reminded"]
            end
            Paid["Paid"]
            Closed(["Closed"])

            start_(( )) --> Draft
            Draft -->|"place [message.total > 0]"| Open
            state_2 -->|"after 1d"| state_3
            Open -->|"pay [amount >= #36;data.total]"| Paid
            any_(("*"))
            any_ -->|"cancel, stop"| Closed
            style state_2 stroke-width:4px"""))

    def test_names_stay_apart_and_stay_labels(self):
        names = ["a-b", "a_b", "a b", "end", "End", "subgraph", "click", "style", "graph",
            'x"]\nclick x "javascript:alert(1)', "<img src=x onerror=alert(1)>", "`code`",
            "%%{init}", "#quot;", "&lt;", "1", "_", "__proto__", "日本", "naïve", "\u202eback",
            "tab\t", "state_0", "state_1", "start_", "any_", "pack_0", "--> b", "a|b", "{x}",
            "\\", "'"]
        config = {"name": "m", "initial_state": "a-b", "states": {name: {} for name in names},
            "rules": [{"from": name, "on": name, "guard": {"x": name}, "to": "a-b"}
                for name in names] + [{"on": "all", "to": "a_b"}]}
        labels, edges = self.read(ff.visualize(config))
        self.assertEqual(
            (sorted(label for label in labels.values() if label not in (None, "*")),
             sorted(edge for edge in edges if edge[1] not in (None, "all"))), (sorted(names),
             sorted((name, f"{name} [x == {json.dumps(name, ensure_ascii=False)}]", "a-b")
                for name in names)))

    def test_names_of_packs_and_their_transitions_stay_labels_too(self):
        self.module("odd_pack", """
            from flexiflow import InitialState, ErrorHandling, StatePack, StateSpec, TransitionSpec

            class Odd(StatePack):
                name = 'x"]\\nclick a "b'

                def provides(self):
                    return {"a-b": StateSpec(InitialState), "a_b": StateSpec(ErrorHandling)}

                def transitions(self):
                    return [TransitionSpec("a-b", 'go"|\\n', "a_b", guard="</script>"),
                            TransitionSpec("a_b", "gone", "end")]
        """)
        labels, edges = self.read(ff.visualize(
            {"name": "m", "initial_state": "a-b", "packs": ["odd_pack:Odd"]}))
        self.assertEqual(
            (sorted(filter(None, labels.values())), [edge for edge in edges if edge[1]][:2]), (
                ["a-b", "a_b", "end", 'pack: x"]\nclick a "b'],
                [("a-b", 'go"|\n [</script>]', "a_b"), ("a_b", "gone", "end")]))

    def test_the_built_in_machine_is_drawn(self):
        _, edges = self.read(ff.visualize({"name": "m"}))
        self.assertEqual(sorted(edges[1:]), [
            ("AwaitingConfirmation", "cancel", "InitialState"),
            ("AwaitingConfirmation", "confirm", "ProcessingRequest"),
            ("ErrorHandling", "acknowledge", "InitialState"),
            ("InitialState", "start", "AwaitingConfirmation"),
            ("ProcessingRequest", "complete", "InitialState"),
            ("ProcessingRequest", "error", "ErrorHandling")])

    def test_a_path_a_config_and_an_explanation_give_the_same_picture(self):
        pictures = {ff.visualize(one) for one in (
            self.M, self.write("m.json", self.M), Path(self.path("m.json")), explain(self.M))}
        self.assertEqual(len(pictures), 1)

    def test_a_bad_config_is_drawn_as_far_as_it_goes(self):
        for config in ({}, {"name": 5, "states": {"A": 5}}, self.path("gone.json"),
                {**self.M, "rules": [{"on": "x", "to": "C"}]}):
            with self.subTest(config=config):
                self.read(ff.visualize(config))

    def test_another_format_is_refused(self):
        error = self.raises(ValueError, ff.visualize, self.M, format="dot")
        self.assertEqual((str(error), isinstance(error, FlexiFlowError)),
            ("Unknown format: 'dot'\nFix: one of mermaid, svg, text", True))


# --------------------------------------------------------------------------------------------
# 9. Snapshots: JSON file, SQLite history
# --------------------------------------------------------------------------------------------


class SvgPictures(ConfigCase):
    """`visualize(format="svg")`: a picture in which nothing lies on anything else."""

    NEST = {"name": "deep", "initial_state": "Off", "states": {
        "Off": {}, "On": {"initial": "On.Idle"}, "On.Idle": {}, "On.Work": {"initial": "On.Work.A"},
        "On.Work.A": {}, "On.Work.B": {}, "Gone": {"final": True}}, "rules": [
        {"from": "Off", "on": "power", "to": "On"}, {"from": "On", "on": "power", "to": "Off"},
        {"from": "On.Idle", "on": "start", "to": "On.Work"},
        {"from": "On.Work.A", "after": "10s", "to": "On.Work.B"},
        {"from": "On.Work.B", "on": "break", "to": "Gone"},
        {"from": "On.Work.A", "on": "wide", "to": "On.Idle"},
        {"from": "On", "on": "again", "to": "On.Work.B"},
        {"from": "*", "on": "kill", "to": "Gone"}]}

    def drawn(self, config, active=None):
        """Return boxes and labels of a picture: (x, y, width, height) by state; and by label."""
        found = ff.visualize(config, format="svg", active=active)
        self.assertEqual(found, ff.visualize(config, format="svg", active=active))
        boxes, labels = {}, []

        def look(element, x, y):
            tag = element.tag.rpartition("}")[2]
            self.assertIn(tag, {"svg", "title", "style", "defs", "marker", "path", "g", "rect",
                "text", "circle"})
            self.assertEqual([key for key in element.attrib if key.startswith("on")], [])
            moved = re.fullmatch(
                r"translate\((-?[\d.]+),(-?[\d.]+)\)", element.get("transform", ""))
            if moved:
                x, y = x + float(moved[1]), y + float(moved[2])
            if element.get("data-state") is not None:
                size = element[0].attrib
                boxes[element.get("data-state")] = (
                    x, y, float(size["width"]), float(size["height"]), element.get("class"))
            if element.get("class") == "label":
                width = max(6.0 * len(element[0].tail), 1)
                left = x + float(element.get("x")) - (
                    width / 2 if element.get("text-anchor") == "middle" else 0)
                labels.append((left, y + float(element.get("y")) - 9, width, 11, element[0].text))
            for inner in element:
                look(inner, x, y)

        look(ElementTree.fromstring(found), 0.0, 0.0)
        return boxes, labels

    def overlap(self, one, other):
        return (one[0] < other[0] + other[2] and other[0] < one[0] + one[2]
            and one[1] < other[1] + other[3] and other[1] < one[1] + one[3])

    def check(self, config, active=None):
        """Check that no two labels, and no label and no leaf, lie on each other."""
        boxes, labels = self.drawn(config, active)
        leaves = [box for box in boxes.values() if not box[4].startswith("nest")]
        for one, other in itertools.combinations([*labels, *leaves], 2):
            self.assertFalse(self.overlap(one, other), (one, other))
        for name, box in boxes.items():
            outer = boxes.get(name.rpartition(".")[0])
            if outer and outer[4].startswith("nest"):
                self.assertTrue(outer[0] < box[0] and box[0] + box[2] < outer[0] + outer[2]
                    and outer[1] + 24 < box[1] and box[1] + box[3] < outer[1] + outer[3])
        return boxes, labels

    def test_nothing_lies_on_anything_else(self):
        loops = {"name": "loops", "initial_state": "A", "states": {"A": {}, "B": {}, "C": {}},
            "rules": [{"from": one, "on": f"{one}{number}", "to": to} for one, to in (
                ("A", "B"), ("B", "B"), ("B", "C"), ("C", "A")) for number in range(12)]}
        for config in (self.ORDER, self.M, self.NEST, json.loads(
                (EXAMPLES / "sepsis.json").read_text()), json.loads(
                (EXAMPLES / "order.json").read_text()), loops):
            with self.subTest(config["name"]):
                self.check(config)

    def test_nothing_lies_on_anything_else_whatever_the_machine(self):
        seed = int(os.environ.get("FLEXIFLOW_SEED") or random.randrange(2**32))
        chance = random.Random(seed)
        for _ in range(25):
            names = [f"S{number}" + "x" * chance.randrange(9) for number in range(
                chance.choice([1, 2, 3, 5, 8, 13, 40]))]
            parents = {name: [] for name in names if chance.random() < 0.2}
            for name in parents:
                parents[name] = [f"{name}.{one}" for one in "ab"[:chance.randrange(1, 3)]]
            states = {name: {"initial": parents[name][0]} if name in parents else {}
                for name in names}
            states.update((child, {}) for name in parents for child in parents[name])
            rules = [{"from": chance.choice([*states, "*"]), "on": f"m{number}" * chance.choice(
                [1, 1, 4]), "to": chance.choice([*states]), "guard": {"data.n": number}}
                for number in range(chance.randrange(3 * len(names)))]
            config = {"name": "m", "initial_state": names[0], "states": states, "rules": rules}
            with self.subTest(seed=seed, config=config):
                boxes, labels = self.check(config, chance.choice([*states]))
                self.assertEqual({*states} - {*boxes}, set())
                causes = [label for label in labels if label[4][0] != "["]
                self.assertEqual(len(causes), len(rules))

    def test_every_end_of_an_edge_has_a_place_of_its_own(self):
        config = {"name": "m", "initial_state": "A", "states": {"A": {}, "B": {}, "C": {}},
            "rules": [{"from": one, "on": one + to, "to": to} for one, to in (
                ("A", "B"), ("B", "A"), ("B", "C"), ("C", "B"), ("*", "C"), ("*", "B"))]}
        edges = re.findall(r'class="edge" d="M([^C]+)C[^"]* ([^ "]+)"',
            ff.visualize(config, format="svg"))
        self.assertEqual((len(edges), len({point for edge in edges for point in edge})), (7, 14))

    def test_what_nothing_leads_to_stands_right_above_where_it_leads(self):
        config = {"name": "m", "initial_state": "A", "states": {one: {} for one in "ABC"},
            "rules": [{"from": "A", "on": "b", "to": "B"}, {"from": "B", "on": "c", "to": "C"},
                {"from": "*", "on": "end", "to": "C"}]}
        boxes, _ = self.drawn(config)
        self.assertEqual(boxes["*"][1], boxes["B"][1])

    def test_the_current_state_and_what_is_around_it_are_marked(self):
        boxes, _ = self.drawn(self.NEST, "On.Work.B")
        self.assertEqual({name: box[4] for name, box in boxes.items()}, {
            "Off": "state", "Gone": "state final", "*": "any", "On": "nest around",
            "On.Idle": "state", "On.Work": "nest around", "On.Work.A": "state",
            "On.Work.B": "state active"})

    def test_labels_tell_cause_guard_and_where_deeper_ends_are(self):
        _, labels = self.drawn(self.NEST)
        self.assertEqual(sorted(label[4] for label in labels), [
            "A: wide", "B: break", "after 10s",
            "again → B", "kill", "power", "power", "start"])
        _, labels = self.drawn(self.ORDER)
        texts = [label[4] for label in labels]  # a long guard stands on its own line
        self.assertEqual(texts[texts.index("place") + 1], "[message.total > 0]")

    def test_a_long_label_is_cut_and_told_in_its_title(self):
        kind = "x" * 99
        text = ff.visualize({"name": "m", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"from": "A", "on": kind, "to": "B"}]}, format="svg")
        self.assertIn(f"<title>{kind}</title>{'x' * 39}…</text>", text)

    def test_names_of_any_characters_are_text(self):
        names = ["<script>alert(1)</script>", "a\"b'c&d", "\x1b[31m", "\u202eevil", "\uffff", "]]>",
             "<!--", "日本語", "\U0001f600", "a\nb", "{{x}}", "&lt;", "javascript:x"]
        config = {"name": names[0], "initial_state": names[0], "states": {n: {} for n in names},
            "rules": [{"from": one, "on": other, "to": other, "guard": {"x": one}}
                for one, other in zip(names, names[1:])]}
        boxes, labels = self.check(config, names[1])
        causes = [label for label in labels if label[4][:3] != "[x "]
        self.assertEqual((len(boxes), len(causes)), (len(names), len(names) - 1))
        self.assertNotIn("<script", ff.visualize(config, format="svg"))

    def test_packs_classes_and_unknown_ends_are_drawn(self):
        boxes, labels = self.check({"name": "m"})
        self.assertEqual(({*boxes}, len(labels)), ({"InitialState", "AwaitingConfirmation",
            "ProcessingRequest", "ErrorHandling"}, 6))

    def test_a_bad_config_has_an_empty_picture(self):
        self.assertEqual(self.drawn({"name": "m", "initial_state": "X", "states": {"A": {}}}),
            ({}, []))

    def test_a_notebook_shows_explanations_and_components(self):
        found = explain(self.ORDER)
        self.assertEqual(found._repr_svg_(), ff.visualize(found, format="svg"))
        self.assertIsNone(explain({"name": ""})._repr_svg_())
        component = FlexiFlowEngine().create_component(self.ORDER)
        self.assertIn('class="state active" data-state="Draft"', component._repr_svg_())
        self.assertIsNone(AsyncComponent("x")._repr_svg_())


class TallyState(State):
    """A state with attributes, and a class that two names stand for in different tests."""

    def __init__(self):
        self.n, self.seen = 0, []

    async def handle_message(self, message, component):
        self.n += 1
        self.seen.append(message["type"])
        return True, self


class SnapshotCase(CodeCase):
    """Tests of snapshots of components made by hand, as 1.0.1's users make them."""

    def component(self, name="order", state="InitialState", rules=None, registry=None):
        return AsyncComponent(name, [{"rule1": "..."}] if rules is None else rules,
            StateMachine.from_name(state, registry or ff.DEFAULT_REGISTRY))

    def snapshot(self, state="InitialState", name="order", **metadata):
        return ff.ComponentSnapshot(name, state, [{"rule1": "..."}], metadata)


class SnapshotFiles(SnapshotCase):

    def test_what_is_loaded_is_what_was_saved(self):
        path = self.path("order.json")
        ff.save_component(self.component(state="ErrorHandling"), path, {"order": 42})
        self.assertEqual(ff.load_snapshot(path),
            ff.ComponentSnapshot("order", "ErrorHandling", [{"rule1": "..."}], {"order": 42}))

    def test_a_path_object_does_as_well_and_folders_are_made(self):
        path = self.folder / "a" / "b" / "order.json"
        ff.save_component(self.component(), path)
        self.assertEqual((ff.load_snapshot(path).metadata, os.listdir(path.parent)),
            ({}, ["order.json"]))

    def test_a_restored_component_is_registered_and_goes_on(self):
        path = self.path("order.json")

        async def run():
            first = FlexiFlowEngine()
            component = self.component()
            first.register(component)
            await component.handle_message({"type": "start"})
            ff.save_component(component, path)
            second = FlexiFlowEngine()
            restored = ff.restore_component(ff.load_snapshot(path), second)
            await second.handle_message("order", "cancel")
            return (component.state, restored.state, restored.rules,
                second.get("order") is restored)

        self.assertEqual(self.run_async(run()),
            ("AwaitingConfirmation", "InitialState", [{"rule1": "..."}], True))

    def test_metadata_comes_back_and_is_saved_again(self):
        path, again = self.path("a.json"), self.path("b.json")
        ff.save_component(self.component(), path, {"order": 42})
        restored = ff.restore_component(ff.load_snapshot(path), FlexiFlowEngine())
        ff.save_component(restored, again)
        self.assertEqual((restored.metadata, ff.load_snapshot(again).metadata),
            ({"order": 42}, {"order": 42}))

    def test_attributes_of_a_state_come_back(self):
        registry = ff.StateRegistry()
        registry.register("Tally", TallyState)
        component = self.component(state="Tally", registry=registry)
        path = self.path("tally.json")

        async def run():
            for kind in ("a", "b"):
                await component.handle_message({"type": kind})
            ff.save_component(component, path)
            restored = ff.restore_component(ff.load_snapshot(path), FlexiFlowEngine(), registry)
            await restored.handle_message({"type": "c"})
            state = restored.state_machine.current_state
            old = component.state_machine.current_state
            return (type(state), state.n, state.seen, old.n, old.seen)

        self.assertEqual(self.run_async(run()), (TallyState, 3, ["a", "b", "c"], 2, ["a", "b"]))

    def test_a_state_is_saved_under_its_key(self):
        registry = ff.StateRegistry()
        registry.register("Waiting", TallyState)
        path = self.path("waiting.json")
        ff.save_component(self.component(state="Waiting", registry=registry), path)
        restored = ff.restore_component(ff.load_snapshot(path), FlexiFlowEngine(), registry)
        self.assertEqual((ff.load_snapshot(path).current_state, restored.state),
            ("Waiting", "Waiting"))

    def test_data_of_a_component_with_rules_comes_back(self):
        config = {"name": "count", "initial_state": "Up", "states": {"Up": {}}, "data": {"n": 0},
            "rules": [{"on": "add", "assign": {"n": {"+": ["$data.n", 1]}}}]}
        path = self.path("count.json")

        async def run():
            engine, other = FlexiFlowEngine(), FlexiFlowEngine()
            component = engine.create_component(config)
            await component.handle_message({"type": "add"})
            ff.save_component(component, path)
            restored = ff.restore_component(ff.load_snapshot(path), other,
                component.state_machine.registry)
            await restored.handle_message({"type": "add"})
            return component.data, restored.data, restored.state

        self.assertEqual(self.run_async(run()), ({"n": 1}, {"n": 2}, "Up"))

    def test_declared_states_come_with_their_snapshot(self):
        config = {"name": "lamp", "initial_state": "Off",
            "states": {"Off": {}, "On": {"description": "Bright"}, "Old": "old_states:Old"},
            "rules": [{"from": "Off", "on": "press", "to": "On"},
                {"from": "On", "on": "press", "to": "Off"}]}
        self.module("old_states", "from flexiflow import State\nclass Old(State): pass\n")
        path = self.path("lamp.json")

        async def run():
            component = FlexiFlowEngine().create_component(config)
            await component.handle_message({"type": "press"})
            ff.save_component(component, path)
            snapshot, engine = ff.load_snapshot(path), FlexiFlowEngine()
            restored = ff.restore_component(snapshot, engine)
            before = restored.state
            await engine.handle_message("lamp", "press")
            return snapshot.states, before, restored.state

        self.assertEqual(self.run_async(run()),
            ({"Off": {}, "On": {"description": "Bright"}}, "On", "Off"))

    def test_a_state_comes_back_within_its_parents(self):
        config = {"name": "order", "initial_state": "Draft", "data": {"opened": 0},
            "states": {"Draft": {}, "Open.Unpaid": {}, "Open.Late": {}, "Paid": {"final": True},
                "Open": {"initial": "Open.Unpaid",
                    "entry": {"assign": {"opened": {"+": ["$data.opened", 1]}}}}},
            "rules": [{"from": "Draft", "on": "place", "to": "Open"},
                {"from": "Open.Unpaid", "after": "1h", "to": "Open.Late"},
                {"from": "Open", "on": "pay", "to": "Paid"}]}
        path = self.path("order.json")

        async def run(registry, clock):
            component = FlexiFlowEngine().create_component(config)
            await component.handle_message({"type": "place"})
            ff.save_component(component, path)
            engine = FlexiFlowEngine(clock=clock)
            restored = ff.restore_component(ff.load_snapshot(path), engine,
                component.state_machine.registry if registry else None)
            found = [restored.state]
            clock.now += 3600
            await engine.run(until_idle=True)
            found.append(restored.state)
            await engine.handle_message("order", "pay")
            return [*found, restored.state, restored.completed is not None, restored.data]

        for registry in (True, False):
            with self.subTest(registry=registry):
                self.assertEqual(self.run_async(run(registry, Clock())),
                    ["Open.Unpaid", "Open.Late", "Paid", True, {"opened": 1}])

    def test_an_unknown_state_is_refused_with_the_known_ones(self):
        snapshot = ff.ComponentSnapshot("order", "InitalState", [], {})
        engine = FlexiFlowEngine()
        error = self.raises(StateError, ff.restore_component, snapshot, engine)
        self.assertEqual((error.what, error.fix, engine.get("order")),
            ("Unknown state: 'InitalState'", "did you mean 'InitialState'?", None))

    def test_what_would_not_come_back_the_same_is_refused_and_the_old_file_stays(self):
        import datetime
        path = self.path("order.json")
        ff.save_component(self.component(), path, {"n": 1})
        before = Path(path).read_bytes()
        table = {
            "a date": {"when": datetime.datetime(2026, 1, 1)}, "a tuple": {"t": (1, 2)},
            "a number as key": {1: "a"}, "not a number": {"f": float("nan")},
            "infinity": {"f": float("-inf")}, "a surrogate": {"s": "\ud800"},
            "a set": {"s": {1}}, "bytes": {"b": b"x"}, "an object": {"o": object()},
        }
        for what, odd in table.items():
            for where in ("rules", "metadata"):
                with self.subTest(what, where=where):
                    component = self.component()
                    component.rules.extend([odd] if where == "rules" else [])
                    error = self.raises(PersistenceError, ff.save_component, component, path,
                        odd if where == "metadata" else None)
                    self.assertEqual((error.what, Path(path).read_bytes(), os.listdir(self.folder)),
                        ("Cannot save snapshot of order", before, ["order.json"]))

    def test_the_error_names_the_value(self):
        error = self.raises(PersistenceError, ff.save_component, self.component(),
            self.path("order.json"), {"pair": [{"t": (1, 2)}]})
        self.assertEqual(str(error), textwrap.dedent("""\
            Cannot save snapshot of order
            Why: snapshot of order.metadata.pair[0].t is a tuple
            Fix: keep it to JSON: text, numbers, lists, dicts with text as keys"""))

    def test_a_state_with_attributes_that_are_no_json_is_refused(self):
        component = self.component()
        component.state_machine.current_state.lock = object()
        error = self.raises(PersistenceError, ff.save_component, component, self.path("x.json"))
        self.assertEqual(error.why, "snapshot of order.attributes.lock is a object")

    def test_a_missing_file_is_a_file_not_found_error_too(self):
        path = self.path("gone.json")
        error = self.raises(FileNotFoundError, ff.load_snapshot, path)
        self.assertEqual((str(error), isinstance(error, PersistenceError)),
            (f"No snapshot file: {path!r}\nFix: check the path", True))

    def test_files_of_1_0_1_are_read(self):
        path = self.write("old.json", textwrap.dedent("""\
            {
              "name": "example_component",
              "current_state": "AwaitingConfirmation",
              "rules": [
                {
                  "rule1": "..."
                }
              ],
              "metadata": {
                "triggered_by": "state_change"
              }
            }"""))
        least = self.write("least.json", '{"name": "c", "current_state": "InitialState"}')
        self.assertEqual([ff.load_snapshot(path), ff.load_snapshot(least)], [
            ff.ComponentSnapshot("example_component", "AwaitingConfirmation", [{"rule1": "..."}],
                {"triggered_by": "state_change"}),
            ff.ComponentSnapshot("c", "InitialState", [], {})])

    def test_files_that_are_no_snapshots_are_refused(self):
        good = '{"name": "c", "current_state": "InitialState"'
        texts = ["", "{", "[]", "5", "null", "{}", '{"name": "c"}', '{"current_state": "A"}',
            '{"name": 5, "current_state": "A"}', '{"name": "c", "current_state": null}',
            '{"name": "", "current_state": "A"}', good + ', "rules": {}}',
            good + ', "rules": null}', good + ', "metadata": []}', good + ', "data": []}',
            good + ', "attributes": 1}',
            good + ', "name": "d"}', good + ', "metadata": {"f": NaN}}',
            good + ', "metadata": {"s": "\\ud800"}}', good + f', "x": {"9" * 5000}' "}",
            good + ', "x": ' + "[" * 5000 + "]" * 5000 + "}", good + ', "x": 1e999}',
            good + ', "checksum": 1}', good + ', "checksum": "x"}']
        for text in texts:
            with self.subTest(text=text[:99]):
                self.raises(PersistenceError, ff.load_snapshot, self.write("bad.json", text))

    def test_what_is_no_file_is_refused(self):
        (self.folder / "latin.json").write_bytes(b'{"name": "\xff"}')
        for name in ("", "latin.json", "nul\0.json", "latin.json/x"):
            with self.subTest(name=name):
                self.raises(PersistenceError, ff.load_snapshot, self.path(name))
            if name != "latin.json":
                with self.subTest("saved", name=name):
                    self.raises(PersistenceError, ff.save_component, self.component(),
                        self.path(name))

    def test_a_changed_byte_gives_the_same_snapshot_or_an_error(self):
        path = Path(self.path("order.json"))
        ff.save_component(self.component(), path, {"order": 42, "ratio": 0.5})
        good, wanted = path.read_bytes(), ff.load_snapshot(path)
        wrong = []
        for place in range(len(good)):
            for bit in (0, 3, 5, 7):
                changed = bytearray(good)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                try:
                    found = ff.load_snapshot(path)
                except PersistenceError:
                    continue
                if found != wanted:
                    wrong.append((place, bit, found))
        self.assertEqual(wrong, [])

    def test_a_file_may_be_laid_out_anew_but_not_say_something_else(self):
        path = Path(self.path("order.json"))
        ff.save_component(self.component(), path, {"order": 42})
        wanted, content = ff.load_snapshot(path), json.loads(path.read_text())
        path.write_text(json.dumps(content, indent=2, sort_keys=True))
        found = ff.load_snapshot(path)
        path.write_text(json.dumps({**content, "metadata": {"order": 43}}))
        error = self.raises(PersistenceError, ff.load_snapshot, str(path))
        self.assertEqual((found, str(error)), (wanted, textwrap.dedent(f"""\
            Damaged snapshot: {path}
            Why: its checksum does not fit
            Fix: use an older one""")))

    def test_a_snapshot_that_can_be_saved_can_be_loaded(self):
        path, saved = self.path("order.json"), 0
        room = ff.MAX_JSON - len(ff._snapshot_text(self.snapshot(x="")))
        for size in range(room - 25, room + 25):
            component = self.component()
            with contextlib.suppress(PersistenceError):
                ff.save_component(component, path, {"x": "y" * size})
                saved += 1
                self.assertEqual(len(ff.load_snapshot(path).metadata["x"]), size)
        self.assertIn(saved, range(1, 50))

    def test_a_cut_file_gives_an_error(self):
        path = Path(self.path("order.json"))
        ff.save_component(self.component(), path, {"order": 42})
        good = path.read_bytes().rstrip()
        for length in range(len(good)):
            path.write_bytes(good[:length])
            self.raises(PersistenceError, ff.load_snapshot, path)

    @unittest.skipIf(os.name == "nt", "Windows has no named pipes of this kind")
    def test_a_device_or_pipe_is_not_replaced_by_a_file(self):
        os.mkfifo(self.path("pipe"))
        for name in ("pipe", "", "new/"):
            error = self.raises(PersistenceError, ff.save_component, self.component(),
                os.path.join(self.folder, name))
            self.assertEqual(error.why, "it is a folder, or a device, which must not be replaced")
        self.assertTrue(Path(self.path("pipe")).is_fifo())
        self.assertFalse(os.path.exists(self.path("new")))

    def test_a_link_is_followed_and_permissions_stay(self):
        if os.name == "nt":
            self.skipTest("no links and modes here")
        real, link = self.folder / "real.json", self.folder / "link.json"
        ff.save_component(self.component(), real)
        os.chmod(real, 0o640)
        link.symlink_to(real)
        ff.save_component(self.component(), link, {"n": 2})
        self.assertEqual(
            (link.is_symlink(), real.stat().st_mode & 0o777, ff.load_snapshot(real).metadata),
            (True, 0o640, {"n": 2}))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_killed_save_leaves_the_old_file_or_the_new_one(self):
        child = self.python("-c", textwrap.dedent("""
            import os, random, signal, flexiflow as ff

            def save(n):
                metadata = {"n": n, "x": "y" * 200_000}
                snapshot = ff.ComponentSnapshot("c", "InitialState", [], metadata)
                ff.save_component(ff.restore_component(snapshot, ff.FlexiFlowEngine()), "c.json")

            save(0)
            seen = []
            for _ in range(15):
                before = ff.load_snapshot("c.json").metadata["n"]
                reading, writing = os.pipe()
                pid = os.fork()
                if not pid:
                    n = before
                    while True:
                        n += 1
                        save(n)
                        os.write(writing, b".")
                for _ in range(random.randrange(1, 4)):
                    os.read(reading, 1)
                for _ in range(random.randrange(200_000)):  # somewhere in the middle of a save
                    pass
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(reading)
                os.close(writing)
                found = ff.load_snapshot("c.json")
                seen.append(found.metadata["n"] > before and found.metadata["x"] == "y" * 200_000)
            print(seen)
        """))
        self.assertEqual((child.stdout, child.stderr), (f"{[True] * 15}\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "no resource limits here")
    def test_a_full_disk_leaves_the_old_file(self):
        child = self.python("-c", textwrap.dedent("""
            import os, resource, flexiflow as ff
            component = ff.AsyncComponent("c", [])
            ff.save_component(component, "c.json", {"n": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            try:
                ff.save_component(component, "c.json", {"n": 2, "x": "y" * 9000})
            except ff.PersistenceError as error:
                print(error)
            print(ff.load_snapshot("c.json").metadata, os.listdir("."))
        """))
        self.assertEqual((child.stdout, child.stderr), (textwrap.dedent("""\
            Cannot write 'c.json'
            Why: [Errno 27] File too large
            Fix: the old file is untouched
            {'n': 1} ['c.json']
        """), ""))

    def test_what_a_crash_left_aside_is_swept_when_it_is_old(self):
        old, young = self.folder / ".order.json.99999.tmp", self.folder / ".b.json.99998.tmp"
        foreign = self.folder / ".profile.tmp"
        for path in (old, young, foreign):
            path.write_text("{")
        for path in (old, foreign):
            os.utime(path, (1, 1))
        ff.save_component(self.component(), self.path("order.json"))
        self.assertEqual(sorted(os.listdir(self.folder)),
            [young.name, foreign.name, "order.json"])


class SnapshotHistory(SnapshotCase):
    """Snapshots in a database that belongs to the caller."""

    OLD_TABLE = """
        CREATE TABLE flexiflow_snapshots (id INTEGER PRIMARY KEY AUTOINCREMENT,
            component_name TEXT NOT NULL, snapshot_json TEXT NOT NULL, created_at TEXT NOT NULL);
        CREATE INDEX idx_flexiflow_snapshots_component_created
            ON flexiflow_snapshots (component_name, created_at DESC);
        INSERT INTO flexiflow_snapshots (component_name, snapshot_json, created_at) VALUES
            ('order', '{"name": "order", "current_state": "InitialState", "rules": [],
                "metadata": {"n": 1}}', '2026-01-01T00:00:00+00:00'),
            ('order', '{"name": "order", "current_state": "ErrorHandling", "rules": [],
                "metadata": {"n": 2}}', '2026-01-02T00:00:00+00:00'),
            ('order', '{broken', '2026-01-03T00:00:00+00:00');
    """

    def setUp(self):
        super().setUp()
        self.conn = self.connect()

    def connect(self, path=":memory:", **settings):
        connection = sqlite3.connect(path, **settings)
        self.addCleanup(connection.close)
        return connection

    def save(self, *states, conn=None, at=None):
        return [ff.save_snapshot_sqlite(conn or self.conn, self.snapshot(state), created_at=at)
            for state in states]

    def states(self, conn=None, **limits):
        """Return the states in the history, newest first."""
        return [row["current_state"] for row in ff.list_snapshots_sqlite(
            conn or self.conn, "order", **limits)]

    def at(self, text):
        import datetime
        return datetime.datetime.fromisoformat(text)

    def test_the_latest_snapshot_comes_back_and_the_history_is_listed(self):
        at = self.at("2026-01-01T10:00:00+00:00")
        first, second = self.save("InitialState", "ErrorHandling", at=at)
        self.assertEqual(
            (ff.load_latest_snapshot_sqlite(self.conn, "order"),
             ff.list_snapshots_sqlite(self.conn, "order"),
             ff.load_latest_snapshot_sqlite(self.conn, "other"),
             ff.list_snapshots_sqlite(self.conn, "other")), (
                self.snapshot("ErrorHandling"),
                [{"id": second, "created_at": at.isoformat(), "current_state": "ErrorHandling"},
                 {"id": first, "created_at": at.isoformat(), "current_state": "InitialState"}],
                None, []))

    def test_without_a_time_it_is_now_in_utc(self):
        self.save("InitialState")
        (row,) = ff.list_snapshots_sqlite(self.conn, "order")
        self.assertEqual(self.at(row["created_at"]).utcoffset().total_seconds(), 0)

    def test_1_0_1s_module_has_its_own_names_for_them(self):
        from flexiflow.extras import persist_sqlite as old
        self.assertEqual(
            [old.save_snapshot, old.load_latest_snapshot, old.list_snapshots, old.prune_snapshots],
            [ff.save_snapshot_sqlite, ff.load_latest_snapshot_sqlite, ff.list_snapshots_sqlite,
             ff.prune_snapshots_sqlite])

    def test_latest_is_what_was_saved_last_whatever_the_clock_says(self):
        table = {
            "the clock steps back": ["2026-01-01T11:00:00+00:00", "2026-01-01T10:00:00+00:00"],
            "one tick": ["2026-01-01T10:00:00+00:00"] * 5,
            "other zones": ["2026-01-01T10:00:00+09:00", "2026-01-01T05:00:00+00:00",
                "2026-01-01T01:00:00"],
        }
        for what, times in table.items():
            with self.subTest(what):
                conn = self.connect()
                names = [f"S{number}" for number in range(len(times))]
                for name, at in zip(names, times):
                    self.save(name, conn=conn, at=self.at(at))
                latest = ff.load_latest_snapshot_sqlite(conn, "order").current_state
                self.assertEqual((latest, self.states(conn)), (names[-1], names[::-1]))

    def test_pruning_keeps_what_was_saved_last(self):
        for at, state in (("2026-02-01", "New"), ("2026-01-01", "Old"), ("2026-03-01", "Newest"),
                ("2025-01-01", "Last")):
            self.save(state, at=self.at(at))
        ff.save_snapshot_sqlite(self.conn, self.snapshot(name="other"))
        gone = [ff.prune_snapshots_sqlite(self.conn, "order", keep_last=keep) for keep in (9, 2, 2)]
        self.assertEqual(
            (gone, self.states(), len(ff.list_snapshots_sqlite(self.conn, "other"))),
            ([0, 2, 0], ["Last", "Newest"], 1))

    def test_pruning_to_nothing_is_refused(self):
        self.save("InitialState")
        for wrong in (0, -1, True, 1.5, "1", None):
            with self.subTest(wrong=wrong):
                error = self.raises(ValueError, ff.prune_snapshots_sqlite, self.conn, "order",
                    keep_last=wrong)
                self.assertEqual((str(error), isinstance(error, FlexiFlowError)),
                    (f"keep_last is a whole number from 1: {wrong!r}", True))
        self.assertEqual(self.states(), ["InitialState"])

    def test_by_default_ten_are_listed_and_ten_are_kept(self):
        self.save(*(f"S{number}" for number in range(13)))
        listed = self.states()
        gone = ff.prune_snapshots_sqlite(self.conn, "order")
        self.assertEqual((len(listed), listed[0], gone, self.states(limit=99)),
            (10, "S12", 3, listed))

    def test_the_callers_transaction_stays_the_callers(self):
        for isolation in ("", "IMMEDIATE", None):
            for end, kept in (("rollback", []), ("commit", ["ErrorHandling"])):
                with self.subTest(isolation=isolation, end=end):
                    conn = self.connect(isolation_level=isolation)
                    conn.execute("CREATE TABLE app (x)")
                    conn.commit()
                    if isolation is None:
                        conn.execute("BEGIN")
                    conn.execute("INSERT INTO app VALUES (1)")
                    self.save("InitialState", "ErrorHandling", conn=conn)
                    ff.prune_snapshots_sqlite(conn, "order", keep_last=1)
                    still = conn.in_transaction
                    getattr(conn, end)()
                    rows = conn.execute("SELECT COUNT(*) FROM app").fetchone()[0]
                    self.assertEqual((still, rows, self.states(conn)), (True, len(kept), kept))

    def test_without_a_transaction_it_is_committed_at_once(self):
        path = self.path("app.db")
        for isolation in ("", None):
            conn = self.connect(path, isolation_level=isolation)
            self.save("InitialState", conn=conn)
            self.assertIs(conn.in_transaction, False)
        self.assertEqual(self.states(self.connect(path)), ["InitialState"] * 2)

    def test_a_failed_save_undoes_its_own_and_not_the_callers(self):
        self.save("InitialState")
        self.conn.execute("CREATE TABLE app (x)")
        self.conn.execute("CREATE TRIGGER full BEFORE INSERT ON flexiflow_snapshots"
            " BEGIN SELECT RAISE(FAIL, 'disk full'); END")
        self.conn.commit()
        self.raises(PersistenceError, self.save, "ErrorHandling")
        free = self.conn.in_transaction
        self.conn.execute("INSERT INTO app VALUES (1)")
        error = self.raises(PersistenceError, self.save, "ErrorHandling")
        self.conn.commit()
        self.assertEqual(
            (free, error.why, self.conn.execute("SELECT * FROM app").fetchall(), self.states()),
            (False, "disk full", [(1,)], ["InitialState"]))

    def test_a_closed_or_locked_database_is_a_persistence_error(self):
        path = self.path("app.db")
        holder, conn = self.connect(path), self.connect(path, timeout=0)
        self.save("InitialState", conn=holder)
        holder.execute("BEGIN IMMEDIATE")
        self.raises(PersistenceError, self.save, "ErrorHandling", conn=conn)
        holder.rollback()
        conn.close()
        for call in (lambda: self.save("ErrorHandling", conn=conn), lambda: self.states(conn),
                lambda: ff.load_latest_snapshot_sqlite(conn, "order"),
                lambda: ff.prune_snapshots_sqlite(conn, "order")):
            self.raises(PersistenceError, call)

    def test_two_workers_on_one_snapshot_cannot_both_save(self):
        self.save("InitialState")
        first = ff.load_latest_snapshot_sqlite(self.conn, "order")
        second = ff.load_latest_snapshot_sqlite(self.conn, "order")
        ff.save_snapshot_sqlite(self.conn, self.snapshot("AwaitingConfirmation"), expect=first.id)
        error = self.raises(PersistenceError, ff.save_snapshot_sqlite, self.conn,
            self.snapshot("AwaitingConfirmation"), expect=second.id)
        self.assertEqual((str(error), self.states(), self.conn.in_transaction), (
            textwrap.dedent(f"""\
                A newer snapshot of 'order' exists than {second.id}
                Why: somebody else has saved meanwhile
                Fix: load it, and apply your change to that"""),
            ["AwaitingConfirmation", "InitialState"], False))

    def test_a_refused_save_leaves_the_callers_transaction_alone(self):
        (first,) = self.save("InitialState")
        self.save("ErrorHandling")
        self.conn.execute("CREATE TABLE app (x)")
        self.conn.execute("INSERT INTO app VALUES (1)")
        self.raises(PersistenceError, ff.save_snapshot_sqlite, self.conn, self.snapshot(),
            expect=first)
        self.conn.commit()
        self.assertEqual(self.conn.execute("SELECT * FROM app").fetchall(), [(1,)])

    def test_a_snapshot_that_is_no_json_is_refused(self):
        odd = ff.ComponentSnapshot("order", "InitialState", [], {"t": (1,)})
        self.raises(PersistenceError, ff.save_snapshot_sqlite, self.conn, odd)
        self.assertEqual((self.states(), self.conn.in_transaction), ([], False))

    def test_damaged_rows_are_persistence_errors(self):
        self.save("InitialState")
        good = '{"name": "order", "current_state": "InitialState"'
        for text in ("{}", "[]", "1", "{", "", "null", "[" * 5000, '{"name": "order"}',
                good + ', "rules": 5}', good + ', "checksum": 5}', good + ', "x": NaN}', b"\xff"):
            with self.subTest(text=text[:40]):
                self.conn.execute("UPDATE flexiflow_snapshots SET snapshot_json=?", (text,))
                self.raises(PersistenceError, ff.load_latest_snapshot_sqlite, self.conn, "order")
                self.assertEqual(self.states(), ["InitialState"])

    def test_a_read_only_database_is_read(self):
        path = self.path("app.db")
        self.save("InitialState", "ErrorHandling", conn=self.connect(path))
        sqlite3.connect(self.path("empty.db")).execute("CREATE TABLE x (y)").connection.close()
        found = []
        for name in ("app.db", "empty.db"):
            conn = self.connect(f"file:{self.path(name)}?mode=ro", uri=True)
            latest = ff.load_latest_snapshot_sqlite(conn, "order")
            found.append((latest and latest.current_state, self.states(conn)))
        error = self.raises(PersistenceError, self.save, "InitialState", conn=conn)
        self.assertEqual((found, error.why), (
            [("ErrorHandling", ["ErrorHandling", "InitialState"]), (None, [])],
            "attempt to write a readonly database"))

    def test_reading_creates_nothing(self):
        found = (ff.load_latest_snapshot_sqlite(self.conn, "order"), self.states(),
            ff.prune_snapshots_sqlite(self.conn, "order"),
            self.conn.execute("SELECT name FROM sqlite_master").fetchall())
        self.assertEqual(found, (None, [], 0, []))

    def test_tables_of_1_0_1_are_read_and_written(self):
        path = self.path("old.db")
        conn = self.connect(path)
        conn.executescript(self.OLD_TABLE)
        conn.close()
        conn = self.connect(f"file:{path}?mode=ro", uri=True)
        before = self.states(conn)
        self.raises(PersistenceError, ff.load_latest_snapshot_sqlite, conn, "order")
        conn = self.connect(path)
        gone = ff.prune_snapshots_sqlite(conn, "order", keep_last=2)
        (number,) = self.save("AwaitingConfirmation", conn=conn)
        latest = ff.load_latest_snapshot_sqlite(conn, "order")
        conn.execute("DELETE FROM flexiflow_snapshots WHERE id > 2")
        conn.commit()
        self.assertEqual(
            (before, gone, number, latest, self.states(conn),
             ff.load_latest_snapshot_sqlite(conn, "order")), (
                ["invalid", "ErrorHandling", "InitialState"], 1, 4,
                self.snapshot("AwaitingConfirmation"), ["ErrorHandling"],
                ff.ComponentSnapshot("order", "ErrorHandling", [], {"n": 2})))

    def test_an_id_is_never_used_twice(self):
        (first,) = self.save("InitialState")
        stale = ff.load_latest_snapshot_sqlite(self.conn, "order").id
        self.conn.execute("DELETE FROM flexiflow_snapshots")
        self.conn.commit()
        (second,) = self.save("ErrorHandling")
        self.raises(PersistenceError, ff.save_snapshot_sqlite, self.conn, self.snapshot(),
            expect=stale)
        self.assertEqual((first, second > first), (stale, True))

    def test_a_component_restored_from_the_history_goes_on(self):
        async def run():
            component = self.component()
            await component.handle_message({"type": "start"})
            snapshot = ff.ComponentSnapshot("order", component.state, component.rules, {"n": 1})
            ff.save_snapshot_sqlite(self.conn, snapshot)
            restored = ff.restore_component(
                ff.load_latest_snapshot_sqlite(self.conn, "order"), FlexiFlowEngine())
            await restored.handle_message({"type": "cancel"})
            return restored.state, restored.metadata

        self.assertEqual(self.run_async(run()), ("InitialState", {"n": 1}))

    def test_the_history_may_live_in_the_engines_own_file(self):
        path = self.path("flow.db")

        async def run():
            async with FlexiFlowEngine(store=path) as engine:
                engine.create_component({"name": "order"})
                await engine.handle_message("order", "start")
                conn = self.connect(path)
                self.save("AwaitingConfirmation", conn=conn)
                await engine.handle_message("order", "cancel")
                return self.states(conn), engine.get("order").state

        self.assertEqual(self.run_async(run()), (["AwaitingConfirmation"], "InitialState"))

    def test_a_handler_that_cannot_save_loses_nothing_that_the_engine_keeps(self):
        path, failures = self.path("flow.db"), []
        self.conn.close()

        async def run():
            async with FlexiFlowEngine(store=path) as engine:
                await engine.event_bus.subscribe("state.changed", "saver",
                    lambda event: self.save(event["to_state"]))
                await engine.event_bus.subscribe("event.handler.failed", "watch",
                    lambda event: failures.append((event["event_name"], event["component_name"])))
                engine.create_component({"name": "order"})
                receipt = await engine.handle_message("order", "start")
            async with FlexiFlowEngine(store=path) as engine:
                return receipt.outcome, engine.get("order").state

        self.logged()
        self.assertEqual((self.run_async(run()), failures), (
            ("moved", "AwaitingConfirmation"), [("state.changed", "saver")]))


# --------------------------------------------------------------------------------------------
# 10. Store
# --------------------------------------------------------------------------------------------


class EngineCase(Case, unittest.IsolatedAsyncioTestCase):
    """Tests of engines in memory; a subclass with `stored = True` runs them again on a file."""

    stored = False
    LAMP = {
        "name": "lamp",
        "initial_state": "Off",
        "data": {"n": 0},
        "states": {"Off": {}, "On": {}, "Broken": {"final": True}},
        "rules": [
            {"from": "Off", "on": "press", "to": "On", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "On", "on": "press", "to": "Off"},
            {"from": "On", "on": "dim", "guard": {"level": {">": 0}}, "assign": {"dim": True}},
            {"on": "drop", "to": "Broken"},
        ],
    }
    COUNTER = {
        "name": "counter",
        "initial_state": "Up",
        "data": {"n": 0},
        "states": {"Up": {}},
        "rules": [{"on": "add", "assign": {"n": {"+": ["$data.n", "$message.by"]}}}],
    }

    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)
        quiet, log = logging.NullHandler(), logging.getLogger("flexiflow")
        log.addHandler(quiet)  # else what is logged on purpose would be printed
        self.addCleanup(log.removeHandler, quiet)
        self.clock = Clock()
        self.module = types.ModuleType("code_of_test")
        sys.modules["code_of_test"] = self.module
        self.addCleanup(sys.modules.pop, "code_of_test", None)
        self.engine = self.open()

    def open(self, synchronous="NORMAL"):
        """Return an engine that is closed after the test."""
        store = SQLiteStore(self.path(), synchronous) if self.stored else None
        engine = FlexiFlowEngine(store, clock=self.clock)
        self.addAsyncCleanup(engine.close)
        return engine

    async def reopen(self):
        """Go on with another engine, as a program that is started again does."""
        await self.engine.close()
        self.engine = self.open()

    def code(self, found):
        """Let configs name a function or class; return its dotted path."""
        setattr(self.module, found.__name__, found)
        return f"code_of_test:{found.__name__}"

    def waiting(self):
        """Let configs name an action that waits; return its path, and when it begins and may go."""
        begun, go = asyncio.Event(), asyncio.Event()

        async def act(message, component):
            begun.set()
            await go.wait()

        return self.code(act), begun, go

    def machine(self, *rules, states=("A", "B"), **settings):
        """Return a config with these rules and states, the first one initial."""
        states = states if isinstance(states, dict) else {name: {} for name in states}
        first = next(iter(states))
        return {
            "name": "m", "initial_state": first, "states": states, "rules": list(rules), **settings,
        }

    async def listen(self, *events, keys=()):
        """Return a Recorder of bus events."""
        recorder = Recorder(*keys)
        for event in events:
            await self.engine.event_bus.subscribe(event, "test", recorder)
        return recorder

    async def passes(self, count=20):
        """Let the loop run a few times."""
        for _ in range(count):
            await asyncio.sleep(0)

    def patch(self, name, value):
        """Change a number of flexiflow for the rest of the test."""
        self.addCleanup(setattr, ff, name, getattr(ff, name))
        setattr(ff, name, value)

    def rows(self, sql, *values):
        """Return rows of the file, read by a connection of its own."""
        with contextlib.closing(sqlite3.connect(self.path())) as db:
            return db.execute(sql, values).fetchall()

    def change(self, sql, *values):
        """Change the file behind the engine's back."""
        with contextlib.closing(sqlite3.connect(self.path())) as db, db:
            db.execute(sql, values)

    def change_messages(self, sql, *values):
        """Change messages as another process would: their checksums fit."""
        with contextlib.closing(sqlite3.connect(self.path())) as db, db:
            change_messages(db, sql, *values)

    def picture(self):
        """Return all that is known: every component's facts, and every row of the file."""
        tables = ("definitions", "components", "messages", "journal") if self.stored else ()
        found = {name: self.rows(f"SELECT * FROM flexiflow_{name} ORDER BY 1") for name in tables}
        return self.engine.status(), found

    def start(self, script, *args):
        """Start a Python child process on a script; return it, its output as text lines."""
        path = self.write(f"script{len(list(self.folder.iterdir()))}.py", textwrap.dedent(script))
        child = subprocess.Popen(
            [sys.executable, path, *args], cwd=self.folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE)},
        )  # fmt: skip
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.stdin.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child


class StoreCase(EngineCase):
    """Tests that need a file."""

    stored = True


class Wrapped:
    """A connection whose COMMIT does something else: `commit(execute)` is called instead."""

    def __init__(self, db, commit):
        self.db, self.commit = db, commit

    def __getattr__(self, name):
        return getattr(self.db, name)

    def execute(self, sql, *values):
        if sql == "COMMIT":
            return self.commit(self.db.execute)
        return self.db.execute(sql, *values)


class StoreFile(StoreCase):
    async def test_a_store_is_made_with_its_tables_in_wal_mode(self):
        db = self.open("FULL").store.db
        self.engine.store.db.execute("SELECT 1")
        tables = db.execute(
            "SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'flexi%' ORDER BY 1")
        expected = ["components", "definitions", "journal", "messages"]
        found = {name.replace("flexiflow_", "") for (name,) in tables} - {"snapshots"}
        self.assertEqual(found, set(expected))
        pragmas = ("user_version", "journal_mode", "synchronous")
        values = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
        self.assertEqual(values, [ff.SCHEMA_VERSION, "wal", 2])

    async def test_normal_is_a_choice_and_anything_else_an_error(self):
        (value,) = self.engine.store.db.execute("PRAGMA synchronous").fetchone()
        self.assertEqual(value, 1)
        error = self.raises(ff.ArgumentError, SQLiteStore, self.path(), "OFF")
        self.assertEqual(str(error), "Unknown synchronous: 'OFF'\nFix: FULL or NORMAL")

    async def test_opening_an_engine_makes_no_file(self):
        FlexiFlowEngine(self.path("other.db"))
        self.assertFalse(os.path.exists(self.path("other.db")))

    async def test_a_newer_schema_is_refused(self):
        self.engine.create_component(self.LAMP)
        await self.reopen()
        self.change(f"PRAGMA user_version={ff.SCHEMA_VERSION + 1}")
        error = self.raises(PersistenceError, self.engine.create_component, self.LAMP)
        self.assertEqual(error.what, f"Store {self.path()!r} was written by a newer FlexiFlow")
        self.assertEqual(error.fix, "use the newer flexiflow.py")

    async def test_a_file_that_is_no_database_is_refused_and_left_alone(self):
        self.write("flow.db", "name,state\n" * 1000)
        error = self.raises(PersistenceError, self.engine.create_component, self.LAMP)
        self.assertEqual(str(error), f"Store {self.path()!r} failed\n"
            "Why: DatabaseError: file is not a database\n"
            "Fix: this is no SQLite file, or a damaged one")
        self.assertEqual(Path(self.path()).read_text(), "name,state\n" * 1000)

    async def test_a_folder_that_is_missing_is_an_error_with_a_fix(self):
        engine = FlexiFlowEngine(self.path("missing/flow.db"))
        error = self.raises(PersistenceError, engine.create_component, self.LAMP)
        self.assertEqual(error.fix, "check the path, and that the folder is writable")

    async def test_what_is_no_store_is_not_touched(self):
        self.change("CREATE TABLE theirs(x)")
        self.change("PRAGMA user_version=7")
        before = Path(self.path()).read_bytes()
        for readonly in (False, True):
            error = self.raises(PersistenceError,
                SQLiteStore(self.path(), readonly=readonly).rows, "SELECT 1")
            self.assertEqual(error.why, "it is a database of something else")
        self.change("PRAGMA user_version=0")
        error = self.raises(PersistenceError, SQLiteStore(self.path(), readonly=True).rows, "1")
        self.assertEqual(error.why, "it is a database of something else")
        self.change("PRAGMA user_version=7")
        after = Path(self.path()).read_bytes()
        self.assertEqual((after[:24], after[28:92], after[96:]),
            (before[:24], before[28:92], before[96:]))  # but for SQLite's count of changes

    async def test_a_store_of_a_foreign_application_keeps_its_tables(self):
        self.change("CREATE TABLE theirs(x)")
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.assertEqual(self.rows("SELECT COUNT(*) FROM theirs"), [(0,)])

    async def test_a_file_that_is_back_is_used_again_also_where_a_view_was_at_work(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        with self.assertRaises(PersistenceError), self.engine.store.at_once():
            os.rename(self.path(), self.path("away"))
            self.engine.store._looked = 0.0
            self.engine.status()
        os.rename(self.path("away"), self.path())
        self.assertEqual((await self.engine.handle_message("lamp", "press")).outcome, "moved")

    async def test_what_is_known_of_one_component_is_of_one_moment(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        store = self.engine.store
        messages, child = store.messages, """
            import asyncio, sys
            from flexiflow import FlexiFlowEngine
            async def main():
                async with FlexiFlowEngine(sys.argv[1]) as engine:
                    await engine.handle_message("lamp", "press")
            asyncio.run(main())
            """

        def meanwhile(*asked):
            if "ORDER BY place IS NULL" in asked[0]:
                self.assertEqual(self.start(child, self.path()).wait(60), 0)
            return messages(*asked)

        with unittest.mock.patch.object(store, "messages", meanwhile):
            (found,) = self.engine.status("lamp")
        self.assertEqual((found["state"], [one["type"] for one in found["accepts"]],
            self.engine.status("lamp")[0]["state"]), ("Off", ["press", "drop"], "On"))

    async def test_reading_does_not_make_a_store(self):
        store = SQLiteStore(self.path("nowhere.db"), readonly=True)
        error = self.raises(PersistenceError, store.rows, "SELECT 1")
        self.assertEqual(error.what, f"No store: {self.path('nowhere.db')!r}")
        self.assertFalse(os.path.exists(self.path("nowhere.db")))

    async def test_a_store_opened_for_reading_reads_and_never_writes(self):
        path = self.path("a ?#%ü.db")
        engine = FlexiFlowEngine(path, clock=self.clock)
        engine.create_component(self.LAMP)
        await engine.handle_message("lamp", "press")
        await engine.close()
        reader = FlexiFlowEngine(SQLiteStore(path, readonly=True))
        before = Path(path).read_bytes()
        found = [(one["name"], one["state"], one["seq"]) for one in reader.status()]
        with self.assertRaises(PersistenceError):
            await reader.handle_message("lamp", "press")
        await reader.close()
        self.assertEqual((found, Path(path).read_bytes()), ([("lamp", "On", 1)], before))

    async def test_what_is_no_store_is_not_read(self):
        self.change("CREATE TABLE theirs(x)")
        store = SQLiteStore(self.path(), readonly=True)
        with self.assertRaises(PersistenceError):
            store.rows("SELECT * FROM theirs")
        self.assertEqual(self.rows("SELECT name FROM sqlite_master"), [("theirs",)])

    @unittest.skipIf(os.name == "nt", "an open file cannot be moved there")
    async def test_a_file_that_is_no_longer_there_acknowledges_nothing(self):
        folder = self.path("locked full")  # words that SQLite uses for other failures
        os.mkdir(folder)
        path, other = os.path.join(folder, "flow.db"), self.path("other.db")
        log, self.engine = path + "-wal", FlexiFlowEngine(path, clock=self.clock)
        async with FlexiFlowEngine(other) as engine:
            engine.create_component(self.LAMP, name="another")
        moves = {"moved": [(path, "away.db")], "its log moved": [(log, "away.db")],
            "replaced": [(path, "away.db"), (other, "flow.db")]}
        self.engine.create_component(self.LAMP)
        for seq, (how, steps) in enumerate(moves.items(), 1):
            with self.subTest(how):
                await self.engine.handle_message("lamp", "press")
                for start, end in steps:
                    os.rename(start, os.path.join(folder, end))
                time.sleep(0.02)  # it looks a hundred times a second
                with self.assertRaises(PersistenceError) as caught:
                    await self.engine.handle_message("lamp", "press", id=how)
                self.assertEqual(str(caught.exception),
                    f"Store {path!r} was moved, deleted or replaced\n"
                    f"Fix: put {steps[0][0]} back; or take its old -wal away as well, and start"
                    " again")
                with self.assertRaises(PersistenceError):
                    await self.engine.send("lamp", "press")
                with self.assertRaises(PersistenceError):
                    await self.engine.run(until_idle=True)
                self.raises(PersistenceError, self.engine.status)
                for start, end in steps[::-1]:
                    os.rename(os.path.join(folder, end), start)
                self.assertEqual(self.engine.status()[0]["seq"], seq)
        await self.engine.close()

    async def test_a_file_that_has_the_name_of_memory_is_none_of_its_own(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.mkdir(self.path("folder"))
        os.chdir(self.path("folder"))
        self.write(self.path("folder/:memory:"), "")
        engine = FlexiFlowEngine(SQLiteStore(":memory:"))
        engine.create_component(self.LAMP)
        await engine.handle_message("lamp", "press")
        os.chdir(here)
        shutil.rmtree(self.path("folder"))
        time.sleep(0.02)
        self.assertEqual((await engine.handle_message("lamp", "press")).seq, 2)
        await engine.close()

    @unittest.skipIf(os.name == "nt", "an open file cannot be moved there")
    async def test_a_store_is_found_again_by_a_program_that_changes_its_folder(self):
        os.symlink(self.path("real.db"), self.path("link.db"))
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.path(""))
        async with FlexiFlowEngine("link.db") as engine:
            engine.create_component(self.LAMP)
            await engine.handle_message("lamp", "press")
            os.chdir(here)
            receipt = await engine.handle_message("lamp", "press")
            self.assertEqual((receipt.outcome, receipt.seq), ("moved", 2))
            os.unlink(self.path("link.db"))
            os.symlink(self.write("other.db", ""), self.path("link.db"))
            os.chdir(self.path(""))
            time.sleep(0.02)
            self.raises(PersistenceError, engine.status)
            os.chdir(here)
            os.unlink(self.path("link.db"))
            os.symlink(self.path("real.db"), self.path("link.db"))

    async def test_a_closed_engine_opens_its_file_again(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await self.engine.close()
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual((receipt.outcome, receipt.seq), ("moved", 2))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    async def test_a_store_opened_before_a_fork_is_refused_in_the_child(self):
        child = self.start("""
            import asyncio, os
            from flexiflow import FlexiFlowEngine, PersistenceError
            async def main():
                engine = FlexiFlowEngine("flow.db")
                engine.create_component({"name": "a", "initial_state": "A", "states": {"A": {}}})
                await engine.run(until_idle=True)
                return engine
            engine = asyncio.run(main())
            if os.fork() == 0:
                try:
                    engine.status()
                except PersistenceError as error:
                    print(error, flush=True)
                os._exit(0)
            os.wait()
            print(len(engine.status()))
            """)
        output, _ = child.communicate(timeout=60)
        self.assertEqual(output, "Store 'flow.db' was opened before a fork\n"
            "Fix: make an engine of its own in each process\n1\n")


class StoreDamage(StoreCase):
    """What the file says wrongly is never believed."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        lamp = self.machine(
            {"on": "press", "to": "B", "assign": {"n": 1}}, {"from": "B", "on": "note"},
            name="lamp", data={"n": 0},
        )  # fmt: skip
        self.engine.create_component(lamp)
        await self.engine.handle_message("lamp", "press", id="p")
        await self.engine.handle_message("lamp", "note", id="q")

    async def damaged(self, sql, call):
        """Return what a fresh engine says after a change of the file."""
        await self.reopen()
        self.change(sql)
        with self.assertRaises(PersistenceError) as caught:
            await call(self.engine)
        return caught.exception.what.replace(self.path(), "PATH")

    async def test_a_changed_component_row_is_damage(self):
        async def call(engine):
            await engine.handle_message("lamp", "note")

        changes = {
            "data": """data='{"n":2}'""", "state": "state='A'", "seq": "seq=seq+1",
            "since": "since='{}'", "completed": "completed=1.0", "definition": "definition='x'",
            "attributes": "attributes='[]'", "crc": "crc=crc+1",
        }  # fmt: skip
        before = self.rows("SELECT * FROM flexiflow_components")
        for column, change in changes.items():
            with self.subTest(column):
                sql = f"UPDATE flexiflow_components SET {change}"
                self.assertIn("is damaged", await self.damaged(sql, call))
                await self.engine.close()
                self.change("DELETE FROM flexiflow_components")
                marks = ",".join("?" * len(before[0]))
                self.change(f"INSERT INTO flexiflow_components VALUES ({marks})", *before[0])

    async def test_a_changed_journal_row_is_damage(self):
        async def call(engine):
            engine.history("lamp")

        changes = {
            "data": """data='{"n":2}'""", "receipt": """receipt='["stayed","A","B",null]'""",
            "message": """message='{"type":"pross"}'""", "message_id": "message_id='r'",
            "time": "time=time+1", "prior": "prior=prior+1", "correlation_id": "correlation_id='c'",
        }  # fmt: skip
        for column, change in changes.items():
            with self.subTest(column):
                before = self.rows("SELECT * FROM flexiflow_journal WHERE seq=1")[0]
                sql = f"UPDATE flexiflow_journal SET {change} WHERE seq=1"
                self.assertEqual(await self.damaged(sql, call),
                    "Store 'PATH' is damaged: journal row 2")
                await self.engine.close()
                self.change("DELETE FROM flexiflow_journal WHERE seq=1")
                marks = ",".join("?" * len(before))
                self.change(f"INSERT INTO flexiflow_journal VALUES ({marks})", *before)

    async def test_a_changed_journal_row_is_not_repeated_as_a_receipt(self):
        async def call(engine):
            await engine.handle_message("lamp", "press", id="p")

        sql = """UPDATE flexiflow_journal SET receipt='["ignored","A","A",null]' WHERE seq=1"""
        self.assertEqual(await self.damaged(sql, call), "Store 'PATH' is damaged: journal row 2")

    async def test_a_journal_row_that_vanished_from_the_middle_is_damage(self):
        async def call(engine):
            engine.history("lamp")

        sql = "DELETE FROM flexiflow_journal WHERE seq=1"
        self.assertIn("is damaged", await self.damaged(sql, call))

    async def test_a_missing_component_row_with_history_is_damage_and_not_a_new_component(self):
        async def call(engine):
            engine.create_component(self.LAMP)

        sql = "DELETE FROM flexiflow_components"
        self.assertIn("is damaged", await self.damaged(sql, call))

    async def test_a_journal_without_its_last_row_is_damage(self):
        async def call(engine):
            await engine.handle_message("lamp", "press")

        sql = "DELETE FROM flexiflow_journal WHERE seq=2"
        self.assertIn("is damaged", await self.damaged(sql, call))

    async def test_a_changed_definition_is_damage(self):
        async def call(engine):
            await engine.handle_message("lamp", "press")

        sql = "UPDATE flexiflow_definitions SET body=replace(body, 'press', 'pross')"
        self.assertIn("is damaged: definition", await self.damaged(sql, call))

    async def test_a_missing_definition_is_damage(self):
        async def call(engine):
            await engine.handle_message("lamp", "press")

        sql = "DELETE FROM flexiflow_definitions"
        self.assertIn("is damaged: definition", await self.damaged(sql, call))

    async def test_a_changed_queue_row_is_dead_at_once_and_stops_nobody(self):
        await self.engine.send("lamp", "note", text="first", id="s1")
        await self.engine.send("lamp", "note", id="s2")
        await self.reopen()
        self.change("UPDATE flexiflow_messages SET message=replace(message, 'first', 'third')")
        dead = await self.listen("message.dead", keys=("component", "id", "error"))
        await self.engine.run(until_idle=True)
        error = f"Store {self.path()!r} is damaged: message 1"
        (found,) = dead.take()
        self.assertEqual(found[:2], ("lamp", "s1"))
        self.assertIn(error, found[2])
        self.assertEqual([row["id"] for row in self.engine.history("lamp", limit=1)], ["s2"])
        self.assertEqual(self.engine.status("lamp")[0]["dead"], 1)

    async def test_a_queue_row_that_is_no_json_is_dead_at_once(self):
        await self.engine.send("lamp", "note", id="s1")
        self.change("UPDATE flexiflow_messages SET message='{'")
        await self.engine.run(until_idle=True)
        facts = self.engine.status("lamp")[0]
        self.assertEqual((facts["waiting"], facts["dead"]), (0, 1))

    async def test_a_damaged_file_gives_the_same_answer_or_an_error(self):
        for name in ("a", "b"):
            self.engine.create_component(self.LAMP, name=name)
            await self.engine.handle_message(name, "press")
            await self.engine.send(name, "press", delay=60)
        expected = self.answers(self.engine)
        await self.engine.close()
        good = Path(self.path()).read_bytes()
        chance, wrong = random.Random(7), []
        for number in range(300):
            place = chance.randrange(len(good))
            page, other = (chance.randrange(len(good) // 4096) * 4096 for _ in range(2))
            bad = bytearray(good)
            if number % 3 == 0:
                bad[place] ^= 1 << chance.randrange(8)
            elif number % 3 == 1:
                bad[place:place + 64] = bytes(len(bad[place:place + 64]))
            else:
                bad[page:page + 4096] = good[other:other + 4096]
            Path(self.path("bad.db")).write_bytes(bad)
            engine = FlexiFlowEngine(self.path("bad.db"), clock=self.clock)
            with contextlib.suppress(FlexiFlowError):
                if self.answers(engine) != expected:
                    wrong.append(number)
            engine.store.close()
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    os.unlink(self.path("bad.db") + end)
        self.assertEqual(wrong, [])

    def answers(self, engine):
        """Return what an engine says of its components and their history."""
        keys = ("name", "state", "seq", "data", "completed", "since")
        return [[one[key] for key in keys] for one in engine.status()], engine.history()


class StorePlace(StoreCase):
    """Where a store lies."""

    def test_a_program_that_ends_without_closing_leaves_one_file(self):
        code = ("import asyncio, flexiflow\n"
            "engine = flexiflow.FlexiFlowEngine('x.db')\n"
            f"engine.create_component({self.LAMP!r})\n"
            "asyncio.run(engine.handle_message('lamp', 'press'))\n"
            "del engine\n")
        self.assertEqual(self.python("-c", code).returncode, 0)
        self.assertEqual([name for name in os.listdir(self.folder) if "x.db" in name], ["x.db"])

    def test_an_empty_path_is_no_store_that_is_lost_at_its_end(self):
        engine = FlexiFlowEngine("")
        error = self.raises(PersistenceError, engine.status)
        self.assertEqual((error.what, error.fix), ("Store '' failed",
            "check the path, and that the folder is writable"))

    def test_a_relative_path_means_the_folder_in_which_it_was_given(self):
        self.addCleanup(os.chdir, os.getcwd())
        for folder in ("a", "b"):
            os.mkdir(self.path(folder))
        os.chdir(self.path("a"))
        engine = FlexiFlowEngine("x.db", clock=self.clock)
        os.chdir(self.path("b"))

        async def use():
            engine.create_component(self.LAMP)
            receipt = await engine.handle_message("lamp", "press", id="1")
            await engine.close()
            return receipt.to_state, receipt.duplicate

        self.assertEqual([self.run_async(use()), self.run_async(use())],
            [("On", False), ("On", True)])
        self.assertEqual((os.listdir(self.path("a")), os.listdir(self.path("b")),
            engine.store.path), (["x.db"], [], "x.db"))


class StoreWrites(StoreCase):
    """The one write: shared, patient, and honest about what it does not know."""

    async def test_turns_that_are_ready_together_share_a_commit(self):
        names = [f"lamp{n}" for n in range(8)]
        for name in names:
            self.engine.create_component(self.LAMP, name=name)
            await self.engine.handle_message(name, "press")
        statements = []
        self.engine.store.db.set_trace_callback(statements.append)
        calls = [self.engine.handle_message(name, "press") for name in names]
        receipts = await asyncio.gather(*calls)
        self.engine.store.db.set_trace_callback(None)
        self.assertEqual([receipt.seq for receipt in receipts], [2] * 8)
        self.assertEqual((statements.count("BEGIN IMMEDIATE"), statements.count("COMMIT")), (1, 1))

    async def test_a_write_that_fails_does_not_take_others_with_it(self):
        def spoil(message, component):
            component.data["bad"] = float("nan")

        rule = {"on": "spoil", "action": self.code(spoil)}
        for name in ("a", "b", "c"):
            self.engine.create_component(self.machine(rule, {"on": "go", "to": "B"}), name=name)
        kinds = {"a": "go", "b": "spoil", "c": "go"}
        calls = [self.engine.handle_message(name, kind) for name, kind in kinds.items()]
        found = await asyncio.gather(*calls, return_exceptions=True)
        self.assertEqual([type(one).__name__ for one in found],
            ["Receipt", "PersistenceError", "Receipt"])
        states = [(one["name"], one["state"], one["seq"]) for one in self.engine.status()]
        self.assertEqual(states, [("a", "B", 1), ("b", "A", 0), ("c", "B", 1)])

    async def test_a_write_that_sqlite_refuses_does_not_take_others_with_it(self):
        for name in ("a", "b", "c"):
            self.engine.create_component(self.LAMP, name=name)
        await self.engine.run(until_idle=True)
        self.change("CREATE TRIGGER refuse BEFORE INSERT ON flexiflow_journal"
            " WHEN new.component = 'b' BEGIN SELECT RAISE(ABORT, 'refused'); END")
        calls = [self.engine.handle_message(name, "press", id="x") for name in "abc"]
        found = await asyncio.gather(*calls, return_exceptions=True)
        self.change("DROP TRIGGER refuse")
        again = [await self.engine.handle_message(name, "press", id="x") for name in "abc"]
        self.assertEqual([type(one).__name__ for one in found],
            ["Receipt", "PersistenceError", "Receipt"])
        self.assertIn("refused", found[1].why)
        self.assertEqual([(one.seq, one.duplicate) for one in again],
            [(1, True), (1, False), (1, True)])

    async def test_a_file_that_is_busy_is_waited_for(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        with contextlib.closing(sqlite3.connect(self.path(), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            task = asyncio.ensure_future(self.engine.handle_message("lamp", "press"))
            await self.passes(50)
            waited = not task.done()
            other.execute("COMMIT")
        receipt = await task
        self.assertEqual((waited, receipt.outcome, receipt.seq), (True, "moved", 2))

    async def test_waiting_for_a_busy_file_has_a_limit(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.patch("BUSY_LIMIT", 0.01)
        with contextlib.closing(sqlite3.connect(self.path(), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(PersistenceError) as caught:
                await self.engine.handle_message("lamp", "press", id="late")
        self.assertEqual(str(caught.exception), f"Store {self.path()!r} failed\n"
            "Why: OperationalError: database is locked\n"
            "Fix: another process holds the file; try again")
        receipt = await self.engine.handle_message("lamp", "press", id="late")
        self.assertEqual((receipt.to_state, receipt.seq, receipt.duplicate), ("Off", 2, False))

    async def test_a_cancelled_write_that_waits_for_the_file_is_not_carried_out(self):
        lamp = self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        with contextlib.closing(sqlite3.connect(self.path(), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            task = asyncio.ensure_future(self.engine.handle_message("lamp", "press"))
            await self.passes()
            task.cancel()
            await asyncio.wait([task])
            other.execute("COMMIT")
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual((task.cancelled(), receipt.seq, lamp.seq), (True, 2, 2))

    def fail_commits(self, *, after):
        """Let the next COMMIT of the engine fail, before or after it took effect."""
        armed = [True]

        def commit(execute):
            if not armed.pop() if armed else True:
                return execute("COMMIT")
            if after:
                execute("COMMIT")
            raise sqlite3.OperationalError("disk I/O error")

        self.wrap(commit)

    def wrap(self, commit):
        wrapped = Wrapped(self.engine.store.db, commit)
        before = SQLiteStore.db
        self.addCleanup(setattr, SQLiteStore, "db", before)
        SQLiteStore.db = property(lambda store: wrapped)

    async def test_a_failed_commit_says_that_the_outcome_is_unknown(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.fail_commits(after=False)
        with self.assertRaises(PersistenceError) as caught:
            await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual(str(caught.exception), f"Store {self.path()!r} failed\n"
            "Why: OperationalError: disk I/O error\n"
            "Fix: the outcome is unknown: repeat with the same id")

    async def test_after_a_failed_commit_the_same_id_is_applied_once(self):
        for after, duplicate in ((False, False), (True, True)):
            with self.subTest(took_effect=after):
                name = f"lamp{after}"
                lamp = self.engine.create_component(self.LAMP, name=name)
                await self.engine.handle_message(name, "press", id="first")
                self.fail_commits(after=after)
                with self.assertRaises(PersistenceError):
                    await self.engine.handle_message(name, "press", id="x")
                receipt = await self.engine.handle_message(name, "press", id="x")
                self.assertEqual(receipt.as_dict(), {
                    "outcome": "moved", "component": name, "id": "x", "from_state": "On",
                    "to_state": "Off", "seq": 2, "reason": None, "data": {"n": 1},
                    "duplicate": duplicate})
                self.assertEqual((lamp.state, lamp.seq), ("Off", 2))
                ids = [row["id"] for row in self.engine.history(name)]
                self.assertEqual(ids[:2], ["x", "first"])

    async def test_after_a_failed_commit_the_head_is_read_again(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.fail_commits(after=True)
        with self.assertRaises(PersistenceError):
            await self.engine.handle_message("lamp", "press", id="x")
        receipt = await self.engine.handle_message("lamp", "press", id="y")
        self.assertEqual((receipt.from_state, receipt.to_state, receipt.seq), ("Off", "On", 3))

    async def test_a_slow_commit_goes_to_a_thread_and_changes_nothing(self):
        self.patch("SLOW_COMMIT", -1.0)
        threads = set()

        def commit(execute):
            threads.add(threading.get_ident() == threading.main_thread().ident)
            return execute("COMMIT")

        import threading

        names = [f"lamp{n}" for n in range(4)]
        self.wrap(commit)
        for name in names:
            self.engine.create_component(self.LAMP, name=name)
        for _ in range(3):
            calls = [self.engine.handle_message(name, "press") for name in names]
            receipts = await asyncio.gather(*calls)
        self.assertEqual([(one.to_state, one.seq) for one in receipts], [("On", 3)] * 4)
        self.assertEqual(threads, {False})

    async def test_a_commit_under_way_stands_when_its_caller_is_cancelled(self):
        import threading

        lamp = self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.patch("SLOW_COMMIT", -1.0)
        loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def commit(execute):
            loop.call_soon_threadsafe(begun.set)
            go_on.wait(30)
            return execute("COMMIT")

        self.wrap(commit)
        task = asyncio.ensure_future(self.engine.handle_message("lamp", "press", id="x"))
        await asyncio.wait_for(begun.wait(), 30)
        task.cancel()
        await self.passes()
        go_on.set()
        await asyncio.wait([task])
        receipt = await self.engine.handle_message("lamp", "press", id="y")
        again = await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual((task.cancelled(), receipt.from_state, receipt.seq, lamp.seq),
            (True, "Off", 3, 3))
        self.assertEqual((again.to_state, again.seq, again.duplicate), ("Off", 2, True))

    async def test_what_a_task_sends_while_its_turn_commits_is_not_lost(self):
        import threading

        answers, tasks = [], []
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        async def later():
            await begun.wait()
            answers.append((await self.engine.handle_message("m", "own")).outcome)
            go_on.set()

        def spawn(message, component):
            tasks.append(asyncio.ensure_future(later()))

        self.engine.create_component(
            self.machine({"on": "go", "action": self.code(spawn)}, {"on": "own", "to": "B"}))
        await self.engine.run(until_idle=True)
        self.patch("SLOW_COMMIT", -1.0)

        def commit(execute):
            if tasks:  # not the claim's, which comes before the action
                loop.call_soon_threadsafe(begun.set)
                go_on.wait(30)
            return execute("COMMIT")

        self.wrap(commit)
        await self.engine.handle_message("m", "go")
        await asyncio.wait(tasks)
        await self.engine.run(until_idle=True)
        component = self.engine.get("m")
        self.assertEqual((answers, component.seq, component.state), (["queued"], 2, "B"))

    async def test_a_failed_commit_in_a_thread_is_said_as_well(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.patch("SLOW_COMMIT", -1.0)
        self.fail_commits(after=True)
        with self.assertRaises(PersistenceError) as caught:
            await self.engine.handle_message("lamp", "press", id="x")
        receipt = await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual(caught.exception.fix, "the outcome is unknown: repeat with the same id")
        self.assertEqual((receipt.to_state, receipt.seq, receipt.duplicate), ("Off", 2, True))

    async def test_what_cannot_be_saved_fails_the_turn_by_name(self):
        values = {"{1: 2}": {1: 2}, "a tuple": (1,), "NaN": float("nan"), "an object": object()}
        value = None

        def spoil(message, component):
            component.data["bad"] = value

        action = self.code(spoil)
        self.engine.create_component(self.machine({"on": "go", "to": "B", "action": action}))
        await self.engine.run(until_idle=True)
        before = self.picture()
        for name, value in values.items():  # noqa: B007  (spoil reads it)
            with self.subTest(name):
                with self.assertRaises(PersistenceError) as caught:
                    await self.engine.handle_message("m", "go")
                self.assertEqual(caught.exception.what, "Cannot save data")
                self.assertEqual(self.picture(), before)


class StoreShared(StoreCase):
    """Several engines and processes on one file."""

    WORKER = """
        import asyncio, sys
        from flexiflow import FlexiFlowEngine, SQLiteStore
        CONFIG = {
            "name": "counter", "initial_state": "Up", "data": {"n": 0}, "states": {"Up": {}},
            "rules": [{"on": "add", "assign": {"n": {"+": ["$data.n", "$message.by"]}}}],
        }
        async def main(who, count):
            engine = FlexiFlowEngine(SQLiteStore("flow.db", "NORMAL"))
            engine.create_component(CONFIG)
            for n in range(int(count)):
                receipt = await engine.handle_message("counter", "add", by=n, id=f"{who}{n}")
                print(n, receipt.seq, flush=True)
            await engine.close()
        asyncio.run(main(*sys.argv[1:]))
        """

    async def test_two_engines_see_each_others_commits_before_the_next_message(self):
        other = self.open()
        lamps = [engine.create_component(self.LAMP) for engine in (self.engine, other)]
        receipts = []
        for n in range(4):
            engine = (self.engine, other)[n % 2]
            receipts.append(await engine.handle_message("lamp", "press"))
        found = [(one.from_state, one.to_state, one.seq, one.data) for one in receipts]
        self.assertEqual(found, [
            ("Off", "On", 1, {"n": 1}), ("On", "Off", 2, {"n": 1}), ("Off", "On", 3, {"n": 2}),
            ("On", "Off", 4, {"n": 2})])
        self.assertEqual(lamps[1].seq, 4)

    async def test_one_legal_transition_is_made_once(self):
        config = self.machine({"from": "A", "on": "start", "to": "B"})
        engines = [self.engine, self.open(), self.open()]
        for engine in engines:
            engine.create_component(config)
            await engine.run(until_idle=True)
        calls = [engine.handle_message("m", "start") for engine in engines]
        receipts = await asyncio.gather(*calls)
        found = sorted((one.seq, one.outcome) for one in receipts)
        self.assertEqual(found, [(1, "moved"), (2, "ignored"), (3, "ignored")])

    async def test_an_action_does_not_run_in_a_state_that_another_engine_has_left(self):
        charged = []

        def charge(message, component):
            charged.append(message["id"])

        rule = {"from": "A", "on": "pay", "to": "B", "action": self.code(charge)}
        engines = [self.engine, self.open()]
        for engine in engines:
            engine.create_component(self.machine(rule))
            await engine.run(until_idle=True)
        receipts = [await engine.handle_message("m", "pay", id=f"p{n}")
            for n, engine in enumerate(engines)]
        self.assertEqual([one.outcome for one in receipts], ["moved", "ignored"])
        self.assertEqual(charged, ["p0"])

    async def test_a_message_that_another_engine_taught_the_component_is_known(self):
        other = self.open()
        for engine in (self.engine, other):
            engine.create_component(self.LAMP)
            await engine.run(until_idle=True)
        await self.engine.update_rules("lamp", [{"on": "sing"}])
        receipt = await other.handle_message("lamp", "sing")
        self.assertEqual((receipt.outcome, receipt.seq), ("stayed", 2))

    async def test_rules_added_by_two_engines_are_both_kept(self):
        other = self.open()
        for engine in (self.engine, other):
            engine.create_component(self.LAMP)
            await engine.run(until_idle=True)
        first, second = {"on": "sing"}, {"on": "dance"}
        await self.engine.update_rules("lamp", [first])
        rules = await other.update_rules("lamp", [second])
        self.assertEqual(rules, [*self.LAMP["rules"], first, second])

    async def test_a_component_that_another_process_removed_is_gone(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.change("DELETE FROM flexiflow_components")
        self.change("DELETE FROM flexiflow_journal")
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("lamp", "press")
        self.assertEqual(caught.exception.what, "Component 'lamp' is gone")

    async def test_two_engines_that_create_one_component_create_it_once(self):
        engines = [self.engine, self.open()]
        for engine in engines:
            engine.create_component(self.LAMP)
        await asyncio.gather(*[engine.run(until_idle=True) for engine in engines])
        await asyncio.gather(*[engine.handle_message("lamp", "press") for engine in engines])
        found = [(row["seq"], row["outcome"]) for row in self.engine.history("lamp")]
        self.assertEqual(found, [(2, "moved"), (1, "moved"), (0, "created")])

    async def test_an_id_is_applied_once_whichever_engine_takes_it(self):
        engines = [self.engine, self.open()]
        for engine in engines:
            engine.create_component(self.COUNTER)
            await engine.run(until_idle=True)
        calls = [engine.handle_message("counter", "add", by=5, id="x") for engine in engines * 3]
        receipts = await asyncio.gather(*calls)
        found = [(one.outcome, one.seq, one.data) for one in receipts]
        self.assertEqual(found, [("stayed", 1, {"n": 5})] * 6)
        self.assertEqual(sorted(one.duplicate for one in receipts), [False] + [True] * 5)

    async def test_two_processes_at_once_lose_nothing(self):
        children = [self.start(self.WORKER, who, "200") for who in "ab"]
        outputs = [child.communicate(timeout=120)[0].split("\n")[:-1] for child in children]
        seqs = [int(line.split()[1]) for output in outputs for line in output]
        rows = list(reversed(self.engine.history("counter")))
        total = 0
        for row in rows[1:]:
            total += row["message"]["by"]
            self.assertEqual(row["data"] or {"n": total}, {"n": total})
        self.assertEqual(sorted(seqs), list(range(1, 401)))
        self.assertEqual([row["seq"] for row in rows], list(range(401)))
        self.assertEqual(self.engine.get("counter").data, {"n": 2 * sum(range(200))})

    async def test_two_processes_in_turn_give_the_answers_of_one(self):
        child = self.start("""
            import asyncio, json, sys
            from flexiflow import FlexiFlowEngine, StateError
            async def main(config):
                engine = FlexiFlowEngine("flow.db")
                engine.create_component(config)
                for line in sys.stdin:
                    try:
                        receipt = await engine.handle_message("lamp", json.loads(line))
                    except StateError as error:
                        receipt = error.receipt
                    print(json.dumps(receipt.as_dict()), flush=True)
            asyncio.run(main(json.loads(sys.argv[1])))
            """, json.dumps(self.LAMP))
        alone = FlexiFlowEngine(self.path("alone.db"))
        self.addAsyncCleanup(alone.close)
        for engine in (self.engine, alone):
            engine.create_component(self.LAMP)
        kinds = random.Random(3).choices(["press", "dim", "zoom", "press"], k=20)
        kinds += ["drop", "press"]
        expected, found = [], []
        for n, kind in enumerate(kinds):
            message = {"type": kind, "level": n % 3, "id": f"m{n}"}
            expected.append(await self.receipt(alone, message))
            if n % 2:
                found.append(await self.receipt(self.engine, message))
            else:
                child.stdin.write(json.dumps(message) + "\n")
                child.stdin.flush()
                found.append(json.loads(child.stdout.readline()))
        self.assertEqual(found, expected)

    async def receipt(self, engine, message):
        """Handle a message; return the receipt as a dict, also that of an unknown one."""
        try:
            receipt = await engine.handle_message("lamp", message)
        except StateError as error:
            receipt = error.receipt
        return receipt.as_dict()

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "no kill -9 here")
    async def test_a_killed_process_applies_every_message_once(self):
        acknowledged = {}
        for kill in range(5):
            child = self.start(self.WORKER, "m", "300")
            for line in child.stdout:
                number, seq = map(int, line.split())
                self.assertEqual(acknowledged.setdefault(number, seq), seq)
                if number >= 50 * (kill + 1):
                    break
            child.kill()
            child.wait()
        self.engine.create_component(self.COUNTER)
        seqs = [(await self.engine.handle_message("counter", "add", by=n, id=f"m{n}")).seq
            for n in range(300)]
        self.assertEqual(seqs, list(range(1, 301)))
        self.assertEqual({n: seqs[n] for n in acknowledged}, acknowledged)
        self.assertEqual(self.engine.get("counter").data, {"n": sum(range(300))})
# --------------------------------------------------------------------------------------------
# 11. Component and engine
# --------------------------------------------------------------------------------------------


class Turns(EngineCase):
    """One message at a time for a component, in the order of the callers."""

    def slow(self, kind="pay", **rule):
        """Return a config whose only action waits for `self.go`, and notes who has come."""
        self.go, self.log = asyncio.Event(), []

        async def act(message, component):
            self.log.append(message.get("n"))
            await self.go.wait()

        return self.machine({"on": kind, "action": self.code(act), **rule})

    async def test_concurrent_messages_are_judged_one_after_the_other(self):
        charged = []

        async def charge(message, component):
            await self.passes(5)
            charged.append(message["id"])

        rule = {"from": "A", "on": "pay", "to": "B", "action": self.code(charge)}
        self.engine.create_component(self.machine(rule))
        calls = [self.engine.handle_message("m", "pay", id=f"p{n}") for n in range(5)]
        receipts = await asyncio.gather(*calls)
        self.assertEqual([one.outcome for one in receipts], ["moved"] + ["ignored"] * 4)
        self.assertEqual(charged, ["p0"])

    async def test_ten_callers_are_served_in_the_order_in_which_they_came(self):
        self.engine.create_component(self.slow())
        calls = [self.engine.handle_message("m", "pay", n=n) for n in range(10)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await self.passes()
        self.go.set()
        receipts = await asyncio.gather(*tasks)
        self.assertEqual([one.seq for one in receipts], list(range(1, 11)))
        self.assertEqual(self.log, list(range(10)))

    async def test_components_do_not_wait_for_each_other(self):
        config = self.slow(guard={"n": {"exists": True}})
        for name in ("a", "b"):
            self.engine.create_component(config, name=name)
        tasks = [asyncio.ensure_future(self.engine.handle_message(name, "pay", n=name))
            for name in ("a", "b")]
        while len(self.log) < 2:
            await asyncio.sleep(0)
        self.go.set()
        receipts = await asyncio.gather(*tasks)
        self.assertEqual([(one.component, one.outcome) for one in receipts],
            [("a", "stayed"), ("b", "stayed")])

    async def test_every_caller_gets_its_own_receipt_or_exception(self):
        async def divide(message, component):
            await asyncio.sleep(0)
            component.data["result"] = 60 // message["by"]

        self.engine.create_component(self.machine({"on": "div", "action": self.code(divide)}))
        calls = [self.engine.handle_message("m", "div", by=n) for n in (1, 0, 2, 0, 3)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        shown = [one.data["result"] if isinstance(one, Receipt) else type(one).__name__
            for one in found]
        self.assertEqual(shown, [60, "ZeroDivisionError", 30, "ZeroDivisionError", 20])

    async def test_every_message_runs_in_the_context_of_its_caller(self):
        import contextvars

        who = contextvars.ContextVar("who")
        seen = []

        async def look(message, component):
            await asyncio.sleep(0)
            seen.append((message["n"], who.get(), ff.get_correlation_id()))

        async def call(n):
            who.set(f"caller {n}")
            ff.set_correlation_id(f"c{n}")
            await self.engine.handle_message("m", "look", n=n)
            return ff.get_correlation_id()

        self.engine.create_component(self.machine({"on": "look", "action": self.code(look)}))
        after = await asyncio.gather(*[call(n) for n in range(3)])
        self.assertEqual(seen, [(n, f"caller {n}", f"c{n}") for n in range(3)])
        self.assertEqual(after, ["c0", "c1", "c2"])

    async def test_waiting_for_a_turn_has_a_limit_whose_error_names_the_component(self):
        self.engine.create_component(self.slow())
        first = asyncio.ensure_future(self.engine.handle_message("m", "pay", n=1))
        while not self.log:
            await asyncio.sleep(0)
        self.patch("TURN_LIMIT", 0.001)
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("m", "pay", n=2)
        self.go.set()
        receipts = [await first, await self.engine.handle_message("m", "pay", n=3)]
        self.assertEqual(caught.exception.what, "No turn for 0.001 seconds: 'm'")
        self.assertEqual(caught.exception.context.items, {"component": "m"})
        self.assertEqual(([one.seq for one in receipts], self.log), ([1, 2], [1, 3]))

    async def test_who_is_cancelled_while_waiting_leaves_the_row_of_callers(self):
        self.engine.create_component(self.slow())
        tasks = [asyncio.ensure_future(self.engine.handle_message("m", "pay", n=n))
            for n in range(5)]
        while not self.log:
            await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[3].cancel()
        await self.passes()
        self.go.set()
        await asyncio.wait(tasks)
        seqs = [None if task.cancelled() else task.result().seq for task in tasks]
        self.assertEqual((seqs, self.log), ([1, None, 2, None, 3], [0, 2, 4]))

    async def test_who_is_cancelled_in_the_moment_of_its_turn_passes_it_on(self):
        tasks = []

        async def act(message, component):
            await self.passes()
            if message["n"] == 0:  # runs before the wake-up that the end of this turn plans
                asyncio.get_running_loop().call_soon(tasks[1].cancel)

        self.engine.create_component(self.machine({"on": "pay", "action": self.code(act)}))
        calls = [self.engine.handle_message("m", "pay", n=n) for n in range(3)]
        tasks += [asyncio.ensure_future(call) for call in calls]
        await asyncio.wait(tasks)
        receipt = await self.engine.handle_message("m", "pay", n=9)
        self.assertEqual((tasks[1].cancelled(), tasks[2].result().seq, receipt.seq), (True, 2, 3))

    async def test_a_component_alone_takes_its_turns_as_well(self):
        component = AsyncComponent("c", [], StateMachine.from_name("InitialState"))
        calls = [component.handle_message({"type": "start"}) for _ in range(3)]
        receipts = await asyncio.gather(*calls)
        self.assertEqual([one.outcome for one in receipts], ["moved", "ignored", "ignored"])
        self.assertEqual(component.state, "AwaitingConfirmation")

    async def test_what_is_no_message_is_refused_before_the_turn(self):
        self.engine.create_component(self.LAMP)
        table = {
            "None": None, "a number": 5, "a list": [], "no type": {}, "an empty type": {"type": ""},
            "type 5": {"type": 5}, "id 5": {"type": "press", "id": 5},
            "empty id": {"type": "press", "id": ""},
        }  # fmt: skip
        for name, message in table.items():
            with self.subTest(name), self.assertRaises(ff.ArgumentError):
                await self.engine.handle_message("lamp", message)
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual(receipt.seq, 1)

    async def test_an_unknown_component_is_named_with_a_close_match(self):
        self.engine.create_component(self.LAMP)
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("lapm", "press")
        self.assertEqual(caught.exception.what, "Unknown component: 'lapm'")
        self.assertIn("'lamp'", caught.exception.fix)


class TurnsStored(Turns):
    stored = True


class Reentrance(EngineCase):
    """What a turn sends to its own component waits until the turn is over."""

    async def test_an_action_that_sends_to_its_own_component_is_answered_queued(self):
        answers, order = [], []

        async def act(message, component):
            order.append(message["type"])
            if message["type"] == "first":
                answers.append(await self.engine.handle_message("m", "own", id="o"))
                answers.append(await component.handle_message({"type": "own", "id": "p"}))
                await self.passes()

        rule = {"on": ["first", "own", "other"], "action": self.code(act)}
        self.engine.create_component(self.machine(rule))
        calls = [self.engine.handle_message("m", kind) for kind in ("first", "other")]
        receipts = await asyncio.gather(*calls)
        self.assertEqual(order, ["first", "own", "own", "other"])
        self.assertEqual([one.as_dict() for one in answers], [{
            "outcome": "queued", "component": "m", "id": id, "from_state": None, "to_state": None,
            "seq": None, "reason": None, "data": None, "duplicate": False} for id in "op"])
        self.assertEqual([one.seq for one in receipts], [1, 4])

    async def test_a_handler_that_sends_to_the_component_it_hears_of_is_answered_queued(self):
        answers = []

        async def press_again(data):
            if len(answers) < 2:
                answers.append(await self.engine.handle_message("lamp", "press"))

        self.engine.create_component(self.LAMP)
        await self.engine.event_bus.subscribe("state.changed", "test", press_again)
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual([one.outcome for one in answers], ["queued", "queued"])
        self.assertEqual((receipt.seq, receipt.to_state), (1, "On"))
        self.assertEqual((self.engine.get("lamp").seq, self.engine.get("lamp").state), (3, "On"))

    async def test_what_a_handler_sends_to_the_component_it_hears_of_is_delivered(self):
        async def tell(data):
            if data["component"] == "lamp" and data["seq"] == 1:
                await self.engine.send("lamp", "press", id="s")
                await self.engine.send("lamp", "drop", id="later", delay=60)
                await self.engine.send("other", "press", id="o")

        for name in ("lamp", "other"):
            self.engine.create_component(self.LAMP, name=name)
        await self.engine.event_bus.subscribe("state.changed", "test", tell)
        await self.engine.handle_message("lamp", "press")
        await self.engine.run(until_idle=True)
        facts = [(one["name"], one["state"], one["seq"], one["waiting"])
            for one in self.engine.status()]
        self.assertEqual(facts, [("lamp", "Off", 2, 1), ("other", "On", 1, 0)])

    async def test_a_message_that_comes_back_round_a_circle_is_queued(self):
        answers = []

        async def pass_on(message, component):
            other = {"a": "b", "b": "c", "c": "a"}[component.name]
            if message["type"] == "go":
                kind = "back" if other == "a" else "go"
                answers.append((other, (await self.engine.handle_message(other, kind)).outcome))

        config = self.machine({"on": ["go", "back"], "action": self.code(pass_on)})
        for name in "abc":
            self.engine.create_component(config, name=name)
        await self.engine.handle_message("a", "go")
        self.assertEqual(answers, [("a", "queued"), ("c", "stayed"), ("b", "stayed")])
        seqs = [one["seq"] for one in self.engine.status()]
        self.assertEqual(seqs, [2, 1, 1])

    async def test_a_rule_that_sends_to_its_own_component_runs_before_the_next_stranger(self):
        self.engine.create_component(self.machine(
            {"from": "A", "on": "go", "to": "B", "send": {"to": "$component", "type": "step"}},
            {"from": "B", "on": "step", "to": "C"}, {"on": "other", "assign": {"x": "$state"}},
            states="ABC",
        ))  # fmt: skip
        calls = [self.engine.handle_message("m", kind) for kind in ("go", "other")]
        receipts = await asyncio.gather(*calls)
        self.assertEqual([(one.seq, one.data) for one in receipts], [(1, {}), (3, {"x": "C"})])

    async def test_a_thousand_messages_of_its_own_are_the_limit_of_a_turn(self):
        lines = self.logged()
        dead = await self.listen("message.dead", keys=("component", "message"))
        self.engine.create_component(self.machine(
            {"on": "again", "assign": {"n": {"+": ["$data.n", 1]}},
             "send": {"to": "$component", "type": "again"}}, data={"n": 0},
        ))  # fmt: skip
        receipt = await self.engine.handle_message("m", "again")
        facts = self.engine.status("m")[0]
        self.assertEqual((receipt.seq, facts["seq"], facts["data"]), (1, 1001, {"n": 1001}))
        self.assertEqual((facts["waiting"], facts["dead"]), (0, 1))
        self.assertEqual(dead.take(), [("m", {"type": "again"})])
        self.assertTrue(any("more than 1000 messages in one turn" in line for line in lines))

    async def test_a_task_that_outlives_its_turn_is_an_ordinary_sender(self):
        over, tasks = asyncio.Event(), []

        async def later():
            await over.wait()
            return await self.engine.handle_message("m", "go")

        def spawn(message, component):
            if not tasks:
                tasks.append(asyncio.ensure_future(later()))

        self.engine.create_component(self.machine({"on": "go", "action": self.code(spawn)}))
        await self.engine.handle_message("m", "go")
        over.set()
        receipt = await tasks[0]
        self.assertEqual((receipt.outcome, receipt.seq), ("stayed", 2))

    async def test_what_a_task_sends_while_its_component_is_being_made_is_not_lost(self):
        born, tasks = asyncio.Event(), []

        async def later():
            await born.wait()
            await self.engine.send("lamp", "press")

        def spawn(message, component):
            tasks.append(asyncio.ensure_future(later()))
            return component.handle_message({"type": "next"})

        async def wait(message, component):
            born.set()
            await tasks[0]

        def fail(message, component):
            raise ValueError("no")

        self.engine.create_component(self.LAMP)
        config = self.machine({"on": "next", "action": self.code(wait)},
            {"on": "fail", "action": self.code(fail)},
            states={"A": {"entry": {"action": self.code(spawn)}}})
        await self.engine.register_async(self.engine.create_component(config))
        self.assertEqual((self.engine.get("m").seq, self.engine.status("lamp")[0]["waiting"]),
            (1, 1))
        tasks.clear()
        born.clear()
        self.engine.create_component(config, name="other")
        with self.assertRaisesRegex(ValueError, "no"):
            await self.engine.handle_message("other", "fail")
        self.assertEqual(self.engine.status("lamp")[0]["waiting"], 2)

    async def test_a_task_that_its_turn_waits_for_is_part_of_it(self):
        answers = []

        async def spawn(message, component):
            if message["type"] == "go":
                call = self.engine.handle_message("m", "own")
                answers.append(await asyncio.ensure_future(call))

        rule = {"on": ["go", "own"], "action": self.code(spawn)}
        self.engine.create_component(self.machine(rule))
        await self.engine.handle_message("m", "go")
        self.assertEqual((answers[0].outcome, self.engine.get("m").seq), ("queued", 2))

    async def test_delivering_from_within_a_turn_comes_to_an_end(self):
        async def act(message, component):
            if message["type"] == "go":
                await self.engine.run(until_idle=True)

        rule = {"on": ["go", "own"], "action": self.code(act)}
        component = self.engine.create_component(self.machine(rule))
        await self.engine.send("m", "own")
        with contextlib.suppress(StateError):  # to refuse it is an answer, too
            await asyncio.wait_for(self.engine.handle_message("m", "go"), 2)
        await self.engine.run(until_idle=True)
        self.assertIn(component.seq, (1, 2))

    async def test_two_components_that_wait_for_each_other_are_parted_by_the_limit(self):
        begun = []

        async def ask(message, component):
            begun.append(component.name)
            while len(begun) < 2:
                await asyncio.sleep(0)
            await self.engine.handle_message({"a": "b", "b": "a"}[component.name], "other")

        self.patch("TURN_LIMIT", 0.05)
        config = self.machine({"on": "go", "action": self.code(ask)}, {"on": "other", "to": "B"})
        for name in "ab":
            self.engine.create_component(config, name=name)
        calls = [self.engine.handle_message(name, "go") for name in "ab"]
        found = await asyncio.gather(*calls, return_exceptions=True)
        errors = [one.what for one in found if isinstance(one, StateError)]
        after = [await self.engine.handle_message(name, "other") for name in "ab"]
        self.assertTrue(errors and {*errors} <= {f"No turn for 0.05 seconds: {n!r}" for n in "ab"})
        self.assertEqual([one.to_state for one in after], ["B", "B"])

    async def test_a_component_made_by_an_action_can_be_used_in_it(self):
        receipts = []

        async def act(message, component):
            self.engine.create_component(self.LAMP)
            receipts.append(await self.engine.handle_message("lamp", "press"))

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.handle_message("m", "go")
        self.assertEqual((receipts[0].outcome, receipts[0].seq), ("moved", 1))

    async def test_own_messages_of_a_turn_that_fails_are_never_sent(self):
        async def act(message, component):
            if message["type"] == "go":
                await self.engine.handle_message("m", "own")
                await self.engine.send("m", "own")
                raise ValueError("no")

        self.engine.create_component(
            self.machine({"on": ["go", "own"], "action": self.code(act)}))
        await self.engine.run(until_idle=True)
        before = self.picture()
        with self.assertRaises(ValueError):
            await self.engine.handle_message("m", "go")
        await self.engine.run(until_idle=True)
        self.assertEqual(self.picture(), before)

    async def test_an_own_message_that_fails_is_its_own_failure(self):
        async def act(message, component):
            if message["type"] == "bad":
                raise ValueError("bad")

        self.engine.create_component(self.machine(
            {"on": "go", "to": "B", "send": [{"to": "m", "type": one} for one in ("bad", "ok")]},
            {"on": ["bad", "ok"], "action": self.code(act), "assign": {"last": "$message.type"}},
        ))  # fmt: skip
        receipt = await self.engine.handle_message("m", "go")
        facts = self.engine.status("m")[0]
        self.assertEqual((receipt.outcome, receipt.seq), ("moved", 1))
        self.assertEqual((facts["seq"], facts["data"], facts["waiting"], facts["dead"]),
            (2, {"last": "ok"}, 1, 0))

    async def test_a_failed_attempt_at_an_own_message_counts_once(self):
        ran = []

        async def act(message, component):
            ran.append(message["type"])
            raise ValueError("bad")

        self.engine.create_component(self.machine(
            {"on": "go", "send": {"to": "m", "type": "bad"}},
            {"on": "bad", "action": self.code(act)}, retry={"max_attempts": 2, "base_delay": 0}))
        await self.engine.handle_message("m", "go")
        after_one = [*ran], self.engine.dead_letters()
        await self.engine.run(until_idle=True)
        self.assertEqual((after_one, ran, [one["attempts"] for one in self.engine.dead_letters()]),
            ((["bad"], []), ["bad", "bad"], [2]))

    async def test_an_own_message_that_nobody_knows_is_dead_at_once(self):
        self.engine.create_component(
            self.machine({"on": "go", "send": {"to": "m", "type": "nonsense"}}))
        receipt = await self.engine.handle_message("m", "go")
        facts = self.engine.status("m")[0]
        self.assertEqual((receipt.outcome, facts["seq"], facts["waiting"], facts["dead"]),
            ("stayed", 1, 0, 1))


class ReentranceStored(Reentrance):
    stored = True


class Outcomes(EngineCase):
    """The receipt, whole, of every outcome."""

    def receipt(self, outcome, before, after, seq, reason=None, data=None, **more):
        return {"outcome": outcome, "component": "lamp", "id": "x", "from_state": before,
            "to_state": after, "seq": seq, "reason": reason,
            "data": {"n": 1} if data is None else data, "duplicate": False, **more}

    async def test_the_receipt_of_each_outcome(self):
        table = [
            ([], "press", self.receipt("moved", "Off", "On", 1)),
            ([], "dim", self.receipt(
                "ignored", "Off", "Off", 1, "Off does not take 'dim'", {"n": 0})),
            (["press"], "dim", self.receipt("stayed", "On", "On", 2, data={"n": 1, "dim": True})),
            (["press", "drop"], "press", self.receipt(
                "ignored", "Broken", "Broken", 3, "completed in Broken")),
        ]  # fmt: skip
        for number, (before, kind, expected) in enumerate(table):
            with self.subTest(kind, before=before):
                name = f"lamp{number}"
                self.engine.create_component(self.LAMP, name=name)
                for one in before:
                    await self.engine.handle_message(name, one)
                receipt = await self.engine.handle_message(name, kind, level=3, id="x")
                self.assertEqual(receipt.as_dict(), {**expected, "component": name})
                self.assertEqual(bool(receipt), expected["outcome"] in ("moved", "stayed"))

    async def test_a_blocked_message_says_what_its_guards_saw(self):
        self.engine.create_component(self.machine(
            {"on": "pay", "to": "B", "guard": {"amount": {">=": "$data.total"}}},
            {"on": "pay", "guard": {"all": [{"data.vip": True}, {"amount": {"exists": True}}]}},
            name="lamp", data={"total": 10},
        ))  # fmt: skip
        receipt = await self.engine.handle_message("lamp", "pay", amount=5, id="x")
        reason = ("rules[0] wants amount >= $data.total = 10 (saw 5); "
            "rules[1] wants data.vip == true (saw nothing)")
        self.assertEqual(receipt.as_dict(), self.receipt("blocked", "A", "A", 1, reason,
            {"total": 10}))
        self.assertFalse(receipt)

    async def test_an_unknown_message_raises_with_a_close_match_and_its_receipt(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("lamp", "pres", id="x")
        error = caught.exception
        self.assertEqual(str(error), "Unknown message: 'pres'\n"
            "Why: no rule of 'lamp' takes it in any state\n"
            "Fix: did you mean 'press'?\n"
            "Context:\n  component='lamp'\n  state='On'")
        outcome = error.receipt
        self.assertEqual((outcome.outcome, outcome.component, outcome.from_state, outcome.seq),
            ("unknown", "lamp", "On", None))
        self.assertFalse(outcome)

    async def test_an_unknown_message_writes_nothing_and_takes_no_id(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        before = self.picture()
        with self.assertRaises(StateError):
            await self.engine.handle_message("lamp", "pres", id="x")
        after = self.picture()
        receipt = await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual((after, receipt.seq, receipt.duplicate), (before, 2, False))

    async def test_where_a_star_or_a_class_takes_messages_none_is_unknown(self):
        class Talker(State):
            async def handle_message(self, message, component):
                return False, self

        star = self.machine({"from": "B", "on": "*", "to": "A"}, name="star")
        talker = self.machine({"on": "go", "to": "T"}, name="talker",
            states={"A": {}, "T": self.code(Talker)})
        for config in (star, talker):
            self.engine.create_component(config)
            receipt = await self.engine.handle_message(config["name"], "nonsense")
            self.assertEqual(receipt.outcome, "ignored")

    async def test_a_class_moves_stays_or_ignores(self):
        class Open(State):
            async def handle_message(self, message, component):
                answers = {"next": (True, Shut()), "stay": (True, self)}
                return answers.get(message["type"], (False, self))

        class Shut(State):
            async def handle_message(self, message, component):
                return False, self

        states = {"Open": self.code(Open), "Shut": self.code(Shut)}
        self.engine.create_component(self.machine(states=states))
        receipts = [await self.engine.handle_message("m", kind) for kind in ("stay", "x", "next")]
        found = [(one.outcome, one.from_state, one.to_state, one.seq) for one in receipts]
        self.assertEqual(found, [("stayed", "Open", "Open", 1), ("ignored", "Open", "Open", 2),
            ("moved", "Open", "Shut", 3)])

    async def test_a_class_may_lead_to_a_state_outside_the_config_only_in_memory(self):
        class Open(State):
            async def handle_message(self, message, component):
                return True, Elsewhere()

        class Elsewhere(State):
            async def handle_message(self, message, component):
                return True, Open()

        self.engine.create_component(self.machine(states={"Open": self.code(Open)}))
        if self.stored:
            with self.assertRaises(StateError) as caught:
                await self.engine.handle_message("m", "go")
            self.assertEqual(caught.exception.what, "State 'Elsewhere' is not in the config of 'm'")
        else:
            receipts = [await self.engine.handle_message("m", "go") for _ in range(2)]
            self.assertEqual([one.to_state for one in receipts], ["Elsewhere", "Open"])

    async def test_a_class_that_answers_nonsense_fails_the_message(self):
        answers = {"None": None, "one value": True, "no state": (True, None), "text": (True, "B")}
        answer = None

        class Odd(State):
            async def handle_message(self, message, component):
                return answer

        self.engine.create_component(self.machine(states={"Odd": self.code(Odd)}))
        await self.engine.run(until_idle=True)
        before = self.picture()
        for name, answer in answers.items():  # noqa: B007  (Odd returns it)
            with self.subTest(name):
                with self.assertRaises(StateError):
                    await self.engine.handle_message("m", "go")
                self.assertEqual(self.picture(), before)

    async def test_the_data_of_a_receipt_is_a_copy(self):
        self.engine.create_component(self.LAMP)
        receipt = await self.engine.handle_message("lamp", "press")
        receipt.data["n"] = 99
        self.assertEqual((receipt.data, self.engine.get("lamp").data), ({"n": 1}, {"n": 1}))

    async def test_a_message_without_an_id_can_be_sent_twice(self):
        self.engine.create_component(self.LAMP)
        receipts = [await self.engine.handle_message("lamp", {"type": "press"}) for _ in range(2)]
        self.assertEqual([(one.to_state, one.seq) for one in receipts], [("On", 1), ("Off", 2)])

    async def test_a_message_is_a_dict_or_a_type_with_fields(self):
        self.engine.create_component(self.machine({"on": "go", "assign": {"seen": "$message.x"}}))
        await self.engine.handle_message("m", {"type": "go", "x": 1})
        await self.engine.handle_message("m", "go", x=2)
        receipt = await self.engine.handle_message("m", {"type": "go", "x": 1}, x=3)
        self.assertEqual((receipt.data, receipt.seq), ({"seen": 3}, 3))

    async def test_accepts_lists_what_a_component_takes_now(self):
        self.engine.create_component(self.LAMP)
        found = [self.engine.accepts("lamp")]
        for kind in ("press", "drop"):
            await self.engine.handle_message("lamp", kind)
            found.append(self.engine.accepts("lamp"))
        press, drop = ({"type": kind, "from": source, "guard": None, "to": target}
            for kind, source, target in (("press", "Off", "On"), ("drop", "*", "Broken")))
        back = {**press, "from": "On", "to": "Off"}
        dim = {"type": "dim", "from": "On", "guard": "level > 0", "to": None}
        self.assertEqual(found, [[press, drop], [back, dim, drop], []])


class OutcomesStored(Outcomes):
    stored = True


class Machines(EngineCase):
    """Machines that standards and products describe, as configs."""

    LEASE = {"t1": "$message.t1", "t2": {"-": ["$message.t2", "$message.t1"]},
        "rest": {"-": ["$message.lease", "$message.t2"]}}  # how long each state may take
    DHCP = {  # RFC 2131, section 4.4, figure 5; the timers of section 4.4.5
        "name": "dhcp", "initial_state": "Init",
        "states": dict.fromkeys(
            "Init Selecting Requesting Bound Renewing Rebinding".split(), {}),
        "rules": [
            {"from": "Init", "on": "discover", "to": "Selecting"},
            {"from": "Selecting", "on": "select", "to": "Requesting"},
            {"from": ["Requesting", "Renewing", "Rebinding"], "on": "DHCPACK", "to": "Bound",
                "assign": LEASE},
            {"from": ["Requesting", "Renewing", "Rebinding"], "on": "DHCPNAK", "to": "Init"},
            {"from": "Bound", "on": ["DHCPOFFER", "DHCPACK", "DHCPNAK"]},  # discarded
            {"from": "Bound", "after": "$data.t1", "to": "Renewing"},
            {"from": "Renewing", "after": "$data.t2", "to": "Rebinding"},
            {"from": "Rebinding", "after": "$data.rest", "to": "Init"},
        ],
    }

    async def test_a_dhcp_client_renews_rebinds_and_loses_its_lease_in_time(self):
        start = self.clock.now
        client = self.engine.create_component(self.DHCP)
        for kind in ("discover", "select"):
            await self.engine.handle_message("dhcp", kind)
        lease = {"t1": 40, "t2": 70, "lease": 80}
        await self.engine.handle_message("dhcp", "DHCPACK", **lease)
        seen = []

        async def wait_until(moment):
            for self.clock.now in (start + moment - 0.1, start + moment):
                await self.engine.run(until_idle=True)
                seen.append((round(self.clock.now - start, 1), client.state))

        await wait_until(40)
        await self.engine.handle_message("dhcp", "DHCPACK", **lease)  # a new lease
        for moment in (80, 110, 120):
            await wait_until(moment)
        self.assertEqual(seen, [
            (39.9, "Bound"), (40, "Renewing"), (79.9, "Bound"), (80, "Renewing"),
            (109.9, "Renewing"), (110, "Rebinding"), (119.9, "Rebinding"), (120, "Init")])

    @unittest.skipUnless((SHARED / "machines.json").exists(), "no ../shared/data")
    async def test_machines_of_standards_end_where_their_traces_say(self):
        for machine in json.loads((SHARED / "machines.json").read_text(encoding="utf-8")):
            ends = [rule[key] for rule in machine["transitions"] for key in ("from", "to")]
            config = {"name": machine["name"], "initial_state": machine["initial"],
                "states": {name: {"final": name in machine["final"]}
                    for name in dict.fromkeys([machine["initial"], *ends, *machine["final"]])},
                "rules": machine["transitions"]}
            schema = ff.schema()
            self.assertEqual((explain(config).errors, Strangers.fits(config, schema, schema)),
                ([], True))
            for number, trace in enumerate(machine["traces"]):
                with self.subTest(machine=machine["name"], trace=number):
                    name = f"{machine['name']}-{number}"
                    component, unhandled = self.engine.create_component(config, name=name), 0
                    for event in trace["events"]:
                        receipt = await component.handle_message({"type": event}, _strict=False)
                        unhandled += not receipt
                    self.assertEqual((component.state, unhandled),
                        (trace["end"], trace.get("unhandled", 0)))


class MachinesStored(Machines):
    stored = True


class DryRuns(EngineCase):
    """What a message would do is told, and nothing of it is done."""

    NOTHING = {"changes": {}, "sends": [], "emits": [], "actions": [], "timers": [], "ended": []}

    def act(self, message, component):
        raise AssertionError("An action was run")

    async def foreseen(self, *message, **fields):
        """Return what a dry run tells, once it is known that it has changed nothing."""
        before = self.picture()
        found = await self.engine.dry_run("m", *message, **fields)
        self.assertEqual(self.picture(), before)
        return found

    async def test_a_key_that_becomes_null_is_a_change(self):
        self.engine.create_component(self.machine(
            {"on": "go", "assign": {"new": None, "old": None, "same": None}},
            data={"old": 0, "same": None}))
        found = await self.engine.dry_run("m", "go")
        self.assertEqual(found["changes"], {"new": [None, None], "old": [0, None]})

    class Playing(State):
        """A class that calls something of its own what the tables of the built-in ones are."""

        moves = ["e4"]

        async def handle_message(self, message, component):
            raise AssertionError("A class was run")

    async def test_what_a_class_calls_moves_is_its_own(self):
        config = self.machine({"on": "go"}, states={"Playing": self.code(self.Playing)})
        self.engine.create_component(config)
        self.assertEqual((await self.foreseen("e5"))["outcome"], "class")
        self.assertEqual([one["type"] for one in self.engine.accepts("m")], ["go"])
        self.assertIn("Playing", ff.visualize(config))

    async def test_the_whole_effect_is_told(self):
        path = self.code(self.act)
        await self.engine.register_async(self.engine.create_component(self.machine(
            {"from": "A", "after": 30, "to": "B"},
            {"from": "B", "after": "1h", "to": "A"},
            {"from": "A", "on": "go", "to": "B", "assign": {"n": "$message.n", "flag": 1},
                "action": path, "emit": "went", "guard": {"n": {">": 0}},
                "send": {"to": "$component", "type": "went", "after": 5, "id": "s",
                    "with": {"n": "$data.n"}}},
            data={"n": 1, "flag": True})))
        found = await self.foreseen("go", n=2, id="k")
        (timer,) = self.engine.status("m")[0]["timers"]
        self.assertEqual(found, {
            "component": "m", "id": "k", "outcome": "moved", "from_state": "A", "to_state": "B",
            "reason": None, "duplicate": False, "changes": {"n": [1, 2], "flag": [True, 1]},
            "sends": [{"to": "m", "message": {"type": "went", "n": 2}, "delay": 5.0, "id": "s"}],
            "emits": ["went"], "actions": ["test_flexiflow:DryRuns.act"],
            "timers": [{"message": "after 1h", "due": self.clock.now + 3600, "state": "B"}],
            "ended": [timer]})

    async def test_why_a_message_is_refused_is_told(self):
        await self.engine.register_async(self.engine.create_component(self.machine(
            {"from": "A", "on": "go", "to": "B", "guard": {"n": {">": 0}}},
            {"from": "B", "on": "back", "to": "A"})))
        same = {"component": "m", "from_state": "A", "to_state": "A", "duplicate": False,
            **self.NOTHING}
        for kind, outcome, reason in (
            ("go", "blocked", "rules[0] wants n > 0 (saw -1)"),
            ("back", "ignored", "A does not take 'back'"),
            ("away", "unknown", "A does not take 'away'"),
        ):
            with self.subTest(kind=kind):
                self.assertEqual(await self.foreseen(kind, n=-1, id="k"), {
                    "id": "k", "outcome": outcome, "reason": reason, **same})

    async def test_a_table_of_our_own_is_asked_and_a_class_of_the_users_is_not(self):
        self.engine.create_component({"name": "m", "rules": [{"note": 1}]})
        found = await self.foreseen("start")
        self.assertEqual((found["outcome"], found["to_state"]), ("moved", "AwaitingConfirmation"))

        class Own(State):
            async def handle_message(self, message, component):
                raise AssertionError("A state class was asked")

        self.engine.create_component({"name": "own", "initial_state": "Own",
            "states": {"Own": self.code(Own)}, "rules": []})
        self.assertEqual((await self.engine.dry_run("own", "go"))["outcome"], "class")

    async def test_what_it_would_raise_is_raised(self):
        await self.engine.register_async(self.engine.create_component(self.machine(
            {"on": "go", "assign": {"n": "$message.n"}})))
        for name, message, error in (
            ("m", "go", "No value at \\$message.n"), ("x", "go", "Unknown component: 'x'"),
            ("m", "", "The 'type' of a message is text"),
        ):
            with self.subTest(message=message), self.assertRaisesRegex(FlexiFlowError, error):
                await self.engine.dry_run(name, message)


    async def test_with_the_component_its_timers_end_and_none_begins(self):
        await self.engine.register_async(self.engine.create_component(self.machine(
            {"from": "*", "after": 30, "to": "A"}, {"from": "B", "after": 5, "to": "A"},
            {"from": "A", "on": "end", "to": "B"}, states={"A": {}, "B": {"final": True}})))
        found = await self.foreseen("end")
        await self.engine.handle_message("m", "end")
        self.assertEqual((found["timers"], [one["state"] for one in found["ended"]],
            self.engine.status("m")[0]["timers"]), ([], ["*"], []))


class DryRunsStored(DryRuns):
    stored = True

    async def test_an_id_that_stands_for_another_message_is_refused_as_it_would_be(self):
        self.engine.create_component(self.machine({"on": "go"}, {"on": "back"}))
        await self.engine.handle_message("m", "go", id="k")
        with self.assertRaisesRegex(StateError, "The id 'k' was used for another message"):
            await self.engine.dry_run("m", "back", id="k")

    async def test_a_message_that_has_been_handled_has_its_answer(self):
        self.engine.create_component(self.machine({"on": "go", "to": "B", "from": "A"}))
        await self.engine.handle_message("m", "go", id="k")
        self.assertEqual(await self.foreseen("go", id="k"), {
            "component": "m", "id": "k", "outcome": "moved", "from_state": "A", "to_state": "B",
            "reason": None, "duplicate": True, **self.NOTHING})

    async def test_what_another_process_has_changed_is_seen(self):
        self.engine.create_component(self.machine({"on": "go", "to": "B", "from": "A"}))
        await self.engine.run(until_idle=True)
        other = self.open()
        await other.handle_message("m", "go")
        self.assertEqual(((await self.foreseen("go"))["outcome"], self.engine.accepts("m")),
            ("ignored", []))


class Duplicates(StoreCase):
    """An id is applied to a component once."""

    async def test_a_duplicate_repeats_the_first_receipt_with_its_data(self):
        self.engine.create_component(self.LAMP)
        first = await self.engine.handle_message("lamp", "press", id="x")
        await self.engine.handle_message("lamp", "press")
        await self.engine.handle_message("lamp", "press")
        again = await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual(again.as_dict(), {**first.as_dict(), "duplicate": True})
        self.assertEqual((again.data, bool(again)), ({"n": 1}, True))
        self.assertEqual(self.engine.get("lamp").seq, 3)

    async def test_a_duplicate_of_a_step_that_left_the_data_alone_has_the_data_of_then(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        first = await self.engine.handle_message("lamp", "press", id="x")
        await self.engine.handle_message("lamp", "press")
        again = await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual((first.data, again.data, again.seq), ({"n": 1}, {"n": 1}, 2))

    async def test_the_id_of_a_message_that_waits_stands_for_that_message(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", by=1, id="x")
        for call in (self.engine.handle_message, self.engine.dry_run):
            with self.assertRaises(StateError) as caught:
                await call("lamp", "press", by=2, id="x")
            self.assertEqual(
                caught.exception.what, "The id 'x' was used for another message to 'lamp'")
        early = await self.engine.handle_message("lamp", "press", by=1, id="x")
        self.assertEqual((early.to_state, early.duplicate), ("On", False))
        self.assertEqual((await self.engine.run(until_idle=True), self.engine.get("lamp").seq,
            self.engine.status("lamp")[0]["waiting"]), (0, 1, 0))

    async def test_refusals_are_remembered_too(self):
        self.engine.create_component(self.LAMP)
        ignored = await self.engine.handle_message("lamp", "dim", id="i")
        await self.engine.handle_message("lamp", "press")
        blocked = await self.engine.handle_message("lamp", "dim", id="b")
        again = [await self.engine.handle_message("lamp", "dim", id=id) for id in "ib"]
        self.assertEqual([one.as_dict() for one in again],
            [{**one.as_dict(), "duplicate": True} for one in (ignored, blocked)])
        self.assertEqual([one.outcome for one in again], ["ignored", "blocked"])

    async def test_a_duplicate_survives_a_restart_and_runs_no_action(self):
        ran = []

        def act(message, component):
            ran.append(message["id"])

        config = self.machine({"on": "go", "to": "B", "action": self.code(act)})
        self.engine.create_component(config)
        first = await self.engine.handle_message("m", "go", id="x")
        await self.reopen()
        again = await self.engine.handle_message("m", "go", id="x")
        self.assertEqual(again.as_dict(), {**first.as_dict(), "duplicate": True})
        self.assertEqual(ran, ["x"])

    async def test_the_same_id_with_another_payload_or_type_is_an_error(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press", hard=True, id="x")
        for message in ({"type": "press", "hard": False}, {"type": "press"}, {"type": "drop"}):
            with self.subTest(message), self.assertRaises(StateError) as caught:
                await self.engine.handle_message("lamp", {**message, "id": "x"})
            self.assertEqual(str(caught.exception),
                "The id 'x' was used for another message to 'lamp'\n"
                "Why: an id stands for one message, its type and payload included\n"
                "Fix: send the new message under a new id\nContext:\n  first='press'")
        self.assertEqual(self.engine.get("lamp").seq, 1)

    async def test_another_correlation_id_or_order_of_keys_makes_no_other_message(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", {
            "type": "press", "a": 1, "b": 2, "id": "x", "correlation_id": "one"})
        again = await self.engine.handle_message("lamp", {
            "b": 2, "a": 1, "type": "press", "correlation_id": "two", "id": "x"})
        self.assertEqual((again.seq, again.duplicate), (1, True))

    async def test_an_id_belongs_to_one_component(self):
        for name in "ab":
            self.engine.create_component(self.LAMP, name=name)
        receipts = [await self.engine.handle_message(name, "press", id="x") for name in "ab"]
        self.assertEqual([(one.seq, one.duplicate) for one in receipts], [(1, False)] * 2)

    async def test_a_duplicate_is_not_announced_again(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press", id="x")
        heard = await self.listen("*")
        await self.engine.handle_message("lamp", "press", id="x")
        self.assertEqual(heard.take(), [])

    async def test_a_queued_message_whose_id_was_handled_is_dropped(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="x", delay=60)
        await self.engine.handle_message("lamp", "press", id="x")
        self.clock.now += 60
        await self.engine.run(until_idle=True)
        facts = self.engine.status("lamp")[0]
        self.assertEqual((facts["seq"], facts["waiting"], facts["dead"]), (1, 0, 0))

    async def test_sending_an_id_twice_queues_it_once(self):
        self.engine.create_component(self.LAMP)
        answers = [await self.engine.send("lamp", "press", id="x") for _ in range(2)]
        await self.engine.run(until_idle=True)
        answers.append(await self.engine.send("lamp", "press", id="x"))
        await self.engine.run(until_idle=True)
        self.assertEqual([(one.outcome, one.duplicate) for one in answers],
            [("queued", False), ("queued", True), ("queued", True)])
        self.assertEqual(self.engine.status("lamp")[0]["seq"], 1)

    async def test_sending_an_id_with_another_payload_is_an_error(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="x")
        with self.assertRaises(StateError) as caught:
            await self.engine.send("lamp", "press", hard=True, id="x")
        self.assertEqual(str(caught.exception),
            "The id 'x' was used for another message to 'lamp'\n"
            "Why: an id stands for one message, its type and payload included\n"
            "Fix: send the new message under a new id")


class AllOrNothing(EngineCase):
    """What fails before the commit has never happened."""

    def failing(self):
        """Return a config with a message for each way to fail; B has a timer and data."""
        def spoil(message, component):
            component.data["n"] = 99
            component.data["list"].append("spoilt")
            raise RuntimeError("action")

        def refuse(message, component):
            raise RuntimeError("guard")

        async def leave(message, component):
            component.data["n"] = 98
            await asyncio.sleep(0)
            raise RuntimeError("entry")

        more = {"to": "C", "assign": {"n": 7}, "send": {"to": "x", "type": "hello"}, "emit": "said"}
        return self.machine(
            {"on": "open", "to": "B"},
            {"from": "B", "after": 60, "to": "A"},
            {"on": "action", "action": self.code(spoil), **more},
            {"on": "guard", "guard": self.code(refuse), **more},
            {"on": "guard", **more},
            {"on": "entry", **more, "to": "D"},
            {"on": "missing", **more, "assign": {"n": "$data.nowhere.at.all"}},
            {"on": "delay", **more, "send": {"to": "x", "type": "t", "after": "$message.after"}},
            states={"A": {}, "B": {}, "C": {}, "D": {"entry": {"action": self.code(leave)}}},
            data={"n": 1, "list": []},
        )  # fmt: skip

    async def test_a_message_that_fails_leaves_everything_as_it_was(self):
        self.engine.create_component(self.failing())
        heard = await self.listen("said", "state.changed")
        await self.engine.handle_message("m", "open")
        await self.engine.send("m", "open", delay=3600)
        heard.take()
        before = self.picture()
        errors = {
            "action": RuntimeError, "guard": RuntimeError, "entry": RuntimeError,
            "missing": StateError, "delay": StateError,
        }  # fmt: skip
        for kind, error in errors.items():
            with self.subTest(kind):
                with self.assertRaises(error):
                    await self.engine.handle_message("m", kind, id="x", after="soon")
                component = self.engine.get("m")
                self.assertEqual((component.state, component.seq), ("B", 1))
                self.assertEqual(component.data, {"n": 1, "list": []})
                self.assertEqual(self.picture(), before)
                self.assertEqual(heard.take(), [])
        receipt = await self.engine.handle_message("m", "open", id="x")
        self.assertEqual((receipt.outcome, receipt.seq), ("moved", 2))

    async def test_a_missing_path_is_named(self):
        self.engine.create_component(self.failing())
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("m", "missing")
        self.assertIn("data.nowhere.at.all", str(caught.exception))

    async def test_attributes_of_a_class_based_state_are_put_back(self):
        class Counting(State):
            def __init__(self):
                self.n, self.seen = 0, []

            async def handle_message(self, message, component):
                self.n += 1
                self.seen.append(message["type"])
                component.data["n"] = self.n
                if message["type"] == "fail":
                    raise RuntimeError("no")
                return True, self

        config = self.machine(states={"Counting": self.code(Counting)})
        component = self.engine.create_component(config)
        await self.engine.handle_message("m", "one")
        before = self.picture()
        with self.assertRaises(RuntimeError):
            await self.engine.handle_message("m", "fail")
        after = self.picture()
        await self.engine.handle_message("m", "two")
        state = component.state_machine.current_state
        self.assertEqual(after, before)
        self.assertEqual((state.n, state.seen, component.data), (2, ["one", "two"], {"n": 2}))

    async def test_a_failed_message_was_received_but_changed_nothing(self):
        self.engine.create_component(self.failing())
        heard = await self.listen("*")
        with self.assertRaises(RuntimeError):
            await self.engine.handle_message("m", "action")
        events = [one["message"]["type"] for one in heard.take() if "message" in one]
        self.assertEqual(events, ["action"])

    async def test_data_that_is_no_dict_fails_the_message(self):
        def spoil(message, component):
            component.data = message["data"]

        component = self.engine.create_component(
            self.machine({"on": "go", "action": self.code(spoil)}, data={"n": 1}))
        for data in (5, None, []):  # None: what dict.update returns
            with self.assertRaises(StateError) as caught:
                await self.engine.handle_message("m", "go", data=data)
            self.assertEqual(caught.exception.what, f"Data of 'm' is not a dict: {data!r}")
        self.assertEqual((component.data, component.seq), ({"n": 1}, 0))

    async def test_an_action_that_ends_in_system_exit_undoes_the_turn(self):
        def leave(message, component):
            component.data["n"] = 5
            raise SystemExit(3)

        self.engine.create_component(
            self.machine({"on": "go", "to": "B", "action": self.code(leave)}))
        await self.engine.run(until_idle=True)
        before = self.picture()
        try:
            with self.assertRaises(SystemExit):
                await self.engine.handle_message("m", "go")
        finally:
            self.assertEqual(self.picture(), before)


class AllOrNothingStored(AllOrNothing):
    stored = True


class Cancellation(EngineCase):
    """A message that is cancelled is committed or has never come; never half."""

    async def test_a_cancellation_at_any_point_commits_all_or_nothing(self):
        async def act(message, component):
            component.data["n"] += 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        config = self.machine(
            {"from": "A", "on": "go", "to": "B", "action": self.code(act),
             "send": {"to": "elsewhere", "type": "hello", "after": 60}}, data={"n": 0})
        found = set()
        for steps in range(200):
            name = f"m{steps}"
            component = self.engine.create_component(config, name=name)
            task = asyncio.ensure_future(self.engine.handle_message(name, "go", id="x"))
            await self.passes(steps)
            task.cancel()
            await asyncio.wait([task])
            now = (component.state, component.seq, component.data["n"])
            found.add(now)
            self.assertIn(now, [("A", 0, 0), ("B", 1, 1)])
            self.assertIn(task.cancelled(), (True,) if now[0] == "A" else (True, False))
            if self.stored:
                ids = [row["id"] for row in self.engine.history(name) if row["seq"]]
                self.assertEqual(ids, ["x"] * now[1])
            receipt = await self.engine.handle_message(name, "go", id="y")
            expected = ("moved", 1) if now[0] == "A" else ("ignored", 2)
            self.assertEqual((receipt.outcome, receipt.seq, component.data["n"]), (*expected, 1))
            if not task.cancelled():
                break
        self.assertEqual((found, task.cancelled()), ({("A", 0, 0), ("B", 1, 1)}, False))

    async def test_a_cancellation_while_events_go_out_does_not_undo(self):
        heard = asyncio.Event()

        async def hang(data):
            heard.set()
            await asyncio.Event().wait()

        lamp = self.engine.create_component(self.LAMP)
        handle = await self.engine.event_bus.subscribe("state.changed", "test", hang)
        task = asyncio.ensure_future(self.engine.handle_message("lamp", "press"))
        await heard.wait()
        task.cancel()
        await asyncio.wait([task])
        self.engine.event_bus.unsubscribe(handle)
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual((task.cancelled(), receipt.from_state, receipt.seq, lamp.seq),
            (True, "On", 2, 2))

    async def test_own_messages_left_by_a_cancelled_caller_run_with_the_next(self):
        hang, begun, ran = asyncio.Event(), asyncio.Event(), []

        async def act(message, component):
            ran.append(message["type"])
            if message["type"] == "own" and len(ran) == 2:
                begun.set()
                await hang.wait()

        self.engine.create_component(self.machine(
            {"on": "go", "send": {"to": "m", "type": "own"}, "action": self.code(act)},
            {"on": ["own", "last"], "action": "code_of_test:act"},
        ))  # fmt: skip
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])
        await self.engine.handle_message("m", "last")
        facts = self.engine.status("m")[0]
        self.assertEqual((task.cancelled(), ran), (True, ["go", "own", "own", "last"]))
        self.assertEqual((facts["seq"], facts["waiting"], facts["dead"]), (3, 0, 0))

    async def test_attributes_are_put_back_when_a_class_is_cancelled(self):
        begun = asyncio.Event()

        class Slow(State):
            def __init__(self):
                self.n = 0

            async def handle_message(self, message, component):
                self.n += 1
                begun.set()
                await asyncio.sleep(0 if message["type"] == "quick" else 3600)
                return True, self

        component = self.engine.create_component(self.machine(states={"Slow": self.code(Slow)}))
        task = asyncio.ensure_future(self.engine.handle_message("m", "slow"))
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])
        undone = component.state_machine.current_state.n
        receipt = await self.engine.handle_message("m", "quick")
        self.assertEqual((undone, receipt.seq, component.state_machine.current_state.n), (0, 1, 1))


    async def test_what_a_handler_sent_is_not_lost_when_its_caller_is_cancelled(self):
        hanging = asyncio.Event()

        async def tell(data):
            if data["seq"] == 1:
                await self.engine.handle_message("lamp", "press")

        async def hang(data):
            if data["seq"] == 1:
                hanging.set()
                await asyncio.Event().wait()

        lamp = self.engine.create_component(self.LAMP)
        for handler in (tell, hang):
            await self.engine.event_bus.subscribe("state.changed", "test", handler)
        task = asyncio.ensure_future(self.engine.handle_message("lamp", "press"))
        await hanging.wait()
        task.cancel()
        await asyncio.wait([task])
        receipt = await self.engine.handle_message("lamp", "dim", level=1)
        await self.engine.run(until_idle=True)
        self.assertEqual((task.cancelled(), receipt.outcome, lamp.seq, lamp.state),
            (True, "ignored", 3, "Off"))


class CancellationStored(Cancellation):
    stored = True

    async def test_a_cancellation_while_commits_go_to_a_thread_commits_all_or_nothing(self):
        self.patch("SLOW_COMMIT", -1.0)
        config = self.machine(
            {"from": "A", "on": "go", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "B", "on": "go"}, data={"n": 0})
        for steps in range(60):
            name = f"m{steps}"
            component = self.engine.create_component(config, name=name)
            task = asyncio.ensure_future(self.engine.handle_message(name, "go", id="x"))
            await self.passes(steps)
            task.cancel()
            await asyncio.wait([task])
            receipts = [await self.engine.handle_message(name, "go", id=id) for id in "yx"]
            rows = [(row["id"], row["seq"]) for row in reversed(self.engine.history(name))]
            came = receipts[1].duplicate
            self.assertEqual(rows[1:], [("x", 1), ("y", 2)] if came else [("y", 1), ("x", 2)])
            self.assertEqual((component.state, component.seq, component.data), ("B", 2, {"n": 1}))
            self.assertTrue(came or task.cancelled())

    async def test_closed_after_a_cancellation_it_leaves_no_claim_and_no_file_open(self):
        self.patch("SLOW_COMMIT", -1.0)
        commit, committed = self.engine.store._commit, threading.Event()
        self.engine.store._commit = lambda db: (
            commit(db), committed.set(), time.sleep(0.002))[0]

        async def act(message, component):
            await asyncio.sleep(0)

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.handle_message("m", "go")
        for passes in range(12):
            task = asyncio.ensure_future(self.engine.handle_message("m", "go", id=f"{passes}"))
            committed.clear()
            await self.passes(passes)
            task.cancel()
            await asyncio.wait([task])
            if self.engine.store._committing:
                committed.wait(10)
            await self.engine.close()
            with self.subTest(passes=passes):
                self.assertIsNone(self.engine.store._connection)
                self.assertEqual(self.rows("SELECT owner FROM flexiflow_components"), [(None,)])

    async def test_the_next_message_is_decided_on_what_the_cancelled_one_has_committed(self):
        self.patch("SLOW_COMMIT", -1.0)
        commit, came = self.engine.store._commit, []
        self.engine.store._commit = lambda db: (time.sleep(0.01), commit(db))[1]
        config = self.machine({"on": "set", "assign": {"x": 1}},
            {"on": "need", "assign": {"y": "$data.x"}})
        for steps in range(0, 40, 3):
            name = f"m{steps}"
            self.engine.create_component(config, name=name)
            await self.engine.register_async(self.engine.get(name))
            tasks = [asyncio.ensure_future(self.engine.handle_message(name, kind, id=kind))
                for kind in ("set", "need")]
            await self.passes(steps)
            tasks[0].cancel()
            await asyncio.wait(tasks)
            ids = [row["id"] for row in self.engine.history(name) if row["id"]]
            with self.subTest(steps=steps):
                self.assertIn(ids, ([], ["need", "set"]))
                self.assertEqual(tasks[1].exception() is None, bool(ids))
            came.append(bool(ids))
        self.assertEqual({*came}, {True, False})


class Visibility(EngineCase):
    """Within a turn the component shows what will be; everybody else sees what is."""

    async def test_an_action_sees_the_new_state_and_data_and_others_the_old(self):
        seen, begun, go = [], asyncio.Event(), asyncio.Event()

        async def look(message, component):
            await asyncio.sleep(0)
            seen.append((component.state, component.data))
            begun.set()
            await go.wait()

        rule = {"from": "A", "on": "go", "to": "B", "assign": {"n": 1}, "action": self.code(look)}
        component = self.engine.create_component(self.machine(rule, data={"n": 0}))
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        outside = (component.state, component.data, component.seq)
        go.set()
        await task
        after = (component.state, component.data, component.seq)
        self.assertEqual(seen, [("B", {"n": 1})])
        self.assertEqual((outside, after), (("A", {"n": 0}, 0), ("B", {"n": 1}, 1)))

    async def test_what_an_action_does_to_the_data_is_the_last_word(self):
        def change(message, component):
            component.data["n"] += 10
            component.data["list"].append("x")

        def swap(message, component):
            component.data = {"swapped": component.data["n"]}

        self.engine.create_component(self.machine(
            {"on": "change", "assign": {"n": 5}, "action": self.code(change)},
            {"on": "swap", "action": self.code(swap)}, data={"n": 0, "list": []},
        ))  # fmt: skip
        receipts = [await self.engine.handle_message("m", kind) for kind in ("change", "swap")]
        self.assertEqual([one.data for one in receipts],
            [{"n": 15, "list": ["x"]}, {"swapped": 15}])

    async def test_data_taken_outside_a_turn_is_a_copy(self):
        component = self.engine.create_component(self.LAMP, data={"list": [1]})
        component.data["list"].append(2)
        component.data["n"] = 7
        self.assertEqual(component.data, {"n": 0, "list": [1]})

    async def test_data_kept_from_a_turn_changes_nothing_later(self):
        kept = []

        def keep(message, component):
            kept.append(component.data)

        component = self.engine.create_component(
            self.machine({"on": "go", "action": self.code(keep)}, data={"list": [1]}))
        await self.engine.handle_message("m", "go")
        kept[0]["list"].append(2)
        self.assertEqual(component.data, {"list": [1]})

    async def test_setting_data_outside_a_turn_is_refused(self):
        component = self.engine.create_component(self.LAMP)
        with self.assertRaises(StateError) as caught:
            component.data = {"n": 5}
        self.assertEqual(caught.exception.what, "Data of 'lamp' set outside a turn")

    async def test_two_actions_see_each_others_changes(self):
        seen = []

        def one(message, component):
            component.data["n"] = 1

        def two(message, component):
            seen.append(component.data["n"])

        self.engine.create_component(
            self.machine({"on": "go", "action": [self.code(one), self.code(two)]}))
        await self.engine.handle_message("m", "go")
        self.assertEqual(seen, [1])

    async def test_handlers_of_the_turn_see_what_is_committed(self):
        component = self.engine.create_component(self.LAMP)
        seen = []

        def look(data):
            seen.append((component.state, component.data, component.seq))

        await self.engine.event_bus.subscribe("state.changed", "test", look)
        await self.engine.handle_message("lamp", "press")
        self.assertEqual(seen, [("On", {"n": 1}, 1)])


class VisibilityStored(Visibility):
    stored = True


class EngineEvents(EngineCase):
    """What the engine says on the bus, after the commit and in order."""

    async def test_a_component_is_announced_exactly_once_however_it_comes(self):
        heard = await self.listen("engine.component.registered", keys=("component",))
        by_hand = [AsyncComponent(name, [], StateMachine.from_name("InitialState"))
            for name in ("register", "register_async")]
        self.engine.register(by_hand[0])
        await self.engine.register_async(by_hand[1])
        self.engine.create_component(self.LAMP)
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await self.passes()
        self.assertEqual(heard.take(), [("register",), ("register_async",), ("lamp",)])

    async def test_registering_the_same_object_again_is_harmless(self):
        heard = await self.listen("engine.component.registered", keys=("component",))
        component = AsyncComponent("c", [], StateMachine.from_name("InitialState"))
        for _ in range(2):
            self.engine.register(component)
            await self.engine.register_async(component)
        self.assertEqual(heard.take(), [("c",)])

    async def test_an_announcement_is_not_lost_when_the_engine_is_closed_at_once(self):
        heard = await self.listen("engine.component.registered", keys=("component", "seq"))
        self.engine.create_component(self.LAMP)
        await self.engine.close()
        self.assertEqual(heard.take(), [("lamp", 0)])

    def test_what_is_registered_without_a_loop_is_announced_by_the_first_call_that_awaits(self):
        heard = Recorder("component")
        engine = FlexiFlowEngine(self.path() if self.stored else None)
        engine.register(AsyncComponent("c", [], StateMachine.from_name("InitialState")))

        async def main():
            await engine.event_bus.subscribe("engine.component.registered", "test", heard)
            await engine.handle_message("c", "start")
            await engine.close()

        self.run_async(main())
        self.assertEqual(heard.take(), [("c",)])

    async def test_an_announcement_under_way_is_not_collected(self):
        import gc

        go, begun, done = asyncio.Event(), asyncio.Event(), []

        async def slow(data):
            begun.set()
            await go.wait()
            done.append(data["component"])

        handle = await self.engine.event_bus.subscribe("engine.component.registered", "t", slow)
        self.engine.register(AsyncComponent("c", [], StateMachine.from_name("InitialState")))
        await begun.wait()
        self.engine.event_bus.unsubscribe(handle)
        gc.collect()
        go.set()
        await self.engine.close()
        self.assertEqual(done, ["c"])

    async def test_a_message_is_announced_with_its_payload_in_order(self):
        self.engine.create_component(self.LAMP)
        heard = Recorder()
        for event in ("component.message.received", "state.changed", "component.completed"):
            await self.engine.event_bus.subscribe(
                event, "test", lambda data, event=event: heard((event, data)))
        message = {"type": "drop", "id": "d", "correlation_id": "c", "far": True}
        await self.engine.handle_message("lamp", message)
        common = {"component": "lamp", "seq": 1, "correlation_id": "c"}
        (received, changed, completed) = heard.take()
        self.assertEqual(received, ("component.message.received", {**common, "message": message}))
        self.assertEqual(changed[0], "state.changed")
        self.assertEqual({**common, "from_state": "Off", "to_state": "Broken"}.items()
            - changed[1].items(), set())
        self.assertEqual((completed[0], common.items() - completed[1].items()),
            ("component.completed", set()))

    async def test_only_what_moves_changes_a_state(self):
        heard = await self.listen("state.changed", keys=("from_state", "to_state", "seq"))
        self.engine.create_component(self.LAMP)
        for kind in ("dim", "press", "dim", "press"):
            await self.engine.handle_message("lamp", kind, level=1)
        self.assertEqual(heard.take(), [("Off", "On", 2), ("On", "Off", 4)])

    async def test_events_of_concurrent_callers_come_in_the_order_of_seq(self):
        heard = await self.listen("state.changed", keys=("seq",))

        async def slow_for_odd(data):
            await self.passes(data["seq"] % 2 * 10)

        await self.engine.event_bus.subscribe("state.changed", "slow", slow_for_odd, priority=1)
        self.engine.create_component(self.LAMP)
        calls = [self.engine.handle_message("lamp", "press") for _ in range(6)]
        await asyncio.gather(*calls)
        self.assertEqual(heard.take(), [(n,) for n in range(1, 7)])

    async def test_handle_message_returns_when_its_handlers_are_done(self):
        done = []

        async def slow(data):
            await self.passes()
            done.append(data["seq"])

        await self.engine.event_bus.subscribe("state.changed", "test", slow)
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        self.assertEqual(done, [1])

    async def test_a_handler_that_fails_never_changes_the_outcome(self):
        def fail(data):
            raise RuntimeError("handler")

        heard = await self.listen("event.handler.failed", keys=("event_name", "exception", "seq"))
        for event in ("component.message.received", "state.changed", "rang"):
            await self.engine.event_bus.subscribe(event, "test", fail)
        lamp = self.engine.create_component(
            self.machine({"from": "A", "on": "ring", "to": "B", "emit": "rang"}))
        receipt = await self.engine.handle_message("m", "ring")
        self.assertEqual((receipt.outcome, receipt.seq, lamp.state), ("moved", 1, "B"))
        self.assertEqual(sorted(heard.take()), [
            (event, "RuntimeError('handler')", 1)
            for event in ("component.message.received", "rang", "state.changed")])

    async def test_a_filter_that_fails_never_loses_the_message(self):
        def fail(event, data):
            raise KeyError("filter")

        await self.engine.event_bus.subscribe(
            "component.message.received", "test", print, filter_fn=fail)
        self.engine.create_component(self.LAMP)
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual((receipt.outcome, receipt.to_state), ("moved", "On"))

    async def test_a_handler_cannot_change_what_the_next_one_or_the_component_sees(self):
        seen = []

        def change(data):
            data["message"]["x"].append("changed")

        await self.engine.event_bus.subscribe("component.message.received", "a", change)
        self.engine.create_component(self.machine({"on": "go", "assign": {"x": "$message.x"}}))
        message = {"type": "go", "x": []}
        await self.engine.handle_message("m", message)
        seen.append((message, self.engine.get("m").data))
        self.assertEqual(seen, [({"type": "go", "x": []}, {"x": []})])

    async def test_emitted_events_carry_the_default_payload_or_their_own(self):
        heard = await self.listen("plain", "full")
        self.engine.create_component(self.machine({
            "on": "go", "to": "B", "assign": {"n": 1},
            "emit": ["plain", {"name": "full", "with": {"n": "$data.n"}}]}, data={"n": 0}))
        message = {"type": "go", "id": "x", "correlation_id": "c"}
        await self.engine.handle_message("m", message)
        self.assertEqual(heard.take(), [
            {"component": "m", "message": message, "state": "B", "seq": 1, "correlation_id": "c"},
            {"n": 1}])

    async def test_a_handler_that_sends_elsewhere_gets_an_answer(self):
        outcomes = []

        async def tell(data):
            outcomes.append((await self.engine.handle_message("b", "press")).outcome)

        for name in "ab":
            self.engine.create_component(self.LAMP, name=name)
        await self.engine.event_bus.subscribe(
            "state.changed", "test", tell, filter_fn=lambda event, data: data["component"] == "a")
        await self.engine.handle_message("a", "press")
        self.assertEqual(outcomes, ["moved"])

    async def test_log_records_of_a_message_are_at_debug_and_carry_its_correlation_id(self):
        lines = self.logged()
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", {"type": "press", "correlation_id": "c-1"})
        self.assertEqual([line for line in lines if not line.startswith("DEBUG")], [])

    async def test_code_of_a_message_sees_its_correlation_id_and_the_caller_keeps_its_own(self):
        seen = []

        def look(message, component):
            seen.append(ff.get_correlation_id())

        self.engine.create_component(self.machine({"on": "go", "action": self.code(look)}))
        ff.set_correlation_id("mine")
        await self.engine.handle_message("m", {"type": "go", "correlation_id": "its"})
        await self.engine.handle_message("m", {"type": "go"})
        self.assertEqual((seen, ff.get_correlation_id()), (["its", "mine"], "mine"))


class EngineEventsStored(EngineEvents):
    stored = True


class Registering(EngineCase):
    """Names, and the objects that have them."""

    async def test_a_name_that_another_object_has_is_refused(self):
        first, second = (AsyncComponent("c", [], StateMachine.from_name("InitialState"))
            for _ in range(2))
        self.engine.register(first)
        error = self.raises(StateError, self.engine.register, second)
        self.assertEqual(error.what, "Component 'c' is registered already")
        self.assertIs(self.engine.components["c"], first)

    async def test_create_component_is_get_or_create(self):
        first = self.engine.create_component(self.LAMP, data={"vip": True})
        again = self.engine.create_component(dict(self.LAMP), data={"vip": False})
        other = self.engine.create_component(self.LAMP, name="other")
        self.assertIs(first, again)
        self.assertIs(self.engine.get("lamp"), first)
        self.assertIsNone(self.engine.get("nobody"))
        found = [(one.name, one.state, one.data, one.seq) for one in (first, other)]
        self.assertEqual(found, [("lamp", "Off", {"n": 0, "vip": True}, 0),
            ("other", "Off", {"n": 0}, 0)])

    async def test_components_of_one_config_share_no_data(self):
        config = self.machine({"on": "add", "assign": {"x": {"append": ["$data.x", 1]}}},
            data={"x": []})
        for name in "ab":
            self.engine.create_component(config, name=name)
        await self.engine.handle_message("a", "add")
        data = [self.engine.get(name).data for name in "ab"]
        self.assertEqual(data, [{"x": [1]}, {"x": []}])

    async def test_registering_tells_what_went_wrong_with_that_component_alone(self):
        def fail(message, component):
            raise ValueError("no")

        bad = self.engine.create_component(self.machine(
            states={"A": {"entry": {"action": self.code(fail)}}}, rules=[{"on": "go"}]))
        await self.engine.register_async(self.engine.create_component(self.LAMP))
        with self.assertRaisesRegex(ValueError, "no"):
            await self.engine.register_async(bad)

    async def test_status_shows_a_component_that_is_not_written_yet(self):
        self.engine.create_component(self.LAMP)
        (facts,) = self.engine.status("lamp")
        found = [facts[key] for key in ("name", "state", "seq", "data", "waiting", "dead")]
        self.assertEqual(found, ["lamp", "Off", 0, {"n": 0}, 0, 0])
        del facts["accepts"], facts["queue"]
        self.assertEqual(self.engine.status(), [facts])

    async def test_a_config_may_be_a_path_a_dict_or_a_loaded_config(self):
        path = self.write("lamp.json", self.LAMP)
        loaded = ConfigLoader.load_component_config(path)
        for name, config in (("a", path), ("b", self.LAMP), ("c", loaded)):
            self.engine.create_component(config, name=name)
            await self.engine.handle_message(name, "press")
        found = [(one["name"], one["state"]) for one in self.engine.status()]
        self.assertEqual(found, [("a", "On"), ("b", "On"), ("c", "On")])

    async def test_birth_runs_the_entry_effects_and_initial_children(self):
        entered = []

        def enter(message, component):
            entered.append(component.state)
            component.data["entered"] = True

        states = {
            "A": {"initial": "A.x", "entry": {"assign": {"n": 1}, "action": self.code(enter)}},
            "A.x": {"entry": {"assign": {"m": "$state"}}},
        }  # fmt: skip
        component = self.engine.create_component(self.machine(
            {"on": "go"}, states=states, data={"n": 0}))
        await self.engine.register_async(component)
        self.assertEqual((component.state, component.seq, entered), ("A.x", 0, ["A.x"]))
        self.assertEqual(component.data, {"n": 1, "m": "A.x", "entered": True})

    async def test_components_by_hand_follow_rules_that_execute_and_keep_notes(self):
        rules = [{"when": "a note"}, {"from": "InitialState", "on": "skip", "to": "ErrorHandling"}]
        component = AsyncComponent("c", rules, StateMachine.from_name("InitialState"))
        self.engine.register(component)
        receipts = [await component.handle_message({"type": kind})
            for kind in ("skip", "acknowledge", "start")]
        self.assertEqual([(one.outcome, one.to_state) for one in receipts],
            [("moved", "ErrorHandling"), ("moved", "InitialState"),
             ("moved", "AwaitingConfirmation")])
        self.assertEqual(component.rules, rules)


    async def test_a_component_without_an_engine_handles_what_its_events_send_afterwards(self):
        bus, heard = AsyncEventManager(), []
        component = AsyncComponent("c", event_bus=bus)

        async def undo(data):
            if data["to_state"] == "AwaitingConfirmation":
                heard.append((await component.handle_message({"type": "cancel"})).outcome)

        await bus.subscribe("state.changed", "test", undo)
        receipt = await component.handle_message({"type": "start"})
        self.assertEqual((receipt.to_state, heard, component.state),
            ("AwaitingConfirmation", ["queued"], "InitialState"))

    async def test_a_state_may_be_set_by_hand_as_in_1_0_1(self):
        component = AsyncComponent("c")
        component.state_machine.current_state = ff.ErrorHandling()
        receipt = await component.handle_message({"type": "acknowledge"})
        self.assertEqual((receipt.from_state, receipt.to_state), ("ErrorHandling", "InitialState"))

    async def test_a_component_without_an_engine_sends_to_itself_and_to_nobody_else(self):
        rules = [{"from": "InitialState", "on": "one", "send": {"to": "x", "type": "hello"}}]
        component = AsyncComponent("c", rules, StateMachine.from_name("InitialState"))
        with self.assertRaises(StateError) as caught:
            await component.handle_message({"type": "one"})
        self.assertEqual(caught.exception.fix, "engine.register(it)")
        self.assertEqual(component.seq, 0)

    async def test_a_name_is_text(self):
        for name in ("", None, 5):
            with self.subTest(name=name), self.assertRaises(ff.ArgumentError):
                AsyncComponent(name, [])

    async def test_a_snapshot_brings_back_state_attributes_rules_and_metadata(self):
        class Counter(State):
            def __init__(self):
                self.n = 0

            async def handle_message(self, message, component):
                self.n += 1
                return True, self

        registry = ff.StateRegistry(ff.DEFAULT_REGISTRY)
        registry.register("Waiting", Counter)
        component = AsyncComponent("c", [{"when": "note"}],
            StateMachine.from_name("Waiting", registry))
        for _ in range(5):
            await component.handle_message({"type": "count"})
        ff.save_component(component, self.path("c.json"), {"order": 42})
        restored = ff.restore_component(
            ff.load_snapshot(self.path("c.json")), self.engine, registry)
        found = (restored.state, restored.state_machine.current_state.n, restored.rules)
        self.assertEqual(found, ("Waiting", 5, [{"when": "note"}]))
        self.assertEqual((restored.metadata, self.engine.get("c")), ({"order": 42}, restored))

    async def test_async_with_lets_an_exception_through(self):
        with self.assertRaises(ZeroDivisionError):
            async with self.open() as engine:
                engine.create_component(self.LAMP)
                await engine.handle_message("lamp", "press")
                raise ZeroDivisionError
        self.assertEqual(engine.components["lamp"].state, "On")

    def test_an_engine_outlives_its_loop(self):
        engine = FlexiFlowEngine(self.path() if self.stored else None)
        engine.create_component(self.LAMP)

        async def main():
            await engine.send("lamp", "press")
            await engine.run(until_idle=True)
            return (await engine.handle_message("lamp", "press")).seq

        self.assertEqual([self.run_async(main()), self.run_async(main())], [2, 4])
        self.run_async(engine.close())

    def test_an_engine_that_delivers_outlives_its_loop(self):
        engine = FlexiFlowEngine(self.path() if self.stored else None)
        engine.create_component(self.LAMP)

        async def main():
            engine.start()
            await self.passes(9)
            receipt = await asyncio.wait_for(engine.handle_message("lamp", "press"), 30)
            await engine.wait("lamp", "On", "Off", timeout=30)
            return receipt.seq

        self.assertEqual([self.run_async(main()) for _ in range(3)], [1, 2, 3])
        self.run_async(engine.close())


class RegisteringStored(Registering):
    stored = True

    def test_claims_are_renewed_in_the_next_loop_as_well(self):
        self.patch("LEASE", 0.9)

        async def act(message, component):
            await asyncio.sleep(message["seconds"])

        engine = FlexiFlowEngine(self.path())
        engine.create_component(self.machine({"on": "go", "action": self.code(act)}))

        async def main(seconds, look):
            task = asyncio.ensure_future(engine.handle_message("m", "go", seconds=seconds))
            await asyncio.sleep(look)
            ((lease,),) = engine.store.rows("SELECT lease FROM flexiflow_components")
            held = lease is not None and lease > time.time()
            await task
            return held

        self.assertEqual([self.run_async(main(0, 0.2)), self.run_async(main(1.6, 1.3))],
            [False, True])
        self.run_async(engine.close())


class Restart(StoreCase):
    """A program that is started again finds its components as it left them."""

    async def test_a_component_goes_on_where_it_stopped(self):
        self.engine.create_component(self.LAMP, data={"owner": "Ada"})
        await self.engine.handle_message("lamp", "press")
        await self.reopen()
        lamp = self.engine.create_component(self.LAMP, data={"owner": "Bob"})
        found = (lamp.state, lamp.data, lamp.seq)
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual(found, ("On", {"n": 1, "owner": "Ada"}, 1))
        self.assertEqual((receipt.from_state, receipt.to_state, receipt.seq), ("On", "Off", 2))

    async def test_a_component_is_found_without_its_config(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await self.reopen()
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual((receipt.to_state, self.engine.get("lamp").rules), ("Off",
            self.LAMP["rules"]))

    async def test_a_component_keeps_its_definition_and_says_once_that_the_config_differs(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await self.reopen()
        lines = self.logged()
        other = {**self.LAMP, "rules": self.LAMP["rules"][:1]}
        for _ in range(3):
            lamp = self.engine.create_component(other)
        warnings = [line for line in lines if line.startswith("WARNING")]
        self.assertEqual(len(warnings), 1)
        self.assertIn("'lamp'", warnings[0])
        self.assertEqual(lamp.rules, self.LAMP["rules"])

    async def test_an_equal_config_is_no_reason_for_a_warning(self):
        self.engine.create_component(self.LAMP)
        await self.reopen()
        lines = self.logged()
        text = json.dumps(self.LAMP, indent=4)
        self.engine.create_component(self.write("lamp.json", text))
        self.assertEqual([line for line in lines if line.startswith("WARNING")], [])

    async def test_update_adopts_a_differing_config(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await self.reopen()
        rules = [*self.LAMP["rules"], {"on": "sing"}]
        lamp = self.engine.create_component({**self.LAMP, "rules": rules}, update=True)
        receipt = await self.engine.handle_message("lamp", "sing")
        self.assertEqual((receipt.outcome, lamp.state, lamp.rules), ("stayed", "On", rules))

    async def test_a_config_without_the_current_state_is_not_adopted(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await self.reopen()
        before = self.picture()
        other = self.machine({"from": "A", "on": "go", "to": "B"}, name="lamp")
        with self.assertRaises(FlexiFlowError) as caught:
            self.engine.create_component(other, update=True)
            await self.engine.handle_message("lamp", "go")
        self.assertIn("'On'", str(caught.exception))
        self.assertIn("'lamp'", str(caught.exception))
        self.assertEqual(self.picture(), before)

    async def test_creation_is_turn_zero_of_the_journal(self):
        self.engine.create_component(self.LAMP, data={"vip": True})
        await self.engine.handle_message("lamp", "press", id="p")
        keys = ("component", "seq", "outcome", "to_state", "data", "time")
        rows = [tuple(row[key] for key in keys) for row in self.engine.history("lamp")]
        self.assertEqual(rows, [
            ("lamp", 1, "moved", "On", {"n": 1, "vip": True}, self.clock.now),
            ("lamp", 0, "created", "Off", {"n": 0, "vip": True}, self.clock.now)])

    async def test_creation_is_written_by_whichever_call_comes_first(self):
        async def register_async():
            await self.engine.register_async(self.engine.get("lamp"))

        async def message():
            await self.engine.handle_message("lamp", "press")

        calls = {
            "message": message, "register_async": register_async,
            "run": lambda: self.engine.run(until_idle=True), "close": lambda: self.engine.close(),
        }  # fmt: skip
        for name, call in calls.items():
            with self.subTest(name):
                self.engine.create_component(self.LAMP)
                written = os.path.exists(self.path()) and self.rows(
                    "SELECT COUNT(*) FROM flexiflow_components")[0][0]
                await call()
                after = self.rows("SELECT COUNT(*) FROM flexiflow_components")
                self.assertEqual((written or 0, after), (0, [(1,)]))
                await self.engine.close()
                for end in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.path() + end)
                self.engine = self.open()

    async def test_attributes_of_a_class_based_state_are_kept(self):
        class Counting(State):
            def __init__(self):
                self.n = 0

            async def handle_message(self, message, component):
                self.n += 1
                return True, self

        config = self.machine(states={"Waiting": self.code(Counting)})
        self.engine.create_component(config)
        for _ in range(5):
            await self.engine.handle_message("m", "count")
        await self.reopen()
        component = self.engine.create_component(config)
        found = (component.state, component.state_machine.current_state.n)
        await self.engine.handle_message("m", "count")
        self.assertEqual(found, ("Waiting", 5))
        self.assertEqual(component.state_machine.current_state.n, 6)

    async def test_a_component_by_hand_takes_the_stored_state(self):
        def by_hand():
            return AsyncComponent("c", [], StateMachine.from_name("InitialState"))

        await self.engine.register_async(by_hand())
        await self.engine.handle_message("c", "start")
        await self.reopen()
        component = by_hand()
        self.engine.register(component)
        receipt = await self.engine.handle_message("c", "confirm", content="confirmed")
        self.assertEqual((receipt.from_state, receipt.to_state, receipt.seq),
            ("AwaitingConfirmation", "ProcessingRequest", 2))
        self.assertIs(self.engine.get("c"), component)

    async def test_restoring_runs_no_entry_action(self):
        entered = []

        def enter(message, component):
            entered.append(message["type"])

        states = {"A": {}, "B": {"entry": {"action": self.code(enter)}}}
        config = self.machine({"on": "go", "to": "B"}, states=states)
        self.engine.create_component(config)
        await self.engine.handle_message("m", "go")
        await self.reopen()
        self.engine.create_component(config)
        await self.engine.run(until_idle=True)
        self.assertEqual(entered, ["go"])

    async def test_a_definition_is_stored_once_for_all_its_components(self):
        for name in "abc":
            self.engine.create_component(self.LAMP, name=name, data={"name": name})
        self.engine.create_component(self.COUNTER)
        await self.engine.run(until_idle=True)
        self.assertEqual(self.rows("SELECT COUNT(*) FROM flexiflow_definitions"), [(2,)])

    async def test_a_correlation_id_is_kept_in_the_journal(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", {"type": "press", "correlation_id": "c-9"})
        self.assertEqual(self.engine.history("lamp", limit=1)[0]["correlation_id"], "c-9")


    async def test_a_store_gives_the_answers_of_memory_whenever_it_is_closed(self):
        config = self.machine(
            {"from": "A", "on": "go", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}},
             "send": {"to": "$component", "type": "note"}},
            {"from": "B.x", "on": "go", "to": "B.y"}, {"from": "B", "on": "back", "to": "A"},
            {"from": "B", "after": 30, "to": "A", "send": {"to": "m", "type": "late", "after": 5}},
            {"on": "late", "guard": {"data.n": {">": 2}}, "assign": {"late": "$now"}},
            {"on": "note", "assign": {"notes": {"append": ["$data.notes", "$state"]}}},
            states={"A": {}, "B": {"initial": "B.x"}, "B.x": {}, "B.y": {}},
            data={"n": 0, "notes": []},
        )  # fmt: skip
        memory = FlexiFlowEngine(clock=self.clock)
        self.addAsyncCleanup(memory.close)
        memory.create_component(config)
        chance = random.Random(11)
        for step in range(120):
            if chance.random() < 0.1:
                await self.reopen()
            await self.engine.register_async(self.engine.create_component(config))
            kind, answers = chance.choice(["go", "back", "late", "note"]), []
            self.clock.now += chance.randrange(20)
            for engine in (memory, self.engine):
                await engine.run(until_idle=True)
                receipt = await engine.handle_message("m", kind, id=f"s{step}")
                (facts,) = engine.status()
                timers = [(one["message"], one["due"]) for one in facts["timers"]]
                answers.append((receipt.as_dict(), {**facts, "timers": timers}))
            self.assertEqual(answers[1], answers[0])
        self.assertGreater(self.engine.get("m").data["n"], 10)


class Timers(EngineCase):
    """`after` rules: due once, never early, as long as their state is active."""

    OVEN = {
        "name": "oven", "initial_state": "Cold", "data": {"rings": 0},
        "states": {"Cold": {}, "Hot": {}, "Burnt": {}},
        "rules": [
            {"from": "Cold", "on": "heat", "to": "Hot"},
            {"from": "Hot", "on": "heat", "to": "Hot"},
            {"from": "Hot", "on": "turn"},
            {"from": "Hot", "on": "open", "to": "Cold"},
            {"from": "Hot", "after": "10m", "to": "Burnt",
             "assign": {"rings": {"+": ["$data.rings", 1]}}},
        ],
    }  # fmt: skip

    async def later(self, seconds):
        """Move the clock, deliver what is due, and return the component's state and seq."""
        self.clock.now += seconds
        await self.engine.run(until_idle=True)
        facts = self.engine.status()[0]
        return facts["state"], facts["seq"]

    async def hot(self, **settings):
        self.engine.create_component({**self.OVEN, **settings})
        await self.engine.handle_message("oven", "heat")

    async def test_a_timer_fires_once_and_never_early(self):
        await self.hot()
        found = [await self.later(seconds) for seconds in (0, 599, 1, 0, 3600)]
        self.assertEqual(found, [("Hot", 1), ("Hot", 1), ("Burnt", 2), ("Burnt", 2), ("Burnt", 2)])
        self.assertEqual(self.engine.get("oven").data, {"rings": 1})

    async def test_a_timer_is_shown_with_its_due_time(self):
        await self.hot()
        timers = self.engine.status("oven")[0]["timers"]
        self.assertEqual([timer["due"] for timer in timers], [self.clock.now + 600])

    async def test_leaving_the_state_removes_its_timer(self):
        await self.hot()
        await self.engine.handle_message("oven", "open")
        timers = self.engine.status("oven")[0]["timers"]
        self.assertEqual((timers, await self.later(3600)), ([], ("Cold", 2)))

    async def test_entering_the_state_again_starts_its_timer_again(self):
        await self.hot()
        self.clock.now += 500
        await self.engine.handle_message("oven", "heat")
        self.assertEqual([await self.later(599), await self.later(1)], [("Hot", 2), ("Burnt", 3)])

    async def test_a_rule_without_to_lets_the_timer_run_on(self):
        await self.hot()
        self.clock.now += 500
        await self.engine.handle_message("oven", "turn")
        self.assertEqual([await self.later(99), await self.later(1)], [("Hot", 2), ("Burnt", 3)])

    async def test_a_timer_whose_guard_is_false_is_used_up(self):
        rules = [*self.OVEN["rules"][:4],
            {"from": "Hot", "after": 60, "guard": {"data.rings": 5}, "to": "Burnt"}]
        await self.hot(rules=rules)
        state, _ = await self.later(60)
        self.assertEqual((state, self.engine.status("oven")[0]["timers"]), ("Hot", []))
        self.assertEqual((await self.later(3600))[0], "Hot")

    async def test_a_delay_may_come_from_the_data(self):
        rules = [{"from": "Cold", "on": "heat", "to": "Hot", "assign": {"wait": "$message.wait"}},
            {"from": "Hot", "after": "$data.wait", "to": "Burnt"}]
        self.engine.create_component({**self.OVEN, "rules": rules})
        await self.engine.handle_message("oven", "heat", wait="2m")
        self.assertEqual([await self.later(119), await self.later(1)], [("Hot", 1), ("Burnt", 2)])

    async def test_a_timer_of_the_first_state_starts_with_the_component(self):
        rules = [{"from": "Cold", "after": 30, "to": "Hot"}]
        self.engine.create_component({**self.OVEN, "rules": rules})
        self.assertEqual([await self.later(0), await self.later(29), await self.later(1)],
            [("Cold", 0), ("Cold", 0), ("Hot", 1)])

    async def test_a_timer_on_a_parent_runs_while_its_children_change(self):
        states = {"P": {"initial": "P.a"}, "P.a": {}, "P.b": {}, "End": {}}
        self.engine.create_component(self.machine(
            {"from": "P", "after": 60, "to": "End"}, {"from": "P.a", "on": "go", "to": "P.b"},
            {"from": "P.a", "after": 10, "to": "End"}, states=states,
        ))  # fmt: skip
        await self.engine.handle_message("m", "go")
        self.assertEqual([await self.later(59), await self.later(1)], [("P.b", 1), ("End", 2)])

    async def test_a_timer_that_died_is_over_when_its_state_has_been_left(self):
        rules = [*self.OVEN["rules"][:4], {"from": "Hot", "after": 600, "to": "Burnt",
            "assign": {"rings": {"+": ["$data.rings", "$data.step"]}}},
            {"on": "mend", "assign": {"step": 1}}]
        await self.hot(rules=rules, retry={"max_attempts": 1})
        await self.later(600)
        (letter,) = self.engine.dead_letters()
        for kind in ("mend", "open", "heat"):
            await self.engine.handle_message("oven", kind)
        self.clock.now += 60
        self.assertEqual([one["number"] for one in await self.engine.redrive()],
            [letter["number"]])
        self.assertEqual([await self.later(0), await self.later(539), await self.later(1)],
            [("Hot", 5), ("Hot", 5), ("Burnt", 6)])
        self.assertEqual([step["reason"] for step in self.engine.history("oven", limit=2)]
            if self.stored else [None, "the timer of Hot is over"],
            [None, "the timer of Hot is over"])
        if self.stored:
            self.assertEqual(self.engine.replay("oven")[0]["differences"], [])

    async def test_timers_fire_in_the_order_in_which_they_are_due(self):
        heard = await self.listen("state.changed", keys=("component",))
        for name, seconds in (("c", 30), ("a", 10), ("b", 20)):
            rules = [{"from": "Cold", "after": seconds, "to": "Hot"}]
            self.engine.create_component({**self.OVEN, "rules": rules}, name=name)
        await self.later(3600)
        self.assertEqual(heard.take(), [("a",), ("b",), ("c",)])

    async def test_a_completed_component_has_no_timers(self):
        rules = [{"on": "stop", "to": "Burnt"}, {"after": 60, "to": "Hot"}]
        states = {**self.OVEN["states"], "Burnt": {"final": True}}
        self.engine.create_component({**self.OVEN, "states": states, "rules": rules})
        await self.engine.handle_message("oven", "stop")
        timers = self.engine.status("oven")[0]["timers"]
        self.assertEqual((timers, await self.later(60)), ([], ("Burnt", 1)))

    async def test_async_with_fires_timers_by_itself(self):
        changed = asyncio.Event()
        async with FlexiFlowEngine(self.path() if self.stored else None) as engine:
            rules = [*self.OVEN["rules"][:4], {"from": "Hot", "after": 0.01, "to": "Burnt"}]
            oven = engine.create_component({**self.OVEN, "rules": rules})
            await engine.event_bus.subscribe("state.changed", "test", lambda data:
                data["to_state"] == "Burnt" and changed.set())
            await engine.handle_message("oven", "heat")
            await asyncio.wait_for(changed.wait(), 30)
            self.assertEqual((oven.state, oven.seq), ("Burnt", 2))


class TimersStored(Timers):
    stored = True

    async def test_an_overdue_timer_fires_once_after_a_restart(self):
        await self.hot()
        await self.engine.close()
        self.clock.now += 86400
        self.engine = self.open()
        self.assertEqual([await self.later(0), await self.later(0)], [("Burnt", 2), ("Burnt", 2)])

    async def test_a_timer_keeps_its_due_time_over_a_restart(self):
        await self.hot()
        self.clock.now += 300
        await self.reopen()
        self.assertEqual([await self.later(299), await self.later(1)], [("Hot", 1), ("Burnt", 2)])

    async def test_whoever_opens_the_file_first_fires_it_and_nobody_again(self):
        await self.hot()
        self.clock.now += 600
        engines = [self.engine, self.open()]
        await asyncio.gather(*[engine.run(until_idle=True) for engine in engines])
        self.assertEqual(await self.later(0), ("Burnt", 2))


class Queue(EngineCase):
    """Messages that are sent: durable, in order, tried again, and given up in the end."""

    def flaky(self, failures, **settings):
        """Return a config whose action fails so many times, and logs when it ran."""
        self.ran = []

        def act(message, component):
            self.ran.append((message.get("n"), self.clock.now))
            if message["type"] == "go" and len(self.ran) <= failures:
                raise RuntimeError("not yet")

        return self.machine({"on": ["go", "other"], "action": self.code(act)}, **settings)

    async def deliver(self, seconds=0):
        self.clock.now += seconds
        await self.engine.run(until_idle=True)

    def facts(self, name="m"):
        facts = self.engine.status(name)[0]
        return facts["seq"], facts["waiting"], facts["dead"]

    async def test_run_until_idle_delivers_what_was_sent(self):
        await self.engine.register_async(self.engine.create_component(self.LAMP))
        answer = await self.engine.send("lamp", "press", id="x")
        before = self.facts("lamp")
        delivered = await self.engine.run(until_idle=True)
        self.assertEqual(answer.as_dict(), {
            "outcome": "queued", "component": "lamp", "id": "x", "from_state": None,
            "to_state": None, "seq": None, "reason": None, "data": None, "duplicate": False})
        self.assertEqual((bool(answer), before, delivered, self.facts("lamp")),
            (False, (0, 1, 0), 1, (1, 0, 0)))

    async def test_async_with_delivers_what_was_sent(self):
        done = asyncio.Event()
        async with FlexiFlowEngine(self.path() if self.stored else None) as engine:
            lamp = engine.create_component(self.LAMP)
            await engine.event_bus.subscribe("state.changed", "test", lambda data: done.set())
            await engine.send("lamp", "press")
            await asyncio.wait_for(done.wait(), 30)
        self.assertEqual((lamp.state, lamp.seq), ("On", 1))

    async def test_an_error_that_has_a_receipt_of_its_own_is_tried_again(self):
        class BankError(Exception):
            receipt = "r-17"

        def act(message, component):
            calls.append(message["type"])
            if len(calls) == 1:
                raise BankError

        calls = []
        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.send("m", "go")
        await self.deliver()
        await self.deliver(60)
        self.assertEqual((calls, self.facts()), (["go", "go"], (1, 0, 0)))

    async def test_messages_of_a_component_are_delivered_in_order(self):
        self.engine.create_component(self.flaky(0))
        for n in range(20):
            await self.engine.send("m", "go", n=n)
        await self.deliver()
        self.assertEqual([n for n, _ in self.ran], list(range(20)))

    async def test_a_delayed_message_comes_when_it_is_due(self):
        self.engine.create_component(self.flaky(0))
        start = self.clock.now
        await self.engine.send("m", "go", n=1, delay="2m")
        await self.engine.send("m", "go", n=2, delay=60)
        await self.engine.send("m", "go", n=3)
        for seconds in (0, 59, 1, 59, 1):
            await self.deliver(seconds)
        self.assertEqual(self.ran, [(3, start), (2, start + 60), (1, start + 120)])

    async def test_messages_that_came_due_meanwhile_run_in_due_order(self):
        self.engine.create_component(self.flaky(0))
        for n in (3, 1, 2):
            await self.engine.send("m", "go", n=n, delay=n)
        await self.deliver(3600)
        self.assertEqual([n for n, _ in self.ran], [1, 2, 3])

    async def test_what_a_turn_sends_leaves_with_its_commit(self):
        async def act(message, component):
            await self.engine.send("lamp", "press", id="one")
            waiting.append(self.engine.status("lamp")[0]["waiting"])
            if message["type"] == "fail":
                raise RuntimeError("no")

        waiting = []
        for config in (self.LAMP, self.machine({"on": ["go", "fail"], "action": self.code(act)})):
            self.engine.create_component(config)
        await self.engine.run(until_idle=True)
        with self.assertRaises(RuntimeError):
            await self.engine.handle_message("m", "fail")
        await self.deliver()
        waiting.append(self.facts("lamp"))
        await self.engine.handle_message("m", "go")
        waiting.append(self.facts("lamp"))
        await self.deliver()
        self.assertEqual(waiting, [0, (0, 0, 0), 0, (0, 1, 0)])
        self.assertEqual(self.facts("lamp"), (1, 0, 0))

    async def test_a_rule_sends_its_payload_after_its_delay(self):
        self.engine.create_component(self.flaky(0))
        self.engine.create_component(self.machine({"on": "start", "assign": {"n": 5}, "send": {
            "to": "m", "type": "go", "after": "1m", "with": {"n": "$data.n"}}}, name="sender"))
        await self.engine.handle_message("sender", "start")
        start = self.clock.now
        for seconds in (59, 1):
            await self.deliver(seconds)
        self.assertEqual(self.ran, [(5, start + 60)])

    async def test_a_failing_message_is_tried_again_with_back_off_and_then_dead(self):
        dead = await self.listen("message.dead", keys=("component", "id", "message", "error"))
        retry = {"max_attempts": 4, "base_delay": 10, "max_delay": 30, "backoff": 2}
        self.engine.create_component(self.flaky(9, retry=retry))
        start = self.clock.now
        await self.engine.send("m", "go", id="x", n=1)
        for _ in range(100):
            await self.deliver(1)
        self.assertEqual([at - start for _, at in self.ran], [1, 11, 31, 61])
        self.assertEqual(self.facts(), (0, 0, 1))
        self.assertEqual(dead.take(), [("m", "x", {"type": "go", "n": 1}, "not yet")])

    async def test_without_retry_in_the_config_there_are_five_attempts(self):
        self.engine.create_component(self.flaky(9))
        await self.engine.send("m", "go")
        for _ in range(10):
            await self.deliver(60)
        self.assertEqual((len(self.ran), self.facts()), (5, (0, 0, 1)))

    async def test_a_message_that_succeeds_at_last_is_handled_once(self):
        self.engine.create_component(self.flaky(2))
        await self.engine.send("m", "go", id="x")
        for _ in range(10):
            await self.deliver(60)
        self.assertEqual((len(self.ran), self.facts()), (3, (1, 0, 0)))

    async def test_a_failing_message_does_not_stop_others(self):
        self.engine.create_component(self.flaky(99))
        for kind, n in (("go", 1), ("other", 2), ("go", 3), ("other", 4)):
            await self.engine.send("m", kind, n=n)
        await self.deliver()
        self.assertEqual(([n for n, _ in self.ran], self.facts()), ([1, 2, 3, 4], (2, 2, 0)))

    async def test_code_that_ends_in_cancelled_error_is_a_failed_attempt(self):
        ran = []

        async def give_up(message, component):
            ran.append(message["type"])
            raise asyncio.CancelledError

        retry = {"max_attempts": 2, "base_delay": 1}
        self.engine.create_component(
            self.machine({"on": "go", "action": self.code(give_up)}, retry=retry))
        self.engine.create_component(self.LAMP)
        await self.engine.send("m", "go")
        await self.engine.send("lamp", "press")
        for _ in range(5):
            await asyncio.wait([asyncio.ensure_future(self.deliver(10))])
        self.assertEqual((ran, self.facts(), self.facts("lamp")),
            (["go", "go"], (0, 0, 1), (1, 0, 0)))

    async def test_a_worker_that_is_cancelled_gives_the_attempt_back(self):
        begun, ran = asyncio.Event(), []

        async def act(message, component):
            ran.append(message["type"])
            if len(ran) == 1:
                begun.set()
                await asyncio.Event().wait()

        retry = {"max_attempts": 1}
        self.engine.create_component(
            self.machine({"on": "go", "action": self.code(act)}, retry=retry))
        await self.engine.send("m", "go")
        worker = asyncio.ensure_future(self.deliver())
        await begun.wait()
        worker.cancel()
        await asyncio.wait([worker])
        await self.deliver()
        self.assertEqual((worker.cancelled(), ran, self.facts()), (True, ["go"] * 2, (1, 0, 0)))

    async def test_a_component_that_cannot_be_born_does_not_stop_others(self):
        fail = [True]

        def enter(message, component):
            if fail:
                raise RuntimeError("birth")

        states = {"A": {"entry": {"action": self.code(enter), "assign": {"born": True}}}}
        bad = self.engine.create_component(self.machine({"on": "go"}, states=states))
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press")
        with contextlib.suppress(RuntimeError):
            await self.deliver()
        found = self.engine.get("lamp").state
        fail.clear()
        receipt = await self.engine.handle_message("m", "go")
        self.assertEqual((found, receipt.seq, bad.data), ("On", 1, {"born": True}))

    async def test_an_unknown_message_to_a_component_with_code_is_one_attempt(self):
        self.engine.create_component(self.flaky(0))
        await self.engine.send("m", "nonsense")
        await self.deliver()
        await self.engine.send("m", "nonsense")
        await self.engine.redrive(1)
        await self.deliver()
        self.assertEqual([one["attempts"] for one in self.engine.dead_letters("m")], [1, 1])

    async def test_an_unknown_message_is_dead_at_once(self):
        dead = await self.listen("message.dead", keys=("component", "message"))
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "nonsense")
        await self.deliver()
        self.assertEqual((dead.take(), self.facts("lamp")),
            ([("lamp", {"type": "nonsense"})], (0, 0, 1)))

    async def test_a_message_to_a_component_that_is_not_there_waits_for_it(self):
        await self.engine.send("m", "go", n=1)
        await self.deliver()
        await self.deliver(3000)
        self.engine.create_component(self.flaky(0))
        await self.deliver(120)
        self.assertEqual(([n for n, _ in self.ran], self.facts()), ([1], (1, 0, 0)))

    async def test_a_message_to_nobody_is_dead_after_an_hour(self):
        dead = await self.listen("message.dead", keys=("component",))
        await self.engine.send("m", "go")
        for _ in range(58):
            await self.deliver(60)
        before = dead.take()
        for _ in range(5):
            await self.deliver(60)
        self.assertEqual((before, dead.take()), ([], [("m",)]))

    async def test_a_message_is_judged_when_it_runs(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", delay=10)
        await self.engine.handle_message("lamp", "drop")
        await self.deliver(10)
        self.assertEqual(self.facts("lamp"), (2, 0, 0))

    async def test_a_correlation_id_travels_with_what_is_sent(self):
        heard = await self.listen("state.changed", keys=("component", "correlation_id"))
        self.engine.create_component(self.LAMP)
        self.engine.create_component(
            self.machine({"on": "go", "to": "B", "send": {"to": "lamp", "type": "press"}}))
        await self.engine.handle_message("m", {"type": "go", "correlation_id": "c-7"})
        await self.deliver()
        self.assertEqual(heard.take(), [("m", "c-7"), ("lamp", "c-7")])

    async def test_what_is_no_delay_or_message_is_refused(self):
        for delay in (-1, "soon", float("nan"), None, True):
            with self.subTest(delay=delay), self.assertRaises(FlexiFlowError):
                await self.engine.send("m", "go", delay=delay)
        with self.assertRaises(PersistenceError):
            await self.engine.send("m", "go", what=object())

    async def test_two_workers_deliver_a_message_once(self):
        self.engine.create_component(self.flaky(0))
        for n in range(6):
            await self.engine.send("m", "go", n=n)
        await asyncio.gather(self.deliver(), self.deliver())
        self.assertEqual(([n for n, _ in self.ran], self.facts()), (list(range(6)), (6, 0, 0)))

    async def test_own_messages_are_handled_once_beside_a_worker(self):
        begun, go, ran = asyncio.Event(), asyncio.Event(), []

        async def act(message, component):
            ran.append(message["type"])
            begun.set()
            await go.wait()

        self.engine.create_component(self.machine(
            {"on": "go", "send": {"to": "m", "type": "own"}},
            {"on": "own", "action": self.code(act)},
        ))  # fmt: skip
        caller = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        worker = asyncio.ensure_future(self.deliver())
        await self.passes()
        go.set()
        await asyncio.gather(caller, worker)
        self.assertEqual((ran, self.facts()), (["own"], (2, 0, 0)))

    async def test_ten_components_are_delivered_at_once(self):
        together, most = [0], [0]

        async def act(message, component):
            together[0] += 1
            most[0] = max(most[0], together[0])
            await self.passes(5)
            together[0] -= 1

        config = self.machine({"on": "go", "action": self.code(act)})
        for n in range(10):
            self.engine.create_component(config, name=f"m{n}")
            await self.engine.send(f"m{n}", "go")
        await self.deliver()
        self.assertEqual((most[0], [one["seq"] for one in self.engine.status()]), (10, [1] * 10))


class QueueStored(Queue):
    stored = True

    async def test_a_component_made_elsewhere_while_its_message_is_put_off_gets_it(self):
        other, failed = self.open(), self.engine._failed

        async def later(*failure):
            await other.register_async(other.create_component(self.LAMP))
            await failed(*failure)

        await self.engine.send("lamp", "press")
        with unittest.mock.patch.object(self.engine, "_failed", later):
            await self.deliver()
        self.assertEqual((self.facts("lamp"), self.engine.dead_letters()), ((1, 0, 0), []))

    async def test_a_long_queue_of_one_is_not_looked_through_for_each_of_its_messages(self):
        self.engine.create_component(self.LAMP)
        for number in range(60):
            await self.engine.send("lamp", "press", id=str(number))
        placed, looks = ff._Delivery._placed, []

        def slowly(delivery, besides):
            looks.append(time.sleep(0.01))
            return placed(delivery, besides)

        with unittest.mock.patch.object(ff._Delivery, "_placed", slowly):
            self.assertEqual(await self.engine.run(until_idle=True), 60)
        self.assertLess(len(looks), 30)

    async def beside(self, slow, begun, *messages):
        """Return a run in which a lamp was pressed while what has begun in a slow one goes on."""
        for config in (slow, self.LAMP):
            self.engine.create_component(config)
        for name, kind in (*messages, ("lamp", "press")):
            await self.engine.send(name, kind)
        work = asyncio.ensure_future(self.engine.run(until_idle=True))
        await begun.wait()
        while self.engine.get("lamp").state == "Off":
            await asyncio.sleep(0.001)
        return work

    async def test_a_slow_first_entry_holds_up_no_other_component(self):
        path, begun, go = self.waiting()
        states = {"A": {"entry": {"action": path}}, "B": {}}
        slow = self.machine({"on": "go", "to": "B"}, name="slow", states=states)
        work = await self.beside(slow, begun, ("slow", "go"))
        held = self.engine.get("slow").state, work.done()
        go.set()
        self.assertEqual((held, await work, self.engine.get("slow").state), (("A", False), 2, "B"))

    async def test_what_a_first_entry_sends_to_itself_holds_up_no_other_component(self):
        path, begun, go = self.waiting()
        states = {"A": {"entry": {"send": {"to": "slow", "type": "go"}}}}
        slow = self.machine({"on": "go", "action": path}, name="slow", states=states)
        work = await self.beside(slow, begun)
        held = work.done()
        go.set()
        await work
        self.assertEqual((held, self.engine.status("slow")[0]["waiting"]), (False, 0))

    def unmade(self):
        """Plan a component that can never be made: what it sends has the id of another message."""
        states = {"S": {"entry": {"send": {"to": "nobody", "type": "hi", "id": "k",
            "with": {"who": "$component"}}}}}
        return self.engine.create_component(self.machine(name="second", states=states))

    async def test_what_cannot_be_made_is_said_once_by_a_run(self):
        await self.engine.send("nobody", "hi", id="k")
        self.unmade()
        with self.assertLogs("flexiflow", logging.ERROR) as logs:
            await self.engine.run(until_idle=True)
        lines = [line for line in logs.output if "could not be made" in line]
        self.assertEqual(len(lines), 1, lines)

    async def test_a_run_that_begins_while_its_engine_is_closed_ends_also_where_a_birth_fails(self):
        await self.engine.send("nobody", "hi", id="k")
        self.unmade()
        work = asyncio.ensure_future(self.engine.run())
        with self.assertLogs("flexiflow", logging.ERROR):
            await self.engine.close()
            self.assertEqual(await asyncio.wait_for(work, 30), 0)

    async def test_a_run_until_idle_beside_delivery_makes_what_is_new(self):
        path, begun, go = self.waiting()
        async with self.open() as engine:
            engine.create_component(self.machine(name="slow", states={
                "A": {"entry": {"action": path}}}))
            run = asyncio.ensure_future(engine.run(until_idle=True))
            await begun.wait()
            await self.passes()
            early = run.done()
            go.set()
            await run
            self.assertEqual((early, engine.status("slow")[0]["seq"],
                engine.store.head("slow") is None), (False, 0, False))

    async def test_a_run_that_is_told_to_stop_begins_no_first_entry(self):
        path, begun, go = self.waiting()
        go.set()
        states = {"A": {"entry": {"action": path}}}
        self.engine.create_component(self.machine(name="slow", states=states))
        work = asyncio.ensure_future(self.engine.run())
        self.engine._stop()
        self.assertEqual((await asyncio.wait_for(work, 30), begun.is_set()), (0, False))

    async def test_a_run_that_has_not_begun_when_its_engine_is_closed_ends(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        work = asyncio.ensure_future(self.engine.run())
        await self.engine.close()
        self.assertEqual(await asyncio.wait_for(work, 30), 0)

    async def test_code_that_raises_what_is_no_exception_fails_like_all_others(self):
        class Odd(BaseException):
            pass

        def act(message, component):
            raise Odd("no")

        async def hear(data):
            raise Odd("heard")

        rule = {"on": "odd", "action": self.code(act)}
        self.engine.create_component(self.machine(rule, {"on": "go"}, retry={"max_attempts": 1}))
        self.engine.create_component(self.LAMP)
        for delivery in ("sequential", "concurrent"):
            await self.engine.event_bus.subscribe("x", "test", hear)
            await self.engine.event_bus.publish("x", {}, delivery=delivery)
        for name, kind in (("m", "odd"), ("m", "go"), ("lamp", "press")):
            await self.engine.send(name, kind)
        self.assertEqual(await asyncio.wait_for(self.engine.run(until_idle=True), 30), 2)
        (letter,) = self.engine.dead_letters()
        self.assertEqual((letter["error"].splitlines()[0][:7], self.engine.get("m").seq,
            self.engine._claimed), ("Odd: no", 1, {}))

    async def test_code_that_asks_for_a_component_that_is_not_there_fails_and_is_given_up(self):
        async def act(message, component):
            await self.engine.handle_message("nobody", "hello")

        self.engine.create_component(
            self.machine({"on": "go", "action": self.code(act)}, retry={"max_attempts": 1}))
        await self.engine.send("m", "go")
        await asyncio.wait_for(self.deliver(), 30)
        (letter,) = self.engine.dead_letters("m")
        self.assertEqual((letter["attempts"], letter["error"].splitlines()[0]),
            (1, "NotThere: Unknown component: 'nobody'"))

    async def test_an_entry_that_raises_what_is_no_exception_stops_no_delivery(self):
        class Odd(BaseException):
            pass

        def act(message, component):
            raise Odd("no")

        self.engine.create_component(
            self.machine(states={"A": {"entry": {"action": self.code(act)}}}))
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press")
        await asyncio.wait_for(self.deliver(), 30)
        self.assertEqual(self.facts("lamp"), (1, 0, 0))

    async def test_configs_that_are_never_used_again_are_not_kept(self):
        for number in range(1100):
            self.engine.create_component({**self.LAMP, "name": f"lamp-{number}"})
        self.assertEqual(len(self.engine._configs), 99)

    async def test_after_it_was_closed_an_engine_delivers_until_it_is_closed_again(self):
        self.engine.create_component(self.LAMP)
        await self.engine.close()
        work = asyncio.ensure_future(self.engine.run())
        await self.engine.send("lamp", "press")
        await self.engine.wait("lamp", "On", timeout=30)
        await self.engine.close()
        self.assertEqual(await work, 1)

    async def test_an_engine_is_not_closed_from_within_its_own_turn(self):
        async def act(message, component):
            async with FlexiFlowEngine() as another:
                another.create_component(self.LAMP)
            await self.engine.close()

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.send("m", "go")
        await asyncio.wait_for(self.deliver(), 30)
        (waiting,) = self.engine.status("m")[0]["queue"]
        self.assertEqual(waiting["error"].splitlines(),
            ["StateError: Closing from within a turn", "Fix: let the turn end first"])

    async def test_what_was_sent_survives_a_restart(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press")
        await self.reopen()
        await self.deliver()
        self.assertEqual(self.facts("lamp"), (1, 0, 0))

    async def test_code_that_exits_is_a_failed_attempt(self):
        child = self.start("""
            import asyncio, logging, sys, types
            from flexiflow import FlexiFlowEngine
            logging.getLogger("flexiflow").addHandler(logging.NullHandler())
            code = sys.modules["code"] = types.ModuleType("code")
            code.leave = lambda message, component: sys.exit(7)
            config = {"name": "m", "initial_state": "A", "states": {"A": {}},
                "rules": [{"on": "go", "action": "code:leave"}, {"on": "next"}]}
            async def main():
                engine = FlexiFlowEngine("flow.db")
                engine.create_component(config)
                await engine.send("m", "go")
                await engine.send("m", "next")
                await engine.run(until_idle=True)
                (facts,) = engine.status()
                print(facts["seq"], facts["waiting"], facts["dead"])
            asyncio.run(main())
            """)
        output, _ = child.communicate(timeout=60)
        self.assertEqual((output, child.returncode), ("1 1 0\n", 0))

    async def test_two_engines_deliver_a_message_once(self):
        self.engine.create_component(self.COUNTER)
        for _ in range(10):
            await self.engine.send("counter", "add", by=1)
        engines = [self.engine, self.open()]
        await asyncio.gather(*[engine.run(until_idle=True) for engine in engines])
        self.assertEqual(self.engine.status("counter")[0]["data"], {"n": 10})
        self.assertEqual(self.facts("counter"), (10, 0, 0))


class ChangedRules(EngineCase):
    """update_rules: checked completely, then swapped between two messages."""

    async def test_rules_are_appended_and_take_effect_with_the_next_message(self):
        lamp = self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        rule = {"from": "On", "on": "flash", "to": "Broken"}
        rules = await self.engine.update_rules("lamp", [rule])
        receipt = await self.engine.handle_message("lamp", "flash")
        self.assertEqual((rules, lamp.rules), ([*self.LAMP["rules"], rule],) * 2)
        self.assertEqual((receipt.outcome, receipt.from_state), ("moved", "On"))

    async def test_an_equal_rule_is_skipped(self):
        lamp = self.engine.create_component(self.LAMP)
        rule = {"from": "On", "on": "flash", "to": "Broken"}
        for _ in range(2):
            await lamp.update_rules([rule, dict(rule)])
        await lamp.add_rule(rule)
        self.assertEqual(lamp.rules, [*self.LAMP["rules"], rule])

    async def test_true_is_no_one_in_a_rule(self):
        lamp = self.engine.create_component(self.LAMP)
        rules = [{"from": "On", "on": "dim", "guard": {"level": level}} for level in (1, True, 1.0)]
        await lamp.update_rules(rules)
        self.assertEqual(repr(lamp.rules), repr([*self.LAMP["rules"], *rules[:2]]))

    async def test_a_shadowed_rule_is_refused_with_a_fix(self):
        lamp = self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        before = self.picture()
        with self.assertRaises(ConfigError) as caught:
            await lamp.update_rules([{"from": "Off", "on": "press", "to": "Broken"}])
        self.assertIn("replace=True", caught.exception.fix)
        self.assertIn("--replace", caught.exception.fix)
        self.assertEqual((lamp.rules, self.picture()), (self.LAMP["rules"], before))

    async def test_replace_swaps_all_rules(self):
        lamp = self.engine.create_component(self.LAMP)
        rules = [{"from": "Off", "on": "press", "to": "Broken"}]
        answer = await self.engine.update_rules("lamp", rules, replace=True)
        receipt = await self.engine.handle_message("lamp", "press")
        self.assertEqual((answer, lamp.rules, receipt.to_state), (rules, rules, "Broken"))

    async def test_bad_rules_change_nothing(self):
        lamp = self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        before = self.picture()
        table = {
            "an unknown state": [{"on": "x", "to": "Nowhere"}],
            "an unknown operator": [{"on": "x", "guard": {"n": {"~": 1}}}],
            "on and after": [{"on": "x", "after": 1}],
            "no object": ["rule"],
            "no list": {"on": "x"},
            "good and bad": [{"on": "good"}, {"on": "bad", "to": "Nowhere"}],
            "no JSON": [{"on": "x", "assign": {"x": object()}}],
        }  # fmt: skip
        for name, rules in table.items():
            with self.subTest(name):
                with self.assertRaises(FlexiFlowError):
                    await lamp.update_rules(rules)
                self.assertEqual((lamp.rules, self.picture()), (self.LAMP["rules"], before))

    async def test_a_component_keeps_its_state_data_and_class(self):
        lamp = self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        await lamp.update_rules([{"on": "sing"}])
        self.assertEqual((lamp.state, lamp.data, lamp.seq), ("On", {"n": 1}, 2))
        name = type(lamp.state_machine.current_state).__name__
        self.assertEqual(name, "On")

    async def test_the_swap_waits_for_the_message_that_runs(self):
        path, begun, go = self.waiting()
        component = self.engine.create_component(
            self.machine({"from": "A", "on": "go", "to": "B", "action": path}))
        message = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        swap = asyncio.ensure_future(component.update_rules([{"on": "x"}], replace=True))
        await self.passes()
        waited = not swap.done()
        go.set()
        receipt = await message
        await swap
        self.assertEqual((waited, receipt.seq, component.seq, component.state), (True, 1, 2, "B"))

    async def test_a_swap_is_announced(self):
        heard = await self.listen("rules.updated", keys=("component", "seq"))
        self.engine.create_component(self.LAMP)
        await self.engine.update_rules("lamp", [{"on": "sing"}])
        self.assertEqual(heard.take(), [("lamp", 1)])

    async def test_timers_of_kept_rules_run_on_of_vanished_rules_go_and_new_ones_count(self):
        kept, gone, new = (
            {"from": "B", "after": seconds, "assign": {name: True}}
            for name, seconds in (("kept", 100), ("gone", 90), ("new", 80)))
        first = {"from": "A", "on": "go", "to": "B"}
        component = self.engine.create_component(self.machine(first, gone, kept))
        await self.engine.handle_message("m", "go")
        entered = self.clock.now
        self.clock.now += 50
        await component.update_rules([first, new, kept], replace=True)
        due = [timer["due"] - entered for timer in self.engine.status("m")[0]["timers"]]
        found = []
        for seconds in (80, 90, 100):
            self.clock.now = entered + seconds
            await self.engine.run(until_idle=True)
            found.append(component.data)
        self.assertEqual(due, [80, 100])
        self.assertEqual(found, [{"new": True}, {"new": True}, {"new": True, "kept": True}])

    async def test_a_component_of_its_own_keeps_notes(self):
        component = AsyncComponent("c", [], StateMachine.from_name("InitialState"))
        self.engine.register(component)
        for _ in range(3):
            await component.update_rules([{"when": "x", "then": "y"}])
        receipt = await component.handle_message({"type": "start"})
        self.assertEqual(component.rules, [{"when": "x", "then": "y"}])
        self.assertEqual(receipt.outcome, "moved")

    async def test_within_a_turn_rules_are_not_changed(self):
        async def act(message, component):
            await component.update_rules([{"on": "x"}])

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        with self.assertRaises(StateError):
            await self.engine.handle_message("m", "go")
        self.assertEqual(self.engine.get("m").seq, 0)


class ChangedRulesStored(ChangedRules):
    stored = True

    async def test_a_swap_is_a_journal_row_and_survives_a_restart(self):
        self.engine.create_component(self.LAMP)
        await self.engine.update_rules("lamp", [{"from": "Off", "on": "sing", "to": "Broken"}])
        await self.reopen()
        row = self.engine.history("lamp")[0]
        receipt = await self.engine.handle_message("lamp", "sing")
        self.assertEqual((row["seq"], row["from_state"], row["to_state"]), (1, "Off", "Off"))
        self.assertEqual((receipt.to_state, receipt.seq), ("Broken", 2))

    async def test_another_engine_sees_the_swap_before_its_next_message(self):
        other = self.open()
        for engine in (self.engine, other):
            engine.create_component(self.LAMP)
            await engine.run(until_idle=True)
        await self.engine.update_rules("lamp", [{"from": "Off", "on": "sing", "to": "Broken"}])
        receipt = await other.handle_message("lamp", "sing")
        self.assertEqual((receipt.outcome, receipt.seq, len(other.get("lamp").rules)),
            ("moved", 2, 5))

    async def test_another_engine_does_not_follow_rules_that_are_gone(self):
        other = self.open()
        for engine in (self.engine, other):
            engine.create_component(self.LAMP)
            await engine.run(until_idle=True)
        rules = [{"from": "Off", "on": "press", "guard": {"hard": True}, "to": "On"}]
        await self.engine.update_rules("lamp", rules, replace=True)
        receipt = await other.handle_message("lamp", "press")
        self.assertEqual((receipt.outcome, receipt.seq), ("blocked", 2))

    async def test_other_components_of_the_config_keep_their_rules(self):
        for name in "ab":
            self.engine.create_component(self.LAMP, name=name)
        await self.engine.update_rules("a", [{"on": "sing"}])
        await self.reopen()
        self.assertEqual([len(self.engine.get(name).rules) for name in "ab"], [5, 4])


class FoundByAttack(Case):
    """What an attack on the contract found, each with the right answer."""

    @staticmethod
    def config(*rules, **states):
        return {"name": "a", "initial_state": "A", "states": {"A": {}, **states},
            "rules": list(rules)}

    def test_a_wrong_kind_of_argument_is_said_to_be(self):
        async def run(store):
            async with FlexiFlowEngine(store) as engine:
                await engine.register_async(engine.create_component(self.config({"on": "x"})))
                for call in (
                    *(functools.partial(method, wrong)
                        for wrong in (5, "", ["a"], b"a", "\ud800")
                        for method in (engine.get, engine.accepts, engine.status, engine.remove)),
                    *(functools.partial(method, wrong, "x") for wrong in (None, 5, ["a"])
                        for method in (engine.handle_message, engine.send, engine.wait,
                            engine.cancel)),
                    *(functools.partial(engine.create_component, wrong)
                        for wrong in (None, 5, ["a"], b"a")),
                    *(functools.partial(engine.create_component, self.config(), name="b",
                        data=wrong) for wrong in (5, [], "x")),
                    *(functools.partial(engine.create_component, self.config(), name=wrong)
                        for wrong in (5, "", ["a"])),
                    *(functools.partial(method, limit=wrong) for wrong in (0, -1, "2", 1.5, True)
                        for method in (engine.history, engine.dead_letters)),
                    *(functools.partial(engine.history, before=wrong) for wrong in (0, "2", 1.5)),
                    *(functools.partial(engine.send, "a", "x", id=wrong) for wrong in ("", 5)),
                    *(functools.partial(engine.history, wrong) for wrong in (5, "")),
                    *(functools.partial(method, wrong) for wrong in (5, ["a"])
                        for method in (engine.replay, engine.prune) if store),
                    *(functools.partial(engine.backup, wrong) for wrong in ("", ":memory:")
                        if store),
                ):
                    with (
                        self.subTest(call=str(call), store=store),
                        self.assertRaises(FlexiFlowError),
                    ):
                        answer = call()
                        if inspect.isawaitable(answer):
                            await answer

        self.run_async(run(None))
        self.run_async(run(self.path()))

    def test_what_nobody_delivered_is_said_when_it_was_in_memory_only(self):
        async def run(store):
            engine = FlexiFlowEngine(store)
            await engine.send("a", "x")
            await engine.send("a", "x", delay=60)
            await engine.close()

        with self.assertLogs("flexiflow", "WARNING") as logs:
            self.run_async(run(None))
            self.run_async(run(self.path()))  # which keeps them
        self.assertEqual([one.getMessage() for one in logs.records],
            ["Not delivered, and kept in memory only: 2 to 'a'"])

    def test_history_is_read_in_pages_and_from_a_moment_on(self):
        clock = Clock()

        async def run():
            engine = FlexiFlowEngine(self.path(), clock=clock)
            engine.create_component(self.config({"on": "x"}))
            for _ in range(5):
                clock.now += 10
                await engine.handle_message("a", "x")
            pages = [engine.history("a", limit=2)]
            while pages[-1]:
                pages.append(engine.history("a", limit=2, before=pages[-1][-1]["number"]))
            late = engine.history(since=clock.now - 10), engine.history("a", since="15s")
            await engine.close()
            return [[row["seq"] for row in rows] for rows in (*pages, *late)]

        self.assertEqual(self.run_async(run()),
            [[5, 4], [3, 2], [1, 0], [], [5, 4], [5, 4]])

    def test_a_stop_ends_a_run_until_idle_when_what_runs_is_done(self):
        module = sys.modules["acts_slow"] = types.ModuleType("acts_slow")
        self.addCleanup(sys.modules.pop, "acts_slow", None)

        async def run():
            begun, go = asyncio.Event(), asyncio.Event()

            async def act(message, component):
                begun.set()
                await go.wait()

            module.act = act
            engine = FlexiFlowEngine(self.path())
            engine.create_component(self.config({"on": "go", "action": "acts_slow:act"}))
            for _ in range(3):
                await engine.send("a", "go")
            worker = asyncio.ensure_future(engine.run(until_idle=True))
            await begun.wait()
            closing = asyncio.ensure_future(engine.close())
            await asyncio.sleep(0)
            go.set()
            delivered = await worker
            await closing
            (facts,) = engine.status("a")
            delivered_later = await engine.run(until_idle=True)
            await engine.close()
            return delivered, facts["waiting"], delivered_later

        self.assertEqual(self.run_async(run()), (1, 2, 2))

    def test_a_delay_is_written_in_plain_digits(self):
        with self.assertRaisesRegex(StateError, "Not a delay"):
            ff.seconds("\u0663s")

    def test_the_id_of_a_call_goes_before_the_one_in_its_message(self):
        async def run():
            engine = FlexiFlowEngine(self.path())
            receipt = await engine.send("a", {"type": "x", "id": "i1"}, id="i2")
            await engine.close()
            return receipt.id

        self.assertEqual(self.run_async(run()), "i2")

    def test_an_old_state_without_a_name_is_refused(self):
        config = {**self.config({"on": "x"}), "renamed": {"": "A"}}
        self.assertEqual([one.what for one in explain(config).errors],
            ["renamed.: Not a name: ''"])

    def test_what_is_not_written_yet_has_no_history(self):
        async def run():
            engine = FlexiFlowEngine(self.path())
            engine.create_component(self.config({"on": "x"}))
            answers = engine.replay("a"), await engine.prune("a", keep=1)
            await engine.close()
            return answers

        self.assertEqual(self.run_async(run()),
            ([], {"rows": 0, "of": 0, "ids": [], "components": []}))

    def test_a_removed_component_stays_removed(self):
        async def run(store, written):
            engine = FlexiFlowEngine(store)
            old = engine.create_component(self.config({"on": "x"}))
            if written:
                await engine.register_async(old)
            await engine.remove("a")
            with self.assertRaisesRegex(StateError, "Component 'a' is gone"):
                await old.handle_message({"type": "x"})
            await engine.close()
            return engine.components

        for store, written in ((None, True), (self.path(), True), (self.path("b.db"), False)):
            with self.subTest(store=store, written=written):
                self.assertEqual(self.run_async(run(store, written)), {})

    def test_a_clock_of_whole_numbers_damages_nothing(self):
        async def run():
            async with FlexiFlowEngine(self.path(), clock=lambda: 1000) as engine:
                engine.create_component(self.config({"on": "x"}))
                first = await engine.handle_message("a", "x", id="1")
                return first.outcome, (await engine.handle_message("a", "x", id="1")).duplicate

        self.assertEqual(self.run_async(run()), ("stayed", True))

    def test_what_another_engine_has_set_is_there_when_an_effect_needs_it(self):
        config = self.config({"on": "set", "assign": {"x": 1}}, {"on": "use", "assign":
            {"y": "$data.x"}})

        async def run():
            first, second = FlexiFlowEngine(self.path()), FlexiFlowEngine(self.path())
            await first.register_async(first.create_component(config))
            second.create_component(config)
            await second.handle_message("a", "set")
            receipt = await first.handle_message("a", "use")
            await first.close()
            await second.close()
            return receipt.data

        self.assertEqual(self.run_async(run()), {"x": 1, "y": 1})

    def test_a_timer_whose_rule_got_another_number_elsewhere_fires_its_own_rule(self):
        clock, timer = Clock(), {"from": "A", "after": 10, "to": "T"}

        async def run():
            first = FlexiFlowEngine(self.path(), clock=clock)
            second = FlexiFlowEngine(self.path(), clock=clock)
            await first.register_async(first.create_component(self.config(timer, T={}, W={})))
            await second.update_rules("a", [{"on": "w", "to": "W"}, timer], replace=True)
            clock.now += 20
            await first.run(until_idle=True)
            state = first.get("a").state
            await first.close()
            await second.close()
            return state

        self.assertEqual(self.run_async(run()), "T")

    def test_a_message_to_itself_that_exits_blocks_nobody(self):
        self.write("acts_exit.py", "def boom(message, component):\n    raise SystemExit(3)\n")
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))

        async def run():
            engine = FlexiFlowEngine()
            self.logged()
            engine.create_component(self.config({"on": "go", "send": {"to": "a", "type": "bad"}},
                {"on": "bad", "action": "acts_exit:boom"}, {"on": "ok"}))
            answers = [(await engine.handle_message("a", kind)).outcome for kind in ("go", "ok")]
            await engine.close()
            return answers

        self.assertEqual(self.run_async(run()), ["stayed", "stayed"])

    def test_what_a_handler_of_changed_rules_or_of_a_failed_message_sends_is_queued(self):
        async def run():
            engine = FlexiFlowEngine()
            self.logged()

            async def tell(data):
                await engine.send("other", "told")

            await engine.event_bus.subscribe("rules.updated", "test", tell)
            engine.create_component(self.config({"on": "x", "assign": {"y": "$data.gone"}}))
            await engine.update_rules("a", [{"on": "new"}])
            await engine.event_bus.subscribe("component.message.received", "test", tell)
            with self.assertRaises(StateError):
                await engine.handle_message("a", "x")
            waiting = [row["component"] for row in engine.queue.messages("1")]
            await engine.close()
            return waiting

        self.assertEqual(self.run_async(run()), ["other", "other"])

    def test_a_row_that_was_read_before_is_not_taken_for_one_that_came_later(self):
        clock = Clock()
        timed = self.config(
            {"from": "A", "on": "arm", "to": "S"}, {"from": "S", "after": 20, "to": "T"},
            {"from": "S", "on": "go", "to": "U", "send": [
                {"to": "d", "type": "hi", "with": {"n": n}} for n in (1, 2)]}, S={}, T={}, U={})
        listener = {"name": "d", "data": {"got": []}, "rules": [
            {"on": "hi", "assign": {"got": {"append": ["$data.got", "$message.n"]}}}]}

        async def run(store):
            engine = FlexiFlowEngine(store, clock=clock)
            engine.create_component(timed)
            component = engine.create_component(listener)
            await engine.send("a", "go", delay=10)
            await engine.handle_message("a", "arm")
            clock.now += 60  # the timer is overdue, and `go` comes first and drops it
            await engine.run(until_idle=True)
            await engine.close()
            return component.data

        for store in (None, self.path()):
            with self.subTest(store=store):
                self.assertEqual(self.run_async(run(store)), {"got": [1, 2]})

    def test_a_message_that_is_cancelled_while_another_runs_does_not_run_for_one_sent_since(self):
        ran = []
        module = sys.modules["acts_slow"] = types.ModuleType("acts_slow")
        self.addCleanup(sys.modules.pop, "acts_slow", None)

        async def run():
            begun, go = asyncio.Event(), asyncio.Event()

            async def act(message, component):
                ran.append(message["n"])
                begun.set()
                await go.wait()

            module.act = act
            engine = FlexiFlowEngine(self.path())
            engine.create_component(self.config({"on": "go", "action": "acts_slow:act"}))
            for n in (1, 2):
                await engine.send("a", "go", n=n, id=f"m{n}")
            worker = asyncio.ensure_future(engine.run(until_idle=True))
            await begun.wait()
            cancelled = await engine.cancel("a", "m2")
            await engine.send("a", "go", n=3, id="m2")
            go.set()
            await worker
            await engine.run(until_idle=True)
            await engine.close()
            return cancelled

        self.assertEqual((self.run_async(run()), ran), (True, [1, 3]))

    def test_the_last_of_several_configs_is_adopted_though_it_was_the_first(self):
        first, second = self.config({"on": "x"}), self.config({"on": "y"})

        async def run():
            engine = FlexiFlowEngine(self.path())
            engine.create_component(first)
            await engine.handle_message("a", "x")
            for config in (second, first):
                engine.create_component(config, update=True)
            receipt = await engine.handle_message("a", "x")
            await engine.close()
            return receipt.outcome, receipt.seq

        self.assertEqual(self.run_async(run()), ("stayed", 2))

    def test_an_engine_delivers_again_where_it_is_entered_again(self):
        async def run():
            engine = FlexiFlowEngine(self.path())
            async with engine:
                component = engine.create_component(self.config({"on": "x", "to": "B"}, B={}))
            async with engine:
                await engine.send("a", "x")
                await engine.wait("a", "B", timeout=30)
            return component.state

        self.assertEqual(self.run_async(run()), "B")

    def test_a_timeout_is_a_delay_like_any_other(self):
        async def run(timeout):
            engine = FlexiFlowEngine()
            engine.create_component(self.config({"on": "x", "to": "B"}, B={}))
            with self.assertRaises(StateError) as caught:
                await engine.wait("a", "B", timeout=timeout)
            return str(caught.exception)

        found = [self.run_async(run(timeout)) for timeout in ("0s", 0, float("nan"), "soon")]
        late = "'a' is in 'A', not in B\nWhy: waited 0 s\nContext:\n  component='a'"
        bad = 'Not a delay: {}\nFix: seconds, or like "90s", "15m", "2h", "7d"'
        self.assertEqual(found, [late, late, bad.format("nan"), bad.format("'soon'")])

    def test_a_letter_that_is_damaged_is_not_excused_by_what_its_error_says(self):
        module = sys.modules["acts_parcel"] = types.ModuleType("acts_parcel")
        self.addCleanup(sys.modules.pop, "acts_parcel", None)
        self.logged()

        def act(message, component):
            raise ValueError("the parcel was damaged")

        module.act = act

        async def run():
            engine = FlexiFlowEngine(self.path())
            engine.create_component(
                {**self.config({"on": "go", "action": "acts_parcel:act"}),
                    "retry": {"max_attempts": 1}})
            await engine.send("a", "go", n=7)
            await engine.run(until_idle=True)
            before = len(engine.dead_letters())
            engine.store.db.execute(
                "UPDATE flexiflow_messages SET message=replace(message, '7', '9')")
            with self.assertRaises(PersistenceError) as caught:
                engine.dead_letters()
            await engine.close()
            return before, caught.exception.what.partition(" is ")[2]

        self.assertEqual(self.run_async(run()), (1, "damaged: message 1"))

    def test_delivering_none_at_a_time_is_refused(self):
        with self.assertRaises(ff.ArgumentError):
            self.run_async(FlexiFlowEngine().run(concurrency=0))


class Claims(StoreCase):
    """Python code runs in one engine at a time, and once for each message."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.ran, self.polls = [], []
        self.patch("_pause", lambda: self.polls.append(1) or 0.0)

    def noting(self, **settings):
        """Return a config whose action notes the id of its message, and lets others run."""
        async def act(message, component):
            self.ran.append(message["id"])
            await self.passes(3)
            if message["type"] == "fail":
                raise RuntimeError("no")

        rule = {"on": ["go", "fail"], "action": self.code(act)}
        return self.machine(rule, {"on": "stay"}, **settings)

    def hanging(self, fail=False, **settings):
        """Return a config whose action waits, the first time, for `self.go`."""
        self.begun, self.go = asyncio.Event(), asyncio.Event()

        async def act(message, component):
            self.ran.append(message["id"])
            if len(self.ran) == 1:
                self.begun.set()
                await self.go.wait()
            if fail:
                raise RuntimeError("no")

        return self.machine({"on": "go", "action": self.code(act)}, **settings)

    def owner(self, name="m"):
        return self.rows("SELECT owner, lease FROM flexiflow_components WHERE name=?", name)[0]

    def attempts(self):
        return self.rows("SELECT message_id, attempts FROM flexiflow_messages ORDER BY number")

    async def died(self, config, seconds=30.0):
        """Make a component whose code a process, dead by now, has claimed for so long."""
        self.engine.create_component(config)
        await self.engine.run(until_idle=True)
        self.change("UPDATE flexiflow_components SET owner='dead', lease=? WHERE name=?",
            self.clock.now + seconds, config["name"])

    async def asked(self, times=5):
        """Wait until the claim of another has been looked at so many times."""
        count = len(self.polls) + times
        while len(self.polls) < count:
            await asyncio.sleep(0)

    async def until(self, found):
        while not found():
            await asyncio.sleep(0.001)

    # ---- failures first

    async def test_what_killed_another_worker_meanwhile_is_not_begun_beyond_its_attempts(self):
        self.engine.create_component(self.noting(retry={"max_attempts": 2}))
        await self.engine.run(until_idle=True)
        await self.engine.send("m", "go", id="x")
        deliver = ff._Delivery._deliver

        async def later(delivery, rows):  # another has tried it since these rows were read
            self.change_messages("attempts=2")
            return await deliver(delivery, rows)

        with unittest.mock.patch.object(ff._Delivery, "_deliver", later):
            await self.engine.run(until_idle=True)
        (letter,) = self.engine.dead_letters()
        self.assertEqual((self.ran, letter["attempts"], letter["error"].splitlines()[0]),
            ([], 2, "ProcessDied: Its process died of it 2 times"))

    async def test_what_kills_its_process_is_given_up_beside_a_call_that_goes_on(self):
        self.engine.create_component(self.hanging(retry={"max_attempts": 2}))
        await self.engine.run(until_idle=True)
        call = asyncio.ensure_future(self.engine.handle_message("m", "go", id="direct"))
        await self.begun.wait()
        await self.engine.send("m", "go", id="x")
        self.change_messages("attempts=2")
        work = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.passes()
        self.go.set()
        await asyncio.gather(call, work)
        self.assertEqual((self.ran, [one["id"] for one in self.engine.dead_letters()]),
            (["direct"], ["x"]))

    async def test_what_another_worker_has_put_off_is_not_begun_uncounted(self):
        def act(message, component):
            self.ran += self.attempts()

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.run(until_idle=True)
        await self.engine.send("m", "go", id="x")
        queued, looks, db = ff.Turn._queued, [], self.engine.store.db

        def later(turn):
            if looks and not db.in_transaction:  # it is due again
                change_messages(db, "place=1")
            looks.append(queued(turn))
            if len(looks) == 1:  # another has failed at it, since this one has looked
                change_messages(db, "place=NULL, attempts=1")
            return looks[-1]

        with unittest.mock.patch.object(ff.Turn, "_queued", later):
            await self.engine.run(until_idle=True)
        self.assertEqual((self.ran, self.owner()), ([("x", 2)], (None, None)))

    async def test_who_fails_after_another_has_taken_over_gives_up_nothing(self):
        config = self.hanging(fail=True, retry={"max_attempts": 1})
        self.engine.create_component(config)
        await self.engine.run(until_idle=True)
        await self.engine.send("m", "go", id="x")
        work = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.begun.wait()
        self.change("UPDATE flexiflow_components SET owner='other', lease=?", self.clock.now + 30)
        self.go.set()
        await self.passes(200)
        found = self.engine.dead_letters(), self.attempts(), self.owner()[0]
        work.cancel()
        await asyncio.wait([work])
        self.assertEqual(found, ([], [("x", 1)], "other"))

    async def test_an_error_without_a_text_fails_its_message_alone(self):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        class Busy(ff.State):
            async def handle_message(self, message, component):
                if message["type"] == "go":
                    await component.handle_message({"type": "bad"})
                elif message["type"] == "bad":
                    raise Mute
                return True, self

        alone = AsyncComponent("alone", [], ff.StateMachine(Busy()))
        receipt = await alone.handle_message({"type": "go"})
        self.assertEqual((receipt.outcome, alone.seq), ("stayed", 1))

    async def test_a_dead_letter_names_the_state_that_holds(self):
        def act(message, component):
            raise RuntimeError("no")

        rules = [{"from": "A", "on": "go", "to": "B", "send": {"to": "m", "type": "bad"}},
            {"from": "B", "on": "bad", "to": "C", "action": self.code(act)}]
        self.engine.create_component(
            self.machine(*rules, states="ABC", retry={"max_attempts": 1}))
        await self.engine.handle_message("m", "go")
        (letter,) = self.engine.dead_letters()
        self.assertEqual(letter["state"], "B")

    async def test_two_workers_count_each_message_once(self):
        other = self.open()
        for name in "abcdefgh":
            self.engine.create_component(self.machine({"on": "go"}), name=name)
        await self.engine.run(until_idle=True)
        for n in range(64):
            await self.engine.send("abcdefgh"[n % 8], "go")
        counts = await asyncio.gather(*[one.run(until_idle=True)
            for one in (self.engine, self.engine, other)])
        self.assertEqual(sum(counts), 64)

    async def test_what_has_failed_as_often_as_a_new_config_allows_says_why_it_fails(self):
        settings = {"max_attempts": 5, "base_delay": 1, "jitter": 0}
        self.engine.create_component(self.noting(retry=settings))
        await self.engine.run(until_idle=True)
        await self.engine.send("m", "fail", id="x")
        await self.engine.run(until_idle=True)
        self.engine.create_component(self.noting(retry={"max_attempts": 1}), update=True)
        self.clock.now += 2
        await self.engine.run(until_idle=True)
        (letter,) = self.engine.dead_letters()
        self.assertEqual((self.ran, letter["attempts"], letter["error"].splitlines()[0][:16]),
            (["x", "x"], 2, "RuntimeError: no"))

    async def test_a_claim_is_not_taken_over_before_its_lease_is_over(self):
        await self.died(self.noting())
        task = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        found = []
        for seconds in (0, 29.999, 0.001):
            self.clock.now += seconds
            await (self.asked() if seconds != 0.001 else task)
            found.append(list(self.ran))
        self.assertEqual((found, task.result().seq, self.owner()),
            ([[], [], ["x"]], 1, (None, None)))

    async def test_who_waits_too_long_for_a_claim_is_told(self):
        await self.died(self.noting())
        self.patch("TURN_LIMIT", -1.0)
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("m", "go")
        self.assertEqual(str(caught.exception), "No turn for -1 seconds: 'm'\n"
            "Why: another process is at work on the message before this one\n"
            "Context:\n  component='m'")
        self.assertEqual((self.ran, self.owner()[0]), ([], "dead"))

    async def test_a_message_of_the_queue_waits_for_a_claim_without_an_attempt(self):
        other = self.open()
        await self.died(self.noting(retry={"max_attempts": 1}))
        self.patch("TURN_LIMIT", -1.0)
        await self.engine.send("m", "go", id="x")
        self.change("UPDATE flexiflow_components SET owner=NULL")
        (row,) = self.engine.queue.messages("1")  # read before somebody else claims it
        component = self.engine.get("m")
        self.change("UPDATE flexiflow_components SET owner='dead'")
        task = asyncio.ensure_future(component.handle_message(
            {"type": "go", "id": "x"}, _row=row))
        await self.asked()
        before = self.attempts()
        self.clock.now += 30
        receipt = await task
        self.assertEqual((before, receipt.seq, self.ran), ([("x", 0)], 1, ["x"]))
        await other.close()

    async def test_the_queue_of_a_claimed_component_waits_and_others_go_on(self):
        await self.died(self.noting())
        self.engine.create_component(self.LAMP)
        await self.engine.send("m", "go", id="x")
        await self.engine.send("lamp", "press")
        worker = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.until(lambda: self.engine.get("lamp").seq)
        before = list(self.ran), self.attempts(), worker.done()
        self.clock.now += 30
        delivered = await worker
        self.assertEqual((before, delivered, self.ran), (([], [("x", 0)], False), 2, ["x"]))

    async def test_a_lease_of_a_clock_that_was_ahead_holds_nobody_up(self):
        await self.died(self.noting())
        self.clock.now -= 3600
        await self.engine.handle_message("m", "go", id="x")
        self.assertEqual((self.ran, self.polls), (["x"], []))

    async def test_a_clock_that_is_set_back_a_little_does_not_free_what_another_runs(self):
        other = self.open()
        self.engine.create_component(self.hanging())
        first = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        self.clock.now -= 1
        second = asyncio.ensure_future(other.handle_message("m", "go", id="y"))
        await self.asked()
        before = list(self.ran)
        self.go.set()
        receipts = [await first, await second]
        self.assertEqual((before, self.ran), (["x"], ["x", "y"]))
        self.assertEqual([one.seq for one in receipts], [1, 2])

    async def test_a_clock_that_is_set_forward_costs_a_second_run_and_never_a_second_move(self):
        other = self.open()
        self.engine.create_component(self.hanging(data={"n": 0}))
        first = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        self.clock.now += 3600
        second = await other.handle_message("m", "go", id="y")
        self.go.set()
        receipts = [await first, second]
        rows = [(row["seq"], row["id"]) for row in self.engine.history("m")]
        self.assertEqual(([one.seq for one in receipts], rows),
            ([2, 1], [(2, "x"), (1, "y"), (0, "")]))
        self.assertEqual((self.ran, self.owner()), (["x", "y", "x"], (None, None)))

    async def test_a_claim_is_let_go_of_however_the_message_ends(self):
        config = self.noting(states={"A": {}, "B": {}, "End": {"final": True}})
        config["rules"] += [{"from": "B", "on": "leave"}, {"on": "end", "to": "End"}]
        self.engine.create_component(config)
        found = []
        for kind in ("go", "fail", "unknown", "leave", "stay", "end", "go"):
            with contextlib.suppress(RuntimeError, StateError):
                await self.engine.handle_message("m", kind)
            found.append((kind, self.owner()))
        again = [await self.engine.handle_message("m", "go", id="x") for _ in range(2)]
        self.assertEqual([one for one in found if one[1] != (None, None)], [])
        self.assertEqual((again[1].duplicate, self.owner()), (True, (None, None)))

    async def test_a_claim_is_let_go_of_when_its_caller_is_cancelled(self):
        self.engine.create_component(self.hanging())
        task = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        during = self.owner()
        task.cancel()
        await asyncio.wait([task])
        await self.until(lambda: self.owner() == (None, None))
        self.assertEqual((during, task.cancelled()),
            ((self.engine.id, self.clock.now + 30), True))

    async def test_a_caller_cancelled_at_any_point_leaves_no_claim_behind(self):
        for slow in (False, True):
            self.patch("SLOW_COMMIT", -1.0 if slow else ff.SLOW_COMMIT)
            for steps in range(40):
                name = f"m{slow}{steps}"
                self.engine.create_component(self.noting(), name=name)
                task = asyncio.ensure_future(self.engine.handle_message(name, "go", id="x"))
                await self.passes(steps)
                task.cancel()
                await asyncio.wait([task])
                await self.engine.handle_message(name, "go", id="y")
                with self.subTest(slow=slow, steps=steps):
                    self.assertEqual((self.owner(name), self.engine._claimed), ((None, None), {}))

    async def test_an_engine_that_lost_a_claim_stops_renewing_it(self):
        self.engine.create_component(self.hanging())
        task = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        other = self.open()
        self.clock.now += 3600
        await other.handle_message("m", "go", id="y")
        await other.handle_message("m", "go", id="z")
        self.change("UPDATE flexiflow_components SET owner='third', lease=?", self.clock.now + 30)
        self.go.set()
        await self.asked()
        held = dict(self.engine._claimed)
        self.clock.now += 30
        await task
        self.assertEqual((held, self.engine._claimed), ({}, {}))

    # ---- what holds

    async def test_two_engines_run_an_action_once_for_each_message_of_the_queue(self):
        names = ("a", "b", "c")
        for name in names:
            self.engine.create_component(self.noting(), name=name)
        for n in range(30):
            await self.engine.send(names[n % 3], "go", id=f"i{n}")
        other = self.open()
        await asyncio.gather(*[one.run(until_idle=True) for one in (self.engine, other)])
        self.assertEqual(sorted(self.ran), sorted(f"i{n}" for n in range(30)))
        self.assertEqual([one["seq"] for one in self.engine.status()], [10, 10, 10])

    async def test_two_engines_run_an_action_once_for_each_direct_call(self):
        engines = self.engine, self.open()
        self.engine.create_component(self.noting())
        await self.engine.run(until_idle=True)
        calls = [engines[n % 2].handle_message("m", "go", id=f"i{n}") for n in range(20)]
        receipts = await asyncio.gather(*calls)
        self.assertEqual(sorted(self.ran), sorted(f"i{n}" for n in range(20)))
        self.assertEqual(sorted(one.seq for one in receipts), [*range(1, 21)])

    async def test_two_engines_that_get_the_same_id_run_its_action_once(self):
        engines = self.engine, self.open()
        self.engine.create_component(self.noting())
        await self.engine.run(until_idle=True)
        calls = [engine.handle_message("m", "go", id="x") for engine in engines * 3]
        receipts = await asyncio.gather(*calls)
        self.assertEqual((self.ran, sorted(one.duplicate for one in receipts)),
            (["x"], [False] + [True] * 5))

    async def test_a_claim_is_renewed_while_a_long_action_runs(self):
        self.patch("LEASE", 0.03)
        other = self.open()
        self.engine.create_component(self.hanging())
        first = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        second = asyncio.ensure_future(other.handle_message("m", "go", id="y"))
        for _ in range(10):  # ten leases long
            self.clock.now += 0.02
            await self.until(lambda: self.owner()[1] == self.clock.now + 0.03)
            await self.asked()
        before = list(self.ran)
        self.go.set()
        receipts = [await first, await second]
        self.assertEqual((before, self.ran), (["x"], ["x", "y"]))
        self.assertEqual([one.seq for one in receipts], [1, 2])

    async def test_a_claim_is_renewed_in_an_engine_that_was_closed_and_is_used_again(self):
        self.patch("LEASE", 0.9)  # of which a third passes until claims are renewed
        self.engine.create_component(self.noting(name="a"))
        await self.engine.handle_message("a", "go", id="first")
        await self.engine.close()
        self.ran.clear()
        self.patch("LEASE", 0.03)
        self.engine.create_component(self.hanging())
        task = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        self.clock.now += 5
        await asyncio.wait_for(self.until(lambda: self.owner()[1] == self.clock.now + 0.03), 30)
        self.go.set()
        self.assertEqual((await task).outcome, "stayed")

    async def test_rules_without_code_take_no_claim_and_mind_none(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        statements = []
        self.engine.store.db.set_trace_callback(statements.append)
        await self.engine.handle_message("lamp", "press")
        await self.engine.send("lamp", "press")
        await self.engine.run(until_idle=True)
        claims = [sql for sql in statements if "SET owner" in sql or "SET attempts" in sql]
        self.change("UPDATE flexiflow_components SET owner='dead', lease=?", self.clock.now + 30)
        receipt = await asyncio.wait_for(self.engine.handle_message("lamp", "press"), 10)
        self.assertEqual((claims, receipt.seq, self.polls), ([], 3, []))

    async def test_a_claim_is_taken_for_a_guard_or_a_class_in_python_as_well(self):
        async def answer(state, message, component):
            found.append(self.owner()[0])
            return True, state

        def allow(message, component):
            found.append(self.owner()[0])
            return True

        found = []
        speaker = type("Speaker", (State,), {"handle_message": answer})
        configs = (self.machine({"on": "go", "guard": self.code(allow)}),
            self.machine(states={"Speaker": self.code(speaker)}))
        for config in configs:
            self.engine.create_component(config)
            await self.engine.handle_message("m", "go")
            await self.engine.remove("m")
        self.assertEqual(found, [self.engine.id] * 2)

    async def test_new_rules_wait_for_a_claim(self):
        other = self.open()
        self.engine.create_component(self.hanging())
        first = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await self.begun.wait()
        second = asyncio.ensure_future(other.update_rules("m", [{"on": "new"}]))
        await self.asked()
        early = second.done()
        self.go.set()
        await asyncio.gather(first, second)
        outcomes = [row["outcome"] for row in self.engine.history("m")]
        self.assertEqual((early, outcomes, self.owner()),
            (False, ["updated", "stayed", "created"], (None, None)))

    async def test_two_workers_of_an_engine_give_up_nothing_that_one_is_at_work_on(self):
        self.engine.create_component(self.hanging(retry={"max_attempts": 1}))
        await self.engine.send("m", "go", id="x")
        first = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.begun.wait()
        second = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.passes(20)
        self.go.set()
        await asyncio.wait([first, second])
        self.assertEqual((self.ran, self.engine.dead_letters(),
            self.engine.status("m")[0]["seq"]), (["x"], [], 1))

    async def test_what_is_queued_gets_its_turn_beside_direct_calls(self):
        begun = asyncio.Event()

        async def act(message, component):
            begun.set()
            await asyncio.sleep(0.005)
            return self.ran.append(message["id"])

        async def call():
            while "q" not in self.ran and len(self.ran) < 200:
                await self.engine.handle_message("m", "go")

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        async with self.engine:
            calls = asyncio.ensure_future(call())
            await begun.wait()
            await self.engine.send("m", "go", id="q")
            await asyncio.wait_for(calls, 60)
        self.assertLess(self.ran.index("q"), 10)

    async def test_what_another_claims_while_one_reads_is_not_given_up(self):
        self.engine.create_component(self.hanging(retry={"max_attempts": 1}))
        await self.engine.send("m", "go", id="x")
        first = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.begun.wait()
        other = self.open()
        rows = other.queue.rows
        other.queue.rows = lambda sql, values=(): (  # as it was a moment before
            [] if sql == ff._CLAIMED else rows(sql, values))
        second = asyncio.ensure_future(other.run(until_idle=True))
        await self.passes(20)
        self.go.set()
        await asyncio.wait([first, second])
        self.assertEqual((self.ran, other.dead_letters(), other.status("m")[0]["seq"]),
            (["x"], [], 1))

    # ---- attempts

    async def test_an_attempt_is_counted_before_the_action_runs(self):
        self.engine.create_component(self.hanging())
        await self.engine.send("m", "go", id="x")
        worker = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.begun.wait()
        during = self.attempts()
        self.go.set()
        await worker
        self.assertEqual((during, self.attempts()), ([("x", 1)], []))

    async def test_a_failed_attempt_counts_once(self):
        self.engine.create_component(self.noting(retry={"max_attempts": 3, "base_delay": 1}))
        await self.engine.send("m", "fail", id="x")
        found = []
        for _ in range(3):
            await self.engine.run(until_idle=True)
            found += self.attempts()
            self.clock.now += 60
        self.assertEqual((found, self.ran), ([("x", 1), ("x", 2), ("x", 3)], ["x"] * 3))

    async def test_a_message_that_fails_elsewhere_keeps_its_pause(self):
        """Two workers have read the same row; the second finds it put off by the first."""
        self.engine.create_component(self.noting(retry={"max_attempts": 2, "base_delay": 10}))
        await self.engine.send("m", "fail", id="x")
        await asyncio.gather(*[self.engine.run(until_idle=True) for _ in range(2)])
        self.assertEqual((self.ran, self.attempts()), (["x"], [("x", 1)]))

    async def test_a_claim_on_what_failed_elsewhere_meanwhile_runs_and_counts_nothing(self):
        other = self.open()
        config = self.hanging(fail=True, retry={"max_attempts": 2, "base_delay": 10})
        self.engine.create_component(config)
        await self.engine.send("m", "go", id="x")
        (row,) = other.queue.messages("1")  # read before the first has claimed it
        first = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.begun.wait()
        second = asyncio.ensure_future(other.get("m").handle_message(
            {"type": "go", "id": "x"}, _row=row))
        await self.asked()
        self.go.set()
        await asyncio.gather(first, second)
        self.assertEqual((self.ran, self.attempts(), second.result().outcome),
            (["x"], [("x", 1)], "ignored"))

    async def test_an_attempt_cancelled_while_its_claim_is_committed_is_given_back(self):
        self.engine.create_component(self.noting(retry={"max_attempts": 1}))
        await self.engine.send("m", "go", id="x")
        self.patch("SLOW_COMMIT", -1.0)
        for steps in range(40):
            worker = asyncio.ensure_future(self.engine.run(until_idle=True))
            await self.passes(steps)
            worker.cancel()
            await asyncio.wait([worker])
            for _ in range(2):  # what is under way is settled, and what that has led to
                await self.engine.store.write(None, ())
            if self.engine.get("m").seq:
                break
            with self.subTest(steps=steps):
                self.assertEqual(self.attempts(), [("x", 0)])
        self.assertEqual(self.engine.dead_letters(), [])

    async def test_an_own_message_of_a_cancelled_worker_gets_its_attempt_back(self):
        config = self.hanging(retry={"max_attempts": 1})
        config["rules"].append({"on": "start", "send": {"to": "m", "type": "go", "id": "own"}})
        self.engine.create_component(config)
        await self.engine.send("m", "start", id="x")
        worker = asyncio.ensure_future(self.engine.run(until_idle=True))
        await self.begun.wait()
        worker.cancel()
        await asyncio.wait([worker])
        self.go.set()
        await self.reopen()
        await self.engine.run(until_idle=True)
        facts = self.engine.status("m")[0]
        self.assertEqual((self.ran, facts["seq"], self.engine.dead_letters()),
            (["own", "own"], 2, []))


class ClaimsOfProcesses(StoreCase):
    """The same with processes: some work together, some die, some have not all the code."""

    ACTS = """
        import os
        def note(message, component):
            with open(os.path.join(os.path.dirname(__file__), "log"), "a") as log:
                log.write(message["id"] + "\\n")
        def work(message, component):
            note(message, component)
            component.data["n"] += 1
        def die(message, component):
            note(message, component)
            os._exit(9)
        """
    HEAD = """
        import asyncio, logging, sys
        import flexiflow
        from flexiflow import FlexiFlowEngine
        logging.getLogger("flexiflow").addHandler(logging.NullHandler())
        """

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.write("acts.py", textwrap.dedent(self.ACTS))
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.modules.pop, "acts", None)
        self.addCleanup(sys.path.remove, str(self.folder))

    def child(self, body, *args):
        return self.start(textwrap.dedent(self.HEAD) + textwrap.dedent(body), *args)

    def noted(self):
        path = self.folder / "log"
        return path.read_text().split() if path.exists() else []

    async def test_four_processes_run_an_action_once_for_each_message(self):
        config = self.machine({"on": "go", "action": "acts:work"}, data={"n": 0})
        for name in "ab":
            self.engine.create_component(config, name=name)
        for n in range(40):
            await self.engine.send("ab"[n % 2], "go", id=f"q{n}")
        await self.engine.close()
        children = [self.child("""
            async def main(me):
                engine = FlexiFlowEngine("flow.db")
                calls = [engine.handle_message("ab"[n % 2], "go", id=f"{me}.{n}")
                    for n in range(10)]
                await asyncio.gather(engine.run(until_idle=True), *calls)
                await engine.close()
            asyncio.run(main(sys.argv[1]))
            """, str(me)) for me in range(4)]
        codes = [child.wait(60) for child in children]
        await self.engine.run(until_idle=True)
        ids = [f"q{n}" for n in range(40)] + [f"{me}.{n}" for me in range(4) for n in range(10)]
        self.assertEqual((codes, sorted(self.noted())), ([0] * 4, sorted(ids)))
        self.assertEqual([one["data"]["n"] for one in self.engine.status()], [40, 40])

    async def test_a_message_that_kills_its_process_ends_as_a_dead_letter_and_blocks_nobody(self):
        config = self.machine(
            {"on": "bad", "action": "acts:die"}, {"on": "go", "action": "acts:work"},
            data={"n": 0}, retry={"max_attempts": 3})
        for name in "ab":
            self.engine.create_component(config, name=name)
        for name, kind, id in (("a", "bad", "x"), ("a", "go", "y"), ("b", "go", "z")):
            await self.engine.send(name, kind, id=id)
        await self.engine.close()
        codes = []
        for _ in range(4):
            child = self.child("""
                flexiflow.LEASE = 0.3
                async def main():
                    engine = FlexiFlowEngine("flow.db", clock=lambda: 1e6 + flexiflow.time.time())
                    await engine.run(until_idle=True)
                    await engine.close()
                asyncio.run(main())
                """)
            codes.append(child.wait(60))
        (letter,) = self.engine.dead_letters()
        facts = [(one["name"], one["seq"], one["dead"]) for one in self.engine.status()]
        shown = {key: letter[key] for key in ("component", "id", "attempts", "error", "state")}
        self.assertEqual(codes, [9, 9, 9, 0])
        self.assertEqual(shown, {"component": "a", "id": "x", "attempts": 3, "state": "A",
            "error": "ProcessDied: Its process died of it 3 times\n"
            "Why: each time it was begun, and neither done nor failed"})
        self.assertEqual((facts, sorted(self.noted())),
            ([("a", 1, 1), ("b", 1, 0)], ["x", "x", "x", "y", "z"]))

    async def test_the_claim_of_a_killed_process_is_taken_over_when_its_lease_is_over(self):
        self.engine.create_component(self.machine({"on": "go", "action": "acts:work"}, {
            "on": "bad", "action": "acts:die"}, data={"n": 0}))
        await self.engine.close()
        child = self.child("""
            async def main():
                engine = FlexiFlowEngine("flow.db", clock=lambda: 1e6)
                await engine.handle_message("m", "bad", id="x")
            asyncio.run(main())
            """)
        self.assertEqual(child.wait(60), 9)
        self.clock.now = 1e6
        polls, waiting = [], asyncio.Event()
        self.patch("_pause", lambda: polls.append(1) or (len(polls) > 5 and waiting.set()) or 0.0)
        task = asyncio.ensure_future(self.engine.handle_message("m", "go", id="y"))
        await waiting.wait()
        before = self.noted(), self.engine.get("m").seq
        self.clock.now += 30
        receipt = await task
        self.assertEqual((before, self.noted(), receipt.data), ((["x"], 0), ["x", "y"], {"n": 1}))

    # ---- code that is not to be had here

    def foreign(self, *rules):
        """Return a config whose code can be had at first, and not by whoever comes later."""
        self.write("gone.py", textwrap.dedent(self.ACTS))
        self.addCleanup(sys.modules.pop, "gone", None)
        return self.machine({"on": "go", "action": "gone:work"}, *rules, data={"n": 0},
            retry={"max_attempts": 1})

    def take_code_away(self):
        os.unlink(self.path("gone.py"))
        shutil.rmtree(self.path("__pycache__"), ignore_errors=True)
        sys.modules.pop("gone", None)

    async def test_messages_to_code_that_cannot_be_imported_here_are_left_alone(self):
        config = self.foreign()
        for name in ("m", "n"):
            self.engine.create_component(config, name=name)
        self.engine.create_component(self.LAMP)
        for n in range(3):
            await self.engine.send("m", "go", id=f"x{n}")
            await self.engine.send("n", "go", id=f"y{n}")
            await self.engine.send("lamp", "press")
        await self.reopen()
        self.take_code_away()
        lines = self.logged()
        before = self.rows("SELECT * FROM flexiflow_messages WHERE component<>'lamp'")
        delivered = [await self.engine.run(until_idle=True) for _ in range(3)]
        after = self.rows("SELECT * FROM flexiflow_messages WHERE component<>'lamp'")
        said = [line for line in lines if line.startswith(("WARNING", "ERROR"))]
        self.assertEqual((delivered, after, self.engine.status("lamp")[0]["seq"]),
            ([3, 0, 0], before, 3))
        self.assertEqual([line.split(" ", 2)[2] for line in said],
            ["Messages to 'm' are left alone: rules[0].action: Module not found: 'gone'"])

    async def test_code_that_another_process_has_brought_meanwhile_is_left_alone_as_well(self):
        self.foreign()
        worker = self.open()
        plain = self.machine({"on": "go", "assign": {"n": 1}}, data={"n": 0},
            retry={"max_attempts": 1})
        worker.create_component(plain)
        await worker.handle_message("m", "go", id="first")
        await self.engine.update_rules(
            "m", [{"on": "go", "action": "gone:work"}], replace=True)
        await self.engine.send("m", "go", id="x")
        self.take_code_away()
        lines = self.logged()
        delivered = [await worker.run(until_idle=True) for _ in range(2)]
        (row,) = self.engine.queue.messages("1")
        self.assertEqual((delivered, row["attempts"], row["dead"], worker.dead_letters()),
            ([0, 0], 0, None, []))
        said = [line for line in lines if line.startswith(("WARNING", "ERROR"))]
        self.assertEqual([line.split(" ", 2)[2] for line in said],
            ["Messages to 'm' are left alone: rules[0].action: Module not found: 'gone'"])

    async def test_a_direct_call_to_code_that_cannot_be_imported_says_why(self):
        self.engine.create_component(self.foreign())
        await self.reopen()
        self.take_code_away()
        with self.assertRaises(ImportError_) as caught:
            await self.engine.handle_message("m", "go")
        self.assertEqual(caught.exception.what, "rules[0].action: Module not found: 'gone'")
        self.assertEqual(self.rows("SELECT seq, owner FROM flexiflow_components"), [(0, None)])

    async def test_code_that_may_not_be_imported_is_left_alone(self):
        self.engine.create_component(self.foreign())
        await self.engine.send("m", "go")
        await self.engine.close()
        strict = FlexiFlowEngine(self.path(), clock=self.clock, allow_imports=())
        self.addAsyncCleanup(strict.close)
        delivered = await strict.run(until_idle=True)
        (row,) = strict.queue.messages("1")
        self.assertEqual((delivered, row["attempts"], row["dead"]), (0, 0, None))


class DeadLetters(EngineCase):
    """What was given up: shown with all that is known of it, and given back when asked."""

    def failing(self, **settings):
        """Return a config whose action fails, as long as `self.bad` is true."""
        self.bad, self.ran = True, []

        def act(message, component):
            self.ran.append(message["id"])
            if self.bad:
                raise ValueError("no ink")

        rule = {"from": "B", "on": "print", "to": "C", "action": self.code(act)}
        return self.machine({"from": "A", "on": "go", "to": "B"}, rule, states="ABC",
            retry={"max_attempts": 2, "base_delay": 1, "jitter": 0}, **settings)

    async def give_up(self, *ids, name="m"):
        """Let messages fail until they are dead letters."""
        for id in ids:
            await self.engine.send(name, "print", id=id, pages=3)
            await self.later()
            await self.later(5)

    async def later(self, seconds=0):
        self.clock.now += seconds
        return await self.engine.run(until_idle=True)

    def shown(self, *keys, **which):
        letters = self.engine.dead_letters(**which)
        for one in letters:
            one["error"] = re.sub(r" \(test_flexiflow\.py:\d+\)$", " (place)", one["error"])
        return [tuple(one[key] for key in keys) for one in letters]

    async def test_an_error_whose_text_cannot_be_made_is_given_up_like_any_other(self):
        class Bad(Exception):
            def __str__(self):
                return {}

        def act(message, component):
            raise Bad

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)},
            retry={"max_attempts": 2, "base_delay": 1, "jitter": 0}))
        heard = await self.listen("message.dead", keys=("error",))
        await self.engine.send("m", "go", id="x")
        await self.later()
        await self.later(5)
        self.assertEqual((self.shown("id", "error", "attempts"), heard.take()), (
            [("x", "Bad: its text cannot be made (place)", 2)], [("its text cannot be made",)]))

    async def test_a_dead_letter_has_everything(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        sent = self.clock.now
        await self.engine.send("m", {"type": "print", "pages": 3, "correlation_id": "c-1"}, id="x")
        await self.later(1)
        await self.later(9)
        (letter,) = self.engine.dead_letters()
        trace, error = letter.pop("traceback"), letter.pop("error")
        self.assertEqual(letter, {
            "number": letter["number"], "component": "m", "id": "x", "correlation_id": "c-1",
            "message": {"type": "print", "pages": 3}, "attempts": 2, "state": "B", "sent": sent,
            "dead": sent + 10})
        self.assertRegex(error, r"^ValueError: no ink \(test_flexiflow\.py:\d+\)$")
        self.assertEqual((trace.splitlines()[0], trace.splitlines()[-1], letter["number"] > 0),
            ("Traceback (most recent call last):", "ValueError: no ink", True))
        self.assertIn('raise ValueError("no ink")', trace)

    async def test_only_the_end_of_a_long_traceback_is_kept(self):
        def act(message, component):
            raise ValueError("x" * 9000 + " the end")

        self.engine.create_component(self.machine(
            {"on": "go", "action": self.code(act)}, retry={"max_attempts": 1}))
        await self.engine.send("m", "go")
        await self.later()
        (letter,) = self.engine.dead_letters()
        self.assertEqual((len(letter["traceback"]), letter["traceback"][-8:]), (4000, "the end\n"))

    async def test_text_that_no_store_takes_does_not_keep_a_letter_from_it(self):
        def act(message, component):
            raise ValueError("\ud800\0 end")

        self.engine.create_component(self.machine(
            {"on": "go", "action": self.code(act)}, retry={"max_attempts": 1}))
        await self.engine.send("m", "go", id="x")
        await self.later()
        self.assertEqual(self.shown("id", "error"), [("x", "ValueError: \ud800\0 end (place)")])

    async def test_discarding_leaves_what_was_given_back_meanwhile(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        for id in ("1", "2", "3"):
            await self.give_up(id)
        write, queue = self.engine.queue.write, self.engine.queue

        def after_another(check, rows, done=None):  # another process is a moment quicker
            queue.write = write
            write(None, [(ff._update_queue(dead="NULL") + " WHERE message_id='1'", ())])
            return write(check, rows, done)

        queue.write = after_another
        first, second = [one["number"] for one in self.engine.dead_letters(limit=2)]
        gone = await self.engine.redrive(first, second, discard=True)
        self.assertEqual(([one["id"] for one in gone], self.shown("id"),
            [one["id"] for one in self.engine.status("m")[0]["queue"]]),
            (["2"], [("3",)], ["1"]))

    async def test_letters_come_oldest_first_of_one_component_or_of_all(self):
        for name in ("m", "n"):
            self.engine.create_component(self.failing(), name=name)
            await self.engine.handle_message(name, "go")
        for id, name in (("1", "m"), ("2", "n"), ("3", "m")):
            await self.give_up(id, name=name)
        self.assertEqual(self.shown("id"), [("1",), ("2",), ("3",)])
        self.assertEqual(self.shown("id", name="m"), [("1",), ("3",)])
        self.assertEqual(self.shown("id", limit=2), [("1",), ("2",)])
        self.assertEqual(self.shown("id", name="nobody"), [])

    async def test_what_is_dead_at_once_says_why(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "prss", id="x")
        await self.engine.send("nobody", "go", id="y")
        await self.later()
        for _ in range(2):
            await self.later(3601)
        self.assertEqual(self.shown("id", "attempts", "state", "error"), [
            ("x", 1, "Off", "StateError: Unknown message: 'prss'\n"
             "Why: no rule of 'lamp' takes it in any state\nFix: did you mean 'press'?\n"
             "Context:\n  component='lamp'\n  state='Off'"),
            ("y", 0, None, "NotThere: Unknown component: 'nobody'\n"
             "Fix: make it first: create_component(config, name=...), or register --config FILE")])

    async def test_the_id_of_a_dead_letter_stands_for_its_message_still(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        await self.give_up("x")
        again = await self.engine.send("m", "print", id="x", pages=3)
        with self.assertRaises(StateError) as caught:
            await self.engine.send("m", "print", id="x", pages=4)
        self.assertEqual((again.duplicate, caught.exception.what, len(self.engine.dead_letters())),
            (True, "The id 'x' was used for another message to 'm'", 1))

    # ---- redrive

    async def test_a_number_that_is_no_dead_letters_is_refused_and_none_is_given_back(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        await self.give_up("x")
        ((number,),) = self.shown("number")
        with self.assertRaises(StateError) as caught:
            await self.engine.redrive(number, 77)
        self.assertEqual(str(caught.exception),
            f"No dead letter has the number 77\nFix: use one of '{number}'")
        self.assertEqual(self.shown("number"), [(number,)])
        with self.assertRaises(StateError):
            await self.engine.redrive(number, name="other")
        await self.engine.redrive(number)
        with self.assertRaises(StateError) as caught:
            await self.engine.redrive(number)
        self.assertEqual(caught.exception.fix, "none is known here")

    async def test_a_letter_given_back_is_new_and_runs(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        await self.give_up("x")
        before = self.engine.dead_letters()
        self.bad = False
        answer = await self.engine.redrive(before[0]["number"])
        (row,) = self.engine.queue.messages("1")
        waiting = {key: row[key] for key in ("attempts", "due", "dead", "error")}
        delivered = await self.later()
        self.assertEqual((answer, self.engine.dead_letters()), (before, []))
        self.assertEqual(waiting,
            {"attempts": 0, "due": self.clock.now, "dead": None, "error": None})
        self.assertEqual((delivered, self.ran, self.engine.get("m").state), (1, ["x"] * 3, "C"))

    async def test_a_letter_given_back_has_all_its_attempts_again(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        await self.give_up("x")
        await self.engine.redrive()
        for _ in range(4):
            await self.later(5)
        self.assertEqual((self.ran, self.shown("id", "attempts")), (["x"] * 4, [("x", 2)]))

    async def test_letters_are_given_back_by_number_by_component_or_all_in_their_order(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        self.engine.create_component(self.failing(), name="n")
        await self.engine.handle_message("n", "go")
        await self.give_up("1", "2", "3", "4")
        await self.give_up("5", name="n")
        numbers = [number for (number,) in self.shown("number")]
        self.bad = False
        chosen = await self.engine.redrive(numbers[2], numbers[0])
        of_n = await self.engine.redrive(name="n")
        rest = await self.engine.redrive()
        nothing = await self.engine.redrive()
        heard = await self.listen("component.message.received", keys=("component", "message"))
        await self.later()
        ids = [[one["id"] for one in found] for found in (chosen, of_n, rest, nothing)]
        of_m = [message["id"] for name, message in heard.take() if name == "m"]
        self.assertEqual((ids, of_m),
            ([["1", "3"], ["5"], ["2", "4"], []], ["1", "3", "2", "4"]))
        self.assertEqual(self.engine.dead_letters(), [])

    async def test_a_timer_given_back_after_its_state_was_left_is_over(self):
        self.bad, fired = True, []

        def ring(message, component):
            fired.append(message["type"])
            if self.bad:
                raise ValueError("no bell")

        self.engine.create_component(self.machine(
            {"from": "A", "after": 10, "to": "B", "action": self.code(ring)},
            {"from": "A", "on": "leave", "to": "C"}, {"from": "C", "after": 10, "to": "B"},
            {"from": "C", "on": "*"}, states="ABC", retry={"max_attempts": 1}))
        await self.engine.run(until_idle=True)
        await self.later(10)
        dead = self.shown("message", "error", "state")
        await self.engine.handle_message("m", "leave")
        self.bad = False
        await self.engine.redrive()
        await self.later()
        facts = self.engine.status("m")[0]
        self.assertEqual(dead, [({"type": "after 10", "state": "A", "rule": 0},
            "ValueError: no bell (place)", "A")])
        self.assertEqual((fired, facts["state"], facts["dead"], facts["waiting"]),
            (["after 10"], "C", 0, 0))
        if self.stored:
            (entry,) = self.engine.history("m", limit=1)
            self.assertEqual((entry["outcome"], entry["reason"]),
                ("ignored", "the timer of A is over"))

    async def test_a_timer_given_back_in_its_state_fires(self):
        self.bad = True

        def ring(message, component):
            if self.bad:
                raise ValueError("no bell")

        self.engine.create_component(self.machine(
            {"from": "A", "after": 10, "to": "B", "action": self.code(ring)},
            retry={"max_attempts": 1}))
        await self.engine.run(until_idle=True)
        await self.later(10)
        self.bad = False
        await self.engine.redrive()
        await self.later()
        self.assertEqual(self.engine.get("m").state, "B")

    async def test_a_running_worker_takes_up_what_is_given_back(self):
        done = asyncio.Event()
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        await self.give_up("x")
        await self.engine.event_bus.subscribe("state.changed", "test", lambda data: done.set())
        self.bad = False
        async with self.engine:
            await self.passes()
            await self.engine.redrive()
            await asyncio.wait_for(done.wait(), 10)

    # ---- message.dead

    async def test_what_handlers_of_message_dead_send_is_delivered(self):
        async def tell(data):
            await self.engine.send("lamp", "press", id=f"for {data['id']}")

        self.engine.create_component(self.LAMP)
        self.engine.create_component(self.machine(
            {"on": "go", "send": [{"to": "m", "type": "own", "id": "o"},
                {"to": "m", "type": "after"}]}, {"on": "after"}))
        await self.engine.event_bus.subscribe("message.dead", "test", tell)
        await self.engine.handle_message("m", "go")  # an own message that nobody knows
        await self.engine.send("m", "nonsense", id="n")
        await self.later()
        facts = [(one["name"], one["seq"], one["dead"]) for one in self.engine.status()]
        self.assertEqual(facts, [("lamp", 2, 0), ("m", 2, 2)])

    async def test_a_handler_of_message_dead_may_send_to_the_component_itself(self):
        async def tell(data):
            await self.engine.handle_message("m", "after")

        self.engine.create_component(self.machine(
            {"on": "go", "send": {"to": "m", "type": "own"}}, {"on": "after"}))
        await self.engine.event_bus.subscribe("message.dead", "test", tell)
        await self.engine.handle_message("m", "go")
        await self.engine.send("m", "nonsense")
        await self.later()
        facts = self.engine.status("m")[0]
        self.assertEqual((facts["seq"], facts["waiting"], facts["dead"]), (3, 0, 2))

    async def test_a_handler_of_message_dead_that_fails_stops_nobody(self):
        def fail(data):
            raise RuntimeError("no")

        self.engine.create_component(self.LAMP)
        await self.engine.event_bus.subscribe("message.dead", "test", fail)
        for kind in ("nonsense", "press"):
            await self.engine.send("lamp", kind)
        await self.later()
        facts = self.engine.status("lamp")[0]
        self.assertEqual((facts["seq"], facts["dead"]), (1, 1))


class DeadLettersStored(DeadLetters):
    stored = True

    async def test_given_back_and_discarded_at_once_it_is_one_of_both(self):
        for first, second in ((True, False), (False, True), (False, False), (True, True)):
            self.engine.create_component(self.failing())
            await self.engine.handle_message("m", "go")
            await self.give_up("x", "y")
            other, write = self.open(), self.engine.queue.write

            async def later(*values, write=write, other=other, first=first):
                await other.redrive(1, discard=first)
                return await write(*values)

            with unittest.mock.patch.object(self.engine.queue, "write", later):
                letters = await self.engine.redrive(discard=second)
            rows = self.engine.queue.messages("1")
            left = sorted((row["id"], row["dead"] is None) for row in rows)
            with self.subTest(first=first, second=second):
                self.assertEqual(([one["id"] for one in letters], left),
                    (["y"], [("x", True)] * (not first) + [("y", True)] * (not second)))
            await self.engine.close()
            await other.close()
            for path in Path(self.path("")).glob("flow.db*"):
                path.unlink()

    async def test_a_letter_survives_a_restart_and_is_given_back_by_another_program(self):
        self.engine.create_component(self.failing())
        await self.engine.handle_message("m", "go")
        await self.give_up("x")
        before = self.engine.dead_letters()
        await self.reopen()
        after = self.engine.dead_letters()
        self.bad = False
        await self.engine.redrive()
        await self.reopen()
        await self.later()
        self.assertEqual((after, self.engine.status("m")[0]["state"]), (before, "C"))

    async def test_a_damaged_message_is_shown_as_text_and_stays_dead(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="x")
        await self.engine.send("lamp", "press", id="y")
        self.change("UPDATE flexiflow_messages SET message='{press' WHERE message_id='x'")
        await self.later()
        first = self.shown("id", "message", "attempts", "state")
        await self.engine.redrive()
        await self.later()
        second = self.shown("id", "message", "attempts", "state")
        self.assertEqual((first[0][:3], second), (("x", "{press", 0), [("x", "{press", 0, "On")]))
        self.assertEqual(self.engine.status("lamp")[0]["seq"], 1)

    async def test_a_bad_definition_is_dead_at_once_and_stops_nobody(self):
        self.engine.create_component(self.machine({"on": "go"}))
        self.engine.create_component(self.LAMP)
        await self.engine.send("m", "go", id="x")
        await self.engine.send("lamp", "press")
        await self.reopen()
        import hashlib

        body = ff.write_json({"states": {"A": {}}, "rules": [{"on": "go", "to": "Nowhere"}]})
        hash = hashlib.sha256(body.encode()).hexdigest()
        self.change("INSERT INTO flexiflow_definitions VALUES(?,?)", hash, body)
        head = self.engine.store.head("m")
        values = [head[key] for key in ff._HEAD]
        values[0], values[3] = hash, head["data_text"]
        values[5] = ff._encode(head["since"])
        crc = ff.checksum("m", *values, start=head["chain"])
        self.change("UPDATE flexiflow_components SET definition=?, crc=? WHERE name='m'", hash, crc)
        await self.later()
        self.assertEqual(self.shown("id", "attempts", "state"), [("x", 0, None)])
        (letter,) = self.engine.dead_letters()
        self.assertEqual(letter["error"].splitlines()[0],
            "ConfigError: rules[0].to: Unknown state: 'Nowhere'")
        self.assertEqual(self.engine.status("lamp")[0]["seq"], 1)


class Withdrawing(EngineCase):
    """`cancel`: a message, or a timer, is taken out of the queue before it runs."""

    async def later(self, seconds=0):
        self.clock.now += seconds
        await self.engine.run(until_idle=True)
        return self.engine.status()[0]["state"]

    async def test_what_is_not_there_is_not_cancelled(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="x")
        answers = [await self.engine.cancel(*one) for one in (
            ("lamp", "y"), ("other", "x"), ("nobody", "x"))]
        await self.later()
        answers.append(await self.engine.cancel("lamp", "x"))
        self.assertEqual((answers, self.engine.get("lamp").state), ([False] * 4, "On"))

    async def test_a_dead_letter_is_not_cancelled(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "nonsense", id="x")
        await self.later()
        answer = await self.engine.cancel("lamp", "x")
        self.assertEqual((answer, len(self.engine.dead_letters())), (False, 1))

    async def test_a_message_that_is_cancelled_never_runs(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="now")
        await self.engine.send("lamp", "press", id="later", delay=60)
        answers = [await self.engine.cancel("lamp", id) for id in ("now", "later", "now")]
        state = await self.later(60)
        facts = self.engine.status("lamp")[0]
        self.assertEqual((answers, state, facts["waiting"]), ([True, True, False], "Off", 0))

    async def test_the_id_of_a_cancelled_message_may_be_sent_again(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="x", hard=True)
        await self.engine.cancel("lamp", "x")
        again = await self.engine.send("lamp", "press", id="x")
        self.assertEqual((again.duplicate, await self.later()), (False, "On"))

    async def test_a_timer_is_cancelled_by_the_id_in_status(self):
        self.engine.create_component(self.machine(
            {"from": "A", "after": 10, "to": "B"}, {"from": "A", "after": 20, "to": "C"},
            states="ABC"))
        await self.engine.run(until_idle=True)
        timers = self.engine.status("m")[0]["timers"]
        answer = await self.engine.cancel("m", timers[0]["id"])
        left = self.engine.status("m")[0]["timers"]
        states = [await self.later(10), await self.later(10)]
        self.assertEqual([(one["message"], one["due"]) for one in timers],
            [("after 10", self.clock.now - 10), ("after 20", self.clock.now)])
        self.assertEqual((answer, left, states), (True, timers[1:], ["A", "C"]))

    async def test_a_message_cancelled_while_it_runs_is_not_committed_and_leaves_no_claim(self):
        path, begun, go = self.waiting()
        self.engine.create_component(self.machine(
            {"on": "go", "to": "B", "action": path}, {"on": "next"}))
        await self.engine.send("m", "go", id="x")
        worker = asyncio.ensure_future(self.engine.run(until_idle=True))
        await begun.wait()
        answer = await self.engine.cancel("m", "x")
        go.set()
        await worker
        facts = self.engine.status("m")[0]
        receipt = await self.engine.handle_message("m", "next")
        if self.stored:
            self.assertEqual((answer, facts["state"], facts["waiting"]), (True, "A", 0))
            self.assertEqual(self.rows("SELECT owner FROM flexiflow_components"), [(None,)])
            self.assertEqual((receipt.seq, self.engine._claimed), (1, {}))

    async def test_an_own_message_is_cancelled_by_an_earlier_one(self):
        async def take_back(message, component):
            answers.append(await self.engine.cancel("m", "o"))

        answers = []
        self.engine.create_component(self.machine(
            {"on": "go", "send": [{"to": "m", "type": "first"},
                {"to": "m", "type": "own", "id": "o"}]},
            {"on": "first", "action": self.code(take_back)}, {"on": "own", "to": "B"}))
        await self.engine.handle_message("m", "go")
        facts = self.engine.status("m")[0]
        self.assertEqual((answers, facts["state"], facts["waiting"]), ([True], "A", 0))


class WithdrawingStored(Withdrawing):
    stored = True

    async def test_a_message_is_cancelled_by_another_program(self):
        self.engine.create_component(self.LAMP)
        await self.engine.send("lamp", "press", id="x", delay=5)
        other = self.open()
        answer = await other.cancel("lamp", "x")
        self.assertEqual((answer, await self.later(5)), (True, "Off"))


class Waiting(EngineCase):
    """`wait`: until a component is where it is wanted."""

    HOUSE = {
        "name": "house", "initial_state": "Out",
        "states": {"Out": {}, "In": {"initial": "In.Hall"}, "In.Hall": {}, "In.Bed": {},
            "Sold": {"final": True}},
        "rules": [
            {"from": "Out", "on": "enter", "to": "In"}, {"from": "In.Hall", "on": "up", "to":
                "In.Bed"}, {"from": "In", "on": "leave", "to": "Out"}, {"on": "sell", "to": "Sold"},
        ],
    }  # fmt: skip

    async def failure(self, *args, **settings):
        with self.assertRaises(FlexiFlowError) as caught:
            await asyncio.wait_for(self.engine.wait(*args, **settings), 10)
        return str(caught.exception)

    async def test_an_unknown_state_is_named_with_a_close_match(self):
        self.engine.create_component(self.HOUSE)
        self.assertEqual(await self.failure("house", "Out", "In.Bad"),
            "Unknown state: 'In.Bad'\nFix: did you mean 'In.Bed'?")
        self.assertEqual(await self.failure("house", "Moon"),
            "Unknown state: 'Moon'\nFix: use one of 'In', 'In.Bed', 'In.Hall', 'Out', 'Sold'")

    async def test_an_unknown_component_is_an_error(self):
        self.engine.create_component(self.HOUSE)
        self.assertEqual(await self.failure("hose", "Out"),
            "Unknown component: 'hose'\nFix: did you mean 'house'?")

    async def test_to_wait_for_no_state_is_an_error(self):
        self.engine.create_component(self.HOUSE)
        self.assertEqual(await self.failure("house"),
            "No state to wait for: 'house'\nFix: name one or more: wait(name, \"Done\")")

    async def test_a_timeout_says_where_the_component_is(self):
        self.engine.create_component(self.HOUSE)
        await self.engine.handle_message("house", "enter")
        self.assertEqual(await self.failure("house", "Out", "In.Bed", timeout=0.01),
            "'house' is in 'In.Hall', not in Out or In.Bed\nWhy: waited 0.01 s\n"
            "Context:\n  component='house'")
        self.assertEqual(await self.failure("house", "Out", timeout=0),
            "'house' is in 'In.Hall', not in Out\nWhy: waited 0 s\n"
            "Context:\n  component='house'")

    async def test_a_timeout_is_kept_to(self):
        self.engine.create_component(self.HOUSE)
        start = asyncio.get_running_loop().time()
        await self.failure("house", "In", timeout=0.01)
        self.assertLess(asyncio.get_running_loop().time() - start, 0.5)

    async def test_what_completes_elsewhere_is_not_waited_for(self):
        self.engine.create_component(self.HOUSE)
        task = asyncio.ensure_future(self.failure("house", "In"))
        await self.passes()
        await self.engine.handle_message("house", "sell")
        expected = ("'house' is in 'Sold', not in In\nWhy: it has completed\n"
            "Context:\n  component='house'")
        self.assertEqual([await task, await self.failure("house", "In")], [expected] * 2)

    async def test_a_turn_does_not_wait_for_itself(self):
        async def act(message, component):
            await self.engine.wait("m", "B")

        self.engine.create_component(self.machine({"on": "go", "to": "B", "action":
            self.code(act)}))
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("m", "go")
        self.assertEqual(str(caught.exception), "'m' waits for itself\nFix: wait outside its turn")

    async def test_who_is_cancelled_waits_no_more(self):
        self.engine.create_component(self.HOUSE)
        task = asyncio.ensure_future(self.engine.wait("house", "In"))
        await self.passes()
        task.cancel()
        await asyncio.wait([task])
        self.assertTrue(task.cancelled())
        await self.engine.handle_message("house", "enter")

    async def test_a_component_that_is_removed_is_not_waited_for(self):
        self.engine.create_component(self.HOUSE)
        await self.engine.run(until_idle=True)
        task = asyncio.ensure_future(self.failure("house", "In"))
        await self.passes()
        await self.engine.remove("house")
        self.assertEqual((await task).splitlines()[0], "Unknown component: 'house'")

    async def test_a_component_that_is_there_already_is_returned(self):
        house = self.engine.create_component(self.HOUSE)
        found = await self.engine.wait("house", "In", "Out")
        await self.engine.handle_message("house", "sell")
        self.assertIs(found, house)
        self.assertIs(await self.engine.wait("house", "Sold", timeout=0), house)

    async def test_a_child_is_in_its_parent(self):
        self.engine.create_component(self.HOUSE)
        for kind in ("enter", "up"):
            await self.engine.handle_message("house", kind)
        found = await self.engine.wait("house", "In")
        self.assertEqual(found.state, "In.Bed")

    async def test_it_ends_when_the_component_gets_there(self):
        self.engine.create_component(self.HOUSE)
        tasks = [asyncio.ensure_future(self.engine.wait("house", *states, timeout=10))
            for states in (["In.Bed"], ["In"], ["Sold", "In.Bed"])]
        found = []
        for kind in ("enter", "up"):
            await self.engine.handle_message("house", kind)
            if kind == "enter":
                await asyncio.wait_for(asyncio.shield(tasks[1]), 10)
            found.append([task.done() for task in tasks])
        await asyncio.gather(*tasks)
        self.assertEqual(found[0], [False, True, False])

    async def test_a_component_made_by_hand_is_waited_for(self):
        component = AsyncComponent("c", [], StateMachine.from_name("InitialState"))
        self.engine.register(component)
        task = asyncio.ensure_future(self.engine.wait("c", "AwaitingConfirmation", timeout=10))
        await self.passes()
        await self.engine.handle_message("c", "start")
        self.assertIs(await task, component)

    async def test_an_action_may_wait_for_another_component(self):
        async def act(message, component):
            other = await self.engine.wait("house", "In", timeout=10)
            component.data["saw"] = other.state

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        self.engine.create_component(self.HOUSE)
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await self.passes()
        await self.engine.handle_message("house", "enter")
        self.assertEqual((await task).data, {"saw": "In.Hall"})

    async def test_a_timer_brings_it_there_without_a_message(self):
        config = {**self.HOUSE, "rules": [{"from": "Out", "after": 0.01, "to": "In"}]}
        async with FlexiFlowEngine(self.path() if self.stored else None) as engine:
            await self.passes()  # the worker has begun by now
            engine.create_component(config)
            house = await asyncio.wait_for(engine.wait("house", "In"), 10)
        self.assertEqual(house.state, "In.Hall")


class WaitingStored(Waiting):
    stored = True

    async def test_another_engine_brings_it_there(self):
        self.engine.create_component(self.HOUSE)
        await self.engine.run(until_idle=True)
        task = asyncio.ensure_future(self.engine.wait("house", "In", timeout=10))
        await self.passes()
        other = self.open()
        await other.handle_message("house", "enter")
        house = await task
        self.assertEqual((house.state, house.seq), ("In.Hall", 1))

    async def test_another_process_brings_it_there(self):
        self.engine.create_component(self.HOUSE)
        await self.engine.run(until_idle=True)
        task = asyncio.ensure_future(self.engine.wait("house", "Sold", timeout=60))
        child = self.start("""
            import asyncio
            from flexiflow import FlexiFlowEngine
            async def main():
                engine = FlexiFlowEngine("flow.db")
                await engine.handle_message("house", "sell")
                await engine.close()
            asyncio.run(main())
            """)
        await task
        self.assertEqual((child.wait(60), self.engine.status("house")[0]["state"]), (0, "Sold"))

    async def test_a_state_that_another_engine_has_brought_is_known(self):
        self.engine.create_component(self.HOUSE)
        await self.engine.run(until_idle=True)
        task = asyncio.ensure_future(self.failure("house", "Roof"))
        self.assertEqual((await task).splitlines()[0], "Unknown state: 'Roof'")
        other = self.open()
        states = {**self.HOUSE["states"], "Roof": {}}
        rules = [*self.HOUSE["rules"], {"from": "Out", "on": "climb", "to": "Roof"}]
        other.create_component({**self.HOUSE, "states": states, "rules": rules}, update=True)
        await other.handle_message("house", "climb")
        self.assertEqual((await self.failure("house", "In", timeout=0)).splitlines()[0],
            "'house' is in 'Roof', not in In")
        house = await self.engine.wait("house", "Roof", timeout=10)
        self.assertEqual(house.name, "house")


class Removing(EngineCase):
    """`remove`: a component goes with all that belongs to it."""

    CLOCKED = {
        "name": "clocked", "initial_state": "A", "data": {"n": 0}, "states": {"A": {}, "B": {}},
        "rules": [
            {"on": "add", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "A", "after": 60, "to": "B"},
        ],
    }  # fmt: skip

    async def test_what_is_removed_within_its_turn_leaves_nothing(self):
        path, begun, go = self.waiting()
        rules = [{"from": "A", "on": "go", "to": "B", "action": path},
            {"from": "B", "after": 60, "to": "A"}]
        self.engine.create_component(self.machine(*rules))
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        await self.engine.remove("m")
        go.set()
        await asyncio.wait([task])
        self.assertEqual((task.exception().what, self.engine.queue.messages("1")),
            ("Component 'm' is gone", []))

    async def test_an_unknown_component_is_an_error(self):
        self.engine.create_component(self.LAMP)
        with self.assertRaises(StateError) as caught:
            await self.engine.remove("lamb")
        self.assertEqual(str(caught.exception),
            "Unknown component: 'lamb'\nFix: did you mean 'lamp'?")

    async def test_a_component_is_not_removed_in_its_own_turn(self):
        async def act(message, component):
            await self.engine.remove(message["name"])

        for name in ("m", "n"):
            self.engine.create_component(
                self.machine({"on": "go", "action": self.code(act)}), name=name)
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("m", "go", name="m")
        self.assertEqual(str(caught.exception),
            "'m' is in the middle of a turn\nFix: remove it afterwards")
        receipt = await self.engine.handle_message("m", "go", name="n")
        self.assertEqual((receipt.outcome, [one["name"] for one in self.engine.status()]),
            ("stayed", ["m"]))

    async def test_all_that_belongs_to_it_goes_and_nothing_else(self):
        for name in ("one", "two"):
            self.engine.create_component(self.CLOCKED, name=name)
            await self.engine.handle_message(name, "add", id="a")
            await self.engine.send(name, "add", id="b")
            await self.engine.send(name, "add", id="c", delay=60)
            await self.engine.send(name, "nonsense", id="d")
            self.clock.now += 0.001
            await self.engine.run(until_idle=True, component=name)
            await self.engine.send(name, "add", id="e")
        _, before = self.engine.status()
        await self.engine.remove("one")
        self.assertEqual(self.engine.status(), [before])
        self.assertEqual([one["component"] for one in self.engine.dead_letters()], ["two"])
        self.assertIsNone(self.engine.get("one"))
        left = {row["component"] for row in self.engine.queue.messages("1")}
        self.assertEqual(left, {"two"})
        if self.stored:
            self.assertEqual({row["component"] for row in self.engine.history()}, {"two"})
            self.assertEqual(self.rows("SELECT name FROM flexiflow_components"), [("two",)])
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("one", "add")
        self.assertEqual(caught.exception.what, "Unknown component: 'one'")

    async def test_a_component_that_was_never_written_is_removed(self):
        self.engine.create_component(self.CLOCKED)
        await self.engine.remove("clocked")
        await self.engine.run(until_idle=True)
        self.assertEqual(self.engine.status(), [])

    async def test_its_timers_fire_no_more(self):
        self.engine.create_component(self.CLOCKED)
        await self.engine.run(until_idle=True)
        await self.engine.remove("clocked")
        self.clock.now += 60
        self.assertEqual(await self.engine.run(until_idle=True), 0)

    async def test_made_anew_it_begins_at_the_beginning(self):
        first = self.engine.create_component(self.CLOCKED)
        await self.engine.handle_message("clocked", "add", id="a")
        await self.engine.remove("clocked")
        second = self.engine.create_component({**self.CLOCKED, "data": {"n": 10}})
        receipt = await self.engine.handle_message("clocked", "add", id="a")
        self.assertIsNot(first, second)
        self.assertEqual((receipt.seq, receipt.data, receipt.duplicate), (1, {"n": 11}, False))
        timers = self.engine.status("clocked")[0]["timers"]
        self.assertEqual([one["due"] for one in timers], [self.clock.now + 60])

    async def test_a_message_under_way_to_a_removed_component_fails_and_brings_nothing_back(self):
        path, begun, go = self.waiting()
        self.engine.create_component(self.machine({"on": "go", "to": "B",
            "action": path, "send": {"to": "lamp", "type": "press"}}))
        self.engine.create_component(self.LAMP)
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        await self.engine.remove("m")
        go.set()
        await asyncio.wait([task])
        await self.engine.run(until_idle=True)
        names = [one["name"] for one in self.engine.status()]
        if self.stored:
            self.assertEqual(str(task.exception()),
                "Component 'm' is gone\nWhy: it was removed")
            self.assertEqual(self.engine.get("lamp").seq, 0)
        self.assertEqual(names, ["lamp"])

    async def test_a_component_made_by_hand_may_be_registered_again_after_it_was_removed(self):
        component = AsyncComponent("c", [], StateMachine.from_name("InitialState"))
        await self.engine.register_async(component)
        await self.engine.handle_message("c", "start")
        await self.engine.remove("c")
        again = AsyncComponent("c", [], StateMachine.from_name("InitialState"))
        await self.engine.register_async(again)
        receipt = await self.engine.handle_message("c", "start")
        self.assertEqual((receipt.outcome, receipt.seq), ("moved", 1))


class RemovingStored(Removing):
    stored = True

    def hang(self, **settings):
        """Return a config whose actions wait for the event, the event, and who has run them."""
        go, ran = asyncio.Event(), []

        async def act(message, component):
            ran.append(component)
            await go.wait()

        path = self.code(act)
        return self.machine({"on": "go", "action": path}, {"on": "note"},
            states={"A": {"entry": {"action": path}}} if settings else {"A": {}}), go, ran

    async def test_one_that_is_removed_while_it_is_made_is_not_there_afterwards(self):
        config, go, ran = self.hang(entry=True)
        old = self.engine.create_component(config)
        task = asyncio.ensure_future(old.handle_message({"type": "note"}))
        await self.passes()
        await self.engine.remove("m")
        go.set()
        await asyncio.wait([task])
        self.assertEqual((task.exception().what, len(ran), self.engine.status()),
            ("Component 'm' is gone", 1, []))

    async def test_one_made_anew_is_not_taken_over_by_the_object_of_the_removed_one(self):
        config, go, ran = self.hang()
        old = self.engine.create_component(config)
        tasks = [asyncio.ensure_future(old.handle_message({"type": "go"}))]
        await self.passes()
        await self.engine.remove("m")
        self.clock.now += 1
        new = self.engine.create_component(config)
        tasks.append(asyncio.ensure_future(new.handle_message({"type": "go"})))
        await self.passes()
        go.set()
        await asyncio.wait(tasks)
        self.assertEqual((tasks[0].exception().what, tasks[1].result().seq, ran),
            ("Component 'm' is gone", 1, [old, new]))

    async def test_removed_by_another_process_it_may_be_made_again(self):
        other = self.open()
        self.engine.create_component(self.CLOCKED)
        await self.engine.handle_message("clocked", "add")
        found = []
        for _ in range(2):
            await other.remove("clocked")
            again = self.engine.create_component(self.CLOCKED)
            receipt = await self.engine.handle_message("clocked", "add")
            found.append((again.data, receipt.seq, self.engine.get("clocked") is again))
        self.assertEqual(found, [({"n": 1}, 1, True)] * 2)
        by_hand = AsyncComponent("hand", [], StateMachine.from_name("InitialState"))
        await self.engine.register_async(by_hand)
        await other.remove("hand")
        again = AsyncComponent("hand", [], StateMachine.from_name("InitialState"))
        await self.engine.register_async(again)
        self.assertIs(self.engine.get("hand"), again)

    async def test_one_made_anew_stays_when_a_turn_of_the_removed_one_ends(self):
        path, begun, go = self.waiting()
        other = self.open()
        config = self.machine({"on": "go", "action": path}, {"on": "note"})
        old = self.engine.create_component(config)
        task = asyncio.ensure_future(old.handle_message({"type": "go"}))
        await begun.wait()
        await other.remove("m")
        new = self.engine.create_component(config)
        go.set()
        await asyncio.wait([task])
        self.assertEqual((task.exception().what, new is old, self.engine.get("m") is new),
            ("Component 'm' is gone", False, True))
        self.assertEqual((await new.handle_message({"type": "note"})).seq, 1)

    async def test_one_made_anew_while_the_removal_is_committed_stays(self):
        self.patch("SLOW_COMMIT", -1.0)
        for work in (lambda: self.engine.remove("lamp"),
                lambda: self.engine.prune(completed=True)):
            self.engine.create_component(self.LAMP)
            await self.engine.handle_message("lamp", "drop")
            task = asyncio.ensure_future(work())
            while self.engine.store._committing is None:
                await asyncio.sleep(0)
            new = self.engine.create_component(self.LAMP)
            await task
            receipt = await self.engine.handle_message("lamp", "drop")
            self.assertEqual((receipt.seq, self.engine.get("lamp") is new), (1, True))

    async def test_a_message_to_what_another_process_has_removed_waits_for_it(self):
        other = self.open()
        self.engine.create_component(self.CLOCKED)
        await self.engine.handle_message("clocked", "add")
        await other.remove("clocked")
        await self.engine.send("clocked", "add", id="a")
        for _ in range(10):
            await self.engine.run(until_idle=True)
            self.clock.now += 60
        (row,) = self.engine.queue.messages("1")
        self.assertEqual((row["dead"], row["attempts"], self.engine.get("clocked")),
            (None, 0, None))
        self.engine.create_component(self.CLOCKED)
        await self.engine.run(until_idle=True)
        self.assertEqual(self.engine.status()[0]["data"], {"n": 1})

    async def test_removing_that_is_cancelled_has_removed_it_here_as_well_or_not_at_all(self):
        async def prune():
            await self.engine.prune(completed=True)

        async def remove():
            await self.engine.remove("lamp")

        for work in (remove, prune):
            for passes in range(6):
                self.engine.create_component(self.LAMP)
                with contextlib.suppress(StateError):
                    await self.engine.handle_message("lamp", "drop", id="x")
                task = asyncio.ensure_future(work())
                await self.passes(passes)
                task.cancel()
                await asyncio.wait([task])
                there = self.rows("SELECT COUNT(*) FROM flexiflow_components") == [(1,)]
                self.engine.create_component(self.LAMP)
                receipt = await self.engine.handle_message("lamp", "drop", id="x")
                with self.subTest(work=work.__name__, passes=passes):
                    self.assertEqual((receipt.outcome, receipt.duplicate), ("moved", there))

    async def test_what_is_said_of_all_is_of_one_moment(self):
        head = self.engine.store.head

        def slow(name):  # another process removes one meanwhile
            self.change("DELETE FROM flexiflow_components WHERE name='c'")
            self.change("DELETE FROM flexiflow_journal WHERE component='c'")
            return head(name)

        for what, key in ((self.engine.status, "name"), (self.engine.replay, "component")):
            for name in ("a", "b", "c"):
                self.engine.create_component(self.CLOCKED, name=name)
                await self.engine.handle_message(name, "add")
            with unittest.mock.patch.object(self.engine.store, "head", slow):
                found = [one[key] for one in what()]
            with self.subTest(key):
                self.assertEqual((found, [one["name"] for one in self.engine.status()]),
                    (["a", "b", "c"], ["a", "b"]))

    async def test_it_stays_gone_after_a_restart(self):
        self.engine.create_component(self.CLOCKED)
        await self.engine.handle_message("clocked", "add")
        await self.engine.remove("clocked")
        await self.reopen()
        self.assertEqual((self.engine.status(), self.engine.history("clocked")), ([], []))

    async def test_a_component_that_this_program_has_not_loaded_is_removed(self):
        self.engine.create_component(self.CLOCKED)
        await self.reopen()
        await self.engine.remove("clocked")
        self.assertEqual(self.engine.status(), [])

    async def test_another_engine_learns_that_it_is_gone(self):
        other = self.open()
        self.engine.create_component(self.CLOCKED)
        await self.engine.run(until_idle=True)
        component = other.get("clocked")
        await self.engine.remove("clocked")
        said = []
        for kind in ("add", "add", "nonsense"):
            with self.assertRaises(StateError) as caught:
                await other.handle_message("clocked", kind, id="x")
            said.append(caught.exception.what)
        self.assertEqual(said,
            ["Component 'clocked' is gone", *["Unknown component: 'clocked'"] * 2])
        with self.assertRaises(StateError) as caught:
            await component.update_rules([])
        self.assertEqual(str(caught.exception),
            "Component 'clocked' is gone\nWhy: it was removed")

    async def test_another_engine_goes_on_with_one_that_was_made_anew_meanwhile(self):
        """It knows the old one, with as many messages behind it as the new one has."""
        other = self.open()
        self.engine.create_component(self.CLOCKED)
        await self.engine.handle_message("clocked", "add")
        other.get("clocked")
        await self.engine.remove("clocked")
        self.engine.create_component({**self.CLOCKED, "data": {"n": 10}})
        await self.engine.handle_message("clocked", "add")
        receipt = await other.handle_message("clocked", "add")
        self.assertEqual((receipt.seq, receipt.data), (2, {"n": 12}))
        await self.reopen()
        data = [row["data"] for row in self.engine.history("clocked")]
        self.assertEqual(data, [{"n": 12}, {"n": 11}, {"n": 10}])


class BackingUp(StoreCase):
    """`backup`: a copy that is a store by itself."""

    async def failure(self, engine, path):
        with self.assertRaises(FlexiFlowError) as caught:
            await engine.backup(path)
        return str(caught.exception)

    @unittest.skipIf(os.name == "nt", "Windows has no fsync of a folder")
    async def test_the_copy_is_on_disk_before_it_has_its_name_and_then_its_name_is(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        done = []
        fsync, replace = os.fsync, os.replace
        with (
            unittest.mock.patch("os.fsync", lambda *args: (done.append("fsync"), fsync(*args))),
            unittest.mock.patch(
                "os.replace", lambda *args: (done.append("replace"), replace(*args))),
        ):
            await self.engine.backup(self.path("copy.db"))
        self.assertEqual(done, ["fsync", "replace", "fsync"])

    async def test_a_file_that_is_there_is_not_overwritten(self):
        self.engine.create_component(self.LAMP)
        path = self.write("copy.db", "precious")
        self.assertEqual(await self.failure(self.engine, path),
            f"There is a file already: {path!r}\nFix: name a new one")
        self.assertEqual(Path(path).read_text(), "precious")
        self.assertEqual(await self.failure(self.engine, self.path()),
            f"There is a file already: {self.path()!r}\nFix: name a new one")

    async def test_a_memory_engine_has_nothing_to_copy(self):
        self.assertEqual(await self.failure(FlexiFlowEngine(), self.path("copy.db")),
            "This engine keeps no history\nFix: FlexiFlowEngine(store=\"flow.db\")")

    async def test_what_an_earlier_copy_of_that_name_left_behind_is_not_taken_into_it(self):
        self.engine.create_component(self.LAMP)
        for end in ("-wal", "-journal"):
            self.write(f"copy.db{end}", "")
            self.assertEqual(await self.failure(self.engine, self.path("copy.db")),
                f"There is a file already: {self.path('copy.db') + end!r}\nFix: name a new one")
            os.unlink(self.path(f"copy.db{end}"))

    async def test_what_a_killed_backup_left_is_swept_away(self):
        self.engine.create_component(self.LAMP)
        self.write(".copy.db.4711.tmp", "half")
        os.utime(self.path(".copy.db.4711.tmp"), (0, 0))
        ff._sweep.cache_clear()
        await self.engine.backup(self.path("copy.db"))
        self.assertEqual([name for name in os.listdir(self.folder) if "copy" in name], ["copy.db"])

    async def test_a_folder_that_is_missing_is_an_error_and_leaves_nothing(self):
        self.engine.create_component(self.LAMP)
        path = self.path("missing/copy.db")
        self.assertEqual(await self.failure(self.engine, path),
            f"Store {self.path()!r} failed\nWhy: OperationalError: unable to open database file\n"
            "Fix: check the path, and that the folder is writable")
        self.assertEqual(os.listdir(self.folder), ["flow.db"] if not self.engine.queue._connection
            else sorted(os.listdir(self.folder)))

    async def test_a_copy_that_fails_leaves_no_file_behind(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        before = sorted(os.listdir(self.folder))
        os_replace = os.replace
        self.addCleanup(setattr, os, "replace", os_replace)

        def fail(*args):
            raise OSError(28, "No space left on device")

        os.replace = fail
        answer = await self.failure(self.engine, self.path("copy.db"))
        os.replace = os_replace
        self.assertEqual(answer.splitlines()[0], f"Store {self.path()!r} failed")
        self.assertEqual(sorted(os.listdir(self.folder)), before)

    async def test_the_copy_opens_by_itself_and_goes_on(self):
        self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press", id="x")
        await self.engine.send("lamp", "press", id="y")
        await self.engine.send("lamp", "drop", id="z", delay=60)
        await self.engine.backup(Path(self.path("copy.db")))
        before = self.engine.status(), self.engine.history()
        await self.engine.handle_message("lamp", "press")
        for name in os.listdir(self.folder):
            if not name.startswith("copy"):
                os.unlink(self.path(name))
        self.assertEqual(os.listdir(self.folder), ["copy.db"])
        copy = FlexiFlowEngine(self.path("copy.db"), clock=self.clock)
        self.addAsyncCleanup(copy.close)
        after = copy.status(), copy.history()
        again = await copy.handle_message("lamp", "press", id="x")
        await copy.run(until_idle=True)
        self.clock.now += 60
        await copy.run(until_idle=True)
        self.assertEqual((after, again.duplicate), (before, True))
        self.assertEqual((copy.get("lamp").state, copy.get("lamp").seq), ("Broken", 3))

    async def test_what_is_being_committed_is_in_the_copy_whole_or_not_at_all(self):
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        self.patch("SLOW_COMMIT", -1.0)

        def commit(execute):
            entered.set()
            leave.wait(30)
            execute("ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")

        import threading

        entered, leave = threading.Event(), threading.Event()
        store = self.engine.store
        store._connection = Wrapped(store.db, commit)
        task = asyncio.ensure_future(self.engine.handle_message("lamp", "press"))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        copying = asyncio.ensure_future(self.engine.backup(self.path("copy.db")))
        await self.passes()
        leave.set()
        await asyncio.wait([task, copying])
        copy = FlexiFlowEngine(self.path("copy.db"))
        self.addAsyncCleanup(copy.close)
        self.assertIsInstance(task.exception(), PersistenceError)
        self.assertEqual([(one["state"], one["seq"]) for one in copy.status()], [("Off", 0)])

    async def test_a_store_that_another_process_writes_is_copied_at_one_moment(self):
        self.engine.create_component(self.COUNTER)
        await self.engine.run(until_idle=True)
        child = self.start("""
            import asyncio
            from flexiflow import FlexiFlowEngine
            async def main():
                engine = FlexiFlowEngine("flow.db")
                for n in range(400):
                    await engine.handle_message("counter", "add", by=1)
                    if n == 20:
                        print("begun", flush=True)
                await engine.close()
            asyncio.run(main())
            """)
        child.stdout.readline()
        await self.engine.backup(self.path("copy.db"))
        self.assertEqual(child.wait(60), 0)
        copy = FlexiFlowEngine(self.path("copy.db"))
        self.addAsyncCleanup(copy.close)
        (facts,) = copy.status()
        self.assertEqual((facts["data"]["n"], len(copy.history())), (facts["seq"],
            facts["seq"] + 1))
        self.assertGreater(facts["seq"], 20)


class Pruning(StoreCase):
    """`prune`: history is forgotten, never the state, and what is forgotten is said."""

    async def told(self, *ids, name="counter", seconds=10):
        """Handle one message for each id, some seconds apart."""
        for id in ids:
            self.clock.now += seconds
            await self.engine.handle_message(name, "add", by=1, id=id)

    def seqs(self, name="counter"):
        return [row["seq"] for row in self.engine.history(name)][::-1]

    async def failure(self, engine=None, *args, **settings):
        with self.assertRaises(FlexiFlowError) as caught:
            await (engine or self.engine).prune(*args, **settings)
        return str(caught.exception)

    async def test_what_is_no_order_to_prune_is_refused_and_nothing_goes(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b")
        self.assertEqual(await self.failure(),
            "Nothing to prune by\nFix: keep=, older_than= or completed=True")
        for keep in (0, -1, True, 1.5, "2"):
            self.assertEqual(await self.failure(keep=keep),
                f"keep is a whole number from 1: {keep!r}")
        for older_than in (-1, "soon", float("nan"), [], True):
            self.assertEqual(await self.failure(older_than=older_than),
                f"Not a delay: {older_than!r}\n"
                'Fix: seconds, or like "90s", "15m", "2h", "7d"')
        self.assertEqual(await self.failure(None, "contour", keep=1),
            "Unknown component: 'contour'\nFix: did you mean 'counter'?")
        self.assertEqual(await self.failure(FlexiFlowEngine(), keep=1),
            "This engine keeps no history\nFix: FlexiFlowEngine(store=\"flow.db\")")
        self.assertEqual(self.seqs(), [0, 1, 2])

    async def test_the_last_rows_are_kept_and_what_is_forgotten_is_named(self):
        self.engine.create_component(self.COUNTER)
        self.engine.create_component(self.COUNTER, name="other")
        await self.told("a", "b", "c", "d")
        await self.told("z", name="other")
        found = await self.engine.prune(keep=2)
        self.assertEqual(found, {"rows": 3, "of": 7, "components": [],
            "ids": [{"component": "counter", "id": "a"}, {"component": "counter", "id": "b"}]})
        self.assertEqual((self.seqs(), self.seqs("other")), ([3, 4], [0, 1]))

    async def test_a_dry_run_says_the_same_and_changes_nothing(self):
        lamp = {**self.LAMP, "rules": self.LAMP["rules"][3:]}
        self.engine.create_component(self.COUNTER)
        self.engine.create_component(lamp)
        await self.told("a", "b", "c")
        await self.engine.handle_message("lamp", "drop", id="x")
        before = self.picture()
        dry = await self.engine.prune(keep=1, completed=True, dry_run=True)
        after = self.picture()
        real = await self.engine.prune(keep=1, completed=True)
        self.assertEqual((after, dry), (before, real))
        self.assertEqual(real, {"rows": 5, "of": 6, "components": ["lamp"],
            "ids": [{"component": "counter", "id": "a"}, {"component": "counter", "id": "b"},
                {"component": "lamp", "id": "x"}]})

    async def test_the_last_row_stays_however_old_it_is(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b")
        self.clock.now += 86400 * 1000
        found = await self.engine.prune(older_than="1d")
        await self.reopen()
        (facts,) = self.engine.status()
        self.assertEqual((found["rows"], self.seqs(), facts["data"]), (2, [2], {"n": 2}))
        receipt = await self.engine.handle_message("counter", "add", by=5)
        self.assertEqual((receipt.seq, receipt.data), (3, {"n": 7}))

    async def test_rows_older_than_that_go(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b", "c", "d")  # 30, 20, 10 and 0 seconds ago
        found = await self.engine.prune("counter", older_than=15)
        self.assertEqual((self.seqs(), [one["id"] for one in found["ids"]]), ([3, 4], ["a", "b"]))
        self.assertEqual((await self.engine.prune(older_than=15))["rows"], 0)

    async def test_both_conditions_hold_for_what_goes(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b", "c", "d")
        await self.engine.prune(keep=3, older_than=5)
        self.assertEqual(self.seqs(), [2, 3, 4])
        await self.engine.prune(keep=1, older_than="25s")
        self.assertEqual(self.seqs(), [2, 3, 4])

    async def test_a_clock_that_went_back_leaves_no_gap(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a")
        self.clock.now += 3600  # ahead
        await self.told("b")
        self.clock.now -= 7200  # behind
        await self.told("c", "d")
        self.clock.now += 5000
        found = [await self.engine.prune(older_than=3600)]  # c and d, but what is before is not
        self.clock.now += 3600
        found.append(await self.engine.prune(older_than=3600))
        await self.reopen()
        self.assertEqual(([one["rows"] for one in found], self.seqs()), ([0, 2], [2, 3, 4]))

    async def test_completed_components_go_with_all_that_is_theirs(self):
        for name in ("a", "b", "c"):
            self.engine.create_component(self.LAMP, name=name)
        await self.engine.handle_message("a", "drop")
        await self.engine.send("a", "press", id="q", delay=10)
        self.clock.now += 3600
        await self.engine.handle_message("b", "drop", id="x")
        await self.engine.handle_message("c", "press")
        old = await self.engine.prune(completed=True, older_than="30m")
        left = [one["name"] for one in self.engine.status()], self.seqs("b")
        rest = await self.engine.prune(completed=True)
        self.assertEqual((old["components"], left, rest["components"]), (["a"], (["b", "c"],
            [0, 1]), ["b"]))
        self.assertEqual(rest["ids"], [{"component": "b", "id": "x"}])
        self.assertEqual((self.seqs("c"), self.engine.queue.messages("1")), ([0, 1], []))
        self.engine.create_component(self.LAMP, name="a")
        receipt = await self.engine.handle_message("a", "press")
        self.assertEqual((receipt.outcome, receipt.seq), ("moved", 1))

    async def test_completed_alone_prunes_no_history(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b")
        found = await self.engine.prune(completed=True)
        self.assertEqual(found, {"rows": 0, "of": 3, "ids": [], "components": []})

    async def test_one_component_is_pruned_and_no_other(self):
        for name in ("counter", "other"):
            self.engine.create_component(self.COUNTER, name=name)
            await self.told("a", "b", name=name)
        await self.engine.prune("other", keep=1)
        self.assertEqual((self.seqs(), self.seqs("other")), ([0, 1, 2], [2]))

    async def test_a_duplicate_of_a_kept_row_is_answered_truly(self):
        self.engine.create_component(self.LAMP)
        first = [await self.engine.handle_message("lamp", kind, id=id, level=1)
            for id, kind in enumerate_text("press dim drop press")]
        await self.engine.prune(keep=2)
        again = [await self.engine.handle_message("lamp", kind, id=id, level=1)
            for id, kind in enumerate_text("press dim drop press")[2:]]
        self.assertEqual([one._replace(data=None, duplicate=False) for one in again],
            [one._replace(data=None) for one in first[2:]])
        self.assertEqual([(one.duplicate, one.data) for one in again],
            [(True, {"n": 1, "dim": True})] * 2)

    async def test_a_duplicate_whose_data_is_pruned_does_not_invent_it(self):
        self.engine.create_component(self.machine(
            {"on": "set", "assign": {"n": "$message.n"}}, {"on": "look"}, data={"n": 0}))
        for id, kind in enumerate_text("set look set look"):
            await self.engine.handle_message("m", kind, n=int(id) + 1, id=id)
        await self.engine.prune(keep=3)
        again = [await self.engine.handle_message("m", kind, n=int(id) + 1, id=id)
            for id, kind in enumerate_text("set look set look")[1:]]
        self.assertEqual([(one.seq, one.duplicate, one.data) for one in again],
            [(2, True, None), (3, True, {"n": 3}), (4, True, {"n": 3})])

    async def test_a_forgotten_id_is_handled_again(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b")
        await self.engine.prune(keep=1)
        receipts = [await self.engine.handle_message("counter", "add", by=1, id=id)
            for id in ("b", "a")]
        self.assertEqual([(one.seq, one.duplicate) for one in receipts], [(2, True), (3, False)])

    async def test_another_engine_goes_on_after_a_prune(self):
        other = self.open()
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b")
        other.get("counter")
        await self.engine.prune(keep=1)
        receipt = await other.handle_message("counter", "add", by=1, id="c")
        await self.told("d")
        self.assertEqual((receipt.seq, self.seqs()), (3, [2, 3, 4]))

    async def test_a_component_made_anew_meanwhile_is_not_pruned(self):
        other = self.open()
        for settings, left in (({"keep": 1}, [1]), ({"completed": True}, [0, 1])):
            with self.subTest(settings):
                self.engine.create_component(self.LAMP)
                for kind in ("press", "dim", "drop"):
                    await self.engine.handle_message("lamp", kind, level=1)

                async def later(*values, write=self.engine.store.write):
                    await other.remove("lamp")
                    other.create_component(self.LAMP)
                    await other.handle_message("lamp", "press", id="new")
                    return await write(*values)

                with unittest.mock.patch.object(self.engine.store, "write", later):
                    found = await self.engine.prune(**settings)
                self.assertEqual((found, other.history("lamp")[0]["id"], self.seqs("lamp")), (
                    {"rows": 2 - len(left), "of": 2, "ids": [], "components": []}, "new", left))
                await other.remove("lamp")

    async def test_nothing_is_pruned_by_a_number_that_is_damaged(self):
        self.engine.create_component(self.COUNTER)
        await self.told("a", "b", "c", "d")
        for seq in (99_999_999, "text"):
            self.change("UPDATE flexiflow_journal SET seq=? WHERE message_id='c'", seq)
            before = self.rows("SELECT * FROM flexiflow_journal")
            for settings in ({"keep": 2}, {"older_than": 5}):
                found = None
                with self.subTest(seq=seq, **settings):
                    with contextlib.suppress(PersistenceError):
                        found = await self.engine.prune(**settings)
                    self.assertEqual((found and found["rows"], self.rows(
                        "SELECT * FROM flexiflow_journal")), (None if seq != "text" else 0, before))

    async def test_a_component_that_works_is_pruned_meanwhile(self):
        path, begun, go = self.waiting()
        self.engine.create_component(self.machine({"on": "note"}, {"on": "go", "to": "B",
            "action": path}))
        for _ in range(3):
            await self.engine.handle_message("m", "note")
        task = asyncio.ensure_future(self.engine.handle_message("m", "go", id="x"))
        await begun.wait()
        await self.engine.prune(keep=1)
        go.set()
        receipt = await task
        await self.reopen()
        self.assertEqual((receipt.seq, self.seqs("m")), (4, [3, 4]))


def enumerate_text(words):
    """Return (id, word) of each word: ids count from "0"."""
    return [(str(number), word) for number, word in enumerate(words.split())]


class Replaying(StoreCase):
    """`replay`: history decided again, by the same definitions or by another config."""

    ORDER = {
        "name": "order", "initial_state": "Open", "data": {"total": 0},
        "states": {"Open": {}, "Paid": {}, "Late": {}, "Closed": {"final": True}},
        "rules": [
            {"from": "Open", "on": "add", "assign": {"total":
                {"+": ["$data.total", "$message.price"]}}},
            {"from": "Open", "on": "pay", "guard": {"amount": {">=": "$data.total"}}, "to": "Paid"},
            {"from": "Open", "after": "1h", "to": "Late"},
            {"from": ["Paid", "Late"], "on": "close", "to": "Closed"},
        ],
    }  # fmt: skip

    async def story(self, *steps, name="order"):
        """Handle messages, each (type, fields), and let some time pass where a number stands."""
        for step in steps:
            if isinstance(step, (int, float)):
                self.clock.now += step
                await self.engine.run(until_idle=True)
            else:
                kind, fields = step if isinstance(step, tuple) else (step, {})
                await self.engine.handle_message(name, kind, **fields)

    def replayed(self, config=None, name="order"):
        (answer,) = self.engine.replay(name, config)
        return answer

    def rules(self, *changes):
        """Return the config with rules replaced: (index, changed keys)."""
        rules = [dict(rule) for rule in self.ORDER["rules"]]
        for index, changed in changes:
            rules[index].update(changed)
        return {**self.ORDER, "rules": rules}

    PAID = ("add", {"price": 5}), ("add", {"price": 2}), ("pay", {"amount": 1}), (
        "pay", {"amount": 7}), "close", "add"

    async def test_who_is_about_to_be_updated_has_its_history(self):
        self.engine.create_component(self.ORDER)
        await self.story(*self.PAID)
        self.engine.create_component(self.rules((0, {"on": "put"})), update=True)
        rows = (await self.engine.prune("order", keep=1, dry_run=True))["rows"]
        self.assertEqual((self.replayed()["steps"], rows), (6, 6))

    async def test_what_is_not_there_to_be_replayed_is_an_error(self):
        self.engine.create_component(self.ORDER)
        await self.engine.run(until_idle=True)
        table = [(self.engine, ("odrer",), "Unknown component: 'odrer'\n"
            "Fix: did you mean 'order'?"),
            (FlexiFlowEngine(), (), "This engine keeps no history\n"
             "Fix: FlexiFlowEngine(store=\"flow.db\")"),
            (self.engine, ("order", self.path("no.json")),
             f"No config file: {self.path('no.json')!r}\nFix: check the path")]
        for engine, args, text in table:
            self.assertEqual(str(self.raises(FlexiFlowError, engine.replay, *args)), text)

    async def test_a_bad_config_is_an_error(self):
        self.engine.create_component(self.ORDER)
        await self.engine.run(until_idle=True)
        rules = self.rules((1, {"to": "Pai"}))
        error = self.raises(ConfigError, self.engine.replay, "order", rules)
        self.assertEqual((error.what, error.fix),
            ("rules[1].to: Unknown state: 'Pai'", "did you mean 'Paid'?"))

    async def test_the_same_history_by_the_same_rules_is_the_same(self):
        self.engine.create_component(self.ORDER)
        await self.story(*self.PAID)
        expected = {"component": "order", "steps": 6, "same": 6, "differences": [],
            "state": "Closed", "would_be": "Closed", "skipped": None}
        before = self.picture()
        self.assertEqual(self.replayed(), expected)
        self.assertEqual(self.replayed(self.ORDER), expected)
        self.assertEqual(self.replayed(self.write("order.json", self.ORDER)), expected)
        self.assertEqual(self.picture(), before)

    async def test_the_first_step_that_differs_is_named_and_all_after_it(self):
        self.engine.create_component(self.ORDER)
        await self.story(*self.PAID)
        free = self.rules((1, {"guard": {"amount": {">": 0}}}))  # what is too little is enough
        self.assertEqual(self.replayed(free), {
            "component": "order", "steps": 6, "same": 2, "state": "Closed", "would_be": "Closed",
            "skipped": None, "differences": [
                {"seq": 3, "message": "pay", "was": ["blocked", "Open", "Open"],
                 "now": ["moved", "Open", "Paid"]},
                {"seq": 4, "message": "pay", "was": ["moved", "Open", "Paid"],
                 "now": ["ignored", "Paid", "Paid"]},
                {"seq": 5, "message": "close", "was": ["moved", "Paid", "Closed"],
                 "now": ["moved", "Paid", "Closed"]},
                {"seq": 6, "message": "add", "was": ["ignored", "Closed", "Closed"],
                 "now": ["ignored", "Closed", "Closed"]}]})

    async def test_a_step_that_differs_only_in_the_data_differs(self):
        self.engine.create_component(self.ORDER)
        await self.story(("add", {"price": 5}), ("pay", {"amount": 9}))
        dear = self.rules((0, {"assign": {"total": {"+": ["$data.total", 1]}}}))
        answer = self.replayed(dear)
        self.assertEqual(answer["differences"], [
            {"seq": 1, "message": "add", "was": ["stayed", "Open", "Open", {"total": 5}],
             "now": ["stayed", "Open", "Open", {"total": 1}]},
            {"seq": 2, "message": "pay", "was": ["moved", "Open", "Paid", {"total": 5}],
             "now": ["moved", "Open", "Paid", {"total": 1}]}])

    async def test_true_instead_of_one_is_a_difference(self):
        config = self.machine({"on": "set", "assign": {"n": 1}})
        self.engine.create_component(config)
        await self.engine.handle_message("m", "set")
        (answer,) = self.engine.replay(
            config=self.machine({"on": "set", "assign": {"n": True}}))
        self.assertEqual(repr([(one["was"][3], one["now"][3]) for one in answer["differences"]]),
            "[({'n': 1}, {'n': True})]")

    async def test_a_component_that_would_be_elsewhere_is_told(self):
        for name in ("a", "b", "c"):
            self.engine.create_component(self.ORDER, name=name)
        await self.engine.run(until_idle=True)
        await self.story(("pay", {"amount": 0}), "close", name="a")
        await self.story(("pay", {"amount": 9}), name="b")
        strict = self.rules((1, {"guard": {"amount": {">": 5}}}))
        found = [(one["component"], one["same"], one["steps"], one["state"], one["would_be"])
            for one in self.engine.replay(config=strict)]
        self.assertEqual(found, [("a", 0, 2, "Closed", "Open"), ("b", 1, 1, "Paid", "Paid"),
            ("c", 0, 0, "Open", "Open")])

    async def test_a_state_that_the_other_config_does_not_have_is_gone(self):
        self.engine.create_component(self.ORDER)
        await self.story(("add", {"price": 1}))
        answer = self.replayed({"name": "order", "initial_state": "New", "states": {"New": {}},
            "rules": [{"on": "add"}]})
        self.assertEqual((answer["differences"], answer["would_be"]), ([
            {"seq": 1, "message": "add", "was": ["stayed", "Open", "Open", {"total": 1}],
             "now": ["gone", "Open", "Open", {"total": 0}]}], "Open"))

    async def test_a_step_that_fails_by_the_other_config_is_told(self):
        self.engine.create_component(self.ORDER)
        await self.story(("add", {"price": 1}))
        answer = self.replayed(self.rules((0, {"assign": {"total": "$message.weight"}})))
        self.assertEqual(answer["differences"][0]["now"],
            ["failed", "Open", "Open", {"total": 0}])

    async def test_a_renamed_state_is_no_difference_where_the_config_says_so(self):
        self.engine.create_component(self.ORDER)
        await self.story(*self.PAID[:4], "close")
        text = json.dumps(self.ORDER).replace('"Paid"', '"Settled"').replace('"Open"', '"New"')
        other = {**json.loads(text), "renamed": {"Paid": "Settled", "Open": "New"}}
        answer = self.replayed(other)
        self.assertEqual((answer["same"], answer["steps"], answer["differences"]), (5, 5, []))
        plain = self.replayed({**other, "renamed": {}})
        self.assertEqual(plain["same"], 0)

    async def test_timers_are_replayed(self):
        self.engine.create_component(self.ORDER)
        await self.engine.run(until_idle=True)
        await self.story(3600, "close")
        self.assertEqual((self.replayed()["same"], self.replayed()["steps"]), (2, 2))
        answer = self.replayed(self.rules((2, {"guard": {"data.total": {">": 0}}})))
        self.assertEqual([one["now"] for one in answer["differences"]],
            [["blocked", "Open", "Open"], ["ignored", "Open", "Open"]])

    TWINS = [
        {"from": "A", "after": 10, "guard": {"data.x": 1}, "to": "B"},
        {"from": "A", "after": 10, "to": "C"}, {"from": ["B", "C"], "on": "back", "to": "A"},
        {"on": "set", "assign": {"x": 1}}, {"from": "*", "on": "*"},
    ]  # fmt: skip

    async def test_timers_of_equal_delay_are_told_apart(self):
        self.engine.create_component(self.machine(*self.TWINS, states="ABC", name="order"))
        await self.story(10, "back", "set", 10)
        self.assertEqual((self.engine.get("order").state, self.replayed()["differences"],
            self.replayed()["steps"]), ("B", [], 5))

    async def test_timers_of_equal_delay_are_told_apart_after_the_rules_were_changed(self):
        component = self.engine.create_component(
            self.machine(*self.TWINS, states="ABC", name="order"))
        await self.engine.run(until_idle=True)
        await component.update_rules([{"on": "first"}, *self.TWINS], replace=True)
        await self.story(10, "back", "set", 10)
        found = self.engine.get("order").state, self.replayed()["differences"]
        self.assertEqual(found, ("B", []))
        other = self.machine({"on": "zero"}, {"on": "first"}, *self.TWINS, states="ABC")
        self.assertEqual(self.replayed(other)["differences"], [])

    async def test_a_timer_that_was_given_back_after_its_state_was_left_is_the_same(self):
        fail = [True]

        def ring(message, component):
            if fail:
                raise ValueError("no bell")

        rules = [{"from": "A", "after": 10, "to": "B", "action": self.code(ring)},
            {"from": "A", "on": "leave", "to": "C"}, {"from": "C", "after": 10, "to": "B"},
            {"on": "*"}]
        component = self.engine.create_component(self.machine(
            *rules, states="ABC", name="order", retry={"max_attempts": 1}))
        await self.engine.run(until_idle=True)
        await self.story(10)
        rules[0] = {"from": "A", "after": 10, "to": "B"}
        fail.clear()
        await self.story("leave")
        await self.engine.redrive()
        await self.story(0)
        pure = self.machine(*rules, states="ABC", name="order", retry={"max_attempts": 1})
        self.assertEqual((component.state, self.engine.history("order")[0]["outcome"]),
            ("C", "ignored"))
        self.assertEqual(self.replayed(pure)["differences"], [])

    async def test_rules_that_were_changed_hold_from_there_on(self):
        component = self.engine.create_component(self.ORDER)
        await self.story(("add", {"price": 5}), ("pay", {"amount": 1}))
        await component.update_rules(
            self.rules((1, {"guard": {"amount": {">": 0}}}))["rules"], replace=True)
        await self.story(("pay", {"amount": 1}), "close")
        self.assertEqual(self.replayed(), {"component": "order", "steps": 4, "same": 4,
            "differences": [], "state": "Closed", "would_be": "Closed", "skipped": None})
        answer = self.replayed(self.ORDER)  # as if they had never been changed
        self.assertEqual(([one["seq"] for one in answer["differences"]], answer["would_be"]),
            ([4, 5], "Open"))

    async def test_states_that_were_renamed_are_followed(self):
        component = self.engine.create_component(self.ORDER)
        await self.story(("pay", {"amount": 1}))
        text = json.dumps(self.ORDER).replace('"Paid"', '"Settled"')
        self.engine.create_component({**json.loads(text), "renamed": {"Paid": "Settled"}},
            update=True)
        await self.story("close")
        found = self.replayed()
        self.assertEqual((component.state, found["differences"], found["steps"]),
            ("Closed", [], 2))

    async def test_what_is_left_of_a_pruned_history_is_replayed(self):
        self.engine.create_component(self.ORDER)
        await self.story(*self.PAID)
        await self.engine.prune(keep=5)
        self.assertEqual(self.replayed(), {"component": "order", "steps": 4, "same": 4,
            "differences": [], "state": "Closed", "would_be": "Closed", "skipped": None})
        await self.engine.prune(keep=3)
        self.assertEqual(self.replayed(), {"component": "order", "steps": 0, "same": 0,
            "differences": [], "state": "Closed", "would_be": None,
            "skipped": "what is left of its history begins without its data"})

    async def test_what_is_left_after_rules_were_changed_is_replayed_by_the_right_ones(self):
        component = self.engine.create_component(self.ORDER)
        await self.story(("add", {"price": 5}), ("add", {"price": 5}), ("pay", {"amount": 1}))
        await component.update_rules(
            self.rules((1, {"guard": {"amount": {">": 0}}}))["rules"], replace=True)
        await self.story(("add", {"price": 5}), ("pay", {"amount": 1}))
        await self.engine.prune(keep=5)  # add, blocked, updated, add, moved
        answer = self.replayed()
        self.assertEqual((answer["differences"], answer["skipped"]), ([], None))

    async def test_code_is_not_replayed_and_not_imported(self):
        def act(message, component):
            pass

        speaker = type("Speaker", (State,), {})
        configs = {
            "a": self.machine({"on": "go", "action": self.code(act)}, {"on": "x",
                "guard": "code_of_test:act"}),
            "c": self.machine(states={"Speaker": self.code(speaker)}), "p": self.ORDER,
        }  # fmt: skip
        for name, config in configs.items():
            self.engine.create_component(config, name=name)
        await self.story("go", name="a")
        await self.reopen()
        sys.modules.pop("code_of_test")
        found = [(one["component"], one["steps"], one["skipped"]) for one in self.engine.replay()]
        self.assertEqual(found, [
            ("a", 0, "its definition runs code: code_of_test:act"),
            ("c", 0, None), ("p", 0, None)])
        self.assertNotIn("code_of_test", sys.modules)

    async def test_by_another_config_code_is_not_replayed_either(self):
        self.engine.create_component(self.ORDER)
        await self.story(*self.PAID)
        answer = self.replayed(self.rules((0, {"action": "no.such:thing"})))
        self.assertEqual((answer["steps"], answer["skipped"], answer["would_be"]),
            (0, "its definition runs code: no.such:thing", None))

    async def test_a_hundred_random_steps_are_the_same(self):
        chance = random.Random(5)
        self.engine.create_component(self.machine(
            {"from": "A", "on": "go", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "B.x", "on": "go", "to": "B.y"}, {"from": "B", "on": "back", "to": "A"},
            {"from": "B", "after": 30, "guard": {"data.n": {">": 3}}, "to": "A"},
            {"from": "B.y", "after": 30, "to": "B.x"}, {"from": "B.x", "after": 30, "to": "A"},
            {"from": "A", "on": "note", "guard": {"k": {"<": 3}}, "assign": {"at": "$now",
                "id": "$id", "k": "$message.k"}},
            states={"A": {"entry": {"assign": {"seen": "$state"}}}, "B": {"initial": "B.x"},
                "B.x": {}, "B.y": {}}, data={"n": 0}, name="order",
        ))  # fmt: skip
        for _ in range(120):
            await self.story(chance.randrange(25),
                (chance.choice(["go", "back", "note", "go"]), {"k": chance.randrange(6)}))
        answer = self.replayed()
        self.assertEqual((answer["differences"], answer["would_be"]),
            ([], self.engine.get("order").state))
        self.assertGreater(answer["steps"], 120)


class Renaming(EngineCase):
    """`renamed` in a config: what became of the states that it does not have any more."""

    OLD = {
        "name": "job", "initial_state": "Todo", "data": {"wait": 60, "rings": 0},
        "states": {"Todo": {}, "Doing": {}, "Done": {"final": True}},
        "rules": [
            {"from": "Todo", "on": "start", "to": "Doing"},
            {"from": "Doing", "after": "$data.wait", "assign":
                {"rings": {"+": ["$data.rings", 1]}}},
            {"from": "Doing", "after": 500, "to": "Todo"},
            {"from": "Doing", "on": "wait", "assign": {"wait": "$message.n"}},
            {"on": "finish", "to": "Done"},
        ],
    }  # fmt: skip

    def new(self, **settings):
        """Return the config with another name for Doing."""
        text = json.dumps(self.OLD).replace('"Doing"', '"Active"')
        return {**json.loads(text), "renamed": {"Doing": "Active"}, **settings}

    async def doing(self):
        job = self.engine.create_component(self.OLD)
        await self.engine.handle_message("job", "start")
        self.entered = self.clock.now
        self.clock.now += 10
        return job

    async def update(self, config):
        job = self.engine.create_component(config, update=True)
        await self.engine.run(until_idle=True)
        return job

    def dues(self):
        timers = self.engine.status("job")[0]["timers"]
        return [one["due"] - self.entered for one in timers]

    async def later(self, seconds):
        self.clock.now = self.entered + seconds
        await self.engine.run(until_idle=True)
        (facts,) = self.engine.status("job")
        return facts["state"], facts["data"]["rings"]

    async def test_a_state_that_is_gone_is_refused_with_a_fix(self):
        await self.doing()
        before = self.picture()
        error = self.raises(ConfigError, self.engine.create_component,
            self.new(renamed={}), update=True)
        self.assertEqual(str(error), "State 'Doing' of 'job' would be gone\n"
            "Fix: keep the state, let the component leave it first, or say in the config what"
            ' became of it: "renamed": {"Doing": ...}\nContext:\n  component=\'job\'')
        self.assertEqual(self.picture(), before)

    async def test_a_bad_map_is_refused_with_its_place(self):
        table = [
            ({"Doing": "Actve"}, "renamed.Doing: Unknown state: 'Actve'"),
            ({"Todo": "Active"}, "renamed.Todo: 'Todo' is a state still"),
            ({"Doing": 5}, "renamed.Doing: Not text: 5"),
            (["Doing"], "renamed: Not an object: ['Doing']"),
        ]  # fmt: skip
        for renamed, text in table:
            error = self.raises(ConfigError, self.engine.create_component,
                self.new(renamed=renamed))
            with self.subTest(renamed):
                self.assertEqual(error.what, text)

    async def test_the_component_goes_on_under_the_new_name_without_entering_it(self):
        entered = await self.listen("entered")
        job = await self.doing()
        config = self.new()
        config["states"]["Active"] = {"entry": {"emit": "entered", "assign": {"rings": 100}}}
        await self.update(config)
        (facts,) = self.engine.status("job")
        self.assertEqual((job.state, facts["state"], facts["since"], facts["data"]),
            ("Active", "Active", self.entered, {"wait": 60, "rings": 0}))
        self.assertEqual(entered.take(), [])
        receipt = await self.engine.handle_message("job", "finish")
        self.assertEqual((receipt.from_state, receipt.to_state), ("Active", "Done"))

    async def test_timers_run_on_with_the_due_time_that_they_had(self):
        await self.doing()
        await self.engine.handle_message("job", "wait", n=7)  # for the next time
        await self.update(self.new())
        self.assertEqual(self.dues(), [60, 500])
        found = [await self.later(seconds) for seconds in (59, 60, 499, 500)]
        self.assertEqual(found, [("Active", 0), ("Active", 1), ("Active", 1), ("Todo", 1)])

    async def test_a_timer_that_was_used_up_does_not_start_again(self):
        await self.doing()
        await self.later(60)
        await self.update(self.new())
        self.assertEqual((self.dues(), await self.later(499)), ([500], ("Active", 1)))

    async def test_leaving_the_renamed_state_ends_its_timers(self):
        await self.doing()
        await self.update(self.new())
        await self.engine.handle_message("job", "finish")
        self.assertEqual((self.dues(), await self.later(1000)), ([], ("Done", 0)))

    async def test_a_new_timer_counts_from_the_entry_of_the_old_state(self):
        await self.doing()
        config = self.new()
        config["rules"].append({"from": "Active", "after": 90, "to": "Done"})
        await self.update(config)
        self.assertEqual(sorted(self.dues()), [60, 90, 500])

    async def test_a_parent_is_renamed_with_its_children(self):
        states = {"P": {"initial": "P.a"}, "P.a": {}, "P.b": {}, "End": {}}
        rules = [{"from": "P", "after": 100, "to": "End"}, {"from": "P.a", "on": "go", "to": "P.b"}]
        job = self.engine.create_component(self.machine(*rules, states=states, name="job"))
        await self.engine.run(until_idle=True)
        self.entered = self.clock.now
        self.clock.now += 10
        await self.engine.handle_message("job", "go")
        text = json.dumps(self.machine(*rules, states=states, name="job")).replace('"P', '"Q')
        renamed = {"P": "Q", "P.a": "Q.a", "P.b": "Q.b"}
        await self.update({**json.loads(text), "renamed": renamed})
        self.assertEqual((job.state, job.head.since, self.dues()),
            ("Q.b", {"Q": self.entered, "Q.b": self.entered + 10}, [100]))

    async def test_a_state_that_got_children_is_in_its_initial_child(self):
        await self.doing()
        config = self.new()
        config["states"].update({"Active": {"initial": "Active.x"}, "Active.x": {}})
        config["rules"].append({"from": "Active.x", "after": 30, "to": "Todo"})
        job = await self.update(config)
        self.assertEqual((job.state, job.head.since), ("Active.x",
            {"Active": self.entered, "Active.x": self.entered + 10}))
        self.assertEqual(sorted(self.dues()), [40, 60, 500])
        receipt = await self.engine.handle_message("job", "wait", n=1)
        self.assertEqual(receipt.to_state, "Active.x")

    async def test_what_another_component_became_is_no_matter_of_one_that_is_elsewhere(self):
        job = self.engine.create_component(self.OLD)
        await self.update(self.new())
        await self.engine.handle_message("job", "start")
        self.assertEqual(job.state, "Active")

    async def test_a_dead_timer_given_back_after_the_rules_changed_fires_no_other_rule(self):
        bad = [True]

        def ring(message, component):
            if bad:
                raise ValueError("no bell")

        ring = {"from": "A", "after": 10, "to": "B", "action": self.code(ring)}
        component = self.engine.create_component(
            self.machine(ring, states="ABC", retry={"max_attempts": 1}))
        for rules in ([{"on": "x", "to": "C"}, ring], [{"on": "x", "to": "C"}]):
            bad[:] = [True]
            await component.update_rules([ring], replace=True)
            self.clock.now += 10
            await self.engine.run(until_idle=True)
            dead = len(self.engine.dead_letters())
            await component.update_rules(rules, replace=True)
            bad.clear()
            await self.engine.redrive()
            await self.engine.run(until_idle=True)
            self.assertEqual((dead, component.state), (1, "B" if ring in rules else "A"))
            await self.engine.remove("m")
            component = self.engine.create_component(
                self.machine(ring, states="ABC", retry={"max_attempts": 1}))


class RenamingStored(Renaming):
    stored = True

    async def test_another_engine_follows_the_new_name(self):
        await self.doing()
        other = self.open()
        other.get("job")
        await self.update(self.new())
        receipt = await other.handle_message("job", "finish")
        self.assertEqual((receipt.from_state, receipt.to_state), ("Active", "Done"))

    async def test_what_was_renamed_stays_so_after_a_restart(self):
        await self.doing()
        await self.update(self.new())
        await self.reopen()
        self.assertEqual((self.engine.get("job").state, self.dues()), ("Active", [60, 500]))
        self.assertEqual(await self.later(500), ("Todo", 1))


class Adopting(EngineCase):
    """`update=True`: another config is adopted between two messages, or not at all."""

    async def test_the_config_that_is_adopted_is_asked_for_the_next_message(self):
        lamp = self.engine.create_component(self.LAMP)
        await self.engine.handle_message("lamp", "press")
        rules = [*self.LAMP["rules"], {"on": "sing"}]
        config = {**self.LAMP, "rules": rules}
        self.assertIs(self.engine.create_component(config, update=True), lamp)
        receipt = await self.engine.handle_message("lamp", "sing")
        self.assertEqual((receipt.outcome, receipt.seq, lamp.data), ("stayed", 3, {"n": 1}))

    async def midway(self):
        """Return a component, in the middle of a turn that leads from A to B; its end; its task."""
        path, begun, go = self.waiting()
        component = self.engine.create_component(self.machine(
            {"from": "A", "on": "go", "to": "B", "action": path}, {"on": "next"}))
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        return component, go, task

    async def test_an_update_during_a_turn_that_leaves_the_kept_states_is_not_adopted(self):
        lines = self.logged()
        component, go, task = await self.midway()
        other = self.machine({"on": "next", "assign": {"other": True}}, states="AC")
        self.engine.create_component(other, update=True)  # it is in A still
        go.set()
        await task
        receipt = await self.engine.handle_message("m", "next")
        said = [line.split(" ", 2)[2].split(" | ")[0] for line in lines
            if line.startswith("ERROR")]
        self.assertEqual((receipt.outcome, receipt.seq, receipt.data, component.state),
            ("stayed", 2, {}, "B"))
        self.assertEqual((said, len(component.rules)), (["'m' keeps its definition"], 2))
        again = await self.engine.handle_message("m", "next")  # and is not tried again
        self.assertEqual((again.seq, len(said)), (3, 1))

    async def test_an_update_during_a_turn_comes_after_it(self):
        component, go, task = await self.midway()
        self.engine.create_component(
            self.machine({"on": "next", "assign": {"other": True}}), update=True)
        go.set()
        first = await task
        receipt = await self.engine.handle_message("m", "next")
        self.assertEqual((first.seq, receipt.seq, receipt.data, component.state),
            (1, 3, {"other": True}, "B"))

    async def test_of_two_updates_the_last_one_wins_whenever_they_come(self):
        def version(number):
            return self.machine({"on": "note"}, {"on": f"only{number}"})

        for last in (2, 0):
            for passes in range(8):
                component = self.engine.create_component(version(0), name=f"m{last}{passes}")
                await self.engine.handle_message(component.name, "note")
                self.engine.create_component(version(1), name=component.name, update=True)
                task = asyncio.ensure_future(self.engine.handle_message(component.name, "note"))
                await self.passes(passes)
                self.engine.create_component(version(last), name=component.name, update=True)
                receipts = [await task, await self.engine.handle_message(component.name, "note")]
                with self.subTest(last=last, passes=passes):
                    self.assertEqual(([one.outcome for one in receipts], component.rules[1]),
                        (["stayed"] * 2, {"on": f"only{last}"}))

    async def test_a_component_that_is_not_written_yet_is_updated(self):
        self.engine.create_component(self.machine({"on": "go", "to": "B"}, data={"n": 1}))
        component = self.engine.create_component(
            self.machine({"on": "stop", "to": "B"}, data={"n": 2}), update=True)
        receipt = await self.engine.handle_message("m", "stop")
        self.assertEqual((receipt.to_state, component.data), ("B", {"n": 1}))

    async def test_an_adopted_config_brings_its_timers_without_a_message(self):
        component = self.engine.create_component(self.machine({"on": "go"}))
        await self.engine.run(until_idle=True)
        self.clock.now += 10
        timer = {"from": "A", "after": 30, "to": "B"}
        self.engine.create_component(self.machine(timer), update=True)
        found = []
        for seconds in (0, 19, 1):
            self.clock.now += seconds
            await self.engine.run(until_idle=True)
            found.append(component.state)
        self.assertEqual(found, ["A", "A", "B"])

    async def test_an_adopted_config_is_announced(self):
        heard = await self.listen("rules.updated", keys=("component", "rules", "seq"))
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        self.engine.create_component({**self.LAMP, "rules": self.LAMP["rules"][:2]}, update=True)
        await self.engine.run(until_idle=True)
        self.assertEqual(heard.take(), [("lamp", 2, 1)])

    async def test_a_worker_that_runs_adopts_it(self):
        done = asyncio.Event()
        await self.engine.event_bus.subscribe("rules.updated", "test", lambda data: done.set())
        async with self.engine:
            self.engine.create_component(self.LAMP)
            await self.engine.handle_message("lamp", "press")
            await self.passes()
            self.engine.create_component(
                {**self.LAMP, "rules": self.LAMP["rules"][:2]}, update=True)
            await asyncio.wait_for(done.wait(), 10)


class AdoptingStored(Adopting):
    stored = True

    async def test_what_waits_for_an_update_is_shown_as_others_have_left_it(self):
        first, second = self.machine({"on": "go", "to": "B"}), self.machine({"on": "new"})
        other = self.open()
        for config, settings in ((first, {}), (second, {"update": True})):
            for name in "ab":
                self.engine.create_component(config, name=name, **settings)
            if config is first:
                await self.engine.run(until_idle=True)
        await other.handle_message("a", "go")
        await other.remove("b")
        self.assertEqual([(one["name"], one["state"], one["seq"]) for one in self.engine.status()],
            [("a", "B", 1)])
        self.assertEqual((self.engine.replay("a")[0]["steps"],
            (await self.engine.prune("a", keep=1))["rows"]), (1, 1))

    async def test_an_update_that_could_not_be_written_is_not_called_adopted(self):
        first, second = self.machine({"on": "a"}), self.machine({"on": "b"})
        component = self.engine.create_component(first)
        await self.engine.run(until_idle=True)
        self.change("CREATE TRIGGER full BEFORE INSERT ON flexiflow_journal"
            " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END")
        with self.assertRaises(PersistenceError) as caught:
            await self.engine.adopt(second)
        error = caught.exception
        self.assertEqual((error.fix, component.rules),
            ("free some space on the disk; nothing that was acknowledged is lost", [{"on": "a"}]))
        self.change("DROP TRIGGER full")
        await self.engine.run(until_idle=True)
        self.assertEqual(component.rules, [{"on": "b"}])

    async def test_a_good_config_after_a_refused_one_is_registered_without_its_error(self):
        component, go, task = await self.midway()
        self.engine.create_component(self.machine({"on": "go"}, states="A"), update=True)
        go.set()
        await task
        await self.engine.run(until_idle=True)
        self.engine.create_component(self.machine({"on": "new"}), update=True)
        await self.engine.register_async(component)
        self.assertEqual(component.rules, [{"on": "new"}])

    async def test_an_action_may_adopt_a_config_for_its_own_component(self):
        async def act(message, component):
            return await self.engine.adopt(self.machine({"on": "new"}))

        component = self.engine.create_component(
            self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.handle_message("m", "go")
        await self.engine.handle_message("m", "new")
        self.assertEqual(component.rules, [{"on": "new"}])

    async def test_entries_that_register_others_wait_for_no_strangers(self):
        async def act(message, component):
            other = self.engine.create_component(self.LAMP, name=f"of-{component.name}")
            await asyncio.sleep(0)
            await self.engine.register_async(other)

        config = self.machine(states={"A": {"entry": {"action": self.code(act)}}})
        lines, names = self.logged(), ["a", "b"]
        await asyncio.wait_for(asyncio.gather(*[self.engine.register_async(
            self.engine.create_component(config, name=name)) for name in names]), 10)
        self.assertEqual(([line for line in lines if not line.startswith("DEBUG")],
            [one["seq"] for one in self.engine.status()]), ([], [0] * 4))

    async def test_a_damaged_component_does_not_keep_others_from_following(self):
        first, second = self.machine({"on": "a"}), self.machine({"on": "b"})
        for name in ("m", "a", "b"):
            self.engine.create_component(first, name=name)
        await self.engine.run(until_idle=True)
        self.change("UPDATE flexiflow_components SET data='{}' || ' ' WHERE name='a'")
        with self.assertRaises(PersistenceError) as caught:
            await self.engine.adopt(second)
        error = caught.exception
        self.assertEqual((error.what, self.engine.get("m").rules, self.engine.get("b").rules),
            (f"Store {self.path()!r} is damaged: component 'a'", [{"on": "b"}], [{"on": "b"}]))

    async def test_registering_tells_that_an_update_was_refused_at_the_end_of_a_turn(self):
        component, go, task = await self.midway()
        self.engine.create_component(self.machine({"on": "go"}, states="A"), update=True)
        register = asyncio.ensure_future(self.engine.register_async(component))
        await self.passes()
        go.set()
        await task
        with self.assertRaises(ConfigError) as caught:
            await register
        error = caught.exception
        self.assertEqual(error.what, "State 'B' of 'm' would be gone")

    async def test_a_timer_that_cannot_begin_now_is_refused_and_stops_nobody(self):
        old = self.machine({"on": "go", "assign": {"n": 1}})
        lines = self.logged()
        for after in ("$message.x", "$data.n", "$data.word"):
            new = self.machine({"on": "go", "assign": {"n": 2}},
                {"from": "A", "after": after, "to": "B"}, data={"word": "soon"})
            component = self.engine.create_component(old, name=after, data={"word": "soon"})
            await self.engine.run(until_idle=True)
            with self.assertRaises(ConfigError) as caught:
                await self.engine.update_rules(after, new["rules"], replace=True)
            self.assertEqual(caught.exception.what,
                f"A timer of {after!r} would have to begin now, and cannot")
            self.engine.create_component(new, name=after, update=True)
            receipts = [await self.engine.handle_message(after, "go") for _ in range(2)]
            self.assertEqual(([one.data["n"] for one in receipts], component.rules),
                ([1, 1], old["rules"]))
        self.assertEqual(sum("keeps its definition" in line for line in lines), 3)

    async def test_one_that_is_led_to_a_state_that_there_was_begins_its_timers(self):
        timer = {"from": "B", "after": 10, "to": "C"}
        self.engine.create_component(self.machine(timer, {"on": "go", "from": "Old", "to": "B"},
            states=["Old", "B", "C"]))
        await self.engine.run(until_idle=True)
        self.clock.now += 4
        component = self.engine.create_component(self.machine(timer, states=["B", "C"],
            renamed={"Old": "B"}), update=True)
        await self.engine.run(until_idle=True)
        self.assertEqual([one["due"] - self.clock.now
            for one in self.engine.status("m")[0]["timers"]], [6])
        self.clock.now += 6
        await self.engine.run(until_idle=True)
        self.assertEqual(component.state, "C")

    async def test_whether_it_has_completed_is_as_the_new_config_says(self):
        timers = ({"from": "*", "after": 50, "to": "A"}, {"from": "B", "after": 60, "to": "A"})
        open_, final = ({"states": {"A": {}, "B": body}} for body in ({}, {"final": True}))
        component = self.engine.create_component(self.machine({"on": "go", "to": "B"}, timers[0],
            **open_))
        await self.engine.handle_message("m", "go")
        self.clock.now += 5
        found = []
        for config in (final, open_, final):
            self.engine.create_component(
                self.machine({"on": "go", "to": "B"}, *timers, **config), update=True)
            await self.engine.run(until_idle=True)
            self.clock.now += 5
            found.append((component.completed, len(self.engine.status("m")[0]["timers"])))
            receipt = await self.engine.handle_message("m", "go")
            found.append(receipt.outcome)
        now = self.clock.now
        self.assertEqual(found,
            [(now - 15, 0), "ignored", (None, 2), "moved", (now - 5, 0), "ignored"])
        if self.stored:
            self.assertEqual([one["differences"] for one in self.engine.replay()], [[]])

    async def test_a_timer_that_has_fired_does_not_begin_again_with_other_rules(self):
        timer = {"from": "A", "after": 10, "assign": {"n": {"+": ["$data.n", 1]}}}
        self.engine.create_component(self.machine(timer, data={"n": 0}))
        await self.engine.run(until_idle=True)
        for number in range(3):
            self.clock.now += 20
            await self.engine.run(until_idle=True)
            await self.engine.update_rules("m", [
                {**timer, "description": f"{number}"}, {"on": f"x{number}"}], replace=True)
        self.assertEqual([(one["data"], one["timers"]) for one in self.engine.status("m")],
            [({"n": 1}, [])])

    async def test_a_timer_that_is_due_while_its_state_gets_another_name_fires(self):
        begun, go = asyncio.Event(), asyncio.Event()

        async def slow(message, component):
            begun.set()
            await go.wait()

        def config(a, b, **renamed):
            return self.machine({"from": a, "after": 10, "to": b}, {"on": "slow", "action":
                self.code(slow)}, states=[a, b], initial_state=a, renamed=renamed)

        component = self.engine.create_component(config("A", "B"))
        await self.engine.run(until_idle=True)
        await self.engine.send("m", "slow")
        self.clock.now += 10
        task = asyncio.ensure_future(self.engine.run(until_idle=True))
        await begun.wait()  # it has read the timer as well, which comes next
        self.engine.create_component(config("P", "Q", A="P", B="Q"), update=True)
        go.set()
        await task
        self.assertEqual((component.state, self.engine.status("m")[0]["timers"]), ("Q", []))

    async def test_a_timer_of_a_rule_for_several_states_begins_where_renamed_leads(self):
        timer = {"from": ["P", "Q"], "after": 100, "to": "T"}
        states = {"P": {"initial": "P.c"}, "P.c": {}, "Q": {"initial": "Q.c"}, "Q.c": {}, "T": {}}
        self.engine.create_component(self.machine(timer, states=states))
        await self.engine.run(until_idle=True)
        self.clock.now += 10
        states = {"P": {"initial": "P.d"}, "P.d": {}, **dict([*states.items()][2:])}
        self.engine.create_component(
            self.machine(timer, states=states, renamed={"P.c": "Q.c"}), update=True)
        await self.engine.run(until_idle=True)
        (facts,) = self.engine.status("m")
        self.assertEqual((facts["state"], [one["state"] for one in facts["timers"]]),
            ("Q.c", ["Q"]))

    async def test_a_timer_of_a_state_that_is_not_active_any_more_ends(self):
        states = {"P": {"initial": "P.c"}, "P.c": {}, "P.d": {}, "T": {}}
        timer = {"from": "P", "after": 100, "to": "T"}
        self.engine.create_component(self.machine(timer, states=states, initial_state="P"))
        await self.engine.run(until_idle=True)
        self.clock.now += 90
        del states["P.c"]
        component = self.engine.create_component(self.machine(timer, {"on": "in", "to": "P"},
            states={**states, "P": {"initial": "P.d"}}, renamed={"P.c": "T"}), update=True)
        await self.engine.handle_message("m", "in")
        self.assertEqual([one["due"] - self.clock.now
            for one in self.engine.status("m")[0]["timers"]], [100])
        self.clock.now += 50
        await self.engine.run(until_idle=True)
        self.assertEqual(component.state, "P.d")

    async def test_one_whose_state_has_children_by_now_is_replayed_in_the_innermost(self):
        for old in ("S", "Old"):
            self.engine.create_component(self.machine({"on": "note"}, states=[old]), name=old)
            await self.engine.handle_message(old, "note")
            self.engine.create_component(self.machine({"from": "S.a", "on": "note", "to": "S.b"},
                initial_state="S", states={"S": {"initial": "S.a"}, "S.a": {}, "S.b": {}},
                renamed={"Old": "S"}), name=old, update=True)
            receipt = await self.engine.handle_message(old, "note")
            self.assertEqual((receipt.from_state, receipt.to_state), ("S.a", "S.b"))
        self.assertEqual([(one["differences"], one["would_be"]) for one in self.engine.replay()],
            [([], "S.b")] * 2)

    async def test_a_config_that_another_process_has_replaced_is_adopted_again(self):
        first, second = self.machine({"on": "a"}), self.machine({"on": "b"})
        component, other = self.engine.create_component(first), self.open()
        await self.engine.run(until_idle=True)
        other.create_component(second, update=True)
        await other.run(until_idle=True)
        self.engine.create_component(first, update=True)
        await self.engine.run(until_idle=True)
        self.assertEqual((component.rules, component.seq), ([{"on": "a"}], 2))

    async def test_a_timer_that_fails_while_its_rule_gets_another_number_comes_again(self):
        timer = {"from": "A", "after": 10, "to": "B", "assign": {"y": "$data.missing"}}
        settings = {"retry": {"max_attempts": 3, "base_delay": 5, "jitter": 0}}
        self.engine.create_component(self.machine(timer, **settings))
        await self.engine.run(until_idle=True)
        self.clock.now += 10
        other, failed = self.open(), self.engine._failed

        async def later(*failure):
            for rules in ([{"on": "a"}, timer], [{"on": "a"}, {"on": "b"}, timer]):
                await other.update_rules("m", rules, replace=True)
            await failed(*failure)

        with unittest.mock.patch.object(self.engine, "_failed", later):
            await self.engine.run(until_idle=True)
        (row,) = map(self.engine.queue.sealed, self.engine.queue.messages("1"))
        self.assertEqual((row["rule"], row["due"], row["attempts"], row["dead"]),
            (2, self.clock.now + 5, 1, None))
        for _ in range(5):
            self.clock.now += 20
            await self.engine.run(until_idle=True)
        (letter,) = self.engine.dead_letters()
        self.assertEqual((letter["attempts"], letter["error"].split(":")[0]), (3, "StateError"))

    async def test_an_adopted_config_survives_a_restart_and_is_seen_by_others(self):
        other = self.open()
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        other.get("lamp")
        rules = [*self.LAMP["rules"], {"on": "sing"}]
        self.engine.create_component({**self.LAMP, "rules": rules}, update=True)
        await self.engine.run(until_idle=True)
        receipt = await other.handle_message("lamp", "sing")
        await self.reopen()
        self.assertEqual((receipt.outcome, self.engine.get("lamp").rules), ("stayed", rules))

    async def test_two_engines_that_adopt_at_once_both_succeed(self):
        engines = [self.engine, self.open()]
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        for number, engine in enumerate(engines):
            rules = [*self.LAMP["rules"], {"on": f"sing{number}"}]
            engine.create_component({**self.LAMP, "rules": rules}, update=True)
        await asyncio.gather(*[engine.run(until_idle=True) for engine in engines])
        outcomes = [row["outcome"] for row in self.engine.history("lamp")]
        self.assertEqual(outcomes, ["updated", "updated", "created"])
        for engine in engines:
            self.assertEqual((await engine.handle_message("lamp", "press")).outcome, "moved")


class OnceKnown(EngineCase):
    """Bugs that had been known, each with the right answer."""

    class Meter(State):
        def __init__(self):
            self.n, self.log = 0, []

        async def handle_message(self, message, component):
            self.n += 1
            self.log.append(message["type"])
            return True, self

    # ---- attributes of a class

    async def test_attributes_are_put_back_when_a_later_action_fails(self):
        class Leaving(self.Meter):
            async def handle_message(self, message, component):
                await super().handle_message(message, component)
                leaves = message["type"] == "leave"
                return True, component.definition.nodes["B"].create() if leaves else self

        def fail(message, component):
            raise RuntimeError("no")

        states = {"Leaving": self.code(Leaving), "B": {"entry": {"action": self.code(fail)}}}
        component = self.engine.create_component(self.machine(states=states))
        await self.engine.handle_message("m", "count")
        with self.assertRaises(RuntimeError):
            await self.engine.handle_message("m", "leave")
        state = component.state_machine.current_state
        undone = state.n, list(state.log)
        await self.engine.handle_message("m", "count")
        state = component.state_machine.current_state
        self.assertEqual((undone, state.n, state.log), ((1, ["count"]), 2, ["count"] * 2))

    async def test_attributes_are_put_back_when_what_it_sends_cannot_be_saved(self):
        async def answer(state, message, component):
            await self.Meter.handle_message(state, message, component)
            if message["type"] == "bad":
                component.data["bad"] = {1, 2}
            return True, state

        meter = type("Meter", (self.Meter,), {"handle_message": answer})
        component = self.engine.create_component(self.machine(states={"Meter": self.code(meter)}))
        await self.engine.handle_message("m", "count")
        if self.stored:
            with self.assertRaises(PersistenceError):
                await self.engine.handle_message("m", "bad")
            state = component.state_machine.current_state
            self.assertEqual((state.n, component.data), (1, {}))
            await self.engine.handle_message("m", "count")
            self.assertEqual(component.state_machine.current_state.log, ["count"] * 2)

    async def test_attributes_are_put_back_when_the_caller_is_cancelled_at_any_point(self):
        self.engine.create_component(self.machine(states={"Meter": self.code(self.Meter)}))
        for slow in (False, True):
            self.patch("SLOW_COMMIT", -1.0 if slow else ff.SLOW_COMMIT)
            for steps in range(30):
                component, before = self.engine.get("m"), self.engine.get("m").seq
                task = asyncio.ensure_future(self.engine.handle_message("m", "count"))
                await self.passes(steps)
                task.cancel()
                await asyncio.wait([task])
                await self.engine.handle_message("m", "count")
                state = component.state_machine.current_state
                with self.subTest(slow=slow, steps=steps):
                    self.assertIn(component.seq - before, (1, 2))
                    self.assertEqual((state.n, len(state.log)), (component.seq, component.seq))

    # ---- births

    async def test_a_birth_that_is_cancelled_at_any_point_applies_its_data_once(self):
        def enter(message, component):
            component.data["n"] += 1
            component.data["log"].append("entered")

        states = {"A": {"entry": {"assign": {"n": {"+": ["$data.n", 10]}},
            "action": self.code(enter)}}}
        config = self.machine({"on": "go"}, states=states, data={"n": 0, "log": []})
        for slow in (False, True):
            self.patch("SLOW_COMMIT", -1.0 if slow else ff.SLOW_COMMIT)
            for steps in range(25):
                name = f"m{slow}{steps}"
                component = self.engine.create_component(config, name=name)
                task = asyncio.ensure_future(self.engine.handle_message(name, "go", id="x"))
                await self.passes(steps)
                task.cancel()
                await asyncio.wait([task])
                await self.engine.handle_message(name, "go", id="x")
                with self.subTest(slow=slow, steps=steps):
                    self.assertEqual(component.data, {"n": 11, "log": ["entered"]})

    async def test_a_handler_of_what_a_birth_emits_may_send(self):
        async def greet(data):
            answers.append((await self.engine.send("lamp", "press", id="to lamp")).outcome)
            answers.append((await self.engine.handle_message("m", "hello", id="own")).outcome)

        answers = []
        self.engine.create_component(self.LAMP)
        await self.engine.event_bus.subscribe("born", "test", greet)
        states = {"A": {"entry": {"emit": "born", "send": {"to": "lamp", "type": "press"}}}}
        component = self.engine.create_component(
            self.machine({"on": "hello", "assign": {"greeted": True}}, {"on": "go"}, states=states))
        receipt = await self.engine.handle_message("m", "go")
        await self.engine.run(until_idle=True)
        self.assertEqual((answers, receipt.outcome, component.seq, component.data),
            (["queued"] * 2, "stayed", 2, {"greeted": True}))
        self.assertEqual(self.engine.get("lamp").seq, 2)

    # ---- what is sent

    async def test_a_bad_payload_that_a_handler_sends_is_raised_where_it_is_sent(self):
        errors = []

        async def tell(data):
            for call in (self.engine.send("other", "x", what={1}),
                    self.engine.handle_message("lamp", "press", what=object()),
                    self.engine.send("other", "x", what=float("nan"))):
                try:
                    await call
                except PersistenceError as error:
                    errors.append(error.what)
            await self.engine.send("other", "good")

        self.engine.create_component(self.LAMP)
        await self.engine.event_bus.subscribe("state.changed", "test", tell)
        receipt = await self.engine.handle_message("lamp", "press")
        waiting = [row["message"] for row in self.engine.queue.messages("1")]
        self.assertEqual((receipt.seq, waiting), (1, ['{"type":"good"}']))
        self.assertEqual(errors, ["Cannot save message to other", "Cannot save message to lamp",
            "Cannot save message to other"])

    async def test_an_id_that_two_rules_give_to_two_messages_is_an_error(self):
        self.engine.create_component(self.machine(
            {"on": "go", "to": "B", "send": [
                {"to": "other", "type": "t", "id": "x", "with": {"n": n}} for n in (1, 2)]},
            {"on": "same", "send": [{"to": "other", "type": "t", "id": "y"}] * 2}))
        await self.engine.run(until_idle=True)
        with self.assertRaises(StateError) as caught:
            await self.engine.handle_message("m", "go")
        self.assertEqual(str(caught.exception),
            "The id 'x' was used for another message to 'other'\n"
            "Why: an id stands for one message, its type and payload included\n"
            "Fix: send the new message under a new id")
        receipt = await self.engine.handle_message("m", "same")
        ids = [row["id"] for row in self.engine.queue.messages("1")]
        self.assertEqual((receipt.seq, receipt.from_state, ids), (1, "A", ["y"]))

    async def test_a_handler_that_sends_a_taken_id_fails_and_the_message_does_not(self):
        errors = []

        async def tell(data):
            for call in (self.engine.send("other", "x", id="taken", n=2),
                    self.engine.handle_message("m", "own", id="mine", n=2)):
                try:
                    await call
                except StateError as error:
                    errors.append(error.what)

        component = self.engine.create_component(self.machine(
            {"on": "go", "to": "B"}, {"on": "own", "assign": {"n": "$message.n"}}))
        await self.engine.send("other", "x", id="taken", n=1)
        await self.engine.send("m", "own", id="mine", n=1, delay=60)
        await self.engine.event_bus.subscribe("state.changed", "test", tell)
        receipt = await self.engine.handle_message("m", "go")
        self.assertEqual((receipt.outcome, component.seq, errors), ("moved", 1, [
            "The id 'taken' was used for another message to 'other'",
            "The id 'mine' was used for another message to 'm'"]))
        self.clock.now += 60
        await self.engine.run(until_idle=True)
        self.assertEqual(component.data, {"n": 1})

    async def test_what_is_overdue_runs_before_what_is_sent_now(self):
        def act(message, component):
            ran.append(message["n"])

        ran = []
        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        await self.engine.run(until_idle=True)
        for n, delay in ((1, 20), (2, 10)):
            await self.engine.send("m", "go", n=n, delay=delay)
        self.clock.now += 30
        await self.engine.send("m", "go", n=3)
        self.engine.create_component(self.machine(
            {"on": "tell", "send": {"to": "m", "type": "go", "with": {"n": 4}}}, name="teller"))
        await self.engine.handle_message("teller", "tell")
        await self.engine.run(until_idle=True)
        self.assertEqual(ran, [2, 1, 3, 4])

    async def test_a_correlation_id_given_inside_a_turn_is_kept(self):
        async def act(message, component):
            for call, to in ((self.engine.send, "lamp"), (self.engine.handle_message, "m")):
                await call(to, {"type": "press", "correlation_id": f"given to {to}"})
                await call(to, {"type": "press"})

        heard = await self.listen(
            "component.message.received", keys=("component", "correlation_id"))
        self.engine.create_component(self.LAMP)
        self.engine.create_component(
            self.machine({"on": "go", "action": self.code(act)}, {"on": "press"}))
        await self.engine.handle_message("m", {"type": "go", "correlation_id": "outer"})
        await self.engine.run(until_idle=True)
        self.assertEqual(heard.take(), [("m", "outer"), ("m", "given to m"), ("m", "outer"),
            ("lamp", "given to lamp"), ("lamp", "outer")])

    async def test_what_a_task_sends_while_the_holder_handles_own_messages_is_not_lost(self):
        drained, sent, ran = asyncio.Event(), asyncio.Event(), []

        async def later():
            await drained.wait()
            answers.append((await self.engine.handle_message("m", "late", id="l")).outcome)
            answers.append((await self.engine.send("lamp", "press", id="p")).outcome)
            sent.set()

        async def act(message, component):
            ran.append(message["type"])
            if message["type"] == "go":
                tasks.append(asyncio.ensure_future(later()))
            if message["type"] == "own":
                drained.set()
                await sent.wait()

        answers, tasks = [], []
        self.engine.create_component(self.LAMP)
        component = self.engine.create_component(self.machine(
            {"on": "go", "action": self.code(act), "send": {"to": "m", "type": "own"}},
            {"on": ["own", "late"], "action": "code_of_test:act"}))
        await asyncio.wait_for(self.engine.handle_message("m", "go"), 20)
        await self.engine.run(until_idle=True)
        self.assertEqual((answers, ran, component.seq, self.engine.get("lamp").seq),
            (["queued", "queued"], ["go", "own", "late"], 3, 1))

    async def test_a_component_of_its_own_sends_to_itself_only(self):
        rules = [{"on": "start", "send": {"to": "c", "type": "next"}},
            {"on": "next", "assign": {"got": True}},
            {"on": "bad", "send": {"to": "x", "type": "t"}},
            {"on": "late", "send": {"to": "c", "type": "next", "after": 5}}]
        component = AsyncComponent("c", rules, StateMachine.from_name("InitialState"))
        receipt = await component.handle_message({"type": "start"})
        after = component.seq, component.data
        for kind in ("bad", "late"):
            with self.assertRaises(StateError) as caught:
                await component.handle_message({"type": kind})
            self.assertEqual(str(caught.exception),
                "'c' sends or waits without an engine\nFix: engine.register(it)")
        self.assertEqual((receipt.outcome, receipt.seq, after, component.seq),
            ("stayed", 1, (2, {"got": True}), 2))

    # ---- delivery

    async def test_a_message_to_what_is_made_later_is_delivered_as_soon_as_it_is_made(self):
        await self.engine.send("lamp", "press", id="x")
        await self.engine.run(until_idle=True)
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        self.assertEqual(self.engine.get("lamp").seq, 1)

    async def test_a_worker_delivers_what_waited_as_soon_as_its_component_is_made(self):
        done, tried = asyncio.Event(), asyncio.Event()
        await self.engine.event_bus.subscribe("state.changed", "test", lambda data: done.set())
        failed = self.engine._failed

        async def watched(*args):
            await failed(*args)
            tried.set()

        self.engine._failed = watched
        async with self.engine:
            await self.engine.send("lamp", "press", id="x")
            await asyncio.wait_for(tried.wait(), 10)
            self.engine.create_component(self.LAMP)
            await asyncio.wait_for(done.wait(), 10)

    async def test_a_slow_component_does_not_delay_others(self):
        begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def act(message, component):
            begun.set()
            await go.wait()

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        self.engine.create_component(self.LAMP)
        await self.engine.event_bus.subscribe("state.changed", "test", lambda data: done.set())
        for _ in range(ff._BATCH + 10):  # more than is read at a time
            await self.engine.send("m", "go")
        await self.engine.send("lamp", "press")
        worker = asyncio.ensure_future(self.engine.run(until_idle=True))
        await begun.wait()
        await asyncio.wait_for(done.wait(), 10)
        early = self.engine.get("m").seq
        await self.engine.send("lamp", "press")
        while self.engine.get("lamp").seq < 2:
            await asyncio.sleep(0.001)
        go.set()
        await worker
        self.assertEqual((early, self.engine.get("m").seq), (0, ff._BATCH + 10))

    async def test_a_slow_birth_does_not_delay_others(self):
        begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def enter(message, component):
            begun.set()
            await go.wait()

        await self.engine.event_bus.subscribe("state.changed", "test", lambda data: done.set())
        self.engine.create_component(self.LAMP)
        async with self.engine:
            await self.passes()
            self.engine.create_component(
                self.machine({"on": "go"}, states={"A": {"entry": {"action": self.code(enter)}}}))
            await begun.wait()
            await self.engine.send("lamp", "press")
            await asyncio.wait_for(done.wait(), 10)
            go.set()

    async def test_lone_surrogates_are_refused_as_names_ids_and_targets(self):
        self.engine.create_component(self.LAMP)
        component = self.engine.create_component(self.machine(
            {"on": "to", "send": {"to": "$message.to", "type": "t"}},
            {"on": "id", "send": {"to": "x", "type": "t", "id": "$message.to"}},
            {"on": "type", "send": {"to": "x", "type": "$message.to"}}))
        await self.engine.run(until_idle=True)
        before, bad = self.picture(), "a\ud800"
        calls = {
            "name of a component": lambda: AsyncComponent(bad),
            "name of a config": lambda: self.engine.create_component({**self.LAMP, "name": bad}),
            "name given": lambda: self.engine.create_component(self.LAMP, name=bad),
            "handle to": lambda: self.engine.handle_message(bad, "press"),
            "handle type": lambda: self.engine.handle_message("lamp", bad),
            "handle id": lambda: self.engine.handle_message("lamp", "press", id=bad),
            "handle correlation id": lambda: self.engine.handle_message(
                "lamp", {"type": "press", "correlation_id": bad}),
            "send to": lambda: self.engine.send(bad, "press"),
            "send type": lambda: self.engine.send("lamp", bad),
            "send id": lambda: self.engine.send("lamp", "press", id=bad),
            "cancel": lambda: self.engine.cancel("lamp", bad),
            "wait": lambda: self.engine.wait(bad, "On"),
            "status": lambda: self.engine.status(bad),
            "remove": lambda: self.engine.remove(bad),
            **{f"a rule's {kind}": lambda kind=kind: self.engine.handle_message(
                "m", {"type": kind, "to": bad}) for kind in ("to", "id", "type")},
        }  # fmt: skip
        for name, call in calls.items():
            with self.subTest(name):
                try:
                    answer = call()
                    if asyncio.iscoroutine(answer):
                        answer = await answer
                    self.assertIs(answer, False)  # of cancel
                except FlexiFlowError:
                    pass
                self.assertEqual((self.picture(), component.seq), (before, 0))


class OnceKnownStored(OnceKnown):
    stored = True

    async def test_a_component_by_hand_of_a_class_of_its_own_comes_back(self):
        class Mine(State):
            def __init__(self):
                self.n = 0

            async def handle_message(self, message, component):
                self.n += 1
                return True, self

        def by_hand():
            return AsyncComponent("c", [], StateMachine(Mine()))

        sys.modules[__name__].Mine = Mine
        self.addCleanup(delattr, sys.modules[__name__], "Mine")
        Mine.__qualname__ = "Mine"
        await self.engine.register_async(by_hand())
        await self.engine.handle_message("c", "count")
        await self.reopen()
        component = by_hand()
        self.engine.register(component)
        found = component.state, component.state_machine.current_state.n, component.seq
        await self.engine.handle_message("c", "count")
        self.assertEqual((found, component.state_machine.current_state.n), (("Mine", 1, 1), 2))

    async def test_a_database_of_something_else_is_refused_with_a_fix(self):
        self.change("CREATE TABLE theirs(x)")
        for version in (1, 2):
            self.change(f"PRAGMA user_version={version}")
            before = Path(self.path()).read_bytes()
            for readonly in (False, True):
                engine = FlexiFlowEngine(SQLiteStore(self.path(), readonly=readonly))
                error = self.raises(PersistenceError, engine.status)
                with self.subTest(version=version, readonly=readonly):
                    self.assertEqual(str(error), f"Not a store: {self.path()!r}\n"
                        "Why: it is a database of something else\nFix: check the path")
            self.assertEqual(self.rows("SELECT name FROM sqlite_master"), [("theirs",)])
            self.assertEqual(len(Path(self.path()).read_bytes()), len(before))

    async def test_a_worker_goes_on_when_a_full_disk_has_room_again(self):
        full, failed, done = [True], asyncio.Event(), asyncio.Event()
        self.engine.create_component(self.LAMP)
        await self.engine.run(until_idle=True)
        await self.engine.send("lamp", "press")
        lines = self.logged()

        def commit(execute):
            if full:
                execute("ROLLBACK")
                failed.set()
                raise sqlite3.OperationalError("database or disk is full")
            return execute("COMMIT")

        await self.engine.event_bus.subscribe("state.changed", "test", lambda data: done.set())
        store = self.engine.store
        store._connection = Wrapped(store.db, commit)
        async with self.engine:
            await failed.wait()
            await self.passes(50)
            full.clear()
            await asyncio.wait_for(done.wait(), 10)
        self.assertTrue(any("disk is full" in line for line in lines))


# --------------------------------------------------------------------------------------------
# Torture
# --------------------------------------------------------------------------------------------
# What store and engine promise, under kill -9, failing and full disks, damage, clocks that are
# set, and crowds of processes. The quick versions run with all other tests;
# FLEXIFLOW_TORTURE=long runs the long ones, =skip none. With -v, or with that variable set to
# anything, each test prints its figures on one line. What is random is repeated by
# FLEXIFLOW_SEED.

TORTURE = os.environ.get("FLEXIFLOW_TORTURE", "")
LONG = TORTURE == "long"
SEED = int(os.environ.get("FLEXIFLOW_SEED") or random.randrange(1_000_000))
# What the child processes do: python workers.py WHAT WHO ARGUMENTS...
WORKERS = '''
import asyncio, json, logging, os, random, sys, time
from flexiflow import FlexiFlowEngine, SQLiteStore

def note(*what):
    """Add a line to the worker's notes: a kill comes before or after it."""
    os.write(NOTES, (json.dumps(what) + "\\n").encode())

async def go_on(engine):
    while not os.path.exists("stop"):
        await asyncio.sleep(0.02)

async def add(engine, names, by="1"):
    """Send numbered messages, and go on with the first that has no answer in the notes."""
    with open(f"{WHO}.notes") as notes:
        number = len(notes.readlines())
    stop = False
    while not stop:
        stop = os.path.exists("stop")  # after this one: it may have been handled before
        name, start = names[number % len(names)], time.time()
        receipt = await engine.handle_message(name, "add", by=int(by), id=f"{WHO}-{number}")
        note(number, name, receipt.seq, start, time.time())
        number += 1

async def repeat(engine, first, count):
    """Send every third id, and every tenth of all at any time, in any order."""
    chance, ids = random.Random(int(first)), range(int(count))
    mine = [*ids[int(first)::3], *chance.choices(ids, k=len(ids) // 10)]
    for number in chance.sample(mine, len(mine)):
        receipt = await engine.handle_message("a", "add", by=number + 1, id=f"id-{number}")
        note(receipt.id, receipt.duplicate, {**receipt.as_dict(), "duplicate": None})

async def deliver(engine):
    """Deliver until told to stop."""
    note(time.time())
    running = asyncio.ensure_future(engine.run())
    await go_on(engine)
    running.cancel()
    await asyncio.wait([running])

async def drain(engine):
    """Deliver what is there, again and again."""
    while not os.path.exists("stop"):
        await engine.run(until_idle=True)
        await asyncio.sleep(0.002)

async def once(engine):
    """Deliver what is there."""
    await engine.run(until_idle=True)

async def produce(engine, names, count):
    """Send numbered messages, which others deliver; let the queue become empty now and then."""
    for number in range(int(count)):
        while number % 9 == 0 and engine.queue.rows("SELECT 1 FROM flexiflow_messages"):
            await asyncio.sleep(0)
        await engine.send(names[number % len(names)], "add", by=1, id=f"{WHO}-{number:05}")
    note(count)

async def prune(engine):
    """Forget all but the last steps, again and again."""
    while not os.path.exists("stop"):
        note((await engine.prune(keep=50))["rows"])
        await asyncio.sleep(0.01)

async def main(what, *args):
    ahead = float(os.environ.get("AHEAD", "0"))
    store = SQLiteStore("flow.db", os.environ.get("SYNCHRONOUS", "FULL"))
    engine = FlexiFlowEngine(store, clock=lambda: time.time() + ahead)
    await globals()[what](engine, *args)
    await engine.close()

if __name__ == "__main__":
    WHO = sys.argv[2]
    if os.environ.get("QUIET"):  # messages that fail are expected
        logging.getLogger("flexiflow").addHandler(logging.NullHandler())
    NOTES = os.open(f"{WHO}.notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    asyncio.run(main(sys.argv[1], *sys.argv[3:]))
'''


class Torture(StoreCase):
    """Tests with child processes that are killed, and with figures."""

    diskless = False  # true where a real disk would only be slower

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if TORTURE == "skip":
            raise unittest.SkipTest("FLEXIFLOW_TORTURE=skip")

    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0}, "states": {"A": {}, "B": {}},
        "rules": [{"from": source, "on": "add", "to": target, "assign":
            {"n": {"+": ["$data.n", "$message.by"]}}} for source, target in ("AB", "BA")],
    }  # fmt: skip

    def figures(self, text, *values):
        """Print a line of figures for who wants to see them."""
        if TORTURE or {"-v", "--verbose"} & set(sys.argv):
            print(f"{type(self).__name__}: {text.format(*values)}", file=sys.stderr, flush=True)

    def setUp(self):
        super().setUp()
        if self.diskless and os.access("/dev/shm", os.W_OK):
            self.folder = Path(tempfile.mkdtemp(prefix="flexiflow-test-", dir="/dev/shm"))
            self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    async def prepare(self, config, *names, **settings):
        """Make components in the store, by the clock on the wall; return the engine."""
        engine = FlexiFlowEngine(SQLiteStore(self.path(), "NORMAL"))
        for name in names:
            engine.create_component(config, name=name, **settings)
        await engine.run(until_idle=True)
        return engine

    def work(self, *command, **env):
        """Start a worker; what it complains of is added to the file `errors`."""
        if not os.path.exists(self.path("workers.py")):
            self.write("workers.py", WORKERS)
        with open(self.path("errors"), "ab") as errors:
            child = subprocess.Popen(
                [sys.executable, "workers.py", *map(str, command)], cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(HERE), **env}, stderr=errors,
            )  # fmt: skip
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child

    def forked(self, call, *args):
        """Make a call in a child process; return its exit code."""
        pid = os.fork()
        if not pid:
            try:
                call(*args)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def mount(self, options):
        """Mount a file system of its own on the folder `disk`."""
        os.mkdir(self.path("disk"))
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path("disk")]
        if not sys.platform.startswith("linux") or subprocess.run(
                command, capture_output=True).returncode:
            self.skipTest("mounting is not allowed here")
        self.addCleanup(subprocess.run, ["umount", "-l", self.path("disk")])

    def errors(self):
        """Return what workers have complained of."""
        path = Path(self.path("errors"))
        return path.read_text() if path.exists() else ""

    def notes(self, who):
        """Return what a worker has noted."""
        return [*map(json.loads, Path(self.path(f"{who}.notes")).read_text().splitlines())]

    def crowd(self, *commands, kills=0, until, **env):
        """Run workers until `until()`, at least; kill one now and then, and start it again.

        `kills` are a second. Returns how many there were; in the end every worker stops by
        itself, and none has complained.
        """
        chance, killed, start = random.Random(SEED), 0, time.monotonic()
        children = [self.work(*command, **env) for command in commands]
        while not until():
            if time.monotonic() - start > 600:
                self.fail(f"not done after {killed} kills: {self.errors()}")
            if time.monotonic() - start > (killed + chance.random()) / (kills or 1e-9):
                victim = chance.randrange(len(children))
                children[victim].kill()
                children[victim].wait()
                children[victim] = self.work(*commands[victim], **env)
                killed += 1
            time.sleep(0.01)
        Path(self.path("stop")).touch()
        codes = [child.wait(60) for child in children]
        self.assertEqual((codes, self.errors()), ([0] * len(children), ""))
        return killed

    def sound(self):
        """Check the file, and that each component is what its history adds up to."""
        (found,) = self.rows("PRAGMA integrity_check")
        self.assertEqual(found, ("ok",))
        steps = {}
        for step in reversed(self.engine.history()):
            steps.setdefault(step["component"], []).append(step)
        for name, rows in steps.items():
            self.assertEqual([row["seq"] for row in rows], [*range(len(rows))])
            ids = [row["id"] for row in rows]
            self.assertEqual(len(ids), len({*ids}))
            total, state = rows[0]["data"]["n"], rows[0]["to_state"]
            for row in rows[1:]:
                total, before = total + row["message"].get("by", 0), state
                state = "AB"["BA".index(before)] if row["message"]["type"] == "add" else before
                self.assertEqual((row["from_state"], row["to_state"], row["data"]),
                    (before, state, {"n": total}))
            (facts,) = self.engine.status(name)
            self.assertEqual((facts["state"], facts["data"], facts["seq"]),
                (state, {"n": total}, len(rows) - 1))
        return {name: {row["id"]: row["seq"] for row in rows} for name, rows in steps.items()}


class Killed(Torture):
    """kill -9 at any moment: what was acknowledged is there, and nothing is there twice."""

    async def test_writers_that_are_killed_lose_and_repeat_nothing(self):
        await (await self.prepare(self.CONFIG, *"abc")).close()
        seconds = 200 if LONG else 8
        end = time.monotonic() + seconds
        commands = [("add", who, "abc") for who in ("p", "q", "r", "s")]
        kills = self.crowd(*commands, kills=5, until=lambda: time.monotonic() > end)
        found, acknowledged = self.sound(), 0
        for _, who, _ in commands:
            for number, name, seq, *_ in self.notes(who):
                self.assertEqual(found[name][f"{who}-{number}"], seq)
                acknowledged += 1
        stored = sum(len(ids) - 1 for ids in found.values())
        self.figures("{} kills, {} acknowledged, {} stored, 0 lost, 0 twice, {:.0f} a second",
            kills, acknowledged, stored, acknowledged / seconds)
        self.assertEqual(acknowledged, stored)  # in the end, each has had its answer
        self.assertGreaterEqual(kills, 5 * seconds - 1)


class Crowded(Torture):
    """Eight processes at one component: nobody is refused, starved or made to wait for long."""

    NAMES = ("a",)

    async def crowded(self, *more, seconds, until=lambda: True):
        """Let eight processes send for some seconds; return how many each, by its notes."""
        engine = await self.prepare(self.CONFIG, *self.NAMES)
        await engine.close()
        ready, senders = [], [f"w{n}" for n in range(8)]

        def over():
            if not ready and all(os.path.exists(self.path(f"{who}.notes")) for who in senders):
                ready.append(time.monotonic() + seconds)
            return ready and time.monotonic() > ready[0] and until()

        self.crowd(*[("add", who, *self.NAMES) for who in senders], *more, until=over)
        notes = [self.notes(who) for who in senders]
        begin = max(rows[0][3] for rows in notes)
        end = min(rows[-1][4] for rows in notes)
        counts = [sum(begin <= row[4] <= end for row in rows) for rows in notes]
        wait = max(row[4] - row[3] for rows in notes for row in rows)
        self.figures("{} messages of 8 processes in {:.1f} s, {:.0f} a second, fewest {}, most {}, "
            "longest wait {:.2f} s", sum(counts), end - begin, sum(counts) / (end - begin),
            min(counts), max(counts), wait)
        self.assertGreaterEqual(min(counts), 0.02 * sum(counts) / 8)
        self.assertLess(wait, 5)
        return sum(map(len, notes))

    async def test_nobody_is_refused_or_starved(self):
        handled = await self.crowded(seconds=10 if LONG else 2.5)
        self.assertEqual(len(self.sound()["a"]), handled + 1)

    async def test_a_long_reader_hinders_nobody_and_the_log_shrinks_again(self):
        await (await self.prepare(self.CONFIG, *self.NAMES)).close()
        reader = sqlite3.connect(self.path(), isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("BEGIN")
        sql = "SELECT COUNT(*), MAX(number) FROM flexiflow_journal"
        seen, sizes, ended = reader.execute(sql).fetchone(), [], []

        def size():
            return os.path.getsize(self.path("flow.db-wal"))

        def until():
            if not ended:
                with contextlib.closing(sqlite3.connect(self.path(), timeout=60)) as db, db:
                    db.execute("CREATE TABLE theirs AS SELECT zeroblob(80000000)")
                sizes.append(size())
                self.assertEqual(reader.execute(sql).fetchone(), seen)
                reader.execute("COMMIT")
                ended.append(time.monotonic())
            sizes.append(size())
            return time.monotonic() > ended[0] + 10 or sizes[-1] < 64e6

        handled = await self.crowded(seconds=10 if LONG else 1, until=until)
        self.figures("log of {:.1f} MB with the reader, {:.1f} MB after it", sizes[0] / 1e6,
            sizes[-1] / 1e6)
        self.assertLess(sizes[-1], 64e6)
        self.assertEqual(len(self.sound()["a"]), handled + 1)

    async def test_a_pruner_hinders_nobody_and_takes_nothing_that_counts(self):
        handled = await self.crowded(("prune", "pruner"), seconds=10 if LONG else 1)
        pruned = sum(rows for (rows,) in self.notes("pruner"))
        steps = [row["seq"] for row in self.engine.history("a")]
        self.figures("{} steps pruned, {} kept", pruned, len(steps))
        self.assertEqual(steps, [*range(handled, handled - len(steps), -1)])
        self.assertEqual((self.engine.get("a").data, pruned + len(steps)),
            ({"n": handled}, handled + 1))
        self.assertGreater(pruned, 0)


class Produced(Torture):
    """Messages that are sent while others are delivered: each once, and in order."""

    async def test_two_workers_deliver_what_is_sent_meanwhile(self):
        names, count = "abc", 60_000 if LONG else 1_500
        await (await self.prepare(self.CONFIG, *names)).close()
        senders = [("produce", who, names, count) for who in ("p", "q")]

        def over():
            return (all(os.path.exists(self.path(f"{who}.notes")) and self.notes(who)
                for _, who, *_ in senders)
                and self.rows("SELECT COUNT(*) FROM flexiflow_messages") == [(0,)])

        kills = self.crowd(*senders, ("drain", "v"), ("drain", "w"), until=over,
            SYNCHRONOUS="NORMAL")
        found = self.sound()
        self.figures("{} messages sent and delivered, {} kills", 2 * count, kills)
        for which, name in enumerate(names):
            sent = [f"{who}-{number:05}" for _, who, *_ in senders
                for number in range(which, count, len(names))]
            got = sorted((id for id in found[name] if id), key=found[name].get)
            self.assertEqual([sorted(got), *(
                [id for id in got if id[0] == who] for _, who, *_ in senders)],
                [sent, *([id for id in sent if id[0] == who] for _, who, *_ in senders)])


class Resent(Torture):
    """An id is applied once, in whatever order and by whoever it is sent again."""

    async def test_ids_sent_again_by_three_processes_are_applied_once(self):
        count = 100_000 if LONG else 2_000
        await (await self.prepare(self.CONFIG, "a")).close()
        workers = [("repeat", f"w{n}", n, count) for n in range(3)]
        env = {"SYNCHRONOUS": "NORMAL"}
        children = [self.work(*command, **env) for command in workers]
        self.assertEqual(([child.wait(900) for child in children], self.errors()), ([0] * 3, ""))
        answers, applied = {}, []
        for _, who, *_ in workers:
            for id, duplicate, receipt in self.notes(who):
                self.assertEqual(answers.setdefault(id, receipt), receipt)
                applied += [] if duplicate else [id]
        found = self.sound()["a"]
        self.figures("{} ids applied once, {} sent again by 3 processes, each answered as before",
            count, sum(len(self.notes(who)) for _, who, *_ in workers) - count)
        self.assertEqual(sorted(applied), sorted(f"id-{n}" for n in range(count)))
        self.assertEqual({id: one["seq"] for id, one in answers.items()},
            {id: seq for id, seq in found.items() if seq})


class TimersKilled(Torture):
    """Timers fire once, not early, and soon after a start, whoever is killed meanwhile."""

    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0}, "states": {"A": {}, "B": {}},
        "rules": [{"from": "A", "after": "$data.pause", "to": "B",
            "assign": {"n": {"+": ["$data.n", 1]}}}],
    }  # fmt: skip

    async def test_each_timer_fires_once_while_two_workers_are_killed_every_second(self):
        count, chance = 10_000 if LONG else 300, random.Random(SEED)
        engine = FlexiFlowEngine(SQLiteStore(self.path(), "NORMAL"))
        for number in range(count):
            pause = chance.uniform(0, 60 if LONG else 4)
            engine.create_component(self.CONFIG, name=f"c{number}", data={"pause": pause})
        await engine.run(until_idle=True)
        sql = "SELECT component, due FROM flexiflow_messages WHERE state='A'"
        due = dict(self.rows(sql))
        await engine.close()
        kills = self.crowd(("deliver", "a"), ("deliver", "b"), kills=1, SYNCHRONOUS="NORMAL",
            until=lambda: self.rows("SELECT COUNT(*) FROM flexiflow_messages") == [(0,)])
        fired = [step for step in self.engine.history() if step["outcome"] != "created"]
        due.update({step["component"]: due.get(step["component"], step["time"] - step["data"][
            "pause"]) for step in fired})  # those that were over before the list was made
        starts = [at for who in "ab" for (at,) in self.notes(who)]
        early = min(step["time"] - due[step["component"]] for step in fired)
        late = max(step["time"] - max([due[step["component"]], *(
            at for at in starts if at < step["time"])]) for step in fired
            if step["time"] > min(starts))  # not those that came due while all were being made
        self.figures("{} timers fired once, {} kills, the latest {:.2f} s late", len(fired), kills,
            late)
        self.assertEqual(sorted((one["component"], one["seq"], one["data"]["n"]) for one in fired),
            sorted((f"c{number}", 1, 1) for number in range(count)))
        self.assertGreaterEqual(early, 0)
        self.assertLess(late, 2)
        self.assertGreaterEqual(kills, 2)


class Hospital(Torture):
    """The log of examples/sepsis.ndjson by way of the queue, its workers killed all the time."""

    def plain(self, messages):
        """Return what a loop without any engine ends at: states by name, and outcomes."""
        rules = json.loads((EXAMPLES / "sepsis.json").read_text(encoding="utf-8"))["rules"]
        edges = {(source, rule["on"]): rule["to"] for rule in rules for source in (
            [rule["from"]] if isinstance(rule["from"], str) else rule["from"])}
        known, states, outcomes = {kind for _, kind in edges}, {}, Counter()
        for message in messages:
            state, kind = states.get(message["component"], "start"), message["type"]
            outcomes["moved" if (state, kind) in edges else
                "ignored" if kind in known else "unknown"] += 1
            states[message["component"]] = edges.get((state, kind), state)
        return states, outcomes

    async def test_a_hospital_ends_at_the_counts_of_a_plain_loop(self):
        lines = (EXAMPLES / "sepsis.ndjson").read_text(encoding="utf-8").splitlines()
        messages = [json.loads(line) for line in lines]
        states, outcomes = self.plain(messages)
        self.assertEqual(self.summary(states, outcomes), MainJob.SUMMARY.format(""))
        if not LONG:
            names = {*[*states][:250]}
            messages = [message for message in messages if message["component"] in names]
            states, outcomes = self.plain(messages)
        engine = await self.prepare(str(EXAMPLES / "sepsis.json"), *states)
        for start in range(0, len(messages), 500):
            await asyncio.gather(*(engine.send(message["component"], message)
                for message in messages[start:start + 500]))
        await engine.close()
        sql = "SELECT COUNT(*) FROM flexiflow_messages WHERE dead IS NULL"
        kills = self.crowd(
            ("drain", "a"), ("drain", "b"), kills=0.5, SYNCHRONOUS="NORMAL", QUIET="1",
            until=lambda: self.rows(sql) == [(0,)])
        steps = Counter(step["outcome"] for step in self.engine.history())
        facts = self.engine.status()
        steps["unknown"] = sum(one["dead"] for one in facts)
        del steps["created"]
        self.figures("{} messages of {} patients, {} kills: {}", len(messages), len(states), kills,
            dict(steps))
        self.assertEqual(({one["name"]: one["state"] for one in facts}, steps), (states, outcomes))

    @staticmethod
    def summary(states, outcomes):
        """Return the figures in the form of MainJob's, which others have counted."""
        total, counted = sum(outcomes.values()), Counter(states.values()).most_common()
        rows = "".join(f"{state}  {count}\n" for state, count in sorted(
            counted, key=lambda one: (-one[1], one[0])))
        parts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(outcomes.items()))
        whole = f"{total:,} messages to {len(states):,} components: {parts}"
        return f"{whole}\nSTATE  COMPONENTS\n{rows}"


class Poison(Torture):
    """A message that cannot be handled is given up after five attempts, and blocks nobody."""

    RULES = ({"on": "poison", "action": "poison:act"}, {"on": "add", "assign": {"n": 1}})

    async def feed(self, engine):
        """Queue a poisoned message, one behind it, and one to another component."""
        engine.create_component(self.machine(*self.RULES), name="bad")
        engine.create_component(self.machine(self.RULES[1]), name="good")
        await engine.run(until_idle=True)
        for name, kind in (("bad", "poison"), ("bad", "add"), ("good", "add")):
            await engine.send(name, kind, id=f"{name}-{kind}")

    async def check(self, engine, error):
        """Compare what is left: one dead letter, nothing that waits, all else handled."""
        facts = {one["name"]: (one["data"], one["waiting"], one["dead"])
            for one in engine.status()}
        self.assertEqual(facts, {"bad": ({"n": 1}, 0, 1), "good": ({"n": 1}, 0, 0)})
        (letter,) = engine.dead_letters()
        self.assertEqual([letter[key] for key in ("component", "id", "message", "attempts",
            "state")], ["bad", "bad-poison", {"type": "poison"}, 5, "A"])
        self.assertIn(error, letter["error"])
        self.assertEqual(await engine.redrive(letter["number"]), [letter])
        self.assertEqual((engine.dead_letters(), engine.status("bad")[0]["waiting"]), ([], 1))

    async def test_code_that_fails_in_any_way_is_given_up_after_five_attempts(self):
        failures = {"ValueError": ValueError("boom"), "SystemExit": SystemExit(3),
            "CancelledError": asyncio.CancelledError()}
        for error, failure in failures.items():
            with self.subTest(error):
                attempts, rounds = [], 0

                def act(message, component, failure=failure, attempts=attempts):
                    attempts.append(component.name)
                    raise failure

                sys.modules["poison"] = types.SimpleNamespace(act=act, __name__="poison")
                self.addCleanup(sys.modules.pop, "poison", None)
                engine = FlexiFlowEngine(self.path(f"{error}.db"), clock=self.clock)
                self.addAsyncCleanup(engine.close)
                await self.feed(engine)
                while any(one["waiting"] for one in engine.status()):
                    await engine.run(until_idle=True)
                    behind = engine.get("bad").data, engine.get("good").data
                    self.assertEqual(behind, ({"n": 1}, {"n": 1}))
                    self.clock.now += 100
                    rounds += 1
                self.assertEqual((rounds, attempts), (5, ["bad"] * 5))
                await self.check(engine, error)

    async def test_code_that_kills_its_process_is_given_up_after_five_attempts(self):
        self.write("poison.py", "import os\n\ndef act(message, component):\n    os._exit(9)\n")
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        self.addCleanup(sys.modules.pop, "poison", None)
        engine = FlexiFlowEngine(SQLiteStore(self.path(), "NORMAL"))
        self.addAsyncCleanup(engine.close)
        await self.feed(engine)
        await engine.close()
        codes, ahead = [], 0
        while len(codes) < 10 and 0 not in codes:
            ahead += 100  # whatever the dead have claimed is free, and what is tried again is due
            codes.append(self.work("once", "w", AHEAD=str(ahead), QUIET="1").wait(60))
        self.assertEqual((codes, self.errors()), ([9] * 5 + [0], ""))
        await self.check(engine, "process")
        self.assertEqual(self.work("once", "w", AHEAD=str(ahead + 100)).wait(60), 9)


class Fault:
    """Counts the calls that touch the disk; the Nth one fails, or kills the process.

    `late`: a COMMIT, or a call of the system, fails though it has worked; `ever`: all after it
    fail as well. A ROLLBACK never does: SQLite has none that leaves a transaction open. `look()`
    is called after each commit, and what it returns is kept with the number of the call.
    """

    WAYS = {"once": {}, "once, having worked": {"late": True}, "from then on": {"ever": True}}

    def __init__(self, at=0, *, late=False, ever=False, kill=False, look=None, error=None):
        self.at, self.late, self.ever, self.kill, self.look = at, late, ever, kill, look
        self.error = error  # instead of the disk's
        self.calls, self.commits = 0, []

    def call(self, error, function, *args, **settings):
        """Call a function, or not; raise the error if it is to fail."""
        sql = str(args[0]) if args and isinstance(error, sqlite3.Error) else "COMMIT"
        self.calls += 1
        hit = self.at and (self.calls == self.at or (self.ever and self.calls > self.at))
        if hit and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if hit and sql != "ROLLBACK":
            if self.late and sql.endswith("COMMIT"):
                function(*args, **settings)
            raise self.error or error
        result = function(*args, **settings)
        if self.look and sql.endswith("COMMIT"):
            calls, look, self.look = self.calls, self.look, None
            self.commits.append((calls, look()))
            self.calls, self.look = calls, look
        return result

    @contextlib.contextmanager
    def watching(self):
        """Count what sections 9 to 11 do, as long as this lasts."""
        from functools import partial
        from unittest import mock

        sql = partial(self.call, sqlite3.OperationalError("disk I/O error"))
        disk = partial(self.call, OSError(5, "Input/output error"))

        class Connection(sqlite3.Connection):
            def execute(self, *args):
                return sql(super().execute, *args)

            def executescript(self, *args):
                return sql(super().executescript, *args)

        def opened(*args, **settings):
            file = disk(open, *args, **settings)
            file.write, file.flush = partial(disk, file.write), partial(disk, file.flush)
            return file

        calls = {name: partial(disk, getattr(os, name)) for name in (
            "open", "fsync", "replace", "unlink", "makedirs")}
        connect = partial(sqlite3.connect, factory=Connection)
        with mock.patch.multiple(os, **calls), mock.patch.object(ff, "open", opened, create=True), \
                mock.patch.object(sqlite3, "connect", connect):
            try:
                yield
            finally:
                self.at = 0  # the disk works again, also for connections that stay open


class Faults(Torture):
    """The disk fails, or the process dies, at any call: all of it is there, or nothing."""

    diskless = True

    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0}, "states": {"A": {}, "B": {}, "W": {}},
        "rules": [
            {"from": "A", "on": "add", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}},
                "send": {"to": "b", "type": "note", "after": "1h", "with": {"of": "$id"}}},
            {"from": "B", "on": "add", "to": "A", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"on": "wait", "to": "W"}, {"from": "W", "after": 60, "to": "A"}, {"on": "note"},
            {"on": "act", "action": "code_of_test:act"},
        ],
    }  # fmt: skip
    # What is done, each a coroutine function of an engine; done again, it changes nothing.
    OPERATIONS = {
        "create": lambda self, engine: self.created(engine),
        "handle": lambda self, engine: engine.handle_message("a", "add", id="h"),
        "act": lambda self, engine: engine.handle_message("a", "act", id="x"),
        "send": lambda self, engine: engine.send("a", "add", id="s", delay=5),
        "deliver": lambda self, engine: engine.run(until_idle=True, component="a"),
        "fire": lambda self, engine: engine.run(until_idle=True, component="b"),
        "redrive": lambda self, engine: engine.redrive(),
        "prune": lambda self, engine: engine.prune("a", keep=1),
        "cancel": lambda self, engine: engine.cancel("a", "q"),
        "remove": lambda self, engine: self.removed(engine),
    }

    async def created(self, engine):
        engine.create_component(self.CONFIG, name="new")
        await engine.handle_message("new", "add", id="c")

    async def removed(self, engine):
        if any(one["name"] == "b" for one in engine.status()):
            await engine.remove("b")

    async def base(self):
        """Make a store with components, a waiting message, a timer that is due, a dead letter."""
        def act(message, component):
            component.data["acted"] = True

        self.code(act)
        engine = FlexiFlowEngine(SQLiteStore(self.path("base.db"), "NORMAL"), clock=self.clock)
        for name in "ab":
            engine.create_component(self.CONFIG, name=name)
            await engine.handle_message(name, "add", id="1")
        await engine.handle_message("b", "wait", id="2")
        await engine.send("a", "what", id="dead")
        await engine.run(until_idle=True)
        await engine.send("a", "add", id="q")
        await engine.close()
        self.clock.now += 100

    def begin(self):
        """Lay out a fresh copy of the store; return an engine on it."""
        for end in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path() + end)
        shutil.copyfile(self.path("base.db"), self.path())
        return self.engine_here()

    def engine_here(self):
        return FlexiFlowEngine(SQLiteStore(self.path(), "NORMAL"), clock=self.clock)

    def picture(self):
        """Return what the file says, without times, attempts and ids that were made up."""
        with contextlib.closing(SQLiteStore(self.path())) as store:
            heads = [store.head(name) for name in store.names()]
            rows = store.messages("1 ORDER BY number")
            return (
                [[head[key] for key in ("name", "state", "seq", "data")] for head in heads],
                [[step[key] for key in ("component", "seq", "message", "outcome", "to_state",
                    "data")] for step in store.journal()],
                sorted([row["component"], row["message"], row["state"] or "", bool(row["dead"])]
                    for row in rows),
            )  # fmt: skip

    def carried_out(self, name, fault=None, engine=None):
        """Carry out an operation in a loop of its own; return what it was watched by."""
        fault, engine = fault or Fault(), engine or self.engine_here()

        async def run():
            try:
                with fault.watching():
                    await self.OPERATIONS[name](self, engine)
            finally:
                await engine.close()

        asyncio.run(run())
        return fault

    def whole(self, name):
        """Carry out an operation undisturbed; return its number of calls, and each picture.

        The pictures: (call, picture) before the first call and after each commit.
        """
        self.begin()
        before, fault = self.picture(), Fault(look=self.picture)
        self.carried_out(name, fault)
        self.assertGreater(len(fault.commits), 0)
        return fault.calls, [(0, before), *fault.commits]

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_killed_at_any_call_and_again_while_it_starts(self):
        asyncio.run(self.base())
        chance, killed = random.Random(SEED), 0
        for name in self.OPERATIONS:
            with self.subTest(name):
                calls, pictures = self.whole(name)
                for at in range(1, calls + 1):
                    for second in range(1, calls + 1) if LONG else [chance.randint(1, calls)]:
                        with self.subTest(name, at=at, second=second):
                            self.killed_twice(name, pictures, at, second)
                            killed += 2
        self.figures("{} operations, {} kills", len(self.OPERATIONS), killed)

    def killed_twice(self, name, pictures, *kills):
        """Begin an operation until it is killed at a call, again, and carry it out."""
        self.begin()
        code = self.forked(self.carried_out, name, Fault(kills[0], kill=True))
        expected = [picture for call, picture in pictures if call < kills[0]][-1]
        if code == 0:  # a delivery looks at the queue once more, or less, as tasks come to an end
            self.assertGreater(kills[0], pictures[-1][0])
            expected = pictures[-1][1]
        self.assertEqual((code, self.picture()), (code and -signal.SIGKILL, expected))
        self.clock.now += 100  # what the dead have claimed is free again
        code = self.forked(self.carried_out, name, Fault(kills[1], kill=True))
        self.assertIn(code, (0, -signal.SIGKILL))
        self.assertIn(self.picture(), [picture for _, picture in pictures])
        self.clock.now += 100
        self.carried_out(name)
        self.assertEqual(self.picture(), pictures[-1][1])
        self.clock.now -= 200

    def test_failing_at_any_call_it_says_so_and_goes_on(self):
        asyncio.run(self.base())
        failed = 0
        for name in self.OPERATIONS:
            with self.subTest(name):
                calls, pictures = self.whole(name)
                for at, way in itertools.product(range(1, calls + 1), Fault.WAYS):
                    with self.subTest(name, at=at, way=way):
                        self.begin()
                        asyncio.run(self.fails(name, pictures, Fault(at, **Fault.WAYS[way])))
                        failed += 1
        self.figures("{} operations, {} failures", len(self.OPERATIONS), failed)

    async def fails(self, name, pictures, fault):
        """Carry out an operation that fails; then again, in the same engine."""
        engine, error, unheard = self.engine_here(), None, []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: unheard.append(context["message"]))
        try:
            try:
                with fault.watching():
                    await self.OPERATIONS[name](self, engine)
            except FlexiFlowError as problem:
                error = problem
            good = [picture for _, picture in pictures]
            if error is None and name not in ("deliver", "fire"):  # which try again later
                good = good[-1:]
            self.assertIn(self.picture(), good)
            self.clock.now += 100
            await self.OPERATIONS[name](self, engine)
            self.assertEqual(self.picture(), pictures[-1][1])
            for one in engine.components.values():
                await engine.handle_message(one.name, "note")
            heads = {row[0]: row[1:] for row in self.picture()[0]}
            self.assertEqual({one.name: [one.state, one.seq, one.data] for one in
                engine.components.values()}, {name: heads[name] for name in engine.components})
        finally:
            self.clock.now -= 100
            await engine.close()
        self.assertEqual(unheard, [])

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_ctrl_c_at_any_call_ends_the_program_and_harms_nothing(self):
        asyncio.run(self.base())

        def interrupted(name, at):
            async def run():
                async with self.engine_here() as engine:
                    with fault.watching():
                        await self.OPERATIONS[name](self, engine)

            signal.alarm(3)  # kills, if it does not end
            logging.getLogger("asyncio").disabled = True  # which speaks of interrupted tasks
            fault = Fault(at, error=KeyboardInterrupt())
            try:
                asyncio.run(run())
            except KeyboardInterrupt:
                os._exit(2)

        def finished(name):
            self.carried_out(name)
            self.clock.now += 10
            self.carried_out("deliver")
            self.carried_out("fire")
            self.clock.now -= 10
            heads, steps, queue = self.picture()
            return heads, len(steps), len(queue)

        interrupts = 0
        for name in ("handle", "act", "send", "deliver") if LONG else ("act", "deliver"):
            self.begin()
            self.carried_out(name)
            self.clock.now += 100
            expected = finished(name)
            self.clock.now -= 100
            for at in itertools.count(1):
                self.begin()
                code = self.forked(interrupted, name, at)
                self.clock.now += 100
                with self.subTest(name, at=at):
                    self.assertIn(code, (0, 2))
                    self.assertEqual(finished(name), expected)
                self.clock.now -= 100
                interrupts += 1
                if code == 0:
                    break
        self.figures("{} interrupts", interrupts)


class SnapshotFaults(Torture):
    """A JSON file is the old one or the new one, whatever call of its saving fails or kills."""

    diskless = True

    def setUp(self):
        super().setUp()
        self.files = []
        for number in (1, 2):
            ff.save_component(self.component(number), self.path("c.json"))
            self.files.append(Path(self.path("c.json")).read_bytes())
        self.calls = self.saved(Fault()).calls

    @staticmethod
    def component(number):
        snapshot = ff.ComponentSnapshot("c", "InitialState", [], {"number": number})
        return ff.restore_component(snapshot, FlexiFlowEngine())

    def saved(self, fault):
        """Save the second over the first; return what watched it."""
        Path(self.path("c.json")).write_bytes(self.files[0])
        ff._sweep.cache_clear()
        with fault.watching():
            ff.save_component(self.component(2), self.path("c.json"))
        return fault

    def leftovers(self):
        return [name for name in os.listdir(self.folder) if name != "c.json"]

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_killed_at_any_call(self):
        for at in range(1, self.calls + 1):
            with self.subTest(at=at):
                code = self.forked(self.saved, Fault(at, kill=True))
                found, left = Path(self.path("c.json")).read_bytes(), self.leftovers()
                self.assertEqual(code, -signal.SIGKILL)
                self.assertIn(found, self.files)
                self.assertLessEqual(len(left), 1)
                for name in left:
                    os.utime(self.path(name), (1, 1))
                self.saved(Fault())
                self.assertEqual((Path(self.path("c.json")).read_bytes(), self.leftovers()),
                    (self.files[1], []))
        self.figures("{} kills", self.calls)

    def test_failing_at_any_call(self):
        for at, ever in itertools.product(range(1, self.calls + 1), (False, True)):
            with self.subTest(at=at, ever=ever):
                with self.assertRaises(PersistenceError) as caught:
                    self.saved(Fault(at, ever=ever))
                found = Path(self.path("c.json")).read_bytes()
                said = "the old file is untouched" in str(caught.exception)
                self.assertEqual(found, self.files[0] if said else self.files[1])
                self.assertLessEqual(len(self.leftovers()), ever)
                for name in self.leftovers():
                    os.unlink(self.path(name))
                self.saved(Fault())
                self.assertEqual((Path(self.path("c.json")).read_bytes(), self.leftovers()),
                    (self.files[1], []))
        self.figures("{} failures", self.calls * 2)


class FullDisk(Torture):
    """A full disk loses nothing that was acknowledged; with room again, all goes on."""

    async def fill(self, folder, full):
        """Send while `full()` lasts and until it fails, and then without; return the errors."""
        path = str(folder / "flow.db")
        engine = FlexiFlowEngine(path, clock=self.clock)
        self.addAsyncCleanup(engine.close)
        engine.create_component(self.CONFIG, name="a")
        ff.save_component(ff.AsyncComponent("c", []), folder / "c.json", {"n": 1})
        before, errors, acknowledged = (folder / "c.json").read_bytes(), [], []
        with full():
            while len(errors) < 5:
                number = len(acknowledged)
                try:
                    await engine.handle_message("a", "add", by=1, id=f"{number}", pad="x" * 500)
                    acknowledged.append(number)
                except PersistenceError as error:
                    errors.append(error)
            with self.assertRaises(PersistenceError) as caught:
                component = ff.AsyncComponent("c", [])
                ff.save_component(component, folder / "c.json", {"n": "2" * 500_000})
            self.assertEqual((folder / "c.json").read_bytes(), before)
        for number in range(len(acknowledged), len(acknowledged) + 5):
            receipt = await engine.handle_message("a", "add", by=1, id=f"{number}", pad="x" * 500)
            self.assertEqual(receipt.seq, number + 1)
        self.assertEqual([row["id"] for row in engine.history("a")],
            [f"{number}" for number in reversed(range(number + 1))] + [""])
        self.assertEqual(engine.status("a")[0]["data"], {"n": number + 1})
        self.assertEqual(sorted(os.listdir(folder)),
            ["c.json", "flow.db", "flow.db-shm", "flow.db-wal"])
        self.figures("{} acknowledged, {} refused, 0 lost, 5 after it: {}", len(acknowledged),
            len(errors), errors[0].why)
        return [*errors, caught.exception]

    async def test_a_disk_without_room(self):
        self.mount("size=1m")

        @contextlib.contextmanager
        def full():
            Path(self.path("disk/filler")).write_bytes(bytes(600_000))
            yield
            os.unlink(self.path("disk/filler"))

        *errors, last = await self.fill(self.folder / "disk", full)
        self.assertEqual({(error.why, error.fix) for error in errors}, {(
            "OperationalError: database or disk is full", "the outcome is unknown: repeat with the"
            " same id; free some space on the disk; nothing that was acknowledged is lost")})
        self.assertEqual((last.why, last.fix),
            ("[Errno 28] No space left on device", "the old file is untouched"))

    @unittest.skipIf(os.name == "nt", "no resource limits here")
    async def test_a_file_that_may_not_grow(self):
        import resource

        @contextlib.contextmanager
        def full():
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        *errors, last = await self.fill(self.folder, full)
        self.assertEqual(last.why, "[Errno 27] File too large")


class TornWrites(Torture):
    """Killed in the middle of any of SQLite's own writes, the file is as after some commit."""

    diskless = True

    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "no resource limits here")
    def test_killed_within_a_write_it_goes_on_after_what_was_acknowledged(self):
        import resource

        def write(limit, pipe):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which kills
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            asyncio.run(send(lambda number: os.write(pipe, bytes([number]))))

        async def send(done=lambda number: None):
            engine = FlexiFlowEngine(self.path(), clock=self.clock)
            engine.create_component(self.CONFIG, name="a")
            for number in range(20):
                await engine.handle_message("a", "add", by=1, id=f"{number}")
                done(number)
            await engine.close()

        limit, places, code = 0, 0, None
        while code != 0:
            self.engine.store.close()
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path() + end)
            limit, places = limit + (211 if LONG else 5003), places + 1
            reading, writing = os.pipe()
            code = self.forked(write, limit, writing)
            os.close(writing)
            with open(reading, "rb") as pipe:
                acknowledged = [*pipe.read()]
            with self.subTest(limit=limit):
                with contextlib.closing(SQLiteStore(self.path())) as store:
                    found = [int(step["id"]) for step in store.journal() if step["id"]]
                self.assertIn(found[::-1], (acknowledged, [*acknowledged, len(acknowledged)]))
                asyncio.run(send())
                self.assertEqual(len(self.sound()["a"]), 21)
        self.figures("killed in the middle of a write at each of {} places", places)


class ReadOnly(Torture):
    """What cannot be written can be read; who writes is told why it cannot be."""

    async def store(self, stop=None, count=5):
        """Make a store in the folder `disk` with some steps; then call `stop`, or close it."""
        engine = FlexiFlowEngine(self.path("disk/flow.db"), clock=self.clock)
        engine.create_component(self.CONFIG, name="a")
        for number in range(count):
            await engine.handle_message("a", "add", by=1, id=f"{number}")
        if stop:
            stop()
        await engine.close()

    def read(self, user=None):
        """Read all of it, as another user; try to write."""
        self.write("m.json", self.CONFIG)
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            ff.main(["explain", self.path("m.json")])  # imports what another user may not
            ff.main(["--help"])
        if user and os.geteuid() == 0:  # who may write anywhere
            os.seteuid(user)
        path = self.path("disk/flow.db")
        reader = FlexiFlowEngine(SQLiteStore(path, readonly=True), clock=self.clock)
        found = [(one["name"], one["state"], one["data"]) for one in reader.status()]
        self.assertEqual((found, [step["seq"] for step in reader.history("a")]),
            ([("a", "B", {"n": 5})], [5, 4, 3, 2, 1, 0]))
        reader.store.close()
        for store in (SQLiteStore(path), SQLiteStore(path, readonly=True)):
            engine = FlexiFlowEngine(store, clock=self.clock)
            with self.assertRaises(PersistenceError) as caught:
                asyncio.run(engine.handle_message("a", "add", by=1))
            self.assertIn(caught.exception.fix, ("make the file and its folder writable",
                "check the path, and that the folder is writable"))
            store.close()
        self.commands()

    def commands(self):
        """Use the command line: who reads does its work, who writes fails without a traceback."""
        config, db = self.path("m.json"), ("--db", self.path("disk/flow.db"))
        handle = ("handle", "--config", config, "--name", "a", "add", "--data", '{"by": 1}')
        for words, code in ((("status", *db), 0), (("history", *db), 0), (("explain", config), 0),
                (("visualize", config), 0), ((*handle, *db), 1)):
            with contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual((words, ff.main([*words])), (words, code))
            self.assertNotIn("Traceback", said.getvalue())

    @unittest.skipUnless(hasattr(os, "fork"), "no users here")
    def test_a_folder_and_files_that_may_not_be_written(self):
        os.mkdir(self.path("disk"))
        for folder, file in ((0o555, 0o444), (0o555, 0o666), (0o777, 0o444)):
            with self.subTest(folder=oct(folder), file=oct(file)):
                os.chmod(self.path("disk"), 0o777)
                for name in os.listdir(self.path("disk")):
                    os.unlink(self.path(f"disk/{name}"))
                asyncio.run(self.store())
                os.chmod(self.path("disk/flow.db"), file)
                os.chmod(self.path("disk"), folder)
                os.chmod(self.folder, 0o755)
                self.assertEqual(self.forked(self.read, 65534), 0)

    def leave(self):
        """Make the store, in a process that is killed before it closes it."""
        asyncio.run(self.store(lambda: os.kill(os.getpid(), signal.SIGKILL)))

    @unittest.skipUnless(hasattr(os, "fork"), "no users here")
    def test_what_a_killed_writer_left_behind(self):
        os.mkdir(self.path("disk"))
        self.addCleanup(os.chmod, self.path("disk"), 0o777)
        self.assertEqual(self.forked(self.leave), -signal.SIGKILL)
        self.assertEqual(sorted(os.listdir(self.path("disk"))),
            ["flow.db", "flow.db-shm", "flow.db-wal"])
        for name in os.listdir(self.path("disk")):
            os.chmod(self.path(f"disk/{name}"), 0o444)
        os.chmod(self.path("disk"), 0o555)
        os.chmod(self.folder, 0o755)
        self.assertEqual(self.forked(self.read, 65534), 0)

    @unittest.skipUnless(hasattr(os, "fork"), "no users here")
    def test_a_log_that_cannot_be_read_is_not_passed_over(self):
        def read():
            with contextlib.suppress(PersistenceError):
                self.read(65534)

        os.mkdir(self.path("disk"))
        self.addCleanup(os.chmod, self.path("disk"), 0o777)
        asyncio.run(self.store(count=2))
        self.forked(self.leave)
        os.unlink(self.path("disk/flow.db-shm"))
        os.chmod(self.path("disk"), 0o555)
        os.chmod(self.folder, 0o755)
        self.assertEqual(self.forked(read), 0)

    @unittest.skipUnless(hasattr(os, "fork"), "no users here")
    def test_the_log_of_a_linked_store_lies_beside_the_file_and_is_not_passed_over(self):
        def read():
            with contextlib.suppress(OSError):
                os.seteuid(65534)
            reader = FlexiFlowEngine(SQLiteStore(self.path("link.db"), readonly=True))
            with self.assertRaises(PersistenceError):
                reader.status()

        os.mkdir(self.path("disk"))
        self.addCleanup(os.chmod, self.path("disk"), 0o777)
        asyncio.run(self.store(count=2))
        self.forked(self.leave)
        os.unlink(self.path("disk/flow.db-shm"))
        os.symlink(self.path("disk/flow.db"), self.path("link.db"))
        os.chmod(self.path("disk"), 0o555)
        os.chmod(self.folder, 0o755)
        self.assertEqual(self.forked(read), 0)

    def test_a_file_system_that_may_not_be_written(self):
        self.mount("size=4m")
        asyncio.run(self.store())
        subprocess.run(["mount", "-o", "remount,ro", self.path("disk")], check=True)
        self.assertEqual(self.forked(self.read), 0)


class Damage(Torture):
    """A damaged file gives the same answer or an error, never another answer."""

    diskless = True
    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0}, "states": {"A": {}, "B": {}, "W": {}},
        "rules": [
            {"from": "A", "on": "add", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "B", "on": "add", "to": "A"}, {"on": "wait", "to": "W"},
            {"from": "W", "after": 60, "to": "A"},
        ],
    }  # fmt: skip

    async def make(self):
        """Make a store with histories, waiting messages, timers and a dead letter; return it.

        Its pages are small, so that there are more of them, and some that go on in others.
        """
        with contextlib.closing(sqlite3.connect(self.path())) as db:
            db.executescript("PRAGMA page_size=1024; CREATE TABLE theirs(x); DROP TABLE theirs")
        engine = self.open()
        for name in "abc":
            engine.create_component(self.CONFIG, name=name)
            await engine.handle_message(name, "add", id="1")
        await engine.handle_message("b", "wait", id="w")
        await engine.send("a", "what", id="dead")
        await engine.run(until_idle=True)
        for number, kind in enumerate(("add", "wait", "add")):  # else it ends elsewhere
            await engine.send("a", kind, id=f"q{number}", delay=(0, 30)[number % 2])
        await engine.close()
        with contextlib.closing(sqlite3.connect(self.path())) as db:
            self.indexes = {page for (page,) in db.execute(
                "SELECT rootpage FROM sqlite_master WHERE type='index'")}
        return Path(self.path()).read_bytes()

    async def said(self, engine):
        """Return what an engine says of its components and their histories.

        Which dead letters there are, but not what they say: nothing is done with it any more.
        """
        return [engine.status(), *([{**step, "number": None} for step in engine.history(name)]
            for name in "abc"), [letter["component"] for letter in engine.dead_letters()]]

    async def answered(self, engine):
        """Return that, and what is answered to messages that have been handled."""
        said = [(await engine.handle_message(name, "add", id="1")).as_dict() for name in "abc"]
        return [said, *(engine.accepts(name) for name in "abc"), *await self.said(engine)]

    async def delivered(self, engine):
        """Return what is said after everything that waits has been delivered."""
        engine.clock = lambda: self.clock.now + 100
        await engine.run(until_idle=True)
        facts, *histories, _ = await self.said(engine)
        made_up = {"id": None, "timers": None}
        return [{**one, **made_up} for rows in (facts, *histories) for one in rows]

    async def tried(self, call, **content):
        """Return what a call answers to files of this content, or None for an error."""
        for name, part in content.items():
            Path(self.path(f"bad.{name.replace('_', '-')}")).write_bytes(part)
        failures = []
        logger = types.SimpleNamespace(debug=lambda *args: None, warning=lambda *args: None,
            error=lambda *args, **facts: failures.append(args))
        engine = FlexiFlowEngine(SQLiteStore(self.path("bad.db"), "NORMAL"), clock=self.clock,
            logger=logger)
        try:
            answer = await asyncio.wait_for(call(engine), 3)
            return None if failures else answer  # what is delivered fails in the log
        except FlexiFlowError:
            return None
        except Exception as error:
            return repr(error)
        finally:
            engine.store.close()
            for end in ("db-wal", "db-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(f"bad.{end}"))

    def is_found(self, db):
        """Tell whether SQLite's own check finds that a file is damaged."""
        Path(self.path("bad.db")).write_bytes(db)
        with contextlib.closing(sqlite3.connect(self.path("bad.db"))) as connection:
            try:
                return connection.execute("PRAGMA integrity_check(1)").fetchall() != [("ok",)]
            except sqlite3.DatabaseError:
                return True

    async def compare(self, what, contents, indexes=frozenset()):
        """Try contents, each a place and files; no answer may be another than the right one.

        But where the place is in one of these pages, of `indexes`, and SQLite finds the damage.
        """
        counts, wrong = Counter(), []
        good = {"db": Path(self.path()).read_bytes()}
        right = {call: await self.tried(call, **good)
            for call in (self.said, self.answered, self.delivered)}
        self.assertNotIn(None, right.values())
        chance = random.Random(SEED)
        for place, content in contents:
            calls = list(right) if LONG else [self.said, *chance.choices(
                list(right)[1:], k=chance.random() < 0.1)]
            for call in calls:
                found = await self.tried(call, **content)
                kind = {str(right[call]): "the same answer", "None": "an error"}.get(str(found))
                if kind is None and not isinstance(found, str) and place // 1024 + 1 in indexes:
                    kind = "found by SQLite" if self.is_found(content["db"]) else None
                counts[kind or "another answer"] += 1
                if kind is None and len(wrong) < 20:
                    wrong.append((place, call.__name__, found if isinstance(found, str) else [
                        one for one, other in zip(found, right[call]) if one != other][:1]))
        self.figures("{}: {}", what, ", ".join(f"{n} x {kind}" for kind, n in counts.items()))
        self.assertEqual(wrong, [], f"seed {SEED}")

    def changed(self, good, places):
        """Yield the file with each byte changed."""
        chance = random.Random(SEED)
        for place in places:
            bad = bytearray(good)
            bad[place] ^= chance.randrange(1, 256)
            yield place, {"db": bad}

    async def test_every_byte_of_header_schema_and_rows(self):
        good = await self.make()
        schema = good.index(b"CREATE TABLE"), good.rindex(b"CREATE TABLE")
        places = [place for place in range(len(good)) if place // 1024 + 1 not in self.indexes]
        if not LONG:  # all of headers and rows, and a third of the schema's text
            places = [place for place in places if (good[place] or place % 1024 < 16)
                and (place % 3 == SEED % 3 or not schema[0] < place < schema[1])]
        await self.compare("changed bytes", self.changed(good, places))

    async def test_any_other_value_of_a_message_is_damage(self):
        good = await self.make()
        right, bad = await self.tried(self.said, db=good), Path(self.path("bad.db"))
        read = "SELECT * FROM flexiflow_messages ORDER BY number"
        with contextlib.closing(sqlite3.connect(self.path())) as db:
            found = db.execute(read)
            columns, numbers = [one[0] for one in found.description], [row[0] for row in found]
        columns = {*columns} - {"number", "component"}  # whose index would be changed with it
        values = (None, 0, 1, -1, 0.5, 1e6, "", '{"attempts": 1}', b"")
        for column, number, value in itertools.product(sorted(columns), numbers, values):
            bad.write_bytes(good)
            with contextlib.closing(sqlite3.connect(bad)) as db, db:
                before = db.execute(read).fetchall()
                with contextlib.suppress(sqlite3.IntegrityError):  # NOT NULL, UNIQUE
                    db.execute(
                        f"UPDATE flexiflow_messages SET {column}=? WHERE number=?", (value, number))
                same = db.execute(read).fetchall() == before
            with self.subTest(column=column, number=number, value=value):
                self.assertEqual(
                    await self.tried(self.said, db=bad.read_bytes()), right if same else None)

    async def test_a_message_of_any_damage_stops_no_other(self):
        async def deliver(engine):
            await engine.send("a", "what", id="y")
            return await engine.run(until_idle=True), [engine.get(name).state for name in "ac"]

        engine = self.open()
        for name in "abc":
            engine.create_component(self.CONFIG, name=name)
            await engine.send(name, "wait", id="x")
        await engine.close()
        good, bad = Path(self.path()).read_bytes(), Path(self.path("bad.db"))
        texts = ("CAST(x'ff7b' AS TEXT)", "''", "'x'", """'{"attempts": "x"}'""", "'[1]'")
        for column, value in itertools.product(
                ("message", "due", "rule", "place", "attempts", "error", "sent", "dead"),
                (0.5, 7, -1, "x''", """'{"attempts": null}'""", *texts)):
            bad.write_bytes(good)
            with contextlib.closing(sqlite3.connect(bad)) as db, db:
                db.execute(f"UPDATE flexiflow_messages SET {column}={value} WHERE component='b'")
            engine = FlexiFlowEngine(SQLiteStore(str(bad), "NORMAL"), clock=self.clock,
                logger=unittest.mock.Mock())
            with self.subTest(column=column, value=value):
                self.assertEqual(
                    await asyncio.wait_for(deliver(engine), 5), (2, ["W", "W"]))
                found = engine.queue.rows("SELECT dead NOT NULL FROM flexiflow_messages"
                    " WHERE component='b' AND state IS NULL")
                self.assertEqual((engine.get("b").state, found), ("A", [(1,)]))
            await engine.close()

    async def test_a_timer_that_lost_its_state_is_damage_and_no_waiting_message(self):
        await self.make()
        with contextlib.closing(sqlite3.connect(self.path())) as db:
            db.execute("UPDATE flexiflow_messages SET state=NULL WHERE state='W'")
            db.commit()
        engine = self.open()
        self.assertEqual(engine.status("a")[0]["waiting"], 3)
        with self.assertRaises(ff.PersistenceError) as caught:
            engine.status()
        self.assertRegex(caught.exception.what, "is damaged: message [0-9]+$")
        await engine.close()

    async def test_a_table_that_would_be_read_from_another_place_is_damage(self):
        good = await self.make()
        right = await self.tried(self.said, db=good)
        with contextlib.closing(sqlite3.connect(self.path())) as db:
            roots = db.execute("SELECT name || tbl_name, rootpage FROM sqlite_master").fetchall()
        for names, root in roots:
            record = names.encode() + bytes([root])
            place = good.index(record) + len(record) - 1
            for page in {*range(len(good) // 1024 + 2)} - {root}:
                bad = bytearray(good)
                bad[place] = page
                with self.subTest(names=names, page=page):
                    self.assertIn(await self.tried(self.said, db=bad), (None, right))

    async def test_a_damaged_index_is_found_by_sqlite_and_stops_nobody(self):
        good, chance = await self.make(), random.Random(SEED)
        places = [place for place in range(len(good)) if place // 1024 + 1 in self.indexes
            and (good[place] or place % 1024 < 16)]
        right = {call: await self.tried(call, db=good) for call in (self.answered, self.delivered)}
        counts, wrong = Counter(), []
        for place, content in self.changed(good, places if LONG else chance.sample(places, 60)):
            for call, answer in right.items():
                found = await self.tried(call, **content)
                if found in (None, answer):
                    counts["right or an error"] += 1
                elif isinstance(found, str):
                    wrong.append((place, call.__name__, found))
                else:
                    counts["found"] += 1
                    wrong += [] if self.is_found(content["db"]) else [(place, call.__name__)]
        self.figures("bytes of indexes: {}", counts)
        self.assertEqual(wrong, [], f"seed {SEED}")

    async def test_every_truncation(self):
        good = await self.make()
        lengths = range(1, len(good)) if LONG else sorted({1, *range(512, len(good), 512),
            *random.Random(SEED).sample(range(1, len(good)), 100)})
        await self.compare("truncations", ((length, {"db": good[:length]}) for length in lengths),
            self.indexes)

    async def test_a_damaged_log_gives_an_earlier_moment_or_an_error(self):
        await self.make()
        engine, moments, content = self.open(), [], {}
        for number in range(5):
            moments.append(await self.tried(self.said, **content) if content else await self.tried(
                self.said, db=Path(self.path()).read_bytes()))
            await engine.handle_message("abc"[number % 3], "add", id=f"more{number}")
            content = {end: Path(self.path(f"flow.{end.replace('_', '-')}")).read_bytes()
                for end in ("db", "db_wal")}
        moments.append(await self.tried(self.said, **content))
        log, chance, counts, wrong = content["db_wal"], random.Random(SEED), Counter(), []
        heads = [place for place in range(32, len(log)) if (place - 32) % (24 + 1024) < 24]
        places = range(len(log)) if LONG else [
            *range(32), *chance.sample(heads, 200), *chance.sample(range(len(log)), 50)]
        damaged = [bad["db"] for _, bad in self.changed(log, places)]
        damaged += [log[:length] for length in places]
        for number, bad in enumerate(damaged):
            found = await self.tried(self.said, db=content["db"], db_wal=bad)
            if found is not None and found not in moments:
                wrong.append((number, found))
            else:
                counts["error" if found is None else moments.index(found)] += 1
        self.figures("{} damaged logs give each of {} moments: {}", len(damaged), len(moments),
            counts)
        self.assertEqual(wrong[:5], [], f"seed {SEED}")
        self.assertGreater(len(counts), 3)


class SnapshotDamage(Torture):
    """A damaged JSON file gives the same snapshot or an error."""

    diskless = True

    def test_every_byte_and_every_truncation(self):
        path = Path(self.path("c.json"))
        wanted = ff.ComponentSnapshot("c", "InitialState", [{"on": "x"}], {"n": 1.5, "t": "\u00fc"})
        ff.save_component(ff.restore_component(wanted, FlexiFlowEngine()), path)
        good, chance, same = path.read_bytes(), random.Random(SEED), 0
        damaged = [good[:length] for length in range(len(good) - 1)]  # the last one ends the line
        for place, byte in enumerate(good):
            for flip in range(1, 256) if LONG else chance.sample(range(1, 256), 3):
                damaged.append(good[:place] + bytes([byte ^ flip]) + good[place + 1:])
        for bad in damaged:
            path.write_bytes(bad)
            with contextlib.suppress(PersistenceError):
                self.assertEqual(ff.load_snapshot(path), wanted, f"seed {SEED}: {bad}")
                same += 1
        self.figures("{} damaged files, {} read as they were, the others are errors",
            len(damaged), same)


class Clocks(Torture):
    """Whatever a clock does, the order is that of numbers, and timers fire once and not early."""

    diskless = True
    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0}, "states": {"A": {}, "B": {}},
        "rules": [
            {"from": "A", "on": "go", "to": "B"}, {"on": "note"},
            {"from": "B", "after": 60, "to": "A", "assign": {"n": {"+": ["$data.n", 1]}}},
        ],
    }  # fmt: skip
    # The time at a step, from the time at the step before.
    CLOCKS = {
        "back an hour": lambda now, step, chance: now + (30 if step % 20 else -3600),
        "forward ten years": lambda now, step, chance: now + (30 if step % 20 else 315_576_000),
        "frozen": lambda now, step, chance: now,
        "zigzag": lambda now, step, chance: now + chance.uniform(-300, 330),
        "equal ticks": lambda now, step, chance: now + 60 * (step % 2),
        "whole numbers": lambda now, step, chance: int(now) + 30,
    }

    async def test_order_and_timers_hold_whatever_the_clock_does(self):
        for name, tick in self.CLOCKS.items():
            with self.subTest(name, seed=SEED):
                chance, self.clock.now = random.Random(SEED), 1_000_000.0
                due, expected, fired = None, [], 0
                for step in range(300 if LONG else 60):
                    if step % 10 == 0:  # started again
                        engine = FlexiFlowEngine(self.path(f"{name}.db"), clock=self.clock)
                        self.addAsyncCleanup(engine.close)
                        engine.create_component(self.CONFIG)
                    self.clock.now = now = tick(self.clock.now, step, chance)
                    if due is None:
                        await engine.handle_message("m", "go")
                        due = now + 60
                        expected.append("go")
                    for number in range(3):
                        await engine.send("m", "note", number=3 * step + number)
                    await engine.run(until_idle=True)
                    if due <= now:
                        fired, due = fired + 1, None
                        expected.append("after 60")
                    expected += [3 * step + number for number in range(3)]
                    if step % 10 == 9:
                        await engine.close()
                rows = engine.history("m")[::-1]
                found = [row["message"].get("number", row["message"]["type"]) for row in rows[1:]]
                self.assertEqual(found, expected)
                self.assertEqual([row["seq"] for row in rows], [*range(len(rows))])
                self.assertEqual(engine.get("m").data, {"n": fired})
                self.figures("{}: {} steps in order, {} timers fired once", name, len(rows), fired)


class Model:
    """What an engine is to do, in dicts and lists: no file, no loop, no other process."""

    NEXT = {"a": "b", "b": "c", "c": "a"}
    CONFIG = {
        "name": "m", "initial_state": "A", "data": {"n": 0, "next": ""},
        "states": {"A": {}, "B": {}, "W": {}, "Done": {"final": True}},
        "retry": {"max_attempts": 1},  # else a failed message comes after those behind it
        "rules": [
            {"from": "A", "on": "go", "to": "B", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"from": "B", "on": "go", "to": "A", "assign": {"n": {"+": ["$data.n", 1]}}},
            {"on": "pass", "guard": {"data.n": {"<": 3}}},
            {"on": "tell", "send": {"to": "$data.next", "type": "go", "after": 5}},
            {"on": "wait", "to": "W"}, {"from": "W", "after": 10, "to": "A"},
            {"on": "end", "to": "Done"}, {"on": "boom", "assign": {"x": "$data.gone"}},
        ],
    }  # fmt: skip

    def __init__(self):
        self.now, self.numbers, self.places = 1_000_000.0, itertools.count(), itertools.count()
        self.parts, self.queue = {}, []  # the dead letters included

    def create(self, name):
        self.parts[name] = types.SimpleNamespace(state="A", n=0, seq=0, ids={}, known={"go", "pass",
            "tell", "wait", "end"}, steps=[(0, None, "created", "A")])

    def put(self, name, kind, delay=0.0, id=None, timer=False):
        """Queue a message; return whether it was there before, or None if that was another."""
        before = [row.kind for row in self.queue if id and (row.name, row.id) == (name, id)]
        before += [self.parts[name].ids[id][0]] if id in self.parts[name].ids else []
        if before:
            return True if before[-1] == kind else None
        self.queue.append(types.SimpleNamespace(name=name, kind=kind, id=id, timer=timer,
            dead=False, due=self.now + delay, number=next(self.numbers), place=None))
        self.place() if not delay else None
        return False

    def place(self):
        for row in sorted(self.queue, key=lambda row: (row.due, row.number)):
            if row.place is None and not row.dead and row.due <= self.now:
                row.place = next(self.places)

    def handle(self, name, kind, id=None):
        """Return outcome, state, n, seq and whether it is a duplicate; None if it fails."""
        part = self.parts[name]
        if id in part.ids:
            return (*part.ids[id][1], True) if part.ids[id][0] == kind else None
        if id and any((row.name, row.id) == (name, id) and row.kind != kind for row in self.queue):
            return None  # it stands for that message
        outcome, to, timer = "moved", part.state, kind == "after 10"
        if part.state == "Done" or (kind == "go" and part.state == "W"):
            outcome = "ignored"
        elif kind not in part.known and not timer:
            return None if kind == "boom" else ("unknown", part.state, part.n, None, False)
        elif kind == "go":
            to, part.n = "BA"[part.state == "B"], part.n + 1
        elif kind in ("wait", "end") or timer:
            to = {"wait": "W", "end": "Done"}.get(kind, "A")
        else:
            outcome = "blocked" if kind == "pass" and part.n >= 3 else "stayed"
            if kind == "tell":
                self.put(self.NEXT[name], "go", 5.0)
        if outcome == "moved":
            self.queue = [row for row in self.queue if not (row.timer and row.name == name)]
        if to == "W" and outcome == "moved":
            self.put(name, "after 10", 10.0, timer=True)
        part.state, part.seq = to, part.seq + 1
        if id:
            part.ids[id] = kind, (outcome, to, part.n, part.seq)
        part.steps.append((part.seq, id, outcome, to))
        return outcome, to, part.n, part.seq, False

    def deliver(self):
        self.place()
        for row in sorted((row for row in self.queue if row.place is not None),
                key=lambda row: row.place):
            if row in self.queue:  # else its timer was over
                self.queue.remove(row)
                answer = self.handle(row.name, row.kind, row.id)
                if answer is None or answer[0] == "unknown":
                    row.dead, row.place = True, None
                    self.queue.append(row)

    def redrive(self):
        for row in self.queue:
            if row.dead:
                row.dead, row.due = False, self.now
        self.place()

    def cancel(self, name, id):
        found = [row for row in self.queue if (row.name, row.id, row.dead) == (name, id, False)]
        self.queue = [row for row in self.queue if row not in found]
        return bool(found)

    def prune(self, name, keep):
        part = self.parts[name]
        part.steps = part.steps[-keep:]
        kept = {id for _, id, _, _ in part.steps}
        part.ids = {id: one for id, one in part.ids.items() if id in kept}

    def teach(self, name):
        part = self.parts[name]
        part.seq, part.known = part.seq + 1, {*part.known, "new"}
        part.steps.append((part.seq, None, "updated", part.state))

    def remove(self, name):
        del self.parts[name]
        self.queue = [row for row in self.queue if row.name != name]

    def facts(self):
        """Return state, n, seq, messages that wait, dead letters, and timers, by name."""
        return {name: (part.state, part.n, part.seq,
            sum(row.name == name and not row.timer and not row.dead for row in self.queue),
            sum(row.name == name and row.dead for row in self.queue),
            [row.due for row in self.queue if row.name == name and row.timer])
            for name, part in self.parts.items()}


class RandomOperations(Torture):
    """Two engines on one file do at every step what a small model does."""

    diskless = True

    async def test_engines_do_what_the_model_does(self):
        runs, steps = (20_000 if LONG else 30), 50
        for run in range(runs):
            chance = random.Random(f"{SEED} {run}")
            self.model, self.done = Model(), []
            self.file = self.path(f"{run}.db")
            self.engines = [self.begin(), self.begin()]
            for name in "abc":
                await self.create(chance.choice(self.engines), name)
            with self.subTest(run=run, seed=SEED):
                for _ in range(steps):
                    await self.step(chance)
                for name in "abc":
                    self.compare_history(chance.choice(self.engines), name)
            for engine in self.engines:
                await engine.close()
            os.unlink(self.file)
        self.figures("{} runs of {} steps, as the model says", runs, steps)

    def begin(self):
        store = SQLiteStore(self.file, "NORMAL")
        return FlexiFlowEngine(store, clock=lambda: self.model.now)

    async def create(self, engine, name):
        self.model.create(name)
        await engine.register_async(engine.create_component(
            Model.CONFIG, name=name, data={"next": Model.NEXT[name]}))

    async def step(self, chance):
        """Do one thing to engine and model; compare the answers, and all that is known."""
        number, model = chance.randrange(len(self.engines)), self.model
        engine, name = self.engines[number], chance.choice("abc")
        kind = chance.choice("go go go pass tell wait wait end boom what new".split())
        if kind == "end" and chance.random() < 0.7:
            kind = "go"
        id = f"id{chance.randrange(40)}" if chance.random() < 0.6 else None
        what = chance.choice("handle handle handle send send send deliver deliver tick tick tick"
            " restart crash redrive cancel prune teach remove".split())
        self.done.append((what, number, name, kind, id))
        if what == "handle":
            self.assertEqual(await self.handled(engine, name, kind, id),
                model.handle(name, kind, id), self.done)
        elif what == "send":
            delay = chance.choice((0.0, 0.0, 5.0, 20.0))
            try:
                receipt = await engine.send(name, kind, delay=delay, id=id)
                found = receipt.duplicate
            except StateError:
                found = None
            self.assertEqual(found, model.put(name, kind, delay, id), self.done)
        elif what == "deliver":
            await engine.run(until_idle=True)
            model.deliver()
        elif what == "tick":
            model.now += chance.choice((1.0, 5.0, 10.0, 30.0))
        elif what in ("restart", "crash"):
            await engine.close() if what == "restart" else engine.store.close()
            self.engines[number] = self.begin()
        elif what == "redrive":
            await engine.redrive()
            model.redrive()
        elif what == "cancel":
            self.assertEqual(await engine.cancel(name, id or "-"), model.cancel(name, id or "-"))
        elif what == "prune":
            keep = chance.randrange(1, 6)
            await engine.prune(name, keep=keep)
            model.prune(name, keep)
        elif what == "teach" and "new" not in model.parts[name].known:
            await engine.update_rules(name, [{"on": "new"}])
            model.teach(name)
        elif what == "remove" and chance.random() < 0.3:
            await engine.remove(name)
            model.remove(name)
            await self.create(engine, name)
        self.assertEqual({one["name"]: (one["state"], one["data"]["n"], one["seq"], one["waiting"],
            one["dead"], [timer["due"] for timer in one["timers"]])
            for one in self.engines[0].status()}, model.facts(), self.done)

    async def handled(self, engine, name, kind, id):
        """Return what a receipt says; None for an error without one."""
        try:
            receipt = await engine.handle_message(name, {"type": kind, "id": id})
        except StateError as error:
            if not hasattr(error, "receipt"):
                return None
            receipt = error.receipt
        n = None if receipt.data is None else receipt.data["n"]
        if receipt.duplicate and n is None:  # what the data was then has been pruned
            self.assertEqual([row["seq"] for row in engine.history(name)
                if row["data"] and row["seq"] <= receipt.seq], [], self.done)
            n = self.model.parts[name].ids[id][1][2]
        return receipt.outcome, receipt.to_state, n, receipt.seq, receipt.duplicate

    def compare_history(self, engine, name):
        """Compare a component's history; replayed, it leads where it led."""
        found = [(row["seq"], row["id"] if row["id"].startswith("id") else None, row["outcome"],
            row["to_state"]) for row in reversed(engine.history(name))]
        self.assertEqual(found, self.model.parts[name].steps, self.done)
        (again,) = engine.replay(name)
        self.assertEqual(again["differences"], [], self.done)


class Endings(Torture):
    """However a loop ends, nothing is left open or unheard, and what was acknowledged is kept."""

    SCRIPT = """
        import asyncio, gc, itertools, json, os, random, signal, sys, threading
        from flexiflow import FlexiFlowEngine
        NOTES = os.open("notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        numbers = itertools.count()

        def engine():
            asyncio.get_running_loop().slow_callback_duration = 60  # slow machines are no fault
            made = FlexiFlowEngine("flow.db")
            made.create_component(json.loads(sys.argv[3]), name="a")
            return made

        async def send(to, count=1_000_000):
            for number in itertools.islice(numbers, count):
                receipt = await to.handle_message("a", "add", by=1, id=f"{number}")
                os.write(NOTES, f"{number} {receipt.seq}\\n".encode())

        async def returns():
            async with engine() as one:
                await asyncio.gather(send(one, 5), send(one, 5), one.send("a", "add", by=0))

        async def is_cancelled():
            async with engine() as one:
                await send(one, 2)
                task, pause = asyncio.current_task(), random.uniform(0, 0.02)
                asyncio.get_running_loop().call_later(pause, task.cancel)
                await asyncio.gather(send(one), send(one))

        async def is_interrupted(number=signal.SIGINT):
            async with engine() as one:
                await send(one, 2)
                pause = random.uniform(0, 0.02)
                threading.Timer(pause, os.kill, (os.getpid(), number)).start()
                await asyncio.gather(send(one), send(one))

        async def is_terminated():
            await is_interrupted(signal.SIGTERM)

        async def closes_twice():
            one = engine()
            await send(one, 5)
            await asyncio.gather(one.close(), one.close())
            await one.close()

        async def closes_while_others_send():
            async with engine() as one:
                tasks = [asyncio.ensure_future(send(one)) for _ in range(3)]
                await send(one, 5)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        async def is_forgotten():
            await send(engine(), 5)

        for _ in range(int(sys.argv[2])):
            try:
                asyncio.run(globals()[sys.argv[1]]())
            except (KeyboardInterrupt, asyncio.CancelledError):
                pass
            gc.collect()
        """

    async def test_nothing_is_left_open_unheard_or_lost(self):
        self.write("endings.py", textwrap.dedent(self.SCRIPT))
        for way, code in {"returns": 0, "is_cancelled": 0, "is_interrupted": 0,
                "is_terminated": -signal.SIGTERM, "closes_twice": 0, "is_forgotten": 0,
                "closes_while_others_send": 0}.items():
            with self.subTest(way):
                for name in os.listdir(self.folder):
                    if name != "endings.py":
                        os.unlink(self.path(name))
                count = 1 if code else 50 if LONG else 5
                for _ in range(50 if LONG and code else 1):
                    done = self.python("-X", "dev", "-W", "error", "endings.py", way, str(count),
                        json.dumps(self.CONFIG))
                    self.assertEqual((done.returncode, done.stdout), (code, ""))
                    if way == "is_interrupted" and sys.version_info < (3, 11):
                        # There, asyncio itself says of any task that Ctrl-C hits: never retrieved.
                        self.assertNotRegex(done.stderr, "was destroyed|ResourceWarning")
                    else:
                        self.assertEqual(done.stderr, "")
                engine = self.open()
                found = {step["id"]: step["seq"] for step in engine.history("a")}
                lines = Path(self.path("notes")).read_text().splitlines()
                noted = dict(line.split() for line in lines)
                self.assertEqual({id: found.get(id) for id in noted},
                    {id: int(seq) for id, seq in noted.items()})
                self.assertGreater(len(noted), 0)
                await engine.close()
                self.figures("{}: {} times, {} acknowledged", way, count, len(noted))


class Loops(Torture):
    """Threads, forks and several loops: it works, or says clearly why not."""

    async def test_threads_with_engines_of_their_own_never_mix_rows(self):
        import threading

        count, wrong, done = (2_000 if LONG else 40), [], []

        async def use(who):
            engine = FlexiFlowEngine(SQLiteStore(self.path(), "NORMAL"))
            engine.create_component(self.CONFIG, name=f"t{who}", data={"who": who})
            for number in range(count):
                if number % 10 == 0:
                    await engine.handle_message(f"t{who}", "add", by=1, id=f"{number}")
                for facts in engine.status():
                    done.append(who)
                    if f"t{facts['data']['who']}" != facts["name"]:
                        wrong.append(facts)
                for step in engine.history(f"t{who}", limit=3):
                    if step["component"] != f"t{who}":
                        wrong.append(step)
            await engine.close()

        threads = [threading.Thread(target=asyncio.run, args=(use(who),)) for who in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.figures("16 threads, {} facts read, {} wrong", len(done), len(wrong))
        self.assertEqual(wrong, [])
        self.assertEqual([one["data"]["n"] for one in self.engine.status()], [count // 10] * 16)

    async def test_threads_that_share_an_engine_work_or_are_told(self):
        import threading

        engine, answers, errors = self.engine, [], []
        for who in range(16):
            engine.create_component(self.CONFIG, name=f"t{who}")
        await engine.run(until_idle=True)

        def use(who):
            for number in range(100 if LONG else 10):
                try:
                    answers.append(asyncio.run(asyncio.wait_for(engine.handle_message(
                        f"t{who}", "add", by=1, id=f"{number}"), 5)))
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=use, args=(who,)) for who in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        found = self.sound()
        self.figures("{} answers, {} errors", len(answers), len(errors))
        self.assertEqual([error for error in errors if not isinstance(error, FlexiFlowError)], [])
        self.assertEqual([(one.component, one.id) for one in answers
            if found[one.component].get(one.id) != one.seq], [])

    def test_a_loop_goes_on_though_another_thread_has_looked_while_it_stood(self):
        import threading

        engine, seen = FlexiFlowEngine(self.path()), []
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            engine.create_component(self.CONFIG, name="a")
            first = loop.run_until_complete(engine.handle_message("a", "add", by=1))
            thread = threading.Thread(target=lambda: seen.append(engine.status("a")[0]["seq"]))
            thread.start()
            thread.join()
            second = loop.run_until_complete(engine.handle_message("a", "add", by=1))
            loop.run_until_complete(engine.close())
        self.assertEqual((first.seq, seen, second.seq), (1, [1], 2))

    def test_nobody_waits_for_the_commit_of_a_loop_that_was_closed(self):
        quiet, log = logging.NullHandler(), logging.getLogger("concurrent.futures")
        log.addHandler(quiet)  # the thread finds the loop closed
        self.addCleanup(log.removeHandler, quiet)
        engine = FlexiFlowEngine(self.path())

        async def begin():
            engine.create_component(self.CONFIG, name="a")
            await engine.run(until_idle=True)
            self.patch("SLOW_COMMIT", -1.0)
            task = asyncio.ensure_future(engine.handle_message("a", "add", by=1, id="x"))
            while engine.store._committing is None:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        async def go_on():
            receipt = await asyncio.wait_for(
                engine.handle_message("a", "add", by=1, id="y"), 30)
            await engine.close()
            return receipt.seq

        with contextlib.closing(asyncio.new_event_loop()) as loop, engine.store._lock:
            loop.run_until_complete(begin())
        while engine.store.db.in_transaction:
            time.sleep(0.001)
        self.assertEqual(asyncio.run(go_on()), 2)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_forks_of_an_open_engine_are_told_and_use_their_own(self):
        async def add(engine, who):
            engine.create_component(self.CONFIG, name="a")
            for number in range(20):
                await engine.handle_message("a", "add", by=1, id=f"{who}{number}")

        async def add_and_close(who):
            async with FlexiFlowEngine(self.path()) as engine:
                await add(engine, who)

        def child(who):
            error = self.raises(PersistenceError, engine.status)
            self.assertEqual(error.fix, "make an engine of its own in each process")
            asyncio.run(add_and_close(who))

        engine = FlexiFlowEngine(self.path())
        asyncio.run(add(engine, "before"))
        codes = [self.forked(child, f"child{number}") for number in range(3)]
        asyncio.run(add(engine, "after"))  # in another loop
        asyncio.run(engine.close())
        self.assertEqual((codes, len(self.sound()["a"])), ([0] * 3, 101))


class OldStores(Torture):
    """Stores of earlier versions are opened, and go on; those of later ones are refused."""

    # By schema version: what python -c "import test_flexiflow; test_flexiflow.OldStores.make()"
    # printed when it was new; then it stays. A file, compressed, in base 85.
    STORES = {
        1: """
            c-rlqUu+{s8Nk>7lGw3t^3ae*qIB5nH8HX8y#DV<X)kx@wo%h0%_X{)%MoUGXD{aLU3YigTu4LZ9_>r3N|nk}fd
            ?dzP(dm>2?_<IzEnJbD&P?$1gg{`RTV-ModihC?E25fcJ5koYJ27TDUN4ncE0bM`DR9$otf;}hZie0#hPK(h>bJ
            CnBeydCovWT!OuQ1q02D)1U=Wj*5`Woh2x4ZhOP<G;j03=8~rf$r`WxtQuN=^pN7vw-W~b-$b&2a00000fE&>qj
            }A}FNxtSnMOW!%tx7Lfw5qYaS)-OkE>df=UL^|ckB^;REzhr&@xs!X@+0`5e0X_jK-#pE7LQ=Yxd+OtW$fO(a27
            8uui>Tj#l_}bqr(#=X4j>I>{1&8tcu>qDwgX2n^;N$>y4UB&B2y2tML5N8LU#Gwj)*|LlZMIzDI2$SE=<_mHqj%
            Y0<|TR9AX0M_Z<?&7WE<<DSH6oz!T8UB#~)8yTLEB;V5wM`pjF{W0Nvk_QycEfuSjwetPtRlKsg@X-9~qxiw{qj
            -LOZFymd33#Zyw3cwntr)esp;O()Yvo7QIvz>jmb}f1+MA*nrb(;Bt{8edwR3yVy^ad*1!nW2M}%b)o3?VAjVf(
            hn`nEWeMxMa*6Oy^DNb7kK2yGLetmHbr(7k}G!3&Q(c;DF(dhV*$1(d&rB7S}uP-e;yk4H})JLLQ0rB|h@X*9L$
            tO6?v*k_Funp&Wb3n_J`r{&3LZRV_6DNF6mwKH26{BJ5q}mrTbbzZ{$=C68;y}MTmBpIgfEu`Y9yh5%EA_r6r4p
            O8GTW6}U!$m-6~pYe%Wb9~%xAo0@j>xkXU-1~O{|}|u`^rMyqWHc8kryZa3Z9>sNv=v!QqMdoUi$C&zRS-+S)X>
            b!rYu2^}!<_2%6_`gK#MomB70=icralb<>h7@o-Gd|#jGX{}u;gW`e*v{{dCKKi*$V_%C^saDY|yp0WPvYipb<9
            {|fm=(EUQ>)diIxWmQ)(mRwuFMJ>jQiVqtzM-zz5Zz7R+p=^N{Qt*=2nF+tUa*2zJ^zq&n=v327SX5g@Ug+)l-e
            #;#vbE{RdQ}=a%U$Vr>nmN!d_$_7^L@;2)Z}P`Gh}^+@+NT2FL<{T(qPv?loe=r4sMHTDYt000000002s6U&u^K
            h%speO^sVv{0n9m{xKnk}k?hE}Knh1*srs6*;eDvQjBskkpKt%9B*FkfxfN&!jUcDWg#>m)RAai4mLQJ2O;qR$Q
            )AT}+7lv6dyyp5GOTWmPWf;_R+y8#bx(zzj<e@8Yx7<8E9ccVTZYA!?>k>xwW~CXuMBxR==NNxIk|rphIen$gg0
            9=d0aC3|IZfsTke*<o31g9TSe#T7?1o0=>_+7f%!IyWxz!g%yL8C&wKtxCOp-|4DhQT3oZb%RT}kPw~9vACJ73@
            pT^l)N@<vq71qj>6ep7IMsRLXIdF+S|J_=Hu=<DiuhHP^x4VrIc5+jGWc9LMok?(=;zrxtLZ{v_LXhEv4mDxgaY
            kl9kdaB`>LRDK9JFF4tW*!6gws|3?i0y~ch400000000000040FC<mJ{-(jCw`Oh#Z;ln;kiJ)hMz>zWG$QX(qc
            @bO#0000000000@c%;7ADe8(CWWKETp%O}inFME*h!|lG~HQ>&+P@f%hgiK;dp8fojNH9|9F4sKijeKW^A09Ao2
            6&by86eJ6GoG-TT$ME8tz_*2S~G-s$RPMK|hHKWxGIin~Xzf48*;-_<J!SEv4bj8*(sKOTSc^?zXu+C2aO00000
            00000e463s|6?Q91hjGFpGUqJdo{Ki{c-fR(N{)qkGv9D3jd8I0RR91004X{Xf|RoVcZv=dFuWJArK7mRi>a;qF
            S0}@+qlMN@|&6p;$~QEJ`jWrPQt{Q_V2>Y16|l3yBG_`@fi&yu&VUiF@b8MqMQ~<;O)^r$*f`y-}@RK&MXbz4m(
            W<a5Vf-iStpNgs;Ouu_MD?($wxm2;(HrchAxN~)NoyP~~Qr|mPROm@w9+$*`Ybk~tB2=7*&Jobgr<ZWLbjj~Eb@
            q5edIt?g=TvjfmOKK)nDkRnJ;n`fGt%e_!^=N6Gh~01h!W-9?c^R~bYd_Zz3c2<N6geejX<Et`W#%g7f7Kxff4S
            %Mi*9L}<KdWFlxDJB7Qd{}l9bJ|0u@!7l)HMQUOjTvP%e2jc@HR`moDIKqT3dB^W%Hw@P_vk@rH=!a1KvfWE)Fy
            k=s`OCjADl19^nia2Uno_a9~c<5m$lMWjrDHJ)NBmn0qMIcJ#9^8>;={f0P2_N+`grGI(cxXSf3?;K`jABn}A@r
            9#-kr3C?t3)xW)7)-CXJAIQrCry`RM*Pp<dDZZp%7oI^~-X)#JWbVl*<%z$>K-p9YJ{RrO#a!gjaw6ps9vD9&#)
            rYL-<(k)%i}mrE87;h`75bNiF7uI8P=eLmuPdewY<KH_#ZCj&9Jt2#ZX)mQy&L@Q)Ua$ZXp6g8RqD7|#<XFvG4+
            s9Qu8$~+3$hC~nLQ19Cd?sHiW|P@Nc<H-WHxgV|^YcDd16?1vdV1A-d|u*q^7a21(gpNB`YZY)dI9aA-=SZjU!b
            e#`{>)~8I}Y900000000000KkVL5*+vWoJY;EXmHZ!YdwFBcH#r0p7=nd6Ymd)gX3W*IKo0BPH5OkcAk9=ImtX2
            a*}x{=n>@)j0Pve?TbioawP1A-TD8Q`27DJ^au1jdK~>0y@6gsKSJL_FQF?e2><{9000000001h>oO4>k2_QK{X
            5I}<R7&r<0_y0Bj+Y%)Dy2nI`MM26C`~0AM4Eiku%YkhdMzLa?;z=|F$qW;JF}t{vT`2|6}L{AuxJPKzEN`L$8C
            !000000002s)&#u}SUfoOnVI02Fpg$s_?y7P&u#_+&K7d2q*IxUoT0fwHl38D&Ms&+S+GUEZFpCtrfHbsEEdo5c
            aN3%)hu4uFX_g%j%(Di$VEDfr+AL34gK8K&Mejq%y(^LL&H;C%@nrDC2HY{jVn4P`i}c%_znHO%H>(yu-KitdpA
            +lsRW*?lO6uW52P@erw!evm+jdN9pla`>E~R@JkAj|H^sL;Pl*XE+9pw`Oq5I9>b3R-o~|(yu}Kw{8!Mz*#Z_Y2
            aYyWZ6=v>+c%t+6^yBrN4JNBvVTNV%xpabCzNyk`<#B5A92k>r!U|;3s&>4cu*poDHjVB02as8k_Q~W~y>dGRJ-
            $VBwMsWzRXyGMPT)<ZXzl|kV-wMmqinw@SDi^J%mHpO8m?QX?S`o*oT{qSZ6?1f^_FM^8#-?Wt(OJj)}DAQ65FP
            =x^1yIR`+5>w~1o23+K&wtgSn{<bQHU=xY@}62{|kB{1$2MudP6<XSYD^%gCkB6(Fy=6erc@S=*d>4ezxio*7(0
            {$vMEN!tqwX(vK{7l(}&u-q!x?}3Ybo03o;{7<z`!P4o>Bd^FK%{)Gn9r$c){WEq4>O=sPdFv}&3n&&i?9C&(3=
            7DK6)Fy38N+e00000000000DO`j?!7JCJ}BPVaM1s7!r$2-poIkI7=n96gZ%&h`OrH8`vCv|0000000000;1=gI
            zJTQG?AmB=_^?6|bWQN1w*>SSdXIep0000000000003}{5)KA@K6L7dP{<9ftoZ!`KP|xE`~QV8K|ue4dIA6d00
            0000001hPbVSazvAsK`~
        """,
        2: """
            c-rlqOKcm*8Gx5B@gY*<B2X0{(oEM*B}Syo<wGQuDzR+Qi4a9r9IB3EIm+zrti_t#Wp<a5RYeFG$3cLiL4zC%6a
            @+t$f1We?V$*oOM@V%z79P!1&RVelLASD7Dy4GEzp@=zC==XT^V_}{|8Z=otgdrf9C&ppxN2cKJxH##im#@%o?$
            AMmQvRy~1&f1wrt#PfX|%WFLRev8Pq%T6l#S#S=px3(?@K0{RO2VeF5w`$nbczoI`2FGk)E{XO&`D*ylh007{6G
            {>XCiFwJ>T&n0Qy{uK~<%(7{wl-?ivdBehZPcqop@aFclV?f`<q}?6Su8z@_d5@tUKvt0<&?!Em~r-j(wP!=D=$
            5QS5BAl%G&aB^XO=BqR8yJw4YsSV~ADJ>siIl+Q%kVlE8YSCR1~`Wy~tPu(F6%O4N47YGh<$dfIc&CUTWpPgdEV
            KN}W(vO#sF|8TTrT6y8batZepPU)mZ6YMB{<*rb0LXtdJ8;;CDLkDxhdn6BOn%gSYDdp1rr89W-%+f;(XU^dVOX
            u*yTKV+S3KQ^9X{DTS+N~J1x}j6u#^utZ<&H-ZxFv6+qV|_4hH26&u`7n&F6~tBtLv!XUSKva_lU4;V$;@{W}`~
            m)+X8>Xde>WrnS0lb(+(bffq}s7S@)_IOQs#rfHZhi5728pGL=zJdfFLDg)vYcx`3r;kD9Kr#}+i4v5E3hDRpON
            *=)p&z3hy!#14bjUkaI4dz9z1OmZ{W5+yKi+#@iy3sIoQXR+`*~itb;%j(1v9Dj9&SIfAqz7)E$4#oxN_`-tRAQ
            6X$#$hS5EON@Vwi(=xncU>`HZ(LJ}kf2nG3;@iM3<bcV?@bH_`)Hp@oqf6Cn*`1)F#HgA)rmPxIlvF|T8_wP9@O
            )Erh4*k|PHKX>ow*DalLN_$5>w|dW*{OqDHIFZYFo}2EA)~=LcdH#K3wnsM~{oK&l6R|4QDtd*-*wB#ej2J!sXQ
            P8zksCI(T4B|Ru->s|Sg^Y?D{L?xjP+W*N^N@W(ZcO6S80_J%MIpMhc1;LIK5WJXHK78T5S3~!HIm{)12(<#%^=
            1p_$%&I<lwA)F!buhxDXusM~v+6<_j>OkBucKVW;L_XcfGwvYWC5fWMxd~fu1VXVe}0RR91000000DNY-lJEwav
            8(6Rv_$g-N(*TvS0w3ztmLxUl$MwBa#oRNl}uJDrt^}TQB$)dRmi8Qrp{*4nUs{#sFus@h|a`_&GDTXsyHW}u2W
            r1i2SyeCC;7S5s770F6!dkj%XV;sq(}$D-e(J+3Jj&m&je%-A#y^Y1FzR40e)8R8`zf?DQ2~Y!FlBl1R;H=r&K?
            JI{)HWpaUzh&tJ3r`QHdu9Au?j%YSDS%$PJ_N#R&F7w9p=ygtP$+I>q^>)3JRl}m{el>N2OSzB`ozAhinXMC8ic
            KkbZ`fvoGD{tWb2}{MnBk-xQ7pB)d*zUayX%OQCq+W3l2w%AtfFP)tfu8t=~+2VXJslE(rSw4NhYhMw45sEWhF(
            jQaYu~N~&C(l@)N8>#m#Nk_eywqlSQ9W4{0Z00000000000JwRS{LPr>p!cl2i%d%Rptn*Y=sCeRHs&82Ly@s>g
            KGc)000000002~KWGZE!_C-X;fN>a^9zFFEGZv!is>#)cNXGvyZ-KCwUlz0N$sK&$7fzy`RP_{ycrv321tCbd7V
            _$gU*xrTK8V%?&^0}b@=-q{#p>WyP5-nVAQF8(1!E%_8!gNoz@C`SF<2o{b2VB>-cYcS{~=?|H2`Nd;kCd00000
            0002EmErsUW8sj1*2n%a_C)OU*kjQ*qen+yADxQ45qTow4~L+S000000Jt@2ZpUK6xF<gS?EOoEFA(4>PktpsG*
            zaWHY;gKO`<AQ3h4qZDkLeTc0^WUn0)u?K^Ka|gxLMxOibQEm%PN?^J1f}5}Wevqpe+}?w8)ERxh9v#|7bc=f3u
            iApGfDFWmlEG%6hSp!hUvx!><D`uWvVo~G4&F*i%|N|Nq~_I91N_n|WRHRGvX>8%C5j{L~GW6P1hkw@jxDC<@fz
            pun(JH6^t<dl}qQnkQZs3g_ycG_H`t%Pr$?a|TNBfGZ+xfhE+c3UAwT>BjzE&G|4Y&um?vaEws#ia7TYFYX4_pk
            7_G;a&X+=evoV)5bUE%D0fd@e_`MK!GywWQqDA@%E!tA=u^S4;1P<@3@7yhU`|!tVL_-g(@!rx?%U9G<es7M9|o
            >$|sJ{`WE7el^5;H;m%(`;W9@mK1Vn76FnX7u7<Nblm3bXg<%k3vUma;WV~qrP9&y{@s;lTuse8gRJeLSiBiuI^
            qjCdivEUCUwH?CR_~6%(k>^+L`Lw+5Eytk9YijzIyAGHJN6lVpc6^L{1hyDevq)QznP3qsQeyk8d1{NH(7$vXWP
            ``2tDi58#`(@A3M$p5~qYJ)YrO`jvcop5azDZ}Y|6i_`Utdv$tcsi;aMCrNTal9Rbl$~SkvP=147(W;k?7#-iZH
            j!*b$>lOyE}u=Mli34!=lQjl?%<l5U-q!JcfI54=~wgV`G?!d*Z*Tk7tlxOFX#{GCA5uxi{3&%N3Wt+(09@EtOx
            )A0000000000fEyy>ANP2iTg$Pi|FFl?y4M=*<oiZ@@_ms`zBe59kB6OPh^0bKD(DnD_qs-$Vx9~*#XRNj5#{xb
            `VWWO2ND0_P}oho^Z&>B{Qo`lHhK{~g?@wHM6aPAp&y{{pew8h0000000000004k%GT|SOJ5%+&Pm=M;KWa_JRX
            +JgZl%$ld?nJ!m&2VT;j{l(XZDYriM~A2Ns@q5-k$!qg~`621H$M3vDW-QhF%tY(V&2)qCxZv@E8C9000000Niq
            *mwlPNInRH|e@GZd)6@LL;NfqUd_Lz{a+*&oMKzyKN%?d>DM_7&qS@TR7Wq@eJ7Vh<Y`FELF&3$58Ya(pgqM`~(
            HvgWFX_gXj%(Di$VEDbC%K5pb^Yw-_8is?%%A7RhK47(-brkeOVq*@8&`Bp^lkUe@$34j%H=uSuvksqtxZ&QGJz
            -SWSf8S%_&UgNkg~kWqWR2$GG##`gvC}&vS&$PjZ7Nxy80g6e<(t61TeCKEP8oW+FDJ!p_DDsaA27Sa#eId#b|B
            T^Ema-mX4V-(F|3sugBfR?4Ol-0}^TRx3|Ylb?YdNtL>d=P}tLtZ5z7W;ThgR_R8obEaC~3A|w%Tl4G_cLj8L{6
            @L1&6&KEc5L2jOUrUnVSR4Vsy4IHa6LI?H%vXzZWA-GEA?~X_jM;$iEYzb-L{zHC3aZRZKBxhz<GBb3vcH+`Jep
            xD6V*sFdmO9zHyHb5`2QQp+l83L?J~*D;8*SwtwRVZ<#okPKbRkDQxd6;4cHj(k8o%R#$nEmnnPlm-^G}3QXO|)
            qGC?@k=+(FWru5nvzNvR9Pt&q?DGF(tEcvpc79sWncZ?vmfyFe;@i4`#~R}cVTD*00000000000D#ZZ9lUpi+lS
            >l4;&2Mn(%fW5YPgGvkk#LqJIAW|2*hDf&Bmg00000000000Ps2Iiyoik={%y*e!9a7M9{~A7ri5(chFzi7XSbN
            0000000000pHsqqpT~nvJRJzQsnu1lSKxaE82tHv;gBGpe?mV200000000000KlzDK==>RM<s>
        """,
    }
    CONFIG = {
        "name": "order", "initial_state": "Open", "data": {"total": 0},
        "states": {"Open": {}, "Paid": {}, "Late": {}, "Closed": {"final": True}},
        "rules": [
            {"from": "Open", "on": "add", "assign": {"total": {"+": ["$data.total", 5]}}},
            {"from": "Open", "on": "pay", "guard": {"amount": {">=": "$data.total"}}, "to": "Paid"},
            {"from": "Open", "after": "1h", "to": "Late"},
            {"from": "Paid", "on": "ship", "to": "Closed"},
        ],
    }  # fmt: skip

    @classmethod
    def make(cls):
        """Print a store as this version writes it."""
        async def fill(path):
            engine = FlexiFlowEngine(path, clock=Clock())
            for name in ("closed", "open", "paid"):
                engine.create_component(cls.CONFIG, name=name)
                await engine.handle_message(name, "add", id="a")
                await engine.handle_message(name, "pay", amount=1, id="b")
            for name in ("closed", "paid"):
                await engine.handle_message(name, "pay", amount=5, id="c")
            await engine.handle_message("closed", "ship", id="d")
            await engine.update_rules("paid", [{"from": "Paid", "on": "note"}])
            await engine.send("open", "lost", id="e")
            await engine.run(until_idle=True)
            await engine.send("open", "add", id="f", delay=60)
            await engine.close()

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "flow.db")
            asyncio.run(fill(path))
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                change_messages(db, "error=replace(error, ?, '')", str(HERE))
            text = base64.b85encode(zlib.compress(Path(path).read_bytes(), 9)).decode()
        indent = " " * 12
        print(textwrap.fill(text, 99, initial_indent=indent, subsequent_indent=indent,
            break_on_hyphens=False))

    def lay_out(self, version):
        content = zlib.decompress(base64.b85decode("".join(self.STORES[version].split())))
        Path(self.path()).write_bytes(content)
        return self.open()

    async def test_there_is_one_of_each_schema(self):
        self.assertEqual([*self.STORES], [*range(1, ff.SCHEMA_VERSION + 1)])

    async def test_it_is_read_and_goes_on(self):
        for version in self.STORES:
            with self.subTest(version=version):
                engine = self.lay_out(version)
                self.assertEqual([[one[key] for key in ("name", "state", "seq", "data", "waiting",
                    "dead", "completed")] for one in engine.status()], [
                    ["closed", "Closed", 4, {"total": 5}, 0, 0, 1_000_000.0],
                    ["open", "Open", 2, {"total": 5}, 1, 1, None],
                    ["paid", "Paid", 4, {"total": 5}, 0, 0, None]])
                seen = '"$data.total"' if version == 1 else "$data.total"  # kept as text
                self.assertEqual([(step["id"], step["outcome"], step["reason"])
                    for step in engine.history("open")], [
                    ("b", "blocked", f"rules[1] wants amount >= {seen} = 5 (saw 1)"),
                    ("a", "stayed", None), ("", "created", None)])
                receipt = await engine.handle_message("paid", "pay", amount=5, id="c")
                self.assertEqual(
                    (receipt.outcome, receipt.seq, receipt.duplicate), ("moved", 3, True))
                self.assertEqual((await engine.handle_message("paid", "note")).outcome, "stayed")
                self.assertEqual([letter["id"] for letter in await engine.redrive()], ["e"])
                self.clock.now += 3600
                await engine.run(until_idle=True)
                (facts,) = engine.status("open")
                self.assertEqual((facts["state"], facts["data"], facts["seq"], facts["dead"],
                    facts["timers"]), ("Late", {"total": 10}, 4, 1, []))
                self.assertEqual([one["differences"] for one in engine.replay()], [[], [], []])
                await engine.close()

    async def test_it_is_only_read_where_nothing_may_be_written(self):
        for version in self.STORES:
            with self.subTest(version=version):
                engine = self.lay_out(version)
                before = Path(self.path()).read_bytes()
                reader = FlexiFlowEngine(SQLiteStore(self.path(), readonly=True), clock=self.clock)
                (facts,) = reader.status("open")
                await reader.close()
                self.assertEqual((facts["queue"][0]["id"], Path(self.path()).read_bytes()),
                    ("f", before))
                self.assertEqual(engine.status("open"), [facts])
                self.assertEqual(self.rows("PRAGMA user_version"), [(ff.SCHEMA_VERSION,)])
                await engine.close()

    async def test_a_newer_one_is_refused_and_left_alone(self):
        engine = self.lay_out(max(self.STORES))
        self.change(f"PRAGMA user_version={ff.SCHEMA_VERSION + 1}")
        before = Path(self.path()).read_bytes()
        error = self.raises(PersistenceError, engine.status)
        self.assertEqual((error.what, Path(self.path()).read_bytes()),
            (f"Store {self.path()!r} was written by a newer FlexiFlow", before))


# ---- 13. Command line, in child processes


EXAMPLES = HERE / "examples"
LAMP = {
    "name": "lamp",
    "initial_state": "Off",
    "states": {"Off": {}, "On": {}, "Broken": {"final": True}},
    "rules": [
        {"from": "Off", "on": "press", "guard": {"not": {"power": "none"}}, "to": "On"},
        {"from": "On", "on": "press", "to": "Off"},
        {"from": "*", "on": "drop", "to": "Broken"},
    ],
}


def plain(text: str) -> str:
    """Return output with times, ages, made ids and widths of columns made equal.

    What asyncio's debug mode says about a slow machine is left out.
    """
    import re

    for pattern, name in (
        (r"(?m)^Executing <.*\n", ""), (r"\b[0-9a-f]{12}-\d+", "ID"),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(,\d+)?", "TIME"),
        (r"\b\d+s\b", "0s"), (r"\d+\.\d\d s\b", "0.00 s"),
        (r"\d{9,}\.\d+", "0.0"), (r" {2,}", "  "), (r" +\n", "\n"),
    ):
        text = re.sub(pattern, name, text)
    return text


class Shell(Case):
    """A test that types commands and compares what they show."""

    def shown(self, *args: str, **settings):
        """Run a command; return its exit code, stdout and stderr."""
        done = self.flexiflow(*args, **settings)
        return done.returncode, plain(done.stdout), plain(done.stderr)

    def lines(self, *messages) -> str:
        """Return messages as NDJSON; text stays as it is."""
        return "".join(
            (one if isinstance(one, str) else json.dumps(one)) + "\n" for one in messages
        )


class TextPictures(Shell):
    """`visualize --format text`, and what the command line writes."""

    def test_a_table_of_states_and_ways(self):
        self.assertEqual(ff.visualize(EXAMPLES / "order.json", format="text",
            active="Open.Unpaid"), textwrap.dedent("""\
            STATE              ON        GUARD                  TO
            > Draft            add       -                      (stays)
            > Draft            place     message.total > 0      Open
              Open             pay       amount >= $data.total  Paid
            *   Open.Unpaid    after 1d  -                      Open.Reminded
                Open.Reminded  after 7d  -                      Closed
              Paid             deliver   -                      Closed
              Closed (final)   -         -                      -
              *                cancel    -                      Closed"""))

    def test_a_move_to_the_own_state_is_told_from_staying_there(self):
        rules = [{"on": "again", "from": "A", "to": "A"}, {"on": "note", "from": "A"}]
        self.assertEqual(ff.visualize({"name": "m", "initial_state": "A", "states": {"A": {}},
            "rules": rules}, format="text").splitlines()[1:],
            ["> A    again  -      A", "> A    note   -      (stays)"])

    def test_the_output_has_the_format_of_its_name(self):
        order = str(EXAMPLES / "order.json")
        for name, format in (("a.svg", "svg"), ("a.txt", "text"), ("a.mmd", "mermaid")):
            self.assertEqual(self.shown("visualize", order, "-o", name), (0, "", ""))
            self.assertEqual(Path(self.path(name)).read_text(encoding="utf-8"),
                ff.visualize(order, format=format) + "\n")
        self.assertEqual(self.flexiflow("visualize", order, "--format", "svg").stdout,
            ff.visualize(order, format="svg") + "\n")
        self.assertEqual((self.shown("visualize", order, "-o", "there/a.svg"),
            os.listdir(self.path("there"))), ((0, "", ""), ["a.svg"]))
        self.assertEqual(self.shown("visualize", order, "-o", "a.PNG"),
            (2, "", "error: Unknown format: '.png'\nFix: one of mermaid, svg, text\n"))
        self.assertFalse(os.path.exists(self.path("a.PNG")))
        self.assertEqual(self.shown("visualize", order, "--format", "dot"),
            (2, "", "error: Unknown format: 'dot'\nFix: one of mermaid, svg, text\n"))

    def test_a_component_of_the_store_is_drawn_where_it_stands(self):
        order = str(EXAMPLES / "order.json")
        self.shown("handle", "--config", order, "place", "--data", '{"total": 5}')
        found = self.flexiflow("visualize", "--name", "order", "--format", "text").stdout
        table = ff.visualize(order, format="text", active="Open.Unpaid")
        self.assertEqual(sorted(found.splitlines()), sorted(table.splitlines()))
        self.assertEqual(self.shown("visualize", "--name", "oder")[2],
            "error: Unknown component: 'oder'\nFix: did you mean 'order'?\n")


class CommandSession(Shell):
    """A normal session: every command's whole output and exit code."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)
        self.lamp = ("--config", "lamp.json")

    def test_init_writes_a_config_that_runs_and_says_how_to_go_on(self):
        code, out, err = self.shown("init", "question.json")
        self.assertEqual((code, out, err), (
            0, "question.json written; next:\n"
            "  python -m flexiflow explain question.json\n"
            "  python -m flexiflow handle --config question.json answer"
            " --data '{\"text\": \"Try again\"}'\n"
            "  python -m flexiflow status question\n", ""))
        steps = [shlex.split(line)[3:] for line in out.splitlines()[1:]]
        explained, handled, status = found = [self.shown(*step) for step in steps]
        self.assertEqual([(code, err) for code, _, err in found], [(0, "")] * 3)
        self.assertEqual(handled[1], "answer: New -> Waiting  timer in 7d\n")
        self.assertIn("Status: OK - config will load", explained[1])
        self.assertNotIn("Warnings", explained[1])
        self.assertEqual(status[1], "state  Waiting, version 1, since TIME (0s)\n"
            "accepts  reply, close\ntimer  after 7d, in 7d\ndata  {\"answers\": 1}\n"
            "queue  0 waiting, 0 dead\n")

    def test_init_never_writes_over_a_file_or_makes_a_folder(self):
        self.write("ticket.json", "mine")
        found = self.shown("init"), self.shown("init", "there/x.json"), self.shown("init", "")
        self.assertEqual([(code, err.splitlines()[0]) for code, _, err in found], [
            (1, "error: Cannot write 'ticket.json'"), (1, "error: Cannot write 'there/x.json'"),
            (1, "error: Cannot write 'ticket.json'")])
        self.assertEqual(Path(self.path("ticket.json")).read_text(), "mine")

    def test_explain_schema_prints_the_schema(self):
        done = self.shown("explain", "--schema")
        self.assertEqual((done[0], json.loads(done[1]), done[2]), (0, ff.schema(), ""))

    def test_register_makes_a_component_once(self):
        first = self.shown("register", *self.lamp)
        self.assertEqual(
            (first, self.shown("register", *self.lamp)),
            (
                (0, "lamp registered in flexiflow.db: 3 states, 3 rules, 0 timers\n", ""),
                (0, "lamp is registered already, in Off\n", ""),
            ),
        )

    def test_register_start_starts_only_what_has_not_begun(self):
        config = ("--config", str(EXAMPLES / "config.json"), "--start")
        first = self.shown("register", *config)
        self.assertEqual(
            (first, self.shown("register", *config)),
            (
                (0, "warehouse registered in flexiflow.db: 4 states, 3 rules, 0 timers\n"
                    "start: InitialState -> AwaitingConfirmation\n", ""),
                (0, "warehouse is registered already, in AwaitingConfirmation\n", ""),
            ),
        )

    def test_register_start_starts_what_is_still_in_its_initial_state(self):
        config = ("--config", str(EXAMPLES / "config.json"))
        self.shown("register", *config)
        self.assertEqual(self.shown("register", *config, "--start"), (
            0,
            "warehouse is registered already, in InitialState\n"
            "start: InitialState -> AwaitingConfirmation\n",
            "",
        ))

    def test_register_json_counts_states_rules_and_timers(self):
        done = self.flexiflow("register", "--config", str(EXAMPLES / "order.json"), "--json")
        self.assertEqual(json.loads(done.stdout), {
            "component": "order", "new": True, "updated": False, "state": "Draft", "states": 6,
            "rules": 7, "timers": 2,
        })

    def test_handle_creates_the_component_and_remembers_it(self):
        self.assertEqual(
            [self.shown("handle", *self.lamp, "press") for _ in range(2)],
            [(0, "press: Off -> On\n", ""), (0, "press: On -> Off\n", "")],
        )

    def test_handle_says_why_a_message_is_not_accepted(self):
        self.assertEqual(
            [
                self.shown("handle", *self.lamp, "press", "--data", '{"power": "none"}'),
                self.shown("handle", *self.lamp, "pres"),
                self.shown("handle", *self.lamp, "drop"),
                self.shown("handle", *self.lamp, "drop"),
            ],
            [
                (3, 'press: blocked in Off: rules[0] wants not (power == "none" (saw "none"))\n',
                    ""),
                (3, "pres: not accepted in Off (accepts: press, drop);"
                    ' did you mean "press"?\n', ""),
                (0, "drop: Off -> Broken\n", ""),
                (3, "drop: not accepted in Broken (completed in Broken)\n", ""),
            ],
        )

    def test_handle_with_an_id_answers_again_and_does_nothing_twice(self):
        first = self.shown("handle", *self.lamp, "press", "--id", "k-1")
        again = self.shown("handle", *self.lamp, "press", "--id", "k-1")
        self.assertEqual(
            (first, again, self.shown("handle", *self.lamp, "drop", "--id", "k-1")[0]),
            ((0, "press: Off -> On\n", ""), (0, "press: Off -> On   (handled before)\n".replace(
                "   ", "  "), ""), 1),
        )

    def test_an_id_repeats_the_exit_code_of_a_refusal(self):
        given = ("press", "--data", '{"power": "none"}', "--id", "k-2", "--json")
        first, again = (self.flexiflow("handle", *self.lamp, *given) for _ in range(2))
        self.assertEqual(
            (first.returncode, again.returncode, json.loads(again.stdout)),
            (3, 3, {**json.loads(first.stdout), "duplicate": True}),
        )

    def test_handle_json_is_the_receipt(self):
        done = self.flexiflow("handle", *self.lamp, "press", "--id", "k-1", "--json")
        self.assertEqual(json.loads(done.stdout), {
            "outcome": "moved", "component": "lamp", "id": "k-1", "from_state": "Off",
            "to_state": "On", "seq": 1, "reason": None, "data": {}, "duplicate": False,
        })

    def test_handle_delivers_what_its_message_caused(self):
        order, warehouse = (("--config", str(EXAMPLES / name), "--name", one)
            for name, one in (("order.json", "order-17"), ("config.json", "warehouse")))
        self.shown("register", *warehouse)
        self.shown("handle", *order, "place", "--data", '{"total": 12}')
        self.shown("handle", *order, "pay", "--data", '{"amount": 12}')
        self.assertEqual(self.shown("status"), (
            0,
            "COMPONENT  STATE  SINCE  V  WAITING  NEXT TIMER  DEAD\n"
            "order-17  Paid  0s  2  0  -  -\n"
            "warehouse  AwaitingConfirmation  0s  1  0  -  -\n"
            "2 components, 0 messages waiting, 0 dead letters\n",
            "",
        ))

    def test_update_rules_shows_what_is_new_and_adds_nothing_twice(self):
        rules = self.write("new.json", [{"from": "Off", "on": "kick", "to": "Broken"}])
        first = self.shown("update_rules", *self.lamp, rules)
        again = self.shown("update-rules", "--name", "lamp", rules)
        self.assertEqual(
            (first, again, self.shown("handle", "--name", "lamp", "kick")),
            (
                (0, "lamp: rules 3 -> 4\n  + Off --kick--> Broken\n", ""),
                (0, "lamp: rules 4 -> 4\n", ""),
                (0, "kick: Off -> Broken\n", ""),
            ),
        )

    def test_update_rules_replace_puts_the_rules_in_place_of_the_old(self):
        self.shown("handle", *self.lamp, "press")
        rules = self.write("new.json", {"rules": [{"from": "On", "on": "press", "to": "Broken"}]})
        self.assertEqual(
            (self.shown("update_rules", *self.lamp, rules, "--replace", "--json"),
                self.shown("handle", "--name", "lamp", "press")),
            (
                (0, '{"component": "lamp", "before": 3, "after": 1}\n', ""),
                (0, "press: On -> Broken\n", ""),
            ),
        )

    def test_rules_with_keys_that_are_null_are_shown(self):
        self.shown("register", *self.lamp)
        rules = self.write("new.json", [{"from": None, "on": "note", "to": None}])
        self.assertEqual(self.shown("update_rules", *self.lamp, rules), (
            0, "lamp: rules 3 -> 4\n  + * --note--> (stays)\n", ""))

    def test_bad_rules_change_nothing(self):
        self.shown("handle", *self.lamp, "press")
        rules = self.write("new.json", [{"from": "On", "on": "kick", "to": "Brocken"}])
        done = self.shown("update_rules", *self.lamp, rules)
        self.assertEqual(
            (done[0], "did you mean 'Broken'?" in done[2],
                self.shown("handle", "--name", "lamp", "press")),
            (1, True, (0, "press: On -> Off\n", "")),
        )

    def test_status_shows_all_about_one(self):
        self.shown("handle", "--config", str(EXAMPLES / "order.json"), "place", "--data",
            '{"total": 12}')
        self.assertEqual(self.shown("status", "order"), (
            0,
            "state  Open.Unpaid, version 1, since TIME (0s)\n"
            'accepts  pay [amount >= $data.total], cancel\n'
            "timer  after 1d, in 24h\n"
            'data  {"basket": [], "reminders": 0, "total": 12}\n'
            "queue  0 waiting, 0 dead\n",
            "",
        ))

    def test_a_dry_run_shows_what_a_message_would_do_and_makes_nothing(self):
        order = ("--config", str(EXAMPLES / "order.json"), "--dry-run")
        place = ("handle", *order, "place", "--data", '{"total": 12}')
        first = self.shown(*place)
        self.assertFalse(os.path.exists(self.path("flexiflow.db")))
        self.shown(*[one for one in place if one != "--dry-run"])
        before = Path(self.path("flexiflow.db")).read_bytes()
        found = [first] + [self.shown("handle", *order, *message) for message in (
            ("pay", "--data", '{"amount": 12}'), ("pay", "--data", '{"amount": 1}'), ("payy",),
            ("-",))]
        self.assertEqual(found, [
            (0, "place: Draft -> Open.Unpaid  (dry run)\n  data  total: null -> 12\n"
                "  timer  after 1d, in 24h\n", ""),
            (0, "pay: Open.Unpaid -> Paid  (dry run)\n  send  pick to warehouse\n"
                "  emit  order.paid\n  ends  after 1d\n", ""),
            (3, 'pay: blocked in Open.Unpaid: rules[4] wants amount >= $data.total = 12 (saw 1)'
                "  (dry run)\n", ""),
            (3, "payy: not accepted in Open.Unpaid (accepts: pay, cancel); did you mean \"pay\"?"
                "  (dry run)\n", ""),
            (2, "", "error: A dry run is of one message\n"
                "Fix: python -m flexiflow handle pay --dry-run\n"),
        ])
        self.assertEqual(Path(self.path("flexiflow.db")).read_bytes(), before)

    def test_status_by_state_counts_components(self):
        for name in ("a", "b", "c"):
            self.shown("register", *self.lamp, "--name", name)
        self.shown("handle", "--name", "b", "press")
        self.assertEqual(
            (self.shown("status", "--by-state"), self.shown("status", "--by-state", "--json")),
            ((0, "STATE  COMPONENTS\nOff  2\nOn  1\n", ""),
             (0, '{"state": "Off", "components": 2}\n{"state": "On", "components": 1}\n', "")))

    def test_status_json_is_one_object_a_line(self):
        self.shown("register", *self.lamp)
        self.shown("register", *self.lamp, "--name", "lamp-2")
        found = [json.loads(line) for line in self.flexiflow("status", "--json").stdout.split("\n")
            if line]
        self.assertEqual(
            [{**one, "since": 0.0} for one in found],
            [
                {"name": name, "state": "Off", "seq": 0, "since": 0.0, "data": {},
                    "completed": None, "waiting": 0, "dead": 0, "timers": []}
                for name in ("lamp", "lamp-2")
            ],
        )

    def test_history_shows_every_step_the_newest_last(self):
        self.shown("handle", *self.lamp, "press", "--id", "k-1")
        self.shown("handle", *self.lamp, "press", "--id", "k-2")
        self.assertEqual(self.shown("history", "lamp", "--limit", "2"), (
            0,
            "V  WHEN  MESSAGE  FROM  TO  OUTCOME  ID\n"
            "1  TIME  press  Off  On  moved  k-1\n"
            "2  TIME  press  On  Off  moved  k-2\n",
            "",
        ))

    def test_history_of_all_names_the_component_in_every_line(self):
        self.shown("handle", *self.lamp, "press", "--id", "k-1")
        self.shown("handle", *self.lamp, "--name", "lamp-2", "drop", "--id", "k-1")
        self.assertEqual(self.shown("history"), (
            0,
            "V  WHEN  COMPONENT  MESSAGE  FROM  TO  OUTCOME  ID\n"
            "0  TIME  lamp  -  Off  Off  created\n"
            "1  TIME  lamp  press  Off  On  moved  k-1\n"
            "0  TIME  lamp-2  -  Off  Off  created\n"
            "1  TIME  lamp-2  drop  Off  Broken  moved  k-1\n",
            "",
        ))

    def test_history_json_is_one_object_a_line(self):
        self.shown("handle", *self.lamp, "press", "--id", "k-1")
        step = json.loads(self.flexiflow("history", "lamp", "--json", "--limit", "1").stdout)
        self.assertEqual(
            {key: step[key] for key in ("component", "seq", "id", "message", "outcome",
                "from_state", "to_state", "reason")},
            {"component": "lamp", "seq": 1, "id": "k-1", "message": {"type": "press"},
                "outcome": "moved", "from_state": "Off", "to_state": "On", "reason": None},
        )

    def test_explain_prints_what_a_config_means(self):
        self.assertEqual(self.shown("explain", "lamp.json"), (
            0,
            "FlexiFlow Config Explanation\n"
            "========================================\n"
            "Source: lamp.json\n\n"
            "Component:\n  name: lamp\n  initial_state: Off\n  rules: 3 rule(s)\n\n"
            "Resolution policy: packs -> builtin\n\n"
            "States:\n  OK Broken\n  OK Off\n  OK On\n"
            "  Built-in: AwaitingConfirmation, ErrorHandling, InitialState, ProcessingRequest\n\n"
            "Status: OK - config will load\n\n"
            "Its rules: python -m flexiflow visualize lamp.json --format text\n"
            "A picture: python -m flexiflow visualize lamp.json -o FILE.svg\n",
            "",
        ))

    def test_explain_exits_1_for_a_bad_config_and_says_what_to_write(self):
        self.write("bad.json", {**LAMP, "initial_state": "Of", "inital_state": "Off"})
        text = self.flexiflow("explain", "bad.json")
        found = json.loads(self.flexiflow("explain", "bad.json", "--json").stdout)
        self.assertEqual(
            (text.returncode, found["valid"], "did you mean 'Off'?" in text.stdout,
                "did you mean 'initial_state'?" in text.stdout),
            (1, False, True, True),
        )

    def test_explain_no_imports_runs_no_code(self):
        self.write("loud.py", "print('imported')\n")
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": "loud:A"},
            "rules": [{"note": 1}]})
        done = self.flexiflow("explain", "c.json", "--no-imports")
        self.assertEqual((done.returncode, "imported" in done.stdout), (0, False))

    def test_visualize_prints_mermaid(self):
        done = self.flexiflow("visualize", "lamp.json")
        wrote = self.flexiflow("visualize", "lamp.json", "-o", "lamp.mmd")
        self.assertEqual(
            (done.returncode, done.stdout.startswith("flowchart LR\n"),
                'On -->|"press"| Off' in done.stdout, wrote.stdout,
                (self.folder / "lamp.mmd").read_text(encoding="utf-8")),
            (0, True, True, "", done.stdout),
        )

    @unittest.skipIf(os.name == "nt", "modes are not kept there")
    def test_a_new_picture_is_readable_as_the_umask_says(self):
        before = os.umask(0o022)
        self.addCleanup(os.umask, before)
        self.flexiflow("visualize", "lamp.json", "-o", "lamp.svg")
        self.assertEqual(oct((self.folder / "lamp.svg").stat().st_mode & 0o777), "0o644")

    def test_diagnose_checks_python_file_and_store(self):
        self.shown("register", *self.lamp)
        text = self.flexiflow("diagnose")
        found = json.loads(self.flexiflow("diagnose", "--json").stdout)
        self.assertEqual(
            (text.returncode, text.stdout.startswith("FlexiFlow environment: OK\n"), found["ok"],
                [one["check"] for one in found["checks"]]),
            (0, True, True, ["flexiflow", "python", "platform", "sqlite", "store", "journal",
                "components"]),
        )

    def test_memory_forgets(self):
        done = [self.shown("handle", *self.lamp, "press", "--db", ":memory:") for _ in range(2)]
        self.assertEqual(
            (done, sorted(os.listdir(self.folder))),
            ([(0, "press: Off -> On\n", "")] * 2, ["lamp.json"]),
        )

    def test_the_reading_commands_make_no_file(self):
        codes = [self.shown(*words)[0] for words in (
            ("status",), ("history",), ("diagnose",), ("explain", "lamp.json"),
            ("visualize", "lamp.json"))]
        self.assertEqual((codes, os.listdir(self.folder)), ([1, 1, 0, 0, 0], ["lamp.json"]))

    def test_version_is_the_files(self):
        text = f"flexiflow {ff.__version__}\n"
        self.assertEqual([self.shown("--version"), self.shown("-V")], [(0, text, "")] * 2)


class QueueSession(Shell):
    """What is in the queue: delivered, given up, given back."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)
        self.write("bell.json", {"name": "bell", "initial_state": "Quiet", "states": {"Quiet": {}},
            "rules": [{"on": "ring", "send": {"to": "lamp", "type": "glow"}}]})
        self.write("glow.json", [{"from": "Off", "on": "glow", "to": "On"}])

    def send(self, *messages):
        """Put messages into the queue, as another process would."""

        async def run():
            engine = FlexiFlowEngine(self.path("flexiflow.db"))
            for name, kind, id in messages:
                await engine.send(name, kind, id=id)
            await engine.close()

        self.run_async(run())

    def give_up(self):
        """Let the lamp get a message that it does not know; return what is said about it."""
        self.shown("register", "--config", "lamp.json")
        return self.shown("handle", "--config", "bell.json", "ring")

    def test_a_dead_letter_is_shown_and_comes_again_when_its_cause_is_mended(self):
        steps = [
            self.give_up(),
            self.shown("dead-letters"),
            self.shown("update_rules", "--name", "lamp", "glow.json"),
            self.shown("redrive", "1"),
            self.shown("run", "--until-idle"),
            self.shown("dead-letters", "lamp"),
            self.shown("history", "lamp", "--limit", "1"),
        ]
        self.assertEqual(steps, [
            (0, "ring: stays in Quiet\n", "Message ID to 'lamp' failed, attempt 1, given up:"
                " Unknown message: 'glow'; Why: no rule of 'lamp' takes it in any state; Fix: use"
                " one of 'drop', 'press'; component='lamp'; state='Off'\n"
                "1 message given up: python -m flexiflow dead-letters says why; mend that"
                " (update_rules adds a rule), then redrive\n"),
            (0, "ID  COMPONENT  MESSAGE  TRIES  AGE  ERROR\n"
                "1  lamp  glow  1  0s  StateError: Unknown message: 'glow'\n", ""),
            (0, "lamp: rules 3 -> 4\n  + Off --glow--> On\n", ""),
            (0, "1 message back in the queue of lamp\n", ""),
            (0, "1 delivered, 0 failed, 0 dead, 0.00 s\n", ""),
            (0, "ID  COMPONENT  MESSAGE  TRIES  AGE  ERROR\n", ""),
            (0, "V  WHEN  MESSAGE  FROM  TO  OUTCOME  ID\n"
                "2  TIME  glow  Off  On  moved  ID\n", ""),
        ])

    def test_status_names_what_waits_for_components_that_are_not_there(self):
        self.shown("register", "--config", "bell.json")
        self.shown("handle", "--name", "bell", "ring")
        self.assertEqual(self.shown("status"), (0,
            "COMPONENT  STATE  SINCE  V  WAITING  NEXT TIMER  DEAD\n"
            "bell  Quiet  0s  1  0  -  -\n"
            "1 component, 0 messages waiting, 0 dead letters\n"
            "1 message for 'lamp', which is not there (yet)\n", ""))
        with contextlib.closing(sqlite3.connect(self.path("flexiflow.db"))) as db, db:
            change_messages(db, "dead=1")
        self.send(("door", "ring", "a"), ("lamp", "press", "a"))
        self.assertEqual(self.shown("status")[1].splitlines()[-2:], [
            "1 message for 'door', which is not there (yet)",
            "1 message and 1 dead letter for 'lamp', which is not there (yet)"])

    def test_status_says_why_a_message_or_timer_comes_again(self):
        self.write("acts.py", "def fail(message, component):\n    raise OSError('no\\nvan')\n")
        self.write("van.json", {"name": "van", "initial_state": "A", "states": {"A": {}},
            "retry": {"base_delay": 7000, "max_delay": 7000}, "rules": [
            {"on": "go", "action": "acts:fail"}, {"after": 0, "action": "acts:fail"}]})
        self.shown("register", "--config", "van.json")
        self.send(("van", "go", "3"))
        done = self.shown("run", "--until-idle")[:2]
        shown = self.shown("status", "van")[1]
        facts = json.loads(self.flexiflow("status", "van", "--json").stdout)
        self.assertEqual((done, shown.splitlines()[2:], [
            {**one, "due": 0, "id": "ID"} for one in facts["timers"] + facts["queue"]]), (
            (0, "0 delivered, 1 failed, 0 dead, 0.00 s\n"),
            ["timer  after 0, in 2h (attempt 1: OSError: no)", "data  {}",
                "queue  1 waiting, 0 dead", "retry  go, in 2h (attempt 1: OSError: no)"],
            [{"message": "after 0", "state": "*", "due": 0, "id": "ID", "attempts": 1,
                "error": "OSError: no\nvan (acts.py:2)"},
             {"number": 2, "message": {"type": "go"}, "due": 0, "id": "ID", "attempts": 1,
                "error": "OSError: no\nvan (acts.py:2)"}]))

    def test_dead_letters_json_tells_all_about_each(self):
        self.give_up()
        letter = json.loads(self.flexiflow("dead-letters", "--json").stdout)
        self.assertEqual(
            ({key: letter[key] for key in ("number", "component", "message", "attempts", "state")},
                letter["error"].split("\n")[0], sorted(letter)),
            ({"number": 1, "component": "lamp", "message": {"type": "glow"}, "attempts": 1,
                "state": "Off"}, "StateError: Unknown message: 'glow'",
                ["attempts", "component", "correlation_id", "dead", "error", "id", "message",
                    "number", "sent", "state", "traceback"]),
        )

    def test_redrive_all_takes_those_of_one_component_or_of_all(self):
        self.shown("register", "--config", "lamp.json")
        self.shown("register", "--config", "lamp.json", "--name", "lamp-2")
        self.send(("lamp", "x", "1"), ("lamp-2", "x", "2"), ("lamp", "x", "3"), ("lamp", "x", "4"))
        self.assertEqual(
            [self.shown("run", "--until-idle")[:2],
                self.shown("redrive", "--name", "lamp-2"),
                self.shown("redrive", "--name", "lamp-2"),
                self.shown("redrive", "--name", "lamp-3"),
                *[self.shown("redrive", "--all") for _ in range(2)]],
            [
                (0, "0 delivered, 0 failed, 4 dead, 0.00 s\n"),
                (0, "1 message back in the queue of lamp-2\n", ""),
                (0, "no dead letters\n", ""),
                (1, "", "error: Unknown component: 'lamp-3'\nFix: did you mean 'lamp-2'?\n"),
                (0, "3 messages back in the queue of lamp\n", ""),
                (0, "no dead letters\n", ""),
            ],
        )

    def test_what_is_hopeless_can_be_discarded(self):
        self.give_up()
        self.assertEqual([self.shown("redrive", "1", "--discard"), self.shown("dead-letters"),
            self.shown("redrive", "1", "--discard"),
            self.shown("run", "--until-idle"), self.shown("status")], [
            (0, "1 message discarded, of lamp\n", ""),
            (0, "ID  COMPONENT  MESSAGE  TRIES  AGE  ERROR\n", ""),
            (1, "", "error: No dead letter has the number 1\nFix: none is known here\n"),
            (0, "0 delivered, 0 failed, 0 dead, 0.00 s\n", ""),
            (0, "COMPONENT  STATE  SINCE  V  WAITING  NEXT TIMER  DEAD\n"
                "bell  Quiet  0s  1  0  -  -\nlamp  Off  0s  0  0  -  -\n"
                "2 components, 0 messages waiting, 0 dead letters\n", "")])

    def test_redrive_json_is_the_letters_and_run_json_counts(self):
        self.give_up()
        letter = json.loads(self.flexiflow("redrive", "--all", "--json").stdout)
        done = json.loads(self.flexiflow("run", "--until-idle", "--json").stdout)
        self.assertEqual((letter["number"], {**done, "seconds": 0}),
            (1, {"delivered": 0, "failed": 0, "dead": 1, "seconds": 0}))

    def test_run_delivers_to_all_what_waits_and_tries_again_what_fails(self):
        self.write("acts.py", "import os\n\n\ndef once(message, component):\n"
            "    if not os.path.exists('tried'):\n        open('tried', 'w').close()\n"
            "        raise OSError('no van')\n")
        self.write("van.json", {"name": "van", "initial_state": "A", "states": {"A": {}, "B": {}},
            "retry": {"base_delay": 0}, "rules": [{"on": "go", "to": "B", "action": "acts:once"}]})
        self.shown("register", "--config", "lamp.json")
        self.shown("register", "--config", "van.json")
        self.send(("lamp", "press", "1"), ("lamp", "press", "2"), ("van", "go", "3"))
        done = self.shown("run", "--until-idle", "--concurrency", "1")
        states = [json.loads(line)["state"] for line in
            self.flexiflow("status", "--json").stdout.splitlines()]
        self.assertEqual((done, states), (
            (0, "3 delivered, 1 failed, 0 dead, 0.00 s\n",
                "Message 3 to 'van' failed, attempt 1, again in 0.0 s: OSError: no van "
                "(acts.py:7)\n"),
            ["Off", "B"]))

    @unittest.skipIf(os.name == "nt", "Windows has no terminals of this kind")
    def test_progress_is_shown_on_a_terminal_only(self):
        self.shown("register", "--config", "lamp.json")
        self.send(("lamp", "press", "1"), ("lamp", "press", "2"))
        mine, its = os.openpty()
        with subprocess.Popen([sys.executable, "-m", "flexiflow", "run", "--until-idle"],
                cwd=self.folder, env={**os.environ, "PYTHONPATH": str(HERE)}, stderr=its,
                stdout=subprocess.PIPE, encoding="utf-8") as child:
            out = child.communicate(timeout=60)[0]
        os.close(its)
        shown = os.read(mine, 1000)
        os.close(mine)
        self.assertEqual((child.returncode, plain(out), shown),
            (0, "2 delivered, 0 failed, 0 dead, 0.00 s\n", b"\r1 message\r2 messages\r"))


class CareSession(Shell):
    """Looking after a store: replay, prune, remove, backup, a config that has changed."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)
        self.shown("handle", "-", "--config", "lamp.json", input=self.lines(*(
            {"component": name, "type": kind, "id": id} for name, kind, id in (
                ("lamp", "press", "k-1"), ("lamp", "press", "k-2"), ("lamp", "drop", "k-3"),
                ("lamp-2", "press", "k-4")))))

    def test_a_replay_by_the_same_rules_ends_the_same(self):
        self.assertEqual([self.shown("replay"), self.shown("replay", "lamp-2")], [
            (0, "lamp: 3 of 3 steps same\nlamp-2: 1 of 1 step same\n", ""),
            (0, "lamp-2: 1 of 1 step same\n", ""),
        ])

    def test_a_replay_by_other_rules_names_every_step_from_the_first_that_differs(self):
        rules = [*LAMP["rules"][:1], {"from": "On", "on": "press", "to": "Broken"},
            *LAMP["rules"][2:]]
        self.write("other.json", {**LAMP, "rules": rules})
        done = self.flexiflow("replay", "lamp", "--config", "other.json", "--json")
        self.assertEqual((self.shown("replay", "--config", "other.json"), done.returncode,
            json.loads(done.stdout)), (
            (1, "lamp: 1 of 3 steps same; it would be in Broken, and is in Broken\n"
                "  step 2: press gave On -> Broken, history says On -> Off\n"
                "  step 3: drop gave ignored in Broken, history says Off -> Broken\n"
                "lamp-2: 1 of 1 step same\n", ""),
            1,
            {"component": "lamp", "steps": 3, "same": 1, "state": "Broken", "would_be": "Broken",
                "skipped": None, "differences": [
                    {"seq": 2, "message": "press", "was": ["moved", "On", "Off"],
                        "now": ["moved", "On", "Broken"]},
                    {"seq": 3, "message": "drop", "was": ["moved", "Off", "Broken"],
                        "now": ["ignored", "Broken", "Broken"]}]},
        ))

    def test_a_replay_shows_data_that_differs(self):
        rule = {"from": "Off", "on": "press", "to": "On", "assign": {"by": "hand"}}
        self.write("other.json", {**LAMP, "rules": [rule, *LAMP["rules"][1:]]})
        self.assertEqual(self.shown("replay", "lamp-2", "--config", "other.json"), (1,
            "lamp-2: 0 of 1 step same; it would be in On, and is in On\n"
            '  step 1: press gave Off -> On with {"by": "hand"}, history says Off -> On with {}\n',
            ""))

    def test_a_replay_says_what_it_skips_and_why(self):
        self.write("acts.py", "def go(message, component):\n    pass\n")
        self.write("van.json", {"name": "van", "initial_state": "A", "states": {"A": {}},
            "rules": [{"on": "go", "action": "acts:go"}]})
        self.shown("handle", "--config", "van.json", "go")
        self.assertEqual(self.shown("replay", "van"),
            (0, "van: skipped: its definition runs code: acts:go\n", ""))

    def test_prune_says_what_it_would_forget_and_forgets_it(self):
        self.assertEqual(
            [self.shown("prune", "lamp", "--keep", "1", "--dry-run"),
                self.shown("prune", "--keep", "1", "--older-than", "30d"),
                self.shown("prune", "--keep", "2", "--older-than", "0s"),
                self.shown("history", "lamp"),
                self.shown("handle", "--name", "lamp", "drop", "--id", "k-3")],
            [
                (0, "would delete 3 of 4 history rows\nwith them: 2 message ids\n", ""),
                (0, "deleted 0 of 6 history rows\nwith them: 0 message ids\n", ""),
                (0, "deleted 2 of 6 history rows\nwith them: 1 message id\n", ""),
                (0, "V  WHEN  MESSAGE  FROM  TO  OUTCOME  ID\n"
                    "2  TIME  press  On  Off  moved  k-2\n"
                    "3  TIME  drop  Off  Broken  moved  k-3\n", ""),
                (0, "drop: Off -> Broken  (handled before)\n", ""),
            ],
        )

    def test_prune_completed_names_the_components_that_go(self):
        self.assertEqual(
            [self.shown("prune", "--completed", "--dry-run"), self.shown("prune", "--completed"),
                self.shown("status", "lamp")[0], self.shown("status", "lamp-2")[0]],
            [
                (0, "would delete 4 of 6 history rows\n"
                    "with them: 3 message ids, component lamp\n", ""),
                (0, "deleted 4 of 6 history rows\n"
                    "with them: 3 message ids, component lamp\n", ""),
                1, 0,
            ],
        )

    def test_prune_json_is_one_object(self):
        found = json.loads(self.flexiflow("prune", "--keep", "1", "--json").stdout)
        self.assertEqual({key: found[key] for key in ("rows", "of", "components", "dry_run")},
            {"rows": 4, "of": 6, "components": [], "dry_run": False})

    def test_remove_takes_a_component_with_all_that_is_its_own(self):
        self.assertEqual(
            [self.shown("remove", "lamp", "--yes"), self.shown("history", "lamp")[0],
                self.shown("remove", "lamp-2", "--yes", "--json"), self.shown("history")],
            [(0, "lamp removed\n", ""), 1,
                (0, '{"component": "lamp-2", "removed": true}\n', ""),
                (0, "V  WHEN  COMPONENT  MESSAGE  FROM  TO  OUTCOME  ID\n", "")],
        )

    @unittest.skipIf(os.name == "nt", "Windows has no terminals of this kind")
    def test_remove_asks_at_a_terminal(self):
        for answer, expected in (("n", (1, "lamp stays\n")), ("", (1, "lamp stays\n")),
                ("y", (0, "lamp removed\n"))):
            with self.subTest(answer):
                mine, its = os.openpty()
                os.write(mine, f"{answer}\n".encode())
                code, out, err = self.shown("remove", "lamp", stdin=its)
                os.close(mine)
                os.close(its)
                self.assertEqual(((code, out), err),
                    (expected, "Remove lamp, history and all? [y/N] "))

    def test_a_backup_is_a_store_by_itself(self):
        self.assertEqual(
            [self.shown("backup", "copy.db"), self.shown("status", "lamp", "--db", "copy.db")[0],
                self.shown("handle", "--name", "lamp-2", "drop", "--db", "copy.db"),
                self.shown("handle", "--name", "lamp-2", "press"),
                self.shown("backup", "other.db", "--json")],
            [
                (0, "flexiflow.db copied to copy.db\n", ""), 0,
                (0, "drop: On -> Broken\n", ""), (0, "press: On -> Off\n", ""),
                (0, '{"store": "flexiflow.db", "backup": "other.db"}\n', ""),
            ],
        )

    def test_register_update_takes_over_a_config_that_has_changed(self):
        rules = [*LAMP["rules"], {"from": "On", "on": "dim", "to": "Off"}]
        config = ("--config", self.write("lamp.json", {**LAMP, "rules": rules}), "--name", "lamp-2")
        bad = ("--config", self.write("bad.json", {**LAMP, "states": {"Off": {}}, "rules": []}))
        refused = self.shown("register", *bad, "--name", "lamp-2", "--update")
        self.assertEqual(
            [self.shown("register", *config), self.shown("register", *config, "--update"),
                self.shown("register", *config, "--update"),
                self.shown("handle", *config, "dim"), refused[:2], "'On'" in refused[2]],
            [
                (0, "lamp-2 is registered already, in On\n", "Component 'lamp-2' goes on with its"
                    " own definition, which differs from the config\n"),
                (0, "lamp-2 updated in flexiflow.db: 3 states, 4 rules, 0 timers\n", ""),
                (0, "lamp-2 is registered already, in On\n", ""),
                (0, "dim: On -> Off\n", ""), (1, ""), True,
            ],
        )

    def test_who_registers_a_moment_later_is_told_that_it_is_there(self):
        config, store = self.write("late.json", {**LAMP, "name": "late", "rules": []}), self.path()
        first = {**LAMP, "name": "late"}
        written = FlexiFlowEngine.register_async

        async def beaten(engine, component):
            async with FlexiFlowEngine(store) as other:
                await written(other, other.create_component(first))
            await written(engine, component)

        output = io.StringIO()
        with unittest.mock.patch.object(FlexiFlowEngine, "register_async", beaten), \
                contextlib.redirect_stdout(output):
            code = ff.main(["register", "--config", config, "--db", store, "--json"])
        facts = json.loads(output.getvalue())
        self.assertEqual((code, facts["new"], facts["updated"], facts["rules"]),
            (0, False, False, len(LAMP["rules"])))


class QuickStart(Shell):
    """1.0.1's quick start, as its README has it, on JSON files; its state is kept now."""

    def test_it_goes_from_start_to_complete_in_separate_commands(self):
        config = ("--config", str(EXAMPLES / "config.json"))
        steps = [
            self.shown("register", *config, "--start"),
            self.shown("handle", *config, "confirm", "--content", "confirmed"),
            self.shown("handle", *config, "complete"),
            self.shown("update_rules", *config, str(EXAMPLES / "new_rules.json")),
        ]
        self.assertEqual(steps, [
            (0, "warehouse registered in flexiflow.db: 4 states, 3 rules, 0 timers\n"
                "start: InitialState -> AwaitingConfirmation\n", ""),
            (0, "confirm: AwaitingConfirmation -> ProcessingRequest\n", ""),
            (0, "complete: ProcessingRequest -> InitialState\n", ""),
            (0, "warehouse: rules 3 -> 5\n  + AwaitingConfirmation --after 15m--> InitialState\n"
                "  + ProcessingRequest --cancel--> InitialState\n", ""),
        ])

    def test_the_config_may_come_from_the_environment(self):
        env = {"FLEXIFLOW_CONFIG": str(EXAMPLES / "config.json")}
        self.assertEqual(
            [self.shown("register", "--start", env=env), self.shown("handle", "cancel", env=env)],
            [
                (0, "warehouse registered in flexiflow.db: 4 states, 3 rules, 0 timers\n"
                    "start: InitialState -> AwaitingConfirmation\n", ""),
                (0, "cancel: AwaitingConfirmation -> InitialState\n", ""),
            ],
        )

    def test_the_embedded_app_goes_on_where_it_stopped(self):
        shutil.copytree(EXAMPLES / "embedded_app", self.folder / "app",
            ignore=shutil.ignore_patterns("*.db", "__pycache__"))
        first, second = (self.python("-W", "error", "app/app.py") for _ in range(2))
        self.assertEqual(
            (first.stderr, first.stdout, second.stderr, second.stdout),
            (
                "",
                "Nothing saved yet: starting in Idle\n"
                "start_job\n  Idle -> Processing\nprogress\nfail\n  Processing -> Failed\n"
                "retry\n  Failed -> Processing\n"
                "Stopping in Processing, 0 done; saved:\n"
                "  4: Processing\n  3: Failed\n  2: Processing\n",
                "",
                "Saved as number 4: going on in Processing\n"
                "complete\n  Processing -> Complete\nreset\n  Complete -> Idle\n"
                "start_job\n  Idle -> Processing\nprogress\n"
                "Stopping in Processing, 1 done; saved:\n"
                "  8: Processing\n  7: Processing\n  6: Idle\n",
            ),
        )

    def test_the_examples_are_good_configs_without_a_warning(self):
        for name in ("config.json", "order.json", "sepsis.json", "embedded_app/config.json"):
            with self.subTest(name):
                done = self.flexiflow("explain", "--json", str(EXAMPLES / name))
                found = json.loads(done.stdout)
                mined = [f"states.Release {one}: This state is never reached" for one in "BCDE"]
                self.assertEqual((found["valid"], found["errors"],
                    [one["what"] for one in found["warnings"]]),
                    (True, [], mined if name == "sepsis.json" else []))


class UsageErrors(Shell):
    """What goes wrong is said in one breath: what, why, how to mend it."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)

    def failing(self, *args: str, **settings):
        code, out, err = self.shown(*args, **settings)
        return code, out, err.rstrip("\n").split("\n")[-1]

    def test_wrong_usage_is_exit_2(self):
        for args, last in (
            ((), ": error: the following arguments are required: COMMAND"),
            (("hanlde",), ": error: no command 'hanlde'; did you mean 'handle'?"),
            (("--db", "x.db", "status"), ": error: options stand after the command: '--db'"),
            (("handle",), " handle: error: the following arguments are required: TYPE"),
            (("status", "--dbb"), " status: error: unrecognized arguments: --dbb; like this: "
                "python -m flexiflow status order-17"),
            (("--dbb", "status"), ": error: options stand after the command: '--dbb'"),
            (("handle", "lamp", "press"), " handle: error: unrecognized arguments: press; like "
                "this: python -m flexiflow handle --name order-17 pay --data '{\"amount\": 12}'"),
            (("history", "--limit", "x"),
                " history: error: argument --limit: invalid int value: 'x'"),
        ):
            with self.subTest(args):
                self.assertEqual(self.failing(*args), (2, "", f"python -m flexiflow{last}"))

    def test_failures_are_exit_1_with_what_and_fix(self):
        self.shown("register", "--config", "lamp.json", "--name", "lamp-1")
        for args, err in (
            (("status", "--db", "no.db"),
                "error: No store: 'no.db'\nFix: register a component first, or check the path\n"),
            (("status", "lamp-2"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("history", "lamp-2"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("handle", "--name", "lamp-2", "press"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("handle", "--config", "no.json", "press"),
                "error: No config file: 'no.json'\nFix: check the path\n"),
            (("register", "--name", "lamp-2"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("dead-letters", "lamp-2"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("replay", "lamp-2"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("prune", "lamp-2", "--keep", "1"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("remove", "lamp-2", "--yes"),
                "error: Unknown component: 'lamp-2'\nFix: did you mean 'lamp-1'?\n"),
            (("redrive", "7"), "error: No dead letter has the number 7\n"
                "Fix: none is known here\n"),
            (("backup", "flexiflow.db"), "error: There is a file already: 'flexiflow.db'\n"
                "Fix: name a new one\n"),
        ):
            with self.subTest(args):
                self.assertEqual(self.shown(*args, env={"FLEXIFLOW_CONFIG": None}), (1, "", err))

    def test_arguments_that_say_nothing_sensible_are_exit_2(self):
        neither = ("error: Neither a component (--name) nor a config given\n"
            "Fix: add --config FILE, or set FLEXIFLOW_CONFIG\n")
        which = ("error: Either numbers of dead letters, --name or --all is needed\n"
            "Fix: redrive 17, redrive --name order-17, or redrive --all\n"
            "  dead-letters shows the numbers\n")
        self.shown("register", "--config", "lamp.json")
        for args, err in (
            (("redrive",), which), (("redrive", "1", "--all"), which),
            (("prune", "--dry-run"), "error: Nothing says what to prune\nFix: --keep 100,"
                " --older-than 30d, or both (what neither keeps), or --completed\n"),
            (("remove", "lamp"), "error: Nobody to ask: stdin is no terminal\nFix: add --yes\n"),
            (("handle", "press"), neither), (("register",), neither),
            (("explain",), neither.replace("Neither a component (--name) nor a", "No")),
            (("history", "--limit", "9" * 23),
                f"error: limit is a whole number from 1: {'9' * 23}\n"),
            (("prune", "--keep", "0"), "error: keep is a whole number from 1: 0\n"),
            (("run", "--concurrency", "0"), "error: concurrency is a whole number from 1: 0\n"),
            (("status", "\udcff"), "error: Not a name for a component: '\\udcff'\n"),
            (("visualize", "lamp.json", "--format", "png"),
                "error: Unknown format: 'png'\nFix: one of mermaid, svg, text\n"),
            (("handle", "--config", "lamp.json", ""), "error: The 'type' of a message is text,"
                " and not empty: ''\nFix: write {\"type\": \"start\"}\n"),
        ):
            with self.subTest(args):
                self.assertEqual(self.shown(*args, stdin=subprocess.DEVNULL,
                    env={"FLEXIFLOW_CONFIG": None}), (2, "", err))

    def test_commands_on_what_is_there_make_no_store(self):
        for args in (("run", "--until-idle"), ("dead-letters",), ("redrive", "--all"), ("replay",),
                ("prune", "--keep", "1"), ("remove", "lamp", "--yes"), ("backup", "copy.db")):
            with self.subTest(args):
                self.assertEqual((self.shown(*args), os.listdir(self.folder)), ((1, "",
                    "error: No store: 'flexiflow.db'\n"
                    "Fix: register a component first, or check the path\n"), ["lamp.json"]))

    def test_bad_data_is_refused(self):
        for data in ("{", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}'):
            with self.subTest(data):
                code, out, err = self.shown(
                    "handle", "--config", "lamp.json", "press", "--data", data)
                self.assertEqual((code, out, err.startswith("error: ")), (2, "", True))

    def write_wrong_action(self):
        """Write a config, c.json, whose action gives flexiflow an argument that makes no sense."""
        self.write("shop.py", "from flexiflow import RetryConfig\n\n"
            "def ship(message, component):\n    RetryConfig(max_attempts=0)\n")
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"from": "A", "on": "go", "to": "B", "action": "shop:ship"}]})

    def test_an_argument_that_an_action_has_wrong_is_a_failure(self):
        self.write_wrong_action()
        code, out, err = self.shown("handle", "--config", "c.json", "go")
        self.assertEqual((code, out, err),
            (1, "", "error: max_attempts is not a number of at least 1: 0\n"))

    def test_so_it_is_where_only_compiled_code_lies(self):
        self.write_wrong_action()
        py_compile.compile(str(HERE / "flexiflow.py"), self.path("flexiflow.pyc"), doraise=True)
        done = self.python("-c", "import flexiflow, sys; sys.exit(flexiflow.main())",
            "handle", "--config", "c.json", "go", env={"PYTHONPATH": str(self.folder)})
        self.assertEqual((done.returncode, done.stderr.splitlines()[0]),
            (1, "error: max_attempts is not a number of at least 1: 0"))

    def test_a_bad_config_names_every_problem(self):
        self.write("bad.json", {**LAMP, "rules": [{"from": "Of", "on": "press", "to": "On"}]})
        code, out, err = self.shown("register", "--config", "bad.json")
        self.assertEqual((code, out, "'Of'" in err, "did you mean 'Off'?" in err, "Trace" in err),
            (1, "", True, True, False))

    def test_a_traceback_is_shown_on_demand(self):
        done = self.shown("status", "--db", "no.db", env={"FLEXIFLOW_DEBUG": "1"})
        self.assertEqual((done[0], "Traceback (most recent call last)" in done[2]), (1, True))

    def test_the_error_of_an_action_leaves_everything_as_it_was(self):
        self.write("shop.py", "def ship(message, component):\n    raise OSError('no van')\n")
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"from": "A", "on": "go", "to": "B", "action": "shop:ship"}]})
        code, out, err = self.shown("handle", "--config", "c.json", "go")
        self.assertEqual(
            (code, out, "error: OSError: no van" in err, "Traceback" in err,
                json.loads(self.flexiflow("status", "c", "--json").stdout)["state"]),
            (1, "", True, False, "A"),
        )

    def test_allow_import_restricts_what_a_config_may_run(self):
        self.write("shop.py", "def ship(message, component):\n    pass\n")
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": {}},
            "rules": [{"on": "go", "action": "shop:ship"}]})
        codes = [self.shown("handle", "--config", "c.json", "go", "--allow-import", one)[0]
            for one in ("shop", "other.", "")]
        self.assertEqual(codes, [0, 1, 1])


class Intake(Shell):
    """`handle -`: a message a line."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)

    def take(self, text: str, *args: str, **settings):
        return self.shown("handle", "-", "--config", "lamp.json", *args, input=text, **settings)

    def test_components_are_made_when_first_named_and_summed_up(self):
        text = self.lines(
            {"component": "a", "type": "press"}, {"component": "b", "type": "press"},
            {"component": "a", "type": "press"}, {"component": "a", "type": "zoom"},
            {"component": "b", "type": "press", "power": "none"},
            {"type": "press"}, "",
        )
        self.assertEqual(self.take(text), (
            0,
            "6 messages to 3 components: 5 moved, 1 unknown\n"
            "STATE  COMPONENTS\nOff  2\nOn  1\n",
            "",
        ))

    def test_json_is_one_receipt_a_line_in_the_lines_order(self):
        text = self.lines(*({"component": name, "type": kind, "id": f"{name}{kind}"}
            for kind in ("press", "zoom", "drop") for name in "abc"))
        code, out, err = self.take(text, "--json")
        found = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(
            (code, [(one["component"], one["outcome"]) for one in found], err.split("\n")[0]),
            (
                0,
                [(name, outcome) for outcome in ("moved", "unknown", "moved") for name in "abc"],
                "9 messages to 3 components: 6 moved, 3 unknown",
            ),
        )

    def test_a_bad_line_is_named_by_its_number_and_the_rest_goes_on(self):
        text = self.lines(
            {"component": "a", "type": "press"}, "{nope", {"component": "a"},
            {"component": 7, "type": "press"}, "[]", {"component": "a", "type": "press"},
        )
        code, out, err = self.take(text)
        self.assertEqual(
            (code, out, [line.split(":")[0] for line in err.splitlines()]),
            (1, "2 messages to 1 component: 2 moved, 4 failed\nSTATE  COMPONENTS\nOff  1\n",
                ["line 2", "line 3", "line 4", "line 5"]),
        )

    def test_json_says_of_a_bad_line_what_is_wrong_in_its_place(self):
        text = self.lines(
            {"component": "a", "type": "press", "id": "k-1"}, "{nope", "",
            {"component": "a", "type": "press", "id": "k-1", "n": 1},
            {"component": "a", "type": "press", "id": "k-2"})
        code, out, err = self.take(text, "--json")
        found = [json.loads(line) for line in out.splitlines()]
        wrong = ["Not valid JSON: line 2; Why: Expecting property name enclosed in double quotes:"
            " line 1 column 2 (char 1)",
            "The id 'k-1' was used for another message to 'a'; Why: an id stands for one message,"
            " its type and payload included; Fix: send the new message under a new id;"
            " first='press'"]
        self.assertEqual(
            (code, [one.get("id", one) for one in found], err.splitlines()),
            (
                1,
                ["k-1", {"line": 2, "error": wrong[0]}, {"line": 4, "error": wrong[1]}, "k-2"],
                [f"line 2: {wrong[0]}", f"line 4: {wrong[1]}",
                    "2 messages to 1 component: 2 moved, 2 failed", "STATE  COMPONENTS", "Off  1"],
            ),
        )

    def test_lines_without_a_newline_at_the_end_and_with_windows_ends_count(self):
        text = '{"component": "a", "type": "press"}\r\n\r\n{"component": "a", "type": "press"}'
        self.assertEqual(self.take(text)[1].split("\n")[0],
            "2 messages to 1 component: 2 moved")

    def test_ignored_lines_are_no_failure(self):
        self.write("two.json", {**LAMP, "rules": [{"from": "On", "on": "press", "to": "Off"}]})
        done = self.flexiflow("handle", "-", "--config", "two.json",
            input=self.lines({"component": "a", "type": "press"}))
        self.assertEqual((done.returncode, done.stdout.split("\n")[0]),
            (0, "1 message to 1 component: 1 ignored"))

    def test_the_same_input_again_changes_nothing(self):
        text = self.lines(*({"component": "a", "type": "press", "id": f"k-{n}"} for n in range(3)))
        first, again = self.take(text), self.take(text)
        self.assertEqual(
            (first[1].split("\n")[0], again[1].split("\n")[0], again[1].split("\n")[1:]),
            ("3 messages to 1 component: 3 moved",
                "3 messages to 1 component: 3 moved, 3 handled before", first[1].split("\n")[1:]),
        )

    def test_a_failing_action_is_named_by_its_line_and_stops_nobody(self):
        self.write("shop.py",
            "def ship(message, component):\n"
            "    if message['n'] == 2:\n        raise OSError('no')\n")
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": {}},
            "data": {"sum": 0}, "rules": [{"on": "go", "action": "shop:ship",
            "assign": {"sum": {"+": ["$data.sum", "$message.n"]}}}]})
        done = self.flexiflow("handle", "-", "--config", "c.json",
            input=self.lines(*({"type": "go", "n": n} for n in (1, 2, 4))))
        status = json.loads(self.flexiflow("status", "c", "--json").stdout)
        self.assertEqual((done.returncode, done.stderr, status["data"]),
            (1, "line 2: OSError: no (shop.py:3)\n", {"sum": 5}))

    def test_an_action_that_says_it_is_cancelled_fails_its_line_alone(self):
        self.write("acts.py", "import asyncio, concurrent.futures\n\n"
            "def act(message, component):\n"
            "    if message['n'] == 2:\n        raise asyncio.CancelledError\n"
            "    if message['n'] == 4:\n        raise concurrent.futures.CancelledError\n")
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": {}},
            "rules": [{"on": "go", "action": "acts:act"}]})
        done = self.flexiflow("handle", "-", "--config", "c.json",
            input=self.lines(*({"type": "go", "n": n} for n in (1, 2, 3, 4, 5))))
        alone = self.flexiflow("handle", "--config", "c.json", "go", "--data", '{"n": 4}')
        if sys.version_info >= (3, 11):  # before, it was always the caller's
            self.assertEqual((done.returncode, done.stderr.splitlines()), (1, [
                "line 2: CancelledError:  (acts.py:5)", "line 4: CancelledError:  (acts.py:7)"]))
        self.assertEqual((alone.returncode, alone.stderr.splitlines()[0]),
            (1, "error: CancelledError:  (acts.py:7)"))

    def test_no_input_is_no_failure(self):
        self.assertEqual(self.take(""), (0, "0 messages to 0 components\n", ""))

    def test_a_line_without_a_component_goes_to_the_named_one(self):
        done = self.take(self.lines({"type": "press"}), "--name", "lamp-7")
        self.assertEqual((done, self.shown("status", "lamp-7")[0]), (
            (0, "1 message to 1 component: 1 moved\nSTATE  COMPONENTS\nOn  1\n", ""), 0))


class Interruptions(Shell):
    """Ctrl-C, a reader that goes away, kill -9."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)

    def start(self, *args: str, program=("-m", "flexiflow"), **settings):
        """Start a command that talks through pipes."""
        child = subprocess.Popen(
            [sys.executable, *program, *args], cwd=self.folder, text=True, bufsize=1,
            encoding="utf-8", **{"env": {**os.environ, "PYTHONPATH": str(HERE)},
                "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                **settings},
        )
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                self.addCleanup(pipe.close)
        self.addCleanup(child.kill)
        return child

    def feed(self, child, *messages):
        """Send lines to a `handle - --json`; return as many receipts."""
        child.stdin.write(self.lines(*messages))
        child.stdin.flush()
        return [json.loads(child.stdout.readline()) for _ in messages]

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT for another process")
    def test_ctrl_c_says_one_word_and_keeps_what_was_answered(self):
        child = self.start("handle", "-", "--config", "lamp.json", "--json")
        receipts = self.feed(child, {"type": "press"}, {"type": "press"}, {"type": "press"})
        child.send_signal(signal.SIGINT)
        child.wait(30)
        self.assertEqual(
            ([one["outcome"] for one in receipts], child.returncode, child.stderr.read(),
                self.shown("handle", "--config", "lamp.json", "press")),
            (["moved"] * 3, 130, "interrupted\n", (0, "press: On -> Off\n", "")),
        )

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT for another process")
    def test_ctrl_c_while_modules_are_imported_says_one_word(self):
        slow = "import time\nprint('here', flush=True)\ntime.sleep(60)\n"
        os.mkdir(self.path("early"))
        self.write("early/zlib.py", slow)  # found before the one that flexiflow.py means
        self.write("slow.py", slow)
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": "slow:A"}})
        for program in (("-S", "-m", "flexiflow"), ("-S", str(HERE / "flexiflow.py"))):
            for folder in (self.path("early"), str(HERE)):
                with self.subTest(program, folder=folder):
                    path = f"{folder}{os.pathsep}{HERE}"
                    child = self.start("explain", "c.json", program=program,
                        env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL)
                    self.assertEqual(child.stdout.readline(), "here\n")
                    child.send_signal(signal.SIGINT)
                    self.assertEqual((child.wait(30), child.stderr.read()), (130, "interrupted\n"))

    @unittest.skipIf(os.name == "nt", "Windows has no terminals of this kind")
    def test_ctrl_c_instead_of_an_answer_changes_nothing(self):
        self.shown("register", "--config", "lamp.json")
        mine, its = os.openpty()
        self.addCleanup(os.close, mine)
        child = self.start("remove", "lamp", stdin=its)
        os.close(its)
        asked = child.stderr.read(len("Remove lamp, history and all? [y/N] "))
        child.send_signal(signal.SIGINT)
        self.assertEqual((asked, child.wait(30), child.stderr.read(), self.shown("status")[0]),
            ("Remove lamp, history and all? [y/N] ", 130, "interrupted\n", 0))

    def work(self, told):
        """Start a worker, and tell it to end while an action waits for a file `go`."""
        self.write("acts.py", textwrap.dedent("""\
            import asyncio, os

            async def wait(message, component):
                print("begun", flush=True)
                while not component._engine._stopping:
                    await asyncio.sleep(0.01)
                print("told", flush=True)
                while not os.path.exists("go"):
                    await asyncio.sleep(0.01)
            """))
        self.write("c.json", {"name": "c", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"from": "A", "on": "x", "to": "B", "action": "acts:wait"}]})
        self.shown("register", "--config", "c.json")

        async def send():
            engine = FlexiFlowEngine(self.path("flexiflow.db"))
            await engine.send("c", "x", id="k-1")
            await engine.close()

        self.run_async(send())
        child = self.start("run", stdin=subprocess.DEVNULL)
        self.assertEqual(child.stdout.readline(), "begun\n")
        child.send_signal(told)
        self.assertEqual(child.stdout.readline(), "told\n")
        return child

    def ended(self, child):
        """Return how a worker ended, and its component's state, waiting and dead messages."""
        found = (child.wait(30), plain(child.stdout.read()), child.stderr.read())
        (facts,) = map(json.loads, self.flexiflow("status", "--json").stdout.splitlines())
        return (*found, facts["state"], facts["waiting"], facts["dead"])

    @unittest.skipIf(os.name == "nt", "Windows has no signals for another process")
    def test_a_worker_that_is_told_to_end_finishes_what_it_is_at_work_on(self):
        for told, code, err in ((signal.SIGTERM, 0, ""), (signal.SIGINT, 130, "interrupted\n")):
            with self.subTest(told):
                child = self.work(told)
                self.write("go", "")
                self.assertEqual(self.ended(child),
                    (code, "1 delivered, 0 failed, 0 dead, 0.00 s\n", err, "B", 0, 0))
                os.unlink(self.path("go"))
                self.shown("remove", "c", "--yes")

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT for another process")
    def test_a_worker_that_is_told_twice_gives_back_what_it_is_at_work_on(self):
        for first, second in itertools.product((signal.SIGINT, signal.SIGTERM), repeat=2):
            with self.subTest(first=first, second=second):
                child = self.work(first)
                child.send_signal(second)
                self.assertEqual(self.ended(child), (130, "", "interrupted\n", "A", 1, 0))
                self.shown("remove", "c", "--yes")

    def test_kill_9_keeps_what_was_answered(self):
        child = self.start("handle", "-", "--config", "lamp.json", "--json")
        self.feed(child, {"type": "press", "id": "k-1"}, {"type": "press", "id": "k-2"},
            {"type": "press", "id": "k-3"})
        child.kill()
        child.wait(30)
        again = self.flexiflow("handle", "-", "--config", "lamp.json", input=self.lines(
            *({"type": "press", "id": f"k-{n}"} for n in range(1, 6))))
        self.assertEqual(again.stdout.split("\n")[:3],
            ["5 messages to 1 component: 5 moved, 3 handled before", "STATE  COMPONENTS",
                "On     1"])

    def test_a_reader_that_went_away_is_exit_141_without_a_traceback(self):
        self.shown("handle", "-", "--config", "lamp.json",
            input=self.lines(*({"type": "press"} for _ in range(300))))
        for words in (("history", "--limit", "300"), ("history", "--json"), ("status",),
                ("diagnose",), ("explain", "lamp.json")):
            with self.subTest(words):
                read, write = os.pipe()
                os.close(read)
                done = self.start(*words, stdout=write, stdin=subprocess.DEVNULL)
                os.close(write)
                self.assertEqual((done.wait(30), done.stderr.read()), (141, ""))

    def test_a_reader_that_went_away_does_not_lose_a_message(self):
        read, write = os.pipe()
        os.close(read)
        child = self.start("handle", "-", "--config", "lamp.json", "--json", stdout=write)
        os.close(write)
        child.stdin.write(self.lines({"type": "press"}))
        child.stdin.close()
        self.assertEqual((child.wait(30), child.stderr.read(), self.shown("status", "lamp")[0]),
            (141, "", 0))


class MainJob(Shell):
    """A hospital's messages from examples/sepsis.ndjson."""

    COMMAND = ("handle", "-", "--config", str(EXAMPLES / "sepsis.json"))
    SUMMARY = (
        "15,214 messages to 1,050 components: 445 ignored, 14,658 moved, 111 unknown{}\n"
        "STATE  COMPONENTS\nRelease A  389\nReturn ER  273\nCRP  96\nIV Antibiotics  87\n"
        "Leucocytes  84\nAdmission NC  39\nER Sepsis Triage  39\nLacticAcid  32\nIV Liquid  11\n"
    )

    def input(self):
        """Return the messages as text, and how many each component gets."""
        text = (EXAMPLES / "sepsis.ndjson").read_text(encoding="utf-8")
        sent = {}
        for line in text.splitlines():
            name = json.loads(line)["component"]
            sent[name] = sent.get(name, 0) + 1
        return text, sent

    def found(self, sent):
        """Return final state and unhandled messages of each component, read from the store."""
        store = SQLiteStore(self.path("flexiflow.db"), readonly=True)
        with contextlib.closing(store):
            states = dict(store.rows("SELECT name, state FROM flexiflow_components"))
            unhandled = dict(sent)
            for step in store.journal():
                unhandled[step["component"]] -= step["outcome"] in ("moved", "stayed")
        return {name: (states[name], unhandled[name]) for name in sent}

    def expected(self):
        """Return what a plain loop without any engine counts."""
        if not SHARED.is_dir():
            self.skipTest("../shared/data is not here")
        with open(SHARED / "expect_sepsis.json", encoding="utf-8") as file:
            cases = json.load(file)["expected_per_case"]
        return {name: (state, unhandled) for name, state, unhandled, _ in cases}

    def test_the_whole_log_is_summed_up(self):
        text, sent = self.input()
        done = self.shown(*self.COMMAND, "--json", input=text)
        receipts = [json.loads(line) for line in done[1].splitlines()]
        refused = dict.fromkeys(sent, 0)
        for one in receipts:
            refused[one["component"]] += one["outcome"] not in ("moved", "stayed")
        self.assertEqual((done[0], len(receipts), sum(refused.values()), done[2]),
            (0, 15_214, 556, self.SUMMARY.format("")))
        expected = self.expected()
        self.assertEqual(
            (self.found(sent), refused),
            (expected, {name: unhandled for name, (_, unhandled) in expected.items()}),
        )

    def test_killed_and_started_again_it_ends_at_the_same_result(self):
        text, sent = self.input()
        with open(EXAMPLES / "sepsis.ndjson", "rb") as messages, subprocess.Popen(
            [sys.executable, "-m", "flexiflow", *self.COMMAND, "--json"], cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(HERE)}, stdin=messages, stdout=subprocess.PIPE,
        ) as child:
            for _ in range(5000):
                child.stdout.readline()
            child.kill()
        code, out, err = self.shown(*self.COMMAND, input=text)
        self.assertEqual((code, plain(out.split(", ")[0]), out.split("\n")[1:], err), (
            0, self.SUMMARY.split(", ")[0], self.SUMMARY.split("\n")[1:], ""))
        self.assertEqual(self.found(sent), self.expected())


# ---- 14. Inspector page


class InspectorPage(Case):
    """What the page may hold: its headers allow it no more than its own script and style."""

    class Tags(html.parser.HTMLParser):
        """The tags of a page, with their attributes; `open` are those not closed yet."""

        VOID = {"meta", "link", "input", "img", "br"}

        def __init__(self, page: str) -> None:
            super().__init__()
            self.found: list = []
            self.open: list = []
            self.feed(page)

        def handle_starttag(self, tag, attributes):
            self.found.append((tag, dict(attributes)))
            if tag not in self.VOID:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag, tag

    def setUp(self):
        super().setUp()
        self.tags = self.Tags(ff.INSPECTOR_PAGE)

    def test_every_tag_is_closed_in_its_place(self):
        self.assertEqual(self.tags.open, [])

    def test_it_has_one_script_and_one_style_without_attributes(self):
        own = [one for one in self.tags.found if one[0] in ("script", "style")]
        self.assertEqual(own, [("style", {}), ("script", {})])

    def test_it_loads_nothing(self):
        addresses = [value for _, found in self.tags.found for key, value in found.items()
            if key in ("src", "href", "action", "srcset")]
        self.assertEqual(set(addresses), {"data:,", "#"})
        self.assertNotRegex(ff.INSPECTOR_PAGE, "(?i)https?:|//[a-z]+[.]|@import|url[(]|import[(]")

    def test_no_attribute_holds_style_or_script(self):
        bad = [(tag, key) for tag, found in self.tags.found for key in found
            if key == "style" or key.startswith("on")]
        self.assertEqual(bad, [])

    def test_text_goes_in_as_text(self):
        self.assertNotRegex(ff.INSPECTOR_PAGE, "(?i)innerHTML|outerHTML|insertAdjacentHTML|"
            r"document[.]write|\beval\b|new Function|createContextualFragment|[.]style\b|srcdoc")

    def test_each_element_that_the_script_names_is_there_once(self):
        ids = [found["id"] for _, found in self.tags.found if "id" in found]
        self.assertEqual(len(ids), len(set(ids)))
        named = set(re.findall(r'(?:\$|on|section)\("([a-z-]+)"', ff.INSPECTOR_PAGE))
        self.assertEqual(named - set(ids), set())

    def test_what_is_typed_or_pressed_has_a_name(self):
        labels = {found["for"] for tag, found in self.tags.found if tag == "label"
            and "for" in found} | {"failed", "timed"}  # those two stand in their labels
        unnamed = [found for tag, found in self.tags.found if tag in ("input", "textarea")
            and "aria-label" not in found and found.get("id") not in labels]
        self.assertEqual(unnamed, [])


# ---- 13. One file: 1.0.1's import paths, one identity, everywhere


class HttpCase(EngineCase):
    """Requests to the application, as an ASGI server makes them."""

    ORDER = {
        "name": "order", "initial_state": "Open", "data": {"n": 0},
        "states": {"Open": {}, "Paid": {}, "Closed": {"final": True}},
        "rules": [
            {"from": "Open", "on": "pay", "to": "Paid", "guard": {"amount": {">": 0}},
                "assign": {"n": "$message.amount"}},
            {"from": "Open", "on": "fail", "assign": {"x": "$message.x"}},
            {"from": "Paid", "after": "1d", "to": "Closed"},
        ],
    }

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.app = ff.create_app(self.engine)

    async def ask(self, method, path, body=None, *, app=None, parts=1, **headers):
        """Make a request; return status, headers and body, decoded where it is JSON."""
        content = b"" if body is None else (
            body if isinstance(body, bytes) else json.dumps(body).encode())
        path, _, query = path.partition("?")
        given = {"host": "testserver", **({"content-type": "application/json"}
            if method == "POST" else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
        scope = {"type": "http", "method": method, "path": unquote(path),
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()
                if v is not None]}
        size = -(-len(content) // parts) or 1
        pieces = [content[at:at + size] for at in range(0, len(content), size)] or [b""]
        events = [{"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}
            for piece in pieces]
        sent = []

        async def receive():
            return events.pop(0) if events else {"type": "http.disconnect"}

        async def send(event):
            sent.append(event)

        await (app or self.app)(scope, receive, send)
        if not sent:
            return None
        answer = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        found = b"".join(one.get("body", b"") for one in sent[1:])
        self.assertEqual(int(answer.get("content-length", len(found))), len(found)
            if method != "HEAD" or found else int(answer.get("content-length", 0)))
        if answer["content-type"] == "application/json" and method != "HEAD":
            found = json.loads(found)
        return sent[0]["status"], answer, found

    async def status(self, *args, **kwargs):
        return (await self.ask(*args, **kwargs))[0]


class HttpRoutes(HttpCase):
    """What each route answers."""

    stored = True

    async def test_the_calls_of_1_0_1(self):
        self.engine.create_component(self.ORDER)
        self.assertEqual((await self.ask("GET", "/health"))[2], {"status": "ok"})
        status, _, answer = await self.ask(
            "POST", "/components/order/message", {"type": "pay", "amount": 5, "id": "k"})
        self.assertEqual((status, answer), (200, {
            "status": "sent", "outcome": "moved", "component": "order", "id": "k",
            "from_state": "Open", "to_state": "Paid", "seq": 1, "reason": None,
            "data": {"n": 5}, "duplicate": False}))

    async def test_each_outcome_has_its_status(self):
        async def loop(message, component):
            receipt = await component.handle_message({"type": "pay", "amount": 1})
            self.assertEqual(receipt.outcome, "queued")

        self.engine.create_component(self.ORDER)
        path, found = "/components/order/message", []
        for message in (
            {"type": "pay", "amount": 0}, {"type": "pya"}, {"type": "fail"}, {"type": ""}, {},
            [1], b"{", b'{"type": "pay", "type": "x"}', {"type": "pay", "amount": 2},
            {"type": "pay", "amount": 2},
        ):
            status, _, answer = await self.ask("POST", path, message)
            found.append((status, answer.get("status"), answer.get("outcome"), answer.get("what")))
        self.assertEqual(found, [
            (409, "refused", "blocked", None),
            (422, None, None, "Unknown message: 'pya'"),
            (500, None, None, "No value at $message.x"),
            (400, None, None, "The 'type' of a message is text, and not empty: ''"),
            (400, None, None, "The 'type' of a message is text, and not empty: None"),
            (400, None, None, "body is not an object: [1]"),
            (400, None, None, "Not valid JSON: body"), (400, None, None, "Not valid JSON: body"),
            (200, "sent", "moved", None), (409, "refused", "ignored", None)])

    async def test_an_unknown_message_tells_what_why_and_fix(self):
        self.engine.create_component(self.ORDER)
        status, _, answer = await self.ask("POST", "/components/order/message", {"type": "pya"})
        receipt = answer.pop("receipt")
        self.assertEqual((status, answer, receipt["outcome"]), (422, {
            "what": "Unknown message: 'pya'", "why": "no rule of 'order' takes it in any state",
            "fix": "did you mean 'pay'?", "context": {"component": "order", "state": "Open"}},
            "unknown"))

    async def test_the_idempotency_key_is_the_id_of_the_message(self):
        self.engine.create_component(self.ORDER)
        send = functools.partial(self.ask, "POST", "/components/order/message",
            {"type": "pay", "amount": 5}, idempotency_key="k-1")
        first, again = (await send())[2], (await send())[2]
        self.assertEqual((first["id"], again), ("k-1", {**first, "duplicate": True}))
        self.assertEqual(await self.status("POST", "/components/order/message",
            {"type": "pay", "amount": 5, "id": "other"}, idempotency_key="k-1"), 400)
        status, _, error = await self.ask("POST", "/components/order/message",
            {"type": "pay", "amount": 6}, idempotency_key="k-1")
        self.assertEqual((status, error["what"]),
            (422, "The id 'k-1' was used for another message to 'order'"))

    async def test_the_correlation_id_comes_and_goes(self):
        self.engine.create_component(self.ORDER)
        _, headers, _ = await self.ask("POST", "/components/order/message",
            {"type": "pay", "amount": 5}, x_correlation_id="c-7")
        self.assertEqual((headers["x-correlation-id"],
            self.engine.history("order")[0]["correlation_id"]), ("c-7", "c-7"))
        _, headers, _ = await self.ask("GET", "/health", x_correlation_id="evil\r\nx: y")
        self.assertRegex(headers["x-correlation-id"], r"\A[0-9a-f-]+\Z")

    async def test_components_come_in_pages_and_filtered(self):
        for number in range(7):
            await self.engine.register_async(
                self.engine.create_component(self.ORDER, name=f"o{number}"))
        await self.engine.handle_message("o3", "pay", amount=1)
        await self.engine.send("o5", "nonsense")
        await self.engine.run(until_idle=True)
        pages, after = [], ""
        while after is not None:
            _, _, found = await self.ask("GET", f"/components?limit=3&after={after}")
            pages.append([one["name"] for one in found["components"]])
            after = found["next"]
        self.assertEqual(pages, [["o0", "o1", "o2"], ["o3", "o4", "o5"], ["o6"]])
        for query, expected in (("q=O3", ["o3"]), ("state=Paid", ["o3"]), ("failed=1", ["o5"]),
                ("waiting=1", ["o3"]), ("failed=1&waiting=1", []), ("q=o&state=Open&limit=2",
                ["o0", "o1"])):
            with self.subTest(query=query):
                _, _, found = await self.ask("GET", f"/components?{query}")
                self.assertEqual([one["name"] for one in found["components"]], expected)
        self.assertEqual((found["total"], found["next"], found["readonly"], found["reload_error"]),
            (6, "o1", False, None))
        for query in ("limit=0", "limit=x", "limit=-1", "limit=1e9"):
            self.assertEqual(await self.status("GET", f"/components?{query}"), 400)

    async def test_a_component_shows_all_about_it(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        await self.engine.handle_message("order", "pay", amount=1)
        await self.engine.send("order", "pay", delay=60, id="later")
        _, _, found = await self.ask("GET", "/components/order")
        (timer,) = found.pop("timers")
        (waiting,) = found.pop("queue")
        self.assertEqual(
            (found, timer["message"], timer["due"], waiting["message"], waiting["id"]), ({
                "name": "order", "state": "Paid", "seq": 1, "data": {"n": 1},
                "since": self.clock.now, "completed": None, "waiting": 1, "dead": 0,
                "accepts": [], "dead_letters": []},
                "after 1d", self.clock.now + 86400, {"type": "pay"}, "later"))

    async def test_history_comes_in_pages_the_newest_first(self):
        self.engine.create_component(self.ORDER)
        for _ in range(4):
            await self.engine.handle_message("order", "pay", amount=0)
        pages, before = [], ""
        while before is not None:
            _, _, found = await self.ask("GET", f"/components/order/history?limit=2{before}")
            pages.append([one["seq"] for one in found["history"]])
            before = found["next"] and f"&before={found['next']}"
        self.assertEqual(pages, [[4, 3], [2, 1], [0]])

    async def test_dead_letters_are_shown_and_given_back(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        for _ in range(3):
            await self.engine.send("order", "nonsense")
        await self.engine.run(until_idle=True)
        _, _, first = await self.ask("GET", "/dead-letters?limit=2")
        _, _, second = await self.ask("GET", f"/dead-letters?limit=2&after={first['next']}")
        numbers = [one["number"] for one in first["dead_letters"] + second["dead_letters"]]
        status, _, answer = await self.ask("POST", f"/dead-letters/{numbers[1]}/redrive")
        _, _, third = await self.ask("GET", "/dead-letters")
        left = [one["number"] for one in third["dead_letters"]]
        self.assertEqual((status, answer["status"], [one["number"] for one in
            answer["dead_letters"]], left, second["next"]),
            (200, "redriven", [numbers[1]], [numbers[0], numbers[2]], None))
        for number in (numbers[1], "x", "-1", "999"):
            self.assertEqual(
                await self.status("POST", f"/dead-letters/{number}/redrive", {}), 404)

    async def test_metrics_count_what_happened(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        for amount in (0, 0, 1):
            await self.engine.handle_message("order", "pay", amount=amount)
        with contextlib.suppress(StateError):
            await self.engine.handle_message("order", "nonsense")
        await self.engine.send("gone", "x")
        self.clock.now += 7
        _, headers, text = await self.ask("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if "_sum" not in line]
        self.assertEqual((headers["content-type"], lines), (
            "text/plain; version=0.0.4; charset=utf-8", [
                "# TYPE flexiflow_messages_total counter",
                'flexiflow_messages_total{outcome="blocked"} 2',
                'flexiflow_messages_total{outcome="moved"} 1',
                'flexiflow_messages_total{outcome="unknown"} 1',
                "# TYPE flexiflow_queue_depth gauge", "flexiflow_queue_depth 1",
                "# TYPE flexiflow_timers gauge", "flexiflow_timers 1",
                "# TYPE flexiflow_oldest_due_seconds gauge", "flexiflow_oldest_due_seconds 7.0",
                "# TYPE flexiflow_dead_letters gauge", "flexiflow_dead_letters 0",
                "# TYPE flexiflow_handling_seconds summary",
                "flexiflow_handling_seconds_count 4"]))

    async def test_names_of_any_characters_are_found_in_the_path(self):
        for name in ("a/b", "ä ö", "..", "a?b#c", "%2F", "\u2028", "<b>"):
            await self.engine.register_async(self.engine.create_component(self.ORDER, name=name))
            with self.subTest(name=name):
                path = f"/components/{quote(name, safe='')}"
                _, _, found = await self.ask("GET", path)
                self.assertEqual((found["name"], await self.status("POST", f"{path}/message",
                    {"type": "pay", "amount": 1})), (name, 200))

    async def test_what_is_not_there_is_404_and_a_wrong_method_405(self):
        self.engine.create_component(self.ORDER)
        for method, path, status in (
            ("GET", "/nothing", 404), ("GET", "/components/x", 404), ("GET", "/components//", 404),
            ("GET", "/components/x/history", 404), ("GET", "/components/x/diagram.svg", 404),
            ("POST", "/components/x/message", 404), ("GET", "/components/order/message", 405),
            ("POST", "/components", 405), ("DELETE", "/components/order", 405),
            ("PUT", "/", 405), ("GET", "/components/order/message/x", 404),
            ("GET", "/dead-letters/1/redrive", 405), ("GET", "/%2e%2e/etc/passwd", 404),
        ):
            with self.subTest(method=method, path=path):
                self.assertEqual(await self.status(method, path, {"type": "pay"}
                    if method == "POST" else None), status)
        self.assertEqual((await self.ask("PUT", "/health"))[1]["allow"], "GET")

    async def test_head_is_get_without_a_body(self):
        get, head = await self.ask("GET", "/health"), await self.ask("HEAD", "/health")
        self.assertEqual((head[0], head[2], head[1]["content-length"]),
            (200, b"", get[1]["content-length"]))
        status, headers, body = await self.ask("HEAD", "/events")
        self.assertEqual((status, headers["content-type"], body), (200, "text/event-stream", b""))

    async def test_what_an_action_asks_for_and_does_not_find_is_its_own_failure(self):
        for ask in (lambda: self.engine.handle_message("ghost", "hello"),
                lambda: self.engine.history(limit=0)):
            async def act(message, component, ask=ask):
                found = ask()
                await found

            self.engine.create_component({"name": "asker", "initial_state": "A",
                "states": {"A": {}}, "rules": [{"on": "go", "action": self.code(act)}]},
                update=True)
            self.assertEqual(
                await self.status("POST", "/components/asker/message", {"type": "go"}), 500)

    async def test_the_page_and_its_policy(self):
        status, headers, page = await self.ask("GET", "/")
        policy = dict(part.strip().split(" ", 1) for part in
            headers["content-security-policy"].split(";"))
        for tag in (b"script", b"style"):
            found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.S)
            hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'"
                for one in found] or ["'none'"]
            self.assertEqual(policy[f"{tag.decode()}-src"].split(), hashes)
        self.assertEqual((status, policy["default-src"], headers["x-content-type-options"],
            headers["cache-control"]), (200, "'none'", "nosniff", "no-store"))

    async def test_get_changes_nothing(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        before = self.picture()
        for path in ("/", "/health", "/components", "/components/order", "/metrics",
                "/components/order/history", "/dead-letters"):
            self.assertEqual(await self.status("GET", path), 200)
        self.assertEqual(self.picture(), before)

    async def test_read_only_refuses_every_post(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        app = ff.create_app(self.engine, readonly=True)
        before = self.picture()
        for path in ("/components/order/message", "/dead-letters/1/redrive"):
            self.assertEqual(await self.status("POST", path, {"type": "pay"}, app=app), 403)
        self.assertEqual(self.picture(), before)
        self.assertTrue((await self.ask("GET", "/components", app=app))[2]["readonly"])

    async def test_a_mounted_app_takes_its_own_part_of_the_path(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        for path, raw in (("/x/components/order", b"/x/components/order"),
                ("/components/order", b"/x/components/order"), ("/components/order", None)):
            sent = []

            async def send(event, sent=sent):
                sent.append(event)

            await self.app({"type": "http", "method": "GET", "path": path, "raw_path": raw,
                "root_path": "/x", "query_string": b"", "headers": []}, None, send)
            self.assertEqual(sent[0]["status"], 200)

    async def test_lifespan_starts_and_ends_the_engine(self):
        events, sent = ["lifespan.startup", "lifespan.shutdown"], []

        async def receive():
            return {"type": events.pop(0)}

        async def send(event):
            sent.append((event["type"], self.engine._worker is not None
                and not self.engine._worker.done()))

        await self.app({"type": "lifespan"}, receive, send)
        self.assertEqual(sent, [
            ("lifespan.startup.complete", True), ("lifespan.shutdown.complete", False)])

    async def test_what_is_shown_has_been_committed(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        asks = ("/components/order", "/components", "/components/order/history", "/metrics")
        before = [(await self.ask("GET", path))[2] for path in asks]
        store, go = self.engine.store, threading.Event()
        commit = store._commit

        def fails_slowly(db):
            go.wait(30)
            db.execute("ROLLBACK")
            return sqlite3.OperationalError("database or disk is full")

        store._mean, store._commit = 1.0, fails_slowly  # slow: in a thread
        before_it = store.write(None, [])  # when this has failed, the next commit is under way
        while store._committing is None:
            await asyncio.sleep(0)
        pay = asyncio.ensure_future(self.engine.handle_message("order", "pay", amount=1))
        await self.passes()
        shown = asyncio.gather(*(self.ask("GET", path) for path in asks))
        await self.passes()
        go.set()
        for failed in (before_it, pay):
            with self.assertRaises(PersistenceError):
                await failed
        store._commit = commit
        found = [answer for _, _, answer in await shown]
        self.assertEqual(found[:3], before[:3])

    async def test_without_lifespan_the_first_post_starts_delivery(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        await self.ask("GET", "/health")
        self.assertIsNone(self.engine._worker)
        await self.ask("POST", "/components/order/message", {"type": "pay", "amount": 1})
        self.assertFalse(self.engine._worker.done())

    async def test_a_client_that_goes_away_in_the_middle_of_a_body_changes_nothing(self):
        await self.engine.register_async(self.engine.create_component(self.ORDER))
        before, events = self.picture(), [
            {"type": "http.request", "body": b'{"type": "pay", "amount": 1}', "more_body": True},
            {"type": "http.disconnect"}]

        async def receive():
            return events.pop(0)

        headers = [(b"content-type", b"application/json")]
        await self.app({"type": "http", "method": "POST", "path": "/components/order/message",
            "query_string": b"", "headers": headers}, receive, None)
        self.assertEqual(self.picture(), before)

    def stream(self, until, last=None):
        """Ask for events, until one holds a text; return the task, and the list of what comes."""
        sent, gone = [], asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(event):
            sent.append(event.get("body", b"").decode())
            if until in sent[-1]:
                gone.set()

        headers = [] if last is None else [(b"last-event-id", last)]
        return asyncio.ensure_future(self.app({"type": "http", "method": "GET", "path": "/events",
            "query_string": b"", "headers": headers}, receive, send)), sent

    async def test_events_are_journal_rows_and_resume(self):
        self.engine.create_component(self.ORDER)
        for amount in (0, 1):
            await self.engine.handle_message("order", "pay", amount=amount)
        streaming, sent = self.stream('"seq": 3', b"2")
        await self.passes()
        other = self.open()  # as another process would
        await other.handle_message("order", "pay")
        await asyncio.wait_for(streaming, 30)
        found = re.findall(r"id: (\d+)\ndata: (.*)\n\n", "".join(sent))
        self.assertEqual([(int(id), json.loads(data)["seq"], json.loads(data)["number"])
            for id, data in found], [(3, 2, 3), (4, 3, 4)])

    async def test_events_go_on_where_the_client_has_seen_more_than_there_is(self):
        self.engine.create_component(self.ORDER)
        streaming, sent = self.stream('"seq": 1', b"900")
        await self.passes()
        await self.engine.handle_message("order", "pay")
        await asyncio.wait_for(streaming, 30)
        self.assertIn("\nid: ", "\n" + "".join(sent))

    async def test_events_after_a_removal_are_sent_though_their_numbers_come_again(self):
        self.patch("POLL", 0.005)
        for name in ("order", "late"):
            await self.engine.register_async(self.engine.create_component(self.ORDER, name=name))
        await self.engine.handle_message("late", "pay")
        streaming, sent = self.stream('"k-1"')
        await asyncio.sleep(0.02)
        await self.engine.remove("late")
        await asyncio.sleep(0.05)
        await self.engine.handle_message("order", "pay", id="k-1")
        await asyncio.wait_for(streaming, 30)
        self.assertEqual(re.findall(r"id: (\d+)", "".join(sent)), ["2"])

    async def test_an_error_within_a_stream_of_events_ends_it(self):
        sent, calls = [], []

        async def receive():
            await asyncio.Event().wait()

        async def send(event):
            sent.append(event["type"])

        def journal(component, limit, where, values):
            calls.append(values)
            raise ff.PersistenceError("Damaged")

        self.engine.queue.journal = journal
        await self.app({"type": "http", "method": "GET", "path": "/events", "query_string": b"",
            "headers": []}, receive, send)
        self.assertEqual((sent, calls), (["http.response.start", "http.response.body",
            "http.response.body"], [(0,)]))


class HttpRefusals(HttpCase):
    """What is refused, before a body is read."""

    async def refused(self, **headers):
        """Return the status of a POST, whose body must not be asked for if it is refused."""
        sent = []

        async def receive():
            self.fail("The body was read")

        async def send(event):
            sent.append(event)

        given = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()
            if v is not None]
        app = ff.create_app(self.engine, ["testserver", "[::1]"], headers.pop("token", None))
        await app({"type": "http", "method": "POST", "path": "/components/x/message",
            "query_string": b"", "headers": given}, receive, send)
        return sent[0]["status"]

    async def test_hosts_of_others(self):
        for host in (None, "", "evil", "evil:80", "testserver.evil", "evil.testserver",
                "testserver@evil", "127.0.0.1", "[::2]", "a b", "testserver:x",
                "testserver:999999"):
            with self.subTest(host=host):
                self.assertIn(await self.refused(host=host, content_type="application/json"),
                    (400, 403))

    async def test_pages_of_others(self):
        good = {"host": "testserver", "content_type": "application/json"}
        for headers in ({"origin": "null"}, {"origin": "http://evil"},
                {"origin": "http://testserver.evil"}, {"origin": "testserver"},
                {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"},
                {"host": "evil", "origin": "http://evil"}):
            with self.subTest(headers=headers):
                self.assertEqual(await self.refused(**{**good, **headers}), 403)

    async def test_kinds_of_bodies_that_a_form_can_send(self):
        for kind in (None, "", "text/plain", "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x", "text/json"):
            with self.subTest(kind=kind):
                self.assertEqual(await self.refused(host="testserver", content_type=kind), 415)

    async def test_too_much(self):
        self.assertEqual(await self.refused(host="testserver", content_type="application/json",
            content_length="1000000000"), 413)
        app = ff.create_app(self.engine)
        self.assertEqual(await self.status("POST", "/components/x/message", b" " * 1_100_000,
            app=app, parts=50, content_length=None), 413)

    async def test_a_token_is_needed_for_all_but_the_page(self):
        app = ff.create_app(self.engine, token="s3cret")
        found = [(await self.ask("GET", "/components", app=app, authorization=given))[0]
            for given in (None, "", "s3cret", "Bearer s3cre", "Bearer s3crett", "Bearer \xe9",
                "Bearer s3cret")]
        free = [await self.status("GET", path, app=app) for path in ("/", "/health")]
        self.assertEqual((found, free), ([401] * 6 + [200], [200, 200]))

    async def test_a_link_from_elsewhere_may_open_the_page(self):
        for site, mode, status in (("cross-site", "navigate", 200), ("cross-site", "cors", 403),
                ("same-origin", "cors", 200), ("none", "navigate", 200)):
            self.assertEqual(await self.status("GET", "/", sec_fetch_site=site,
                sec_fetch_mode=mode), status)

    async def test_a_failing_action_is_500_and_told_to_the_log(self):
        def act(message, component):
            raise ValueError("no shop")

        self.engine.create_component(self.machine({"on": "go", "action": self.code(act)}))
        with self.assertLogs("flexiflow", "ERROR"):
            status, _, answer = await self.ask("POST", "/components/m/message", {"type": "go"})
        self.assertEqual((status, answer["what"]), (500, "ValueError: no shop"))


class HttpServing(Shell):
    """The small server, in a process of its own."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)

    def serve(self, *args, **settings):
        """Start `serve`; return the process, when it listens."""
        child = subprocess.Popen([sys.executable, "-m", "flexiflow", "serve", "--port", "0", *args],
            cwd=self.folder, env={**os.environ, "PYTHONPATH": str(HERE)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
        for stream in (child.stdout, child.stderr):
            self.addCleanup(stream.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        line = child.stdout.readline()
        self.port = int(re.search(r":(\d+)/", line)[1])
        return child

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        self.addCleanup(connection.close)
        return connection

    def raw(self, data, *, then_end=False):
        """Send bytes; return the status of the answer, or None."""
        with contextlib.closing(self.connect()) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                if then_end:
                    connection.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionError):
                while True:
                    part = connection.recv(65536)
                    if not part:
                        break
                    found += part
        return int(found.split()[1]) if found else None

    def ask(self, method, path, body=None, **headers):
        """Make a request; return status and JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            given = {"Content-Type": "application/json"} if method == "POST" else {}
            connection.request(method, path, body and json.dumps(body), {**given, **headers})
            answer = connection.getresponse()
            content = answer.read()
            is_json = answer.getheader("Content-Type") == "application/json"
            return answer.status, json.loads(content) if is_json else content

    def test_a_component_is_served_and_the_rest_is_as_by_command_line(self):
        child = self.serve("--config", "lamp.json")
        status, answer = self.ask("POST", "/components/lamp/message", {"type": "press"})
        self.assertEqual((status, answer["to_state"]), (200, "On"))
        self.assertEqual(self.shown("status", "lamp")[1].splitlines()[0],
            "state  On, version 1, since TIME (0s)")
        self.assertEqual(self.shown("handle", "--name", "lamp", "press")[1], "press: On -> Off\n")
        status, answer = self.ask("GET", "/components/lamp")
        self.assertEqual((answer["state"], answer["seq"]), ("Off", 2))
        child.send_signal(signal.SIGTERM)
        self.assertEqual((child.wait(30), child.stderr.read()), (0, ""))

    @unittest.skipIf(os.name == "nt", "Windows has no signals for another process")
    def test_told_twice_it_waits_for_nothing(self):
        self.write("acts.py", "import asyncio\n\nasync def hang(message, component):\n"
            "    open('begun', 'w').close()\n    await asyncio.sleep(600)\n")
        self.write("slow.json", {"name": "slow", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"from": "A", "on": "go", "to": "B", "action": "acts:hang"}]})
        self.shown("register", "--config", "slow.json")

        async def send():
            engine = FlexiFlowEngine(self.path("flexiflow.db"))
            await engine.send("slow", "go")
            await engine.close()

        self.run_async(send())
        for told in (signal.SIGTERM, signal.SIGINT):
            child = self.serve("--config", "slow.json")
            while not os.path.exists(self.path("begun")):
                self.assertIsNone(child.poll())
            child.send_signal(told)
            time.sleep(0.3)  # two signals at once are one
            child.send_signal(told)
            self.assertEqual((child.wait(30), child.stderr.read()), (130, "interrupted\n"))
            (facts,) = json.loads(f"[{self.flexiflow('status', '--json').stdout}]")
            self.assertEqual((facts["state"], facts["waiting"]), ("A", 1))
            os.unlink(self.path("begun"))

    def test_a_refused_body_is_let_in_so_that_the_answer_gets_out(self):
        self.serve("--config", "lamp.json", "--token", "secret")
        body = json.dumps({"type": "press", "text": "x" * 900_000})
        start = time.monotonic()
        found = Counter(self.ask("POST", "/components/lamp/message", body)[0] for _ in range(40))
        self.assertEqual(found, {401: 40})
        self.assertLess(time.monotonic() - start, 40 * ff.PATIENCE)  # nobody was waited for

    def test_who_is_refused_and_resets_the_connection_leaves_no_word_in_the_log(self):
        child = self.serve("--config", "lamp.json")
        for data in (b"BAD\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n") * 20:
            with contextlib.closing(self.connect()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(data)
        self.assertEqual(self.ask("GET", "/health")[0], 200)
        child.send_signal(signal.SIGTERM)
        self.assertEqual((child.wait(30), child.stderr.read()), (0, ""))

    def test_a_stream_of_events_may_be_asked_for_with_a_body(self):
        child = self.serve("--config", "lamp.json")
        with contextlib.closing(self.connect()) as client, client.makefile("rb") as answer:
            client.sendall(b"GET /events?after=0 HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 3\r\n\r\nabc")
            seen = []
            while not any(b"created" in line for line in seen):
                seen.append(answer.readline())
                self.assertNotEqual(seen[-1], b"", seen)
        child.send_signal(signal.SIGTERM)
        self.assertEqual((child.wait(30), child.stderr.read()), (0, ""))

    def test_who_neither_sends_nor_leaves_is_answered_and_keeps_nobody_out(self):
        self.serve("--config", "lamp.json", "--token", "secret")
        head = (b"POST /components/lamp/message HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 900000\r\n\r\n")
        for _ in range(2 * ff.CONNECTIONS):  # which stay open
            client = self.connect()
            client.sendall(head)
            self.assertEqual(client.makefile("rb").read().split()[1], b"401")
        self.assertEqual(self.ask("GET", "/health"), (200, {"status": "ok"}))

    def test_a_body_that_is_too_long_is_told_so(self):
        self.serve("--config", "lamp.json")
        body = {"type": "press", "text": "x" * 5_000_000}
        self.assertEqual(self.ask("POST", "/components/lamp/message", body)[0], 413)

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "no such signals here")
    def test_told_twice_it_waits_for_nothing_also_where_it_only_reads(self):
        self.shown("register", "--config", "lamp.json")
        child = self.serve("--read-only")
        for told in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            child.send_signal(told)  # both before it has done anything about the first
        self.assertEqual((child.wait(30), child.stderr.read()), (130, "interrupted\n"))

    def test_read_only_needs_a_store_and_changes_nothing(self):
        self.assertEqual(self.shown("serve", "--read-only", "--port", "0")[0], 1)
        self.shown("register", "--config", "lamp.json")
        before = Path(self.path("flexiflow.db")).read_bytes()
        self.serve("--read-only")
        self.assertEqual(self.ask("POST", "/components/lamp/message", {"type": "press"})[0], 403)
        self.assertEqual(self.ask("GET", "/components/lamp")[1]["state"], "Off")
        self.assertEqual(Path(self.path("flexiflow.db")).read_bytes(), before)

    def test_what_cannot_be_served_is_said(self):
        child = self.serve()
        port = self.port
        found = [self.shown("serve", *args) for args in (
            ("--host", "0.0.0.0"), ("--port", str(port)), ("--port", "99999"), ("--watch",),
            ("--watch", "--read-only"))]
        self.assertEqual([(code, err.splitlines()[0]) for code, _, err in found], [
            (2, "error: 0.0.0.0 can be reached by others"),
            (1, f"error: Cannot listen on 127.0.0.1, port {port}"),
            (1, "error: Cannot listen on 127.0.0.1, port 99999"),
            (2, "error: No config given"), (2, "error: --watch changes components")])
        self.assertIsNone(child.poll())

    def test_the_loopback_of_ipv6_needs_no_token(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("no IPv6 here")
        for host in ("::1", "[::1]"):
            child = self.serve("--host", host)
            answers = []
            for name in (None, "[::1]", "localhost", "evil.example"):
                connection = http.client.HTTPConnection("::1", self.port, timeout=30)
                connection.request("GET", "/health", headers={"Host": name} if name else {})
                answers.append(connection.getresponse().status)
                connection.close()
            child.terminate()
            self.assertEqual((host, answers), (host, [200, 200, 200, 403]))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "no such signals here")
    def test_of_a_request_without_an_answer_at_the_end_nothing_comes(self):
        child = self.serve("--config", "lamp.json")
        connections = [self.connect() for _ in range(3)]
        time.sleep(0.1)
        child.send_signal(signal.SIGSTOP)
        body = b'{"type": "press"}'
        for number, connection in enumerate(connections):
            connection.sendall(b"POST /components/lamp/message HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nIdempotency-Key: k%d\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (number, len(body), body))
        child.terminate()
        child.send_signal(signal.SIGCONT)
        child.wait(60)
        answered = set()
        for number, connection in enumerate(connections):
            with contextlib.suppress(ConnectionError):
                if b"200 OK" in connection.recv(1 << 16):
                    answered.add(f"k{number}")
        steps = self.flexiflow("history", "lamp", "--json").stdout.splitlines()
        self.assertEqual({json.loads(step)["id"] for step in steps} - {""}, answered)

    def test_an_empty_token_of_the_environment_protects_nothing_and_is_refused(self):
        self.assertEqual(self.shown("serve", "--port", "0", env={"FLEXIFLOW_TOKEN": ""}),
            (2, "", "error: The token is empty\nFix: --token SECRET, or unset FLEXIFLOW_TOKEN\n"))

    def test_a_token_of_the_environment_is_needed(self):
        with unittest.mock.patch.dict(os.environ, FLEXIFLOW_TOKEN="s3cret"):
            self.serve("--host", "0.0.0.0")
        self.assertEqual([self.ask("GET", "/components", **headers)[0] for headers in (
            {}, {"Authorization": "Bearer s3cret"})], [401, 200])

    def test_hostile_requests_are_refused_and_change_nothing(self):
        self.serve("--config", "lamp.json")
        body = b'{"type": "press"}'
        post = b"POST /components/lamp/message HTTP/1.1\r\n"
        host, kind = b"Host: 127.0.0.1\r\n", b"Content-Type: application/json\r\n"
        length = b"Content-Length: %d\r\n" % len(body)

        def request(*lines, first=post, body=body):
            return first + b"".join(lines) + b"\r\n" + body

        refused = {
            "no host": (request(kind, length), 400),
            "two hosts": (request(host, host, kind, length), 400),
            "evil host": (request(b"Host: evil\r\n", kind, length), 403),
            "evil port": (request(b"Host: evil:8765\r\n", kind, length), 403),
            "longer host": (request(b"Host: 127.0.0.1.evil\r\n", kind, length), 403),
            "other loopback": (request(b"Host: 127.0.0.2\r\n", kind, length), 403),
            "user in host": (request(b"Host: a@127.0.0.1\r\n", kind, length), 400),
            "empty host": (request(b"Host:\r\n", kind, length), 400),
            "rebinding": (request(b"Host: evil\r\nOrigin: http://evil\r\n", kind, length), 403),
            "null origin": (request(host, kind, length, b"Origin: null\r\n"), 403),
            "evil origin": (request(host, kind, length, b"Origin: http://evil\r\n"), 403),
            "form": (request(host, length, b"Content-Type: text/plain\r\n"), 415),
            "no length": (request(host, kind), 411),
            "negative": (request(host, kind, b"Content-Length: -1\r\n"), 400),
            "underscore": (request(host, kind, b"Content-Length: 1_0\r\n"), 400),
            "letters": (request(host, kind, b"Content-Length: abc\r\n"), 400),
            "plus": (request(host, kind, b"Content-Length: +17\r\n"), 400),
            "float": (request(host, kind, b"Content-Length: 9e9\r\n"), 400),
            "huge": (request(host, kind, b"Content-Length: 99999999999\r\n"), 413),
            "two lengths": (request(host, kind, length, length), 400),
            "chunked": (request(host, kind, b"Transfer-Encoding: chunked\r\n",
                body=b"11\r\n" + body + b"\r\n0\r\n\r\n"), 411),
            "both": (request(host, kind, length, b"Transfer-Encoding: chunked\r\n"), 411),
            "long line": (request(host, b"X: " + b"x" * 65536 + b"\r\n", kind, length), 431),
            "many headers": (request(host, *[b"X: y\r\n"] * 100_000, kind, length), 431),
            "folded": (request(host, kind, b"X: a\r\n b\r\n", length), 400),
            "space before colon": (request(host, kind, b"X : a\r\n", length), 400),
            "control": (request(host, kind, b"X: a\x00b\r\n", length), 400),
            "bare line feed": (request(host, kind, b"X: a\nY: b\r\n", length), 400),
            "HTTP/0.9": (b"GET /\r\n\r\n", 400),
            "HTTP/2": (b"GET / HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n", 400),
            "proxy": (b"GET http://evil/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
            "space in path": (b"GET /a b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
            "up": (b"GET /%2e%2e/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
            "line in path": (b"GET /%0d%0aX:y HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
            "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        }
        for name, (data, status) in refused.items():
            with self.subTest(name):
                self.assertIn(self.raw(data), {status, None} if status == 431 else {status})
        self.assertEqual(self.ask("GET", "/components/lamp")[1]["seq"], 0)
        two = request(host, kind, length) * 2  # pipelined: the first is answered, then it closes
        self.assertEqual((self.raw(two), self.ask("GET", "/components/lamp")[1]["seq"]), (200, 1))
        half = request(host, kind, length)
        self.assertEqual(self.raw(half, then_end=True), 200)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc")
    def test_slow_clients_hinder_nobody_and_leave_nothing(self):
        child = self.serve("--config", "lamp.json")
        files = f"/proc/{child.pid}/fd"
        self.ask("GET", "/health")
        before = len(os.listdir(files))
        slow, kinds = [], (b"", b"GET / HTTP", b"POST /components/lamp/message HTTP/1.1\r\n"
            b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        for number in range(500):
            slow.append(self.connect())
            slow[-1].sendall(kinds[number % 3])
        for _ in range(5):
            self.assertEqual(self.ask("GET", "/health")[0], 200)
        end = time.monotonic() + 5  # before their time is over
        while len(os.listdir(files)) > before + 70 and time.monotonic() < end:
            self.ask("GET", "/health")
        self.assertLess(len(os.listdir(files)), before + 70)
        for one in slow:
            one.close()
        end = time.monotonic() + 30
        while len(os.listdir(files)) > before and time.monotonic() < end:
            self.ask("GET", "/health")
        self.assertLessEqual(len(os.listdir(files)), before)

    def test_streams_fill_the_places_and_the_next_one_is_told(self):
        self.serve("--config", "lamp.json")
        streams = [self.connect() for _ in range(ff.CONNECTIONS)]
        for one in streams:
            one.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            self.assertEqual(one.recv(12), b"HTTP/1.1 200")
        self.assertEqual(self.raw(b""), 503)
        streams.pop().close()
        while self.ask("GET", "/health")[0] == 503:  # until it has seen that one left
            pass
        self.assertEqual(self.ask("GET", "/health")[0], 200)

    def test_what_is_sent_into_a_stream_of_events_is_not_kept(self):
        child = self.serve("--config", "lamp.json")

        def memory():
            text = Path(f"/proc/{child.pid}/status").read_text()
            return int(re.search(r"VmHWM:\s+(\d+)", text)[1])  # kB

        stream = self.connect()
        stream.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        self.assertEqual(stream.recv(12), b"HTTP/1.1 200")
        before = memory()
        for _ in range(60):
            stream.sendall(bytes(1 << 20))
        self.assertLess(memory(), before + 20_000)

    def test_another_process_is_seen_in_the_events(self):
        self.serve("--config", "lamp.json")
        connection = self.connect()
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nLast-Event-ID: 1\r\n\r\n")
        self.shown("handle", "--name", "lamp", "press")
        found = b""
        while b'"to_state": "On"' not in found:
            part = connection.recv(65536)
            self.assertTrue(part, found)
            found += part
        self.assertIn(b"content-type: text/event-stream", found)
        self.assertIn(b"\nid: 2\n", found)

    def test_a_term_signal_lets_a_request_end(self):
        self.write("slow_acts.py", "import asyncio\n\nasync def act(message, component):\n"
            "    open('begun', 'w').close()\n    await asyncio.sleep(1.5)\n")
        self.write("slow.json", {"name": "slow", "initial_state": "A", "states": {"A": {}, "B": {}},
            "rules": [{"from": "A", "on": "go", "to": "B", "action": "slow_acts:act"}]})
        child = self.serve("--config", "slow.json")
        stream = self.connect()
        stream.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        connection, body = self.connect(), b'{"type": "go"}'
        connection.sendall(b"POST /components/slow/message HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while not os.path.exists(self.path("begun")):
            self.assertIsNone(child.poll())
        child.send_signal(signal.SIGTERM)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                found += part
        self.assertEqual((child.wait(30), child.stderr.read()), (0, ""))
        self.assertIn(b'"outcome": "moved"', found)


class Reloading(EngineCase):
    """`watch_path`, and configs that change while they are in use."""

    stored = True

    async def watching(self, path, on_change):
        self.patch("POLL", 0.005)
        task = asyncio.ensure_future(ff.watch_path(path, on_change))
        self.addCleanup(task.cancel)
        await asyncio.sleep(0)
        return task

    async def until(self, condition):
        for _ in range(2000):
            if condition():
                return
            await asyncio.sleep(0.005)
        self.fail("It did not come to be")

    async def test_a_callback_that_fails_is_logged_and_watching_goes_on(self):
        path, seen = self.write("a.json", "1"), []

        async def on_change():
            seen.append(Path(path).read_text())
            if len(seen) == 1:
                raise ValueError("not yet")

        await self.watching(path, on_change)
        with self.assertLogs("flexiflow", "ERROR") as logs:
            for text in ("2", "3", "4"):
                self.write("a.json", text)
                await self.until(lambda text=text: seen[-1:] == [text])
        self.assertEqual((seen, len(logs.records)), (["2", "3", "4"], 1))

    async def test_renaming_counts_and_the_same_content_does_not(self):
        path, seen = self.write("a.json", "1"), []
        await self.watching(path, lambda: seen.append(Path(path).read_text()))
        os.utime(path, (1, 1))
        await asyncio.sleep(0.05)
        os.unlink(path)
        await asyncio.sleep(0.05)
        self.assertEqual(seen, [])
        os.replace(self.write("b.json", "2"), path)
        await self.until(lambda: seen == ["2"])

    async def test_a_folder_is_watched_with_all_that_is_in_it(self):
        (self.folder / "in" / "deep").mkdir(parents=True)
        seen = []
        await self.watching(self.path("in"), lambda: seen.append(1))
        self.write("in/deep/x.json", "1")
        await self.until(lambda: seen)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no pipes with names here")
    async def test_a_pipe_in_a_folder_holds_nobody_up(self):
        os.mkdir(self.path("in"))
        os.mkfifo(self.path("in/pipe"))
        over, held_up = threading.Event(), []

        def free():  # who opens a pipe for reading waits for a writer
            while not over.wait(5 if not held_up else 0.01):
                held_up.append(os.close(os.open(self.path("in/pipe"), os.O_RDWR)))

        writer = threading.Thread(target=free)
        writer.start()
        self.addCleanup(writer.join)
        self.addCleanup(over.set)
        seen = []
        await self.watching(self.path("in"), lambda: seen.append(1))
        self.write("in/x.json", "1")
        await self.until(lambda: seen)
        self.assertEqual((seen, held_up), ([1], []))

    def test_run_hot_reload_is_a_loop_of_its_own(self):
        path, seen = self.write("a.json", "1"), []
        self.patch("POLL", 0.005)

        async def on_change():
            seen.append(1)
            raise KeyboardInterrupt

        threading.Timer(0.1, self.write, ("a.json", "2")).start()
        with self.assertRaises(KeyboardInterrupt):
            ff.run_hot_reload(path, on_change)
        self.assertEqual(seen, [1])

    async def test_a_config_is_taken_over_when_it_is_good_and_else_the_old_one_stays(self):
        self.patch("POLL", 0.005)
        config = self.machine({"from": "A", "on": "go", "to": "B"})
        path = self.write("m.json", config)
        for name in ("m", "like"):
            await self.engine.register_async(self.engine.create_component(path, name=name))
        task = asyncio.ensure_future(ff.watch_config(self.engine, path))
        self.addCleanup(task.cancel)
        await asyncio.sleep(0.02)
        self.write("m.json", {**config, "rules": [{"from": "A", "on": "jump", "to": "B"}]})
        await self.until(lambda: [one["type"] for one in self.engine.accepts("like")] == ["jump"])
        self.assertEqual([one["type"] for one in self.engine.accepts("m")], ["jump"])
        self.write("m.json", "{")
        await self.until(lambda: self.engine.reload_error)
        self.assertIn("Not valid JSON", self.engine.reload_error)
        self.write("m.json", {**config, "initial_state": "B", "states": {"B": {}}, "rules": []})
        await self.until(lambda: "would be gone" in (self.engine.reload_error or ""))
        self.assertEqual([one["type"] for one in self.engine.accepts("m")], ["jump"])
        self.write("m.json", config)
        await self.until(lambda: self.engine.reload_error is None
            and [one["type"] for one in self.engine.accepts("m")] == ["go"])

    async def test_that_a_config_is_taken_over_is_said_once(self):
        self.patch("POLL", 0.005)
        config = self.machine({"from": "A", "on": "go", "to": "B"})
        path = self.write("m.json", config)
        await self.engine.register_async(self.engine.create_component(path))
        with self.assertLogs("flexiflow", "WARNING") as logs:
            task = asyncio.ensure_future(ff.watch_config(self.engine, path))
            self.addCleanup(task.cancel)
            await asyncio.sleep(0.02)
            self.write("m.json", {**config, "rules": [{"from": "A", "on": "jump", "to": "B"}]})
            await self.until(lambda: self.engine.accepts("m")[0]["type"] == "jump")
            self.write("m.json", "{")
            await self.until(lambda: self.engine.reload_error)
            self.write("m.json", {**config, "rules": [{"on": "jump", "from": "A", "to": "B"}]})
            await self.until(lambda: self.engine.reload_error is None)
        self.assertEqual([record.getMessage().replace(path, "m.json").partition(" | ")[0]
            for record in logs.records],
            ["m.json is taken over", "m.json is not taken over", "m.json is taken over"])

    async def test_what_a_turn_that_ends_refuses_is_not_said_to_be_taken_over(self):
        path, begun, go = self.waiting()
        config = self.machine({"from": "A", "on": "go", "to": "B", "action": path})
        self.engine.create_component(config)
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        adopted = asyncio.ensure_future(self.engine.adopt(self.machine(states="A")))
        await self.passes(9)
        go.set()
        await asyncio.wait([task, adopted])
        self.assertEqual((adopted.exception().what, self.engine.get("m").rules),
            ("State 'B' of 'm' would be gone", config["rules"]))

    async def test_a_refusal_of_before_is_none_of_the_next_config(self):
        path, begun, go = self.waiting()
        config = self.machine({"from": "A", "on": "go", "to": "B", "action": path})
        self.engine.create_component(config)
        task = asyncio.ensure_future(self.engine.handle_message("m", "go"))
        await begun.wait()
        self.engine.create_component(self.machine(states="A"), update=True)
        go.set()
        await task
        await self.engine.run(until_idle=True)  # there it was refused
        self.assertFalse(await self.engine.adopt(config))  # which it has
        self.assertTrue(await self.engine.adopt(self.machine({"on": "note"})))
        self.assertEqual(self.engine.get("m").rules, [{"on": "note"}])

    async def test_two_configs_at_once_are_both_taken_over_or_refused_truly(self):
        self.engine.create_component(self.machine({"on": "zero"}))
        await self.engine.run(until_idle=True)
        found = await asyncio.gather(*[
            self.engine.adopt(self.machine({"on": kind})) for kind in ("one", "two")])
        self.assertEqual((found, self.engine.get("m").rules), ([True, True], [{"on": "two"}]))
        other = self.open()
        await other.remove("m")
        with self.assertRaises(StateError) as caught:
            await self.engine.adopt(self.machine({"on": "three"}))
        self.assertEqual((caught.exception.what, self.engine.status()),
            ("Component 'm' is gone", []))

    async def test_a_config_of_a_component_that_is_not_there_is_not_taken_over(self):
        self.patch("POLL", 0.005)
        self.engine.create_component(self.LAMP)
        path = self.write("m.json", {**self.machine(), "name": "lamb"})
        task = asyncio.ensure_future(ff.watch_config(self.engine, path))
        self.addCleanup(task.cancel)
        await self.until(lambda: self.engine.reload_error)
        self.assertEqual(self.engine.reload_error,
            "Unknown component: 'lamb'\nFix: did you mean 'lamp'?")

    async def test_who_was_refused_a_config_follows_the_next_one(self):
        self.patch("POLL", 0.005)
        config = self.machine({"from": "A", "on": "go", "to": "B"})
        path = self.write("m.json", config)
        for name in ("m", "like"):
            await self.engine.register_async(self.engine.create_component(path, name=name))
        await self.engine.handle_message("like", "go")
        task = asyncio.ensure_future(ff.watch_config(self.engine, path))
        self.addCleanup(task.cancel)
        await asyncio.sleep(0.02)
        self.write("m.json", {**config, "states": {"A": {}}, "rules": [{"on": "stay"}]})
        await self.until(lambda: "'like' would be gone" in (self.engine.reload_error or ""))
        rules = [{"from": "B", "on": "hop", "to": "A"}, {"from": "A", "on": "go", "to": "B"}]
        self.write("m.json", {**config, "rules": rules})
        await self.until(lambda: self.engine.get("like").rules == rules)
        self.assertEqual((self.engine.get("m").rules, self.engine.reload_error), (rules, None))

    async def test_the_others_follow_the_next_config_though_the_named_one_was_refused(self):
        config = self.machine({"from": "A", "on": "go", "to": "B"})
        for name in ("m", "like", "gone"):
            await self.engine.register_async(self.engine.create_component(config, name=name))
        await self.engine.handle_message("m", "go")
        with self.assertRaisesRegex(ConfigError, "'m' would be gone"):
            await self.engine.adopt({**config, "states": {"A": {}}, "rules": [{"on": "stay"}]})
        await self.engine.remove("gone")
        rules = [{"from": "B", "on": "hop", "to": "A"}]
        await self.engine.adopt({**config, "rules": rules})
        self.assertEqual(([self.engine.get(name).rules for name in ("m", "like")],
            self.engine.get("gone")), ([rules, rules], None))

    async def test_a_component_made_by_hand_takes_a_config_over(self):
        engine = FlexiFlowEngine()
        self.addAsyncCleanup(engine.close)
        engine.register(AsyncComponent("m"))
        config = {"name": "m", "rules": [{"on": "note"}]}
        config["initial_state"] = engine.get("m").state
        taken = await engine.adopt(config)
        self.assertEqual((taken, engine.get("m").rules), (True, config["rules"]))

    async def test_who_was_refused_one_config_is_left_alone_by_another(self):
        config = self.machine({"from": "A", "on": "go", "to": "B"})
        other = {**self.machine({"from": "A", "on": "turn", "to": "B"}), "name": "n"}
        for name, one in (("m", config), ("like", config), ("n", other)):
            await self.engine.register_async(self.engine.create_component(one, name=name))
        await self.engine.handle_message("like", "go")
        with self.assertRaisesRegex(ConfigError, "'like' would be gone"):
            await self.engine.adopt({**config, "states": {"A": {}}, "rules": [{"on": "stay"}]})
        await self.engine.adopt({**other, "rules": [{"from": "A", "on": "spin", "to": "B"}]})
        self.assertEqual(self.engine.get("like").rules, config["rules"])


class OldPaths(Case):
    """Everything of 1.0.1 is found where its users import it."""

    PATHS = {
        "engine": "FlexiFlowEngine",
        "component": "AsyncComponent",
        "state_machine": "State StateMachine StateRegistry DEFAULT_REGISTRY InitialState"
            " AwaitingConfirmation ProcessingRequest ErrorHandling",
        "config_loader": "ConfigLoader ComponentConfig",
        "statepack": "StatePack StateSpec TransitionSpec MappingPack",
        "pack_loader": "load_packs collect_provided_keys",
        "errors": "FlexiFlowError ConfigError StateError PersistenceError ImportError_"
            " ErrorContext",
        "explain": "explain ConfigExplanation Diagnostic PackInfo StateResolution",
        "visualize": "visualize",
        "event_manager": "AsyncEventManager Subscription SubscriptionHandle",
        "imports": "load_symbol",
        "logger": "get_logger set_correlation_id CorrelationIdFilter",
        "cli": "main",
        "api": "",
        "reload": "",
        "extras": "retry_async RetryConfig save_component load_snapshot restore_component"
            " ComponentSnapshot save_snapshot_sqlite load_latest_snapshot_sqlite"
            " list_snapshots_sqlite prune_snapshots_sqlite",
        "extras.retry": "retry_async RetryConfig",
        "extras.persist_json": "save_component load_snapshot restore_component ComponentSnapshot",
        "extras.persist_sqlite": "save_snapshot load_latest_snapshot list_snapshots"
            " prune_snapshots",
    }

    def test_every_path_and_name_is_this_very_module(self):
        import importlib

        for path, names in self.PATHS.items():
            for name in names.split():
                with self.subTest(f"{path}.{name}"):
                    module = importlib.import_module(f"flexiflow.{path}")
                    self.assertIs(getattr(module, name), getattr(ff, name))

    def test_every_name_is_at_the_top_too(self):
        names = " ".join(self.PATHS.values()).split()
        self.assertEqual([name for name in names if not hasattr(ff, name)], [])
        self.assertEqual([name for name in ff.__all__ if not hasattr(ff, name)], [])

    def test_paths_are_found_in_a_fresh_process_whatever_comes_first(self):
        code = (
            "import flexiflow.extras.retry as r, flexiflow.engine\n"
            "from flexiflow import engine\n"
            "from flexiflow.extras.persist_sqlite import save_snapshot\n"
            "import flexiflow\n"
            "print(r is engine is flexiflow.engine, r.retry_async is flexiflow.retry_async)"
        )
        self.assertEqual(self.python("-c", code).stdout, "True True\n")

    def test_functions_named_like_an_old_module_stay_functions(self):
        from flexiflow.explain import explain as by_path
        from flexiflow.visualize import visualize as drawn

        self.assertEqual((ff.explain, ff.visualize), (by_path, drawn))

    def test_a_wrong_path_is_not_found(self):
        done = self.python("-c", "import flexiflow.enigne")
        self.assertEqual(done.stderr.rstrip().split("\n")[-1].split(":")[0], "ModuleNotFoundError")

    def test_pickles_of_1_0_1_paths_are_read(self):
        for path, name in (("errors", "StateError"), ("extras.persist_json", "ComponentSnapshot"),
                ("state_machine", "InitialState"), ("config_loader", "ComponentConfig")):
            with self.subTest(path):
                found = pickle.loads(f"cflexiflow.{path}\n{name}\n.".encode())
                self.assertIs(found, getattr(ff, name))

    def test_records_survive_pickling(self):
        async def receipt():
            async with FlexiFlowEngine() as engine:
                engine.create_component(LAMP)
                return await engine.handle_message("lamp", "press", id="k-1")

        config = ConfigLoader.load_component_config(self.write("lamp.json", LAMP))
        error = self.raises(StateError, StateMachine.from_name, "Nope")
        again = pickle.loads(pickle.dumps(error))
        self.assertEqual((type(again), str(again), again.what),
            (StateError, str(error), error.what))
        for record in (
            self.run_async(receipt()), config,
            ff.ComponentSnapshot("c", "InitialState", [{"note": 1}], {"by": "test"}),
            ff.RetryConfig(max_attempts=2),
        ):
            with self.subTest(type(record).__name__):
                self.assertEqual(pickle.loads(pickle.dumps(record)), record)


class OneIdentity(Case):
    """However the file is started, named or carried, `State` is one class."""

    STATES = (
        "from {module} import State\n\n\n"
        "class Idle(State):\n"
        "    async def handle_message(self, message, component):\n"
        "        return (True, Busy()) if message['type'] == 'go' else (False, self)\n\n\n"
        "class Busy(State):\n"
        "    pass\n"
    )
    CONFIG = {
        "name": "job", "initial_state": "Idle", "rules": [{"note": "none"}],
        "states": {"Idle": "jobstates:Idle", "Busy": "jobstates:Busy"},
    }
    EXPECTED = (0, "go: Idle -> Busy\n", "")

    def job(self, module: str = "flexiflow"):
        """Write states that import `State` from a module, and a config that names them."""
        self.write("jobstates.py", self.STATES.format(module=module))
        return ("handle", "--config", self.write("job.json", self.CONFIG), "go")

    def ran(self, *args: str, **settings):
        done = self.python(*args, **settings)
        return done.returncode, done.stdout, done.stderr

    def test_as_a_module(self):
        self.assertEqual(self.ran("-m", "flexiflow", *self.job()), self.EXPECTED)

    def test_as_a_script(self):
        script = str(HERE / "flexiflow.py")
        self.assertEqual(self.ran(script, *self.job(), env={"PYTHONPATH": None}), self.EXPECTED)

    def test_what_it_tells_to_type_starts_it_as_it_was_started(self):
        shutil.copy(HERE / "flexiflow.py", self.folder / "flow2.py")
        env = {"PYTHONPATH": str(self.folder)}
        for how, told in ((["-m", "flow2"], "python -m flow2"),
                (["flow2.py"], "python flow2.py"),
                ([self.path("flow2.py")], f"python {self.path('flow2.py')}")):
            with self.subTest(told):
                code, out, err = self.ran(*how, "hanlde", env=env)
                self.assertEqual((code, out, err.split(" [-h]")[0]),
                    (2, "", f"usage: {told}"))

    def test_under_a_profiler(self):
        for how in (("-m", "cProfile"), ("-m", "trace", "--count", "-C", self.path("counts"))):
            with self.subTest(how[1]):
                done = self.ran(*how, str(HERE / "flexiflow.py"), *self.job(), "--db",
                    self.path(how[1] + ".db"))
                self.assertEqual((done[0], "go: Idle -> Busy\n" in done[1]), (0, True))

    def test_vendored(self):
        (self.folder / "shop" / "_vendor").mkdir(parents=True)
        for package in ("shop", "shop/_vendor"):
            self.write(f"{package}/__init__.py", "")
        shutil.copy(HERE / "flexiflow.py", self.folder / "shop" / "_vendor")
        env = {"PYTHONPATH": str(self.folder)}
        args = self.job("shop._vendor.flexiflow.state_machine")
        code = (
            "from shop._vendor.flexiflow.engine import FlexiFlowEngine as A\n"
            "from shop._vendor.flexiflow import FlexiFlowEngine as B, load_symbol\n"
            "print(A is B, A.__module__, load_symbol('flexiflow.engine:FlexiFlowEngine') is A)"
        )
        self.assertEqual(
            (self.ran("-m", "shop._vendor.flexiflow", *args, env=env),
                self.ran("-c", code, env=env)),
            (self.EXPECTED, (0, "True shop._vendor.flexiflow True\n", "")),
        )

    def test_renamed(self):
        shutil.copy(HERE / "flexiflow.py", self.folder / "flow2.py")
        env = {"PYTHONPATH": str(self.folder)}
        self.assertEqual(
            [self.ran(*how, *self.job("flow2.engine"), "--db", self.path(f"{len(how)}.db"), env=env)
                for how in (("-m", "flow2"), ("flow2.py",))],
            [self.EXPECTED] * 2,
        )

    def test_zipped(self):
        import zipfile

        with zipfile.ZipFile(self.path("app.zip"), "w") as archive:
            archive.write(HERE / "flexiflow.py", "flexiflow.py")
            archive.writestr("__main__.py", "import sys, flexiflow\nsys.exit(flexiflow.main())\n")
        env = {"PYTHONPATH": self.path("app.zip")}
        self.assertEqual(
            [self.ran(*how, *self.job(), "--db", self.path(f"{len(how)}.db"), env=env)
                for how in (("-m", "flexiflow"), (self.path("app.zip"),))],
            [self.EXPECTED] * 2,
        )

    def test_loaded_by_path(self):
        code = (
            "import importlib.util, sys\n"
            f"path = {str(HERE / 'flexiflow.py')!r}\n"
            "spec = importlib.util.spec_from_file_location('mine', path)\n"
            "sys.modules['mine'] = module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "from mine.engine import FlexiFlowEngine\n"
            "print(FlexiFlowEngine is module.FlexiFlowEngine)"
        )
        self.assertEqual(self.ran("-c", code, env={"PYTHONPATH": None}), (0, "True\n", ""))

    def test_a_process_that_is_spawned_finds_what_it_is_sent(self):
        self.write("spawn.py", (
            "import multiprocessing\n"
            "from flexiflow.errors import StateError\n\n\n"
            "def work(error):\n"
            "    return error.what + '!'\n\n\n"
            "if __name__ == '__main__':\n"
            "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
            "        print(pool.apply(work, (StateError('sent'),)))\n"
        ))
        self.assertEqual(self.ran("spawn.py"), (0, "sent!\n", ""))


class Portability(Shell):
    """Odd interpreters, odd environments."""

    def setUp(self):
        super().setUp()
        self.write("lamp.json", LAMP)

    def test_odd_switches_change_nothing(self):
        switches = [["-I", "-S"], ["-O"], ["-OO"], ["-B", "-E"],
            ["-bb", "-X", "dev", "-W", "error"]]
        if sys.version_info >= (3, 10):
            switches.append(["-X", "warn_default_encoding", "-W", "error"])
        for number, switch in enumerate(switches):
            with self.subTest(" ".join(switch)):
                done = self.python(*switch, str(HERE / "flexiflow.py"), "handle", "--config",
                    "lamp.json", "press", "--db", f"{number}.db")
                self.assertEqual((done.returncode, done.stdout, plain(done.stderr)),
                    (0, "press: Off -> On\n", ""))

    def test_help_is_there_without_docstrings(self):
        done = self.python("-OO", "-m", "flexiflow", "--help")
        self.assertEqual((done.returncode, "handle" in done.stdout, done.stderr), (0, True, ""))

    def test_importing_prints_and_opens_nothing(self):
        done = self.python("-X", "dev", "-W", "error", "-c", "import flexiflow, sys; print(sorted("
            "m for m in ('sqlite3', 'asyncio', 'argparse', 'yaml', 'ssl') if m in sys.modules))")
        self.assertEqual((done.stdout, done.stderr, os.listdir(self.folder)),
            ("[]\n", "", ["lamp.json"]))

    def test_an_ascii_stdout_escapes_what_it_cannot_show(self):
        self.write("\u00fc.json", {**LAMP, "name": "l\u00e4mp\u2192", "description": "\u2603"})
        env = {"PYTHONIOENCODING": "ascii"}
        steps = [
            self.shown("register", "--config", "\u00fc.json", env=env),
            self.shown("handle", "--config", "\u00fc.json", "\u00e9t\u00e9", env=env),
            self.shown("status", env=env)[:1],
            self.shown("explain", "\u00fc.json", env=env)[:1],
            self.shown("visualize", "\u00fc.json", env=env)[:1],
        ]
        self.assertEqual(steps, [
            (0, "l\\xe4mp\\u2192 registered in flexiflow.db: 3 states, 3 rules, 0 timers\n", ""),
            (3, "\\xe9t\\xe9: not accepted in Off (accepts: press, drop)\n", ""),
            (0,), (0,), (0,),
        ])

    def test_columns_stay_in_line_where_characters_are_escaped(self):
        for name in ("lamp", "l\u00e4mp\u2192", "a\x1b[31m"):
            self.shown("register", "--config", "lamp.json", "--name", name)
        for encoding in ("ascii", "utf-8"):
            with self.subTest(encoding):
                done = self.flexiflow("status", env={"PYTHONIOENCODING": encoding})
                header, *rows = done.stdout.splitlines()[:4]
                self.assertEqual([row.find("Off") for row in rows], [header.find("STATE")] * 3)

    def test_control_and_bidi_characters_are_never_printed_raw(self):
        evil = "a\x1b[31m\u202eb\nc"
        steps = [
            self.shown("register", "--config", "lamp.json", "--name", evil),
            self.shown("handle", "--name", evil, evil),
            self.shown("status"), self.shown("history"), self.shown("status", evil + "x"),
        ]
        text = "".join(out + err for _, out, err in steps)
        self.assertEqual(
            ([code for code, _, _ in steps], [c for c in "\x1b\u202e" if c in text],
                "a\\x1b[31m\\u202eb\\nc" in text),
            ([0, 3, 0, 0, 1], [], True),
        )

    def test_no_home_and_an_empty_environment(self):
        done = subprocess.run(
            [sys.executable, str(HERE / "flexiflow.py"), "handle", "--config", "lamp.json",
                "press"], cwd=self.folder, env={}, capture_output=True, encoding="utf-8",
        )
        self.assertEqual((done.returncode, done.stdout, done.stderr),
            (0, "press: Off -> On\n", ""))

    def test_flags_come_before_the_environment(self):
        self.write("other.json", {**LAMP, "name": "other"})
        env = {"FLEXIFLOW_CONFIG": "lamp.json", "FLEXIFLOW_DB": "env.db"}
        steps = [
            self.shown("register", env=env),
            self.shown("register", "--config", "other.json", "--db", "flag.db", env=env),
        ]
        self.assertEqual((steps, sorted(os.listdir(self.folder))), (
            [
                (0, "lamp registered in env.db: 3 states, 3 rules, 0 timers\n", ""),
                (0, "other registered in flag.db: 3 states, 3 rules, 0 timers\n", ""),
            ],
            ["env.db", "flag.db", "lamp.json", "other.json"],
        ))

    @unittest.skipIf(os.name == "nt", "Windows keeps no folder read-only")
    def test_a_read_only_folder_can_be_read(self):
        self.shown("handle", "--config", "lamp.json", "press")
        self.folder.chmod(0o555)
        self.addCleanup(self.folder.chmod, 0o755)
        code = (  # a superuser may write anywhere, so it becomes somebody else
            "import argparse, asyncio, difflib, hashlib, inspect, os, sqlite3, sys, tempfile\n"
            "import random, datetime, locale, flexiflow\n"
            "if os.geteuid() == 0:\n"
            "    os.seteuid(65534)\n"
            "sys.exit(flexiflow.main(sys.argv[1:]))\n"
        )
        found = []
        for args in (("status",), ("history",), ("status", "lamp"),
                ("handle", "--config", "lamp.json", "press")):
            done = self.python("-B", "-c", code, *args)
            found.append((done.returncode, plain(done.stdout), plain(done.stderr)[:7]))
        self.assertEqual(found, [
            (0, "COMPONENT  STATE  SINCE  V  WAITING  NEXT TIMER  DEAD\nlamp  On  0s  1  0  -  -\n"
                "1 component, 0 messages waiting, 0 dead letters\n", ""),
            (0, "V  WHEN  COMPONENT  MESSAGE  FROM  TO  OUTCOME  ID\n"
                "0  TIME  lamp  -  Off  Off  created\n"
                "1  TIME  lamp  press  Off  On  moved  ID\n", ""),
            (0, "state  On, version 1, since TIME (0s)\naccepts  press, drop\ndata  {}\n"
                "queue  0 waiting, 0 dead\n", ""),
            (1, "", "error: "),
        ])

    def test_a_python_without_sqlite_works_in_memory_and_says_what_is_missing(self):
        code = (
            "import sys\n"
            "sys.modules['_sqlite3'] = None\n"
            "import asyncio, flexiflow\n\n\n"
            "async def main():\n"
            "    async with flexiflow.FlexiFlowEngine() as engine:\n"
            "        lamp = engine.create_component('lamp.json')\n"
            "        print(bool(await engine.handle_message('lamp', 'press')), lamp.state)\n\n\n"
            "asyncio.run(main())\n"
            "print(flexiflow.main(['handle', '--config', 'lamp.json', 'press']))\n"
            "print(flexiflow.main(['explain', 'lamp.json']))\n"
        )
        done = self.python("-c", code)
        self.assertEqual(
            (done.stdout.split("\n")[:2],
                "Status: OK" in done.stdout and done.stdout.endswith("\n0\n"),
                done.stderr.startswith("error: "), "sqlite" in done.stderr, "Trace" in done.stderr),
            (["True On", "1"], True, True, True, False),
        )

    def test_many_threads_may_import_it_at_once(self):
        code = (
            "import threading\n"
            "found = []\n"
            "def load():\n"
            "    from flexiflow.extras.retry import retry_async\n"
            "    from flexiflow.engine import FlexiFlowEngine\n"
            "    found.append((retry_async, FlexiFlowEngine))\n"
            "threads = [threading.Thread(target=load) for _ in range(20)]\n"
            "[t.start() for t in threads]\n"
            "[t.join() for t in threads]\n"
            "print(len(found), len(set(found)))\n"
        )
        self.assertEqual(self.python("-c", code).stdout, "20 1\n")


# ---- README.md, and the example in the file's own header


@unittest.skipIf(os.name == "nt", "the sessions are those of a POSIX shell")
class Readme(Shell):
    """Every code block and every terminal session is run, and shows what the page shows."""

    @classmethod
    def setUpClass(cls):
        if not (HERE / "README.md").exists():
            raise unittest.SkipTest("README.md is not here")
        cls.PAGE = (HERE / "README.md").read_text(encoding="utf-8")

    def blocks(self, kind: str):
        """Return the blocks of one kind, in the page's order."""
        import re

        return re.findall(rf"^```{kind}\n(.*?)^```", self.PAGE, re.M | re.S)

    def test_every_variable_of_the_environment_that_is_read_is_named(self):
        import re

        read = {name for file in (HERE / "flexiflow.py", __file__)
            for name in re.findall('"(FLEXIFLOW_[A-Z]+)"', Path(file).read_text(encoding="utf-8"))}
        self.assertEqual({name for name in read if name not in self.PAGE}, set())

    def setUp(self):
        super().setUp()
        os.symlink(EXAMPLES, self.folder / "examples")
        (self.folder / "bin").mkdir()
        python = self.folder / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        python.chmod(0o755)

    def shell(self, script: str, **settings):
        """Run a script in which `python` is this Python; return all that it shows."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(HERE)}
        for name in ("FLEXIFLOW_CONFIG", "FLEXIFLOW_DB"):
            env.pop(name, None)
        return subprocess.run(["sh", "-c", script], cwd=self.folder, env=env, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings).stdout

    def test_the_programs_print_what_is_shown(self):
        programs, outputs = self.blocks("python"), self.blocks("text")
        self.write("lamp.py", programs[0])
        self.write("order.py", programs[1])
        self.assertEqual(
            ["".join(self.python("lamp.py").stdout for _ in range(3)),
                self.python("-W", "error", "order.py").stdout],
            outputs,
        )

    def test_the_first_program_has_fifteen_lines(self):
        lines = [line for line in self.blocks("python")[0].split("\n") if line.strip()]
        self.assertLessEqual(len(lines), 15)

    def test_the_terminal_sessions_show_what_they_show(self):
        mark = "\x01"
        for block in self.blocks("console"):
            commands = [line[2:] for line in block.split("\n") if line.startswith("$ ")]
            with self.subTest(commands[0]):
                script = "".join(f"{command}\ncode=$?\nprintf '\\001'\n(exit $code)\n"
                    for command in commands)
                shown = self.shell(script).split(mark)
                session = "".join(f"$ {command}\n{text}" for command, text in zip(commands, shown))
                self.assertEqual(plain(session), plain(block))

    def test_the_picture_is_what_visualize_prints(self):
        self.assertEqual(
            [self.shell("python -m flexiflow visualize examples/order.json")],
            self.blocks("mermaid"),
        )

    def test_the_config_is_a_good_one(self):
        (text,) = self.blocks("json")
        found = explain(json.loads(text), imports=False)
        self.assertEqual((found.errors, found.warnings), ([], []))

    def test_yaml_is_converted_as_shown(self):
        (command,) = self.blocks("sh")
        if self.python("-c", "import yaml").returncode:
            self.skipTest("PyYAML is not here")
        self.write("config.yaml", "name: c\nrules: [{rule1: '1'}]\n")
        shown = self.shell(command)
        self.assertEqual((shown, explain(self.path("config.json")).is_valid), ("", True))

    def test_the_two_commands_are_those_that_run_here(self):
        first, second = (line.strip() for line in
            self.PAGE.split("## The two commands\n")[1].split("\n") if line.startswith("    "))
        self.assertEqual((f"$ {first}\n" in self.blocks("console")[1], second),
            (True, "python -m unittest test_flexiflow"))

    def test_every_named_test_is_there(self):
        import re

        module = sys.modules[__name__]
        named = re.findall(r"`([A-Z]\w+)\.(test_\w+)`", self.PAGE)
        self.assertEqual(
            [pair for pair in named if not hasattr(getattr(module, pair[0], None), pair[1])], [])
        self.assertGreater(len(named), 15)

    def test_every_import_link_command_and_method_is_there(self):
        import re

        for line in re.findall(r"`(from flexiflow import [^`]+)`", self.PAGE):
            with self.subTest(line):
                exec(line, {})
        for path in re.findall(r"\]\(([^)]+)\)", self.PAGE):
            with self.subTest(path):
                self.assertTrue((HERE / path).exists())
        methods = re.search(r"^Engine: (.*?)\. Events", self.PAGE, re.M | re.S)[1]
        for name in re.findall(r"`(\w+)`", methods):
            with self.subTest(name):
                self.assertTrue(callable(getattr(FlexiFlowEngine, name, None)))

    def test_the_commands_are_those_of_the_help(self):
        import re

        table = self.PAGE.split("### Command line")[1].split("\n### ")[0]
        named = set(re.findall(r"^\| `([\w-]+)", table, re.M))
        shown = self.flexiflow("--help").stdout
        self.assertEqual(named, set(re.findall(r"^    ([\w-]+)(?:  | \()", shown, re.M)))

    def test_the_picture_is_what_is_drawn(self):
        self.assertEqual((EXAMPLES / "order.svg").read_text(encoding="utf-8"),
            ff.visualize(EXAMPLES / "order.json", format="svg") + "\n")

    def test_the_example_in_the_files_header_runs(self):
        source = (HERE / "flexiflow.py").read_text(encoding="utf-8")
        example = source.split("and nothing else.\n\n")[1].split("\n\nStarted again")[0]
        self.write("door.py", textwrap.dedent(example))
        first, again = (self.python("door.py").stdout for _ in range(2))
        self.assertEqual((first, again), ("moved Open\n", "ignored Open\n"))


if __name__ == "__main__":
    unittest.main()
