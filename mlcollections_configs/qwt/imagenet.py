"""QwT on ImageNet with public weights: networks, bits (and 8w8a) and calibration of the paper's table.

  python -m experiments.qwt --config=mlcollections_configs/qwt/imagenet.py --workdir=gs://...
  ... '--config.networks=("vit_small","swin_tiny")'

Ranges from 32 training images, compensation from 512, both under bicubic random resized crops, flips and
RandAugment (timm's rand-m9-mstd0.5-inc1) as in the official code, which crops from the full photograph (here:
from its center of 256x256). Weights are timm's; the paper takes ResNet-18 and 50 from BRECQ, a point better.
Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import embedded

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# network: (weights of timm, normalization, length of the shorter side before the central crop of 224)
NETWORKS = {
  'deit_tiny': ('deit_tiny_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_small': ('deit_small_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_base': ('deit_base_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_tiny_distilled': ('deit_tiny_distilled_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_small_distilled': ('deit_small_distilled_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_base_distilled': ('deit_base_distilled_patch16_224.fb_in1k', IMAGENET, 256),
  'vit_small': ('vit_small_patch16_224.augreg_in21k_ft_in1k', HALF, 248),
  'vit_base': ('vit_base_patch16_224.augreg_in21k_ft_in1k', HALF, 248),
  'swin_tiny': ('swin_tiny_patch4_window7_224.ms_in1k', IMAGENET, 248),
  'swin_small': ('swin_small_patch4_window7_224.ms_in1k', IMAGENET, 248),
  'swin_base': ('swin_base_patch4_window7_224.ms_in1k', IMAGENET, 248),
  'resnet18': ('resnet18.tv_in1k', IMAGENET, 256),
  'resnet50': ('resnet50.tv_in1k', IMAGENET, 256),
  'resnet101': ('resnet101.tv_in1k', IMAGENET, 256),
}


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = ConfigDict()
  config.seed = 0
  config.networks = ('deit_tiny', 'deit_small', 'deit_base')
  config.networks_dir = ''
  config.bits = ('8w8a', '6w6a', '4w4a')
  config.calibration = dict(ranges=32, compensation=512, batch_size=32)
  config.qwt = dict(method=dict(), options=dict(dtype='float16', target='local', start_block=0))
  config.qwt.fine_tuning = fine_tuning()
  config.network = {name: network(*choice) for name, choice in NETWORKS.items()}
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.claims = ()
  return config


def fine_tuning() -> dict:
  """Returns the training of QwT*: one epoch, as in the paper, which gives no settings of the optimizer."""
  return embedded.fine_tuning() | dict(
    bits='all',
    batch_size=256,
    label_smoothing=0.1,
    log_every=100,
  )


def network(weights: str, normalization: tuple, resize: int) -> dict:
  """Returns the section of a network with public weights."""
  convolutional = weights.startswith('resnet')
  mean, std = normalization
  section = dict(
    task='classification',
    pretrained=weights,
    model=dict(name=weights.partition('.')[0]),
    data=dict(
      name='imagenet2012',
      train_split='train',
      test_split='validation',
      train_options=dict(decode=False),
      test_options=dict(decode=False),
      train_decode=dict(size=256, draft=True),
      test_decode=dict(size=224, resize=resize, interpolation='bicubic'),
      train_size=1281167,
      stored_image=(256, 256, 3),
      image_size=224,
      channels=3,
      mean=mean,
      std=std,
      num_threads=16,
      num_workers=16,
    ),
    augment=dict(
      scale=(0.08, 1.0),
      jitter=None,
      grayscale_probability=0.0,
      blur_probability=0.0,
      flip_probability=0.5,
      interpolation='bicubic',
      rand_augment=dict(magnitude=9.0, magnitude_std=0.5, num_ops=2, increasing=True),
    ),
    batch_size=256,
    eval_batch_size=512,
    quantization='percentile' if convolutional else 'repq',
    edges=r'patch_embed/proj|head|head_dist|head/fc|conv1|fc',
    blocks=r'layer\d_\d+' if convolutional else r'(layers_\d/)?blocks_\d+',
  )
  # 8 gives what the official code does to ResNets, whatever bits are asked for.
  if weights.startswith('swin'):
    section['layer_blocks'] = r'layers_\d/(blocks_\d+|downsample)'  # QwT-v2: patch merging, too
  return section | (dict(conv_act_bits=None) if convolutional else {})
