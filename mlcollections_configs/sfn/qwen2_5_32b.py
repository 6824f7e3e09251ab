"""SfN's Freeze of Qwen2.5-32B-Instruct on s1K, as `qwen2_5_14b`.

  python -m experiments.sfn --config=qwen2_5_32b --workdir=gs://...

Destruction is of blocks 5 to 29 of 64, measured as the rise of the loss of the test traces; the paper's
network is the base, `--config.network.pretrained=qwen2_5_32b.Qwen/Qwen2.5-32B` with
`--config.network.model.epsilon=1e-5`:
`--config.destroyed='[[q_proj],[k_proj],[v_proj],[o_proj],[up_proj],[gate_proj],[down_proj]]'`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.sfn import qwen2_5_14b


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = qwen2_5_14b.get_config()
  config.network.model = dict(name='qwen2_5_32b', epsilon=1e-6, remat=True)
  config.network.pretrained = 'qwen2_5_32b.Qwen/Qwen2.5-32B-Instruct'
  config.reported = (
    'AIME 2024 / MATH-500 / GPQA and steps a second: before .167 / .836 / .485; F1 .200 / .756 / .444, .055; '
    'F2 .367 / .890 / .520, .052; F3 .300 / .886 / .525, .044; F4 .367 / .906 / .591, .015. Destroyed by '
    'zeros, values and output projections leave fluent text, queries, keys and MLPs random tokens.'
  )
  return config
