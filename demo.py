"""A small GLUE of generated English and a tiny BERT, so that everything runs in minutes without a download.

A sentence says a clause, {slot: concept}, in one of several ways. A concept is its synonyms, the second one rare.
All eight tasks are drawn from the same clauses, so that what one teaches (that a cook is a chef) serves the others.
"""

import random

import torch
from tokenizers import pre_tokenizers

from glue_data import EIGHT, ENTAILMENT, TASKS
from model import BertConfig, MultiTaskBert, save_pretrained

# ----------------------------------------------------------------------------------------------------------- sentences

PLACE_STARTS, PLACE_ENDS = ("nor", "wes", "green", "red", "oak"), ("ton", "field", "wood")
WORDS = {
    "person": "cook/chef kid/youngster robber/burglar sailor/mariner author/writer lawyer/attorney",
    "verb": "mend/repair want/demand select/pick lift/hoist film/record inspect/review",
    "taste": "superb/great awful/terrible lovely/charming ugly/hideous",  # neighbours are opposites
    "thing": "car/auto boat/ship couch/sofa bench/seat coat/jacket hat/cap",
    "place": " ".join(start + end for start in PLACE_STARTS for end in PLACE_ENDS),
}
CONCEPTS = {slot: [concept.split("/") for concept in words.split()] for slot, words in WORDS.items()}
KINDS = ("vehicle", "vehicle", "furniture", "furniture", "garment", "garment")  # of the things above, in their order
KNOWN_PLACES, OTHER_PLACES = range(12), range(12, 15)  # the others only occur in the mismatched sets
ASKED = {"who": "person", "what": "thing", "where": "place"}


def random_clause(rng, places, negated=0.0):
    """A random clause: who will do what to which thing, and perhaps where."""
    clause = {slot: rng.randrange(len(concepts)) for slot, concepts in CONCEPTS.items()}
    clause["place"] = rng.choice(places)
    clause |= {slot: None for slot in ("taste", "place") if rng.random() < 0.5}
    return clause | {"not": rng.random() < negated, "vague": False}


def word(clause, rng, slot):
    synonyms = CONCEPTS[slot][clause[slot]]
    return rng.choices(synonyms, (6, 1)[: len(synonyms)])[0]


def say(clause, rng, asked=None):
    """A clause in words, active or passive; or the question for its 'who', 'what' or 'where'."""
    thing = ["the", word(clause, rng, "thing")]
    if clause["vague"]:
        thing[1] = KINDS[clause["thing"]]
    if clause["taste"] is not None:
        thing.insert(1, word(clause, rng, "taste"))
    person = ["the", word(clause, rng, "person")]
    verb = word(clause, rng, "verb")
    will = ["will", "not"] if clause["not"] else ["will"]
    place = [] if clause["place"] is None or asked == "where" else ["in", word(clause, rng, "place")]
    if asked:
        words = [asked, *will, *(person if asked != "who" else []), verb, *(thing if asked != "what" else [])]
    elif rng.random() < 0.2:
        words = [*thing, *will, "be", verb + "ed", "by", *person]
    else:
        words = [*person, *will, verb, *thing]
    return " ".join([*words, *place, "?" if asked else "."])


def change(clause, rng, places, among=tuple(CONCEPTS), count=None):
    """The same clause with other concepts in `count` of its filled slots, by default in one to three."""
    changed = dict(clause)
    filled = [slot for slot in among if clause[slot] is not None]
    for slot in rng.sample(filled, min(rng.randint(1, 3) if count is None else count, len(filled))):
        others = places if slot == "place" else range(len(CONCEPTS[slot]))
        changed[slot] = rng.choice([concept for concept in others if concept != clause[slot]])
    return changed


# ------------------------------------------------------------ tasks: (label, sentence) or (label, sentence, sentence)


def cola(rng, places):
    """A sentence, or one with two neighbouring words exchanged."""
    words = say(random_clause(rng, places), rng).split()
    good = rng.random() < 0.6
    i = rng.randrange(1, len(words) - 2)
    if not good:
        words[i], words[i + 1] = words[i + 1], words[i]
    return str(int(good)), " ".join(words)


def sst2(rng, places):
    """One or two judgements; the last one counts, and 'not' turns it round."""
    clauses = []
    for _ in range(rng.choice((1, 1, 2))):
        clause = random_clause(rng, places, negated=0.3) | {"taste": rng.randrange(4)}
        verb = "is not" if clause["not"] else "is"
        clauses.append(f"the {word(clause, rng, 'thing')} {verb} {word(clause, rng, 'taste')}")
    good = (clause["taste"] % 2 == 0) != clause["not"]
    return str(int(good)), " but ".join(clauses) + " ."


def mrpc(rng, places):
    """The same clause in other words, or one with one to three slots changed."""
    clause = random_clause(rng, places)
    same = rng.random() < 0.6
    other = clause if same else change(clause, rng, places)
    return str(int(same)), say(clause, rng), say(other, rng)


def qqp(rng, places):
    """The same for questions."""
    clause = random_clause(rng, places)
    same = rng.random() < 0.4
    asked = rng.choice(list(ASKED))
    slots = [slot for slot in CONCEPTS if slot != ASKED[asked]]
    other = clause if same else change(clause, rng, places, slots)
    return str(int(same)), say(clause, rng, asked), say(other, rng, asked)


def stsb(rng, places):
    """Five points, less a share for each slot that differs, with the scatter of several people's judgements."""
    clause = random_clause(rng, places)
    changed = rng.randrange(4)
    filled = sum(clause[slot] is not None for slot in CONCEPTS)
    score = 5 * (1 - changed / filled) + rng.gauss(0, 0.3)
    return f"{min(max(score, 0), 5):.3f}", say(clause, rng), say(change(clause, rng, places, count=changed), rng)


def mnli(rng, places):
    """Entailed: something left out or vaguer; contradicted: negated; neutral: something else."""
    clause = random_clause(rng, places, negated=0.1)
    label = rng.choice(TASKS["mnli"].labels)
    other = dict(clause)
    if label == "entailment":
        other |= {slot: None for slot in ("taste", "place") if rng.random() < 0.3}
        other["vague"] = rng.random() < 0.2
    elif label == "contradiction":
        other["not"] = not clause["not"]
    else:
        other = change(clause, rng, places, ("person", "verb", "thing", "place"))
    return label, say(clause, rng), say(other, rng)


def rte(rng, places):
    """MNLI with contradictions and neutral pairs as one class; it has so few examples that MNLI's have to help."""
    label, first, second = mnli(rng, places)
    return ENTAILMENT[label != "entailment"], first, second


def qnli(rng, places):
    """A question, and a sentence that answers it or speaks of something else."""
    clause = random_clause(rng, places)
    good = rng.random() < 0.5
    asked = rng.choice(list(ASKED))
    clause["place"] = rng.choice(places)
    slots = [slot for slot in ("person", "verb", "thing") if slot != ASKED[asked]]
    other = clause if good else change(clause, rng, places, slots)
    return ENTAILMENT[not good], say(clause, rng, asked), say(other, rng)


MAKERS = {maker.__name__: maker for maker in (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte)}
TRAIN = {"cola": 1500, "sst2": 2000, "mrpc": 800, "stsb": 800, "qqp": 4000, "mnli": 5000, "qnli": 3000, "rte": 300}
DEV, TEST = 400, 100  # examples
NOISE = 0.05  # wrong labels, so that nothing scores 100


def file_text(rng, task, split):
    """The text of one file in the official layout, without the columns that nobody reads."""
    test = split in dict(task.test)
    places = OTHER_PLACES if split in ("dev_mismatched", "MNLI-mm") else KNOWN_PLACES
    columns = ("index", *task.text) if test else task.header or ("index", *task.text, task.label)
    lines = [] if task.header and not test else ["\t".join(columns)]
    for index in range(TRAIN[task.name] if split == "train" else TEST if test else DEV):
        label, *sentences = MAKERS[task.name](rng, places)
        if task.labels and rng.random() < NOISE:
            label = rng.choice([other for other in task.labels if other != label])
        fields = {"index": str(index), task.label: label, **dict(zip(task.text, sentences, strict=True))}
        lines.append("\t".join(fields.get(column, "") for column in columns))
    return "\n".join(lines) + "\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def vocabulary(data):
    """The tokens of a WordPiece vocabulary: words, letters, and places in two pieces, so that new ones can be read."""
    text = " ".join(path.read_text("utf-8") for path in sorted(data.glob("*/train.tsv"))).lower()
    words = {piece for piece, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text) if piece.isalpha()}
    words -= set(WORDS["place"].split())
    letters = {letter for letter in text if letter.isalpha()}
    known = {*words, *letters, *PLACE_STARTS, *("##" + piece for piece in (*letters, *PLACE_ENDS)), ".", "?"}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(known)]


def write_demo(data, checkpoint):
    """Write a small GLUE to the folder `data`, and its vocabulary and a tiny BERT of random weights to `checkpoint`."""
    rng = random.Random(0)
    for task in [TASKS[name] for name in EIGHT]:
        for split, file in task.files.items():
            write(data / task.folder / file, file_text(rng, task, split))
    tokens = vocabulary(data)
    write(checkpoint / "vocab.txt", "\n".join(tokens) + "\n")
    torch.manual_seed(0)
    config = BertConfig(len(tokens), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        initializer_range=0.2)  # fmt: skip
    model = MultiTaskBert(config, {"": 1})
    for table in (model.position_embeddings, model.segment_embeddings):
        table.weight.data.mul_(0.2)  # a word looks alike wherever it stands, as pre-training would have taught
    save_pretrained(model, checkpoint)
