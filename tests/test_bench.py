"""The bench measures what it says, and a figure that isn't reached ends the command; no test asserts on the time itself."""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minilora.bench as bench
from minilora.bench import kernels, limits, models, ours, paging, scaling, sides
from minilora.bench.rows import Row, Settings, Target, format_row, in_turns, markdown
from minilora.bench.sides import Taken, Task, ratio, take_turns
from minilora.cli import main
from minilora.errors import ConfigError, MiniloraError
from minilora.layers import dense
from minilora.llama.config import LlamaConfig
from minilora.measured import Measured
from minilora.memory import Memory
from minilora.shapes import SHAPES

FIELDS = {"name", "unit", "ours", "peer", "ratio", "limit", "ours_peak_bytes", "peer_peak_bytes"}
ALL = Settings()
SMALL = LlamaConfig.from_dict({**SHAPES["110m"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                               "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 300})
peers_installed = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "peft", "transformers"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "ELEMENTS", 2 ** 18)
    monkeypatch.setattr(paging, "STATE_BYTES", 8 * 2 ** 18 * paging.TENSORS)
    monkeypatch.setattr(paging, "QUARTER", 2 * 2 ** 18 * paging.TENSORS)


def test_in_turns_calls_both_alike_and_takes_medians() -> None:
    calls: list[str] = []

    def peer() -> None:
        calls.append("peer")
        time.sleep(0.2 if len(calls) == 6 else 0.002)       # one outlier

    ours_seconds, peer_seconds = in_turns(lambda: calls.append("ours"), peer, rounds=5)
    assert calls == ["ours", "peer"] * 6
    assert ours_seconds < 0.002 <= peer_seconds < 0.2


def test_a_ratio_is_the_median_over_the_turns_with_its_quartiles() -> None:
    found = ratio(Taken([1.0, 2.0, 4.0, 1.0, 1.0], 9.0, 0), Taken([2.0, 3.0, 4.0, 4.0, 5.0], 9.0, 0))
    assert found == (2.0, (1.5, 4.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.checkpoint_of(SMALL, tmp_path_factory.mktemp("bench"))


TASKS = [Task("load"), Task("step", batch=2, length=12, label_tokens=4), Task("step", batch=1, length=9, r=3,
         gradient_checkpointing=True), Task("prefill", batch=3, length=7), Task("decode", batch=2, length=7, new_tokens=3),
         Task("decode", length=7, new_tokens=2, adapted=True),
         Task("unpack", shape=(64, 96)), Task("product", rows=3, shape=(64, 128), layers=2),
         Task("product", grad=False, shape=(64, 128)), Task("score", batch=2)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.work}{task.r}{task.grad}{task.adapted}")
def test_our_side_does_every_kind_of_work(task: Task, checkpoint: Path) -> None:
    call = ours.WORKS[task.work](replace(task, model=str(checkpoint)))
    call()
    told = call()
    assert told is None or isinstance(told, (float, torch.Tensor, tuple))


@pytest.mark.skipif(not peers_installed, reason="the extra [peers] is not installed")
def test_both_sides_have_the_same_work_and_take_turns(checkpoint: Path) -> None:
    taken, peer = take_turns(Task("step", str(checkpoint), 2, 12, label_tokens=4), rounds=2, peers=True)
    assert peer is not None
    for side in (taken, peer):
        assert len(side.seconds) == 2 and min(side.seconds) > 0 and side.first > 0 and side.peak_bytes > 50e6
    code = "import sys; sys.path.insert(0, 'scripts'); import peers; print(sorted(peers.WORKS))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert listed.strip() == str(sorted(ours.WORKS))


@pytest.mark.skipif(not peers_installed, reason="the extra [peers] is not installed")
@pytest.mark.parametrize("work", ["prefill", "decode"])
def test_both_sides_read_the_same_tokens_from_the_same_weights(work: str, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    from minilora.llama.checkpoint import load_checkpoint
    ids = ours.token_ids(Task("prefill", batch=2, length=9), SMALL.vocab_size)
    mine = load_checkpoint(checkpoint, quantize=None, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(mine(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_side_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MiniloraError, match=r"no config\.json"):
        take_turns(Task("prefill", str(tmp_path)), rounds=1, peers=False)


def test_peers_need_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sides, "PEERS_SCRIPT", tmp_path / "peers.py")
    with pytest.raises(MiniloraError, match=r"scripts/peers.py.*\[peers\]"):
        take_turns(Task("unpack", shape=(64, 64)), 1, peers=True)


def test_decoding_is_timed_without_its_prompt() -> None:
    model, written = torch.nn.Identity(), []

    def write(new: int) -> None:
        written.append(new)
        time.sleep(0.1)
        for _ in range(new - 1):
            model(0)
            time.sleep(0.01)
        model(0)
        time.sleep(0.1)

    for _ in range(2):
        assert 0.04 < ours.written(model, write, 5)() < 0.09
    assert written == [6, 6] and not model._forward_hooks
    with pytest.raises(MiniloraError, match="6 tokens took 5 calls"):
        ours.written(model, lambda new: write(new - 1), 5)()


def taking(peak: int, paged: int = 0, losses: tuple[float, ...] = (1.0, 0.5)) -> Measured:
    return Measured(Memory(peak, 0, 0, 0, 0, 0, 0, 0, paged), peak, 0, losses)


def both(monkeypatch: pytest.MonkeyPatch, module: Any, ours_seconds: float, peer_seconds: float, peaks: tuple[int, int],
         first: float | None = None) -> list[Task]:
    """Let `take_turns` find these figures; the tasks it is given."""
    tasks: list[Task] = []

    def found(task: Task, rounds: int, peers: bool, peer_task: Task | None = None) -> tuple[Taken, Taken | None]:
        tasks.extend([task, *([peer_task] if peer_task else [])])
        return (Taken([ours_seconds] * 3, first or ours_seconds, peaks[0]),
                Taken([peer_seconds] * 3, peer_seconds, peaks[1]) if peers else None)

    monkeypatch.setattr(module, "take_turns", found)
    monkeypatch.setattr(models, "checkpoint_of", lambda config, folder: folder)
    return tasks


@pytest.mark.parametrize("times, share, ok", [(1.9, 0.44, True), (1.7, 0.44, False), (1.9, 0.46, False)])
def test_a_step_must_be_faster_and_take_less(monkeypatch: pytest.MonkeyPatch, times: float, share: float, ok: bool) -> None:
    monkeypatch.setattr(models, "operations_per_second", lambda dtype: 4e11)
    tasks = both(monkeypatch, models, 1.0, times, (int(share * 1e9), 10 ** 9))
    rows = list(models.steps(Settings(peers=True)))
    assert [row.name for row in rows] == ["qlora_step_110m", "qlora_step_110m_ckpt", "qlora_step_1b_ckpt"]
    assert [row.ok for row in rows[:2]] == [ok, ok]
    assert [(task.batch, task.length) for task in tasks] == [(4, 256), (4, 256), (1, 128)]
    # 85 million weights, 1024 tokens, two operations each, forward and back
    products = 2 * 2 * 84_934_656 * 1024 / 4e11
    assert rows[0].limit == pytest.approx(products) and rows[1].limit == pytest.approx(1.5 * products)
    assert [row.name for row in models.steps(Settings(quick=True))] == ["qlora_step_110m", "qlora_step_110m_ckpt"]


@pytest.mark.parametrize("times, ok", [(2.5, True), (2.3, False)])
def test_512_rows_are_held_against_float32_in_both_types(monkeypatch: pytest.MonkeyPatch, times: float, ok: bool) -> None:
    monkeypatch.setattr(kernels, "LAYER", (128, 64))
    tasks = both(monkeypatch, kernels, 1.0, times, (1, 1))
    same, mixed = kernels.products_fp32(Settings(peers=True))
    assert [(task.rows, task.dtype) for task in tasks] == [(512, "float32"), (512, "bfloat16"), (512, "float32")]
    assert mixed.name == "linear_rows_512_bf16_to_fp32" and mixed.ok is ok and same.ratio == mixed.ratio == times
    assert same.targets[0] == mixed.targets[0] == Target("times bitsandbytes", times, 2.4)
    assert [row.name for row in kernels.products_fp32(Settings())] == ["linear_rows_512_fp32"]


def test_loading_must_fit_beside_the_model_and_decoding_must_not_be_slow_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "bytes_per_second", lambda how: 2e10)
    for peak, reading, quantizing, ok in ((1_300_000_000, 0.1, 0.9, True), (1_300_000_000, 0.9, 0.1, True),
                                          (1_500_000_000, 0.1, 0.9, False), (1_300_000_000, 0.8, 0.8, False)):
        monkeypatch.setattr(models, "reading_seconds", lambda files, seconds=reading: seconds)
        monkeypatch.setattr(models, "quantizing_seconds", lambda config, total, seconds=quantizing: seconds)
        both(monkeypatch, models, 1.0, 5.0, (peak, 4 * 10 ** 9))
        row, = models.loading(Settings(peers=True))
        assert (row.ok, row.limit) == (ok, max(reading, quantizing))
    for first, expected in ((1.05, True), (1.3, False)):
        both(monkeypatch, models, 1.0, 2.5, (1, 1), first)
        assert [row.ok for row in models.decoding(Settings(peers=True))] == [expected] * 3
    assert models.read_a_token(models.shape_of("1.1b")) == pytest.approx(0.631e9, rel=0.01), "4 bits of 0.97e9, and the head"


def test_loadings_limit_is_counted_for_the_bytes_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    monkeypatch.setattr(models, "quantize_nf4", made.append)
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(models.time, "perf_counter", lambda: next(clock))
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 96)                         # numbers of both blocks of SMALL
    assert models.quantizing_seconds(SMALL, 3 * 2 * weights) == pytest.approx(6.0), "three times the bytes that took 2 s"
    assert sum(weight.numel() for weight in made[1:]) == weights and {weight.dtype for weight in made} == {torch.bfloat16}
    monkeypatch.undo()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(3 * models.READ_BYTES // 2))
    assert models.reading_seconds([tmp_path / "a", tmp_path / "b"]) > 0


def test_rows_of_the_kernels_bear_the_promised_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LAYER", (64, 128))
    assert [row.name for row in kernels.unpacking(ALL)] == ["dequant_fp32", "dequant_bf16"]
    rows = list(kernels.products(ALL))
    assert [row.name for row in rows] == [f"linear_rows_{count}" for count in (1, 16, 64, 512)]
    assert all(row.ours > 0 and row.limit and row.peer is None for row in rows)
    both(monkeypatch, kernels, 1.0, 20.0, (1, 1))
    assert [(row.ratio, row.peer) for row in kernels.products(Settings(peers=True))] == [(20.0, 20.0)] * 4
    both(monkeypatch, kernels, 8.0, 4.0, (1, 1))
    rows = list(kernels.inference(Settings(peers=True)))
    assert [row.name for row in rows if not row.ok] == [f"linear_rows_{name}" for name in (
        "1_nograd", "16_nograd", "64_nograd", "1_nograd_cold")]
    assert (rows[-1].ours, rows[-1].peer) == (1.0, 0.5), "of one layer, eight being taken in turn"


def test_paging_counts_only_where_the_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {True: taking(300, paged=700), False: taking(1000)}
    monkeypatch.setattr(paging, "measure", lambda model, work: runs[work.resident_bytes is not None])
    row, = paging.paged_training(ALL)
    assert (row.ours, row.peer, row.ok) == (300, 1000, True)
    runs[True] = taking(371, paged=700)             # a tenth of what is not resident may be left: 1000 - 630
    row, = paging.paged_training(ALL)
    assert not row.ok
    runs[True] = taking(300, paged=700, losses=(1.0, 0.6))
    with pytest.raises(MiniloraError, match="must be the same"):
        next(paging.paged_training(ALL))


def test_a_prediction_may_miss_by_a_tenth_to_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "predict", lambda config, work: Memory(1000, 0, 0, 0, 0, 0, 0, 0))
    for took, ok in ((905, True), (1105, True), (890, False), (1120, False)):
        monkeypatch.setattr(paging, "measure", lambda model, work, took=took: taking(took))
        rows = list(paging.memory_predicted(ALL))
        assert len(rows) == 7 and all(row.ok == ok for row in rows), took


@pytest.mark.usefixtures("small")
def test_the_paged_steps_are_four_different_optimizers() -> None:
    counters = {kind: paging.optimizer(kind) for kind in ("resident", "quarter_host", "quarter_disk", "small_disk")}
    for stepper in counters.values():
        stepper.step()
        stepper.step()
    resident, quarter = counters["resident"].counters, counters["quarter_disk"].counters    # type: ignore[attr-defined]
    assert resident.evictions == 0 < quarter.evictions
    assert [row.name for row in paging.paged_steps(ALL)] == [f"paged_adamw_{kind}" for kind in ("resident", "quarter_host",
                                                                                               "quarter_disk")]


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    base, unpaged = paging._peak("none"), paging._peak("unpaged")
    assert unpaged - base > 0.9 * paging.STATE_BYTES, "the moments of 25 million parameters"


def test_limits_are_what_a_stopwatch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "seconds", lambda call, rounds=9: 0.5)
    limits.bytes_per_second.cache_clear()
    limits.operations_per_second.cache_clear()
    try:
        assert limits.bytes_per_second("copy") == 2 * limits.BUFFER_BYTES
        assert limits.operations_per_second(torch.float32) == 4 * limits.SIDE ** 3
        assert [row.name for row in limits.machine(ALL)] == ["machine_fill", "machine_copy", "machine_read",
                                                             "machine_matmul_bf16", "machine_matmul_fp32"]
    finally:
        limits.bytes_per_second.cache_clear()
        limits.operations_per_second.cache_clear()


def test_a_cpu_without_16_bit_products_is_measured_by_the_fastest_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in operation.name() and len(args[0]) > dense.FEW_ROWS:
                products.append(args[0].dtype)
            return operation(*args, **(kwargs or {}))

    monkeypatch.setattr(dense, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(limits, "SIDE", 64)
    monkeypatch.setattr(kernels, "LAYER", (64, 64))
    limits.operations_per_second.cache_clear()
    with Products():
        limits.operations_per_second(torch.bfloat16)
        list(kernels.products(Settings(quick=True)))
    limits.operations_per_second.cache_clear()
    assert set(products) == {torch.float32}


def test_costs_are_measured_one_setting_at_a_time_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks: list[Task] = []

    def found(task: Task, rounds: int, peers: bool) -> tuple[Taken, None]:
        tasks.append(task)
        return Taken([0.001 * task.batch * task.length] * 3, 1.0, 10 ** 9 + 10 ** 6 * task.batch * task.length), None

    monkeypatch.setattr(scaling, "take_turns", found)
    monkeypatch.setattr(scaling, "checkpoint_of", lambda config, folder: f"{config.num_hidden_layers} layers")
    rows = list(scaling.scaling(ALL))
    assert len({row.name for row in rows}) == len(rows) == 16
    assert {(task.batch, task.length, task.r) for task in tasks if task.model != "12 layers"} == {(2, 128, 16)}
    sizes = [point.at for point in scaling.points(rows) if point.sweep == "layers"]
    assert sizes == pytest.approx([21.2, 42.5, 84.9, 169.9], 0.01)
    pytest.importorskip("matplotlib")
    scaling.draw(rows, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--only scaling"):
        scaling.draw([Row("other", "s", 1.0)], tmp_path / "none.png")


def slow(_: Settings) -> Iterator[Row]:
    yield Row("slow", "s", 2.0, 1.0, 0.5, 0.1, 10 ** 9, 2 * 10 ** 9, "a peer", (0.4, 0.6), "hardware",
              (Target("times a peer", 0.5, 0.9),))


def test_a_figure_that_is_not_reached_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                       tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "BENCHES", (slow,))
    files = ["--json", str(tmp_path / "rows.json"), "--table", str(tmp_path / "rows.md")]
    assert main(["bench", *files]) == 2
    printed = capsys.readouterr()
    assert "times a peer 0.50, at least 0.90: MISSED" in printed.out
    assert printed.err == "minilora: below what is to be reached: slow\n"
    row, = json.loads((tmp_path / "rows.json").read_text())
    assert row.keys() >= FIELDS and row["targets"] == [{"what": "times a peer", "value": 0.5, "least": 0.9}]
    assert (tmp_path / "rows.md").read_text().splitlines()[-1] == (
        "| `slow` | 2 s | a peer 1 s | 0.50 x [0.40, 0.60] | hardware 100 ms | 1.00 / 2.00 | no: times a peer 0.50 of 0.90 |")
    assert main(["bench", *files]) == 2 and "exists" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_rows_are_written_as_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "_peak", lambda kind: {"none": 100, "small_disk": 10 ** 6, "unpaged": 10 ** 9}[kind])
    assert main(["bench", "--json", str(tmp_path / "rows.json"), "--only", "paged_memory", "recomputation"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["paged_adamw_peak", "recompute"] and all(row.keys() >= FIELDS for row in rows)
    assert "recompute" in capsys.readouterr().out


def test_a_quick_run_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fast(settings: Settings) -> Iterator[Row]:
        assert settings.quick and settings.rounds(9) == 3
        yield Row("fast", "s", 1.0)

    monkeypatch.setattr(bench, "QUICK", (fast,))
    monkeypatch.setattr(bench, "BENCHES", (fast, slow))
    assert main(["bench", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "left out by --quick: slow"


@pytest.mark.parametrize("flags, message", [(["--only", "nothing"], "paged_steps"), (["--only", "gpu"], "no GPU")])
def test_what_cannot_be_measured_is_said(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if message == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_line_shows_what_is_there_and_nothing_else() -> None:
    shown: Callable[[Row], str] = format_row
    assert shown(Row("machine_fill", "GB/s", 26.66)).split() == ["machine_fill", "26.7", "GB/s"]
    assert "12 MB" in shown(Row("x", "bytes", 12e6, 24e6, 2.0)) and "None" not in markdown([Row("x", "bytes", 1.0)])
