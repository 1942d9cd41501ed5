"""The rows of a batch: turn the stream of token ids into each row's text, finish reason and timings.

    rows = [Row(tokenizer, prompt, max_new_tokens=100, stop_strings=["."]) for prompt in prompts]
    run_rows(steps, rows, max_new_tokens=100, show=lambda i, text: print(i, text))

Worth knowing: text that may be the start of a stop string, and an incomplete character, are held back until decided.
A stop string may name special tokens ("<|im_end|>"), which are no part of the text: it is looked for where they stand.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from fast.decoding import Steps, stream
from fast.metrics import bytes_per_step
from fast.speculative import SpeculativeSteps, StepResult, speculate
from fast.tokenizer import IncrementalDecoder, Tokenizer


class Row:
    """One row of a batch: turns its token ids into text, ends it at a stop id, a stop string or `max_new_tokens`.

    `finish_reason` is None until it ends, then "stop" or "length". A stop string is not part of `text`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int, stop_strings: list[str]):
        self.prompt, self.tokens, self.text = prompt, [], ""
        self.finish_reason: str | None = None
        self.times: list[float] = []
        self._decoder = IncrementalDecoder(tokenizer)
        for token in prompt:  # so that the first new word keeps its leading space
            self._decoder.put(token)
        self._max_new_tokens, self._stop_ids, self._stop_strings = max_new_tokens, tokenizer.stop_ids, stop_strings
        self._name_of = tokenizer.name_of
        self._held = ""  # not shown yet, with special tokens by name
        self._silent: list[tuple[int, int]] = []  # where these are in it

    def put(self, token: int) -> str:
        """Append the next token; return the text that is now final: it cannot become part of a stop string."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        if token in self._stop_ids:
            self.finish_reason = "stop"
        else:
            self._held += self._decoder.put(token)
            if self._stop_strings and (name := self._name_of(token)):
                self._silent.append((len(self._held), len(self._held) + len(name)))
                self._held += name
            if len(self.tokens) == self._max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self._held += self._decoder.finish()
        hits = [at for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if hits:
            self.finish_reason, self._held = "stop", self._held[: min(hits)]
        beginnings = (n for stop in self._stop_strings for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        shown = self._release(len(self._held) - (0 if self.finish_reason else max(beginnings, default=0)))
        self.text += shown
        return shown

    def _release(self, n: int) -> str:
        """Take the first `n` characters from what is held; return them without the names of special tokens."""
        at, pieces = 0, []
        for start, end in self._silent:
            pieces.append(self._held[at : min(start, n)])
            at = min(end, n)
        pieces.append(self._held[at:n])
        self._held = self._held[n:]
        self._silent = [(max(start - n, 0), end - n) for start, end in self._silent if end > n]
        return "".join(pieces)

    def figures(self, start: float) -> dict[str, Any]:
        """The row's entry in `--metrics_path`; `start` is when the prefill began. Rates are tokens per second."""
        ttft, decoding = self.times[0] - start, self.times[-1] - self.times[0]
        return {
            "prompt_tokens": self.prompt,
            "tokens": self.tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "ttft_s": ttft,
            "prefill_tokens_per_s": len(self.prompt) / ttft,
            "decode_tokens_per_s": (len(self.tokens) - 1) / decoding if decoding else None,
        }


def run_rows(
    steps: Steps | SpeculativeSteps,
    rows: list[Row],
    max_new_tokens: int,
    show: Callable[[int, str], None],
    cached: int = 0,
) -> dict[str, Any]:
    """Generate until every row has ended, calling `show(row index, text)` with final text; `cached`: as in `stream`.

    Returns the figures that `metrics.describe` takes, and those of each row under "rows".
    """
    prompts, start, passes = [row.prompt[cached:] for row in rows], time.perf_counter(), Counter()
    if isinstance(steps, SpeculativeSteps):
        results = speculate(steps, prompts, max_new_tokens, cached, lambda i: rows[i].finish_reason is None)
    else:
        results = (
            StepResult([[token] for token in tokens]) for tokens in stream(steps, prompts, max_new_tokens, cached)
        )
    for step in results:
        passes[step.k] += 1
        for i, row in enumerate(rows):
            for token in step.ids[i]:
                if row.finish_reason is None:  # drafts accepted after a row's end are dropped
                    show(i, row.put(token))
        if all(row.finish_reason for row in rows):
            break
    seconds, ttft = time.perf_counter() - start, rows[0].times[0] - start
    n_steps = max(len(row.tokens) for row in rows) - 1  # that plain decoding would take
    positions = max(len(row.prompt) for row in rows) + n_steps / 2
    passes[0] -= 1  # the prefill
    nbytes = sum(n * bytes_per_step(steps.model, len(rows), positions, 1 + k) for k, n in passes.items())
    if isinstance(steps, SpeculativeSteps):
        nbytes += sum(n * steps.drafter.bytes_per_step(k, len(rows), positions) for k, n in passes.items())
    return {
        "rows": [row.figures(start) for row in rows],
        "ttft_s": ttft,
        "prefill_tokens_per_s": sum(map(len, prompts)) / ttft,
        "decode_tokens_per_s": sum(len(row.tokens) - 1 for row in rows) / (seconds - ttft) if n_steps else None,
        "bytes_per_token": nbytes / max(1, n_steps),
        "bandwidth_gb_s": nbytes / (seconds - ttft) / 1e9 if n_steps else None,
    }
