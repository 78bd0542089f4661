"""``mage-fast bench`` of whole steps, on the tiny model: records, checks, pages, traces, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_checks, report
from mage_fast.benchmark import end_to_end, generation, plots, records, suites, tables, timing, training
from mage_fast.benchmark.end_to_end import Candidate, Item, Twins
from mage_fast.benchmark.gate import Incorrect
from mage_fast.cli import main
from mage_fast.config import MAGEConfig
from mage_fast.kernels.roofline import Device, Work
from mage_fast.model import MAGE
from mage_fast.recipes import bench_report
from mage_fast.tokenizer import VQGAN

QUICK = ("bench", "--smoke", "--seconds", "0.001", "--device", "cpu", "--no-compile")
LIMITS = Device("here", 1e10, {"float32": 1e11, "bfloat16": 1e11})
NAMES = {
    "train": ("tiny/tokens-given", "tiny/online", "tiny/cached"),
    "generate": ("tiny/3-steps/batch2", "tiny/3-steps/batch1"),
    "tokenize": ("encode", "decode"),
}


@pytest.fixture
def twins() -> Twins:
    return Twins("tiny", MAGEConfig.tiny(), "cpu")


def bench(*arguments: str, out: Path) -> list[dict[str, Any]]:
    assert main([*QUICK, *arguments, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("suite", suites.SUITES)
def test_a_suite(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "records.json"
    found = bench("--suite", suite, out=out)
    assert all(tuple(r) == records.FIELDS for r in found)
    steps = [r for r in found if r["suite"] == suite]
    who = (("reference-eager-fp32", "float32"), ("mage_fast", "float32"), ("mage_fast", "bfloat16"))
    assert [(r["name"], r["implementation"], r["dtype"]) for r in steps] == [
        (name, *one) for name in NAMES[suite] for one in who
    ]
    for r in steps:
        assert (r["correct"], r["baseline"]) == (True, "reference-eager-fp32")
        assert r["ratio"] == pytest.approx(r["baseline_median_ms"] / r["median_ms"])
        assert r["images_s"] == pytest.approx(1e3 * r["shape"]["batch"] / r["median_ms"])
        assert r["percent_of_floor"] == pytest.approx(100 * r["floor_ms"] / r["median_ms"])
        assert r["rounds"] >= (2 if suite == "generate" else timing.FEWEST_ROUNDS)
        assert r["mfu_percent"] is None, "a CPU has no data sheet here"
        assert (r["activation_mib"] is not None) == (suite == "train")
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES[suite])
    assert {path.name for path in out.parent.iterdir()} == {
        *("records.json", "records.html", "records-end-to-end.png", "records-roofline.png")
    }


def test_one_item_in_another_batch(tmp_path: Path) -> None:
    options = ("--suite", "train", "--spec", "tiny/cached", "--batch", "3")
    found = bench(*options, out=tmp_path / "records.json")
    steps = [r for r in found if r["suite"] == "train"]
    assert {(r["name"], r["shape"]["batch"]) for r in steps} == {("tiny/cached/batch3", 3)}
    notes = [r["note"] for r in steps if r["implementation"] == "mage_fast"]
    assert notes == ["baseline tokenizes online: the release cannot train from cached tokens"] * 2


def test_a_trace_of_one_of_our_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "records.json"
    bench("--suite", "tokenize", "--spec", "decode", "--profile", out=out)
    trace = json.loads((tmp_path / "records-tokenize-decode.trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "mage_fast::group_norm_silu" in names
    assert "mage_fast::group_norm_silu" in capsys.readouterr().out


# The checks


def wrong_head(model: MAGE) -> None:
    nn.init.normal_(model.head.fc.weight)


def wrong_tokenizer(model: MAGE) -> None:
    assert isinstance(model.tokenizer, VQGAN)
    for part in (model.tokenizer.encoder, model.tokenizer.decoder):
        nn.init.normal_(part.conv_in.weight)


@pytest.mark.parametrize(
    ("suite", "spoil", "message"),
    [
        ("train", wrong_head, "incorrect: tiny/tokens-given, mage_fast, float32: loss "),
        ("generate", wrong_head, "logits with 100% of the tokens masked are off by"),
        (
            "tokenize",
            wrong_tokenizer,
            "incorrect: encode, mage_fast, bfloat16: the tokenizer's features are",
        ),
        ("tokenize", wrong_tokenizer, "incorrect: decode, mage_fast, float32: the decoded images are off by"),
        (
            "train",
            wrong_tokenizer,
            "incorrect: tiny/online, mage_fast, float32: the tokenizer's features",
        ),
    ],
)
def test_a_wrong_model_is_not_timed(
    suite: str,
    spoil: Callable[[MAGE], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ours differs from the reference's in one weight."""
    same = Twins.same_weights

    def spoiled(self: Twins) -> tuple:
        pair = same(self)
        with torch.no_grad():
            spoil(pair[0])
        return pair

    monkeypatch.setattr(Twins, "same_weights", spoiled)
    out = tmp_path / "records.json"
    assert main([*QUICK, "--suite", suite, "--out", str(out)]) == 1
    assert message in capsys.readouterr().out
    name = message.split(": ")[1].split(",")[0] if message.startswith("incorrect") else NAMES[suite][0]
    ours = [r for r in json.loads(out.read_text()) if (r["name"], r["implementation"]) == (name, "mage_fast")]
    assert [(r["correct"], r["median_ms"], r["ratio"], r["rounds"]) for r in ours] == [
        (False, None, None, 0)
    ] * 2
    assert '<tr class="wrong">' in out.with_suffix(".html").read_text()


def test_another_dropout_of_the_gate_s_own_step_is_seen(
    twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is lost, at an equal loss."""
    step = training.Training(twins, "tokens-given", 2)
    step.check(torch.float32, lambda: twins.ids(2))
    ours = twins.pair[0]
    hook = ours.encoder.blocks[0].mlp.fc1.weight.register_hook(torch.zeros_like)
    with pytest.raises(Incorrect, match=r"gradients are off by 0\.\d+ of their length, allowed 0\.0001"):
        step.check(torch.float32, lambda: twins.ids(2))
    hook.remove()
    step.check(torch.float32, lambda: twins.ids(2))


def test_other_ids_for_the_same_noise_are_refused(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    item = generation.Generation(twins, 2, 3)
    for model in twins.same_weights():
        model.eval()
    assert item.check(torch.float32).startswith("100.00% of ids")
    true = generation.generate_ids

    def other_seed(*arguments: Any, **keywords: Any) -> Tensor:
        return true(*arguments, **keywords | {"seed": 1})

    monkeypatch.setattr(generation, "generate_ids", other_seed)
    with pytest.raises(Incorrect, match="ids of 2 steps are the reference's for the same noise, wanted 99%"):
        item.check(torch.float32)


def test_a_cache_of_other_ids_is_refused(twins: Twins) -> None:
    step = training.Training(twins, "cached", 2)
    with pytest.raises(Incorrect, match="the token cache gives other ids"):
        step.check(torch.float32, lambda: twins.ids(2) + 1)


def test_cached_batches_come_from_disk(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, read = twins.ids(2), []
    batch = training.TokenCache.batch
    monkeypatch.setattr(
        training.TokenCache, "batch", lambda self, indices: read.append(list(indices)) or batch(self, indices)
    )
    next_batch = training.cached_batches(twins, ids)
    assert all(torch.equal(next_batch().long(), ids) for _ in range(17))
    assert read[:2] == [[0, 1], [2, 3]]
    assert read[16] == [0, 1]


# Measuring


class Sleeper(Item):
    """Candidates that note when they run."""

    suite = "train"
    name, device, batch, baseline = "tiny/none", "cpu", 2, "a"
    shape = {"batch": 2}  # noqa: RUF012

    def __init__(self, **runs: Callable[[], Any]) -> None:
        self.runs = runs

    def work(self, dtype: torch.dtype) -> Work:
        return Work(0, 0, 10**6, matrix=True)

    def candidates(self, *, compiled: bool) -> list[Candidate]:
        return [Candidate(name, torch.float32, run, run) for name, run in self.runs.items()]


def test_rounds_alternate_after_a_first_call() -> None:
    calls: list[str] = []
    item = Sleeper(a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    measured = end_to_end.measure(item, LIMITS, 1e-9)
    assert calls == ["a", "b"] * 5
    assert [r["rounds"] for r in measured.records] == [4, 4]
    item.fewest_rounds = 2
    assert [r["rounds"] for r in end_to_end.measure(item, LIMITS, 1e-9).records] == [2, 2]


def test_one_that_fails_costs_only_itself() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("out of memory\nmore")

    measured = end_to_end.measure(Sleeper(a=lambda: None, b=fails), LIMITS, 1e-9)
    assert [r["implementation"] for r in measured.records] == ["a"]
    assert measured.remarks() == ["not measured: tiny/none, b, float32: out of memory"]
    measured = end_to_end.measure(Sleeper(a=fails, b=lambda: None), LIMITS, 1e-9)
    assert [(r["implementation"], r["ratio"]) for r in measured.records] == [("b", None)]


def test_mfu_is_of_the_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = Device("NVIDIA H100 80GB HBM3", 1e12, {"float32": 1e12, "bfloat16": 1e13})
    (r,) = end_to_end.measure(Sleeper(a=lambda: None), h100, 1e-9).records
    peak_ms = 1e3 * 1e6 / (495e12 / 3)  # float32 takes three tf32 products
    assert r["mfu_percent"] == pytest.approx(100 * peak_ms / r["median_ms"])
    assert r["percent_of_floor"] == pytest.approx(100 * 1e-3 / r["median_ms"])


def test_bytes_kept_for_the_backward_pass_counted_by_hand() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    # the input twice, once; the weight is the layer's own; tanh keeps its result
    assert end_to_end.kept_bytes(layer, lambda: layer(x)) == 7 * 3 * 4
    assert end_to_end.kept_bytes(layer, lambda: (layer(x).tanh(), layer(x[2:]))) == (7 * 3 + 7 * 5) * 4


# Records, pages, pictures


class Cells(HTMLParser):
    """Texts of headings and cells, and what pictures are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in ("img", "script", "link"):
            self.sources.append(dict(attributes).get("src", tag))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_every_suite_and_needs_no_other_file(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    for suite in suites.SUITES:
        bench("--suite", suite, out=out)
    bench("--op", "bias_gelu", out=out)
    page = Cells(out.with_suffix(".html").read_text())
    found = records.read(out)
    titles = ("Measured limits", "Training steps", "Generating images", "The tokenizer", "Kernels")
    assert all(title in page.texts for title in titles)
    wanted = [r["name"] for r in found if r["suite"] != "device"]
    assert all(page.texts.count(name) >= wanted.count(name) for name in wanted)
    assert found[0]["device"] in page.texts
    versions = found[0]["versions"] | {"date": found[0]["date"]}
    assert all(any(value in text for text in page.texts) for value in versions.values())
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_names_in_a_page_are_escaped(tmp_path: Path) -> None:
    made = {"suite": "train", "name": "<b>", "dtype": "float32", "shape": {"batch": 1}, "baseline": "a"}
    made |= {"implementation": "a", "median_ms": 1.0, "ratio": 1.0, "note": "<i>"}
    page = bench_report.write(records.complete([made], "cpu"), tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_earlier_record_files_are_read(tmp_path: Path) -> None:
    (r,) = records.complete([{"suite": "train", "name": "vit_b/tokens-given"}], "cpu")
    earlier = {key: value for key, value in r.items() if key not in records.ADDED}
    path = tmp_path / "records.json"
    path.write_text(json.dumps([earlier]))
    assert records.read(path) == [r]
    assert tuple(records.read(path)[0]) == records.FIELDS


def step_record(**changes: Any) -> dict[str, Any]:
    made = {"suite": "train", "name": "vit_b/cached", "dtype": "bfloat16", "baseline": "reference-eager-fp32"}
    made |= {"shape": {"batch": 4, "dropout": 0.1}, "implementation": "mage_fast", "median_ms": 2000.0}
    made |= {"baseline_median_ms": 8000.0, "ratio": 4.0, "images_s": 2.0, "activation_mib": 300.4}
    return records.complete([made | changes], "cpu")[0]


def test_whole_steps_have_a_table_of_their_own() -> None:
    lines = tables.markdown([step_record()]).splitlines()
    assert lines == [
        "| suite / name | dtype | implementation | median ms | img/s | ratio | kept MiB |",
        "|---|---|---|--:|--:|--:|--:|",
        "| `train/vit_b/cached` | bfloat16 | mage_fast | 2,000.0 | 2.00 | 4.00 | 300 |",
    ]


def test_points_of_whole_steps_stand_under_the_roofline() -> None:
    work = suites.work_of(step_record())
    assert work is not None
    assert work.flops == round(4 * 161.408667648e9)
    assert suites.work_of(step_record(name="vit_b/gone")) is None
    assert suites.work_of(step_record(shape={"batch": 256, "dropout": 0.1})) is None
    by_name = step_record(name="vit_b/cached/batch256", shape={"batch": 256, "dropout": 0.1})
    assert suites.work_of(by_name).flops == 64 * work.flops  # type: ignore[union-attr]
    ((who, _, speed),) = plots._points([step_record()])
    assert who == "whole steps: mage_fast, bfloat16"
    assert speed == pytest.approx(work.flops / 2.0)


def test_pictures_for_the_docs(tmp_path: Path) -> None:
    results, folder = tmp_path / "results", tmp_path / "pictures"
    results.mkdir()
    folder.mkdir()
    (results / "here.json").write_text(json.dumps([step_record()]))
    assert report.missing(results, folder) == ["bench_here-end-to-end.png"]
    (picture,) = report.draw(results, folder)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert report.missing(results, folder) == []


def test_gpu_checks_begin_with_the_most_wanted_steps(tmp_path: Path) -> None:
    wanted = ["train", "generate", "tokenize", "compile"]
    planned = list(gpu_checks.processes(wanted, "cuda", tmp_path, smoke=False))
    labels = [process.label for process in planned]
    assert labels[:2] == ["train --spec vit_b/cached", "train --spec vit_b/cached --batch 256"]
    assert labels[4:7] == [
        "generate --model vit_b --spec vit_b/20-steps/batch64",
        "generate --model vit_b --spec vit_b/20-steps/batch1",
        "tokenize --model vit_b",
    ]
    assert labels[7] == "compile --spec vit_b/cached"
    for process in planned[:8]:
        assert "--compile" in process.command or "--no-compile" in process.command


# What it refuses


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = {
        "seconds is -1.0, wanted more than 0": ("--suite", "generate", "--seconds", "-1"),
        "batch is 0, wanted 1 or more": ("--suite", "train", "--batch", "0"),
        "--profile is given with --suite kernels, wanted --suite train, generate or tokenize": ("--profile",),
        "--batch is given with --suite kernels": ("--batch", "4"),
        "--op is given with --suite tokenize, wanted --suite kernels": (
            *("--suite", "tokenize", "--op", "attention"),
        ),
        "nothing named 'vit_b/cashed' in suite train; there are tiny/tokens-given, tiny/online, tiny": (
            *("--suite", "train", "--spec", "vit_b/cashed"),
        ),
        f"{tmp_path} is a folder": ("--suite", "tokenize", "--out", str(tmp_path)),
    }
    for message, options in cases.items():
        assert main([*QUICK, *options]) == 2, message
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("mage-fast: error: ")
        assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--suite", "sample"), ("--model", "vit_x")])
def test_an_unknown_suite_or_model_is_one_line(
    options: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *options])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mage-fast: error: ")
    assert options[1] in line
