"""IbM2 on ImageNet with features of MSN's ViT-S/16: the class token *before* the last norm.

  python -m experiments.ibm2 --config=mlcollections_configs/ibm2/imagenet_msn_vit_small.py \
    --config.model.weights=FILE.safetensors --workdir=DIR

Weights: `vits16_800ep.pth.tar` of github.com/facebookresearch/msn, its `target_encoder` converted once to
safetensors. ViT-B/4 and ViT-L/7: `--config.model.name=vit_base_patch4_224`, and `vit_base_patch7_224` with
`--config.model.width=1024 --config.model.depth=24 --config.model.num_heads=16`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = imagenet_dino_vit_small.get_config()
  config.model = dict(
    name='vit_small_patch16_224',
    width=384,
    depth=12,
    num_heads=6,
    feature='token_before_norm',
    weights='',
    prefix='module.',
    ignore=(r'(fc|head|prototypes).*',),
  )
  return config
