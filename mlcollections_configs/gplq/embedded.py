"""GPLQ on a small vision transformer of pasted digits, 0 to 4; 5 to 9 are the classes that it never saw.

  python -m experiments.gplq

Each of 649 training digits lies at eight random places and scales on a plain 16x16 canvas: an epoch is 162
steps of 32 images. Besides the paper's rows there are post-training quantization of weights alone and of
activations alone, and GPLQ without the loss on features.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import vit


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = vit(digits((0, 1, 2, 3, 4), 8 * 649), 'vit_tiny_patch4_16', epochs=20)
  config.network.model.num_classes = 5
  config.transfer = dict(unseen=digits((5, 6, 7, 8, 9), 8 * 648))

  config.bits = ('4w4a', '3w3a')
  config.calibration = 512
  config.batch_size = 32
  config.recipe = dict(
    epochs=1,
    batch_size=32,
    optimizer=dict(name='adamw', weight_decay=0.0),
    schedule=dict(name='constant', base=1e-4),
  )
  config.mimicking = dict(weight=1.0, images=0, multiple=8)

  config.claims = (
    claim('3-bit activations cost at least 3 points more than 3-bit weights', 'accuracy', 3.0,
          'weights alone', 'activations alone'),
    claim('GPLQ at least 2 points above post-training quantization with the same quantizers', 'accuracy', 2.0,
          'GPLQ + QwT', 'PTQ'),
    claim('GPLQ above RepQ-ViT', 'accuracy', 0.0, 'GPLQ + QwT', 'RepQ-ViT'),
    claim('GPLQ within 2 points of direct training under quantization', 'accuracy', -2.0, 'GPLQ + QwT',
          'direct QAT'),
    claim('QwT takes at most a point', 'accuracy', -1.0, 'GPLQ + QwT', 'GPLQ'),
    claim('an epoch lowers the error of features in the principal subspace by 0.05', 'pca_error', 0.05,
          'activations trained', 'activations alone'),
    claim('mimicking lowers it by 0.02', 'pca_error', 0.02, 'activations trained',
          'activations trained, no mimicking'),
    claim('mimicking takes at most 2 points from unseen classes', 'transfer_unseen', -2.0,
          'activations trained', 'activations trained, no mimicking'),
    claim('GPLQ within a point of the float network on unseen classes at 4 bits', 'transfer_unseen', -1.0,
          'GPLQ + QwT', 'float', '4w4a'),
    claim("float weights closer to the first ones than direct training's", 'weight_distance', 0.0, 'GPLQ',
          'direct QAT'),
    claim("final kernels closer to the first float ones than direct training's", 'kernel_distance', 0.0,
          'GPLQ', 'direct QAT'),
  )  # fmt: skip
  config.reported = (
    'Swin-T on ImageNet, accuracy and mean transfer to five data sets: in float 81.2 and 70.8; at 4w4a '
    'RepQ-ViT 73.0 and 62.8, direct training for the same epoch 78.5, GPLQ 79.5 and 70.8; at 3w3a RepQ-ViT '
    '52.7 and 39.3, GPLQ 74.2 and 65.8; squared distance of weights after the epoch 0.049 (GPLQ) and 0.289 '
    '(direct).'
  )
  return config


def claim(
  statement: str, metric: str, margin: float, method: str, baseline: str, bits: str = '3w3a'
) -> dict:
  """Returns the claim that `method` is at a bit-width better than `baseline` by `margin`."""
  higher = metric == 'accuracy' or metric.startswith('transfer')
  return dict(
    statement=statement, metric=f'{bits}_{metric}', baseline=baseline, method=method, margin=margin,
    higher_is_better=higher,
  )  # fmt: skip


def digits(classes: tuple[int, ...], train_size: int) -> dict:
  """Returns pasted digits of some classes; test images show each digit four times."""
  return dict(
    name='pasted_digits',
    train_options=dict(classes=classes, pastes=8),
    test_options=dict(classes=classes, pastes=4),
    num_classes=len(classes),
    train_size=train_size,
  )
