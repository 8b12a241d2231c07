"""Claims of evaluate.py: the scorer accepts what is true, rejects what is false, and judges as GenEval."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import drawn_world as world
import evaluate
import metrics
from drawn_world import Thing
from evaluate import Found, find_objects, judge, score

shapes, colours = st.sampled_from(world.SHAPES), st.sampled_from(list(world.COLOURS))
few = settings(deadline=None, max_examples=40)
GREY = np.full((64, 64, 3), 128, np.uint8)


def names(found):
    return sorted((f.colour, f.shape) for f in found)


def at(shape, colour, x, y, confidence=0.9, half=0.1):
    """A Found with a square box around (x, y)."""
    return Found(shape, colour, x, y, (x - half, y - half, x + half, y + half), confidence)


def asked(task, *clauses, relation=None):
    return world.request(task, clauses, relation)


def paint(prompt, size=64):
    """A right picture for any prompt of world.prompts, by reading its words."""
    words = prompt.split()
    relation = next((r for r in world.RELATIONS if f" {r} " in prompt), None)
    count = next((n for n, word in world.NUMBERS.items() if word == words[0]), 1)
    kinds, colour = [], None
    for word in words:
        colour = word if word in world.COLOURS else colour
        shape = next((s for s in world.SHAPES if word in (s, s + "s", s + "es")), None)
        if shape:
            kinds.append((shape, colour or "red"))
            colour = None
    x, y = world.RELATIONS[relation or "left of"]
    spots = [(0.5 + 0.25 * x, 0.5 + 0.25 * y), (0.5 - 0.25 * x, 0.5 - 0.25 * y)]
    if count > 1:
        kinds, spots = kinds * count, [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    return world.draw([Thing(s, c, *spot, 0.15) for (s, c), spot in zip(kinds, spots)], size)


def painter(prompts, seeds):
    return np.stack([paint(p) for p in prompts])


# --- Truth is accepted, falsehood is not ------------------------------------------------------------------

@pytest.mark.parametrize("spoil, least", [("clean", 0.995), ("blur 0.7", 0.97), ("blur 1.2", 0.9),
                                          ("half size", 0.95), ("noise 6", 0.95), ("noise 12", 0.9)])
def test_true_captions_are_accepted_and_false_ones_are_not(spoil, least):
    by_task, strict, false, _ = evaluate.acceptance(evaluate.SPOILS[spoil], 40 if spoil == "clean" else 20)
    assert by_task["overall"] >= least and strict >= least
    assert min(by_task[task] for task in world.TASKS) >= least - 0.05
    assert false <= (0.005 if spoil == "clean" else 0.01)


def test_a_picture_takes_less_than_10_ms_of_cpu():
    pictures = [world.draw(world.scene(np.random.default_rng(i), "counting").things) for i in range(20)]
    find_objects(pictures[0])       # builds the known views
    times = []
    for _ in range(5):
        start = time.process_time()
        for picture in pictures:
            find_objects(picture)
        times.append(time.process_time() - start)
    assert min(times) < 0.010 * len(pictures)


@few
@given(shapes, colours, st.floats(0.12, 0.3), st.floats(0, 1), st.floats(0, 1))
def test_every_shape_is_found_with_its_colour_place_and_box(shape, colour, r, u, v):
    reach = float(r * np.linalg.norm(world.OUTLINES[shape], axis=1).max()) + 0.01
    x, y = reach + u * (1 - 2 * reach), reach + v * (1 - 2 * reach)
    [f] = find_objects(world.draw([Thing(shape, colour, x, y, r)]))
    outline = world.OUTLINES[shape] * r + (x, y)
    assert (f.shape, f.colour) == (shape, colour) and 0.85 < f.confidence <= 1
    thin = shape not in ("circle", "square", "ring", "cross")                   # tips fade
    assert np.allclose(f.box, (*outline.min(axis=0), *outline.max(axis=0)), atol=(3 if thin else 1) / 64)
    if shape != "heart":            # the others balance on their centres
        assert np.allclose((f.x, f.y), (x, y), atol=0.3 / 64)


def test_blur_moves_neither_the_box_nor_the_centroid():
    square = world.draw([Thing("square", "red", 0.4, 0.55, 0.2)])
    [sharp], [blurred] = find_objects(square), find_objects(evaluate.blur(1.5)(square, None))
    assert sharp.box == blurred.box and np.allclose(sharp[2:4], blurred[2:4], atol=0.1 / 64)


@few
@given(st.integers(0, 10**6))
def test_a_falsified_caption_differs_in_one_thing(seed):
    rng = np.random.default_rng(seed)
    told = world.scene(rng).metadata
    false = evaluate.falsify(told, rng)

    def things(m):
        relation = m["include"][-1].get("position", [None])[0]
        order = m["include"][::-1] if relation else m["include"]
        kinds = [c[key] for c in order for key in ("class", "count")]
        return kinds, [c.get("color") for c in order], relation

    (kinds, paints, relation), (kinds2, paints2, relation2) = things(told), things(false)
    changes = sum(a != b for a, b in zip(kinds, kinds2)) + (relation != relation2)
    swapped = paints != paints2 and paints == paints2[::-1]
    changes += 1 if swapped else sum(a != b for a, b in zip(paints, paints2))
    assert changes == 1 and false["tag"] == told["tag"] and false["prompt"] != told["prompt"]
    assert bool(false["exclude"]) == bool(told["exclude"])


def test_captions_of_other_pictures_score_near_chance():
    rng, right = np.random.default_rng(0), {}
    for task in world.TASKS:
        scenes = [world.scene(rng, task) for _ in range(60)]
        found = [find_objects(world.draw(s.things)) for s in scenes]
        hits = [judge(f, scenes[(i + k) % 60].metadata)[0] for i, f in enumerate(found) for k in range(1, 60)]
        right[task] = np.mean(hits)
    # one of 8 shapes; 2 of 8, in any order; 24 (shape, count); 72 pairs of training; 224 relations; 72 * 56
    chance = dict(single_object=1 / 8, two_object=1 / 28, counting=1 / 24, colors=1 / 72)
    for task, share in chance.items():
        assert share / 2 < right[task] < 2 * share, task
    assert right["position"] < 1 / 56 and right["color_attr"] < 1 / 200


# --- Pictures that are not clean drawings -----------------------------------------------------------------

@pytest.mark.parametrize("size", [48, 96, 128, 512])
def test_pictures_of_other_sizes_are_resized(size):
    things = [Thing("star", "brown", 0.3, 0.3, 0.14), Thing("ring", "purple", 0.7, 0.6, 0.14)]
    expected, found = find_objects(world.draw(things)), find_objects(world.draw(things, size))
    assert names(found) == names(expected)
    for f in found:
        [same] = [e for e in expected if e.shape == f.shape]
        assert np.allclose((f.x, f.y, *f.box), (same.x, same.y, *same.box), atol=2 / 64)


def everything():
    return [m for task in world.TASKS for m in world.prompts(task, 40)]


@pytest.mark.parametrize("picture", [GREY, GREY * 0, GREY * 0 + 255, np.random.default_rng(0).integers(
    0, 256, (64, 64, 3), dtype=np.uint8)], ids=["grey", "black", "white", "noise"])
def test_an_empty_or_noisy_picture_fails_every_prompt(picture):
    assert find_objects(picture) == []
    assert not any(judge([], m)[0] for m in everything())


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_any_picture_is_measured_quickly_and_without_warnings(seed, block):
    grid = np.random.default_rng(seed).integers(0, 256, (64 // block, 64 // block, 3), dtype=np.uint8)
    start = time.process_time()
    with np.errstate(all="raise"):
        found = find_objects(grid.repeat(block, axis=0).repeat(block, axis=1))
    assert time.process_time() - start < 2
    assert all(0 <= f.confidence <= 1 and 0 <= min(f.box) and max(f.box) <= 1 for f in found)
    assert [f.confidence for f in found] == sorted((f.confidence for f in found), reverse=True)


def test_small_shapes_may_lose_their_corners():
    for shape in world.SHAPES:
        for r in (0.13, 0.16):
            drawn = evaluate.blur(1.5)(world.draw([Thing(shape, "white", 0.5, 0.5, r)]), None)
            sharp = 190 + 2 * (drawn.astype(float) - 190)       # twice as steep about half height
            assert names(find_objects(sharp.clip(128, 252).astype(np.uint8))) == [("white", shape)]


def test_blobs_are_unknown_but_count_as_clutter():
    bar = GREY.copy()
    bar[30:35, 8:56] = world.COLOURS["red"]
    [f] = find_objects(bar)
    assert f.shape == "unknown" and f.colour == "red" and f.confidence < evaluate.SURE
    star = world.draw([Thing("star", "blue", 0.5, 0.25, 0.15)])
    both = np.where(bar == 128, star, bar)
    assert judge(find_objects(star), asked("single_object", ("star", None, 1))) == (True, True, "")
    assert judge(find_objects(both), asked("single_object", ("star", None, 1))) == (True, False, "")


def test_specks_are_dropped_and_the_smallest_legal_objects_kept():
    speck, star = Thing("circle", "red", 0.2, 0.2, 0.04), Thing("star", "red", 0.6, 0.6, 0.12)
    assert names(find_objects(world.draw([speck, star]))) == [("red", "star")]


def test_a_ghost_is_not_seen_and_a_faded_object_keeps_its_colour():
    for colour in world.COLOURS:
        picture = world.draw([Thing("square", colour, 0.5, 0.5, 0.2)]).astype(float)
        faded, ghost = ((128 + share * (picture - 128)).astype(np.uint8) for share in (0.6, 0.4))
        assert names(find_objects(faded)) == [(colour, "square")] and find_objects(ghost) == []


def test_the_ground_may_be_another_one_or_slope():
    picture = world.draw([Thing("star", "brown", 0.3, 0.3, 0.14), Thing("ring", "purple", 0.7, 0.6, 0.14)])
    slope = np.linspace(-20, 20, 64)[None, :, None]
    drawn = abs(picture.astype(int) - 128).max(axis=2, keepdims=True) > 20
    for other in (picture + slope, picture + 20.0, picture - 20.0, np.where(drawn, picture, 255)):
        found = find_objects(other.clip(0, 255).astype(np.uint8))
        assert names(found) == [("brown", "star"), ("purple", "ring")]


def test_objects_that_touch_are_told_apart_by_colour_or_waist():
    for a, b in (("red", "yellow"), ("black", "white"), ("orange", "red"), ("blue", "purple")):
        touching = [Thing("square", a, 0.3, 0.5, 0.18), Thing("square", b, 0.59, 0.5, 0.18)]
        assert names(find_objects(world.draw(touching))) == sorted([(a, "square"), (b, "square")])
    for shape, step in (("circle", 0.3), ("circle", 0.28), ("ring", 0.3), ("heart", 0.29)):
        row = [Thing(shape, "red", 0.5 + k * step, 0.5, 0.15) for k in (-1, 0, 1)]
        assert names(find_objects(world.draw(row))) == [("red", shape)] * 3, (shape, step)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("between", [("red", "orange"), ("yellow", "orange"), ("red", "brown"),
                                     ("blue", "purple")])
def test_an_object_of_a_hue_between_two_colours_is_one_object(shape, between):
    """Its pixels, which vary a little, lie nearest to either."""
    first, second = (world.draw([Thing(shape, c, 0.5, 0.5, 0.25)]).astype(float) for c in between)
    share = 0.5 + 0.1 * np.sin(np.arange(64) / 5)[None, :, None]
    found = find_objects(((1 - share) * first + share * second).round().astype(np.uint8))
    assert len(found) == 1 and found[0].shape == shape and found[0].colour in between


@pytest.mark.parametrize("hole", np.arange(0.42, 0.63, 0.04))
@pytest.mark.parametrize("r", [0.15, 0.2, 0.3])
def test_rings_may_be_thick_or_thin(r, hole):
    disc, inner = (world.draw([Thing("circle", "blue", 0.5, 0.5, s)]).astype(int) for s in (r, hole * r))
    found = find_objects((disc - inner + 128).clip(0, 255).astype(np.uint8))
    assert [(f.shape, f.colour) for f in found] == [("ring", "blue")]


def test_a_shape_of_two_colours_is_neither():
    red, blue = (world.draw([Thing("circle", c, 0.5, 0.5, 0.25)]) for c in ("red", "blue"))
    halves = find_objects(np.where(np.arange(64)[None, :, None] < 32, red, blue))
    assert {f.colour for f in halves} == {"red", "blue"} and {f.shape for f in halves} == {"unknown"}


@pytest.mark.parametrize("picture", [GREY.astype(np.float32), GREY[:, :32], GREY[..., 0], GREY[None],
                                     np.zeros((64, 64, 4), np.uint8), np.uint8(3)])
def test_what_is_no_square_uint8_picture_is_refused(picture):
    with pytest.raises(ValueError, match="square uint8"):
        find_objects(picture)


def test_a_picture_does_not_depend_on_those_before_it():
    pictures = [paint(m["prompt"]) for task in world.TASKS for m in world.prompts(task, 4)]
    forward = [find_objects(p) for p in pictures]
    assert forward == [find_objects(p) for p in pictures[::-1]][::-1]


# --- GenEval's rules --------------------------------------------------------------------------------------

def test_too_few_objects_are_wrong_and_more_are_only_not_strict():
    one = asked("single_object", ("star", None, 1))
    star, ring = at("star", "red", 0.2, 0.2), at("ring", "red", 0.7, 0.7)
    assert judge([], one) == (False, False, "expected 1 star, found 0")
    assert judge([star], one) == (True, True, "")
    assert judge([star, ring], one) == (True, False, "") == judge([star, star], one)
    assert judge([ring], asked("two_object", ("star", None, 1), ("ring", None, 1)))[0] is False


def test_counting_excludes_one_more():
    three = asked("counting", ("heart", None, 3))
    hearts = [at("heart", "red", x, 0.5) for x in (0.1, 0.4, 0.7, 0.9)]
    assert [judge(hearts[:n], three)[0] for n in range(5)] == [False, False, False, True, False]
    assert "fewer than 4 heart" in judge(hearts, three)[2]
    assert judge([*hearts[:3], at("star", "red", 0.5, 0.1)], three)[:2] == (True, False)


def test_colours_belong_to_their_objects():
    wanted = asked("color_attr", ("star", "red", 1), ("ring", "blue", 1))
    right = [at("star", "red", 0.2, 0.2), at("ring", "blue", 0.7, 0.7)]
    swapped = [at("star", "blue", 0.2, 0.2), at("ring", "red", 0.7, 0.7)]
    assert judge(right, wanted) == (True, True, "")
    reason = "expected red star, found blue; expected blue ring, found red"
    assert judge(swapped, wanted) == (False, False, reason)


def test_the_most_confident_object_of_a_shape_must_have_the_colour():
    red, blue = at("star", "red", 0.2, 0.2, 0.9), at("star", "blue", 0.7, 0.7, 0.95)
    wanted = asked("colors", ("star", "red", 1))
    assert judge([blue, red], wanted)[0] is False and judge([red, blue], wanted)[0] is True
    two = asked("counting", ("star", "red", 2))
    assert judge([red, blue], two)[0] is False and judge([red, red], two)[0] is True


@pytest.mark.parametrize("offset, held", [
    ((-0.4, 0.0), {"left of"}), ((0.4, 0.0), {"right of"}), ((0.0, -0.4), {"above"}), ((0.0, 0.4), {"below"}),
    ((-0.4, -0.4), {"left of", "above"}),           # 0.36 of 0.57 along both
    ((-0.4, 0.2), {"left of"}),                     # 0.16 of 0.45 below is 0.36
    ((0.06, 0.0), set()),                           # 0.06 - 0.1 * 0.4 leaves a third of the offset
    ((0.09, 0.0), {"right of"}),                    # 0.05 of 0.09
    ((0.03, 0.03), set()), ((0.0, 0.0), set())])
def test_relations_are_genevals(offset, held):
    a, b = at("star", "red", 0.5 + offset[0], 0.5 + offset[1]), at("ring", "blue", 0.5, 0.5)
    assert evaluate.relations(a, b) == held


def test_a_position_is_that_of_the_first_thing_named():
    star, ring = at("star", "red", 0.2, 0.5), at("ring", "red", 0.8, 0.5)
    wanted = asked("position", ("star", None, 1), ("ring", None, 1), relation="left of")
    assert judge([star, ring], wanted) == (True, True, "")
    turned = asked("position", ("ring", None, 1), ("star", None, 1), relation="left of")
    assert judge([star, ring], turned) == (False, False, "ring is not left of star")
    assert judge([star], wanted)[2] == "expected 1 ring, found 0; nothing for star to be left of"
    of_both, far = asked("position", ("star", None, 1), ("ring", None, 2), relation="left of"), (0.5, 0.05)
    assert [judge([star, ring, at("ring", "red", x, 0.5)], of_both)[0] for x in far] == [True, False]


# --- Scores -----------------------------------------------------------------------------------------------

def test_right_pictures_of_every_prompt_score_one():
    sizes = []

    def draw_pictures(prompts, seeds):
        sizes.append((len(prompts), len(seeds)))
        return painter(prompts, seeds)

    result = score(draw_pictures, n=20)
    wrong = [r for r in result["records"] if not r["strict"]]
    assert not wrong, wrong[:3]
    assert set(result["score"]) == {*world.TASKS, "overall"} and set(result["score"].values()) == {1.0}
    assert result["seen"] == result["unseen"] == result["shape"] == result["colour"] == 1
    assert sizes == [(64, 64), (56, 56)]
    assert sum(r["unseen"] for r in result["records"]) == 4 and len(result["records"]) == 120
    json.dumps(result)              # may be written to a file as it is


def test_empty_pictures_score_zero_with_an_error_that_is_not():
    result = score(lambda prompts, seeds: [GREY] * len(prompts), n=10)
    assert set(result["score"].values()) == set(result["strict"].values()) == {0.0} == {result["colour"]}
    assert 0.05 < result["error"]["colors"] < 0.1 and result["error"]["overall"] < result["error"]["colors"]
    assert all(r["reason"] for r in result["records"])


def test_shares_count_what_they_name():
    star = world.draw([Thing("star", "red", 0.5, 0.5, 0.2)])
    result = score(lambda prompts, seeds: [star] * len(prompts), n=40, tasks=("single_object", "colors"))
    single, colours = (world.prompts(task, 40) for task in ("single_object", "colors"))
    stars = [m["include"][0]["class"] == "star" for m in single + colours]
    reds = [m["include"][0]["color"] == "red" for m in colours]
    assert result["score"]["single_object"] == np.mean(stars[:40]) == 1 / 8
    assert result["strict"] == result["score"]
    assert result["shape"] == np.mean(stars) and result["colour"] == np.mean(reds)
    assert result["score"]["colors"] == np.mean(np.logical_and(stars[40:], reds))
    assert result["score"]["overall"] == (result["score"]["single_object"] + result["score"]["colors"]) / 2
    p, q = (40 / 8 + 1) / 42, (40 * result["score"]["colors"] + 1) / 42
    assert result["error"]["overall"] == pytest.approx(((p * (1 - p) + q * (1 - q)) / 40) ** 0.5 / 2)
    assert score(painter, n=2, tasks=("counting",))["unseen"] is None

    def only_trained(prompts, seeds):
        unseen = {m["prompt"] for m in world.prompts("colors", 20) if m["unseen"]}
        return [GREY if p in unseen else paint(p) for p in prompts]

    trained = score(only_trained, n=20, tasks=("colors",))
    assert (trained["seen"], trained["unseen"], trained["score"]["colors"]) == (1, 0, 0.9)


def test_single_objects_and_pairs_are_counted_in_all_their_tasks_and_a_colour_is_that_of_the_surest_object():
    def tally(*tasks, found):
        jobs = evaluate.requests(10, tasks, per_prompt=1)
        return evaluate.tally(jobs, [found(job.metadata) for job in jobs])

    def right(m):
        return [at(c["class"], c.get("color", "red"), 0.2, 0.2) for c in m["include"]]

    half = tally("single_object", "colors", found=lambda m: right(m) if m["tag"] == "colors" else [])
    assert half["shape"] == 0.5 and half["colour"] == 1
    half = tally("colors", "color_attr", found=lambda m: right(m) if m["tag"] == "colors" else [])
    assert half["seen"] == half["unseen"] == 0.5
    assert tally("colors", found=lambda m: [at("star", "teal", 0.7, 0.7), *right(m)])["colour"] == 0


def test_prompts_and_seeds_depend_neither_on_n_nor_on_the_other_tasks():
    def asked(**options):
        return [(r["task"], r["prompt"], r["seed"]) for r in score(painter, **options)["records"]]

    few, many = asked(n=3), asked(n=5)
    assert [r for r in few if r[0] == "colors"] == asked(n=3, tasks=("colors",))
    assert [r for task in world.TASKS for r in [m for m in many if m[0] == task][:3]] == few
    assert len({seed for _, _, seed in many}) == len(many)
    twice = asked(n=3, per_prompt=2)
    assert twice[::2] == few and len({seed for _, _, seed in twice}) == 36
    assert not {seed for _, _, seed in asked(n=3, seed=1)} & {seed for _, _, seed in few}


@pytest.mark.parametrize("options, message", [
    (dict(n=0), "at least 1"), (dict(per_prompt=0), "at least 1"), (dict(tasks=()), "at least 1"),
    (dict(tasks=("colours",)), "unknown task")])
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score(painter, **options)


def test_a_missing_picture_and_one_too_many_are_noticed():
    for given in (lambda prompts: prompts[1:], lambda prompts: prompts * 2):
        with pytest.raises(ValueError, match="one each"):
            score(lambda prompts, seeds: painter(given(prompts), seeds), n=1)


# --- Chance, truth and other worlds -----------------------------------------------------------------------

def results(jobs, pictures):
    return evaluate.tally(jobs, [find_objects(p) for p in pictures])


def test_a_run_with_shuffled_captions_scores_at_chance():
    jobs, rng = evaluate.requests(30, per_prompt=1), np.random.default_rng(0)
    pictures = [evaluate.illustrate(job.metadata, rng) for job in jobs]
    found, order = [find_objects(p) for p in pictures], []
    for k in range(6):
        order += [30 * k + int(i) for i in rng.permutation(30)]
    right, wrong = evaluate.tally(jobs, found), evaluate.tally(jobs, [found[i] for i in order])
    assert right["score"]["overall"] == 1
    for task in world.TASKS:         # of 30, one stays in its place on average
        chance = right["chance"][task] + 1 / 30
        assert abs(wrong["score"][task] - chance) < 4 * (chance * (1 - chance) / 30) ** 0.5, task
    assert abs(wrong["score"]["overall"] - right["chance"]["overall"] - 1 / 30) < 0.06


def test_chance_is_what_a_blind_model_gets_however_few_prompts_there_are():
    for n in (1, 12):
        jobs = evaluate.requests(n, per_prompt=4)
        truth = [evaluate.illustrate(job.metadata, np.random.default_rng(job.seed)) for job in jobs]
        chance = results(jobs, truth)["chance"]
        assert chance["single_object"] == pytest.approx(1 / 8, abs=0.03) and chance["overall"] < 0.05


def test_any_of_four_counts_prompts_and_the_error_grows_where_pictures_of_a_prompt_agree():
    jobs = evaluate.requests(10, ("single_object",), per_prompt=4)
    right = [paint(job.metadata["prompt"]) for job in jobs]
    one_each = [p if job.k == 2 else GREY for p, job in zip(right, jobs)]
    some = [p if job.number < 5 else GREY for p, job in zip(right, jobs)]
    one_each, some = results(jobs, one_each), results(jobs, some)
    assert (one_each["score"]["overall"], one_each["any"]["overall"]) == (0.25, 1)
    assert (some["score"]["overall"], some["any"]["overall"]) == (0.5, 0.5)
    assert some["error"]["single_object"] == pytest.approx(0.5 / 9 ** 0.5)      # ten prompts, not 40 pictures
    assert one_each["error"]["single_object"] == pytest.approx((11 / 42 * 31 / 42 / 40) ** 0.5)


def test_confusions_lie_on_the_diagonal_for_true_drawings_and_beside_it_for_others():
    jobs = evaluate.requests(12, per_prompt=2)
    rng = np.random.default_rng(1)
    confusion = results(jobs, [evaluate.illustrate(job.metadata, rng) for job in jobs])["confusion"]
    for kind, n in (("shape", 48), ("colour", 24 + 48), ("count", 24), ("relation", 24)):
        assert all(list(row) == [asked] for asked, row in confusion[kind].items()), kind
        assert sum(sum(row.values()) for row in confusion[kind].values()) == n
    star = world.draw([Thing("star", "red", 0.5, 0.5, 0.2)])
    seen = results(jobs, [star] * len(jobs))["confusion"]
    assert all(set(row) == {"star"} for row in seen["shape"].values())
    assert all(set(row) <= {"red", "none"} for row in seen["colour"].values())
    assert all(set(row) <= {"0", "1"} for row in seen["count"].values())
    assert all(set(row) == {"none"} for row in seen["relation"].values())
    three = asked("counting", ("star", None, 3))
    for n, told in ((5, "5"), (6, "more")):
        assert evaluate.confusions(three, [at("star", "red", 0.2, 0.2)] * n) == [("count", "3", told)]
    ring = at("ring", "red", 0.5, 0.5)
    for place, told in (((0.1, 0.1), "left of"), ((0.5, 0.1), "above")):        # diagonally it is both
        wanted = asked("position", ("star", None, 1), ("ring", None, 1), relation="left of")
        found = [at("star", "red", *place), ring]
        assert evaluate.confusions(wanted, found) == [("relation", "left of", told)]


@pytest.mark.parametrize("task, count", [("single_object", 7), ("two_object", 12), ("counting", 7 + 2),
                                         ("colors", 7 + 9), ("position", 12 + 3), ("color_attr", 28 + 1)])
def test_variants_are_all_captions_that_differ_in_one_thing(task, count):
    for m in world.prompts(task, 5):
        told = [v["prompt"] for vs in evaluate.variants(m).values() for v in vs]
        assert len(set(told)) == len(told) == count and m["prompt"] not in told
        known = {v["prompt"] for v in world._requests(task)}
        assert set(told) <= known


def test_true_drawings_of_every_prompt_are_accepted_unseen_pairs_included():
    jobs = [job for job in evaluate.requests(60, ("colors", "color_attr", "position", "counting"), 1)]
    rng = np.random.default_rng(0)
    result = results(jobs, [evaluate.illustrate(job.metadata, rng, 96) for job in jobs])
    assert sum(r["unseen"] for r in result["records"]) == 12
    assert result["unseen"] == 1 and min(result[key]["overall"] for key in ("score", "strict")) >= 0.99


def test_the_drawn_worlds_prompts_are_known_and_those_of_other_worlds_are_not():
    assert not [m for m in everything() if evaluate.foreign(m) or evaluate.foreign(json.loads(json.dumps(m)))]
    for m in metrics.geneval_prompts():
        assert evaluate.foreign(m) and not evaluate.foreign(m, metrics.COCO)


CLAUSE = {"class": "star", "count": 1}
PLACED = {"class": "ring", "count": 1, "position": ["left of", 0]}


@pytest.mark.parametrize("metadata", [
    None, [], "a star", {}, {"prompt": 3}, {"prompt": "a star"}, {"prompt": "a", "tag": "single_object"},
    {"prompt": "a", "tag": "single_object", "include": []},
    {"prompt": "a", "tag": "single_object", "include": [3]},
    {"prompt": "a", "tag": "caption", "include": [CLAUSE]},
    {"prompt": "a", "tag": "single_object", "include": [CLAUSE | {"class": "bench"}]},
    {"prompt": "a", "tag": "single_object", "include": [CLAUSE | {"class": ["star"]}]},
    {"prompt": "a", "tag": "single_object", "include": [CLAUSE | {"count": "1"}]},
    {"prompt": "a", "tag": "single_object", "include": [CLAUSE | {"count": True}]},
    {"prompt": "a", "tag": "counting", "include": [CLAUSE | {"count": 5}]},
    {"prompt": "a", "tag": "counting", "include": [CLAUSE | {"count": 0}]},
    {"prompt": "a", "tag": "colors", "include": [CLAUSE]},
    {"prompt": "a", "tag": "colors", "include": [CLAUSE | {"color": "teal"}]},
    {"prompt": "a", "tag": "colors", "include": [CLAUSE | {"color": ["red"]}]},
    {"prompt": "a", "tag": "colors", "include": [CLAUSE | {"color": {}}]}, {"prompt": "a", "tag": ["colors"]},
    {"prompt": "a", "tag": "counting", "include": [CLAUSE],
     "exclude": [{"class": "ring", "count": 2, "color": ["red"]}]},
    {"prompt": "a", "tag": "position", "include": [CLAUSE, PLACED | {"position": [["left of"], 0]}]},
    {"prompt": "a", "tag": "position", "include": [CLAUSE, PLACED | {"position": ["left of", 0.0]}]},
    {"prompt": "a", "tag": "two_object", "include": [CLAUSE]},
    {"prompt": "a", "tag": "position", "include": [CLAUSE, PLACED | {"position": ["near", 0]}]},
    {"prompt": "a", "tag": "position", "include": [CLAUSE, PLACED | {"position": ["left of", 1]}]},
    {"prompt": "a", "tag": "position", "include": [CLAUSE, PLACED | {"position": 3}]},
    {"prompt": "a", "tag": "position", "include": [CLAUSE, CLAUSE | {"class": "ring"}]},
    {"prompt": "a", "tag": "two_object", "include": [CLAUSE, PLACED]},
    {"prompt": "a", "tag": "counting", "include": [CLAUSE], "exclude": [{"class": "bench", "count": 2}]},
    {"prompt": "a", "tag": "counting", "include": [CLAUSE], "exclude": "none"}])
def test_metadata_that_cannot_be_judged_is_told_from_the_drawn_worlds(metadata):
    assert evaluate.foreign(metadata)


def test_strong_noise_is_smoothed_away():
    assert evaluate.acceptance(evaluate.noise(25), 15)[0]["overall"] > 0.95
