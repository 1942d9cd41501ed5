"""Download the files that a model needs from the Hugging Face hub: config, tokenizer and one set of weights.

Usage: python scripts/download.py meta-llama/Llama-3.1-8B [MORE ...] [--revision REV] [--checkpoint_dir checkpoints]

Worth knowing: `hf_hub_download` discards a partial file (huggingface_hub 2.4; changed during 1.x), so an interrupted
10 GB shard would start again from zero. This script therefore writes to `NAME.HASH.incomplete` and renames the file
once its hash is the hub's. Running the command again resumes, and checks the files that are already complete. Of two
runs at once the second waits for the first, file by file. A hub that stalls ends the run after a minute.
"""

import errno
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, errors, hf_hub_url, model_info
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tekken.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "quantize_config.json",
)  # fmt: skip
# In order of preference; an index means that the weights are sharded.
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Taken without an index, too; the last is AutoGPTQ's name.
HF_SHARDS = (
    r"model-\d+-of-\d+\.safetensors", r"pytorch_model-\d+-of-\d+\.bin", r"gptq_model[\w-]*\.safetensors",
)  # fmt: skip

PATIENCE = 60  # seconds in which a listing must arrive, or more of a file: at 1.1 kB/s or more a download goes on
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # bytes that arrive before they are written and shown; the hub's own is 10 MiB


class Stalled(Exception):
    """Less than DOWNLOAD_CHUNK_SIZE arrived in PATIENCE seconds."""


def watched(work: Callable[[], Any], progress: Callable[[], int] = int) -> Any:
    """Run `work()` in a thread, return its result. Raises Stalled if `progress()` is unchanged after PATIENCE seconds.

    huggingface_hub sets no limit for a listing, waits as long as a server's `Retry-After` says, and takes every byte
    for a sign of life. A thread that stalls is left behind: neither a sleep nor the look-up of a host can be ended.
    """
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    before = progress()
    while not wait([result], PATIENCE).done:
        if (now := progress()) == before:
            raise Stalled
        before = now
    return result.result()


def choose_files(names: list[str]) -> list[str]:
    """Choose from a repository's listing the files to fetch: config, tokenizer and, last, one set of weights.

    For sharded Hugging Face weights only the index is chosen (`shards_of` lists the shards).
    Raises ValueError, naming the repository's files, if there are no weights of a known layout.
    """
    chosen = [name for name in CONFIG_FILES if name in names]
    if "config.json" in names:
        if weights := [name for name in HF_WEIGHTS if name in names]:
            return chosen + weights[:1]
        for pattern in HF_SHARDS:
            if shards := sorted(name for name in names if re.fullmatch(pattern, name)):
                return chosen + shards
    for folder in ("", "original/"):  # Meta's own layout, https://github.com/meta-llama/llama-models
        shards = sorted(n for n in names if re.fullmatch(folder + r"consolidated\.(\d+\.)?pth", n))
        if shards and folder + "params.json" in names:
            extra = {folder + "params.json", folder + "tokenizer.model"}.intersection(names).difference(chosen)
            return chosen + sorted(extra) + shards
    held = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    layouts = "model.safetensors or pytorch_model.bin, whole or in shards, with config.json"
    layouts += ", or consolidated.*.pth with params.json"
    raise ValueError(f"no weights to fetch; expected {layouts}; the repository holds: {held or 'nothing'}")


def shards_of(index_text: str, names: list[str]) -> list[str]:
    """The shards named by the `weight_map` of an index file, which must be among the repository's `names`.

    Raises ValueError if the index is malformed, or names a file outside its folder or not in the repository.
    """
    try:
        shards = sorted({str(shard) for shard in json.loads(index_text)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the weights' index has no weight_map from tensor to file ({error!r})") from error
    for shard in shards:
        if PurePosixPath(shard).is_absolute() or ".." in shard.split("/") or re.search(r"[\\:]", shard):
            raise ValueError(f"the weights' index names {shard!r}; a shard must lie in the index's own folder")
        if shard not in names:
            raise ValueError(f"the weights' index names {shard!r}, which the repository does not hold")
    return shards


def check_config(path: Path) -> None:
    """Raise ValueError if `load_model` or `load_head` would refuse the `config.json` or `params.json` at `path`."""
    from fast import families, head_files, meta, published
    from fast.reading import read_json, reading

    config = read_json(path)
    with reading(path):
        if path.name == "config.json" and families.head_kind(config):
            head_files.args_of_head(config)
        elif path.name == "config.json":
            families.args_from_hf(config)
            published.check(config)
        else:
            meta.check_params(config, path)


def content_hash(file: RepoSibling) -> str:
    """The hash that the hub lists for a file: sha256 for a large (LFS) file, git's blob hash for any other."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def list_files(repo_id: str, revision: str | None, token: str | None) -> tuple[str, dict[str, RepoSibling]]:
    """The commit that `revision` names, and its files by name; those with unprintable characters are left out.

    Raises ValueError if the hub's answer is not such a list, with a size and a hash for every file.
    """
    try:
        info = watched(lambda: model_info(repo_id, revision=revision, token=token, files_metadata=True))
        files = {file.rfilename: file for file in info.siblings if file.rfilename.isprintable()}
        if not re.fullmatch("[0-9a-f]{40}", info.sha) or not all(map(_is_valid, files.values())):
            raise ValueError("not a commit, a size or a hash")
    except errors.HFValidationError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        message = f"{constants.ENDPOINT} lists no commit, or no sizes and hashes: is it a Hugging Face hub?"
        raise ValueError(message) from error
    return info.sha, files


def _is_valid(file: RepoSibling) -> bool:
    hash_length = 64 if file.lfs else 40
    is_hash = re.fullmatch(f"[0-9a-f]{{{hash_length}}}", content_hash(file)) is not None
    return is_hash and type(file.size) is int and 0 <= file.size < 1 << 63


def is_complete(path: Path, file: RepoSibling) -> bool:
    """Whether the file at `path` has the size and the hash that the hub lists."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == content_hash(file)


def fetch(file: RepoSibling, url: str, path: Path, headers: dict[str, str]) -> None:
    """Download one file to `path`, resuming where an earlier run stopped; raises OSError if its hash is wrong.

    Where another process is downloading it, this one waits, then goes on where that stopped.
    """
    from fast.files import locked

    if is_complete(path, file):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{content_hash(file)[:12]}.incomplete")
    with locked(partial, f"another process is downloading {path}; waiting for it"):
        if is_complete(path, file):  # by that process
            partial.unlink()
            return
        if partial.is_file() and partial.stat().st_size > file.size:
            os.truncate(partial, 0)
        with partial.open("ab") as stream:
            sizes = {"resume_size": stream.tell(), "expected_size": file.size}

            def size() -> int:
                n = partial.stat().st_size
                if n > file.size:
                    raise OSError(f"{file.rfilename} is larger than the {file.size} bytes that the hub lists")
                return n

            watched(lambda: http_get(url, stream, headers=headers, displayed_filename=file.rfilename, **sizes), size)
        if not is_complete(partial, file):
            partial.unlink()
            raise OSError(f"{file.rfilename} arrived damaged (its hash is not the hub's) and was removed")
        partial.replace(path)


def download(repo_id: str, checkpoint_dir: Path | str, revision: str | None = None, token: str | None = None) -> Path:
    """Download `repo_id` into `checkpoint_dir/repo_id`, and return that directory.

    The revision is resolved to a commit first, so all files come from one commit. Without a `token`, HF_TOKEN or the
    stored login is used. Raises OSError, one line: what went wrong and how to fix it.
    """
    try:
        return _download(repo_id, checkpoint_dir, revision, token)
    except Exception as error:
        if (message := explain(error, repo_id, revision)) is None:
            raise
        raise OSError(message) from error


def _download(repo_id: str, checkpoint_dir: Path | str, revision: str | None, token: str | None) -> Path:
    """The hub's protocol: https://huggingface.co/docs/hub/api."""
    commit, files = list_files(repo_id, revision, token)
    directory = Path(checkpoint_dir) / repo_id
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}  # a compressed download cannot resume

    def get(name: str) -> None:
        fetch(files[name], hf_hub_url(repo_id, name, revision=commit), directory / name, headers)

    chosen = choose_files(list(files))
    if first := [name for name in chosen if PurePosixPath(name).name in ("config.json", "params.json")]:
        get(first[0])  # before the gigabytes
        check_config(directory / first[0])
    if chosen[-1].endswith(".index.json"):
        get(chosen[-1])
        chosen += shards_of((directory / chosen[-1]).read_text(encoding="utf-8"), list(files))
    total = sum(files[name].size for name in chosen)
    print(f"{repo_id} at {commit[:12]}: {len(chosen)} files, {total / 1e9:.2f} GB", flush=True)
    for name in chosen:
        get(name)
    return directory


def explain(error: Exception, repo_id: str, revision: str | None) -> str | None:
    """One line: what went wrong and how to fix it; None for an error that the user, hub and network did not cause."""
    hub, again = constants.ENDPOINT, "; run the same command again to resume"
    known = {
        errors.HFValidationError: f"bad repository id {repo_id!r}; expected OWNER/NAME, like meta-llama/Llama-3.1-8B",
        errors.GatedRepoError: f"{repo_id} is gated: accept its licence at {hub}/{repo_id} and set HF_TOKEN",
        errors.RepositoryNotFoundError: f"{hub} has no model {repo_id!r}: check its name; if private, set HF_TOKEN",
        errors.RevisionNotFoundError: f"{repo_id} has no revision {revision!r}; expected a branch, tag or commit",
    }
    for kind, message in known.items():  # in this order: a GatedRepoError is a RepositoryNotFoundError too
        if isinstance(error, kind):
            return message
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{hub} answered {status} for {repo_id}" + (": check HF_TOKEN" if status in (401, 403) else again)
    if isinstance(error, Stalled):
        return f"{hub} sent nothing, or next to nothing, for {PATIENCE} seconds{again}"
    # The exception's package depends on huggingface_hub's version: requests with 0.x, httpx with 1.x, httpx2 with 2.x.
    if type(error).__module__.startswith(("requests", "urllib3", "http")):
        return f"cannot reach {hub} ({type(error).__name__}): check the network and HF_ENDPOINT{again}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {repo_id}: free some, or give scripts/download.py another --checkpoint_dir{again}"
    if isinstance(error, (OSError, ValueError)):
        text = "".join(char for char in " ".join(str(error).split()) if char.isprintable())  # the hub may have its say
        return f"{repo_id}: {text}" + (again if isinstance(error, OSError) else "")
    return None


def main() -> int:
    import _root  # noqa: F401 - finds the modules of the repository's root

    from fast.cli import Parser, as_argument, exit_code

    parser = Parser("Download models from the Hugging Face hub.")
    parser.add_argument("repo_ids", nargs="+", metavar="REPO_ID", help="OWNER/NAME on the hub")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="models go to DIR/REPO_ID")
    parser.add_argument("--token", help="access token (default: HF_TOKEN, or the stored login)")
    args = parser.parse_args()

    def work() -> None:
        for repo_id in args.repo_ids:
            directory = download(repo_id, args.checkpoint_dir, args.revision, args.token)
            print(f"done: {directory}")
            print("next: python scripts/convert_hf_checkpoint.py --checkpoint_dir", as_argument(directory))

    return exit_code(work, stopped="stopped; run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
