"""GPLQ with Swin-T on ImageNet, the paper's setting.

  python -m experiments.gplq --config=swin_tiny --workdir=gs://...

As `deit_small`, with the inputs of patch merging quantized, too. Swin-S and Swin-B:
`--config.network.model.name=swin_small_patch4_window7_224
--config.network.pretrained=swin_small_patch4_window7_224.ms_in1k`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gplq import deit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = deit_small.get_config()
  config.network = deit_small.network('swin_tiny')
  config.reported = (
    'ImageNet accuracy and mean transfer to five data sets: Swin-T in float 81.2 and 70.8, at 4w4a '
    'RepQ-ViT 73.0 and 62.8, direct quantization-aware training for the same epoch 78.5, GPLQ 79.5 and '
    '70.8 (without features mimicked 79.4 and 69.3); at 3w3a RepQ-ViT 52.7 and 39.3, GPLQ 74.2 and 65.8.'
  )
  return config
