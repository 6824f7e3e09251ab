"""QwT-v2 against quantization alone and QwT, on the small networks of QwT's embedded setting.

  python -m experiments.qwt_v2

The teacher is the float network's own activation, which at few bits is the better one (measured on seeds 10
and 11); QwT's, the float layer on the quantized network's input, is a variant, and so is compensation of the
block's output alone. Ranges are found anew on as many images as at first.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import digits_networks, gain, lower


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.networks = ('vit', 'vit_massive', 'resnet', 'text')
  config.network = digits_networks()
  config.networks_dir = 'runs/networks'

  config.bits = ('8w8a', '6w6a', '4w4a', '3w3a', '2w3a')
  config.calibration = dict(ranges=64, compensation=512, batch_size=64)

  config.qwt_v2 = dict(granularity='linear')
  config.fitting = dict(dtype='float32', target='global')
  config.variants = {
    'QwT-v2, local teacher': dict(fitting=dict(dtype='float32', target='local')),
    'QwT-v2, blocks': dict(
      method=dict(granularity='block'), fitting=dict(dtype='float32', target='global')
    ),
  }

  config.claims = (
    gain('QwT-v2', 'vit', '2w3a', 2.0),
    gain('QwT-v2', 'resnet', '2w3a', 0.0),
    lower('QwT-v2', 'vit', '2w3a', 0.1),
    lower('QwT-v2', 'vit_massive', '2w3a', 0.1),
    lower('QwT-v2', 'resnet', '2w3a', 0.1),
    lower('QwT-v2', 'text', '2w3a', 0.1),
    gain('QwT-v2', 'vit', '4w4a', -0.5),
    gain('QwT-v2', 'vit', '8w8a', -0.5),
    gain('QwT-v2', 'resnet', '4w4a', -0.5),
    gain('QwT-v2', 'resnet', '8w8a', -0.5),
  )
  config.reported = (
    'As good as QwT or better (ImageNet, COCO, CLIP, DiT, LLaMA), with far fewer parameters: for '
    'ViT-S 83 thousand, QwT 1.77 million.'
  )
  return config
