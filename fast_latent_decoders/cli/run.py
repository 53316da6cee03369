"""What the commands share: a run over inputs, of which some may fail while the others are done."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text


def wrong_usage(sentence: str) -> NoReturn:
    """Say what is wrong with the call and end with exit code 2."""
    typer.echo(f"fld: {sentence}", err=True)
    raise typer.Exit(2)


class Run:
    """Counts what was done, what was there already and what failed, and speaks while it goes on.

    A progress bar on a terminal; elsewhere a plain line for each output, unless `quiet` (with --json). Failures and notes
    go to stderr as they happen.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._title = title
        self._progress = Progress(console=console) if console.is_terminal else None
        self._task: Any = None
        self._quiet = quiet
        self._noted: set[str] = set()
        self.done: list[Path] = []
        self.skipped: list[Path] = []
        self.failed: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def over(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        """The `total` items, with the bar moving on after each."""
        if self._progress:
            self._task = self._progress.add_task(self._title, total=total)
        for item in items:
            yield item
            if self._progress:
                self._progress.advance(self._task)

    def finish(self, source: Path | str, output: Path) -> None:
        self.done.append(output)
        if not self._progress and not self._quiet:
            typer.echo(f"{source} -> {output}")

    def skip(self, output: Path) -> None:
        self.skipped.append(output)

    def fail(self, source: Path | str, sentence: str) -> None:
        """Record and say why an input failed; the sentence names it."""
        self.failed.setdefault(str(source), sentence)
        self._say(sentence if str(source) in sentence else f"{source}: {sentence}")

    def note(self, sentence: str) -> None:
        """Something to know, said once."""
        if sentence not in self._noted:
            self._noted.add(sentence)
            self._say(f"note: {sentence}")

    @contextmanager
    def noting_warnings(self) -> Iterator[None]:
        """Warnings of the library as notes, without the source lines that Python prints."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                self.note(str(warning.message))

    def _say(self, line: str) -> None:
        if self._progress:
            self._progress.console.print(Text(line), soft_wrap=True)
        else:
            typer.echo(line, err=True)

    def summary(self, what: str, where: Path) -> str:
        """Where to look: "12 pictures in out/" (3 more already there ...)."""
        done, skipped, force = len(self.done), len(self.skipped), "--force replaces"
        if skipped and not done:
            said = f"{count(skipped, what)} already in {where}/ ({force} {'it' if skipped == 1 else 'them'})"
        else:
            said = f"{count(done, what)} in {where}/" + (f" ({skipped} more already there; {force} them)" if skipped else "")
        return said + (f", {count(len(self.failed), 'input')} failed" if self.failed else "")

    def failures(self) -> list[dict[str, str]]:
        """The failures for --json."""
        return [{"input": source, "error": sentence} for source, sentence in self.failed.items()]

    def end(self) -> NoReturn:
        """Leave with exit code 0, or 1 if an input failed."""
        raise typer.Exit(1 if self.failed else 0)


def collect(run: Run, paths: Iterable[Path], suffixes: Sequence[str], what: str) -> list[Path]:
    """The files that `paths` name: themselves, and the files with one of `suffixes` in folders, sorted; each once.

    A path that does not exist or a folder without such files is a failure of the run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            if path.is_dir():
                files = [file for file in sorted(path.iterdir()) if is_input(file, suffixes)]
                if not files:
                    run.fail(path, f"{path} holds no {what} file: expected {', '.join(suffixes)}")
            elif path.exists():
                files = [path]
            else:
                files = []
                run.fail(path, f"{path} does not exist")
        except OSError as error:
            files = []
            run.fail(path, f"{path} cannot be read: {error.strerror}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def is_input(file: Path, suffixes: Sequence[str]) -> bool:
    return file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()


def writable_folder(run: Run, folder: Path) -> bool:
    """Make `folder` and try to write in it, before any work is spent; a failure is the run's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".fld-trial.part"
        trial.write_bytes(b"0" * 4096)
        trial.unlink()
    except OSError as error:
        run.fail(folder, f"cannot write to the folder {folder}: {error.strerror}; choose another with --out")
        return False
    return True


def count(number: int, what: str) -> str:
    """1 picture, 2 pictures."""
    return f"{number} {what}{'s' * (number != 1)}"


class Claims:
    """Outputs taken so far: two inputs of the same name may not write to the same file."""

    def __init__(self) -> None:
        self._by: dict[Path, Path] = {}

    def conflict(self, output: Path, source: Path) -> str | None:
        """A sentence if another input has taken `output`; else takes it for `source`."""
        other = self._by.setdefault(output, source)
        if other == source:
            return None
        return f"{source} and {other} would both be written to {output}; rename one, or give them separate --out folders"


def table_console() -> Console:
    """A console for tables: as wide as the terminal, and wide enough for whole lines where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=160)
