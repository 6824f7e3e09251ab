"""MoCo v2 with ResNet-50 on coarse crops of MS-COCO train2017, 400 epochs' steps (constants inferred).

The setting of the group's sister paper: SGD, learning rate 0.3, weight decay 1e-4. Photographs are
stretched to 224 on the host, for the map (a random ResNet-50 with stride 1 in its last stage, 14x14)
and before they are cut; the backbone is judged on ImageNet. The images lie in one class folder:
`coco/train/all/*.jpg`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views
from mlcollections_configs.coarse_ssl import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='image_folder',
    num_classes=1,
    train_size=118287,
    stored_image=(224, 224, 3),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    train_options=dict(root='coco'),
    test_options=dict(root='coco'),
    train_decode=dict(size=224, stretch=True),
    test_decode=dict(size=224, stretch=True),
    num_threads=16,
    num_workers=16,
  )
  config.judged = dict(name='imagenet2012')
  config.augment = views.photographs()

  config.net = dict(model=dict(name='resnet50', strides=(1, 2, 2, 1)), features='layer4_2')
  config.boxes = dict(expand=1.4, big=0.6, rounds=3)
  config.crop_size = 224

  config.base = 'moco'
  config.model = dict(name='resnet50', norm_groups=8)
  config.heads = dict(hidden=2048, features=128)
  config.target = dict(momentum=0.999, queue_size=65536, temperature=0.2)
  config.runs = ('full', 'coarse')
  config.recipe = dict(
    epochs=400,
    batch_size=256,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=0.3),
  )
  config.log_every = 50
  config.checkpoint_every = 5000
  config.eval_batch_size = 1024
  config.eval = dict(
    k=200,
    probe=dict(
      name='sgd', options=dict(learning_rate=30.0, epochs=100, batch_size=256, milestones=(60, 80))
    ),
  )
  config.reported = embedded.get_config().reported
  return config
