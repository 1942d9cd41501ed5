"""Adapter that runs the tasks of EleutherAI's lm-evaluation-harness (lm_eval 0.4.9 or later) on our models.

    python eval.py --tasks hellaswag                                        # our command line
    python -m fast.harness --model fast --model_args checkpoint_path=DIR    # the harness's, with our model registered

Needs the package lm_eval, which nothing else in the project does; so import this module only where it is used. Texts
are tokenised and truncated exactly as in the harness's own HFLM, so that results can be compared number by number.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fast.cli import DEMO, INSTALL_LM_EVAL, exit_code, load, resolve_device

try:
    from lm_eval import simple_evaluate
except ImportError as error:
    message = f"tasks need the lm-evaluation-harness ({error}): {INSTALL_LM_EVAL}"
    if __name__ == "__main__":
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message) from None
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table, simple_parse_args_string
from tqdm import tqdm

from fast.compiling import set_compile_flags
from fast.decoding import Steps, build_steps, stream
from fast.rows import Row
from fast.sampling import Sampling
from fast.scoring import Scorer, parse_batch_size
from fast.tokenizer import Tokenizer
from model import Transformer

MAX_NEW_TOKENS = 256  # for tasks that set no maximum, as in HFLM
NO_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1, "typical_p": 1}
MAX_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("fast")
class FastLM(TemplateLM):
    """A `Transformer` and its tokenizer as the harness sees a model.

    batch_size: rows, or "auto". max_length: the most tokens the model is given (default: its context length).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        name: str = "",
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        compile: bool = False,
        kv_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.scorer = Scorer(model, parse_batch_size(batch_size), max_length, compile, kv_dtype)
        self.model, self.text, self._name = model, tokenizer, name  # the harness expects transformers' as `tokenizer`
        self._device = self.scorer.device
        self._steps: dict[Sampling, Steps] = {}
        if self.prefix_token_id is None:
            raise ValueError("scoring needs a begin-of-text or an end-of-text token, and this tokenizer has neither")

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "FastLM":
        """From the harness's `--model_args`: checkpoint_path (or pretrained), dtype, compile, max_length, ...

        Of the chat template's variables, as in HFLM: chat_template_args, a dict, and enable_thinking.
        """
        given = {**{k: v for k, v in (additional_config or {}).items() if v is not None}, **arg_dict}
        path = Path(given.pop("checkpoint_path", given.pop("pretrained", DEMO)))
        device = given.pop("device", "cuda")
        if device.startswith("cuda") and not torch.cuda.is_available():  # the default, as in HFLM: no error
            device = "cpu"
        where = argparse.Namespace(device=device, dtype=given.pop("dtype", None))
        names = ("batch_size", "max_length", "compile")
        options = {name: given.pop(name) for name in names if name in given}
        template_args = dict(given.pop("chat_template_args", None) or {})
        if "enable_thinking" in given:
            template_args["enable_thinking"] = given.pop("enable_thinking")
        if unknown := given.keys() - {"max_batch_size"}:
            known = (
                f"checkpoint_path, pretrained, device, dtype, {', '.join(names)}, chat_template_args, enable_thinking"
            )
            raise ValueError(f"--model_args: unknown {', '.join(sorted(unknown))}; known: {known}")
        if options.get("compile"):
            set_compile_flags(device)
        model, tokenizer = load(path, *resolve_device(where))
        tokenizer.template_args = template_args
        return cls(model, tokenizer, name=str(path), **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "FastLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- Text and tokens.

    @property
    def eot_token_id(self) -> int | None:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        return self.text.bos_id if self.text.bos_id is not None else self.text.eos_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of `string`. By default with the model's beginning-of-text token, unless `string` begins with it."""
        return self.text.encode(string, bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the results file."""
        return self.text.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt. Without `add_generation_prompt` it ends with the last message's text, for the model to continue.

        If the template rejects the messages, they are tried without the system message, as in HFLM.
        """
        try:
            prompt = self.text.apply_chat_template(chat_history, add_generation_prompt)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            prompt = self.text.apply_chat_template(rest, add_generation_prompt)
        if add_generation_prompt:
            return prompt
        last = chat_history[-1]["content"].strip()
        return prompt[: prompt.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        dtype = str(self.model.tok_embeddings.weight.dtype).removeprefix("torch.")
        kv_dtype = str(self.scorer.kv_dtype or dtype).removeprefix("torch.")
        return {"model_dtype": dtype, "model_quantization": self.model.quantization, "kv_dtype": kv_dtype}

    # ---- The three kinds of request.

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        results = self.scorer.score([(context, ids) for _, context, ids in requests], progress=not disable_tqdm)
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each scored in disjoint windows of at most the maximum length."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        sums = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (log_likelihood, _) in zip(owners, found, strict=True):
            sums[i] += log_likelihood
        for request, result in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return sums

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuations of prompts, each up to a stop string or its maximum of new tokens."""
        same_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            same_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        jobs = []  # (indices of requests, their common settings: sampling, stop strings, new tokens)
        prompts: dict[int, list[int]] = {}
        for indices in same_settings.values():
            settings = parse_generation(requests[indices[0]].args[1])
            room = self.max_length - settings[2]
            if room < 1:
                raise ValueError(
                    f"the task asks for up to {settings[2]} new tokens, which leaves no room for a prompt in "
                    f"the maximum length {self.max_length}"
                )
            for i in indices:
                prompts[i] = (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:]
            jobs.append((sorted(indices, key=lambda i: -len(prompts[i])), settings))
        longest = max((len(prompts[indices[0]]) + settings[2] for indices, settings in jobs), default=1)
        rows, results = self.scorer.rows_for(longest), [""] * len(requests)
        self.scorer.reserve(rows, longest)
        with tqdm(total=len(requests), desc="generation", disable=True if disable_tqdm else None) as bar:
            for indices, settings in jobs:
                for batch in (indices[n : n + rows] for n in range(0, len(indices), rows)):
                    texts = self._generate([prompts[i] for i in batch], *settings)
                    for i, text in zip(batch, texts, strict=True):
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return results

    def _generate(self, prompts: list[list[int]], sampling: Sampling, stop: list[str], max_new: int) -> list[str]:
        """Generate one batch until every row has ended; decode without the prompts, as the harness expects.

        As in HFLM, a stop string may name special tokens, but the text is cut at it without them.
        """
        if sampling not in self._steps:
            self._steps[sampling] = build_steps(self.model, sampling, self.scorer.compile)
        stop = [*stop, self.text.eos_token] if self.text.eos_token else stop
        rows = [Row(self.text, [], max_new, stop) for _ in prompts]
        if self.scorer.compile:  # fill the last batch: another size would be compiled again
            prompts = prompts + [prompts[-1][:1]] * (self.model.max_batch_size - len(prompts))
        for tokens in stream(self._steps[sampling], prompts, max_new):
            for row, token in zip(rows, tokens, strict=False):
                if row.finish_reason is None:
                    row.put(token)
            if all(row.finish_reason for row in rows):
                break
        texts = [self.text.decode(row.tokens) for row in rows]
        return [min((text.partition(end)[0] for end in stop), key=len, default=text) for text in texts]


def parse_generation(settings: dict[str, Any]) -> tuple[Sampling, list[str], int]:
    """Sampling, stop strings and maximum of new tokens from a task's `generation_kwargs`.

    Greedy unless the temperature is above 0 and `do_sample` is not False. Raises ValueError for unknown settings.
    """
    settings = dict(settings)
    stop = settings.pop("until", None) or []
    lengths = [settings.pop(name, None) for name in MAX_NEW_TOKENS_NAMES]
    max_new = next((int(length) for length in lengths if length is not None), MAX_NEW_TOKENS)
    do_sample, temperature = settings.pop("do_sample", None), float(settings.pop("temperature", 0.0))
    filters = {name: settings.pop(name, None) for name in ("top_k", "top_p", "min_p")}
    if unknown := [f"{name} {value}" for name, value in sorted(settings.items()) if NO_EFFECT.get(name) != value]:
        raise ValueError(f"generation_kwargs: {', '.join(unknown)} not supported")
    if do_sample is False or temperature == 0:
        return Sampling(temperature=0, top_k=None), _listed(stop), max_new
    return Sampling(temperature, **filters), _listed(stop), max_new


def _listed(stop: str | list[str]) -> list[str]:
    return [text for text in ([stop] if isinstance(stop, str) else stop) if text]


# ---- Running tasks.


@cache  # indexing the harness's thousands of task files takes seconds
def task_manager(include_path: Path | None, include_defaults: bool = True) -> TaskManager:
    return TaskManager(include_path=include_path and str(include_path.absolute()), include_defaults=include_defaults)


def find_tasks(
    names: list[str], include_path: Path | None = None, flag: str = "--tasks"
) -> tuple[list[str], TaskManager]:
    """The tasks, groups and tags that match `names` (patterns, or comma-separated).

    Raises ValueError, beginning with `flag`, if one has no match.
    """
    wanted = [name for entry in names for name in entry.split(",") if name]
    manager = task_manager(include_path, include_defaults=include_path is None)
    missing = [name for name in wanted if not manager.match_tasks([name])]
    if missing and include_path is not None:  # not all are in include_path: search the harness's own too
        manager = task_manager(include_path)
        missing = [name for name in wanted if not manager.match_tasks([name])]
    if missing:
        where = f", nor in {include_path}" if include_path else ""
        raise ValueError(f"{flag}: the harness has no {', '.join(missing)}{where}; `lm_eval ls tasks` lists its tasks")
    return manager.match_tasks(wanted), manager


def evaluate(lm: FastLM, tasks: tuple[list[str], TaskManager], args: argparse.Namespace) -> dict[str, Any]:
    """Run the tasks with `eval.py`'s flags, print the table and write the files; returns the harness's results."""
    names, manager = tasks
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    tracker = EvaluationTracker(output_path=str(args.output_path)) if args.output_path else None
    results = simple_evaluate(
        model=lm,
        model_args={"pretrained": str(args.checkpoint_path), "dtype": lm.get_model_info()["model_dtype"]},
        tasks=names,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=args.device,
        limit=args.limit,
        log_samples=args.log_samples,
        evaluation_tracker=tracker,
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        **({} if args.seed is None else dict.fromkeys(seeds, args.seed)),
    )
    if results is None:  # the harness gives results to rank 0 only
        return {}
    samples = results.pop("samples", None)
    if tracker is not None:
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in results["configs"] if samples else ():
            tracker.save_results_samples(task_name=name, samples=samples[name])
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    return results


if __name__ == "__main__":
    sys.exit(exit_code(cli_evaluate))
