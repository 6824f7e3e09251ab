"""iSQRT-COV with ResNet-50 on Stanford Cars; else as `cub_isqrt_resnet50`.

Prepare the data once: `tfds build cars196 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.fgia import cub_isqrt_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_isqrt_resnet50.get_config()
  config.recognition.data = cub_isqrt_resnet50.data('cars196')
  config.checkpoint_every = 814
  config.reported = (
    'Stanford Cars, ResNet-50: 92.8 % with iSQRT-COV (92.3 in a re-run), ResNet-101 93.3 %.'
  )
  return config
