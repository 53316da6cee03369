"""`fld bench`: how it measures, what it records and what it prints. No test asserts a time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fast_latent_decoders.cli import app
from fast_latent_decoders.evaluation import bench, end_to_end, machine, memory, plot, timing
from fast_latent_decoders.evaluation.bench import Options
from fast_latent_decoders.evaluation.cases import Case, task_of
from fast_latent_decoders.evaluation.subjects import Subject
from fast_latent_decoders.evaluation.tables import how, markdown, tables

from .pipelines import tiny


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle machine of known rates, so that no second goes into looking."""
    monkeypatch.setattr(machine, "idleness", lambda **_: machine.Idleness(0.1, 1.0, ()))
    monkeypatch.setattr(machine, "roofline", lambda _, dtypes: {"matrix": dict.fromkeys(dtypes, 1e9), "copy": 1e9})


# ---------------------------------------------------------------- timing


class FakeClock(timing.Clock):
    """Time passes only while a task runs; half of the wall time is processor time."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.now = 0.0
        self.pending = 0.0
        self.alone = False

    threads = 1

    def wall(self) -> float:
        return self.now

    def cpu(self) -> float:
        return self.now / 2

    def synchronise(self) -> None:
        self.now, self.pending = self.now + self.pending, 0.0

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        self.alone = True
        yield
        self.alone = False


def run_fake(seconds: dict[str, list[float]], **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Tasks that take these seconds in turn, the last one for ever; returns the timings and who ran (upper case: alone)."""
    clock, ran = FakeClock(), []

    def task(name: str) -> None:
        ran.append(name.upper() if clock.alone else name)
        times = seconds[name]
        clock.now += 0.25  # until the call returns
        clock.pending = (times.pop(0) if len(times) > 1 else times[0]) - 0.25

    return timing.measure({name: lambda name=name: task(name) for name in seconds}, clock=clock, **options), ran  # type: ignore[misc]


def test_tasks_take_turns_after_their_warm_up() -> None:
    found, ran = run_fake({"a": [1.0], "b": [2.0]}, repeats=3, warmup=2, budget=1000)
    assert "".join(ran) == "AB" + "ab" * 2 + "AB" + "ab" * 3
    assert (found["a"].repeats, found["a"].warmup) == (3, 2)


def test_slow_tasks_get_fewer_turns_and_no_warm_up() -> None:
    found, ran = run_fake({"a": [1.0], "b": [9.0], "c": [99.0]}, repeats=4, warmup=1, budget=20)
    assert "".join(ran) == "ABC" + "a" + "A" + "abc" + "ab" + "a" * 2
    assert [found[name].repeats for name in "abc"] == [4, 2, 1]
    assert found["c"].warmup == 0


def test_quartiles_and_the_time_of_return() -> None:
    found, _ = run_fake({"a": [7.0, 7.0, 7.0, 1.0, 2.0, 3.0, 4.0, 50.0]}, repeats=5, warmup=1, budget=1000)
    timed = found["a"]
    assert (timed.q1, timed.median, timed.q3) == (2000, 3000, 4000)
    assert timed.returned == 250  # what a clock without synchronisation shows, whatever the work
    assert timed.cpu == 3500
    assert timing.quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert timing.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)


def test_a_task_that_fails_does_not_keep_the_others() -> None:
    def broken() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB " + "x" * 999)

    found = timing.measure({"bad": broken, "good": lambda: None}, repeats=2)
    assert found["bad"] == "out of memory" and isinstance(found["good"], timing.Timing)
    assert list(found) == ["bad", "good"]
    assert timing.why(RuntimeError("two\nlines")) == "two lines" and timing.why(ValueError()) == "ValueError"


# ---------------------------------------------------------------- machine


def test_busy_machines_are_told() -> None:
    assert machine.judge(0.3, 2, 1.01, threads=2) == ()
    assert machine.judge(1.5, 8, 1.0, threads=4) == ()  # four cores are free
    assert machine.judge(None, 2, 1.0) == ()
    load, wait = machine.judge(8.3, 2, 2.5, threads=2)
    assert load == "load 8.3 on 2 cores" and "2.50 times its processor time" in wait
    assert machine.Idleness(8.3, 1.0, (load,)).as_json() == {"load": 8.3, "wait": 1.0, "reasons": [load], "busy": True}


def test_the_machine_is_described_and_its_roof_measured() -> None:
    assert machine.describe("cpu").keys() >= {"cpu", "cores", "threads", "instructions", "memory", "system", "python"}
    assert machine.versions()["torch"] == torch.__version__.split("+")[0]
    roof = machine.roofline("cpu", ["float32"], seconds=0.001)
    assert roof["matrix"]["float32"] > 0 and roof["copy"] > 0
    assert machine.reference_wait(timing.Clock(), rounds=1) > 0


@pytest.mark.slow
def test_peak_memory_of_a_child(decoder: str) -> None:
    case = Case(decoder, size=64)
    assert memory.peak_of_child(vars(case), threads=1) > 64 * 64 * 3 * 4  # the picture, at least
    with pytest.raises(RuntimeError, match="did you mean"):
        memory.peak_of_child({**vars(case), "decoder": "nobody"}, threads=1)


# ---------------------------------------------------------------- cases


def test_cases_of_one_size_and_batch_take_turns_and_slow_ones_run_once() -> None:
    options = Options(["fast", "slow"], sizes=(256, 512), batches=(1, 2), dtypes=("float32", "bfloat16"), modes=("eager", "tiled"))
    found = list(bench.groups(options, ["slow"]))
    assert [(group[0].size, group[0].batch) for group in found] == [(256, 1), (256, 2), (512, 1), (512, 2)]
    slow = [case for group in found for case in group if case.decoder == "slow"]
    assert [(case.size, case.batch, case.dtype, case.mode) for case in slow] == [(256, 1, "float32", "eager"), (512, 1, "float32", "eager")]
    assert sum(len(group) for group in found) == 2 * 2 * 4 + 2


@pytest.mark.parametrize(("mode", "reason"), [("graph", "need a CUDA device"), ("tiled", "one tile of 128 latents covers")])
def test_modes_that_cannot_be_had(decoder: str, mode: str, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        task_of(Case(decoder, size=64, mode=mode), Subject.load(decoder), "cpu")


def test_tiles_and_clips_are_decoded(decoder: str) -> None:
    subject = Subject.load(decoder)
    whole, tiled = (task_of(Case(decoder, 64, mode=mode, tile=4), subject, "cpu")() for mode in ("eager", "tiled"))
    assert torch.allclose(whole, tiled, atol=1e-5)  # type: ignore[arg-type]
    clips: Any = task_of(Case(decoder, 64, batch=2, frames=3), subject, "cpu")()
    assert clips.shape == (6, 3, 64, 64)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_video_vae_is_timed_in_either_layout(in_place: bool) -> None:
    """Its 3D convolutions know no channels_last."""
    whole = [
        task_of(Case("svd", 64, frames=3, layout=layout), Subject("svd", tiny.temporal_kl(), "", None, True), "cpu", in_place=in_place)()
        for layout in ("contiguous_format", "channels_last")
    ]
    assert torch.allclose(*whole, atol=1e-4)  # type: ignore[arg-type]


def test_work_is_counted(decoder: str) -> None:
    subject = Subject.load(decoder)
    macs, traffic = subject.counted(64, 1, None, 4)
    assert subject.counted(64, 2, None, 4)[0] == 2 * macs
    half = subject.counted(64, 1, None, 2)
    assert half[0] == macs and half[1] < 0.6 * traffic


@pytest.mark.slow
def test_the_vaes_own_decoder_has_the_published_shape() -> None:
    vae = Subject.load("sdxl-vae")
    assert vae.slow and vae.parameters == 49_490_179 + 20  # with post_quant_conv
    assert math.isclose(vae.counted(512, 1, None, 4)[0], 1257e9, rel_tol=0.001)
    tae = Subject.load("tae-192")
    assert tae.parameters == 10_966_659 and not any(not p.any() for p in tae.model.parameters() if p.ndim > 1)


# ---------------------------------------------------------------- record, tables, plot


def options(decoder: str, **given: Any) -> Options:
    return Options([decoder], **{"sizes": (64,), "repeats": 2, **given})


ROW = {
    *vars(Case("")),
    *("reason", "peak_bytes", "peak_reason", "ms", "q1_ms", "q3_ms", "cpu_ms", "returned_ms", "repeats", "warmup"),
    *("mpx_per_s", "mac_per_pixel", "matrix_share", "copy_share"),
}


def test_the_record(decoder: str, idle: None) -> None:
    record = json.loads(json.dumps(bench.run(options(decoder, modes=("eager", "graph"), end_to_end=True, pipeline=100.0))))
    keys = "format date options machine versions idleness roofline decoders rows saving pipeline"
    assert list(record) == keys.split()
    timed, refused = record["rows"]
    assert timed.keys() == ROW and timed["reason"] is None and timed["repeats"] == 2
    assert "CUDA" in refused["reason"] and "ms" not in refused
    assert record["decoders"][0].keys() == {"name", "about", "parameters", "fp16_bytes", "file_bytes", "mac_per_pixel"}
    assert {row["stage"] for row in record["saving"]} >= set(end_to_end.CODECS)
    assert record["pipeline"][0]["share"].keys() == {"4", "8", "30", "50"}
    printed = tables(record, unsynchronised=True)
    assert "[1] CUDA graphs need a CUDA device" in printed and "unsync. ms" in printed and "busy" not in printed
    assert "| PNG, level 1" in printed and "| 50 steps |" in printed


def row(name: str, ms: float, **given: Any) -> dict[str, Any]:
    times = {"ms": ms, "q1_ms": ms, "q3_ms": ms, "cpu_ms": ms, "returned_ms": ms, "repeats": 3, "warmup": 2}
    rates = {"mpx_per_s": 1.0, "mac_per_pixel": 1e5, "matrix_share": 0.5, "copy_share": 0.8}
    return {**vars(Case(name)), "reason": None, "peak_bytes": None, "peak_reason": None, **times, **rates, **given}


def made_up(*rows: dict[str, Any], reasons: tuple[str, ...] = (), **given: Any) -> dict[str, Any]:
    about = {"cpu": "Some CPU", "threads": 2, "cores": 4, "instructions": ["avx2"], "system": "Linux 6", "device": "cpu"}
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "options": {"sizes": [512], "frames": None, "repeats": 3, "budget": 10.0, "memory": True},
        "machine": about,
        "versions": {"torch": "2.14.1"},
        "idleness": {"busy": bool(reasons), "reasons": list(reasons)},
        "roofline": {"matrix": {"float32": 1e11}, "copy": 2e10},
        "decoders": [{"name": "a", "about": "A", "parameters": 10**6, "fp16_bytes": 2 * 10**6, "file_bytes": None, "mac_per_pixel": 1e5}],
        "rows": list(rows),
        "saving": [],
        "pipeline": [],
        **given,
    }


def test_tables_from_a_record() -> None:
    rows = [row("a", 123.4, peak_bytes=5e7), row("b", 1.234, mode="tiled", layout="contiguous_format", peak_reason="no peak here")]
    printed = tables(made_up(*rows, reasons=("load 9.0 on 4 cores",)))
    assert "**The machine was busy: compare rows, do not quote them.**\n- load 9.0 on 4 cores" in printed
    lines = [line.split() for line in printed.splitlines() if line.startswith(("| a ", "| b "))]
    assert " ".join(lines[1]) == "| a | fp32 | 123 | 123-123 | 123 | 1.00 | 80% C | 3 | 50 |"
    assert " ".join(lines[2]).startswith("| b | fp32 NCHW tiled | 1.23 |") and lines[2][-2] == "[1]"
    assert "[1] no peak here" in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_markdown_is_padded() -> None:
    assert markdown(["a", "b"], [["long", "1"]]) == "| a    |   b |\n| ---- | --: |\n| long |   1 |"
    assert markdown(["a"], [["|b|"]]).endswith(r"| \|b\| |")
    assert how({"dtype": "bfloat16", "layout": "channels_last", "mode": "compiled"}) == "bf16 compiled"


def test_the_share_of_a_pipeline() -> None:
    assert end_to_end.share(100, unet_ms=50, steps=4) == pytest.approx(1 / 3)
    assert end_to_end.gain(300, 100, unet_ms=50, steps=4) == pytest.approx(5 / 3)
    vae = row("sdxl-vae", 300.0)
    fast, other = end_to_end.shares([row("fast", 100.0, dtype="bfloat16"), row("fast", 9.0, size=64), vae], 50.0)[:2]
    assert fast["gain"]["4"] == pytest.approx(5 / 3) and other["gain"] is None  # no VAE at that size
    shown = tables(made_up(vae, pipeline=[fast]))
    assert "33.3% 1.67x" in shown and "50.0 ms for each step" in shown


def test_nothing_beats_the_pareto_front() -> None:
    points = {"slow": (9.0, 30.0), "fast": (1.0, 20.0), "worse": (2.0, 19.0), "twin": (1.0, 18.0)}
    assert plot.pareto(points) == ["fast", "slow"]


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    card = tmp_path / "quality.json"
    card.write_text(json.dumps({"figures": {"0": {}, "0.5": {"a": {"psnr": {"mean": 24.0}, "stlpips": {"mean": 0.08}}, "b": {"psnr": {"mean": 23.0}}}, "1": {}}}))
    quality = plot.read_quality([card])
    assert quality == {"a": {"psnr": 24.0, "stlpips": 0.08}, "b": {"psnr": 23.0}}
    content = plot.draw(made_up(row("a", 5.0), row("a", 4.0, dtype="bfloat16"), row("b", 9.0), row("c", 7.0)), quality, ".svg")
    assert b"<svg" in content
    card.write_text("[]")
    with pytest.raises(ValueError, match=r"is not a report\.json"):
        plot.read_quality([card])


# ---------------------------------------------------------------- the command


def fld(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *map(str, words)])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback"
    return result


def test_bench(tmp_path: Path, decoder: str, idle: None) -> None:
    file = tmp_path / "deep" / "bench.json"
    words = (decoder, "--size", 64, "--repeats", 1, "--device", "cpu", "--json", file)
    result = fld(*words, "--dtype", "float32", "--layout", "contiguous", "--layout", "channels_last")
    assert "**64 x 64, batch 1**" in result.stdout and "fp32 NCHW" in result.stdout
    before = file.read_bytes()
    again = fld(*words)
    assert "is already there and is shown; --force measures again" in again.stderr
    assert again.stdout == result.stdout and file.read_bytes() == before
    fld(*words, "--force", "--dtype", "float32")
    assert [row["layout"] for row in json.loads(file.read_text())["rows"]] == ["channels_last"]
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]


def test_bench_where_nothing_can_run(decoder: str, idle: None) -> None:
    result = fld(decoder, "--size", 64, "--device", "cpu", "--dtype", "float32", "--mode", "graph", code=1)
    assert "[1] CUDA graphs need a CUDA device, this is cpu" in result.stdout


def test_wrong_usage(tmp_path: Path, idle: None) -> None:
    assert "--size 100: expected a multiple of 8" in fld("--size", 100, code=2).stderr
    assert "expected a file ending in .png" in fld("--plot", "plot.txt", code=2).stderr
    assert "there is no preset or folder called 'nobody'" in fld("nobody", "--dtype", "float32", code=2).stderr
    (tmp_path / "other.json").write_text("{}")
    assert "is no record of this fld bench" in fld("--json", tmp_path / "other.json", code=2).stderr
    assert "--quality: " in fld("--plot", "a.png", "--quality", tmp_path / "other.json", code=2).stderr
