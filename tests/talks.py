"""Short talks, and a chat template that says which of their tokens are answers."""

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Answer:\n{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}Question: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
TALKS = [
    ("What is one and one?", "two"), ("Who wrote the play?", "Shakespeare wrote it, long ago"), ("Say no.", "no"),
    ("Where is the sea?", "beyond the hills"), ("Count.", "one two three four"), ("Name a colour.", "blue"),
]  # fmt: skip
