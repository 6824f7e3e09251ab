"""BTM on Places-LT with ResNet-152, the paper's setting (constants of the official code).

The network has ImageNet weights and is frozen, in eval mode; one more bottleneck (2048-512-2048) and the
classifier train for 90 epochs, and on each balanced subset. The second stage has mixup, too. To beat: MiSLAS,
40.4 % (its first stage 29.4 %).
"""

from ml_collections import ConfigDict

from mlcollections_configs.btm import imagenet_lt


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_lt.get_config()
  config.data = dict(name='Places_LT')
  config.groups = dict(boundaries=(131, 288))
  # `layer4_3` is the bottleneck; all before it is public and frozen.
  config.model = dict(name='resnet152', stage_sizes=(3, 8, 36, 4))
  public = r'bn1|layer[123]_\d+|layer4_[012]'
  config.beginning = dict(
    pretrained='resnet152.tv_in1k',
    fresh=('head/.*', 'backbone/layer4_3/.*'),
    frozen=(rf'backbone/(conv1|{public})/.*',),
    eval_mode=(rf'backbone/({public})',),
  )
  config.network.epochs = config.fine_tuning.epochs = 90
  config.second.mixup = 0.2
  config.smoothing = dict(head=0.4, tail=0.1)
  return config
