"""How do captioned pictures become batches? Cleaned, sorted by shape, encoded once, read in a fixed order.

    a source (data.py) --check--> what should not be trained on, and why: counts and contact sheets
       |
       +--Survey--> each picture gets the nearest of a few shapes of about size x size: 64x64, 80x48 ...
       |
       +--write_cache--> latents-80x48-00000.safetensors ...   mean and deviation of each latent
                         text-00000.safetensors ...            CLIP's and T5's features of each caption
                         index.json                            of which data, by which encoders
                            |
    seed, step --Batches----+--> mean, std, context, pooled --> the flow model

A step of the flow model needs no pixels and no words, only latents and text features, and the encoders that
make them cost more than the step itself: the paper's table 7 counts 65.5 kB of latents and 954 kB of text
features a sample, and 22 GB of encoders that training then need not hold. Two bytes a number are the paper's
65.5 kB here too: 16 channels x 32 x 32 cells x (mean, deviation) x 2 bytes at 256 pixels.

What to know
- Everything drawn at random follows from (seed, step): a resumed run sees the batches that the interrupted
  one would have seen, and N ranks together see those that one would.
- A batch is of one bucket, since a tensor has one shape. A picture is never stretched: it is resized until it
  covers its bucket, and what sticks out is cut off.
- Means and deviations are float16 (11 bits; they are small), text is bfloat16: T5's values overflow float16.
- A cache knows what it was made from. The fingerprint changes with any caption, setting or byte of a run's
  encoders, and with the length and both ends (32 kB each) of any picture's file. Only a change in the middle
  of a larger file that keeps its length goes unnoticed. Of published encoders the first 1,024 numbers of each
  tensor count.
- Thumbnails find copies that were resized, recompressed or blurred, not those that were cropped. The CLIP of
  a run (--run) finds crops of 3 % along each side, most of the time; it does not find crops of 6 %.

DIFFERS: the paper searches duplicates with SSCD, a network made to detect copies, in clusters of its
  embeddings; here it is thumbnails, and the CLIP image tower that training leaves behind.

Run: python prepare.py              a folder with faults, from check to batches, in seconds
     python data.py check DIR       a report on your own pictures before training; --help shows its bounds
     python train.py cache --run RUN --data DIR     the cache by itself, ahead of training
     python train.py cache --model PATH --data DIR --size 256       the same by published encoders
"""
import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

import data
from checkpoints import load_part, read_json, save_tensors, write_atomically, write_json

# ------------------------------------------------------------------------------------------- shapes and order

STEP = 16                   # sides of a bucket in pixels: 8 in the VAE times 2 in the patches
RATIO = 2.0                 # of the longest bucket; a longer picture loses its ends


def bucket_shapes(size: int) -> list[tuple[int, int]]:
    """(width, height) of every bucket: multiples of STEP, about size * size pixels, size x size first."""
    if size < STEP or size % STEP:
        near = max(STEP, round(size / STEP) * STEP)
        raise ValueError(f"size {size} is not a multiple of {STEP}: try {near}")
    shapes = [(size, size)]
    for long in range(size + STEP, 2 * size + 1, STEP):
        short = round(size * size / long / STEP) * STEP
        if short and long / short <= RATIO:
            shapes += [(long, short), (short, long)]
    return shapes


def nearest_bucket(width: int, height: int, shapes) -> int:
    """Number of the shape that cuts off least: the nearest in log(width / height)."""
    wanted = np.log(width / height)
    return int(np.argmin([abs(wanted - np.log(w / h)) for w, h in shapes]))


def picture_size(picture) -> tuple[int, int]:
    """Upright (width, height), from the file's header alone. A drawing is square: (1, 1)."""
    if callable(picture):
        return 1, 1
    with data.opened(picture) as image:
        return upright_size(image)


def upright_size(image) -> tuple[int, int]:
    """Of a freshly opened PIL image, once it is turned as its EXIF says."""
    # a PNG without the mark in its header would be decoded by getexif, to look for one behind the pixels
    turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(0x0112, 1) >= 5
    return image.size[::-1] if turned else image.size


class Order:
    """Which pictures make up the batch of a step: each once an epoch, all of one bucket, no state.

    A bucket's pictures are an endless row of shuffled rounds, cut into batches; an epoch shuffles the batches
    that end in it. So nothing is left over or repeated to fill a batch, a bucket smaller than a batch works,
    and any step can be computed without those before it.
    """

    def __init__(self, buckets, batch: int, seed: int = 0):
        """buckets (n,): each picture's. ValueError for no pictures, a batch below 1 or a seed below 0."""
        buckets = np.asarray(buckets)
        if len(buckets) == 0 or batch < 1 or seed < 0:
            raise ValueError(f"{len(buckets)} pictures, batch {batch}, seed {seed}: at least 1, 1 and 0")
        self.members = [np.flatnonzero(buckets == b) for b in np.unique(buckets)]
        self.pictures, self.batch, self.seed, self.kept = len(buckets), batch, seed, {}

    def before(self, epoch: int) -> int:
        """How many batches lie before an epoch."""
        return sum(epoch * len(m) // self.batch for m in self.members)

    def epoch_of(self, step: int) -> int:
        epoch = step * self.batch // self.pictures      # `before` rounds down, so it may be a later one
        while self.before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def at(self, step: int) -> np.ndarray:
        """(batch,) numbers of pictures."""
        epoch = self.epoch_of(step)
        bucket, k = self._shuffled(("batches", epoch))[step - self.before(epoch)]
        places, n = np.arange(k * self.batch, (k + 1) * self.batch), len(self.members[bucket])
        rounds = [self._shuffled((int(bucket), r)) for r in range(places[0] // n, places[-1] // n + 1)]
        return np.concatenate(rounds)[places - places[0] // n * n]

    def _shuffled(self, what):
        """An epoch's batches [(bucket, number in its row)] or a bucket's round; the last few are kept."""
        if what not in self.kept:
            kind, number = what
            if kind == "batches":
                ends = [(number * len(m) // self.batch, (number + 1) * len(m) // self.batch)
                        for m in self.members]
                rows = np.array([(b, k) for b, (i, j) in enumerate(ends) for k in range(i, j)])
            else:
                rows = self.members[kind]
            while len(self.kept) > 2 * len(self.members) + 2:
                del self.kept[next(iter(self.kept))]
            tag = (1, number) if kind == "batches" else (2, kind, number)
            self.kept[what] = np.random.default_rng((self.seed, *tag)).permutation(rows)
        return self.kept[what]


# ---------------------------------------------------------------------------------------------- fingerprints

ENDS = 32_768               # bytes from either end of a picture's file that its fingerprint covers


def digest(*parts: bytes) -> str:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(8, "little") + part)
    return h.hexdigest()


def identify(picture) -> tuple[tuple[int, int], str]:
    """(upright size, digest) of an Entry's picture, without decoding it."""
    if callable(picture):                               # a drawing: all that it is made from
        return (1, 1), digest(repr(picture.args).encode())
    if isinstance(picture, Image.Image):
        return picture.size, digest(picture.tobytes())
    size = picture_size(picture)
    with open(picture if isinstance(picture, Path) else picture.shard, "rb") as file:
        start, length = (0, picture.stat().st_size) if isinstance(picture, Path) else picture[1:]
        ends = []
        for offset in (0, max(0, length - ENDS)):
            file.seek(start + offset)
            ends.append(file.read(min(ENDS, length)))
    return size, digest(str(length).encode(), *ends)


def files_fingerprint(paths) -> str:
    """Of the encoders: every byte of the files from which they are loaded."""
    h = hashlib.blake2b(digest_size=16)
    for path in sorted(map(Path, paths)):
        h.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                h.update(block)
    return h.hexdigest()


def tensors_fingerprint(source) -> str:
    """Of a published part (a weights.Source): names, shapes and the first numbers of each tensor, so that
    10 GB need not be read. Training changes them all."""
    told = []
    for name, (_, *kind) in sorted(source.index.items()):
        some = source.read(name).flatten()[:1024].contiguous()
        told += [f"{name} {kind}".encode(), some.view(torch.uint8).numpy().tobytes()]
    return digest(*told)


class Survey:
    """What a cache of these entries must hold: each picture's bucket and digest, and all captions, sorted."""

    def __init__(self, entries, size: int, bucketed: bool = True):
        """Opens every picture's header. ValueError when a hundred in a row cannot be opened."""
        self.shapes = bucket_shapes(size) if bucketed else [(size, size)]
        self.entries, self.skipped, self.buckets, self.digests = [], [], [], []
        for entry, found, reason in data.each(identify, entries):
            if reason:
                self.skipped.append((entry.name, reason))
                continue
            size_of_it, mark = found
            self.entries.append(entry)
            self.buckets.append(nearest_bucket(*size_of_it, self.shapes))
            self.digests.append(digest(mark.encode(), *(c.encode() for c in entry.captions)))
        self.captions = sorted({c for e in self.entries for c in e.captions})
        self.fingerprint = digest(repr(self.shapes).encode(), *(d.encode() for d in self.digests))


# ------------------------------------------------------------------------------------------------- the cache

def source_of(c) -> dict:
    """Where the pictures of a cache come from, in the words of TrainConfig; a folder by its whole path."""
    where = c.data if c.data in ("drawn", "emoji") else str(Path(c.data).resolve())
    return {"data": where, "pictures": c.pictures, "buckets": c.buckets}


SHARD = 1024                # pictures or captions in a file, at about most: what an interruption may cost
FORMAT = 1


def key(text: str) -> int:
    """64 bits that stand for a caption or a name."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shards(texts) -> list[tuple[int, list[int]]]:
    """[(shard, numbers of texts)]: by key, so that a new or a lost one concerns a single shard."""
    shards = 1
    while shards * SHARD < len(texts):
        shards *= 2
    parts = {}
    for i, text in enumerate(texts):
        parts.setdefault(key(text) % shards, []).append(i)
    return sorted(parts.items())


def _plan(survey, vae_print, text_print, t5_length, clip_length):
    """[(file, fingerprint, numbers)] of the latents and of the text: the same for every rank."""
    latents, text = [], []
    for bucket, (width, height) in enumerate(survey.shapes):
        members = [i for i, b in enumerate(survey.buckets) if b == bucket]
        for k, part in _shards([survey.entries[i].name for i in members]):
            part = [members[j] for j in part]
            told = [t.encode() for i in part for t in (survey.entries[i].name, survey.digests[i])]
            latents.append((f"latents-{width}x{height}-{k:05}.safetensors",
                            digest(vae_print.encode(), *told), part))
    for k, part in _shards(survey.captions):
        told = [survey.captions[i].encode() for i in part]
        text.append((f"text-{k:05}.safetensors",
                     digest(text_print.encode(), f"{clip_length} {t5_length}".encode(), *told), part))
    return latents, text


def _about(path) -> dict | None:
    """What a shard tells of itself; None if there is none, or not a whole one."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("about", "{}"))
    except (FileNotFoundError, SafetensorError, ValueError):
        return None


@torch.no_grad()
def write_cache(folder, survey: Survey, vae, encoders, *, vae_print: str, text_print: str, t5_length: int,
                source: dict = {}, origin: str = "", rank: int = 0, world: int = 1, batch: int = 32,
                autocast=nullcontext, device=None, say=print) -> list:
    """Encode what `folder` does not hold yet: latents of `survey`'s pictures, features of its captions.

    vae_print, text_print: fingerprints of the encoders. source: `source_of` the pictures. origin: the
    published weights that the encoders came from.
    device: where to encode; the autoencoder and the text encoders visit it in turn, and only if they are
    needed (None: they stay where they are). batch: pictures of up to 256 x 256 at a time, fewer of larger
    ones. Each of `world` ranks calls this and makes every world-th file; no rank waits for another.
    Interrupted, it goes on at the unfinished file.
    -> [(picture, reason)]: what this call could not decode (Cache.skipped: all calls). ValueError for NaN and
    for a hundred unreadable pictures in a row.
    """
    folder = Path(folder)
    latents, text = _plan(survey, vae_print, text_print, t5_length, encoders.clip_length)
    index = {"format": FORMAT, "size": survey.shapes[0][0], "source": source, "encoders": origin,
             "data": survey.fingerprint, "vae": vae_print, "text": text_print,
             "t5_length": t5_length, "clip_length": encoders.clip_length, "widths": encoders.widths,
             "latents": [job[:2] for job in latents], "texts": [job[:2] for job in text]}
    if rank == 0:
        _replace_index(folder, index, say)
    jobs = [("picture", job) for job in latents] + [("caption", job) for job in text]
    jobs = [(kind, job) for kind, job in jobs[rank::world]
            if (_about(folder / job[0]) or {}).get("fingerprint") != job[1]]
    skipped, said, seconds, done = [], time.monotonic(), Counter(), Counter()
    for kind, (name, mark, part) in jobs:
        start = time.monotonic()
        if device is not None and not done[kind]:
            vae.to(device if kind == "picture" else "cpu")
            encoders.to(device if kind == "caption" else "cpu")
        if kind == "picture":
            skipped += _encode_pictures(folder / name, mark, survey, part, vae, batch, autocast)
        else:
            _encode_captions(folder / name, mark, survey, part, encoders, t5_length, batch, autocast)
        now = time.monotonic()
        seconds[kind], done[kind] = seconds[kind] + now - start, done[kind] + len(part)
        if now - said > 15:
            said, total = now, sum(len(p) for k, (_, _, p) in jobs if k == kind)
            each = seconds[kind] / done[kind]
            say(f"cache: {done[kind]:,} of {total:,} {kind}s, {1000 * each:.1f} ms each, "
                f"{each * (total - done[kind]):.0f} s left for {kind}s")
    for kind, made in done.items():
        size = sum((folder / job[0]).stat().st_size for k, job in jobs if k == kind)
        say(f"cache: {made:,} {kind}s encoded, {1000 * seconds[kind] / made:.2f} ms and "
            f"{size / made / 1000:.1f} kB a {kind}")
    return skipped


def _replace_index(folder, index, say) -> None:
    """Write index.json, telling what has changed since the last, and delete files that no longer belong."""
    try:
        old = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for what, made in (("data", "of other pictures or captions"), ("vae", "by another autoencoder"),
                           ("text", "by other text encoders")):
            if old.get(what) != index[what]:
                say(f"cache: {folder} was made {made}; what differs is made again")
    except FileNotFoundError:                                       # none yet
        pass
    except (ValueError, AttributeError) as error:
        say(f"cache: {folder / 'index.json'} is damaged ({error}): it is written anew")
    write_json(folder / "index.json", index)
    names = {name for name, _ in index["latents"] + index["texts"]}
    for path in folder.glob("*.safetensors"):
        if path.name not in names and re.fullmatch(r"(latents-\d+x\d+|text)-\d{5}", path.stem):
            path.unlink()


def _encode_pictures(path, mark, survey, part, vae, batch, autocast) -> list:
    """A shard of latents (n, 2, C, H, W) float16: mean and deviation, scaled as the flow model sees them."""
    box, device = survey.shapes[survey.buckets[part[0]]], next(vae.parameters()).device
    batch = max(1, min(batch, batch * 256 ** 2 // (box[0] * box[1])))
    kept, skipped, latents, waiting = [], [], [torch.zeros(0)], []

    def encode():
        x = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        with autocast():
            posterior = vae.encode(x)                                               # (B, C, H, W) each
        mean, std = vae.to_latent(posterior.mean), posterior.std * vae.config.scale
        both = torch.stack([mean, std], dim=1).half().cpu()                         # (B, 2, C, H, W)
        _refuse_nan(both, path, "the autoencoder")
        latents.append(both)
        waiting.clear()

    entries = [survey.entries[i] for i in part]
    for i, (entry, picture, reason) in zip(part, data.each(partial(data.read_picture, size=box), entries)):
        if reason:
            skipped.append((entry.name, reason))
            continue
        kept.append(i)
        waiting.append(picture)
        if len(waiting) == batch:
            encode()
    if waiting:
        encode()
    captions = [survey.entries[i].captions for i in kept]
    tensors = {"latents": torch.cat(latents[len(latents) > 1:]),
               "counts": torch.tensor([len(some) for some in captions], dtype=torch.int64),
               "captions": torch.tensor([key(c) for some in captions for c in some], dtype=torch.int64)}
    _save(path, tensors, {"fingerprint": mark, "names": [survey.entries[i].name for i in kept],
                          "skipped": skipped})
    return skipped


def _encode_captions(path, mark, survey, part, encoders, t5_length, batch, autocast) -> None:
    """A shard of text: what the encoders say of each caption, less the zeros that pad CLIP to T5's width."""
    captions, wide, made = [survey.captions[i] for i in part], sum(encoders.widths[:2]), []
    for k in range(0, len(captions), batch):
        with autocast():
            text = encoders(captions[k:k + batch], t5_length)           # (B, M, ctx), (B, pool)
        clip, t5 = text.context.split([encoders.clip_length, t5_length], dim=1)
        made.append([x.bfloat16().cpu() for x in (clip[..., :wide], t5, text.pooled)])
    tensors = {name: torch.cat(parts) for name, parts in zip(("clip", "t5", "pooled"), zip(*made))}
    for value in tensors.values():
        _refuse_nan(value, path, "a text encoder")
    tensors["keys"] = torch.tensor([key(c) for c in captions])
    _save(path, tensors, {"fingerprint": mark, "captions": captions})


def _save(path, tensors, about) -> None:
    try:
        save_tensors(path, tensors, about)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be written ({error}): make room, then give the command again") from None


def _refuse_nan(tensor, path, who) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{who} gives NaN or infinity for some of {path.name}: use float32 or bfloat16, "
                         "or another checkpoint")


class Cache:
    """What write_cache made, read at random: pictures by number, grouped by bucket, without any encoder.

    Files are mapped into memory, so that opening one costs nothing and reading costs what is read.
    ValueError if the cache is unfinished, damaged, of another version or lacks most of its pictures.
    """

    def __init__(self, folder):
        self.folder, index = Path(folder), read_json(Path(folder) / "index.json")
        if index.get("format") != FORMAT:
            raise ValueError(f"{folder} is a cache of format {index.get('format')}, this code reads "
                             f"{FORMAT}: delete it and make it again")
        if lacking := {"latents", "texts", "vae", "text", "data", "size"} - index.keys():
            raise ValueError(f"{folder}/index.json lacks {min(lacking)}: it is damaged, make the cache again")
        self.index, self.mapped = index, {}
        self.files = {"latents": [n for n, _ in index["latents"]], "text": [n for n, _ in index["texts"]]}
        marks = index["latents"] + index["texts"]
        about = {name: _about(self.folder / name) or {} for name, _ in marks}
        stale = [name for name, mark in marks if about[name].get("fingerprint") != mark]
        if stale:
            raise ValueError(f"{folder} is not finished: {len(stale)} of {len(marks)} files are missing, cut "
                             f"short or out of date ({stale[0]}): give the command that makes it again")
        self.names, self.skipped, buckets = [], [], []
        for name in self.files["latents"]:
            self.names += about[name]["names"]
            self.skipped += map(tuple, about[name]["skipped"])
            buckets += [name.split("-")[1]] * len(about[name]["names"])
        data.refuse_if_mostly_bad(folder, len(self.names), self.skipped)
        self.shapes = list(dict.fromkeys(buckets))
        self.buckets = np.array([self.shapes.index(b) for b in buckets])            # (n,)
        counts, self.place = self._column("latents", "counts")
        captions, _ = self._column("latents", "captions")
        keys, self.text_place = self._column("text", "keys")
        self.counts = torch.from_numpy(counts)                                      # (n,) captions a picture
        self.first = self.counts.cumsum(0) - self.counts            # (n,) where those begin in `rows`
        if (counts < 1).any() or counts.sum() != len(captions):
            raise ValueError(f"{folder} is damaged, its pictures have {counts.sum()} captions and there are "
                             f"{len(captions)}: delete it and make it again")
        order = keys.argsort()
        found = np.searchsorted(keys, captions, sorter=order).clip(max=len(keys) - 1)
        self.rows = order[found]                                # of all pictures' captions, in text_place
        if not np.array_equal(keys[self.rows], captions):
            raise ValueError(f"{folder} lacks the text of some captions: delete it and make it again")

    def _column(self, kind, name):
        """A tensor of all shards in one row, and for each of its values (shard, place in it)."""
        parts = [self._map(file)[name].numpy() for file in self.files[kind]]
        places = [np.stack([np.full(len(x), s), np.arange(len(x))], 1) for s, x in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(places)

    def __len__(self):
        return len(self.place)

    def texts(self, picture: int) -> list[str]:
        """A picture's captions."""
        start = int(self.first[picture])
        places = self.text_place[self.rows[start:start + int(self.counts[picture])]]
        return [_about(self.folder / self.files["text"][s])["captions"][i] for s, i in places]

    def compare(self, vae_print: str, text_print: str) -> None:
        """ValueError if other encoders made it: their latents and features mean nothing to these."""
        for what, now, who in (("vae", vae_print, "another autoencoder"),
                               ("text", text_print, "other text encoders")):
            if self.index[what] != now:
                raise ValueError(f"{self.folder} was made by {who} (fingerprint {self.index[what][:8]})"
                                 f" than this run's ({now[:8]}): make it again with  python train.py cache  "
                                 "or leave out --cache")

    def read(self, pictures: np.ndarray, captions: torch.Tensor):
        """pictures (B,), all of one bucket; captions (B,), each picture's caption by its number in `texts`.

        -> mean, std (B, C, H, W) float16; context (B, M, ctx) and pooled (B, pool) bfloat16, on the CPU."""
        mean, std = self._gather("latents", self.place[pictures], "latents").unbind(1)
        return mean, std, *self.text(pictures, captions)

    def text(self, pictures, captions) -> tuple[torch.Tensor, torch.Tensor]:
        """context and pooled, as `read` gives them; the pictures may be of any buckets."""
        place = self.text_place[self.rows[(self.first[pictures] + captions).numpy()]]
        clip, t5, pooled = (self._gather("text", place, name) for name in ("clip", "t5", "pooled"))
        context = t5.new_zeros(len(t5), clip.shape[1] + t5.shape[1], t5.shape[2])   # (B, M, ctx)
        context[:, :clip.shape[1], :clip.shape[2]] = clip
        context[:, clip.shape[1]:] = t5
        return context, pooled

    def _gather(self, kind, place, name):
        """Rows (shard, place in it) of a tensor that lies in several files -> (B, ...)."""
        out = None
        for shard in np.unique(place[:, 0]):
            at = np.flatnonzero(place[:, 0] == shard)
            found = self._map(self.files[kind][shard])[name][torch.from_numpy(place[at, 1])]
            out = found.new_empty(len(place), *found.shape[1:]) if out is None else out
            out[torch.from_numpy(at)] = found
        return out

    def _map(self, name):
        if name not in self.mapped:
            with safe_open(self.folder / name, framework="pt") as file:
                self.mapped[name] = {key: file.get_tensor(key) for key in file.keys()}
        return self.mapped[name]


class Batches:
    """The flow model's input at any step, or some rows of it: those of a rank (parallel.py)."""

    def __init__(self, cache: Cache, batch: int, seed: int, *, synthetic: float = 0.5):
        """batch: of all ranks together. synthetic: how often a synthetic caption is taken if there is one."""
        self.cache, self.order = cache, Order(cache.buckets, batch, seed)
        self.seed, self.synthetic = seed, synthetic

    def at(self, step: int, device="cpu", rows=slice(None)):
        """-> mean, std (B, C, H, W), context (B, M, ctx), pooled (B, pool), float32 on `device`."""
        pictures = self.order.at(step)
        state = np.random.SeedSequence((self.seed, 3, step)).generate_state(1, np.uint64)[0]
        coins = torch.Generator().manual_seed(int(state))
        captions = data.pick_captions(self.cache.counts[pictures], coins, self.synthetic)
        parts = self.cache.read(pictures[rows], captions[rows])
        return tuple(x.to(device).float() for x in parts)


# ------------------------------------------------------------------------------------------------- the check

SAME_LOOK = 0.1             # thumbnails nearer than this are copies. 99 of 100 emoji are within 0.05 of their
                            # resized, 0.06 of their JPEG of quality 40; two pairs of all 1,026 are within 0.1
SAME_CONTENT = 0.97, 0.35   # CLIP: cosine above the first, and thumbnails nearer than the second, for a small
                            # CLIP hardly cares where things are: alone it would call most scenes copies
CLUSTER = 4096              # pictures; up to so many, every pair is compared
ON_SHEET = 24               # pictures of each kind that the report shows


def look(picture, side: int | None = None):
    """(upright size, thumbnail as a vector, the middle as (side, side, 3) uint8 if a side is given).

    The vector, a perceptual hash in numbers, is 16 x 16 colours less their mean, over their deviation, and a
    fifth of the mean: nearly deaf to brightness and contrast. (The usual hash of 63 signs of a cosine
    transform is not steady here: of Twemoji, flat and symmetric, a twentieth lose 16 signs to JPEG.)"""
    with data.opened(picture) as image:
        size = upright_size(image)
        image = data.upright(image, max(32, side or 0))
        small = image.resize((16, 16), Image.Resampling.BILINEAR)       # BOX would shift cells by half pixels
        small = np.asarray(small, np.float32).reshape(-1, 3)                                        # (256, 3)
        mean = small.mean(0)
        centred = (small - mean) / max(16, small.std()) / small.size ** 0.5
        vector = np.concatenate([centred.ravel(), 0.2 * mean / 64 / 3 ** 0.5]).astype(np.float32)     # (771,)
        return size, vector, np.array(ImageOps.fit(image, (side, side))) if side else None


def clusters(vectors: torch.Tensor, rounds: int = 8) -> list[np.ndarray]:
    """Numbers of similar vectors (n, E), by k-means; about CLUSTER in each, all in one if they are few."""
    k = -(-len(vectors) // CLUSTER)
    centres = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:k]].clone()
    for _ in range(rounds if k > 1 else 1):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors.split(CLUSTER)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = sums / nearest.bincount(minlength=k).clamp(min=1)[:, None]
    return [found for c in range(k) if len(found := np.flatnonzero(nearest.numpy() == c))]


def copies(rank: np.ndarray, *spaces) -> dict[int, int]:
    """{copy: the one that is kept}, the first by rank (n,). Copies are nearer than `limit` in all `spaces`,
    each (vectors (n, E), limit), and in one cluster of the first.

    Each copy is near the one that stands for it: no chains, in which the ends have nothing in common."""
    found = {}
    for members in clusters(spaces[0][0]):
        members = members[np.argsort(rank[members], kind="stable")]
        own = [(vectors[torch.from_numpy(members)], limit) for vectors, limit in spaces]
        gone = np.zeros(len(members), bool)
        for i in range(len(members)):
            if i % 1024 == 0:
                near = [torch.cdist(v[i:i + 1024], v) < limit for v, limit in own]
                near = torch.stack(near).all(0).numpy()                                     # (1024, members)
            if not gone[i]:
                twins = np.flatnonzero(near[i % 1024] & ~gone)
                twins = twins[twins > i]
                gone[twins] = True
                found |= {int(members[t]): int(members[i]) for t in twins}
    return found


def passes(about: dict, rule: str):
    """Whether a picture's score keeps `rule`, such as "aesthetic>=5"; None if it has no such score."""
    name, sign, bound = parse_rule(rule)
    value = about.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    return value >= bound if sign == ">=" else value <= bound


def parse_rule(rule: str) -> tuple[str, str, float]:
    match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=)\s*([-+.\deE]+)\s*", rule)
    try:
        return match[1], match[2], float(match[3])
    except (TypeError, ValueError):
        raise ValueError(f'--score {rule!r} is no rule: write "aesthetic>=5" or "nsfw<=0.1"') from None


@torch.no_grad()
def examine(listing, run=None):
    """Decode every picture once. -> the readable entries, their sizes, thumbnails (n, 771), embeddings (n, E)
    by the run's CLIP or None, and [(name, reason)] of the unreadable."""
    tower = load_part(run, "clip_l_image") if run else None
    side, entries, sizes, thumbs = tower and tower.config.image_size, [], [], []
    embeds, waiting, lost = [], [], []

    def embed():
        x = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).float() / 255
        embeds.append(torch.nn.functional.normalize(tower(x).float(), dim=1))               # (B, E)
        waiting.clear()

    for entry, found, reason in data.each(partial(look, side=side), listing.entries, patience=None):
        if reason:
            lost.append((entry.name, reason))
            continue
        entries.append(entry)
        sizes.append(found[0])
        thumbs.append(found[1])
        if tower:
            waiting.append(found[2])
        if len(waiting) == 64:
            embed()
    if waiting:
        embed()
    return entries, sizes, torch.from_numpy(np.array(thumbs)), torch.cat(embeds) if embeds else None, lost


def check(source, *, size=64, min_side=None, max_ratio=3.0, scores=(), run=None, out=None, apply=False,
          say=print):
    """What of a folder or tar should not be trained on, as in the paper: report, contact sheets, maybe apply.

    In this order: unusable; shorter side below min_side (None: size); longer side more than max_ratio times
    the shorter; each rule of `scores`, where a picture without the score fails too; copies, of which the one
    with most pixels stays. run: a training run whose CLIP finds copies that thumbnails alone do not.
    -> {step: [(name, reason)]}. apply: add them all to the source's excluded.txt, which loading obeys."""
    if source in ("drawn", "emoji"):
        raise ValueError(f"{source!r} comes with the project: check a folder or a .tar of yours")
    start, listing, bound = time.monotonic(), data.list_pictures(source, size), min_side or size
    entries, sizes, thumbs, embeds, lost = examine(listing, run)
    names = sorted({name for e in entries for name in e.about})
    for rule in scores:
        if parse_rule(rule)[0] not in names:
            raise ValueError(f"no picture of {source} has the score of {rule!r}; there "
                             + (f"are {', '.join(names)}" if names else "are no scores at all"))
    removed = {"unusable": [(name, why, None, None) for name, why in listing.skipped + lost]}
    left = list(range(len(entries)))

    def step(name, verdict):
        """Remove those for which verdict(i) is (reason, the picture kept instead or None)."""
        found = {i: v for i in left if (v := verdict(i))}
        left[:] = [i for i in left if i not in found]
        removed[name] = [(entries[i].name, why, i, kept) for i, (why, kept) in found.items()]

    def twins(*spaces):
        pixels = np.array([-sizes[i][0] * sizes[i][1] for i in left])
        found = {left[a]: left[b] for a, b in copies(pixels, *((v[left], d) for v, d in spaces)).items()}
        return lambda i: i in found and (f"like {entries[found[i]].name}", found[i])

    step("small", lambda i: min(sizes[i]) < bound and ("{} x {}".format(*sizes[i]), None))
    step("long", lambda i: max(sizes[i]) > max_ratio * min(sizes[i]) and ("{} x {}".format(*sizes[i]), None))
    for rule in scores:
        name = parse_rule(rule)[0]
        step(rule, lambda i: not passes(entries[i].about, rule) and (f"{entries[i].about.get(name)}", None))
    if left:
        step("copy", twins((thumbs, SAME_LOOK)))
    if left and run:
        cosine, look_alike = SAME_CONTENT
        step("near copy (CLIP)", twins((embeds, (2 - 2 * cosine) ** 0.5), (thumbs, look_alike)))
    out = Path(out or Path("runs") / f"check-{Path(source).resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    report(source, listing, entries, sizes, left, removed, size, out, say)
    result = {name: [(n, why) for n, why, _, _ in items] for name, items in removed.items()}
    write_json(out / "report.json", {"source": str(source), "kept": len(left), "removed": result})
    if apply:
        exclude(Path(source), [n for items in result.values() for n, _ in items])
    say(f"{time.monotonic() - start:.0f} s; every name and reason is in {out / 'report.json'}; "
        + ("excluded.txt leaves them out from now on" if apply else "--apply leaves them out of training"))
    return result


def exclude(source: Path, names) -> None:
    """Add to the source's excluded.txt, except bad lines of captions.jsonl: they are skipped anyway."""
    path = (source if source.is_dir() else source.parent) / "excluded.txt"
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    new = [n for n in dict.fromkeys(names) if not n.startswith("captions.jsonl:")]
    text = "\n".join(dict.fromkeys(known + new)) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def report(source, listing, entries, sizes, left, removed, size, out, say) -> None:
    """Print the counts, and save a contact sheet of each step that removed something."""
    total = len(listing.entries) + len(listing.skipped)
    say(f"{source}: {total:,} entries" + f" and {listing.excluded:,} excluded" * bool(listing.excluded))
    for number, (name, items) in enumerate(removed.items(), 1):
        sheet = out / f"{number}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
        sheet.unlink(missing_ok=True)
        if items:
            contact(items, entries, name).save(sheet)
        say(f"  {name:20s} {len(items):7,} {100 * len(items) / max(1, total):5.1f} %"
            + (f"   {sheet}, for example {items[0][0]}: {items[0][1]}" if items else ""))
    say(f"  {'kept':20s} {len(left):7,} {100 * len(left) / max(1, total):5.1f} %")
    shapes = bucket_shapes(size)
    fill = Counter(shapes[nearest_bucket(*sizes[i], shapes)] for i in left)
    say(f"buckets for --size {size}: " + ", ".join(f"{w}x{h} {n:,}" for (w, h), n in fill.most_common()))
    captions = [entries[i].captions for i in left]
    both = sum(len(c) > 1 for c in captions)
    longest = max((len(t.split()) for c in captions for t in c), default=0)
    same = Counter(t for c in captions for t in c).most_common(1) or [("", 0)]
    say(f"captions: {both:,} of {len(left):,} pictures have synthetic ones beside the original; the longest "
        f"has {longest} words" + (f"; {same[0][1]:,} times {same[0][0][:60]!r}" if same[0][1] > 1 else ""))


def contact(items, entries, title) -> Image.Image:
    """A sheet of up to ON_SHEET removed pictures, a copy beside what it is a copy of; grey: unreadable."""
    def tile(i):
        if i is None:
            return np.full((128, 128, 3), 128, np.uint8)
        with data.opened(entries[i].picture) as image:          # all of it, with grey where it is not square
            return np.array(ImageOps.pad(data.upright(image, 128), (128, 128), color=(128, 128, 128)))

    tiles = []
    for k in sorted({k * len(items) // ON_SHEET for k in range(ON_SHEET)}):
        name, why, i, kept = items[k]
        tiles.append((tile(i), [name, why]))
        if kept is not None:
            tiles.append((tile(kept), ["kept: " + entries[kept].name]))
    rows = [tiles[k:k + 8] for k in range(0, len(tiles), 8)]
    return data.contact_sheet(
        {f"{title}, {len(items):,}" if k == 0 else " " * k: row for k, row in enumerate(rows)})


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="data.py",
                                     description="what of your pictures should not be trained on?")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("dir", metavar="DIR", help="a folder of captioned pictures or shards, or one .tar")
    parser.add_argument("--size", type=int, default=64, help="side of the training pictures (default: 64)")
    parser.add_argument("--min-side", type=int, help="shorter sides below this are small (default: --size)")
    parser.add_argument("--max-ratio", type=float, default=3.0, help="of longer to shorter side (default: 3)")
    parser.add_argument("--score", action="append", default=[], metavar="RULE",
                        help='keep what obeys, such as "aesthetic>=5" or "nsfw<=0.1"; may be repeated')
    parser.add_argument("--run", help="folder of a training run, whose CLIP finds copies; else thumbnails do")
    parser.add_argument("--out", help="folder of the report (default: runs/check-DIR)")
    parser.add_argument("--apply", action="store_true", help="leave all this out of training from now on")
    args = parser.parse_args(argv)
    try:
        check(args.dir, size=args.size, min_side=args.min_side, max_ratio=args.max_ratio, scores=args.score,
              run=args.run, out=args.out, apply=args.apply)
    except (ValueError, OSError) as error:
        print(f"data.py check: {error}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """A folder with faults goes through check, cache and batches; the reader's speed is measured."""
    from tempfile import TemporaryDirectory

    import text_encoders as te
    from vae import AutoencoderKL, VAEConfig

    with TemporaryDirectory() as work:
        folder = Path(work, "pictures")
        folder.mkdir()
        for i, entry in enumerate(data.list_pictures("emoji", count=150).entries[:150]):
            picture, name = entry.picture.resize((112, 80) if i % 3 else (80, 80)), f"{i:03}.png"
            picture.save(folder / name)
            (folder / name).with_suffix(".txt").write_text("\n".join(entry.captions), encoding="utf-8")
            for k, fault, shape in (1, "copy", (70, 50)), (4, "small", (40, 30)), (7, "long", (260, 64)):
                if i % 30 == k:                                 # of the wide ones
                    picture.resize(shape).save(folder / f"{i:03}-{fault}.png")
                    (folder / f"{i:03}-{fault}.txt").write_text(fault)
        (folder / "bad.png").write_bytes(b"<html>404</html>")
        (folder / "bad.txt").write_text("no picture")
        found = check(folder, size=64, min_side=48, out=Path(work, "report"), apply=True)
        assert {step: len(items) for step, items in found.items()} == {
            "unusable": 1, "small": 5, "long": 5, "copy": 5}

        survey = Survey(data.list_pictures(folder).entries, 64)
        te.train_clip_tokenizer(survey.captions, f"{work}/clip", 600)
        te.train_t5_tokenizer(survey.captions, f"{work}/t5", 600)
        words = [te.load_clip_tokenizer(f"{work}/clip", pad, 20) for pad in (te.EOS, "!")]
        words += [te.load_t5_tokenizer(f"{work}/t5", 20)]
        l, g = (te.CLIPTextEncoder(te.CLIPTextConfig.preset(f"tiny_{x}", vocab_size=words[0].vocab_size))
                for x in "lg")
        t5 = te.T5Encoder(te.T5Config.preset("tiny", vocab_size=words[2].vocab_size))
        write_cache(f"{work}/cache", survey, AutoencoderKL(VAEConfig.preset("tiny")),
                    te.TextEncoders(l, g, t5, words), vae_print="new", text_print="new", t5_length=20)
        cache = Cache(f"{work}/cache")
        batches = Batches(cache, 64, seed=0)
        shapes = Counter("x".join(map(str, batches.at(step)[0].shape[2:])) for step in range(20))
        assert len(cache) == 150 and set(shapes) == {"8x8", "6x10"}
        print(f"{len(cache)} pictures in the cache; 20 batches of latents: {dict(shapes)}")
        start = time.perf_counter()
        for step in range(100):
            batches.at(step)
        speed = 6400 / (time.perf_counter() - start)
        print(f"{speed:,.0f} samples a second with {torch.get_num_threads()} threads")


# Exercises. (1) Sort an epoch's batches by bucket instead of shuffling them: what happens to the loss curve,
# and why? (2) Store deviations as zeros: which trained model is sharper, and which survives a large guidance?
# (3) Set SAME_LOOK to 0.3 and check the emoji: which of the "copies" would you have kept?

if __name__ == "__main__":
    demo()
