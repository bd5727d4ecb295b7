"""GPT-2. Its Conv1D layers store [in, out]; sites show them as [out, in] like every other family."""

from evoprune.fitness.adapters.base import ADAPTERS, AttentionLayout, MlpLayout, ModelAdapter

ADAPTERS.add(
    "gpt2",
    ModelAdapter(
        blocks="transformer.h",
        kinds=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        attention=AttentionLayout("attn", ("attn.c_attn",), "attn.c_proj", ("ln_1",)),
        mlp=MlpLayout("mlp", ("mlp.c_fc",), "mlp.c_proj", ("ln_2",), "n_inner"),
    ),
)
