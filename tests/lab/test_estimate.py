"""The memory of a training step, by hand on a model of a few numbers; against measured peaks: test_profiles.py."""

from lora_course.lab.estimate import Shape, estimate_memory

SHAPE = {"layers": 3, "width": 4, "intermediate": 6, "vocabulary": 10}


def test_each_part_is_what_the_formula_says() -> None:
    step = estimate_memory(
        100, 16, adapter_params=7, tokens=5, embedding_params=11, embedding_bytes=2, **SHAPE
    )
    assert step.weights == 100 * 2 + 11 * 2
    assert step.adapters == step.gradients == 7 * 4 and step.moments == 7 * 8
    assert step.activations == 3 * 4 * 5 * (8 * 4 + 4 * 6)
    assert step.logits == 5 * 10 * (4 + 8)
    assert step.total == 222 + 28 + 28 + 56 + 3360 + 600


def test_16_bits_halve_what_is_kept_and_add_a_copy_of_the_logits() -> None:
    full, half = (
        estimate_memory(0, 16, adapter_params=0, tokens=5, compute_bytes=c, **SHAPE) for c in (4, 2)
    )
    assert half.activations * 2 == full.activations
    assert half.logits == 5 * 10 * (2 + 8 + 4 + 2)


def test_dropout_adds_to_a_layer_and_a_larger_loss_to_the_logits() -> None:
    plain, dropped, distilled = (
        estimate_memory(0, 16, adapter_params=0, tokens=5, **more, **SHAPE)
        for more in ({}, {"dropout": True}, {"more_logits": 4})
    )
    assert dropped.activations - plain.activations == 3 * 4 * 5 * (9 * 4 + 6)
    assert distilled.logits - plain.logits == 5 * 10 * 4 * 4
    assert (dropped.logits, distilled.activations) == (plain.logits, plain.activations)


def test_checkpointing_keeps_one_vector_a_layer_and_the_layer_in_work() -> None:
    step = estimate_memory(0, 16, adapter_params=0, tokens=5, checkpointing=True, **SHAPE)
    one_layer = 4 * 5 * (8 * 4 + 4 * 6)
    assert step.activations == 4 * 5 * 4 * 3 + one_layer - step.logits


def test_a_shape_is_read_from_a_config_and_counts_its_parameters() -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 20, "tie_word_embeddings": False,
    }  # fmt: skip
    shape = Shape.from_config(config)
    assert shape.kv_width == 4 and shape.embedding == 2 * 20 * 8
    q, k, v, o, mlp = 8 * 8, 8 * 4, 8 * 4, 8 * 8, 3 * 8 * 12
    assert shape.linear == 2 * (q + k + v + o + mlp)
    sides = 2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 12)
    assert shape.adapter(3) == 2 * 3 * sides
