"""TWEO with ViT-B/16 on ImageNet from scratch.

  python -m experiments.tweo --config=imagenet_vit_base --workdir=gs://...

The paper names the networks and its own constants (tau 3, p 4, weight 0.01); the recipe is that of DeiT and
Swin at batch 1024, without random erasing and label smoothing. Prepare the data once:
`tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import outliers
from mlcollections_configs.tweo.embedded import claim


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = outliers.imagenet('vit_base_patch16_224', drop_path=0.1, warmup_epochs=20)
  config.checkpoint_every = 5000
  config.timed = 0

  config.penalty = dict(weight=0.01, tau=3.0, power=4.0)
  config.bits = ('8w8a', '6w6a', '4w4a')
  config.calibration = dict(count=512, batch_size=256)
  config.runs = ('plain', 'tweo')

  config.claims = (
    claim('W8A8, residual stream quantized: better', '8w8a_accuracy', 0.0),
    claim('accuracy in float within 0.2 points', 'accuracy', -0.2),
    claim('final peak lower by at least 50', 'peak', 50.0, False),
  )
  config.reported = (
    'Top-1 81.3 without and with TWEO; peak in training 1579 and 38, of the trained network 106 '
    'and 16.'
  )
  return config
