"""The recipe of chapter 5.1, its lines for PEFT's other methods, and the broken comparison that it prints."""

import dataclasses
import re
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer

from lora_course import lab, training_arguments
from lora_course.experiments import comparison
from lora_course.experiments.neighbours import LINES, OVER_4_BITS, SERVED
from lora_course.export import export_peft, load_peft
from lora_course.lab import study
from lora_course.lab.evidence import differences, interval, verdict
from lora_course.qlora import load_4bit
from tests.recipes import recipe, small
from tests.servers import SERVERS
from tools.chapters import ROOT

CHAPTER = ROOT / "notebooks" / "5_1_comparison.md"


@pytest.mark.slow
def test_5_1_compares_two_methods_by_pairs_each_at_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = recipe("5_1_comparison")
    for long, short in (("range(5)", "range(2)"), ("(1e-4, 2e-4, 4e-4)", "(1e-4, 4e-3)")):  # fmt: skip
        assert code.count(long) == 1
        code = code.replace(long, short)
    given = {
        "texts": lab.load_text("bible", "train")[:20],
        "validation": [lab.load_text("bible", "validation")[0][:2000]],
        "test": [lab.load_text("bible", "test")[0][:2000]],
    }
    load, loaded = AutoModelForCausalLM.from_pretrained, []

    def counting(*given: Any, **how: Any) -> Any:
        assert all(model() is None for model in loaded)  # two of 7B may be one too many
        model = load(*given, **how)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    exec(small(code, steps=3), given)
    assert len(loaded) == 2 * (2 + 2)
    assert given["found"].keys() == {"lora", "dora"} and given["rate"] == 4e-3
    assert all(gap != 0 for gap in given["gaps"])
    kept = [line.split() for line in Path("scores.txt").read_text().splitlines()]
    assert [line[0] for line in kept] == ["lora"] * 4 + ["dora"] * 4
    scored = {arm: [float(line[3]) for line in kept if line[0] == arm][2:] for arm in given["arms"]}
    assert scored == given["found"]
    alone = dict(
        given
    )  # a method against itself: the same A and the same rows, so no difference at all
    assert code.count("use_dora=True, ") == 1
    exec(small(code.replace("use_dora=True, ", ""), steps=3), alone)
    assert alone["gaps"] == [0, 0] and len(set(alone["found"]["lora"])) == 2


def chats(rows: Any) -> list[dict[str, Any]]:
    """Eight times one filled row, as chapter 0.1 makes them."""
    ids = torch.cat([rows[0]["input_ids"][:20], torch.zeros(44, dtype=torch.long)])
    one = {"input_ids": ids, "attention_mask": (torch.arange(64) < 20).long()}
    one["labels"] = ids.where(one["attention_mask"].bool(), -100)
    return [{k: v.tolist() for k, v in one.items()}] * 8


@pytest.mark.slow
def test_chats_are_scored_by_the_loss_of_their_answers_as_the_text_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (scored,) = re.findall(r"`bits` be `(Trainer.*?)`;", CHAPTER.read_text())
    code = small(recipe("5_1_comparison").partition("\nfound = {}")[0], steps=3)
    for old, new in (
        ("lab.blocks(tokenizer, texts, length=64)", "texts"),
        ("lab.bits_per_byte(model, tokenizer, held_out)", scored),
        ("per_device_train_batch_size=8", "per_device_train_batch_size=2"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    rows = lab.blocks(lab.load_base("nano")[1], lab.load_text("bible", "train")[:8], length=64)
    given: dict[str, Any] = {"texts": chats(rows)}
    exec(code, given)
    with torch.no_grad():
        ids = rows[0]["input_ids"][None, :20]
        before = lab.load_base("nano")[0](input_ids=ids, labels=ids).loss
    after = given["score"]("lora", 2e-2, 0, given["texts"])
    assert 0 < after < before.item() - 0.1
    assert Path("scores.txt").read_text().split() == ["lora", "0.02", "0", str(after)]


PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
IDS = torch.arange(5, 69).reshape(2, 32)
STARTS = ("pissa", "olora")  # that change the base


def evaluated(name: str, model: Any = None) -> Any:
    """A line of the chapter's table, as a reader types it after these imports."""
    names = ("BeftConfig", "EvaConfig", "LoHaConfig", "LoraConfig", "OFTConfig", "VeraConfig")
    optimizers = (create_loraplus_optimizer, create_lorafa_optimizer)
    given = {n: getattr(peft, n) for n in names} | {f.__name__: f for f in optimizers}
    return eval(LINES[name], given | {"AdamW": torch.optim.AdamW, "plain": PLAIN, "model": model})


@pytest.mark.parametrize("name", [n for n in LINES if n not in ("plus", "lora_fa")])
def test_a_line_for_peft_gives_a_model_that_starts_as_the_base_and_learns(name: str) -> None:
    torch.manual_seed(0)  # at this rate an unlucky A can make four steps diverge
    base = lab.load_base("nano")[0]
    with torch.no_grad():
        before = base(input_ids=IDS).logits
    config, keywords = evaluated(name), {"low_cpu_mem_usage": True} if name == "eva" else {}
    model = peft.get_peft_model(base, config, **keywords)
    if name == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": IDS}] * 8, show_progress_bar=False)
    with torch.no_grad():
        # decompositions in fp32 and their sum again: 1e-5 of logits of the order of ten
        torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-3, rtol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def adapted(name: str, base: Any) -> Any:
    """The base with the method on it, before any step."""
    if name in ("plus", "lora_fa"):
        return peft.get_peft_model(base, peft.LoraConfig(**PLAIN))
    keywords = {"low_cpu_mem_usage": True} if name == "eva" else {}
    model = peft.get_peft_model(base, evaluated(name), **keywords)
    if name == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": IDS}] * 8, show_progress_bar=False)
    return model


def stepped(name: str, model: Any, steps: int = 3) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if name in ("plus", "lora_fa"):
        optimizer = evaluated(name, model)
    else:
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", LINES)
def test_what_a_server_can_load_is_what_the_table_says(name: str, tmp_path: Path) -> None:
    """Each in its way gives the trained model again: on the untouched base as plain LoRA, or merged."""
    base = lab.load_base("nano")[0]
    start = logits(base)
    model = adapted(name, base)
    starts = {}
    if name in STARTS:
        starts = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
        model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = name
    stepped(name, model)
    trained = logits(model)
    moved = (trained - start).abs().max()

    def far(other: Any) -> float:
        return float((logits(other) - trained).abs().max() / moved)

    folder = tmp_path / "served"
    if name in ("dora", *STARTS):  # the magnitudes are lost, or the changed base: PEFT is silent
        assert model.supports_lora_conversion()
        peft.save_as_lora(tmp_path / "wrong", model, rank=8)
        assert far(peft.PeftModel.from_pretrained(lab.load_base("nano")[0], tmp_path / "wrong")) > 0.01  # fmt: skip
    if SERVED[name] in ("merged", "by PEFT alone"):
        assert model.supports_lora_conversion() == (name == "dora")
        if SERVED[name] == "merged":
            assert far(model.merge_and_unload()) < 1e-4
        else:
            with pytest.raises(ValueError, match="no bias"):
                model.merge_and_unload()
        return
    if SERVED[name] == "LoRA folder" or starts:
        model.save_pretrained(folder, **starts)
    else:
        peft.save_as_lora(folder, model, rank={"loha": 16, "vera": 128}[name])
    config = peft.PeftConfig.from_pretrained(folder)
    assert config.peft_type == "LORA" and not config.use_dora
    assert config.init_lora_weights not in STARTS
    off = far(peft.PeftModel.from_pretrained(lab.load_base("nano")[0], folder))
    assert off < (0.1 if name == "vera" else 1e-4)  # VeRA's update is of rank 256, and cut at 128


def test_veras_file_is_small_without_its_matrices_and_read_again_with_them(tmp_path: Path) -> None:
    """`save_projection=False`: PEFT's default writes both random matrices, and the file is larger than LoRA's."""
    default = dataclasses.replace(evaluated("vera"), save_projection=True)
    assert peft.VeraConfig().save_projection
    sizes = {}
    for name, config in {
        "lora": peft.LoraConfig(**PLAIN),
        "vera": evaluated("vera"),
        "vera by default": default,
    }.items():
        model = peft.get_peft_model(lab.load_base("nano")[0], config)
        stepped("vera", model)
        trained, folder = logits(model), tmp_path / name
        model.save_pretrained(folder)
        sizes[name] = (folder / "adapter_model.safetensors").stat().st_size
        torch.manual_seed(7)  # the matrices come from the config's own seed
        again = peft.PeftModel.from_pretrained(lab.load_base("nano")[0], folder)
        torch.testing.assert_close(logits(again), trained, atol=1e-4, rtol=0)
    assert sizes["vera"] < 0.2 * sizes["lora"] and sizes["vera by default"] > 2 * sizes["lora"]


def test_evas_folder_written_once_more_is_read_right_by_every_server(tmp_path: Path) -> None:
    """Its ranks differ by layer, at one α/r: servers that read one rank need the folder that chapter 4.4 makes of it."""
    torch.manual_seed(0)
    model = adapted("eva", lab.load_base("nano")[0])
    stepped("eva", model)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}  # fmt: skip
    assert len({m.r["default"] for m in layers.values()}) > 1
    assert {m.scaling["default"] for m in layers.values()} == {2.0}
    model.save_pretrained(tmp_path / "trained")
    plain = load_peft(lab.load_base("nano")[0], tmp_path / "trained")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-3, rtol=0)
    export_peft(plain, tmp_path / "adapters", uniform=True)
    for name, read in SERVERS.items():
        served = read(tmp_path / "adapters", lab.load_base("nano")[0])
        assert served.keys() == layers.keys(), name
        for module, update in served.items():
            wanted = layers[module].get_delta_weight("default")
            torch.testing.assert_close(update, wanted, atol=1e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match="stack"):  # ranks that differ
        SERVERS["tgi"](tmp_path / "trained", lab.load_base("nano")[0])


@pytest.mark.parametrize("name", LINES)
def test_which_run_over_a_4_bit_base_is_what_the_table_says(name: str) -> None:
    base = load_4bit(lab.base_path("nano"), compute_dtype=torch.float32)
    start = logits(base)
    if name not in OVER_4_BITS:
        with pytest.raises((TypeError, RuntimeError)):  # PiSSA at once, LoHa at the first batch
            logits(adapted(name, base))
        return
    model = adapted(name, base)
    if name != "olora":  # takes its start off the base, and rounds what is left
        torch.testing.assert_close(logits(model), start, atol=1e-3, rtol=0)
    losses = stepped(name, model)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(("name", "factors"), [("plus", 2), ("lora_fa", 1)])
def test_a_line_for_an_optimizer_steps_what_it_says(name: str, factors: int) -> None:
    model = peft.get_peft_model(lab.load_base("nano")[0], peft.LoraConfig(**PLAIN))
    groups = evaluated(name, model).param_groups
    stepped = [p for group in groups for p in group["params"] if p.requires_grad]
    assert len(stepped) == 28 * factors  # A and B of each linear layer; LoRA-FA B alone
    if name == "plus":
        assert {group["lr"] for group in groups if group["params"]} == {1e-3, 16e-3}


def searched(name: str) -> list[float]:
    """A method's searched rates over LoRA's, one for each text, as the table has them."""
    own = study.load_study("5_1_comparison")
    of = own if name in comparison.METHODS else study.load_study("5_1_neighbours")
    return [
        study.chosen_rate(of, f"{name}/{text}") / study.chosen_rate(own, f"lora/{text}")
        for text in comparison.DOMAINS
    ]


def test_the_neighbours_lines_are_the_studys_and_run_as_arms_of_the_recipe(tmp_path: Path) -> None:
    section = CHAPTER.read_text().split("\n## The neighbours in PEFT")[1]
    code = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    lines, start, trains, search, compare = re.split(r"^# .*:\n", code, flags=re.MULTILINE)
    given: dict[str, Any] = {"plain": PLAIN, "LoraConfig": peft.LoraConfig}
    exec(lines, given)
    neighbours = given["neighbours"]
    assert neighbours.pop("lora_fa") == peft.LoraConfig(**PLAIN)
    for name, config in neighbours.items():
        assert config == evaluated(name), name
    assert given["arms"] == {"lora": peft.LoraConfig(**PLAIN), "eva": neighbours["eva"]}
    for name, times in given["times"].items():
        assert times in searched(name), name
    assert 1 in searched("eva")  # has the recipe's own rates
    tokenizer = lab.load_base("nano")[1]
    rows = lab.blocks(tokenizer, lab.load_text("bible", "train")[:8], length=64)
    how = training_arguments("runs/one", learning_rate=1e-3, max_steps=3, per_device_train_batch_size=2)  # fmt: skip
    how.output_dir = str(tmp_path)
    given |= {"rows": rows, "how": how, "rate": 1e-3, "get_peft_model": peft.get_peft_model, "Trainer": Trainer, "torch": torch}  # fmt: skip
    given["arms"]["lora_fa"] = peft.LoraConfig(**PLAIN)
    given["arm"] = "eva"
    found = []
    # a training must not start from the last one's ranks
    for given["rows"] in (rows, rows, chats(rows)):
        given["model"] = lab.load_base("nano")[0]
        torch.manual_seed(0)
        exec(start, given)
        ranks = {n: m.r["default"] for n, m in given["model"].named_modules() if hasattr(m, "lora_A")}  # fmt: skip
        found.append(ranks)
        assert len(set(ranks.values())) > 1  # it gave each layer its own
        assert given["arms"]["eva"] == neighbours["eva"] and not given["arms"]["eva"].rank_pattern
    assert found[0] == found[1] != found[2]
    given["rows"] = rows
    for arm, trained in (("lora_fa", "lora_B"), ("lora", "lora_")):
        given |= {"arm": arm, "model": lab.load_base("nano")[0]}
        exec(start, given)
        before = {n: p.detach().clone() for n, p in given["model"].named_parameters() if "lora_" in n}  # fmt: skip
        exec(trains, given)
        after = dict(given["model"].named_parameters())
        moved = {n for n, old in before.items() if not torch.equal(after[n], old)}
        assert moved == {n for n in before if trained in n}, arm
    given |= {"arm": "vera", "score": lambda arm, rate, seed, held_out: rate, "validation": []}
    exec(search, given)
    assert list(given["tried"]) == [16e-4, 32e-4, 64e-4]
    given |= {"differences": differences, "found": {"eva": [1.0, 2.0], "lora": [1.5, 1.0]}}
    exec(compare, given)
    assert given["gaps"] == [-0.5, 1.0]


def test_lily_looks_ahead_as_the_chapter_says() -> None:
    """Its router averages over all tokens of a batch, so the first position's output depends on the last token."""
    torch.manual_seed(0)
    config = peft.LilyConfig(r=8, stride_A=2, num_B=2, target_modules="all-linear")
    model = peft.get_peft_model(lab.load_base("nano")[0], config)
    for name, parameter in model.named_parameters():
        if "lily_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    other = IDS.clone()
    other[:, -1] = 900
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits[:, 0] for ids in (IDS, other))
        with model.disable_adapter():
            base_one, base_two = (model(input_ids=ids).logits[:, 0] for ids in (IDS, other))
    assert torch.equal(base_one, base_two) and (one - two).abs().max() > 1e-4


def test_the_line_for_experts_in_one_tensor_reaches_each_of_them() -> None:
    (line,) = re.findall(r"`(LoraConfig\(target_modules=\[\].*?\))`", CHAPTER.read_text())
    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 8, "vocab_size": 100}  # fmt: skip
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **shape, **heads)
    )
    adapted = peft.get_peft_model(model, eval(line, {"LoraConfig": peft.LoraConfig}))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, tensors, factors
    assert all(8 * 4 in p.shape for p in trained.values())  # rank 8 for each of four experts


def test_the_broken_comparison_gives_the_numbers_that_the_exercise_prints() -> None:
    text = CHAPTER.read_text()
    bug = text[text.index("**Find the bug**") : text.index("## Self-test")]
    given: dict = {"interval": interval}
    exec(re.search(r"```python\n(.*?)```", bug, re.DOTALL)[1], given)
    record = study.load_study("5_1_comparison")
    arms = [
        dict(enumerate(comparison.series(record, arm, "shakespeare")))
        for arm in ("adaptive", "lora")
    ]
    printed = [float(n) for n in re.search(r"# (\S+) \((\S+) to (\S+)\)", bug).groups()]
    assert [round(n, 4) for n in given["compare"](*arms)] == printed
    right = differences(*(list(arm.values()) for arm in arms))
    _, low, high = interval(right)
    assert f"from −{-low:.4f} to +{high:.4f}" in bug and verdict(right) == "within noise"
