"""KV heads on LLaMA2-13B; see `llama2_7b`.

  python -m experiments.kv_heads --config=llama2_13b --workdir=DIR \\
    --config.network.data.train_split=c4.npy --config.network.data.test_split=wikitext2.npy

The two files hold tokens of the model's own tokenizer.
"""

from ml_collections import ConfigDict

from mlcollections_configs.kv_heads.llama2_7b import BY_HEADS, pretrained


def get_config() -> ConfigDict:
  """Returns the settings."""
  model = dict(name='llama2_13b', dtype='bfloat16', param_dtype='bfloat16', remat=True)
  config = pretrained(model, 'llama2_13b.meta-llama/Llama-2-13b-hf', 32000)
  config.decoding.partition = BY_HEADS
  return config
