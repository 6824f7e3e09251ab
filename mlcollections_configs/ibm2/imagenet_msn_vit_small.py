"""IbM2 on ImageNet with features of MSN's ViT-S/16: the class token *before* the last norm.

  python -m experiments.ibm2 --config=imagenet_msn_vit_small \
    --config.backbone.weights=FILE.safetensors --workdir=DIR

Weights: `vits16_800ep.pth.tar` of github.com/facebookresearch/msn, its `target_encoder` converted once to
safetensors. ViT-B/4 and ViT-L/7: `--config.backbone.model.name=vit_base_patch4_224`, and
`vit_base_patch7_224` with `--config.backbone.model.width=1024`, `depth=24` and `num_heads=16` likewise.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_dino_vit_small.get_config()
  config.backbone = dict(
    model=dict(name='vit_small_patch16_224'),
    feature='token_before_norm',
    prefix='module.',
    ignore=(r'(fc|head|prototypes).*',),
    published='github.com/facebookresearch/msn (vits16_800ep.pth.tar)',
  )
  return config
