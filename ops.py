"""The operations of the encoder, and attention over packed batches. torch and NumPy; imports nothing of ours.

    fused operations   a product with what follows it        linear_gelu, linear_dropout_add_norm, dropout, compiled
    packed batches     a batch of sequences on its device    Packed, upload
    attention          inside each sequence                  attend, Padded for accelerators, Buckets for a CPU

On CUDA the whole encoder is compiled, so that each fused operation becomes a product and one kernel. The two layouts
for attention have one meaning: Padded is one call of PyTorch's attention; Buckets, for a CPU, pad less.

Dimension letters: B sequences, T tokens, H hidden size, A attention heads, D = H / A, F feed-forward size. Attention
alone pads: B sequences, or the n of a bucket, to the L tokens of the longest.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------- fused operations


def linear_gelu(x, linear):
    """GELU(x Wᵀ + b) with the exact GELU (erf). (T, H) to (T, F)."""
    return F.gelu(linear(x))


def linear_dropout_add_norm(x, linear, residual, norm, p):
    """LayerNorm(residual + dropout(x Wᵀ + b)), the end of both sub-layers. (T, H or F) to (T, H)."""
    return norm(residual + dropout(linear(x), p))


def dropout(x, p):
    """x with each element dropped with probability p and the others scaled by 1 / (1 - p)."""
    if p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    keep, scale = dropout_mask(x, p)  # on a CPU faster than F.dropout
    return x * keep.to(x.dtype).mul_(scale)


def dropout_mask(x, p):
    """Which elements of x stay, 1 or 0 in 8 bits each, and the scale of those that stay.

    An element takes 16 bits of a 64-bit draw, so that p becomes the nearest multiple of 1/65536 (0.1 becomes 0.100006),
    and the scale fits that p.
    """
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(p * 65536)
    keep = torch.empty(x.shape, dtype=torch.uint8)  # bool would be slower to convert to numbers
    torch.ge(bits[: x.numel()].view(x.shape), dropped - 32768, out=keep)
    return keep, 65536 / (65536 - dropped)


@functools.cache
def compiled(function):
    """The function under torch.compile, as one graph for every size of the dimensions that `upload` marks. Mix-order
    reduction is off, since it gets LayerNorm's gradients wrong (pytorch#193061)."""
    return torch.compile(function, fullgraph=True, options={"triton.mix_order_reduction": False})


# ------------------------------------------------------------------------------------------------------ packed batches


class Packed(NamedTuple):
    """A packed batch on its device: B sequences end to end, as in glue_data.Batch."""

    input_ids: torch.Tensor  # (T,)
    segment_ids: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (T,)
    examples: torch.Tensor  # (B,) which examples of the dataset these are
    layout: "Padded | Buckets"  # where each sequence lies, for attention


def upload(batch, device):
    """A glue_data.Batch as a Packed on the device."""
    if device.type != "cpu":
        return upload_padded(batch, device)
    tokens = map(torch.from_numpy, (batch.input_ids, batch.segment_ids, batch.position_ids, batch.examples))
    return Packed(*tokens, Buckets(batch.cu_seqlens))


def upload_padded(batch, device):
    """The same for an accelerator: one copy out of pinned memory, for which nothing waits. The layout is Padded.

    A sequence of one token is added at the end. Nobody reads it, so its gradient is 0, and padding can be copies of it.
    It also keeps B from being 1, for which torch.compile would make another graph.
    """
    tokens = [np.append(array, 0) for array in (batch.input_ids, batch.segment_ids, batch.position_ids)]  # (T,) each
    lengths = np.append(np.diff(batch.cu_seqlens), 1)  # (B,)
    arrays = [*tokens, *padded_indices(lengths), lengths, batch.examples]
    flat = torch.from_numpy(np.concatenate(arrays, dtype=np.int32, casting="same_kind"))
    if device.type == "cuda":
        flat = flat.pin_memory()
        # With a mask, cuDNN's attention has NaN gradients at some sizes (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    flat = flat.to(device, non_blocking=device.type == "cuda")
    *tokens, cls, pad, unpad, lengths, examples = flat.split([len(array) for array in arrays])
    positions = torch.arange(len(pad) // len(cls), device=device)  # (L,)
    mask = (positions < lengths[:, None])[:, None, None]  # (B, 1, 1, L)
    for tensor in (*tokens, cls, pad, unpad, mask):
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.mark_dynamic(mask, 3)
    return Packed(*tokens, examples, Padded(cls, pad, unpad, mask))


def padded_indices(lengths):
    """cls (B,), pad (B · L,) and unpad (T,) of a Padded layout. L is a multiple of 8, as attention's kernels want."""
    longest = -(-lengths.max() // 8) * 8
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(longest)
    is_token = positions < lengths[:, None]  # (B, L)
    pad = np.where(is_token, starts[:, None] + positions, starts[-1])  # (B, L)
    return starts, pad.ravel(), np.flatnonzero(is_token)


# ----------------------------------------------------------------------------------------------------------- attention


def attend(function, padded, mask, num_heads, p, cls_q=None):
    """Attention by function(q, k, v, attn_mask, dropout_p) inside each of n padded sequences: queries, keys and values
    (n · L, 3H) to (n · L, H). With cls_q (n, H), the queries of the [CLS] tokens alone, keys and values (n · L, 2H) to
    (n, H). mask (n, 1, 1, L) is true where a padded position holds a token; p: dropout on the probabilities."""
    n, _, _, length = mask.shape
    parts = 3 if cls_q is None else 2
    heads = padded.view(n, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)  # (3 or 2, n, A, L, D)
    if cls_q is None:
        q, k, v = heads  # (n, A, L, D) each
    else:
        k, v = heads
        q = cls_q.view(n, num_heads, 1, -1)  # (n, A, 1, D)
    context = function(q, k, v, attn_mask=mask, dropout_p=p)  # (n, A, L or 1, D)
    return context.transpose(1, 2).flatten(0, 1).flatten(1)  # (n · L or n, H)


def attention_on_cpu(q, k, v, attn_mask, dropout_p):
    """PyTorch's scaled_dot_product_attention, with the faster dropout, and with softmax and its gradient in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (n, A, L or 1, L)
    probabilities = scores.masked_fill_(~attn_mask, -torch.inf).float().softmax(-1)
    return dropout(probabilities, dropout_p).to(v.dtype) @ v  # (n, A, L or 1, D)


# Both layouts below have `cls` (B,), the position of each sequence's first token, and the method
#
#     attention(qkv, num_heads, p, cls_q=None)
#
# self-attention inside each sequence with dropout p on the probabilities: qkv (T, 3H) to (T, H). With cls_q (B, H), the
# queries of the [CLS] tokens alone, qkv holds keys and values (T, 2H), and the result is (B, H).


class Padded(NamedTuple):
    """Sequences padded to the longest, for one call of scaled_dot_product_attention:

    tokens     a a a a a b b b b c                    T = 10, B = 3; c is the sequence that nobody reads
    padded     a a a a a  b b b b -  c - - - -        L = 5 (8 in fact: L is a multiple of 8)
    pad        0 1 2 3 4  5 6 7 8 9  9 9 9 9 9        each padded position's token; padding borrows the last one
    unpad      0 1 2 3 4 5 6 7 8 10                   each token's padded position
    """

    cls: torch.Tensor  # (B,) each sequence's first token
    pad: torch.Tensor  # (B · L,)
    unpad: torch.Tensor  # (T,)
    mask: torch.Tensor  # (B, 1, 1, L) true where a padded position holds a token

    def attention(self, qkv, num_heads, p, cls_q=None):
        padded = Gather.apply(qkv, self.pad, self.unpad)  # (B · L, 3H or 2H)
        context = attend(F.scaled_dot_product_attention, padded, self.mask, num_heads, p, cls_q)  # (B · L or B, H)
        return Gather.apply(context, self.unpad, self.pad) if cls_q is None else context


class Buckets:
    """Sequences sorted by length, cut into buckets of similar length, and padded to one length in each:

    tokens     a a a a a b b b b c d                       T = 11, B = 4
    buckets    [a a a a a] [b b b b -]  and  [c] [d]       n = 2, L = 5  and  n = 2, L = 1

    Padding borrows the first token, and nothing of it comes back.
    """

    SHRINK = 0.7  # a new bucket begins where a sequence is shorter than this part of its bucket's longest

    def __init__(self, cu_seqlens):
        starts = cu_seqlens[:-1].astype(np.int64)
        lengths = np.diff(cu_seqlens)
        order = np.argsort(-lengths, kind="stable")
        self.cls = torch.from_numpy(starts)  # (B,)
        self.order = torch.from_numpy(order)  # (B,) sequences, longest first
        self.inverse = torch.from_numpy(np.argsort(order))  # (B,)
        self.masks = []  # (n, 1, 1, L) of each bucket
        pad = []
        for members in np.split(order, self.cuts(lengths[order])):
            positions = np.arange(lengths[members[0]])
            is_token = positions < lengths[members, None]  # (n, L)
            pad.append(np.where(is_token, starts[members, None] + positions, -1).ravel())
            self.masks.append(torch.from_numpy(is_token[:, None, None]))
        pad = np.concatenate(pad)  # each padded position's token, or -1
        self.unpad = torch.from_numpy(np.argsort(pad, kind="stable")[-cu_seqlens[-1] :])  # each token's padded position
        self.pad = torch.from_numpy(pad.clip(0))

    def cuts(self, lengths):
        """Where buckets begin, but for the first, in lengths (B,) from the longest."""
        cuts = []
        longest = lengths[0]
        for position, length in enumerate(lengths):
            if length < self.SHRINK * longest:
                cuts.append(position)
                longest = length
        return cuts

    def attention(self, qkv, num_heads, p, cls_q=None):
        padded = Gather.apply(qkv, self.pad, self.unpad).split([mask.numel() for mask in self.masks])
        queries = [None] * len(padded)
        if cls_q is not None:
            queries = cls_q[self.order].split([len(mask) for mask in self.masks])
        buckets = zip(padded, self.masks, queries, strict=True)
        contexts = [attend(attention_on_cpu, x, mask, num_heads, p, q) for x, mask, q in buckets]
        context = torch.cat(contexts)  # (padded tokens or B, H)
        return context.index_select(0, self.unpad) if cls_q is None else context[self.inverse]


class Gather(torch.autograd.Function):
    """x[index], to pad or to unpad. Its gradient is grad[inverse], a gather too, where PyTorch's would add up. It is
    exact: padding sends no gradient back, and the token that Padded copies into it gets none."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
