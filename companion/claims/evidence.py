"""What the claims are judged by: a finished run, and what ``data/results`` stores."""

from dataclasses import dataclass
from pathlib import Path

from companion.experiments import main as job
from dms_core.storage import read_json


@dataclass(frozen=True)
class Evidence:
    """What is missing is None or empty."""

    summary: dict  # of main.summary, the run at hand
    steps: int
    target: float
    cache: dict | None  # of heldout.cache_report
    stored: dict[str, dict]  # files of data/results by their names without .json; "full": curves of three retrofits

    @property
    def main(self) -> dict:
        """The summary that claims about the curves are judged on: the stored one of three retrofits, or this run's."""
        return self.stored.get("full") or self.summary

    @property
    def of_main(self) -> str:
        """Which of the two, in words."""
        return ", stored, mean of three retrofits" if self.stored.get("full") else ", this run, one retrofit"

    @property
    def runtime(self) -> dict:
        """The stored measurement of time."""
        return self.stored.get("runtime", {})

    def pairs(self, a: str, b: str) -> list[dict]:
        """Paired differences of one chain at the largest length, of each task and CR."""
        return [p for p in self.main["paired"] if (p["a"], p["b"]) == (a, b)]

    def rows(self, name: str, key: str) -> list[dict]:
        """A list in a stored file; empty without the file."""
        return self.stored.get(name, {}).get(key, [])


def gather(run: job.Run | None, results: Path, cache: dict | None = None) -> Evidence:
    """Everything that a finished run and ``results`` hold.  The run's own grid goes before the stored one.

    run: None for what is stored alone.
    """
    stored = {file.stem: read_json(file) for file in results.glob("*.json")}
    for file in (results / "full" / "curves.json", results / "full" / "runtime.json"):
        stored |= {{"curves": "full"}.get(file.stem, file.stem): read_json(file)} if file.exists() else {}
    for directory in (results / "tiny", *([run.root] if run else [])):
        stored |= {"grid": read_json(directory / "grid.json")} if (directory / "grid.json").exists() else {}
    summary = job.summary(run) if run else stored["full"]
    top, steps = summary["retrofit"]["cr_target"], summary["retrofit"]["steps"]
    return Evidence(summary, steps, top, cache, stored)
