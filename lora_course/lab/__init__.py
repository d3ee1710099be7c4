"""What a chapter uses but does not teach: models, text, profiles, memory, claims and figures."""

from lora_course.lab.agreement import relative_error
from lora_course.lab.claims import Claims, load_claims
from lora_course.lab.corpora import (
    DOMAINS,
    bits_per_byte,
    blocks,
    describe,
    excerpt,
    load_documents,
    load_text,
)
from lora_course.lab.display import fails, say, show_source
from lora_course.lab.estimate import estimate_memory
from lora_course.lab.memory import peak_memory, process_peak, tensor_bytes
from lora_course.lab.models import base_path, describe_base, evaluating, generate, load_base
from lora_course.lab.plots import band, bars, figure, show, style
from lora_course.lab.precision import check_fp16
from lora_course.lab.profiles import Profile, pick_profile, preflight

__all__ = [
    "DOMAINS",
    "Claims",
    "Profile",
    "band",
    "bars",
    "base_path",
    "bits_per_byte",
    "blocks",
    "check_fp16",
    "describe",
    "describe_base",
    "estimate_memory",
    "evaluating",
    "excerpt",
    "fails",
    "figure",
    "generate",
    "load_base",
    "load_claims",
    "load_documents",
    "load_text",
    "peak_memory",
    "pick_profile",
    "preflight",
    "process_peak",
    "relative_error",
    "say",
    "show",
    "show_source",
    "style",
    "tensor_bytes",
]
