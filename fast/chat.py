"""A conversation at the terminal.

    chat(steps, tokenizer, max_new_tokens=None, stop=[])

The KV cache is kept between turns, so only the new tokens are prefilled. Answers go to stdout, all else to stderr.
"""

import contextlib
import os
import re
import select
import sys
from collections import deque

from fast.cli import one_line, say
from fast.decoding import Steps, common_prefix, stream
from fast.metrics import describe
from fast.prompts import encode_chat
from fast.rows import Row, run_rows
from fast.speculative import SpeculativeSteps
from fast.tokenizer import Tokenizer
from tp import ALONE, Ranks

HELP = """/exit           end the conversation, as Ctrl-D does
/reset          forget what was said
/system TEXT    begin anew with this system message; without TEXT, with none
/stats          how fast the last answer was, and how full the cache is
/help           this list
Ctrl-C stops an answer; before its first word, it takes the message back.
A pasted text of several lines is one message."""


def warm_up_turns(steps: Steps | SpeculativeSteps, first: list[int]) -> None:
    """Compile the prefill of later turns: one as long as `first`, and one short enough for the attention kernel."""
    plain = steps.plain if isinstance(steps, SpeculativeSteps) else steps
    for turn in (first, first[:2]):
        deque(stream(plain, [turn], 1, cached=2 * len(first)), maxlen=0)


class Conversation:
    """What was said, and which of it is in the KV cache.

    max_new_tokens: of an answer; None: what the cache holds, or 200 without a chat template, where few texts end.
    """

    def __init__(
        self,
        steps: Steps | SpeculativeSteps,
        tokenizer: Tokenizer,
        max_new_tokens: int | None,
        stop: list[str],
        system: str | None,
    ):
        self.steps, self.tokenizer, self.stop, self.system = steps, tokenizer, stop, system
        self.capacity = steps.model.max_seq_length
        self.limit = max_new_tokens or (self.capacity if tokenizer.has_chat_template else 200)
        self.turns: list[tuple[str, str]] = []  # (message, answer)
        self.cached: list[int] = []  # the ids in the KV cache
        self.stats = "no answer yet"

    def encode(self, turns: list[tuple[str, str]], line: str) -> list[int]:
        """The prompt for an answer to `line`."""
        if self.tokenizer.has_chat_template:
            return encode_chat(self.tokenizer, self.system, turns, line)
        return self.tokenizer.encode("\n\n".join([*(message + answer for message, answer in turns), line]))

    def fit(self, line: str) -> list[int]:
        """The prompt for an answer to `line`. The oldest turns go until a quarter of the cache is left for the answer.

        Raises ValueError for a line that does not fit alone, or that the chat template refuses.
        """
        reserved = min(self.limit, self.capacity // 4)
        for n in range(len(self.turns) + 1):
            prompt = self.encode(self.turns[n:], line)
            if len(prompt) + reserved <= self.capacity:
                break
        if len(prompt) > self.capacity:
            raise ValueError(f"this message makes {len(prompt)} tokens, the cache takes {self.capacity}: shorten it")
        if n > 0:
            say(f"(the cache of {self.capacity} tokens is full: forgot the {n} oldest of {len(self.turns)} turns)")
        self.turns = self.turns[n:]
        return prompt

    def answer(self, line: str, caught: tuple[type[BaseException], ...]) -> None:
        """Print the answer to `line`. An exception of the types `caught` ends it; before its first token, undoes it."""
        turns, prompt = self.turns, self.fit(line)
        if not prompt:
            raise ValueError("this message has no tokens: write a word")
        limit = min(self.limit, self.capacity - len(prompt) + 1)  # the last token is not cached
        row, known = Row(self.tokenizer, prompt, limit, self.stop), common_prefix(self.cached, prompt[:-1])
        self.cached, self.stats = [], "the last answer was stopped"
        try:
            figures = run_rows(self.steps, [row], limit, lambda _, text: print(text, end="", flush=True), known)
            self.stats = describe(figures)
        except caught:
            pass
        finally:
            print(flush=True)
        if not row.tokens:
            self.turns = turns
            return
        self.cached = prompt + row.tokens[:-1]
        self.stats += f" · {len(self.cached)} of {self.capacity} tokens in the cache"
        if row.finish_reason == "length":
            why = "--max_new_tokens" if limit == self.limit else f"the cache of {self.capacity} tokens is full"
            say(f"(cut after {limit} tokens: {why})")
        self.turns.append((line, row.text))

    def reset(self, system: str | None) -> None:
        """Forget what was said. Raises ValueError for a system message that the model cannot be given."""
        check_system(self.tokenizer, system, self.capacity)
        self.turns, self.system, self.stats = [], system, "no answer yet"
        say("(a new conversation" + ("" if system is None else ", with this system message") + ")")


def check_system(tokenizer: Tokenizer, system: str | None, capacity: int) -> None:
    """Raise ValueError if the model has no chat template for a system message, or refuses it, or has no room for it."""
    if system is not None and not tokenizer.has_chat_template:
        raise ValueError("a system message needs a chat template, and this model has none")
    if tokenizer.has_chat_template and (n := len(encode_chat(tokenizer, system, [], "Hi"))) > capacity:
        raise ValueError(f"the chat template and the system message take {n} tokens, the cache holds {capacity}")


def chat(
    steps: Steps | SpeculativeSteps,
    tokenizer: Tokenizer,
    max_new_tokens: int | None,
    stop: list[str],
    system: str | None = None,
    stats: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Converse until Ctrl-D or /exit; `stats`: print figures after every answer. `HELP` lists the commands.

    Ctrl-C ends an answer. With several ranks it ends the conversation: the ranks would stop at different tokens and
    wait for each other for ever, and torchrun receives Ctrl-C as well.
    """
    caught = (KeyboardInterrupt,) if ranks.world_size == 1 else ()
    conversation = Conversation(steps, tokenizer, max_new_tokens, stop, system)
    if not tokenizer.has_chat_template:
        say("this model has no chat template: it continues your text")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # `Tokenizer.encode` refuses what is not UTF-8
    if ranks.rank == 0 and sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline

            if os.environ.get("TERM") != "dumb":
                readline.parse_and_bind("set enable-bracketed-paste on")  # the default since readline 8.1
        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation")
    while (line := ranks.from_rank_0(lambda: ask(caught))) is not None:
        if not line.strip():
            continue
        command, _, text = line.rstrip().partition(" ")
        try:
            if command == "/exit":
                return
            elif command == "/help":
                say(HELP)
            elif command == "/stats":
                say(conversation.stats)
            elif command == "/reset":
                conversation.reset(conversation.system)
            elif command == "/system":
                conversation.reset(text.strip() or None)
            elif re.fullmatch(r"/\w+", command) and "\n" not in line:
                say(f"there is no command {command}: /help lists them; a space before it sends it as a message")
            else:
                conversation.answer(line, caught)
                if stats:
                    say(conversation.stats)
        except ValueError as error:
            say(one_line(str(error)))
        except caught:
            say("(stopped)")


def ask(caught: tuple[type[BaseException], ...]) -> str | None:
    """What is typed, a pasted text as a whole; None at the end of the input."""
    at_terminal = sys.stdin.isatty()
    prompt = "> " if at_terminal and sys.stdout.isatty() else ""
    while True:
        try:
            if at_terminal and not prompt:
                print("> ", end="", file=sys.stderr, flush=True)
            line = input(prompt)
            with contextlib.suppress(EOFError):  # below: a paste without brackets
                while at_terminal and not line.startswith("/") and select.select([sys.stdin], [], [], 0)[0]:
                    line += "\n" + input()
            return line
        except EOFError:
            if at_terminal:
                say()
            return None
        except caught:
            say("\n(Ctrl-D ends the conversation)")
