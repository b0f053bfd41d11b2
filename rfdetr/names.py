"""Parameter names: transformers' inside the program, the published checkpoints' in every file.

The published names are those of Roboflow's COCO checkpoints (their decoder keeps query, key and value weights in one
tensor, in_proj), except that the class head is "class_embed.0.": "class_embed.0.weight" has one row per class.
`published_file` gives it Roboflow's name, `with_our_heads` makes that and their "segmentation_head." ours. Only names
change and q, k, v are joined: no value is touched.
"""

import re

import torch

# Applied in this order to a name of transformers' RfDetrForObjectDetection.
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"^class_embed\.", "class_embed.0."),
    # backbone
    (r"^model\.backbone\.backbone\.", "backbone.0.encoder.encoder."),
    (r"^(backbone\..*\.attention)\.q_proj\.", r"\1.attention.query."),
    (r"^(backbone\..*\.attention)\.k_proj\.", r"\1.attention.key."),
    (r"^(backbone\..*\.attention)\.v_proj\.", r"\1.attention.value."),
    (r"^(backbone\..*\.attention)\.o_proj\.", r"\1.output.dense."),
    # projector
    (r"^model\.backbone\.projector\.projector_layer\.", "backbone.0.projector.stages.0.0."),
    (r"^model\.backbone\.projector\.layer_norm\.", "backbone.0.projector.stages.0.1."),
    (r"^model\.backbone\.projector\.", "backbone.0.projector."),
    (r"^(backbone\.0\.projector\..*?)\.bottlenecks\.", r"\1.m."),
    (r"^(backbone\.0\.projector\..*)\.conv([12])\.", r"\1.cv\2."),
    (r"^(backbone\.0\.projector\..*)\.norm\.", r"\1.bn."),
    # decoder and queries
    (r"^model\.reference_point_embed\.", "refpoint_embed."),
    (r"^model\.query_feat\.", "query_feat."),
    (r"^model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"^model\.(decoder|enc_)", r"transformer.\1"),
    (r"^(transformer\.decoder\.layers\.\d+)\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),
    (r"^(transformer\.decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(transformer\.decoder\.layers\.\d+)\.cross_attn_layer_norm\.", r"\1.norm2."),
    (r"^(transformer\.decoder\.layers\.\d+)\.layer_norm\.", r"\1.norm3."),
    (r"^(transformer\.decoder\.layers\.\d+)\.mlp\.fc([12])\.", r"\1.linear\2."),
)]
_OFFICIAL_HEAD = re.compile(r"^segmentation_head\.")
_PART = re.compile(r"^(transformer\.decoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def published_name(name):
    """-> (published name, part) of one of transformers' names; part is "q", "k" or "v" of an in_proj, else None."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    if found := _PART.match(name):
        return f"{found[1]}.in_proj_{found[3]}", found[2]
    return name, None


def to_published(state):
    """{transformers' name: Tensor} of a detector -> {published name: Tensor}."""
    renamed, joined = {}, {}
    for name, value in state.items():
        new, part = published_name(name)
        if part is None:
            renamed[new] = value
        else:
            joined.setdefault(new, {})[part] = value
            renamed.setdefault(new, None)  # keeps the place
    return renamed | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in joined.items()}


def from_published(state, own):
    """{published name: Tensor} -> {transformers' name: Tensor}.

    Args:
        state: published names; "class_embed." (Roboflow's) is taken as "class_embed.0.". Names that are no detector's
            stay as they are.
        own: names of the detector that shall load it: transformers' releases do not all use the same ones.
    """
    state = {_numbered(name): value for name, value in state.items()}
    renamed = {}
    for name in own:
        new, part = published_name(name)
        if new in state:
            whole = state[new]
            renamed[name] = whole if part is None else whole.chunk(3)["qkv".index(part)]
    known = {published_name(name)[0] for name in own}
    return renamed | {name: value for name, value in state.items() if name not in known}


def published_file(state):
    """-> the state dict with Roboflow's name of the class head: loads in their package."""
    return {re.sub(r"^class_embed\.0\.", "class_embed.", name): value for name, value in state.items()}


def with_our_heads(state):
    """-> the state dict with our names of the class head and of the mask head, without the empty buffer for keypoints
    that Roboflow's package writes."""
    return {_OFFICIAL_HEAD.sub("mask_head.", _numbered(name)): value for name, value in state.items()
            if not (name == "_kp_active_mask" and not value.numel())}


def _numbered(name):
    return re.sub(r"^class_embed\.(?!0\.)", "class_embed.0.", name)
