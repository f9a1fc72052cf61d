"""The operations of the encoder, and attention over packed batches. torch and NumPy; imports nothing of ours.

    fused operations   a product with what follows it        linear_gelu, linear_dropout_add_norm, dropout, compiled
    packed batches     a batch of sequences on its device    Packed, upload
    attention          inside each sequence                  Padded, for accelerators
    on a CPU           the same, faster there                dropout_mask, Buckets

On an accelerator the whole encoder is compiled, so that each fused operation becomes a product and one kernel. The two
forms of attention have one meaning: Padded calls one public operator, and is the tests' oracle; Buckets, with gradients
written out, train 1.1 to 1.3 times as fast on a CPU.

Dimension letters: B sequences, T tokens, H hidden size, A attention heads, D = H / A, F feed-forward size. Attention
alone pads: B sequences, or the n of a bucket, to the L tokens of the longest.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------- fused operations


def linear_gelu(x, weight, bias):
    """GELU(x Wᵀ + b) with the exact GELU (erf). (T, H) to (T, F)."""
    return F.gelu(F.linear(x, weight, bias))


def linear_dropout_add_norm(x, weight, bias, residual, norm, p):
    """LayerNorm(residual + dropout(x Wᵀ + b)), the end of both sub-layers. (T, H or F) to (T, H)."""
    x = residual + dropout(F.linear(x, weight, bias), p)  # (T, H)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def dropout(x, p):
    """x with each element dropped with probability p and the others scaled by 1 / (1 - p)."""
    if p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    keep, scale = dropout_mask(x, p)  # takes a third of F.dropout's time on a CPU
    return x * keep.to(x.dtype).mul_(scale)


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


def upload(batch, examples, num_heads, device):
    """A glue_data.Batch and its examples' indices (B,) as a Packed on the device.

    An accelerator gets one copy out of pinned memory, for which nothing waits.
    """
    tokens = [batch.input_ids, batch.segment_ids, batch.position_ids]
    if device.type == "cpu":
        layout = Buckets(batch.cu_seqlens, num_heads)
        return Packed(*map(torch.from_numpy, tokens), torch.from_numpy(examples), layout)
    return upload_padded(tokens, batch.cu_seqlens, examples, device)


def upload_padded(tokens, cu_seqlens, examples, device):
    """A Packed with a Padded layout, and with one more sequence at its end, of one token. Nobody reads it, so that its
    gradients are 0: padding borrows it. With it B is never 1, for which torch.compile would make another graph."""
    tokens = [np.append(array, 0) for array in tokens]  # (T,) each
    lengths = np.append(np.diff(cu_seqlens), 1)  # (B,)
    arrays = [*tokens, *padded_indices(lengths), lengths, examples]
    flat = torch.from_numpy(np.concatenate(arrays, dtype=np.int32, casting="same_kind"))
    if device.type == "cuda":
        flat = flat.pin_memory()
        # With a mask, cuDNN's attention has NaN gradients at some sizes (pytorch#196678); memory-efficient attention not.
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
        batch_size, _, _, length = self.mask.shape
        parts = 3 if cls_q is None else 2
        padded = Gather.apply(qkv, self.pad, self.unpad)  # (B · L, 3H or 2H)
        padded = padded.view(batch_size, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)  # (3 or 2, B, A, L, D)
        if cls_q is None:
            q, k, v = padded  # (B, A, L, D) each
        else:
            k, v = padded
            q = cls_q.view(batch_size, num_heads, 1, -1)  # (B, A, 1, D)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=p)  # (B, A, L or 1, D)
        context = context.transpose(1, 2).flatten(0, 1).flatten(1)  # (B · L or B, H)
        return Gather.apply(context, self.unpad, self.pad) if cls_q is None else context


class Gather(torch.autograd.Function):
    """x[index], to pad or to unpad, with a gradient that gathers too, by the inverse index, and adds nothing: what
    padding borrows has no gradient, and padding has none itself."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class Take(torch.autograd.Function):
    """x[index] for an index without repeats, with a gradient that places rows, adds nothing, and is 0 elsewhere."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, grad.shape[1]).index_copy(0, index.long(), grad), None


# ------------------------------------------------------------------------------------------------------------ on a CPU
# What follows has the meaning of F.dropout and of Padded, and is here for its speed on a CPU alone.


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


class Buckets:
    """Sequences sorted by length, cut into buckets of similar length, and padded to one length in each:

    tokens     a a a a a b b b b c d                       T = 11, B = 4
    buckets    [a a a a a] [b b b b -]  and  [c] [d]       n = 2, L = 5  and  n = 2, L = 1

    What is padded is not a token's row of numbers but its queries, keys and values, head by head, so that every bucket
    finds its q, k and v as (n, A, L, D) without another copy.
    """

    SHRINK = 0.8  # a new bucket begins where a sequence is shorter than this part of its bucket's longest

    def __init__(self, cu_seqlens, num_heads):
        starts = cu_seqlens[:-1]
        lengths = np.diff(cu_seqlens)
        order = np.argsort(-lengths, kind="stable")
        self.cls = torch.from_numpy(np.asarray(starts, np.int64))  # (B,)
        self.order = torch.from_numpy(order)  # (B,) sequences, longest first
        self.inverse = torch.from_numpy(np.argsort(order))  # (B,)
        self.num_heads = num_heads
        self.shapes = []  # (n, L) of each bucket
        self.masks = []  # (n, 1, 1, L) of each bucket, or None where nothing is padded
        self.num_padded = 0
        columns = np.empty((4, len(lengths)), np.int64)  # for each sequence, what pad_and_unpad needs
        for members in np.split(order, self.cuts(lengths[order])):
            n = len(members)
            longest = int(lengths[members[0]])
            is_token = np.arange(longest) < lengths[members, None]  # (n, L)
            self.shapes.append((n, longest))
            self.masks.append(None if is_token.all() else torch.from_numpy(is_token[:, None, None]))
            columns[0, members] = self.num_padded  # padded tokens in the buckets before
            columns[1, members] = np.arange(n) * num_heads * longest  # the sequence's place in its bucket
            columns[2, members] = n * num_heads * longest  # from q to k, or k to v
            columns[3, members] = longest  # from head to head
            self.num_padded += n * longest
        columns = np.repeat(columns, lengths, axis=1)  # (4, T)
        columns[1] += np.arange(columns.shape[1]) - np.repeat(starts, lengths)
        columns = torch.from_numpy(columns)[:, :, None, None]  # (4, T, 1, 1)
        self.indices = {parts: self.pad_and_unpad(columns, parts) for parts in (1, 2, 3)}

    def cuts(self, lengths):
        """Where buckets begin, but for the first, in lengths (B,) from the longest."""
        cuts = []
        longest = lengths[0]
        for position, length in enumerate(lengths):
            if length < self.SHRINK * longest:
                cuts.append(position)
                longest = length
        return cuts

    def pad_and_unpad(self, columns, parts):
        """pad and unpad for vectors of D numbers, which stand as (T, parts, A) in the batch and as (parts, n, A, L) in
        each bucket; the parts are q, k and v, or k and v, or the context alone."""
        before, first, next_part, next_head = columns
        part = torch.arange(parts)[:, None]
        head = torch.arange(self.num_heads)
        unpad = parts * self.num_heads * before + first + part * next_part + head * next_head  # (T, parts, A)
        unpad = unpad.flatten()
        pad = torch.zeros(parts * self.num_heads * self.num_padded, dtype=torch.int64)
        pad[unpad] = torch.arange(len(unpad))
        return pad, unpad

    def split(self, padded, queries):
        """Padded vectors (rows, D) as each bucket's q, k and v: views (n, A, L, D). The q of the [CLS] tokens alone,
        (n, A, 1, D), come from `queries` (B · A, D)."""
        parts = 3 if queries is None else 2
        size = padded.shape[-1]
        heads = self.num_heads
        pieces = padded.split([parts * n * heads * length for n, length in self.shapes])
        views = [x.view(parts, n, heads, -1, size).unbind() for x, (n, _) in zip(pieces, self.shapes, strict=True)]
        if queries is None:
            return views
        pieces = queries.split([n * heads for n, _ in self.shapes])
        return [(q.view(-1, heads, 1, size), k, v) for q, (k, v) in zip(pieces, views, strict=True)]

    def attention(self, qkv, num_heads, p, cls_q=None):
        parts = 3 if cls_q is None else 2
        size = qkv.shape[1] // (parts * num_heads)
        padded = Gather.apply(qkv.view(-1, size), *self.indices[parts])  # (rows, D)
        if cls_q is None:
            context = BucketAttention.apply(padded, None, self, p)  # (rows, D)
            _, unpad = self.indices[1]
            return Take.apply(context, unpad).view(len(qkv), -1)
        queries = cls_q[self.order].view(-1, size)  # (B · A, D)
        context = BucketAttention.apply(padded, queries, self, p)  # (B · A, D)
        return context.view_as(cls_q)[self.inverse]


class BucketAttention(torch.autograd.Function):
    """softmax(q kᵀ / √D) v with dropout p on the probabilities, bucket by bucket, with its gradient written out so that
    every product lands in its place. With probabilities P and dropout's mask M, scale included, the context is
    O = (P M) v, and

        ∂v = (P M)ᵀ ∂O,      ∂P = M (∂O vᵀ),      ∂scores = P (∂P − Σ P ∂P)      (Σ over a query's row)
    """

    @staticmethod
    def forward(ctx, padded, queries, buckets, p):
        inputs = buckets.split(padded, queries)
        sizes = [q[..., 0].numel() for q, _, _ in inputs]
        context = padded.new_empty(sum(sizes), padded.shape[-1])  # (rows, D)
        saved = []
        for (q, k, v), mask, out in zip(inputs, buckets.masks, context.split(sizes), strict=True):
            scores = batched_product(q, k.mT, q.shape[-1] ** -0.5)  # (n, A, L or 1, L)
            if mask is not None:
                scores.masked_fill_(~mask, -torch.inf)
            probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
            keep, ctx.scale = dropout_mask(scores, p) if p else (None, 1.0)
            batched_product(kept(probabilities, keep).to(v.dtype), v, ctx.scale, out=out.view_as(q))
            saved += [probabilities, keep]
        ctx.buckets = buckets
        ctx.sizes = sizes
        ctx.save_for_backward(padded, queries, *saved)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        padded, queries, *saved = ctx.saved_tensors
        grad_padded = torch.empty_like(padded)
        grad_queries = None if queries is None else torch.empty_like(queries)
        inputs = ctx.buckets.split(padded, queries)
        outputs = ctx.buckets.split(grad_padded, grad_queries)
        buckets = zip(inputs, outputs, grad.split(ctx.sizes), saved[0::2], saved[1::2], strict=True)
        for (q, k, v), (grad_q, grad_k, grad_v), grad_out, probabilities, keep in buckets:
            grad_out = grad_out.view_as(q)
            batched_product(kept(probabilities, keep).to(v.dtype).mT, grad_out, ctx.scale, out=grad_v)
            slope = kept(batched_product(grad_out, v.mT, ctx.scale).to(probabilities.dtype), keep)
            slope.sub_((slope * probabilities).sum(-1, keepdim=True)).mul_(probabilities)  # (n, A, L or 1, L)
            batched_product(slope.to(q.dtype), k, q.shape[-1] ** -0.5, out=grad_q)
            batched_product(slope.to(q.dtype).mT, q, q.shape[-1] ** -0.5, out=grad_k)
        return grad_padded, grad_queries, None, None


def kept(x, keep):
    """x without what dropout drops, not yet scaled."""
    return x if keep is None else x * keep.to(x.dtype)


def batched_product(a, b, scale=1.0, out=None):
    """scale · a b for each head of each sequence, written to `out`."""
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    flat = out.view(-1, *out.shape[2:])
    torch.baddbmm(flat, a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale, out=flat)
    return out
