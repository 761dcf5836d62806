"""The built-in model, an engine over it, and the server as a process with a port."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from narrowkv import load_model
from narrowkv.defaults import DEMO
from narrowkv.serve.app import Settings, make_app
from narrowkv.serve.engine import Engine, Limits
from narrowkv.serve.gate import Keys
from narrowkv.serve.listen import Address, BoundedProtocol, listen
from narrowkv.serve.prompts import Prompts

TEXT = "She had been looking at the sea for a long time, and it seemed to her that the ships were going nowhere at all. "


@pytest.fixture(scope="session")
def demo():
    """The built-in model, in float32, and its tokenizer."""
    return load_model(DEMO, "float32")


@pytest.fixture
def make_engine(demo):
    """Makes engines, which end with the test."""
    made = []

    def make(source="int4", model=None, **limits):
        engine = Engine(model or demo[0], demo[1], source, Limits(**{"chunk": 64, **limits}))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop()


@contextmanager
def served(engine, settings, keys=(), hosts=(), most_tokens=None):
    """The application on a thread, at an address that is yielded."""
    app = make_app(engine, Prompts(engine.model, engine.tokenizer, most_tokens), settings, Keys(keys), hosts)
    with listen(Address(port=0)) as listening:
        config = uvicorn.Config(
            app, http=BoundedProtocol, ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening.bound]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listening.url
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def serve(make_engine):
    """Serves the built-in model with a few limits."""
    stack = []

    def start(settings=None, keys=(), hosts=(), most_tokens=None, **limits):
        context = served(make_engine(**limits), settings or Settings("demo"), keys, hosts, most_tokens)
        stack.append(context)
        return context.__enter__()

    yield start
    for context in stack:
        context.__exit__(None, None, None)


class Process:
    """`narrowkv serve` as a process."""

    def __init__(self, *options):
        command = [sys.executable, "-m", "narrowkv", "serve", DEMO, "--recipe", "int4", "--dtype", "float32", "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.options = options
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        self.lines.extend(self.process.stderr)

    def stop(self):
        """End it as a supervisor would; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def prefix_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prefixes")


@pytest.fixture(scope="session")
def process(prefix_dir):
    """One for all tests that do not end it."""
    options = [
        "--api-key",
        "one",
        "--api-key",
        "two",
        "--prefix-scope",
        "key",
        "--prefix-dir",
        str(prefix_dir),
        "--chunk",
        "64",
    ]
    found = Process(*options, "--name", "demo")
    yield found
    if found.process.poll() is None:
        assert found.stop() == 0


def wait_until(condition, seconds=20.0):
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
