"""KV heads on BLOOMZ-7B1, whose keys fold as values do; see `llama2_7b`.

  python -m experiments.kv_heads --config=bloomz_7b1 --workdir=DIR \\
    --config.network.data.train_split=c4.npy --config.network.data.test_split=wikitext2.npy

The two files hold tokens of the model's own tokenizer. LoRA has one pair for the layer that makes queries,
keys and values together, where Llama has three.
"""

from ml_collections import ConfigDict

from mlcollections_configs.kv_heads.llama2_7b import pretrained


def get_config() -> ConfigDict:
  """Returns the settings."""
  model = dict(name='bloom_7b1', dtype='bfloat16', param_dtype='bfloat16', remat=True)
  config = pretrained(model, 'bloom_7b1.bigscience/bloomz-7b1', 250880)
  config.runs = ('svd_a', 'svd_w', 'mean')
  config.decoding.length = 2048
  return config
