"""CIFAR-10 with 4000 labels, Shake-Shake-26 2x96d: the paper's headline, error 5.72 %.

  python -m experiments.r2d2 --config=cifar10_shake_shake --workdir=DIR

Everything is that of the official script (DoctorKey/R2D2.pytorch) on four GPUs, learning rates times 4, but
for stage 1, which its README runs on one. There each GPU normalizes its own part of a batch, here all
normalize the whole; `--config.model.norm_groups=4` is as there, in stage 1, too.
"""

from ml_collections import ConfigDict

from mlcollections_configs.r2d2 import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='cifar10', mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
  )  # fmt: skip
  config.labeled = dict(per_class=400)
  config.augment = dict(kind='pad_crop', padding=4, fill='reflect', flip=True, cutout=16)
  config.model = dict(name='shake_shake26_2x96d')
  sgd = dict(name='sgd', momentum=0.9, nesterov=True, weight_decay=2e-4)
  config.supervised = dict(
    epochs=300, batch_size=40, optimizer=sgd, schedule=dict(base=0.05, decay_epochs=350)
  )
  config.method = dict(
    labeled_batch=128, repredict=(300, 375, 450, 525), alpha=0.1, beta=0.03, rate=4000.0
  )
  config.decipher = dict(
    epochs=600,
    batch_size=512,
    optimizer=sgd,
    schedule=embedded.schedule((300, 375, 450, 525), (0.12, 0.12, 0.08, 0.04, 0.004)),
  )
  config.tuning = dict(epochs=50, batch_size=512, optimizer=sgd, schedule=dict(base=0.01))
  config.claims = embedded.claims()
  config.reported = embedded.get_config().reported
  return config
