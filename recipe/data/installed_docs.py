"""The default corpus `installed-docs`: English prose from the documentation of the installed Python packages.

A machine that can run the recipe already holds megabytes of edited English: the language reference behind `help()`, the
docstrings of the standard library and of the installed distributions, and their long descriptions. They are collected
without importing a package or opening a connection, and stay where they were found, under the licences in SOURCES.json.
"""

import ast
import gc
import hashlib
import heapq
import inspect
import json
import logging
import os
import platform
import re
import shutil
import sysconfig
import uuid
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

BUILDER_VERSION = "1"  # part of the cache key: raise it with every change that alters the text
MIN_TOTAL_BYTES = 200_000
MIN_DOCUMENT_CHARS, MAX_DOCUMENT_CHARS, MIN_PARAGRAPH_WORDS = 200, 20_000, 10
MAX_SOURCE_BYTES = 1_000_000  # larger modules are generated tables: slow to parse and without prose
ROW_GROUP_SIZE, VALIDATION_MODULUS = 32, 20  # documents

STDLIB_NAME, TOPICS_PATH, PROJECT_DISTRIBUTION = "python", "pydoc_data/topics.py", "gpt2-recipe"
SKIPPED_PATH = re.compile(  # the project itself, tests, tools and vendored copies, relative to the root
    r"^(?:recipe|\.\.)/|(?:^|/)(?:_?tests?|testing|site-packages|dist-packages|idlelib|lib2to3|ensurepip|turtledemo"
    r"|_?vendor|_?vendored|vendored_packages|extern|externals|third_party)/|(?:^|/)(?:test_[^/]*|conftest\.py)$|_tests?\.py$"
)

# Sections that hold lists, code or references: their entries are fragments, not sentences of a paragraph.
LIST_SECTION = re.compile(
    r"(?:(?:other |keyword |class |optional |expected |model )?(?:arg|argument|attribute|parameter|param|keyword|kwarg"
    r"|return|yield|raise|exception|input|output|example|method|shape|field|option|variable|author|contributor"
    r"|reference|link)s?|except|warns|receives|usage|see also|citation|citing|licen[sc]e|installation|installing"
    r"|install|change ?log|history|(?:table of )?contents|routine listings|property|properties)"
)
DIRECTIVE = re.compile(r"\.\.(?:\s+(note|warning|seealso|tip|important|caution|attention|hint|topic|rubric)::|\s|$)")
FIELD = re.compile(r":[a-z]+(?: [^:]+)?:(?:\s|$)|@\w+")
LIST_ITEM = re.compile(r"(?:[-*+•]|\(?(?:\d{1,2}|[a-z])[.)])\s+(?=\S)")
UNDERLINE = re.compile(r"([=\-~^*#\"'+.])\1{2,}$")
DOCTEST = re.compile(r">>>|\.\.\. |In \[\d+\]|[$%] ")
TABLE = re.compile(r"[|+][-=|+ ]|\|.*\|$")
FENCED_CODE = re.compile(r"^[ \t]*(```|~~~).*?(?:\1|\Z)", re.DOTALL | re.MULTILINE)

INLINE_MARKUP = [
    # HTML and Markdown images. Not every tag: "<token>" is often meant.
    (re.compile(r"<!--.*?-->|</?(?:a|b|br|code|div|em|h\d|img|li|p|span|strong|ul)\b[^<>]*>|!\[[^]]*\]\([^)]*\)"), ""),
    (re.compile(r"\s*(?:\[#?[\w-]*\]_,?\s*(?:and\s*)?)+(?=[\s.,;:)]|$)"), " "),  # reST citations
    (re.compile(r"\[([^\[\]]+)\](?:\([^()\s]*\)|\[[^\[\]]*\])"), r"\1"),  # Markdown links
    (re.compile(r"(?::[\w+-]+)+:`([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),  # reST roles
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # reST links
    (re.compile(r"\[?`+([^`]*)`+\]?_*"), r"\1"),  # literals
    (re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])"), r"\2"),  # emphasis
    (re.compile(r"(?<![\w/.])(?:~\.?(?=\w)|\.(?=[A-Z][a-z]))|(?<=[a-zA-Z0-9])_(?=[\s,.;:)]|$)"), ""),  # reST references
    (re.compile(r"`"), "'"),  # the opening quotation mark of older texts
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[.,;:!?](?:\s|$))"), ""),
]
LAST_SENTENCE_WITH_COLON = re.compile(r"(?:(?<=[.!?])\s|^)(?:(?![.!?]\s).)*:$")
ASCII_PUNCTUATION = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})

# Legal text, work notes, change logs with names, formulas, unresolved markup, and links in place of a sentence.
UNWANTED = re.compile(
    r"(?i)copyright|licen[sc]ed? under|permission is hereby|all rights reserved|warrant(?:y|ies)|spdx|redistribut"
    r"|\b(?:todo|fixme|xxx)\b|(?<!\w)@\w|\\[a-z]|:[a-z]+:|https?://\S+$"
)
SENTENCES = re.compile(r"[\"'(]?[A-Z].*[.!?][\"')]*")
CODE_WORD = re.compile(r"[_=<>{}\[\]|/@$#\\*]|\w[.(:]\w")
STOP_WORDS = (
    " a about after all also an and any are as at be because been before both but by can could do does each for from "
    "given had has have he how if in instead into is it its may more most must no not of on one only or other our out "
    "over same see should since so some such than that the their them then there these they this those to unless "
    "until up use used using was we were what when where whether which while who will with without would you your "
)


class _Source(NamedTuple):
    name: str
    version: str
    distribution: metadata.Distribution | None  # None: the standard library


def _find_sources(roots: Sequence[Path] | None) -> list[_Source]:
    """The packages to read, sorted by name; a name found twice counts once, as on `sys.path`."""
    found = metadata.distributions() if roots is None else metadata.distributions(path=[str(root) for root in roots])
    sources = {} if roots is not None else {STDLIB_NAME: _Source(STDLIB_NAME, platform.python_version(), None)}
    for distribution in found:
        fields = distribution.metadata or {}
        name, version = fields.get("Name"), fields.get("Version")
        if name and version:  # a broken install has neither
            sources.setdefault(re.sub(r"[-_.]+", "-", name).lower(), _Source(name, version, distribution))
    sources.pop(PROJECT_DISTRIBUTION, None)
    return [source for _, source in sorted(sources.items())]


def _modules(source: _Source) -> list[tuple[str, Path]]:
    """(relative path, absolute path) of the modules, in the order of a hash: any share is a sample of the package."""
    if source.distribution is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    else:
        paths = {path.as_posix(): Path(str(path.locate())) for path in source.distribution.files or []}
    found = [item for item in paths.items() if item[0].endswith(".py") and not SKIPPED_PATH.search(item[0])]
    return sorted(found, key=lambda item: (item[0] != TOPICS_PATH, hashlib.sha256(item[0].encode()).digest()))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and of its classes and functions, in source order."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if is_function or isinstance(node, ast.Module | ast.ClassDef):
        yield ast.get_docstring(node, clean=False) or ""
    if not is_function:
        for field in ("body", "handlers", "orelse", "finalbody"):
            for child in getattr(node, field, ()):
                yield from _docstrings(child)


def _raw_texts(source: _Source) -> Iterator[tuple[str, list[str]]]:
    """(path, uncleaned texts) per document: the long description first, then the modules."""
    if source.distribution is not None:
        yield "README", [str(source.distribution.metadata.get_payload())]
    for name, path in _modules(source):
        try:
            code = path.read_bytes() if path.stat().st_size <= MAX_SOURCE_BYTES else b""
            if name == TOPICS_PATH:  # a dictionary of texts, each a page of the language reference
                for node in ast.walk(ast.parse(code)):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield name, [node.value]
            elif b'"""' in code or b"'''" in code:  # parsing is most of the cost of a build
                yield name, list(_docstrings(ast.parse(code)))
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            logger.debug("skipped %s: %s", path, error)


def _split_paragraphs(text: str) -> list[str]:
    """Paragraphs of a docstring, reST or Markdown text on one line each, without code, tables and list sections."""
    lines = [*inspect.cleandoc(FENCED_CODE.sub("", text)).splitlines(), ""]
    paragraphs: list[str] = []
    current: list[str] = []
    text_indent = 0
    dropped_indent: int | None = None  # deeper lines belong to a dropped block
    in_doctest = in_list_section = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        content, indent = line.strip(), len(line) - len(line.lstrip())
        heading = content.strip("#*: ").lower()
        directive, item = DIRECTIVE.match(content), LIST_ITEM.match(content)
        if content and dropped_indent is not None and indent <= dropped_indent:
            dropped_indent = None
        is_text = False
        if not content or in_doctest or DOCTEST.match(content):
            in_doctest = bool(content)
        elif dropped_indent is not None or UNDERLINE.match(content):
            pass
        elif UNDERLINE.match(following.strip()) or content.startswith("#"):
            in_list_section = bool(LIST_SECTION.fullmatch(heading))
        elif directive or FIELD.match(content) or (content.endswith(":") and LIST_SECTION.fullmatch(heading)):
            dropped_indent = None if directive and directive[1] else indent
        else:
            is_text = not in_list_section and not TABLE.match(content)
        # A changed indentation starts or ends a definition or a quoted block.
        if current and (not is_text or item or abs(indent - text_indent) > 1):
            paragraphs.append(" ".join(current))
            current = []
        if is_text:
            text_indent = text_indent if current else indent + (item.end() if item else 0)
            current.append(content[item.end() :] if item else content)
            dropped_indent = indent if content.endswith("::") else None
    return paragraphs


def _tidy(paragraph: str) -> str:
    """A paragraph without inline markup and without a last sentence that announces what was dropped after it."""
    paragraph = paragraph.translate(ASCII_PUNCTUATION)
    for pattern, replacement in INLINE_MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return LAST_SENTENCE_WITH_COLON.sub("", paragraph.strip())


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English sentences rather than code, names, formulas or legal text."""
    words = paragraph.split()
    if len(words) < MIN_PARAGRAPH_WORDS or not SENTENCES.fullmatch(paragraph):
        return False
    plain = [word.strip(".,;:!?()\"'") for word in words]
    return (
        sum(f" {word.lower()} " in STOP_WORDS for word in plain) / len(words) >= 0.25
        and sum(bool(CODE_WORD.search(word)) for word in plain) / len(words) <= 0.12
        and sum(character.isalpha() or character == " " for character in paragraph) / len(paragraph) >= 0.90
        and sum(character.isascii() for character in paragraph) / len(paragraph) >= 0.99
        and 3.0 <= sum(map(len, plain)) / len(words) <= 7.5
        and max(map(len, words)) <= 40
        and paragraph.isprintable()
        and not UNWANTED.search(paragraph)
    )


def _documents(source: _Source, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """(id, text) of a source's documents, without paragraphs whose hash is in `seen`, to which it adds."""
    counts: dict[str, int] = {}
    for path, texts in _raw_texts(source):
        kept: list[str] = []
        for paragraph in (_tidy(raw) for text in texts for raw in _split_paragraphs(text)):
            if len(paragraph) <= MAX_DOCUMENT_CHARS and _is_prose(paragraph):
                digest = hashlib.sha256(re.sub(r"[^a-z]+", "", paragraph.lower()).encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    kept.append(paragraph)
        while kept:
            text, used = kept[0], 1
            while used < len(kept) and len(text) + 2 + len(kept[used]) <= MAX_DOCUMENT_CHARS:
                text, used = f"{text}\n\n{kept[used]}", used + 1
            kept = kept[used:]
            if len(text) >= MIN_DOCUMENT_CHARS:
                counts[path] = counts.get(path, -1) + 1
                yield f"{path}#{counts[path]}", text


def _select(sources: list[_Source], max_bytes: int) -> list[tuple[_Source, str, str]]:
    """Rows of (source, id, text) of at most `max_bytes` bytes; ValueError if the sources end early, below the minimum.

    The turn goes to the source with the fewest bytes so far, then to the first by name: a round-robin in which long
    documents do not buy a larger share.
    """
    seen: set[bytes] = set()
    streams = [_documents(source, seen) for source in sources]
    turns = [(0, index) for index in range(len(sources))]  # a heap of (bytes taken, position)
    rows: list[tuple[_Source, str, str]] = []
    total = 0
    while turns:
        taken, index = heapq.heappop(turns)
        if (document := next(streams[index], None)) is None:
            continue
        size = len(document[1].encode())
        if total + size > max_bytes:
            return rows
        total += size
        rows.append((sources[index], *document))
        heapq.heappush(turns, (taken + size, index))
    if total < MIN_TOTAL_BYTES:
        raise ValueError(
            f"found only {total:,} bytes of English prose in the documentation of {len(sources)} installed packages; "
            f"at least {MIN_TOTAL_BYTES:,} are needed: install more packages or train on another corpus"
        )
    return rows


def _licence(source: _Source) -> str | None:
    """The licence's short name in the metadata; None for a whole licence text or nothing at all."""
    if source.distribution is None:
        return "PSF-2.0"
    fields = source.distribution.metadata
    classifiers = [line for line in fields.get_all("Classifier", []) if line.startswith("License ::")]
    for name in (fields.get("License-Expression"), fields.get("License"), *classifiers):
        if name and "\n" not in name.strip() and len(name) <= 200:
            return name.split(" :: ")[-1].strip()
    return None


def _is_validation(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % VALIDATION_MODULUS == 0


def _write(folder: Path, sources: list[_Source], rows: list[tuple[_Source, str, str]]) -> None:
    """Writes train-00000.parquet, validation-00000.parquet and SOURCES.json into an existing folder."""
    import pyarrow as pa  # here, not above: importing this module stays cheap
    import pyarrow.parquet as pq

    def size(texts: list[str]) -> dict[str, int]:
        return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}

    totals = {}
    for split in ("train", "validation"):
        part = [row for row in rows if _is_validation(row[2]) == (split == "validation")]
        records = [{"text": t, "id": i, "url": f"pkg:{source.name}=={source.version}"} for source, i, t in part]
        table = pa.Table.from_pylist(records)
        pq.write_table(table, folder / f"{split}-00000.parquet", compression="zstd", row_group_size=ROW_GROUP_SIZE)
        totals[split] = size([text for _, _, text in part])
    packages = [
        {"name": source.name, "version": source.version, "license": _licence(source)}
        | size([text for owner, _, text in rows if owner is source])
        for source in sources
    ]
    record = {"builder_version": BUILDER_VERSION, "python_version": platform.python_version()}
    record |= {"packages": packages, "totals": totals}
    (folder / "SOURCES.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def build_installed_docs(cache_dir: Path, max_bytes: int = 5_000_000, roots: Sequence[Path] | None = None) -> Path:
    """Collects the installed packages' documentation into a corpus, or finds the one that is in the cache.

    The same packages in the same versions give the same rows in the same order. Several processes may call it at once:
    each builds in a folder of its own, and the first to finish provides the result for all.

    Args:
        cache_dir: folder for the corpus, created if missing.
        max_bytes: cap on the text of both parts together, in bytes of UTF-8, shared equally by the packages.
        roots: the site-packages folders to read; None: the standard library and all distributions on `sys.path`.

    Returns:
        The folder `cache_dir/"installed-docs-<16 hexadecimal digits>"` with `train-00000.parquet` and
        `validation-00000.parquet` (about 5 % of the documents, chosen by a hash of their text; both have the string
        columns text, id and url) and `SOURCES.json` (packages, versions, licences, documents and bytes).

    Raises:
        ValueError: less prose than 200 kB (and than `max_bytes`), or `max_bytes` is too small for both parts.
        OSError: `cache_dir` cannot be written.
    """
    sources = _find_sources(roots)
    packages = [f"{source.name}=={source.version}" for source in sources]
    inputs = json.dumps([BUILDER_VERSION, max_bytes, platform.python_version(), packages])
    folder = Path(cache_dir) / f"installed-docs-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder

    collects_garbage = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and the search for some takes three quarters of the parsing time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            rows = _select(sources, max_bytes)
    finally:
        if collects_garbage:
            gc.enable()
    if len({_is_validation(text) for _, _, text in rows}) < 2:
        raise ValueError(f"max_bytes={max_bytes:,} is too small for a training and a validation part")

    # A plain mkdir leaves the permissions to the umask, unlike tempfile.mkdtemp: caches are often shared.
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        _write(temporary, sources, rows)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same rows
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("installed-docs: %d documents in %s", len(rows), folder)
    return folder
