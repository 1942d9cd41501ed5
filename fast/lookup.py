"""Drafts without a model: what followed in the text so far, where its end occurred before.

    matches = Matches()
    for token in [1, 2, 3, 1, 2]: matches.append(token)
    matches.continuation(2)  # [3, 1], since 1, 2 was followed by these

Of the longest match the most frequent continuation is proposed, as by the suffix trees of Oliaro et al. 2024
("SuffixDecoding"). Worth knowing: how far a match can be trusted is learned from every new token, drafted or not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fast.pace import Chances

NEWEST = 32  # places of a token where a match may begin: the last so many


class Matches:
    """A text that grows token by token, and where its end occurred before.

    lengths: by index, for every earlier place where the text's last token occurs, how many tokens up to there are those
    that the text ends with.
    """

    def __init__(self):
        self.tokens: list[int] = []
        self.lengths: dict[int, int] = {}
        self._places: dict[int, list[int]] = {}  # where each token occurs

    def append(self, token: int) -> None:
        lengths = {i + 1: n + 1 for i, n in self.lengths.items() if self.tokens[i + 1] == token}
        places = self._places.setdefault(token, [])
        for i in places[-NEWEST:]:
            lengths.setdefault(i, 1)
        places.append(len(self.tokens))
        self.tokens.append(token)
        self.lengths = lengths

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens."""
        while len(self.tokens) > n:
            self._places[self.tokens.pop()].pop()
            self.lengths = {}  # the next tokens begin new matches

    def longest(self) -> int:
        return max(self.lengths.values(), default=0)

    def continuation(self, k: int) -> list[int]:
        """The k tokens that most often followed the longest matches, of equals the latest; none without a match."""
        longest, end = self.longest(), len(self.tokens)
        places = sorted((i for i, n in self.lengths.items() if n == longest), reverse=True)
        proposed: list[int] = []
        for i in range(1, k + 1 if places else 1):
            # Past the end of the text, the match goes on in what is proposed.
            following = [self.tokens[at + i] if at + i < end else proposed[at + i - end] for at in places]
            token = max(following, key=following.count)
            places = [at for at, other in zip(places, following, strict=True) if other == token]
            proposed.append(token)
        return proposed


class PromptLookup:
    """Drafts for every row of a batch by `Matches` in its own text: prompt, answer, and a conversation's turns before.

    The interface is that of `drafting.DraftModel`. The host drafts, so a step waits for the ids of the last one.
    """

    ks, probes, waits, run = (2, 5, 15), False, True, None
    prior = (0.15, 0.35, 0.5, 0.7, 0.85)  # for matches of 1, 2-3, 4-7, 8-15 and more tokens

    def __init__(self):
        self.texts: list[Matches] = []

    def time_kernels(self, n_rows: int) -> None: ...

    def begin(self, prompts: list[list[int]], cached: int, layout: tuple[Tensor, ...]) -> None:
        if len(self.texts) != len(prompts):
            self.texts = [Matches() for _ in prompts]
        for text, prompt in zip(self.texts, prompts, strict=True):
            text.truncate(cached)
            for token in prompt:
                text.append(token)

    def take(self, ids: list[list[int]], k: int, behind: Sequence[int], chances: Chances) -> None:
        """Read a step's new tokens of each row; let `chances` learn from the rows that are `behind`."""
        for row, (text, tokens) in enumerate(zip(self.texts, ids, strict=True)):
            for token in tokens:
                if row in behind and (longest := text.longest()):
                    chances.learn(longest, text.continuation(1)[0] == token)
                text.append(token)

    def expected(self, k: int, behind: Sequence[int], chances: Chances) -> list[float]:
        """How many of 0 to k drafts the rows that are `behind` accept on average; where they differ, the fewest."""
        longest = min((self.texts[row].longest() for row in behind), default=0)
        return chances.expected(longest, k) if longest else [0.0] * (k + 1)

    def follow(self, previous: Tensor, input_pos: Tensor, kv_pos: Tensor) -> None: ...

    def draft(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor]:
        """The drafts, int `[B, k]`: 0 where nothing matches."""
        drafts = torch.tensor([text.continuation(k) or [0] * k for text in self.texts])
        if token.is_cuda:
            drafts = drafts.pin_memory().to(token.device, non_blocking=True)
        return (drafts,)

    def bytes_per_step(self, k: int, batch_size: int, positions: float) -> float:
        return 0.0
