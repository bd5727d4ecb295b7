"""GPT-2. Its Conv1D layers store [in, out]; sites show them as [out, in] like every other family."""

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter

ADAPTERS.add(
    "gpt2",
    ModelAdapter(
        blocks="transformer.h",
        kinds=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
)
