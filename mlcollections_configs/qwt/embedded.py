"""QwT on small networks trained here: vision transformers and a ResNet on digits, a byte-level GPT-2.

  python -m experiments.qwt

`vit_massive` starts with two position-embedding entries of +-15, which become massive activations. Every
network is trained once (a few minutes together) and kept in `networks_dir` for the papers that ask for it.
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
  config.calibration = dict(ranges=64, compensation=512, batch_size=32)

  # QwT* and PTQ*: one epoch, as in the paper, which gives no settings of the optimizer.
  config.fine_tuning = dict(
    recipe=dict(
      epochs=1,
      batch_size=32,
      optimizer=dict(name='adamw', weight_decay=0.05),
      schedule=dict(name='cosine', base=1e-4),
    ),
    bits='lowest',
  )

  config.claims = (
    gain('QwT', 'vit', '2w3a', 4.0),
    gain('QwT', 'vit_massive', '2w3a', 4.0),
    gain('QwT', 'resnet', '2w3a', 0.0),
    lower('QwT', 'vit', '2w3a', 0.3),
    lower('QwT', 'vit_massive', '2w3a', 0.3),
    lower('QwT', 'resnet', '2w3a', 0.1),
    lower('QwT', 'text', '2w3a', 0.1),
    gain('QwT', 'vit', '4w4a', -0.5),
    gain('QwT', 'vit', '8w8a', -0.5),
    gain('QwT', 'resnet', '4w4a', -0.5),
    gain('QwT', 'resnet', '8w8a', -0.5),
    gain('QwT*', 'vit', '2w3a', 0.0, 'QwT'),
    gain('QwT*', 'vit', '2w3a', 1.0, 'PTQ*'),
    gain('QwT*', 'resnet', '2w3a', 0.0, 'QwT'),
    gain('QwT*', 'resnet', '2w3a', 1.0, 'PTQ*'),
  )
  config.reported = (
    'ImageNet at 4w4a, accuracy before and with QwT: DeiT-T 58.2 and 61.4, ViT-S 65.8 and 70.8, '
    'ViT-B 68.5 and 76.3, ResNet-18 58.3 and 68.9, ResNet-50 68.4 and 74.5; at 6w6a some tenths '
    'of a point.'
  )
  return config
