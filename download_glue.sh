#!/usr/bin/env bash
# All the network code of this project. Every file is checked before it gets its name.
#
#   bash download_glue.sh glue FOLDER                  GLUE in its official layout: FOLDER/CoLA/train.tsv and so on
#   bash download_glue.sh checkpoint ORG/NAME FOLDER   a BERT or ELECTRA of huggingface.co, its configuration, vocabulary
#                                                      and weights; for example google-bert/bert-base-uncased
#
# The same command resumes an interrupted one, and does nothing once all is there.
# Needs bash, curl and python3 with its standard library. The environment may set
#   PYTHON       the interpreter, python3 if unset
#   BAM_MIRROR   where to fetch instead: https://HOST/PATH becomes $BAM_MIRROR/HOST/PATH, with the same checksums
#   BAM_TABLE    a file to use in place of the table below: for tests, and for mirrors of other versions

set -euo pipefail

# file: what it is for, bytes, sha256, address (MRPC's three in the order that build_mrpc takes them).
# rows: a folder of GLUE, its splits and how many rows each has.
table() {
  cat "${BAM_TABLE:--}" <<'EOF'
file CoLA          376971 f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff dl.fbaipublicfiles.com/glue/data/CoLA.zip
file SST-2        7439277 d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa dl.fbaipublicfiles.com/glue/data/SST-2.zip
file MRPC         1047044 60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89 dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt
file MRPC          441275 a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784 dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_test.txt
file MRPC            6222 971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7 dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv
file STS-B         802872 e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85 dl.fbaipublicfiles.com/glue/data/STS-B.zip
file QQP         41696084 40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0 dl.fbaipublicfiles.com/glue/data/QQP-clean.zip
file MNLI       312783507 e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633 dl.fbaipublicfiles.com/glue/data/MNLI.zip
file QNLI        10627589 e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5 dl.fbaipublicfiles.com/glue/data/QNLIv2.zip
file RTE           697150 6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee dl.fbaipublicfiles.com/glue/data/RTE.zip
file WNLI           28999 ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46 dl.fbaipublicfiles.com/glue/data/WNLI.zip
file diagnostic    222257 0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd dl.fbaipublicfiles.com/glue/data/AX.tsv
file bert-base  440449768 68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3 huggingface.co/google-bert/bert-base-uncased/resolve/main/model.safetensors
file bert-base     231508 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt
rows CoLA        train 8551    dev 1043   test 1063
rows SST-2       train 67349   dev 872    test 1821
rows MRPC        train 3668    dev 408    test 1725
rows STS-B       train 5749    dev 1500   test 1379
rows QQP         train 363846  dev 40430  test 390965
rows MNLI        train 392702  dev_matched 9815  dev_mismatched 9832  test_matched 9796  test_mismatched 9847
rows QNLI        train 104743  dev 5463   test 5463
rows RTE         train 2490    dev 277    test 3000
rows WNLI        train 635     dev 71     test 146
rows diagnostic  diagnostic 1104
EOF
}

die() { echo "download_glue.sh: $1" >&2; exit 1; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# request FILE URL: append to FILE what the server has beyond it, or return 1 if the server has no such file.
request() {
  local file=$1 url=$2 screen=/dev/null pause error
  [ ! -t 2 ] || screen=/dev/stderr     # the progress bar is for a terminal; curl's error, in the same stream, for us
  for pause in 0 0 2 4; do             # a broken connection is resumed; curl's own --retry would start over
    sleep "$pause"
    error=$(curl --fail --location --progress-bar --connect-timeout 5 --speed-limit 1 --speed-time 10 \
      --dump-header "$work/headers" --continue-at - --output "$file" "$url" 2>&1 | tee "$screen") && return
    error=${error##*curl: } error=${error%%$'\n'*}
    case $error in
      *"error: 416"*) return ;;                 # the server has nothing beyond it
      *"error: 404"*) return 1 ;;
      *"error: 40"[13]* | "(23)"*) break ;;     # forbidden, or a full disk
      "(33)"*) rm -f "$file" ;;                 # this server cannot continue a file
    esac
  done
  die "cannot fetch $url (curl: $error). Fetch the files elsewhere and put them under $dir, set BAM_MIRROR, or try the program without them: python bam.py --demo"
}

# fetch_if_there FILE ADDRESS: FILE, which gets its name once it is verified, or 1 if the server has no such file.
fetch_if_there() {
  local file=$1 name=${1##*/} part=$work/${2//\//_}.part bytes sha256 said
  if [ -e "$file" ]; then echo "$name: already there"; return; fi
  read -r bytes sha256 < <(table | awk -v address="$2" '$5 == address { print $3, $4 } END { print "- -" }')
  printf '%-26s %10s bytes\n' "$name" "${bytes/#-/?}"
  request "$part" "$mirror/$2" || { echo "  the server has no such file"; return 1; }
  said=$(helper verify "$part" "$name" "$sha256" "$work/headers") || { rm "$part"; die "$said"; }
  [ -z "$said" ] || echo "  $said"
  mv "$part" "$file" || die "cannot write $file"
}
fetch() { fetch_if_there "$@" || die "cannot fetch $mirror/$2 (error 404)"; }

glue() {
  local folder splits address sources problem
  while read -r _ folder splits; do
    if [ -e "$dir/$folder" ]; then     # perhaps brought here by hand
      problem=$(helper count "$dir/$folder" "$splits") || die "$problem. Move $dir/$folder away to have it fetched"
      echo "$folder: already there"
      continue
    fi
    sources=()
    for address in $(table | awk -v folder="$folder" '$1 == "file" && $2 == folder { print $5 }'); do
      fetch "$work/${address##*/}" "$address"
      sources+=("$work/${address##*/}")
    done
    problem=$(helper build "$dir/$folder" "$splits" "$work/$folder" "${sources[@]}") || die "$problem"
    rm "${sources[@]}"
  done < <(table | grep '^rows ')
}

checkpoint() {
  local name=$1 hub=huggingface.co/$1/resolve/main file kind shards shard
  # Two checkpoints in one folder would be a mixture of both, so the folder says whose it is.
  [ -e "$dir/config.json" ] || echo "$name" >"$dir/source.txt"
  if [ -e "$dir/source.txt" ] && [ "$(cat "$dir/source.txt")" != "$name" ]; then
    die "$dir holds $(cat "$dir/source.txt"): give $name a folder of its own"
  fi
  # The weights come last: where they are, all is.
  for file in "$dir"/{model.safetensors,pytorch_model.bin}{,.index.json}; do [ ! -e "$file" ] || return 0; done
  fetch "$dir/config.json" "$hub/config.json"
  kind=$(helper model_type "$dir/config.json") || die "$kind"
  [[ $kind =~ ^(bert|electra)$ ]] || die "$name is of the model type $kind; expected bert or electra"
  for file in vocab.txt tokenizer.json tokenizer_config.json; do fetch_if_there "$dir/$file" "$hub/$file" || true; done
  [ -e "$dir/vocab.txt" ] || [ -e "$dir/tokenizer.json" ] || die "$name has neither vocab.txt nor tokenizer.json"
  for file in model.safetensors pytorch_model.bin; do
    if fetch_if_there "$dir/$file" "$hub/$file"; then return; fi
    if fetch_if_there "$work/$file.index.json" "$hub/$file.index.json"; then
      shards=$(grep -oE '"[[:alnum:]._-]+\.(safetensors|bin)"' "$work/$file.index.json" | tr -d '"' | sort -u) ||
        die "$file.index.json of $name names no files of weights"
      for shard in $shards; do fetch "$dir/$shard" "$hub/$shard"; done
      mv "$work/$file.index.json" "$dir"
      return
    fi
  done
  die "$name has no weights of PyTorch: neither model.safetensors nor pytorch_model.bin, in one file or in shards"
}

# helper FUNCTION ARGUMENT...: calls one of the functions below, which prints its result or what is wrong.
helper() {
  "${PYTHON:-python3}" -I - "$@" 2>&1 <<'EOF'
import hashlib, json, os, re, shutil, sys, zipfile

def verify(path, name, sha256, headers):
    """Hold a file against the sha256 of the table or, where the table has none, the one that the hub's answer states."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
            if block.startswith(b"version https://git-lfs"):
                sys.exit(f"{name} is a Git LFS pointer in place of the file: the server lacks its large files")
    if sha256 == "-":
        with open(headers, encoding="latin-1") as file:    # of redirects too; small files have a git hash here
            stated = re.search(r'^x-linked-etag: *"?([0-9a-f]{64})"?\s*$', file.read().lower(), re.M)
        sha256 = stated[1] if stated else "-"
    if sha256 == "-":
        print(f"no sha256 is known for {name}: only its length is checked, by curl")
    elif sha256 != digest.hexdigest():
        sys.exit(f"{name} is not the file it should be: expected sha256 {sha256}, got {digest.hexdigest()}")

def model_type(path):
    """Print what a checkpoint's configuration says; BERT's first ones say nothing."""
    print(json.load(open(path, "rb")).get("model_type", "bert"))

def count(folder, splits):
    """Compare each split's number of rows: lines with all fields. Only a line feed ends a line."""
    name, splits = os.path.basename(folder), splits.split()
    for split, expected in zip(splits[::2], map(int, splits[1::2])):
        with open(f"{folder}/{split}.tsv", "rb") as file:
            tabs = file.readline().count(b"\t")
            rows = sum(line.count(b"\t") >= tabs for line in file)
        rows += name == "CoLA" and split != "test"    # these have no header
        if rows != expected:
            sys.exit(f"{name}/{split}.tsv has {rows} rows instead of {expected}")

def build(folder, splits, new, *sources):
    """Make a folder of GLUE as NEW, and give it its name once every row is counted."""
    name = os.path.basename(folder)
    shutil.rmtree(new, ignore_errors=True)
    os.mkdir(new)
    if name == "MRPC":
        build_mrpc(new, *sources)
    elif sources[0].endswith(".zip"):
        with zipfile.ZipFile(sources[0]) as archive:
            for split in splits.split()[::2]:    # nothing else is unpacked, so nothing lands elsewhere
                archive.extract(f"{name}/{split}.tsv", os.path.dirname(new))
    else:
        shutil.copy(sources[0], f"{new}/{name}.tsv")
    count(new, splits)
    os.rename(new, folder)

def build_mrpc(new, train, test, dev_ids):
    """GLUE may not distribute MRPC: dev is those pairs of its training file whose two ids are listed."""
    def read(path):    # some copies start with a byte-order mark, some end their lines in CR LF
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [line.split("\t") for line in file.read().replace("\r\n", "\n").split("\n") if line]
    def write(split, rows):
        with open(f"{new}/{split}.tsv", "w", encoding="utf-8", newline="") as out:
            out.writelines("\t".join(row) + "\n" for row in rows)
    dev = {tuple(row) for row in read(dev_ids)}
    header, *pairs = read(train)
    write("train", [header] + [pair for pair in pairs if tuple(pair[1:3]) not in dev])
    write("dev", [header] + [pair for pair in pairs if tuple(pair[1:3]) in dev])
    header, *pairs = read(test)    # the row's index replaces its label
    write("test", [["index"] + header[1:]] + [[str(index)] + pair[1:] for index, pair in enumerate(pairs)])

try:
    globals()[sys.argv[1]](*sys.argv[2:])
except Exception as error:    # a damaged archive raises whatever it stumbles over
    sys.exit(f"cannot {sys.argv[1]} {sys.argv[2]}: {error}")
EOF
}

# --------------------------------------------------------------------------------------------------------------- main

case "${1:-} $#" in
  "-h 1" | "--help 1") usage; exit ;;
  "glue 2" | "checkpoint 3") dir=${!#} ;;
  *) usage >&2; exit 2 ;;
esac
if [ "$1" = checkpoint ] && ! [[ $2 =~ ^[[:alnum:]][[:alnum:]._-]*/[[:alnum:]][[:alnum:]._-]*$ ]]; then
  die "no checkpoint is called '$2'; expected ORG/NAME as on huggingface.co, for example google-bert/bert-base-uncased"
fi
table >/dev/null        # a BAM_TABLE that cannot be read ends the script here
mirror=${BAM_MIRROR:-https://} mirror=${mirror%/}
work=$dir/.download     # unfinished downloads and folders; gone once all is there
mkdir -p "$work"
# A folder with nothing fetched into it is not begun: it may be filled by hand.
trap 'rm -f "$work/headers"; [ "$(ls -A "$dir")" != .download ] || rmdir "$work" "$dir" 2>/dev/null || true' EXIT
"$@"                    # glue or checkpoint
rm -rf "$work"
echo "$dir is complete"
