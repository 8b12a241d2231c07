"""The drawn world: of which pictures are captions certain? Apart from data.py, which loads any pictures,
since evaluate.py asks this world whether what a model has drawn is right.

Shapes on grey, as many as you like, each picture with two true captions: what `train.py --tiny` learns. The
paper judges models by GenEval's six tasks, so the world consists of these six, under GenEval's own tag names:

    single_object   a star                  colors          a red star
    two_object      a star and a ring       color_attr      a red star and a blue ring
    counting        three hearts            position        a star left of a ring

The paper trains on two kinds of caption, half and half: the one found with the picture ("original") and one
in which another model describes all of it ("synthetic"). Here the original is the prompt above, which names
one aspect; the synthetic one gives size, colour and place of every object and leaves relations to be
inferred: "a small red star at the left and a big blue ring at the right".

Eight of the 80 (shape, colour) pairs are never drawn in training. `prompts` asks for them all the same,
marked "unseen": can the model draw a whole when it has seen only the parts?

Where objects stand follows from how many there are and from their relation (`layout`): one in the middle, two
side by side, the first to be named on the left, unless the prompt says otherwise. Sizes, and colours that the
prompt leaves open, are free. Random places make a harder world, for which minutes on a CPU are not enough
(README): the model would have to agree with itself, from noise, on which object stands where.

Lengths are fractions of the picture's side, and y grows downwards: "above" means a smaller y.

DIFFERS: GenEval's prompts begin with "a photo of"; these do not: the words say nothing about a drawing.
DIFFERS: half of the position scenes name colours too ("a red star left of a blue ring"). GenEval's position
  task never does, and neither does `prompts("position")`.
DIFFERS: the paper's synthetic captions come from a captioning model, CogVLM; ours from the drawing program.

Run `python drawn_world.py`: checks captions against pixels, draws the six tasks to runs/drawn_world.png.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MIX = dict(single_object=0.10, two_object=0.18, counting=0.17, colors=0.12, position=0.21, color_attr=0.22)
COLOURS = {"red": (214, 39, 40), "orange": (255, 140, 0), "yellow": (250, 215, 30), "green": (40, 160, 60),
           "blue": (35, 85, 220), "purple": (125, 50, 170), "pink": (255, 130, 190), "brown": (120, 70, 30),
           "black": (20, 20, 20), "white": (252, 252, 252)}
GROUND = (128, 128, 128)            # mid-grey, so that black and white both show
HELD_OUT = frozenset({("circle", "pink"), ("square", "green"), ("triangle", "purple"), ("diamond", "orange"),
                      ("star", "white"), ("cross", "blue"), ("ring", "yellow"), ("heart", "brown")})
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
RADIUS = {"single_object": (0.16, 0.30), "colors": (0.16, 0.30), "two_object": (0.13, 0.20),
          "color_attr": (0.13, 0.20), "counting": (0.13, 0.16), "position": (0.12, 0.18)}
SMALL, BIG = 0.15, 0.18             # r below the first is "small", from the second on "big"
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = (("top left", "top", "top right"), ("left", "center", "right"),
          ("bottom left", "bottom", "bottom right"))


def _outlines():
    """Each shape's outline, (points, 2), for r = 1 and centre 0; y downwards as in the picture."""
    def polar(degrees, radius=1.0):
        a = np.deg2rad(np.asarray(degrees, float))
        return np.stack([np.cos(a), np.sin(a)], axis=1) * np.reshape(radius, (-1, 1))       # (points, 2)

    around = np.linspace(0, 360, 97)
    a = np.deg2rad(around)
    heart = np.stack([16 * np.sin(a) ** 3,
                      5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a) - 13 * np.cos(a)], axis=1)
    w, e = 0.32, math.sqrt(1 - 0.32 ** 2)           # the cross: half an arm's width; its length
    return {
        "circle": polar(around),
        "square": 0.82 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "triangle": polar([-90, 30, 150]),
        "diamond": np.array([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]),
        "star": polar(np.arange(-90, 270, 36), np.tile([1.0, 0.42], 5)),
        "cross": np.array([(-w, -e), (w, -e), (w, -w), (e, -w), (e, w), (w, w),
                           (w, e), (-w, e), (-w, w), (-e, w), (-e, -w), (-w, -w)]),
        "ring": np.concatenate([polar(around), 0.52 * polar(around[::-1])]),    # round, a cut, and back
        "heart": heart / np.linalg.norm(heart, axis=1).max(),
    }


OUTLINES = _outlines()
SHAPES = tuple(OUTLINES)
PALETTE = {s: [c for c in COLOURS if (s, c) not in HELD_OUT] for s in SHAPES}   # what training paints s with


class Thing(NamedTuple):
    """One object: its centre (x to the right, y downwards) and radius in fractions of the picture's side."""
    shape: str
    colour: str
    x: float
    y: float
    r: float


@dataclass
class Scene:
    things: list[Thing]             # in the order in which the captions name them
    captions: tuple[str, str]       # original (a GenEval prompt), synthetic (everything about every object)
    metadata: dict                  # GenEval's: tag, include, exclude, prompt


def draw(things, size=64):
    """Paint things on mid-grey, at 4x and box-averaged. -> (size, size, 3) uint8

    Raises ValueError for a shape not in SHAPES or a colour not in COLOURS."""
    side = 4 * size
    canvas = Image.new("RGB", (side, side), GROUND)
    pen = ImageDraw.Draw(canvas)
    for thing in things:
        if thing.shape not in OUTLINES or thing.colour not in COLOURS:
            raise ValueError(f"cannot draw {thing}: choose from {', '.join(SHAPES)}; {', '.join(COLOURS)}")
        points = (OUTLINES[thing.shape] * thing.r + (thing.x, thing.y)) * side              # (points, 2)
        pen.polygon(points.ravel().tolist(), fill=COLOURS[thing.colour])
    return np.array(canvas.reduce(4))               # (size, size, 3)


def phrase(words, count=1):
    """'orange star' -> 'an orange star'; ('cross', 2) -> 'two crosses'. One to four."""
    if count == 1:
        return ("an " if words[0] in "aeiou" else "a ") + words
    return f"{NUMBERS[count]} {words}" + ("es" if words.endswith("s") else "s")


def request(task, clauses, relation=None):
    """GenEval's metadata, prompt included, for clauses [(shape, colour or None, count), ...]."""
    include = [{"class": s, "count": n} | ({"color": c} if c else {}) for s, c, n in clauses]
    names = [phrase(f"{c} {s}" if c else s, n) for s, c, n in clauses]
    if relation:                    # GenEval lists the landmark first: "a star left of a ring": [ring, star]
        include = [include[1], include[0] | {"position": [relation, 0]}]
    exclude = [{"class": s, "count": n + 1} for s, _, n in clauses] if task == "counting" else []
    prompt = f" {relation or 'and'} ".join(names)
    return {"tag": task, "include": include, "exclude": exclude, "prompt": prompt}


def describe(things):
    """The synthetic caption: size, colour and place of every object; equal objects share one phrase."""
    sizes = ["small" if t.r < SMALL else "medium" if t.r < BIG else "big" for t in things]
    looks = [f"{size} {t.colour} {t.shape}" for size, t in zip(sizes, things)]
    cells = [(min(2, int(3 * t.y)), min(2, int(3 * t.x))) for t in things]      # (row, column) of PLACES
    if len(things) > 1 and len(set(looks)) == 1:    # each place once, in reading order
        *spots, last = [PLACES[row][column] for row, column in sorted(set(cells))]
        places = f"{', '.join(spots)} and {last}" if spots else last
        return f"{phrase(looks[0], len(things))} at the {places}"
    return " and ".join(f"{phrase(look)} at the {PLACES[y][x]}" for look, (y, x) in zip(looks, cells))


def layout(count, relation=None):
    """Centres [(x, y), ...] of `count` objects, in the order in which the prompt names them."""
    left, right, top, bottom = (0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75)
    if count == 1:
        return [(0.5, 0.5)]
    if count == 2:
        return {"right of": [right, left], "above": [top, bottom], "below": [bottom, top]}.get(
            relation, [left, right])
    upper = [(0.25, 0.25), (0.75, 0.25)]
    return upper + ([bottom] if count == 3 else [(0.25, 0.75), (0.75, 0.75)])


def scene(rng, task=None):
    """A random scene for training, never with a HELD_OUT pair. task None: one of the six, weighted by MIX.

    rng: np.random.Generator. Raises ValueError for an unknown task."""
    def pick(options):
        return options[int(rng.integers(len(options)))]

    if task is None:
        task = str(rng.choice(TASKS, p=[MIX[t] for t in TASKS]))
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    kinds = 2 if task in ("two_object", "position", "color_attr") else 1
    shapes = [SHAPES[int(i)] for i in rng.permutation(len(SHAPES))[:kinds]]
    colours = [pick(PALETTE[s]) for s in shapes]
    while task == "color_attr" and colours[0] == colours[1]:
        colours[1] = pick(PALETTE[shapes[1]])
    count = pick(list(NUMBERS)) if task == "counting" else 1
    relation = pick(list(RELATIONS)) if task == "position" else None
    named = task in ("colors", "color_attr") or (task == "position" and rng.random() < 0.5)     # its colours

    radii = rng.uniform(*RADIUS[task], kinds).tolist() * count                  # counting: one size for all
    spots = layout(kinds * count, relation)
    things = [Thing(s, c, x, y, r) for s, c, (x, y), r in zip(shapes * count, colours * count, spots, radii)]
    metadata = request(task, [(s, c if named else None, count) for s, c in zip(shapes, colours)], relation)
    return Scene(things, (metadata["prompt"], describe(things)), metadata)


def _requests(task):
    """Every prompt of a task, as metadata, in a fixed order."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    bare = [(s, None, 1) for s in SHAPES]
    painted = [(s, c, 1) for s in SHAPES for c in COLOURS]
    pairs = [[a, b] for a in bare for b in bare if a != b]
    clauses = {
        "single_object": [[a] for a in bare],
        "two_object": pairs,
        "counting": [[(s, None, n)] for s in SHAPES for n in NUMBERS],
        "colors": [[a] for a in painted],
        "position": pairs,
        "color_attr": [[a, b] for a in painted for b in painted if a[0] != b[0] and a[1] != b[1]],
    }[task]
    relations = RELATIONS if task == "position" else [None]
    return [request(task, c, relation) for c in clauses for relation in relations]


def prompts(task, n, seed=0):
    """n GenEval metadata dicts to score a model on, distinct while distinct ones exist.

    Each also has "unseen": whether it names a HELD_OUT pair. Every tenth of "colors" and "color_attr" does.
    Position prompts name no colours, as in GenEval. Raises ValueError for an unknown task."""
    seen, unseen = [], []
    for m in _requests(task):
        m["unseen"] = any((c["class"], c.get("color")) in HELD_OUT for c in m["include"])
        (unseen if m["unseen"] else seen).append(m)
    rng = np.random.default_rng(seed)
    seen, unseen = ([group[int(i)] for i in rng.permutation(len(group))] for group in (seen, unseen))
    if not unseen:
        return [seen[i % len(seen)] for i in range(n)]
    return [unseen[i // 10 % len(unseen)] if i % 10 == 9 else seen[(i - i // 10) % len(seen)]
            for i in range(n)]


def demo(out="runs/drawn_world.png"):
    """Check captions against pixels, time the drawing, save a sheet of the six tasks. 2 seconds."""
    from data import contact_sheet          # only here: data.py needs this module

    def centre(image, colour):      # of the pixels that have a palette colour, as (x, y) in pixels
        rows, columns = np.nonzero(np.abs(image - np.array(COLOURS[colour])).max(axis=2) < 12)
        assert len(rows), f"no {colour} pixel"
        return np.array([columns.mean(), rows.mean()])

    start = time.perf_counter()
    scenes = [scene(np.random.default_rng((1, i))) for i in range(1000)]
    pictures = [draw(s.things) for s in scenes]
    print(f"1000 scenes, {pictures[0].shape}: {time.perf_counter() - start:.2f} ms each")     # 1000 a second
    asked = [(s, picture) for s, picture in zip(scenes, pictures)
             if s.metadata["tag"] == "position" and s.things[0].colour != s.things[1].colour]
    for s, picture in asked:
        first, second = (centre(picture, thing.colour) for thing in s.things)
        relation = s.metadata["include"][1]["position"][0]
        assert (first - second) @ RELATIONS[relation] > 0, s.captions
    print(f'{len(asked)} position scenes: the pixels lie as "left of", "right of", "above" and "below" say')
    longest = max((c for s in scenes for c in s.captions), key=lambda c: len(c.split()))
    assert len(longest.split()) <= 18
    print(f"longest caption: {longest!r}, {len(longest.split())} words")
    unseen = [m["prompt"] for m in prompts("color_attr", 100) if m["unseen"]]
    print(f"color_attr: {len(unseen)} of 100 prompts are unseen in training, for example {unseen[0]!r}")
    rng = np.random.default_rng(2)
    examples = {task: [scene(rng, task) for _ in range(6)] for task in TASKS}
    rows = {task: [(draw(s.things, 128), s.captions) for s in row] for task, row in examples.items()}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(out)
    print(f"the six tasks, one in each row: {out}")


# Exercises
# 1. Let layout() put the two objects of a position scene anywhere on their side of the middle: how many
#    scenes does GenEval's own rule (in tests/test_drawn_world.py) reject, and what becomes of the position
#    score?
# 2. Let describe() name the relation too, and train with --synthetic 1: how far does the position score rise
#    from 7 % (studies/captions.csv)? The paper's synthetic captions, mixed in, took it from 6.5 to 18.0.
# 3. Train with --synthetic 0: of the unseen pairs 83 % come out right, of all prompts 98. Then let PALETTE
#    hold all of COLOURS for each shape and train so again: what they gain is the price of composition.

if __name__ == "__main__":
    demo(*sys.argv[1:2])
