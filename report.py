"""What does `python evaluate.py --run RUN` measure? This file draws, measures and writes the report.

    --run, --model --draw, once--> pictures on disk --+--> measures --> scores.json, scores.txt, scores.png
    --images --------------------> pictures on disk --+

    measure  of what                         beside it
    drawn    does the picture show what the  true drawings of the same prompts, and these through the VAE;
             prompt said (evaluate.py)       the same pictures judged by any prompts: chance
    loss     flow matching, at seven t       nothing: lower is better, on the same pictures and noise only
    clip     picture with caption            true drawings; captions shuffled; chance
    fid      FID and KID to training         fresh drawings, true drawings of the same prompts
    steps    5, 10, 20 and 50 of them        each other: the paper's table 6
    memory   the nearest training picture    how near copies and fresh drawings come, through the VAE

Pictures carry their settings and are kept, under a name made of weights, steps, guidance and seed: what is
there is not drawn again, so that a stopped command goes on, and a second measure costs no drawing.

Pitfalls
- "fresh drawings" are held-out pictures. Other data have none: give --data, or the training pictures are used
  and the report says so.
- What cannot be scored (a damaged file, a prompt of another world) is left out, counted and named; the shares
  are of what remains.

Run: python report.py     scores a folder of true drawings, one damaged: all right but that one
"""
import argparse
import hashlib
import json
import math
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import drawn_world as world
from evaluate import SIDE, find_objects, foreign, illustrate, requests, tally, variants
from metrics import (COCO, LEVELS, Job, Statistics, any_order, bar, clip_score, draw_folder, error_of, fid,
                     fingerprint, fit, geneval_prompts, kid, load_towers, name_of, nearest, open_picture,
                     picture_path, read_folder, read_prompts, reference, retrieval, seed_of, validation_loss)
from offload import is_out_of_memory
from pipeline import Pipeline, pick_device, settings_of
from run_folder import home_of_encoders, is_run, read_json, read_run
from tensor_files import check_writable, write_atomically, write_json
from text_encoders import ENCODERS
from weights import locate

# --- What is measured -------------------------------------------------------------------------------------

STEPS = (5, 10, 20, 50)             # of the paper's table 6
HELDOUT = 512                       # pictures for the validation loss
REFERENCE = 4096                    # training pictures that FID and KID compare with
COMPARED = 128                      # pixels a side, at most, of pictures that are compared with training's
NEAREST = 256                       # of a kind, whose nearest training picture is looked for


@dataclass
class Subject:
    """What is being scored: pictures, and where they come from."""
    out: Path                       # the report's folder
    jobs: list[Job]
    paths: list[Path]
    skipped: list[tuple[str, str]]
    config: dict                    # of a run: its config.json; else empty
    pipe: object = None             # None: pictures that others drew
    towers: object = None           # metrics.Towers, where there are any
    draw: object = None             # (jobs, steps) -> paths, where there is a pipe
    source: str | None = None       # --data

    def drawn_world(self):
        """Indices of the pictures that can be judged; the others are counted as skipped, with the reason."""
        why = [foreign(job.metadata) for job in self.jobs]
        known = [i for i, reason in enumerate(why) if reason is None]
        if not known:
            prompt = self.jobs[0].metadata["prompt"]
            raise ValueError(f"none of the prompts is of the drawn world ({prompt!r}: {why[0]}): score them "
                             "with GenEval's detector, or measure clip, fid or memory")
        return known

    def training(self, count=None, most=10_000):
        """Up to `count` training pictures, at most `most` pixels a side. -> data.Pictures, what they are"""
        c, size = self.config, min(self.size, most)
        if not c:
            return data.load_pictures(self.source, size, count=count), self.source
        count = min(count or c["pictures"], c["pictures"])
        return data.load_pictures(c["data"], size, count=count, seed=c["seed"]), "training pictures"

    def heldout(self, count, most=10_000):
        """Pictures that training has not seen: fresh drawings, or --data. (None, "") if there are none."""
        size = min(self.size, most)
        if self.source and self.config:
            return data.load_pictures(self.source, size, count=count), self.source
        if self.config.get("data") == "drawn":
            seed = self.config["seed"] + 1
            return data.load_pictures("drawn", size, count=count, seed=seed), "fresh drawings"
        return None, ""

    @property
    def size(self):
        """The side at which pictures are compared."""
        if "size" in self.config:
            return self.config["size"]
        return self.pipe.size[0] if self.pipe else common_side(self.paths)


def common_side(paths):
    """The shorter side that most of the pictures have."""
    def side(path):
        with data.opened(path) as image:
            return min(image.size)
    return Counter(map(side, paths)).most_common(1)[0][0]


def number(x, digits=1, scale=100):
    return "" if x is None else f"{scale * x:.{digits}f}"


def row(name, *cells):
    return f"{name:17}" + "".join(f"{cell:>12}" for cell in cells)


def images_of(truth):
    """(n, S, S, 3) as tensor (n, 3, S, S)."""
    return torch.from_numpy(np.stack(truth)).permute(0, 3, 1, 2).contiguous()


def true_drawings(jobs, size):
    """One for each job, not the same for two pictures of a prompt."""
    return [illustrate(job.metadata, np.random.default_rng((1, job.number, job.k)), size) for job in jobs]


@torch.no_grad()
def through_vae(pipe, images):
    """Pictures encoded and decoded by the pipeline's VAE: the best that its latents allow."""
    out = []
    with pipe.places.at_work(pipe.vae):
        for start in range(0, len(images), 16):
            x = images_of(images[start:start + 16]).to(pipe.places.device) / 127.5 - 1          # (B, 3, H, W)
            x = pipe.vae.decode(pipe.vae.encode(x).mean).clamp(-1, 1)
            out += [*((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
    return out


def find_all(images, what):
    with bar(len(images), what) as progress:
        found = []
        for image in images:
            found.append(find_objects(image))
            progress.update()
    return found


def measure_drawn(s):
    """The drawn world's six tasks, beside what true drawings of the same prompts get."""
    jobs, images = [], []
    for i in s.drawn_world():
        image = open_picture(s.paths[i])
        if image.shape[0] == image.shape[1]:
            jobs.append(s.jobs[i])
            images.append(image)
        else:
            s.skipped.append((name_of(s.paths[i]), "not square"))
    if not jobs:
        raise ValueError("none of the pictures is square, as the drawn world's are: crop them")
    result = tally(jobs, find_all(images, "scoring"))
    truth = true_drawings(jobs, s.pipe.size[0] if s.pipe else SIDE)
    truths = {"drawn": truth} | ({"after VAE": through_vae(s.pipe, truth)} if s.pipe else {})
    ceilings = {name: tally(jobs, find_all(pictures, name)) for name, pictures in truths.items()}
    lines = [row("per cent", "score", "+-", "strict", "any of", "chance", *ceilings)]
    for task in result["score"]:
        keys = ("score", "error", "strict", "any", "chance")
        lines.append(row(task, *(number(result[key][task]) for key in keys),
                         *(number(c["score"][task]) for c in ceilings.values())))
    for key in ("seen", "unseen", "shape", "colour"):
        beside = (number(c[key]) for c in ceilings.values())
        lines.append(row(key, number(result[key]), "", "", "", "", *beside))
    if missing := [task for task in world.TASKS if task not in result["score"]]:
        lines.append(f"overall is the mean of {6 - len(missing)} of the six tasks: no {', '.join(missing)}")
    extra = ("seen", "unseen", "shape", "colour")
    brief = {name: c["score"] | {key: c[key] for key in extra} for name, c in ceilings.items()}
    panels = [sheet(images, result["records"]), matrices(result["confusion"])]
    return {"ceilings": brief} | result, lines, panels


def measure_loss(s):
    """The paper's validation loss, on pictures that training has not seen if there are any."""
    pictures, of = s.heldout(HELDOUT)
    if pictures is None:
        pictures, of = s.training(HELDOUT)
    captions = [texts[i % len(texts)] for i, texts in enumerate(pictures.captions)]
    losses = validation_loss(s.pipe, pictures.images, captions)                 # (levels, n)
    by_picture = losses.mean(0)
    result = {"by_t": {str(t): x for t, x in zip(LEVELS, losses.mean(1).tolist())},
              "mean": by_picture.mean().item(), "pictures": len(captions), "of": of,
              "error": by_picture.std().item() / math.sqrt(len(captions)) if len(captions) > 1 else None}
    lines = [row("validation loss", *(f"t = {t}" for t in LEVELS), "mean", "+-"),
             row(f"{len(captions)} pictures", *(f"{x:.4f}" for x in result["by_t"].values()),
                 f"{result['mean']:.4f}", number(result["error"], 4, 1)), f"of {of}"]
    return result, lines, []


def rivals(metadata, prompts, rng, most=31):
    """Captions that differ from a prompt in one thing, up to `most`; for unknown prompts, other prompts."""
    if foreign(metadata) is None:
        options = [m["prompt"] for ms in variants(metadata).values() for m in ms]
    elif foreign(metadata, COCO) is None:
        options = [m["prompt"] for ms in variants(metadata, COCO).values() for m in ms]
    else:
        options = prompts
    options = sorted(set(options) - {metadata["prompt"]})
    return [options[i] for i in rng.permutation(len(options))[:most]]


def measure_clip(s):
    """CLIP score and R-precision; of true drawings too, since towers cannot score what they cannot see."""
    towers, prompts = s.towers, [job.metadata["prompt"] for job in s.jobs]
    candidates = [[m["prompt"], *rivals(m, prompts, np.random.default_rng((2, number)))]
                  for number, _, _, m in s.jobs]
    known = sorted({text for texts in candidates for text in texts})
    index, texts = {text: i for i, text in enumerate(known)}, towers.read(known)

    def scores(images, order):
        cosines = clip_score(images, texts[[index[prompts[i]] for i in order]])
        hits = [retrieval(image, texts[[index[t] for t in candidates[i]]]) for image, i in zip(images, order)]
        numbers = [s.jobs[i].number for i in order]
        return {"score": cosines.mean().item(), "error": error_of(cosines.tolist(), numbers),
                "precision": float(np.mean(hits)), "precision_error": error_of(hits, numbers)}

    order, images = list(range(len(prompts))), torch.cat(list(towers.look(s.paths)))
    rows = {"pictures": scores(images, order),
            "shuffled": scores(images, np.random.default_rng(3).permutation(len(order)).tolist())}
    true = [i for i in order if foreign(s.jobs[i].metadata) is None]
    if true:
        drawings = true_drawings([s.jobs[i] for i in true], SIDE)
        rows["true drawings"] = scores(torch.cat(list(towers.look(drawings))), true)
    chance = float(np.mean([1 / len(texts) for texts in candidates]))
    lines = [row("CLIP", "score", "+-", "R-precision", "+-")]
    lines += [row(name, number(r["score"], 4, 1), number(r["error"], 4, 1), number(r["precision"]) + " %",
                  number(r["precision_error"])) for name, r in rows.items()]
    few, many = min(map(len, candidates)), max(map(len, candidates))
    lines += [f"by {towers.name}; among {few} to {many} captions, where chance is {100 * chance:.1f} %"]
    return {"towers": towers.name, "chance": chance} | rows, lines, []


def measure_fid(s):
    """FID and KID to training pictures, on CLIP's features: of the pictures, and of as many true ones."""
    towers, side = s.towers, s.towers.image.config.image_size       # no larger than what the towers see
    training, of = s.training(REFERENCE, most=side)
    stats = reference(towers, training.images, s.out / "pictures")
    sets = {"pictures": s.paths}
    heldout, what = s.heldout(len(s.paths), most=side)
    if heldout is not None:
        sets[what] = heldout.images.permute(0, 2, 3, 1).numpy()
    if all(foreign(job.metadata) is None for job in s.jobs):
        sets["true drawings"] = true_drawings(s.jobs, SIDE)
    rows = {}
    for name, pictures in sets.items():
        taken, order = Statistics(), any_order(len(pictures))
        for features in towers.look([pictures[i] for i in order]):
            taken.update(features)
        numbers = None if name == what else [s.jobs[i].number for i in order[:len(taken.kept)]]
        value, error = kid(taken.kept, stats.kept, numbers)
        rows[name] = {"n": taken.n, "fid": fid(taken, stats), "kid": value, "kid_error": error}
    features = len(stats.mean)
    lines = [row("features of CLIP", "pictures", "FID", "KID", "+-")]
    lines += [row(name, r["n"], f"{r['fid']:.3f}", f"{r['kid']:.4f}", number(r["kid_error"], 4, 1))
              for name, r in rows.items()]
    lines += [f"to {stats.n} pictures ({of}); by {towers.name}:",
              "not comparable with figures on Inception features, nor with other towers'"]
    if len(s.paths) <= features:
        lines += [f"{len(s.paths)} pictures for {features} features: FID is far too high, read KID"]
    return {"towers": towers.name, "reference": of, "reference_n": stats.n} | rows, lines, []


def measure_steps(s):
    """The paper's table 6: what fewer steps cost, and how long and straight the path is."""
    pipe, towers = s.pipe, s.towers
    jobs = [job for job in s.jobs if job.k == 0]
    texts, judged = towers.read([job.metadata["prompt"] for job in jobs]), all(
        foreign(job.metadata) is None for job in jobs) and pipe.size[0] == pipe.size[1]
    cosines, result = {}, {}
    for steps in STEPS:
        paths = s.draw(jobs, steps)
        cosines[steps] = clip_score(torch.cat(list(towers.look(paths))), texts)
        told = [settings_of(path) for path in paths]
        result[str(steps)] = {
            "clip": cosines[steps].mean().item(), "path": float(np.mean([t["path"] for t in told])),
            "straight": float(np.mean([t["straight"] for t in told])),
            "score": tally(jobs, find_all([open_picture(p) for p in paths], "scoring"))["score"]["overall"]
            if judged else None}
    best = cosines[STEPS[-1]]
    lines = [row("steps", "CLIP", "lost, %", "+-", "score, %", "path", "straight")]
    for steps in STEPS:
        lost, r = (best - cosines[steps]) / best.mean(), result[str(steps)]
        error = (lost.std() / len(lost) ** 0.5).item() if len(jobs) > 1 else None
        r |= {"lost": lost.mean().item(), "error": error}
        lines.append(row(str(steps), f"{r['clip']:.4f}", number(r["lost"], 2), number(r["error"], 2),
                         number(r["score"]), f"{r['path']:.2f}", f"{r['straight']:.2f}"))
    lines += [f"{len(jobs)} pictures from the same noise; lost: of CLIP at 50 steps; path: sum |v dt|"]
    return {"pictures": len(jobs), "towers": towers.name} | result, lines, []


def measure_memory(s):
    """Copied from memory? Each picture's nearest training picture, beside what copies and new pictures get.

    What a model copies has been through its VAE, and so have these: training pictures, nine tenths of which
    set the distance that counts as a copy, and pictures that training has not seen, which shows how many are
    that near by chance. Of pictures by others only an exact copy, a distance below 2, can be told."""
    training, of = s.training(most=COMPARED)
    order = any_order(len(s.jobs))[:NEAREST]
    size, heldout = training.images.shape[-1], s.heldout(NEAREST, most=COMPARED)
    own = f"{len(order)} pictures"
    sets = {own: images_of([fit(s.paths[i], size) for i in order])}
    if s.pipe:
        sets["true copies"] = training.images[any_order(len(training.images))[:NEAREST]]
    if heldout[0] is not None:
        sets[heldout[1]] = heldout[0].images
    for name in list(sets)[1:] if s.pipe else ():
        sets[name] = images_of(through_vae(s.pipe, sets[name].permute(0, 2, 3, 1).numpy()))
    found = {name: nearest(images, training.images) for name, images in sets.items()}
    limit = found["true copies"][1].quantile(0.9, interpolation="higher").item() if s.pipe else 2.0
    rows = {name: {"median": far.median().item(), "copies": (far <= limit).double().mean().item()}
            for name, (_, far) in found.items()}
    lines = [row("nearest", "median", "copies, %")]
    lines += [row(name, f"{r['median']:.1f}", number(r["copies"])) for name, r in rows.items()]
    lines += [f"root mean square difference, of 255, to {len(training.images)} {of}",
              f"copies: {limit:.1f} or less"
              + ", as nine in ten true copies have; all but the first row through the VAE" * bool(s.pipe)]
    index, far = found[own]
    pairs = [(sets[own][i], training.images[index[i]], s.jobs[order[i]].metadata["prompt"], far[i].item())
             for i in far.argsort()[:12].tolist()]
    result = {"pictures": len(order), "of": of, "training": len(training.images), "limit": limit,
              **rows.pop(own), "beside": rows}
    return result, lines, [side_by_side(pairs)]


# --- The page ---------------------------------------------------------------------------------------------

def sheet(images, records, columns=10, side=96):
    """Pictures over their prompts, a row for each task, framed green if right, else red. -> PIL image"""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    width, height, font = side + 32, side + 56, ImageFont.load_default(11)
    page = Image.new("RGB", (columns * width + 12, len(tasks) * height + 12), "white")
    pen = ImageDraw.Draw(page)
    for i, task in enumerate(tasks):
        row = [(image, record) for image, record in zip(images, records) if record["task"] == task]
        row = row[::max(1, len(row) // columns)]    # different prompts, not the first ones' repetitions
        for j, (image, record) in enumerate(row[:columns]):
            x, y, right = j * width + 16, i * height + 12, "green" if record["correct"] else "red"
            pen.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), world.COLOURS[right])
            page.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (x, y))
            pen.text((x - 4, y + side + 6), textwrap.fill(record["prompt"], 19), "black", font)
    return page


def matrices(confusion, cell=24):
    """Confusion matrices in a row: what was asked for, downwards, and what was seen, across. -> PIL image"""
    orders = {"shape": (world.SHAPES, ("unknown", "none")), "colour": (tuple(world.COLOURS), ("none",)),
              "count": (("2", "3", "4"), ("0", "1", "5", "more")),
              "relation": (tuple(world.RELATIONS), ("none",))}
    font, parts = ImageFont.load_default(11), []
    for kind, (asked, others) in orders.items():
        if not confusion[kind]:
            continue
        seen = sorted(asked + others) if kind == "count" else asked + others
        part = Image.new("RGB", (70 + cell * len(seen) + 24, 96 + cell * len(asked)), "white")
        pen = ImageDraw.Draw(part)
        pen.text((8, 4), f"{kind}: asked for, seen", "black", ImageFont.load_default(13))
        for j, name in enumerate(seen):
            label = Image.new("RGB", (60, 14), "white")
            ImageDraw.Draw(label).text((0, 0), name, "black", font)
            part.paste(label.rotate(90, expand=True), (70 + j * cell + 5, 26))
        for i, name in enumerate(asked):
            counts, y = confusion[kind].get(name, {}), 90 + i * cell
            pen.text((8, y + 5), name, "black", font)
            for j, other in enumerate(seen):
                n, x = counts.get(other, 0), 70 + j * cell
                shade = n / max(1, sum(counts.values()))
                ink = int(255 - 175 * shade)
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), (ink, ink, 255), (205, 205, 205))
                if n:
                    pen.text((x + 3, y + 5), str(n), "black", font)
        parts.append(part)
    height = max((p.height for p in parts), default=1)
    page = Image.new("RGB", (sum(p.width for p in parts) + 1, height), "white")
    for i, part in enumerate(parts):
        page.paste(part, (sum(p.width for p in parts[:i]), 0))
    return page


def side_by_side(pairs, side=96, columns=4):
    """Pictures, left, and their nearest training pictures: [(3, S, S), (3, S, S), prompt, distance], ..."""
    width, height, font = 2 * side + 36, side + 48, ImageFont.load_default(11)
    page = Image.new("RGB", (columns * width, -(-len(pairs) // columns) * height + 24), "white")
    pen = ImageDraw.Draw(page)
    pen.text((16, 4), "drawn | nearest training picture", "black", ImageFont.load_default(13))
    for i, (drawn, trained, prompt, far) in enumerate(pairs):
        x, y = i % columns * width + 16, i // columns * height + 26
        for k, picture in enumerate((drawn, trained)):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
            page.paste(tile.resize((side, side), Image.Resampling.BICUBIC), (x + k * (side + 4), y))
        pen.text((x, y + side + 3), textwrap.fill(f"{far:.1f}: {prompt}", 36), "black", font)
    return page


def stack(panels):
    page = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), "white")
    for i, panel in enumerate(panels):
        page.paste(panel, (0, sum(p.height for p in panels[:i])))
    return page


# --- The command ------------------------------------------------------------------------------------------

MEASURES = {"drawn": measure_drawn, "loss": measure_loss, "clip": measure_clip, "fid": measure_fid,
            "steps": measure_steps, "memory": measure_memory}


def weights_of(path, pipe):
    """A fingerprint of what draws: the files of the five parts, and the tokenizers' vocabularies."""
    home = home_of_encoders(path)
    files = []
    for part in ("mmdit", "vae", *ENCODERS):
        at = Path(path) if part == "mmdit" else home
        files += [at / f"{part}.safetensors"] if is_run(at) else sorted(
            {file for file, *_ in locate(at, part)[0].index.values()})
    words = [tokenizer.tok.to_str() for tokenizer in pipe.encoders.tokenizers]
    return hashlib.sha256("".join([*map(fingerprint, files), *words]).encode()).hexdigest()[:12]


def jobs_of(rows, n, per_prompt, seed):
    """Metadata in their order, the first n of each task (None: all). -> list of Job"""
    jobs, counts = [], {}
    for i, m in enumerate(rows):
        tag = str(m.get("tag"))
        counts[tag] = counts.get(tag, 0) + 1
        if n is None or counts[tag] <= n:
            jobs += [Job(i, k, seed_of(seed, i, k), m) for k in range(per_prompt)]
    return jobs


def prepare(args):
    """Draw what is to be scored, or read it. -> Subject"""
    if args.images:
        out = Path(args.out or args.images)
        jobs, paths, skipped = read_folder(args.images)
        check_writable(out)
        return Subject(out, jobs, paths, skipped, {}, source=args.data)
    path = args.run or args.model
    out = Path(args.out or args.run or Path("samples", f"geneval-{Path(path).stem}"))
    if args.run and not is_run(path):
        raise ValueError(f"{path} is not a run of train.py, it lacks config.json: give one, or published "
                         "weights with --model")
    config = read_run(path) if args.run else {}
    if args.prompts:
        jobs = jobs_of(read_prompts(args.prompts), args.n, args.pictures, args.seed)
    elif args.model:
        jobs = jobs_of(geneval_prompts(), args.n, args.pictures, args.seed)
    elif config.get("data") == "drawn":
        jobs = requests(args.n or 25, per_prompt=args.pictures, seed=args.seed)
    else:
        some = data.load_pictures(config["data"], config["size"], count=args.n or 100, seed=args.seed)
        rows = [{"tag": "caption", "include": [], "prompt": texts[0]} for texts in some.captions]
        jobs = jobs_of(rows, None, args.pictures, args.seed)
    pipe = Pipeline.from_pretrained(path, device=args.device)
    args.steps = args.steps or pipe.steps
    args.guidance = pipe.guidance if args.guidance is None else args.guidance
    asked = json.dumps(args.prompts and read_prompts(args.prompts))
    about = {"weights": weights_of(path, pipe), "guidance": args.guidance, "seed": args.seed,
             "shift": pipe.shift, "schedule": pipe.kind, "size": list(pipe.size),
             "prompts": hashlib.sha256(asked.encode()).hexdigest()[:12]}

    def draw(jobs, steps):
        folder, told = out, about | {"steps": steps}
        if args.run or steps != args.steps:
            digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
            folder = out / "pictures" / f"{steps}-steps-{digest}"
        settings = folder / "settings.json"
        try:
            before = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else None
        except (OSError, ValueError) as e:
            raise ValueError(f"{settings} cannot be read ({e}): delete {folder}, or choose another --out "
                             "(its pictures are drawn again)") from None
        if before not in (None, told):
            raise ValueError(f"{folder} holds pictures of other weights or settings (settings.json): "
                             "choose another --out")
        if before is None:
            write_json(settings, told)
        return draw_folder(pipe, jobs, folder, steps, args.guidance)

    check_writable(out)
    if args.measures == ["loss"]:                               # it is measured on true pictures: draw none
        return Subject(out, [], [], [], config, pipe, None, draw, args.data)
    return Subject(out, jobs, draw(jobs, args.steps), [], config, pipe, None, draw, args.data)


def measure(args):
    """Everything that the command line does, except for reporting errors."""
    device, towers = pick_device(args.device), None
    if {"clip", "fid", "steps"} & set(args.measures):
        towers = load_towers(args.clip or args.run, device)
    s = prepare(args)
    s.towers, names, lines = towers, args.measures, []
    of_this_world = any(foreign(job.metadata) is None for job in s.jobs)
    if not names and (args.images or of_this_world):
        names = ["drawn"]
    elif not names and (args.clip or args.run):
        s.towers, names = load_towers(args.clip or args.run, device), ["clip"]
    elif len(names) > 1 and "drawn" in names and not of_this_world:
        names, lines = [n for n in names if n != "drawn"], [
            "drawn is left out: no prompt is of the drawn world", ""]
    report, panels, failed = {"settings": vars(args)}, [], []
    for name in [name for name in MEASURES if name in names]:
        try:
            result, more, pictures = MEASURES[name](s)
        except ValueError as e:                                 # the work of the others must not be lost
            failed.append(f"{name} could not be measured: {e}")
            continue
        report |= result if name == "drawn" else {name: result}
        lines += [*more, ""]
        panels += pictures
    if not failed or len(failed) < len(names):
        finish(s, args, names, report, lines, panels)
    if failed:
        raise ValueError("; ".join(failed))


def finish(s, args, names, report, lines, panels):
    """The report: into its folder, and then onto the terminal."""
    if "drawn" in names:
        s.skipped += [(name_of(path), why) for job, path in zip(s.jobs, s.paths)
                      if (why := foreign(job.metadata))]
    report["skipped"] = s.skipped
    lines += [f"skipped {name}: {why}" for name, why in s.skipped[:10]]
    lines += [f"{len(s.skipped)} skipped in all, named in scores.json"] if s.skipped else []
    write_json(s.out / "scores.json", report)
    write_atomically(s.out / "scores.txt", lambda p: p.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    if not panels and s.paths:
        panels = [sheet([open_picture(p) for p in s.paths[:10]], [
            {"task": "", "prompt": job.metadata["prompt"], "correct": True} for job in s.jobs[:10]])]
    (s.out / "scores.png").unlink(missing_ok=True)              # of an earlier report
    if panels:
        write_atomically(s.out / "scores.png", partial(stack(panels).save, format="PNG"))
    print("\n".join(lines))
    scored = len(report["records"]) if "records" in report else len(s.paths)
    print(f"{scored} pictures; wrote scores.json, scores.txt{' and scores.png' * bool(panels)} into {s.out}")
    if args.model:
        print(f"for GenEval's own detector: python evaluation/evaluate_images.py {s.out}")


def parse(argv=None):
    p = argparse.ArgumentParser(
        prog="evaluate.py", allow_abbrev=False,
        description="score pictures against their prompts; without a flag, test the scorer")
    p.add_argument("--run", help="folder of a run: draws the drawn world's prompts, or its data's captions")
    p.add_argument("--model", help="published weights: draws GenEval's prompts")
    p.add_argument("--images", help="a folder of pictures in GenEval's layout, whoever drew them")
    p.add_argument("--measures",
                   help=f"all, or some of {','.join(MEASURES)} (default: drawn, if it suits the prompts)")
    p.add_argument("-n", type=int, help="prompts a task (default: 25; all of a file's or of GenEval's)")
    p.add_argument("--pictures", type=int, default=4, help="pictures of each prompt (default: 4)")
    p.add_argument("--steps", type=int, help="sampling steps (default: the model's; 20 for a run)")
    p.add_argument("--guidance", type=float, help="guidance scale (default: the model's; 3 for a run)")
    p.add_argument("--seed", type=int, default=0, help="seed of prompts and noise (default: 0)")
    p.add_argument("--prompts", help="a file of metadata, one JSON object a line, to use as prompts")
    p.add_argument("--clip", help="folder of a CLIP, or of a run, whose towers score (default: the run's)")
    p.add_argument("--data", help="true pictures: drawn, emoji or a folder; for a run, ones new to it")
    p.add_argument("--out", help="folder for the report (default: the run's or the pictures' own)")
    p.add_argument("--device", default="auto", help="auto | cuda | mps | cpu (default: auto)")
    p.error = refuse
    args = p.parse_args(argv)
    given = [name for name in ("run", "model", "images") if getattr(args, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} exclude each other: give one")
    if not given:
        raise ValueError("what is to be scored? give --run, --model or --images")
    if min(args.pictures, args.n or 1) < 1 or args.n == 0 or (args.steps is not None and args.steps < 1):
        raise ValueError("-n, --pictures and --steps must be at least 1")
    args.measures = args.measures.split(",") if args.measures else []       # none: what suits the prompts
    lacking = {name: flag for flag, names, there in (
        ("--clip FOLDER", ("clip", "fid", "steps"), args.clip or args.run),
        ("--data FOLDER", ("loss", "fid", "memory"), args.data or args.run),
        ("--run or --model", ("loss", "steps"), not args.images)) for name in names if not there}
    if "all" in args.measures:
        args.measures = [name for name in MEASURES if name not in lacking]
    for name in args.measures:  # now, not after an hour of drawing
        if name not in MEASURES:
            raise ValueError(f"no measure {name!r}: choose from all, {', '.join(MEASURES)}")
        if name in lacking:
            raise ValueError(f"the measure {name} needs {lacking[name]}: add it, or leave {name} out")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance {args.guidance} is not a number: give 1 for none")
    if args.data:
        data.list_pictures(args.data, SIDE, count=1)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: it must be 0 or more")
    return args


def refuse(message: str):
    raise ValueError(f"{message}: see python evaluate.py --help")


def main(argv=None):
    try:
        data.print_any_sign()
        measure(parse(argv))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what has been drawn")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"evaluate.py: not enough memory ({str(error).splitlines()[0]}): what is drawn stays; "
              "sample.py --dry-run says what a model takes", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


# --- Demo -------------------------------------------------------------------------------------------------

def demo():
    """In a folder of true drawings all are right; a damaged picture is left out and named."""
    from tempfile import TemporaryDirectory
    with TemporaryDirectory() as folder:
        for job in (jobs := requests(3, per_prompt=2)):
            path = picture_path(folder, job)
            write_json(path.parent.parent / "metadata.jsonl", job.metadata)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(illustrate(job.metadata, np.random.default_rng(job.seed))).save(path)
        path.write_bytes(path.read_bytes()[:100])
        main(["--images", folder])
        report = read_json(Path(folder, "scores.json"))
    assert report["score"]["overall"] == 1 and len(report["records"]) == len(jobs) - 1 == 35
    assert report["skipped"][0][0] == "50002/samples/00001.png"


# Exercises
# 1. Score a run at --guidance 1, 3 and 6. Which of drawn, clip and fid likes which?
# 2. Give --clip the folder of another run: by how much does a CLIP score depend on who scores?
# 3. Add a measure: the share of pictures with the right ground. It takes a function and a line in MEASURES.

if __name__ == "__main__":
    demo()
