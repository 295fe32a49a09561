"""tokengrow report: compare runs on one page."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import new_folder, run_command
from tokengrow.errors import UserError
from tokengrow.files import is_stale_temporary
from tokengrow.parsing import parse_dataclass
from tokengrow.reports.report import JSON_FILE, REPORT_FILES, Report


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Keys of report.yaml."""

    runs: list[str]
    """Directories of runs, of checkpoints, or directories that hold runs."""
    out: str
    """Directory of the report."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs is empty. Give directories of runs (runs=[DIR,DIR]).")


def main(config: DictConfig) -> None:
    """Write the report of `runs` to `out`."""
    arguments = parse_dataclass(ReportArguments, plain_values(config))
    out, console = report_folder(arguments.out), Console(highlight=False)
    with console.status("reading the runs"):
        report = Report.from_paths([Path(run) for run in arguments.runs])
    with console.status("drawing"):
        page = report.write(out)
    show(console, report, page)


def report_folder(out: str) -> Path:
    """Return the directory of `out`, which must be empty or hold only an earlier report.

    Raises:
        UserError: it holds other files.
    """
    folder = Path(out)
    if (folder / JSON_FILE).is_file() and all(
        path.name in REPORT_FILES or is_stale_temporary(path, REPORT_FILES)
        for path in folder.iterdir()
    ):
        return folder
    return new_folder(out)


def show(console: Console, report: Report, page: Path) -> None:
    """Print a line per run, the notes, and the path of the page."""
    console.print(report.run_table())
    tables = report.score_tables()
    for scores in tables:
        console.print(scores)
    if single := len(report.score_comparisons) - len(tables):
        console.print(f"scores      {single} of a single run; see the page")
    for note in report.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"report      {page}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command("report", main)
