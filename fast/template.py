"""Chat templates: programs that come with a checkpoint, run in jinja2's sandbox within bounds of time and memory.

    text = render(source, {"messages": [...], "add_generation_prompt": True})

The sandbox keeps a template from what is not its own; it does not keep it from computing for ever.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from fast.reading import require

SECONDS, MEGABYTES = 5, 256  # real templates take milliseconds, and a few times the memory of the text
LONGEST = 1 << 24  # characters of the text, more than any model's context


def render(source: str, inputs: dict[str, Any]) -> str:
    """The text that the template makes of `inputs`. Raises ValueError, one line, if it is broken, or refuses them."""
    require("jinja2")
    try:
        with _bounded():
            text = _compile(source).render(inputs)
    except Exception as error:  # it is a program, and can raise anything
        reason = f"it takes more than {MEGABYTES} MB" if isinstance(error, MemoryError) else str(error)
        raise ValueError(f"chat template: {reason or type(error).__name__}") from error
    if len(text) > LONGEST:
        raise ValueError(f"chat template: it makes {len(text)} characters of the messages, expected at most {LONGEST}")
    return text


@cache
def _compile(source: str):
    """Compile an untrusted template, in a sandbox with the settings and extras of transformers."""
    import jinja2
    from jinja2 import ext, sandbox

    class Generation(ext.Extension):  # {% generation %} marks the assistant's words for training
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length()
                if (bits + right.bit_length() if operator == "*" else bits * right) > 64:  # can take hours, unstopped
                    raise_exception(f"{operator} makes a number too large")
            return left * right if operator == "*" else left**right

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(source)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """End the `with` block with an error after SECONDS, or when this process has grown by MEGABYTES.

    Only on Linux, and in the main thread, as signals need it.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists() or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS} seconds")

    before, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    most = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (MEGABYTES << 20)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
