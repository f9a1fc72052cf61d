#!/usr/bin/env bash
# All that this project takes from the network, and nothing of it unchecked.
#
#   bash download_glue.sh glue DIR               GLUE, in the official layout: DIR/CoLA/train.tsv and so on
#   bash download_glue.sh checkpoint NAME DIR    a BERT: DIR/config.json, DIR/vocab.txt and its weights, where NAME is
#       google-bert/bert-{base,large}-{uncased,cased}                                     (model.safetensors), or
#       google/bert_uncased_L-{2,4,6,8,10,12}_H-{128,256,512,768}_A-{2,4,8,12}, A = H/64  (pytorch_model.bin)
#
# The same command again goes on where the last one broke off, and does nothing once all is there.
# Needs bash, curl and python3 with its standard library. The environment may set
#   PYTHON       the interpreter, python3 if unset
#   BAM_MIRROR   where to fetch instead: https://HOST/PATH becomes $BAM_MIRROR/HOST/PATH, held to the same checksums
#   BAM_TABLE    a file to use in place of the table below: for tests, and for mirrors of other versions

set -euo pipefail

# file: what it is for, bytes, sha256, address (MRPC's three in the order that build_mrpc takes them).
# rows: a folder of GLUE, its splits and how many rows each has.
table() {
  if [ -n "${BAM_TABLE:-}" ]; then cat "$BAM_TABLE"; return; fi
  cat <<'EOF'
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
size() { if [ -e "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# ---------------------------------------------------------------------------------------------------------- one file

# request FILE ADDRESS: append to FILE what the server has beyond it. A connection that breaks off is taken up again;
# three failures in a row that bring nothing are the end. (curl's own --retry would throw away what had arrived.)
request() {
  local file=$1 url=${BAM_MIRROR:-https://} screen=/dev/null failures=0 before error
  url=${url%/}/$2
  [ ! -t 2 ] || screen=/dev/stderr     # the progress bar is for a terminal; curl's error, in the same stream, for us
  while [ "$failures" -lt 3 ]; do
    sleep "$failures"
    before=$(size "$file")
    error=$(curl --fail --location --progress-bar --connect-timeout 5 --speed-limit 1 --speed-time 10 \
      --dump-header "$work/headers" --continue-at - --output "$file" "$url" 2>&1 | tee "$screen") && return
    error=${error##*curl: } error=${error%%$'\n'*}
    case $error in
      "(33)"* | *"error: 416"*) rm -f "$file" ;;     # nothing to append to this: from the beginning
      *"error: 40"[134]) break ;;                    # asking again would not help
    esac
    if [ "$(size "$file")" -gt "$before" ]; then failures=1; else failures=$((failures + 1)); fi
  done
  case $error in "(22)"* | "(23)"*) die "cannot fetch $url (curl: $error)" ;; esac     # the server's no; a full disk
  url=${url#*://}
  die "cannot reach ${url%%/*} (curl: $error). Fetch the files elsewhere and put them under $dir, set BAM_MIRROR, or try the program without them: python bam.py --demo"
}

# fetch FILE ADDRESS: FILE, which gets its name only once it is verified. Where the table does not know the address, the
# server's own statement stands in: it shows that the transfer is whole, not that the file is the one we had in mind.
fetch() {
  local file=$1 address=$2 name=${1##*/} part=$work/${2//\//_}.part bytes sha256 resumed said
  if [ -e "$file" ]; then echo "$name: already there"; return; fi
  read -r bytes sha256 < <(table | awk -v address="$address" '$5 == address { print $3, $4 } END { print "- -" }')
  printf '%-26s %10s bytes\n' "$name" "${bytes/#-/?}"
  resumed=$(size "$part")
  [ "$resumed" = "$bytes" ] || request "$part" "$address"
  if said=$(helper verify "$part" "$name" "$bytes" "$sha256" "$work/headers"); then
    [ -z "$said" ] || echo "  $said"
    mv "$part" "$file"
    return
  fi
  rm -f "$part"
  [ "$resumed" != 0 ] || die "$said"
  echo "  what an earlier call left of $name does not fit: once more from the beginning"
  fetch "$@"
}

# ------------------------------------------------------------------------------------------------------ what is asked

glue() {
  local folder splits address sources problem
  mkdir -p "$work"
  while read -r _ folder splits; do
    if [ -e "$dir/$folder" ]; then     # whole, if it is ours; but it may have been brought here by hand
      problem=$(helper check "$dir/$folder" "$splits") || die "$problem. Move $dir/$folder away to have it fetched"
      echo "$folder: already there"
      continue
    fi
    sources=()
    for address in $(table | awk -v folder="$folder" '$1 == "file" && $2 == folder { print $5 }'); do
      fetch "$work/${address##*/}" "$address"
      sources+=("$work/${address##*/}")
    done
    problem=$(helper build "$dir/$folder" "$splits" "$work/$folder" "${sources[@]}") || die "$problem"
    rm -f "${sources[@]}"
  done < <(table | grep '^rows ')
}

checkpoint() {
  local name=$1 weights file
  if [[ $name =~ ^(google-bert/)?(bert-(base|large)-(un)?cased)$ ]]; then
    name=google-bert/${BASH_REMATCH[2]} weights=model.safetensors
  elif [[ $name =~ ^(google/)?(bert_uncased_L-([2468]|10|12)_H-(128_A-2|256_A-4|512_A-8|768_A-12))$ ]]; then
    name=google/${BASH_REMATCH[2]} weights=pytorch_model.bin
  else
    die "no checkpoint is called '$name'. There are google-bert/bert-{base,large}-{uncased,cased} and google/bert_uncased_L-{2,4,6,8,10,12}_H-{128,256,512,768}_A-{H/64}"
  fi
  mkdir -p "$work"
  # Two checkpoints in one folder would be a mixture of both, so the folder says whose it is.
  [ -e "$dir/config.json" ] || echo "$name" >"$dir/source.txt"
  if [ -e "$dir/source.txt" ] && [ "$(cat "$dir/source.txt")" != "$name" ]; then
    die "$dir holds $(cat "$dir/source.txt"): give $name a folder of its own"
  fi
  for file in config.json vocab.txt "$weights"; do     # the weights last: where they are, all is
    fetch "$dir/$file" "huggingface.co/$name/resolve/main/$file"
  done
}

# ------------------------------------------------------------------------------- checking and unpacking, in Python

# helper FUNCTION ARGUMENT...: calls one of the functions below. It prints what it has to say; if it fails, what is wrong.
helper() {
  "${PYTHON:-python3}" -I - "$@" 2>&1 <<'EOF'
import hashlib, os, re, shutil, stat, sys, zipfile

def stated(headers):
    """Size and sha256 as the server's answers, redirects included, state them; "-" where they do not."""
    with open(headers, encoding="latin-1") as file:
        answers = file.read().lower()
    last = re.split(r"^http/", answers, flags=re.M)[-1]    # a redirect's own length is of no interest
    size = re.search(r"^x-linked-size: *(\d+)", answers, re.M) or re.search(r"^content-length: *(\d+)", last, re.M)
    sha256 = re.search(r'^x-linked-etag: *"?([0-9a-f]{64})"? *$', answers, re.M)    # small files have a git hash here
    return size.group(1) if size else "-", sha256.group(1) if sha256 else "-"

def verify(path, name, size, sha256, headers):
    """Hold a file against the table or, where that is silent, against what the server stated."""
    if sha256 == "-":
        size, sha256 = stated(headers)
    digest, actual_size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if size not in ("-", str(actual_size)) or sha256 not in ("-", digest.hexdigest()):
        raise ValueError(f"{name} is not the file it should be: expected sha256 {sha256} ({size} bytes), "
                         f"got {digest.hexdigest()} ({actual_size} bytes)")
    if sha256 == "-":
        print(f"no sha256 is known for {name}: checked by its size alone, {size} bytes")

def check(folder, splits):
    """Count the rows of each split: lines with all fields. Only a line feed ends a line, and the last may lack it."""
    name, splits = os.path.basename(folder), splits.split()
    for split, expected in zip(splits[::2], map(int, splits[1::2])):
        path = os.path.join(folder, split + ".tsv")
        if not os.path.isfile(path):
            raise ValueError(f"{name} has no {split}.tsv")
        has_header = name != "CoLA" or split == "test"
        with open(path, "rb") as file:
            tabs = file.readline().count(b"\t")
            rows = sum(line.count(b"\t") >= tabs for line in file) + (not has_header)
        if rows != expected:
            raise ValueError(f"{name}/{split}.tsv has {rows} rows instead of {expected}")

def build(folder, splits, new, *sources):
    """Make a folder of GLUE as NEW, and give it its name once every row is counted."""
    name = os.path.basename(folder)
    shutil.rmtree(new, ignore_errors=True)
    os.mkdir(new)
    if name == "MRPC":
        build_mrpc(new, *sources)
    elif sources[0].endswith(".zip"):
        try:
            unpack(sources[0], name, new, splits.split()[::2])
        except Exception as error:    # a damaged archive raises whatever it stumbles over
            if type(error) is ValueError:    # ours
                raise
            raise ValueError(f"{sources[0]} cannot be unpacked: {error!s:.200}")
    else:
        shutil.copy(sources[0], os.path.join(new, name + ".tsv"))
    check(new, splits)
    os.rename(new, folder)

def unpack(path, folder, new, splits):
    """Take the splits out of an archive, and nothing at all if any member of it means harm."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if re.search(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)", member.filename):
                raise ValueError(f"{path}: refused, its member {member.filename!r} points outside the archive")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{path}: refused, its member {member.filename!r} is a symbolic link")
        total = sum(member.file_size for member in archive.infolist())
        if total > 20 * os.path.getsize(path):    # GLUE's text shrinks to a fifth or so
            raise ValueError(f"{path}: refused, it would unpack to {total} bytes")
        for split in splits:
            if f"{folder}/{split}.tsv" not in archive.namelist():
                raise ValueError(f"{path} has no {folder}/{split}.tsv")
            with archive.open(f"{folder}/{split}.tsv") as member, open(os.path.join(new, split + ".tsv"), "wb") as out:
                shutil.copyfileobj(member, out)

def build_mrpc(new, train, test, dev_ids):
    """GLUE may not distribute MRPC: dev is those pairs of its training file whose two ids are listed."""
    def read(path):    # some copies start with a byte-order mark, some end their lines in CR LF
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [line.split("\t") for line in file.read().replace("\r\n", "\n").split("\n") if line]
    def write(split, rows):
        with open(os.path.join(new, split + ".tsv"), "w", encoding="utf-8", newline="") as out:
            out.writelines("\t".join(row) + "\n" for row in rows)
    dev = {tuple(row) for row in read(dev_ids)}
    header, *pairs = read(train)
    write("train", [header] + [pair for pair in pairs if tuple(pair[1:3]) not in dev])
    write("dev", [header] + [pair for pair in pairs if tuple(pair[1:3]) in dev])
    header, *pairs = read(test)    # its label gives way to the row number
    write("test", [["index"] + header[1:]] + [[str(index)] + pair[1:] for index, pair in enumerate(pairs)])

try:
    globals()[sys.argv[1]](*sys.argv[2:])
except (OSError, ValueError, zipfile.BadZipFile) as error:
    sys.exit(str(error))
EOF
}

# --------------------------------------------------------------------------------------------------------------- main

case "${1:-} $#" in
  "-h 1" | "--help 1") usage; exit ;;
  "glue 2") dir=$2 ;;
  "checkpoint 3") dir=$3 ;;
  *) usage >&2; exit 2 ;;
esac
for tool in curl "${PYTHON:-python3}"; do
  command -v "$tool" >/dev/null || die "$tool is not installed"
done
table >/dev/null        # a BAM_TABLE that cannot be read ends the script here
work=$dir/.download     # unfinished downloads and folders; gone once all is there
if [ "$1" = glue ]; then glue; else checkpoint "$2"; fi
rm -rf "$work"
echo "$dir is complete"
