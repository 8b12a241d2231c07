"""How do captioned pictures become batches? Sorted by shape, encoded once, read in a fixed order.

    a source (data.py), cleaned (curate.py)
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
  of a larger file that keeps its length goes unnoticed. Of published encoders only the first 1,024 numbers of
  each tensor count.

Run: python prepare.py              from pictures of three shapes to batches, in seconds
     python train.py cache --run RUN --data DIR     the cache by itself, ahead of training
     python train.py cache --model PATH --data DIR --size 256       the same by published encoders
"""
import hashlib
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

import data
from offload import room
from run_folder import about_of, load_tensors, read_json, save_tensors
from tensor_files import CheckpointError, write_json

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


def upright_size(image) -> tuple[int, int]:
    """(width, height) of a freshly opened PIL image, once `data.upright` has turned it."""
    # the size that Pillow gives a TIFF is, in newer versions only, that of the turned picture
    size = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    return size[::-1] if data.orientation(image) in (5, 6, 7, 8) else size


class Order:
    """Which pictures make up the batch of a step: each once an epoch, a batch of one bucket, no state.

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
    with data.opened(picture) as image:
        size = upright_size(image)
    with open(picture if isinstance(picture, Path) else picture.shard, "rb") as file:
        start, length = (0, picture.stat().st_size) if isinstance(picture, Path) else picture[1:]
        ends = []
        for offset in (0, max(0, length - ENDS)):
            file.seek(start + offset)
            ends.append(file.read(min(ENDS, length)))
    return size, digest(str(length).encode(), *ends)


def files_fingerprint(paths) -> str:
    """A digest of encoders: of every byte of the files from which they are loaded."""
    h = hashlib.blake2b(digest_size=16)
    for path in sorted(map(Path, paths)):
        h.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                h.update(block)
    return h.hexdigest()


def tensors_fingerprint(source) -> str:
    """A digest of a published part (a weights.Source): of names, shapes and the first numbers of each tensor,
    so that 10 GB need not be read. Training changes them all."""
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

def place_of(data: str) -> str:
    """Where pictures come from, in words that hold in any working directory."""
    return data if data in ("drawn", "emoji") else str(Path(data).resolve())


EVERY = 10**9               # as TrainConfig.pictures: all that there are


def source_of(c) -> dict:
    """What index.json says of a cache's pictures: where they come from, in the terms of TrainConfig, a folder
    by its absolute path; and the seed, where it decides which they are."""
    return {"source": {"data": place_of(c.data), "pictures": c.pictures, "buckets": c.buckets},
            "seed": c.seed if c.data == "drawn" or c.pictures < EVERY else None}


SHARD = 1024                # pictures or captions in a file, at most (about): what an interruption may cost;
                            # up to twice as many in a cache that has grown
FORMAT = 1
# files of a cache mapped at once: Linux allows a process 65,530 maps in all, Windows reserves memory for each
MAPS = 30_000 if os.name != "nt" else 8


def key(text: str) -> int:
    """64 bits that stand for a caption or a name."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shards(kind, texts, made) -> list[tuple[int, list[int]]]:
    """[(shard, numbers of texts)]: by key, so that a new or a removed one changes a single shard.

    made: the files that the cache has so far. Another number of shards changes them all, so it stays until
    they are twice too large or four times too small. Ranks that find the index of before or after rank 0
    wrote it get the same number."""
    numbers = [int(Path(name).stem.split("-")[-1]) for name in made if name.startswith(f"{kind}-")]
    shards = 1 << max(numbers, default=0).bit_length()
    if not numbers or not SHARD / 4 <= len(texts) / shards <= 2 * SHARD:
        shards = 1
        while shards * SHARD < len(texts):
            shards *= 2
    parts = {}
    for i, text in enumerate(texts):
        parts.setdefault(key(text) % shards, []).append(i)
    return sorted(parts.items())


def _plan(survey, made, vae_print, text_print, t5_length, clip_length):
    """[(file, fingerprint, numbers)] of the latents and of the text: the same for every rank."""
    latents, text = [], []
    for bucket, (width, height) in enumerate(survey.shapes):
        members, kind = [i for i, b in enumerate(survey.buckets) if b == bucket], f"latents-{width}x{height}"
        for k, part in _shards(kind, [survey.entries[i].name for i in members], made):
            part = [members[j] for j in part]
            told = [t.encode() for i in part for t in (survey.entries[i].name, survey.digests[i])]
            latents.append((f"{kind}-{k:05}.safetensors", digest(vae_print.encode(), *told), part))
    for k, part in _shards("text", survey.captions, made):
        told = [survey.captions[i].encode() for i in part]
        text.append((f"text-{k:05}.safetensors",
                     digest(text_print.encode(), f"{clip_length} {t5_length}".encode(), *told), part))
    return latents, text


@torch.no_grad()
def write_cache(folder, survey: Survey, vae, encoders, *, vae_print: str, text_print: str, t5_length: int,
                source: dict = {}, origin: str = "", rank: int = 0, world: int = 1, batch: int = 32,
                autocast=nullcontext, device=None, verify: bool = True, say=print) -> list:
    """Encode what `folder` does not hold yet: latents of `survey`'s pictures, features of its captions.

    vae_print, text_print: fingerprints of the encoders. source: `source_of` the pictures. origin: the
    published weights that the encoders came from.
    device: where to encode; the autoencoder and the text encoders visit it in turn, and only if they are
    needed (None: they stay where they are). batch: pictures of up to 256 x 256 at a time, fewer of larger
    ones. Each of `world` ranks calls this and makes every world-th file; no rank waits for another. After an
    interruption the next call goes on at the unfinished file. verify: read all that is there once, a terabyte
    for a million captions by SD3's encoders, and make damaged files again.
    -> [(picture, reason)]: what this call could not decode (Cache.skipped: all calls). ValueError for NaN and
    for a hundred unreadable pictures in a row.
    """
    folder = Path(folder)
    latents, text = _plan(survey, _files(folder), vae_print, text_print, t5_length, encoders.clip_length)
    index = {"format": FORMAT, "size": survey.shapes[0][0], **source, "encoders": origin,
             "data": survey.fingerprint, "vae": vae_print, "text": text_print,
             "t5_length": t5_length, "clip_length": encoders.clip_length, "widths": encoders.widths,
             "latents": [job[:2] for job in latents], "texts": [job[:2] for job in text]}
    if rank == 0:
        _replace_index(folder, index, say)
    jobs = [("picture", job) for job in latents] + [("caption", job) for job in text]
    jobs = jobs[rank::world]
    if verify and (there := sum((folder / job[0]).is_file() for _, job in jobs)):
        say(f"cache: verifying {there} files")
    jobs = [(kind, job) for kind, job in jobs if not _holds(folder / job[0], job[1], verify, say)]
    skipped, said, seconds, done = [], time.monotonic(), Counter(), Counter()
    for kind, (name, mark, part) in jobs:
        start = time.monotonic()
        if device is not None and not done[kind]:
            vae.to(device if kind == "picture" else "cpu")
            encoders.to(device if kind == "caption" else "cpu")
        if kind == "picture":
            lost = _encode_pictures(folder / name, mark, survey, part, vae, batch, autocast)
            skipped, done[kind] = skipped + lost, done[kind] - len(lost)
        else:
            _encode_captions(folder / name, mark, survey, part, encoders, t5_length, batch, autocast)
        now = time.monotonic()
        seconds[kind], done[kind] = seconds[kind] + now - start, done[kind] + len(part)
        if now - said > 15:
            said, total = now, sum(len(p) for k, (_, _, p) in jobs if k == kind)
            each = seconds[kind] / max(1, done[kind])
            say(f"cache: {done[kind]:,} of {total:,} {kind}s, {1000 * each:.1f} ms each, "
                f"{each * (total - done[kind]):.0f} s left for {kind}s")
    for kind, made in (+done).items():                                      # those above 0
        size = sum((folder / job[0]).stat().st_size for k, job in jobs if k == kind)
        say(f"cache: {made:,} {kind}s encoded, {1000 * seconds[kind] / made:.2f} ms and "
            f"{size / made / 1000:.1f} kB a {kind}")
    return skipped


def _files(folder) -> list[str]:
    """The names of a cache's files, finished or not, by its index; none if there is none to read."""
    try:
        index = read_json(folder / "index.json")
        return [name for name, _ in index.get("latents", []) + index.get("texts", [])]
    except (CheckpointError, TypeError, ValueError):
        return []


def _holds(path, mark, verify, say) -> bool:
    """Whether a shard is there, of this fingerprint and, if that is verified, as it was written."""
    if (about_of(path) or {}).get("fingerprint") != mark:
        return False
    try:
        if verify:
            load_tensors(path)
    except CheckpointError:
        say(f"cache: {path} is damaged: it is made again")
        return False
    return True


def _replace_index(folder, index, say) -> None:
    """Write index.json, say what has changed since the last one, and delete files that no longer belong."""
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
    """A shard of text: the encoders' features of each caption, less the zeros that pad CLIP to T5's width."""
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
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): make room, then repeat the command") from None


def _refuse_nan(tensor, path, who) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{who} gives NaN or infinity for some of {path.name}: use float32 or bfloat16, "
                         "or another checkpoint")


class Cache:
    """Reads what write_cache made, in any order: pictures by number, grouped by bucket, without any encoder.

    Files are mapped into memory, so that opening one costs nothing and reading only what is read. Names and
    captions stay in the files: of a picture with two captions some 80 bytes are held, in each rank.
    ValueError if the cache is unfinished, damaged, of another version or lacks most of its pictures.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise ValueError(f"{folder} is not a cache, it has no index.json: make one with  python train.py "
                             "cache")
        index = read_json(self.folder / "index.json")
        if index.get("format") != FORMAT:
            raise ValueError(f"{folder} is a cache of format {index.get('format')}, this code reads "
                             f"{FORMAT}: delete it and make it again")
        if lacking := {"latents", "texts", "vae", "text", "data", "size"} - index.keys():
            raise ValueError(f"{folder}/index.json lacks {min(lacking)}: it is damaged, make the cache again")
        self.index, self._mapped = index, lru_cache(MAPS)(self._map)
        self.files = {"latents": [n for n, _ in index["latents"]], "text": [n for n, _ in index["texts"]]}
        marks = index["latents"] + index["texts"]
        stale, self.skipped, buckets = [], [], []
        for name, mark in marks:
            about = about_of(self.folder / name) or {}
            if about.get("fingerprint") != mark:
                stale.append(name)
            elif name.startswith("latents-"):
                self.skipped += map(tuple, about["skipped"])
                buckets += [name.split("-")[1]] * len(about["names"])
        if stale:
            raise ValueError(f"{folder} is not finished: {len(stale)} of {len(marks)} files are missing, cut "
                             f"short or out of date ({stale[0]}): repeat the command that makes it")
        data.refuse_if_mostly_bad(folder, len(buckets), self.skipped)
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
        self.rows = order[found]                                # all pictures' captions: rows of text_place
        if not np.array_equal(keys[self.rows], captions):
            raise ValueError(f"{folder} lacks the text of some captions: delete it and make it again")

    def _column(self, kind, name):
        """A tensor of all shards, joined, and for each of its values (shard, place in it)."""
        parts = [self._map(file)[name].numpy().copy() for file in self.files[kind]]     # no map is kept
        places = [np.stack([np.full(len(x), s), np.arange(len(x))], 1) for s, x in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(places)

    def __len__(self):
        return len(self.place)

    def texts(self, picture: int) -> list[str]:
        """A picture's captions."""
        start = int(self.first[picture])
        places = self.text_place[self.rows[start:start + int(self.counts[picture])]]
        return [about_of(self.folder / self.files["text"][s])["captions"][i] for s, i in places]

    def compare(self, vae_print: str, text_print: str) -> None:
        """ValueError if other encoders made it: their latents and features mean nothing to these."""
        for what, now, who in (("vae", vae_print, "another autoencoder"),
                               ("text", text_print, "other text encoders")):
            if self.index[what] != now:
                raise ValueError(f"{self.folder} was made by {who} (fingerprint {self.index[what][:8]})"
                                 f" than this run's ({now[:8]}): make it again with  python train.py cache  "
                                 "or leave out --cache")

    def read(self, pictures: np.ndarray, captions: torch.Tensor, locked: bool = False):
        """pictures (B,), all of one bucket; captions (B,), each picture's caption by its number in `texts`.

        -> mean, std (B, C, H, W) float16; context (B, M, ctx) and pooled (B, pool) bfloat16, on the CPU, in
        page-locked memory if asked. Each number is copied once: of SD3's encoders a row is a megabyte."""
        rows = self._rows("latents", self.place[pictures], "latents")               # each (2, C, H, W)
        both = room((2, len(rows), *rows[0].shape[1:]), rows[0].dtype, locked)
        torch._foreach_copy_(both.unbind(1), rows)
        return *both, *self.text(pictures, captions, locked)

    def text(self, pictures, captions, locked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """context and pooled, as `read` gives them; the pictures may be of any buckets."""
        if not ((0 <= captions) & (captions < self.counts[pictures])).all():
            raise IndexError(f"captions {captions.tolist()} of pictures that have "
                             f"{self.counts[pictures].tolist()}")
        place = self.text_place[self.rows[(self.first[pictures] + captions).numpy()]]
        clip, t5, said = (self._rows("text", place, name) for name in ("clip", "t5", "pooled"))
        (length, wide), (rest, width) = clip[0].shape, t5[0].shape
        context = room((len(place), length + rest, width), t5[0].dtype, locked)     # (B, M, ctx)
        pooled = room((len(place), *said[0].shape), said[0].dtype, locked)          # (B, pool)
        context[:, :length, wide:] = 0
        torch._foreach_copy_([*context[:, :length, :wide], *context[:, length:], *pooled], clip + t5 + said)
        return context, pooled

    def _rows(self, kind, place, name) -> list[torch.Tensor]:
        """Rows (shard, place in it) of a tensor that is spread over several files, where they lie."""
        return [self._mapped(self.files[kind][shard])[name][i] for shard, i in place.tolist()]

    def __getstate__(self):
        return self.__dict__ | {"_mapped": None}            # a worker process opens the files itself

    def __setstate__(self, state):
        self.__dict__ |= state | {"_mapped": lru_cache(MAPS)(self._map)}

    def _map(self, name):
        with safe_open(self.folder / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}


def send(x: torch.Tensor, device) -> torch.Tensor:
    """x on `device`. A GPU fetches it when it has done what was asked before, and nobody waits for that."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    x = x if x.is_pinned() else room(x.shape, x.dtype, locked=True).copy_(x)
    return x.to(device, non_blocking=True)


class Batches:
    """The flow model's input at any step, or only a rank's rows of it (parallel.py). A thread does all the
    reading, so that it can read ahead while the model computes."""

    def __init__(self, cache: Cache, batch: int, seed: int, *, synthetic: float = 0.5, locked: bool = False):
        """batch: of all ranks together. synthetic: how often a synthetic caption is taken if there is one.
        locked: read into memory that a GPU can fetch by itself."""
        self.cache, self.order = cache, Order(cache.buckets, batch, seed)
        self.seed, self.synthetic, self.locked = seed, synthetic, locked
        # a new thread's current GPU is the first one, on which each rank would then take half a GB
        own = (torch.cuda.set_device, (torch.cuda.current_device(),)) if locked else (None, ())
        self.thread, self.ahead = ThreadPoolExecutor(1, "", *own), {}   # (step, first row, end): to be read

    def at(self, step: int, device="cpu", rows=slice(None)):
        """-> mean, std (B, C, H, W), context (B, M, ctx), pooled (B, pool), float32 on `device`."""
        reading = self.expect(step, rows)
        del self.ahead[step, rows.start, rows.stop]
        return tuple(send(x, device).float() for x in reading.result())         # raises what the thread did

    def expect(self, step: int, rows=slice(None)) -> Future:
        """Begin to read what `at` will be asked for. After a jump to another step what was expected is
        forgotten."""
        self.ahead = {k: v for k, v in self.ahead.items() if abs(k[0] - step) < 2}
        key = step, rows.start, rows.stop
        if key not in self.ahead:
            self.ahead[key] = self.thread.submit(self._read, step, rows)
        return self.ahead[key]

    def _read(self, step, rows):
        pictures = self.order.at(step)
        state = np.random.SeedSequence((self.seed, 3, step)).generate_state(1, np.uint64)[0]
        coins = torch.Generator().manual_seed(int(state))
        captions = data.pick_captions(self.cache.counts[pictures], coins, self.synthetic)
        return self.cache.read(pictures[rows], captions[rows], self.locked)


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """Emoji in three shapes go through survey, cache and batches; the reader's speed is measured."""
    from tempfile import TemporaryDirectory

    import text_encoders as te
    import tokens
    from vae import AutoencoderKL, VAEConfig

    boxes, entries = [(80, 80), (112, 80), (80, 112)], data.list_pictures("emoji", count=150).entries[:150]
    entries = [e._replace(picture=e.picture.resize(boxes[i % 3])) for i, e in enumerate(entries)]
    survey = Survey(entries, 64)
    with TemporaryDirectory(ignore_cleanup_errors=True) as work:    # Windows keeps files that are mapped
        tokens.train_clip_tokenizer(survey.captions, f"{work}/clip", 600)
        tokens.train_t5_tokenizer(survey.captions, f"{work}/t5", 600)
        words = [tokens.load_clip_tokenizer(f"{work}/clip", pad, 20) for pad in (tokens.EOS, "!")]
        words += [tokens.load_t5_tokenizer(f"{work}/t5", 20)]
        l, g = (te.CLIPTextEncoder(te.CLIPTextConfig.preset(f"tiny_{x}", vocab_size=words[0].vocab_size))
                for x in "lg")
        t5 = te.T5Encoder(te.T5Config.preset("tiny", vocab_size=words[2].vocab_size))
        write_cache(f"{work}/cache", survey, AutoencoderKL(VAEConfig.preset("tiny")),
                    te.TextEncoders(l, g, t5, words), vae_print="new", text_print="new", t5_length=20)
        cache = Cache(f"{work}/cache")
        batches = Batches(cache, 64, seed=0)
        shapes = Counter("x".join(map(str, batches.at(step)[0].shape[2:])) for step in range(20))
        assert len(cache) == 150 and set(shapes) == {"8x8", "6x10", "10x6"}
        print(f"{len(cache)} pictures in the cache; 20 batches of latents: {dict(shapes)}")
        start = time.perf_counter()
        for step in range(100):
            batches.at(step)
        speed = 6400 / (time.perf_counter() - start)
        print(f"{speed:,.0f} samples a second with {torch.get_num_threads()} threads")


# Exercises. (1) Sort an epoch's batches by bucket instead of shuffling them: what happens to the loss curve,
# and why? (2) Store deviations as zeros: which trained model is sharper, and which survives a large guidance?

if __name__ == "__main__":
    demo()
