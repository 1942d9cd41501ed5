"""A conversation at the terminal.

    chat(steps, tokenizer, max_new_tokens=200, stop=[])

The KV cache is kept between turns, so only the new tokens are prefilled.
"""

import contextlib
from collections import deque

from fast.decoding import Steps, common_prefix, stream
from fast.rows import Row, run_rows
from fast.speculative import SpeculativeSteps
from fast.tokenizer import Tokenizer
from tp import ALONE, Ranks


def warm_up_turns(steps: Steps | SpeculativeSteps, first: list[int]) -> None:
    """Compile the prefill of later turns: one as long as `first`, and one short enough for the attention kernel."""
    plain = steps.plain if isinstance(steps, SpeculativeSteps) else steps
    for turn in (first, first[:2]):
        deque(stream(plain, [turn], 1, cached=2 * len(first)), maxlen=0)


def chat(
    steps: Steps | SpeculativeSteps,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    stop: list[str],
    system: str | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Converse until Ctrl-D. Raises ValueError for a `system` message where the model has no chat template.

    Ctrl-C ends an answer. With several ranks it ends the conversation: the ranks would stop at different tokens and
    wait for each other for ever, and torchrun receives Ctrl-C as well.
    """
    caught = (KeyboardInterrupt,) if ranks.world_size == 1 else ()
    if not tokenizer.has_chat_template:
        if system is not None:
            raise ValueError("--system needs a chat template, and this model has none")
        print("this model has no chat template: it continues your text")
    beginning = [{"role": "system", "content": system}] if system is not None else []
    history, text, cached = beginning, "", []  # text: used if there is no template; cached: the ids in the KV cache
    while (line := ranks.from_rank_0(lambda: ask(caught))) is not None:
        if not line.strip():
            continue
        if tokenizer.has_chat_template:
            turn = [*history, {"role": "user", "content": line}]
            prompt = tokenizer.encode(tokenizer.apply_chat_template(turn), bos=False)
        else:
            prompt = tokenizer.encode(text + line)
        room = min(max_new_tokens, steps.model.max_seq_length - len(prompt))
        if room < 1:
            print(f"the conversation fills the cache of {steps.model.max_seq_length} tokens: starting over")
            history, text, cached = beginning, "", []
            continue
        row = Row(tokenizer, prompt, room, stop)
        with contextlib.suppress(*caught):
            run_rows(steps, [row], room, print_now, common_prefix(cached, prompt[:-1]))
        print()
        cached = prompt + row.tokens[:-1] if row.tokens else []  # no token: the prefill was interrupted
        text += line + row.text
        history = [*history, {"role": "user", "content": line}, {"role": "assistant", "content": row.text}]


def ask(caught: tuple[type[BaseException], ...]) -> str | None:
    """A line from the keyboard; None at the end of the input."""
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except caught:
            print("\n(Ctrl-D ends)")


def print_now(_: int, text: str) -> None:
    print(text, end="", flush=True)
