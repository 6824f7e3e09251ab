"""SfN on any two checkpoints: Delta as tables and pictures, Merge as new checkpoints, tensor by tensor.

  python -m experiments.sfn --config=checkpoints --config.base=DIR --config.tuned=DIR --workdir=DIR

Two folders of safetensors, or files, of one architecture whose blocks are named as transformers names them.
Merges are the paper's: attention's output projection; queries, keys and values; MLPs. For the first with the
last norm, head and embedding: `--config.merges='[[o_proj,norm,lm_head,embed_tokens]]'`; half of each:
`--config.base_share=0.5`; Delta alone: `--config.merges='()'`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.base = 'base'
  config.tuned = 'tuned'
  config.bins = 200
  config.merges = (('o_proj',), ('q_proj', 'k_proj', 'v_proj'), ('mlp',))
  return config
