"""Where do captioned pictures come from?

Three sources, one result: `Pictures`, square RGB pictures in a uint8 tensor, each with one caption or more.

    "drawn"     shapes on grey, as many as you like, each with two true captions (drawn_world.py): the world
                that --tiny learns
    "emoji"     1,026 Twemoji, kept in assets/ as one sheet, so that the first real pictures need no download
    a folder    yours: name.png beside name.txt (each line is a caption), or a captions.jsonl of lines such as
                {"file": "cats/1.jpg", "captions": ["a cat", "a grey cat asleep on a red sofa"]}
                The first caption is the original, those after it are synthetic. Beside a captions.jsonl no
                name.txt is read: only the pictures that it names are loaded, the others are counted
    tar shards  the same files in .tar (the WebDataset layout), one or a folder full; name.json may take the
                place of name.txt: {"captions": [...], "aesthetic": 5.1}

Pitfalls
- Dropping alpha shows the colours hidden under transparent pixels, often black: pictures are laid on white.
  Cameras keep rotation in EXIF, 16-bit files need scaling (as 65,535 is white, what a camera's 12 bits leave
  in them comes out almost black: scale it first), and a small file may decode to gigabytes.
- A bad file, or a name.txt without a picture, is skipped and listed in `Pictures.skipped`, never silently;
  when most are bad, or a hundred in a row, loading stops. `python data.py check DIR` (curate.py) reports on a
  folder before training.
- A JPEG with a damaged byte decodes without complaint into another picture; only a checksum would tell.

Run `python data.py`: loads emoji, and a folder of them with damaged files and as a tar shard.
"""
import io
import json
import os
import sys
import tarfile
import textwrap
import unicodedata
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from drawn_world import draw, scene

ASSETS = Path(__file__).resolve().parent / "assets"
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".avif", ".heic"}       # these even if Pillow has no decoder: then they are skipped and listed
MAX_PIXELS = 64_000_000             # by the header, before decoding: 256 MB as RGBA
MAX_CAPTION = 2_000                 # characters; the text encoders cut far earlier
MAX_CAPTION_FILE = 1_000_000        # bytes of a name.txt or name.json
PATIENCE = 100                      # unreadable pictures in a row: then something else is wrong
FORMAT = ('put name.txt beside each name.png, or one captions.jsonl with a line '
          '{"file": "name.png", "captions": ["...", ...]} for each picture')
TILE, COLUMNS = 64, 38              # the emoji sheet: 27 rows of 38 are exactly 1,026


class Member(NamedTuple):
    """A file in a tar shard. Tar does not compress: the file can be read where it lies, in any order."""
    shard: Path
    offset: int
    size: int


class Entry(NamedTuple):
    """One captioned picture of a source, not opened yet."""
    name: str                       # its file, or shard.tar/file
    picture: object                 # Path, Member, PIL image, or a function: size -> (size, size, 3) uint8
    captions: tuple[str, ...]       # the original first, then the synthetic ones
    about: dict[str, float]         # what captions.jsonl or name.json says in numbers: scores


class Listing(NamedTuple):
    """All that a source holds, in an order that is the same in every call."""
    entries: list[Entry]
    skipped: list[tuple[str, str]]  # what cannot be used: (file, or captions.jsonl:line, and the reason)
    excluded: int                   # how many excluded.txt leaves out (`python data.py check --apply` adds)
    unnamed: int = 0                # pictures and shards for which captions.jsonl has no usable line


@dataclass
class Pictures:
    images: torch.Tensor            # (n, 3, size, size) uint8
    captions: list[tuple[str, ...]]     # n entries: the original first, then the synthetic where there is one
    skipped: list[tuple[str, str]]      # (file, or captions.jsonl:line, and the reason)
    excluded: int = 0
    names: Sequence = field(default_factory=list)       # of the n entries; numbers for those of a cache
    unnamed: int = 0                # as in Listing; perhaps left out on purpose, so they do not count as bad


def load_pictures(source, size=64, *, count=None, seed=0, listing=None):
    """Captioned pictures, size x size, from any source (see `list_pictures`), in memory.

    Pictures are resized until their shorter side is `size`; the centre is kept. listing: what `list_pictures`
    returns for the same arguments, if it has been called already.
    -> Pictures; what could not be used is listed in `skipped`.
    Raises ValueError: what `list_pictures` and `each` raise, more than half unusable, a bad size."""
    entries, skipped, excluded, unnamed = listing or list_pictures(source, size, count=count, seed=seed)
    skipped = list(skipped)
    wanted, untried, captions, names = min(count or len(entries), len(entries)), len(entries), [], []
    images = torch.empty((wanted, 3, size, size), dtype=torch.uint8)
    for entry, picture, reason in each(partial(read_picture, size=size), entries):
        untried -= 1
        if reason:
            skipped.append((entry.name, reason))
        else:
            images[len(captions)] = torch.from_numpy(picture).permute(2, 0, 1)
            captions.append(entry.captions)
            names.append(entry.name)
        if len(captions) == wanted:
            break
    # beyond `count` pictures nothing is opened: presumed good
    refuse_if_mostly_bad(source, len(captions) and len(captions) + untried, skipped)
    return Pictures(images[:len(captions)], captions, skipped, excluded, names, unnamed)


def list_pictures(source, size=64, *, count=None, seed=0):
    """Everything that can be known about a source without decoding a picture. -> Listing

    source: "drawn", "emoji", a folder (./drawn if it has such a name) of pictures or of .tar shards, or one
    .tar. count: how many drawings (None: 24,000), drawing i depends on (seed, i) alone; otherwise the most
    that will be used: all entries are listed, in an order drawn from `seed`.
    Raises ValueError: no such folder, nothing captioned in it, a bad size, count or seed."""
    if size < 1 or seed < 0 or (count is not None and count < 1):
        raise ValueError(f"size and count must be at least 1 and seed 0, not {size}, {count} and {seed}")
    if source == "drawn":
        scenes = (scene(np.random.default_rng((seed, i))) for i in range(count or 24_000))
        return Listing([Entry(f"drawn/{seed}/{i}", partial(draw, s.things), s.captions, {})
                        for i, s in enumerate(scenes)], [], 0)
    entries, skipped, unnamed = (_emoji(), [], 0) if source == "emoji" else _listing(Path(source))
    excluded = set(excluded_names(Path(source))) if source != "emoji" else set()
    kept = [entry for entry in entries if entry.name not in excluded]
    skipped = [(name, why) for name, why in skipped if name not in excluded]
    listing = Listing(kept, skipped, len(entries) - len(kept), unnamed)
    if count is not None and count < len(kept):
        listing = listing._replace(
            entries=[kept[int(i)] for i in np.random.default_rng(seed).permutation(len(kept))])
    return listing


def each(function, entries, patience=PATIENCE):
    """Yields (entry, function(entry.picture), "") in order, or (entry, None, reason) if that raised.

    In threads, a little ahead: decoders release the GIL. ValueError after `patience` failures in a row (None:
    never): then the fault is not in the pictures but in the disk, the network or the listing."""
    entries, ahead, bad, pool = iter(entries), deque(), 0, ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        while True:
            while len(ahead) < 32 and (entry := next(entries, None)) is not None:
                ahead.append((entry, pool.submit(function, entry.picture)))
            if not ahead:
                return
            entry, result = ahead.popleft()
            try:
                value, reason = result.result(), ""
            except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, zlib.error ...
                value, reason = None, (str(error) or type(error).__name__)[:160]
            bad = bad + 1 if reason else 0
            if bad == patience:
                raise ValueError(f"{patience} pictures in a row cannot be read, the last is {entry.name} "
                                 f"({reason}): is the disk still there? Otherwise leave them out with  "
                                 "python data.py check DIR --apply")
            yield entry, value, reason
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_if_mostly_bad(source, good, skipped):
    """ValueError if more than half of a source is unusable, with the first causes, or if nothing is left."""
    if not good and not skipped:
        raise ValueError(f"{source}: excluded.txt leaves out every picture: delete lines from it")
    if not good or len(skipped) > good:
        causes = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise ValueError(f"{source}: {len(skipped)} of {len(skipped) + good} entries are unusable, repair or "
                         f"remove them ({causes}), or {FORMAT}")


def pick_captions(counts, generator, synthetic=0.5):
    """Which caption each of n pictures gets -> (n,): 0, the original, or with probability `synthetic` one of
    the others. counts (n,): how many it has; with one there is no choice. The paper's table 4 mixes half and
    half."""
    coin, which = torch.rand(2, len(counts), generator=generator, dtype=torch.float64)
    counts = torch.as_tensor(counts)
    other = 1 + (which * (counts - 1)).long()
    return torch.where((coin < synthetic) & (counts > 1), other, 0)             # (n,)


def read_picture(picture, size):
    """An Entry's picture -> (height, width, 3) uint8: upright, on white, 8 bits a channel, not stretched.

    size: a side or (width, height); the picture is resized to cover that, and its middle is cut out.
    Raises ValueError for more than MAX_PIXELS, and whatever Pillow raises for a file that it cannot read."""
    box = (size, size) if isinstance(size, int) else tuple(size)
    if callable(picture):
        return picture(box[0])
    with opened(picture, whole=True) as image:
        # fit() crops before it resizes: a strip of 20000 x 1 must not become 1280000 x 64 on the way
        return np.array(ImageOps.fit(upright(image, max(box)), box, Image.Resampling.BICUBIC))


@contextmanager
def opened(picture, whole=False):
    """A PIL image that is small enough to decode, of which only the header has been read. whole: a PNG's
    checksums are verified first, which Pillow's decoder does not do: a wrong bit may go unnoticed there."""
    if isinstance(picture, Path) and not picture.is_file():                     # or a pipe, to wait for
        windows = ": write / for each \\ in its path" * ("\\" in picture.name)    # no name there has one
        raise ValueError("a folder" if picture.is_dir() else "no such file" + windows)
    with io.BufferedReader(Window(picture)) if isinstance(picture, Member) else nullcontext(picture) as file:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        try:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, over {MAX_PIXELS:,}: make it smaller")
            if whole and image.format == "PNG":
                image.verify()                          # after which it cannot be read
                image = Image.open(file)
            yield image
        finally:
            if image is not picture:
                image.close()


def whole_picture(path):
    """All of a picture, as `upright` gives it. ValueError, with the reason, if it is not a picture."""
    try:
        with opened(Path(path), whole=True) as image:
            return upright(image, max(image.size))
    except Exception as error:      # decoders fail in many ways: OSError, SyntaxError, zlib.error ...
        raise ValueError((str(error) or type(error).__name__).replace(f" '{path}'", "")[:160]) from None


class Window(io.RawIOBase):
    """A member of a shard as a file: a picture's size takes a few kB of it, not all."""

    def __init__(self, member):
        self.shard, self.place = open(member.shard, "rb", buffering=0), 0
        self.start, self.size = member.offset, member.size

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, room):
        self.shard.seek(self.start + self.place)
        count = self.shard.readinto(memoryview(room)[:max(0, self.size - self.place)])
        self.place += count
        return count

    def close(self):
        if hasattr(self, "shard"):                      # not if it could not be opened
            self.shard.close()
        super().close()


def orientation(image):
    """How a freshly opened PIL image is to be turned, 1 to 8 as in EXIF. That of a PNG may also follow its
    pixels, where it does not count: its getexif would decode them all, and a bucket is chosen without."""
    return Image.Image.getexif(image).get(0x0112, 1)


def upright(image, side):
    """A freshly opened PIL image -> RGB, turned as its EXIF says, transparent parts white, 16 bits scaled.

    A JPEG decodes at 1/2, 1/4 or 1/8 of its size where that leaves 2 * side pixels both ways."""
    turned = orientation(image) != 1                # asked first: load() also finds what follows the pixels
    image.draft("RGB", (2 * side, 2 * side))
    image.load()
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":     # 16 or 32 bits: convert() clips at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = 65535 if image.mode.startswith("I") else 255 if values.max() > 1 else 1
        values[values == image.info.get("transparency")] = white        # a PNG's transparent grey
        image = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def excluded_names(root):
    """The names in excluded.txt, one a line: in the folder, or beside a single shard."""
    path = (root if root.is_dir() else root.parent) / "excluded.txt"
    return lines_of(path) if path.is_file() else []


def lines_of(path):
    """The lines of a text file. ValueError if it is not UTF-8."""
    try:                            # splitlines() would cut names at U+2028 and its like
        return path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e}): save it as such") from None


def _listing(root):
    """The entries of a folder or a .tar, [(name, reason)] for those that cannot be used, and how many
    pictures and shards lie beside a captions.jsonl that has no usable line for them."""
    listed = (root / "captions.jsonl").is_file()
    if root.suffix.lower() == ".tar" and root.is_file():
        raw, skipped = _shard(root.name, root)
    elif not root.is_dir():
        raise ValueError(f'{root}: no such folder; a source is "drawn", "emoji", a folder or a .tar')
    elif listed:                                    # lines in bytes: broken UTF-8 spoils only one of them
        lines = (root / "captions.jsonl").read_bytes().splitlines()
        raw = [(f"captions.jsonl:{n}", None, None, line) for n, line in enumerate(lines, 1) if line.strip()]
        skipped = []
    else:
        raw, skipped = _files(root)
    entries, seen, real = [], set(), root.resolve()
    for name, *parts in raw:
        try:
            entry = _entry(real, name, *parts)
            if _printed(entry.name) != entry.name:
                raise ValueError("its name is not one line of UTF-8 text: rename it")
            file = _in_folder(real, entry.name) if listed else entry.name
            if file in seen:
                raise ValueError("listed before: a picture has all its captions in one place")
            seen.add(file)
            entries.append(entry)
        except (ValueError, OSError, RuntimeError) as error:    # RuntimeError: deep nesting, looping links
            skipped.append((name, str(error)[:160]))
    if not entries and all(reason.startswith(("no captions", "no picture")) for _, reason in skipped):
        first = "".join(f" ({_printed(name)}: {reason})" for name, reason in skipped[:1])
        raise ValueError(f"{root}: no captioned pictures here{first}: {FORMAT}")
    there = {str(p) for p in _paths(root) if p.suffix.lower() in SUFFIXES | {".tar"}} if listed else set()
    unnamed = sum((root / file).is_file() for file in there - seen)
    return entries, [(_printed(name), reason) for name, reason in skipped], unnamed


def _in_folder(root, name):
    """One name for a file in root (resolved), however a listing spells it; a link keeps a name of its own."""
    path = Path(name)
    if path.is_absolute():
        return os.path.relpath(path.parent.resolve() / path.name, root)
    return os.path.normpath(name)


def print_any_sign() -> None:
    """From here on standard output shows in escapes what its console or file cannot hold (on Windows
    often all but cp1252), instead of raising UnicodeEncodeError. What is said to a closed stream is lost."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8")
                              for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):              # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")


def _printed(name):
    """A file's name as one line of UTF-8 text: on the screen, and in excluded.txt, it takes a line."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


def _paths(root):
    """All that lies in a folder, except hidden, as sorted paths in it."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*"))
    return [path for path in paths if not any(part.startswith(".") for part in path.parts)]


def _files(root):
    """A folder's pictures and those of its shards: [(name, picture, .txt, .json)], and [(name, reason)]."""
    raw, skipped, paths = [], [], _paths(root)
    kinds = {(path.with_suffix(""), path.suffix.lower()): path for path in paths}   # also a.TXT is a's .txt
    pictured = {stem for stem, kind in kinds if kind in SUFFIXES}
    for path in paths:
        name, stem, kind = path.as_posix(), path.with_suffix(""), path.suffix.lower()
        if (root / path).is_symlink() and (root / path).is_dir():
            skipped.append((name, "a link to a folder, which is not followed: put the folder itself there"))
        elif kind in SUFFIXES:
            raw.append((name, name, kinds.get((stem, ".txt")), kinds.get((stem, ".json"))))
        elif kind == ".txt" and stem not in pictured and name != "excluded.txt":
            skipped.append((name, f"no picture of this name; known are {' '.join(sorted(SUFFIXES))}"))
        elif kind == ".tar":
            inside, lost = _shard(name, root / path)
            raw, skipped = raw + inside, skipped + lost
        elif name.endswith((".tar.gz", ".tgz")):
            skipped.append((name, "compressed: gunzip it, pictures are read where they lie in the tar"))
    return raw, skipped


def _shard(name, path):
    """Like `_files`, for a tar in the WebDataset layout, where the files with one stem are a sample.

    It is read once from front to back, passing over the pictures; those are read later, in any order."""
    samples, skipped, length = {}, [], path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for file in tar:
                folder, _, base = file.name.rpartition("/")
                stem, _, kind = base.partition(".")             # WebDataset's rule: up to the first dot
                if file.isreg() and not file.issparse() and stem and kind:
                    kind, part = f".{kind.lower()}", Member(path, file.offset_data, file.size)
                    if kind in (".txt", ".json") and file.size <= MAX_CAPTION_FILE:
                        part = tar.extractfile(file).read()
                    samples.setdefault((folder, stem), []).append((kind, file.name, part))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):             # tarfile takes a damaged header for the end
                skipped.append((name, f"cut short or damaged at byte {tar.offset:,}: write the shard again"))
    except (tarfile.TarError, OSError) as error:
        skipped.append((name, f"not a whole tar ({error}): write the shard again"))
    raw = []
    for (folder, stem), files in samples.items():
        by_kind = {kind: part for kind, _, part in files}
        pictures = [(file, member) for kind, file, member in files if kind in SUFFIXES]
        if len(pictures) != 1 or len(by_kind) < len(files):
            skipped.append((f"{name}/{folder}{'/' * bool(folder)}{stem}",
                            f"{len(pictures)} pictures in {len(files)} files of one name: a sample has one"))
        elif pictures[0][1].offset + pictures[0][1].size > length:
            skipped.append((f"{name}/{pictures[0][0]}", "the shard ends within it: write the shard again"))
        else:
            (file, member), = pictures
            raw.append((f"{name}/{file}", member, by_kind.get(".txt"), by_kind.get(".json")))
    return raw, skipped


def _entry(root, name, picture, text, row):
    """One Entry from a sample's files, or from a line of captions.jsonl (then picture is None)."""
    line = _content(root, row)
    about = {} if line is None else json.loads(line.decode("utf-8-sig"))
    about = dict(about) if isinstance(about, dict) else {}
    captions = about.pop("captions", None)
    if picture is None:
        name = picture = about.pop("file", None)
    elif captions is None:                          # a line of the .txt is a caption; img2dataset: "caption"
        words = _content(root, text)
        words = about.get("caption") if words is None else words.decode("utf-8-sig")
        if not isinstance(words, str):
            raise ValueError("no captions: neither a .txt nor a .json that has them")
        captions = [line for line in words.splitlines() if line.strip()] or [""]
    if not isinstance(name, str) or not isinstance(captions, list) or not captions:
        raise ValueError('needs "file", a string, and "captions", a list of strings')
    place = picture if isinstance(picture, Member) else _inside(root, picture)
    numbers = {sys.intern(k): x for k, v in about.items() if (x := _number(v)) is not None}
    return Entry(name, place, tuple(_caption(text) for text in captions), numbers)


def _number(value):
    """A score as a float, or None: all else that a tool writes beside captions would take 2 kB a picture."""
    try:
        value = float("nan" if isinstance(value, bool) else value)          # some tools write "6.0" in quotes
    except (TypeError, ValueError, OverflowError):
        return None
    return value if value == value else None


def _content(root, file):
    """The bytes of a caption file: a Path in the folder, or what _shard found; None if there is none."""
    if file is None or isinstance(file, bytes):
        return file
    path = _inside(root, file) if isinstance(file, Path) else None
    if path is None or path.stat().st_size > MAX_CAPTION_FILE:      # a shard's small ones are bytes already
        raise ValueError(f"a caption file of more than {MAX_CAPTION_FILE:,} bytes")
    return path.read_bytes()


def _inside(root, name):
    """root (resolved) / name, links followed; no place outside: a listing could name private files."""
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root):
        raise ValueError("the path leads out of the folder")
    return path


def _caption(text):
    """One caption with its white space tidied, or ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("empty caption")
    if len(text) > MAX_CAPTION:
        raise ValueError(f"caption of {len(text):,} characters, over {MAX_CAPTION:,}")
    text = " ".join(text.split())
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):      # NUL and its like; surrogate halves
        raise ValueError("caption with control characters")
    return text


def _emoji():
    """The entries of the bundled Twemoji (CC-BY 4.0, see assets/LICENSE-twemoji.md)."""
    with Image.open(ASSETS / "twemoji.png") as opened:
        sheet = opened.convert("RGB")
    entries = []
    for i, line in enumerate((ASSETS / "twemoji.jsonl").read_text(encoding="utf-8").splitlines()):
        row, x, y = json.loads(line), i % COLUMNS * TILE, i // COLUMNS * TILE
        tile = sheet.crop((x, y, x + TILE, y + TILE))
        entries.append(Entry(row["file"], tile, tuple(row["captions"]), {}))
    return entries


def pack_sheet(folder, out):
    """Pack a folder's captioned twemoji_*.png into out/twemoji.png and out/twemoji.jsonl, as in assets/.

    DIFFERS: one palette of 256 colours makes the sheet 0.8 MB, not 2.8. The Twemoji's values then differ from
    the originals' by 2.6 of 255 (root mean square), 78 at most; 62 % of the pixels do not differ."""
    entries = [entry for entry in _listing(Path(folder))[0] if entry.name.startswith("twemoji_")]
    sheet = Image.new("RGB", (COLUMNS * TILE, -(-len(entries) // COLUMNS) * TILE), "white")
    for i, entry in enumerate(entries):
        tile = Image.fromarray(read_picture(entry.picture, TILE))
        sheet.paste(tile, (i % COLUMNS * TILE, i // COLUMNS * TILE))
    sheet = sheet.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    sheet.save(Path(out) / "twemoji.png", optimize=True)
    lines = [json.dumps({"file": e.name, "captions": e.captions}, ensure_ascii=False) for e in entries]
    (Path(out) / "twemoji.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def contact_sheet(rows, side=128):
    """{heading: [(picture (S, S, 3) uint8, texts), ...]} -> one PIL image, the texts below the pictures."""
    font, width = ImageFont.load_default(13), side + 44
    lines = {id(p): [(line, ink) for text, ink in zip(texts, ("black", (110, 110, 110)))
                     for line in textwrap.wrap(text, 25)[:7]] for row in rows.values() for p, texts in row}
    height = side + 45 + 15 * max(map(len, lines.values()), default=0)
    sheet = Image.new("RGB", (max(map(len, rows.values())) * width + 12, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (heading, row) in enumerate(rows.items()):
        pen.text((12, i * height + 8), heading, (35, 85, 220), ImageFont.load_default(15))
        for j, (picture, _) in enumerate(row):
            x, y = j * width + 12, i * height + 30
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
            for k, (line, ink) in enumerate(lines[id(picture)]):
                pen.text((x, y + side + 3 + 15 * k), line, ink, font)
    return sheet


def demo():
    """The emoji that ship with the project; 20 as files, one cut short, and the same in a tar shard."""
    from tempfile import TemporaryDirectory

    emoji = load_pictures("emoji")
    assert emoji.images.shape == (1026, 3, TILE, TILE) and not emoji.skipped
    print(f"emoji: {tuple(emoji.images.shape)}, the first is {emoji.captions[0][1]!r}")
    with TemporaryDirectory() as work:
        folder, shards = Path(work, "files"), Path(work, "shards")
        folder.mkdir(), shards.mkdir()
        for i, entry in enumerate(list_pictures("emoji", count=20).entries[:20]):
            entry.picture.save(folder / f"{i:02}.png")
            (folder / f"{i:02}.txt").write_text("\n".join(entry.captions), encoding="utf-8")
        cut = folder / "07.png"
        cut.write_bytes(cut.read_bytes()[:500])
        with tarfile.open(shards / "a.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        one, other = load_pictures(folder), load_pictures(shards)
    assert torch.equal(one.images, other.images) and one.captions == other.captions
    assert len(one.captions) == 19 and [len(p.skipped) for p in (one, other)] == [1, 1]
    print(f"a folder of 20, and the same as a tar shard: {len(one.captions)} pictures, "
          f"skipped {one.skipped[0][0]} ({one.skipped[0][1]})")


# Exercises. (1) In the demo, change one byte in the middle of 07.png instead of cutting it, then save the
# pictures as .jpg and do the same: which of the two is skipped, and what becomes of the other? (2) Give every
# picture three captions: how often will training see the first one (`pick_captions`)?

if __name__ == "__main__":
    if len(sys.argv) > 1:
        from curate import main         # only here: it needs this module

        main(sys.argv[1:])
    else:
        demo()
