"""A run folder stores the configuration and every number, through kills, resumes and pipes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime import progress
from dinocell.runtime.run import Run
from dinocell.runtime.run_folder import git_state


@dataclass(frozen=True, kw_only=True)
class Compute:
    num_workers: int = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 1e-3
    blocks: tuple[int, ...] = (2, 5)
    compute: Compute = field(default_factory=Compute)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(autouse=True)
def starts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second bear a running number, which TensorBoard sorts as text: count from 0 in each test."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def records(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0})
    return accumulator.Reload()


def logged_steps(folder: Path) -> list[int]:
    return [scalar.step for scalar in events(folder).Scalars("loss/dino")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()


def test_log_writes_the_same_numbers_to_json_tensorboard_and_console(tmp_path: Path) -> None:
    console = quiet()
    with Run.start(tmp_path, Config(), total_steps=25, console=console) as run:
        for step in range(1, 26):
            run.log(step, {"loss/dino": torch.tensor(step / 4), "loss/ibot": 2, "ema": np.float32(0.5)})
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == [1, 10, 20, 25]
    assert [line["loss/dino"] for line in lines] == [0.25, 2.5, 5.0, 6.25]
    assert list(lines[0]) == ["step", "time", "loss/dino", "loss/ibot", "ema"]
    assert [(scalar.step, scalar.value) for scalar in events(tmp_path).Scalars("loss/dino")] == [
        (1, 0.25),
        (10, 2.5),
        (20, 5.0),
        (25, 6.25),
    ]
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue().splitlines()
    assert len(printed) == 4
    assert printed[1].startswith("step 10/25  loss/dino 2.500  loss/ibot 2.000  ")


def test_only_log_steps_read_tensors_and_each_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__"):
        original = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            reads.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    metrics = {f"loss/{index}": torch.tensor([float(index)], requires_grad=True) for index in range(5)}
    with Run.start(tmp_path, Config(), log_every=5, console=quiet()) as run:
        run.log(1, metrics)
        assert reads == ["tolist"]
        for step in (2, 3, 4):
            run.log(step, metrics)
        assert reads == ["tolist"]
        run.log(5, metrics)
        assert reads == ["tolist", "tolist"]


def test_speed_is_measured_between_log_steps(tmp_path: Path, clock: list[float]) -> None:
    with Run.start(tmp_path, Config(), total_steps=40, batch_size=8, console=quiet()) as run:
        for step in range(1, 41):
            run.log(step, {})
            clock[0] += 0.5 if step < 20 else 0.25
    lines = records(tmp_path)
    assert "speed/steps_per_s" not in lines[0]
    assert [line.get("speed/steps_per_s") for line in lines[1:]] == [2.0, 2.0, 4.0, 4.0]
    assert lines[-1]["speed/images_per_s"] == 32.0


def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    with Run.start(tmp_path, Config(), console=quiet()) as run:
        run.log(1, {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf})
    (line,) = records(tmp_path)
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(line["a"]))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": torch.zeros(2)}, r"metric 'loss'"),
        ({"step": 1.0}, "a metric cannot be called step"),
    ],
)
def test_metrics_that_are_not_numbers_are_refused(tmp_path: Path, metrics: dict[str, Any], message: str) -> None:
    with Run.start(tmp_path, Config(), console=quiet()) as run, pytest.raises(ValueError, match=message):
        run.log(1, metrics)


def test_another_config_is_refused_before_and_at_the_start(tmp_path: Path) -> None:
    Run.start(tmp_path, Config(), console=quiet()).close()
    for refused in (Run.check, Run.start):
        with pytest.raises(ConfigError, match=r"lr: 0\.001 -> 0\.5"):
            refused(tmp_path, Config(lr=0.5))
    Run.check(tmp_path, Config(compute=Compute(num_workers=0)))


def test_resuming_drops_the_records_of_later_steps(tmp_path: Path) -> None:
    with Run.start(tmp_path, Config(), console=quiet()) as run:
        for step in range(1, 51):
            run.log(step, {"loss/dino": 1.0})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 60, "ti')  # killed while writing
    with Run.start(tmp_path, Config(), resume_step=25, console=quiet()) as run:
        assert [line["step"] for line in records(tmp_path)] == [1, 10, 20]
        for step in range(26, 41):
            run.log(step, {"loss/dino": 2.0})
    assert [line["step"] for line in records(tmp_path)] == [1, 10, 20, 26, 30, 40]
    assert logged_steps(tmp_path) == [1, 10, 20, 26, 30, 40]
    assert "dropped 1 broken line(s)" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_starting_over_drops_all_records(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with Run.start(tmp_path, Config(), console=quiet()) as run:
            for step in range(11):
                run.log(step, {"loss/dino": value})
    assert [(line["step"], line["loss/dino"]) for line in records(tmp_path)] == [(0, 2.0), (1, 2.0), (10, 2.0)]
    assert [scalar.value for scalar in events(tmp_path).Scalars("loss/dino")] == [2.0, 2.0, 2.0]


def test_other_ranks_write_nothing_but_agree_on_log_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run.start(folder, Config(), total_steps=25, is_main=False) as run:
        run.log(1, {"loss": torch.zeros(2)})
        run.note("x")
        run.text(1, "x", "y")
        run.image(1, "x", np.zeros((2, 2), np.uint8))
        run.histogram(1, "x", np.zeros(2))
        assert [step for step in range(1, 26) if run.is_log_step(step)] == [1, 10, 20, 25]
    assert not folder.exists()


def test_images_histograms_and_texts_reach_tensorboard(tmp_path: Path) -> None:
    with Run.start(tmp_path, Config(), console=quiet()) as run:
        run.image(1, "grey", np.full((4, 6), 128, np.uint8))
        run.image(1, "colour", np.zeros((4, 6, 3), np.float32))
        run.histogram(1, "weights", torch.tensor([1.0, math.nan, 3.0], requires_grad=True))
        run.histogram(1, "nothing", np.array([math.nan]))
        run.text(1, "recipe", "*hello*")
    read = events(tmp_path)
    (grey,) = read.Images("grey")
    assert (grey.width, grey.height) == (6, 4)
    assert read.Tags()["images"] == ["grey", "colour"]
    (weights,) = read.Histograms("weights")
    assert (weights.histogram_value.num, weights.histogram_value.max) == (2.0, 3.0)
    assert read.Tags()["histograms"] == ["weights"]
    assert read.Tags()["tensors"] == ["recipe/text_summary"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4), 1.5, np.float32), r"expected values in \[0, 1\], got 1.5 to 1.5"),
        (np.full((4, 4), np.nan, np.float32), r"expected values in \[0, 1\]"),
    ],
)
def test_an_image_of_another_range_is_refused(tmp_path: Path, image: Any, message: str) -> None:
    with Run.start(tmp_path, Config(), console=quiet()) as run, pytest.raises(ValueError, match=message):
        run.image(1, "x", image)


def test_a_pipe_gets_plain_lines_even_with_forced_colour(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = io.StringIO()
    with Run.start(tmp_path, Config(), total_steps=1000, batch_size=8, console=Console(file=output)) as run:
        for step in range(1, 21):
            run.log(step, {"loss/dino": 8.914, "loss/ibot": 8.87, "lr": 1.0})
            clock[0] += 2.5
        run.log(20, {"probe/retrieval": 0.5}, always=True)
        run.note("[red]saved[/red] :smile:")
    text = output.getvalue()
    assert not any(character < " " and character != "\n" for character in text)
    assert text.splitlines() == [
        "step 1/1000  loss/dino 8.914  loss/ibot 8.870",
        "step 10/1000  loss/dino 8.914  loss/ibot 8.870  3.2 img/s  ETA 0:41:15",
        "step 20/1000  loss/dino 8.914  loss/ibot 8.870  3.2 img/s  ETA 0:40:50",
        "step 20/1000  probe/retrieval 0.5000  3.04 img/s  ETA 0:42:59",
        "[red]saved[/red] :smile:",
    ]


def test_a_terminal_gets_a_bar_with_the_losses_and_notes_above_it(tmp_path: Path) -> None:
    output = Terminal()
    console = Console(file=output, force_terminal=True, width=120)
    with Run.start(tmp_path, Config(), total_steps=20, console=console) as run:
        for step in range(1, 21):
            run.log(step, {"loss/dino": 8.914})
        run.note("saved a checkpoint")
    text = output.getvalue()
    assert "20/20" in text
    assert "loss/dino 8.914" in text
    assert "saved a checkpoint" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_notes_are_kept_with_their_time(tmp_path: Path) -> None:
    with Run.start(tmp_path, Config(), console=quiet()) as run:
        run.note("saved step 10")
    stamp, _, message = (tmp_path / "log.txt").read_text(encoding="utf-8").partition(" ")
    assert stamp.endswith("+00:00")
    assert message == "saved step 10\n"


def test_files_are_complete_after_an_interrupt_and_close_can_be_repeated(tmp_path: Path) -> None:
    run = Run.start(tmp_path, Config(), console=quiet())

    def interrupted_loop() -> None:
        with run:
            for step in range(1, 11):
                run.log(step, {"loss/dino": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_loop()
    run.close()
    assert [line["step"] for line in records(tmp_path)] == [1, 10]
    assert logged_steps(tmp_path) == [1, 10]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "run"):
        with pytest.raises(DinocellError, match=f"run folder {folder}: ") as caught:
            Run.start(folder, Config(), console=quiet())
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """When numbers are written, and again when the files are closed."""
    run = Run.start(tmp_path, Config(), console=quiet())
    assert run._outputs is not None
    run._outputs.metrics.close()
    run._outputs.metrics._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    for do in (lambda: run.log(1, {"loss/x": 1.0}), run.close):
        with pytest.raises(DinocellError, match=r"cannot be written: No space left on device$"):
            do()


def test_a_folder_without_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # chmod does not stop root
    with pytest.raises(DinocellError, match="cannot be written: Permission denied"):
        Run.start(tmp_path / "run", Config(), console=quiet())


def test_git_state_is_commit_and_changes_and_none_without_a_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "dinocell").mkdir()
    (tmp_path / "dinocell" / "new.py").touch()
    assert git_state(tmp_path) == {**clean, "dirty": True}


def test_tasks_print_a_line_when_complete_and_draw_bars_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.task_progress() as report:
        report("listing", 1000, None, "1,000 fields")
        for done in range(3):
            report("shards", done + 1, 3, f"{done} rejected")
    assert capsys.readouterr().out == "shards 3 of 3  2 rejected\n"
    output = Terminal()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=output, force_terminal=True, width=120))
    with progress.task_progress() as report:
        report("shards", 3, 3)
    assert "3/3" in output.getvalue()


def test_rate_is_unknown_before_the_second_step(clock: list[float]) -> None:
    rate = progress.Rate(total_steps=10, images_per_step=None)
    rate.update(1)
    assert rate.speed_text() == rate.eta_text() == ""
    clock[0] += 2
    rate.update(2)
    assert (rate.speed_text(), rate.eta_text()) == ("0.5 steps/s", "ETA 0:00:16")


def test_importing_run_does_not_import_torch() -> None:
    code = "import sys, dinocell.runtime.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
