"""Tokens: how does text become numbers? Apart from text_encoders.py, whose models see only these numbers.

    "A red star"    CLIP    cleaned and lower-cased, cut into words        a</w> red</w> star</w>
                    T5      cleaned; spaces become a letter, U+2581        _A _red _star

    CLIP    BOS tokens EOS padding    byte-pair encoding: from single letters on, the pair of neighbours that
                                      was learned first is merged, until no known pair is left
    T5          tokens EOS padding    unigram model: of all ways to split, the most probable one

Both are run by the `tokenizers` library. Any text will do: CLIP's letters are bytes, and a letter that T5 has
not learned becomes <unk>. A long text loses its end, but never its EOS.

Worth knowing before reading on
- CLIP marks where words end, T5 where they begin: "star" and "starling" differ from the first token on to
  CLIP, while to T5 they begin alike, unless "starling" is a piece of its own.
- CLIP's vector for a whole text is read at its first EOS. CLIP-L pads with EOS, too, bigG with id 0, which
  is "!".
- T5's vocabulary ends with 100 sentinels, <extra_id_0> last. Training hides words behind them.

DIFFERS: CLIP text is cleaned as Hugging Face's fast tokenizer does; OpenAI's also repairs Unicode and HTML.
DIFFERS: "!" in a prompt is id 0 for bigG, as in diffusers, where padding is special; Stability's has 256.
DIFFERS: Stability's SD3.5 script cuts T5's text at 226 characters; here only the number of tokens limits it.
Another stands at train_t5_tokenizer.

Run `python tokens.py`: trains both on a few captions and shows how they split others.
"""
import json
import math
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"                               # CLIP's
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]               # T5's: number 0 has the last id
CLIP_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


class TextTokenizer:
    """Texts to rows of ids: BOS (CLIP only), tokens, EOS, padding. Long texts lose their end, but never EOS.

    Takes any Python string; lone surrogates, which UTF-8 cannot hold, become U+FFFD. Has vocab_size and the
    ids bos (None for T5), eos, pad. length: for calls that give none.
    """

    def __init__(self, tok, bos, eos, pad, length):
        special = [token for token in (bos, eos, pad) if token]
        if missing := [token for token in special if tok.token_to_id(token) is None]:
            raise ValueError(f"not the right kind of tokenizer: its vocabulary has no {', '.join(missing)}")
        tok.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        tok.no_padding()                # a file's own settings are ignored
        tok.no_truncation()
        self.tok, self.length, self.vocab_size = tok, length, tok.get_vocab_size()
        self.bos, self.eos, self.pad = (t and tok.token_to_id(t) for t in (bos, eos, pad))

    def _encode(self, texts, length):   # -> room for tokens beside BOS and EOS; each text's tokens
        texts = [texts] if isinstance(texts, str) else texts
        room = (self.length if length is None else length) - 1 - (self.bos is not None)
        if room < 0:
            raise ValueError(f"length {length}: no room for EOS; ask for {2 - (self.bos is None)} or more")
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
        return room, [self.tok.encode(text, add_special_tokens=False).ids for text in texts]

    def __call__(self, texts, length=None):
        """B strings -> ids (B, length) int64, on the CPU."""
        room, rows = self._encode(texts, length)
        head = [] if self.bos is None else [self.bos]
        rows = [head + ids[:room] + [self.eos] + [self.pad] * (room - len(ids)) for ids in rows]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), -1 if rows else 0)

    def lengths(self, texts) -> list[int]:
        """How many tokens each text has, with BOS and EOS."""
        room, rows = self._encode(texts, self.length)
        return [len(ids) + self.length - room for ids in rows]

    def truncated(self, texts, length=None) -> list[bool]:
        """Which of the texts lose their end."""
        room, rows = self._encode(texts, length)
        return [len(ids) > room for ids in rows]


def byte_pairs(model) -> Tokenizer:
    """CLIP's cleaning and its split into words, around a byte-pair model; letters stand for bytes."""
    tok = Tokenizer(model)
    tok.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(CLIP_WORDS, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tok


def load_clip_tokenizer(folder, pad=EOS, length=77) -> TextTokenizer:
    """From vocab.json + merges.txt, or tokenizer.json. pad: EOS for CLIP-L, "!" for bigG."""
    vocab, merges, both = (Path(folder, name) for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if vocab.is_file() and merges.is_file():
        tok = byte_pairs(models.BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>"))
    elif both.is_file():
        tok = Tokenizer.from_file(str(both))
    else:
        raise ValueError(f"no CLIP tokenizer in {folder}: needs vocab.json and merges.txt, or tokenizer.json")
    return TextTokenizer(tok, BOS, EOS, pad, length)


def load_t5_tokenizer(folder, length=77) -> TextTokenizer:
    """From tokenizer.json, which includes T5's text cleaning."""
    if not (path := Path(folder, "tokenizer.json")).is_file():
        raise ValueError(f"no tokenizer.json in {folder}; spiece.model cannot be read")
    return TextTokenizer(Tokenizer.from_file(str(path)), None, "</s>", "<pad>", length)


def train_clip_tokenizer(captions, folder, vocab_size=1024):
    """Byte-pair encoding (arXiv 1508.07909) -> vocab.json, merges.txt. Ids as in the real one: 256 bytes, 256
    that end a word (so nothing is unknown), merges, BOS, EOS. vocab_size: an upper limit, 514 or more."""
    if vocab_size < 514:
        raise ValueError(f"vocab_size {vocab_size}: needs 514 or more (256 bytes twice, BOS, EOS)")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = byte_pairs(models.BPE(end_of_word_suffix="</w>"))
    tok.train_from_iterator(captions, trainers.BpeTrainer(              # "special" tokens get the first ids
        vocab_size=vocab_size - 2, special_tokens=letters + [c + "</w>" for c in letters],
        end_of_word_suffix="</w>", show_progress=False))
    model = json.loads(tok.to_str())["model"]
    vocab = {**model["vocab"], BOS: len(model["vocab"]), EOS: len(model["vocab"]) + 1}
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    Path(folder, "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def train_t5_tokenizer(captions, folder, vocab_size=1024):
    """A unigram model (arXiv 1804.10959) -> tokenizer.json: <pad> </s> <unk>, pieces, 100 sentinels.

    Characters neither ASCII nor in the captions are unknown, as in T5. vocab_size: an upper limit.
    DIFFERS: SentencePiece finds pieces by expectation maximisation; here they are the commonest words and all
    characters. (The library's trainer varies in the order of pieces, and with few captions it splits words.)
    """
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(),
                                           normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")   # "a star" -> "▁a" "▁star"
    words, counts = Counter(), Counter([chr(i) for i in range(33, 127)] + ["▁"])
    for caption in captions:
        for word, _ in tok.pre_tokenizer.pre_tokenize_str(tok.normalizer.normalize_str(caption)):
            counts.update(word)
            words.update(re.findall(r"▁\w+|\w\w+", word))               # without punctuation
    if (room := vocab_size - 3 - len(counts) - len(SENTINELS)) < 0:
        raise ValueError(f"vocab_size {vocab_size}: characters and sentinels alone need {vocab_size - room}")
    counts.update(dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))[:room]))
    specials, total = ["<pad>", "</s>", "<unk>"], counts.total()
    pieces = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    pieces = [(token, 0.0) for token in specials] + [(piece, math.log(n / total)) for piece, n in pieces]
    tok.model = models.Unigram(pieces, 2, False)                        # 2: the id of <unk>
    tok.add_special_tokens(specials + SENTINELS)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tok.save(str(Path(folder, "tokenizer.json")))


def demo():
    """Three texts in the tokens of both; and what holds for any text."""
    captions = ["a red star", "two red stars", "a blue ring", "a small star left of two blue rings"] * 5
    with TemporaryDirectory() as folder:
        train_clip_tokenizer(captions, folder, 540)
        train_t5_tokenizer(captions, folder, 230)
        clip, t5 = load_clip_tokenizer(folder, length=12), load_t5_tokenizer(folder, length=12)
    for text in ("A red  star", "two starlings", "étoile"):
        for name, tok in (("CLIP", clip), ("T5", t5)):
            print(f"{text!r:16s} {name:5s}", *(tok.tok.id_to_token(i) for i in tok(text)[0].tolist()
                                               if i not in (tok.bos, tok.eos, tok.pad)))
    assert torch.equal(clip("A red  star"), clip("a red star")) and not torch.equal(t5("A"), t5("a"))
    assert clip("star")[0, 1] != clip("starling")[0, 1] and t5("star")[0, 0] == t5("starling")[0, 0]
    assert (t5("étoile") == 2).any() and clip.truncated(["a red star", "star " * 20]) == [False, True]
    assert clip("star " * 20)[0, -1] == clip.eos and t5("star " * 20)[0, -1] == t5.eos
    print("passed: CLIP is blind to case, T5 to letters it has never seen; long texts keep their EOS")


# Exercises. (1) Train CLIP's with vocab_size=514: no merges. How long is a caption, and what is left of it in
# the 10 places that the CLIPs of a run on drawings have? (2) Split "starlings" into T5's pieces by hand, in
# other ways: `t5.tok.to_str()` holds their log-probabilities. No sum is larger than that of the way it took.

if __name__ == "__main__":
    demo()
