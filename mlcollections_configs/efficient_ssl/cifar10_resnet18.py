"""Single-branch learning with CIFAR ResNet-18 on CIFAR-10, 200 epochs (constants of the official script).

Learning rate 1 at batch 512, CutMix, 10000 negatives of a bank of 2048 channels. The two-view baseline is
SimSiam for as many epochs, at its own learning rate, 0.05 for 256 images, which its predictor keeps. For
CIFAR-100: `--config.data.name=cifar100`; other small networks: `--config.model.name=resnet18`. Prepare the
data once: `tfds build cifar10 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='cifar10')
  config.augment = views.photographs() | dict(blur_probability=0.0)

  config.model = dict(name='cifar_resnet18')
  config.bank = dict(
    negatives=10000, temperature=0.2, momentum=0.5, kl_weight=20.0, power=0.5, cutmix=0.5
  )
  config.head = dict(hidden=2048, features=2048, layers=3)
  config.heads = dict(hidden=2048, features=2048, predictor=512)
  config.two_views = dict(base=0.1, predictor_rate=0.1)
  config.runs = ('npid', 'single_branch', 'simsiam')

  config.recipe = dict(
    epochs=200,
    batch_size=512,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=1.0),
    eval_every=970,  # 10 epochs
  )
  config.log_every = 50
  config.checkpoint_every = 2000

  probe = dict(learning_rate=30.0, epochs=100, batch_size=512, milestones=(60, 80))
  config.eval = dict(k=200, probe=dict(name='sgd', options=probe))
  return config
