"""Which pictures should not be trained on? Its own file: it runs once, before training.

The paper's preparation of its data (section 5.3.1), in this order, each step with a count and a sheet of what
it removed:

    unusable        what cannot be decoded or has no caption
    small, long     a side below --min-side; sides of more than --max-ratio to one
    scores          any number that comes with a picture: aesthetic>=5, nsfw<=0.1
    copy            thumbnails that hardly differ; the one with most pixels stays
    near copy       with --run: the same by the CLIP image tower that a training run leaves behind

Nothing changes until --apply, which names what was found in DIR/excluded.txt; loading (data.py) obeys that.

What to know
- Thumbnails find copies that were resized, recompressed or blurred, not those that were cropped. The CLIP of
  a run finds crops of 3 % along each side, most of the time; it does not find crops of 6 %.
- Line art, glyphs and logos on a plain ground look alike to thumbnails: of letters in black on a white ground
  of 512 pixels, "B" is taken for a copy of "A". Look at the sheet of copies before --apply.

DIFFERS: the paper finds duplicates with SSCD, a network made to detect copies, in clusters of its
  embeddings; here it is done by thumbnails, and the CLIP image tower that training leaves behind.

Run: python curate.py               a folder with faults is checked and cleaned, in seconds
     python data.py check DIR       a report on your own pictures; --help shows its bounds
"""
import argparse
import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import data
from prepare import bucket_shapes, nearest_bucket, place_of, upright_size
from run_folder import load_part, read_json
from tensor_files import check_writable, write_atomically, write_json

SAME_LOOK = 0.1             # thumbnails nearer than this are copies. 99 of 100 emoji are within 0.05 of
                            # themselves resized, 0.06 of their JPEG of quality 40; of all 1,026 only two
                            # pairs are within 0.1
SAME_CONTENT = 0.97, 0.35   # CLIP: cosine above the first, and thumbnails nearer than the second, for a small
                            # CLIP hardly sees where things are: alone it would call most scenes copies
CLUSTER = 4096              # pictures; up to this many, every pair is compared
ON_SHEET = 24               # pictures of each kind that the report shows


def look(picture, side: int | None = None):
    """(upright size, thumbnail as a vector, the middle as (side, side, 3) uint8 if a side is given).

    The vector, a perceptual hash in numbers, is 16 x 16 colours less their mean, over their deviation, and a
    fifth of the mean: it hardly notices brightness and contrast. (The usual hash, 63 signs of a cosine
    transform, is not stable here: in a twentieth of the Twemoji, flat and symmetric, JPEG flips 16 signs.)"""
    with data.opened(picture, whole=True) as image:     # as loading opens it
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
    """{copy: the one that is kept, the first by rank (n,)}. Copies are nearer than `limit` in all `spaces`,
    each (vectors (n, E), limit), and in one cluster of the first.

    Each copy is near the one that is kept: there are no chains whose ends have nothing in common."""
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


def passes(about: dict[str, float], rule: str):
    """Whether a picture's score satisfies `rule`, such as "aesthetic>=5"; None if it has no such score."""
    name, sign, bound = parse_rule(rule)
    value = about.get(name)
    return None if value is None else value >= bound if sign == ">=" else value <= bound


def parse_rule(rule: str) -> tuple[str, str, float]:
    match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=)\s*([-+.\deE]+)\s*", rule)
    try:
        return match[1], match[2], float(match[3])
    except (TypeError, ValueError):
        raise ValueError(f'--score {rule!r} is not a rule: write "aesthetic>=5" or "nsfw<=0.1"') from None


@torch.no_grad()
def examine(listing, run):
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
    """Find what in a folder or tar should not be trained on, as in the paper; report it, with contact sheets.

    In this order: unusable; shorter side below min_side (None: size); longer side more than max_ratio times
    the shorter; each rule of `scores`, where a picture without the score fails too; copies, of which the one
    with most pixels stays. run: a training run whose CLIP finds copies that thumbnails alone do not.
    -> {step: [(name, reason)]}. apply: add them all to the source's excluded.txt, which loading obeys."""
    if source in ("drawn", "emoji"):
        raise ValueError(f"{source!r} comes with the project: check a folder or a .tar of your own")
    bucket_shapes(size)                         # ValueError now for what would fail after hours of decoding
    if not max_ratio >= 1:
        raise ValueError(f"--max-ratio {max_ratio:g}: no ratio is below 1; inf keeps pictures of any shape")
    if min_side is not None and min_side < 1:
        raise ValueError(f"--min-side {min_side}: it must be 1 or more")
    scores = list(dict.fromkeys(scores))        # a rule's second turn would find nothing, and be its result
    asked = [parse_rule(rule)[0] for rule in scores]
    out = Path(out) if out else report_folder(source)
    check_writable(out)
    start, listing, bound = time.monotonic(), data.list_pictures(source, size), min_side or size
    names = sorted({name for e in listing.entries for name in e.about})
    for rule, name in zip(scores, asked):
        if name not in names:
            raise ValueError(f"no picture of {source} has the score of {rule!r}; there "
                             + (f"are {', '.join(names)}" if names else "are no scores at all"))
    out.mkdir(parents=True, exist_ok=True)
    entries, sizes, thumbs, embeds, lost = examine(listing, run)
    removed = {"unusable": [(name, why, None, None) for name, why in listing.skipped + lost]}
    left = list(range(len(entries)))

    def step(name, verdict):
        """Remove the pictures for which verdict(i) is (reason, the picture kept instead or None)."""
        found = {i: v for i in left if (v := verdict(i))}
        left[:] = [i for i in left if i not in found]
        removed[name] = [(entries[i].name, why, i, kept) for i, (why, kept) in found.items()]

    def twins(*spaces):
        pixels = np.array([-sizes[i][0] * sizes[i][1] for i in left])
        found = {left[a]: left[b] for a, b in copies(pixels, *((v[left], d) for v, d in spaces)).items()}
        return lambda i: i in found and (f"like {entries[found[i]].name}", found[i])

    step("small", lambda i: min(sizes[i]) < bound and ("{} x {}".format(*sizes[i]), None))
    step("long", lambda i: max(sizes[i]) > max_ratio * min(sizes[i]) and ("{} x {}".format(*sizes[i]), None))
    for rule, name in zip(scores, asked):
        step(rule, lambda i: not passes(entries[i].about, rule)
             and (f"{entries[i].about[name]:g}" if name in entries[i].about else "no such score", None))
    if left:
        step("copy", twins((thumbs, SAME_LOOK)))
    if left and run:
        cosine, look_alike = SAME_CONTENT
        step("near copy (CLIP)", twins((embeds, (2 - 2 * cosine) ** 0.5), (thumbs, look_alike)))
    report(source, listing, entries, sizes, left, removed, size, out, say)
    result = {name: [(n, why) for n, why, _, _ in items] for name, items in removed.items()}
    write_json(out / "report.json", {"source": str(source), "kept": len(left), "removed": result})
    if apply:
        exclude(Path(source), [n for items in result.values() for n, _ in items])
    say(f"{time.monotonic() - start:.0f} s; every name and reason is in {out / 'report.json'}; "
        + ("excluded.txt leaves them out from now on" if apply else "--apply leaves them out of training"))
    return result


def report_folder(source) -> Path:
    """runs/check-NAME. ValueError if it holds the report on another source of that name."""
    folder = Path("runs") / f"check-{Path(source).resolve().name}"
    if (folder / "report.json").is_file():
        other = read_json(folder / "report.json").get("source", source)
        if place_of(str(other)) != place_of(str(source)):
            raise ValueError(f"{folder} holds the report on {other}: choose another folder with --out")
    return folder


def exclude(source: Path, names) -> None:
    """Add to the source's excluded.txt, except bad lines of captions.jsonl: they are skipped anyway."""
    path = (source if source.is_dir() else source.parent) / "excluded.txt"
    new = [n for n in names if not n.startswith("captions.jsonl:")]
    text = "\n".join(n for n in dict.fromkeys(data.excluded_names(source) + new) if n) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def report(source, listing, entries, sizes, left, removed, size, out, say) -> None:
    """Print the counts, and save a contact sheet of each step that removed something."""
    total = len(listing.entries) + len(listing.skipped)
    say(f"{source}: {total:,} entries" + f" and {listing.excluded:,} excluded" * bool(listing.excluded))
    if listing.unnamed:
        say(f"  besides, {listing.unnamed:,} pictures or shards for which captions.jsonl has no usable line, "
            "which loading passes over")
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
                                     description="which of your pictures should not be trained on?")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("dir", metavar="DIR", help="a folder of captioned pictures or shards, or one .tar")
    parser.add_argument("--size", type=int, default=64, help="side of the training pictures (default: 64)")
    parser.add_argument("--min-side", type=int, help="shorter sides below this are small (default: --size)")
    parser.add_argument("--max-ratio", type=float, default=3.0,
                        help="longer sides above this many times the shorter are long (default: 3)")
    parser.add_argument("--score", action="append", default=[], metavar="RULE",
                        help='keep what satisfies this: "aesthetic>=5", "nsfw<=0.1"; may be repeated')
    parser.add_argument("--run", help="folder of a training run, whose CLIP then also finds copies")
    parser.add_argument("--out", help="folder of the report (default: runs/check-DIR)")
    parser.add_argument("--apply", action="store_true", help="leave these pictures out of training for good")
    parser.error = lambda message: parser.exit(
        2, f"data.py check: {message}: see python data.py check --help\n")
    data.print_any_sign()
    args = parser.parse_args(argv)
    try:
        check(args.dir, size=args.size, min_side=args.min_side, max_ratio=args.max_ratio, scores=args.score,
              run=args.run, out=args.out, apply=args.apply)
    except (ValueError, OSError) as error:
        print(f"data.py check: {error}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """A folder with faults of four kinds: all are found, and after --apply none is found any more."""
    from tempfile import TemporaryDirectory

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
        found = check(folder, min_side=48, out=Path(work, "report"), apply=True)
        assert {step: len(items) for step, items in found.items()} == {
            "unusable": 1, "small": 5, "long": 5, "copy": 5}
        again = check(folder, min_side=48, out=Path(work, "report"), say=lambda line: None)
        assert not any(again.values())
        print(f"checked again: {len(data.list_pictures(folder).entries)} pictures, nothing to remove")


# Exercise. Set SAME_LOOK to 0.3 and check the emoji, unpacked to a folder: which of the "copies" would you
# have kept?

if __name__ == "__main__":
    demo()
