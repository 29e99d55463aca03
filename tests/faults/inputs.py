"""Files damaged at random, and how a reader may take them: in seconds, in a GiB, by one line."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pretrain_lib.errors import raised_here

EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", 60))  # each reader; more by command
SECONDS, GIB = 10, 2**30  # of processor time; where a reader waits, ten times as long
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, content):
    """Draw what may become of the bytes of a file."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "zeros", "delete"]))
        if how == "flip" and raw:
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del raw[place:]
        elif how == "insert":
            raw[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif how == "zeros":
            raw[place : place + 16] = bytes(len(raw[place : place + 16]))
        else:
            del raw[place : place + draw(st.integers(1, 16))]
    return bytes(raw)


@st.composite
def other_values(draw, content):
    """Draw a JSON file in which one value, at any depth, is another one or missing."""
    root = json.loads(content)
    node = root
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(list(keys)))
        if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.integers(0, 3)) == 0:
            del node[key]
        else:
            node[key] = draw(VALUES)
        break
    return json.dumps(root).encode()


def by_value_or_byte(content):
    return damaged(content) | other_values(content)


@contextmanager
def bounded():
    """Let what runs in the context fail if it takes ten seconds, or a GiB more than there is."""

    def end(*_):
        raise TimeoutError(f"a reader takes more than {SECONDS} s, or waits")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    previous = {number: signal.signal(number, end) for number in timers}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def reads(action):
    """Call a reader; what it raises must be one line of ours."""
    try:
        with bounded():
            action()
    except ValueError as error:
        assert raised_here(error), "a dependency's error"
        assert str(error) and "\n" not in str(error).strip(), str(error)
        assert len(str(error)) < 2000, str(error)


def tries(*, share=1.0):
    """Return what runs a property `EXAMPLES` times, or a share of them where each takes long."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    count = max(1, round(share * EXAMPLES))
    return settings(max_examples=count, deadline=None, suppress_health_check=health)
