"""Boxes of digits by random CNNs, and MoCo v2 with Tobias on digits on changing grounds; minutes of CPU time.

Localization: 150 enlarged digits on noise, 64x64, a residual network of 48, 96 and 192 channels
without stem. Pretraining: 1297 digits on 32x32 canvases of which each has another ground, a thin network.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views

GROUND = dict(ground='noise', blend='lighter', texture=1.0)
TOBIAS = dict(method='MoCo v2, Tobias')


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  scenes = dict(canvas=32, side=(12, 22), annotations=False, **GROUND)
  config.data = dict(
    name='digit_scenes',
    num_classes=10,
    train_size=1297,
    stored_image=(32, 32, 1),
    mean=0.277,
    std=0.168,
    train_options=dict(pastes=1, seed=0, **scenes),
    test_options=dict(pastes=2, seed=1, **scenes),
  )
  config.augment = views.pasted_digits()

  net = dict(
    model=dict(
      name='cifar_resnet18', stem='identity', stage_sizes=(2, 2, 2), widths=(48, 96, 192),
      strides=(1, 2, 2),
    ),
    features='layer3_1',
  )  # fmt: skip
  config.localization = dict(
    data=dict(
      name='digit_scenes',
      num_classes=10,
      stored_image=(64, 64, 1),
      mean=0.273,
      std=0.161,
      test_options=dict(canvas=64, side=(20, 44), boxes='square', length=150, **GROUND),
    ),
    net=net,
    variants=dict(sigmoid=dict(activation='sigmoid')),
    networks=2,
  )
  config.merging = dict(net=dict(size=64, **net), pooling='average', probability=0.3)

  config.base = 'moco'
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=16, strides=(2, 2, 2))
  config.heads = dict(hidden=128, features=64, style='mlp')
  config.target = dict(momentum=0.99, queue_size=512, temperature=0.2)
  config.recipe = dict(
    epochs=60,
    batch_size=128,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=0.1, warmup_epochs=2),
  )
  config.log_every = 50
  config.checkpoint_every = 300
  config.eval_batch_size = 64
  config.eval = dict(k=20)
  config.claims = (
    claim(
      'neighbors at most half a point below those of MoCo v2', 'knn_fp', 'MoCo v2', -0.5, **TOBIAS
    ),
    claim('not below those with random cells', 'knn_fp', 'MoCo v2, random cells', 0.0, **TOBIAS),
    *localized(),
  )
  config.reported = (
    'A random ResNet-50 localizes objects of CUB-200 and ImageNet "surprisingly well"; MoCo v2 with Tobias '
    'is significantly better downstream, above all in detection, for all sizes of the pretraining set '
    '(figures are not at hand).'
  )
  return config


def localized() -> tuple[dict, ...]:
  """Returns the claims on boxes and cells of random networks."""
  return (
    claim('correct boxes at least 20 points above one in the middle', 'corloc', 'center box', 20.0),
    claim('correct boxes at least 5 points above those of raw pixels', 'corloc', 'raw pixels', 5.0),
    claim('correct boxes at least 20 points above sigmoids', 'corloc', 'random CNN, sigmoid', 20.0),
    claim('at least 80 % of an object in the 8 best cells of 16', 'inside', 'any half of the cells', 30.0),
  )  # fmt: skip


def claim(statement: str, metric: str, baseline: str, margin: float, **method: str) -> dict:
  """Returns the claim that a row is better by `margin`, by default that of the random CNN."""
  own = dict(method='random CNN') | method
  return dict(statement=statement, metric=metric, baseline=baseline, margin=margin, **own)
