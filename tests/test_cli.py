"""The command line as users type it, in a separate process where that matters."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinocell import __version__
from dinocell.cli import build_parser, main
from dinocell.commands import weights
from dinocell.models.vit import VisionTransformer, ViTConfig, variant_config
from dinocell.models.weights import Weights, load_backbone, save_weights


def dinocell(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dinocell", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160", **environment},
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "teacher_checkpoint.pth"
    save_weights(path, Weights.of(VisionTransformer(ViTConfig(width=48, depth=2, heads=3, mlp_hidden=96))))
    return path


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("dinocell")
    return line


def refused(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error line of a command, called in this process to save the import of torch."""
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    output = capsys.readouterr()
    return one_line_error(subprocess.CompletedProcess(arguments, code, output.out, output.err))


@pytest.mark.parametrize("module", ["dinocell", "dinocell.cli"])
def test_both_modules_run_as_the_console_script(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"dinocell {__version__}\n"


def test_help_names_every_command_without_importing_a_stage() -> None:
    script = "import sys; from dinocell.cli import build_parser; print(build_parser().format_help()); "
    script += "print([m for m in ('torch', 'numpy', 'rich', 'omegaconf', 'yaml', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
    assert all(name in result.stdout for name in ("demo", "dataset", "info", "export"))


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "dataset", "info", "export"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"example:\n  dinocell {command}" in capsys.readouterr().out


def test_misspelt_command_is_one_line_with_a_suggestion() -> None:
    assert "did you mean 'info'?" in one_line_error(dinocell("inof"))


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    assert "nowhere.pth" in one_line_error(dinocell("info", tmp_path / "nowhere.pth"))


def test_damaged_checkpoint_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "teacher_checkpoint.pth" in refused("info", checkpoint, capsys=capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["shards", "info", "NAME"],
        ["pretrain", "NAME"],
        ["demo", "--output", "NAME"],
        ["pretrain", "~nosuchuser/a.yaml"],
    ],
)
def test_impossible_file_names_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.replace("NAME", "a" * 300) for word in words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_exits_with_1(checkpoint: Path) -> None:
    result = dinocell("info", checkpoint, "--image-size", "-5")
    assert result.returncode == 2, "an impossible size is the user's mistake"
    script = "import dinocell.models.weights as w; w.read_weights = lambda s: 1 / 0; from dinocell.cli import main; "
    script += f"main(['info', {str(checkpoint)!r}])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


def test_info_describes_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "small8.safetensors"
    save_weights(path, Weights.of(VisionTransformer(variant_config("small"))))
    described = json.loads(dinocell("info", path, "--json").stdout)
    assert described["architecture"].startswith("ViT small: width 384, 12 blocks, 6 heads")
    assert described["channels"] == "1"
    assert described["heads"] == "none"
    # ssl.md D.3: 45.1 GFLOP for one 224 px image through ViT-S/8, two per multiply-accumulate.
    gflop = float(re.match(r"([\d.]+) GFLOP per image of 224 x 224", described["cost"])[1])
    assert gflop == pytest.approx(45.1, rel=0.02)
    assert described["parameters"].startswith("21,")


@pytest.mark.slow
def test_info_prints_a_table_and_accepts_a_closed_pipe(checkpoint: Path) -> None:
    assert "rotary, base 100" in dinocell("info", checkpoint).stdout
    line = f"{sys.executable} -m dinocell info {checkpoint} | head -1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_export_converts_and_prints_the_conversions(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "rgb.pth"
    result = dinocell("export", checkpoint, "--layout", "meta", "--in-channels", "3", "--output", output)
    assert result.returncode == 0, result.stderr
    assert "input 1 x standardised -> 3 x imagenet" in result.stdout
    grey = torch.randn(2, 1, 32, 32)
    ours, theirs = load_backbone(checkpoint), load_backbone(output, in_channels=None)
    torch.testing.assert_close(theirs(grey.repeat(1, 3, 1, 1)).cls, ours(grey).cls, rtol=1e-5, atol=1e-5)


def test_export_overwrites_only_with_the_option(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "there.pth"
    output.write_bytes(b"precious")
    assert "--overwrite" in refused("export", checkpoint, "--output", output, capsys=capsys)
    assert output.read_bytes() == b"precious"
    assert main(["export", str(checkpoint), "--output", str(output), "--overwrite"]) == 0
    assert load_backbone(output).config.width == 48


def test_interrupting_a_command_exits_with_130(checkpoint: Path) -> None:
    script = "import dinocell.models.weights as w\ndef stop(s): raise KeyboardInterrupt\nw.read_weights = stop\n"
    script += f"from dinocell.cli import main\nimport sys\nsys.exit(main(['info', {str(checkpoint)!r}]))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr == "dinocell: interrupted\n"


@pytest.mark.parametrize("command", ["demo", "pretrain", "finetune"])
def test_settings_may_be_anywhere_on_the_line(command: str) -> None:
    option, value = ("--data", "a=b") if command == "demo" else ("--dry-run", None)
    flag = [option, value] if value else [option]
    parse = build_parser().parse_args
    expected = parse([command, "debug", "x.y=1", "z=2 --k", *flag])
    assert (expected.recipe, expected.overrides) == ("debug", ["x.y=1", "z=2 --k"])
    lines = [
        [command, *flag, "debug", "x.y=1", "z=2 --k"],
        [command, "debug", *flag, "x.y=1", "z=2 --k"],
        [command, "debug", "x.y=1", *flag, "z=2 --k"],
        [command, "x.y=1", "debug", *flag, "z=2 --k"],
        [command, "x.y=1", *flag, "z=2 --k", "debug"],
    ]
    for line in lines:
        assert parse(line) == expected, line


def test_a_path_with_an_equals_sign_is_a_recipe_and_a_missing_or_second_one_is_one_line() -> None:
    assert build_parser().parse_args(["pretrain", "runs/lr=1/config.yaml"]).recipe == "runs/lr=1/config.yaml"
    assert build_parser().parse_args(["demo", "seed=1"]).recipe is None
    assert "expected a recipe" in one_line_error(dinocell("pretrain", "--dry-run", "steps=1"))
    assert "required: recipe (see" in one_line_error(dinocell("pretrain", "--dry-run"))
    assert "expected one recipe" in one_line_error(dinocell("finetune", "debug", "--dry-run", "own_folder"))
    assert "--dryrun" in one_line_error(dinocell("finetune", "debug", "epochs=1", "--dryrun"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "dinocell: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "dinocell: a/b: Permission denied\n"),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise error

    monkeypatch.setattr(weights, "_run_info", refuse)
    assert main(["info", "x"]) == 2
    assert capsys.readouterr().err == line


def test_other_errors_of_the_system_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(weights, "_run_info", refuse)
    with pytest.raises(OSError, match="Bad file"):
        main(["info", "x"])


@pytest.mark.parametrize("setting", ["output={}", "data.shards=[{}]"])
def test_names_that_are_too_long_are_one_line(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    line = ["pretrain", "debug", f"output={tmp_path}", f"data.shards=[{tmp_path}]", "online_eval.every=0"]
    assert main([*line, setting.format(name)]) == 2
    message = capsys.readouterr().err
    assert "xxx/" in message
    assert message.endswith("File name too long\n")
    assert message.count("\n") == 1
