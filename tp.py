"""Tensor parallelism: torchrun's processes as ranks that share a model (Megatron-LM, Shoeybi et al. 2019).

    torchrun --standalone --nproc_per_node=2 generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth

    ranks = Ranks.from_torchrun()
    with ranks.joined("cuda"):
        model = load_model(path, ranks.device("cuda"), ranks=ranks)

No module names appear here: every module that declares a `sharding` is divided accordingly. `connect` compares a model
of one rank's sizes with the whole model; where the shapes of a tensor (weight, bias, scales or zeros) differ, the rank
holds a share of it. It also sets each module's `collective`, which combines the ranks' outputs.

Worth knowing: every rank receives the same logits, bit for bit. So ranks with the same seed sample the same tokens and
stop at the same step without communicating.
"""

import contextlib
import dataclasses
import functools
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import Embedding, ModelArgs

GROUP = "0"  # the name of the first process group
SILENCE = 50  # seconds without a sign of life from a rank after which the others end
_OVER = 10**9  # added to the count of a rank that has finished


# ---- The weights.


@dataclass(frozen=True)
class Share:
    """A rank's share of a tensor: the `ranges` (first, end) along `dim`; or zeros, for a bias that only rank 0 adds."""

    dim: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    is_zero: bool = False


def share_of(whole: Sequence[int], local: Sequence[int], rank: int, world_size: int) -> tuple[tuple[int, int], ...]:
    """The (first, end) range of a rank's share in each part; `whole` and `local` are the parts' full and local sizes.

    A part with fewer pieces than ranks (8 key heads, 16 ranks) is divided as far as possible: neighbouring ranks hold
    the same piece, and the query heads that use it.
    """
    ranges, offset = [], 0
    for n, n_local in zip(whole, local, strict=True):
        first = offset + rank * n // world_size // n_local * n_local
        ranges.append((first, first + n_local))
        offset += n
    return tuple(ranges)


def divided(args: ModelArgs, n_ranks: int) -> ModelArgs:
    """The configuration of one rank's share of a model.

    Heads and the width of a feed-forward, or of every expert, are divided, the vocabulary only if it is a multiple of
    `n_ranks`. With more ranks than key heads, several ranks hold the same key head. Raises ValueError for sizes that
    `n_ranks` does not divide.
    """
    has_dense_layers = args.dense_layers or not args.n_experts
    for name in ("n_heads", "expert_dim", *(["hidden_dim"] if has_dense_layers else [])):
        if getattr(args, name) % n_ranks:
            raise ValueError(f"{name} {getattr(args, name)} is not a multiple of {n_ranks}")
    if args.n_kv_heads % n_ranks and n_ranks % args.n_kv_heads:
        raise ValueError(f"n_kv_heads {args.n_kv_heads} and {n_ranks}: neither is a multiple of the other")
    return dataclasses.replace(
        args,
        n_heads=args.n_heads // n_ranks,
        n_kv_heads=max(1, args.n_kv_heads // n_ranks),
        hidden_dim=args.hidden_dim // n_ranks,
        expert_dim=args.expert_dim // n_ranks,
        vocab_size=args.vocab_size // (1 if args.vocab_size % n_ranks else n_ranks),
    )


def connect(whole: nn.Module, local: nn.Module, ranks: "Ranks") -> dict[str, Share]:
    """Set the collectives in `local`, a rank's share of `whole`; return the shares of its tensors, by name.

    Tensors that are not named are whole on every rank. Neither model needs weights.
    """
    shares = {}
    for name, module in local.named_modules():
        sharding, origin = getattr(module, "sharding", None), whole.get_submodule(name)
        if sharding is None:
            continue
        is_divided = module.weight.shape != origin.weight.shape
        if getattr(module, "order", None) is not None and module.order.shape != origin.order.shape:
            module.gather = functools.partial(COLLECTIVES["gather", True], world_size=ranks.world_size)
        for kind, tensor in module.state_dict().items():
            before = origin.state_dict()[kind].shape
            dims = [dim for dim, n in enumerate(tensor.shape) if n != before[dim]]
            if dims:
                (dim,) = dims
                stacked = dim == 0 and sharding.parts is not None
                sizes = (origin.sharding.parts, sharding.parts) if stacked else ((before[dim],), (tensor.shape[dim],))
                shares[f"{name}.{kind}"] = Share(dim, share_of(*sizes, ranks.rank, ranks.world_size))
            elif kind == "bias" and is_divided and sharding.collective == "sum" and ranks.rank > 0:
                shares[f"{name}.{kind}"] = Share(is_zero=True)
        if collective := COLLECTIVES.get((sharding.collective, is_divided)):
            collective = functools.partial(collective, world_size=ranks.world_size)
            if isinstance(module, Embedding):
                first_id = shares[f"{name}.weight"].ranges[0][0]
                module.lookup = functools.partial(parallel_lookup, first_id=first_id, collective=collective)
            else:
                module.collective = collective
    return shares


def parallel_lookup(idx: Tensor, weight: Tensor, first_id: int, collective: Callable[[Tensor], Tensor]) -> Tensor:
    """`F.embedding` of a vocabulary that ranks share, this one from `first_id` on: other ids give zeros to the sum."""
    row = idx - first_id
    ours = (row >= 0) & (row < len(weight))
    return collective(F.embedding(row.where(ours, 0), weight) * ours[..., None])


# ---- The collectives: torch's functional ones, which torch.compile takes into its graph.


def all_reduce(x: Tensor, world_size: int) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", GROUP))


def all_gather(x: Tensor, world_size: int) -> Tensor:
    """`x [..., n]` of all ranks side by side, `[..., world_size * n]`."""
    ops = torch.ops._c10d_functional
    stacked = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), world_size, GROUP))
    return stacked.view(world_size, *x.shape).movedim(0, -2).flatten(-2)


def broadcast(x: Tensor, world_size: int) -> Tensor:
    """Rank 0's `x`, on every rank."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.broadcast(x.contiguous(), 0, GROUP))


# (declared collective, is the module divided?) -> function. If all ranks compute all logits, rank 0's are used.
COLLECTIVES = {("sum", True): all_reduce, ("gather", True): all_gather, ("gather", False): broadcast}


def measure_collectives(run: Callable[[], int], device: str) -> dict[str, float]:
    """Seconds per step that `run` spends in collectives, and their share of its time; `run` returns its step count.

    Waiting for a slower rank counts as time in a collective.
    """
    cuda = device.startswith("cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop on stderr
    with torch.autograd.profiler.profile(use_device="cuda" if cuda else None) as profile:
        start = time.perf_counter()
        steps = run()
        seconds = time.perf_counter() - start
    microseconds = 0.0
    for event in profile.key_averages():
        if cuda and event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds += event.self_device_time_total * ("nccl" in event.key or "one_shot" in event.key)
        elif not cuda and event.key.startswith("_c10d_functional::"):
            microseconds += event.cpu_time_total
    return {"collectives_s_per_token": microseconds / 1e6 / steps, "collectives_share": microseconds / 1e6 / seconds}


# ---- The processes.


@dataclass
class Ranks:
    """The processes that share a model, as one of them sees it; by default a single process that shares nothing.

    Only rank 0 prints. A failure on one rank ends all: that rank says why and exits, and torchrun ends the others. So
    does a rank that is not heard of for SILENCE. With torchrun all end.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1
    _store: Any = field(default=None, repr=False)
    _n_shared: int = field(default=0, repr=False)

    @classmethod
    def from_torchrun(cls) -> "Ranks":
        """Read torchrun's environment. Only for a command line's `main`, because it mutes output on all ranks but 0."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not all(name in os.environ for name in (*names, "MASTER_ADDR")):
            return cls()
        ranks = cls(*(int(os.environ[name]) for name in names))
        if ranks.rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        return ranks

    def device(self, device: str) -> str:
        """For "cuda" the GPU of this rank, else `device` itself. Raises ValueError if the machine has too few GPUs."""
        if self.world_size == 1 or device != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} GPUs for {self.local_world_size} processes on this machine"
            raise ValueError(f"--device cuda cannot be used here: {found}")
        return f"cuda:{self.local_rank}"

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Join the process group (NCCL on GPUs, Gloo on CPUs) for the length of the `with` block.

        Raises ConnectionError if another rank has ended. An unexpected exception is printed with its traceback and ends
        the process at once, because the other ranks may be waiting for this one.
        """
        if self.world_size == 1:
            yield
            return
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            self._store = store.clone()  # a connection of our own: PyTorch's is busy while it waits for a rank
            over = threading.Event()
            watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
            watch.start()
            options: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(days=1)}  # a rank may compile for long
            if device.startswith("cuda"):
                torch.cuda.set_device(device := self.device(device))
                options = {"backend": "nccl", "device_id": torch.device(device)}
            dist.init_process_group(store=store, rank=self.rank, world_size=self.world_size, **options)
            self._enable_one_shot(device)
            yield
            if device.startswith("cuda"):
                torch.compiler.reset()  # a communicator is only destroyed after the CUDA graphs that recorded it
            over.set()
            watch.join()
            dist.destroy_process_group()
        except (ValueError, OSError, ImportError, torch.OutOfMemoryError):  # `exit_code` reports these in one line
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, dist.DistError) or "gloo" in reason:
                reason = re.sub(r"^\[\S+\] |\. This is .*", "", reason)  # without Gloo's source line and advice
                raise ConnectionError(f"another process is gone: {reason}") from error
            self.report_error(traceback.format_exc())
            self.exit(1)

    def _watch(self, over: threading.Event) -> None:
        """Until `over`, end this process if another rank gives no sign of life for SILENCE, or if torchrun is gone.

        A collective would wait for a rank that is stopped. A sign of life is a count in the store, one up each second;
        it is compared by those who count themselves, so that nobody complains after a pause of all.
        """
        counts, silent = [0] * self.world_size, [0] * self.world_size
        try:
            while not over.wait(1):
                self._store.add(f"alive/{self.rank}", 1)
                now = [self._store.add(f"alive/{rank}", 0) for rank in range(self.world_size)]
                silent = [n + 1 if old == new < _OVER else 0 for n, old, new in zip(silent, counts, now, strict=True)]
                counts = now
                if max(silent) >= SILENCE:
                    rank = silent.index(max(silent))
                    self.report_error(f"error: rank {rank} gave no sign of life for {SILENCE} s, is it stopped?")
                    self.exit(1)
            self._store.add(f"alive/{self.rank}", _OVER)
        except RuntimeError:  # the store is gone: it lives in torchrun, or else in rank 0, which may have finished
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                if self.rank == 0:
                    print("error: torchrun has ended", file=sys.__stderr__, flush=True)
                self.exit(1)

    def _enable_one_shot(self, device: str) -> None:
        """If asked for, let Inductor use the one-shot all-reduce over symmetric memory, for messages up to 128 KB.

        The environment variable is gpt-fast's. The GPUs must be in one machine and able to access each other's memory.
        """
        if os.environ.get("ENABLE_INTRA_NODE_COMM") != "1" or not device.startswith("cuda"):
            return
        if self.local_world_size != self.world_size:
            raise ValueError("ENABLE_INTRA_NODE_COMM=1 is for processes of one machine: leave it out")
        from torch.distributed import _symmetric_memory

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, but Inductor checks for it
            _symmetric_memory.enable_symm_mem_for_group(GROUP)
        torch._inductor.config._collective.auto_select = True

    def report_error(self, message: str) -> None:
        """Print `message` on stderr unless another rank already has: only the first to fail knows the cause.

        An empty message prints nothing and silences the other ranks.
        """
        if self.world_size == 1:
            print(message, end="\n" if message else "", file=sys.stderr)
            return
        try:
            is_first = self.rank == 0 if self._store is None else self._store.add("complaints", 1) == 1
        except RuntimeError:  # the process that hosts the store has ended
            is_first = True
        if message and is_first:  # past the muted sys.stderr
            print(f"{message} (rank {self.rank} of {self.world_size})", file=sys.__stderr__, flush=True)

    def exit(self, code: int) -> int:
        """Exit at once with `code`, without waiting for ranks that wait for this one; a single process returns it."""
        if self.world_size == 1:
            return code
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(code)

    def agree(self, numbers: list[float], device: str) -> list[float]:
        """Return rank 0's numbers, on every rank, in the time of a collective."""
        return (
            broadcast(torch.tensor(numbers, device=device), self.world_size).tolist()
            if self.world_size > 1
            else numbers
        )

    def from_rank_0(self, make: Callable[[], str | None]) -> str | None:
        """Return rank 0's `make()` on every rank. Waits as long as it takes, because a person may be typing."""
        if self.world_size == 1:
            return make()
        self._n_shared += 1
        key = f"shared/{self._n_shared}"
        if self.rank == 0:
            text = make()
            self._store.set(key, "" if text is None else "=" + text)
            return text
        while not self._store.check([key]):  # Ctrl-C would not end `wait`
            time.sleep(0.02)
        text = self._store.get(key).decode()
        return text[1:] if text else None


ALONE = Ranks()
