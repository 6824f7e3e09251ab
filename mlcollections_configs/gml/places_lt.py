"""GML on Places-LT: ResNet-152 with ImageNet weights, frozen, and one more bottleneck that is trained.

Bottleneck and classifier as in the first stage of MiSLAS (90 epochs, batch 256), without mixup; classifiers
as on ImageNet-LT.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gml import imagenet_lt


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_lt.get_config()
  config.data = dict(name='Places_LT')
  # One more bottleneck (2048-512-2048) at the network's end, `layer4_3`; all before it is public and frozen.
  config.model = dict(name='resnet152', stage_sizes=(3, 8, 36, 4))
  public = r'bn1|layer[123]_\d+|layer4_[012]'
  config.beginning = dict(
    pretrained='resnet152.tv_in1k',
    fresh=('head/.*', 'backbone/layer4_3/.*'),
    frozen=(rf'backbone/(conv1|{public})/.*',),
    eval_mode=(rf'backbone/({public})',),
  )
  config.network.schedule.name = 'cosine_per_epoch'
  return config
