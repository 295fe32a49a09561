"""Checker of the project's prose: banned openings and words, in code, YAML and Markdown.

Run on files or directories: `python tests/package/prose.py tokengrow/growth docs/growing.md`.
Without arguments it checks the whole repository. `tests/package/test_prose.py` runs it.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

BANNED_OPENINGS = (
    *("What", "Where", "Who", "Whom", "Whose", "How", "When", "Which", "Why"),
    *("Of", "That", "By", "Likewise", "As", "Whatever", "Whoever"),
)
"""First words that a docstring, a description or a heading must not have."""

BANNED_PHRASES = {
    # People and senses: code is not a person.
    r"nobody|somebody|whoever|anybody": "name the actor: process, thread, user, caller",
    r"\bwho\b": "use 'that', or name the actor",
    r"\bknows? (?:nothing|no|what|how|of|that|its|the|where|which)\b": "use 'records'",
    r"\b(?:tells|told|telling)\b": "use 'logs', 'reports', 'returns'",
    r"\b(?:says|said|saying)\b": "use 'states', 'reports', 'raises', 'prints'",
    r"\basks? (?:for|of|whether|every|each|the|a)\b|\b(?:asked|asks)\b": "use 'request', 'read'",
    r"\blooks? (?:at|into|inside)\b": "use 'read', 'inspect'",
    r"\b(?:stands?|stood) (?:in|at|for|on|beside|there|behind)\b": "use 'is', 'denotes'",
    r"\bwakes?\b|\bwoken\b|\bwaking\b|\basleep\b": "use 'become active'",
    r"\bborn\b|\bat birth\b": "use 'initialised'",
    # Old or poetic words.
    r"\banew\b": "use 'again' or 'from the start'",
    r"\bgoes on\b|\bgo on\b|\bgoing on\b|\bwent on\b": "use 'resume' or 'continue'",
    r"\bbeside\b": "use 'next to', 'besides' or 'compared with'",
    r"\bbehind\b": "use 'after'",
    r"\bin front of\b": "use 'before'",
    r"\blies?\b(?! (?:in|between|outside) [\[(\d])|\blying\b": "use 'is'",
    r"\b(?:rank \d|alone)\b(?<=rank \d) alone": "use 'only rank 0'",
    r"\balone\b": "use 'only' before its word",
    r"\bwhole\b(?! number| word| numbers| words)": "use 'complete', 'full' or 'entire'",
    r"(?<!there )\b(?:is|are) (?:no|(?-i:none))\b(?! longer| more| less)": "use 'is not'",
    r"\bway out\b": "use 'remedy'",
    r"\bheld against\b|\bhold against\b|\bto hold \w+ against\b": "use 'compare with'",
    r"\bat hand\b": "use 'current'",
    r"\bmeanwhile\b": "use 'at the same time'",
    r"\bneed be\b": "use 'if necessary'",
    # Metaphors of houses, rooms and kin.
    r"\bthe house\b|\brooms?\b|\bdoors?\b|\btwins?\b|\btwigs?\b": "name the thing itself",
}
"""Regular expression, matched without case, to what to write in its place."""

PENDING = (
    "tests/cli/",
    "tests/generation/",
    "tests/bench/",
)
"""Directories that are not rewritten yet; tests/package/test_prose.py skips them."""

EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "tests/package/prose.py": (".*",),  # the list itself
    "docs/gallery/study-grown-vs-scratch.html": (".*",),  # a page of a recorded run
}
"""File, from the root, to the phrases (regular expressions) that it may contain."""

SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`])")
MAX_TEST_NAME = 60

NOUN_OPENINGS = (
    *("A", "An", "The", "Each", "Every", "One", "All", "Its", "Two", "No", "Not", "This", "Such"),
    *("In", "For", "From", "To", "With", "On", "At", "If", "None"),
)
"""First words that the docstring of a function must not have: it opens with a verb."""


@dataclass(frozen=True)
class Violation:
    """One breach of the rules."""

    path: str
    """File, from the root."""
    line: int
    """Line, from 1."""
    text: str
    """The words found."""
    advice: str
    """What to write in their place."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text!r}: {self.advice}"


def _strip_code(text: str) -> str:
    """Replace code spans, links' targets and quoted strings by placeholders."""
    text = re.sub(r"``.*?``|`[^`\n]*`", "`x`", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def _violations(path: str, line: int, text: str, opening: bool) -> Iterator[Violation]:
    """Yield the breaches in one piece of prose that starts at `line`.

    Args:
        path: file, from the root.
        line: line of the first character.
        text: the prose.
        opening: whether its first word is checked.
    """
    prose = _strip_code(text)
    first = prose.strip().split(maxsplit=1)
    if opening and first and first[0].rstrip(",:;") in BANNED_OPENINGS:
        yield Violation(path, line, " ".join(prose.split()[:4]), "open with a verb or a noun")
    for pattern, advice in BANNED_PHRASES.items():
        for match in re.finditer(pattern, prose, re.IGNORECASE):
            at = line + prose.count("\n", 0, match.start())
            yield Violation(path, at, match[0], advice)


def _strings_of_messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of string literals and f-strings that read as prose."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = []
            for value in node.values:
                inner.add(id(value))
                parts.append(value.value if isinstance(value, ast.Constant) else "`x`")
            yield node.lineno, "".join(str(part) for part in parts)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings | inner
        ):
            yield node.lineno, node.value


def _is_noun(node: ast.FunctionDef) -> bool:
    """Return whether a function is a property or a fixture, which a noun may describe."""
    return any(
        "property" in ast.unparse(d) or "fixture" in ast.unparse(d) for d in node.decorator_list
    )


def check_python(path: Path, source: str, messages: bool = True) -> Iterator[Violation]:
    """Yield the breaches in docstrings, descriptions of fields, comments and messages.

    Args:
        path: file, relative to the root.
        source: its text.
        messages: whether string literals of at least three words are checked.
    """
    name, tree = path.as_posix(), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not _is_noun(node):
            first = (ast.get_docstring(node) or "").split(maxsplit=1)
            if first and first[0] in NOUN_OPENINGS:
                yield Violation(name, node.lineno, f"{node.name}: {first[0]}", "open with a verb")
        constant = node.value if isinstance(node, ast.Expr) else None
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            yield from _violations(name, node.lineno, constant.value, opening=True)
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if is_test and len(node.name) > MAX_TEST_NAME:
            advice = f"test names have at most {MAX_TEST_NAME} characters"
            yield Violation(name, node.lineno, node.name, advice)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from _violations(name, token.start[0], token.string, opening=False)
    if messages:
        for line, text in _strings_of_messages(tree):
            if len(text.split()) >= 3:
                yield from _violations(name, line, text, opening=False)


def check_yaml(path: Path, source: str) -> Iterator[Violation]:
    """Yield the breaches in the comments, and in the help texts, of a YAML file."""
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s)#\s?(.*)$", line)
        if comment:
            yield from _violations(path.as_posix(), number, comment[1], opening=False)


def check_markdown(path: Path, source: str) -> Iterator[Violation]:
    """Yield the breaches in a page, outside blocks of code."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not fenced:
            text = re.sub(r"^#+\s*", "", line)
            opening = line.startswith("#")
            yield from _violations(path.as_posix(), number, text, opening)


def _allowed(violation: Violation) -> bool:
    patterns = EXCEPTIONS.get(violation.path, ())
    return any(re.fullmatch(pattern, violation.text, re.IGNORECASE) for pattern in patterns)


def check(path: Path) -> list[Violation]:
    """Return the breaches in one file.

    Args:
        path: a tracked file below the root.
    """
    relative = path.resolve().relative_to(ROOT)
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        in_tests = relative.parts[0] == "tests"
        found = check_python(relative, source, messages=not in_tests)
    elif path.suffix == ".md":
        found = check_markdown(relative, source)
    elif path.suffix in (".yaml", ".toml"):
        found = check_yaml(relative, source)
    else:
        return []
    return [violation for violation in found if not _allowed(violation)]


def tracked_files(places: Iterable[str] = (".",)) -> list[Path]:
    """Return the files under `places` that git tracks, or all files where there is no git."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *places]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for place in places for path in (ROOT / place).rglob("*") if path.is_file()]
    return [path for path in paths if path.suffix in (".py", ".md", ".yaml", ".toml")]


if __name__ == "__main__":
    paths = [path for path in tracked_files(sys.argv[1:] or ["."]) if path.exists()]
    total = [violation for path in paths for violation in check(path)]
    print("\n".join(map(str, total)))
    print(f"{len(total)} violations")
    sys.exit(bool(total))
