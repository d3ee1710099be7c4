"""What a LoRA training step takes: the sizes of a model, and bytes by what they are for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama- or Qwen2-like model. `width` is the hidden size, `kv_width` that of keys and values together
    over their heads, `intermediate` that of the MLP."""

    layers: int
    width: int
    intermediate: int
    kv_width: int
    vocabulary: int
    tied: bool
    query_width: int | None = None
    """That of the queries over their heads, where it is not `width` (Qwen3, Mistral-Nemo)."""

    @classmethod
    def from_config(cls, config: dict) -> "Shape":
        """From a model's `config.to_dict()` or config.json."""
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        queries = config["num_attention_heads"] * head
        return cls(
            query_width=None if queries == config["hidden_size"] else queries,
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            intermediate=config["intermediate_size"],
            kv_width=config["num_key_value_heads"] * head,
            vocabulary=config["vocab_size"],
            tied=config["tie_word_embeddings"],
        )

    @property
    def linear(self) -> int:
        """Parameters of the linear layers inside the blocks, which are those that LoRA adapts and 4 bits shrink."""
        attention = 2 * self.width * ((self.query_width or self.width) + self.kv_width)
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output layer where it is not tied."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    def adapter(self, r: int) -> int:
        """Parameters of LoRA of rank r on all linear layers: r·(in + out) each."""
        attention = 4 * self.width + 2 * ((self.query_width or self.width) + self.kv_width)
        return self.layers * r * (attention + 3 * (self.width + self.intermediate))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a LoRA training step, by what they are for."""

    weights: int
    adapters: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.moments
            + self.activations
            + self.logits
        )


def estimate_memory(
    n_params: int,
    bits: float,
    *,
    adapter_params: int,
    tokens: int,
    layers: int,
    width: int,
    intermediate: int,
    vocabulary: int,
    compute_bytes: int = 4,
    embedding_params: int = 0,
    embedding_bytes: int = 4,
    moment_bytes: float = 8,
    checkpointing: bool = False,
    dropout: bool = False,
    more_logits: int = 0,
) -> MemoryEstimate:
    """Memory of one LoRA training step on all linear layers of a Llama- or Qwen2-like model, in bytes.

    With N = `n_params` weights of `bits` bits each, E `embedding_params`, P `adapter_params`, T `tokens` a step
    (batch × length), L `layers`, d `width`, f `intermediate`, V `vocabulary` and c `compute_bytes` a number:

    - weights: N·bits/8 + E·embedding_bytes;
    - adapters and their gradients, in fp32: 4·P each; Adam's two moments: `moment_bytes`·P (8 in fp32, 2 in 8 bits);
    - activations kept for the backward pass: c·T·(8d + 4f) a layer: per block two residuals and two normed inputs (4d),
      queries, attention's output and its copy (3d), keys and values with what is small (d), and the MLP's gate, its SiLU,
      up and their product (4f). With checkpointing c·T·d a layer, and one layer's activations while it is recomputed;
    - with `dropout` c·T·(9d + f) a layer more: a mask for what enters each adapter (6d + f; on a GPU a byte a number, and not
      c), and the copies that three or two adapters of one input no longer share (3d);
    - logits: the logits (c·T·V) and, in fp32, a copy if c < 4, their log-softmax and the gradient; and `more_logits` sets in
      fp32 (4·T·V each) that the loss holds beside them, as a distillation's does with its teachers'.

    Attention that stores its T×T weights is left out.
    """
    layer = compute_bytes * tokens * (8 * width + 4 * intermediate)
    if dropout:
        layer += compute_bytes * tokens * (9 * width + intermediate)
    logits = (
        tokens * vocabulary * (compute_bytes + 8 + (4 + compute_bytes if compute_bytes < 4 else 0))
    ) + 4 * tokens * vocabulary * more_logits
    if checkpointing:
        # A block is recomputed when the logits are gone, so only the larger of the two counts.
        activations = compute_bytes * tokens * width * layers + max(0, layer - logits)
    else:
        activations = layers * layer
    return MemoryEstimate(
        weights=int(n_params * bits / 8) + embedding_params * embedding_bytes,
        adapters=4 * adapter_params,
        gradients=4 * adapter_params,
        moments=int(moment_bytes * adapter_params),
        activations=activations,
        logits=logits,
    )
