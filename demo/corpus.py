"""English prose that every Python installation carries, for `train.py` to train on.

    training, heldout = split_corpus(read_documents(Path(sysconfig.get_path("stdlib"))))

Sources are read as text and parsed with `ast`; nothing is imported. The same version of Python gives the same corpus.
"""

import ast
import html
import io
import re
import sysconfig
import textwrap
import tokenize
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "lib-dynload", "ensurepip", "pydoc_data"}
EXTRA_TEXTS = ("email/architecture.rst", "idlelib/README.txt", "idlelib/NEWS.txt", "idlelib/help.html")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": " -- ", "–": "-", "…": "...", "\xa0": " "})
_COMMON = """a an and any are as at be been but by can do does each either for from has have if in into is it its
    may must no not of on only or other should so such than that the their them then there these they this to used
    was we when where which while will with you"""
COMMON_WORDS = frozenset(_COMMON.split())
CODE = r">>>|::=|[{}|\\~^]{2}|\$|_{3,}|-{3,}|\.{4,}|={2,}|@\w|https?:|\S{32}"
NOTICE = r"XXX|TODO|FIXME|Copyright|Licen[sc]e|(?i:warrant|source distribution)"
UNWANTED = re.compile(f"{CODE}|{NOTICE}")
WORD = re.compile(r"[(\"'*`]*[A-Za-z][a-z]*(?:['-][a-z]+)*[\"'*`)]*[.,;:!?)]*")
ITEM = re.compile(r"\s*(?:[-*+o] |\(?[0-9a-z]{1,2}[.)] |[-\w*\"'.]+(?: --? |: )|:param |@\w)")
LABEL = re.compile(r"^(?:(?:[-*+o]|\(?\d+[.)]|\[\d+\]|(?:bpo|gh)-[-\w#, ]+:|Issue #\d+:) +)+")
CREDIT = re.compile(r"(?<=[.!?]) *(?:\(?(?:Original p|P)atch(?:es)? by|Contributed by) [^.]*\.\)?$")
LEAD_IN = re.compile(r"(?:^|(?<=[.!?]) )[^.!?]*(?:\.\w[^.!?]*)*:$")


def split_paragraphs(text: str) -> Iterator[str]:
    """Cut text at blank lines, list items and changes of indentation; give each piece as one line."""
    piece: list[str] = []
    for line in [*text.translate(ASCII).expandtabs().splitlines(), ""]:
        last = piece[-1] if piece else ""
        indented = (len(line) - len(line.lstrip())) - (len(last) - len(last.lstrip()))
        moved = indented < 0 or (indented > 0 and last.endswith((":", ")")))
        if piece and (not line.strip() or ITEM.match(line) or moved):
            yield re.sub(r"\s+", " ", " ".join(piece)).strip()
            piece = []
        if line.strip():
            piece.append(line)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences rather than as code, a table, a signature or a title."""
    words = paragraph.split()
    if len(words) < 4 or not paragraph.isascii() or UNWANTED.search(paragraph):
        return False
    if not re.match(r"[A-Z\"'`(*]", paragraph) or not re.search(r"[.!?:][\"')]*$", paragraph):
        return False
    plain = sum(bool(WORD.fullmatch(word)) for word in words) / len(words)
    common = sum(word.lower().strip(".,;:()") in COMMON_WORDS for word in words) / len(words)
    return plain >= 0.64 and (common >= 0.15 or (common > 0 and len(words) < 9))


def clean(text: str) -> list[str]:
    """The prose paragraphs of a text. A sentence that introduces a dropped example ("For instance:") is dropped too."""
    kept: list[str] = []
    announced = False  # the paragraph before this one was kept and ends in a colon
    for paragraph in split_paragraphs(text):
        paragraph = CREDIT.sub("", LABEL.sub("", paragraph))
        paragraph = re.sub(r"(?<=\w)::$", ":", re.sub(r" ?\[\d+\]", "", paragraph))
        if re.fullmatch(r"[A-Z][a-z]+(?: [-\w',]+){3,}", paragraph):
            paragraph += "."  # a docstring's summary line
        prose = is_prose(paragraph)
        if prose:
            kept.append(paragraph)
        elif announced:
            kept[-1] = LEAD_IN.sub("", kept[-1])
        announced = prose and paragraph.endswith(":")
    return [paragraph for paragraph in kept if len(paragraph.split()) >= 4]


def source_texts(source: str) -> Iterator[tuple[str, list[str]]]:
    """The docstrings and the longer comments of one Python source, each as (kind, cleaned paragraphs)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    yield "docstrings", [p for node in nodes for p in clean(ast.get_docstring(node) or "")]
    lines: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            lines[token.start[0]] = token.string.lstrip("#")
    blocks = "\n".join(lines.get(n, "\0") for n in range(1, max(lines, default=0) + 1)).split("\0")
    paragraphs = [p for block in blocks for p in clean(textwrap.dedent(block.strip("\n")))]
    yield "comments", [p for p in paragraphs if len(p.split()) >= 12]


def read_documents(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every document of the standard library in `root`, as (name, paragraphs), in a fixed order."""
    module = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    topics = next(node.value for node in module.body if isinstance(node, ast.Assign))
    for name, text in sorted(ast.literal_eval(topics).items()):
        yield f"topics/{name}", clean(text)
    for name in EXTRA_TEXTS:
        if (root / name).exists():
            text = (root / name).read_text(encoding="utf-8")
            text = re.sub(r"<(script|style|pre).*?</\1>|<[^>]*>", "", text, flags=re.S)
            yield name, clean(html.unescape(text))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED_FOLDERS & set(name.parts):
            with tokenize.open(path) as file:
                source = file.read()
            for kind, paragraphs in source_texts(source):
                yield f"{name.as_posix()}:{kind}", paragraphs


def shingles(paragraph: str, n: int = 6) -> set[str]:
    """All runs of n words, in lower case and without punctuation."""
    words = re.findall(r"\w+", paragraph.lower())
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def split_corpus(
    documents: Iterable[tuple[str, list[str]]], every: int = 20
) -> tuple[list[list[str]], list[list[str]]]:
    """(training, held-out) documents, about one in `every` held out, chosen by name.

    Drops repeated paragraphs, and held-out ones that share over a sixth of their six-word runs with the training text.
    """
    seen: set[str] = set()
    training: list[list[str]] = []
    heldout: list[list[str]] = []
    for name, paragraphs in documents:
        fresh = [p for p in paragraphs if not (p.lower() in seen or seen.add(p.lower()))]
        is_held = zlib.crc32(name.split(":")[0].encode()) % every == 0
        (heldout if is_held else training).append(fresh)
    known = {run for document in training for p in document for run in shingles(p)}
    heldout = [[p for p in d if 6 * len(shingles(p) & known) <= len(shingles(p))] for d in heldout]
    return [d for d in training if d], [d for d in heldout if d]


def training_text() -> str:
    """The text that the demo models are trained on, from this installation of Python."""
    training, _ = split_corpus(read_documents(Path(sysconfig.get_path("stdlib"))))
    return "\n".join(paragraph for document in training for paragraph in document)
