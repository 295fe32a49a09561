"""Prompts from a file."""

import json
from pathlib import Path

from tokengrow.errors import UserError

EXTENSIONS = (".txt", ".jsonl")

DEVICES = (Path("/dev"), Path("/dev/fd"))
"""Directories of /dev/stdin and of the files that a shell creates for <(command)."""


def read_prompts(name: str) -> list[str]:
    """Return the prompts of a file, in order, without blank lines.

    Args:
        name: a .txt file with a prompt per line; a .jsonl file with a JSON object per line that has
            the key "prompt"; or /dev/stdin, read like a .txt file.

    Raises:
        UserError: the file does not exist, has another type or no prompt, or a line is invalid.
    """
    path = Path(name)
    piped = path.parent in DEVICES and path.exists()
    if not piped and not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"prompts: {name} {problem}. Give a .txt or .jsonl file.")
    if not piped and path.suffix not in EXTENSIONS:
        raise UserError(
            f"prompts must end in .txt (a prompt per line) or .jsonl, got {name}. Rename the file."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts: {name}, byte {error.start}: invalid UTF-8. Save the file as UTF-8."
        ) from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise UserError(f"prompts: {name} has no prompt. Write at least one line.")
    if path.suffix != ".jsonl":
        return [line for _, line in filled]
    return [_parse_prompt(line, f"prompts: {name}, line {number}") for number, line in filled]


def _parse_prompt(line: str, where: str) -> str:
    """Return the prompt of one line of a .jsonl file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: invalid JSON ({error.msg}). Write one object per line."
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where}: expected an object with a text, {{"prompt": "..."}}.')
    return record["prompt"]
