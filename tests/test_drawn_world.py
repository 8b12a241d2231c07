"""Claims about drawn_world.py -> evidence: captions and metadata are true of the pixels; objects lie inside
the picture and apart; unseen pairs stay unseen; prompts are GenEval's."""
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import drawn_world as world
from drawn_world import COLOURS, HELD_OUT, PLACES, RELATIONS, SHAPES, TASKS, Thing

seeds, tasks = st.integers(0, 2 ** 32), st.sampled_from(TASKS)
REACH = {s: float(np.linalg.norm(points, axis=1).max()) for s, points in world.OUTLINES.items()}


def make(seed, task=None):
    return world.scene(np.random.default_rng(seed), task)


@settings(deadline=None, max_examples=200)
@given(seeds, tasks)
def test_objects_lie_inside_the_picture_and_apart(seed, task):
    things = make(seed, task).things
    for i, a in enumerate(things):
        reach = a.r * REACH[a.shape]
        assert min(a.x, a.y, 1 - a.x, 1 - a.y) >= reach + 0.01
        for b in things[:i]:
            assert math.hypot(a.x - b.x, a.y - b.y) >= reach + b.r * REACH[b.shape] + 0.03


@given(seeds, tasks)
def test_places_follow_from_the_number_of_objects_and_their_relation_alone(seed, task):
    scene = make(seed, task)
    relation = scene.metadata["include"][-1].get("position", [None])[0]
    assert [(t.x, t.y) for t in scene.things] == world.layout(len(scene.things), relation)
    for (x, y), (other_x, other_y) in zip(world.layout(2, relation), world.layout(2, relation)[1:]):
        across = {"above": (0, -0.5), "below": (0, 0.5), "right of": (0.5, 0)}.get(relation, (-0.5, 0))
        assert (x - other_x, y - other_y) == across


def test_drawn_objects_do_not_touch():
    for seed in range(60):                       # as many separate pieces as objects
        things = make(seed, "counting").things
        solid = [t._replace(shape="circle", r=t.r * REACH[t.shape]) for t in things]   # no holes
        ink = (world.draw(solid, 64) != 128).any(axis=2)
        pieces = 0
        while ink.any():
            stack = [tuple(np.argwhere(ink)[0])]
            pieces += 1
            while stack:
                y, x = stack.pop()
                if 0 <= y < 64 and 0 <= x < 64 and ink[y, x]:
                    ink[y, x] = False
                    stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert pieces == len(things)


def test_eight_pairs_are_held_out_each_shape_once_and_no_colour_twice():
    assert len(HELD_OUT) == 8
    assert {s for s, _ in HELD_OUT} == set(SHAPES)
    assert len({c for _, c in HELD_OUT} & set(COLOURS)) == 8


def test_training_shows_every_pair_but_the_held_out_ones():
    seen = {(t.shape, t.colour) for seed in range(1500) for t in make(seed).things}
    assert seen == {(s, c) for s in SHAPES for c in COLOURS} - HELD_OUT


def test_the_training_mix_has_its_weights():
    assert set(world.MIX) == set(TASKS) and sum(world.MIX.values()) == pytest.approx(1)
    counts = Counter(make(seed).metadata["tag"] for seed in range(3000))
    for task, weight in world.MIX.items():
        assert counts[task] / 3000 == pytest.approx(weight, abs=0.04)


def test_tasks_have_the_objects_that_they_name():
    for seed in range(150):
        assert len(make(seed, "single_object").things) == len(make(seed, "colors").things) == 1
        for task in ("two_object", "position", "color_attr"):
            a, b = make(seed, task).things
            assert a.shape != b.shape and (task != "color_attr" or a.colour != b.colour)
        group = make(seed, "counting").things
        assert 2 <= len(group) <= 4 and len({(t.shape, t.colour, t.r) for t in group}) == 1


def box(thing):
    """The pixels that a thing covers when drawn alone, as (centre, size) in pixels."""
    rows, columns = np.nonzero((world.draw([thing], 128) != 128).any(axis=2))
    low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()])
    return (low + high) / 2, high - low


def test_positions_hold_by_genevals_rule_and_no_other_holds_more():
    for seed in range(200):
        s = make(seed, "position")
        (a, size_a), (b, size_b) = (box(t) for t in s.things)
        offset = a - b
        less = np.maximum(abs(offset) - 0.1 * (size_a + size_b), 0)
        offset = np.sign(offset) * less / np.linalg.norm(offset)
        relation = s.metadata["include"][1]["position"][0]
        assert offset @ RELATIONS[relation] > 0.5, s.captions
        assert max(RELATIONS, key=lambda name: offset @ RELATIONS[name]) == relation, s.captions


def test_half_of_the_position_prompts_name_colours():
    coloured = sum("color" in make(seed, "position").metadata["include"][0] for seed in range(600))
    assert 240 < coloured < 360


AREAS = {"circle": math.pi, "square": 1.64 ** 2, "triangle": 3 * math.sqrt(3) / 4, "diamond": 1.5,
         "star": 10 * 0.5 * 0.42 * math.sin(math.radians(36)),
         "cross": 8 * 0.32 * math.sqrt(1 - 0.32 ** 2) - 4 * 0.32 ** 2, "ring": math.pi * (1 - 0.52 ** 2),
         "heart": 180 * math.pi / 17 ** 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_closed_form_area_around_its_centre(shape):
    x, y, r = 0.47, 0.52, 0.3
    image = world.draw([Thing(shape, "white", x, y, r)], 256)
    cover = (image[..., 0].astype(float) - 128) / (252 - 128)
    assert cover.sum() / 256 ** 2 == pytest.approx(AREAS[shape] * r ** 2, rel=0.025)
    columns = cover.sum(axis=0)     # every shape is symmetric about its vertical axis
    assert (columns @ (np.arange(256) + 0.5)) / columns.sum() / 256 == pytest.approx(x, abs=0.002)


def test_shapes_stand_upright():
    for shape, tip in (("triangle", 0), ("star", 0), ("heart", -1)):    # the row of the single tip
        ink = (world.draw([Thing(shape, "red", 0.5, 0.5, 0.3)], 256) != 128).any(axis=2)
        rows = np.flatnonzero(ink.any(axis=1))
        tip_width, other_width = (np.ptp(np.flatnonzero(ink[rows[end]])) for end in (tip, -1 - tip))
        assert tip_width <= 6 and other_width > 60


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_exact_and_the_ground_is_mid_grey(colour):
    image = world.draw([Thing("circle", colour, 0.5, 0.5, 0.2)])
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[32, 32]) == COLOURS[colour] and tuple(image[2, 2]) == (128, 128, 128)


def test_drawing_something_unknown_names_the_choices():
    for thing in (Thing("hexagon", "red", 0.5, 0.5, 0.2), Thing("star", "mauve", 0.5, 0.5, 0.2)):
        with pytest.raises(ValueError, match="choose from circle, .*red, "):
            world.draw([thing])


def test_metadata_is_genevals():
    star, ring = ("star", "red", 1), ("ring", "blue", 1)
    assert world.request("single_object", [("star", None, 1)]) == {
        "tag": "single_object", "include": [{"class": "star", "count": 1}], "exclude": [], "prompt": "a star"}
    two = [("star", None, 1), ("ring", None, 1)]
    assert world.request("two_object", two)["prompt"] == "a star and a ring"
    assert world.request("counting", [("heart", None, 3)]) == {
        "tag": "counting", "include": [{"class": "heart", "count": 3}],
        "exclude": [{"class": "heart", "count": 4}], "prompt": "three hearts"}
    assert world.request("colors", [star]) == {
        "tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "exclude": [],
        "prompt": "a red star"}
    assert world.request("position", [("star", None, 1), ("ring", None, 1)], "left of") == {
        "tag": "position", "include": [{"class": "ring", "count": 1},
                                       {"class": "star", "count": 1, "position": ["left of", 0]}],
        "exclude": [], "prompt": "a star left of a ring"}
    assert world.request("position", [star, ring], "above")["prompt"] == "a red star above a blue ring"
    assert world.request("color_attr", [star, ring])["prompt"] == "a red star and a blue ring"


def test_articles_and_plurals():
    assert world.phrase("orange star") == "an orange star" and world.phrase("ring") == "a ring"
    assert world.phrase("cross", 2) == "two crosses" and world.phrase("red heart", 4) == "four red hearts"


@settings(deadline=None, max_examples=200)
@given(seeds, tasks)
def test_metadata_is_true_of_the_scene_and_is_its_prompt(seed, task):
    s = make(seed, task)
    assert s.captions[0] == s.metadata["prompt"] and task == s.metadata["tag"]
    for clause in s.metadata["include"]:
        named = [t for t in s.things if t.shape == clause["class"]]
        assert sum(t.colour == clause.get("color", t.colour) for t in named) == clause["count"]
    for clause in s.metadata["exclude"]:
        assert sum(t.shape == clause["class"] for t in s.things) < clause["count"]
    assert json.loads(json.dumps(s.metadata)) == s.metadata


def read_back(caption):
    """The synthetic caption's own words -> {(size, colour, shape): (count, set of places)}."""
    pattern = r"(an?|two|three|four) (small|medium|big) (\w+) (\w+) at the ((?:(?! and an? ).)+)"
    count = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    plural = {s + ("es" if s == "cross" else "s"): s for s in SHAPES}
    return {(size, colour, plural.get(shape, shape)): (count[n], set(re.split(", | and ", places)))
            for n, size, colour, shape, places in re.findall(pattern, caption)}


@settings(deadline=None, max_examples=300)
@given(seeds, tasks)
def test_the_synthetic_caption_tells_all_objects_truly_in_at_most_18_words(seed, task):
    s = make(seed, task)
    expected = {}
    for t in s.things:
        size = "small" if t.r < 0.15 else "medium" if t.r < 0.18 else "big"
        count, places = expected.get((size, t.colour, t.shape), (0, set()))
        place = PLACES[math.floor(3 * t.y)][math.floor(3 * t.x)]
        expected[size, t.colour, t.shape] = (count + 1, places | {place})
    assert read_back(s.captions[1]) == expected
    assert max(len(caption.split()) for caption in s.captions) <= 18


def test_synthetic_captions_read_well():
    star, ring = Thing("star", "red", 0.2, 0.2, 0.14), Thing("ring", "blue", 0.8, 0.5, 0.19)
    assert world.describe([star, ring]) == "a small red star at the top left and a big blue ring at the right"
    hearts = [Thing("heart", "red", x, x, 0.14) for x in (0.8, 0.2, 0.5)]
    assert world.describe(hearts) == "three small red hearts at the top left, center and bottom right"
    assert world.describe(hearts[:1] * 2) == "two small red hearts at the bottom right"


def test_scenes_repeat_by_seed_and_unknown_tasks_are_refused():
    assert make(7) == make(7) != make(8)
    for call in (lambda: make(0, "texture"), lambda: world.prompts("texture", 1)):
        with pytest.raises(ValueError, match="single_object, two_object"):
            call()


# --- Prompts ---

DISTINCT = dict(single_object=8, two_object=56, counting=24, colors=80, position=224, color_attr=5040)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_distinct_while_distinct_ones_exist(task):
    n = min(DISTINCT[task], 400)
    asked = world.prompts(task, n)
    assert len({m["prompt"] for m in asked}) == len(asked) == n and {m["tag"] for m in asked} == {task}
    assert len({m["prompt"] for m in world.prompts(task, DISTINCT[task] + 50)}) >= min(DISTINCT[task], 4000)


@pytest.mark.parametrize("task", TASKS)
def test_a_tenth_of_the_colour_prompts_is_unseen_and_flagged(task):
    asked = world.prompts(task, 100, seed=3)
    for m in asked:
        assert m["unseen"] == any((c["class"], c.get("color")) in HELD_OUT for c in m["include"])
    assert sum(m["unseen"] for m in asked) == (10 if task in ("colors", "color_attr") else 0)


def test_prompts_depend_on_the_seed_alone():
    fifty = world.prompts("position", 50, 1)
    assert fifty == world.prompts("position", 50, 1) != world.prompts("position", 50, 2)
    assert fifty[:20] == world.prompts("position", 20, 1)
    assert world.prompts("colors", 0) == []


def test_the_demo_runs_and_saves_its_sheet(tmp_path, capsys):
    world.demo(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800 and sheet.height > 1000
    assert "position scenes: the pixels lie as" in capsys.readouterr().out
