"""QwT on ImageNet with public weights: networks, bits (and 8w8a) and calibration of the paper's table.

  python -m experiments.qwt --config=imagenet --workdir=gs://...
  ... '--config.networks=["vit_small","swin_tiny"]'

Ranges from 32 training images, compensation from 512. Weights are timm's; the paper takes ResNet-18 and 50
from BRECQ, a point better. Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import imagenet_networks


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.networks = ('deit_tiny', 'deit_small', 'deit_base')
  config.network = imagenet_networks()

  config.bits = ('8w8a', '6w6a', '4w4a')
  config.calibration = dict(ranges=32, compensation=512, batch_size=32)

  # QwT* and PTQ*: one epoch, as in the paper, which gives no settings of the optimizer.
  config.fine_tuning = dict(
    recipe=dict(
      epochs=1,
      batch_size=256,
      optimizer=dict(name='adamw', weight_decay=0.05),
      schedule=dict(name='cosine', base=1e-4),
    ),
    bits='all',
    label_smoothing=0.1,
  )
  return config
