"""`lora_course.cli`: each command does what its help says, and bad input is one sentence."""

import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from lora_course import cli, experiments, lab
from lora_course.adalora import AdaLoRALinear
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.injection import adapter_layers, inject
from lora_course.sparse import SparseDeltaLinear
from tests.models import randomize
from tools.chapters import ROOT


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture
def nano() -> nn.Module:
    return lab.load_base("nano")[0]


def test_the_command_is_installed_under_its_name_and_help_needs_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lora-course": "lora_course.cli:main"}
    code = "import sys; from lora_course.cli import main\ntry: main(['--help'])\nexcept SystemExit as stop: sys.exit(stop.code or ('torch' in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert all(f"\n    {name} " in run.stdout for name in ("study", "info", "convert"))


def test_the_studies_are_listed_without_what_they_are_made_with() -> None:
    code = "import sys; from lora_course.cli import main; main(['study', 'list']); sys.exit(', '.join({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)) or 0)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(experiments.NAMES)
    assert all(run.stdout.count(title) == 1 for title in experiments.TITLES.values())


@pytest.mark.parametrize(
    "command",
    [["info"], ["doctor"], ["get"], ["book"], ["test"], ["convert"], ["assign"], ["grade"], ["study", "list"], ["study", "run"], ["study", "verify"]],
    ids=" ".join,
)  # fmt: skip
def test_a_commands_help_says_in_a_sentence_what_it_does(command, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    sentence = capsys.readouterr().out.split("\n\n")[1]
    assert len(sentence.split()) > 8 and sentence.endswith(".")


def test_doctor_says_nothing_beside_its_findings() -> None:
    """bitsandbytes asks for a package at its import, on a CPU with AVX512-BF16: in a doctor's answer one would install it."""
    run = subprocess.run(
        [sys.executable, "-m", "lora_course.cli", "doctor"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (run.returncode, run.stderr) == (0, "") and "chapters choose" in run.stdout


def test_a_doctor_that_lacks_a_package_itself_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['packaging'] = None\nfrom lora_course.cli import main; sys.exit(main(sys.argv[1:]))"
    for command, words in ((["doctor"], 'pip install --upgrade "packaging"'), (["info"], "doctor")):
        run = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=ROOT
        )
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and words in run.stderr
        assert ("doctor says" in run.stderr) == (command != ["doctor"])


@pytest.mark.parametrize("name", ["lora_course.lab", "yaml", None])
def test_doctor_names_no_package_of_others_by_a_modules_name(name: str | None) -> None:
    said = cli.mend(cli.run_doctor, ImportError("gone", name=name))
    assert said == "doctor can't look without it: install the course again"


def test_what_a_code_page_lacks_does_not_end_a_command() -> None:
    """Piped on Windows, the titles' Δ has no code."""
    run = subprocess.run(
        [sys.executable, "-m", "lora_course.cli", "study", "list"],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert (run.returncode, run.stderr) == (0, b"") and b"0_1_lora" in run.stdout


def test_a_reader_of_the_output_may_stop_early() -> None:
    command = f"{sys.executable} -m lora_course.cli study list | read first"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert run.stderr == ""


def test_version_is_pyprojects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert stop.value.code == 0 and capsys.readouterr().out == f"lora-course {version}\n"


def test_info_names_versions_device_and_profile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_COURSE_PROFILE", "smol")
    assert cli.main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (
        rows["torch"] == torch.__version__
        and rows["profile"].startswith("smol: smol on cpu")
        and "GPU" in rows
    )


def test_convert_to_peft_and_back_is_the_same_function(
    tmp_path: Path, nano: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = AdaLoraConfig(
        init_r=6,
        target_r=4,
        lora_alpha=9,
        tinit=1,
        tfinal=1,
        total_step=10,
        target_modules=["q_proj", "up_proj"],
    )
    model = randomize(inject(nano, settings, layer=AdaLoRALinear))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.E)
    expected = logits(model)
    save_adapter(model, tmp_path / "ours")
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "peft")]) == 0
    theirs = PeftModel.from_pretrained(lab.load_base("nano")[0], tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), expected, atol=2e-3, rtol=1e-4)
    assert (expected - logits(lab.load_base("nano")[0])).abs().max() > 0.1
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "again")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_adapter(lab.load_base("nano")[0], tmp_path / "again")
    torch.testing.assert_close(logits(again), expected, atol=2e-3, rtol=1e-4)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'peft'} holds the adapter in PEFT's format.",
        f"{tmp_path / 'again'} holds the adapter in the course's format.",
    ]


def test_convert_reads_no_base_and_its_uniform_form_has_one_rank_and_scale(
    tmp_path: Path, nano: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2}
    )  # fmt: skip
    model = randomize(inject(nano, settings))
    save_adapter(model, tmp_path / "ours")
    expected = logits(model)

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded to rename keys")

    with monkeypatch.context() as patched:
        patched.setattr(lab, "load_base", no_weights)
        patched.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
        for name, more in (("default", []), ("uniform", ["--uniform"])):
            assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / name), *more]) == 0
        assert cli.main(["convert", str(tmp_path / "default"), str(tmp_path / "back")]) == 0
        refused = ["convert", str(tmp_path / "default"), str(tmp_path / "no"), "--uniform"]
        assert cli.main(refused) == 2
    written = json.loads((tmp_path / "uniform/adapter_config.json").read_text())
    assert written["rank_pattern"] == written["alpha_pattern"] == {} and written["r"] == 4
    assert json.loads((tmp_path / "default/adapter_config.json").read_text())["rank_pattern"]
    for name in ("default", "uniform"):
        theirs = PeftModel.from_pretrained(lab.load_base("nano")[0], tmp_path / name)
        torch.testing.assert_close(logits(theirs), expected, atol=2e-3, rtol=1e-4)
    again = load_adapter(lab.load_base("nano")[0], tmp_path / "back")
    torch.testing.assert_close(logits(again), expected, atol=2e-3, rtol=1e-4)


def test_a_study_is_run_listed_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = [2.0]

    def body(runs: experiments.Runs) -> None:
        for arm in runs.arms(["lora", "dora"]):
            for seed in runs.seeds:
                runs(f"{arm}/0.004/{seed}/test", lambda: {"bits_per_byte": value[0]})

    witness = experiments.Witness(("dora/0.004/0/test",), {"bits_per_byte": 0.01}, "a reason")
    tiny = experiments.Study("tiny", {"seeds": [0]}, body, witness)
    monkeypatch.setattr(experiments, "NAMES", {"tiny": "tiny"})
    monkeypatch.setattr(experiments, "TITLES", {"tiny": "a small one"})
    monkeypatch.setattr(experiments, "get", lambda name: tiny)
    monkeypatch.setattr(experiments.listing, "STUDIES", tmp_path)
    out = str(tmp_path / "mine.json")
    assert cli.main(["study", "run", "tiny", "--arms", "lora", "--out", out]) == 0
    assert cli.main(["study", "run", "tiny", "--seeds", "1"]) == 0
    assert json.loads((tmp_path / "tiny.json").read_text())["settings"]["seeds"] == [0, 1]
    assert list(json.loads(Path(out).read_text())["runs"]) == ["lora/0.004/0/test"]
    capsys.readouterr()
    assert cli.main(["study", "verify", "--no-note"]) == 0
    assert capsys.readouterr().out.startswith("tiny               holds: dora/0.004/0/test: bits")
    assert cli.main(["study", "list"]) == 0
    assert "4 runs" in (listed := capsys.readouterr().out) and "not verified" in listed
    assert listed.endswith("a small one\n")
    assert cli.main(["study", "verify", "--workers", "0"]) == 2
    assert "at least one process" in capsys.readouterr().err
    value[0] = 2.1
    assert cli.main(["study", "verify", "tiny"]) == 2
    found = capsys.readouterr()
    assert "DOES NOT HOLD" in found.out and "gives other numbers than the record" in found.err


def wrong(folder: Path) -> dict[str, tuple[list[str], str]]:
    """What is given, and how the one line that comes out begins."""
    (folder / "empty").mkdir()
    (folder / "delta").mkdir()
    save_adapter(
        inject(
            lab.load_base("nano")[0],
            LoraConfig(r=2, target_modules=["q_proj"]),
            layer=SparseDeltaLinear,
        ),
        folder / "delta",
    )
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    (folder / "other.json").write_text(json.dumps([1]))
    return {
        "study": (["study", "run", "adalroa"], "study 'adalroa' is unknown; there are 0_1_lora"),
        "arm": (
            ["study", "run", "5_1_comparison", "--arms", "loar", "--out", str(folder / "new")],
            "arm 'loar' is unknown; there are lora/shakespeare, rslora/shakespeare",
        ),
        "record": (
            ["study", "run", "lora", "--out", str(folder / "other.json")],
            f"{folder / 'other.json'} is no record of a study",
        ),
        "no adapter": (
            ["convert", str(folder / "empty"), str(folder / "new")],
            f"{folder / 'empty'} holds neither adapter.json",
        ),
        "target": (
            ["convert", str(folder / "delta"), str(folder / "full")],
            f"{folder / 'full'} is there already",
        ),
        "not low-rank": (["convert", str(folder / "delta"), str(folder / "new")], ""),
    }


def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (arguments, message) in wrong(tmp_path).items():
        assert cli.main(arguments) == 2, name
        found = capsys.readouterr()
        assert (
            found.out == ""
            and found.err.startswith(f"lora-course: {message}")
            and found.err.count("\n") == 1
        ), name
        assert not (tmp_path / "new").exists(), name


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments.Study, "run", stop)
    assert (
        cli.main(["study", "run", "1_2_adalora"]) == 130
        and "goes on from here" in capsys.readouterr().err
    )
