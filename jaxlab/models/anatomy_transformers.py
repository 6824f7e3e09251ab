"""The parts of transformers over images and over tokens, by their fields: see `anatomy`."""

import dataclasses
from collections.abc import Iterable

from jaxlab.models.anatomy_parts import Anatomy, Block, Branch, Norm, Paths, merging
from jaxlab.models.bert import Bert
from jaxlab.models.bloom import Bloom
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.llama import Llama
from jaxlab.models.pvt import PVT
from jaxlab.models.swin import Swin
from jaxlab.models.t2t import T2TViT
from jaxlab.models.vit import ViT


def _transformer_block(
  path: str,
  attention: str,
  mlp: str,
  first: tuple[str, Paths, Paths],
  second: tuple[str, Paths, Paths],
  stacked: int | None = None,
) -> tuple[Block, tuple[Norm, Norm]]:
  """Returns a pre-norm block and its norms; each branch is (norm, layers that read it, all layers)."""
  branches, norms = [], []
  for kind, name, (norm, readers, layers) in (
    ('attention', attention, first), ('mlp', mlp, second)
  ):  # fmt: skip
    own = f'{path}/{name}'
    branches.append(Branch(kind, tuple(f'{own}/{layer}' for layer in layers), own))
    norms.append(Norm(f'{path}/{norm}', readers=tuple(f'{own}/{reader}' for reader in readers)))
  stream = (f'{path}/residual', path)
  block = Block(path, tuple(branches), 'identity', stacked=stacked, stream=stream)
  return block, tuple(norms)


def _scaled(block: Block, names: Paths) -> Block:
  """Returns the block whose branches end in layer scales of these names."""
  scaled = zip(block.branches, names, strict=True)
  branches = (dataclasses.replace(own, output=f'{block.path}/{name}') for own, name in scaled)
  return dataclasses.replace(block, branches=tuple(branches))


_VIT_BLOCK = (
  'attention',
  'mlp',
  ('norm1', ('qkv',), ('qkv', 'proj')),
  ('norm2', ('fc1',), ('fc1', 'fc2')),
)
_GPT2_BLOCK = (
  'attn',
  'mlp',
  ('ln_1', ('c_attn',), ('c_attn', 'c_proj')),
  ('ln_2', ('c_fc',), ('c_fc', 'c_proj')),
)
_BLOOM_BLOCK = (
  'self_attention',
  'mlp',
  ('input_layernorm', ('query_key_value',), ('query_key_value', 'dense')),
  ('post_attention_layernorm', ('dense_h_to_4h',), ('dense_h_to_4h', 'dense_4h_to_h')),
)
_BERT_BLOCK = (
  'attention',
  'mlp',
  ('norm1', (), ('q_proj', 'k_proj', 'v_proj', 'proj')),
  ('norm2', (), ('fc1', 'fc2')),
)
_LLAMA_BLOCK = (
  'self_attn',
  'mlp',
  ('input_layernorm', ('q_proj', 'k_proj', 'v_proj'), ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
  ('post_attention_layernorm', ('gate_proj', 'up_proj'), ('gate_proj', 'up_proj', 'down_proj')),
)


def _present(
  made: Iterable[tuple[Block, tuple[Norm, ...]]],
  attention_widths: Iterable[int] | None,
  hidden_widths: Iterable[int] | None,
) -> list[tuple[Block, tuple[Norm, ...]]]:
  """Returns blocks and norms without the branches that have no channels."""
  made = list(made)
  widths = zip(attention_widths or [1] * len(made), hidden_widths or [1] * len(made), strict=True)
  found = []
  for (block, norms), sizes in zip(made, widths, strict=not made or made[0][0].stacked is None):
    gone = [f'{block.path}/{name}' for name, size in zip(('norm1', 'norm2'), sizes) if not size]
    if not sizes[0]:
      gone.append(f'{block.path}/attention/norm')
    branches = tuple(own for own, size in zip(block.branches, sizes, strict=True) if size)
    kept = tuple(norm for norm in norms if norm.path not in gone)
    found.append((dataclasses.replace(block, branches=branches), kept))
  return found


def _split(made: Iterable[tuple[Block, tuple[Norm, ...]]]) -> tuple[tuple[Block, ...], list[Norm]]:
  """Returns the blocks, and their norms in order."""
  made = list(made)
  return tuple(block for block, _ in made), [norm for _, norms in made for norm in norms]


def _vit(model: ViT) -> Anatomy:
  if model.scan:
    made = [_transformer_block('blocks', *_VIT_BLOCK, stacked=model.depth)]
  else:
    made = [_transformer_block(f'blocks_{i}', *_VIT_BLOCK) for i in range(model.depth)]
  made = _present(made, model.attention_widths, model.hidden_widths)
  blocks, norms = _split(made)
  if model.layer_scale is not None:
    scales = {'attention': 'ls1', 'mlp': 'ls2'}
    blocks = tuple(
      _scaled(block, tuple(scales[own.kind] for own in block.branches)) for block in blocks
    )
  if model.pre_norm:
    norms = [Norm('norm_pre'), *norms]
  heads = ('head', 'head_dist') if model.distilled else ('head',)
  head = () if model.num_classes is None else heads
  return Anatomy(('patch_embed/proj',), blocks, 'pool', head, norms=(*norms, Norm('norm')))


def _swin(model: Swin) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('patch_embed/norm', 'patch_embed/proj')]
  size = model.stage_grid(0)
  for stage, depth in enumerate(model.depths):
    if stage:
      size = tuple((side + 1) // 2 for side in size)
      transitions.append(merging(f'layers_{stage}/downsample'))
      norms.append(Norm(f'{transitions[-1].path}/norm', readers=transitions[-1].layers))
    names = [f'layers_{stage}/blocks_{i}' for i in range(depth)]
    own, own_norms = _split(_transformer_block(name, *_VIT_BLOCK) for name in names)
    window, _ = model.stage_window(stage)
    if any(side % of_window for side, of_window in zip(size, window, strict=True)):
      # Windows are filled with zeros behind the norm: its layer reads more than its output.
      first = {branches.path + '/norm1' for branches in own}
      own_norms = [Norm(norm.path) if norm.path in first else norm for norm in own_norms]
    blocks, norms = [*blocks, *own], [*norms, *own_norms]
  head = () if model.num_classes is None else ('head/fc',)
  parts = {'transitions': tuple(transitions), 'norms': (*norms, Norm('norm'))}
  return Anatomy(('patch_embed/proj',), tuple(blocks), 'avgpool', head, **parts)


def _t2t(model: T2TViT) -> Anatomy:
  first = ('kqv',) if model.performer else ('qkv',)
  stem, norms = [], []
  for index in (1, 2):
    path = f'tokens/attention{index}'
    stem += [f'{path}/{layer}' for layer in (*first, 'proj', 'mlp/fc1', 'mlp/fc2')]
    norms.append(Norm(f'{path}/norm1', readers=(f'{path}/{first[0]}',)))
    norms.append(Norm(f'{path}/norm2', readers=(f'{path}/mlp/fc1',)))
  blocks, own = _split(_transformer_block(f'blocks_{i}', *_VIT_BLOCK) for i in range(model.depth))
  head = () if model.num_classes is None else ('head',)
  return Anatomy(
    (*stem, 'tokens/project'), blocks, 'pool', head, norms=(*norms, *own, Norm('norm'))
  )


def _pvt(model: PVT) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('patch_embed/norm', 'patch_embed/proj')]
  first = 0
  for stage, depth in enumerate(model.depths):
    inside, made = slice(first, first + depth), []
    path, first = f'stages_{stage}', first + depth
    if stage:
      layer = f'{path}/downsample/proj'
      branch = Branch('merge', (layer,), f'{path}/downsample')
      transitions.append(Block(f'{path}/downsample', (branch,), 'none'))
      norms.append(Norm(f'{path}/downsample/norm', layer))
    reduced = model.reductions[stage] > 1
    attention = ('q', *(['sr'] if reduced else []), 'kv', 'proj')
    readers = ('q', 'sr') if reduced else ('q', 'kv')
    parts = ('norm1', readers, attention), ('norm2', ('fc1',), ('fc1', 'dwconv', 'fc2'))
    for index in range(depth):
      own = f'{path}/blocks_{index}'
      block, pair = _transformer_block(own, 'attention', 'mlp', *parts)
      inner = f'{own}/attention'
      if reduced:
        pair = (pair[0], Norm(f'{inner}/norm', f'{inner}/sr', (f'{inner}/kv',)), pair[1])
      made.append((block, pair))
    widths = model.attention_widths, model.hidden_widths
    own, own_norms = _split(_present(made, *(given and given[inside] for given in widths)))
    blocks, norms = [*blocks, *own], [*norms, *own_norms]
    norms.append(Norm(f'{path}/norm'))
  head = () if model.num_classes is None else ('head',)
  parts = {'transitions': tuple(transitions), 'norms': tuple(norms)}
  return Anatomy(('patch_embed/proj',), tuple(blocks), 'avgpool', head, **parts)


def _decoder(
  embeddings: Paths, blocks: Iterable[tuple[Block, tuple[Norm, Norm]]], norm: str, tied: bool
) -> Anatomy:
  blocks, norms = _split(blocks)
  head = () if tied else ('lm_head',)
  return Anatomy(
    blocks=blocks,
    features=norm,
    head=head,
    embeddings=embeddings,
    tied=embeddings[0] if tied else None,
    norms=(*norms, Norm(norm, readers=head)),
  )


def _gpt2(model: GPT2) -> Anatomy:
  blocks = (_transformer_block(f'h_{i}', *_GPT2_BLOCK) for i in range(model.depth))
  return _decoder(('wte', 'wpe'), blocks, 'ln_f', model.tied)


def _bloom(model: Bloom) -> Anatomy:
  blocks = (_transformer_block(f'h_{i}', *_BLOOM_BLOCK) for i in range(model.depth))
  own = _decoder(('word_embeddings',), blocks, 'ln_f', model.tied)
  return dataclasses.replace(own, norms=(Norm('word_embeddings_layernorm'), *own.norms))


def _llama(model: Llama) -> Anatomy:
  blocks = (_transformer_block(f'layers_{i}', *_LLAMA_BLOCK) for i in range(model.depth))
  return _decoder(('embed_tokens',), blocks, 'norm', model.tied)


def _bert(model: Bert) -> Anatomy:
  made = [_transformer_block(f'layer_{i}', *_BERT_BLOCK) for i in range(model.depth)]
  # Behind a norm its block's shortcut reads as well as the layers.
  norms = [Norm(norm.path) for _, norms in made for norm in norms]
  embeddings = ('word_embeddings', 'token_type_embeddings', 'position_embeddings')
  return Anatomy(
    blocks=tuple(dataclasses.replace(block, shortcut='normalized', stream=()) for block, _ in made),
    features=made[-1][0].path if made else 'embeddings',
    head=() if model.num_classes is None else ('classifier',),
    embeddings=embeddings,
    norms=(Norm('norm'), *norms),
  )


TRANSFORMERS = {
  ViT: _vit,
  Swin: _swin,
  T2TViT: _t2t,
  PVT: _pvt,
  GPT2: _gpt2,
  Bloom: _bloom,
  Llama: _llama,
  Bert: _bert,
}
