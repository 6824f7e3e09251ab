"""The names of weights in PyTorch's checkpoints.

A PyTorch name is a function of ours: `layer1_0/conv1/kernel` is `layer1.0.conv1.weight`. What a code base
calls differently is a short list of renames.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PyTree = Any
StateDict = Mapping[str, np.ndarray]
Renames = Sequence[tuple[str, str]]

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}

# Applied in order to the dotted name, ours -> theirs. ResNets need none: timm's names are torchvision's.
TIMM: Renames = (
  (r'\.attention\.', '.attn.'),
  # ConvNeXt and DenseNet.
  (r'\.ls\.gamma$', '.gamma'),
  (r'^(stages\.\d+\.downsample)\.norm\.', r'\1.0.'),
  (r'^(stages\.\d+\.downsample)\.reduction\.', r'\1.1.'),
  (r'^(conv0|norm0|norm5|denseblock\d+|transition\d+)\.', r'features.\1.'),
)

# timm's PVTs, whose merging layers have names.
TIMM_PVT: Renames = TIMM[:1]

# torchvision numbers layers, where it names none.
TORCHVISION_VIT: Renames = (
  (r'^cls_token$', 'class_token'),
  (r'^pos_embed$', 'encoder.pos_embedding'),
  (r'^patch_embed\.proj\.', 'conv_proj.'),
  (r'^blocks\.(\d+)\.', r'encoder.layers.encoder_layer_\1.'),
  (r'\.attention\.qkv\.', '.self_attention.in_proj_'),
  (r'\.attention\.proj\.', '.self_attention.out_proj.'),
  (r'\.norm([12])\.', r'.ln_\1.'),
  (r'\.mlp\.fc1\.', '.mlp.0.'),
  (r'\.mlp\.fc2\.', '.mlp.3.'),
  (r'^norm\.', 'encoder.ln.'),
  (r'^head\.', 'heads.head.'),
)
TORCHVISION_SWIN: Renames = (
  (r'^patch_embed\.proj\.', 'features.0.0.'),
  (r'^patch_embed\.norm\.', 'features.0.2.'),
  *((rf'^layers\.{i}\.blocks\.', f'features.{2 * i + 1}.') for i in range(4)),
  *((rf'^layers\.{i}\.downsample\.', f'features.{2 * i}.') for i in range(1, 4)),
  (r'\.attention\.', '.attn.'),
  (r'\.mlp\.fc1\.', '.mlp.0.'),
  (r'\.mlp\.fc2\.', '.mlp.3.'),
  (r'^head\.fc\.', 'head.'),
)
_TORCHVISION_ENDS: Renames = (
  (r'^conv_stem\.', 'features.0.0.'),
  (r'^bn1\.', 'features.0.1.'),
  (r'^classifier\.', 'classifier.1.'),
)
TORCHVISION_EFFICIENTNET: Renames = (
  *_TORCHVISION_ENDS,
  (r'^conv_head\.', 'features.8.0.'),
  (r'^bn2\.', 'features.8.1.'),
  (r'\.se\.conv_reduce\.', '.se.fc1.'),
  (r'\.se\.conv_expand\.', '.se.fc2.'),
  *(
    (rf'^blocks\.0\.(\d+)\.{name}\.', rf'features.1.\1.block.{number}.')
    for name, number in (
      ('conv_dw', '0.0'),
      ('bn1', '0.1'),
      ('se', '1'),
      ('conv_pw', '2.0'),
      ('bn2', '2.1'),
    )
  ),
  *(
    (rf'^blocks\.{stage}\.(\d+)\.{name}\.', rf'features.{stage + 1}.\1.block.{number}.')
    for stage in range(1, 7)
    for name, number in (
      *(('conv_pw', '0.0'), ('bn1', '0.1'), ('conv_dw', '1.0'), ('bn2', '1.1')),
      *(('se', '2'), ('conv_pwl', '3.0'), ('bn3', '3.1')),
    )
  ),
)

# Hugging Face's transformers.
HF_GPT2: Renames = ((r'\.ln\.([12])\.', r'.ln_\1.'), (r'^(?!lm_head\.)', 'transformer.'))
HF_GPT2_BARE: Renames = HF_GPT2[:1]  # the published gpt2 files name the decoder without its head
HF_BLOOM: Renames = ((r'^(?!lm_head\.)', 'transformer.'),)
HF_BLOOM_BARE: Renames = ()  # the published bloom files name the decoder without its head
HF_LLAMA: Renames = ((r'^(?!lm_head\.)', 'model.'),)
# BertModel's own names; models with a head put `bert.` or `roberta.` before them.
HF_BERT_BARE: Renames = (
  (r'^(word|position|token_type)_embeddings\.', r'embeddings.\1_embeddings.'),
  (r'^norm\.', 'embeddings.LayerNorm.'),
  (r'^layer\.', 'encoder.layer.'),
  (r'\.attention\.q_proj\.', '.attention.self.query.'),
  (r'\.attention\.k_proj\.', '.attention.self.key.'),
  (r'\.attention\.v_proj\.', '.attention.self.value.'),
  (r'\.attention\.proj\.', '.attention.output.dense.'),
  (r'\.norm1\.', '.attention.output.LayerNorm.'),
  (r'\.norm2\.', '.output.LayerNorm.'),
  (r'\.mlp\.fc1\.', '.intermediate.dense.'),
  (r'\.mlp\.fc2\.', '.output.dense.'),
)
HF_BERT: Renames = (*HF_BERT_BARE, (r'^(?!classifier\.)', 'bert.'))
HF_ROBERTA: Renames = (*HF_BERT_BARE, (r'^(?!classifier\.)', 'roberta.'))

_EFFICIENTNET_PYTORCH: Renames = (
  (r'^(_blocks\.\d+)\.se\.conv_', r'\1._se_'),
  (r'^(_blocks\.\d+)\.bn(\d)\.', r'\1._bn\2.'),
  (r'^(_blocks\.\d+)\.conv_dw\.', r'\1._depthwise_conv.'),
  (r'^(_blocks\.\d+)\.conv_pwl\.', r'\1._project_conv.'),
  (r'^(_blocks\.\d+)\.conv_pw\.', r'\1._expand_conv.'),
  (r'^conv_', '_conv_'),
  (r'^bn1\.', '_bn0.'),
  (r'^bn2\.', '_bn1.'),
  (r'^classifier\.', '_fc.'),
)

# Linear layers whose checkpoint weights are (in, out): transformers' Conv1D.
IN_OUT = re.compile(r'(transformer\.)?h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight')

# Constants that carry no weights: counters, masks, relative positions, rotary frequencies.
BUFFERS = (
  r'(.*\.)?num_batches_tracked',
  r'(layers|features)\.\d+\.(blocks\.)?\d+\.(attn_mask|attn\.relative_position_index)',
  r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',
  r'(.*\.)?rotary_emb\.inv_freq',
  r'((bert|roberta)\.)?embeddings\.position_ids',
)
# Heads of BERT's and RoBERTa's pretraining, which their encoder does without.
PRETRAINING_HEADS = (
  r'((bert|roberta)\.)?pooler\.dense\.(weight|bias)|cls\..*'
  r'|lm_head\.(bias|(dense|layer_norm|decoder)\..*)'
)
EMBEDDINGS = (
  'transformer.wte.weight',
  'wte.weight',
  'transformer.word_embeddings.weight',
  'word_embeddings.weight',
  'model.embed_tokens.weight',
)


def torch_name(path: str, renames: Renames = TIMM) -> str:
  """Returns the PyTorch name of the leaf at `path`.

  >>> torch_name('blocks_3/attention/qkv/kernel')
  'blocks.3.attn.qkv.weight'
  >>> torch_name('layer1_0/downsample_1/var')
  'layer1.0.downsample.1.running_var'
  >>> torch_name('blocks_2_0/conv_dw/kernel')
  'blocks.2.0.conv_dw.weight'
  """
  *modules, leaf = path.split('/')
  modules = [re.sub(r'_(?=\d+(_\d+)*$)', '.', module) for module in modules]
  name = '.'.join([*modules, _LEAVES.get(leaf, leaf)])
  for pattern, replacement in renames:
    name = re.sub(pattern, replacement, name)
  return name


def efficientnet_pytorch(params: PyTree) -> Renames:
  """Returns the names of lukemelas' EfficientNet-PyTorch and its Lite fork for a model with these `params`.

  Blocks are numbered over all stages; norms count from 0, or from 1 where there is no expansion.

  >>> renames = efficientnet_pytorch({'blocks_0_0': {}, 'blocks_1_0': {}, 'blocks_1_1': {}})
  >>> (
  ...   torch_name('blocks_1_1/conv_pw/kernel', renames),
  ...   torch_name('blocks_0_0/conv_pw/kernel', renames),
  ... )
  ('_blocks.2._expand_conv.weight', '_blocks.0._project_conv.weight')
  >>> torch_name('blocks_1_0/bn3/mean', renames), torch_name('blocks_0_0/bn2/mean', renames)
  ('_blocks.1._bn2.running_mean', '_blocks.0._bn2.running_mean')
  """
  first, rest = [], []
  for number, (stage, index) in enumerate(_stage_blocks(params)):
    block, flat = rf'^blocks\.{stage}\.{index}\.', f'_blocks.{number}.'
    if stage == 0:
      first += [(block + r'conv_pw\.', f'{flat}_project_conv.'), (block, flat)]
    else:
      rest += [(rf'{block}bn{i + 1}\.', f'{flat}_bn{i}.') for i in range(3)] + [(block, flat)]
  return (*first, *rest, *_EFFICIENTNET_PYTORCH)


def torchvision_mobilenetv2(params: PyTree) -> Renames:
  """Returns torchvision's names of a `MobileNetV2` with these `params`; blocks are numbered over all stages.

  >>> renames = torchvision_mobilenetv2({'blocks_0_0': {}, 'blocks_1_0': {}, 'blocks_1_1': {}})
  >>> torch_name('blocks_1_1/conv_dw/kernel', renames), torch_name('bn2/bias', renames)
  ('features.3.conv.1.0.weight', 'features.4.1.bias')
  """
  first = {'conv_dw': '0.0', 'bn1': '0.1', 'conv_pw': '1', 'bn2': '2'}
  rest = {
    'conv_pw': '0.0',
    'bn1': '0.1',
    'conv_dw': '1.0',
    'bn2': '1.1',
    'conv_pwl': '2',
    'bn3': '3',
  }
  blocks = _stage_blocks(params)
  return (
    *_TORCHVISION_ENDS,
    (r'^conv_head\.', f'features.{len(blocks) + 1}.0.'),
    (r'^bn2\.', f'features.{len(blocks) + 1}.1.'),
    *(
      (rf'^blocks\.{stage}\.{index}\.{name}\.', f'features.{number}.conv.{position}.')
      for number, (stage, index) in enumerate(blocks, 1)
      for name, position in (rest if stage else first).items()
    ),
  )


def timm_vgg(params: PyTree) -> Renames:
  """Returns timm's names of a `VGG` with these `params`, which number convolutions, norms, ReLUs and pools.

  >>> renames = timm_vgg({'conv1': {}, 'blocks_0_1': {}, 'blocks_1_0': {}})
  >>> torch_name('blocks_0_1/conv/bias', renames), torch_name('blocks_1_0/conv/bias', renames)
  ('features.2.bias', 'features.5.bias')
  >>> torch_name('blocks_1_0/bn/var', timm_vgg({'bn1': {}, 'blocks_0_1': {}, 'blocks_1_0': {}}))
  'features.8.running_var'
  """
  step = 3 if 'bn1' in params else 2
  renames = [(r'^conv1\.', 'features.0.'), (r'^bn1\.', 'features.1.')]
  for number, (stage, index) in enumerate(_stage_blocks(params), 1):
    position = step * number + stage
    renames.append((rf'^blocks\.{stage}\.{index}\.conv\.', f'features.{position}.'))
    renames.append((rf'^blocks\.{stage}\.{index}\.bn\.', f'features.{position + 1}.'))
  return tuple(renames)


def timm_names(params: PyTree) -> Renames:
  """Returns timm's names for a model with these `params`: `TIMM`, or those of its VGG or PVT."""
  if {'patch_embed', 'stages_0'} <= set(params):
    return TIMM[:1]  # what merges patches is named otherwise in ConvNeXt
  return timm_vgg(params) if {'conv1', 'pre_logits'} <= set(params) else TIMM


def _stage_blocks(params: PyTree) -> list[tuple[int, int]]:
  """Returns the (stage, index) of each `blocks_{stage}_{index}`, in order."""
  matches = (re.fullmatch(r'blocks_(\d+)_(\d+)', name) for name in params)
  return sorted((int(match[1]), int(match[2])) for match in matches if match)


def renames_of(state_dict: StateDict, params: PyTree) -> Renames:
  """Returns the names of the code base that the checkpoint looks like, for a model with these `params`."""
  marks = {
    'class_token': TORCHVISION_VIT,
    'transformer.wte.weight': HF_GPT2,
    'wte.weight': HF_GPT2_BARE,
    'transformer.word_embeddings.weight': HF_BLOOM,
    'word_embeddings.weight': HF_BLOOM_BARE,
    'model.embed_tokens.weight': HF_LLAMA,
    'embeddings.word_embeddings.weight': HF_BERT_BARE,
    'bert.embeddings.word_embeddings.weight': HF_BERT,
    'roberta.embeddings.word_embeddings.weight': HF_ROBERTA,
    'features.1.conv.0.0.weight': torchvision_mobilenetv2,
    'features.1.0.block.0.0.weight': TORCHVISION_EFFICIENTNET,
    'features.1.0.attn.qkv.weight': TORCHVISION_SWIN,
    '_conv_stem.weight': efficientnet_pytorch,
    'stages.1.downsample.proj.weight': TIMM_PVT,
  }
  renames = next((renames for name, renames in marks.items() if name in state_dict), timm_names)
  return renames(params) if callable(renames) else renames
