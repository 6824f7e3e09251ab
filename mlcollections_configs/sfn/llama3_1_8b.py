"""SfN's Merge and Delta of Llama-3.1-8B and DeepSeek-R1-Distill-Llama-8B, on AIME 2024.

  python -m experiments.sfn --config=llama3_1_8b --workdir=DIR

See `qwen2_5_math_1_5b`; both checkpoints have heads of their own. Of a larger pair the paper also copies the
last norm, embedding and head beside o_proj. Outputs have at most 16384 tokens.
"""

from ml_collections import ConfigDict

from mlcollections_configs.sfn import qwen2_5_math_1_5b


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = qwen2_5_math_1_5b.get_config()
  config.base = 'Llama-3.1-8B'
  config.tuned = 'DeepSeek-R1-Distill-Llama-8B'
  config.untie = False
  config.merges = (
    ('o_proj',), ('q_proj', 'k_proj', 'v_proj'), ('mlp',), ('o_proj', 'norm', 'lm_head', 'embed_tokens'),
  )  # fmt: skip
  config.answers.update(
    model=dict(name='llama3_1_8b', dtype='bfloat16', param_dtype='bfloat16'),
    tokenizer='Llama-3.1-8B/tokenizer.json',
    max_new_tokens=16384,
    end=128001,
  )
  config.reported = (
    'o_proj changes most; merging it alone makes outputs longer, and not more right.'
  )
  return config
