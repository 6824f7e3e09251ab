"""SSQL with CIFAR ResNet-18 on CIFAR-10, the paper's setting (constants of the official code).

  python -m experiments.ssql --config=mlcollections_configs/ssql/cifar10_resnet18.py --workdir=DIR

400 epochs at batch 512, the linear probe for 100. `norm_groups=4` is the batch norm of the authors' four GPUs
with 128 images each. Prepare the data once: `tfds build cifar10 --file_format=array_record`.
For CIFAR-100: `--config.data.name=cifar100`; BYOL: `--config.base=byol`. MoCo v2 differs in more: see
`cifar10_moco.py`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.data = dict(
    name='cifar10',
    train_split='train',
    test_split='test',
    train_options=dict(),
    test_options=dict(),
    train_size=50000,
    stored_image=(32, 32, 3),
    image_size=32,
    channels=3,
    num_threads=8,
  )
  config.augment = dict(
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.0,
    flip_probability=0.5,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
  )
  config.model = dict(
    backbone=dict(name='cifar_resnet18', norm_groups=4),
    projector=dict(hidden=2048, features=2048),
    predictor_hidden=2048,
  )
  config.momentum = 0.99

  config.batch_size = 512
  config.epochs = 400
  config.optimizer = dict(name='sgd', momentum=0.9, weight_decay=5e-4)
  config.schedule = dict(name='cosine_per_epoch', base=0.05)
  config.checkpoint_every = 2000

  config.eval.update(
    calibration=128,
    k=200,
    probe=dict(name='sgd', learning_rate=30.0, epochs=100, batch_size=512, milestones=(60, 80)),
  )
  return config
