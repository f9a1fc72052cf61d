"""The tokenizer of a checkpoint: BERT's WordPiece, with the settings that its files state. Uses `tokenizers`."""

import hashlib
import json
import re
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from glue_data import InputError, brief, parse_tsv, read_file, read_json

SETTINGS = {  # in tokenizer_config.json: in the BertNormalizer of tokenizer.json
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
WORDPIECE_CLASSES = "Bert ConvBert DistilBert Electra MobileBert SqueezeBert PreTrained TokenizersBackend"
CASED_SHARE = 0.15  # of a vocabulary; the reason is in guess_lowercase

# The original lowercases with Python, which knows the Greek final sigma; BertNormalizer does not. By Unicode's rule, a
# letter stands before it and none after it, not counting apostrophes and the like.
LETTER, IGNORED = r"[\p{Cased}&&[^\p{Case_Ignorable}]]", r"\p{Case_Ignorable}*"
FINAL_SIGMA = normalizers.Replace(tokenizers.Regex(rf"{LETTER}{IGNORED}\KΣ(?!{IGNORED}{LETTER})"), "ς")


class Tokenizer:
    """The WordPiece tokenizer of a checkpoint's folder, as the original's FullTokenizer (bam/bert/tokenization.py).

    It is built from the vocabulary and BERT's three settings alone, because a tokenizer.json may bring truncation,
    padding, a lower limit on a word's length, and special tokens that a sentence could spell.
    """

    def __init__(self, folder):
        try:
            vocab = read_vocab(Path(folder))  # {token: id}
            self.settings, source = read_settings(Path(folder), vocab)
            bert = normalizers.BertNormalizer(**self.settings)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: its tokenizer's files are not BERT's ({error!r})") from error
        self.description = f"{'uncased' if self.settings['lowercase'] else 'cased'}, {source}"
        self.size = len(vocab)
        self.cls_id = vocab["[CLS]"]
        self.sep_id = vocab["[SEP]"]
        self.unk_id = vocab["[UNK]"]
        wordpiece = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200)  # the original's limit
        self.backend = tokenizers.Tokenizer(wordpiece)
        self.backend.normalizer = normalizers.Sequence([FINAL_SIGMA, bert]) if self.settings["lowercase"] else bert
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.backend.post_processor = processors.BertProcessing(("[SEP]", self.sep_id), ("[CLS]", self.cls_id))

    def __call__(self, texts):
        """Yield the token ids of each text, a list without special tokens."""
        for start in range(0, len(texts), 8192):  # the library's results for all at once would take gigabytes
            encodings = self.backend.encode_batch_fast(texts[start : start + 8192], add_special_tokens=False)
            yield from (encoding.ids for encoding in encodings)

    def fingerprint(self):
        """A string that changes with the vocabulary, the settings and the library."""
        return hashlib.sha256((tokenizers.__version__ + self.backend.to_str()).encode()).hexdigest()

    def save(self, folder, max_length):
        """Write the files from which this class, and Hugging Face's AutoTokenizer, build this tokenizer again."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = self.backend.get_vocab()
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}  # BertTokenizer would drop FINAL_SIGMA
        config["model_max_length"] = max_length
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        config["split_special_tokens"] = True  # a text that spells [SEP] is text
        config |= {name: self.settings[ours] for name, ours in SETTINGS.items()}
        special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
        config |= {f"{token[1:-1].lower()}_token": token for token in special}
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), "utf-8")


def read_vocab(folder):
    """{token: id} of a folder's vocab.txt, one token a line, or of its tokenizer.json if there is no vocab.txt."""
    path = folder / "vocab.txt"
    vocab = {}
    if not path.exists() and (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        model = read_json(path).get("model") or {}
        vocab = model.get("vocab")
        is_wordpiece = model.get("type", "WordPiece") == "WordPiece" and model.get("continuing_subword_prefix") == "##"
        if not is_wordpiece or not isinstance(vocab, dict) or {*vocab.values()} != {*range(len(vocab))}:
            raise InputError(f"{path}: expected a WordPiece model, its prefix ## and its ids 0, 1, 2, ... each once")
        if re.search(r"[\t\r\n]", "".join(vocab)):  # which vocab.txt could not hold
            raise InputError(f"{path}: a token holds a tab or a line break; expected BERT's vocabulary")
    else:
        data = read_file(path, "a checkpoint's vocabulary, one token a line, or a tokenizer.json")
        for line, (token,) in parse_tsv(data, path, ["token"], ["token"]):
            if token in vocab:
                raise InputError(f"{path}, line {line}: {brief([token])} stands on line {vocab[token] + 1} already")
            vocab[token] = line - 1
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise InputError(f"{path}: no {token} among {len(vocab)} tokens; expected BERT's vocabulary")
    return vocab


def read_settings(folder, vocab):
    """(BertNormalizer's arguments, where `lowercase` comes from). tokenizer_config.json overrides tokenizer.json."""
    settings = {"lowercase": None, "strip_accents": None, "handle_chinese_chars": True}
    source = path = folder / "tokenizer.json"
    normalizer = (read_json(path) if path.exists() else {}).get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "BertNormalizer":
            settings |= {name: step[name] for name in settings if name in step}
        elif step and step.get("content") != "ς":  # FINAL_SIGMA, where `save` has written the file
            raise InputError(f"{path}: normalizer {step.get('type')}; expected BertNormalizer alone")
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    kind = str(config.get("tokenizer_class") or "BertTokenizer")
    if kind.removesuffix("Fast").removesuffix("Tokenizer") not in WORDPIECE_CLASSES.split():
        raise InputError(f"{path}: tokenizer_class {kind}; expected a WordPiece tokenizer such as BertTokenizer")
    for name, ours in SETTINGS.items():
        if config.get(name) not in (None, True, False):
            raise InputError(f"{path}: {name} is {config[name]!r}; expected true or false")
        if config.get(name) is not None:
            settings[ours] = config[name]
            source = path if ours == "lowercase" else source
    if settings["lowercase"] is None:
        return guess_lowercase(settings, vocab)
    return settings, f"from {source.name}"


def guess_lowercase(settings, vocab):
    """(the settings with a guess of `lowercase`, the reason), for where no file says it.

    In an uncased tokenizer no text reaches a token that lowercasing and stripping accents would change. These are 35 %
    of BERT's cased vocabulary, and most of a Korean one, whose syllables would fall apart; but 0.00 % of the uncased
    and 0.01 % of the Chinese one, and 3 % if all of [unused0] ... [unused993] were renamed. Markers like [CLS] and <S>
    do not count.
    """
    uncased = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, lowercase=True)
    words = [token for token in vocab if not re.fullmatch(r"\[.*\]|<.*>", token)]
    share = sum(uncased.normalize_str(word) != word for word in words) / max(1, len(words))
    reason = f"because lowercasing would change {share:.1%} of the vocabulary"
    return settings | {"lowercase": share < CASED_SHARE}, reason
