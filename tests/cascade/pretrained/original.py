"""The networks of DeepFloyd IF, Karlo and GLIDE as papers and checkpoints lay them out, written for tests:
tensors get the published names from the modules' own structure, and heads are taken one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Spec:
    """A network of one of the four kinds: floyd, decoder (Karlo), plain (Karlo's super-resolution), glide."""

    kind: str
    inputs: int = 3
    outputs: int = 6
    width: int = 32
    mult: tuple[int, ...] = (1, 2)
    blocks: tuple[int, ...] = (1, 1)
    attends: tuple[bool, ...] = (False, True)
    cross_only: bool = False
    head: int = 16
    act: str = "silu"
    scale_shift: bool = True
    residual: float = 1.0
    time_dim: int = 64
    told: bool = False  # aug_proj
    text: int = 24  # width of the tokens that come in
    context: int = 64  # of those that are attended to
    pool_heads: int = 4
    clip: int = 24
    extra_tokens: int = 4
    length: int = 6
    vocab: int = 50
    layers: int = 2


def act(name: str) -> nn.Module:
    return {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_jit": nn.GELU(approximate="tanh")}[name]


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def features(t: Tensor, dim: int) -> Tensor:
    angles = t[:, None].double() / 10_000 ** (torch.arange(dim // 2) * 2 / dim)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


class Residual(nn.Module):
    def __init__(self, spec: Spec, inputs: int, outputs: int, change: str = "") -> None:
        super().__init__()
        self.spec, self.change = spec, change
        rows = 2 * outputs if spec.scale_shift else outputs
        self.in_layers = nn.Sequential(norm(inputs), act(spec.act), nn.Conv2d(inputs, outputs, 3, 1, 1))
        self.emb_layers = nn.Sequential(act(spec.act), nn.Linear(spec.time_dim, rows))
        conv = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.out_layers = nn.Sequential(norm(outputs), act(spec.act), nn.Dropout(0.0), conv)
        if inputs != outputs:
            self.skip_connection = nn.Conv2d(inputs, outputs, 1)

    def resize(self, x: Tensor) -> Tensor:
        if self.change == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2) if self.change == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resize(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(emb)[..., None, None]
        if self.spec.scale_shift:
            half = e.shape[1] // 2
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + e[:, :half]) + e[:, half:])
        else:
            h = self.out_layers(h + e)
        x = self.resize(x)
        return ((self.skip_connection(x) if hasattr(self, "skip_connection") else x) + h) * self.spec.residual


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q: B D N; k, v: B D M; mask: B M."""
    weight = torch.einsum("bdn,bdm->bnm", q, k) / math.sqrt(q.shape[1])
    if mask is not None:
        weight = weight.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bnm,bdm->bdn", weight.softmax(-1), v)


class Attention(nn.Module):
    def __init__(self, spec: Spec, channels: int) -> None:
        super().__init__()
        self.head, self.cross_only = spec.head, spec.cross_only
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, channels if spec.cross_only else 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(spec.context, 2 * channels, 1)
        self.norm_encoder = norm(spec.context) if spec.kind == "floyd" else None
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows = self.qkv(self.norm(x).flatten(2))  # B 3C N, head by head
        text = self.encoder_kv(self.norm_encoder(tokens) if self.norm_encoder is not None else tokens)
        if mask is not None:
            pixels = 0 if self.cross_only else rows.shape[-1]
            mask = torch.cat([mask, mask.new_ones(len(mask), pixels)], 1)
        heads, d, step = [], self.head, self.head if self.cross_only else 3 * self.head
        for h in range(x.shape[1] // d):
            own = rows[:, h * step : (h + 1) * step].split(d, 1)
            k, v = text[:, 2 * h * d : 2 * (h + 1) * d].split(d, 1)
            if not self.cross_only:
                k, v = torch.cat([k, own[1]], -1), torch.cat([v, own[2]], -1)
            heads.append(attend(own[0], k, v, mask))
        return x + self.proj_out(torch.cat(heads, 1)).view_as(x)


class Pool(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim))
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        first = x.mean(1, keepdim=True) + self.positional_embedding
        rows = torch.cat([first, x], 1)
        q, k, v = (
            layer(part).mT.chunk(self.heads, 1)
            for layer, part in ((self.q_proj, first), (self.k_proj, rows), (self.v_proj, rows))
        )
        return torch.cat([attend(*head, None) for head in zip(q, k, v, strict=True)], 1)[..., 0]


class TextBlock(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_qkv": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        rows = self.attn["c_qkv"](self.ln_1(x)).mT  # B 3W L, head by head
        heads = [attend(*head.split(self.head, 1), None) for head in rows.split(3 * self.head, 1)]
        x = x + self.attn["c_proj"](torch.cat(heads, 1).mT)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OriginalUNet(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, e = spec, spec.time_dim
        widths = [spec.width * m for m in spec.mult]
        self.time_embed = nn.Sequential(nn.Linear(spec.width, e), act(spec.act), nn.Linear(e, e))
        if spec.told:
            self.aug_proj = nn.Sequential(nn.Linear(spec.width, e), act(spec.act), nn.Linear(e, e))
        self._conditions()
        c, skips, blocks = widths[0], [widths[0]], []
        blocks.append(nn.ModuleList([nn.Conv2d(spec.inputs, c, 3, 1, 1)]))
        for i, (width, n) in enumerate(zip(widths, spec.blocks, strict=True)):
            for _ in range(n):
                blocks.append(self._level(i, c, width))
                c = width
                skips.append(c)
            if i < len(widths) - 1:
                blocks.append(nn.ModuleList([Residual(spec, c, c, "down")]))
                skips.append(c)
        self.input_blocks = nn.ModuleList(blocks)
        middle = [Residual(spec, c, c), Residual(spec, c, c)]
        if spec.kind != "plain":
            middle.insert(1, Attention(spec, c))
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            for j in range(spec.blocks[i] + 1):
                self.output_blocks.append(self._level(i, c + skips.pop(), widths[i]))
                c = widths[i]
                if i > 0 and j == spec.blocks[i]:
                    self.output_blocks[-1].append(Residual(spec, c, c, "up"))
        self.out = nn.Sequential(norm(c), act(spec.act), nn.Conv2d(c, spec.outputs, 3, 1, 1))

    def _level(self, i: int, inputs: int, outputs: int) -> nn.ModuleList:
        attention = [Attention(self.spec, outputs)] if self.spec.attends[i] else []
        return nn.ModuleList([Residual(self.spec, inputs, outputs), *attention])

    def _conditions(self) -> None:
        spec, e = self.spec, self.spec.time_dim
        if spec.kind == "floyd":
            pool = Pool(spec.text, spec.pool_heads)
            linear = nn.Linear(spec.text, e)
            self.encoder_pooling = nn.Sequential(nn.LayerNorm(spec.text), pool, linear, nn.LayerNorm(e))
            if spec.text != spec.context:
                self.encoder_proj = nn.Linear(spec.text, spec.context)
        if spec.kind == "decoder":
            linear = nn.Linear(spec.clip, spec.context)
            self.text_seq_proj = nn.Sequential(linear, nn.LayerNorm(spec.context))
            self.text_feat_proj, self.clip_emb = nn.Linear(spec.clip, e), nn.Linear(spec.clip, e)
            self.clip_tok_proj = nn.Linear(spec.clip, spec.extra_tokens * spec.context)
            self.cf_param = nn.Parameter(torch.randn(spec.clip))
        if spec.kind == "glide":
            w = spec.context
            self.transformer = nn.ModuleDict(
                {"resblocks": nn.ModuleList(TextBlock(w, spec.head) for _ in range(spec.layers))}
            )
            self.final_ln, self.transformer_proj = nn.LayerNorm(w), nn.Linear(w, e)
            self.token_embedding = nn.Embedding(spec.vocab, w)
            self.positional_embedding = nn.Parameter(torch.randn(spec.length, w))
            self.padding_embedding = nn.Parameter(torch.randn(spec.length, w))

    def forward(self, x: Tensor, time: Tensor, aug: Tensor | None = None, **text: Tensor) -> Tensor:
        """text: states (floyd); states, mask, pooled, image or None (decoder); ids, mask (glide)."""
        emb = self.time_embed(features(time, self.spec.width))
        if aug is not None:
            emb = emb + self.aug_proj(features(aug, self.spec.width))
        vector, tokens, mask = self._encode(**text)
        emb = emb if vector is None else emb + vector
        h, skips = x, []
        for modules in self.input_blocks:
            h = self._run(modules, h, emb, tokens, mask)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, tokens, mask)
        for modules in self.output_blocks:
            h = self._run(modules, torch.cat([h, skips.pop()], 1), emb, tokens, mask)
        return self.out(h)

    def _run(self, modules, h: Tensor, emb: Tensor, tokens, mask) -> Tensor:
        for module in modules:
            if isinstance(module, Residual):
                h = module(h, emb)
            else:
                h = module(h, tokens, mask) if isinstance(module, Attention) else module(h)
        return h

    def _encode(self, states=None, mask=None, pooled=None, image=None, ids=None):
        """(vector B E, tokens B C L, mask B L), as far as the kind has them."""
        if self.spec.kind == "plain":
            return None, None, None
        if self.spec.kind == "floyd":
            tokens = self.encoder_proj(states) if hasattr(self, "encoder_proj") else states
            return self.encoder_pooling(states), tokens.mT, None
        if self.spec.kind == "decoder":
            image = self.cf_param.expand(len(states), -1) if image is None else image
            extra = self.clip_tok_proj(image).reshape(len(image), -1, self.spec.extra_tokens)  # B C T
            tokens = torch.cat([extra, self.text_seq_proj(states).mT], 2)
            mask = torch.cat([mask.new_ones(len(mask), self.spec.extra_tokens), mask], 1)
            return self.clip_emb(image) + self.text_feat_proj(pooled), tokens, mask
        rows = self.token_embedding(ids) + self.positional_embedding
        rows = torch.where(mask[..., None], rows, self.padding_embedding)
        for block in self.transformer["resblocks"]:
            rows = block(rows)
        rows = self.final_ln(rows)
        return self.transformer_proj(rows[:, -1]), rows.mT, None
