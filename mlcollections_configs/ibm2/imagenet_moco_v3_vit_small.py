"""IbM2 on ImageNet with features of MoCo v3's ViT-S/16 (12 heads in its code, in place of 6).

  python -m experiments.ibm2 --config=imagenet_moco_v3_vit_small \
    --config.backbone.weights=FILE.safetensors --workdir=DIR

Weights: `vit-s-300ep.pth.tar` of github.com/facebookresearch/moco-v3, its `state_dict` converted once to
safetensors. All else as with DINO.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_dino_vit_small.get_config()
  config.backbone = dict(
    model=dict(name='vit_small_patch16_224', num_heads=12),
    feature='output',  # the class token behind the last norm
    prefix='module.base_encoder.',
    ignore=(r'head\..*',),
    published='github.com/facebookresearch/moco-v3 (vit-s-300ep.pth.tar)',
  )
  return config
