"""Colinearity Decay with GPT-2 (124M) from scratch, next to plain training and TWEO; nanoGPT's recipe.

  python -m experiments.colinearity_decay --config=gpt2 --workdir=DIR \\
    --config.network.data.train_split=train.npy --config.network.data.test_split=validation.npy

The two files hold tokens of GPT-2's own tokenizer (`jaxlab.data.TokenFile`), here some 9 x 10^9 of
OpenWebText; `train_size` is the number of windows of 1024 in the first. Weights and moments are split over
all chips; larger networks: `--config.network.model.name=gpt2_xl --config.network.model.remat=True`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import outliers


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = outliers.gpt2()
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  config.eval_batch_size = 256
  config.checkpoint_every = 2000
  config.timed = 0

  config.decay = dict(lam=0.1)
  config.penalty = dict(weight=0.01, tau=3.0, power=4.0)
  config.bits = ('8w8a', '6w6a')
  config.schemes = ('stream', 'channel')
  config.calibration = dict(count=512, batch_size=256)
  config.runs = ('plain', 'tweo', 'cd')
  config.reported = 'Nothing with language models: the paper trains ViTs and Swin transformers.'
  return config
