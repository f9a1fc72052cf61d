"""BERT with the heads of many tasks, over packed batches, and the public checkpoint formats. torch and NumPy.

    fused ops      functions without state, fused by torch.compile              fused, linear_gelu, ...
    attention      inside each sequence of a packed batch                       AttentionPlan, attention
    encoder        BertConfig, BertLayer, MultiTaskBert
    checkpoints    model.safetensors, pytorch_model.bin, config.json            load_pretrained, save_pretrained

Semantics are those of the original's bam/bert/modeling.py; only the layout differs. A batch of B sequences is one row
of T real tokens, so every product runs over T and nothing is spent on padding.

Dimension letters: B sequences, T tokens, H hidden size, A attention heads, D = H / A, F feed-forward size, K outputs of
all tasks together; attention alone pads: n sequences of a bucket to L tokens.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickletools
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file, the tensor or key, and what was expected."""


# ----------------------------------------------------------------------------------------------------------- fused ops

COMPILE = False  # set by bam.py: on with CUDA, off on a CPU, where compiling costs time and gains none


def fused(function):
    """A function without state that trains under torch.compile where COMPILE is on; `.plain` is its eager self."""

    @functools.cache  # when it is first called: torch.compile's import takes as long as torch's
    def compiler():
        return torch.compile(function, fullgraph=True, dynamic=True)

    def compiled(*args):
        return compiler()(*args)

    def call(*args):  # only training repays compiling
        return compiled(*args) if COMPILE and torch.is_grad_enabled() else function(*args)

    call.plain, call.compiled, call.__doc__, call.__name__ = function, compiled, function.__doc__, function.__name__
    return call


def dropout(x, p):
    """BERT's dropout. On a CPU faster than F.dropout, by draws that torch.compile cannot make."""
    if p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    keep, scale = dropout_mask(x, p)
    return x * keep.to(x.dtype).mul_(scale)


def dropout_mask(x, p):
    """Which elements of x stay, 1 or 0 in 8 bits each, and their scale. An element gets 16 bits of a 64-bit draw; so p
    becomes the nearest multiple of 1/65536 (0.1 becomes 0.100006), and the scale fits that."""
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(p * 65536)
    keep = torch.empty(x.shape, dtype=torch.uint8)  # from bool the way to numbers would be slower
    torch.ge(bits[: x.numel()].view(x.shape), dropped - 32768, out=keep)
    return keep, 65536 / (65536 - dropped)


@fused
def linear_gelu(x, weight, bias):
    """GELU(x Wᵀ + b), the exact GELU (erf). (T, H) to (T, F)."""
    return F.gelu(F.linear(x, weight, bias))


@fused
def linear_dropout_add_norm(x, weight, bias, residual, norm_weight, norm_bias, p, eps):
    """LayerNorm(residual + dropout(x Wᵀ + b)), the end of both sub-layers. (T, H or F) to (T, H)."""
    x = residual + dropout(F.linear(x, weight, bias), p)
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)


# ----------------------------------------------------------------------------------------------------------- attention

VARLEN = False  # set by bam.py: on where varlen_works, below, finds that it does


class AttentionPlan:
    """What attention asks of a packed batch: made once, for every layer, from cu_seqlens (B + 1,), which stay on the
    host, so that no step waits for the device."""

    def __init__(self, cu_seqlens, num_heads, to_device=torch.from_numpy):
        self.num_heads, self.to_device, self.host = num_heads, to_device, np.asarray(cu_seqlens, np.int64)
        self.longest = int(np.diff(self.host).max())
        self.cls = to_device(self.host[:-1])  # each sequence's first token in the packed row

    @functools.cached_property
    def cu_seqlens(self):
        """(2, B + 1): where sequences begin among all tokens, and among the [CLS] alone."""
        return self.to_device(np.stack([self.host, np.arange(len(self.host))]).astype(np.int32))

    @functools.cached_property
    def buckets(self):
        return Buckets(self.host, self.num_heads, self.to_device)


def attention(qkv, plan, p, cls_q=None):
    """Self-attention of a packed batch, with dropout p on the probabilities: qkv (T, 3H) to (T, H). Or of its [CLS]
    tokens alone, whose queries are cls_q (B, H), over the keys and values (T, 2H) of all: to (B, H)."""
    parts = 3 if cls_q is None else 2
    x = qkv.view(len(qkv), parts, plan.num_heads, -1)  # (T, 3 or 2, A, D)
    queries = None if cls_q is None else cls_q.view(len(cls_q), *x.shape[2:])
    takes = x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256  # what FlashAttention takes
    return (varlen_attention if VARLEN and takes else bucket_attention)(x, queries, plan, p).flatten(1)


def varlen_attention(x, queries, plan, p):
    """For CUDA: FlashAttention takes sequences of any length as they lie. The operator is the one that torch's nested
    tensors call; torch's public function for such sequences has no dropout.

    x (T, 3, A, D) to (T, A, D); or x (T, 2, A, D) and queries (B, A, D) to (B, A, D)."""
    all_starts, cls_starts = plan.cu_seqlens
    if queries is None:
        queries, k, v = x.unbind(1)
        starts, longest = all_starts, plan.longest
    else:
        k, v = x.unbind(1)
        starts, longest = cls_starts, 1
    # The last three: dropout, not causal, no mask returned.
    flash = torch.ops.aten._flash_attention_forward
    return flash(queries, k, v, starts, all_starts, longest, plan.longest, p, False, False)[0]


class Buckets:
    """A packed batch cut into buckets of similar length, padded to one length in each:

    tokens      a a a a a b b b b c d                      T = 11, four sequences
    buckets     [a a a a a] [b b b b -]  and  [c] [d]      L = 5, L = 1
    pad         0 1 2 3 4    5 6 7 8 0         9   10      each padded place's token; padding borrows token 0
    unpad       0 1 2 3 4 5 6 7 8 10 11                    each token's padded place

    What moves is not a token's row of numbers but its queries, keys and values, head by head, so that every bucket
    finds its q, k and v as (n, A, L, D) without another copy.
    """

    SHRINK = 0.8  # a new bucket begins where a sequence is shorter than this part of its bucket's longest

    def __init__(self, cu_seqlens, num_heads, to_device):
        starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
        order = np.argsort(-lengths, kind="stable")
        cuts = [0]
        for place, length in enumerate(lengths[order]):
            if length < self.SHRINK * lengths[order[cuts[-1]]]:
                cuts.append(place)
        self.num_heads, self.shapes, self.masks, self.num_padded = num_heads, [], [], 0
        places = np.empty((4, len(order)), np.int64)  # of each sequence's first token; see pad_and_unpad
        for rows in np.split(order, cuts[1:]):
            n, longest = len(rows), int(lengths[rows[0]])
            real = np.arange(longest) < lengths[rows, None]  # (n, L)
            self.shapes.append((n, longest))
            self.masks.append(None if real.all() else to_device(real[:, None, None]))  # (n, 1, 1, L)
            size = num_heads * longest
            for value, column in zip(places, (self.num_padded, np.arange(n) * size, n * size, longest), strict=True):
                value[rows] = column
            self.num_padded += n * longest
        places = np.repeat(places, lengths, axis=1)
        places[1] += np.arange(places.shape[1]) - np.repeat(starts, lengths)
        places = to_device(places)
        # A token has so many rows of A heads: its context; k and v; q, k and v.
        self.moves = {parts: self.pad_and_unpad(places, parts) for parts in (1, 2, 3)}
        # Sequences longest first, and back.
        self.order, self.inverse = to_device(order), to_device(np.argsort(order))

    def pad_and_unpad(self, places, parts):
        """Indices for vectors of D numbers that stand as (T, parts, A) in the batch and as (parts, n, A, L) in a bucket.
        places (4, T): padded tokens in the buckets before, place in its own bucket, and from there to the next part and
        to the next head."""
        before, place, next_part, next_head = places[:, :, None, None]
        part, head = (torch.arange(count, device=places.device) for count in (parts, self.num_heads))
        unpad = parts * self.num_heads * before + place + part[:, None] * next_part + head * next_head
        unpad = unpad.flatten()
        pad = torch.zeros(parts * self.num_heads * self.num_padded, dtype=torch.int64, device=places.device)
        pad[unpad] = torch.arange(len(unpad), device=places.device)
        return pad, unpad

    def split(self, padded, queries):
        """Padded vectors (rows, D) to each bucket's q, k and v, views (n, A, L, D); the q of [CLS] alone, (n, A, 1, D),
        are in `queries` (B · A, D)."""
        parts, heads, size = 3 if queries is None else 2, self.num_heads, padded.shape[-1]
        pieces = padded.split([parts * n * heads * length for n, length in self.shapes])
        views = [x.view(parts, n, heads, -1, size).unbind() for x, (n, _) in zip(pieces, self.shapes, strict=True)]
        if queries is None:
            return views
        pieces = queries.split([n * heads for n, _ in self.shapes])
        return [(q.view(-1, heads, 1, size), *kv) for q, kv in zip(pieces, views, strict=True)]


def bucket_attention(x, queries, plan, p):
    """varlen_attention for every device: each bucket by itself, in batched products."""
    buckets, size = plan.buckets, x.shape[-1]
    padded = Reindex.apply(x.reshape(-1, size), *buckets.moves[x.shape[1]])
    sorted_queries = None if queries is None else queries[buckets.order].view(-1, size)
    attend = Attend.apply if x.device.type == "cpu" else plain_attend
    out = attend(padded, sorted_queries, buckets, p)
    if queries is not None:
        return out.view_as(queries)[buckets.inverse]
    pad, unpad = buckets.moves[1]
    return Reindex.apply(out, unpad, pad).view(len(x), -1, size)


class Reindex(torch.autograd.Function):
    """x[index], to pad or to unpad, with a gradient that copies rows and sums none: padding repeats row 0, but has no
    gradient, so that each row has one source."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        if len(index) >= ctx.rows:  # pad: what padding borrowed carries no gradient
            return grad.index_select(0, inverse), None, None
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None, None  # unpad


def plain_attend(padded, queries, buckets, p):
    """softmax(q kᵀ / √D) v with dropout p on the probabilities, bucket by bucket: (n · A · L, D) of all buckets, or for
    [CLS] alone (B · A, D)."""
    pieces = zip(buckets.split(padded, queries), buckets.masks, strict=True)
    contexts = [F.scaled_dot_product_attention(*qkv, attn_mask=real, dropout_p=p) for qkv, real in pieces]
    return torch.cat([context.flatten(0, 2) for context in contexts])


class Attend(torch.autograd.Function):
    """plain_attend on a CPU, its gradient written out, so that every product lands in its place. With probabilities P
    and dropout's mask M, which holds its scale, the context is O = (P M) v, and

        ∂v = (P M)ᵀ ∂O,      ∂P = M (∂O vᵀ),      ∂scores = P (∂P − Σ P ∂P)      (Σ over a query's row)
    """

    @staticmethod
    def forward(ctx, padded, queries, buckets, p):
        inputs, all_probabilities, keeps = buckets.split(padded, queries), [], []
        ctx.buckets, ctx.scale = buckets, 1.0
        out = padded.new_empty(sum(rows_of(inputs)), padded.shape[-1])
        for (q, k, v), real, context in zip(inputs, buckets.masks, out.split(rows_of(inputs)), strict=True):
            scores = product(q, k.mT, q.shape[-1] ** -0.5)
            if real is not None:
                scores.masked_fill_(~real, -torch.inf)
            probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
            keep, ctx.scale = dropout_mask(scores, p) if p else (None, 1.0)
            product(masked(probabilities, keep).to(v.dtype), v, ctx.scale, out=context.view_as(q))
            all_probabilities.append(probabilities)
            keeps.append(keep)
        ctx.save_for_backward(padded, queries, *all_probabilities, *keeps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        padded, queries, *saved = ctx.saved_tensors
        all_probabilities, keeps = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        grads = torch.empty_like(padded), None if queries is None else torch.empty_like(queries)
        inputs, outputs = ctx.buckets.split(padded, queries), ctx.buckets.split(*grads)
        pieces = zip(inputs, outputs, grad.split(rows_of(inputs)), all_probabilities, keeps, strict=True)
        for (q, k, v), (grad_q, grad_k, grad_v), grad_out, probabilities, keep in pieces:
            grad_out = grad_out.view_as(q)
            product(masked(probabilities, keep).to(v.dtype).mT, grad_out, ctx.scale, out=grad_v)
            slope = masked(product(grad_out, v.mT, ctx.scale).to(probabilities.dtype), keep)
            slope.sub_((slope * probabilities).sum(-1, keepdim=True)).mul_(probabilities)
            product(slope.to(q.dtype), k, q.shape[-1] ** -0.5, out=grad_q)
            product(slope.to(q.dtype).mT, q, q.shape[-1] ** -0.5, out=grad_k)
        return *grads, None, None


def rows_of(inputs):
    """How many rows of D numbers each bucket's context has."""
    return [q[..., 0].numel() for q, _, _ in inputs]


def masked(x, keep):
    """x without what dropout drops, not yet scaled."""
    return x if keep is None else x * keep.to(x.dtype)


def product(a, b, scale=1.0, out=None):
    """scale · a b of each head of each sequence, into out."""
    out = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
    flat = out.view(-1, *out.shape[2:])
    torch.baddbmm(flat, a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale, out=flat)
    return out


@torch.enable_grad()
def varlen_works(device):
    """Whether FlashAttention's operator, which is not public, is there and right: values and gradients as those of
    bucket_attention on the host in float32; dropout's rate, scale, and the same mask in backward."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            return same_as_buckets(device) and drops_a_tenth(device)
        except (AttributeError, RuntimeError, TypeError):
            return False


def same_as_buckets(device):
    """Of all tokens' queries and of those of [CLS], to what bfloat16 rounds: 0.05, of numbers up to 3.5."""
    starts, heads = np.cumsum([0, 70, 33, 1, 128]), 4
    x, grad = torch.randn(2, starts[-1], 3, heads, 64).bfloat16()

    def outcomes(function, where, dtype):
        plan = AttentionPlan(starts, heads, lambda array: torch.from_numpy(array).to(where))
        qkv, grads = x.to(where, dtype).requires_grad_(), grad[:, 0].to(where, dtype)
        for inputs in ((qkv, None), (qkv[:, 1:], qkv[plan.cls, 0])):
            out = function(*inputs, plan, 0.0)
            yield from (out, *torch.autograd.grad(out, qkv, grads[: len(out)]))

    pairs = zip(outcomes(varlen_attention, device, torch.bfloat16), outcomes(bucket_attention, "cpu", torch.float32),
                strict=True)  # fmt: skip
    return all(torch.allclose(found.cpu().float(), right, rtol=0.05, atol=0.05) for found, right in pairs)


def drops_a_tenth(device):
    """With queries of 0 all P are 1/64; with values of the unit matrix the context is P M itself."""
    size, plan = 64, AttentionPlan([0, 64, 128], 4, lambda array: torch.from_numpy(array).to(device))
    x = torch.zeros(128, 3, 4, size, dtype=torch.bfloat16, device=device)
    x[:, 2] = torch.eye(size, device=device).repeat(2, 1)[:, None]
    out = varlen_attention(x.requires_grad_(), None, plan, 0.1)
    grad = torch.randn(out.shape, device=device).bfloat16()
    (slope,) = torch.autograd.grad(out, x, grad)
    mask, grad = (tensor.float().view(2, size, 4, size) for tensor in (out, grad))
    rate, scale = (mask == 0).float().mean().item(), size * mask.max().item()
    expected = torch.einsum("biaj,biad->bjad", mask, grad).reshape(128, 4, size)
    return (
        abs(rate - 0.1) < 0.02
        and abs(scale - 1 / 0.9) < 0.02
        and torch.allclose(slope[:, 2].float(), expected, 0.05, 0.01)
    )


# ------------------------------------------------------------------------------------------------------------- encoder

LIMITS = {  # low <= value < high; BertConfig's other numbers: whole from 1, or 0 to 1
    "type_vocab_size": (2, 2**31),
    "hidden_size": (1, 2**20),  # its square still fits 64 bits
    "num_hidden_layers": (1, 1000),  # more would take minutes to lay out
    "embedding_size": (0, 2**20),
}
KNOWN = {"model_type": ("bert", "electra"), "hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
         "is_decoder": (False,)}  # fmt: skip


@dataclass(frozen=True)
class BertConfig:
    """The encoder's shape, the fields of a checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    embedding_size: int = 0  # ELECTRA's may be narrower than hidden_size, which 0 stands for
    model_type: str = "bert"

    def __post_init__(self):
        if self.model_type == "bert" or not self.embedding_size:
            object.__setattr__(self, "embedding_size", self.hidden_size)

    @classmethod
    def from_file(cls, path):
        """Read a config.json. Raises CheckpointError where it is not BERT's."""
        path = Path(path)
        try:
            values = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); expected BERT's configuration") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object, BERT's configuration")
        for key, known in KNOWN.items():
            if values.get(key, known[0]) not in known:
                expected = " or ".join(map(repr, known))
                raise CheckpointError(f"{path}: {key} is {values[key]!r}; expected {expected} of a BERT-shaped encoder")
        for name, field in cls.__dataclass_fields__.items():
            value = values.get(name, field.default)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            low, high = LIMITS.get(name, (1, 2**31) if field.type is int else (0, 1))
            if name not in KNOWN and not (number and low <= value < high and value == field.type(value)):
                found = repr(value) if name in values else "missing"
                raise CheckpointError(f"{path}: {name} is {found}; expected BERT's, {field.type.__name__} from {low}")
        config = cls(**{name: f.type(values[name]) for name, f in cls.__dataclass_fields__.items() if name in values})
        if config.hidden_size % config.num_attention_heads:
            raise CheckpointError(
                f"{path}: hidden_size {config.hidden_size} is not divisible by {config.num_attention_heads} heads"
            )
        return config


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm (post-norm)."""

    def __init__(self, config):
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.qkv = nn.Linear(hidden, 3 * hidden)  # query, key and value as one product
        self.attention_out = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.ffn_in = nn.Linear(hidden, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps)

    def forward(self, x, plan, only_cls=False):
        """x (T, H) to (T, H), or with only_cls to the [CLS] tokens' (B, H): of the last layer nothing else is read, so
        nothing else is computed but the keys and values."""
        config, hidden = self.config, x.shape[-1]
        p_hidden = config.hidden_dropout_prob if self.training else 0.0
        p_attention = config.attention_probs_dropout_prob if self.training else 0.0
        if only_cls:
            kv = F.linear(x, self.qkv.weight[hidden:], self.qkv.bias[hidden:])
            x = x[plan.cls]
            q = F.linear(x, self.qkv.weight[:hidden], self.qkv.bias[:hidden])
            context = attention(kv, plan, p_attention, q)
        else:
            context = attention(self.qkv(x), plan, p_attention)
        out, norm = self.attention_out, self.attention_norm
        x = linear_dropout_add_norm(context, out.weight, out.bias, x, norm.weight, norm.bias, p_hidden, norm.eps)
        inner = linear_gelu(x, self.ffn_in.weight, self.ffn_in.bias)
        out, norm = self.ffn_out, self.ffn_norm
        return linear_dropout_add_norm(inner, out.weight, out.bias, x, norm.weight, norm.bias, p_hidden, norm.eps)


class MultiTaskBert(nn.Module):
    """The encoder, its pooler, and the heads of all tasks as the rows of one matrix: one product serves a batch of
    mixed tasks, and the head of an absent task gets the zero gradient that it gets in the original.

    num_outputs: {task: number of labels, or 1 for a score}; a task's logits are `columns[task]` of the K.
    """

    def __init__(self, config, num_outputs):
        super().__init__()
        hidden, width = config.hidden_size, config.embedding_size
        self.config, self.num_outputs = config, dict(num_outputs)
        ends = np.cumsum(list(num_outputs.values())).tolist()
        self.columns = {task: slice(end - k, end) for (task, k), end in zip(num_outputs.items(), ends, strict=True)}
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.segment_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.embeddings_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.embeddings_project = nn.Linear(width, hidden) if width != hidden else nn.Identity()
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(hidden, hidden) if config.model_type == "bert" else None
        self.head = nn.Linear(hidden, ends[-1])
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """BERT's normal, truncated at two standard deviations; zero biases; the heads Glorot-uniform."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" not in name:
                std = self.config.initializer_range
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        self.initialize_heads()

    @torch.no_grad()
    def initialize_heads(self):
        self.head.bias.zero_()
        for columns in self.columns.values():
            nn.init.xavier_uniform_(self.head.weight[columns])

    def depth(self, name):
        """The layer a parameter belongs to, for layer-wise learning rates: embeddings 0, layer k (from 0) k + 1,
        then the pooler, then the head (bam/bert/optimization.py, _get_edecay_lrs)."""
        last = self.config.num_hidden_layers
        if name.startswith("layers."):
            return int(name.split(".")[1]) + 1
        return {"pooler": last + 1, "head": last + 2}.get(name.split(".")[0], 0)

    def encode(self, input_ids, segment_ids, position_ids, plan):
        """(T,) each to every layer's output: the embeddings' and all but the last layer's (T, H), the last's (B, H)."""
        words = self.word_embeddings
        rows = words.sparse and words.weight.grad is not None  # bam.Adam asks for rows, to be added to what is there
        x = F.embedding(input_ids, words.weight, sparse=rows) + self.position_embeddings(position_ids)
        x = self.embeddings_norm(x + self.segment_embeddings(segment_ids))
        x = dropout(x, self.config.hidden_dropout_prob if self.training else 0.0)
        outputs = [self.embeddings_project(x)]
        for layer in self.layers:
            outputs.append(layer(outputs[-1], plan, only_cls=layer is self.layers[-1]))
        return outputs

    def forward(self, input_ids, segment_ids, position_ids, plan):
        """(T,) each, and the batch's AttentionPlan, to logits (B, K) in float32: every head's on every sequence."""
        pooled = self.encode(input_ids, segment_ids, position_ids, plan)[-1]
        if self.pooler:  # ELECTRA has none: its own fine-tuning puts the heads on [CLS] as it is
            pooled = torch.tanh(self.pooler(pooled))
        pooled = dropout(pooled.float(), self.config.hidden_dropout_prob if self.training else 0.0)
        with torch.autocast(pooled.device.type, enabled=False):  # in bfloat16 STS-B's scores would tie within 0.02 of 5
            return self.head(pooled)


# --------------------------------------------------------------------------------------------------------- checkpoints

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that a folder has
# Our names, and Hugging Face's for the same tensors, where q, k and v are three and layers stand under encoder.layer.N.
QKV = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
LAYER_NAMES = {
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
NAMES = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "segment_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
    "embeddings_project": "embeddings_project",
    "pooler": "pooler.dense",
}


def public_tensors(model):
    """{public name: our tensor, or the part of it that stands under that name}: views, so writing to them loads."""
    tensors, encoder = {}, model.config.model_type
    for name, tensor in model.state_dict().items():
        *module, kind = name.split(".")
        if module[0] == "layers":
            prefix = f"{encoder}.encoder.layer.{module[1]}"
            if module[2] == "qkv":
                thirds = zip(QKV, tensor.chunk(3), strict=True)
                tensors.update({f"{prefix}.{public}.{kind}": third for public, third in thirds})
            else:
                tensors[f"{prefix}.{LAYER_NAMES[module[2]]}.{kind}"] = tensor
        elif module[0] == "head":
            tensors.update({f"heads.{task}.{kind}": tensor[columns] for task, columns in model.columns.items()})
        else:
            tensors[f"{encoder}.{NAMES[module[0]]}.{kind}"] = tensor
    return tensors


def load_pretrained(folder, num_outputs=None):
    """The model of a folder: config.json and model.safetensors or pytorch_model.bin. Its heads are new ones for
    num_outputs, or, without it (a folder of save_pretrained), those of the file.

    Takes Hugging Face's files with or without the `bert.` or `electra.` prefix, with gamma/beta or weight/bias. A
    tensor that is missing, left over in the encoder, or of another shape raises CheckpointError and is named.
    """
    folder, new_heads = Path(folder), num_outputs is not None
    config = BertConfig.from_file(folder / "config.json")
    path, found = read_weights(folder, f"{config.model_type}.")
    if not new_heads:
        heads = [name for name in found if name.startswith("heads.") and name.endswith(".weight")]
        num_outputs = {name[len("heads.") : -len(".weight")]: len(found[name]) for name in heads if found[name].dim()}
        if not num_outputs:
            raise CheckpointError(f"{path}: no tensor 'heads.TASK.weight'; expected a model that bam.py has trained")
    with torch.device("meta"):  # random weights would be drawn for nothing
        model = MultiTaskBert(config, num_outputs)
    for name, tensor in public_tensors(model).items():
        if name.startswith("heads.") and new_heads:
            continue
        if name not in found:
            raise CheckpointError(f"{path}: no tensor {name!r}; expected one of shape {list(tensor.shape)}")
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}; expected {list(tensor.shape)} by config.json"
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shapes}")
    if sum(tensor.numel() for tensor in model.parameters()) > path.stat().st_size:  # a tensor can repeat one number
        raise CheckpointError(f"{path}: holds fewer numbers than its tensors' shapes say")
    model.to_empty(device="cpu")
    for name, tensor in public_tensors(model).items():
        if not (name.startswith("heads.") and new_heads):
            tensor.copy_(found.pop(name))
    left = sorted(name for name in found if name.startswith(f"{config.model_type}."))
    if left:
        raise CheckpointError(f"{path}: tensor {left[0]!r} (one of {len(left)}) has no place in config.json's encoder")
    if new_heads:
        model.initialize_heads()
    return model


def read_weights(folder, prefix):
    """(file, {public name with the encoder's prefix: tensor}) of a checkpoint's folder."""
    path = folder / WEIGHTS[0]
    if path.exists():
        tensors = read_safetensors(path)
    else:
        path = folder / WEIGHTS[1]
        try:
            refuse_what_never_ends(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # never unpickles code
        except Exception as error:  # a damaged pickle raises whatever it stumbles over
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{path}: cannot be read ({reason}); expected {' or '.join(WEIGHTS)}") from error
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path}: holds a {type(tensors).__name__}; expected names and tensors")
        tensors = {name: t for name, t in tensors.items() if isinstance(name, str) and is_plain(t)}
    prefixed = any(name.startswith(prefix) for name in tensors)
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: a constant that old files store
            continue
        encoder = name.startswith(("embeddings.", "embeddings_project.", "encoder.", "pooler."))
        found[prefix + name if encoder and not prefixed else name] = tensor
    return path, found


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32}  # fmt: skip


def is_plain(value):
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_nested)
    return plain and value.is_floating_point()  # not complex, not quantized


def refuse_what_never_ends(path):
    """torch.save does not compress: torch.load would unpack a thousand times a file's size. Its names are short, and it
    refers back to globals and names, and to a tensor that is tied to another: torch.load's own error message takes
    time that grows with the square of a name's length, and spells out a list of twice a list of twice a list."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its members are compressed")
            pickles = [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".pkl")]
    else:
        pickles = [open(path, "rb")] * 4  # the older format: four in a row, then the tensors
    for file in pickles:
        last, made_by, repeats = "", {}, 0
        for opcode, word, _ in pickletools.genops(file):
            if isinstance(word, str) and len(word) > 1000:
                raise ValueError("a name in it is longer than 1000 letters")
            if "PUT" in opcode.name:
                made_by[word] = last
            repeats += "GET" in opcode.name and not made_by.get(word, "").endswith(("GLOBAL", "UNICODE", "STRING"))
            last = opcode.name
        if repeats > 16:
            raise ValueError("its values repeat each other")


def read_safetensors(path):
    """{name: tensor} of a safetensors file: an 8-byte header length, a JSON header, raw little-endian data."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: is cut off: {size} bytes cannot hold its header of {length}")
        try:
            entries, digest = read_header(file.read(min(length, LONGEST_JSON + 1)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: header cannot be understood ({error!r}); expected safetensors") from error
    data = np.memmap(path, np.uint8, "c", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    tensors, place = {}, 0
    for name, (dtype, shape, start, end) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if end > len(data):
            raise CheckpointError(f"{path}: is cut off: tensor {name!r} ends at byte {end} of {len(data)}")
        if start != place or end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path}: tensor {name!r}: bytes {start} to {end} do not hold {dtype} {shape}")
        tensors[name] = torch.from_numpy(np.array(data[start:end])).view(dtype).view(shape)
        place = end
    if digest and digest != sha256(entries, [data]):
        raise CheckpointError(f"{path}: is damaged: its content does not have the sha256 that its header states")
    return tensors


def read_header(text):
    """A safetensors header to {name: (dtype, shape, first byte, end)} and the sha256 that write_safetensors put there,
    or None; what is odd raises one error or another."""
    entries, header = {}, parse_json(text)
    digest = header.pop("__metadata__", {}).get("sha256")
    for name, entry in header.items():
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        numbers = isinstance(shape, list) and all(type(n) is int for n in (*shape, start, end))
        if not numbers or min(shape, default=1) < 1:
            raise ValueError(f"{name}: shape {shape}, bytes {start} to {end}")
        entries[name] = DTYPES[entry["dtype"]], shape, start, end
    return entries, digest


def sha256(entries, blobs):
    """Of a safetensors file's content: names, types, shapes and places, then the data."""
    digest = hashlib.sha256(repr(entries).encode())
    for blob in blobs:
        digest.update(blob)
    return digest.hexdigest()


LONGEST_JSON = 2**20  # bytes; BERT-Large's header has 45 KB. An object can take 20 times its text's memory


def parse_json(data):
    """json.loads, but for what is too long or too deep, or names a thing twice: that raises ValueError."""
    if len(data) > LONGEST_JSON:
        raise ValueError(f"longer than {LONGEST_JSON} bytes")
    try:
        return json.loads(data, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unique(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


@contextlib.contextmanager
def whole(path):
    """A binary file for writing that gets its name once it is complete and on the disk."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor}, read_safetensors' inverse; the file appears whole or not at all, and states its sha256."""
    names, entries, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = tensor.dtype, list(tensor.shape), start, end
    blobs = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    header = {"__metadata__": {"sha256": sha256(entries, blobs), **(metadata or {})}}
    for name, (dtype, shape, start, end) in entries.items():
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for blob in blobs:
            file.write(blob)


def save_pretrained(model, folder, **more):
    """Write config.json and model.safetensors under public names, heads included: load_pretrained's inverse. `more`
    goes into config.json."""
    write_config(model, folder, **more)
    write_safetensors(folder / "model.safetensors", public_tensors(model))


def write_config(model, folder, **more):
    config = {"hidden_act": "gelu", **asdict(model.config), **more}
    with whole(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")


def public_head(encoder, weight, bias):
    """One task's head, weight (k, H), as Hugging Face's. ELECTRA's there has two layers with a GELU between them, which
    give the same logits: the first W and -W, the second the difference, as GELU(x) - GELU(-x) = x."""
    if encoder == "bert":
        return {"classifier.weight": weight, "classifier.bias": bias}
    (k, hidden), one = weight.shape, torch.eye(len(weight))
    dense, out = torch.zeros(hidden, hidden), torch.zeros(k, hidden)
    dense[: 2 * k], out[:, : 2 * k] = torch.cat([weight, -weight]), torch.cat([one, -one], 1)
    tensors = {"dense.weight": dense, "dense.bias": torch.zeros(hidden), "out_proj.weight": out, "out_proj.bias": bias}
    return {f"classifier.{name}": tensor for name, tensor in tensors.items()}


def export(model, folder, task=None, labels=()):
    """Write what Hugging Face's AutoModel loads or, with a task, AutoModelForSequenceClassification, whose logits are
    this model's; labels are the task's words, none for a score."""
    encoder = model.config.model_type
    tensors = {name: tensor for name, tensor in public_tensors(model).items() if name.startswith(f"{encoder}.")}
    if task is None:
        write_config(model, folder, architectures=[f"{encoder.capitalize()}Model"])
    else:
        tensors |= public_head(
            encoder, *(getattr(model.head, kind)[model.columns[task]] for kind in ("weight", "bias"))
        )
        names = dict(enumerate(labels or ["score"]))
        kind = "single_label_classification" if labels else "regression"
        label2id = {name: index for index, name in names.items()}
        shape = {"id2label": names, "label2id": label2id, "problem_type": kind}
        write_config(model, folder, architectures=[f"{encoder.capitalize()}ForSequenceClassification"], **shape)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
