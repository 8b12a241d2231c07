"""How good are pictures of anything? FID, KID, CLIP score, validation loss and copies need no drawn world.
They are here, with the folders of pictures that they read; what does need it is in evaluate.py.

    pictures --image tower--+                          the same two towers for the first three:
                            +--> cosine                CLIP score: of a picture and its caption
    captions --text tower---+      > rivals'?          R-precision: the caption wins among others much like it
    pictures --image tower--> mean, covariance         FID: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)
                              and some features        KID: squared distance of the means of (x.y / D + 1)^3
    pictures --VAE--> latents + noise at t --> model   validation loss, at t = 1/8 ... 7/8
    noise --model, 50 steps--> latents                 path length, sum |v dt|, beside the straight line
    pictures, training pictures                        the nearest one, root mean square of 255

Pictures are drawn once, into the folders that GenEval's own scorer reads, and measured as often as you like:

    00000/metadata.jsonl           what was asked for: tag, include, exclude, prompt
    00000/samples/00000.png ...    four pictures of it, each with its settings, seed and path length inside

Features are made sqrt(D) long, so that x.y / D is the cosine. B pictures, D features, t as in flow.py.

Pitfalls
- None of this is comparable with published figures on Inception features. A run's own towers are not even
  comparable between runs: give both `--clip` with the same towers.
- A tower that cannot tell true drawings apart says nothing about drawn ones: read a score beside what true
  pictures get, R-precision beside chance. Chance is what a blind tower gets; one that sees gives shuffled
  captions less, as some rival always fits the picture better.
- The paper's FID is on CLIP features too, without saying which; here, the projected ones, all of one length.
- FID falls with the number of pictures: with n <= D the covariance is not even of full rank. Its floor,
  another set of true pictures, as many, belongs beside it. KID has no such bias.
- The paper leaves t = 1 out of the validation loss. t = 0 is left out here too: there the model is shown the
  picture itself, and the loss is the variance of the noise.

Run: python metrics.py     closed forms: FID of Gaussian sets, KID of equal ones, a path that is straight
"""
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

import data
import drawn_world as world
import flow
from run_folder import load_part, load_strict, load_tensors, load_tokenizers, read_json, save_tensors
from tensor_files import CheckpointError, write_json
from text_encoders import CLIPImageConfig, CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder
from tokens import load_clip_tokenizer

LEVELS = tuple(k / 8 for k in range(1, 8))      # the times of the validation loss
KEPT = 2048                                     # features kept of a set, for KID
BATCH = 64


def bar(total, what):
    return tqdm(total=total, desc=what, dynamic_ncols=True, disable=None)       # None: on a terminal only


def together(height, width):
    """How many pictures a model is given at once: 64 of 64 x 64, 4 of 256 x 256, 1 of 1024 x 1024."""
    return min(BATCH, max(1, 2 ** 18 // (height * width)))


def fingerprint(path):
    """Twelve hex digits that stand for a file's content; beyond 64 MB only for its size and 64 blocks, which
    training changes."""
    digest, size, block = hashlib.sha256(), Path(path).stat().st_size, 2 ** 20
    digest.update(str(size).encode())
    with open(path, "rb") as f:
        for start in range(0, size, max(block, size // 64)):
            f.seek(start)
            digest.update(f.read(block))
    return digest.hexdigest()[:12]


# --- CLIP's two towers ------------------------------------------------------------------------------------

@dataclass
class Towers:
    """A CLIP whose two halves were trained on each other."""
    image: nn.Module
    text: nn.Module
    tokenizer: object
    name: str                       # with the file's fingerprint, for reports and for the cache

    @torch.no_grad()
    def look(self, pictures, batch=BATCH):
        """Paths or uint8 arrays (S, S, 3), of any sizes -> yields (B, D) float32, each row sqrt(D) long."""
        side, device = self.image.config.image_size, next(self.image.parameters()).device
        with bar(len(pictures), "CLIP features") as progress:
            for start in range(0, len(pictures), batch):
                x = np.stack([fit(p, side) for p in pictures[start:start + batch]])
                x = torch.from_numpy(x).to(device).permute(0, 3, 1, 2).float() / 255
                yield normed(self.image(x))
                progress.update(len(x))

    @torch.no_grad()
    def read(self, texts):
        """n texts -> (n, D) float32, each sqrt(D) long."""
        device = next(self.text.parameters()).device
        rows = [self.text(self.tokenizer(texts[i:i + 256]).to(device))[1] for i in range(0, len(texts), 256)]
        return normed(torch.cat(rows))


def normed(x):
    return F.normalize(x.float(), dim=-1).cpu() * math.sqrt(x.shape[-1])


def fit(picture, side):
    """The centre square, bicubic, as CLIP was trained -> uint8 (side, side, 3)."""
    picture = open_picture(picture) if isinstance(picture, (str, Path)) else picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (side, side), Image.Resampling.BICUBIC))


def load_towers(path, device="cpu"):
    """A run's larger pair, or a CLIP in transformers' layout: model.safetensors, config.json and a tokenizer.

    Raises CheckpointError if the folder has neither."""
    path = Path(path)
    if (path / "clip_g_image.safetensors").is_file():
        image, text = load_part(path, "clip_g_image"), load_part(path, "clip_g")
        tokenizer = load_tokenizers(path, text.config.context_length)["clip_g"]
        file = path / "clip_g_image.safetensors"
        name = f"a run's own tiny CLIP {fingerprint(file)}, {image.config.projection_dim} features"
    elif (path / "model.safetensors").is_file():
        image, text, tokenizer = load_clip_pair(path)
        name = f"CLIP {fingerprint(path / 'model.safetensors')}, {image.config.projection_dim} features"
    else:
        raise CheckpointError(f"{path} holds no CLIP: give the folder of a finished run, or one with "
                              "model.safetensors, config.json, vocab.json and merges.txt, such as CLIP-L's")
    return Towers(image.to(device), text.to(device), tokenizer, name)


def load_clip_pair(path):
    """Both towers from one file, such as openai/clip-vit-large-patch14, strictly. The tensors tell the sizes,
    config.json what tensors cannot: heads and activation (without it heads of 64 and quick_gelu)."""
    tensors, _ = load_tensors(path / "model.safetensors")
    config = read_json(path / "config.json")
    rest = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    tensors = {k: v.float() for k, v in tensors.items() if k not in rest}
    seen = {k: v for k, v in tensors.items() if k.startswith(("vision_model.", "visual_projection."))}
    said = {k: v for k, v in tensors.items() if k not in seen}

    def shape(name, ending):
        key = f"{name}.{ending}"
        if key not in tensors:
            raise CheckpointError(f"{path}/model.safetensors lacks {key}: it needs both towers of a CLIP, "
                                  "under the names that transformers gives them")
        return tensors[key].shape

    def common(name):
        about = config.get("vision_config" if name == "vision_model" else "text_config", {})
        ffn, width = shape(name, "encoder.layers.0.mlp.fc1.weight")
        layers = len([k for k in tensors if k.startswith(f"{name}.") and k.endswith("layer_norm1.weight")])
        return dict(width=width, layers=layers, ffn=ffn, activation=about.get("hidden_act", "quick_gelu"),
                    heads=about.get("num_attention_heads", max(1, width // 64)))

    places, patch = (shape("vision_model", f"embeddings.{k}_embedding.weight") for k in ("position", "patch"))
    image = CLIPImageConfig(image_size=round((places[0] - 1) ** 0.5) * patch[-1], patch_size=patch[-1],
                            projection_dim=shape("visual_projection", "weight")[0], **common("vision_model"))
    words, length = (shape("text_model", f"embeddings.{k}_embedding.weight")[0]
                     for k in ("token", "position"))
    text = CLIPTextConfig(vocab_size=words, context_length=length,
                          projection_dim=shape("text_projection", "weight")[0], **common("text_model"))
    towers = [load_strict(module, part, path / "model.safetensors").eval().requires_grad_(False)
              for module, part in ((CLIPImageEncoder(image), seen), (CLIPTextEncoder(text), said))]
    tokenizer = load_clip_tokenizer(path, length=length)
    if tokenizer.eos != towers[1].eos:
        raise CheckpointError(f"{path}: the tokenizer ends a text with {tokenizer.eos}, this CLIP with "
                              f"{towers[1].eos}: use the tokenizer that it was trained with")
    return *towers, tokenizer


def clip_score(images, texts):
    """Cosines of pictures and their captions, (n, D) each -> (n,)"""
    return (images * texts).sum(1) / images.shape[1]


def retrieval(image, texts):
    """Does a picture, (D,), prefer the first of texts, (1 + rivals, D)? 1 or 0; ties share the 1."""
    right, *others = (texts @ image).tolist()
    return 0.0 if right < max(others, default=-math.inf) else 1 / (1 + others.count(right))


# --- Distances between two sets of pictures ---------------------------------------------------------------

class Statistics:
    """Mean and covariance of features that come in batches; only the first KEPT of them are kept, so let them
    come in any order.

    Float64: in float32 the differences that FID consists of would be lost. Exact up to rounding, whatever the
    batches (Chan, Golub and LeVeque 1979)."""

    def __init__(self, features=None):
        self.n, self.mean, self.scatter, self.kept = 0, None, None, None
        if features is not None:
            self.update(features)

    def update(self, features):
        x = features.detach().cpu().double()                                    # (B, D)
        if x.ndim != 2 or not len(x) or not x.isfinite().all():
            raise ValueError(f"features {tuple(x.shape)} must be (B, D), at least one row, and finite")
        mean = x.mean(0)
        if self.mean is None:
            self.mean, self.scatter = torch.zeros_like(mean), torch.zeros(len(mean), len(mean)).double()
            self.kept = x[:0].float()
        apart, total = mean - self.mean, self.n + len(x)
        self.scatter += (x - mean).T @ (x - mean) + torch.outer(apart, apart) * (self.n * len(x) / total)
        self.mean += apart * (len(x) / total)
        self.kept = torch.cat([self.kept, x[:KEPT - len(self.kept)].float()])
        self.n = total

    @property
    def covariance(self):
        if self.n < 2:
            raise ValueError(f"a covariance needs two pictures or more, not {self.n}")
        return self.scatter / (self.n - 1)


def fid(a, b):
    """Squared Frechet distance of two Gaussians with these Statistics. The trace of (C1 C2)^1/2 is the sum
    of the roots of the eigenvalues of C1^1/2 C2 C1^1/2, which is symmetric: no general matrix root needed."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return (apart + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def kid(x, y, numbers=None):
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3. (n, D), (m, D) -> float, and
    its standard error over the choice of x, by leaving out each tenth of it in turn.

    numbers (n,): of the prompts of x; those of one prompt are left out together. None: all differ.
    Unbiased: a picture is not compared with itself, so that equal sets give 0 on average, and half of the
    time less."""
    x, y = x.double(), y.double()
    n, m, D = len(x), len(y), x.shape[1]
    if min(n, m) < 3:
        raise ValueError(f"KID needs three pictures or more on each side, not {n} and {m}")
    xx, yy, xy = ((p @ q.T / D + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))

    def inside(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    prompts = torch.arange(n) if numbers is None else torch.as_tensor(numbers).unique(return_inverse=True)[1]
    own, folds, tenth = inside(yy), min(int(prompts.max()) + 1, 10), prompts % 10
    value = inside(xx) + own - 2 * xy.mean()
    others = [inside(xx[kept][:, kept]) + own - 2 * xy[kept].mean()
              for kept in (tenth != i for i in range(folds))]
    error = (torch.stack(others).std() * (folds - 1) / folds ** 0.5).item() if folds > 1 else None
    return value.item(), error


def any_order(n):
    """0 .. n - 1 shuffled, always alike: pictures come sorted by task, or by folder."""
    return np.random.default_rng(0).permutation(n).tolist()


def reference(towers, images, cache):
    """Statistics of pictures (n, 3, S, S) uint8, read from the folder `cache` if they were taken before: the
    file's name is a digest of towers and pictures. A cache file that cannot be read is written again."""
    digest = hashlib.sha256(towers.name.encode() + str((*images.shape, KEPT, "in any order")).encode())
    digest.update(images.contiguous().numpy().data)
    path, stats = Path(cache, f"reference-{digest.hexdigest()[:16]}.safetensors"), Statistics()
    if path.is_file():
        try:
            saved, about = load_tensors(path)
            stats.n, stats.mean, stats.scatter, stats.kept = (
                about["n"], saved["mean"], saved["scatter"], saved["kept"])
            return stats
        except (CheckpointError, KeyError) as e:
            print(f"the cached statistics are taken again: {e}")
    for features in towers.look(images[any_order(len(images))].permute(0, 2, 3, 1).numpy()):
        stats.update(features)
    about = {"n": stats.n, "towers": towers.name}
    save_tensors(path, {"mean": stats.mean, "scatter": stats.scatter, "kept": stats.kept}, about)
    return stats


# --- The model itself -------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss(pipe, images, captions, batch=None):
    """Flow-matching loss of pictures (n, 3, S, S) uint8 with a caption each -> (LEVELS, n), on the CPU.

    Picture i has noise of its own, the same every time and at every t: the batch size does not matter."""
    device, rows, batch = pipe.places.device, [], batch or together(*images.shape[2:])
    with bar(len(images), "validation loss") as progress:
        for start in range(0, len(images), batch):
            x = images[start:start + batch].to(device).float() / 127.5 - 1
            own = [torch.Generator().manual_seed(start + i) for i in range(len(x))]
            with torch.autocast(device.type, pipe.dtype or torch.bfloat16, enabled=pipe.dtype is not None):
                with pipe.places.at_work(pipe.vae):
                    posterior = pipe.vae.encode(x)
                z = posterior.mean + posterior.std * flow.draw_noise(posterior.mean.shape, own, device)
                x0, text = pipe.vae.to_latent(z).float(), vars(pipe.encode(captions[start:start + batch]))
                eps = flow.draw_noise(x0.shape, own, device)
                with pipe.places.at_work(pipe.mmdit):
                    at = [flow.loss(pipe.mmdit, x0, t=x0.new_full((len(x0),), t), noise=eps, **text)
                          for t in LEVELS]
                rows.append(torch.stack(at).cpu())                              # (LEVELS, B)
            progress.update(len(x))
    return torch.cat(rows, dim=1)


class PathLength:
    """A callback of flow.sample with Euler steps: `length` (B,) is the sum of |v dt|, `straight` (B,) the
    distance between both ends."""

    def __init__(self, ts):
        self.ts, self.length = [float(t) for t in ts], 0.0

    def __call__(self, i, t, x, x0):
        if i == 0:
            self.start = x
        step = (x - x0) / t * (t - self.ts[i + 1])                              # v dt
        self.length = self.length + step.flatten(1).norm(dim=1)
        self.straight = (x - step - self.start).flatten(1).norm(dim=1)


# --- Copies -----------------------------------------------------------------------------------------------

def nearest(pictures, training, chunk=256):
    """For each of pictures (m, 3, S, S) the nearest of training (n, 3, S, S), both uint8.

    -> (m,) index, (m,) root mean square difference, of 255; a copy has exactly 0."""
    if not len(pictures) or not len(training) or pictures.shape[1:] != training.shape[1:]:
        raise ValueError(f"pictures {tuple(pictures.shape)} and training pictures {tuple(training.shape)}: "
                         "there must be some of each, of one size")
    x = pictures.flatten(1).float() - 128                                       # (m, 3 S S)
    best, index = torch.full((len(x),), math.inf), torch.zeros(len(x), dtype=torch.long)
    with bar(len(training), "nearest") as progress:
        for start in range(0, len(training), chunk):
            y = training[start:start + chunk].flatten(1).float() - 128
            far, i = (y.square().sum(1) - 2 * x @ y.T).min(1)   # less |x|^2, which all share
            index = torch.where(far < best, start + i, index)
            best = torch.minimum(far, best)
            progress.update(len(y))
    apart = pictures.flatten(1).double() - training[index].flatten(1).double()
    return index, apart.square().mean(1).sqrt()


# --- Prompts and folders of pictures, as GenEval has them -------------------------------------------------

class Job(NamedTuple):
    """One picture that is asked for: the k-th of its prompt."""
    number: int                     # of the prompt, and of its folder
    k: int
    seed: int | None                # None: not known, others drew it
    metadata: dict


def seed_of(*words):
    """The seed of a picture, from whole numbers that say which one it is."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie
suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard
tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot
hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote
computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear
hair_drier toothbrush
"""
COCO = tuple(name.replace("_", " ") for name in COCO.split())       # what GenEval's detector knows


def geneval_prompts():
    """GenEval's metadata by its published rules: 100 prompts a task, repetitions left out. These are the 553
    that everybody uses, byte for byte, as random draws are made from GenEval's seed and in its order."""
    n, rng, colours, relations = 100, np.random.default_rng(43), tuple(world.COLOURS), tuple(world.RELATIONS)
    drawn = [("single_object", [(COCO[i], None, 1)]) for i in rng.choice(80, size=80, replace=False)]

    def two(first=0, choices=80):   # colours are not asked of a person, the first of the names
        return [COCO[i + first] for i in rng.choice(choices, size=2, replace=False)]

    drawn += [("two_object", [(name, None, 1) for name in two()]) for _ in range(n)]
    drawn += [("counting", [(COCO[rng.choice(80)], None, int(rng.integers(2, 4, endpoint=True)))])
              for _ in range(n)]
    drawn += [("colors", [(COCO[rng.choice(79) + 1], colours[rng.choice(10)], 1)]) for _ in range(n)]
    drawn += [("position", [(name, None, 1) for name in two()], relations[rng.choice(4)]) for _ in range(n)]
    for _ in range(n):
        pair = two(1, 79)
        drawn.append(("color_attr", [(name, colours[i], 1)
                                     for name, i in zip(pair, rng.choice(10, size=2, replace=False))]))
    unique = {}
    for words in drawn:
        m = world.request(*words)
        m = {k: v for k, v in m.items() if v} | {"prompt": "a photo of " + m["prompt"]}     # no empty exclude
        unique[json.dumps(m)] = m
    return list(unique.values())


def read_prompts(path):
    """GenEval's evaluation_metadata.jsonl, or one like it. -> list of metadata dicts; ValueError if any line
    is not JSON with a prompt."""
    rows = []
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: give one with GenEval's metadata, one JSON object a line")
    for i, line in enumerate(data.lines_of(Path(path)), 1):
        if not line.strip():
            continue
        try:
            rows.append(metadata_in(line))
        except ValueError as e:
            raise ValueError(f"{path}:{i} is not metadata ({e}): repair or remove the line") from None
    if not rows:
        raise ValueError(f"{path} is empty: give a file with one JSON object a line, each with a prompt")
    return rows


def picture_path(folder, job):
    return Path(folder, f"{job.number:05d}", "samples", f"{job.k:05d}.png")


def open_picture(path):
    """-> (H, W, 3) uint8, as a viewer shows it on white. ValueError, with the reason, if it is no picture."""
    return np.array(data.whole_picture(path))


def by_prompt(values, numbers):
    """The mean of each prompt's pictures, by its number: these tend to be right or wrong together."""
    groups = {}
    for value, number in zip(values, numbers):
        groups.setdefault(number, []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


def error_of(values, numbers):
    """The standard error of a mean over pictures, over the choice of prompts; None if there is only one."""
    means = by_prompt(values, numbers)
    return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def name_of(path):
    """The path of a picture in GenEval's layout, within its folder."""
    return "/".join(Path(path).parts[-3:])


def is_number(name):
    return re.fullmatch("[0-9]{1,9}", name) is not None


def metadata_in(text):
    """GenEval's metadata of a prompt; ValueError unless it is JSON with a prompt that can be written."""
    try:
        metadata = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise ValueError('no "prompt" in it')
    metadata["prompt"].encode()                     # half a surrogate pair can be read, but not written
    return metadata


def read_folder(folder):
    """Everything in GenEval's layout. -> [Job, ...], [path, ...], [(name, reason it is skipped), ...]

    Raises ValueError if nothing can be used."""
    jobs, paths, skipped, prompts, folder, seen = [], [], [], [], Path(folder), {}
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with 00000/metadata.jsonl, 00000/samples/*.png")
    for p in sorted(folder.iterdir()):
        picture = p.is_file() and p.suffix.lower() in data.SUFFIXES and p.name != "scores.png"
        if p.is_dir() and is_number(p.name):
            prompts.append(p)
        elif picture or (p / "samples").is_dir():
            skipped.append((p.name, "not a folder with a number for a name, as GenEval's are"))
    prompts.sort(key=lambda p: (int(p.name), p.name))
    with bar(len(prompts), "reading") as progress:
        for sub in prompts:
            progress.update()
            if (first := seen.setdefault(int(sub.name), sub.name)) != sub.name:
                skipped.append((sub.name, f"the same number as {first}, whose prompt counts"))
                continue
            try:
                metadata = metadata_in((sub / "metadata.jsonl").read_text(encoding="utf-8-sig"))
                there = sorted(p for p in (sub / "samples").iterdir() if p.suffix.lower() in data.SUFFIXES)
            except (OSError, ValueError) as e:
                lacking = sub / "metadata.jsonl" if isinstance(e, ValueError) else Path(e.filename)
                why = "missing" if isinstance(e, FileNotFoundError) else str(e)[:160]
                skipped += [(f"{sub.name}/{lacking.name}", f"{why}; its pictures are not scored")]
                continue
            if not there:
                skipped.append((f"{sub.name}/samples", "no picture in it"))
            for path in there:
                try:
                    if not (is_number(path.stem) and path.suffix == ".png"):
                        raise ValueError("its name is not a number and .png, as GenEval's are")
                    open_picture(path)
                except ValueError as e:
                    skipped.append((name_of(path), str(e)))
                    continue
                jobs.append(Job(int(sub.name), int(path.stem), None, metadata))
                paths.append(path)
    if not jobs:
        causes = "; ".join(f"{name}: {why}" for name, why in skipped[:3])
        raise ValueError(f"{folder} holds no picture to score: it needs 00000/metadata.jsonl and "
                         f"00000/samples/00000.png ({causes or 'there are no such folders'})")
    return jobs, paths, skipped


def draw_folder(pipe, jobs, folder, steps, guidance):
    """Draw what is asked for and not there yet, in GenEval's layout. -> [path, ...], in the order of the jobs

    Each PNG holds its settings, its seed and the length of its path from noise, and appears whole or not at
    all. One of another prompt or seed is drawn again: what the i-th prompt is may change with its source."""
    from pipeline import save_picture, settings_of, to_pil  # here: the measures themselves need no pipeline

    def is_drawn(job):
        try:
            told = settings_of(picture_path(folder, job))
            return (told["prompt"], told["seed"]) == (job.metadata["prompt"], job.seed)
        except (ValueError, TypeError, KeyError):
            return False

    todo = [job for job in jobs if not is_drawn(job)]
    batch = together(*pipe.size)
    if todo:
        print(f"drawing {len(todo)} pictures in {steps} steps; {len(jobs) - len(todo)} exist", flush=True)
    with bar(len(jobs), "drawing") as progress:
        progress.update(len(jobs) - len(todo))
        for start in range(0, len(todo), batch):
            now = todo[start:start + batch]
            path = PathLength(flow.schedule(steps, pipe.shift, pipe.kind))
            images = to_pil(pipe([job.metadata["prompt"] for job in now], seed=[job.seed for job in now],
                                 steps=steps, guidance=guidance, output="tensor", callback=path))
            lengths = zip(path.length.tolist(), path.straight.tolist())
            for job, image, (length, straight) in zip(now, images, lengths):
                target = picture_path(folder, job)
                if job.k == 0 or not target.parent.is_dir():
                    write_json(target.parent.parent / "metadata.jsonl", job.metadata)
                save_picture(image, target, {
                    "prompt": job.metadata["prompt"], "seed": job.seed, "steps": steps, "guidance": guidance,
                    "path": length, "straight": straight})
                progress.update()
    return [picture_path(folder, job) for job in jobs]


# --- Demo -------------------------------------------------------------------------------------------------

def demo():
    """Where the answers are known: Gaussians with chosen mean and covariance, equal sets, a straight path."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, 2, generator=g, dtype=torch.float64) for _ in range(2))
    white = [(s - s.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(s.T))).T for s in (x, y)]
    A, B = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    x, y = (w @ torch.linalg.cholesky(C).T + m for w, C, m in zip(white, (A, B), (0.0, 0.5)))
    # of a 2 x 2 matrix M, tr M^1/2 = (tr M + 2 det(M)^1/2)^1/2
    expected = 2 * 0.25 + 10 - 2 * ((A @ B).trace() + 2 * (A @ B).det().sqrt()).sqrt().item()
    print(f"FID of two Gaussian sets {fid(Statistics(x), Statistics(y)):.6f}, by the formula {expected:.6f}")
    assert abs(fid(Statistics(x), Statistics(y)) - expected) < 1e-6

    draws = torch.tensor([kid(*torch.randn(2, 40, 8, generator=g))[0] for _ in range(500)])
    error = draws.std() / 500 ** 0.5
    print(f"KID of equal sets: mean of 500 draws {draws.mean():+.4f} +- {error:.4f}")
    assert abs(draws.mean()) < 4 * error

    target, ts = torch.full((1, 3), 2.0), flow.schedule(50, 3.0, "clean")
    path = PathLength(ts)
    flow.sample(lambda x, t: (x - target) / t[:, None], torch.zeros(1, 3), ts, callback=path)
    print(f"path to the one picture there is: {path.length.item():.4f}, straight {path.straight.item():.4f}")
    assert torch.allclose(path.length, path.straight) and torch.allclose(path.length, target.norm())


# Exercises
# 1. Keep the diagonal in kid(): equal sets no longer give 0. By how much, and why less with more pictures?
# 2. Do Statistics in float32: how large must the mean be before FID goes wrong?
# 3. Compare 100, 1,000 and 10,000 drawings with 10,000 others by fid() and by kid(): which one depends on the
#    number?

if __name__ == "__main__":
    demo()
