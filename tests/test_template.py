"""Chat templates that are broken or hostile: they end in one line, within bounds of time and memory.

    python -m pytest tests/test_template.py

What templates are to give is tested in test_tokenizer.py.
"""

import resource
import signal

import pytest

from fast import template
from fast.template import render

INPUTS = {"messages": [{"role": "user", "content": "Hi"}]}
DOUBLED = "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
SQUARED = "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('{{ "a" * 10000000000 }}', "it takes more than 256 MB"),
        (DOUBLED, "it takes more than 256 MB"),
        (ENDLESS, "it takes more than 1 seconds"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
        ("{{ (" * 9999, "maximum recursion depth exceeded"),
        ("{{ 10 ** (10 ** 9) }}", r"\*\* makes a number too large"),
        (SQUARED, r"\* makes a number too large"),
        ("{{ 'x' * 20000000 }}", "it makes 20000000 characters of the messages, expected at most 16777216"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{% include 'x' %}", "no loader for this environment specified"),
    ],
)
def test_hostile_templates_end_in_one_line(monkeypatch, source, message):
    monkeypatch.setattr(template, "SECONDS", 1)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(ValueError, match=f"^chat template: {message}"):
        render(source, INPUTS)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_products_that_templates_use():
    assert render("{{ 'ab' * 2 }}{{ 3 * 4 }}{{ 2 * 0.5 }}{{ -3 * messages | length }}", INPUTS) == "abab121.0-3"
    assert render("{{ 2 ** 3 }} {{ 2 ** -1 }} {{ 2.0 ** 0.5 > 1.4 }}", INPUTS) == "8 0.5 True"
