"""SfN's Merge and Delta of Qwen2.5-Math-1.5B and DeepSeek-R1-Distill-Qwen-1.5B, on AIME 2024.

  python -m experiments.sfn --config=qwen2_5_math_1_5b --workdir=DIR

`base` and `tuned` are folders of both repositories of huggingface.co, `answers.file` the 30 problems, a
line of JSON with `problem` and `answer` each. The base's embedding is its head, too, the tuned one has a
head of its own: both are given one. Outputs are greedy, of at most 8192 tokens, in bfloat16 (the paper:
float16); a problem counts where a box contains its answer. Other pairs are this setting with `base`,
`tuned` and `answers.model` changed: of 7B and 14B 16384 tokens. Outputs are kept in `answers/`; a killed run
goes on.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.base = 'Qwen2.5-Math-1.5B'
  config.tuned = 'DeepSeek-R1-Distill-Qwen-1.5B'
  config.untie = True
  config.bins = 200
  config.merges = (('o_proj',), ('q_proj', 'k_proj', 'v_proj'), ('mlp',))
  config.answers = dict(
    model=dict(
      name='qwen2_5_1_5b', tied=False, rope_theta=1e4, dtype='bfloat16', param_dtype='bfloat16'
    ),
    file='aime_2024.jsonl',
    tokenizer='Qwen2.5-Math-1.5B/tokenizer.json',
    max_new_tokens=8192,
    max_prompt=512,
    end=151643,
    batch_size=30,
  )
  config.reported = (
    'AIME 2024, accuracy and mean tokens: A .067, 2421; o_proj .200, 5418; q, k, v .000, 2058; MLPs .000, '
    '15532; B .233, 11892.'
  )
  return config
