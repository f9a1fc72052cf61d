"""BERT over packed batches, with the heads of many tasks, and the public checkpoint formats. torch and NumPy.

    encoder       BertConfig, BertLayer, MultiTaskBert
    checkpoints   Hugging Face's names and files          public_tensors, load_pretrained, save_pretrained
    tensor files  the safetensors format                  read_safetensors, write_safetensors

The semantics are those of the original's bam/bert/modeling.py; only the layout differs. A batch of B sequences is one
row of T tokens, over which every product runs. Attention alone pads (ops.Padded).

Dimension letters: B sequences, T tokens, H hidden size, A attention heads, F feed-forward size, E embedding size (H but
for small ELECTRA), K outputs of all tasks together.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ops import dropout, linear_dropout_add_norm, linear_gelu

# ------------------------------------------------------------------------------------------------------------- encoder


@dataclass(frozen=True)
class BertConfig:
    """The encoder's shape: the fields of a checkpoint's config.json."""

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
    embedding_size: int = 0  # ELECTRA's can be smaller than hidden_size, which 0 stands for
    model_type: str = "bert"

    def __post_init__(self):
        if self.model_type == "bert" or not self.embedding_size:
            object.__setattr__(self, "embedding_size", self.hidden_size)


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm (post-norm)."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.qkv = nn.Linear(hidden, 3 * hidden)  # query, key and value as one product
        self.attention_out = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.ffn_in = nn.Linear(hidden, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, config.layer_norm_eps)

    def forward(self, x, layout, only_cls=False):
        """x (T, H) to (T, H). layout, an ops.Padded, attends inside each sequence. With only_cls, for the last layer,
        to (B, H), the [CLS] tokens: the others, which nobody reads, give keys and values alone."""
        hidden = self.config.hidden_size
        heads = self.config.num_attention_heads
        p_hidden = self.config.hidden_dropout_prob if self.training else 0.0
        p_attention = self.config.attention_probs_dropout_prob if self.training else 0.0
        if only_cls:
            kv = F.linear(x, self.qkv.weight[hidden:], self.qkv.bias[hidden:])  # (T, 2H)
            x = x.index_select(0, layout.cls)  # (B, H)
            q = F.linear(x, self.qkv.weight[:hidden], self.qkv.bias[:hidden])  # (B, H)
            context = layout.attention(kv, heads, p_attention, q)  # (B, H)
        else:
            context = layout.attention(self.qkv(x), heads, p_attention)  # (T, H)
        x = linear_dropout_add_norm(context, self.attention_out, x, self.attention_norm, p_hidden)  # (T or B, H)
        inner = linear_gelu(x, self.ffn_in)  # (T or B, F)
        return linear_dropout_add_norm(inner, self.ffn_out, x, self.ffn_norm, p_hidden)  # (T or B, H)


class Embedding(nn.Embedding):
    """nn.Embedding that draws no values on the meta device: that would load PyTorch's compiler, for seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class MultiTaskBert(nn.Module):
    """The encoder, its pooler, and the heads of all tasks as the rows of one matrix: one product serves a batch of
    mixed tasks, and the head of an absent task gets the zero gradient that it gets in the original.

    num_outputs: {task: number of labels, or 1 for a score}; a task's logits are `columns[task]` of the K.
    """

    compiled = None  # pooled_output as one compiled graph, for training on CUDA (runtime.Run.compile_encoder)

    def __init__(self, config, num_outputs):
        super().__init__()
        hidden = config.hidden_size
        width = config.embedding_size
        self.config = config
        self.num_outputs = dict(num_outputs)
        self.columns = {}
        total = 0
        for task, count in num_outputs.items():
            self.columns[task] = slice(total, total + count)
            total += count
        self.word_embeddings = Embedding(config.vocab_size, width)
        self.position_embeddings = Embedding(config.max_position_embeddings, width)
        self.segment_embeddings = Embedding(config.type_vocab_size, width)
        self.embeddings_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.embeddings_project = nn.Linear(width, hidden) if width != hidden else nn.Identity()
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(hidden, hidden) if config.model_type == "bert" else None
        self.head = nn.Linear(hidden, total)
        self.initialize()

    @torch.no_grad()
    def initialize(self, parts=""):
        """Draw the parameters whose names begin with `parts`, one or several: from BERT's normal, truncated at two
        standard deviations; biases 0; the heads Glorot-uniform, each task's by itself."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if not name.startswith(parts):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "head.weight":
                for columns in self.columns.values():
                    nn.init.xavier_uniform_(parameter[columns])
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def depth(self, name):
        """A parameter's depth for layer-wise learning rates: 0 for embeddings, k + 1 for layer k (from 0), then the
        pooler, then the head (bam/bert/optimization.py, _get_edecay_lrs)."""
        num_layers = self.config.num_hidden_layers
        if name.startswith("layers."):
            return int(name.split(".")[1]) + 1
        return {"pooler": num_layers + 1, "head": num_layers + 2}.get(name.split(".")[0], 0)

    def embed(self, input_ids, segment_ids, position_ids):
        """Token, segment and position ids (T,) each to embeddings (T, H)."""
        words = self.word_embeddings.weight
        # On a CPU, to a gradient that Adam has made, autograd then adds only the rows of the batch's words.
        sparse = words.device.type == "cpu" and words.grad is not None and not torch.compiler.is_compiling()
        x = F.embedding(input_ids, words, sparse=sparse) + self.position_embeddings(position_ids)  # (T, E)
        x = self.embeddings_norm(x + self.segment_embeddings(segment_ids))
        x = dropout(x, self.config.hidden_dropout_prob if self.training else 0.0)
        return self.embeddings_project(x)  # (T, H)

    def pooled_output(self, input_ids, segment_ids, position_ids, layout, bfloat16=False):
        """(T,) each to (B, H) in float32. This is what is compiled, so the precision is chosen inside."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=bfloat16):
            x = self.embed(input_ids, segment_ids, position_ids)  # (T, H)
            for layer in self.layers:
                x = layer(x, layout, only_cls=layer is self.layers[-1])  # (T, H); of the last layer (B, H)
            if self.pooler is not None:  # ELECTRA has none: its own fine-tuning puts the heads on [CLS] as it is
                x = torch.tanh(self.pooler(x))
        return x.float()

    def forward(self, batch, bfloat16=False):
        """An ops.Packed of B sequences to the logits (B - 3, K) of every head, without the three that ops.upload adds.
        bfloat16: products in it, sums in float32. The heads compute in float32: in bfloat16 STS-B's scores, up to 5,
        would have steps of 0.02."""
        pooled_output = MultiTaskBert.pooled_output
        if self.compiled and self.training:
            pooled_output = self.compiled
            batch.mark_dynamic()
        tokens = batch.input_ids, batch.segment_ids, batch.position_ids
        pooled = pooled_output(self, *tokens, batch.layout, bfloat16)  # (B, H)
        pooled = dropout(pooled, self.config.hidden_dropout_prob if self.training else 0.0)
        return self.head(pooled)[: len(batch.examples)]


# --------------------------------------------------------------------------------------------------------- checkpoints


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file, the tensor or key, and what was expected."""


# A folder's weights are in the first of these that it has; an index lists the files over which they are spread.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
NO_POINTER = "tensors, and no Git LFS pointer, which `git lfs pull` would replace by them"
# What config.json may say; the first is meant where it says nothing.
SUPPORTED = {
    "model_type": ("bert", "electra"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}
# Our names, and Hugging Face's for the same tensors. There q, k and v are three, and layers are encoder.layer.N.
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


def read_config(path):
    """The BertConfig of a config.json. Raises CheckpointError where it is not BERT's or ELECTRA's."""
    try:
        values = dict(json.loads(path.read_bytes()))
        for key, supported in SUPPORTED.items():
            if values.get(key, supported[0]) not in supported:
                raise ValueError(f"{key} is {values[key]!r}; expected {' or '.join(map(repr, supported))}")
        config = BertConfig(**{field.name: values[field.name] for field in fields(BertConfig) if field.name in values})
        for field in fields(BertConfig):
            value = getattr(config, field.name)
            if field.type is int and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{field.name} is {value!r}; expected a whole number from 1")
            if field.type is float and not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise ValueError(f"{field.name} is {value!r}; expected a number from 0 to below 1")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}")
        if config.type_vocab_size < 2:
            raise ValueError(f"type_vocab_size is {config.type_vocab_size}; expected 2, for pairs of sentences")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected BERT's configuration") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not BERT's configuration: {error}") from error
    return config


def public_tensors(model):
    """{Hugging Face's name: our tensor, or the part of it with that name}: views, so that writing to them loads."""
    tensors = {}
    encoder = model.config.model_type
    for name, tensor in model.state_dict().items():
        *module, kind = name.split(".")
        if module[0] == "layers":
            prefix = f"{encoder}.encoder.layer.{module[1]}"
            if module[2] == "qkv":
                for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    tensors[f"{prefix}.attention.self.{part}.{kind}"] = third
            else:
                tensors[f"{prefix}.{LAYER_NAMES[module[2]]}.{kind}"] = tensor
        elif module[0] == "head":
            tensors.update({f"heads.{task}.{kind}": tensor[columns] for task, columns in model.columns.items()})
        else:
            tensors[f"{encoder}.{NAMES[module[0]]}.{kind}"] = tensor
    return tensors


def load_pretrained(folder, num_outputs=None, say=lambda line: None):
    """The model of a checkpoint's folder, in training mode. Its heads are new ones for num_outputs ({task: count}) or,
    without it, those of the file, which save_pretrained wrote. Where the file has no pooler, `say` is told, and a new
    one is made.

    Takes Hugging Face's files with or without the `bert.` or `electra.` prefix, with gamma and beta or weight and bias.
    A tensor that is missing, of another shape, or left over in the encoder raises CheckpointError and is named.
    """
    files = weight_files(Path(folder))
    config = read_config(Path(folder) / "config.json")
    found = read_weights(files, f"{config.model_type}.")
    new = {}  # the parts that get new values: {their prefix in the file: our name}
    if num_outputs is None:
        biases = [name for name in found if name.startswith("heads.") and name.endswith(".bias")]
        num_outputs = {name.removeprefix("heads.").removesuffix(".bias"): len(found[name]) for name in biases}
        if not num_outputs:
            raise CheckpointError(f"{files[0]}: no tensor 'heads.TASK.bias'; expected a model that bam.py has trained")
    else:
        new["heads."] = "head"
        if config.model_type == "bert" and "bert.pooler.dense.weight" not in found:
            new["bert.pooler."] = "pooler"
            say(f"{files[0]}: has no pooler; every model starts with a new one")
    with torch.device("meta"):  # random weights would be drawn for nothing
        model = MultiTaskBert(config, num_outputs)
    model.to_empty(device="cpu")
    fill(model, found, files[0], tuple(new))
    model.initialize(tuple(new.values()))
    return model


def fill(model, found, path, new):
    """Copy what a file holds into the model, but for the parts `new`. Raises CheckpointError unless the file's tensors
    are those that its config.json implies."""
    tensors = {name: tensor for name, tensor in public_tensors(model).items() if not name.startswith(new)}
    for name, tensor in tensors.items():
        if name not in found:
            raise CheckpointError(f"{path}: no tensor {name!r}; expected one of shape {list(tensor.shape)}")
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}; expected {list(tensor.shape)} by config.json"
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shapes}")
        tensor.copy_(found[name])
    left = sorted(name for name in found if name.startswith(f"{model.config.model_type}.") and name not in tensors)
    if left:
        raise CheckpointError(f"{path}: tensor {left[0]!r} (one of {len(left)}) has no place in config.json's encoder")


def weight_files(folder):
    """The file that holds a folder's weights; or their index, and the files that it lists. Raises CheckpointError."""
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        problem = "holds no weights" if folder.is_dir() else "is no folder"
        if any(folder.glob("*.ckpt*")) or (folder / "tf_model.h5").exists():
            problem = "holds TensorFlow's weights alone"
        expected = f"a checkpoint's folder, with {WEIGHTS[0]} or {WEIGHTS[2]}, or a public name, ORG/NAME"
        raise CheckpointError(f"{folder}: {problem}; expected {expected}")
    if path.suffix != ".json":
        return [path]
    try:
        return [path, *(folder / name for name in sorted(set(json.loads(path.read_bytes())["weight_map"].values())))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); expected a weight_map of names to files") from error


def read_weights(files, prefix):
    """{Hugging Face's name with the encoder's prefix: tensor} of what weight_files returns."""
    tensors = {}
    for path in files[1:] or files:
        tensors |= read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    has_prefix = any(name.startswith(prefix) for name in tensors)
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: a constant that old files store
            continue
        in_encoder = name.startswith(("embeddings.", "embeddings_project.", "encoder.", "pooler."))
        found[prefix + name if in_encoder and not has_prefix else name] = tensor
    return found


def read_pickle(path):
    """{name: tensor} of a file that torch.save wrote; it runs no code of the file."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); expected {NO_POINTER}") from error


def save_pretrained(model, folder, tensors=None, **more):
    """Write config.json, with `more` in it, and model.safetensors: the tensors given or, as load_pretrained's inverse,
    all of them under public names, heads included."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"hidden_act": "gelu", **asdict(model.config), **more}
    with whole(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
    write_safetensors(folder / WEIGHTS[0], tensors or public_tensors(model))


# -------------------------------------------------------------------------------------------------------- tensor files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def read_safetensors(path):
    """{name: tensor} of a safetensors file: an 8-byte header length, a JSON header, raw little-endian data. Raises
    CheckpointError where the file cannot be read, or does not have the sha256 that write_safetensors put into it."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.path.getsize(path)
            header = json.loads(file.read(min(length, size)))
            data = np.empty(size - 8 - length, np.uint8)
            file.readinto(data)  # np.fromfile would hide a disk's error
        digest = header.pop("__metadata__", {}).get("content_sha256")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = torch.from_numpy(data[start:end]).view(DTYPES[entry["dtype"]]).view(entry["shape"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: is cut off or not safetensors ({error}); expected {NO_POINTER}") from error
    if digest and digest != sha256(header, [data]):
        raise CheckpointError(f"{path}: is damaged: its content does not have the sha256 that its header states")
    return tensors


def sha256(header, blobs):
    """The digest of a safetensors file's content: names, types, shapes and offsets, then the data."""
    digest = hashlib.sha256(repr(header).encode())
    for blob in blobs:
        digest.update(blob)
    return digest.hexdigest()


@contextlib.contextmanager
def whole(path):
    """A binary file for writing that gets its name once it is complete and on the disk."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_safetensors(path, tensors):
    """Write {name: tensor}: read_safetensors' inverse. The file appears whole or not at all, and states its sha256."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    blobs = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    metadata = {"format": "pt", "content_sha256": sha256(header, blobs)}  # Hugging Face wants the format
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for blob in blobs:
            file.write(blob)
