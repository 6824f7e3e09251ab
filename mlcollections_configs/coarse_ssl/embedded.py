"""MoCo v2 on coarse crops of scenes of two digits, against whole scenes and random boxes, at equal steps.

2000 scenes of 64x64 pixels with two digits of 18 to 24, at least 8 apart, on weak noise; a random residual
network says where they are. Backbones are judged on single digits of 28x28, and by which digits 500 test
scenes show, at 28x28 too.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  scenes = dict(
    canvas=64, num_objects=2, side=(18, 24), gap=8, boxes='square', ground='noise', blend='lighter',
    texture=0.5,
  )  # fmt: skip
  config.data = dict(
    name='digit_scenes',
    num_classes=10,
    multi_label=True,
    train_size=2000,
    stored_image=(64, 64, 1),
    image_size=28,
    mean=0.147,
    std=0.15,
    train_options=dict(length=2000, **scenes),
    test_options=dict(length=500, **scenes),
    test_decode=dict(size=28, stretch=True),
  )
  config.judged = dict(
    name='pasted_digits',
    stored_image=(28, 28, 1),
    mean=0.147,
    std=0.15,
    train_options=dict(canvas=28, side=(18, 24)),
    test_options=dict(canvas=28, side=(18, 24), pastes=2),
  )
  config.augment = views.pasted_digits()

  config.net = dict(
    model=dict(
      name='cifar_resnet18', stem='identity', stage_sizes=(2, 2, 2), widths=(48, 96, 192),
      strides=(1, 2, 2),
    ),
    features='layer3_1',
  )  # fmt: skip
  config.boxes = dict(expand=1.2, big=0.15, rounds=8)
  config.crop_size = 28
  config.truth = 'boxes'

  config.base = 'moco'
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=16, strides=(2, 2, 2))
  config.heads = dict(hidden=128, features=64, style='mlp')
  config.target = dict(momentum=0.99, queue_size=512, temperature=0.2)
  config.runs = ('full', 'random', 'coarse', 'true')
  config.recipe = dict(
    epochs=40,
    batch_size=128,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=0.1, warmup_epochs=2),
  )
  config.log_every = 50
  config.checkpoint_every = 300
  config.eval_batch_size = 96
  config.eval = dict(k=20)
  config.scenes_eval = dict(k=20, bank=2000)
  config.claims = (
    claim('neighbors at most half a point below those from whole scenes', 'coarse crops', 'knn_fp'),
    claim('true boxes: at most half a point below', 'true boxes, enlarged', 'knn_fp'),
  )
  config.reported = (
    'Crops first, then MoCo v2, DenseCL or MAE on MS-COCO: better than on whole scenes in classification, '
    'detection and segmentation (from the abstract; figures are not at hand).'
  )
  return config


def claim(statement: str, method: str, metric: str) -> dict:
  """Returns the claim that a row is at most half a point below whole scenes."""
  return dict(
    statement=statement, metric=metric, baseline='whole scenes', method=method, margin=-0.5
  )
