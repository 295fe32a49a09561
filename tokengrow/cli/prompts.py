"""Prompts from a file."""

import json
from pathlib import Path

from tokengrow.errors import UserError

EXTENSIONS = (".txt", ".jsonl")

DEVICES = (Path("/dev"), Path("/dev/fd"))
"""Where /dev/stdin is, and what a shell makes of <(command)."""


def read_prompts(name: str) -> list[str]:
    """The prompts in a file, in its order; a blank line is none.

    Args:
        name: a .txt file, where each line is a prompt, or a .jsonl file, where each line is a JSON
            object whose key "prompt" holds one; or /dev/stdin, with lines as in a .txt file.

    Raises:
        UserError: a file that is not there, of another kind, or without a prompt; a line that is no
            such object.
    """
    path = Path(name)
    piped = path.parent in DEVICES and path.exists()
    if not piped and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"prompts: {name} {what}: give a .txt or .jsonl file")
    if not piped and path.suffix not in EXTENSIONS:
        raise UserError(f"prompts: {name} must end in .txt (a prompt a line) or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts: {name}, byte {error.start}: this is no UTF-8: save it as UTF-8"
        ) from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise UserError(f"prompts: {name} has no line with a prompt: give at least one")
    if path.suffix != ".jsonl":
        return [line for _, line in filled]
    return [_prompt_of(line, f"prompts: {name}, line {number}") for number, line in filled]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: this is no JSON ({error.msg}): write an object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where}: write an object with a text, {{"prompt": "..."}}')
    return record["prompt"]
