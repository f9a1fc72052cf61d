"""The operations of the encoder, and attention over packed batches. torch and NumPy; imports nothing of ours.

    fused operations   a product with what follows it        linear_gelu, linear_dropout_add_norm, dropout, compiled
    packed batches     a batch of sequences on its device    Packed, upload
    attention          inside each sequence                  attend, Padded
    gradients          added up, and their norm              backward, vector_norm

On CUDA the whole encoder is compiled, so that each fused operation becomes a product and one kernel.

Dimension letters: B sequences, T tokens, H hidden size, A attention heads, D = H / A, F feed-forward size. Attention
alone pads: the n sequences of a group to L, the length of its longest rounded up to a multiple of 8, which makes P
positions in all.
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
    and the scale fits that p (in bfloat16 to 0.2 %, as that of F.dropout).
    """
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(p * 65536)
    keep = torch.empty(x.shape, dtype=torch.uint8)  # bool would be slower to convert to numbers
    torch.ge(bits[: x.numel()].view(x.shape), dropped - 32768, out=keep)
    return keep, 65536 / (65536 - dropped)


@functools.cache
def compiled(function):
    """The function under torch.compile, as one graph for every size that Packed.mark_dynamic marks. Mix-order
    reduction is off, since it gets LayerNorm's gradients wrong (pytorch#193061)."""
    return torch.compile(function, fullgraph=True, options={"triton.mix_order_reduction": False})


# ------------------------------------------------------------------------------------------------------ packed batches


class Packed(NamedTuple):
    """A packed batch on its device: the sequences of a glue_data.Batch, and at the end what nobody reads (upload)."""

    input_ids: torch.Tensor  # (T,)
    segment_ids: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (T,)
    examples: torch.Tensor  # (B - 3,) which examples of the dataset these are
    layout: "Padded"  # where each sequence lies, for attention

    def mark_dynamic(self):
        """Tell torch.compile which sizes change from batch to batch."""
        *indices, masks = self.layout
        for tensor in (self.input_ids, self.segment_ids, self.position_ids, *indices, *masks):
            torch._dynamo.mark_dynamic(tensor, 0)
        for mask in masks:
            torch._dynamo.mark_dynamic(mask, 3)


def upload(batch, device):
    """A glue_data.Batch as a Packed on the device: by one copy, on CUDA out of pinned memory, for which nothing waits.

    Three sequences of one token are added at the end. Nobody reads them, so their gradients are 0, and padding can be
    copies of the last. With them each of the two groups has two sequences or more; for one torch.compile would make
    another graph. Copies of their token, in no sequence, make T a multiple of 32: a product in bfloat16 on a CPU needs
    a kernel for each T, which can take longer to make than to run (oneDNN, with AMX).
    """
    copies = -(len(batch.input_ids) + 3) % 32
    added = [0] * (3 + copies)
    tokens = [np.append(array, added) for array in (batch.input_ids, batch.segment_ids, batch.position_ids)]  # (T,)
    cls, pad, unpad, groups = padded_indices(np.append(np.diff(batch.cu_seqlens), [1, 1, 1]))
    unpad = np.append(unpad, np.repeat(unpad[-1:], copies))  # (T,)
    arrays = [*tokens, batch.examples, cls, pad, unpad, *groups]
    flat = torch.from_numpy(np.concatenate(arrays, axis=None, dtype=np.int32, casting="same_kind"))  # end to end
    if device.type == "cuda":
        flat = flat.pin_memory()
        # With a mask, cuDNN's attention has NaN gradients at some sizes (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    flat = flat.to(device, non_blocking=device.type == "cuda")
    *fields, cls, pad, unpad, first, second = flat.split([array.size for array in arrays])
    masks = tuple(mask.view(len(group), 1, 1, -1).bool() for mask, group in zip((first, second), groups, strict=True))
    return Packed(*fields, Padded(cls, pad, unpad, masks))


def padded_indices(lengths):
    """cls (B,), pad (P,) and unpad (T,) of a Padded, and for both groups which padded positions hold a token (n, L)."""
    starts = np.cumsum(lengths) - lengths
    pads = []
    groups = []
    for members in np.split(np.arange(len(lengths)), [first_of_second_group(lengths)]):
        positions = np.arange(-(-lengths[members].max() // 8) * 8)
        is_token = positions < lengths[members, None]  # (n, L)
        pads.append(np.where(is_token, starts[members, None] + positions, starts[-1]))  # (n, L)
        groups.append(is_token)
    return starts, np.concatenate(pads, axis=None), np.flatnonzero(np.concatenate(groups, axis=None)), groups


def first_of_second_group(lengths):
    """Where to cut the sequences into two groups, so that attention has least to do if they come longest first. Lengths
    count as multiples of 8, which a GPU's kernels want. More groups would mean less padding and more calls, which is no
    faster on a CPU either, and a number of groups that changes would mean more graphs of torch.compile."""
    padded = -(-lengths // 8) * 8
    counts = np.arange(2, len(lengths) - 1)  # of sequences in the first group
    work = counts * padded[0] ** 2 + (len(lengths) - counts) * padded[counts] ** 2
    return counts[work.argmin()]


# ----------------------------------------------------------------------------------------------------------- attention


def attend(q, k, v, mask, p):
    """Attention of queries (n, A, L or 1, D) over keys and values (n, A, L, D), with dropout p on the probabilities, to
    (n, A, L or 1, D). mask (n, 1, 1, L) is true where a key is a token."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    # To train on a CPU the same with the faster dropout, and with softmax and its gradient in float32.
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (n, A, L or 1, L)
    probabilities = scores.masked_fill_(~mask, -torch.inf).float().softmax(-1)
    return dropout(probabilities, p).to(v.dtype) @ v


class Padded(NamedTuple):
    """Sequences in two groups, one after the other, each padded to its longest (here nothing is rounded up):

    tokens     a a a a a b b b b c c d e f                      T = 14, B = 6; nobody reads d, e and f
    padded     a a a a a  b b b b -    c c  d -  e -  f -       n = 2, L = 5, and n = 4, L = 2
    pad        0 1 2 3 4  5 6 7 8 13   9 10 11 13 12 13 13 13   each padded position's token; padding borrows the last
    unpad      0 1 2 3 4 5 6 7 8 10 11 12 14 16                 each token's padded position
    """

    cls: torch.Tensor  # (B,) each sequence's first token
    pad: torch.Tensor  # (P,)
    unpad: torch.Tensor  # (T,)
    masks: tuple[torch.Tensor, ...]  # of each group (n, 1, 1, L), true where a padded position holds a token

    def attention(self, qkv, num_heads, p, cls_q=None):
        """Self-attention inside each sequence with dropout p on the probabilities: qkv (T, 3H) to (T, H). With cls_q
        (B, H), the queries of the [CLS] tokens alone, qkv holds keys and values (T, 2H), and the result is (B, H)."""
        groups = Gather.apply(qkv, self.pad, self.unpad).split([mask.numel() for mask in self.masks])
        queries = [None] * len(groups) if cls_q is None else cls_q.split([len(mask) for mask in self.masks])
        contexts = []
        for group, mask, q in zip(groups, self.masks, queries, strict=True):  # group (n · L, 3H or 2H)
            n, _, _, length = mask.shape
            parts = 3 if q is None else 2
            heads = group.view(n, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4)  # (3 or 2, n, A, L, D)
            q, k, v = heads if q is None else (q.view(n, num_heads, 1, -1), *heads)  # (n, A, L, D); q (n, A, L or 1, D)
            context = attend(q, k, v, mask, p)  # (n, A, L or 1, D)
            contexts.append(context.transpose(1, 2).flatten(0, 1).flatten(1))  # (n · L or n, H)
        context = torch.cat(contexts)  # (P or B, H)
        return Gather.apply(context, self.unpad, self.pad) if cls_q is None else context


class Gather(torch.autograd.Function):
    """x[index], to pad or to unpad. Its gradient is grad[inverse], a gather too, where PyTorch's would add up. It is
    exact: padding and what upload adds send no gradient back, and the token of which they are copies gets none."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


# ----------------------------------------------------------------------------------------------------------- gradients


def backward(loss, parameters, device):
    """loss.backward() for parameters that have gradients, to which it adds. On an accelerator a few kernels add them
    all; backward() would launch one for each parameter, and a launch takes longer than the addition."""
    if device.type == "cpu":
        return loss.backward()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)  # 0 for a parameter that had no part in it
    torch._foreach_add_([parameter.grad for parameter in trained], gradients)


def vector_norm(vector):
    """The Euclidean norm of a long vector, 0-dimensional. On a CPU norm() sums in float32 and loses small terms: it is
    1 % too small for random numbers of BERT-Base's length, 6 % of BERT-Large's. In parts of 2^18 it errs by 6e-6."""
    if vector.device.type != "cpu":
        return vector.norm()
    return torch.stack([part.norm() for part in vector.split(1 << 18)]).norm()
