"""Speculation that pays: before every step, the choice between a plain step and one of k drafts.

    pace = Pace((2, 5, 15), prior=(0.5, 0.8))
    k = pace.choose(partial(pace.chances.expected, 1))  # 0: a plain step
    pace.add(k, tokens=[3], progress=3, n_rows=1, draft_s=0.001, verify_s=0.02)

A step of k drafts takes c(k) seconds and brings 1 + E(k) tokens, E(k) being the drafts accepted on average: the most
tokens per second win. Of a batch's rows the one that is behind counts, since the batch ends with it. A cost is the
median of such steps lately. A small account bounds what a mistake can cost.
Worth knowing: nothing here reads a clock. Tensor-parallel ranks, whose clocks differ, `agree` on costs now and then,
and compute all else from the tokens, which they share.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Any

Agree = Callable[[list[float]], list[float]]  # rank 0's numbers, given each rank's own

GAIN = 1.1  # drafting must promise this many times plain decoding's speed
START, RESERVE = 2.0, 8.0  # plain steps that drafts may lose: at first, and at most, having gained them before
ALLOWANCE = 0.01  # and as a share of all steps, or less where drafts would gain little even if all were accepted
PROBE = 12  # plain steps before drafts are tried that promise no gain
GUESS = 0.05  # what each drafted token adds to the cost of a step, in plain steps, before the first was timed
REFRESH = 4  # drafting steps for each plain step timed lately (3 to 9), then one is timed again
FORGET = 256  # steps after which the costs of drafting are measured anew, if a plain step may be lost for that
PLAIN_FIRST = 3  # plain steps before the first draft, to know their cost; the first after a prompt is slow


class Chances:
    """How often drafts are accepted, given that those before them in the step were, in classes of 1, 2-3, 4-7, ...

    The class is that of a number >= 1, the better the higher, which grows by one with each draft of a step: the length
    of the match that vouches for it, or its place. prior: of each class, and of all above the last; learned from about
    the last 20 drafts of a class.
    """

    WEIGHT, DECAY = 4.0, 0.95

    def __init__(self, prior: Sequence[float]):
        self.hits, self.tries = [p * self.WEIGHT for p in prior], [self.WEIGHT] * len(prior)

    def _class_of(self, number: int) -> int:
        return min(number.bit_length(), len(self.tries)) - 1

    def learn(self, number: int, is_hit: bool) -> None:
        i = self._class_of(number)
        self.hits[i] = self.hits[i] * self.DECAY + is_hit
        self.tries[i] = self.tries[i] * self.DECAY + 1

    def expected(self, first: int, k: int) -> list[float]:
        """How many drafts are accepted on average of 0, 1, ... k, the first of which has the number `first`."""
        chance, sums = 1.0, [0.0]
        for number in range(first, first + k):
            i = self._class_of(number)
            chance *= self.hits[i] / self.tries[i]
            sums.append(sums[-1] + chance)
            if chance < 0.01:  # the rest is nothing
                break
        return sums + sums[-1:] * (k + 1 - len(sums))


@dataclass
class Tally:
    """The steps of one k: how often a row accepted n = 0 to k drafts, and the seconds of each step."""

    k: int
    counts: list[int] = field(init=False)
    draft_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.counts = [0] * (self.k + 1)

    def mean(self) -> float:
        """Drafts accepted per step and row."""
        return sum(n * count for n, count in enumerate(self.counts)) / max(1, sum(self.counts))

    def figures(self) -> dict[str, Any]:
        """The steps' number, counts, mean and times, which are medians per step and None without any."""
        times = {"draft_s": self.draft_s, "verify_s": self.verify_s}
        medians = {name: median(seconds) if seconds else None for name, seconds in times.items()}
        return {"k": self.k, "steps": len(self.verify_s), "counts": self.counts, "mean": self.mean(), **medians}


class Pace:
    """Chooses k before each step, of `ks` and 0, and tallies the steps.

    prior: of `Chances`. adapts: False: every step drafts as many as `ks`, which is one number, says.
    probes: whether only drafting shows what would be accepted; then a step that promises no gain is tried now and then.
    """

    def __init__(
        self,
        ks: tuple[int, ...],
        prior: Sequence[float],
        adapts: bool = True,
        probes: bool = False,
        agree: Agree = list,
    ):
        self.ks, self.adapts, self.probes, self.agree = ks, adapts, probes, agree
        self.chances = Chances(prior)
        self.tallies = {k: Tally(k) for k in (0, *ks)}
        self._recent: dict[int, deque[float]] = {k: deque(maxlen=9) for k in self.tallies}
        self._costs: dict[int, float] = {}  # of a step, in plain steps, for each k that may be chosen
        self._plain = 0.0  # seconds of a plain step
        self._steps = self._since_plain = self._since_draft = 0
        self._account, self._allowance = START, ALLOWANCE  # plain steps that drafts may still lose, more with each step

    def choose(self, expected: Callable[[int], Sequence[float]]) -> int:
        """How many drafts the next step takes.

        expected(k): how many of 0, 1, ... k drafts the row that is behind accepts on average.
        """
        if not self.adapts:
            return self.ks[0]
        n_plain = len(self._recent[0])
        if n_plain < PLAIN_FIRST or self._since_plain >= REFRESH * n_plain:
            return 0
        affordable = [k for k, cost in self._costs.items() if cost - 1 <= self._account]
        if not affordable:
            return 0
        sums = expected(affordable[-1])
        gain, best = max(((1 + sums[k]) / self._costs[k], k) for k in affordable)
        if gain > GAIN:
            return best
        may_probe = self.probes and self._since_draft >= PROBE and self._account >= 1 and affordable[0] == self.ks[0]
        return self.ks[0] if may_probe else 0

    def _learn_costs(self, n_rows: int) -> None:
        """Of a k that was not measured, what a draft costs at another k, times k; if none was, of the first alone."""
        self._plain, *costs = self.agree([median_low(recent or [0.0]) for recent in self._recent.values()])
        measured = {k: cost / self._plain for k, cost in zip(self.ks, costs, strict=True) if cost}
        each = max(((cost - 1) / k for k, cost in measured.items()), default=GUESS * n_rows)
        self._costs = {k: measured.get(k, 1 + k * each) for k in (self.ks if measured else self.ks[:1])}
        most = max((1 + k) / cost for k, cost in self._costs.items()) - 1  # that can be gained
        self._allowance = ALLOWANCE * min(1.0, max(0.0, most))

    def add(self, k: int, tokens: list[int], progress: float, n_rows: int, draft_s: float, verify_s: float) -> None:
        """Count a step of `n_rows`: the tokens it brought each row that still runs, and its seconds.

        progress: the tokens it brought the row that is behind.
        """
        tally = self.tallies[k]
        for n in tokens:
            tally.counts[n - 1] += 1
        tally.draft_s.append(draft_s)
        tally.verify_s.append(verify_s)
        if not self.adapts or not tokens:
            return
        self._steps += 1
        # After a draft a plain step is slower, and after plain steps a draft model first reads what they brought.
        switches = self.probes and self._since_draft > 0 if k else self._since_draft == 0
        is_timed = not switches or not self._recent[k]
        self._since_plain = 0 if k == 0 and is_timed else self._since_plain + 1
        self._since_draft = 0 if k else self._since_draft + 1
        if self._steps % FORGET == 0 and self._account >= 1:
            for other in self.ks:
                self._recent[other].clear()
        seconds = draft_s + verify_s
        if is_timed:
            self._recent[k].append(seconds)
        if self._steps % 16 == 0 or len(self._recent[k]) < 9:
            self._learn_costs(n_rows)
        if k:
            cost = self._costs[k]
            if switches:
                (seconds,) = self.agree([seconds])
                cost = max(cost, seconds / self._plain)
            self._account = max(-START, min(RESERVE, self._account + progress - cost))
        else:
            self._account = max(self._account, min(START, self._account + self._allowance))

    def figures(self) -> dict[str, Any]:
        """The entry in `--metrics_path`: of all steps that drafted, and under "by_k" of each k, plain steps first."""
        drafting = Tally(max(self.ks))
        for k in self.ks:
            tally = self.tallies[k]
            drafting.draft_s += tally.draft_s
            drafting.verify_s += tally.verify_s
            for n, count in enumerate(tally.counts):
                drafting.counts[n] += count
        return drafting.figures() | {"by_k": [t.figures() for t in self.tallies.values() if t.verify_s]}
