"""Colinearity Decay with DeiT-S on ImageNet, next to plain training and TWEO: 300 epochs at batch 1024.

  python -m experiments.colinearity_decay --config=imagenet_deit_small --workdir=gs://...

The recipe is DeiT's without random erasing and label smoothing; the paper's is not known. DeiT-B:
`--config.network.model.name=deit_base_patch16_224`. Prepare the data once:
`tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import outliers
from mlcollections_configs.colinearity_decay.embedded import REPORTED


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = outliers.imagenet('deit_small_patch16_224', drop_path=0.1, warmup_epochs=5)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.eval_batch_size = 1024
  config.checkpoint_every = 5000
  config.timed = 0

  config.decay = dict(lam=0.1)
  config.penalty = dict(weight=0.01, tau=3.0, power=4.0)
  config.bits = ('8w8a', '6w6a', '4w4a')
  config.schemes = ('linear', 'channel')
  config.pipelines = ('percentiles', 'RepQ', 'RepQ + QwT')
  config.calibration = dict(count=512, batch_size=64)
  config.runs = ('plain', 'tweo', 'cd')
  config.reported = REPORTED
  return config
