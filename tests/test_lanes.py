"""The lanes' own parts: which packages imitate an image, how lists are renewed, what workflows may do."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import yaml

from tools.chapters import ROOT
from tools.lanes import image, refresh, serve, server, throughput
from tools.lanes.places import Place

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("name", ["colab-gpu", "kaggle"])
def test_an_image_is_imitated_with_what_the_course_meets(name: str) -> None:
    pins = dict(line.split("==") for line in image.pins(name, torch=False))
    assert pins["torchao"] == "0.10.0" and {"diffusers", "gradio", "transformers"} <= set(pins)
    assert "torch" not in pins
    torch = dict(line.split("==") for line in image.pins(name, torch=True))["torch"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", torch), "the index knows no +cu128"


def test_lists_are_renewed_and_kaggles_is_of_its_day() -> None:
    asked = []

    def fetch(address: str) -> str:
        asked.append(address)
        if "api.github.com" in address:
            day = "2026-05-14" if "until=2026-05-14" in address else "2026-08-19"
            return json.dumps([{"sha": day.replace("-", "") * 5, "commit": {"committer": {"date": f"{day}T01:00:00Z"}}}])  # fmt: skip
        if address.endswith("config.txt"):
            return "BASE_IMAGE_TAG=release-colab-external-images_20260514-060047_RC00\n"
        return f"torch==2.{'10' if '20260514' in address else '11'}.0+cu128\n"

    found = refresh.lists(fetch)
    assert found["colab-gpu.txt"].splitlines()[-1] == "torch==2.11.0+cu128"
    first, last = found["kaggle.txt"].splitlines()
    assert "20260514-060047" in first and "(2026-05-14)" in first and last == "torch==2.10.0+cu128"
    assert all(address.startswith("https://") for address in asked)


@pytest.mark.slow
def test_a_place_beside_this_environment_has_its_torch_and_not_its_course(tmp_path) -> None:
    found = Place(tmp_path / "alone").versions()
    assert "torch" in found and "lora-course" not in found  # else the set-up cell installs nothing
    assert "lora-course" in Place(tmp_path / "with", course=True).versions()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_state_their_permissions_and_pin_actions(path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert "permissions" in workflow, f"{path.name}: without a line it may write everything"
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job
    for line in path.read_text().splitlines():
        if "uses:" in line:
            assert re.search(r"uses: [\w./-]+@[0-9a-f]{40}\s+# v\d", line), (
                f"{path.name}: {line.strip()}"
            )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist(path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = set(re.findall(r"\bmake ([a-z0-9-]+)", path.read_text()))
    assert asked <= targets, f"{path.name} asks for {sorted(asked - targets)}"


def test_one_record_a_profile_comes_back_from_a_gpu() -> None:
    """An upload of the whole folder would bring old records of the other profiles, over the new ones."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text())["jobs"]
    (upload,) = [s for s in jobs["chapters"]["steps"] if "upload-artifact" in s.get("uses", "")]
    assert upload["with"]["path"] == "lora_course/data/runs/${{ matrix.profile }}.json"
    assert "matrix.profile != 'tiny'" in upload["if"], "tiny's record is that of the book's CPU"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_only_a_job_that_pushes_keeps_the_token(path) -> None:
    for name, job in yaml.safe_load(path.read_text())["jobs"].items():
        pushes = any("git push" in step.get("run", "") for step in job["steps"])
        for step in job["steps"]:
            if "actions/checkout@" in step.get("uses", ""):
                kept = step.get("with", {}).get("persist-credentials", True)
                assert kept == pushes, f"{path.name}: {name}"


def jobs_of(name: str) -> dict[str, dict]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]


def runs(job: dict) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


# what the workflow token does → the workflows that a person's doing would have started
STARTS = {"gh release create": ("publish",), "gh pr create": ("ci", "lanes")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_the_workflow_token_makes_starts_the_workflows_that_wait_for_it(path) -> None:
    """GitHub starts none from this token's events, but those that it is asked to dispatch."""
    for name, job in jobs_of(path.stem).items():
        for made, started in STARTS.items():
            after = runs(job).partition(made)[2]
            for other in started if after else ():
                assert f"gh workflow run {other}.yml" in after, f"{path.name}: {name}: {made}"
                assert job["permissions"]["actions"] == "write", f"{path.name}: {name}"
                events = yaml.safe_load((path.parent / f"{other}.yml").read_text())[True]  # "on"
                assert "workflow_dispatch" in events, f"{other}.yml can't be dispatched"


def test_the_rule_meets_the_workflows_that_make_something() -> None:
    made = {path.stem: [made for made in STARTS if made in path.read_text()] for path in WORKFLOWS}
    assert {name: kinds for name, kinds in made.items() if kinds} == {
        "gpu": ["gh pr create"], "refresh": ["gh pr create"], "release": ["gh release create"],
    }  # fmt: skip


def test_the_page_on_publishing_names_the_settings_that_are_off_at_first() -> None:
    section = (ROOT / "book" / "setup.md").read_text().partition("## From a copy\n")[2]
    section = " ".join(section.partition("\n## ")[0].split())
    assert 'Pages, Source: choose "GitHub Actions"' in section
    assert "allow GitHub Actions to create pull requests" in section


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_that_may_write_installs_nothing(path) -> None:
    """What is installed could use the token, or change what the next steps run."""
    workflow = yaml.safe_load(path.read_text())
    for name, job in workflow["jobs"].items():
        rights = job.get("permissions", workflow["permissions"])
        if "write" in rights.values():
            found = re.search(r"\bmake |pip install|\.venv/|curl ", runs(job))
            assert not found, f"{path.name}: {name} may write, and runs {found[0]}"


@pytest.mark.parametrize("name", ["publish", "release"])
def test_what_is_published_comes_from_no_cache(name: str) -> None:
    for job in jobs_of(name).values():
        for step in job["steps"]:
            assert "cache" not in step.get("with", {}) and "actions/cache@" not in step.get("uses", "")  # fmt: skip


def test_ci_lints_the_workflows_and_has_time_for_a_slow_machine() -> None:
    jobs = jobs_of("ci")
    (lint,) = [job for job in jobs.values() if "actionlint" in runs(job)]
    assert re.fullmatch(r"[0-9a-f]{64}", lint["env"]["DIGEST"])
    fetched, checked, used = (runs(lint).index(word) for word in ("curl", "$DIGEST", "./actionlint"))  # fmt: skip
    assert fetched < checked < used and "sha256sum --check" in runs(lint)
    (whole,) = [job for job in jobs.values() if ".ci/run" in runs(job)]
    assert whole["timeout-minutes"] * 60 > 1.5 * 3943  # seconds that it took on a slow machine


def test_the_audit_sees_what_is_installed_and_not_the_pins_alone() -> None:
    told = runs(jobs_of("watch")["audit"])
    assert "make install" in told and "requirements.txt" not in told
    assert ".venv/bin/python -m pip list --format freeze" in told
    assert "pip-audit --requirement installed.txt" in told


def test_a_server_gets_what_it_needs_and_no_other_torch() -> None:
    lines = [
        "numpy", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchvision", "fastapi[standard]<0.137",
        "six; python_version < '3'", "boto3; extra == 's3'", "protobuf!=6.30.*,>=5.29",
    ]  # fmt: skip
    assert server.wanted(lines) == ["numpy", "fastapi[standard]<0.137", "protobuf!=6.30.*,>=5.29"]


def test_the_served_record_is_of_the_chapters_command() -> None:
    """What was run has the flags that chapter 4.4 gives, one adapter at the start, one added, one refused."""
    record = json.loads(serve.RECORD.read_text())
    section = (ROOT / "notebooks" / "4_4_fused.md").read_text()
    told = set(
        re.findall(r"--[a-z-]*lora[a-z-]*", re.search(r"vllm serve .*?```", section, re.S)[0])
    )
    slots = {"a slot to spare": serve.SERVED + 1, "every slot taken": serve.SERVED}
    asked = [(name, word) for name in ("base", "past", "plural") for word in serve.questions(name)]
    for name, count in slots.items():
        seen, arguments = record[name], record[name]["arguments"]
        assert len(told) == 4 and told <= set(arguments)
        assert arguments == server.arguments("base", count, ["past"])
        assert arguments[arguments.index("--max-loras") + 1] == str(count)
        assert seen["listed"] == ["base", "past"]
        assert seen["listed after"] == ["base", "past", "plural"] and seen["added"][0] == 200
        limit = arguments[arguments.index("--max-lora-rank") + 1]
        status, message = seen["refused"]
        assert record["adapters"]["wide"]["r"] > int(limit) and status >= 400
        assert "rank" in message and limit in message
        assert [(answer["model"], answer["question"]) for answer in seen["answers"]] == asked


def test_a_server_answers_as_generate_does_while_a_slot_is_free() -> None:
    """With every slot taken the adapters still do, and the base alone; beside adapters in a batch it has another's update."""
    record = json.loads(serve.RECORD.read_text())

    def wrong(seen: dict, *names: str) -> int:
        return sum(a["server"] != a["generate"] for a in seen["answers"] if a["model"] in names)

    spare, full = record["a slot to spare"], record["every slot taken"]
    assert wrong(spare, "base", "past", "plural") <= 2, "in fp32 few near-ties fall the other way"
    assert wrong(full, "past", "plural") <= 1 and wrong(full, "base") > 4
    alone = [a["generate"] for a in full["answers"] if a["model"] == "base"]
    assert sum(a != b for a, b in zip(full["base by itself"], alone, strict=True)) <= 1
    first = {answer["model"]: answer["server"] for answer in spare["answers"]}
    assert len(set(first.values())) == 3, "each name is answered by a model of its own"


def test_an_arms_rates_are_compared_within_rounds() -> None:
    rates = throughput.rates({"plain": [2.0, 4.0, 5.0], "LoRA": [4.0, 5.0, 20.0]}, 100)
    assert rates == {"plain": [50.0, 25.0, 20.0], "LoRA": [25.0, 20.0, 5.0]}
    found = throughput.against(rates, "plain")
    assert found["plain"] == (1, 1, 1)
    assert found["LoRA"] == (0.5, 0.25, 0.8)  # not 20 / 25 = 0.8, the ratio of the medians
    with pytest.raises(ValueError):
        throughput.against({"plain": [1.0, 2.0], "LoRA": [1.0]}, "plain")


def reply(tokens: int) -> str:
    return json.dumps({"usage": {"completion_tokens": tokens}, "choices": [{"text": "so"}]})


def test_a_burst_asks_all_at_once_of_its_models_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, together = [], threading.Barrier(throughput.REQUESTS, timeout=60)

    def ask(address: str, path: str, body: dict) -> tuple[int, str]:
        asked.append(body)
        together.wait()  # breaks if one request waits for another's answer
        return 200, reply(throughput.NEW_TOKENS)

    monkeypatch.setattr(throughput.server, "ask", ask)
    assert throughput.burst("", ("past", "plural")) == ["so"] * throughput.REQUESTS
    assert len({body["prompt"] for body in asked}) == throughput.REQUESTS
    models = Counter(body["model"] for body in asked)
    assert models == {"past": throughput.REQUESTS / 2, "plural": throughput.REQUESTS / 2}
    assert all(b["ignore_eos"] and b["max_tokens"] == throughput.NEW_TOKENS for b in asked)


@pytest.mark.parametrize(
    "said", [(200, reply(throughput.NEW_TOKENS - 1)), (404, "no such model")], ids=["short", "404"]
)
def test_a_burst_with_a_short_or_refused_answer_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch, said: tuple[int, str]
) -> None:
    monkeypatch.setattr(throughput.server, "ask", lambda *_: said)
    with pytest.raises(RuntimeError, match="asked"):
        throughput.burst("", ("base",))


def test_the_throughput_record_is_of_the_lanes_arms() -> None:
    record = json.loads(serve.RECORD.read_text())["throughput"]
    rates = record["tokens a processor second"]
    assert record["servers"] == throughput.SERVERS
    assert list(rates) == list(throughput.ARMS)
    assert {len(own) for own in rates.values()} == {throughput.ROUNDS} and throughput.ROUNDS >= 5
    assert record["requests"] == throughput.REQUESTS
    assert record["new tokens"] == throughput.NEW_TOKENS
    assert record["machine"]["threads"] == throughput.THREADS and record["machine"]["processor"]


def test_only_one_of_the_measured_servers_has_lora_and_a_slot_to_spare() -> None:
    """With every slot taken this build answers the base wrong, and what is wrong is no baseline."""
    with_lora = [a for a in throughput.SERVERS.values() if "--enable-lora" in a]
    assert with_lora == [throughput.SERVERS["LoRA"]]
    slots = int(with_lora[0][with_lora[0].index("--max-loras") + 1])
    assert slots == len(throughput.ADAPTERS) + 1
    assert set(throughput.ADAPTERS) <= set(serve.ADAPTERS)
    for asked, models in throughput.ARMS.values():
        arguments = throughput.SERVERS[asked]
        named = {a.split("=")[0] for a in arguments if "=" in a}
        assert set(models) <= named | {arguments[arguments.index("--served-model-name") + 1]}


class Process(NamedTuple):
    """As psutil has them."""

    told: str
    user: float
    system: float

    def name(self) -> str:
        return self.told

    def cpu_times(self) -> Process:
        return self


def test_of_a_server_only_what_computes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, worker = Process("VLLM::EngineCore", 50, 5), Process(server.WORKER, 3, 0.25)

    def family(*processes: Process) -> None:
        children = SimpleNamespace(children=lambda recursive: list(processes))
        monkeypatch.setattr(server.psutil, "Process", lambda number: children)

    family(waiting, worker)
    assert server.processor_seconds(1) == 3.25
    family(waiting)
    with pytest.raises(RuntimeError, match="0 processes called"):
        server.processor_seconds(1)
