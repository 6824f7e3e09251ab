"""MoCo v2 with Tobias, ResNet-50 on 10000 images of ImageNet, 200 epochs (constants of the official code).

Input 112, learning rate 0.3 at batch 256; cells are split by a random ResNet-50 whose 7x7 map is pooled to
4x4. Photographs are decoded to 256x256 and merged there; the official code resizes both to 224 and back.
The frozen backbone is judged on ImageNet at 224, the paper's detectors are not here. For 800 epochs:
`--config.recipe.epochs=800`; for all images
`--config.data.train_split=train --config.data.train_size=1281167`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views
from mlcollections_configs.tobias import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='imagenet2012', train_split='train[:10000]', train_size=10000, image_size=112
  )
  config.augment = views.photographs()

  net = dict(model=dict(name='resnet50'), features='layer4_2', size=224)
  config.merging = dict(net=net, pooling='max', probability=0.3)

  config.base = 'moco'
  config.model = dict(name='resnet50', norm_groups=8)
  config.heads = dict(hidden=2048, features=128)
  config.target = dict(momentum=0.999, queue_size=65536, temperature=0.2)
  config.recipe = dict(
    epochs=200,
    batch_size=256,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=0.3),
  )
  config.log_every = 39
  config.checkpoint_every = 780
  config.eval_batch_size = 1024
  config.eval = dict(
    k=200,
    probe=dict(
      name='sgd', options=dict(learning_rate=30.0, epochs=100, batch_size=256, milestones=(60, 80))
    ),
  )
  config.reported = embedded.get_config().reported
  return config
