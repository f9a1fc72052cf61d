"""BAM! Born-Again Multi-Task Networks for Natural Language Understanding (Clark et al., ACL 2019), from GLUE files and
a public BERT checkpoint to the paper's table and a leaderboard submission.

Single-task models teach one multi-task model: it learns from their output distributions instead of the labels alone.
Teacher annealing moves its target, as training goes, from the teachers' outputs to the gold labels, so that the student
starts by imitating its teachers and can end above them:

    target(step) = λ · gold label + (1 − λ) · teacher's output,      λ = step / num_steps

    python bam.py --demo                     # everything below in a minute or two, on generated data
    python bam.py --task all                 # eight teachers, their outputs, one student, the table, a submission
    python bam.py --task rte,mrpc            # the same over two tasks
    python bam.py --task rte                 # plain fine-tuning
    torchrun --nproc_per_node=8 bam.py --task all
"""

import functools
import hashlib
import itertools
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.optim.adamw import adamw

import demo
import figure
import glue_data
import table
from glue_data import InputError, block_diagonal, concatenate, micro_batches, pack, sample_schedule
from inputs import checkpoint_folder, data_folder, identity, load_data, parse_args, recipes
from model import WEIGHTS, load_pretrained, save_pretrained
from ops import backward, upload, vector_norm
from runtime import Progress, Run, command, discard_checkpoints, to_json, within_memory, write_whole
from wordpiece import Tokenizer

# ----------------------------------------------------------------------------------------------------- what we compare


def setting(default, why, low=0.0, high=math.inf):
    """A field with its reason and its range, for the flags and their help."""
    return field(default=default, metadata={"why": why, "low": low, "high": high})


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter, with its reason. The defaults are the original's for one task; MULTI has its defaults for
    several (bam/configure.py)."""

    learning_rate: float = setting(5e-5, "peak rate; higher for the larger batches of several tasks", high=1)
    batch_size: int = setting(32, "examples a step; larger where tasks mix", low=1)
    epochs: float = setting(3.0, "steps = epochs · examples / batch_size, at least 1, whatever the exponent", 1e-3, 1e6)
    warmup: float = setting(0.1, "part of the steps in which the rate rises from 0, as Adam needs here", high=1)
    layer_decay: float = setting(0.9, "α: a layer's rate is α times the one above; low layers are general", high=1)
    weight_decay: float = setting(0.01, "decoupled; not on biases and LayerNorm", high=1)
    clip_norm: float = setting(1.0, "largest norm of a batch's summed gradient; active at nearly every step", low=1e-9)
    exponent: float = setting(0.75, "tasks are sampled with p ∝ size^exponent: 1 by size, 0 all alike", high=10)
    gold_weight: float | None = setting(None, "λ: none is step / num_steps; or a constant, 0 teacher to 1 gold", high=1)
    max_length: int = setting(128, "tokens that an example is cut to; few GLUE examples are longer", low=8)


SINGLE = Recipe()
MULTI = Recipe(learning_rate=1e-4, batch_size=128, epochs=6.0)
# The demo starts from random weights, no layer more general than another, and has few examples: more and bolder steps.
DEMO_SINGLE = replace(SINGLE, learning_rate=1e-3, layer_decay=1.0, epochs=5.0, max_length=64)
DEMO_MULTI = replace(DEMO_SINGLE, batch_size=64)


@dataclass(frozen=True)
class Regime:
    """A row of the paper's table: who is trained, and on whose outputs."""

    multi: bool  # one model for all tasks, or one for each
    teacher: str | None = None  # the regime whose models teach; None: gold labels alone


REGIMES = {
    "single": Regime(multi=False),
    "multi": Regime(multi=True),
    "single-single": Regime(multi=False, teacher="single"),
    "multi-multi": Regime(multi=True, teacher="multi"),
    "single-multi": Regime(multi=True, teacher="single"),  # BAM
    "single-multi-single": Regime(multi=False, teacher="single-multi"),
    "single-multi-single-multi": Regime(multi=True, teacher="single-multi-single"),
}
assert list(REGIMES) == list(figure.REGIMES), "figure.REGIMES must label the same regimes, in this order"


@dataclass(frozen=True)
class Experiment:
    """What is trained on what, in whichever regime. `load_experiment` makes one from files."""

    tasks: list[glue_data.Task]
    data: dict[str, dict[str, glue_data.Dataset]]  # {task: {split: examples}}, tokenized for the checkpoint
    checkpoint: Path  # the pre-trained encoder that every model starts from
    single: Recipe = SINGLE
    multi: Recipe = MULTI
    seed: int = 0
    copies: int = 1  # --teachers: seeds of each teacher; their outputs are averaged
    teacher_experiment: "Experiment | None" = None  # trains the teachers, with --teacher-checkpoint
    suffix: str = ""  # ends the names of its regimes' folders: "-teacher" in a teacher_experiment


# ------------------------------------------------------------------------------------- the idea (the paper, section 3)

# N examples of a dataset, B of a batch or a part of it. K is the number of outputs of a model's tasks together: 2 for
# RTE's teacher, 16 for all eight. Each task owns some of them. A model gives all K for every example. Labels (N, K) are
# one-hot, or the score as a fraction of its range, in the columns that the example's task owns, and 0 in the others;
# teachers' logits (N, K) likewise.


def annealing_weight(step, num_steps, constant=None):
    """λ, the weight of the gold labels: from 0 at the first step to 1 − 1 / num_steps at the last; or a constant."""
    return step / num_steps if constant is None else constant


def distillation_loss(logits, labels, teacher_logits, own, regression, gold_weight):
    """Each example's loss (B,) against λ · gold + (1 − λ) · teacher: cross-entropy, with the softmax of the
    teacher's logits (temperature 1), or squared error, with the teacher's score (the original's bam/task_specific).

    logits, labels, teacher_logits: (B, K). own: (B, K), which outputs belong to the example's own task. regression:
    (B,), whether that task is a score. gold_weight: λ, 0-dimensional.

    Cross-entropy and squared error are both computed for every example, and its task selects one, so that a batch can
    mix tasks.
    """
    others = ~own  # (B, K)
    probabilities = teacher_logits.masked_fill(others, -torch.inf).softmax(-1)  # (B, K)
    teacher = torch.where(regression[:, None], teacher_logits, probabilities)  # (B, K)
    target = gold_weight * labels + (1 - gold_weight) * teacher  # (B, K)
    log_probabilities = logits.masked_fill(others, -torch.inf).log_softmax(-1)  # (B, K)
    log_probabilities = log_probabilities.masked_fill(others, 0)  # since 0 · −∞ is NaN
    cross_entropy = -(target * log_probabilities).sum(-1)  # (B,)
    squared_error = (target - logits).masked_fill(others, 0).square().sum(-1)  # (B,)
    return torch.where(regression, squared_error, cross_entropy)  # (B,)


# -------------------------------------------------------------------------------------------------------- optimization


def learning_rate(step, num_steps, recipe, distance_to_head=0):
    """Linear warm-up from 0, then linear decay to 0, times α for each layer between a parameter and the head (distance
    0). The decay counts from step 0, so after a warm-up of 0.1 the rate jumps down to 0.9 of the peak
    (bam/bert/optimization.py)."""
    warmup_steps = int(recipe.warmup * num_steps)
    factor = step / warmup_steps if step < warmup_steps else max(0.0, 1 - step / num_steps)
    return recipe.learning_rate * factor * recipe.layer_decay**distance_to_head


class Adam:
    """BERT's Adam: gradient clipped by its global norm, no bias correction, decoupled weight decay, a learning rate for
    each depth. The parameters become views of one flat vector, so that clipping, saving and summing over processes
    are one operation each.
    """

    def __init__(self, model, recipe):
        def group_of(named):
            name, parameter = named
            is_exempt = name.endswith("bias") or "norm" in name or not parameter.requires_grad  # from weight decay
            return model.depth(name), is_exempt

        parameters = sorted(model.named_parameters(), key=group_of)
        self.recipe = recipe
        self.values = torch.cat([parameter.detach().flatten() for _, parameter in parameters])
        self.gradients = torch.zeros_like(self.values)
        self.mean = torch.zeros_like(self.values)
        self.square = torch.zeros_like(self.values)
        self.state = {"values": self.values, "mean": self.mean, "square": self.square}  # what a checkpoint holds of it
        # AdamW divides its moments by 1 − β^count, a bias correction that BERT's Adam lacks; with this count it is 1.
        self.count = torch.tensor(1e6, device=self.values.device)
        self.groups = []  # of parameters that share a rate and a decay: (their parts of the vectors, decay, distance)
        end = 0
        for (depth, is_exempt), members in itertools.groupby(parameters, group_of):
            start = end
            for _, parameter in members:
                part = slice(end, end + parameter.numel())
                end = part.stop
                parameter.data = self.values[part].view_as(parameter)
                parameter.grad = self.gradients[part].view_as(parameter)
            # adamw takes lists of tensors: here one of each, this group's part of a vector.
            parts = [[vector[start:end]] for vector in (self.values, self.gradients, self.mean, self.square)]
            decay = 0.0 if is_exempt else recipe.weight_decay
            self.groups.append((parts, decay, model.depth("head") - depth))

    def step(self, step, num_steps):
        """Update the parameters, zero the gradients, and return their norm before clipping (a tensor)."""
        norm = vector_norm(self.gradients)
        self.gradients.mul_((self.recipe.clip_norm / norm).clamp(max=1))
        for parts, decay, distance_to_head in self.groups:
            rate = learning_rate(step, num_steps, self.recipe, distance_to_head)
            adamw(
                *parts, [], [self.count], lr=rate, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=decay,
                amsgrad=False, maximize=False, fused=True,
            )  # fmt: skip
        self.gradients.zero_()
        return norm


# -------------------------------------------------------------------------- training: one loop for teacher and student

# `run` (runtime.Run) is the device, the run directory and the processes that share them: run.rank of run.world, and
# run.all_reduce(x) sums x over them; run.on_rank_0(f, ...) calls f in process 0 while the others wait; run.exists(path)
# gives process 0's answer in all of them; a micro-batch, the part of a batch that is run at once, has about
# run.tokens_at_once tokens, in predict() twice as many. A dataset's example i is input_ids[offsets[i] : offsets[i+1]].


def targets_of(dataset, teacher_logits, device):
    """What distillation_loss takes besides logits and λ, for all examples, on the device: labels, teachers' logits and
    own (N, K), regression (N,). Without teachers λ is 1, and the labels stand in for their logits."""
    counts = [task.num_outputs for task in dataset.tasks]
    owner = np.repeat(np.arange(len(counts)), counts)  # (K,)
    own = owner == dataset.task_ids[:, None]  # (N, K)
    regression = np.array([task.is_regression for task in dataset.tasks])[dataset.task_ids]  # (N,)
    teacher_logits = dataset.labels if teacher_logits is None else teacher_logits  # (N, K)
    return [torch.from_numpy(array).to(device) for array in (dataset.labels, teacher_logits, own, regression)]


@within_memory  # if the device runs out of memory: halve run.tokens_at_once, zero the gradients, call again
def add_gradients(model, dataset, targets, examples, gold_weight, seed, run):
    """Add the gradient of the loss, summed over these examples, to the parameters' gradients, and return the loss.

    The gradient of a sum is the sum of gradients, so it is computed a micro-batch at a time. The original sums too;
    with the same clip, a mean would be another algorithm.
    """
    seed_device = torch.cuda.manual_seed_all if run.device.type == "cuda" else torch.manual_seed
    seed_device(seed)  # torch.manual_seed seeds CUDA too, but is slower: it asks for other devices
    weight = torch.full((), gold_weight, device=run.device)
    total = torch.zeros((), device=run.device)
    for part in micro_batches(dataset, examples, run.tokens_at_once):
        batch = upload(pack(dataset, part), run.device)
        logits = model(batch, run.bfloat16)  # (B, K)
        labels, teacher_logits, own, regression = (target.index_select(0, batch.examples) for target in targets)
        loss = distillation_loss(logits, labels, teacher_logits, own, regression, weight).sum()
        backward(loss, model.parameters(), run.device)  # loss.backward(), on CUDA in fewer kernels
        total += loss.detach()
    return total


def rehearse(model, dataset, targets, run):
    """On CUDA, compile the encoder by a pass over a full micro-batch of the longest examples."""
    lengths = np.diff(dataset.offsets)  # (N,)
    longest = np.argsort(-lengths)[: max(1, run.tokens_at_once // lengths.max())]
    run.compile_encoder(model, lambda: add_gradients(model, dataset, targets, longest, 1.0, seed=0, run=run))


def check_outputs(model, dataset, teacher_logits):
    """Raise InputError for heads or teachers' logits that do not fit the dataset's columns (N, K)."""
    heads = {task.name: task.num_outputs for task in dataset.tasks}
    if list(model.num_outputs.items()) != list(heads.items()):
        raise InputError(f"the model has the heads {model.num_outputs}; expected {heads}, in this order")
    if teacher_logits is not None and teacher_logits.shape != dataset.labels.shape:
        raise InputError(f"teacher_logits have shape {teacher_logits.shape}; expected {dataset.labels.shape}")


def training_identity(model, recipe, dataset, teacher_logits, seed):
    """A number that tells trainings apart, so that none resumes another's checkpoint."""
    initial = [model.word_embeddings.weight[::100], model.head.weight]  # tell checkpoints and draws of heads apart
    weights = [tensor.detach().cpu().numpy() for tensor in initial]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    digest = hashlib.sha256(repr((model.config, trained, recipe, seed)).encode())
    for array in (dataset.input_ids, dataset.labels, teacher_logits, *weights):
        if array is not None:
            digest.update(np.ascontiguousarray(array))
    return int.from_bytes(digest.digest()[:8], "little") >> 1  # 63 bits


def train(model, dataset, teacher_logits, recipe, seed, run, folder=None, evaluate_now=None):
    """Train on a dataset of one or several tasks; teacher_logits (N, K), or None to learn from the labels alone.

    It writes metrics.jsonl in the folder (by default the run's own) and, every few minutes, training.safetensors, from
    which a repeated command resumes. evaluate_now() gives dev scores, {task: percent}, to log every run.evaluate_every
    steps.
    """
    check_outputs(model, dataset, teacher_logits)
    folder = Path(folder or run.folder)
    run.on_rank_0(folder.mkdir, parents=True, exist_ok=True)
    num_steps = max(1, int(recipe.epochs * len(dataset) / recipe.batch_size))
    sizes = np.bincount(dataset.task_ids)  # examples of each task
    schedule = sample_schedule(sizes, num_steps, recipe.batch_size, recipe.exponent, seed)  # (num_steps, batch_size)
    targets = targets_of(dataset, teacher_logits, run.device)
    constant = 1.0 if teacher_logits is None else recipe.gold_weight  # without a teacher the gold labels count alone
    training_id = training_identity(model, recipe, dataset, teacher_logits, seed)
    optimizer = Adam(model, recipe)
    model.train()
    rehearse(model, dataset, targets, run)
    progress = Progress(run, folder, dataset, schedule, optimizer.state, training_id)
    start = progress.resume()  # fills optimizer.state, whose views are the parameters; 0 without a checkpoint
    for step in range(start, num_steps):
        gold_weight = annealing_weight(step, num_steps, constant)
        examples = schedule[step, run.rank :: run.world]  # this process's share of the batch
        dropout_seed = seed + step + run.rank * 1_000_003  # so that resuming needs no generator's state
        loss = add_gradients(model, dataset, targets, examples, gold_weight, dropout_seed, run=run)
        run.all_reduce(optimizer.gradients)
        norm = optimizer.step(step, num_steps)
        progress.after(step, loss, norm, learning_rate(step, num_steps, recipe), gold_weight)  # logs; raises for NaN
        if run.evaluate_every and (step + 1) % run.evaluate_every == 0 and evaluate_now:
            progress.write({"step": step + 1, "dev": evaluate_now()})
            model.train()
        if run.time_to_save(step):  # or a signal has asked to stop
            progress.save(step + 1)  # raises for NaN, which must not be saved
            run.stop_if_asked()


# ------------------------------------------------------------------------------------------- predicting and evaluating


@torch.no_grad()
def predict(model, dataset, run, may_stop=True):
    """The logits (N, outputs) of a dataset of one task, in its order, without dropout. may_stop: whether a signal may
    end it."""
    model.eval()
    (task,) = dataset.tasks
    columns = model.columns[task.name]
    outputs = torch.zeros(dataset.labels.shape, device=run.device)  # (N, outputs)
    share = np.arange(run.rank, len(dataset), run.world)  # this process's examples
    for examples in micro_batches(dataset, share, 2 * run.tokens_at_once):  # without gradients more fit
        if may_stop and run.world == 1:  # stopping one process here would hang the all_reduce below
            run.stop_if_asked()
        batch = upload(pack(dataset, examples), run.device)
        logits = model(batch, run.bfloat16)  # (B, K)
        outputs[batch.examples.long()] = logits[:, columns]
    run.all_reduce(outputs)
    return outputs.cpu().numpy()


def evaluate(model, tasks, data, run, folder):
    """Predict every dev split, write the predictions, and return {task: {split: {metric: percent}}}."""
    scores = {}
    for task in tasks:
        scores[task.name] = {}
        for split, _ in task.dev:
            dataset = data[task.name][split]
            logits = predict(model, dataset, run)
            scores[task.name][split] = score = glue_data.score(task, logits, dataset.labels)
            words = glue_data.answers(task, logits)
            predictions = glue_data.predictions_tsv(words, dataset.index)
            run.on_rank_0(write_whole, folder / f"{task.name}.{split}.tsv", predictions)
            shown = f"{task.metrics[0]} {score[task.metrics[0]]:.1f}"
            if len(set(words)) == 1 < len(words):
                shown += f", a collapsed run: every answer is {words[0]}"
            run.say(f"{folder.relative_to(run.folder)}  {task.folder} {split} {shown}")
    return scores


def dev_scores(model, tasks, data, run):
    """{task: the paper's metric on its first dev split, percent}."""
    scores = {}
    for task in tasks:
        dataset = data[task.name][task.dev[0][0]]
        logits = predict(model, dataset, run, may_stop=False)  # on a signal train() saves first
        scores[task.name] = glue_data.score(task, logits, dataset.labels)[task.metrics[0]]
    return scores


# ---------------------------------------------------------------------------------------------------------- born again
# A student starts from a public checkpoint, not from its teacher's weights. In the paper both start from the same one:
# the student is its teacher born again. What passes from one to the other is an array of logits (N, K).


def run_regime(experiment, run, name, trial, copy=1):
    """Train a row of the table and return {task: folder of the model that has its head}.

    Its teachers come first, by recursion: experiment.copies of each, in folders NAME, NAME-2, NAME-3, ..., with seeds
    of their own (model_seed). Copies share their own teachers.
    """
    regime = REGIMES[name]
    teachers = []  # {task: folder} of each copy
    if regime.teacher:
        source = experiment.teacher_experiment or experiment
        teachers = [run_regime(source, run, regime.teacher, trial, 1 + i) for i in range(source.copies)]
    top = run.folder / f"trial-{trial}" / (name + experiment.suffix + (f"-{copy}" if copy > 1 else ""))
    models = {top: experiment.tasks} if regime.multi else {top / task.name: [task] for task in experiment.tasks}
    for folder, tasks in models.items():
        if not run.exists(folder / "scores.json"):  # which train_model writes last
            train_model(experiment, run, regime, tasks, teachers, folder)
    return {task.name: folder for folder, tasks in models.items() for task in tasks}


def train_model(experiment, run, regime, tasks, teachers, folder):
    """Train one model and leave its folder: weights, tokenizer, metrics, dev predictions, and, last, scores.json."""
    seed = model_seed(experiment.seed, folder.relative_to(run.folder))
    if run.exists(folder / WEIGHTS[0]):  # model.safetensors: trained, but not evaluated to the end
        model = load_pretrained(folder).to(run.device)
    else:
        dataset = concatenate([experiment.data[task.name]["train"] for task in tasks])
        teacher_logits = None
        if teachers:
            source = experiment.teacher_experiment or experiment
            outputs = [average_teacher(source.data, run, task, teachers) for task in tasks]
            teacher_logits = block_diagonal(outputs)  # (N, K), examples in the dataset's order
        torch.manual_seed(seed)
        model = load_pretrained(experiment.checkpoint, {task.name: task.num_outputs for task in tasks}).to(run.device)
        recipe = experiment.multi if regime.multi else experiment.single
        train(
            model, dataset, teacher_logits, recipe, seed, run, folder,
            evaluate_now=lambda: dev_scores(model, tasks, experiment.data, run),
        )  # fmt: skip
        tokenizer = Tokenizer(experiment.checkpoint)
        run.on_rank_0(tokenizer.save, folder, recipe.max_length)
        run.on_rank_0(save_pretrained, model, folder)
    scores = evaluate(model, tasks, experiment.data, run, folder)
    run.on_rank_0(discard_checkpoints, folder)  # since the weights have been written
    run.on_rank_0(write_whole, folder / "scores.json", to_json(scores))


def teacher_outputs(data, run, task, folder):
    """A teacher's logits (N, outputs) on the task's training set, in its order, symmetric tasks' swapped pairs too."""
    path = folder / f"{task.name}.train-logits.npy"
    if not run.exists(path):
        logits = predict(load_pretrained(folder).to(run.device), data[task.name]["train"], run)
        run.on_rank_0(write_whole, path, logits)
    shape = data[task.name]["train"].labels.shape
    try:
        logits = np.load(path)
        if logits.shape != shape:
            raise ValueError(f"shape {logits.shape}; expected {shape}")
        return logits
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it, and it is made again") from error


def average_teacher(data, run, task, teachers):
    """Logits (N, outputs) whose softmax is the mean of the teachers' distributions; or the mean of their scores."""
    logits = torch.tensor(np.stack([teacher_outputs(data, run, task, folders[task.name]) for folders in teachers]))
    if task.is_regression or len(teachers) == 1:
        return logits.mean(0).numpy()
    return (logits.log_softmax(-1).logsumexp(0) - np.log(len(teachers))).numpy()


def model_seed(seed, path):
    """A seed for every model of every trial; else a student would share its teacher's batches and dropout."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path.as_posix()}".encode()).digest()[:4], "little") >> 1


# ------------------------------------------------------------------------------------------------------ the submission


def submit(experiment, run, folders, path):
    """Predict every test split that is there and write the leaderboard's zip; say which files it lacks."""
    if run.exists(path):
        return run.say(f"{path}: kept; delete it to have it written again")
    load = functools.lru_cache(maxsize=1)(load_pretrained)  # a model of several tasks is loaded once
    predictions = {}
    for task in experiment.tasks:
        for name, _ in task.test:
            if name in experiment.data[task.name]:
                dataset = experiment.data[task.name][name]
                logits = predict(load(folders[task.name]).to(run.device), dataset, run)
                key = f"{task.name}-{name}" if name in predictions else name  # added tasks can share a name
                predictions[key] = (glue_data.answers(task, logits), dataset.index)
    if not predictions:
        return run.say(f"{path}: not written, since the data has no test files")
    if "wnli" not in folders:  # its 146 examples get their majority class, as in the paper
        predictions["WNLI"] = (["0"] * 146, range(146))
    run.on_rank_0(write_whole, path, glue_data.submission_zip(predictions))
    names = [name for task in (*glue_data.EIGHT, "wnli") for name, _ in glue_data.TASKS[task].test]
    missing = [name for name in names if name not in predictions]
    absent = f"; the leaderboard would refuse it without {', '.join(missing)}" if missing else ""
    run.say(f"{path}: {len(predictions)} files{absent}")


# --------------------------------------------------------------------------------------------------------- the command


def load_experiment(args, run):
    """The Experiment that the flags describe, read and tokenized, so that bad input is found before any work."""
    tasks = glue_data.resolve(args.task)
    single, multi = recipes(args, (DEMO_SINGLE, DEMO_MULTI) if args.demo else (SINGLE, MULTI))
    if args.demo:
        folder = run.folder / "demo" / "glue"
        checkpoint = run.folder / "demo" / "checkpoint"
        if not run.exists(checkpoint / WEIGHTS[0]):
            run.on_rank_0(demo.write_demo, folder, checkpoint)
    else:
        folder = data_folder(args, run)
        checkpoint = checkpoint_folder(args.checkpoint, run)

    reading = (run, tasks, folder, single.max_length, args.limit)  # recipes() sees to one max_length
    data = load_data(checkpoint, *reading)
    experiment = Experiment(tasks, data, checkpoint, single, multi, args.seed, args.teachers)
    if args.teacher_checkpoint:
        checkpoint = checkpoint_folder(args.teacher_checkpoint, run)
        data = load_data(checkpoint, *reading)
        of_teachers = replace(experiment, data=data, checkpoint=checkpoint, suffix="-teacher")
        experiment = replace(experiment, teacher_experiment=of_teachers)
    run.claim(identity(experiment, run, folder, args.limit))
    return experiment


def main(argv=None):
    """Train every regime in every trial, then report."""
    args = parse_args(argv, __doc__, (SINGLE, MULTI), REGIMES)
    if args.table:
        return table.compare(args.table)
    with Run(
        args.out, args.device, args.precision, save_minutes=args.save_minutes, save_steps=args.save_steps,
        compile=args.compile, wait_minutes=args.wait_minutes, evaluate_every=args.evaluate_every,
    ) as run:  # fmt: skip
        run.catch_signals()
        run.say(f"computing on {run.device} in {'bfloat16' if run.bfloat16 else 'float32'}")
        experiment = load_experiment(args, run)
        for trial in range(1, args.trials + 1):
            for name in args.regime:  # by default single-multi, whose teachers are trained by recursion
                folders = run_regime(experiment, run, name, trial)
                submit(experiment, run, folders, run.folder / f"trial-{trial}" / name / "submission.zip")
        run.on_rank_0(table.report, run, experiment.tasks)


if __name__ == "__main__":
    sys.exit(command("bam.py", main))
