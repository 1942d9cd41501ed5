"""`scripts/download.py`: which files are chosen, and the command line against a local hub, failures included.

Usage: python -m pytest tests/test_download.py. A command's limit on waiting is shortened where a test meets it.
"""

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, listing
from huggingface_hub import file_download, hf_api

import scripts.download as download_script
from scripts.download import check_config, choose_files, shards_of

ROOT = Path(__file__).parent.parent
REPO = "org/model"
MIB = 1 << 20
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode()
WANTED = {
    "config.json": (ROOT / "demo/draft/config.json").read_bytes(),
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": INDEX,
    SHARDS[0]: random.Random(1).randbytes(12 * MIB),
    SHARDS[1]: random.Random(2).randbytes(MIB // 4),
}
SHA256 = hashlib.sha256(WANTED[SHARDS[0]]).hexdigest()
UNWANTED = ["README.md", "modeling_evil.py", "consolidated.safetensors", "pytorch_model.bin", "original/params.json"]


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.repos[REPO] = {"README.md": b"# model", **WANTED} | dict.fromkeys(UNWANTED, b"not needed")
        yield hub


def environment(tmp_path, endpoint):
    """This process's, with the hub at `endpoint` and without this machine's hub settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
    return {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}


def start(tmp_path, endpoint, *args, **env):
    """Start the command as a user would."""
    env = {**environment(tmp_path, endpoint), **env}
    command = [sys.executable, "scripts/download.py", "--checkpoint_dir", str(tmp_path / "checkpoints"), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def ask(endpoint, tmp_path, patch):
    """Let this process ask the hub at `endpoint`, without this machine's hub settings."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(download_script.constants, "ENDPOINT", endpoint)
    for module in (download_script.constants, file_download):  # the second has its own in huggingface_hub 0.x
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(hf_api.api, "endpoint", endpoint)
    patch.setattr(download_script.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("NO_PROXY", "*")


def run(tmp_path, endpoint, *args):
    """Run the command to its end, in this process, which has imported torch already: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        ask(endpoint, tmp_path, patch)
        patch.setattr(sys, "argv", ["download.py", "--checkpoint_dir", str(tmp_path / "checkpoints"), *args])
        try:
            code = download_script.main()
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def run_impatient(tmp_path, endpoint):
    """Run the command on REPO with a limit of a second on its waits."""
    program = "import sys; sys.path.insert(0, 'scripts'); import download; download.PATIENCE = 1; "
    command = [sys.executable, "-c", program + "sys.exit(download.main())"]
    command += ["--checkpoint_dir", str(tmp_path / "checkpoints"), REPO]
    env = environment(tmp_path, endpoint)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


def assert_complete(tmp_path):
    directory = tmp_path / "checkpoints" / REPO
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert found.keys() == WANTED.keys()
    assert all(found[name] == data for name, data in WANTED.items())  # no diff of megabytes when it fails


def wait_for_partial(tmp_path, process):
    """The unfinished file of the first shard, once it holds something."""
    partial = tmp_path / "checkpoints" / REPO / f"{SHARDS[0]}.{SHA256[:12]}.incomplete"
    deadline = time.monotonic() + 20
    while not partial.exists() or not partial.stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return partial


def assert_error(result, *words):
    code, _, err = result
    assert code == 2, err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("args", [[], [REPO, "--branch", "main"]])
def test_flags_that_it_does_not_know_are_one_line(tmp_path, args):
    assert_error(run(tmp_path, "http://127.0.0.1:9", *args), "--help lists the flags", *args[1:])


def test_choose_files_prefers_one_set_of_weights():
    both = ["config.json", "adapter_model.safetensors", "consolidated.safetensors", "model.safetensors"]
    both += ["pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "run.py"]
    assert choose_files(both) == ["config.json", "model.safetensors"]
    sharded = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "model.safetensors.index.json"]
    assert choose_files([*sharded, "config.json"])[1:] == ["model.safetensors.index.json"]
    named = ["config.json", "pytorch_model.bin", "training_args.bin", "tokenizer.model"]
    assert choose_files(named)[-1] == "pytorch_model.bin"
    assert choose_files(["config.json", SHARDS[1], SHARDS[0], "adapter_model.safetensors"])[1:] == SHARDS
    with pytest.raises(ValueError, match="no weights to fetch; expected model.safetensors .* with config.json"):
        choose_files(["model.safetensors"])


@pytest.mark.parametrize("folder", ["", "original/"])
def test_choose_files_takes_the_weights_of_meta(folder):
    files = [folder + name for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model")]
    assert sorted(choose_files([*files, "LICENSE", folder + "checklist.chk"])) == files
    without_params = [name for name in files if "params" not in name]
    with pytest.raises(ValueError, match=r"no weights .* holds: .*consolidated\.00\.pth"):
        choose_files(without_params)


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/x.bin", "a/../../x.bin", "..\\x.bin", "C:x.bin"])
def test_shards_of_rejects_a_name_outside_its_folder(shard):
    with pytest.raises(ValueError, match="must lie in the index's own folder"):
        shards_of(json.dumps({"weight_map": {"a": shard}}), [shard])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": ["a.bin"]}', '{"weight_map": {"a": {}}}'])
def test_shards_of_rejects_a_malformed_index(text):
    with pytest.raises(ValueError, match="index"):
        shards_of(text, ["a.bin"])


def test_downloads_only_what_is_needed_and_checks_it_the_second_time(hub, tmp_path):
    process = start(tmp_path, hub.url, REPO, "--revision", "v1", HF_TOKEN="hf_secret")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert_complete(tmp_path)
    directory = tmp_path / "checkpoints" / REPO
    assert "5 files, 0.01 GB" in out
    assert out.endswith(f"next: python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}\n")
    assert sorted(hub.fetched()) == sorted([*WANTED, *SHARDS])  # each shard twice: it is redirected
    for path, headers in hub.requests:
        if REPO in path:  # the token goes to the hub and nowhere else
            assert headers.get("authorization") == (None if path.startswith("/cdn") else "Bearer hf_secret"), path

    damaged = directory / SHARDS[1]
    damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
    hub.requests.clear()
    assert run(tmp_path, hub.url, REPO)[0] == 0
    assert_complete(tmp_path)
    assert set(hub.fetched()) == {SHARDS[1]}


def test_a_cut_connection_is_taken_up_again_by_the_next_run(hub, tmp_path):
    hub.faults[SHARDS[0]] = [("cut", 11 * MIB), "down", "down"]
    code, _, err = run(tmp_path, hub.url, REPO)
    assert code == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("run the same command again to resume")
    assert not (tmp_path / "checkpoints" / REPO / SHARDS[0]).exists()

    hub.requests.clear()
    hub.faults.clear()
    assert run(tmp_path, hub.url, REPO)[0] == 0
    assert_complete(tmp_path)
    assert [headers["range"] for headers in hub.headers(f"cdn/{REPO}")[:1]] == [f"bytes={11 * MIB}-"]
    assert set(hub.fetched()) == set(SHARDS)


def test_ctrl_c_says_how_to_resume_and_the_next_run_does(hub, tmp_path):
    hub.faults[SHARDS[0]] = [("stall", 11 * MIB)]
    process = start(tmp_path, hub.url, REPO)
    partial = wait_for_partial(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "\nstopped; run the same command again to resume\n")

    arrived = partial.stat().st_size
    hub.resume.set()
    hub.requests.clear()
    assert run(tmp_path, hub.url, REPO)[0] == 0
    assert_complete(tmp_path)
    assert hub.headers(f"cdn/{REPO}")[0]["range"] == f"bytes={arrived}-"


def test_damaged_bytes_are_never_given_the_files_name(hub, tmp_path):
    hub.faults[SHARDS[1]] = [bytes(len(WANTED[SHARDS[1]]))]
    assert_error(run(tmp_path, hub.url, REPO), SHARDS[1], "damaged")
    assert not list((tmp_path / "checkpoints").rglob(SHARDS[1] + "*"))


def test_a_full_disk(hub, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    data = WANTED[SHARDS[1]]
    hub.repos[REPO] = {"config.json": WANTED["config.json"], "model.safetensors": data}
    partial = tmp_path / "checkpoints" / REPO / f"model.safetensors.{hashlib.sha256(data).hexdigest()[:12]}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    assert_error(run(tmp_path, hub.url, REPO), "no space left", "--checkpoint_dir", "resume")


def quantise(tmp_path, endpoint):
    """Run `quantize.py --download` on REPO, with `tmp_path` as the root whose checkpoints/ it fetches into."""
    program = "import sys, pathlib, quantize\nfrom fast import cli\ncli.ROOT = pathlib.Path(sys.argv[1])\n"
    command = [sys.executable, "-c", program + "sys.exit(quantize.main(sys.argv[2:]))", tmp_path]
    command += ["--download", "--checkpoint_path", REPO]
    env = environment(tmp_path, endpoint)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_script_fetches_what_it_is_told_to(hub, tmp_path):
    files = {path.name: path.read_bytes() for path in (ROOT / "demo" / "draft").iterdir() if path.suffix != ".pth"}
    hub.repos[REPO] = {"README.md": b"# model", **files}
    hub.faults["model.safetensors"] = [("cut", 1 << 20), "down", "down"]
    code, out, err = quantise(tmp_path, hub.url)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith("run the same command again to resume")
    hub.faults.clear()
    code, out, err = quantise(tmp_path, hub.url)
    directory = tmp_path / "checkpoints" / REPO
    assert code == 0, err
    assert {path.name for path in directory.iterdir()} == {*files, "model_int8.pth"}
    assert f"{REPO} at c0ffee" in err
    assert out.startswith(f"wrote {directory / 'model_int8.pth'}\n")
    assert quantise(tmp_path, "http://127.0.0.1:9")[0] == 0  # it is there: the hub is not asked


def test_a_script_that_cannot_fetch_says_why(hub, tmp_path):
    hub.gated.add(REPO)
    assert_error(quantise(tmp_path, hub.url), f"{REPO} is gated", "HF_TOKEN")
    assert_error(quantise(tmp_path, "http://127.0.0.1:9"), "cannot reach http://127.0.0.1:9")


def test_a_gated_repository_needs_a_token(hub, tmp_path):
    hub.gated.add(REPO)
    assert_error(run(tmp_path, hub.url, REPO), f"{REPO} is gated", f"{hub.url}/{REPO}", "HF_TOKEN")


def test_wrong_names_and_a_hub_that_is_down(hub, tmp_path):
    assert_error(run(tmp_path, hub.url, "org/nothing"), "no model 'org/nothing'")
    assert_error(run(tmp_path, hub.url, REPO, "--revision", "v9"), "no revision 'v9'")
    assert_error(run(tmp_path, hub.url, "../../etc"), "'../../etc'", "OWNER/NAME")
    assert_error(run(tmp_path, "http://127.0.0.1:9", REPO), "cannot reach http://127.0.0.1:9")


def test_unusable_repositories(hub, tmp_path):
    hub.repos["org/gguf"] = {"model.gguf": b"GGUF"}
    assert_error(run(tmp_path, hub.url, "org/gguf"), "no weights", "holds: model.gguf")
    evil = "../../escaped.safetensors"
    hub.repos["org/evil"] = {
        "config.json": WANTED["config.json"],
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": evil}}).encode(),
        evil: b"",
    }
    assert_error(run(tmp_path, hub.url, "org/evil"), evil, "own folder")
    assert not list(tmp_path.rglob("escaped*"))


def test_a_model_that_cannot_run_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    config = {**json.loads(WANTED["config.json"]), "quantization_config": {"quant_method": "bitsandbytes"}}
    hub.repos[REPO] = {"config.json": json.dumps(config).encode(), "model.safetensors": b"gigabytes"}
    assert_error(run(tmp_path, hub.url, REPO), "weights quantised by 'bitsandbytes' are not supported")
    assert hub.fetched() == ["config.json"]


def in_listing(**changes):
    """A listing of WANTED; the changes are to the entry of the first shard."""
    files = [listing(name, data) for name, data in WANTED.items()]
    files[3] |= changes
    return {"id": REPO, "sha": COMMIT, "siblings": files}


LISTINGS = {
    "no object": [],
    "no name": {"sha": COMMIT, "siblings": []},
    "siblings null": in_listing() | {"siblings": None},
    "siblings a number": in_listing() | {"siblings": 3},
    "siblings of text": in_listing() | {"siblings": ["config.json"]},
    "siblings of null": in_listing() | {"siblings": [None]},
    "commit a path": in_listing() | {"sha": "../../x"},
    "commit a number": in_listing() | {"sha": 12},
    "name a number": in_listing(rfilename=7),
    "name null": in_listing(rfilename=None),
    "size a text": in_listing(size="12 MB"),
    "size negative": in_listing(size=-1),
    "size a fraction": in_listing(size=1.5),
    "size true": in_listing(size=True),
    "size huge": in_listing(size=10**400),
    "no sha256": in_listing(lfs={"size": 1, "pointerSize": 1}),
    "sha256 null": in_listing(lfs={"size": 1, "pointerSize": 1, "sha256": None}),
    "sha256 a path": in_listing(lfs={"size": 1, "pointerSize": 1, "sha256": "../" * 20 + "x"}),
    "sha256 escapes": in_listing(lfs={"size": 1, "pointerSize": 1, "sha256": SHA256[:-1] + "\n"}),
    "lfs a text": in_listing(lfs="yes"),
    "blob a path": in_listing(lfs=None, blobId="../../../x"),
}
LIES = {name: json.dumps(content).encode() for name, content in LISTINGS.items()}
LIES |= {"empty": b"", "web page": b"<html>Sign in</html>", "not UTF-8": b'{"id": "\xff"}', "deep": b"[" * 100_000}


@pytest.fixture
def fetch(hub, tmp_path, monkeypatch):
    """`fetch(repo)`: download it without a command line; return the error, which is one line, or None."""
    ask(hub.url, tmp_path, monkeypatch)

    def call(repo: str = REPO) -> str | None:
        error = None
        try:
            download_script.download(repo, tmp_path / "checkpoints", token="hf_secret")
        except OSError as raised:
            error = str(raised)
        assert error is None or error.isprintable()
        return error

    return call


@pytest.mark.parametrize("lie", LIES)
def test_a_listing_that_lies_is_one_line(hub, tmp_path, fetch, lie):
    hub.listings[REPO] = LIES[lie]
    assert re.search("is it a Hugging Face hub|JSONDecodeError.*check the network and HF_ENDPOINT", fetch())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 100_000, 12 * MIB + 1, 10**18])
def test_a_wrong_size_never_gives_a_file_its_name(hub, tmp_path, fetch, size):
    hub.listings[REPO] = json.dumps(in_listing(size=size)).encode()
    assert fetch()
    assert not (tmp_path / "checkpoints" / REPO / SHARDS[0]).exists()
    hub.listings.clear()
    assert fetch() is None
    assert_complete(tmp_path)


@pytest.mark.parametrize("name", ["../x.bin", "x\n.bin", "\x1b[2Jx.bin", "/x.bin"])
def test_names_that_lie(hub, tmp_path, fetch, name):
    """They are ignored where they are not asked for, and refused if they are."""
    hub.repos[REPO][name] = b"evil"
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.repos["org/evil"] = {"config.json": WANTED["config.json"], SHARDS[0]: b"", name: b"evil"}
    hub.repos["org/evil"]["model.safetensors.index.json"] = index
    hub.repos["org/none"] = {name: b"evil"}
    assert fetch() is None
    assert_complete(tmp_path)
    assert "the weights' index names" in fetch("org/evil")
    assert "no weights" in fetch("org/none")
    assert not list(tmp_path.rglob("*x*.bin"))


PLACES = ["http://127.0.0.1:9/x", "file:///etc/passwd", "http://[", "http://127.0.0.1:99999/", "//", "?", "\x00", ""]


@pytest.mark.parametrize(("name", "place"), [*(("", place) for place in PLACES), (SHARDS[1], "file:///etc/passwd")])
def test_a_redirect_to_elsewhere_is_one_line(hub, tmp_path, fetch, name, place):
    hub.faults[name] = [("headers", {"Location": place})] * 50
    assert fetch()
    hub.faults.clear()
    assert fetch() is None
    assert_complete(tmp_path)


WAITS = [(name, (kind, 9)) for name in ("", "config.json") for kind in ("stall", "trickle")]
WAITS += [("", ("headers", {"Retry-After": 100001})), (SHARDS[0], ("headers", {"Retry-After": 100001}))]


@pytest.mark.parametrize(("name", "fault"), [*WAITS, (SHARDS[0], ("stall", 11 * MIB))])
def test_waits_are_bounded_and_the_next_run_resumes(hub, tmp_path, fetch, name, fault):
    hub.faults[name] = [fault] * 9
    code, _, err = run_impatient(tmp_path, hub.url)
    assert code == 2, err
    assert "Traceback" not in err
    refused = fault[0] == "headers" and not name
    reason = "answered 429" if refused else "sent nothing, or next to nothing, for 1 seconds"
    assert err.splitlines()[-1].startswith(f"error: {hub.url} {reason}"), err
    assert err.endswith("run the same command again to resume\n")
    hub.resume.set()
    hub.faults.clear()
    hub.requests.clear()
    assert fetch() is None
    assert_complete(tmp_path)
    assert ("range" in hub.headers("/resolve/")[0]) == (fault == ("stall", 11 * MIB))


def test_of_two_downloads_at_once_the_second_waits(hub, tmp_path):
    hub.faults[SHARDS[0]] = [("pause", 11 * MIB)]
    first = start(tmp_path, hub.url, REPO)
    partial = wait_for_partial(tmp_path, first)
    second = start(tmp_path, hub.url, REPO)
    waiting = second.stderr.readline()
    assert waiting == f"another process is downloading {partial.parent / SHARDS[0]}; waiting for it\n"
    hub.resume.set()
    for process in (first, second):
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
    assert_complete(tmp_path)


def test_a_download_goes_on_where_one_that_died_stopped(hub, tmp_path):
    hub.faults[SHARDS[0]] = [("stall", 11 * MIB)]
    first = start(tmp_path, hub.url, REPO)
    partial = wait_for_partial(tmp_path, first)
    second = start(tmp_path, hub.url, REPO)
    assert "waiting" in second.stderr.readline()
    hub.requests.clear()
    first.kill()
    first.communicate()
    assert second.wait(timeout=30) == 0, second.stderr.read()
    assert_complete(tmp_path)
    assert "range" in hub.headers(f"cdn/{REPO}")[0]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "config.json",
            '{"architectures": ["Gemma4ForCausalLM"]}',
            "architecture 'Gemma4ForCausalLM' is not supported",
        ),
        ("config.json", "[]", "config.json: it is ..; expected an object"),
        ("config.json", "{", "config.json: not JSON"),
        ("params.json", '{"moe": {}}', r"params.json: missing .*, unsupported \['moe'\]"),
    ],
)
def test_the_configuration_is_checked(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        check_config(tmp_path / name)
