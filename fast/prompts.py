"""The prompts that a command line names: a text, a file, stdin, or a number of made-up tokens.

    texts, made_up = read_prompts(args, ranks)
    prompts = encode_prompts(texts, made_up, args, tokenizer, vocab_size, limit)

Worth knowing: reading needs no model, so a missing file is found before one is loaded.
"""

import argparse
import os
import re
import select
import stat
import sys
from pathlib import Path

import torch

from fast.cli import say
from fast.reading import read_text
from fast.tokenizer import Tokenizer
from tp import Ranks

DEFAULT = "Emma could not"  # for the demo


def read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("the prompt is to come from stdin, which is closed")
    if not select.select([sys.stdin], [], [], 1)[0]:
        say("reading the prompt from stdin" + (": Ctrl-D ends it" if sys.stdin.isatty() else " ..."))
    try:
        return sys.stdin.read().removeprefix("\ufeff")  # a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text: {error}") from None


def is_piped() -> bool:
    """Whether stdin is a pipe or a file, not a terminal or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_prompts(args: argparse.Namespace, ranks: Ranks) -> tuple[list[str], int]:
    """The prompts' texts, or none and the length of a made-up prompt.

    Raises ValueError for a file without a prompt or that is not UTF-8, FileNotFoundError if it is not there.
    """

    def read(path: str) -> str:
        return read_text(Path(path)) if path != "-" else ranks.from_rank_0(read_stdin) or ""

    if args.prompt_file is not None:
        lines = [line for line in read(str(args.prompt_file)).split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"{args.prompt_file} holds no prompt: write one per line")
        return lines, 0
    prompt = args.prompt
    if prompt is None and ranks.from_rank_0(lambda: "yes" if is_piped() else None):
        if text := read("-").removesuffix("\n"):
            return [text], 0
        say(f"stdin is empty, so the prompt is {DEFAULT!r}")
    if prompt is None:
        return [DEFAULT], 0
    if prompt.startswith("@") and not Path(prompt[1:]).exists():
        raise FileNotFoundError(f"--prompt {prompt}: no such file; a text that begins with @ can be piped in")
    if prompt == "-" or prompt.startswith("@"):
        return [read(prompt.removeprefix("@")).removesuffix("\n")], 0
    return ([], int(prompt)) if re.fullmatch("0|[1-9][0-9]*", prompt) and not args.chat else ([prompt], 0)


def encode_chat(tokenizer: Tokenizer, system: str | None, turns: list[tuple[str, str]], message: str) -> list[int]:
    """The token ids of a conversation in the model's chat template, up to where the answer to `message` begins.

    turns: the messages and answers before it. Raises ValueError if there is no template, or it refuses them.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": message})
    return tokenizer.encode(tokenizer.apply_chat_template(messages), bos=False)


def encode_prompts(
    texts: list[str], made_up: int, args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int, limit: int
) -> list[list[int]]:
    """The prompts' token ids. Raises ValueError for a prompt that is empty, too long or refused by the template."""
    if not texts:
        if not 1 <= made_up <= limit:
            raise ValueError(f"--prompt {made_up}: a made-up prompt must have 1 to {limit} tokens")
        return [torch.randint(vocab_size, (made_up,)).tolist()]
    if args.chat:
        prompts = [encode_chat(tokenizer, args.system, [], text) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    if not all(prompts):
        raise ValueError("the prompt is empty and this model has no begin-of-text token: give at least one word")
    if (longest := max(map(len, prompts))) > limit:
        raise ValueError(f"the prompt has {longest} tokens, but there is room for {limit}: shorten it")
    return prompts
